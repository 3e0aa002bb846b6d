"""One-dimensional minimisation over a positive hyperparameter: λ, t, T, on a logarithmic scale."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optimistix
from jax import Array
from jax.typing import ArrayLike

__all__ = ["minimise_over_logarithm"]

GRID = 64


class Minimum(NamedTuple):
    """Where a function of one positive hyperparameter is smallest."""

    argument: Array
    value: Array


def minimise_over_logarithm(function: Callable[[Array], Array], lower: ArrayLike, upper: ArrayLike) -> Minimum:
    """The minimum of f over [lower, upper], 0 < lower < upper: bracketed on a grid in log x, refined by golden section.

    f takes and returns (m,) values. The grid of 64 only picks the valley, in case there are several; the golden section
    finds its bottom to a relative 1e-6. At an end of the range the end is returned. Works under `jit` and `vmap`.

    >>> minimum = minimise_over_logarithm(lambda x: (jnp.log(x) - 1) ** 2, 1e-3, 1e3)
    >>> round(float(minimum.argument), 5)
    2.71828
    """
    grid = jnp.linspace(jnp.log(lower), jnp.log(upper), GRID)
    values = function(jnp.exp(grid))
    best = jnp.argmin(values)
    left, right = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, GRID - 1)]

    # GoldenSearch places its first point as if the interval began at 0, so it is given the position within the bracket.
    def along(position: Array, _: None) -> Array:
        return function(jnp.exp(left + position * (right - left))[None])[0]

    solver: optimistix.AbstractMinimiser = optimistix.GoldenSearch(rtol=0, atol=1e-6)  # type: ignore[call-arg]
    middle, ends = jnp.asarray(0.5, grid.dtype), {"lower": 0.0, "upper": 1.0}
    position = optimistix.minimise(along, solver, middle, options=ends, max_steps=64, throw=False).value
    refined = along(position, None)
    better = refined < values[best]
    argument = jnp.exp(jnp.where(better, left + position * (right - left), grid[best]))
    return Minimum(argument, jnp.where(better, refined, values[best]))
