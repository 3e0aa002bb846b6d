"""The method zoo: fifteen ways to fine-tune, as short recipes, tuned alike and measured on the same tasks.

A recipe sees one draw of a `Given` and returns weights for every value of its hyperparameters. The last axis of its
grid comes whole, because filters take arrays; one before it comes a value at a time, and `vmap` runs through it, so
that whatever does not depend on it is computed once. Penalties are in units of the mean eigenvalue of the kernel,
times in its inverse.

Every method is tuned by R_ft + κR_pre averaged over validation tasks, and reported on other tasks of the same problem.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import xarray as xr
from jax import Array

from linfit import (
    FixedShift,
    GradientFlow,
    MinNorm,
    Pair,
    RandomShift,
    Ridge,
    TwoTaskProblem,
    aligned_problem,
    fine_tune,
    flow_weights,
    s3ft_targets,
    sample_design,
    sample_task,
    spectra,
)
from linfit.covariance import Empirical
from linfit.design import Task
from linfit.internal.checks import ArrayLike, count, non_negative
from sims.estimate import mean_and_error, progress
from theory.flow import fixed_point_coefficient as flow_coefficient
from theory.frontier import clipping_coefficient, pareto, trimming_ratio, weight_at, weighting_coefficient
from theory.s3ft import fixed_point_coefficient as s3ft_coefficient


class Given(NamedTuple):
    """All that a method may look at: one fine-tuning task, and what is left of pretraining."""

    X: Array
    """Fine-tuning design (n, p)."""
    y: Array
    """Its labels (n,)."""
    theta_1: Array
    """Pretrained weights (p,)."""
    replay_X: Array
    """Pretraining samples (n, p), for replay only."""
    replay_y: Array
    fisher: Array
    """diag Σ₁ (p,), for EWC only."""
    anchors: Array
    """Pretrained models (ANCHORS, p) with errors like that of θ₁, the first of them; for several anchors only."""
    key: Array

    @property
    def residual(self) -> Array:
        """y − Xθ₁ (n,)."""
        return self.y - self.X @ self.theta_1


class Recipe(NamedTuple):
    """One method: weights (…, p) from a `Given` and its hyperparameters, and the grid they are chosen from."""

    fit: Callable[..., Array]
    grid: dict[str, np.ndarray]
    """At most two axes."""
    refactors: bool = False
    """Whether every value on the first of two axes needs an eigendecomposition of its own."""


ANCHORS = 8
SUBNET_RATE = 1.0
"""Step size of random sub-net updates, in units of 1/s_max."""
L1_STEPS = 200
ALTERNATIONS = 8


def _unit(rows: Array) -> Array:
    """Mean eigenvalue of XXᵀ/n."""
    return jnp.vdot(rows, rows) / rows.shape[0] ** 2


def pretrained(given: Given) -> Array:
    """No fine-tuning at all."""
    return given.theta_1


def vanilla(given: Given) -> Array:
    """Fine-tuning until the data are interpolated."""
    return fine_tune(given.X, given.y, given.theta_1, MinNorm())


def early_stopping(given: Given, time: Array) -> Array:
    """Gradient flow, stopped at a time."""
    return fine_tune(given.X, given.y, given.theta_1, GradientFlow(time / _unit(given.X)))


def ridge(given: Given, penalty: Array) -> Array:
    """Penalty λ‖θ−θ₁‖²."""
    return fine_tune(given.X, given.y, given.theta_1, Ridge(penalty * _unit(given.X)))


def min_norm_ensemble(given: Given, tau: Array) -> Array:
    """(1−τ)θ₁ + τθ̂ of vanilla fine-tuning."""
    return fine_tune(given.X, given.y, given.theta_1, tau * MinNorm())


def ridge_ensemble(given: Given, penalty: Array, tau: Array) -> Array:
    """(1−τ)θ₁ + τθ̂ of ridge."""
    return fine_tune(given.X, given.y, given.theta_1, tau * Ridge(penalty * _unit(given.X)))


def flow(given: Given, time: Array) -> Array:
    """Weights e^{−ℓ/T} at the median temperature, stopped early: run to interpolation weights would not matter."""
    weights = flow_weights(given.residual**2)
    return fine_tune(given.X, given.y, given.theta_1, GradientFlow(time / _unit(given.X)), weights)


def flow_ensemble(given: Given, time: Array, tau: Array) -> Array:
    """(1−τ)θ₁ + τθ̂ of FLOW."""
    theta = flow(given, time)
    return given.theta_1 + tau[:, None] * (theta - given.theta_1)


def s3ft(given: Given, threshold: Array, time: Array) -> Array:
    """Own answers where they miss by at most `threshold` times the median miss, gold elsewhere; stopped early."""
    tolerance = threshold * jnp.median(abs(given.residual))
    own = given.X @ given.theta_1
    targets = s3ft_targets(own, given.y, lambda answers, gold: abs(answers - gold) <= tolerance)
    return fine_tune(given.X, targets.values, given.theta_1, GradientFlow(time / _unit(given.X)))


def replay(given: Given, fraction: Array, penalty: Array) -> Array:
    """Ridge on the fine-tuning data and a number of pretraining samples, `fraction` of n."""
    n = given.X.shape[0]
    weights = jnp.concatenate([jnp.ones(n), jnp.arange(n) < fraction * n])
    X, y = jnp.concatenate([given.X, given.replay_X]), jnp.concatenate([given.y, given.replay_y])
    return fine_tune(X, y, given.theta_1, Ridge(penalty * _unit(given.X)), weights)


def ewc(given: Given, penalty: Array) -> Array:
    """Penalty λ Σ F_j(θ_j−θ₁_j)², F the diagonal of the Fisher information Σ₁: ridge in coordinates F^{1/2}θ."""
    root = jax.lax.rsqrt(given.fisher)
    rows = given.X * root
    return given.theta_1 + root * fine_tune(rows, given.residual, jnp.zeros_like(root), Ridge(penalty * _unit(rows)))


def l1(given: Given, penalty: Array) -> Array:
    """Penalty λ‖θ−θ₁‖₁ by accelerated proximal gradient; λ in units of the least that keeps θ₁.

    The steps are enough for all but the smallest penalties of the grid, where they end 1% before the solution.
    """
    X, n = given.X, given.X.shape[0]
    rate = 1 / (jnp.linalg.eigvalsh(X @ X.T / n)[-1])
    threshold = rate * penalty[:, None] * jnp.max(abs(given.residual @ X)) / n

    def step(state: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        moved, ahead = state
        proposal = ahead + rate / n * (given.residual - ahead @ X.T) @ X
        proposal = jnp.sign(proposal) * jnp.maximum(abs(proposal) - threshold, 0)
        return (proposal, proposal + k / (k + 3) * (proposal - moved)), None

    start = jnp.zeros((penalty.size, X.shape[1]), X.dtype)
    (moved, _), _ = jax.lax.scan(step, (start, start), jnp.arange(L1_STEPS))
    return given.theta_1 + moved


def low_rank(given: Given, rank: Array, penalty: Array) -> Array:
    """θ = θ₁ + vec(BA) with BA the change of a weight matrix as square as can be, after LoRA; by alternating ridge.

    The loss is ‖y−Xθ‖²/2n + λ(‖A‖²+‖B‖²)/2, B with `rank` columns; λ in units of the least that keeps θ₁.
    Starts along the top singular vectors of the first gradient; with small penalties that may end in a local minimum.
    """
    n, p = given.X.shape
    rows = round(p**0.5)
    columns, widest = -(-p // rows), int(RANKS[-1])
    matrices = jnp.pad(given.X, ((0, 0), (0, rows * columns - p))).reshape(n, rows, columns)
    left, scales, _ = jnp.linalg.svd(jnp.tensordot(given.residual, matrices, 1) / n)

    def ridge_step(features: Array, penalty: Array) -> Array:
        flat = features.reshape(n, -1)
        system = flat.T @ flat / n + penalty * scales[0] * jnp.eye(flat.shape[1])
        return jax.scipy.linalg.solve(system, flat.T @ given.residual / n, assume_a="pos").reshape(features.shape[1:])

    def at(penalty: Array) -> Array:
        def alternate(B: Array, _: None) -> tuple[Array, None]:
            A = ridge_step(jnp.einsum("nij,ik->nkj", matrices, B), penalty)
            return ridge_step(jnp.einsum("nij,kj->nik", matrices, A), penalty), None

        B, _ = jax.lax.scan(alternate, left[:, :widest] * (jnp.arange(widest) < rank), None, ALTERNATIONS)
        A = ridge_step(jnp.einsum("nij,ik->nkj", matrices, B), penalty)
        return (B @ A).ravel()[:p]

    return given.theta_1 + jax.lax.map(at, penalty)


def subnet(given: Given, keep: Array, steps: Array) -> Array:
    """Gradient descent in which every step moves a fresh random share `keep` of the weights (after Bi-Drop)."""
    X, n = given.X, given.X.shape[0]
    rate = SUBNET_RATE / (n * jnp.linalg.eigvalsh(X @ X.T / n)[-1])

    def step(moved: Array, key: Array) -> tuple[Array, Array]:
        chosen = jax.random.bernoulli(key, keep, moved.shape)
        moved = moved + rate * chosen * ((given.residual - X @ moved) @ X)
        return moved, moved

    keys = jax.random.split(given.key, int(SUBNET_STEPS[-1]))
    _, path = jax.lax.scan(step, jnp.zeros_like(given.theta_1), keys)
    return given.theta_1 + path[steps.astype(int) - 1]


def emulated(given: Given, size: Array, tau: Array) -> Array:
    """The change of a small model, with a random share `size` of the features, τ times, added to the large one."""
    p = given.X.shape[1]
    features = given.X * (jax.random.permutation(given.key, p) < size * p)
    return given.theta_1 + tau[:, None] * (fine_tune(features, given.y, given.theta_1, MinNorm()) - given.theta_1)


def several_anchors(given: Given, number: Array, penalty: Array) -> Array:
    """Penalty λ Σ_k ‖θ−θ⁽ᵏ⁾‖² towards several pretrained models: ridge to their mean."""
    chosen = (jnp.arange(ANCHORS) < number) / number
    return fine_tune(given.X, given.y, chosen @ given.anchors, Ridge(penalty * _unit(given.X)))


PENALTIES, TIMES = np.logspace(-4, 2, 25), np.logspace(-2.5, 3.5, 25)
FLOW_TIMES = np.logspace(-2, 7, 28)
"""Hard samples have weights of 10⁻⁶ and less, and FLOW takes that much longer to fit them."""
TAUS = np.linspace(0.0, 1.2, 25)
RANKS = np.array([1, 2, 4])
SUBNET_STEPS = np.unique(np.round(np.logspace(0, np.log10(256), 17)))

RECIPES: dict[str, Recipe] = {
    "pretrained": Recipe(pretrained, {}),
    "vanilla": Recipe(vanilla, {}),
    "early stopping": Recipe(early_stopping, {"time": TIMES}),
    "ridge": Recipe(ridge, {"penalty": PENALTIES}),
    "min-norm + ensemble": Recipe(min_norm_ensemble, {"tau": TAUS}),
    "ridge + ensemble": Recipe(ridge_ensemble, {"penalty": PENALTIES, "tau": TAUS}),
    "FLOW": Recipe(flow, {"time": FLOW_TIMES}),
    "FLOW + ensemble": Recipe(flow_ensemble, {"time": FLOW_TIMES[::2], "tau": TAUS}),
    "S3FT": Recipe(s3ft, {"threshold": np.array([0.25, 0.5, 1.0, 1.5, 2.0]), "time": TIMES}),
    "replay": Recipe(replay, {"fraction": np.array([0.25, 0.5, 1.0]), "penalty": PENALTIES}, refactors=True),
    "EWC": Recipe(ewc, {"penalty": PENALTIES}),
    "L1 to init": Recipe(l1, {"penalty": np.logspace(-2.5, 0, 11)}),
    "low rank": Recipe(low_rank, {"rank": RANKS, "penalty": np.logspace(-2.5, 0, 6)}, refactors=True),
    "random sub-nets": Recipe(subnet, {"keep": np.array([0.1, 0.5]), "steps": SUBNET_STEPS}),
    "emulated": Recipe(emulated, {"size": np.array([0.125, 0.25, 0.5, 0.75]), "tau": TAUS}, refactors=True),
    "several anchors": Recipe(several_anchors, {"number": np.array([2, 4, 8]), "penalty": PENALTIES}),
}
"""Every method by name. What some call LoRA, Bi-Drop and several anchors is said in each recipe."""


def over_grid(recipe: Recipe, given: Given) -> Array:
    """Weights (…, p) at every point of the grid, one axis per hyperparameter."""
    if not recipe.grid:
        return recipe.fit(given)
    *first, last = [jnp.asarray(values) for values in recipe.grid.values()]
    if not first:
        return recipe.fit(given, last)
    # Eigendecompositions of a batch, which vmap would make, fight over the threads of a busy machine: one by one then.
    along = jax.lax.map if recipe.refactors else lambda function, values: jax.vmap(function)(values)
    return along(lambda value: recipe.fit(given, value, last), first[0])


def draw(key: Array, problem: TwoTaskProblem, n: int, law: str = "gaussian") -> tuple[Given, Array]:
    """One task with all that methods may look at, and its shift δ (p,); θ₁* = 0.

    The other anchors have the pretraining error u with random signs.
    """
    task_key, replay_key, noise_key, sign_key, method_key = jax.random.split(key, 5)
    task = sample_task(task_key, problem, n, law)
    replay_X = sample_design(replay_key, problem.pretrain_covariance, n, law)
    replay_y = problem.noise_std * jax.random.normal(noise_key, (n,), task.X.dtype)
    signs = jax.random.rademacher(sign_key, (ANCHORS, problem.p), task.X.dtype).at[0].set(1)
    fisher = problem.pretrain_covariance.diagonal()
    given = Given(task.X, task.y, task.theta_1, replay_X, replay_y, fisher, signs * task.theta_1, method_key)
    return given, task.theta_2_star


@eqx.filter_jit
def _measure(problem: TwoTaskProblem, keys: Array, n: int, names: tuple[str, ...], law: str) -> dict[str, Array]:
    """For every key, (R_ft, R_pre) of every method over its grid, (keys, points, 2), and the shifts (keys, p)."""

    def one(key: Array) -> dict[str, Array]:
        given, delta = draw(key, problem, n, law)
        measured = {"": delta}
        for name in names:
            theta = over_grid(RECIPES[name], given).reshape(-1, problem.p)
            # One method after the other: two eigendecompositions at once can starve each other of XLA's threads.
            given, theta = jax.lax.optimization_barrier((given, theta))
            risks = [
                jnp.sum(covariance.apply(error) * error, axis=-1)
                for covariance, error in (
                    (problem.finetune_covariance, theta - delta),
                    (problem.pretrain_covariance, theta),
                )
            ]
            measured[name] = jnp.stack(risks, axis=-1)
        return measured

    return jax.lax.map(one, keys)


CHUNK = 16
"""Tasks measured between two signs of life; every call compiles for this many."""


class Samples(NamedTuple):
    """Risks of every task at every point of a method's grid."""

    risks: dict[str, np.ndarray]
    """(tasks, points, 2): R_ft and R_pre."""
    shifts: np.ndarray
    """δ (tasks, p)."""


def measure(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    tasks: int,
    names: Sequence[str] = tuple(RECIPES),
    law: str = "gaussian",
) -> Samples:
    """Fine-tune `tasks` tasks by every named method. Task i depends on `fold_in(key, i)` alone.

    Raises ValueError for an unknown name or fewer than 1 sample or task.
    """
    n, tasks = count("n", n), count("tasks", tasks)
    unknown = [name for name in names if name not in RECIPES]
    if unknown or not names:
        raise ValueError(f"names must be among {', '.join(RECIPES)}; got {', '.join(unknown) or 'none'}")
    indices = jnp.arange(-(-tasks // CHUNK) * CHUNK).reshape(-1, CHUNK)
    parts = [
        jax.device_get(_measure(problem, jax.vmap(partial(jax.random.fold_in, key))(chunk), n, tuple(names), law))
        for chunk in progress(indices, "comparing methods", len(indices))
    ]
    # What comes out of `jit` has its names sorted; here they are in the order asked for.
    measured = {name: np.concatenate([part[name] for part in parts])[:tasks] for name in names}
    return Samples(measured, np.concatenate([part[""] for part in parts])[:tasks])


def compare(
    problem: TwoTaskProblem,
    n: int,
    key: Array,
    *,
    weight: float = 1.0,
    tasks: int = 64,
    validation: int = 32,
    names: Sequence[str] = tuple(RECIPES),
    law: str = "gaussian",
) -> xr.Dataset:
    """Every method of the zoo on one problem, tuned alike, with standard errors and its distance to the frontier.

    Each method's hyperparameters minimise R_ft + κR_pre, κ = `weight`, averaged over `validation` tasks; they are
    reported on `tasks` others of the same problem, which are the same for all methods. Dimension `estimator`, best
    first. Variables: `finetune`, `pretrain`, `criterion` = R_ft + κR_pre; `margin`, by how much the criterion exceeds
    that of the best method, paired; `distance`, forgetting above the Pareto frontier at equal R_ft (docs, E2), the
    frontier being that of the shifts drawn; each with `…_error`, one standard error over tasks. `setting`: the values
    chosen.

    Set OPENBLAS_NUM_THREADS=1 and NPROC=4 before JAX is imported, as the command line does: on a busy machine the many
    small eigendecompositions are several times faster. Raises ValueError for an unknown name, a κ that is negative, or
    fewer than 2 tasks.

    >>> from linfit import aligned_problem, spectra
    >>> data = compare(aligned_problem(spectra.power_law(30)), 10, jax.random.key(0), names=("vanilla", "ridge"),
    ...                tasks=8, validation=4)
    >>> data.estimator.values.tolist()
    ['ridge', 'vanilla']
    >>> bool((data.distance >= 0).all())
    True
    """
    tasks, validation = count("tasks", tasks, minimum=2), count("validation", validation)
    non_negative("weight", weight, ndim=0)
    samples = measure(key, problem, n, validation + tasks, names, law)
    return rank(samples, problem, weight, validation).assign_attrs(n=n, p=problem.p, law=law)


def rank(samples: Samples, problem: TwoTaskProblem, weight: float = 1.0, validation: int = 32) -> xr.Dataset:
    """What `compare` returns, from tasks already measured: another κ costs nothing.

    The first `validation` tasks tune, the others test. Raises ValueError unless that leaves 2 of them, or for κ < 0.
    """
    costs = np.array([1.0, float(non_negative("weight", weight, ndim=0))])
    if not 1 <= validation <= len(samples.shifts) - 2:
        raise ValueError(
            f"validation must leave at least 2 of {len(samples.shifts)} tasks for testing, got {validation}"
        )
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
        "distance": distances(problem, samples.shifts[validation:], tested),
    }
    variables: dict[str, xr.Variable] = {}
    for name, values in quantities.items():
        variables |= mean_and_error(values, ("estimator",), name)
    variables["setting"] = xr.Variable("estimator", [setting(name, chosen[name]) for name in methods])
    return xr.Dataset(
        variables, {"estimator": methods}, {"weight": costs[1], "tasks": len(tested), "validation": validation}
    )


def frontier(samples: Samples, problem: TwoTaskProblem, weights: ArrayLike, validation: int = 32) -> xr.Dataset:
    """The Pareto frontier of the shifts of the test tasks at every κ of `weights`: `finetune` and `pretrain`."""
    points = pareto(_with_shift(problem, RandomShift(Empirical(samples.shifts[validation:]))), weights)
    values = {name: ("kappa", np.asarray(value)) for name, value in points._asdict().items()}
    return xr.Dataset(values, {"kappa": np.asarray(weights)})


def setting(name: str, point: int) -> str:
    """The hyperparameters at one point of a method's grid, as text.

    >>> setting("ridge + ensemble", 24)
    'penalty 0.0001, tau 1.2'
    """
    grid = RECIPES[name].grid
    places = np.unravel_index(point, [len(values) for values in grid.values()])
    return ", ".join(f"{key} {grid[key][place]:.3g}" for key, place in zip(grid, places, strict=True))


def distances(problem: TwoTaskProblem, shifts: ArrayLike, risks: np.ndarray) -> np.ndarray:
    """Excess forgetting at equal fine-tuning risk, task by task (tasks, methods), for risks (tasks, methods, 2).

    Its mean over tasks is `theory.frontier.distance` of the mean risks, for the shifts (tasks, p) that were drawn. At
    the κ of that point of the frontier, minimised by θ_κ for every δ, a task's share of it is

        [(R_ft + κR_pre)(θ̂) − (R_ft + κR_pre)(θ_κ)]/κ ≥ 0.
    """
    shifts = jnp.asarray(shifts)
    drawn = _with_shift(problem, RandomShift(Empirical(shifts)))
    kappa = weight_at(drawn, risks[..., 0].mean(axis=0))
    at_ends = np.isinf(kappa) | (np.asarray(kappa) == 0)
    floor = _floors(problem, shifts, kappa)
    excess = risks - np.stack([floor.finetune, floor.pretrain], axis=-1)
    per_kappa = np.where(at_ends, 0, 1 / np.where(at_ends, 1, kappa))
    return excess[..., 1] + per_kappa * excess[..., 0]


@jax.jit
def _floors(problem: TwoTaskProblem, shifts: Array, kappa: Array) -> Pair[Array]:
    """R_ft and R_pre (tasks, methods) of θ_κ for every shift and κ."""
    return jax.lax.map(lambda shift: pareto(_with_shift(problem, FixedShift(shift)), kappa), shifts)


def _with_shift(problem: TwoTaskProblem, shift: RandomShift | FixedShift) -> TwoTaskProblem:
    return TwoTaskProblem(
        problem.pretrain_covariance, problem.finetune_covariance, shift, problem.noise_std, problem.pretrain_error
    )


ALIGNMENTS = {"tail shift": -1.0, "isotropic shift": 0.0, "head shift": 1.0}
NOISE_VARIANCES = {"low noise": 0.05, "high noise": 1.0}
PRETRAIN_DECAY, PRETRAIN_RISK = 0.5, 0.1


def world(p: int, alignment: float, noise_variance: float) -> TwoTaskProblem:
    """Σ₂ = diag(1/j), Σ₁ ∝ diag(j^−½) of the same trace, Ω ∝ Σ₂^alignment with tr ΩΣ₂ = 1, R_pre(θ₁) = 0.1 (ours).

    Pretraining was broader than the new task: small directions of Σ₂ matter more to it.

    >>> world(30, 0.0, 0.05).p
    30
    """
    finetune = spectra.power_law(p)
    return aligned_problem(
        finetune,
        alignment=alignment,
        noise_std=noise_variance**0.5,
        pretrain_spectrum=spectra.power_law(p, PRETRAIN_DECAY, trace=finetune.sum()),
        pretrain_risk=PRETRAIN_RISK,
    )


def worlds(p: int) -> dict[str, TwoTaskProblem]:
    """Six problems: the shift in the tail, isotropic, or along the head of the spectrum; low and high noise."""
    return {
        f"{shift}, {noise}": world(p, alignment, variance)
        for shift, alignment in ALIGNMENTS.items()
        for noise, variance in NOISE_VARIANCES.items()
    }


# E1 measured: methods that are an ensemble in disguise --------------------------------------------------------------


def _averaged(residual: Array, tau: Array) -> tuple[Array, Array]:
    return tau * residual, jnp.ones_like(residual)


def _self_labelled(residual: Array, threshold: Array) -> tuple[Array, Array]:
    own = jnp.zeros_like(residual)
    kept = s3ft_targets(own, residual, lambda answers, gold: abs(answers - gold) <= threshold)
    return kept.values, jnp.ones_like(residual)


def _clipped(residual: Array, threshold: Array) -> tuple[Array, Array]:
    return jnp.clip(residual, -threshold, threshold), jnp.ones_like(residual)


def _flow_weighted(residual: Array, temperature: Array) -> tuple[Array, Array]:
    return residual, flow_weights(residual**2, temperature)


def _trimmed(residual: Array, threshold: Array) -> tuple[Array, Array]:
    return residual, (abs(residual) <= threshold).astype(residual.dtype)


class Disguise(NamedTuple):
    """A method whose least-squares fit is θ₁ + τΔ in the Gaussian population."""

    labels: Callable[[Array, Array], tuple[Array, Array]]
    """(r, knob) → targets relative to Xθ₁, and weights, for residuals r = y − Xθ₁ (n,)."""
    tau: Callable[[ArrayLike, float, float], Array]
    """(knob, signal q, σ) → τ."""


DISGUISES: dict[str, Disguise] = {
    "ensemble": Disguise(_averaged, lambda tau, signal, noise_std: jnp.asarray(tau)),
    "S3FT": Disguise(_self_labelled, lambda c, signal, noise_std: s3ft_coefficient(c, (signal + noise_std**2) ** 0.5)),
    "clipped targets": Disguise(
        _clipped, lambda c, signal, noise_std: clipping_coefficient(c, (signal + noise_std**2) ** 0.5)
    ),
    "FLOW": Disguise(_flow_weighted, lambda temperature, signal, noise_std: flow_coefficient(noise_std, temperature)),
    "trimming": Disguise(
        _trimmed,
        lambda c, signal, noise_std: weighting_coefficient(
            trimming_ratio(c, (signal + noise_std**2) ** 0.5), signal, noise_std
        ),
    ),
}
"""What each one's knob is: τ; the tolerance; the clipping threshold; the temperature; the largest residual kept."""


def knob(name: str, tau: float, signal: float, noise_std: float) -> float:
    """The knob at which a method is an ensemble with coefficient τ ∈ (0, 1), by bisection in its logarithm.

    >>> round(knob("FLOW", 0.5, signal=1.0, noise_std=0.5), 9)       # T = 2σ²τ/(1−τ)
    0.5
    """

    def gap(logarithm: float) -> float:
        return float(DISGUISES[name].tau(jnp.exp(logarithm), signal, noise_std)) - tau

    return float(np.exp(scipy.optimize.brentq(gap, -12.0, 12.0, xtol=1e-12)))


def disguised(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    knobs: Mapping[str, ArrayLike],
    replicates: int,
    law: str = "gaussian",
    rows: int | None = None,
) -> xr.Dataset:
    """Least-squares fits (n > p) of the methods of `knobs`, each at one knob or at k of them, and where they end.

    Dimensions (estimator, setting): `tau`, the fitted coefficient ⟨θ̂−θ₁, Δ⟩/‖Δ‖² in the metric Σ₂; `off`,
    ‖θ̂−θ₁−τ̂Δ‖²_{Σ₂}/‖Δ‖², how far from the segment; `finetune`, R_ft; each a mean over replicates with its standard
    error. All fits of a replicate are on the same data, the first n of `rows` samples drawn (n if not given): calls
    with the same `rows` are nested and compile once.

    >>> from linfit import FixedShift, TwoTaskProblem
    >>> problem = TwoTaskProblem([1.0, 0.5], [1.0, 0.5], FixedShift([1.0, -1.0]), noise_std=0.5)
    >>> data = disguised(jax.random.key(0), problem, 400, {"ensemble": 0.5, "FLOW": 0.5}, replicates=50)
    >>> bool((abs(data.tau - 0.5) < 4 * data.tau_error).all())
    True
    """
    at = np.stack([np.atleast_1d(np.asarray(value, float)) for value in knobs.values()])
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count("replicates", replicates, minimum=2)))
    if unknown := [name for name in knobs if name not in DISGUISES]:
        raise ValueError(f"knobs must be of {', '.join(DISGUISES)}; got {', '.join(unknown)}")
    n = count("n", n)
    rows = count("rows", n if rows is None else rows, minimum=n)
    drawn = _draw_tasks(problem, keys, rows, law)
    samples = jax.device_get(_disguised(problem, drawn, jnp.asarray(at), jnp.asarray(n), tuple(knobs)))
    variables: dict[str, xr.Variable] = {}
    for name, values in samples.items():
        variables |= mean_and_error(values, ("estimator", "setting"), name)
    return xr.Dataset(variables, {"estimator": list(knobs)}, {"n": n, "replicates": replicates, "law": law})


@eqx.filter_jit
def _draw_tasks(problem: TwoTaskProblem, keys: Array, rows: int, law: str) -> Task:
    return jax.lax.map(lambda key: sample_task(key, problem, rows, law), keys)


@eqx.filter_jit
def _disguised(
    problem: TwoTaskProblem, tasks: Task, knobs: Array, n: Array, names: tuple[str, ...]
) -> dict[str, Array]:
    covariance = problem.finetune_covariance

    def square(vectors: Array) -> Array:
        return jnp.sum(covariance.apply(vectors) * vectors, axis=-1)

    def one(task: Task) -> dict[str, Array]:
        gap, residual = task.theta_2_star - task.theta_1, task.y - task.X @ task.theta_1
        labelled = [jax.vmap(partial(DISGUISES[name].labels, residual))(at) for name, at in zip(names, knobs)]
        targets, weights = (jnp.concatenate(parts) for parts in zip(*labelled, strict=True))
        weights, start = weights * (jnp.arange(len(residual)) < n), jnp.zeros_like(gap)
        moved = jax.lax.map(lambda data: fine_tune(task.X, data[0], start, MinNorm(), data[1]), (targets, weights))
        moved = moved.reshape(*knobs.shape, -1)
        tau = covariance.apply(moved) @ gap / square(gap)
        return {"tau": tau, "off": square(moved - tau[..., None] * gap) / square(gap), "finetune": square(moved - gap)}

    return jax.lax.map(one, tasks)
