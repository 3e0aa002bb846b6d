"""Excess risk: of given weights, along the ensemble, and of every spectral filter on a design (docs, S2–S4; ours).

Conditional on X, averaging the noise and the shift, the risk is a quadratic form in the filter g,

    R(g) = c − 2 b·g + gᵀ H g,      H = B + σ² diag(q),

and so a parabola in the ensemble coefficient: τg has the risk R(τ) = c − 2τ b·g + τ² gᵀHg. `linfit.risk_forms` makes
the forms of a design; `theory.equivalents` predicts the same parabola without one.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.covariance import Covariance
from linfit.filters import Filter, Several, Tabulated
from linfit.internal.checks import ArrayLike, broadcastable, is_concrete, non_negative, real_array, same_size
from linfit.internal.linear_algebra import rank_cutoff, solve_semidefinite
from linfit.problem import Pair, TwoTaskProblem

__all__ = ["Parabola", "Risk", "RiskForm", "excess_risks"]


class Risk(NamedTuple):
    """Excess risk, in squared units of y; the fields share one shape."""

    bias: Array  #: Squared bias: what remains without label noise, averaged over a random shift.
    variance: Array  #: What label noise adds; proportional to σ².

    @property
    def total(self) -> Array:
        """bias + variance."""
        return self.bias + self.variance


class Parabola(eqx.Module):
    """R(τ) = c − 2τ·slope + τ²·(bias + variance): the risk along θ_τ = (1−τ)θ₁ + τθ̂ (docs, S3; ours).

    The fields share one shape, that of designs, hyperparameters or replicates. From `form.along(filter)` for a design,
    `theory.equivalents.along` without one, or `Parabola.of_steps` for weights that were actually fitted.

    >>> from linfit import Parabola
    >>> parabola = Parabola(constant=1.0, slope=0.5, bias=0.5, variance=0.5)
    >>> [float(number) for number in (parabola.optimal_tau, parabola.optimal_risk, parabola.gain, parabola(2.0).total)]
    [0.5, 0.75, 0.25, 3.0]
    """

    constant: Array  #: c = R(0), the risk of the pretrained weights.
    slope: Array  #: b·g, half the rate at which the risk falls at τ = 0.
    bias: Array  #: gᵀBg, the curvature of the squared bias.
    variance: Array  #: σ² Σ q_i g_i², the variance at τ = 1.

    @classmethod
    def of_steps(cls, covariance: Covariance, start: Array, step: Array) -> "Parabola":
        """‖start + τ·step‖²_Σ for start = θ₁ − θ*, step = θ̂ − θ₁, vectors (…, p) that broadcast; all of it is "bias".

        >>> from linfit import Diagonal, Parabola
        >>> Parabola.of_steps(Diagonal([1.0, 2.0]), jnp.array([1.0, 1.0]), jnp.array([-1.0, 0.0]))(1.0).total
        Array(2., dtype=float64)
        """
        constant, slope = covariance.squared_norm(start), -covariance.dot(step, start)
        return cls(*jnp.broadcast_arrays(constant, slope, covariance.squared_norm(step), jnp.zeros_like(constant)))

    def __call__(self, tau: ArrayLike = 1.0) -> Risk:
        """Bias² and variance at τ, which broadcasts against the fields."""
        tau = real_array("tau", tau)
        bias = self.constant - 2 * tau * self.slope + tau**2 * self.bias
        return Risk(*jnp.broadcast_arrays(bias, tau**2 * self.variance))

    @property
    def curvature(self) -> Array:
        """gᵀHg = bias + variance."""
        return self.bias + self.variance

    @property
    def optimal_tau(self) -> Array:
        """τ* = slope/curvature; overadaptation is τ* < 1 (docs, O1). 1 where nothing moves, for which any τ is best."""
        moves = self.curvature > 0
        return jnp.where(moves, self.slope / jnp.where(moves, self.curvature, 1), 1)

    @property
    def optimal_risk(self) -> Array:
        """R(τ*) = c − τ*·slope."""
        return self.constant - self.optimal_tau * self.slope

    @property
    def gain(self) -> Array:
        """R(1) − R(τ*) = (1−τ*)² curvature, what averaging at the best τ saves."""
        return (1 - self.optimal_tau) ** 2 * self.curvature

    def mean(self, axis: int | tuple[int, ...] = 0) -> "Parabola":
        """The parabola of the mean risk over an axis of the fields, such as that of a stack of designs."""
        return jax.tree.map(lambda field: jnp.mean(field, axis), self)


class Combined(NamedTuple):
    """The best combination of K filters on a form: `form.optimal_combination(filters)`."""

    weights: Array  #: a (K,), after the axes of a stack of designs.
    risk: Array  #: R at these weights.


def excess_risks(
    theta: ArrayLike, problem: TwoTaskProblem, theta_1_star: ArrayLike, theta_2_star: ArrayLike
) -> Pair[Array]:
    """Both excess risks of given weights, for whoever trained them (docs, §1; the risks of paper 2506.01901).

        R_ft(θ) = ‖θ − θ₂*‖²_{Σ₂},      R_pre(θ) = ‖θ − θ₁*‖²_{Σ₁}

    Args:
        theta: weights (…, p).
        problem: its covariances are used, nothing else.
        theta_1_star: pretraining optimum (…, p); zero in `linfit.sample_task`.
        theta_2_star: fine-tuning optimum (…, p).

    Leading axes broadcast. Raises ValueError for sizes that differ, NaN or Inf.

    >>> from linfit import FixedShift, TwoTaskProblem, excess_risks
    >>> problem = TwoTaskProblem([1.0, 1.0], [2.0, 1.0], FixedShift([1.0, 0.0]), noise_std=0.1)
    >>> excess_risks([[0.0, 0.0], [1.0, 2.0]], problem, theta_1_star=[0.0, 0.0], theta_2_star=[1.0, 0.0])
    Pair(finetune=Array([2., 4.], dtype=float64), pretrain=Array([0., 5.], dtype=float64))
    """
    vectors = {"theta": theta, "theta_1_star": theta_1_star, "theta_2_star": theta_2_star}
    arrays = [real_array(name, value) for name, value in vectors.items()]
    for name, array in zip(vectors, arrays):
        if array.shape[-1:] != (problem.p,):
            raise ValueError(f"{name} must have shape (…, p) with the problem's p = {problem.p}, got {array.shape}")
        broadcastable(name, array.shape, "theta", arrays[0].shape)
    theta, first, second = arrays
    finetune = problem.finetune_covariance.squared_norm(theta - second)
    return Pair(finetune, problem.pretrain_covariance.squared_norm(theta - first))


_ADDITIVE = ("constant", "linear", "bias_quadratic", "noise_gain")


class RiskForm(eqx.Module):
    """R(g) = c − 2b·g + gᵀBg + σ² Σ q_i g_i² for one test domain (docs, S2–S3).

    Call with a filter (or its values g) and an ensemble coefficient τ; the axes of both broadcast, those of a stack of
    designs come in front. Forms of the same design add up and scale: `forms.finetune + kappa * forms.pretrain` is the
    combined objective (docs, O5).
    """

    eigenvalues: Array  #: s (n,), ascending.
    constant: Array  #: c = R(0), the risk of the pretrained weights.
    linear: Array  #: b (n,).
    bias_quadratic: Array  #: B (n, n).
    noise_gain: Array  #: q (n,), the variance per σ² and g².
    noise_std: Array  #: σ; `with_noise_std` replaces it at no cost.

    def __call__(self, filter: Filter | ArrayLike, tau: ArrayLike = 1.0) -> Risk:
        """Bias² and variance of the ensemble θ_τ = (1−τ)θ₁ + τθ̂.

        >>> from linfit import GradientFlow, aligned_problem, risk_forms
        >>> form = risk_forms([[1.0, 2.0]], aligned_problem([2.0, 1.0])).finetune
        >>> form(GradientFlow([1.0, 10.0]), tau=[[0.0], [0.5], [1.0]]).total.shape
        (3, 2)
        """
        tau = real_array("tau", tau)

        def risk(form: RiskForm, filter: Filter | ArrayLike) -> Risk:
            g = form._values(filter)
            broadcastable("tau", tau.shape, "the hyperparameters of the filter", g.shape[:-1])
            return _evaluate(form, g, tau)

        return self._over_designs(risk, filter)

    def along(self, filter: Filter | ArrayLike) -> Parabola:
        """The risk as a function of τ (docs, S3); fields of the shape of designs × the filter's hyperparameters."""
        return self._over_designs(lambda form, filter: _along(form, form._values(filter)), filter)

    def optimal_tau(self, filter: Filter | ArrayLike) -> Array:
        """τ* = b·g / gᵀHg, the best ensemble coefficient: that of `along(filter)` (docs, S3, O1)."""
        return self.along(filter).optimal_tau

    def oracle_filter(self) -> Tabulated:
        """g* = H⁻¹b, which no spectral method beats on this design (docs, S4). Values (…, n) in `.values`."""
        return self._over_designs(lambda form, _: Tabulated(form._oracle()))

    def oracle_risk(self) -> Array:
        """R(g*) = c − bᵀH⁻¹b, the lower bound of all spectral methods (docs, S4)."""
        return self._over_designs(lambda form, _: form.constant - form.linear @ form._oracle())

    def optimal_combination(self, filters: Sequence[Filter] | Filter | ArrayLike) -> Combined:
        """The best weights a (K,) of Σ a_k g_k and the risk there, by one small solve (docs, C1; ours).

            R(a) = c − 2aᵀ(Gb) + aᵀ(GHGᵀ)a,      G = (g_k(s))

        `filters` are K filters (or one with K hyperparameters, or values (K, n)). Filters that this form cannot tell
        apart, or whose difference is rounding noise, share their weight: of all best weights, in units in which every
        gᵀHg is 1, those of least norm. For a stack of designs each has its own. Use: `Combination(filters, weights)`.

        >>> from linfit import MinNorm, Ridge, RandomShift, TwoTaskProblem, risk_forms
        >>> problem = TwoTaskProblem([2.0, 1.0], [2.0, 1.0], RandomShift([1.0, 1.0]), noise_std=1.0)
        >>> form = risk_forms([[1.0, 1.0], [0.0, 1.0]], problem).finetune
        >>> best = form.optimal_combination([MinNorm(), Ridge(0.1)])   # n = 2 filters span all filters
        >>> bool(jnp.isclose(best.risk, form.oracle_risk()))
        True
        """
        return self._over_designs(lambda form, filter: _best_weights(form, form._values(filter)), _stacked(filters))

    def with_noise_std(self, noise_std: ArrayLike) -> "RiskForm":
        """The same design at another noise level σ ≥ 0, a number (or one per design of a stack)."""
        noise_std = non_negative("noise_std", noise_std)
        if noise_std.shape not in ((), self.noise_std.shape):
            raise ValueError(f"noise_std must be a number, got shape {noise_std.shape}; use jax.vmap for several")
        return dataclasses.replace(self, noise_std=jnp.broadcast_to(noise_std, self.noise_std.shape))

    def __add__(self, other: "RiskForm") -> "RiskForm":
        if not isinstance(other, RiskForm):
            return NotImplemented
        for name in ("eigenvalues", "noise_std"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if is_concrete(ours, theirs) and not np.array_equal(ours, theirs):
                raise ValueError(f"forms must have the same design and noise level to be added; their {name} differ")
        return dataclasses.replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _ADDITIVE})

    def __mul__(self, weight: ArrayLike) -> "RiskForm":
        weight = real_array("weight", weight, ndim=0)
        return dataclasses.replace(self, **{name: weight * getattr(self, name) for name in _ADDITIVE})

    __rmul__ = __mul__
    __array_ufunc__ = None  # so that `numpy_scalar * form` comes here

    def _over_designs(self, function, filter=None):  # type: ignore[no-untyped-def]
        """function(form, filter) for every design of a stack; values g of the same stack go with their design."""
        stack = self.constant.shape
        with_design = not isinstance(filter, Filter) or isinstance(filter, Tabulated)
        with_design = with_design and np.shape(filter)[: len(stack)] == stack
        for _ in stack:
            function = eqx.filter_vmap(function, in_axes=(eqx.if_array(0), eqx.if_array(0) if with_design else None))
        return function(self, filter)

    def _values(self, filter: Filter | ArrayLike) -> Array:
        g = filter(self.eigenvalues) if isinstance(filter, Filter) else real_array("filter", filter)
        same_size("filter values", g.shape[-1], "the eigenvalues", self.eigenvalues.shape[-1])
        return g

    def _oracle(self) -> Array:
        noise = self.noise_std**2 * self.noise_gain
        return solve_semidefinite(self.bias_quadratic + jnp.diag(noise), self.linear)


def _stacked(filters: Sequence[Filter] | Filter | ArrayLike) -> Filter | ArrayLike:
    """K filters as one."""
    if isinstance(filters, Sequence) and all(isinstance(filter, Filter) for filter in filters):
        if not filters:
            raise ValueError("filters must hold at least one filter, got none")
        return Several(tuple(filters))
    return filters  # type: ignore[return-value]


# R(a) − R(g*) = ‖Gᵀa − g*‖²_H. With H = FᵀF this is least squares, F Gᵀa ≈ F⁻ᵀb, which loses half as many digits to
# filters that are alike as its normal equations do. As in `solve_semidefinite` the coordinates are scaled first, so
# that H has a unit diagonal: its entries fall like s², far below the rounding of the largest.
def _best_weights(form: RiskForm, G: Array) -> Combined:
    if G.ndim != 2:
        raise ValueError(f"filters must be K filters, with g of shape (K, n), got shape {G.shape}")
    H = form.bias_quadratic + jnp.diag(form.noise_std**2 * form.noise_gain)
    scale = jnp.sqrt(jnp.where(jnp.diagonal(H) > 0, jnp.diagonal(H), 1))
    values, vectors = jnp.linalg.eigh(H / scale / scale[:, None])
    kept = values > rank_cutoff(values)
    root = jnp.sqrt(jnp.where(kept, values, 1))
    goal = jnp.where(kept, vectors.T @ (form.linear / scale) / root, 0)
    columns = jnp.where(kept[:, None], root[:, None] * (vectors.T @ (scale[:, None] * G.T)), 0)  # (n, K)
    norms = jnp.linalg.norm(columns, axis=0)
    norms = jnp.where(norms > 0, norms, 1)
    cutoff = max(G.shape) * float(jnp.finfo(columns.dtype).eps)
    weights = jnp.linalg.lstsq(columns / norms, goal, rcond=cutoff)[0] / norms
    return Combined(weights, _along(form, weights @ G)(1.0).total)


def _along(form: RiskForm, g: Array) -> Parabola:
    bias, variance = jnp.sum((g @ form.bias_quadratic) * g, axis=-1), form.noise_std**2 * (g**2 @ form.noise_gain)
    return Parabola(*jnp.broadcast_arrays(form.constant, g @ form.linear, bias, variance))


@jax.jit
def _evaluate(form: RiskForm, g: Array, tau: Array) -> Risk:
    return _along(form, g)(tau)
