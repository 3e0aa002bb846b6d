"""Adversarial fine-tuning in the population: ridge, with a penalty that sets itself (docs, C4; ours).

With d = θ − θ₁ and Gaussian residuals of variance v = ‖Δ−d‖²_Σ + σ², E|r| = c√v, c = √(2/π), so that

    E(|r| + ε‖d‖)² = v + 2cε√v‖d‖ + ε²‖d‖².

Its gradient vanishes where Σ(Δ−d) = λd, ridge, with λ = ε(ε + c√v/‖d‖)/(1 + cε‖d‖/√v). That is a quadratic in ε for
given λ: every ridge solution is the adversarial one of a radius known in closed form.
"""

import jax.numpy as jnp
from jax import Array

from linfit.internal.checks import ArrayLike, broadcastable, non_negative, positive

__all__ = ["equivalent_radius"]


def equivalent_radius(penalty: ArrayLike, distance: ArrayLike, residual_std: ArrayLike) -> Array:
    """ε at which adversarial fine-tuning ends where ridge λ does, in the Gaussian population (docs, C4; ours).

        ε = −b + √(b² + λ),    b = c(√v/‖d‖ − λ‖d‖/√v)/2,    c = √(2/π)

    Args:
        penalty: λ ≥ 0, of ridge d = (Σ+λ)⁻¹ΣΔ.
        distance: ‖d‖ > 0, Euclidean, of that solution.
        residual_std: √v > 0, v = ‖Δ−d‖²_Σ + σ².

    They broadcast. As λ → ∞, ε rises to ‖ΣΔ‖/(c√v₀) (`linfit.robust.largest_radius` in the population) and no further.

    >>> from theory.robust import equivalent_radius
    >>> round(float(equivalent_radius(1.0, 0.5, (0.5**2 + 0.1) ** 0.5)), 4)        # Σ = 1, Δ = 1, σ² = 0.1
    0.8742
    """
    penalty, distance = non_negative("penalty", penalty), positive("distance", distance)
    std = positive("residual_std", residual_std)
    broadcastable("distance", distance.shape, "penalty", penalty.shape)
    half = (2 / jnp.pi) ** 0.5 * (std / distance - penalty * distance / std) / 2
    root = jnp.sqrt(half**2 + penalty)
    # the same root, written so that nothing cancels
    return jnp.where(half > 0, penalty / jnp.where(half > 0, half + root, 1), root - half)
