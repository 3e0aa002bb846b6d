"""Sweeps: an experiment over axes of hyperparameters × replicates, as tasks that can be lost and done again.

    sweep_over(experiment, axes, seeds=64)   what is to be computed: a `Sweep`, made of tasks      axes, plan
    run(sweep, "a.zarr", executor=…)         computes what is missing, into a store                driver, task, store
    executors.local(4)                       who computes: this process, workers, cluster, Slurm   executors
    read("a.zarr")                           an xarray Dataset                                     store

An `Experiment` is a pure function of a key and parameters with a description of both sides; `experiments` has ours.
Importing this package, or `experiments`, loads neither JAX nor numpy; the other names are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sims.sweep.experiments import Experiment, Output

if TYPE_CHECKING:
    from sims.sweep import executors
    from sims.sweep.driver import Watcher, run
    from sims.sweep.plan import sweep_over
    from sims.sweep.store import read

__all__ = ["Experiment", "Output", "Watcher", "executors", "read", "run", "sweep_over"]

_MODULE_OF = {"Watcher": "driver", "read": "store", "run": "driver", "sweep_over": "plan"}


def __getattr__(name: str) -> Any:
    if name == "executors":
        return import_module("sims.sweep.executors")
    if name in _MODULE_OF:
        return getattr(import_module(f"sims.sweep.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'sims.sweep' has no attribute {name!r}")
