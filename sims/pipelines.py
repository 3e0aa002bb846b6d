"""Pipelines measured: weights fine-tuned stage after stage on raw data, beside the prediction (docs, P1)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from linfit import fine_tune
from linfit.covariance import Diagonal
from linfit.design import sample_design
from linfit.internal.checks import Maybe
from sims.estimate import mean_and_error, replicate
from theory.pipelines import Stage, bias_and_variance

__all__ = ["similar_targets", "simulated_risks"]


def similar_targets(similarity: Array | np.ndarray, second_moment: Array | np.ndarray) -> Array:
    """Second moments (T, T, p) of optima with correlations (T, T), E θ*² = second_moment (p,) for each.

    >>> similar_targets(jnp.array([[1.0, 0.5], [0.5, 1.0]]), jnp.array([2.0]))[0, 1]
    Array([1.], dtype=float64)
    """
    return jnp.asarray(similarity)[:, :, None] * jnp.asarray(second_moment)


def simulated_risks(
    key: Array, stages: Sequence[Stage], targets: Array, tests: Maybe = None, *, replicates: int, law: str = "gaussian"
) -> xr.Dataset:
    """Risk of every task after every stage, from raw data: optima, designs and labels sampled, weights fitted.

    Args:
        key: of everything that is sampled.
        stages: one `theory.pipelines.Stage` for each, with whole n.
        targets: second moments (T, T, p); optima are Gaussian with these.
        tests: spectra (T, p), by default those of the first stage on each task.
        replicates: pipelines that are averaged.
        law: of the designs' coordinates, a key of `linfit.design.LAWS`.

    Dimensions (stage, task): `risk` ± `risk_error`, and `predicted` with its parts `bias` and `variance`.

    >>> from linfit import MinNorm
    >>> stages = [Stage(jnp.ones(60), 20, 0.5, MinNorm()), Stage(jnp.ones(60), 30, 0.5, MinNorm(), tau=0.7)]
    >>> targets = similar_targets(jnp.array([[1.0, 0.5], [0.5, 1.0]]), jnp.full(60, 1 / 60))
    >>> data = simulated_risks(jax.random.key(0), stages, targets, replicates=400)
    >>> bool((abs(data.risk / data.predicted - 1) < 0.1).all())
    True
    """
    predicted = bias_and_variance(stages, targets, tests)
    tasks = [k if stage.task is None else stage.task[0] for k, stage in enumerate(stages)]
    if tests is None:
        tests = jnp.stack([stages[tasks.index(task)].spectrum for task in range(len(targets))])
    roots = _roots(jnp.asarray(targets))

    def measure(key: Array) -> Array:
        optima_key, *keys = jax.random.split(key, 1 + len(stages))
        optima = jnp.einsum("pab,bp->ap", roots, jax.random.normal(optima_key, (len(targets), roots.shape[0])))
        history = [jnp.zeros(roots.shape[0])]
        for stage_key, stage, task in zip(keys, stages, tasks, strict=True):
            tuned = _tuned(stage_key, stage, optima[task], history[-1], law)
            source = history[-1] if stage.average_with is None else history[1 + stage.average_with[0]]
            history.append((1 - stage.tau) * source + stage.tau * tuned)
        missed = jnp.stack(history[1:])[:, None] - optima
        return jnp.sum(jnp.asarray(tests) * missed**2, axis=-1)

    samples = replicate(measure, key, replicates, f"pipelines of {len(stages)} stages")
    variables = mean_and_error(samples, ("stage", "task"), "risk")
    parts = {"predicted": predicted.total, "bias": predicted.bias, "variance": predicted.variance}
    variables |= {name: xr.Variable(("stage", "task"), np.asarray(part)) for name, part in parts.items()}
    return xr.Dataset(variables, attrs={"replicates": replicates, "law": law})


def _roots(targets: Array) -> Array:
    """Square roots (p, T, T) of the second moments; a small negative eigenvalue counts as 0."""
    values, vectors = jnp.linalg.eigh(jnp.moveaxis(targets, -1, 0))
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]


def _tuned(key: Array, stage: Stage, optimum: Array, start: Array, law: str) -> Array:
    """Weights fitted to new data of a stage."""
    design_key, noise_key = jax.random.split(key)
    X = sample_design(design_key, Diagonal(stage.spectrum), int(stage.n), law)
    y = X @ optimum + stage.noise_std * jax.random.normal(noise_key, X.shape[:1], X.dtype)
    return fine_tune(X, y, start, stage.filter)
