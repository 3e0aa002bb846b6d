"""Cheap experiments for the tests of sweeps, importable by worker processes; none of them loads JAX."""

import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from sims.parameters import Parameter
from sims.sweep import Experiment, Output, run
from sims.sweep.environment import SETTINGS


@pytest.fixture
def like_a_worker(monkeypatch):
    """The settings under which tasks are computed in this process."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


def measure_noise(key, parameters):
    """Sums of random numbers whose last bits would show any change of order, key or shape; takes `pause` seconds."""
    time.sleep(parameters["pause"])
    if parameters["level"] == parameters["broken"]:
        raise ValueError(f"level {parameters['level']} is broken")
    draws = np.random.default_rng(key).standard_normal((50, 50))
    tau = np.asarray(parameters["tau"])
    values = np.linalg.eigvalsh(draws @ draws.T) * parameters["level"]
    return {"risk": (tau[:, None] * values).sum(axis=1) - tau, "size": np.sqrt(values.sum())}


def measure_deadly(key, parameters):
    """Kills its own process where `level` is 2, noting each time in the file `diary`."""
    if parameters["level"] == 2:
        with Path(parameters["diary"]).open("a") as diary:
            diary.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return {"risk": np.asarray(parameters["tau"]), "size": np.float64(1)}


_PARAMETERS = {
    "level": Parameter("scale of the numbers", 1.0),
    "kind": Parameter("a word", "plain"),
    "count": Parameter("a whole number", 3),
    "pause": Parameter("how long a replicate takes", 0.0, unit="s"),
    "broken": Parameter("the level at which the kernel raises", -1.0),
    "tau": Parameter("a batched parameter", 1.0, batched=True),
    "depth": Parameter("another batched parameter, of no influence", 0.5, batched=True),
}
_OUTPUTS = {
    "risk": Output(("tau",), "a risk", "squared units", "least"),
    "size": Output((), "one number", "units", "largest"),
}

NOISE = Experiment("tests.sweep_toys:NOISE", "Random numbers", measure_noise, _PARAMETERS, _OUTPUTS, "numpy")
_DEADLY = {"level": _PARAMETERS["level"], "diary": Parameter("a file", "diary"), "tau": _PARAMETERS["tau"]}
DEADLY = Experiment("tests.sweep_toys:DEADLY", "Kills its worker", measure_deadly, _DEADLY, _OUTPUTS, "numpy")


def numbers(store):
    """All that a store holds but times and words, as bytes."""
    arrays = zarr.open_group(store, mode="r").arrays()
    found = {name: np.asarray(array[...]) for name, array in arrays if name != "seconds"}
    return {name: values.tobytes() for name, values in found.items() if values.dtype.kind in "iuf"}


def undisturbed(sweep):
    """The numbers of a sweep that is run to its end in this process."""
    with tempfile.TemporaryDirectory() as folder:
        run(sweep, f"{folder}/a.zarr")
        return numbers(f"{folder}/a.zarr")
