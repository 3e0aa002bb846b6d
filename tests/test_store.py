"""The store: what any xarray finds in it, and that neither kills, nor full disks, nor second writers spoil it."""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import xarray as xr
import zarr

from sims.sweep import read, run, sweep_over
from sims.sweep import store as stores
from sims.sweep.executors import local
from sims.sweep.store import create, export, opened, read_attributes, read_sweep
from sims.sweep.task import measure
from tests.sweep_toys import NOISE, numbers, undisturbed

ROOT = Path(__file__).parents[1]
AXES = {"level": [1.0, 2.0, 3.5], "kind": ["plain", "other"], "tau": "0:1:5"}
pytestmark = pytest.mark.usefixtures("like_a_worker")


@pytest.fixture
def sweep():
    return sweep_over(NOISE, AXES, seeds=5, seed=7, chunk=2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "a.zarr"


def interrupt(sweep, path, count):
    """A run that is stopped after so many tasks."""

    def execute(sweep, tasks):
        for task in tasks[:count]:
            yield task, measure(sweep, task)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sweep, path, resume=True, executor=execute)


@pytest.mark.filterwarnings("error")
def test_any_xarray_opens_it(sweep, path):
    run(sweep, path)
    data = xr.open_zarr(path)
    assert data.risk.dims == ("level", "kind", "tau")
    assert data.risk_samples.dims == ("level", "kind", "replicate", "tau")
    np.testing.assert_array_equal(data.level, [1.0, 2.0, 3.5])
    np.testing.assert_array_equal(data.kind, ["plain", "other"])
    assert float(data.sel(level=2.0, kind="other", tau=0.25).risk) > 0
    assert (data.coords["count"], data.coords["depth"]) == (3, 0.5)  # what was held is there too
    assert data.risk.units == data.risk_error.units == "squared units"
    assert data.risk_error.long_name == "standard error of risk"
    assert data.pause.units == data.seconds.units == "s"
    assert json.loads(data.configuration) == sweep.configuration
    assert json.loads(data.versions)["numpy"] == np.__version__
    assert (data.seed, data.device, data.experiment, data.revision) == (7, "cpu", NOISE.name, stores.revision())
    assert 0 < data.wall_time < 100
    assert read_sweep(path).configuration == sweep.configuration


def test_sobol_designs_are_labelled(path):
    sweep = sweep_over(NOISE, {"level": "1:2:sobol", "tau": "0:1:sobol", "depth": [0.0, 1.0]}, seeds=2, points=4)
    run(sweep, path)
    data = xr.open_zarr(path)
    assert data.risk.dims == ("point",)
    for name in ("level", "tau"):
        assert data.coords[name].dims == ("point",)
        np.testing.assert_array_equal(data[name], sweep.parameters[name])
    expected = NOISE.measure(np.random.SeedSequence([0, 1]), sweep.arguments((3,)))
    np.testing.assert_array_equal(data.risk_samples[3, 1], expected["risk"][0])


def test_a_sweep_without_axes(path, tmp_path):
    run(sweep_over(NOISE, seeds=1), path)
    data = xr.open_zarr(path)
    assert (data.risk.dims, np.isfinite(data.risk)) == ((), True)
    assert np.isnan(data.risk_error)  # of one replicate
    export(path, tmp_path / "a.csv")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2


def test_an_axis_that_no_output_varies_along_repeats_in_csv(path, tmp_path):
    run(sweep_over(NOISE, {"depth": [0.1, 0.2, 0.3]}, seeds=1), path)
    export(path, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["depth"] for row in rows] == ["0.1", "0.2", "0.3"]
    assert len({row["risk"] for row in rows}) == 1


def test_export(sweep, path, tmp_path):
    run(sweep, path)
    data = read(path)
    export(path, tmp_path / "a.nc")
    with xr.open_dataset(tmp_path / "a.nc", engine="scipy") as copy:
        for name in ("risk", "risk_error", "risk_samples", "size", "status", "level"):
            np.testing.assert_array_equal(copy[name], data[name])
        assert copy.risk.units == "squared units"
        assert json.loads(copy.attrs["configuration"]) == sweep.configuration
        assert list(copy.kind.values) == ["plain", "other"]
    export(path, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert list(rows[0]) == [*NOISE.parameters, "risk", "risk_error", "size", "size_error"]
    assert len(rows) == 3 * 2 * 5
    for row in rows:
        point = data.sel(level=float(row["level"]), kind=row["kind"], tau=float(row["tau"]))
        assert float(row["risk"]) == point.risk
        assert float(row["size_error"]) == point.size_error
    for out, message in ((tmp_path / "a.txt", "end in .nc or .csv"), (tmp_path / "no" / "a.nc", "no folder")):
        with pytest.raises(ValueError, match=message):
            export(path, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.csv", "a.nc", "runs"]


def test_resuming_does_exactly_what_is_missing(sweep, path):
    interrupt(sweep, path, 7)
    data = xr.open_zarr(path)
    assert int((data.status == 1).sum()) == 2 * 5 + 2  # two cells of three tasks, and one task of two
    np.testing.assert_array_equal(data.replicates, [[5, 5], [0, 0], [0, 0]])  # finished cells have their means
    np.testing.assert_array_equal(np.isnan(data.risk).all("tau"), data.replicates == 0)
    assert run(sweep, path, resume=True).tasks == 18 - 7
    assert numbers(path) == undisturbed(sweep)
    assert run(sweep, path, resume=True).tasks == 0
    assert read_attributes(path)["wall_time"] > 0


def test_means_that_a_kill_prevented_are_made_up_for(sweep, path):
    with patch.object(stores.Store, "_summarise", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run(sweep, path)
    assert (read(path).replicates == 0).all()
    run(sweep, path, resume=True)
    assert numbers(path) == undisturbed(sweep)


def test_another_configuration_or_version_is_refused_with_the_difference(sweep, path, monkeypatch):
    run(sweep, path)
    before = numbers(path)
    with pytest.raises(ValueError, match="exists; --resume"):
        run(sweep, path)
    for change, message in (
        ({"seeds": 6}, "seeds: the store has 5, asked for is 6"),
        ({"axes": AXES | {"count": 4}}, "count: the store has 3, asked for is 4"),
        ({"axes": AXES | {"tau": "0:1:6"}}, "has 5 values 0.0, 0.25 … 1.0, asked for is 6 values 0.0, 0.2 … 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(sweep_over(NOISE, **{"axes": AXES, "seeds": 5, "seed": 7, "chunk": 2} | change), path, resume=True)
    versions = stores.versions()
    monkeypatch.setattr(stores, "versions", lambda: versions | {"numpy": "9.9"})
    with pytest.raises(ValueError, match=f'numpy: the store has "{np.__version__}", asked for is "9.9"'):
        run(sweep, path, resume=True)
    monkeypatch.setattr(stores, "FORMAT", 2)
    with pytest.raises(ValueError, match="has format 1, this version reads 2"):
        run(sweep, path, resume=True)
    assert numbers(path) == before


def test_numbers_from_elsewhere_are_refused(sweep, path):
    def elsewhere(change):
        def execute(sweep, tasks):
            result = measure(sweep, tasks[0])
            yield tasks[0], result._replace(environment=result.environment | change)

        return execute

    for change, message in (
        ({"OPENBLAS_NUM_THREADS": "8"}, "OPENBLAS_NUM_THREADS is 8 there, 1 here.*dask worker"),
        ({"jax": "0.0.1"}, "jax is 0.0.1 there"),
    ):
        with pytest.raises(ValueError, match=message):
            run(sweep, path, resume=True, executor=elsewhere(change))
    assert (read(path).status == 0).all()
    interrupt(sweep, path, 1)
    with pytest.raises(ValueError, match="device is NVIDIA H100 there, cpu here"):
        run(sweep, path, resume=True, executor=elsewhere({"device": "NVIDIA H100"}))


@pytest.mark.parametrize("make", [None, Path.mkdir, Path.touch, zarr.create_group])
def test_what_is_no_store_is_refused(sweep, path, make):
    path.parent.mkdir()
    if make:
        make(path)
    for action in (read, read_sweep, lambda path: opened(path, sweep).__enter__()):
        with pytest.raises(ValueError, match="is not a store made by linfit sweep"):
            action(path)


def test_drafts_and_leftovers_vanish(sweep, path):
    run(sweep, path)
    leftover = path / "risk" / "c.0.0.123.partial"
    leftover.write_text("half")
    run(sweep, path, resume=True)
    assert not leftover.exists()
    full, told = OSError(28, "No space left on device"), r"cannot write to .*b\.zarr: No space left on device"
    with patch.object(stores, "_lay_out", side_effect=full), pytest.raises(OSError, match=told):
        create(path.parent / "b.zarr", sweep)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.zarr"]


def drive(sweep, path, workers):
    run(sweep, path, resume=True, executor=local(workers) if workers else None)


def driver(sweep, path, workers=0):
    """Another process that runs the sweep, of a clean parent that has the modules loaded."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["sims.sweep.driver", "tests.sweep_toys"])
    process = context.Process(target=drive, args=(sweep, path, workers))
    process.start()
    return process


def finished_tasks(path):
    """Tasks that are marked in the store as done."""
    return len(list((path / "status").glob("c.*"))) if path.exists() else 0


def wait_for(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + 300, "waited in vain"
        time.sleep(0.001)


def kill_at(process, path, count, delay):
    """SIGKILL once so many tasks are done and a little later, wherever it is by then."""
    wait_for(lambda: finished_tasks(path) >= count or not process.is_alive())
    time.sleep(delay)
    process.kill()
    process.join()


@pytest.mark.slow
def test_killing_the_driver_loses_nothing(tmp_path, generator):
    sweep = sweep_over(NOISE, AXES, seeds=4, chunk=2)
    expected, left = undisturbed(sweep), []
    for round_ in range(20):
        store = tmp_path / f"{round_}.zarr"
        kill_at(driver(sweep, store), store, generator.integers(0, 11), generator.uniform(0, 0.03))
        if store.exists():  # otherwise it was killed before there was anything to keep
            for array in ("risk_samples", "size_samples"):
                samples = read(store)[array]
                assert not np.isnan(samples.where(read(store).status == 1, 0)).any()  # what is marked as done is there
        left.append(run(sweep, store, resume=True).tasks)
        assert numbers(store) == expected
    assert sum(0 < count < 12 for count in left) >= 10  # the kills did hit


@pytest.mark.slow
def test_a_driver_with_workers_killed_leaves_a_store_to_resume(path):
    sweep = sweep_over(NOISE, AXES | {"pause": 0.05}, seeds=4, chunk=1)
    kill_at(driver(sweep, path, workers=2), path, count=5, delay=0.02)
    assert 0 < run(sweep, path, resume=True).tasks < 24
    assert numbers(path) == undisturbed(sweep)


def test_a_second_driver_is_refused_while_the_first_lives(path):
    sweep = sweep_over(NOISE, AXES | {"pause": 0.2}, seeds=5)
    first = driver(sweep, path)
    try:
        wait_for(lambda: finished_tasks(path) >= 1)
        with pytest.raises(ValueError, match="is in use: another sweep is writing to it"):
            run(sweep, path, resume=True)
        assert first.is_alive()
        xr.open_zarr(path).risk.load()  # readers are welcome
    finally:
        first.kill()
        first.join()
    with opened(path, sweep):  # the lock died with its owner
        pass


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_interrupting_leaves_a_store_to_resume(path, workers):
    sweep = sweep_over(NOISE, {"level": [1, 2, 3.5], "tau": "0:1:5", "pause": 0.05}, seeds=4, chunk=1)
    create(path, sweep)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [Path(sys.executable).with_name("linfit"), "sweep", "resume", path, "--workers", workers]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    wait_for(lambda: finished_tasks(path) >= 3 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False)
    assert errors.endswith("linfit: interrupted\n")
    assert 0 < run(sweep, path, resume=True).tasks < 10
    assert numbers(path) == undisturbed(sweep)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["linfit", *sys.argv[2:]]
from figures.commands import main
main()
"""


def test_a_full_disk_is_told_and_spoils_nothing(path, tmp_path):
    """A limit on the size of files is the full disk that needs no privileges."""
    sweep = sweep_over(NOISE, {"level": [1.0, 2.0], "tau": "0:1:2000"}, seeds=4, chunk=2)

    def limited(size, *arguments):
        command = [sys.executable, "-c", LIMITED, str(size), "sweep", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

    interrupt(sweep, path, 1)
    before = numbers(path)
    answer = limited(15_000, "resume", path)
    assert (answer.returncode, "Traceback" in answer.stderr) == (2, False)
    told = f"cannot write to {path}: File too large; what was finished is kept, and --resume computes the rest"
    assert answer.stderr.splitlines()[-1] == f"linfit: error: {told}"
    assert numbers(path) == before
    assert not list(path.glob("**/*.partial"))
    assert run(sweep, path, resume=True).tasks == 3
    assert numbers(path) == undisturbed(sweep)
    answer = limited(100, "overadaptation", "--store", tmp_path / "new.zarr")
    assert answer.returncode == 2
    assert f"cannot write to {tmp_path / 'new.zarr'}: File too large" in answer.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["runs"]


def test_a_read_only_store(sweep):
    """Told by one line, and still read. As root, who may write anything, it is tried as another user."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name) / "a.zarr"
        interrupt(sweep, path, 3)
        before = numbers(path)
        for entry in (*path.glob("**/*"), path, path.parent):
            entry.chmod(0o555 if entry.is_dir() else 0o444)
        try:
            if os.getuid() == 0:
                os.seteuid(65534)
            for where in (path, path.with_name("b.zarr")):
                with pytest.raises(OSError, match=f"cannot write to {where}: Permission denied"):
                    run(sweep, where, resume=True)
            assert numbers(path) == before
        finally:
            os.seteuid(os.getuid())
