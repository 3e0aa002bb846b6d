"""Axes of a sweep: what may describe one, and the Sobol design that several of them share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sims.parameters import Parameter

Value = str | float | int | Sequence[Any] | np.ndarray  # a number or word, several, or text for `read_axis`

_HOW = "a number, a list 0.1,0.5,1, a grid low:high:count[:log], or low:high:sobol[:log] for a Sobol design"


class Range(NamedTuple):
    """Where the values of a grid, or of an axis of a Sobol design, lie."""

    low: float
    high: float
    logarithmic: bool
    whole: bool

    def inside(self, positions: np.ndarray) -> np.ndarray:
        """Values at positions in [0, 1]."""
        if self.logarithmic:
            values = self.low * (self.high / self.low) ** positions
        else:
            values = self.low + (self.high - self.low) * positions
        values = np.where(positions == 1, self.high, values)
        return np.rint(values).astype(np.int64) if self.whole else values


def read_axis(name: str, value: Value, parameter: Parameter) -> np.ndarray | Range:
    """The value () or values (k,) of a parameter, or its range in a Sobol design.

    Text is a number, a list "0.1,0.5,1", a grid "0:1:101" with both ends, a logarithmic grid "1e-4:1e2:60:log", or
    "0:1:sobol", "1e-4:1e2:sobol:log". Parameters that are whole numbers round the values of a grid; those that
    coincide are dropped. Raises ValueError for anything else.

    >>> import numpy as np
    >>> from sims.parameters import LAW, N, PENALTY
    >>> read_axis("penalty", "1e-2:1:3:log", PENALTY)
    array([0.01, 0.1 , 1.  ])
    >>> read_axis("n", "100", N), read_axis("law", "gaussian,student", LAW)
    (array(100), array(['gaussian', 'student'], dtype='<U8'))
    """
    if isinstance(value, str):
        if ":" in value and not isinstance(parameter.default, str):
            return _grid(name, value, isinstance(parameter.default, int))
        items = [item.strip() for item in value.split(",")]
        value = items if len(items) > 1 else items[0]
    return _typed(name, value, parameter)


def _grid(name: str, text: str, whole: bool) -> np.ndarray | Range:
    try:
        low, high, count = text.removesuffix(":log").split(":")
        ends = Range(float(low), float(high), text.endswith(":log"), whole)
        size = 0 if count == "sobol" else int(count)
    except ValueError:
        raise ValueError(f"{name} must be {_HOW}; got {text!r}") from None
    if not (math.isfinite(ends.low) and math.isfinite(ends.high)) or (ends.logarithmic and min(ends[:2]) <= 0):
        raise ValueError(f"{name} must have finite ends, positive for a logarithmic grid; got {text!r}")
    if ends.low >= ends.high:
        raise ValueError(f"{name} must run from its lower to its higher end; got {text!r}")
    if count == "sobol":
        return ends
    if size < 2:
        raise ValueError(f"{name} must have at least 2 grid points; got {text!r}")
    return np.unique(ends.inside(np.linspace(0, 1, size)))


def _typed(name: str, value: Any, parameter: Parameter) -> np.ndarray:
    """`value` as an array of the parameter's type, with at most one axis."""
    if isinstance(parameter.default, str):
        array = np.asarray(value)
        if array.dtype.kind != "U" or "" in array:
            raise ValueError(f"{name} must be a word or several, like {parameter.default!r}; got {value!r}")
    else:
        try:
            if isinstance(value, bool):
                raise TypeError
            array = np.asarray(value, dtype=float)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be {_HOW}; got {value!r}") from None
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {value!r}")
    if array.ndim > 1 or array.size == 0:
        raise ValueError(f"{name} must be one value or a list of values, got an array of shape {array.shape}")
    if isinstance(parameter.default, int):
        if (np.rint(array) != array).any():
            raise ValueError(f"{name} must be whole numbers, got {value!r}")
        array = array.astype(np.int64)
    if array.ndim and len(np.unique(array)) < len(array):
        raise ValueError(f"{name} must not have the same value twice, got {value!r}")
    return array


def sobol_points(ranges: Mapping[str, Range], points: int | None, seed: int) -> dict[str, np.ndarray]:
    """Coordinates (points,) of a Sobol design by parameter, scrambled by the seed (scipy.stats.qmc)."""
    if points is None or points < 2 or points & (points - 1):
        raise ValueError(f"points, the size of the Sobol design, must be a power of two, got {points}")
    from scipy.stats import qmc  # a second to load, for designs alone

    unit = qmc.Sobol(len(ranges), scramble=True, rng=seed).random_base2(points.bit_length() - 1)
    return {name: ends.inside(column) for (name, ends), column in zip(ranges.items(), unit.T, strict=True)}
