"""Executors: the same bits from every one of them, and workers that die."""

import importlib
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import Mock

import dask
import numpy as np
import pytest
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.core import Status

from sims.sweep import Watcher, executors, read, run, sweep_over
from sims.sweep.environment import SETTINGS
from tests.sweep_toys import DEADLY, NOISE, numbers, undisturbed

AXES = {"level": [1.0, 2.0, 3.5], "tau": "0:1:5"}
BY_PATH = f"{Path(__file__).with_name('sweep_toys.py')}:NOISE"


@contextmanager
def running(workers, environment=SETTINGS):
    """A Dask cluster of local processes, as someone else would have started it."""
    options = {"nthreads": 1, "dashboard": False, "env": environment, "silence_logs": 50}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard": False}}
    nannies = {index: {"cls": Nanny, "options": options} for index in range(workers)}
    with executors._dask_settings(**executors._KEEP), SpecCluster(nannies, scheduler, silence_logs=50) as found:
        yield found


@pytest.mark.slow
def test_one_worker_and_two_give_the_bits_of_this_process(tmp_path, monkeypatch, like_a_worker):
    """Of an experiment in a file loaded by its path, which the workers have to load too."""
    sweep = sweep_over(BY_PATH, AXES, seeds=7, chunk=2)
    expected = undisturbed(sweep)
    run(sweep, tmp_path / "workers.zarr", executor=executors.local(2))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")  # now this process is not like a worker, and a worker computes
    run(sweep, tmp_path / "worker.zarr")
    assert os.environ["OPENBLAS_NUM_THREADS"] == "2"
    for name in ("workers.zarr", "worker.zarr"):
        assert numbers(tmp_path / name) == expected


@pytest.mark.slow
def test_overadaptation_has_the_same_bits_everywhere(tmp_path):
    """JAX, BLAS and LAPACK at sizes where they would use threads."""
    axes = {"n": 200, "p": 1000, "penalty": "1e-3:1:4:log", "tau": [0.5, 1.0], "noise_std": [0.1, 1.0]}
    run(sweep_over("overadaptation", axes, seeds=4, chunk=1), tmp_path / "workers.zarr", executor=executors.local(2))
    command = [str(Path(sys.executable).with_name("linfit")), "sweep", "overadaptation", "--n", "200", "--penalty"]
    command += ["1e-3:1:4:log", "--tau", "0.5,1", "--noise-std", "0.1,1", "--seeds", "4", "--chunk", "3", "--store"]
    subprocess.run([*command, str(tmp_path / "command.zarr")], check=True, capture_output=True)
    assert numbers(tmp_path / "command.zarr") == numbers(tmp_path / "workers.zarr")


class Killer(Watcher):
    """Kills a worker some time after a given number of tasks."""

    def __init__(self, pids, after, delay):
        self.pids, self.left, self.delay, self.killed = pids, after, delay, set[int]()

    def started(self, *_):
        if self.left == 0:
            threading.Timer(self.delay, self._kill).start()
        self.left -= 1

    finished = started

    def _kill(self):
        if pids := [pid for pid in self.pids() if pid]:
            victim = random.choice(pids)
            os.kill(victim, signal.SIGKILL)
            self.killed.add(victim)


@pytest.mark.slow
def test_killing_workers_loses_nothing(tmp_path, generator, like_a_worker):
    sweep = sweep_over(NOISE, AXES | {"pause": 0.01}, seeds=8, chunk=2)
    expected = undisturbed(sweep)
    with running(2) as workers:
        executor = executors.remote(workers.scheduler_address)

        def pids():
            """Of workers that are up: a nanny whose worker dies while it starts gives up, as is tried elsewhere."""
            return [nanny.pid for nanny in workers.workers.values() if nanny.process.status == Status.running]

        seen = set(pids())
        for round_ in range(20):
            killer = Killer(pids, int(generator.integers(0, 11)), generator.uniform(0, 0.05))
            store = tmp_path / f"{round_}.zarr"
            outcome = run(sweep, store, executor=executor, watcher=killer)
            assert (outcome.tasks, outcome.left, outcome.failures) == (12, 0, [])
            assert numbers(store) == expected
            seen |= set(pids()) | killer.killed
    assert len(seen) >= 12  # the kills did hit: the dead were replaced


@pytest.mark.slow
def test_a_task_that_kills_its_worker_is_given_up_and_the_others_finish(tmp_path):
    """Once and three times again, then it is reported, not recorded: resuming tries again."""
    diary, executor = tmp_path / "diary", executors.local(2)
    axes = {"level": [1.0, 2.0, 3.0, 4.0], "diary": str(diary)}
    outcome = run(sweep_over(DEADLY, axes, seeds=2, chunk=2), tmp_path / "a.zarr", executor=executor)
    assert (outcome.tasks, outcome.left, outcome.failed) == (3, 1, 0)
    assert [failure.where for failure in outcome.failures] == [{"level": 2.0, "replicate": 0}]
    assert "its worker died 4 times" in outcome.failures[0].message
    assert diary.read_text() == "xxxx"
    np.testing.assert_array_equal(read(tmp_path / "a.zarr").status, [[1, 1], [0, 0], [1, 1], [1, 1]])


def test_workers_with_other_settings_are_refused(tmp_path):
    with running(1, SETTINGS | {"NPROC": "4"}) as workers:
        executor = executors.remote(workers.scheduler_address)
        with pytest.raises(ValueError, match=r"NPROC is 4 there, 1 here.*dask worker"):
            run(sweep_over(NOISE, AXES, seeds=2), tmp_path / "a.zarr", executor=executor)


def test_workers_that_lack_an_experiment_are_told_of(tmp_path, monkeypatch):
    with running(1) as workers:
        (tmp_path / "only_here.py").write_text("def measure(key, parameters):\n    return {}\n")
        monkeypatch.syspath_prepend(tmp_path)
        sweep = sweep_over(NOISE._replace(measure=importlib.import_module("only_here").measure), AXES, seeds=2)
        with pytest.raises(ValueError, match=r"a worker cannot run this sweep: ModuleNotFoundError: .*only_here"):
            run(sweep, tmp_path / "a.zarr", executor=executors.remote(workers.scheduler_address))


def test_a_cluster_without_workers_is_not_waited_for(monkeypatch):
    sweep = sweep_over(NOISE, AXES, seeds=2)
    monkeypatch.setattr(executors, "TICK", 0.1)
    with running(0) as workers, Client(workers) as client, pytest.raises(executors._NoWorkers, match="stays alive"):
        list(executors._through(client, sweep, sweep.tasks, patience=0.3))
    monkeypatch.setattr(executors, "_through", Mock(side_effect=executors._NoWorkers))  # that never come up
    monkeypatch.setattr(executors, "RETRIES", 0)
    told = dict(executors.local(1)(sweep, sweep.tasks))
    assert list(told) == sweep.tasks
    assert set(told.values()) == {"no worker process stays alive; --resume tries again"}


def test_bad_executors_are_refused(tmp_path):
    for make, message in ((executors.local, "workers must be at least 1, got 0"), (executors.slurm, "needs --workers")):
        with pytest.raises(ValueError, match=message):
            make(0)
    with pytest.raises(ValueError, match="no Dask scheduler answers at nonsense://1"):
        run(sweep_over(NOISE, AXES, seeds=2), tmp_path / "a.zarr", executor=executors.remote("nonsense://1"))
    assert "scheduler" not in dask.config.config  # Dask is as it was


@pytest.mark.parametrize(
    ("visible", "workers", "seen"),
    [("", 2, [None] * 2), ("0", 3, [None] * 3), ("4,5,6", 2, ["4", "5"]), ("4,5", 3, ["4", "5"])],
)
def test_one_worker_per_gpu(monkeypatch, visible, workers, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = executors._worker_environments(workers)
    assert [worker.pop("CUDA_VISIBLE_DEVICES", None) for worker in map(dict, found)] == seen
    assert all(SETTINGS.items() <= worker.items() for worker in found)


SBATCH = """#!/bin/sh
# A Slurm of one machine: runs the job in the background.
cp "$1" "{folder}/script"
setsid sh "{folder}/script" >"{folder}/log" 2>&1 &
echo $! >> "{folder}/jobs"
echo "Submitted batch job $!"
"""


@pytest.mark.slow
def test_slurm_jobs(tmp_path, monkeypatch, like_a_worker):
    """Against commands of the names that Slurm has, which run the job scripts here."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, content in (("sbatch", SBATCH.format(folder=tmp_path)), ("scancel", '#!/bin/sh\nkill "$1"\n')):
        (commands / name).write_text(content)
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    for name in ("figures.py", "linfit.py", "sims.py", "theory.py"):  # of the user, where the jobs start
        (tmp_path / name).write_text("raise ImportError('in the place of ours')")
    sweep = sweep_over(BY_PATH, AXES, seeds=4, chunk=2)

    class Cancel(Watcher):
        """Ends the first job after its first task, as a time limit would."""

        def finished(self, seconds, failures):
            jobs = (tmp_path / "jobs").read_text().split()
            if len(jobs) == 1:
                with suppress(ProcessLookupError):
                    os.killpg(int(jobs[0]), signal.SIGKILL)

    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1 s"}):
        outcome = run(sweep, tmp_path / "a.zarr", executor=executors.slurm(1), watcher=Cancel())
    assert (outcome.tasks, outcome.left) == (6, 0)
    assert len((tmp_path / "jobs").read_text().split()) == 2  # another one was submitted in its place
    assert numbers(tmp_path / "a.zarr") == undisturbed(sweep)
    script = (tmp_path / "script").read_text()
    assert all(line in script for line in ("#SBATCH", "export OPENBLAS_NUM_THREADS=1", "--nthreads 1")), script
