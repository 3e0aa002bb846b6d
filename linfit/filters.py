"""Spectral filters: every linear fine-tuner as a function g of the eigenvalues s of K = XXᵀ/n (docs, S1).

    θ̂ = θ₁ + (1/n) Xᵀ U diag(g(s)) Uᵀ (y − Xθ₁)

A filter is called with eigenvalues (n,) and returns g, shape (…, n). Hyperparameters may be arrays; their axes come in
front, so `Ridge(jnp.logspace(-5, 2, 60))` is sixty filters, and new values never recompile. The limit s → 0 is exact.
Where it is infinite (min-norm), directions with s ≤ n·ε·s_max carry no data and g is 0 there: the pseudo-inverse.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import ArrayLike, broadcastable, is_concrete, non_negative, positive, real_array, same_size
from linfit.internal.linear_algebra import rank_cutoff

__all__ = [
    "Combination", "Ensemble", "Filter", "GradientDescent", "GradientFlow", "MinNorm", "Ridge", "SelfDistillation",
    "Several", "SharpnessAware", "Tabulated",
]  # fmt: skip


class Filter(eqx.Module):
    """A spectral filter g; `tau * filter` is the ensemble θ_τ = (1−τ)θ₁ + τθ̂, `a + b` a sum of filters.

    Weights are linear in the filter: `0.3 * a + 0.7 * b` averages the two fine-tuned models.
    """

    @abstractmethod
    def __call__(self, eigenvalues: ArrayLike) -> Array:
        """g(s), shape (…, n), for eigenvalues s (n,)."""

    def __mul__(self, tau: ArrayLike) -> "Ensemble":
        return Ensemble(self, tau)

    __rmul__ = __mul__

    def __add__(self, other: "Filter") -> "Combination":
        if not isinstance(other, Filter):
            return NotImplemented
        return Combination((self, other), jnp.ones(2))

    def __radd__(self, other: int) -> "Filter":  # so that `sum(filters)` works: it begins with 0 + filter
        return self if isinstance(other, int) and other == 0 else NotImplemented

    __array_ufunc__ = None  # so that `numpy_array * filter` comes here


class MinNorm(Filter):
    """Interpolation of minimum distance to θ₁: g = 1/s (paper 2506.01901).

    >>> from linfit import MinNorm
    >>> MinNorm()(jnp.array([0.0, 2.0]))
    Array([0. , 0.5], dtype=float64)
    """

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        return _inverse(_eigenvalues(eigenvalues))


class Ridge(Filter):
    """Ridge towards θ₁: g = 1/(s+λ), loss (1/n)‖y−Xθ‖² + λ‖θ−θ₁‖² (paper 2506.01901, "DiffNorm-Penalty").

    λ ≥ 0, in the units of s; λ = 0 is `MinNorm`. Raises ValueError if negative or NaN.

    >>> from linfit import Ridge
    >>> Ridge([0.5, 2.0])(jnp.array([0.0, 2.0]))
    Array([[2.  , 0.4 ],
           [0.5 , 0.25]], dtype=float64)
    """

    penalty: Array

    def __init__(self, penalty: ArrayLike):
        self.penalty = non_negative("penalty", penalty, finite=False)

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        return _inverse(_eigenvalues(eigenvalues), self.penalty[..., None])


class GradientFlow(Filter):
    """Gradient flow from θ₁ on (1/2n)‖y−Xθ‖²: g = (1−e^{−ts})/s, t the time (ours; the limit η → 0, ηk = t).

    t ≥ 0, in units of 1/s; t = ∞ is `MinNorm`. Raises ValueError if negative or NaN.

    >>> from linfit import GradientFlow
    >>> GradientFlow(3.0)(jnp.array([0.0, 1e-12, 2.0]))
    Array([3.        , 3.        , 0.49876062], dtype=float64)
    """

    time: Array

    def __init__(self, time: ArrayLike):
        self.time = non_negative("time", time, finite=False)

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        return _flow(_eigenvalues(eigenvalues), self.time[..., None])


class GradientDescent(Filter):
    """Gradient descent from θ₁ on (1/2n)‖y−Xθ‖²: g = (1−(1−ηs)^k)/s after k steps of size η (ours).

    η > 0 in units of 1/s, k a whole number ≥ 0; both may be arrays and broadcast. Raises ValueError if
    ηs ≥ 2 for some eigenvalue (the iteration does not converge), or if a step count is not whole.

    >>> from linfit import GradientDescent
    >>> GradientDescent(step_size=0.5, steps=3)(jnp.array([0.0, 1.0, 2.0]))
    Array([1.5  , 0.875, 0.5  ], dtype=float64)
    """

    step_size: Array
    steps: Array

    def __init__(self, step_size: ArrayLike, steps: ArrayLike):
        self.step_size = positive("step_size", step_size)
        self.steps = non_negative("steps", steps)
        if is_concrete(self.steps) and (np.asarray(self.steps) % 1).any():
            raise ValueError(f"steps must be whole numbers, got {self.steps}")
        broadcastable("steps", self.steps.shape, "step_size", self.step_size.shape)

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        s = _eigenvalues(eigenvalues)
        progress = self.step_size[..., None] * s  # ηs
        if is_concrete(progress) and (np.asarray(progress) >= 2).any():
            limit = 2 / np.asarray(s).max()
            raise ValueError(f"step_size must be below 2/s_max = {limit:.6g} on this data, got {self.step_size}")
        steps = self.steps[..., None]
        # 1 − (1−ηs)^k = −expm1(k log|1−ηs|) keeps all digits at small ηs, and near ηs = 2 after an even number of
        # steps; beyond ηs = 1 an odd power is negative. At ηs = 1 the power is 0, and log 0 is stepped around.
        contraction = 1 - progress
        arrived, small, zero = contraction == 0, progress < 0.5, progress == 0
        near = jnp.log1p(-jnp.where(small, progress, 0))
        log_power = steps * jnp.where(small, near, jnp.log(jnp.abs(jnp.where(small | arrived, 1, contraction))))
        negative = (contraction < 0) & (steps % 2 == 1)
        learned = jnp.where(negative, 1 + jnp.exp(log_power), -jnp.expm1(log_power))
        learned = jnp.where(arrived, jnp.minimum(steps, 1), learned)
        return jnp.where(zero, self.step_size[..., None] * steps, learned / jnp.where(zero, 1, s))


class Ensemble(Filter):
    """τ·g: the average θ_τ = (1−τ)θ₁ + τθ̂ of θ₁ and the filter's fine-tuned θ̂ (paper 2506.01901).

    τ any finite number or array; its axes broadcast against the filter's.

    >>> from linfit import Ridge
    >>> (0.5 * Ridge(1.0))(jnp.array([1.0, 3.0]))
    Array([0.25 , 0.125], dtype=float64)
    """

    filter: Filter
    tau: Array

    def __init__(self, filter: Filter, tau: ArrayLike):
        self.filter = filter
        self.tau = real_array("tau", tau)

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        g = self.filter(eigenvalues)
        broadcastable("tau", self.tau.shape, "the hyperparameters of the filter", g.shape[:-1])
        return self.tau[..., None] * g


class Combination(Filter):
    """Σ_k a_k g_k: the model θ₁ + Σ_k a_k(θ̂_k − θ₁) from K fine-tuners on the same data (docs, C1; ours).

    `filters` are K ≥ 1, `weights` a (…, K) any finite numbers, which need not sum to 1 (the rest stays at θ₁). Axes of
    weights and hyperparameters broadcast. `form.optimal_combination(filters)` has the best weights. Raises ValueError
    for another number of weights, axes that do not broadcast, or what is not a filter.

    >>> from linfit import Combination, MinNorm, Ridge
    >>> Combination((MinNorm(), Ridge(1.0)), [0.5, -1.0])(jnp.array([1.0, 3.0])).round(4)
    Array([ 0.    , -0.0833], dtype=float64)
    >>> (0.5 * MinNorm() + Ridge([1.0, 3.0]))(jnp.array([1.0, 3.0])).shape
    (2, 2)
    """

    filters: tuple[Filter, ...]
    weights: Array

    def __init__(self, filters: Sequence[Filter], weights: ArrayLike):
        self.filters, self.weights = tuple(filters), real_array("weights", weights)
        if not self.filters:
            raise ValueError("filters must hold at least one filter, got none")
        for filter in self.filters:
            if not isinstance(filter, Filter):
                raise ValueError(f"filters must be linfit filters such as Ridge(0.1), got {type(filter).__name__}")
        size = self.weights.shape[-1] if self.weights.ndim else 0
        same_size("weights (last axis)", size, "the number of filters", len(self.filters))

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        values = [filter(eigenvalues) for filter in self.filters]
        shape = self.weights.shape[:-1]
        for g in values:
            broadcastable("hyperparameters", g.shape[:-1], "those of the other filters and weights", shape)
            shape = np.broadcast_shapes(shape, g.shape[:-1])
        terms = [self.weights[..., index, None].astype(g.dtype) * g for index, g in enumerate(values)]
        return sum(terms[1:], terms[0])


class SelfDistillation(Filter):
    """A student of labels (1−ξ)y + ξ·(answers of a teacher), both ridge λ from θ₁ on one design (docs, C2; ours).

        g = [(1−ξ) + ξ s/(s+λ)]/(s+λ) = g_λ + ξλ ∂g_λ/∂λ,      g_λ = 1/(s+λ)

    `penalty` λ ≥ 0 in the units of s, `mix` ξ any finite number: 0 is the teacher, 1 a student that sees nothing but
    the teacher's answers, a negative one moves away from them. They broadcast. `theory.distillation.optimal_mix` has
    the best ξ. Raises ValueError if λ is negative or NaN, or ξ is not finite.

    >>> from linfit import SelfDistillation
    >>> SelfDistillation(1.0, [0.0, 1.0, -1.0])(jnp.array([1.0, 3.0]))
    Array([[0.5   , 0.25  ],
           [0.25  , 0.1875],
           [0.75  , 0.3125]], dtype=float64)
    """

    penalty: Array
    mix: Array

    def __init__(self, penalty: ArrayLike, mix: ArrayLike):
        self.penalty = non_negative("penalty", penalty, finite=False)
        self.mix = real_array("mix", mix)
        broadcastable("mix", self.mix.shape, "penalty", self.penalty.shape)

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        s, penalty = _eigenvalues(eigenvalues), self.penalty[..., None]
        teacher = _inverse(s, penalty)
        missed = jnp.where(jnp.isfinite(penalty), penalty, 0) * teacher  # λ/(s+λ), what the teacher leaves of a label
        return teacher * (1 - self.mix[..., None] * missed)


class SharpnessAware(Filter):
    """Sharpness-aware flow from θ₁: descent along the gradient at θ + ρ∇L, L = (1/2n)‖y−Xθ‖² (docs, C3; ours).

        ∇L(θ + ρ∇L) = (1 + ρΣ̂)∇L(θ),      g = (1−e^{−ts(1+ρs)})/s

    The ascent step is not normalised here; normalised it depends on the data and is no filter. `time` t ≥ 0 in units of
    1/s, `radius` ρ ≥ 0 likewise; they broadcast. ρ = 0 is `GradientFlow`. Raises ValueError if negative or NaN.

    >>> from linfit import SharpnessAware
    >>> SharpnessAware(0.5, [0.0, 1.0])(jnp.array([0.0, 2.0])).round(4)
    Array([[0.5   , 0.3161],
           [0.5   , 0.4751]], dtype=float64)
    """

    time: Array
    radius: Array

    def __init__(self, time: ArrayLike, radius: ArrayLike):
        self.time = non_negative("time", time, finite=False)
        self.radius = non_negative("radius", radius)
        broadcastable("radius", self.radius.shape, "time", self.time.shape)

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        s = _eigenvalues(eigenvalues)
        speed = 1 + self.radius[..., None] * s
        time = self.time[..., None]
        # (1−e^{−t·s·speed})/s = speed·(1−e^{−t(s·speed)})/(s·speed); which directions have data is decided by s alone
        return jnp.where(
            jnp.isfinite(time), speed * _flow(speed * s, jnp.where(jnp.isfinite(time), time, 1)), _inverse(s)
        )


class Several(Filter):
    """Several filters as one, stacked in front, so that one eigendecomposition serves them all (ours).

    >>> from linfit import MinNorm, Ridge
    >>> from linfit.filters import Several
    >>> Several((MinNorm(), Ridge([1.0, 3.0])))(jnp.array([1.0, 3.0])).shape
    (3, 2)
    """

    filters: tuple[Filter, ...]

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        return jnp.concatenate([jnp.atleast_2d(filter(eigenvalues)) for filter in self.filters])


class Tabulated(Filter):
    """A filter known by its values g (…, n) at the eigenvalues of one design, in their order (ours).

    >>> from linfit.filters import Tabulated
    >>> Tabulated([1.0, 0.25])(jnp.array([0.0, 3.0]))
    Array([1.  , 0.25], dtype=float64)
    """

    values: Array

    def __init__(self, values: ArrayLike):
        self.values = real_array("values", values)

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        same_size("values", self.values.shape[-1], "the eigenvalues of their own design", np.shape(eigenvalues)[-1])
        return self.values

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of g."""
        return self.values.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __jax_array__(self) -> Array:
        return self.values


def _eigenvalues(eigenvalues: ArrayLike) -> Array:
    return non_negative("eigenvalues", eigenvalues, ndim=1)


def _flow(s: Array, time: Array) -> Array:
    """(1−e^{−ts})/s, t at s = 0 and the pseudo-inverse at t = ∞."""
    finite = jnp.isfinite(time)
    time = jnp.where(finite, time, 1)
    progress = time * s
    zero = progress == 0  # s = 0, t = 0, or both so small that ts underflows
    flow = jnp.where(zero, time, -jnp.expm1(-progress) / jnp.where(zero, 1, s))
    return jnp.where(finite, flow, _inverse(s))


def _inverse(s: Array, penalty: Array | float = 0.0) -> Array:
    """1/(s + λ), at λ = 0 the pseudo-inverse."""
    kept = (jnp.asarray(penalty) > 0) | (s > rank_cutoff(s))
    return jnp.where(kept, 1 / jnp.where(kept, s + penalty, 1), 0)
