"""`linfit select`: the leave-one-out surface of a user's own features, its minimum, a picture."""

import json as json_format
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from figures.report import prepare_folder
from figures.style import COLOURS, SETTINGS, canvas
from linfit import Selection, select
from linfit.internal.files import open_arrays, whole_file

__all__ = ["load_arrays", "report_selection"]

ARRAYS, VALIDATION = ("X", "y", "theta_1"), ("X_val", "y_val")
ENDINGS = (".png", ".pdf", ".svg")


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; never unpickles. ValueError if one is missing or the file is not an .npz."""
    try:
        with open_arrays(file) as archive:
            arrays = {name: archive[name] for name in (*ARRAYS, *VALIDATION) if name in archive.files}
            found = ", ".join(archive.files) or "nothing"
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"{file} must hold {', '.join(ARRAYS)}; {', '.join(missing)} missing, found {found}")
    if ("X_val" in arrays) != ("y_val" in arrays):
        raise ValueError(f"{file} must hold both X_val and y_val or neither")
    return arrays


def report_selection(file: Path, out: Path | None, json: bool) -> None:
    """What `linfit select` does; ValueError for arrays that do not fit, or another ending of `out`."""
    out = file.with_suffix(".select.png") if out is None else out
    if out.suffix not in ENDINGS:
        raise ValueError(f"--out must end in {', '.join(ENDINGS)}, got {out.name}")
    arrays = load_arrays(file)
    X, y, theta_1 = (arrays[name] for name in ARRAYS)
    results = {"leave-one-out": select(X, y, theta_1)}
    if "X_val" in arrays:
        results["validation"] = select(X, y, theta_1, validation=(arrays["X_val"], arrays["y_val"]))
    prepare_folder(out.parent)
    with whole_file(out) as path, mpl.rc_context(SETTINGS):
        _draw(results).savefig(path, format=out.suffix[1:])
    if json:
        summaries = {name: _summary(selection) for name, selection in results.items()}
        print(json_format.dumps({"file": str(file), "picture": str(out), **summaries}, indent=2))
    else:
        _print_table(results, out)


def _summary(selection: Selection) -> dict[str, Any]:
    """The minimum and its error bars, as plain numbers."""
    plausible = selection.indistinguishable
    penalties, taus = selection.penalties[plausible.any(axis=1)], selection.taus[plausible.any(axis=0)]
    within = {
        name: [float(values.min()), float(values.max())] if values.size else None
        for name, values in (("penalty", penalties), ("tau", taus))
    }
    return {
        "penalty": selection.best_penalty,
        "tau": selection.best_tau,
        "tau_standard_error": selection.best_tau_error,
        "mean_squared_error": selection.best_mean_squared_error,
        "mean_squared_error_standard_error": selection.best_standard_error,
        "within_one_standard_error": within,
        "gain_over_full_fine_tuning": selection.gain_over_full,
        "gain_over_full_fine_tuning_standard_error": selection.gain_over_full_error,
        "pretrained_mean_squared_error": selection.pretrained_mean_squared_error,
    }


def _print_table(results: dict[str, Selection], out: Path) -> None:
    table = Table("", *results, title="ensemble of ridge: θ₁ + τ (θ̂_λ − θ₁)")
    rows = {
        "penalty λ": lambda s: f"{s.best_penalty:.4g}",
        "ensemble coefficient τ": lambda s: f"{s.best_tau:.3f} ± {s.best_tau_error:.3f}",
        "mean squared error there": lambda s: f"{s.best_mean_squared_error:.4g} ± {s.best_standard_error:.2g}",
        "gain over τ = 1 at that λ": lambda s: f"{s.gain_over_full:.3g} ± {s.gain_over_full_error:.2g}",
        "pretrained (τ = 0)": lambda s: f"{s.pretrained_mean_squared_error:.4g}",
    }
    for name, text in rows.items():
        table.add_row(name, *(text(selection) for selection in results.values()))
    console = Console()
    console.print(table)
    console.print("± one standard error over samples. The error includes the label noise.", highlight=False)
    console.print(f"picture: {out}", highlight=False)


def _draw(results: dict[str, Selection]) -> Figure:
    """The leave-one-out surface over (λ, τ), and the error along τ at the best λ."""
    selection = results["leave-one-out"]
    figure, (left, right) = canvas(2, height=2.8)
    positive = selection.penalties > 0
    penalties, surface = selection.penalties[positive], selection.mean_squared_error[positive]
    top = min(surface.max(), 2 * selection.pretrained_mean_squared_error)
    levels = np.linspace(selection.best_mean_squared_error, max(top, 1.001 * selection.best_mean_squared_error), 25)
    filled = left.contourf(penalties, selection.taus, surface.T, levels=levels, cmap="cividis", extend="max")
    plausible = selection.indistinguishable[positive].T.astype(float)
    if 0 < plausible.mean() < 1:
        dashed = {"colors": "white", "linestyles": "--", "linewidths": 1.2}
        left.contour(penalties, selection.taus, plausible, levels=[0.5], **dashed)
    star: dict[str, Any] = {"fmt": "*", "color": "white", "markeredgecolor": "black", "markersize": 9, "capsize": 2}
    left.errorbar(max(selection.best_penalty, penalties[0]), selection.best_tau, selection.best_tau_error, **star)
    left.set(xscale="log", xlabel=R"penalty $\lambda$", ylabel=R"ensemble coefficient $\tau$")
    left.set_ylim(selection.taus[0], selection.taus[-1])
    left.set_title("leave-one-out error\n(star: best; dashed: within one standard error)")
    figure.colorbar(filled, ax=left, format="%.3g")
    for (name, result), colour in zip(results.items(), (COLOURS["ridge"], COLOURS["min-norm"]), strict=False):
        row = int(np.argmin(np.abs(result.penalties - result.best_penalty)))
        mean, error = result.mean_squared_error[row], result.standard_error[row]
        right.plot(result.taus, mean, color=colour, label=Rf"{name}, $\lambda$ = {result.penalties[row]:.3g}")
        right.fill_between(result.taus, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        best = result.best_tau, result.best_mean_squared_error
        right.errorbar(*best, xerr=result.best_tau_error, fmt="o", color=colour, capsize=2)
    right.set(xlabel=R"ensemble coefficient $\tau$", ylabel="mean squared error")
    right.set_title("along $\\tau$ at the best $\\lambda$\n(band and bar: one standard error)")
    right.legend()
    return figure
