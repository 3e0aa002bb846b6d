"""Merges of runs: the law of soups, the best weights of mixed merges, and what dropping, trimming and electing do (docs, K1–K3)."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace as Setting
from typing import Any

import jax
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from figures.style import COLOURS, FORGETTING, Picture, bars, canvas, panel_letters, readable_ticks, seed_of
from linfit import MinNorm, Ridge
from linfit.merges import MergeForm
from sims.estimate import mean_and_error
from sims.merges import METHODS, merged_moves, risks, sample_moves, similar_tasks, soup_risks
from theory.merges import Run, elected, form, trimmed

__all__ = ["pictures"]

FULL = Setting(n=150, p=500, replicates=200, counts=(1, 2, 3, 4, 6, 8, 12, 16), similarities=9, cells=7)
QUICK = Setting(n=50, p=150, replicates=40, counts=(1, 2, 4, 8), similarities=5, cells=4)

LOOKS = {
    "averaged": ("#000000", "o", "-"),
    "dropped (DARE)": ("#E69F00", "v", "--"),
    "trimmed": ("#0072B2", "s", "-"),
    "elected (TIES)": ("#D55E00", "D", "-"),
}
"""Colour, marker and line of each of `sims.merges.METHODS`."""
PLACES = {"eigen": "in the eigenbasis", "generic": "in generic coordinates"}
SHARE = 0.4
"""Of the plane: dropped by DARE, kept by the others."""
KEEPS = (0.03, 0.1, 0.3, 1.0)
"""Shares among which the map takes the best."""


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of merges."""
    setting, seed, keys = QUICK if quick else FULL, seed_of(key), jax.random.split(key, 3)
    data = _soups(keys[0], setting).assign_attrs(seed=seed)
    yield Picture("soup_law", "The law of soups", data, _draw_soups, _caption_soups)
    data, title = _similar(keys[1], setting).assign_attrs(seed=seed), "When does a run of another task help?"
    yield Picture("merge_similarity", title, data, _draw_similar, _caption_similar)
    data, title = _plane(keys[2], setting).assign_attrs(seed=seed), "Ways to merge, on one plane"
    yield Picture("merge_methods", title, data, _draw_plane, _caption_plane)
    data, title = _map(setting), "Where trimming and electing beat averaging"
    yield Picture("merge_map", title, data, _draw_map, _caption_map)


def _soups(key: Array, setting: Setting) -> xr.Dataset:
    s, filters = np.arange(1.0, setting.p + 1) ** -1, {"min-norm": MinNorm(), "ridge": Ridge(0.02)}
    parts = [
        soup_risks(
            key, Run(0, s, setting.n, 0.7, filter), similar_tasks(s, 0.0, -0.5), s, setting.counts, setting.replicates
        )
        for filter in filters.values()
    ]
    bounds = xr.DataArray([part.lower_bound for part in parts], dims="filter")
    data = xr.concat(parts, xr.Variable("filter", list(filters)), combine_attrs="drop_conflicts")
    return data.assign(lower_bound=bounds).assign_attrs(n=setting.n, p=setting.p)


def _draw_soups(data: xr.Dataset) -> Figure:
    _, axes = canvas(2)
    for filter, marker in zip(data["filter"].values, "os", strict=True):
        part, colour = data.sel(filter=filter), COLOURS[filter]
        for name, fill, line in (("plain", colour, "-"), ("best", "white", "--")):
            axes[0].plot(part["count"], part[f"{name}_predicted"], line, color=colour)
            label = f"{filter}, " + (R"$\tau = 1$" if name == "plain" else R"best $\tau$")
            bars(axes[0], part, name, fmt=marker, color=colour, markerfacecolor=fill, label=label)
        axes[0].axhline(float(part.lower_bound), color=colour, linestyle=":", linewidth=0.9)
        axes[1].plot(part["count"], part.tau, f"{marker}-", color=colour, label=filter)
    axes[0].set(ylabel=R"fine-tuning risk $R_\mathrm{ft}$ of the average")
    axes[1].set(ylabel=R"best ensemble coefficient $\tau^*$")
    axes[1].axhline(1, color="black", linewidth=0.6, linestyle=":")
    for axis in axes:
        axis.set(xscale="log", xlabel="number of runs $K$")
        axis.set_xticks(data["count"].values, [str(count) for count in data["count"].values])
        axis.minorticks_off()
    axes[0].legend(loc="upper right")
    axes[1].legend(loc="lower right")
    return panel_letters(axes)


def _gap(data: xr.Dataset, names: Sequence[str]) -> str:
    """The largest relative gap of what was measured, and in standard errors."""
    gaps = [data[name] / data[f"{name}_predicted"] - 1 for name in names]
    scores = [(data[name] - data[f"{name}_predicted"]) / data[f"{name}_error"] for name in names]
    worst, score = (max(float(abs(part).max()) for part in parts) for parts in (gaps, scores))
    return f"Largest gap {100 * worst:.1f}% of the prediction, {score:.1f} standard errors, over {sum(gap.size for gap in gaps)} values"


def _caption_soups(data: xr.Dataset) -> str:
    rises = bool((data.tau.diff("count") > 0).all())
    return (
        "Averages of K runs that differ in data and label noise (a): 1/K laws onto their lower bounds (dotted, τ = 1). Lines: predicted "
        f"without sampling; points: mean of {data.replicates} simulations ± one standard error, the same runs for all K. "
        f"{_gap(data, ('plain', 'best'))}. The best τ (b) {'grows' if rises else 'does not always grow'} with K. "
        f"Σ = diag(1/j), E ΔΔᵀ ∝ Σ^(−1/2) with tr ΣE ΔΔᵀ = 1, σ = 0.7, ridge λ = 0.02; n = {data.n}, p = {data.p}; seed {data.seed}."
    )


def _similar(key: Array, setting: Setting) -> xr.Dataset:
    """Two runs of the test task and one, with four times the samples, of another; best weights and risks by similarity."""
    s, n, rows = np.arange(1.0, setting.p + 1) ** -1, setting.n // 2, []
    runs = [Run(0, s, n, 0.7, Ridge(0.05)), Run(0, s, n, 0.7, Ridge(0.05)), Run(1, s, 4 * n, 0.7, Ridge(0.02))]
    lines = np.linspace(-1, 1, 41)
    points = np.linspace(-0.9, 0.9, setting.similarities)
    for similarity in lines:
        found = form(runs, similar_tasks(s, similarity, -0.5), s, 0)
        alone = found.optimal_risk() + found.gains()[2]
        best = found.optimal_weights(nonnegative=True, sum_to_one=True)
        rows.append([*found.optimal_weights()[1:], found.optimal_risk(), alone, best[2], found(best)])
    names = ("own", "other", "predicted", "without", "other_convex", "convex")
    variables: dict[str, Any] = {
        name: ("similarity", np.array(row, float)) for name, row in zip(names, zip(*rows, strict=True), strict=True)
    }
    samples = []
    for index, similarity in enumerate(points):
        targets = similar_tasks(s, similarity, -0.5)
        moves, gaps = sample_moves(jax.random.fold_in(key, index), runs, targets, setting.replicates)
        weights = np.asarray(form(runs, targets, s, 0).optimal_weights())
        samples.append(risks(np.einsum("k,rkp->rp", weights, moves), gaps[:, 0], s))
    expected = [float(form(runs, similar_tasks(s, similarity, -0.5), s, 0).optimal_risk()) for similarity in points]
    variables |= mean_and_error(np.stack(samples, axis=1), ("simulated",), "merged")
    variables["merged_predicted"] = ("simulated", np.array(expected))
    attributes = {"n": n, "p": setting.p, "replicates": setting.replicates}
    return xr.Dataset(variables, {"similarity": lines, "simulated": points}, attributes)


def _draw_similar(data: xr.Dataset) -> Figure:
    _, axes = canvas(2)
    axes[0].plot(data.similarity, data.own, color=COLOURS["ridge"], label="each of the two runs of the task")
    axes[0].plot(data.similarity, data.other, color=COLOURS["min-norm"], label="the run of the other task")
    label = "the same, weights ≥ 0 of sum 1"
    axes[0].plot(data.similarity, data.other_convex, color=COLOURS["min-norm"], linestyle="--", label=label)
    axes[0].axhline(0, color="black", linewidth=0.6)
    axes[0].set_ylabel("best weight")
    axes[0].legend(loc="lower right")
    axes[1].plot(data.similarity, data.without, color="black", linestyle=":", label="without the other task's run")
    axes[1].plot(data.similarity, data.convex, color=COLOURS["min-norm"], linestyle="--", label="weights ≥ 0 of sum 1")
    axes[1].plot(data.similarity, data.predicted, color=COLOURS["oracle"], label="best weights")
    bars(axes[1], data, "merged", color=COLOURS["oracle"])
    axes[1].set_ylabel(R"fine-tuning risk $R_\mathrm{ft}$ of the merge")
    axes[1].set_ylim(0, 1.25 * float(data.convex.max()))
    axes[1].legend(loc="lower left")
    for axis in axes:
        axis.set_xlabel("similarity of the tasks (correlation of their shifts)")
    return panel_letters(axes)


def _caption_similar(data: xr.Dataset) -> str:
    helps = data.similarity.values[(data.predicted < data.without * (1 - 1e-6)).values]
    taken = data.similarity.values[(data.other_convex > 1e-6).values]
    convex = f"above similarity {taken.min():.2g}" if taken.size else "nowhere"
    return (
        "Best weights (a) and their risk (b) of a merge of two runs of a task and one run of another with four times the samples. With free weights "
        f"the other run lowers the risk at {helps.size} of {data.similarity.size} similarities shown, with the sign of the similarity: "
        f"it helps wherever its slope is not 0. With weights ≥ 0 that sum to one it gets weight only {convex}. Points in b: mean of {data.replicates} simulations at the "
        f"predicted best weights ± one standard error. {_gap(data, ('merged',))}. Σ = diag(1/j), E ΔΔᵀ ∝ Σ^(−1/2), σ = 0.7, ridge; "
        f"n = {data.n}, p = {data.p}; seed {data.seed}."
    )


def _plane(key: Array, setting: Setting) -> xr.Dataset:
    """Mean risk on two tasks and forgetting, of four runs merged with equal weights and any factor τ."""
    s = np.exp(-4 * np.arange(setting.p) / setting.p)
    runs, targets = [Run(task, s, setting.n, 0.4, MinNorm()) for task in (0, 0, 1, 1)], similar_tasks(s, 0.5, 1.0)
    taus, shown = np.linspace(0, 2, 41), np.array([0.5, 1.0, 1.5])
    moves, gaps = sample_moves(key, runs, targets, setting.replicates)
    rotation = np.linalg.qr(np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (setting.p, setting.p))))[0]
    variables: dict[str, xr.Variable] = {}
    for place in PLACES:
        basis = rotation if place == "generic" else np.eye(setting.p)
        merged = merged_moves(jax.random.fold_in(key, 2), moves @ basis.T, SHARE)
        for name, method in METHODS.items():
            forms = [method(runs, targets, s, task, SHARE, basis=place) for task in (0, 1, None)]
            results = shown[:, None, None] * (merged[name] @ basis)
            both = 0.5 * (risks(results, gaps[:, 0], s) + risks(results, gaps[:, 1], s))
            measured = {"task": both, "forgetting": risks(results, 0 * gaps[:, 0], s)}
            lines = {"task": 0.5 * forms[0] + 0.5 * forms[1], "forgetting": forms[2]}
            for kind, found in lines.items():
                label = f"{kind}_{place}_{name}"
                at_tau = {key: _factor(found, values) for key, values in (("tau", taus), ("shown", shown))}
                variables |= mean_and_error(measured[kind].T, ("shown",), label)
                variables |= {f"{label}_line": xr.Variable("tau", at_tau["tau"])}
                variables |= {f"{label}_predicted": xr.Variable("shown", at_tau["shown"])}
    attributes = {"n": setting.n, "p": setting.p, "replicates": setting.replicates, "share": SHARE}
    return xr.Dataset(variables, {"tau": taus, "shown": shown}, attributes)


def _factor(found: MergeForm, taus: np.ndarray) -> np.ndarray:
    """The risk of equal weights τ/K."""
    count = found.linear.size
    return np.asarray(found(taus[:, None] * np.full(count, 1 / count)))


def _draw_plane(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, sharey=True, height=2.9)
    for axis, (place, title) in zip(axes, PLACES.items(), strict=True):
        for name, (colour, marker, line) in LOOKS.items():
            x, y = (f"{kind}_{place}_{name}" for kind in ("forgetting", "task"))
            axis.plot(data[f"{x}_line"], data[f"{y}_line"], line, color=colour)
            errors: dict[str, Any] = {"xerr": data[f"{x}_error"], "yerr": data[f"{y}_error"]}
            axis.errorbar(data[x], data[y], **errors, fmt=marker, color=colour, label=name, capsize=1.5)
        averaged = data[f"forgetting_{place}_averaged_line"], data[f"task_{place}_averaged_line"]
        axis.plot(averaged[0][0], averaged[1][0], "*", color="black", markersize=8)
        axis.set(title=title, xlabel=FORGETTING)
        axis.set_xlim(-0.02, 1.5 * float(averaged[0].max()))
        axis.set_ylim(0.55 * float(averaged[1].min()), 1.6 * float(averaged[1].max()))
    axes[0].set_ylabel("mean fine-tuning risk on the two tasks")
    axes[1].legend(loc="upper right", title=R"points: $\tau = 0.5, 1, 1.5$", title_fontsize=7)
    return panel_letters(axes)


def _least(data: xr.Dataset, place: str) -> str:
    least = {name: float(data[f"task_{place}_{name}_line"].min()) for name in LOOKS}
    return ", ".join(f"{name} {value:.3f}" for name, value in sorted(least.items(), key=lambda pair: pair[1]))


def _caption_plane(data: xr.Dataset) -> str:
    names = [f"{kind}_{place}_{name}" for kind in ("task", "forgetting") for place in PLACES for name in LOOKS]
    return (
        "Four runs, two on each of two tasks of similarity ½, merged with equal weights and scaled by τ from 0 (star) to 2; lines predicted, points "
        f"simulated ({data.replicates} times, bars one standard error). Least mean risk in the eigenbasis (a): {_least(data, 'eigen')}; in generic coordinates "
        f"(b): {_least(data, 'generic')}. DARE drops, the others keep, a share of {data.share:g}. {_gap(data, names)}. "
        f"Spectrum e^(−4j/p), E ΔΔᵀ ∝ Σ, σ = 0.4, min-norm; n = {data.n}, p = {data.p}; seed {data.seed}."
    )


def _map(setting: Setting) -> xr.Dataset:
    """Relative change of the least risk by trimming and by electing, over the share of coordinates a task moves, and σ."""
    p, n, count = setting.p, setting.p // 2, 3
    supports, stds = np.logspace(-1.7, 0, setting.cells), np.logspace(-1, 0.5, setting.cells)
    flat, change = np.ones(p), np.zeros((2, 2, setting.cells, setting.cells))
    for row, std in enumerate(stds):
        for column, support in enumerate(supports):
            carried = (np.arange(p) < max(1, round(support * p))).astype(float)
            targets, runs = (carried / carried.sum())[None, None], [Run(0, flat, n, std, MinNorm())] * count
            least = float(form(runs, targets, flat, 0).optimal_risk(shared_tau=True))
            for where, place in enumerate(PLACES):
                for which, method in enumerate((trimmed, elected)):
                    options = KEEPS[:-1] if method is trimmed else KEEPS
                    found = [method(runs, targets, flat, 0, keep, basis=place) for keep in options]
                    best = min(float(one.optimal_risk(shared_tau=True)) for one in found)
                    change[where, which, row, column] = best / least - 1
    coordinates = {
        "place": list(PLACES),
        "estimator": ["trimmed", "elected (TIES)"],
        "noise_std": stds,
        "support": supports,
    }
    return xr.Dataset({"change": (tuple(coordinates), change)}, coordinates, {"n": n, "p": p, "runs": count})


def _draw_map(data: xr.Dataset) -> Figure:
    figure, axes = canvas(2, 2, sharex=True, sharey=True, height=2.3)
    reach = max(1.0, 100 * float(abs(data.change).max()))
    norm = TwoSlopeNorm(0, -reach, reach)
    panels: list[tuple[str, str, Axes]] = []
    for index, place in enumerate(data.place.values):
        panels += [(place, method, axes[2 * index + at]) for at, method in enumerate(data.estimator.values)]
    for place, method, axis in panels:
        part = 100 * data.change.sel(place=place, estimator=method)
        mesh = axis.pcolormesh(data.support, data.noise_std, part, cmap="RdBu_r", norm=norm, shading="nearest")
        if float(part.min()) < 0 < float(part.max()):
            axis.contour(data.support, data.noise_std, part, [0], colors="black", linewidths=1)
        axis.set(xscale="log", yscale="log")
        axis.set_title(f"{method}, {PLACES[place]}", loc="right")
        readable_ticks(axis.xaxis, axis.yaxis)
        if place == data.place.values[-1]:
            axis.set_xlabel("share of coordinates that the task moves")
    for axis in axes[::2]:
        axis.set_ylabel(R"label noise $\sigma$")
    figure.colorbar(mesh, ax=axes, label="risk against averaging (%), each at its best $\\tau$")
    return panel_letters(axes)


def _caption_map(data: xr.Dataset) -> str:
    shares = {
        (place, method): float((data.change.sel(place=place, estimator=method) < -1e-3).mean())
        for place in data.place.values
        for method in data.estimator.values
    }
    told = "; ".join(f"{method} {PLACES[place]} {100 * share:.0f}%" for (place, method), share in shares.items())
    return (
        f"Predicted risk of a soup of {data.runs} runs, trimmed or elected at the best of the shares "
        f"{', '.join(f'{keep:g}' for keep in KEEPS)} kept (trimmed: below 1), against plain averaging, each at its best τ; blue is better, the line is equality. "
        f"Share of the cells in which the risk is more than 0.1% lower: {told}. Isotropic features, a task on equal coordinates, min-norm; n = {data.n}, p = {data.p}."
    )
