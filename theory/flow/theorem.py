"""Theorem 7.2 of paper 2502.02797: FLOW in the paper's two-task setting (docs, F6).

The setting: e = θ₁* − θ₂* = −δ, ē = e/‖e‖, ē⊥ a unit vector orthogonal to it; Σ₂ = Σ̃ = I + ρ(ēē⊥ᵀ + ē⊥ēᵀ),
Σ₁ = Σ ⪰ I, no noise, population gradient descent on the loss without ½ from θ₁ = θ₁*. All of it happens in the plane
of ē and ē⊥: a position (x, y) stands for θ = θ₂* + x·e + y·‖e‖·ē⊥. Training starts at (1, 0) and is to end at (0, 0).
By F2 with v = ‖e‖², Σ_w = μ(I − Q), μ² = d(‖e‖²), so that the step η = 1/(2μ) gives e_K = Q^K e.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import FixedShift, Pair, TwoTaskProblem
from linfit.internal.checks import ArrayLike, count, is_concrete, non_negative, positive, real_array, same_size
from theory.optimum import minimise_over_logarithm

Block = ArrayLike | None


def temperature_from_beta(beta: ArrayLike, rho: ArrayLike, distance: ArrayLike = 1.0) -> Array:
    """T = 2β(1 − ρ²)‖e‖²/(1 − β²ρ²), Theorem 7.2's temperature (paper 2502.02797; docs, F6).

    Args:
        beta: β in (0, 1]; T rises with it from 0 to 2‖e‖².
        rho: correlation ρ in [0, 1).
        distance: ‖e‖ > 0; the three broadcast.

    Raises ValueError outside these ranges.

    >>> from theory.flow import temperature_from_beta
    >>> temperature_from_beta(jnp.array([0.5, 1.0]), rho=0.6)
    Array([0.7032967, 2.       ], dtype=float64)
    """
    beta, rho = _beta(beta), _rho(rho)
    return 2 * beta * (1 - rho**2) * positive("distance", distance) ** 2 / (1 - (beta * rho) ** 2)


def beta_from_temperature(temperature: ArrayLike, rho: ArrayLike, distance: ArrayLike = 1.0) -> Array:
    """The β in (0, 1] of a temperature T in (0, 2‖e‖²], the inverse of `temperature_from_beta` (docs, F6).

        β = T / ((1−ρ²)‖e‖² + ((1−ρ²)²‖e‖⁴ + ρ²T²)^{1/2})

    Arguments as there. Raises ValueError for a temperature out of the theorem's range.

    >>> from theory.flow import beta_from_temperature, temperature_from_beta
    >>> float(beta_from_temperature(temperature_from_beta(0.3, 0.8, 2.0), 0.8, 2.0))
    0.3
    """
    temperature, rho = positive("temperature", temperature), _rho(rho)
    square = positive("distance", distance) ** 2
    if is_concrete(temperature, square) and not np.all(temperature <= 2 * square * (1 + 1e-12)):
        raise ValueError(f"temperature must be at most 2‖e‖² = {2 * square}, where β = 1, got {temperature}")
    half = (1 - rho**2) * square
    return temperature / (half + jnp.sqrt(half**2 + (rho * temperature) ** 2))


def _rho(rho: ArrayLike) -> Array:
    rho = non_negative("rho", rho)
    if is_concrete(rho) and not (np.asarray(rho) < 1).all():
        raise ValueError(f"rho must be in [0, 1), got {rho}")
    return rho


def _beta(beta: ArrayLike) -> Array:
    beta = positive("beta", beta)
    if is_concrete(beta) and not (np.asarray(beta) <= 1).all():
        raise ValueError(f"beta must be in (0, 1], got {beta}")
    return beta


def _steps(steps: ArrayLike) -> Array:
    steps = non_negative("steps", steps)
    if is_concrete(steps) and (np.asarray(steps) % 1).any():
        raise ValueError(f"steps must be whole numbers, got {steps}")
    return steps


def two_task_problem(
    rho: ArrayLike, pretrain: Block = None, *, p: int = 2, distance: ArrayLike = 1.0
) -> TwoTaskProblem:
    """The setting of Theorem 7.2 as a problem (paper 2502.02797; docs, F6): ē and ē⊥ are the first two axes.

    Args:
        rho: the correlation ρ in [0, 1) of Σ₂ = I + ρ(ēē⊥ᵀ + ē⊥ēᵀ), (p, p).
        pretrain: the block (2, 2) of Σ₁ on ē and ē⊥, the identity by default, as Σ₁ is beyond it.
        p: number of features, at least 2.
        distance: ‖e‖ > 0; the shift is δ = −‖e‖ē.

    No noise. Raises ValueError for ρ outside [0, 1), p < 2, or a block that is not Σ₁ ⪰ I.

    >>> from theory.flow import two_task_problem
    >>> two_task_problem(0.5, [[2.0, 0.0], [0.0, 1.0]]).finetune_covariance.matrix
    Array([[1. , 0.5],
           [0.5, 1. ]], dtype=float64)
    """
    rho, block = _rho(rho), _block(pretrain)
    flat = jnp.eye(count("p", p, minimum=2), dtype=block.dtype)
    finetune = flat.at[0, 1].set(rho).at[1, 0].set(rho)
    shift = -positive("distance", distance, ndim=0) * flat[0]
    return TwoTaskProblem(flat.at[:2, :2].set(block), finetune, FixedShift(shift), noise_std=0.0)


def _block(pretrain: Block) -> Array:
    block = real_array("pretrain", jnp.eye(2) if pretrain is None else pretrain)
    if block.shape != (2, 2):
        raise ValueError(f"pretrain must be the block (2, 2) of Σ₁ on ē and ē⊥, got shape {block.shape}")
    if is_concrete(block):
        host = np.asarray(block)
        if abs(host[0, 1] - host[1, 0]) > 1e-6 * abs(host).max():
            raise ValueError("pretrain must be symmetric")
        if (smallest := np.linalg.eigvalsh(host)[0]) < 1 - 1e-6:
            raise ValueError(f"pretrain must be Σ₁ ⪰ I, got eigenvalue {smallest:.3g}")
    return block


# Σ̃ has eigenvectors ē ± ē⊥ with eigenvalues 1 ± ρ.
def unweighted_iterates(rho: ArrayLike, steps: ArrayLike, step_size: ArrayLike = 0.5) -> Array:
    """Positions (…, 2) after K steps without weights, θ_K = θ₂* + (I − 2ηΣ̃)^K e (paper 2502.02797, §7; docs, F6).

    Args:
        rho: correlation ρ in [0, 1).
        steps: whole numbers K ≥ 0.
        step_size: the paper's η, for the loss without ½; the three broadcast.

    At η = ½ the position is ρ^K(1, 0) for even K, ρ^K(0, −1) for odd. ValueError outside these ranges or unstable η.

    >>> from theory.flow import unweighted_iterates
    >>> unweighted_iterates(0.5, [1, 2])
    Array([[ 0.  , -0.5 ],
           [ 0.25,  0.  ]], dtype=float64)
    """
    rho, steps, step_size = _rho(rho), _steps(steps), positive("step_size", step_size)
    if is_concrete(rho, step_size) and not (np.asarray(step_size * (1 + rho)) < 1).all():
        raise ValueError(f"step_size must be below 1/(1 + rho) = {float(1 / (1 + rho.max())):.6g}, got {step_size}")
    fast, slow = (1 - 2 * step_size * (1 + rho)) ** steps, (1 - 2 * step_size * (1 - rho)) ** steps
    return jnp.stack(jnp.broadcast_arrays((fast + slow) / 2, (fast - slow) / 2), axis=-1)


# e_K = Q^K e, Q = (1−μ²) ēēᵀ + ρ²(1−μ²) ē⊥ē⊥ᵀ − ρμ² (ēē⊥ᵀ + ē⊥ēᵀ), μ² = β(1−ρ²)/((1+β)(1−βρ²)); by its eigenvectors:
def stalled_direction(rho: ArrayLike, beta: ArrayLike) -> Array:
    """(1, −βρ): the top eigenvector e − βρ‖e‖ē⊥ of Q, along which learning is stalled (paper 2502.02797; docs, F6).

    Its eigenvalue λ₁ = (1 + βρ²)/(1 + β) is all that is left after many steps.

    >>> from theory.flow import stalled_direction
    >>> stalled_direction(0.5, [0.5, 1.0])
    Array([[ 1.  , -0.25],
           [ 1.  , -0.5 ]], dtype=float64)
    """
    rho, beta = jnp.broadcast_arrays(_rho(rho), _beta(beta))
    return jnp.stack([jnp.ones_like(rho), -beta * rho], axis=-1)


def flow_iterates(rho: ArrayLike, beta: ArrayLike, steps: ArrayLike) -> Array:
    """Positions (…, 2) after K steps of FLOW, η = 1/(2μ) (paper 2502.02797, Theorem 7.2, eq. (14); docs, F6).

        θ_K = θ₂* + [(λ₁^K + λ₂^K β²ρ²)/(1+β²ρ²)] e − βρ[(λ₁^K − λ₂^K)/(1+β²ρ²)] ‖e‖ē⊥,
        λ₁ = (1+βρ²)/(1+β),   λ₂ = ρ²(1−β)/(1−βρ²),   T as in `temperature_from_beta`

    Args:
        rho: correlation ρ in [0, 1).
        beta: β in (0, 1], see `temperature_from_beta`.
        steps: whole numbers K ≥ 0; the three broadcast; ValueError outside these ranges.

    η is the paper's, for the loss without ½; this one equals weights normalised to mean one and η = ½.

    >>> from theory.flow import flow_iterates
    >>> flow_iterates(0.5, 0.5, [1, 2]).round(4)
    Array([[ 0.7143, -0.1429],
           [ 0.5306, -0.1276]], dtype=float64)
    """
    rho, beta, steps = _rho(rho), _beta(beta), _steps(steps)
    top = jnp.exp(steps * jnp.log1p(-beta * (1 - rho**2) / (1 + beta)))  # λ₁^K, to all digits at small β and large K
    low, square = (rho**2 * (1 - beta) / (1 - beta * rho**2)) ** steps, (beta * rho) ** 2
    along, across = (top + low * square) / (1 + square), -beta * rho * (top - low) / (1 + square)
    return jnp.stack(jnp.broadcast_arrays(along, across), axis=-1)


def errors(position: ArrayLike, rho: ArrayLike, pretrain: Block = None) -> Pair[Array]:
    """The paper's err₂ = ‖θ−θ₂*‖²_Σ̃ and err₁ = ‖θ−θ₁*‖²_Σ, in units of ‖e‖² (paper 2502.02797, §7; docs, F6).

    Args:
        position: (…, 2) in the plane.
        rho: the correlation ρ (…) in [0, 1).
        pretrain: the block (2, 2) of Σ₁ on ē and ē⊥, the identity by default.

    >>> from theory.flow import errors
    >>> errors([1.0, 0.0], rho=0.5, pretrain=[[3.0, 1.0], [1.0, 2.0]])
    Pair(finetune=Array(1., dtype=float64), pretrain=Array(0., dtype=float64))
    """
    position, rho, block = real_array("position", position), _rho(rho), _block(pretrain)
    same_size("position (last axis)", position.shape[-1], "the plane", 2)
    x, y, moved = position[..., 0], position[..., 1], position[..., 0] - 1
    finetune = x**2 + y**2 + 2 * rho * x * y
    pretrain = block[0, 0] * moved**2 + 2 * block[0, 1] * moved * y + block[1, 1] * y**2
    return Pair(*jnp.broadcast_arrays(finetune, pretrain))


def best_averaging(pretrain: Block = None) -> Array:
    """min_ω err_tot(θ₂* + ωe) = s/(s+1) in units of ‖e‖², s = ēᵀΣ₁ē, at ω = s/(s+1) (paper 2502.02797, §7; docs, F6).

    >>> from theory.flow import best_averaging
    >>> best_averaging([[3.0, 0.0], [0.0, 1.0]])
    Array(0.75, dtype=float64)
    """
    s = _block(pretrain)[0, 0]
    return s / (s + 1)


class BestFlow(NamedTuple):
    """The least err_tot of FLOW, in units of ‖e‖², and its β and K."""

    total: Array
    beta: Array
    steps: Array


# FLOW goes below the best averaging if and only if ρ > 0 and c < ρs, s = ēᵀΣ₁ē, c = ēᵀΣ₁ē⊥ (ours). In the plane
#     err_tot(x, y) = x² + 2ρxy + y² + s(x−1)² + 2c(x−1)y + d y²
# is convex, and averaging, y = 0, is best at ω = s/(s+1), where its slope is 0 along x and 2(ρs−c)/(s+1) along y.
# Only if: FLOW has y ≤ 0, and y = 0 if ρ = 0; so with c ≥ ρs, err_tot(x, y) ≥ err_tot(ω, 0) + 2(ρs−c)/(s+1)·y is no
# less. If: for every large K there is a β = O(1/K) with x = ω exactly, since x falls from 1 with β; there
# y = −βρω + O(β²), which gains 2(ρs−c)ρωβ/(s+1) and costs O(β²).
# Where c is just below ρs, the best β is small and K ~ 1/β large. Without the bounds on x and y that FLOW has, err_tot
# is least at y/x = −ρβ', β' = (ρs−c)/(ρ[s(1+d) − c(ρ+c)]), and K is looked for up to a hundred times what gets there.
def best_flow(rho: ArrayLike, pretrain: Block = None) -> BestFlow:
    """The least err_tot of FLOW over β in (0, 1] and whole K ≥ 1, whatever their size (docs, F6; ours).

    It is better than the best averaging **if and only if** ρ > 0 and ēᵀΣ₁ē⊥ < ρ ēᵀΣ₁ē. Otherwise averaging is what it
    tends to for β → 0 (paper 2502.02797, Remark 7.5), returned with β = 0 and K = ∞.

    Args:
        rho: correlation ρ in [0, 1), a number.
        pretrain: the block (2, 2) of Σ₁ on ē and ē⊥, the identity by default.

    >>> from theory.flow import best_averaging, best_flow
    >>> best = best_flow(0.76, [[2.7, 0.0], [0.0, 1.0]])
    >>> bool(best.total < best_averaging([[2.7, 0.0], [0.0, 1.0]])), int(best.steps)
    (True, 1)
    >>> best_flow(0.76, [[2.7, 2.03], [2.03, 4.0]]).steps, best_flow(0.76, [[2.7, 2.06], [2.06, 4.0]]).steps
    (Array(201., dtype=float64), Array(inf, dtype=float64))
    """
    rho, block = _rho(rho), _block(pretrain)
    return _best_flow(jnp.asarray(rho, block.dtype), block)


FEW = 64
"""Steps that are tried one by one."""


@jax.jit
def _best_flow(rho: Array, block: Array) -> BestFlow:
    (s, c), (_, d) = block
    better = (rho > 0) & (c < rho * s)
    safe = jnp.where(better, rho, 0.5)
    beta = jnp.where(better, (safe * s - c) / (safe * (s * (1 + d) - c * (safe + c))), 1)
    furthest = 2 * FEW + 100 / (jnp.minimum(beta, 1) * (1 - safe**2))

    @jax.vmap
    def after(steps: Array) -> BestFlow:
        def total(beta: Array) -> Array:
            finetune, pretrain = errors(flow_iterates(rho, beta, steps), rho, block)
            return finetune + pretrain

        found = minimise_over_logarithm(total, 1e-4 / steps, jnp.ones((), block.dtype))
        return BestFlow(found.value, found.argument, steps)

    # err_tot at the best β is smooth in K, once there are many
    later = minimise_over_logarithm(lambda steps: after(steps).total, FEW, furthest).argument
    steps = jnp.concatenate([jnp.arange(1, FEW + 1, dtype=block.dtype), jnp.floor(later)[None] + jnp.arange(2)])
    finite, averaging = after(steps), best_averaging(block)
    best = jax.tree.map(lambda leaf: leaf[jnp.argmin(finite.total)], finite)
    best = best._replace(total=jnp.minimum(best.total, averaging))  # rounding, where the gain is hardly any
    limit = BestFlow(averaging, jnp.zeros((), block.dtype), jnp.asarray(jnp.inf, block.dtype))
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), best, limit)
