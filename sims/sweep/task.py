"""One task, measured: the kernel called once for each of its replicates.

Arrays always have the same shapes, and the replicate's key depends on the seed and its number alone. So no number
depends on how replicates are grouped into tasks, nor on who computes them, when, or how often.
"""

from collections.abc import Mapping
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from sims.sweep.environment import environment
from sims.sweep.plan import Sweep, Task


class Result(NamedTuple):
    """What comes back from a task of k replicates."""

    samples: dict[str, np.ndarray]  # each output (k, …), NaN where the replicate failed
    seconds: np.ndarray
    messages: list[str]  # of every replicate that failed what went wrong, else ""
    environment: dict[str, str]  # where it was computed, as far as numbers may depend on it


def measure(sweep: Sweep, task: Task) -> Result:
    """Call the kernel for every replicate of a task. What it raises is recorded, not passed on."""
    arguments, count = sweep.arguments(task.cell), task.last - task.first
    shapes = {name: tuple(sweep.output_dims(name).values()) for name in sweep.experiment.outputs}
    samples = {name: np.full((count, *shape), np.nan) for name, shape in shapes.items()}
    seconds, messages = np.zeros(count), [""] * count
    for row in range(count):
        start = perf_counter()
        try:
            given = sweep.experiment.measure(replicate_key(sweep, task.first + row), arguments)
            arrays = {name: _checked(sweep, name, given, arguments) for name in shapes}
            for name, array in arrays.items():
                samples[name][row] = array.reshape(shapes[name])
        except Exception as error:
            messages[row] = f"{type(error).__name__}: {error}"
        seconds[row] = perf_counter() - start
    return Result(samples, seconds, messages, environment())


def replicate_key(sweep: Sweep, replicate: int) -> Any:
    """The key of one replicate, the same in every cell: neighbouring cells share their randomness."""
    if sweep.experiment.randomness == "numpy":
        return np.random.SeedSequence([sweep.seed, replicate])
    import jax  # seconds to load, and some experiments do without

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
