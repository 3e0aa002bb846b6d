"""Deterministic equivalents beside simulation: the risk of every filter without sampling a design (docs, D1–D5)."""

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace as Setting
from typing import Any

import jax
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.figure import Figure

from figures.style import COLOURS, TASK, Picture, bars, canvas, panel_letters, seed_of
from linfit import GradientDescent, GradientFlow, MinNorm, RandomShift, Ridge, TwoTaskProblem, aligned_problem, spectra
from linfit.filters import Filter
from sims.equivalents import averaged_risk, convergence
from theory.equivalents import risk

__all__ = ["pictures"]

DESIGNS, LAWS = 12, ("gaussian", "rademacher", "student")
FULL = Setting(n=250, p=1000, sizes=(8, 16, 32, 64, 128), numbers=24_000, laws=LAWS)
QUICK = Setting(n=60, p=240, sizes=(8, 16, 32), numbers=8_000, laws=("gaussian", "student"))
"""Of the convergence study `sizes` are the n and `numbers` is designs × n; laws are those of `linfit.design.LAWS`."""

TAUS = np.array([0.3, 0.7, 1.0, 1.3])
SHADES = ("#009E73", "#0072B2", "#D55E00", "#CC79A7")
LAW_MARKERS = {"gaussian": "o", "rademacher": "x", "student": "+"}
STEP_SIZE = 0.2
FAMILIES = {
    "ridge": R"penalty $\lambda$",
    "gradient flow": R"time $t$",
    "gradient descent": Rf"steps $k$, step size {STEP_SIZE}",
}
"""Of filters, with what each is drawn against."""


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """All figures of the deterministic equivalents."""
    setting = QUICK if quick else FULL
    data = _predicted_and_averaged(jax.random.fold_in(key, 0), setting).assign_attrs(seed=seed_of(key))
    yield Picture("equivalents", "Prediction without sampling", data, _draw_equivalents, _caption_equivalents)
    filters = {
        "min-norm": MinNorm(),
        "ridge": Ridge(0.03),
        "gradient flow": GradientFlow(40.0),
        "gradient descent": GradientDescent(STEP_SIZE, 100),
    }
    rate_key, sizes = jax.random.fold_in(key, 1), setting.sizes
    data = convergence(rate_key, _growing_problem, sizes, filters, lambda n: max(8, setting.numbers // n))
    data, title = data.assign_attrs(seed=seed_of(key)), "The error of the prediction falls like 1/n"
    yield Picture("equivalents_rate", title, data, _draw_rate, _caption_rate)


def _growing_problem(n: int) -> TwoTaskProblem:
    """p = 4n and a spectrum of fixed shape, e^{−4j/p}: everything but the size stays the same."""
    p = 4 * n
    spectrum = spectra.exponential(p, 4 / p)
    return TwoTaskProblem(spectrum, spectrum, RandomShift(spectra.isotropic(p, 1 / p)), noise_std=0.5)


def _predicted_and_averaged(key: Array, setting: Setting) -> xr.Dataset:
    """Risks of each family: predicted on a fine grid, averaged over designs of each law on a coarse one."""
    problem = aligned_problem(spectra.power_law(setting.p), alignment=-0.5, noise_std=0.5**0.5, pretrain_risk=0.05)

    many, few = (np.unique(np.round(np.logspace(0, 4, count))) for count in (81, 8))
    families: dict[str, tuple[Callable[[np.ndarray], Filter], np.ndarray, np.ndarray]] = {
        "ridge": (Ridge, np.logspace(-5, 1, 81), np.logspace(-5, 1, 7)),
        "gradient_flow": (GradientFlow, np.logspace(0, 5, 81), np.logspace(0, 5, 8)),
        "gradient_descent": (lambda steps: GradientDescent(STEP_SIZE, steps), many, few),
    }

    variables: dict[str, xr.DataArray] = {}
    for name, (make, fine, coarse) in families.items():
        predicted = risk(problem, setting.n, make(fine), TAUS[:, None])
        for domain, line in predicted._asdict().items():
            total = xr.DataArray(line.total, {"tau": TAUS, name: fine}, ("tau", name))
            variables[f"{domain}_{name}_predicted"] = total
        for law in setting.laws:
            points = averaged_risk(key, problem, setting.n, make(coarse), coarse, TAUS, DESIGNS, law)
            points = points.rename(hyperparameter=f"{name}_simulated")
            for domain, ending in itertools.product(predicted._fields, ("", "_error", "_gap")):
                variables[f"{domain}_{name}_{law}{ending}"] = points[f"{domain}{ending}"]
    attributes = {"n": setting.n, "p": setting.p, "designs": DESIGNS, "laws": " ".join(setting.laws)}
    return xr.Dataset(variables, attrs=attributes)


def _draw_equivalents(data: xr.Dataset) -> Figure:
    _, axes = canvas(3, 2, sharey="row")
    laws: list[str] = data.laws.split()
    hollow: dict[str, Any] = {"fillstyle": "none", "markersize": 4}
    panels = itertools.product(("finetune", "pretrain"), FAMILIES.items())
    for axis, (domain, (family, label)) in zip(axes, panels, strict=True):
        name = family.replace(" ", "_")
        for tau, colour in zip(data.tau.values, SHADES, strict=True):
            line = data[f"{domain}_{name}_predicted"].sel(tau=tau)
            axis.plot(line[name], line, color=colour, label=Rf"$\tau = {tau:g}$")
            for law in laws:
                points = data[f"{domain}_{name}_{law}"].sel(tau=tau)
                axis.plot(points[f"{name}_simulated"], points, LAW_MARKERS[law], color=colour, **hollow)
        axis.set(xscale="log", **{"title": family} if domain == "finetune" else {"xlabel": label})
    axes[0].set_ylabel(TASK)
    axes[3].set_ylabel(R"pretraining risk $R_\mathrm{pre}$")
    axes[0].legend(loc="upper right")
    looks = {f"{law} designs": LAW_MARKERS[law] for law in laws}
    handles = [axes[5].plot([], [], mark, color="black", label=text, **hollow)[0] for text, mark in looks.items()]
    axes[5].legend(handles=handles, loc="upper left")
    return panel_letters(axes)


def _caption_equivalents(data: xr.Dataset) -> str:
    gaps, error = {}, 0.0
    for law in data.laws.split():
        names = [str(name) for name in data if str(name).endswith(f"_{law}")]
        gaps[law] = max(float(abs(data[f"{name}_gap"]).max()) for name in names)
        error = max(error, *(float((data[f"{name}_error"] / data[name]).max()) for name in names))
    worst = ", ".join(f"{law} {100 * gap:.2f}%" for law, gap in gaps.items())
    return (
        "Predicted without sampling (lines) and exact risk averaged over random designs (points; standard errors at most "
        f"{100 * error:.1f}% of the risk), for four ensemble coefficients; λ → 0 and t → ∞ are min-norm. Largest relative gap: {worst}. "
        f"Σ₁ = Σ₂ = diag(1/j), Ω ∝ Σ^(−1/2) with tr ΩΣ = 1, σ² = 0.5, R_pre(θ₁) = 0.05; n = {data.n}, p = {data.p}, "
        f"{data.designs} designs per law; seed {data.seed}."
    )


def _draw_rate(data: xr.Dataset) -> Figure:
    figure, (axis,) = canvas(1, width=4.2, height=3.0)
    colours = (COLOURS["min-norm"], COLOURS["ridge"], COLOURS["early stopping"], COLOURS["ensemble"])
    for name, colour, marker in zip(data["filter"].values, colours, "os^v", strict=True):
        row = data.sel(filter=name)
        label = f"{name}, slope {float(row.slope):.2f} ± {float(row.slope_error):.2f}"
        sized = row.assign(gap=abs(row.gap))
        bars(axis, sized, "gap", fmt=f"{marker}-", color=colour, linewidth=0.9, label=label)
    guide = float(abs(data.gap).max()) * 1.8 * data.n.values[0] / data.n.values
    axis.plot(data.n, guide, color="black", linestyle=":", label=R"$\propto 1/n$")
    axis.set(xscale="log", yscale="log", xlabel=R"$n$, with $p = 4n$", ylabel="relative gap of the prediction")
    axis.set_xticks(data.n.values, [str(n) for n in data.n.values])
    axis.minorticks_off()
    axis.legend(loc="lower left")
    return figure


def _caption_rate(data: xr.Dataset) -> str:
    return (
        "The prediction misses the average of the exact fine-tuning risk by a multiple of 1/n. Bars: one standard error of the "
        f"average over {', '.join(str(count) for count in data.designs)} designs; slopes of least-squares lines, each point "
        f"weighted by its accuracy. Spectrum e^(−4j/p), isotropic shift of size 1, σ² = 0.25; seed {data.seed}."
    )
