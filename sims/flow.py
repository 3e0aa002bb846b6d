"""FLOW measured on finite samples: weights from the pretrained losses, weighted fine-tuning, both risks (docs, §4).

The weights e^{−r²/T} depend on the labels, so the label noise is not averaged by a formula here, as it is where the
weights are fixed (docs, S2). Every replicate samples design, shift and noise; given that sample its risks are exact, as
quadratic forms in the filter from one eigendecomposition of W^{1/2}KW^{1/2} (docs, F5); means over replicates carry
standard errors. A sample's loss is r², r = y − Xθ₁, without ½.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import xarray as xr
from jax import Array

from linfit import (
    Filter,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Pair,
    Parabola,
    RandomShift,
    Ridge,
    RiskForm,
    TwoTaskProblem,
    excess_risks,
    fine_tune,
    flow_weights,
    sample_task,
)
from linfit import gradient_descent as descend
from linfit.covariance import Covariance
from linfit.design import Task
from linfit.filters import Several
from linfit.internal.checks import count, non_negative
from linfit.internal.linear_algebra import eigh, gram
from linfit.weighting import effective_sample_size, effective_step, median_temperature, robust_weights
from sims.estimate import mean_and_error, means_and_errors, replicate
from sims.real_data import digits_split, over_splits, ridge_from_zero
from theory import flow as theory
from theory.frontier import pareto

__all__ = [
    "DEVIATIONS", "WEIGHTINGS", "along_tau", "estimate", "form_given_loss", "monte_carlo", "sample_deviating_task",
    "task_forms", "tilted",
]  # fmt: skip

Weighting = Callable[[Array], Array]
"""Sample weights (n,) from the pretrained losses (n,)."""
Weightings = dict[str, Weighting]
Names = tuple[str, ...]

WEIGHTINGS: Weightings = {"unweighted": jnp.ones_like, "FLOW": flow_weights}
"""Unweighted fine-tuning, and FLOW at the median temperature."""

RISKS = ("finetune", "pretrain", "hardest")

HARDEST = 0.1
"""Share of the test points that counts as hardest, as in Table 5 of paper 2502.02797."""


def tilted(tilt: float) -> Weighting:
    """Weights e^{−tilt·ℓ/median}: 1 is FLOW, 0 unweighted, larger a lower temperature; negative favours hard samples.

    Negative tilts, the distributionally robust baseline, have mean one; the others are as they are, at most 1.

    >>> from sims.flow import tilted
    >>> losses = jnp.array([1.0, 2.0, 3.0])
    >>> tilted(2.0)(losses).round(3), tilted(-1.0)(losses).round(3)
    (Array([0.368, 0.135, 0.05 ], dtype=float64), Array([0.559, 0.922, 1.519], dtype=float64))
    """
    if not np.isfinite(tilt):
        raise ValueError(f"tilt must be finite, got {tilt}")
    if tilt < 0:
        return lambda losses: robust_weights(losses, median_temperature(losses) / -tilt)
    if tilt == 0:
        return jnp.ones_like
    return lambda losses: flow_weights(losses, median_temperature(losses) / tilt)


DEVIATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "gaussian": lambda key, noise, z: noise,
    # a tenth of the labels has nine tenths of the variance
    "outliers": lambda key, noise, z: noise * jnp.where(jax.random.bernoulli(key, 0.1, noise.shape), 3.0, 1 / 3),
    # no noise but what a linear model cannot fit, z = Δᵀx standardised; uncorrelated with Gaussian x
    "misfit": lambda key, noise, z: (z**2 - 1) / 2**0.5,
}
"""What keeps y from being xᵀθ₂*: always of mean 0 and variance σ²; from a key, standard normals ε/σ (n,) and z (n,)."""


def sample_deviating_task(
    key: Array, problem: TwoTaskProblem, n: int, law: str = "gaussian", deviation: str = "gaussian"
) -> Task:
    """A task whose labels deviate from Xθ₂* in one of the ways of `DEVIATIONS`; arguments as for `linfit.sample_task`.

    >>> from linfit import aligned_problem, spectra
    >>> from sims.flow import DEVIATIONS, sample_deviating_task
    >>> problem = aligned_problem(spectra.power_law(5), noise_std=2.0)
    >>> tasks = [sample_deviating_task(jax.random.key(0), problem, 100_000, deviation=name) for name in DEVIATIONS]
    >>> [round(float(jnp.std(task.y - task.X @ task.theta_2_star)), 1) for task in tasks]
    [2.0, 2.0, 2.0]
    """
    if deviation not in DEVIATIONS:
        raise ValueError(f"deviation must be one of {', '.join(DEVIATIONS)}, got {deviation!r}")
    task_key, deviation_key = jax.random.split(key)
    task = sample_task(task_key, problem, n, law)
    clean, gap = task.X @ task.theta_2_star, task.theta_2_star - task.theta_1
    std = jnp.where(problem.noise_std > 0, problem.noise_std, 1)
    z = task.X @ gap / jnp.sqrt(problem.finetune_covariance.squared_norm(gap))
    return task._replace(y=clean + problem.noise_std * DEVIATIONS[deviation](deviation_key, (task.y - clean) / std, z))


# With rows W^{1/2}X and residual W^{1/2}r, weighted least squares is ordinary least squares, and the decomposition
# W^{1/2}KW^{1/2} = U diag(s) Uᵀ (n > p: XᵀWX/n = V diag(s) Vᵀ) makes the fine-tuned weights linear in the filter,
#     θ̂ = θ₁ + D g,   D = (1/n) XᵀW^{1/2}U diag(UᵀW^{1/2}r)   or   V diag(VᵀXᵀWr)/n,
# and so ‖θ̂ − θ*‖²_Σ = ‖a + Dg‖²_Σ with a = θ₁ − θ*: c = aᵀΣa, b = −DᵀΣa, H = DᵀΣD.
def task_forms(task: Task, problem: TwoTaskProblem, sample_weights: Array) -> Pair[RiskForm]:
    """Both risks of every filter fitted to the labels of one task, as quadratic forms (ours).

    The label noise is part of the task: it is in the "bias" of the forms, and their variance is 0.

    >>> from linfit import Ridge, aligned_problem, excess_risks, fine_tune, sample_task, spectra
    >>> from sims.flow import task_forms
    >>> problem = aligned_problem(spectra.power_law(40))
    >>> task, weights = sample_task(jax.random.key(0), problem, 15), jnp.linspace(0.1, 1, 15)
    >>> theta = fine_tune(task.X, task.y, task.theta_1, Ridge(0.3), weights)
    >>> risks = excess_risks(theta, problem, 0 * theta, task.theta_2_star)
    >>> bool(jnp.isclose(task_forms(task, problem, weights).finetune(Ridge(0.3)).total, risks.finetune, rtol=1e-12))
    True
    """
    n, p = task.X.shape
    root = jnp.sqrt(sample_weights)
    rows, residual = root[:, None] * task.X, root * (task.y - task.X @ task.theta_1)
    if n <= p:
        eigenvalues, vectors = eigh(gram(rows) / n)
        directions = rows.T @ vectors * (vectors.T @ residual / n)
    else:
        eigenvalues, vectors = eigh(gram(rows.T) / n)
        directions = vectors * (vectors.T @ (rows.T @ residual) / n)
    eigenvalues = jnp.maximum(eigenvalues, 0)

    def form(covariance: Covariance, start: Array) -> RiskForm:
        weighed, noiseless = covariance.apply(start), jnp.zeros_like(eigenvalues)
        curvature = covariance.gram(directions.T)
        return RiskForm(eigenvalues, start @ weighed, -weighed @ directions, curvature, noiseless, jnp.zeros(()))

    return Pair(
        form(problem.finetune_covariance, task.theta_1 - task.theta_2_star),
        form(problem.pretrain_covariance, task.theta_1),
    )


# On a Gaussian test point the pretrained residual r = xᵀΔ + ε and the error xᵀh, h = θ₂* − θ̂, are jointly Gaussian,
# with E r² = v = c + σ² and E r xᵀh = ΔᵀΣh = c − b·g. Given r, xᵀh has mean r(c − b·g)/v and the same variance as
# ever, so
#     E[(xᵀh)² | r² in a range] = R(g) + (m − 1)(c − b·g)²/v,   m = E[r²/v | r²/v in that range].
def form_given_loss(form: RiskForm, noise_std: Array, low: float, high: float) -> RiskForm:
    """R_ft on Gaussian test points whose pretrained loss lies between two quantiles, as a form of one task (ours).

    Args:
        form: the fine-tuning form of `task_forms`.
        noise_std: of the labels of the test points, where they are ranked; the error is measured without it.
        low: quantile in [0, 1], below `high`.
        high: quantile in [0, 1]; 0.9 and 1 are the hardest tenth.

    >>> from linfit import Ridge, aligned_problem, sample_task, spectra
    >>> from sims.flow import form_given_loss, task_forms
    >>> problem = aligned_problem(spectra.power_law(40))
    >>> form = task_forms(sample_task(jax.random.key(0), problem, 15), problem, jnp.ones(15)).finetune
    >>> parts = [form_given_loss(form, problem.noise_std, *edges)(Ridge(0.3)).total for edges in ((0, 0.7), (0.7, 1))]
    >>> bool(jnp.isclose(0.7 * parts[0] + 0.3 * parts[1], form(Ridge(0.3)).total))
    True
    """
    excess = (conditional_square(low, high) - 1) / (form.constant + noise_std**2)
    return dataclasses.replace(
        form,
        constant=form.constant + excess * form.constant**2,
        linear=form.linear + excess * form.constant * form.linear,
        bias_quadratic=form.bias_quadratic + excess * jnp.outer(form.linear, form.linear),
    )


def conditional_square(low: float, high: float) -> float:
    """E[z² | z² between its quantiles low and high], z standard normal."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"low and high must be quantiles with 0 ≤ low < high ≤ 1, got {low} and {high}")
    # E z²1{z² ≤ q} = P(χ²₃ ≤ q)
    edges = scipy.stats.chi2.ppf([low, high], 1)
    return float(np.diff(scipy.stats.chi2.cdf(edges, 3))[0] / (high - low))


def _losses(task: Task) -> Array:
    """Pretrained losses r² (n,)."""
    return (task.y - task.X @ task.theta_1) ** 2


def measure_once(
    key: Array, problem: TwoTaskProblem, n: int, weightings: Weightings, filter: Filter, law: str, deviations: Names
) -> dict[str, Array]:
    """One task with each deviation, fine-tuned with every weighting: (deviation, weighting, risk, filter)."""
    tasks = [sample_deviating_task(key, problem, n, law, deviation) for deviation in deviations]

    def with_labels(y: Array) -> dict[str, Array]:
        task = tasks[0]._replace(y=y)

        def with_weights(weights: Array) -> dict[str, Array]:
            finetune, pretrain = task_forms(task, problem, weights)
            forms = (finetune, pretrain, form_given_loss(finetune, problem.noise_std, 1 - HARDEST, 1.0))
            parabolas = [form.along(filter) for form in forms]
            return {
                "constant": jnp.stack([form.constant for form in forms]),
                "slope": jnp.stack([parabola.slope for parabola in parabolas]),
                "curvature": jnp.stack([parabola.curvature for parabola in parabolas]),
                "step": effective_step(weights),
                "share": effective_sample_size(weights) / n,
            }

        return jax.lax.map(with_weights, jnp.stack([weighting(_losses(task)) for weighting in weightings.values()]))

    return jax.lax.map(with_labels, jnp.stack([task.y for task in tasks]))


def monte_carlo(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    weightings: Weightings,
    filter: Filter,
    names: np.ndarray,
    replicates: int,
    law: str = "gaussian",
    deviations: Names = ("gaussian",),
) -> xr.Dataset:
    """Risks of weighted fine-tuning over random designs, shifts and noise, for every weighting and filter.

    Args:
        key: replicate i uses `fold_in(key, i)`.
        problem: where tasks are sampled.
        n: samples.
        weightings: by name; all see the same tasks.
        filter: with one hyperparameter axis.
        names: coordinate values of that axis.
        replicates: at least 2.
        law: of the design, see `linfit.design.LAWS`.
        deviations: names in `DEVIATIONS`, on the same designs and shifts.

    Along the ensemble every risk of a replicate is the parabola constant − 2τ·slope + τ²·curvature; these are stored
    one by one, dimensions (replicate, deviation, weighting, risk, filter), for `along_tau`. Risks are "finetune",
    "pretrain" and "hardest", R_ft on the tenth of the test points with the largest pretrained loss (for Gaussian test
    points and noise). `step`, the factor on the step size, and `share`, the effective share (Σw)²/nΣw² of the samples,
    are (replicate, deviation, weighting).

    >>> from linfit import GradientFlow, aligned_problem, spectra
    >>> from sims.flow import WEIGHTINGS, along_tau, estimate, monte_carlo
    >>> times, problem = np.array([1.0, 10.0]), aligned_problem(spectra.power_law(30))
    >>> data = monte_carlo(jax.random.key(0), problem, 10, WEIGHTINGS, GradientFlow(times), times, 20)
    >>> mean, error = estimate(along_tau(data.sel(deviation="gaussian", risk="pretrain"), 0.5))
    >>> mean.dims, bool((error > 0).all())
    (('weighting', 'filter'), True)
    """
    replicates = count("replicates", replicates, minimum=2)
    measure = partial(
        measure_once, problem=problem, n=n, weightings=weightings, filter=filter, law=law, deviations=deviations
    )
    samples = replicate(measure, key, replicates, "FLOW")
    dims = ("replicate", "deviation", "weighting", "risk", "filter")
    variables = {name: (dims[: values.ndim], values) for name, values in samples.items()}
    coordinates = dict(zip(dims[1:], (list(deviations), list(weightings), list(RISKS), np.asarray(names))))
    attributes = {"n": n, "p": problem.p, "noise_std": float(problem.noise_std), "law": law, "replicates": replicates}
    return xr.Dataset(variables, coordinates, attributes)


def along_tau(data: xr.Dataset, tau: xr.DataArray | float = 1.0) -> xr.DataArray:
    """Risk of θ_τ in every replicate."""
    return data.constant - 2 * tau * data.slope + tau**2 * data.curvature


def estimate(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Mean over replicates and its standard error; give it a difference to get that of a paired comparison."""
    return values.mean("replicate"), values.std("replicate", ddof=1) / values.sizes["replicate"] ** 0.5


def measure_paths(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    *,
    tilts: Sequence[float],
    times: np.ndarray,
    penalties: np.ndarray,
    replicates: int,
) -> xr.Dataset:
    """`monte_carlo` of all tilts and deviations, along training and the ridge path; `along` selects one of them.

    Weightings are "unweighted", "FLOW", "tilt c" and "FLOW, mean one".
    """
    names = {0.0: "unweighted", 1.0: "FLOW"}
    weightings: Weightings = {names.get(float(c), f"tilt {c:g}"): tilted(c) for c in tilts}
    weightings["FLOW, mean one"] = lambda losses: flow_weights(losses, normalisation="mean")
    filter = Several((GradientFlow(times), Ridge(penalties), MinNorm()))
    values = np.concatenate([times, penalties, [0.0]])
    data = monte_carlo(key, problem, n, weightings, filter, values, replicates, deviations=tuple(DEVIATIONS))
    sizes = {"time": len(times), "penalty": len(penalties), "end": 1}
    return data.assign_coords(family=("filter", np.repeat(list(sizes), list(sizes.values()))))


def along(data: xr.Dataset, family: str) -> xr.Dataset:
    """The part of `measure_paths` that is gradient flow ("time"), ridge ("penalty") or the "end" of both."""
    return data.isel(filter=data.family.values == family).drop_vars("family").rename(filter=family)


_KAPPAS = np.concatenate([[0.0], np.geomspace(0.02, 50, 60)])


def _best_averages(parabolas: Pair[Parabola], weights: np.ndarray = _KAPPAS) -> Pair[Array]:
    """R_ft and R_pre of the best member and τ in [0, 1] for each R_ft + κR_pre, κ of `weights`; parabolas (member,)."""
    kappa = weights[:, None]
    both = jax.tree.map(lambda finetune, pretrain: finetune + kappa * pretrain, *parabolas)
    tau = jnp.clip(both.optimal_tau, 0, 1)
    best = jnp.argmin(both(tau).total, axis=-1)
    return parabolas.map(lambda parabola: parabola(tau).total[np.arange(len(weights)), best])


def sampled_curves(data: xr.Dataset) -> dict[str, Pair[Array]]:
    """The mean risks of each method along its hyperparameter, from one deviation of `measure_paths`."""
    mean = data.mean("replicate")

    def parabolas(family: str, weighting: str) -> Pair[Parabola]:
        part, none = along(mean, family).sel(weighting=weighting), jnp.zeros(())
        pair = Pair(*(part.sel(risk=risk) for risk in Pair._fields))
        return pair.map(lambda risk: Parabola(risk.constant.values, risk.slope.values, risk.curvature.values, none))

    def curve(family: str, weighting: str, tau: float | np.ndarray = 1.0) -> Pair[Array]:
        return parabolas(family, weighting).map(lambda parabola: parabola(tau).total)

    return {
        "averaging": curve("end", "unweighted", np.linspace(0, 1, 61)),
        "early stopping": curve("time", "unweighted"),
        "L2 to init": curve("penalty", "unweighted"),
        "FLOW": curve("time", "FLOW"),
        "FLOW, T = 4 × median": curve("time", "tilt 0.25"),
        "FLOW + ridge": curve("penalty", "FLOW"),
        "FLOW + averaging": _best_averages(parabolas("time", "FLOW")),
        "early stopping + averaging": _best_averages(parabolas("time", "unweighted")),
    }


def sampled_frontier(key: Array, problem: TwoTaskProblem, replicates: int, weights: np.ndarray) -> Pair[Array]:
    """The Pareto frontier at κ of `weights` of the shifts that `monte_carlo` samples from the same key, Σ diagonal."""
    shifts = replicate(lambda key: sample_deviating_task(key, problem, 1).theta_2_star, key, replicates, "shifts")
    return pareto(dataclasses.replace(problem, shift=RandomShift(np.mean(shifts**2, axis=0))), weights)


def population_curves(rho: float, block: np.ndarray) -> dict[str, Pair[Array]]:
    """The methods of `sampled_curves` in the setting of Theorem 7.2, L2 to zero, and the lower bound.

    θ₁* is as far from the origin as from θ₂*, at a right angle to the plane.
    """
    problem = theory.two_task_problem(rho, block, p=3)
    from_zero = dataclasses.replace(problem, pretrain_error=jnp.array([0.0, 0.0, -1.0]))
    times, penalties, tau = np.geomspace(1e-2, 1e4, 121), np.geomspace(1e-4, 1e4, 121), np.linspace(0, 1, 61)

    def curve(filter: Filter, temperature: float | None = np.inf, problem: TwoTaskProblem = problem) -> Pair[Array]:
        return theory.trajectory(problem, filter, temperature).risks

    def averaged(temperature: float | None) -> Pair[Array]:
        moved, gap = theory.trajectory(problem, GradientFlow(times), temperature).moved, jnp.array([-1.0, 0.0, 0.0])
        finetune = Parabola.of_steps(problem.finetune_covariance, -gap, moved)
        return _best_averages(Pair(finetune, Parabola.of_steps(problem.pretrain_covariance, 0 * gap, moved)))

    return {
        "averaging": curve(tau * MinNorm()),
        "early stopping": curve(GradientFlow(times)),
        "L2 to init": curve(Ridge(penalties)),
        "L2 to zero": curve(Ridge(penalties), problem=from_zero),
        "FLOW": curve(GradientFlow(times), None),
        "FLOW, T = 4 × median": curve(GradientFlow(times), 4 * theory.MEDIAN),
        "FLOW + ridge": curve(Ridge(penalties), None),
        "FLOW + averaging": averaged(None),
        "early stopping + averaging": averaged(np.inf),
        "lower bound": pareto(problem, np.geomspace(1e-4, 1e4, 121)),
    }


def _sample_iterates(
    key: Array, problem: TwoTaskProblem, n: int, runs: Sequence[tuple[float, float]], steps: int, replicates: int
) -> np.ndarray:
    """θ_k along gradient descent on n samples, weighted with e^{−r²/T}: (replicates, runs, steps + 1, p).

    `runs` are (temperature, step size), T = ∞ for no weights, all on the same samples.
    """

    def paths(key: Array) -> Array:
        task = sample_task(key, problem, n)

        def run(setting: Array) -> Array:
            weights = flow_weights(_losses(task), setting[0])

            def step(theta: Array, _: None) -> tuple[Array, Array]:
                return descend(task.X, task.y, theta, step_size=setting[1], steps=1, sample_weights=weights), theta

            return jax.lax.scan(step, task.theta_1, None, length=steps + 1)[1]

        return jax.lax.map(run, jnp.array(runs))

    return np.asarray(replicate(paths, key, replicates, "iterates"))


def two_task_training(key: Array, rho: float, block: np.ndarray, steps: int, n: int, replicates: int) -> xr.Dataset:
    """Both errors and their sum along training in the setting of Theorem 7.2, `theory` and `sampled` on n samples.

    Dimensions (run, error, step); a run has a temperature and a step size, on the loss with ½: twice the paper's η.
    """
    problem, grid = theory.two_task_problem(rho, block, p=4), np.arange(steps + 1)
    best, median = theory.best_flow(rho, block), float(theory.median_temperature(1.0))
    coldest = float(theory.temperature_from_beta(best.beta, rho))
    mean_weight = float(theory.mean_weight(1.0, median))

    def weighted(temperature: float) -> Pair[Array]:
        iterates = theory.flow_iterates(rho, theory.beta_from_temperature(temperature, rho), grid)
        return theory.errors(iterates, rho, block)

    predicted = {
        "unweighted": theory.errors(theory.unweighted_iterates(rho, grid), rho, block),
        "FLOW": weighted(median),
        "FLOW at its best": weighted(coldest),
        "FLOW, small steps": theory.trajectory(problem, GradientDescent(1.0, grid), median).risks,
    }
    settings = [(np.inf, 1.0), (median, 1 / mean_weight), (coldest, 1 / float(theory.mean_weight(1.0, coldest)))]
    theta = _sample_iterates(key, problem, n, [*settings, (median, 1.0)], steps, replicates)
    sampled = excess_risks(theta, problem, np.zeros(4), -np.eye(4)[0])

    def stacked(risks: Pair[Array], axis: int) -> np.ndarray:
        return np.stack([risks.pretrain, risks.finetune, risks.finetune + risks.pretrain], axis)

    dims, bound = ("run", "error", "step"), pareto(problem, 1.0)
    variables = mean_and_error(stacked(sampled, 2), dims, "sampled")
    variables["theory"] = xr.Variable(dims, np.stack([stacked(risks, 0) for risks in predicted.values()]))
    attributes = {
        "rho": rho, "pretrain": np.ravel(block), "n": n, "replicates": replicates, "mean_weight": mean_weight,
        "best_total": float(best.total), "best_beta": float(best.beta), "best_steps": int(best.steps),
        "best_average": float(theory.best_averaging(block)), "lower_bound": float(sum(bound)),
    }  # fmt: skip
    coordinates = {"run": list(predicted), "error": ["pretrain", "finetune", "total"], "step": grid}
    return xr.Dataset(variables, coordinates, attributes)


def sample_moments(
    key: Array, problem: TwoTaskProblem, n: int, temperatures: np.ndarray, replicates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Σ_w = E w xxᵀ (replicates, temperatures, p, p) and E w x r (replicates, temperatures, p) by sampling."""

    def moments(key: Array) -> tuple[Array, Array]:
        task = sample_task(key, problem, n)
        residual = task.y - task.X @ task.theta_1

        def at(temperature: Array) -> tuple[Array, Array]:
            weighted = flow_weights(residual**2, temperature)[:, None] * task.X
            return weighted.T @ task.X / n, weighted.T @ residual / n

        return jax.lax.map(at, jnp.asarray(temperatures))

    covariance, moment = replicate(moments, key, replicates, "moments")
    return np.asarray(covariance), np.asarray(moment)


def sample_rates(
    key: Array, spreads: np.ndarray, noise_std: float, temperatures: np.ndarray, n: int, replicates: int
) -> np.ndarray:
    """How much slower the gap, of length 1, is learned than other directions (replicates, spreads, temperatures).

    Features √S z, z Gaussian and log S ~ N(−spread²/2, spread²) as in `theory.flow.lognormal_sizes` (docs, F3).
    """
    n = count("n", n)

    def rates(key: Array) -> Array:
        size_key, feature_key, noise_key = jax.random.split(key, 3)
        size, z = jax.random.normal(size_key, (n,)), jax.random.normal(feature_key, (2, n))
        noise = noise_std * jax.random.normal(noise_key, (n,))

        def of(setting: tuple[Array, Array]) -> Array:
            spread, temperature = setting
            along, across = z * jnp.exp((spread * size - spread**2 / 2) / 2)
            weights = flow_weights((along + noise) ** 2, temperature)
            return weights @ along**2 / (weights @ across**2)

        grid = jnp.meshgrid(jnp.asarray(spreads), jnp.asarray(temperatures), indexing="ij")
        return jax.lax.map(of, tuple(axis.ravel() for axis in grid)).reshape(grid[0].shape)

    return np.asarray(replicate(rates, key, replicates, "rates"))


def sample_fixed_points(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    noise_stds: np.ndarray,
    temperatures: np.ndarray,
    replicates: int,
    law: str = "gaussian",
    deviations: Names = ("gaussian",),
) -> tuple[np.ndarray, np.ndarray]:
    """Where FLOW converges with n ≫ p: θ̂ − θ₁ = coefficient·Δ + rest, given as coefficient and ‖rest‖²/‖Δ‖² in Σ₂.

    (replicates, deviations, runs) for `noise_stds`, in place of the problem's, and `temperatures` (runs,). Under
    Gaussian noise 1/(1 + 2σ²/T) and 0 up to sampling (docs, F4).
    """
    covariance = problem.finetune_covariance

    def landed(key: Array) -> tuple[Array, Array]:
        def run(setting: tuple[Array, Array]) -> tuple[Array, Array]:
            noisy, ends = dataclasses.replace(problem, noise_std=setting[0]), []
            for deviation in deviations:
                task = sample_deviating_task(key, noisy, n, law, deviation)
                weights, gap = flow_weights(_losses(task), setting[1]), task.theta_2_star - task.theta_1
                step = fine_tune(task.X, task.y, task.theta_1, MinNorm(), weights) - task.theta_1
                signal = covariance.squared_norm(gap)
                coefficient = covariance.dot(gap, step) / signal
                ends.append((coefficient, covariance.squared_norm(step - coefficient * gap) / signal))
            coefficients, rests = zip(*ends)
            return jnp.stack(coefficients), jnp.stack(rests)

        return jax.lax.map(run, (jnp.asarray(noise_stds), jnp.asarray(temperatures)))

    coefficient, rest = replicate(landed, key, replicates, "fixed points")
    return np.swapaxes(coefficient, 1, 2), np.swapaxes(rest, 1, 2)


def _wrong_labels(key: Array, targets: Array, share: float) -> Array:
    """One-hot targets (n, 10) of which round(share·n), at random, name one of the nine other classes."""
    chosen_key, class_key = jax.random.split(key)
    n, classes = targets.shape
    turned = jax.random.randint(class_key, (n,), 1, classes)
    wrong = jnp.eye(classes, dtype=targets.dtype)[(targets.argmax(axis=1) + turned) % classes]
    chosen = jax.random.permutation(chosen_key, n) < round(share * n)
    return jnp.where(chosen[:, None], wrong, targets)


def _measure_digits(key: Array, times: np.ndarray, shares: np.ndarray, **sizes: Any) -> dict[str, np.ndarray]:
    """One split: test errors along training of each weighting, arrays (share, weighting, time)."""

    def outputs(data: tuple[Array, Array], theta: Array) -> np.ndarray:
        """φ(x)ᵀθ (…, images, 10) for θ (…, p, 10)."""
        return np.asarray(data[0]) @ np.asarray(theta)

    def squared_errors(data: tuple[Array, Array], theta: Array) -> np.ndarray:
        """Of each image, summed over classes: (…, images)."""
        return np.sum((outputs(data, theta) - np.asarray(data[1])) ** 2, axis=-1)

    split_key, label_key = jax.random.split(key)
    split = digits_split(split_key, **sizes)
    theta_1, (X, targets), test = ridge_from_zero(*split.pretrain), split.finetune, split.finetune_test
    classes, ranks = np.asarray(test[1]).argmax(axis=-1), squared_errors(test, theta_1)
    hardest = ranks >= np.quantile(ranks, 1 - HARDEST)
    rows = []
    for share in shares:
        y = _wrong_labels(label_key, targets, float(share))
        losses = jnp.asarray(squared_errors((X, y), theta_1))
        for weighting in WEIGHTINGS.values():
            theta = fine_tune(X, y, theta_1, GradientFlow(times), weighting(losses))
            right = outputs(test, theta).argmax(axis=-1) == classes
            rows.append(
                {
                    "finetune": squared_errors(test, theta).mean(axis=-1),
                    "pretrain": squared_errors(split.pretrain_test, theta).mean(axis=-1),
                    "accuracy": right.mean(axis=-1),
                    "hardest_accuracy": right[:, hardest].mean(axis=-1),
                }
            )
    shape = (len(shares), len(WEIGHTINGS), len(times))
    return {name: np.stack([row[name] for row in rows]).reshape(shape) for name in rows[0]}


def digits_along_training(key: Array, times: np.ndarray, shares: np.ndarray, splits: int, **sizes: Any) -> xr.Dataset:
    """FLOW and unweighted along training on the digits with a share of wrong labels, (share, weighting, time).

    With standard errors over splits: `finetune` and `pretrain`, squared test errors summed over classes, `accuracy` on
    the fine-tuning test images, and `hardest_accuracy` on the tenth of largest pretrained loss. Test labels are right.
    """
    shares = np.asarray(non_negative("shares", shares, ndim=1))
    if shares.max() > 1:
        raise ValueError(f"shares must be at most 1, got {shares.max()}")
    samples = over_splits(partial(_measure_digits, times=times, shares=shares, **sizes), key, splits)
    coordinates = {"share": shares, "weighting": list(WEIGHTINGS), "time": times}
    attributes = {"splits": splits, "data": "scikit-learn digits", **sizes}
    return xr.Dataset(means_and_errors(samples, tuple(coordinates)), coordinates, attributes)
