"""The delta of fine-tuned models from their base, one tensor at a time in blocks, and how runs differ (docs, B2)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from linfit.bridge.adapter import LowRank
from linfit.bridge.checkpoint import Files, Tensor
from linfit.bridge.numbers import decode
from linfit.bridge.pieces import spans

_BLOCK_BYTES = 1 << 23


class Delta:
    """Δ = Σ w_k (tuned_k − base) of one matrix, in rectangles of float32 (float64 for float64 tensors)."""

    def __init__(self, base: Tensor, runs: Sequence[Tensor | LowRank | None], weights: Sequence[float] | None = None):
        self.base, self.shape = base, base.matrix_shape
        self.runs = [run for run in runs if run is not None]
        self.weights = [1 / len(self.runs)] * len(self.runs) if weights is None else weights
        self.tall = self.shape[0] >= self.shape[1]
        self._factors: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Stored tensors it reads by range."""
        return (self.base, *(run for run in self.runs if isinstance(run, Tensor)))

    def spans(self, share: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of the longer axis, a few megabytes each; smaller ones where `share` blocks are held at once."""
        return spans(max(self.shape), max(1, _BLOCK_BYTES // (4 * min(self.shape) * share)))

    def block(self, files: Files, start: int, stop: int, base: np.ndarray | None = None) -> np.ndarray:
        """Δ for a range of the longer axis, oriented (b, shorter axis); `base` is `base_block` where it is at hand."""
        base = self.base_block(files, start, stop) if base is None else base
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
        if self.tall:
            return files.values(tensor, start * columns, stop * columns).reshape(stop - start, columns)
        raw = np.empty((rows, (stop - start) * tensor.item), np.uint8)
        for row in range(rows):
            files.read(tensor, row * columns + start, row * columns + stop, raw[row])
        return decode(raw.reshape(-1), tensor.dtype).reshape(rows, stop - start).T

    def blocks(self, files: Files, of_base: bool = False) -> Iterator[np.ndarray]:
        """All blocks of Δ, or of the base, in order."""
        return ((self.base_block if of_base else self.block)(files, *span) for span in self.spans())


def inner_products(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """⟨a_j, a_k⟩ (K, K) in float64."""
    rows = np.stack([array.ravel() for array in arrays]).astype(np.float64, copy=False)
    return rows @ rows.T


class Split(NamedTuple):
    """K deltas of one tensor, split into what they share and how they differ (docs, B2; ours).

    Euclidean metric, and the variance of the runs at hand (seeds, data splits) only.
    """

    mean_square: float  # ‖δ̄‖², δ̄ the mean of the K deltas
    variance: float  # V̂ = Σ_k ‖δ_k − δ̄‖² / (K−1), the variance of one run, summed over entries
    runs: int

    @property
    def signal(self) -> float:
        """max(‖δ̄‖² − V̂/K, 0)."""
        return max(self.mean_square - self.variance / self.runs, 0.0)

    @property
    def signal_to_noise(self) -> float:
        """signal / V̂ of one run; inf without variance."""
        return self.signal / self.variance if self.variance > 0 else float("inf")

    def tau(self, averaged: int = 1) -> float:
        """τ* = signal / (signal + V̂/averaged): 1 for one run, K for the average of all; 1 if nothing moved.

        >>> Split(mean_square=3.0, variance=4.0, runs=4).tau(), Split(3.0, 4.0, 4).tau(averaged=4)
        (0.3333333333333333, 0.6666666666666666)
        """
        total = self.signal + self.variance / averaged
        return self.signal / total if total > 0 else 1.0


def split_of(gram: np.ndarray) -> Split:
    """The split from the inner products ⟨δ_j, δ_k⟩ (K, K); ValueError for K < 2.

    >>> split_of(np.array([[2.0, 1.0], [1.0, 2.0]]))
    Split(mean_square=1.5, variance=1.0, runs=2)
    """
    runs = len(gram)
    if runs < 2:
        raise ValueError(f"a mean/variance split needs at least 2 fine-tuned runs, got {runs}")
    mean_square = float(gram.sum()) / runs**2
    variance = max(float(np.trace(gram)) - runs * mean_square, 0.0) / (runs - 1)
    return Split(mean_square, variance, runs)


def split_deltas(deltas: Sequence[object]) -> object:
    """The signal, variance, `signal_to_noise` and `tau()` of K pytrees of deltas with one structure, leaf by leaf.

    >>> from linfit.bridge import split_deltas
    >>> split_deltas([{"w": np.array([1.0, 0.0])}, {"w": np.array([1.0, 2.0])}])["w"].signal
    1.0
    """
    import jax

    return jax.tree.map(lambda *arrays: split_of(inner_products(map(np.asarray, arrays))), *deltas)


def products_of_runs(base: Tensor, runs: Sequence[Tensor | LowRank | None]) -> np.ndarray:
    """⟨δ_j, δ_k⟩ (K, K) of the deltas of K runs of one tensor, everything read once."""
    deltas = [Delta(base, [run]) for run in runs]
    gram = np.zeros((len(runs), len(runs)))
    with Files(source for delta in deltas for source in delta.sources) as files:
        for span in deltas[0].spans(share=2 * len(runs) + 1):
            start = deltas[0].base_block(files, *span)
            gram += inner_products(delta.block(files, *span, start) for delta in deltas)
    return gram


def split_runs(base: Tensor, runs: Sequence[Tensor | LowRank | None]) -> Split:
    """Mean and variance of the deltas of K runs of one tensor."""
    return split_of(products_of_runs(base, runs))
