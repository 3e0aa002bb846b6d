"""The command `linfit sweep`. Nothing heavy is imported until it runs."""

import os
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from sims.sweep.environment import SETTINGS
from sims.sweep.experiments import EXPERIMENTS, Experiment

if TYPE_CHECKING:
    from sims.sweep.executors import Executor

__all__ = ["sweep"]

_Store = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="Folder of the results.")]


@dataclass(kw_only=True)
class _How:
    """Options that every sweep has."""

    resume: bool = False
    """Compute what is missing in a store that exists."""
    retry: bool = False
    """With --resume: do replicates that failed again."""
    workers: int = 0
    """Local worker processes, or Slurm jobs; 0 computes in this process."""
    scheduler: str | None = None
    """Address of a running Dask scheduler, such as tcp://host:8786."""
    slurm: bool = False
    """Start the workers as Slurm jobs; queue, memory and walltime as configured for dask-jobqueue."""
    plan: bool = False
    """Only print what would be computed."""


@dataclass(kw_only=True)
class _What(_How):
    """Options of a sweep that is given on the command line."""

    store: Path
    """Folder of the results (zarr), to be created."""
    seeds: int = 16
    """Replicates of every point."""
    seed: int = 0
    """Seed of every random number."""
    chunk: int = 8
    """Replicates in a task; no number depends on it."""
    points: int | None = None
    """Points of the Sobol design along the axes given as low:high:sobol; a power of two."""


def _experiment_options(experiment: Experiment) -> type:
    """A dataclass with one text for every parameter of the experiment, for the command line."""
    fields = []
    for name, parameter in experiment.parameters.items():
        unit = "" if parameter.unit == "1" else f" [{parameter.unit}]"
        text = f"{parameter.help}{unit}{', batched' if parameter.batched else ''}."
        option = Annotated[str, tyro.conf.arg(help=text, metavar="AXIS")]
        fields.append((name, option, field(default=str(parameter.default))))
    made = make_dataclass(experiment.name, fields, bases=(_What,), kw_only=True)
    made.__doc__ = (
        f"{experiment.help}\n\n"
        "AXIS is a number, a list 0.1,0.5,1, a grid low:high:count or low:high:count:log, or, for a Sobol design, "
        "low:high:sobol or low:high:sobol:log; --name=-1:1:5 where it begins with a minus."
    )
    return made


@dataclass
class _File(_How):
    """A sweep described in a TOML file: experiment, store, seeds, seed, chunk, points, and a table [axes].

    The experiment is one of ours by name, or one of your own as file.py:NAME or module:NAME.
    """

    file: tyro.conf.Positional[Path]  # The TOML file.
    store: Path | None = None  # Folder of the results, instead of the one in the file.


@dataclass
class _Resume(_How):
    """What is missing in a store, as it was configured."""

    store: _Store


@dataclass
class _Show:
    """Summary of a store: axes, share done, the best point of every output, failures."""

    store: _Store
    json: bool = False  # Print everything as JSON.


@dataclass
class _Plot:
    """A quick look at a store: an output along one axis, a line for each value of another."""

    store: _Store
    x: str  # Axis to draw along.
    lines: str | None = None  # Axis whose values are lines.
    y: tuple[str, ...] = ()  # Outputs to draw, a panel each; the first two that vary along x if not given.
    at: tuple[str, ...] = ()  # Where the other axes are held, as NAME=VALUE; at the best point if not given.
    out: Path | None = None  # Picture to write (.png, .pdf or .svg); STORE with the ending .png if not given.


@dataclass
class _Export:
    """A store as one file: NetCDF with everything, or CSV with means and standard errors."""

    store: _Store
    out: Path  # File to write, .nc or .csv.


_KINDS = {name: _experiment_options(experiment) for name, experiment in EXPERIMENTS.items()}
_KINDS |= {"file": _File, "resume": _Resume, "show": _Show, "plot": _Plot, "export": _Export}
_ACTIONS = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in _KINDS.items())

if TYPE_CHECKING:
    _Action = Any  # the dataclasses above are made while the module is imported
else:
    _Action = tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Union[_ACTIONS]]]  # noqa: UP007


def sweep(action: _Action) -> None:
    """Run an experiment over a grid or a design of hyperparameters × replicates; look at what came out.

    Results go to a zarr store that survives any interruption; exit code 1 if something in it has failed.
    """
    os.environ.update(SETTINGS)  # before numpy and JAX are loaded: a command owns its process
    from sims.sweep.executors import require

    require("zarr")
    if isinstance(action, _Show):
        from sims.sweep.summary import show

        show(action.store, action.json)
    elif isinstance(action, _Plot):
        from figures.sweep import draw_sweep

        print(draw_sweep(action.store, action.x, action.lines, action.y, action.at, action.out))
    elif isinstance(action, _Export):
        from sims.sweep.store import export

        export(action.store, action.out)
        print(f"written to {action.out}")
    elif not _run(action):
        raise SystemExit(1)


def _run(action: Any) -> bool:
    """Compute a sweep; whether nothing in its store has failed or is missing."""
    from rich.console import Console

    from sims.sweep.driver import run
    from sims.sweep.plan import sweep_from_toml, sweep_over
    from sims.sweep.store import read_sweep
    from sims.sweep.summary import Progress, print_outcome, print_plan

    resume = action.resume or isinstance(action, _Resume)
    if isinstance(action, _File):
        planned, path = sweep_from_toml(action.file)
        path = action.store or path
        if path is None:
            raise ValueError(f"--store is needed: {action.file} names none")
    elif isinstance(action, _Resume):
        planned, path = read_sweep(action.store), action.store
    else:
        experiment = EXPERIMENTS[type(action).__name__]
        axes = {name: getattr(action, name) for name in experiment.parameters}
        counts = {name: getattr(action, name) for name in ("seeds", "seed", "chunk", "points")}
        try:
            planned, path = sweep_over(experiment, axes, **counts), action.store
        except ValueError as error:
            raise ValueError(f"--{error}") from None
    if action.retry and not resume:
        raise ValueError("--retry does again what failed in a store, together with --resume")
    executor = _executor(action)
    if action.plan:
        print_plan(Console(), planned, path)
        return True
    watcher = Progress(planned, path, action.workers)
    with watcher.bar:
        outcome = run(planned, path, resume=resume, retry=action.retry, executor=executor, watcher=watcher)
    print_outcome(outcome, path)
    return not (outcome.failed or outcome.left)


def _executor(action: _How) -> "Executor":
    from sims.sweep import executors

    if action.workers < 0:
        raise ValueError(f"--workers must not be negative, got {action.workers}")
    if action.scheduler is not None:
        if action.slurm or action.workers:
            raise ValueError("--scheduler brings its own workers; leave out --workers and --slurm")
        return executors.remote(action.scheduler)
    if action.slurm:
        return executors.slurm(action.workers)
    return executors.local(action.workers) if action.workers else executors.here
