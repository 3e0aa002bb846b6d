"""The best τ from a few evaluations of θ_τ: a quadratic in τ, its minimum, and whether to believe it (docs, B1).

Near its minimum a held-out loss is quadratic along the segment from base to tuned model, as the linear theory says it
is everywhere (docs, S3):  L(τ) = a + bτ + cτ²,  τ* = −b/2c. Errors are propagated to first order.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats


class Curve(NamedTuple):
    """A fitted L(τ) = a + bτ + cτ². For a score to be maximised, L is minus the score."""

    taus: np.ndarray
    """τ (T,)."""
    values: np.ndarray
    """L (T,)."""
    standard_errors: np.ndarray | None
    """(T,), or None if unknown; of samples, those of the differences from each sample's mean over τ."""
    coefficients: np.ndarray
    """(a, b, c)."""
    covariance: np.ndarray
    """Of the coefficients (3, 3); NaN if it cannot be known."""
    residuals: np.ndarray
    """L − fit (T,)."""
    chi_square: float
    """Squared residuals in standard errors; NaN with three points or without errors."""
    degrees_of_freedom: int
    p_value: float
    """Chance of residuals at least this large if the curve is a quadratic."""

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
        return _error(self._best_tau_gradient(), self.covariance)

    def _best_tau_gradient(self) -> np.ndarray:
        _, b, c = self.coefficients
        return np.array([0, -1 / (2 * c), b / (2 * c**2)]) if self.convex else np.full(3, np.nan)

    def __call__(self, tau: Any) -> np.ndarray:
        """The fit at τ (…)."""
        return _powers(tau) @ self.coefficients

    def error(self, tau: Any) -> np.ndarray:
        """Standard error of the fit at τ (…)."""
        rows = _powers(tau)
        return np.sqrt(np.maximum(np.einsum("...i,ij,...j->...", rows, self.covariance, rows), 0))

    @property
    def gain_over_full(self) -> tuple[float, float]:
        """L(1) − L(τ*) = c(1−τ*)² and its standard error; positive gain is overadaptation if τ* < 1."""
        if not self.convex:
            return float("nan"), float("nan")
        rows = _powers(1.0) - _powers(self.best_tau)  # the gradient: L is flat at τ*
        return float(rows @ self.coefficients), _error(rows, self.covariance)

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

    def next_tau(self, grid: Sequence[float] | None = None) -> float:
        """The τ worth evaluating next: what shrinks the error of τ* most; if the form fails, beside the best one."""
        low, high = min(0.0, self.taus.min()), max(1.0, self.taus.max())
        candidates = np.linspace(low, high, 41) if grid is None else np.asarray(grid, float)
        fresh = candidates[np.abs(candidates[:, None] - self.taus).min(axis=1) > 0.02]
        if not self.convex or (np.isfinite(self.p_value) and self.p_value < 0.01):
            order = np.argsort(self.taus)
            taus, values = self.taus[order], self.values[order]
            at = int(np.argmin(values))
            sides = [other for other in (at - 1, at + 1) if 0 <= other < taus.size]
            return float((taus[at] + taus[min(sides, key=lambda other: values[other])]) / 2)
        known = self.standard_errors is not None and bool((self.standard_errors > 0).all())
        weights = 1 / self.standard_errors**2 if known else np.ones(self.taus.size)  # type: ignore[operator]
        information = (_powers(self.taus).T * weights) @ _powers(self.taus)
        gradient = self._best_tau_gradient()

        def variance(tau: float) -> float:
            row = _powers(tau)
            return float(gradient @ np.linalg.solve(information + np.median(weights) * np.outer(row, row), gradient))

        return float(min(fresh, key=variance)) if fresh.size else self.best_tau


def _powers(tau: Any) -> np.ndarray:
    tau = np.asarray(tau, float)
    return np.stack([np.ones_like(tau), tau, tau**2], axis=-1)


def _error(gradient: np.ndarray, covariance: np.ndarray) -> float:
    return float(np.sqrt(np.maximum(gradient @ covariance @ gradient, 0)))


def fit_curve(
    tau: Sequence[float] | np.ndarray,
    value: Sequence[float] | np.ndarray,
    standard_error: Sequence[float] | np.ndarray | None = None,
    *,
    maximize: bool = False,
) -> Curve:
    """Least-squares quadratic through a metric at three τ or more (docs, B1).

    `value` (T,) with `standard_error` (T,) > 0, whose errors are taken as independent; or `value` (T, n), the losses of
    the same n samples at every τ, whose errors are then paired: much smaller, since a hard sample is hard at every τ.
    Raises ValueError for fewer than three different τ, shapes that do not fit, NaN or Inf.

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
        return _fit_samples(tau, value)
    errors = None if standard_error is None else np.asarray(standard_error, float)
    if errors is not None and (errors.shape != tau.shape or not np.isfinite(errors).all() or (errors <= 0).any()):
        raise ValueError(f"standard_error must be {tau.size} positive finite values, got {errors}")
    return _fit_means(tau, value, errors)


def _fit_means(tau: np.ndarray, value: np.ndarray, errors: np.ndarray | None) -> Curve:
    rows = _powers(tau)
    weights = np.ones(tau.size) if errors is None else 1 / errors**2
    inverse = np.linalg.inv((rows.T * weights) @ rows)
    coefficients = inverse @ (rows.T @ (weights * value))
    residuals = value - rows @ coefficients
    freedom = tau.size - 3
    square = float(np.sum(weights * residuals**2))
    if errors is None:
        spread = square / freedom if freedom else np.nan
        return Curve(tau, value, None, coefficients, inverse * spread, residuals, np.nan, freedom, np.nan)
    p_value = float(scipy.stats.chi2.sf(square, freedom)) if freedom else np.nan
    chi_square = square if freedom else np.nan
    return Curve(tau, value, errors, coefficients, inverse, residuals, chi_square, freedom, p_value)


def _fit_samples(tau: np.ndarray, losses: np.ndarray) -> Curve:
    n = losses.shape[1]
    if n <= tau.size:
        raise ValueError(f"value (T, n) needs more samples than τ values, got n = {n} for T = {tau.size}")
    rows = _powers(tau)
    solve = np.linalg.pinv(rows)
    mean, scatter = losses.mean(axis=1), np.cov(losses) / n
    covariance = np.cov(solve @ losses) / n
    coefficients = solve @ mean
    residuals = mean - rows @ coefficients
    freedom = tau.size - 3
    if freedom:
        # The residuals live in the T − 3 dimensions orthogonal to 1, τ, τ².
        complement = np.linalg.svd(rows)[0][:, 3:]
        left = complement.T @ mean
        square = float(left @ np.linalg.solve(complement.T @ scatter @ complement, left))
        p_value = float(scipy.stats.chi2.sf(square, freedom))
    else:
        square, p_value = np.nan, np.nan
    errors = np.std(losses - losses.mean(axis=0), axis=1, ddof=1) / n**0.5
    return Curve(tau, mean, errors, coefficients, covariance, residuals, square, freedom, p_value)


# Reading evaluations ------------------------------------------------------------------------------------------------


class Evaluations(NamedTuple):
    """A metric at several τ."""

    taus: np.ndarray
    values: np.ndarray
    """(T,), or (T, n) per sample."""
    standard_errors: np.ndarray | None
    larger_is_better: bool | None = None
    """Where the files say so."""


class _Result(NamedTuple):
    """A metric of one model."""

    value: Any
    """A number, or one per sample (n,)."""
    standard_error: float | None = None
    larger_is_better: bool | None = None


def read_evaluations(sources: Sequence[str], metric: str) -> Evaluations:
    """A metric from one table, or from `TAU=FILE` for each τ.

    A table is CSV, a JSON array or JSON lines, with a column `tau`, one named like `metric`, and for its standard error
    `metric_standard_error`, `metric_stderr` or `standard_error`. A FILE is a result of lm-evaluation-harness (metric
    `TASK/NAME`, such as `arc_easy/acc`, or `TASK/NAME,FILTER` where it has several filters), a folder holding one, its
    samples (`--log_samples`, metric `NAME`), or the output of `linfit losses`.
    Raises ValueError naming the file if the metric is not there, or not a finite number.
    """
    if len(sources) == 1 and "=" not in sources[0]:
        return _from_table(Path(sources[0]), metric)
    taus, found = [], []
    for source in sources:
        label, separator, file = source.partition("=")
        try:
            taus.append(float(label))
        except ValueError:
            separator = ""
        if not separator:
            raise ValueError(f"give one table, or TAU=FILE for each τ, got {source!r}")
        found.append(_from_result(Path(file), metric))
    values = [result.value for result in found]
    larger = next((result.larger_is_better for result in found if result.larger_is_better is not None), None)
    if all(isinstance(value, np.ndarray) for value in values):
        lengths = {value.size for value in values}
        if len(lengths) != 1:
            raise ValueError(f"losses must be of the same samples at every τ, got {sorted(lengths)} of them")
        losses = np.stack(values)
        return Evaluations(np.array(taus), losses[:, np.isfinite(losses).all(axis=0)], None, larger)
    if any(isinstance(value, np.ndarray) for value in values):
        raise ValueError("mixing per-sample losses with summary results: use one kind for every τ")
    errors = [result.standard_error for result in found]
    known = all(error is not None and error > 0 for error in errors)
    return Evaluations(np.array(taus), np.array(values), np.array(errors, float) if known else None, larger)


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise ValueError(f"{path}: neither CSV, a JSON array nor JSON lines: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: every entry must be an object with tau and {{metric}}")
    return rows


def _from_table(path: Path, metric: str) -> Evaluations:
    rows = _rows(path)
    columns = list(rows[0]) if rows else []
    if "tau" not in columns or metric not in columns:
        raise ValueError(f"{path}: needs columns tau and {metric}, found {', '.join(columns) or 'nothing'}")
    errors = [f"{metric}_standard_error", f"{metric}_stderr", "standard_error"]
    error_column = next((name for name in errors if name in columns), None)

    def column(name: str) -> np.ndarray:
        try:
            return np.array([float(row[name]) for row in rows])
        except (TypeError, ValueError, KeyError):
            raise ValueError(f"{path}: column {name} must hold a number in every row") from None

    return Evaluations(column("tau"), column(metric), None if error_column is None else column(error_column))


def _from_result(path: Path, metric: str) -> _Result:
    if path.is_dir():
        path = _latest_result(path)
    if path.suffix == ".jsonl":
        return _Result(_per_sample(path, metric))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise ValueError(f"{path}: not a result of lm-evaluation-harness, which has an object `results`")
    return _from_harness(content, metric, path)


def _latest_result(folder: Path) -> Path:
    """The harness writes results_DATE.json into a folder named after the model, one more at every run."""
    found = sorted(folder.rglob("results*.json"), key=lambda path: path.name)
    if not found:
        raise ValueError(f"{folder}: no results*.json of lm-evaluation-harness in this folder")
    models = sorted({path.parent.name for path in found})
    if len(models) > 1:
        raise ValueError(f"{folder}: results of several models ({', '.join(models)}); name the folder of one")
    return found[-1]


def _from_harness(content: dict[str, Any], metric: str, path: Path) -> _Result:
    """An entry of `results` (or `groups`) maps `NAME,FILTER` to a number and `NAME_stderr,FILTER` to one or "N/A"."""
    task, _, name = metric.rpartition("/")
    tasks = {**content.get("groups", {}), **content["results"]}
    numbers = tasks.get(task, {})
    fitting = [key for key in numbers if key == name or key.startswith(f"{name},")]
    if not fitting:
        known = [f"{task}/{key.removesuffix(',none')}" for task in tasks for key in tasks[task] if _is_metric(key)]
        raise ValueError(f"{path}: no metric {metric!r}; there are {', '.join(known[:12])}")
    if len(fitting) > 1:
        several = ", ".join(f"{task}/{key}" for key in fitting)
        raise ValueError(f"{path}: {metric!r} was scored through several filters; name one of {several}")
    head, comma, kind = fitting[0].partition(",")
    value, error = numbers[fitting[0]], numbers.get(f"{head}_stderr{comma}{kind}")
    if not _is_number(value):
        raise ValueError(f"{path}: {metric!r} must be a finite number, got {value!r}")
    larger = content.get("higher_is_better", {}).get(task, {}).get(head)
    return _Result(float(value), float(error) if _is_number(error) else None, larger)


def _is_metric(key: str) -> bool:
    head, comma, _ = key.partition(",")
    return not head.endswith("_stderr") and (bool(comma) or head not in ("alias", "name", "sample_len", "samples", " "))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _per_sample(path: Path, metric: str) -> np.ndarray:
    """One number per record, in the order of the documents; of one filter, where the harness applied several."""
    from linfit.bridge.records import losses_of, read_records

    records = read_records(path)
    name, _, chosen = metric.rpartition("/")[2].partition(",")
    filters = sorted({str(record["filter"]) for record in records if "filter" in record})
    if not chosen and len(filters) > 1:
        several = ", ".join(f"{name},{kind}" for kind in filters)
        raise ValueError(f"{path}: {metric!r} was scored through several filters; name one of {several}")
    if chosen:
        records = [record for record in records if record.get("filter") == chosen]
    return losses_of(sorted(records, key=lambda record: record.get("doc_id", 0)), path, name)
