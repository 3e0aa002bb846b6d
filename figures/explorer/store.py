"""A page for the store of a sweep (`linfit sweep`): its outputs along one axis, a slider for each of the others."""

import html
from pathlib import Path

import numpy as np
import xarray as xr

from figures.explorer.page import Choice, Line, Page, Plot, Table, Values
from sims.sweep.store import read, read_sweep

SHADES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


def curves(data: xr.Dataset, at: Values) -> dict[str, Table]:
    """Mean and one standard error either way of every output along the axis at["along"], the others held at `at`."""
    along = str(at["along"])
    held = {axis: value for axis, value in at.items() if axis not in ("along", along)}
    values = data[along].values
    table = {"x": values if np.issubdtype(values.dtype, np.number) else np.arange(float(values.size))}
    for name in data.data_vars:
        if f"{name}_error" not in data:
            continue
        mean, error = (
            np.broadcast_to(
                variable.sel({axis: value for axis, value in held.items() if axis in variable.dims}).values,
                values.shape,
            ).astype(float)
            for variable in (data[name], data[f"{name}_error"])
        )
        table |= {str(name): mean, f"{name}_low": mean - error, f"{name}_high": mean + error}
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

    def options(axis: str) -> tuple:
        values = data[axis].values if axis in data.coords else np.arange(data.sizes[axis])
        return tuple(value.item() for value in values)

    helps = {
        name: f"{parameter.help}, in units of {parameter.unit}."
        for name, parameter in sweep.experiment.parameters.items()
    }
    plots = tuple(
        Plot(
            name, name.replace("_", " "), "values of the chosen axis", name if output.unit == "1" else output.unit,
            lines=(
                Line("x", "x", name, "mean", SHADES[index % 4]),
                Line("x", "x", f"{name}_low", "± one standard error", SHADES[index % 4], "dotted"),
                Line("x", "x", f"{name}_high", "", SHADES[index % 4], "dotted"),
            ),
        )
        for index, (name, output) in enumerate(outputs.items())
    )  # fmt: skip
    meanings = "; ".join(f"<b>{name.replace('_', ' ')}</b>: {output.help}" for name, output in outputs.items())
    return Page(
        name="store",
        title="Sweep",
        source=f"{sweep.seeds} replicates of every point, seed {sweep.seed}; what is not finished is left out.",
        introduction=f"A sweep of the experiment {html.escape(sweep.experiment.name)}, {html.escape(path.name)}. {meanings}.",
        choices=(
            Choice("along", "The axis to draw along.", tuple(axes), name="along", value=axes[-1]),
            *(
                Choice(axis, helps.get(axis, "Point of the Sobol design."), values, True, axis, values[0])
                for axis, values in zip(axes, map(options, axes))
            ),
        ),
        curves=curves,
        plots=plots,
        suggestions={f"along {axis}": {"along": axis} for axis in axes[:3]},
        data=data,
        data_source=f"from pathlib import Path\n\nfrom sims.sweep import read\n\ndata = read(Path({str(path)!r}))[{keep!r}]",
    )
