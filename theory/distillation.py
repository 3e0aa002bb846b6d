"""Self-distillation: a student of the model's own answers, and how far to trust them (docs, C2; ours).

Teacher and student are ridge λ from θ₁ on the same n samples; the student's labels are (1−ξ)y + ξXθ̂. The teacher's
answers are U diag(s/(s+λ))Uᵀ(y − Xθ₁) beyond Xθ₁, so that the student is the filter

    g_ξ = [(1−ξ) + ξ s/(s+λ)]/(s+λ) = 1/(s+λ) − ξλ/(s+λ)² = g_λ + ξλ ∂g_λ/∂λ.

A risk is quadratic in the filter (docs, S2), and its first-order term along λ∂g_λ/∂λ is λR′(λ):

    R(ξ) = R(λ) + ξλR′(λ) + ξ²λ²D,    D = ∂gᵀH∂g,    ξ* = −R′(λ)/(2λD),    R(λ) − R(ξ*) = R′(λ)²/(4D).

So distillation gains nothing where R′ = 0, as at the best λ, and something wherever R′ ≠ 0. Where more penalty would
help, R′ < 0, ξ* is positive: the student is regularised more strongly. Where less would help ξ* is negative: the
student moves away from the teacher.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from linfit import Ridge, RiskForm
from linfit.internal.checks import ArrayLike, non_negative

__all__ = ["optimal_mix"]


class BestMix(NamedTuple):
    """The best share of the teacher's answers; fields have the shape of the penalties."""

    mix: Array
    """ξ*, of either sign; 0 where the answers of the teacher change nothing (λ = 0 or ∞)."""
    gain: Array
    """R(λ) − R(ξ*) = R′²/(4D) ≥ 0."""
    risk: Array
    """R(ξ*)."""


def optimal_mix(form: RiskForm, penalty: ArrayLike) -> BestMix:
    """ξ* = −R′(λ)/(2λD) and what it gains over the teacher (docs, C2; ours, agrees with arXiv 2602.17565).

    `form` is that of a design, or of a stack for the mean over its designs, on either domain or both
    (`forms.finetune + kappa * forms.pretrain`). `penalty` λ ≥ 0 has any shape. Without designs:
    `theory.equivalents.risk(problem, n, SelfDistillation(penalty, mix))`. Raises ValueError for a negative or NaN λ.

    >>> from linfit import RandomShift, SelfDistillation, TwoTaskProblem, risk_forms, sample_design, spectra
    >>> from theory.distillation import optimal_mix
    >>> flat = spectra.isotropic(60)
    >>> problem = TwoTaskProblem(flat, flat, RandomShift(flat), noise_std=2.0)
    >>> form = risk_forms(sample_design(jax.random.key(0), flat, 20), problem).finetune
    >>> best = optimal_mix(form, [0.02, 0.2, 2.0])                # the best penalty is 0.2
    >>> (best.mix > 1e-6).tolist(), (best.mix < -1e-6).tolist()
    ([True, False, False], [False, False, True])
    >>> bool(jnp.allclose(form(SelfDistillation(2.0, best.mix[2])).total, best.risk[2]))
    True
    """
    penalty = non_negative("penalty", penalty, finite=False).astype(form.constant.dtype)
    finite = jnp.isfinite(penalty)
    flat = jnp.where(finite, penalty, 0).ravel()
    designs = tuple(range(form.constant.ndim))
    risk, slope = jax.jvp(lambda at: form(Ridge(at)).total.mean(designs), (flat,), (flat,))  # R(λ), λR′(λ)
    curvature = form.along(_Slope(flat)).mean(designs).curvature  # λ²D
    moves = curvature > 0
    mix = jnp.where(moves, -slope / jnp.where(moves, 2 * curvature, 1), 0)
    unlearned = jnp.mean(form.constant)
    gain = jnp.where(moves, slope**2 / jnp.where(moves, 4 * curvature, 1), 0)
    fields = (mix, gain, jnp.where(finite.ravel(), risk - gain, unlearned))
    return BestMix(*(field.reshape(penalty.shape) for field in fields))


class _Slope(Ridge):
    """λ∂g_λ/∂λ = −λ/(s+λ)²; 0 at λ = 0."""

    def __call__(self, eigenvalues: ArrayLike) -> Array:
        return -self.penalty[..., None] * super().__call__(eigenvalues) ** 2
