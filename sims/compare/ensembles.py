"""Methods that end where an ensemble does in the population, and by how much they miss it elsewhere (docs, E1)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import xarray as xr
from jax import Array

from linfit import FixedShift, GradientFlow, MinNorm, TwoTaskProblem, fine_tune, flow_weights, s3ft_targets, spectra
from linfit.design import Task, sample_task
from linfit.internal.checks import ArrayLike, count
from sims.estimate import means_and_errors
from theory import flow, s3ft
from theory.frontier import clipping_coefficient, trimming_ratio, weighting_coefficient

__all__ = ["ENSEMBLES", "equivalent_coefficients", "knob_at"]


class _Ensemble(NamedTuple):
    """A method with one hyperparameter, its knob, whose least-squares fit is θ₁ + τΔ in the Gaussian population."""

    tau: Callable[[ArrayLike, float, float], Array]
    """(knob, signal q, σ) → τ."""
    targets: Callable[[Array, Array], Array] = lambda residual, knob: residual
    """(r, knob) → targets relative to Xθ₁, for residuals r = y − Xθ₁ (n,)."""
    weights: Callable[[Array, Array], Array] = lambda residual, knob: jnp.ones_like(residual)


def _std(signal: float, noise_std: float) -> float:
    """√v."""
    return (signal + noise_std**2) ** 0.5


ENSEMBLES: dict[str, _Ensemble] = {
    "ensemble": _Ensemble(lambda tau, q, noise_std: jnp.asarray(tau), targets=lambda r, tau: tau * r),
    "S3FT": _Ensemble(
        lambda c, q, noise_std: s3ft.fixed_point_coefficient(c, _std(q, noise_std)),
        targets=lambda r, c: s3ft_targets(jnp.zeros_like(r), r, abs(r) <= c).values,
    ),
    "clipped targets": _Ensemble(
        lambda c, q, noise_std: clipping_coefficient(c, _std(q, noise_std)), targets=lambda r, c: jnp.clip(r, -c, c)
    ),
    "FLOW": _Ensemble(
        lambda temperature, q, noise_std: flow.fixed_point_coefficient(noise_std, temperature),
        weights=lambda r, temperature: flow_weights(r**2, temperature),
    ),
    "trimming": _Ensemble(
        lambda c, q, noise_std: weighting_coefficient(trimming_ratio(c, _std(q, noise_std)), q, noise_std),
        weights=lambda r, c: (abs(r) <= c).astype(r.dtype),
    ),
}
"""What each one's knob is: τ; the tolerance; the clipping threshold; the temperature; the largest residual kept."""


def knob_at(name: str, tau: float, signal: float, noise_std: float) -> float:
    """The knob at which one of `ENSEMBLES` has the coefficient τ ∈ (0, 1), by bisection in its logarithm.

    `signal` is q = ‖Δ‖²_Σ, `noise_std` σ.

    >>> from sims.compare import knob_at
    >>> round(knob_at("FLOW", 0.5, signal=1.0, noise_std=0.5), 9)       # T = 2σ²τ/(1−τ)
    0.5
    """

    def gap(logarithm: float) -> float:
        return float(ENSEMBLES[name].tau(jnp.exp(logarithm), signal, noise_std)) - tau

    return float(np.exp(scipy.optimize.brentq(gap, -12.0, 12.0, xtol=1e-12)))


def spread_problem(p: int, concentrated: bool = False, noise_std: float = 0.5**0.5) -> TwoTaskProblem:
    """Σ₁ = Σ₂ = diag(1/j), θ₁ = θ₁*, ‖δ‖²_Σ = 1 with a δ of one coordinate or of all alike."""
    spectrum = spectra.power_law(p)
    shift = (jnp.arange(p) == 0).astype(spectrum.dtype) if concentrated else jnp.full(p, spectrum.sum() ** -0.5)
    return TwoTaskProblem(spectrum, spectrum, FixedShift(shift), noise_std)


def equivalent_coefficients(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    knobs: Mapping[str, ArrayLike],
    replicates: int,
    law: str = "gaussian",
    rows: int | None = None,
) -> xr.Dataset:
    """Least-squares fits of the methods of `knobs`, and the coefficients τ at which they end.

    Args:
        key: of the samples; all fits of a replicate are on the same ones.
        problem: what to learn.
        n: samples, more than features.
        knobs: for each of some `ENSEMBLES` its knob, or as many values of it as for the others.
        replicates: at least 2.
        law: of the design's coordinates, as in `linfit.sample_design`.
        rows: samples drawn, of which the first n are used (n if not given): calls with the same `rows` are nested and
            compile once.

    Dimensions (estimator, setting): `tau`, the fitted coefficient ⟨θ̂−θ₁, Δ⟩/‖Δ‖² in the metric Σ₂; `off`,
    ‖θ̂−θ₁−τ̂Δ‖²_{Σ₂}/‖Δ‖², how far from the segment; `finetune`, R_ft; each a mean over replicates with its standard
    error.

    >>> import jax
    >>> from sims.compare import equivalent_coefficients, spread_problem
    >>> problem = spread_problem(2, noise_std=0.5)
    >>> data = equivalent_coefficients(jax.random.key(0), problem, 400, {"ensemble": 0.5, "FLOW": 0.5}, replicates=50)
    >>> bool((abs(data.tau - 0.5) < 4 * data.tau_error).all())
    True
    """
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count("replicates", replicates, minimum=2)))
    if unknown := [name for name in knobs if name not in ENSEMBLES]:
        raise ValueError(f"knobs must be of {', '.join(ENSEMBLES)}; got {', '.join(unknown)}")
    n = count("n", n)
    tasks = _sample_tasks(problem, keys, count("rows", n if rows is None else rows, minimum=n), law)
    at = jnp.stack([jnp.atleast_1d(jnp.asarray(value, float)) for value in knobs.values()])
    samples = jax.device_get(_fit(problem, tasks, at, jnp.asarray(n), tuple(knobs)))
    attributes = {"n": n, "replicates": replicates, "law": law}
    return xr.Dataset(means_and_errors(samples, ("estimator", "setting")), {"estimator": list(knobs)}, attributes)


@eqx.filter_jit
def _sample_tasks(problem: TwoTaskProblem, keys: Array, rows: int, law: str) -> Task:
    return jax.lax.map(lambda key: sample_task(key, problem, rows, law), keys)


@eqx.filter_jit
def _fit(problem: TwoTaskProblem, tasks: Task, knobs: Array, n: Array, names: tuple[str, ...]) -> dict[str, Array]:
    covariance = problem.finetune_covariance

    def one(task: Task) -> dict[str, Array]:
        gap, residual = task.theta_2_star - task.theta_1, task.y - task.X @ task.theta_1
        methods = [(ENSEMBLES[name], at) for name, at in zip(names, knobs)]
        targets = jnp.concatenate([jax.vmap(partial(method.targets, residual))(at) for method, at in methods])
        weights = jnp.concatenate([jax.vmap(partial(method.weights, residual))(at) for method, at in methods])
        weights, start = weights * (jnp.arange(len(residual)) < n), jnp.zeros_like(gap)
        moved = jax.lax.map(lambda data: fine_tune(task.X, data[0], start, MinNorm(), data[1]), (targets, weights))
        moved, size = moved.reshape(*knobs.shape, -1), covariance.squared_norm(gap)
        tau = covariance.dot(moved, gap) / size
        off = covariance.squared_norm(moved - tau[..., None] * gap) / size
        return {"tau": tau, "off": off, "finetune": covariance.squared_norm(moved - gap)}

    return jax.lax.map(one, tasks)


def population_paths(p: int, times: np.ndarray) -> xr.Dataset:
    """Gradient flow of population losses: `path` (line, coordinate, time), ‖δ‖²_Σ = 1, σ² = ½.

    Coordinates: `tau`, the coefficient reached, and `angle` to the segment from θ₁ to θ₂* in degrees, in the metric Σ.
    Lines: unweighted (and Huber, in slower time) and FLOW at the median temperature, with Σ = diag(1/j) and flat.
    """
    lines = {}
    for name, spectrum in (("diag(1/j)", spectra.power_law(p)), ("flat", spectra.isotropic(p))):
        delta = jnp.full(p, spectrum.sum() ** -0.5)
        problem = TwoTaskProblem(spectrum, spectrum, FixedShift(delta), 0.5**0.5)
        unweighted = -jnp.expm1(-times[:, None] * spectrum) * delta
        weighted = flow.trajectory(problem, GradientFlow(times)).moved
        for method, moved in (("unweighted", unweighted), ("FLOW", weighted)):
            tau = (moved * spectrum) @ delta
            cosine = jnp.clip(tau / jnp.sqrt(jnp.sum(moved**2 * spectrum, axis=-1)), -1, 1)
            lines[f"{method}, Σ {name}"] = np.stack([tau, jnp.degrees(jnp.arccos(cosine))])
    path = (("line", "coordinate", "time"), np.stack(list(lines.values())))
    return xr.Dataset({"path": path}, {"line": list(lines), "coordinate": ["tau", "angle"], "time": times})
