"""§4 as claims: FLOW's weights, the moments under them, where learning stalls, Theorem 7.2 (docs, F1–F6)."""

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.special

from linfit import FixedShift, GradientDescent, GradientFlow, MinNorm, Ridge, TwoTaskProblem, fine_tune, flow_weights
from linfit.weighting import robust_weights
from sims.claims import Normal, claim
from sims.claims.problems import dense_covariance, matrix_of, zero
from sims.parameters import DECAY, PENALTY, TEMPERATURE, Parameter
from theory.flow import (
    MEDIAN,
    best_averaging,
    errors,
    fixed_point_coefficient,
    flow_iterates,
    heavy_tailed_stall,
    lognormal_sizes,
    mean_weight,
    median_temperature,
    residual_variance,
    stall,
    stalled_direction,
    temperature_from_beta,
    trajectory,
    vanilla_iterates,
    weighted_covariance,
    weighted_moment,
)

P, REPLICATES = 4, 4096
GAUSSIAN = Parameter(low=0.0, high=0.0, highest=2.0)
"""Spread of log S, where features (or noise) are √S times Gaussian ones: kurtosis 3e^{spread²}."""
DATA = {
    "decay": DECAY.within(0.0, 1.5),
    "noise_variance": Parameter(low=1e-2, high=10.0, scale="log", lowest=1e-6, highest=1e3),
    "warmth": Parameter(low=0.1, high=30.0, scale="log", lowest=1e-3, highest=1e3),
}
"""Eigenvalues j^(−decay); σ² and the temperature in units of the signal ΔᵀΣΔ and of the median of r²."""

# F1 ------------------------------------------------------------------------------------------------------------------


class Simplex(NamedTuple):
    """Losses, the temperature of the weights, that of the objective, and a start for the search."""

    losses: np.ndarray
    temperature: float
    objective_temperature: float
    start: np.ndarray


def _simplex(normal: Normal, temperature: float, temperature_ratio: float) -> Simplex:
    return Simplex(normal(6) ** 2, temperature, temperature * temperature_ratio, normal(6))


def _normalised_weights(simplex: Simplex) -> np.ndarray:
    """π of FLOW and of the opposite weights, (2, n)."""
    weights = [np.asarray(weigh(simplex.losses, simplex.temperature)) for weigh in (flow_weights, robust_weights)]
    return np.stack([w / w.sum() for w in weights])


def _entropic_optima(simplex: Simplex) -> np.ndarray:
    """The least Σπℓ + TΣπ log π and the least −Σπℓ + TΣπ log π, by mirror descent from a random start."""
    found, temperature = [], simplex.objective_temperature
    for sign in (1.0, -1.0):
        pi = scipy.special.softmax(simplex.start)
        for _ in range(60):
            gradient = sign * simplex.losses + temperature * (np.log(pi) + 1)
            pi = scipy.special.softmax(np.log(pi) - gradient / (2 * temperature))
        found.append(pi)
    return np.stack(found)


# F2–F4: sampled -------------------------------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """A problem, and raw samples of features and residuals of the pretrained weights."""

    covariance: np.ndarray
    shift: np.ndarray
    noise_std: float
    temperature: float
    tail: float
    x: np.ndarray
    r: np.ndarray

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As `theory.flow` takes them."""
        return self.covariance, self.shift, self.noise_std, self.temperature

    @property
    def weights(self) -> np.ndarray:
        """e^{−r²/T}."""
        return np.asarray(flow_weights(self.r**2, self.temperature))


def _sampled(
    normal: Normal,
    decay: float,
    noise_variance: float,
    warmth: float,
    tail: float,
    noise_tail: float,
) -> Sampled:
    covariance, shift = dense_covariance(normal(P, P), decay), normal(P)
    shift = shift / np.sqrt(shift @ covariance @ shift)
    x = _sizes(normal, tail)[:, None] * normal(REPLICATES, P) @ scipy.linalg.cholesky(covariance)
    noise = _sizes(normal, noise_tail) * normal(REPLICATES) * noise_variance**0.5
    temperature = warmth * MEDIAN * (1 + noise_variance)
    return Sampled(covariance, shift, noise_variance**0.5, temperature, tail, x, x @ shift + noise)


def _sizes(normal: Normal, spread: float) -> np.ndarray:
    """√S, log S ~ N(−spread²/2, spread²), so that E S = 1."""
    return np.exp((spread * normal(REPLICATES) - spread**2 / 2) / 2)


def _weighted_moments(sampled: Sampled) -> np.ndarray:
    """E w, E w xxᵀ and E w x r in one vector."""
    variance = residual_variance(*sampled.arguments[:3])
    matrix = np.asarray(weighted_covariance(*sampled.arguments))
    first = np.asarray(weighted_moment(*sampled.arguments))
    return np.concatenate([np.ravel(mean_weight(variance, sampled.temperature)), matrix.ravel(), first])


def _sampled_moments(sampled: Sampled) -> np.ndarray:
    w, x, r = sampled.weights, sampled.x, sampled.r
    outer = np.einsum("n,np,nq->npq", w, x, x).reshape(len(w), -1)
    return np.concatenate([w[:, None], outer, (w * r)[:, None] * x], axis=1)


def _below_the_median(sampled: Sampled) -> np.ndarray:
    """Whether r² ≤ T."""
    temperature = float(median_temperature(residual_variance(*sampled.arguments[:3])))
    return (sampled.r**2 <= temperature).astype(float)


def _speeds(sampled: Sampled, speed: float, rate: float, drive: float) -> np.ndarray:
    """Along b̂, across it, their coupling, and the pull along b̂."""
    return np.array([speed * rate, speed, 0.0, drive])


def _predicted_speeds(sampled: Sampled) -> np.ndarray:
    stalled = stall(*sampled.arguments)
    speed = float(stalled.mean_weight)
    return _speeds(sampled, speed, float(stalled.rate), speed * float(stalled.drive))


def _predicted_heavy_speeds(sampled: Sampled) -> np.ndarray:
    heavy = heavy_tailed_stall(1.0, sampled.noise_std, sampled.temperature, *lognormal_sizes(sampled.tail))
    tau = float(fixed_point_coefficient(sampled.noise_std, sampled.temperature))
    return _speeds(sampled, float(heavy.speed), float(heavy.rate), float(heavy.speed * heavy.rate) * tau)


def _measured_speeds(sampled: Sampled) -> np.ndarray:
    """In whitened coordinates, along b̂ = Σ^{1/2}Δ (of length 1 here) and one direction orthogonal to it."""
    root = scipy.linalg.cholesky(sampled.covariance)
    z = scipy.linalg.solve_triangular(root, sampled.x.T, trans="T").T
    along = root @ sampled.shift
    across = np.linalg.qr(np.stack([along, np.eye(P)[0]], axis=1))[0][:, 1]
    a, c, w = z @ along, z @ across, sampled.weights
    return np.stack([w * a**2, w * c**2, w * a * c, w * a * sampled.r], axis=1)


def _normal_equations(sampled: Sampled) -> np.ndarray:
    """w x (r − τ xᵀΔ)."""
    tau = float(fixed_point_coefficient(sampled.noise_std, sampled.temperature))
    left = sampled.r - tau * sampled.x @ sampled.shift
    return (sampled.weights * left)[:, None] * sampled.x


# F3, F4: exact --------------------------------------------------------------------------------------------------------


class Population(NamedTuple):
    """A problem, hyperparameters, and Σ_w and E w x r by another way."""

    problem: TwoTaskProblem
    temperature: float
    moments: tuple[np.ndarray, np.ndarray]
    step_size: float
    steps: int
    penalty: float


def _moments_by_quadrature(
    covariance: np.ndarray, shift: np.ndarray, noise_variance: float, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """E w xxᵀ and E w x r: x given r is Gaussian, which leaves integrals over r, by the trapezoidal rule."""
    a, variance = covariance @ shift, shift @ covariance @ shift + noise_variance
    width = 1 / np.sqrt(1 / variance + 2 / temperature)
    r = np.linspace(-12, 12, 4001) * width
    density = np.exp(-(r**2) / temperature - r**2 / (2 * variance)) / np.sqrt(2 * np.pi * variance) * (r[1] - r[0])
    mass, square = density.sum(), density @ r**2
    along = np.outer(a, a) / variance
    return mass * (covariance - along) + square / variance * along, square / variance * a


def _exact(
    normal: Normal,
    decay: float,
    noise_variance: float,
    warmth: float,
    speed: float,
    steps: int,
    penalty: float,
) -> Population:
    covariance, pretrain, shift, u = (
        dense_covariance(normal(P, P), decay),
        dense_covariance(normal(P, P), 0.5),
        normal(P),
        normal(P) / 4,
    )
    gap = shift - u
    signal = gap @ covariance @ gap
    noise_variance = noise_variance * signal
    temperature = warmth * MEDIAN * (signal + noise_variance)
    matrix, first = _moments_by_quadrature(covariance, gap, noise_variance, temperature)
    problem = TwoTaskProblem(pretrain, covariance, FixedShift(shift), noise_variance**0.5, u)
    step_size = speed / np.linalg.eigvalsh(matrix)[-1]
    return Population(problem, temperature, (matrix, first), step_size, steps, penalty * np.trace(matrix) / P)


def _predicted_path(population: Population) -> np.ndarray:
    """θ − θ₁, R_ft, R_pre after gradient descent, gradient flow of the same length, ridge, and to the end."""
    step_size, steps = population.step_size, population.steps
    filters = (
        GradientDescent(step_size, steps),
        GradientFlow(step_size * steps),
        Ridge(population.penalty),
        MinNorm(),
    )
    ends = [trajectory(population.problem, filter, population.temperature) for filter in filters]
    return np.stack([np.concatenate([end.moved, end.finetune[None], end.pretrain[None]]) for end in ends])


def _measured_path(population: Population) -> np.ndarray:
    """The iteration, the matrix exponential, and linear systems, with the moments by quadrature."""
    (matrix, first), problem = population.moments, population.problem
    eye, time = np.eye(P), population.step_size * population.steps
    descent = np.zeros(P)
    for _ in range(population.steps):
        descent = descent + population.step_size * (first - matrix @ descent)
    end = np.linalg.solve(matrix, first)
    flow = end - scipy.linalg.expm(-time * matrix) @ end
    ridge = np.linalg.solve(matrix + population.penalty * eye, first)
    u, gap = np.asarray(problem.pretrain_error), np.asarray(problem.gap_mean)
    sigma_1, sigma_2 = matrix_of(problem.pretrain_covariance), matrix_of(problem.finetune_covariance)
    return np.stack(
        [[*m, (m - gap) @ sigma_2 @ (m - gap), (m + u) @ sigma_1 @ (m + u)] for m in (descent, flow, ridge, end)]
    )


def _ridge_as_ensemble(population: Population) -> np.ndarray:
    """τ times unweighted ridge of penalty λ/Z, τ = 1/(1 + 2v_λ/T)."""
    problem, temperature = population.problem, population.temperature
    noise_variance, gap = float(problem.noise_std) ** 2, np.asarray(problem.gap_mean)
    covariance = matrix_of(problem.finetune_covariance)
    scale = float(mean_weight(gap @ covariance @ gap + noise_variance, temperature))
    ridge = np.linalg.solve(covariance + population.penalty / scale * np.eye(P), covariance @ gap)
    unexplained = noise_variance + gap @ covariance @ (gap - ridge)
    return ridge / (1 + 2 * unexplained / temperature)


def _weighted_ridge(population: Population) -> np.ndarray:
    matrix, first = population.moments
    return np.linalg.solve(matrix + population.penalty * np.eye(P), first)


# F5 ------------------------------------------------------------------------------------------------------------------


class Interpolated(NamedTuple):
    """A design, labels, pretrained weights and FLOW's weights."""

    X: np.ndarray
    y: np.ndarray
    theta_1: np.ndarray
    weights: np.ndarray


def _interpolated(normal: Normal, surplus: int, noise_variance: float, warmth: float) -> Interpolated:
    p = 24
    n = p + 8 * surplus
    X, theta_1 = normal(n, p), normal(p)
    y = X @ normal(p) + noise_variance**0.5 * normal(n)
    losses = (y - X @ theta_1) ** 2
    return Interpolated(X, y, theta_1, np.asarray(flow_weights(losses, warmth * np.median(losses))))


def _unweighted_limit(data: Interpolated) -> np.ndarray:
    return data.theta_1 + np.linalg.pinv(data.X) @ (data.y - data.X @ data.theta_1)


def _weighted_limit(data: Interpolated) -> np.ndarray:
    return np.asarray(fine_tune(data.X, data.y, data.theta_1, MinNorm(), data.weights))


# F6 ------------------------------------------------------------------------------------------------------------------

STEPS = np.array([0, 1, 2, 3, 7, 20, 60])


class Theorem(NamedTuple):
    """The setting of Theorem 7.2 in R^p, in a random frame whose first two vectors are ē and ē⊥."""

    rho: float
    beta: float
    distance: float
    frame: np.ndarray
    noise_variance: float
    step_ratio: float


def _theorem(
    normal: Normal, rho: float, beta: float, p: int, distance: float, noise_variance: float, step_ratio: float
) -> Theorem:
    frame = np.linalg.qr(normal(p, p))[0]
    return Theorem(rho, beta, distance, frame, noise_variance, step_ratio)


def _matrices(theorem: Theorem) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Σ̃, Σ_w, E w x r and μ."""
    e, across = theorem.frame[:, 0], theorem.frame[:, 1]
    covariance = np.eye(len(e)) + theorem.rho * (np.outer(e, across) + np.outer(across, e))
    temperature = float(temperature_from_beta(theorem.beta, theorem.rho, theorem.distance))
    shift = -theorem.distance * e
    matrix, first = _moments_by_quadrature(covariance, shift, theorem.noise_variance, temperature)
    mu = (temperature / (temperature + 2 * theorem.distance**2)) ** 0.5
    return covariance, matrix, first, mu


def _in_the_plane(theorem: Theorem, positions: Any) -> np.ndarray:
    """θ_K − θ₂* in units of ‖e‖."""
    return np.asarray(positions) @ theorem.frame[:, :2].T


def _flow_by_theorem(theorem: Theorem) -> np.ndarray:
    return _in_the_plane(theorem, flow_iterates(theorem.rho, theorem.beta, STEPS))


def _vanilla_by_theorem(theorem: Theorem) -> np.ndarray:
    return _in_the_plane(theorem, vanilla_iterates(theorem.rho, STEPS))


def _iterated(theorem: Theorem, matrix: np.ndarray, first: np.ndarray, step_size: float) -> np.ndarray:
    """Gradient descent on the loss without ½, from θ₁* to θ₂* + e_K."""
    moved, path = np.zeros(len(first)), []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            path.append(moved / theorem.distance + theorem.frame[:, 0])
        moved = moved + 2 * step_size * (first - matrix @ moved)
    return np.array(path)


def _flow_iterated(theorem: Theorem) -> np.ndarray:
    _, matrix, first, mu = _matrices(theorem)
    return _iterated(theorem, matrix, first, theorem.step_ratio / (2 * mu))


def _vanilla_iterated(theorem: Theorem) -> np.ndarray:
    covariance, *_ = _matrices(theorem)
    first = covariance @ (-theorem.distance * theorem.frame[:, 0])
    return _iterated(theorem, covariance, first, theorem.step_ratio / 2)


def _stalled(theorem: Theorem) -> np.ndarray:
    """λ₁ times the stalled direction."""
    top = (1 + theorem.beta * theorem.rho**2) / (1 + theorem.beta)
    return top * _in_the_plane(theorem, stalled_direction(theorem.rho, theorem.beta))


def _one_step_of_the_stalled(theorem: Theorem) -> np.ndarray:
    _, matrix, _, mu = _matrices(theorem)
    direction = _in_the_plane(theorem, stalled_direction(theorem.rho, theorem.beta))
    return direction - theorem.step_ratio / mu * (matrix @ direction)


class TwoTasks(NamedTuple):
    """ρ and the block of Σ₁ ⪰ I on ē and ē⊥."""

    rho: float
    block: np.ndarray


def _two_tasks(normal: Normal, rho: float, strength: float, coupling: float, spare: float) -> TwoTasks:
    """s = ēᵀΣ₁ē = 1 + strength, c = ēᵀΣ₁ē⊥ = coupling·ρs, and `spare` times the least ē⊥ᵀΣ₁ē⊥ − 1 that goes with it."""
    s = 1 + strength
    c = coupling * rho * s
    return TwoTasks(rho, np.array([[s, c], [c, 1 + spare * c**2 / strength]]))


LONG = np.append(np.arange(1.0, 33), [64, 128, 512, 4096, 65536])


def _least_total(tasks: TwoTasks) -> float:
    """The least err_tot of FLOW over β and many K, by a grid and then smaller ones around its best."""

    def totals(logarithms: np.ndarray) -> np.ndarray:
        positions = flow_iterates(tasks.rho, np.exp(logarithms), LONG[:, None])
        return np.asarray(errors(positions, tasks.rho, tasks.block).total)

    low, high = np.full(LONG.size, np.log(1e-6)), np.zeros(LONG.size)
    for _ in range(6):
        grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 65)
        values = totals(grid)
        at, spacing = values.argmin(axis=1), (high - low) / 64
        middle = grid[np.arange(LONG.size), at]
        low, high = np.maximum(middle - spacing, np.log(1e-6)), np.minimum(middle + spacing, 0)
    return float(values.min())


def _flow_gain(tasks: TwoTasks) -> float:
    """What the best FLOW gains over the best averaging, relative."""
    averaging = _best_average_by_search(tasks)
    return 1 - _least_total(tasks) / averaging


def _best_average(tasks: TwoTasks) -> float:
    return float(best_averaging(tasks.block))


def _best_average_by_search(tasks: TwoTasks) -> float:
    omega = np.linspace(0, 1, 1001)
    s = tasks.block[0, 0]
    values = s * (1 - omega) ** 2 + omega**2
    at = np.clip(values.argmin(), 1, 999)
    before, least, after = values[at - 1 : at + 2]
    return float(least - (after - before) ** 2 / (8 * (after - 2 * least + before)))


def _half(_: Any) -> float:
    return 0.5


HEAVY = {"tail": GAUSSIAN, "noise_tail": GAUSSIAN}
THEOREM = {
    "rho": Parameter(low=0.0, high=0.95, highest=0.999),
    "beta": Parameter(low=1e-2, high=1.0, scale="log", lowest=1e-4),
    "p": Parameter(low=2, high=5, scale="whole"),
    "distance": Parameter(low=0.3, high=3.0, scale="log"),
    "noise_variance": Parameter(low=0.0, high=0.0, highest=1.0),
    "step_ratio": Parameter(low=1.0, high=1.0, lowest=0.5, highest=1.5),
}
TWO_TASKS = {
    "rho": Parameter(low=0.1, high=0.95, lowest=0.0),
    "strength": Parameter(low=0.2, high=20.0, scale="log", highest=1e3),
    "coupling": Parameter(low=-2.0, high=0.9, lowest=-10.0, highest=2.0),
    "spare": Parameter(low=1.0, high=4.0, highest=100.0),
}


@claim(
    "F1",
    "Normalised, FLOW's weights minimise Σπℓ + TΣπ log π; their opposites maximise Σπℓ − TΣπ log π.",
    R"\pi \propto e^{-\ell/T} = \arg\min_\pi \textstyle\sum_i\pi_i\ell_i + T\sum_i\pi_i\log\pi_i",
    source="paper 2502.02797, Prop. 4.3",
    kind="identity",
    parameters={
        "temperature": TEMPERATURE.within(0.2, 5.0),
        "temperature_ratio": Parameter(low=1.0, high=1.0, scale="log", lowest=0.2, highest=5.0),
    },
    tolerance=1e-9,
)
def f1(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _simplex(normal, **values)
    return _normalised_weights(instance), _entropic_optima(instance)


@claim(
    "F2",
    "Weighting Gaussian data deflates its covariance along one direction, ΣΔ.",
    R"\Sigma_w = Z\bigl(\Sigma - \tfrac{2}{T+2v}\Sigma\Delta\Delta^\top\Sigma\bigr),\ "
    R"\mathbb E\,wxr = \tfrac{Z\,\Sigma\Delta}{1+2v/T}",
    source="paper 2502.02797 (setting); ours (general)",
    kind="statistical",
    parameters=DATA | HEAVY,
)
def f2(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _sampled(normal, **values)
    return _weighted_moments(instance), _sampled_moments(instance)


@claim(
    "F2.median",
    "The median of Gaussian squared residuals is 0.4549 of their variance.",
    R"T/v = \mathrm{median}\,\chi^2_1 = 0.4549",
    source="paper 2502.02797 (T); ours (constant)",
    kind="statistical",
    parameters=DATA | HEAVY | {"warmth": Parameter(low=1.0, high=1.0)},
)
def f2_median(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _sampled(normal, **values)
    return _half(instance), _below_the_median(instance)


@claim(
    "F3",
    "In whitened coordinates FLOW slows learning along Σ^{1/2}Δ, and all else alike.",
    R"\mathrm{rate} = \frac{1+2\sigma^2/T}{1+2v/T},\quad \mathrm{drive} = \frac{1}{1+2v/T}",
    source="paper 2502.02797 (stalls); ours (form)",
    kind="statistical",
    parameters=DATA | HEAVY,
)
def f3(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _sampled(normal, **values)
    return _predicted_speeds(instance), _measured_speeds(instance)


@claim(
    "F3.tails",
    "For heavy-tailed features FLOW still slows Δ alone, at another rate.",
    R"\mathrm{rate} = (1+2\sigma^2/T)\,\mathbb E[SZ_S^3]/\mathbb E[SZ_S],\ x = \sqrt S z",
    source="ours",
    kind="statistical",
    parameters=DATA | {"tail": Parameter(low=0.0, high=0.7), "noise_tail": GAUSSIAN},
)
def f3_tails(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _sampled(normal, **values)
    return _predicted_heavy_speeds(instance), _measured_speeds(instance)


@claim(
    "F3.path",
    "Descent, flow and ridge under FLOW's weights follow from the spectrum of Σ alone.",
    R"\theta_k = \theta_1 + \tau[I-(I-\eta\Sigma_w)^k]\Delta",
    source="paper 2502.02797 (setting); ours (general)",
    kind="identity",
    parameters=DATA
    | {
        "speed": Parameter(low=0.1, high=1.9, highest=2.5),
        "steps": Parameter(low=1, high=60, scale="whole"),
        "penalty": PENALTY.within(1e-3, 1e3),
    },
    tolerance=1e-7,
)
def f3_path(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _exact(normal, **values)
    return _predicted_path(instance), _measured_path(instance)


@claim(
    "F4",
    "With label noise FLOW ends on the way from θ₁ to θ₂*, whatever the law of the features.",
    R"\theta_\infty = \theta_1 + \Delta/(1+2\sigma^2/T)",
    source="ours",
    kind="statistical",
    parameters=DATA | {"tail": Parameter(low=0.0, high=0.7), "noise_tail": GAUSSIAN},
)
def f4(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _sampled(normal, **values)
    return zero(instance), _normal_equations(instance)


@claim(
    "F4.ridge",
    "FLOW with ridge is averaged ridge: of penalty λ/Z, its τ set by what ridge leaves unexplained.",
    R"\theta_\lambda - \theta_1 = \frac{(\Sigma+\lambda/Z)^{-1}\Sigma\Delta}{1+2v_\lambda/T},\ "
    R"v_\lambda = \sigma^2 + \Delta^\top\Sigma\tfrac{\lambda}{Z}(\Sigma+\tfrac{\lambda}{Z})^{-1}\Delta",
    source="ours",
    kind="identity",
    parameters=DATA
    | {
        "penalty": PENALTY.within(1e-3, 1e3),
        "speed": Parameter(low=1.0, high=1.0),
        "steps": Parameter(low=1, high=1, scale="whole"),
    },
    tolerance=1e-9,
)
def f4_ridge(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _exact(normal, **values)
    return _ridge_as_ensemble(instance), _weighted_ridge(instance)


@claim(
    "F5",
    "Where the model interpolates, weights do not move the limit of training.",
    R"n \le p \implies \hat\theta_w = \theta_1 + X^+(y-X\theta_1)",
    source="ours",
    kind="identity",
    parameters={
        "surplus": Parameter(low=-2, high=-1, scale="whole", highest=1),
        "noise_variance": Parameter(low=1e-2, high=10.0, scale="log"),
        "warmth": Parameter(low=2.0, high=30.0, scale="log", lowest=1e-2),
    },
    tolerance=1e-6,
)
def f5(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _interpolated(normal, **values)
    return _unweighted_limit(instance), _weighted_limit(instance)


@claim(
    "F6",
    "Theorem 7.2: the iterates of FLOW in the paper's two-task setting.",
    R"\theta_K = \theta_2^* + \tfrac{\lambda_1^K+\lambda_2^K\beta^2\rho^2}{1+\beta^2\rho^2}e "
    R"- \beta\rho\tfrac{\lambda_1^K-\lambda_2^K}{1+\beta^2\rho^2}\|e\|\bar e_\perp",
    source="paper 2502.02797, Theorem 7.2",
    kind="identity",
    parameters=THEOREM,
    tolerance=1e-10,
)
def f6(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _theorem(normal, **values)
    return _flow_by_theorem(instance), _flow_iterated(instance)


@claim(
    "F6.vanilla",
    "Without weights, at η = ½, the error alternates between e and −‖e‖ē⊥ and shrinks by ρ.",
    R"\theta_K = \theta_2^* + \rho^K e\ (K\ \text{even}),\ \theta_2^* - \rho^K\|e\|\bar e_\perp\ "
    R"(K\ \text{odd})",
    source="paper 2502.02797, §7",
    kind="identity",
    parameters=THEOREM | {"noise_variance": Parameter(low=0.0, high=0.0)},
    tolerance=1e-10,
)
def f6_vanilla(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _theorem(normal, **values)
    return _vanilla_by_theorem(instance), _vanilla_iterated(instance)


@claim(
    "F6.stalled",
    "FLOW is stalled along e − βρ‖e‖ē⊥, the top eigenvector of its iteration.",
    R"Q(e-\beta\rho\|e\|\bar e_\perp) = \tfrac{1+\beta\rho^2}{1+\beta}(e-\beta\rho\|e\|\bar e_\perp)",
    source="paper 2502.02797, Theorem 7.2",
    kind="identity",
    parameters=THEOREM,
    tolerance=1e-10,
)
def f6_stalled(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _theorem(normal, **values)
    return _stalled(instance), _one_step_of_the_stalled(instance)


@claim(
    "F6.averaging",
    "The best average of both models has total error s/(s+1), s = ēᵀΣ₁ē.",
    R"\min_\omega \mathrm{err}_\mathrm{tot}(\theta_2^*+\omega e) = \tfrac{s}{s+1}\|e\|^2",
    source="paper 2502.02797, §7",
    kind="identity",
    parameters=TWO_TASKS,
    tolerance=1e-9,
)
def f6_averaging(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _two_tasks(normal, **values)
    return _best_average(instance), _best_average_by_search(instance)


@claim(
    "F6.remark",
    "Remark 7.6: the best FLOW, over T and K, is at least as good as the best averaging.",
    R"\inf_{\beta,K}\mathrm{err}_\mathrm{tot} \le \min_\omega\mathrm{err}_\mathrm{tot}",
    source="paper 2502.02797, Remark 7.6",
    kind="inequality",
    parameters=TWO_TASKS
    | {"rho": Parameter(low=0.0, high=0.95), "coupling": Parameter(low=-2.0, high=2.0, lowest=-10.0, highest=10.0)},
    tolerance=1e-3,
)
def f6_remark(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _two_tasks(normal, **values)
    return zero(instance), _flow_gain(instance)


@claim(
    "F6.better",
    "The best FLOW is better than the best averaging if ēᵀΣ₁ē⊥ < ρ ēᵀΣ₁ē, and only then.",
    R"\inf_{\beta,K}\mathrm{err}_\mathrm{tot} < \min_\omega\mathrm{err}_\mathrm{tot} \iff "
    R"\bar e^\top\Sigma_1\bar e_\perp < \rho\,\bar e^\top\Sigma_1\bar e",
    source="paper 2502.02797 (ρ > 0); ours (condition)",
    kind="inequality",
    parameters=TWO_TASKS,
)
def f6_better(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _two_tasks(normal, **values)
    return zero(instance), _flow_gain(instance)


@claim(
    "F6.equal",
    "At ρ = 0 FLOW is averaging: their best total errors are equal.",
    R"\rho = 0 \implies \min_{\beta,K}\mathrm{err}_\mathrm{tot} = \tfrac{s}{s+1}\|e\|^2",
    source="paper 2502.02797, Remark 7.6",
    kind="identity",
    parameters=TWO_TASKS | {"rho": Parameter(low=0.0, high=0.0, highest=0.9)},
    tolerance=1e-6,
)
def f6_equal(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _two_tasks(normal, **values)
    return _best_average(instance), _least_total(instance)
