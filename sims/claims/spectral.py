"""§1 as claims: spectral fine-tuning and its exact risk (docs, S1–S5)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import Ridge, TwoTaskProblem, aligned_problem, fine_tune, leave_one_out, risk_forms, spectra
from sims.claims import Normal, Sides, identity, inequality, statistical
from sims.claims.problems import EXACT, EXTREMES, SIZES, autocorrelation, exact_instance, parabola, shifts
from sims.parameters import ALIGNMENT, DECAY, NOISE_STD, PENALTY, TAU, Parameter

REPLICATES = 1024

LABEL_CORRELATION = Parameter(highest=0.9)
"""Of the noise of consecutive labels."""


@identity(
    "S1",
    "Minimum norm, ridge, gradient flow and gradient descent from θ₁ are spectral filters of XXᵀ/n.",
    R"\hat\theta = \theta_1 + \tfrac1n X^\top U\,\mathrm{diag}(g(s))\,U^\top (y - X\theta_1)",
    source="paper 2506.01901 (estimators)",
    parameters=EXACT | {"speed": Parameter(low=0.1, high=1.9, highest=2.5)},
    tolerance=1e-9,
)
def s1(normal: Normal, **values: Any) -> Sides:
    exact = exact_instance(normal, **values)
    y, theta_1 = normal(len(exact.X)), np.asarray(exact.problem.pretrain_error)
    closed_form = np.stack([fine_tune(exact.X, y, theta_1, filter) for filter in exact.filters])
    return closed_form, theta_1 + exact.maps @ (y - exact.X @ theta_1)


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
    parameters={name: EXACT[name] for name in ("size", "decay", "noise_std", "penalty", "tau")}
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
