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

SHOWN_FAILURES = 10
"""Failures told one by one; the rest are counted."""


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
    named = "cell" if cells == 1 else "cells"
    console.print(
        f"{tasks} tasks ({cells} {named} × {sweep.seeds} replicates, up to {sweep.chunk} in a task), {done} of them "
        f"done; {decimal(sweep.bytes)} before compression, into {path}",
        highlight=False,
        soft_wrap=True,
    )


class Progress(Watcher):
    """Tells of a run on standard error: a bar where someone watches, else a line every tenth of the way."""

    def __init__(self, sweep: Sweep, path: Path, workers: int):
        self.sweep, self.path, self.workers = sweep, path, max(workers, 1)
        self.console = Console(stderr=True)
        self.bar = bars.Progress(
            bars.TextColumn("{task.fields[what]}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.told = self.count = self.failures = 0

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

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
            self._say(f"the first task took {_duration(float(seconds.sum()))}; about {_duration(rest)} for {others}")
        speed = self.bar.tasks[0].speed or 0
        rate = f"{speed:.3g} tasks/s" if speed >= 1 else f"{_duration(1 / speed)} a task" if speed else ""
        self.bar.update(self.task, completed=self.count, rate=rate)
        tenth = 10 * self.count // self.left
        if not self.console.is_terminal and tenth > self.told and self.left >= 10:
            self.told = tenth
            elapsed = self.bar.tasks[0].elapsed or 0.0
            rest = elapsed * (self.left / self.count - 1)
            self._say(f"{self.count} of {self.left} tasks in {_duration(elapsed)}; {_duration(rest)} left")
        for failure in failures:
            self.lost(failure)

    def lost(self, failure: Failure) -> None:
        """A task whose workers died, or a replicate that failed."""
        self.failures += 1
        if self.failures <= SHOWN_FAILURES:
            self._say(f"failed: {_failure_text(failure)}", style="red")
        elif self.failures == SHOWN_FAILURES + 1:
            self._say("more failures are not shown here, but recorded: linfit sweep show STORE")

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def _failure_text(failure: Failure) -> str:
    """One line."""
    place = ", ".join(f"{name} = {value}" for name, value in failure.where.items())
    return f"{place}: {failure.message.splitlines()[0] if failure.message else ''}"


def print_outcome(outcome: Outcome, path: Path) -> None:
    """What a run did, in a line."""
    text = f"{outcome.tasks} tasks in {_duration(outcome.seconds)} into {path}"
    if outcome.failed:
        text += f"; {outcome.failed} replicates failed"
    if outcome.left:
        text += f"; {outcome.left} tasks are still missing"
    print(text)


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
        axes = [*sweep.design, *(dim for dim in mean.dims if dim != "point")]
        found[name] = {
            "value": float(point[name]),
            "standard_error": float(point[f"{name}_error"]),
            "units": output.unit,
            "at": {axis: point.coords[axis].item() for axis in axes},
        }
    return found


def _summary(path: Path) -> dict[str, Any]:
    """A store in plain JSON values."""
    sweep, data, attributes = read_sweep(path), read(path), read_attributes(path)
    status, seconds = data["status"].values, data["seconds"].values
    places = [tuple(place) for place in np.argwhere(status == FAILED).tolist()]
    messages = data["message"].values
    failures = [
        {"where": sweep.where(place[:-1], place[-1]), "message": str(messages[place])}
        for place in places[:SHOWN_FAILURES]
    ]
    return {
        "store": str(path),
        "configuration": sweep.configuration,
        "replicates_done": int((status == DONE).sum()),
        "replicates_failed": len(places),
        "replicates_missing": int((status == MISSING).sum()),
        "share_done": float((status == DONE).mean()),
        "kernel_seconds": float(np.nansum(seconds)),
        "wall_time": attributes["wall_time"],
        "versions": json_format.loads(attributes["versions"]),
        "revision": attributes["revision"],
        "device": attributes["device"],
        "best": best_points(sweep, data),
        "failures": failures,
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
    console.print(
        f"{found['share_done']:.1%} of {done + failed + missing} replicates done, {failed} failed, {missing} missing; "
        f"{_duration(found['kernel_seconds'])} in kernels, {_duration(found['wall_time'])} in all, on "
        f"{found['device'] or '–'}; linfit {version}; seed {found['configuration']['seed']}",
        highlight=False,
        soft_wrap=True,
    )
    if found["best"]:
        table = Table("output", "best mean ± standard error", "units", "at", title="best points of finished cells")
        for name, best in found["best"].items():
            where = ", ".join(f"{axis} = {_number(value)}" for axis, value in best["at"].items())
            table.add_row(name, f"{best['value']:.6g} ± {best['standard_error']:.2g}", best["units"], where)
        console.print(table)
    for failure in found["failures"]:
        text = _failure_text(Failure(failure["where"], failure["message"]))
        console.print(f"failed: {text}", style="red", highlight=False, soft_wrap=True, markup=False)
    if found["replicates_failed"] > SHOWN_FAILURES:
        console.print(f"and {found['replicates_failed'] - SHOWN_FAILURES} more, in the store's `message`")


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """NaN and Inf as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
