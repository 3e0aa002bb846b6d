"""The held-out loss as a quadratic form in the weights of K runs: fit, minimum, and what to evaluate next (ours).

At θ₁ + Σ w_k δ_k a loss is locally c + b·w + ½ wᵀAw: 1 + K + K(K+1)/2 numbers. The base, the runs, the runs at half and
the averages of two, the {K+1, 2} simplex lattice, are as many weightings and determine them. With fewer, A is taken
as free in the R leading eigenvectors of the inner products G of the deltas, and as a multiple of G beyond:

    z = Λ^½ Uᵀ w  (G = UΛUᵀ),    L = c + b·w + Σ_{i≤j≤R} A_ij z_i z_j + h Σ_{i>R} z_i²,

K + 2 numbers for R = 0, all for R = K. The same prompts are evaluated at every weighting, so every number is a mean over
prompts of a linear function of a prompt's losses, and errors are paired. At the minimum w* = −A⁻¹b a prompt moves w* by
−A⁻¹(b_i + A_i w*), its share in the gradient there.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import scipy.stats

from linfit.bridge.soup import LEVEL, Estimate


class WeightFit(NamedTuple):
    """A fitted form, its minimum, and what to run next."""

    weights: list[Estimate]  #: (K,) that minimise the loss; the best ones evaluated, without errors, if there is none.
    loss: Estimate  #: Predicted at these weights, to check against.
    gain_over_average: Estimate  #: Predicted loss of the plain average of all runs minus that.
    convex: bool  #: Whether the form has a minimum.
    rank: int  #: R: K is the whole form.
    numbers: int  #: How many numbers were fitted.
    residual: float  #: Largest |loss − form| at an evaluated weighting.
    p_value: float  #: Chance of residuals at least this large for a quadratic; NaN without spare evaluations.
    extrapolated: bool  #: Whether the minimum is less certain than every evaluated weighting.
    verdict: str


def lattice(runs: int) -> np.ndarray:
    """The {K+1, 2} simplex lattice of base and runs (K(K+3)/2 + 1, K): base, runs, then the halves of two of these.

    >>> lattice(2).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]]
    """
    corners = np.vstack([np.zeros(runs), np.eye(runs)])
    return np.vstack([corners, *((corners[i] + corners[j])[None] / 2 for i, j in combinations(range(runs + 1), 2))])


def _features(weights: np.ndarray, gram: np.ndarray, rank: int) -> np.ndarray:
    """Rows (E, P) of the form with rank R at weights (E, K)."""
    values, vectors = np.linalg.eigh(gram)
    z = (weights @ vectors * np.sqrt(np.maximum(values, 0) / max(values.max(), 1e-300)))[:, ::-1]
    rows, columns = np.triu_indices(rank)
    rest = [np.sum(z[:, rank:] ** 2, axis=1, keepdims=True)] if rank < z.shape[1] else []
    return np.hstack([np.ones((len(z), 1)), weights, z[:, rows] * z[:, columns], *rest])


def _form(coefficients: np.ndarray, gram: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(b, A) with b (K, …) and A (K, K, …) from coefficients (P, …) of `_features`."""
    runs = len(gram)
    values, vectors = np.linalg.eigh(gram)
    scale = (vectors * np.sqrt(np.maximum(values, 0) / max(values.max(), 1e-300)))[:, ::-1]  # z = w·scale
    inner = np.zeros((runs, runs, *coefficients.shape[1:]))
    for at, (i, j) in enumerate(zip(*np.triu_indices(rank)), start=1 + runs):
        inner[i, j] += coefficients[at]
        inner[j, i] += coefficients[at]
    for i in range(rank, runs):
        inner[i, i] += 2 * coefficients[-1]
    return coefficients[1 : 1 + runs], np.einsum("ki,ij...,lj->kl...", scale, inner, scale)


def _determined(rows: np.ndarray) -> bool:
    return rows.shape[0] >= rows.shape[1] and np.linalg.matrix_rank(rows, tol=1e-6) == rows.shape[1]


def next_weightings(weights: np.ndarray, gram: np.ndarray, optimum: np.ndarray | None = None) -> list[list[float]]:
    """What to evaluate next, most useful first: of the lattice and the plain average, each time the one that adds most
    to the determinant of the information (D-optimal, greedy); once the form is whole, its minimum, to check it.
    """
    runs = len(gram)
    candidates = np.vstack([lattice(runs), np.full((1, runs), 1 / runs)])
    rows, done = _features(candidates, gram, runs), _features(weights, gram, runs)
    inverse = np.linalg.inv(done.T @ done + 1e-8 * np.eye(rows.shape[1]))
    fresh, chosen = [row for row in range(len(rows)) if not _has(weights, candidates[row])], []
    missing = rows.shape[1] - (np.linalg.matrix_rank(done, tol=1e-6) if done.size else 0)
    for _ in range(min(missing, len(fresh))):
        best = max(fresh, key=lambda row: float(rows[row] @ inverse @ rows[row]))
        step = inverse @ rows[best]
        inverse -= np.outer(step, step) / (1 + rows[best] @ step)
        fresh.remove(best)
        chosen.append(candidates[best].tolist())
    check = [] if optimum is None or _has(weights, optimum) else [optimum.tolist()]
    return check + chosen if optimum is not None else chosen


def _has(weights: np.ndarray, row: np.ndarray) -> bool:
    return bool(weights.size) and bool((np.abs(weights - row).max(axis=1) < 1e-6).any())


def fit_weights(weights: Sequence[Sequence[float]], losses: np.ndarray, gram: np.ndarray) -> WeightFit | None:
    """The form through the losses (E, n) of the same n prompts at E weightings; None if these are too few (K + 2).

    Args:
        weights: (E, K), each Σ w_k δ_k beside the base.
        losses: (E, n), n > E.
        gram: inner products of the deltas (K, K), for the part of the curvature that the losses leave open.

    Raises ValueError for shapes that do not fit, NaN or Inf, or fewer prompts than weightings.

    >>> from linfit.bridge import fit_weights
    >>> w, prompts = np.array([[0.0], [0.5], [1.0]]), np.linspace(0, 1, 9)
    >>> fit_weights(w, (w - 0.75) ** 2 + prompts + 0.1 * w * np.sin(9 * prompts), np.eye(1)).weights[0].value.round(2)
    np.float64(0.74)
    """
    w, losses = np.asarray(weights, float), np.asarray(losses, float)
    if w.ndim != 2 or losses.ndim != 2 or len(w) != len(losses) or w.shape[1] != len(gram):
        raise ValueError(f"losses must be (E, n) for weights (E, {len(gram)}), got {losses.shape} and {w.shape}")
    if not (np.isfinite(w).all() and np.isfinite(losses).all()):
        raise ValueError("weights and losses must be finite, got NaN or Inf")
    if losses.shape[1] <= len(w):
        raise ValueError(f"losses need more prompts than weightings, got {losses.shape[1]} for {len(w)}")
    ranks = [rank for rank in range(len(gram), -1, -1) if _determined(_features(w, gram, rank))]
    return _fit(w, losses, np.asarray(gram, float), ranks[0]) if ranks else None


def _fit(w: np.ndarray, losses: np.ndarray, gram: np.ndarray, rank: int) -> WeightFit:
    rows, n = _features(w, gram, rank), losses.shape[1]
    per_prompt = np.linalg.pinv(rows) @ losses  # (P, n)
    mean = per_prompt.mean(axis=1)
    residuals = losses.mean(axis=1) - rows @ mean
    p_value, inflation = _misfit(rows, losses)
    linear, curvature = _form(mean, gram, rank)
    convex = bool(np.linalg.eigvalsh(curvature)[0] > 1e-9 * np.abs(curvature).max())
    if convex:
        best = np.linalg.solve(curvature, -linear)
        slopes = _form(per_prompt, gram, rank)
        gradient = slopes[0] + np.einsum("klp,l->kp", slopes[1], best)
        errors = _standard_error(-np.linalg.solve(curvature, gradient)) * inflation
    else:
        best, errors = w[losses.mean(axis=1).argmin()], np.full(w.shape[1], np.nan)
    at = _features(best[None], gram, rank)[0]
    average = _features(np.full((1, w.shape[1]), 1 / w.shape[1]), gram, rank)[0]
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1))

    def estimate(value: float, error: float) -> Estimate:
        return Estimate(float(value), float(error), float(value - reach * error), float(value + reach * error))

    loss, gain = (
        estimate(row @ mean, float(_standard_error(row @ per_prompt)) * inflation) for row in (at, average - at)
    )
    leverage = np.einsum("ep,pq,eq->e", *(lambda r: (r, np.linalg.pinv(rows.T @ rows), r))(np.vstack([rows, at])))
    extrapolated = bool(leverage[-1] > leverage[:-1].max() * (1 + 1e-9))
    found = [estimate(value, error) for value, error in zip(best, errors)]
    facts = (convex, rank, rows.shape[1], float(np.abs(residuals).max()), p_value, extrapolated)
    return WeightFit(found, loss, gain, *facts, _verdict(w.shape[1], *facts))


def _standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the last axis, the prompts."""
    return np.std(values, axis=-1, ddof=1) / values.shape[-1] ** 0.5


def _misfit(rows: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """p-value of the residuals, and √(χ²/f) where that exceeds 1: what errors are multiplied by (after Birge)."""
    freedom = rows.shape[0] - rows.shape[1]
    if freedom == 0:
        return float("nan"), 1.0
    left = np.linalg.svd(rows)[0][:, rows.shape[1] :].T @ losses  # what no coefficient can explain (f, n)
    scatter = np.atleast_2d(np.cov(left)) / losses.shape[1]
    square = float(left.mean(axis=1) @ np.linalg.pinv(scatter) @ left.mean(axis=1))
    return float(scipy.stats.chi2.sf(square, freedom)), max(square / freedom, 1.0) ** 0.5


def _verdict(
    runs: int, convex: bool, rank: int, numbers: int, residual: float, p_value: float, extrapolated: bool
) -> str:
    whole = "the whole form" if rank == runs else f"curvature free in {rank} of {runs} directions, Euclidean beyond"
    parts = [f"{numbers} numbers, {whole}"]
    if not convex:
        parts.append("no minimum: the best weighting evaluated is returned")
    if np.isnan(p_value):
        parts.append("no spare evaluation tests the form: check the predicted loss")
    else:
        fits = "not exactly quadratic, errors widened" if p_value < 0.01 else "consistent with a quadratic"
        parts.append(f"{fits} (largest residual {residual:.2g}, p = {p_value:.2g})")
    if extrapolated:
        parts.append("the minimum lies outside what was evaluated: check the predicted loss")
    return "; ".join(parts)
