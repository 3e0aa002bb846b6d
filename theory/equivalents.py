"""Deterministic equivalents: the risk of every filter without sampling a design (docs, D1–D5).

As n and p grow together the sample covariance Σ̂ = XᵀX/n acts, in every quantity below, like a shrunken population
covariance: λ(Σ̂+λ)⁻¹ ≍ κ(Σ+κ)⁻¹ with a larger, *effective* penalty κ. The relative error falls like 1/n.

Derivation of the risk. Write a filter as a sum of ridges, g(s) = Re Σ_k w_k/(s+λ_k) (`theory.rational`), and let
κ_k solve D1 at λ_k; S = E ΔΔᵀ, m = E Δ. In the basis where Σ₁ and Σ₂ are diagonal, coordinate j is learned, on average,
by the fraction

    f_j = Σ_k w_k s_j/(s_j+κ_k),

and D2 says that the fluctuation around this mean adds, on a test covariance M,

    E_M = Σ_kl w_k w_l κ_k κ_l a_kl Σ_j S_jj s_j r_jk r_jl,   V_M = σ² Σ_kl w_k w_l a_kl,      r_jk = 1/(s_j+κ_k),
    a_kl = (1/n) Σ_j M_j s_j r_jk r_jl / (1 − (1/n) Σ_j s_j² r_jk r_jl):

    R_ft(τ)  = Σ_j M_j S_jj (1 − τf_j)² + τ²(E_M + V_M),                               M = Σ₂,
    R_pre(τ) = Σ_j M_j [(u_j + τ f_j m_j)² + τ² f_j² Ω_jj] + τ²(E_M + V_M),            M = Σ₁.

(For ridge this is D3; the variance of a sum of ridges is the same double sum because
Σ̂(Σ̂+λ_k)⁻¹(Σ̂+λ_l)⁻¹ = [λ_k(Σ̂+λ_k)⁻¹ − λ_l(Σ̂+λ_l)⁻¹]/(λ_k−λ_l).) Only the diagonal of S enters, since everything
else is diagonal.

Two identities make the double sums cheap. With T_w(κ) = Σ_j w_j/(s_j+κ),

    Σ_j w_j r_jk r_jl = −[T_w(κ_k) − T_w(κ_l)]/(κ_k − κ_l),      1 − (1/n) Σ_j s_j² r_jk r_jl = (λ_k − λ_l)/(κ_k − κ_l),

so K resolvents cost K passes over the spectrum, not K².
"""

import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax import Array

from linfit.covariance import Covariance, Diagonal
from linfit.filters import (
    Combination,
    Ensemble,
    Filter,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Ridge,
    SelfDistillation,
)
from linfit.internal.checks import (
    ArrayLike,
    broadcastable,
    is_concrete,
    non_negative,
    positive,
    require_finite,
    same_size,
)
from linfit.problem import Pair, TwoTaskProblem
from linfit.risk import Parabola, Risk
from theory import rational

__all__ = [
    "Spectrum", "along", "degrees_of_freedom", "effective_ranks", "effective_regularization", "risk",
    "signal_to_noise", "spectral_edge",
]  # fmt: skip

Counts = ArrayLike | None


class Spectrum(eqx.Module):
    """Weighted atoms: eigenvalues (k,) ≥ 0, each with a multiplicity (k,) ≥ 0, whole or not.

    The cost of everything below is that of k, whatever the dimension p = Σ multiplicities.

    >>> float(effective_regularization(0.0, Spectrum([1.0], [1e9]), 1e8))   # κ = p/n − 1
    9.0
    """

    eigenvalues: Array
    multiplicities: Array

    def __init__(self, eigenvalues: ArrayLike, multiplicities: ArrayLike):
        self.eigenvalues = non_negative("eigenvalues", eigenvalues, ndim=1)
        self.multiplicities = non_negative("multiplicities", multiplicities, ndim=1).astype(self.eigenvalues.dtype)
        same_size("multiplicities", self.multiplicities.shape[0], "eigenvalues", self.eigenvalues.shape[0])

    @property
    def trace(self) -> Array:
        """tr Σ."""
        return self.multiplicities @ self.eigenvalues

    @property
    def rank(self) -> Array:
        """Number of positive eigenvalues."""
        return jnp.sum(jnp.where(self.eigenvalues > 0, self.multiplicities, 0))


SpectrumLike = Spectrum | Covariance | ArrayLike


def _as_spectrum(value: SpectrumLike) -> Spectrum:
    if not isinstance(value, Spectrum):
        eigenvalues = _diagonal(value, "spectrum") if isinstance(value, Covariance) else value
        eigenvalues = non_negative("spectrum", eigenvalues, ndim=1)
        value = Spectrum(eigenvalues, jnp.ones_like(eigenvalues))
    if is_concrete(value) and not float(value.trace) > 0:
        raise ValueError("spectrum must have a positive eigenvalue, got trace 0")
    return value


def _diagonal(covariance: Covariance, name: str) -> Array:
    if not isinstance(covariance, Diagonal):
        raise ValueError(
            f"{name} must be diagonal, given as eigenvalues (p,), got {type(covariance).__name__}; "
            "covariances that commute become so in their common eigenbasis (rotate the shift too)"
        )
    return covariance.eigenvalues


def effective_regularization(penalty: ArrayLike, spectrum: SpectrumLike, n: ArrayLike) -> Array:
    """κ(λ): λ(Σ̂+λ)⁻¹ ≍ κ(Σ+κ)⁻¹ (docs, D1).

        κ − (κ/n) tr Σ(Σ+κ)⁻¹ = λ

    Args:
        penalty: λ of any shape, real ≥ 0 or complex off the negative axis; κ has its shape and the unit of eigenvalues.
        spectrum: eigenvalues (p,) or a `Spectrum`.
        n: samples, any real number > 0.

    λ = 0 is the limit: κ > 0 if more than n eigenvalues are positive, else 0. Differentiable in every argument. Raises
    ValueError for a penalty that is negative or NaN, n ≤ 0, or eigenvalues that are negative or all zero.

    >>> effective_regularization(jnp.array([0.0, 1.0]), jnp.ones(20), 10)
    Array([1.        , 2.41421356], dtype=float64)
    """
    spectrum = _as_spectrum(spectrum)
    if jnp.iscomplexobj(penalty):
        penalty = jnp.asarray(penalty)
        require_finite("penalty", penalty)
        if is_concrete(penalty) and ((penalty.imag == 0) & (penalty.real < 0)).any():
            raise ValueError("penalty must lie off the negative real axis, got a negative one")
    else:
        penalty = non_negative("penalty", penalty)
    penalty = penalty.astype(jnp.result_type(penalty, spectrum.eigenvalues.dtype))
    return _kappa(penalty, spectrum, _samples(n, spectrum))


def _samples(n: ArrayLike, spectrum: Spectrum) -> Array:
    return positive("n", n, ndim=0).astype(spectrum.eigenvalues.dtype)


@jax.jit
def _kappa(penalty: Array, spectrum: Spectrum, n: Array) -> Array:
    flat = _over_nodes(lambda one: _solve(one, spectrum, n), penalty.ravel(), spectrum.eigenvalues.size)
    return flat.reshape(penalty.shape)


def _over_nodes(function, nodes, size: int):  # type: ignore[no-untyped-def]
    """Map over nodes, as many at a time as keep p × nodes within 2²⁰ numbers."""
    count = jax.tree.leaves(nodes)[0].shape[0]
    batch = max(1, 2**20 // size)
    return jax.vmap(function)(nodes) if batch >= count else jax.lax.map(function, nodes, batch_size=batch)


def _solve(penalty: Array, spectrum: Spectrum, n: Array) -> Array:
    """One root of D1, by Newton's method from λ + trΣ/n.

    With f = s/(s+κ), Newton's map for h(κ) = κ − (κ/n) Σf − λ is N(κ) = [λ + (κ/n) Σf(1−f)] / [1 − (1/n) Σf²]: no
    cancellation in the numerator. For real λ, h is convex and positive at the start, so the iterates fall to the root
    monotonically. For complex λ the root is the only one on λ's side of the real axis (1/κ is a Stieltjes transform
    of λ); a step across is replaced by one of the plain iteration κ ← λ + (κ/n) Σf, which never crosses.
    """
    excess = spectrum.rank - n
    interpolates = (penalty == 0) & (excess <= 0)
    safe = jnp.where(interpolates, 1, penalty)

    def moments(kappa: Array) -> tuple[Array, Array, Array]:
        f = spectrum.eigenvalues * _reciprocal(spectrum.eigenvalues, kappa)
        weighted = spectrum.multiplicities * f
        return jnp.sum(weighted) / n, jnp.sum(weighted * (1 - f)) / n, jnp.sum(weighted * f) / n

    def newton(kappa: Array, penalty: Array) -> Array:
        first, difference, second = moments(kappa)
        step = (penalty + kappa * difference) / (1 - second)
        if not jnp.iscomplexobj(kappa):
            return step
        return jnp.where(step.imag * penalty.imag >= 0, step, penalty + kappa * first)

    kappa = _fixed_point(newton, safe + spectrum.trace / n, safe)
    slope = jnp.where(excess < 0, -n / jnp.where(excess < 0, excess, -1), 0)  # κ ≈ λ·n/(n − rank) near λ = 0
    return jnp.where(interpolates, penalty * slope, kappa)


def _fixed_point(function, start: Array, argument: Array) -> Array:  # type: ignore[no-untyped-def]
    """κ = function(κ, argument), by optimistix, which differentiates it implicitly; complex κ as (log|κ|, arg κ)."""
    tolerance = float(jnp.finfo(start.dtype).eps) ** 0.625  # relative; a Newton step squares it
    solver: optimistix.FixedPointIteration
    if not jnp.iscomplexobj(start):
        solver = optimistix.FixedPointIteration(rtol=tolerance, atol=0.0, norm=_norm)
        return optimistix.fixed_point(function, solver, start, argument).value

    def to_polar(kappa: Array) -> Array:
        logarithm = jnp.log(kappa)
        return jnp.stack([logarithm.real, logarithm.imag])

    def from_polar(polar: Array) -> Array:
        return jnp.exp(jax.lax.complex(polar[0], polar[1]))

    def polar_function(polar: Array, argument: Array) -> Array:
        return to_polar(function(from_polar(polar), argument))

    solver = optimistix.FixedPointIteration(rtol=0.0, atol=tolerance, norm=_norm)
    return from_polar(optimistix.fixed_point(polar_function, solver, to_polar(start), argument).value)


def _norm(error: Array) -> Array:
    """The largest entry, in the dtype in which optimistix starts to count."""
    return jnp.max(jnp.abs(error)).astype(jnp.result_type(float))


def _inverse(real: Array, imaginary: Array) -> Array:
    """1/(a + ib) in real arithmetic, which XLA vectorises and complex division it does not."""
    square = real**2 + imaginary**2
    return jax.lax.complex(real / square, -imaginary / square)


def _reciprocal(s: Array, kappa: Array) -> Array:
    """1/(s+κ), 0 where both vanish."""
    if jnp.iscomplexobj(kappa):
        return _inverse(s + kappa.real, kappa.imag)
    total = s + kappa
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


class DegreesOfFreedom(NamedTuple):
    """Effective dimensions at an effective penalty κ: df₁ and df₂; variance blows up as df₂ approaches n."""

    first: Array
    second: Array


def degrees_of_freedom(penalty: ArrayLike, spectrum: SpectrumLike, n: ArrayLike) -> DegreesOfFreedom:
    """df₁ = tr Σ(Σ+κ)⁻¹ and df₂ = tr Σ²(Σ+κ)⁻² at κ = κ(λ) (docs, D5); each of the shape of `penalty`.

    df₁ = n(1 − λ/κ): at λ = 0 and rank > n all n samples are used up. Raises ValueError as `effective_regularization`.

    >>> degrees_of_freedom(0.0, jnp.ones(20), 10)
    DegreesOfFreedom(first=Array(10., dtype=float64), second=Array(5., dtype=float64))
    """
    spectrum = _as_spectrum(spectrum)
    return _degrees_of_freedom(effective_regularization(penalty, spectrum, n), spectrum)


@jax.jit
def _degrees_of_freedom(kappa: Array, spectrum: Spectrum) -> DegreesOfFreedom:
    def one(kappa: Array) -> tuple[Array, Array]:
        f = spectrum.eigenvalues * _reciprocal(spectrum.eigenvalues, kappa)
        return jnp.sum(spectrum.multiplicities * f), jnp.sum(spectrum.multiplicities * f**2)

    first, second = _over_nodes(one, kappa.ravel(), spectrum.eigenvalues.size)
    return DegreesOfFreedom(first.reshape(kappa.shape), second.reshape(kappa.shape))


class EffectiveRanks(NamedTuple):
    """How many eigenvalues the tail beyond the k-th is worth: r_k ≤ R_k ≤ r_k²."""

    r: Array
    R: Array


def effective_ranks(spectrum: SpectrumLike, k: ArrayLike = 0) -> EffectiveRanks:
    """Effective ranks r_k and R_k of benign overfitting (Bartlett, Long, Lugosi & Tsigler 2020; docs, D5).

        r_k = Σ_{i>k} λ_i / λ_{k+1},      R_k = (Σ_{i>k} λ_i)² / Σ_{i>k} λ_i²

    In any order of the eigenvalues. Raises ValueError unless 0 ≤ k (…) < number of positive eigenvalues.

    >>> effective_ranks(jnp.array([4.0, 1.0, 1.0]), [0, 1])
    EffectiveRanks(r=Array([1.5, 2. ], dtype=float64), R=Array([2., 2.], dtype=float64))
    """
    spectrum = _as_spectrum(spectrum)
    k = non_negative("k", k).astype(spectrum.eigenvalues.dtype)
    if is_concrete(k, spectrum) and not (np.asarray(k) < float(spectrum.rank)).all():
        raise ValueError(f"k must be below the number of positive eigenvalues, {spectrum.rank}, got {k.max()}")
    order = jnp.argsort(-spectrum.eigenvalues)
    eigenvalues, multiplicities = spectrum.eigenvalues[order], spectrum.multiplicities[order]
    last = jnp.cumsum(multiplicities)
    at = jnp.searchsorted(last, k, side="right")  # the atom that holds the (k+1)-th eigenvalue, and
    rest = last[at] - k  # how much of it lies beyond the k-th

    def tail(values: Array) -> Array:
        later = jnp.cumsum((multiplicities * values)[::-1])[::-1] - multiplicities * values
        return rest * values[at] + later[at]

    total = tail(eigenvalues)
    return EffectiveRanks(total / eigenvalues[at], total**2 / tail(eigenvalues**2))


def spectral_edge(spectrum: SpectrumLike, n: ArrayLike) -> Array:
    """Largest eigenvalue that Σ̂ has in the limit: min over x > s_max of x·(1 + (1/n) Σ s/(x−s)) (docs, D1; ours).

    This is −λ at κ = −x, where D1 ceases to be monotone. Found on a grid: at most 1% above. Raises ValueError as
    `effective_regularization`.

    >>> round(float(spectral_edge(jnp.ones(400), 100)), 1)   # Marchenko–Pastur: (1 + √(p/n))²
    9.0
    """
    spectrum = _as_spectrum(spectrum)
    s, samples = spectrum.eigenvalues, _samples(n, spectrum)
    grid = jnp.max(s) * (1 + jnp.logspace(-4, 4, 161, dtype=s.dtype))

    def edge(x: Array) -> Array:
        return x * (1 + jnp.sum(spectrum.multiplicities * s / (x - s)) / samples)

    return jnp.min(_over_nodes(edge, grid, s.size))


def signal_to_noise(problem: TwoTaskProblem) -> Array:
    """SNR = tr SΣ₂ / σ², the risk of the pretrained weights over the noise variance (docs, D5); ∞ without noise.

    >>> from linfit import RandomShift, TwoTaskProblem
    >>> float(signal_to_noise(TwoTaskProblem([1.0, 1.0], [1.0, 3.0], RandomShift([0.5, 0.5]), noise_std=2.0)))
    0.5
    """
    spectrum = _diagonal(problem.finetune_covariance, "finetune_covariance")
    return _second_moment(problem) @ spectrum / problem.noise_std**2


def risk(
    problem: TwoTaskProblem, n: ArrayLike, filter: Filter, tau: ArrayLike = 1.0, *, multiplicities: Counts = None
) -> Pair[Risk]:
    """Predicted bias² and variance of θ_τ = (1−τ)θ₁ + τθ̂ on both domains, over designs of n samples (docs, D2–D4).

    Ridge is the known two-point equivalent; gradient flow and descent by contour, the pretraining risk and τ are ours.

    Args:
        problem: Σ₁ and Σ₂ diagonal; of the shift covariance only the diagonal enters.
        n: fine-tuning samples, any real number > 0.
        filter: MinNorm, Ridge, GradientFlow, GradientDescent, SelfDistillation, their multiples `tau * filter` and
            sums; may hold arrays.
        tau: ensemble coefficient, broadcasts against the filter's hyperparameters → fields of that shape.
        multiplicities: (p,); coordinate j of the problem stands for that many equal ones.

    Everything may be traced, and new values do not recompile. Times within a decade share a contour if concrete; traced
    ones have each their own, which is slower. Error against the mean of exact risks: O(1/n). Numerical error: 1e-7
    relative (float32: 3e-3); for gradient descent with ηs_max > 1, |1−ηs_max|^k more beyond 16 steps, s_max the
    `spectral_edge`. Raises ValueError for covariances that are not diagonal, n ≤ 0, another filter, or ηs_max ≥ 2.

    >>> from linfit import GradientFlow, RandomShift, TwoTaskProblem, spectra
    >>> spectrum = spectra.power_law(1000)
    >>> problem = TwoTaskProblem(spectrum, spectrum, RandomShift(spectra.isotropic(1000)), noise_std=1.0)
    >>> risk(problem, 250, GradientFlow([1.0, 10.0, 100.0])).finetune.total.round(2)
    Array([5.69, 3.72, 2.79], dtype=float64)
    """
    return along(problem, n, filter, multiplicities=multiplicities).map(lambda parabola: parabola(tau))


def along(problem: TwoTaskProblem, n: ArrayLike, filter: Filter, *, multiplicities: Counts = None) -> Pair[Parabola]:
    """The predicted risks as functions of τ, with the best τ in closed form (docs, D3, S3; ours).

    Arguments and errors as for `risk`; fields have the shape of the filter's hyperparameters.

    >>> from linfit import MinNorm, RandomShift, TwoTaskProblem
    >>> flat = jnp.ones(1000)
    >>> problem = TwoTaskProblem(flat, flat, RandomShift(flat / 1000), noise_std=1.0)
    >>> along(problem, 500, MinNorm()).finetune.optimal_tau   # SNR 1, p = 2n
    Array(0.33333333, dtype=float64)
    """
    if isinstance(filter, Ensemble):
        tau, inner = filter.tau, along(problem, n, filter.filter, multiplicities=multiplicities)
        scale = Parabola(jnp.ones_like(tau), tau, tau**2, tau**2)
        return inner.map(lambda parabola: jax.tree.map(jnp.multiply, parabola, scale))
    population = _population(problem, n, multiplicities)
    terms = _terms(population, filter)
    forms = _evaluate(population, *terms[0])
    for ridges, active in terms[1:]:
        forms = jax.tree.map(partial(jnp.where, active), _evaluate(population, ridges, active), forms)
    return jax.tree.map(lambda field: field.reshape(_shape(filter)), forms)


class _Population(NamedTuple):
    """The problem as weighted sums over its coordinates; of pairs, M = Σ₂ and Σ₁."""

    spectrum: Spectrum
    n: Array
    constants: Array
    """R_ft and R_pre of the pretrained weights (2,)."""
    single: Array
    """Weights w of slope = Σ_k w_k T_w(κ_k) (2, p)."""
    double: Array
    """Weights of the sums over r_jk r_jl (6, p): M S s² (two), M s (two), S s and s²."""
    noise_std: Array


def _second_moment(problem: TwoTaskProblem) -> Array:
    """diag S, S = Ω + mmᵀ."""
    spread = problem.gap_covariance.diagonal() if problem.gap_covariance is not None else 0.0
    mean = problem.gap_mean
    return spread + (jnp.zeros(problem.p) if mean is None else mean**2)


def _population(problem: TwoTaskProblem, n: ArrayLike, multiplicities: Counts) -> _Population:
    if not isinstance(problem, TwoTaskProblem):
        raise ValueError(f"problem must be a linfit.TwoTaskProblem, got {type(problem).__name__}")
    s = _diagonal(problem.finetune_covariance, "finetune_covariance")
    pretrain = _diagonal(problem.pretrain_covariance, "pretrain_covariance")
    spectrum = _as_spectrum(Spectrum(s, jnp.ones_like(s) if multiplicities is None else multiplicities))
    count, S = spectrum.multiplicities, _second_moment(problem).astype(s.dtype)
    u, mean = (jnp.zeros_like(s) if part is None else part for part in (problem.pretrain_error, problem.gap_mean))
    return _Population(
        spectrum,
        _samples(n, spectrum),
        jnp.stack([count @ (S * s), count @ (u**2 * pretrain)]),
        count * jnp.stack([S * s * s, -pretrain * u * mean * s]),
        count * jnp.stack([S * s * s**2, S * pretrain * s**2, s * s, pretrain * s, S * s, s**2]),
        problem.noise_std.astype(s.dtype),
    )


def _shape(filter: Filter) -> tuple[int, ...]:
    """Of the hyperparameters."""
    parts: list[Any] = jax.tree.leaves(filter)
    if isinstance(filter, Combination):
        parts = [filter.weights[..., 0], *filter.filters]
    if isinstance(filter, Ensemble):
        parts = [filter.tau, filter.filter]
    shape: tuple[int, ...] = ()
    for part in parts:
        one = _shape(part) if isinstance(part, Filter) else np.shape(part)
        broadcastable("hyperparameters", one, "those of the other filters and weights", shape)
        shape = np.broadcast_shapes(shape, one)
    return shape


_Term = tuple[rational.Ridges, Array]
"""A sum of ridges for each of T filters, and for which of them it stands (T,)."""


def _terms(population: _Population, filter: Filter) -> list[_Term]:
    """The filter in ridges, its hyperparameters in one row; of several terms one stands for each, or none: nothing is
    learned. If values can be seen, no more terms than are needed."""
    dtype = population.n.dtype
    if isinstance(filter, MinNorm):
        terms = _ridge(jnp.zeros(1, dtype))
    elif isinstance(filter, Ridge):
        terms = _ridge(filter.penalty.ravel().astype(dtype))
    elif isinstance(filter, Combination | Ensemble):
        terms = [_combination(population, filter)]
    elif isinstance(filter, SelfDistillation | GradientFlow | GradientDescent):
        rows = jnp.broadcast_arrays(*jax.tree.leaves(filter))
        family = {SelfDistillation: _distillation, GradientFlow: _gradient_flow}.get(type(filter))
        terms = (family or partial(_gradient_descent, population))(*(row.ravel().astype(dtype) for row in rows))
    else:
        known = "MinNorm, Ridge, GradientFlow, GradientDescent, SelfDistillation, or sums and multiples of them"
        raise ValueError(f"filter must be {known}: no equivalent for {type(filter).__name__}")
    needed = [term for term in terms if not is_concrete(term[1]) or np.asarray(term[1]).any()]
    return needed or terms[:1]


def _ridge(penalty: Array) -> list[_Term]:
    """At λ = ∞ nothing is learned."""
    finite = jnp.isfinite(penalty)
    ones = jnp.ones_like(penalty)[:, None]
    return [(rational.Ridges(jnp.where(finite, penalty, 1)[:, None], ones, jnp.arange(penalty.size)), finite)]


def _distillation(penalty: Array, mix: Array) -> list[_Term]:
    finite = jnp.isfinite(penalty)
    return [(rational.distillation_ridges(jnp.where(finite, penalty, 1), mix), finite)]


def _gradient_flow(time: Array) -> list[_Term]:
    """t = 0 learns nothing, t = ∞ is MinNorm; between them a contour."""
    ended = jnp.isinf(time)
    moving = (time > 0) & ~ended
    between = jnp.where(moving, time, 1)
    plan = rational.plan(between, jnp.ones_like(time), concrete=is_concrete(time))
    none = jnp.zeros_like(time)
    limit = rational.Ridges(none[:1, None], none[:, None] + 1, none.astype(int))
    return [(rational.flow_ridges(between, plan), moving), (limit, ended)]


def _gradient_descent(population: _Population, step_size: Array, steps: Array) -> list[_Term]:
    """Few steps on a circle for each step size, many on the flow's contour."""
    if is_concrete(population, step_size):
        edge = spectral_edge(population.spectrum, population.n)
        if (np.asarray(step_size) >= 2 / np.asarray(edge)).any():
            limit = f"2/s_max = {2 / edge:.6g} for this problem"
            raise ValueError(f"step_size must be below {limit}, got {step_size.max()}")
    distinct, group = step_size, jnp.arange(step_size.size)
    if is_concrete(step_size):
        distinct, group = (jnp.asarray(x) for x in np.unique(np.asarray(step_size), return_inverse=True))
    circle = rational.few_steps_ridges(jnp.minimum(steps, rational.FEW_STEPS), distinct, group)
    more = jnp.maximum(steps, rational.FEW_STEPS)
    plan = rational.plan(more, step_size, concrete=is_concrete(steps, step_size))
    few = steps <= rational.FEW_STEPS
    return [(circle, few & (steps > 0)), (rational.descent_ridges(more, plan), ~few)]


def _combination(population: _Population, filter: Combination | Ensemble) -> _Term:
    """All resolvents of all members, each with its weight and that of its member."""
    members = filter.filters if isinstance(filter, Combination) else (filter.filter,)
    weights = filter.weights if isinstance(filter, Combination) else filter.tau[..., None]
    shape, parts = _shape(filter), []
    for index, member in enumerate(members):
        own = _shape(member)
        # which of the member's T rows each of ours is
        rows = np.broadcast_to(np.arange(math.prod(own)).reshape(own), shape).ravel()
        weight = jnp.broadcast_to(weights[..., index], shape).ravel()
        for ridges, active in _terms(population, member):
            scaled = jnp.where(active[rows], weight, 0)[:, None] * ridges.weights[rows]
            parts.append(rational.Ridges(ridges.penalties, scaled, ridges.group[rows]))
    return rational.combined_ridges(parts), jnp.ones(math.prod(shape), bool)


@jax.jit
def _evaluate(population: _Population, ridges: rational.Ridges, active: Array) -> Pair[Parabola]:
    """The sums of the module's docstring for T filters; where not `active`, nothing is learned."""
    size = population.spectrum.eigenvalues.size * ridges.penalties.shape[1]
    linear, kernels = _over_nodes(lambda nodes: _tables(population, nodes), ridges.penalties, size)
    w, group = jnp.where(active[:, None], ridges.weights, 0), ridges.group
    conjugates = [w, w.conj()] if jnp.iscomplexobj(w) else [w]
    # Re of a sum over upper nodes is half the sum over them and their conjugates.
    columns = jnp.concatenate(conjugates, axis=-1) / len(conjugates)
    slope = jnp.einsum("tk,tdk->dt", w, linear[group]).real
    double = jnp.einsum("tk,tqkl,tl->qt", w, kernels[group], columns).real
    bias, variance = double[:2], population.noise_std**2 * double[2:]
    constants = jnp.broadcast_to(population.constants[:, None], slope.shape)
    return Pair(*(Parabola(*parts) for parts in zip(constants, slope, bias, variance)))


def _tables(population: _Population, penalties: Array) -> tuple[Array, Array]:
    """Linear sums (2, K) and kernels (4, K, L), Σ M S f² + E and a; L = K, for complex λ 2K with conjugates last."""
    spectrum, n, pairs = population.spectrum, population.n, population.double
    s = spectrum.eigenvalues
    kappa = _over_nodes(lambda one: _solve(one, spectrum, n), penalties, s.size)
    # T_w(κ) − T_w(κ₀) = (κ₀−κ) Σ w/((s+κ₀)(s+κ)) keeps all digits of the differences; κ₀ is of the size of the κ.
    middle = jnp.exp(jnp.mean(jnp.log(jnp.abs(jnp.where(kappa == 0, 1, kappa)))))
    shifted = pairs * _reciprocal(s, middle)

    def transforms(kappa: Array) -> tuple[Array, Array, Array]:
        r = _reciprocal(s, kappa)
        return _dot(population.single, r), (middle - kappa) * _dot(shifted, r), _dot(pairs, r * r)

    linear, value, derivative = _over_nodes(transforms, kappa, s.size)
    rows = [kappa, value.T, derivative.T]
    columns = [jnp.concatenate([x, x.conj()], axis=-1) for x in rows] if jnp.iscomplexobj(kappa) else rows
    double = _divided_difference(*rows, *columns)
    gain = _divide(double[2:4], n - double[5])
    moved = rows[0][:, None] * columns[0] * double[4]
    fluctuation = jnp.where(moved == 0, 0, gain * moved)  # at the peak rank = n, λ = 0 the gain is infinite
    return linear.T, jnp.concatenate([double[:2] + fluctuation, gain])


def _dot(weights: Array, r: Array) -> Array:
    if jnp.iscomplexobj(r):
        return jax.lax.complex(weights @ r.real, weights @ r.imag)
    return weights @ r


def _divide(a: Array, b: Array) -> Array:
    return a * _inverse(b.real, b.imag) if jnp.iscomplexobj(b) else a / b


def _divided_difference(
    kappa: Array, value: Array, derivative: Array, others: Array, other_value: Array, other_derivative: Array
) -> Array:
    """Σ_j w_j r_jk r_jl (q, K, L) from T_w (q, K) and −T_w′ (q, K); close κ by the mean derivative."""
    gap = kappa[:, None] - others
    root = float(jnp.finfo(gap.dtype).eps) ** (1 / 3)
    close = jnp.abs(gap) <= root * jnp.abs(kappa[:, None])
    difference = _divide(other_value[:, None, :] - value[:, :, None], jnp.where(close, 1, gap))
    return jnp.where(close, (derivative[:, :, None] + other_derivative[:, None, :]) / 2, difference)
