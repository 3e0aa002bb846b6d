"""Who computes the tasks of a sweep: this process, local worker processes, a Dask cluster, Slurm jobs.

Every executor runs the same function in processes with the same settings, one thread of computation each, so that the
numbers do not depend on the choice: how BLAS and XLA split a product among threads can change its last bits. N workers
use N cores. An executor is a function (sweep, tasks) → pairs (task, result) in the order of arrival; a task that was
given up comes with the reason, a text, instead of a result.
"""

import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from time import monotonic
from typing import TYPE_CHECKING, Any

from sims.experiments import SETTINGS
from sims.sweep import Result, Sweep, Task, measure

if TYPE_CHECKING:
    from distributed import Client

Executor = Callable[[Sweep, Sequence[Task]], Iterator[tuple[Task, Result | str]]]

RERUNS = 3
"""How often a task is tried again after its worker has died."""

PATIENCE = 60.0
"""Seconds without any local worker after which they are started anew."""

TICK = 5.0
"""Seconds between two looks at the workers while nothing arrives."""


@cache
def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    packages = ("linfit", "jax", "jaxlib", "numpy", "scipy")
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "machine": platform.machine()} | {package: version(package) for package in packages}


def environment() -> dict[str, str]:
    """`versions`, `SETTINGS` as they are in this process, and the device that JAX, if it is loaded, computes on."""
    found = versions() | {name: os.environ.get(name, "not set") for name in SETTINGS}
    jax = sys.modules.get("jax")
    return found | {"device": "cpu" if jax is None else jax.devices()[0].device_kind}


# ------------------------------------------------------------------------------------------------------- one machine


def here(sweep: Sweep, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result | str]]:
    """One task after the other in this process, or in one child if this process has other settings than workers."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        yield from in_a_child(sweep, tasks)
        return
    for task in tasks:
        yield task, measure(sweep, task)


def in_a_child(sweep: Sweep, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result | str]]:
    """One task after the other in a process of its own."""
    from multiprocessing import get_context

    def start() -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_quit_with_parent)
        with _environment(SETTINGS):  # the child starts with its first task
            pool.submit(os.getpid).result()
        return pool

    pool = start()
    try:
        for task in tasks:
            for _ in range(1 + RERUNS):
                try:
                    yield task, pool.submit(measure, sweep, task).result()
                    break
                except BrokenProcessPool:
                    pool.shutdown()
                    pool = start()
            else:
                yield task, died(RERUNS)
    finally:
        pool.shutdown(cancel_futures=True)


def _quit_with_parent() -> None:
    """The child ignores Ctrl-C, which is for the parent to handle, and ends with it, even if it was killed."""
    import ctypes

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def died(reruns: int) -> str:
    """What is told of a task whose workers died."""
    return f"its worker died {1 + reruns} times (killed, or out of memory); --resume tries again"


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def local(workers: int) -> Executor:
    """`workers` Dask processes on this machine; with several GPUs one for each, at most. Needs the extra `cluster`."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    require("distributed")

    def execute(sweep: Sweep, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result | str]]:
        from distributed import Client, Nanny, Scheduler, SpecCluster

        options = {"protocol": "tcp://", "host": "127.0.0.1", "port": 0, "dashboard": False}
        nannies = {
            index: {"cls": Nanny, "options": {"nthreads": 1, "dashboard": False, "env": environ, "silence_logs": 50}}
            for index, environ in enumerate(worker_environments(workers, gpus()))
        }
        left = dict.fromkeys(tasks)
        for _ in range(1 + RERUNS):  # a nanny gives up if its worker dies while it starts
            with _dask_settings(**_KEEP):
                with _deaf_to_interrupts():
                    cluster = SpecCluster(nannies, {"cls": Scheduler, "options": options}, silence_logs=50)
                with cluster, Client(cluster) as client, suppress(NoWorkers):
                    for task, result in through(client, sweep, list(left), PATIENCE):
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


def worker_environments(workers: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """Settings of each worker; where there are several GPUs, every worker sees one of its own.

    >>> [worker["CUDA_VISIBLE_DEVICES"] for worker in worker_environments(4, ["0", "1"])]
    ['0', '1']
    """
    if len(devices) < 2:
        return [SETTINGS] * workers
    return [SETTINGS | {"CUDA_VISIBLE_DEVICES": device} for device in devices[:workers]]


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, found without loading JAX."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip()]
    try:
        return [str(index) for index, _ in enumerate(os.listdir("/proc/driver/nvidia/gpus"))]
    except OSError:
        return []


# --------------------------------------------------------------------------------------------------------- a cluster


def remote(address: str) -> Executor:
    """The workers of a running Dask scheduler, such as tcp://host:8786. Needs the extra `cluster`."""
    require("distributed")

    def execute(sweep: Sweep, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result | str]]:
        from distributed import Client

        with _dask_settings():
            try:
                client = Client(address)
            except (OSError, ValueError) as error:
                raise ValueError(f"no Dask scheduler answers at {address}: {error}") from None
            with client:
                yield from through(client, sweep, tasks)

    return execute


def slurm(jobs: int) -> Executor:
    """`jobs` Slurm jobs of one core each, through dask-jobqueue (extra `cluster`).

    Queue, account, memory and walltime come from Dask's settings: `jobqueue.yaml`, or variables of the environment like
    DASK_JOBQUEUE__SLURM__QUEUE.
    """
    if jobs < 1:
        raise ValueError(f"--slurm needs --workers, the number of jobs; got {jobs}")
    require("dask_jobqueue")

    def execute(sweep: Sweep, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result | str]]:
        from distributed import Client

        with _dask_settings(), slurm_cluster() as cluster, Client(cluster) as client:
            cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # unlike `scale`, replaces jobs that end
            yield from through(client, sweep, tasks)

    return execute


def slurm_cluster() -> Any:
    """A Dask cluster of Slurm jobs, none of them submitted yet."""
    import dask.config
    from dask_jobqueue import SLURMCluster

    memory = dask.config.get("jobqueue.slurm.memory", None) or "4GB"
    prologue = dask.config.get("jobqueue.slurm.job-script-prologue", None) or []
    exports = [f"export {name}={value}" for name, value in SETTINGS.items()]
    return SLURMCluster(
        cores=1,
        processes=1,
        memory=memory,
        job_script_prologue=[*prologue, *exports],
        scheduler_options={"dashboard": False},
    )


class NoWorkers(OSError):
    """A cluster has been without any worker for too long."""


def through(
    client: "Client", sweep: Sweep, tasks: Sequence[Task], patience: float = math.inf
) -> Iterator[tuple[Task, Result | str]]:
    """Tasks through a Dask client, a few more at a time than there are workers.

    Raises NoWorkers after `patience` seconds without any; OSError if the scheduler is gone.
    """
    from distributed import CancelledError, Future, wait
    from distributed.comm import CommClosedError
    from distributed.protocol.pickle import dumps
    from distributed.scheduler import KilledWorker

    content = dumps(sweep)
    waiting, seen = iter(tasks), monotonic()
    running: dict[Future, Task] = {}
    try:
        while True:
            threads = sum(client.nthreads().values())
            seen = monotonic() if threads else seen
            if monotonic() - seen > patience:
                raise NoWorkers("no worker process stays alive; --resume tries again")
            for _, task in zip(range(2 * threads + 2 - len(running)), waiting):
                running[client.submit(_measure, content, task, pure=False)] = task
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
                    result = died(RERUNS)
                except (CancelledError, CommClosedError):
                    raise
                except Exception as error:  # not the kernel's, which `measure` records
                    raise ValueError(f"a worker cannot run this sweep: {type(error).__name__}: {error}") from None
                yield running.pop(future), result
    except (CancelledError, CommClosedError):
        raise OSError("the Dask scheduler is gone; what was finished is kept, and --resume computes the rest") from None


_KEEP = {"distributed.deploy.lost-worker-timeout": "10000 days"}
"""Else a local cluster drops a worker for good that is starting anew 15 seconds after another of its deaths."""


def _measure(content: bytes, task: Task) -> Result:
    """`measure` for a sweep that is unpickled here, so that a worker which cannot says so; else Dask waits forever."""
    from distributed.protocol.pickle import loads

    return measure(loads(content), task)


@contextmanager
def _dask_settings(**more: Any) -> Iterator[None]:
    """One task at a time on a worker, so that a task that kills it takes no other along; as few reruns as promised.

    Afterwards Dask is as it was, even where a client that could not connect has made itself the default.
    """
    import dask.config

    with dask.config.set(
        {
            "distributed.scheduler.allowed-failures": RERUNS,
            "distributed.scheduler.worker-saturation": 1.0,
            "distributed.worker.daemon": True,
            "scheduler": dask.config.get("scheduler", None),
            **more,
        }
    ):
        yield


def require(package: str) -> None:
    """Raises ValueError if a package of the extra `cluster` is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f"this needs the package {package}: pip install 'linfit[cluster]'")
