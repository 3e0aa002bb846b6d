"""Dropout in linear networks: the penalty it induces, and where it ends (docs, C5).

Of a two-layer network W = W₁W₂ every hidden unit is kept with probability 1−q and then scaled by 1/(1−q). The scale z
of a unit has mean 1 and variance ν = q/(1−q), units are independent, so that over the masks (known: Mianjy, Arora &
Vidal 2018)

    E ½‖W₁ diag(z) W₂ − A‖² = ½‖W − A‖² + (ν/2) Σ_h ‖W₁[:, h]‖²‖W₂[h, :]‖².

The penalty depends on how W is divided among h units. Since Σ c_h² ≥ (Σ c_h)²/h and Σ ‖W₁[:, h]‖‖W₂[h, :]‖ ≥ ‖W‖_*
(the sum of singular values), it is at least (ν/2h)‖W‖_*², which a rotation of the hidden units attains. So with
singular values a of A the best network has

    s_i = max(a_i − μ, 0),      μ = (ν/h) Σ_i s_i = max over r of ν(a₁+…+a_r)/(h + νr):

soft thresholding, weak features first (ours from this penalty). An aligned network, one unit for each feature, has
instead the penalty (ν/2)Σs_i² and rests at s = a/(1+ν) = (1−q)a, as if averaged with W = 0 (ours): where the penalty
can be shared out better this is a saddle, which any disturbance leaves.

A layer d that is dropped as a whole: E‖y − zXd‖² = ‖y − Xd‖² + ν‖Xd‖² is least at (1−q) times the fit, and gradient
flow on it is the filter (1−q)·flow at time t/(1−q): an ensemble (ours). With a keep rate 1/γ(t) that changes on the
way, progressive layer dropping, g(s) = ∫₀ᵗ exp(−s∫ᵣᵗγ(r')dr')dr has in general no closed form; where γ tends to a limit
it ends at the last keep rate times the fit.
"""

import jax.numpy as jnp
from jax import Array

from linfit.internal.checks import ArrayLike, count, is_concrete, non_negative, probability
from linfit.network import TwoLayer

__all__ = ["hidden_optimum", "hidden_penalty"]


def _spread(rate: ArrayLike) -> Array:
    """ν = q/(1−q)."""
    rate = probability("rate", rate)
    if is_concrete(rate) and bool((rate >= 1).any()):
        raise ValueError(f"rate must be below 1, got maximum {rate.max()}")
    return rate / (1 - rate)


def hidden_penalty(network: TwoLayer, rate: ArrayLike) -> Array:
    """(ν/2) Σ_h ‖W₁[:, h]‖²‖W₂[h, :]‖², ν = q/(1−q): what dropping hidden units adds to ½‖W − A‖² (docs, C5; known).

    `network` may have leading axes (…), against which `rate` q in [0, 1) broadcasts. ValueError for another rate.

    >>> from linfit.network import TwoLayer
    >>> from theory.dropout import hidden_penalty
    >>> hidden_penalty(TwoLayer(jnp.array([[1.0, 2.0]]), jnp.array([[1.0], [0.5]])), 0.5)
    Array(1., dtype=float64)
    """
    sizes = jnp.sum(network.w1**2, axis=-2) * jnp.sum(network.w2**2, axis=-1)
    return _spread(rate) / 2 * jnp.sum(sizes, axis=-1)


def hidden_optimum(target: ArrayLike, rate: ArrayLike, hidden_size: int) -> Array:
    """Singular values of the best network under dropout of hidden units: max(a − μ, 0) (docs, C5; threshold ours).

    Args:
        target: singular values a ≥ 0 (r,) of A, in any order.
        rate: q in [0, 1), a number.
        hidden_size: h ≥ r units.

    >>> from theory.dropout import hidden_optimum
    >>> hidden_optimum([3.0, 1.0, 0.1], 0.5, 3)
    Array([2.2, 0.2, 0. ], dtype=float64)
    """
    a = non_negative("target", target, ndim=1)
    nu, h = _spread(rate), count("hidden_size", hidden_size, minimum=a.size)
    if nu.ndim:
        raise ValueError(f"rate must be a number, got shape {nu.shape}")
    sums = jnp.cumsum(jnp.sort(a, descending=True))
    threshold = jnp.max(nu * sums / (h + nu * jnp.arange(1, a.size + 1)))
    return jnp.maximum(a - threshold, 0)
