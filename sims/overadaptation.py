"""Overadaptation measured from raw data: sample X, the shift and the noise, fit, average with θ₁, measure.

Nothing here uses the risk forms to produce an estimate; they are evaluated on the same designs beside it, so that
measured and exact risk can be compared in standard errors. The maps and curves are exact risks of sampled designs.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from linfit import (
    Filter,
    GradientFlow,
    MinNorm,
    Pair,
    Parabola,
    Ridge,
    RiskForm,
    SelfDistillation,
    TwoTaskProblem,
    aligned_problem,
    fine_tune,
    risk_forms,
    sample_designs,
    sample_task,
    spectra,
)
from linfit.filters import Several
from sims.estimate import means_and_errors, progress, replicate, standardised_gap
from theory.distillation import optimal_mix
from theory.overadaptation import Optimum, best_of_each_method, combined

__all__ = ["monte_carlo", "phase_diagram"]


def _measure_once(key: Array, problem: TwoTaskProblem, n: int, filter: Filter, tau: Array, law: str) -> dict:
    """One replicate: risks of the fitted ensembles, (filters, taus) each, and the exact ones on the same X.

    Bias² is measured on the fit to noise-free labels, variance on the fit to the noise alone: fitting is linear in y.
    """
    task = sample_task(key, problem, n, law)
    clean, zero = task.X @ task.theta_2_star, jnp.zeros_like(task.theta_1)
    labels = jnp.stack([task.y, clean, task.y - clean], axis=1)
    start = jnp.stack([task.theta_1, task.theta_1, zero], axis=1)
    steps = fine_tune(task.X, labels, start, filter) - start  # (filters, p, 3)
    gap = task.theta_1 - task.theta_2_star
    finetune, pretrain = problem.finetune_covariance, problem.pretrain_covariance
    parabolas = {
        "finetune": Parabola.of_steps(finetune, gap, steps[..., 0]),
        "finetune_bias": Parabola.of_steps(finetune, gap, steps[..., 1]),
        "finetune_variance": Parabola.of_steps(finetune, zero, steps[..., 2]),
        "pretrain": Parabola.of_steps(pretrain, task.theta_1, steps[..., 0]),
    }
    measured = {name: parabola(tau[:, None]).total for name, parabola in parabolas.items()}
    finetune_risk, pretrain_risk = risk_forms(task.X, problem).map(lambda form: form(filter, tau[:, None]))
    exact = dict(zip(parabolas, (finetune_risk.total, *finetune_risk, pretrain_risk.total), strict=True))
    return jax.tree.map(jnp.transpose, {name: (measured[name], exact[name]) for name in parabolas})


def monte_carlo(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    filters: Mapping[str, Filter],
    tau: Array,
    replicates: int,
    law: str = "gaussian",
    names: np.ndarray | None = None,
) -> xr.Dataset:
    """Measured risks along τ for each named filter, with standard errors, beside the exact ones.

    Args:
        key: replicate i uses `fold_in(key, i)`.
        problem: on which `sample_task` makes designs, shifts and labels.
        n: fine-tuning samples.
        filters: by the name that the dataset gives them.
        tau: ensemble coefficients (T,).
        replicates: independent repetitions, at least 2.
        law: of the coordinates of the design, a key of `linfit.design.LAWS`.
        names: one coordinate value per member, where a filter holds several hyperparameters.

    Dimensions (filter, tau). For each of "finetune", "finetune_bias", "finetune_variance", "pretrain": the mean over
    replicates, `…_error` its standard error, `…_exact` the exact risk averaged over the same designs, and `…_z` the gap
    between the two in standard errors of their paired difference.

    >>> from linfit import MinNorm, Ridge, aligned_problem, spectra
    >>> data = monte_carlo(jax.random.key(0), aligned_problem(spectra.power_law(30)), 10,
    ...                    {"min-norm": MinNorm(), "ridge": Ridge(0.1)}, jnp.array([0.5, 1.0]), replicates=50)
    >>> bool(abs(data.finetune_z).max() < 4)
    True
    """
    several = Several(tuple(filters.values()))
    samples = replicate(lambda one: _measure_once(one, problem, n, several, tau, law), key, replicates, "Monte Carlo")
    dims = ("filter", "tau")
    variables = means_and_errors({name: measured for name, (measured, _) in samples.items()}, dims)
    for name, (measured, exact) in samples.items():
        variables[f"{name}_exact"] = xr.Variable(dims, exact.mean(axis=0))
        variables[f"{name}_z"] = xr.Variable(dims, standardised_gap(measured, exact))
    coordinates = {"filter": list(filters) if names is None else names, "tau": np.asarray(tau)}
    attributes = {"n": n, "p": problem.p, "noise_std": float(problem.noise_std), "replicates": replicates, "law": law}
    return xr.Dataset(variables, coordinates, attributes)


def phase_diagram(
    key: Array, n: int, p: int, decay: float, alignments: np.ndarray, noise_stds: np.ndarray, designs: int
) -> xr.Dataset:
    """The best fine-tuning risk of every method over shift alignment × label noise (docs, O4; ours).

    Args:
        key: of the designs, the same for all cells.
        n: fine-tuning samples.
        p: features.
        decay: of the spectrum, Σ = diag(j^−decay).
        alignments: of the shift, Ω ∝ Σ^alignment with tr ΩΣ = 1; (A,).
        noise_stds: σ (S,), in units of y.
        designs: over how many the exact risk is averaged.

    Dimensions (estimator, alignment, noise_std); variables `risk`, `tau` and `hyperparameter` at each method's own
    optimum.
    """
    over_noise = jax.jit(jax.vmap(lambda form, std: best_of_each_method(form.with_noise_std(std)), (None, 0)))
    spectrum = spectra.power_law(p, decay)
    stack = sample_designs(key, spectrum, n, designs)
    rows = []
    for alignment in progress(alignments, "phase diagram", len(alignments)):
        problem = aligned_problem(spectrum, alignment=alignment)
        rows.append(jax.device_get(over_noise(risk_forms(stack, problem).finetune, jnp.asarray(noise_stds))))
    methods, dims = list(rows[0]), ("estimator", "alignment", "noise_std")
    variables = {
        field: (dims, np.stack([[getattr(row[method], field) for row in rows] for method in methods]))
        for field in Optimum._fields
    }
    coordinates = {"estimator": methods, "alignment": alignments, "noise_std": noise_stds}
    return xr.Dataset(variables, coordinates, {"n": n, "p": p, "decay": decay, "designs": designs})


def _mean_along(forms: Pair[RiskForm], filter: Filter) -> Pair[Parabola]:
    """Both risks along τ, averaged over the designs of stacked forms."""
    return forms.map(lambda form: form.along(filter).mean())


def trade_off(forms: Pair[RiskForm], best: Mapping[str, Optimum]) -> xr.Dataset:
    """The plane of both risks, mean over designs: a curve (risk, …_point) for each method (docs, O5; ours).

    `best` is `best_of_each_method(forms.finetune)`. Self-distillation has at every λ the mix of least R_ft.
    `oracle_frontier` has the filters of least R_ft + κR_pre; `pretrained` and `fine-tuned` (min-norm) are points.
    """
    tau, both = jnp.linspace(0, 1, 61), best["ridge + ensemble"]
    penalties = jnp.logspace(-6, 3, 91)
    distilled = SelfDistillation(penalties, optimal_mix(forms.finetune, penalties).mix)
    paths: dict[str, tuple[Filter, Array | float]] = {
        "self-distillation": (distilled, 1.0),
        "early stopping": (GradientFlow(jnp.logspace(-3, 6, 91)), 1.0),
        "ridge": (Ridge(penalties), 1.0),
        "min-norm + ensemble": (MinNorm(), tau),
        "ridge + ensemble": (Ridge(both.hyperparameter), jnp.linspace(0, float(both.tau) * 1.15, 61)),
        "pretrained": (MinNorm(), 0.0),
        "fine-tuned": (MinNorm(), 1.0),
    }
    variables = {}
    for name, (filter, coefficient) in paths.items():
        finetune, pretrain = (parabola(coefficient).total for parabola in _mean_along(forms, filter))
        points = np.stack([pretrain, finetune])
        variables[name.replace(" ", "_")] = (("risk", f"{name}_point")[: points.ndim], points)
    frontier = []
    for weight in jnp.concatenate([jnp.zeros(1), jnp.logspace(-3, 3, 60)]):
        oracle = combined(forms, weight).oracle_filter()
        finetune, pretrain = (form(oracle).total.mean() for form in forms)
        frontier.append((pretrain, finetune))
    variables["oracle_frontier"] = (("risk", "kappa_point"), np.transpose(frontier))
    return xr.Dataset(variables, {"risk": ["pretrain", "finetune"]})


def penalty_and_tau(form: RiskForm, best: Mapping[str, Optimum]) -> xr.Dataset:
    """`risk` (tau, penalty) of ridge + ensemble and `optimal_tau` (penalty,), mean over designs; `best` of the form."""
    penalties, tau = np.logspace(-4, 1, 81), np.linspace(0, 1.6, 81)
    parabola, optimum = form.along(Ridge(penalties)).mean(), best["ridge + ensemble"]
    variables = {
        "risk": (("tau", "penalty"), np.asarray(parabola(tau[:, None]).total)),
        "optimal_tau": ("penalty", np.asarray(parabola.optimal_tau)),
    }
    attributes = {f"best_{field}": float(getattr(optimum, field)) for field in Optimum._fields}
    attributes |= {f"{name}_risk": float(best[name].risk) for name in ("ridge", "oracle")}
    return xr.Dataset(variables, {"tau": tau, "penalty": penalties}, attributes)


def training_time(key: Array, forms: Pair[RiskForm], problem: TwoTaskProblem, n: int, replicates: int) -> xr.Dataset:
    """Both risks along gradient flow, mean over the designs of the forms, and simulated at a few times.

    Over `time`: `finetune`, `pretrain`, `…_ensemble` at the τ of least R_ft, `best_tau`. Over `simulated_time`: what
    `monte_carlo` gives at τ = 1, each with the ending `_simulated`. Attribute `oracle`: its fine-tuning risk.
    """
    times, simulated = np.logspace(-1, 4, 101), np.logspace(-1, 4, 11)
    finetune, pretrain = _mean_along(forms, GradientFlow(times))
    tau = finetune.optimal_tau
    curves = {
        "finetune": finetune(1.0).total,
        "finetune_ensemble": finetune.optimal_risk,
        "pretrain": pretrain(1.0).total,
        "pretrain_ensemble": pretrain(tau).total,
        "best_tau": tau,
    }
    data = xr.Dataset({name: ("time", np.asarray(curve)) for name, curve in curves.items()}, {"time": times})
    flow = {"flow": GradientFlow(simulated)}
    measured = monte_carlo(key, problem, n, flow, jnp.ones(1), replicates, names=simulated).isel(tau=0, drop=True)
    endings = {name: f"{name}_simulated" for name in measured} | {"filter": "simulated_time"}
    attributes = measured.attrs | {"oracle": float(forms.finetune.oracle_risk().mean())}
    return data.merge(measured.rename(endings)).assign_attrs(attributes)
