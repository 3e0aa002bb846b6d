"""What a fine-tuning of a language model will do, predicted by its linearisation (docs, G4; ours).

The linear model f(θ₁) + Jδ is trained as the plan says, by the optimiser and on the batches of the run that is
planned; its logits, and so all losses, are then known along τ: f(θ₁) + τJδ. Beside them stands the network itself at
θ₁ + τδ: where the two differ, the step is too long for first order, and that is known before training.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline

from linfit.bridge.adapter import CONFIG_NAME
from linfit.bridge.language import encode_record
from linfit.bridge.linearised import IGNORED, LanguageNetwork, Values, difference, make_batch, moved, norm
from linfit.bridge.merging import merge
from linfit.bridge.records import Record, read_records
from linfit.bridge.training import Encoded, TrainingPlan, train
from linfit.internal.checks import real_array
from linfit.internal.files import open_arrays, whole_file

TAUS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)
"""τ at which losses are computed; a cubic spline lies between them."""
NETWORK_TAUS = (0.5, 1.0)
"""τ at which the network itself is evaluated on the predicted step."""
TRUSTED = 0.25
"""Largest difference between network and linear model on the predicted step, in units of the largest predicted change
of the task's loss up to τ = 1 (a rule of thumb)."""

Report = Callable[[str, int, int], None] | None
Data = str | Path | Sequence[Record]


class Interval(NamedTuple):
    """A number, and the middle 95% of it when the held-out records are drawn again (bootstrap)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curves:
    """Losses of n records, in nats per target token, along T values of τ."""

    linear: np.ndarray  #: (T, n), of f(θ₁) + τJδ, δ the predicted step.
    network: np.ndarray  #: (2, n), of the network at θ₁ + τδ, τ = 1/2 and 1.
    real: np.ndarray | None = None  #: (T, n), of the network at θ₁ + τ(θ̂ − θ₁), θ̂ of a real fine-tuning.
    realised: np.ndarray | None = None  #: (T, n), of the linear model along θ̂ − θ₁; this is no prediction.


@dataclass(frozen=True)
class LanguagePrediction:
    """Losses along τ of a fine-tuning that need not have been run; `task` is its held-out data."""

    taus: np.ndarray  #: (T,).
    curves: dict[str, Curves]  #: `task`, and other data by name.
    training: np.ndarray  #: Training loss (steps,) of the linear model.
    diagnostics: dict[str, float]  #: Known before training; see `predict_language_model`.
    settings: dict[str, Any]  #: The plan, and what else was assumed.

    @property
    def trusted(self) -> bool:
        """Whether network and linear model differ little on the predicted step, on all data: every `miss_…` ≤ 0.25."""
        return max(abs(value) for name, value in self.diagnostics.items() if name.startswith("miss_")) <= TRUSTED

    def summary(self, of: str = "linear", draws: int = 2000) -> dict[str, Interval]:
        """Best τ, task loss at τ = 0, 1 and the best, and forgetting of every other data set at 1 and the best.

        Forgetting is the rise of its mean loss. Records are drawn again `draws` times, each with its losses at all τ,
        so that what is compared is paired. `of` is linear, real or realised; ValueError where that is not known.
        """
        found = {name: getattr(curves, of, None) for name, curves in self.curves.items()}
        if any(values is None for values in found.values()):
            raise ValueError(f"of must be linear, or real or realised where `against` was given; got {of!r}")
        generator = np.random.default_rng(0)
        fine = np.linspace(self.taus[0], self.taus[-1], 601)
        means = {name: _resampled(values, draws, generator) for name, values in found.items()}  # type: ignore[arg-type]
        splines = {name: CubicSpline(self.taus, each, axis=1) for name, each in means.items()}
        best = fine[splines["task"](fine).argmin(axis=1)]
        summary = {"best_tau": _interval(best)}
        at_best = {
            name: np.array([spline(tau)[row] for row, tau in enumerate(best)]) for name, spline in splines.items()
        }
        for tau in (0, 1):
            summary[f"task_loss_at_{tau}"] = _interval(splines["task"](tau))
        summary["task_loss_at_best"] = _interval(at_best["task"])
        summary["gain_over_full"] = _interval(splines["task"](1) - at_best["task"])
        for name in found.keys() - {"task"}:
            summary[f"forgetting_of_{name}_at_1"] = _interval(splines[name](1) - splines[name](0))
            summary[f"forgetting_of_{name}_at_best"] = _interval(at_best[name] - splines[name](0))
        return summary

    def save(self, path: str | Path) -> None:
        """Everything as one .npz without pickles; the file appears whole or not at all."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {Path(path).name}")
        arrays = {"taus": self.taus, "training": self.training}
        for name, curves in self.curves.items():
            arrays |= {f"{key}/{name}": value for key, value in vars(curves).items() if value is not None}
        words = json.dumps({"diagnostics": self.diagnostics, "settings": self.settings})
        with whole_file(Path(path)) as temporary:
            np.savez(temporary, format=np.array(_FORMAT), words=np.array(words), **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: str | Path) -> "LanguagePrediction":
        """What `save` wrote; ValueError for anything else."""
        try:
            with open_arrays(path) as file:
                arrays = {name: file[name] for name in file.files}
            if str(arrays.pop("format")) != _FORMAT:
                raise KeyError("format")
            words = json.loads(str(arrays.pop("words")))
            taus, training = arrays.pop("taus"), arrays.pop("training")
            parts: dict[str, dict[str, np.ndarray]] = {}
            for label, array in arrays.items():
                key, _, name = label.partition("/")
                parts.setdefault(name, {})[key] = array
            curves = {name: Curves(**each) for name, each in parts.items()}
            return LanguagePrediction(taus, curves, training, words["diagnostics"], words["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"path must be a saved prediction ({_FORMAT}), got {Path(path).name}: {error}") from None


_FORMAT = "linfit language prediction 1"


def _resampled(values: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Mean curves (1 + draws, T): of the records (T, n) themselves, and of n records drawn with replacement."""
    n = values.shape[1]
    weights = generator.multinomial(n, np.full(n, 1 / n), size=draws) / n
    return np.concatenate([values.mean(axis=1)[None], weights @ values.T])


def _interval(values: np.ndarray) -> Interval:
    return Interval(float(values[0]), *(float(each) for each in np.quantile(values[1:], (0.025, 0.975))))


def predict_language_model(
    model: Any,
    train_data: Data,
    test_data: Data,
    others: Mapping[str, Data] | None = None,
    plan: TrainingPlan | None = None,
    *,
    against: Any = None,
    taus: Sequence[float] = TAUS,
    max_length: int = 2048,
    dtype: str = "float32",
    device: str = "cpu",
    memory: int = 2**28,
    trust_remote_code: bool = False,
    state: Path | None = None,
    report: Report = None,
) -> LanguagePrediction:
    """What fine-tuning a causal language model will do to held-out losses of its task and of other texts (docs, G4).

    The linearised model is trained by the plan: each step costs one forward-mode and one reverse-mode pass.
    `diagnostics` are known before any training of the network: `distance` ‖δ‖, `relative_distance` ‖δ‖/‖θ₁‖ over what
    moves, `gap` ‖f(θ₁+δ) − f₁ − Jδ‖/‖Jδ‖ of logits on the first held-out records, and for each data set `miss_…`: the
    loss of the network at θ₁+δ minus that of the linear model, over the largest change of the task's loss that is
    predicted up to τ = 1.

    Args:
        model: folder of a transformers model, or the model.
        train_data, test_data, others: JSON lines as `write_losses` reads them, or records; test_data is of the task.
        plan: the run that is planned.
        against: a real fine-tuning, as a folder (or LoRA adapter) or model, whose losses are put beside the prediction.
        taus: 0, 1 and others at which losses are computed, ascending.
        max_length: tokens kept of each record.
        dtype, device: of torch.
        memory: bytes that logits may take.
        trust_remote_code: run custom code that comes with the model.
        state: file from which an interrupted run goes on.
        report: told (what, done, all).

    Raises ValueError for data of another form, records without a target, and a tuned model that does not fit.
    """
    plan, grid = plan or TrainingPlan(), _grid(taus)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = _load_model(model, **options)
    train_set = encode(train_data, "train", tokenizer, max_length)
    held_out = _held_out(test_data, others or {}, tokenizer, max_length)
    tuned = None if against is None else _tuned_weights(loaded, model, against, options)
    network, progress = plan.network(loaded, memory), _named_progress(report, "training the linear model")
    trained = train(network, train_set, plan, linear=True, state=state, progress=progress)
    delta, size = difference(trained.values, network.start), plan.batch
    curves = {name: _predicted(network, data, delta, grid, size, report, name) for name, data in held_out.items()}
    if tuned is not None:
        whole = LanguageNetwork(loaded, memory=memory)
        step = difference(tuned, whole.start)
        for name, data in held_out.items():
            real, realised = _measured(whole, data, step, grid, size, report, name)
            curves[name] = replace(curves[name], real=real, realised=realised)
    numbers = _diagnostics(network, held_out["task"][:size], delta, curves, grid)
    settings = {**asdict(plan), "max_length": max_length, "dtype": dtype, "records": len(train_set)}
    settings |= {"steps": len(trained.losses), "dropout": 0.0, "moving_weights": _size(network.start)}
    return LanguagePrediction(grid, curves, np.array(trained.losses), numbers, settings)


def _held_out(test: Data, others: Mapping[str, Data], tokenizer: Any, max_length: int) -> dict[str, Encoded]:
    if "task" in others:
        raise ValueError("others must not be named task, which is the held-out data of the task")
    named = {"task": test, **others}
    return {
        name: encode(data, "test" if name == "task" else name, tokenizer, max_length) for name, data in named.items()
    }


def _named_progress(report: Report, what: str) -> Callable[[int, int], None] | None:
    return None if report is None else lambda done, steps: report(what, done, steps)


def finetune_language_model(
    model: Any,
    train_data: Data,
    plan: TrainingPlan,
    *,
    max_length: int = 2048,
    dtype: str = "float32",
    device: str = "cpu",
    memory: int = 2**28,
    trust_remote_code: bool = False,
    state: Path | None = None,
    report: Report = None,
) -> Any:
    """The real run that `predict_language_model` predicts: same batches, same optimiser; returns the tuned model.

    Arguments as there. LoRA's factors are added to the weights.
    """
    loaded, tokenizer = _load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    data, network = encode(train_data, "train", tokenizer, max_length), plan.network(loaded, memory)
    progress = _named_progress(report, "fine-tuning")
    trained = train(network, data, plan, linear=False, state=state, progress=progress)
    tuned = copy.deepcopy(loaded)
    parameters = dict(tuned.named_parameters())
    for name, value in network.weights(trained.values).items():
        parameters[name].data.copy_(value)
    return tuned


def _load_model(model: Any, *, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A causal language model, and what loads its tokenizer when needed; a model is taken as it is."""
    if not isinstance(model, str | Path):
        return model, None
    import transformers

    options = {"trust_remote_code": trust_remote_code}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, use_safetensors=True, attn_implementation="eager", **options
    )
    return loaded.to(device), cache(lambda: transformers.AutoTokenizer.from_pretrained(model, **options))


def encode(data: Data, name: str, tokenizer: Any, max_length: int) -> Encoded:
    """(ids, labels) of every record; ValueError for one that has no target token."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    records = read_records(data) if isinstance(data, str | Path) else list(data)
    where = str(data) if isinstance(data, str | Path) else name
    if not records:
        raise ValueError(f"{where}: holds no records")
    loaded = None
    if not all("input_ids" in record for record in records):
        if tokenizer is None:
            raise ValueError(f"{where}: records need input_ids where the model is not given as a folder")
        loaded = tokenizer()
    encoded = [encode_record(record, loaded, max_length, index) for index, record in enumerate(records)]
    for index, (_, labels) in enumerate(encoded):
        if all(label == IGNORED for label in labels[1:]):
            raise ValueError(f"{where}: record {index} has no target token among its first {max_length} tokens")
    return encoded


def _grid(taus: Sequence[float]) -> np.ndarray:
    real_array("taus", taus, ndim=1)
    grid = np.asarray(taus, float)  # at full precision, whatever JAX is set to
    if grid.size < 4 or (np.diff(grid) <= 0).any() or not {0.0, 1.0} <= set(grid.tolist()):
        raise ValueError(f"taus must be at least 4, ascending, with 0 and 1 among them, got {list(taus)}")
    return grid


def _tuned_weights(loaded: Any, base: Any, tuned: Any, options: dict[str, Any]) -> Values:
    """Weights of a real fine-tuning by the names of the base; ValueError where names or shapes differ."""
    if isinstance(tuned, str | Path) and (Path(tuned) / CONFIG_NAME).is_file():
        if not isinstance(base, str | Path):
            raise ValueError("against must be a model rather than an adapter if the base is not a folder")
        with tempfile.TemporaryDirectory() as folder:
            merged = merge(base, tuned, Path(folder) / "tuned", tau=1.0, dtype=options["dtype"]).folders[0]
            return _tuned_weights(loaded, base, merged, options)
    other = dict(_load_model(tuned, **options)[0].named_parameters())
    start = {name: value for name, value in loaded.named_parameters() if value.is_floating_point()}
    wrong = [name for name in start if name not in other or other[name].shape != start[name].shape]
    if wrong or other.keys() - start.keys():
        named = (wrong or sorted(other.keys() - start.keys()))[0]
        raise ValueError(f"against must be a fine-tuning of the model: {named} differs in shape, or is not in both")
    return {name: other[name].detach().to(value) for name, value in start.items()}


def _batches(data: Encoded, size: int, network: LanguageNetwork, report: Report, what: str) -> Iterable[Any]:
    device = next(iter(network.parameters.values())).device
    for start in range(0, len(data), size):
        yield make_batch(data[start : start + size], device)
        if report is not None:
            report(what, min(start + size, len(data)), len(data))


def _predicted(
    network: LanguageNetwork, data: Encoded, delta: Values, taus: np.ndarray, size: int, report: Report, name: str
) -> Curves:
    """Losses of the linear model along τ, and of the network on the predicted step."""
    linear, there = [], []
    for batch in _batches(data, size, network, report, f"losses of {name}"):
        linear.append(network.losses_along(batch, network.start, delta, taus).cpu().numpy())
        steps = [moved(network.start, delta, tau) for tau in NETWORK_TAUS]
        there.append(np.stack([network.losses(batch, values).cpu().numpy() for values in steps]))
    return Curves(np.concatenate(linear, axis=1), np.concatenate(there, axis=1))


def _measured(
    network: LanguageNetwork, data: Encoded, delta: Values, taus: np.ndarray, size: int, report: Report, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the network along the realised step, and of the linear model along it."""
    real, realised = [], []
    for batch in _batches(data, size, network, report, f"losses of {name} after the real run"):
        losses = [network.losses(batch, moved(network.start, delta, tau)).cpu().numpy() for tau in taus]
        real.append(np.stack(losses))
        realised.append(network.losses_along(batch, network.start, delta, taus).cpu().numpy())
    return np.concatenate(real, axis=1), np.concatenate(realised, axis=1)


def _diagnostics(
    network: LanguageNetwork, data: Encoded, delta: Values, curves: Mapping[str, Curves], taus: np.ndarray
) -> dict[str, float]:
    batch = make_batch(data, next(iter(network.parameters.values())).device)
    missed, first = network.gap(batch, network.start, delta)
    numbers = {"distance": norm(delta), "relative_distance": norm(delta) / norm(network.start)}
    numbers["gap"] = (missed / first) ** 0.5 if first > 0 else 0.0
    at_one, task = taus.tolist().index(1.0), curves["task"].linear.mean(axis=1)
    change = float(np.abs(task[: at_one + 1] - task[0]).max())
    for name, each in curves.items():
        missed = float(each.network[-1].mean() - each.linear[at_one].mean())
        numbers[f"miss_{name}"] = missed / change if change > 0 else 0.0
    return numbers


def _size(values: Values) -> int:
    return sum(value.numel() for value in values.values())
