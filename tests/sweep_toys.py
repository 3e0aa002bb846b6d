"""Cheap experiments for the tests of sweeps, importable by worker processes; none of them loads JAX."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import zarr

from sims.experiments import Experiment, Output, Parameter


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
    "level": Parameter(1.0, "scale of the numbers"),
    "kind": Parameter("plain", "a word"),
    "count": Parameter(3, "a whole number"),
    "pause": Parameter(0.0, "how long a replicate takes", "s"),
    "broken": Parameter(-1.0, "the level at which the kernel raises"),
    "tau": Parameter(1.0, "a batched parameter", batched=True),
    "depth": Parameter(0.5, "another batched parameter, of no influence", batched=True),
}
_OUTPUTS = {
    "risk": Output(("tau",), "a risk", "squared units", "least"),
    "size": Output((), "one number", "units", "largest"),
}

NOISE = Experiment("tests.sweep_toys:NOISE", "Random numbers", measure_noise, _PARAMETERS, _OUTPUTS, "numpy")
DEADLY = Experiment(
    "tests.sweep_toys:DEADLY",
    "Kills its worker",
    measure_deadly,
    {"level": _PARAMETERS["level"], "diary": Parameter("diary", "a file"), "tau": _PARAMETERS["tau"]},
    _OUTPUTS,
    "numpy",
)


def numbers(store):
    """All that a store holds but times and words, as bytes."""
    arrays = zarr.open_group(store, mode="r").arrays()
    found = {name: np.asarray(array[...]) for name, array in arrays if name != "seconds"}
    return {name: values.tobytes() for name, values in found.items() if values.dtype.kind in "iuf"}
