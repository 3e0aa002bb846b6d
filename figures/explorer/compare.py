"""All methods on one plane: curves of what theory predicts, the Pareto frontier, and every method measured."""

import itertools
from operator import itemgetter
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Choice, Line, Mark, Overlay, Page, Plot, Points, Reading, Slider
from figures.explorer.tables import Table, Tables, grid, kernel, least, risks_at
from figures.style import COLOURS
from linfit import GradientFlow, Pair, Parabola, Ridge, TwoTaskProblem, aligned_problem, spectra
from sims.compare import METHODS as COMPARED
from sims.compare import compare
from sims.parameters import ALIGNMENT, NOISE, PRETRAIN_RISK, WEIGHT, N
from theory import flow, s3ft
from theory.equivalents import along
from theory.frontier import distance, pareto, population_risks

PENALTIES = np.logspace(-4, 2, 49)
TIMES = np.logspace(-0.5, 3.5, 33)
TAUS = np.linspace(0, 1, 51)
WEIGHTS = np.concatenate([[0.0], np.logspace(-3, 3, 61), [np.inf]])
METHODS = tuple(COMPARED)
ROWS = {name: np.array([float(len(METHODS) - index)]) for index, name in enumerate(METHODS)}
"""Where each method stands in the list of all."""


class Parameters(NamedTuple):
    """Of the page."""

    weight: Annotated[float, Slider(
        "trade-off weight κ", WEIGHT, 0.1, "Methods are tuned for it. Ours (docs, O5, E2).")] = 1.0  # fmt: skip
    n: Annotated[int, Slider("samples n", N.within(20, 80), 10)] = 40
    p: Annotated[int, Choice(
        "features p", "Number of features; small, so that all methods can be run.", (120, 240))] = 120  # fmt: skip
    decay: Annotated[
        float, Slider.own("spectral decay, fine-tuning", "Σ₂ = diag(j^−decay)", 0.0, 2.0, 0.05, "Ours.")
    ] = 1.0
    pretrain_decay: Annotated[float, Slider.own("spectral decay, pretraining", "Σ₁ ∝ diag(j^−decay) with the trace of Σ₂",
        0.0, 2.0, 0.05, "Below the fine-tuning decay, pretraining was broader. Ours.")] = 0.5  # fmt: skip
    alignment: Annotated[float, Slider("alignment of the shift", ALIGNMENT, 0.05, "Σ is Σ₂ here. Ours.")] = 0.0
    noise_std: Annotated[float, Slider("label noise σ", NOISE, 0.02)] = 0.7
    pretrain_risk: Annotated[float, Slider("pretraining error", PRETRAIN_RISK.within(0.0, 0.5), 0.01)] = 0.1
    temperature: Annotated[float, Slider.own("FLOW: T / median", "temperature T of FLOW", 0.1, 10.0, 0.05,
        "The median is the paper's default. arXiv 2502.02797", scale="log", unit="units of the median squared residual")] = 1.0  # fmt: skip
    threshold: Annotated[float, Slider.own("S3FT: threshold / √v", "the judge accepts own answers within this many standard deviations "
        "of the residual", 0.0, 3.0, 0.05, "Linear form ours (docs, T1).")] = 1.0  # fmt: skip


_test_bed = jax.jit(aligned_problem)


def _problem(at: Parameters) -> TwoTaskProblem:
    finetune = spectra.power_law(at.p, at.decay)
    pretrain = spectra.power_law(at.p, at.pretrain_decay, trace=finetune.sum())
    known = {"alignment": at.alignment, "noise_std": at.noise_std, "pretrain_risk": at.pretrain_risk}
    return _test_bed(finetune, pretrain_spectrum=pretrain, **known)


def _with_cost(risks: Table, weight: Array) -> Table:
    """Both risks and R_ft + κR_pre, as columns."""
    cost = risks["finetune"] + weight * risks["pretrain"]
    return {name: jnp.ravel(value) for name, value in {**risks, "cost": cost}.items()}


@kernel
def _tables(problem: TwoTaskProblem, n: Array, weight: Array, temperature: Array, threshold: Array) -> Tables:
    with jax.ensure_compile_time_eval():  # times that are known share their work
        ridges, stopped = along(problem, n, Ridge(np.append(0.0, PENALTIES))), along(problem, n, GradientFlow(TIMES))

    def plane(parabolas: Pair[Parabola], tau: float | Array | np.ndarray = 1.0) -> Table:
        return _with_cost(risks_at(tau, parabolas), weight)

    def of_penalty(index: int | Array) -> Pair[Parabola]:
        return jax.tree.map(itemgetter(index), ridges)

    averaging = {"tau": TAUS, **plane(of_penalty(0), TAUS)}
    alone = {"penalty": np.append(0.0, PENALTIES), **plane(ridges)}
    both = {**grid(alone["penalty"], TAUS), **plane(ridges, TAUS[:, None])}
    early = {"time": TIMES, **plane(stopped)}
    best = least(both, "cost")
    best["excess"] = distance(problem, best["finetune"], best["pretrain"])
    min_norm, pretrained = ({name: values[:1] for name, values in table.items()} for table in (alone, averaging))
    # Where averaging, FLOW and S3FT end with unlimited data (docs, E1); v is that of the pretrained model's residuals.
    variance = problem.pretrained_risks.finetune + problem.noise_std**2
    flow_tau = flow.fixed_point_coefficient(problem.noise_std, temperature * flow.median_temperature(variance))
    s3ft_tau = s3ft.fixed_point_coefficient(threshold * variance**0.5, variance**0.5)
    lower_bound = _with_cost(pareto(problem, weight)._asdict(), weight)
    predicted = {
        "pretrained": pretrained,
        "min-norm": min_norm,
        "early stopping": least(early, "cost"),
        "ridge": least(alone, "cost"),
        "min-norm + ensemble": least(averaging, "cost"),
        "ridge + ensemble": best,
    }
    costs = [table["cost"] for table in predicted.values()]
    best_ridge = of_penalty(jnp.argmax(alone["penalty"] == best["penalty"]))
    return {
        "averaging": averaging,
        "ridge": {name: values[1:] for name, values in alone.items()},
        "ridge_averaging": {"tau": TAUS, **plane(best_ridge, TAUS)},
        "time": early,
        "frontier": {"weight": WEIGHTS, **pareto(problem, WEIGHTS)._asdict()},
        "segment": {"tau": TAUS, **population_risks(problem, TAUS)._asdict()},
        "predicted": {"cost": jnp.concatenate(costs), "row": np.concatenate([ROWS[name] for name in predicted])},
        "least": {"cost": jnp.repeat(lower_bound["cost"], 2), "row": np.array([0.5, len(METHODS) + 0.5])},
        "pretrained": pretrained,
        "min_norm": min_norm,
        "best": best,
        "best_ridge": predicted["ridge"],
        "best_average": predicted["min-norm + ensemble"],
        "best_early": predicted["early stopping"],
        "lower_bound": lower_bound,
        "flow": {"tau": flow_tau[None], **_with_cost(population_risks(problem, flow_tau)._asdict(), weight)},
        "s3ft": {"tau": s3ft_tau[None], **_with_cost(population_risks(problem, s3ft_tau)._asdict(), weight)},
    }


def curves(at: Parameters) -> Tables:
    """Risks on n samples by deterministic equivalents (docs, D1–D4), with unlimited data (E1), and the frontier (E2)."""
    return _tables(_problem(at), at.n, at.weight, at.temperature, at.threshold)


def replicate(index: int, at: Parameters) -> Table:
    """All methods of `sims.compare`, tuned by R_ft + κR_pre on 8 tasks and measured on 8 others (seed 0)."""
    key = jax.random.fold_in(jax.random.key(0), index)
    data = compare(key, _problem(at), at.n, weight=at.weight, tasks=8, validation=8)
    columns = {}
    for name in METHODS:
        columns[f"{name} row"] = ROWS[name]
        for risk in ("finetune", "pretrain", "criterion"):
            columns[f"{name} {risk}"] = np.array([float(data[risk].sel(estimator=name))])
    return columns


OKABE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
AVERAGE, RIDGE, BOTH, EARLY, FRONTIER = (
    COLOURS[name] for name in ("ensemble", "ridge", "ridge + ensemble", "early stopping", "oracle")
)
PAPERS = "2506.01901 (averaging, ridge), 2502.02797 (FLOW), 2502.08130 (S3FT)"

PAGE = Page(
    name="compare",
    title="Compare",
    source=f"Methods: arXiv {PAPERS}; neighbours as named by each recipe of sims.compare. Curves, equivalent τ and the frontier: ours (docs, D1–D4, E1, E2).",
    introduction=(
        "Every way to fine-tune is a point in the plane of <b>forgetting</b> and <b>task risk</b>; left and down is better. Nothing can be "
        "below the <b>frontier</b>, which knows both tasks exactly. Stars: the best of each family for R<sub>ft</sub> + κR<sub>pre</sub>. "
        "Switch on the finite samples to have all methods tuned and measured: points on the plane (hover for the name) and in the list."
    ),
    parameters=Parameters,
    curves=curves,
    plots=(
        Plot.of_risks("plane", "All methods on one plane", (
            ("averaging", "min-norm + averaging", AVERAGE), ("ridge", "ridge", RIDGE, "dashed"),
            ("ridge_averaging", "best ridge + averaging", BOTH, "dotdash"), ("time", "early stopping", EARLY, "dotted"),
            ("frontier", "Pareto frontier", FRONTIER, "dashed"),
        ), (("pretrained", "pretrained", COLOURS["pretrained"], "square"), ("min_norm", "min-norm", COLOURS["min-norm"], "square"),
            ("best_average", "best average", AVERAGE, "star"), ("best_ridge", "best ridge", RIDGE, "star"),
            ("best", "best pair", BOTH, "star"), ("best_early", "best time", EARLY, "star"))),
        Plot.of_risks("population", "Unlimited data: FLOW and S3FT are averages", (
            ("segment", "averaging, along τ", AVERAGE), ("frontier", "Pareto frontier", FRONTIER, "dashed"),
        ), (("flow", "FLOW at T", RIDGE, "triangle"), ("s3ft", "S3FT at c", EARLY, "diamond"), ("lower_bound", "frontier at κ", FRONTIER, "star"))),
        Plot("list", "All methods, tuned and measured", "fine-tuning risk + κ · pretraining risk", "",
             (Line("least", "cost", "row", "frontier", FRONTIER, "dashed"),), (Mark("predicted", "cost", "row", "predicted", "#bbbbbb", "square"),),
             y_names=METHODS[::-1]),
    ),
    readings=(
        Reading("min-norm", "R_ft + κR_pre of interpolation.", "min_norm", "cost"),
        Reading("+ averaging", "At its best τ.", "best_average", "cost"),
        Reading("best τ", "For R_ft + κR_pre, min-norm.", "best_average", "tau"),
        Reading("ridge", "At its best λ, on a grid of 49.", "best_ridge", "cost"),
        Reading("early stopping", "At its best t, on a grid of 33.", "best_early", "cost"),
        Reading("ridge + averaging", "At its best λ and τ.", "best", "cost"),
        Reading("frontier", "Nothing can be below (docs, E2).", "lower_bound", "cost"),
        Reading("excess forgetting of the best", "R_pre above the frontier at equal R_ft (docs, E2).", "best", "excess"),
        Reading("FLOW's τ", "Equivalent coefficient with unlimited data (docs, F4, E1).", "flow", "tau"),
        Reading("S3FT's τ", "Equivalent coefficient with unlimited data (docs, T1, E1).", "s3ft", "tau"),
    ),
    suggestions={
        "Shift in the tail: averaging beats ridge": {"alignment": -1.0, "weight": 0.1},
        "Shift along the head: ridge beats averaging": {"alignment": 1.0, "weight": 0.1},
        "Forgetting is all that counts": {"weight": 10.0},
    },
    overlay=Overlay(f"{len(METHODS)} methods, 4 × 8 tasks", replicate, 4, tuple(f"{name} row" for name in METHODS),
                    tuple(point for name, colour in zip(METHODS, itertools.cycle(OKABE)) for point in (
                        Points("plane", f"{name} pretrain", f"{name} finetune", name, colour),
                        Points("list", f"{name} criterion", f"{name} row", name, colour, sideways=True)))),
)  # fmt: skip
