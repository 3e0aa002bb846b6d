"""§6 as claims: ensembles in disguise, and the frontier below which there is nothing (docs, E1, E2)."""

from typing import Any

import numpy as np

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
    """1 + excess forgetting of θ₁ + τΔ, relative to its own.

    Σ₁ = 2Σ₂ diagonal but for `mismatch`, a factor e^{mismatch·z} per eigenvalue; u = 0 but for `pretrain_size`.
    """
    spectrum = (1.0 + np.arange(12)) ** -decay
    pretrain, shift = 2 * spectrum * np.exp(mismatch * normal(12)), RandomShift(np.exp(normal(12)))
    problem = TwoTaskProblem(pretrain, spectrum, shift, 0.5, pretrain_size * normal(12))
    point = frontier.population_risks(problem, tau)
    return 1.0, 1 + float(frontier.distance(problem, point.finetune, point.pretrain) / point.pretrain)
