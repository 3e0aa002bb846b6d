"""Gaussian noise on the weights of a real model, for sensitivity curves (docs, B4, and N2's experiment).

    W ↦ W + γ · scale · Z,   Z standard normal entries,   scale = ‖W‖_F/√size   or the std at initialisation.

So γ is the size of the noise relative to the weights, per tensor; paper 2503.19206 takes the second, the covariance
of the initialisation. Numbers do not depend on the number of workers.
"""

from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from math import isfinite
from pathlib import Path

import numpy as np

from linfit.bridge.checkpoint import Checkpoint, Files, Tensor
from linfit.bridge.family import matches, refuse_quantised
from linfit.bridge.numbers import FLOATS, decode, encode
from linfit.bridge.output import Planned, Progress, Write, Written, write_checkpoints
from linfit.bridge.pieces import PIECE_BYTES, copied, spans

_NOISE_BLOCK = 1 << 18  # elements per random stream


def perturb(
    model: str | Path,
    out: str | Path,
    *,
    gamma: float | Sequence[float],
    seed: int | Sequence[int] = 0,
    init_scale: float | None = None,
    only: str | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> Written:
    """Write the model with Gaussian noise of relative size γ added, ‖γ·scale·Z‖ ≈ γ‖W‖ for each floating tensor.

    Args:
        model: folder in Hugging Face layout, or a file.
        out: folder to create; with several γ or seeds `out/gamma_0.01_seed_0`, … are written in one pass.
        gamma: relative sizes, non-negative.
        seed: of the noise; the same one gives the same Z for every γ.
        init_scale: standard deviation that γ = 1 stands for, in matrices only, since vectors (norms, biases) are not
            random at initialisation; by default that of each tensor's own entries.
        only: shell pattern of tensor names.
        workers, progress: as for `merge`.

    Raises ValueError for a negative or infinite γ, a negative seed, a pattern that fits nothing, or as `merge`. Docs,
    B4; paper 2503.19206.
    """
    if init_scale is not None and not (isfinite(init_scale) and init_scale > 0):
        raise ValueError(f"init_scale must be finite and positive, got {init_scale}")
    checkpoint = Checkpoint(model)
    refuse_quantised(checkpoint, "perturbed")
    noise = _noises(gamma, seed)
    size = "relative to each tensor" if init_scale is None else f"times the initial scale {init_scale:g}"
    name = f"`{checkpoint.folder.resolve().name}`"
    noisy = _chosen(checkpoint, only, least_axes=0 if init_scale is None else 2)

    def plan(tensor: Tensor) -> Planned:
        if tensor.name not in noisy:
            return copied(tensor, tensor.dtype, len(noise))
        scale = init_scale if init_scale is not None else _root_mean_square(tensor)
        work = partial(_add_noise, tensor, [(value * scale, number) for value, number in noise.values()])
        ranges = list(spans(tensor.size, _NOISE_BLOCK))
        return Planned(tensor.name, tensor.dtype, tensor.shape, (tensor,), lambda: (partial(work, *r) for r in ranges))

    return write_checkpoints(
        out,
        {label: {"model": name, "γ": f"{g:g}, {size}", "seed": str(number)} for label, (g, number) in noise.items()},
        checkpoint,
        plan,
        title="Gaussian noise added with linfit",
        inputs=[checkpoint],
        arguments={"perturb": [noise, init_scale, only]},
        side_folders=[checkpoint.folder],
        notes=[f"noise in {len(noisy)} of {len(checkpoint.tensors)} tensors"],
        workers=workers,
        progress=progress,
    )


def _noises(gamma: float | Sequence[float], seed: int | Sequence[int]) -> dict[str, tuple[float, int]]:
    """(γ, seed) by the name of their output folder."""
    gammas = [float(value) for value in ([gamma] if isinstance(gamma, int | float) else gamma)]
    seeds = [int(value) for value in ([seed] if isinstance(seed, int) else seed)]
    if not all(isfinite(value) and value >= 0 for value in gammas):
        raise ValueError(f"gamma must be finite and non-negative, got {gammas}")
    if not gammas or not seeds or min(seeds) < 0:
        raise ValueError(f"give at least one gamma and one seed, seeds non-negative; got {gammas} and {seeds}")
    noises = {f"gamma_{value:g}_seed_{number}": (value, number) for value in gammas for number in seeds}
    if len(noises) != len(gammas) * len(seeds):
        raise ValueError(f"gamma and seed must not repeat values, got {gammas} and {seeds}")
    return noises


def _chosen(checkpoint: Checkpoint, only: str | None, least_axes: int) -> set[str]:
    """Names of the tensors that noise is added to."""
    fitting = [each for name, each in checkpoint.tensors.items() if only is None or matches(only, name)]
    names = {t.name for t in fitting if t.dtype in FLOATS and t.size and len(t.shape) >= least_axes}
    if not names:
        raise ValueError(f"only={only!r} fits no floating tensor of {checkpoint.folder}")
    return names


def _root_mean_square(tensor: Tensor) -> float:
    """‖W‖_F/√size, streamed."""
    total = 0.0
    with Files([tensor]) as files:
        for span in spans(tensor.size, PIECE_BYTES // tensor.item):
            values = files.values(tensor, *span).astype(np.float64)
            total += float(values @ values)
    return (total / tensor.size) ** 0.5


def _add_noise(
    tensor: Tensor, scales: Sequence[tuple[float, int]], start: int, stop: int, files: Files, write: Write
) -> None:
    """The tensor plus scale · Z(seed) for each (scale, seed)."""
    raw = files.read(tensor, start, stop)
    values = decode(raw, tensor.dtype)
    stream = [start // _NOISE_BLOCK, *sha256(tensor.name.encode()).digest()[:16]]
    noise: dict[int, np.ndarray] = {}
    for output, (scale, seed) in enumerate(scales):
        if scale and seed not in noise:
            generator = np.random.Generator(np.random.SFC64([seed, *stream]))
            noise[seed] = generator.standard_normal(stop - start, dtype=np.float32)
        stored = encode(values + values.dtype.type(scale) * noise[seed], tensor.dtype) if scale else raw
        write(output, start * tensor.item, stored)
