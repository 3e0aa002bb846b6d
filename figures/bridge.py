"""Real language models beside the linear theory: loss along τ, signal in the layers, the spectrum of a delta."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.interpolate import CubicSpline

from figures.style import COLOURS, COLUMN, PAGE, SETTINGS, Picture, canvas, panel_letters, seed_of
from linfit.bridge import Curve, Inspection, LanguagePrediction, Plan, fit_curve
from sims.laboratory.toy_language import merges_along_tau
from sims.laboratory.toy_soups import soups_of_runs

__all__ = ["draw_curves", "draw_inspection", "draw_plan", "draw_prediction", "pictures"]

BASE_TASK, TUNED_TASK = COLOURS["ridge"], COLOURS["ensemble"]


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """A small real model: loss along τ, signal by layer, spectrum of a delta; soups predicted and measured."""
    taus = np.linspace(0, 1.2, 4 if quick else 13)
    sizes: dict[str, Any] = {"hidden": 32 if quick else 64, "lines": 30 if quick else 250, "shard_size": "1MB"}
    sizes |= {"pretrain_steps": 20 if quick else 300, "finetune_steps": 10 if quick else 40}
    data = merges_along_tau(taus, seed=seed_of(key), runs=3, finetune_lines=100, finetune_rate=5e-4, **sizes)
    yield Picture("bridge", "A real language model along τ", data, _draw, _caption)
    sizes |= {"pretrain_steps": 60, "finetune_steps": 8} if quick else {"finetune_steps": 20}
    numbers: dict[str, Any] = {"soups": 1 if quick else 8, "shares": np.linspace(0, 1, 3 if quick else 9)}
    numbers |= {"finetune_lines": 100, "finetune_rate": 5e-4, **sizes, "lines": 60 if quick else 400}
    soups = soups_of_runs(seed=seed_of(key), **numbers)
    yield Picture("soups", "Soups and mixed merges of eight real runs", soups, _draw_soups, _caption_soups)


def _fits(data: xr.Dataset) -> list[Curve]:
    """A quadratic through the paired losses within 0.35 of the best evaluated τ, or of all if that leaves too few."""
    fits, taus = [], data["tau"].values
    for losses in data["sums_loss"].values:
        near = np.abs(taus - taus[losses.mean(axis=1).argmin()]) <= 0.35
        near = near if near.sum() >= 4 else np.ones_like(near)
        fits.append(fit_curve(taus[near], losses[near]))
    return fits


def _draw(data: xr.Dataset) -> Figure:
    figure, axes = canvas(3, width=PAGE, height=2.7)
    for axis, draw_panel in zip(axes, (_draw_losses, _draw_layers, _draw_spectrum)):
        draw_panel(axis, data)
    panel_letters(axes)
    return figure


def _draw_losses(axis: Axes, data: xr.Dataset) -> None:
    for row, (fit, marker, style) in enumerate(zip(_fits(data), "os", ("--", ":"))):
        who = ("one run", f"average of {data.runs}")[row]
        for task, colour in (("stories", BASE_TASK), ("sums", TUNED_TASK)):
            losses = data[f"{task}_loss"].values[row]
            change = losses - losses[0]  # paired: the same samples at every τ
            mean, error = change.mean(axis=-1), change.std(axis=-1, ddof=1) / change.shape[-1] ** 0.5
            filling = colour if row == 0 else "white"
            label = f"{task}, {who}"
            axis.errorbar(data["tau"], mean, error, fmt=marker, color=colour, markerfacecolor=filling, label=label)
        dense = np.linspace(fit.taus.min(), fit.taus.max(), 60)
        axis.plot(dense, fit(dense) - losses[0].mean(), color=TUNED_TASK, linewidth=1)
        if fit.convex:
            axis.axvline(fit.best_tau, color=TUNED_TASK, linestyle=style, linewidth=0.8)
    axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    low, high = axis.get_ylim()
    axis.set(xlabel="ensemble coefficient τ", ylabel="held-out loss − loss of base (nats)")
    axis.set_ylim(low, high + 0.45 * (high - low))
    axis.legend(fontsize=6, loc="upper left")


def _draw_layers(axis: Axes, data: xr.Dataset) -> None:
    """Signal share by two routes: one spectrum against the noise edge, and agreement of the runs."""
    rows = data.sortby("signal_share")
    at = np.arange(rows.sizes["kind"])
    axis.plot(rows["signal_share"], at, "o", color=COLOURS["ridge"], label="above the noise edge")
    colour = COLOURS["early stopping + ensemble"]
    axis.plot(rows["suggested_tau_of_average"], at, "s", color=colour, label="shared by the runs")
    axis.set_yticks(at, [_short(kind) for kind in rows["kind"].values], fontsize=6)
    axis.set(xlim=(0, 1.05), ylim=(-0.5, at.size + 1.2), xlabel="signal share of ‖Δ‖²")
    axis.legend(fontsize=6, loc="upper left")


def _short(kind: str) -> str:
    return kind.removeprefix("model.").removesuffix(".weight").replace("layers.*.", "").replace("self_attn.", "attn.")


def _draw_spectrum(axis: Axes, data: xr.Dataset) -> None:
    s, noise = data["singular_value"].values, data["noise_singular_value"].values
    rank = np.arange(1, s.size + 1)
    axis.semilogy(rank, s, "o", color=COLOURS["pretrained"], markersize=2.5, label="delta")
    axis.semilogy(rank, noise, color=COLOURS["early stopping"], label="pure noise")
    edge = float(data["noise_edge"])
    axis.axhline(edge, color=COLOURS["early stopping"], linestyle="--", linewidth=0.8, label="noise edge")
    matrix = data.matrix.removesuffix(".weight").removeprefix("model.")
    axis.set(xlabel=f"rank of singular value\n({matrix})", ylabel="singular value of ΔW")
    axis.set_ylim(max(s[s > 0].min(), noise.min()) / 2, s.max() * 3)
    axis.legend(fontsize=6, loc="upper right")


def _caption(data: xr.Dataset) -> str:
    fits, s = _fits(data), data["singular_value"]
    best = [f"τ* = {f.best_tau:.2f} ± {f.best_tau_error:.2f}" if f.convex else "no minimum" for f in fits]
    residual = max(float(np.abs(fit.residuals).max()) for fit in fits)
    gain, gain_error = fits[0].gain_over_full
    whole = fit_curve(data["tau"].values, data["sums_loss"].values[0])
    return (
        f"A two-layer Llama-style model with {data.parameters:,} parameters, pretrained on stories and sums and fine-tuned "
        f"on 100 lines of sums, {data.runs} runs; all losses by transformers on held-out text, characters as tokens, seed {data.seed}. "
        f"(a) Change of held-out loss of θ_τ from the base (paired one-standard-error bars), for one run and for the average of all; "
        f"curves: quadratic fit near the minimum, largest residual {residual:.2g} nats. One run: {best[0]}, which gains "
        f"{gain:.3f} ± {gain_error:.3f} nats over τ = 1; average of {data.runs}: {best[1]}. "
        f"A quadratic through all τ misses one run by up to {np.abs(whole.residuals).max():.2g} nats (p = {whole.p_value:.1g}). "
        "Sizes and learning rate were chosen after trying three settings, so that a single run overadapts visibly; errors are "
        "over held-out windows, not over training runs. "
        "(b) Share of the delta that is signal: the energy of the mean delta kept by optimal shrinkage of singular values (circles), and the "
        "shrinkage of the average that the agreement of the runs suggests (squares). The two see different noise: the first "
        "only what is unstructured within a matrix, the second all that differs between runs. "
        f"(c) Singular values of one run's delta; {int((s > data['noise_edge']).sum())} of {s.size} exceed the Marchenko–Pastur edge of noise whose "
        "level comes from the median singular value. The decay below the edge is steeper than that of independent noise."
    )


def _draw_soups(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, width=PAGE, height=2.7)
    for axis, draw_panel in zip(axes, (_draw_predictions, _draw_by_number, _draw_mixtures)):
        draw_panel(axis, data)
    return panel_letters(axes)


_MARKERS = {"soup": "o", "mixed": "s", "least loss": "*", "least distance": "D"}


def _draw_predictions(axis: Axes, data: xr.Dataset) -> None:
    """Every merge: the loss of each task, predicted from the few evaluated ones, against measured."""
    both = np.concatenate([data["predicted"].values.ravel(), data["measured"].values.ravel()])
    axis.plot(*[[both.min(), both.max()]] * 2, color="0.7", linewidth=0.8, zorder=0)
    for row, colour in enumerate((TUNED_TASK, BASE_TASK)):
        for kind, marker in _MARKERS.items():
            chosen = data.isel(merge=data["kind"].values == kind, task=row)
            label = str(data["task"].values[row]) if kind == "soup" else None
            looks: dict[str, Any] = {
                "markersize": 7 if marker == "*" else 3,
                "markeredgecolor": "black",
                "markeredgewidth": 0.3,
            }
            axis.plot(chosen["predicted"], chosen["measured"], marker, color=colour, label=label, **looks)
    axis.set(xlabel="predicted held-out loss (nats)", ylabel="measured (nats)")
    axis.legend(loc="upper left")


def _by_number(data: xr.Dataset) -> xr.Dataset:
    """Over the soups of each size, the mean of both tasks' losses, and its spread."""
    soups = data[["predicted", "measured"]].isel(merge=data["kind"].values == "soup").mean("task")
    groups = soups.assign_coords(runs=("merge", data["runs"].values[data["kind"].values == "soup"])).groupby("runs")
    spread = groups.std("merge")["measured"].rename("spread")
    return xr.merge([groups.mean("merge"), spread])


def _draw_by_number(axis: Axes, data: xr.Dataset) -> None:
    found = _by_number(data)
    runs = found["runs"].values
    axis.errorbar(runs, found["measured"], found["spread"], fmt="o", color=COLOURS["pretrained"], label="measured")
    axis.plot(runs, found["predicted"], "x", color=COLOURS["ridge"], markersize=6, label="predicted")
    dense = np.linspace(runs.min(), runs.max(), 80)
    ends = found["predicted"].values[[0, -1]]
    slope = (ends[0] - ends[1]) / (1 / runs[0] - 1 / runs[-1])
    axis.plot(
        dense, ends[1] + slope * (1 / dense - 1 / runs[-1]), color=COLOURS["ridge"], linewidth=0.8, label="1/K law"
    )
    axis.set(xlabel="runs averaged, of both tasks", ylabel="loss, mean of both tasks (nats)", xticks=runs)
    axis.legend(loc="upper right")


def _draw_mixtures(axis: Axes, data: xr.Dataset) -> None:
    mixed = data.isel(merge=data["kind"].values == "mixed")
    for row, colour in enumerate((TUNED_TASK, BASE_TASK)):
        one = mixed.isel(task=row)
        axis.plot(data["share"], one["measured"], "o", color=colour, label=str(data["task"].values[row]))
        axis.plot(data["share"], one["predicted"], color=colour, linewidth=1)
    axis.set(xlabel="share of the reversals' average", ylabel="held-out loss (nats)")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.15 * (high - low))
    axis.legend(loc="upper center", ncols=2)


def _caption_soups(data: xr.Dataset) -> str:
    misses = abs(data["predicted"] - data["measured"]).isel(merge=~data["fitted"].values.astype(bool))
    ranges = [float(np.ptp(data["measured"].values[:, task])) for task in range(2)]
    told = [
        f"{name}: {float((misses[:, task] ** 2).mean() ** 0.5):.3f} rms and {float(misses[:, task].max()):.3f} at most, of a range of {ranges[task]:.2f}"
        for task, name in enumerate(data["task"].values)
    ]
    measured = {
        kind: float(data["measured"].values[data["kind"].values == kind].mean())
        for kind in ("least loss", "least distance")
    }
    plain = float(data["measured"].values[(data["runs"].values == 8) & (data["kind"].values == "soup")].mean())
    inside = "inside" if data.predicted_best_low <= measured["least loss"] <= data.predicted_best_high else "outside"
    cosines, by_number = data["cosine"].values, _by_number(data)
    size = abs(by_number["predicted"] - by_number["measured"])
    return (
        f"Eight fine-tunings of one small Llama-style model: two tasks (sums and reversals) × two splits of the data × two seeds, seed {data.seed}. "
        f"`linfit plan` fits a quadratic form to the losses of {data.evaluations} merges (the base, both tasks' averages, half of each, all runs' average, "
        f"one run), and predicts all other merges before they are written and evaluated on {data.lines} held-out lines of each task. "
        f"(a) {data.sizes['merge']} merges, {int(data['fitted'].sum())} of them fitted, the others predicted: circles soups, squares mixed merges, star the weights of least loss, "
        f"diamond those of least Euclidean distance; misses of predictions in nats, {'; '.join(told)}. "
        f"(b) Soups of K runs drawn from all eight: mean and standard deviation over soups, crosses what is predicted of the same soups, line what a form predicts of all soups on average, linear in 1/K; the mean misses by {float(size.max()):.3f} nats at most. "
        f"(c) Merges of the two tasks' averages; lines predicted. "
        f"The weights of least loss were predicted to reach {data.predicted_best:.3f} nats ({data.predicted_best_low:.3f} to {data.predicted_best_high:.3f}) "
        f"in the mean of both tasks and reach {measured['least loss']:.3f}, {inside} the interval; the plain average of all has {plain:.3f}, the weights of "
        f"least distance {measured['least distance']:.3f}. The interval knows the spread over prompts only: with as many evaluations as numbers the form itself "
        f"goes untested. Two seeds on one split have cosines of {cosines[[0, 2, 4, 6], [1, 3, 5, 7]].mean():.2f}, "
        f"two splits {cosines[[0, 0, 1, 1, 4, 4, 5, 5], [2, 3, 2, 3, 6, 7, 6, 7]].mean():.2f}, two tasks {cosines[:4, 4:].mean():.2f}; "
        f"{len(json.loads(data.redundant))} of the 4 pairs of seeds on one split are reported as redundant: they are no independent samples of the data."
    )


# Pictures of a user's own models: `linfit inspect --plot`, `linfit curve --plot` and `linfit predict --out`.


def draw_inspection(inspection: Inspection, path: Path) -> None:
    """Layers × quantity: relative norm, signal share and, for several runs, the suggested τ, one dot per tensor."""
    quantities = {
        "relative_norm": "‖ΔW‖/‖W‖",
        "signal_share": "signal share",
        "overlap": "overlap with base",
        "suggested_tau": "suggested τ (one run)",
    }
    tensors = [tensor for tensor in inspection.tensors if tensor.signal_share is not None] or inspection.tensors
    shown = [name for name in quantities if any(getattr(tensor, name) is not None for tensor in tensors)]
    kinds = sorted({tensor.kind: None for tensor in tensors}, key=lambda kind: ("*" in kind, kind))
    figure, axes = canvas(len(shown), width=PAGE, height=max(2.0, 0.16 * len(kinds) + 1.0), sharey=True)
    with mpl.rc_context(SETTINGS):
        for axis, name in zip(axes, shown):
            for row, kind in enumerate(kinds):
                group = [tensor for tensor in tensors if tensor.kind == kind]
                if name == "overlap":
                    chance = max(tensor.overlap_by_chance or 0 for tensor in group)
                    axis.barh(row, chance, height=0.7, color="0.9", zorder=0)
                values = [value for tensor in group if (value := getattr(tensor, name)) is not None]
                shades = np.linspace(0.35, 1.0, len(values)) if len(values) > 1 else [0.8]
                at = [row] * len(values)
                axis.scatter(values, at, s=14, c=shades, cmap="Blues", vmin=0, vmax=1, edgecolors="0.3", linewidths=0.3)
            axis.grid(axis="y", color="0.9", linewidth=0.5)
            largest = max(tensor.relative_norm for tensor in tensors) if name == "relative_norm" else 1
            axis.set(axisbelow=True, xlim=(0, 1.06 * (largest or 1)), xlabel=quantities[name])
        axes[0].set_yticks(range(len(kinds)), [_short(kind) for kind in kinds], fontsize=6)
        axes[0].invert_yaxis()
        names = ", ".join(Path(each).name for each in inspection.tuned)
        title = f"{Path(inspection.base).name} → {names}: one dot per tensor, darker = later layer"
        title += "; grey bars: overlap by chance" if "overlap" in shown else ""
        figure.suptitle(fill(title, 120), fontsize=7)
        figure.savefig(path)


def draw_curves(fits: Mapping[str, Curve], path: Path) -> None:
    """Each metric along τ with its fit, the best τ and its error."""
    figure, axes = canvas(len(fits), width=COLUMN * len(fits), height=2.8)
    with mpl.rc_context(SETTINGS):
        for axis, (metric, fit) in zip(axes, fits.items()):
            sign, better = (-1, "larger") if fit.maximize else (1, "smaller")
            values, errors = sign * fit.values, fit.standard_errors
            axis.errorbar(fit.taus, values, errors, fmt="o", color=COLOURS["pretrained"], label="evaluated")
            dense = np.linspace(min(0, fit.taus.min()), max(1, fit.taus.max()), 200)
            axis.plot(dense, sign * fit(dense), color=COLOURS["ridge"], label="quadratic fit")
            best, error = fit.best_tau, fit.best_tau_error
            if fit.convex:
                axis.axvline(best, color=COLOURS["ensemble"], linewidth=1, label=f"τ* = {best:.2f} ± {error:.2f}")
                if np.isfinite(error):
                    axis.axvspan(best - error, best + error, color=COLOURS["ensemble"], alpha=0.2, linewidth=0)
            verdict = fill(fit.verdict.replace(" = ", "\u00a0=\u00a0"), 46)
            axis.set(xlabel=f"ensemble coefficient τ\n{verdict}", ylabel=f"{metric}\n({better} is better)")
            axis.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, columnspacing=1.0, handlelength=1.5)
        figure.savefig(path)


def draw_plan(plan: Plan, path: Path) -> None:
    """Cosines of the deltas, expected gain by number of runs, and the sum of weights of each group of tensors."""
    several = len(set(plan.tasks)) > 1
    names = [
        _shortened(Path(run).name) + (f" ({task})" if several else "") for run, task in zip(plan.tuned, plan.tasks)
    ]
    figure, axes = canvas(3, width=PAGE, height=2.6)
    with mpl.rc_context(SETTINGS):
        _draw_cosines(axes[0], plan.cosines, names)
        _draw_gains(axes[1], plan)
        at, taus = np.arange(len(plan.groups)), [group.tau for group in plan.groups]
        reach = np.array([[tau.value - tau.low, tau.high - tau.value] for tau in taus]).T
        axes[2].errorbar([tau.value for tau in taus], at, xerr=reach, fmt="o", color=COLOURS["ridge"], capsize=2)
        axes[2].set_yticks(at, [group.group for group in plan.groups])
        axes[2].set(xlabel="sum of weights", ylim=(len(at) - 0.5, -0.5), xlim=(-0.05, 1.1))
        panel_letters(axes)
        figure.savefig(path)


def _shortened(name: str) -> str:
    """The end of a long name, which tells runs apart."""
    return name if len(name) <= 14 else f"…{name[-13:]}"


def _draw_cosines(axis: Axes, cosines: np.ndarray, names: list[str]) -> None:
    image = axis.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    for (row, column), value in np.ndenumerate(cosines):
        colour = "white" if abs(value) > 0.6 else "black"
        axis.text(
            column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=max(3.5, 8 - len(names) / 2)
        )
    size = max(4.0, 7 - len(names) / 4)
    axis.set_xticks(range(len(names)), map(str, range(1, len(names) + 1)), fontsize=size)
    axis.set_yticks(range(len(names)), [f"{name}  {row}" for row, name in enumerate(names, 1)], fontsize=size)
    axis.figure.colorbar(image, ax=axis, shrink=0.7, label="cosine of the deltas")


def _draw_gains(axis: Axes, plan: Plan) -> None:
    known = [gain for gain in plan.gains if np.isfinite(gain.runs)]
    runs, share = [gain.runs for gain in known], [gain.share for gain in known]
    axis.plot(runs, [each.value for each in share], "o-", color=COLOURS["ridge"], label="expected")
    low, high = [each.low for each in share], [min(each.high, 1.0) for each in share]
    axis.fill_between(runs, low, high, color=COLOURS["ridge"], alpha=0.2, linewidth=0, label="interval")
    axis.axhline(plan.gains[-1].share.value, color="0.5", linewidth=0.8, linestyle="--", label="without end")
    axis.axvline(max(map(plan.tasks.count, plan.tasks)), color="0.8", linewidth=0.8, zorder=0)
    each = "runs averaged" if len(set(plan.tasks)) == 1 else "runs of each task"
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks := [2**k for k in range(int(np.log2(max(runs))) + 1)], map(str, ticks))
    axis.set(xlabel=each, ylabel="gain over one run / ‖Δ‖²")
    axis.set_ylim(0, None)
    axis.legend(loc="lower right")


def draw_prediction(prediction: LanguagePrediction, path: Path) -> None:
    """Mean loss along τ of every data set: predicted, of the network on the predicted step, and of a real run."""
    figure, axes = canvas(len(prediction.curves), width=max(COLUMN, 2.5 * len(prediction.curves)), height=2.8)
    best, taus = prediction.summary()["best_tau"], prediction.taus
    fine = np.linspace(taus[0], taus[-1], 200)
    with mpl.rc_context(SETTINGS):
        for axis, (name, curves) in zip(axes, prediction.curves.items()):
            predicted = curves.linear.mean(axis=1)
            axis.plot(fine, CubicSpline(taus, predicted)(fine), color=COLOURS["ridge"], label="predicted")
            on_step = [predicted[0], *curves.network.mean(axis=1)]
            axis.plot((0, 0.5, 1), on_step, "x", color=COLOURS["early stopping"], label="network on predicted step")
            if curves.real is not None and curves.realised is not None:
                axis.plot(taus, curves.real.mean(axis=1), "o", color=COLOURS["pretrained"], label="real run")
                along = curves.realised.mean(axis=1)
                axis.plot(taus, along, ":", color=COLOURS["oracle"], label="first order along the real step")
            axis.axvline(best.value, color=COLOURS["ensemble"], linewidth=1, label=f"predicted τ* = {best.value:.2f}")
            axis.axvspan(best.low, best.high, color=COLOURS["ensemble"], alpha=0.15, linewidth=0)
            axis.set(xlabel="ensemble coefficient τ", title=fill(name, 30))
        axes[0].set_ylabel("held-out loss (nats per token)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if len(axes) > 1 else 2)
        figure.savefig(path)
