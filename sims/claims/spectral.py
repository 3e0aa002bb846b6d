"""§0 and §1 as claims: the test bed, spectral fine-tuning and its exact risk (docs, S0–S5)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from jax import Array
from jax.random import wrap_key_data

from linfit import (
    Empirical,
    FixedShift,
    GradientDescent,
    GradientFlow,
    MinNorm,
    RandomShift,
    Ridge,
    TwoTaskProblem,
    aligned_problem,
    column_blocks,
    excess_risks,
    fine_tune,
    gradient_descent,
    interpolate,
    leave_one_out,
    risk_forms,
    sample_task,
    select,
    spectra,
)
from linfit.design import LAWS
from linfit.risk import Parabola
from linfit.selection import default_penalties
from sims.claims import Normal, Sides, identity, inequality, statistical
from sims.claims.problems import (
    EXACT,
    EXTREMES,
    SIZES,
    autocorrelation,
    dense_covariance,
    exact_instance,
    moments,
    parabola,
    primal,
    ridge_map,
    shifts,
)
from sims.parameters import ALIGNMENT, DECAY, NOISE_STD, PENALTY, PRETRAIN_RISK, TAU, Parameter

REPLICATES = 1024

LABEL_CORRELATION = Parameter(highest=0.9)
"""Of the noise of consecutive labels."""


def _relative(predicted: Any, measured: Any) -> Sides:
    """Both in units of what is measured, so that one tolerance fits all entries."""
    predicted, measured = np.asarray(predicted), np.asarray(measured)
    return predicted / measured, np.ones_like(measured)


@identity(
    "S0.spectra",
    "The named spectra follow their formulas, largest first, and have the trace they are given.",
    R"\lambda_j = j^{-a},\ e^{-b(j-1)},\ c,\ \text{spikes over a bulk},\ \text{two levels}",
    parameters={
        "exponent": DECAY.within(0.0, 2.0),
        "rate": Parameter(low=0.01, high=0.5, scale="log"),
        "level": Parameter(low=0.1, high=2.0, scale="log"),
        "trace": Parameter(low=0.1, high=10.0, scale="log"),
        "other_trace": Parameter(low=1.0, high=1.0, scale="log", lowest=0.5, highest=2.0),
    },
    tolerance=1e-12,
)
def s0_spectra(normal: Normal, exponent: float, rate: float, level: float, trace: float, other_trace: float) -> Sides:
    """Five spectra as they are and with their trace given, or `other_trace` times it: (10, 12)."""
    p, spikes = 12, np.exp(normal(3))
    made: list[tuple[Any, tuple[Any, ...], list[float]]] = [
        (spectra.isotropic, (level,), [level] * p),
        (spectra.power_law, (exponent,), [(j + 1.0) ** -exponent for j in range(p)]),
        (spectra.exponential, (rate,), [np.exp(-rate) ** j for j in range(p)]),
        (spectra.spiked, (spikes, level), sorted([*spikes, *[level] * (p - 3)], reverse=True)),
        (spectra.bilevel, (4, 2 * level, level), [2 * level] * 4 + [level] * (p - 4)),
    ]
    predicted, measured = [], []
    for function, arguments, values in made:
        predicted += [function(p, *arguments), function(p, *arguments, trace=trace)]
        measured += [np.array(values), np.array(values) * other_trace * trace / sum(values)]
    return _relative(predicted, measured)


@identity(
    "S0.bed",
    "The test bed has the spectra, alignment and pretraining risk it is asked for, and a fine-tuning signal of 1.",
    R"\Omega \propto \Sigma_2^\alpha,\ \mathrm{tr}\,\Omega\Sigma_2 = 1,\ u^\top\Sigma_1u = R_\mathrm{pre}(\theta_1)",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "pretrain_decay": DECAY.within(0.0, 2.0),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_std": NOISE_STD.within(0.1, 10**0.5),
        "pretrain_risk": PRETRAIN_RISK.within(0.1, 1.0),
        "signal": Parameter(low=1.0, high=1.0, scale="log", lowest=0.5, highest=2.0),
    },
    tolerance=1e-12,
)
def s0_bed(
    normal: Normal,
    decay: float,
    pretrain_decay: float,
    alignment: float,
    noise_std: float,
    pretrain_risk: float,
    signal: float,
) -> Sides:
    """Σ₁, Σ₂, Ω, |u|, σ, the gap's mean and covariance, and both risks of θ₁."""
    ranks = 1.0 + np.arange(12)
    finetune, pretrain = ranks**-decay, ranks**-pretrain_decay
    problem = aligned_problem(
        finetune, alignment=alignment, noise_std=noise_std, pretrain_spectrum=pretrain, pretrain_risk=pretrain_risk
    )
    m, risks = moments(problem), problem.pretrained_risks
    spread = finetune**alignment
    spread, u = (
        signal * spread / (spread @ finetune),
        np.resize([1.0, -1.0], 12) * (pretrain_risk / pretrain.sum()) ** 0.5,
    )
    made = [np.diag(m.pretrain), np.diag(m.finetune), np.diag(m.second) - m.u**2, m.u, np.asarray(problem.gap_mean)]
    wanted = [pretrain, finetune, spread, u, -u]
    predicted = np.concatenate([*made, problem.gap_covariance.diagonal(), [m.noise_std, *risks]])  # type: ignore[union-attr]
    measured = np.concatenate([*wanted, spread, [noise_std, signal + u @ (finetune * u), pretrain_risk]])
    return _relative(predicted, measured)


SAMPLES = 2**17

UNIT_LAWS = {
    "gaussian": scipy.stats.norm(),
    "uniform": scipy.stats.uniform(-(3**0.5), 2 * 3**0.5),
    "student": scipy.stats.t(8, scale=(6 / 8) ** 0.5),
}
"""Laws with mean 0 and variance 1."""


def _shape(z: Any) -> Any:
    return z**2 * np.exp(-np.abs(z))


@statistical(
    "S0.designs",
    "Sampled designs, shifts and labels have the stated mean, variance and law.",
    R"x = \Sigma^{1/2}z,\quad \mathbb E z = 0,\ \mathbb E z^2 = 1,\ \mathbb E z^2e^{-|z|} = \kappa,\quad "
    R"y = X\theta_2^* + \varepsilon",
    parameters={
        "law": Parameter(low=0, high=3, scale="whole"),
        "variance": Parameter(low=0.1, high=10.0, scale="log"),
        "noise_std": NOISE_STD.within(0.1, 10**0.5),
        "lost": Parameter(highest=0.9),
    },
)
def s0_designs(normal: Normal, law: int, variance: float, noise_std: float, lost: float) -> Sides:
    """z, z² and z²e^{−|z|}, by which laws differ, of a design; z and z² of a shift, of noise and of a design in blocks.

    The shift is that of a wide task, the noise that of a long one; a share `lost` of the samples is set to zero.
    """
    name = list(LAWS)[law]
    expected = float(np.exp(-1.0)) if name == "rademacher" else UNIT_LAWS[name].expect(_shape, epsabs=1e-10)
    key, other = (wrap_key_data(jnp.asarray(np.abs(1e8 * normal(2)).astype(np.uint32))) for _ in range(2))
    flat = [np.full(size, 1.0) for size in (SAMPLES, 1)]
    wide, long = (TwoTaskProblem(one, variance * one, RandomShift(variance * one), noise_std) for one in flat)
    one, many = sample_task(key, wide, 1), sample_task(other, long, SAMPLES, law=name)
    x, noise = np.asarray(many.X)[:, 0], np.asarray(many.y - many.X @ many.theta_2_star)
    blocks = np.concatenate([np.ravel(block) for block in column_blocks(key, wide, 1)])
    kept = np.arange(SAMPLES) >= lost * SAMPLES
    z, shift, block = (
        kept * np.round(np.asarray(values) / variance**0.5, 12) for values in (x, one.theta_2_star, blocks)
    )
    noise = noise / noise_std
    measured = [z, z**2, _shape(z), shift, shift**2, noise, noise**2, block, block**2]
    means = np.stack([values.reshape(2048, -1).mean(axis=1) for values in measured], axis=-1)
    return np.array([0, 1, expected, 0, 1, 0, 1, 0, 1.0]), means


@identity(
    "S1",
    "Minimum norm, ridge, gradient flow and gradient descent from θ₁ are spectral filters of XXᵀ/n.",
    R"\hat\theta = \theta_1 + \tfrac1n X^\top U\,\mathrm{diag}(g(s))\,U^\top (y - X\theta_1)",
    source="paper 2506.01901 (estimators)",
    parameters=EXACT | {"speed": Parameter(low=0.1, high=1.9, highest=2.5)},
    tolerance=1e-9,
)
def s1(normal: Normal, **values: Any) -> Sides:
    """θ̂ of the four, of an average of ridge, and of gradient descent step by step."""
    exact = exact_instance(normal, **values)
    y, theta_1 = normal(len(exact.X)), np.asarray(exact.problem.pretrain_error)
    residual, descent = y - exact.X @ theta_1, exact.filters[-1]
    step_size, steps = float(descent.step_size), int(descent.steps)
    predicted = [fine_tune(exact.X, y, theta_1, filter) for filter in exact.filters]
    predicted.append(fine_tune(exact.X, y, theta_1, exact.tau * exact.filters[1]))
    predicted.append(gradient_descent(exact.X, y, theta_1, step_size=step_size, steps=steps))
    maps = [*exact.maps, exact.tau * exact.maps[1], exact.maps[-1]]
    return np.stack(predicted), np.stack([theta_1 + R @ residual for R in maps])


@identity(
    "S1.limits",
    "The filters have their limits where the eigenvalue is zero or tiny.",
    R"g(0) = 1/\lambda,\ t,\ \eta k,\quad g(0) = 0\ \text{for min-norm}",
    parameters={name: EXACT[name] for name in ("penalty", "time", "steps")}
    | {
        "step_size": Parameter(low=1e-3, high=1.9, scale="log"),
        "tiny": Parameter(low=1e-13, high=1e-3, scale="log"),
        "other_time": Parameter(low=1.0, high=1.0, scale="log", lowest=0.5, highest=2.0),
    },
    tolerance=1e-9,
)
def s1_limits(
    normal: Normal, penalty: float, time: float, steps: int, step_size: float, tiny: float, other_time: float
) -> Sides:
    """g at 0, `tiny` and 1, relative to what sums of powers give: flow by its series, descent step by step."""
    s = np.array([0.0, tiny, 1.0])
    small = [np.sum([time ** (j + 1) * (-at) ** j / scipy.special.factorial(j + 1) for j in range(12)]) for at in s[:2]]
    flow = np.array([*small, 1 - np.exp(-time)]) * other_time
    descent = sum(step_size * (1 - step_size * s) ** j for j in range(steps))
    filters = Ridge(penalty), GradientFlow(time), GradientDescent(step_size, steps)
    predicted, measured = np.stack([filter(s) for filter in filters]), np.stack([1 / (s + penalty), flow, descent])
    min_norm = MinNorm()(s[::2])
    return np.append(predicted / measured, min_norm), np.append(np.ones((3, 3)), [0.0, 1.0])


@identity(
    "S2",
    "Given X, bias² and variance on both domains are quadratic forms in the filter.",
    R"R(g) = c - 2\,b\cdot g + g^\top H g,\quad H = (P\circ Q)/n^2 + \sigma^2\mathrm{diag}(Q_{ii})/n^2",
    parameters=EXACT | {"noise_correlation": LABEL_CORRELATION},
    tolerance=1e-9,
)
def s2(normal: Normal, noise_correlation: float, **values: Any) -> Sides:
    """Bias² and variance, both domains, all filters, relative to R_ft(θ₁): (4, 2, 2)."""
    exact = exact_instance(normal, **values)
    noise, unit = autocorrelation(len(exact.X), noise_correlation), float(exact.forms.finetune.constant)
    by_forms = [[form(filter, exact.tau) for form in exact.forms] for filter in exact.filters]
    by_traces = [exact.moments.risks(exact.X, exact.tau * R, noise) for R in exact.maps]
    return np.array(by_forms) / unit, np.array(by_traces) / unit


KINDS = 6


@identity(
    "S2.covariances",
    "The quadratic form is the same however covariances are given, and for designs in blocks or stacks.",
    R"\Sigma = \mathrm{diag}(s),\ \Sigma \in \mathbb R^{p\times p},\ \Sigma = F^\top F/m,\ \Sigma = c\,\Sigma'",
    parameters={
        "decay": DECAY.within(0.0, 1.5),
        "fixed": EXACT["fixed"],
        "noise_std": NOISE_STD.within(0.1, 10**0.5),
        "pretrain_size": Parameter(low=0.1, high=1.0, scale="log"),
        "penalty": PENALTY.within(1e-2, 10.0),
        "other_penalty": Parameter(low=1.0, high=1.0, scale="log", lowest=0.5, highest=2.0),
    },
    tolerance=1e-9,
)
def s2_covariances(
    normal: Normal,
    decay: float,
    fixed: int,
    noise_std: float,
    pretrain_size: float,
    penalty: float,
    other_penalty: float,
) -> Sides:
    """Bias² and variance of ridge on both domains, and c = R(0), relative to R_ft(θ₁): (kinds, 2, 3)."""
    n, p = SIZES[0]
    predicted, measured = [], []
    for kind in range(KINDS):
        pretrain, finetune, spread = _covariances(normal, kind, decay)
        shift = FixedShift(normal(p)) if (kind + fixed) % 2 else RandomShift(spread)
        u = None if kind == 1 else pretrain_size * normal(p)
        problem = TwoTaskProblem(pretrain, finetune, shift, 1.0, u)
        X, m = normal(n, p), moments(problem)._replace(noise_std=noise_std)
        start = np.trace(m.second @ m.finetune)
        predicted.append(_ridge_by_forms(X, problem, noise_std, penalty, kind) / start)
        risks = m.risks(X, ridge_map(X, penalty * other_penalty))
        measured.append(np.hstack([risks, [[start], [m.u @ m.pretrain @ m.u]]]) / start)
    return np.array(predicted), np.array(measured)


def _ridge_by_forms(X: np.ndarray, problem: TwoTaskProblem, noise_std: float, penalty: float, kind: int) -> np.ndarray:
    """Bias², variance and c of both domains (2, 3), the design in blocks or the last of a stack for some kinds."""
    if kind == 0:
        forms = risk_forms(iter([X[:, :7], X[:, 7:]]), problem)
    else:
        forms = risk_forms(np.stack([X[::-1], X]) if kind == 4 else X, problem)
    predicted = []
    for form in forms:
        risk = form.with_noise_std(noise_std)(Ridge(penalty))
        predicted.append(np.array([risk.bias, risk.variance, form.constant]).reshape(3, -1)[:, -1])
    return np.array(predicted)


def _covariances(normal: Normal, kind: int, decay: float) -> list[Any]:
    """Σ₁, Σ₂ and Ω (p = 25): all diagonal, multiples of each other, all empirical, or mixed."""
    p = SIZES[0][1]
    spectrum = (1.0 + np.arange(p)) ** -decay
    features, dense, diagonal = normal(2, 30, p), dense_covariance(normal(p, p), decay), np.exp(normal(2, p))
    first, second = (Empirical(part) for part in features)
    return [
        [*diagonal, spectrum],
        [2 * spectrum, spectrum, np.full(p, 0.7)],
        [Empirical(1.5 * features[0]), first, second],
        [dense, second, spectrum],
        [dense, np.full(p, 1.3), first],
        [dense, first, 3 * dense],
    ][kind]


@statistical(
    "S2.sampled",
    "The quadratic form is the mean risk of weights actually fitted, whatever the law of the noise.",
    R"\mathbb E_{\delta,\varepsilon}\|\theta_\tau - \theta_2^*\|^2_{\Sigma_2} = R_\mathrm{ft}(\tau g)",
    parameters=EXACT | {"law": EXACT["fixed"], "noise_correlation": LABEL_CORRELATION},
)
def s2_sampled(normal: Normal, law: int, noise_correlation: float, **values: Any) -> Sides:
    """R_ft and R_pre of the weights fitted to each draw of shift and labels (replicates, 4, 2)."""
    exact = exact_instance(normal, **values)
    X, tau, m, delta = exact.X, exact.tau, exact.moments, shifts(normal, exact.problem, REPLICATES)
    noise = normal(len(X), REPLICATES)
    noise = np.linalg.cholesky(autocorrelation(len(X), noise_correlation)) @ (np.sign(noise) if law else noise)
    theta_1, y = np.repeat(m.u[:, None], REPLICATES, 1), X @ delta + m.noise_std * noise
    expected, realised = [], []
    for filter in exact.filters:
        theta = (1 - tau) * theta_1 + tau * np.asarray(fine_tune(X, y, theta_1, filter))
        miss = theta - delta
        expected.append([form(filter, tau).total for form in exact.forms])
        realised.append([np.sum(miss * (m.finetune @ miss), axis=0), np.sum(theta * (m.pretrain @ theta), axis=0)])
    return np.array(expected), np.moveaxis(np.array(realised), 2, 0)


@identity(
    "S3",
    "Along the ensemble the risk is a parabola; its vertex and the gain over τ = 1 are known.",
    R"\tau^* = b\cdot g / g^\top H g,\quad R(1) - R(\tau^*) = (1-\tau^*)^2\, g^\top H g",
    parameters=EXACT
    | EXTREMES
    | {"pretrain_size": Parameter(low=0.1, high=1.0, scale="log", lowest=1e-3, highest=10.0)},
    tolerance=1e-7,
)
def s3(normal: Normal, **values: Any) -> Sides:
    """τ* and the gain over τ = 1 relative to R_ft(θ₁), on both domains (4, 2, 2)."""
    exact = exact_instance(normal, **values)
    unit = float(exact.forms.finetune.constant)
    known, found = [], []
    for filter, R in zip(exact.filters, exact.maps):
        known.append([(form.optimal_tau(filter), form.along(filter).gain / unit) for form in exact.forms])
        _, slope, curvature = parabola(lambda tau, R=R: exact.totals(tau * R))
        tau = slope / curvature
        found.append(np.stack([tau, (curvature - 2 * slope + slope * tau) / unit], axis=-1))
    return np.array(known), np.array(found)


@identity(
    "S3.fitted",
    "So it is for weights that were fitted, from their two ends alone.",
    R"R(\tau) = \|\theta_1 - \theta^* + \tau(\hat\theta - \theta_1)\|^2",
    parameters=EXACT | {"bent": Parameter(highest=1.0)},
    tolerance=1e-9,
)
def s3_fitted(normal: Normal, bent: float, **values: Any) -> Sides:
    """Both risks of θ_τ in two ways, τ*, R(τ*) and the gain, for min-norm and ridge, relative to R(θ₁): (2, 2, 5).

    `bent` adds τ² times a vector to the segment.
    """
    exact = exact_instance(normal, **values)
    m, theta_2, tau = exact.moments, normal(exact.problem.p), exact.tau
    residual, zero = exact.X @ (theta_2 - m.u) + m.noise_std * normal(len(exact.X)), 0 * theta_2
    away = bent * normal(theta_2.size)
    domains = (
        (m.finetune, theta_2, exact.problem.finetune_covariance),
        (m.pretrain, zero, exact.problem.pretrain_covariance),
    )
    predicted, measured = [], []
    for R in exact.maps[:2]:
        theta = m.u + R @ residual
        risks = excess_risks(interpolate(m.u, theta, tau), exact.problem, zero, theta_2)
        for risk, (matrix, optimum, covariance) in zip(risks, domains):

            def at(t: float, theta: Any = theta, matrix: Any = matrix, optimum: Any = optimum) -> float:
                missed = (1 - t) * m.u + t * theta + t**2 * away - optimum
                return float(missed @ matrix @ missed)

            along = Parabola.of_steps(covariance, jnp.asarray(m.u - optimum), jnp.asarray(R @ residual))
            start, slope, curvature = parabola(at)
            best = slope / curvature
            numbers = np.array([risk, along(tau).total, along.optimal_risk, along.gain]) / start
            predicted.append([*numbers, along.optimal_tau])
            measured.append([*np.array([at(tau), at(tau), at(best), at(1.0) - at(best)]) / start, best])
    return np.array(predicted), np.array(measured)


@identity(
    "S4.attained",
    "The oracle filter attains its lower bound, which is the least risk of all spectral filters.",
    R"R(H^{-1}b) = \min_g R(g) = c - b^\top H^{-1} b",
    parameters=EXACT | {"off": Parameter(highest=1.0)},
    tolerance=1e-7,
)
def s4_attained(normal: Normal, off: float, **values: Any) -> Sides:
    """[R(g*) by traces, least R_ft by normal equations among the features], [R_pre(g*) by traces], relative to R(θ₁).

    `off` changes the oracle filter by that share.
    """
    exact = exact_instance(normal, **values)
    X, (finetune, pretrain) = exact.X, exact.forms
    _, U = np.linalg.eigh(X @ X.T / len(X))
    found = [
        exact.totals(X.T @ (U * (1 + off) * np.asarray(form.oracle_filter().values)) @ U.T / len(X))[domain]
        / float(form.constant)
        for domain, form in enumerate(exact.forms)
    ]
    least = primal(X, exact.moments).least_risk() / np.trace(exact.moments.second @ exact.moments.finetune)
    bounds = [float(form.oracle_risk() / form.constant) for form in (finetune, finetune, pretrain)]
    return np.array(bounds), np.array([found[0], least, found[1]])


@inequality(
    "S4",
    "No spectral filter has a lower fine-tuning risk than the oracle filter H⁻¹b.",
    R"R(g) \ge c - b^\top H^{-1} b",
    parameters=EXACT | {"beyond_spectral": Parameter(highest=1.0)},
    tolerance=1e-9,
)
def s4(normal: Normal, beyond_spectral: float, **values: Any) -> Sides:
    """R_ft of the four filters at τ, of four arbitrary ones, and of one moved towards the best linear estimator."""
    exact = exact_instance(normal, **values)
    X, form, n = exact.X, exact.forms.finetune, len(exact.X)
    s, U = np.linalg.eigh(X @ X.T / n)
    s = np.maximum(s, 1e-12 * s[-1])  # more samples than features

    def spectral_map(g: np.ndarray) -> np.ndarray:
        return X.T @ (U * g) @ U.T / n

    oracle = spectral_map(np.asarray(form.oracle_filter().values))
    maps = [
        *(exact.tau * exact.maps),
        *(spectral_map(factors / s) for factors in np.exp(normal(4, n))),
        (1 - beyond_spectral) * oracle + beyond_spectral * exact.moments.best_map(X),
    ]
    risks = np.array([exact.totals(R)[0] for R in maps])
    return float(form.oracle_risk() / form.constant), risks / float(form.constant)


@identity(
    "S5",
    "Leave-one-out residuals of an ensemble of ridge need no refitting, the penalty nλ held fixed.",
    R"r_i - \tau\,\bigl(r_i - (Gr)_i/G_{ii}\bigr),\quad G = (XX^\top + n\lambda I)^{-1}",
    parameters={name: EXACT[name] for name in ("decay", "noise_std", "penalty", "tau")}
    | {"size": Parameter(low=0, high=1, scale="whole")}
    | {"refit_ratio": Parameter(low=1.0, high=1.0, scale="log", lowest=0.25, highest=4.0)},
    tolerance=1e-8,
)
def s5(
    normal: Normal, size: int, decay: float, noise_std: float, penalty: float, tau: float, refit_ratio: float
) -> Sides:
    """Every sample left out in turn, at no penalty and at `penalty`; the sum of squares keeps its penalty nλ."""
    n, p = SIZES[size]
    X = normal(n, p) * (1.0 + np.arange(p)) ** (-decay / 2)
    theta_1 = normal(p)
    y = X @ (theta_1 + normal(p)) + noise_std * normal(n)
    refitted = np.empty((2, n))
    for i in range(n):
        rest, labels = np.delete(X, i, 0), np.delete(y, i)
        for row, total in enumerate((0.0, n * penalty * refit_ratio)):
            dual = np.linalg.solve(rest @ rest.T + total * np.eye(n - 1), labels - rest @ theta_1)
            refitted[row, i] = y[i] - X[i] @ (theta_1 + tau * rest.T @ dual)
    return np.asarray(leave_one_out(X, y, theta_1, np.array([0.0, penalty]), tau)), refitted


@identity(
    "S5.select",
    "Selection reports the minimum of that error over λ and τ, and its standard errors.",
    R"\min_{\lambda,\tau}\ \tfrac1n\textstyle\sum_i(r_i - \tau d_i(\lambda))^2,\quad "
    R"\mathrm{se}(\tau^*) = (\sum d_i^2 r_{(i)}^2)^{1/2}/\sum d_i^2",
    parameters={
        "decay": DECAY.within(0.0, 1.5),
        "noise_std": NOISE_STD.within(0.1, 10**0.5),
        "held_out": Parameter(low=0, high=1, scale="whole"),
        "other_tau": Parameter(low=1.0, high=1.0, scale="log", lowest=0.5, highest=2.0),
    },
    tolerance=1e-5,
)
def s5_select(normal: Normal, decay: float, noise_std: float, held_out: int, other_tau: float) -> Sides:
    """Every number of a selection, by refitting; on validation samples if `held_out`."""
    n, p = SIZES[0]
    scale = (1.0 + np.arange(p)) ** (-decay / 2)
    X, X_val, theta_1, shift = normal(n, p) * scale, normal(n, p) * scale, normal(p), normal(p)
    y, y_val = (rows @ (theta_1 + shift) + noise_std * normal(n) for rows in (X, X_val))
    penalties, taus = np.trace(X @ X.T) / n**2 * np.array([0.01, 0.1, 1.0, 10.0]), np.array([0.0, 0.4, 0.8, 1.2])
    residual = (y_val - X_val @ theta_1) if held_out else (y - X @ theta_1)

    def moved(penalty: float) -> np.ndarray:
        if held_out:
            return X_val @ ridge_map(X, penalty) @ (y - X @ theta_1)
        # The sum of squares keeps its penalty nλ, so a mean over n − 1 has nλ/(n−1).
        refit = [ridge_map(np.delete(X, i, 0), n * penalty / (n - 1)) for i in range(n)]
        return np.array([X[i] @ refit[i] @ np.delete(y - X @ theta_1, i) for i in range(n)])

    found = select(X, y, theta_1, penalties, taus, (X_val, y_val) if held_out else None)
    predicted = [*found[5:], *found[2].ravel(), *found[3].ravel(), 1 + found[4].mean()]
    predicted += list(default_penalties(X)[[1, -1]] / penalties[2])
    measured = _selection(residual, moved, penalties, taus, found.best_penalty, other_tau)
    return _relative(np.array(predicted), np.array([*measured, 1e-6, 1e2]))


def _selection(
    residual: np.ndarray, moved: Any, penalties: np.ndarray, taus: np.ndarray, chosen: float, off: float
) -> list:
    """The best λ, then the fields of `Selection` at the penalty that was `chosen`; τ* by a factor `off`."""
    n = residual.size

    def least(logarithm: float) -> float:
        d = moved(np.exp(logarithm))
        return float(np.mean((residual - (residual @ d) / (d @ d) * d) ** 2))

    grid = [least(value) for value in np.log(penalties)]
    best, at = int(np.argmin(grid)), float(np.log(penalties[int(np.argmin(grid))]))
    if 0 < best < 3:
        bounds = tuple(np.log(penalties[[best - 1, best + 1]]))
        refined = scipy.optimize.minimize_scalar(least, bounds=bounds, method="bounded", options={"xatol": 1e-9})
        at = float(refined.x) if refined.fun < grid[best] else at
    # where the valley is flat, the penalty that was chosen is as good if its error is
    at = float(np.log(chosen)) if least(np.log(chosen)) <= (1 + 1e-9) * least(at) else at
    d = moved(chosen)
    tau = off * (residual @ d) / (d @ d)
    squares = (residual - tau * d) ** 2
    gain = (residual - d) ** 2 - squares
    tau_error = np.sqrt(d**2 @ squares) / (d @ d)
    surface = np.array([[(residual - t * moved(penalty)) ** 2 for t in taus] for penalty in penalties])
    paired = surface - squares
    near = paired.mean(-1) <= paired.std(-1, ddof=1) / n**0.5
    errors = [part.std(ddof=1) / n**0.5 for part in (squares, gain)]
    fields = [np.exp(at), tau, tau_error, squares.mean(), errors[0], np.mean(residual**2), gain.mean(), errors[1]]
    return [*fields, *surface.mean(-1).ravel(), *(surface.std(-1, ddof=1) / n**0.5).ravel(), 1 + near.mean()]


@statistical(
    "S5.unbiased",
    "The mean squared leave-one-out residual is unbiased for the prediction error at n − 1 samples.",
    R"\mathbb E\,\tfrac1n\textstyle\sum_i r_{(i)}^2 = \mathbb E\,R_\mathrm{ft}^{(n-1)} + \sigma^2",
    parameters={
        "decay": DECAY.within(0.0, 1.5),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_std": NOISE_STD.within(0.1, 10**0.5),
        "penalty": PENALTY.within(1e-2, 10.0),
        "tau": TAU.within(-0.5, 1.5),
        "repeated": Parameter(highest=0.99),
    },
)
def s5_unbiased(
    normal: Normal, decay: float, alignment: float, noise_std: float, penalty: float, tau: float, repeated: float
) -> Sides:
    """Samples are independent unless `repeated`, the correlation of consecutive rows of X, is not 0."""
    n, p, replicates = 6, 12, 2048
    problem = aligned_problem(spectra.power_law(p, decay), alignment=alignment, noise_std=noise_std)
    mixing = np.linalg.cholesky(autocorrelation(n, repeated))
    X = np.asarray(problem.finetune_covariance.colour(mixing @ normal(replicates, n, p)))
    delta = np.asarray(problem.gap_covariance.colour(normal(replicates, p)))  # type: ignore[union-attr,arg-type]
    y = np.einsum("rnp,rp->rn", X, delta) + noise_std * normal(replicates, n)
    return _left_out(problem, *(jnp.asarray(part) for part in (X, y, penalty, tau)))


@eqx.filter_jit
def _left_out(problem: TwoTaskProblem, X: Array, y: Array, penalty: Array, tau: Array) -> Sides:
    """For each design (R,): R_ft + σ² of the fit to all samples but the last; the mean squared residual left out."""
    n = X.shape[1]
    one_less = Ridge(n * penalty / (n - 1))

    def one(design: tuple[Array, Array]) -> Sides:
        X, y = design
        residuals = leave_one_out(X, y, jnp.zeros(problem.p), penalty, tau)
        return risk_forms(X[:-1], problem).finetune(one_less, tau).total, jnp.mean(residuals**2)

    # Not vmap: two eigendecompositions of batches in one program can starve each other of XLA's threads.
    exact, estimate = jax.lax.map(one, (X, y))
    return exact + problem.noise_std**2, estimate
