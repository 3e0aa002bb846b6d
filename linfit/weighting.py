"""FLOW: weights for fine-tuning samples from the pretrained model's own losses (paper 2502.02797; docs, F1).

The weights e^{−ℓ/T} favour what the model finds easy. Normalised, they minimise Σπ_iℓ_i + TΣπ_i log π_i over the
simplex (the paper's Proposition 4.3). They are computed once, before fine-tuning, and enter the loss as they are:
Σ_i w_i ℓ_i(θ)/n, so that they also lower the effective learning rate by their mean.
"""

import warnings

import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit._checks import ArrayLike, is_concrete, non_negative, real_array


def median_temperature(losses: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """T = median of the losses that count: not NaN, and under the mask if there is one (paper 2502.02797).

    `losses` and `mask` share one shape; the result is a scalar, NaN if nothing counts.

    >>> median_temperature([1.0, 3.0, float("nan"), 2.0])
    Array(2., dtype=float64)
    """
    losses = real_array("losses", losses, finite=False)
    counted = losses if mask is None else jnp.where(_mask(mask, losses), losses, jnp.nan)
    return jnp.nanmedian(counted)


def flow_weights(losses: ArrayLike, temperature: ArrayLike | None = None, mask: ArrayLike | None = None) -> Array:
    """FLOW weights w = exp(−ℓ/T) of the pretrained losses ℓ ≥ 0 (paper 2502.02797; docs, F1).

    `losses` (n,) per sample, or (n, t) per token, in any unit; `temperature` T ≥ 0 in the same unit, the median of the
    losses that count by default. `mask` (of the losses' shape) is true at target tokens; others get weight 0 and do not
    enter the median. Returns weights in [0, 1] of the losses' shape. A NaN loss gets weight 0, with a warning that
    counts them; an infinite loss has weight 0.

    If all losses are equal, all weights are e^{−1} at the median: no sample is preferred, and the weights act as a
    smaller learning rate only. T = 0, also by a median of 0, is the limit T → 0: weight 1 where the loss is 0, else 0.
    Raises ValueError for negative losses or temperature, a mask of another shape, or no loss to take the median of.

    >>> from linfit import flow_weights
    >>> flow_weights([0.0, 1.0, 2.0])
    Array([1.        , 0.36787944, 0.13533528], dtype=float64)
    >>> flow_weights([[0.5, 9.0], [2.0, 1.0]], temperature=1.0, mask=[[True, False], [True, True]])
    Array([[0.60653066, 0.        ],
           [0.13533528, 0.36787944]], dtype=float64)
    """
    losses = real_array("losses", losses, finite=False)
    counted = ~jnp.isnan(losses)
    if mask is not None:
        counted &= _mask(mask, losses)
    if is_concrete(losses, counted):
        _check_losses(np.asarray(losses), np.asarray(counted), None if mask is None else np.asarray(mask, bool))
    if temperature is None:
        temperature = median_temperature(losses, mask)
        if is_concrete(temperature) and not np.isfinite(temperature):
            raise ValueError("temperature cannot be the median of the losses: half of them or more are infinite")
    temperature = non_negative("temperature", temperature, ndim=0).astype(losses.dtype)
    # The exponent is formed before exponentiating, with its limits for ℓ = ∞ and T → 0 (0 at ℓ = 0, else −∞).
    safe = jnp.where(counted, losses, 0)
    exponent = jnp.where(temperature > 0, -safe / jnp.where(temperature > 0, temperature, 1), _zero_limit(safe))
    return jnp.where(counted, jnp.exp(exponent), 0)


def _zero_limit(losses: Array) -> Array:
    return jnp.where(losses == 0, 0.0, -jnp.inf)


def _mask(mask: ArrayLike, losses: Array) -> Array:
    mask = jnp.asarray(mask).astype(bool)
    if mask.shape != losses.shape:
        raise ValueError(f"mask must have the shape of losses, {losses.shape}, got {mask.shape}")
    return mask


def _check_losses(losses: np.ndarray, counted: np.ndarray, mask: np.ndarray | None) -> None:
    under_mask = np.ones(losses.shape, bool) if mask is None else mask
    undefined = int((np.isnan(losses) & under_mask).sum())
    if undefined:
        warnings.warn(f"{undefined} of {int(under_mask.sum())} losses are NaN: weight 0", UserWarning, stacklevel=3)
    if not counted.any():
        raise ValueError(f"losses must hold at least one value that counts, got {losses.size} NaN or masked")
    if losses[counted].min() < 0:
        raise ValueError(
            f"losses must be non-negative (log-losses, squared errors), got minimum {losses[counted].min()}"
        )
