"""Gaussian noise on the weights of a real model, for sensitivity curves (docs, B4, and N2's experiment).

    W ↦ W + γ · scale · Z,   Z standard normal entries,   scale = ‖W‖_F/√size   or the std at initialisation.

So γ is the size of the noise relative to the weights, per tensor; paper 2503.19206 takes the second, the covariance
of the initialisation. The same seed gives the same Z for every γ, whatever the number of workers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from math import isfinite
from pathlib import Path

import numpy as np

from linfit.bridge.adapter import matches
from linfit.bridge.checkpoint import Checkpoint, Files, Tensor, open_files
from linfit.bridge.merging import PIECE_BYTES, _copied, _refuse_inside, _spans
from linfit.bridge.numbers import FLOATS, ITEM_SIZE, decode, encode
from linfit.bridge.output import (
    Outcome,
    Piece,
    Planned,
    Write,
    copy_side_files,
    fingerprint,
    plan_shard,
    write_card,
    write_checkpoints,
)

NOISE_BLOCK = 1 << 18
"""Elements per random stream."""


def perturb(
    model: str | Path,
    out: str | Path,
    *,
    gamma: float | Sequence[float],
    seed: int | Sequence[int] = 0,
    init_scale: float | None = None,
    only: str | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Write the model with Gaussian noise of relative size γ added (docs, B4; N2).

    Several γ or seeds are written to `out/gamma_0.01_seed_0`, … in one pass. By default noise has ‖γ·scale·Z‖ ≈ γ‖W‖
    for each floating tensor; with `init_scale` s its entries have standard deviation γ·s, in matrices only, since
    vectors (norms, biases) are not drawn at random. `only` is a shell pattern of tensor names. Raises ValueError for a
    negative or infinite γ, a negative seed, a pattern that fits nothing, or as `merge`.
    """
    gammas = [float(value) for value in ([gamma] if isinstance(gamma, int | float) else gamma)]
    seeds = [int(value) for value in ([seed] if isinstance(seed, int) else seed)]
    for value in gammas:
        if not isfinite(value) or value < 0:
            raise ValueError(f"gamma must be finite and non-negative, got {value}")
    if not gammas or not seeds or min(seeds) < 0:
        raise ValueError(f"give at least one gamma and one seed, seeds non-negative; got {gammas} and {seeds}")
    if init_scale is not None and not (isfinite(init_scale) and init_scale > 0):
        raise ValueError(f"init_scale must be finite and positive, got {init_scale}")
    checkpoint = Checkpoint(model)
    _refuse_inside(Path(out), [checkpoint.folder])
    if checkpoint.config.get("quantization_config"):
        raise ValueError(f"{checkpoint.folder}: quantised weights cannot be perturbed; dequantise first")
    pairs = [(value, number) for value in gammas for number in seeds]
    labels = [f"gamma_{value:g}_seed_{number}" for value, number in pairs]
    if len(set(labels)) != len(labels):
        raise ValueError(f"gamma and seed must not repeat values, got {gammas} and {seeds}")

    chosen = [
        tensor
        for tensor in checkpoint.tensors.values()
        if tensor.dtype in FLOATS
        and tensor.size
        and (only is None or matches(only, tensor.name))
        and (init_scale is None or len(tensor.shape) >= 2)
    ]
    if not chosen:
        raise ValueError(f"only={only!r} fits no floating tensor of {checkpoint.folder}")
    noisy = {tensor.name for tensor in chosen}

    def plan(tensor: Tensor) -> Planned:
        if tensor.name not in noisy:
            return _copied(tensor, tensor.dtype, len(pairs))
        scale = init_scale if init_scale is not None else root_mean_square(tensor)
        return _noisy(tensor, [(value * scale, number) for value, number in pairs])

    shards = [plan_shard(shard, [plan(tensor) for tensor in shard.tensors]) for shard in checkpoint.shards]

    def side_files(folder: Path, label: str) -> None:
        copy_side_files(checkpoint.folder, folder)
        value, number = pairs[labels.index(label)]
        size = "relative to each tensor" if init_scale is None else f"times the initial scale {init_scale:g}"
        facts = {"model": f"`{checkpoint.folder.resolve().name}`", "γ": f"{value:g}, {size}", "seed": str(number)}
        write_card(checkpoint.folder, folder, "Gaussian noise added with linfit", facts)

    return write_checkpoints(
        Path(out),
        labels,
        shards,
        identity=fingerprint({"perturb": [gammas, seeds, init_scale, only]}, [checkpoint]),
        side_files=side_files,
        index_metadata=None if checkpoint.index is None else checkpoint.index.get("metadata") or {},
        workers=workers,
        progress=progress,
        notes=[f"noise in {len(noisy)} of {len(checkpoint.tensors)} tensors"],
    )


def root_mean_square(tensor: Tensor) -> float:
    """‖W‖_F/√size, streamed."""
    total, item = 0.0, ITEM_SIZE[tensor.dtype]
    with open_files([tensor]) as files:
        for start, stop in _spans(tensor.size, PIECE_BYTES // item):
            raw = np.empty((stop - start) * item, np.uint8)
            files.read_into(tensor.path, tensor.start + start * item, raw)
            values = decode(raw, tensor.dtype).astype(np.float64)
            total += float(values @ values)
    return (total / tensor.size) ** 0.5


def _noisy(tensor: Tensor, scales: Sequence[tuple[float, int]]) -> Planned:
    def pieces() -> Iterator[Piece]:
        for start, stop in _spans(tensor.size, NOISE_BLOCK):
            yield partial(_add_noise, tensor, scales, start, stop)

    return Planned(tensor.name, tensor.dtype, tensor.shape, (tensor,), pieces)


def _add_noise(
    tensor: Tensor, scales: Sequence[tuple[float, int]], start: int, stop: int, files: Files, write: Write
) -> int:
    item = ITEM_SIZE[tensor.dtype]
    raw = np.empty((stop - start) * item, np.uint8)
    files.read_into(tensor.path, tensor.start + start * item, raw)
    values = decode(raw, tensor.dtype)
    name = list(sha256(tensor.name.encode()).digest()[:16])
    drawn: dict[int, np.ndarray] = {}
    for output, (scale, seed) in enumerate(scales):
        if scale == 0:
            write(output, start * item, raw)
            continue
        if seed not in drawn:
            generator = np.random.Generator(np.random.SFC64([seed, start // NOISE_BLOCK, *name]))
            drawn[seed] = generator.standard_normal(stop - start, dtype=np.float32)
        try:
            write(output, start * item, encode(values + values.dtype.type(scale) * drawn[seed], tensor.dtype))
        except ValueError as error:
            raise ValueError(f"{tensor.name}: {error}") from None
    return raw.size
