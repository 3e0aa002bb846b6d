"""Monte Carlo averages, always with their standard error, and replicates that can be shown while they run."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import xarray as xr
from jax import Array
from rich.console import Console

__all__ = ["mean_and_error", "means_and_errors", "progress", "replicate", "standard_error", "standardised_gap"]

Tree = TypeVar("Tree")
Item = TypeVar("Item")

CHUNK = 64


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """`items`, with a progress bar on stderr where someone is watching."""
    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    return rich.progress.track(items, description, total, console=console, transient=True, disable=hidden)


def replicate(measure: Callable[[Array], Tree], key: Array, replicates: int, description: str) -> Tree:
    """measure(key_i) for i = 0 … replicates − 1, stacked in front as numpy arrays.

    Replicate i uses `fold_in(key, i)`: its numbers depend neither on how many others there are nor on their order.
    """
    batched = jax.jit(lambda indices: jax.lax.map(lambda i: measure(jax.random.fold_in(key, i)), indices))
    starts = range(0, replicates, CHUNK)
    chunks = [
        jax.device_get(batched(jnp.arange(start, min(start + CHUNK, replicates))))
        for start in progress(starts, description, len(starts))
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


def standard_error(samples: np.ndarray | Array) -> np.ndarray | Array:
    """Of the mean over the leading axis."""
    return samples.std(axis=0, ddof=1) / len(samples) ** 0.5


def mean_and_error(samples: np.ndarray | Array, dims: tuple[str, ...], name: str) -> dict[str, xr.Variable]:
    """{name: mean, name_error: its standard error} over the leading axis; of `dims` as many as are left."""
    dims = dims[: np.ndim(samples) - 1]
    return {name: xr.Variable(dims, samples.mean(axis=0)), f"{name}_error": xr.Variable(dims, standard_error(samples))}


def means_and_errors(samples: Mapping[str, np.ndarray], dims: tuple[str, ...]) -> dict[str, xr.Variable]:
    """`mean_and_error` of every entry."""
    pairs = [mean_and_error(values, dims, name) for name, values in samples.items()]
    return {name: variable for pair in pairs for name, variable in pair.items()}


def standardised_gap(measured: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Mean of measured − exact over replicates, in its standard errors (not below rounding, 1e-12 of the risk)."""
    difference, rounding = measured - exact, 1e-12 * np.abs(exact).mean(axis=0) + np.finfo(exact.dtype).tiny
    return difference.mean(axis=0) / np.maximum(standard_error(difference), rounding)
