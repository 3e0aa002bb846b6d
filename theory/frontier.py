"""What any fine-tuner could do, and which fine-tuners are an ensemble in disguise (docs, E1–E2; ours).

The Pareto frontier. Any weights θ have two risks, ‖θ−θ₁*‖²_{Σ₁} and ‖θ−θ₂*‖²_{Σ₂}. Both are convex, so the weights that
no others beat in both are the minimisers of R_ft + κR_pre, κ ∈ [0, ∞]:

    κΣ₁(θ−θ₁*) + Σ₂(θ−θ₂*) = 0   ⇔   θ_κ = θ₁* + (κΣ₁+Σ₂)⁻¹Σ₂δ.

A method would have to know Σ₁ (the exact Fisher of EWC, all of the data of replay), Σ₂ and δ to get there. Both
covariances become diagonal together: with M = Σ₁+Σ₂ and an orthonormal eigenbasis of M^{-1/2}Σ₂M^{-1/2}, eigenvalues
μ ∈ [0, 1], Σ₂ turns into diag(μ) and Σ₁ into diag(1−μ), singular covariances included. In that basis θ_κ has learned
the share g = μ/(κ(1−μ)+μ) of each component a of δ, whatever δ is, so that with m = E a²

    R_pre(κ) = Σ m (1−μ) g²,      R_ft(κ) = Σ m μ (1−g)².

Equivalent coefficients. In the population, Gaussian features, r = y − xᵀθ₁ the residual of the pretrained model,
q = ‖Δ‖²_{Σ₂} its signal and v = q + σ² its variance, x given r is ΣΔ·r/v plus something independent of r. Hence

- targets xᵀθ₁ + ψ(r) have the least-squares solution θ₁ + τΔ with τ = E rψ(r)/v, which is E ψ'(r) (Stein);
- weights w(r) have the solution θ₁ + τΔ with τ = v m/(σ² + q m), m = E w r²/(v E w), the factor by which weighting
  changes the variance of the residuals (selection on the dependent variable).

FLOW, S3FT, label smoothing towards own predictions, clipped targets, dropping the hard samples: all of them lie on the
segment [θ₁, θ₂*], and one number says where.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optimistix
from jax import Array
from jax.scipy.special import erf, erfc
from jax.scipy.stats import norm

from linfit import FixedShift, Pair, TwoTaskProblem
from linfit.covariance import Diagonal, trace_of_product
from linfit.internal.checks import ArrayLike, broadcastable, non_negative, positive, real_array
from linfit.internal.linear_algebra import rank_cutoff

__all__ = [
    "clipping_coefficient", "distance", "pareto", "pareto_weights", "population_risks", "smooth_ratio",
    "smoothing_coefficient", "trimming_ratio", "weight_at", "weighting_coefficient",
]  # fmt: skip

_DECADES = 15.0
"""`weight_at` looks for κ this many decades on either side of trΣ₂/trΣ₁; beyond, κ is 0 or ∞ to all digits."""


class _Modes(NamedTuple):
    """The directions in which Σ₁ and Σ₂ are both diagonal."""

    share: Array
    """μ (k,), Σ₂'s share of Σ₁+Σ₂."""
    signal: Array
    """m (k,), mean square of the shift along each, in the metric Σ₁+Σ₂."""
    basis: Array | None
    """(p, k): a component a is the vector basis @ a; None where basis = diag(Σ₁+Σ₂)^{-1/2}."""


def pareto(problem: TwoTaskProblem, weight: ArrayLike) -> Pair[Array]:
    """Risks of θ_κ = θ₁* + (κΣ₁+Σ₂)⁻¹Σ₂δ, below which there is nothing (docs, E2; ours).

    `weight` is κ ≥ 0, of any shape, ∞ allowed: κ = 0 is θ₂*, κ = ∞ is θ₁*. For a random shift the risks are averaged
    over it, and no method's expected risks are below. The pretraining error u and the noise do not enter. Diagonal
    covariances cost O(p) per κ, others two eigendecompositions. Raises ValueError for a negative or NaN κ.

    >>> from linfit import FixedShift, TwoTaskProblem
    >>> from theory.frontier import pareto
    >>> problem = TwoTaskProblem([1.0, 1.0], [1.0, 3.0], FixedShift([2.0, 0.0]), noise_std=0.5)
    >>> pareto(problem, [0.0, 1.0, 3.0])
    Pair(finetune=Array([0.  , 1.  , 2.25], dtype=float64), pretrain=Array([4.  , 1.  , 0.25], dtype=float64))
    """
    return _risks(_modes(problem), non_negative("weight", weight, finite=False))


def pareto_weights(problem: TwoTaskProblem, weight: ArrayLike) -> Array:
    """θ_κ − θ₁* = (κΣ₁+Σ₂)⁻¹Σ₂δ (…, p) for κ of shape (…); the shift must be fixed (docs, E2; ours).

    Directions that neither task sees stay where they are. Raises ValueError for a random shift, a negative or NaN κ.

    >>> from linfit import FixedShift, TwoTaskProblem
    >>> from theory.frontier import pareto_weights
    >>> problem = TwoTaskProblem([1.0, 1.0], [1.0, 3.0], FixedShift([2.0, 2.0]), noise_std=0.5)
    >>> pareto_weights(problem, 1.0)
    Array([1. , 1.5], dtype=float64)
    """
    if not isinstance(problem.shift, FixedShift):
        raise ValueError("shift must be linfit.FixedShift for weights, got RandomShift; pareto averages over it")
    weight = non_negative("weight", weight, finite=False)
    modes, delta = _modes(problem), problem.shift.vector
    learned, _ = _learned_and_missed(modes, weight)
    if modes.basis is None:
        return learned * delta
    return (learned * (_metric(problem, delta) @ modes.basis)) @ modes.basis.T


def weight_at(problem: TwoTaskProblem, finetune: ArrayLike) -> Array:
    """κ at which the frontier has a given fine-tuning risk R_ft ≥ 0, of any shape (docs, E2; ours).

    ∞ where R_ft is that of θ₁* or more. The frontier's slope there is dR_pre/dR_ft = −1/κ. Differentiable. Raises
    ValueError for a negative or NaN risk.

    >>> from linfit import FixedShift, TwoTaskProblem
    >>> from theory.frontier import weight_at
    >>> problem = TwoTaskProblem([1.0, 1.0], [1.0, 3.0], FixedShift([2.0, 0.0]), noise_std=0.5)
    >>> [round(float(kappa), 9) for kappa in weight_at(problem, [1.0, 2.25, 4.0])]
    [1.0, 3.0, inf]
    """
    finetune = non_negative("finetune", finetune)
    scale = jnp.log(problem.finetune_covariance.diagonal().sum() / problem.pretrain_covariance.diagonal().sum())
    return _weight_at(_modes(problem), scale, finetune)


def distance(problem: TwoTaskProblem, finetune: ArrayLike, pretrain: ArrayLike) -> Array:
    """Excess forgetting at equal fine-tuning risk: R_pre minus the frontier's at the same R_ft (docs, E2; ours).

    `finetune` and `pretrain` are a method's R_ft and R_pre ≥ 0, of shapes that broadcast. Never negative for risks that
    weights can have (for a random shift: risks averaged over it). Raises ValueError for negative or NaN risks.

    >>> from linfit import FixedShift, TwoTaskProblem
    >>> from theory.frontier import distance
    >>> problem = TwoTaskProblem([1.0, 1.0], [1.0, 3.0], FixedShift([2.0, 0.0]), noise_std=0.5)
    >>> round(float(distance(problem, 2.25, 0.75)), 9)
    0.5
    """
    finetune, pretrain = non_negative("finetune", finetune), non_negative("pretrain", pretrain)
    broadcastable("pretrain", pretrain.shape, "finetune", finetune.shape)
    return pretrain - pareto(problem, weight_at(problem, finetune)).pretrain


def _metric(problem: TwoTaskProblem, vectors: Array) -> Array:
    return problem.pretrain_covariance.apply(vectors) + problem.finetune_covariance.apply(vectors)


def _modes(problem: TwoTaskProblem) -> _Modes:
    pretrain, finetune, shift = problem.pretrain_covariance, problem.finetune_covariance, problem.shift
    if isinstance(pretrain, Diagonal) and isinstance(finetune, Diagonal):
        metric = pretrain.eigenvalues + finetune.eigenvalues
        share = jnp.where(metric > 0, finetune.eigenvalues / jnp.where(metric > 0, metric, 1), 0)
        second = shift.vector**2 if isinstance(shift, FixedShift) else shift.covariance.diagonal()
        return _Modes(share, metric * second, None)
    # basis = M^{-1/2}V on the range of M, so that basisᵀ M basis = I and basisᵀ Σ₂ basis = diag(μ)
    eigenvalues, vectors = jnp.linalg.eigh(_metric(problem, jnp.eye(problem.p, dtype=finetune.dtype)))
    kept = eigenvalues > rank_cutoff(eigenvalues)
    whiten = vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, eigenvalues, 1)), 0)
    share, rotation = jnp.linalg.eigh(whiten.T @ finetune.apply(whiten.T).T)
    basis = whiten @ rotation
    moved = _metric(problem, basis.T)  # rows: a = basisᵀ M δ
    signal = (moved @ shift.vector) ** 2 if isinstance(shift, FixedShift) else shift.covariance.squared_norm(moved)
    return _Modes(jnp.clip(share, 0, 1), signal, basis)


def _learned_and_missed(modes: _Modes, weight: Array) -> tuple[Array, Array]:
    """g = μ/(κ(1−μ)+μ), (…, k), 0 where μ = 0, and 1 − g, without cancellation at κ → 0."""
    seen, penalised = modes.share > 0, jnp.where(modes.share < 1, weight[..., None] * (1 - modes.share), 0)  # ∞·0 = 0
    learned = jnp.where(seen, modes.share / jnp.where(seen, penalised + modes.share, 1), 0)
    finite = jnp.isfinite(penalised)
    penalised = jnp.where(finite, penalised, 0)
    total = penalised + modes.share
    return learned, jnp.where(finite, penalised / jnp.where(total > 0, total, 1), 1)


def _risks(modes: _Modes, weight: Array) -> Pair[Array]:
    learned, missed = _learned_and_missed(modes, weight)
    return Pair(
        jnp.sum(modes.signal * modes.share * missed**2, axis=-1),
        jnp.sum(modes.signal * (1 - modes.share) * learned**2, axis=-1),
    )


@jax.jit
def _weight_at(modes: _Modes, scale: Array, finetune: Array) -> Array:
    reach = _DECADES * jnp.log(10.0)
    lowest, highest = scale - reach, scale + reach
    bounds = [_risks(modes, jnp.exp(end)).finetune for end in (lowest, highest)]

    def solve(target: Array) -> Array:
        def gap(log_weight: Array, target: Array) -> Array:
            return _risks(modes, jnp.exp(log_weight)).finetune - target

        # R_ft rises with κ; to look at both ends (flip) would fail where rounding puts a root beyond them
        solver: optimistix.AbstractRootFinder = optimistix.Bisection(1e-14, 1e-14, flip=False)  # type: ignore[call-arg]
        settings: dict[str, Any] = {"options": {"lower": lowest, "upper": highest}, "max_steps": 128, "throw": False}
        return jnp.exp(optimistix.root_find(gap, solver, scale, jnp.clip(target, *bounds), **settings).value)

    kappa = jnp.vectorize(solve)(finetune)
    return jnp.where(finetune >= bounds[1], jnp.inf, jnp.where(finetune <= bounds[0], 0, kappa))


def weighting_coefficient(variance_ratio: ArrayLike, signal: ArrayLike, noise_std: ArrayLike) -> Array:
    """Equivalent τ of weighting the samples by any function of the pretrained residual (docs, E1; ours).

        τ = v m/(σ² + q m),   v = q + σ²,   m = E w r²/(v E w)

    Args:
        variance_ratio: m > 0, by which weighting changes the variance of the residuals.
        signal: q = ‖Δ‖²_Σ > 0.
        noise_std: σ ≥ 0; all three broadcast; ValueError outside these ranges.

    Favouring easy samples (m < 1) is averaging, favouring hard ones (m > 1) extrapolation; without noise τ = 1, weights
    cannot move the solution. FLOW has m = 1/(1+2v/T), and its τ needs Gaussian noise only: weighting by e^{−(s+ε)²/T}
    at given s = xᵀΔ makes the mean residual s/(1+2σ²/T), whatever the law of x.

    >>> from theory.frontier import weighting_coefficient
    >>> v, T = 2.0 + 0.5**2, 0.8
    >>> round(float(weighting_coefficient(1 / (1 + 2 * v / T), 2.0, noise_std=0.5)), 9)        # FLOW: 1/(1+2σ²/T)
    0.615384615
    """
    ratio, signal = positive("variance_ratio", variance_ratio), positive("signal", signal)
    noise_variance = non_negative("noise_std", noise_std) ** 2
    return (signal + noise_variance) * ratio / (noise_variance + signal * ratio)


def trimming_ratio(threshold: ArrayLike, residual_std: ArrayLike) -> Array:
    """m of dropping the samples that the pretrained model misses by more than c (docs, E1; ours).

        m = E[r² | |r| ≤ c]/v = 1 − 2zφ(z)/(2Φ(z)−1),   z = c/√v

    `threshold` c > 0 in units of y, `residual_std` √v > 0; they broadcast. For `weighting_coefficient`.

    >>> from theory.frontier import trimming_ratio
    >>> round(float(trimming_ratio(1.0, 1.0)), 6)
    0.291125
    """
    z = _standardised(threshold, residual_std)
    # 2Φ(z)−1 = erf(z/√2); below z = 10⁻³ the series z²/3 is exact to 10⁻⁷ and the difference would cancel
    small = z < 1e-3
    safe = jnp.where(small, 1, z)
    ratio = 1 - 2 * safe * norm.pdf(safe) / erf(safe / jnp.sqrt(2.0).astype(safe.dtype))
    return jnp.where(small, z**2 / 3, ratio)


def smooth_ratio(temperature: ArrayLike, residual_std: ArrayLike) -> Array:
    """m of the weights 1/(1 + r²/T), `linfit.weighting.smooth_weights` of squared residuals (docs, E1; ours).

        m = T(1−Z)/(vZ),   Z = E w = √(πa) e^a erfc(√a),   a = T/2v

    since E wr² = T(1 − E w). `temperature` T > 0 in squared units of y, `residual_std` √v > 0; they broadcast. For
    `weighting_coefficient`.

    >>> from theory.frontier import smooth_ratio
    >>> round(float(smooth_ratio(1.0, 1.0)), 6)
    0.525135
    """
    z = _standardised(jnp.sqrt(positive("temperature", temperature)), residual_std) / 2**0.5  # √a
    # Z = √π·z·erfcx(z) and 1−Z ≈ 1/2z² − 3/4z⁴ + …, where the difference would cancel
    large = z > 8
    safe, far = jnp.where(large, 1, z), jnp.where(large, z, 8)
    Z = jnp.pi**0.5 * safe * jnp.exp(safe**2) * erfc(safe)
    x = 1 / (2 * far**2)
    missed = x * (1 - x * (3 - x * (15 - x * (105 - x * (945 - 10395 * x)))))
    return jnp.where(large, missed / (x * (1 - missed)), 2 * z**2 * (1 - Z) / Z)


def clipping_coefficient(threshold: ArrayLike, residual_std: ArrayLike) -> Array:
    """Equivalent τ of targets within c of the model's own predictions, y' = xᵀθ₁ + clip(r, −c, c) (docs, E1; ours).

        τ = E ψ'(r) = P(|r| ≤ c) = 2Φ(c/√v) − 1

    `threshold` c > 0 in units of y, `residual_std` √v > 0; they broadcast. Clipping every gradient as training goes on,
    the Huber loss, is something else: dθ/dt = P(|r_t| ≤ c) Σ(θ₂*−θ), by the same lemma at each θ. Its path is that of
    plain gradient flow, at this speed with the residual of the moment, and it ends at θ₂*: that is early stopping.

    >>> from theory.frontier import clipping_coefficient
    >>> round(float(clipping_coefficient(1.0, 1.0)), 6)
    0.682689
    """
    return erf(_standardised(threshold, residual_std) / 2**0.5)


def smoothing_coefficient(smoothing: ArrayLike) -> Array:
    """Equivalent τ = 1 − α of targets (1−α)y + α xᵀθ₁: label smoothing towards own predictions (docs, E1; ours).

    Exact for any features, sample size and linear fine-tuner, because targets enter linearly. Also that of adding
    self-distillation α(xᵀθ − xᵀθ₁)² to (1−α)(xᵀθ − y)². `smoothing` α is finite, of any shape.

    >>> from theory.frontier import smoothing_coefficient
    >>> smoothing_coefficient(0.25)
    Array(0.75, dtype=float64, weak_type=True)
    """
    return 1 - real_array("smoothing", smoothing)


def _standardised(threshold: ArrayLike, residual_std: ArrayLike) -> Array:
    return positive("threshold", threshold) / positive("residual_std", residual_std)


def population_risks(problem: TwoTaskProblem, tau: ArrayLike) -> Pair[Array]:
    """Risks of θ₁ + τΔ, where a method with equivalent coefficient τ ends in the population (docs, E1; ours).

        R_ft = (1−τ)² E‖Δ‖²_{Σ₂},   R_pre = E‖u + τΔ‖²_{Σ₁}

    τ finite, of any shape. Where Σ₁ ∝ Σ₂ and u = 0 this is the frontier itself, κ = (1−τ)/τ · trΣ₂/trΣ₁.

    >>> from linfit import FixedShift, TwoTaskProblem
    >>> from theory.frontier import pareto, population_risks
    >>> problem = TwoTaskProblem([2.0, 1.0], [2.0, 1.0], FixedShift([1.0, 1.0]), noise_std=0.5)
    >>> population_risks(problem, 0.5) == pareto(problem, 1.0)
    True
    """
    tau = real_array("tau", tau)
    start, covariance, mean = problem.pretrained_risks, problem.pretrain_covariance, problem.gap_mean
    squared = cross = jnp.zeros_like(start.pretrain)
    if problem.gap_covariance is not None:
        squared += trace_of_product(problem.gap_covariance, covariance)
    if mean is not None:
        squared += covariance.squared_norm(mean)
        if problem.pretrain_error is not None:
            cross += covariance.dot(problem.pretrain_error, mean)
    return Pair((1 - tau) ** 2 * start.finetune, start.pretrain + 2 * tau * cross + tau**2 * squared)
