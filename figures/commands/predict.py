"""`linfit predict`: what a fine-tuning will do, before it is run. Nothing heavy is imported until it runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from figures.commands.language import Numbers, local_folder, note, numbers, print_json, progress

if TYPE_CHECKING:
    from linfit.bridge import LanguagePrediction

Append = tyro.conf.UseAppendAction


@dataclass(frozen=True)
class _Training:
    """How the run would train."""

    rate: float = 1e-4
    """largest learning rate"""
    epochs: int = 1
    """passes over the data"""
    batch: int = 4
    """records a step"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """of the run"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """of the learning rate; linear and cosine fall to zero"""
    warmup: int = 0
    """steps over which the rate rises"""
    weight_decay: float = 0.0
    """of the run"""
    momentum: float = 0.0
    """of SGD"""
    max_grad_norm: float | None = None
    """to which gradients are scaled down"""
    seed: int = 0
    """of the order of the records, and of LoRA's random factor"""
    moving: Annotated[tuple[str, ...], Append] = ()
    """shell pattern of the parameters that move, all by default; may be repeated"""
    lora: int | None = None
    """rank of LoRA factors, which are then all that moves"""
    lora_scale: float = 2.0
    """α/R of LoRA"""


@dataclass(frozen=True)
class _Loading:
    """How model and data are read."""

    max_length: int = 2048
    """tokens kept of each record"""
    device: str = "cpu"
    """torch device, such as cpu or cuda"""
    dtype: Literal["float32", "float64"] = "float32"
    """number format"""
    memory: float = 0.25
    """gigabytes that logits may take"""
    trust_remote_code: bool = False
    """run custom model code that comes with the model"""


def predict(
    model: Annotated[str, tyro.conf.Positional],
    train: Annotated[Path, tyro.conf.Positional],
    test: Annotated[Path, tyro.conf.Positional],
    /,
    training: Annotated[_Training, tyro.conf.arg(name="")] = _Training(),
    loading: Annotated[_Loading, tyro.conf.arg(name="")] = _Loading(),
    other: Annotated[tuple[Path, ...], Append] = (),
    against: str | None = None,
    tau: Numbers = (),
    state: Path | None = None,
    json: bool = False,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    save: Path | None = None,
) -> None:
    """What will a fine-tuning do to its task and to other texts, and how far should one go? Before it is run.

    The linearised model is trained by the run's own optimiser on its own batches; each step costs about twice a step of
    the run. An interrupted prediction goes on where it was when the same command is given again.

    Args:
        model: folder or Hub name of the pretrained language model.
        train: JSON lines that the run would train on, as linfit losses reads them.
        test: held-out data of the same task.
        training: how the run would train.
        loading: how model and data are read.
        other: data that should not be forgotten; may be repeated.
        against: folder of the real fine-tuning (or a LoRA adapter), to hold beside the prediction.
        tau: ensemble coefficients at which losses are computed, 0 and 1 among them.
        state: file that keeps what is done of the training; beside the training data if not given.
        json: print everything as JSON.
        out: write a picture (.png, .pdf or .svg).
        save: write all losses (.npz).
    """
    _require_outputs(out, save)
    _require_packages()
    from linfit.bridge import TrainingPlan, predict_language_model

    plan, options = TrainingPlan(**vars(training)), {**vars(loading), "memory": int(loading.memory * 1e9)}
    options |= {"taus": numbers("tau", tau)} if tau else {}
    kept = state or _state_beside(train, model, training, loading)
    folder, tuned = local_folder(model), None if against is None else local_folder(against)
    with _stages() as report:
        found = predict_language_model(
            folder, train, test, _named(other), plan, against=tuned, state=kept, report=report, **options
        )
    _write(found, json, out, save)
    kept.unlink(missing_ok=True)


def _require_outputs(out: Path | None, save: Path | None) -> None:
    """Complain about the outputs before any work is done."""
    for option, path, endings in (("--out", out, (".png", ".pdf", ".svg")), ("--save", save, (".npz",))):
        if path is not None and path.suffix not in endings:
            raise ValueError(f"{option} must end in {' or '.join(endings)}, got {path}")
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option}: there is no folder {path.absolute().parent}")


def _require_packages() -> None:
    try:
        import torch  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"linfit predict runs the model and needs {error.name}: pip install 'linfit[llm]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _state_beside(train: Path, *what: object) -> Path:
    return train.with_name(f".{train.stem}-{sha256(repr(what).encode()).hexdigest()[:12]}.state")


def _named(paths: tuple[Path, ...]) -> dict[str, Path]:
    """Data by the stem of its file; ValueError where two have the same."""
    named = {path.stem: path for path in paths}
    if len(named) != len(paths) or "task" in named:
        raise ValueError(
            f"--other must be files of different names, none of them task; got {', '.join(map(str, paths))}"
        )
    return named


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar after the other, as what is being done changes."""
    with ExitStack() as stack:
        now: list[Any] = ["", None]

        def report(what: str, done: int, steps: int) -> None:
            if what != now[0]:
                stack.close()
                now[:] = what, stack.enter_context(progress(what))
            now[1](done, steps)

        yield report


def _write(found: "LanguagePrediction", json: bool, out: Path | None, save: Path | None) -> None:
    measured = next(iter(found.curves.values())).real is not None
    summaries = {of: found.summary(of) for of in (("linear", "real", "realised") if measured else ("linear",))}
    if save is not None:
        found.save(save)
    if out is not None:
        from figures.bridge import draw_prediction

        draw_prediction(found, out)
    if json:
        return print_json(_as_dict(found, summaries))
    _print(found, summaries)
    if measured:
        _print_beside(found)


def _as_dict(found: "LanguagePrediction", summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    curves = {
        name: {kind: values.mean(axis=1) for kind, values in vars(each).items() if values is not None}
        for name, each in found.curves.items()
    }
    named = {of: {key: value._asdict() for key, value in summary.items()} for of, summary in summaries.items()}
    result = {"prediction": named.pop("linear"), **named, "taus": found.taus, "mean_losses": curves}
    result |= {"training_loss": found.training, "diagnostics": found.diagnostics, "trusted": found.trusted}
    return result | {"settings": found.settings, "assumed": ASSUMED}


ASSUMED = (
    "the run follows the settings above: order of the records, optimiser and schedule; no dropout",
    "its outputs are first order in the step from the pretrained weights",
    "losses are means over records of each one's mean over target tokens, in nats",
    "intervals hold 95% of resamples of the held-out records; what another order of the training data would change is not in them",
)


def _print(found: "LanguagePrediction", summaries: dict[str, dict[str, Any]]) -> None:
    for key, value in summaries["linear"].items():
        words = (
            key.replace("_", " ").replace("best tau", "best τ").replace("at 0", "at τ = 0").replace("at 1", "at τ = 1")
        )
        real = f"   real {summaries['real'][key].value:.4g}" if "real" in summaries else ""
        print(f"{words + ':':34} {value.value:.4g}  ({value.low:.4g} to {value.high:.4g}){real}")
    best = summaries["linear"]["best_tau"].value
    if best in (found.taus[0], found.taus[-1]):
        note(f"the best τ lies at the end of what was computed, {best:g}")
    misses = {key.removeprefix("miss_"): value for key, value in found.diagnostics.items() if key.startswith("miss_")}
    words = ", ".join(f"{name} {value:+.0%}" for name, value in misses.items())
    print(f"the network on the predicted step misses the linear model, in units of the task's change, by: {words}")
    print(
        f"step: {found.diagnostics['relative_distance']:.2g} of the weights that move; logits miss linearity by "
        f"{found.diagnostics['gap']:.2g} of their change"
    )
    print(
        "trust: "
        + (
            "within the rule of thumb of 25%"
            if found.trusted
            else "NO: beyond 25%, the step is too long for first order"
        )
    )
    print("assumed: " + "; ".join(ASSUMED))


def _print_beside(found: "LanguagePrediction") -> None:
    """Mean losses along τ: predicted, real, and of the linear model along the real step."""
    from rich.console import Console
    from rich.table import Table

    table = Table("τ", title="predicted, real, and first order along the real step (no prediction)")
    for name in found.curves:
        for kind in ("predicted", "real", "along real"):
            table.add_column(f"{name}\n{kind}", justify="right")
    for row, tau in enumerate(found.taus):
        values = [each[row].mean() for c in found.curves.values() for each in (c.linear, c.real, c.realised)]  # type: ignore[index]
        table.add_row(f"{tau:g}", *(f"{value:.4f}" for value in values))
    Console(width=None if Console().is_terminal else 160).print(table)
