"""§11 as claims: combinations of filters, self-distillation, and the neighbours that close (docs, C1–C5)."""

import itertools
from typing import Any

import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.optimize
import scipy.stats

from linfit import (
    Combination,
    GradientFlow,
    RandomShift,
    Ridge,
    SelfDistillation,
    SharpnessAware,
    TwoTaskProblem,
    fine_tune,
    risk_forms,
    s3ft_targets,
)
from linfit.network import TwoLayer
from linfit.robust import adversarial_fine_tune, adversarial_loss, largest_radius
from linfit.targets import Source
from linfit.weighting import smooth_weights
from sims.claims import Normal, Sides, identity, inequality, statistical
from sims.claims.problems import Exact, exact_instance, parabola, ridge_map, shifts, skewed, without
from sims.parameters import DECAY, NOISE_STD, PENALTY, TIME, Parameter
from theory import dropout, frontier, robust, s3ft
from theory.distillation import optimal_mix

REPLICATES, SCALAR_REPLICATES = 1024, 1 << 15
EXACT = without("tau")
MIX = Parameter(low=-2.0, high=2.0)


@identity(
    "C1",
    "Any combination of fine-tuners on one design has a risk that is quadratic in its weights.",
    R"R(a) = c - 2a^\top(Gb) + a^\top(GHG^\top)a,\quad G = (g_k(s))",
    parameters=EXACT | {"spread": Parameter(low=0.1, high=3.0, scale="log")},
    tolerance=1e-9,
)
def c1(normal: Normal, spread: float, **values: Any) -> Sides:
    """Bias² and variance, both domains, of random weights of four fine-tuners, relative to R_ft(θ₁): (3, 2, 2)."""
    exact = exact_instance(normal, **values, tau=1.0)
    weights, unit = spread * normal(3, len(exact.filters)), float(exact.forms.finetune.constant)
    combined = Combination(exact.filters, weights)
    predicted = np.array([form(combined) for form in exact.forms])  # (2, 2, 3)
    maps = np.tensordot(weights, exact.maps, 1)
    return np.moveaxis(predicted, 2, 0) / unit, np.array([exact.moments.risks(exact.X, R) for R in maps]) / unit


@identity(
    "C1.optimum",
    "The best combination is one small solve: no direction of its weights lowers the risk.",
    R"GHG^\top a^* = Gb",
    parameters=EXACT | {"time": TIME.within(0.1, 10.0)},
    tolerance=1e-5,
)
def c1_optimum(normal: Normal, **values: Any) -> Sides:
    """Its R_ft and 1 + the slope along each weight, in units of R_ft(θ₁) and of what that filter alone can gain."""
    exact = exact_instance(normal, **values, tau=1.0)
    form, unit = exact.forms.finetune, float(exact.forms.finetune.constant)
    best = form.optimal_combination(exact.filters)
    R = np.tensordot(np.asarray(best.weights), exact.maps, 1)
    slopes = []
    for other in exact.maps:
        start, middle, end = (exact.totals(R + step * other)[0] for step in (-1.0, 0.0, 1.0))
        slopes.append((end - start) / 2 / np.sqrt(2 * (end + start - 2 * middle) * unit))
    return np.array([best.risk / unit, *np.ones(len(slopes))]), np.array(
        [exact.totals(R)[0] / unit, *1 + np.array(slopes)]
    )


@identity(
    "C1.oracle",
    "As many ridges as samples reach the oracle filter, the lower bound of all spectral methods.",
    R"\min_a R(\textstyle\sum_k a_k g_k) = c - b^\top H^{-1}b",
    parameters=EXACT | {"size": Parameter(scale="whole"), "missing": Parameter(scale="whole", highest=8)},
    tolerance=1e-6,
)
def c1_oracle(normal: Normal, missing: int, **values: Any) -> Sides:
    """In units of R_ft(θ₁); the lower bound from traces of p × p matrices and one solve. `missing` ridges too few.

    n = 10: of sixteen ridges on so few decades several cannot be told apart in 16 digits.
    """
    exact = exact_instance(normal, **values, tau=1.0)
    X, n, form = exact.X, len(exact.X), exact.forms.finetune
    s, U = np.linalg.eigh(X @ X.T / n)
    ridges = Ridge(np.geomspace(s[0] / 10, 10 * s[-1], n)[: n - missing])
    units = np.stack([X.T @ np.outer(u, u) / n for u in U.T])
    return _lowest(exact, units), float(form.optimal_combination(ridges).risk / form.constant)


def _lowest(exact: Exact, maps: np.ndarray) -> float:
    """The least R_ft of Σ a_k R_k relative to R_ft(θ₁), by the quadratic form in a from traces."""
    X, m = exact.X, exact.moments
    start = np.trace(m.second @ m.finetune)
    linear = np.array([np.trace(m.finetune @ R @ X @ m.second) for R in maps])
    noise = m.noise_std**2 * np.eye(len(X))
    images = np.stack([R @ (X @ m.second @ X.T + noise) for R in maps])
    matrix = np.einsum("kpn,pq,lqn->kl", images, m.finetune, maps)
    scale = np.sqrt(np.diag(matrix))
    solved = scipy.linalg.solve(matrix / scale / scale[:, None], linear / scale, assume_a="sym")
    return float(1 - (linear / scale) @ solved / start)


@identity(
    "C2",
    "A student of labels mixed with its teacher's answers, both ridge, is a spectral filter.",
    R"g_\xi = [(1-\xi) + \xi s/(s+\lambda)]/(s+\lambda) = g_\lambda + \xi\lambda\,\partial g_\lambda/\partial\lambda",
    parameters=EXACT | {"mix": MIX, "reteach": Parameter(low=1.0, high=1.0, scale="log", lowest=0.25, highest=4.0)},
    tolerance=1e-9,
)
def c2(normal: Normal, mix: float, reteach: float, **values: Any) -> Sides:
    """Weights of the student refitted, then its risks (2, 2) relative to R_ft(θ₁); `reteach`: its penalty over λ."""
    exact = exact_instance(normal, **values, tau=1.0)
    X, penalty, unit = exact.X, values["penalty"], float(exact.forms.finetune.constant)
    y, theta_1 = normal(len(X)), np.asarray(exact.problem.pretrain_error)
    filter = SelfDistillation(penalty, mix)
    teacher, refit = ridge_map(X, penalty), ridge_map(X, reteach * penalty)
    answers = X @ (theta_1 + teacher @ (y - X @ theta_1))
    student = theta_1 + refit @ ((1 - mix) * y + mix * answers - X @ theta_1)
    predicted = np.array([form(filter) for form in exact.forms]) / unit
    risks = exact.moments.risks(X, refit @ ((1 - mix) * np.eye(len(X)) + mix * X @ teacher)) / unit
    weights = np.asarray(fine_tune(X, y, theta_1, filter))
    return np.concatenate([weights, predicted.ravel()]), np.concatenate([student, risks.ravel()])


@statistical(
    "C2.sampled",
    "Its risk is that of students actually trained, whatever the law of the noise.",
    R"\mathbb E\|\theta_\xi - \theta_2^*\|^2_{\Sigma_2} = R(\lambda) + \xi\lambda R'(\lambda) + \xi^2\lambda^2 D",
    parameters=EXACT | {"mix": MIX, "law": EXACT["fixed"]},
)
def c2_sampled(normal: Normal, mix: float, law: int, **values: Any) -> Sides:
    """R_ft and R_pre of teacher, then student, refitted by the p × p normal equations to each draw of labels."""
    exact = exact_instance(normal, **values, tau=1.0)
    X, m, penalty = exact.X, exact.moments, values["penalty"]
    delta, noise = shifts(normal, exact.problem, REPLICATES), normal(len(X), REPLICATES)
    y, system = (
        X @ delta + m.noise_std * (np.sign(noise) if law else noise),
        X.T @ X / len(X) + penalty * np.eye(len(m.u)),
    )

    def ridge(labels: np.ndarray) -> np.ndarray:
        return np.linalg.solve(system, X.T @ labels / len(X) + penalty * m.u[:, None])

    theta = ridge((1 - mix) * y + mix * X @ ridge(y))
    miss = theta - delta
    risks = np.stack([np.sum(miss * (m.finetune @ miss), axis=0), np.sum(theta * (m.pretrain @ theta), axis=0)], 1)
    return np.array([form(SelfDistillation(penalty, mix)).total for form in exact.forms]), risks


@identity(
    "C2.optimum",
    "The best mix and its gain follow from slope and curvature of the risk in the penalty.",
    R"\xi^* = -R'(\lambda)/(2\lambda D),\quad R(\lambda) - R(\xi^*) = R'(\lambda)^2/(4D),"
    R"\quad D = \partial g^\top H\partial g",
    source="ours; agrees with arXiv 2602.17565",
    parameters=EXACT,
    tolerance=1e-6,
)
def c2_optimum(normal: Normal, **values: Any) -> Sides:
    """ξ*, gain and risk for R_ft and for R_pre, the last two in units of R_ft(θ₁); from three refits."""
    exact = exact_instance(normal, **values, tau=1.0)
    X, penalty, unit = exact.X, values["penalty"], float(exact.forms.finetune.constant)
    predicted, measured = [], []
    for domain, form in enumerate(exact.forms):
        best = optimal_mix(form, penalty)
        predicted.append([best.mix, best.gain / unit, best.risk / unit])
        measured.append(_best_refit(exact, X, penalty, domain, unit))
    scale = np.maximum(np.abs(measured), 1e-3)
    return np.array(predicted) / scale, np.array(measured) / scale


def _best_refit(exact: Exact, X: np.ndarray, penalty: float, domain: int, unit: float) -> list[float]:
    """ξ*, gain and risk from the risks of three students, relative to the unit."""
    teacher = ridge_map(X, penalty)
    missed = X @ teacher - np.eye(len(X))
    start, slope, curvature = parabola(lambda mix: exact.totals(teacher @ (np.eye(len(X)) + mix * missed))[domain])
    return [slope / curvature, slope**2 / curvature / unit, (start - slope**2 / curvature) / unit]


@inequality(
    "C2.sign",
    "For an isotropic shift the best mix is positive below the Bayes penalty, negative above, and gains nothing at it.",
    R"S = \omega I:\ \xi^* > 0 \iff \lambda < \sigma^2/(n\omega),"
    R"\quad R(\lambda) > R(\xi^*) \iff \lambda \ne \sigma^2/(n\omega)",
    source="ours; agrees with arXiv 2602.17565",
    parameters={
        "decay": DECAY.within(0.0, 1.5),
        "noise_std": NOISE_STD.within(0.1, 3.0),
        "ratio": Parameter(low=1.1, high=100.0, scale="log"),
        "above": Parameter(low=0, high=1, scale="whole"),
        "anisotropy": Parameter(highest=2.0),
    },
)
def c2_sign(normal: Normal, decay: float, noise_std: float, ratio: float, above: int, anisotropy: float) -> Sides:
    """±ξ* by refits, its gain relative to R(λ), and 1e-9 less the gain at the Bayes penalty, all positive."""
    n, p = 8, 20
    spectrum = (1.0 + np.arange(p)) ** -decay
    problem = TwoTaskProblem(spectrum, spectrum, RandomShift(spectrum**anisotropy), noise_std)
    X = normal(n, p) * np.sqrt(spectrum)
    bayes = noise_std**2 / n
    penalty = bayes * (ratio if above else 1 / ratio)
    s, U = np.linalg.eigh(X @ X.T / n)
    left, moved = X.T @ U / n, np.diag(spectrum)

    def risk(penalty: float, mix: float) -> float:
        g = (1 - mix * penalty / (s + penalty)) / (s + penalty)
        R = (left * g) @ U.T
        missed = R @ X - np.eye(p)
        return float(
            np.trace(moved @ missed @ np.diag(spectrum**anisotropy) @ missed.T)
            + noise_std**2 * np.sum(R**2 * spectrum[:, None])
        )

    start, slope, curvature = parabola(lambda mix: risk(penalty, mix))
    form = risk_forms(X, problem).finetune
    best = optimal_mix(form, [penalty, bayes])
    sign = -1.0 if above else 1.0
    none = 1e-9 - float(best.gain[1] / best.risk[1])
    return 0.0, np.array([sign * slope / curvature, sign * float(best.mix[0]), slope**2 / curvature / start, none])


@identity(
    "C3",
    "Sharpness-aware gradient flow is a spectral filter: each eigenvalue s learns as s(1+ρs).",
    R"\nabla L(\theta+\rho\nabla L) = (1+\rho\hat\Sigma)\nabla L(\theta),\quad g = (1-e^{-ts(1+\rho s)})/s",
    parameters=EXACT | {"radius": Parameter(low=0.0, high=3.0), "normalised": Parameter(highest=1.0)},
    tolerance=1e-8,
)
def c3(normal: Normal, radius: float, normalised: float, **values: Any) -> Sides:
    """Weights against Runge–Kutta steps along the gradient at the ascended point; `normalised` steps: of length ρ."""
    exact = exact_instance(normal, **(values | {"time": min(values["time"], 3.0)}), tau=1.0)
    X, y, time = exact.X, normal(len(exact.X)), min(values["time"], 3.0)
    theta_1 = np.asarray(exact.problem.pretrain_error)

    def gradient(theta: np.ndarray) -> np.ndarray:
        return X.T @ (X @ theta - y) / len(X)

    def velocity(_: float, theta: np.ndarray) -> np.ndarray:
        ascent = gradient(theta)
        length = (1 - normalised) + normalised / np.linalg.norm(ascent)
        return -gradient(theta + radius * length * ascent)

    stepped = scipy.integrate.solve_ivp(velocity, (0, time), theta_1, "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return stepped, np.asarray(fine_tune(X, y, theta_1, SharpnessAware(time, radius)))


ATTACK = {
    "size": Parameter(low=0, high=2, scale="whole"),
    "decay": DECAY.within(0.0, 1.5),
    "noise_std": NOISE_STD.within(0.1, 3.0),
    "relative": Parameter(low=0.02, high=0.95, scale="log"),
}


def _attacked(normal: Normal, size: int, decay: float, noise_std: float, relative: float) -> tuple[Any, ...]:
    """X, y, θ₁ and a radius, `relative` to the least that keeps θ₁; n < p, n = p and n > p."""
    n, p = ((8, 20), (12, 12), (20, 8))[size]
    X, theta_1 = normal(n, p) * (1.0 + np.arange(p)) ** (-decay / 2), normal(p)
    y = X @ (theta_1 + normal(p)) + noise_std * normal(n)
    r = y - X @ theta_1
    return X, y, theta_1, relative * np.linalg.norm(X.T @ r) / np.abs(r).sum()


@identity(
    "C4",
    "The worst squared error within a distance of an input has a closed form.",
    R"\max_{\|h\|\le\varepsilon}(r - h^\top d)^2 = (|r| + \varepsilon\|d\|)^2",
    parameters=ATTACK | {"norm": Parameter(low=2.0, high=2.0, highest=8.0)},
    tolerance=1e-9,
)
def c4(normal: Normal, norm: float, **values: Any) -> Sides:
    """Mean over samples, the adversary climbing by projected gradient from both sides; `norm`: its ball is another."""
    X, y, theta_1, radius = _attacked(normal, **values)
    d = normal(len(theta_1))
    r = y - X @ (theta_1 + d)
    worst = np.zeros(len(r))
    for side in (-1.0, 1.0):
        h = side * 1e-3 * radius * d / np.linalg.norm(d) + 1e-6 * radius * normal(len(r), len(d))
        for _ in range(60):
            h = h - 10 * (r - h @ d)[:, None] * d  # uphill in (r − hᵀd)²
            h = radius * h / np.linalg.norm(h, norm, axis=1)[:, None]
        worst = np.maximum(worst, (r - h @ d) ** 2)
    return float(adversarial_loss(X, y, theta_1 + d, theta_1, radius)), worst.mean()


@inequality(
    "C4.optimum",
    "Reweighted ridge finds the weights of least adversarial loss, and from the largest radius on they are θ₁.",
    R"\theta = \arg\min\tfrac1n\sum_i(|y_i - x_i^\top\theta| + \varepsilon\|\theta-\theta_1\|)^2",
    parameters=ATTACK,
    tolerance=1e-4,
)
def c4_optimum(normal: Normal, **values: Any) -> Sides:
    """Relative excess loss of other weights: beside the minimum, ridge, min-norm, θ₁; then beyond the radius of θ₁."""
    X, y, theta_1, radius = _attacked(normal, **values)
    p = len(theta_1)
    best = np.asarray(adversarial_fine_tune(X, y, theta_1, radius, steps=300))

    def loss(theta: np.ndarray, at: float) -> float:
        return float(np.mean((np.abs(y - X @ theta) + at * np.linalg.norm(theta - theta_1)) ** 2))

    directions = normal(12, p) * np.geomspace(1e-3, 1, 12)[:, None] * np.linalg.norm(best - theta_1) / p**0.5
    penalties = np.geomspace(1e-4, 1e2, 13)
    ridges = [theta_1 + ridge_map(X, penalty) @ (y - X @ theta_1) for penalty in penalties]
    min_norm = theta_1 + np.linalg.pinv(X) @ (y - X @ theta_1)
    others = [
        *(best + directions),
        *ridges,
        min_norm,
        *(theta_1 + t * (best - theta_1) for t in (0, 0.9, 0.99, 1.01, 1.1)),
    ]
    excess = [loss(other, radius) / loss(best, radius) - 1 for other in others]
    beyond = 1.01 * float(largest_radius(X, y, theta_1))
    kept = [loss(other, beyond) / loss(theta_1, beyond) - 1 for other in [*(theta_1 + directions), *ridges]]
    return 0.0, np.array([*excess, *kept])


@statistical(
    "C4.population",
    "With unlimited Gaussian data adversarial fine-tuning is ridge, at a radius known in closed form.",
    R"\lambda = \varepsilon(\varepsilon + c\sqrt v/\|d\|)/(1 + c\varepsilon\|d\|/\sqrt v),\quad c = \sqrt{2/\pi}",
    parameters={
        "decay": DECAY.within(0.0, 1.5),
        "noise_std": NOISE_STD.within(0.1, 2.0),
        "penalty": PENALTY.within(0.01, 10.0),
        "skewness": Parameter(highest=0.9),
    },
)
def c4_population(normal: Normal, decay: float, noise_std: float, penalty: float, skewness: float) -> Sides:
    """The gradient of the adversarial loss of each sample at the ridge solution, of mean 0."""
    spectrum, gap = (1.0 + np.arange(4)) ** -decay, normal(4)
    d = spectrum * gap / (spectrum + penalty)
    variance = np.sum(spectrum * (gap - d) ** 2) + noise_std**2
    distance = np.linalg.norm(d)
    radius = float(robust.equivalent_radius(penalty, distance, variance**0.5))
    x = normal(SCALAR_REPLICATES, 4) * np.sqrt(spectrum)
    r = x @ (gap - d) + noise_std * skewed(normal, skewness, SCALAR_REPLICATES)
    slope = (np.abs(r) + radius * distance)[:, None] * (radius * d / distance - np.sign(r)[:, None] * x)
    return np.zeros(4), slope


UNITS = {
    "rate": Parameter(low=0.05, high=0.8),
    "rows": Parameter(low=1, high=4, scale="whole"),
    "units": Parameter(low=3, high=5, scale="whole"),
    "columns": Parameter(low=1, high=3, scale="whole"),
}


@identity(
    "C5",
    "Dropping hidden units of a two-layer network adds a penalty on what each unit carries.",
    R"\mathbb E\tfrac12\|W_1\mathrm{diag}(z)W_2 - A\|^2 = \tfrac12\|W - A\|^2"
    R" + \tfrac\nu2\textstyle\sum_h\|W_1^{(h)}\|^2\|W_2^{(h)}\|^2",
    source="known (Mianjy, Arora & Vidal 2018)",
    parameters=UNITS | {"together": Parameter(highest=1.0)},
    tolerance=1e-10,
)
def c5(normal: Normal, rate: float, rows: int, units: int, columns: int, together: float) -> Sides:
    """The mean over all 2^h masks; `together`: the share of times that all units share one fate."""
    w1, w2, A = normal(rows, units), normal(units, columns), normal(rows, columns)

    def loss(kept: np.ndarray) -> float:
        return float(np.sum((w1 * kept / (1 - rate) @ w2 - A) ** 2) / 2)

    mean = 0.0
    for mask in itertools.product((0, 1), repeat=units):
        kept = np.array(mask)
        mean += loss(kept) * (1 - rate) ** kept.sum() * rate ** (units - kept.sum())
    shared = (1 - rate) * loss(np.ones(units)) + rate * loss(np.zeros(units))
    penalty = float(dropout.hidden_penalty(TwoLayer(w1, w2), rate))
    return np.sum((w1 @ w2 - A) ** 2) / 2 + penalty, (1 - together) * mean + together * shared


@identity(
    "C5.optimum",
    "The best network under dropout thresholds the singular values, the same amount for all.",
    R"s_i = \max(a_i - \mu, 0),\quad \mu = \max_r \nu(a_1+\dots+a_r)/(h + \nu r)",
    parameters=UNITS,
    tolerance=1e-4,
)
def c5_optimum(normal: Normal, rate: float, rows: int, units: int, columns: int) -> Sides:
    """Singular values of the best of three descents from random weights; 1 + the slope at aligned weights of (1−q)a."""
    A, nu, size = normal(rows, columns), rate / (1 - rate), rows * units
    a = np.linalg.svd(A, compute_uv=False)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w1, w2 = flat[:size].reshape(rows, units), flat[size:].reshape(units, columns)
        missed, left, right = w1 @ w2 - A, np.sum(w1**2, axis=0), np.sum(w2**2, axis=1)
        slopes = missed @ w2.T + nu * w1 * right, w1.T @ missed + nu * left[:, None] * w2
        return float(np.sum(missed**2) + nu * left @ right) / 2, np.concatenate([part.ravel() for part in slopes])

    def descend(start: np.ndarray) -> Any:
        options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-10}
        return scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)

    def values(flat: np.ndarray) -> np.ndarray:
        product = flat[:size].reshape(rows, units) @ flat[size:].reshape(units, columns)
        return np.linalg.svd(product, compute_uv=False)

    best = min((descend(normal(size + units * columns)) for _ in range(3)), key=lambda found: found.fun)
    U, _, Vt = np.linalg.svd(A, full_matrices=False)
    pad = ((0, 0), (0, units - len(a)))
    root = np.sqrt((1 - rate) * a)
    aligned = np.concatenate([np.pad(U * root, pad).ravel(), np.pad(Vt.T * root, pad).T.ravel()])
    slope = np.linalg.norm(loss(aligned)[1])
    return np.append(dropout.hidden_optimum(a, rate, units), 1.0), np.append(values(best.x), 1 + slope)


@identity(
    "C5.layer",
    "Dropping all that fine-tuning adds, as one layer, is an ensemble: τ is the share of steps that keep it.",
    R"\mathbb E_z\|y - zXd\|^2 = \|y - Xd\|^2 + \nu\|Xd\|^2,\quad g_t = (1-q)\,(1-e^{-ts/(1-q)})/s",
    parameters=EXACT | {"rate": Parameter(low=0.05, high=0.9), "late": Parameter(highest=1.0)},
    tolerance=1e-8,
)
def c5_layer(normal: Normal, rate: float, late: float, **values: Any) -> Sides:
    """Weights against a matrix exponential of the flow averaged over the mask; `late`: not at first, for that share."""
    exact = exact_instance(normal, **values, tau=1.0)
    X, y, time, keep = exact.X, normal(len(exact.X)), values["time"], 1 - rate
    theta_1 = np.asarray(exact.problem.pretrain_error)
    slope, pull = X.T @ X / len(X), X.T @ (y - X @ theta_1) / len(X)
    mean_square = keep * (1 / keep) ** 2  # of the scale z: 1/(1−q) or 0
    moved = np.zeros(len(pull))
    for share, square in ((late, 1.0), (1 - late, mean_square)):
        generator = np.zeros((len(pull) + 1, len(pull) + 1))
        generator[:-1, :-1], generator[:-1, -1] = -square * slope, pull
        moved = (scipy.linalg.expm(share * time * generator) @ np.append(moved, 1.0))[:-1]
    return theta_1 + moved, np.asarray(fine_tune(X, y, theta_1, keep * GradientFlow(time / keep)))


@statistical(
    "E1.smooth",
    "Weights 1/(1 + ℓ/T) are an ensemble in the population too.",
    R"m = T(1-Z)/(vZ),\quad Z = \mathbb E\,w = \sqrt{\pi a}\,e^a\mathrm{erfc}\sqrt a,\quad a = T/2v",
    parameters={
        "noise_std": NOISE_STD.within(0.05**0.5, 3.0**0.5),
        "knob": Parameter(low=0.1, high=10.0, scale="log"),
        "skewed_noise": Parameter(highest=0.9),
    },
)
def e1_smooth(normal: Normal, noise_std: float, knob: float, skewed_noise: float) -> Sides:
    """w·x·(r − τxᵀΔ) along Δ and across at T = knob·v; q = 1."""
    x, variance = normal(SCALAR_REPLICATES, 2), 1 + noise_std**2
    r = x[:, 0] + noise_std * skewed(normal, skewed_noise, SCALAR_REPLICATES)
    ratio = frontier.smooth_ratio(knob * variance, variance**0.5)
    tau = float(frontier.weighting_coefficient(ratio, 1.0, noise_std))
    w = np.asarray(smooth_weights(r**2, knob * variance))
    return np.zeros(2), (w * (r - tau * x[:, 0]))[:, None] * x


ANSWERS = {
    "rank": Parameter(low=1, high=3, scale="whole"),
    "noise_std": NOISE_STD.within(0.1, 1.5),
    "sampling_std": Parameter(low=0.1, high=1.5, scale="log"),
    "decay": DECAY.within(0.0, 1.5),
}


def _answers(
    normal: Normal, rank: int, noise_std: float, sampling_std: float, decay: float
) -> tuple[s3ft.VectorProblem, np.ndarray, np.ndarray]:
    """A problem with two style outputs, and own answers and gold (N, m) relative to the prediction; the first `rank`
    outputs are content, each with signal 1."""
    count, outputs, features = 1 << 12, rank + 2, 6
    spectrum = (1.0 + np.arange(features)) ** -decay
    shift = np.linalg.qr(normal(features, outputs))[0] / np.sqrt(spectrum)[:, None]
    shift[:, rank:] *= np.exp(normal(2))
    problem = s3ft.VectorProblem(spectrum, spectrum, shift, np.arange(outputs) < rank, noise_std)
    gold = (normal(count, features) * np.sqrt(spectrum)) @ shift + noise_std * normal(count, outputs)
    return problem, sampling_std * normal(count, outputs), gold


@statistical(
    "T2.calibrated",
    "A judge and paraphrases calibrated on shares of own, paraphrased and gold targets produce them.",
    R"F_k = \frac{\mathrm{own}-a}{1-f-a},\quad q = \frac{\mathrm{paraphrase}}{(1-a)(1-f)(1-F_k)}",
    parameters=ANSWERS
    | {
        "own": Parameter(low=0.3, high=0.7),
        "reworded": Parameter(low=0.1, high=1.0),
        "false_accept": Parameter(low=0.0, high=0.25),
        "false_reject": Parameter(low=0.0, high=0.1),
        "heavy_tails": Parameter(highest=0.8),
    },
)
def t2_calibrated(
    normal: Normal,
    own: float,
    reworded: float,
    false_accept: float,
    false_reject: float,
    heavy_tails: float,
    **values: Any,
) -> Sides:
    """Sources of targets, the judge as in the table of the docs; `reworded`: of what could be, the share."""
    _, answers, gold = _answers(normal, **values)
    gold = gold * np.exp(heavy_tails * normal(len(gold)) - heavy_tails**2)[:, None]
    k, std = values["rank"], (1 + values["noise_std"] ** 2) ** 0.5
    judge = {"false_accept": false_accept, "false_reject": false_reject}
    wrong = 1 - (own - false_accept) / (1 - false_accept - false_reject)
    paraphrased = reworded * (1 - false_accept) * (1 - false_reject) * wrong
    procedure = s3ft.calibrated(own, paraphrased, k, std, sampling_std=values["sampling_std"], **judge)
    chances = scipy.stats.norm.cdf(normal(3, len(gold)))
    fools, misses, succeeds = (
        c < rate for c, rate in zip(chances, (false_accept, false_reject, procedure.paraphrase_success))
    )
    missed = np.linalg.norm((gold - answers)[:, :k], axis=1)
    accepted = np.where(missed <= float(procedure.tolerance), ~misses, fools)  # type: ignore[arg-type]
    paraphrase = np.concatenate([gold[:, :k], answers[:, k:]], axis=1)
    paraphrase[~(succeeds & ~misses)] = np.nan
    source = np.asarray(s3ft_targets(answers, gold, accepted, paraphrase).source)
    return np.array([own, paraphrased, 1 - own - paraphrased]), source[:, None] == np.array(list(Source))


@statistical(
    "T2.distances",
    "How far own answers, paraphrases and gold lie from the model's own distribution.",
    R"ms^2,\quad \|\Delta P\|^2 + k\sigma^2 + (m-k)s^2,\quad \|\Delta\|^2 + m\sigma^2",
    parameters=ANSWERS,
)
def t2_distances(normal: Normal, **values: Any) -> Sides:
    problem, own, gold = _answers(normal, **values)
    content = np.arange(own.shape[1]) < values["rank"]
    answers = np.stack([own, np.where(content, gold, own), gold], axis=1)
    return np.array(s3ft.distances(problem, values["sampling_std"])), np.sum(answers**2, axis=-1)
