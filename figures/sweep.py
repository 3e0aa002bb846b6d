"""A quick look at the store of a sweep: outputs along one axis, a line for each value of another."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr

from figures.style import SETTINGS, canvas
from linfit.internal.files import whole_file
from sims.sweep.plan import Sweep
from sims.sweep.store import read, read_sweep
from sims.sweep.summary import best_points

__all__ = ["draw_sweep"]

MOST_LINES = 7  # more values than this are thinned out


def draw_sweep(
    store: Path, x: str, lines: str | None, y: Sequence[str] = (), at: Sequence[str] = (), out: Path | None = None
) -> Path:
    """Write a picture of the means of a store with a band of one standard error; the path of the picture.

    Axes that are neither `x` nor `lines` are held at NAME=VALUE of `at`, or at the best point of the first output.
    Raises ValueError for names or values that the store does not have, and where no cell is finished yet.
    """
    sweep, data = read_sweep(store), read(store)
    out = out or store.with_suffix(".png")
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out must end in .png, .pdf or .svg, got {out.name}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.absolute().parent}")
    axes = [*sweep.task_dims, *sweep.batched_dims]
    for option, name in {"x": x, "lines": lines}.items():
        if name is not None and name not in axes:
            raise ValueError(f"--{option} must be an axis of the sweep, one of {', '.join(axes) or 'none'}; got {name}")
    if lines == x:
        raise ValueError(f"--lines must be another axis than --x, got {lines} for both")
    outputs = _outputs(sweep, data, x, y)
    held = _held(sweep, data, outputs[0], x, lines, at)
    chosen = data.sel(held)
    if not np.isfinite(chosen[outputs[0]].values).any():
        raise ValueError(f"{store} has no finished cell to draw at {_text(held) or 'any point'}")
    with mpl.rc_context(SETTINGS):
        figure, panels = canvas(len(outputs), width=max(3.4 * min(len(outputs), 3), 4.4), height=2.9)
        for axis, name in zip(panels, outputs, strict=True):
            _draw(axis, chosen, name, x, lines)
            axis.set(xlabel=_label(data[x]), ylabel=_label(data[name]))
        if lines is not None and lines in chosen[outputs[0]].dims:
            count = data[lines].size
            title = lines if count <= MOST_LINES else f"{lines}\n({MOST_LINES} of {count})"
            panels[-1].legend(title=title, loc="center left", bbox_to_anchor=(1.0, 0.5))
        replicates = f"{sweep.seeds} replicates, band ± 1 standard error"
        figure.suptitle(f"{sweep.experiment.name}: {', '.join(filter(None, [_text(held), replicates]))}", fontsize=8)
        with whole_file(out) as draft:
            figure.savefig(draft, format=out.suffix[1:])
    return out


def _outputs(sweep: Sweep, data: xr.Dataset, x: str, asked: Sequence[str]) -> list[str]:
    names = [name for text in asked for name in text.split(",")]
    along = [name for name in sweep.experiment.outputs if x in data[name].dims]
    known, wrong = ", ".join(along) or "none", ", ".join(name for name in names if name not in along)
    if wrong or not along:
        raise ValueError(f"--y must be outputs that vary along {x}: {known}; got {wrong}")
    return names or [name for name in along if sweep.experiment.outputs[name].best][:2] or along[:2]


def _held(sweep: Sweep, data: xr.Dataset, output: str, x: str, lines: str | None, at: Sequence[str]) -> dict[str, Any]:
    others = [axis for axis in (*sweep.task_dims, *sweep.batched_dims) if axis not in (x, lines)]
    best = best_points(sweep, data).get(output, {"at": {}})["at"]
    held = {axis: best.get(axis, data[axis].values[len(data[axis]) // 2]) for axis in others}
    for text in (part for entry in at for part in entry.split(",")):
        name, _, value = text.partition("=")
        if name not in others:
            raise ValueError(f"--at must be NAME=VALUE for one of {', '.join(others) or 'no axis'}; got {text}")
        values = data[name].values
        if values.dtype.kind in "iuf":
            try:
                held[name] = values[np.argmin(np.abs(values - float(value)))]
            except ValueError:
                raise ValueError(f"--at {name} must be a number, got {value!r}") from None
        elif value in values:
            held[name] = value
        else:
            raise ValueError(f"--at {name} must be one of {', '.join(values)}; got {value!r}")
    return held


def _draw(axis: Any, data: xr.Dataset, name: str, x: str, lines: str | None) -> None:
    mean, error = data[name], data[f"{name}_error"]
    words = data[x].dtype.kind not in "iuf"
    places = np.arange(data[x].size) if words else data[x].values
    several = lines is not None and lines in mean.dims
    count = data[lines].size if several else 1
    shown = np.unique(np.linspace(0, count - 1, min(count, MOST_LINES)).round().astype(int))
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for index, colour in zip(shown, colours, strict=True):
        along, spread = (part.isel({lines: index}) if several else part for part in (mean, error))
        value = data[lines].values[index] if several else ""
        label = f"{value:.3g}".replace("-", "−") if isinstance(value, float) else str(value)
        axis.plot(places, along, "o-" if words or len(places) < 12 else "-", color=colour, label=label)
        axis.fill_between(places, along - spread, along + spread, color=colour, alpha=0.25, linewidth=0)
    if words:
        axis.set_xticks(places, data[x].values)
    elif _logarithmic(data[x].values):
        axis.set_xscale("log")
    if _logarithmic(mean.values, factor=100):
        axis.set_yscale("log")


def _logarithmic(values: np.ndarray, factor: float = 30) -> bool:
    """Whether values span so much that they are better shown on a logarithmic scale."""
    finite = values[np.isfinite(values)]
    return finite.size > 0 and finite.min() > 0 and finite.max() / finite.min() > factor


def _label(array: xr.DataArray) -> str:
    text, units = fill(array.attrs["long_name"], 34), array.attrs.get("units", "1")  # the number of a point has none
    return text if units == "1" else f"{text}\n[{units}]"


def _text(held: dict[str, Any]) -> str:
    words = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in held.items()}
    return ", ".join(f"{name} = {word}" for name, word in words.items())
