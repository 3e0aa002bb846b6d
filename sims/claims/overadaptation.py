"""§2 as claims: overadaptation, and when averaging beats regularizing (docs, O1–O5)."""

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.optimize
from jax import Array

from linfit import MinNorm, RandomShift, RiskForm, TwoTaskProblem, aligned_problem, fine_tune, risk_forms, spectra
from sims.claims import Normal, Sides, existence, identity, inequality, statistical
from sims.claims.problems import (
    EXACT,
    EXTREMES,
    Moments,
    agree,
    exact_instance,
    moments,
    parabola,
    primal,
    ridge_map,
    shifts,
    without,
)
from sims.parameters import ALIGNMENT, DECAY, NOISE_STD, TAU, Parameter
from theory.overadaptation import bayes_penalty, best_of_each_method, combined, overadaptation_condition

SMALL, LARGE = (20, 60), (50, 400)
"""(n, p) of what is conditional on one diagonal design."""

REPLICATES = 1024

TAIL_CONTEST = {
    "decay": DECAY.within(0.5, 2.0, lowest=0.0, highest=4.0),
    "alignment": ALIGNMENT.within(-1.0, lowest=-2.0, highest=1.0),
    "noise_std": EXTREMES["noise_std"],
}
"""A shift in the tail of the spectrum, Ω ∝ Σ⁻¹."""


def _on_one_design(
    normal: Normal, shape: tuple[int, int], decay: float, alignment: float, noise_std: float
) -> tuple[Array, TwoTaskProblem, RiskForm]:
    """A design X (n, p) of the test bed, the problem, and its fine-tuning risk."""
    problem = aligned_problem(spectra.power_law(shape[1], decay), alignment=alignment, noise_std=noise_std)
    X = problem.finetune_covariance.colour(normal(*shape))  # type: ignore[arg-type]
    return X, problem, risk_forms(X, problem).finetune


def _contest(normal: Normal, **values: float) -> dict[str, float]:
    """The risk of each method at its best."""
    _, _, form = _on_one_design(normal, LARGE, **values)
    return {name: float(optimum.risk) for name, optimum in best_of_each_method(form).items()}


@identity(
    "O1",
    "Min-norm overadapts (τ* < 1) exactly where the noise it fits exceeds the signal it misses.",
    R"\tau^* < 1 \iff \mathrm{tr}\,\Pi S (I-\Pi)\Sigma_2 < \sigma^2\,\mathrm{tr}\,A^\top \Sigma_2 A",
    parameters=EXACT | EXTREMES,
    tolerance=1e-8,
)
def o1(normal: Normal, **values: Any) -> Sides:
    """The two traces of O1 and their difference, −R'(1)/2 by the risks at τ = ½ and 3/2, relative to R_ft(θ₁)."""
    exact = exact_instance(normal, **values)
    missed, fitted = overadaptation_condition(exact.forms.finetune)
    m, A = exact.moments, np.linalg.pinv(exact.X)
    projector = A @ exact.X
    missed_trace = np.trace(projector @ m.second @ (np.eye(len(projector)) - projector) @ m.finetune)
    fitted_trace = m.noise_std**2 * np.trace(A.T @ m.finetune @ A)
    before, after = (exact.totals(tau * A)[0] for tau in (0.5, 1.5))
    predicted = np.array([missed, fitted, missed - fitted]) / float(exact.forms.finetune.constant)
    measured = np.array([missed_trace, fitted_trace, (before - after) / 2]) / np.trace(m.second @ m.finetune)
    return predicted, measured


@inequality(
    "O1.isotropic",
    "For an isotropic shift min-norm always overadapts: any label noise makes averaging help.",
    R"S = \omega I,\ \sigma > 0 \implies \tau^* < 1",
    parameters={
        "decay": DECAY.within(0.0, 2.0, highest=3.0),
        "alignment": ALIGNMENT.within(0.0, lowest=-2.0, highest=2.0),
        "noise_std": NOISE_STD.within(1e-3**0.5, 10**0.5, lowest=1e-9**0.5, highest=1e3**0.5),
    },
)
def o1_isotropic(normal: Normal, **values: Any) -> Sides:
    """1 − τ*, and that it is the vertex of the risk by traces."""
    design, problem, form = _on_one_design(normal, SMALL, **values)
    tau, A, m = float(form.optimal_tau(MinNorm())), np.linalg.pinv(np.asarray(design)), moments(problem)
    _, slope, curvature = parabola(lambda tau: m.totals(np.asarray(design), tau * A)[0])
    return 0.0, np.array([1 - tau, agree(tau, slope / curvature)])


@statistical(
    "O2",
    "Along τ, the risk is bias² plus τ² times the variance of the fine-tuned model.",
    R"R_\mathrm{ft}(\tau) = \mathrm{bias}^2(\tau) + \tau^2\,\mathrm{variance}(1)",
    source="paper 2506.01901 (picture)",
    # with fewer samples than features, where there is a bias at τ = 1
    parameters=without("fixed", "tau")
    | {"size": Parameter(low=0, high=1, scale="whole"), "noise_correlation": Parameter(highest=0.9)},
)
def o2(normal: Normal, noise_correlation: float, **values: Any) -> Sides:
    """The fit to noise-free labels misses by the bias; two fits to the same signal differ by twice the variance.

    The two noise vectors of a pair are independent unless `noise_correlation` is not 0.
    """
    exact = exact_instance(normal, **values, fixed=0, tau=1.0)
    m, form, taus = exact.moments, exact.forms.finetune, np.array([0.25, 0.5, 1.0, 1.25])
    delta = shifts(normal, exact.problem, REPLICATES)
    noise, fresh = (normal(len(exact.X), REPLICATES) for _ in range(2))
    other = noise_correlation * noise + (1 - noise_correlation**2) ** 0.5 * fresh
    theta_1, signal = np.repeat(m.u[:, None], REPLICATES, 1), exact.X @ delta

    def squared(vectors: np.ndarray) -> np.ndarray:
        return np.sum(vectors * (m.finetune @ vectors), axis=0)

    predicted, measured = [], []
    for filter in exact.filters:
        predicted.append(np.stack([form(filter, taus).bias, taus**2 * form(filter).variance], axis=-1))
        clean, one, two = (
            np.asarray(fine_tune(exact.X, signal + m.noise_std * labels, theta_1, filter)) - theta_1
            for labels in (0.0, noise, other)
        )
        measured.append([[squared(theta_1 + tau * clean - delta), squared(tau * (one - two)) / 2] for tau in taus])
    return np.array(predicted), np.moveaxis(np.array(measured), -1, 0)


@inequality(
    "O2.bias",
    "bias² falls as τ leaves 0, for a mean-zero shift whose covariance commutes with Σ₂.",
    R"\tfrac{d}{d\tau}\,\mathrm{bias}^2(\tau)\big|_{\tau=0} < 0",
    source="paper 2506.01901 (picture)",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_std": NOISE_STD.within(0.1, 10**0.5),
        "adversarial": Parameter(highest=1.0),
    },
)
def o2_bias(normal: Normal, adversarial: float, **values: float) -> Sides:
    """−½ d bias²/dτ at τ = 0, relative to R_ft(θ₁), and that the form and the traces agree on it.

    A share `adversarial` of the signal lies in the one direction for which learning starts by doing harm.
    """
    design, problem, _ = _on_one_design(normal, SMALL, **values)
    X, (_, finetune, spread, *_) = np.asarray(design), moments(problem)
    A = np.linalg.pinv(X)
    harm = A @ X @ finetune
    direction = np.linalg.eigh(harm + harm.T)[1][:, 0]
    direction = direction / np.sqrt(direction @ finetune @ direction)
    problem = replace(
        problem, shift=RandomShift((1 - adversarial) * np.diag(spread)), pretrain_error=adversarial**0.5 * direction
    )
    start, slope, _ = parabola(lambda tau: moments(problem).risks(X, tau * A)[0, 0])
    known = risk_forms(X, problem).finetune.along(MinNorm())
    return 0.0, np.array([float(known.slope / known.constant), agree(known.slope, slope), agree(known.constant, start)])


@identity(
    "O3",
    "Started from the pretraining optimum (u = 0), forgetting is exactly quadratic in τ.",
    R"u = 0 \implies R_\mathrm{pre}(\tau) = \tau^2 R_\mathrm{pre}(1)",
    parameters=without("tau") | {"pretrain_size": Parameter(highest=1.0)},
    tolerance=1e-9,
)
def o3(normal: Normal, **values: Any) -> Sides:
    """R_pre along τ for four filters, relative to R_pre(1) of the first: (4, taus)."""
    exact, taus = exact_instance(normal, **values, tau=1.0), np.array([-0.5, 0.25, 0.5, 0.75, 1.25])
    full = np.array([exact.totals(R)[1] for R in exact.maps])
    form = exact.forms.pretrain
    along = np.array([form(filter, taus).total for filter in exact.filters])
    return full[:, None] * taus**2 / full[0], along / float(form(exact.filters[0]).total)


@inequality(
    "O3.less",
    "The ensemble forgets less than the fine-tuned model.",
    R"R_\mathrm{pre}(\tau) < R_\mathrm{pre}(1),\quad |\tau| < 1,\ u = 0",
    source="paper 2506.01901",
    parameters=EXACT
    | {"tau": TAU.within(-0.99, 0.99, lowest=-1.5, highest=1.5), "pretrain_size": Parameter(highest=3.0)},
)
def o3_less(normal: Normal, **values: Any) -> Sides:
    """1 − R_pre(τ)/R_pre(1) for four fine-tuners, and that the form and the traces agree on both."""
    exact = exact_instance(normal, **values)
    form = exact.forms.pretrain
    ensemble, full = (np.array([form(filter, tau).total for filter in exact.filters]) for tau in (exact.tau, 1.0))
    by_traces = [np.array([exact.totals(tau * R)[1] for R in exact.maps]) for tau in (exact.tau, 1.0)]
    return 0.0, np.stack([1 - ensemble / full, agree(ensemble, by_traces[0]), agree(full, by_traces[1])])


@identity(
    "O1.filters",
    "The condition holds for every filter: it overadapts where the noise it fits exceeds the signal it misses.",
    R"\tau^* < 1 \iff b\cdot g - g^\top B g < \sigma^2\textstyle\sum_i q_i g_i^2",
    parameters=without("tau") | {"noise_ratio": Parameter(low=1.0, high=1.0, scale="log", lowest=0.5, highest=2.0)},
    tolerance=1e-9,
)
def o1_filters(normal: Normal, noise_ratio: float, **values: Any) -> Sides:
    """Signal missed, noise fitted and 1 where τ* < 1, else −1, for three filters, relative to R_ft(θ₁): (3, 3)."""
    exact = exact_instance(normal, **values, tau=1.0)
    m, X = exact.moments, exact.X
    unit, m = np.trace(m.second @ m.finetune), m._replace(noise_std=noise_ratio * m.noise_std)
    known, found = [], []
    for filter, R in zip(exact.filters[1:], exact.maps[1:]):
        condition = overadaptation_condition(exact.forms.finetune, filter)
        sides = np.array([condition.missed_signal, condition.fitted_noise]) / unit
        known.append([*sides, 1.0 if condition.overadapted else -1.0])
        _, slope, curvature = parabola(lambda tau, R=R: m.risks(X, tau * R)[0, 0])
        fitted = m.risks(X, R)[0, 1]
        found.append([(slope - curvature) / unit, fitted / unit, 1.0 if slope < curvature + fitted else -1.0])
    return np.array(known), np.array(found)


@identity(
    "O4.best",
    "Every method at its best: the λ, t and τ that are found have the least risk there is.",
    R"\min_{\lambda,\tau} R\bigl(\tfrac{\tau}{s+\lambda}\bigr),\ \min_{t,\tau} R\bigl(\tau\tfrac{1-e^{-ts}}{s}\bigr),"
    R"\ \min_\tau R(\tau/s),\ R(g^*)",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_std": NOISE_STD.within(0.1, 10**0.5),
        "off": Parameter(low=1.0, high=1.0, scale="log", lowest=0.5, highest=2.0),
    },
    tolerance=1e-7,
)
def o4_best(normal: Normal, off: float, **values: float) -> Sides:
    """For every method its risk, twice, and its τ: R found among the features, and R at the λ, t and τ of the library.

    Relative to what is measured; λ and t a factor `off` away.
    """
    design, problem, form = _on_one_design(normal, SMALL, **values)
    best, m = best_of_each_method(form), moments(problem)
    found = _least_risks(np.asarray(design), m, {name: off * float(o.hyperparameter) for name, o in best.items()})
    risks = np.array([[float(best[name].risk)] * 2 for name in found])
    taus = np.array([float(best[name].tau) for name in found])
    measured = np.array(list(found.values()))
    predicted = np.hstack([risks / measured[:, :2], (taus / measured[:, 2])[:, None]])
    return predicted, np.ones_like(predicted)


def _least_risks(X: np.ndarray, m: Moments, chosen: dict[str, float]) -> dict[str, tuple[float, float, float]]:
    """Least risk by a search of our own, the risk at the hyperparameter that was chosen, and the best τ there."""
    view = primal(X, m)
    s, reached = view.eigenvalues, view.eigenvalues > 0
    safe = np.where(reached, s, 1.0)
    families = {
        "min-norm": (lambda _: reached / safe, None),
        "ridge": (lambda penalty: 1 / (s + penalty), s.max()),
        "early stopping": (lambda time: np.where(reached, -np.expm1(-time * s) / safe, time), 1e4 / s.max()),
    }
    found = {}
    for name, (filter, unit) in families.items():
        for suffix, ensembled in (("", False), (" + ensemble", True)):

            def tau_and_risk(value: float, filter: Any = filter, ensembled: bool = ensembled) -> tuple[float, float]:
                start, slope, curvature = view.along(filter(value))
                tau = slope / curvature if ensembled else 1.0
                return tau, start - 2 * tau * slope + tau**2 * curvature

            tau, at_chosen = tau_and_risk(chosen[name + suffix])
            least = at_chosen if unit is None else _least(lambda value, f=tau_and_risk: f(value)[1], unit)
            found[name + suffix] = (min(least, at_chosen), at_chosen, tau)
    return found | {"oracle": (view.least_risk(), view.least_risk(), 1.0)}


def _least(risk: Any, unit: float) -> float:
    """The least risk over twelve decades of a hyperparameter."""
    grid = np.log(unit * np.logspace(-8, 4, 49))
    values = [risk(np.exp(at)) for at in grid]
    best = int(np.argmin(values))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, 48)])
    return min(values[best], scipy.optimize.minimize_scalar(lambda at: risk(np.exp(at)), bounds=bounds).fun)


@identity(
    "O4.bayes",
    "For an isotropic shift ridge with λ = σ²/(nω) is Bayes, the oracle filter, and has τ* = 1.",
    R"S = \omega I \implies R\bigl(\tfrac{1}{s+\sigma^2/n\omega}\bigr) = R(g^*),\ \tau^* = 1",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "alignment": ALIGNMENT.within(0.0, lowest=-1.0, highest=1.0),
        "noise_std": NOISE_STD.within(0.1, 10**0.5),
        "penalty_ratio": Parameter(low=1.0, high=1.0, scale="log", lowest=0.1, highest=10.0),
    },
    tolerance=1e-8,
)
def o4_bayes(normal: Normal, penalty_ratio: float, **values: float) -> Sides:
    """Risk of ridge at λ_Bayes and of the best linear estimator of all, relative to R_ft(θ₁); ridge's best τ."""
    design, problem, form = _on_one_design(normal, SMALL, **values)
    X, m, (n, p) = np.asarray(design), moments(problem), SMALL
    oracle = float(form.oracle_risk() / form.constant)
    penalty = float(bayes_penalty(problem.noise_std, np.trace(m.second) / p, n)) * penalty_ratio
    R = ridge_map(X, penalty)
    start, slope, curvature = parabola(lambda tau: m.totals(X, tau * R)[0])
    ridge, linear = (m.totals(X, at)[0] for at in (R, m.best_map(X)))
    return np.array([oracle, oracle, 1.0]), np.array([ridge / start, linear / start, slope / curvature])


@inequality(
    "O4.tail",
    "For a tail shift, ensembled min-norm beats the best ridge and the best early stopping.",
    R"S \propto \Sigma^{-1} \implies "
    R"R(\tau^*\!/s) < \min_\lambda R(\mathrm{ridge}),\ \min_t R(\mathrm{flow})",
    parameters=TAIL_CONTEST,
)
def o4_tail(normal: Normal, **values: float) -> Sides:
    best = _contest(normal, **values)
    return 0.0, np.array([best["ridge"], best["early stopping"]]) / best["min-norm + ensemble"] - 1


@inequality(
    "O4.tail.oracle",
    "For a tail shift, ensembled min-norm comes within 1% of the oracle filter.",
    R"S \propto \Sigma^{-1} \implies R(\tau^*\!/s) < 1.01\, R(g^*)",
    parameters=TAIL_CONTEST,
)
def o4_tail_oracle(normal: Normal, **values: float) -> Sides:
    best = _contest(normal, **values)
    return 0.0, 1.01 - best["min-norm + ensemble"] / best["oracle"]


@inequality(
    "O4.head",
    "For a noisy head shift, the best ridge and the best early stopping beat ensembled min-norm.",
    R"S \propto \Sigma \implies "
    R"\min_\lambda R(\mathrm{ridge}),\ \min_t R(\mathrm{flow}) < R(\tau^*\!/s)",
    parameters={
        "decay": DECAY.within(1.0, 2.0, lowest=0.0, highest=4.0),
        "alignment": ALIGNMENT.within(1.0, lowest=-1.0, highest=2.0),
        "noise_std": NOISE_STD.within(0.5**0.5, 10**0.5, lowest=1e-2, highest=1e3**0.5),
    },
)
def o4_head(normal: Normal, **values: float) -> Sides:
    best = _contest(normal, **values)
    return 0.0, 1 - np.array([best["ridge"], best["early stopping"]]) / best["min-norm + ensemble"]


@inequality(
    "O4.head.both",
    "For a head shift, averaging (τ may exceed 1) still improves the best ridge by 1% or more.",
    R"S \propto \Sigma \implies "
    R"\min_{\lambda,\tau} R(\tau\,\mathrm{ridge}) < 0.99 \min_\lambda R(\mathrm{ridge})",
    parameters={
        "decay": DECAY.within(0.8, 1.5, lowest=0.0, highest=4.0),
        "alignment": ALIGNMENT.within(1.0, lowest=-1.0, highest=2.0),
        "noise_std": NOISE_STD.within(0.1, 3**0.5, lowest=1e-3, highest=1e3**0.5),
    },
)
def o4_head_both(normal: Normal, **values: float) -> Sides:
    best = _contest(normal, **values)
    return 0.01, 1 - best["ridge + ensemble"] / best["ridge"]


@existence(
    "O4.informal",
    "Ensembling the fine-tuned model beats the best ridge: true in part of the space only.",
    R"\min_\tau R(\tau/s) < \min_\lambda R\bigl(\tfrac{1}{s+\lambda}\bigr)",
    source="paper 2506.01901 (informal)",
    parameters={
        "decay": DECAY.within(0.5, 2.0),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_std": NOISE_STD.within(1e-3**0.5, 10**0.5),
    },
)
def o4_informal(normal: Normal, **values: float) -> Sides:
    best = _contest(normal, **values)
    return 0.0, best["ridge"] / best["min-norm + ensemble"] - 1


@identity(
    "O5",
    "The combined objective R_ft + κR_pre is the same kind of quadratic, and so is its best τ.",
    R"\tau^* = (b + \kappa b')\cdot g \,/\, g^\top (H + \kappa H') g",
    parameters=without("tau") | {"weight": Parameter(low=0.1, high=10.0, scale="log", lowest=1e-4, highest=1e4)},
    tolerance=1e-7,
)
def o5(normal: Normal, weight: float, **values: Any) -> Sides:
    """τ* of R_ft + κR_pre for the four filters."""
    exact = exact_instance(normal, **values, tau=1.0)
    form, measured = combined(exact.forms, weight), []
    for R in exact.maps:
        _, slope, curvature = parabola(lambda tau, R=R: np.array([1.0, weight]) @ exact.totals(tau * R))
        measured.append(slope / curvature)
    return np.array([form.optimal_tau(filter) for filter in exact.filters]), np.array(measured)
