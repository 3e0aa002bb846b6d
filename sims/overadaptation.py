"""Overadaptation measured from raw data: draw X, the shift and the noise, fit, average with θ₁, measure.

Nothing here uses the risk forms to produce an estimate; they are evaluated on the same designs beside it, so that
measured and exact risk can be compared in standard errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from linfit import (
    Filter,
    Parabola,
    TwoTaskProblem,
    aligned_problem,
    fine_tune,
    risk_forms,
    sample_designs,
    sample_task,
    spectra,
)
from linfit.covariance import Covariance
from linfit.filters import Several
from sims.estimate import mean_and_error, progress, replicate
from theory.overadaptation import best_of_each_method

QUANTITIES = ("finetune", "finetune_bias", "finetune_variance", "pretrain")


def measure_once(key: Array, problem: TwoTaskProblem, n: int, filter: Filter, tau: Array, law: str) -> dict:
    """One replicate: risks of the fitted ensembles, (filters, taus) each, and the exact ones on the same X.

    Bias² is measured on the fit to noise-free labels, variance on the fit to the noise alone: fitting is linear in y.
    """
    task = sample_task(key, problem, n, law)
    clean = task.X @ task.theta_2_star
    labels = jnp.stack([task.y, clean, task.y - clean], axis=1)
    start = jnp.stack([task.theta_1, task.theta_1, jnp.zeros_like(task.theta_1)], axis=1)
    steps = fine_tune(task.X, labels, start, filter) - start  # (filters, p, 3)
    gap = task.theta_1 - task.theta_2_star
    finetune, pretrain = problem.finetune_covariance, problem.pretrain_covariance
    column = tau[:, None]

    def measured(covariance: Covariance, start: Array, part: int) -> Array:
        return Parabola.of_steps(covariance, start, steps[..., part])(column).total

    measured_risks = {
        "finetune": measured(finetune, gap, 0),
        "finetune_bias": measured(finetune, gap, 1),
        "finetune_variance": measured(finetune, jnp.zeros_like(gap), 2),
        "pretrain": measured(pretrain, task.theta_1, 0),
    }
    forms = risk_forms(task.X, problem)
    exact = forms.finetune(filter, column)
    exact_risks = {
        "finetune": exact.total,
        "finetune_bias": exact.bias,
        "finetune_variance": exact.variance,
        "pretrain": forms.pretrain(filter, column).total,
    }
    return jax.tree.map(jnp.transpose, {"measured": measured_risks, "exact": exact_risks})


def monte_carlo(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    filters: dict[str, Filter],
    tau: Array,
    replicates: int,
    law: str = "gaussian",
    names: np.ndarray | None = None,
) -> xr.Dataset:
    """Measured risks along τ for each named filter, with standard errors, beside the exact ones.

    Dimensions (filter, tau). For each of "finetune", "finetune_bias", "finetune_variance", "pretrain": the mean over
    replicates, `…_error` its standard error, `…_exact` the exact risk averaged over the same designs, and `…_z` the gap
    between the two in standard errors of their paired difference. A filter that holds several hyperparameters needs
    `names`, one coordinate value per member.

    >>> from linfit import MinNorm, Ridge, aligned_problem, spectra
    >>> data = monte_carlo(jax.random.key(0), aligned_problem(spectra.power_law(30)), 10,
    ...                    {"min-norm": MinNorm(), "ridge": Ridge(0.1)}, jnp.array([0.5, 1.0]), replicates=50)
    >>> bool(abs(data.finetune_z).max() < 4)
    True
    """
    several = Several(tuple(filters.values()))
    samples = replicate(
        lambda replicate_key: measure_once(replicate_key, problem, n, several, tau, law), key, replicates, "Monte Carlo"
    )
    dims = ("filter", "tau")
    variables: dict[str, xr.Variable] = {}
    for name in QUANTITIES:
        measured, exact = samples["measured"][name], samples["exact"][name]
        variables |= mean_and_error(measured, dims, name)
        variables[f"{name}_exact"] = xr.Variable(dims, exact.mean(axis=0))
        variables[f"{name}_z"] = xr.Variable(dims, standardised_gap(measured, exact))
    coordinates = {"filter": list(filters) if names is None else names, "tau": np.asarray(tau)}
    attributes = {"n": n, "p": problem.p, "noise_std": float(problem.noise_std), "replicates": replicates, "law": law}
    return xr.Dataset(variables, coordinates, attributes)


def standardised_gap(measured: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Mean of measured − exact over replicates, in its standard errors (not below rounding, 1e-12 of the risk)."""
    difference = measured - exact
    error = difference.std(axis=0, ddof=1) / len(difference) ** 0.5
    rounding = 1e-12 * np.abs(exact).mean(axis=0) + np.finfo(exact.dtype).tiny
    return difference.mean(axis=0) / np.maximum(error, rounding)


def phase_diagram(
    key: Array,
    n: int,
    p: int,
    decay: float,
    alignments: np.ndarray,
    noise_variances: np.ndarray,
    design_count: int,
) -> xr.Dataset:
    """The best fine-tuning risk of every method over shift alignment × label noise (docs, O4).

    Dimensions (estimator, alignment, noise_variance); variables `risk`, `tau` and `hyperparameter` at each method's own
    optimum, exact and averaged over `design_count` designs, the same for all cells.
    """
    over_noise = jax.jit(jax.vmap(lambda form, std: best_of_each_method(form.with_noise_std(std)), (None, 0)))
    stack = sample_designs(key, aligned_problem(spectra.power_law(p, decay)).finetune_covariance, n, design_count)
    rows = []
    for alignment in progress(alignments, "phase diagram", len(alignments)):
        problem = aligned_problem(spectra.power_law(p, decay), alignment=alignment, noise_std=1.0)
        best = over_noise(risk_forms(stack, problem).finetune, jnp.sqrt(noise_variances))
        rows.append(jax.device_get(best))
    methods = list(rows[0])
    dims = ("estimator", "alignment", "noise_variance")
    variables = {
        field: (dims, np.stack([[getattr(row[method], field) for row in rows] for method in methods]))
        for field in ("risk", "tau", "hyperparameter")
    }
    coordinates = {"estimator": methods, "alignment": alignments, "noise_variance": noise_variances}
    return xr.Dataset(variables, coordinates, {"n": n, "p": p, "decay": decay, "designs": design_count})
