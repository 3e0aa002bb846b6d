"""Experiments that a sweep can run: what each one takes, what it gives, and the kernel that measures it.

A kernel is a pure function (key, parameters) → named arrays. Parameters that one factorisation serves (τ, λ, t, σ) are
*batched*: the kernel gets all their values at once, as float arrays, and its outputs vary along them. Every other
parameter is a plain number or word, and a value of its own means another call. Importing this module loads neither
JAX nor numpy: the command line makes its options of the descriptions.
"""

import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sims.parameters import ALIGNMENT, DECAY, LAW, NOISE_STD, PENALTY, PRETRAIN_RISK, RISK, TAU, TIME, N, P, Parameter

if TYPE_CHECKING:
    from jax import Array

    from linfit import TwoTaskProblem

__all__ = ["EXPERIMENTS", "Experiment", "Output", "find_experiment"]


class Output(NamedTuple):
    """What an experiment gives for one replicate: an array of real numbers, never NaN."""

    dims: tuple[str, ...]
    """The batched parameters along which it varies, in the order of its axes."""
    help: str
    unit: str = "1"
    best: Literal["least", "largest"] | None = None
    """Which end is good, where one is."""


class Experiment(NamedTuple):
    """A pure function (key, parameters) → {name: array}, and the description of both sides.

    >>> from sims.parameters import Parameter
    >>> from sims.sweep import Experiment, Output, run, sweep_over
    >>> def measure(key, parameters):
    ...     return {"square": parameters["x"] ** 2}
    >>> takes, gives = {"x": Parameter("a number", 1.0, batched=True)}, {"square": Output(("x",), "its square")}
    >>> sweep_over(Experiment("mine.py:SQUARES", "Squares", measure, takes, gives), {"x": "0:1:11"}).batched_dims
    {'x': 11}
    """

    name: str
    """In `EXPERIMENTS`, or where `find_experiment` finds it, so that a store can be resumed."""
    help: str
    measure: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    """A function that can be imported by its name: worker processes look it up."""
    parameters: dict[str, Parameter]
    """The type of a default (int, float, str) is that of the values."""
    outputs: dict[str, Output]
    randomness: Literal["jax", "numpy"] = "jax"
    """What the key of replicate i is: jax.random.fold_in(key(seed), i), or numpy's SeedSequence([seed, i])."""


_BED = {"n": N, "p": P, "decay": DECAY, "alignment": ALIGNMENT, "pretrain_risk": PRETRAIN_RISK, "law": LAW}
"""What `_problem` and its design are made of."""
_NOISE_STD, _PENALTY, _TIME, _TAU = (one._replace(batched=True) for one in (NOISE_STD, PENALTY, TIME, TAU))


def _problem(parameters: Mapping[str, Any], noise_std: Any = 0.0) -> "TwoTaskProblem":
    """The test bed of the figures (`linfit.aligned_problem`)."""
    from linfit import aligned_problem, spectra

    spectrum = spectra.power_law(parameters["p"], parameters["decay"])
    given = {name: parameters[name] for name in ("alignment", "pretrain_risk")}
    return aligned_problem(spectrum, noise_std=noise_std, **given)


def measure_overadaptation(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """Exact risks of ridge and of gradient flow on one random design, along τ, λ or t, and σ (docs, S2–S3)."""
    from linfit import GradientFlow, Ridge, risk_forms, sample_design

    problem = _problem(parameters)
    X = sample_design(key, problem.finetune_covariance, parameters["n"], parameters["law"])
    forms, filters = risk_forms(X, problem), (Ridge(parameters["penalty"]), GradientFlow(parameters["time"]))
    ridge, flow = (_along()(forms, filter, parameters["tau"], parameters["noise_std"]) for filter in filters)
    return ridge | {f"{name}_stopped": values for name, values in flow.items()}


@cache
def _along() -> "Callable[..., dict[str, Array]]":
    """Compiled once in a process: risks of a family of filters along σ, the filter's hyperparameter, and τ."""
    import jax

    @jax.jit
    @partial(jax.vmap, in_axes=(None, None, None, 0))
    def along(forms: Any, filter: Any, tau: "Array", noise_std: "Array") -> "dict[str, Array]":
        parabolas = forms.map(lambda form: form.with_noise_std(noise_std).along(filter))
        finetune, pretrain = parabolas.map(lambda parabola: parabola(tau[:, None]))
        return {
            "finetune": finetune.total.T,
            "finetune_bias": finetune.bias.T,
            "pretrain": pretrain.total.T,
            "best_tau": parabolas.finetune.optimal_tau,
        }

    return along


OVERADAPTATION = Experiment(
    "overadaptation",
    "Exact risk of fine-tuning and averaging on random designs: ridge and early stopping, both domains.",
    measure_overadaptation,
    {**_BED, "noise_std": _NOISE_STD, "penalty": _PENALTY, "time": _TIME, "tau": _TAU},
    {
        "finetune": Output(("noise_std", "penalty", "tau"), "fine-tuning risk of ridge", RISK, "least"),
        "finetune_bias": Output(("noise_std", "penalty", "tau"), "its squared bias", RISK),
        "pretrain": Output(("noise_std", "penalty", "tau"), "pretraining risk of ridge", RISK, "least"),
        "best_tau": Output(("noise_std", "penalty"), "the τ of least fine-tuning risk"),
        "finetune_stopped": Output(("noise_std", "time", "tau"), "fine-tuning risk of gradient flow", RISK, "least"),
        "finetune_bias_stopped": Output(("noise_std", "time", "tau"), "its squared bias", RISK),
        "pretrain_stopped": Output(("noise_std", "time", "tau"), "pretraining risk of gradient flow", RISK, "least"),
        "best_tau_stopped": Output(("noise_std", "time"), "the τ of least fine-tuning risk of gradient flow"),
    },
)


def measure_equivalents(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """Exact ridge risks of one random design and the deterministic equivalents of the same (docs, D1–D3)."""
    import jax.numpy as jnp

    from linfit import Ridge, risk_forms, sample_design
    from theory.equivalents import along

    filter, problem = Ridge(parameters["penalty"]), _problem(parameters)
    X = sample_design(key, problem.finetune_covariance, parameters["n"], parameters["law"])
    forms, rows = risk_forms(X, problem), []
    for noise_std in parameters["noise_std"]:
        measured = [form.with_noise_std(noise_std).along(filter) for form in forms]
        predicted = along(_problem(parameters, noise_std), parameters["n"], filter)
        rows.append([parabola(parameters["tau"][:, None]).total.mT for parabola in (*measured, *predicted)])
    names = ("finetune", "pretrain", "finetune_predicted", "pretrain_predicted")
    found = {name: jnp.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    gaps = {f"{name}_gap": found[name] / found[f"{name}_predicted"] - 1 for name in ("finetune", "pretrain")}
    return found | gaps


_ALONG_RIDGE = ("noise_std", "penalty", "tau")

EQUIVALENTS = Experiment(
    "equivalents",
    "Exact ridge risk on random designs beside its prediction without sampling.",
    measure_equivalents,
    {**_BED, "noise_std": _NOISE_STD, "penalty": _PENALTY, "tau": _TAU},
    {
        "finetune": Output(_ALONG_RIDGE, "fine-tuning risk of ridge", RISK, "least"),
        "finetune_predicted": Output(_ALONG_RIDGE, "its deterministic equivalent, the same for all replicates", RISK),
        "finetune_gap": Output(_ALONG_RIDGE, "relative gap between the two"),
        "pretrain": Output(_ALONG_RIDGE, "pretraining risk of ridge", RISK, "least"),
        "pretrain_predicted": Output(_ALONG_RIDGE, "its deterministic equivalent, the same for all replicates", RISK),
        "pretrain_gap": Output(_ALONG_RIDGE, "relative gap between the two"),
    },
)


def measure_overtraining(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """Checkpoints of one pretraining run, perturbed by noise of every size, and fine-tuned to another task."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from linfit import network
    from sims.overtraining import losses_under_noise, pretrain, sample_rotated_task, sample_target

    target_key, noise_key, task_key = jax.random.split(key, 3)
    target = sample_target(target_key, parameters["size"], parameters["exponent"])
    times, gammas = np.asarray(parameters["time"]), jnp.asarray(parameters["gamma"])
    order = np.argsort(times)
    checkpoints = pretrain(target, times[order], initial=parameters["initial"], step_size=parameters["step_size"])
    checkpoints = jax.tree.map(lambda weights: weights[np.argsort(order)], checkpoints)
    task = sample_rotated_task(task_key, target, parameters["angle"])
    rates = network.constant(parameters["step_size"], parameters["finetune_steps"])
    after = network.descend(checkpoints, task, rates, penalty=parameters["penalty"])
    return {
        "loss": network.loss(checkpoints, target),
        "perturbed": losses_under_noise(noise_key, checkpoints, target, gammas),
        "finetuned": network.loss(after, task),
        "degradation": network.loss(after, target) - network.loss(checkpoints, target),
    }


_LOSS = "squared units of W"

OVERTRAINING = Experiment(
    "overtraining",
    "Two-layer linear networks along pretraining: perturbed by Gaussian noise, and fine-tuned to a rotated task.",
    measure_overtraining,
    {
        "size": Parameter("rows, columns and hidden units of the network", 16),
        "exponent": Parameter("decay of the target's singular values, a_i = i^−exponent", 1.0),
        "initial": Parameter("singular values at the start", 0.01),
        "step_size": Parameter("step size of pretraining and fine-tuning", 0.1, unit="time"),
        "angle": Parameter("rotation between the pretraining and the fine-tuning task", 0.5, unit="radians"),
        "penalty": Parameter("pull towards the pretrained weights, (μ/2)‖θ − θ_pre‖²", 0.0),
        "finetune_steps": Parameter("gradient steps of fine-tuning", 100),
        "time": Parameter("pretraining time, step size × steps", 50.0, unit="time", batched=True),
        "gamma": Parameter("standard deviation of the noise on every weight", 0.1, batched=True),
    },
    {
        "loss": Output(("time",), "pretraining loss ½‖W − A‖²", _LOSS, "least"),
        "perturbed": Output(("gamma", "time"), "pretraining loss after the perturbation", _LOSS, "least"),
        "finetuned": Output(("time",), "fine-tuning loss after fine-tuning", _LOSS, "least"),
        "degradation": Output(("time",), "rise of the pretraining loss by fine-tuning", _LOSS, "least"),
    },
)


def measure_flow(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """Weighted fine-tuning of one draw of design, shift and noise: exact risks along the tilt, t and τ (docs, §4)."""
    import jax.numpy as jnp

    from linfit import GradientFlow, Parabola

    problem = _problem(parameters, parameters["noise_std"])
    run = _weighted(tuple(map(float, parameters["tilt"])), parameters["n"], parameters["law"], parameters["deviation"])
    found = {name: values[0] for name, values in run(key, problem, GradientFlow(parameters["time"])).items()}
    slope, curvature = found["slope"][..., None], found["curvature"][..., None]
    along = Parabola(found["constant"][..., None, None], slope, curvature, jnp.zeros(()))
    finetune, pretrain, hardest = jnp.moveaxis(along(parameters["tau"]).total, 1, 0)
    shares = {"share": found["share"], "step": found["step"]}
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
        "deviation": Parameter("what keeps y from being linear in x: gaussian, outliers or misfit", "gaussian"),
        "noise_std": NOISE_STD,
        "tilt": Parameter(
            "tilt c of the weights exp(−c·loss/median); 1 is FLOW, 0 unweighted, < 0 robust", 1.0, batched=True
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


def measure_s3ft(key: "Array", parameters: Mapping[str, Any]) -> "dict[str, Array]":
    """S3FT by ridge on one draw of the shift, the design, the noise and all answers (docs, §5)."""
    import jax
    import jax.numpy as jnp

    from sims.s3ft import content_and_style_problem
    from theory.s3ft import Procedure

    problem_key, design_key, sample_key = jax.random.split(key, 3)
    names = ("decay", "alignment", "content_signal", "style_signal")
    problem = content_and_style_problem(
        problem_key,
        parameters["p"],
        parameters["content_rank"],
        parameters["style_dimension"],
        noise_std=parameters["noise_std"],
        **{name: parameters[name] for name in names},
    )
    axes = [parameters[name] for name in _PROCEDURE]
    settings = [jnp.ravel(values) for values in jnp.meshgrid(*axes, indexing="ij")]
    procedure = Procedure(**dict(zip(_PROCEDURE, settings, strict=True)))
    run = _self_supervised(parameters["n"], parameters["law"])
    found = run(design_key, sample_key, problem, procedure, jnp.asarray(parameters["penalty"]))
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
    def run(design_key: "Array", sample_key: "Array", problem: Any, procedure: Any, penalty: "Array") -> Any:
        X = sample_design(design_key, problem.finetune_covariance, n, law)
        return jax.lax.map(lambda one: measure_once(sample_key, X, problem, procedure, Ridge(one)), penalty)

    return run


_PROCEDURE = ("tolerance", "paraphrase_success", "false_accept", "false_reject", "sampling_std")
_ALONG_PROCEDURE = ("penalty", *_PROCEDURE)

S3FT = Experiment(
    "s3ft",
    "Selective self-supervised fine-tuning on answers with content and style; tolerance 0 without paraphrases is SFT.",
    measure_s3ft,
    {
        **{name: _BED[name] for name in ("n", "p", "decay", "alignment", "law")},
        "content_rank": Parameter("outputs that are content", 2),
        "style_dimension": Parameter("outputs that are style", 2),
        "content_signal": Parameter("variance of the shift in each content output", 1.0, unit=RISK),
        "style_signal": Parameter("variance of the shift in each style output", 1.0, unit=RISK),
        "noise_std": NOISE_STD._replace(help="standard deviation of the noise in the content of gold answers"),
        "penalty": _PENALTY,
        "tolerance": Parameter("miss in content up to which the judge accepts", 1.0, unit="units of y", batched=True),
        "paraphrase_success": Parameter("probability that gold can be paraphrased", 1.0, batched=True),
        "false_accept": Parameter("probability that the judge accepts a wrong answer", 0.0, batched=True),
        "false_reject": Parameter("probability that the judge rejects a right answer", 0.0, batched=True),
        "sampling_std": Parameter("standard deviation of own answers", 0.0, unit="units of y", batched=True),
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

EXPERIMENTS = {experiment.name: experiment for experiment in (OVERADAPTATION, EQUIVALENTS, OVERTRAINING, FLOW, S3FT)}
"""What `linfit sweep NAME` can run."""


def find_experiment(name: str) -> Experiment:
    """The experiment of that name in `EXPERIMENTS`, or one of a user's own; ValueError if there is none.

    "path/to/file.py:NAME" is the attribute NAME of that file. "module:NAME" is that of an installed module, or, where
    no installed one has that name, of ./module.py. A file is loaded by its path: no folder is added to `sys.path`, so
    what lies beside it neither shadows a package nor can be imported by it.

    >>> from sims.sweep.experiments import find_experiment
    >>> find_experiment("sims.sweep.experiments:OVERADAPTATION").help[:10]
    'Exact risk'
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    place, _, attribute = name.rpartition(":")
    known = f"one of {', '.join(EXPERIMENTS)}, or file.py:NAME, or module:NAME"
    if not place:
        raise ValueError(f"experiment must be {known}; got {name!r}")
    try:
        found = getattr(load_file(place) if place.endswith(".py") else _load_module(place), attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"experiment must be {known}; {name!r} cannot be imported: {error}") from None
    if not isinstance(found, Experiment):
        raise ValueError(f"experiment must be {known}; {name!r} is of type {type(found).__name__}")
    return found._replace(name=f"{Path(place).resolve()}:{attribute}" if place.endswith(".py") else name)


def _load_module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        file = Path(*name.split(".")).with_suffix(".py")
        if not (file.exists() and f"{name}.".startswith(f"{error.name}.")):  # else it is there, but lacks a package
            raise
        return load_file(file)


def load_file(path: Path | str) -> ModuleType:
    """The module in a file, under a name made of its absolute path, without dots, so that it can be pickled."""
    path = Path(path).resolve()
    name = str(path).replace("%", "%25").replace(".", "%2E")
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
