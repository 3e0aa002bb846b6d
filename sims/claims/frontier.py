"""§6 as claims: ensembles in disguise, and the frontier below which there is nothing (docs, E1, E2)."""

from typing import Any, NamedTuple

import numpy as np

from linfit import FixedShift, RandomShift, TwoTaskProblem, fine_tune, flow_weights
from sims.claims import Normal, claim
from sims.claims.problems import EXACT_PARAMETERS, Exact, exact_instance, matrix_of, moments, totals, zero
from sims.parameters import DECAY, TAU, Parameter
from theory.flow import fixed_point_coefficient as flow_coefficient
from theory.frontier import (
    clipping_coefficient,
    distance,
    pareto,
    population_risks,
    smoothing_coefficient,
    trimming_ratio,
    weighting_coefficient,
)
from theory.s3ft import fixed_point_coefficient as s3ft_coefficient

REPLICATES = 1 << 15

# E1 ------------------------------------------------------------------------------------------------------------------


class Population(NamedTuple):
    """Samples from the population: xᵀΔ (N,), another direction of x (N,), residuals (N,), and what they are made of."""

    along: np.ndarray
    across: np.ndarray
    residual: np.ndarray
    noise_variance: float
    knob: float
    """Threshold over √v; temperature over v."""


def _population(
    normal: Normal, noise_variance: float, knob: float, skewed_features: float, skewed_noise: float
) -> Population:
    """xᵀΔ and the noise are standardised mixtures of a normal z and z²−1, whose share is 0 in the Gaussian case."""

    def mixed(skewness: float) -> np.ndarray:
        draw = normal(REPLICATES)
        values = (1 - skewness) * draw + skewness * (draw**2 - 1)
        return values / ((1 - skewness) ** 2 + 2 * skewness**2) ** 0.5

    along, across = mixed(skewed_features), mixed(skewed_features)
    return Population(along, across, along + noise_variance**0.5 * mixed(skewed_noise), noise_variance, knob)


def _no_slope(_: Population) -> np.ndarray:
    return np.zeros((2, 2))


def _coefficients_of_targets(data: Population) -> np.ndarray:
    """τ of S3FT and of clipped targets at the threshold c = knob·√v."""
    std = (1 + data.noise_variance) ** 0.5
    return np.array([float(rule(data.knob * std, std)) for rule in (s3ft_coefficient, clipping_coefficient)])


def _slopes_of_targets(data: Population) -> np.ndarray:
    """x·target for S3FT and clipped targets: (N, methods, [along, across])."""
    threshold = data.knob * (1 + data.noise_variance) ** 0.5
    r = data.residual
    targets = np.stack([np.where(abs(r) <= threshold, 0, r), np.clip(r, -threshold, threshold)], axis=1)
    return targets[..., None] * np.stack([data.along, data.across], axis=1)[:, None]


def _targets_prediction(data: Population) -> np.ndarray:
    tau = _coefficients_of_targets(data)
    return np.stack([tau, np.zeros(2)], axis=-1)


def _coefficients_of_weights(data: Population) -> np.ndarray:
    """τ of FLOW at T = knob·v and of trimming at c = knob·√v."""
    v = 1 + data.noise_variance
    std, noise_std = v**0.5, data.noise_variance**0.5
    trimmed = weighting_coefficient(trimming_ratio(data.knob * std, std), 1.0, noise_std)
    return np.array([float(flow_coefficient(noise_std, data.knob * v)), float(trimmed)])


def _weights_of(data: Population) -> np.ndarray:
    v = 1 + data.noise_variance
    trimmed = abs(data.residual) <= data.knob * v**0.5
    return np.stack([np.asarray(flow_weights(data.residual**2, data.knob * v)), trimmed], axis=1)


def _weighted_misfit(data: Population) -> np.ndarray:
    """w·x·(r − τxᵀΔ), the normal equations of weighted least squares at the predicted τ: (N, methods, directions)."""
    misfit = data.residual[:, None] - _coefficients_of_weights(data) * data.along[:, None]
    return (_weights_of(data) * misfit)[..., None] * np.stack([data.along, data.across], axis=1)[:, None]


def _flow_misfit(data: Population) -> np.ndarray:
    return _weighted_misfit(data)[:, 0]


def _smoothed(normal: Normal, smoothing: float, foreign: float, **values: Any) -> tuple[Exact, np.ndarray, np.ndarray]:
    """Labels, and the teacher whose predictions soften them: θ₁, but for a share `foreign` of another model."""
    exact = exact_instance(normal, **values, tau=1.0, smoothing=smoothing)
    theta_1 = np.asarray(exact.problem.pretrain_error)
    return exact, normal(len(exact.X)), theta_1 + foreign * normal(theta_1.size)


def _averages(data: tuple[Exact, np.ndarray, np.ndarray]) -> np.ndarray:
    """θ₁ + τ(θ̂ − θ₁), τ = 1 − α, for four fine-tuners."""
    exact, y, _ = data
    theta_1, tau = np.asarray(exact.problem.pretrain_error), float(smoothing_coefficient(exact.extra["smoothing"]))
    return np.stack([theta_1 + tau * R @ (y - exact.X @ theta_1) for R in exact.maps])


def _fits_to_smoothed_labels(data: tuple[Exact, np.ndarray, np.ndarray]) -> np.ndarray:
    exact, y, teacher = data
    theta_1, smoothing = np.asarray(exact.problem.pretrain_error), exact.extra["smoothing"]
    labels = (1 - smoothing) * y + smoothing * exact.X @ teacher
    return np.stack([np.asarray(fine_tune(exact.X, labels, theta_1, filter)) for filter in exact.filters])


# E2 ------------------------------------------------------------------------------------------------------------------

RATIOS = np.array([0.1, 1.0, 10.0])
"""κ, in units of the parameter `weight`."""


def _at_weight(normal: Normal, **values: Any) -> Exact:
    return exact_instance(normal, **values, tau=1.0)


def _second(problem: TwoTaskProblem) -> np.ndarray:
    """E δδᵀ."""
    if isinstance(problem.shift, FixedShift):
        return np.outer(problem.shift.vector, problem.shift.vector)
    return matrix_of(problem.shift.covariance)


def _frontier(exact: Exact) -> np.ndarray:
    """[R_ft, R_pre] at every κ."""
    return np.stack(pareto(exact.problem, exact.extra["weight"] * RATIOS), axis=-1)


def _frontier_by_solving(exact: Exact) -> np.ndarray:
    """The same from (κΣ₁+Σ₂)⁻¹Σ₂ as a matrix."""
    m, second = moments(exact.problem), _second(exact.problem)
    risks = []
    for kappa in exact.extra["weight"] * RATIOS:
        learned = np.linalg.solve(kappa * exact.extra["trust"] * m.pretrain + m.finetune, m.finetune)
        missed = learned - np.eye(len(learned))
        risks.append(
            [np.trace(missed.T @ m.finetune @ missed @ second), np.trace(learned.T @ m.pretrain @ learned @ second)]
        )
    return np.array(risks)


def _excess_over_frontier(exact: Exact) -> np.ndarray:
    """R_ft + κR_pre of four fine-tuners and of their averages, relative to the frontier's, minus 1: (8, κ)."""
    kappa = exact.extra["weight"] * RATIOS
    finetune, pretrain = pareto(exact.problem, kappa)
    points = np.array(
        [totals(exact.problem, exact.X, tau * R) for tau in (1.0, exact.extra["average"]) for R in exact.maps]
    )
    return (points[:, :1] + kappa * points[:, 1:]) / np.asarray(finetune + kappa * pretrain) - 1


def _averaging_in_the_population(
    normal: Normal, decay: float, tau: float, mismatch: float, pretrain_size: float
) -> tuple[TwoTaskProblem, float]:
    """Σ₁ = 2Σ₂ diagonal but for `mismatch`, a factor e^{mismatch·z} per eigenvalue; u = 0 but for `pretrain_size`."""
    p = 12
    spectrum = (1.0 + np.arange(p)) ** -decay
    pretrain = 2 * spectrum * np.exp(mismatch * normal(p))
    shift = RandomShift(np.exp(normal(p)))
    return TwoTaskProblem(pretrain, spectrum, shift, 0.5, pretrain_size * normal(p)), tau


def _distance_of_average(data: tuple[TwoTaskProblem, float]) -> float:
    """1 + excess forgetting of θ₁ + τΔ, relative to its own."""
    problem, tau = data
    point = population_risks(problem, tau)
    return 1 + float(distance(problem, point.finetune, point.pretrain) / point.pretrain)


EXACT = {name: value for name, value in EXACT_PARAMETERS.items() if name != "tau"}
GAUSSIAN = {
    "noise_variance": Parameter(low=0.05, high=3.0, scale="log"),
    "knob": Parameter(low=0.3, high=3.0, scale="log"),
    "skewed_features": Parameter(low=0.0, high=0.0, highest=0.9),
    "skewed_noise": Parameter(low=0.0, high=0.0, highest=0.9),
}
WEIGHT = Parameter(low=0.1, high=10.0, scale="log", lowest=1e-4, highest=1e4)


@claim(
    "E1.targets",
    "Training on own answers within a threshold, or on clipped targets, ends where an ensemble is.",
    R"\mathbb{E}\,x\,\psi(r) = \tau\,\Sigma\Delta,\quad \tau = \mathbb{E}\,\psi'(r)",
    source="ours",
    kind="statistical",
    parameters=GAUSSIAN,
)
def e1_targets(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _population(normal, **values)
    return _targets_prediction(instance), _slopes_of_targets(instance)


@claim(
    "E1.weights",
    "Weighting samples by pretrained loss (FLOW), or dropping the hard ones, is an ensemble too.",
    R"\tau = vm/(\sigma^2 + qm),\quad m = \mathbb{E}\,wr^2/(v\,\mathbb{E}\,w)",
    source="ours",
    kind="statistical",
    parameters=GAUSSIAN,
)
def e1_weights(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _population(normal, **values)
    return _no_slope(instance), _weighted_misfit(instance)


@claim(
    "E1.flow",
    "For FLOW this needs no law of the features, only Gaussian noise.",
    R"\mathbb{E}[e^{-r^2/T}(r - \tau s) \mid s = x^\top\Delta] = 0,\quad \tau = 1/(1+2\sigma^2/T)",
    source="ours",
    kind="statistical",
    parameters=GAUSSIAN | {"skewed_features": Parameter(low=0.0, high=0.9, highest=1.0)},
)
def e1_flow(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _population(normal, **values)
    return (lambda data: np.zeros(2))(instance), _flow_misfit(instance)


@claim(
    "E1.smoothing",
    "Labels softened towards the pretrained model's own predictions are an ensemble, for any data.",
    R"y' = (1-\alpha)y + \alpha X\theta_1 \implies \hat\theta' = \theta_{1-\alpha}",
    source="ours",
    kind="identity",
    parameters=EXACT
    | {
        "smoothing": Parameter(low=0.0, high=1.0, lowest=-1.0, highest=2.0),
        "foreign": Parameter(low=0.0, high=0.0, highest=1.0),
    },
    tolerance=1e-8,
)
def e1_smoothing(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _smoothed(normal, **values)
    return _averages(instance), _fits_to_smoothed_labels(instance)


@claim(
    "E2",
    "The Pareto frontier of the two risks is where their weighted sum is least.",
    R"\theta_\kappa = \theta_1^* + (\kappa\Sigma_1+\Sigma_2)^{-1}\Sigma_2\delta",
    source="ours",
    kind="identity",
    parameters=EXACT | {"weight": WEIGHT, "trust": Parameter(low=1.0, high=1.0, scale="log", lowest=0.1, highest=10.0)},
    tolerance=1e-8,
)
def e2(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _at_weight(normal, **values)
    return _frontier(instance), _frontier_by_solving(instance)


@claim(
    "E2.floor",
    "No fine-tuner and no average of it gets below the frontier.",
    R"R_\mathrm{ft}(\theta) + \kappa R_\mathrm{pre}(\theta) \ge R_\mathrm{ft}(\theta_\kappa)"
    R" + \kappa R_\mathrm{pre}(\theta_\kappa)",
    source="ours",
    kind="inequality",
    parameters=EXACT | {"weight": WEIGHT, "average": Parameter(low=-0.5, high=1.5, lowest=-10.0, highest=10.0)},
    tolerance=1e-9,
)
def e2_floor(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _at_weight(normal, **values)
    return zero(instance), _excess_over_frontier(instance)


@claim(
    "E2.ensemble",
    "With Σ₁ ∝ Σ₂ and no pretraining error, averaging the optima is Pareto-optimal.",
    R"\Sigma_1 \propto \Sigma_2,\ u = 0 \implies \theta_\tau \in \{\theta_\kappa\}",
    source="ours",
    kind="identity",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "tau": TAU.within(0.05, 0.95, lowest=-0.5, highest=1.5),
        "mismatch": Parameter(low=0.0, high=0.0, highest=1.0),
        "pretrain_size": Parameter(low=0.0, high=0.0, highest=1.0),
    },
    tolerance=1e-7,
)
def e2_ensemble(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _averaging_in_the_population(normal, **values)
    return (lambda data: 1.0)(instance), _distance_of_average(instance)
