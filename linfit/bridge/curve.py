"""The best τ from a few evaluations of θ_τ: a quadratic in τ, its minimum, and whether to believe it (docs, B1).

Near its minimum a held-out loss is quadratic along the segment from base to tuned model, as the linear theory says it
is everywhere (docs, S3):  L(τ) = a + bτ + cτ²,  τ* = −b/2c. Errors are propagated to first order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

Numbers = Sequence[float] | np.ndarray


class Curve(NamedTuple):
    """A fitted L(τ) = a + bτ + cτ²."""

    taus: np.ndarray  #: τ (T,).
    values: np.ndarray  #: L (T,).
    standard_errors: np.ndarray | None  #: (T,) if known; of samples, of the differences from each one's mean over τ.
    coefficients: np.ndarray  #: (a, b, c).
    covariance: np.ndarray  #: Of the coefficients (3, 3); NaN if it cannot be known.
    residuals: np.ndarray  #: L − fit (T,).
    chi_square: float  #: Squared residuals in standard errors; NaN with three points or without errors.
    degrees_of_freedom: int
    p_value: float  #: Chance of residuals at least this large if the curve is a quadratic.
    maximize: bool  #: Whether L is minus a score, which is better when larger.

    @property
    def convex(self) -> bool:
        """Whether the fit has a minimum."""
        return bool(self.coefficients[2] > 0)

    @property
    def best_tau(self) -> float:
        """τ* = −b/2c; NaN without a minimum."""
        _, b, c = self.coefficients
        return float(-b / (2 * c)) if self.convex else float("nan")

    @property
    def best_tau_error(self) -> float:
        """Standard error of τ*, to first order in the errors of b and c."""
        return float(_errors(self._best_tau_gradient(), self.covariance))

    def _best_tau_gradient(self) -> np.ndarray:
        _, b, c = self.coefficients
        return np.array([0, -1 / (2 * c), b / (2 * c**2)]) if self.convex else np.full(3, np.nan)

    def __call__(self, tau: Any) -> np.ndarray:
        """The fit at τ (…)."""
        return _powers(tau) @ self.coefficients

    def error(self, tau: Any) -> np.ndarray:
        """Standard error of the fit at τ (…)."""
        return _errors(_powers(tau), self.covariance)

    @property
    def gain_over_full(self) -> tuple[float, float]:
        """L(1) − L(τ*) = c(1−τ*)² and its standard error; positive gain is overadaptation if τ* < 1."""
        if not self.convex:
            return float("nan"), float("nan")
        rows = _powers(1.0) - _powers(self.best_tau)  # the gradient: L is flat at τ*
        return float(rows @ self.coefficients), float(_errors(rows, self.covariance))

    @property
    def verdict(self) -> str:
        """One line on whether to trust τ*."""
        if not self.convex:
            return "no minimum: the fit is not convex; the best τ lies at an end, or the noise is too large to see it"
        if self.degrees_of_freedom == 0:
            return "three points determine the quadratic: its form is not tested, add one more τ"
        if np.isnan(self.p_value):
            return "no standard errors: the spread around the fit is taken for noise, its form is not tested"
        missed = f"largest residual {np.abs(self.residuals).max():.2g}, p = {self.p_value:.2g}"
        if self.p_value < 0.01:
            return f"not exactly a quadratic ({missed}): refine near the best evaluated τ"
        return f"consistent with a quadratic ({missed})"

    def next_tau(self) -> float:
        """The τ worth evaluating next: what shrinks the error of τ* most; if the form fails, beside the best one."""
        if not self.convex or (np.isfinite(self.p_value) and self.p_value < 0.01):
            order = np.argsort(self.taus)
            taus, values = self.taus[order], self.values[order]
            at = int(np.argmin(values))
            sides = [other for other in (at - 1, at + 1) if 0 <= other < taus.size]
            return float((taus[at] + taus[min(sides, key=lambda other: values[other])]) / 2)
        candidates = np.linspace(min(0.0, self.taus.min()), max(1.0, self.taus.max()), 41)
        fresh = candidates[np.abs(candidates[:, None] - self.taus).min(axis=1) > 0.02]
        errors = self.standard_errors
        weights = np.ones(self.taus.size) if errors is None or (errors <= 0).any() else 1 / errors**2
        information = (_powers(self.taus).T * weights) @ _powers(self.taus)
        gradient = self._best_tau_gradient()

        def variance(tau: float) -> float:
            row = _powers(tau)
            return float(gradient @ np.linalg.solve(information + np.median(weights) * np.outer(row, row), gradient))

        return float(min(fresh, key=variance)) if fresh.size else self.best_tau


def _powers(tau: Any) -> np.ndarray:
    tau = np.asarray(tau, float)
    return np.stack([np.ones_like(tau), tau, tau**2], axis=-1)


def _errors(rows: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """√(g C gᵀ) of every row g (…, 3)."""
    return np.sqrt(np.maximum(np.einsum("...i,ij,...j->...", rows, covariance, rows), 0))


def fit_curve(tau: Numbers, value: Numbers, standard_error: Numbers | None = None, *, maximize: bool = False) -> Curve:
    """Least-squares quadratic through a metric at three τ or more (docs, B1).

    Args:
        tau: (T,), at least three different ones.
        value: (T,), whose errors are taken as independent; or (T, n), the losses of the same n samples at every τ,
            whose errors are then paired: much smaller, since a hard sample is hard at every τ.
        standard_error: (T,) > 0, of values (T,).
        maximize: the metric is better when larger; L is then minus the metric.

    Raises ValueError for fewer than three different τ, shapes that do not fit, NaN or Inf.

    >>> from linfit.bridge import fit_curve
    >>> curve = fit_curve([0, 0.5, 1], [3.0, 1.0, 2.0], [0.1, 0.1, 0.1])
    >>> round(curve.best_tau, 4), round(curve.best_tau_error, 4)
    (0.5833, 0.0136)
    """
    tau, value = np.asarray(tau, float), np.asarray(value, float)
    if tau.ndim != 1 or value.ndim not in (1, 2) or value.shape[0] != tau.size:
        raise ValueError(f"value must be (T,) or (T, n) for tau (T,), got {value.shape} for {tau.shape}")
    if np.unique(tau).size < 3:
        raise ValueError(f"tau must hold at least 3 different values to fit a quadratic, got {np.unique(tau).size}")
    if not (np.isfinite(tau).all() and np.isfinite(value).all()):
        raise ValueError("tau and value must be finite, got NaN or Inf")
    value = -value if maximize else value
    if value.ndim == 2:
        if standard_error is not None:
            raise ValueError("standard_error follows from per-sample values (T, n): give one or the other")
        return _fit_samples(tau, value, maximize)
    errors = None if standard_error is None else np.asarray(standard_error, float)
    if errors is not None and (errors.shape != tau.shape or not np.isfinite(errors).all() or (errors <= 0).any()):
        raise ValueError(f"standard_error must be {tau.size} positive finite values, got {errors}")
    return _fit_means(tau, value, errors, maximize)


def _fit_means(tau: np.ndarray, value: np.ndarray, errors: np.ndarray | None, maximize: bool) -> Curve:
    rows = _powers(tau)
    weights = np.ones(tau.size) if errors is None else 1 / errors**2
    covariance = np.linalg.inv((rows.T * weights) @ rows)
    coefficients = covariance @ (rows.T @ (weights * value))
    residuals, freedom = value - rows @ coefficients, tau.size - 3
    square = float(np.sum(weights * residuals**2)) if freedom else np.nan
    if errors is None:  # the spread around the fit is taken for noise
        covariance, square = covariance * (square / freedom if freedom else np.nan), np.nan
    return Curve(tau, value, errors, coefficients, covariance, residuals, *_test(square, freedom), maximize)


def _fit_samples(tau: np.ndarray, losses: np.ndarray, maximize: bool) -> Curve:
    n = losses.shape[1]
    if n <= tau.size:
        raise ValueError(f"value (T, n) needs more samples than τ values, got n = {n} for T = {tau.size}")
    rows, mean, scatter = _powers(tau), losses.mean(axis=1), np.cov(losses) / n
    solve = np.linalg.pinv(rows)
    coefficients, covariance = solve @ mean, np.cov(solve @ losses) / n
    residuals = mean - rows @ coefficients
    # The residuals live in the T − 3 dimensions orthogonal to 1, τ, τ².
    complement = np.linalg.svd(rows)[0][:, 3:]
    left, freedom = complement.T @ mean, tau.size - 3
    square = float(left @ np.linalg.solve(complement.T @ scatter @ complement, left)) if freedom else np.nan
    errors = np.std(losses - losses.mean(axis=0), axis=1, ddof=1) / n**0.5
    return Curve(tau, mean, errors, coefficients, covariance, residuals, *_test(square, freedom), maximize)


def _test(square: float, freedom: int) -> tuple[float, int, float]:
    """χ², its degrees of freedom, and the p-value; NaN without either."""
    return square, freedom, float(scipy.stats.chi2.sf(square, freedom)) if freedom else float("nan")
