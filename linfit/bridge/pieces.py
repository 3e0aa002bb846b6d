"""The units of work of a merge: ranges of elements read, mixed and written by one worker at a time."""

import threading
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from linfit.bridge.checkpoint import Files, Tensor
from linfit.bridge.numbers import CHUNK_BYTES, FLOATS, ITEM_SIZE, weighted_sum
from linfit.bridge.output import Piece, Planned, Write

PIECE_BYTES = 1 << 23
_Weights = Sequence[Sequence[float]]  # (outputs, sources)


def spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive ranges that cover `size`."""
    for start in range(0, size, step):
        yield start, min(start + step, size)


def copied(source: Tensor, dtype: str, outputs: int) -> Planned:
    """A tensor as it is, but for the dtype, in every output."""
    return mixed(source, [source], [[1.0]] * outputs, dtype)


def mixed(
    own: Tensor, sources: Sequence[Tensor], weights: _Weights, dtype: str, shared_rows: int | None = None
) -> Planned:
    """Elementwise Σ w_k x_k for each output's weights; beyond the shared rows, `own` as it is."""
    shared = own.size if shared_rows is None else shared_rows * own.matrix_shape[1]
    step = PIECE_BYTES // max(ITEM_SIZE[dtype], *(source.item for source in sources))

    def pieces() -> Iterator[Piece]:
        for start, stop in spans(shared, step):
            yield partial(_mix, sources, weights, dtype, start, stop)
        for start, stop in spans(own.size - shared, step):
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
    sources: Sequence[Tensor], weights: _Weights, dtype: str, start: int, stop: int, files: Files, write: Write
) -> None:
    dtypes = [source.dtype for source in sources]
    used = [any(row[k] != 0 for row in weights) for k in range(len(sources))]
    used[0] |= not any(used)
    for begin, end in spans(stop - start, CHUNK_BYTES // max(source.item for source in sources)):
        raws = [_buffer(k, (end - begin) * source.item) for k, source in enumerate(sources)]
        for source, raw, needed in zip(sources, raws, used):
            if needed:
                files.read(source, start + begin, start + end, raw)
        for output, row in enumerate(weights):
            total = weighted_sum(row, raws, dtypes, dtype) if dtype in FLOATS else raws[0]
            write(output, (start + begin) * ITEM_SIZE[dtype], total)
