"""Statements of the theory as functions: each computes what is predicted, and the same by another way.

A claim is one function `(normal, **values) → (predicted, measured)` under the decorator `claim` (or its short form for
one kind, such as `identity`), which carries the statement, its formula, its source and its assumptions, the ranges of
the values. `sims.verify` samples values from them, hands over standard normals and compares the two sides.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from sims.parameters import Parameter

__all__ = ["Claim", "all_claims", "claim"]

SECTIONS = ("spectral", "overadaptation", "equivalents", "flow", "overtraining", "s3ft", "frontier", "tangent")
"""Modules that have claims, in the order of the docs."""


class Normal(Protocol):
    """A source of independent standard normals: `normal(n, p)` is an (n, p) numpy array, new at each call."""

    def __call__(self, *shape: int) -> np.ndarray: ...


Sides = tuple[Any, Any]
"""(predicted, measured)."""

Kind = Literal["identity", "inequality", "existence", "statistical", "asymptotic"]


class Claim(NamedTuple):
    """A statement, its assumptions, and two independent ways to the same numbers.

    `sides(normal, **values)` returns what is predicted and what is measured. How they are compared is the kind:

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
    formula: str
    """In LaTeX."""
    source: str
    """Which paper states it, or "ours"."""
    kind: Kind
    parameters: dict[str, Parameter]
    sides: Callable[..., Sides]
    tolerance: float = 0.0
    rate: float = 1.0
    sizes: tuple[int, ...] = ()
    """Of an asymptotic claim, ascending."""


def claim(
    id: str,
    statement: str,
    formula: str,
    *,
    source: str = "ours",
    kind: Kind,
    parameters: dict[str, Parameter],
    **comparison: Any,
) -> Callable[[Callable[..., Sides]], Claim]:
    """A decorator that makes a `Claim` of a function; `comparison`: its tolerance, rate and sizes.

    >>> from sims.parameters import PENALTY
    >>> @inequality("X", "Squares are not negative.", R"x^2 \\ge 0", parameters={"scale": PENALTY.within(0.1, 1.0)})
    ... def squares(normal, scale):
    ...     return 0.0, (scale * normal(5)) ** 2
    >>> squares.kind
    'inequality'
    """
    return lambda sides: Claim(id, statement, formula, source, kind, parameters, sides, **comparison)


identity, inequality, existence, statistical, asymptotic = (partial(claim, kind=kind) for kind in get_args(Kind))
"""`claim` of each kind."""


def all_claims() -> tuple[Claim, ...]:
    """Every claim of every section, in the order in which they are written; ids are unique.

    >>> [claim.id for claim in all_claims()][:3]
    ['S1', 'S2', 'S2.sampled']
    """
    modules = [import_module(f"sims.claims.{section}") for section in SECTIONS]
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Claim))
