"""§7 as claims: features learned one after another, progressive sensitivity, inflection (docs, N1–N4)."""

import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.optimize

from sims.claims import Normal, Sides, identity, inequality, statistical
from sims.parameters import DECAY, PENALTY, Parameter
from theory import overtraining as theory

_MODES, _REPLICATES = 3, 1024
_START = {
    "decay": DECAY.within(0.0, 2.0),
    "strength": Parameter(low=0.5, high=2.0, scale="log"),
    "initial": Parameter(low=1e-4, high=0.05, scale="log"),
}
_SIZES = {"m": Parameter(low=_MODES, high=12, scale="whole"), "k": Parameter(low=_MODES, high=12, scale="whole")}
_GAMMA = Parameter(low=0.02, high=0.5, scale="log")
_TIME = Parameter(low=0.5, high=10.0, scale="log")
_FINETUNE_TIME = Parameter(low=0.1, high=3.0, scale="log")


def _start(decay: float, strength: float, initial: float) -> tuple[np.ndarray, np.ndarray]:
    """Starting values s₀, `initial` times the smallest target, and targets a_i = strength·i^(−decay)."""
    a = strength * (1.0 + np.arange(_MODES)) ** -decay
    return np.full(_MODES, initial * a.min()), a


def _singular_vectors(normal: Normal) -> tuple[np.ndarray, np.ndarray]:
    """Random orthonormal columns U (5, r), V (4, r)."""
    return np.linalg.qr(normal(5, _MODES))[0], np.linalg.qr(normal(4, _MODES))[0]


def _pretrained(
    U: np.ndarray, V: np.ndarray, initial: np.ndarray, a: np.ndarray, time: float, imbalance: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """W₁, W₂ that learned U diag(a) Vᵀ for a time, from w₁w₂ = s₀ and w₁² − w₂² = c."""
    w1 = np.sqrt((np.sqrt(imbalance**2 + 4 * initial**2) + imbalance) / 2)
    return _flow(U * w1, (V * (initial / w1)).T, U * a @ V.T, time)


def _flow(W1: np.ndarray, W2: np.ndarray, target: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradient flow of ½‖W₁W₂ − A‖² by a Runge–Kutta method on the full matrices."""

    def layers(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return flat[: W1.size].reshape(W1.shape), flat[W1.size :].reshape(W2.shape)

    def velocity(_: float, flat: np.ndarray) -> np.ndarray:
        w1, w2 = layers(flat)
        gap = target - w1 @ w2
        return np.concatenate([(gap @ w2.T).ravel(), (w1.T @ gap).ravel()])

    start, precise = np.concatenate([W1.ravel(), W2.ravel()]), {"method": "DOP853", "rtol": 1e-10, "atol": 1e-13}
    return layers(scipy.integrate.solve_ivp(velocity, (0, time), start, **precise).y[:, -1])


@identity(
    "N1",
    "From a balanced aligned start each singular value follows its own sigmoid, large ones first.",
    R"s_i(t) = a_i e^{2a_it} / (e^{2a_it} - 1 + a_i/s_0)",
    source="paper 2503.19206 (the mechanism)",
    parameters=_START | {"time": _TIME, "imbalance": Parameter(highest=1.0)},
    tolerance=1e-6,
)
def n1(normal: Normal, time: float, imbalance: float, **start: float) -> Sides:
    (initial, a), (U, V) = _start(**start), _singular_vectors(normal)
    W1, W2 = _pretrained(U, V, initial, a, time / a[0], imbalance)
    return theory.singular_values(initial, a, time / a[0]), np.einsum("pi,pq,qi->i", U, W1 @ W2, V)


@statistical(
    "N2",
    "What a Gaussian perturbation adds to the loss depends only on the norms of the two layers.",
    R"\mathbb E\,\Delta L = \tfrac12[\gamma^2(m\|W_2\|^2 + k\|W_1\|^2) + \gamma^4 mhk]",
    source="paper 2503.19206 (the experiment); ours (the formula)",
    parameters={
        "m": Parameter(low=1, high=8, scale="whole"),
        "h": Parameter(low=1, high=8, scale="whole"),
        "k": Parameter(low=1, high=8, scale="whole"),
        "gamma": Parameter(low=0.01, high=2.0, scale="log"),
        "varying": Parameter(highest=1.0),
    },
)
def n2(normal: Normal, m: int, h: int, k: int, gamma: float, varying: float) -> Sides:
    w1, w2, target = normal(m, h), normal(h, k), normal(m, k)
    # The size of the noise varies from replicate to replicate unless `varying` is 0; its mean square stays γ².
    size = gamma * np.sqrt(1 - varying + varying * normal(_REPLICATES, 1, 1) ** 2)
    moved = (w1 + size * normal(_REPLICATES, m, h)) @ (w2 + size * normal(_REPLICATES, h, k))
    expected = np.sum((w1 @ w2 - target) ** 2) / 2 + theory.gaussian_sensitivity(w1, w2, gamma)
    return expected, np.sum((moved - target) ** 2, axis=(1, 2)) / 2


@inequality(
    "N2.progressive",
    "Started below its targets, a network only grows more sensitive with pretraining time.",
    R"\tfrac{d}{dt}\,\mathbb E\,\Delta L \ge 0",
    source="paper 2503.19206 (progressive sensitivity)",
    parameters=_START | {"initial": Parameter(low=1e-4, high=0.9, scale="log", highest=5.0), "time": _TIME},
    tolerance=1e-9,
)
def n2_progressive(normal: Normal, time: float, **start: float) -> Sides:
    (initial, a), (U, V) = _start(**start), _singular_vectors(normal)
    times = np.linspace(0, 1, 9)[1:] * time / a[0]
    rises = [float(theory.gaussian_sensitivity(*_pretrained(U, V, initial, a, t), 0.1)) for t in times]
    return 0.0, np.diff(rises) / max(rises)


@identity(
    "N3",
    "The perturbed loss of a balanced mode turns where it is γ²(m+k)/2 short of its target.",
    R"s_i = a_i - \gamma^2(m+k)/2",
    parameters=_START | _SIZES | {"gamma": _GAMMA, "imbalance": Parameter(highest=1.0)},
    tolerance=1e-4,
)
def n3(normal: Normal, gamma: float, imbalance: float, m: int, k: int, **start: float) -> Sides:
    initial, a = _start(**start)
    g = gamma**2 * (m + k) / 2

    def height(s: float, a: float) -> float:
        return 0.5 * (a - s) ** 2 + 0.5 * g * np.sqrt(imbalance**2 + 4 * s**2)

    def least(low: float, a: float) -> float:  # the s of least perturbed loss, by search
        search = {"bounds": (low, a), "method": "bounded", "options": {"xatol": 1e-10}}
        return scipy.optimize.minimize_scalar(height, args=(a,), **search).x

    return np.maximum(a - g, initial), np.array([least(*mode) for mode in zip(initial, a)])


@inequality(
    "N3.total",
    "The inflection time of all modes together is where the perturbed loss is least.",
    R"\textstyle\sum_i s_i'(s_i - a_i + \gamma^2(m+k)/2) = 0",
    parameters=_START | _SIZES | {"gamma": _GAMMA},
    tolerance=1e-9,
)
def n3_total(normal: Normal, gamma: float, m: int, k: int, **start: float) -> Sides:
    initial, a = _start(**start)
    turn = float(theory.inflection_time(initial, a, gamma, (m, _MODES, k)))
    times = np.linspace(0, float(np.max(theory.learning_time(initial, a, 0.9999 * a))), 400)
    losses = np.asarray(theory.perturbed_loss(initial, a, np.append(times, turn), gamma, (m, _MODES, k)).total)
    return 0.0, (losses[:-1] - losses[-1]) / losses[0]


@inequality(
    "N3.finite",
    "More pretraining hurts in the end, however small the perturbation, if there is one.",
    R"t^* < \infty \iff \gamma > 0",
    parameters=_START | _SIZES | {"gamma": _GAMMA},
)
def n3_finite(normal: Normal, gamma: float, m: int, k: int, **start: float) -> Sides:
    initial, a = _start(**start)
    end = 1e3 / a.min()
    turn = min(float(theory.inflection_time(initial, a, gamma, (m, _MODES, k))), end)
    times = np.array([0.0, turn, end])
    first, least, last = theory.perturbed_loss(initial, a, times, gamma, (m, _MODES, k)).total
    return 0.0, (last - least) / first


@inequality(
    "N3.earlier",
    "A larger perturbation turns the loss no later.",
    R"\gamma \le \gamma' \Rightarrow t^*(\gamma') \le t^*(\gamma)",
    source="paper 2503.19206 (observed); ours (here)",
    parameters=_START | _SIZES | {"gamma": _GAMMA},
    tolerance=1e-9,
)
def n3_earlier(normal: Normal, gamma: float, m: int, k: int, **start: float) -> Sides:
    initial, a = _start(**start)
    time, earlier = np.asarray(theory.inflection_time(initial, a, gamma * np.array([1.0, 1.3]), (m, _MODES, k)))
    return 0.0, (time - earlier) / max(time, 1e-300)


@identity(
    "N4",
    "Fine-tuning with the same singular vectors continues every mode towards its new target.",
    R"s_i(t, T) = b_i e^{2b_iT} / (e^{2b_iT} - 1 + b_i/s_i(t))",
    source="paper 2503.19206 (the setting); ours (the formula)",
    parameters=_START
    | {
        "time": _TIME,
        "finetune_time": _FINETUNE_TIME,
        "stretch": Parameter(low=0.5, high=2.0, scale="log"),
        "angle": Parameter(highest=1.0),
    },
    tolerance=1e-6,
)
def n4(normal: Normal, time: float, finetune_time: float, stretch: float, angle: float, **start: float) -> Sides:
    (initial, a), (U, V) = _start(**start), _singular_vectors(normal)
    latent = normal(5, 5)
    turn = scipy.linalg.expm(angle * (latent - latent.T) / np.linalg.norm(latent - latent.T, 2))
    b = a * stretch ** np.array([1.0, -1.0, 0.5])
    W1, W2 = _flow(*_pretrained(U, V, initial, a, time / a[0]), turn @ (U * b) @ V.T, finetune_time)
    predicted = theory.fine_tuned_singular_values(theory.singular_values(initial, a, time / a[0]), b, finetune_time)
    return predicted, np.einsum("pi,pq,qi->i", U, W1 @ W2, V)


@inequality(
    "N4.no_inflection",
    "If fine-tuning stretches no feature, more pretraining never raises the final pretraining loss.",
    R"b_i \le a_i \Rightarrow \tfrac{d}{dt} L_\mathrm{pre}(\text{after}) \le 0",
    parameters=_START | {"stretch": Parameter(low=0.2, high=1.0, highest=3.0), "finetune_time": _FINETUNE_TIME},
    tolerance=1e-9,
)
def n4_no_inflection(normal: Normal, stretch: float, finetune_time: float, **start: float) -> Sides:
    initial, a = _start(**start)
    times = np.linspace(0, float(np.max(theory.learning_time(initial, a, 0.999 * a))), 60)
    loss = np.asarray(theory.fine_tuning(initial, a, stretch * a, times, finetune_time).after.pretrain)
    return 0.0, -np.diff(loss) / loss[0]


@inequality(
    "N4.penalty",
    "A penalty towards the pretrained weights delays the inflection and costs fine-tuning loss.",
    R"t^*(\mu) \ge t^*(0),\quad L_\mathrm{ft}(\mu) \ge L_\mathrm{ft}(0)",
    source="paper 2503.19206 (the trade-off); ours (here, equal targets)",
    parameters={"decay": DECAY.within(0.0), "strength": _START["strength"], "initial": _START["initial"]}
    | {
        "stretch": Parameter(low=1.05, high=2.0),
        "finetune_time": Parameter(low=0.1, high=2.0, scale="log"),
        "penalty": PENALTY.within(0.05, 5.0),
    },
    tolerance=1e-6,
)
def n4_penalty(normal: Normal, stretch: float, finetune_time: float, penalty: float, **start: float) -> Sides:
    initial, a = _start(**start)
    times = np.linspace(0, float(np.max(theory.learning_time(initial, a, 0.999 * a))), 120)
    free, held = (theory.fine_tuning(initial, a, stretch * a, times, finetune_time, mu) for mu in (0.0, penalty))
    delay = times[np.argmin(held.after.pretrain)] - times[np.argmin(free.after.pretrain)]
    cost = (held.after.finetune - free.after.finetune) / held.before.finetune[0]
    return 0.0, np.append(cost, delay / times[-1])
