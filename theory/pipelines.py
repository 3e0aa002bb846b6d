"""Pipelines: the risk on every task after every stage of fine-tuning, without sampling (docs, P1; ours).

Stage k fits its task, optimum θ*_k, on n_k new samples, from the weights of the stage before, and may average:

    θ_k = (1−τ_k)θ_a + τ_k·(fine-tuned from θ_{k−1}),      θ_{−1} = 0,

a any earlier stage, k−1 unless said otherwise. Pretraining is stage 0.

Derivation. All covariances share an eigenbasis and all designs are independent. By D1 and D2 the fine-tuned weights
are, coordinate by coordinate, (1−f)θ_{k−1} + fθ*_k plus a fluctuation that nothing earlier is correlated with, of
variance Var (`theory.movement`), where E Δ² = E(θ*_k − θ_{k−1})². So θ_k is a known linear combination of earlier
weights and optima plus independent noise, and the second moments among current weights, weights averaged with later and
optima follow from each other: a row of new products is the same combination of the old rows. On task b, M its spectrum,

    R_b = Σ_j M_j E(θ_k − θ*_b)_j².

Only second moments enter, so optima may be random or fixed, correlated in any way. What label noise adds follows the
same recursion with all optima 0; the rest is bias².
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax import Array

from linfit.filters import Filter, GradientFlow, Ridge
from linfit.internal.checks import ArrayLike, Maybe, is_concrete, non_negative, positive, real_array, same_size
from linfit.risk import Risk
from theory.movement import Movement, Nodes, movement, nodes, require_stable

__all__ = ["Optimum", "Stage", "best_source_size", "bias_and_variance", "optimal", "risks", "transfer"]

Indices = int | Sequence[int] | None


class Stage(eqx.Module):
    """One stage of fine-tuning, or several in a row: arrays of numbers are that many stages.

    `Stage(spectrum, 100, 0.5, Ridge(penalties))` with penalties (1000,) is a thousand stages that share the rest.

    Args:
        spectrum: eigenvalues (p,) or, one row a stage, (K, p), in the eigenbasis common to all stages; zeros allowed.
        n: samples, any real number > 0, scalar or (K,); so are the next and the hyperparameters of the filter.
        noise_std: σ of the label noise.
        filter: MinNorm, Ridge, GradientFlow, GradientDescent, SelfDistillation, or sums and multiples of them.
        tau: ensemble coefficient τ, any finite number.
        task: which task it trains on, an int or K of them; by default stage k trains on task k.
        average_with: index of the stage that is averaged with, −1 for the weights 0 at the start; by default the stage
            before. An int or K of them.

    Raises ValueError for values out of range or leading axes that differ.

    >>> from linfit import Ridge
    >>> len(Stage(jnp.ones(10), [5, 6, 7], 0.1, Ridge(0.5)))
    3
    """

    spectrum: Array
    n: Array
    noise_std: Array
    filter: Filter
    tau: Array
    task: tuple[int, ...] | None = eqx.field(static=True)
    average_with: tuple[int, ...] | None = eqx.field(static=True)
    _count: int = eqx.field(static=True)

    def __init__(
        self,
        spectrum: ArrayLike,
        n: ArrayLike,
        noise_std: ArrayLike,
        filter: Filter,
        tau: ArrayLike = 1.0,
        *,
        task: Indices = None,
        average_with: Indices = None,
    ):
        self.spectrum = non_negative("spectrum", spectrum)
        if self.spectrum.ndim not in (1, 2):
            raise ValueError(f"spectrum must have shape (p,) or (stages, p), got {self.spectrum.shape}")
        self.n, self.noise_std = positive("n", n), non_negative("noise_std", noise_std)
        if not isinstance(filter, Filter):
            raise ValueError(f"filter must be a linfit filter such as Ridge(0.1), got {type(filter).__name__}")
        self.filter, self.tau = filter, real_array("tau", tau)
        self.task, self.average_with = _indices("task", task, 0), _indices("average_with", average_with, -1)
        of_filter = nodes(filter, self.spectrum.dtype).weights.shape[:-1]
        shapes = [self.spectrum.shape[:-1], self.n.shape, self.noise_std.shape, self.tau.shape, of_filter]
        shapes += [(len(given),) for given in (self.task, self.average_with) if given and len(given) > 1]
        lengths = {shape for shape in shapes if shape != ()}
        if len(lengths) > 1 or any(len(shape) > 1 for shape in lengths):
            raise ValueError(f"numbers of a Stage must be scalars or have one length, one a stage, got shapes {shapes}")
        self._count = lengths.pop()[0] if lengths else 1

    def __len__(self) -> int:
        """How many stages."""
        return self._count


def _indices(name: str, given: Indices, minimum: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    array = np.atleast_1d(np.asarray(given))
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or (array < minimum).any():
        raise ValueError(f"{name} must be a whole number ≥ {minimum}, or one a stage, got {given!r}")
    return tuple(array.tolist())


class _Run(NamedTuple):
    """Stages whose filters have as many nodes, so that one scan serves them; leading axis (K,)."""

    spectrum: Array | None
    """(K, p), or (p,) if all share it; None where it is not repeated."""
    nodes: Nodes
    n: Array
    noise_std: Array
    tau: Array
    task: Array
    source: Array
    """Slot of the weights that are averaged with: 0 those of the stage before."""
    store: Array
    """Slot that keeps the weights for later; 0 keeps nothing."""


def bias_and_variance(stages: Stage | Sequence[Stage], targets: ArrayLike, tests: Maybe = None) -> Risk:
    """Squared bias and variance on every task after every stage, each (K, T); their sum is `risks` (docs, P1; ours).

    Bias is what remains without label noise in any stage, variance what the noise of all stages so far adds. Arguments
    and errors as for `risks`.

    >>> from linfit import MinNorm
    >>> flat = jnp.ones(4)
    >>> risk = bias_and_variance([Stage(flat, 2, 1.0, MinNorm())], jnp.ones((1, 1, 4)))
    >>> float(risk.bias[0, 0]), float(risk.variance[0, 0])   # (1−n/p)·4, σ²n/(p−n)
    (2.0, 1.0)
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    targets, tests = _checked(stages, targets, tests)
    runs, slots = _runs(stages, tests.dtype)
    rows = jnp.zeros((2, slots, slots + len(targets), tests.shape[1]), tests.dtype)
    results = []
    for run in runs:
        rows, result = _scan(run, targets, tests, rows)
        results.append(result)
    bias, variance = jnp.moveaxis(jnp.concatenate(results), 1, 0)
    return Risk(bias, jnp.where(jnp.isnan(variance), jnp.inf, variance))  # what was infinite stays so: ∞ − ∞, 0·∞


def risks(stages: Stage | Sequence[Stage], targets: ArrayLike, tests: Maybe = None) -> Array:
    """Excess risk (K, T) on each of T tasks after each of K stages, from weights 0 (docs, P1; ours).

        R_kb = Σ_j M⁽ᵇ⁾_j E(θ_k − θ*_b)_j²

    Args:
        stages: a `Stage` each, in order; one may stand for many.
        targets: second moments (T, T, p), E θ*_a θ*_b coordinate by coordinate, or (T, T, 1) if all are alike.
        tests: spectra (T, p) of the test covariances M; by default of the first stage that trains on the task.

    Without `task` in the stages T = K, and row k is after stage k, column b is task b. Asymptotic: every n and p large,
    relative error O(1/n); covariances with a common eigenbasis, new samples with Gaussian-like coordinates in every
    stage. The cost of a stage is that of `theory.movement` and of T passes over p; averaging with A other stages than
    the one before multiplies the memory by (1+A)². Works under jit, vmap and grad. Raises ValueError for sizes that
    differ, tasks that no stage has and `tests` does not cover, targets that are no second moments, an average with a
    stage to come, gradient descent that diverges.

    >>> from linfit import MinNorm, Ridge, spectra
    >>> pretrain, finetune = spectra.isotropic(400), spectra.power_law(400)
    >>> similarity = jnp.array([[1.0, 0.8], [0.8, 1.0]])
    >>> stages = [Stage(pretrain, 200, 0.1, MinNorm()), Stage(finetune, 100, 0.1, Ridge(0.01), tau=0.8)]
    >>> risks(stages, similarity[:, :, None] / 400).round(3)
    Array([[0.51 , 0.012],
           [0.564, 0.007]], dtype=float64)
    """
    return bias_and_variance(stages, targets, tests).total


def _tasks(stages: list[Stage]) -> list[int]:
    """Task of every stage."""
    tasks: list[int] = []
    for stage in stages:
        default = range(len(tasks), len(tasks) + len(stage))
        tasks += default if stage.task is None else np.broadcast_to(stage.task, len(stage)).tolist()
    return tasks


def _checked(stages: list[Stage], targets: ArrayLike, tests: Maybe) -> tuple[Array, Array]:
    """Targets (T, T, p or 1) and tests (T, p), in the dtype of the spectra."""
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise ValueError(f"stages must be a Stage or a sequence of at least one, got {stages!r}")
    p, dtype = stages[0].spectrum.shape[-1], jnp.result_type(*(stage.spectrum.dtype for stage in stages))
    for stage in stages:
        same_size("spectrum", stage.spectrum.shape[-1], "the spectrum of the first stage", p)
        require_stable(stage.filter, stage.spectrum, stage.n)
    targets, tasks = _second_moments(targets, p).astype(dtype), _tasks(stages)
    if max(tasks) >= len(targets):
        hint = "a stage without `task` trains on its own"
        raise ValueError(f"targets must be for {max(tasks) + 1} tasks or more ({hint}), got shape {targets.shape}")
    if tests is not None:
        tests = non_negative("tests", tests, ndim=2).astype(dtype)
        if tests.shape != (len(targets), p):
            raise ValueError(f"tests must have shape (tasks, p) = {(len(targets), p)}, got {tests.shape}")
        return targets, tests
    missing = set(range(len(targets))) - set(tasks)
    if missing:
        raise ValueError(f"tests must be given for tasks that no stage trains on, here {sorted(missing)}")
    rows = [row for stage in stages for row in _rows(stage)]
    return targets, jnp.stack([rows[tasks.index(task)] for task in range(len(targets))]).astype(dtype)


def _rows(stage: Stage) -> list[Array]:
    """Spectrum of each stage that a Stage stands for."""
    return list(stage.spectrum) if stage.spectrum.ndim == 2 else [stage.spectrum] * len(stage)


def _second_moments(targets: ArrayLike, p: int) -> Array:
    """Targets that are symmetric and obey Cauchy and Schwarz in every coordinate."""
    targets = real_array("targets", targets, ndim=3)
    if targets.shape[0] != targets.shape[1] or targets.shape[2] not in (1, p):
        raise ValueError(f"targets must have shape (tasks, tasks, p) with p = {p}, got {targets.shape}")
    if is_concrete(targets):
        host = np.asarray(targets)
        tolerance = float(jnp.finfo(targets.dtype).eps) ** 0.375
        square = np.einsum("aaj->aj", host)
        non_negative("targets (its diagonal, E θ*²)", square)
        for task, products in enumerate(host):
            limit = np.sqrt(square[task] * square)
            if (np.abs(products - host[:, task]) > tolerance * limit).any():
                raise ValueError(f"targets must be symmetric in the tasks, targets[{task}, :] differs from [:, {task}]")
            if (np.abs(products) > (1 + tolerance) * limit).any():
                raise ValueError(f"targets must be second moments, |E θ_aθ_b|² ≤ E θ_a² E θ_b²; task {task} breaks it")
    return targets


def _slots(stages: list[Stage]) -> tuple[list[int], list[int], int]:
    """Source and store of every stage, and how many weights are kept at a time, the current ones first."""
    sources: list[int] = []
    for stage in stages:
        default = range(len(sources) - 1, len(sources) - 1 + len(stage))
        sources += default if stage.average_with is None else np.broadcast_to(stage.average_with, len(stage)).tolist()
    late = [k for k, source in enumerate(sources) if source >= k]
    if late:
        raise ValueError(f"average_with must be an earlier stage, got {sources[late[0]]} in stage {late[0]}")
    kept = sorted({source for k, source in enumerate(sources) if source != k - 1})
    slot = {source: index + 1 for index, source in enumerate(kept)}  # that of −1 is never written, and stays 0
    source_slots = [0 if source == k - 1 else slot[source] for k, source in enumerate(sources)]
    return source_slots, [slot.get(k, 0) for k in range(len(sources))], len(kept) + 1


def _runs(stages: list[Stage], dtype: jnp.dtype) -> tuple[list[_Run], int]:
    """Consecutive stages with as many nodes as one run each; the number of slots."""
    tasks, (sources, stores, slots), parts, first = _tasks(stages), _slots(stages), [], 0
    for stage in stages:
        count, ridges = len(stage), nodes(stage.filter, dtype)
        numbers = (jnp.broadcast_to(x.astype(dtype), (count,)) for x in (stage.n, stage.noise_std, stage.tau))
        filters = Nodes(*(jnp.broadcast_to(x, (count, x.shape[-1])) for x in ridges))
        integers = (jnp.asarray(x[first : first + count]) for x in (tasks, sources, stores))
        parts.append(_Run(stage.spectrum.astype(dtype), filters, *numbers, *integers))
        first += count
    groups = groupby(parts, key=lambda run: (run.nodes.weights.shape[-1], run.nodes.weights.dtype))
    return [_merged(list(group)) for _, group in groups], slots


def _merged(runs: list[_Run]) -> _Run:
    """Runs one after the other as one; their spectra are not repeated if all are the same."""
    if len(runs) == 1:
        return runs[0]
    spectra = [run.spectrum for run in runs if run.spectrum is not None]
    spectrum, p = spectra[0], spectra[0].shape[-1]
    if not all(_same(spectrum, other) for other in spectra):
        spectrum = _joined(*(jnp.broadcast_to(s, (run.n.size, p)) for s, run in zip(spectra, runs, strict=True)))
    return jax.tree.map(_joined, *(run._replace(spectrum=None) for run in runs))._replace(spectrum=spectrum)


def _same(one: Array, other: Array) -> bool:
    if one.ndim == 2 or one.shape != other.shape:
        return False
    return one is other or (is_concrete(one, other) and np.array_equal(one, other))


def _joined(*arrays: Array) -> Array:
    """Concatenated; on the host if possible, which does not compile."""
    return jnp.asarray(np.concatenate(arrays)) if is_concrete(arrays) else jnp.concatenate(arrays)


@jax.jit
def _scan(run: _Run, targets: Array, tests: Array, rows: Array) -> tuple[Array, Array]:
    """Rows after the run, and (K, 2, T) bias and variance after each of its stages.

    Rows (2, A, A+T, p) are second moments of the weights in A slots with those weights and with the optima; of bias
    first, then of variance, where the optima are 0.
    """
    shared = run.spectrum is not None and run.spectrum.ndim == 1

    def step(rows: Array, stage: _Run) -> tuple[Array, Array]:
        spectrum = run.spectrum if stage.spectrum is None else stage.spectrum
        moved = movement(stage.nodes, spectrum, stage.n)  # type: ignore[arg-type]

        def part(rows: Array, signal: Array) -> tuple[Array, Array]:
            rows = _advanced(rows, signal * targets[stage.task], (1 - signal) * stage.noise_std, stage, moved)
            missed = signal * jnp.einsum("bbj->bj", targets) - 2 * rows[0, len(rows) :] + rows[0, 0]
            return rows, jnp.sum(tests * missed, axis=-1)

        return jax.vmap(part)(rows, jnp.array([1, 0], rows.dtype))

    return jax.lax.scan(jax.checkpoint(step), rows, run._replace(spectrum=None) if shared else run)


def _advanced(rows: Array, optimum: Array, noise_std: Array, stage: _Run, moved: Movement) -> Array:
    """Rows after a stage; optimum (T, p or 1) are the products of its optimum with all."""
    A, f, tau = len(rows), moved.fraction, stage.tau
    target = A + stage.task
    products = jnp.concatenate([rows[:, target], jnp.broadcast_to(optimum, (len(optimum), f.size))])
    gap = products[target] - 2 * rows[0, target] + rows[0, 0]
    row = (1 - tau) * rows[stage.source] + tau * ((1 - f) * rows[0] + f * products)
    square = (1 - tau) * row[stage.source] + tau * ((1 - f) * row[0] + f * row[target])
    row = row.at[0].set(square + tau**2 * moved.variance(gap, noise_std))
    rows = rows.at[0].set(row).at[:, 0].set(row[:A])
    rows = rows.at[stage.store].set(rows[0])
    return rows.at[:, stage.store].set(rows[:, 0])


class Optimum(NamedTuple):
    """The best hyperparameters found."""

    stages: list[Stage]
    value: Array
    """Σ weights · risks."""
    risks: Array
    """(K, T)."""
    converged: bool


def optimal(
    stages: Stage | Sequence[Stage],
    targets: ArrayLike,
    weights: ArrayLike,
    tests: Maybe = None,
    *,
    hold_tau: bool = False,
    max_steps: int = 200,
) -> Optimum:
    """Every stage's λ, t and τ at once, for the least Σ weights · risks (docs, P1; ours).

    By BFGS on log λ, log t and τ, from the values given: a local minimum. What is no Ridge or GradientFlow keeps its
    hyperparameters. Some minima lie at infinity: λ and τ may grow together towards a single long step of descent.

    Args:
        stages: as for `risks`; penalties and times positive and finite.
        targets: as for `risks`.
        weights: ≥ 0, of the tasks after the last stage (T,), or of every risk (K, T).
        tests: as for `risks`.
        hold_tau: whether the τ stay as given.
        max_steps: of BFGS; `converged` is False if they were not enough.

    Raises ValueError as `risks`, for weights of another shape or all zero, and for penalties or times of 0 or ∞.

    >>> from linfit import Ridge
    >>> flat = jnp.ones(100)
    >>> best = optimal([Stage(flat, 50, 1.0, Ridge(0.1))], jnp.full((1, 1, 100), 0.01), [1.0])
    >>> round(float(best.stages[0].filter.penalty), 2)   # σ²/(n E θ*²), Bayes
    2.0
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    targets, tests = _checked(stages, targets, tests)
    weights = non_negative("weights", weights).astype(tests.dtype)
    total = sum(map(len, stages))
    if weights.shape not in ((len(targets),), (total, len(targets))):
        raise ValueError(
            f"weights must have shape (tasks,) or (stages, tasks), {total, len(targets)}, got {weights.shape}"
        )

    def objective(free: list[_Free], fixed: tuple) -> Array:
        stages, targets, tests, weights = fixed
        risk = risks([_with(stage, values) for stage, values in zip(stages, free, strict=True)], targets, tests)
        return jnp.sum(weights * (risk if weights.ndim == 2 else risk[-1]))

    free, fixed = [_free(stage, hold_tau) for stage in stages], (stages, targets, tests, weights)
    scale = objective(free, fixed)
    if not float(scale) > 0:
        raise ValueError("weights must be positive somewhere where there is a risk, got Σ weights · risks = 0")
    tolerance = float(jnp.finfo(tests.dtype).eps) ** 0.375
    solver: optimistix.AbstractMinimiser = optimistix.BFGS(rtol=tolerance, atol=tolerance)

    def relative(free: list[_Free], fixed: tuple) -> Array:
        return objective(free, fixed) / scale

    solution: optimistix.Solution = optimistix.minimise(relative, solver, free, fixed, max_steps=max_steps, throw=False)
    best = [_with(stage, values) for stage, values in zip(stages, solution.value, strict=True)]
    risk = risks(best, targets, tests)
    converged = bool(solution.result == optimistix.RESULTS.successful)
    return Optimum(best, objective(solution.value, fixed), risk, converged)


def _is_free(filter: object) -> bool:
    return isinstance(filter, Ridge | GradientFlow)


class _Free(NamedTuple):
    """Logarithms of the penalties and times of a stage, and τ, None if it stays."""

    logarithms: list[Array]
    tau: Array | None


def _free(stage: Stage, hold_tau: bool) -> _Free:
    filters = [part for part in jax.tree.leaves(stage.filter, is_leaf=_is_free) if _is_free(part)]
    values = [jax.tree.leaves(filter)[0].astype(stage.spectrum.dtype) for filter in filters]
    for filter, value in zip(filters, values, strict=True):
        if not bool(((value > 0) & jnp.isfinite(value)).all()):
            raise ValueError(f"penalties and times to optimise must be positive and finite, got {filter}")
    tau = None if hold_tau else stage.tau.astype(stage.spectrum.dtype)
    return _Free([jnp.log(value) for value in values], tau)


def _with(stage: Stage, free: _Free) -> Stage:
    values, tau = iter(free.logarithms), stage.tau if free.tau is None else free.tau
    filter = jax.tree.map(
        lambda part: type(part)(jnp.exp(next(values))) if _is_free(part) else part, stage.filter, is_leaf=_is_free
    )
    return eqx.tree_at(lambda stage: (stage.filter, stage.tau), stage, (filter, tau))


# Isotropic min-norm, exactly. Projectors Π of Gaussian rows have E Π = (n/p)I, so the error after the source, which is
# (I − Π_q)(−β) + Π_qδ + noise, has two orthogonal parts of mean squares (p−n_q)/p·‖β‖² and n_q/p·‖δ‖², and the target
# keeps the share (p−n)/p of any error. Noise adds σ² E tr (XXᵀ)⁻¹ = σ²n/(p−n−1) (inverse Wishart).
def transfer(
    p: ArrayLike,
    source_n: ArrayLike,
    n: ArrayLike,
    *,
    signal: ArrayLike = 1.0,
    shift: ArrayLike = 0.0,
    source_noise_std: ArrayLike = 0.0,
    noise_std: ArrayLike = 0.0,
) -> Risk:
    """Risk on the target after isotropic min-norm on a source, then on the target (paper 2510.15337; docs, P1).

        bias² = (p−n)/p·[(p−n_q)/p·‖β‖² + (n_q/p)·‖δ‖²],
        variance = (p−n)/p·σ_q² n_q/(p−n_q−1) + σ² n/(p−n−1)

    Exact at every size. Arguments broadcast; ValueError unless p > n + 1 and p > n_q + 1. `signal` is ‖β‖² of the
    target's optimum, `shift` is ‖δ‖², δ the difference of the two optima; n_q = 0 is no transfer.

    >>> risk = transfer(100, jnp.array([0, 40]), 20, shift=0.25, source_noise_std=0.5)
    >>> risk.total.round(3)
    Array([0.8  , 0.696], dtype=float64)
    """
    p, source_n, n = positive("p", p), non_negative("source_n", source_n), non_negative("n", n)
    if is_concrete(p, source_n, n) and not (np.maximum(np.asarray(source_n), np.asarray(n)) + 1 < np.asarray(p)).all():
        raise ValueError(f"source_n and n must be below p − 1, got {source_n} and {n} with p = {p}")
    kept, learned = (p - n) / p, source_n / p
    bias = kept * ((1 - learned) * jnp.asarray(signal) + learned * jnp.asarray(shift))
    source = kept * jnp.asarray(source_noise_std) ** 2 * source_n / (p - source_n - 1)
    return Risk(*jnp.broadcast_arrays(bias, source + jnp.asarray(noise_std) ** 2 * n / (p - n - 1)))


def best_source_size(p: ArrayLike, signal_to_noise: ArrayLike, shift_to_signal: ArrayLike) -> Array:
    """Source samples n_q of least risk in `transfer`, 0 where none help (paper 2510.15337; docs, P1).

        n_q* = p − 1 − √(p(p−1)/(SNR(1−SSR))),     SNR = ‖β‖²/σ_q²,  SSR = ‖δ‖²/‖β‖²

    A real number; more source data than this overtrain. It does not depend on the target's n and noise.

    >>> best_source_size(100, jnp.array([4.0, 4.0, 0.5]), jnp.array([0.0, 1.5, 0.0])).round(2)
    Array([49.25,  0.  ,  0.  ], dtype=float64)
    """
    p, snr = positive("p", p), positive("signal_to_noise", signal_to_noise)
    gain = snr * (1 - non_negative("shift_to_signal", shift_to_signal))
    best = p - 1 - jnp.sqrt(p * (p - 1) / jnp.where(gain > 0, gain, 1))
    return jnp.where(gain > 0, jnp.maximum(best, 0), 0)
