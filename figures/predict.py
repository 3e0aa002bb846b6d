"""Real fine-tunings, each predicted before it was run: how near, and where the prediction ends (docs, predictions)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from figures.style import Picture, canvas, panel_letters, readable_ticks, seed_of
from linfit.tangent.prediction import TRUSTED_GAP
from sims.laboratory.failures import CANDIDATES, WRONG, calibrate, language_rows, table
from sims.laboratory.predictions import FULL, QUICK, run_table, settings

__all__ = ["pictures", "tables"]

MARKERS = {"perceptron": "o", "convolutional": "s", "transformer": "^", "language model": "*"}
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
    data = data.assign_attrs(first_seed=seed, limit=calibrate(data.sel(run=data["seed"] == seed), QUANTITY).limit)
    yield Picture("predict", "Fine-tunings of real networks, predicted before they were run", data, _draw, _caption)


QUANTITY = "gap_test"


def _draw(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, 2, height=2.9)
    pairs = {"best_tau": R"best $\tau$", "forgetting": R"forgetting at $\tau=1$", "best_loss": "least task loss"}
    for axis, (name, label) in zip(axes, pairs.items(), strict=False):
        _points(axis, data, data[f"measured_{name}"], data[f"predicted_{name}"])
        both = np.concatenate([axis.get_xlim(), axis.get_ylim()])
        axis.axline((1, 1), slope=1, color="#999999", linewidth=0.8, zorder=0)
        axis.set(xlabel=f"measured {label}", ylabel=f"predicted {label}", xlim=(both.min(), both.max()))
        axis.set_ylim(axis.get_xlim())
    _legend(axes[0], data)
    last = axes[3]
    _points(last, data, data[QUANTITY], np.maximum(abs(data["tau_error"]), 1e-3))
    last.set(
        xscale="log",
        yscale="log",
        xlabel=R"gap $\Vert f(\theta_1+\delta)-f_1-J\delta\Vert/\Vert J\delta\Vert$, known before the run",
    )
    last.set_ylabel(R"error of the predicted best $\tau$")
    last.axvline(TRUSTED_GAP, color="black", linewidth=0.8)
    last.axhline(WRONG, color="black", linewidth=0.8, linestyle=":")
    readable_ticks(last.xaxis)
    return panel_letters(axes)


def _points(axis: Axes, data: xr.Dataset, x: xr.DataArray, y: xr.DataArray) -> None:
    """One marker a run: shape by architecture, colour by rate, hollow where the prediction is not trusted."""
    rates = np.unique(data["rate"])
    trusted = (data[QUANTITY] <= TRUSTED_GAP).values
    for architecture, marker in MARKERS.items():
        for rate, colour in zip(rates, COLOURS_OF_RATES, strict=False):
            for mask, fill in ((trusted, colour), (~trusted, "none")):
                chosen = mask & (data["architecture"] == architecture).values & (data["rate"] == rate).values
                axis.plot(x[chosen], y[chosen], marker, color=colour, markerfacecolor=fill, markersize=4, alpha=0.8)


def _legend(axis: Axes, data: xr.Dataset) -> None:
    present = [name for name in MARKERS if (data["architecture"] == name).any()]
    looks = [Line2D([], [], marker=MARKERS[name], color="black", linestyle="", label=name) for name in present]
    for rate, colour in zip(np.unique(data["rate"]), COLOURS_OF_RATES, strict=False):
        steps = int(data["steps"].values[data["rate"].values == rate].max())
        label = Rf"{steps} steps of {rate:g}/$s_\max$"
        looks.append(Line2D([], [], marker="o", color=colour, linestyle="", label=label))
    looks.append(Line2D([], [], marker="o", color="black", markerfacecolor="none", linestyle="", label="not trusted"))
    axis.legend(handles=looks, loc="upper left", handletextpad=0.2, labelspacing=0.25)


def _caption(data: xr.Dataset) -> str:
    off = abs(data["tau_error"])
    first = data["seed"] == data.first_seed
    tried = data.sel(run=~first & (data["architecture"] != "language model"))
    trusted = abs(tried["gap_test"]) <= TRUSTED_GAP
    wrong = abs(tried["tau_error"]) > WRONG
    names = ", ".join(
        f"{int((data['architecture'] == name).sum())} of a {name}"
        for name in MARKERS
        if (data["architecture"] == name).any()
    )
    return (
        f"{data.sizes['run']} real fine-tunings ({names}), each predicted from the tangent features of its pretrained network "
        "before it was run (squared loss and cross-entropy, three shares of wrong labels). (a) The ensemble coefficient of least "
        "task loss, (b) forgetting, the rise of the loss on the pretraining task, (c) the least task loss along τ, on a line if "
        f"predicted exactly. Median error of τ*: {float(off.median()):.3f}, worst {float(off.max()):.2f}; median relative error of "
        f"forgetting: {100 * float(abs(data['forgetting_error']).median()):.0f}%. (d) The error of τ* against the gap between the "
        "network at the predicted weights and the linear prediction, relative to what the prediction moves, known before the run. "
        f"Left of the line, {TRUSTED_GAP:g}, predictions are trusted: of {tried.sizes['run']} runs with seed {data.first_seed + 1}, "
        f"{int(trusted.sum())} are, of which {int((trusted & wrong).sum())} are off by more than {WRONG:g}; of the others "
        f"{int((~trusted & wrong).sum())} are. The same rule on the runs with seed {data.first_seed} alone would put the line at "
        f"{data.limit:.2f}."
    )


ERRORS = {
    "tau_error": "τ*",
    "forgetting_error": "forgetting",
    "loss_error": "least loss",
    "loss_at_1_error": "loss at τ = 1",
    "stopping_error": "log₂ of the best stopping time",
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
    groups = {f"rate {rate:g}": data["rate"] == rate for rate in np.unique(data["rate"])}
    groups |= {name: data["architecture"] == name for name in MARKERS if (data["architecture"] == name).any()}
    groups |= {f"loss {loss}": data["loss"] == loss for loss in np.unique(data["loss"])}
    trusted = abs(data["gap_test"]) <= TRUSTED_GAP
    groups |= {"trusted": trusted, "not trusted": ~trusted, "all": trusted | True}
    rows = []
    for name, chosen in groups.items():
        part = abs(data[list(ERRORS)].sel(run=chosen))
        cells = [f"{float(part[e].median()):.3f}, {float(part[e].max()):.2f}" if chosen.any() else "" for e in ERRORS]
        rows.append([name, str(int(chosen.sum())), *cells])
    return _markdown(["runs", "number", *ERRORS.values()], rows)


def _candidates(data: xr.Dataset) -> str:
    """Each candidate's limit from the first seed, and what it does on the second."""
    first, second = (data.sel(run=data["seed"] == data.first_seed + i) for i in range(2))
    rows = []
    for name in CANDIDATES:
        rule = calibrate(first, name)
        trusted, off = rule.trusted(second), abs(second["tau_error"])
        shares = [float(rule.trusted(part).mean()) for part in (first, second)]
        missed, worst = int((trusted & (off > WRONG)).sum()), float(off.where(trusted).max())
        ranks = spearmanr(abs(second[name]), off).statistic
        rows.append(
            [
                f"`{name}`",
                f"{rule.limit:.3g}",
                *(f"{100 * s:.0f}%" for s in shares),
                str(missed),
                f"{worst:.2f}",
                f"{ranks:.2f}",
            ]
        )
    head = [
        "quantity",
        "limit",
        "trusted, first seed",
        "second seed",
        f"of these off by more than {WRONG:g}",
        "worst",
        "rank correlation with the error of τ*",
    ]
    return _markdown(head, rows)


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
        rows.append([*setting, *numbers, f"{float(data['gap_test'][i]):.2f}"])
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
        "gap",
    ]
    return _markdown(head, rows)
