"""A page for the store of a sweep (`linfit sweep`): its outputs along one axis, a slider for each of the others."""

import html
import itertools
from pathlib import Path

import numpy as np
import xarray as xr

from figures.explorer.page import Choice, Line, Page, Plot, Values
from figures.explorer.tables import Tables
from sims.sweep.store import read, read_sweep

SHADES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


def curves(data: xr.Dataset, at: Values) -> Tables:
    """Mean and one standard error either way of every output along the axis at["along"], the others held at `at`."""
    along = str(at["along"])
    held = {axis: value for axis, value in at.items() if axis not in ("along", along)}
    values = data[along].values

    def column(name: str) -> np.ndarray:
        chosen = data[name].sel({axis: value for axis, value in held.items() if axis in data[name].dims})
        return np.broadcast_to(chosen.values, values.shape).astype(float)

    table = {"x": values if np.issubdtype(values.dtype, np.number) else np.arange(float(values.size))}
    for name in map(str, data.data_vars):
        if f"{name}_error" in data:
            mean, error = column(name), column(f"{name}_error")
            table |= {name: mean, f"{name}_low": mean - error, f"{name}_high": mean + error}
    return {"x": table}


def store_page(path: Path) -> Page:
    """The page of a store; ValueError if it is none, or if no axis of it has two values."""
    sweep, data = read_sweep(path), read(path).load()
    axes = [axis for axis, size in {**sweep.task_dims, **sweep.batched_dims}.items() if size > 1]
    if not axes:
        raise ValueError(f"{path} has no axis with more than one value to explore")
    outputs = sweep.experiment.outputs
    keep = [name for output in outputs for name in (output, f"{output}_error")]
    data = data[keep]
    choices = [Choice("along", "The axis to draw along.", tuple(axes), name="along", value=axes[-1])]
    for axis in axes:
        values = data[axis].values if axis in data.coords else np.arange(data.sizes[axis])
        parameter = sweep.experiment.parameters.get(axis)
        help = f"{parameter.help}, in units of {parameter.unit}." if parameter else "Point of the Sobol design."
        choices.append(Choice(axis, help, tuple(values.tolist()), True, axis, values[0].item()))
    plots = []
    for (name, output), shade in zip(outputs.items(), itertools.cycle(SHADES)):
        shown = Line.over("x", "x", (name, "mean", shade), (f"{name}_low", "± one standard error", shade, "dotted"),
                      (f"{name}_high", "", shade, "dotted"))  # fmt: skip
        unit = name if output.unit == "1" else output.unit
        plots.append(Plot(name, name.replace("_", " "), "values of the chosen axis", unit, shown))
    meanings = "; ".join(f"<b>{name.replace('_', ' ')}</b>: {output.help}" for name, output in outputs.items())
    return Page(
        name="store",
        title="Sweep",
        source=f"{sweep.seeds} replicates of every point, seed {sweep.seed}; what is not finished is left out.",
        introduction=f"A sweep of the experiment {html.escape(sweep.experiment.name)}, {html.escape(path.name)}. {meanings}.",
        choices=tuple(choices),
        curves=curves,
        plots=tuple(plots),
        suggestions={f"along {axis}": {"along": axis} for axis in axes[:3]},
        data=data,
        data_source=f"from pathlib import Path\n\nfrom sims.sweep import read\n\ndata = read(Path({str(path)!r}))[{keep!r}]",
    )
