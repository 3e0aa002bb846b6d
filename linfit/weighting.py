"""FLOW: weights for fine-tuning samples from the pretrained model's own losses (paper 2502.02797; docs, F1).

The weights e^{−ℓ/T} favour what the model finds easy. Normalised, they minimise Σπ_iℓ_i + TΣπ_i log π_i over the
simplex (the paper's Proposition 4.3). They are computed once, before fine-tuning, and enter the loss Σ_i w_i ℓ_i(θ)/n.
How they are normalised changes nothing but the step size, which is part of the method's effect:

| normalisation | w | loss | effective step, relative to no weights |
|---|---|---|---|
| "count" (the authors' code) | e^{−ℓ/T} | Σ e^{−ℓ/T} ℓ(θ) / n | mean of e^{−ℓ/T}, at most 1 |
| "mean" | e^{−ℓ/T} over their mean | Σ e^{−ℓ/T} ℓ(θ) / Σ e^{−ℓ/T} | 1 |
| "none" | n e^{−ℓ/T} | Σ e^{−ℓ/T} ℓ(θ) | sum of e^{−ℓ/T}, at most n |

n is the number of samples, or of target tokens. `effective_step` reports the last column for any weights.
"""

import warnings
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import logsumexp

from linfit.internal.checks import ArrayLike, Maybe, is_concrete, non_negative, real_array

__all__ = [
    "effective_sample_size", "effective_step", "entropy_weights", "flow_weights", "median_temperature",
    "robust_weights", "smooth_weights",
]  # fmt: skip

Normalisation = Literal["count", "mean", "none"]


def median_temperature(losses: ArrayLike, mask: Maybe = None) -> Array:
    """T = median of the losses that count: not NaN, and under the mask if there is one (paper 2502.02797).

    `losses` and `mask` share one shape; NaN if nothing counts.

    >>> from linfit.weighting import median_temperature
    >>> median_temperature([1.0, 3.0, float("nan"), 2.0])
    Array(2., dtype=float64)
    """
    losses = real_array("losses", losses, finite=False)
    counted = losses if mask is None else jnp.where(_mask(mask, losses), losses, jnp.nan)
    return jnp.nanmedian(counted)


def flow_weights(
    losses: ArrayLike, temperature: Maybe = None, mask: Maybe = None, *, normalisation: Normalisation = "count"
) -> Array:
    """FLOW weights w ∝ exp(−ℓ/T) of the pretrained losses ℓ ≥ 0 (paper 2502.02797; docs, F1).

    Args:
        losses: (n,) per sample, or (n, t) per token, in any unit.
        temperature: T ≥ 0 in the same unit; the median of the losses that count by default.
        mask: of the losses' shape, true at target tokens; others get weight 0 and do not enter the median.
        normalisation: "count" (the authors': w = exp(−ℓ/T), in [0, 1]), "mean" (mean one over the mask) or "none" (n
            times the first, so that the loss is a plain sum); see the table of this module.

    A NaN loss gets weight 0, with a warning that counts them; an infinite loss has weight 0. If all losses are equal,
    all weights are e^{−1} at the median: a smaller learning rate, no more. T = 0, also by a median of 0, is the limit
    T → 0: weight 1 where the loss is 0, else 0. If all weights underflow to 0 a warning says so; those of mean one are
    formed relative to the smallest loss and neither underflow nor lose digits, however large the losses. Raises
    ValueError for negative losses or temperature, a mask of another shape, another normalisation, no loss to take the
    median of, or none that is finite to normalise by.

    >>> from linfit import flow_weights
    >>> flow_weights([0.0, 1.0, 2.0])
    Array([1.        , 0.36787944, 0.13533528], dtype=float64)
    >>> flow_weights([[0.5, 9.0], [2.0, 1.0]], temperature=1.0, mask=[[True, False], [True, True]])
    Array([[0.60653066, 0.        ],
           [0.13533528, 0.36787944]], dtype=float64)
    >>> flow_weights([10000.0, 10001.0], temperature=1.0, normalisation="mean")
    Array([1.46211716, 0.53788284], dtype=float64)
    """
    losses, counted, under_mask, temperature = _prepare(losses, temperature, mask, normalisation)
    concrete = is_concrete(losses, counted, temperature)
    if normalisation == "mean":
        least = jnp.min(jnp.where(counted, losses, jnp.inf))
        if concrete and not np.isfinite(least):
            raise ValueError("losses must hold a finite value for weights of mean one, got none")
        return _mean_one(losses - least, temperature, counted, under_mask)
    weights = jnp.where(counted, jnp.exp(_exponent(jnp.where(counted, losses, 0), temperature)), 0)
    if concrete and not np.asarray(weights).any():
        least = jnp.min(jnp.where(counted, losses, jnp.inf))
        why = f"even the smallest loss, {least:.6g}, is too large for a temperature of {temperature:.6g}"
        advice = 'raise it, or keep the relative weights with normalisation="mean"'
        warnings.warn(f"all weights are 0: {why}; {advice}", UserWarning, stacklevel=2)
    return weights if normalisation == "count" else weights * under_mask.sum()


def robust_weights(
    losses: ArrayLike, temperature: Maybe = None, mask: Maybe = None, *, normalisation: Normalisation = "mean"
) -> Array:
    """The opposite of FLOW, w ∝ exp(+ℓ/T): hard samples count more (paper 2502.02797, Prop. 4.3; docs, F1).

    Normalised, they maximise Σπ_iℓ_i − TΣπ_i log π_i over the simplex: distributionally robust optimisation, the
    baseline that upweights hard samples. Arguments and NaN losses as in `flow_weights`; mean one by default, since
    exp(ℓ/T) has no bound. T = 0 puts all weight on the largest loss. Raises ValueError as `flow_weights`, for an
    infinite loss, which would take all weight, and where weights not of mean one overflow.

    >>> from linfit.weighting import robust_weights
    >>> robust_weights([0.0, 1.0, 1000.0], temperature=1.0)
    Array([0., 0., 3.], dtype=float64)
    >>> robust_weights([0.0, 1.0, 2.0], normalisation="count")
    Array([1.        , 2.71828183, 7.3890561 ], dtype=float64)
    """
    losses, counted, under_mask, temperature = _prepare(losses, temperature, mask, normalisation)
    concrete = is_concrete(losses, counted, temperature)
    largest = jnp.max(jnp.where(counted, losses, 0))
    if concrete and not np.isfinite(largest):
        raise ValueError("losses must be finite for robust weights: an infinite one would take all weight")
    if normalisation == "mean":
        return _mean_one(largest - losses, temperature, counted, under_mask)
    weights = jnp.where(counted, jnp.exp(-_exponent(jnp.where(counted, losses, 0), temperature)), 0)
    if concrete and not np.isfinite(weights).all():
        where = f"the largest is {largest:.6g} at T = {temperature:.6g}"
        raise ValueError(f'losses overflow in exp(ℓ/T): {where}; use normalisation="mean"')
    return weights if normalisation == "count" else weights * under_mask.sum()


def smooth_weights(losses: ArrayLike, temperature: Maybe = None, mask: Maybe = None) -> Array:
    """w = 1/(1 + ℓ/T), in (0, 1]: like FLOW's weights for small losses, with a heavier tail (ours; docs, E1).

    FLOW all but discards hard samples (e^{−ℓ/T} = 5e-5 at ℓ = 10T); these keep them at 1/(1 + ℓ/T) = 0.09. Arguments,
    default temperature, NaN losses and errors as in `flow_weights`; not normalised, like its "count".

    >>> from linfit.weighting import smooth_weights
    >>> smooth_weights([0.0, 1.0, 3.0])
    Array([1.  , 0.5 , 0.25], dtype=float64)
    """
    losses, counted, _, temperature = _prepare(losses, temperature, mask, "count")
    ratio = -_exponent(jnp.where(counted, losses, 0), temperature)
    return jnp.where(counted, 1 / (1 + ratio), 0)


def entropy_weights(logits: ArrayLike) -> Array:
    """w = H(softmax(logits))/log K in [0, 1]: full weight where the model is undecided, none where it is sure (ours).

    The weights of entropy-adaptive fine-tuning: they look at the model's own prediction only, not at the label, and so
    leave alone what it is confident of, right or wrong. `logits` (…, K), K ≥ 2 classes or tokens → (…,). In the linear
    model with Gaussian answers all entropies are equal and these weights change nothing. Raises ValueError for NaN or
    Inf, or fewer than two classes.

    >>> from linfit.weighting import entropy_weights
    >>> entropy_weights([[0.0, 0.0], [0.0, 50.0]]).round(6)
    Array([1., 0.], dtype=float64)
    """
    logits = real_array("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(f"logits must have at least two classes on the last axis, got shape {logits.shape}")
    log_p = logits - logsumexp(logits, axis=-1, keepdims=True)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1) / np.log(logits.shape[-1]).astype(logits.dtype)


def effective_step(weights: ArrayLike, mask: Maybe = None) -> Array:
    """The factor by which weights in the loss Σ w_i ℓ_i(θ)/n scale the learning rate: their mean (ours; docs, F1).

    `weights` ≥ 0 and `mask` share one shape; only what is under the mask counts. FLOW at the median temperature takes
    steps of 0.43 of the nominal size on squared Gaussian residuals. Raises ValueError for negative weights.

    >>> from linfit import flow_weights
    >>> from linfit.weighting import effective_step
    >>> losses = jnp.array([0.0, 1.0, 2.0])
    >>> [round(float(effective_step(flow_weights(losses, normalisation=n))), 3) for n in ("count", "mean", "none")]
    [0.501, 1.0, 1.503]
    """
    weights, under_mask = _weights_and_mask(weights, mask)
    return jnp.sum(jnp.where(under_mask, weights, 0)) / under_mask.sum()


def effective_sample_size(weights: ArrayLike, mask: Maybe = None) -> Array:
    """(Σw)²/Σw², the number of equally weighted samples that estimate a mean as well (Kish); 0 if all are 0.

    >>> from linfit.weighting import effective_sample_size
    >>> effective_sample_size([1.0, 1.0, 0.0])
    Array(2., dtype=float64)
    """
    weights, under_mask = _weights_and_mask(weights, mask)
    weights = jnp.where(under_mask, weights, 0)
    largest = jnp.max(weights)
    relative = weights / jnp.where(largest > 0, largest, 1)
    return jnp.where(largest > 0, jnp.sum(relative) ** 2 / jnp.where(largest > 0, jnp.sum(relative**2), 1), 0)


def _weights_and_mask(weights: ArrayLike, mask: Maybe) -> tuple[Array, Array]:
    weights = non_negative("weights", weights)
    under_mask = jnp.ones(weights.shape, bool) if mask is None else _mask(mask, weights, "weights")
    if is_concrete(under_mask) and not np.asarray(under_mask).any():
        raise ValueError("mask must be true somewhere, got none")
    return weights, under_mask


def _prepare(
    losses: ArrayLike, temperature: Maybe, mask: Maybe, normalisation: str
) -> tuple[Array, Array, Array, Array]:
    """Losses, which of them count, which are under the mask, and the temperature."""
    if normalisation not in ("count", "mean", "none"):
        raise ValueError(f'normalisation must be "count", "mean" or "none", got {normalisation!r}')
    losses = real_array("losses", losses, finite=False)
    under_mask = jnp.ones(losses.shape, bool) if mask is None else _mask(mask, losses)
    counted = under_mask & ~jnp.isnan(losses)
    if is_concrete(losses, counted):
        considered = np.asarray(losses)[np.asarray(counted)]
        undefined = int(under_mask.sum()) - considered.size
        if undefined:
            warnings.warn(f"{undefined} of {under_mask.sum()} losses are NaN: weight 0", UserWarning, stacklevel=3)
        if not considered.size:
            raise ValueError(f"losses must hold at least one value that counts, got {losses.size} NaN or masked")
        if considered.min() < 0:
            least = considered.min()
            raise ValueError(f"losses must be non-negative (log-losses, squared errors), got minimum {least}")
    if temperature is None:
        temperature = median_temperature(losses, mask)
        if is_concrete(temperature) and not np.isfinite(temperature):
            raise ValueError("temperature cannot be the median of the losses: half of them or more are infinite")
    return losses, counted, under_mask, non_negative("temperature", temperature, ndim=0).astype(losses.dtype)


def _exponent(losses: Array, temperature: Array) -> Array:
    """−ℓ/T, with its limits for ℓ = ∞ and T → 0: 0 at ℓ = 0, else −∞."""
    limit = jnp.where(losses == 0, 0.0, -jnp.inf)
    return jnp.where(temperature > 0, -losses / jnp.where(temperature > 0, temperature, 1), limit)


def _mean_one(distance: Array, temperature: Array, counted: Array, under_mask: Array) -> Array:
    """n e^{−d/T}/Σe^{−d/T}, d ≥ 0 the distance from the loss of largest weight."""
    relative = jnp.where(counted, jnp.exp(_exponent(jnp.where(counted, distance, 0), temperature)), 0)
    return relative * (under_mask.sum() / relative.sum())


def _mask(mask: ArrayLike, reference: Array, name: str = "losses") -> Array:
    mask = jnp.asarray(mask).astype(bool)
    if mask.shape != reference.shape:
        raise ValueError(f"mask must have the shape of {name}, {reference.shape}, got {mask.shape}")
    return mask
