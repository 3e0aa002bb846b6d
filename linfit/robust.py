"""Adversarial fine-tuning: squared loss at the worst inputs within a distance (docs, C4; ours).

The adversary moves every input, ‖x' − x‖ ≤ ε, and its label by what the pretrained model says of the move, so that only
d = θ − θ₁ can be attacked (θ₁ = 0: all of θ, the usual setting). With r = y − xᵀθ the residual becomes
r − (x' − x)ᵀd, whose largest square is

    max (r − hᵀd)² = (|r| + ε‖d‖)²      at h = −ε sign(r) d/‖d‖.

The mean over samples is convex in d. Its minimum has no closed form, but (|r| + ε‖d‖)² = min over 0 < η < 1 of
r²/η + ε²‖d‖²/(1−η), at η = |r|/(|r| + ε‖d‖): weighted ridge, reweighted until it stays (the known η-trick). Through the
dual, d = Xᵀα with (XXᵀ + nλ diag(η))α = y − Xθ₁ and λ = ε² + ε·mean|r|/‖d‖, a residual of 0 is no division by 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from linfit.internal.checks import ArrayLike, broadcastable, count, non_negative, real_array
from linfit.internal.linear_algebra import gram
from linfit.solve import check_data

__all__ = ["adversarial_fine_tune", "adversarial_loss", "largest_radius"]


def adversarial_loss(X: ArrayLike, y: ArrayLike, theta: ArrayLike, theta_1: ArrayLike, radius: ArrayLike) -> Array:
    """(1/n) Σ (|y_i − x_iᵀθ| + ε‖θ−θ₁‖)², the mean squared error at the worst inputs within ε (docs, C4; ours).

    Args:
        X: design (n, p).
        y: labels (n,).
        theta: weights (…, p).
        theta_1: pretrained weights (p,), whose answers move along with the inputs.
        radius: ε ≥ 0, in units of x; broadcasts against the leading axes of theta.

    >>> from linfit.robust import adversarial_loss
    >>> float(adversarial_loss([[1.0, 0.0]], [2.0], [1.0, 0.0], [0.0, 0.0], 0.5))
    2.25
    """
    X, y, theta_1 = check_data(X, y, theta_1)
    theta, radius = real_array("theta", theta), non_negative("radius", radius)
    if theta.shape[-1:] != theta_1.shape:
        raise ValueError(f"theta must have shape (…, p) with p = {theta_1.size}, got {theta.shape}")
    broadcastable("radius", radius.shape, "theta", theta.shape[:-1])
    reach = radius * jnp.linalg.norm(theta - theta_1, axis=-1)
    return jnp.mean((jnp.abs(y - theta @ X.T) + reach[..., None]) ** 2, axis=-1)


def largest_radius(X: ArrayLike, y: ArrayLike, theta_1: ArrayLike) -> Array:
    """ε from which on θ₁ itself is best: ‖Xᵀr‖/Σ|r_i|, r = y − Xθ₁ ≠ 0 (docs, C4; ours).

    At θ₁ the loss grows at the rate 2ε·mean|r| in every direction, and falls at most at 2‖Xᵀr‖/n.

    >>> from linfit.robust import largest_radius
    >>> largest_radius([[3.0, 0.0], [0.0, 4.0]], [1.0, 1.0], [0.0, 0.0])
    Array(2.5, dtype=float64)
    """
    X, y, theta_1 = check_data(X, y, theta_1)
    residual = y - X @ theta_1
    return jnp.linalg.norm(residual @ X) / jnp.sum(jnp.abs(residual))


def adversarial_fine_tune(
    X: ArrayLike, y: ArrayLike, theta_1: ArrayLike, radius: ArrayLike, *, steps: int = 100
) -> Array:
    """Weights (…, p) of least `adversarial_loss` for radii ε (…), by iteratively reweighted ridge (docs, C4; ours).

    Every step costs one n × n solve per radius and never raises the loss. Converges linearly, slowly within a few per
    cent of `largest_radius`, from which on θ₁ is best. Of small radii n ≤ p independent samples are interpolated: up to
    ε = ‖d‖/(n·max|α|), d = Xᵀα the min-norm step, this is min-norm.

    Args:
        X: design (n, p).
        y: labels (n,).
        theta_1: pretrained weights (p,).
        radius: ε ≥ 0, in units of x; its axes come in front.
        steps: of reweighting.

    Raises ValueError for shapes that do not fit, NaN or Inf, a negative radius.

    >>> from linfit.robust import adversarial_fine_tune
    >>> adversarial_fine_tune([[2.0, 0.0]], [3.0], [0.0, 5.0], [0.0, 1.0, 2.5]).round(4)
    Array([[1.5, 5. ],
           [1.5, 5. ],
           [0. , 5. ]], dtype=float64)
    """
    X, y, theta_1 = check_data(X, y, theta_1)
    if y.ndim != 1:
        raise ValueError(f"y must be (n,), got shape {y.shape}")
    radius, steps = non_negative("radius", radius).astype(X.dtype), count("steps", steps)
    dual = _reweight(gram(X), y - X @ theta_1, radius.ravel(), largest_radius(X, y, theta_1), steps)
    return theta_1 + (dual @ X).reshape(*radius.shape, -1)


@partial(jax.jit, static_argnames="steps")
def _reweight(kernel: Array, residual: Array, radius: Array, largest: Array, steps: int) -> Array:
    """α (radii, n)."""
    n, ridge = len(residual), jnp.finfo(kernel.dtype).eps * jnp.trace(kernel)

    def solve(damping: Array) -> Array:
        system = kernel + jnp.diag(damping + ridge)
        return jax.scipy.linalg.solve(system, residual, assume_a="pos")

    def at(radius: Array) -> Array:
        def step(_: int, dual: Array) -> Array:
            image = kernel @ dual
            missed, reach = jnp.abs(residual - image), radius * jnp.sqrt(jnp.maximum(dual @ image, 0))
            safe = jnp.where(reach > 0, reach, 1)
            penalty = radius**2 * (1 + jnp.mean(missed) / safe)
            return jnp.where(reach > 0, solve(n * penalty * missed / (missed + safe)), dual)

        start = solve(jnp.full(n, n * radius**2))
        return jnp.where(radius >= largest, 0, jax.lax.fori_loop(0, steps, step, start))

    return jax.lax.map(at, radius)
