"""Soups and mixed merges of real fine-tunings, predicted from a few losses and measured (extra `llm`).

Eight runs of a small language model, two tasks × two splits of the data × two seeds. `linfit plan` sees the checkpoints
and the losses of seven merges; all else is predicted, written by `linfit merge` and evaluated by transformers.
"""

import json
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from linfit.bridge import fit_weights, merge, plan
from sims.laboratory.toy_language import counting_text, encode, held_out_losses, make_family, reversal_text

__all__ = ["soups_of_runs"]

TASKS = ("sums", "reversals")
RECIPES = [(task, split) for task in TASKS for split in (0, 0, 1, 1)]


def soups_of_runs(*, soups: int, shares: np.ndarray, lines: int, seed: int, **family: Any) -> xr.Dataset:
    """Losses of soups of 1 … 8 runs, of mixed merges and of what `linfit.bridge.plan` suggests, predicted and measured.

    Args:
        soups: how many random soups of each size from 2 to 7.
        shares: of the reversals (S,) in merges of the two tasks' averages.
        lines: held-out lines of sums, and of reversals.
        seed: of the model, its data, and which soups.
        family: further arguments of `make_family`.

    Losses are in nats, (…, task); a loss without a task is the mean of both.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    labels = [task for task, _ in RECIPES]
    weights, kinds = _merges(np.random.default_rng([seed, 7]), soups, shares)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tuned = make_family(folder, seed=seed, recipes=RECIPES, **family)
        evaluate = _evaluator(folder, base, tuned, _held_out(np.random.default_rng([seed, 9]), lines))
        first = plan(base, tuned, tasks=labels)
        known = np.array(first.next_weightings[: first.evaluations_needed[0]])
        losses = np.stack([evaluate(weights) for weights in known])  # (E, task, window)
        files = {
            tuple(row): _write(folder, number, each.mean(0)) for number, (row, each) in enumerate(zip(known, losses))
        }
        found = plan(base, tuned, tasks=labels, losses=files)
        assert found.fit is not None
        suggested = [[weight.value for weight in each] for each in (found.fit.weights, found.weights)]
        weights, kinds = np.vstack([weights, *suggested]), [*kinds, "least loss", "least distance"]
        measured = np.stack([evaluate(row).mean(-1) for row in weights])  # (merge, task)
    fits = [fit_weights(known, losses[:, task], found.products, tasks=2) for task in range(2)]
    predicted = np.stack([fit(weights) for fit in fits if fit is not None], -1)
    return xr.Dataset(
        {
            "weight": (("merge", "run"), weights),
            "runs": ("merge", (np.abs(weights) > 1e-9).sum(1)),
            "kind": ("merge", kinds),
            "fitted": ("merge", [bool((np.abs(known - row).max(1) < 1e-9).any()) for row in weights]),
            "predicted": (("merge", "task"), predicted),
            "measured": (("merge", "task"), measured),
            "known_loss": (("evaluation", "task"), losses.mean(-1)),
            "cosine": (("run", "other_run"), found.cosines),
            "share": ("mixture", shares),
        },
        {"task": list(TASKS)},
        {
            "seed": seed, "lines": lines, "predicted_best": found.fit.loss.value,
            "predicted_best_low": found.fit.loss.low, "predicted_best_high": found.fit.loss.high,
            "redundant": json.dumps(found.redundant), "verdict": found.fit.verdict, "evaluations": len(known),
        },
    )  # fmt: skip


def _merges(generator: np.random.Generator, soups: int, shares: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Weights (merge, run) of each run, random soups of 2 … 7, the soup of all, and the tasks' averages mixed."""
    runs = np.eye(len(RECIPES))
    first, second = (runs[[task == name for task, _ in RECIPES]].mean(0) for name in TASKS)
    chosen = [runs, *(_random_soups(generator, runs, size, soups) for size in range(2, 8)), runs.mean(0)[None]]
    mixed = [(1 - share) * first + share * second for share in shares]
    return np.vstack([*chosen, *mixed]), ["soup"] * sum(map(len, chosen)) + ["mixed"] * len(mixed)


def _random_soups(generator: np.random.Generator, runs: np.ndarray, size: int, count: int) -> np.ndarray:
    """`count` different averages of `size` runs."""
    every = list(combinations(range(len(runs)), size))
    return np.stack([runs[list(every[pick])].mean(0) for pick in generator.permutation(len(every))[:count]])


def _held_out(generator: np.random.Generator, lines: int) -> list[np.ndarray]:
    """Tokens of both tasks, equally many."""
    texts = [encode(text(generator, lines)) for text in (counting_text, reversal_text)]
    return [text[: min(map(len, texts))] for text in texts]


def _evaluator(
    folder: Path, base: Path, tuned: list[Path], held_out: list[np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    """Losses (task, window) of the merge with given weights, written to disk and loaded by transformers."""
    import transformers

    def evaluate(weights: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            path = merge(base, tuned, Path(name) / "merged", weights=weights.tolist()).folders[0]
            model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        return np.stack([held_out_losses(model, tokens) for tokens in held_out])

    return evaluate


def _write(folder: Path, number: int, losses: np.ndarray) -> Path:
    """As `linfit losses` writes them."""
    path = folder / f"{number}.jsonl"
    path.write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses.tolist()), encoding="utf-8")
    return path
