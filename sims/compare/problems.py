"""The problems on which methods are compared (ours)."""

from linfit import TwoTaskProblem, aligned_problem, spectra

__all__ = ["compared_problem", "compared_problems"]

_ALIGNMENTS = {"tail shift": -1.0, "isotropic shift": 0.0, "head shift": 1.0}
_NOISE_STDS = {"low noise": 0.05**0.5, "high noise": 1.0}


def compared_problem(p: int, alignment: float, noise_std: float) -> TwoTaskProblem:
    """Σ₂ = diag(1/j), Σ₁ ∝ diag(j^−½) of the same trace, Ω ∝ Σ₂^alignment with tr ΩΣ₂ = 1, R_pre(θ₁) = 0.1 (ours).

    Pretraining was broader than the new task: small directions of Σ₂ matter more to it.

    >>> from sims.compare import compared_problem
    >>> compared_problem(30, alignment=0.0, noise_std=0.2).p
    30
    """
    finetune = spectra.power_law(p)
    pretrain = spectra.power_law(p, 0.5, trace=finetune.sum())
    return aligned_problem(
        finetune, alignment=alignment, noise_std=noise_std, pretrain_spectrum=pretrain, pretrain_risk=0.1
    )


def compared_problems(p: int) -> dict[str, TwoTaskProblem]:
    """Six: the shift in the tail, isotropic, or along the head of the spectrum; low noise (σ² = 0.05) and high (1)."""
    return {
        f"{shift}, {noise}": compared_problem(p, alignment, noise_std)
        for shift, alignment in _ALIGNMENTS.items()
        for noise, noise_std in _NOISE_STDS.items()
    }
