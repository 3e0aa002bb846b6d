"""The page of the overadaptation paper: risks along the ensemble, the trade-off plane, the surface over λ and τ."""

from operator import itemgetter
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Choice, Line, Map, Mark, Overlay, Page, Plot, Points, Reading, Slider
from figures.explorer.tables import Table, Tables, grid, kernel, least, risks_at
from figures.style import COLOURS
from linfit import GradientFlow, MinNorm, Ridge, TwoTaskProblem, aligned_problem, risk_forms, sample_design, spectra
from sims.parameters import ALIGNMENT, NOISE, PENALTY, PRETRAIN_RISK, TAU, TIME, N
from theory.equivalents import along

PENALTIES = np.logspace(-5, 2, 57)
TIMES = np.logspace(0.125, 4, 32)
"""Four decades: `along` shares its work within each."""
TAUS = np.linspace(0, 1.5, 76)
AVERAGES = TAUS[TAUS <= 1]
FINE_TUNERS = ("min-norm", "ridge", "early stopping")
PAPER = "Hao et al., ICML 2025, arXiv 2506.01901"


class Parameters(NamedTuple):
    """Of the page."""

    fine_tuner: Annotated[str, Choice(
        "fine-tuned by", "How θ̂ is obtained from θ₁: minimum-norm interpolation, ridge towards θ₁ with penalty λ, or "
        f"gradient flow stopped at time t. {PAPER}; early stopping in this form: ours.", FINE_TUNERS)] = "min-norm"  # fmt: skip
    tau: Annotated[float, Slider("ensemble coefficient τ", TAU, 0.02, f"θ_τ = (1−τ)θ₁ + τθ̂. {PAPER}")] = 0.6
    penalty: Annotated[float, Slider(
        "penalty λ", PENALTY, 0.125, f"Loss (1/n)‖y−Xθ‖² + λ‖θ−θ₁‖². {PAPER} (DiffNorm-Penalty)")] = 0.1  # fmt: skip
    time: Annotated[float, Slider("training time t", TIME.within(1.334, 1e4), 0.125,
        "Gradient flow on (1/2n)‖y−Xθ‖²: step size × steps. Ours.")] = 10.0  # fmt: skip
    n: Annotated[int, Slider(
        "samples n", N.within(40, 400), 10, f"Below p, so that interpolation is possible. {PAPER}")] = 200  # fmt: skip
    p: Annotated[int, Choice("features p", f"Number of features (weights). {PAPER}", (1000, 2000, 4000))] = 2000
    spectrum: Annotated[str, Choice(
        "spectrum of Σ", "Eigenvalues of the covariance of the features, the largest 1; the same for both tasks. power "
        "law: j^−decay; exponential: from 1 down to e^(−10·decay); two levels: 1% at 1, the rest at 10^−decay; isotropic: "
        "all 1. Our choice of test bed.", ("power law", "exponential", "two levels", "isotropic"))] = "power law"  # fmt: skip
    decay: Annotated[float, Slider.own(
        "spectral decay", "how fast the eigenvalues of Σ fall; see spectrum", 0.0, 2.0, 0.05)] = 1.0  # fmt: skip
    alignment: Annotated[float, Slider("alignment of the shift", ALIGNMENT, 0.05, "Ours.")] = -0.5
    noise_std: Annotated[float, Slider(
        "label noise σ", NOISE, 0.02, f"The risk of the pretrained weights is about 1. {PAPER}")] = 0.7  # fmt: skip
    pretrain_risk: Annotated[float, Slider("pretraining error", PRETRAIN_RISK.within(0.0, 0.5), 0.01)] = 0.02


_test_bed = jax.jit(aligned_problem)


def _problem(at: Parameters) -> TwoTaskProblem:
    """Σ₁ = Σ₂ = diag(s), largest s = 1."""
    s = {
        "power law": lambda: spectra.power_law(at.p, at.decay),
        "exponential": lambda: spectra.exponential(at.p, 10 * at.decay / at.p),
        "two levels": lambda: spectra.bilevel(at.p, at.p // 100, head=1.0, tail=10.0**-at.decay),
        "isotropic": lambda: spectra.isotropic(at.p),
    }[at.spectrum]()
    return _test_bed(s, alignment=at.alignment, noise_std=at.noise_std, pretrain_risk=at.pretrain_risk)


@kernel
def _tables(problem: TwoTaskProblem, n: Array, penalty: Array, time: Array, tau: Array, fine_tuner: Array) -> Tables:
    """Risks without sampling a design (docs, D1–D4); `fine_tuner` is an index into FINE_TUNERS."""
    ridges = along(problem, n, Ridge(jnp.concatenate([jnp.stack([0.0, penalty]), PENALTIES])))
    min_norm, ridge, path = (jax.tree.map(itemgetter(part), ridges) for part in (0, 1, slice(2, None)))
    stopped = along(problem, n, GradientFlow(time))
    with jax.ensure_compile_time_eval():  # times that are known share their work
        flow = along(problem, n, GradientFlow(TIMES))
    chosen = jax.tree.map(lambda *leaves: jnp.stack(leaves)[fine_tuner], min_norm, ridge, stopped)
    tuned, best_tau = chosen.finetune(TAUS), chosen.finetune.optimal_tau
    at_best_tau = {"finetune_at_best_tau": path.finetune.optimal_risk, "best_tau": path.finetune.optimal_tau}
    penalised = {"penalty": PENALTIES, **risks_at(1.0, path), **at_best_tau}
    return {
        "tau": {"tau": TAUS, "bias": tuned.bias, "variance": tuned.variance, **risks_at(TAUS, chosen)},
        "min_norm": {"tau": AVERAGES, **risks_at(AVERAGES, min_norm)},
        "ridge": {"tau": AVERAGES, **risks_at(AVERAGES, ridge)},
        "penalty": penalised,
        "time": {"time": TIMES, **risks_at(1.0, flow), "finetune_at_best_tau": flow.finetune.optimal_risk},
        "surface": {**grid(PENALTIES, TAUS), "finetune": path.finetune(TAUS[:, None]).total.ravel()},
        "now": {"tau": tau[None], "penalty": penalty[None], "time": time[None], **risks_at(tau, chosen)},
        "best": {"tau": best_tau[None], **risks_at(best_tau, chosen)},
        "best_penalty": least(penalised, "finetune"),
        "best_pair": least(penalised, "finetune_at_best_tau"),
        "pretrained": risks_at(0.0, chosen),
        "tuned": risks_at(1.0, chosen),
    }


def curves(at: Parameters) -> Tables:
    """Both risks of every filter, predicted without sampling a design (docs, D1–D4)."""
    return _tables(_problem(at), at.n, at.penalty, at.time, at.tau, FINE_TUNERS.index(at.fine_tuner))


def replicate(index: int, at: Parameters) -> Table:
    """Exact risk (docs, S2) along τ, and of the oracle filter (S4), on one Gaussian design X sampled from seed 0."""
    problem = _problem(at)
    filter = (MinNorm(), Ridge(at.penalty), GradientFlow(at.time))[FINE_TUNERS.index(at.fine_tuner)]
    X = sample_design(jax.random.fold_in(jax.random.key(0), index), problem.finetune_covariance, at.n)
    forms, taus = risk_forms(X, problem), TAUS[::5]
    finetune, pretrain = forms.map(lambda form: form(filter, taus))
    columns = {"tau": taus, "finetune": finetune.total, "bias": finetune.bias, "variance": finetune.variance}
    columns |= {"pretrain": pretrain.total, "oracle": forms.finetune.oracle_risk()[None]}
    return {name: np.asarray(values) for name, values in columns.items()}


TOTAL, BIAS, VARIANCE, PRETRAINED = (COLOURS[name] for name in ("total", "bias", "variance", "pretrained"))
EARLY, AVERAGE, WHITE = COLOURS["early stopping"], COLOURS["ensemble"], "#ffffff"

PAGE = Page(
    name="overadaptation",
    title="Overadaptation",
    source=f"Setting and the claim that averaging helps: {PAPER}. Formulas for these curves: ours (docs, S2, D1–D4).",
    introduction=(
        "Fine-tuning error is <b>bias²</b> (not enough learned) plus <b>variance</b> (noise learned). Averaging the fine-tuned "
        "weights with the pretrained ones, θ<sub>τ</sub> = (1−τ)θ₁ + τθ̂, trades one for the other: the best τ* (star) lies "
        "<b>between</b> pretrained (τ = 0) and fine-tuned (τ = 1), and beats both."
    ),
    parameters=Parameters,
    curves=curves,
    plots=(
        Plot("risks", "Risk along the ensemble", "ensemble coefficient τ", "excess risk (units of y²)",
             Line.over("tau", "tau", ("finetune", "fine-tuning risk", TOTAL), ("bias", "bias²", BIAS, "dashed"),
                   ("variance", "variance", VARIANCE, "dotdash"), ("pretrain", "pretraining risk", PRETRAINED, "dotted")),
             (Mark("now", "tau", "finetune", "τ of the slider", TOTAL), Mark("best", "tau", "finetune", "best τ*", TOTAL, "star"))),
        Plot.of_risks("plane", "Trade-off: forgetting and learning", (
            ("min_norm", "min-norm, along τ", AVERAGE), ("ridge", "ridge at λ, along τ", COLOURS["ridge + ensemble"], "dashed"),
            ("penalty", "ridge, along λ", COLOURS["ridge"], "dotdash"), ("time", "early stopping, along t", EARLY, "dotted"),
        ), (("pretrained", "pretrained", PRETRAINED, "square"), ("tuned", "fine-tuned", COLOURS["fine-tuned"], "square"),
            ("now", "τ of the slider", TOTAL), ("best", "best τ*", TOTAL, "star"))),
        Plot("surface", "Fine-tuning risk of ridge over λ and τ", "penalty λ", "ensemble coefficient τ", (),
             (Mark("now", "penalty", "tau", "sliders", WHITE), Mark("best_pair", "penalty", "best_tau", "best pair", WHITE, "star")),
             Map("surface", "penalty", "tau", "finetune", "fine-tuning risk"), x_logarithmic=True),
        Plot("time", "Fine-tuning longer, with and without averaging", "training time t (1/eigenvalue)", "fine-tuning risk",
             Line.over("time", "time", ("finetune", "τ = 1", EARLY), ("finetune_at_best_tau", "best τ at each t", AVERAGE, "dashed")), x_logarithmic=True),
    ),
    readings=(
        Reading("best τ*", "Minimises the fine-tuning risk of this fine-tuner; overadaptation is τ* < 1 (docs, O1).", "best", "tau"),
        Reading("risk at τ*", "Fine-tuning risk there.", "best", "finetune"),
        Reading("fine-tuned (τ = 1)", "Fine-tuning risk without averaging.", "tuned", "finetune"),
        Reading("pretrained (τ = 0)", "Fine-tuning risk without fine-tuning.", "pretrained", "finetune"),
        Reading("best λ* alone", "Ridge without averaging: the best of 57 penalties.", "best_penalty", "penalty"),
        Reading("risk at λ*", "Fine-tuning risk there.", "best_penalty", "finetune"),
        Reading("best pair: λ", "Ridge with averaging: the best of 57 penalties, τ exact.", "best_pair", "penalty"),
        Reading("and τ", "See the star in the surface.", "best_pair", "best_tau"),
        Reading("its risk", "Fine-tuning risk of the best pair.", "best_pair", "finetune_at_best_tau"),
    ),
    suggestions={
        "Remove the noise: is averaging still useful?": {"noise_std": 0.0},
        "Put the shift along the head: ridge wins": {"alignment": 1.0, "noise_std": 0.7},
        "A flat shift: the best ridge needs no averaging": {"alignment": 0.0, "fine_tuner": "ridge"},
    },
    overlay=Overlay("exact risk on 8 sampled designs", replicate, 8, ("tau",),
                    (Points("risks", "tau", "finetune", "fine-tuning risk, designs", TOTAL), Points("risks", "tau", "bias", "bias², designs", BIAS),
                     Points("risks", "tau", "variance", "variance, designs", VARIANCE),
                     Points("risks", "tau", "pretrain", "pretraining risk, designs", PRETRAINED)), (("oracle filter", "oracle"),)),
)  # fmt: skip
