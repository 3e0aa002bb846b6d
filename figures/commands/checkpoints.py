"""Subcommands for checkpoints of language models. Nothing heavy is imported until one of them runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from figures.commands.language import Numbers, Out, local_folder, note, numbers, print_json, progress

if TYPE_CHECKING:
    from linfit.bridge import Curve, Inspection, Plan
    from linfit.bridge.output import Written
    from linfit.bridge.soup import Estimate


Model = Annotated[str, tyro.conf.Positional]
Models = Annotated[tuple[str, ...], tyro.conf.Positional]


def merge(
    base: Model,
    tuned: Models,
    /,
    out: Out,
    tau: Numbers = (),
    method: Literal["linear", "shrink", "singular", "rank"] = "linear",
    rank: int | None = None,
    layer_tau: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    layer_tau_file: Path | None = None,
    run_weights: str | None = None,
    weights: str | None = None,
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
        tau: ensemble coefficients, 0 = base, 1 = tuned; commas or repetition for several. Default 1.
        method: filter on the delta. linear: g = τ; shrink: τ per tensor from how K ≥ 2 runs differ; singular: optimal
            shrinkage of singular values; rank: keep the first --rank singular values.
        rank: singular values kept by method rank.
        layer_tau: PATTERN=τ for tensors whose name fits the shell pattern; the first that fits wins.
        layer_tau_file: a JSON object of pattern → τ, or the output of `linfit inspect --json` of several runs.
        run_weights: comma-separated weights of the tuned models, sum 1, equal if not given.
        weights: comma-separated weights of any sum instead, base + Σ weight·(tuned − base), or the output of `linfit
            plan --json` with its weights by tensor.
        dtype: stored format, such as bfloat16; that of the tuned model if not given.
        shared: average the tensors and rows that all have, and take the rest from the tuned model.
        workers: threads that read, compute and write.
        json: print the outcome as JSON.
    """
    from linfit import bridge

    patterns = dict(_assignment(text) for text in layer_tau)
    if layer_tau_file is not None:
        more = bridge.read_layer_taus(layer_tau_file)
        patterns |= {name: value for name, value in more.items() if name not in patterns}
    taus = numbers("tau", tau) or [1.0]
    shares = numbers("run_weights", (run_weights,)) if run_weights is not None else None
    options: dict[str, object] = {"tau": taus, "method": method, "rank": rank, "run_weights": shares}
    if weights is not None:
        is_file = weights.endswith(".json")
        options["weights"] = bridge.read_weights(weights) if is_file else numbers("weights", (weights,))
    options |= {"layer_tau": patterns, "dtype": dtype, "shared": shared, "workers": workers}
    _write(json, bridge.merge, local_folder(base), [local_folder(path) for path in tuned], out, **options)


def perturb(
    model: Model,
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
    from linfit import bridge

    seeds = numbers("seed", seed) or [0.0]
    if any(value % 1 for value in seeds):
        raise ValueError(f"--seed must be whole numbers, got {', '.join(seed)}")
    noise = {"gamma": numbers("gamma", gamma), "seed": [int(value) for value in seeds], "init_scale": init_scale}
    _write(json, bridge.perturb, local_folder(model), out, only=only, workers=workers, **noise)


def _write(json: bool, write: "Callable[..., Written]", *arguments: object, **options: object) -> None:
    """Run `merge` or `perturb` with a progress bar, and say what was written."""
    with progress("writing", of_bytes=True) as bar:
        written = write(*arguments, progress=bar, **options)
    speed = written.bytes_written / max(written.seconds, 1e-9)
    if json:
        folders = [str(folder) for folder in written.folders]
        return print_json({**written._asdict(), "folders": folders, "bytes_per_second": speed})
    for text in written.notes:
        note(text)
    if written.resumed_shards:
        note(f"{written.resumed_shards} shards were finished before")
    print(f"{written.bytes_written / 1e9:.3g} GB in {written.seconds:.2f} s ({speed / 1e9:.2f} GB/s written)")
    for folder in written.folders:
        print(folder)


def inspect(
    base: Model,
    tuned: Models,
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
    from linfit import bridge

    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot must end in .png, .pdf or .svg, got {plot}")
    folders = [local_folder(path) for path in tuned]
    with progress("inspecting") as bar:
        inspection = bridge.inspect(
            local_folder(base), folders, subspace=subspace, only=only, shared=shared, progress=bar
        )
    if json:
        print_json(inspection.as_dict())
    else:
        _print_inspection(inspection, by_tensor)
    if plot is not None:
        from figures.bridge import draw_inspection

        draw_inspection(inspection, plot)


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
    for text in inspection.notes:
        note(text)


def plan(
    base: Model,
    tuned: Models,
    /,
    task: str | None = None,
    losses: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    json: bool = False,
    picture: Path | None = None,
    only: str | None = None,
    shared: bool = False,
) -> None:
    """Weights for merging several runs, what more runs would gain, and which of them repeat or contradict each other.

    Args:
        base: folder (or Hub name) of the base model.
        tuned: two or more models or LoRA adapters fine-tuned from it.
        task: a comma-separated label for each of them, such as a,a,b, if not all learned the same; each counts alike.
        losses: W1,W2,…=FILE, FILE the output of `linfit losses` for base + Σ W·(tuned − base), again for each weighting:
            fits the loss itself.
        json: print everything as JSON; `linfit merge --weights FILE.json` takes it.
        picture: write cosines and expected gains (.png, .pdf or .svg).
        only: shell pattern of tensor names.
        shared: leave out the tensors that not all have with equal shapes.
    """
    from linfit import bridge

    if picture is not None and (
        picture.suffix not in (".png", ".pdf", ".svg") or not picture.absolute().parent.is_dir()
    ):
        raise ValueError(f"--picture must end in .png, .pdf or .svg and lie in an existing folder, got {picture}")
    evaluated: dict[tuple[float, ...], str | Path] = {}
    for text in losses:
        weights, _, file = text.partition("=")
        row = tuple(numbers("losses", (weights,)))
        if not file or row in evaluated:
            raise ValueError(f"--losses must be W1,W2,…=FILE, each weighting once, got {text!r}")
        evaluated[row] = Path(file)
    folders = [local_folder(path) for path in tuned]
    labels = None if task is None else [label.strip() for label in task.split(",")]
    with progress("reading") as bar:
        found = bridge.plan(
            local_folder(base), folders, tasks=labels, losses=evaluated, only=only, shared=shared, progress=bar
        )
    if json:
        print_json(found.as_dict())
    else:
        _print_plan(found)
    if picture is not None:
        from figures.bridge import draw_plan

        draw_plan(found, picture)


def _within(estimate: "Estimate", form: str = ".3g") -> str:
    """`0.5 (0.4 … 0.6)`."""
    return f"{estimate.value:{form}} ({estimate.low:{form}} … {estimate.high:{form}})"


def _print_plan(plan: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    each = f"runs of each of {len(set(plan.tasks))} tasks" if len(set(plan.tasks)) > 1 else "runs averaged"
    gains = Table(each, "gain / ‖Δ‖²", "best τ", title="expected of the plain average, beside one run")
    for gain in plan.gains:
        gains.add_row(
            "more and more" if gain.runs == float("inf") else f"{gain.runs:g}", _within(gain.share), _within(gain.tau)
        )
    groups = Table("tensors", "number", "share of ‖Δ‖²", "agreement", "Σ weights", "weights", title="suggested weights")
    for group in plan.groups:
        weights = ", ".join(f"{weight.value:.3g} ± {weight.standard_error:.2g}" for weight in group.weights)
        shown = f"{group.share:.3f}", _within(group.agreement), _within(group.tau), weights
        groups.add_row(group.group, str(len(group.tensors)), *shown)
    console.print(gains, groups)
    if plan.fit is not None:
        _print_fit(plan)
    else:
        least, whole = plan.evaluations_needed
        print(f"--losses: {least} weightings fit the loss in the leading directions, {whole} all of it")
    for row in plan.next_weightings[: 3 if plan.fit else plan.evaluations_needed[0]]:
        print(f"next weighting worth evaluating: {','.join(f'{value:.4g}' for value in row)}")
    for text in (*plan.notes, *plan.cannot_know):
        note(text)


def _print_fit(plan: "Plan") -> None:
    assert plan.fit is not None
    print("weights of least loss: " + ", ".join(_within(weight) for weight in plan.fit.weights))
    print(
        f"  predicted loss: {_within(plan.fit.loss, '.5g')}; below the plain average by {_within(plan.fit.gain_over_average)}"
    )
    print(f"  fit: {plan.fit.verdict}")
    print("  linfit merge --weights " + ",".join(f"{weight.value:.4g}" for weight in plan.fit.weights))


def curve(
    evaluations: Models,
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
    from linfit import bridge

    fits = {}
    for name, larger in [(metric, maximize)] + ([(second, second_maximize)] if second else []):
        found = bridge.read_evaluations(evaluations, name)
        larger = _direction(name, larger, found.larger_is_better)
        fits[name] = bridge.fit_curve(found.taus, found.values, found.standard_errors, maximize=larger)
    if json:
        print_json(_summary(fits))
    else:
        _print_curves(fits)
    if plot is not None:
        from figures.bridge import draw_curves

        draw_curves(fits, plot)


def _assignment(text: str) -> tuple[str, float]:
    pattern, separator, value = text.rpartition("=")
    try:
        return pattern, float(value if separator else "")
    except ValueError:
        raise ValueError(f"--layer-tau must be PATTERN=NUMBER, got {text!r}") from None


def _direction(metric: str, asked: bool, stated: bool | None) -> bool:
    """Whether to maximise: what the result files state, which an option must not contradict."""
    if asked and stated is False:
        raise ValueError(f"--maximize: {metric} is better when smaller, the result files say")
    if stated and not asked:
        note(f"{metric} is better when larger, the result files say")
    return asked if stated is None else stated


def _trade_off(fits: "Mapping[str, Curve]") -> list[float] | None:
    """Between the best τ of two metrics, each improves only at the other's cost."""
    best = sorted(fit.best_tau for fit in fits.values() if fit.convex)
    return best if len(best) == 2 else None


def _summary(fits: "Mapping[str, Curve]") -> dict[str, object]:
    first = next(iter(fits.values()))
    metrics = []
    for name, fit in fits.items():
        sign = -1 if fit.maximize else 1
        gain, gain_error = fit.gain_over_full
        signed = {field: sign * getattr(fit, field) for field in ("values", "coefficients", "residuals")}
        derived = {"metric": name} | {field: getattr(fit, field) for field in ("best_tau", "best_tau_error", "verdict")}
        derived |= {"gain_over_full": gain, "gain_over_full_error": gain_error, "next_tau": fit.next_tau()}
        derived["value_at_first_best_tau"] = sign * fit(first.best_tau)
        metrics.append(fit._asdict() | signed | derived)
    return {"metrics": metrics, "trade_off": _trade_off(fits)}


def _print_curves(fits: "Mapping[str, Curve]") -> None:
    for name, fit in fits.items():
        if fit.convex:
            gain, error = fit.gain_over_full
            print(f"{name}: best τ = {fit.best_tau:.3f} ± {fit.best_tau_error:.2g}")
            print(f"  gain over τ = 1: {gain:.4g} ± {error:.2g}")
        else:
            print(f"{name}: no best τ between the ends")
        print(f"  fit: {fit.verdict}")
        print(f"  next τ worth evaluating: {fit.next_tau():.3g}")
    first, *others = fits.values()
    for name, other in zip(list(fits)[1:], others):
        if first.convex:
            value = float(other(first.best_tau)) * (-1 if other.maximize else 1)
            print(f"{name} at the first metric's best τ: {value:.4g}")
    if between := _trade_off(fits):
        low, high = between
        print(f"trade-off: between τ = {low:.3f} and {high:.3f} each metric improves only at the other's cost")
