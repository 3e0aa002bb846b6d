"""What `linfit sweep` prints: the plan, progress, failures, and the summary of a store."""

import json as json_format
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import progress as bars
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from sims.sweep.driver import Failure, Outcome, Watcher
from sims.sweep.plan import Sweep
from sims.sweep.store import DONE, FAILED, MISSING, Store, read, read_attributes, read_sweep

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Progress", "best_points", "print_outcome", "print_plan", "show"]

SHOWN_FAILURES = 10  # told one by one; the rest are counted


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def _duration(seconds: float) -> str:
    """A time in words.

    >>> _duration(0.25), _duration(100), _duration(4000), _duration(200_000)
    ('0.25 s', '1 min 40 s', '1 h 6 min', '2 d 7 h')
    """
    for large, one, small, other in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= large:
            return f"{int(seconds // large)} {one} {int(seconds % large // small)} {other}"
    return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"


def _axis_text(values: np.ndarray) -> str:
    """Values of an axis in brief.

    >>> _axis_text(np.array(3)), _axis_text(np.linspace(0, 1, 11))
    ('3', '11 values from 0 to 1')
    """
    items = [f"{value:.6g}" if values.dtype.kind == "f" else str(value) for value in np.atleast_1d(values)]
    if len(items) <= 6:
        return ", ".join(items)
    if values.dtype.kind == "U":
        return f"{len(items)} words, {items[0]} … {items[-1]}"
    return f"{len(items)} values from {values.min():.6g} to {values.max():.6g}"


def _print_axes(console: Console, sweep: Sweep) -> None:
    """A table of parameters: values, units, and how the kernel takes them."""
    table = Table("parameter", "values", "units", "", title=f"{sweep.experiment.name} × {sweep.seeds} replicates")
    for name, values in sweep.parameters.items():
        along = "batched" if name in sweep.batched_dims else "tasks"
        how = "Sobol design" if name in sweep.design else along if values.ndim else "held"
        unit, style = sweep.experiment.parameters[name].unit, "dim" if how == "held" else None
        table.add_row(name, _axis_text(values), "" if unit == "1" else unit, how, style=style)
    console.print(table)


def print_plan(console: Console, sweep: Sweep, path: Path, done: int = 0) -> None:
    """What will be computed, before it is."""
    _print_axes(console, sweep)
    cells, tasks = math.prod(sweep.task_dims.values()), len(sweep.tasks)
    made_of = f"{cells} {'cell' if cells == 1 else 'cells'} × {sweep.seeds} replicates, up to {sweep.chunk} in a task"
    size = f"{decimal(sweep.bytes)} before compression"
    _say(console, f"{tasks} tasks ({made_of}), {done} of them done; {size}, into {path}")


class Progress(Watcher):
    """Tells of a run on standard error: by its `bar` where someone watches, else a line every tenth of the way."""

    def __init__(self, sweep: Sweep, path: Path, workers: int):
        self.sweep, self.path, self.workers = sweep, path, max(workers, 1)
        self.console = Console(stderr=True)
        what, rate, left = map(bars.TextColumn, ("{task.fields[what]}", "{task.fields[rate]}", "left"))
        columns = (what, bars.BarColumn(), bars.MofNCompleteColumn(), rate, bars.TimeElapsedColumn(), left)
        settings: dict[str, Any] = {"disable": not self.console.is_terminal, "transient": True}
        self.bar = bars.Progress(*columns, bars.TimeRemainingColumn(), console=self.console, **settings)
        self.told = self.count = self.failures = 0

    def started(self, total: int, done: int, store: Store) -> None:
        """The plan, and the bar."""
        print_plan(self.console, self.sweep, self.path, done)
        self.left = total - done
        self.task = self.bar.add_task("sweep", total=self.left, what=self.sweep.experiment.name, rate="")

    def finished(self, seconds: np.ndarray, failures: list[Failure]) -> None:
        """An estimate after the first task, then the rate."""
        self.count += 1
        if self.count == 1 and self.left > 1:
            usual = float(seconds.min()) * len(seconds)  # the first replicate of all also compiles
            rest = usual * (self.left - 1) / self.workers
            others = "the others" if self.workers == 1 else f"the others on {self.workers} workers"
            took = f"the first task took {_duration(float(seconds.sum()))}"
            _say(self.console, f"{took}; about {_duration(rest)} for {others}")
        speed = self.bar.tasks[0].speed or 0
        rate = f"{speed:.3g} tasks/s" if speed >= 1 else f"{_duration(1 / speed)} a task" if speed else ""
        self.bar.update(self.task, completed=self.count, rate=rate)
        tenth = 10 * self.count // self.left
        if not self.console.is_terminal and tenth > self.told and self.left >= 10:
            self.told, elapsed = tenth, self.bar.tasks[0].elapsed or 0.0
            rest = elapsed * (self.left / self.count - 1)
            _say(self.console, f"{self.count} of {self.left} tasks in {_duration(elapsed)}; {_duration(rest)} left")
        for failure in failures:
            self.lost(failure)

    def lost(self, failure: Failure) -> None:
        """A task whose workers died, or a replicate that failed."""
        self.failures += 1
        if self.failures <= SHOWN_FAILURES:
            _say(self.console, f"failed: {_failure_text(failure)}", "red")
        elif self.failures == SHOWN_FAILURES + 1:
            _say(self.console, "more failures are not shown here, but recorded: linfit sweep show STORE")


def _failure_text(failure: Failure) -> str:
    place = ", ".join(f"{name} = {value}" for name, value in failure.where.items())
    return f"{place}: {failure.message.splitlines()[0] if failure.message else ''}"


def print_outcome(outcome: Outcome, path: Path) -> None:
    """What a run did, in a line."""
    failed = f"; {outcome.failed} replicates failed" if outcome.failed else ""
    left = f"; {outcome.left} tasks are still missing" if outcome.left else ""
    print(f"{outcome.tasks} tasks in {_duration(outcome.seconds)} into {path}{failed}{left}")


def best_points(sweep: Sweep, data: "xr.Dataset") -> dict[str, dict[str, Any]]:
    """Of every output with a good end the best mean, its standard error, and where it is; among finished cells."""
    found = {}
    for name, output in sweep.experiment.outputs.items():
        mean = data[name]
        if output.best is None or not np.isfinite(mean.values).any():
            continue
        finite = mean.where(np.isfinite(mean))
        place = finite.argmin(...) if output.best == "least" else finite.argmax(...)
        point = data[[name, f"{name}_error"]].isel(place)
        at = {axis: point.coords[axis].item() for axis in (*sweep.design, *mean.dims) if axis != "point"}
        value, error = float(point[name]), float(point[f"{name}_error"])
        found[name] = {"value": value, "standard_error": error, "units": output.unit, "at": at}
    return found


def _summary(path: Path) -> dict[str, Any]:
    """A store in plain JSON values."""
    sweep, data, attributes = read_sweep(path), read(path), read_attributes(path)
    status, messages = data["status"].values, data["message"].values
    places = [tuple(place) for place in np.argwhere(status == FAILED).tolist()]
    shown = [(sweep.where(place[:-1], place[-1]), str(messages[place])) for place in places[:SHOWN_FAILURES]]
    counted = {"done": DONE, "failed": FAILED, "missing": MISSING}
    return {
        "store": str(path),
        "configuration": sweep.configuration,
        **{f"replicates_{name}": int((status == value).sum()) for name, value in counted.items()},
        "share_done": float((status == DONE).mean()),
        "kernel_seconds": float(np.nansum(data["seconds"].values)),
        "wall_time": attributes["wall_time"],
        "versions": json_format.loads(attributes["versions"]),
        **{name: attributes[name] for name in ("revision", "device")},
        "best": best_points(sweep, data),
        "failures": [Failure(*failure)._asdict() for failure in shown],
    }


def show(path: Path, json: bool) -> None:
    """Print a summary of a store."""
    found = _summary(path)
    if json:
        print(json_format.dumps(_finite(found), indent=2, ensure_ascii=False))
        return
    console = Console(width=None if Console().is_terminal else 160)
    _print_axes(console, read_sweep(path))
    version = found["versions"]["linfit"] + (f", revision {found['revision']}" if found["revision"] else "")
    done, failed, missing = (found[f"replicates_{name}"] for name in ("done", "failed", "missing"))
    total = done + failed + missing
    counts = f"{found['share_done']:.1%} of {total} replicates done, {failed} failed, {missing} missing"
    times = f"{_duration(found['kernel_seconds'])} in kernels, {_duration(found['wall_time'])} in all"
    origin = f"on {found['device'] or '–'}; linfit {version}; seed {found['configuration']['seed']}"
    _say(console, f"{counts}; {times}, {origin}")
    if found["best"]:
        table = Table("output", "best mean ± standard error", "units", "at", title="best points of finished cells")
        for name, best in found["best"].items():
            where = ", ".join(f"{axis} = {_axis_text(np.array(value))}" for axis, value in best["at"].items())
            table.add_row(name, f"{best['value']:.6g} ± {best['standard_error']:.2g}", best["units"], where)
        console.print(table)
    for failure in found["failures"]:
        _say(console, f"failed: {_failure_text(Failure(**failure))}", "red")
    if found["replicates_failed"] > SHOWN_FAILURES:
        console.print(f"and {found['replicates_failed'] - SHOWN_FAILURES} more, in the store's `message`")


def _finite(value: Any) -> Any:
    """NaN and Inf as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
