"""One picture for all four papers: equivalent coefficients, the plane with every method, and who wins in which world."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D

from figures.style import PAGE, Picture, canvas, panel_letters, readable_ticks
from linfit import FixedShift, GradientFlow, TwoTaskProblem, spectra
from sims.compare import DISGUISES, RECIPES, Samples, disguised, frontier, knob, measure, rank, worlds
from theory.flow import trajectory
from theory.frontier import smoothing_coefficient


class Setting(NamedTuple):
    """Sizes of a run; the quick one is for CI and first looks."""

    n: int
    p: int
    tasks: int
    validation: int
    features: int
    ratios: tuple[float, ...]
    replicates: int

    @property
    def rows(self) -> int:
        """Samples of the largest least-squares fit."""
        return int(self.ratios[-1] * self.features)

    def __str__(self) -> str:
        return f"n = {self.n}, p = {self.p}"


FULL = Setting(100, 300, 64, 32, 20, (3, 4, 6, 10, 20, 50), 128)
QUICK = Setting(30, 90, 8, 8, 10, (4, 10, 50), 24)

GROUPS = {
    "the two ends": ("#000000", "o", ("pretrained", "vanilla")),
    "how far to move": (
        "#0072B2",
        "s",
        ("early stopping", "ridge", "L1 to init", "low rank", "random sub-nets"),
    ),
    "averaging": ("#CC79A7", "D", ("min-norm + ensemble", "ridge + ensemble", "FLOW + ensemble", "emulated")),
    "other weights or targets": ("#009E73", "^", ("FLOW", "S3FT")),
    "something left of pretraining": ("#D55E00", "P", ("replay", "EWC", "several anchors")),
}
"""Methods of a kind share colour and marker; the last group sees more than the fine-tuning data and θ₁."""
STYLE = {name: (colour, marker) for colour, marker, names in GROUPS.values() for name in names}
DISGUISE_COLOURS = dict(zip(DISGUISES, ("#CC79A7", "#0072B2", "#56B4E9", "#009E73", "#E69F00"), strict=True))
KNOBS = {"S3FT": "c/√v", "clipped targets": "c/√v", "FLOW": "T/v", "trimming": "c/√v"}
NOISE_VARIANCE, TAU = 0.5, 0.5
PLANES = ("isotropic shift, low noise", "head shift, high noise")


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """The break-down of the equivalence, the planes, and the ranked tables."""
    setting = QUICK if quick else FULL
    seed = int(jax.random.key_data(key).ravel()[-1])
    keys = jax.random.split(key)
    yield equivalent_coefficients(keys[0], setting, seed)
    samples = {
        name: (problem, measure(keys[1], problem, setting.n, setting.validation + setting.tasks))
        for name, problem in worlds(setting.p).items()
    }
    yield planes(samples, setting, seed)
    yield tables(samples, setting, seed)


def spread_problem(p: int, concentrated: bool) -> TwoTaskProblem:
    """Σ = diag(1/j), ‖δ‖²_Σ = 1 in one coordinate or in all alike, σ² = ½."""
    spectrum = spectra.power_law(p)
    shift = (jnp.arange(p) == 0).astype(spectrum.dtype) if concentrated else jnp.full(p, spectrum.sum() ** -0.5)
    return TwoTaskProblem(spectrum, spectrum, FixedShift(shift), NOISE_VARIANCE**0.5)


def equivalent_coefficients(key: Array, setting: Setting, seed: int) -> Picture:
    """Where FLOW, S3FT and others are an ensemble, and where that ends."""
    figure, axes = canvas(2, 2, height=2.5)
    noise_std = NOISE_VARIANCE**0.5
    along_knobs, at_knobs, worst = _along_knobs(axes[0], key, setting, noise_std)
    knobs = {name: knob(name, TAU, 1.0, noise_std) for name in DISGUISES}
    along_size = _along_size(axes[1], key, setting, knobs)
    few = along_size.tau_along_size.sel(estimator="FLOW").isel(ratio=0)
    along_law = _along_law(axes[2], key, setting, knobs)
    paths = _paths(axes[3], setting)
    panel_letters(axes)
    caption = (
        "Methods that are an ensemble in disguise. (a) In the Gaussian population FLOW, S3FT, clipped targets and dropping hard "
        "samples all end on the segment between pretrained and fine-tuned optimum; lines: the equivalent τ against their own knob "
        "(label smoothing towards own predictions: τ = 1 − α for any data; v: residual variance of the pretrained "
        f"model; σ² = v/3); points: fitted on {at_knobs.n} samples of {setting.features} features, at most {worst:.1f} standard errors off. (b) All tuned to τ = ½, fewer samples: the same bias (dotted) but not "
        "the same variance; an average of the plain fit is the least noisy of them, S3FT and trimming are the noisiest. (With few "
        f"samples FLOW overshoots: its fitted τ is {few.item():.2f} at {setting.ratios[0]} per feature.) (c) The "
        "fitted τ for coordinates that are Gaussian, ±1 (Rademacher) or heavy-tailed (Student, 8 degrees of freedom), n = "
        f"{along_law.n}, the shift in one coordinate or spread over all: S3FT and clipping need Gaussian residuals, which a shift "
        "over many coordinates brings about; FLOW needs Gaussian noise only (it and trimming miss ½ a little by the finite sample, "
        "whatever the law). (d) Gradient flow stopped early on population losses: the angle to the segment against the τ reached, "
        "vanilla (and Huber, whose path is the same in slower time) and FLOW at the median temperature. Both stay on the segment if "
        "the spectrum is flat; otherwise they start away from it and reach it only at their end, τ = 1 and FLOW's fixed point. "
        f"Bars: ± one standard error over {setting.replicates} draws. Σ = diag(1/j) unless flat, ‖δ‖²_Σ = 1, σ² = ½; seed {seed}."
    )
    data = xr.merge([along_knobs, along_size, along_law, paths], combine_attrs="drop", compat="no_conflicts")
    return Picture("equivalent_coefficients", "Methods that are an ensemble in disguise", caption, figure, data)


def _along_knobs(axis: Axes, key: Array, setting: Setting, noise_std: float) -> tuple[xr.Dataset, xr.Dataset, float]:
    standardised, v = np.logspace(-1.5, 1.5, 91), 1 + NOISE_VARIANCE
    unit = {name: v if name == "FLOW" else v**0.5 for name in KNOBS}

    def predicted(name: str, at: np.ndarray) -> np.ndarray:
        return np.broadcast_to(DISGUISES[name].tau(at * unit[name], 1.0, noise_std), at.shape)

    shown = np.array([0.2, 0.6, 1.2, 2.0])
    problem = spread_problem(setting.features, False)
    knobs = {name: shown * unit[name] for name in KNOBS}
    measured = disguised(key, problem, setting.rows, knobs, setting.replicates)
    gaps = []
    for name in KNOBS:
        colour, points = DISGUISE_COLOURS[name], measured.sel(estimator=name)
        axis.plot(standardised, predicted(name, standardised), color=colour, label=f"{name}, {KNOBS[name]}")
        axis.errorbar(shown, points.tau, points.tau_error, fmt="o", color=colour, capsize=1.5)
        gaps.append(abs((points.tau.values - predicted(name, shown)) / points.tau_error.values).max())
    softened = standardised[standardised < 1]
    axis.plot(softened, smoothing_coefficient(softened), color=DISGUISE_COLOURS["ensemble"], label="label smoothing, α")
    axis.set(xscale="log", ylim=(-0.03, 1.45), yticks=[0, 0.25, 0.5, 0.75, 1])
    axis.set_xlabel("knob, in units of the residuals")
    axis.set_ylabel(R"equivalent coefficient $\tau$")
    axis.legend(ncols=2, loc="upper left", fontsize=6.5)
    data = xr.Dataset(
        {
            "tau_theory": (("disguise", "knob"), np.stack([predicted(name, standardised) for name in KNOBS])),
            "tau_points": (("disguise", "shown"), measured.tau.values),
            "tau_points_error": (("disguise", "shown"), measured.tau_error.values),
        },
        {"disguise": list(KNOBS), "knob": standardised, "shown": shown},
    )
    return data, measured, float(max(gaps))


def _along_size(axis: Axes, key: Array, setting: Setting, knobs: dict[str, float]) -> xr.Dataset:
    problem, ratios = spread_problem(setting.features, False), np.array(setting.ratios)
    runs = [
        disguised(key, problem, int(r * setting.features), knobs, setting.replicates, rows=setting.rows) for r in ratios
    ]
    data = xr.concat(runs, xr.Variable("ratio", ratios), combine_attrs="override").isel(setting=0)
    for name in data.estimator.values:
        curve = data.sel(estimator=name)
        axis.errorbar(
            ratios,
            curve.finetune,
            curve.finetune_error,
            color=DISGUISE_COLOURS[name],
            capsize=1.5,
            marker="o",
            label=name,
        )
    axis.axhline((1 - TAU) ** 2, color="#555555", linestyle=":", linewidth=1, label=R"bias, $(1-\tau)^2$")
    axis.set(xscale="log")
    axis.set_xlabel("samples per feature, n/p")
    axis.set_ylabel(R"$R_\mathrm{ft}$ of the fit")
    axis.set_xticks(ratios, labels=[f"{r:g}" for r in ratios], minor=False)
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=6.5)
    return data.rename({name: f"{name}_along_size" for name in data})


def _along_law(axis: Axes, key: Array, setting: Setting, knobs: dict[str, float]) -> xr.Dataset:
    laws = {"rademacher": "o", "student": "s", "gaussian": "x"}
    cases = [(law, concentrated) for concentrated in (True, False) for law in ("rademacher", "student")]
    cases.append(("gaussian", False))
    n = setting.rows // 2
    runs = [
        disguised(
            key, spread_problem(setting.features, concentrated), n, knobs, setting.replicates, law, setting.rows
        ).isel(setting=0)
        for law, concentrated in cases
    ]
    labels = [f"{law.title()}, {'one coordinate' if concentrated else 'all alike'}" for law, concentrated in cases]
    data = xr.concat(runs, xr.Variable("case", labels), combine_attrs="override")
    rows = np.arange(len(knobs))[::-1]
    for place, ((law, concentrated), label) in enumerate(zip(cases, labels, strict=True)):
        colour = "#000000" if law == "gaussian" else "#D55E00" if concentrated else "#0072B2"
        points = data.sel(case=label)
        axis.errorbar(
            points.tau,
            rows + 0.28 - 0.14 * place,
            xerr=points.tau_error,
            fmt=laws[law],
            color=colour,
            fillstyle="full" if concentrated else "none",
            label=label,
            capsize=1.5,
        )
    axis.plot([TAU, TAU], [-0.5, len(rows) - 0.4], color="#555555", linestyle=":", linewidth=1)
    axis.set_yticks(rows, labels=list(knobs))
    axis.set_xlabel(R"fitted $\tau$ (predicted: ½)")
    axis.set_ylim(-0.5, len(rows) + 1.2)
    axis.legend(ncols=2, loc="upper center", fontsize=6, handletextpad=0.2, columnspacing=0.8)
    return data.rename({name: f"{name}_along_law" for name in data})


def _paths(axis: Axes, setting: Setting) -> xr.Dataset:
    times = np.logspace(-2, 5, 141)
    runs = {}
    for spectrum, style in ((spectra.power_law(setting.features), "-"), (spectra.isotropic(setting.features), "--")):
        delta = jnp.full(setting.features, spectrum.sum() ** -0.5)
        problem = TwoTaskProblem(spectrum, spectrum, FixedShift(delta), NOISE_VARIANCE**0.5)
        flat = "flat" if style == "--" else "diag(1/j)"
        moves = {
            "vanilla, Huber": -jnp.expm1(-times[:, None] * spectrum) * delta,
            "FLOW": trajectory(problem, GradientFlow(times)).moved,
        }
        for name, moved in moves.items():
            tau = (moved * spectrum) @ delta
            length = jnp.sqrt(jnp.sum(moved**2 * spectrum, axis=-1))
            angle = jnp.degrees(jnp.arccos(jnp.clip(tau / length, -1, 1)))
            colour = DISGUISE_COLOURS["FLOW"] if name == "FLOW" else "#D55E00"
            axis.plot(tau, angle, style, color=colour, label=f"{name}, Σ {flat}")
            runs[f"{name}, Σ {flat}"] = np.stack([tau, angle])
    axis.set_xlabel(R"coefficient $\tau$ reached")
    axis.set_ylabel("angle to the segment [°]")
    axis.set_ylim(-2, 1.45 * max(run[1].max() for run in runs.values()))
    axis.legend(fontsize=6.5, ncols=2, loc="upper center", columnspacing=0.8)
    return xr.Dataset(
        {"path": (("line", "coordinate", "time"), np.stack(list(runs.values())))},
        {"line": list(runs), "coordinate": ["tau", "angle"], "time": times},
    )


Measured = dict[str, tuple[TwoTaskProblem, Samples]]


def planes(samples: Measured, setting: Setting, seed: int) -> Picture:
    """Both risks of every method in two worlds, and the frontier."""
    figure, axes = canvas(2, height=4.3)
    runs = []
    for axis, world in zip(axes, PLANES, strict=True):
        problem, measured = samples[world]
        data = rank(measured, problem, validation=setting.validation)
        edge = frontier(measured, problem, np.logspace(-3, 3, 121), setting.validation)
        axis.plot(edge.pretrain, edge.finetune, color="#555555", linewidth=1.2)
        axis.fill_between(edge.pretrain, edge.finetune, 1e-6, color="#555555", alpha=0.12, linewidth=0)
        for name in data.estimator.values:
            colour, marker = STYLE[name]
            point = data.sel(estimator=name)
            axis.errorbar(
                point.pretrain,
                point.finetune,
                point.finetune_error,
                point.pretrain_error,
                fmt=marker,
                color=colour,
                markersize=5,
                linewidth=0.8,
            )
        axis.set(xscale="log", yscale="log", title=world)
        axis.set_xlim(0.5 * float(data.pretrain.min()), 1.5 * float(data.pretrain.max()))
        axis.set_ylim(0.7 * float(data.finetune.min()), 1.2 * float(data.finetune.max()))
        for direction in (axis.xaxis, axis.yaxis):
            readable_ticks(direction)
        axis.set_xlabel(R"forgetting: pretraining risk $R_\mathrm{pre}$")
        _name_points(axis, data)
        runs.append(data.merge(edge.rename(finetune="frontier_finetune", pretrain="frontier_pretrain")))
    axes[0].set_ylabel(R"fine-tuning risk $R_\mathrm{ft}$")
    panel_letters(axes)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=group)
        for group, (colour, marker, _) in GROUPS.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=6.5,
        handletextpad=0.1,
        columnspacing=1.0,
    )
    data = xr.concat(runs, xr.Variable("world", list(PLANES)), combine_attrs="drop", join="outer")
    caption = (
        "Every method at its own best hyperparameters in the plane of both risks (lower left is better). Line: the Pareto frontier "
        "of the same shifts, what weights could reach that knew both covariances and the shift; nothing can be in the shade below "
        f"it. {_tuning(setting, 1.0)} Bars ± one standard error over {setting.tasks} tasks, mostly smaller than the points. "
        f"{_world_text(setting)} Seed {seed}."
    )
    return Picture("methods_plane", "Every method in one plane", caption, figure, data)


def _name_points(axis: Axes, data: xr.Dataset) -> None:
    """Names in a column at the right, in the order of the points' heights, each tied to its point."""
    order = data.estimator.values[np.argsort(data.finetune.values, kind="stable")]
    low, high = np.log(axis.get_ylim())
    heights = (np.log(data.finetune.sel(estimator=order).values) - low) / (high - low)
    gaps = 0.048 * np.arange(len(order))  # the nearest heights that leave room for every name
    places = np.clip(scipy.optimize.isotonic_regression(heights - gaps).x, 0.01, 0.99 - gaps[-1]) + gaps
    for place, name in zip(places, order, strict=True):
        point = data.sel(estimator=name)
        axis.annotate(
            name,
            (float(point.pretrain), float(point.finetune)),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=6.5,
            color=STYLE[name][0],
            arrowprops={
                "arrowstyle": "-",
                "color": STYLE[name][0],
                "linewidth": 0.5,
                "alpha": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 2,
            },
            annotation_clip=False,
        )


def tables(samples: Measured, setting: Setting, seed: int) -> Picture:
    """Ranked tables over the worlds, tuned for both risks and for the new task alone."""
    figure, axes = canvas(2, height=5.0, width=PAGE)
    runs = {}
    for axis, weight, text in zip(
        axes, (1.0, 0.0), (R"$R_\mathrm{ft} + R_\mathrm{pre}$", R"$R_\mathrm{ft}$ alone"), strict=True
    ):
        ranked = {
            world: rank(measured, problem, weight, setting.validation) for world, (problem, measured) in samples.items()
        }
        data = xr.concat(
            [ranked[world].reindex(estimator=list(RECIPES)) for world in ranked],
            xr.Variable("world", list(ranked)),
            combine_attrs="drop",
        )
        _heat_map(axis, data)
        axis.set_title(f"tuned for and judged by {text}", fontsize=7.5, pad=22)
        runs["both" if weight else "finetune"] = data
    panel_letters(axes)
    caption = (
        "Which method suits which world. Each cell: the criterion, below it one standard error over "
        f"{setting.tasks} tasks, colour: relative to the best of its column (dark: best); rows by the mean logarithm of that ratio, best first. "
        "† sees more than the fine-tuning data and one pretrained model: pretraining samples (replay), the diagonal of Σ₁ (EWC, "
        "here all of Σ₁, which is diagonal), seven more pretrained models (several anchors). Among the others, "
        f"{_winners_text(runs['both'])} "
        f"{_tuning(setting, None)} {_world_text(setting)} Seed {seed}."
    )
    data = xr.concat(list(runs.values()), xr.Variable("goal", list(runs)), combine_attrs="drop")
    return Picture("methods_table", "Which method suits which world", caption, figure, data)


def _winners_text(data: xr.Dataset) -> str:
    """The best method of each world without extra information, as a sentence."""
    plain = [name for name in data.estimator.values if name not in GROUPS["something left of pretraining"][2]]
    best = data.criterion.sel(estimator=plain).idxmin("estimator")
    parts = [f"{world!s}: {best.sel(world=world).values!s}" for world in data.world.values]
    return f"best for both risks are ({'; '.join(parts)})."


def _heat_map(axis: Axes, data: xr.Dataset) -> None:
    ratio = data.criterion / data.criterion.min("estimator")
    order = np.argsort(np.log(ratio).mean("world").values, kind="stable")
    ratio, shown = ratio.isel(estimator=order).T.values, data.isel(estimator=order)
    axis.imshow(ratio, norm=LogNorm(1, 4), cmap="cividis", aspect="auto")
    for row in range(ratio.shape[0]):
        for column in range(ratio.shape[1]):
            cell = shown.isel(estimator=row, world=column)
            axis.text(
                column,
                row,
                f"{_digits(float(cell.criterion))}\n±{float(cell.criterion_error):.1g}",
                ha="center",
                va="center",
                fontsize=5,
                linespacing=0.95,
                color="white" if ratio[row, column] < 1.9 else "black",
                fontweight="bold" if ratio[row, column] == 1 else "normal",
            )
    extra = GROUPS["something left of pretraining"][2]
    labels = [f"{name} †" if name in extra else str(name) for name in shown.estimator.values]
    axis.set_yticks(range(len(labels)), labels=labels, fontsize=6.5)
    for tick, name in zip(axis.get_yticklabels(), shown.estimator.values, strict=True):
        tick.set_color(STYLE[name][0])
    columns = [str(world).replace(" shift, ", "\n").replace("noise", "σ²") for world in shown.world.values]
    axis.set_xticks(range(len(columns)), labels=columns, fontsize=5.5)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def _digits(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _tuning(setting: Setting, weight: float | None) -> str:
    goal = "the criterion" if weight is None else "R_ft + R_pre"
    return (
        f"Hyperparameters minimise {goal} averaged over {setting.validation} validation tasks, other than those shown."
    )


def _world_text(setting: Setting) -> str:
    return (
        "Σ₂ = diag(1/j), Σ₁ ∝ diag(1/√j) of the same trace, Ω ∝ Σ₂^α with tr ΩΣ₂ = 1 (α = −1 tail, 0 isotropic, +1 head), "
        f"σ² = 0.05 (low noise) or 1 (high), R_pre(θ₁) = 0.1; {setting}."
    )
