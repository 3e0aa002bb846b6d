"""Fine-tunings of real networks, each predicted before it is run and then run (docs, predictions).

Runs of one architecture, shift, loss and seed share the pretrained network and its kernel; labels, step size and number
of steps are all that differs. Each run's numbers are one JSON file: an interrupted table goes on where it stopped.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import GradientDescent, Prediction, predict
from linfit.internal.files import whole_file
from linfit.tangent.diagnostics import diagnose
from linfit.tangent.jacobian import MEMORY
from linfit.tangent.jacobian import network as split
from sims.laboratory.small_networks import (
    ARCHITECTURES,
    LOSSES,
    SHIFTS,
    Network,
    Params,
    Task,
    descend,
    network,
    pretrain,
    task,
)

__all__ = ["FULL", "QUICK", "Plan", "Setting", "finetune", "run_table", "settings"]

TAUS = np.linspace(0.0, 2.0, 41)
"""Ensemble coefficients at which prediction and reality are compared."""
NOISES = (0.0, 0.2, 0.4)
"""Shares of wrong labels."""
VERSION = 1
"""Of what a row holds: rows of another version are made anew."""


class Setting(NamedTuple):
    """One fine-tuning: `steps` steps of size `rate`/s_max, s_max the largest eigenvalue of K/n."""

    architecture: str
    shift: str
    loss: str
    seed: int
    noise: float
    rate: float
    steps: int


class Plan(NamedTuple):
    """Sizes of a table."""

    architectures: tuple[str, ...]
    shifts: tuple[str, ...]
    runs: tuple[tuple[float, int], ...]  #: (rate, steps) of each run, from lazy to rich.
    pretrain: int  #: digits for pretraining; a transformer reads 20 times as many windows of text.
    train: int
    test: int
    adam_steps: int


FULL = Plan(ARCHITECTURES, SHIFTS, ((0.1, 300), (0.5, 600), (1.5, 1500)), 1000, 100, 200, 1000)
QUICK = Plan(("perceptron",), ("medium",), ((0.1, 200), (1.5, 200)), 600, 40, 100, 300)


def settings(plan: Plan, seeds: Iterable[int] = (0, 1)) -> list[Setting]:
    """Every architecture, shift and loss with each of the plan's runs, noise in turn, so that all of them meet.

    >>> len(settings(FULL)), len(set(settings(FULL)))
    (108, 108)
    """
    found = []
    for seed in seeds:
        for i, architecture in enumerate(plan.architectures):
            for j, shift in enumerate(plan.shifts):
                for k, loss in enumerate(LOSSES):
                    for m, (rate, steps) in enumerate(plan.runs):
                        noise = NOISES[(i + j + k + m + seed) % len(NOISES)]
                        found.append(Setting(architecture, shift, loss, seed, noise, rate, steps))
    return found


def run_table(
    folder: str | Path, wanted: list[Setting], plan: Plan, report: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """The row of every setting: read if the folder has it, else made and written; `report` is told (done, all).

    A row holds the `setting` and numbers: `measured`, `predicted`, `along_run` (the network's first order along the
    step that the run took in the end, which is no prediction), and the `diagnostics` that are known before the run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for _, group in groupby(wanted, key=lambda setting: setting[:4]):
        cell = lru_cache(1)(partial(_pretrained, plan=plan))
        for setting in group:
            path, mark = folder / f"{'-'.join(map(str, setting))}.json", _fingerprint(setting, plan)
            row = _read(path, mark)
            if row is None:
                row = {"fingerprint": mark, "setting": setting._asdict(), **finetune(*cell(setting[:4]), setting, plan)}
                with whole_file(path) as temporary:
                    Path(temporary).write_text(json.dumps(row, indent=1), encoding="utf-8")
            rows.append(row)
            if report is not None:
                report(len(rows), len(wanted))
    return rows


def _fingerprint(setting: Setting, plan: Plan) -> str:
    sizes = plan._replace(architectures=(), shifts=(), runs=())
    return hashlib.sha256(json.dumps([VERSION, setting, sizes]).encode()).hexdigest()


def _read(path: Path, mark: str) -> dict[str, Any] | None:
    """The row in a file; None if there is none, or one of something else."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and row.get("fingerprint") == mark else None


def _task(setting: Setting, plan: Plan) -> Task:
    many = plan.pretrain * (20 if setting.architecture == "transformer" else 1)
    sizes = {"pretrain": many, "train": plan.train, "test": plan.test}
    return task(setting.architecture, setting.shift, setting.noise, setting.seed, **sizes)


@lru_cache(1)
def _weights(architecture: str, loss: str, seed: int, plan: Plan) -> Params:
    """Pretrained weights, the same for every shift."""
    data = _task(Setting(architecture, "weak", loss, seed, 0.0, 0.0, 0), plan)
    return pretrain(network(architecture), data.pretrain, loss, plan.adam_steps, seed)


def _pretrained(cell: tuple[str, str, str, int], plan: Plan) -> tuple[Params, Prediction]:
    """A pretrained network, and the prediction for its fine-tuning on labels without noise."""
    architecture, _, loss, seed = cell
    params = _weights(architecture, loss, seed, plan)
    data = _task(Setting(*cell, 0.0, 0.0, 0), plan)
    apply = network(architecture).apply
    return params, predict(apply, params, data.train, data.test, data.other, loss=loss)  # type: ignore[arg-type]


def finetune(
    params: Params, prediction: Prediction, setting: Setting, plan: Plan
) -> dict[str, dict[str, float | None]]:
    """Predict one fine-tuning, run it, and compare: numbers by the names of `run_table`."""
    net, data = network(setting.architecture), _task(setting, plan)
    prediction = _relabelled(prediction, data.train[1])
    step_size = setting.rate / float(prediction.eigenvalues.max())
    saved = np.unique(np.geomspace(1, setting.steps, 32).round().astype(int))
    inputs = {"train": data.train[0], "test": data.test[0], "other": data.other[0]}
    end = GradientDescent(step_size, setting.steps)
    known = diagnose(prediction, split(net.apply, params), inputs, end, MEMORY)
    path = descend(net, params, data.train, setting.loss, jnp.float32(step_size), jnp.asarray(saved))
    real = {name: np.asarray(curve) for name, curve in _measured(net, params, path, data, setting.loss).items()}
    ours = {name: np.asarray(curve) for name, curve in _predicted(prediction, step_size, saved).items()}
    first = {"test_taus": real.pop("test_first_order"), "other_taus": real.pop("other_first_order")}
    numbers: dict[str, dict[str, Any]] = {
        "measured": _numbers(real, saved),
        "predicted": _numbers(ours, saved),
        "along_run": _numbers(first, saved),
        "diagnostics": known | {"s_max_step": setting.rate},
    }
    taken = np.interp(numbers["predicted"]["best_tau"], TAUS, real["test_taus"])
    numbers["measured"]["loss_at_predicted_tau"] = taken
    return {name: {key: _finite(value) for key, value in part.items()} for name, part in numbers.items()}


def _finite(value: Any) -> float | None:
    """As JSON can hold it."""
    return float(value) if np.isfinite(value) else None


def _relabelled(prediction: Prediction, labels: Array) -> Prediction:
    """The same kernel with other training labels."""
    coefficients = jnp.einsum("nkq,nk->q", prediction.vectors, labels - prediction.train.outputs)
    if prediction.loss == "entropy":
        missing = labels - jax.nn.softmax(prediction.train.outputs)
        coefficients = jnp.einsum("nkq,nk->q", prediction.vectors, missing)
    train = dataclasses.replace(prediction.train, labels=labels)
    return dataclasses.replace(prediction, train=train, coefficients=coefficients)


@partial(jax.jit, static_argnames=("net", "loss"))
def _measured(net: Network, params: Params, path: Params, data: Task, loss: str) -> dict[str, Array]:
    """Mean losses of the real run: along its steps and, from its end, along τ; and of the first order along τ."""
    delta = jax.tree.map(lambda leaf, start: leaf[-1] - start, path, params)
    taus = jnp.asarray(TAUS, jnp.float32)
    curves: dict[str, Array] = {}
    for name in ("test", "other"):
        x, y = getattr(data, name)

        def moved(tau: Array, x: Array = x) -> Array:
            return net.apply(jax.tree.map(lambda p, d: p + tau * d, params, delta), x)

        here, slope = jax.jvp(moved, (jnp.float32(0),), (jnp.float32(1),))
        curves[f"{name}_taus"] = jax.lax.map(lambda tau, y=y, moved=moved: LOSSES[loss](moved(tau), y).mean(), taus)
        curves[f"{name}_first_order"] = LOSSES[loss](here + taus[:, None, None] * slope, y).mean(-1)
        curves[f"{name}_steps"] = jax.lax.map(
            lambda weights, x=x, y=y: LOSSES[loss](net.apply(weights, x), y).mean(), path
        )
    return curves


def _predicted(prediction: Prediction, step_size: float, saved: np.ndarray) -> dict[str, Array]:
    """The same curves, from the tangent features alone."""
    alpha = prediction.coordinates(GradientDescent(step_size, saved))
    curves = {}
    for name in ("test", "other"):
        where = prediction.domain(name)
        for kind, at in (("steps", alpha), ("taus", jnp.asarray(TAUS)[:, None] * alpha[-1])):
            curves[f"{name}_{kind}"] = LOSSES[prediction.loss](where.outputs + where.moved(at), where.labels).mean(-1)
    return curves


def _numbers(curves: dict[str, np.ndarray], saved: np.ndarray) -> dict[str, float]:
    """What a run comes down to: best τ, losses, forgetting, and the step at which the task loss is least."""
    task, other = curves["test_taus"], curves["other_taus"]
    at_1 = int(np.searchsorted(TAUS, 1.0))
    best_tau, best_loss = _least(TAUS, task)
    numbers = {
        "best_tau": best_tau,
        "best_loss": best_loss,
        "loss_at_0": task[0],
        "loss_at_1": task[at_1],
        "other_loss_at_0": other[0],
        "forgetting": other[at_1] - other[0],
    }
    if "test_steps" in curves:
        log_steps, least = _least(np.log(saved), curves["test_steps"])
        numbers |= {"best_steps": np.exp(log_steps), "stopped_loss": least}
    return numbers


def _least(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Where a curve on a grid is least, and how low: the vertex of the parabola through the three lowest neighbours."""
    y = np.where(np.isfinite(y), y, np.inf)
    i = int(np.argmin(y))
    if i in (0, len(x) - 1) or not np.isfinite(y[i - 1 : i + 2]).all():
        return float(x[i]), float(y[i])
    a, b, c = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    if a <= 0:
        return float(x[i]), float(y[i])
    return float(x[i] - b / (2 * a)), float(c - b**2 / (4 * a))
