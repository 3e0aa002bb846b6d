"""Experiments that a sweep can run: what each one takes and gives; the kernels that measure are in `kernels`.

Importing this module loads neither JAX nor numpy: the command line makes its options of the descriptions.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from sims.parameters import ALIGNMENT, DECAY, LAW, NOISE_STD, PENALTY, PRETRAIN_RISK, RISK, TAU, TIME, N, P, Parameter

__all__ = ["EXPERIMENTS", "Experiment", "Output", "find_experiment"]

Parameters = Mapping[str, Any]


class Output(NamedTuple):
    """What an experiment gives for one replicate: an array of real numbers, never NaN."""

    dims: tuple[str, ...]  #: The batched parameters along which it varies, in the order of its axes.
    help: str
    unit: str = "1"
    best: Literal["least", "largest"] | None = None  #: Which end is good, where one is.


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

    name: str  #: In `EXPERIMENTS`, or where `find_experiment` finds it, so that a store can be resumed.
    help: str
    measure: Callable[[Any, Parameters], Mapping[str, Any]]  #: Importable by its name: worker processes look it up.
    parameters: dict[str, Parameter]  #: The type of a default (int, float, str) is that of the values.
    outputs: dict[str, Output]
    randomness: Literal["jax", "numpy"] = "jax"
    """What the key of replicate i is: jax.random.fold_in(key(seed), i), or numpy's SeedSequence([seed, i])."""


_ALONG_RIDGE, _ALONG_FLOW = ("noise_std", "penalty", "tau"), ("tilt", "time", "tau")
_BED = {"n": N, "p": P, "decay": DECAY, "alignment": ALIGNMENT, "pretrain_risk": PRETRAIN_RISK, "law": LAW}
_NOISE_STD, _PENALTY, _TIME, _TAU = (one._replace(batched=True) for one in (NOISE_STD, PENALTY, TIME, TAU))


def _kernel(name: str, key: Any, parameters: Parameters) -> Mapping[str, Any]:
    from sims.sweep import kernels  # loads JAX

    return getattr(kernels, name)(key, parameters)


def _ours(name: str, help: str, parameters: dict[str, Parameter], outputs: dict[str, Output]) -> Experiment:
    return Experiment(name, help, partial(_kernel, name), parameters, outputs)


OVERADAPTATION = _ours(
    "overadaptation",
    "Exact risk of fine-tuning and averaging on random designs: ridge and early stopping, both domains.",
    {**_BED, "noise_std": _NOISE_STD, "penalty": _PENALTY, "time": _TIME, "tau": _TAU},
    {
        "finetune": Output(_ALONG_RIDGE, "fine-tuning risk of ridge", RISK, "least"),
        "finetune_bias": Output(_ALONG_RIDGE, "its squared bias", RISK),
        "pretrain": Output(_ALONG_RIDGE, "pretraining risk of ridge", RISK, "least"),
        "best_tau": Output(("noise_std", "penalty"), "the τ of least fine-tuning risk"),
        "finetune_stopped": Output(("noise_std", "time", "tau"), "fine-tuning risk of gradient flow", RISK, "least"),
        "finetune_bias_stopped": Output(("noise_std", "time", "tau"), "its squared bias", RISK),
        "pretrain_stopped": Output(("noise_std", "time", "tau"), "pretraining risk of gradient flow", RISK, "least"),
        "best_tau_stopped": Output(("noise_std", "time"), "the τ of least fine-tuning risk of gradient flow"),
    },
)

EQUIVALENTS = _ours(
    "equivalents",
    "Exact ridge risk on random designs beside its prediction without sampling.",
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

_LOSS = "squared units of W"
OVERTRAINING = _ours(
    "overtraining",
    "Two-layer linear networks along pretraining: perturbed by Gaussian noise, and fine-tuned to a rotated task.",
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

_TILT = Parameter("tilt c of the weights exp(−c·loss/median); 1 is FLOW, 0 unweighted, < 0 robust", 1.0, batched=True)
FLOW = _ours(
    "flow",
    "Fine-tuning weighted by pretrained losses (FLOW), along the temperature and training time, in both domains.",
    {
        **_BED,
        "deviation": Parameter("what keeps y from being linear in x: gaussian, outliers or misfit", "gaussian"),
        "noise_std": NOISE_STD,
        "tilt": _TILT,
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

_PROCEDURE = ("tolerance", "paraphrase_success", "false_accept", "false_reject", "sampling_std")
_ALONG_PROCEDURE = ("penalty", *_PROCEDURE)
S3FT = _ours(
    "s3ft",
    "Selective self-supervised fine-tuning on answers with content and style; tolerance 0 without paraphrases is SFT.",
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

_ALONG_PIPELINE = ("penalty", "tau")
PIPELINE = _ours(
    "pipeline",
    "Stages of ridge, one task after another on random designs: risks of all tasks, exact and predicted.",
    {
        **{name: _BED[name] for name in ("n", "p", "decay", "law")},
        "stages": Parameter("stages, each on a task of its own", 3),
        "similarity": Parameter("correlation of every two optima", 0.5),
        "anchor": Parameter("averages are with the stage before, or with the first: before or first", "before"),
        "noise_std": NOISE_STD,
        "penalty": _PENALTY,
        "tau": _TAU._replace(help="ensemble coefficient τ of all stages but the first"),
    },
    {
        "first": Output(_ALONG_PIPELINE, "risk of the first task after the last stage", RISK, "least"),
        "last": Output(_ALONG_PIPELINE, "risk of the last task after the last stage", RISK, "least"),
        "mean": Output(_ALONG_PIPELINE, "mean risk of all tasks after the last stage", RISK, "least"),
        "mean_predicted": Output(_ALONG_PIPELINE, "its prediction, the same for all replicates", RISK),
        "mean_gap": Output(_ALONG_PIPELINE, "relative gap between the two"),
    },
)

MERGE = _ours(
    "merge",
    "Ridge runs of one task and of another, averaged, trimmed and elected, in the risk of the first task.",
    {
        **{name: _BED[name] for name in ("n", "p", "decay", "alignment", "law")},
        "noise_std": NOISE_STD,
        "penalty": PENALTY,
        "similarity": Parameter("correlation of the shifts of the two tasks", 0.5),
        "runs": Parameter("runs of the task", 4),
        "other_runs": Parameter("runs of the other task", 0),
        "tau": _TAU._replace(help="ensemble coefficient τ; all weights are τ/K"),
        "keep": Parameter("share of coordinates kept before the merge", 0.5, batched=True),
    },
    {
        "averaged": Output(("tau",), "fine-tuning risk of the plain average, exact for the designs", RISK, "least"),
        "averaged_predicted": Output(("tau",), "its prediction, the same for all replicates", RISK),
        "best": Output((), "least fine-tuning risk over all weights, exact for the designs", RISK, "least"),
        "best_predicted": Output((), "its prediction, the same for all replicates", RISK),
        "tau_best": Output((), "the τ of least fine-tuning risk with equal weights"),
        "trimmed": Output(("keep", "tau"), "fine-tuning risk of the average of trimmed runs, sampled", RISK, "least"),
        "elected": Output(("keep", "tau"), "fine-tuning risk with elected signs (TIES), sampled", RISK, "least"),
    },
)

_OURS = (OVERADAPTATION, EQUIVALENTS, OVERTRAINING, FLOW, S3FT, PIPELINE, MERGE)
EXPERIMENTS = {experiment.name: experiment for experiment in _OURS}
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
    known, is_file = f"one of {', '.join(EXPERIMENTS)}, or file.py:NAME, or module:NAME", place.endswith(".py")
    if not place:
        raise ValueError(f"experiment must be {known}; got {name!r}")
    try:
        found = getattr(load_file(place) if is_file else _load_module(place), attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"experiment must be {known}; {name!r} cannot be imported: {error}") from None
    if not isinstance(found, Experiment):
        raise ValueError(f"experiment must be {known}; {name!r} is of type {type(found).__name__}")
    return found._replace(name=f"{Path(place).resolve()}:{attribute}" if is_file else name)


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
        spec: Any = spec_from_file_location(name, path)
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
