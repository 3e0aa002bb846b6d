"""§3 as claims: predictions without sampling, and how fast they become exact (docs, D1–D5)."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import Array

from linfit import (
    Filter,
    GradientFlow,
    MinNorm,
    Pair,
    RandomShift,
    Ridge,
    TwoTaskProblem,
    aligned_problem,
    risk_forms,
    spectra,
)
from sims.claims import Normal, claim
from sims.parameters import ALIGNMENT, DECAY, PENALTY, TIME, Parameter
from theory import rational
from theory.equivalents import degrees_of_freedom, effective_ranks, effective_regularization, risk

SIZES, REPLICATES = (40, 160), 24
LARGEST = 8 * SIZES[-1]
"""Population arrays are padded to one length, so that nothing is compiled twice."""

LAWS = (
    lambda latent: latent,
    np.sign,
    lambda latent: 12**0.5 * (scipy.stats.norm.cdf(latent) - 0.5),
)
"""Gaussian, Rademacher and uniform coordinates from standard normals."""


class Design(NamedTuple):
    """Designs of one size, and their population."""

    n: int
    X: np.ndarray
    """(replicates, n, p)."""
    eigenvalues: np.ndarray
    """s (p,)."""


def _padded(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return np.concatenate([values, np.zeros(LARGEST - values.size)])


def _design(normal: Normal, n: int, doublings: int, decay: float, law: int, row_correlation: float) -> Design:
    """p = 2^doublings · n; rows are independent unless `row_correlation`, that of consecutive ones, is not 0."""
    p = n * 2**doublings
    eigenvalues = np.asarray(spectra.power_law(p, decay))
    latent = LAWS[law](normal(REPLICATES, n, p))
    if row_correlation:
        lags = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        latent = np.linalg.cholesky(row_correlation**lags) @ latent
    return Design(n, latent * np.sqrt(eigenvalues), eigenvalues)


DESIGN_PARAMETERS = {
    "doublings": Parameter(low=1, high=2, scale="whole", lowest=0, highest=3),
    "decay": DECAY.within(0.0, 1.5, highest=3.0),
    "law": Parameter(low=0, high=2, scale="whole"),
    "row_correlation": Parameter(low=0.0, high=0.0, highest=0.9),
}

# D1 and D2 -----------------------------------------------------------------------------------------------------------


class Resolvents(NamedTuple):
    """Designs with two penalties, complex, and two weights that commute with Σ."""

    designs: list[Design]
    penalties: list[np.ndarray]
    """(2,) for each size."""
    weights: list[tuple[np.ndarray, np.ndarray]]
    """S and M (p,) for each size, of trace 1."""


RESOLVENT_PARAMETERS = DESIGN_PARAMETERS | {
    "penalty": PENALTY.within(0.1, 10.0, lowest=1e-6),  # in units of tr Σ/n
    "other_penalty": Parameter(low=0.1, high=10.0, scale="log"),
    "phase": Parameter(low=0.0, high=2.0, highest=3.14),
    "other_phase": Parameter(low=-2.0, high=2.0),
    "weight": Parameter(low=-1.0, high=1.0),
}


def _resolvents(
    normal: Normal,
    penalty: float,
    other_penalty: float,
    phase: float,
    other_phase: float,
    weight: float,
    **values: Any,
) -> Resolvents:
    designs = [_design(normal, n, **values) for n in SIZES]
    relative = np.array([penalty * np.exp(1j * phase), other_penalty * np.exp(1j * other_phase)])
    weights = []
    for design in designs:
        S = design.eigenvalues**weight
        weights.append((S / S.sum(), design.eigenvalues / design.eigenvalues.sum()))
    penalties = [relative * design.eigenvalues.sum() / design.n for design in designs]
    return Resolvents(designs, penalties, weights)


def _real(value: np.ndarray) -> np.ndarray:
    return np.stack([np.real(value), np.imag(value)], axis=-1)


def _kappas(data: Resolvents) -> list[np.ndarray]:
    return [
        np.asarray(effective_regularization(penalties, _padded(design.eigenvalues), design.n))
        for design, penalties in zip(data.designs, data.penalties)
    ]


def _one_point(data: Resolvents) -> list[np.ndarray]:
    """κ tr S(Σ+κ)⁻¹."""
    return [
        _real(kappa[0] * np.sum(S / (design.eigenvalues + kappa[0])))
        for design, kappa, (S, _) in zip(data.designs, _kappas(data), data.weights)
    ]


def _one_point_sampled(data: Resolvents) -> list[np.ndarray]:
    """λ tr S(Σ̂+λ)⁻¹ through the kernel."""
    samples = []
    for design, (penalty, _), (S, _) in zip(data.designs, data.penalties, data.weights):
        kernel = _grams(design)
        inverse = np.linalg.inv(kernel + penalty * np.eye(design.n))
        samples.append(_real(S.sum() - np.einsum("rij,rji->r", inverse, _grams(design, S))))
    return samples


def _grams(design: Design, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """X diag(weight) Xᵀ/n (replicates, n, n)."""
    return (design.X * weight) @ np.swapaxes(design.X, 1, 2) / design.n


def _two_points(data: Resolvents) -> list[np.ndarray]:
    """κ₁κ₂ tr S(Σ+κ₁)⁻¹[M + aΣ](Σ+κ₂)⁻¹."""
    predictions = []
    for design, kappa, (S, M) in zip(data.designs, _kappas(data), data.weights):
        s, n = design.eigenvalues, design.n
        both = 1 / ((s + kappa[0]) * (s + kappa[1]))
        a = np.sum(M * s * both) / n / (1 - np.sum(s**2 * both) / n)
        predictions.append(_real(kappa[0] * kappa[1] * np.sum(S * both * (M + a * s))))
    return predictions


def _two_points_sampled(data: Resolvents) -> list[np.ndarray]:
    samples = []
    for design, penalties, (S, M) in zip(data.designs, data.penalties, data.weights):
        kernel = _grams(design)
        first, second = (np.linalg.inv(kernel + penalty * np.eye(design.n)) for penalty in penalties)
        single = np.einsum("rij,rji->r", first + second, _grams(design, S * M))
        double = np.einsum("rij,rji->r", _grams(design, S) @ first, _grams(design, M) @ second)
        samples.append(_real(np.sum(S * M) - single + double))
    return samples


# D3 and D4 -----------------------------------------------------------------------------------------------------------


class Experiments(NamedTuple):
    """Problems with u ≠ 0 and Σ₁ ≠ Σ₂ at growing size, and the filters whose risk is predicted."""

    designs: list[Design]
    problems: list[TwoTaskProblem]
    filters: tuple[Filter, ...]
    tau: Array


EXPERIMENT_PARAMETERS = DESIGN_PARAMETERS | {
    "alignment": ALIGNMENT.within(-1.0, 1.0),
    "pretrain_decay": Parameter(low=0.0, high=1.5),
    "noise_variance": Parameter(low=1e-2, high=1.0, scale="log", highest=100.0),
    "pretrain_risk": Parameter(low=0.0, high=1.0),
}


def _experiments(
    normal: Normal,
    filters: tuple[Filter, ...],
    alignment: float,
    pretrain_decay: float,
    noise_variance: float,
    pretrain_risk: float,
    **values: Any,
) -> Experiments:
    designs = [_design(normal, n, **values) for n in SIZES]
    problems = [
        aligned_problem(
            spectra.power_law(design.eigenvalues.size, values["decay"]),
            alignment=alignment,
            noise_std=noise_variance**0.5,
            pretrain_spectrum=spectra.power_law(design.eigenvalues.size, pretrain_decay),
            pretrain_risk=pretrain_risk,
        )
        for design in designs
    ]
    return Experiments(designs, problems, filters, jnp.array([0.3, 0.7, 1.0, 1.3])[:, None])


def _ridges(normal: Normal, penalty: float, **values: Any) -> Experiments:
    return _experiments(normal, (MinNorm(), Ridge([penalty, 10 * penalty])), **values)


def _flows(normal: Normal, time: float, **values: Any) -> Experiments:
    return _experiments(normal, (GradientFlow([time, 10 * time]),), **values)


def _padded_problem(problem: TwoTaskProblem) -> TwoTaskProblem:
    pretrain, finetune, spread = (
        jnp.asarray(_padded(covariance.diagonal()))
        for covariance in (problem.pretrain_covariance, problem.finetune_covariance, problem.shift.covariance)  # type: ignore[union-attr]
    )
    u = np.zeros(problem.p) if problem.pretrain_error is None else problem.pretrain_error
    return TwoTaskProblem(pretrain, finetune, RandomShift(spread), problem.noise_std, jnp.asarray(_padded(u)))


def _predicted_risk(data: Experiments) -> list[np.ndarray]:
    """Total risk on both domains, relative to R_ft(θ₁) = 1: (filters, 2, taus, hyperparameters) flattened."""
    predictions = []
    for design, problem in zip(data.designs, data.problems):
        padded = _padded_problem(problem)
        risks = [risk(padded, design.n, filter, data.tau) for filter in data.filters]
        predictions.append(np.concatenate([np.ravel(part.total) for pair in risks for part in pair]))
    return predictions


def _mean_exact_risk(data: Experiments) -> list[np.ndarray]:
    forms = [risk_forms(design.X, problem) for design, problem in zip(data.designs, data.problems)]
    return [np.asarray(_totals(form, data.filters, data.tau)) for form in forms]


@eqx.filter_jit
def _totals(forms: Pair, filters: tuple[Filter, ...], tau: Array) -> Array:
    totals = [form(filter, tau).total for filter in filters for form in forms]
    return jnp.concatenate([total.reshape(len(total), -1) for total in totals], axis=1)


def _contour(normal: Normal, time: float, span: float) -> tuple[np.ndarray, np.ndarray]:
    """Times that share a contour if they lie within a decade, and eigenvalues from 0 to far beyond 1/t."""
    times = time * span ** np.linspace(0, 1, 8)
    return times, np.concatenate([[0.0], np.logspace(-6, 6, 200) / time])


def _by_contour(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """1 − s·g(s) = Re Σ w λ/(s+λ), (8, 201), as the equivalents use it."""
    times, s = data
    plan = rational.Plan(jnp.asarray(times[-1:]), jnp.ones(1), jnp.zeros(times.size, int))
    ridges = rational.flow_ridges(jnp.asarray(times), plan)
    poles = np.asarray(ridges.penalties)[np.asarray(ridges.group)]
    return np.einsum("tk,tks->ts", np.asarray(ridges.weights) * poles, 1 / (s + poles[..., None])).real


def _by_exponential(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    times, s = data
    return np.exp(-times[:, None] * s)


# D5 ------------------------------------------------------------------------------------------------------------------


def _sampled_designs(normal: Normal, penalty: float, **values: Any) -> tuple[float, list[Design]]:
    return penalty, [_design(normal, n, **values) for n in SIZES]


def _expected_degrees(data: tuple[float, list[Design]]) -> list[np.ndarray]:
    """df₁/n."""
    penalty, designs = data
    return [
        np.asarray(degrees_of_freedom(penalty * d.eigenvalues.sum() / d.n, _padded(d.eigenvalues), d.n).first / d.n)
        for d in designs
    ]


def _sampled_degrees(data: tuple[float, list[Design]]) -> list[np.ndarray]:
    """tr Σ̂(Σ̂+λ)⁻¹/n."""
    penalty, designs = data
    samples = []
    for design in designs:
        eigenvalues = np.linalg.eigvalsh(_grams(design))
        samples.append(np.mean(eigenvalues / (eigenvalues + penalty * design.eigenvalues.sum() / design.n), axis=1))
    return samples


def _spectrum(normal: Normal, decay: float, roughness: float, k: int) -> tuple[np.ndarray, int]:
    return np.arange(1.0, 41.0) ** -decay * np.exp(roughness * normal(40)), k


def _rank_margins(data: tuple[np.ndarray, int]) -> np.ndarray:
    """1 − r_k/R_k and 1 − R_k/r_k²."""
    r, R = (float(rank) for rank in effective_ranks(*data))
    return np.array([1 - r / R, 1 - R / r**2])


@claim(
    "D1",
    "A sampled resolvent acts like the population's at a larger, effective penalty κ.",
    R"\lambda(\hat\Sigma+\lambda)^{-1} \asymp \kappa(\Sigma+\kappa)^{-1},\quad "
    R"\kappa - \tfrac{\kappa}{n}\mathrm{tr}\,\Sigma(\Sigma+\kappa)^{-1} = \lambda",
    source="random matrices",
    kind="asymptotic",
    parameters=RESOLVENT_PARAMETERS,
    tolerance=1.0,
    sizes=SIZES,
)
def d1(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _resolvents(normal, **values)
    return _one_point(instance), _one_point_sampled(instance)


@claim(
    "D2",
    "Two resolvents with a matrix between them, at any two complex penalties.",
    R"\lambda_1\lambda_2(\hat\Sigma+\lambda_1)^{-1}M(\hat\Sigma+\lambda_2)^{-1} \asymp "
    R"\kappa_1\kappa_2(\Sigma+\kappa_1)^{-1}[M + a\Sigma](\Sigma+\kappa_2)^{-1}",
    source="random matrices",
    kind="asymptotic",
    parameters=RESOLVENT_PARAMETERS,
    tolerance=10.0,
    sizes=SIZES,
)
def d2(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _resolvents(normal, **values)
    return _two_points(instance), _two_points_sampled(instance)


@claim(
    "D3",
    "The risk of ensembles of min-norm and ridge, on both domains, follows from the population.",
    R"R(\tau) \asymp (1-\tau)^2\mathrm{tr}\,SM "
    R"+ 2\tau(1-\tau)\,\kappa\,\mathrm{tr}\,S(\Sigma+\kappa)^{-1}M + \tau^2(B + \sigma^2 a)",
    source="ours",
    kind="asymptotic",
    parameters=EXPERIMENT_PARAMETERS | {"penalty": PENALTY.within(1e-3, 0.1, lowest=1e-9)},
    tolerance=5.0,
    sizes=SIZES,
)
def d3(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _ridges(normal, **values)
    return _predicted_risk(instance), _mean_exact_risk(instance)


@claim(
    "D4",
    "So does that of gradient flow at any time, as a sum of resolvents on a contour.",
    R"e^{-t\hat\Sigma} = \tfrac{1}{2\pi i}\oint e^{\lambda t}(\hat\Sigma+\lambda)^{-1}d\lambda",
    source="ours",
    kind="asymptotic",
    parameters=EXPERIMENT_PARAMETERS | {"time": TIME.within(1.0, 1e3, highest=1e6)},
    tolerance=5.0,
    sizes=SIZES,
)
def d4(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _flows(normal, **values)
    return _predicted_risk(instance), _mean_exact_risk(instance)


@claim(
    "D4.contour",
    "Twenty-five complex ridges reproduce gradient flow at all times of a decade.",
    R"e^{-ts} \approx \mathrm{Re}\textstyle\sum_k w_k\lambda_k/(s+\lambda_k),\quad s \ge 0",
    source="ours",
    kind="identity",
    parameters={
        "time": TIME.within(1e-3, 1e6, lowest=1e-9, highest=1e12),
        "span": Parameter(low=1.0, high=10.0, scale="log", highest=1e4),
    },
    tolerance=1e-8,
)
def d4_contour(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _contour(normal, **values)
    return _by_exponential(instance), _by_contour(instance)


@claim(
    "D5",
    "Ridge uses up df₁ = n(1 − λ/κ) degrees of freedom.",
    R"\mathrm{tr}\,\hat\Sigma(\hat\Sigma+\lambda)^{-1} \asymp "
    R"\mathrm{tr}\,\Sigma(\Sigma+\kappa)^{-1} = n(1-\lambda/\kappa)",
    source="random matrices",
    kind="asymptotic",
    parameters=DESIGN_PARAMETERS | {"penalty": PENALTY.within(0.1, 10.0, lowest=1e-6)},
    tolerance=1.0,
    sizes=SIZES,
)
def d5(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _sampled_designs(normal, **values)
    return _expected_degrees(instance), _sampled_degrees(instance)


@claim(
    "D5.ranks",
    "The effective ranks of benign overfitting are ordered.",
    R"r_k \le R_k \le r_k^2",
    source="Bartlett et al. 2020",
    kind="inequality",
    parameters={
        "decay": DECAY.within(0.0, 3.0),
        "roughness": Parameter(low=0.0, high=2.0, highest=10.0),
        "k": Parameter(low=0, high=39, scale="whole"),
    },
    tolerance=1e-12,
)
def d5_ranks(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _spectrum(normal, **values)
    return (lambda _: 0.0)(instance), _rank_margins(instance)
