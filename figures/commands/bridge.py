"""Subcommands for language models. Nothing heavy is imported until one of them runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from linfit.bridge.curve import Curve
    from linfit.bridge.inspection import Inspection
    from linfit.bridge.output import Outcome

Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
Numbers = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
"""`--tau 0.2,0.4` and `--tau 0.2 --tau 0.4` are the same."""


def merge(
    base: Annotated[str, tyro.conf.Positional],
    tuned: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    out: Out,
    tau: Numbers = (),
    method: Literal["linear", "shrink", "singular", "rank"] = "linear",
    rank: int | None = None,
    layer_tau: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    layer_tau_file: Path | None = None,
    run_weights: str | None = None,
    dtype: str | None = None,
    shared: bool = False,
    workers: int = 2,
    json: bool = False,
) -> None:
    """Write θ_τ = (1−τ)·base + τ·tuned as a checkpoint, in float32, rounded once.

    Args:
        base: folder (or Hub name) of the base model.
        tuned: fine-tuned models or LoRA adapters; of several, the average is taken.
        out: folder to create; with several τ, one folder tau_… in it for each.
        tau: interpolation coefficients, 0 = base, 1 = tuned; commas or repetition for several. Default 1.
        method: filter on the delta. linear: g = τ; shrink: τ per tensor from how K ≥ 2 runs differ; singular: optimal
            shrinkage of singular values; rank: keep the first --rank singular values.
        rank: singular values kept by method rank.
        layer_tau: PATTERN=τ for tensors whose name fits the shell pattern; the first that fits wins.
        layer_tau_file: a JSON object of pattern → τ, or the output of `linfit inspect --json` of several runs.
        run_weights: comma-separated weights of the tuned models, equal if not given.
        dtype: stored format, such as bfloat16; that of the tuned model if not given.
        shared: average the tensors and rows that all have, and take the rest from the tuned model.
        workers: threads that read, compute and write.
        json: print the outcome as JSON.
    """
    from linfit.bridge.merging import merge as merge_folders
    from linfit.bridge.merging import read_layer_taus

    patterns = dict(_assignment(text) for text in layer_tau)
    if layer_tau_file is not None:
        patterns |= {name: value for name, value in read_layer_taus(layer_tau_file).items() if name not in patterns}
    with _progress("merging", of_bytes=True) as progress:
        outcome = merge_folders(
            _local(base),
            [_local(path) for path in tuned],
            out,
            tau=_numbers("tau", tau) or [1.0],
            method=method,
            rank=rank,
            layer_tau=patterns,
            run_weights=_numbers("run_weights", (run_weights,)) if run_weights is not None else None,
            dtype=dtype,
            shared=shared,
            workers=workers,
            progress=progress,
        )
    _report_outcome(outcome, json)


def perturb(
    model: Annotated[str, tyro.conf.Positional],
    /,
    out: Out,
    gamma: Numbers,
    seed: Numbers = (),
    init_scale: float | None = None,
    only: str | None = None,
    workers: int = 2,
    json: bool = False,
) -> None:
    """Add Gaussian noise of relative size γ to the weights, for sensitivity curves.

    Args:
        model: folder (or Hub name) of the model.
        out: folder to create; with several γ or seeds, one folder gamma_…_seed_… in it for each.
        gamma: relative sizes; commas or repetition for several.
        seed: seeds of the noise, 0 if not given; the same seed draws the same noise for every γ.
        init_scale: measure γ in this standard deviation (of the initialisation), in matrices only, instead of relative
            to each tensor.
        only: shell pattern of tensor names.
        workers: threads that read, compute and write.
        json: print the outcome as JSON.
    """
    from linfit.bridge.perturbation import perturb as perturb_folder

    seeds = _numbers("seed", seed) or [0.0]
    if any(value % 1 for value in seeds):
        raise ValueError(f"--seed must be whole numbers, got {', '.join(seed)}")
    with _progress("perturbing", of_bytes=True) as progress:
        outcome = perturb_folder(
            _local(model),
            out,
            gamma=_numbers("gamma", gamma),
            seed=[int(value) for value in seeds],
            init_scale=init_scale,
            only=only,
            workers=workers,
            progress=progress,
        )
    _report_outcome(outcome, json)


def inspect(
    base: Annotated[str, tyro.conf.Positional],
    tuned: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    json: bool = False,
    plot: Path | None = None,
    by_tensor: bool = False,
    only: str | None = None,
    subspace: int = 8,
    shared: bool = False,
) -> None:
    """How far did fine-tuning move the weights, and is the movement signal or noise?

    Args:
        base: folder (or Hub name) of the base model.
        tuned: fine-tuned models or LoRA adapters; several runs show how they differ and suggest a τ.
        json: print every quantity of every tensor as JSON.
        plot: write a picture, layers × quantity (.png, .pdf or .svg).
        by_tensor: one table row per tensor instead of one per layer type.
        only: shell pattern of tensor names.
        subspace: number of top singular directions compared with those of the base.
        shared: compare only the tensors that all have with equal shapes.
    """
    from linfit.bridge.inspection import inspect as inspect_folders

    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot must end in .png, .pdf or .svg, got {plot}")
    with _progress("inspecting") as progress:
        inspection = inspect_folders(
            _local(base),
            [_local(path) for path in tuned],
            subspace=subspace,
            only=only,
            shared=shared,
            progress=progress,
        )
    if json:
        _print_json(inspection.as_dict())
    else:
        _print_inspection(inspection, by_tensor)
    if plot is not None:
        from figures.bridge import draw_inspection

        draw_inspection(inspection.as_dict(), plot)


def curve(
    evaluations: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    metric: str = "loss",
    maximize: bool = False,
    second: str | None = None,
    second_maximize: bool = False,
    json: bool = False,
    plot: Path | None = None,
) -> None:
    """Fit a quadratic to a metric along τ: the best τ with its error, whether to trust it, and the next τ to try.

    Args:
        evaluations: one table (.csv, .json, .jsonl) with columns tau and METRIC, and perhaps METRIC_standard_error; or
            TAU=FILE for each τ, FILE a result of lm-evaluation-harness (or the folder it wrote, or its logged samples)
            or the output of `linfit losses`.
        metric: column, or TASK/NAME of a harness result such as arc_easy/acc or gsm8k/exact_match,strict-match.
        maximize: the metric is better when larger; harness results say so themselves.
        second: another metric, for the trade-off between the two.
        second_maximize: the second metric is better when larger.
        json: print the result as JSON.
        plot: write a picture of the fit (.png, .pdf or .svg).
    """
    from linfit.bridge.curve import fit_curve, read_evaluations

    fits = {}
    for name, larger in [(metric, maximize)] + ([(second, second_maximize)] if second else []):
        found = read_evaluations(evaluations, name)
        larger = _direction(name, larger, found.larger_is_better)
        fits[name] = (fit_curve(found.taus, found.values, found.standard_errors, maximize=larger), larger)
    summary = _summary(fits)
    if json:
        _print_json(summary)
    else:
        _print_curves(summary)
    if plot is not None:
        from figures.bridge import draw_curve

        draw_curve(summary, plot)


def weights(
    losses: Annotated[Path, tyro.conf.Positional],
    /,
    out: Out,
    temperature: float | None = None,
    tokens: bool = False,
) -> None:
    """FLOW weights exp(−loss/T) for a dataset, from the pretrained model's losses (`linfit losses`).

    Args:
        losses: JSON lines with a number `loss` each, or a list `token_losses` (null where a token is no target).
        out: JSON lines: every input record with its `weight` (or `token_weights`).
        temperature: T; the median loss if not given.
        tokens: weights per token.
    """
    import warnings

    import numpy as np

    from linfit.bridge.records import read_records, weigh, write_records

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weighed, used = weigh(read_records(losses), temperature, tokens=tokens)
    _require_parent(out)
    write_records(out, weighed)
    values = np.concatenate([np.atleast_1d(record["token_weights" if tokens else "weight"]) for record in weighed])
    for warning in caught:
        _note(str(warning.message))
    print(f"temperature {used:.6g}; {values.size} weights, mean {values.mean():.4g}; written to {out}")
    if values.size and np.ptp(values) == 0:
        _note("all weights are equal: no sample is preferred, they only scale the learning rate")


def losses(
    model: Annotated[str, tyro.conf.Positional],
    data: Annotated[Path, tyro.conf.Positional],
    /,
    out: Out,
    batch_size: int = 8,
    max_length: int = 2048,
    tokens: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """The model's loss on every record of a dataset, in nats per target token; resumes where it was interrupted.

    Args:
        model: folder or Hub name of the (pretrained) model.
        data: JSON lines with text; prompt and completion; messages; or input_ids and labels.
        out: JSON lines with index, loss, number of target tokens.
        batch_size: records at once.
        max_length: tokens kept of each record.
        tokens: also write the loss of each token.
        device: torch device, such as cpu or cuda.
        dtype: number format to load the model in; auto takes the stored one.
        trust_remote_code: run custom model code that comes with the model.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"linfit losses runs the model and needs {error.name}: pip install 'linfit[llm]'") from None
    from linfit.bridge.language import write_losses

    _require_parent(out)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with _progress("losses") as progress:
        resumed = write_losses(
            model,
            data,
            out,
            batch_size=batch_size,
            max_length=max_length,
            tokens=tokens,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print(f"written to {out}" + (f"; {resumed} records were finished before" if resumed else ""))


def targets(
    answers: Annotated[Path, tyro.conf.Positional],
    /,
    out: Out,
    judge: str = "normalised",
) -> None:
    """S3FT training targets: own answer if judged right, else own paraphrase of gold if judged right, else gold.

    Args:
        answers: JSON lines with texts own and gold, and perhaps paraphrase; other fields are kept.
        out: JSON lines with completion (the chosen target) and source (own, paraphrase or gold).
        judge: exact, normalised (case, punctuation and articles aside), last-number (GSM8K), regex:PATTERN, or
            command:COMMAND, which reads {"answer", "gold"} as JSON and exits 0 to accept, 1 to reject.
    """
    from linfit.bridge.records import choose_targets, judge_named, read_records, write_records

    verdict = judge_named(judge)
    _require_parent(out)
    chosen, shares = choose_targets(read_records(answers), verdict)
    write_records(out, chosen)
    print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + f" of {len(chosen)}; written to {out}")


# What commands share ------------------------------------------------------------------------------------------------


def _numbers(name: str, texts: tuple[str, ...]) -> list[float]:
    parts = [part for text in texts for part in text.split(",") if part.strip()]
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"--{name.replace('_', '-')} must be numbers, got {', '.join(texts)}") from None


def _assignment(text: str) -> tuple[str, float]:
    pattern, separator, value = text.rpartition("=")
    try:
        return pattern, float(value if separator else "")
    except ValueError:
        raise ValueError(f"--layer-tau must be PATTERN=NUMBER, got {text!r}") from None


def _local(name: str) -> Path:
    """A folder as it is; OWNER/NAME of the Hugging Face Hub as its local copy (extra `llm`)."""
    path = Path(name)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise ValueError(
            f"{name} is no folder here; to fetch it from the Hub: pip install 'linfit[llm]', or give a local folder"
        ) from None
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name} is no folder here and could not be fetched from the Hub ({reason}); fetch it where there is a "
            f"network, `hf download {name} --local-dir FOLDER`, and give that folder"
        ) from None


def _require_parent(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.absolute().parent}")


@contextmanager
def _progress(what: str, *, of_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, with bytes per second; silent where that is no terminal."""
    from rich import progress as bars
    from rich.console import Console

    amounts = [bars.DownloadColumn(), bars.TransferSpeedColumn()] if of_bytes else [bars.MofNCompleteColumn()]
    columns = [bars.TextColumn(what), bars.BarColumn(), *amounts, bars.TimeRemainingColumn()]
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _note(text: str) -> None:
    import sys

    print(f"note: {text}", file=sys.stderr)


def _print_json(value: object) -> None:
    import json

    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: object) -> object:
    """NaN and Inf as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def _report_outcome(outcome: "Outcome", json: bool) -> None:
    speed = outcome.bytes_written / max(outcome.seconds, 1e-9)
    if json:
        folders = [str(folder) for folder in outcome.folders]
        _print_json({**outcome._asdict(), "folders": folders, "bytes_per_second": speed})
        return
    for note in outcome.notes:
        _note(note)
    if outcome.resumed_shards:
        _note(f"{outcome.resumed_shards} shards were finished before")
    print(f"{outcome.bytes_written / 1e9:.3g} GB in {outcome.seconds:.2f} s ({speed / 1e9:.2f} GB/s written)")
    for folder in outcome.folders:
        print(folder)


_HEADINGS = {
    "relative_norm": "‖Δ‖/‖W‖",
    "effective_rank": "effective rank",
    "signal_share": "signal share",
    "overlap": "overlap",
    "overlap_by_chance": "by chance",
    "signal_to_noise": "signal/noise",
    "suggested_tau": "τ of one run",
    "suggested_tau_of_average": "τ of average",
}


def _print_inspection(inspection: "Inspection", by_tensor: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = [r._asdict() | {"kind": r.name} for r in inspection.tensors] if by_tensor else inspection.by_kind()
    shown = [name for name in _HEADINGS if any(row[name] is not None for row in rows)]
    table = Table("tensor" if by_tensor else "layer type", title=f"{inspection.base} → {', '.join(inspection.tuned)}")
    for name in shown:
        table.add_column(_HEADINGS[name], justify="right")
    for row in rows:
        table.add_row(str(row["kind"]), *("–" if row[name] is None else f"{row[name]:.3g}" for name in shown))
    Console(width=None if Console().is_terminal else 160).print(table)
    for note in inspection.notes:
        _note(note)


def _direction(metric: str, asked: bool, stated: bool | None) -> bool:
    """Whether to maximise: what the result files state, which an option must not contradict."""
    if asked and stated is False:
        raise ValueError(f"--maximize: {metric} is better when smaller, the result files say")
    if stated and not asked:
        _note(f"{metric} is better when larger, the result files say")
    return asked if stated is None else stated


def _summary(fits: "dict[str, tuple[Curve, bool]]") -> dict[str, object]:
    import numpy as np

    metrics = []
    first = next(iter(fits.values()))[0]
    for name, (fit, larger) in fits.items():
        sign = -1 if larger else 1
        gain, gain_error = fit.gain_over_full
        errors = fit.standard_errors
        metrics.append(
            {
                "metric": name,
                "maximize": larger,
                "taus": fit.taus.tolist(),
                "values": (sign * fit.values).tolist(),
                "standard_errors": None if errors is None else errors.tolist(),
                "coefficients": (sign * fit.coefficients).tolist(),
                "best_tau": fit.best_tau,
                "best_tau_error": fit.best_tau_error,
                "gain_over_full": gain,
                "gain_over_full_error": gain_error,
                "value_at_first_best_tau": float(sign * fit(first.best_tau)) if first.convex else float("nan"),
                "chi_square": fit.chi_square,
                "degrees_of_freedom": fit.degrees_of_freedom,
                "p_value": fit.p_value,
                "verdict": fit.verdict,
                "next_tau": fit.next_tau(),
            }
        )
    best = [metric["best_tau"] for metric in metrics]
    pareto = sorted(best) if len(best) == 2 and np.isfinite(best).all() else None
    return {"metrics": metrics, "trade_off": pareto}


def _print_curves(summary: dict) -> None:
    from math import isfinite

    for metric in summary["metrics"]:
        if isfinite(metric["best_tau"]):
            print(f"{metric['metric']}: best τ = {metric['best_tau']:.3f} ± {metric['best_tau_error']:.2g}")
            gain, error = metric["gain_over_full"], metric["gain_over_full_error"]
            print(f"  gain over τ = 1: {gain:.4g} ± {error:.2g}")
        else:
            print(f"{metric['metric']}: no best τ between the ends")
        print(f"  fit: {metric['verdict']}")
        print(f"  next τ worth evaluating: {metric['next_tau']:.3g}")
    if len(summary["metrics"]) == 2 and isfinite(summary["metrics"][0]["best_tau"]):
        second = summary["metrics"][1]
        print(f"{second['metric']} at the first metric's best τ: {second['value_at_first_best_tau']:.4g}")
    if summary["trade_off"] is not None:
        low, high = summary["trade_off"]
        print(f"trade-off: between τ = {low:.3f} and {high:.3f} each metric improves only at the other's cost")
