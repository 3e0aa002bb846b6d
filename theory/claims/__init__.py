"""Statements of the theory as data: what is claimed, under which assumptions, and how to hold it against arrays.

A `Claim` declares its assumptions as ranges of named parameters. `sims.verify` draws points from them, hands over
standard normals, and compares the claim's prediction with its measurement; `linfit verify` prints the verdicts. No
random number is drawn here: a claim turns parameters and normals into arrays.

To add claims, write a function `claims() -> tuple[Claim, ...]` in a module of this floor and name it in `SECTIONS`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

SECTIONS = (
    "theory.claims.spectral",
    "theory.claims.overadaptation",
    "theory.claims.equivalents",
    "theory.claims.flow",
    "theory.claims.overtraining",
    "theory.claims.s3ft",
    "theory.claims.frontier",
)
"""Modules that have claims, in the order of the docs."""


class Parameter(NamedTuple):
    """One assumption: the parameter lies in [low, high]; low = high holds it at a value.

    `lowest` and `highest`, where given, are how far a search beyond the assumption walks, to report where the claim
    stops holding.
    """

    low: float
    high: float
    scale: Literal["linear", "log", "whole"] = "linear"
    """How a position in [0, 1] becomes a value; "whole" gives Python ints, for counts and choices."""
    lowest: float | None = None
    highest: float | None = None

    def inside(self, position: float) -> float:
        """The value at a position in [0, 1] of the assumed range.

        >>> Parameter(1.0, 3.0).inside(0.5), Parameter(0, 2, "whole").inside(0.99)
        (2.0, 2)
        """
        if self.scale == "whole":
            return int(min(np.floor(self.low + position * (self.high - self.low + 1)), self.high))
        return _between(self.low, self.high, position, self.scale)

    def beyond(self, distance: float, end: float) -> float:
        """The value at a distance in [0, 1] from the assumed range towards `end`, one of `lowest` and `highest`.

        >>> Parameter(0.0, 0.0, highest=2.0).beyond(0.25, 2.0)
        0.5
        """
        value = _between(self.high if end > self.high else self.low, end, distance, self.scale)
        return round(value) if self.scale == "whole" else value

    @property
    def ends(self) -> tuple[float, ...]:
        """Where walks beyond the assumption lead."""
        return tuple(end for end in (self.lowest, self.highest) if end is not None)


def _between(start: float, stop: float, position: float, scale: str) -> float:
    if scale == "log":
        return float(np.exp((1 - position) * np.log(start) + position * np.log(stop)))
    return float((1 - position) * start + position * stop)


class Normal(Protocol):
    """A source of independent standard normals: `normal(n, p)` is an (n, p) numpy array, new at each call."""

    def __call__(self, *shape: int) -> np.ndarray: ...


Kind = Literal["identity", "inequality", "existence", "statistical", "asymptotic"]


class Claim(NamedTuple):
    """A statement, its assumptions, and two independent ways to the same numbers.

    `instance(normal, **values)` builds whatever both sides need from the values of all parameters; `predict(instance)`
    is the formula and `measure(instance)` goes another way: matrix algebra, refitting, simulation. How the two are
    compared is the kind:

    - identity: max |measured − predicted| ≤ tolerance · max |predicted|, arrays of one shape;
    - inequality: measured − predicted > −tolerance in every entry (of dimensionless numbers);
    - existence: the same, but for some instance instead of all; for what share of them it holds is reported;
    - statistical: the replicates measured (replicates, …) are independent, and measured − predicted has mean 0 in every
      entry; predictions are (…) or paired, (replicates, …);
    - asymptotic: at every size N of `sizes`, the mean of measured − predicted is at most tolerance · N^(−rate) of
      max |predicted|, standard error aside; sequences over sizes of arrays as in "statistical".
    """

    id: str
    statement: str
    """In plain words."""
    formula: str
    """In LaTeX."""
    source: str
    """Which paper states it, or "ours"."""
    kind: Kind
    parameters: dict[str, Parameter]
    """The assumptions."""
    instance: Callable[..., Any]
    predict: Callable[[Any], Any]
    measure: Callable[[Any], Any]
    tolerance: float = 0.0
    rate: float = 1.0
    """Of an asymptotic claim."""
    sizes: tuple[int, ...] = ()
    """Of an asymptotic claim, ascending."""


def all_claims() -> tuple[Claim, ...]:
    """Every claim of every section, in order; ids are unique.

    >>> [claim.id for claim in all_claims()][:3]
    ['S1', 'S2', 'S2.sampled']
    """
    return tuple(claim for section in SECTIONS for claim in import_module(section).claims())
