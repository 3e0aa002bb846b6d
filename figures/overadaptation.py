"""The figures of the overadaptation paper (2506.01901) in its linear setting, theory beside simulation."""

from collections.abc import Iterator
from types import SimpleNamespace as Setting
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures.style import COLOURS, COLUMN, FORGETTING, TASK, Picture, band, bars, canvas, panel_letters, seed_of
from linfit import GradientFlow, MinNorm, Ridge, TwoTaskProblem, aligned_problem, risk_forms, sample_designs, spectra
from sims.overadaptation import monte_carlo, penalty_and_tau, phase_diagram, trade_off, training_time
from sims.real_data import digits_along_tau
from theory.overadaptation import best_of_each_method

__all__ = ["pictures"]

FULL = Setting(n=200, p=2000, replicates=256, designs=8, phase_points=33, splits=12)
QUICK = Setting(n=60, p=600, replicates=64, designs=3, phase_points=9, splits=2)

MARKERS = {"min-norm": "o", "ridge": "s", "early stopping": "^"}
PROBLEM_TEXT = (
    "Σ₁ = Σ₂ = diag(1/j), shift covariance Ω ∝ Σ^(−1/2) with tr ΩΣ = 1, label noise σ² = 0.5, "
    "pretrained weights with R_pre(θ₁) = 0.02"
)
TAU_LABEL = R"ensemble coefficient $\tau$"


def _problem(p: int, alignment: float) -> TwoTaskProblem:
    return aligned_problem(spectra.power_law(p), alignment=alignment, noise_std=0.5**0.5, pretrain_risk=0.02)


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the paper, one after the other."""
    setting = QUICK if quick else FULL
    n, p, designs, tau = setting.n, setting.p, setting.designs, jnp.linspace(0, 1.2, 61)
    keys = jax.random.split(key, 5)
    problem = _problem(p, alignment=-0.5)
    forms = risk_forms(sample_designs(keys[0], problem.finetune_covariance, n, designs), problem)
    best = jax.device_get(best_of_each_method(forms.finetune))
    filters = {
        "min-norm": MinNorm(),
        "ridge": Ridge(best["ridge"].hyperparameter),
        "early stopping": GradientFlow(best["early stopping"].hyperparameter),
    }
    seed = seed_of(key)
    sizes = {"n": n, "p": p, "designs": designs, "seed": seed}

    data = monte_carlo(keys[1], problem, n, filters, tau, setting.replicates).assign_attrs(seed=seed)
    yield Picture("risk_along_tau", "Both risks along the ensemble", data, _draw_along_tau, _caption_along_tau)
    data = _bias_and_variance(keys[4], n, p, tau, setting.replicates // 2).assign_attrs(seed=seed)
    title = "Bias and variance along the ensemble"
    yield Picture("bias_and_variance", title, data, _draw_bias_and_variance, _caption_bias_and_variance)
    data = trade_off(forms, best).assign_attrs(sizes)
    yield Picture("trade_off", "The trade-off plane", data, _draw_trade_off, _caption_trade_off)
    data = penalty_and_tau(forms.finetune, best).assign_attrs(sizes)
    yield Picture("penalty_and_tau", "Penalty × ensemble", data, _draw_penalty_and_tau, _caption_penalty_and_tau)
    data = training_time(keys[1], forms, problem, n, setting.replicates).assign_attrs(sizes)
    yield Picture("training_time", "Into the overfitting regime", data, _draw_training_time, _caption_training_time)
    cells, stds = np.linspace(-1, 1, setting.phase_points), np.logspace(-2, 1, setting.phase_points) ** 0.5
    data = phase_diagram(keys[2], n, p, 1.0, cells, stds, designs // 2 + 1).assign_attrs(seed=seed)
    title = "When does ensembling beat regularization?"
    yield Picture("phase_diagram", title, data, _draw_phase_diagram, _caption_phase_diagram)
    data = digits_along_tau(keys[3], np.array([0.0, 0.2, 0.4]), np.linspace(0, 1.25, 51), setting.splits)
    yield Picture("digits", "Real data: digits", data.assign_attrs(seed=seed), _draw_digits, _caption_digits)


def _bias_and_variance(key: Array, n: int, p: int, tau: Array, replicates: int) -> xr.Dataset:
    """`monte_carlo` of min-norm for three alignments of the shift."""
    alignments, filters = [-0.5, 0.0, 0.5], {"min-norm": MinNorm()}
    parts = [monte_carlo(key, _problem(p, alignment), n, filters, tau, replicates) for alignment in alignments]
    data = xr.concat(parts, xr.Variable("alignment", alignments), combine_attrs="override")
    return data.isel(filter=0, drop=True)


def _context(data: xr.Dataset) -> str:
    return f"{PROBLEM_TEXT}; n = {data.n}, p = {data.p}; seed {data.seed}."


def _agreement(data: xr.Dataset, lines: str = "exact risk of the same designs") -> str:
    """The largest gap between simulated and exact risk of the same designs, as a sentence; what the lines are."""
    gaps = [values for name, values in data.items() if "_z" in str(name)]
    return (
        f"Points: mean of {data.replicates} simulated fine-tunings, bars ± one standard error; lines: {lines}. "
        f"Largest gap between simulated and exact risk of the same designs {max(float(abs(gap).max()) for gap in gaps):.1f} "
        f"standard errors of their difference, over {sum(gap.size for gap in gaps)} values."
    )


def _draw_curve(axis: Axes, curve: xr.Dataset, name: str, colour: str, marker: str, label: str) -> None:
    """Exact values along τ, and every fifth simulated one with its error."""
    axis.plot(curve.tau, curve[f"{name}_exact"], color=colour, label=label)
    bars(axis, curve.isel(tau=slice(0, None, 5)), name, color=colour, fmt=marker)


def _mark_lowest(axis: Axes, curve: xr.Dataset, colour: str) -> None:
    lowest = float(curve.tau[np.argmin(curve.finetune_exact.values)])
    axis.axvline(lowest, color=colour, linewidth=0.8, linestyle=":")


def _draw_along_tau(data: xr.Dataset) -> Figure:
    _, axes = canvas(2)
    for axis, name, domain in zip(axes, ("finetune", "pretrain"), ("ft", "pre"), strict=True):
        for filter in data["filter"].values:
            curve, colour = data.sel(filter=filter), COLOURS[filter]
            _draw_curve(axis, curve, name, colour, MARKERS[filter], filter)
            if name == "finetune":
                _mark_lowest(axis, curve, colour)
        axis.set_xlabel(f"{TAU_LABEL}   (0 pretrained, 1 fine-tuned)")
        axis.set_ylabel(Rf"excess risk $R_\mathrm{{{domain}}}(\theta_\tau)$")
    axes[0].legend(title="fine-tuned by", title_fontsize=7)
    return panel_letters(axes)


def _caption_along_tau(data: xr.Dataset) -> str:
    return (
        "Averaging with the pretrained weights helps on the fine-tuning task itself (a, the minimum of each curve dotted, τ* < 1 "
        f"for min-norm: overadaptation) and forgets less (b). {_agreement(data)} {_context(data)}"
    )


def _draw_bias_and_variance(data: xr.Dataset) -> Figure:
    figure, axes = canvas(3, sharey=True)
    texts = ("shift in the tail", "isotropic shift", "shift along the head")
    parts = (
        ("finetune", "total", R"total $R_\mathrm{ft}$", "o"),
        ("finetune_bias", "bias", "bias²", "s"),
        ("finetune_variance", "variance", "variance", "^"),
    )
    for axis, alignment, text in zip(axes, data.alignment.values, texts, strict=True):
        curve = data.sel(alignment=alignment)
        for name, part, label, marker in parts:
            _draw_curve(axis, curve, name, COLOURS[part], marker, label)
        _mark_lowest(axis, curve, COLOURS["total"])
        axis.set(xlabel=TAU_LABEL, title=Rf"{text}, $\alpha = {alignment:g}$")
    axes[0].set_ylabel(R"fine-tuning risk $R_\mathrm{ft}(\theta_\tau)$")
    axes[2].legend()
    return figure


def _caption_bias_and_variance(data: xr.Dataset) -> str:
    return (
        "Why averaging helps: as min-norm fine-tuning is mixed in, squared bias falls and then flattens or turns, while variance "
        "grows as τ²; the total has its minimum (dotted) before τ = 1. The less of the shift the data can reveal (left), the "
        f"sooner the bias turns. {_agreement(data)} Σ₁ = Σ₂ = diag(1/j), Ω ∝ Σ^α with tr ΩΣ = 1, σ² = 0.5, "
        f"R_pre(θ₁) = 0.02; n = {data.n}, p = {data.p}; seed {data.seed}."
    )


def _draw_trade_off(data: xr.Dataset) -> Figure:
    figure, (axis,) = canvas(1, width=COLUMN * 1.4, height=3.5)
    for name in ("early stopping", "ridge", "min-norm + ensemble", "ridge + ensemble", "self-distillation"):
        looks: dict[str, Any] = {"linestyle": "-."} if name == "self-distillation" else {}
        axis.plot(*data[name.replace(" ", "_")], color=COLOURS[name], label=name, **looks)
    label = R"oracle filter for $R_\mathrm{ft} + \kappa R_\mathrm{pre}$"
    axis.plot(*data.oracle_frontier, color=COLOURS["oracle"], linestyle="--", label=label)
    for name, offset, side in (("pretrained", (6, 2), "left"), ("fine-tuned", (-5, 4), "right")):
        axis.plot(*data[name], "o", color=COLOURS[name])
        axis.annotate(name, tuple(data[name].values), offset, textcoords="offset points", ha=side, fontsize=7)
    axis.set(xlabel=FORGETTING, ylabel=TASK)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    return figure


def _caption_trade_off(data: xr.Dataset) -> str:
    lowest = {name: float(data[name].sel(risk="finetune").min()) for name in ("ridge", "self-distillation")}
    gain = 1 - lowest["self-distillation"] / lowest["ridge"]
    return (
        "General against fine-tuning performance (lower left is better): every point of a curve is one τ, λ or stopping time. "
        "Min-norm + ensemble runs from the pretrained to the fine-tuned weights. Ridge + ensemble is drawn at the λ that is "
        "best with its τ, self-distillation at every λ with the mix of labels and own answers of least R_ft: its least R_ft is "
        f"{gain:.2%} below that of ridge. Dashed: no spectral method can be below this curve on average. "
        f"Exact risks averaged over {data.designs} designs. {_context(data)}"
    )


def _draw_penalty_and_tau(data: xr.Dataset) -> Figure:
    figure, (axis,) = canvas(1, width=COLUMN * 1.2, height=2.8)
    risk = data.risk.values
    levels = MaxNLocator(24).tick_values(risk.min(), min(risk.max(), 1.3))
    filled = axis.contourf(data.penalty, data.tau, risk, levels=levels, cmap="cividis", extend="max")
    axis.plot(data.best_hyperparameter, data.best_tau, "*", color="white", markeredgecolor="black", markersize=10)
    axis.plot(data.penalty, data.optimal_tau, color="white", linestyle="--", linewidth=1.2)
    axis.axhline(1, color="white", linewidth=0.8)
    axis.set(xscale="log", xlabel=R"penalty $\lambda$", ylabel=TAU_LABEL, ylim=(data.tau[0], data.tau[-1]))
    figure.colorbar(filled, ax=axis, label=TASK, format="%.2f")
    return figure


def _caption_penalty_and_tau(data: xr.Dataset) -> str:
    return (
        f"Penalty and ensemble together. Star: the minimum, λ = {data.best_hyperparameter:.3g}, τ = {data.best_tau:.2f}, "
        f"R_ft = {data.best_risk:.3f} (ridge alone {data.ridge_risk:.3f}, oracle {data.oracle_risk:.3f}). "
        "Dashed: the best τ for each λ; solid: τ = 1, ridge without averaging. "
        f"Exact risk averaged over {data.designs} designs. {_context(data)}"
    )


def _draw_training_time(data: xr.Dataset) -> Figure:
    _, axes = canvas(2)
    colour, averaged = COLOURS["fine-tuned"], R"ensemble at the best $\tau$ for $R_\mathrm{ft}$"
    for axis, name, domain in zip(axes, ("finetune", "pretrain"), ("ft", "pre"), strict=True):
        axis.plot(data.time, data[name], color=colour, label=R"fine-tuned ($\tau = 1$)")
        axis.plot(data.time, data[f"{name}_ensemble"], color=COLOURS["ensemble"], label=averaged)
        bars(axis, data, f"{name}_simulated", f"{name}_error_simulated", color=colour)
        axis.set(xscale="log", xlabel=R"fine-tuning time $t$ (gradient flow)")
        axis.set_ylabel(Rf"excess risk $R_\mathrm{{{domain}}}$")
    axes[0].axhline(data.oracle, color=COLOURS["oracle"], linestyle="--", linewidth=1, label="oracle filter")
    axes[0].legend()
    return panel_letters(axes)


def _caption_training_time(data: xr.Dataset) -> str:
    return (
        "Fine-tuning for too long: past its best time the fine-tuned model gets worse on its own task (a) and forgets more (b); "
        "averaging, at the τ that is best for R_ft at that time, undoes most of both (early on that τ exceeds 1, and so does the "
        f"forgetting). {_agreement(data, f'exact risk averaged over {data.designs} other designs')} {_context(data)}"
    )


PHASE_METHODS = ("min-norm + ensemble", "ridge", "early stopping")


def _draw_phase_diagram(data: xr.Dataset) -> Figure:
    risk, variance = data.risk, data.noise_std**2
    winner = risk.sel(estimator=list(PHASE_METHODS)).argmin("estimator")
    regularised = risk.sel(estimator=["ridge", "early stopping"]).min("estimator")
    ensembles = (risk.sel(estimator=f"{name} + ensemble") for name in ("min-norm", "ridge"))
    margin, both = (100 * (regularised / ensemble - 1) for ensemble in ensembles)
    worst, most = min(float(np.floor(np.percentile(margin, 10))), -1.0), max(float(np.ceil(margin.max())), 1.0)
    figure, axes = canvas(3, height=3.2, sharey=True)

    def draw_map(axis: Axes, values: xr.DataArray, norm: Normalize, cmap: Any, label: str, **bar: Any) -> Colorbar:
        looks: dict[str, Any] = {"norm": norm, "cmap": cmap, "shading": "nearest", "rasterized": True}
        mesh = axis.pcolormesh(data.alignment, variance, values.T, **looks)
        return figure.colorbar(mesh, ax=axis, location="bottom", label=label, **bar)

    colours = ListedColormap([COLOURS[name] for name in PHASE_METHODS])
    bar = draw_map(axes[0], winner, Normalize(-0.5, len(PHASE_METHODS) - 0.5), colours, "best of these three")
    bar.set_ticks(range(len(PHASE_METHODS)), labels=["min-norm\n+ ensemble", "ridge", "early\nstopping"])
    text, ticks = "ensembled min-norm against\nthe best regularization [%]", [worst, worst / 2, 0, most / 2, most]
    bar = draw_map(axes[1], margin, TwoSlopeNorm(0, worst, most), "PuOr", text, extend="min")
    bar.set_ticks(ticks, labels=[f"{tick:+.0f}" if tick else "0" for tick in ticks])
    text = "what the ensemble adds\nto the best regularization [%]"
    draw_map(axes[2], both, Normalize(0, None), "cividis", text)
    tau = data.tau.sel(estimator="min-norm + ensemble")
    axes[0].contour(data.alignment, variance, tau.T, levels=[1], colors="black", linestyles="--", linewidths=1)
    axes[1].contour(data.alignment, variance, margin.T, levels=[0], colors="black", linewidths=1)
    text = "shift alignment $\\alpha$: $\\Omega \\propto \\Sigma^\\alpha$\n(−1 tail, 0 isotropic, +1 head)"
    for axis in axes:
        axis.set(yscale="log", xticks=[-1, -0.5, 0, 0.5, 1], xlabel=text)
    axes[0].set_ylabel(R"label noise $\sigma^2$ (signal $\mathrm{tr}\,\Omega\Sigma = 1$)")
    return panel_letters(axes)


def _caption_phase_diagram(data: xr.Dataset) -> str:
    return (
        "Which method wins where, each at its own optimum. (a) The best of ensembled min-norm, ridge and early stopping. "
        "(b) By how much ensembled min-norm is better (positive) or worse than the better of ridge and early stopping; "
        "black: equal. Averaging alone wins for shifts in the tail of the spectrum, regularization for noisy shifts along its "
        "head; below the dashed line in (a), where min-norm learns too little of a clean head shift, its best τ exceeds 1: "
        "it wins by extrapolating, not by averaging. "
        "(c) What ridge + ensemble gains over the better of ridge and early stopping. "
        f"Exact risk averaged over {data.designs} designs, Σ₁ = Σ₂ = diag(1/j), θ₁ = θ₁*, n = {data.n}, p = {data.p}; seed {data.seed}."
    )


def _draw_digits(data: xr.Dataset) -> Figure:
    figure, axes = canvas(3, 2, height=2.1, sharex=True)
    at_choice = data.pretrain.sel(tau=data.test_tau, method="nearest")
    tops = {"finetune": 1.15, "pretrain": 1.15 * float(max(at_choice.max(), data.pretrain.sel(filter="ridge").max()))}
    hollow: dict[str, Any] = {"fillstyle": "none", "markeredgewidth": 1.3, "linestyle": "none"}
    choices = (("test_tau", "o", 7, R"best $\tau$ on test"), ("loo_tau", "x", 5, R"leave-one-out $\tau$"))
    for column, level in enumerate(data.noise_std.values):
        for axis, (name, top) in zip(axes[column::3], tops.items(), strict=True):
            for filter in data["filter"].values:
                curve, colour = data.sel(noise_std=level, filter=filter), COLOURS[filter]
                error = curve[f"{name}_error"]
                band(axis, data.tau, curve[name], error, color=colour, alpha=0.25, label=filter)
                for choice, marker, size, label in choices:
                    height = np.interp(curve[choice], data.tau, curve[name])
                    named = label if filter == "min-norm" else None
                    axis.plot(curve[choice], height, marker, color=colour, markersize=size, label=named, **hollow)
            axis.set_ylim(0, top)
        axes[column].set_title(f"label noise {level:g}")
        axes[3 + column].set_xlabel(TAU_LABEL)
    axes[0].set_ylabel("fine-tuning test error")
    axes[3].set_ylabel("pretraining test error")
    axes[0].legend()
    return figure


def _caption_digits(data: xr.Dataset) -> str:
    return (
        "Handwritten digits, random Fourier features (p = 2048), ten one-hot outputs: pretrained on 700 upright images, "
        "fine-tuned on 150 images turned by 45°, Gaussian noise of the given standard deviation added to the fine-tuning labels. "
        "Squared error summed over classes on held-out images with clean labels; bands ± one standard error over "
        f"{data.splits} random splits, features and noise draws. Ridge has its λ from leave-one-out at τ = 1. Circle: the τ "
        "with the least test error; cross: the τ that leave-one-out chose from the fine-tuning data alone (both averaged over splits); its "
        f"test error exceeds the best by at most {float(data.loo_regret.max()):.4f} on average. Pretrained weights: error "
        f"{float(data.finetune.isel(tau=0).mean()):.2f} on the turned digits, {float(data.pretrain.isel(tau=0).mean()):.2f} on the "
        f"upright ones. Curves that leave the panel keep rising. Seed {data.seed}."
    )
