"""FLOW in the population: what weighting samples by the pretrained losses does to gradient descent (docs, F1–F6).

Weights w = e^{−r²/T}, r = y − xᵀθ₁ = xᵀΔ + ε the residual of the pretrained weights, change the moments that
fine-tuning sees. For Gaussian data everything follows from one number, the damping of a variance,

    d(v) = 1/(1 + 2v/T):    E w = √d(v) = Z,    Σ_w = E w xxᵀ = Z(Σ − k ΣΔΔᵀΣ),    E w x r = Z d(v) ΣΔ,

with v = ΔᵀΣΔ + σ² the variance of r and k = (1 − d(v))/v. Weighting deflates one direction, Δ: there learning stalls.

The setting, and Theorem 7.2 at the end of this file, are those of paper 2502.02797; what is marked "ours" was derived
for this project. The temperature T is in units of y², ∞ for no weighting; by default it is the median of the losses
r². Weights enter as they are, as in the authors' code: they also shrink the step by their mean Z.

>>> from theory import flow
>>> weighted = flow.weighted_covariance([1.0, 1.0], shift=[1.0, 0.0], noise_std=0.0)     # T = median r²
>>> (weighted.matrix / weighted.scale).round(4)                                         # learning along Δ: 5.4 × slower
Array([[0.1853, 0.    ],
       [0.    , 1.    ]], dtype=float64)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import (
    Dense,
    Diagonal,
    Empirical,
    Filter,
    FixedShift,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Ridge,
    TwoTaskProblem,
)
from linfit.covariance import Covariance, as_covariance
from linfit.filters import Ensemble
from linfit.internal.checks import (
    ArrayLike,
    broadcastable,
    count,
    is_concrete,
    non_negative,
    positive,
    real_array,
    same_size,
)
from linfit.internal.linear_algebra import rank_cutoff
from theory import rational
from theory.frontier import pareto
from theory.optimum import minimise_over_logarithm

MEDIAN = 0.4549364231195728
"""The median of χ²₁: the median of r² in units of its variance v."""

# ----------------------------------------------------------------------------------- F2: moments under the weights


# One integral does it. For r ~ N(0, v), ∫ e^{−r²/T} N(r; 0, v) dr = (1 + 2v/T)^{−1/2}, and under the weights r is again
# Gaussian, of variance d(v)·v. Given r, x has mean (ΣΔ/v) r and covariance Σ − ΣΔΔᵀΣ/v, so
#     E w xxᵀ = Z[Σ − ΣΔΔᵀΣ/v + d(v) v ΣΔΔᵀΣ/v²] = Z[Σ − (1−d(v))/v ΣΔΔᵀΣ],     E w x r = Z d(v) ΣΔ.
def damping(variance: ArrayLike, temperature: ArrayLike) -> Array:
    """d(v) = 1/(1 + 2v/T), by which weights e^{−r²/T} shrink the variance v of a Gaussian r (docs, F2).

    Variance v ≥ 0 and temperature T in [0, ∞] broadcast; T = ∞ is 1, no weighting, and T = 0 the limit. Raises
    ValueError for NaN or negative values.

    >>> damping(1.0, [0.0, 2.0, jnp.inf])
    Array([0. , 0.5, 1. ], dtype=float64)
    """
    variance, temperature = non_negative("variance", variance), _temperature(temperature)
    cold = temperature == 0
    warm = 1 / (1 + 2 * variance / jnp.where(cold, 1, temperature))
    return jnp.where(cold, jnp.where(variance > 0, 0, 1), warm)


def _temperature(temperature: ArrayLike, ndim: int | None = None) -> Array:
    return non_negative("temperature", temperature, ndim=ndim, finite=False)


def residual_variance(covariance: Covariance | ArrayLike, shift: FixedShift | ArrayLike, noise_std: ArrayLike) -> Array:
    """v = ΔᵀΣΔ + σ², the variance of the residuals r = xᵀΔ + ε of the pretrained weights (docs, F2).

    `covariance` Σ as (p,), (p, p) or a covariance, `shift` Δ = θ₂* − θ₁ (p,) or a `FixedShift`, σ ≥ 0 of any shape.

    >>> residual_variance([1.0, 4.0], [1.0, 1.0], noise_std=2.0)
    Array(9., dtype=float64)
    """
    covariance, shift = _data(covariance, shift)
    return jnp.vdot(covariance.apply(shift), shift) + non_negative("noise_std", noise_std) ** 2


def median_temperature(residual_variance: ArrayLike) -> Array:
    """T = median r² = 0.4549 v for Gaussian residuals of variance v (docs, F2): the paper's default temperature.

    So the median temperature is a universal constant of the residuals: Z = 0.43, d = 1/5.396.

    >>> damping([3.0], median_temperature([3.0])).round(4)
    Array([0.1853], dtype=float64)
    """
    return MEDIAN * non_negative("residual_variance", residual_variance)


def mean_weight(residual_variance: ArrayLike, temperature: ArrayLike | None = None) -> Array:
    """Z = E w = (1 + 2v/T)^{−1/2} (docs, F2), the factor by which unnormalised weights shrink the step.

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
        """Σ_w (p, p), formed here and nowhere else."""
        return self.apply(jnp.eye(self.size, dtype=self.dtype))

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
    covariance: Covariance | ArrayLike,
    shift: FixedShift | ArrayLike,
    noise_std: ArrayLike,
    temperature: ArrayLike | None = None,
) -> WeightedCovariance:
    """Σ_w = E w xxᵀ of FLOW for Gaussian data (docs, F2; any Σ and noise: ours).

        Σ_w = Z(Σ − k ΣΔΔᵀΣ),   Z = (1 + 2v/T)^{−1/2},  k = 2/(T + 2v),  v = ΔᵀΣΔ + σ²

    `covariance` Σ as eigenvalues (p,), a matrix (p, p) or a covariance such as `linfit.Empirical`; `shift` Δ (p,) or
    a `FixedShift`; `noise_std` σ ≥ 0; `temperature` T in [0, ∞], the median of r² by default. The result multiplies
    vectors at the price of Σ; `.matrix` or `numpy.asarray` form the matrix. Raises ValueError for sizes that differ,
    NaN or Inf, negative noise or temperature.

    >>> weighted_covariance([1.0, 4.0], [1.0, 0.0], noise_std=0.0, temperature=2.0).matrix.round(3)
    Array([[0.354, 0.   ],
           [0.   , 2.828]], dtype=float64)
    """
    covariance, shift = _data(covariance, shift)
    noise_std = non_negative("noise_std", noise_std, ndim=0)
    direction = covariance.apply(shift)
    variance = jnp.vdot(direction, shift) + noise_std**2
    temperature = median_temperature(variance) if temperature is None else _temperature(temperature, ndim=0)
    damped = damping(variance, temperature)
    return WeightedCovariance(covariance, shift, direction, jnp.sqrt(damped), _deflation(damped, variance))


def _deflation(damped: Array, variance: Array) -> Array:
    """k = (1 − d)/v, 0 if there is nothing to deflate."""
    return jnp.where(variance > 0, (1 - damped) / jnp.where(variance > 0, variance, 1), 0)


def weighted_moment(
    covariance: Covariance | ArrayLike,
    shift: FixedShift | ArrayLike,
    noise_std: ArrayLike,
    temperature: ArrayLike | None = None,
) -> Array:
    """E w x r = Z ΣΔ/(1 + 2v/T) (p,), the first step of FLOW from the pretrained weights (docs, F2; ours).

    Arguments and errors as for `weighted_covariance`.

    >>> weighted_moment([1.0, 4.0], [1.0, 0.0], noise_std=0.0, temperature=2.0).round(3)
    Array([0.354, 0.   ], dtype=float64)
    """
    weighted = weighted_covariance(covariance, shift, noise_std, temperature)
    return weighted.scale**3 * weighted.direction


def _data(covariance: Covariance | ArrayLike, shift: FixedShift | ArrayLike) -> tuple[Covariance, Array]:
    covariance = as_covariance(covariance, "covariance")
    vector = shift.vector if isinstance(shift, FixedShift) else real_array("shift", shift, ndim=1)
    same_size("shift", vector.shape[0], "covariance", covariance.size)
    return covariance, vector


# ------------------------------------------------------------------------------------- F3, F4: where learning stalls


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
    covariance: Covariance | ArrayLike,
    shift: FixedShift | ArrayLike,
    noise_std: ArrayLike,
    temperature: ArrayLike | None = None,
) -> Stall:
    """FLOW is a rank-one deflation: learning stalls along Δ (paper 2502.02797: "stalls"; this form ours; docs, F3).

        Σ^{−1/2} Σ_w Σ^{−1/2} = Z(I − (1 − rate) b̂b̂ᵀ),   b̂ ∝ Σ^{1/2}Δ,   rate = (1 + 2σ²/T)/(1 + 2v/T)

    Arguments and errors as for `weighted_covariance`, and the shift must not vanish under Σ.

    >>> stalled = stall([1.0, 1.0], [3.0, 0.0], noise_std=0.0)                # at the median temperature
    >>> float(1 / stalled.rate).__round__(3), stalled.direction
    (5.396, Array([1., 0.], dtype=float64))
    """
    weighted = weighted_covariance(covariance, shift, noise_std, temperature)
    signal = jnp.vdot(weighted.shift, weighted.direction)
    if is_concrete(signal) and not signal > 0:
        raise ValueError(f"shift must have ΔᵀΣΔ > 0, got {signal}: there is nothing to learn, and nothing stalls")
    drive = weighted.scale**2
    return Stall(weighted.scale, drive, 1 - weighted.deflation * signal, weighted.shift / jnp.sqrt(signal))


# Under the weights the noise is Gaussian of variance d(σ²)σ² around (1 − d(σ²)) of the way back: given x,
# E[w r | x] = d(σ²) xᵀΔ E[w | x]. So E w x (r − d(σ²) xᵀΔ) = 0 whatever the law of x.
def fixed_point_coefficient(noise_std: ArrayLike, temperature: ArrayLike) -> Array:
    """With label noise FLOW ends at θ₁ + τΔ, as an ensemble would: its equivalent τ (docs, F4; ours).

        τ = 1/(1 + 2σ²/T)

    for every Σ, and for every law of x: only the noise has to be Gaussian and independent of x. σ ≥ 0 and T in [0, ∞]
    broadcast. τ = 1 for σ = 0. Raises ValueError for NaN or negative values.

    >>> fixed_point_coefficient(noise_std=[0.0, 1.0], temperature=2.0)
    Array([1. , 0.5], dtype=float64)
    """
    return damping(non_negative("noise_std", noise_std) ** 2, temperature)


class HeavyTails(NamedTuple):
    """`Stall` for features whose size varies from sample to sample, Σ_w = speed·(Σ − (1 − rate) ΣΔΔᵀΣ/q)."""

    speed: Array
    """Of directions that are Σ-orthogonal to Δ, relative to no weighting."""
    rate: Array
    """Of Δ, relative to the others."""


# Given S the features are Gaussian with covariance SΣ, so by F2 E[w xxᵀ|S] = Z_S(SΣ − 2S²ΣΔΔᵀΣ/(T + 2v_S)),
# v_S = Sq + σ²: again a multiple of Σ less a multiple of ΣΔΔᵀΣ.
def heavy_tailed_stall(
    signal: ArrayLike, noise_std: ArrayLike, temperature: ArrayLike, scales: ArrayLike, probabilities: ArrayLike
) -> HeavyTails:
    """How F3 bends for features x = √S z, z ~ N(0, Σ), S independent with mean one and kurtosis 3E S² (docs, F3; ours).

        speed = E S Z_S,   rate = (1 + 2σ²/T) E[S Z_S d(v_S)]/E[S Z_S],   d(v) = 1/(1 + 2v/T) = Z², v_S = Sq + σ²

    Weighting still deflates Δ and nothing else, and the fixed point is that of F4. `signal` q = ΔᵀΣΔ, σ and T broadcast
    to (…); `scales` S and `probabilities` are (m,), normalised here to a sum and a mean of one. Raises ValueError for
    negative values or sizes that differ.

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

    >>> scales, probabilities = lognormal_sizes(1.0)
    >>> float(probabilities @ scales).__round__(9), float(probabilities @ scales**2).__round__(9)
    (1.0, 2.718281828)
    """
    spread = float(non_negative("spread", spread, ndim=0))
    at, masses = np.polynomial.hermite_e.hermegauss(count("nodes", nodes))
    return np.exp(spread * at - spread**2 / 2), masses / masses.sum()


# ------------------------------------------------------------------------------------------- F3: along training


class Trajectory(NamedTuple):
    """Population FLOW after fine-tuning, (…) the hyperparameters."""

    moved: Array
    """θ − θ₁ (…, p)."""
    finetune: Array
    """R_ft = ‖θ−θ₂*‖²_{Σ₂} (…)."""
    pretrain: Array
    """R_pre = ‖θ−θ₁*‖²_{Σ₁} (…)."""

    @property
    def total(self) -> Array:
        """The paper's err_tot, R_ft + R_pre."""
        return self.finetune + self.pretrain


class _Population(NamedTuple):
    """The fine-tuning domain in the eigenbasis of Σ₂ (r ≤ p)."""

    eigenvalues: Array
    """s (r,)."""
    gap: Array
    """VᵀΔ (r,)."""
    noise_variance: Array
    variance: Array
    """v."""


# Ridge under the weights, (Σ_w + λ)⁻¹ E w x r, by Sherman–Morrison: with m = (ZΣ + λ)⁻¹ ZΣΔ the ridge of penalty λ/Z,
#     θ_λ − θ₁ = d(v) m / (1 − k (ΣΔ)ᵀm),   d(v)/(1 − k (ΣΔ)ᵀm) = 1/(1 + 2 v_λ/T),   v_λ = σ² + ΔᵀΣ(Δ − m):
# FLOW + ridge is ridge + averaging, damped by the variance v_λ of what ridge leaves unexplained. λ = 0 is F4. A filter
# is a sum of ridges (`theory.rational`), so the same line gives gradient flow.
def trajectory(problem: TwoTaskProblem, filter: Filter, temperature: ArrayLike | None = None) -> Trajectory:
    """FLOW in the population, for any fine-tuner (docs, F3; ours): θ − θ₁ = g(Σ_w) E w x r, and both risks.

        gradient descent  θ − θ₁ = τ[I − (I − ηΣ_w)^k]Δ   ·   gradient flow  τ[I − e^{−tΣ_w}]Δ   ·   τ as in F4
        ridge             θ − θ₁ = 1/(1 + 2v_λ/T) (Σ + λ/Z)⁻¹ΣΔ,   v_λ = σ² + ΔᵀΣ(λ/Z)(Σ + λ/Z)⁻¹Δ

    `filter` is MinNorm, Ridge, GradientFlow, GradientDescent or `tau * filter`; step size and time refer to the loss
    with ½ (the paper's η is half of this step size). `temperature` T in (0, ∞] broadcasts against the
    hyperparameters; ∞ is fine-tuning without weights, None the median of r². Σ₂ may be diagonal, dense or empirical;
    diagonal needs no matrix. Accuracy of gradient flow 1e-9 (float32: 1e-4), of the others rounding.

    Raises ValueError for a random shift (the weights depend on the task at hand), T = 0, a step size with
    ηs_max ≥ 2, s_max of Σ_w, or hyperparameters that do not broadcast.

    >>> from linfit import FixedShift, GradientDescent, TwoTaskProblem
    >>> problem = TwoTaskProblem([1.0, 1.0], [1.0, 0.5], FixedShift([1.0, 1.0]), noise_std=0.0)
    >>> trajectory(problem, GradientDescent(1.0, steps=[0, 2, 10, 400])).finetune.round(3)
    Array([1.5  , 1.146, 0.426, 0.   ], dtype=float64)
    """
    gap = _fixed_gap(problem)
    population, vectors = _population(problem.finetune_covariance, gap, problem.noise_std)
    temperature = median_temperature(population.variance) if temperature is None else _temperature(temperature)
    if is_concrete(temperature) and not (np.asarray(temperature) > 0).all():
        raise ValueError("temperature must be positive: at T = 0 all weights are 0 and nothing is learned; got 0")
    coordinates = _moved(population, filter, temperature)
    moved = coordinates if vectors is None else coordinates @ vectors.T
    left = coordinates - population.gap
    away = moved if problem.pretrain_error is None else moved + problem.pretrain_error
    pretrain = jnp.sum(away * problem.pretrain_covariance.apply(away), axis=-1)
    return Trajectory(moved, jnp.sum(left * population.eigenvalues * left, axis=-1), pretrain)


def _population(covariance: Covariance, gap: Array, noise_std: Array) -> tuple[_Population, Array | None]:
    """The population, and the eigenvectors V (p, r); None where they are the identity."""
    vectors: Array | None
    if isinstance(covariance, Diagonal):
        eigenvalues, vectors = covariance.eigenvalues, None
    elif isinstance(covariance, Empirical):
        _, roots, transposed = jnp.linalg.svd(covariance.features, full_matrices=False)
        eigenvalues, vectors = roots**2 / covariance.latent_size, transposed.T
    elif isinstance(covariance, Dense):
        eigenvalues, vectors = jnp.linalg.eigh(covariance.matrix)
        eigenvalues = jnp.maximum(eigenvalues, 0)
    else:
        raise ValueError(f"finetune_covariance must be diagonal, dense or empirical, got {type(covariance).__name__}")
    gap = gap if vectors is None else gap @ vectors
    noise_variance = jnp.asarray(noise_std, gap.dtype) ** 2
    return _Population(eigenvalues, gap, noise_variance, noise_variance + gap**2 @ eigenvalues), vectors


def _moved(population: _Population, filter: Filter, temperature: Array) -> Array:
    """θ − θ₁ in the eigenbasis, (…, r)."""
    if isinstance(filter, Ensemble):
        moved = _moved(population, filter.filter, temperature)
        broadcastable("tau", filter.tau.shape, "filter and temperature", moved.shape[:-1])
        return filter.tau[..., None] * moved
    dtype = population.eigenvalues.dtype
    if isinstance(filter, MinNorm):
        return _ridge(population, jnp.zeros((), dtype), temperature.astype(dtype))
    if isinstance(filter, Ridge):
        return _ridge(population, *_together(dtype, temperature, filter.penalty))
    if isinstance(filter, GradientFlow):
        return _flow(population, *_together(dtype, temperature, filter.time))
    if isinstance(filter, GradientDescent):
        step_size, steps, temperature = _together(dtype, temperature, filter.step_size, filter.steps)
        if is_concrete(population, step_size, temperature):
            _require_stable(population, np.asarray(step_size), np.asarray(temperature))
        return _descent(population, step_size, steps, temperature)
    raise ValueError(
        "filter must be MinNorm, Ridge, GradientFlow, GradientDescent or tau times one of them, "
        f"got {type(filter).__name__}"
    )


def _together(dtype: jnp.dtype, temperature: Array, *hyperparameters: Array) -> list[Array]:
    """The hyperparameters, then the temperature, in one shape."""
    shape = np.broadcast_shapes(*(value.shape for value in hyperparameters))
    broadcastable("temperature", temperature.shape, "the hyperparameters of the filter", shape)
    return [value.astype(dtype) for value in jnp.broadcast_arrays(*hyperparameters, temperature)]


def _mean_weight(population: _Population, temperature: Array) -> Array:
    return 1 / jnp.sqrt(1 + 2 * population.variance / temperature)


@jax.jit
def _ridge(population: _Population, penalty: Array, temperature: Array) -> Array:
    """θ − θ₁ for penalties (…), real ≥ 0 or complex off the negative axis, and temperatures (…)."""
    s, gap, noise_variance, _ = population
    scaled = _mean_weight(population, temperature)[..., None] * s
    total = scaled + penalty[..., None]
    learns = (total != 0) & ((penalty[..., None] != 0) | (s > rank_cutoff(s)))
    fraction = jnp.where(learns, scaled / jnp.where(learns, total, 1), 0)
    unexplained = noise_variance + jnp.sum(s * gap**2 * (1 - fraction), axis=-1)
    return (fraction / (1 + 2 * unexplained / temperature)[..., None]) * gap


@jax.jit
def _flow(population: _Population, time: Array, temperature: Array) -> Array:
    """θ − θ₁ for times (…) and temperatures (…): a contour of ridges for each."""
    flat = time.ravel()
    started, ended = flat > 0, jnp.isinf(flat)
    between = jnp.where(started & ~ended, flat, 1)
    alone = rational.Plan(between, jnp.ones_like(between), jnp.arange(flat.size))

    def one(at: tuple[Array, Array, Array]) -> Array:
        penalties, weights, temperature = at
        return (weights @ _ridge(population, penalties, temperature)).real

    ridges = rational.flow_ridges(between, alone)
    batch = max(1, 2**20 // (population.gap.size * ridges.penalties.shape[1]))
    flowed = jax.lax.map(one, (ridges.penalties, ridges.weights, temperature.ravel()), batch_size=batch)
    arrived = _ridge(population, jnp.zeros_like(flat), temperature.ravel())
    moved = jnp.where(ended[:, None], arrived, jnp.where(started[:, None], flowed, 0))
    return moved.reshape(*time.shape, population.gap.size)


@jax.jit
def _descent(population: _Population, step_size: Array, steps: Array, temperature: Array) -> Array:
    """The iteration θ ← θ + η(E w x r − Σ_w(θ − θ₁)), each entry of (…) for its own number of steps."""
    s, gap, _, variance = population
    a = s * gap
    damped = 1 / (1 + 2 * variance / temperature)[..., None]
    rate = step_size[..., None] * jnp.sqrt(damped)
    deflation = _deflation(damped, variance)

    def step(index: Array, moved: Array) -> Array:
        along = jnp.sum(a * moved, axis=-1, keepdims=True)
        pull = damped * a - (s * moved - deflation * along * a)
        return jnp.where(index < steps[..., None], moved + rate * pull, moved)

    start = jnp.zeros((*steps.shape, gap.size), gap.dtype)
    return jax.lax.fori_loop(0, jnp.max(steps).astype(int), step, start)


def _require_stable(population: _Population, step_size: np.ndarray, temperature: np.ndarray) -> None:
    """ηs_max < 2. By Haynsworth's inertia formula Σ/1 − k aaᵀ has #(s > m) + [f > 0] − 1 eigenvalues above m."""
    s, gap, _, variance = (np.asarray(value) for value in population)
    damped = 1 / (1 + 2 * variance / temperature)[..., None]
    limit = 2 / (step_size[..., None] * np.sqrt(damped))
    deflation = np.asarray(_deflation(jnp.asarray(damped), jnp.asarray(variance)))[..., 0]
    distance = np.where(s == limit, np.finfo(s.dtype).tiny, s - limit)
    inside = 1 - deflation * np.sum((s * gap) ** 2 / distance, axis=-1) > 0
    above = np.sum(s >= limit, axis=-1) + inside - 1
    if (above > 0).any():
        safe = 2 / (np.sqrt(damped) * s.max()).max()
        raise ValueError(
            f"step_size must be below 2/s_max of the weighted covariance (below {safe:.6g} always is), "
            f"got {step_size[above > 0].max():.6g}"
        )


# ------------------------------------------------------------------------------------------ E2: against the best


class Optimum(NamedTuple):
    """The best a method can do, R_ft + κR_pre at its least, and where; NaN for what the method does not have."""

    total: Array
    """R_ft + κR_pre."""
    finetune: Array
    pretrain: Array
    regularization: Array
    """Time t or penalty λ."""
    temperature: Array
    tau: Array


def best_of_each_method(problem: TwoTaskProblem, weight: ArrayLike = 1.0) -> dict[str, Optimum]:
    """The least R_ft + κR_pre of every method in the population, against averaging and the floor (docs, F3, E2; ours).

    "averaging" is θ₁ + τΔ; "early stopping" (t) and "ridge" (λ) are without weights, "flow" (t, T) and
    "flow + ridge" (λ, T) with them, each also "+ averaging" (τ); "floor" is the Pareto optimum, which knows Σ₁ and
    both tasks. `weight` κ ≥ 0. Hyperparameters are searched on a logarithmic scale, t and λ over twelve decades, T over
    eight around v and at ∞, where weighting does not help. By the formula of `trajectory`, FLOW + ridge is one of
    the ensembles of ridge, and never beats the best of them.

    Raises ValueError for a random shift or a negative weight.

    >>> from linfit import FixedShift, TwoTaskProblem
    >>> problem = TwoTaskProblem([1.0, 2.0], [1.0, 1.0], FixedShift([1.0, 1.0]), noise_std=0.0)
    >>> best = best_of_each_method(problem)
    >>> [round(float(best[name].total), 4) for name in ("averaging", "flow", "floor")]
    [1.2, 1.2, 1.1667]
    """
    weight = non_negative("weight", weight, ndim=0)
    gap = _fixed_gap(problem)
    nothing, unweighted = jnp.full((), jnp.nan, gap.dtype), jnp.full(1, jnp.inf, gap.dtype)
    floor = pareto(problem, weight)
    averaging = _entry(_tuned(problem, weight, MinNorm, unweighted, True), 0)
    best = {
        "averaging": averaging._replace(temperature=nothing),
        "floor": Optimum(floor.finetune + weight * floor.pretrain, *floor, nothing, nothing, nothing),
    }
    for (plain, weighted), (family, averaged) in SEARCHES.items():
        optima = _over_temperatures(problem, weight, family, averaged)
        best[plain], best[weighted] = _entry(optima, -1), _entry(optima, int(jnp.argmin(optima.total)))
    return best


SEARCHES: dict[tuple[str, str], tuple[Callable[..., Filter], bool]] = {
    ("early stopping", "flow"): (GradientFlow, False),
    ("early stopping + averaging", "flow + averaging"): (GradientFlow, True),
    ("ridge", "flow + ridge"): (Ridge, False),
    ("ridge + averaging", "flow + ridge + averaging"): (Ridge, True),
}
"""Names without and with weights, the fine-tuner, and whether it is averaged with θ₁."""


def _entry(optima: Optimum, index: int) -> Optimum:
    return Optimum(*(field[index] for field in optima))


def _fixed_gap(problem: TwoTaskProblem) -> Array:
    gap = problem.gap_mean
    if problem.gap_covariance is not None or gap is None:
        raise ValueError(
            "shift must be a linfit.FixedShift: FLOW's weights depend on the task at hand, got RandomShift"
        )
    return gap


TEMPERATURES, ZOOMS = 33, 4


def _over_temperatures(
    problem: TwoTaskProblem, weight: Array, family: Callable[..., Filter], averaged: bool
) -> Optimum:
    """Optima at temperatures (m,) that close in on the best of them; the last is T = ∞."""
    variance = residual_variance(problem.finetune_covariance, _fixed_gap(problem), problem.noise_std)
    low, high = jnp.log(variance * 1e-4), jnp.log(variance * 1e4)
    for _ in range(ZOOMS):
        grid = jnp.linspace(low, high, TEMPERATURES)
        temperatures = jnp.append(jnp.exp(grid), jnp.inf)
        optima = _tuned(problem, weight, family, temperatures, averaged)
        middle, spacing = grid[jnp.argmin(optima.total[:-1])], grid[1] - grid[0]
        low, high = jnp.maximum(middle - spacing, low), jnp.minimum(middle + spacing, high)
    return optima


@partial(jax.jit, static_argnames="family")
def _tuned(
    problem: TwoTaskProblem, weight: Array, family: Callable[..., Filter], temperatures: Array, averaged: bool
) -> Optimum:
    """The best t, λ (nothing for MinNorm) and, if averaged, τ at each of the temperatures (m,)."""
    gap, finetune, pretrain = _fixed_gap(problem), problem.finetune_covariance, problem.pretrain_covariance
    population, vectors = _population(finetune, gap, problem.noise_std)
    u = jnp.zeros_like(gap) if problem.pretrain_error is None else problem.pretrain_error
    largest = jnp.max(population.eigenvalues)

    def risks(filter: Filter, temperature: Array) -> tuple[Array, Array, Array]:
        """R_ft, R_pre, and τ: the vertex of the quadratic R_ft + κR_pre along θ − θ₁, or 1."""
        moved = _moved(population, filter, temperature)
        moved = moved if vectors is None else moved @ vectors.T
        slope = moved @ (finetune.apply(gap) - weight * pretrain.apply(u))
        curvature = jnp.sum(moved * (finetune.apply(moved) + weight * pretrain.apply(moved)), axis=-1)
        vertex = jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), 0)
        tau = jnp.where(averaged, vertex, 1)
        left, away = tau[..., None] * moved - gap, tau[..., None] * moved + u
        return jnp.sum(left * finetune.apply(left), axis=-1), jnp.sum(away * pretrain.apply(away), axis=-1), tau

    def total(filter: Filter, temperature: Array) -> Array:
        on_finetune, on_pretrain, _ = risks(filter, temperature)
        return on_finetune + weight * on_pretrain

    def best(temperature: Array) -> Optimum:
        value = jnp.full_like(temperature, jnp.nan)
        if family is not MinNorm:
            scale = largest * _mean_weight(population, temperature)
            unit = 1 / scale if family is GradientFlow else scale
            value = minimise_over_logarithm(
                lambda values: total(family(values), temperature), 1e-6 * unit, 1e6 * unit
            ).argument
        on_finetune, on_pretrain, tau = risks(MinNorm() if family is MinNorm else family(value), temperature)
        return Optimum(on_finetune + weight * on_pretrain, on_finetune, on_pretrain, value, temperature, tau)

    return jax.lax.map(best, temperatures)


# --------------------------------------------------------------------------------- F6: Theorem 7.2 of paper 2502.02797
#
# The paper's setting: e = θ₁* − θ₂* = −δ, ē = e/‖e‖, ē⊥ a unit vector orthogonal to it; Σ₂ = Σ̃ = I + ρ(ēē⊥ᵀ + ē⊥ēᵀ),
# Σ₁ = Σ ⪰ I, no noise, population gradient descent on the loss without ½ from θ₁ = θ₁*. All of it happens in the plane
# of ē and ē⊥: a position (x, y) stands for θ = θ₂* + x·e + y·‖e‖·ē⊥. Training starts at (1, 0) and is to end at (0, 0).
# By F2 with v = ‖e‖², Σ_w = μ(I − Q), μ² = d(‖e‖²), so that the step η = 1/(2μ) gives e_K = Q^K e.


def temperature_from_beta(beta: ArrayLike, rho: ArrayLike, distance: ArrayLike = 1.0) -> Array:
    """T = 2β(1 − ρ²)‖e‖²/(1 − β²ρ²), Theorem 7.2's temperature (paper 2502.02797; docs, F6).

    β in (0, 1], correlation ρ in [0, 1) and `distance` ‖e‖ > 0 broadcast; T rises with β from 0 to 2‖e‖². Raises
    ValueError outside these ranges.

    >>> temperature_from_beta(jnp.array([0.5, 1.0]), rho=0.6)
    Array([0.7032967, 2.       ], dtype=float64)
    """
    beta, rho = _beta(beta), _rho(rho)
    return 2 * beta * (1 - rho**2) * positive("distance", distance) ** 2 / (1 - (beta * rho) ** 2)


def beta_from_temperature(temperature: ArrayLike, rho: ArrayLike, distance: ArrayLike = 1.0) -> Array:
    """The β in (0, 1] of a temperature T in (0, 2‖e‖²], the inverse of `temperature_from_beta` (docs, F6).

        β = T / ((1−ρ²)‖e‖² + ((1−ρ²)²‖e‖⁴ + ρ²T²)^{1/2})

    Raises ValueError for a temperature out of the theorem's range.

    >>> float(beta_from_temperature(temperature_from_beta(0.3, 0.8, 2.0), 0.8, 2.0))
    0.3
    """
    temperature, rho = positive("temperature", temperature), _rho(rho)
    square = positive("distance", distance) ** 2
    if is_concrete(temperature, square) and not np.all(temperature <= 2 * square * (1 + 1e-12)):
        raise ValueError(f"temperature must be at most 2‖e‖² = {2 * square}, where β = 1, got {temperature}")
    half = (1 - rho**2) * square
    return temperature / (half + jnp.sqrt(half**2 + (rho * temperature) ** 2))


def _rho(rho: ArrayLike) -> Array:
    rho = non_negative("rho", rho)
    if is_concrete(rho) and not (np.asarray(rho) < 1).all():
        raise ValueError(f"rho must be in [0, 1), got {rho}")
    return rho


def _beta(beta: ArrayLike) -> Array:
    beta = positive("beta", beta)
    if is_concrete(beta) and not (np.asarray(beta) <= 1).all():
        raise ValueError(f"beta must be in (0, 1], got {beta}")
    return beta


def _steps(steps: ArrayLike) -> Array:
    steps = non_negative("steps", steps)
    if is_concrete(steps) and (np.asarray(steps) % 1).any():
        raise ValueError(f"steps must be whole numbers, got {steps}")
    return steps


def two_task_problem(
    rho: ArrayLike, pretrain: ArrayLike | None = None, *, p: int = 2, distance: ArrayLike = 1.0
) -> TwoTaskProblem:
    """The setting of Theorem 7.2 as a problem (paper 2502.02797; docs, F6): ē and ē⊥ are the first two axes.

    `rho` is the correlation in Σ₂ = I + ρ(ēē⊥ᵀ + ē⊥ēᵀ), (p, p); `pretrain` the block (2, 2) of Σ₁ on ē and ē⊥, the
    identity by default; beyond it Σ₁ is the identity. δ = −‖e‖ē. No noise. Raises ValueError for ρ outside [0, 1),
    p < 2, or a block that is not Σ₁ ⪰ I.

    >>> problem = two_task_problem(0.5, [[2.0, 0.0], [0.0, 1.0]], p=3)
    >>> problem.finetune_covariance.matrix
    Array([[1. , 0.5, 0. ],
           [0.5, 1. , 0. ],
           [0. , 0. , 1. ]], dtype=float64)
    """
    rho, block = _rho(rho), _block(pretrain)
    p = count("p", p, minimum=2)
    flat = jnp.eye(p, dtype=block.dtype)
    finetune = flat.at[0, 1].set(rho).at[1, 0].set(rho)
    shift = -positive("distance", distance, ndim=0) * flat[0]
    return TwoTaskProblem(flat.at[:2, :2].set(block), finetune, FixedShift(shift), noise_std=0.0)


def _block(pretrain: ArrayLike | None) -> Array:
    block = real_array("pretrain", jnp.eye(2) if pretrain is None else pretrain)
    if block.shape != (2, 2):
        raise ValueError(f"pretrain must be the block (2, 2) of Σ₁ on ē and ē⊥, got shape {block.shape}")
    if is_concrete(block):
        host = np.asarray(block)
        if abs(host[0, 1] - host[1, 0]) > 1e-6 * abs(host).max():
            raise ValueError("pretrain must be symmetric")
        smallest = np.linalg.eigvalsh(host)[0]
        if smallest < 1 - 1e-6:
            raise ValueError(f"pretrain must be Σ₁ ⪰ I, got eigenvalue {smallest:.3g}")
    return block


# Σ̃ has eigenvectors ē ± ē⊥ with eigenvalues 1 ± ρ.
def vanilla_iterates(rho: ArrayLike, steps: ArrayLike, step_size: ArrayLike = 0.5) -> Array:
    """Positions (…, 2) after K steps without weights, θ_K = θ₂* + (I − 2ηΣ̃)^K e (paper 2502.02797, §7; docs, F6).

    ρ, K and η broadcast. η is the paper's, for the loss without ½: at η = ½ the position is ρ^K(1, 0) for even K and
    ρ^K(0, −1) for odd. Raises ValueError for ρ outside [0, 1), K that is not a whole number ≥ 0, or an unstable η.

    >>> vanilla_iterates(0.5, [0, 1, 2])
    Array([[ 1.  ,  0.  ],
           [ 0.  , -0.5 ],
           [ 0.25,  0.  ]], dtype=float64)
    """
    rho, steps, step_size = _rho(rho), _steps(steps), positive("step_size", step_size)
    if is_concrete(rho, step_size) and not (np.asarray(step_size * (1 + rho)) < 1).all():
        raise ValueError(f"step_size must be below 1/(1 + rho) = {float(1 / (1 + rho.max())):.6g}, got {step_size}")
    fast, slow = (1 - 2 * step_size * (1 + rho)) ** steps, (1 - 2 * step_size * (1 - rho)) ** steps
    return jnp.stack(jnp.broadcast_arrays((fast + slow) / 2, (fast - slow) / 2), axis=-1)


def iteration_matrix(rho: ArrayLike, beta: ArrayLike) -> Array:
    """Q (…, 2, 2) on the plane of ē and ē⊥, with Σ_w = μ(I − Q) (paper 2502.02797, Theorem 7.2; docs, F6).

        Q = (1−μ²) ēēᵀ + ρ²(1−μ²) ē⊥ē⊥ᵀ − ρμ² (ēē⊥ᵀ + ē⊥ēᵀ),   μ² = β(1−ρ²)/((1+β)(1−βρ²))

    >>> jnp.linalg.eigvalsh(iteration_matrix(0.5, 0.5)).round(4)          # λ₂ and λ₁
    Array([0.1429, 0.75  ], dtype=float64)
    """
    rho, beta = jnp.broadcast_arrays(_rho(rho), _beta(beta))
    square = beta * (1 - rho**2) / ((1 + beta) * (1 - beta * rho**2))
    corner = -rho * square
    rows = [jnp.stack([1 - square, corner], axis=-1), jnp.stack([corner, rho**2 * (1 - square)], axis=-1)]
    return jnp.stack(rows, axis=-2)


def stalled_direction(rho: ArrayLike, beta: ArrayLike) -> Array:
    """(1, −βρ): the top eigenvector e − βρ‖e‖ē⊥ of Q, along which learning is stalled (paper 2502.02797; docs, F6).

    Its eigenvalue λ₁ = (1 + βρ²)/(1 + β) is all that is left after many steps.

    >>> stalled_direction(0.5, [0.5, 1.0])
    Array([[ 1.  , -0.25],
           [ 1.  , -0.5 ]], dtype=float64)
    """
    rho, beta = jnp.broadcast_arrays(_rho(rho), _beta(beta))
    return jnp.stack([jnp.ones_like(rho), -beta * rho], axis=-1)


def flow_iterates(rho: ArrayLike, beta: ArrayLike, steps: ArrayLike) -> Array:
    """Positions (…, 2) after K steps of FLOW, η = 1/(2μ) (paper 2502.02797, Theorem 7.2, eq. (14); docs, F6).

        θ_K = θ₂* + [(λ₁^K + λ₂^K β²ρ²)/(1+β²ρ²)] e − βρ[(λ₁^K − λ₂^K)/(1+β²ρ²)] ‖e‖ē⊥,
        λ₁ = (1+βρ²)/(1+β),   λ₂ = ρ²(1−β)/(1−βρ²),   T as in `temperature_from_beta`

    ρ in [0, 1), β in (0, 1] and whole K ≥ 0 broadcast. η is the paper's, for the loss without ½; this one equals
    weights normalised to mean one and η = ½. Raises ValueError outside these ranges.

    >>> flow_iterates(0.5, 0.5, [0, 1, 2]).round(4)
    Array([[ 1.    , -0.    ],
           [ 0.7143, -0.1429],
           [ 0.5306, -0.1276]], dtype=float64)
    """
    rho, beta, steps = _rho(rho), _beta(beta), _steps(steps)
    top = ((1 + beta * rho**2) / (1 + beta)) ** steps
    low = (rho**2 * (1 - beta) / (1 - beta * rho**2)) ** steps
    square = (beta * rho) ** 2
    along, across = (top + low * square) / (1 + square), -beta * rho * (top - low) / (1 + square)
    return jnp.stack(jnp.broadcast_arrays(along, across), axis=-1)


class Errors(NamedTuple):
    """The paper's err₁ and err₂, in units of ‖e‖²."""

    pretrain: Array
    """err₁ = ‖θ−θ₁*‖²_Σ."""
    finetune: Array
    """err₂ = ‖θ−θ₂*‖²_Σ̃."""

    @property
    def total(self) -> Array:
        """err_tot."""
        return self.pretrain + self.finetune


def errors(position: ArrayLike, rho: ArrayLike, pretrain: ArrayLike | None = None) -> Errors:
    """Both errors at positions (…, 2) in the plane, in units of ‖e‖² (paper 2502.02797, §7; docs, F6).

    `pretrain` is the block (2, 2) of Σ₁ on ē and ē⊥, the identity by default; ρ (…) broadcasts.

    >>> errors([1.0, 0.0], rho=0.5, pretrain=[[3.0, 1.0], [1.0, 2.0]])
    Errors(pretrain=Array(0., dtype=float64), finetune=Array(1., dtype=float64))
    """
    position, rho, block = real_array("position", position), _rho(rho), _block(pretrain)
    same_size("position (last axis)", position.shape[-1], "the plane", 2)
    x, y = position[..., 0], position[..., 1]
    moved = x - 1
    return Errors(
        *jnp.broadcast_arrays(
            block[0, 0] * moved**2 + 2 * block[0, 1] * moved * y + block[1, 1] * y**2,
            x**2 + y**2 + 2 * rho * x * y,
        )
    )


def best_averaging(pretrain: ArrayLike | None = None) -> Array:
    """min_ω err_tot(θ₂* + ωe) = s/(s+1) in units of ‖e‖², s = ēᵀΣ₁ē, at ω = s/(s+1) (paper 2502.02797, §7; docs, F6).

    >>> best_averaging([[3.0, 0.0], [0.0, 1.0]])
    Array(0.75, dtype=float64)
    """
    s = _block(pretrain)[0, 0]
    return s / (s + 1)


class BestFlow(NamedTuple):
    """The least err_tot of FLOW, in units of ‖e‖², and where."""

    total: Array
    beta: Array
    """0 in the limit K → ∞."""
    steps: Array
    """K; ∞ where FLOW comes arbitrarily close to the best averaging but never below."""


# For K → ∞ with Kβ = const the position tends to (λ₁^K, 0): averaging with any ω. err_tot is convex, and its slope
# along y at the best averaging is 2(ρs − c)/(s + 1), s = ēᵀΣ₁ē, c = ēᵀΣ₁ē⊥; FLOW has y ≤ 0. So it goes below the best
# averaging if and only if c < ρs.
def best_flow(rho: ArrayLike, pretrain: ArrayLike | None = None, max_steps: int = 64) -> BestFlow:
    """The least err_tot of FLOW over β in (0, 1] and 1 ≤ K ≤ max_steps (docs, F6; Remark 7.6 of paper 2502.02797).

    The paper's Remark 7.6: it is at least as good as the best averaging. Ours: it is better **if and only if**
    ēᵀΣ₁ē⊥ < ρ ēᵀΣ₁ē; otherwise averaging is its limit for K → ∞, returned with K = ∞ and β = 0. ρ is a scalar.

    >>> best = best_flow(0.76, [[2.7, 0.0], [0.0, 1.0]])
    >>> bool(best.total < best_averaging([[2.7, 0.0], [0.0, 1.0]])), int(best.steps)
    (True, 1)
    >>> best_flow(0.3, [[2.0, 1.0], [1.0, 2.0]]).steps
    Array(inf, dtype=float64)
    """
    rho, block = _rho(rho), _block(pretrain)
    steps = jnp.arange(1, count("max_steps", max_steps) + 1, dtype=block.dtype)
    return _best_flow(jnp.asarray(rho, block.dtype), block, steps)


@jax.jit
def _best_flow(rho: Array, block: Array, steps: Array) -> BestFlow:
    def after(steps: Array) -> BestFlow:
        found = minimise_over_logarithm(
            lambda beta: errors(flow_iterates(rho, beta, steps), rho, block).total, 1e-4, jnp.ones((), block.dtype)
        )
        return BestFlow(found.value, found.argument, steps)

    finite = jax.vmap(after)(steps)
    limit = BestFlow(best_averaging(block), jnp.zeros((), block.dtype), jnp.asarray(jnp.inf, block.dtype))
    best = jax.tree.map(lambda leaf: leaf[jnp.argmin(finite.total)], finite)
    return jax.tree.map(lambda a, b: jnp.where(best.total < limit.total, a, b), best, limit)


# ------------------------------------------------------------------------------------------ F1: Proposition 4.3


def entropic_objective(probabilities: ArrayLike, losses: ArrayLike, temperature: ArrayLike) -> Array:
    """Σπ_iℓ_i + TΣπ_i log π_i (…), least over the simplex at π ∝ e^{−ℓ/T} (paper 2502.02797, Prop. 4.3; docs, F1).

    The least value is −T log Σ e^{−ℓ_i/T}. At −T the same expression is greatest at π ∝ e^{+ℓ/T}, the weights of
    distributionally robust optimisation. `probabilities` π ≥ 0 and `losses` ℓ are (…, n); 0 log 0 = 0.

    >>> losses = jnp.array([0.0, 1.0, 3.0])
    >>> entropic_objective(jax.nn.softmax(-losses / 0.5), losses, 0.5), -0.5 * jnp.log(jnp.exp(-losses / 0.5).sum())
    (Array(-0.06455445, dtype=float64), Array(-0.06455445, dtype=float64))
    """
    probabilities, losses = non_negative("probabilities", probabilities), real_array("losses", losses)
    same_size("losses", losses.shape[-1], "probabilities", probabilities.shape[-1])
    temperature = real_array("temperature", temperature)
    entropy = jnp.sum(jax.scipy.special.xlogy(probabilities, probabilities), axis=-1)
    return jnp.sum(probabilities * losses, axis=-1) + temperature * entropy
