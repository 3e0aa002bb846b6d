"""One look for every figure: colour-blind safe (Okabe–Ito), readable in print at column width, one name per method."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import matplotlib as mpl
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = ["COLOURS", "Picture", "canvas"]

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
    "self-distillation": "#8C6D31",
    "oracle": "#555555",
    "bias": "#0072B2",
    "variance": "#E69F00",
    "total": "#D55E00",
}
"""Of every method and quantity, in every figure."""

SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 7),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
}

FORGETTING, TASK = R"forgetting: pretraining risk $R_\mathrm{pre}$", R"fine-tuning risk $R_\mathrm{ft}$"
"""Labels of axes."""


class Picture(NamedTuple):
    """A picture, its numbers and its words: `draw` and `caption` see the dataset and nothing else.

    Whatever they state, settings and seed included, is in the dataset; so NAME.nc is enough to draw it again.
    """

    name: str
    title: str
    data: xr.Dataset
    """Every plotted number; settings as attributes."""
    draw: Callable[[xr.Dataset], Figure]
    caption: Callable[[xr.Dataset], str]
    """Plain text: what is shown, the setting, the seed, the agreement between theory and simulation."""


def seed_of(key: Array) -> int:
    """The seed that `jax.random.key` made the key of."""
    return int(jax.random.key_data(key).ravel()[-1])


def canvas(
    columns: int = 1, rows: int = 1, *, width: float = PAGE, height: float = 2.4, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """A figure in the common style and its axes, row by row, `height` inches each; no display is needed."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.ravel())


def panel_letters(axes: list[Axes]) -> Figure:
    """(a), (b), … in the upper left corner of each panel; their figure."""
    for letter, axis in zip("abcdefgh", axes, strict=False):
        axis.set_title(f"({letter})", loc="left", fontweight="bold")
    return cast(Figure, axes[0].figure)


def readable_ticks(*lines: Axis) -> None:
    """1, 2, 5 per decade on logarithmic axes, as plain numbers."""
    for line in lines:
        line.set_major_locator(LogLocator(subs=(1, 2, 5)))
        line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        line.set_minor_formatter(NullFormatter())


def band(axis: Axes, x: Any, mean: Any, error: Any, *, color: str, alpha: float = 0.2, **looks: Any) -> None:
    """A line with a band of one standard error."""
    axis.plot(x, mean, color=color, **looks)
    axis.fill_between(x, mean - error, mean + error, color=color, alpha=alpha, linewidth=0)


def bars(axis: Axes, data: xr.Dataset, name: str, error: str = "", **looks: Any) -> None:
    """The variable `name` along its only dimension, with bars of its standard error, the variable `error`."""
    values, looks = data[name], {"fmt": "o", "capsize": 1.5, **looks}
    axis.errorbar(values[values.dims[0]], values, data[error or f"{name}_error"], **looks)
