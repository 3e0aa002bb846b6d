"""θ_τ of real checkpoints, streamed (docs, B1–B3): averaging, soups, shrinkage, and filters on the delta.

θ_τ = (1−τ)·base + τ·tuned      per tensor, in float32, rounded once to the stored dtype.
"""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from linfit.bridge.checkpoint import Files, Tensor, some
from linfit.bridge.delta import Delta, split_runs
from linfit.bridge.family import Family, Paths, matches, open_family, same_bytes
from linfit.bridge.numbers import FLOATS, ITEM_SIZE, encode, stored_dtype
from linfit.bridge.output import Planned, Progress, Write, Written, write_checkpoints
from linfit.bridge.pieces import copied, mixed

if TYPE_CHECKING:
    from linfit.bridge.signal import Filter

Method = Literal["linear", "shrink", "singular", "rank"]
METHODS: dict[str, str] = {  # each as a filter g on the delta
    "linear": "g = τ",
    "shrink": "g = τ·τ_l, τ_l = signal/(signal + variance/K) of the tensor over the K runs",
    "singular": "g = τ·η(s)/s, optimal shrinkage of the singular values",
    "rank": "g = τ·1[i ≤ r]",
}


def merge(
    base: str | Path,
    tuned: Paths,
    out: str | Path,
    *,
    tau: float | Sequence[float] = 1.0,
    method: Method = "linear",
    rank: int | None = None,
    layer_tau: Mapping[str, float] | None = None,
    run_weights: Sequence[float] | None = None,
    weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    dtype: str | None = None,
    shared: bool = False,
    workers: int = 2,
    progress: Progress | None = None,
) -> Written:
    """Write θ_τ = base + g(Δ), Δ the delta of `tuned` (of several: their weighted mean), g the filter of `method`.

    Computed in float32 (float64 for F64) and rounded once; τ = 0 and τ = 1 keep the bits of their input. Paper
    2506.01901 for the linear method; docs, B2 (ours), for shrink and B3 for the others.

    Args:
        base, tuned: folders in Hugging Face layout, files, or (tuned) LoRA adapters.
        out: folder to create; with several τ `out/tau_0.2`, … are written in one pass.
        tau: ensemble coefficients, finite; outside [0, 1] they extrapolate.
        method: a key of `METHODS`; "shrink" needs two runs or more.
        rank: singular values kept by method "rank".
        layer_tau: shell pattern of tensor names → τ; the first match wins.
        run_weights, weights: (K,), sum 1, equal by default; or of any sum, or tensor name or shell pattern → (K,).
        dtype: stored format; that of the tuned model by default.
        shared: average only the tensors and rows that all have.
        workers: threads that read, compute and write.
        progress: told how many bytes are written, and of how many.

    Returns `folders`, `notes`, `bytes_read`, `bytes_written`, `seconds` and `resumed_shards`. Raises ValueError, with
    nothing at `out`, for folders that do not fit together, damaged files, values beyond the range of `dtype`, an
    existing `out`, or a full disk.
    """
    taus = [float(value) for value in ([tau] if isinstance(tau, int | float) else tau)]
    layer_tau = layer_tau or {}
    _check_arguments(taus, method, rank, layer_tau)
    target = None if dtype is None else stored_dtype(dtype)
    family = open_family(base, tuned, shared=shared, mixed_dtypes=target is not None)
    chosen = _weights(weights, run_weights, family, method)
    notes = [*family.notes, *_extrapolations(taus, chosen)]
    filtered = f"{method}: {METHODS[method]}" + (f", r = {rank}" if rank else "")
    return write_checkpoints(
        out,
        {f"tau_{value:g}": _card(family, value, layer_tau, filtered, chosen) for value in taus},
        family.template,
        _Plan(family, _taus(taus, layer_tau, family.names), method, rank, chosen, target, notes),
        title="Merged with linfit",
        inputs=[family.base, *family.tuned],
        arguments={"merge": [2, taus, method, rank, list(layer_tau.items()), chosen, target, shared]},
        side_folders=dict.fromkeys((family.template.folder, family.tuned[0].folder)),
        dtype=target,
        notes=notes,
        workers=workers,
        progress=progress,
    )


def _check_arguments(taus: list[float], method: str, rank: int | None, layer_tau: Mapping[str, float]) -> None:
    if not taus:
        raise ValueError("tau must hold at least one value")
    for name, value in [("tau", value) for value in taus] + list(layer_tau.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(f"tau must be finite, got {value} for {name}")
    if len({f"{value:g}" for value in taus}) != len(taus):
        raise ValueError(f"tau must not repeat a value, got {taus}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "rank" and (rank is None or rank < 1):
        raise ValueError(f"method rank needs rank of at least 1, got {rank}")
    if method != "rank" and rank is not None:
        raise ValueError(f"rank belongs to method rank, got method {method!r}")


def _run_weights(weights: Sequence[float] | None, runs: int, method: str) -> list[float]:
    if method == "shrink" and runs < 2:
        raise ValueError(f"method shrink needs at least 2 fine-tuned runs to see how they differ, got {runs}")
    if weights is None:
        return [1 / runs] * runs
    if len(weights) != runs or not all(map(isfinite, weights)) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"run_weights must be {runs} finite numbers that sum to 1, got {list(weights)}")
    return [float(weight) for weight in weights]


def _weights(
    weights: Sequence[float] | Mapping[str, Sequence[float]] | None,
    run_weights: Sequence[float] | None,
    family: Family,
    method: str,
) -> dict[str, list[float]]:
    """For each tensor of the output, the weight of each run."""
    runs = len(family.tuned)
    if weights is None:
        return dict.fromkeys(family.names, _run_weights(run_weights, runs, method))
    if run_weights is not None or method == "shrink":
        other = "method shrink, which chooses its own" if method == "shrink" else "run_weights"
        raise ValueError(f"weights cannot be combined with {other}")
    patterns = weights if isinstance(weights, Mapping) else {"*": weights}
    for pattern, values in patterns.items():
        if len(values) != runs or not all(map(isfinite, values)):
            raise ValueError(f"weights must be {runs} finite numbers, one for each tuned model, got {list(values)}")
        if pattern not in family.names and not any(matches(pattern, name) for name in family.names):
            raise ValueError(f"weights for {pattern!r} fit no tensor; there are {some(family.names, 'tensor', 3)}")
    chosen = {name: _first_match(patterns, name) for name in family.names}
    if left_out := [name for name, found in chosen.items() if found is None]:
        raise ValueError(f"weights must say something of every tensor; missing {some(left_out, 'tensor')}")
    return {name: [float(value) for value in found or ()] for name, found in chosen.items()}


def _extrapolations(taus: list[float], weights: Mapping[str, list[float]]) -> list[str]:
    found = [f"τ = {value:g} is outside [0, 1]: extrapolation" for value in taus if not 0 <= value <= 1]
    if any(min(row) < 0 or _sum(row) > 1 for row in weights.values()):
        found.append("weights are negative, or sum to more than 1: extrapolation")
    return found


def _first_match(patterns: Mapping[str, Sequence[float]], name: str) -> Sequence[float] | None:
    """What the tensor's own name says, or else the first pattern that fits it."""
    fitting = (values for pattern, values in patterns.items() if matches(pattern, name))
    return patterns[name] if name in patterns else next(fitting, None)


def _taus(taus: list[float], patterns: Mapping[str, float], names: Sequence[str]) -> dict[str, list[float]]:
    """For each tensor of the output, τ in each output folder."""
    fixed: dict[str, float] = {}
    for pattern, value in patterns.items():
        fitting = [name for name in names if matches(pattern, name)]
        if not fitting:
            raise ValueError(f"layer_tau pattern {pattern!r} fits no tensor; there are {some(names, 'tensor', 3)}")
        fixed = dict.fromkeys(fitting, float(value)) | fixed
    return {name: [fixed.get(name, tau) for tau in taus] for name in names}


def _card(
    family: Family, tau: float, layer_tau: Mapping[str, float], method: str, weights: Mapping[str, list[float]]
) -> dict[str, str]:
    """Where a merged model comes from; OWNER/NAME@REVISION for a snapshot in the cache of the Hugging Face Hub."""
    labels = []
    for folder in (each.folder.resolve() for each in (family.base, *family.tuned)):
        repository = folder.parent.parent.name
        in_cache = folder.parent.name == "snapshots" and repository.startswith("models--")
        name = repository.removeprefix("models--").replace("--", "/") + "@" if in_cache else ""
        labels.append(f"`{name}{folder.name}`")
    sets = {tuple(row): name for name, row in reversed(list(weights.items()))}  # each with the first tensor that has it
    listed = [", ".join(f"{label} ({weight:g})" for label, weight in zip(labels[1:], row)) for row in sets]
    if len(sets) > 1:
        listed = [f"{line} for `{name}`" for line, name in zip(listed, sets.values())]
        listed = [f"{len(sets)} sets of weights by tensor, such as {listed[-1]}"]
    return {
        "base": labels[0],
        "fine-tuned": listed[0],
        "τ": f"{tau:g}" + (f", by layer: {dict(layer_tau)}" if layer_tau else ""),
        "method": method,
        "arithmetic": "float32, rounded once to the stored dtype",
    }


def _sum(weights: Iterable[float]) -> float:
    """Their sum; 1 where only rounding keeps it from being 1, so that τ = 1 needs no bit of the base."""
    total = fsum(weights)
    return 1.0 if abs(total - 1) < 1e-6 else total


_one_decomposition = threading.Lock()


@dataclass
class _Plan:
    """What is written for each tensor: copied, mixed element by element, or its delta filtered."""

    family: Family
    taus: dict[str, list[float]]  # by tensor, one for each output
    method: str
    rank: int | None
    weights: dict[str, list[float]]  # by tensor, one for each run
    dtype: str | None
    notes: list[str]

    def __call__(self, own: Tensor) -> Planned | None:
        name, family, taus = own.name, self.family, self.taus.get(own.name)
        if taus is None:
            return None
        base, runs = family.base.tensors.get(name), family.versions(name)
        dtype = self.dtype if self.dtype is not None and own.dtype in FLOATS else own.dtype
        if base is None or any(run is None for run in runs):
            return copied(own, dtype, len(taus))
        full = [run for run in runs if isinstance(run, Tensor)]
        if own.dtype not in FLOATS:
            source = full[0] if full else base
            if not same_bytes(base, source):
                self.notes.append(f"{name} ({own.dtype}) differs and cannot be averaged: the tuned one is taken")
            return copied(source, dtype, len(taus))
        spectral = self.method in ("singular", "rank") and len(own.shape) >= 2 and 0 not in own.shape
        elementwise = len(full) == len(runs) and not spectral
        if name in family.shared_rows and not elementwise:
            raise ValueError(f"{name}: method {self.method} needs equal shapes in all inputs")
        if self.method == "shrink" and 0 not in own.shape:
            factor = split_runs(base, runs).tau(averaged=len(runs))
            taus = [tau * factor for tau in taus]
        if elementwise:
            moved = [(run, weight) for run, weight in zip(full, self.weights[name]) if run is not base]
            total = _sum(weight for _, weight in moved)
            rows = [[1 - tau * total, *(tau * weight for _, weight in moved)] for tau in taus]
            return mixed(own, [base, *(run for run, _ in moved)], rows, dtype, family.shared_rows.get(name))
        if self.method == "rank" and spectral:
            from linfit.bridge.spectrum import most_directions

            most = most_directions(min(own.matrix_shape))
            if most < (self.rank or 1) < min(own.matrix_shape):
                described = f"{name} {own.describe()}, so that memory stays bounded"
                raise ValueError(f"rank must be at most {most} for {described}, got {self.rank}")
        return self._filtered(own, base, taus, dtype, spectral)

    def _filtered(self, own: Tensor, base: Tensor, taus: Sequence[float], dtype: str, spectral: bool) -> Planned:
        """base + τ·F(Δ), F the filter of the method (none for the linear one)."""
        runs = self.family.versions(own.name)

        def piece(files: Files, write: Write) -> None:
            delta = Delta(base, runs, self.weights[own.name])
            columns, item = delta.shape[1], ITEM_SIZE[dtype]
            with _one_decomposition:
                apply = self._filter(own, delta, files) if spectral else None
                for start, stop in delta.spans():
                    unchanged, step = delta.base_block(files, start, stop), delta.block(files, start, stop)
                    step = step if apply is None else apply(step)
                    for output, tau in enumerate(taus):
                        values = unchanged + np.float32(tau) * step if tau != 0 else unchanged
                        stored = encode(values if delta.tall else values.T, dtype)
                        if delta.tall:
                            write(output, start * columns * item, stored)
                            continue
                        for row, data in enumerate(stored.reshape(delta.shape[0], -1)):
                            write(output, (row * columns + start) * item, data)

        return Planned(own.name, dtype, own.shape, (own, *Delta(base, runs).sources), lambda: iter([piece]))

    def _filter(self, own: Tensor, delta: Delta, files: Files) -> "Filter | None":
        from linfit.bridge.signal import shrinkage, truncation

        if self.method == "rank":
            found = truncation(lambda: delta.blocks(files), min(delta.shape), self.rank or 1)
        else:
            found = shrinkage(lambda: delta.blocks(files), delta.shape)
        if found is not None and found.missed > 0:
            kept = found.gains.size
            self.notes.append(f"{own.name}: kept the {kept} largest of {kept + found.missed} singular values")
        return found


def read_layer_taus(path: str | Path) -> dict[str, float]:
    """τ by pattern from a JSON object, or from what `linfit inspect --json` writes for two or more runs.

    Raises ValueError if the file holds neither.
    """
    content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("tensors"), list):
        suggested = {entry["name"]: entry.get("suggested_tau") for entry in content["tensors"]}
        content = {name: value for name, value in suggested.items() if value is not None}
    if not (isinstance(content, dict) and content and all(type(value) in (int, float) for value in content.values())):
        raise ValueError(f"{path} must hold an object of name pattern → τ, or `linfit inspect --json` of several runs")
    return content


def read_weights(path: str | Path) -> dict[str, list[float]]:
    """Weights of the runs by tensor from what `linfit plan --json` writes, for `merge(weights=…)`.

    Those that minimise the loss where it was given losses, else those of each group of tensors, and for tensors that
    it did not compare those of all. Raises ValueError for another file.
    """
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        fit = content.get("fit")
        groups = [] if fit else [(name, group["weights"]) for group in content["groups"] for name in group["tensors"]]
        rows = [*groups, ("*", fit["weights"] if fit else content["weights"])]
        found = {name: [float(value["value"]) for value in row] for name, row in rows}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} must be what `linfit plan --json` writes") from None
    return found
