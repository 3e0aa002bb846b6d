"""The page of the S3FT paper in its linear form: shares of targets, what is learned and what is forgotten."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Line, Mark, Overlay, Page, Plot, Reading, Simulated, Slider, Suggestion
from figures.style import COLOURS
from linfit import MinNorm, sample_design
from theory.s3ft import (
    SUPERVISED,
    Coefficients,
    Expectation,
    Procedure,
    VectorProblem,
    coefficients,
    conditional,
    population,
)

TOLERANCES = np.linspace(0, 6, 61)
TAUS = np.linspace(0, 1, 51)
CONTENT = 2


def problem_of(style_dimension: int, style_signal: Array | float, noise_variance: Array | float) -> VectorProblem:
    """Two outputs of content, each with signal 1, others of style; Σ₁ = Σ₂ = I, a feature for each output."""
    outputs = CONTENT + style_dimension
    content, flat = np.arange(outputs) < CONTENT, np.ones(outputs)
    size = jnp.where(content, 1.0, style_signal**0.5)
    return VectorProblem(flat, flat, jnp.diag(size), content, noise_variance**0.5, 0.0)


def procedure_of(
    tolerance: Array | np.ndarray,
    false_accept: Array | float,
    false_reject: Array | float,
    paraphrase: Array | float,
    sampling_std: Array | float,
) -> Procedure:
    """How targets are made, for one tolerance or many."""
    return Procedure(tolerance, paraphrase, false_accept, false_reject, sampling_std)


@partial(jax.jit, static_argnames="style_dimension")
def predict(
    procedure: Procedure, style_dimension: int, style_signal: Array, noise_variance: Array
) -> tuple[Expectation, Expectation, Expectation, Coefficients]:
    """Outcome of the procedure, of the same without paraphrases and of supervised fine-tuning, and coefficients."""
    problem = problem_of(style_dimension, style_signal, noise_variance)
    return (
        population(problem, procedure),
        population(problem, procedure._replace(paraphrase_success=0.0)),
        population(problem, SUPERVISED),
        coefficients(procedure, CONTENT, (1 + noise_variance) ** 0.5),
    )


def curves(
    *,
    tolerance: float,
    false_accept: float,
    false_reject: float,
    paraphrase: float,
    style_dimension: int,
    style_signal: float,
    noise_variance: float,
    sampling_std: float,
    n: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Shares, coefficients and risks with unlimited data (docs, T2; ours)."""
    tolerances = np.concatenate([[tolerance], TOLERANCES])
    procedure = procedure_of(tolerances, false_accept, false_reject, paraphrase, sampling_std)
    outcome, without, supervised, learned = jax.device_get(
        predict(procedure, style_dimension, style_signal, noise_variance)
    )
    columns = {
        **outcome.shares._asdict(),
        "content": learned.content,
        "style": learned.style,
        "content_risk": outcome.content_risk,
        "style_drift": outcome.style_drift,
        "forgetting": outcome.forgetting,
        "content_risk_without": without.content_risk,
        "forgetting_without": without.forgetting,
    }
    forgotten = supervised.forgetting
    return {
        "tolerance": {"tolerance": TOLERANCES, **{name: values[1:] for name, values in columns.items()}},
        "now": {"tolerance": tolerances[:1], **{name: values[:1] for name, values in columns.items()}},
        "averaging": {"tau": TAUS, "content_risk": CONTENT * (1 - TAUS) ** 2, "forgetting": TAUS**2 * forgotten},
        "supervised": {
            "tolerance": TOLERANCES[[0, -1]],
            "forgetting": np.full(2, forgotten),
            "content_risk": np.full(2, supervised.content_risk),
        },
    }


def design(
    index: int,
    *,
    tolerance: float,
    false_accept: float,
    false_reject: float,
    paraphrase: float,
    style_dimension: int,
    style_signal: float,
    noise_variance: float,
    sampling_std: float,
    n: int,
) -> dict[str, np.ndarray]:
    """The same conditional on one design of n samples (docs, T2; seed 0), averaged exactly over noise and judge."""
    problem = problem_of(style_dimension, style_signal, noise_variance)
    tolerances = TOLERANCES[::5]
    X = sample_design(jax.random.fold_in(jax.random.key(0), index), problem.finetune_covariance, n)
    procedure = procedure_of(tolerances, false_accept, false_reject, paraphrase, sampling_std)
    outcome = conditional(X, problem, procedure, MinNorm())
    return {
        "tolerance": tolerances,
        **{name: np.asarray(share) for name, share in outcome.shares._asdict().items()},
        "content_risk": np.asarray(outcome.content_risk),
        "forgetting": np.asarray(outcome.forgetting),
        "style_drift": np.asarray(outcome.style_drift),
    }


PAPER = "Gupta et al., NAACL Findings 2025, arXiv 2502.08130"
OWN, REWORDED, GOLD = COLOURS["early stopping"], COLOURS["variance"], COLOURS["fine-tuned"]

PAGE = Page(
    name="s3ft",
    title="S3FT",
    source=f"Method: {PAPER}, which has no theory; the linear form and every formula here: ours (docs, T1, T2).",
    introduction=(
        "S3FT trains on the model's <b>own answer</b> where a judge accepts it, on a <b>paraphrase</b> of the gold answer in the "
        "model's own style where that works, and on the <b>gold answer</b> only otherwise. So it learns the content and leaves "
        "the style alone: less forgetting at the same task risk."
    ),
    controls=(
        Slider("tolerance", "judge's tolerance c", f"An answer is right if its content misses gold by at most c, in units of y. The judge is {PAPER}'s; the distance is ours.",
               0, 6, 0.1, 1.0),
        Slider("false_accept", "judge accepts wrong answers", "Probability; the error rate of the judge. Ours.", 0, 1, 0.02, 0.0),
        Slider("false_reject", "judge rejects right answers", "Probability; the error rate of the judge. Ours.", 0, 1, 0.02, 0.0),
        Slider("paraphrase", "paraphrase succeeds", f"Probability that the model can reword a gold answer it did not find. {PAPER} (method); the probability is ours.",
               0, 1, 0.02, 0.8),
        Slider("style_dimension", "style dimension", "Outputs that do not count for correctness; two others do. Ours.", 0, 16, 1, 4),
        Slider("style_signal", "style shift", "How far gold's style is from the model's, in every style output; content has 1. Squared units of y. Ours.",
               0, 4, 0.1, 1.0),
        Slider("noise_variance", "label noise σ²", "Variance of the noise on gold's content, in squared units of y.", 0, 2, 0.05, 0.5),
        Slider("sampling_std", "answer spread s", "Standard deviation of own answers around the prediction (temperature), in units of y. Ours.", 0, 2, 0.05, 0.0),
        Slider("n", "samples n (overlay only)", "Samples of each drawn design of the overlay; the curves have unlimited data.", 50, 2000, 50, 300),
    ),
    curves=curves,
    plots=(
        Plot("trade", "Trade-off: forgetting and task risk", "pretraining risk (forgetting)", "content risk (the task)",
             lines=(Line("tolerance", "forgetting", "content_risk", "S3FT, along c", COLOURS["ridge"]),
                    Line("tolerance", "forgetting_without", "content_risk_without", "without paraphrase", COLOURS["ridge + ensemble"], "dashed"),
                    Line("averaging", "forgetting", "content_risk", "SFT + averaging, along τ", COLOURS["ensemble"], "dotdash")),
             marks=(Mark("now", "forgetting", "content_risk", "c of the slider", COLOURS["ridge"]),
                    Mark("supervised", "forgetting", "content_risk", "SFT", COLOURS["fine-tuned"], "square"))),
        Plot("shares", "Where targets come from", "judge's tolerance c", "share of targets",
             lines=(Line("tolerance", "tolerance", "own", "own answer", OWN), Line("tolerance", "tolerance", "paraphrase", "paraphrase", REWORDED, "dashed"),
                    Line("tolerance", "tolerance", "gold", "gold answer", GOLD, "dotdash")),
             marks=(Mark("now", "tolerance", "own", "c of the slider", OWN),)),
        Plot("risks", "Risks along the tolerance", "judge's tolerance c", "risk (units of y²)",
             lines=(Line("tolerance", "tolerance", "forgetting", "forgetting", COLOURS["pretrained"]), Line("tolerance", "tolerance", "content_risk", "content risk", COLOURS["fine-tuned"], "dashed"),
                    Line("tolerance", "tolerance", "style_drift", "style drift", COLOURS["variance"], "dotdash"),
                    Line("supervised", "tolerance", "forgetting", "forgetting of SFT", "#777777", "dotted")),
             marks=(Mark("now", "tolerance", "forgetting", "c of the slider", COLOURS["pretrained"]),)),
        Plot("coefficients", "Two averages: τ of content, τ of style", "judge's tolerance c", "equivalent τ",
             lines=(Line("tolerance", "tolerance", "content", "content", COLOURS["fine-tuned"]), Line("tolerance", "tolerance", "style", "style", COLOURS["variance"], "dashed")),
             marks=(Mark("now", "tolerance", "content", "c of the slider", COLOURS["fine-tuned"]), Mark("now", "tolerance", "style", "c of the slider (style)", COLOURS["variance"]))),
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
    suggestions=(
        Suggestion("Paraphrases always succeed: style is left alone", {"paraphrase": 1.0}),
        Suggestion("A gullible judge: nothing is learned from some", {"false_accept": 0.5}),
        Suggestion("No style at all: S3FT is averaging", {"style_dimension": 0, "paraphrase": 0.0}),
    ),
    overlay=Overlay("exact risk on 8 drawn designs", design, 8, ("tolerance",),
                    (Simulated("shares", "tolerance", "own", "own answer, designs", OWN), Simulated("shares", "tolerance", "gold", "gold answer, designs", GOLD),
                     Simulated("risks", "tolerance", "forgetting", "forgetting, designs", COLOURS["pretrained"]), Simulated("risks", "tolerance", "content_risk", "content risk, designs", COLOURS["fine-tuned"]))),
)  # fmt: skip
