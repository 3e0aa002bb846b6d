"""The figures of the overtraining paper (2503.19206) in its two-layer linear setting, theory beside simulation."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from figures.style import Picture, bars, canvas, panel_letters, readable_ticks, seed_of
from linfit import network
from linfit.network import TwoLayer
from sims import overtraining as sims
from theory import overtraining as theory

__all__ = ["pictures"]

_START: dict[str, Any] = {"initial": 1e-3, "step_size": 0.05}
_NOISY_STEPS: dict[str, Any] = {"batch": 8, "noise_std": 0.3}
_FINETUNE_STEPS = 100
_AFTER: dict[str, Any] = {"fmt": "o-", "capsize": 0, "markersize": 2.2}
"""Looks of losses after fine-tuning, with their standard errors."""
_TASKS = {"unrelated": "unrelated task", "rotated": "rotated by 0.5 rad", "stretched": "features × 1.5"}
_TASK_COLOURS = {"unrelated": "#D55E00", "same + noise": "#0072B2", "rotated": "#009E73", "stretched": "#CC79A7"}
_SHORT = 0.4
"""Fine-tuning times up to which the second order is drawn."""
_KIND_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
_SAME_VECTORS = ("shared", "stretched", "shrunk", "removed", "permuted")


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the paper, one after the other; the quick ones are for CI and first looks."""
    size, last, count = (8, 40.0, 13) if quick else (16, 100.0, 33)
    seed, keys = {"seed": str(seed_of(key))}, jax.random.split(key, 6)
    target = sims.sample_target(keys[0], size)
    times = np.concatenate([[0.0], np.geomspace(0.5, last, count - 1)])
    times = np.unique(np.rint(times / _START["step_size"])) * _START["step_size"]  # whole steps

    rates = [0.1, 0.05, 0.02, 0.01, 0.005]
    data = sims.learning_curves(target, np.linspace(0, 40, 81), initial=_START["initial"], step_sizes=rates)
    data = data.assign_attrs(seed, step_size=_START["step_size"])
    yield Picture("singular_values", "Features, one after another", data, _draw_features, _caption_features)
    data = _perturbed(keys[1], target, times, 32 if quick else 400).assign_attrs(seed)
    yield Picture("perturbed_loss", "Progressive sensitivity", data, _draw_perturbed, _caption_perturbed)

    checkpoints, tasks = sims.pretrain(target, times, **_START), sims.sample_tasks(keys[2], target, 3 if quick else 8)
    grid: dict[str, Any] = {"step_sizes": 0.002 * 2.0 ** np.linspace(0, 6, 7 if quick else 13)}
    grid |= {"penalties": np.array([0.0, 0.3, 1.0]), "steps": _FINETUNE_STEPS}
    data = sims.fine_tuned_losses(checkpoints, times, target, tasks, **grid)
    data = data.sel(schedule="constant", drop=True).assign_attrs(seed, **_START)
    plain = _with_recursion(data.sel(penalty=0.0), target)
    yield Picture("after_fine_tuning", "Fine-tuning checkpoints", plain, _draw_after, _caption_after)
    chosen, title = data.sel(task="unrelated"), "A penalty delays the inflection"
    yield Picture("penalty_against_overtraining", title, chosen, _draw_penalised, _caption_penalised)
    gammas, levels = np.geomspace(0.01, 0.5, 120), np.linspace(0, 0.12, 25)
    turns = sims.inflection_times(data, target, gammas, levels, initial=_START["initial"])
    yield Picture("inflection_time", "Inflection time", turns, _draw_inflections, _caption_inflections)
    data = _kinds(keys[5], quick).assign_attrs(seed)
    yield Picture("task_kinds", "Which tasks overtrain", data, _draw_kinds, _caption_kinds)
    data = _rates(checkpoints, times, target, tasks, quick).assign_attrs(seed, **_START)
    yield Picture("tuned_rate", "The tuned learning rate", data, _draw_rates, _caption_rates)
    data = _tokens(keys[3], quick).assign_attrs(seed)
    yield Picture("token_budget", "Overtraining on a token budget", data, _draw_tokens, _caption_tokens)
    data = _sharpness(keys[4], quick).assign_attrs(seed)
    yield Picture("sharpness_and_forgetting", "Sharpness against forgetting", data, _draw_sharpness, _caption_sharpness)


def _setting(data: xr.Dataset) -> str:
    return (
        f"Gradient descent on ½‖W₁W₂ − A‖²_F from balanced aligned weights, m = h = k = {data.attrs['size']}, a_i = 1/i, "
        f"s₀ = {data.initial:g}; seed {data.seed}."
    )


def _fine_tuning_setting(data: xr.Dataset) -> str:
    return f"{_setting(data)} Fine-tuning: {data.steps} steps at a constant rate, mean of {data.draws} tasks."


def _shades(count: int) -> np.ndarray:
    """Colours for an ordered quantity, from dark to light, the lightest left out."""
    return mpl.colormaps["viridis"](np.linspace(0, 0.85, count))


def _mark(axis: Axes, time: float, height: float, colour: object) -> None:
    axis.plot(time, height, "v", color=colour, markersize=8, markeredgecolor="white", zorder=3)


def _mark_inflection(axis: Axes, curve: xr.DataArray, colour: object) -> None:
    turn = float(sims.inflection(curve))
    if 0 < turn < np.inf:
        _mark(axis, turn, float(curve.sel(time=turn)), colour)


def _noise_label(gamma: float) -> str:
    return "not perturbed" if gamma == 0 else f"γ = {gamma:g}"


def _draw_features(data: xr.Dataset) -> Figure:
    shown = (1, 2, 3, 5, 8)
    _, axes = canvas(2)
    for mode, colour in zip(shown, _shades(len(shown))):
        exact = data.exact.sel(mode=mode)
        axes[0].plot(data.time, exact, color=colour)
        points = data.measured.sel(mode=mode, step_size=data.attrs["step_size"]).isel(time=slice(None, None, 6))
        axes[0].plot(points.time, points, "o", color=colour)
        axes[0].annotate(f"$a_{mode}$", (data.time[-1], exact[-1]), (3, -2), textcoords="offset points")
    axes[0].set(xlabel="pretraining time (step size × steps)", ylabel="singular value of W")
    sizes, errors = data.step_size.values, data.error.values
    axes[1].loglog(sizes, errors, "o", color="black")
    axes[1].loglog(sizes, errors[-1] * sizes / sizes[-1], color="grey", linewidth=1)
    axes[1].annotate("∝ step size", (sizes[1], errors[1]), (-4, 8), textcoords="offset points", ha="right")
    axes[1].set(xlabel="step size", ylabel="largest |measured − closed form|")
    readable_ticks(axes[1].xaxis, axes[1].yaxis)
    return panel_letters(axes)


def _caption_features(data: xr.Dataset) -> str:
    return (
        "Features are learned one after another. (a) Singular values along pretraining; lines: gradient flow in closed form, "
        f"points: trained weights at step size {data.attrs['step_size']}. (b) The largest difference over all modes and times falls linearly "
        f"in the step size, {float(data.error[-1]):.1e} at {float(data.step_size[-1])}. {_setting(data)}"
    )


def _perturbed(key: Array, target: Array, times: np.ndarray, replicas: int) -> xr.Dataset:
    """Losses under perturbation at the checkpoints, and in closed form along a finer `line_time`."""
    times, gammas = np.unique(np.concatenate([times, np.linspace(0, 20, 41)])), np.array([0.0, 0.04, 0.08, 0.12])
    data = sims.perturbed_losses(key, target, times, gammas, replicas=replicas, **_START)
    fine, a, m = np.geomspace(0.5, times[-1], 300), jnp.linalg.svd(target, compute_uv=False), len(target)
    exact = theory.perturbed_loss(_START["initial"], a, fine, gammas[:, None], (m, m, m))
    dims = ("gamma", "line_time")
    data = data.assign(line=(dims, exact.total), sensitivity_line=(dims, exact.sensitivity))
    return data.assign_coords(line_time=fine)


def _draw_perturbed(data: xr.Dataset) -> Figure:
    _, axes = canvas(2)
    last = float(data.time[-1])
    for gamma, colour in zip(data.gamma.values, _shades(data.gamma.size)):
        curve = data.sel(gamma=gamma)
        shown = curve.isel(time=slice(1, None, 4)).assign(rise=curve.perturbed - curve.loss)
        axes[0].plot(curve.line_time, curve.line, color=colour, label=_noise_label(gamma))
        bars(axes[0], shown, "perturbed", color=colour)
        turn = float(curve.inflection_flow)
        if 0 < turn < last:
            _mark(axes[0], turn, float(np.interp(turn, curve.line_time, curve.line)), colour)
        if gamma > 0:
            axes[1].plot(curve.line_time, curve.sensitivity_line, color=colour)
            bars(axes[1], shown, "rise", "perturbed_error", color=colour)
    for axis, label in zip(axes, ("pretraining loss", "sensitivity: rise of the loss")):
        axis.set(xscale="log", xlim=(0.5, last), xlabel="pretraining time", ylabel=label)
    axes[0].legend(title="perturbation", title_fontsize=7)
    return panel_letters(axes)


def _caption_perturbed(data: xr.Dataset) -> str:
    z = data.perturbed_z.where(data.gamma > 0, drop=True)
    turns = data.inflection_flow.where(data.gamma > 0, drop=True)
    times = ", ".join(f"{time:.3g} at γ = {gamma:g}" for gamma, time in zip(turns.gamma.values, turns.values))
    growing = bool((data.sensitivity_line.diff("line_time") >= 0).all())
    return (
        "The more has been learned, the more a perturbation of fixed size destroys. (a) Loss after adding N(0, γ²) to every weight: "
        f"it turns up at the inflection (triangles, closed form), {times}. (b) The rise itself {'grows throughout' if growing else 'does not grow throughout'}. "
        f"Lines: closed form; points: trained weights, mean of {data.replicas} perturbations ± one standard error, the largest "
        f"gap to the expectation at the same weights {float(abs(z).max()):.1f} standard errors over "
        f"{z.size} (correlated) values. {_setting(data)}"
    )


def _with_recursion(data: xr.Dataset, target: Array) -> xr.Dataset:
    """With the losses of stretched features in closed form, at the rates that are shown."""
    rates = data.step_size.sel(step_size=[0.004, 0.008, 0.016, 0.064], method="nearest").values
    fine, a = np.geomspace(0.5, float(data.time[-1]), 200), jnp.linalg.svd(target, compute_uv=False)
    training_times = rates[:, None] * _FINETUNE_STEPS
    exact = theory.fine_tuning(_START["initial"], a, 1.5 * a, fine, training_times, steps=_FINETUNE_STEPS)
    dims = ("shown_rate", "line_time")
    lines = {f"{name}_line": (dims, loss) for name, loss in exact.after._asdict().items()}
    return data.assign(lines).assign_coords(shown_rate=rates, line_time=fine)


def _draw_after(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, 2, height=2.1, sharex=True)
    rates = data.shown_rate.values
    for column, (task, title) in enumerate(_TASKS.items()):
        rows, here = {"pretrain": axes[column], "finetune": axes[3 + column]}, data.sel(task=task)
        best = sims.tuned(here)
        for name, axis in rows.items():
            for rate, colour in zip(rates, _shades(len(rates))):
                style = _AFTER | {"fmt": "o" if task == "stretched" else "o-"}
                bars(axis, here.sel(step_size=rate), name, color=colour, label=f"{rate:.3g}", **style)
                if task == "stretched":
                    axis.plot(data.line_time, here[f"{name}_line"].sel(shown_rate=rate), color=colour)
                if name == "pretrain":
                    _mark_inflection(axis, here.pretrain.sel(step_size=rate), colour)
            axis.plot(best.time, best[name], color="black", linestyle=":")
            axis.plot(data.time, here[f"{name}_before"], color="grey", linewidth=1)
        rows["pretrain"].set_title(title, fontsize=8, loc="right")
        rows["pretrain"].set_ylim(0.7 * float(here.pretrain.sel(step_size=rates).min()), None)
        rows["finetune"].set(xscale="log", xlim=(0.5, float(data.time[-1])), xlabel="pretraining time")
    axes[0].set(ylabel="pretraining loss after", yscale="log")
    readable_ticks(axes[0].yaxis)
    axes[3].set_ylabel("fine-tuning loss after")
    axes[4].legend(title="learning rate", title_fontsize=7, loc="upper right")
    return panel_letters(axes)


def _caption_after(data: xr.Dataset) -> str:
    rises = {task: 100 * (curve.isel(time=-1) / curve.min("time") - 1) for task, curve in _shown_curves(data).items()}
    words = "; ".join(f"{_TASKS[task]} {_range(rise)}" for task, rise in rises.items())
    tuned = sims.tuned(data.sel(task="unrelated")).pretrain
    return (
        "Pretraining loss (upper row) and fine-tuning loss (lower row) after fine-tuning each checkpoint. Where the final pretraining loss climbs with "
        "more pretraining by more than 1% of its least value, that is catastrophic overtraining, and a triangle marks the least. The climb at the "
        f"rates shown: {words}. Lines in (c): closed recursion of the modes. Dotted: each checkpoint at the rate of its own least fine-tuning loss; on the "
        f"unrelated task its pretraining loss lies between {float(tuned.min()):.2g} and {float(tuned.max()):.2g} after any pretraining. "
        f"Grey: before fine-tuning. {_fine_tuning_setting(data)}"
    )


def _shown_curves(data: xr.Dataset) -> dict[str, xr.DataArray]:
    return {task: data.pretrain.sel(task=task, step_size=data.shown_rate.values) for task in _TASKS}


def _range(percent: xr.DataArray) -> str:
    low, high = float(percent.min()), float(percent.max())
    return f"{low:.2g} to {high:.2g}%"


def _draw_penalised(data: xr.Dataset) -> Figure:
    rate = float(data.step_size.sel(step_size=0.016, method="nearest"))
    _, axes = canvas(3, height=2.5)
    losses, titles = {"pretrain": "pretraining", "finetune": "fine-tuning"}, (*[f"rate {rate:.3g}"] * 2, "rate tuned")
    for axis, name, title in zip(axes, ("pretrain", "finetune", "pretrain"), titles):
        for penalty, colour in zip(data.penalty.values, _shades(data.penalty.size)):
            curves = data.sel(penalty=penalty)
            curve = sims.tuned(curves) if title == "rate tuned" else curves.sel(step_size=rate)
            bars(axis, curve, name, color=colour, label=f"μ = {penalty:g}", **_AFTER)
            if name == "pretrain":
                _mark_inflection(axis, curve.pretrain, colour)
        axis.set(xscale="log", xlim=(0.5, float(data.time[-1])), xlabel="pretraining time")
        axis.set(ylabel=f"{losses[name]} loss after", title=title)
    axes[2].set_yscale("log")
    readable_ticks(axes[2].yaxis)
    axes[0].legend()
    return panel_letters(axes)


def _caption_penalised(data: xr.Dataset) -> str:
    rate = float(data.step_size.sel(step_size=0.016, method="nearest"))
    fixed, tuned = data.sel(step_size=rate), sims.tuned(data)
    turns, costs = sims.inflection(fixed.pretrain).values, fixed.finetune.isel(time=-1).values
    times = ", ".join(f"{turn:.3g}" for turn in turns)
    climbs = (tuned.pretrain.isel(time=-1) / tuned.pretrain.min("time") - 1).values
    return (
        f"A penalty (μ/2)‖θ − θ_pre‖² on an unrelated task, at one learning rate: the inflection (a, triangles) is at {times} for μ = "
        f"{', '.join(f'{mu:g}' for mu in data.penalty.values)}{', later each time' if (np.diff(turns) > 0).all() else ''}; the fine-tuning loss (b) "
        f"of the last checkpoint is {', '.join(f'{cost:.2g}' for cost in costs)}. (c) With every checkpoint at the rate of its own least "
        f"fine-tuning loss the last lies {', '.join(f'{100 * climb:.2g}%' for climb in climbs)} above the least. {_fine_tuning_setting(data)}"
    )


def _proper(times: xr.DataArray) -> xr.DataArray:
    """Inflections that are neither at once nor never; NaN for the others."""
    return times.where((times > 0) & np.isfinite(times))


def _draw_inflections(data: xr.Dataset) -> Figure:
    figure, axes = canvas(3, height=2.6)
    modes, exact = (values.where(values > 0) for values in (data.mode_inflection, data.inflection))
    for index, colour in zip((0, 1, 3, 7), _shades(4)):
        axes[0].plot(data.gamma, modes.isel(mode=index), color=colour, linewidth=0.9, label=f"mode {index + 1}")
    axes[0].plot(data.gamma, exact, color="black", label="all modes")
    axes[0].set(xscale="log", yscale="log", xlabel="perturbation γ", ylabel="inflection time")
    readable_ticks(axes[0].yaxis)
    axes[0].legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)

    for marker, (task, colour) in zip("os^D", _TASK_COLOURS.items()):
        turns = data.fine_tuning_inflection.sel(task=task)
        for penalty, line, fill in ((0.0, "-", "full"), (1.0, ":", "none")):
            curve = _proper(turns.sel(penalty=penalty))
            axes[1].plot(curve.step_size, curve, line, marker=marker, fillstyle=fill, color=colour)
        label = task if bool(_proper(turns).notnull().any()) else f"{task}: none by 1%"
        axes[1].plot([], [], "-", marker=marker, color=colour, label=label)
    axes[1].plot([], [], ":", marker="o", fillstyle="none", color="black", label="with μ = 1")
    axes[1].set(xscale="log", yscale="log", xlabel="learning rate", ylabel="inflection time")
    axes[1].set_ylim(0.4, data.last_time * 1.2)
    readable_ticks(axes[1].yaxis)
    axes[1].legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)

    both = _proper(data.combined_inflection.transpose("gamma_after", "step_size"))
    norm = mpl.colors.LogNorm(0.5, data.last_time)
    axes[2].add_patch(
        Rectangle((0, 0), 1, 1, transform=axes[2].transAxes, facecolor="none", edgecolor="0.6", hatch="///", zorder=0)
    )
    mesh = axes[2].pcolormesh(data.step_size, data.gamma_after, both, cmap="viridis", norm=norm, rasterized=True)
    axes[2].set(xscale="log", xlabel="learning rate", ylabel="perturbation γ")
    figure.colorbar(mesh, ax=axes[2], label="inflection time")
    for axis, letter in zip(axes, "abc"):
        axis.annotate(f"({letter})", (-0.3, 1.05), xycoords="axes fraction", fontweight="bold")
    return figure


def _caption_inflections(data: xr.Dataset) -> str:
    free, held = (_proper(data.fine_tuning_inflection.sel(penalty=mu)) for mu in (0.0, 1.0))
    both = (free.notnull() & held.notnull()).values
    later = int((held > free).values[both].sum())
    found = [str(task) for task in data.task.values if bool(free.sel(task=task).notnull().any())]
    return (
        "When more pretraining starts to hurt. (a) Gaussian perturbation, closed form: modes alone (thin) and all together; the line ends "
        f"where no mode is worth its sensitivity. (b) Fine-tuning: found for {', '.join(found) or 'no task'}; with the penalty later in {later} of the "
        f"{int(both.sum())} cases that have both. No point where the final pretraining loss does not climb by more than 1% from its least value (a "
        "smaller climb need not be absent), or where it is least without any pretraining. (c) Both: fine-tuned to an unrelated task, then "
        f"perturbed; hatched: none within the times simulated, or at once. {_fine_tuning_setting(data)}"
    )


def _kinds(key: Array, quick: bool) -> xr.Dataset:
    """Late rises of every kind of task, from aligned and from Gaussian starts."""
    size, draws, last, count = (4, 6, 60.0, 13) if quick else (6, 40, 200.0, 33)
    target_key, task_key, start_key = jax.random.split(key, 3)
    target, rate = sims.sample_target(target_key, size), 0.05
    times = np.unique(np.rint(np.concatenate([[0.0], np.geomspace(0.5, last, count - 1)]) / rate)) * rate
    begun = network.sample_network(start_key, (size, size, size), 0.01)
    starts = {
        "aligned": sims.pretrain(target, times, initial=_START["initial"], step_size=rate),
        "Gaussian": network.descend(
            begun, target, network.constant(rate, round(last / rate)), np.rint(times / rate).astype(int)
        ),
    }
    tasks = sims.sample_kinds(task_key, target, draws)
    setting: dict[str, Any] = {"finetune_times": np.geomspace(0.05, 10, 6 if quick else 12), "step_size": 0.025}
    parts = [sims.late_rises(checkpoints, target, tasks, **setting) for checkpoints in starts.values()]
    data = xr.concat(parts, "start", combine_attrs="override").assign_coords(start=list(starts))
    return data.assign_attrs(initial=_START["initial"], step_size=rate)


def _draw_kinds(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, 2, height=2.2, sharex=True)
    groups = {"singular vectors shared": _SAME_VECTORS, "other singular vectors": ()}
    for column, (title, names) in enumerate(groups.items()):
        shown = [task for task in data.task.values if (task in _SAME_VECTORS) == bool(names)]
        for task, colour in zip(shown, _KIND_COLOURS):
            here = data.sel(task=task)
            aligned, short = here.sel(start="aligned"), here.finetune_time <= _SHORT
            bars(axes[column], aligned, "share", color=colour, fmt="o-", label=task)
            axes[column].plot(data.finetune_time[short], aligned.visible[short], "--", color=colour, linewidth=1)
            axes[2 + column].plot(data.finetune_time, np.maximum(aligned.rise, 1e-4), "o-", color=colour)
            gaussian = np.maximum(here.sel(start="Gaussian").rise, 1e-4)
            axes[2 + column].plot(data.finetune_time, gaussian, "o", fillstyle="none", color=colour)
        axes[column].set(xscale="log", ylim=(-0.06, 1.06))
        axes[column].set_title(title, fontsize=8, loc="right")
        axes[column].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes[2 + column].set(xscale="log", yscale="log", ylim=(0.7e-4, None), xlabel="fine-tuning time T")
        readable_ticks(axes[2 + column].xaxis)
    axes[0].set_ylabel("share that rises by > 1%")
    axes[2].set_ylabel("late rise, median")
    return panel_letters(axes)


def _caption_kinds(data: xr.Dataset) -> str:
    peak = data.rise.sel(start="aligned").max("finetune_time")
    never = [str(task) for task in data.task.values if float(data.rise.sel(task=task, start="aligned").max()) < 1e-6]
    most = str(peak.task[int(peak.argmax("task"))].values)
    turned = [task for task in ("R A Rᵀ", "sides") if float(peak.sel(task=task)) < 0.1 * float(peak.max())]
    rotated = (
        f" Rotations do rise, but little ({', '.join(f'{t} {100 * float(peak.sel(task=t)):.2g}%' for t in turned)})."
        if turned
        else ""
    )
    gap = float(abs(data.predicted - data.share).where(data.rise.isel(start=0) > 0.05).mean())
    return (
        "Which fine-tuning tasks overtrain: share of tasks whose pretraining loss after fine-tuning rises late in pretraining by more than 1% "
        "of its least value (upper row) and the median rise (lower row; values below 0.0001 drawn there), against the fine-tuning time. Dashed: "
        f"share for which learning some feature raises the loss to second order in T, the jump criterion, drawn for T ≤ {_SHORT}, where that order means something. Open: Gaussian "
        f"unaligned starts. Largest for {most} ({100 * float(peak.max()):.0f}%); none for {', '.join(never) or 'no kind'}.{rotated} Where the "
        f"median rise exceeds 5%, the share with D_r > 0 for the weakest feature is within {gap:.2f} of the share on average. "
        f"m = h = k = {data.attrs['size']}, a_i = 1/i, s₀ = {data.initial:g}; gradient descent, step size {data.step_size} in pretraining and "
        f"{data.finetune_step_size} in fine-tuning; {data.draws} tasks of each kind ± one standard error. Seed {data.seed}."
    )


def _rates(checkpoints: TwoLayer, times: np.ndarray, target: Array, tasks: dict[str, Array], quick: bool) -> xr.Dataset:
    """Tuned rates for a budget of one step and of many."""
    later, parts, budgets = times > 0, [], (1, 16)
    saved = jax.tree.map(lambda layer: layer[np.flatnonzero(later)], checkpoints)
    grid = np.geomspace(0.05, 2.0, 40 if quick else 160)
    for steps in budgets:
        setting: dict[str, Any] = {"step_sizes": grid, "penalties": np.zeros(1), "steps": steps}
        data = sims.fine_tuned_losses(saved, times[later], target, tasks, **setting)
        parts.append(sims.optimal_rates(data.sel(penalty=0.0, schedule="constant", drop=True)))
    return xr.concat(parts, "steps", combine_attrs="drop_conflicts").assign_coords(steps=list(budgets))


def _draw_rates(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, 2, height=2.3)
    labels = {
        "step_size": "optimal learning rate",
        "finetune": "in-domain loss after",
        "pretrain": "pretraining loss after",
    }
    for task, colour in _TASK_COLOURS.items():
        for steps, line in zip(data.steps.values, ("o-", ":")):
            curve = data.sel(task=task, steps=steps)
            for axis, name in zip(axes, labels):
                axis.plot(data.time, curve[name], line, color=colour, label=task if line == "o-" else None)
            if line == "o-":
                _mark_inflection(axes[2], curve.pretrain, colour)
        one = data.sel(task=task, steps=data.steps[0])
        clear = abs(one.degrades) > 1e-3
        axes[3].plot(one.growth.where(clear), one.degrades.where(clear), "o", color=colour)
    for axis, label in zip(axes, labels.values()):
        axis.set(xscale="log", yscale="log", xlabel="pretraining time", ylabel=label)
        readable_ticks(axis.xaxis)
    readable_ticks(axes[0].yaxis, axes[2].yaxis)
    axes[3].axhline(0, color="grey", linewidth=0.8, zorder=0)
    axes[3].axvline(0, color="grey", linewidth=0.8, zorder=0)
    axes[3].set(xlabel="change of log(rate² × sensitivity)", ylabel="change of log(degradation)")
    axes[0].legend(fontsize=6)
    return panel_letters(axes)


def _caption_rates(data: xr.Dataset) -> str:
    few, many = data.steps.values
    one = data.sel(steps=few)
    clear = abs(one.degrades) > 1e-3
    agree = ((one.growth > 0) == (one.degrades > 0)).where(clear)
    trends = ", ".join(f"{task} {float(one.trend.sel(task=task)):+.2f}" for task in _TASK_COLOURS)
    turns = {task: float(sims.inflection(one.pretrain.sel(task=task))) for task in _TASK_COLOURS}
    rising = [task for task, turn in turns.items() if np.isfinite(turn)]
    flat = float((data.pretrain.sel(steps=many).max("time") / data.pretrain.sel(steps=many).min("time")).max())
    return (
        f"Every checkpoint at the learning rate of its own least in-domain loss, for a budget of {few} step (points) and of {many} (dotted). (a) The "
        f"tuned rate; exponents of the pretraining time over the later half for {few} step: {trends}. (b) In-domain loss after tuning, paired with "
        f"(c) the pretraining loss there: with {few} step it climbs late for {', '.join(rising) or 'no task'} (triangles: the least); with {many} "
        f"it varies by a factor of at most {flat:.2g} over all checkpoints. (d) The authors' mechanism between one checkpoint and the next, {few} step: "
        "degradation should grow (up) where the tuned rate shrinks more slowly than sensitivity to noise grows (right); the signs agree in "
        f"{int(agree.sum())} of {int(clear.sum())} intervals. {_setting(data)}"
    )


def _tokens(key: Array, quick: bool) -> xr.Dataset:
    size, steps, replicas, count = (6, 900, 3, 5) if quick else (12, 12_000, 12, 13)
    target, gammas = sims.sample_target(jax.random.fold_in(key, 1), size), np.array([0.0, 0.05, 0.1, 0.15])
    budgets = np.unique(np.rint(np.geomspace(40, steps, count)).astype(int)) * 8
    setting: dict[str, Any] = {"step_size": 0.05, "scale": 0.01, "schedules": ("constant", "cosine")}
    return sims.token_budgets(key, target, budgets, gammas, replicas=replicas, **_NOISY_STEPS, **setting)


def _draw_tokens(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, sharey=True)
    for axis, schedule in zip(axes, data.schedule.values):
        for gamma, colour in zip(data.gamma.values, _shades(data.gamma.size)):
            curve = data.sel(schedule=schedule, gamma=gamma)
            bars(axis, curve, "perturbed", color=colour, fmt="o-", label=_noise_label(gamma))
            _mark_inflection(axis, curve.perturbed.rename(budget="time"), colour)
        axis.set(xscale="log", yscale="log", xlabel="pretraining tokens", title=f"{schedule} learning rate")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("pretraining loss")
    axes[0].legend()
    return panel_letters(axes)


def _caption_tokens(data: xr.Dataset) -> str:
    last = data.isel(budget=-1)
    losses, rises = last.loss.values, (last.perturbed.isel(gamma=-1) - last.loss).values
    turns = (sims.inflection(data.perturbed.rename(budget="time")) < np.inf).sum("schedule").values
    return (
        "Time as a budget of tokens, each seen once by stochastic gradient descent: pretraining loss under perturbation (triangles: the least "
        "of each, where it climbs by more than 1% after it), at a constant rate (a) and with every budget a run of its own, decayed to its end (b). "
        f"It climbs in {', '.join(f'{count} of {len(losses)}' for count in turns)} schedules for γ = {', '.join(f'{g:g}' for g in data.gamma.values)}. At the "
        f"largest budget the loss is {losses[0]:.2g} (a) and {losses[1]:.2g} (b), the rise under the largest γ {rises[0]:.3g} and {rises[1]:.3g}. m = h = k = {data.attrs['size']}, a_i = 1/i, x ~ N(0, I), label noise {data.noise_std}, batch {data.batch}, "
        f"rate {data.step_size}, initial entries N(0, {data.scale}²); mean of {data.replicas} seeds ± one standard error, the perturbation "
        f"averaged exactly. Seed {data.seed}."
    )


def _sharpness(key: Array, quick: bool) -> xr.Dataset:
    """What the pretraining schedule leaves behind: sharpness, and forgetting at matched fine-tuning loss."""
    size, steps, replicas = (6, 300, 3) if quick else (12, 4000, 12)
    target_key, task_key, run_key = jax.random.split(key, 3)
    target = sims.sample_target(target_key, size)
    task = target + sims.sample_unrelated_task(task_key, target, 0.05 * (12 / size) ** 0.5)
    rates = np.array([0.05, 0.1] if quick else [0.02, 0.03, 0.05, 0.1, 0.2])
    pretraining = _NOISY_STEPS | {"step_sizes": rates, "steps": steps, "scales": (0.3, 0.01), "replicas": replicas}
    finetuning: dict[str, Any] = {"level": 0.05, "finetune_step_size": 0.02, "finetune_steps": 3000}
    return sims.sharpness_and_forgetting(run_key, target, task, **pretraining, **finetuning)


def _draw_sharpness(data: xr.Dataset) -> Figure:
    mean, error = data.mean("replica"), data.std("replica", ddof=1) / data.sizes["replica"] ** 0.5
    _, axes = canvas(2, height=2.6)
    for schedule, marker, colour in zip(data.schedule.values, "os^", ("#D55E00", "#0072B2", "#009E73")):
        line, spread = mean.sel(schedule=schedule), error.sel(schedule=schedule)
        style: dict = {"color": colour, "marker": marker, "capsize": 1.5, "label": schedule}
        axes[0].errorbar(line.step_size, line.sharpness, spread.sharpness, **style)
        style["linestyle"] = "none"
        axes[1].errorbar(line.sharpness, line.forgetting, spread.forgetting, spread.sharpness, **style)
    axes[0].axhline(2, color="grey", linestyle="--", linewidth=1)
    axes[0].annotate("balanced: 2a₁", (data.step_size[0], 2), (0, 4), textcoords="offset points", fontsize=7)
    axes[0].set(xscale="log", xlabel="peak learning rate", ylabel="sharpness after pretraining")
    readable_ticks(axes[0].xaxis)
    axes[0].legend()
    axes[1].set(xlabel="sharpness after pretraining", ylabel="forgetting at matched fine-tuning loss")
    return panel_letters(axes)


def _correlations(data: xr.Dataset) -> str:
    mean = data.mean("replica")
    values = {
        name: xr.corr(*(mean[part].sel(schedule=name) for part in ("sharpness", "forgetting")))
        for name in data.schedule.values
    }
    return ", ".join(f"{name} {float(value):+.2f}" for name, value in values.items())


def _caption_sharpness(data: xr.Dataset) -> str:
    first, second = data.scales
    return (
        "From an unbalanced start, small or decaying rates leave the layers unbalanced, and the minimum sharp (a, largest Hessian eigenvalue "
        "by Lanczos; dashed: the least possible for this target). (b) Forgetting by the time that fine-tuning has reached the same fine-tuning "
        f"loss, {data.level}; every point is one peak rate. Correlation of sharpness and forgetting over the rates: {_correlations(data)}. Checkpoints "
        f"of the constant rate still carry gradient noise, which fine-tuning removes: their forgetting is lower for that reason too. m = h = k = {data.attrs['size']}, "
        f"a_i = 1/i, initial entries N(0, {first}²) and N(0, {second}²), {data.steps} steps of batch {data.batch}, label noise "
        f"{data.noise_std}; fine-tuned by gradient descent to A plus independent entries; mean of {data.sizes['replica']} seeds ± one standard "
        f"error. Seed {data.seed}."
    )
