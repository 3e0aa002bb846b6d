"""Methods tuned by R_ft + κR_pre on validation tasks, and measured on other tasks of the same problem."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from linfit import Empirical, FixedShift, Pair, RandomShift, TwoTaskProblem, aligned_problem, excess_risks, spectra
from linfit.internal.checks import ArrayLike, count, non_negative
from sims.compare.methods import METHODS, over_grid, sample_given
from sims.estimate import means_and_errors, progress
from theory.frontier import pareto, weight_at

__all__ = ["compare", "compared_problem", "frontier", "measure", "rank"]


def compared_problem(p: int, alignment: float, noise_std: float) -> TwoTaskProblem:
    """Σ₂ = diag(1/j), Σ₁ ∝ diag(j^−½) of the same trace, Ω ∝ Σ₂^alignment with tr ΩΣ₂ = 1, R_pre(θ₁) = 0.1 (ours).

    Pretraining was broader than the new task: small directions of Σ₂ matter more to it.

    >>> from sims.compare import compared_problem
    >>> compared_problem(30, alignment=0.0, noise_std=0.2).p
    30
    """
    finetune = spectra.power_law(p)
    pretrain = spectra.power_law(p, 0.5, trace=finetune.sum())
    return aligned_problem(
        finetune, alignment=alignment, noise_std=noise_std, pretrain_spectrum=pretrain, pretrain_risk=0.1
    )


def compared_problems(p: int) -> dict[str, TwoTaskProblem]:
    """Six: the shift in the tail, isotropic, or along the head of the spectrum; low noise (σ² = 0.05) and high (1)."""
    shifts = {"tail shift": -1.0, "isotropic shift": 0.0, "head shift": 1.0}
    noises = {"low noise": 0.05**0.5, "high noise": 1.0}
    pairs = itertools.product(shifts, noises)
    return {f"{shift}, {noise}": compared_problem(p, shifts[shift], noises[noise]) for shift, noise in pairs}


@eqx.filter_jit
def _measure(problem: TwoTaskProblem, keys: Array, n: int, names: tuple[str, ...], law: str) -> dict[str, Array]:
    """For every key, (R_ft, R_pre) of every method over its grid, (keys, points, 2), and the shifts (keys, p)."""

    def one(key: Array) -> dict[str, Array]:
        given, delta = sample_given(key, problem, n, law)
        measured = {"": delta}
        for name in names:
            theta = over_grid(METHODS[name], given).reshape(-1, problem.p)
            # One method after the other: two eigendecompositions at once can starve each other of XLA's threads.
            given, theta = jax.lax.optimization_barrier((given, theta))
            measured[name] = jnp.stack(excess_risks(theta, problem, jnp.zeros_like(delta), delta), axis=-1)
        return measured

    return jax.lax.map(one, keys)


_ALL = tuple(METHODS)
_CHUNK = 16
"""Tasks measured between two signs of life; every call compiles for this many."""


class Samples(NamedTuple):
    """Risks of every task of a problem at every point of a method's grid."""

    problem: TwoTaskProblem
    risks: dict[str, np.ndarray]
    """(tasks, points, 2) of each method: R_ft and R_pre."""
    shifts: np.ndarray
    """δ (tasks, p)."""


def measure(
    key: Array, problem: TwoTaskProblem, n: int, tasks: int, names: Sequence[str] = _ALL, law: str = "gaussian"
) -> Samples:
    """Fine-tune tasks by every named method, task i by `fold_in(key, i)`. Raises ValueError for an unknown name."""
    n, tasks = count("n", n), count("tasks", tasks)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(f"names must be among {', '.join(METHODS)}; got {', '.join(unknown) or 'none'}")
    indices = jnp.arange(-(-tasks // _CHUNK) * _CHUNK).reshape(-1, _CHUNK)
    keys = jax.vmap(jax.vmap(partial(jax.random.fold_in, key)))(indices)
    chunks = progress(keys, "comparing methods", len(keys))
    parts = [jax.device_get(_measure(problem, chunk, n, tuple(names), law)) for chunk in chunks]
    # What comes out of `jit` has its names sorted; here they are in the order asked for.
    measured = {name: np.concatenate([part[name] for part in parts])[:tasks] for name in names}
    return Samples(problem, measured, np.concatenate([part[""] for part in parts])[:tasks])


def compare(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    *,
    weight: float = 1.0,
    tasks: int = 64,
    validation: int = 32,
    names: Sequence[str] = _ALL,
    law: str = "gaussian",
) -> xr.Dataset:
    """Every method on one problem, tuned alike, with standard errors and its distance to the frontier.

    Args:
        key: of the tasks, which are the same for all methods.
        problem: what the tasks are sampled from.
        n: fine-tuning samples.
        weight: κ ≥ 0; hyperparameters minimise R_ft + κR_pre averaged over the validation tasks.
        tasks: other tasks, at least 2, on which risks are reported.
        validation: tasks that tune.
        names: which of `METHODS`.
        law: of the design's coordinates, as in `linfit.sample_design`.

    Dimension `estimator`, best first. Variables: `finetune`, `pretrain`, `criterion` = R_ft + κR_pre; `margin`, by how
    much the criterion exceeds that of the best method, paired; `distance`, forgetting above the Pareto frontier at
    equal R_ft (docs, E2), the frontier being that of the shifts sampled; each with `…_error`, one standard error over
    tasks. `setting`: the values chosen.

    Set OPENBLAS_NUM_THREADS=1 and NPROC=4 before JAX is imported, as the command line does: on a busy machine the many
    small eigendecompositions are several times faster. Raises ValueError for an unknown name, a κ that is negative, or
    fewer than 2 tasks.

    >>> import jax
    >>> from linfit import aligned_problem, spectra
    >>> from sims.compare import compare
    >>> problem = aligned_problem(spectra.power_law(30))
    >>> data = compare(jax.random.key(0), problem, 10, names=("min-norm", "ridge"), tasks=8, validation=4)
    >>> data.estimator.values.tolist()
    ['ridge', 'min-norm']
    >>> bool((data.distance >= 0).all())
    True
    """
    tasks, validation = count("tasks", tasks, minimum=2), count("validation", validation)
    non_negative("weight", weight, ndim=0)
    samples = measure(key, problem, n, validation + tasks, names, law)
    return rank(samples, weight, validation).assign_attrs(n=n, p=problem.p, law=law)


def rank(samples: Samples, weight: float = 1.0, validation: int = 32) -> xr.Dataset:
    """What `compare` returns, from tasks already measured: another κ costs nothing.

    The first `validation` tasks tune, the others test. Raises ValueError unless that leaves 2 of them, or for κ < 0.
    """
    costs = np.array([1.0, float(non_negative("weight", weight, ndim=0))])
    tasks = len(samples.shifts)
    if not 1 <= validation <= tasks - 2:
        raise ValueError(f"validation must leave at least 2 of {tasks} tasks for testing, got {validation}")
    chosen = {name: int(np.argmin((risks[:validation] @ costs).mean(axis=0))) for name, risks in samples.risks.items()}
    tested = np.stack([risks[validation:, chosen[name]] for name, risks in samples.risks.items()], axis=1)
    order = np.argsort((tested @ costs).mean(axis=0), kind="stable")
    tested, methods = tested[:, order], [list(chosen)[index] for index in order]
    criterion = tested @ costs
    quantities = {
        "finetune": tested[..., 0],
        "pretrain": tested[..., 1],
        "criterion": criterion,
        "margin": criterion - criterion[:, :1],
        "distance": _distances(samples.problem, samples.shifts[validation:], tested),
    }
    variables = means_and_errors(quantities, ("estimator",))
    variables["setting"] = xr.Variable("estimator", [_setting(name, chosen[name]) for name in methods])
    attributes = {"weight": costs[1], "tasks": len(tested), "validation": validation}
    return xr.Dataset(variables, {"estimator": methods}, attributes)


def _with_shifts(problem: TwoTaskProblem, shifts: ArrayLike) -> TwoTaskProblem:
    return replace(problem, shift=RandomShift(Empirical(shifts)))


def frontier(samples: Samples, weights: ArrayLike, validation: int = 32) -> xr.Dataset:
    """The Pareto frontier of the shifts of the test tasks at every κ of `weights`: `finetune` and `pretrain`."""
    points = pareto(_with_shifts(samples.problem, samples.shifts[validation:]), weights)
    values = {name: ("kappa", np.asarray(value)) for name, value in points._asdict().items()}
    return xr.Dataset(values, {"kappa": np.asarray(weights)})


def _setting(name: str, point: int) -> str:
    """The hyperparameters at one point of a method's grid, as text.

    >>> _setting("ridge + ensemble", 24)
    'penalty 0.0001, tau 1.2'
    """
    grid = METHODS[name].grid
    places = np.unravel_index(point, [len(values) for values in grid.values()])
    return ", ".join(f"{key} {grid[key][place]:.3g}" for key, place in zip(grid, places, strict=True))


# Excess forgetting at equal fine-tuning risk, task by task. Its mean over tasks is `theory.frontier.distance` of the
# mean risks, for the shifts that were sampled. At the κ of that point of the frontier, minimised by θ_κ for every δ, a
# task's share of it is
#     [(R_ft + κR_pre)(θ̂) − (R_ft + κR_pre)(θ_κ)]/κ ≥ 0.
def _distances(problem: TwoTaskProblem, shifts: ArrayLike, risks: np.ndarray) -> np.ndarray:
    """(tasks, methods), for shifts (tasks, p) and risks (tasks, methods, 2)."""
    shifts = jnp.asarray(shifts)
    kappa = weight_at(_with_shifts(problem, shifts), risks[..., 0].mean(axis=0))
    at_ends = np.isinf(kappa) | (np.asarray(kappa) == 0)
    excess = risks - np.stack(_least(problem, shifts, kappa), axis=-1)
    per_kappa = np.where(at_ends, 0, 1 / np.where(at_ends, 1, kappa))
    return excess[..., 1] + per_kappa * excess[..., 0]


@jax.jit
def _least(problem: TwoTaskProblem, shifts: Array, kappa: Array) -> Pair[Array]:
    """R_ft and R_pre (tasks, methods) of θ_κ for every shift and κ."""
    return jax.lax.map(lambda shift: pareto(replace(problem, shift=FixedShift(shift)), kappa), shifts)
