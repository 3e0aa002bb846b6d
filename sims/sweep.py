"""Sweeps: an experiment over axes of hyperparameters × replicates, as tasks that can be lost and done again.

The axes that a kernel batches are handed to it whole; every combination of the others is a *cell*, and a *task* is a
cell with a few replicates. A task calls the kernel once for each replicate, always with arrays of the same shapes and
with the replicate's own key, which depends on the seed and its number alone. So no number depends on how replicates
are grouped into tasks, nor on who computes them, when, or how often.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sims.experiments import Experiment, Parameter, find_experiment

if TYPE_CHECKING:
    from sims.cluster import Executor
    from sims.store import Store

Value = str | float | int | Sequence[Any] | np.ndarray
"""What may describe an axis: a number or word, a sequence of them, or text as `read_axis` understands it."""

CHUNK = 8
"""Replicates in a task, unless told otherwise."""


class Task(NamedTuple):
    """One piece of work: replicates first … last − 1 of a cell."""

    cell: tuple[int, ...]
    """Position on each of the axes that are not batched."""
    first: int
    last: int


class Sweep(NamedTuple):
    """What is to be computed. Made by `sweep_over`, which checks it."""

    experiment: Experiment
    parameters: dict[str, np.ndarray]
    """Of every parameter its value (), or its values along an axis (k,)."""
    design: tuple[str, ...]
    """Parameters that vary together along the points of a Sobol design."""
    seeds: int
    """Replicates of every cell."""
    seed: int
    chunk: int
    """Replicates in a task."""

    @property
    def task_dims(self) -> dict[str, int]:
        """Axes that make cells, with their lengths."""
        named = {name: len(self.parameters[name]) for name in self.parameters if self._is_axis(name, batched=False)}
        return ({"point": len(self.parameters[self.design[0]])} if self.design else {}) | named

    @property
    def batched_dims(self) -> dict[str, int]:
        """Axes that the kernel gets whole, with their lengths."""
        return {name: len(self.parameters[name]) for name in self.parameters if self._is_axis(name, batched=True)}

    def _is_axis(self, name: str, batched: bool) -> bool:
        asked = self.experiment.parameters[name].batched == batched
        return asked and self.parameters[name].ndim == 1 and name not in self.design

    def output_dims(self, name: str) -> dict[str, int]:
        """Axes along which an output varies within one cell and replicate, with their lengths."""
        batched = self.batched_dims
        return {dim: batched[dim] for dim in self.experiment.outputs[name].dims if dim in batched}

    @property
    def tasks(self) -> list[Task]:
        """All of them, in order."""
        cells = itertools.product(*map(range, self.task_dims.values()))
        starts = range(0, self.seeds, self.chunk)
        return [Task(cell, start, min(start + self.chunk, self.seeds)) for cell in cells for start in starts]

    @property
    def bytes(self) -> int:
        """Size of all samples, means and standard errors, uncompressed."""
        cells = math.prod(self.task_dims.values())
        values = sum(math.prod(self.output_dims(name).values()) for name in self.experiment.outputs)
        return 8 * cells * values * (self.seeds + 2)

    def arguments(self, cell: tuple[int, ...]) -> dict[str, Any]:
        """What the kernel is called with in this cell."""
        position = dict(zip(self.task_dims, cell, strict=True))
        chosen = {}
        for name, values in self.parameters.items():
            along = "point" if name in self.design else name
            value = values[position[along]] if along in position else values
            batched = self.experiment.parameters[name].batched
            chosen[name] = np.atleast_1d(value) if batched else value.item()
        return chosen

    @property
    def configuration(self) -> dict[str, Any]:
        """All that determines the numbers and their layout, as plain JSON values."""
        return {
            "experiment": self.experiment.name,
            "seed": self.seed,
            "seeds": self.seeds,
            "chunk": self.chunk,
            "design": list(self.design),
            "parameters": {name: values.tolist() for name, values in self.parameters.items()},
        }


# ---------------------------------------------------------------------------------------------------- making a sweep


def sweep_over(
    experiment: Experiment | str,
    axes: Mapping[str, Value] | None = None,
    *,
    seeds: int = 16,
    seed: int = 0,
    chunk: int = CHUNK,
    points: int | None = None,
) -> Sweep:
    """The sweep of an experiment over axes × `seeds` replicates; parameters that are not named keep their defaults.

    An axis is a number or word (held at that value), a sequence, or text for `read_axis`. Axes given as
    "low:high:sobol" vary together along one Sobol design of `points` points, a power of two, scrambled by the seed.
    Raises ValueError for unknown names, values of the wrong kind, repeated or not finite values, and counts below 1.

    >>> sweep = sweep_over("overadaptation", {"n": [50, 100], "penalty": "1e-3:1:4:log", "tau": "0:1:11"}, seeds=20)
    >>> sweep.task_dims, sweep.batched_dims, len(sweep.tasks)
    ({'n': 2}, {'penalty': 4, 'tau': 11}, 6)
    >>> sweep.arguments((1,))["n"], sweep.arguments((1,))["penalty"]
    (100, array([0.001, 0.01 , 0.1  , 1.   ]))
    """
    if isinstance(experiment, str):
        experiment = find_experiment(experiment)
    for name, value, minimum in (("seeds", seeds, 1), ("chunk", chunk, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
            raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2^32, got {seed}")
    axes = dict(axes or {})
    unknown = [name for name in axes if name not in experiment.parameters]
    if unknown:
        known = ", ".join(experiment.parameters)
        raise ValueError(f"{experiment.name} has no parameter {', '.join(unknown)}; its parameters are {known}")
    parameters: dict[str, np.ndarray] = {}
    ranges: dict[str, Range] = {}
    for name, parameter in experiment.parameters.items():
        values = read_axis(name, axes.get(name, parameter.default), parameter)
        if isinstance(values, Range):
            ranges[name] = values
        parameters[name] = np.empty(0) if isinstance(values, Range) else values
    if ranges:
        parameters |= sobol_points(ranges, experiment, points, seed)
    elif points is not None:
        raise ValueError("points is the size of a Sobol design; give at least one axis as low:high:sobol")
    return Sweep(experiment, parameters, tuple(ranges), int(seeds), int(seed), min(int(chunk), int(seeds)))


class Range(NamedTuple):
    """An axis of a Sobol design."""

    low: float
    high: float
    logarithmic: bool

    def inside(self, positions: np.ndarray) -> np.ndarray:
        """Values at positions in [0, 1]."""
        if self.logarithmic:
            return self.low * (self.high / self.low) ** positions
        return self.low + (self.high - self.low) * positions


HOW = "a number, a list 0.1,0.5,1, a grid low:high:count or low:high:count:log, or low:high:sobol or low:high:sobol:log"


def read_axis(name: str, value: Value, parameter: Parameter) -> "np.ndarray | Range":
    """The value () or values (k,) of a parameter, or its range in a Sobol design.

    Text is a number, a list "0.1,0.5,1", a grid "0:1:101" with both ends, a logarithmic grid "1e-4:1e2:60:log", or
    "0:1:sobol", "1e-4:1e2:sobol:log". Parameters that are whole numbers round the values of a grid, and drop those
    that coincide. Raises ValueError for anything else.

    >>> read_axis("penalty", "1e-2:1:3:log", Parameter(0.0, "λ"))
    array([0.01, 0.1 , 1.  ])
    >>> read_axis("n", "100", Parameter(10, "n")), read_axis("law", "gaussian,student", Parameter("gaussian", "law"))
    (array(100), array(['gaussian', 'student'], dtype='<U8'))
    """
    grid = False
    if isinstance(value, str):
        parts = value.split(":")
        if len(parts) > 1 and not isinstance(parameter.default, str):
            if len(parts) not in (3, 4) or (len(parts) == 4 and parts[3] != "log"):
                raise ValueError(f"{name} must be {HOW}; got {value!r}")
            found = _grid(name, value, parts[0], parts[1], parts[2], len(parts) == 4)
            if isinstance(found, Range):
                return found
            value, grid = found, True
        else:
            items = [item.strip() for item in value.split(",")]
            value = items if len(items) > 1 else items[0]
    return _typed(name, value, parameter, grid)


def _grid(name: str, text: str, low: str, high: str, count: str, logarithmic: bool) -> "np.ndarray | Range":
    try:
        ends = Range(float(low), float(high), logarithmic)
        size = 0 if count == "sobol" else int(count)
    except ValueError:
        raise ValueError(f"{name} must be {HOW}; got {text!r}") from None
    if not (math.isfinite(ends.low) and math.isfinite(ends.high)) or (logarithmic and min(ends.low, ends.high) <= 0):
        raise ValueError(f"{name} must have finite ends, positive for a logarithmic grid; got {text!r}")
    if ends.low >= ends.high:
        raise ValueError(f"{name} must run from its lower to its higher end; got {text!r}")
    if count == "sobol":
        return ends
    if size < 2:
        raise ValueError(f"{name} must have at least 2 grid points; got {text!r}")
    values = ends.inside(np.linspace(0, 1, size))
    values[-1] = ends.high
    return values


def _typed(name: str, value: Any, parameter: Parameter, grid: bool) -> np.ndarray:
    """`value` as an array of the parameter's type, with at most one axis."""
    kind = type(parameter.default)
    if kind is str:
        array = np.asarray(value)
        if array.dtype.kind != "U" or "" in array:
            raise ValueError(f"{name} must be a word or several, like {parameter.default!r}; got {value!r}")
    else:
        try:
            if isinstance(value, bool):
                raise TypeError
            array = np.asarray(value, dtype=float)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be {HOW}; got {value!r}") from None
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {value!r}")
    if array.ndim > 1 or array.size == 0:
        raise ValueError(f"{name} must be one value or a list of values, got an array of shape {array.shape}")
    if kind is int:
        whole = np.rint(array)
        if not grid and (whole != array).any():
            raise ValueError(f"{name} must be whole numbers, got {value!r}")
        array = np.unique(whole).astype(np.int64) if grid else np.asarray(whole, np.int64)
    if array.ndim and len(np.unique(array)) < len(array):
        raise ValueError(f"{name} must not have the same value twice, got {value!r}")
    return array


def sobol_points(
    ranges: Mapping[str, Range], experiment: Experiment, points: int | None, seed: int
) -> dict[str, np.ndarray]:
    """Coordinates (points,) of a scrambled Sobol design by parameter (scipy.stats.qmc)."""
    if points is None or points < 2 or points & (points - 1):
        raise ValueError(f"points, the size of the Sobol design, must be a power of two, got {points}")
    from scipy.stats import qmc

    unit = qmc.Sobol(len(ranges), scramble=True, rng=seed).random_base2(points.bit_length() - 1)
    columns = {}
    for (name, ends), column in zip(ranges.items(), unit.T, strict=True):
        values = ends.inside(column)
        whole = isinstance(experiment.parameters[name].default, int)
        columns[name] = np.rint(values).astype(np.int64) if whole else values
    return columns


def sweep_from_toml(path: Path) -> tuple[Sweep, Path | None]:
    """A sweep described by a TOML file, and its store if the file names one. ::

        experiment = "overadaptation"
        store = "runs/oa.zarr"
        seeds = 64
        [axes]
        penalty = "1e-4:1e2:60:log"
        noise = [0.1, 0.5, 1.0]

    `seed`, `chunk` and `points` may be given too. Raises ValueError for anything else in the file.
    """
    import tomllib

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    known = ("experiment", "axes", "store", "seeds", "seed", "chunk", "points")
    unknown = [name for name in content if name not in known]
    if unknown or not isinstance(content.get("experiment"), str) or not isinstance(content.get("axes", {}), dict):
        raise ValueError(
            f"{path} must have an experiment, perhaps a table [axes], and nothing beyond {', '.join(known)}; "
            f"got {', '.join(content) or 'nothing'}"
        )
    store = content.pop("store", None)
    sweep = sweep_over(content.pop("experiment"), content.pop("axes", {}), **content)
    return sweep, None if store is None else Path(store)


def sweep_from_configuration(configuration: Mapping[str, Any]) -> Sweep:
    """The sweep that has this `Sweep.configuration`."""
    experiment = find_experiment(configuration["experiment"])
    kinds = {int: np.int64, float: np.float64, str: np.str_}
    parameters: dict[str, np.ndarray] = {
        name: np.asarray(configuration["parameters"].get(name, parameter.default), kinds[type(parameter.default)])
        for name, parameter in experiment.parameters.items()
    }
    counts = (configuration[name] for name in ("seeds", "seed", "chunk"))
    return Sweep(experiment, parameters, tuple(configuration["design"]), *counts)


# --------------------------------------------------------------------------------------------------- measuring a task


class Result(NamedTuple):
    """What comes back from a task of k replicates."""

    samples: dict[str, np.ndarray]
    """Each output (k, …), NaN where the replicate failed."""
    seconds: np.ndarray
    """(k,)"""
    messages: list[str]
    """Of every replicate that failed what went wrong, else ""."""
    environment: dict[str, str]
    """Where it was computed, as far as numbers may depend on it."""


def measure(sweep: Sweep, task: Task) -> Result:
    """Call the kernel for every replicate of a task. What it raises is recorded, not passed on."""
    from sims.cluster import environment

    arguments = sweep.arguments(task.cell)
    shapes = {name: tuple(sweep.output_dims(name).values()) for name in sweep.experiment.outputs}
    samples = {name: np.full((task.last - task.first, *shape), np.nan) for name, shape in shapes.items()}
    seconds, messages = np.zeros(task.last - task.first), []
    for row, replicate in enumerate(range(task.first, task.last)):
        start = perf_counter()
        try:
            given = sweep.experiment.measure(replicate_key(sweep, replicate), arguments)
            arrays = {name: _checked(sweep, name, given, arguments) for name in shapes}
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("")
            for name, array in arrays.items():
                samples[name][row] = array.reshape(shapes[name])
        seconds[row] = perf_counter() - start
    return Result(samples, seconds, messages, environment())


def replicate_key(sweep: Sweep, replicate: int) -> Any:
    """The key of one replicate, the same in every cell: neighbouring cells share their randomness."""
    if sweep.experiment.randomness == "numpy":
        return np.random.SeedSequence([sweep.seed, replicate])
    import jax

    return jax.random.fold_in(jax.random.key(sweep.seed), replicate)


def _checked(sweep: Sweep, name: str, given: Mapping[str, Any], arguments: dict[str, Any]) -> np.ndarray:
    if name not in given:
        raise ValueError(f"the experiment gave no {name}, only {', '.join(given)}")
    array = np.asarray(given[name], dtype=float)
    expected = tuple(len(arguments[dim]) for dim in sweep.experiment.outputs[name].dims)
    if array.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"{name} has {np.isnan(array).sum()} NaN among {array.size} values")
    return array


# ------------------------------------------------------------------------------------------------------------ running


class Failure(NamedTuple):
    """A task that did not give all its numbers."""

    where: dict[str, Any]
    """Values of the parameters that are axes of cells, and the replicate, or the first of the task."""
    message: str


class Outcome(NamedTuple):
    """What one call of `run` did."""

    tasks: int
    """Tasks finished by this call."""
    failures: list[Failure]
    """Replicates whose kernel raised, and tasks whose workers died; of this call."""
    left: int
    """Tasks that are still missing: those whose workers died."""
    failed: int
    """Replicates recorded as failed in the store, by this call or an earlier one."""
    seconds: float


class Watcher:
    """Is told what happens during a run; this one ignores it."""

    def started(self, total: int, done: int, store: "Store") -> None:
        """Before the first task: how many tasks there are, how many are done, where they go."""

    def finished(self, seconds: np.ndarray, failures: list[Failure]) -> None:
        """A task was stored; its replicates took so many seconds (k,) each."""

    def lost(self, failure: Failure) -> None:
        """A task was given up: its workers died."""


def run(
    sweep: Sweep,
    store: Path | str,
    *,
    resume: bool = False,
    retry: bool = False,
    executor: "Executor | None" = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Compute what is missing of a sweep into a store, and the means and standard errors of finished cells.

    A store that exists is refused unless `resume`; then it must hold the same configuration, made by the same versions.
    `retry` does failed replicates again. `executor` is one of `sims.cluster`, by default this process (or one child of
    it, where this one has other thread settings than workers). Whatever ends a run, even SIGKILL, the store is sound
    and can be resumed. Raises ValueError for a store that does not fit or is in use, OSError if it cannot be written.

    >>> import tempfile, xarray
    >>> folder = tempfile.TemporaryDirectory()
    >>> sweep = sweep_over("overadaptation", {"n": 10, "p": 30, "tau": "0:1:3"}, seeds=4)
    >>> run(sweep, folder.name + "/oa.zarr").tasks
    1
    >>> xarray.open_zarr(folder.name + "/oa.zarr", chunks=None).finetune.dims
    ('tau',)
    >>> folder.cleanup()
    """
    from sims.cluster import here
    from sims.store import create, opened

    path, watcher, start = Path(store), watcher or Watcher(), perf_counter()
    if not (path.exists() and resume):
        create(path, sweep)
    with opened(path, sweep) as target:
        missing = target.missing_tasks(retry)
        watcher.started(len(sweep.tasks), len(sweep.tasks) - len(missing), target)
        failures: list[Failure] = []
        finished = 0
        try:
            for task, result in (executor or here)(sweep, missing):
                if isinstance(result, str):
                    failures.append(Failure(where(sweep, task, task.first), result))
                    watcher.lost(failures[-1])
                    continue
                target.write(task, result)
                rows = [(row, message) for row, message in enumerate(result.messages) if message]
                new = [Failure(where(sweep, task, task.first + row), message) for row, message in rows]
                failures += new
                finished += 1
                watcher.finished(result.seconds, new)
            target.summarise()
        finally:
            with suppress(OSError):  # whatever went wrong before is what should be told
                target.add_wall_time(perf_counter() - start)
        return Outcome(finished, failures, len(missing) - finished, target.failed_count, perf_counter() - start)


def where(sweep: Sweep, task: Task, replicate: int) -> dict[str, Any]:
    """A cell and replicate in words."""
    arguments, named = sweep.arguments(task.cell), {}
    for name in (*sweep.design, *sweep.task_dims):
        if name != "point":
            value = arguments[name]
            named[name] = value.item() if isinstance(value, np.ndarray) else value
    return named | {"replicate": replicate}


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """One line for each entry of two nested mappings that differs.

    >>> list(differences({"seed": 0, "parameters": {"n": 5}}, {"seed": 1, "parameters": {"n": 5}}))
    ['seed: the store has 0, asked for is 1']
    """
    for name in dict.fromkeys([*stored, *asked]):
        one, other = stored.get(name), asked.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other)
        else:
            yield f"{name}: the store has {_brief(one)}, asked for is {_brief(other)}"


def _brief(value: Any) -> str:
    text: Callable[[Any], str] = json.dumps
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} values {text(value[0])}, {text(value[1])} … {text(value[-1])}"
    return "nothing" if value is None else text(value)
