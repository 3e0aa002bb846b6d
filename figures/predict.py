"""Real fine-tunings, each predicted before it was run: how near, and where the prediction ends (docs, predictions)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from figures.style import Picture, canvas, panel_letters, seed_of
from linfit.tangent.prediction import TRUSTED_CURVATURE
from sims.laboratory.failures import CANDIDATES, FAILURES, Rule, calibrate, language_rows, table
from sims.laboratory.predictions import FULL, QUICK, run_table, settings

__all__ = ["pictures", "tables"]

MARKERS = {"perceptron": "o", "convolutional": "s", "transformer": "^", "language model": "*"}
LANGUAGE = "language model"
COLOURS_OF_RATES = ("#0072B2", "#009E73", "#D55E00", "#CC79A7")
Report = Callable[[int, int], None] | None


def pictures(key: Array, quick: bool, folder: Path | None = None, report: Report = None) -> Iterator[Picture]:
    """The one figure; rows are kept in `folder` and reused, `language` below it may hold those of language models.

    Half of the runs, the first seed's, choose the boundary, the other half tries it.
    """
    plan, seed = QUICK if quick else FULL, seed_of(key)
    with TemporaryDirectory() as temporary:
        where = Path(temporary) if folder is None else folder
        rows = run_table(where, settings(plan, (seed, seed + 1)), plan, report)
        data = table([*rows, *language_rows(where / "language")])
    data = data.assign_attrs(first_seed=seed)
    yield Picture("predict", "Fine-tunings of real networks, predicted before they were run", data, _draw, _caption)


PAIRS = {"best_tau": R"best $\tau$", "forgetting": R"forgetting at $\tau=1$", "best_loss": "least task loss"}
BOUNDARIES = {"best_tau": R"error of the predicted best $\tau$", "forgetting": "relative error of forgetting"}


def _draw(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, 2)
    for axis, (name, label) in zip(axes, PAIRS.items(), strict=False):
        _points(axis, data, data[f"measured_{name}"], data[f"predicted_{name}"])
        both = np.concatenate([axis.get_xlim(), axis.get_ylim()])
        axis.axline((1, 1), slope=1, color="#999999", linewidth=0.8, zorder=0)
        axis.set(xlabel=f"measured {label}", ylabel=f"predicted {label}", xlim=(both.min(), both.max()))
        axis.set_ylim(axis.get_xlim())
    for axis, (name, label) in zip(axes[3:], BOUNDARIES.items(), strict=False):
        error = abs(data[FAILURES[name].error])
        _points(axis, data, data["curvature"], error.clip(min=1e-3))
        axis.set(xscale="log", yscale="log", xlabel="curvature along the predicted step", ylabel=label)
        axis.axvline(TRUSTED_CURVATURE, color="black", linewidth=0.8)
        axis.axhline(FAILURES[name].wrong, color="black", linewidth=0.8, linestyle=":")
    _legend(axes[5], data)
    return panel_letters(axes[:5])


def _trusted(data: xr.Dataset) -> xr.DataArray:
    return Rule("curvature", TRUSTED_CURVATURE).trusted(data)


def _points(axis: Axes, data: xr.Dataset, x: xr.DataArray, y: xr.DataArray) -> None:
    """One marker a run: shape by architecture, colour by rate, hollow where the prediction is not trusted."""
    trusted = _trusted(data)
    for (architecture, rate), colour in _colours(data).items():
        of_this = (data["architecture"] == architecture) & ((data["rate"] == rate) | (architecture == LANGUAGE))
        for mask, fill in ((trusted, colour), (~trusted, "none")):
            chosen = (of_this & mask).values
            looks: dict[str, Any] = {"color": colour, "markerfacecolor": fill, "markersize": 3.5, "alpha": 0.8}
            axis.plot(x.values[chosen], y.values[chosen], MARKERS[architecture], **looks)


def _colours(data: xr.Dataset) -> dict[tuple[str, float], str]:
    """Of every architecture and rate; language models, whose rates are of another kind, have one colour."""
    rates = np.unique(data["rate"].values[data["architecture"].values != LANGUAGE]).tolist()
    shades = dict(zip(rates, COLOURS_OF_RATES, strict=False))
    found = {(name, rate): shades[rate] for name in MARKERS if name != LANGUAGE for rate in rates}
    return found | {(LANGUAGE, np.nan): COLOURS_OF_RATES[-1]}


def _legend(axis: Axes, data: xr.Dataset) -> None:
    """In a panel of its own."""
    present = [name for name in MARKERS if (data["architecture"] == name).any()]
    looks = [Line2D([], [], marker=MARKERS[name], color="black", linestyle="", label=name) for name in present]
    for (name, rate), colour in _colours(data).items():
        if name == "perceptron":
            steps = int(data["steps"].values[data["rate"].values == rate].max())
            label = Rf"{steps} steps of size {rate:g}/$s_\max$"
            looks.append(Line2D([], [], marker="o", color=colour, linestyle="", label=label))
    looks.append(Line2D([], [], marker="o", color="black", markerfacecolor="none", linestyle="", label="not trusted"))
    looks.append(Line2D([], [], color="black", linewidth=0.8, label="trusted to the left"))
    looks.append(Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="failed above"))
    axis.axis("off")
    axis.legend(handles=looks, loc="center left")


def _caption(data: xr.Dataset) -> str:
    present = [name for name in MARKERS if (data["architecture"] == name).any()]
    names = ", ".join(f"{name} {int((data['architecture'] == name).sum())}" for name in present)
    second = data.sel(run=data["seed"] == data.first_seed + 1)
    trusted, tried = _trusted(second), []
    for name, words in (("best_tau", "the best τ"), ("forgetting", "forgetting")):
        failed = FAILURES[name].of(second)
        tried.append(
            f"{words} is off by more than {FAILURES[name].wrong:g} in {int((trusted & failed).sum())} of these and in "
            f"{int((~trusted & failed).sum())} of the others"
        )
    shares = ", ".join(f"{100 * share:.0f}" for share in np.unique(data["noise"].dropna("run")))
    tau, forgetting = abs(data["tau_error"]), abs(data["forgetting_error"])
    return (
        f"{data.sizes['run']} real fine-tunings ({names}), each predicted from the tangent features of its pretrained network "
        f"before it was run; squared loss and cross-entropy, {shares}% of the labels wrong. (a) The ensemble coefficient of least "
        "task loss, (b) forgetting, the rise of the loss on the pretraining task, (c) the least task loss along τ; exact predictions "
        f"are on the line. Median error of the best τ: {float(tau.median()):.3f}, worst {float(tau.max()):.2f}; median relative error "
        f"of forgetting: {100 * float(forgetting.median()):.0f}%. (d, e) Errors (at least 0.001 as drawn) against the "
        "curvature, second over first order of the outputs along the predicted step, known before the run, the larger one of the "
        f"two tasks. Of {second.sizes['run']} runs with seed {data.first_seed + 1}, {int(trusted.sum())} are trusted, with a curvature "
        f"of at most {TRUSTED_CURVATURE:g}: {'; '.join(tried)} (of forgetting, relative)."
    )


ERRORS = {
    "tau_error": "τ*",
    "forgetting_error": "forgetting",
    "loss_error": "least loss",
    "loss_at_1_error": "loss at τ = 1",
    "stopping_error": "log₂ of the best stopping time",
    "stopped_loss_error": "loss then",
    "regret": "regret of τ*",
    "along_run_tau_error": "τ*, first order along θ̂ − θ₁",
}
"""Of `sims.laboratory.failures.table`, as they are called in its printed form."""


def tables(data: xr.Dataset) -> str:
    """Markdown: errors by how far from lazy, what each candidate can tell, and every run."""
    return "\n\n".join([_by_group(data), _candidates(data), _every_run(data)]) + "\n"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_group(data: xr.Dataset) -> str:
    """Median and worst absolute errors."""
    rates, kinds = (np.unique(data[name].values[data["architecture"].values != LANGUAGE]) for name in ("rate", "loss"))
    groups = {f"rate {rate:g}": data["rate"] == rate for rate in rates}
    groups |= {name: data["architecture"] == name for name in MARKERS if (data["architecture"] == name).any()}
    groups |= {f"loss {kind}": data["loss"] == kind for kind in kinds}
    groups |= {"trusted": _trusted(data), "not trusted": ~_trusted(data)}
    groups["all"] = data["rate"] != -1
    rows = []
    for name, chosen in groups.items():
        part = abs(data[list(ERRORS)].sel(run=chosen))
        rows.append([name, str(int(chosen.sum())), *(_median_and_worst(part[error].values) for error in ERRORS)])
    return _markdown(["runs", "number", *ERRORS.values()], rows)


def _median_and_worst(errors: np.ndarray) -> str:
    known = errors[~np.isnan(errors)]
    return f"{np.median(known):.3f}, {known.max():.2f}" if known.size else ""


def _candidates(data: xr.Dataset) -> str:
    """Each candidate's limit from the first seed, and what it does on the second."""
    first, second = (data.sel(run=data["seed"] == data.first_seed + i) for i in range(2))
    rows = []
    for number, failure in FAILURES.items():
        for name in CANDIDATES:
            rule = calibrate(first, name, failure)
            trusted, failed = rule.trusted(second), failure.of(second)
            shares = [f"{100 * float(rule.trusted(part).mean()):.0f}%" for part in (first, second)]
            counts = [str(int((mask & failed).sum())) for mask in (trusted, ~trusted)]
            ranks = spearmanr(abs(data[name]), abs(data[failure.error])).statistic
            rows.append([number.replace("_", " "), f"`{name}`", f"{rule.limit:.3g}", *shares, *counts, f"{ranks:.2f}"])
    return _markdown(
        [
            "what fails",
            "quantity",
            "limit",
            "trusted, first seed",
            "second seed",
            "of these failed",
            "of the others failed",
            "rank correlation with the error",
        ],
        rows,
    )


def _every_run(data: xr.Dataset) -> str:
    """Predicted → measured, one line a run."""

    def both(i: int, name: str, digits: int = 2) -> str:
        return " → ".join(f"{float(data[f'{part}_{name}'][i]):.{digits}f}" for part in ("predicted", "measured"))

    rows = []
    for i in range(data.sizes["run"]):
        setting = [
            str(data[name].values[i]) for name in ("architecture", "shift", "loss", "seed", "noise", "rate", "steps")
        ]
        numbers = [
            both(i, "best_tau"),
            both(i, "best_loss", 3),
            both(i, "loss_at_1", 3),
            both(i, "forgetting", 3),
            both(i, "best_steps", 0),
        ]
        rows.append([*setting, *numbers, f"{float(data['curvature'][i]):.2f}"])
    head = [
        "architecture",
        "shift",
        "loss",
        "seed",
        "noise",
        "rate",
        "steps",
        "τ*",
        "least loss",
        "loss at τ = 1",
        "forgetting",
        "best steps",
        "curvature",
    ]
    return _markdown(head, rows)
