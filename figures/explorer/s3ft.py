"""The page of the S3FT paper in its linear form: shares of targets, what is learned and what is forgotten."""

from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Line, Mark, Overlay, Page, Plot, Points, Reading, Slider
from figures.explorer.tables import Table, Tables, kernel
from figures.style import COLOURS
from linfit import MinNorm, sample_design
from sims.parameters import NOISE, RISK, N, Parameter
from theory.s3ft import SUPERVISED, Procedure, VectorProblem, coefficients, conditional, population

TOLERANCES = np.linspace(0, 6, 61)
TAUS = np.linspace(0, 1, 51)
CONTENT = 2
MEASURED = ("content_risk", "style_drift", "forgetting")
PAPER = "Gupta et al., NAACL Findings 2025, arXiv 2502.08130"
ERROR = Parameter("probability; the error rate of the judge", low=0.0, high=1.0)


class Parameters(NamedTuple):
    """Of the page."""

    tolerance: Annotated[float, Slider.own("judge's tolerance c", "an answer is right if its content misses gold by at most c", 0.0, 6.0,
        0.1, f"The judge is {PAPER}'s; the distance is ours.", unit="units of y")] = 1.0  # fmt: skip
    false_accept: Annotated[float, Slider("judge accepts wrong answers", ERROR, 0.02, "Ours.")] = 0.0
    false_reject: Annotated[float, Slider("judge rejects right answers", ERROR, 0.02, "Ours.")] = 0.0
    paraphrase: Annotated[float, Slider.own("paraphrase succeeds", "probability that the model can reword a gold answer it did not find",
        0.0, 1.0, 0.02, f"{PAPER} (method); the probability is ours.")] = 0.8  # fmt: skip
    style_dimension: Annotated[int, Slider.own("style dimension", "outputs that do not count for correctness; two others do",
        0, 16, 1, "Ours.", scale="whole")] = 4  # fmt: skip
    style_signal: Annotated[float, Slider.own("style shift", "how far gold's style is from the model's, in every style output; content has 1",
        0.0, 4.0, 0.1, "Ours.", unit=RISK)] = 1.0  # fmt: skip
    noise_std: Annotated[float, Slider("label noise σ", NOISE, 0.02, "On gold's content.")] = 0.7
    sampling_std: Annotated[float, Slider.own("answer spread s", "standard deviation of own answers around the prediction (temperature)",
        0.0, 2.0, 0.05, "Ours.", unit="units of y")] = 0.0  # fmt: skip
    n: Annotated[int, Slider("samples n (overlay only)", N.within(50, 2000), 50,
        "Of each design of the overlay; the curves have unlimited data.")] = 300  # fmt: skip


def _problem(at: Parameters, style_dimension: int) -> VectorProblem:
    """Two outputs of content, each with signal 1, others of style; Σ₁ = Σ₂ = I, a feature for each output."""
    content, flat = np.arange(CONTENT + style_dimension) < CONTENT, np.ones(CONTENT + style_dimension)
    size = jnp.where(content, 1.0, at.style_signal**0.5)
    return VectorProblem(flat, flat, jnp.diag(size), content, at.noise_std, style_noise_std=0.0)


def _procedure(at: Parameters, tolerances: Array | np.ndarray) -> Procedure:
    return Procedure(tolerances, at.paraphrase, at.false_accept, at.false_reject, at.sampling_std)


@partial(kernel, static=(1,))
def _tables(at: Parameters, style_dimension: int) -> Tables:
    """The tolerance of the slider comes first."""
    tolerances = jnp.append(at.tolerance, TOLERANCES)
    problem, procedure = _problem(at, style_dimension), _procedure(at, tolerances)
    outcome, supervised = population(problem, procedure), population(problem, SUPERVISED)
    without = population(problem, procedure._replace(paraphrase_success=0.0))
    columns = {
        "tolerance": tolerances,
        **outcome.shares._asdict(),
        **coefficients(procedure, CONTENT, (1 + at.noise_std**2) ** 0.5)._asdict(),
        **{name: getattr(outcome, name) for name in MEASURED},
        "content_risk_without": without.content_risk,
        "forgetting_without": without.forgetting,
    }
    averaging = {"content_risk": CONTENT * (1 - TAUS) ** 2, "forgetting": TAUS**2 * supervised.forgetting}
    flat = {name: jnp.full(2, getattr(supervised, name)) for name in ("forgetting", "content_risk")}
    return {
        "tolerance": {name: values[1:] for name, values in columns.items()},
        "now": {name: values[:1] for name, values in columns.items()},
        "averaging": {"tau": TAUS, **averaging},
        "supervised": {"tolerance": TOLERANCES[[0, -1]], **flat},
    }


def curves(at: Parameters) -> Tables:
    """Shares, coefficients and risks with unlimited data (docs, T2; ours)."""
    return _tables(at, at.style_dimension)


def replicate(index: int, at: Parameters) -> Table:
    """The same conditional on one design of n samples (docs, T2; seed 0), averaged exactly over noise and judge."""
    problem, tolerances = _problem(at, at.style_dimension), TOLERANCES[::5]
    X = sample_design(jax.random.fold_in(jax.random.key(0), index), problem.finetune_covariance, at.n)
    outcome = conditional(X, problem, _procedure(at, tolerances), MinNorm())
    columns = {**outcome.shares._asdict(), **{name: getattr(outcome, name) for name in MEASURED}}
    return {"tolerance": tolerances, **{name: np.asarray(values) for name, values in columns.items()}}


OWN, STYLE, GOLD, PRETRAINED, RIDGE = (
    COLOURS[name] for name in ("early stopping", "variance", "fine-tuned", "pretrained", "ridge")
)

PAGE = Page(
    name="s3ft",
    title="S3FT",
    source=f"Method: {PAPER}, which has no theory; the linear form and every formula here: ours (docs, T1, T2).",
    introduction=(
        "S3FT trains on the model's <b>own answer</b> where a judge accepts it, on a <b>paraphrase</b> of the gold answer in the "
        "model's own style where that works, and on the <b>gold answer</b> only otherwise. So it learns the content and leaves "
        "the style alone: less forgetting at the same task risk."
    ),
    parameters=Parameters,
    curves=curves,
    plots=(
        Plot("trade", "Trade-off: forgetting and task risk", "pretraining risk (forgetting)", "content risk (the task)",
             (Line("tolerance", "forgetting", "content_risk", "S3FT, along c", RIDGE),
              Line("tolerance", "forgetting_without", "content_risk_without", "without paraphrase", COLOURS["ridge + ensemble"], "dashed"),
              Line("averaging", "forgetting", "content_risk", "SFT + averaging, along τ", COLOURS["ensemble"], "dotdash")),
             (Mark("now", "forgetting", "content_risk", "c of the slider", RIDGE), Mark("supervised", "forgetting", "content_risk", "SFT", GOLD, "square"))),
        Plot("shares", "Where targets come from", "judge's tolerance c", "share of targets",
             Line.over("tolerance", "tolerance", ("own", "own answer", OWN), ("paraphrase", "paraphrase", STYLE, "dashed"), ("gold", "gold answer", GOLD, "dotdash")),
             (Mark("now", "tolerance", "own", "c of the slider", OWN),)),
        Plot("risks", "Risks along the tolerance", "judge's tolerance c", "risk (units of y²)",
             (*Line.over("tolerance", "tolerance", ("forgetting", "forgetting", PRETRAINED), ("content_risk", "content risk", GOLD, "dashed"),
                         ("style_drift", "style drift", STYLE, "dotdash")), Line("supervised", "tolerance", "forgetting", "forgetting of SFT", "#777777", "dotted")),
             (Mark("now", "tolerance", "forgetting", "c of the slider", PRETRAINED),)),
        Plot("coefficients", "Two averages: τ of content, τ of style", "judge's tolerance c", "equivalent τ",
             Line.over("tolerance", "tolerance", ("content", "content", GOLD), ("style", "style", STYLE, "dashed")),
             (Mark("now", "tolerance", "content", "c of the slider", GOLD), Mark("now", "tolerance", "style", "c of the slider (style)", STYLE))),
    ),
    readings=(
        Reading("own", "Share of own answers.", "now", "own"),
        Reading("paraphrased", "Share of paraphrases.", "now", "paraphrase"),
        Reading("gold", "Share of gold answers.", "now", "gold"),
        Reading("τ of content", "Equivalent ensemble coefficient (docs, T2).", "now", "content"),
        Reading("τ of style", "Equivalent ensemble coefficient (docs, T2).", "now", "style"),
        Reading("content risk", "SFT: 0 with unlimited data.", "now", "content_risk"),
        Reading("forgetting", "Pretraining risk, all outputs.", "now", "forgetting"),
        Reading("SFT forgets", "Pretraining risk of supervised fine-tuning.", "supervised", "forgetting"),
    ),
    suggestions={
        "Paraphrases always succeed: style is left alone": {"paraphrase": 1.0},
        "A gullible judge: nothing is learned from some": {"false_accept": 0.5},
        "No style at all: S3FT is averaging": {"style_dimension": 0, "paraphrase": 0.0},
    },
    overlay=Overlay("exact risk on 8 sampled designs", replicate, 8, ("tolerance",),
                    (Points("shares", "tolerance", "own", "own answer, designs", OWN), Points("shares", "tolerance", "gold", "gold answer, designs", GOLD),
                     Points("risks", "tolerance", "forgetting", "forgetting, designs", PRETRAINED), Points("risks", "tolerance", "content_risk", "content risk, designs", GOLD))),
)  # fmt: skip
