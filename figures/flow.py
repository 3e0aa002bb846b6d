"""The figures of the FLOW paper (2502.02797) in its linear setting, theory beside simulation, and what samples add."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.figure import Figure

from figures.style import COLOURS, FORGETTING, TASK, Picture, band, bars, canvas, panel_letters, seed_of
from linfit import FixedShift, GradientFlow, TwoTaskProblem, aligned_problem, flow_weights, spectra
from linfit.weighting import robust_weights
from sims import flow as sims
from sims.estimate import mean_and_error
from theory import flow as theory
from theory.frontier import pareto, pareto_weights

__all__ = ["pictures"]

PROBLEM_TEXT = "Σ₂ = diag(1/j), Σ₁ = diag(1/√j), shift covariance Ω ∝ Σ₂^½ with tr ΩΣ₂ = 1, labels off the line by σ² = 1, θ₁ = θ₁*"
TIMES, PENALTIES = np.logspace(-1, 8, 46), np.logspace(-4, 3, 29)
RHO, BLOCK = 0.76, np.array([[2.7, 0.0], [0.0, 1.0]])
"""Correlation in Σ₂ and the block of Σ₁ on (ē, ē⊥) for the setting of Theorem 7.2."""

ORANGE, LIGHT, SKY, BLUE, DARK = COLOURS["fine-tuned"], "#9AD0F0", "#56B4E9", "#0072B2", "#003A66"
"""No weights; FLOW at a high temperature, FLOW with something else, FLOW at the median, at a low temperature."""

SHOWN = {
    "unweighted": (ORANGE, "no weights"),
    "tilt 0.25": (LIGHT, "FLOW, T = 4 × median"),
    "FLOW": (BLUE, "FLOW, T = median"),
}
TIME = "training time (step size × steps)"
DEVIATIONS = {
    "gaussian": (BLUE, "o", "Gaussian noise"),
    "outliers": (ORANGE, "s", "outliers"),
    "misfit": ("#009E73", "D", "misfit"),
}


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the paper, one after the other."""
    p, few, many, replicates = (40, 16, 120, 12) if quick else (120, 40, 400, 64)
    tilts = (-0.25, 0, 0.25, 1) if quick else (-1, -0.5, -0.25, -0.125, 0, 1 / 16, 0.125, 0.25, 0.5, 1, 2, 4)
    large = {"n": 4_000, "replicates": 4} if quick else {"n": 20_000, "replicates": 12}
    splits, features = (2, 512) if quick else (8, 2048)
    seed, keys = {"seed": seed_of(key)}, jax.random.split(key, 6)
    data = sims.two_task_training(keys[0], RHO, BLOCK, steps=12, **large).assign_attrs(seed)
    yield Picture("flow_training", "FLOW along training", data, _draw_training, _caption_training)
    data = _stalled(keys[1], **large).assign_attrs(seed)
    yield Picture("flow_stalled", "One direction stalls", data, _draw_stalled, _caption_stalled)
    yield Picture("flow_plane", "Trajectories in the plane", _plane(), _draw_plane, _caption_plane)

    spectrum, pretrain_spectrum = spectra.power_law(p), spectra.power_law(p, 0.5)
    problem = aligned_problem(spectrum, alignment=0.5, noise_std=1.0, pretrain_spectrum=pretrain_spectrum)

    settings: dict[str, Any] = {"tilts": tilts, "times": TIMES, "penalties": PENALTIES, "replicates": replicates}
    both = [sims.measure_paths(keys[2], problem, n, **settings).assign_attrs(seed) for n in (few, many)]
    data = _weights(keys[3], both[0])
    yield Picture("flow_weights", "Weights, influence, effective step", data, _draw_weights, _caption_weights)
    yield Picture("flow_limits", "Where weighted training ends", _limits(*both), _draw_limits, _caption_limits)
    data = _temperatures(np.array(tilts), *both)
    yield Picture("flow_temperature", "Temperature sweep", data, _draw_temperatures, _caption_temperatures)
    frontier = sims.sampled_frontier(keys[2], problem, replicates, np.geomspace(1e-4, 1e4, 121))
    data = _trade_off(frontier, *both)
    yield Picture("flow_trade_off", "FLOW in the trade-off plane", data, _draw_trade_off, _caption_trade_off)
    data = _hard_samples(both[1])
    yield Picture("flow_hard_samples", "The cost on hard samples", data, _draw_hard_samples, _caption_hard_samples)
    times, shares = np.logspace(0, 5, 21), np.array([0.0, 0.3])
    data = sims.digits_along_training(keys[4], times, shares, splits, p=features, angle=20.0)
    yield Picture("flow_digits", "FLOW on digits", data.assign_attrs(seed), _draw_digits, _caption_digits)


def _moments(values: xr.DataArray) -> tuple[tuple[Any, ...], np.ndarray]:
    """Mean over replicates and standard error, as a variable (moment, …)."""
    mean, error = sims.estimate(values)
    return ("moment", *mean.dims), np.stack([mean, error])


def _context(data: xr.Dataset) -> str:
    return f"{PROBLEM_TEXT}, p = {data.p}; mean of {data.replicates} replicates; seed {data.seed}."


def _draw_training(data: xr.Dataset) -> Figure:
    runs = {
        "unweighted": (ORANGE, "no weights, η = ½"),
        "FLOW": (BLUE, "FLOW, η = 1/(2μ)"),
        "FLOW at its best": (SKY, "FLOW, best T"),
        "FLOW, small steps": (DARK, "FLOW, η = ½"),
    }
    texts = ("fine-tuning error err$_2$", "pretraining error err$_1$", R"total error err$_\mathrm{tot}$")
    _, axes = canvas(3, height=2.5)
    for axis, error, text in zip(axes, ("finetune", "pretrain", "total"), texts):
        for run, (colour, label) in runs.items():
            chosen = data.sel(run=run, error=error)
            axis.plot(data.step, chosen.theory, color=colour, label=label)
            bars(axis, chosen, "sampled", color=colour)
        axis.set(xlabel="steps K", ylabel=text)
    axes[0].legend()
    average = axes[2].axhline(data.best_average, color=COLOURS["ensemble"], linestyle=":", label="best averaging")
    bound = axes[2].axhline(data.lower_bound, color=COLOURS["oracle"], linestyle="--", label="lower bound")
    axes[2].set_ylim(0.5, None)
    axes[2].legend(handles=[average, bound], loc="upper right")
    return panel_letters(axes)


def _caption_training(data: xr.Dataset) -> str:
    gap = float(abs(data.sampled - data.theory).isel(step=slice(1, None)).max())
    return (
        "Both errors along training without noise, in units of ‖e‖²: (a) fine-tuning, (b) pretraining, (c) their sum. Without weights, at η = ½, the error swings "
        "between two directions on its way to θ₂*; FLOW, at the median temperature and η = 1/(2μ), comes there more slowly, by the stalled direction, and at η = ½, "
        f"without making up for the mean weight μ = {data.mean_weight:.2f}, more slowly still. Lines: Theorem 7.2 "
        f"of the paper, eq. (14) (for FLOW at η = ½ the same iteration with that step); points: gradient descent on {data.n} samples with weights e^{{−ℓ/T}}, mean of {data.replicates} replicates ± one "
        f"standard error, at most {gap:.3f} off. Best T: β = {data.best_beta:.2f}, where err_tot is least, {data.best_total:.3f} at K = "
        f"{data.best_steps}, against {data.best_average:.3f} for the best average of θ₁* and θ₂* and "
        f"{data.lower_bound:.3f} for anything at all. ρ = {data.rho}, Σ₁ = diag{float(data.pretrain[0]), float(data.pretrain[3])} on (ē, ē⊥), p = 4; seed {data.seed}."
    )


def _stalled(key: Array, n: int, replicates: int) -> xr.Dataset:
    """Learning speed of every direction against T, and where training ends with noise."""
    p, ratios, fine = 5, np.geomspace(0.05, 50, 9), np.geomspace(0.03, 80, 121)
    spectrum = 1.0 / np.arange(1, p + 1)
    gap = np.ones(p) / np.sqrt(spectrum.sum())  # q = 1
    variables: dict[str, Any] = {}
    for noise_variance in (0.0, 1.0):
        v, name = 1 + noise_variance, f"{noise_variance:g}"
        problem = TwoTaskProblem(spectrum, spectrum, FixedShift(gap), noise_variance**0.5)
        second, _ = sims.sample_moments(key, problem, n, ratios * v, replicates)
        scale = np.asarray(theory.mean_weight(v, ratios * v))
        along = np.einsum("i,rtij,j->rt", gap, second, gap) / scale
        others = (np.einsum("rtii,i->rt", second, 1 / spectrum) / scale - along) / (p - 1)
        variables |= mean_and_error(along, ("ratio",), f"along_{name}")
        variables |= mean_and_error(others, ("ratio",), f"others_{name}")
        variables[f"along_{name}_theory"] = ("fine_ratio", 1 - (1 - np.asarray(theory.damping(v, fine * v))) / v)
        if noise_variance == 0:
            sampled = np.linalg.eigvalsh(second.mean(axis=0)) / scale[:, None]
            variables["eigenvalues"] = (("ratio", "direction"), sampled)
    matrices = jax.vmap(lambda T: theory.weighted_covariance(spectrum, gap, 0.0, T).matrix)(jnp.asarray(fine))
    curves = np.linalg.eigvalsh(matrices) / np.asarray(theory.mean_weight(1.0, fine))[:, None]
    variables["eigenvalues_theory"] = (("fine_ratio", "direction"), curves)

    noise, grid = np.linspace(0, 0.9, 7), np.linspace(0, 0.97, 101)  # σ²/v at q = 1
    variances = 1 / (1 - noise)
    fixed_key, hot, stds = jax.random.fold_in(key, 1), variances * theory.MEDIAN, np.sqrt(variances - 1)
    found, _ = sims.sample_fixed_points(fixed_key, problem, n, stds, hot, replicates, deviations=tuple(DEVIATIONS))
    for index, deviation in enumerate(DEVIATIONS):
        variables |= mean_and_error(found[:, index], ("noise_share",), f"coefficient_{deviation}")
    coefficient = np.asarray(theory.fixed_point_coefficient(np.sqrt(grid), theory.MEDIAN))
    variables["coefficient_theory"] = ("fine_noise_share", coefficient)
    spreads = np.array([0.0, 1.0, 1.5])
    rates = sims.sample_rates(jax.random.fold_in(key, 2), spreads, 0.0, ratios, n, replicates)
    variables |= mean_and_error(rates, ("spread", "ratio"), "heavy")
    heavy = [theory.heavy_tailed_stall(1.0, 0.0, fine, *theory.lognormal_sizes(spread)).rate for spread in spreads]
    variables["heavy_theory"] = (("spread", "fine_ratio"), np.stack(heavy))
    coordinates = {"ratio": ratios, "fine_ratio": fine, "noise_share": noise, "fine_noise_share": grid}
    return xr.Dataset(variables, coordinates | {"spread": spreads}, {"n": n, "replicates": replicates, "p": p})


def _draw_stalled(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, 2)
    speeds = (("0", "o", BLUE, "the gap, no noise"), ("1", "s", "#E69F00", R"the gap, $\sigma^2 = q$"))
    for name, marker, colour, label in speeds:
        axes[0].plot(data.fine_ratio, data[f"along_{name}_theory"], color=colour, label=label)
        for which, shade in (("along", colour), ("others", "grey")):
            bars(axes[0], data, f"{which}_{name}", color=shade, fmt=marker)
    axes[0].axhline(1, color="grey", linewidth=1)
    axes[0].annotate("all others", (0.04, 1), (0, -13), textcoords="offset points", color="0.4", fontsize=7)
    axes[0].legend(loc="lower right", handlelength=1.0, borderaxespad=0)
    axes[0].set_ylabel("learning speed / mean weight")
    for direction in range(data.p):
        colour, both = BLUE if direction == 0 else "0.45", data.isel(direction=direction)
        axes[1].plot(data.fine_ratio, both.eigenvalues_theory, color=colour)
        axes[1].plot(data.ratio, both.eigenvalues, "o", color=colour)
    place = (float(data.ratio[1]), float(data.eigenvalues[1, 0]))
    axes[1].annotate("stalls", place, (7, -8), textcoords="offset points", color=BLUE, fontsize=7)
    axes[1].set(yscale="log", ylabel=R"eigenvalues of $\Sigma_w$ / mean weight")
    for axis in axes[:2]:
        axis.annotate("median", (theory.MEDIAN, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
    axes[2].plot(data.fine_noise_share, data.coefficient_theory, color="black", label="closed form")
    for name, (colour, marker, label) in DEVIATIONS.items():
        bars(axes[2], data, f"coefficient_{name}", color=colour, fmt=marker, label=label)
    axes[2].set(xlabel=R"noise share $\sigma^2/v$", ylabel="share of the gap closed in the end")
    axes[2].legend()
    for spread, colour in zip(data.spread.values, (BLUE, "#E69F00", ORANGE)):
        tails, label = data.sel(spread=spread), f"kurtosis {3 * np.exp(spread**2):.0f}"
        axes[3].plot(data.fine_ratio, tails.heavy_theory, color=colour, label="Gaussian" if spread == 0 else label)
        bars(axes[3], tails, "heavy", color=colour)
    axes[3].set_ylabel("speed along the gap / others")
    axes[3].legend()
    for axis in (axes[0], axes[1], axes[3]):
        axis.axvline(theory.MEDIAN, color="black", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel=R"temperature $T/v$")
    return panel_letters(axes)


def _caption_stalled(data: xr.Dataset) -> str:
    return (
        "What FLOW slows down. (a) Speed of learning in whitened coordinates, over the mean weight: the direction of the gap is stalled, the more so the lower T; "
        "all others are alike. (b) In the given coordinates: eigenvalues of the weighted covariance without noise (Σ = diag(1/j), equal gap "
        "in all directions); the lowest goes to zero with T, the others interlace. (c) With noise, training to the end with n ≫ p finds only a part "
        "of the gap, an average with the pretrained weights, at T = 0.455 v; the closed form needs Gaussian noise: outliers are "
        "ignored, and a misfit that depends on the gap's own direction ends elsewhere. (d) Features of heavier tails, √S times Gaussian ones with lognormal S, no noise: "
        "still the gap alone is stalled, less at low temperatures and more at high ones. Lines: theory; points: means of "
        f"{data.replicates} replicates of {data.n} samples ± one standard error. p = {data.p}; seed {data.seed}."
    )


def _plane() -> xr.Dataset:
    """Trajectories in the (ē, ē⊥) plane over contours of err_tot, for two blocks of Σ₁."""
    blocks = (BLOCK, np.array([[2.7, 2.3], [2.3, 4.2]]))
    times, kappa = np.concatenate([[0.0], np.geomspace(0.05, 2000, 100)]), np.geomspace(1e-4, 1e4, 121)
    x, y, factors = np.linspace(-0.1, 1.1, 121), np.linspace(-0.62, 0.25, 88), np.array([4.0, 1.0, 0.25])
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    temperatures = np.append(theory.MEDIAN * factors, np.inf)[:, None]
    start = np.array([1.0, 0.0])  # θ₁ in coordinates along ē and ē⊥ around θ₂*
    variables: dict[str, Any] = {}
    best: dict[str, list[float]] = {"lower_bound": [], "best_flow": [], "best_average": []}
    for number, block in enumerate(blocks):
        problem = theory.two_task_problem(RHO, block)
        paths = start + np.asarray(theory.trajectory(problem, GradientFlow(times), temperatures).moved)
        variables[f"contours_{number}"] = (("y", "x"), np.asarray(sum(theory.errors(grid, RHO, block))))
        variables[f"flow_{number}"] = (("factor", "time", "axis"), paths[:-1])
        variables[f"unweighted_{number}"] = (("time", "axis"), paths[-1])
        variables[f"frontier_{number}"] = (("kappa", "axis"), start + np.asarray(pareto_weights(problem, kappa)))
        variables[f"optimum_{number}"] = ("axis", start + np.asarray(pareto_weights(problem, 1.0)))
        best["lower_bound"].append(float(sum(pareto(problem, 1.0))))
        best["best_flow"].append(float(theory.best_flow(RHO, block).total))
        best["best_average"].append(float(theory.best_averaging(block)))
    steps = theory.flow_iterates(RHO, theory.beta_from_temperature(theory.MEDIAN, RHO), np.arange(40))
    variables["steps"] = (("step", "axis"), np.asarray(steps))
    coordinates = {"x": x, "y": y, "factor": factors, "time": times, "axis": ["e", "perpendicular"], "kappa": kappa}
    return xr.Dataset(variables, coordinates, {"rho": RHO, **best})


def _draw_plane(data: xr.Dataset) -> Figure:
    figure, axes = canvas(2, height=3.3)
    labels = {4.0: SHOWN["tilt 0.25"], 1.0: SHOWN["FLOW"], 0.25: (DARK, "FLOW, T = ¼ × median")}
    for number, (axis, title) in enumerate(zip(axes, ("Σ₁ uncorrelated", "Σ₁ correlated alike"))):
        bound = data.lower_bound[number]
        levels = bound + (1 - bound) * np.array([0.02, 0.1, 0.25, 0.5, 1.0, 1.75, 3.0])
        axis.contour(data.x, data.y, data[f"contours_{number}"], levels=levels, colors="0.75", linewidths=0.7)
        axis.plot(*data[f"unweighted_{number}"].T, color=ORANGE, label="no weights")
        for factor, (colour, label) in labels.items():
            axis.plot(*data[f"flow_{number}"].sel(factor=factor).T, color=colour, label=label)
        axis.plot(*data.steps.T, "o", color=BLUE, markersize=2.5)
        axis.plot([0, 1], [0, 0], color=COLOURS["ensemble"], linestyle=":", label="averaging")
        axis.plot(*data[f"frontier_{number}"].T, color=COLOURS["oracle"], linestyle="--", label="Pareto frontier")
        axis.plot(*data[f"optimum_{number}"], "*", color="white", markeredgecolor="black", markersize=9)
        for point, name, offset in (((1, 0), R"$\theta_1^*$", (4, 3)), ((0, 0), R"$\theta_2^*$", (-12, 3))):
            axis.plot(*point, "o", color="black", markersize=4)
            axis.annotate(name, point, offset, textcoords="offset points")
        axis.set(xlabel=R"along $\bar e$", title=title, aspect="equal")
    axes[0].set_ylabel(R"along $\bar e_\perp$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return panel_letters(axes)


def _caption_plane(data: xr.Dataset) -> str:
    return (
        "Fine-tuning in the plane of the theorem, from θ₁* to θ₂*, in units of ‖e‖; grey: levels of err_tot, star: its minimum. Training leaves the segment "
        "that averaging stays on, most of all without weights; the lower the temperature the closer it keeps to it. Lines: gradient flow; "
        f"dots: eq. (14) at the median temperature, step η = 1/(2μ). (a) FLOW can have less total error than the best average ({data.best_flow[0]:.3f} "
        f"against {data.best_average[0]:.3f}). (b) Where Σ₁ couples the two directions as strongly as Σ₂, or more, it cannot: averaging is its limit ({data.best_average[1]:.3f}). "
        f"ρ = {data.rho}; blocks of Σ₁ diag(2.7, 1) and (2.7, 2.3; 2.3, 4.2). Exact, nothing is sampled."
    )


FAMILIES = {"FLOW, T = 4 × median": (0.25, LIGHT), "FLOW, T = median": (1.0, BLUE), "FLOW, T = median / 4": (4.0, DARK)}
STEPS = {"unweighted": SHOWN["unweighted"], "FLOW": (BLUE, "FLOW, as it is"), "FLOW, mean one": (SKY, "FLOW, mean one")}


def _weights(key: Array, measured: xr.Dataset) -> xr.Dataset:
    """Weights against loss, and what normalisation does to training."""
    ratio = np.linspace(0, 6**0.5, 121) ** 2
    sample = np.asarray(jax.random.normal(key, (60,))) ** 2
    loss = sample / np.median(sample)
    variables: dict[str, Any] = {name: ("ratio", np.exp(-ratio * tilt)) for name, (tilt, _) in FAMILIES.items()}
    first = np.asarray(robust_weights(loss, 4.0))[0]
    variables["hard"] = ("ratio", np.exp(ratio / 4) * first / np.exp(loss[0] / 4))
    variables |= {"drawn_loss": ("sample", loss), "drawn_weight": ("sample", np.asarray(flow_weights(loss)))}
    gaussian = measured.sel(deviation="gaussian")
    finetune = sims.along_tau(sims.along(gaussian, "time").sel(risk="finetune"))
    for name in STEPS:
        for start, moment in zip(("risk", "risk_error"), sims.estimate(finetune.sel(weighting=name))):
            variables[f"{start} {name}"] = ("time", moment.values)
    flow = gaussian.sel(weighting="FLOW").mean("replicate")
    attributes = measured.attrs | {"step": float(flow.step), "share": float(flow.share)}
    return xr.Dataset(variables, {"ratio": ratio, "time": TIMES}, attributes)


def _draw_weights(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, height=2.5)
    residual = np.sqrt(data.ratio)
    lines = [(name, colour, "-", name) for name, (_, colour) in FAMILIES.items()]
    for name, colour, style, label in [*lines, ("hard", ORANGE, "--", "hard samples, 4 × median")]:
        axes[0].plot(data.ratio, data[name], color=colour, linestyle=style, label=label)
        axes[1].plot(residual, data[name] * residual, color=colour, linestyle=style)
    axes[0].plot(data.drawn_loss, data.drawn_weight, "o", color=BLUE, markersize=2.5)
    axes[1].plot(residual, residual, color="grey", linewidth=1)
    looks: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": "grey", "fontsize": 7}
    axes[1].annotate("no weights", (1.5, 1.5), (-3, 3), **looks)
    axes[0].set(xlim=(0, 6), ylim=(0, 2.6), xlabel="pretrained loss / median", ylabel="weight")
    axes[1].set(xlabel=R"residual / $\sqrt{\mathrm{median}}$", ylabel="weight × residual: pull on θ", ylim=(0, 2.6))
    axes[0].legend(loc="upper right", borderaxespad=0)
    for name, (colour, label) in STEPS.items():
        band(axes[2], data.time, data[f"risk {name}"], data[f"risk_error {name}"], color=colour, label=label)
    axes[2].set(xscale="log", xlim=(0.1, 1e4), ylim=(0, None), xlabel=TIME, ylabel=TASK)
    axes[2].legend(loc="lower right")
    return panel_letters(axes)


def _caption_weights(data: xr.Dataset) -> str:
    return (
        "Weights from pretrained losses. (a) Weight against loss; points: a sample of 60 squared normal residuals at its median temperature. Dashed: the "
        "opposite weighting, mean one. (b) The pull of one sample on the weights: with FLOW it falls again for large residuals, "
        "as for redescending robust losses, but only once, at the start. (c) Weights as they are also shrink the step, to "
        f"{data.step:.2f} of its size; normalised to mean one the curve moves to the left by as much and is else the same. What remains is the price of samples: "
        f"their effective share is {data.share:.2f}. Bands: ± one standard error. n = {data.n}, Gaussian noise. {_context(data)}"
    )


def _limits(few: xr.Dataset, many: xr.Dataset) -> xr.Dataset:
    """Where training ends: weights do not matter for n < p, and do for n > p."""
    variables: dict[str, Any] = {}
    for text, measured in (("n < p", few), ("n > p", many)):
        gaussian = measured.sel(deviation="gaussian", risk="finetune", weighting=list(SHOWN))
        time, end, ridge = (sims.along_tau(sims.along(gaussian, family)) for family in ("time", "end", "penalty"))
        variables[f"{text} end"] = ("weighting", end.isel(end=0).mean("replicate").values)
        for name in SHOWN:
            variables[f"{text} {name}"] = _moments(time.sel(weighting=name))
            if measured is few:
                variables[f"ridge {name}"] = _moments(ridge.sel(weighting=name))
    coordinates = {"moment": ["mean", "error"], "time": TIMES, "penalty": PENALTIES, "weighting": list(SHOWN)}
    return xr.Dataset(variables, coordinates, few.attrs | {"few": few.n, "many": many.n})


def _draw_limits(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, height=2.5)
    for axis, text, n in ((axes[0], "n < p", data.few), (axes[1], "n > p", data.many)):
        for name, (colour, label) in SHOWN.items():
            band(axis, data.time, *data[f"{text} {name}"].values, color=colour, label=label)
            if text == "n > p" or name == "unweighted":
                axis.axhline(float(data[f"{text} end"].sel(weighting=name)), color=colour, linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel=TIME, title=f"{text} (n = {n})", xticks=[1e0, 1e2, 1e4, 1e6, 1e8])
    for name, (colour, _) in SHOWN.items():
        band(axes[2], data.penalty, *data[f"ridge {name}"].values, color=colour)
    axes[2].set(xscale="log", xlabel=R"penalty $\lambda$", title=f"n < p, ridge (n = {data.few})")
    axes[2].invert_xaxis()
    axes[0].set_ylabel(TASK)
    axes[1].legend()
    return panel_letters(axes)


def _caption_limits(data: xr.Dataset) -> str:
    return (
        "Weights act on the way. (a) n < p: the interpolating limit (dotted) is the same for any weights, but the last samples with weight e^{−ℓ/T} are only "
        "fitted at times of e^{ℓ/T}, if ever. (b) n > p: the limits (dotted, weighted least squares) differ; at the median temperature most of the "
        "gap is never closed. (c) Ridge, from strong to weak: as early stopping. Gaussian noise: the weights do not pay on the fine-tuning "
        f"task, each at its best time or penalty. Means ± one standard error (bands). {_context(data)}"
    )


def _temperatures(tilts: np.ndarray, few: xr.Dataset, many: xr.Dataset) -> xr.Dataset:
    """The best risk along training against the tilt of the weights."""
    variables: dict[str, Any] = {}

    def best(objective: xr.DataArray) -> xr.DataArray:
        """At the time where its mean is least, one for each weighting."""
        return objective.isel(time=objective.mean("replicate").argmin("time"))

    for measured in (few, many):
        risks = sims.along_tau(sims.along(measured, "time").isel(weighting=slice(len(tilts))))
        finetune, pretrain = risks.sel(risk="finetune"), risks.sel(risk="pretrain")
        for label, objective in (("finetune", finetune), ("total", finetune + pretrain)):
            for deviation in DEVIATIONS:
                chosen = best(objective.sel(deviation=deviation)).rename(weighting="tilt")
                variables[f"{label}_{deviation}_{measured.n}"] = _moments(chosen)
    outliers = finetune.sel(deviation="outliers")
    saved = best(outliers.sel(weighting="unweighted")) - best(outliers.sel(weighting="tilt 0.25"))
    gain, error = (float(value) for value in sims.estimate(saved))
    attributes = few.attrs | {"few": few.n, "many": many.n, "gain": gain, "gain_error": error}
    return xr.Dataset(variables, {"moment": ["mean", "error"], "tilt": tilts}, attributes)


def _draw_temperatures(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, 2, height=2.3, sharex=True)
    for number, axis in enumerate(axes):
        objective, n = ("finetune", "total")[number // 2], (data.few, data.many)[number % 2]
        for deviation, (colour, _, label) in DEVIATIONS.items():
            mean, error = data[f"{objective}_{deviation}_{n}"].values
            axis.errorbar(data.tilt, mean, error, color=colour, fmt="o-", capsize=1.5, label=label)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("symlog", linthresh=0.125, linscale=0.5)
        if objective == "finetune":
            axis.set_title(f"n = {n}, p = {data.p}", loc="right")
        else:
            axis.set_xlabel("median / T   (< 0: hard samples upweighted)")
            axis.set_xticks([-1, -0.25, 0, 0.25, 1, 4], labels=["−1", "−¼", "0", "¼", "1", "4"])
            axis.minorticks_off()
    axes[0].set_ylabel(R"least $R_\mathrm{ft}$")
    axes[2].set_ylabel(R"least $R_\mathrm{ft} + R_\mathrm{pre}$")
    axes[0].legend(loc="upper left", bbox_to_anchor=(0.42, 1.05))
    return panel_letters(axes)


def _caption_temperatures(data: xr.Dataset) -> str:
    return (
        "The temperature, from upweighted hard samples through no weights (grey) to FLOW at the median (dotted) and below, each stopped at its own best time. "
        "Upper row: fine-tuning risk; lower row: sum of both risks. What the labels deviate by decides: under Gaussian noise weights cost "
        f"fine-tuning risk, with outliers (a tenth of the labels has nine tenths of the variance) mild weights save some of it (at T = 4 × median, n > p, {data.gain:.3f} ± {data.gain_error:.3f} in paired replicates), and upweighting hard samples is "
        "ruinous. Misfit: the deviation is a quadratic in the direction of the gap. Means ± one standard error; the same samples for all temperatures, times "
        f"chosen on the mean of them. {_context(data)}"
    )


METHODS = {
    "averaging": (COLOURS["ensemble"], "-"),
    "early stopping": (COLOURS["early stopping"], "-"),
    "L2 to init": ("#E69F00", "-"),
    "L2 to zero": ("#B8A000", "-"),
    "FLOW": (BLUE, "-"),
    "FLOW, T = 4 × median": (LIGHT, "-"),
    "FLOW + ridge": (SKY, ":"),
    "FLOW + averaging": (SKY, "--"),
    "early stopping + averaging": (COLOURS["early stopping"], "--"),
    "lower bound": (COLOURS["oracle"], "--"),
}


def _trade_off(frontier: Any, few: xr.Dataset, many: xr.Dataset) -> xr.Dataset:
    """The plane R_pre × R_ft, a curve for each method: in the population, and three times from samples."""
    planes = [sims.population_curves(RHO, BLOCK)]
    for measured, deviation in ((few, "gaussian"), (many, "gaussian"), (many, "outliers")):
        planes.append(sims.sampled_curves(measured.sel(deviation=deviation)) | {"lower bound": frontier})
    variables = {
        f"{name} {number}": (("risk", f"{name} {number} point"), np.stack([risks.pretrain, risks.finetune]))
        for number, methods in enumerate(planes)
        for name, risks in methods.items()
    }
    return xr.Dataset(variables, {"risk": ["pretrain", "finetune"]}, few.attrs | {"few": few.n, "many": many.n})


def _draw_trade_off(data: xr.Dataset) -> Figure:
    few, many = f"n = {data.few} < p", f"n = {data.many} > p"
    titles = ("population, theorem's setting", f"{few}, Gaussian noise", f"{many}, Gaussian noise", f"{many}, outliers")
    figure, axes = canvas(2, 2, height=2.7)
    for number, (axis, title) in enumerate(zip(axes, titles)):
        for name, (colour, style) in METHODS.items():
            if f"{name} {number}" in data:
                label = "Pareto frontier" if name == "lower bound" else name
                axis.plot(*data[f"{name} {number}"], color=colour, linestyle=style, label=label)
        axis.plot(0, data[f"averaging {number}"][1, 0], "o", color=COLOURS["pretrained"])
        axis.set_title(title, loc="right")
        axis.set(xlim=(-0.03, 1.5 if number else 2.8), ylim=(-0.03, 1.12))
    for axis in axes[2:]:
        axis.set_xlabel(FORGETTING)
    for axis in axes[::2]:
        axis.set_ylabel(TASK)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return panel_letters(axes)


def _caption_trade_off(data: xr.Dataset) -> str:
    return (
        "General against fine-tuning performance (lower left is better). (a) Population, Theorem 7.2's setting without noise, ρ = 0.76: FLOW, stopped early at the "
        "median temperature, is better than averaging; stopping early without weights is a little better still. L2 to zero also forgets what it pulls down. (b–d) The same "
        "from samples: a curve for every stopping time, penalty or τ; averaging is of the end of training with the pretrained weights; + averaging: the "
        "best stopping time and τ for each trade-off. Dashed grey: no weights are below on average (they would need to know Σ₁, Σ₂ and θ₂*); dot: θ₁*. "
        "With Gaussian noise FLOW wastes samples (b, c); with outliers (d) it is far better than averaging, and at four times the median temperature better than "
        f"stopping early without weights. {_context(data)}"
    )


def _hard_samples(measured: xr.Dataset) -> xr.Dataset:
    """What easy samples cost: risk on the points that were hard for the pretrained weights."""
    time = sims.along(measured, "time").sel(deviation="gaussian")
    moments = [sims.conditional_square(low / 10, (low + 1) / 10) for low in range(10)]
    decile = xr.DataArray(moments, {"decile": np.arange(1, 11)})
    variables: dict[str, Any] = {}
    stops = []
    for name in SHOWN:
        risks = sims.along_tau(time.sel(weighting=name))
        finetune, hard = risks.sel(risk="finetune"), risks.sel(risk="hardest")
        stops.append(int(finetune.mean("replicate").argmin("time")))
        # R of a decile is R_ft + (m − 1)·X with one X for all of them; the hardest tenth is the last
        along = (finetune + (decile - 1) * (hard - finetune) / (moments[-1] - 1)).isel(time=stops[-1])
        variables[f"decile {name}"] = _moments(along)
        variables[f"along {name}"] = (("risk", "time"), risks.mean("replicate").transpose("risk", "time").values)
        variables[f"hardest_error {name}"] = ("time", sims.estimate(hard)[1].values)
    variables["stop"] = ("weighting", stops)
    coordinates = {"moment": ["mean", "error"], "decile": decile.decile, "risk": list(sims.RISKS)}
    return xr.Dataset(variables, coordinates | {"time": TIMES, "weighting": list(SHOWN)}, measured.attrs)


def _draw_hard_samples(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, height=2.5)
    for name, (colour, label) in SHOWN.items():
        mean, error = data[f"decile {name}"].values
        axes[0].errorbar(data.decile, mean, error, color=colour, fmt="o-", capsize=1.5, label=label)
        until = data.isel(time=slice(0, int(data.stop.sel(weighting=name)) + 1))
        along, along_error = until[f"along {name}"], until[f"hardest_error {name}"]
        for axis, risk in zip(axes[1:], ("finetune", "pretrain")):
            band(axis, along.sel(risk=risk), along.sel(risk="hardest"), along_error, color=colour)
    axes[0].set(xlabel="decile of the pretrained loss", ylabel=R"fine-tuning risk in that decile", xticks=[1, 4, 7, 10])
    axes[0].legend()
    axes[1].set(xlabel=TASK, ylabel="risk on the hardest tenth")
    axes[1].invert_xaxis()
    axes[2].set(xlabel=FORGETTING, ylabel="risk on the hardest tenth")
    return panel_letters(axes)


def _caption_hard_samples(data: xr.Dataset) -> str:
    stops = []
    for name, (_, label) in SHOWN.items():
        at = data[f"along {name}"].isel(time=int(data.stop.sel(weighting=name)))
        total, hardest = at.sel(risk="finetune"), at.sel(risk="hardest")
        stops.append(f"{label}: {total:.2f} in all, {hardest:.2f} on the hardest tenth")
    return (
        "The cost of easy samples. (a) Fine-tuning risk by decile of the pretrained loss of the test points, each method stopped at its least R_ft "
        f"({'; '.join(stops)}): what FLOW leaves is on the hard ones. (b) Risk on the hardest tenth against fine-tuning risk along training (to the right), up to that "
        "stop: nearly one curve; at equal fine-tuning risk the hard points cost hardly more. (c) Against forgetting they do. The hard points are hard because of "
        "the gap, the direction that FLOW stalls. Given a sample the risks are exact for Gaussian "
        f"test points, whose labels carry the noise when they are ranked; means ± one standard error. n = {data.n}. {_context(data)}"
    )


def _draw_digits(data: xr.Dataset) -> Figure:
    _, axes = canvas(4, 2, height=2.1)
    texts = {"finetune": "fine-tuning test error", "pretrain": "pretraining test error"}
    texts["hardest_accuracy"] = "accuracy, hardest tenth"
    for row, share in enumerate(data.share.values):
        panels = axes[4 * row : 4 * row + 4]
        for name, colour, label in (("unweighted", ORANGE, "no weights"), ("FLOW", BLUE, "FLOW")):
            curve, looks = data.sel(share=share, weighting=name), {"color": colour, "label": label}
            for axis, (quantity, text) in zip(panels, texts.items()):
                band(axis, data.time, curve[quantity], curve[f"{quantity}_error"], alpha=0.25, **looks)
                axis.set(xscale="log", ylabel=text)
            both = (curve.pretrain, curve.finetune, curve.finetune_error, curve.pretrain_error)
            panels[3].errorbar(*both, color=colour, fmt=".-", markersize=3, linewidth=1)
        panels[1].set_ylim(0, 0.8)
        panels[3].set(xlim=(0.05, 0.8), ylabel=texts["finetune"])
        panels[0].set_title("all labels right" if share == 0 else f"{100 * share:.0f}% wrong labels", loc="right")
    for axis in axes[4:7]:
        axis.set_xlabel("training time")
    axes[7].set_xlabel(texts["pretrain"])
    axes[0].legend()
    return panel_letters(axes)


def _caption_digits(data: xr.Dataset) -> str:
    wrong = data.isel(share=1)
    flow, plain = (float(wrong.finetune.sel(weighting=name).min()) for name in ("FLOW", "unweighted"))
    return (
        f"Handwritten digits, random Fourier features (p = {data.p}), ten one-hot outputs: pretrained on 700 upright images, fine-tuned on 150 images turned by "
        f"{data.angle:.0f}°, by gradient flow. Weights e^{{−ℓ/T}} as they are, T = the median of the pretrained model's squared errors. (a–d) All labels right; FLOW follows "
        "the same trade-off (d) more slowly, and leaves the hardest tenth of the test images (by pretrained error) for the end. (e–h) "
        f"{100 * float(wrong.share):.0f}% of the fine-tuning labels are wrong; wrong labels have large losses and little weight, and the least test error is "
        f"{flow:.3f} instead of {plain:.3f}. Errors are squared, summed over "
        f"classes, on held-out images with right labels; means over {data.splits} random splits, bands and bars ± one standard error. Seed {data.seed}."
    )
