"""Merges of runs from raw data: K fine-tunings of one model, averaged, dropped, trimmed, elected (docs, K1–K3)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from linfit import fine_tune, sample_design
from linfit.internal.checks import ArrayLike, Maybe
from linfit.merges import Gaps, MergeForm
from sims.estimate import mean_and_error, replicate
from theory import merges
from theory.merges import Run

__all__ = ["drop", "elect", "sample_moves", "soup_risks", "trim"]


def sample_moves(
    key: Array,
    runs: Sequence[Run],
    targets: ArrayLike,
    replicates: int,
    *,
    mean: Maybe = None,
    law: str = "gaussian",
    shared: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Movements θ̂_k − θ₁ (R, K, p) of K runs, from raw data, and the gaps Δ (R, T, p) of their tasks.

    Args:
        key: of all samples.
        runs: with whole n.
        targets: E Δ_aΔ_b per coordinate (T, T, p); gaps are Gaussian around `mean`.
        replicates: R.
        mean: E Δ (T, p), zero if not given.
        law: of the designs' coordinates, a key of `linfit.design.LAWS`.
        shared: whether all runs have the same samples and noise, scaled by their spectra, as far as their n go.

    >>> from linfit import MinNorm
    >>> runs = [Run(0, jnp.ones(6), 3, 0.0, MinNorm())]
    >>> moves, gaps = sample_moves(jax.random.key(0), runs, jnp.ones((1, 1, 6)), replicates=2)
    >>> moves.shape, gaps.shape, bool((moves[:, 0] * (gaps[:, 0] - moves[:, 0])).sum() < 1e-9)      # a projection
    ((2, 1, 6), (2, 1, 6), True)
    """
    tasks = Gaps.checked(targets, None, mean)
    count, sizes = len(runs), [int(run.n) for run in runs]
    eigenvalues, vectors = np.linalg.eigh(np.moveaxis(np.asarray(tasks.covariance[:-1, :-1]), -1, 0))
    roots, centre = jnp.asarray(vectors * np.sqrt(np.maximum(eigenvalues, 0))[:, None]), tasks.mean[:-1]

    def measure(key: Array) -> tuple[Array, Array]:
        gap_key, run_key = jax.random.split(key)
        gaps = centre + jnp.einsum("ptu,up->tp", roots, jax.random.normal(gap_key, centre.shape, centre.dtype))
        moves = []
        for index, (run, n) in enumerate(zip(runs, sizes, strict=True)):
            design_key, noise_key = jax.random.split(jax.random.fold_in(run_key, 0 if shared else index))
            X = sample_design(design_key, run.spectrum, n, law)
            y = X @ gaps[run.task] + run.noise_std * jax.random.normal(noise_key, (n,), X.dtype)
            moves.append(fine_tune(X, y, jnp.zeros_like(centre[0]), run.filter))
        return jnp.stack(moves), gaps

    found = replicate(measure, key, replicates, f"fine-tuning, {count} runs")
    return np.asarray(found[0]), np.asarray(found[1])


def similar_tasks(spectrum: ArrayLike, similarity: ArrayLike, alignment: ArrayLike = 0.0) -> Array:
    """E Δ_aΔ_b (2, 2, p) ∝ Σ^alignment of two tasks of correlation `similarity`, each with tr Σ E ΔΔᵀ = 1."""
    s = jnp.asarray(spectrum)
    spread = s ** jnp.asarray(alignment)
    return jnp.array([[1, similarity], [similarity, 1]])[:, :, None] * spread / jnp.vdot(spread, s)


def drop(key: Array, moves: ArrayLike, share: ArrayLike) -> Array:
    """DARE: a random `share` of the coordinates of moves (…, p) becomes 0, the rest is divided by 1 − share.

    >>> drop(jax.random.key(0), jnp.ones(8), 0.5).sum() in range(0, 17, 2)
    True
    """
    moves = jnp.asarray(moves)
    return moves * jax.random.bernoulli(key, 1 - jnp.asarray(share), moves.shape) / (1 - jnp.asarray(share))


def trim(moves: ArrayLike, keep: ArrayLike) -> Array:
    """Each of the moves (…, p) keeps round(keep·p) coordinates, the largest in size; the others become 0.

    >>> trim([[3.0, -1.0, 2.0, -4.0]], 0.5)
    Array([[ 3.,  0.,  0., -4.]], dtype=float64)
    """
    moves = jnp.asarray(moves)
    p = moves.shape[-1]
    rank = jnp.argsort(jnp.argsort(-jnp.abs(moves), axis=-1), axis=-1)
    return jnp.where(rank < jnp.round(jnp.asarray(keep) * p), moves, 0)


def elect(moves: ArrayLike) -> Array:
    """TIES without its trimming: of K moves (…, K, p) the mean (…, p) of those that have the sign of their sum.

    >>> elect([[1.0, -2.0, 0.0], [2.0, 1.0, 0.0], [-2.5, 0.0, 0.0]])
    Array([ 1.5, -2. ,  0. ], dtype=float64)
    """
    moves = jnp.asarray(moves)
    agree = moves * jnp.sign(jnp.sum(moves, axis=-2, keepdims=True)) > 0
    return jnp.sum(jnp.where(agree, moves, 0), axis=-2) / jnp.maximum(jnp.sum(agree, axis=-2), 1)


def risks(merged: ArrayLike, gap: ArrayLike, spectrum: ArrayLike) -> np.ndarray:
    """‖merged − gap‖²_M of moves (…, p)."""
    return np.sum(np.asarray(spectrum) * (np.asarray(merged) - np.asarray(gap)) ** 2, axis=-1)


def soup_risks(
    key: Array, run: Run, targets: ArrayLike, spectrum: ArrayLike, counts: Sequence[int], replicates: int, **how: object
) -> xr.Dataset:
    """Risk of the average of K = counts runs like one, at τ = 1 and at the predicted best τ, beside the prediction.

    Dimension count: `plain`, `best` with `…_error`, `…_predicted`; `tau`, the best; attribute lower_bound, at τ = 1.
    `how` goes to `sample_moves`.

    >>> from linfit import MinNorm
    >>> run, one = Run(0, jnp.ones(40), 20, 1.0, MinNorm()), jnp.ones((1, 1, 40)) / 40
    >>> data = soup_risks(jax.random.key(0), run, one, jnp.ones(40), [1, 4], 50)
    >>> bool(data.plain[1] < data.plain[0])
    True
    """
    law = merges.soup(run, targets, spectrum, run.task)
    moves, gaps = sample_moves(key, [run] * max(counts), targets, replicates, **how)  # type: ignore[arg-type]
    gap = gaps[:, run.task]
    averages = np.stack([moves[:, :count].mean(axis=1) for count in counts], axis=1)
    taus = np.asarray(law.optimal_tau(np.asarray(counts)))
    variables = {"tau": xr.Variable("count", taus)}
    for name, tau in (("plain", np.ones_like(taus)), ("best", taus)):
        variables |= mean_and_error(risks(tau[:, None] * averages, gap[:, None], spectrum), ("count",), name)
        variables[f"{name}_predicted"] = xr.Variable("count", np.asarray(law(np.asarray(counts), tau)))
    attributes = {"lower_bound": float(law.lower_bound()), "constant": float(law.constant), "replicates": replicates}
    return xr.Dataset(variables, {"count": list(counts)}, attributes)


METHODS: dict[str, Callable[..., MergeForm]] = {
    "averaged": lambda runs, targets, spectrum, task, share, **where: merges.form(runs, targets, spectrum, task),
    "dropped (DARE)": merges.dropped,
    "trimmed": merges.trimmed,
    "elected (TIES)": merges.elected,
}
"""Ways to merge, as functions of the runs, the tasks, the test and a share: dropped, or kept."""


def merged_moves(key: Array, moves: np.ndarray, share: float) -> dict[str, np.ndarray]:
    """What each of `METHODS` makes of moves (R, K, p), with equal weights 1/K: (R, p)."""
    kept = trim(moves, share)
    results = (moves.mean(axis=1), drop(key, moves, share).mean(axis=1), kept.mean(axis=1), elect(kept))
    return dict(zip(METHODS, map(np.asarray, results), strict=True))
