"""Small real language models: a base, and what fine-tuning on another text makes of it (extra `llm`).

Used by the tests, the figure and the documentation, so that everything about checkpoints is shown on checkpoints that
transformers wrote and really trained. Characters are tokens; two small languages are the two tasks.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from linfit.bridge import delta_singular_values, inspect, merge, noise_level

__all__ = [
    "build", "counting_text", "encode", "held_out_losses", "make_family", "merges_along_tau", "reversal_text",
    "story_text",
]  # fmt: skip

_ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789+=.,?!"
_CONTEXT = 32


def counting_text(generator: np.random.Generator, lines: int) -> str:
    """The fine-tuning task: lines such as `17+25=42.`"""
    pairs = generator.integers(0, 50, size=(lines, 2))
    return "".join(f"{a}+{b}={a + b}.\n" for a, b in pairs)


def reversal_text(generator: np.random.Generator, lines: int) -> str:
    """Another task: lines such as `1742?2471.`"""
    return "".join(f"{number}?{str(number)[::-1]}.\n" for number in generator.integers(100, 10_000, size=lines))


def story_text(generator: np.random.Generator, lines: int) -> str:
    """The pretraining task: short sentences over a small vocabulary."""
    who = ("the cat", "a dog", "my friend", "the old king", "a small bird", "the river")
    what = ("sees", "follows", "likes", "finds", "leaves", "remembers")
    where = ("a green hill", "the quiet house", "an open door", "the long road", "a warm stone", "the sea")

    def pick(words: tuple[str, ...]) -> str:
        return words[generator.integers(len(words))]

    return "".join(f"{pick(who)} {pick(what)} {pick(where)}.\n" for _ in range(lines))


def encode(text: str) -> np.ndarray:
    """Token ids (n,) of a text of small letters, digits and a few signs."""
    return np.array([_ALPHABET.index(character) for character in text])


def build(architecture: str = "llama", *, hidden: int = 64, layers: int = 2, seed: int = 0, tied: bool = False) -> Any:
    """An untrained transformers model: architecture llama, qwen2 or gpt2, its embeddings `tied` or not."""
    import torch
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": len(_ALPHABET), "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 2 * _CONTEXT}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes, **no_dropout))
    if architecture not in ("llama", "qwen2"):
        raise ValueError(f"architecture must be llama, qwen2 or gpt2, got {architecture!r}")
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2 * _CONTEXT}
    name = architecture.capitalize()
    model, config = getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")
    return model(config(**common, **sizes))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(model: Any, tokens: np.ndarray, *, steps: int, rate: float = 3e-3, seed: int) -> None:
    """`steps` of AdamW on random windows of a token stream."""
    import torch

    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    with _one_thread():
        for _ in range(steps):
            starts = generator.integers(0, tokens.size - _CONTEXT - 1, size=16)
            windows = torch.from_numpy(np.stack([tokens[start : start + _CONTEXT] for start in starts]))
            loss = model(input_ids=windows, labels=windows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def held_out_losses(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Mean next-token loss of each of the consecutive windows of a token stream (windows,), in nats."""
    import torch

    count = tokens.size // _CONTEXT
    windows = torch.from_numpy(tokens[: count * _CONTEXT].reshape(count, _CONTEXT))
    with torch.no_grad(), _one_thread():
        logits = model(input_ids=windows).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    return losses.mean(dim=1).double().numpy()


def make_family(
    folder: str | Path,
    *,
    architecture: str = "llama",
    runs: int = 3,
    recipes: Sequence[tuple[str, int]] | None = None,
    hidden: int = 64,
    pretrain_steps: int = 400,
    finetune_steps: int = 100,
    finetune_lines: int = 60,
    finetune_rate: float = 1e-3,
    dtype: str = "float32",
    shard_size: str = "50KB",
    tied: bool = False,
    seed: int = 0,
) -> tuple[Path, list[Path]]:
    """Pretrain a base on stories and a few sums, fine-tune it on few sums, and save all; their folders.

    `base`, `tuned_0`, …, each fine-tuned on other data with AdamW, are written by transformers in shards of
    `shard_size`, in the format `dtype` of torch. `recipes` says of each run on which of "sums" and "reversals" and on
    which split of the data it is fine-tuned, in place of `runs` splits of sums; the seed is always the run's own.
    """
    import torch

    texts = {"sums": counting_text, "reversals": reversal_text}
    chosen = [("sums", run) for run in range(runs)] if recipes is None else list(recipes)

    def save(name: str) -> Path:
        path = Path(folder) / name
        model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard_size)
        (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A small model\n", encoding="utf-8")
        (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(_ALPHABET)}), encoding="utf-8")
        return path

    generator = np.random.default_rng([seed, 0])
    text = encode(story_text(generator, 1600) + counting_text(generator, 1600))
    if any(task != "sums" for task, _ in chosen):
        text = np.concatenate([text, encode(reversal_text(generator, 1600))])
    model = build(architecture, hidden=hidden, seed=seed, tied=tied)
    _train(model, text, steps=pretrain_steps, seed=seed)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    base, tuned = save("base"), []
    for run, (task, split) in enumerate(chosen):
        model.to(torch.float32).load_state_dict(start)
        text = encode(texts[task](np.random.default_rng([seed, 1 + split]), finetune_lines))
        _train(model, text, steps=finetune_steps, seed=run, rate=finetune_rate)
        tuned.append(save(f"tuned_{run}"))
    return base, tuned


def merges_along_tau(taus: np.ndarray, *, lines: int, seed: int, **family: Any) -> xr.Dataset:
    """Train a family, merge one run and the average of all along τ, and evaluate every merge with transformers.

    Held-out losses in nats on `lines` stories and twice as many sums (who, tau, window), what `linfit.bridge.inspect`
    finds by layer type, and the singular values of one run's delta of a matrix beside those of pure noise of the same
    level; `family` are further arguments of `make_family`.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    generator = np.random.default_rng([seed, 9])
    held_out = {"stories": encode(story_text(generator, lines)), "sums": encode(counting_text(generator, 2 * lines))}
    matrix = "model.layers.0.mlp.up_proj.weight"
    losses: dict[str, list[np.ndarray]] = {"stories": [], "sums": []}
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = make_family(folder, seed=seed, **family)
        for name, members in (("one", tuned[:1]), ("all", tuned)):
            for path in merge(base, members, Path(folder) / name, tau=taus.tolist()).folders:
                model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
                for task, tokens in held_out.items():
                    losses[task].append(held_out_losses(model, tokens))
        inspection = inspect(base, tuned)
        values = delta_singular_values(base, tuned[0], matrix)
    rows, columns = next(tensor.shape for tensor in inspection.tensors if tensor.name == matrix)
    noise = noise_level(values, (rows, columns))
    pure = noise.entry_std * np.random.default_rng(0).standard_normal((20, rows, columns))
    kinds = [kind for kind in inspection.by_kind() if kind["signal_share"] is not None]
    parameters = sum(int(np.prod(tensor.shape)) for tensor in inspection.tensors)
    return xr.Dataset(
        {
            "stories_loss": (("who", "tau", "story"), np.reshape(losses["stories"], (2, len(taus), -1))),
            "sums_loss": (("who", "tau", "sum"), np.reshape(losses["sums"], (2, len(taus), -1))),
            **{name: ("kind", [kind[name] for kind in kinds]) for name in ("signal_share", "suggested_tau_of_average")},
            "singular_value": ("rank", values),
            "noise_singular_value": ("rank", np.linalg.svd(pure, compute_uv=False).mean(axis=0)),
            "noise_edge": noise.edge,
        },
        {"who": ["one run", "average"], "tau": taus, "kind": [kind["kind"] for kind in kinds]},
        {"runs": len(tuned), "matrix": matrix, "parameters": parameters, "seed": seed},
    )
