"""How far a fine-tuned model moved, and how much of the movement is signal (docs, B2, B3)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linfit.bridge.checkpoint import Files
from linfit.bridge.delta import Delta, inner_products, split_of
from linfit.bridge.family import Family, Paths, open_family
from linfit.bridge.output import Progress
from linfit.bridge.signal import noise_level, optimal_shrinkage
from linfit.bridge.spectrum import spectrum_of, top_directions


class TensorReport(NamedTuple):
    """One tensor. With K ≥ 2 runs the delta is the mean of theirs; spectral fields are None for vectors."""

    name: str
    kind: str  # the name with layer numbers replaced by `*`
    shape: tuple[int, ...]
    base_norm: float  # ‖W‖_F
    delta_norm: float  # ‖ΔW‖_F
    relative_norm: float  # ‖ΔW‖/‖W‖
    changed: float  # share of entries that differ at all: small where a low-precision format swallowed the update
    effective_rank: float | None = None  # (Σs²)²/Σs⁴
    top_singular_values: tuple[float, ...] | None = None
    noise_edge: float | None = None  # where noise would end (Marchenko–Pastur), σ from the median singular value
    above_edge: int | None = None  # number of singular values beyond it
    signal_share: float | None = None  # Ση(s)²/Σs²: the energy that optimal shrinkage keeps
    overlap: float | None = None  # ‖V_kᵀ(ΔW) V_k(W)‖²/k: of the top singular subspaces on the shorter side
    overlap_by_chance: float | None = None  # k/min(m, n)
    resolved: int | None = None  # singular values computed one by one; None where all were
    variance: float | None = None  # V̂ of one run (here and below K ≥ 2)
    signal_to_noise: float | None = None  # signal/V̂ of one run
    suggested_tau: float | None = None  # shrinkage of one run
    suggested_tau_of_average: float | None = None  # shrinkage of the average of all runs


class Inspection(NamedTuple):
    """All tensors of a family."""

    base: str
    tuned: list[str]
    tensors: list[TensorReport]
    notes: list[str]

    def by_kind(self) -> list[dict[str, Any]]:
        """One entry per layer type: norms pooled over layers, other quantities averaged, weighted by ‖ΔW‖²."""
        kinds: dict[str, list[TensorReport]] = {}
        for report in self.tensors:
            kinds.setdefault(report.kind, []).append(report)
        return [{"kind": kind, "tensors": len(group), **_pooled(group)} for kind, group in kinds.items()]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        tensors = [report._asdict() for report in self.tensors]
        return {**self._asdict(), "kinds": self.by_kind(), "tensors": tensors}


_AVERAGED = (
    "effective_rank", "signal_share", "overlap", "overlap_by_chance",
    "signal_to_noise", "suggested_tau", "suggested_tau_of_average",
)  # fmt: skip


def _pooled(group: Sequence[TensorReport]) -> dict[str, float | None]:
    base = sum(report.base_norm**2 for report in group)
    delta = sum(report.delta_norm**2 for report in group)
    result: dict[str, float | None] = {"relative_norm": (delta / base) ** 0.5 if base > 0 else None}
    for field in _AVERAGED:
        known = ((getattr(report, field), report.delta_norm**2) for report in group)
        pairs = [(value, weight) for value, weight in known if value is not None and np.isfinite(value)]
        total = sum(weight for _, weight in pairs)
        result[field] = sum(value * weight for value, weight in pairs) / total if total > 0 else None
    return result


def inspect(
    base: str | Path,
    tuned: Paths,
    *,
    subspace: int = 8,
    only: str | None = None,
    shared: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Norms, spectra, noise edges and, for K ≥ 2 runs, their mean and variance, of every floating tensor.

    Spectra are exact up to a shorter side of 4096; beyond, the largest singular values are still those of the matrix,
    and averages over the others agree to about 1%. The noise edge assumes independent entries of one variance; K runs
    show their own variance only, in the Euclidean metric. Docs, B2 and B3.

    Args:
        base, tuned: as for `merge`.
        subspace: number k of top singular directions that are compared with the base's.
        only: shell pattern of tensor names.
        shared: leave out the tensors that not all have in the same shape.
        progress: told how many tensors are done, and of how many.

    Raises ValueError as `merge`, and for a pattern that fits nothing.
    """
    if subspace < 1:
        raise ValueError(f"subspace must be at least 1, got {subspace}")
    family = open_family(base, tuned, shared=shared, mixed_dtypes=True)
    names = family.comparable(only)
    reports = []
    for done, name in enumerate(names, start=1):
        reports.append(_report(family, name, subspace))
        if progress is not None:
            progress(done, len(names))
    notes = list(family.notes)
    if estimated := sum(report.resolved is not None for report in reports):
        notes.append(f"{estimated} large spectra: top values one by one, the others' distribution to about 1%")
    if low_rank := sum(report.noise_edge == 0 for report in reports):
        notes.append(f"{low_rank} deltas of low rank show no noise level: their signal share of 1 says nothing")
    if not any(report.delta_norm for report in reports):
        notes.append("base and tuned are identical")
    paths = [tuned] if isinstance(tuned, str | Path) else tuned
    return Inspection(str(base), [str(path) for path in paths], reports, notes)


def _report(family: Family, name: str, subspace: int) -> TensorReport:
    base, runs = family.base.tensors[name], family.versions(name)
    mean, single = Delta(base, runs), [Delta(base, [run]) for run in runs]
    base_square = delta_square = changed = 0.0
    products = np.zeros((len(runs), len(runs)))
    fields: dict[str, Any] = {"name": name, "kind": re.sub(r"(?<=\.)\d+(?=\.)", "*", name), "shape": base.shape}
    with Files(source for delta in single for source in delta.sources) as files:
        for span in mean.spans(share=1 + 2 * len(runs) if len(runs) > 1 else 1):
            weights, delta = mean.base_block(files, *span), mean.block(files, *span)
            changed += np.count_nonzero(delta)
            base_square += float(np.sum(np.square(weights, dtype=np.float64)))
            delta_square += float(np.sum(np.square(delta, dtype=np.float64)))
            if len(runs) > 1:
                products += inner_products(each.block(files, *span) for each in single)
        if len(base.shape) >= 2 and min(base.matrix_shape) > 1 and delta_square > 0:
            fields |= _spectrum(mean, files, subspace)
    if len(runs) > 1:
        split = split_of(products)
        fields |= {"variance": split.variance, "signal_to_noise": split.signal_to_noise}
        fields |= {"suggested_tau": split.tau(), "suggested_tau_of_average": split.tau(averaged=len(runs))}
    base_norm, delta_norm = base_square**0.5, delta_square**0.5
    relative = delta_norm / base_norm if base_norm > 0 else float("inf") if delta_norm else 0.0
    fields |= {"base_norm": base_norm, "delta_norm": delta_norm, "relative_norm": relative}
    return TensorReport(changed=changed / base.size, **fields)


def _spectrum(delta: Delta, files: Files, subspace: int) -> dict[str, Any]:
    side, count = min(delta.shape), min(subspace, *delta.shape)
    spectrum = spectrum_of(lambda: delta.blocks(files), side, lambda values: count)
    of_base = top_directions(lambda: delta.blocks(files, of_base=True), side, count)
    s, noise = spectrum.singular_values, noise_level(spectrum.singular_values, delta.shape)
    overlap = spectrum.directions.astype(float).T @ of_base
    energy = float(np.sum(s**2))
    return {
        "effective_rank": energy**2 / float(np.sum(s**4)),
        "top_singular_values": tuple(s[:count].tolist()),
        "noise_edge": noise.edge,
        "above_edge": int(np.sum(s > noise.edge)),
        "signal_share": float(np.sum(optimal_shrinkage(s, delta.shape, noise.entry_std) ** 2)) / energy,
        "overlap": float(np.sum(overlap**2)) / count,
        "overlap_by_chance": count / side,
        "resolved": spectrum.resolved if spectrum.resolved < side else None,
    }


def delta_singular_values(base: str | Path, tuned: Paths, name: str) -> np.ndarray:
    """All singular values, descending, of the (mean) delta of one matrix, as exact as in `inspect`."""
    family = open_family(base, tuned, mixed_dtypes=True)
    if name not in family.names or len(family.base.tensors[name].shape) < 2:
        raise ValueError(f"name must be a matrix that base and tuned share, got {name!r}")
    delta = Delta(family.base.tensors[name], family.versions(name))
    with Files(delta.sources) as files:
        return spectrum_of(lambda: delta.blocks(files), min(delta.shape), lambda values: 0).singular_values
