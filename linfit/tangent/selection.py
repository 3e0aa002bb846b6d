"""Choosing (τ, λ) of several outputs from the fine-tuning data alone: exact leave-one-out (docs, G1; ours).

Derivation. Let a = G r̃ be the dual coefficients of ridge, G = (W^{1/2}KW^{1/2} + nλI)⁻¹, r̃ = W^{1/2}r, all k outputs
of a sample together. Leaving sample i out, the penalty nλ kept, misses its k labels by some e_i (weighted by √w_i).
Give sample i the labels that the model without it predicts: the fit on all samples is then that same model, it misses
sample i by 0, and so its coefficients there are 0: (G(r̃ − E_i e_i))_i = 0, where E_i puts e_i in the rows of i. Hence

    G_ii e_i = (G r̃)_i,      G_ii the k × k block,

and the ensemble misses by r_i − τ d_i, d_i = r_i − e_i/√w_i. One eigendecomposition serves every (τ, λ).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import ArrayLike, Maybe, broadcastable, positive, real_array
from linfit.selection import Selection, minimise
from linfit.tangent.prediction import Prediction

__all__ = ["leave_one_out", "noise_from_leaving_out", "select"]


def leave_one_out(prediction: Prediction, penalty: ArrayLike, tau: ArrayLike = 1.0) -> Array:
    """Residuals y_i − f_τ^{(−i)}(x_i) (…, n, k) of models refitted without sample i, nλ held fixed (docs, G1; ours).

    Args:
        prediction: with squared loss and a dense kernel.
        penalty: λ > 0.
        tau: broadcasts against λ, in front of the residuals.

    A sample of weight 0 is left out anyway: its residual is that of the fit. Raises ValueError for n < 2, λ ≤ 0.

    >>> import jax
    >>> from linfit import predict
    >>> from linfit.tangent import leave_one_out
    >>> data = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([1.0, 3.0])
    >>> residuals = leave_one_out(predict(lambda w, x: x @ w, jnp.zeros(2), data, data), penalty=1e-12)
    >>> residuals[:, 0].round(6)
    Array([-0.5,  2. ], dtype=float64)
    """
    penalty, tau = positive("penalty", penalty), real_array("tau", tau)
    broadcastable("tau", tau.shape, "penalty", penalty.shape)
    residual = prediction.train.labels - prediction.train.outputs
    return residual - tau[..., None, None] * _learned(prediction, penalty)


def _learned(prediction: Prediction, penalty: Array) -> Array:
    """d (…, n, k): what the model without a sample has learned about it."""
    prediction.require_squared("leaving one out")
    if prediction.krylov is not None:
        raise ValueError("prediction must have a dense kernel to leave one out, got one from products with it")
    if len(prediction.root_weights) < 2:
        raise ValueError("train must have at least 2 samples to leave one out, got 1")
    return _learned_along(prediction, jnp.ravel(penalty)).reshape(*penalty.shape, *prediction.train.labels.shape)


@jax.jit
def _learned_along(prediction: Prediction, penalties: Array) -> Array:
    s, U, c, root = prediction.eigenvalues, prediction.vectors, prediction.coefficients, prediction.root_weights
    residual = prediction.train.labels - prediction.train.outputs

    def learned(penalty: Array) -> Array:
        inverse = 1 / (s + penalty)
        blocks = jnp.einsum("nkq,nlq->nkl", U * inverse, U)
        missed = jnp.linalg.solve(blocks, (U @ (inverse * c))[..., None])[..., 0]
        kept = root > 0
        out = residual - missed / jnp.where(kept, root, 1)[:, None]
        return jnp.where(kept[:, None], out, prediction.train.moved(inverse * c))

    return jax.lax.map(learned, penalties)


def default_penalties(prediction: Prediction) -> np.ndarray:
    """60 values, evenly spaced in log λ, from 10⁻⁶ to 10² times the mean eigenvalue of K/n."""
    return float(prediction.eigenvalues.mean()) * np.logspace(-6, 2, 60)


def select(prediction: Prediction, penalties: Maybe = None, taus: Maybe = None) -> Selection:
    """(τ, λ) of least leave-one-out error, as `linfit.select` chooses them, for k outputs (docs, S5, G1; ours).

    Args:
        prediction: with squared loss and a dense kernel.
        penalties: λ > 0, increasing; 60 around the mean eigenvalue if not given.
        taus: 101 values in [0, 1.25] if not given.

    Errors are ‖·‖² per sample; standard errors are over the samples. Raises ValueError as `leave_one_out`.
    """
    penalties = jnp.atleast_1d(positive("penalties", default_penalties(prediction) if penalties is None else penalties))
    taus = jnp.atleast_1d(real_array("taus", jnp.linspace(0, 1.25, 101) if taus is None else taus))
    if penalties.ndim != 1 or taus.ndim != 1 or (np.diff(penalties) <= 0).any():
        raise ValueError(f"penalties must be increasing and taus 1-d, got {penalties} and shape {taus.shape}")
    residual = prediction.train.labels - prediction.train.outputs
    return minimise(residual, lambda penalty: _learned(prediction, penalty), penalties, taus)


def noise_from_leaving_out(prediction: Prediction) -> float:
    """σ per output from the least leave-one-out error, what the model cannot learn included; NaN if unknown."""
    if prediction.loss != "squared" or prediction.krylov is not None or len(prediction.root_weights) < 3:
        return float("nan")
    penalties = default_penalties(prediction)[::3]
    if penalties[0] <= 0:
        return float("nan")
    residual = prediction.train.labels - prediction.train.outputs
    d = _learned(prediction, jnp.asarray(penalties))
    tau = jnp.sum(residual * d, (-2, -1)) / jnp.maximum(jnp.sum(d**2, (-2, -1)), jnp.finfo(d.dtype).tiny)
    return float(jnp.sqrt(jnp.min(jnp.mean((residual - tau[:, None, None] * d) ** 2, (-2, -1)))))
