"""How far one fine-tuning moves each coordinate: its mean and its variance, without sampling a design (docs, P1; ours).

In the eigenbasis of Σ = diag(s), n samples y = Xθ* + ε and a filter g(s) = Re Σ_a w_a/(s+λ_a) (`theory.rational`) move
coordinate j, which misses its optimum by Δ_j, by f_jΔ_j on average and by a fluctuation of variance Var_j:

    f_j = Re Σ_a w_a s_j r_ja,
    Var_j = Σ_ab w_a w_b s_j r_ja r_jb · (σ² + κ_aκ_b Σ_i E Δ_i² s_i r_ia r_ib) / (n(1−γ_ab)),
    r_ja = 1/(s_j+κ_a),      γ_ab = (1/n) Σ_i s_i² r_ia r_ib,

κ_a = κ(λ_a) of D1, the double sum over complex nodes and their conjugates. That is D2 with M = e_jeⱼᵀ, one coordinate
as its own test covariance: a of D2 is then s_j r_ja r_jb/(n(1−γ_ab)). Pipelines of many stages and merges of many runs
are made of these two p-vectors. Two independent designs meet in f alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.filters import (
    Combination,
    Ensemble,
    Filter,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Ridge,
    SelfDistillation,
)
from linfit.internal.checks import ArrayLike, is_concrete, non_negative, positive
from theory import rational
from theory.equivalents import effective_regularization, spectral_edge

__all__ = ["Movement", "Nodes", "movement", "nodes", "require_stable"]


class Nodes(NamedTuple):
    """A filter as a sum of ridges, g(s) = Re Σ_a w_a/(s+λ_a); axes of hyperparameters in front."""

    penalties: Array
    """λ (…, N); complex ones stand for themselves and their conjugates."""
    weights: Array
    """w (…, N)."""


def nodes(filter: Filter, dtype: jnp.dtype) -> Nodes:
    """The ridges that a filter is a sum of: any of those that `theory.equivalents.risk` takes.

    Traced hyperparameters get the nodes of every case (few or many steps, an infinite time), those in vain with weight
    0. Raises ValueError for another filter.

    >>> from linfit import Ridge
    >>> nodes(0.5 * Ridge([1.0, 2.0]), jnp.float64).weights
    Array([[0.5],
           [0.5]], dtype=float64)
    """
    if isinstance(filter, Ensemble):
        inner = nodes(filter.filter, dtype)
        weights = filter.tau.astype(dtype)[..., None] * inner.weights
        return Nodes(jnp.broadcast_to(inner.penalties, weights.shape), weights)
    if isinstance(filter, Combination):
        terms = [nodes(filter.weights[..., k] * term, dtype) for k, term in enumerate(filter.filters)]
        shape = np.broadcast_shapes(*(term.weights.shape[:-1] for term in terms))
        parts = zip(*([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in term] for term in terms), strict=True)
        return Nodes(*(jnp.concatenate(part, axis=-1) for part in parts))
    if isinstance(filter, MinNorm):
        return Nodes(jnp.zeros(1, dtype), jnp.ones(1, dtype))
    if isinstance(filter, Ridge):
        penalty = filter.penalty.astype(dtype)[..., None]
        finite = jnp.isfinite(penalty)
        return Nodes(jnp.where(finite, penalty, 1), finite.astype(dtype))
    if isinstance(filter, GradientFlow):
        return _flow(filter.time.astype(dtype))
    if isinstance(filter, GradientDescent):
        return _descent(*jnp.broadcast_arrays(filter.steps.astype(dtype), filter.step_size.astype(dtype)))
    if isinstance(filter, SelfDistillation):
        return _distillation(*jnp.broadcast_arrays(filter.penalty.astype(dtype), filter.mix.astype(dtype)))
    known = "MinNorm, Ridge, GradientFlow, GradientDescent, SelfDistillation, or sums and multiples of them"
    raise ValueError(f"filter must be {known}: no equivalent for {type(filter).__name__}")


def _distillation(penalty: Array, mix: Array) -> Nodes:
    """On a circle around λ; at λ = ∞ nothing is learned."""
    finite = jnp.isfinite(penalty)
    ridges = rational.distillation_ridges(jnp.where(finite, penalty, 1).ravel(), mix.ravel())
    return _scaled(_shaped(ridges, penalty.shape), finite)


def _flow(time: Array) -> Nodes:
    """On a contour; t = 0 has weight 0, t = ∞ is λ = 0."""
    ended = jnp.isinf(time)
    between = jnp.where((time > 0) & ~ended, time, 1).ravel()
    ridges = rational.flow_ridges(between, rational.plan(between, jnp.ones_like(between), concrete=False))
    zero = jnp.zeros((*time.shape, 1), time.dtype)
    return _either(ended, Nodes(zero, zero + 1), _scaled(_shaped(ridges, time.shape), time > 0))


def _descent(steps: Array, step_size: Array) -> Nodes:
    """Few steps on a circle, many on the contour of gradient flow."""
    k, eta = steps.ravel(), step_size.ravel()
    circle = rational.few_steps_ridges(jnp.minimum(k, rational.FEW_STEPS), eta, jnp.arange(k.size))
    more = jnp.maximum(k, rational.FEW_STEPS)
    contour = rational.descent_ridges(more, rational.plan(more, eta, concrete=False))
    few, many = _shaped(circle, steps.shape), _shaped(contour, steps.shape)
    return _either(steps <= rational.FEW_STEPS, _scaled(few, steps > 0), many)


def _shaped(ridges: rational.Ridges, shape: tuple[int, ...]) -> Nodes:
    """One group for each filter."""
    return Nodes(*(part.reshape(*shape, -1) for part in (ridges.penalties, ridges.weights)))


def _scaled(filter: Nodes, by: Array) -> Nodes:
    return Nodes(filter.penalties, filter.weights * by[..., None])


def _either(condition: Array, one: Nodes, other: Nodes) -> Nodes:
    """One where the condition holds, the other elsewhere: both, unless it can be seen that one is in vain."""
    if is_concrete(condition) and np.asarray(condition).all():
        return one
    if is_concrete(condition) and not np.asarray(condition).any():
        return other
    both = zip(_scaled(one, condition), _scaled(other, ~condition), strict=True)
    return Nodes(*(jnp.concatenate(parts, axis=-1) for parts in both))


class Movement(eqx.Module):
    """Of every coordinate by one fine-tuning: mean f_jΔ_j, and a variance linear in σ² and E Δ²."""

    fraction: Array
    """f (p,), the share of its gap that coordinate j is moved on average."""
    spectrum: Array
    n: Array
    _kappa: Array
    """κ (N,) and w (N,); complex ones with their conjugates in `_double`."""
    _weights: Array

    def variance(self, second_moment: ArrayLike, noise_std: ArrayLike) -> Array:
        """Var (p,) of the movement, for gaps with E Δ² (p,) and labels with noise of standard deviation σ.

        >>> from linfit import MinNorm
        >>> movement(MinNorm(), jnp.ones(4), 2).variance(jnp.zeros(4), 1.0)   # σ²/(p − n), over p/n coordinates
        Array([0.25, 0.25, 0.25, 0.25], dtype=float64)
        """
        s, second_moment = self.spectrum, jnp.asarray(second_moment, self.spectrum.dtype)
        return self._variance(jnp.broadcast_to(second_moment, s.shape), jnp.asarray(noise_std, s.dtype))

    @jax.jit
    def _variance(self, second_moment: Array, noise_std: Array) -> Array:
        s, kappa, weights = self.spectrum, self._kappa, self._weights
        missed, overlap = self._double(second_moment * s), self._double(s**2) / self.n
        kappa, weights, to_real = _conjugated(kappa, weights)
        numerator = noise_std**2 + kappa[:, None] * kappa * missed
        empty = numerator == 0  # κ = 0 without noise; at rank = n the denominator is 0 too
        pairs = (
            weights[:, None] * weights * jnp.where(empty, 0, numerator / (self.n * jnp.where(empty, 1, 1 - overlap)))
        )
        real = (to_real @ pairs @ to_real.T).real

        def squares(s: Array) -> Array:
            functions = _functions(s, self._kappa)
            return jnp.where(s > 0, s * jnp.sum((functions @ real) * functions, axis=-1), 0)  # real may be infinite

        return _in_blocks(squares, self._kappa.size, s).ravel()[: s.size]

    def _double(self, vector: Array) -> Array:
        """Σ_i v_i r_ia r_ib over nodes and conjugates."""

        def block(s: Array, vector: Array) -> Array:
            functions = _functions(s, self._kappa)
            return (vector[:, None] * functions).T @ functions

        real = jnp.sum(_in_blocks(block, self._kappa.size, self.spectrum, vector), axis=0)
        to_real = _conjugated(self._kappa, self._weights)[2]
        return to_real.T @ real @ to_real


# Sums over the p coordinates are done in real numbers: with r = x + iy, the functions ρ = (x, y) of s span what (r, r̄)
# do, (r, r̄) = ρB with B = [[1, 1], [i, −i]]; so Σ v r r = Bᵀ(Σ v ρᵀρ)B, and r C rᵀ = ρ(B C Bᵀ)ρᵀ.
def _functions(s: Array, kappa: Array) -> Array:
    """ρ (p, 2N), or r (p, N) if κ is real: 1/(s+κ), 0 where both vanish."""
    if jnp.iscomplexobj(kappa):
        real, imaginary = s[:, None] + kappa.real, kappa.imag
        square = real**2 + imaginary**2
        kept = square > 0
        inverse = jnp.where(kept, 1 / jnp.where(kept, square, 1), 0)
        return jnp.concatenate([real * inverse, -imaginary * inverse], axis=-1)
    total = s[:, None] + kappa
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def _conjugated(kappa: Array, weights: Array) -> tuple[Array, Array, Array]:
    """κ and w of a plain sum over nodes, and B."""
    identity = jnp.eye(kappa.size, dtype=kappa.dtype)
    if not jnp.iscomplexobj(kappa):
        return kappa, weights, identity
    to_real = jnp.block([[identity, identity], [1j * identity, -1j * identity]])
    return jnp.concatenate([kappa, kappa.conj()]), jnp.concatenate([weights, weights.conj()]) / 2, to_real


def _in_blocks(function: Callable[..., Array], count: int, *vectors: Array) -> Array:
    """function of blocks of coordinates, stacked; as many at a time as keep them × nodes within 2²¹ numbers."""
    p = vectors[0].size
    size = min(p, max(1, 2**20 // count))
    blocks = -(-p // size)
    padded = [jnp.pad(vector, (0, blocks * size - p)).reshape(blocks, size) for vector in vectors]
    if blocks == 1:
        return function(*(vector[0] for vector in padded))[None]
    return jax.lax.map(lambda parts: jax.checkpoint(function)(*parts), tuple(padded))


def movement(filter: Filter | Nodes, spectrum: ArrayLike, n: ArrayLike) -> Movement:
    """How far a fine-tuning on n samples moves each coordinate; formulas in the module's docstring (docs, P1; ours).

    Args:
        filter: one filter that `nodes` knows, with scalar hyperparameters (`jax.vmap` for more), or its nodes.
        spectrum: eigenvalues (p,) of the covariance, zeros allowed.
        n: samples, any real number > 0.

    Asymptotic: n and p large, designs like Gaussian ones; relative error O(1/n). Costs N passes over the spectrum for N
    nodes (1 for ridge). Differentiable in everything. Raises ValueError as `nodes` and `effective_regularization`, and
    if gradient descent diverges.

    >>> from linfit import MinNorm
    >>> movement(MinNorm(), jnp.ones(4), 1).fraction   # n/p
    Array([0.25, 0.25, 0.25, 0.25], dtype=float64)
    """
    spectrum = non_negative("spectrum", spectrum, ndim=1)
    n = positive("n", n, ndim=0).astype(spectrum.dtype)
    if isinstance(filter, Filter):
        require_stable(filter, spectrum, n)
        filter = nodes(filter, spectrum.dtype)
    return _movement(filter, spectrum, n)


@jax.jit
def _movement(filter: Nodes, spectrum: Array, n: Array) -> Movement:
    weights, kappa = filter.weights, effective_regularization(filter.penalties, spectrum, n)
    linear = jnp.concatenate([weights.real, -weights.imag]) if jnp.iscomplexobj(kappa) else weights

    def block(s: Array) -> Array:
        return s * (_functions(s, kappa) @ linear)

    fraction = _in_blocks(block, kappa.size, spectrum).ravel()[: spectrum.size]
    return Movement(fraction, spectrum, n, kappa, weights)


def require_stable(filter: Filter, spectrum: Array, n: Array) -> None:
    """Raise ValueError if gradient descent diverges; one spectrum and n, or one for each of its step sizes."""
    for part in (getattr(filter, "filter", None), *getattr(filter, "filters", ())):
        if part is not None:
            require_stable(part, spectrum, n)
    if not isinstance(filter, GradientDescent) or not is_concrete(filter, spectrum, n):
        return
    bound = (spectrum.max(axis=-1) ** 0.5 + (spectrum.sum(axis=-1) / n) ** 0.5) ** 2  # with all eigenvalues at the top
    for k, (step, most, samples) in enumerate(zip(*map(np.ravel, np.broadcast_arrays(filter.step_size, bound, n)))):
        row = spectrum if spectrum.ndim == 1 else spectrum[k]
        if step * most >= 2 and step >= (limit := float(2 / spectral_edge(row, samples))):
            raise ValueError(f"step_size must be below 2/s_max = {limit:.6g} on this data, got {step}")
