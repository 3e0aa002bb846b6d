"""§4 as claims: FLOW's weights, the moments under them, where learning stalls, Theorem 7.2 (docs, F1–F6)."""

from typing import Any, get_args

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
import scipy.stats

from linfit import (
    FixedShift,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Ridge,
    TwoTaskProblem,
    excess_risks,
    fine_tune,
    flow_weights,
    gradient_descent,
)
from linfit.weighting import Normalisation, effective_sample_size, effective_step, robust_weights
from sims.claims import Normal, Sides, identity, inequality, statistical
from sims.claims.problems import (
    Moments,
    dense_covariance,
    descent_map,
    flow_map,
    matrix_of,
    moments,
    parabola,
    ridge_map,
)
from sims.parameters import DECAY, NOISE_STD, PENALTY, TAU, TEMPERATURE, TIME, WEIGHT, Parameter
from theory import flow

P, REPLICATES = 4, 4096
GAUSSIAN = Parameter("spread of log S: features (or noise) are √S times Gaussian, kurtosis 3e^{spread²}", highest=2.0)
DATA = {
    "decay": DECAY.within(0.0, 1.5),
    "noise_std": NOISE_STD.within(0.1, 10.0**0.5, lowest=1e-3, highest=1e3**0.5)._replace(unit="√(ΔᵀΣΔ)"),
    "warmth": Parameter("temperature", 1.0, 0.1, 30.0, "log", "the median of r²", lowest=1e-3, highest=1e3),
}
HEAVY = {"tail": GAUSSIAN, "noise_tail": GAUSSIAN}
TAILS = {"tail": GAUSSIAN._replace(high=0.7, highest=None), "noise_tail": GAUSSIAN}


@identity(
    "F1",
    "Normalised, FLOW's weights minimise Σπℓ + TΣπ log π; their opposites maximise Σπℓ − TΣπ log π.",
    R"\pi \propto e^{-\ell/T} = \arg\min_\pi \textstyle\sum_i\pi_i\ell_i + T\sum_i\pi_i\log\pi_i",
    source="paper 2502.02797, Prop. 4.3",
    parameters={
        "temperature": TEMPERATURE.within(0.2, 5.0),
        "temperature_ratio": Parameter(
            "T of the objective over that of the weights", 1.0, 1.0, 1.0, "log", "1", 0.2, 5.0
        ),
    },
    tolerance=1e-9,
)
def f1(normal: Normal, temperature: float, temperature_ratio: float) -> Sides:
    """The optima by mirror descent from a random start."""
    losses, start = normal(6) ** 2, normal(6)
    weights = [np.asarray(weigh(losses, temperature)) for weigh in (flow_weights, robust_weights)]
    optima, temperature = [], temperature * temperature_ratio
    for sign in (1.0, -1.0):
        pi = scipy.special.softmax(start)
        for _ in range(60):
            gradient = sign * losses + temperature * (np.log(pi) + 1)
            pi = scipy.special.softmax(np.log(pi) - gradient / (2 * temperature))
        optima.append(pi)
    return np.stack([w / w.sum() for w in weights]), np.stack(optima)


@identity(
    "F1.step",
    "At the median temperature FLOW takes steps of 0.43 of the nominal size, and counts as 0.58 of the samples.",
    R"\mathbb E\,w = (1+2/0.4549)^{-1/2} = 0.43,\quad (\mathbb E\,w)^2/\mathbb E\,w^2 = 0.58",
    parameters={"noise_std": NOISE_STD.within(0.1, 10.0)},
    tolerance=2e-3,
)
def f1_step(normal: Normal, noise_std: float) -> Sides:
    """Weights of residuals at the quantiles of a normal, as the library makes them; integrals over its density."""
    losses = (noise_std * scipy.stats.norm.ppf((np.arange(4000) + 0.5) / 4000)) ** 2
    weights = flow_weights(losses)
    predicted = [float(flow.mean_weight(noise_std**2)), float(effective_step(weights))]
    predicted.append(float(effective_sample_size(weights)) / losses.size)
    r, temperature = np.linspace(0, 12, 4001), scipy.stats.norm.ppf(0.75) ** 2
    once, twice = (2 * np.trapezoid(np.exp(-k * r**2 / temperature) * scipy.stats.norm.pdf(r), r) for k in (1, 2))
    return np.array(predicted), np.array([once, once, once**2 / twice])


@identity(
    "F1.scale",
    "How the weights are normalised changes the step of descent by their mean and nothing else.",
    R"\theta_k(\eta, w) = \theta_k(\eta\bar w, w/\bar w)",
    parameters={
        "temperature": TEMPERATURE.within(0.2, 5.0),
        "steps": Parameter(low=1, high=20, scale="whole"),
        "speed": Parameter("η times the largest eigenvalue", 1.0, 0.1, 1.9, highest=2.5),
    },
    tolerance=1e-9,
)
def f1_scale(normal: Normal, temperature: float, steps: int, speed: float) -> Sides:
    """Weights as they are, of mean one, and times n, at steps that make up for it; the iteration written out."""
    X, y, theta_1 = normal(10, 6), normal(10), normal(6)
    losses = (y - X @ theta_1) ** 2
    plain = np.exp(-losses / temperature)
    step_size = speed * len(X) / np.linalg.norm(np.sqrt(plain)[:, None] * X, 2) ** 2
    predicted = []
    for normalisation in get_args(Normalisation):
        weights = flow_weights(losses, temperature, normalisation=normalisation)
        scaled = float(step_size * plain.mean() / effective_step(weights))
        options: dict[str, Any] = {"step_size": scaled, "steps": steps, "sample_weights": weights}
        predicted.append(gradient_descent(X, y, theta_1, **options))
    theta = theta_1
    for _ in range(steps):
        theta = theta + step_size / len(X) * X.T @ (plain * (y - X @ theta))
    return np.stack(predicted), np.stack([theta] * 3)


@identity(
    "F1.mask",
    "Tokens outside the mask, NaN or not, count for nothing: weights are those of the others alone.",
    R"w_i = e^{-\ell_i/T}\ (\text{count}),\ w_i/\bar w\ (\text{mean}),\ n\,w_i\ (\text{none})",
    parameters={"temperature": TEMPERATURE.within(0.2, 5.0), "masked": Parameter(low=2, high=5, scale="whole")},
    tolerance=1e-12,
)
def f1_mask(normal: Normal, temperature: float, masked: int) -> Sides:
    """At the temperature and at the median, in each normalisation; step and sample size."""
    losses, mask = normal(3, 4) ** 2, np.arange(12).reshape(3, 4) >= masked
    kept, missing = losses[mask], np.where(mask, losses, 100.0)
    missing[0, 0] = np.nan
    predicted: list[Any] = []
    measured: list[Any] = []
    for given, used in ((temperature, temperature), (None, np.median(kept))):
        plain = np.exp(-kept / used)
        for normalisation, factor in (("count", 1), ("mean", mask.sum() / plain.sum()), ("none", mask.sum())):
            weights = flow_weights(missing, given, mask, normalisation=normalisation)  # type: ignore[arg-type]
            predicted += [np.ravel(weights), [effective_step(weights, mask), effective_sample_size(weights, mask)]]
            expected, size = factor * plain, plain.sum() ** 2 / np.sum(plain**2)
            measured += [np.zeros(masked), expected, [expected.sum() / mask.sum(), size]]
    return _flat(predicted), _flat(measured)


Sampled = tuple[tuple[np.ndarray, np.ndarray, float, float], np.ndarray, np.ndarray, np.ndarray]


def _sampled(
    normal: Normal, *, decay: float, noise_std: float, warmth: float, tail: float, noise_tail: float
) -> Sampled:
    """Σ, Δ with ΔᵀΣΔ = 1, σ and T; raw samples of features and residuals of the pretrained weights; their weights."""

    def root_size(spread: float) -> np.ndarray:
        """√S, log S ~ N(−spread²/2, spread²), so that E S = 1."""
        return np.exp((spread * normal(REPLICATES) - spread**2 / 2) / 2)

    covariance, shift = dense_covariance(normal(P, P), decay), normal(P)
    shift = shift / np.sqrt(shift @ covariance @ shift)
    x = root_size(tail)[:, None] * normal(REPLICATES, P) @ scipy.linalg.cholesky(covariance)
    r = x @ shift + root_size(noise_tail) * normal(REPLICATES) * noise_std
    temperature = warmth * flow.MEDIAN * (1 + noise_std**2)
    return (covariance, shift, noise_std, temperature), x, r, np.asarray(flow_weights(r**2, temperature))


def _moments_by_quadrature(
    covariance: np.ndarray, shift: np.ndarray, noise_std: float, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E w, E w xxᵀ and E w x r: x given r is Gaussian, which leaves integrals over r, by the trapezoidal rule."""
    a, variance = covariance @ shift, shift @ covariance @ shift + noise_std**2
    width = 1 / np.sqrt(1 / variance + 2 / temperature)
    r = np.linspace(-12, 12, 4001) * width
    density = np.exp(-(r**2) / temperature - r**2 / (2 * variance)) / np.sqrt(2 * np.pi * variance) * (r[1] - r[0])
    mass, square = density.sum(), density @ r**2
    along = np.outer(a, a) / variance
    return mass, mass * (covariance - along) + square / variance * along, square / variance * a


@statistical(
    "F2",
    "Weighting Gaussian data deflates its covariance along one direction, ΣΔ.",
    R"\Sigma_w = Z\bigl(\Sigma - \tfrac{2}{T+2v}\Sigma\Delta\Delta^\top\Sigma\bigr),\ "
    R"\mathbb E\,wxr = \tfrac{Z\,\Sigma\Delta}{1+2v/T}",
    source="paper 2502.02797 (setting); ours (general)",
    parameters=DATA | HEAVY,
)
def f2(normal: Normal, **values: Any) -> Sides:
    """E w, E w xxᵀ and E w x r in one vector."""
    data, x, r, w = _sampled(normal, **values)
    mean = flow.mean_weight(flow.residual_variance(*data[:3]), data[3])
    weighted = flow.weighted_covariance(*data)
    predicted = np.concatenate([np.ravel(mean), np.ravel(weighted), weighted.moment])
    outer = np.einsum("n,np,nq->npq", w, x, x).reshape(len(w), -1)
    return predicted, np.concatenate([w[:, None], outer, (w * r)[:, None] * x], axis=1)


@statistical(
    "F2.median",
    "The median of Gaussian squared residuals is 0.4549 of their variance.",
    R"T/v = \mathrm{median}\,\chi^2_1 = 0.4549",
    source="paper 2502.02797 (T); ours (constant)",
    parameters=DATA | HEAVY | {"warmth": DATA["warmth"].within(1.0)},
)
def f2_median(normal: Normal, **values: Any) -> Sides:
    data, _, r, _ = _sampled(normal, **values)
    return 0.5, (r**2 <= float(flow.median_temperature(flow.residual_variance(*data[:3])))).astype(float)


def _gaussian(normal: Normal, decay: float, noise_std: float, warmth: float) -> tuple[Any, Any, float, float]:
    """Σ, Δ, σ (in units of √(ΔᵀΣΔ)) and T (in units of the median of r²)."""
    covariance, shift = dense_covariance(normal(P, P), decay), normal(P)
    signal = shift @ covariance @ shift
    return covariance, shift, noise_std * signal**0.5, warmth * flow.MEDIAN * signal * (1 + noise_std**2)


@identity(
    "F2.exact",
    "The moments under the weights, in whatever way the library gives them, are the integrals that they stand for.",
    R"\Sigma_w = \int e^{-r^2/T}\,\mathbb E[xx^\top\mid r]\,p(r)\,dr",
    parameters=DATA,
    tolerance=1e-9,
)
def f2_exact(normal: Normal, **values: float) -> Sides:
    """Z; Σ_w as a matrix, applied, its diagonal, between rows, as the covariance of coloured noise; E w x r."""
    data, rows = _gaussian(normal, **values), normal(3, P)
    weighted, (mass, matrix, first) = flow.weighted_covariance(*data), _moments_by_quadrature(*data)
    coloured = np.asarray(weighted.colour(np.eye(P)))  # type: ignore[arg-type]
    mean = flow.mean_weight(flow.residual_variance(*data[:3]), data[3])
    ways = [weighted.matrix, weighted.apply(rows), weighted.diagonal(), weighted.gram(rows), coloured.T @ coloured]  # type: ignore[arg-type]
    same = [matrix, rows @ matrix, np.diag(matrix), rows @ matrix @ rows.T, matrix]
    predicted = [mean / mass, weighted.scale / mass, weighted.moment / np.abs(first).max()]
    measured = [1.0, 1.0, first / np.abs(first).max()]
    for one, other in zip(ways, same, strict=True):
        predicted.append(np.asarray(one) / np.abs(other).max())
        measured.append(other / np.abs(other).max())
    return _flat(predicted), _flat(measured)


def _flat(parts: list[Any]) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(part, float)) for part in parts])


@identity(
    "F2.constants",
    "At the median of r² all variances are damped by the same factor, 5.396, whatever v.",
    R"T = \Phi^{-1}(\tfrac34)^2\,v,\quad 1 + 2v/T = 5.396",
    source="paper 2502.02797 (T); ours (constants)",
    parameters={"variance": Parameter(low=0.01, high=100.0, scale="log")},
    tolerance=1e-9,
)
def f2_constants(normal: Normal, variance: float) -> Sides:
    """T/v, d, Z by default, and the rate of a stall without noise by default."""
    temperature = flow.median_temperature(variance)
    stalled = flow.stall([1.0], [variance**0.5], 0.0)
    predicted = [temperature / variance, flow.damping(variance, temperature), flow.mean_weight(variance), stalled.rate]
    median = scipy.stats.chi2(1).median()
    return np.array(predicted), np.array([median, *(1 + 2 / median) ** np.array([-1, -0.5, -1])])


def _measured_speeds(sampled: Sampled) -> np.ndarray:
    """In whitened coordinates: along b̂ = Σ^{1/2}Δ (of length 1), across it, their coupling, and the pull along b̂."""
    (covariance, shift, *_), x, r, w = sampled
    root = scipy.linalg.cholesky(covariance)
    z = scipy.linalg.solve_triangular(root, x.T, trans="T").T
    along = root @ shift
    across = np.linalg.qr(np.stack([along, np.eye(P)[0]], axis=1))[0][:, 1]
    a, c = z @ along, z @ across
    return np.stack([w * a**2, w * c**2, w * a * c, w * a * r], axis=1)


@statistical(
    "F3",
    "In whitened coordinates FLOW slows learning along Σ^{1/2}Δ, and all else alike.",
    R"\mathrm{rate} = \frac{1+2\sigma^2/T}{1+2v/T},\quad \mathrm{drive} = \frac{1}{1+2v/T}",
    source="paper 2502.02797 (stalls); ours (form)",
    parameters=DATA | HEAVY,
)
def f3(normal: Normal, **values: Any) -> Sides:
    sampled = _sampled(normal, **values)
    stalled = flow.stall(*sampled[0])
    predicted = stalled.mean_weight * np.array([stalled.rate, 1.0, 0.0, stalled.drive])
    return predicted, _measured_speeds(sampled)


@identity(
    "F3.exact",
    "Speed, drive, rate and direction of the stall are the integrals that they stand for.",
    R"\mathrm{rate} = \hat b^\top\Sigma^{-1/2}\Sigma_w\Sigma^{-1/2}\hat b/Z,\ \hat b\propto\Sigma^{1/2}\Delta",
    source="paper 2502.02797 (stalls); ours (form)",
    parameters=DATA,
    tolerance=1e-9,
)
def f3_exact(normal: Normal, **values: float) -> Sides:
    """ΔᵀΣ_wΔ, ΔᵀE w x r and any vᵀΣ_wv with vᵀΣΔ = 0, relative to the same without weights."""
    data = covariance, shift, *_ = _gaussian(normal, **values)
    stalled, (mass, matrix, first) = flow.stall(*data), _moments_by_quadrature(*data)
    signal, across = shift @ covariance @ shift, normal(P)
    across = across - shift * (across @ covariance @ shift) / signal
    speed = across @ matrix @ across / (across @ covariance @ across)
    rate, drive = shift @ matrix @ shift / signal / speed, shift @ first / signal / speed
    predicted = [stalled.mean_weight, stalled.mean_weight, stalled.rate, stalled.drive]
    direction = np.asarray(stalled.direction) * signal**0.5
    return np.array([*predicted, *direction]), np.array([mass, speed, rate, drive, *shift])


@identity(
    "F3.tails.exact",
    "The stall of heavy-tailed features is the average of Gaussian ones over their sizes.",
    R"\Sigma_w = \mathbb E_S[\Sigma_w(S\Sigma)]",
    parameters=DATA | {"tail": GAUSSIAN._replace(low=0.1, high=1.0, highest=None)},
    tolerance=1e-6,
)
def f3_tails_exact(normal: Normal, decay: float, noise_std: float, warmth: float, tail: float) -> Sides:
    """Speed, rate and drive in the plane of Δ and a direction across; lognormal sizes by the trapezoidal rule."""
    temperature, z = warmth * flow.MEDIAN * (1 + noise_std**2), np.linspace(-8, 8, 321)
    heavy = flow.heavy_tailed_stall(1.0, noise_std, temperature, *flow.lognormal_sizes(tail))
    drive = heavy.rate * flow.fixed_point_coefficient(noise_std, temperature)
    sizes, masses = np.exp(tail * z - tail**2 / 2), scipy.stats.norm.pdf(z) * (z[1] - z[0])
    parts = [_moments_by_quadrature(size * np.eye(2), np.eye(2)[0], noise_std, temperature) for size in sizes]
    matrix, first = (sum(mass * m[at] for mass, m in zip(masses, parts, strict=True)) for at in (1, 2))
    speed = matrix[1, 1]
    measured = np.array([speed, matrix[0, 0] / speed, first[0] / speed])
    return np.array([heavy.speed, heavy.rate, drive]) / measured, np.ones(3)


@statistical(
    "F3.tails",
    "For heavy-tailed features FLOW still slows Δ alone, at another rate.",
    R"\mathrm{rate} = (1+2\sigma^2/T)\,\mathbb E[SZ_S^3]/\mathbb E[SZ_S],\ x = \sqrt S z",
    parameters=DATA | TAILS,
)
def f3_tails(normal: Normal, **values: Any) -> Sides:
    sampled = _sampled(normal, **values)
    noise = sampled[0][2:]
    heavy = flow.heavy_tailed_stall(1.0, *noise, *flow.lognormal_sizes(values["tail"]))
    predicted = heavy.speed * np.array([heavy.rate, 1.0, 0.0, heavy.rate * flow.fixed_point_coefficient(*noise)])
    return predicted, _measured_speeds(sampled)


def _population(
    normal: Normal, decay: float, noise_std: float, warmth: float
) -> tuple[TwoTaskProblem, float, np.ndarray, np.ndarray]:
    """A problem with u ≠ 0, a temperature, and Σ_w and E w x r by quadrature."""
    covariance, pretrain = dense_covariance(normal(P, P), decay), dense_covariance(normal(P, P), 0.5)
    shift, u = normal(P), normal(P) / 4
    gap = shift - u
    signal = gap @ covariance @ gap
    noise_std = noise_std * signal**0.5
    temperature = warmth * flow.MEDIAN * (signal + noise_std**2)
    problem = TwoTaskProblem(pretrain, covariance, FixedShift(shift), noise_std, u)
    return problem, temperature, *_moments_by_quadrature(covariance, gap, noise_std, temperature)[1:]


@identity(
    "F3.path",
    "Descent, flow and ridge under FLOW's weights follow from the spectrum of Σ alone.",
    R"\theta_k = \theta_1 + \tau[I-(I-\eta\Sigma_w)^k]\Delta",
    source="paper 2502.02797 (setting); ours (general)",
    parameters=DATA
    | {
        "speed": Parameter("η times the largest eigenvalue of Σ_w", 1.0, 0.1, 1.9, highest=2.5),
        "steps": Parameter("steps of descent", 1, 1, 60, "whole"),
        "penalty": PENALTY.within(1e-3, 1e3),
    },
    tolerance=1e-7,
)
def f3_path(normal: Normal, *, speed: float, steps: int, penalty: float, **values: Any) -> Sides:
    """θ − θ₁, both risks and their sum, one fine-tuner averaged; by iteration, matrix exponential, linear systems."""
    problem, temperature, matrix, first = _population(normal, **values)
    step_size, penalty = speed / np.linalg.eigvalsh(matrix)[-1], penalty * np.trace(matrix) / P
    filters = [GradientDescent(step_size, steps), GradientFlow(step_size * steps), 0.7 * Ridge(penalty), MinNorm()]
    paths = [flow.trajectory(problem, filter, temperature) for filter in filters]
    predicted = np.stack(
        [np.concatenate([path.moved, np.array([path.finetune, path.pretrain, path.total])]) for path in paths]
    )
    descent = np.zeros(P)
    for _ in range(steps):
        descent = descent + step_size * (first - matrix @ descent)
    end = np.linalg.solve(matrix, first)
    flowed = end - scipy.linalg.expm(-step_size * steps * matrix) @ end
    ridge = 0.7 * np.linalg.solve(matrix + penalty * np.eye(P), first)
    m = moments(problem)
    measured = [[*moved, *_pair(m, moved), _pair(m, moved).sum()] for moved in (descent, flowed, ridge, end)]
    return predicted, np.array(measured)


@statistical(
    "F4",
    "With label noise FLOW ends on the way from θ₁ to θ₂*, whatever the law of the features.",
    R"\theta_\infty = \theta_1 + \Delta/(1+2\sigma^2/T)",
    parameters=DATA | TAILS,
)
def f4(normal: Normal, **values: Any) -> Sides:
    """The normal equations, E w x (τ xᵀΔ) = E w x r."""
    (_, shift, noise_std, temperature), x, r, w = _sampled(normal, **values)
    tau = float(flow.fixed_point_coefficient(noise_std, temperature))
    return (w * (tau * x @ shift))[:, None] * x, (w * r)[:, None] * x


@identity(
    "F4.exact",
    "Given the features, Gaussian noise under the weights leaves the mean residual at τ xᵀΔ.",
    R"\mathbb E[w r\mid x] = \tau\,x^\top\Delta\,\mathbb E[w\mid x],\quad \tau = 1/(1+2\sigma^2/T)",
    parameters={"noise_std": DATA["noise_std"].within(0.1, 10.0**0.5), "temperature": TEMPERATURE.within(0.1, 10.0)},
    tolerance=1e-9,
)
def f4_exact(normal: Normal, noise_std: float, temperature: float) -> Sides:
    """At a few xᵀΔ, by the trapezoidal rule over the noise."""
    signal = normal(5)[:, None]
    noise = noise_std * np.linspace(-12, 12, 4001)
    weight = np.exp(-(((signal + noise) ** 2) - np.min((signal + noise) ** 2, axis=1, keepdims=True)) / temperature)
    weight = weight * np.exp(-((noise / noise_std) ** 2) / 2)
    mean = np.sum(weight * (signal + noise), axis=1) / np.sum(weight, axis=1)
    return float(flow.fixed_point_coefficient(noise_std, temperature)) * signal[:, 0], mean


@identity(
    "F4.ridge",
    "FLOW with ridge is averaged ridge: of penalty λ/Z, its τ set by what ridge leaves unexplained.",
    R"\theta_\lambda - \theta_1 = \frac{(\Sigma+\lambda/Z)^{-1}\Sigma\Delta}{1+2v_\lambda/T},\ "
    R"v_\lambda = \sigma^2 + \Delta^\top\Sigma\tfrac{\lambda}{Z}(\Sigma+\tfrac{\lambda}{Z})^{-1}\Delta",
    parameters=DATA | {"penalty": PENALTY.within(1e-3, 1e3)},
    tolerance=1e-9,
)
def f4_ridge(normal: Normal, *, penalty: float, **values: Any) -> Sides:
    problem, temperature, matrix, first = _population(normal, **values)
    penalty = penalty * np.trace(matrix) / P
    noise_variance, gap = float(problem.noise_std) ** 2, np.asarray(problem.gap_mean)
    covariance = matrix_of(problem.finetune_covariance)
    scale = float(flow.mean_weight(gap @ covariance @ gap + noise_variance, temperature))
    ridge = np.linalg.solve(covariance + penalty / scale * np.eye(P), covariance @ gap)
    unexplained = noise_variance + gap @ covariance @ (gap - ridge)
    return ridge / (1 + 2 * unexplained / temperature), np.linalg.solve(matrix + penalty * np.eye(P), first)


OPTIMA = {
    "decay": DECAY.within(0.0, 1.5),
    "noise_std": DATA["noise_std"].within(0.1, 2.0),
    "weight": WEIGHT.within(0.1, 10.0),
}


def _pair(m: Moments, moved: np.ndarray) -> np.ndarray:
    """R_ft and R_pre of θ₁ + moved (P,)."""
    missed, forgotten = moved - m.mean, moved + m.u
    return np.array([missed @ m.finetune @ missed, forgotten @ m.pretrain @ forgotten])


def _moved(m: Moments, method: str, regularization: float, temperature: float) -> np.ndarray:
    """θ − θ₁ (P,) of a method at λ or t and T, before averaging; of averaging alone Δ."""
    if method == "averaging":
        return m.mean
    _, matrix, first = _moments_by_quadrature(m.finetune, m.mean, m.noise_std, temperature)
    s, V = np.linalg.eigh(matrix)
    g = 1 / (s + regularization) if "ridge" in method else -np.expm1(-regularization * s) / s
    return V @ (g * (V.T @ first))


def _least(m: Moments, weight: float, method: str) -> float:
    """The least R_ft + κR_pre over t or λ, T for FLOW and τ for averages: the best of a grid, refined."""
    scale, variance = np.trace(m.finetune), m.mean @ m.finetune @ m.mean + m.noise_std**2

    def total(at: np.ndarray) -> float:
        temperature = variance * np.exp(at[1]) if "flow" in method else np.inf
        moved = _moved(m, method, np.exp(at[0]) * (scale if "ridge" in method else 1 / scale), temperature)
        moved = moved / np.linalg.norm(moved) if "averaging" in method else moved  # τ takes any length
        c, b, a = parabola(lambda tau: float(np.array([1, weight]) @ _pair(m, tau * moved)))
        return c - b**2 / a if "averaging" in method else c - 2 * b + a

    temperatures = np.linspace(-6, 8, 8) if "flow" in method else [0.0]
    start = min((np.array([x, t]) for x in np.linspace(-10, 10, 16) for t in temperatures), key=total)
    simplex = start + np.array([[0, 0], [1, 0], [0, 1]])
    settings = {"xatol": 1e-4, "fatol": 1e-9, "maxfev": 300, "initial_simplex": simplex}
    return float(scipy.optimize.minimize(total, start, method="Nelder-Mead", options=settings).fun)


@identity(
    "F3.optima",
    "The best of every method is reached by the hyperparameters that come with it, with both risks as they are.",
    R"R_\mathrm{ft} + \kappa R_\mathrm{pre}\ \text{at}\ (\lambda\,\text{or}\,t,\,T,\,\tau)",
    parameters=OPTIMA,
    tolerance=1e-6,
)
def f3_optima(normal: Normal, weight: float, **values: float) -> Sides:
    """Totals and risks relative to those by matrices; the lower bound, which has no hyperparameters, by its system."""
    problem, *_ = _population(normal, warmth=1.0, **values)
    m, found = moments(problem), flow.population_optima(problem, weight)
    learned = np.linalg.solve(weight * m.pretrain + m.finetune, m.finetune @ (m.mean + m.u)) - m.u
    predicted, measured = [], []
    for method, best in found.items():
        moved = learned
        if method != "lower bound":
            temperature = float(best.temperature) if "flow" in method else np.inf
            moved = _moved(m, method, float(best.regularization), temperature)
        risks = _pair(m, moved * (float(best.tau) if "averaging" in method else 1))
        predicted += [best.total, *best.risks]
        measured += [risks @ [1, weight], *risks]
    return np.array(predicted) / measured, np.ones(len(measured))


@inequality(
    "F3.least",
    "No other time, penalty, temperature or τ is better than the one that is found.",
    R"\min_{\lambda\,\text{or}\,t,\,T,\,\tau}\ R_\mathrm{ft} + \kappa R_\mathrm{pre}",
    parameters=OPTIMA,
    tolerance=1e-4,
)
def f3_least(normal: Normal, weight: float, **values: float) -> Sides:
    """By how much another search ends above, relative, for every method."""
    problem, *_ = _population(normal, warmth=1.0, **values)
    m, found = moments(problem), flow.population_optima(problem, weight)
    del found["lower bound"]
    return 0.0, np.array([_least(m, weight, method) / float(best.total) - 1 for method, best in found.items()])


@inequality(
    "F3.ridge",
    "FLOW with ridge never beats the best average of ridge: it is one of them.",
    R"\min_{\lambda,T} R(\mathrm{FLOW+ridge}) \ge \min_{\lambda,\tau} R(\mathrm{ridge+averaging})",
    parameters=OPTIMA,
    tolerance=1e-6,
)
def f3_ridge(normal: Normal, weight: float, **values: float) -> Sides:
    """By how much, relative: FLOW with ridge by a search, averages of ridge as the library finds them."""
    problem, *_ = _population(normal, warmth=1.0, **values)
    averaged = float(flow.population_optima(problem, weight)["ridge + averaging"].total)
    return 0.0, _least(moments(problem), weight, "flow + ridge") / averaged - 1


@identity(
    "F5",
    "Where the model interpolates, weights do not move the limit of training, however small.",
    R"n \le p,\ w > 0 \implies \hat\theta_w = \theta_1 + X^+(y-X\theta_1)",
    parameters={
        "surplus": Parameter("samples beyond features, n = 24 + 8·surplus", -1, -2, -1, "whole", highest=1),
        "noise_std": NOISE_STD.within(0.1, 10.0**0.5),
        "warmth": DATA["warmth"].within(0.1, 30.0, lowest=1e-3),
        "tau": TAU.within(-0.5, 1.5),
    },
    tolerance=1e-9,
)
def f5(normal: Normal, surplus: int, noise_std: float, warmth: float, tau: float) -> Sides:
    p = 24
    n = p + 8 * surplus
    X, theta_1 = normal(n, p), normal(p)
    y = X @ normal(p) + noise_std * normal(n)
    losses = (y - X @ theta_1) ** 2
    weights = flow_weights(losses, warmth * np.median(losses))
    step = tau * np.linalg.pinv(X) @ (y - X @ theta_1)
    return theta_1 + step, np.asarray(fine_tune(X, y, theta_1, tau * MinNorm(), weights))


@identity(
    "F5.weighted",
    "Elsewhere weighted fine-tuning is fine-tuning on W^{1/2}X and W^{1/2}y.",
    R"\hat\theta_w = \theta_1 + R(W^{1/2}X)\,W^{1/2}(y-X\theta_1)",
    parameters={
        "size": Parameter(low=0, high=2, scale="whole"),
        "depth": Parameter("largest loss over T: the smallest weight is e^{−depth}", 1.0, 1.0, 12.0, highest=60.0),
        "penalty": PENALTY.within(1e-2, 10.0),
        "time": TIME.within(0.1, 100.0),
        "speed": Parameter(low=0.1, high=1.9),
        "steps": Parameter(low=1, high=30, scale="whole"),
    },
    tolerance=1e-7,
)
def f5_weighted(
    normal: Normal, size: int, depth: float, penalty: float, time: float, speed: float, steps: int
) -> Sides:
    """Ridge, flow and descent, n below and above p; min-norm for n above p or repeated rows; ridge without weights."""
    n, p = ((10, 16), (10, 16), (25, 10))[size]
    X, y, theta_1 = normal(n, p), normal(n), normal(p)
    X = np.concatenate([X[:-2], X[:2]]) if size == 1 else X  # contradictory labels: their weighted mean counts
    losses = (y - X @ theta_1) ** 2
    weights = np.asarray(flow_weights(losses, losses.max() / depth))
    rows, residual = np.sqrt(weights)[:, None] * X, np.sqrt(weights) * (y - X @ theta_1)
    step_size = float(speed * n / np.linalg.norm(rows, 2) ** 2)
    filters: list[Any] = [Ridge(penalty), GradientFlow(time), GradientDescent(step_size, steps)]
    maps = [ridge_map(rows, penalty), flow_map(rows, time), descent_map(rows, step_size, steps)]
    if size > 0:
        filters, maps = [*filters, MinNorm()], [*maps, np.linalg.pinv(rows, rcond=1e-12)]
    fitted = [np.asarray(fine_tune(X, y, theta_1, filter, weights)) for filter in filters]
    plain = theta_1 + ridge_map(X, penalty) @ (y - X @ theta_1)
    expected = np.stack([*(theta_1 + np.stack(maps) @ residual), plain])
    return expected, np.stack([*fitted, np.asarray(fine_tune(X, y, theta_1, Ridge(penalty)))])


STEPS = np.array([0, 1, 2, 3, 7, 20, 60])
THEOREM = {
    "rho": Parameter("correlation ρ in Σ₂", 0.5, 0.0, 0.95, highest=0.999),
    "beta": Parameter("β of the temperature", 0.5, 1e-2, 1.0, "log", lowest=1e-4),
    "p": Parameter("features", 2, 2, 5, "whole"),
    "distance": Parameter("‖e‖", 1.0, 0.3, 3.0, "log"),
    "noise_std": NOISE_STD.within(0.0, highest=1.0)._replace(scale="linear"),
    "step_ratio": Parameter("step size over that of the theorem", 1.0, 1.0, 1.0, lowest=0.5, highest=1.5),
}


def _theorem(
    normal: Normal, rho: float, beta: float, p: int, distance: float, noise_std: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """The setting of Theorem 7.2 in R^p: a random frame (p, p) that begins with ē and ē⊥; Σ̃, Σ_w, E w x r and μ."""
    frame = np.linalg.qr(normal(p, p))[0].T
    covariance = np.eye(p) + rho * (np.outer(frame[0], frame[1]) + np.outer(frame[1], frame[0]))
    temperature = float(flow.temperature_from_beta(beta, rho, distance))
    _, *weighted = _moments_by_quadrature(covariance, -distance * frame[0], noise_std, temperature)
    return frame, covariance, *weighted, (temperature / (temperature + 2 * distance**2)) ** 0.5


def _descent(matrix: np.ndarray, first: np.ndarray, step_size: float) -> np.ndarray:
    """θ_K − θ₁ of gradient descent on the loss without ½, at every K of STEPS."""
    moved, path = np.zeros(len(first)), []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            path.append(moved)
        moved = moved + 2 * step_size * (first - matrix @ moved)
    return np.array(path)


@identity(
    "F6",
    "Theorem 7.2: the iterates of FLOW in the paper's two-task setting.",
    R"\theta_K = \theta_2^* + \tfrac{\lambda_1^K+\lambda_2^K\beta^2\rho^2}{1+\beta^2\rho^2}e "
    R"- \beta\rho\tfrac{\lambda_1^K-\lambda_2^K}{1+\beta^2\rho^2}\|e\|\bar e_\perp",
    source="paper 2502.02797, Theorem 7.2",
    parameters=THEOREM,
    tolerance=1e-10,
)
def f6(normal: Normal, *, step_ratio: float, **values: Any) -> Sides:
    """θ_K − θ₂* in units of ‖e‖."""
    frame, _, matrix, first, mu = _theorem(normal, **values)
    predicted = np.asarray(flow.flow_iterates(values["rho"], values["beta"], STEPS)) @ frame[:2]
    return predicted, _descent(matrix, first, step_ratio / (2 * mu)) / values["distance"] + frame[0]


@identity(
    "F6.vanilla",
    "Without weights, at η = ½, the error alternates between e and −‖e‖ē⊥ and shrinks by ρ.",
    R"\theta_K = \theta_2^* + \rho^K e\ (K\ \text{even}),\ \theta_2^* - \rho^K\|e\|\bar e_\perp\ "
    R"(K\ \text{odd})",
    source="paper 2502.02797, Remark 7.3",
    parameters=THEOREM | {"noise_std": THEOREM["noise_std"].within(0.0)},
    tolerance=1e-10,
)
def f6_unweighted(normal: Normal, *, step_ratio: float, **values: Any) -> Sides:
    frame, covariance, *_ = _theorem(normal, **values)
    distance = values["distance"]
    path = _descent(covariance, covariance @ (-distance * frame[0]), step_ratio / 2)
    return np.asarray(flow.unweighted_iterates(values["rho"], STEPS)) @ frame[:2], path / distance + frame[0]


@identity(
    "F6.stalled",
    "FLOW is stalled along e − βρ‖e‖ē⊥, the top eigenvector of its iteration.",
    R"Q(e-\beta\rho\|e\|\bar e_\perp) = \tfrac{1+\beta\rho^2}{1+\beta}(e-\beta\rho\|e\|\bar e_\perp)",
    source="paper 2502.02797, Remark 7.4",
    parameters=THEOREM,
    tolerance=1e-10,
)
def f6_stalled(normal: Normal, *, step_ratio: float, rho: float, beta: float, **values: Any) -> Sides:
    """λ₁ times the stalled direction, and one step from it."""
    frame, _, matrix, _, mu = _theorem(normal, rho, beta, **values)
    direction = np.asarray(flow.stalled_direction(rho, beta)) @ frame[:2]
    return (1 + beta * rho**2) / (1 + beta) * direction, direction - step_ratio / mu * (matrix @ direction)


TWO_TASKS = {
    "rho": Parameter("correlation ρ in Σ₂", 0.5, 0.1, 0.95, lowest=0.0),
    "strength": Parameter("s − 1 = ēᵀΣ₁ē − 1", 1.0, 0.2, 20.0, "log", highest=1e3),
    "coupling": Parameter("c/(ρs), c = ēᵀΣ₁ē⊥", 0.0, -2.0, 0.9, lowest=-10.0, highest=2.0),
    "spare": Parameter("ē⊥ᵀΣ₁ē⊥ − 1 over the least that goes with s and c", 1.0, 1.0, 4.0, highest=100.0),
}
ANY_COUPLING = TWO_TASKS | {"coupling": TWO_TASKS["coupling"].within(-2.0, 2.0, lowest=-10.0, highest=10.0)}
LONG = np.unique(np.round(np.append(np.arange(1.0, 33), np.geomspace(33, 1e6, 96))))


def _block(rho: float, strength: float, coupling: float, spare: float) -> np.ndarray:
    """Σ₁ ⪰ I on ē and ē⊥."""
    s = 1 + strength
    c = coupling * rho * s
    return np.array([[s, c], [c, 1 + spare * c**2 / strength]])


def _least_total(rho: float, block: np.ndarray) -> float:
    """The least err_tot of FLOW over β and many K, by a grid and then smaller ones around its best."""
    low, high = np.full(LONG.size, np.log(1e-6)), np.zeros(LONG.size)
    for _ in range(6):
        grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 65)
        values = np.asarray(sum(flow.errors(flow.flow_iterates(rho, np.exp(grid), LONG[:, None]), rho, block)))
        at, spacing = values.argmin(axis=1), (high - low) / 64
        middle = grid[np.arange(LONG.size), at]
        low, high = np.maximum(middle - spacing, np.log(1e-6)), np.minimum(middle + spacing, 0)
    return float(values.min())


def _least_average(block: np.ndarray) -> float:
    """The least err_tot of averages, by a grid and the parabola through its best three."""
    omega, s = np.linspace(0, 1, 1001), block[0, 0]
    values = s * (1 - omega) ** 2 + omega**2
    at = np.clip(values.argmin(), 1, 999)
    before, least, after = values[at - 1 : at + 2]
    return float(least - (after - before) ** 2 / (8 * (after - 2 * least + before)))


@identity(
    "F6.averaging",
    "The best average of both models has total error s/(s+1), s = ēᵀΣ₁ē.",
    R"\min_\omega \mathrm{err}_\mathrm{tot}(\theta_2^*+\omega e) = \tfrac{s}{s+1}\|e\|^2",
    source="paper 2502.02797, §7",
    parameters=TWO_TASKS,
    tolerance=1e-9,
)
def f6_averaging(normal: Normal, **values: Any) -> Sides:
    block = _block(**values)
    return float(flow.best_averaging(block)), _least_average(block)


@inequality(
    "F6.remark",
    "The best FLOW, over T and K, is at least as good as the best averaging, its limit for β → 0.",
    R"\inf_{\beta,K}\mathrm{err}_\mathrm{tot} \le \min_\omega\mathrm{err}_\mathrm{tot}",
    source="paper 2502.02797, Remarks 7.5 and 7.6",
    parameters=ANY_COUPLING | {"rho": TWO_TASKS["rho"].within(0.0, 0.95)},
    tolerance=1e-3,
)
def f6_remark(normal: Normal, **values: Any) -> Sides:
    """What the best FLOW gains over the best averaging, relative."""
    block = _block(**values)
    return 0.0, 1 - _least_total(values["rho"], block) / _least_average(block)


@inequality(
    "F6.better",
    "The best FLOW is better than the best averaging if ρ > 0 and ēᵀΣ₁ē⊥ < ρ ēᵀΣ₁ē, and only then.",
    R"\inf_{\beta,K}\mathrm{err}_\mathrm{tot} < \min_\omega\mathrm{err}_\mathrm{tot} \iff "
    R"\bar e^\top\Sigma_1\bar e_\perp < \rho\,\bar e^\top\Sigma_1\bar e",
    parameters=ANY_COUPLING,
    tolerance=1e-9,
)
def f6_better(normal: Normal, **values: Any) -> Sides:
    """What FLOW gains by a search, its sign turned where no finite K is best; as reported; whether K is as stated."""
    block = _block(**values)
    best, average = flow.best_flow(values["rho"], block), _least_average(block)
    finite, gain = bool(np.isfinite(best.steps)), 1 - _least_total(values["rho"], block) / average
    stated = float(finite == (values["coupling"] < 1)) - 0.5
    return 0.0, np.array([gain if finite else -gain, 1 - float(best.total) / average, stated])


@identity(
    "F6.best",
    "The best FLOW, however many steps it takes, is the one that is found, and reached by its β and K.",
    R"\inf_{\beta,K}\mathrm{err}_\mathrm{tot}(\theta_K)",
    parameters=TWO_TASKS | {"coupling": TWO_TASKS["coupling"].within(-2.0, 0.99)},
    tolerance=1e-6,
)
def f6_best(normal: Normal, **values: Any) -> Sides:
    """Its total by another search, to a hundredth of what it gains or 0.1%; and after K steps of the matrix Q."""
    rho, block = values["rho"], _block(**values)
    best, searched = flow.best_flow(rho, block), _least_total(rho, block)
    allowed = max(1e-2 * (_least_average(block) - searched), 1e-3 * searched)
    _, matrix, _ = _moments_by_quadrature(*_setting(rho), 0.0, float(flow.temperature_from_beta(best.beta, rho)))
    Q = np.eye(2) - matrix * (1 + 2 / float(flow.temperature_from_beta(best.beta, rho))) ** 0.5
    position = np.linalg.matrix_power(Q, int(best.steps))[:, 0]
    reached = position @ _setting(rho)[0] @ position + (position - [1, 0]) @ block @ (position - [1, 0])
    return np.array([best.total, 1.0]), np.array([reached, float(abs(best.total - searched) < allowed)])


def _setting(rho: float) -> tuple[np.ndarray, np.ndarray]:
    """Σ̃ on ē and ē⊥, and Δ = −e."""
    return np.array([[1, rho], [rho, 1]]), np.array([-1.0, 0.0])


@identity(
    "F6.equal",
    "At ρ = 0 FLOW is averaging: their best total errors are equal.",
    R"\rho = 0 \implies \min_{\beta,K}\mathrm{err}_\mathrm{tot} = \tfrac{s}{s+1}\|e\|^2",
    source="paper 2502.02797, Remark 7.1",
    parameters=TWO_TASKS | {"rho": TWO_TASKS["rho"].within(0.0, highest=0.9)},
    tolerance=1e-6,
)
def f6_equal(normal: Normal, **values: Any) -> Sides:
    """At ρ = 0 also as `best_flow` has it."""
    block, averaging = _block(**values), float(flow.best_averaging(_block(**values)))
    found = flow.best_flow(0.0, block).total
    return np.array([averaging, averaging]), np.array([_least_total(values["rho"], block), found])


@identity(
    "F6.temperature",
    "β and the temperature determine each other.",
    R"T = 2\beta(1-\rho^2)\|e\|^2/(1-\beta^2\rho^2)",
    source="paper 2502.02797, Theorem 7.2",
    parameters={name: THEOREM[name] for name in ("rho", "beta", "distance")},
    tolerance=1e-9,
)
def f6_temperature(normal: Normal, rho: float, beta: float, distance: float) -> Sides:
    temperature = 2 * beta * (1 - rho**2) * distance**2 / (1 - (beta * rho) ** 2)
    found = flow.temperature_from_beta(beta, rho, distance), flow.beta_from_temperature(temperature, rho, distance)
    return np.array([found[0] / temperature, found[1] / beta]), np.ones(2)


@identity(
    "F6.errors",
    "Both errors of a position in the plane are the risks of its weights, in any number of features.",
    R"\mathrm{err}_1 = \|\theta-\theta_1^*\|^2_{\Sigma_1},\ \mathrm{err}_2 = \|\theta-\theta_2^*\|^2_{\tilde\Sigma}",
    source="paper 2502.02797, §7",
    parameters=TWO_TASKS | {"p": THEOREM["p"], "distance": THEOREM["distance"]},
    tolerance=1e-9,
)
def f6_errors(normal: Normal, *, p: int, distance: float, **values: float) -> Sides:
    """In the problem's own axes, by matrices and by the library's risks; θ₁* = 0."""
    rho, block = values["rho"], _block(**values)
    problem, (x, y) = flow.two_task_problem(rho, block, p=p, distance=distance), normal(2)
    sigma_1, sigma_2, e = np.eye(p), np.eye(p), distance * np.eye(p)[0]
    sigma_1[:2, :2], sigma_2[0, 1], sigma_2[1, 0] = block, rho, rho
    theta = (x - 1) * e + y * distance * np.eye(p)[1]
    expected = np.array([(theta + e) @ sigma_2 @ (theta + e), theta @ sigma_1 @ theta])
    found = np.array(flow.errors([x, y], rho, block)) * distance**2, excess_risks(theta, problem, 0 * e, -e)
    return np.stack(found) / expected, np.ones((2, 2))
