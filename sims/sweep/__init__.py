"""Sweeps: an experiment over axes of hyperparameters × replicates, as tasks that can be lost and done again.

    sweep_over(experiment, axes, seeds=64)   what is to be computed: a `Sweep`, made of tasks      axes, plan
    run(sweep, "a.zarr", executor=…)         computes what is missing, into a store                driver, task, store
    executors.local(4)                       who computes: this process, workers, cluster, Slurm   executors
    read("a.zarr")                           an xarray Dataset                                     store

An `Experiment` is a pure function of a key and parameters with a description of both sides; `experiments` has ours.
Importing this package, or `experiments`, loads neither JAX nor numpy; the other names are loaded when they are used.
"""

# isort: skip_file
from typing import TYPE_CHECKING

from linfit.internal.lazy import attach
from sims.sweep.experiments import Experiment as Experiment, Output as Output

if TYPE_CHECKING:  # for type checkers, and the table that `attach` reads
    from sims.sweep import executors as executors
    from sims.sweep.driver import Watcher as Watcher, run as run
    from sims.sweep.plan import sweep_over as sweep_over
    from sims.sweep.store import read as read

__getattr__, __dir__, __all__ = attach(__name__, __file__)
__all__ += ["Experiment", "Output"]
