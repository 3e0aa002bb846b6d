"""The delta of a weight matrix as signal plus noise: spectra, noise edge, and filters on the delta (docs, B2, B3).

A filter on the singular values, ΔW ↦ Σ g(s_i) s_i u_i v_iᵀ, that keeps only the k largest is ΔW · V diag(g) Vᵀ with
their right singular vectors V, so ΔW itself is read in blocks and never held.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy.integrate
import scipy.optimize

from linfit.bridge.spectrum import Blocks, spectrum_of


@lru_cache(maxsize=256)
def marchenko_pastur_median(aspect: float) -> float:
    """Median eigenvalue of the Marchenko–Pastur law with aspect ratio β = n/m ≤ 1 and unit variance."""
    if not 0 < aspect <= 1:
        raise ValueError(f"aspect must be in (0, 1], got {aspect}")
    root = aspect**0.5

    # Density √((b−x)(x−a)) / (2πβx) on [a, b] = [(1−√β)², (1+√β)²].
    # x = 1 + β + 2√β cos φ turns the square-root edges into a smooth integrand on [0, π].
    def mass_above(angle: float) -> float:
        def density(phi: float) -> float:
            x = 1 + aspect + 2 * root * np.cos(phi)
            return 2 * np.sin(phi) ** 2 / (np.pi * x) if x > 0 else 2 / np.pi

        return scipy.integrate.quad(density, 0, angle)[0]

    angle = scipy.optimize.brentq(lambda angle: mass_above(angle) - 0.5, 0, np.pi)
    return float(1 + aspect + 2 * root * np.cos(angle))


class Noise(NamedTuple):
    """What a pure-noise delta of this shape would look like."""

    entry_std: float  # σ of one entry, estimated from the median singular value
    edge: float  # σ(√m + √n): singular values of noise end here


def noise_level(singular_values: np.ndarray, shape: tuple[int, int]) -> Noise:
    """σ̂ = s_med / √(max(m,n)·μ_β), and the Marchenko–Pastur edge σ̂(√m + √n) (Gavish & Donoho; docs, B3).

    `singular_values` (min(m, n),) all of them. σ̂ = 0 when more than half of them vanish, as for a low-rank delta.

    >>> noise = np.random.default_rng(0).standard_normal((300, 200))
    >>> abs(noise_level(np.linalg.svd(noise, compute_uv=False), noise.shape).entry_std - 1) < 0.02
    True
    """
    long, short = max(shape), min(shape)
    median = float(np.median(singular_values))
    floor = long * np.finfo(np.float32).eps * float(np.max(singular_values, initial=0.0))
    sigma = 0.0 if median <= floor else median / (long * marchenko_pastur_median(short / long)) ** 0.5
    return Noise(sigma, sigma * (long**0.5 + short**0.5))


def optimal_shrinkage(singular_values: np.ndarray, shape: tuple[int, int], entry_std: float) -> np.ndarray:
    """η(s), the shrinkage of singular values with least Frobenius loss (Gavish & Donoho 2017; docs, B3).

        η = σ√M · √((y² − β − 1)² − 4β) / y  for y = s/(σ√M) > 1 + √β, else 0;   M = max(m, n), β = min/max.

    Same shape as `singular_values`. σ = 0 leaves them as they are. Raises ValueError if σ is negative.

    >>> optimal_shrinkage(np.array([5.0, 1.5]), (100, 100), 0.1)
    array([4.58257569, 0.        ])
    """
    if entry_std < 0:
        raise ValueError(f"entry_std must be non-negative, got {entry_std}")
    if entry_std == 0:
        return singular_values
    aspect, scale = min(shape) / max(shape), entry_std * max(shape) ** 0.5
    y = singular_values / scale
    above = y > 1 + aspect**0.5
    safe = np.where(above, y, 2.0)
    return np.where(above, scale * np.sqrt(np.maximum((safe**2 - aspect - 1) ** 2 - 4 * aspect, 0)) / safe, 0.0)


class Filter(NamedTuple):
    """ΔW ↦ ΔW · V diag(g) Vᵀ, applied to any block of rows."""

    directions: np.ndarray  # V (n, k), orthonormal
    gains: np.ndarray  # g (k,)
    missed: int = 0  # directions with a gain that did not fit into memory and are left out

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Rows (b, n) filtered."""
        directions = self.directions.astype(block.dtype, copy=False)
        return ((block @ directions) * self.gains.astype(block.dtype)) @ directions.T


def truncation(blocks: Blocks, side: int, rank: int) -> Filter | None:
    """g = 1[i ≤ r]; None, the identity, if r is not below the shorter side."""
    if rank >= side:
        return None
    directions = spectrum_of(blocks, side, lambda values: rank).directions
    return Filter(directions, np.ones(directions.shape[1]), rank - directions.shape[1])


def shrinkage(blocks: Blocks, shape: tuple[int, int]) -> Filter | None:
    """g = η(s)/s with the noise level of the spectrum itself; None, the identity, if it shows no noise."""

    def above_edge(values: np.ndarray) -> int:
        noise = noise_level(values, shape)
        return int(np.sum(values > noise.edge)) if noise.entry_std > 0 else 0

    spectrum = spectrum_of(blocks, min(shape), above_edge)
    directions, noise = spectrum.directions, noise_level(spectrum.singular_values, shape)
    if noise.entry_std == 0:
        return None
    kept = spectrum.singular_values[: directions.shape[1]]
    gains = optimal_shrinkage(kept, shape, noise.entry_std) / kept
    return Filter(directions, gains, spectrum.wanted - kept.size)
