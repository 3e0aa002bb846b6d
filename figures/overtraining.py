"""The figures of the overtraining paper (2503.19206) in its two-layer linear setting, theory beside simulation."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from figures.style import Picture, canvas, panel_letters, readable_ticks
from sims import overtraining as sims
from theory import overtraining as theory


class Setting(NamedTuple):
    """Sizes of a run; the quick one is for CI and first looks."""

    size: int
    checkpoints: int
    last_time: float
    replicas: int
    draws: int
    rate_count: int
    stream_size: int
    stream_steps: int
    stream_replicas: int
    stream_rates: tuple[float, ...]
    budgets: int

    def __str__(self) -> str:
        return f"m = h = k = {self.size}, a_i = 1/i, s₀ = {INITIAL:g}"


INITIAL, STEP_SIZE, FINETUNE_STEPS = 1e-3, 0.05, 100
GAMMAS = (0.0, 0.04, 0.08, 0.12)
FULL = Setting(16, 33, 100.0, 400, 8, 13, 12, 4000, 12, (0.02, 0.03, 0.05, 0.1, 0.2), 13)
QUICK = Setting(8, 13, 40.0, 32, 3, 7, 6, 300, 3, (0.05, 0.1), 5)

UNRELATED, NOISY, ROTATED, STRETCHED = "unrelated", "same + noise", "rotated", "stretched"
TASK_TEXT = {
    UNRELATED: "unrelated task",
    NOISY: "pretraining task + noise",
    ROTATED: "rotated by 0.5 rad",
    STRETCHED: "features × 1.5",
}


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the paper, one after the other."""
    setting = QUICK if quick else FULL
    seed = int(jax.random.key_data(key).ravel()[-1])
    keys = jax.random.split(key, 6)
    target = sims.power_law_target(keys[0], setting.size)
    context = f"Gradient descent on ½‖W₁W₂ − A‖²_F from balanced aligned weights, {setting}; seed {seed}."
    yield features(target, setting, context)
    yield perturbed(keys[1], target, setting, context)
    times = checkpoint_times(setting)
    data = fine_tuned(keys[2], target, times, setting)
    context = f"{context} Fine-tuning: {FINETUNE_STEPS} steps at a constant rate, mean of {setting.draws} tasks."
    yield after_fine_tuning(data, target, context)
    yield penalised(data, context)
    yield inflections(data, target, context)
    yield tokens(keys[3], setting, seed)
    yield sharpness(keys[4], setting, seed)


def checkpoint_times(setting: Setting) -> np.ndarray:
    """0 and log-spaced times, as whole steps."""
    times = np.concatenate([[0.0], np.geomspace(0.5, setting.last_time, setting.checkpoints - 1)])
    return np.unique(np.rint(times / STEP_SIZE)) * STEP_SIZE


def shades(count: int) -> np.ndarray:
    """Colours for an ordered quantity, from dark to light, the lightest left out."""
    return mpl.colormaps["viridis"](np.linspace(0, 0.85, count))


def features(target: Array, setting: Setting, context: str) -> Picture:
    """Singular values against time, and the error of finite steps."""
    times, step_sizes = np.linspace(0, min(setting.last_time, 40.0), 81), [0.1, 0.05, 0.02, 0.01, 0.005]
    data = sims.learning_curves(target, times, initial=INITIAL, step_sizes=step_sizes)
    shown = (1, 2, 3, 5, 8)
    figure, axes = canvas(2)
    for mode, colour in zip(shown, shades(len(shown))):
        axes[0].plot(times, data.exact.sel(mode=mode), color=colour)
        points = data.measured.sel(mode=mode, step_size=STEP_SIZE).isel(time=slice(None, None, 6))
        axes[0].plot(points.time, points, "o", color=colour)
        axes[0].annotate(
            f"$a_{mode}$", (times[-1], float(data.exact.sel(mode=mode)[-1])), (3, -2), textcoords="offset points"
        )
    axes[0].set(xlabel="pretraining time (step size × steps)", ylabel="singular value of W")
    errors = abs(data.measured - data.exact).max(("time", "mode"))
    axes[1].loglog(step_sizes, errors, "o", color="black")
    axes[1].loglog(step_sizes, errors[-1].item() * np.array(step_sizes) / step_sizes[-1], color="grey", linewidth=1)
    axes[1].annotate("∝ step size", (step_sizes[1], float(errors[1])), (-4, 8), textcoords="offset points", ha="right")
    axes[1].set(xlabel="step size", ylabel="largest |measured − closed form|")
    readable_ticks(axes[1].xaxis)
    readable_ticks(axes[1].yaxis)
    panel_letters(axes)
    caption = (
        "Features are learned one after another. (a) Singular values along pretraining; lines: gradient flow in closed form, "
        f"points: trained weights at step size {STEP_SIZE}. (b) The largest difference over all modes and times falls linearly "
        f"in the step size, {float(errors[-1]):.1e} at {step_sizes[-1]}. {context}"
    )
    return Picture("singular_values", "Features, one after another", caption, figure, data.assign(error=errors))


def perturbed(key: Array, target: Array, setting: Setting, context: str) -> Picture:
    """Loss under Gaussian perturbation against pretraining time, and the sensitivity."""
    times = np.unique(np.concatenate([checkpoint_times(setting), np.linspace(0, 20, 41)]))
    gammas = np.array(GAMMAS)
    data = sims.perturbed_losses(
        key, target, times, gammas, initial=INITIAL, step_size=STEP_SIZE, replicas=setting.replicas
    )
    fine, a = np.geomspace(0.5, times[-1], 300), jnp.linalg.svd(target, compute_uv=False)
    m, k = target.shape
    figure, axes = canvas(2)
    for gamma, colour in zip(gammas, shades(len(gammas))):
        curve = data.sel(gamma=gamma)
        exact = theory.perturbed_loss(INITIAL, a, fine, gamma, (m, m, k))
        label = "not perturbed" if gamma == 0 else f"γ = {gamma:g}"
        axes[0].plot(fine, exact.total, color=colour, label=label)
        points = curve.sel(time=times[times > 0][::4], method="nearest")
        axes[0].errorbar(points.time, points.perturbed, points.perturbed_error, color=colour, fmt="o", capsize=1.5)
        turn = float(curve.inflection_flow)
        if 0 < turn < times[-1]:
            lowest = np.interp(turn, fine, exact.total)
            axes[0].plot(turn, lowest, "v", color=colour, markersize=8, markeredgecolor="white")
        if gamma > 0:
            axes[1].plot(fine, exact.sensitivity, color=colour)
            axes[1].errorbar(
                points.time, points.perturbed - points.loss, points.perturbed_error, color=colour, fmt="o", capsize=1.5
            )
    axes[0].set(xscale="log", xlim=(0.5, times[-1]), xlabel="pretraining time", ylabel="pretraining loss")
    axes[0].legend(title="perturbation", title_fontsize=7)
    axes[1].set(xscale="log", xlim=(0.5, times[-1]), xlabel="pretraining time", ylabel="sensitivity: rise of the loss")
    panel_letters(axes)
    visible = data.sel(gamma=gammas[gammas > 0])
    caption = (
        "The more has been learned, the more a perturbation of fixed size destroys. (a) Loss after adding N(0, γ²) to every weight: "
        "it turns up at the inflection (triangles, closed form), earlier for larger γ. (b) The rise itself never stops growing. "
        f"Lines: closed form; points: trained weights, mean of {setting.replicas} perturbations ± one standard error, the largest "
        f"gap to the expectation at the same weights {float(abs(visible.perturbed_z).max()):.1f} standard errors over "
        f"{visible.perturbed_z.size} (correlated) values. {context}"
    )
    return Picture("perturbed_loss", "Progressive sensitivity", caption, figure, data)


def fine_tuned(key: Array, target: Array, times: np.ndarray, setting: Setting) -> xr.Dataset:
    """Both losses after fine-tuning, for every task, penalty and learning rate."""
    keys = jax.random.split(key, setting.draws)
    entry_std = 0.15 * (24 / setting.size) ** 0.5  # the same spectral norm at every size

    def stack(draw):  # type: ignore[no-untyped-def]
        return jnp.stack([draw(one) for one in keys])

    tasks = {
        UNRELATED: stack(lambda key: sims.unrelated_task(key, target, entry_std)),
        NOISY: stack(lambda key: target + sims.unrelated_task(key, target, entry_std * 2 / 3)),
        ROTATED: stack(lambda key: sims.rotated_task(key, target, 0.5)),
        STRETCHED: stack(lambda key: sims.stretched_task(target, 1.5)),
    }
    checkpoints = sims.pretrain(target, times, initial=INITIAL, step_size=STEP_SIZE)
    return sims.fine_tuned_losses(
        checkpoints,
        times,
        target,
        tasks,
        step_sizes=0.002 * 2.0 ** np.linspace(0, 6, setting.rate_count),
        penalties=np.array([0.0, 0.3, 1.0]),
        steps=FINETUNE_STEPS,
    ).sel(schedule="constant", drop=True)


SHOWN_RATES = (0.004, 0.008, 0.016, 0.064)


def mark_inflection(axis: Axes, curve: xr.DataArray, colour: object) -> None:
    turn = float(sims.inflection(curve))
    if 0 < turn < np.inf:
        axis.plot(turn, float(curve.sel(time=turn)), "v", color=colour, markersize=8, markeredgecolor="white")


def after_fine_tuning(data: xr.Dataset, target: Array, context: str) -> Picture:
    """Pretraining and fine-tuning loss after fine-tuning against pretraining time, where it turns and where not."""
    figure, axes = canvas(3, 2, height=2.1, sharex=True)
    plain = data.sel(penalty=0.0)
    rates = [float(plain.step_size.sel(step_size=rate, method="nearest")) for rate in SHOWN_RATES]
    a = jnp.linalg.svd(target, compute_uv=False)
    fine = np.geomspace(0.5, float(data.time[-1]), 200)
    for column, task in enumerate((UNRELATED, ROTATED, STRETCHED)):
        top, bottom = axes[column], axes[3 + column]
        for rate, colour in zip(rates, shades(len(rates))):
            curve = plain.sel(task=task, step_size=rate)
            line = "" if task == STRETCHED else "-"
            for axis, name in ((top, "pretrain"), (bottom, "finetune")):
                axis.errorbar(
                    curve.time,
                    curve[name],
                    curve[f"{name}_error"],
                    color=colour,
                    fmt=f"o{line}",
                    markersize=2.2,
                    label=f"{rate:.3g}",
                )
            if task == STRETCHED:
                exact = theory.fine_tuning(INITIAL, a, 1.5 * a, fine, rate * FINETUNE_STEPS, steps=FINETUNE_STEPS)
                top.plot(fine, exact.pretrain_after, color=colour)
                bottom.plot(fine, exact.finetune_after, color=colour)
            mark_inflection(top, curve.pretrain, colour)
        best = sims.tuned(plain.sel(task=task))
        top.plot(best.time, best.pretrain, color="black", linestyle=":", label="tuned")
        bottom.plot(best.time, best.finetune, color="black", linestyle=":")
        top.plot(data.time, data.pretrain_before, color="grey", linewidth=1, label="before")
        bottom.plot(data.time, data.finetune_before.sel(task=task), color="grey", linewidth=1)
        top.set_title(TASK_TEXT[task], fontsize=8, loc="right")
        bottom.set(xscale="log", xlim=(0.5, float(data.time[-1])), xlabel="pretraining time")
        top.set_ylim(0.7 * float(plain.pretrain.sel(task=task, step_size=rates).min()), None)
    axes[0].set(ylabel="pretraining loss after", yscale="log")
    readable_ticks(axes[0].yaxis)
    axes[3].set_ylabel("fine-tuning loss after")
    axes[4].legend(title="learning rate", title_fontsize=7, loc="upper right")
    panel_letters(axes)
    caption = (
        "Pretraining loss (upper row) and fine-tuning loss (lower row) after fine-tuning each checkpoint. On an unrelated task (a) the "
        "final pretraining loss falls and then climbs with more pretraining: catastrophic overtraining, earlier at larger rates "
        "(triangles). On a rotated task (b) there is none, on the same features made stronger (c) only where fine-tuning overshoots, "
        "lines there: closed recursion of the modes. Dotted: each checkpoint at the rate of its own least fine-tuning loss, which forgets "
        "as much after little pretraining as after much. Grey: before fine-tuning. "
        f"{context}"
    )
    return Picture("after_fine_tuning", "Fine-tuning checkpoints", caption, figure, plain)


def penalised(data: xr.Dataset, context: str) -> Picture:
    """What a penalty towards the pretrained weights delays, and what it costs."""
    rate = float(data.step_size.sel(step_size=0.016, method="nearest"))
    chosen = data.sel(task=UNRELATED)
    figure, axes = canvas(3, height=2.5)
    for penalty, colour in zip(data.penalty.values, shades(data.penalty.size)):
        fixed, best = chosen.sel(penalty=penalty, step_size=rate), sims.tuned(chosen.sel(penalty=penalty))
        for axis, curve, name in (
            (axes[0], fixed, "pretrain"),
            (axes[1], fixed, "finetune"),
            (axes[2], best, "pretrain"),
        ):
            axis.errorbar(
                curve.time,
                curve[name],
                curve[f"{name}_error"],
                color=colour,
                fmt="o-",
                markersize=2.2,
                label=f"μ = {penalty:g}",
            )
        mark_inflection(axes[0], fixed.pretrain, colour)
        mark_inflection(axes[2], best.pretrain, colour)
    for axis in axes:
        axis.set(xscale="log", xlim=(0.5, float(data.time[-1])), xlabel="pretraining time")
    axes[0].set(ylabel="pretraining loss after", title=f"rate {rate:.3g}")
    axes[1].set(ylabel="fine-tuning loss after", title=f"rate {rate:.3g}")
    axes[2].set(ylabel="pretraining loss after", title="rate tuned", yscale="log")
    readable_ticks(axes[2].yaxis)
    axes[0].legend()
    panel_letters(axes)
    caption = (
        "A penalty (μ/2)‖θ − θ_pre‖² on an unrelated task, at one learning rate: it delays the inflection (a, triangles) and costs "
        "fine-tuning loss (b). (c) With every checkpoint at the rate of its own least fine-tuning loss: without a penalty the loss is "
        f"high and flat, with one the U-curve is back. {context}"
    )
    return Picture("penalty_against_overtraining", "A penalty delays the inflection", caption, figure, chosen)


def inflections(data: xr.Dataset, target: Array, context: str) -> Picture:
    """Inflection time against γ, against the learning rate, and over both."""
    a = jnp.linalg.svd(target, compute_uv=False)
    m, k = target.shape
    shape = m, m, k
    gammas = np.geomspace(0.01, 0.5, 120)
    exact = np.asarray(theory.inflection_time(INITIAL, a, gammas, shape))
    modes = np.asarray(theory.mode_inflection_times(INITIAL, a, gammas, shape))
    last = float(data.time[-1])
    figure, axes = canvas(3, height=2.6)
    for index, colour in zip((0, 1, 3, 7), shades(4)):
        axes[0].plot(gammas, np.where(modes[:, index] > 0, modes[:, index], np.nan), color=colour, linewidth=0.9)
        axes[0].annotate(
            f"mode {index + 1}", (gammas[0], modes[0, index]), (2, 2), textcoords="offset points", fontsize=6
        )
    axes[0].plot(gammas, np.where(exact > 0, exact, np.nan), color="black", label="all modes")
    axes[0].set(xscale="log", yscale="log", xlabel="perturbation γ", ylabel="inflection time")
    readable_ticks(axes[0].yaxis)
    axes[0].legend()

    times = sims.inflection(data.pretrain)
    styles = {
        UNRELATED: ("o", "#D55E00"),
        NOISY: ("s", "#0072B2"),
        ROTATED: ("^", "#009E73"),
        STRETCHED: ("D", "#CC79A7"),
    }
    for task, (marker, colour) in styles.items():
        for penalty, line, fill in ((0.0, "-", "full"), (1.0, ":", "none")):
            curve = times.sel(task=task, penalty=penalty)
            curve = curve.where((curve > 0) & np.isfinite(curve))
            axes[1].plot(curve.step_size, curve, line, marker=marker, fillstyle=fill, color=colour)
        axes[1].plot(
            [],
            [],
            "-",
            marker=marker,
            color=colour,
            label=task if np.isfinite(times.sel(task=task)).any() else f"{task}: none",
        )
    axes[1].plot([], [], ":", marker="o", fillstyle="none", color="grey", label="with μ = 1")
    axes[1].set(xscale="log", yscale="log", ylim=(0.4, last * 1.2), xlabel="learning rate", ylabel="inflection time")
    readable_ticks(axes[1].yaxis)
    axes[1].legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)

    levels = np.linspace(0, 0.12, 25)
    plain = data.sel(task=UNRELATED, penalty=0.0)
    noise = xr.DataArray(levels, dims="gamma", coords={"gamma": levels})
    combined = sims.inflection(plain.pretrain + (noise**2 * plain.spread + noise**4 * m * m * k) / 2)
    shown = combined.where(combined > 0).where(np.isfinite(combined)).transpose("gamma", "step_size")
    axes[2].set_facecolor("0.88")
    mesh = axes[2].pcolormesh(
        data.step_size,
        levels,
        shown,
        cmap="viridis",
        shading="nearest",
        rasterized=True,
        norm=mpl.colors.LogNorm(0.5, last),
    )
    axes[2].set(xscale="log", xlabel="learning rate", ylabel="perturbation γ")
    figure.colorbar(mesh, ax=axes[2], label="inflection time")
    for axis, letter in zip(axes, "abc"):
        axis.annotate(f"({letter})", (-0.3, 1.05), xycoords="axes fraction", fontweight="bold")
    caption = (
        "When more pretraining starts to hurt. (a) Gaussian perturbation, closed form: modes alone (thin) and all together; the line ends "
        "where no mode is worth its sensitivity. (b) Fine-tuning: earlier at larger rates, later with a penalty; no point where the final "
        "pretraining loss does not climb by more than 1% from its least value, or where it is least without any pretraining. (c) Both: fine-tuned to an unrelated task, then "
        f"perturbed; grey: none within the times simulated, or at once. {context}"
    )
    numbers = xr.Dataset(
        {
            "inflection": ("gamma", exact),
            "mode_inflection": (("gamma", "mode"), modes),
            "fine_tuning_inflection": times,
            "combined_inflection": combined.rename(gamma="gamma_after").drop_vars(["task", "penalty"]),
        },
        {"gamma": gammas},
    )
    return Picture("inflection_time", "Inflection time", caption, figure, numbers)


def tokens(key: Array, setting: Setting, seed: int) -> Picture:
    """Pretraining on a budget of fresh tokens, two schedules."""
    batch, rate, noise_std, scale = 8, 0.05, 0.3, 0.01
    target = sims.power_law_target(jax.random.fold_in(key, 1), setting.stream_size)
    last = setting.stream_steps * 3
    budgets = np.unique(np.rint(np.geomspace(40, last, setting.budgets)).astype(int)) * batch
    gammas = np.array([0.0, 0.05, 0.1, 0.15])
    data = sims.token_budgets(
        key,
        target,
        budgets,
        gammas,
        batch=batch,
        step_size=rate,
        noise_std=noise_std,
        scale=scale,
        replicas=setting.stream_replicas,
        schedules=("constant", "cosine"),
    )
    figure, axes = canvas(2, sharey=True)
    for axis, schedule in zip(axes, ("constant", "cosine")):
        for gamma, colour in zip(gammas, shades(len(gammas))):
            curve = data.sel(schedule=schedule, gamma=gamma)
            label = "not perturbed" if gamma == 0 else f"γ = {gamma:g}"
            axis.errorbar(
                budgets, curve.perturbed, curve.perturbed_error, color=colour, fmt="o-", capsize=1.5, label=label
            )
            turn = float(sims.inflection(curve.perturbed.rename(budget="time")))
            if 0 < turn < np.inf:
                height = float(curve.perturbed.sel(budget=turn))
                axis.plot(turn, height, "v", color=colour, markersize=8, markeredgecolor="white")
        axis.set(xscale="log", yscale="log", xlabel="pretraining tokens", title=f"{schedule} learning rate")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("pretraining loss")
    axes[0].legend()
    panel_letters(axes)
    caption = (
        "Time as a budget of tokens, each seen once by stochastic gradient descent: the same U-curves under perturbation (triangles: the "
        "least of each), at a constant rate (a) and with every budget a run of its own, decayed to its end (b), which reaches a lower loss "
        "and the same sensitivity. "
        f"m = h = k = {setting.stream_size}, a_i = 1/i, x ~ N(0, I), label noise {noise_std}, batch {batch}, rate {rate}, initial entries "
        f"N(0, {scale}²); mean of {setting.stream_replicas} seeds ± one standard error, the perturbation averaged exactly. Seed {seed}."
    )
    return Picture("token_budget", "Overtraining on a token budget", caption, figure, data)


def sharpness(key: Array, setting: Setting, seed: int) -> Picture:
    """What the pretraining schedule leaves behind: sharpness, and forgetting at matched fine-tuning loss."""
    batch, noise_std, scales, level = 8, 0.3, (0.3, 0.01), 0.05
    target_key, task_key, run_key = jax.random.split(key, 3)
    target = sims.power_law_target(target_key, setting.stream_size)
    entry_std = 0.05 * (12 / setting.stream_size) ** 0.5
    task = target + sims.unrelated_task(task_key, target, entry_std)
    data = sims.sharpness_and_forgetting(
        run_key,
        target,
        task,
        step_sizes=np.array(setting.stream_rates),
        steps=setting.stream_steps,
        batch=batch,
        noise_std=noise_std,
        scales=scales,
        replicas=setting.stream_replicas,
        level=level,
        finetune_step_size=0.02,
        finetune_steps=3000,
    )
    error = data.std("replica", ddof=1) / data.sizes["replica"] ** 0.5
    mean = data.mean("replica")
    figure, axes = canvas(2, height=2.6)
    markers = dict(zip(sims.SCHEDULES, ("o", "s", "^")))
    colours = dict(zip(sims.SCHEDULES, ("#D55E00", "#0072B2", "#009E73")))
    for schedule in sims.SCHEDULES:
        line, spread = mean.sel(schedule=schedule), error.sel(schedule=schedule)
        style: dict = {"color": colours[schedule], "marker": markers[schedule], "capsize": 1.5, "label": schedule}
        axes[0].errorbar(line.step_size, line.sharpness, spread.sharpness, **style)
        axes[1].errorbar(
            line.sharpness, line.forgetting, spread.forgetting, spread.sharpness, **style, linestyle="none"
        )
    axes[0].axhline(2, color="grey", linestyle="--", linewidth=1)
    axes[0].annotate("balanced: 2a₁", (setting.stream_rates[0], 2), (0, 4), textcoords="offset points", fontsize=7)
    axes[0].set(xscale="log", xlabel="peak learning rate", ylabel="sharpness after pretraining")
    readable_ticks(axes[0].xaxis)
    axes[0].legend()
    axes[1].set(xlabel="sharpness after pretraining", ylabel="forgetting at matched fine-tuning loss")
    panel_letters(axes)
    caption = (
        "From an unbalanced start, small or decaying rates leave the layers unbalanced, and the minimum sharp (a, largest Hessian eigenvalue "
        "by Lanczos; dashed: the least possible for this target). (b) Sharper checkpoints forget more by the time that fine-tuning has "
        f"reached the same fine-tuning loss, {level}, within each schedule; every point is one peak rate. Checkpoints of the constant rate "
        f"still carry gradient noise, which fine-tuning removes: their forgetting is lower for that reason too. m = h = k = {setting.stream_size}, "
        f"a_i = 1/i, initial entries N(0, {scales[0]}²) and N(0, {scales[1]}²), {setting.stream_steps} steps of batch {batch}, label noise "
        f"{noise_std}; fine-tuned by gradient descent to A plus independent entries; mean of {setting.stream_replicas} seeds ± one standard "
        f"error. Seed {seed}."
    )
    return Picture("sharpness_and_forgetting", "Sharpness against forgetting", caption, figure, data)
