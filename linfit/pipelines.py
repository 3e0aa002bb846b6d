"""Several stages of fine-tuning on given designs: the exact risk of every task after every stage (docs, P1; ours).

Derivation. The weights start at 0 and every stage adds a combination of its rows. So with all designs stacked, Z
(N, p), and all labels y (N,), θ_k = ZᵀL_k y for a matrix L_k (N, N). Let E select the rows of stage k, X = EZ, and G be
its filter, G = U diag(g(s)) Uᵀ/n, XXᵀ/n = U diag(s) Uᵀ. Then

    L_k = (1−τ)L_a + τ[L_{k−1} + EᵀG(E − X Zᵀ L_{k−1})],      L_{−1} = 0,

a the stage averaged with. With C = E yyᵀ − diag σ², and M the test covariance of task b,

    bias² = tr MT_bb − 2 tr LᵀB + tr LᵀQLC,   variance = tr LᵀQL diag σ²,   Q = ZMZᵀ,  B = E[(ZMθ*_b) yᵀ].
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.filters import Filter
from linfit.internal.checks import ArrayLike, non_negative, real_array, same_size
from linfit.internal.linear_algebra import eigh, gram
from linfit.risk import Risk

__all__ = ["exact_risks"]


def exact_risks(
    designs: Sequence[ArrayLike],
    filters: Sequence[Filter],
    targets: ArrayLike,
    tests: ArrayLike,
    *,
    noise_std: ArrayLike = 0.0,
    tau: ArrayLike = 1.0,
    task: Sequence[int] | None = None,
    average_with: Sequence[int] | None = None,
) -> Risk:
    """Bias² and variance (K, T) on each of T tasks after each of K stages, given their designs; weights start at 0.

    Averages over label noise and over the optima alone; formulas in the module's docstring. The price is that of a few
    products of matrices (N, N) a stage and task, N samples in all.

    Args:
        designs: X_k (n_k, p) of every stage.
        filters: of every stage, with scalar hyperparameters.
        targets: second moments (T, T, p), E θ*_a θ*_b coordinate by coordinate; products of different coordinates are 0
            on average.
        tests: eigenvalues (T, p) of the diagonal test covariance of each task.
        noise_std: σ, a number or (K,).
        tau: ensemble coefficient τ, a number or (K,).
        task: which task each stage trains on; by default stage k on task k.
        average_with: the stage that each averages with, −1 for the weights at the start; by default the one before.

    Raises ValueError for sizes that differ, or a stage that averages with a later one.

    >>> from linfit import MinNorm
    >>> risk = exact_risks([[[1.0, 0.0]]], [MinNorm()], jnp.ones((1, 1, 2)), jnp.ones((1, 2)), noise_std=0.5)
    >>> float(risk.bias[0, 0]), float(risk.variance[0, 0])   # the first coordinate is learned, up to its noise
    (1.0, 0.25)
    """
    rows = [real_array("designs", X, ndim=2) for X in designs]
    same_size("filters", len(filters), "the number of designs", len(rows))
    Z, stages = jnp.concatenate(rows), range(len(rows))
    tests, targets = non_negative("tests", tests, ndim=2), real_array("targets", targets, ndim=3)
    shape = (len(tests), len(tests), Z.shape[1])
    if targets.shape != shape or tests.shape != shape[1:]:
        raise ValueError(f"targets and tests must be {shape} and {shape[1:]}, got {targets.shape} and {tests.shape}")
    tasks = list(stages) if task is None else list(task)
    sources = [k - 1 for k in stages] if average_with is None else list(average_with)
    for name, given in (("task", tasks), ("average_with", sources)):
        same_size(name, len(given), "the number of designs", len(rows))
    if max(tasks) >= len(tests) or any(not -1 <= source < k for k, source in enumerate(sources)):
        raise ValueError(f"task must be < {len(tests)} and average_with an earlier stage, got {tasks} and {sources}")
    sizes, numbers = np.array([len(X) for X in rows]), {"noise_std": noise_std, "tau": tau}
    noise_std, tau = (jnp.broadcast_to(real_array(*pair), len(rows)) for pair in numbers.items())
    solutions = _solutions(Z, sizes, filters, tau, sources)
    return _risks(Z, solutions, targets, tests, np.repeat(tasks, sizes), jnp.repeat(noise_std**2, sizes))


def _solutions(Z: Array, sizes: np.ndarray, filters: Sequence[Filter], tau: Array, sources: list[int]) -> list[Array]:
    """L_k (N, N) of every stage."""
    kernel, identity, ends = gram(Z), jnp.eye(len(Z), dtype=Z.dtype), np.cumsum(sizes)
    solutions = {-1: jnp.zeros_like(kernel)}
    for k, (n, filter, source) in enumerate(zip(sizes.tolist(), filters, sources, strict=True)):
        own, before = slice(ends[k] - n, ends[k]), solutions[k - 1]
        s, U = eigh(kernel[own, own] / n)
        G = (U * filter(jnp.maximum(s, 0))) @ U.T / n
        tuned = before.at[own].add(G @ (identity[own] - kernel[own] @ before))
        solutions[k] = (1 - tau[k]) * solutions[source] + tau[k] * tuned
    return [solutions[k] for k in range(len(sizes))]


def _risks(Z: Array, solutions: list[Array], targets: Array, tests: Array, task: np.ndarray, noise: Array) -> Risk:
    """The traces; task and noise variance of every row of Z."""
    products = {b: (Z * targets[task, b]).T for b in range(len(tests))}  # E y θ*_bᵀ, transposed
    signal = sum((Z @ products[b]).T * (task == b) for b in set(task.tolist()))
    bias, variance = [], []
    for b, M in enumerate(tests):
        Q, B = (Z * M) @ Z.T, (Z * M) @ products[b]
        start = M @ targets[b, b]
        moved = [L.T @ Q @ L for L in solutions]
        bias.append([start - 2 * jnp.sum(L * B) + jnp.sum(m * signal) for L, m in zip(solutions, moved, strict=True)])
        variance.append([jnp.diagonal(m) @ noise for m in moved])
    return Risk(jnp.array(bias).T, jnp.array(variance).T)
