"""A metric at several τ, read from tables, from results of lm-evaluation-harness, or from losses per sample."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linfit.bridge.records import losses_of, read_records


class Evaluations(NamedTuple):
    """A metric at several τ."""

    taus: np.ndarray  # (T,)
    values: np.ndarray  # (T,), or (T, n) per sample
    standard_errors: np.ndarray | None  # (T,)
    larger_is_better: bool | None = None  # where the files say so


# Of one model: a number, or one per sample (n,); its standard error; whether larger is better.
_Result = tuple[Any, float | None, bool | None]


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
    for source in sources or [""]:
        label, _, file = source.partition("=")
        try:
            taus.append(float(label if file else ""))
        except ValueError:
            raise ValueError(f"give one table, or TAU=FILE for each τ, got {source!r}") from None
        found.append(read_result(Path(file), metric))
    values, errors, directions = zip(*found)
    larger = next((direction for direction in directions if direction is not None), None)
    sizes = sorted({np.size(value) for value in values if isinstance(value, np.ndarray)})
    if not sizes:
        known = all(error is not None and error > 0 for error in errors)
        return Evaluations(np.array(taus), np.array(values), np.array(errors, float) if known else None, larger)
    if not all(isinstance(value, np.ndarray) for value in values):
        raise ValueError("mixing per-sample losses with summary results: use one kind for every τ")
    if len(sizes) != 1:
        raise ValueError(f"losses must be of the same samples at every τ, got {sizes} of them")
    losses = np.stack(values)
    return Evaluations(np.array(taus), losses[:, np.isfinite(losses).all(axis=0)], None, larger)


def _from_table(path: Path, metric: str) -> Evaluations:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines()))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: neither CSV, a JSON array nor JSON lines: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: every entry must be an object with tau and {metric}")
    columns = list(rows[0]) if rows else []
    if "tau" not in columns or metric not in columns:
        raise ValueError(f"{path}: needs columns tau and {metric}, found {', '.join(columns) or 'nothing'}")

    def column(name: str) -> np.ndarray:
        try:
            return np.array([float(row[name]) for row in rows])
        except (TypeError, ValueError, KeyError):
            raise ValueError(f"{path}: column {name} must hold a number in every row") from None

    errors = [f"{metric}_standard_error", f"{metric}_stderr", "standard_error"]
    found = next((column(name) for name in errors if name in columns), None)
    return Evaluations(column("tau"), column(metric), found)


def read_result(path: Path, metric: str) -> _Result:
    """A metric of one model, from any FILE that `read_evaluations` takes."""
    if path.is_dir():
        path = _latest_result(path)
    if path.suffix == ".jsonl":
        return _per_sample(path, metric), None, None
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
        raise _several(path, metric, [f"{task}/{key}" for key in fitting])
    head, comma, kind = fitting[0].partition(",")
    value, error = numbers[fitting[0]], numbers.get(f"{head}_stderr{comma}{kind}")
    if not _is_number(value):
        raise ValueError(f"{path}: {metric!r} must be a finite number, got {value!r}")
    larger = content.get("higher_is_better", {}).get(task, {}).get(head)
    return float(value), float(error) if _is_number(error) else None, larger


def _several(path: Path, metric: str, choices: list[str]) -> ValueError:
    return ValueError(f"{path}: {metric!r} was scored through several filters; name one of {', '.join(choices)}")


def _is_metric(key: str) -> bool:
    head, comma, _ = key.partition(",")
    return not head.endswith("_stderr") and (bool(comma) or head not in ("alias", "name", "sample_len", "samples", " "))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _per_sample(path: Path, metric: str) -> np.ndarray:
    """One number per record, in the order of the documents; of one filter, where the harness applied several."""
    records = read_records(path)
    name, _, chosen = metric.rpartition("/")[2].partition(",")
    filters = sorted({str(record["filter"]) for record in records if "filter" in record})
    if not chosen and len(filters) > 1:
        raise _several(path, metric, [f"{name},{kind}" for kind in filters])
    if chosen:
        records = [record for record in records if record.get("filter") == chosen]
    return losses_of(sorted(records, key=lambda record: record.get("doc_id", 0)), path, name)
