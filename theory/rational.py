"""Spectral filters as weighted sums of ridges (docs, D4).

A resolvent is the one function of Σ̂ whose deterministic equivalent is known in closed form, so every other filter is
written in resolvents, by Cauchy's formula on a contour around the spectrum:

    g(s) = Re Σ_k w_k / (s + λ_k),      1 − s·g(s) = Re Σ_k w_k λ_k / (s + λ_k).

Ridge is one term with a real λ. For gradient flow, e^{−ts} = (1/2πi) ∫ e^{λt}/(λ + s) dλ over a contour that comes from
and goes to −∞ around the negative axis; the trapezoidal rule on a hyperbola converges geometrically. (Talbot's contour
with the constants of D4 is another such contour; the hyperbola also serves a whole decade of times with one set of
λ_k.) Gradient descent is the same integral in ζ, 1 − ηs = e^{ζ}, or for few steps one over a circle.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import is_concrete

__all__ = [
    "FEW_STEPS", "Plan", "Ridges", "combined_ridges", "descent_ridges", "distillation_ridges", "few_steps_ridges",
    "flow_ridges", "plan",
]  # fmt: skip


class Ridges(NamedTuple):
    """T filters as sums over K ridges. Filters of one group share their K penalties."""

    penalties: Array
    """λ (G, K); complex ones stand for themselves and their conjugates."""
    weights: Array
    """w (T, K)."""
    group: Array
    """Group of each filter (T,)."""


def combined_ridges(parts: Sequence[Ridges]) -> Ridges:
    """Filters that are sums of filters (docs, C1): the resolvents of all parts side by side.

    Filters that share their penalties in every part share them here, if the groups can be seen.
    """
    groups = [part.group for part in parts]
    weights = jnp.concatenate([part.weights for part in parts], axis=-1)
    if not is_concrete(groups):
        penalties = jnp.concatenate([part.penalties[part.group] for part in parts], axis=-1)
        return Ridges(penalties, weights, jnp.arange(len(weights)))
    _, first, group = np.unique(np.stack(groups), axis=1, return_index=True, return_inverse=True)
    penalties = jnp.concatenate([part.penalties[part.group[first]] for part in parts], axis=-1)
    return Ridges(penalties, weights, jnp.asarray(group.ravel()))


def distillation_ridges(penalties: Array, mix: Array) -> Ridges:
    """g_λ + ξλ ∂g_λ/∂λ for λ ≥ 0 and ξ, both (T,) (docs, C2).

    Cauchy's formulas for g and its derivative on the circle ζ = λ(1 + r e^{iφ}) around λ, which leaves out the poles of
    1/(s+ζ); N points err by r^N.

    >>> ridges = distillation_ridges(jnp.array([0.5]), jnp.array([-2.0]))
    >>> s = 1.5
    >>> bool(abs(jnp.sum(ridges.weights / (s + ridges.penalties)).real - (1 + 2 * 0.5 / 2.0) / 2.0) < 1e-12)
    True
    """
    radius, points = (0.1, 14) if penalties.dtype == jnp.float64 else (0.2, 10)
    angle = ((jnp.arange(points // 2) + 0.5) * (2 * np.pi / points)).astype(penalties.dtype)
    turn = jnp.exp(1j * angle)
    weights = (2 / points) * (1 + mix[:, None] / (radius * turn))
    return Ridges(penalties[:, None] * (1 + radius * turn), weights, jnp.arange(penalties.size))


_SPAN = 10.0
"""Times that share a contour lie within a decade."""
_NODES = {"float32": {1.0: 6, _SPAN: 12}, "float64": {1.0: 12, _SPAN: 25}}
"""K for one time, and for times that share a contour."""


# The hyperbola is λ(u) = μ(1 − sin α cosh u + i cos α sinh u), its upper half at u = (k + ½)h, k < K, with K·h = reach.
# The error of the trapezoidal rule has three parts: the pole at the spectrum, the growth of e^{λt} at the longest
# time, and the truncation at the shortest. Balancing them leaves α free and an error e^{−BK},
# B = π(π − 2α)/A, A = arcosh([(π−2α)·span + 4α − π] / [(4α−π) sin α]); α maximises B.
@cache
def _hyperbola(span: float) -> tuple[float, float, float]:
    """α, reach and μ·(longest time)/K of the best hyperbola for times in [t/span, t].

    >>> round(_hyperbola(1.0)[0], 3)
    1.172
    """
    angle = np.linspace(np.pi / 4, np.pi / 2, 20_002)[1:-1]
    width = 4 * angle - np.pi
    reach = np.arccosh(((np.pi - 2 * angle) * span + width) / (width * np.sin(angle)))
    best = np.argmax((np.pi - 2 * angle) / reach)
    return float(angle[best]), float(reach[best]), float(np.pi * width[best] / reach[best])


class Plan(NamedTuple):
    """Which times share a contour, by groups: longest time (G,), η (G,) (1 for gradient flow), and the groups (T,)."""

    longest: Array
    step_size: Array
    group: Array


def plan(times: Array, step_sizes: Array, *, concrete: bool) -> Plan:
    """Group times (T,), positive and finite, by step size and decade if they are concrete and it saves resolvents."""
    alone = Plan(times, step_sizes, jnp.arange(times.size))
    if not concrete:
        return alone
    host, steps = np.asarray(times), np.asarray(step_sizes)
    decade = np.floor(np.log10(host.max() / host) + 1e-9)
    keys, first, group = np.unique(np.stack([steps, decade]), axis=1, return_index=True, return_inverse=True)
    if keys.shape[1] * _NODES["float64"][_SPAN] >= times.size * _NODES["float64"][1.0]:
        return alone
    longest = np.zeros(keys.shape[1], host.dtype)
    np.maximum.at(longest, group.ravel(), host)
    return Plan(jnp.asarray(longest), jnp.asarray(steps[first]), jnp.asarray(group.ravel()))


def flow_ridges(times: Array, plan: Plan) -> Ridges:
    """g = (1−e^{−ts})/s for times (T,), positive and finite.

    Since 1/(λ(λ+s)) is the Laplace transform of (1−e^{−ts})/s, w_k = q_k e^{λ_k t}/λ_k. Error of 1 − sg below 1e-9 in
    float64, 1e-4 in float32.

    >>> ridges = flow_ridges(jnp.array([2.0]), plan(jnp.array([2.0]), jnp.ones(1), concrete=True))
    >>> s = 3.0
    >>> g = jnp.sum(ridges.weights / (s + ridges.penalties), axis=-1).real
    >>> bool(abs(g[0] - (1 - jnp.exp(-2 * s)) / s) < 1e-9)
    True
    """
    poles, measure = _contour(times, plan)
    weights = (measure / poles)[plan.group] * jnp.exp(poles[plan.group] * times[:, None])
    return Ridges(poles, weights, plan.group)


def _contour(times: Array, plan: Plan) -> tuple[Array, Array]:
    """λ_k and q_k, (G, K), such that e^{−ts} ≈ Re Σ q_k e^{λ_k t}/(λ_k + s)."""
    span, longest = 1.0 if plan.longest.size == times.size else _SPAN, plan.longest
    (angle, reach, scale), nodes = _hyperbola(span), _NODES[times.dtype.name][span]
    u = ((jnp.arange(nodes) + 0.5) * (reach / nodes)).astype(longest.dtype)
    size = (scale * nodes / longest)[..., None]
    sine, cosine = math.sin(angle), math.cos(angle)
    poles = size * (1 - sine * jnp.cosh(u) + 1j * cosine * jnp.sinh(u))
    slope = size * (-sine * jnp.sinh(u) + 1j * cosine * jnp.cosh(u))
    return poles, slope * (reach / nodes / (1j * np.pi))


FEW_STEPS = 16
"""Up to here gradient descent uses the circle."""


def descent_ridges(steps: Array, plan: Plan) -> Ridges:
    """g = (1−(1−ηs)^k)/s for k ≥ FEW_STEPS, steps (T,).

    With 1 − ηz = e^{ζ}, λ = −z = (e^{ζ} − 1)/η: (1−ηs)^k = (1/2πi) ∫ e^{ζ(k+1)}/(η(λ+s)) dζ on the flow's hyperbola
    at time k. That contour runs around 0 ≤ s < 1/η; beyond, (1−ηs)^k is taken as 0: error |1−ηs|^k.
    """
    exponents, measure = _contour(steps, plan)
    poles = jnp.expm1(exponents) / plan.step_size[:, None]
    measure = measure * jnp.exp(exponents) / (plan.step_size[:, None] * poles)
    return Ridges(poles, measure[plan.group] * jnp.exp(exponents[plan.group] * steps[:, None]), plan.group)


def few_steps_ridges(steps: Array, step_sizes: Array, group: Array) -> Ridges:
    """g = (1−(1−ηs)^k)/s for k ≤ FEW_STEPS, steps (T,), step sizes (G,), any ηs < 2.

    (1−ηs)^k = (1/2πi) ∮ v^k/(v − (1−ηs)) dv on |v| = r > 1, and v − 1 + ηs = η(λ + s). The trapezoidal rule with N
    points errs by r^{−N}; weights grow like r^k.
    """
    radius, points = (1.45, 64) if steps.dtype == jnp.float64 else (1.25, 48)
    angle = ((jnp.arange(points // 2) + 0.5) * (2 * np.pi / points)).astype(steps.dtype)
    v = radius * jnp.exp(1j * angle)
    poles = (v - 1) / step_sizes[:, None]
    weights = (2 / points) * jnp.exp((steps[:, None] + 1) * jnp.log(v)) / (v - 1)
    return Ridges(poles, weights, group)
