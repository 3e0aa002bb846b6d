"""The held-out loss as a quadratic form in the weights of K runs: fit, minimum, and what to evaluate next (ours).

At θ₁ + Σ w_k δ_k a loss is locally c + b·w + ½ wᵀAw: 1 + K + K(K+1)/2 numbers. The base, the runs, the runs at half and
the averages of two, the {K+1, 2} simplex lattice, are as many weightings and determine them. With fewer, the form is
free in the R leading eigenvectors of the inner products G of the deltas, what the runs have most in common, and beyond
them only grows with the squared length of the merged delta:

    z = Λ^½ Uᵀ w  (G = UΛUᵀ),    L = c + Σ_{i≤R} b_i z_i + Σ_{i≤j≤R} A_ij z_i z_j + h Σ_{i>R} z_i²,

(R+1)(R+2)/2 + 1 numbers: 4 for R = 1, 7 for R = 2, and the whole form for R = K. The same prompts are evaluated at
every weighting, so every number is a mean over prompts of a linear function of a prompt's losses, and errors are
paired. At the minimum z* = −A⁻¹b a prompt moves z* by −A⁻¹(b_i + A_i z*), its share in the gradient there.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from linfit.bridge.soup import LEVEL, Estimate


def lattice(runs: int) -> np.ndarray:
    """The {K+1, 2} simplex lattice of base and runs (K(K+3)/2 + 1, K): base, runs, then the halves of two of these.

    >>> lattice(2).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]]
    """
    corners = np.vstack([np.zeros(runs), np.eye(runs)])
    return np.vstack([corners, *((corners[i] + corners[j])[None] / 2 for i, j in combinations(range(runs + 1), 2))])


class _Coordinates(NamedTuple):
    """z = w·scale, leading ones first, and back."""

    scale: np.ndarray  # (K, K)
    back: np.ndarray  # (K, K), w = z·back

    @classmethod
    def of(cls, gram: np.ndarray) -> "_Coordinates":
        values, vectors = np.linalg.eigh(gram)
        roots = np.sqrt(np.maximum(values[::-1] / values[-1], 1e-12))
        return cls(vectors[:, ::-1] * roots, (vectors[:, ::-1] / roots).T)

    def rows(self, weights: np.ndarray, rank: int) -> np.ndarray:
        """Rows (E, P) of the form with rank R at weights (E, K)."""
        z = weights @ self.scale
        i, j = np.triu_indices(rank)
        rest = [np.sum(z[:, rank:] ** 2, axis=1, keepdims=True)] if rank < z.shape[1] else []
        return np.hstack([np.ones((len(z), 1)), z[:, :rank], z[:, i] * z[:, j], *rest])


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
    coefficients: np.ndarray  #: (P,) of the form.
    products: np.ndarray  #: The inner products that its coordinates come from (K, K).

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """The loss (…) at weights (…, K)."""
        rows = _Coordinates.of(self.products).rows(np.reshape(weights, (-1, len(self.products))), self.rank)
        return (rows @ self.coefficients).reshape(np.shape(weights)[:-1])


def _form(coefficients: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """b (R, …) and the second derivative A (R, R, …) in the leading z, from coefficients (P, …)."""
    curvature = np.zeros((rank, rank, *coefficients.shape[1:]))
    for at, (i, j) in enumerate(zip(*np.triu_indices(rank)), start=1 + rank):
        curvature[i, j] += coefficients[at]
        curvature[j, i] += coefficients[at]
    return coefficients[1 : 1 + rank], curvature


def _determined(rows: np.ndarray) -> bool:
    return rows.shape[0] >= rows.shape[1] and np.linalg.matrix_rank(rows, tol=1e-6) == rows.shape[1]


def least_numbers(rank: int, runs: int) -> int:
    """How many numbers the form has: (R+1)(R+2)/2, and one for what lies beyond R < K."""
    return (rank + 1) * (rank + 2) // 2 + (rank < runs)


def next_weightings(weights: np.ndarray, gram: np.ndarray, tasks: np.ndarray, fit: WeightFit | None) -> np.ndarray:
    """Weightings (…, K) to evaluate next, most useful first.

    Before there is a form in as many directions as tasks: the lattice of the base and the averages of each task's runs,
    near which the best weights are to be expected, and one run for what lies beyond. Then its minimum, to check it;
    then of the lattice of all runs each time the point that adds most to the determinant of the information (D-optimal,
    greedy), up to the whole form, 20 at most.
    """
    runs, form = len(gram), _Coordinates.of(gram)
    member = np.eye(int(tasks.max()) + 1)[tasks].T
    first = int(np.flatnonzero(np.bincount(tasks)[tasks] > 1)[0])
    start = np.vstack([lattice(len(member)) @ (member / member.sum(1, keepdims=True)), np.eye(runs)[[first]]])
    if fit is None or fit.rank < len(member):
        chosen = [row for row in start if not _has(weights, row)]
    else:
        chosen = [np.array([each.value for each in fit.weights])] if fit.convex else []
        chosen = [row for row in chosen if not _has(weights, row)]
    known = np.vstack([weights, *chosen])
    done, fresh = form.rows(known, runs), [row for row in lattice(runs) if not _has(known, row)]
    inverse = np.linalg.inv(done.T @ done + 1e-8 * np.eye(done.shape[1]))
    for _ in range(min(done.shape[1] - np.linalg.matrix_rank(done, tol=1e-6), len(fresh), 20)):
        rows = form.rows(np.array(fresh), runs)
        best = int(np.argmax(np.sum(rows @ inverse * rows, axis=1)))
        step = inverse @ rows[best]
        inverse -= np.outer(step, step) / (1 + rows[best] @ step)
        chosen.append(fresh.pop(best))
    return np.array(chosen).reshape(-1, runs)


def _has(weights: np.ndarray, row: np.ndarray) -> bool:
    return bool(weights.size) and bool((np.abs(weights - row).max(axis=1) < 1e-6).any())


def fit_weights(
    weights: Sequence[Sequence[float]] | np.ndarray, losses: np.ndarray, gram: np.ndarray, *, tasks: int = 1
) -> WeightFit | None:
    """The form through the losses (E, n) of the same n prompts at E weightings; None if these are too few (4).

    Args:
        weights: (E, K), each Σ w_k δ_k beside the base.
        losses: (E, n), n > E.
        gram: inner products of the deltas (K, K); their leading directions are fitted where E does not allow all.
        tasks: how many leading directions are to be expected.

    Raises ValueError for shapes that do not fit, NaN or Inf, or fewer prompts than weightings.

    >>> from linfit.bridge import fit_weights
    >>> w, prompts = np.array([[0.0], [0.5], [1.0]]), np.linspace(0, 1, 9)
    >>> round(fit_weights(w, (w - 0.75) ** 2 + prompts, np.eye(1)).weights[0].value, 4)
    0.75
    """
    w, losses = np.asarray(weights, float), np.asarray(losses, float)
    if w.ndim != 2 or losses.ndim != 2 or len(w) != len(losses) or w.shape[1] != len(gram):
        raise ValueError(f"losses must be (E, n) for weights (E, {len(gram)}), got {losses.shape} and {w.shape}")
    if not (np.isfinite(w).all() and np.isfinite(losses).all()):
        raise ValueError("weights and losses must be finite, got NaN or Inf")
    if losses.shape[1] <= len(w):
        raise ValueError(f"losses need more prompts than weightings, got {losses.shape[1]} for {len(w)}")
    rank = _best_rank(_Coordinates.of(np.asarray(gram, float)), w, losses.mean(axis=1), tasks)
    return _fit(w, losses, np.asarray(gram, float), rank) if rank else None


def _best_rank(form: _Coordinates, w: np.ndarray, losses: np.ndarray, tasks: int) -> int | None:
    """K where the evaluations determine the whole form; else the R ≥ T that predicts each from the others best."""
    runs = w.shape[1]
    ranks = [rank for rank in range(1, runs + 1) if _determined(form.rows(w, rank))]
    if runs in ranks or not ranks:
        return runs if ranks else None

    def missed(rank: int) -> float:
        hat = (rows := form.rows(w, rank)) @ np.linalg.pinv(rows)
        spare = 1 - np.diag(hat)
        return float(np.sum(((losses - hat @ losses) / spare) ** 2)) if (spare > 1e-9).all() else np.inf

    return min([rank for rank in ranks if rank >= tasks] or ranks[-1:], key=missed)


def _fit(w: np.ndarray, losses: np.ndarray, gram: np.ndarray, rank: int) -> WeightFit:
    form, n, runs = _Coordinates.of(gram), losses.shape[1], w.shape[1]
    rows = form.rows(w, rank)
    per_prompt = np.linalg.pinv(rows) @ losses  # (P, n)
    mean = per_prompt.mean(axis=1)
    residuals = losses.mean(axis=1) - rows @ mean
    p_value, inflation = _misfit(rows, losses)
    linear, curvature = _form(mean, rank)
    convex = bool(np.linalg.eigvalsh(curvature)[0] > 1e-9 * np.abs(curvature).max())
    if convex:
        z = np.linalg.solve(curvature, -linear)
        slopes = _form(per_prompt, rank)
        moves = -np.linalg.solve(curvature, slopes[0] + np.einsum("ijp,j->ip", slopes[1], z))
        best, errors = z @ form.back[:rank], _standard_error(form.back[:rank].T @ moves) * inflation
    else:
        best, errors = w[losses.mean(axis=1).argmin()], np.full(runs, np.nan)
    at, average = form.rows(np.vstack([best, np.full(runs, 1 / runs)]), rank)
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1))

    def estimate(value: Any, error: Any) -> Estimate:
        return Estimate(float(value), float(error), float(value - reach * error), float(value + reach * error))

    loss, gain = (estimate(row @ mean, _standard_error(row @ per_prompt) * inflation) for row in (at, average - at))
    spread = np.linalg.pinv(rows.T @ rows)
    extrapolated = bool(at @ spread @ at > np.sum(rows @ spread * rows, axis=1).max() * (1 + 1e-9))
    found = [estimate(value, error) for value, error in zip(best, errors)]
    facts = (convex, rank, rows.shape[1], float(np.abs(residuals).max()), p_value, extrapolated)
    return WeightFit(found, loss, gain, *facts, _verdict(runs, *facts), mean, gram)


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
    whole = "the whole form" if rank == runs else f"free in the {rank} leading of {runs} directions"
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
