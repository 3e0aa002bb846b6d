"""The tables of a page, {table: {column: (rows,) array}}: how kernels make them, and what several pages put in."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import Pair, Parabola

Table = dict[str, Any]
"""Columns (rows,) by name: numpy arrays; inside a kernel, traced ones too."""
Tables = dict[str, Table]


def kernel(function: Callable[..., Tables], static: tuple[int, ...] = ()) -> Callable[..., Tables]:
    """The function compiled; its tables as numpy arrays, in the order it gives them."""

    @partial(jax.jit, static_argnums=static)
    @wraps(function)
    def ordered(*arguments: Any) -> Tables:  # JAX sorts the names of a plain dict
        return OrderedDict((name, OrderedDict(table)) for name, table in function(*arguments).items())

    return wraps(function)(lambda *arguments: jax.device_get(ordered(*arguments)))


def risks_at(tau: float | Array | np.ndarray, parabolas: Pair[Parabola]) -> Table:
    """Both risks at τ, as columns."""
    return {domain: jnp.ravel(parabola(tau).total) for domain, parabola in parabolas._asdict().items()}


def grid(penalties: np.ndarray, taus: np.ndarray) -> Table:
    """The columns of a map over λ and τ, row by row in τ."""
    return {"penalty": np.tile(penalties, taus.size), "tau": np.repeat(taus, penalties.size)}


def least(table: Table, column: str) -> Table:
    """The row of a table where the column is least; also of traced numbers."""
    row = jnp.argmin(table[column])
    return {name: jnp.take(values, row)[None] for name, values in table.items()}


def average(samples: list[Table], axes: tuple[str, ...]) -> Table:
    """Mean and standard error (column, column_error) over replicates; columns in `axes` as they are.

    >>> import numpy as np
    >>> from figures.explorer.tables import average
    >>> average([{"x": np.array([1.0]), "y": np.array([1.0])}, {"x": np.array([1.0]), "y": np.array([3.0])}], ("x",))
    {'x': array([1.]), 'y': array([2.]), 'y_error': array([1.])}
    """
    table = {name: samples[0][name] for name in axes}
    for name in [name for name in samples[0] if name not in axes]:
        values = np.stack([sample[name] for sample in samples])
        table |= {name: values.mean(axis=0), f"{name}_error": values.std(axis=0, ddof=1) / len(samples) ** 0.5}
    return table
