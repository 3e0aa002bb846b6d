"""§2 as claims: overadaptation, and when averaging beats regularizing (docs, O1–O5)."""

from typing import Any, NamedTuple

import numpy as np
from jax import Array

from linfit import MinNorm, RandomShift, RiskForm, TwoTaskProblem, aligned_problem, fine_tune, risk_forms, spectra
from sims.claims import Normal, claim
from sims.claims.problems import (
    EXACT_PARAMETERS,
    Exact,
    coloured,
    exact_instance,
    matrix_of,
    moments,
    risk_by_algebra,
    totals,
    zero,
)
from sims.parameters import ALIGNMENT, DECAY, TAU, Parameter
from theory.overadaptation import Optimum, bayes_penalty, best_of_each_method, combined, overadaptation_condition

# O1 ------------------------------------------------------------------------------------------------------------------


def _condition(exact: Exact) -> np.ndarray:
    """Missed signal, fitted noise and their difference, relative to R_ft(θ₁)."""
    missed, fitted = overadaptation_condition(exact.forms.finetune)
    return np.array([missed, fitted, missed - fitted]) / float(exact.forms.finetune.constant)


def _condition_by_projection(exact: Exact) -> np.ndarray:
    """The two traces of O1, and −R'(1)/2 from the risks at τ = ½ and 3/2."""
    m = moments(exact.problem)
    A = np.linalg.pinv(exact.X)
    projector = A @ exact.X
    missed = np.trace(projector @ m.second @ (np.eye(len(projector)) - projector) @ m.finetune)
    fitted = m.noise_variance * np.trace(A.T @ m.finetune @ A)
    before, after = (totals(exact.problem, exact.X, tau * A)[0] for tau in (0.5, 1.5))
    return np.array([missed, fitted, (before - after) / 2]) / np.trace(m.second @ m.finetune)


SMALL, LARGE = (20, 60), (50, 400)
"""(n, p) of what is conditional on one diagonal design."""


class Aligned(NamedTuple):
    """A design of the overadaptation figures' test bed."""

    X: Array
    problem: TwoTaskProblem
    finetune: RiskForm
    extra: dict[str, Any]


def _aligned(
    normal: Normal, decay: float, alignment: float, noise_variance: float, shape: tuple[int, int], **extra: Any
) -> Aligned:
    n, p = shape
    problem = aligned_problem(spectra.power_law(p, decay), alignment=alignment, noise_std=noise_variance**0.5)
    X = coloured(normal, n, problem)
    return Aligned(X, problem, risk_forms(X, problem).finetune, extra)


def _small(normal: Normal, **values: float) -> Aligned:
    return _aligned(normal, shape=SMALL, **values)


def _overadaptation(aligned: Aligned) -> float:
    """1 − τ* of min-norm."""
    return float(1 - aligned.finetune.optimal_tau(MinNorm()))


# O2 ------------------------------------------------------------------------------------------------------------------

TAUS = np.array([0.25, 0.5, 1.0, 1.25])
REPLICATES = 1024


class Decomposed(NamedTuple):
    """An exact instance, and shifts and pairs of noise vectors in columns."""

    exact: Exact
    delta: np.ndarray
    noise: np.ndarray
    other_noise: np.ndarray


def _decomposed(normal: Normal, noise_correlation: float, **values: Any) -> Decomposed:
    """Without `noise_correlation` the two noise vectors of a pair are independent."""
    exact = exact_instance(normal, **values, fixed=0, tau=1.0)
    n, p = exact.X.shape
    delta = np.linalg.cholesky(matrix_of(exact.problem.gap_covariance)) @ normal(p, REPLICATES)  # type: ignore[arg-type]
    noise, fresh = normal(n, REPLICATES), normal(n, REPLICATES)
    other = noise_correlation * noise + (1 - noise_correlation**2) ** 0.5 * fresh
    sigma = float(exact.problem.noise_std)
    return Decomposed(exact, delta, sigma * noise, sigma * other)


def _bias_and_scaled_variance(data: Decomposed) -> np.ndarray:
    """bias²(τ) and τ²·variance(1), (filters, taus, 2)."""
    form = data.exact.forms.finetune
    return np.array(
        [np.stack([form(filter, TAUS).bias, TAUS**2 * form(filter).variance], axis=-1) for filter in data.exact.filters]
    )


def _decomposition(data: Decomposed) -> np.ndarray:
    """The fit to noise-free labels misses by the bias; two fits to the same signal differ by twice the variance."""
    exact, delta, noise, other_noise = data
    finetune = moments(exact.problem).finetune
    theta_1 = np.repeat(np.asarray(exact.problem.pretrain_error)[:, None], REPLICATES, 1)
    signal = exact.X @ delta

    def squared(vectors: np.ndarray) -> np.ndarray:
        return np.sum(vectors * (finetune @ vectors), axis=0)

    samples = []
    for filter in exact.filters:
        clean, one, other = (
            np.asarray(fine_tune(exact.X, signal + label_noise, theta_1, filter)) - theta_1
            for label_noise in (0.0, noise, other_noise)
        )
        samples.append([[squared(theta_1 + tau * clean - delta), squared(tau * (one - other)) / 2] for tau in TAUS])
    return np.moveaxis(np.array(samples), -1, 0)


def _falling(
    normal: Normal, decay: float, alignment: float, noise_variance: float, adversarial: float
) -> tuple[TwoTaskProblem, np.ndarray, np.ndarray]:
    """A share `adversarial` of the signal lies in the one direction for which learning starts by doing harm."""
    aligned = _small(normal, decay=decay, alignment=alignment, noise_variance=noise_variance)
    X, A = np.asarray(aligned.X), np.linalg.pinv(np.asarray(aligned.X))
    finetune, spread = matrix_of(aligned.problem.finetune_covariance), moments(aligned.problem).second
    harm = A @ X @ finetune
    direction = np.linalg.eigh(harm + harm.T)[1][:, 0]
    direction = direction / np.sqrt(direction @ finetune @ direction)
    shift = RandomShift((1 - adversarial) * np.diag(spread))
    problem = TwoTaskProblem(
        aligned.problem.pretrain_covariance,
        aligned.problem.finetune_covariance,
        shift,
        aligned.problem.noise_std,
        adversarial**0.5 * direction,
    )
    return problem, X, A


def _initial_fall(data: tuple[TwoTaskProblem, np.ndarray, np.ndarray]) -> float:
    """−½ d bias²/dτ at τ = 0, relative to R_ft(θ₁)."""
    problem, X, A = data
    start, half, end = (risk_by_algebra(problem, X, tau * A)[0, 0] for tau in (0.0, 0.5, 1.0))
    return float((3 * start - 4 * half + end) / (2 * start))


# O3 ------------------------------------------------------------------------------------------------------------------

AVERAGED = np.array([-0.5, 0.25, 0.5, 0.75, 1.25])


def _scaled_forgetting(exact: Exact) -> np.ndarray:
    """τ²·R_pre(1) for four filters, relative to R_pre(1) of the first: (4, taus)."""
    full = np.array([totals(exact.problem, exact.X, R)[1] for R in exact.maps])
    return full[:, None] * AVERAGED**2 / full[0]


def _forgetting(exact: Exact) -> np.ndarray:
    forms = exact.forms.pretrain
    risks = np.array([forms(filter, AVERAGED).total for filter in exact.filters])
    return risks / float(forms(exact.filters[0]).total)


def _ensemble_forgets(exact: Exact) -> np.ndarray:
    """R_pre(τ)/R_pre(1) by algebra."""
    return np.array(
        [totals(exact.problem, exact.X, exact.tau * R)[1] / totals(exact.problem, exact.X, R)[1] for R in exact.maps]
    )


def _one(_: Any) -> float:
    return 1.0


# O4 ------------------------------------------------------------------------------------------------------------------


def _oracle_and_one(aligned: Aligned) -> np.ndarray:
    oracle = float(aligned.finetune.oracle_risk() / aligned.finetune.constant)
    return np.array([oracle, oracle, 1.0])


def _bayes_ridge(aligned: Aligned) -> np.ndarray:
    """Risk of ridge at λ_Bayes, of the best linear estimator of all, and the vertex of ridge along τ."""
    X, problem = np.asarray(aligned.X), aligned.problem
    n, p = X.shape
    m = moments(problem)
    penalty = float(bayes_penalty(problem.noise_std, np.trace(m.second) / p, n)) * aligned.extra["penalty_ratio"]
    R = np.linalg.solve(X.T @ X / n + penalty * np.eye(p), X.T / n)
    posterior = m.second @ X.T @ np.linalg.inv(X @ m.second @ X.T + m.noise_variance * np.eye(n))
    start, half, end = (totals(problem, X, tau * R)[0] for tau in (0.0, 0.5, 1.0))
    vertex = (3 * start - 4 * half + end) / (4 * (end - 2 * half + start))
    return np.array([end / start, totals(problem, X, posterior)[0] / start, vertex])


def _contest(normal: Normal, **values: float) -> dict[str, Optimum]:
    return best_of_each_method(_aligned(normal, shape=LARGE, **values).finetune)


def _regularization_excess(best: dict[str, Optimum]) -> np.ndarray:
    """How much worse the best ridge and the best early stopping are than ensembled min-norm, relative."""
    averaged = best["min-norm + ensemble"].risk
    return np.array([best[name].risk / averaged - 1 for name in ("ridge", "early stopping")])


def _averaging_excess(best: dict[str, Optimum]) -> np.ndarray:
    return -_regularization_excess(best)


def _ridge_excess(best: dict[str, Optimum]) -> float:
    return float(_regularization_excess(best)[0])


def _closeness_to_oracle(best: dict[str, Optimum]) -> float:
    """1.01 − risk of ensembled min-norm relative to the oracle."""
    return 1.01 - float(best["min-norm + ensemble"].risk / best["oracle"].risk)


def _gain_of_both(best: dict[str, Optimum]) -> float:
    """What ridge + ensemble gains over the best ridge, relative."""
    return 1 - float(best["ridge + ensemble"].risk / best["ridge"].risk)


# O5 ------------------------------------------------------------------------------------------------------------------


def _combined_optimum(exact: Exact) -> np.ndarray:
    """τ* of R_ft + κR_pre for the four filters."""
    form = combined(exact.forms, exact.extra["weight"])
    return np.array([form.optimal_tau(filter) for filter in exact.filters])


def _combined_vertex(exact: Exact) -> np.ndarray:
    weights = np.array([1.0, exact.extra["weight"]])
    values = []
    for R in exact.maps:
        start, half, end = (weights @ totals(exact.problem, exact.X, tau * R) for tau in (0.0, 0.5, 1.0))
        values.append((3 * start - 4 * half + end) / (4 * (end - 2 * half + start)))
    return np.array(values)


def _at_any_tau(normal: Normal, **values: Any) -> Exact:
    return exact_instance(normal, **values, tau=1.0)


WITHOUT = {name: value for name, value in EXACT_PARAMETERS.items() if name not in ("fixed", "tau")}
NOISE = Parameter(low=1e-2, high=10.0, scale="log")
CONTEST = {
    "decay": DECAY.within(0.5, 2.0),
    "alignment": ALIGNMENT.within(-1.0, 1.0),
    "noise_variance": Parameter(low=1e-3, high=10.0, scale="log"),
}


@claim(
    "O1",
    "Min-norm overadapts (τ* < 1) exactly where the noise it fits exceeds the signal it misses.",
    R"\tau^* < 1 \iff \mathrm{tr}\,\Pi S (I-\Pi)\Sigma_2 < \sigma^2\,\mathrm{tr}\,A^\top \Sigma_2 A",
    source="ours",
    kind="identity",
    parameters=EXACT_PARAMETERS
    | {
        "noise_variance": Parameter(low=1e-3, high=10.0, scale="log", lowest=1e-6, highest=1e3),
        "decay": DECAY.within(0.0, 1.5, highest=3.0),
    },
    tolerance=1e-8,
)
def o1(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = exact_instance(normal, **values)
    return _condition(instance), _condition_by_projection(instance)


@claim(
    "O1.isotropic",
    "For an isotropic shift min-norm always overadapts: any label noise makes averaging help.",
    R"S = \omega I,\ \sigma > 0 \implies \tau^* < 1",
    source="ours",
    kind="inequality",
    parameters={
        "decay": DECAY.within(0.0, 2.0, highest=3.0),
        "alignment": ALIGNMENT.within(0.0, lowest=-2.0, highest=2.0),
        "noise_variance": Parameter(low=1e-3, high=10.0, scale="log", lowest=1e-9, highest=1e3),
    },
)
def o1_isotropic(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _small(normal, **values)
    return zero(instance), _overadaptation(instance)


@claim(
    "O2",
    "Along τ, the risk is bias² plus τ² times the variance of the fine-tuned model.",
    R"R_\mathrm{ft}(\tau) = \mathrm{bias}^2(\tau) + \tau^2\,\mathrm{variance}(1)",
    source="paper 2506.01901 (picture)",
    kind="statistical",
    parameters=WITHOUT | {"noise_correlation": Parameter(low=0.0, high=0.0, highest=0.9)},
)
def o2(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _decomposed(normal, **values)
    return _bias_and_scaled_variance(instance), _decomposition(instance)


@claim(
    "O2.bias",
    "bias² falls as τ leaves 0, for a mean-zero shift whose covariance commutes with Σ₂.",
    R"\tfrac{d}{d\tau}\,\mathrm{bias}^2(\tau)\big|_{\tau=0} < 0",
    source="paper 2506.01901 (picture)",
    kind="inequality",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_variance": NOISE,
        "adversarial": Parameter(low=0.0, high=0.0, highest=1.0),
    },
)
def o2_bias(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _falling(normal, **values)
    return zero(instance), _initial_fall(instance)


@claim(
    "O3",
    "Started from the pretraining optimum (u = 0), forgetting is exactly quadratic in τ.",
    R"u = 0 \implies R_\mathrm{pre}(\tau) = \tau^2 R_\mathrm{pre}(1)",
    source="ours",
    kind="identity",
    parameters={name: value for name, value in EXACT_PARAMETERS.items() if name != "tau"}
    | {"pretrain_size": Parameter(low=0.0, high=0.0, highest=1.0)},
    tolerance=1e-9,
)
def o3(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _at_any_tau(normal, **values)
    return _scaled_forgetting(instance), _forgetting(instance)


@claim(
    "O3.less",
    "The ensemble forgets less than the fine-tuned model.",
    R"R_\mathrm{pre}(\tau) < R_\mathrm{pre}(1),\quad |\tau| < 1,\ u = 0",
    source="paper 2506.01901",
    kind="inequality",
    parameters=EXACT_PARAMETERS
    | {
        "tau": TAU.within(-0.99, 0.99, lowest=-1.5, highest=1.5),
        "pretrain_size": Parameter(low=0.0, high=0.0, highest=3.0),
    },
)
def o3_less(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = exact_instance(normal, **values)
    return _ensemble_forgets(instance), _one(instance)


@claim(
    "O4.bayes",
    "For an isotropic shift ridge with λ = σ²/(nω) is Bayes, the oracle filter, and has τ* = 1.",
    R"S = \omega I \implies R\bigl(\tfrac{1}{s+\sigma^2/n\omega}\bigr) = R(g^*),\ \tau^* = 1",
    source="ours",
    kind="identity",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "alignment": ALIGNMENT.within(0.0, lowest=-1.0, highest=1.0),
        "noise_variance": NOISE,
        "penalty_ratio": Parameter(low=1.0, high=1.0, scale="log", lowest=0.1, highest=10.0),
    },
    tolerance=1e-8,
)
def o4_bayes(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _small(normal, **values)
    return _oracle_and_one(instance), _bayes_ridge(instance)


@claim(
    "O4.tail",
    "For a tail shift, ensembled min-norm beats the best ridge and the best early stopping.",
    R"S \propto \Sigma^{-1} \implies "
    R"R(\tau^*\!/s) < \min_\lambda R(\mathrm{ridge}),\ \min_t R(\mathrm{flow})",
    source="ours",
    kind="inequality",
    parameters={
        "decay": DECAY.within(0.5, 2.0, lowest=0.0, highest=4.0),
        "alignment": ALIGNMENT.within(-1.0, lowest=-2.0, highest=1.0),
        "noise_variance": Parameter(low=1e-3, high=10.0, scale="log", lowest=1e-6, highest=1e3),
    },
)
def o4_tail(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _contest(normal, **values)
    return zero(instance), _regularization_excess(instance)


@claim(
    "O4.tail.oracle",
    "For a tail shift, ensembled min-norm comes within 1% of the oracle filter.",
    R"S \propto \Sigma^{-1} \implies R(\tau^*\!/s) < 1.01\, R(g^*)",
    source="ours",
    kind="inequality",
    parameters={
        "decay": DECAY.within(0.5, 2.0, lowest=0.0, highest=4.0),
        "alignment": ALIGNMENT.within(-1.0, lowest=-2.0, highest=1.0),
        "noise_variance": Parameter(low=1e-3, high=10.0, scale="log", lowest=1e-6, highest=1e3),
    },
)
def o4_tail_oracle(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _contest(normal, **values)
    return zero(instance), _closeness_to_oracle(instance)


@claim(
    "O4.head",
    "For a noisy head shift, the best ridge and the best early stopping beat ensembled min-norm.",
    R"S \propto \Sigma \implies "
    R"\min_\lambda R(\mathrm{ridge}),\ \min_t R(\mathrm{flow}) < R(\tau^*\!/s)",
    source="ours",
    kind="inequality",
    parameters={
        "decay": DECAY.within(1.0, 2.0, lowest=0.0, highest=4.0),
        "alignment": ALIGNMENT.within(1.0, lowest=-1.0, highest=2.0),
        "noise_variance": Parameter(low=0.5, high=10.0, scale="log", lowest=1e-4, highest=1e3),
    },
)
def o4_head(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _contest(normal, **values)
    return zero(instance), _averaging_excess(instance)


@claim(
    "O4.head.both",
    "For a head shift, averaging (τ may exceed 1) still improves the best ridge by 1% or more.",
    R"S \propto \Sigma \implies "
    R"\min_{\lambda,\tau} R(\tau\,\mathrm{ridge}) < 0.99 \min_\lambda R(\mathrm{ridge})",
    source="ours",
    kind="inequality",
    parameters={
        "decay": DECAY.within(0.8, 1.5, lowest=0.0, highest=4.0),
        "alignment": ALIGNMENT.within(1.0, lowest=-1.0, highest=2.0),
        "noise_variance": Parameter(low=1e-2, high=3.0, scale="log", lowest=1e-6, highest=1e3),
    },
)
def o4_head_both(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _contest(normal, **values)
    return (lambda _: 0.01)(instance), _gain_of_both(instance)


@claim(
    "O4.informal",
    "Ensembling the fine-tuned model beats the best ridge: true in part of the space only.",
    R"\min_\tau R(\tau/s) < \min_\lambda R\bigl(\tfrac{1}{s+\lambda}\bigr)",
    source="paper 2506.01901 (informal)",
    kind="existence",
    parameters=CONTEST,
)
def o4_informal(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _contest(normal, **values)
    return zero(instance), _ridge_excess(instance)


@claim(
    "O5",
    "The combined objective R_ft + κR_pre is the same kind of quadratic, and so is its best τ.",
    R"\tau^* = (b + \kappa b')\cdot g \,/\, g^\top (H + \kappa H') g",
    source="ours",
    kind="identity",
    parameters={name: value for name, value in EXACT_PARAMETERS.items() if name != "tau"}
    | {"weight": Parameter(low=0.1, high=10.0, scale="log", lowest=1e-4, highest=1e4)},
    tolerance=1e-7,
)
def o5(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _at_any_tau(normal, **values)
    return _combined_optimum(instance), _combined_vertex(instance)
