"""All methods of the four papers: equivalent coefficients, the plane of both risks, and which method suits which problem."""

from collections.abc import Iterator
from types import SimpleNamespace as Setting
from typing import Any

import jax
import numpy as np
import scipy.optimize
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.style import COLOURS, FORGETTING, TASK, Picture, bars, canvas, panel_letters, readable_ticks, seed_of
from sims import compare as sims
from sims.compare import ENSEMBLES, METHODS, Samples
from theory.frontier import smoothing_coefficient

__all__ = ["pictures"]

_FULL = Setting(n=100, p=300, tasks=64, validation=32, features=20, ratios=(3, 4, 6, 10, 20, 50), replicates=128)
_QUICK = Setting(n=30, p=90, tasks=8, validation=8, features=10, ratios=(4, 10, 50), replicates=24)
"""Sizes of a run: features of the least-squares fits, and their samples per feature."""

_MORE_DATA = "something left of pretraining"
_HOW_FAR = "early stopping, ridge, L1 to init, low rank, random sub-nets, dropout, adversarial, sharpness-aware"
_AVERAGING = "min-norm + ensemble, ridge + ensemble, FLOW + ensemble, emulated, layer dropping"
_GROUPS = {
    "the two ends": ("#000000", "o", ("pretrained", "min-norm")),
    "how far to move": (COLOURS["ridge"], "s", tuple(_HOW_FAR.split(", "))),
    "averaging": (COLOURS["ensemble"], "D", tuple(_AVERAGING.split(", "))),
    "other weights or targets": ("#009E73", "^", ("FLOW", "S3FT", "smooth weights", "self-distillation")),
    _MORE_DATA: ("#D55E00", "P", ("replay", "EWC", "several anchors")),
}
"""Methods of a kind share colour and marker; the last group sees more than the fine-tuning data and θ₁."""
_STYLE = {name: (colour, marker) for colour, marker, names in _GROUPS.values() for name in names}
_COLOURS = dict(zip(ENSEMBLES, ("#CC79A7", "#0072B2", "#56B4E9", "#009E73", "#E69F00"), strict=True))
_KNOBS = {"S3FT": "c/√v", "clipped targets": "c/√v", "FLOW": "T/v", "trimming": "c/√v"}
_NOISE_STD, _TAU = 0.5**0.5, 0.5
_LAWS = {"rademacher": "o", "student": "s", "gaussian": "x"}
_PLANES = ("isotropic shift, low noise", "head shift, high noise")
_GOALS = {"both": R"$R_\mathrm{ft} + R_\mathrm{pre}$", "finetune": R"$R_\mathrm{ft}$ alone"}


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """Where methods are an ensemble and where not, the planes, and the ranked tables."""
    setting, seed, keys = _QUICK if quick else _FULL, seed_of(key), jax.random.split(key)
    title = "Methods that are an ensemble in disguise"
    data = _equivalents(keys[0], setting).assign_attrs(seed=seed)
    yield Picture("equivalent_coefficients", title, data, _draw_equivalents, _caption_equivalents)
    n, p, tasks, validation = setting.n, setting.p, setting.tasks, setting.validation
    problems = sims.compared_problems(p)
    samples = {name: sims.measure(keys[1], problem, n, validation + tasks) for name, problem in problems.items()}
    sizes = {"n": n, "p": p, "tasks": tasks, "validation": validation, "seed": seed}
    data = _planes(samples, validation).assign_attrs(sizes)
    yield Picture("methods_plane", "Every method in one plane", data, _draw_planes, _caption_planes)
    data = _tables(samples, validation).assign_attrs(sizes)
    yield Picture("methods_table", "Which method suits which problem", data, _draw_tables, _caption_tables)


def _equivalents(key: Array, setting: Setting) -> xr.Dataset:
    """Equivalent τ of each method: against its own knob, with fewer samples, under other laws, stopped early."""
    features, rows = setting.features, setting.ratios[-1] * setting.features
    problem, sizes = sims.spread_problem(features), {"replicates": setting.replicates, "rows": rows}
    standardised, v, shown = np.logspace(-1.5, 1.5, 91), 1 + _NOISE_STD**2, np.array([0.2, 0.6, 1.2, 2.0])
    unit = {name: v if name == "FLOW" else v**0.5 for name in _KNOBS}

    def predicted(at: np.ndarray) -> np.ndarray:
        taus = (ENSEMBLES[name].tau(at * unit[name], 1.0, _NOISE_STD) for name in _KNOBS)
        return np.stack([np.broadcast_to(tau, at.shape) for tau in taus])

    fitted = sims.equivalent_coefficients(key, problem, rows, {k: shown * unit[k] for k in _KNOBS}, **sizes)
    tau, error = fitted.tau.values, fitted.tau_error.values
    variables = {
        "tau_theory": (("disguise", "knob"), predicted(standardised)),
        "tau_smoothing": ("knob", np.where(standardised < 1, smoothing_coefficient(standardised), np.nan)),
        "tau_points": (("disguise", "shown"), tau),
        "tau_points_error": (("disguise", "shown"), error),
    }
    along_knobs = xr.Dataset(variables, {"disguise": list(_KNOBS), "knob": standardised, "shown": shown})
    knobs = {name: sims.knob_at(name, _TAU, 1.0, _NOISE_STD) for name in ENSEMBLES}
    runs = [sims.equivalent_coefficients(key, problem, r * features, knobs, **sizes) for r in setting.ratios]
    along_size = xr.concat(runs, xr.Variable("ratio", list(setting.ratios)), combine_attrs="override")
    cases = [(law, concentrated) for concentrated in (True, False) for law in ("rademacher", "student")]
    cases.append(("gaussian", False))
    labels = [f"{law.title()}, {'one coordinate' if concentrated else 'all alike'}" for law, concentrated in cases]
    beds = [(law, sims.spread_problem(features, concentrated)) for law, concentrated in cases]
    runs = [sims.equivalent_coefficients(key, bed, rows // 2, knobs, law=law, **sizes) for law, bed in beds]
    along_law = xr.concat(runs, xr.Variable("case", labels), combine_attrs="override")
    parts = [
        data.isel(setting=0).rename({name: f"{name}_{ending}" for name in data})
        for data, ending in ((along_size, "along_size"), (along_law, "along_law"))
    ]
    paths = sims.population_paths(features, np.logspace(-2, 5, 141))
    worst = float(abs((tau - predicted(shown)) / error).max())
    data = xr.merge([along_knobs, *parts, paths], combine_attrs="drop", compat="no_conflicts")
    return data.assign_attrs(sizes, features=features, n_along_law=rows // 2, largest_gap=worst)


def _draw_equivalents(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, 2, height=2.5)
    for axis, draw in zip(axes, (_draw_along_knobs, _draw_along_size, _draw_along_law, _draw_paths), strict=True):
        draw(axis, data)
    return panel_letters(axes)


def _draw_along_knobs(axis: Axes, data: xr.Dataset) -> None:
    for name, knob in _KNOBS.items():
        colour, chosen = _COLOURS[name], data.sel(disguise=name)
        axis.plot(data.knob, chosen.tau_theory, color=colour, label=f"{name}, {knob}")
        bars(axis, chosen, "tau_points", color=colour)
    axis.plot(data.knob, data.tau_smoothing, color=_COLOURS["ensemble"], label="label smoothing, α")
    axis.set(xscale="log", ylim=(-0.03, 1.45), yticks=[0, 0.25, 0.5, 0.75, 1])
    axis.set(xlabel="knob, in units of the residuals", ylabel=R"equivalent coefficient $\tau$")
    axis.legend(ncols=2, loc="upper left", fontsize=6.5)


def _draw_along_size(axis: Axes, data: xr.Dataset) -> None:
    for name in ENSEMBLES:
        looks = {"color": _COLOURS[name], "fmt": "o-", "label": name}
        bars(axis, data.sel(estimator=name), "finetune_along_size", "finetune_error_along_size", **looks)
    axis.axhline((1 - _TAU) ** 2, color="#555555", linestyle=":", linewidth=1, label=R"bias, $(1-\tau)^2$")
    axis.set(xscale="log", xlabel="samples per feature, n/p", ylabel=R"$R_\mathrm{ft}$ of the fit")
    axis.set_xticks(data.ratio, labels=[f"{r:g}" for r in data.ratio.values])
    axis.minorticks_off()
    axis.legend(fontsize=6.5)


def _draw_along_law(axis: Axes, data: xr.Dataset) -> None:
    rows = np.arange(len(ENSEMBLES))[::-1]
    for place, case in enumerate(data["case"].values):
        law, concentrated = case.split(",")[0].lower(), "one coordinate" in case
        points, fill = data.sel(case=case, estimator=list(ENSEMBLES)), "full" if concentrated else "none"
        colour = "#000000" if law == "gaussian" else "#D55E00" if concentrated else "#0072B2"
        looks = {"fmt": _LAWS[law], "color": colour, "fillstyle": fill, "label": case, "capsize": 1.5}
        heights = rows + 0.28 - 0.14 * place
        axis.errorbar(points.tau_along_law, heights, xerr=points.tau_error_along_law, **looks)
    axis.plot([_TAU, _TAU], [-0.5, len(rows) - 0.4], color="#555555", linestyle=":", linewidth=1)
    axis.set_yticks(rows, labels=list(ENSEMBLES))
    axis.set(xlabel=R"fitted $\tau$ (predicted: ½)", ylim=(-0.5, len(rows) + 1.2))
    axis.legend(ncols=2, loc="upper center", fontsize=6, handletextpad=0.2, columnspacing=0.8)


def _draw_paths(axis: Axes, data: xr.Dataset) -> None:
    for line in data.line.values:
        tau, angle = data.path.sel(line=line)
        colour = _COLOURS["FLOW"] if line.startswith("FLOW") else "#D55E00"
        axis.plot(tau, angle, "--" if line.endswith("flat") else "-", color=colour, label=line)
    axis.set(xlabel=R"coefficient $\tau$ reached", ylabel="angle to the segment [°]")
    axis.set_ylim(-2, 1.45 * float(data.path.sel(coordinate="angle").max()))
    axis.legend(fontsize=6.5, ncols=2, loc="upper center", columnspacing=0.8)


def _caption_equivalents(data: xr.Dataset) -> str:
    few = data.tau_along_size.sel(estimator="FLOW").isel(ratio=0)
    return (
        "Methods that are an ensemble in disguise. (a) In the Gaussian population FLOW, S3FT, clipped targets and dropping hard "
        "samples all end on the segment between pretrained and fine-tuned optimum; lines: the equivalent τ against their own knob "
        "(label smoothing towards own predictions: τ = 1 − α for any data; v: residual variance of the pretrained "
        f"model; σ² = v/3); points: fitted on {data.rows} samples of {data.features} features, at most {data.largest_gap:.1f} standard errors off. (b) All tuned to τ = ½, fewer samples: the same bias (dotted) but not "
        "the same variance; an average of the plain fit is the least noisy of them, S3FT and trimming are the noisiest. (With few "
        f"samples FLOW overshoots: its fitted τ is {few.item():.2f} at {few.ratio.item()} per feature.) (c) The "
        "fitted τ for coordinates that are Gaussian, ±1 (Rademacher) or heavy-tailed (Student, 8 degrees of freedom), n = "
        f"{data.n_along_law}, the shift in one coordinate or spread over all: S3FT and clipping need Gaussian residuals, which a shift "
        "over many coordinates brings about; FLOW needs Gaussian noise only (it and trimming miss ½ a little by the finite sample, "
        "whatever the law). (d) Gradient flow stopped early on population losses: the angle to the segment against the τ reached, "
        "unweighted (and Huber, whose path is the same in slower time) and FLOW at the median temperature. Both stay on the segment if "
        "the spectrum is flat; otherwise they start away from it and reach it only at their end, τ = 1 and FLOW's fixed point. "
        f"Bars: ± one standard error over {data.replicates} draws. Σ = diag(1/j) unless flat, ‖δ‖²_Σ = 1, σ² = ½; seed {data.seed}."
    )


def _planes(samples: dict[str, Samples], validation: int) -> xr.Dataset:
    """Both risks of every method on two problems, and the frontier."""
    runs = []
    for problem in _PLANES:
        edge = sims.frontier(samples[problem], np.logspace(-3, 3, 121), validation)
        edge = edge.rename(finetune="frontier_finetune", pretrain="frontier_pretrain")
        runs.append(sims.rank(samples[problem], validation=validation).merge(edge))
    return xr.concat(runs, xr.Variable("problem", list(_PLANES)), combine_attrs="drop", join="outer")


def _draw_planes(data: xr.Dataset) -> Figure:
    figure, axes = canvas(2, height=4.6)
    for axis, problem in zip(axes, data.problem.values, strict=True):
        chosen = data.sel(problem=problem)
        edge = chosen.frontier_pretrain, chosen.frontier_finetune
        axis.plot(*edge, color="#555555", linewidth=1.2)
        axis.fill_between(*edge, 1e-6, color="#555555", alpha=0.12, linewidth=0)
        inside = _near(chosen)
        for name in chosen.estimator.values[inside]:
            point, (colour, marker) = chosen.sel(estimator=name), _STYLE[name]
            both = (point.pretrain, point.finetune, point.finetune_error, point.pretrain_error)
            looks = {"elinewidth": 0.6, "ecolor": (*to_rgb(colour), 0.3), "markeredgecolor": "white"}
            axis.errorbar(*both, fmt=marker, color=colour, markersize=5, markeredgewidth=0.4, **looks)
        axis.set(xscale="log", yscale="log", title=problem)
        for quantity, limit in (("pretrain", axis.set_xlim), ("finetune", axis.set_ylim)):
            shown, error = (chosen[name][inside] for name in (quantity, f"{quantity}_error"))
            limit(0.93 * float((shown - error).min()), 1.07 * float((shown + error).max()))
        readable_ticks(axis.xaxis, axis.yaxis)
        axis.set_xlabel(FORGETTING)
        _name_points(axis, chosen.isel(estimator=inside), chosen.isel(estimator=~inside))
    axes[0].set_ylabel(TASK)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=group)
        for group, (colour, marker, _) in _GROUPS.items()
    ]
    spaces = {"fontsize": 6.5, "handletextpad": 0.1, "columnspacing": 1.0}
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **spaces)
    return panel_letters(axes)


def _caption_planes(data: xr.Dataset) -> str:
    return (
        "Every method at its own best hyperparameters in the plane of both risks (lower left is better). Line: the Pareto frontier "
        "of the same shifts, what weights could reach that knew both covariances and the shift; nothing can be in the shade below "
        f"it. Methods with a risk beyond 1.5 times the median, or below 1/1.5 of it, stand in the lists. {_tuning(data, 'R_ft + R_pre')} Bars ± one standard error over {data.tasks} tasks, mostly smaller than the points. "
        f"{_problem_text(data)} Seed {data.seed}."
    )


def _near(data: xr.Dataset) -> np.ndarray:
    """Which methods have both risks within a factor of 1.5 of the median."""
    ratios = np.stack([data[name] / data[name].median() for name in ("finetune", "pretrain")])
    return np.all(abs(np.log(ratios)) < np.log(1.5), axis=0)


def _name_points(axis: Axes, data: xr.Dataset, outside: xr.Dataset) -> None:
    """Names in a column at the right, in the order of the points' heights, each tied to its point; below it the others,
    with their risks."""
    order = data.estimator.values[np.argsort(data.finetune.values, kind="stable")]
    low, high = np.log(axis.get_ylim())
    heights = (np.log(data.finetune.sel(estimator=order).values) - low) / (high - low)
    step, below = 0.043, outside.estimator.size + 1 if outside.estimator.size else 0
    gaps = step * np.arange(len(order))  # the nearest heights that leave room for every name
    places = np.clip(scipy.optimize.isotonic_regression(heights - gaps).x, step * below, 0.99 - gaps[-1]) + gaps
    looks: dict[str, Any] = {"va": "center", "fontsize": 6.5, "annotation_clip": False, "textcoords": "axes fraction"}
    for place, name in zip(places, order, strict=True):
        point, colour = data.sel(estimator=name), _STYLE[name][0]
        at = (float(point.pretrain), float(point.finetune))
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7, "relpos": (0, 0.5)}
        axis.annotate(name, at, (1.05, place), color=colour, arrowprops=arrow | {"shrinkA": 0, "shrinkB": 2}, **looks)
    for row, name in enumerate(outside.estimator.values[::-1]):
        risks = ", ".join(f"{float(outside.sel(estimator=name)[risk]):.2f}" for risk in ("pretrain", "finetune"))
        axis.annotate(f"{name}: {risks}", (1, 1), (1.05, step * row), color=_STYLE[name][0], **looks)
    if below:
        axis.annotate("outside, at:", (1, 1), (1.05, step * (below - 1)), color="#555555", **looks)


def _tables(samples: dict[str, Samples], validation: int) -> xr.Dataset:
    """Every method on every problem, tuned for both risks and for the new task alone."""
    goals = []
    for weight in (1.0, 0.0):
        ranked = [sims.rank(one, weight, validation).reindex(estimator=list(METHODS)) for one in samples.values()]
        goals.append(xr.concat(ranked, xr.Variable("problem", list(samples)), combine_attrs="drop"))
    return xr.concat(goals, xr.Variable("goal", list(_GOALS)), combine_attrs="drop")


def _draw_tables(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, height=6.2)
    for axis, (goal, text) in zip(axes, _GOALS.items(), strict=True):
        _heat_map(axis, data.sel(goal=goal))
        axis.set_title(f"tuned for and judged by {text}", fontsize=7.5, pad=22)
    return panel_letters(axes)


def _caption_tables(data: xr.Dataset) -> str:
    plain = [name for name in data.estimator.values if name not in _GROUPS[_MORE_DATA][2]]
    best = data.criterion.sel(estimator=plain, goal="both").idxmin("estimator")
    winners = "; ".join(f"{problem}: {best.sel(problem=problem).item()}" for problem in data.problem.values)
    return (
        "Which method suits which problem. Each cell: the criterion, below it one standard error over "
        f"{data.tasks} tasks, colour: relative to the best above the line in its column (dark: best; bold: that good or better); rows by the mean "
        "logarithm of that ratio, best first. Below the line, †: sees more than the fine-tuning data and one pretrained model: pretraining samples (replay), the diagonal of Σ₁ (EWC, "
        "here all of Σ₁, which is diagonal), seven more pretrained models (several anchors). Of those above it, "
        f"best for both risks are ({winners}). "
        f"{_tuning(data, 'the criterion')} {_problem_text(data)} Seed {data.seed}."
    )


def _heat_map(axis: Axes, data: xr.Dataset) -> None:
    extra = [name for name in data.estimator.values if name in _GROUPS[_MORE_DATA][2]]
    apart = data.estimator.isin(extra)
    ratio = data.criterion / data.criterion.where(~apart).min("estimator")
    order = np.lexsort((np.log(ratio).mean("problem").values, apart.values))
    ratio, shown = ratio.isel(estimator=order).T.values, data.isel(estimator=order)
    axis.imshow(ratio, norm=LogNorm(1, 4), cmap="cividis", aspect="auto")
    axis.axhline(len(ratio) - len(extra) - 0.5, color="white", linewidth=4)
    for (row, column), value in np.ndenumerate(ratio):
        cell = shown.isel(estimator=row, problem=column)
        risk, error = float(cell.criterion), float(cell.criterion_error)
        text = f"{risk:.{2 if risk >= 0.1 else 3}f}\n±{error:.1g}"
        looks: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 5, "linespacing": 0.95}
        looks |= {"color": "white" if value < 1.9 else "black", "fontweight": "bold" if value <= 1 else "normal"}
        axis.text(column, row, text, **looks)
    labels = [f"{name} †" if name in extra else str(name) for name in shown.estimator.values]
    axis.set_yticks(range(len(labels)), labels=labels, fontsize=6.5)
    for tick, name in zip(axis.get_yticklabels(), shown.estimator.values, strict=True):
        tick.set_color(_STYLE[name][0])
    columns = [str(problem).replace(" shift, ", "\n").replace("noise", "σ²") for problem in shown.problem.values]
    axis.set_xticks(range(len(columns)), labels=columns, fontsize=5.5)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def _tuning(data: xr.Dataset, goal: str) -> str:
    return f"Hyperparameters minimise {goal} averaged over {data.validation} validation tasks, other than those shown."


def _problem_text(data: xr.Dataset) -> str:
    return (
        "Σ₂ = diag(1/j), Σ₁ ∝ diag(1/√j) of the same trace, Ω ∝ Σ₂^α with tr ΩΣ₂ = 1 (α = −1 tail, 0 isotropic, +1 head), "
        f"σ² = 0.05 (low noise) or 1 (high), R_pre(θ₁) = 0.1; n = {data.n}, p = {data.p}."
    )
