"""The method zoo on one plane: curves of what theory predicts, the Pareto frontier, and every method measured."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Choice, Line, Mark, Overlay, Page, Plot, Reading, Simulated, Slider, Suggestion
from figures.style import COLOURS
from linfit import GradientFlow, Ridge, Risk, TwoTaskProblem, aligned_problem, spectra
from sims import compare as comparison
from theory import flow, s3ft
from theory.equivalents import along
from theory.frontier import distance, pareto, population_risks

PENALTIES = np.logspace(-4, 2, 49)
TIMES = np.logspace(-0.5, 3.5, 33)
TAUS = np.linspace(0, 1, 51)
WEIGHTS = np.concatenate([[0.0], np.logspace(-3, 3, 61), [np.inf]])
METHODS = tuple(comparison.METHODS)
ROWS = {name: np.array([float(len(METHODS) - index)]) for index, name in enumerate(METHODS)}
"""Where each method stands in the list of all."""

PREDICTED = ("pretrained", "min-norm", "early stopping", "ridge", "min-norm + ensemble", "ridge + ensemble")


def problem_of(
    p: int, decay: float, pretrain_decay: float, alignment: float, noise_variance: float, pretrain_risk: float
) -> TwoTaskProblem:
    """Σ₂ = diag(j^−decay), Σ₁ ∝ diag(j^−pretrain_decay) of the same trace, Ω ∝ Σ₂^alignment with tr ΩΣ₂ = 1."""
    problem = aligned_problem(
        spectra.power_law(p, decay), alignment=alignment, noise_std=noise_variance**0.5, pretrain_risk=pretrain_risk
    )
    pretrain = spectra.power_law(p, pretrain_decay, trace=float(spectra.power_law(p, decay).sum()))
    return TwoTaskProblem(
        pretrain, problem.finetune_covariance, problem.shift, problem.noise_std, problem.pretrain_error
    )


@jax.jit
def samples(problem: TwoTaskProblem, n: Array) -> list[list[Risk]]:
    """Risks of ridge at λ = 0 (min-norm) and along λ and of gradient flow (docs, D1–D4); rows τ = 1, then TAUS."""
    with jax.ensure_compile_time_eval():  # times that are known share their work
        forms = along(problem, n, Ridge(np.append(0.0, PENALTIES))), along(problem, n, GradientFlow(TIMES))
    return [[form(np.append(1.0, TAUS)[:, None]) for form in pair] for pair in forms]


@jax.jit
def unlimited(
    problem: TwoTaskProblem, weight: Array, temperature: Array, threshold: Array, noise_variance: Array
) -> dict[str, Any]:
    """Frontier (docs, E2) and where averaging, FLOW and S3FT end with unlimited data (E1), in one kernel."""
    variance = population_risks(problem, 0.0).finetune + noise_variance  # of the residuals of the pretrained model
    taus = jnp.stack(
        [
            flow.fixed_point_coefficient(noise_variance**0.5, temperature * flow.median_temperature(variance)),
            s3ft.fixed_point_coefficient(threshold * variance**0.5, variance**0.5),
        ]
    )
    return {
        "frontier": pareto(problem, WEIGHTS),
        "chosen": pareto(problem, weight),
        "segment": population_risks(problem, TAUS),
        "ends": population_risks(problem, taus),
        "taus": taus,
    }


gap = jax.jit(distance)


def curves(
    *,
    p: int,
    n: int,
    decay: float,
    pretrain_decay: float,
    alignment: float,
    noise_variance: float,
    pretrain_risk: float,
    weight: float,
    temperature: float,
    threshold: float,
) -> dict[str, dict[str, np.ndarray]]:
    """Risks on n samples by deterministic equivalents (docs, D1–D4), with unlimited data (E1), and the frontier (E2)."""
    problem = problem_of(p, decay, pretrain_decay, alignment, noise_variance, pretrain_risk)
    limited, limit = jax.device_get(
        (samples(problem, n), unlimited(problem, weight, temperature, threshold, noise_variance))
    )
    (ridge_ft, ridge_pre), (flow_ft, flow_pre) = ([risk.total for risk in pair] for pair in limited)
    # What minimises R_ft + κR_pre among the methods that theory predicts: (table of both risks, name).
    cost = ridge_ft + weight * ridge_pre
    best = np.unravel_index(np.argmin(cost), cost.shape)
    early_cost = flow_ft[0] + weight * flow_pre[0]
    lone, early = int(np.argmin(cost[0])), int(np.argmin(early_cost))
    average = int(np.argmin(cost[1:, 0]))
    frontier, chosen, segment, ends, taus = (limit[name] for name in ("frontier", "chosen", "segment", "ends", "taus"))
    excess = jax.device_get(gap(problem, ridge_ft[best], ridge_pre[best]))

    def point(finetune: object, pretrain: object, **more: object) -> dict[str, np.ndarray]:
        values = {"finetune": finetune, "pretrain": pretrain, **more}
        return {name: np.reshape(np.asarray(value, float), 1) for name, value in values.items()}

    return {
        "averaging": {"tau": TAUS, "finetune": ridge_ft[1:, 0], "pretrain": ridge_pre[1:, 0]},
        "ridge": {"penalty": PENALTIES, "finetune": ridge_ft[0, 1:], "pretrain": ridge_pre[0, 1:]},
        "ridge_averaging": {"tau": TAUS, "finetune": ridge_ft[1:, best[1]], "pretrain": ridge_pre[1:, best[1]]},
        "time": {"time": TIMES, "finetune": flow_ft[0], "pretrain": flow_pre[0]},
        "frontier": {
            "weight": WEIGHTS,
            "finetune": frontier.finetune,
            "pretrain": frontier.pretrain,
        },
        "segment": {"tau": TAUS, "finetune": segment.finetune, "pretrain": segment.pretrain},
        "predicted": {
            "cost": np.array(
                [cost[1, 0], cost[0, 0], early_cost[early], cost[0, lone], cost[1 + average, 0], cost[best]]
            ),
            "row": np.concatenate([ROWS[name] for name in PREDICTED]),
        },
        "least": {
            "cost": np.full(2, chosen.finetune + weight * chosen.pretrain),
            "row": np.array([0.5, len(METHODS) + 0.5]),
        },
        "pretrained": point(ridge_ft[1, 0], ridge_pre[1, 0]),
        "vanilla": point(ridge_ft[0, 0], ridge_pre[0, 0], cost=cost[0, 0]),
        "best": point(ridge_ft[best], ridge_pre[best], cost=cost[best], excess=excess),
        "best_ridge": point(ridge_ft[0, lone], ridge_pre[0, lone], cost=cost[0, lone]),
        "best_average": point(
            ridge_ft[1 + average, 0], ridge_pre[1 + average, 0], cost=cost[1 + average, 0], tau=TAUS[average]
        ),
        "best_early": point(flow_ft[0, early], flow_pre[0, early], cost=early_cost[early]),
        "floor": point(chosen.finetune, chosen.pretrain, cost=chosen.finetune + weight * chosen.pretrain),
        "flow": point(ends.finetune[0], ends.pretrain[0], tau=taus[0]),
        "s3ft": point(ends.finetune[1], ends.pretrain[1], tau=taus[1]),
    }


def zoo(
    index: int,
    *,
    p: int,
    n: int,
    decay: float,
    pretrain_decay: float,
    alignment: float,
    noise_variance: float,
    pretrain_risk: float,
    weight: float,
    temperature: float,
    threshold: float,
) -> dict[str, np.ndarray]:
    """All methods of `sims.compare`, tuned by R_ft + κR_pre on 8 tasks and measured on 8 others (seed 0)."""
    problem = problem_of(p, decay, pretrain_decay, alignment, noise_variance, pretrain_risk)
    key = jax.random.fold_in(jax.random.key(0), index)
    data = comparison.compare(key, problem, n, weight=weight, tasks=8, validation=8)
    columns = {}
    for name in METHODS:
        columns[f"{name} row"] = ROWS[name]
        for risk in ("finetune", "pretrain", "criterion"):
            columns[f"{name} {risk}"] = np.array([float(data[risk].sel(estimator=name))])
    return columns


OKABE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
AVERAGE, RIDGE, BOTH, EARLY, FLOOR = (
    COLOURS[name] for name in ("ensemble", "ridge", "ridge + ensemble", "early stopping", "oracle")
)
PAPERS = "2506.01901 (averaging, ridge), 2502.02797 (FLOW), 2502.08130 (S3FT)"

PAGE = Page(
    name="compare",
    title="Compare",
    source=f"Methods: arXiv {PAPERS}; neighbours as named by each method of sims.compare. Curves, equivalent τ and the frontier: ours (docs, D1–D4, E1, E2).",
    introduction=(
        "Every way to fine-tune is a point in the plane of <b>forgetting</b> and <b>task risk</b>; left and down is better. Nothing can be "
        "below the <b>frontier</b>, which knows both tasks exactly. Stars: the best of each family for R<sub>ft</sub> + κR<sub>pre</sub>. "
        "Switch on the finite samples to have all sixteen methods of the zoo tuned and measured: points on the plane (hover for the name) and in the list."
    ),
    controls=(
        Slider("weight", "weight of forgetting κ", "Methods are tuned for R_ft + κR_pre. No unit. Ours (docs, O5, E2).", -2, 2, 0.1, 1.0, True),
        Slider("n", "samples n", "Number of fine-tuning samples.", 20, 80, 10, 40),
        Choice("p", "features p", "Number of features; small, so that the whole zoo can be run.", (120, 240), 120),
        Slider("decay", "spectral decay, fine-tuning", "Σ₂ = diag(j^−decay). No unit. Ours.", 0, 2, 0.05, 1.0),
        Slider("pretrain_decay", "spectral decay, pretraining", "Σ₁ ∝ diag(j^−decay) with the trace of Σ₂: below the fine-tuning decay, pretraining was broader. No unit. Ours.",
               0, 2, 0.05, 0.5),
        Slider("alignment", "alignment of the shift", "Shift covariance Ω ∝ Σ₂^alignment, tr ΩΣ₂ = 1: −1 in the tail, +1 along the head. No unit. Ours.",
               -1, 1, 0.05, 0.0),
        Slider("noise_variance", "label noise σ²", "In squared units of y.", 0, 2, 0.05, 0.5),
        Slider("pretrain_risk", "pretraining error", "R_pre(θ₁), in squared units of y.", 0, 0.5, 0.01, 0.1),
        Slider("temperature", "FLOW: T / median", "Temperature in units of the median squared residual, the paper's default. arXiv 2502.02797.", -1, 1, 0.05, 1.0, True),
        Slider("threshold", "S3FT: threshold / √v", "The judge accepts own answers within this many standard deviations of the residual. Linear form ours (docs, T1).",
               0, 3, 0.05, 1.0),
    ),
    curves=curves,
    plots=(
        Plot("plane", "All methods on one plane", "pretraining risk (forgetting)", "fine-tuning risk",
             lines=(Line("averaging", "pretrain", "finetune", "min-norm + averaging", AVERAGE), Line("ridge", "pretrain", "finetune", "ridge", RIDGE, "dashed"),
                    Line("ridge_averaging", "pretrain", "finetune", "best ridge + averaging", BOTH, "dotdash"), Line("time", "pretrain", "finetune", "early stopping", EARLY, "dotted"),
                    Line("frontier", "pretrain", "finetune", "Pareto frontier", FLOOR, "dashed")),
             marks=(Mark("pretrained", "pretrain", "finetune", "pretrained", COLOURS["pretrained"], "square"),
                    Mark("vanilla", "pretrain", "finetune", "min-norm", COLOURS["min-norm"], "square"),
                    Mark("best_average", "pretrain", "finetune", "best average", AVERAGE, "star"), Mark("best_ridge", "pretrain", "finetune", "best ridge", RIDGE, "star"),
                    Mark("best", "pretrain", "finetune", "best pair", BOTH, "star"), Mark("best_early", "pretrain", "finetune", "best time", EARLY, "star"))),
        Plot("population", "Unlimited data: FLOW and S3FT are averages", "pretraining risk (forgetting)", "fine-tuning risk",
             lines=(Line("segment", "pretrain", "finetune", "averaging, along τ", AVERAGE), Line("frontier", "pretrain", "finetune", "Pareto frontier", FLOOR, "dashed")),
             marks=(Mark("flow", "pretrain", "finetune", "FLOW at T", RIDGE, "triangle"), Mark("s3ft", "pretrain", "finetune", "S3FT at c", EARLY, "diamond"),
                    Mark("floor", "pretrain", "finetune", "frontier at κ", FLOOR, "star"))),
        Plot("list", "All methods, tuned and measured", "fine-tuning risk + κ · pretraining risk", "",
             lines=(Line("least", "cost", "row", "frontier", FLOOR, "dashed"),), marks=(Mark("predicted", "cost", "row", "predicted", "#bbbbbb", "square"),),
             y_names=METHODS[::-1]),
    ),
    readings=(
        Reading("min-norm", "R_ft + κR_pre of interpolation.", "vanilla", "cost"),
        Reading("+ averaging", "At its best τ.", "best_average", "cost"),
        Reading("best τ", "For R_ft + κR_pre, min-norm.", "best_average", "tau"),
        Reading("ridge", "At its best λ, on a grid of 49.", "best_ridge", "cost"),
        Reading("early stopping", "At its best t, on a grid of 33.", "best_early", "cost"),
        Reading("ridge + averaging", "At its best λ and τ.", "best", "cost"),
        Reading("frontier", "Nothing can be below (docs, E2).", "floor", "cost"),
        Reading("excess forgetting of the best", "R_pre above the frontier at equal R_ft (docs, E2).", "best", "excess"),
        Reading("FLOW's τ", "Equivalent coefficient with unlimited data (docs, F4, E1).", "flow", "tau"),
        Reading("S3FT's τ", "Equivalent coefficient with unlimited data (docs, T1, E1).", "s3ft", "tau"),
    ),
    suggestions=(
        Suggestion("Shift in the tail: averaging beats ridge", {"alignment": -1.0, "weight": 0.1}),
        Suggestion("Shift along the head: ridge beats averaging", {"alignment": 1.0, "weight": 0.1}),
        Suggestion("Forgetting is all that counts", {"weight": 10.0}),
    ),
    overlay=Overlay("16 methods, 4 × 8 tasks", zoo, 4, tuple(f"{name} row" for name in METHODS),
                    tuple(point for name, colour in zip(METHODS, itertools.cycle(OKABE)) for point in (
                        Simulated("plane", f"{name} pretrain", f"{name} finetune", name, colour),
                        Simulated("list", f"{name} criterion", f"{name} row", name, colour, sideways=True)))),
)  # fmt: skip
