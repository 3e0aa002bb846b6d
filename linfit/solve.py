"""Fine-tuned weights θ̂: in closed form through a spectral filter, or iterated; and their interpolation."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from jax.scipy.linalg import solve_triangular

from linfit.filters import Ensemble, Filter, MinNorm
from linfit.internal.checks import (
    ArrayLike,
    Maybe,
    broadcastable,
    count,
    is_concrete,
    non_negative,
    positive,
    real_array,
    same_size,
)
from linfit.internal.linear_algebra import eigh, gram, rank_cutoff, svd

__all__ = ["fine_tune", "gradient_descent", "interpolate"]

Tree = TypeVar("Tree")


def check_data(X: ArrayLike, y: ArrayLike, theta_1: ArrayLike) -> tuple[Array, Array, Array]:
    """X (n, p), y (n,) or (n, k), theta_1 (p,) or (p, k), as floating arrays; ValueError if they do not fit."""
    X = real_array("X", X, ndim=2)
    y, theta_1 = real_array("y", y), real_array("theta_1", theta_1)
    if y.ndim not in (1, 2):
        raise ValueError(f"y must be (n,) or (n, k), got shape {y.shape}")
    same_size("y", y.shape[0], "the rows of X", X.shape[0])
    if theta_1.shape != (X.shape[1], *y.shape[1:]):
        raise ValueError(f"theta_1 must have shape {(X.shape[1], *y.shape[1:])}, got {theta_1.shape}")
    return X, y, theta_1


def _checked_weights(sample_weights: ArrayLike, X: Array) -> Array:
    weights = non_negative("sample_weights", sample_weights, ndim=1)
    same_size("sample_weights", weights.shape[0], "the rows of X", X.shape[0])
    return weights


def _weighted(X: Array, y: Array, sample_weights: Maybe) -> tuple[Array, Array]:
    """W^{1/2}X and W^{1/2}y: weighted least squares as ordinary least squares."""
    if sample_weights is None:
        return X, y
    root = jnp.sqrt(_checked_weights(sample_weights, X))
    return root[:, None] * X, root.reshape(-1, *[1] * (y.ndim - 1)) * y


def fine_tune(X: ArrayLike, y: ArrayLike, theta_1: ArrayLike, filter: Filter, sample_weights: Maybe = None) -> Array:
    """Fine-tuned weights in closed form: θ̂ = θ₁ + (1/n)XᵀU diag(g(s)) Uᵀ(y − Xθ₁) (docs, S1).

    Args:
        X: design (n, p).
        y: labels (n,), or (n, k) for k outputs.
        theta_1: pretrained weights (p,) or (p, k).
        filter: hyperparameter axes come in front of the result, (…, p) or (…, p, k). A `Tabulated` filter is tied to
            the n eigenvalues of its design and needs n ≤ p.
        sample_weights: w ≥ 0 (n,) of the loss (1/2n) Σ w_i r_i², not normalised: X and y become W^{1/2}X, W^{1/2}y and
            s the eigenvalues of W^{1/2}XXᵀW^{1/2}/n.

    Accuracy with weights. `MinNorm()`, or τ times it, finds the rank from X alone, so the smallest positive weight
    counts: where the rows of positive weight are independent it is the solution without weights (docs, F5), to the same
    digits; elsewhere weighted least squares, to about ε·w_max/w_min over the positive weights, often much better. Other
    filters see each s to about ε(s·s_max)^{1/2}; their limits `Ridge(0)` and `GradientFlow(∞)` drop s ≤ nε·s_max.

    Raises ValueError for shapes that do not fit, NaN or Inf, negative weights.

    >>> from linfit import MinNorm, fine_tune
    >>> fine_tune([[2.0, 0.0]], [3.0], [1.0, 5.0], MinNorm())
    Array([1.5, 5. ], dtype=float64)
    """
    X, y, theta_1 = check_data(X, y, theta_1)
    if not isinstance(filter, Filter):
        raise ValueError(f"filter must be a linfit filter such as Ridge(0.1), got {type(filter).__name__}")
    residual = y - X @ theta_1
    targets = residual if residual.ndim == 2 else residual[:, None]
    if sample_weights is None:
        step = _filtered(filter, *_through_gram(X, targets))
    else:
        weights = _checked_weights(sample_weights, X)
        step = _weighted_step(X, targets, weights, filter)
    return theta_1 + (step if residual.ndim == 2 else step[..., 0])


def _through_gram(X: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues s (k,), coefficients (k, m) and basis (p, k) of a step basis·(g(s)·coefficients), k = min(n, p)."""
    n, p = X.shape
    if n <= p:
        eigenvalues, vectors = eigh(gram(X) / n)
        return jnp.maximum(eigenvalues, 0), vectors.T @ targets / n, X.T @ vectors
    eigenvalues, vectors = eigh(gram(X.T) / n)  # the same through the smaller matrix XᵀX/n = V diag(s) Vᵀ
    return jnp.maximum(eigenvalues, 0), vectors.T @ (X.T @ targets) / n, vectors


def _filtered(filter: Filter, eigenvalues: Array, coefficients: Array, basis: Array) -> Array:
    return basis @ (filter(eigenvalues)[..., :, None] * coefficients)


def _weighted_step(X: Array, targets: Array, weights: Array, filter: Filter) -> Array:
    """θ̂ − θ₁ (…, p, m); by singular values, because weights squared into a kernel square its conditioning."""
    if isinstance(filter, Ensemble):
        step = _weighted_step(X, targets, weights, filter.filter)
        broadcastable("tau", filter.tau.shape, "the hyperparameters of the filter", step.shape[:-2])
        return filter.tau[..., None, None] * step
    if isinstance(filter, MinNorm):
        return _weighted_min_norm(X, targets, weights)
    root = jnp.sqrt(weights)[:, None]
    left, singular, right = svd(root * X)  # ascending, as eigenvalues are
    return _filtered(filter, singular**2 / len(X), singular[:, None] * (left.T @ (root * targets)) / len(X), right.T)


# Rows of weight 0 are no data. Of the others, XΔ = U z with z = SVᵀΔ and the rank r of X, whatever the weights: so
# Δ = VS⁻¹z, z minimises Σ w_i (t_i − (Uz)_i)², and where r is the number of rows U is square and z = Uᵀt.
@jax.jit
def _weighted_min_norm(X: Array, targets: Array, weights: Array) -> Array:
    """Δ (p, m) of least norm among the minimisers of Σ w_i (t_i − x_iᵀΔ)²."""
    counted = weights > 0
    rows, targets = jnp.where(counted[:, None], X, 0), jnp.where(counted[:, None], targets, 0)
    left, singular, right = svd(rows)
    kept = singular**2 > rank_cutoff(singular**2)
    root = jnp.sqrt(weights / jnp.maximum(jnp.max(weights), jnp.finfo(X.dtype).tiny))[:, None]
    # the directions that are not kept get a row of their own, which sets z to 0 there; heavy rows go first (Björck)
    heavy = jnp.argsort(-weights)
    system = jnp.concatenate([jnp.diag(jnp.where(kept, 0.0, 1.0).astype(X.dtype)), (root * left * kept)[heavy]])
    known = jnp.concatenate([jnp.zeros((len(kept), targets.shape[1]), X.dtype), (root * targets)[heavy]])
    orthogonal, triangular = jnp.linalg.qr(system)
    fitted = solve_triangular(triangular, orthogonal.T @ known)
    z = jnp.where(kept.sum() == counted.sum(), left.T @ targets, fitted)
    return right.T @ (jnp.where(kept, 1 / jnp.where(kept, singular, 1), 0)[:, None] * z)


def gradient_descent(
    X: ArrayLike, y: ArrayLike, theta_1: ArrayLike, *, step_size: ArrayLike, steps: int, sample_weights: Maybe = None
) -> Array:
    """Weights after k steps of gradient descent from θ₁ on (1/2n) Σ w_i r_i², r = y − Xθ.

        θ ← θ + (η/n) Xᵀ W (y − Xθ)

    Args:
        X, y, theta_1, sample_weights: as in `fine_tune`, whose closed form with `GradientDescent` this equals.
        step_size: η > 0, a number in units of 1/s.
        steps: k ≥ 0.

    Raises ValueError if η·s_max ≥ 2, where the iteration does not converge.

    >>> from linfit import gradient_descent
    >>> gradient_descent([[2.0, 0.0]], [3.0], [1.0, 5.0], step_size=0.125, steps=1)
    Array([1.25, 5.  ], dtype=float64)
    """
    X, y, theta_1 = check_data(X, y, theta_1)
    rows, target = _weighted(X, y, sample_weights)
    step_size, steps = positive("step_size", step_size, ndim=0), count("steps", steps, minimum=0)
    if is_concrete(rows, step_size):
        host, n, rate = np.asarray(rows), len(rows), float(step_size)
        # The trace bounds s_max from above and often settles it without an eigenvalue.
        if rate * np.vdot(host, host) / n >= 2:
            smaller = host @ host.T if n <= host.shape[1] else host.T @ host
            largest = float(scipy.linalg.eigvalsh(smaller / n, subset_by_index=[len(smaller) - 1] * 2)[0])
            if rate * largest >= 2:
                raise ValueError(f"step_size must be below 2/s_max = {2 / largest:.6g} on this data, got {rate}")
    return _descend(rows, target, theta_1, step_size, steps)


@jax.jit
def _descend(rows: Array, target: Array, theta: Array, step_size: Array, steps: int) -> Array:
    rate = (step_size / rows.shape[0]).astype(theta.dtype)
    return jax.lax.fori_loop(0, steps, lambda _, now: now + rate * (rows.T @ (target - rows @ now)), theta)


def interpolate(theta_1: Tree, theta_2: Tree, tau: ArrayLike) -> Tree:
    """θ_τ = (1−τ)θ₁ + τθ₂ on any pytree of arrays; τ = 0 is theta_1, τ = 1 is theta_2, both exactly.

    Args:
        theta_1, theta_2: pytrees of one structure and shapes; ValueError otherwise.
        tau: a finite number, inside or outside [0, 1].

    >>> from linfit import interpolate
    >>> interpolate({"head": jnp.array([0.0, 2.0])}, {"head": jnp.array([1.0, 4.0])}, 0.25)
    {'head': Array([0.25, 2.5 ], dtype=float64)}
    """
    tau = real_array("tau", tau, ndim=0)
    structures = [str(jax.tree.structure(tree)) for tree in (theta_1, theta_2)]
    if structures[0] != structures[1]:
        raise ValueError(f"theta_2 must have the structure of theta_1, {structures[0]}, got {structures[1]}")

    def leaf(a: ArrayLike, b: ArrayLike) -> Array:
        a, b = real_array("theta_1", a), real_array("theta_2", b)
        if a.shape != b.shape:
            raise ValueError(f"theta_2 must have the shapes of theta_1: {a.shape}, got {b.shape}")
        dtype = jnp.result_type(a, b)
        weight = tau.astype(jnp.promote_types(dtype, jnp.float32))  # half precision is rounded once, at the end
        return ((1 - weight) * a + weight * b).astype(dtype)

    return jax.tree.map(leaf, theta_1, theta_2)
