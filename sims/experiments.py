"""Experiments that a sweep can run: what each one takes, what it gives, and the kernel that measures it.

A kernel is a pure function (key, parameters) → named arrays. Parameters that one factorisation serves (τ, λ, t, σ) are
*batched*: the kernel gets all their values at once, as float arrays, and its outputs vary along them. Every other
parameter is a plain number or word, and a value of its own means another call. Importing this module loads neither
JAX nor numpy.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from jax import Array

    from linfit import TwoTaskProblem

RISK = "squared units of y"

SETTINGS = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "NPROC"), "1") | {
    "JAX_ENABLE_X64": "1"
}
"""Environment of every process that runs a kernel: one thread, so that no bit depends on a split; double precision."""


class Parameter(NamedTuple):
    """What an experiment takes; the type of `default` (int, float, str) is the type of its values."""

    default: int | float | str
    help: str
    units: str = "1"
    batched: bool = False
    """Whether the kernel gets all values at once."""


class Output(NamedTuple):
    """What an experiment gives for one replicate: an array of real numbers, never NaN."""

    dims: tuple[str, ...]
    """The batched parameters along which it varies, in the order of its axes."""
    help: str
    units: str = "1"
    best: Literal["least", "largest"] | None = None
    """Which end is good, where one is."""


class Experiment(NamedTuple):
    """A pure function (key, parameters) → {name: array}, and the description of both sides."""

    name: str
    """In `EXPERIMENTS`, or "module:attribute" where it is defined elsewhere."""
    help: str
    measure: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    """A function that can be imported by its name: worker processes look it up."""
    parameters: dict[str, Parameter]
    outputs: dict[str, Output]
    randomness: Literal["jax", "numpy"] = "jax"
    """What the key of replicate i is: jax.random.fold_in(key(seed), i), or numpy's SeedSequence([seed, i])."""


_N = Parameter(100, "fine-tuning samples n")
_P = Parameter(1000, "features p")
_DECAY = Parameter(1.0, "decay of the spectrum, Σ = diag(j^−decay)")
_ALIGNMENT = Parameter(0.0, "alignment of the shift, Ω ∝ Σ^alignment with tr ΩΣ = 1; −1 tail, +1 head")
_PRETRAIN_RISK = Parameter(0.1, "risk of the pretrained weights on their own task", RISK)
_LAW = Parameter("gaussian", "law of the design's coordinates: gaussian, rademacher, uniform or student")
_BED = {
    "n": _N,
    "p": _P,
    "decay": _DECAY,
    "alignment": _ALIGNMENT,
    "pretrain_risk": _PRETRAIN_RISK,
    "law": _LAW,
}
"""What `_problem` and its design are made of."""
_PENALTY = Parameter(0.01, "ridge penalty λ", "units of the eigenvalues", batched=True)
_TIME = Parameter(100.0, "time t of gradient flow", "1 / units of the eigenvalues", batched=True)
_TAU = Parameter(1.0, "ensemble coefficient τ; 0 is the pretrained model", batched=True)
_NOISE = Parameter(0.5, "standard deviation σ of the label noise", "units of y", batched=True)


def _problem(parameters: Mapping[str, Any], **options: Any) -> "TwoTaskProblem":
    """The test bed of the figures (`linfit.aligned_problem`)."""
    from linfit import aligned_problem, spectra

    given = {name: parameters[name] for name in ("decay", "alignment", "pretrain_risk")}
    return aligned_problem(spectra.power_law(parameters["p"]), **given, **options)


# ------------------------------------------------------------------------------------------------ overadaptation


def measure_overadaptation(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """Exact risks of ridge and of gradient flow on one random design, along τ, λ or t, and σ (docs, S2–S3)."""
    from linfit import GradientFlow, Ridge, risk_forms, sample_design

    problem = _problem(parameters)
    X = sample_design(key, problem.finetune_covariance, parameters["n"], parameters["law"])
    forms = risk_forms(X, problem)
    ridge, flow = Ridge(parameters["penalty"]), GradientFlow(parameters["time"])
    along_ridge, along_flow = (
        _along()(forms, filter, parameters["tau"], parameters["noise"]) for filter in (ridge, flow)
    )
    return along_ridge | {f"{name}_stopped": values for name, values in along_flow.items()}


@cache
def _along() -> "Callable[..., dict[str, Array]]":
    """Compiled once in a process: risks of a family of filters along σ, the filter's hyperparameter, and τ."""
    import jax

    @jax.jit
    @partial(jax.vmap, in_axes=(None, None, None, 0))
    def along(forms: Any, filter: Any, tau: "Array", noise: "Array") -> "dict[str, Array]":
        finetune, pretrain = (form.with_noise_std(noise) for form in forms)
        risk = finetune(filter, tau[:, None])
        return {
            "finetune": risk.total.T,
            "finetune_bias": risk.bias.T,
            "pretrain": pretrain(filter, tau[:, None]).total.T,
            "best_tau": finetune.optimal_tau(filter),
        }

    return along


OVERADAPTATION = Experiment(
    "overadaptation",
    "Exact risk of fine-tuning and averaging on random designs: ridge and early stopping, both domains.",
    measure_overadaptation,
    {
        **_BED,
        "noise": _NOISE,
        "penalty": _PENALTY,
        "time": _TIME,
        "tau": _TAU,
    },
    {
        "finetune": Output(("noise", "penalty", "tau"), "fine-tuning risk of ridge", RISK, "least"),
        "finetune_bias": Output(("noise", "penalty", "tau"), "its squared bias", RISK),
        "pretrain": Output(("noise", "penalty", "tau"), "pretraining risk of ridge", RISK, "least"),
        "best_tau": Output(("noise", "penalty"), "the τ of least fine-tuning risk"),
        "finetune_stopped": Output(("noise", "time", "tau"), "fine-tuning risk of gradient flow", RISK, "least"),
        "finetune_bias_stopped": Output(("noise", "time", "tau"), "its squared bias", RISK),
        "pretrain_stopped": Output(("noise", "time", "tau"), "pretraining risk of gradient flow", RISK, "least"),
        "best_tau_stopped": Output(("noise", "time"), "the τ of least fine-tuning risk of gradient flow"),
    },
)

# --------------------------------------------------------------------------------------------------- equivalents


def measure_equivalents(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """Exact ridge risks of one random design and the deterministic equivalents of the same (docs, D1–D3)."""
    import jax.numpy as jnp

    from linfit import Ridge, risk_forms, sample_design
    from theory.equivalents import risk

    filter, tau = Ridge(parameters["penalty"]), parameters["tau"][:, None]
    problem = _problem(parameters)
    X = sample_design(key, problem.finetune_covariance, parameters["n"], parameters["law"])
    forms = risk_forms(X, problem)
    measured, predicted = [], []
    for noise in parameters["noise"]:
        problem = _problem(parameters, noise_variance=noise**2)
        measured.append([form.with_noise_std(noise)(filter, tau).total.mT for form in forms])
        predicted.append([prediction.total.mT for prediction in risk(problem, parameters["n"], filter, tau)])
    (finetune, pretrain), (finetune_predicted, pretrain_predicted) = (
        [jnp.stack(column) for column in zip(*rows, strict=True)] for rows in (measured, predicted)
    )
    return {
        "finetune": finetune,
        "finetune_predicted": finetune_predicted,
        "finetune_gap": finetune / finetune_predicted - 1,
        "pretrain": pretrain,
        "pretrain_predicted": pretrain_predicted,
        "pretrain_gap": pretrain / pretrain_predicted - 1,
    }


_ALONG_RIDGE = ("noise", "penalty", "tau")

EQUIVALENTS = Experiment(
    "equivalents",
    "Exact ridge risk on random designs beside its prediction without sampling.",
    measure_equivalents,
    {
        **_BED,
        "noise": _NOISE,
        "penalty": _PENALTY,
        "tau": _TAU,
    },
    {
        "finetune": Output(_ALONG_RIDGE, "fine-tuning risk of ridge", RISK, "least"),
        "finetune_predicted": Output(_ALONG_RIDGE, "its deterministic equivalent, the same for all replicates", RISK),
        "finetune_gap": Output(_ALONG_RIDGE, "relative gap between the two"),
        "pretrain": Output(_ALONG_RIDGE, "pretraining risk of ridge", RISK, "least"),
        "pretrain_predicted": Output(_ALONG_RIDGE, "its deterministic equivalent, the same for all replicates", RISK),
        "pretrain_gap": Output(_ALONG_RIDGE, "relative gap between the two"),
    },
)

# -------------------------------------------------------------------------------------------------- overtraining


def measure_overtraining(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """Checkpoints of one pretraining run, perturbed by noise of every size, and fine-tuned to another task."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from linfit import network
    from sims.overtraining import power_law_target, pretrain, rotated_task

    target_key, noise_key, task_key = jax.random.split(key, 3)
    target = power_law_target(target_key, parameters["size"], parameters["exponent"])
    times, gammas = np.asarray(parameters["time"]), jnp.asarray(parameters["gamma"])
    order = np.argsort(times)
    checkpoints = pretrain(target, times[order], initial=parameters["initial"], step_size=parameters["step_size"])
    checkpoints = jax.tree.map(lambda weights: weights[np.argsort(order)], checkpoints)
    common = jax.tree.map(lambda weights: jnp.zeros_like(weights[0]), checkpoints)
    noise = network.perturb(noise_key, common, 1.0)  # one draw for all checkpoints and sizes

    def perturbed(gamma: "Array") -> "Array":
        return network.loss(jax.tree.map(lambda w, e: w + gamma * e, checkpoints, noise), target)

    task = rotated_task(task_key, target, parameters["angle"])
    rates = network.constant(parameters["step_size"], parameters["finetune_steps"])
    after = network.descend(checkpoints, task, rates, penalty=parameters["penalty"])
    return {
        "loss": network.loss(checkpoints, target),
        "perturbed": jax.lax.map(perturbed, gammas),
        "finetuned": network.loss(after, task),
        "degradation": network.loss(after, target) - network.loss(checkpoints, target),
    }


_LOSS = "squared units of W"

OVERTRAINING = Experiment(
    "overtraining",
    "Two-layer linear networks along pretraining: perturbed by Gaussian noise, and fine-tuned to a rotated task.",
    measure_overtraining,
    {
        "size": Parameter(16, "rows, columns and hidden units of the network"),
        "exponent": Parameter(1.0, "decay of the target's singular values, a_i = i^−exponent"),
        "initial": Parameter(0.01, "singular values at the start"),
        "step_size": Parameter(0.1, "step size of pretraining and fine-tuning", "time"),
        "angle": Parameter(0.5, "rotation between the pretraining and the fine-tuning task", "radians"),
        "penalty": Parameter(0.0, "pull towards the pretrained weights, (μ/2)‖θ − θ_pre‖²"),
        "finetune_steps": Parameter(100, "gradient steps of fine-tuning"),
        "time": Parameter(50.0, "pretraining time, step size × steps", "time", batched=True),
        "gamma": Parameter(0.1, "standard deviation of the noise on every weight", batched=True),
    },
    {
        "loss": Output(("time",), "pretraining loss ½‖W − A‖²", _LOSS, "least"),
        "perturbed": Output(("gamma", "time"), "pretraining loss after the perturbation", _LOSS, "least"),
        "finetuned": Output(("time",), "fine-tuning loss after fine-tuning", _LOSS, "least"),
        "degradation": Output(("time",), "rise of the pretraining loss by fine-tuning", _LOSS, "least"),
    },
)

# ---------------------------------------------------------------------------------------------------------- FLOW


def measure_flow(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """Weighted fine-tuning of one draw of design, shift and noise: exact risks along the tilt, t and τ (docs, §4)."""
    import jax.numpy as jnp

    from linfit import GradientFlow

    problem = _problem(parameters, noise_std=parameters["noise"])
    run = _weighted(tuple(map(float, parameters["tilt"])), parameters["n"], parameters["law"], parameters["deviation"])
    found = run(key, problem, GradientFlow(parameters["time"]))
    constant, slope, curvature = (found[name][0, ..., None] for name in ("constant", "slope", "curvature"))
    tau = jnp.asarray(parameters["tau"])
    risks = jnp.moveaxis(constant[..., None, :] - 2 * tau * slope + tau**2 * curvature, 1, 0)
    finetune, pretrain, hardest = risks
    shares = {"share": found["share"][0], "step": found["step"][0]}
    return {"finetune": finetune, "pretrain": pretrain, "hardest": hardest} | shares


@cache
def _weighted(tilts: tuple[float, ...], n: int, law: str, deviation: str) -> "Callable[..., dict[str, Array]]":
    """Compiled once in a process: one draw, fine-tuned with the weights of every tilt."""
    import jax

    from sims.flow import measure_once, tilted

    weightings = {str(tilt): tilted(tilt) for tilt in tilts}
    return jax.jit(lambda key, problem, filter: measure_once(key, problem, n, weightings, filter, law, (deviation,)))


_ALONG_FLOW = ("tilt", "time", "tau")

FLOW = Experiment(
    "flow",
    "Fine-tuning weighted by pretrained losses (FLOW), along the temperature and training time, in both domains.",
    measure_flow,
    {
        **_BED,
        "deviation": Parameter("gaussian", "what keeps y from being linear in x: gaussian, outliers or misfit"),
        "noise": _NOISE._replace(batched=False),
        "tilt": Parameter(
            1.0, "tilt c of the weights exp(−c·loss/median); 1 is FLOW, 0 unweighted, < 0 robust", batched=True
        ),
        "time": _TIME,
        "tau": _TAU,
    },
    {
        "finetune": Output(_ALONG_FLOW, "fine-tuning risk", RISK, "least"),
        "pretrain": Output(_ALONG_FLOW, "pretraining risk", RISK, "least"),
        "hardest": Output(_ALONG_FLOW, "fine-tuning risk on the tenth of largest pretrained loss", RISK, "least"),
        "share": Output(("tilt",), "effective share (Σw)²/nΣw² of the samples"),
        "step": Output(("tilt",), "factor by which the weights shorten steps"),
    },
)

# ---------------------------------------------------------------------------------------------------------- S3FT


def measure_s3ft(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """S3FT by ridge on one draw of the shift, the design, the noise and all answers (docs, §5)."""
    import jax
    import jax.numpy as jnp

    from sims.s3ft import content_and_style_problem
    from theory.s3ft import Procedure

    problem_key, design_key, draw_key = jax.random.split(key, 3)
    names = ("decay", "alignment", "content_signal", "style_signal")
    problem = content_and_style_problem(
        problem_key,
        parameters["p"],
        parameters["content_rank"],
        parameters["style_dimension"],
        noise_std=parameters["noise"],
        **{name: parameters[name] for name in names},
    )
    axes = [parameters[name] for name in _PROCEDURE]
    settings = [jnp.ravel(values) for values in jnp.meshgrid(*axes, indexing="ij")]
    procedure = Procedure(**dict(zip(_PROCEDURE, settings, strict=True)))
    run = _self_supervised(parameters["n"], parameters["law"])
    found = run(design_key, draw_key, problem, procedure, jnp.asarray(parameters["penalty"]))
    shape = [len(values) for values in axes]
    shares = {name: found[name][0].reshape(shape) for name in ("own", "paraphrase", "gold")}
    return shares | {name: values.reshape(-1, *shape) for name, values in found.items() if name not in shares}


@cache
def _self_supervised(n: int, law: str) -> "Callable[..., dict[str, Array]]":
    """Compiled once in a process: every setting of the procedure and every penalty on the same draw."""
    import jax

    from linfit import Ridge, sample_design
    from sims.s3ft import measure_once

    @jax.jit
    def run(design_key: "Array", draw_key: "Array", problem: Any, procedure: Any, penalty: "Array") -> Any:
        X = sample_design(design_key, problem.finetune_covariance, n, law)
        return jax.lax.map(lambda one: measure_once(draw_key, X, problem, procedure, Ridge(one)), penalty)

    return run


_PROCEDURE = ("tolerance", "paraphrase_success", "false_accept", "false_reject", "sampling_std")
_ALONG_PROCEDURE = ("penalty", *_PROCEDURE)

S3FT = Experiment(
    "s3ft",
    "Selective self-supervised fine-tuning on answers with content and style; tolerance 0 without paraphrases is SFT.",
    measure_s3ft,
    {
        "n": _N,
        "p": _P,
        "decay": _DECAY,
        "alignment": _ALIGNMENT,
        "law": _LAW,
        "content_rank": Parameter(2, "outputs that are content"),
        "style_dimension": Parameter(2, "outputs that are style"),
        "content_signal": Parameter(1.0, "variance of the shift in each content output", RISK),
        "style_signal": Parameter(1.0, "variance of the shift in each style output", RISK),
        "noise": Parameter(0.5, "standard deviation of the noise in the content of gold answers", "units of y"),
        "penalty": _PENALTY,
        "tolerance": Parameter(1.0, "miss in content up to which the judge accepts", "units of y", batched=True),
        "paraphrase_success": Parameter(1.0, "probability that gold can be paraphrased", batched=True),
        "false_accept": Parameter(0.0, "probability that the judge accepts a wrong answer", batched=True),
        "false_reject": Parameter(0.0, "probability that the judge rejects a right answer", batched=True),
        "sampling_std": Parameter(0.0, "standard deviation of own answers", "units of y", batched=True),
    },
    {
        "own": Output(_PROCEDURE, "share of own answers among the targets"),
        "paraphrase": Output(_PROCEDURE, "share of paraphrases"),
        "gold": Output(_PROCEDURE, "share of gold answers"),
        "content_risk": Output(_ALONG_PROCEDURE, "fine-tuning risk in content", RISK, "least"),
        "style_risk": Output(_ALONG_PROCEDURE, "fine-tuning risk in style", RISK),
        "content_drift": Output(_ALONG_PROCEDURE, "change of the answers' content", RISK),
        "style_drift": Output(_ALONG_PROCEDURE, "change of the answers' style", RISK),
        "forgetting": Output(_ALONG_PROCEDURE, "pretraining risk", RISK, "least"),
    },
)

# -------------------------------------------------------------------------------------------------------- by name

EXPERIMENTS = {experiment.name: experiment for experiment in (OVERADAPTATION, EQUIVALENTS, OVERTRAINING, FLOW, S3FT)}
"""What `linfit sweep NAME` can run."""


def find_experiment(name: str) -> Experiment:
    """The experiment of `EXPERIMENTS` of that name, or the one at "module:attribute"; ValueError if there is none.

    >>> find_experiment("sims.experiments:OVERADAPTATION").name
    'overadaptation'
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    module, separator, attribute = name.partition(":")
    known = f"one of {', '.join(EXPERIMENTS)}, or module:attribute"
    if not separator:
        raise ValueError(f"experiment must be {known}; got {name!r}")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"experiment must be {known}; {name!r} cannot be imported: {error}") from None
    if not isinstance(found, Experiment):
        raise ValueError(f"experiment must be {known}; {name!r} is of type {type(found).__name__}")
    return found
