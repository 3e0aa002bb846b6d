"""Who computes the tasks of a sweep: this process, local worker processes, a Dask cluster, Slurm jobs.

Every executor runs the same function in processes with the same settings, one thread of computation each, so that the
numbers do not depend on the choice: how BLAS and XLA split a product among threads can change its last bits. N workers
use N cores. An executor is a function (sweep, tasks) → pairs (task, result) in the order of arrival; a task that was
given up comes with the reason, a text, instead of a result. Dask, which is an extra and takes a second to load, is
imported where it is used.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from sims.sweep.environment import SETTINGS
from sims.sweep.experiments import load_file
from sims.sweep.plan import Sweep, Task
from sims.sweep.task import Result, measure

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["here", "local", "remote", "slurm"]

Answers = Iterator[tuple[Task, Result | str]]
Executor = Callable[[Sweep, Sequence[Task]], Answers]

RETRIES = 3
"""How often a task is tried again after its worker has died; then it is given up and reported.

A scheduler that runs already keeps its own count, Dask's `distributed.scheduler.allowed-failures`.
"""

PATIENCE = 60.0  # seconds without any local worker after which they are started anew
TICK = 5.0  # seconds between two looks at the workers while nothing arrives


def here(sweep: Sweep, tasks: Sequence[Task]) -> Answers:
    """One task after the other in this process, or on one worker if this process has other settings than workers."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        yield from local(1)(sweep, tasks)
        return
    for task in tasks:
        yield task, measure(sweep, task)


def local(workers: int) -> Executor:
    """`workers` Dask processes on this machine; with several GPUs one for each, at most. Needs the extra `cluster`."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    require("distributed")

    def execute(sweep: Sweep, tasks: Sequence[Task]) -> Answers:
        from distributed import Client, Nanny, Scheduler, SpecCluster

        address = {"protocol": "tcp://", "host": "127.0.0.1", "port": 0, "dashboard": False}
        scheduler = {"cls": Scheduler, "options": address}
        options = {"nthreads": 1, "dashboard": False, "silence_logs": 50}
        environments = enumerate(_worker_environments(workers))
        nannies = {index: {"cls": Nanny, "options": options | {"env": environ}} for index, environ in environments}
        left = dict.fromkeys(tasks)
        for _ in range(1 + RETRIES):  # a nanny gives up if its worker dies while it starts
            with _dask_settings(**_KEEP):
                with _deaf_to_interrupts():
                    cluster = SpecCluster(nannies, scheduler, silence_logs=50)
                with cluster, Client(cluster) as client, suppress(_NoWorkers):
                    for task, result in _through(client, sweep, list(left), PATIENCE):
                        del left[task]
                        yield task, result
                    return
        for task in left:
            yield task, "no worker process stays alive; --resume tries again"

    return execute


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C, which a terminal sends to all: it is for the driver to handle."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _worker_environments(workers: int) -> list[dict[str, str]]:
    """Settings of each worker; where there are several NVIDIA GPUs, found without JAX, each sees one of its own."""
    present = ",".join(str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*")))
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", present).split(",") if device.strip()]
    if len(devices) < 2:
        return [SETTINGS] * workers
    return [SETTINGS | {"CUDA_VISIBLE_DEVICES": device} for device in devices[:workers]]


def remote(address: str) -> Executor:
    """The workers of a running Dask scheduler, such as tcp://host:8786. Needs the extra `cluster`."""
    require("distributed")

    def execute(sweep: Sweep, tasks: Sequence[Task]) -> Answers:
        from distributed import Client

        with _dask_settings():
            try:
                client = Client(address)
            except (OSError, ValueError) as error:
                raise ValueError(f"no Dask scheduler answers at {address}: {error}") from None
            with client:
                yield from _through(client, sweep, tasks)

    return execute


def slurm(jobs: int) -> Executor:
    """`jobs` Slurm jobs of one core each, through dask-jobqueue (extra `cluster`).

    Queue, account, memory and walltime come from Dask's settings: `jobqueue.yaml`, or variables of the environment like
    DASK_JOBQUEUE__SLURM__QUEUE.
    """
    if jobs < 1:
        raise ValueError(f"--slurm needs --workers, the number of jobs; got {jobs}")
    require("dask_jobqueue")

    def execute(sweep: Sweep, tasks: Sequence[Task]) -> Answers:
        import dask.config
        from dask_jobqueue import SLURMCluster
        from distributed import Client

        # Python's -m, by which jobs start, would put the current directory in front of our packages
        exports = [f"export {name}={value}" for name, value in (SETTINGS | {"PYTHONSAFEPATH": "1"}).items()]
        prologue = [*(dask.config.get("jobqueue.slurm.job-script-prologue", None) or []), *exports]
        memory = dask.config.get("jobqueue.slurm.memory", None) or "4GB"
        options = {"cores": 1, "processes": 1, "memory": memory, "job_script_prologue": prologue}
        options["scheduler_options"] = {"dashboard": False}
        with _dask_settings(), SLURMCluster(**options) as cluster, Client(cluster) as client:
            cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # unlike `scale`, replaces jobs that end
            yield from _through(client, sweep, tasks)

    return execute


class _NoWorkers(OSError):
    """A cluster has been without any worker for too long."""


def _through(client: "Client", sweep: Sweep, tasks: Sequence[Task], patience: float = math.inf) -> Answers:
    """Tasks through a Dask client, a few more at a time than there are workers.

    Raises `_NoWorkers` after `patience` seconds without any; OSError if the scheduler is gone.
    """
    from distributed import CancelledError, Future, wait
    from distributed.comm import CommClosedError
    from distributed.protocol.pickle import dumps
    from distributed.scheduler import KilledWorker

    module = getattr(sweep.experiment.measure, "__module__", "")
    file = sys.modules[module].__file__ if "/" in module else None  # a user's own, loaded by its path
    content = dumps(sweep)
    waiting, seen = iter(tasks), monotonic()
    running: dict[Future, Task] = {}
    try:
        while True:
            threads = sum(client.nthreads().values())
            seen = monotonic() if threads else seen
            if monotonic() - seen > patience:
                raise _NoWorkers("no worker process stays alive; --resume tries again")
            for _, task in zip(range(2 * threads + 2 - len(running)), waiting):
                running[client.submit(_measure, file, content, task, pure=False)] = task
            if not running:
                return
            try:
                done = wait(list(running), timeout=TICK, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                continue
            for future in done:
                try:
                    result = future.result(timeout=TICK)
                except TimeoutError:
                    continue  # its worker died before it was fetched: it is being computed again
                except KilledWorker:
                    result = f"its worker died {1 + RETRIES} times (killed, or out of memory); --resume tries again"
                except (CancelledError, CommClosedError):
                    raise
                except Exception as error:  # not the kernel's, which `measure` records
                    raise ValueError(f"a worker cannot run this sweep: {type(error).__name__}: {error}") from None
                yield running.pop(future), result
    except (CancelledError, CommClosedError):
        raise OSError("the Dask scheduler is gone; what was finished is kept, and --resume computes the rest") from None


_KEEP = {"deploy.lost-worker-timeout": "10000 days"}
"""Else a local cluster drops a worker for good that is starting anew 15 seconds after another of its deaths."""


def _measure(file: str | None, content: bytes, task: Task) -> Result:
    """`measure` for a sweep that is unpickled here, so that a worker which cannot says so; else Dask waits forever."""
    from distributed.protocol.pickle import loads

    if file is not None:
        load_file(file)
    return measure(loads(content), task)


@contextmanager
def _dask_settings(**more: Any) -> Iterator[None]:
    """One task at a time on a worker, so that a task that kills it takes no other along; as few reruns as promised.

    Afterwards Dask is as it was, even where a client that could not connect has made itself the default.
    """
    import dask.config

    ours = {"scheduler.allowed-failures": RETRIES, "scheduler.worker-saturation": 1.0, "worker.daemon": True, **more}
    settings = {f"distributed.{name}": value for name, value in ours.items()}
    with dask.config.set({"scheduler": dask.config.get("scheduler", None), **settings}):
        yield


def require(package: str) -> None:
    """Raises ValueError if a package of the extra `cluster` is not installed."""
    if find_spec(package) is None:
        raise ValueError(f"this needs the package {package}: pip install 'linfit[cluster]'")
