"""The two-task problem: where the model was pretrained, where it is fine-tuned, and the shift between them.

Notation (docs, §0): pretraining covariance Σ₁ and optimum θ₁*; fine-tuning covariance Σ₂ and optimum θ₂*;
labels y = Xθ₂* + ε, Var ε = σ². The pretrained weights are θ₁ = θ₁* + u, the task shift is δ = θ₂* − θ₁*,
and what fine-tuning has to learn is the gap Δ = θ₂* − θ₁ = δ − u.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from linfit import spectra
from linfit.covariance import Covariance, as_covariance
from linfit.internal.checks import ArrayLike, is_concrete, non_negative, real_array, same_size


class RandomShift(eqx.Module):
    """δ random with mean 0 and covariance Ω, given as (p,) or (p, p) or a covariance.

    >>> from linfit import RandomShift
    >>> RandomShift([0.5, 0.5]).covariance.size
    2
    """

    covariance: Covariance

    def __init__(self, covariance: Covariance | ArrayLike):
        self.covariance = as_covariance(covariance, "shift covariance")

    @property
    def size(self) -> int:
        """p."""
        return self.covariance.size


class FixedShift(eqx.Module):
    """δ a given vector (p,).

    >>> from linfit import FixedShift
    >>> FixedShift([1, 2]).vector
    Array([1., 2.], dtype=float64)
    """

    vector: Array

    def __init__(self, vector: ArrayLike):
        self.vector = real_array("shift vector", vector, ndim=1)

    @property
    def size(self) -> int:
        """p."""
        return self.vector.shape[-1]


class TwoTaskProblem(eqx.Module):
    """Pretraining (Σ₁, θ₁*), fine-tuning (Σ₂, θ₂*, σ) and the shift between their optima.

    Covariances are eigenvalues (p,), matrices (p, p), or `linfit.Empirical(features)`; `shift` is a
    `RandomShift` or `FixedShift`; `noise_std` is σ ≥ 0; `pretrain_error` is u = θ₁ − θ₁* (p,), zero if None.

    Risks are excess risks: R_ft(θ) = ‖θ−θ₂*‖²_{Σ₂}, R_pre(θ) = ‖θ−θ₁*‖²_{Σ₁}, in squared units of y.
    Raises ValueError for sizes that differ, NaN or Inf, or a negative σ.

    >>> from linfit import TwoTaskProblem, RandomShift, spectra
    >>> spectrum = spectra.power_law(100, 1.0)
    >>> TwoTaskProblem(spectrum, spectrum, RandomShift(spectra.isotropic(100)), noise_std=0.3).p
    100
    """

    pretrain_covariance: Covariance
    finetune_covariance: Covariance
    shift: RandomShift | FixedShift
    noise_std: Array
    pretrain_error: Array | None

    def __init__(
        self,
        pretrain_covariance: Covariance | ArrayLike,
        finetune_covariance: Covariance | ArrayLike,
        shift: RandomShift | FixedShift,
        noise_std: ArrayLike,
        pretrain_error: ArrayLike | None = None,
    ):
        self.pretrain_covariance = as_covariance(pretrain_covariance, "pretrain_covariance")
        self.finetune_covariance = as_covariance(finetune_covariance, "finetune_covariance")
        p = self.finetune_covariance.size
        same_size("pretrain_covariance", self.pretrain_covariance.size, "finetune_covariance", p)
        if not isinstance(shift, RandomShift | FixedShift):
            raise ValueError(f"shift must be linfit.RandomShift or linfit.FixedShift, got {type(shift).__name__}")
        same_size("shift", shift.size, "finetune_covariance", p)
        self.shift = shift
        self.noise_std = non_negative("noise_std", noise_std, ndim=0)
        if pretrain_error is not None:
            pretrain_error = real_array("pretrain_error", pretrain_error, ndim=1)
            same_size("pretrain_error", pretrain_error.shape[0], "finetune_covariance", p)
        self.pretrain_error = pretrain_error

    @property
    def p(self) -> int:
        """Number of features."""
        return self.finetune_covariance.size

    @property
    def gap_mean(self) -> Array | None:
        """m = E Δ: −u for a random shift, δ − u for a fixed one; None where it is exactly zero."""
        u = self.pretrain_error
        if isinstance(self.shift, FixedShift):
            return self.shift.vector if u is None else self.shift.vector - u
        return None if u is None else -u

    @property
    def gap_covariance(self) -> Covariance | None:
        """Cov Δ = Ω, None for a fixed shift. The second moment of the gap is S = Ω + mmᵀ."""
        return self.shift.covariance if isinstance(self.shift, RandomShift) else None


def power_law_problem(
    p: int,
    decay: ArrayLike = 1.0,
    *,
    alignment: ArrayLike = 0.0,
    noise_variance: ArrayLike = 0.5,
    pretrain_decay: ArrayLike | None = None,
    pretrain_risk: ArrayLike = 0.0,
) -> TwoTaskProblem:
    """The test bed of the figures: power-law spectra and a random shift of given alignment (ours).

        Σ₂ = diag(j^−decay),  Σ₁ = diag(j^−pretrain_decay),  Ω ∝ Σ₂^alignment with tr ΩΣ₂ = 1,

    so the pretrained weights of a perfectly pretrained model have fine-tuning risk 1. `alignment` is −1 for a shift in
    the tail of the spectrum, 0 for an isotropic one, +1 for one along the head. `noise_variance` is σ².
    `pretrain_risk` is R_pre(θ₁) = uᵀΣ₁u of the pretrained weights, u of equal size and alternating sign in every
    direction. Raises ValueError for p < 1 or negative decays, variances or risks.

    >>> from linfit import power_law_problem
    >>> problem = power_law_problem(50, alignment=-1.0, pretrain_risk=0.2)
    >>> u = problem.pretrain_error
    >>> round(float(u @ problem.pretrain_covariance.apply(u)), 6)
    0.2
    """
    finetune = spectra.power_law(p, decay)
    pretrain = finetune if pretrain_decay is None else spectra.power_law(p, pretrain_decay)
    noise_variance = non_negative("noise_variance", noise_variance, ndim=0)
    pretrain_risk = non_negative("pretrain_risk", pretrain_risk, ndim=0)
    spread = finetune ** real_array("alignment", alignment, ndim=0)
    u = None
    if not is_concrete(pretrain_risk) or pretrain_risk > 0:
        signs = 1.0 - 2.0 * (jnp.arange(p) % 2)
        u = signs * jnp.sqrt(pretrain_risk / pretrain.sum())
    shift = RandomShift(spread / jnp.vdot(spread, finetune))
    return TwoTaskProblem(pretrain, finetune, shift, jnp.sqrt(noise_variance), u)
