"""S3FT (paper 2502.08130) in the linear model: where targets come from, what is forgotten, where training ends."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from figures.style import COLOURS, COLUMN, Picture, canvas, panel_letters, readable_ticks
from linfit import Filter, MinNorm, Ridge, sample_designs
from sims import s3ft as sims
from theory import s3ft as theory
from theory.overadaptation import bayes_penalty
from theory.s3ft import Procedure, VectorProblem


class Setting(NamedTuple):
    """Sizes of a run; the quick one is for CI and first looks."""

    n: int
    p: int
    designs: int
    replicates: int
    points: int
    population: int
    population_replicates: int
    splits: int
    digits: dict[str, int]

    def __str__(self) -> str:
        return f"n = {self.n}, p = {self.p}"


FULL = Setting(
    n=80,
    p=320,
    designs=4,
    replicates=64,
    points=61,
    population=2000,
    population_replicates=64,
    splits=8,
    digits={"p": 2048, "n_pretrain": 700},
)
QUICK = Setting(
    n=30,
    p=120,
    designs=2,
    replicates=16,
    points=21,
    population=500,
    population_replicates=8,
    splits=2,
    digits={"p": 1024, "n_pretrain": 400},
)

CONTENT_RANK, STYLE_DIMENSION, NOISE_VARIANCE = 2, 4, 0.5
RESIDUAL_STD = (1 + NOISE_VARIANCE) ** 0.5
TOLERANCE, SUCCESS, ERROR = 1.5, 0.8, 0.05
BASE = Procedure(TOLERANCE * RESIDUAL_STD, SUCCESS, ERROR, ERROR)
PROBLEM_TEXT = (
    f"k = {CONTENT_RANK} content and {STYLE_DIMENSION} style outputs, each with signal variance 1, content noise σ² = {NOISE_VARIANCE}, "
    "no style noise; Σ₁ = Σ₂ = diag(1/j), isotropic shift, θ₁ = θ₁*"
)
BASE_TEXT = (
    f"Unless varied: tolerance {TOLERANCE} √v (√v the standard deviation of a content residual), paraphrases succeed with probability {SUCCESS}, "
    f"the judge errs with probability {ERROR} either way"
)

LINES = {
    "SFT": COLOURS["fine-tuned"],
    "S3FT": COLOURS["ridge"],
    "S3FT without paraphrase": COLOURS["ridge + ensemble"],
    "SFT + ensemble": COLOURS["ensemble"],
    "own right answers only": COLOURS["early stopping"],
    "pretrained": COLOURS["pretrained"],
}
MARKS = {"SFT": "o", "S3FT": "s", "S3FT without paraphrase": "^", "SFT + ensemble": "D", "pretrained": "x"}
SOURCES = {"own": COLOURS["ridge"], "paraphrase": COLOURS["ridge + ensemble"], "gold": COLOURS["variance"]}


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the room, one after the other."""
    setting = QUICK if quick else FULL
    seed = int(jax.random.key_data(key).ravel()[-1])
    keys = jax.random.split(key, 5)
    problem = vector_problem(keys[0], setting)
    stack = sample_designs(keys[1], problem.finetune_covariance, setting.n, setting.designs)
    context = f"{PROBLEM_TEXT}; {setting}; seed {seed}."
    filter = bayes_ridge(problem, setting.n)
    simulated = measure(keys[2], stack, problem, filter, setting)
    expected = {
        name: sims.expected_on(stack, problem, sweep.procedure, filter)
        for name, sweep in sweeps(setting.points).items()
    }
    yield shares(simulated, expected, setting, context)
    yield against_supervised(keys[0], simulated, expected, stack, filter, setting, context)
    yield trade_off(stack, problem, filter, setting, context)
    yield sample_size(jax.random.split(keys[1]), problem, setting, f"{PROBLEM_TEXT}; p = {setting.p}; seed {seed}.")
    yield coefficients(keys[3], setting, seed)
    yield digits(keys[4], setting, seed)


def vector_problem(key: Array, setting: Setting, style_dimension: int = STYLE_DIMENSION) -> VectorProblem:
    return sims.content_and_style_problem(key, setting.p, CONTENT_RANK, style_dimension, noise_variance=NOISE_VARIANCE)


def bayes_ridge(problem: VectorProblem, n: int) -> Ridge:
    """Ridge with the Bayes penalty of the content outputs under supervised fine-tuning."""
    spread = float(jnp.mean(problem.shift[:, :CONTENT_RANK] ** 2))
    return Ridge(bayes_penalty(NOISE_VARIANCE**0.5, spread, n))


# ------------------------------------------------------------------------------------------------- sweeps


class Sweep(NamedTuple):
    """One property of the procedure along its axis."""

    label: str
    values: np.ndarray
    procedure: Procedure


def sweeps(points: int) -> dict[str, Sweep]:
    """Strictness of the judge, its error, success of paraphrases; all else as in `BASE`."""
    strictness, rates = np.linspace(0, 4, points), np.linspace(0, 0.5, points)
    success = np.linspace(0, 1, points)
    return {
        "strictness": Sweep(
            R"tolerance of the judge $/\sqrt{v}$",
            strictness,
            BASE._replace(tolerance=jnp.asarray(strictness * RESIDUAL_STD)),
        ),
        "error": Sweep(
            "error rate of the judge",
            rates,
            BASE._replace(false_accept=jnp.asarray(rates), false_reject=jnp.asarray(rates)),
        ),
        "success": Sweep("success of paraphrases", success, BASE._replace(paraphrase_success=jnp.asarray(success))),
    }


SHOWN = 6
"""Simulated points along each sweep."""


def measure(key: Array, stack: Array, problem: VectorProblem, filter: Filter, setting: Setting) -> xr.Dataset:
    """All points of all sweeps in one Monte Carlo."""
    parts = [sims.broadcast(sweep.procedure) for sweep in sweeps(SHOWN).values()]
    procedure = jax.tree.map(lambda *fields: jnp.concatenate(fields), *parts)
    return sims.monte_carlo(key, stack, problem, procedure, filter, replicates=setting.replicates)


def points_of(simulated: xr.Dataset, name: str) -> xr.Dataset:
    start = SHOWN * list(sweeps(SHOWN)).index(name)
    return simulated.isel(setting=slice(start, start + SHOWN))


def agreement(simulated: xr.Dataset, quantities: tuple[str, ...]) -> str:
    """The largest gap between simulated and expected values on the same designs, as a sentence."""
    z = np.concatenate([np.ravel(simulated[f"{name}_z"]) for name in quantities])
    return (
        f"Points: mean of {simulated.replicates} simulated draws on each of {simulated.designs} designs, bars ± one standard error given the "
        f"designs, mostly smaller than the marker; the largest gap to the exact expectation {np.abs(z).max():.1f} standard errors over {z.size} (correlated) values."
    )


def shares(simulated: xr.Dataset, expected: dict[str, xr.Dataset], setting: Setting, context: str) -> Picture:
    """Where targets come from, over strictness, judge error and paraphrase success."""
    figure, axes = canvas(3, height=2.5, sharey=True)
    variables: dict[str, Any] = {}
    for axis, (name, sweep) in zip(axes, sweeps(setting.points).items(), strict=True):
        population = theory.shares(sweep.procedure, CONTENT_RANK, RESIDUAL_STD)
        edges = np.concatenate([[np.zeros(len(sweep.values))], np.cumsum(population, axis=0)])
        for source, lower, upper in zip(SOURCES, edges[:-1], edges[1:], strict=True):
            axis.fill_between(sweep.values, lower, upper, color=SOURCES[source], linewidth=0, label=source)
        points, lines = (data.sel(procedure="S3FT") for data in (points_of(simulated, name), expected[name]))
        at = sweeps(SHOWN)[name].values
        for reached, line, error in (
            (points.own, lines.own, points.own_error),
            (1 - points.gold, 1 - lines.gold, points.gold_error),
        ):
            axis.plot(sweep.values, line, color="black", linewidth=0.8, linestyle="--")
            axis.errorbar(
                at, reached, error, color="black", fmt="o", markersize=3, capsize=1.5, markerfacecolor="white",
                clip_on=False,
            )  # fmt: skip
        axis.set(xlabel=sweep.label, xlim=(sweep.values[0], sweep.values[-1]), ylim=(0, 1))
        variables[name] = (("source", f"{name}_value"), np.stack(population))
        variables[f"{name}_value"] = sweep.values
    axes[0].set_ylabel("share of targets")
    handles, labels = axes[0].get_legend_handles_labels()
    wanted = [labels.index(source) for source in SOURCES]
    figure.legend([handles[i] for i in wanted], list(SOURCES), loc="outside upper center", ncols=3)
    panel_letters(axes)
    caption = (
        "Where the targets of S3FT come from. Areas: the population formula (T2, ours). Dashed: the exact expectation on the designs drawn, which differs from "
        f"it by the chance of the design. {agreement(simulated, ('own', 'gold'))} {BASE_TEXT}. {context}"
    )
    data = xr.Dataset(variables, {"source": list(SOURCES)})
    return Picture("s3ft_shares", "S3FT: where targets come from", caption, figure, data)


ROWS = {"content_risk": R"task: content risk $/$ SFT", "forgetting": R"forgetting $R_\mathrm{pre}$ $/$ SFT"}
SHOWN_METHODS = ("S3FT", "S3FT without paraphrase")


def against_supervised(
    key: Array,
    simulated: xr.Dataset,
    expected: dict[str, xr.Dataset],
    stack: Array,
    filter: Filter,
    setting: Setting,
    context: str,
) -> Picture:
    """Task risk and forgetting relative to supervised fine-tuning, over four properties."""
    figure, axes = canvas(4, 2, height=2.1, sharex="col", sharey="row")
    variables: dict[str, Any] = {}
    supervised = expected["strictness"].sel(procedure="SFT").isel(setting=0)
    unmoved = {"content_risk": CONTENT_RANK / float(supervised.content_risk), "forgetting": 0.0}
    for column, (name, sweep) in enumerate(sweeps(setting.points).items()):
        lines = expected[name]
        points, at = points_of(simulated, name), sweeps(SHOWN)[name].values
        for row, quantity in enumerate(ROWS):
            axis, unit = axes[4 * row + column], float(supervised[quantity])
            for method in SHOWN_METHODS:
                values = lines[quantity].sel(procedure=method) / unit
                axis.plot(sweep.values, values, color=LINES[method])
                axis.errorbar(
                    at,
                    points[quantity].sel(procedure=method) / unit,
                    points[f"{quantity}_error"].sel(procedure=method) / unit,
                    color=LINES[method],
                    fmt=MARKS[method],
                    capsize=1.5,
                )
            variables[f"{quantity}_over_{name}"] = (("procedure", f"{name}_value"), lines[quantity].values / unit)
        variables[f"{name}_value"] = sweep.values
        axes[4 + column].set_xlabel(sweep.label)
    styles = np.array([0, 2, 4, 8, 16] if setting.points > 30 else [0, 8])
    over_styles = _over_style_dimension(key, stack, styles, filter, setting)
    for row, quantity in enumerate(ROWS):
        axis, own_unit = axes[4 * row + 3], over_styles[f"{quantity}_exact"].sel(procedure="SFT", drop=True)
        for method in SHOWN_METHODS:
            points = over_styles.sel(procedure=method)
            axis.plot(styles, points[f"{quantity}_exact"] / own_unit, color=LINES[method])
            axis.errorbar(
                styles, points[quantity] / own_unit, points[f"{quantity}_error"] / own_unit,
                color=LINES[method], fmt=MARKS[method], capsize=1.5,
            )  # fmt: skip
        relative = over_styles[f"{quantity}_exact"] / own_unit
        variables[f"{quantity}_over_style_dimension"] = relative.transpose("procedure", "style_dimension")
    axes[7].set_xlabel("style outputs")
    for index, axis in enumerate(axes):
        quantity = list(ROWS)[index // 4]
        axis.axhline(1, color=LINES["SFT"], linewidth=1.2, label="SFT")
        if index % 4 < 3:
            axis.axhline(unmoved[quantity], color=LINES["pretrained"], linewidth=1, linestyle=":")
        axis.set_ylim(0, None)
    for row, text in enumerate(ROWS.values()):
        axes[4 * row].set_ylabel(text)
    for method in SHOWN_METHODS:
        axes[0].plot([], [], color=LINES[method], marker=MARKS[method], label=method)
    axes[0].plot(
        [], [], color=LINES["pretrained"], linewidth=1, linestyle=":", label="pretrained = own right answers only"
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    panel_letters(axes)
    caption = (
        "S3FT against supervised fine-tuning on gold (red, 1), ridge with the Bayes penalty of SFT for both. Paraphrases keep the model's own style, so S3FT "
        "forgets less, the more so the more style there is (right), and its task risk is no better, rather worse: a right answer "
        "taught back teaches nothing. Without paraphrases a judge must be lax to keep style. A judge that errs (second column) teaches wrong own "
        "answers and gold style. The task does not depend on paraphrases: in the upper row both methods coincide. Dotted: the pretrained model (below at 0), which is "
        "also where training on own right answers alone ends. Lines: exact expectation on the "
        f"same {setting.designs} designs. {agreement(simulated, tuple(ROWS))} On the right {over_styles.replicates} draws on each. "
        f"{BASE_TEXT}. {context}"
    )
    coordinates = {"procedure": list(sims.VARIANTS), "style_dimension": styles}
    return Picture(
        "s3ft_against_sft", "S3FT against supervised fine-tuning", caption, figure, xr.Dataset(variables, coordinates)
    )


def _over_style_dimension(key: Array, stack: Array, styles: np.ndarray, filter: Filter, setting: Setting) -> xr.Dataset:
    draw_key, replicates = jax.random.fold_in(key, 1), max(setting.replicates // 4, 2)
    runs = [
        sims.monte_carlo(
            draw_key, stack, vector_problem(key, setting, int(number)), BASE, filter, replicates=replicates
        )
        for number in styles
    ]
    return xr.concat(runs, xr.Variable("style_dimension", styles), combine_attrs="override").isel(setting=0)


# ------------------------------------------------------------------------------------- the plane, and sample size


def trade_off(stack: Array, problem: VectorProblem, filter: Filter, setting: Setting, context: str) -> Picture:
    """The plane forgetting × task risk: S3FT over its tolerance, and ensembles of SFT and of S3FT."""
    tolerances = np.linspace(0, 5, setting.points) * RESIDUAL_STD
    tau = np.linspace(0, 1, 21)
    path = sims.expected_on(stack, problem, BASE._replace(tolerance=jnp.asarray(tolerances)), filter)
    strict = BASE._replace(tolerance=0.5 * RESIDUAL_STD)
    averaged = xr.concat(
        [sims.expected_on(stack, problem, strict, float(t) * filter) for t in tau], xr.Variable("tau", tau)
    ).isel(setting=0)
    figure, axes = canvas(1, width=COLUMN * 1.5, height=3.1)
    axis = axes[0]
    for method in SHOWN_METHODS:
        curve = path.sel(procedure=method)
        axis.plot(curve.forgetting, curve.content_risk, color=LINES[method], label=f"{method}, tolerance 0 to 5√v")
    for method, style in (("SFT", "-"), ("S3FT", "--")):
        curve = averaged.sel(procedure=method)
        colour = LINES["SFT + ensemble"] if method == "SFT" else LINES["S3FT"]
        axis.plot(
            curve.forgetting,
            curve.content_risk,
            color=colour,
            linestyle=style,
            label=f"{method} + ensemble, τ from 0 to 1",
        )
    for name, curve in (
        ("pretrained", averaged.isel(tau=0).sel(procedure="SFT")),
        ("SFT", averaged.isel(tau=-1).sel(procedure="SFT")),
    ):
        point = float(curve.forgetting), float(curve.content_risk)
        axis.plot(*point, "o", color=LINES[name])
        axis.annotate(name, point, (5, 4), textcoords="offset points", fontsize=7)
    axis.set(xlabel=R"forgetting: pretraining risk $R_\mathrm{pre}$, all outputs", ylabel="task: content risk")
    axis.legend(loc="upper right")
    caption = (
        "Forgetting against the task (lower left is better). Averaging SFT with the pretrained model (pink) shrinks content and style alike; S3FT "
        f"leaves style where it was. The two add up: S3FT with a strict judge (tolerance 0.5 √v), then averaged (dashed), forgets least of these at any task risk it reaches. "
        f"Ridge with the Bayes penalty of SFT; exact expectation over {len(stack)} designs. {BASE_TEXT}. {context}"
    )
    variables = {
        f"{name}_along_{along}": (("procedure", along), data[name].transpose("procedure", ...).values)
        for along, data in (("tolerance", path.rename(tolerance="used").rename(setting="tolerance")), ("tau", averaged))
        for name in ("forgetting", "content_risk")
    }
    data = xr.Dataset(variables, {"procedure": list(sims.VARIANTS), "tolerance": tolerances, "tau": tau})
    return Picture("s3ft_trade_off", "S3FT: the trade-off plane", caption, figure, data)


def sample_size(keys: Array, problem: VectorProblem, setting: Setting, context: str) -> Picture:
    """Task risk and forgetting against n, min-norm and ridge, to the population limit."""
    sizes = np.unique(np.geomspace(setting.p / 16, 8 * setting.p, 11 if setting.points > 30 else 4).astype(int))
    sizes = sizes[abs(np.log(sizes / setting.p)) > 0.2]
    shown = sizes[::4] if setting.points > 30 else sizes[:1]  # every size is compiled for
    filters = {"min-norm": lambda n: MinNorm(), "ridge": lambda n: bayes_ridge(problem, n)}
    exact, simulated = [], []
    for filter in filters.values():
        stacks = {int(n): sample_designs(keys[0], problem.finetune_covariance, int(n), 2) for n in sizes}
        lines = [sims.expected_on(stack, problem, BASE, filter(n)) for n, stack in stacks.items()]
        points = [
            sims.monte_carlo(keys[1], stacks[n], problem, BASE, filter(n), replicates=max(setting.replicates // 4, 2))
            for n in map(int, shown)
        ]
        exact.append(xr.concat(lines, xr.Variable("n", sizes)))
        simulated.append(xr.concat(points, xr.Variable("n", shown), combine_attrs="drop_conflicts"))
    names = xr.Variable("filter", list(filters))
    data, measured = (xr.concat(runs, names, combine_attrs="override").isel(setting=0) for runs in (exact, simulated))
    limits = {name: theory.population(problem, sims.variant(name, BASE)) for name in sims.VARIANTS}
    figure, axes = canvas(4, height=2.3)
    for axis, (quantity, name) in zip(axes, itertools.product(ROWS, filters), strict=True):
        for method in sims.VARIANTS:
            curve = data[quantity].sel(procedure=method, filter=name)
            for side in (sizes < setting.p, sizes > setting.p):
                axis.plot(sizes[side] / setting.p, curve[side], color=LINES[method])
            at = measured.sel(procedure=method, filter=name)
            axis.errorbar(
                shown / setting.p, at[quantity], at[f"{quantity}_error"],
                color=LINES[method], fmt=MARKS[method], markersize=3, capsize=1.5, label=method,
            )  # fmt: skip
            limit = float(getattr(limits[method], quantity))
            if limit > 0:
                axis.axhline(limit, color=LINES[method], linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="samples / features", title=name)
    for column, text in enumerate(("task: content risk", R"forgetting $R_\mathrm{pre}$")):
        pair = axes[2 * column : 2 * column + 2]
        low, high = min(axis.get_ylim()[0] for axis in pair), max(axis.get_ylim()[1] for axis in pair)
        for axis in pair:
            axis.set_ylim(low, high)
            readable_ticks(axis.yaxis)
        pair[0].set_ylabel(text)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    panel_letters(axes)
    caption = (
        "Over the number of samples, for min-norm and for ridge with the Bayes penalty of SFT; n near p, where min-norm has its peak, is left out. "
        "At every n S3FT forgets less than SFT and does worse on the task: with more data the risk of SFT goes on falling, that of S3FT stays above a limit, since what "
        "is within the tolerance is never learned. In (a) and (b) S3FT with and without paraphrases coincide. Dotted: the population limit (0 for SFT in a and b, not drawn). "
        f"Lines: exact expectation on the same designs. {agreement(measured, tuple(ROWS))} {BASE_TEXT}. {context}"
    )
    renamed = {"n": "n_simulated"} | {str(name): f"{name}_simulated" for name in measured}
    both = xr.merge(
        [data, measured.rename(renamed)], combine_attrs="drop", compat="no_conflicts", join="outer"
    ).drop_vars(list(BASE._fields))
    return Picture("s3ft_sample_size", "S3FT over the number of samples", caption, figure, both)


# --------------------------------------------------------------------------------------- where training ends

RANKS = {1: ("-", "o"), 2: ("--", ""), 8: (":", "^")}
"""Line and marker of each content rank; those with a marker are measured."""
STRICT = {0.1: ("-", ""), 1.0: ("--", "s"), 2.0: (":", "^")}
"""Tolerances, in units of √v, for own answers alone, likewise."""


def coefficients(key: Array, setting: Setting, seed: int) -> Picture:
    """The two coefficients of S3FT, and that of own answers alone, over what drives them: formulas and least squares."""
    figure, axes = canvas(3, height=2.6, sharey=True)
    tolerance, sampling = np.linspace(0, 4, setting.points), np.linspace(0, 2, setting.points)
    shown, marked = np.linspace(0.5, 3.5, 7), np.array([0.4, 0.8, 1.2, 1.6, 2.0])
    variables: dict[str, Any] = {}
    gaps = []

    def compare(axis: Any, at: np.ndarray, data: xr.Dataset, name: str, exact: Array, mark: str, method: str) -> None:
        axis.errorbar(at, data[name], data[f"{name}_error"], color=LINES[method], fmt=mark, capsize=1.5)
        gaps.append((data[name].values - exact) / data[f"{name}_error"].values)

    def measured(rank: int, *procedures: Procedure) -> xr.Dataset:
        """All in one run, with one style output and v = 1."""
        problem = sims.content_and_style_problem(
            key, 12, rank, 1, content_signal=0.5, style_signal=0.5, noise_variance=0.5
        )
        stacked = jax.tree.map(lambda *fields: jnp.concatenate(fields), *map(sims.broadcast, procedures))
        return sims.measured_coefficients(
            key, problem, setting.population, stacked, replicates=setting.population_replicates
        )

    half = Procedure(jnp.asarray(shown), paraphrase_success=0.5)
    alone = {
        strict: Procedure(strict, sampling_std=jnp.asarray(marked)) for strict, (_, mark) in STRICT.items() if mark
    }
    for rank, (line, mark) in RANKS.items():
        curves = theory.coefficients(half._replace(tolerance=jnp.asarray(tolerance)), rank, 1.0)
        for axis, name in zip(axes, curves._fields, strict=False):
            curve = getattr(curves, name)
            axis.plot(tolerance, curve, color=LINES["S3FT"], linestyle=line, label=f"k = {rank}")
            variables[f"{name}_{rank}"] = ("tolerance", np.asarray(curve))
        if not mark or (rank > 1 and setting.points < 30):  # once is enough for a first look
            continue
        data = measured(rank, half, *(alone.values() if rank == 1 else ()))
        exact = theory.coefficients(half, rank, 1.0)
        for axis, name in zip(axes, exact._fields, strict=False):
            chosen = data.isel(setting=slice(len(shown)))
            compare(axis, shown, chosen, name, getattr(exact, name), mark, "S3FT")
        if rank == 1:
            rejection = data.isel(setting=slice(len(shown), None))
    for strict, (line, _) in STRICT.items():
        curve = theory.rejection_coefficient(
            Procedure(strict, sampling_std=jnp.asarray(sampling)), 1, 0.5, NOISE_VARIANCE**0.5
        )
        axes[2].plot(sampling, curve, color=LINES["own right answers only"], linestyle=line, label=f"{strict:g}")
        variables[f"rejection_{strict:g}"] = ("sampling_std", np.asarray(curve))
    for index, (strict, procedure) in enumerate(alone.items()):
        data = rejection.isel(setting=slice(index * len(marked), (index + 1) * len(marked)))
        predicted = theory.rejection_coefficient(procedure, 1, 0.5, NOISE_VARIANCE**0.5)
        compare(axes[2], marked, data, "rejection", predicted, STRICT[strict][1], "own right answers only")
    axes[0].set(xlabel=R"tolerance of the judge $/\sqrt{v}$", ylabel="coefficient", title="S3FT: content")
    axes[1].set(xlabel=R"tolerance of the judge $/\sqrt{v}$", title="S3FT: style")
    axes[2].set(xlabel=R"sampling noise $s/\sqrt{v}$", title="own right answers only", ylim=(-0.03, 1.08))
    for axis, title in zip(axes, ("content rank", "content rank", R"tolerance $/\sqrt{v}$"), strict=True):
        axis.legend(title=title, title_fontsize=7)
    panel_letters(axes)
    z_scores = np.abs(np.concatenate(gaps))
    caption = (
        "Where training ends with unlimited data: the fraction of the way from the pretrained to the optimal weights, for content and for style (T2, ours). "
        "(a) S3FT leaves out what is within the tolerance (k = 1: T1). (b) Style is learned from gold targets only, here with paraphrases that succeed half the time: at most half the way. "
        "(c) Training on own right answers alone moves content by sampling noise only, at most to s²/(s²+σ²), with a strict judge; k = 1. "
        f"Lines: formulas; points: least squares on {setting.population} samples of 12 features, mean of {setting.population_replicates} replicates ± one standard error, "
        f"σ² = v/2, a judge without error; the largest gap {z_scores.max():.1f} standard errors over {z_scores.size} values (with finitely many samples there is a bias of order p/n besides). Seed {seed}."
    )
    coordinates = {"tolerance": tolerance, "sampling_std": sampling}
    return Picture(
        "s3ft_coefficients", "S3FT: where training ends", caption, figure, xr.Dataset(variables, coordinates)
    )


# --------------------------------------------------------------------------------------------------- real data


def digits(key: Array, setting: Setting, seed: int) -> Picture:
    """Digits with nuisance outputs: task, style drift and forgetting of every method."""
    styles = (0, 10, 40)
    data = sims.digits(key, 0.1, styles, setting.splits, false_accept=ERROR, false_reject=ERROR, **setting.digits)
    figure, axes = canvas(3, height=2.5)
    quantities = {
        "content_risk": "task: error turned",
        "style_drift": "style drift",
        "forgetting": "forgetting: error upright",
    }
    for axis, (quantity, label) in zip(axes, quantities.items(), strict=True):
        for index, method in enumerate(sims.DIGITS_METHODS):
            curve = data.sel(procedure=method)
            axis.errorbar(
                np.arange(len(styles)) + 0.12 * (index - 2),
                curve[quantity],
                curve[f"{quantity}_error"],
                color=LINES[method],
                fmt=MARKS[method],
                capsize=1.5,
                label=method,
                clip_on=False,
            )
        axis.set(
            xticks=range(len(styles)),
            xticklabels=[str(count) for count in styles],
            xlabel="style outputs",
            ylabel=label,
        )
        axis.set_ylim(0, None)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    panel_letters(axes)
    chosen, most = data.sel(procedure="S3FT", style_dimension=styles[0]), data.sel(style_dimension=styles[-1])
    accuracy = {name: float(data.accuracy.sel(procedure=name).isel(style_dimension=0)) for name in sims.DIGITS_METHODS}
    caption = (
        f"Handwritten digits, random Fourier features (p = {setting.digits['p']}): pretrained on {setting.digits['n_pretrain']} upright images, fine-tuned by min-norm on 150 images turned by 45°. "
        "Content: ten class indicators, an own answer right if its class is; style: outputs that are other linear functions of the features in fine-tuning than in pretraining. "
        f"Noise 0.1 on all gold answers; the judge errs with probability {ERROR} either way. Targets of S3FT: {float(chosen.own):.0%} own, {float(chosen.paraphrase):.0%} paraphrased, "
        f"{float(chosen.gold):.0%} gold. Accuracy on turned digits: "
        + ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
        + f". Squared errors: of the indicators on turned images in (a), of all outputs on upright ones in (c); at {styles[-1]} style outputs forgetting is "
        + ", ".join(f"{float(most.forgetting.sel(procedure=name)):.1f} for {name}" for name in sims.DIGITS_METHODS[1:])
        + f". Mean over {data.splits} splits ± one standard error, held-out images with clean labels; SFT + ensemble at τ = ½. Outputs do not share weights here, so the task does not depend on the style. Seed {seed}."
    )
    return Picture("s3ft_digits", "S3FT on the digits", caption, figure, data)
