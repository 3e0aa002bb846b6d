"""§7 as claims: features learned one after another, progressive sensitivity, inflection (docs, N1–N4)."""

from typing import Any, NamedTuple

import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.optimize

from sims.claims import Normal, claim
from sims.claims.problems import zero
from sims.parameters import DECAY, PENALTY, Parameter
from theory.overtraining import (
    fine_tuned_singular_values,
    fine_tuning,
    gaussian_sensitivity,
    inflection_time,
    learning_time,
    perturbed_loss,
    singular_values,
)

MODES, REPLICATES = 3, 1024
START = {
    "decay": DECAY.within(0.0, 2.0),
    "strength": Parameter(low=0.5, high=2.0, scale="log"),
    "initial": Parameter(low=1e-4, high=0.05, scale="log"),
}
"""Targets a_i = strength·i^(−decay), each mode starting from `initial` times the smallest."""


class Start(NamedTuple):
    """Targets a, starting values s₀, and the sizes m, h, k."""

    a: np.ndarray
    initial: np.ndarray
    shape: tuple[int, int, int]


def _start(decay: float, strength: float, initial: float, m: int = MODES, k: int = MODES) -> Start:
    a = strength * (1.0 + np.arange(MODES)) ** -decay
    return Start(a, np.full(MODES, initial * a.min()), (m, MODES, k))


def _flow(W1: np.ndarray, W2: np.ndarray, target: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradient flow of ½‖W₁W₂ − A‖² by a Runge–Kutta method on the full matrices."""
    split, shapes = W1.size, (W1.shape, W2.shape)

    def velocity(_: float, flat: np.ndarray) -> np.ndarray:
        W1, W2 = flat[:split].reshape(shapes[0]), flat[split:].reshape(shapes[1])
        gap = target - W1 @ W2
        return np.concatenate([(gap @ W2.T).ravel(), (W1.T @ gap).ravel()])

    flat = np.concatenate([W1.ravel(), W2.ravel()])
    end = scipy.integrate.solve_ivp(velocity, (0, time), flat, method="DOP853", rtol=1e-10, atol=1e-13).y[:, -1]
    return end[:split].reshape(shapes[0]), end[split:].reshape(shapes[1])


# N1, N4: the flow ----------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A start with random singular vectors U (m, r), V (k, r), and how long it is pretrained, then fine-tuned to b."""

    start: Start
    U: np.ndarray
    V: np.ndarray
    b: np.ndarray
    time: float
    finetune_time: float
    imbalance: float
    turn: np.ndarray


def _trained(
    normal: Normal,
    time: float,
    finetune_time: float = 0.0,
    stretch: float = 1.0,
    imbalance: float = 0.0,
    angle: float = 0.0,
    **values: Any,
) -> Trained:
    start = _start(m=5, k=4, **values)
    U, V = np.linalg.qr(normal(5, MODES))[0], np.linalg.qr(normal(4, MODES))[0]
    draw = normal(5, 5)
    turn = scipy.linalg.expm(angle * (draw - draw.T) / np.linalg.norm(draw - draw.T, 2))
    b = start.a * stretch ** np.array([1.0, -1.0, 0.5])
    return Trained(start, U, V, b, time / start.a[0], finetune_time, imbalance, turn)


def _weights(trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    """Pretrained W₁, W₂, starting from w₁w₂ = s₀ and w₁² − w₂² = c."""
    (a, initial, _), c = trained.start, trained.imbalance
    root = np.sqrt(c**2 + 4 * initial**2)
    w1, w2 = np.sqrt((root + c) / 2), initial / np.sqrt((root + c) / 2)
    return _flow(trained.U * w1, (trained.V * w2).T, trained.U * a @ trained.V.T, trained.time)


def _predicted_features(trained: Trained) -> np.ndarray:
    return np.asarray(singular_values(trained.start.initial, trained.start.a, trained.time))


def _measured_features(trained: Trained) -> np.ndarray:
    W1, W2 = _weights(trained)
    return np.einsum("pi,pq,qi->i", trained.U, W1 @ W2, trained.V)


def _predicted_fine_tuned(trained: Trained) -> np.ndarray:
    before = singular_values(trained.start.initial, trained.start.a, trained.time)
    return np.asarray(fine_tuned_singular_values(before, trained.b, trained.finetune_time))


def _measured_fine_tuned(trained: Trained) -> np.ndarray:
    W1, W2 = _flow(*_weights(trained), trained.turn @ (trained.U * trained.b) @ trained.V.T, trained.finetune_time)
    return np.einsum("pi,pq,qi->i", trained.U, W1 @ W2, trained.V)


# N2 -----------------------------------------------------------------------------------------------------------------


class Perturbed(NamedTuple):
    """Weights, a target, and the losses under many perturbations."""

    w1: np.ndarray
    w2: np.ndarray
    target: np.ndarray
    gamma: float
    losses: np.ndarray


def _perturbed(normal: Normal, m: int, h: int, k: int, gamma: float, varying: float) -> Perturbed:
    """The size of the noise varies from draw to draw unless `varying` is 0; its mean square is γ² all the same."""
    w1, w2, target = normal(m, h), normal(h, k), normal(m, k)
    size = gamma * np.sqrt(1 - varying + varying * normal(REPLICATES, 1, 1) ** 2)
    moved = (w1 + size * normal(REPLICATES, m, h)) @ (w2 + size * normal(REPLICATES, h, k))
    return Perturbed(w1, w2, target, gamma, np.sum((moved - target) ** 2, axis=(1, 2)) / 2)


def _expected_loss(perturbed: Perturbed) -> np.ndarray:
    w1, w2, target, gamma, _ = perturbed
    return np.asarray(np.sum((w1 @ w2 - target) ** 2) / 2 + gaussian_sensitivity(w1, w2, gamma))


def _growing_sensitivity(trained: Trained) -> np.ndarray:
    """Steps of the sensitivity of the trained matrices along the time, in units of the largest."""
    times = np.linspace(0, 1, 9)[1:] * trained.time
    rises = [float(gaussian_sensitivity(*_weights(trained._replace(time=time)), 0.1)) for time in times]
    return np.diff(rises) / max(rises)


# N3 -----------------------------------------------------------------------------------------------------------------


class Inflection(NamedTuple):
    """A start, γ, and the imbalance with which its modes are measured."""

    start: Start
    gamma: float
    imbalance: float


def _inflection(normal: Normal, gamma: float, imbalance: float = 0.0, **values: Any) -> Inflection:
    return Inflection(_start(**values), gamma, imbalance)


def _cost(instance: Inflection) -> float:
    m, _, k = instance.start.shape
    return instance.gamma**2 * (m + k) / 2


def _turning_values(instance: Inflection) -> np.ndarray:
    """s = a − γ²(m + k)/2, or s₀ where that lies below."""
    return np.maximum(instance.start.a - _cost(instance), instance.start.initial)


def _least_perturbed_values(instance: Inflection) -> np.ndarray:
    """The s of least perturbed loss of each mode, by search."""
    g, c = _cost(instance), instance.imbalance

    def height(s: float, a: float) -> float:
        return 0.5 * (a - s) ** 2 + 0.5 * g * np.sqrt(c**2 + 4 * s**2)

    return np.array(
        [
            scipy.optimize.minimize_scalar(
                height, bounds=(low, a), args=(a,), method="bounded", options={"xatol": 1e-10}
            ).x
            for a, low in zip(instance.start.a, instance.start.initial)
        ]
    )


def _total(instance: Inflection, time: Any) -> np.ndarray:
    start = instance.start
    return np.asarray(perturbed_loss(start.initial, start.a, time, instance.gamma, start.shape).total)


def _rise_at_last(instance: Inflection) -> np.ndarray:
    """How far the perturbed loss of an endlessly trained network lies above its least value, relative to the first."""
    a, initial, shape = instance.start
    turn = float(inflection_time(initial, a, instance.gamma, shape))
    end = 1e3 / a.min()
    return (_total(instance, end) - _total(instance, min(turn, end))) / _total(instance, 0.0)


def _nowhere_lower(instance: Inflection) -> np.ndarray:
    """The perturbed loss on a grid of times above that at the inflection, relative to the first."""
    a, initial, shape = instance.start
    turn = inflection_time(initial, a, instance.gamma, shape)
    end = float(np.max(learning_time(initial, a, 0.9999 * a)))
    return (_total(instance, np.linspace(0, end, 400)) - _total(instance, turn)) / _total(instance, 0.0)


def _earlier(instance: Inflection) -> np.ndarray:
    """How much earlier the inflection comes at 1.3 γ, relative to the time at γ."""
    a, initial, shape = instance.start
    times = np.asarray(inflection_time(initial, a, instance.gamma * np.array([1.0, 1.3]), shape))
    return (times[0] - times[1]) / max(times[0], 1e-300)


# N4: when fine-tuning hurts -----------------------------------------------------------------------------------------


class FineTuned(NamedTuple):
    """A start, fine-tuned to stretch·a."""

    start: Start
    stretch: float
    finetune_time: float
    penalty: float


def _fine_tuned(normal: Normal, stretch: float, finetune_time: float, penalty: float = 0.0, **values: Any) -> FineTuned:
    return FineTuned(_start(**values), stretch, finetune_time, penalty)


def _after(instance: FineTuned, times: np.ndarray, penalty: float) -> Any:
    a, initial, _ = instance.start
    penalties = np.full(times.shape, penalty)
    return fine_tuning(initial, a, instance.stretch * a, times, instance.finetune_time, penalties)


def _falls(instance: FineTuned) -> np.ndarray:
    """Falls of the pretraining loss after fine-tuning from one pretraining time to the next."""
    a, initial, _ = instance.start
    times = np.linspace(0, float(np.max(learning_time(initial, a, 0.999 * a))), 60)
    loss = np.asarray(_after(instance, times, 0.0).pretrain_after)
    return -np.diff(loss) / loss[0]


def _delay_and_cost(instance: FineTuned) -> np.ndarray:
    """What the penalty adds to the time of least pretraining loss after, and to the fine-tuning loss after."""
    a, initial, _ = instance.start
    times = np.linspace(0, float(np.max(learning_time(initial, a, 0.999 * a))), 120)
    free, held = (_after(instance, times, penalty) for penalty in (0.0, instance.penalty))
    delay = times[np.argmin(held.pretrain_after)] - times[np.argmin(free.pretrain_after)]
    cost = np.asarray(held.finetune_after - free.finetune_after) / float(held.finetune_before[0])
    return np.append(cost, delay / times[-1])


GAMMA = Parameter(low=0.02, high=0.5, scale="log")
SIZES = {"m": Parameter(low=MODES, high=12, scale="whole"), "k": Parameter(low=MODES, high=12, scale="whole")}
TIME = Parameter(low=0.5, high=10.0, scale="log")
ONE_MODE = {"decay": DECAY.within(0.0), "strength": START["strength"], "initial": START["initial"]}


@claim(
    "N1",
    "From a balanced aligned start each singular value follows its own sigmoid, large ones first.",
    R"s_i(t) = a_i e^{2a_it} / (e^{2a_it} - 1 + a_i/s_0)",
    source="paper 2503.19206 (the mechanism)",
    kind="identity",
    parameters=START | {"time": TIME, "imbalance": Parameter(low=0.0, high=0.0, highest=1.0)},
    tolerance=1e-6,
)
def n1(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _trained(normal, **values)
    return _predicted_features(instance), _measured_features(instance)


@claim(
    "N2",
    "What a Gaussian perturbation adds to the loss depends only on the norms of the two layers.",
    R"\mathbb E\,\Delta L = \tfrac12[\gamma^2(m\|W_2\|^2 + k\|W_1\|^2) + \gamma^4 mhk]",
    source="paper 2503.19206 (the experiment); ours (the formula)",
    kind="statistical",
    parameters={
        "m": Parameter(low=1, high=8, scale="whole"),
        "h": Parameter(low=1, high=8, scale="whole"),
        "k": Parameter(low=1, high=8, scale="whole"),
        "gamma": Parameter(low=0.01, high=2.0, scale="log"),
        "varying": Parameter(low=0.0, high=0.0, highest=1.0),
    },
)
def n2(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _perturbed(normal, **values)
    return _expected_loss(instance), (lambda perturbed: perturbed.losses)(instance)


@claim(
    "N2.progressive",
    "Started below its targets, a network only grows more sensitive with pretraining time.",
    R"\tfrac{d}{dt}\,\mathbb E\,\Delta L \ge 0",
    source="paper 2503.19206 (progressive sensitivity)",
    kind="inequality",
    parameters=START | {"initial": Parameter(low=1e-4, high=0.9, scale="log", highest=5.0), "time": TIME},
    tolerance=1e-9,
)
def n2_progressive(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _trained(normal, **values)
    return zero(instance), _growing_sensitivity(instance)


@claim(
    "N3",
    "The perturbed loss of a balanced mode turns where it is γ²(m+k)/2 short of its target.",
    R"s_i = a_i - \gamma^2(m+k)/2",
    source="ours",
    kind="identity",
    parameters=START | SIZES | {"gamma": GAMMA, "imbalance": Parameter(low=0.0, high=0.0, highest=1.0)},
    tolerance=1e-4,
)
def n3(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _inflection(normal, **values)
    return _turning_values(instance), _least_perturbed_values(instance)


@claim(
    "N3.total",
    "The inflection time of all modes together is where the perturbed loss is least.",
    R"\textstyle\sum_i s_i'(s_i - a_i + \gamma^2(m+k)/2) = 0",
    source="ours",
    kind="inequality",
    parameters=START | SIZES | {"gamma": GAMMA},
    tolerance=1e-9,
)
def n3_total(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _inflection(normal, **values)
    return zero(instance), _nowhere_lower(instance)


@claim(
    "N3.finite",
    "More pretraining hurts in the end, however small the perturbation, if there is one.",
    R"t^* < \infty \iff \gamma > 0",
    source="ours",
    kind="inequality",
    parameters=START | SIZES | {"gamma": Parameter(low=0.02, high=0.5, scale="log")},
)
def n3_finite(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _inflection(normal, **values)
    return zero(instance), _rise_at_last(instance)


@claim(
    "N3.earlier",
    "A larger perturbation turns the loss no later.",
    R"\gamma \le \gamma' \Rightarrow t^*(\gamma') \le t^*(\gamma)",
    source="paper 2503.19206 (observed); ours (here)",
    kind="inequality",
    parameters=START | SIZES | {"gamma": GAMMA},
    tolerance=1e-9,
)
def n3_earlier(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _inflection(normal, **values)
    return zero(instance), _earlier(instance)


@claim(
    "N4",
    "Fine-tuning with the same singular vectors continues every mode towards its new target.",
    R"s_i(t, T) = b_i e^{2b_iT} / (e^{2b_iT} - 1 + b_i/s_i(t))",
    source="paper 2503.19206 (the setting); ours (the formula)",
    kind="identity",
    parameters=START
    | {
        "time": TIME,
        "finetune_time": Parameter(low=0.1, high=3.0, scale="log"),
        "stretch": Parameter(low=0.5, high=2.0, scale="log"),
        "angle": Parameter(low=0.0, high=0.0, highest=1.0),
    },
    tolerance=1e-6,
)
def n4(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _trained(normal, **values)
    return _predicted_fine_tuned(instance), _measured_fine_tuned(instance)


@claim(
    "N4.no_inflection",
    "If fine-tuning stretches no feature, more pretraining never raises the final pretraining loss.",
    R"b_i \le a_i \Rightarrow \tfrac{d}{dt} L_\mathrm{pre}(\text{after}) \le 0",
    source="ours",
    kind="inequality",
    parameters=START
    | {
        "stretch": Parameter(low=0.2, high=1.0, highest=3.0),
        "finetune_time": Parameter(low=0.1, high=3.0, scale="log"),
    },
    tolerance=1e-9,
)
def n4_no_inflection(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _fine_tuned(normal, **values)
    return zero(instance), _falls(instance)


@claim(
    "N4.penalty",
    "A penalty towards the pretrained weights delays the inflection and costs fine-tuning loss.",
    R"t^*(\mu) \ge t^*(0),\quad L_\mathrm{ft}(\mu) \ge L_\mathrm{ft}(0)",
    source="paper 2503.19206 (the trade-off); ours (here, equal targets)",
    kind="inequality",
    parameters=ONE_MODE
    | {
        "stretch": Parameter(low=1.05, high=2.0),
        "finetune_time": Parameter(low=0.1, high=2.0, scale="log"),
        "penalty": PENALTY.within(0.05, 5.0),
    },
    tolerance=1e-6,
)
def n4_penalty(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _fine_tuned(normal, **values)
    return zero(instance), _delay_and_cost(instance)
