"""S3FT (paper 2502.08130) in the linear model: where targets come from, what is forgotten, where training ends."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace as Setting
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import COLOURS, COLUMN, FORGETTING, Picture, bars, canvas, panel_letters, readable_ticks, seed_of
from linfit import Filter, MinNorm, Ridge, sample_designs
from sims import s3ft as sims
from theory import s3ft as theory
from theory.overadaptation import bayes_penalty
from theory.s3ft import Procedure, VectorProblem

__all__ = ["pictures"]

_FULL = Setting(
    n=80, p=320, designs=4, replicates=64, points=61, population=2000, population_replicates=64,
    styles=(0, 2, 4, 8, 16), sizes=11, simulated_sizes=slice(None, None, 4), splits=8, digits_p=2048, digits_pretrain=700,
)  # fmt: skip
_QUICK = Setting(
    n=30, p=120, designs=2, replicates=16, points=21, population=500, population_replicates=8,
    styles=(0, 8), sizes=4, simulated_sizes=slice(1), splits=2, digits_p=1024, digits_pretrain=400,
)  # fmt: skip
"""Sizes of a run: points along each line, samples that stand for an unlimited population, which sample sizes are simulated
(every one is compiled for)."""

_CONTENT_RANK, _STYLE_DIMENSION, _NOISE_STD = 2, 4, 0.5**0.5
_RESIDUAL_STD = (1 + _NOISE_STD**2) ** 0.5
_TOLERANCE, _SUCCESS, _ERROR = 1.5, 0.8, 0.05
_BASE = Procedure(_TOLERANCE * _RESIDUAL_STD, _SUCCESS, _ERROR, _ERROR)
_PROBLEM_TEXT = (
    f"k = {_CONTENT_RANK} content and {_STYLE_DIMENSION} style outputs, each with signal variance 1, content noise σ² = 0.5, "
    "no style noise; Σ₁ = Σ₂ = diag(1/j), isotropic shift, θ₁ = θ₁*"
)
_BASE_TEXT = (
    f"Unless varied: tolerance {_TOLERANCE} √v (√v the standard deviation of a content residual), paraphrases succeed with probability {_SUCCESS}, "
    f"the judge errs with probability {_ERROR} either way"
)

_LINES = {
    "SFT": COLOURS["fine-tuned"],
    "S3FT": COLOURS["ridge"],
    "S3FT without paraphrase": COLOURS["ridge + ensemble"],
    "SFT + ensemble": COLOURS["ensemble"],
    "own right answers only": COLOURS["early stopping"],
    "pretrained": COLOURS["pretrained"],
}
_MARKS = {"SFT": "o", "S3FT": "s", "S3FT without paraphrase": "^", "SFT + ensemble": "D", "pretrained": "x"}
_POINTS: dict[str, dict[str, Any]] = {name: {"color": _LINES[name], "fmt": mark} for name, mark in _MARKS.items()}
_SOURCES = {"own": COLOURS["ridge"], "paraphrase": COLOURS["ridge + ensemble"], "gold": COLOURS["variance"]}
_LABELS = {
    "strictness": R"tolerance of the judge $/\sqrt{v}$",
    "error": "error rate of the judge",
    "success": "success of paraphrases",
    "style_dimension": "style outputs",
}
_ROWS = {"content_risk": R"task: content risk $/$ SFT", "forgetting": R"forgetting $R_\mathrm{pre}$ $/$ SFT"}
_SHOWN = 6
"""Simulated points along each property of the procedure."""
_SHOWN_METHODS = ("S3FT", "S3FT without paraphrase")


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of S3FT, one after the other."""
    setting = _QUICK if quick else _FULL
    keys = jax.random.split(key, 6)
    problem = _vector_problem(keys[0], setting)
    stack = sample_designs(keys[1], problem.finetune_covariance, setting.n, setting.designs)
    filter = _bayes_ridge(problem, setting.n)
    procedures = [procedure for _, procedure in _sweeps(_SHOWN).values()]
    settings, replicates = sims.settings_of(*procedures), setting.replicates
    simulated = sims.monte_carlo(keys[2], stack, problem, settings, filter, replicates=replicates)
    lines = {name: procedure for name, (_, procedure) in _sweeps(setting.points).items()}
    expected = {name: sims.expected_on(stack, problem, procedure, filter) for name, procedure in lines.items()}
    attributes = dict(simulated.attrs) | {"seed": seed_of(key)}

    def picture(name: str, title: str, data: xr.Dataset, draw: Any, caption: Any) -> Picture:
        return Picture(name, title, data.assign_attrs(attributes | data.attrs), draw, caption)

    data = _shares(simulated, expected, setting)
    yield picture("s3ft_shares", "S3FT: where targets come from", data, _draw_shares, _caption_shares)
    data = _against_supervised(keys[0], simulated, expected, stack, filter, setting)
    yield picture("s3ft_against_sft", "S3FT against supervised fine-tuning", data, _draw_against, _caption_against)
    data = _trade_off(stack, problem, filter, setting)
    yield picture("s3ft_trade_off", "S3FT: the trade-off plane", data, _draw_trade_off, _caption_trade_off)
    data = _sample_size(jax.random.split(keys[1]), problem, setting)
    yield picture("s3ft_sample_size", "S3FT over the number of samples", data, _draw_sample_size, _caption_sample_size)
    data = _coefficients(keys[3], setting)
    yield picture("s3ft_coefficients", "S3FT: where training ends", data, _draw_coefficients, _caption_coefficients)
    data = _own_distribution(keys[5], problem, setting)
    title = "S3FT: the model's own distribution"
    yield picture("s3ft_own_distribution", title, data, _draw_own_distribution, _caption_own_distribution)
    sizes = {"p": setting.digits_p, "n_pretrain": setting.digits_pretrain}
    data = sims.digits(keys[4], 0.1, (0, 10, 40), setting.splits, false_accept=_ERROR, false_reject=_ERROR, **sizes)
    yield picture("s3ft_digits", "S3FT on the digits", data, _draw_digits, _caption_digits)


def _vector_problem(key: Array, setting: Setting, style_dimension: int = _STYLE_DIMENSION) -> VectorProblem:
    return sims.content_and_style_problem(key, setting.p, _CONTENT_RANK, style_dimension, noise_std=_NOISE_STD)


def _bayes_ridge(problem: VectorProblem, n: int) -> Ridge:
    """Ridge with the Bayes penalty of the content outputs under supervised fine-tuning."""
    return Ridge(bayes_penalty(_NOISE_STD, float(jnp.mean(problem.shift[:, :_CONTENT_RANK] ** 2)), n))


def _sweeps(points: int) -> dict[str, tuple[np.ndarray, Procedure]]:
    """Strictness of the judge, its error, success of paraphrases; all else as in `_BASE`."""
    strictness, rates, success = (np.linspace(0, end, points) for end in (4, 0.5, 1))
    return {
        "strictness": (strictness, _BASE._replace(tolerance=strictness * _RESIDUAL_STD)),
        "error": (rates, _BASE._replace(false_accept=rates, false_reject=rates)),
        "success": (success, _BASE._replace(paraphrase_success=success)),
    }


def _points_of(simulated: xr.Dataset, name: str) -> xr.Dataset:
    start = _SHOWN * list(_sweeps(_SHOWN)).index(name)
    return simulated.isel(setting=slice(start, start + _SHOWN))


def _largest_gap(simulated: xr.Dataset, quantities: tuple[str, ...]) -> dict[str, Any]:
    """Between simulated and expected values on the same designs, in standard errors, as attributes."""
    z = np.concatenate([np.ravel(simulated[f"{name}_z"]) for name in quantities])
    return {"largest_gap": float(np.abs(z).max()), "gaps": z.size}


def _agreement(data: xr.Dataset) -> str:
    return (
        f"Points: mean of {data.replicates} simulated draws on each of {data.designs} designs, bars ± one standard error given the "
        f"designs, mostly smaller than the marker; the largest gap to the exact expectation {data.largest_gap:.1f} standard errors over {data.gaps} (correlated) values."
    )


def _context(data: xr.Dataset) -> str:
    return f"{_PROBLEM_TEXT}; n = {data.n}, p = {data.p}; seed {data.seed}."


def _legend_above(figure: Figure, axis: Axes, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(list(named.values()), list(named), loc="outside upper center", ncols=columns)


def _shares(simulated: xr.Dataset, expected: dict[str, xr.Dataset], setting: Setting) -> xr.Dataset:
    """Shares over three properties of the procedure, and the same summed up to two edges, expected and simulated."""
    variables: dict[str, Any] = {}
    for name, (values, procedure) in _sweeps(setting.points).items():
        points, lines = (data.sel(procedure="S3FT") for data in (_points_of(simulated, name), expected[name]))
        shown = ("edge", f"{name}_shown")
        population = theory.shares(procedure, _CONTENT_RANK, _RESIDUAL_STD)
        variables |= {
            name: (("source", f"{name}_value"), np.stack(population)),
            f"{name}_value": values,
            f"{name}_expected": (("edge", f"{name}_value"), np.stack([lines.own, 1 - lines.gold])),
            f"{name}_shown": _sweeps(_SHOWN)[name][0],
            f"{name}_simulated": (shown, np.stack([points.own, 1 - points.gold])),
            f"{name}_simulated_error": (shown, np.stack([points.own_error, points.gold_error])),
        }
    return xr.Dataset(variables, {"source": list(_SOURCES)}, _largest_gap(simulated, ("own", "gold")))


def _draw_shares(data: xr.Dataset) -> Figure:
    figure, axes = canvas(3, height=2.5, sharey=True)
    for axis, name in zip(axes, _LABELS, strict=False):
        values = data[f"{name}_value"].values
        edges = np.concatenate([[np.zeros(len(values))], np.cumsum(data[name], axis=0)])
        for source, lower, upper in zip(_SOURCES, edges[:-1], edges[1:], strict=True):
            axis.fill_between(values, lower, upper, color=_SOURCES[source], linewidth=0, label=source)
        axis.plot(values, data[f"{name}_expected"].T, color="black", linewidth=0.8, linestyle="--")
        looks: dict[str, Any] = {"color": "black", "markersize": 3, "markerfacecolor": "white", "clip_on": False}
        for edge in (0, 1):
            bars(axis, data.isel(edge=edge), f"{name}_simulated", **looks)
        axis.set(xlabel=_LABELS[name], xlim=(values[0], values[-1]), ylim=(0, 1))
    axes[0].set_ylabel("share of targets")
    _legend_above(figure, axes[0], 3)
    return panel_letters(axes)


def _caption_shares(data: xr.Dataset) -> str:
    return (
        "Where the targets of S3FT come from. Areas: the population formula (T2, ours). Dashed: the exact expectation on the designs drawn, which differs from "
        f"it by the chance of the design. {_agreement(data)} {_BASE_TEXT}. {_context(data)}"
    )


def _against_supervised(
    key: Array, simulated: xr.Dataset, expected: dict[str, xr.Dataset], stack: Array, filter: Filter, setting: Setting
) -> xr.Dataset:
    """Task risk and forgetting relative to supervised fine-tuning, over four properties."""
    variables: dict[str, Any] = {}
    supervised = expected["strictness"].sel(procedure="SFT").isel(setting=0)
    for name, (values, _) in _sweeps(setting.points).items():
        points, shown = _points_of(simulated, name), ("procedure", f"{name}_shown")
        variables |= {f"{name}_value": values, f"{name}_shown": _sweeps(_SHOWN)[name][0]}
        for quantity in _ROWS:
            unit, over = float(supervised[quantity]), f"{quantity}_over_{name}"
            variables[over] = (("procedure", f"{name}_value"), expected[name][quantity].values / unit)
            for ending in ("", "_error"):
                variables[f"{over}_simulated{ending}"] = (shown, points[f"{quantity}{ending}"].values / unit)
    draw_key, replicates = jax.random.fold_in(key, 1), max(setting.replicates // 4, 2)
    problems = [_vector_problem(key, setting, number) for number in setting.styles]
    runs = [sims.monte_carlo(draw_key, stack, one, _BASE, filter, replicates=replicates) for one in problems]
    styles = xr.Variable("style_dimension", list(setting.styles))
    along = xr.concat([run.isel(setting=0) for run in runs], styles, combine_attrs="override")
    for quantity in _ROWS:
        own_unit, over = along[f"{quantity}_exact"].sel(procedure="SFT", drop=True), f"{quantity}_over_style_dimension"
        for suffix, ending in (("", "_exact"), ("_simulated", ""), ("_simulated_error", "_error")):
            variables[over + suffix] = (along[f"{quantity}{ending}"] / own_unit).transpose("procedure", ...)
    unmoved = {"unmoved_content_risk": _CONTENT_RANK / float(supervised.content_risk), "unmoved_forgetting": 0.0}
    attributes = unmoved | _largest_gap(simulated, tuple(_ROWS)) | {"replicates_over_styles": replicates}
    return xr.Dataset(variables, {"procedure": list(sims.VARIANTS)}, attributes)


def _draw_against(data: xr.Dataset) -> Figure:
    figure, axes = canvas(4, 2, height=2.1, sharex="col", sharey="row")
    panels = list(zip(axes, itertools.product(_ROWS, _LABELS), strict=True))
    unmoved: dict[str, Any] = {"color": _LINES["pretrained"], "linewidth": 1, "linestyle": ":"}
    for axis, (quantity, name) in panels:
        for method in _SHOWN_METHODS:
            chosen, over = data.sel(procedure=method), f"{quantity}_over_{name}"
            axis.plot(chosen[chosen[over].dims[0]], chosen[over], color=_LINES[method])
            bars(axis, chosen, f"{over}_simulated", **_POINTS[method])
    for axis, (quantity, name) in panels:
        axis.axhline(1, color=_LINES["SFT"], linewidth=1.2, label="SFT")
        if name != "style_dimension":
            axis.axhline(data.attrs[f"unmoved_{quantity}"], **unmoved)
        axis.set_ylim(0, None)
    for axis, label in zip(axes[4:], _LABELS.values(), strict=True):
        axis.set_xlabel(label)
    for row, text in enumerate(_ROWS.values()):
        axes[4 * row].set_ylabel(text)
    for method in _SHOWN_METHODS:
        axes[0].plot([], [], color=_LINES[method], marker=_MARKS[method], label=method)
    axes[0].plot([], [], label="pretrained = own right answers only", **unmoved)
    _legend_above(figure, axes[0], 4)
    return panel_letters(axes)


def _caption_against(data: xr.Dataset) -> str:
    return (
        "S3FT against supervised fine-tuning on gold (red, 1), ridge with the Bayes penalty of SFT for both. Paraphrases keep the model's own style, so S3FT "
        "forgets less, the more so the more style there is (right), and its task risk is no better, rather worse: a right answer "
        "taught back teaches nothing. Without paraphrases a judge must be lax to keep style. A judge that errs (second column) teaches wrong own "
        "answers and gold style. The task does not depend on paraphrases: in the upper row both methods coincide. Dotted: the pretrained model (below at 0), which is "
        "also where training on own right answers alone ends. Lines: exact expectation on the "
        f"same {data.designs} designs. {_agreement(data)} On the right {data.replicates_over_styles} draws on each. "
        f"{_BASE_TEXT}. {_context(data)}"
    )


def _trade_off(stack: Array, problem: VectorProblem, filter: Filter, setting: Setting) -> xr.Dataset:
    """S3FT over its tolerance, and ensembles of SFT and of S3FT with a strict judge over τ."""
    tolerances, tau = np.linspace(0, 5, setting.points) * _RESIDUAL_STD, np.linspace(0, 1, 21)
    path = sims.expected_on(stack, problem, _BASE._replace(tolerance=tolerances), filter)
    strict = _BASE._replace(tolerance=0.5 * _RESIDUAL_STD)
    averaged = [sims.expected_on(stack, problem, strict, float(t) * filter).isel(setting=0) for t in tau]
    along_tau = xr.concat(averaged, xr.Variable("tau", tau))
    variables = {
        f"{name}_along_{along}": (("procedure", along), data[name].transpose("procedure", ...).values)
        for along, data in (("tolerance", path), ("tau", along_tau))
        for name in ("forgetting", "content_risk")
    }
    return xr.Dataset(variables, {"procedure": list(sims.VARIANTS), "tolerance": tolerances, "tau": tau})


def _draw_trade_off(data: xr.Dataset) -> Figure:
    figure, (axis,) = canvas(1, width=COLUMN * 1.5, height=3.1)
    lines = [(name, "tolerance", "-", name, f"{name}, tolerance 0 to 5√v") for name in _SHOWN_METHODS]
    for method, style, colour in (("SFT", "-", "SFT + ensemble"), ("S3FT", "--", "S3FT")):
        lines.append((method, "tau", style, colour, f"{method} + ensemble, τ from 0 to 1"))
    for method, along, style, colour, label in lines:
        curve = (data[f"{name}_along_{along}"].sel(procedure=method) for name in ("forgetting", "content_risk"))
        axis.plot(*curve, color=_LINES[colour], linestyle=style, label=label)
    for name, tau in (("pretrained", 0), ("SFT", -1)):
        end = data.sel(procedure="SFT").isel(tau=tau)
        point = float(end.forgetting_along_tau), float(end.content_risk_along_tau)
        axis.plot(*point, "o", color=_LINES[name])
        axis.annotate(name, point, (5, 4), textcoords="offset points", fontsize=7)
    axis.set(xlabel=f"{FORGETTING}, all outputs", ylabel="task: content risk")
    axis.legend(loc="upper right")
    return figure


def _caption_trade_off(data: xr.Dataset) -> str:
    return (
        "Forgetting against the task (lower left is better). Averaging SFT with the pretrained model (pink) shrinks content and style alike; S3FT "
        f"leaves style where it was. The two add up: S3FT with a strict judge (tolerance 0.5 √v), then averaged (dashed), forgets least of these at any task risk it reaches. "
        f"Ridge with the Bayes penalty of SFT; exact expectation over {data.designs} designs. {_BASE_TEXT}. {_context(data)}"
    )


def _sample_size(keys: Array, problem: VectorProblem, setting: Setting) -> xr.Dataset:
    """Everything expected over n, min-norm and ridge, simulated at some n, and the population limit."""
    sizes = np.unique(np.geomspace(setting.p / 16, 8 * setting.p, setting.sizes).astype(int))
    sizes = sizes[abs(np.log(sizes / setting.p)) > 0.2]
    shown, replicates = sizes[setting.simulated_sizes], max(setting.replicates // 4, 2)
    filters = {"min-norm": lambda n: MinNorm(), "ridge": lambda n: _bayes_ridge(problem, n)}
    stacks = {int(n): sample_designs(keys[0], problem.finetune_covariance, int(n), 2) for n in sizes}
    exact, simulated = [], []
    for filter in filters.values():
        lines = [sims.expected_on(stack, problem, _BASE, filter(n)) for n, stack in stacks.items()]
        points = [
            sims.monte_carlo(keys[1], stacks[n], problem, _BASE, filter(n), replicates=replicates)
            for n in map(int, shown)
        ]
        exact.append(xr.concat(lines, xr.Variable("n", sizes)))
        simulated.append(xr.concat(points, xr.Variable("n", shown), combine_attrs="drop_conflicts"))
    names = xr.Variable("filter", list(filters))
    data, measured = (xr.concat(runs, names, combine_attrs="override").isel(setting=0) for runs in (exact, simulated))
    limits = [theory.population(problem, sims.variant(name, _BASE)) for name in sims.VARIANTS]
    for quantity in _ROWS:
        data[f"{quantity}_limit"] = ("procedure", [float(getattr(limit, quantity)) for limit in limits])
    renamed = {"n": "n_simulated"} | {str(name): f"{name}_simulated" for name in measured}
    both = xr.merge([data, measured.rename(renamed)], combine_attrs="drop", compat="no_conflicts", join="outer")
    attributes = {"p": setting.p, "designs": 2, "replicates": replicates} | _largest_gap(measured, tuple(_ROWS))
    return both.drop_vars(list(_BASE._fields)).assign_attrs(attributes)


def _draw_sample_size(data: xr.Dataset) -> Figure:
    figure, axes = canvas(4, height=2.3)
    over = data.assign_coords(n=data.n / data.p, n_simulated=data.n_simulated / data.p)
    for axis, (quantity, name) in zip(axes, itertools.product(_ROWS, data.filter.values), strict=True):
        for method in sims.VARIANTS:
            chosen, colour = over.sel(procedure=method, filter=name), _LINES[method]
            for side in (chosen.n < 1, chosen.n > 1):
                axis.plot(chosen.n[side], chosen[quantity][side], color=colour)
            looks = {"markersize": 3, "label": method} | _POINTS[method]
            bars(axis, chosen, f"{quantity}_simulated", f"{quantity}_error_simulated", **looks)
            if (limit := float(chosen[f"{quantity}_limit"])) > 0:
                axis.axhline(limit, color=colour, linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="samples / features", title=name)
    for column, text in enumerate(("task: content risk", R"forgetting $R_\mathrm{pre}$")):
        pair = axes[2 * column : 2 * column + 2]
        low, high = zip(*(axis.get_ylim() for axis in pair), strict=True)
        for axis in pair:
            axis.set_ylim(min(low), max(high))
            readable_ticks(axis.yaxis)
        pair[0].set_ylabel(text)
    _legend_above(figure, axes[0], 3)
    return panel_letters(axes)


def _caption_sample_size(data: xr.Dataset) -> str:
    return (
        "Over the number of samples, for min-norm and for ridge with the Bayes penalty of SFT; n near p, where min-norm has its peak, is left out. "
        "At every n S3FT forgets less than SFT and does worse on the task: with more data the risk of SFT goes on falling, that of S3FT stays above a limit, since what "
        "is within the tolerance is never learned. In (a) and (b) S3FT with and without paraphrases coincide. Dotted: the population limit (0 for SFT in a and b, not drawn). "
        f"Lines: exact expectation on the same designs. {_agreement(data)} {_BASE_TEXT}. {_PROBLEM_TEXT}; p = {data.p}; seed {data.seed}."
    )


_RANKS = {1: ("-", "o"), 2: ("--", ""), 8: (":", "^")}
"""Line and marker of each content rank; those with a marker are measured."""
_STRICT = {0.1: ("-", ""), 1.0: ("--", "s"), 2.0: (":", "^")}
"""Tolerances, in units of √v, for own answers alone, likewise."""


def _coefficients(key: Array, setting: Setting) -> xr.Dataset:
    """The two coefficients of S3FT, and that of own answers alone, over what drives them: formulas and least squares.

    v = 1, one style output; all that is measured of a rank in one run.
    """
    tolerance, sampling = np.linspace(0, 4, setting.points), np.linspace(0, 2, setting.points)
    shown, marked = np.linspace(0.5, 3.5, 7), np.array([0.4, 0.8, 1.2, 1.6, 2.0])
    strengths = {"content_signal": 0.5, "style_signal": 0.5, "noise_std": _NOISE_STD}
    variables: dict[str, Any] = {}
    gaps = []

    def add(label: str, dim: str, data: xr.Dataset, name: str, exact: Array) -> None:
        measured, error = data[name].values, data[f"{name}_error"].values
        variables.update({f"{label}_measured": (dim, measured), f"{label}_measured_error": (dim, error)})
        gaps.append((measured - exact) / error)

    half = Procedure(shown, paraphrase_success=0.5)
    alone = {strict: Procedure(strict, sampling_std=marked) for strict, (_, mark) in _STRICT.items() if mark}
    for rank, (_, mark) in _RANKS.items():
        curves = theory.coefficients(half._replace(tolerance=tolerance), rank, 1.0)
        for name, curve in curves._asdict().items():
            variables[f"{name}_{rank}"] = ("tolerance", np.asarray(curve))
        if not mark or (rank > 1 and setting is _QUICK):  # once is enough for a first look
            continue
        problem = sims.content_and_style_problem(key, 12, rank, 1, **strengths)
        procedures, n = sims.settings_of(half, *(alone.values() if rank == 1 else ())), setting.population
        data = sims.measured_coefficients(key, problem, n, procedures, replicates=setting.population_replicates)
        for name, exact in theory.coefficients(half, rank, 1.0)._asdict().items():
            add(f"{name}_{rank}", "tolerance_shown", data.isel(setting=slice(len(shown))), name, exact)
        if rank == 1:
            for index, (strict, procedure) in enumerate(alone.items()):
                start = len(shown) + index * len(marked)
                chosen = data.isel(setting=slice(start, start + len(marked)))
                exact = theory.rejection_coefficient(procedure, 1, 0.5, _NOISE_STD)
                add(f"rejection_{strict:g}", "sampling_std_shown", chosen, "rejection", exact)
    for strict in _STRICT:
        curve = theory.rejection_coefficient(Procedure(strict, sampling_std=sampling), 1, 0.5, _NOISE_STD)
        variables[f"rejection_{strict:g}"] = ("sampling_std", np.asarray(curve))
    coordinates = {"tolerance": tolerance, "sampling_std": sampling, "tolerance_shown": shown}
    z = np.abs(np.concatenate(gaps))
    attributes = {"n": setting.population, "replicates": setting.population_replicates, "p": 12}
    attributes |= {"largest_gap": float(z.max()), "gaps": z.size}
    return xr.Dataset(variables, coordinates | {"sampling_std_shown": marked}, attributes)


def _draw_coefficients(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, height=2.6, sharey=True)
    panels: list[tuple[str, dict, str]] = [
        ("content", _RANKS, "S3FT"), ("style", _RANKS, "S3FT"), ("rejection", _STRICT, "own right answers only")
    ]  # fmt: skip
    for axis, (name, looks, method) in zip(axes, panels, strict=True):
        for value, (line, mark) in looks.items():
            curve, label = data[f"{name}_{value:g}"], f"k = {value}" if looks is _RANKS else f"{value:g}"
            axis.plot(curve[curve.dims[0]], curve, color=_LINES[method], linestyle=line, label=label)
            if f"{name}_{value:g}_measured" in data:
                bars(axis, data, f"{name}_{value:g}_measured", color=_LINES[method], fmt=mark)
    axes[0].set(xlabel=_LABELS["strictness"], ylabel="coefficient", title="S3FT: content")
    axes[1].set(xlabel=_LABELS["strictness"], title="S3FT: style")
    axes[2].set(xlabel=R"sampling noise $s/\sqrt{v}$", title="own right answers only", ylim=(-0.03, 1.08))
    for axis, title in zip(axes, ("content rank", "content rank", R"tolerance $/\sqrt{v}$"), strict=True):
        axis.legend(title=title, title_fontsize=7)
    return panel_letters(axes)


def _caption_coefficients(data: xr.Dataset) -> str:
    return (
        "Where training ends with unlimited data: the fraction of the way from the pretrained to the optimal weights, for content and for style (T2, ours). "
        "(a) S3FT leaves out what is within the tolerance (k = 1: T1). (b) Style is learned from gold targets only, here with paraphrases that succeed half the time: at most half the way. "
        "(c) Training on own right answers alone moves content by sampling noise only, at most to s²/(s²+σ²), with a strict judge; k = 1. "
        f"Lines: formulas; points: least squares on {data.n} samples of {data.p} features, mean of {data.replicates} replicates ± one standard error, "
        f"σ² = v/2, a judge without error; the largest gap {data.largest_gap:.1f} standard errors over {data.gaps} values (with finitely many samples there is a bias of order p/n besides). Seed {data.seed}."
    )


_PUBLISHED = {"GSM8K": (0.495, 0.421, 0.084), "MBPP": (0.302, 0.324, 0.374), "NQ": (0.660, 0.256, 0.081)}
"""Shares of own, paraphrased and gold targets in paper 2502.08130; those of NQ add up to .997."""
_PUBLISHED_GAP = 84.32 - 36.64
"""Mean log-probability of own answers above that of gold in its Fig 2, in nats."""


def _own_distribution(key: Array, problem: VectorProblem, setting: Setting) -> xr.Dataset:
    """Log-probabilities of answers, relative to the mean of own ones, and procedures of the published shares.

    The sampling noise of own answers is such that gold lies as far from them, on average, as in the paper.
    """
    gold, outputs = float(theory.distances(problem, 0.0).gold), problem.content.shape[0]
    spread = (gold / (2 * _PUBLISHED_GAP + outputs)) ** 0.5
    rates = {"false_accept": _ERROR, "false_reject": _ERROR, "sampling_std": spread}
    rows, answers = [], []
    for shares in _PUBLISHED.values():
        own, paraphrase, _ = np.array(shares) / sum(shares)
        procedure = theory.calibrated(own, paraphrase, _CONTENT_RANK, _RESIDUAL_STD, **rates)
        learned = theory.coefficients(procedure, _CONTENT_RANK, _RESIDUAL_STD)
        knobs = float(procedure.tolerance) / _RESIDUAL_STD, float(procedure.paraphrase_success)  # type: ignore[arg-type]
        rows.append([*knobs, *map(float, learned)])
        answers.append(sims.own_probabilities(key, problem, 20 * setting.population, procedure))
    first = answers[0]
    variables: dict[str, Any] = {
        "published": (("benchmark", "source"), np.array(list(_PUBLISHED.values()))),
        "sampled": (
            ("benchmark", "source"),
            np.array([[(a.source == kind).mean() for kind in range(3)] for a in answers]),
        ),
        "calibrated": (("benchmark", "quantity"), np.array(rows)),
    }
    edges = np.linspace(-160, 15, 101)
    for name in ("gold", "paraphrase", "own"):
        relative = first[name].values - first.own_expected
        variables[f"{name}_density"] = ("bin", np.histogram(relative, edges)[0] / relative.size / np.diff(edges))
        variables[f"{name}_mean"], variables[f"{name}_expected"] = (
            relative.mean(),
            first.attrs[f"{name}_expected"] - first.own_expected,
        )
        variables[f"{name}_error"] = relative.std(ddof=1) / relative.size**0.5
    coordinates = {"benchmark": list(_PUBLISHED), "source": list(_SOURCES), "edge": edges}
    coordinates["quantity"] = ["tolerance", "success", "content", "style"]
    return xr.Dataset(variables, coordinates, {"samples": first.sizes["sample"], "spread": spread, "k": _CONTENT_RANK})


def _draw_own_distribution(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, height=2.7, gridspec_kw={"width_ratios": [1.1, 1]})
    for name in ("gold", "paraphrase", "own"):
        axes[0].stairs(data[f"{name}_density"], data.edge, fill=True, alpha=0.45, color=_SOURCES[name], label=name)
        axes[0].axvline(float(data[f"{name}_expected"]), color=_SOURCES[name], linewidth=1.2, linestyle="--")
    top = np.sort(data.own_density.values)[-1]
    axes[0].set(
        xlabel="log-probability under the model, own answers at 0 [nats]", ylabel="density", ylim=(0, 1.05 * top)
    )
    axes[0].legend(loc="upper left")
    places = np.arange(data.benchmark.size)[::-1]
    left = np.zeros(len(places))
    for source in data.source.values:
        width = data.published.sel(source=source).values
        axes[1].barh(places, width, 0.42, left, color=_SOURCES[source])
        left = left + width
    edges = data.sampled.cumsum("source").isel(source=slice(2))
    looks: dict[str, Any] = {"color": "black", "markerfacecolor": "white", "markersize": 3.5}
    axes[1].plot(edges, np.repeat(places[:, None], 2, 1), "o", **looks)
    for place, name in zip(places, data.benchmark.values, strict=True):
        tolerance, success, content, style = data.calibrated.sel(benchmark=name).values
        text = Rf"tolerance {tolerance:.2f}$\sqrt{{v}}$, success {success:.2f}; learned: content {content:.2f}, style {style:.2f}"
        axes[1].text(0, place - 0.37, text, fontsize=6.5, va="center")
    axes[1].set_yticks(places, labels=data.benchmark.values)
    axes[1].set(xlabel="share of targets", xlim=(0, 1), ylim=(-0.6, len(places) - 0.6))
    axes[1].set_title("own, paraphrased, gold", fontsize=8)
    return panel_letters(axes)


def _caption_own_distribution(data: xr.Dataset) -> str:
    gaps = {
        name: float(abs(data[f"{name}_mean"] - data[f"{name}_expected"]) / data[f"{name}_error"]) for name in _SOURCES
    }
    off = float(abs(data.sampled - data.published / data.published.sum("source")).max())
    return (
        "How far targets lie from the model's own distribution N(xᵀθ₁, s²), after Fig 2 of paper 2502.08130, linear form ours. (a) Log-probability of gold, paraphrased and own answers, every sample; "
        f"dashed: expected means. s = {data.spread:.2f} is chosen so that gold lies as far below own answers as in the paper's figure (means −84.32 and −36.64); paraphrases, at {float(data.paraphrase_mean):.0f} against {float(data.gold_mean):.0f} of gold, are not fitted. "
        f"Mean and expectation differ by at most {max(gaps.values()):.1f} standard errors over {data.samples} samples. (b) Bars: shares of own, paraphrased and gold targets published for three benchmarks; tolerance of the judge and success of paraphrases "
        f"of this model that lead to them (content rank {data.k}, a judge that errs with probability {_ERROR} either way), and the fractions of content and style that fine-tuning then learns with unlimited data. Points: the same simulated, at most {off:.3f} off. "
        f"{_PROBLEM_TEXT}; p = {data.p}; seed {data.seed}."
    )


def _draw_digits(data: xr.Dataset) -> Figure:
    figure, axes = canvas(3, height=2.5)
    styles = data.style_dimension.values
    labels = ("task: error turned", "style drift", "forgetting: error upright")
    for axis, quantity, label in zip(axes, ("content_risk", "style_drift", "forgetting"), labels, strict=True):
        for index, method in enumerate(data.procedure.values):
            places = np.arange(len(styles)) + 0.12 * (index - 2)
            chosen = data.sel(procedure=method).assign_coords(style_dimension=places)
            bars(axis, chosen, quantity, label=method, clip_on=False, **_POINTS[method])
        axis.set_xticks(range(len(styles)), labels=[str(count) for count in styles])
        axis.set(xlabel=_LABELS["style_dimension"], ylabel=label, ylim=(0, None))
    _legend_above(figure, axes[0], 5)
    return panel_letters(axes)


def _caption_digits(data: xr.Dataset) -> str:
    chosen, most = data.sel(procedure="S3FT").isel(style_dimension=0), data.isel(style_dimension=-1)
    names, accuracy = data.procedure.values, data.accuracy.isel(style_dimension=0)
    accuracies = ", ".join(f"{name} {float(accuracy.sel(procedure=name)):.2f}" for name in names)
    forgotten = ", ".join(f"{float(most.forgetting.sel(procedure=name)):.1f} for {name}" for name in names[1:])
    return (
        f"Handwritten digits, random Fourier features (p = {data.p}): pretrained on {data.n_pretrain} upright images, fine-tuned by min-norm on 150 images turned by 45°. "
        "Content: ten class indicators, an own answer right if its class is; style: outputs that are other linear functions of the features in fine-tuning than in pretraining. "
        f"Noise 0.1 on all gold answers; the judge errs with probability {data.false_accept} either way. Targets of S3FT: {float(chosen.own):.0%} own, {float(chosen.paraphrase):.0%} paraphrased, "
        f"{float(chosen.gold):.0%} gold. Accuracy on turned digits: {accuracies}. Squared errors: of the indicators on turned images in (a), of all outputs on upright ones in (c); "
        f"at {int(most.style_dimension)} style outputs forgetting is {forgotten}. Mean over {data.splits} splits ± one standard error, held-out images with clean labels; SFT + ensemble at τ = ½. Outputs do not share weights here, so the task does not depend on the style. Seed {data.seed}."
    )
