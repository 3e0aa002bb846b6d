"""Choosing (τ, λ) from the fine-tuning data alone: exact leave-one-out of an ensemble of ridge (docs, S5; ours).

With G = (XXᵀ + nλI)⁻¹ and r = y − Xθ₁, the model refitted without sample i, the penalty nλ held fixed, misses that
sample by (Gr)_i/G_ii. The ensemble moves only τ of the way from the pretrained residual r_i, so

    residual_i(τ, λ) = r_i − τ d_i(λ),    d_i = r_i − (Gr)_i / G_ii.

One eigendecomposition serves every (τ, λ), and for given λ the best τ is a least-squares coefficient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array

from linfit.filters import Ridge
from linfit.internal.checks import ArrayLike, Maybe, broadcastable, non_negative, real_array
from linfit.internal.linear_algebra import eigh, gram, rank_cutoff
from linfit.solve import check_data

__all__ = ["Selection", "default_penalties", "leave_one_out", "select"]


def leave_one_out(X: ArrayLike, y: ArrayLike, theta_1: ArrayLike, penalty: ArrayLike, tau: ArrayLike) -> Array:
    """Exact leave-one-out residuals y_i − x_iᵀθ_τ^{(−i)}, the penalty nλ held fixed (docs, S5; ours).

    Args:
        X: design (n, p).
        y: labels (n,), or (n, k) for k outputs.
        theta_1: pretrained weights (p,) or (p, k).
        penalty: λ ≥ 0; 0 is min-norm, exact also for dependent rows and for n > p.
        tau: broadcasts against λ, in front of the residuals.

    The mean square estimates R_ft + σ². Raises ValueError for shapes that do not fit, NaN or Inf, λ < 0, or n < 2.

    >>> from linfit import leave_one_out
    >>> leave_one_out([[1.0, 0.0], [1.0, 1.0]], [1.0, 3.0], [0.0, 0.0], penalty=0.0, tau=[0.0, 1.0])
    Array([[ 1. ,  3. ],
           [-0.5,  2. ]], dtype=float64)
    """
    X, y, theta_1 = check_data(X, y, theta_1)
    penalty, tau = non_negative("penalty", penalty), real_array("tau", tau)
    broadcastable("tau", tau.shape, "penalty", penalty.shape)
    residual = y - X @ theta_1
    learned = _leave_one_out_path(X, residual)(penalty)
    return residual - tau[(..., *[None] * residual.ndim)] * learned


def _leave_one_out_path(X: Array, residual: Array) -> Callable[[Array], Array]:
    """λ ↦ d(λ) = r − (Gr)_i/G_ii, (…, n) or (…, n, k), factored once."""
    n = X.shape[0]
    if n < 2:
        raise ValueError("X must have at least 2 rows to leave one out, got 1")
    s, U = eigh(gram(X) / n)
    null = s <= rank_cutoff(s)
    leverage = jnp.sum(U**2 * null, axis=1)
    dependent = leverage > n * jnp.finfo(leverage.dtype).eps
    null_ratio = _ratio(U, null.astype(U.dtype), residual)
    trailing = (None,) * (residual.ndim - 1)

    def learned(penalty: Array) -> Array:
        penalised = penalty[..., None] > 0
        denominator = jnp.where(penalised, jnp.maximum(s, 0) + penalty[..., None], jnp.where(null, 1, s))
        left_out = _ratio(U, jnp.where(penalised | ~null, 1 / denominator, 0), residual)
        # At λ = 0 with dependent rows, G blows up like Π₀/(nλ), Π₀ the projector on null directions, wherever row i
        # takes part in a dependence: there the ratio tends to (Π₀r)_i/(Π₀)_ii, elsewhere to the pseudo-inverse's.
        at_limit = (~penalised & dependent)[(..., *trailing)]
        return residual - jnp.where(at_limit, null_ratio, left_out)

    return learned


def _ratio(U: Array, weight: Array, residual: Array) -> Array:
    """(Gr)_i/G_ii for G = U diag(weight) Uᵀ."""
    diagonal = weight @ (U**2).T
    projected = U.T @ residual
    if residual.ndim == 1:
        return (weight * projected) @ U.T / diagonal
    return jnp.einsum("ij,...j,jk->...ik", U, weight, projected) / diagonal[..., None]


class Selection(NamedTuple):
    """Mean squared error over (λ, τ) and its minimum. Errors are one standard error over the n samples."""

    penalties: np.ndarray  #: λ (L,).
    taus: np.ndarray  #: τ (T,).
    mean_squared_error: np.ndarray  #: Estimate of R_ft + σ² (L, T).
    standard_error: np.ndarray  #: (L, T).
    indistinguishable: np.ndarray  #: Within one standard error (of the paired difference) of the minimum (L, T).
    best_penalty: float  #: λ at the minimum, refined between grid values.
    best_tau: float  #: τ at the minimum: exact for that λ, not limited to the grid.
    best_tau_error: float
    best_mean_squared_error: float
    best_standard_error: float
    pretrained_mean_squared_error: float  #: τ = 0.
    gain_over_full: float  #: MSE(τ = 1) − MSE(best τ), both at the best λ; positive means overadaptation.
    gain_over_full_error: float


def default_penalties(X: ArrayLike) -> np.ndarray:
    """0 and 60 values, evenly spaced in log λ, from 10⁻⁶ to 10² times the mean eigenvalue of XXᵀ/n."""
    rows = np.asarray(real_array("X", X, ndim=2))
    return np.append(0.0, np.vdot(rows, rows) / rows.shape[0] / min(rows.shape) * np.logspace(-6, 2, 60))


def select(
    X: ArrayLike,
    y: ArrayLike,
    theta_1: ArrayLike,
    penalties: Maybe = None,
    taus: Maybe = None,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
) -> Selection:
    """The error surface over (λ, τ) and its minimum, by leave-one-out or on validation data (docs, S5; ours).

    Args:
        X, y, theta_1: the fine-tuning data (n, p), (n,) and the pretrained weights (p,).
        penalties: λ ≥ 0, increasing; `default_penalties(X)` if not given.
        taus: 101 values in [0, 1.25] if not given.
        validation: (X_val, y_val) to measure on instead, the fit using all of X.

    Selection among many (λ, τ) makes the minimum itself slightly optimistic. Raises ValueError as `leave_one_out`.

    >>> import jax
    >>> from linfit import FixedShift, TwoTaskProblem, sample_task, select
    >>> problem = TwoTaskProblem([1.0] * 80, [1.0] * 80, FixedShift([0.5] * 80), noise_std=2.0)
    >>> task = sample_task(jax.random.key(0), problem, 40)
    >>> 0 < select(task.X, task.y, task.theta_1).best_tau < 1
    True
    """
    X, y, theta_1 = check_data(X, y, theta_1)
    if y.ndim != 1:
        raise ValueError(f"y must be (n,) to select on, got shape {y.shape}")
    penalties = jnp.atleast_1d(non_negative("penalties", default_penalties(X) if penalties is None else penalties))
    taus = jnp.atleast_1d(real_array("taus", jnp.linspace(0, 1.25, 101) if taus is None else taus))
    if penalties.ndim != 1 or taus.ndim != 1:
        raise ValueError(f"penalties and taus must be 1-d, got shapes {penalties.shape} and {taus.shape}")
    if (np.diff(penalties) <= 0).any():
        raise ValueError(f"penalties must be increasing, got {penalties}")

    residual = y - X @ theta_1
    if validation is None:
        return minimise(residual, _leave_one_out_path(X, residual), penalties, taus)
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise ValueError(f"validation must be a pair (X_val, y_val), got {type(validation).__name__}")
    try:
        X_val, y_val, _ = check_data(*validation, theta_1)
    except ValueError as error:
        raise ValueError(f"validation: {error}") from None
    if y_val.size < 2:
        raise ValueError("validation must have at least 2 samples for a standard error, got 1")
    s, U = eigh(gram(X) / len(X))
    coefficients, basis = U.T @ residual / len(X), X_val @ (X.T @ U)

    def learned(penalty: Array) -> Array:  # X_val(θ̂_λ − θ₁), (…, n_val)
        return (Ridge(penalty)(jnp.maximum(s, 0)) * coefficients) @ basis.T

    return minimise(y_val - X_val @ theta_1, learned, penalties, taus)


def minimise(residual: Array, learned: Callable[[Array], Array], penalties: Array, taus: Array) -> Selection:
    """The surface mean ‖r − τd(λ)‖² and its minimum: τ in closed form, log λ by Brent between grid neighbours.

    Residuals r (n,) or (n, k), d = learned(λ) of shapes (…, n) or (…, n, k).
    """
    n = residual.shape[0]

    def per_sample(values: Array) -> Array:  # Σ over the outputs, if there are several
        return values.sum(-1) if residual.ndim == 2 else values

    def best_tau_of(d: Array) -> float:
        moved = float(jnp.sum(d**2))
        return float(jnp.sum(residual * d)) / moved if moved > 0 else 0.0

    def profile(penalty: ArrayLike) -> float:
        d = learned(jnp.asarray(penalty))
        return float(jnp.sum((residual - best_tau_of(d) * d) ** 2)) / n

    along_penalties = learned(penalties)
    squares = jax.lax.map(lambda tau: per_sample((residual - tau * along_penalties) ** 2), taus)
    squares = jnp.moveaxis(squares, 0, 1)  # (L, T, n)
    profiled = [profile(penalty) for penalty in penalties]
    best = int(np.argmin(profiled))
    best_penalty = float(penalties[best])
    if 0 < best < len(profiled) - 1 and penalties[best - 1] > 0:
        bounds = tuple(float(jnp.log(penalties[neighbour])) for neighbour in (best - 1, best + 1))
        refined = scipy.optimize.minimize_scalar(lambda x: profile(np.exp(x)), bounds=bounds, method="bounded")
        if refined.fun < profiled[best]:
            best_penalty = float(np.exp(refined.x))
    d = learned(jnp.asarray(best_penalty))
    best_tau, moved = best_tau_of(d), float(jnp.sum(d**2))
    missed = residual - best_tau * d
    best_squares = per_sample(missed**2)
    paired = squares - best_squares
    best_mean, best_error = _mean_and_error(best_squares)
    gain, gain_error = _mean_and_error(per_sample((residual - d) ** 2) - best_squares)
    slope_error = float(jnp.sqrt(jnp.sum(per_sample(d * missed) ** 2)))
    return Selection(
        penalties=np.asarray(penalties),
        taus=np.asarray(taus),
        mean_squared_error=np.asarray(squares.mean(-1)),
        standard_error=np.asarray(squares.std(-1, ddof=1) / n**0.5),
        indistinguishable=np.asarray(paired.mean(-1) <= paired.std(-1, ddof=1) / n**0.5),
        best_penalty=best_penalty,
        best_tau=best_tau,
        best_tau_error=slope_error / moved if moved > 0 else float("inf"),
        best_mean_squared_error=best_mean,
        best_standard_error=best_error,
        pretrained_mean_squared_error=float(jnp.sum(residual**2)) / n,
        gain_over_full=gain,
        gain_over_full_error=gain_error,
    )


def _mean_and_error(values: Array) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) / values.size**0.5
