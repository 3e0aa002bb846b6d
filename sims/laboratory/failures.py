"""Predicted beside real fine-tunings as one table, and which number, known before a run, says that it will go wrong."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

__all__ = ["CANDIDATES", "FAILURES", "Failure", "Rule", "calibrate", "language_rows", "table"]

CANDIDATES = (
    "curvature",
    "gap_test",
    "gap_other",
    "curvature_test",
    "curvature_other",
    "kernel_change",
    "relative_distance",
    "largest_relative_distance",
    "alignment",
    "loss_gap_test",
    "loss_gap_other",
)
"""Diagnostics that may tell; `curvature` is the larger one on the two domains; of signed ones the size counts."""
MEASURED = (
    "best_tau",
    "best_loss",
    "loss_at_0",
    "loss_at_1",
    "other_loss_at_0",
    "forgetting",
    "best_steps",
    "stopped_loss",
)


def table(rows: Iterable[dict[str, Any]]) -> xr.Dataset:
    """Rows of `run_table` along `run`: settings, `measured_…`, `predicted_…`, `along_run_…`, diagnostics, and

    - `tau_error`: predicted minus measured τ*; `along_run_tau_error` of the first order along the real step;
    - `forgetting_error`, `loss_error`, `loss_at_1_error`: relative to what was measured;
    - `stopping_error`: log₂ of predicted over measured best number of steps, unless both are the last step;
    - `stopped_loss_error`: relative, of the loss at the best number of steps;
    - `regret`: what the loss at the predicted τ* lacks of the best, as a share of what there is to gain on [0, 1].

    What a row lacks is NaN.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows must hold at least one fine-tuning, got none")
    columns: dict[str, Any] = {}
    for name in rows[0]["setting"] | dict.fromkeys(key for row in rows for key in row["setting"]):
        columns[name] = [row["setting"].get(name, np.nan) for row in rows]
    for part in ("measured", "predicted", "along_run"):
        for name in MEASURED:
            columns[f"{part}_{name}"] = _column(rows, part, name)
    for name in CANDIDATES[1:]:
        columns[name] = _column(rows, "diagnostics", name)
    columns["curvature"] = np.maximum(columns["curvature_test"], columns["curvature_other"])
    columns["loss_at_predicted_tau"] = _column(rows, "measured", "loss_at_predicted_tau")
    data = xr.Dataset({name: ("run", np.asarray(values)) for name, values in columns.items()})
    return data.assign(_errors(data))


def _column(rows: list[dict[str, Any]], part: str, name: str) -> np.ndarray:
    return np.array([row.get(part, {}).get(name) for row in rows], float)


def _errors(data: xr.Dataset) -> dict[str, xr.DataArray]:
    def relative(name: str) -> xr.DataArray:
        return (data[f"predicted_{name}"] - data[f"measured_{name}"]) / abs(data[f"measured_{name}"])

    best, last = data["measured_best_loss"], data["steps"] * (1 - 1e-6)
    before_the_end = (data["predicted_best_steps"] < last) | (data["measured_best_steps"] < last)
    stopping = xr.ufuncs.log2(data["predicted_best_steps"] / data["measured_best_steps"])
    span = np.maximum(data["measured_loss_at_0"], data["measured_loss_at_1"]) - best
    return {
        "tau_error": data["predicted_best_tau"] - data["measured_best_tau"],
        "along_run_tau_error": data["along_run_best_tau"] - data["measured_best_tau"],
        "forgetting_error": relative("forgetting"),
        "loss_error": relative("best_loss"),
        "loss_at_1_error": relative("loss_at_1"),
        "stopping_error": stopping.where(before_the_end),
        "stopped_loss_error": relative("stopped_loss"),
        "regret": (data["loss_at_predicted_tau"] - best).clip(min=0) / span,
    }


class Rule(NamedTuple):
    """Trust a prediction where |quantity| ≤ `limit`."""

    quantity: str
    limit: float

    def trusted(self, data: xr.Dataset) -> xr.DataArray:
        """Of each run; what is unknown is not trusted."""
        return abs(data[self.quantity]) <= self.limit


class Failure(NamedTuple):
    """A prediction has failed if this error is larger than `wrong`; a rule may trust a share `allowed` of failures."""

    error: str
    wrong: float
    allowed: float

    def of(self, data: xr.Dataset) -> xr.DataArray:
        """Whether each run's prediction failed; one without a number did."""
        return ~(abs(data[self.error]) <= self.wrong)


FAILURES = {"best_tau": Failure("tau_error", 0.2, 0.0), "forgetting": Failure("forgetting_error", 0.25, 0.05)}


def calibrate(data: xr.Dataset, quantity: str, failure: Failure = FAILURES["best_tau"]) -> Rule:
    """The most that this quantity can allow while no more than the allowed share of the trusted runs fails.

    The limit is half-way, in the logarithm, from the last run that is trusted to the next.
    """
    values = abs(data[quantity].values)
    order = np.argsort(values)
    values, failed = values[order], failure.of(data).values[order]
    within = np.cumsum(failed) <= failure.allowed * np.arange(1, len(values) + 1)
    kept = int(np.flatnonzero(within & np.isfinite(values)).max(initial=-1)) + 1
    if kept == 0:
        return Rule(quantity, 0.0)
    following = values[min(kept, len(values) - 1)]
    return Rule(
        quantity, float(np.sqrt(values[kept - 1] * (following if np.isfinite(following) else values[kept - 1])))
    )


def language_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of a language model, one JSON file each with `setting`, `measured` and `predicted`, if there are any.

    Files that are something else are left out.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(row, dict) and all(isinstance(row.get(k), dict) for k in ("setting", "measured", "predicted")):
            rows.append(row)
    return rows
