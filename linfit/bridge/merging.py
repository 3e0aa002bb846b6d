"""θ_τ of real checkpoints, streamed (docs, B1–B3): interpolation, soups, shrinkage, and filters on the delta.

θ_τ = (1−τ)·base + τ·tuned      per tensor, in float32, rounded once to the stored dtype.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from linfit.bridge.adapter import Adapter, LowRank, is_adapter, matches
from linfit.bridge.checkpoint import Checkpoint, Files, Tensor, open_files, some
from linfit.bridge.numbers import CHUNK_BYTES, FLOATS, ITEM_SIZE, decode, encode, stored_dtype, weighted_sum
from linfit.bridge.output import (
    Outcome,
    Piece,
    Planned,
    Write,
    copy_side_files,
    fingerprint,
    plan_shard,
    set_config_dtype,
    write_card,
    write_checkpoints,
)

if TYPE_CHECKING:
    from linfit.bridge.deltas import Filter, Split

Method = Literal["linear", "shrink", "singular", "rank"]
METHODS: dict[str, str] = {
    "linear": "g = τ",
    "shrink": "g = τ·τ_l, τ_l = signal/(signal + variance/K) of the tensor over the K runs",
    "singular": "g = τ·η(s)/s, optimal shrinkage of the singular values",
    "rank": "g = τ·1[i ≤ r]",
}
"""Each method as a filter g on the delta."""

PIECE_BYTES = 1 << 23
BLOCK_BYTES = 1 << 23


class Family(NamedTuple):
    """A base and what was fine-tuned from it, checked to fit together."""

    base: Checkpoint
    tuned: tuple[Checkpoint | Adapter, ...]
    template: Checkpoint
    """Whose files the output copies: the first tuned folder, or the base of an adapter."""
    names: tuple[str, ...]
    """Tensors of the output."""
    shared_rows: dict[str, int]
    """Rows that all have, for tensors whose first axis differs."""
    notes: tuple[str, ...]


def open_family(
    base: str | Path, tuned: Sequence[str | Path], *, shared: bool = False, mixed_dtypes: bool = False
) -> Family:
    """Open a base and its fine-tuned versions (folders, files or LoRA adapters) and check that they fit together.

    Raises ValueError listing both sides where names, shapes, dtypes or architectures differ. `shared` lets names and
    first axes (vocabularies) differ, `mixed_dtypes` dtypes.
    """
    if not tuned:
        raise ValueError("tuned must name at least one fine-tuned checkpoint")
    base_checkpoint = Checkpoint(base)
    members = tuple(Adapter(path, base_checkpoint) if is_adapter(path) else Checkpoint(path) for path in tuned)
    full = [member for member in members if isinstance(member, Checkpoint)]
    template = members[0] if isinstance(members[0], Checkpoint) else base_checkpoint
    notes: list[str] = []
    for checkpoint in {id(each): each for each in (base_checkpoint, *full)}.values():
        if checkpoint.config.get("quantization_config"):
            raise ValueError(
                f"{checkpoint.folder}: quantised weights mean something only together with their scales and cannot be "
                "averaged; dequantise first"
            )
    for checkpoint in full:
        kinds = base_checkpoint.config.get("model_type"), checkpoint.config.get("model_type")
        if None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(f"different models: {base} is {kinds[0]!r}, {checkpoint.folder} is {kinds[1]!r}")
    dropped = _tied_duplicates([base_checkpoint, *full])
    names = _common_names(base_checkpoint, full, template, dropped, shared, notes)
    if dropped & template.tensors.keys():
        notes.append(f"tied to the input embedding and written once: {', '.join(sorted(dropped))}")
    shared_rows = _check_shapes(base_checkpoint, full, names, shared, mixed_dtypes, notes)
    return Family(base_checkpoint, members, template, tuple(names), shared_rows, tuple(notes))


_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


def _tied_duplicates(checkpoints: Sequence[Checkpoint]) -> set[str]:
    """Output embeddings that the configuration ties to the input embedding and that repeat its bytes everywhere."""
    if not all(checkpoint.text_config("tie_word_embeddings") for checkpoint in checkpoints):
        return set()
    heads = {name for each in checkpoints for name in each.tensors if name.endswith(_OUTPUT_EMBEDDINGS)}
    return {
        head
        for head in heads
        if all(head not in each.tensors or _repeats_embedding(each, each.tensors[head]) for each in checkpoints)
    }


def _repeats_embedding(checkpoint: Checkpoint, head: Tensor) -> bool:
    return any(
        name.endswith(_INPUT_EMBEDDINGS)
        and (tensor.dtype, tensor.shape) == (head.dtype, head.shape)
        and same_bytes(tensor, head)
        for name, tensor in checkpoint.tensors.items()
    )


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two stored tensors have the same bytes."""
    length = first.stop - first.start
    if length != second.stop - second.start:
        return False
    one, two = (np.empty(min(length, PIECE_BYTES), np.uint8) for _ in range(2))
    with open_files([first, second]) as files:
        for start in range(0, length, PIECE_BYTES):
            count = min(PIECE_BYTES, length - start)
            files.read_into(first.path, first.start + start, one[:count])
            files.read_into(second.path, second.start + start, two[:count])
            if not np.array_equal(one[:count], two[:count]):
                return False
    return True


def _common_names(
    base: Checkpoint, full: list[Checkpoint], template: Checkpoint, dropped: set[str], shared: bool, notes: list[str]
) -> list[str]:
    names = [tensor.name for shard in template.shards for tensor in shard.tensors if tensor.name not in dropped]
    wanted = base.tensors.keys() - dropped
    for checkpoint in full:
        found = checkpoint.tensors.keys() - dropped
        only_base, only_tuned = sorted(wanted - found), sorted(found - wanted)
        if not (only_base or only_tuned):
            continue
        sides = [f"only in {base.folder}: {some(only_base, 'tensor')}"] if only_base else []
        sides += [f"only in {checkpoint.folder}: {some(only_tuned, 'tensor')}"] if only_tuned else []
        if not shared:
            raise ValueError("tensor names differ: " + "; ".join(sides) + "; --shared averages the shared ones only")
        notes.append("tensor names differ: " + "; ".join(sides))
    if shared and not any(name in base.tensors for name in names):
        raise ValueError(f"{base.folder} and {template.folder} share no tensor")
    return names


def _check_shapes(
    base: Checkpoint, full: list[Checkpoint], names: list[str], shared: bool, mixed_dtypes: bool, notes: list[str]
) -> dict[str, int]:
    shared_rows: dict[str, int] = {}
    complaints = []
    for name in names:
        sides = [each.tensors[name] for each in (base, *full) if name in each.tensors]
        first = sides[0]
        for other in sides[1:]:
            if other.shape != first.shape:
                if shared and len(other.shape) == len(first.shape) > 0 and other.shape[1:] == first.shape[1:]:
                    shared_rows[name] = min(side.rows for side in sides)
                    continue
                complaints.append(f"{name} {first.describe()} in the base, {other.describe()} in {other.path.parent}")
            elif other.dtype != first.dtype and not (mixed_dtypes and {other.dtype, first.dtype} <= set(FLOATS)):
                complaints.append(f"{name} {first.describe()} in the base, {other.describe()} in {other.path.parent}")
    if complaints:
        raise ValueError(
            f"shapes or dtypes differ: {some(complaints, 'tensor', 4)}; --shared averages the rows that all share, "
            "--dtype allows and ends a mixture of dtypes"
        )
    for name, rows in shared_rows.items():
        notes.append(f"{name}: the first {rows} rows are averaged, any further ones are the tuned model's")
    return shared_rows


def merge(
    base: str | Path,
    tuned: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tau: float | Sequence[float] = 1.0,
    method: Method = "linear",
    rank: int | None = None,
    layer_tau: Mapping[str, float] | None = None,
    run_weights: Sequence[float] | None = None,
    dtype: str | None = None,
    shared: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Write θ_τ = base + g(Δ), Δ the delta of `tuned` (several: their weighted mean), g the filter of `method`.

    `tau` one or several values, each finite, also outside [0, 1]; several are written to `out/tau_0.2`, … in one pass.
    `layer_tau` maps shell patterns of tensor names to τ, first match wins. `method` is a key of `METHODS`; "rank" needs
    `rank`, "shrink" two runs or more. `run_weights` (K,) sum to 1, equal by default. `dtype` is the stored format, that
    of the tuned model by default. τ = 0 and τ = 1 keep the bits of their input. Computed in float32 (float64 for F64).

    Raises ValueError, with nothing at `out`, for folders that do not fit together (`shared=True` averages only what
    they share), damaged files, values beyond the range of `dtype`, an existing `out`, or a full disk. Paper 2506.01901
    for the linear method; the others docs, B2 (ours) and B3.
    """
    paths = [tuned] if isinstance(tuned, str | Path) else list(tuned)
    taus = [float(value) for value in ([tau] if isinstance(tau, int | float) else tau)]
    _check_arguments(taus, method, rank, layer_tau, len(paths))
    weights = _run_weights(run_weights, len(paths))
    target = None if dtype is None else stored_dtype(dtype)
    family = open_family(base, paths, shared=shared, mixed_dtypes=target is not None)
    inputs = [family.base, *family.tuned]
    _refuse_inside(Path(out), [each.folder for each in inputs])
    notes = list(family.notes)
    notes += [f"τ = {value:g} is outside [0, 1]: extrapolation" for value in taus if not 0 <= value <= 1]
    tau_of = _layer_taus(layer_tau or {}, family.names)
    settings = _Settings(family, taus, tau_of, method, rank, weights, target, notes)
    planned = {name: _plan_tensor(name, settings) for name in family.names}
    shards = [
        plan_shard(shard, [planned[tensor.name] for tensor in shard.tensors if tensor.name in planned])
        for shard in family.template.shards
    ]
    arguments = {
        "version": 1,
        "taus": taus,
        "method": method,
        "rank": rank,
        "layer_tau": list((layer_tau or {}).items()),
        "weights": weights,
        "dtype": target,
        "shared": shared,
    }
    labels = [f"tau_{value:g}" for value in taus]

    def side_files(folder: Path, label: str) -> None:
        _copy_surroundings(family, folder, target)
        write_card(_card_source(family), folder, "Merged with linfit", {
            "base": f"`{_label(family.base)}`",
            "fine-tuned": ", ".join(f"`{_label(each)}` ({weight:g})" for each, weight in zip(inputs[1:], weights)),
            "τ": f"{taus[labels.index(label)]:g}" + (f", by layer: {dict(layer_tau)}" if layer_tau else ""),
            "method": f"{method}: {METHODS[method]}" + (f", r = {rank}" if method == "rank" else ""),
            "arithmetic": "float32, rounded once to the stored dtype",
        })  # fmt: skip

    template = family.template
    return write_checkpoints(
        Path(out),
        labels,
        shards,
        identity=fingerprint(arguments, [each.checkpoint if isinstance(each, Adapter) else each for each in inputs]),
        side_files=side_files,
        index_metadata=None if template.index is None else template.index.get("metadata") or {},
        workers=workers,
        progress=progress,
        notes=notes,
    )


def _check_arguments(
    taus: list[float], method: str, rank: int | None, layer_tau: Mapping[str, float] | None, runs: int
) -> None:
    if not taus:
        raise ValueError("tau must hold at least one value")
    for name, value in [("tau", value) for value in taus] + list((layer_tau or {}).items()):
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
    if method == "shrink" and runs < 2:
        raise ValueError(f"method shrink needs at least 2 fine-tuned runs to see how they differ, got {runs}")


def _run_weights(weights: Sequence[float] | None, runs: int) -> list[float]:
    if weights is None:
        return [1 / runs] * runs
    if len(weights) != runs or not all(map(isfinite, weights)) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"run_weights must be {runs} finite numbers that sum to 1, got {list(weights)}")
    return [float(weight) for weight in weights]


def _refuse_inside(out: Path, inputs: Sequence[Path]) -> None:
    target = out.resolve()
    for folder in inputs:
        if target == folder.resolve() or folder.resolve() in target.parents:
            raise ValueError(f"the output {out} must lie outside the input {folder}")


def _layer_taus(patterns: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pattern, value in patterns.items():
        fitting = [name for name in names if matches(pattern, name)]
        if not fitting:
            raise ValueError(f"layer_tau pattern {pattern!r} fits no tensor; there are {some(names, 'tensor', 3)}")
        for name in fitting:
            found.setdefault(name, float(value))
    return found


class _Settings(NamedTuple):
    family: Family
    taus: list[float]
    tau_of: dict[str, float]
    method: str
    rank: int | None
    run_weights: list[float]
    dtype: str | None
    notes: list[str]


def _plan_tensor(name: str, settings: _Settings) -> Planned:
    family = settings.family
    own = family.template.tensors[name]
    base = family.base.tensors.get(name)
    dtype = settings.dtype if settings.dtype is not None and own.dtype in FLOATS else own.dtype
    taus = [settings.tau_of.get(name, tau) for tau in settings.taus]
    runs = [_run_tensor(member, family.base, name) for member in family.tuned]
    if base is None or any(run is None for run in runs):
        return _copied(own, dtype, len(taus))
    if own.dtype not in FLOATS:
        source = next((run for run in runs if isinstance(run, Tensor)), base)
        if not same_bytes(base, source):
            settings.notes.append(f"{name} ({own.dtype}) differs and cannot be averaged: the tuned one is taken")
        return _copied(source, dtype, len(taus))
    full = [run for run in runs if isinstance(run, Tensor)]
    plain = settings.method in ("linear", "shrink") or len(own.shape) < 2 or 0 in own.shape
    if len(full) == len(runs) and plain:
        if settings.method == "shrink" and 0 not in own.shape:
            factor = split_runs(base, full).tau(averaged=len(full))
            taus = [tau * factor for tau in taus]
        moved = [(run, weight) for run, weight in zip(full, settings.run_weights) if run is not base]
        total = sum(weight for _, weight in moved) if len(moved) < len(full) else 1
        weights = [[1 - tau * total, *(tau * weight for _, weight in moved)] for tau in taus]
        return _mixed(own, [base, *(run for run, _ in moved)], weights, dtype, family.shared_rows.get(name))
    if name in family.shared_rows:
        raise ValueError(f"{name}: method {settings.method} needs equal shapes in all inputs")
    if settings.method == "shrink":
        factor = split_runs(base, runs).tau(averaged=len(runs))
        taus = [tau * factor for tau in taus]
    if settings.method == "rank":
        _check_rank(own, settings.rank or 1)
    return _filtered(own, base, runs, taus, dtype, settings)


def _check_rank(own: Tensor, rank: int) -> None:
    from linfit.bridge.spectrum import most_directions

    side = min(own.matrix_shape)
    if most_directions(side) < rank < side:
        raise ValueError(
            f"rank must be at most {most_directions(side)} for {own.name} {own.describe()}, so that memory stays "
            f"bounded, got {rank}"
        )


def _run_tensor(member: Checkpoint | Adapter, base: Checkpoint, name: str) -> Tensor | LowRank | None:
    """What one fine-tuned version says about a tensor; an adapter that leaves it alone says the base."""
    if isinstance(member, Checkpoint):
        return member.tensors.get(name)
    return member.deltas.get(name) or member.replaced.get(name) or base.tensors.get(name)


# Pieces -------------------------------------------------------------------------------------------------------------


def _spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _copied(source: Tensor, dtype: str, outputs: int) -> Planned:
    return _mixed(source, [source], [[1.0]] * outputs, dtype, None)


def _mixed(
    own: Tensor, sources: Sequence[Tensor], weights: Sequence[Sequence[float]], dtype: str, shared_rows: int | None
) -> Planned:
    """Elementwise Σ w_k x_k for each output; beyond the shared rows, `own` as it is."""
    shared = own.size if shared_rows is None else shared_rows * own.matrix_shape[1]
    widest = max(ITEM_SIZE[dtype], *(ITEM_SIZE[source.dtype] for source in sources))
    step = PIECE_BYTES // widest

    def pieces() -> Iterator[Piece]:
        for start, stop in _spans(shared, step):
            yield partial(_mix, sources, weights, dtype, start, stop)
        for start, stop in _spans(own.size - shared, step):
            yield partial(_mix, [own], [[1.0]] * len(weights), dtype, shared + start, shared + stop)

    return Planned(own.name, dtype, own.shape, (own, *sources), pieces)


_buffers = threading.local()


def _buffer(index: int, count: int) -> np.ndarray:
    """A scratch buffer of this thread, kept from call to call."""
    held = _buffers.__dict__.setdefault("held", {})
    if index not in held or held[index].size < count:
        held[index] = np.empty(max(count, CHUNK_BYTES), np.uint8)
    return held[index][:count]


def _mix(
    sources: Sequence[Tensor],
    weights: Sequence[Sequence[float]],
    dtype: str,
    start: int,
    stop: int,
    files: Files,
    write: Write,
) -> int:
    sizes = [ITEM_SIZE[source.dtype] for source in sources]
    used = [any(row[k] != 0 for row in weights) for k in range(len(sources))]
    used[0] |= not any(used)
    step, read = CHUNK_BYTES // max(sizes), 0
    for begin, end in _spans(stop - start, step):
        raws = []
        for k, (source, size) in enumerate(zip(sources, sizes)):
            raw = _buffer(k, (end - begin) * size)
            if used[k]:
                files.read_into(source.path, source.start + (start + begin) * size, raw)
                read += raw.size
            raws.append(raw)
        for output, row in enumerate(weights):
            mixed = _sum_or_copy(row, raws, sources, dtype)
            write(output, (start + begin) * ITEM_SIZE[dtype], mixed)
    return read


def _sum_or_copy(row: Sequence[float], raws: list[np.ndarray], sources: Sequence[Tensor], dtype: str) -> np.ndarray:
    if dtype not in FLOATS:
        return raws[0]
    try:
        return weighted_sum(row, raws, [source.dtype for source in sources], dtype)
    except ValueError as error:
        raise ValueError(f"{sources[0].name}: {error}") from None


class Delta:
    """Δ = Σ w_k (tuned_k − base) of one matrix, in rectangles of float32 (float64 for float64 tensors)."""

    def __init__(self, base: Tensor, runs: Sequence[Tensor | LowRank | None], weights: Sequence[float]):
        self.base, self.shape = base, base.matrix_shape
        self.runs = [run for run in runs if run is not None]
        self.weights = list(weights)
        self.tall = self.shape[0] >= self.shape[1]
        self._factors: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Stored tensors it reads by range."""
        return (self.base, *(run for run in self.runs if isinstance(run, Tensor)))

    def spans(self, share: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of the longer axis, a few megabytes each; smaller ones where `share` blocks are held at once."""
        long, short = max(self.shape), min(self.shape)
        return _spans(long, max(1, BLOCK_BYTES // (4 * short * share)))

    def block(self, files: Files, start: int, stop: int) -> np.ndarray:
        """Δ for a range of the longer axis, oriented (b, shorter axis)."""
        base = self.base_block(files, start, stop)
        total = np.zeros_like(base)
        for k, (run, weight) in enumerate(zip(self.runs, self.weights)):
            if isinstance(run, Tensor):
                step = self._rectangle(files, run, start, stop) - base
            else:
                if k not in self._factors:
                    self._factors[k] = run.factors()
                left, right = self._factors[k]
                step = left[start:stop] @ right if self.tall else (left @ right[:, start:stop]).T
            step *= np.float32(weight)
            total += step
        return total

    def base_block(self, files: Files, start: int, stop: int) -> np.ndarray:
        """The base for the same range, oriented the same way."""
        return self._rectangle(files, self.base, start, stop)

    def _rectangle(self, files: Files, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        rows, columns = tensor.matrix_shape
        item = ITEM_SIZE[tensor.dtype]
        if self.tall:
            raw = np.empty((stop - start) * columns * item, np.uint8)
            files.read_into(tensor.path, tensor.start + start * columns * item, raw)
            return decode(raw, tensor.dtype).reshape(stop - start, columns)
        raw = np.empty((rows, (stop - start) * item), np.uint8)
        for row in range(rows):
            files.read_into(tensor.path, tensor.start + (row * columns + start) * item, raw[row])
        return decode(raw.reshape(-1), tensor.dtype).reshape(rows, stop - start).T

    def blocks(self, files: Files) -> Iterator[np.ndarray]:
        """All blocks in order."""
        for start, stop in self.spans():
            yield self.block(files, start, stop)

    def base_blocks(self, files: Files) -> Iterator[np.ndarray]:
        """The base in the same blocks."""
        for start, stop in self.spans():
            yield self.base_block(files, start, stop)


_one_decomposition = threading.Lock()


def _filtered(
    own: Tensor,
    base: Tensor,
    runs: Sequence[Tensor | LowRank | None],
    taus: Sequence[float],
    dtype: str,
    settings: "_Settings",
) -> Planned:
    """base + τ·F(Δ), F the filter of the method (none for the linear one)."""

    def run(files: Files, write: Write) -> int:
        delta = Delta(base, runs, settings.run_weights)
        columns, item = delta.shape[1], ITEM_SIZE[dtype]
        with _one_decomposition:
            apply = _filter(own, delta, files, settings)
            for start, stop in delta.spans():
                unchanged = delta.base_block(files, start, stop)
                step = delta.block(files, start, stop)
                if apply is not None:
                    step = apply(step)
                for output, tau in enumerate(taus):
                    values = unchanged + np.float32(tau) * step if tau != 0 else unchanged
                    try:
                        stored = encode(values if delta.tall else values.T, dtype)
                    except ValueError as error:
                        raise ValueError(f"{own.name}: {error}") from None
                    if delta.tall:
                        write(output, start * columns * item, stored)
                        continue
                    for row, data in enumerate(stored.reshape(delta.shape[0], -1)):
                        write(output, (row * columns + start) * item, data)
        return 2 * sum(source.stop - source.start for source in delta.sources)

    return Planned(own.name, dtype, own.shape, (own, *Delta(base, runs, []).sources), lambda: iter([run]))


def _filter(own: Tensor, delta: Delta, files: Files, settings: "_Settings") -> "Filter | None":
    if settings.method not in ("singular", "rank") or len(own.shape) < 2:
        return None
    from linfit.bridge.deltas import shrinkage, truncation

    def blocks() -> Iterator[np.ndarray]:
        return delta.blocks(files)

    if settings.method == "rank":
        found = truncation(blocks, min(delta.shape), settings.rank or 1)
    else:
        found = shrinkage(blocks, delta.shape)
    if found is not None and found.missed > 0:
        kept = found.gains.size
        settings.notes.append(f"{own.name}: kept the {kept} largest of {kept + found.missed} singular values")
    return found


def split_runs(base: Tensor, runs: Sequence[Tensor | LowRank | None]) -> "Split":
    """Mean/variance split of K runs of one tensor, streamed."""
    from linfit.bridge.deltas import split_of

    deltas = [Delta(base, [run], [1.0]) for run in runs]
    gram = np.zeros((len(runs), len(runs)))
    with open_files({source for delta in deltas for source in delta.sources}) as files:
        for start, stop in deltas[0].spans(share=2 * len(runs)):
            gram += inner_products(delta.block(files, start, stop) for delta in deltas)
    return split_of(gram)


def inner_products(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """⟨a_j, a_k⟩ (K, K) in float64."""
    rows = np.stack([array.ravel() for array in arrays]).astype(np.float64, copy=False)
    return rows @ rows.T


# What goes around ---------------------------------------------------------------------------------------------------


def _label(member: Checkpoint | Adapter) -> str:
    """Folder name; OWNER/NAME@REVISION for a snapshot in the cache of the Hugging Face Hub."""
    folder = member.folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.name


def _card_source(family: Family) -> Path:
    return family.tuned[0].folder if not isinstance(family.tuned[0], Adapter) else family.base.folder


def _copy_surroundings(family: Family, folder: Path, dtype: str | None) -> None:
    copy_side_files(family.template.folder, folder)
    if isinstance(family.tuned[0], Adapter):  # a tokenizer or template saved with the adapter comes on top
        copy_side_files(family.tuned[0].folder, folder)
    if dtype is not None:
        set_config_dtype(folder, dtype)


def read_layer_taus(path: str | Path) -> dict[str, float]:
    """τ by pattern from a JSON object, or from what `linfit inspect --json` writes for two or more runs.

    Raises ValueError if the file holds neither.
    """
    content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("tensors"), list):
        content = {entry["name"]: entry.get("suggested_tau") for entry in content["tensors"]}
        content = {name: value for name, value in content.items() if value is not None}
    numbers = isinstance(content, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in content.values()
    )
    if not numbers or not content:
        raise ValueError(
            f"{path} must hold a JSON object of name pattern → τ, or `linfit inspect --json` of several runs"
        )
    return content


def load(folder: str | Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Floating tensors of a checkpoint as float32 arrays (float64 for F64), others left out: a pytree of arrays."""
    checkpoint = Checkpoint(folder)
    result = {}
    with open_files(checkpoint.tensors.values()) as files:
        for name in names if names is not None else checkpoint.tensors:
            tensor = checkpoint.tensors[name]
            if tensor.dtype in FLOATS:
                raw = np.empty(tensor.stop - tensor.start, np.uint8)
                files.read_into(tensor.path, tensor.start, raw)
                result[name] = decode(raw, tensor.dtype).reshape(tensor.shape)
    return result
