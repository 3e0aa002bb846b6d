"""Deterministic equivalents beside simulation: the risk of every filter without sampling a design (docs, D1–D5)."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import xarray as xr
from jax import Array

from figures.style import COLOURS, Picture, canvas, panel_letters
from linfit import (
    Filter,
    GradientDescent,
    GradientFlow,
    MinNorm,
    RandomShift,
    Ridge,
    TwoTaskProblem,
    aligned_problem,
    spectra,
)
from sims.equivalents import averaged_risk, convergence
from theory.equivalents import risk


class Setting(NamedTuple):
    """Sizes of a run; the quick one is for CI and first looks."""

    n: int
    p: int
    designs: int
    sizes: tuple[int, ...]
    numbers: int
    """Designs × n in the convergence study."""
    laws: tuple[str, ...]
    """Of the designs, keys of `linfit.design.LAWS`."""


FULL = Setting(
    n=250, p=1000, designs=12, sizes=(8, 16, 32, 64, 128), numbers=24_000, laws=("gaussian", "rademacher", "student")
)
QUICK = Setting(n=60, p=240, designs=12, sizes=(8, 16, 32), numbers=8_000, laws=("gaussian", "student"))

TAUS = np.array([0.3, 0.7, 1.0, 1.3])
SHADES = ("#009E73", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = {"gaussian": "o", "rademacher": "x", "student": "+"}
STEP_SIZE = 0.2


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the deterministic equivalents."""
    setting = QUICK if quick else FULL
    seed = int(jax.random.key_data(key).ravel()[-1])
    yield draw(jax.random.fold_in(key, 0), setting, seed)
    yield rate(jax.random.fold_in(key, 1), setting, seed)


def draw(key: Array, setting: Setting, seed: int) -> Picture:
    """Predicted risks of all filters as lines, through averages over Gaussian and other designs."""
    problem = aligned_problem(spectra.power_law(setting.p), alignment=-0.5, pretrain_risk=0.05)
    steps = np.unique(np.round(np.logspace(0, 4, 81)))
    shown_steps = np.unique(np.round(np.logspace(0, 4, 8)))
    families = {
        "ridge": (Ridge, np.logspace(-5, 1, 81), np.logspace(-5, 1, 7), R"penalty $\lambda$"),
        "gradient flow": (GradientFlow, np.logspace(0, 5, 81), np.logspace(0, 5, 8), R"time $t$"),
        "gradient descent": (_descent, steps, shown_steps, Rf"steps $k$, step size {STEP_SIZE}"),
    }
    figure, axes = canvas(3, 2, sharey="row")
    variables: dict[str, xr.DataArray] = {}
    gaps: dict[str, float] = dict.fromkeys(setting.laws, 0.0)
    error = 0.0
    for column, (family, (make, fine, coarse, label)) in enumerate(families.items()):
        name = family.replace(" ", "_")
        lines = risk(problem, setting.n, make(fine), TAUS[:, None])
        runs = {
            law: averaged_risk(key, problem, setting.n, make(coarse), coarse, TAUS, setting.designs, law)
            for law in setting.laws
        }
        for row, (domain, line) in enumerate(zip(("finetune", "pretrain"), lines, strict=True)):
            axis = axes[3 * row + column]
            total = xr.DataArray(line.total, {"tau": TAUS, name: fine}, ("tau", name))
            variables[f"{domain}_{name}_predicted"] = total
            for tau, colour in zip(TAUS, SHADES, strict=True):
                axis.plot(fine, total.sel(tau=tau), color=colour, label=Rf"$\tau = {tau:g}$")
                for law in setting.laws:
                    points = runs[law].sel(tau=tau)
                    axis.plot(coarse, points[domain], MARKERS[law], color=colour, markerfacecolor="none", markersize=4)
            axis.set(xscale="log", xlabel=label if row else None, title=None if row else family)
            for law, run in runs.items():
                gaps[law] = max(gaps[law], float(abs(run[f"{domain}_gap"]).max()))
                error = max(error, float((run[f"{domain}_error"] / run[domain]).max()))
                simulated = run[domain].rename(hyperparameter=f"{name}_simulated")
                variables[f"{domain}_{name}_{law}"] = simulated
                variables[f"{domain}_{name}_{law}_error"] = run[f"{domain}_error"].rename(
                    hyperparameter=f"{name}_simulated"
                )
    axes[0].set_ylabel(R"fine-tuning risk $R_\mathrm{ft}$")
    axes[3].set_ylabel(R"pretraining risk $R_\mathrm{pre}$")
    axes[0].legend(loc="upper right")
    for law in setting.laws:
        axes[5].plot([], [], MARKERS[law], color="black", markerfacecolor="none", markersize=4, label=f"{law} designs")
    axes[5].legend(handles=axes[5].lines[-len(setting.laws) :], loc="upper left")
    panel_letters(axes)
    worst = ", ".join(f"{law} {100 * gap:.2f}%" for law, gap in gaps.items())
    caption = (
        "Predicted without sampling (lines) and exact risk averaged over random designs (points; standard errors at most "
        f"{100 * error:.1f}% of the risk), for four ensemble coefficients; λ → 0 and t → ∞ are min-norm. Largest relative gap: {worst}. "
        f"Σ₁ = Σ₂ = diag(1/j), Ω ∝ Σ^(−1/2) with tr ΩΣ = 1, σ² = 0.5, R_pre(θ₁) = 0.05; n = {setting.n}, p = {setting.p}, "
        f"{setting.designs} designs per law; seed {seed}."
    )
    return Picture("equivalents", "Prediction without sampling", caption, figure, xr.Dataset(variables))


def _descent(steps: np.ndarray) -> Filter:
    return GradientDescent(STEP_SIZE, steps)


def growing_problem(n: int) -> TwoTaskProblem:
    """p = 4n and a spectrum of fixed shape, e^{−4j/p}: everything but the size stays the same."""
    p = 4 * n
    spectrum = spectra.exponential(p, 4 / p)
    return TwoTaskProblem(spectrum, spectrum, RandomShift(spectra.isotropic(p, 1 / p)), noise_std=0.5)


def rate(key: Array, setting: Setting, seed: int) -> Picture:
    """How fast the gap between prediction and average closes."""
    filters = {
        "min-norm": MinNorm(),
        "ridge": Ridge(0.03),
        "gradient flow": GradientFlow(40.0),
        "gradient descent": GradientDescent(STEP_SIZE, 100),
    }
    data = convergence(key, growing_problem, setting.sizes, filters, lambda n: max(8, setting.numbers // n))
    figure, axes = canvas(1, width=4.2, height=3.0)
    colours = (COLOURS["min-norm"], COLOURS["ridge"], COLOURS["early stopping"], COLOURS["ensemble"])
    for name, colour, marker in zip(filters, colours, "os^v", strict=True):
        row = data.sel(filter=name)
        label = f"{name}, slope {float(row.slope):.2f} ± {float(row.slope_error):.2f}"
        axes[0].errorbar(
            data.n, abs(row.gap), row.gap_error, fmt=f"{marker}-", color=colour, capsize=1.5, linewidth=0.9, label=label
        )
    guide = float(abs(data.gap).max()) * 1.8 * data.n.values[0] / data.n.values
    axes[0].plot(data.n, guide, color="black", linestyle=":", label=R"$\propto 1/n$")
    axes[0].set(xscale="log", yscale="log", xlabel=R"$n$, with $p = 4n$", ylabel="relative gap of the prediction")
    axes[0].set_xticks(data.n.values, [str(n) for n in data.n.values])
    axes[0].minorticks_off()
    axes[0].legend(loc="lower left")
    caption = (
        "The prediction misses the average of the exact fine-tuning risk by a multiple of 1/n. Bars: one standard error of the "
        f"average over {', '.join(str(count) for count in data.designs)} designs; slopes of least-squares lines, each point "
        f"weighted by its accuracy. Spectrum e^(−4j/p), isotropic shift of size 1, σ² = 0.25; seed {seed}."
    )
    return Picture("equivalents_rate", "The error of the prediction falls like 1/n", caption, figure, data)
