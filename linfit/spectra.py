"""Named covariance spectra: eigenvalues (p,), largest first.

Each takes `trace=` to rescale the eigenvalues to a given sum.

>>> from linfit import spectra
>>> spectra.power_law(4, 1.0)
Array([1.        , 0.5       , 0.33333333, 0.25      ], dtype=float64)
>>> round(float(spectra.exponential(50, 0.3, trace=2.0).sum()), 12)
2.0
"""

import jax.numpy as jnp
from jax import Array

from linfit.internal.checks import ArrayLike, count, is_concrete, non_negative, positive

__all__ = ["bilevel", "exponential", "isotropic", "power_law", "spiked"]


def _normalised(eigenvalues: Array, trace: ArrayLike | None) -> Array:
    eigenvalues = eigenvalues.astype(jnp.result_type(float))
    if trace is None:
        return eigenvalues
    total = eigenvalues.sum()
    if is_concrete(total) and total == 0:
        raise ValueError("trace cannot be set on a spectrum that is zero everywhere")
    return eigenvalues * (positive("trace", trace, ndim=0) / total)


def _ranks(p: int) -> Array:
    return jnp.arange(count("p", p), dtype=jnp.result_type(float))


def isotropic(p: int, variance: ArrayLike = 1.0, *, trace: ArrayLike | None = None) -> Array:
    """All eigenvalues equal: λ_j = variance.

    >>> isotropic(3, trace=1.5)
    Array([0.5, 0.5, 0.5], dtype=float64)
    """
    variance = non_negative("variance", variance, ndim=0)
    return _normalised(jnp.full(count("p", p), variance), trace)


def power_law(p: int, exponent: ArrayLike = 1.0, *, trace: ArrayLike | None = None) -> Array:
    """Power law: λ_j = j^(−exponent), j = 1…p; exponent ≥ 0.

    >>> power_law(3, 2.0)
    Array([1.        , 0.25      , 0.11111111], dtype=float64)
    """
    exponent = non_negative("exponent", exponent, ndim=0)
    return _normalised((1 + _ranks(p)) ** -exponent, trace)


def exponential(p: int, rate: ArrayLike = 0.1, *, trace: ArrayLike | None = None) -> Array:
    """Exponential decay: λ_j = exp(−rate·(j−1)), j = 1…p; rate ≥ 0.

    >>> exponential(3, 0.5)
    Array([1.        , 0.60653066, 0.36787944], dtype=float64)
    """
    rate = non_negative("rate", rate, ndim=0)
    return _normalised(jnp.exp(-rate * _ranks(p)), trace)


def spiked(p: int, spikes: ArrayLike = (10.0,), bulk: ArrayLike = 1.0, *, trace: ArrayLike | None = None) -> Array:
    """A flat bulk with a few other eigenvalues: the entries of `spikes` (k,), then p − k times `bulk`.

    Sorted, so a spike below the bulk comes last. Raises ValueError if k > p or a value is negative.

    >>> spiked(4, [3.0, 9.0])
    Array([9., 3., 1., 1.], dtype=float64)
    """
    p = count("p", p)
    spikes = non_negative("spikes", spikes, ndim=1)
    if spikes.size > p:
        raise ValueError(f"spikes must have at most p = {p} entries, got {spikes.size}")
    bulk = non_negative("bulk", bulk, ndim=0)
    eigenvalues = jnp.concatenate([spikes, jnp.full(p - spikes.size, bulk)])
    return _normalised(jnp.sort(eigenvalues, descending=True), trace)


def bilevel(
    p: int, head_size: int = 1, head: ArrayLike = 10.0, tail: ArrayLike = 1.0, *, trace: ArrayLike | None = None
) -> Array:
    """Two levels: `head_size` eigenvalues equal to `head`, the other p − head_size equal to `tail`.

    Raises ValueError unless head_size ≤ p and head ≥ tail ≥ 0.

    >>> bilevel(5, 2, head=4.0, tail=0.5)
    Array([4. , 4. , 0.5, 0.5, 0.5], dtype=float64)
    """
    p, head_size = count("p", p), count("head_size", head_size, minimum=0)
    if head_size > p:
        raise ValueError(f"head_size must be at most p = {p}, got {head_size}")
    head, tail = non_negative("head", head, ndim=0), non_negative("tail", tail, ndim=0)
    if is_concrete(head, tail) and head < tail:
        raise ValueError(f"head must be at least tail, got head {head} < tail {tail}")
    return _normalised(jnp.where(_ranks(p) < head_size, head, tail), trace)
