"""The moments of Gaussian data under FLOW's weights, and where learning stalls (docs, F1–F4)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import FixedShift
from linfit.covariance import Covariance, as_covariance
from linfit.internal.checks import ArrayLike, count, is_concrete, non_negative, real_array, same_size

CovarianceLike = Covariance | ArrayLike
ShiftLike = FixedShift | ArrayLike

MEDIAN = 0.4549364231195728
"""The median of χ²₁: the median of r² in units of its variance v."""


# One integral does it. For r ~ N(0, v), ∫ e^{−r²/T} N(r; 0, v) dr = (1 + 2v/T)^{−1/2}, and under the weights r is again
# Gaussian, of variance d(v)·v. Given r, x has mean (ΣΔ/v) r and covariance Σ − ΣΔΔᵀΣ/v, so
#     E w xxᵀ = Z[Σ − ΣΔΔᵀΣ/v + d(v) v ΣΔΔᵀΣ/v²] = Z[Σ − (1−d(v))/v ΣΔΔᵀΣ],     E w x r = Z d(v) ΣΔ.
def damping(variance: ArrayLike, temperature: ArrayLike) -> Array:
    """d(v) = 1/(1 + 2v/T), by which weights e^{−r²/T} shrink the variance v of a Gaussian r (docs, F2).

    Variance v ≥ 0 and temperature T in [0, ∞] broadcast; T = ∞ is 1, no weighting, and T = 0 the limit. Raises
    ValueError for NaN or negative values.

    >>> from theory.flow import damping
    >>> damping(1.0, [0.0, 2.0, jnp.inf])
    Array([0. , 0.5, 1. ], dtype=float64)
    """
    variance, temperature = non_negative("variance", variance), _temperature(temperature)
    cold = temperature == 0
    return jnp.where(cold, variance == 0, 1 / (1 + 2 * variance / jnp.where(cold, 1, temperature)))


def _temperature(temperature: ArrayLike, ndim: int | None = None) -> Array:
    return non_negative("temperature", temperature, ndim=ndim, finite=False)


def deflation(damped: Array, variance: Array) -> Array:
    """k = (1 − d)/v, 0 if there is nothing to deflate."""
    return jnp.where(variance > 0, (1 - damped) / jnp.where(variance > 0, variance, 1), 0)


def residual_variance(covariance: CovarianceLike, shift: ShiftLike, noise_std: ArrayLike) -> Array:
    """v = ΔᵀΣΔ + σ², the variance of the residuals r = xᵀΔ + ε of the pretrained weights (docs, F2); σ of any shape."""
    covariance, shift = _data(covariance, shift)
    return covariance.squared_norm(shift) + non_negative("noise_std", noise_std) ** 2


def _data(covariance: CovarianceLike, shift: ShiftLike) -> tuple[Covariance, Array]:
    covariance = as_covariance(covariance, "covariance")
    vector = shift.vector if isinstance(shift, FixedShift) else real_array("shift", shift, ndim=1)
    same_size("shift", vector.shape[0], "covariance", covariance.size)
    return covariance, vector


def median_temperature(residual_variance: ArrayLike) -> Array:
    """T = median r² = 0.4549 v for Gaussian residuals of variance v (docs, F2), the paper's default: d = 1/5.396.

    >>> from theory.flow import damping, median_temperature
    >>> damping([3.0], median_temperature([3.0])).round(4)
    Array([0.1853], dtype=float64)
    """
    return MEDIAN * non_negative("residual_variance", residual_variance)


def mean_weight(residual_variance: ArrayLike, temperature: ArrayLike | None = None) -> Array:
    """Z = E w = (1 + 2v/T)^{−1/2} (docs, F2), the factor by which unnormalised weights shrink the step.

    >>> from theory.flow import mean_weight
    >>> mean_weight(1.0, temperature=[0.25, jnp.inf]).round(4)
    Array([0.3333, 1.    ], dtype=float64)
    """
    variance = non_negative("residual_variance", residual_variance)
    return jnp.sqrt(damping(variance, median_temperature(variance) if temperature is None else temperature))


class WeightedCovariance(Covariance):
    """Σ_w = E w xxᵀ = Z(Σ − k aaᵀ), a = ΣΔ: a covariance like any other, and never a matrix unless asked for one."""

    base: Covariance
    """Σ."""
    shift: Array
    """Δ (p,)."""
    direction: Array
    """a = ΣΔ (p,)."""
    scale: Array
    """Z = E w."""
    deflation: Array
    """k = 2/(T + 2v)."""

    @property
    def size(self) -> int:
        return self.base.size

    @property
    def latent_size(self) -> int:
        return self.base.latent_size

    @property
    def dtype(self) -> jnp.dtype:
        return self.direction.dtype

    @property
    def matrix(self) -> Array:
        """Σ_w (p, p)."""
        return self.apply(jnp.eye(self.size, dtype=self.dtype))

    @property
    def moment(self) -> Array:
        """E w x r = Z ΣΔ/(1 + 2v/T) (p,), the first step of FLOW from the pretrained weights (ours)."""
        return self.scale**3 * self.direction

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.matrix, dtype=dtype, copy=copy)

    def diagonal(self) -> Array:
        return self.scale * (self.base.diagonal() - self.deflation * self.direction**2)

    def apply(self, vectors: Array) -> Array:
        along = (vectors @ self.direction)[..., None] * self.direction
        return self.scale * (self.base.apply(vectors) - self.deflation * along)

    def gram(self, rows: Array) -> Array:
        along = rows @ self.direction
        return self.scale * (self.base.gram(rows) - self.deflation * jnp.outer(along, along))

    def colour(self, latent: Array) -> Array:
        """latent·√Z(I − γbbᵀ)R, R the root of Σ, b = RΔ and (1 − γb²)² = 1 − kb²."""
        _, transposed = jax.vjp(self.base.colour, jnp.zeros(self.latent_size, self.dtype))
        (b,) = transposed(self.shift)
        gamma = self.deflation / (1 + jnp.sqrt(jnp.maximum(1 - self.deflation * (b @ b), 0)))
        return jnp.sqrt(self.scale) * self.base.colour(latent - gamma * (latent @ b)[..., None] * b)

    def ratio_to(self, other: object) -> None:
        """Not tracked."""


def weighted_covariance(
    covariance: CovarianceLike, shift: ShiftLike, noise_std: ArrayLike, temperature: ArrayLike | None = None
) -> WeightedCovariance:
    """Σ_w = E w xxᵀ of FLOW for Gaussian data (docs, F2; any Σ and noise: ours).

        Σ_w = Z(Σ − k ΣΔΔᵀΣ),   Z = (1 + 2v/T)^{−1/2},  k = 2/(T + 2v),  v = ΔᵀΣΔ + σ²

    Args:
        covariance: Σ as eigenvalues (p,), a matrix (p, p) or a covariance such as `linfit.Empirical`.
        shift: Δ (p,) or a `FixedShift`.
        noise_std: σ ≥ 0, in units of y.
        temperature: T in [0, ∞], in units of y²; the median of r² by default.

    `.matrix` or `numpy.asarray` form the matrix, and `.moment` is E w x r = Z ΣΔ/(1 + 2v/T). Raises ValueError for
    sizes that differ, NaN or Inf, negative noise or temperature.

    >>> from theory.flow import weighted_covariance
    >>> weighted = weighted_covariance([1.0, 4.0], [1.0, 0.0], noise_std=0.0, temperature=2.0)
    >>> weighted.diagonal().round(3), weighted.moment.round(3)
    (Array([0.354, 2.828], dtype=float64), Array([0.354, 0.   ], dtype=float64))
    """
    covariance, shift = _data(covariance, shift)
    noise_std = non_negative("noise_std", noise_std, ndim=0)
    direction = covariance.apply(shift)
    variance = jnp.vdot(direction, shift) + noise_std**2
    temperature = median_temperature(variance) if temperature is None else _temperature(temperature, ndim=0)
    damped = damping(variance, temperature)
    return WeightedCovariance(covariance, shift, direction, jnp.sqrt(damped), deflation(damped, variance))


class Stall(NamedTuple):
    """What weighting does to learning along Δ, relative to every other direction."""

    mean_weight: Array
    """Z, the speed of all directions that are Σ-orthogonal to Δ, relative to no weighting."""
    drive: Array
    """1/(1 + 2v/T): speed of the first step along Δ, relative to Z."""
    rate: Array
    """(1 + 2σ²/T)/(1 + 2v/T): at which errors along Δ decay, relative to Z; the drive without label noise."""
    direction: Array
    """Δ with ΔᵀΣΔ = 1 (p,); Σ^{1/2} of it is the unit vector that is deflated."""


# In whitened coordinates Σ_w/Z = I − k bbᵀ with b = Σ^{1/2}Δ, so b keeps 1 − k b² = 1 − 2q/(T + 2v) = d(v)/d(σ²).
def stall(
    covariance: CovarianceLike, shift: ShiftLike, noise_std: ArrayLike, temperature: ArrayLike | None = None
) -> Stall:
    """FLOW is a rank-one deflation: learning stalls along Δ (paper 2502.02797: "stalls"; this form ours; docs, F3).

        Σ^{−1/2} Σ_w Σ^{−1/2} = Z(I − (1 − rate) b̂b̂ᵀ),   b̂ ∝ Σ^{1/2}Δ,   rate = (1 + 2σ²/T)/(1 + 2v/T)

    Arguments and errors as for `weighted_covariance`, and the shift must not vanish under Σ.

    >>> from theory.flow import stall
    >>> stalled = stall([1.0, 1.0], [3.0, 0.0], noise_std=0.0)                # at the median temperature
    >>> float(1 / stalled.rate).__round__(3), stalled.direction
    (5.396, Array([1., 0.], dtype=float64))
    """
    weighted = weighted_covariance(covariance, shift, noise_std, temperature)
    signal = jnp.vdot(weighted.shift, weighted.direction)
    if is_concrete(signal) and not signal > 0:
        raise ValueError(f"shift must have ΔᵀΣΔ > 0, got {signal}: there is nothing to learn, and nothing stalls")
    rate, direction = 1 - weighted.deflation * signal, weighted.shift / jnp.sqrt(signal)
    return Stall(weighted.scale, weighted.scale**2, rate, direction)


# Under the weights the noise is Gaussian of variance d(σ²)σ² around (1 − d(σ²)) of the way back: given x,
# E[w r | x] = d(σ²) xᵀΔ E[w | x]. So E w x (r − d(σ²) xᵀΔ) = 0 whatever the law of x.
def fixed_point_coefficient(noise_std: ArrayLike, temperature: ArrayLike) -> Array:
    """With label noise FLOW ends at θ₁ + τΔ, as an ensemble would: its equivalent τ (docs, F4; ours).

        τ = 1/(1 + 2σ²/T)

    for every Σ, and for every law of x: only the noise has to be Gaussian and independent of x. σ ≥ 0 and T in [0, ∞]
    broadcast. τ = 1 for σ = 0. Raises ValueError for NaN or negative values.

    >>> from theory.flow import fixed_point_coefficient
    >>> fixed_point_coefficient(noise_std=[0.0, 1.0], temperature=2.0)
    Array([1. , 0.5], dtype=float64)
    """
    return damping(non_negative("noise_std", noise_std) ** 2, temperature)


class HeavyTails(NamedTuple):
    """Σ_w = speed·(Σ − (1 − rate) ΣΔΔᵀΣ/q): the speed of directions Σ-orthogonal to Δ, the rate of Δ beside them."""

    speed: Array
    rate: Array


# Given S the features are Gaussian with covariance SΣ, so by F2 E[w xxᵀ|S] = Z_S(SΣ − 2S²ΣΔΔᵀΣ/(T + 2v_S)),
# v_S = Sq + σ²: again a multiple of Σ less a multiple of ΣΔΔᵀΣ.
def heavy_tailed_stall(
    signal: ArrayLike, noise_std: ArrayLike, temperature: ArrayLike, scales: ArrayLike, probabilities: ArrayLike
) -> HeavyTails:
    """How F3 bends for features x = √S z, z ~ N(0, Σ), S independent with mean one and kurtosis 3E S² (docs, F3; ours).

        speed = E S Z_S,   rate = (1 + 2σ²/T) E[S Z_S d(v_S)]/E[S Z_S],   d(v) = 1/(1 + 2v/T) = Z², v_S = Sq + σ²

    Args:
        signal: q = ΔᵀΣΔ ≥ 0.
        noise_std: σ ≥ 0.
        temperature: T in [0, ∞]; the three broadcast.
        scales: the values of S (m,), normalised here to a mean of one.
        probabilities: of the scales (m,), normalised here to a sum of one.

    Raises ValueError for negative values or sizes that differ.

    >>> from theory.flow import heavy_tailed_stall
    >>> gaussian, heavy = (heavy_tailed_stall(1.0, 0.0, 0.5, S, [0.9, 0.1]) for S in ([1.0, 1.0], [0.5, 5.5]))
    >>> gaussian.rate.round(3), heavy.rate.round(3)
    (Array(0.2, dtype=float64), Array(0.245, dtype=float64))
    """
    scales, probabilities = non_negative("scales", scales, ndim=1), non_negative("probabilities", probabilities, ndim=1)
    same_size("probabilities", probabilities.shape[0], "scales", scales.shape[0])
    probabilities = probabilities / jnp.sum(probabilities)
    scales = scales / (scales @ probabilities)
    noise_variance, temperature = non_negative("noise_std", noise_std) ** 2, _temperature(temperature)
    variance = scales * non_negative("signal", signal)[..., None] + noise_variance[..., None]
    damped = damping(variance, temperature[..., None])
    weights = probabilities * scales * jnp.sqrt(damped)
    speed = jnp.sum(weights, axis=-1)
    rate = jnp.sum(weights * damped, axis=-1) / speed / damping(noise_variance, temperature)
    return HeavyTails(speed, rate)


def lognormal_sizes(spread: float, nodes: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """S and probabilities (nodes,) with log S ~ N(−spread²/2, spread²), for `heavy_tailed_stall` (ours).

    By Gauss–Hermite quadrature. E S = 1, and features √S z have kurtosis 3e^{spread²}. Raises ValueError for a
    negative spread or nodes < 1.

    >>> from theory.flow import lognormal_sizes
    >>> scales, probabilities = lognormal_sizes(1.0)
    >>> float(probabilities @ scales).__round__(9), float(probabilities @ scales**2).__round__(9)
    (1.0, 2.718281828)
    """
    spread = float(non_negative("spread", spread, ndim=0))
    at, masses = np.polynomial.hermite_e.hermegauss(count("nodes", nodes))
    return np.exp(spread * at - spread**2 / 2), masses / masses.sum()
