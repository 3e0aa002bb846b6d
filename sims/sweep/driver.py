"""The driver of a sweep: it hands out what is missing, and keeps what comes back."""

from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from sims.sweep.executors import Executor, here
from sims.sweep.plan import Sweep
from sims.sweep.store import FAILED, Store, create, opened

__all__ = ["Outcome", "Watcher", "run"]


class Failure(NamedTuple):
    """A task that did not give all its numbers."""

    where: dict[str, Any]  # parameters that are axes of cells, and the replicate, or the first of the task
    message: str


class Outcome(NamedTuple):
    """What one call of `run` did."""

    tasks: int  #: Tasks finished by this call.
    failures: list[Failure]  #: Replicates whose kernel raised, and tasks whose workers died; of this call.
    left: int  #: Tasks that are still missing: those whose workers died.
    failed: int  #: Replicates recorded as failed in the store, by this call or an earlier one.
    seconds: float


class Watcher:
    """Is told what happens during a run; this one ignores it."""

    def started(self, total: int, done: int, store: Store) -> None:
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
    executor: Executor | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Compute what is missing of a sweep into a store, and the means and standard errors of finished cells (ours).

    Args:
        sweep: made by `sweep_over`.
        store: folder of the results; one that exists is refused unless `resume`.
        resume: go on with a store of the same configuration, made by the same versions.
        retry: do replicates that failed again.
        executor: who computes, one of `sims.sweep.executors`; by default `executors.here`.
        watcher: is told what happens.

    Whatever ends a run, even SIGKILL, the store is sound and can be resumed. Raises ValueError for a store that does
    not fit or is in use, OSError if it cannot be written.

    >>> import tempfile
    >>> from sims.sweep import read, run, sweep_over
    >>> folder = tempfile.TemporaryDirectory()
    >>> sweep = sweep_over("overadaptation", {"n": 10, "p": 30, "tau": "0:1:3"}, seeds=4)
    >>> run(sweep, folder.name + "/oa.zarr").tasks
    1
    >>> read(folder.name + "/oa.zarr").finetune.dims
    ('tau',)
    >>> folder.cleanup()
    """
    path, watcher, start = Path(store), watcher or Watcher(), perf_counter()
    if not (path.exists() and resume):
        create(path, sweep)
    with opened(path, sweep) as target:
        missing = target.missing_tasks(retry)
        watcher.started(len(sweep.tasks), len(sweep.tasks) - len(missing), target)
        finished, failures = 0, list[Failure]()
        try:
            for task, result in (executor or here)(sweep, missing):
                if isinstance(result, str):
                    failures.append(Failure(sweep.where(task.cell, task.first), result))
                    watcher.lost(failures[-1])
                    continue
                target.write(task, result)
                rows = enumerate(result.messages, task.first)
                new = [Failure(sweep.where(task.cell, replicate), text) for replicate, text in rows if text]
                failures += new
                finished += 1
                watcher.finished(result.seconds, new)
            target.summarise()
        finally:
            with suppress(OSError):  # whatever went wrong before is what should be told
                target.add_wall_time(perf_counter() - start)
        failed, seconds = int((target.status == FAILED).sum()), perf_counter() - start
        return Outcome(finished, failures, len(missing) - finished, failed, seconds)
