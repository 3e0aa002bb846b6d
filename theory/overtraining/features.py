"""Features aligned with the target, one number each: learning, perturbation, fine-tuning (docs, §7, N1–N4)."""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax import Array

from linfit import Pair
from linfit.internal.checks import ArrayLike, count, is_concrete, non_negative, positive, real_array, same_size
from linfit.network import aligned_modes, layer_modes

__all__ = [
    "fine_tuned_singular_values", "fine_tuning", "fine_tuning_inflection_times", "gaussian_sensitivity",
    "inflection_time", "learning_time", "mode_inflection_times", "perturbed_loss", "singular_values",
]  # fmt: skip

_Shape = tuple[int, int, int]


def singular_values(initial: ArrayLike, target: ArrayLike, time: ArrayLike) -> Array:
    """Singular values (…, r) along gradient flow from a balanced aligned start (docs, N1; paper 2503.19206).

        s(t) = a e^{2at} / (e^{2at} − 1 + a/s₀) = s₀ / (e^{−2at} + s₀(1 − e^{−2at})/a)

    The second form has the exact limits: s₀/(1 + 2s₀t) at a = 0, and a as t → ∞.

    Args:
        initial: s₀ ≥ 0 (…, r), broadcast against the target.
        target: a (…, r); a < 0 is a feature to unlearn, s falls to 0.
        time: t ≥ 0 (…), its axes in front of r.

    >>> from theory.overtraining import singular_values
    >>> singular_values(0.01, [2.0, 1.0, 0.0], time=[0.0, 2.0, 20.0]).round(3)
    Array([[0.01 , 0.01 , 0.01 ],
           [1.875, 0.355, 0.01 ],
           [2.   , 1.   , 0.007]], dtype=float64)
    """
    initial, target, time = non_negative("initial", initial), real_array("target", target), non_negative("time", time)
    time = time[..., None]
    small = jnp.exp(-2 * jnp.abs(target) * time)  # multiplied through by e^{2at} where that is the small exponential
    flat, falls = target == 0, target < 0
    ramp = jnp.where(flat, 2 * time, -jnp.expm1(-2 * jnp.abs(target) * time) / jnp.where(flat, 1, jnp.abs(target)))
    return initial * jnp.where(falls, small, 1) / (jnp.where(falls, 1, small) + initial * ramp)


# Time to reach a given s. With R(s) = √(c² + 4s²) = w₁² + w₂² and d = R(a), s' = R(s)(a − s) has the integral
#     t = ∫ ds/((a − s)R(s)) = (1/d) log[ (c² + 4as + dR(s)) / (a − s) ]  between s₀ and s;
# balanced, (1/2a) log[ s(a − s₀) / (s₀(a − s)) ].
def learning_time(initial: ArrayLike, target: ArrayLike, level: ArrayLike, imbalance: ArrayLike = 0.0) -> Array:
    """Time at which gradient flow brings a singular value from s₀ to `level` (ours, from N1).

        t = (1/d) log[ (c² + 4as + dR(s))(a − s₀) / ((c² + 4as₀ + dR(s₀))(a − s)) ],  R(s) = √(c² + 4s²), d = R(a)

    0 for levels at or below s₀, ∞ at or above the target. s₀ ≥ 0, a > 0, s and the imbalance c broadcast.

    >>> from theory.overtraining import learning_time, singular_values
    >>> time = learning_time(0.01, 2.0, level=[1.0, 1.99, 2.0])
    >>> time.round(3), singular_values(0.01, [2.0], time[:2]).round(3).ravel()
    (Array([1.323, 2.647,   inf], dtype=float64), Array([1.  , 1.99], dtype=float64))
    """
    s0, a = non_negative("initial", initial), positive("target", target)
    s0, a, level, c = jnp.broadcast_arrays(s0, a, real_array("level", level), real_array("imbalance", imbalance))
    reached, learned = level <= s0, level >= a
    s = jnp.where(reached | learned, s0, level)
    d = jnp.hypot(c, 2 * a)

    def height(s: Array) -> Array:
        return c**2 + 4 * a * s + d * jnp.hypot(c, 2 * s)

    time = jnp.log(height(s) * (a - s0) / (height(s0) * (a - s))) / d
    return jnp.where(reached, 0, jnp.where(learned, jnp.inf, time))


def gaussian_sensitivity(w1: ArrayLike, w2: ArrayLike, gamma: ArrayLike, gamma_2: ArrayLike | None = None) -> Array:
    """Expected rise of ½‖W₁W₂ − A‖²_F under independent N(0, γ²) noise on every weight (docs, N2).

        E L(W₁+γE₁, W₂+γ₂E₂) − L = ½[γ²m‖W₂‖²_F + γ₂²k‖W₁‖²_F + γ²γ₂²mhk],  whatever A  (ours)

    Args:
        w1, w2: W₁ (…, m, h) and W₂ (…, h, k).
        gamma: γ ≥ 0 (…), its axes broadcasting against the replicas.
        gamma_2: γ₂ ≥ 0; `gamma` if not given.

    >>> from theory.overtraining import gaussian_sensitivity
    >>> gaussian_sensitivity([[1.0], [1.0]], [[1.0, 1.0, 1.0]], gamma=[0.0, 0.1]).round(5)
    Array([0.    , 0.0603], dtype=float64)
    """
    w1, w2 = real_array("w1", w1), real_array("w2", w2)
    if w1.ndim < 2 or w2.ndim < 2:
        raise ValueError(f"w1 and w2 must have shapes (…, m, h) and (…, h, k), got {w1.shape} and {w2.shape}")
    same_size("w2 (first axis)", w2.shape[-2], "the last axis of w1", w1.shape[-1])
    (m, h), k = w1.shape[-2:], w2.shape[-1]
    gamma = non_negative("gamma", gamma)
    gamma_2 = gamma if gamma_2 is None else non_negative("gamma_2", gamma_2)
    size_1, size_2 = jnp.sum(w1**2, axis=(-2, -1)), jnp.sum(w2**2, axis=(-2, -1))
    return (gamma**2 * m * size_2 + gamma_2**2 * k * size_1 + gamma**2 * gamma_2**2 * m * h * k) / 2


class PerturbedLoss(NamedTuple):
    """Pretraining loss along the flow and what a Gaussian perturbation adds to it; one shape."""

    loss: Array  #: ½ Σ (a − s)².
    sensitivity: Array  #: ½γ² Σ (m w₂² + k w₁²) + ½γ⁴mhk.

    @property
    def total(self) -> Array:
        """Expected loss of the perturbed network."""
        return self.loss + self.sensitivity


def perturbed_loss(
    initial: ArrayLike, target: ArrayLike, time: ArrayLike, gamma: ArrayLike, shape: _Shape, imbalance: ArrayLike = 0.0
) -> PerturbedLoss:
    """Loss, sensitivity and their total after pretraining time t, in closed form (docs, N1 + N2; unbalanced: ours).

    Args:
        initial, target, shape, imbalance: as in `inflection_time`.
        time, gamma: t ≥ 0 and γ ≥ 0, broadcast against each other.

    >>> from theory.overtraining import perturbed_loss
    >>> perturbed_loss(0.01, [2.0, 1.0], [0.0, 3.3, 30.0], gamma=0.1, shape=(10, 10, 10)).total.round(3)
    Array([2.522, 0.345, 0.35 ], dtype=float64)
    """
    initial, target, imbalance = _start(initial, target, imbalance)
    m, h, k = _shape(shape)
    time, gamma = non_negative("time", time), non_negative("gamma", gamma)
    w1, w2 = aligned_modes(*layer_modes(initial, imbalance), target, time)
    sizes = m * jnp.sum(w2**2, axis=-1) + k * jnp.sum(w1**2, axis=-1)
    loss = jnp.sum((target - w1 * w2) ** 2, axis=-1) / 2
    return PerturbedLoss(*jnp.broadcast_arrays(loss, (gamma**2 * sizes + gamma**4 * m * h * k) / 2))


# One mode. With R = √(c² + 4s²), w₁² and w₂² are (R ± c)/2, so the perturbed loss of a mode is
#     ½(a − s)² + g R/2 + const,   g = γ²(m + k)/2,
# and, s growing, it turns where a − s = 2gs/R. (a − s)R/s falls strictly in s, so there is one such s: balanced
# (R = 2s) it is s = a − g, which the mode never passes if g ≥ a − s₀; unbalanced, R > 2s, it always lies above 0.
def mode_inflection_times(
    initial: ArrayLike, target: ArrayLike, gamma: ArrayLike, shape: _Shape, imbalance: ArrayLike = 0.0
) -> Array:
    """When further pretraining of each mode alone starts to hurt the perturbed loss, (…, r) (docs, N3; ours).

        t = (1/2a) log[ (a−g)(a−s₀) / (s₀g) ],  g = γ²(m+k)/2

    if balanced, where s = a − g; 0 where g ≥ a − s₀, a mode that only ever hurts; ∞ at γ = 0. Arguments as in
    `inflection_time`.

    >>> from theory.overtraining import mode_inflection_times
    >>> mode_inflection_times(0.01, [2.0, 1.0, 0.05], gamma=[0.0, 0.1], shape=(10, 10, 10)).round(3)
    Array([[  inf,   inf,   inf],
           [2.059, 3.396, 0.   ]], dtype=float64)
    """
    initial, target, imbalance = _start(initial, target, imbalance)
    return _mode_times(initial, target, _cost(gamma, shape)[..., None], imbalance)


def _cost(gamma: ArrayLike, shape: _Shape) -> Array:
    """g = γ²(m + k)/2, the price of one unit of singular value."""
    m, _, k = _shape(shape)
    return non_negative("gamma", gamma) ** 2 * (m + k) / 2


@jax.jit
def _mode_times(initial: Array, target: Array, cost: Array, imbalance: Array) -> Array:
    def gain(s: Array, args: tuple[Array, Array, Array]) -> Array:  # falls through 0 at the inflection
        a, g, c = args
        return (a - s) * jnp.hypot(c, 2 * s) - 2 * g * s

    def unbalanced(a: Array, g: Array, c: Array) -> Array:
        return _root(gain, (a, g, c), jnp.zeros_like(a), a, rising=False)

    c = jnp.where(imbalance == 0, target, imbalance)  # any c ≠ 0 will do where the root is not used
    level = jnp.where(imbalance == 0, target - cost, jnp.vectorize(unbalanced)(target, cost, c))
    return learning_time(initial, target, jnp.where(cost > 0, level, target), imbalance)


def inflection_time(
    initial: ArrayLike, target: ArrayLike, gamma: ArrayLike, shape: _Shape, imbalance: ArrayLike = 0.0
) -> Array:
    """The pretraining time of least perturbed loss (…,), a differentiable root (docs, N3; ours).

        Σ_i s_i'(s_i − a_i + 2g s_i/R_i) = 0,  g = γ²(m+k)/2,  R = √(c² + 4s²), balanced 2s

    Every mode falls before its own inflection and rises after it, so the minimum lies between the first and the last of
    `mode_inflection_times`, and beyond the last one more pretraining always hurts: **it is finite if and only if
    γ > 0**. It is 0, no fall at all, if g ≥ a − s₀ for every mode of a balanced start; ∞ at γ = 0. Of several local
    minima (one per feature, if far apart) the lowest is returned.

    Args:
        initial: s₀ with 0 < s₀ < a, (r,) or a number.
        target: a (r,).
        gamma: γ ≥ 0 (…).
        shape: (m, h, k).
        imbalance: c (r,) or a number.

    >>> from theory.overtraining import inflection_time
    >>> inflection_time(0.01, [2.0, 1.0], gamma=[0.0, 0.1, 0.3, 1.0], shape=(10, 10, 10)).round(3)
    Array([  inf, 3.39 , 1.371, 0.   ], dtype=float64)
    """
    initial, target, imbalance = _start(initial, target, imbalance)
    cost = _cost(gamma, shape)
    return jnp.vectorize(_inflection, signature="(r),(r),(),(r)->()")(initial, target, cost, imbalance)


@jax.jit
def _inflection(initial: Array, target: Array, cost: Array, imbalance: Array) -> Array:
    start = layer_modes(initial, imbalance)
    g = jnp.where(cost > 0, cost, 1)

    def height(time: Array, g: Array) -> Array:  # the perturbed loss, but for a constant
        w1, w2 = aligned_modes(*start, target, time)
        return jnp.sum((target - w1 * w2) ** 2 + g * (w1**2 + w2**2)) / 2

    heights_at, slope = jax.vmap(height, (0, None)), jax.grad(height)
    # Times at which the modes pass fixed fractions of their way, dense enough that no minimum slips between.
    fractions = jax.nn.sigmoid(jnp.linspace(-16, 16, 48)).astype(target.dtype)[:, None]
    knots = learning_time(initial, target, initial + fractions * (target - initial), imbalance).ravel()
    own = _mode_times(initial, target, g, imbalance)
    knots = jnp.sort(jnp.concatenate([own, jnp.clip(knots, jnp.min(own), jnp.max(own))]))
    # The eight lowest valleys among these, each followed to the root of its slope.
    heights, beyond = heights_at(knots, g), jnp.full(1, jnp.inf, knots.dtype)
    valley = (heights <= jnp.append(heights[1:], beyond)) & (heights <= jnp.append(beyond, heights[:-1]))
    _, chosen = jax.lax.top_k(jnp.where(valley, -heights, -jnp.inf), min(8, knots.size))

    def bottom(best: Array) -> Array:
        lower = jnp.max(jnp.where(knots < best, knots, knots[0]))
        upper = jnp.min(jnp.where(knots > best, knots, knots[-1]))
        inside = (slope(lower, g) < 0) & (slope(upper, g) > 0)
        return jnp.where(inside, _root(slope, g, lower, upper), best)

    bottoms = jax.vmap(bottom)(knots[chosen])
    return jnp.where(cost > 0, bottoms[jnp.argmin(heights_at(bottoms, g))], jnp.inf)


def _root(function: Callable[..., Array], args: object, lower: Array, upper: Array, *, rising: bool = True) -> Array:
    """Bisection to the last bit, with the derivative of the implicit function."""
    solver = optimistix.Bisection(rtol=0.0, atol=0.0, flip=not rising)  # type: ignore[call-arg, var-annotated]
    options = {"lower": jax.lax.stop_gradient(lower), "upper": jax.lax.stop_gradient(upper)}
    middle = jax.lax.stop_gradient((lower + upper) / 2)
    return optimistix.root_find(function, solver, middle, args, options, max_steps=64, throw=False).value


def fine_tuned_singular_values(
    pretrained: ArrayLike, target: ArrayLike, time: ArrayLike, penalty: ArrayLike = 0.0, steps: int | None = None
) -> Array:
    """Singular values (…, r) after fine-tuning the balanced modes s = w² to another target b (docs, N4; ours).

        w' = w(b − w²) − μ(w − w_pre),  from w_pre = √s:  the flow of ½‖W − B‖²_F + (μ/2)‖θ − θ_pre‖²

    Args:
        pretrained, target: s ≥ 0 (…, r) and b (r,).
        time, penalty: t ≥ 0 (…) and μ ≥ 0 (…).
        steps: K; if given, exact gradient descent of step size t/K instead of the flow.

    >>> from theory.overtraining import fine_tuned_singular_values
    >>> fine_tuned_singular_values([1.0, 0.01], [2.0, 2.0], 1.0, penalty=[0.0, 3.0]).round(3)
    Array([[1.964, 0.431],
           [1.47 , 0.049]], dtype=float64)
    """
    pretrained, target = non_negative("pretrained", pretrained), real_array("target", target)
    time, penalty = non_negative("time", time)[..., None], non_negative("penalty", penalty)[..., None]
    if steps is not None:
        return _descent(pretrained, target, time / count("steps", steps), penalty, steps)
    if is_concrete(penalty) and not np.any(np.asarray(penalty)):
        return singular_values(pretrained, target, time[..., 0])
    return _penalised_flow(pretrained, target, time, penalty)


def _pull(w: Array, start: Array, target: Array, penalty: Array) -> Array:
    return w * (target - w**2) - penalty * (w - start)


@jax.jit
def _descent(pretrained: Array, target: Array, step_size: Array, penalty: Array, steps: int) -> Array:
    start = jnp.sqrt(pretrained)
    w = start + 0 * (step_size + penalty + target)
    return jax.lax.fori_loop(0, steps, lambda _, w: w + step_size * _pull(w, start, target, penalty), w) ** 2


@jax.jit
def _penalised_flow(pretrained: Array, target: Array, time: Array, penalty: Array) -> Array:
    start = jnp.sqrt(pretrained)
    w = start + 0 * (time + penalty + target)
    term = diffrax.ODETerm(lambda _, w, args: time * _pull(w, start, target, penalty))  # every entry reaches its t at 1
    solver, control = diffrax.Dopri8(), diffrax.PIDController(rtol=1e-9, atol=1e-11)
    solution = diffrax.diffeqsolve(term, solver, 0.0, 1.0, None, w, stepsize_controller=control, max_steps=100_000)
    return solution.ys[0] ** 2


class FineTuning(NamedTuple):
    """½ Σ (s − b)² on the new task and ½ Σ (s − a)² on that of pretraining, before and after fine-tuning."""

    before: Pair[Array]
    after: Pair[Array]

    @property
    def degradation(self) -> Array:
        """What fine-tuning cost on the pretraining task."""
        return self.after.pretrain - self.before.pretrain


def fine_tuning(
    initial: ArrayLike,
    pretrain_target: ArrayLike,
    finetune_target: ArrayLike,
    pretrain_time: ArrayLike,
    finetune_time: ArrayLike,
    penalty: ArrayLike = 0.0,
    steps: int | None = None,
) -> FineTuning:
    """Both losses `before` and `after` fine-tuning to B = U diag(b) Vᵀ from pretraining time t (docs, N4; ours).

    Args:
        initial: s₀ ≥ 0, (r,) or a number.
        pretrain_target, finetune_target: a (r,) and b (r,).
        pretrain_time, finetune_time: t ≥ 0 (…) and T ≥ 0 (…), learning rate × steps; with the penalty they broadcast.
        penalty: μ ≥ 0 (…) of `fine_tuned_singular_values`.
        steps: if given, exact gradient descent with that many steps, so that rates too large for the sharpness of the
            pretrained network show (the sharpness is 2s₁ at a minimum).

    >>> from theory.overtraining import fine_tuning
    >>> fine_tuning(0.01, [2.0], [3.0], [0.5, 2.0, 8.0], finetune_time=0.8).after.pretrain.round(3)
    Array([0.03 , 0.485, 0.488], dtype=float64)
    """
    initial, a = non_negative("initial", initial), real_array("pretrain_target", pretrain_target)
    b = real_array("finetune_target", finetune_target)
    before = singular_values(initial, a, pretrain_time)
    after = fine_tuned_singular_values(before, b, finetune_time, penalty, steps)
    losses = [jnp.sum((s - target) ** 2, axis=-1) / 2 for s in (before, after) for target in (b, a)]
    losses = jnp.broadcast_arrays(*losses)
    return FineTuning(Pair(*losses[:2]), Pair(*losses[2:]))


# Fine-tuning for a time T maps s to φ(s), which rises with s. So ½(φ(s(t)) − a)² falls as s(t) grows, until φ(s) = a,
# s = φ⁻¹(a) = bE / (E + b/a − 1), E = e^{−2bT}: the flow to b run backwards from a. That lies below a, and is passed
# at a finite time, only if b > a.
def fine_tuning_inflection_times(
    initial: ArrayLike, pretrain_target: ArrayLike, finetune_target: ArrayLike, finetune_time: ArrayLike
) -> Array:
    """When more pretraining of a mode starts to raise its pretraining loss after fine-tuning, (…, r) (ours, from N4).

    Finite if and only if b > a (and T > 0): fine-tuning overshoots a feature that it stretches, once there is enough
    of it, at the s from which the flow to b reaches a in time T. A feature that is shrunk or left alone (b ≤ a) never
    turns: ∞. 0 where fine-tuning overshoots from the start.

    Args:
        initial: s₀ with 0 < s₀ < a, (r,) or a number.
        pretrain_target, finetune_target: a (r,) and b (r,).
        finetune_time: T ≥ 0 (…), its axes in front of r.

    >>> from theory.overtraining import fine_tuning_inflection_times
    >>> fine_tuning_inflection_times(0.01, [2.0, 2.0, 2.0], [3.0, 2.0, 1.0], finetune_time=0.8).round(3)
    Array([0.4, inf, inf], dtype=float64)
    """
    initial, a, _ = _start(initial, pretrain_target, 0.0)
    b = real_array("finetune_target", finetune_target)
    same_size("finetune_target", b.shape[-1], "pretrain_target", a.shape[-1])
    time = non_negative("finetune_time", finetune_time)[..., None]
    overshoots = (b > a) & (time > 0)
    b = jnp.where(overshoots, b, 2 * a)  # any b > a will do where it is not used
    E = jnp.exp(-2 * b * time)
    return learning_time(initial, a, jnp.where(overshoots, b * E / (E + b / a - 1), a))


def _shape(shape: _Shape) -> _Shape:
    try:
        m, h, k = shape
    except (TypeError, ValueError):
        raise ValueError(f"shape must be (m, h, k), got {shape!r}") from None
    return (count("shape[0]", m), count("shape[1]", h), count("shape[2]", k)) if is_concrete(shape) else shape


def _start(initial: ArrayLike, target: ArrayLike, imbalance: ArrayLike) -> tuple[Array, Array, Array]:
    """s₀, a and c, each (r,), with 0 < s₀ < a."""
    target = positive("target", target, ndim=1)
    initial, imbalance = positive("initial", initial), real_array("imbalance", imbalance)
    for name, value in (("initial", initial), ("imbalance", imbalance)):
        if value.shape not in ((), target.shape):
            raise ValueError(f"{name} must be a number or have the shape {target.shape} of target, got {value.shape}")
    if is_concrete(initial, target) and not (np.asarray(initial) < np.asarray(target)).all():
        raise ValueError(f"initial must lie below target, got {initial} against {target}")
    initial, target, imbalance = jnp.broadcast_arrays(initial, target, imbalance)
    return initial, target, imbalance
