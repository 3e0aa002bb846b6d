"""The figures of the FLOW paper (2502.02797) in its linear setting, theory beside simulation, and what samples add."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes

from figures.style import COLOURS, Picture, canvas, panel_letters
from linfit import (
    FixedShift,
    GradientDescent,
    GradientFlow,
    MinNorm,
    RandomShift,
    Ridge,
    TwoTaskProblem,
    aligned_problem,
    flow_weights,
    spectra,
)
from linfit.filters import Several
from linfit.weighting import robust_weights
from sims import flow as sims
from theory import flow as theory
from theory.frontier import pareto, pareto_weights


class Setting(NamedTuple):
    """Sizes of a run; the quick one is for CI and first looks."""

    p: int
    few: int
    many: int
    replicates: int
    tilts: tuple[float, ...]
    large: int
    repeats: int
    splits: int
    features: int


FULL = Setting(120, 40, 400, 64, (-1, -0.5, -0.25, -0.125, 0, 1 / 16, 0.125, 0.25, 0.5, 1, 2, 4), 20_000, 12, 8, 2048)
QUICK = Setting(40, 16, 120, 12, (-0.25, 0, 0.25, 1), 4_000, 4, 2, 512)

NOISE_VARIANCE, ALIGNMENT, PRETRAIN_DECAY = 1.0, 0.5, 0.5
PROBLEM_TEXT = "Σ₂ = diag(1/j), Σ₁ = diag(1/√j), shift covariance Ω ∝ Σ₂^½ with tr ΩΣ₂ = 1, labels off the line by σ² = 1, θ₁ = θ₁*"
TIMES = np.logspace(-1, 8, 46)
PENALTIES = np.logspace(-4, 3, 29)
RHO, BLOCK = 0.76, ((2.7, 0.0), (0.0, 1.0))
"""Correlation in Σ₂ and the block of Σ₁ on (ē, ē⊥) for the setting of Theorem 7.2."""

VANILLA, FLOW, MEAN_ONE, AVERAGING, BOTH = "vanilla", "FLOW", "FLOW, mean one", "averaging", "FLOW + averaging"
HOT = "FLOW, T = 4 × median"
LIGHT, BLUE, DARK = "#9AD0F0", "#0072B2", "#003A66"
"""FLOW at a high temperature, at the median, and at a low one."""

COLOUR = {
    VANILLA: COLOURS["fine-tuned"],
    FLOW: BLUE,
    MEAN_ONE: "#56B4E9",
    HOT: LIGHT,
    BOTH: "#56B4E9",
    "FLOW + ridge": "#56B4E9",
    AVERAGING: COLOURS["ensemble"],
    "early stopping": COLOURS["early stopping"],
    "early stopping + averaging": COLOURS["early stopping"],
    "L2 to init": "#E69F00",
    "L2 to zero": "#B8A000",
    "floor": COLOURS["oracle"],
}
STYLE = {BOTH: "--", "early stopping + averaging": "--", "FLOW + ridge": ":", "floor": "--"}
DEVIATION_TEXT = {"gaussian": "Gaussian noise", "outliers": "outliers", "misfit": "misfit"}
DEVIATION_COLOUR = {"gaussian": "#0072B2", "outliers": "#D55E00", "misfit": "#009E73"}


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the paper, one after the other."""
    setting = QUICK if quick else FULL
    seed = int(jax.random.key_data(key).ravel()[-1])
    keys = jax.random.split(key, 6)
    yield along_training(keys[0], setting, seed)
    yield stalled(keys[1], setting, seed)
    yield plane()
    problem = aligned_problem(
        spectra.power_law(setting.p),
        alignment=ALIGNMENT,
        noise_std=NOISE_VARIANCE**0.5,
        pretrain_spectrum=spectra.power_law(setting.p, PRETRAIN_DECAY),
    )
    few, many = (measure(keys[2], problem, n, setting) for n in (setting.few, setting.many))
    context = f"{PROBLEM_TEXT}, p = {setting.p}; mean of {setting.replicates} draws; seed {seed}."
    yield weights(keys[3], few, context)
    yield limits(few, many, context)
    yield temperatures(few, many, setting, context)
    shifts = sims.drawn_shifts(keys[2], problem, setting.replicates)
    yield trade_off(problem, shifts, few, many, context)
    yield hard_samples(many, context)
    yield digits(keys[4], setting, seed)


def measure(key: Array, problem: TwoTaskProblem, n: int, setting: Setting) -> xr.Dataset:
    """Every tilt of the weights, along training, along the ridge path and at the end of both."""
    tilted = {name_of(tilt): sims.tilted(tilt) for tilt in setting.tilts}
    normalised = {MEAN_ONE: lambda losses: flow_weights(losses, normalisation="mean")}
    filter = Several((GradientFlow(TIMES), Ridge(PENALTIES), MinNorm()))
    names = np.arange(TIMES.size + PENALTIES.size + 1)
    return sims.monte_carlo(
        key, problem, n, tilted | normalised, filter, names, setting.replicates, deviations=tuple(sims.DEVIATIONS)
    )


def name_of(tilt: float) -> str:
    """The name of weights e^{−tilt·ℓ/median}."""
    return {0.0: VANILLA, 1.0: FLOW}.get(float(tilt), f"tilt {tilt:g}")


def along_time(data: xr.Dataset) -> xr.Dataset:
    """The part of `measure` that is gradient flow."""
    return data.isel(filter=slice(0, TIMES.size)).assign_coords(filter=TIMES).rename(filter="time")


def along_penalty(data: xr.Dataset) -> xr.Dataset:
    """The part of `measure` that is ridge."""
    chosen = slice(TIMES.size, TIMES.size + PENALTIES.size)
    return data.isel(filter=chosen).assign_coords(filter=PENALTIES).rename(filter="penalty")


def band(axis: Axes, x: np.ndarray, values: xr.DataArray, colour: str, label: str | None = None) -> None:
    """Mean over replicates ± one standard error."""
    mean, error = sims.estimate(values)
    axis.plot(x, mean, color=colour, label=label)
    axis.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


# --------------------------------------------------------------------------------------------- the paper's population


def along_training(key: Array, setting: Setting, seed: int) -> Picture:
    """Both errors along training: eq. (14) through sampled iterates."""
    steps, block = np.arange(13), np.array(BLOCK)
    problem = theory.two_task_problem(RHO, block, p=4)
    median = float(theory.median_temperature(1.0))
    best = theory.best_flow(RHO, block)
    mu = float(theory.mean_weight(1.0, median))
    best_temperature = float(theory.temperature_from_beta(best.beta, RHO))
    runs = {  # temperature and step size on the loss with ½, twice the paper's η
        VANILLA: (np.inf, 1.0, "#D55E00", "no weights, η = ½"),
        FLOW: (median, 1 / mu, "#0072B2", "FLOW, η = 1/(2μ)"),
        "FLOW at its best": (
            best_temperature,
            1 / float(theory.mean_weight(1.0, best_temperature)),
            "#56B4E9",
            "FLOW, best T",
        ),
        "FLOW, small steps": (median, 1.0, DARK, "FLOW, η = ½"),
    }
    figure, axes = canvas(3, height=2.5)
    gaps: list[float] = []
    numbers_of: dict[str, list] = {"theory": [], "sampled": [], "sampled_error": []}
    hot, sizes = (np.array(values) for values in list(zip(*runs.values()))[:2])
    paths = sims.sampled_iterates(key, problem, setting.large, hot, sizes, int(steps[-1]), setting.repeats)
    for index, (name, (temperature, step_size, colour, label)) in enumerate(runs.items()):
        exact: Array | np.ndarray
        if name == VANILLA:
            exact = theory.vanilla_iterates(RHO, steps)
        elif name == "FLOW, small steps":
            exact = np.stack(
                position(theory.trajectory(problem, GradientDescent(step_size, steps), temperature).moved), axis=-1
            )
        else:
            exact = theory.flow_iterates(RHO, theory.beta_from_temperature(temperature, RHO), steps)
        line = np.stack([*theory.errors(exact, RHO, block), theory.errors(exact, RHO, block).total])
        moved, left = paths[:, index], paths[:, index] + np.eye(4)[0]  # θ₂* − θ₁* = −ē
        sampled = np.stack(
            [quadratic(moved, problem.pretrain_covariance), quadratic(left, problem.finetune_covariance)]
        )
        sampled = np.concatenate([sampled, sampled.sum(axis=0, keepdims=True)])  # (error, replicate, step)
        mean, error = sampled.mean(axis=1), sampled.std(axis=1, ddof=1) / setting.repeats**0.5
        for axis, row in zip(axes, (1, 0, 2)):
            axis.plot(steps, line[row], color=colour, label=label)
            axis.errorbar(steps, mean[row], error[row], color=colour, fmt="o", capsize=1.5)
        for values, rows in zip((line, mean, error), numbers_of.values()):
            rows.append(values)
        gaps.append(np.abs(mean - line)[:, 1:].max())
    floor = pareto(problem, 1.0)
    axes[2].axhline(
        float(theory.best_averaging(block)), color=COLOURS["ensemble"], linestyle=":", label="best averaging"
    )
    axes[2].axhline(float(floor.finetune + floor.pretrain), color=COLOURS["oracle"], linestyle="--", label="floor")
    axes[2].set_ylim(0.5, None)
    for axis, label in zip(
        axes, (R"fine-tuning error err$_2$", R"pretraining error err$_1$", R"total error err$_\mathrm{tot}$")
    ):
        axis.set(xlabel="steps K", ylabel=label)
    axes[0].legend()
    handles, labels = axes[2].get_legend_handles_labels()
    axes[2].legend(handles[-2:], labels[-2:], loc="upper right")
    panel_letters(axes)
    caption = (
        "Both errors along training without noise, in units of ‖e‖²: (a) fine-tuning, (b) pretraining, (c) their sum. Without weights, at η = ½, the error swings "
        "between two directions on its way to θ₂*; FLOW, at the median temperature and η = 1/(2μ), comes there more slowly, by the stalled direction, and at η = ½, "
        f"without making up for the mean weight μ = {mu:.2f}, more slowly still. Lines: Theorem 7.2 "
        f"of the paper, eq. (14) (for FLOW at η = ½ the same iteration with that step); points: gradient descent on {setting.large} samples with weights e^{{−ℓ/T}}, mean of {setting.repeats} draws ± one "
        f"standard error, at most {max(gaps):.3f} off. Best T: β = {float(best.beta):.2f}, where err_tot is least, {float(best.total):.3f} at K = "
        f"{int(best.steps)}, against {float(theory.best_averaging(block)):.3f} for the best average of θ₁* and θ₂* and "
        f"{float(floor.finetune + floor.pretrain):.3f} for anything at all. ρ = {RHO}, Σ₁ = diag{BLOCK[0][0], BLOCK[1][1]} on (ē, ē⊥), p = 4; seed {seed}."
    )
    numbers = xr.Dataset(
        {name: (("run", "error", "step"), np.stack(rows)) for name, rows in numbers_of.items()},
        {"run": list(runs), "error": ["pretrain", "finetune", "total"], "step": steps},
    )
    return Picture("flow_training", "FLOW along training", caption, figure, numbers)


def quadratic(vectors: np.ndarray, covariance: object) -> np.ndarray:
    """‖v‖²_Σ along the last axis."""
    return np.asarray(jnp.sum(covariance.apply(jnp.asarray(vectors)) * vectors, axis=-1))  # type: ignore[attr-defined]


def stalled(key: Array, setting: Setting, seed: int) -> Picture:
    """Learning speed of every direction against T, and where training ends with noise."""
    p, ratios, fine = 5, np.geomspace(0.05, 50, 9), np.geomspace(0.03, 80, 121)
    spectrum = 1.0 / np.arange(1, p + 1)
    gap = np.ones(p) / np.sqrt(spectrum.sum())  # q = 1
    figure, axes = canvas(2, 2, height=2.4)
    variables: dict = {}
    # (a) and (b): one direction of the whitened features stalls, the spectrum of Σ_w bends around it
    for noise_variance, marker, colour in ((0.0, "o", "#0072B2"), (1.0, "s", "#E69F00")):
        v = 1 + noise_variance
        problem = TwoTaskProblem(spectrum, spectrum, FixedShift(gap), noise_variance**0.5)
        second, _ = sims.sampled_moments(key, problem, setting.large, ratios * v, setting.repeats)
        scale = np.asarray(theory.mean_weight(v, ratios * v))
        along = np.einsum("i,rtij,j->rt", gap, second, gap) / scale
        others = (np.einsum("rtii,i->rt", second, 1 / spectrum) / scale - along) / (p - 1)
        exact = 1 - (1 - np.asarray(theory.damping(v, fine * v))) / v
        label = "the gap, no noise" if noise_variance == 0 else R"the gap, $\sigma^2 = q$"
        axes[0].plot(fine, exact, color=colour, label=label)
        axes[0].errorbar(ratios, along.mean(0), standard_error(along), color=colour, fmt=marker, capsize=1.5)
        axes[0].errorbar(ratios, others.mean(0), standard_error(others), color="grey", fmt=marker, capsize=1.5)
        variables[f"along_{noise_variance:g}"] = ("ratio", along.mean(0))
        variables[f"along_{noise_variance:g}_error"] = ("ratio", standard_error(along))
        variables[f"others_{noise_variance:g}"] = ("ratio", others.mean(0))
        if noise_variance == 0:
            sampled = np.linalg.eigvalsh(second.mean(axis=0)) / scale[:, None]
            matrices = jax.vmap(lambda T: theory.weighted_covariance(spectrum, gap, 0.0, T).matrix)(jnp.asarray(fine))
            curves = np.linalg.eigvalsh(matrices) / np.asarray(theory.mean_weight(1.0, fine))[:, None]
            variables["eigenvalues"] = (("ratio", "direction"), sampled)
            variables["eigenvalues_theory"] = (("fine_ratio", "direction"), curves)
            for index in range(p):
                colour_of = "#0072B2" if index == 0 else "0.45"
                axes[1].plot(fine, curves[:, index], color=colour_of)
                axes[1].plot(ratios, sampled[:, index], "o", color=colour_of)
    axes[0].axhline(1, color="grey", linewidth=1)
    axes[0].annotate("all others", (0.04, 1), (0, -13), textcoords="offset points", color="0.4", fontsize=7)
    axes[0].legend(loc="lower right", handlelength=1.0, borderaxespad=0)
    axes[1].annotate(
        "stalls", (ratios[1], sampled[1, 0]), (7, -8), textcoords="offset points", color="#0072B2", fontsize=7
    )
    for axis in axes[:2]:
        axis.axvline(theory.MEDIAN, color="black", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel=R"temperature $T/v$")
        axis.annotate("median", (theory.MEDIAN, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
    axes[0].set_ylabel("learning speed / mean weight")
    axes[1].set(yscale="log", ylabel=R"eigenvalues of $\Sigma_w$ / mean weight")
    # (c) where it ends: F4, and what it rests on
    noise, grid = np.linspace(0, 0.9, 7), np.linspace(0, 0.97, 101)  # σ²/v
    axes[2].plot(grid, theory.fixed_point_coefficient(np.sqrt(grid), theory.MEDIAN), color="black", label="closed form")
    variances = 1 / (1 - noise)  # v at q = 1
    found, _ = sims.fixed_points(
        jax.random.fold_in(key, 1),
        TwoTaskProblem(spectrum, spectrum, FixedShift(gap), 0.0),
        setting.large,
        np.sqrt(variances - 1),
        theory.MEDIAN * variances,
        setting.repeats,
        deviations=tuple(sims.DEVIATIONS),
    )
    for index, (deviation, marker) in enumerate(zip(sims.DEVIATIONS, "osD")):
        mean, error = found[:, index].mean(axis=0), standard_error(found[:, index])
        colour = DEVIATION_COLOUR[deviation]
        axes[2].errorbar(noise, mean, error, color=colour, fmt=marker, capsize=1.5, label=DEVIATION_TEXT[deviation])
        variables[f"coefficient_{deviation}"] = ("noise_share", mean)
        variables[f"coefficient_{deviation}_error"] = ("noise_share", error)
    axes[2].set(xlabel=R"noise share $\sigma^2/v$", ylabel="share of the gap closed in the end")
    axes[2].legend()
    variables |= heavy_tails(axes[3], jax.random.fold_in(key, 2), setting, ratios, fine)
    panel_letters(axes)
    caption = (
        "What FLOW slows down. (a) Speed of learning in whitened coordinates, over the mean weight: the direction of the gap is stalled, the more so the lower T; "
        "all others are alike. (b) In the given coordinates: eigenvalues of the weighted covariance without noise (Σ = diag(1/j), equal gap "
        "in all directions); the lowest goes to zero with T, the others interlace. (c) With noise, training to the end with n ≫ p finds only a part "
        "of the gap, an average with the pretrained weights, at T = 0.455 v; the closed form needs Gaussian noise: outliers are "
        "ignored, and a misfit that depends on the gap's own direction ends elsewhere. (d) Features of heavier tails, √S times Gaussian ones with lognormal S, no noise: "
        "still the gap alone is stalled, less at low temperatures and more at high ones. Lines: theory; points: means of "
        f"{setting.repeats} draws of {setting.large} samples ± one standard error. p = {p}; seed {seed}."
    )
    coordinates = {"ratio": ratios, "fine_ratio": fine, "noise_share": noise, "spread": list(SPREADS)}
    return Picture("flow_stalled", "One direction stalls", caption, figure, xr.Dataset(variables, coordinates))


SPREADS = {0.0: BLUE, 1.0: "#E69F00", 1.5: "#D55E00"}
"""Spread of log S."""


def heavy_tails(axis: Axes, key: Array, setting: Setting, ratios: np.ndarray, fine: np.ndarray) -> dict:
    """The speed along the gap relative to all others against T, for features of heavier and heavier tails."""
    sampled = sims.sampled_rates(key, np.array(list(SPREADS)), 0.0, ratios, setting.large, setting.repeats)
    mean, error = sampled.mean(axis=0), standard_error(sampled)
    lines = []
    for index, (spread, colour) in enumerate(SPREADS.items()):
        lines.append(theory.heavy_tailed_stall(1.0, 0.0, fine, *theory.lognormal_sizes(spread)).rate)
        kurtosis = 3 * np.exp(spread**2)
        axis.plot(fine, lines[-1], color=colour, label="Gaussian" if spread == 0 else f"kurtosis {kurtosis:.0f}")
        axis.errorbar(ratios, mean[index], error[index], color=colour, fmt="o", capsize=1.5)
    axis.axvline(theory.MEDIAN, color="black", linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel=R"temperature $T/v$", ylabel="speed along the gap / others")
    axis.legend()
    return {
        "heavy": (("spread", "ratio"), mean),
        "heavy_error": (("spread", "ratio"), error),
        "heavy_theory": (("spread", "fine_ratio"), np.stack(lines)),
    }


def standard_error(samples: np.ndarray) -> np.ndarray:
    """Of the mean over the leading axis."""
    return samples.std(axis=0, ddof=1) / len(samples) ** 0.5


def plane() -> Picture:
    """Trajectories in the (ē, ē⊥) plane over contours of err_tot."""
    blocks = {"Σ₁ uncorrelated": np.array(BLOCK), "Σ₁ correlated alike": np.array([[2.7, 2.3], [2.3, 4.2]])}
    times = np.concatenate([[0.0], np.geomspace(0.05, 2000, 100)])
    factors = {4.0: LIGHT, 1.0: "#0072B2", 0.25: DARK}
    figure, axes = canvas(2, height=3.3)
    x, y = np.meshgrid(np.linspace(-0.1, 1.1, 121), np.linspace(-0.62, 0.25, 88))
    variables: dict = {}
    for number, (axis, (text, block)) in enumerate(zip(axes, blocks.items())):
        problem = theory.two_task_problem(RHO, block)
        total = np.asarray(theory.errors(np.stack([x, y], axis=-1), RHO, block).total)
        lowest = pareto(problem, 1.0)
        floor = float(lowest.finetune + lowest.pretrain)
        levels = floor + (1 - floor) * np.array([0.02, 0.1, 0.25, 0.5, 1.0, 1.75, 3.0])
        axis.contour(x, y, total, levels=levels, colors="0.75", linewidths=0.7)
        paths = {"vanilla": theory.trajectory(problem, GradientFlow(times), jnp.inf)}
        temperatures = theory.MEDIAN * np.array(list(factors))
        flow = theory.trajectory(problem, GradientFlow(times), temperatures[:, None])
        axis.plot(*position(paths["vanilla"].moved), color=COLOUR[VANILLA], label="no weights")
        for index, (factor, colour) in enumerate(factors.items()):
            label = "FLOW, T = median" if factor == 1 else f"FLOW, T = {factor:g} × median".replace("0.25", "¼")
            axis.plot(*position(flow.moved[index]), color=colour, label=label)
        steps = theory.flow_iterates(RHO, theory.beta_from_temperature(theory.MEDIAN, RHO), np.arange(40))
        axis.plot(*np.asarray(steps).T, "o", color=factors[1.0], markersize=2.5)
        axis.plot([0, 1], [0, 0], color=COLOURS["ensemble"], linestyle=":", label="averaging")
        kappa = np.geomspace(1e-4, 1e4, 121)
        shares = pareto_weights(problem, kappa)
        axis.plot(*position(shares), color=COLOURS["oracle"], linestyle="--", label="Pareto frontier")
        axis.plot(*position(pareto_weights(problem, 1.0)), "*", color="white", markeredgecolor="black", markersize=9)
        for point, name, offset in (((1, 0), R"$\theta_1^*$", (4, 3)), ((0, 0), R"$\theta_2^*$", (-12, 3))):
            axis.plot(*point, "o", color="black", markersize=4)
            axis.annotate(name, point, offset, textcoords="offset points")
        axis.set(xlabel=R"along $\bar e$", title=text, aspect="equal")
        variables[f"contours_{number}"] = (("y", "x"), total)
        variables[f"flow_{number}"] = (("factor", "time", "axis"), np.stack(position(flow.moved), axis=-1))
        variables[f"vanilla_{number}"] = (("time", "axis"), np.stack(position(paths["vanilla"].moved), axis=-1))
        variables[f"frontier_{number}"] = (("kappa", "axis"), np.stack(position(shares), axis=-1))
    axes[0].set_ylabel(R"along $\bar e_\perp$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    panel_letters(axes)
    bests = [
        (float(theory.best_flow(RHO, block).total), float(theory.best_averaging(block))) for block in blocks.values()
    ]
    caption = (
        "Fine-tuning in the plane of the theorem, from θ₁* to θ₂*, in units of ‖e‖; grey: levels of err_tot, star: its minimum. Training leaves the segment "
        "that averaging stays on, most of all without weights; the lower the temperature the closer it keeps to it. Lines: gradient flow; "
        f"dots: eq. (14) at the median temperature, step η = 1/(2μ). (a) FLOW can have less total error than the best average ({bests[0][0]:.3f} "
        f"against {bests[0][1]:.3f}). (b) Where Σ₁ couples the two directions as strongly as Σ₂, or more, it cannot: averaging is its limit ({bests[1][1]:.3f}). "
        f"ρ = {RHO}; blocks of Σ₁ diag(2.7, 1) and (2.7, 2.3; 2.3, 4.2). Exact, nothing is drawn."
    )
    coordinates = {
        "x": x[0],
        "y": y[:, 0],
        "factor": list(factors),
        "time": times,
        "axis": ["e", "perpendicular"],
        "kappa": kappa,
    }
    return Picture("flow_plane", "Trajectories in the plane", caption, figure, xr.Dataset(variables, coordinates))


def position(moved: Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """θ₁* + moved as coordinates along ē and ē⊥ around θ₂*."""
    moved = np.asarray(moved)
    return 1 + moved[..., 0], moved[..., 1]


# ----------------------------------------------------------------------------------------------------- finite samples


def weights(key: Array, data: xr.Dataset, context: str) -> Picture:
    """Weights against loss, their influence, and what normalisation does to training."""
    figure, axes = canvas(3, height=2.5)
    ratio = np.linspace(0, 6**0.5, 121) ** 2
    families = {
        HOT: (np.exp(-ratio / 4), LIGHT, "-"),
        "FLOW, T = median": (np.exp(-ratio), BLUE, "-"),
        "FLOW, T = median / 4": (np.exp(-ratio * 4), DARK, "-"),
    }
    draw = np.asarray(jax.random.normal(key, (60,))) ** 2
    loss = draw / np.median(draw)
    hard = np.asarray(robust_weights(loss, 4.0))
    for label, (values, colour, line) in families.items():
        axes[0].plot(ratio, values, color=colour, linestyle=line, label=label)
        residual = np.sqrt(ratio)
        axes[1].plot(residual, values * residual, color=colour)
    robust = np.exp(ratio / 4) * hard[0] / np.exp(loss[0] / 4)
    axes[0].plot(ratio, robust, color="#D55E00", linestyle="--", label="hard samples, 4 × median")
    axes[1].plot(np.sqrt(ratio), robust * np.sqrt(ratio), color="#D55E00", linestyle="--")
    axes[0].plot(loss, np.asarray(flow_weights(loss)), "o", color="#0072B2", markersize=2.5)
    axes[1].plot(np.sqrt(ratio), np.sqrt(ratio), color="grey", linewidth=1)
    axes[1].annotate(
        "no weights", (1.5, 1.5), (-3, 3), textcoords="offset points", ha="right", color="grey", fontsize=7
    )
    axes[0].set(xlim=(0, 6), ylim=(0, 2.6), xlabel="pretrained loss / median", ylabel="weight")
    axes[1].set(xlabel=R"residual / $\sqrt{\mathrm{median}}$", ylabel="weight × residual: pull on θ", ylim=(0, 2.6))
    axes[0].legend(loc="upper right", borderaxespad=0)
    time = along_time(data).sel(deviation="gaussian", risk="finetune")
    curves = {}
    for name, label in ((VANILLA, "no weights"), (FLOW, "FLOW, as it is"), (MEAN_ONE, MEAN_ONE)):
        risks = sims.along_tau(time.sel(weighting=name))
        curves[name] = sims.estimate(risks)[0]
        band(axes[2], TIMES, risks, COLOUR[name], label=label)
    axes[2].set(
        xscale="log",
        xlim=(0.1, 1e4),
        ylim=(0, None),
        xlabel="training time (step size × steps)",
        ylabel=R"fine-tuning risk $R_\mathrm{ft}$",
    )
    axes[2].legend(loc="lower right")
    panel_letters(axes)
    means = data.sel(deviation="gaussian").mean("replicate")
    step, share = (float(means[name].sel(weighting=FLOW)) for name in ("step", "share"))
    caption = (
        "Weights from pretrained losses. (a) Weight against loss; points: one draw of 60 squared normal residuals at its median temperature. Dashed: the "
        "opposite weighting, mean one. (b) The pull of one sample on the weights: with FLOW it falls again for large residuals, "
        "as for redescending robust losses, but only once, at the start. (c) Weights as they are also shrink the step, to "
        f"{step:.2f} of its size; normalised to mean one the curve moves to the left by as much and is else the same. What remains is the price of samples: "
        f"their effective share is {share:.2f}. Bands: ± one standard error. n = {data.n}, Gaussian noise. {context}"
    )
    numbers = xr.Dataset(
        {label: ("ratio", values) for label, (values, *_) in families.items()}
        | {"hard": ("ratio", robust), "drawn_loss": ("sample", loss)}
        | {f"risk {name}": ("time", np.asarray(curve)) for name, curve in curves.items()},
        {"ratio": ratio, "time": TIMES},
    )
    return Picture("flow_weights", "Weights, influence, effective step", caption, figure, numbers)


SHOWN = (
    (VANILLA, COLOUR[VANILLA], "no weights"),
    ("tilt 0.25", LIGHT, HOT),
    (FLOW, BLUE, "FLOW, T = median"),
)


def limits(few: xr.Dataset, many: xr.Dataset, context: str) -> Picture:
    """Where training ends: weights do not matter for n < p, and do for n > p."""
    figure, axes = canvas(3, height=2.5)
    variables: dict = {}
    for axis, data, text in ((axes[0], few, "n < p"), (axes[1], many, "n > p")):
        time = along_time(data).sel(deviation="gaussian", risk="finetune")
        end = data.sel(deviation="gaussian", risk="finetune").isel(filter=-1)
        for name, colour, label in SHOWN:
            values = sims.along_tau(time.sel(weighting=name))
            band(axis, TIMES, values, colour, label=label)
            variables[f"{text} {name}"] = (("moment", "time"), np.stack(sims.estimate(values)))
            last = float(sims.estimate(sims.along_tau(end.sel(weighting=name)))[0])
            if text == "n > p" or name == VANILLA:
                axis.axhline(last, color=colour, linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="training time (step size × steps)", title=f"{text} (n = {data.n})")
        axis.set_xticks([1e0, 1e2, 1e4, 1e6, 1e8])
    ridge = along_penalty(few).sel(deviation="gaussian", risk="finetune")
    for name, colour, _ in SHOWN:
        values = sims.along_tau(ridge.sel(weighting=name))
        band(axes[2], PENALTIES, values, colour)
        variables[f"ridge {name}"] = (("moment", "penalty"), np.stack(sims.estimate(values)))
    axes[2].set(xscale="log", xlabel=R"penalty $\lambda$", title=f"n < p, ridge (n = {few.n})")
    axes[2].invert_xaxis()
    axes[0].set_ylabel(R"fine-tuning risk $R_\mathrm{ft}$")
    axes[1].legend()
    panel_letters(axes)
    caption = (
        "Weights act on the way. (a) n < p: the interpolating limit (dotted) is the same for any weights, but the last samples with weight e^{−ℓ/T} are only "
        "fitted at times of e^{ℓ/T}, if ever. (b) n > p: the limits (dotted, weighted least squares) differ; at the median temperature most of the "
        "gap is never closed. (c) Ridge, from strong to weak: as early stopping. Gaussian noise: the weights do not pay on the fine-tuning "
        f"task, each at its best time or penalty. Means ± one standard error (bands). {context}"
    )
    numbers = xr.Dataset(variables, {"moment": ["mean", "error"], "time": TIMES, "penalty": PENALTIES})
    return Picture("flow_limits", "Where weighted training ends", caption, figure, numbers)


def best_in_time(objective: xr.DataArray) -> xr.DataArray:
    """`objective` (replicate, …, time) at the time where its mean is least."""
    return objective.isel(time=objective.mean("replicate").argmin("time"))


def temperatures(few: xr.Dataset, many: xr.Dataset, setting: Setting, context: str) -> Picture:
    """The best risk along training against the tilt of the weights."""
    tilts = setting.tilts
    names = [name_of(tilt) for tilt in tilts]
    figure, axes = canvas(2, 2, height=2.3, sharex=True)
    variables: dict = {}
    for column, data in enumerate((few, many)):
        risks = sims.along_tau(along_time(data).sel(weighting=names))
        for row, (objective, label) in enumerate(
            (
                (risks.sel(risk="finetune"), "finetune"),
                (risks.sel(risk="finetune") + risks.sel(risk="pretrain"), "total"),
            )
        ):
            axis = axes[2 * row + column]
            for deviation in sims.DEVIATIONS:
                chosen = best_in_time(objective.sel(deviation=deviation))
                mean, error = sims.estimate(chosen)
                axis.errorbar(
                    tilts,
                    mean,
                    error,
                    color=DEVIATION_COLOUR[deviation],
                    fmt="o-",
                    capsize=1.5,
                    label=DEVIATION_TEXT[deviation],
                )
                variables[f"{label}_{deviation}_{data.n}"] = (("moment", "tilt"), np.stack([mean, error]))
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
            axis.set_xscale("symlog", linthresh=0.125, linscale=0.5)
        axes[column].set_title(f"n = {data.n}, p = {data.p}", loc="right")
        axes[2 + column].set_xlabel("median / T   (< 0: hard samples upweighted)")
        axes[2 + column].set_xticks([-1, -0.25, 0, 0.25, 1, 4], labels=["−1", "−¼", "0", "¼", "1", "4"])
        axes[2 + column].xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes[0].set_ylabel(R"least $R_\mathrm{ft}$")
    axes[2].set_ylabel(R"least $R_\mathrm{ft} + R_\mathrm{pre}$")
    axes[0].legend(loc="upper left", bbox_to_anchor=(0.42, 1.05))
    finetune = sims.along_tau(along_time(many).sel(deviation="outliers", risk="finetune"))
    saved = best_in_time(finetune.sel(weighting=VANILLA)) - best_in_time(finetune.sel(weighting="tilt 0.25"))
    gain, gain_error = (float(value) for value in sims.estimate(saved))
    panel_letters(axes)
    caption = (
        "The temperature, from upweighted hard samples through no weights (grey) to FLOW at the median (dotted) and below, each stopped at its own best time. "
        "Upper row: fine-tuning risk; lower row: sum of both risks. What the labels deviate by decides: under Gaussian noise weights cost "
        f"fine-tuning risk, with outliers (a tenth of the labels has nine tenths of the variance) mild weights save some of it (at T = 4 × median, n > p, {gain:.3f} ± {gain_error:.3f} in paired draws), and upweighting hard samples is "
        "ruinous. Misfit: the deviation is a quadratic in the direction of the gap. Means ± one standard error; the same draws for all temperatures, times "
        f"chosen on the mean of them. {context}"
    )
    return Picture(
        "flow_temperature",
        "Temperature sweep",
        caption,
        figure,
        xr.Dataset(variables, {"moment": ["mean", "error"], "tilt": list(tilts)}),
    )


KAPPAS = np.concatenate([[0.0], np.geomspace(0.02, 50, 60)])


def hull(constant: np.ndarray, slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """(R_pre, R_ft) (2, κ) of the best member and τ in [0, 1] for each R_ft + κR_pre; slope, curvature (risk, member)."""
    points = []
    for kappa in KAPPAS:
        weight = np.array([1.0, kappa])
        b, h = weight @ slope, weight @ curvature
        tau = np.clip(b / h, 0, 1)
        best = np.argmin(-2 * tau * b + tau**2 * h)
        points.append(constant - 2 * tau[best] * slope[:, best] + tau[best] ** 2 * curvature[:, best])
    return np.stack(points)[:, ::-1].T


def sampled_methods(data: xr.Dataset) -> dict[str, np.ndarray]:
    """Each method's curve (2, points) in the (R_pre, R_ft) plane."""
    both = data.sel(risk=["finetune", "pretrain"]).mean("replicate")
    time, ridge = along_time(both), along_penalty(both)

    def curve(part: xr.Dataset, name: str, tau: float | np.ndarray = 1.0) -> np.ndarray:
        chosen = part.sel(weighting=name)
        return np.stack([risk_at(chosen.sel(risk=risk), tau) for risk in ("pretrain", "finetune")])

    def averaged(name: str) -> np.ndarray:
        chosen = time.sel(weighting=name).transpose("risk", "time")
        return hull(chosen.constant.values, chosen.slope.values, chosen.curvature.values)

    return {
        AVERAGING: curve(both.isel(filter=-1), VANILLA, np.linspace(0, 1, 61)),
        "early stopping": curve(time, VANILLA),
        "L2 to init": curve(ridge, VANILLA),
        FLOW: curve(time, FLOW),
        HOT: curve(time, "tilt 0.25"),
        "FLOW + ridge": curve(ridge, FLOW),
        BOTH: averaged(FLOW),
        "early stopping + averaging": averaged(VANILLA),
    }


def risk_at(mean: xr.Dataset, tau: float | np.ndarray) -> np.ndarray:
    return mean.constant.values - 2 * tau * mean.slope.values + tau**2 * mean.curvature.values


def population_methods() -> dict[str, np.ndarray]:
    """The same in the setting of Theorem 7.2, θ₁* as far from the origin as from θ₂*, at a right angle to the plane."""
    problem = theory.two_task_problem(RHO, np.array(BLOCK), p=3)
    origin = jnp.array([0.0, 0.0, -1.0])
    from_zero = TwoTaskProblem(
        problem.pretrain_covariance, problem.finetune_covariance, problem.shift, 0.0, pretrain_error=origin
    )
    times, penalties, tau = np.geomspace(1e-2, 1e4, 121), np.geomspace(1e-4, 1e4, 121), np.linspace(0, 1, 61)

    def curve(problem: TwoTaskProblem, filter: object, temperature: float | None = np.inf) -> np.ndarray:
        path = theory.trajectory(problem, filter, temperature)  # type: ignore[arg-type]
        return np.stack([path.pretrain, path.finetune])

    def averaged(temperature: float | None) -> np.ndarray:
        path = np.asarray(theory.trajectory(problem, GradientFlow(times), temperature).moved)
        gap = jnp.array([-1.0, 0.0, 0.0])
        slope = np.stack([path @ np.asarray(problem.finetune_covariance.apply(gap)), np.zeros(len(path))])
        curvature = np.stack([quadratic(path, c) for c in (problem.finetune_covariance, problem.pretrain_covariance)])
        return hull(np.array([1.0, 0.0]), slope, curvature)

    return {
        AVERAGING: curve(problem, tau * MinNorm()),
        "early stopping": curve(problem, GradientFlow(times)),
        "L2 to init": curve(problem, Ridge(penalties)),
        "L2 to zero": curve(from_zero, Ridge(penalties)),
        FLOW: curve(problem, GradientFlow(times), None),
        HOT: curve(problem, GradientFlow(times), 4 * theory.MEDIAN),
        "FLOW + ridge": curve(problem, Ridge(penalties), None),
        BOTH: averaged(None),
        "early stopping + averaging": averaged(np.inf),
        "floor": np.stack(pareto(problem, np.geomspace(1e-4, 1e4, 121))[::-1]),
    }


def trade_off(problem: TwoTaskProblem, shifts: np.ndarray, few: xr.Dataset, many: xr.Dataset, context: str) -> Picture:
    """The plane R_pre × R_ft, a curve for each method."""
    # the frontier of the very shifts drawn: for diagonal covariances only their mean squares matter
    squares = np.mean(shifts**2, axis=0)
    drawn = TwoTaskProblem(problem.pretrain_covariance, problem.finetune_covariance, RandomShift(squares), 0.0)
    frontier = np.stack(pareto(drawn, np.geomspace(1e-4, 1e4, 121))[::-1])
    planes = {
        "population, theorem's setting": population_methods(),
        f"n = {few.n} < p, Gaussian noise": sampled_methods(few.sel(deviation="gaussian")) | {"floor": frontier},
        f"n = {many.n} > p, Gaussian noise": sampled_methods(many.sel(deviation="gaussian")) | {"floor": frontier},
        f"n = {many.n} > p, outliers": sampled_methods(many.sel(deviation="outliers")) | {"floor": frontier},
    }
    figure, axes = canvas(2, 2, height=2.7)
    variables: dict = {}
    for number, (axis, (title, methods)) in enumerate(zip(axes, planes.items())):
        for name, points in methods.items():
            axis.plot(
                *points,
                color=COLOUR[name],
                linestyle=STYLE.get(name, "-"),
                label=name if name != "floor" else "Pareto frontier",
            )
            variables[f"{name} {number}"] = (("risk", f"{name} {number} point"), points)
        axis.plot(0, methods[AVERAGING][1, 0], "o", color=COLOURS["pretrained"])
        axis.set_title(title, loc="right")
        axis.set(xlim=(-0.03, 1.5 if number else 2.8), ylim=(-0.03, 1.12))
    for axis in axes[2:]:
        axis.set_xlabel(R"forgetting: pretraining risk $R_\mathrm{pre}$")
    for axis in axes[::2]:
        axis.set_ylabel(R"fine-tuning risk $R_\mathrm{ft}$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    panel_letters(axes)
    caption = (
        "General against fine-tuning performance (lower left is better). (a) Population, Theorem 7.2's setting without noise, ρ = 0.76: FLOW, stopped early at the "
        "median temperature, is better than averaging; stopping early without weights is a little better still. L2 to zero also forgets what it pulls down. (b–d) The same "
        "from samples: a curve for every stopping time, penalty or τ; averaging is of the end of training with the pretrained weights; + averaging: the "
        "best stopping time and τ for each trade-off. Dashed grey: no weights are below on average (they would need to know Σ₁, Σ₂ and θ₂*); dot: θ₁*. "
        "With Gaussian noise FLOW wastes samples (b, c); with outliers (d) it is far better than averaging, and at four times the median temperature better than "
        f"stopping early without weights. {context}"
    )
    return Picture(
        "flow_trade_off",
        "FLOW in the trade-off plane",
        caption,
        figure,
        xr.Dataset(variables, {"risk": ["pretrain", "finetune"]}),
    )


def hard_samples(data: xr.Dataset, context: str) -> Picture:
    """What easy samples cost: risk on the points that were hard for the pretrained weights."""
    time = along_time(data).sel(deviation="gaussian")
    moments = np.array([sims.conditional_square(low / 10, (low + 1) / 10) for low in range(10)])
    hardest = sims.conditional_square(1 - sims.HARDEST, 1.0)
    figure, axes = canvas(3, height=2.5)
    variables: dict = {}
    chosen: dict[str, tuple] = {}
    for name, colour, label in SHOWN:
        risks = sims.along_tau(time.sel(weighting=name))
        finetune, pretrain, hard = (risks.sel(risk=risk) for risk in sims.RISKS)
        index = int(finetune.mean("replicate").argmin("time"))
        chosen[label] = tuple(float(risk.mean("replicate")[index]) for risk in (finetune, hard))
        # R of a decile is R_ft + (m − 1)·X with one X for all of them
        slope = (hard - finetune) / (hardest - 1)
        deciles = finetune.isel(time=index) + (xr.DataArray(moments, dims="decile") - 1) * slope.isel(time=index)
        mean, error = sims.estimate(deciles)
        axes[0].errorbar(np.arange(1, 11), mean, error, color=colour, fmt="o-", capsize=1.5, label=label)
        variables[f"decile {name}"] = (("moment", "decile"), np.stack([mean, error]))
        for axis, x in ((axes[1], finetune), (axes[2], pretrain)):
            at, _ = sims.estimate(x)
            keep = slice(0, index + 1)
            mean, error = sims.estimate(hard)
            axis.plot(at[keep], mean[keep], color=colour)
            axis.fill_between(
                at[keep], (mean - error)[keep], (mean + error)[keep], color=colour, alpha=0.2, linewidth=0
            )
        variables[f"along {name}"] = (("risk", "time"), risks.mean("replicate").transpose("risk", "time").values)
    axes[0].set(xlabel="decile of the pretrained loss", ylabel=R"fine-tuning risk in that decile", xticks=[1, 4, 7, 10])
    axes[0].legend()
    axes[1].set(xlabel=R"fine-tuning risk $R_\mathrm{ft}$", ylabel="risk on the hardest tenth")
    axes[1].invert_xaxis()
    axes[2].set(xlabel=R"forgetting: pretraining risk $R_\mathrm{pre}$", ylabel="risk on the hardest tenth")
    panel_letters(axes)
    stops = "; ".join(
        f"{label}: {mean:.2f} in all, {hard:.2f} on the hardest tenth" for label, (mean, hard) in chosen.items()
    )
    caption = (
        "The cost of easy samples. (a) Fine-tuning risk by decile of the pretrained loss of the test points, each method stopped at its least R_ft "
        f"({stops}): what FLOW leaves is on the hard ones. (b) Risk on the hardest tenth against fine-tuning risk along training (to the right), up to that "
        "stop: nearly one curve; at equal fine-tuning risk the hard points cost hardly more. (c) Against forgetting they do. The hard points are hard because of "
        "the gap, the direction that FLOW stalls. Given a draw the risks are exact for Gaussian "
        f"test points, whose labels carry the noise when they are ranked; means ± one standard error. n = {data.n}. {context}"
    )
    numbers = xr.Dataset(
        variables, {"moment": ["mean", "error"], "decile": np.arange(1, 11), "risk": list(sims.RISKS), "time": TIMES}
    )
    return Picture("flow_hard_samples", "The cost on hard samples", caption, figure, numbers)


# ---------------------------------------------------------------------------------------------------------- real data


def digits(key: Array, setting: Setting, seed: int) -> Picture:
    """Real data: FLOW against no weights along training, right and wrong labels."""
    times, shares, angle = np.logspace(0, 5, 21), np.array([0.0, 0.3]), 20.0
    data = sims.digits_along_training(key, times, shares, setting.splits, p=setting.features, angle=angle)
    figure, axes = canvas(4, 2, height=2.1)
    labels = {
        "finetune": "fine-tuning test error",
        "pretrain": "pretraining test error",
        "hardest_accuracy": "accuracy, hardest tenth",
    }
    for row, share in enumerate(shares):
        panels = axes[4 * row : 4 * row + 4]
        for name, label in ((VANILLA, "no weights"), (FLOW, "FLOW")):
            curve = data.sel(share=share, weighting=name)
            for axis, quantity in zip(panels, labels):
                axis.plot(times, curve[quantity], color=COLOUR[name], label=label)
                low, high = (curve[quantity] + sign * curve[f"{quantity}_error"] for sign in (-1, 1))
                axis.fill_between(times, low, high, color=COLOUR[name], alpha=0.25, linewidth=0)
                axis.set_xscale("log")
            panels[3].errorbar(
                curve.pretrain, curve.finetune, curve.finetune_error, curve.pretrain_error, color=COLOUR[name], fmt=".-", markersize=3, linewidth=1
            )  # fmt: skip
        for axis, quantity in zip(panels, labels):
            axis.set_ylabel(labels[quantity])
        panels[1].set_ylim(0, 0.8)
        panels[3].set(xlim=(0.05, 0.8), ylabel="fine-tuning test error")
        panels[0].set_title("all labels right" if share == 0 else f"{100 * share:.0f}% wrong labels", loc="right")
    for axis in axes[4:7]:
        axis.set_xlabel("training time")
    axes[7].set_xlabel("pretraining test error")
    axes[0].legend()
    panel_letters(axes)
    least = data.finetune.min("time")
    caption = (
        f"Handwritten digits, random Fourier features (p = {setting.features}), ten one-hot outputs: pretrained on 700 upright images, fine-tuned on 150 images turned by "
        f"{angle:.0f}°, by gradient flow. Weights e^{{−ℓ/T}} as they are, T = the median of the pretrained model's squared errors. (a–d) All labels right; FLOW follows "
        "the same trade-off (d) more slowly, and leaves the hardest tenth of the test images (by pretrained error) for the end. (e–h) "
        f"{100 * shares[1]:.0f}% of the fine-tuning labels are wrong; wrong labels have large losses and little weight, and the least test error is "
        f"{float(least.sel(weighting=FLOW, share=shares[1])):.3f} instead of {float(least.sel(weighting=VANILLA, share=shares[1])):.3f}. Errors are squared, summed over "
        f"classes, on held-out images with right labels; means over {setting.splits} random splits, bands and bars ± one standard error. Seed {seed}."
    )
    return Picture("flow_digits", "FLOW on digits", caption, figure, data)
