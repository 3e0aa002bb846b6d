"""Overadaptation: when, and by how much, averaging with the pretrained weights helps (docs, O1–O5).

Everything here is read off a `RiskForm`, that is, conditional on the design; a form that holds a stack of designs
stands for their average, with one hyperparameter tuned for all of them. The setting is that of paper 2506.01901; the
formulas are ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from linfit import Filter, GradientFlow, MinNorm, Pair, Ridge, RiskForm
from theory.optimum import minimise_over_logarithm

__all__ = ["bayes_penalty", "best_of_each_method", "combined", "overadaptation_condition"]


class Condition(NamedTuple):
    """Overadaptation (τ* < 1) happens exactly where `missed_signal < fitted_noise`."""

    missed_signal: Array
    """b·g − gᵀBg; for min-norm tr(ΠS(I−Π)Σ₂), Π the projector on the rows of X."""
    fitted_noise: Array
    """σ² Σ q_i g_i²; for min-norm σ² tr(AᵀΣ₂A), A = Xᵀ(XXᵀ)⁻¹."""

    @property
    def overadapted(self) -> Array:
        """Whether τ* < 1."""
        return self.missed_signal < self.fitted_noise


def overadaptation_condition(form: RiskForm, filter: Filter | None = None) -> Condition:
    """The two sides of τ* < 1 (docs, O1; ours), for min-norm unless another filter is given.

        τ* = b·g / gᵀHg < 1   ⇔   b·g − gᵀBg < σ² Σ q_i g_i²

    For a shift covariance S ∝ I and min-norm the left side is 0: any noise at all makes averaging help.

    >>> from linfit import RandomShift, TwoTaskProblem, risk_forms, sample_design, spectra
    >>> spectrum = spectra.power_law(60)
    >>> problem = TwoTaskProblem(spectrum, spectrum, RandomShift(spectra.isotropic(60)), noise_std=0.01)
    >>> X = sample_design(jax.random.key(0), problem.finetune_covariance, 20)
    >>> condition = overadaptation_condition(risk_forms(X, problem).finetune)
    >>> bool(abs(condition.missed_signal) < 1e-12), bool(condition.overadapted)
    (True, True)
    """
    parabola = form.along(MinNorm() if filter is None else filter)
    return Condition(parabola.slope - parabola.bias, parabola.variance)


def combined(forms: Pair[RiskForm], weight: ArrayLike) -> RiskForm:
    """R_ft + κ R_pre as one form, so that its best τ and oracle are available too (docs, O5; ours).

    >>> from linfit import FixedShift, TwoTaskProblem, risk_forms
    >>> problem = TwoTaskProblem([1.0, 1.0], [1.0, 1.0], FixedShift([1.0, 0.0]), noise_std=0.0)
    >>> forms = risk_forms(jnp.eye(2) * 2**0.5, problem)     # n = p: min-norm learns the task entirely
    >>> [round(float(combined(forms, weight).optimal_tau(MinNorm())), 6) for weight in (0.0, 1.0, 3.0)]
    [1.0, 0.5, 0.25]
    """
    return forms.finetune + weight * forms.pretrain


def bayes_penalty(noise_std: ArrayLike, shift_variance: ArrayLike, n: int) -> Array:
    """λ = σ²/(nω): for S = ωI ridge with this penalty is the Bayes estimator and the oracle filter (docs, O4; ours).

    >>> float(bayes_penalty(0.5, 2.0, 10))
    0.0125
    """
    return jnp.asarray(noise_std) ** 2 / (n * jnp.asarray(shift_variance))


class Optimum(NamedTuple):
    """The best a method can do: its hyperparameter (λ or t; NaN if it has none), τ, and the risk there."""

    hyperparameter: Array
    tau: Array
    risk: Array


@jax.jit
def best_of_each_method(form: RiskForm) -> dict[str, Optimum]:
    """Every method at its own optimum on one form, or on the average over a stack of designs (docs, O4; ours).

    "min-norm", "ridge" (λ), "early stopping" (gradient flow, t), each plain (τ = 1) and "+ ensemble" (best τ, of
    either sign and size), and "oracle", the lower bound of all spectral methods. λ and t are searched over twelve
    decades around the eigenvalues; an optimum at an end means that the limit (min-norm, or no fine-tuning) is best.
    Works under `jit` and `vmap`, e.g. over noise levels through `form.with_noise_std`.

    >>> from linfit import RandomShift, TwoTaskProblem, risk_forms, sample_design, spectra
    >>> flat = spectra.isotropic(60)
    >>> problem = TwoTaskProblem(flat, flat, RandomShift(flat), noise_std=2.0)
    >>> X = sample_design(jax.random.key(0), problem.finetune_covariance, 20)
    >>> best = best_of_each_method(risk_forms(X, problem).finetune)
    >>> round(float(best["ridge"].hyperparameter), 4), float(bayes_penalty(2.0, 1.0, 20))
    (0.2, 0.2)
    >>> bool(jnp.isclose(best["ridge"].risk, best["oracle"].risk))
    True
    """
    scale = form.eigenvalues.max()
    none = jnp.full_like(scale, jnp.nan)

    def at(filter: Filter, ensembled: bool) -> tuple[Array, Array]:
        """τ and the risk there."""
        parabola = form.along(filter).mean(tuple(range(form.constant.ndim)))
        if ensembled:
            return parabola.optimal_tau, parabola.optimal_risk
        return jnp.ones_like(parabola.slope), parabola(1.0).total

    def tuned(family: Callable[[Array], Filter], unit: Array, ensembled: bool) -> Optimum:
        minimum = minimise_over_logarithm(lambda value: at(family(value), ensembled)[1], 1e-8 * unit, 1e4 * unit)
        return Optimum(minimum.argument, at(family(minimum.argument), ensembled)[0], minimum.value)

    best = {}
    for suffix, ensembled in (("", False), (" + ensemble", True)):
        best[f"min-norm{suffix}"] = Optimum(none, *at(MinNorm(), ensembled))
        best[f"ridge{suffix}"] = tuned(Ridge, scale, ensembled)
        best[f"early stopping{suffix}"] = tuned(GradientFlow, 1e4 / scale, ensembled)
    return best | {"oracle": Optimum(none, jnp.ones_like(scale), form.oracle_risk().mean())}
