"""Fine-tunings of real networks, each predicted before it is run and then run (docs, G1, G3)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import linfit
from linfit import GradientDescent, Prediction
from linfit.internal.files import whole_file
from sims.laboratory.small_networks import LOSSES, Network, Params, Task, descend, network, pretrain, task

TAUS = np.linspace(0.0, 1.5, 31)
"""Ensemble coefficients at which prediction and reality are compared."""


class Setting(NamedTuple):
    """One fine-tuning. The step size is `rate`/s_max, s_max the largest eigenvalue of K/n."""

    architecture: str
    shift: str
    noise: float
    loss: str
    rate: float
    steps: int
    seed: int


def stopping_steps(steps: int) -> np.ndarray:
    """About 16 step counts, evenly spaced in their logarithm, the last of them `steps`."""
    return np.unique(np.geomspace(1, steps, 16).round().astype(int))


def measured(net: Network, params: Params, data: Task, setting: Setting, step_size: float) -> dict[str, np.ndarray]:
    """Mean losses of the real run: along the steps and, from its end, along τ, on the task and on what was known."""
    saved = jnp.asarray(stopping_steps(setting.steps))
    path = descend(net, params, data.train, setting.loss, step_size, saved)
    end = jax.tree.map(lambda leaf: leaf[-1], path)
    delta = jax.tree.map(jnp.subtract, end, params)

    def on(domain: str, weights: Params) -> Array:
        x, y = getattr(data, domain)
        return LOSSES[setting.loss](net.apply(weights, x), y).mean()

    def moved(tau: Array) -> Params:
        return jax.tree.map(lambda p, d: p + tau * d, params, delta)

    def first_order(domain: str, tau: Array) -> Array:
        x, y = getattr(data, domain)
        here, slope = jax.jvp(lambda weights: net.apply(weights, x), (params,), (delta,))
        return LOSSES[setting.loss](here + tau * slope, y).mean()

    taus = jnp.asarray(TAUS, jnp.float32)
    squares = [sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)) for tree in (delta, params)]
    curves = {"distance": np.sqrt(squares[0]), "relative_distance": np.sqrt(squares[0] / squares[1])}
    for name in ("test", "other"):
        curves[f"{name}_steps"] = jax.lax.map(lambda weights, name=name: on(name, weights), path)
        curves[f"{name}_taus"] = jax.lax.map(lambda tau, name=name: on(name, moved(tau)), taus)
        curves[f"{name}_first_order"] = jax.lax.map(lambda tau, name=name: first_order(name, tau), taus)
    return {name: np.asarray(values, float) for name, values in curves.items()}


def predicted(prediction: Prediction, setting: Setting, step_size: float) -> dict[str, np.ndarray]:
    """The same curves, from the tangent features alone."""
    saved = stopping_steps(setting.steps)
    path, end = GradientDescent(step_size, saved), GradientDescent(step_size, setting.steps)
    curves = {"distance": prediction.distance(end)}
    for name in ("test", "other"):
        curves[f"{name}_steps"] = prediction.losses(path, domain=name).mean(-1)
        curves[f"{name}_taus"] = prediction.losses(end, TAUS, domain=name).mean(-1)
    return {name: np.asarray(values, float) for name, values in curves.items()}
