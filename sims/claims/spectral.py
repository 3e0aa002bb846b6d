"""§1 as claims: spectral fine-tuning and its exact risk (docs, S1–S5)."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import Ridge, TwoTaskProblem, aligned_problem, fine_tune, leave_one_out, risk_forms, spectra
from sims.claims import Normal, claim
from sims.claims.problems import (
    EXACT_PARAMETERS,
    SIZES,
    Exact,
    exact_instance,
    matrix_of,
    moments,
    risk_by_algebra,
    totals,
)
from sims.parameters import ALIGNMENT, DECAY, PENALTY, TAU, Parameter

REPLICATES = 1024

# S1 ------------------------------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """An exact instance with labels."""

    exact: Exact
    y: np.ndarray
    theta_1: np.ndarray


def _labelled(normal: Normal, **values: Any) -> Labelled:
    exact = exact_instance(normal, **values)
    return Labelled(exact, normal(len(exact.X)), np.asarray(exact.problem.pretrain_error))


def _closed_form(labelled: Labelled) -> np.ndarray:
    exact, y, theta_1 = labelled
    return np.stack([fine_tune(exact.X, y, theta_1, filter) for filter in exact.filters])


def _plain_algebra(labelled: Labelled) -> np.ndarray:
    exact, y, theta_1 = labelled
    return theta_1 + exact.maps @ (y - exact.X @ theta_1)


# S2 ------------------------------------------------------------------------------------------------------------------


def _risk_forms(exact: Exact) -> np.ndarray:
    """Bias² and variance, both domains, all filters, relative to R_ft(θ₁): (4, 2, 2)."""
    parts = [[form(filter, exact.tau) for form in exact.forms] for filter in exact.filters]
    return np.array(parts) / float(exact.forms.finetune.constant)


def _risk_by_traces(exact: Exact) -> np.ndarray:
    noise = _autocorrelation(len(exact.X), exact.extra.get("noise_correlation", 0.0))
    risks = [risk_by_algebra(exact.problem, exact.X, exact.tau * R, noise) for R in exact.maps]
    return np.array(risks) / float(exact.forms.finetune.constant)


def _autocorrelation(n: int, correlation: float) -> np.ndarray:
    index = np.arange(n)
    return correlation ** np.abs(index[:, None] - index)


class Sampled(NamedTuple):
    """An exact instance with many draws of the shift and the noise, one a column."""

    exact: Exact
    delta: np.ndarray
    noise: np.ndarray


def _sampled(normal: Normal, law: int, noise_correlation: float, **values: Any) -> Sampled:
    exact = exact_instance(normal, **values)
    problem = exact.problem
    if problem.gap_covariance is None:
        delta = np.repeat(np.asarray(problem.gap_mean + problem.pretrain_error)[:, None], REPLICATES, 1)  # type: ignore[operator]
    else:
        delta = np.linalg.cholesky(matrix_of(problem.gap_covariance)) @ normal(problem.p, REPLICATES)
    noise = normal(len(exact.X), REPLICATES)
    noise = np.linalg.cholesky(_autocorrelation(len(noise), noise_correlation)) @ (np.sign(noise) if law else noise)
    return Sampled(exact, delta, float(problem.noise_std) * noise)


def _expected(sampled: Sampled) -> np.ndarray:
    exact = sampled.exact
    return np.array([[form(filter, exact.tau).total for form in exact.forms] for filter in exact.filters])


def _realised(sampled: Sampled) -> np.ndarray:
    """R_ft and R_pre of the weights fitted to each draw of the labels (replicates, 4, 2)."""
    exact, delta, noise = sampled
    m = moments(exact.problem)
    theta_1 = np.repeat(m.u[:, None], REPLICATES, 1)
    y = exact.X @ delta + noise
    risks = []
    for filter in exact.filters:
        theta = (1 - exact.tau) * theta_1 + exact.tau * np.asarray(fine_tune(exact.X, y, theta_1, filter))
        miss = theta - delta
        risks.append([np.sum(miss * (m.finetune @ miss), axis=0), np.sum(theta * (m.pretrain @ theta), axis=0)])
    return np.moveaxis(np.array(risks), 2, 0)


# S3 ------------------------------------------------------------------------------------------------------------------


def _optimal_ensemble(exact: Exact) -> np.ndarray:
    """τ* and the gain over τ = 1 relative to R_ft(θ₁), on both domains (4, 2, 2)."""
    constant = float(exact.forms.finetune.constant)
    values = [
        [(form.optimal_tau(filter), form.along(filter).gain / constant) for form in exact.forms]
        for filter in exact.filters
    ]
    return np.array(values)


def _vertex(exact: Exact) -> np.ndarray:
    """The vertex of the parabola through the risks at τ = 0, ½, 1."""
    constant = float(exact.forms.finetune.constant)
    values = []
    for R in exact.maps:
        start, half, end = (totals(exact.problem, exact.X, tau * R) for tau in (0.0, 0.5, 1.0))
        curvature, slope = 2 * (end - 2 * half + start), (3 * start - 4 * half + end) / 2
        tau = slope / curvature
        values.append(np.stack([tau, (end - start + slope * tau) / constant], axis=-1))
    return np.array(values)


# S4 ------------------------------------------------------------------------------------------------------------------


def _exact_with_values(normal: Normal, beyond_spectral: float, **values: Any) -> Exact:
    exact = exact_instance(normal, **values, beyond_spectral=beyond_spectral)
    return exact._replace(extra=exact.extra | {"values": np.exp(normal(4, len(exact.X)))})


def _oracle_floor(exact: Exact) -> float:
    return float(exact.forms.finetune.oracle_risk() / exact.forms.finetune.constant)


def _many_filters(exact: Exact) -> np.ndarray:
    """R_ft of the four filters at τ, of four arbitrary ones, and of one moved towards the best linear estimator."""
    problem, X, n = exact.problem, exact.X, len(exact.X)
    s, U = np.linalg.eigh(X @ X.T / n)
    m = moments(problem)
    linear = m.second @ X.T @ np.linalg.inv(X @ m.second @ X.T + m.noise_variance * np.eye(n))
    oracle = X.T @ (U * np.asarray(exact.forms.finetune.oracle_filter().values)) @ U.T / n
    beyond = exact.extra["beyond_spectral"]
    maps = [
        *(exact.tau * exact.maps),
        *(X.T @ (U * values / s) @ U.T / n for values in exact.extra["values"]),
        (1 - beyond) * oracle + beyond * linear,
    ]
    return np.array([totals(problem, X, R)[0] for R in maps]) / float(exact.forms.finetune.constant)


# S5 ------------------------------------------------------------------------------------------------------------------


class LeftOut(NamedTuple):
    """Data, (τ, λ), and the penalty that refitting uses relative to the one that is claimed."""

    X: np.ndarray
    y: np.ndarray
    theta_1: np.ndarray
    penalty: float
    tau: float
    refit_ratio: float


def _left_out(
    normal: Normal, size: int, decay: float, noise_variance: float, penalty: float, tau: float, refit_ratio: float
) -> LeftOut:
    n, p = SIZES[size]
    X = normal(n, p) * (1.0 + np.arange(p)) ** (-decay / 2)
    theta_1 = normal(p)
    y = X @ (theta_1 + normal(p)) + noise_variance**0.5 * normal(n)
    return LeftOut(X, y, theta_1, penalty, tau, refit_ratio)


def _shortcut(data: LeftOut) -> np.ndarray:
    penalties = np.array([0.0, data.penalty])
    return np.asarray(leave_one_out(data.X, data.y, data.theta_1, penalties, data.tau))


def _refit(data: LeftOut) -> np.ndarray:
    """Every sample left out in turn; the penalty is that of the sum of squares, nλ."""
    X, y, theta_1, penalty, tau, refit_ratio = data
    n = len(X)
    residuals = np.empty((2, n))
    for i in range(n):
        rest, labels = np.delete(X, i, 0), np.delete(y, i)
        kernel = rest @ rest.T
        for row, total in enumerate((0.0, n * penalty * refit_ratio)):
            dual = np.linalg.solve(kernel + total * np.eye(n - 1), labels - rest @ theta_1)
            residuals[row, i] = y[i] - X[i] @ (theta_1 + tau * rest.T @ dual)
    return residuals


class Estimated(NamedTuple):
    """Replicates of a whole fine-tuning experiment: designs (R, n, p), labels (R, n)."""

    problem: TwoTaskProblem
    X: Array
    y: Array
    penalty: Array
    tau: Array


ESTIMATE_SIZE, ESTIMATE_REPLICATES = (6, 12), 2048


def _estimated(
    normal: Normal, decay: float, alignment: float, noise_variance: float, penalty: float, tau: float, repeated: float
) -> Estimated:
    """Samples are independent unless `repeated`, the correlation of consecutive rows of X, is not 0."""
    n, p = ESTIMATE_SIZE
    problem = aligned_problem(spectra.power_law(p, decay), alignment=alignment, noise_std=noise_variance**0.5)
    mixing = np.linalg.cholesky(_autocorrelation(n, repeated))
    X = np.asarray(problem.finetune_covariance.colour(mixing @ normal(ESTIMATE_REPLICATES, n, p)))
    delta = np.asarray(problem.gap_covariance.colour(normal(ESTIMATE_REPLICATES, p)))  # type: ignore[union-attr,arg-type]
    y = np.einsum("rnp,rp->rn", X, delta) + noise_variance**0.5 * normal(ESTIMATE_REPLICATES, n)
    return Estimated(problem, *(jnp.asarray(part) for part in (X, y, penalty, tau)))


@eqx.filter_jit
def _risk_with_one_sample_less(data: Estimated) -> Array:
    """R_ft + σ² of the fit to all samples but the last, exact for each design (R,)."""
    n = data.X.shape[1]
    filter = Ridge(n * data.penalty / (n - 1))

    def one(rows: Array) -> Array:
        return risk_forms(rows, data.problem).finetune(filter, data.tau).total

    return jax.vmap(one)(data.X[:, :-1]) + data.problem.noise_std**2


@eqx.filter_jit
def _mean_square_left_out(data: Estimated) -> Array:
    """Mean squared leave-one-out residual of each experiment (R,)."""
    theta_1 = jnp.zeros(data.X.shape[2])

    def one(X: Array, y: Array) -> Array:
        return jnp.mean(leave_one_out(X, y, theta_1, data.penalty, data.tau) ** 2)

    return jax.vmap(one)(data.X, data.y)


FITTING = {name: EXACT_PARAMETERS[name] for name in ("size", "decay", "noise_variance", "penalty", "tau")}


@claim(
    "S1",
    "Minimum norm, ridge, gradient flow and gradient descent from θ₁ are spectral filters of XXᵀ/n.",
    R"\hat\theta = \theta_1 + \tfrac1n X^\top U\,\mathrm{diag}(g(s))\,U^\top (y - X\theta_1)",
    source="paper 2506.01901 (estimators)",
    kind="identity",
    parameters=EXACT_PARAMETERS | {"speed": Parameter(low=0.1, high=1.9, highest=2.5)},
    tolerance=1e-9,
)
def s1(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _labelled(normal, **values)
    return _closed_form(instance), _plain_algebra(instance)


@claim(
    "S2",
    "Given X, bias² and variance on both domains are quadratic forms in the filter.",
    R"R(g) = c - 2\,b\cdot g + g^\top H g,\quad H = (P\circ Q)/n^2 + \sigma^2\mathrm{diag}(Q_{ii})/n^2",
    source="ours",
    kind="identity",
    parameters=EXACT_PARAMETERS | {"noise_correlation": Parameter(low=0.0, high=0.0, highest=0.9)},
    tolerance=1e-9,
)
def s2(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = exact_instance(normal, **values)
    return _risk_forms(instance), _risk_by_traces(instance)


@claim(
    "S2.sampled",
    "The quadratic form is the mean risk of weights actually fitted, whatever the law of the noise.",
    R"\mathbb E_{\delta,\varepsilon}\|\theta_\tau - \theta_2^*\|^2_{\Sigma_2} = R_\mathrm{ft}(\tau g)",
    source="ours",
    kind="statistical",
    parameters=EXACT_PARAMETERS
    | {"law": Parameter(low=0, high=1, scale="whole"), "noise_correlation": Parameter(low=0.0, high=0.0, highest=0.9)},
)
def s2_sampled(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _sampled(normal, **values)
    return _expected(instance), _realised(instance)


@claim(
    "S3",
    "Along the ensemble the risk is a parabola; its vertex and the gain over τ = 1 are known.",
    R"\tau^* = b\cdot g / g^\top H g,\quad R(1) - R(\tau^*) = (1-\tau^*)^2\, g^\top H g",
    source="ours",
    kind="identity",
    parameters=EXACT_PARAMETERS
    | {
        "noise_variance": Parameter(low=1e-3, high=10.0, scale="log", lowest=1e-6, highest=1e3),
        "decay": DECAY.within(0.0, 1.5, highest=3.0),
        "pretrain_size": Parameter(low=0.1, high=1.0, scale="log", lowest=1e-3, highest=10.0),
    },
    tolerance=1e-7,
)
def s3(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = exact_instance(normal, **values)
    return _optimal_ensemble(instance), _vertex(instance)


@claim(
    "S4",
    "No spectral filter has a lower fine-tuning risk than the oracle filter H⁻¹b.",
    R"R(g) \ge c - b^\top H^{-1} b",
    source="ours",
    kind="inequality",
    parameters=EXACT_PARAMETERS | {"beyond_spectral": Parameter(low=0.0, high=0.0, highest=1.0)},
    tolerance=1e-9,
)
def s4(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _exact_with_values(normal, **values)
    return _oracle_floor(instance), _many_filters(instance)


@claim(
    "S5",
    "Leave-one-out residuals of an ensemble of ridge need no refitting, the penalty nλ held fixed.",
    R"r_i - \tau\,\bigl(r_i - (Gr)_i/G_{ii}\bigr),\quad G = (XX^\top + n\lambda I)^{-1}",
    source="ours",
    kind="identity",
    parameters=FITTING | {"refit_ratio": Parameter(low=1.0, high=1.0, scale="log", lowest=0.25, highest=4.0)},
    tolerance=1e-8,
)
def s5(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _left_out(normal, **values)
    return _shortcut(instance), _refit(instance)


@claim(
    "S5.unbiased",
    "The mean squared leave-one-out residual is unbiased for the prediction error at n − 1 samples.",
    R"\mathbb E\,\tfrac1n\textstyle\sum_i r_{(i)}^2 = \mathbb E\,R_\mathrm{ft}^{(n-1)} + \sigma^2",
    source="ours",
    kind="statistical",
    parameters={
        "decay": DECAY.within(0.0, 1.5),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_variance": Parameter(low=1e-2, high=10.0, scale="log"),
        "penalty": PENALTY.within(1e-2, 10.0),
        "tau": TAU.within(-0.5, 1.5),
        "repeated": Parameter(low=0.0, high=0.0, highest=0.99),
    },
)
def s5_unbiased(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _estimated(normal, **values)
    return _risk_with_one_sample_less(instance), _mean_square_left_out(instance)
