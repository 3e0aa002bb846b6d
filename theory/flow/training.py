"""FLOW in the population along training: any fine-tuner, and every method at its best (docs, F3, E2)."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import (
    Dense,
    Diagonal,
    Empirical,
    Filter,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Pair,
    Parabola,
    Ridge,
    TwoTaskProblem,
    excess_risks,
)
from linfit.filters import Ensemble
from linfit.internal.checks import ArrayLike, broadcastable, is_concrete, non_negative
from linfit.internal.linear_algebra import rank_cutoff
from theory import rational
from theory.flow.moments import deflation, median_temperature, residual_variance
from theory.frontier import pareto
from theory.optimum import minimise_over_logarithm

Family = Callable[..., Filter]
TEMPERATURES, ZOOMS = 33, 4
"""Points of a search over temperatures, and how often it closes in."""


class Trajectory(NamedTuple):
    """Population FLOW after fine-tuning: θ − θ₁ (…, p) and the risks (…), (…) the hyperparameters."""

    moved: Array
    risks: Pair[Array]

    @property
    def finetune(self) -> Array:
        """R_ft."""
        return self.risks.finetune

    @property
    def pretrain(self) -> Array:
        """R_pre."""
        return self.risks.pretrain

    @property
    def total(self) -> Array:
        """The paper's err_tot, R_ft + R_pre."""
        return self.finetune + self.pretrain


class _Population(NamedTuple):
    """The fine-tuning domain in the eigenbasis V (p, r) of Σ₂, None for the identity: s and VᵀΔ (r,), σ² and v."""

    eigenvalues: Array
    gap: Array
    noise_variance: Array
    variance: Array
    vectors: Array | None

    def mean_weight(self, temperature: Array) -> Array:
        """Z."""
        return 1 / jnp.sqrt(1 + 2 * self.variance / temperature)


# Ridge under the weights, (Σ_w + λ)⁻¹ E w x r, by Sherman–Morrison: with m = (ZΣ + λ)⁻¹ ZΣΔ the ridge of penalty λ/Z,
#     θ_λ − θ₁ = d(v) m / (1 − k (ΣΔ)ᵀm),   d(v)/(1 − k (ΣΔ)ᵀm) = 1/(1 + 2 v_λ/T),   v_λ = σ² + ΔᵀΣ(Δ − m):
# FLOW + ridge is ridge + averaging, damped by the variance v_λ of what ridge leaves unexplained. λ = 0 is F4. A filter
# is a sum of ridges (`theory.rational`), so the same line gives gradient flow.
def trajectory(problem: TwoTaskProblem, filter: Filter, temperature: ArrayLike | None = None) -> Trajectory:
    """FLOW in the population, for any fine-tuner (docs, F3; ours): θ − θ₁ = g(Σ_w) E w x r, and both risks.

        gradient descent  θ − θ₁ = τ[I − (I − ηΣ_w)^k]Δ   ·   gradient flow  τ[I − e^{−tΣ_w}]Δ   ·   τ as in F4
        ridge             θ − θ₁ = 1/(1 + 2v_λ/T) (Σ + λ/Z)⁻¹ΣΔ,   v_λ = σ² + ΔᵀΣ(λ/Z)(Σ + λ/Z)⁻¹Δ

    Args:
        problem: with a fixed shift. Σ₂ may be diagonal, dense or empirical; diagonal needs no matrix.
        filter: MinNorm, Ridge, GradientFlow, GradientDescent or `tau * filter`; step size and time refer to the loss
            with ½ (the paper's η is half of this step size).
        temperature: T in (0, ∞], in units of y², broadcasts against the hyperparameters; ∞ is fine-tuning without
            weights, None the median of r².

    Accuracy of gradient flow 1e-9 (float32: 1e-4), of the others rounding. Raises ValueError for a random shift, T = 0,
    a step size with ηs_max ≥ 2, s_max of Σ_w, or hyperparameters that do not broadcast.

    >>> from linfit import FixedShift, GradientDescent, TwoTaskProblem
    >>> from theory.flow import trajectory
    >>> problem = TwoTaskProblem([1.0, 1.0], [1.0, 0.5], FixedShift([1.0, 1.0]), noise_std=0.0)
    >>> trajectory(problem, GradientDescent(1.0, steps=[0, 2, 10, 400])).finetune.round(3)
    Array([1.5  , 1.146, 0.426, 0.   ], dtype=float64)
    """
    population = _population(problem)
    if temperature is None:
        temperature = median_temperature(population.variance)
    temperature = non_negative("temperature", temperature, finite=False)
    if is_concrete(temperature) and not (np.asarray(temperature) > 0).all():
        raise ValueError("temperature must be positive: at T = 0 all weights are 0 and nothing is learned; got 0")
    moved = _moved(population, filter, temperature)
    return Trajectory(moved, _risks(problem, moved))


def _population(problem: TwoTaskProblem) -> _Population:
    covariance, gap = problem.finetune_covariance, _fixed_gap(problem)
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
    noise_variance = jnp.asarray(problem.noise_std, gap.dtype) ** 2
    return _Population(eigenvalues, gap, noise_variance, noise_variance + gap**2 @ eigenvalues, vectors)


def _fixed_gap(problem: TwoTaskProblem) -> Array:
    if problem.gap_covariance is not None or problem.gap_mean is None:
        needed = "a linfit.FixedShift: FLOW's weights depend on the task at hand"
        raise ValueError(f"shift must be {needed}, got RandomShift")
    return problem.gap_mean


def _error_and_gap(problem: TwoTaskProblem) -> tuple[Array, Array]:
    """u and Δ."""
    gap = _fixed_gap(problem)
    return jnp.zeros_like(gap) if problem.pretrain_error is None else problem.pretrain_error, gap


def _risks(problem: TwoTaskProblem, moved: Array) -> Pair[Array]:
    """Both risks of θ₁ + moved; positions are relative to θ₁, where θ₁* is −u and θ₂* is Δ."""
    u, gap = _error_and_gap(problem)
    return excess_risks(moved, problem, -u, gap)


def _moved(population: _Population, filter: Filter, temperature: Array) -> Array:
    """θ − θ₁ (…, p)."""
    if isinstance(filter, Ensemble):
        moved = _moved(population, filter.filter, temperature)
        broadcastable("tau", filter.tau.shape, "filter and temperature", moved.shape[:-1])
        return filter.tau[..., None] * moved
    dtype = population.eigenvalues.dtype
    if isinstance(filter, MinNorm):
        coordinates = _ridge(population, jnp.zeros((), dtype), temperature.astype(dtype))
    elif isinstance(filter, Ridge):
        coordinates = _ridge(population, *_together(dtype, temperature, filter.penalty))
    elif isinstance(filter, GradientFlow):
        coordinates = _flow(population, *_together(dtype, temperature, filter.time))
    elif isinstance(filter, GradientDescent):
        step_size, steps, temperature = _together(dtype, temperature, filter.step_size, filter.steps)
        if is_concrete(population, step_size, temperature):
            _require_stable(population, np.asarray(step_size), np.asarray(temperature))
        coordinates = _descent(population, step_size, steps, temperature)
    else:
        known = "MinNorm, Ridge, GradientFlow, GradientDescent or tau times one of them"
        raise ValueError(f"filter must be {known}, got {type(filter).__name__}")
    return coordinates if population.vectors is None else coordinates @ population.vectors.T


def _together(dtype: jnp.dtype, temperature: Array, *hyperparameters: Array) -> list[Array]:
    """The hyperparameters, then the temperature, in one shape."""
    shape = np.broadcast_shapes(*(value.shape for value in hyperparameters))
    broadcastable("temperature", temperature.shape, "the hyperparameters of the filter", shape)
    return [value.astype(dtype) for value in jnp.broadcast_arrays(*hyperparameters, temperature)]


@jax.jit
def _ridge(population: _Population, penalty: Array, temperature: Array) -> Array:
    """In the eigenbasis, for penalties (…), real ≥ 0 or complex off the negative axis, and temperatures (…)."""
    s = population.eigenvalues
    scaled = population.mean_weight(temperature)[..., None] * s
    total = scaled + penalty[..., None]
    learns = (total != 0) & ((penalty[..., None] != 0) | (s > rank_cutoff(s)))
    fraction = jnp.where(learns, scaled / jnp.where(learns, total, 1), 0)
    unexplained = population.noise_variance + jnp.sum(s * population.gap**2 * (1 - fraction), axis=-1)
    return (fraction / (1 + 2 * unexplained / temperature)[..., None]) * population.gap


@jax.jit
def _flow(population: _Population, time: Array, temperature: Array) -> Array:
    """In the eigenbasis, for times (…) and temperatures (…): a contour of ridges for each."""
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
    s, variance = population.eigenvalues, population.variance
    a = s * population.gap
    damped = 1 / (1 + 2 * variance / temperature)[..., None]
    rate, k = step_size[..., None] * jnp.sqrt(damped), deflation(damped, variance)

    def step(index: Array, moved: Array) -> Array:
        along = jnp.sum(a * moved, axis=-1, keepdims=True)
        pull = damped * a - (s * moved - k * along * a)
        return jnp.where(index < steps[..., None], moved + rate * pull, moved)

    start = jnp.zeros((*steps.shape, a.size), a.dtype)
    return jax.lax.fori_loop(0, jnp.max(steps).astype(int), step, start)


def _require_stable(population: _Population, step_size: np.ndarray, temperature: np.ndarray) -> None:
    """ηs_max < 2. By Haynsworth's inertia formula Σ/1 − k aaᵀ has #(s > m) + [f > 0] − 1 eigenvalues above m."""
    s, gap, _, variance, _ = (np.asarray(value) for value in population)
    damped = 1 / (1 + 2 * variance / temperature)[..., None]
    limit = 2 / (step_size[..., None] * np.sqrt(damped))
    k = np.asarray(deflation(jnp.asarray(damped), jnp.asarray(variance)))[..., 0]
    distance = np.where(s == limit, np.finfo(s.dtype).tiny, s - limit)
    inside = 1 - k * np.sum((s * gap) ** 2 / distance, axis=-1) > 0
    above = np.sum(s >= limit, axis=-1) + inside - 1
    if (above > 0).any():
        allowed = f"2/s_max of the weighted covariance (below {2 / (np.sqrt(damped) * s.max()).max():.6g} always is)"
        raise ValueError(f"step_size must be below {allowed}, got {step_size[above > 0].max():.6g}")


class PopulationOptimum(NamedTuple):
    """The least R_ft + κR_pre of a method, both risks, and where: t or λ, T and τ, NaN for what it does not have."""

    total: Array
    risks: Pair[Array]
    regularization: Array
    temperature: Array
    tau: Array


def population_optima(problem: TwoTaskProblem, weight: ArrayLike = 1.0) -> dict[str, PopulationOptimum]:
    """The least R_ft + κR_pre of every method in the population, and the lower bound (docs, F3, E2; ours).

    "averaging" is θ₁ + τΔ; "early stopping" (t) and "ridge" (λ) are without weights, "flow" (t, T) and "flow + ridge"
    (λ, T) with them, each also "+ averaging" (τ); "lower bound" is the Pareto optimum, which knows Σ₁ and both tasks.
    `weight` κ ≥ 0. Hyperparameters are searched on a logarithmic scale, t and λ over twelve decades, T over eight
    around v and at ∞, where weighting does not help. By the formula of `trajectory`, FLOW + ridge is one of the
    ensembles of ridge, and never beats the best of them. Raises ValueError for a random shift or a negative weight.

    >>> from linfit import FixedShift, TwoTaskProblem
    >>> from theory.flow import population_optima
    >>> problem = TwoTaskProblem([1.0, 2.0], [1.0, 1.0], FixedShift([1.0, 1.0]), noise_std=0.0)
    >>> best = population_optima(problem)
    >>> [round(float(best[name].total), 4) for name in ("averaging", "flow", "lower bound")]
    [1.2, 1.2, 1.1667]
    """
    weight = non_negative("weight", weight, ndim=0)
    gap, bound = _fixed_gap(problem), pareto(problem, weight)
    nothing, unweighted = jnp.full((), jnp.nan, gap.dtype), jnp.full(1, jnp.inf, gap.dtype)
    averaging = jax.tree.map(jnp.squeeze, _tuned(problem, weight, MinNorm, unweighted, True))
    best = {
        "averaging": averaging._replace(temperature=nothing),
        "lower bound": PopulationOptimum(bound.finetune + weight * bound.pretrain, bound, nothing, nothing, nothing),
    }
    families: list[tuple[str, str, Family]] = [
        ("early stopping", "flow", GradientFlow),
        ("ridge", "flow + ridge", Ridge),
    ]
    for plain, weighted, family in families:
        for suffix, averaged in (("", False), (" + averaging", True)):
            optima = _over_temperatures(problem, weight, family, averaged)
            for name, index in ((plain, -1), (weighted, int(jnp.argmin(optima.total)))):
                best[name + suffix] = jax.tree.map(itemgetter(index), optima)
    return best


def _over_temperatures(problem: TwoTaskProblem, weight: Array, family: Family, averaged: bool) -> PopulationOptimum:
    """Optima at temperatures (m,) that close in on the best of them; the last is T = ∞."""
    variance = residual_variance(problem.finetune_covariance, _fixed_gap(problem), problem.noise_std)
    low, high = jnp.log(variance * 1e-4), jnp.log(variance * 1e4)
    for _ in range(ZOOMS):
        grid = jnp.linspace(low, high, TEMPERATURES)
        optima = _tuned(problem, weight, family, jnp.append(jnp.exp(grid), jnp.inf), averaged)
        middle, spacing = grid[jnp.argmin(optima.total[:-1])], grid[1] - grid[0]
        low, high = jnp.maximum(middle - spacing, low), jnp.minimum(middle + spacing, high)
    return optima


@partial(jax.jit, static_argnames="family")
def _tuned(
    problem: TwoTaskProblem, weight: Array, family: Family, temperatures: Array, averaged: bool
) -> PopulationOptimum:
    """The best t, λ (nothing for MinNorm) and, if averaged, τ at each of the temperatures (m,)."""
    population, (u, gap) = _population(problem), _error_and_gap(problem)

    def at(filter: Filter, temperature: Array) -> tuple[Array, Pair[Array], Array]:
        """R_ft + κR_pre, both risks, and τ: the best along θ − θ₁, or 1."""
        moved = _moved(population, filter, temperature)
        finetune = Parabola.of_steps(problem.finetune_covariance, -gap, moved)
        pretrain = Parabola.of_steps(problem.pretrain_covariance, u, moved)
        both = jax.tree.map(lambda a, b: a + weight * b, finetune, pretrain)
        tau = jnp.where(averaged, both.optimal_tau, 1)
        risks = _risks(problem, tau[..., None] * moved)
        return risks.finetune + weight * risks.pretrain, risks, tau

    def best(temperature: Array) -> PopulationOptimum:
        filter: Filter = MinNorm()
        value = jnp.full_like(temperature, jnp.nan)
        if family is not MinNorm:
            scale = jnp.max(population.eigenvalues) * population.mean_weight(temperature)
            unit = 1 / scale if family is GradientFlow else scale

            def objective(values: Array) -> Array:
                return at(family(values), temperature)[0]

            value = minimise_over_logarithm(objective, 1e-6 * unit, 1e6 * unit).argument
            filter = family(value)
        total, risks, tau = at(filter, temperature)
        return PopulationOptimum(total, risks, value, temperature, tau)

    return jax.lax.map(best, temperatures)
