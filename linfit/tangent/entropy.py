"""Fine-tuning with cross-entropy in function space: the linear model's own flow, never its weights (docs, G1).

The linearised model z = f₁ + Jδ trained on (1/n) Σ w_i ℓ_i, ℓ = −Σ_c y_c log softmax(z)_c, moves by
δ̇ = Jᵀ W(y − softmax z)/n. With δ = JᵀW^{1/2}U α/n, U the eigenvectors of W^{1/2}KW^{1/2}/n, only α (q,) is left,

    α̇ = Uᵀ W^{1/2} (y − softmax(f₁ + Bα)),      B = K W^{1/2}U/n,

and outputs anywhere else are f₁ + K(x, X)W^{1/2}U α/n. Labels y are probabilities; noisy or smoothed ones fit as well.
"""

from functools import partial
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["Start", "cross_entropy", "descend", "flow"]

MAX_STEPS = 200_000
"""Of the adaptive solver; enough for s_max·t of about 10⁶."""


class Start(NamedTuple):
    """Where the flow begins: the training set in the kernel's eigenbasis."""

    outputs: Array  #: f₁ (n, k).
    labels: Array  #: y (n, k).
    basis: Array  #: B (n, k, q).
    projection: Array  #: W^{1/2}U (n, k, q).

    def velocity(self, alpha: Array) -> Array:
        """α̇ (q,)."""
        missing = self.labels - jax.nn.softmax(self.outputs + self.basis @ alpha)
        return jnp.einsum("nkq,nk->q", self.projection, missing)


def cross_entropy(outputs: Array, labels: Array) -> Array:
    """−Σ_c y_c log softmax(z)_c of each sample, (…, n)."""
    return -jnp.sum(labels * jax.nn.log_softmax(outputs), axis=-1)


def flow(start: Start, times: Array, tolerance: float) -> Array:
    """α (…, q) at all times (…), in one pass of an adaptive solver; ValueError where it needs too many steps."""
    flat = jnp.ravel(times)
    order = jnp.argsort(flat)
    alpha, succeeded = _flow(start, flat[order], tolerance)
    if not bool(succeeded):
        raise ValueError(f"time must be shorter: the flow to {float(flat.max()):.6g} takes over {MAX_STEPS} steps")
    return alpha[jnp.argsort(order)].reshape(*times.shape, -1)


@jax.jit
def _flow(start: Start, times: Array, tolerance: float) -> tuple[Array, Array]:
    zero = jnp.zeros(start.basis.shape[-1], start.basis.dtype)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda _, alpha, start: start.velocity(alpha)),
        diffrax.Tsit5(),
        t0=0.0,
        t1=jnp.maximum(times[-1], jnp.finfo(times.dtype).tiny),
        dt0=None,
        y0=zero,
        args=start,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance * 1e-2),
        max_steps=MAX_STEPS,
        throw=False,
    )
    return solution.ys, solution.result == diffrax.RESULTS.successful


def descend(start: Start, step_size: Array, steps: Array) -> Array:
    """α (…, q) after `steps` (…) of gradient descent at one step size: the discrete run itself, not its limit."""
    counts = np.asarray(steps)
    rates = np.unique(np.asarray(step_size))
    if rates.size != 1:
        raise ValueError(f"step_size must be one number for cross-entropy, got {rates.size} different ones")
    shape = np.broadcast_shapes(counts.shape, np.shape(step_size))
    saved = np.unique(counts)
    path = _descend(start, jnp.asarray(rates[0], start.basis.dtype), jnp.asarray(saved))
    return path[np.searchsorted(saved, np.broadcast_to(counts, shape))]


@partial(jax.jit)
def _descend(start: Start, rate: Array, saved: Array) -> Array:
    def advance(alpha: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        alpha = jax.lax.fori_loop(*ends, lambda _, now: now + rate * start.velocity(now), alpha)
        return alpha, alpha

    ends = saved.astype(int)
    zero = jnp.zeros(start.basis.shape[-1], start.basis.dtype)
    return jax.lax.scan(advance, zero, (jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]]), ends))[1]
