"""The two-task problem: where the model was pretrained, where it is fine-tuned, and the shift between them.

Notation (docs, §0): pretraining covariance Σ₁ and optimum θ₁*; fine-tuning covariance Σ₂ and optimum θ₂*; labels
y = Xθ₂* + ε, Var ε = σ². The pretrained weights are θ₁ = θ₁* + u, the shift is δ = θ₂* − θ₁*, the gap, which
fine-tuning has to learn, Δ = θ₂* − θ₁ = δ − u. Risks are excess risks, R_ft(θ) = ‖θ−θ₂*‖²_{Σ₂} and
R_pre(θ) = ‖θ−θ₁*‖²_{Σ₁}, in squared units of y.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from linfit.covariance import Covariance, as_covariance, trace_of_product
from linfit.internal.checks import ArrayLike, is_concrete, non_negative, real_array, same_size

__all__ = ["FixedShift", "Pair", "RandomShift", "TwoTaskProblem", "aligned_problem"]

T = TypeVar("T")
U = TypeVar("U")


class Pair(NamedTuple, Generic[T]):
    """The same thing on both domains: fine-tuning first, pretraining second, everywhere.

    >>> from linfit import Pair
    >>> Pair(finetune=1.0, pretrain=2.0).map(lambda risk: risk / 2)
    Pair(finetune=0.5, pretrain=1.0)
    """

    finetune: T  #: On the fine-tuning domain (Σ₂, θ₂*).
    pretrain: T  #: On the pretraining domain (Σ₁, θ₁*).

    def map(self, function: "Callable[[T], U]") -> "Pair[U]":
        """The function of each."""
        return Pair(function(self.finetune), function(self.pretrain))


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

    Args:
        pretrain_covariance: Σ₁: eigenvalues (p,), a matrix (p, p), or `linfit.Empirical(features)`.
        finetune_covariance: Σ₂, likewise.
        shift: `RandomShift` or `FixedShift`.
        noise_std: σ ≥ 0, in units of y.
        pretrain_error: u = θ₁ − θ₁* (p,), zero if not given.

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
    def pretrained_risks(self) -> Pair[Array]:
        """R_ft(θ₁) = tr SΣ₂, averaged over a random shift, and R_pre(θ₁) = uᵀΣ₁u."""
        finetune = pretrain = jnp.zeros((), self.finetune_covariance.dtype)
        if self.gap_covariance is not None:
            finetune += trace_of_product(self.gap_covariance, self.finetune_covariance)
        if self.gap_mean is not None:
            finetune += self.finetune_covariance.squared_norm(self.gap_mean)
        if self.pretrain_error is not None:
            pretrain += self.pretrain_covariance.squared_norm(self.pretrain_error)
        return Pair(finetune, pretrain)

    @property
    def gap_covariance(self) -> Covariance | None:
        """Cov Δ = Ω, None for a fixed shift. The second moment of the gap is S = Ω + mmᵀ."""
        return self.shift.covariance if isinstance(self.shift, RandomShift) else None


def aligned_problem(
    spectrum: ArrayLike,
    *,
    alignment: ArrayLike = 0.0,
    noise_std: ArrayLike = 0.7,
    pretrain_spectrum: ArrayLike | None = None,
    pretrain_risk: ArrayLike = 0.0,
) -> TwoTaskProblem:
    """The test bed: given spectra, a random shift of given alignment, pretrained weights of given risk (ours).

        Σ₂ = diag(spectrum),  Σ₁ = diag(pretrain_spectrum),  Ω ∝ Σ₂^alignment with tr ΩΣ₂ = 1

    so a perfectly pretrained model has fine-tuning risk 1, and the signal-to-noise ratio is 1/σ².

    Args:
        spectrum: eigenvalues (p,) ≥ 0 of the fine-tuning covariance, such as `spectra.power_law(p)`.
        alignment: −1 puts the shift in the tail of the spectrum, 0 is isotropic, +1 puts it along the head.
        noise_std: σ ≥ 0, in units of y.
        pretrain_spectrum: eigenvalues (p,) of the pretraining covariance; those of `spectrum` if not given. For one of
            equal trace: `spectra.power_law(p, decay, trace=spectrum.sum())`.
        pretrain_risk: R_pre(θ₁) = uᵀΣ₁u ≥ 0, with u of equal size and alternating sign in every direction.

    Raises ValueError for spectra of different lengths, negative values, NaN or Inf.

    >>> from linfit import aligned_problem, spectra
    >>> problem = aligned_problem(spectra.power_law(50), alignment=-1.0, pretrain_risk=0.2)
    >>> [round(float(risk), 6) for risk in problem.pretrained_risks]
    [1.2, 0.2]
    """
    finetune = non_negative("spectrum", spectrum, ndim=1)
    pretrain = finetune if pretrain_spectrum is None else non_negative("pretrain_spectrum", pretrain_spectrum, ndim=1)
    pretrain_risk = non_negative("pretrain_risk", pretrain_risk, ndim=0)
    spread = finetune ** real_array("alignment", alignment, ndim=0)
    signs = 1.0 - 2.0 * (jnp.arange(pretrain.size) % 2)
    perfect = is_concrete(pretrain_risk) and pretrain_risk == 0
    u = None if perfect else signs * jnp.sqrt(pretrain_risk / pretrain.sum())
    return TwoTaskProblem(pretrain, finetune, RandomShift(spread / jnp.vdot(spread, finetune)), noise_std, u)
