"""§7 as claims: features learned one after another, progressive sensitivity, inflection (docs, N1–N4)."""

import jax.numpy as jnp
import numpy as np

from linfit import network
from sims.claims import Normal, Sides, identity, inequality, statistical
from sims.claims.networks import (
    MODES,
    aligned,
    expected_rise,
    fine_tuned_mode,
    flow,
    loss,
    modes,
    singular_vectors,
    targets,
    turned,
)
from sims.overtraining import key_from
from sims.parameters import DECAY, PENALTY, Parameter
from theory import overtraining as theory

_START = {
    "decay": DECAY.within(0.0, 2.0),
    "strength": Parameter(low=0.5, high=2.0, scale="log"),
    "initial": Parameter(low=1e-4, high=0.05, scale="log"),
}
_SIZES = {"m": Parameter(low=MODES, high=12, scale="whole"), "k": Parameter(low=MODES, high=12, scale="whole")}
_GAMMA = Parameter(low=0.02, high=0.5, scale="log")
_TIME = Parameter(low=0.5, high=10.0, scale="log")
_FINETUNE_TIME = Parameter(low=0.1, high=3.0, scale="log")
_IMBALANCE = Parameter(low=-1.0, high=1.0)
_STRETCH = Parameter(low=0.5, high=2.0, scale="log")
_UP = Parameter(low=1.05, high=2.0)


def _diagonal(U: np.ndarray, V: np.ndarray, layers: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.einsum("pi,pq,qi->i", U, layers[0] @ layers[1], V)


@identity(
    "N1",
    "From a balanced aligned start each singular value follows its own sigmoid, large ones first.",
    R"s_i(t) = a_i e^{2a_it} / (e^{2a_it} - 1 + a_i/s_0)",
    source="paper 2503.19206 (the mechanism)",
    parameters=_START | {"time": _TIME, "imbalance": Parameter(highest=1.0)},
    tolerance=1e-6,
)
def n1(normal: Normal, time: float, imbalance: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    (learned,) = flow(aligned(U, V, initial, imbalance), U * a @ V.T, time / a[0])
    return theory.singular_values(initial, a, time / a[0]), _diagonal(U, V, learned)


@identity(
    "N1.unbalanced",
    "An unbalanced mode follows a linear flow, normalised.",
    R"q(t) = e^{Ft}q_0 / \sqrt{1 + \int_0^t |e^{Fr}q_0|^2 dr},\quad F = \begin{pmatrix}c/2&a\\a&-c/2\end{pmatrix}",
    parameters=_START | {"time": _TIME, "imbalance": _IMBALANCE},
    tolerance=1e-6,
)
def n1_unbalanced(normal: Normal, time: float, imbalance: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    (learned,) = flow(aligned(U, V, initial, imbalance), U * a @ V.T, time / a[0])
    ours = network.aligned_modes(*network.layer_modes(initial, imbalance), a, time / a[0])
    # W₁ = U diag(w₁) and W₂ = diag(w₂) Vᵀ stay so
    return np.stack(ours), np.stack([np.einsum("pi,pi->i", U, learned[0]), np.einsum("ip,pi->i", learned[1], V)])


@identity(
    "N1.time",
    "A mode takes a logarithmic time to reach a given level, unbalanced or not.",
    R"t = \tfrac1d\log\frac{(c^2+4as+dR(s))(a-s_0)}{(c^2+4as_0+dR(s_0))(a-s)},\quad d = R(a)",
    parameters=_START | {"share": Parameter(low=0.05, high=0.99), "imbalance": _IMBALANCE},
    tolerance=1e-6,
)
def n1_time(normal: Normal, share: float, imbalance: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    times = np.clip(theory.learning_time(initial, a, initial + share * (a - initial), imbalance), 0, 1e3 / a.min())
    order = np.argsort(times)
    path = flow(aligned(U, V, initial, imbalance), U * a @ V.T, times[order])
    reached = np.array([_diagonal(U, V, layers)[mode] for layers, mode in zip(path, order)])
    return np.ones(MODES), (reached - initial[order]) / (share * (a - initial)[order])


@identity(
    "N1.trained",
    "The trainer follows the flow of the loss on data, its penalty included, from aligned and padded weights.",
    R"\theta' = -\nabla\tfrac1{2n}\|XW^\top - Y\|^2 - \mu(\theta - \theta_\mathrm{ref})",
    parameters=_START | {"time": Parameter(low=0.3, high=3.0), "penalty": Parameter(high=1.0), "imbalance": _IMBALANCE},
    tolerance=1e-6,
)
def n1_trained(normal: Normal, time: float, penalty: float, imbalance: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    white = 6**0.5 * np.linalg.qr(normal(6, 4))[0]  # inputs of covariance I: the loss of data is that of the target
    objective = network.data_objective(white, white @ (U * a @ V.T).T)
    # the target has four singular values, of which the last, 0, is left out of the start
    begun = network.aligned_network(U * a @ V.T, np.append(initial, 0), imbalance * np.array([1, 1, 1, 0]), 5)
    trained = network.gradient_flow(begun, objective, np.array([time]), penalty=penalty, rtol=1e-9)
    (exact,) = flow(aligned(U, V, initial, imbalance), U * a @ V.T, time, penalty)
    losses = np.ravel(network.loss(trained, objective))[:1]
    return np.append(trained.product[0], losses), np.append(exact[0] @ exact[1], loss(exact, U * a @ V.T))


@identity(
    "N1.steps",
    "The trainer takes the steps of gradient descent on data, schedule and penalty included.",
    R"\theta_{j+1} = \theta_j - \eta_j(\nabla L(\theta_j) + \mu(\theta_j - \theta_0))",
    parameters={
        "step_size": Parameter(low=0.02, high=0.1, scale="log"),
        "penalty": Parameter(high=2.0),
        "final": Parameter(high=0.5),
    },
    tolerance=1e-9,
)
def n1_steps(normal: Normal, step_size: float, penalty: float, final: float) -> Sides:
    X, Y, steps, ends = normal(6, 3), normal(6, 4), 12, []
    begun = 0.5 * normal(4, 5), 0.5 * normal(5, 3)
    step = np.arange(steps)
    falling = final + (1 - final) * (1 + np.cos(np.pi * step / steps)) / 2
    trapezoid = np.minimum(np.minimum((step + 1) / 3, (steps - step) / 6), 1)
    for shares in (np.ones(steps), falling, trapezoid):
        w1, w2 = begun
        for rate in step_size * shares:
            slope = (X @ (w1 @ w2).T - Y).T @ X / len(X)
            ways = slope @ w2.T + penalty * (w1 - begun[0]), w1.T @ slope + penalty * (w2 - begun[1])
            w1, w2 = w1 - rate * ways[0], w2 - rate * ways[1]
        ends.append([*np.ravel(w1 @ w2), np.sum((X @ (w1 @ w2).T - Y) ** 2) / (2 * len(X))])
    objective = network.data_objective(X, Y)
    schedules = np.stack(
        [
            network.constant(step_size, steps),
            network.cosine(step_size, steps, final),
            network.warmup_stable_decay(step_size, steps, 3 / steps, 6 / steps),
        ]
    )
    trained = network.descend(network.TwoLayer(*map(jnp.asarray, begun)), objective, schedules, penalty=penalty)
    losses = np.asarray(network.loss(trained, objective))
    return np.column_stack([np.reshape(trained.product, (3, -1)), losses]), np.array(ends)


@identity(
    "N2",
    "What a random perturbation adds to the loss on average depends only on the norms of the two layers.",
    R"\mathbb E\,\Delta L = \tfrac12[\gamma^2m\|W_2\|^2 + \gamma_2^2k\|W_1\|^2 + \gamma^2\gamma_2^2mhk]",
    source="paper 2503.19206 (the experiment); ours (the formula)",
    parameters={
        "m": Parameter(low=1, high=4, scale="whole"),
        "h": Parameter(low=1, high=4, scale="whole"),
        "k": Parameter(low=1, high=4, scale="whole"),
        "gamma": Parameter(low=0.01, high=2.0, scale="log"),
        "ratio": Parameter(low=0.3, high=3.0, scale="log"),
    },
    tolerance=1e-8,
)
def n2(normal: Normal, m: int, h: int, k: int, gamma: float, ratio: float) -> Sides:
    layers = normal(m, h), normal(h, k)
    expected = float(theory.gaussian_sensitivity(*layers, gamma, ratio * gamma))
    return expected, np.float64(expected_rise(normal, layers, gamma, ratio * gamma))


@statistical(
    "N2.noise",
    "The noise of a perturbed network, and a Gaussian start, have the standard deviations asked for.",
    R"\mathbb E(W_i' - W_i)^2 = \gamma_i^2",
    parameters={
        "gamma": Parameter(low=0.01, high=1.0, scale="log"),
        "ratio": Parameter(low=0.3, high=3.0, scale="log"),
    },
)
def n2_noise(normal: Normal, gamma: float, ratio: float) -> Sides:
    size = 256
    centre = network.TwoLayer(jnp.asarray(normal(size, size)), jnp.asarray(normal(size, size)))
    moved = network.perturb(key_from(normal(4)), centre, gamma, ratio * gamma)
    begun = network.sample_network(key_from(normal(4)), (size, size, size), gamma, ratio * gamma)
    noise = [np.ravel(after - before) for after, before in zip(moved, centre)] + [np.ravel(layer) for layer in begun]
    return np.ones(4), np.column_stack(noise) ** 2 / np.tile([gamma, ratio * gamma], 2) ** 2


@identity(
    "N2.flow",
    "Along the flow the perturbed loss is known in closed form, from a balanced start or not.",
    R"L(t) + \tfrac12[\gamma^2\textstyle\sum_i(mw_2^2 + kw_1^2) + \gamma^4mhk]",
    parameters=_START | {"time": _TIME, "gamma": _GAMMA, "imbalance": _IMBALANCE},
    tolerance=1e-6,
)
def n2_flow(normal: Normal, time: float, gamma: float, imbalance: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    (learned,) = flow(aligned(U, V, initial, imbalance), U * a @ V.T, time / a[0])
    ours = theory.perturbed_loss(initial, a, time / a[0], gamma, (5, MODES, 4), imbalance)
    lost, rise = loss(learned, U * a @ V.T), expected_rise(normal, learned, gamma, gamma)
    scale = 1 / np.array([loss(aligned(U, V, initial, imbalance), U * a @ V.T), rise, lost + rise])
    return scale * np.array([ours.loss, ours.sensitivity, ours.total]), scale * np.array([lost, rise, lost + rise])


@inequality(
    "N2.progressive",
    "Started below its targets, a network only grows more sensitive with pretraining time.",
    R"\tfrac{d}{dt}\,\mathbb E\,\Delta L \ge 0",
    source="paper 2503.19206 (progressive sensitivity)",
    parameters=_START | {"initial": Parameter(low=1e-4, high=0.9, scale="log", highest=5.0), "time": _TIME},
    tolerance=1e-8,
)
def n2_progressive(normal: Normal, time: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    times = np.linspace(0, 1, 6) * time / a[0]
    path = flow(aligned(U, V, initial), U * a @ V.T, times)
    measured = np.array([expected_rise(normal, layers, 0.1, 0.1) for layers in path])
    predicted = np.array([float(theory.gaussian_sensitivity(*layers, 0.1)) for layers in path])
    return 0.0, (measured[1:] - predicted[:-1]) / measured.max()


@identity(
    "N3",
    "The perturbed loss of a mode turns at a time in closed form: balanced, where it is γ²(m+k)/2 short of its target.",
    R"t_i^* = \tfrac1{2a_i}\log\frac{(a_i-g)(a_i-s_0)}{s_0g},\quad g = \gamma^2(m+k)/2",
    parameters=_START | _SIZES | {"gamma": _GAMMA, "imbalance": _IMBALANCE},
    tolerance=1e-6,
)
def n3(normal: Normal, gamma: float, imbalance: float, m: int, k: int, **start: float) -> Sides:
    initial, a = targets(**start)
    last, ours, searched = 40 / a.min(), [], []
    for c in (0.0, imbalance):
        searched.append(modes(initial, a, last, gamma, m, k, c).turns(last))
        ours.append(theory.mode_inflection_times(initial, a, gamma, (m, MODES, k), c))
    return np.append(a * ours, 1.0), np.append(a * searched, 1.0)  # 1: where all are 0


@inequality(
    "N3.total",
    "The inflection time of all modes together is where the perturbed loss is least.",
    R"\textstyle\sum_i s_i'(s_i - a_i + 2gs_i/R_i) = 0",
    parameters=_START | _SIZES | {"gamma": _GAMMA, "imbalance": _IMBALANCE},
    tolerance=1e-9,
)
def n3_total(normal: Normal, gamma: float, imbalance: float, m: int, k: int, **start: float) -> Sides:
    initial, a = targets(**start)
    turn = min(float(theory.inflection_time(initial, a, gamma, (m, MODES, k), imbalance)), 1e3 / a.min())
    path = modes(initial, a, max(40 / a.min(), turn), gamma, m, k, imbalance)
    heights = np.array([path.heights(time).sum() for time in np.linspace(0, 40 / a.min(), 400)])
    # flat at the turn, and nowhere lower
    slope = path.slopes(turn).sum() / np.abs(path.slopes(turn)).sum() if turn > 0 else 0.0
    return 0.0, np.append((heights - path.heights(turn).sum()) / heights[0], 1e-4 - abs(slope))


@inequality(
    "N3.finite",
    "More pretraining hurts in the end, however small the perturbation, if there is one.",
    R"t^* < \infty \iff \gamma > 0",
    parameters=_START | _SIZES | {"gamma": _GAMMA},
)
def n3_finite(normal: Normal, gamma: float, m: int, k: int, **start: float) -> Sides:
    initial, a = targets(**start)
    turn = min(float(theory.inflection_time(initial, a, gamma, (m, MODES, k))), 1e3 / a.min())
    path = modes(initial, a, max(turn, 1.0), gamma, m, k)
    learned = gamma**2 * (m + k) * a.sum() / 2  # the perturbed loss of s = a
    return 0.0, (learned - path.heights(turn).sum()) / path.heights(0.0).sum()


@inequality(
    "N3.earlier",
    "A larger perturbation turns the loss no later.",
    R"\gamma \le \gamma' \Rightarrow t^*(\gamma') \le t^*(\gamma)",
    source="paper 2503.19206 (observed); ours (here)",
    parameters=_START | _SIZES | {"gamma": _GAMMA, "factor": Parameter(low=1.0, high=2.0, lowest=0.5)},
    tolerance=1e-9,
)
def n3_earlier(normal: Normal, gamma: float, factor: float, m: int, k: int, **start: float) -> Sides:
    initial, a = targets(**start)
    turn = min(float(theory.inflection_time(initial, a, gamma, (m, MODES, k))), 1e3 / a.min())
    if turn == 0:
        turn = 1e-12  # nothing is earlier
    path = modes(initial, a, 2 * turn, factor * gamma, m, k)
    # beyond t*(γ) the loss under γ' is nowhere lower than at its least before
    before, after = (np.linspace(start, end, 200) for start, end in ((0.0, turn), (turn, 2 * turn)))
    least, beyond = (np.array([path.heights(time).sum() for time in times]) for times in (before, after))
    return 0.0, (beyond - least.min()) / path.heights(0.0).sum()


@identity(
    "N4",
    "Fine-tuning with the same singular vectors continues every mode towards its new target.",
    R"s_i(t, T) = b_i e^{2b_iT} / (e^{2b_iT} - 1 + b_i/s_i(t))",
    source="paper 2503.19206 (the setting); ours (the formula)",
    parameters=_START
    | {"time": _TIME, "finetune_time": _FINETUNE_TIME, "stretch": _STRETCH, "angle": Parameter(highest=1.0)},
    tolerance=1e-6,
)
def n4(normal: Normal, time: float, finetune_time: float, stretch: float, angle: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    b = a * stretch ** np.array([1.0, -1.0, 0.5])
    (learned,) = flow(aligned(U, V, initial), U * a @ V.T, time / a[0])
    (tuned,) = flow(learned, turned(normal, 5, angle) @ (U * b) @ V.T, finetune_time)
    predicted = theory.fine_tuned_singular_values(theory.singular_values(initial, a, time / a[0]), b, finetune_time)
    return predicted, _diagonal(U, V, tuned)


@identity(
    "N4.losses",
    "Both losses before and after fine-tuning, with a penalty or without, follow from the modes.",
    R"w' = w(b-w^2) - \mu(w-w_\mathrm{pre}),\quad L = \tfrac12\textstyle\sum_i(s_i-a_i)^2",
    parameters=_START
    | {"time": _TIME, "finetune_time": _FINETUNE_TIME, "stretch": _STRETCH, "penalty": Parameter(high=3.0)},
    tolerance=1e-6,
)
def n4_losses(
    normal: Normal, time: float, finetune_time: float, stretch: float, penalty: float, **start: float
) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    b = a * stretch ** np.array([1.0, -1.0, 0.5])
    A, B = (U * values @ V.T for values in (a, b))
    (learned,) = flow(aligned(U, V, initial), A, time / a[0])
    rows = []
    for strength in (0.0, penalty):
        (tuned,) = flow(learned, B, finetune_time, strength)
        ours = theory.fine_tuning(initial, a, b, time / a[0], finetune_time, strength)
        measured = np.array([loss(layers, goal) for layers in (learned, tuned) for goal in (B, A)])
        predicted = np.array([*ours.before, *ours.after])
        rows.append([[*predicted, ours.degradation], [*measured, measured[3] - measured[1]]])
    predicted, measured = np.array(rows).swapaxes(0, 1)
    scale = np.maximum(np.abs(measured), 1e-3 * np.sum(a**2))
    return predicted / scale, measured / scale


@identity(
    "N4.steps",
    "Fine-tuning by finitely many steps is the recursion of the modes.",
    R"w_{j+1} = w_j + \eta[w_j(b-w_j^2) - \mu(w_j-w_0)]",
    parameters=_START
    | {"time": _TIME, "step_size": Parameter(low=0.01, high=0.2, scale="log"), "stretch": _STRETCH}
    | {"penalty": Parameter(high=3.0)},
    tolerance=1e-6,
)
def n4_steps(normal: Normal, time: float, step_size: float, stretch: float, penalty: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    b, steps = a * stretch ** np.array([1.0, -1.0, 0.5]), 9
    ((w1, w2),) = (learned,) = flow(aligned(U, V, initial), U * a @ V.T, time / a[0])
    for _ in range(steps):
        gap = U * b @ V.T - w1 @ w2
        ways = gap @ w2.T - penalty * (w1 - learned[0]), w1.T @ gap - penalty * (w2 - learned[1])
        w1, w2 = w1 + step_size * ways[0], w2 + step_size * ways[1]
    before = theory.singular_values(initial, a, time / a[0])
    predicted = theory.fine_tuned_singular_values(before, b, steps * step_size, penalty, steps)
    return predicted, _diagonal(U, V, (w1, w2))


@inequality(
    "N4.no_inflection",
    "If fine-tuning stretches no feature, more pretraining never raises the final pretraining loss.",
    R"b_i \le a_i \Rightarrow \tfrac{d}{dt} L_\mathrm{pre}(\text{after}) \le 0",
    parameters=_START | {"stretch": Parameter(low=0.2, high=1.0, highest=3.0), "finetune_time": _FINETUNE_TIME},
    tolerance=1e-8,
)
def n4_no_inflection(normal: Normal, stretch: float, finetune_time: float, **start: float) -> Sides:
    (initial, a), (U, V) = targets(**start), singular_vectors(normal)
    A = U * a @ V.T
    times = np.linspace(0, float(np.max(theory.learning_time(initial, a, 0.999 * a))), 8)
    path = [flow(learned, stretch * A, finetune_time)[0] for learned in flow(aligned(U, V, initial), A, times)]
    measured = np.array([loss(layers, A) for layers in path])
    predicted = np.asarray(theory.fine_tuning(initial, a, stretch * a, times, finetune_time).after.pretrain)
    return 0.0, (predicted[:-1] - measured[1:]) / measured[0]


@identity(
    "N4.turns",
    "A feature that fine-tuning stretches turns, once there is enough of it to reach its old target in the time given.",
    R"\varphi_T(s(t_i^*)) = a_i,\quad t_i^* < \infty \iff b_i > a_i",
    parameters=_START | {"stretch": _UP, "finetune_time": Parameter(low=0.05, high=1.0, scale="log")},
    tolerance=1e-6,
)
def n4_turns(normal: Normal, stretch: float, finetune_time: float, **start: float) -> Sides:
    initial, a = targets(**start)
    b = a * stretch ** np.array([1.0, 0.5, 1.5])
    turns = np.minimum(theory.fine_tuning_inflection_times(initial, a, b, finetune_time), 1e3 / a.min())
    path = modes(initial, a, max(turns.max(), 1.0), 0.0, 1, 1)
    there = [np.prod(path.weights(turn), axis=0)[mode] for mode, turn in enumerate(turns)]
    ends = np.array([fine_tuned_mode(s, target, finetune_time) for s, target in zip(there, b)])
    # where it is 0, the start already overshoots
    return np.ones(MODES), np.where(turns > 0, ends, np.minimum(ends, a)) / a


@inequality(
    "N4.peak",
    "Where fine-tuning shrinks a feature, the degradation peaks shortly before the feature is complete.",
    R"b < a \Rightarrow \max_t \Delta L(t) > \Delta L(\infty),\quad \Delta L = L_\mathrm{after} - L_\mathrm{before}",
    parameters={
        "initial": _START["initial"],
        "stretch": Parameter(low=0.1, high=0.9, highest=1.5),
        "finetune_time": _FINETUNE_TIME,
    },
)
def n4_peak(normal: Normal, initial: float, stretch: float, finetune_time: float) -> Sides:
    complete = (fine_tuned_mode(1.0, stretch, finetune_time) - 1) ** 2 / 2
    times = theory.learning_time(initial, 1.0, 1 - np.geomspace(1e-4, 0.9, 40))
    ours = theory.fine_tuning(initial, [1.0], [stretch], times, finetune_time)
    return 0.0, (np.max(ours.degradation) - complete) / complete


@inequality(
    "N4.penalty",
    "A penalty towards the pretrained weights delays the inflection and costs fine-tuning loss.",
    R"t^*(\mu) \ge t^*(0),\quad L_\mathrm{ft}(\mu) \ge L_\mathrm{ft}(0)",
    source="paper 2503.19206 (the trade-off); ours (here, features that are stretched)",
    parameters=_START
    | {
        "stretch": _UP,
        "finetune_time": Parameter(low=0.1, high=2.0, scale="log"),
        "penalty": PENALTY.within(0.05, 5.0),
    },
    tolerance=1e-8,
)
def n4_penalty(normal: Normal, stretch: float, finetune_time: float, penalty: float, **start: float) -> Sides:
    initial, a = targets(**start)
    turns = np.minimum(theory.fine_tuning_inflection_times(initial, a, stretch * a, finetune_time), 1e3 / a.min())
    path = modes(initial, a, max(turns.max(), 1.0), 0.0, 1, 1)
    there = np.array([np.prod(path.weights(turn), axis=0)[mode] for mode, turn in enumerate(turns)])
    held = np.array([fine_tuned_mode(s, stretch * goal, finetune_time, penalty) for s, goal in zip(there, a)])
    free = theory.fine_tuned_singular_values(there, stretch * a, finetune_time)
    # a mode turns where it ends at a: at the inflection without a penalty, with one it is still short of that
    short = np.where(turns > 0, a - held, 0.0)
    return 0.0, np.concatenate([short, (stretch * a - held) ** 2 - (stretch * a - free) ** 2]) / np.tile(a, 2)
