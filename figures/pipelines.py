"""Pipelines: every task's risk along many stages, forgetting by order and similarity, overtraining by source (P1)."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace as Setting
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.figure import Figure

from figures.style import COLOURS, Picture, bars, canvas, panel_letters, seed_of
from linfit import MinNorm, Ridge, spectra
from sims.pipelines import similar_targets, simulated_risks
from theory.pipelines import Stage, best_source_size, risks, transfer

__all__ = ["pictures"]

FULL = Setting(p=400, n=100, replicates=400, similarities=33, sources=60)
QUICK = Setting(p=120, n=30, replicates=64, similarities=9, sources=24)
STAGES, NOISE_STD, SIMILARITY = 8, 0.5, 0.6
TAUS = np.linspace(0.05, 1.0, 39)
ORDERS = ["".join(order) for order in itertools.permutations("ABC")]
SHIFTS = (0.0, 0.25, 1.0)


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of pipelines."""
    setting, seed = QUICK if quick else FULL, seed_of(key)
    data = _along_stages(jax.random.fold_in(key, 0), setting).assign_attrs(seed=seed)
    yield Picture("pipelines_stages", "Eight tasks, one after another", data, _draw_stages, _caption_stages)
    data = _by_order(setting)
    yield Picture("pipelines_order", "Order and similarity of tasks", data, _draw_order, _caption_order)
    data = _by_source(jax.random.fold_in(key, 1), setting).assign_attrs(seed=seed)
    yield Picture("pipelines_source", "Overtraining by source size", data, _draw_source, _caption_source)


def _alike(count: int, similarity: Array | float, p: int) -> Array:
    """Optima with E‖θ*‖² = 1, every pair correlated alike."""
    return similar_targets(jnp.where(jnp.eye(count, dtype=bool), 1.0, similarity), jnp.full(p, 1 / p))


def _along_stages(key: Array, setting: Setting) -> xr.Dataset:
    """Risks (averaging, stage, task) predicted and simulated, and the mean over the tasks seen so far along τ."""
    spectrum, targets = spectra.power_law(setting.p, 0.5, trace=setting.p), _alike(STAGES, SIMILARITY, setting.p)

    def stages(tau: Array | float, anchor: int | None) -> Stage:
        return Stage(
            spectrum,
            setting.n,
            NOISE_STD,
            MinNorm(),
            jnp.where(jnp.arange(STAGES) == 0, 1.0, tau),
            average_with=None if anchor is None else [-1] + [anchor] * (STAGES - 1),
        )

    seen = np.tril(np.ones((STAGES, STAGES))) / np.arange(1, STAGES + 1)[:, None]
    means = {}
    for name, anchor in (("the stage before", None), ("the first stage", 0)):
        along = jax.vmap(lambda tau, anchor=anchor: risks(stages(tau, anchor), targets))(jnp.asarray(TAUS))
        means[name] = np.asarray(jnp.sum(along * seen, axis=-1))
    best = float(TAUS[np.argmin(means["the stage before"][:, -1])])
    panels = []
    for index, tau in enumerate((1.0, best)):
        single = [Stage(spectrum, setting.n, NOISE_STD, MinNorm(), 1.0 if k == 0 else tau) for k in range(STAGES)]
        key_of = jax.random.fold_in(key, index)
        panels.append(simulated_risks(key_of, single, targets, replicates=setting.replicates))
    data = xr.concat(panels, xr.DataArray([1.0, best], dims="averaging", name="averaging"))
    numbers = np.arange(1, STAGES + 1)
    data = data.assign_coords(stage=numbers, task=numbers, tau=TAUS, source=list(means))
    seen_risk = xr.DataArray(np.stack(list(means.values())), dims=("source", "tau", "stage"))
    facts = {"n": setting.n, "p": setting.p, "noise_std": NOISE_STD, "similarity": SIMILARITY}
    return data.assign(seen=seen_risk).assign_attrs(facts)


def _draw_stages(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, width=7.0, height=2.5)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, data.sizes["task"]))
    limits = 0.95 * float((data.risk - data.risk_error).min()), 1.05 * float((data.risk + data.risk_error).max())
    for axis, tau in zip(axes, data.averaging.values, strict=False):
        panel = data.sel(averaging=tau)
        for task, colour in zip(panel.task.values, colours, strict=True):
            row = panel.sel(task=task)
            axis.plot(row.stage, row.predicted, color=colour, linewidth=1.0)
            bars(axis, row, "risk", color=colour, markersize=2.5, linewidth=0.8)
        axis.set(xlabel="stage", title=Rf"$\tau = {tau:.2g}$", xticks=panel.stage.values, ylim=limits)
    axes[0].set_ylabel("risk of each task")
    scale = mpl.cm.ScalarMappable(mpl.colors.BoundaryNorm(np.arange(0.5, len(colours) + 1), len(colours)),
                                  mpl.colors.ListedColormap(colours))  # fmt: skip
    axes[0].figure.colorbar(scale, ax=axes[1], ticks=data.task.values, label="task, in the order of training")
    lines = {"no averaging": data.seen.sel(source="the stage before").isel(tau=-1)}
    lines |= {f"with {name}": data.seen.sel(source=name).min("tau") for name in data.source.values}
    looks = zip((COLOURS["min-norm"], COLOURS["ensemble"], COLOURS["ridge"]), "os^", strict=True)
    for (name, line), (colour, marker) in zip(lines.items(), looks, strict=True):
        axes[2].plot(line.stage[1:], line[1:], color=colour, marker=marker, label=name)
    axes[2].set(xlabel="number of stages", ylabel="mean risk of the tasks seen", xticks=data.stage.values[1:])
    axes[2].set_title(R"best $\tau$")
    axes[2].legend()
    axes[2].set_ylim(0, 1.35 * axes[2].get_ylim()[1])
    return panel_letters(axes)


def _caption_stages(data: xr.Dataset) -> str:
    gap = float(abs(data.risk / data.predicted - 1).max())
    z = float((abs(data.risk - data.predicted) / data.risk_error).max())
    last = data.seen.sel(source="the stage before").isel(stage=-1)
    off, on = float(last[-1]), float(last.min())
    return (
        "Risk of every task after every stage of min-norm fine-tuning: predicted (lines) and simulated from raw data (points, one "
        f"standard error): (a) without averaging, (b) keeping θ_k = (1−τ)θ_(k−1) + τ·(fine-tuned) with the τ of least mean risk after "
        f"the last stage. Largest gap {100 * gap:.1f}%, {z:.1f} standard errors. (c) Mean over the tasks seen so far, averaging with "
        f"the stage before or with the first one, each at its best common τ. After {data.sizes['stage']} stages averaging changes the "
        f"mean from {off:.2f} to {on:.2f}. Optima correlated {data.similarity:g}, spectrum j^(−1/2) of mean 1, σ = {data.noise_std:g}, "
        f"n = {data.n} in each stage, p = {data.p}, {data.replicates} pipelines; seed {data.seed}."
    )


def _by_order(setting: Setting) -> xr.Dataset:
    """Predicted final risks (order, similarity, task) of three tasks with different spectra, and risks of two."""
    p, similarity = setting.p, np.linspace(-0.45, 1.0, setting.similarities)
    falling = spectra.power_law(p, 1.0, trace=float(p))
    rows = {"A": falling, "B": spectra.isotropic(p), "C": spectra.power_law(p, 0.5, trace=float(p))}
    tests = jnp.stack(list(rows.values()))

    def final(order: str, at: Array) -> Array:
        stages = [Stage(rows[name], setting.n, NOISE_STD, MinNorm(), task="ABC".index(name)) for name in order]
        return risks(stages, _alike(3, at, p), tests)

    along = {order: jax.vmap(lambda at, order=order: final(order, at))(jnp.asarray(similarity)) for order in ORDERS}
    every = np.stack([np.asarray(value) for value in along.values()])
    first = np.stack([every[index, :, :, "ABC".index(order[0])] for index, order in enumerate(ORDERS)])
    variables = {
        "final": (("order", "similarity", "task"), every[:, :, -1]),
        "first": (("order", "similarity", "stage"), first),
    }
    coordinates = {"order": ORDERS, "similarity": similarity, "task": list("ABC"), "stage": [1, 2, 3]}
    return xr.Dataset(variables, coordinates, {"n": setting.n, "p": p, "noise_std": NOISE_STD})


def _draw_order(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, width=7.0, height=2.7)
    shades, styles = dict(zip("ABC", ("#D55E00", "#0072B2", "#009E73"), strict=True)), ("-", "--")
    mean = data.final.mean("task")
    for index, order in enumerate(data.order.values):
        looks: dict[str, Any] = {"color": shades[order[-1]], "linestyle": styles[order[0] > order[1]]}
        axes[1].plot(data.similarity, mean.sel(order=order) - mean.mean("order"), label="→".join(order), **looks)
        risen = data.first.sel(order=order, stage=2) - data.first.sel(order=order, stage=1)
        looks = {"color": shades[order[0]], "linestyle": styles[index % 2]}
        axes[0].plot(data.similarity, risen, label="→".join(order[:2]), **looks)
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xlabel("correlation of every two optima")
    axes[0].set_ylabel("rise of the first task's risk")
    axes[1].set_ylabel("mean risk at the end, less that of all orders")
    axes[0].legend(title="two stages", loc="upper right")
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(low, high + 0.45 * (high - low))
    axes[1].legend(title="three stages", loc="upper right", ncols=2)
    return panel_letters(axes)


def _caption_order(data: xr.Dataset) -> str:
    middle = int(np.argmin(abs(data.similarity.values)))
    means = data.final.mean("task").isel(similarity=middle).values
    best, worst = (str(data.order.values[at]) for at in (np.argmin(means), np.argmax(means)))
    rise = (data.first.sel(stage=2) - data.first.sel(stage=1)).isel(similarity=-1)
    words = ", ".join(f"{value:+.2f} ({'→'.join(order[:2])})" for order, value in zip(data.order.values, rise.values))
    return (
        "Three tasks of one size of signal but different spectra, A ∝ 1/j, B flat, C ∝ j^(−1/2), fitted one after another by "
        "min-norm; predicted. (a) What the second stage adds to the risk of the first task. (b) Mean risk of all three after the "
        f"third stage, less its mean over the orders ({float(data.final.isel(similarity=middle).mean()):.2f} at correlation "
        f"{float(data.similarity[middle]):.2g}, where the best order is "
        f"{'→'.join(best)}, the worst {'→'.join(worst)}). With one common optimum the second stage changes the first task's risk by {words}. "
        f"σ = {data.noise_std:g}, n = {data.n}, p = {data.p}."
    )


def _by_source(key: Array, setting: Setting) -> xr.Dataset:
    """Risk on the target along the source's size: isotropic min-norm, exact and simulated; and other recipes."""
    p, n = setting.p, setting.n
    points = (np.array([0.15, 0.4, 0.6, 0.8]) * p).astype(int)
    sizes = np.unique(np.concatenate([np.linspace(0, 0.92 * p, setting.sources).astype(int), points]))
    common = {"source_noise_std": 1.0, "noise_std": NOISE_STD}
    exact = [np.asarray(transfer(p, sizes, n, signal=4.0, shift=4 * shift, **common).total) for shift in SHIFTS]
    flat, simulated = jnp.ones(p), []
    for index, shift in enumerate(SHIFTS):
        targets = similar_targets(jnp.array([[1 + shift, 1.0], [1.0, 1.0]]), jnp.full(p, 4 / p))
        for at, size in enumerate(points):
            stages = [Stage(flat, int(size), 1.0, MinNorm()), Stage(flat, n, NOISE_STD, MinNorm())]
            key_of = jax.random.fold_in(key, 10 * index + at)
            measured = simulated_risks(key_of, stages, targets, replicates=setting.replicates)
            simulated.append([float(measured[name][1, 1]) for name in ("risk", "risk_error")])
    rows = np.moveaxis(np.reshape(simulated, (len(SHIFTS), len(points), 2)), -1, 0)
    spectrum = spectra.power_law(p, 0.5, trace=float(p))
    targets = similar_targets(jnp.array([[1.25, 1.0], [1.0, 1.0]]), jnp.full(p, 4 / p))

    def recipe(size: Array, filter: MinNorm | Ridge, tau: float) -> Array:
        stages = [Stage(spectrum, size, 1.0, filter, tau), Stage(spectrum, n, NOISE_STD, MinNorm())]
        return risks(stages, targets)[1, 1]

    recipes = {"min-norm": (MinNorm(), 1.0), "min-norm + ensemble": (MinNorm(), 0.7), "ridge": (Ridge(1.0), 1.0)}
    some = jnp.asarray(sizes[sizes > 0], float)
    others = [np.asarray(jax.vmap(lambda size, r=r: recipe(size, *r))(some)) for r in recipes.values()]
    variables = {
        "exact": (("ratio", "size"), np.stack(exact)),
        "best": ("ratio", [float(best_source_size(p, 4.0, shift)) for shift in SHIFTS]),
        "risk": (("ratio", "point"), rows[0]),
        "risk_error": (("ratio", "point"), rows[1]),
        "other": (("recipe", "positive"), np.stack(others)),
    }
    coordinates = {"ratio": list(SHIFTS), "size": sizes, "point": points, "recipe": list(recipes)}
    attributes = {"n": n, "p": p, "noise_std": NOISE_STD, "replicates": setting.replicates}
    return xr.Dataset(variables, coordinates | {"positive": np.asarray(some)}, attributes)


def _draw_source(data: xr.Dataset) -> Figure:
    _, axes = canvas(2, width=7.0, height=2.7)
    for shift, colour in zip(data.ratio.values, ("#0072B2", "#E69F00", "#D55E00"), strict=True):
        row = data.sel(ratio=shift)
        axes[0].plot(data["size"], row.exact, color=colour, label=Rf"$\mathrm{{SSR}} = {shift:g}$")
        bars(axes[0], row.drop_dims("size"), "risk", color=colour)
        axes[0].axvline(float(row.best), color=colour, linestyle=":", linewidth=0.9)
    for name in data.recipe.values:
        axes[1].plot(data.positive, data.other.sel(recipe=name), color=COLOURS[str(name)], label=str(name))
    for axis in axes:
        axis.set_xlabel(R"source samples $n_q$")
        axis.legend(loc="upper left")
        axis.set_ylim(0, 1.1 * float(data.exact.isel(size=0).max()) + 2)
    axes[0].set_ylabel("risk on the target")
    return panel_letters(axes)


def _caption_source(data: xr.Dataset) -> str:
    z = float((abs(data.risk - data.exact.sel(size=data.point)) / data.risk_error).max())
    pairs = zip(data.ratio.values, data.best.values, strict=True)
    bests = ", ".join(f"{best:.0f} at SSR {shift:g}" for shift, best in pairs)
    return (
        "Risk on the target after a source of n_q samples and then the target's own, against n_q. (a) Isotropic min-norm in both: exact "
        f"(lines) and simulated (points, one standard error); dotted the best n_q: {bests} (0: no transfer helps). More source data "
        "than that overtrain, although the tasks do not change. "
        "(b) Spectrum j^(−1/2), SSR 0.25, predicted: min-norm in both, the same with τ = 0.7 at the source, ridge with λ = 1 "
        f"at the source. SNR 4 (σ_q = 1, ‖β‖² = 4), σ = {data.noise_std:g}, n = {data.n}, p = {data.p}, {data.replicates} "
        f"pipelines a point, largest |z| {z:.1f}; seed {data.seed}."
    )
