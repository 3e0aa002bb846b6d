"""The page of the overadaptation paper: risks along the ensemble, the trade-off plane, the surface over λ and τ."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import (
    Choice,
    Line,
    Mark,
    Overlay,
    Page,
    Plot,
    Reading,
    Simulated,
    Slider,
    Suggestion,
    Surface,
)
from figures.style import COLOURS
from linfit import GradientFlow, MinNorm, RandomShift, Ridge, Risk, TwoTaskProblem, risk_forms, sample_design, spectra
from theory.equivalents import along

PENALTIES = np.logspace(-5, 2, 57)
TIMES = np.logspace(0.125, 4, 32)
"""Four decades: `along` shares its work within each."""
TAUS = np.linspace(0, 1.5, 76)
FINE_TUNERS = {"min-norm": (0, 0), "ridge": (0, 1), "early stopping": (1, 1)}
"""Family of each, ridge or gradient flow, and its column there."""


def problem_of(
    p: int, spectrum: str, decay: float, alignment: float, noise_variance: float, pretrain_risk: float
) -> TwoTaskProblem:
    """Σ₁ = Σ₂ = diag(s), largest s = 1; shift covariance Ω ∝ Σ^alignment with tr ΩΣ = 1; θ₁ of given R_pre."""
    if spectrum == "power law":
        s = np.asarray(spectra.power_law(p, decay))
    elif spectrum == "exponential":
        s = np.asarray(spectra.exponential(p, 10 * decay / p))
    elif spectrum == "two levels":
        s = np.asarray(spectra.bilevel(p, p // 100, head=1.0, tail=10.0**-decay))
    else:
        s = np.ones(p)
    spread = s**alignment
    error = (1 - 2.0 * (np.arange(p) % 2)) * np.sqrt(pretrain_risk / s.sum())
    return TwoTaskProblem(s, s, RandomShift(spread / (spread @ s)), noise_variance**0.5, error)


class Predicted(NamedTuple):
    """Of ridge, at λ = 0 (min-norm), `penalty` and along a path, and of gradient flow, twice at `time` and along a path."""

    taus: Array
    """0, 1, the τ of the slider, the best τ of the chosen fine-tuner, and `TAUS`."""
    risks: list[list[Risk]]
    """On both domains, one row for each of `taus`."""
    best_taus: list[Array]
    best_risks: list[Array]
    """On the fine-tuning domain, at the best τ."""


@jax.jit
def predicted(
    problem: TwoTaskProblem, n: Array, penalty: Array, time: Array, tau: Array, family: Array, column: Array
) -> Predicted:
    """Risks without sampling a design (docs, D1–D4); `family` and `column` as in `FINE_TUNERS`."""
    ridge = along(problem, n, Ridge(jnp.concatenate([jnp.stack([0.0, penalty]), PENALTIES])))
    flow = along(problem, n, GradientFlow(time))
    with jax.ensure_compile_time_eval():  # times that are known share their work
        path = along(problem, n, GradientFlow(TIMES))
    flow = jax.tree.map(lambda one, more: jnp.concatenate([jnp.stack([one, one]), more]), flow, path)
    families = ridge, flow
    best_taus = [forms.finetune.optimal_tau for forms in families]
    best_tau = jnp.stack([found[:2] for found in best_taus])[family, column]
    taus = jnp.concatenate([jnp.stack([0.0, 1.0, tau, best_tau]), TAUS])
    risks = [[form(taus[:, None]) for form in forms] for forms in families]
    return Predicted(taus, risks, best_taus, [forms.finetune.optimal_risk for forms in families])


def curves(
    *,
    fine_tuner: str,
    tau: float,
    penalty: float,
    time: float,
    p: int,
    n: int,
    spectrum: str,
    decay: float,
    alignment: float,
    noise_variance: float,
    pretrain_risk: float,
) -> dict[str, dict[str, np.ndarray]]:
    """Both risks of every filter, predicted without sampling a design (docs, D1–D4)."""
    problem = problem_of(p, spectrum, decay, alignment, noise_variance, pretrain_risk)
    family, chosen = FINE_TUNERS[fine_tuner]
    found: Any = jax.device_get(predicted(problem, n, penalty, time, tau, family, chosen))
    best_tau, parts = found.taus[3], found.risks[family][0]
    totals = [[risk.total for risk in risks] for risks in found.risks]
    (ridge_finetune, ridge_pretrain), (flow_finetune, flow_pretrain) = totals
    finetune, pretrain = totals[family]
    ridge_best, flow_best = found.best_risks
    best, best_pair = int(np.argmin(ridge_finetune[1, 2:])), int(np.argmin(ridge_best[2:]))
    return {
        "tau": {
            "tau": TAUS,
            "finetune": finetune[4:, chosen],
            "bias": parts.bias[4:, chosen],
            "variance": parts.variance[4:, chosen],
            "pretrain": pretrain[4:, chosen],
        },
        "average": {  # τ from 0 to 1
            "tau": TAUS[TAUS <= 1],
            "min_norm_finetune": ridge_finetune[4:, 0][TAUS <= 1],
            "min_norm_pretrain": ridge_pretrain[4:, 0][TAUS <= 1],
            "ridge_finetune": ridge_finetune[4:, 1][TAUS <= 1],
            "ridge_pretrain": ridge_pretrain[4:, 1][TAUS <= 1],
        },
        "penalty": {
            "penalty": PENALTIES,
            "finetune": ridge_finetune[1, 2:],
            "pretrain": ridge_pretrain[1, 2:],
            "finetune_at_best_tau": ridge_best[2:],
        },
        "time": {
            "time": TIMES,
            "finetune": flow_finetune[1, 2:],
            "pretrain": flow_pretrain[1, 2:],
            "finetune_at_best_tau": flow_best[2:],
        },
        "surface": {
            "penalty": np.tile(PENALTIES, TAUS.size),
            "tau": np.repeat(TAUS, PENALTIES.size),
            "finetune": ridge_finetune[4:, 2:].ravel(),
        },
        "now": {
            "tau": np.array([tau]),
            "penalty": np.array([penalty]),
            "time": np.array([time]),
            "finetune": finetune[[2], chosen],
            "pretrain": pretrain[[2], chosen],
        },
        "best": {
            "tau": np.array([best_tau]),
            "finetune": finetune[[3], chosen],
            "pretrain": pretrain[[3], chosen],
            "penalty": PENALTIES[[best]],
            "penalty_finetune": ridge_finetune[[1], 2 + best],
            "pair_penalty": PENALTIES[[best_pair]],
            "pair_tau": found.best_taus[0][[2 + best_pair]],
            "pair_finetune": ridge_best[[2 + best_pair]],
        },
        "ends": {
            "pretrained_finetune": finetune[[0], chosen],
            "pretrained_pretrain": pretrain[[0], chosen],
            "tuned_finetune": finetune[[1], chosen],
            "tuned_pretrain": pretrain[[1], chosen],
        },
    }


def design(
    index: int,
    *,
    fine_tuner: str,
    tau: float,
    penalty: float,
    time: float,
    p: int,
    n: int,
    spectrum: str,
    decay: float,
    alignment: float,
    noise_variance: float,
    pretrain_risk: float,
) -> dict[str, np.ndarray]:
    """Exact risk (docs, S2) along τ, and of the oracle filter (S4), on one Gaussian design X drawn from seed 0."""
    problem = problem_of(p, spectrum, decay, alignment, noise_variance, pretrain_risk)
    filter = {"min-norm": MinNorm(), "ridge": Ridge(penalty), "early stopping": GradientFlow(time)}[fine_tuner]
    X = sample_design(jax.random.fold_in(jax.random.key(0), index), problem.finetune_covariance, n)
    forms = risk_forms(X, problem)
    taus = TAUS[::5]
    risk = forms.finetune(filter, taus)
    return {
        "tau": taus,
        "finetune": np.asarray(risk.total),
        "bias": np.asarray(risk.bias),
        "variance": np.asarray(risk.variance),
        "pretrain": np.asarray(forms.pretrain(filter, taus).total),
        "oracle": np.asarray(forms.finetune.oracle_risk())[None],
    }


PAPER = "Hao et al., ICML 2025, arXiv 2506.01901"

PAGE = Page(
    name="overadaptation",
    title="Overadaptation",
    source=f"Setting and the claim that averaging helps: {PAPER}. Formulas for these curves: ours (docs, S2, D1–D4).",
    introduction=(
        "Fine-tuning error is <b>bias²</b> (not enough learned) plus <b>variance</b> (noise learned). Averaging the fine-tuned "
        "weights with the pretrained ones, θ<sub>τ</sub> = (1−τ)θ₁ + τθ̂, trades one for the other: the best τ* (star) lies "
        "<b>between</b> pretrained (τ = 0) and fine-tuned (τ = 1), and beats both."
    ),
    controls=(
        Choice(
            "fine_tuner", "fine-tuned by", "How θ̂ is obtained from θ₁: minimum-norm interpolation, ridge towards θ₁ with "
            f"penalty λ, or gradient flow stopped at time t. {PAPER}; early stopping in this form: ours.",
            tuple(FINE_TUNERS), "min-norm",
        ),
        Slider(
            "tau", "ensemble coefficient τ", "θ_τ = (1−τ)θ₁ + τθ̂; 0 is the pretrained model, 1 the fine-tuned one. No unit. "
            f"{PAPER}.", 0, 1.5, 0.02, 0.6,
        ),
        Slider(
            "penalty", "penalty λ", "Ridge towards the pretrained weights: loss (1/n)‖y−Xθ‖² + λ‖θ−θ₁‖². In units of the "
            f"eigenvalues of Σ. {PAPER} (DiffNorm-Penalty).", -5, 2, 0.125, 0.1, True,
        ),
        Slider(
            "time", "training time t", "Gradient flow on (1/2n)‖y−Xθ‖²: step size × steps. In units of 1/eigenvalue. Ours.",
            0.125, 4, 0.125, 10.0, True,
        ),
        Slider(
            "n", "samples n", f"Number of fine-tuning samples; below p, so that interpolation is possible. {PAPER}.",
            40, 400, 10, 200,
        ),
        Choice("p", "features p", f"Number of features (weights). {PAPER}.", (1000, 2000, 4000), 2000),
        Choice(
            "spectrum", "spectrum of Σ", "Eigenvalues of the covariance of the features, the largest 1; the same for both "
            "tasks. power law: j^−decay; exponential: from 1 down to e^(−10·decay); two levels: 1% at 1, the rest at "
            "10^−decay; isotropic: all 1. Our choice of test bed.",
            ("power law", "exponential", "two levels", "isotropic"), "power law",
        ),
        Slider("decay", "spectral decay", "How fast the eigenvalues of Σ fall; see spectrum. No unit.", 0, 2, 0.05, 1.0),
        Slider(
            "alignment", "alignment of the shift", "The task shift δ = θ₂* − θ₁* is random with covariance Ω ∝ Σ^alignment, "
            "tr ΩΣ = 1: −1 in the tail of the spectrum, 0 isotropic, +1 along its head. No unit. Ours.",
            -1, 1, 0.05, -0.5,
        ),
        Slider(
            "noise_variance", "label noise σ²", "Variance of the label noise, in squared units of y; the risk of the pretrained "
            f"weights is about 1. {PAPER}.", 0, 2, 0.05, 0.5,
        ),
        Slider(
            "pretrain_risk", "pretraining error", "R_pre(θ₁), the risk of the pretrained weights on their own task, in squared "
            "units of y.", 0, 0.5, 0.01, 0.02,
        ),
    ),
    curves=curves,
    plots=(
        Plot(
            "risks", "Risk along the ensemble", "ensemble coefficient τ", "excess risk (units of y²)",
            lines=(
                Line("tau", "tau", "finetune", "fine-tuning risk", COLOURS["total"]),
                Line("tau", "tau", "bias", "bias²", COLOURS["bias"], "dashed"),
                Line("tau", "tau", "variance", "variance", COLOURS["variance"], "dotdash"),
                Line("tau", "tau", "pretrain", "pretraining risk", COLOURS["pretrained"], "dotted"),
            ),
            marks=(
                Mark("now", "tau", "finetune", "τ of the slider", COLOURS["total"], "circle"),
                Mark("best", "tau", "finetune", "best τ*", COLOURS["total"], "star"),
            ),
        ),
        Plot(
            "plane", "Trade-off: forgetting and learning", "pretraining risk (forgetting)", "fine-tuning risk",
            lines=(
                Line("average", "min_norm_pretrain", "min_norm_finetune", "min-norm, along τ", COLOURS["ensemble"]),
                Line("average", "ridge_pretrain", "ridge_finetune", "ridge at λ, along τ", COLOURS["ridge + ensemble"], "dashed"),
                Line("penalty", "pretrain", "finetune", "ridge, along λ", COLOURS["ridge"], "dotdash"),
                Line("time", "pretrain", "finetune", "early stopping, along t", COLOURS["early stopping"], "dotted"),
            ),
            marks=(
                Mark("ends", "pretrained_pretrain", "pretrained_finetune", "pretrained", COLOURS["pretrained"], "square"),
                Mark("ends", "tuned_pretrain", "tuned_finetune", "fine-tuned", COLOURS["fine-tuned"], "square"),
                Mark("now", "pretrain", "finetune", "τ of the slider", COLOURS["total"], "circle"),
                Mark("best", "pretrain", "finetune", "best τ*", COLOURS["total"], "star"),
            ),
        ),
        Plot(
            "surface", "Fine-tuning risk of ridge over λ and τ", "penalty λ", "ensemble coefficient τ",
            marks=(
                Mark("now", "penalty", "tau", "sliders", "#ffffff", "circle"),
                Mark("best", "pair_penalty", "pair_tau", "best pair", "#ffffff", "star"),
            ),
            surface=Surface("surface", "penalty", "tau", "finetune", "fine-tuning risk"),
            x_logarithmic=True,
        ),
        Plot(
            "time", "Fine-tuning longer, with and without averaging", "training time t (1/eigenvalue)", "fine-tuning risk",
            lines=(
                Line("time", "time", "finetune", "τ = 1", COLOURS["early stopping"]),
                Line("time", "time", "finetune_at_best_tau", "best τ at each t", COLOURS["ensemble"], "dashed"),
            ),
            x_logarithmic=True,
        ),
    ),
    readings=(
        Reading("best τ*", "Minimises the fine-tuning risk of this fine-tuner; overadaptation is τ* < 1 (docs, O1).", "best", "tau"),
        Reading("risk at τ*", "Fine-tuning risk there.", "best", "finetune"),
        Reading("fine-tuned (τ = 1)", "Fine-tuning risk without averaging.", "ends", "tuned_finetune"),
        Reading("pretrained (τ = 0)", "Fine-tuning risk without fine-tuning.", "ends", "pretrained_finetune"),
        Reading("best λ* alone", "Ridge without averaging: the best of 57 penalties.", "best", "penalty"),
        Reading("risk at λ*", "Fine-tuning risk there.", "best", "penalty_finetune"),
        Reading("best pair: λ", "Ridge with averaging: the best of 57 penalties, τ exact.", "best", "pair_penalty"),
        Reading("and τ", "See the star in the surface.", "best", "pair_tau"),
        Reading("its risk", "Fine-tuning risk of the best pair.", "best", "pair_finetune"),
    ),
    suggestions=(
        Suggestion("Remove the noise: is averaging still useful?", {"noise_variance": 0.0}),
        Suggestion("Put the shift along the head: ridge wins", {"alignment": 1.0, "noise_variance": 0.5}),
        Suggestion("A flat shift: the best ridge needs no averaging", {"alignment": 0.0, "fine_tuner": "ridge"}),
    ),
    overlay=Overlay(
        "exact risk on 8 drawn designs", design, 8, ("tau",),
        (
            Simulated("risks", "tau", "finetune", "fine-tuning risk, designs", COLOURS["total"]),
            Simulated("risks", "tau", "bias", "bias², designs", COLOURS["bias"]),
            Simulated("risks", "tau", "variance", "variance, designs", COLOURS["variance"]),
            Simulated("risks", "tau", "pretrain", "pretraining risk, designs", COLOURS["pretrained"]),
        ),
        (("oracle filter", "oracle"),),
    ),
)  # fmt: skip
