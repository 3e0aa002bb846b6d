"""What is to be computed: a sweep, made of cells and tasks.

The axes that a kernel batches are handed to it whole; every combination of the others is a *cell*, and a *task* is a
cell with a few replicates.
"""

import itertools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sims.sweep.axes import Range, Value, read_axis, sobol_points
from sims.sweep.experiments import Experiment, find_experiment

__all__ = ["Sweep", "sweep_from_toml", "sweep_over"]


class Task(NamedTuple):
    """One piece of work: replicates first … last − 1 of a cell, the position on each axis that is not batched."""

    cell: tuple[int, ...]
    first: int
    last: int


class Sweep(NamedTuple):
    """What is to be computed. Made by `sweep_over`, which checks it."""

    experiment: Experiment
    parameters: dict[str, np.ndarray]  #: Of every parameter its value (), or its values along an axis (k,).
    design: tuple[str, ...]  #: Parameters that vary together along the points of a Sobol design.
    seeds: int  #: Replicates of every cell.
    seed: int
    chunk: int  #: Replicates in a task.

    @property
    def task_dims(self) -> dict[str, int]:
        """Axes that make cells, with their lengths."""
        return ({"point": len(self.parameters[self.design[0]])} if self.design else {}) | self._dims(batched=False)

    @property
    def batched_dims(self) -> dict[str, int]:
        """Axes that the kernel gets whole, with their lengths."""
        return self._dims(batched=True)

    def _dims(self, batched: bool) -> dict[str, int]:
        axes = {name: values for name, values in self.parameters.items() if values.ndim and name not in self.design}
        return {name: len(axes[name]) for name in axes if self.experiment.parameters[name].batched == batched}

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
        values = sum(math.prod(self.output_dims(name).values()) for name in self.experiment.outputs)
        return 8 * math.prod(self.task_dims.values()) * values * (self.seeds + 2)

    def arguments(self, cell: tuple[int, ...]) -> dict[str, Any]:
        """What the kernel is called with in this cell."""
        position = dict(zip(self.task_dims, cell, strict=True))
        chosen = {}
        for name, values in self.parameters.items():
            along = "point" if name in self.design else name
            value = values[position[along]] if along in position else values
            chosen[name] = np.atleast_1d(value) if self.experiment.parameters[name].batched else value.item()
        return chosen

    def where(self, cell: tuple[int, ...], replicate: int) -> dict[str, Any]:
        """A cell and a replicate by the values of the parameters that make cells."""
        arguments = self.arguments(cell)
        names = [*self.design, *(name for name in self.task_dims if name != "point")]
        return {name: np.asarray(arguments[name]).item() for name in names} | {"replicate": replicate}

    @property
    def configuration(self) -> dict[str, Any]:
        """All that determines the numbers and their layout, as plain JSON values."""
        counts = {"seed": self.seed, "seeds": self.seeds, "chunk": self.chunk}
        values = {name: values.tolist() for name, values in self.parameters.items()}
        return {"experiment": self.experiment.name, **counts, "design": list(self.design), "parameters": values}


def sweep_over(
    experiment: Experiment | str,
    axes: Mapping[str, Value] | None = None,
    *,
    seeds: int = 16,
    seed: int = 0,
    chunk: int = 8,
    points: int | None = None,
) -> Sweep:
    """The sweep of an experiment over axes × replicates (ours).

    Args:
        experiment: an `Experiment`, or its name as `find_experiment` takes it.
        axes: by parameter a number or word (held at that value), a sequence, or text for `read_axis`; parameters that
            are not named keep their defaults. Those given as "low:high:sobol" vary together along one Sobol design.
        seeds: replicates of every cell.
        seed: of every random number.
        chunk: replicates in a task; no number depends on it.
        points: of the Sobol design, a power of two.

    Raises ValueError for unknown names, values of the wrong kind, repeated or not finite values, and counts below 1.

    >>> from sims.sweep import sweep_over
    >>> sweep = sweep_over("overadaptation", {"n": [50, 100], "penalty": "1e-3:1:4:log", "tau": "0:1:11"}, seeds=20)
    >>> sweep.task_dims, sweep.batched_dims, len(sweep.tasks)
    ({'n': 2}, {'penalty': 4, 'tau': 11}, 6)
    >>> sweep.arguments((1,))["n"], sweep.arguments((1,))["penalty"]
    (100, array([0.001, 0.01 , 0.1  , 1.   ]))
    """
    experiment = find_experiment(experiment) if isinstance(experiment, str) else experiment
    for name, value, minimum in (("seeds", seeds, 1), ("chunk", chunk, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
            raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2^32, got {seed}")
    described, axes = experiment.parameters, axes or {}
    _require_known(experiment, axes)
    given = {name: read_axis(name, axes.get(name, one.default), one) for name, one in described.items()}
    ranges = {name: values for name, values in given.items() if isinstance(values, Range)}
    if points is not None and not ranges:
        raise ValueError("points is the size of a Sobol design; give at least one axis as low:high:sobol")
    design = sobol_points(ranges, points, seed) if ranges else {}
    parameters = {name: design[name] if isinstance(values, Range) else values for name, values in given.items()}
    return Sweep(experiment, parameters, tuple(design), int(seeds), int(seed), min(int(chunk), int(seeds)))


def _require_known(experiment: Experiment, names: Mapping[str, Any]) -> None:
    if unknown := [name for name in names if name not in experiment.parameters]:
        known = ", ".join(experiment.parameters)
        raise ValueError(f"{experiment.name} has no parameter {', '.join(unknown)}; its parameters are {known}")


def sweep_from_toml(path: Path) -> tuple[Sweep, Path | None]:
    """A sweep described by a TOML file, and its store if the file names one. ::

        experiment = "overadaptation"
        store = "runs/oa.zarr"
        seeds = 64
        [axes]
        penalty = "1e-4:1e2:60:log"
        noise_std = [0.1, 0.5, 1.0]

    `seed`, `chunk` and `points` may be given too. Raises ValueError for anything else in the file.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    known = ("experiment", "axes", "store", "seeds", "seed", "chunk", "points")
    experiment, axes = content.get("experiment"), content.get("axes", {})
    if content.keys() - known or not isinstance(experiment, str) or not isinstance(axes, dict):
        raise ValueError(
            f"{path} must have an experiment, perhaps a table [axes], and nothing beyond {', '.join(known)}; "
            f"got {', '.join(content) or 'nothing'}"
        )
    store = Path(content.pop("store")) if "store" in content else None
    return sweep_over(content.pop("experiment"), content.pop("axes", {}), **content), store


def sweep_from_configuration(configuration: Mapping[str, Any]) -> Sweep:
    """The sweep that has this `Sweep.configuration`; ValueError if its experiment has no longer such parameters."""
    experiment, given = find_experiment(configuration["experiment"]), configuration["parameters"]
    _require_known(experiment, given)
    kinds: dict[type, Any] = {int: np.int64, float: np.float64, str: np.str_}
    defaults = {name: parameter.default for name, parameter in experiment.parameters.items()}
    parameters = {name: np.asarray(given.get(name, one), kinds[type(one)]) for name, one in defaults.items()}
    counts = (configuration[name] for name in ("seeds", "seed", "chunk"))
    return Sweep(experiment, parameters, tuple(configuration["design"]), *counts)
