"""§6 as claims: ensembles in disguise, and the frontier below which there is nothing (docs, E1, E2)."""

from typing import Any

import numpy as np
import scipy.stats

from linfit import FixedShift, RandomShift, TwoTaskProblem, fine_tune, flow_weights
from sims.claims import Normal, Sides, identity, inequality, statistical
from sims.claims.problems import exact_instance, matrix_of, skewed, without
from sims.parameters import DECAY, NOISE_STD, TAU, Parameter
from theory import flow, frontier, s3ft

REPLICATES = 1 << 15
RATIOS = np.array([0.1, 1.0, 10.0])
"""κ, in units of the parameter `weight`."""

EXACT = without("tau")
GAUSSIAN = {
    "noise_std": NOISE_STD.within(0.05**0.5, 3.0**0.5),
    "knob": Parameter(low=0.3, high=3.0, scale="log"),
    "skewed_features": Parameter(highest=0.9),
    "skewed_noise": Parameter(highest=0.9),
}
WEIGHT = Parameter(low=0.1, high=10.0, scale="log", lowest=1e-4, highest=1e4)


def _population(
    normal: Normal, noise_std: float, skewed_features: float, skewed_noise: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """x along Δ and in another direction (N, 2), residuals (N,) and their standard deviation √v, q = 1.

    xᵀΔ and the noise are Gaussian but for their skewness.
    """
    x = np.stack([skewed(normal, skewed_features, REPLICATES) for _ in range(2)], axis=1)
    return x, x[:, 0] + noise_std * skewed(normal, skewed_noise, REPLICATES), (1 + noise_std**2) ** 0.5


@statistical(
    "E1.targets",
    "Training on own answers within a threshold, or on clipped targets, ends where an ensemble is.",
    R"\mathbb{E}\,x\,\psi(r) = \tau\,\Sigma\Delta,\quad \tau = \mathbb{E}\,\psi'(r)",
    parameters=GAUSSIAN,
)
def e1_targets(normal: Normal, knob: float, **values: float) -> Sides:
    """E x·target is τ along Δ and 0 across, for S3FT and clipped targets at the threshold c = knob·√v."""
    x, r, std = _population(normal, **values)
    c = knob * std
    tau = [float(rule(c, std)) for rule in (s3ft.fixed_point_coefficient, frontier.clipping_coefficient)]
    targets = np.stack([np.where(abs(r) <= c, 0, r), np.clip(r, -c, c)], axis=1)
    return np.stack([tau, np.zeros(2)], axis=-1), targets[..., None] * x[:, None]


def _misfit(normal: Normal, knob: float, noise_std: float, **values: float) -> np.ndarray:
    """w·x·(r − τxᵀΔ), the normal equations of weighted least squares at the predicted τ: (N, methods, directions).

    FLOW at T = knob·v, trimming at c = knob·√v.
    """
    x, r, std = _population(normal, noise_std, **values)
    temperature, c = knob * std**2, knob * std
    weights = np.stack([np.asarray(flow_weights(r**2, temperature)), abs(r) <= c], axis=1)
    trimming = frontier.weighting_coefficient(frontier.trimming_ratio(c, std), 1.0, noise_std)
    tau = np.array([float(flow.fixed_point_coefficient(noise_std, temperature)), float(trimming)])
    return (weights * (r[:, None] - tau * x[:, :1]))[..., None] * x[:, None]


def _residuals(c: float, v: float) -> tuple[np.ndarray, np.ndarray]:
    """|r| and its probabilities for r ~ N(0, v), by Gauss's rule on either side of c, up to twelve deviations."""
    nodes, masses = np.polynomial.legendre.leggauss(80)
    furthest = 12 * v**0.5
    low, high = np.array([0, min(c, furthest)])[:, None], np.array([min(c, furthest), furthest])[:, None]
    r, step = np.ravel(low + (high - low) * (nodes + 1) / 2), np.ravel((high - low) / 2 * masses)
    return r, 2 * step * scipy.stats.norm.pdf(r, scale=v**0.5)


def _by_quadrature(knob: float, noise_std: float) -> dict[str, float]:
    """E rψ(r)/v of own answers and of clipping, E[w s r]/E[w s²] of FLOW and of trimming, E[w r²]/(v E w) of trimming.

    By Gauss's rule on either side of the threshold; s = xᵀΔ, q = 1, is Gaussian given r.
    """
    v, c = 1 + noise_std**2, knob * (1 + noise_std**2) ** 0.5
    r, density = _residuals(c, v)
    inside, cross, square = r < c, r**2 / v, (r / v) ** 2 + noise_std**2 / v
    easy = np.exp(-(r**2) / (knob * v))
    return {
        "own": density @ (r**2 * ~inside) / v,
        "clipped": density @ (r * np.minimum(r, c)) / v,
        "flow": (density * easy) @ cross / ((density * easy) @ square),
        "trimmed": (density * inside) @ cross / ((density * inside) @ square),
        "ratio": (density * inside) @ r**2 / v / (density @ inside),
    }


@identity(
    "E1.exact",
    "The coefficients of own answers, clipping, FLOW and trimming are the integrals that they stand for.",
    R"\tau = \mathbb{E}\,r\psi(r)/v,\quad \tau = \mathbb{E}[w s r]/\mathbb{E}[w s^2],\ s = x^\top\Delta",
    parameters={name: GAUSSIAN[name] for name in ("noise_std", "knob")},
    tolerance=1e-9,
)
def e1_exact(normal: Normal, noise_std: float, knob: float) -> Sides:
    measured, std = _by_quadrature(knob, noise_std), (1 + noise_std**2) ** 0.5
    c, temperature = knob * std, knob * std**2
    ratio = frontier.trimming_ratio(c, std)
    predicted = {
        "own": s3ft.fixed_point_coefficient(c, std),
        "clipped": frontier.clipping_coefficient(c, std),
        "flow": flow.fixed_point_coefficient(noise_std, temperature),
        "trimmed": frontier.weighting_coefficient(ratio, 1.0, noise_std),
        "ratio": ratio,
    }
    return np.array([float(predicted[name]) / value for name, value in measured.items()]), np.ones(len(measured))


@identity(
    "E1.huber",
    "Descent on the Huber loss is plain descent slowed by P(|r| ≤ c) at every step: early stopping.",
    R"\nabla = -P(|r_k|\le c)\,\Sigma(\theta_2^*-\theta_k)",
    parameters={
        "decay": DECAY.within(0.0, 1.5),
        "noise_std": GAUSSIAN["noise_std"],
        "knob": GAUSSIAN["knob"],
        "steps": Parameter(low=1, high=20, scale="whole"),
    },
    tolerance=1e-9,
)
def e1_huber(normal: Normal, decay: float, noise_std: float, knob: float, steps: int) -> Sides:
    """Errors of descent with E x ψ(r) by quadrature; as plain descent with the step size of each moment."""
    spectrum, start = (1.0 + np.arange(4)) ** -decay, normal(4)
    c = knob * (np.sum(spectrum * start**2) + noise_std**2) ** 0.5
    plain = huber = start
    for _ in range(steps):
        v = np.sum(spectrum * plain**2) + noise_std**2
        plain = plain * (1 - 0.9 * float(frontier.clipping_coefficient(c, v**0.5)) * spectrum)
        v = np.sum(spectrum * huber**2) + noise_std**2
        r, density = _residuals(c, v)
        huber = huber * (1 - 0.9 * (density @ (r * np.minimum(r, c)) / v) * spectrum)  # x given r is Σ(θ₂*−θ)·r/v
    return plain, huber


@identity(
    "E1.risks",
    "Both risks on the segment from θ₁ to θ₂* are parabolas in τ, for any problem.",
    R"R_\mathrm{ft} = (1-\tau)^2\,\mathbb{E}\|\Delta\|^2_{\Sigma_2},\ "
    R"R_\mathrm{pre} = \mathbb{E}\|u+\tau\Delta\|^2_{\Sigma_1}",
    parameters=EXACT | {"tau": TAU.within(-0.5, 1.5)},
    tolerance=1e-9,
)
def e1_risks(normal: Normal, tau: float, **values: Any) -> Sides:
    """θ₁ + τΔ as the linear map τ·I of the gap, by traces, relative."""
    exact = exact_instance(normal, **values, tau=tau)
    p = exact.problem.p
    expected = exact.moments.risks(np.eye(p), tau * np.eye(p))[:, 0]
    return np.array(frontier.population_risks(exact.problem, tau)) / expected, np.ones(2)


@statistical(
    "E1.weights",
    "Weighting samples by pretrained loss (FLOW), or dropping the hard ones, is an ensemble too.",
    R"\tau = vm/(\sigma^2 + qm),\quad m = \mathbb{E}\,wr^2/(v\,\mathbb{E}\,w)",
    parameters=GAUSSIAN,
)
def e1_weights(normal: Normal, **values: float) -> Sides:
    return np.zeros((2, 2)), _misfit(normal, **values)


@statistical(
    "E1.flow",
    "For FLOW this needs no law of the features, only Gaussian noise.",
    R"\mathbb{E}[e^{-r^2/T}(r - \tau s) \mid s = x^\top\Delta] = 0,\quad \tau = 1/(1+2\sigma^2/T)",
    parameters=GAUSSIAN | {"skewed_features": Parameter(low=0.0, high=0.9, highest=1.0)},
)
def e1_flow(normal: Normal, **values: float) -> Sides:
    return np.zeros(2), _misfit(normal, **values)[:, 0]


@identity(
    "E1.smoothing",
    "Labels softened towards the pretrained model's own predictions are an ensemble, for any data.",
    R"y' = (1-\alpha)y + \alpha X\theta_1 \implies \hat\theta' = \theta_{1-\alpha}",
    parameters=EXACT
    | {"smoothing": Parameter(low=0.0, high=1.0, lowest=-1.0, highest=2.0), "foreign": Parameter(highest=1.0)},
    tolerance=1e-8,
)
def e1_smoothing(normal: Normal, smoothing: float, foreign: float, **values: Any) -> Sides:
    """θ₁ + (1−α)(θ̂ − θ₁) for four fine-tuners; the teacher is θ₁ but for a share `foreign` of another model."""
    exact = exact_instance(normal, **values, tau=1.0)
    X, theta_1 = exact.X, np.asarray(exact.problem.pretrain_error)
    y, teacher = normal(len(X)), theta_1 + foreign * normal(theta_1.size)
    tau = float(frontier.smoothing_coefficient(smoothing))
    averages = np.stack([theta_1 + tau * R @ (y - X @ theta_1) for R in exact.maps])
    softened = (1 - smoothing) * y + smoothing * X @ teacher
    return averages, np.stack([np.asarray(fine_tune(X, softened, theta_1, filter)) for filter in exact.filters])


@identity(
    "E2",
    "The Pareto frontier of the two risks is where their weighted sum is least.",
    R"\theta_\kappa = \theta_1^* + (\kappa\Sigma_1+\Sigma_2)^{-1}\Sigma_2\delta",
    parameters=EXACT | {"weight": WEIGHT, "trust": Parameter(low=1.0, high=1.0, scale="log", lowest=0.1, highest=10.0)},
    tolerance=1e-8,
)
def e2(normal: Normal, weight: float, trust: float, **values: Any) -> Sides:
    """Both risks at every κ, and the same from (κΣ₁+Σ₂)⁻¹Σ₂ as a matrix; `trust` mistakes κ by a factor."""
    exact = exact_instance(normal, **values, tau=1.0)
    problem, m, shift = exact.problem, exact.moments, exact.problem.shift
    second = np.outer(shift.vector, shift.vector) if isinstance(shift, FixedShift) else matrix_of(shift.covariance)
    risks = []
    for kappa in weight * RATIOS:
        learned = np.linalg.solve(kappa * trust * m.pretrain + m.finetune, m.finetune)
        missed = learned - np.eye(problem.p)
        parts = (m.finetune, missed), (m.pretrain, learned)
        risks.append([np.trace(part.T @ covariance @ part @ second) for covariance, part in parts])
    return np.stack(frontier.pareto(problem, weight * RATIOS), axis=-1), np.array(risks)


@inequality(
    "E2.floor",
    "No fine-tuner and no average of it gets below the frontier.",
    R"R_\mathrm{ft}(\theta) + \kappa R_\mathrm{pre}(\theta) \ge R_\mathrm{ft}(\theta_\kappa)"
    R" + \kappa R_\mathrm{pre}(\theta_\kappa)",
    parameters=EXACT | {"weight": WEIGHT, "average": Parameter(low=-0.5, high=1.5, lowest=-10.0, highest=10.0)},
    tolerance=1e-9,
)
def e2_floor(normal: Normal, weight: float, average: float, **values: Any) -> Sides:
    """R_ft + κR_pre of four fine-tuners and of their averages, relative to the frontier's, minus 1: (8, κ)."""
    exact = exact_instance(normal, **values, tau=1.0)
    kappa = weight * RATIOS
    finetune, pretrain = frontier.pareto(exact.problem, kappa)
    points = np.array([exact.totals(tau * R) for tau in (1.0, average) for R in exact.maps])
    return 0.0, (points[:, :1] + kappa * points[:, 1:]) / np.asarray(finetune + kappa * pretrain) - 1


@identity(
    "E2.weights",
    "Weights, trade-off weight and distance of the frontier belong together.",
    R"\kappa(R_\mathrm{ft}(\theta_\kappa)) = \kappa,\quad R_\mathrm{pre}(\theta_\kappa)+x\ \text{is}\ x\ \text{away}",
    parameters=without("tau", "fixed") | {"weight": WEIGHT.within(0.1, 10.0), "away": Parameter(low=0.1, high=2.0)},
    tolerance=1e-7,
)
def e2_weights(normal: Normal, weight: float, away: float, **values: Any) -> Sides:
    """θ_κ − θ₁* by its linear system and risks from it; then κ and the distance, of points given by these risks.

    Last, weights and R_ft where both covariances are diagonal, coordinate by coordinate.
    """
    exact = exact_instance(normal, **values, fixed=1, tau=1.0)
    problem, m = exact.problem, exact.moments
    delta = m.mean + m.u
    point = np.linalg.solve(weight * m.pretrain + m.finetune, m.finetune @ delta)
    risks = (point - delta) @ m.finetune @ (point - delta), point @ m.pretrain @ point
    found = frontier.weight_at(problem, risks[0]) / weight
    apart = frontier.distance(problem, risks[0], risks[1] * (1 + away)) / (risks[1] * away)
    weights = np.asarray(frontier.pareto_weights(problem, weight)) / np.abs(point).max()
    first, second = np.diag(m.pretrain), np.diag(m.finetune)
    diagonal = TwoTaskProblem(first, second, FixedShift(delta), 0.0)
    shares = np.asarray(frontier.pareto_weights(diagonal, weight)) / delta
    missed = np.sum(second * (delta * weight * first / (weight * first + second)) ** 2)
    apart = [apart, *shares, frontier.pareto(diagonal, weight).finetune / missed]
    expected = [*point / np.abs(point).max(), 1, 1, *second / (weight * first + second), 1]
    return np.array([*weights, found, *apart]), np.array(expected)


@identity(
    "E2.ensemble",
    "With Σ₁ ∝ Σ₂ and no pretraining error, averaging the optima is Pareto-optimal.",
    R"\Sigma_1 \propto \Sigma_2,\ u = 0 \implies \theta_\tau \in \{\theta_\kappa\}",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "tau": TAU.within(0.05, 0.95, lowest=-0.5, highest=1.5),
        "mismatch": Parameter(highest=1.0),
        "pretrain_size": Parameter(highest=1.0),
    },
    tolerance=1e-7,
)
def e2_ensemble(normal: Normal, decay: float, tau: float, mismatch: float, pretrain_size: float) -> Sides:
    """Both risks of θ₁ + τΔ, relative to those of θ_κ by its linear system, κ = (1−τ)/2τ.

    Σ₁ = 2Σ₂ diagonal but for `mismatch`, a factor e^{mismatch·z} per eigenvalue; u = 0 but for `pretrain_size`.
    """
    spectrum, second = (1.0 + np.arange(12)) ** -decay, np.exp(normal(12))
    pretrain = 2 * spectrum * np.exp(mismatch * normal(12))
    problem = TwoTaskProblem(pretrain, spectrum, RandomShift(second), 0.5, pretrain_size * normal(12))
    kappa = (1 - tau) / (2 * tau)
    learned = spectrum / (kappa * pretrain + spectrum)
    expected = np.array([np.sum(second * spectrum * (1 - learned) ** 2), np.sum(second * pretrain * learned**2)])
    point = np.array(frontier.population_risks(problem, tau))
    away = float(frontier.distance(problem, *point)) / expected[1]
    return np.array([1.0, 1.0, 1.0]), np.array([*point / expected, 1 + away])
