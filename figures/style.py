"""One look for every figure: colour-blind safe (Okabe–Ito), readable in print at column width, one name per method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = [
    "COLOURS",
    "COLUMN",
    "MARKERS",
    "PAGE",
    "SETTINGS",
    "Picture",
    "canvas",
    "panel_letters",
    "readable_ticks",
    "seed_of",
]

COLUMN, PAGE = 3.4, 7.0
"""Widths of one column and of the page, in inches."""

COLOURS = {
    "pretrained": "#000000",
    "min-norm": "#D55E00",
    "fine-tuned": "#D55E00",
    "ridge": "#0072B2",
    "early stopping": "#009E73",
    "ensemble": "#CC79A7",
    "min-norm + ensemble": "#CC79A7",
    "ridge + ensemble": "#56B4E9",
    "early stopping + ensemble": "#E69F00",
    "oracle": "#555555",
    "bias": "#0072B2",
    "variance": "#E69F00",
    "total": "#D55E00",
}
"""Of every method and quantity, in every figure."""

MARKERS = {"min-norm": "o", "ridge": "s", "early stopping": "^"}

SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
}


class Picture(NamedTuple):
    """A picture, its numbers and its words: `draw` and `caption` see the dataset and nothing else.

    Whatever they state, settings and seed included, is in the dataset; so NAME.nc is enough to draw it again.
    """

    name: str
    """File name without ending."""
    title: str
    data: xr.Dataset
    """Every plotted number; settings as attributes."""
    draw: Callable[[xr.Dataset], Figure]
    caption: Callable[[xr.Dataset], str]
    """Plain text: what is shown, the setting, the seed, the agreement between theory and simulation."""


def seed_of(key: Array) -> int:
    """The seed that `jax.random.key` made the key of.

    >>> seed_of(jax.random.key(7))
    7
    """
    return int(jax.random.key_data(key).ravel()[-1])


def canvas(
    columns: int = 1, rows: int = 1, *, width: float = PAGE, height: float = 2.4, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """A figure in the common style and its axes, row by row; no display is needed."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.ravel())


def panel_letters(axes: list[Axes]) -> None:
    """(a), (b), … in the upper left corner of each panel."""
    for letter, axis in zip("abcdefgh", axes, strict=False):
        axis.set_title(f"({letter})", loc="left", fontweight="bold")


def readable_ticks(axis: Axis) -> None:
    """1, 2, 5 per decade on a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
