"""Deterministic equivalents measured: exact risk averaged over random designs, beside the prediction.

The exact risk of a design (`linfit.risk_forms`) is already averaged over noise and shift, so what is left to average is
the design alone.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from linfit import Filter, Pair, TwoTaskProblem, risk_forms, sample_design
from sims.estimate import mean_and_error, replicate, standard_error
from theory.equivalents import risk

__all__ = ["averaged_risk"]


def averaged_risk(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    filter: Filter,
    hyperparameters: np.ndarray,
    tau: np.ndarray,
    designs: int,
    law: str = "gaussian",
) -> xr.Dataset:
    """Exact total risk of an array of filters, averaged over designs, and its prediction.

    Args:
        key: of the designs.
        problem: with diagonal covariances.
        n: fine-tuning samples.
        filter: holds the array.
        hyperparameters: labels of its members in the dataset.
        tau: ensemble coefficients (T,).
        designs: how many are averaged.
        law: of their coordinates, a key of `linfit.design.LAWS`.

    Dimensions (tau, hyperparameter). For "finetune" and "pretrain": the mean, `…_error` its standard error,
    `…_predicted` the deterministic equivalent, `…_gap` the relative gap between them.

    >>> from linfit import Ridge, aligned_problem, spectra
    >>> penalty = np.array([0.01, 0.1])
    >>> data = averaged_risk(jax.random.key(0), aligned_problem(spectra.power_law(120)), 40, Ridge(penalty), penalty,
    ...                      np.array([1.0]), designs=40)
    >>> bool(abs(data.finetune_gap).max() < 0.05)
    True
    """
    column = jnp.asarray(tau)[:, None]

    def measure(design_key: Array) -> Pair[Array]:
        forms = risk_forms(sample_design(design_key, problem.finetune_covariance, n, law), problem)
        return forms.map(lambda form: form(filter, column).total)

    samples = replicate(measure, key, designs, f"designs, n = {n}")
    predicted, dims = risk(problem, n, filter, column), ("tau", "hyperparameter")
    variables: dict[str, xr.Variable] = {}
    for name, sample, prediction in zip(Pair._fields, samples, predicted, strict=True):
        total = np.asarray(prediction.total)
        variables |= mean_and_error(sample, dims, name)
        variables[f"{name}_predicted"] = xr.Variable(dims, total)
        variables[f"{name}_gap"] = xr.Variable(dims, sample.mean(axis=0) / total - 1)
    attributes = {"n": n, "p": problem.p, "designs": designs, "law": law}
    return xr.Dataset(variables, {"tau": tau, "hyperparameter": hyperparameters}, attributes)


def convergence(
    key: Array,
    problem_of: Callable[[int], TwoTaskProblem],
    sizes: Sequence[int],
    filters: dict[str, Filter],
    designs: Callable[[int], int],
) -> xr.Dataset:
    """Relative `gap` ± `gap_error` (filter, n) of averaged R_ft to its prediction; problem and designs by n.

    (filter,): `slope` ± `slope_error` of log|gap| against log n, by least squares weighted with the errors.
    """
    samples = []
    for index, n in enumerate(sizes):
        problem = problem_of(n)

        def measure(design_key: Array, problem: TwoTaskProblem = problem, n: int = n) -> Array:
            form = risk_forms(sample_design(design_key, problem.finetune_covariance, n), problem).finetune
            return jnp.stack([form(filter).total for filter in filters.values()])

        predicted = np.array([float(risk(problem, n, filter).finetune.total) for filter in filters.values()])
        samples.append(replicate(measure, jax.random.fold_in(key, index), designs(n), f"n = {n}") / predicted - 1)
    gap = np.stack([sample.mean(axis=0) for sample in samples], axis=1)
    error = np.stack([standard_error(sample) for sample in samples], axis=1)
    fits = [_power_of_n(np.asarray(sizes), *row) for row in zip(gap, error, strict=True)]
    variables: dict[str, tuple] = {"gap": (("filter", "n"), gap), "gap_error": (("filter", "n"), error)}
    variables |= {name: ("filter", values) for name, values in zip(("slope", "slope_error"), np.transpose(fits))}
    coordinates = {"filter": list(filters), "n": np.asarray(sizes)}
    return xr.Dataset(variables, coordinates, {"designs": [designs(n) for n in sizes]})


def _power_of_n(n: np.ndarray, gap: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """b and its standard error in |gap| ≈ C·n^b, each point weighted by its accuracy.

    >>> _power_of_n(np.array([10, 100, 1000]), np.array([0.5, 0.05, 0.005]), np.array([0.01, 0.001, 0.0001]))[0]
    -1.0
    """
    weights = np.abs(gap) / error  # one over the error of log|gap|
    design = np.stack([np.ones(len(n)), np.log(n)], axis=1)
    covariance = np.linalg.inv(design.T @ (weights[:, None] ** 2 * design))
    slope = covariance @ design.T @ (weights**2 * np.log(np.abs(gap)))
    return round(float(slope[1]), 12), float(covariance[1, 1] ** 0.5)
