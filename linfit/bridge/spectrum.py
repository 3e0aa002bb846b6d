"""The singular values of a matrix that is only read in blocks, and the directions of the largest (ours, for B3).

Everything follows from A = ΔᵀΔ, n the shorter side of Δ. Up to `EXACT_SIDE` A is summed over row blocks and decomposed.
Beyond, A is only ever applied to a few vectors, one pass over the blocks at a time: a block Krylov space

    span{Ω, AΩ, A²Ω, …},   Ω (n, b) random and orthonormal,   grown until the directions that are wanted have converged.

With T = QᵀAQ = Y diag(θ) Yᵀ on its orthonormal basis Q, the largest √θ are singular values and Q Y their directions; as
Ω is random, the first b rows of Y give block Gauss quadrature for the whole spectrum,

    tr f(A) ≈ (n/b) Σ_i f(θ_i) ‖Y_{1..b, i}‖²,

so that the median, and with it the noise level, needs no full decomposition either.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
from scipy.linalg import blas

# Row blocks (b, n) of a matrix (m, n) with m ≥ n, from the start at each call.
Blocks = Callable[[], Iterator[np.ndarray]]

EXACT_SIDE = 4096  # shorter sides up to this one are decomposed through their Gram matrix, 64 MB in float32
_DOUBLE_SIDE = 2048  # Gram matrices up to this size are kept in float64, larger ones in float32
BASIS_BYTES = 1 << 26  # memory of a Krylov basis: 2048 directions of 8192 entries
_PROBES = 32  # columns of Ω: the standard error of a count is √(2·p(1−p)·n/_PROBES)
_LEAST_STEPS = 16  # powers of A below which the quadrature is not trusted
_TOLERANCE = 1e-2  # ‖A v − θ v‖/θ of a converged direction; the error of θ is quadratic in it where θ stands apart


class Spectrum(NamedTuple):
    """What is known of a matrix from its blocks."""

    singular_values: np.ndarray  # (n,), descending: `resolved` ones, then quantiles of the others' distribution
    directions: np.ndarray  # (n, k) right singular vectors of the first k, orthonormal
    resolved: int  # n where the whole spectrum is exact
    wanted: int  # number of directions asked for; k is smaller only where memory ended first


def most_directions(side: int) -> int:
    """How many directions of a shorter side n memory allows: n if exact, else half of a Krylov basis."""
    return side if side <= EXACT_SIDE else _room(side) // 2


def _room(side: int) -> int:
    return min(side, max(BASIS_BYTES // (4 * side), 2 * _PROBES))


def spectrum_of(blocks: Blocks, side: int, wanted: Callable[[np.ndarray], int]) -> Spectrum:
    """Singular values, and the directions of the `wanted(singular_values)` largest, from blocks (b, n = side).

    Up to `EXACT_SIDE` exact, in float64 up to `_DOUBLE_SIDE` and in float32 beyond. Larger sides: values above the bulk
    agree with a full decomposition to about 1e-4, the median and other averages to about 1% (see the module).

    >>> matrix = np.diag([3.0, 2.0, 1.0])
    >>> spectrum_of(lambda: iter([matrix[:2], matrix[2:]]), 3, lambda s: int((s > 1.5).sum())).directions.shape
    (3, 2)
    """
    if side > EXACT_SIDE:
        return _krylov(blocks, side, wanted, _LEAST_STEPS)
    gram = _gram_of(blocks, side)
    values = _roots(scipy.linalg.eigh(gram.copy(order="F"), eigvals_only=True, overwrite_a=True, check_finite=False))
    count = min(wanted(values), side)
    return Spectrum(values, _top_eigenvectors(gram, count), side, count)


def top_directions(blocks: Blocks, side: int, count: int) -> np.ndarray:
    """The right singular vectors (n, k) of the k largest singular values alone."""
    if side <= 16 * _PROBES:
        return _top_eigenvectors(_gram_of(blocks, side), count)
    return _krylov(blocks, side, lambda values: count, 1).directions


def _gram_of(blocks: Blocks, side: int) -> np.ndarray:
    """ΔᵀΔ (n, n) summed over the blocks, its lower triangle only; float64 up to `_DOUBLE_SIDE`, float32 beyond."""
    dtype, add = (np.float64, blas.dsyrk) if side <= _DOUBLE_SIDE else (np.float32, blas.ssyrk)
    total = np.zeros((side, side), dtype, order="F")
    for block in blocks():
        total = add(1.0, block.astype(dtype, copy=False).T, beta=1.0, c=total, lower=1, overwrite_c=1)
    return total


def _top_eigenvectors(gram: np.ndarray, count: int) -> np.ndarray:
    """Of the `count` largest eigenvalues, largest first; `gram` is overwritten."""
    side = len(gram)
    if count == 0:
        return np.zeros((side, 0), gram.dtype)
    chosen = [side - count, side - 1]
    vectors = scipy.linalg.eigh(gram, subset_by_index=chosen, driver="evr", overwrite_a=True, check_finite=False)[1]
    return vectors[:, ::-1]


def _roots(ascending: np.ndarray) -> np.ndarray:
    """√θ, largest first; what rounding has left where an eigenvalue is zero counts as zero."""
    theta = ascending[::-1]
    return np.sqrt(np.where(theta > 8 * np.finfo(theta.dtype).eps * theta[0], theta, 0)).astype(float)


def _krylov(blocks: Blocks, side: int, wanted: Callable[[np.ndarray], int], least_steps: int) -> Spectrum:
    room, generator = _room(side), np.random.default_rng(0)
    basis, projected = np.empty((room, side), np.float32), np.zeros((room, room))
    probes = min(_PROBES, side)
    start, size, check = 0, 0, least_steps * probes
    fresh = scipy.linalg.qr(generator.standard_normal((side, probes), np.float32), mode="economic")[0]
    while True:
        start, size = size, size + fresh.shape[1]
        basis[start:size] = fresh.T
        known, image = basis[:size], _image(blocks, fresh)
        projected[:size, start:size] = known @ image
        projected[start:size, :size] = projected[:size, start:size].T
        scale = float(np.abs(np.diag(projected)).max())
        fresh, coupling = _orthogonal_rest(image, known, scale)
        fresh = fresh[:, : room - size]
        if size < check and fresh.shape[1]:
            continue
        theta, ritz = scipy.linalg.eigh(projected[:size, :size], driver="evr", check_finite=False)
        theta, ritz = np.maximum(theta[::-1], 0), ritz[:, ::-1]
        residual = np.linalg.norm(coupling @ ritz[start:size], axis=0) if size < side else np.zeros(size)
        open_ones = np.flatnonzero(residual > _TOLERANCE * theta)
        converged = int(open_ones[0]) if open_ones.size else size
        weights = np.sum(ritz[:probes] ** 2, axis=0) * (side / probes)
        resolved = side if size == side else min(converged, _single(weights))
        values = _quantiles(theta, weights, resolved, side, probes)
        count = min(wanted(values), side)
        if resolved > count or size == side or not fresh.shape[1]:
            found = min(count, size if size == side else max(converged, size // 2))
            return Spectrum(values, basis[:size].T @ ritz[:, :found].astype(np.float32), resolved, count)
        check = size + size // 4


def _single(weights: np.ndarray) -> int:
    """How many of the largest θ stand for one singular value each: a simple one weighs 1 ± √(2/_PROBES).

    Only an eigenvalue of higher multiplicity than there are probes is found less often than it occurs, and weighs more.
    """
    heavy = np.flatnonzero(np.cumsum(weights) > 1.5 * np.arange(1, weights.size + 1) + 2)
    return int(heavy[0]) if heavy.size else weights.size


def _image(blocks: Blocks, directions: np.ndarray) -> np.ndarray:
    """A V = Σ Δ_bᵀ (Δ_b V)."""
    total = np.zeros_like(directions)
    for block in blocks():
        narrow = block.astype(np.float32, copy=False)
        total += narrow.T @ (narrow @ directions)
    return total


def _orthogonal_rest(image: np.ndarray, known: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns for what of `image` lies outside the rows of `known`, and its coefficients on them.

    Projecting twice is enough for what is large; what is left of columns that nearly vanish is cleaned once more, and
    columns at the level of rounding are dropped: the space is then complete in their direction.
    """
    rest = image - known.T @ (known @ image)
    rest -= known.T @ (known @ rest)
    columns, triangle, order = scipy.linalg.qr(rest, mode="economic", pivoting=True, check_finite=False)
    kept = int(np.sum(np.abs(np.diag(triangle)) > 1e-6 * scale))
    columns = columns[:, :kept] - known.T @ (known @ columns[:, :kept])
    if kept:
        columns = scipy.linalg.qr(columns, mode="economic", check_finite=False)[0]
    coupling = np.empty_like(triangle)
    coupling[:, order] = triangle
    return columns, coupling


def _quantiles(theta: np.ndarray, weights: np.ndarray, resolved: int, side: int, probes: int) -> np.ndarray:
    """Singular values (n,): the resolved ones, then quantiles of the quadrature rule of the others.

    Nodes come in clusters of one per probe, and inside a cluster only sums mean anything: a running mean over `probes`
    nodes, of θ as of the counting function, turns the staircase into a curve.
    """
    values = np.zeros(side)
    values[:resolved] = np.sqrt(theta[:resolved])
    rest, mass = theta[resolved:], weights[resolved:]
    if resolved == side or mass.sum() <= 0:
        return values
    mass = mass * ((side - resolved) / mass.sum()) + 1e-12
    window = min(probes, rest.size)
    below = np.concatenate([[0.0], np.cumsum(mass)])
    energy = np.concatenate([[0.0], np.cumsum(mass * rest)])
    mean = (energy[window:] - energy[:-window]) / (below[window:] - below[:-window])
    middle = (below[window:] + below[:-window]) / 2
    at = np.arange(side - resolved) + 0.5
    values[resolved:] = np.sqrt(np.maximum(np.interp(at, middle, mean), 0))
    floor = (8 * np.finfo(np.float32).eps * theta[0]) ** 0.5
    values[values < floor] = 0
    return np.minimum.accumulate(values)
