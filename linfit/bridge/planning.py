"""Which weights to merge K runs with, what more runs would gain, and which runs to leave out (docs, B2; ours)."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linfit.bridge.delta import products_of_runs
from linfit.bridge.evaluations import read_result
from linfit.bridge.family import Family, Paths, open_family
from linfit.bridge.mixture import WeightFit, fit_weights, least_numbers, next_weightings
from linfit.bridge.output import Progress
from linfit.bridge.soup import Estimate, Moments, Sample, squared_distances

# A tensor belongs to the first group with a word in its name; layers are kept together, their number is no word.
_GROUPS = {
    "norm": r"norm|(^|[._])ln(_|\d|\.)",
    "head": r"(^|\.)(lm_head|embed_out|score|classifier)\.",
    "embedding": r"embed|(^|\.)w[tp]e\.",
    "attention": r"attn|attention|[qkvo]_proj",
    "mlp": r"mlp|ffn|feed_forward|(^|\.)fc|(gate|up|down)_proj|experts|dense",
}

CANNOT_KNOW = (
    "Distances are Euclidean: a weight that the loss does not feel counts like one that it does (no curvature).",
    "The variance is that of these runs, from one base: what differs between them is what is averaged away. What all "
    "of them share, their common data and settings, counts as signal, overfitting included.",
    "Runs are taken as independent. Runs that share data or a trajectory look more alike than they are good.",
    "Losses are not predicted: --losses fits them.",
)


class Gain(NamedTuple):
    """What the plain average of r runs of each task is expected to be."""

    runs: float  #: r; inf for as many as one likes.
    distance: float  #: E‖average − target‖², averaged over tasks.
    gain: Estimate  #: By how much that is below r = 1.
    share: Estimate  #: The gain over the mean squared length of one run's delta.
    tau: Estimate  #: The best ensemble coefficient of that average.


class Group(NamedTuple):
    """Tensors that are given the same weights."""

    group: str
    tensors: list[str]
    agreement: Estimate  #: Signal over signal + variance: the cosine of two runs of a task, to be expected.
    share: float  #: Of the squared length of all deltas.
    tau: Estimate  #: Sum of the weights.
    weights: list[Estimate]  #: Of the runs.


class Plan(NamedTuple):
    """What `plan` found."""

    base: str
    tuned: list[str]
    tasks: list[str]  #: One label for each run.
    products: np.ndarray  #: ⟨δ_j, δ_k⟩ over all tensors (K, K).
    cosines: np.ndarray  #: (K, K).
    signal: Estimate  #: ‖m̄‖², m̄ the mean of what the runs of each task share.
    variance: Estimate  #: V of one run.
    between_tasks: Estimate  #: B: no number of runs removes it.
    gains: list[Gain]
    noise_ratios: list[float]  #: V of each run over that of all.
    weights: list[Estimate]  #: For all tensors together.
    groups: list[Group]
    redundant: list[tuple[int, int]]  #: Pairs of runs, numbered from 0.
    conflicts: list[tuple[int, int]]
    evaluations_needed: list[int]  #: For the form in T leading directions, and for the whole one: K(K+3)/2 + 1.
    next_weightings: list[list[float]]  #: What to evaluate next, most useful first.
    fit: WeightFit | None
    notes: list[str]
    cannot_know: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: names in place of positions."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def plan(
    base: str | Path,
    tuned: Paths,
    *,
    tasks: Sequence[str] | None = None,
    losses: Mapping[tuple[float, ...], str | Path] | None = None,
    only: str | None = None,
    shared: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Mean and variance of K runs of one base or more tasks, and what follows: gains, weights, conflicts.

        δ_k = m_t(k) + e_k,   distance of r runs of each task = B + V/(T r),   weights Γa = β  (module `soup`)

    Every tensor is read once, in blocks. Ours; intervals cover 95 of 100 times or more for the noise described there.

    Args:
        base, tuned: as for `merge`; two runs or more, of one task at least two.
        tasks: label of each run; all the same by default. Variance is that within a task.
        losses: weights (K,) → output of `linfit losses` on the same held-out prompts for base + Σ w_k δ_k.
        only: shell pattern of tensor names.
        shared: leave out the tensors that not all have in the same shape.
        progress: told how many tensors are done, and of how many.

    Raises ValueError as `merge`, for fewer than two runs of every task, a run that is the base, NaN or Inf.
    """
    paths = [tuned] if isinstance(tuned, str | Path) else list(tuned)
    labels = _labels(tasks, len(paths))
    for path in paths:
        if Path(path).resolve() == Path(base).resolve():
            raise ValueError(f"tuned must be fine-tuned from the base, got the base {base} itself")
    evaluated = _read_losses(losses or {}, len(paths))
    family = open_family(base, paths, shared=shared, mixed_dtypes=True)
    names = family.comparable(only)
    sample = Sample(_stream(family, names, progress), [sorted(set(labels)).index(label) for label in labels])
    total = sample.grams.sum(0)
    for path, square in zip(paths, np.diag(total)):
        if square == 0:
            raise ValueError(f"{path} equals the base in every tensor compared: no fine-tuned run")
    weightings, values = evaluated
    count = len(set(labels))
    fit = fit_weights(weightings, values, total, tasks=count) if len(weightings) else None
    ratios = sample.noise_ratios()
    cosines = total / np.sqrt(np.outer(np.diag(total), np.diag(total)))
    redundant, conflicts = _pairs(total, cosines, labels)
    return Plan(
        str(base), [str(path) for path in paths], labels, total, np.clip(cosines, -1, 1),
        *_signal_and_noise(sample), _gains(sample), ratios.tolist(), sample.estimate(sample.best_weights(ratios)),
        _groups(sample, names, ratios), redundant, conflicts,
        [least_numbers(rank, len(paths)) for rank in (count, len(paths))],
        next_weightings(np.reshape(weightings, (-1, len(paths))), total, sample.tasks, fit).tolist(), fit,
        [*family.notes, *_notes(sample, labels, redundant, conflicts, [str(path) for path in paths])], CANNOT_KNOW,
    )  # fmt: skip


def _labels(tasks: Sequence[str] | None, runs: int) -> list[str]:
    labels = ["one"] * runs if tasks is None else [str(task) for task in tasks]
    if runs < 2:
        raise ValueError(f"a plan needs at least 2 fine-tuned runs to see how they differ, got {runs}")
    if len(labels) != runs:
        raise ValueError(f"task must label each of the {runs} runs, got {len(labels)}: {', '.join(labels)}")
    if len(set(labels)) == runs:
        raise ValueError(f"at least one task needs 2 runs to show the variance within a task, got {', '.join(labels)}")
    return labels


def _stream(family: Family, names: Sequence[str], progress: Progress | None) -> np.ndarray:
    """⟨δ_j, δ_k⟩ of each tensor (L, K, K)."""
    grams = []
    for done, name in enumerate(names, start=1):
        grams.append(products_of_runs(family.base.tensors[name], family.versions(name)))
        if not np.isfinite(grams[-1]).all():
            raise ValueError(f"{name} holds NaN or Inf in the base or a tuned model: nothing can be said of it")
        if progress is not None:
            progress(done, len(names))
    return np.stack(grams)


def _read_losses(losses: Mapping[tuple[float, ...], str | Path], runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (E, K) and losses (E, n) of the prompts that have a loss everywhere."""
    rows, values = [], []
    for weights, path in losses.items():
        if len(weights) != runs or not np.isfinite(weights).all():
            raise ValueError(f"losses need {runs} finite weights, one for each run, got {list(weights)} for {path}")
        found = read_result(Path(path), "loss")[0]
        if not isinstance(found, np.ndarray):
            raise ValueError(f"{path}: needs the loss of each prompt, as `linfit losses` writes it, not a summary")
        rows.append(list(weights))
        values.append(found)
    sizes = {str(path): value.size for path, value in zip(losses.values(), values)}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"losses must be of the same prompts at all weights, got {sizes}")
    stacked = np.stack(values) if values else np.zeros((0, 0))
    return np.array(rows), stacked[:, np.isfinite(stacked).all(axis=0)] if values else stacked


def group_of(name: str) -> str:
    """The group of a tensor by its name: norm, head, embedding, attention, mlp or other, the first that fits.

    >>> group_of("model.layers.0.self_attn.q_proj.weight"), group_of("transformer.h.3.ln_1.bias")
    ('attention', 'norm')
    """
    return next((group for group, words in _GROUPS.items() if re.search(words, name, re.IGNORECASE)), "other")


def _agreement(found: Moments) -> np.ndarray:
    own = np.maximum(np.trace(found.signal, axis1=-2, axis2=-1) / found.signal.shape[-1], 0)
    square = own + np.maximum(found.variance, 0)
    return (own / np.where(square > 0, square, 1))[..., None]


def _signal_and_noise(sample: Sample) -> tuple[Estimate, Estimate, Estimate]:
    signal, between = sample.estimate(lambda found: np.stack([found.center, found.between], -1))
    (variance,) = sample.estimate(lambda found: found.noise(1 / found.signal.shape[-1])[..., None], positive=True)
    return signal, variance, between


def _gains(sample: Sample) -> list[Gain]:
    """For 1, 2, … up to twice the runs of the largest task, then doubling twice more, then without end."""
    most = int(np.bincount(sample.tasks).max())
    counts = [*range(1, 2 * most + 1), 4 * most, 8 * most, float("inf")]
    gains = sample.estimate(lambda found: np.stack([found.gain(r) for r in counts], -1), positive=True)
    taus = sample.estimate(lambda found: np.stack([found.tau(r) for r in counts], -1))
    total = sample.total

    def shares(found: Moments) -> np.ndarray:
        noise = (1 - _agreement(found)) / found.signal.shape[-1]
        return noise * (1 - 1 / np.array(counts))

    found = zip(counts, gains, sample.estimate(shares, positive=True), taus)
    return [Gain(float(r), float(total.between + total.noise(r)), gain, share, tau) for r, gain, share, tau in found]


def _groups(sample: Sample, names: Sequence[str], ratios: np.ndarray) -> list[Group]:
    members: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(group_of(name), []).append(row)
    square = np.trace(sample.grams, axis1=1, axis2=2)
    weights, groups = sample.best_weights(ratios), []
    for group, rows in members.items():
        part = Sample(sample.grams[rows], sample.tasks)
        (agreement,) = part.estimate(_agreement)
        (tau,) = part.estimate(lambda found: weights(found).sum(-1, keepdims=True))
        share = float(square[rows].sum() / square.sum())
        groups.append(Group(group, [names[row] for row in rows], agreement, share, tau, part.estimate(weights)))
    return sorted(groups, key=lambda group: -group.share)


def _pairs(total: np.ndarray, cosines: np.ndarray, labels: Sequence[str]) -> tuple[list, list]:
    """Redundant: of a task and within half the usual squared distance, or nearly equal. Conflict: cosine < −0.05."""
    pairs = list(combinations(range(len(labels)), 2))
    apart = squared_distances(total)
    usual = {
        task: np.median([apart[pair] for pair in pairs if {labels[k] for k in pair} == {task}] or [0.0])
        for task in labels
    }
    alike = [
        (j, k)
        for j, k in pairs
        if (labels[j] == labels[k] and apart[j, k] < 0.5 * usual[labels[j]])
        or apart[j, k] <= 1e-3 * min(total[j, j], total[k, k])
    ]
    return alike, [(j, k) for j, k in pairs if cosines[j, k] < -0.05]


def _notes(sample: Sample, labels: Sequence[str], redundant: list, conflicts: list, paths: list[str]) -> list[str]:
    def listed(pairs: list) -> str:
        return ", ".join(f"{Path(paths[j]).name} and {Path(paths[k]).name}" for j, k in pairs[:6])

    notes = []
    if redundant:
        notes.append(
            f"redundant: {listed(redundant)} are nearer to each other than independent runs; leave one of them out, or "
            "the variance is estimated too small"
        )
    if conflicts:
        notes.append(f"in conflict: the deltas of {listed(conflicts)} point apart (cosine below −0.05)")
    if float(sample.total.signal.mean()) <= 0:
        notes.append(
            "the runs share nothing that stands out from their variance: the best weights are those of the base"
        )
    alone = sorted({label for label in labels if labels.count(label) == 1})
    if alone:
        notes.append(f"one run only of {', '.join(alone)}: its variance is taken to be that of the other tasks")
    if sample.is_one_pair:
        notes.append(
            "two runs: errors compare the lengths of their deltas tensor by tensor, as if tensors were independent"
        )
    return notes
