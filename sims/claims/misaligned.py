"""§7 as claims: fine-tuning to a task with other singular vectors (docs, N5)."""

import numpy as np
import scipy.optimize

from sims.claims import Normal, Sides, existence, identity, inequality
from sims.claims.networks import MODES, Layers, aligned, coefficients, flow, late_slopes, loss, singular_vectors, turned
from sims.parameters import DECAY, Parameter
from theory import overtraining as theory

_TARGET = {"decay": DECAY.within(0.3, 2.0), "strength": Parameter(low=0.5, high=2.0, scale="log")}
_TASK = _TARGET | {"same": Parameter(high=1.0), "other": Parameter(low=0.1, high=0.6)}
_TIME = Parameter(low=0.05, high=3.0, scale="log")
_PENALTY = Parameter(high=2.0)


def _task(normal: Normal, decay: float, strength: float, same: float, other: float) -> tuple[np.ndarray, ...]:
    """a, U (5, r), V (4, r), A, and B: a share of A, and something else inside and outside its singular vectors."""
    a, (U, V) = strength * (1.0 + np.arange(MODES)) ** -decay, singular_vectors(normal)
    A = U * a @ V.T
    return a, U, V, A, same * A + other * strength * normal(5, 4) / 2


def _after(
    s: np.ndarray, U: np.ndarray, V: np.ndarray, B: np.ndarray, times: np.ndarray | float, penalty: float = 0.0
) -> list[Layers]:
    """The fine-tuned layers at each time, from the features s."""
    return flow(aligned(U, V, s), B, times, penalty)


@identity(
    "N5",
    "Late in pretraining each feature moves the loss after fine-tuning at a rate that is known exactly.",
    R"D_i = \partial_{s_i}\tfrac12\|W(T) - A\|^2 = y_{i1}^\top(W(T) - A)\,y_{i2}",
    parameters=_TASK | {"time": _TIME, "penalty": _PENALTY},
    tolerance=1e-5,
)
def n5(normal: Normal, time: float, penalty: float, **task: float) -> Sides:
    a, U, V, A, B = _task(normal, **task)
    predicted, measured, step = [], [], 1e-4
    for strength in (0.0, penalty):
        slopes = [
            [loss(_after(a * (1 + side * step * unit), U, V, B, time, strength)[0], A) for side in (1, -1)]
            for unit in np.eye(MODES)
        ]
        measured.append(-np.diff(slopes)[:, 0] / (2 * step * a))
        predicted.append(np.asarray(theory.late_slope(A, B, time, strength))[:MODES])
    return np.stack(predicted), np.stack(measured)


@identity(
    "N5.product",
    "Balanced weights with any singular values reach a matrix that is known in closed form.",
    R"Q' = (F - \tfrac12QQ^\top)Q",
    source="Fukumizu 1998 (the flow); ours (here)",
    parameters=_TASK | {"time": _TIME, "penalty": _PENALTY},
    tolerance=1e-7,
)
def n5_product(normal: Normal, time: float, penalty: float, **task: float) -> Sides:
    a, U, V, _, B = _task(normal, **task)
    s, basis, inside = a * np.exp(normal(MODES)), np.eye(MODES), U.T @ B @ V
    predicted = [theory.fine_tuned_product(s, a, inside, time, strength) for strength in (0.0, penalty)]
    measured = [_after(s, basis, basis, inside, time, strength)[0] for strength in (0.0, penalty)]
    return np.stack(predicted), np.stack([layers[0] @ layers[1] for layers in measured])


@inequality(
    "N5.rises",
    "The weakest feature decides: the loss after fine-tuning rises at the end if its slope is positive, else falls.",
    R"\operatorname{sign} L'(t) \to \operatorname{sign} D_r",
    parameters=_TASK
    | {"decay": DECAY.within(0.5, 2.0), "time": _TIME, "rest": Parameter(low=1e-4, high=1e-3, scale="log")},
)
def n5_rises(normal: Normal, time: float, rest: float, **task: float) -> Sides:
    a, U, V, A, B = _task(normal, **task)
    slopes = np.asarray(theory.late_slope(A, B, time))[:MODES]
    # pretraining times at which the weakest feature lacks `rest` of its size, and half of that, from s₀ = a_r/100
    ends = np.log((1 / np.array([rest, rest / 2]) - 1) * 99) / (2 * a[-1])
    s = a / (1 + (100 * a / a[-1] - 1) * np.exp(-2 * a * ends[:, None]))
    before, after = (loss(_after(values, U, V, B, time)[0], A) for values in s)
    clear = abs(slopes[-1]) > 0.1 * np.abs(slopes).max()  # else features learned before it, or curvature, still matter
    return 0.0, np.sign(slopes[-1]) * (after - before) / (s[1] - s[0])[-1] / abs(slopes[-1]) if clear else 1.0


@identity(
    "N5.late",
    "Late in pretraining the loss after fine-tuning misses its limit by the slopes times what is left to learn.",
    R"L(\infty) - L(t) = \textstyle\sum_i D_i(a_i - s_i) + O(|a - s|^2)",
    parameters=_TASK | {"time": _TIME},
    tolerance=1e-3,
)
def n5_late(normal: Normal, time: float, **task: float) -> Sides:
    a, U, V, A, B = _task(normal, **task)
    slopes = np.asarray(theory.late_slope(A, B, time))[:MODES]
    way = np.sign(slopes) * a  # no cancellation between features
    end, *losses = (loss(_after(a - rest * way, U, V, B, time)[0], A) for rest in (0.0, 2e-3, 1e-3))
    halved = 2 * (end - losses[1]) / 1e-3 - (end - losses[0]) / 2e-3
    return np.float64(slopes @ way), np.float64(halved)


@identity(
    "N5.second",
    "For short fine-tuning the slopes are a polynomial in the entries of the task.",
    R"D_i = -2Ta_ig_i + T^2\{6a_ig_i(g_i+a_i) + \textstyle\sum_j[(\tfrac32a_i+a_j)(B_{ij}^2+B_{ji}^2)"
    R" + a_jB_{ij}B_{ji}]\}",
    parameters=_TASK | {"penalty": _PENALTY},
    tolerance=1e-4,
)
def n5_second(normal: Normal, penalty: float, **task: float) -> Sides:
    a, U, V, A, B = _task(normal, **task)
    scale = a[0] + np.linalg.norm(B) + penalty
    times = 0.3 * (1 - np.cos(np.pi * (np.arange(1, 10)) / 9.5)) / 2 / scale
    predicted, measured = [], []
    for strength in (0.0, penalty):
        first, second = coefficients(times, late_slopes(U, V, a, B, times, strength) / times[:, None])[:2]
        measured.append([first, second])
        # the library's, from two times so short that the penalty is one of first and second order only
        nodes = np.array([1e-4, 2e-4, 3e-4]) / scale
        ours = np.asarray(theory.second_order_slope(A, B, nodes, strength))[:, :MODES] / nodes[:, None]
        predicted.append(coefficients(nodes, ours)[:2])
    unit = np.abs(measured).max(axis=-1, keepdims=True)
    return np.array(predicted) / unit, np.array(measured) / unit


@identity(
    "N5.shared",
    "With the same singular vectors a slope has the sign of what fine-tuning does to the feature: stretched, it turns.",
    R"D_i = (\varphi_T(a_i) - a_i)\,\varphi_T'(a_i) > 0 \iff b_i > a_i",
    parameters=_TARGET
    | {"stretch": Parameter(low=0.5, high=2.0, scale="log"), "time": _TIME}
    | {"angle": Parameter(highest=1.0)},
    tolerance=1e-9,
)
def n5_shared(normal: Normal, stretch: float, time: float, angle: float, decay: float, strength: float) -> Sides:
    a, (U, V) = strength * (1.0 + np.arange(MODES)) ** -decay, singular_vectors(normal)
    b = a * stretch ** np.array([1.0, -1.0, 0.0])
    E = np.exp(-2 * b * time)
    bottom = E + a * (1 - E) / b  # φ(s) = s/(E + s(1 − E)/b), so φ' = E/(E + s(1 − E)/b)²
    slopes = np.asarray(theory.late_slope(U * a @ V.T, turned(normal, 5, angle) @ (U * b) @ V.T, time))[:MODES]
    return (a / bottom - a) * E / bottom**2, slopes


@inequality(
    "N5.never",
    "Features that are only removed or shrunk never turn, however long fine-tuning takes.",
    R"b_i \le a_i \Rightarrow D_i \le 0 \text{ for every } T,\ T_i^* = \infty",
    parameters=_TARGET
    | {"stretch": Parameter(high=1.0, highest=2.0), "angle": Parameter(highest=1.0)}
    | {"time": Parameter(low=0.05, high=20.0, scale="log")},
    tolerance=1e-9,
)
def n5_never(normal: Normal, stretch: float, angle: float, time: float, decay: float, strength: float) -> Sides:
    a, (U, V) = strength * (1.0 + np.arange(MODES)) ** -decay, singular_vectors(normal)
    B = turned(normal, 5, angle) @ (U * a * stretch ** np.arange(1.0, MODES + 1)) @ V.T
    slopes = late_slopes(U, V, a, B, time)[0]
    infinite = np.isinf(np.asarray(theory.critical_time(U * a @ V.T, B))[:MODES])
    return 0.0, np.concatenate([-slopes / a**2, infinite - 0.5])


@inequality(
    "N5.critical",
    "A feature that keeps nearly all of its size turns at the critical time, with a penalty or without.",
    R"|T_i/T_i^* - 1| \le 3T_i^*(a_1 + \|B\| + \mu),\quad T^*_\mu = -\tfrac1\mu\log(1 - \mu T^*)",
    parameters=_TARGET
    | {"gap": Parameter(low=1e-4, high=1e-3, scale="log"), "other": Parameter(low=0.3, high=0.6)}
    | {"penalty": Parameter(high=5.0)},
)
def n5_critical(normal: Normal, gap: float, other: float, penalty: float, decay: float, strength: float) -> Sides:
    a, (U, V) = strength * (1.0 + np.arange(MODES)) ** -decay, singular_vectors(normal)
    latent = other * strength * normal(5, 4)
    inside = U.T @ latent @ V
    B = (
        latent - U * np.diagonal(inside) @ V.T + U * a * (1 - gap * np.array([1, -1, 2])) @ V.T
    )  # the second is stretched
    ours = np.asarray(theory.critical_time(U * a @ V.T, B, penalty))[:MODES]
    margins = [np.float64(ours[1] == 0) - 0.5]
    for mode in (0, 2):
        size = ours[mode] * (a[0] + np.linalg.norm(B) + penalty)
        slope = lambda time, mode=mode: late_slopes(U, V, a, B, time, penalty)[0, mode]  # noqa: E731
        exact = scipy.optimize.brentq(slope, 0.2 * ours[mode], 5 * ours[mode], rtol=1e-4)
        margins.append(3 - abs(exact / ours[mode] - 1) / size)
    return 0.0, np.array(margins)


@identity(
    "N5.jumps",
    "Learning a feature pays once and costs, in the square of the fine-tuning time, for all that it is coupled to.",
    R"\Delta L_i = a_iT^2\{2a_ig_i^2 + \textstyle\sum_j[(\tfrac{a_i}2+s_j)(B_{ij}^2+B_{ji}^2)"
    R" + (s_j-\bar a_j)B_{ij}B_{ji}]\} - \tfrac12a_i^2",
    parameters=_TASK | {"penalty": _PENALTY},
    tolerance=1e-3,
)
def n5_jumps(normal: Normal, penalty: float, **task: float) -> Sides:
    a, U, V, A, B = _task(normal, **task)
    scale = a[0] + np.linalg.norm(B) + penalty
    times = 0.6 * (1 - np.cos(np.pi * np.arange(2, 10) / 9.5)) / 2 / scale
    learned = a * np.tri(MODES + 1, MODES, -1)
    losses = [[loss(layers, A) for layers in _after(s, U, V, B, times, penalty)] for s in learned]
    rises = np.diff(losses, axis=0).T + a**2 / 2
    measured = coefficients(times, rises / times[:, None] ** 2)[0]
    short = 3e-5 / scale
    ours = np.asarray(theory.learning_jumps(A, B, [0.0, short], penalty))[:, :MODES]
    unit = np.abs(measured)
    return np.append(-2 * ours[0] / a**2, (ours[1] - ours[0]) / short**2 / unit), np.append(np.ones(3), measured / unit)


@existence(
    "N5.mechanism",
    "The degradation at the tuned learning rate grows where that rate shrinks more slowly than sensitivity grows.",
    R"\tfrac{d}{dt}\log(\eta^{*2}S) > 0 \iff \tfrac{d}{dt}[L_\mathrm{after} - L_\mathrm{before}] > 0",
    source="paper 2503.19206 (the mechanism); ours (here, one step of gradient descent)",
    parameters=_TASK | {"start": Parameter(low=0.25, high=6.0), "step": Parameter(low=0.05, high=1.0)},
)
def n5_mechanism(normal: Normal, start: float, step: float, **task: float) -> Sides:
    a, U, V, A, B = _task(normal, **task)
    levels = []
    for time in (start / a[-1], start / a[-1] + step / a[0]):
        w1, w2 = aligned(U, V, np.asarray(theory.singular_values(0.05 * a.min(), a, time)))
        ways = (B - w1 @ w2) @ w2.T, w1.T @ (B - w1 @ w2)
        after = lambda rate, w=(w1, w2), ways=ways: (w[0] + rate * ways[0], w[1] + rate * ways[1])  # noqa: E731
        search = {"bounds": (0, 2 / a[0]), "method": "bounded", "options": {"xatol": 1e-9}}
        rate = scipy.optimize.minimize_scalar(lambda rate, after=after: loss(after(rate), B), **search).x
        sensitivity = float(theory.gaussian_sensitivity(w1, w2, 1e-3))
        levels.append((rate**2 * sensitivity, loss(after(rate), A) - loss((w1, w2), A)))
    (before, degraded), (later, degraded_later) = levels
    return 0.0, np.sign(later - before) * (degraded_later - degraded) / a[0] ** 2
