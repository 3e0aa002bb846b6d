"""The figures of the overadaptation paper (2506.01901) in its linear setting, theory beside simulation."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from figures.style import COLOURS, COLUMN, MARKERS, Picture, canvas, panel_letters
from linfit import (
    GradientFlow,
    MinNorm,
    Pair,
    Ridge,
    RiskForm,
    TwoTaskProblem,
    aligned_problem,
    risk_forms,
    sample_designs,
    spectra,
)
from sims.overadaptation import monte_carlo, phase_diagram
from sims.real_data import digits_along_tau
from theory.overadaptation import Optimum, best_of_each_method, combined


class Setting(NamedTuple):
    """Sizes of a run; the quick one is for CI and first looks."""

    n: int
    p: int
    replicates: int
    designs: int
    phase_points: int
    splits: int

    def __str__(self) -> str:
        return f"n = {self.n}, p = {self.p}"


FULL = Setting(n=200, p=2000, replicates=256, designs=8, phase_points=33, splits=12)
QUICK = Setting(n=60, p=600, replicates=64, designs=3, phase_points=9, splits=2)

ALIGNMENT, NOISE_VARIANCE, PRETRAIN_RISK = -0.5, 0.5, 0.02
PROBLEM_TEXT = (
    "Σ₁ = Σ₂ = diag(1/j), shift covariance Ω ∝ Σ^(−1/2) with tr ΩΣ = 1, label noise σ² = 0.5, "
    "pretrained weights with R_pre(θ₁) = 0.02"
)


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the paper, one after the other."""
    setting = QUICK if quick else FULL
    seed = int(jax.random.key_data(key).ravel()[-1])
    keys = jax.random.split(key, 5)
    problem = aligned_problem(
        spectra.power_law(setting.p), alignment=ALIGNMENT, noise_std=NOISE_VARIANCE**0.5, pretrain_risk=PRETRAIN_RISK
    )
    stack = sample_designs(keys[0], problem.finetune_covariance, setting.n, setting.designs)
    forms = risk_forms(stack, problem)
    best = jax.device_get(best_of_each_method(forms.finetune))
    measured = measure_along_tau(keys[1], problem, setting, best)
    context = f"{PROBLEM_TEXT}; {setting}; seed {seed}."
    yield risk_along_tau(measured, context)
    yield bias_and_variance(keys[4], setting, seed)
    yield trade_off(forms, best, context)
    yield surface(forms.finetune, best, context)
    yield training_time(keys[1], forms, problem, setting, context)
    yield phases(keys[2], setting, seed)
    yield digits(keys[3], setting, seed)


def measure_along_tau(key: Array, problem: TwoTaskProblem, setting: Setting, best: dict[str, Optimum]) -> xr.Dataset:
    filters = {
        "min-norm": MinNorm(),
        "ridge": Ridge(best["ridge"].hyperparameter),
        "early stopping": GradientFlow(best["early stopping"].hyperparameter),
    }
    return monte_carlo(key, problem, setting.n, filters, jnp.linspace(0, 1.2, 61), setting.replicates)


def agreement(data: xr.Dataset, lines: str = "exact risk of the same designs") -> str:
    """The largest gap between simulated and exact risk of the same designs, as a sentence; what the lines are."""
    gaps = {name: float(abs(data[name]).max()) for name in data if str(name).endswith("_z")}
    points = sum(data[name].size for name in gaps)
    return (
        f"Points: mean of {data.replicates} simulated fine-tunings, bars ± one standard error; lines: {lines}. "
        f"Largest gap between simulated and exact risk of the same designs {max(gaps.values()):.1f} standard errors of their "
        f"difference, over {points} values."
    )


def risk_along_tau(data: xr.Dataset, context: str) -> Picture:
    """(a) R_ft and R_pre against τ."""
    figure, axes = canvas(2)
    for axis, name, label in zip(
        axes, ("finetune", "pretrain"), (R"$R_\mathrm{ft}(\theta_\tau)$", R"$R_\mathrm{pre}(\theta_\tau)$"), strict=True
    ):
        for filter in data["filter"].values:
            curve = data.sel(filter=filter)
            axis.plot(data.tau, curve[f"{name}_exact"], color=COLOURS[filter], label=filter)
            shown = curve.isel(tau=slice(0, None, 5))
            axis.errorbar(
                shown.tau, shown[name], shown[f"{name}_error"], color=COLOURS[filter], fmt=MARKERS[filter], capsize=1.5
            )
            if name == "finetune":
                lowest = float(curve.tau[np.argmin(curve.finetune_exact.values)])
                axis.axvline(lowest, color=COLOURS[filter], linewidth=0.8, linestyle=":")
        axis.set_xlabel(R"ensemble coefficient $\tau$   (0 pretrained, 1 fine-tuned)")
        axis.set_ylabel(f"excess risk {label}")
    axes[0].legend(title="fine-tuned by", title_fontsize=7)
    panel_letters(axes)
    caption = (
        "Averaging with the pretrained weights helps on the fine-tuning task itself (a, the minimum of each curve dotted, τ* < 1 "
        f"for min-norm: overadaptation) and forgets less (b). {agreement(data)} {context}"
    )
    return Picture("risk_along_tau", "Both risks along the ensemble", caption, figure, data)


def bias_and_variance(key: Array, setting: Setting, seed: int) -> Picture:
    """(b) bias², variance and total against τ, for min-norm and three alignments of the shift."""
    alignments = {-0.5: "shift in the tail", 0.0: "isotropic shift", 0.5: "shift along the head"}
    runs = []
    for alignment in alignments:
        problem = aligned_problem(
            spectra.power_law(setting.p),
            alignment=alignment,
            noise_std=NOISE_VARIANCE**0.5,
            pretrain_risk=PRETRAIN_RISK,
        )
        runs.append(
            monte_carlo(
                key, problem, setting.n, {"min-norm": MinNorm()}, jnp.linspace(0, 1.2, 61), setting.replicates // 2
            )
        )
    data = xr.concat(runs, xr.Variable("alignment", list(alignments)), combine_attrs="override").isel(
        filter=0, drop=True
    )
    figure, axes = canvas(3, sharey=True)
    for axis, (alignment, text) in zip(axes, alignments.items(), strict=True):
        curve = data.sel(alignment=alignment)
        for name, part, label, marker in (
            ("finetune", "total", R"total $R_\mathrm{ft}$", "o"),
            ("finetune_bias", "bias", "bias²", "s"),
            ("finetune_variance", "variance", "variance", "^"),
        ):
            axis.plot(curve.tau, curve[f"{name}_exact"], color=COLOURS[part], label=label)
            shown = curve.isel(tau=slice(0, None, 5))
            axis.errorbar(shown.tau, shown[name], shown[f"{name}_error"], color=COLOURS[part], fmt=marker, capsize=1.5)
        best = float(curve.tau[np.argmin(curve.finetune_exact.values)])
        axis.axvline(best, color=COLOURS["total"], linewidth=0.8, linestyle=":")
        axis.set_xlabel(R"ensemble coefficient $\tau$")
        axis.set_title(Rf"{text}, $\alpha = {alignment:g}$")
    axes[0].set_ylabel(R"fine-tuning risk $R_\mathrm{ft}(\theta_\tau)$")
    axes[2].legend()
    caption = (
        "Why averaging helps: as min-norm fine-tuning is mixed in, squared bias falls and then flattens or turns, while variance "
        "grows as τ²; the total has its minimum (dotted) before τ = 1. The less of the shift the data can reveal (left), the "
        f"sooner the bias turns. {agreement(data)} Σ₁ = Σ₂ = diag(1/j), Ω ∝ Σ^α with tr ΩΣ = 1, σ² = {NOISE_VARIANCE}, "
        f"R_pre(θ₁) = {PRETRAIN_RISK}; {setting}; seed {seed}."
    )
    return Picture("bias_and_variance", "Bias and variance along the ensemble", caption, figure, data)


def averaged(form: RiskForm, filter: object, tau: object = 1.0) -> Array:
    """Total risk averaged over the designs of a stacked form."""
    return form(filter, tau).total.mean(axis=0)  # type: ignore[arg-type]


def oracle_frontier(forms: Pair, weights: Array) -> tuple[Array, Array]:
    """(R_pre, R_ft) of the spectral filter that minimises R_ft + κR_pre, averaged over designs, for each κ."""
    filters = [combined(forms, weight).oracle_filter() for weight in weights]
    pretrain, finetune = (jnp.stack([averaged(form, filter) for filter in filters]) for form in forms[::-1])
    return pretrain, finetune


def trade_off(forms: Pair, best: dict[str, Optimum], context: str) -> Picture:
    """(c) the plane R_pre × R_ft, a curve for each method."""
    tau = jnp.linspace(0, 1, 61)
    penalties, times = jnp.logspace(-6, 3, 91), jnp.logspace(-3, 6, 91)
    best_ridge = Ridge(best["ridge + ensemble"].hyperparameter)
    paths = {
        "early stopping": (GradientFlow(times), 1.0),
        "ridge": (Ridge(penalties), 1.0),
        "min-norm + ensemble": (MinNorm(), tau),
        "ridge + ensemble": (best_ridge, jnp.linspace(0, float(best["ridge + ensemble"].tau) * 1.15, 61)),
    }
    figure, axes = canvas(1, width=COLUMN * 1.3, height=3.0)
    variables = {}
    for name, (filter, coefficient) in paths.items():
        points = [averaged(form, filter, coefficient) for form in (forms.pretrain, forms.finetune)]
        axes[0].plot(*points, color=COLOURS[name], label=name)
        variables[name.replace(" ", "_")] = (("risk", f"{name}_point"), np.stack(points))
    frontier = oracle_frontier(forms, jnp.concatenate([jnp.zeros(1), jnp.logspace(-3, 3, 60)]))
    axes[0].plot(
        *frontier,
        color=COLOURS["oracle"],
        linestyle="--",
        label=R"oracle filter for $R_\mathrm{ft} + \kappa R_\mathrm{pre}$",
    )
    variables["oracle_frontier"] = (("risk", "kappa_point"), np.stack(frontier))
    ends = {"pretrained": MinNorm() * 0.0, "fine-tuned": MinNorm()}
    for name, end in ends.items():
        point = (float(averaged(forms.pretrain, end)), float(averaged(forms.finetune, end)))
        axes[0].plot(*point, "o", color=COLOURS[name])
        inwards = {"pretrained": ((6, 2), "left"), "fine-tuned": ((-5, 4), "right")}[name]
        axes[0].annotate(name, point, inwards[0], textcoords="offset points", ha=inwards[1], fontsize=7)
    axes[0].set_xlabel(R"forgetting: pretraining risk $R_\mathrm{pre}$")
    axes[0].set_ylabel(R"fine-tuning risk $R_\mathrm{ft}$")
    axes[0].legend(loc="upper right")
    caption = (
        "General against fine-tuning performance (lower left is better): every point of a curve is one τ, λ or stopping time. "
        "Min-norm + ensemble runs from the pretrained to the fine-tuned weights. Ridge + ensemble is drawn at the λ that is "
        "best with its τ. Dashed: no spectral method can be below this curve on average. "
        f"Exact risks averaged over {forms.finetune.constant.size} designs. {context}"
    )
    data = xr.Dataset(variables, {"risk": ["pretrain", "finetune"]})
    return Picture("trade_off", "The trade-off plane", caption, figure, data)


def surface(form: RiskForm, best: dict[str, Optimum], context: str) -> Picture:
    """(d) R_ft over λ × τ with its minimum."""
    penalties, tau = np.logspace(-4, 1, 81), np.linspace(0, 1.6, 81)
    risk = np.asarray(averaged(form, Ridge(penalties), jnp.asarray(tau)[:, None]))
    optimum = best["ridge + ensemble"]
    figure, axes = canvas(1, width=COLUMN * 1.2, height=2.8)
    levels = MaxNLocator(24).tick_values(risk.min(), min(risk.max(), 1.3))
    filled = axes[0].contourf(penalties, tau, risk, levels=levels, cmap="cividis", extend="max")
    axes[0].plot(optimum.hyperparameter, optimum.tau, "*", color="white", markeredgecolor="black", markersize=10)
    parabola = form.along(Ridge(penalties)).mean()
    axes[0].plot(penalties, parabola.optimal_tau, color="white", linestyle="--", linewidth=1.2)
    axes[0].axhline(1, color="white", linewidth=0.8)
    axes[0].set(
        xscale="log", xlabel=R"penalty $\lambda$", ylabel=R"ensemble coefficient $\tau$", ylim=(tau[0], tau[-1])
    )
    figure.colorbar(filled, ax=axes[0], label=R"fine-tuning risk $R_\mathrm{ft}$", format="%.2f")
    caption = (
        f"Penalty and ensemble together. Star: the minimum, λ = {float(optimum.hyperparameter):.3g}, τ = {float(optimum.tau):.2f}, "
        f"R_ft = {float(optimum.risk):.3f} (ridge alone {float(best['ridge'].risk):.3f}, oracle {float(best['oracle'].risk):.3f}). "
        "Dashed: the best τ for each λ; solid: τ = 1, ridge without averaging. "
        f"Exact risk averaged over {form.constant.size} designs. {context}"
    )
    data = xr.Dataset({"risk": (("tau", "penalty"), risk)}, {"tau": tau, "penalty": penalties})
    return Picture("penalty_and_tau", "Penalty × ensemble", caption, figure, data)


def training_time(key: Array, forms: Pair, problem: TwoTaskProblem, setting: Setting, context: str) -> Picture:
    """(e) risk against fine-tuning time, with and without ensembling."""
    times, shown = np.logspace(-1, 4, 101), np.logspace(-1, 4, 11)
    flow = GradientFlow(times)
    parabola = forms.finetune.along(flow).mean()
    tau = parabola.optimal_tau
    at_best_tau = np.asarray(averaged(forms.pretrain, flow, tau))
    curves = {
        "finetune": np.asarray(averaged(forms.finetune, flow)),
        "finetune_ensemble": np.asarray(parabola.optimal_risk),
        "pretrain": np.asarray(averaged(forms.pretrain, flow)),
        "pretrain_ensemble": at_best_tau,
    }
    measured = monte_carlo(
        key, problem, setting.n, {"flow": GradientFlow(shown)}, jnp.ones(1), setting.replicates, names=shown
    )
    figure, axes = canvas(2)
    for axis, name, label in zip(
        axes, ("finetune", "pretrain"), (R"$R_\mathrm{ft}$", R"$R_\mathrm{pre}$"), strict=True
    ):
        axis.plot(times, curves[name], color=COLOURS["fine-tuned"], label=R"fine-tuned ($\tau = 1$)")
        axis.plot(
            times,
            curves[f"{name}_ensemble"],
            color=COLOURS["ensemble"],
            label=R"ensemble at the best $\tau$ for $R_\mathrm{ft}$",
        )
        point = measured.isel(tau=0)
        axis.errorbar(shown, point[name], point[f"{name}_error"], color=COLOURS["fine-tuned"], fmt="o", capsize=1.5)
        axis.set(xscale="log", xlabel=R"fine-tuning time $t$ (gradient flow)", ylabel=f"excess risk {label}")
    axes[0].axhline(
        float(best_oracle(forms)), color=COLOURS["oracle"], linestyle="--", linewidth=1, label="oracle filter"
    )
    axes[0].legend()
    panel_letters(axes)
    caption = (
        "Fine-tuning for too long: past its best time the fine-tuned model gets worse on its own task (a) and forgets more (b); "
        f"averaging, at the τ that is best for R_ft at that time, undoes most of both (early on that τ exceeds 1, and so does the forgetting). "
        f"{agreement(measured, f'exact risk averaged over {setting.designs} other designs')} {context}"
    )
    data = xr.Dataset(
        {name: ("time", values) for name, values in curves.items()} | {"best_tau": ("time", tau)}, {"time": times}
    )
    data = data.merge(
        measured.isel(tau=0, drop=True).rename(
            {"filter": "simulated_time"} | {name: f"{name}_simulated" for name in measured}
        )
    )
    return Picture("training_time", "Into the overfitting regime", caption, figure, data)


def best_oracle(forms: Pair) -> Array:
    """Oracle risk on the fine-tuning task, averaged over designs."""
    return forms.finetune.oracle_risk().mean()


PHASE_METHODS = ("min-norm + ensemble", "ridge", "early stopping")


def phases(key: Array, setting: Setting, seed: int) -> Picture:
    """(f) which method wins over alignment × noise, and by how much."""
    alignments = np.linspace(-1, 1, setting.phase_points)
    noise = np.logspace(-2, 1, setting.phase_points)
    data = phase_diagram(key, setting.n, setting.p, 1.0, alignments, noise, setting.designs // 2 + 1)
    risk = data.risk
    winner = risk.sel(estimator=list(PHASE_METHODS)).argmin("estimator")
    regularised = risk.sel(estimator=["ridge", "early stopping"]).min("estimator")
    margin = 100 * (regularised / risk.sel(estimator="min-norm + ensemble") - 1)
    both = 100 * (regularised / risk.sel(estimator="ridge + ensemble") - 1)
    figure, axes = canvas(3, height=3.2, sharey=True)
    colours = ListedColormap([COLOURS[name] for name in PHASE_METHODS])
    worst, most = min(float(np.floor(np.percentile(margin, 10))), -1.0), max(float(np.ceil(margin.max())), 1.0)
    maps: tuple[tuple[xr.DataArray, Normalize, str | ListedColormap, str], ...] = (
        (winner, Normalize(-0.5, len(PHASE_METHODS) - 0.5), colours, "best of these three"),
        (
            margin,
            TwoSlopeNorm(0, worst, most),
            "PuOr",
            "ensembled min-norm against\nthe best regularization [%]",
        ),
        (both, Normalize(0, None), "cividis", "what the ensemble adds\nto the best regularization [%]"),
    )
    for axis, (values, norm, cmap, label) in zip(axes, maps, strict=True):
        mesh = axis.pcolormesh(alignments, noise, values.T, norm=norm, cmap=cmap, shading="nearest", rasterized=True)
        extend = "min" if isinstance(norm, TwoSlopeNorm) else "neither"
        bar = figure.colorbar(mesh, ax=axis, location="bottom", extend=extend)
        bar.set_label(label)
        if extend == "min":
            ticks = [worst, worst / 2, 0, most / 2, most]
            bar.set_ticks(ticks, labels=[f"{tick:+.0f}" if tick else "0" for tick in ticks])
        if cmap is colours:
            bar.set_ticks(range(len(PHASE_METHODS)), labels=["min-norm\n+ ensemble", "ridge", "early\nstopping"])
    tau = data.tau.sel(estimator="min-norm + ensemble")
    axes[0].contour(alignments, noise, tau.T, levels=[1], colors="black", linestyles="--", linewidths=1)
    axes[1].contour(alignments, noise, margin.T, levels=[0], colors="black", linewidths=1)
    for axis in axes:
        axis.set(yscale="log", xticks=[-1, -0.5, 0, 0.5, 1])
        axis.set_xlabel(
            "shift alignment $\\alpha$: $\\Omega \\propto \\Sigma^\\alpha$\n(−1 tail, 0 isotropic, +1 head)"
        )
    axes[0].set_ylabel(R"label noise $\sigma^2$ (signal $\mathrm{tr}\,\Omega\Sigma = 1$)")
    panel_letters(axes)
    caption = (
        "Which method wins where, each at its own optimum. (a) The best of ensembled min-norm, ridge and early stopping. "
        "(b) By how much ensembled min-norm is better (positive) or worse than the better of ridge and early stopping; "
        "black: equal. Averaging alone wins for shifts in the tail of the spectrum, regularization for noisy shifts along its "
        "head; below the dashed line in (a), where min-norm learns too little of a clean head shift, its best τ exceeds 1: "
        "it wins by extrapolating, not by averaging. "
        "(c) What ridge + ensemble gains over the better of ridge and early stopping. "
        f"Exact risk averaged over {data.designs} designs, Σ₁ = Σ₂ = diag(1/j), θ₁ = θ₁*, {setting}; seed {seed}."
    )
    return Picture("phase_diagram", "When does ensembling beat regularization?", caption, figure, data)


def digits(key: Array, setting: Setting, seed: int) -> Picture:
    """(g) real data: both test errors along τ at three noise levels, the leave-one-out choice marked."""
    levels, tau = np.array([0.0, 0.2, 0.4]), np.linspace(0, 1.25, 51)
    data = digits_along_tau(key, levels, tau, setting.splits)
    figure, axes = canvas(3, 2, height=2.1, sharex=True)
    at_choice = data.pretrain.sel(tau=data.test_tau, method="nearest")
    tops = (1.15, 1.15 * float(max(at_choice.max(), data.pretrain.sel(filter="ridge").max())))
    for column, level in enumerate(levels):
        for row, name in enumerate(("finetune", "pretrain")):
            axis = axes[3 * row + column]
            for filter in data["filter"].values:
                curve = data.sel(noise_std=level, filter=filter)
                axis.plot(tau, curve[name], color=COLOURS[filter], label=filter)
                low, high = curve[name] - curve[f"{name}_error"], curve[name] + curve[f"{name}_error"]
                axis.fill_between(tau, low, high, color=COLOURS[filter], alpha=0.25, linewidth=0)
                for choice, marker, label in (
                    ("test_tau", "o", R"best $\tau$ on test"),
                    ("loo_tau", "x", R"leave-one-out $\tau$"),
                ):
                    chosen = float(curve[choice])
                    height = float(np.interp(chosen, tau, curve[name]))
                    axis.plot(
                        chosen,
                        height,
                        marker,
                        color=COLOURS[filter],
                        markersize=7 if marker == "o" else 5,
                        fillstyle="none",
                        markeredgewidth=1.3,
                        linestyle="none",
                        label=label if filter == "min-norm" else None,
                    )
            axis.set_ylim(0, tops[row])
        axes[column].set_title(f"label noise {level:g}")
        axes[3 + column].set_xlabel(R"ensemble coefficient $\tau$")
    axes[0].set_ylabel("fine-tuning test error")
    axes[3].set_ylabel("pretraining test error")
    axes[0].legend()
    regret = float(data.loo_regret.max())
    caption = (
        "Handwritten digits, random Fourier features (p = 2048), ten one-hot outputs: pretrained on 700 upright images, "
        "fine-tuned on 150 images turned by 45°, Gaussian noise of the given standard deviation added to the fine-tuning labels. "
        "Squared error summed over classes on held-out images with clean labels; bands ± one standard error over "
        f"{data.splits} random splits, features and noise draws. Ridge has its λ from leave-one-out at τ = 1. Circle: the τ "
        "with the least test error; cross: the τ that leave-one-out chose from the fine-tuning data alone (both averaged over splits); its "
        f"test error exceeds the best by at most {regret:.4f} on average. Pretrained weights: error "
        f"{float(data.finetune.isel(tau=0).mean()):.2f} on the turned digits, {float(data.pretrain.isel(tau=0).mean()):.2f} on the "
        f"upright ones. Curves that leave the panel keep rising. Seed {seed}."
    )
    return Picture("digits", "Real data: digits", caption, figure, data)
