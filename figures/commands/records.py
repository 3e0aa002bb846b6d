"""Subcommands for datasets of language models. Nothing heavy is imported until one of them runs."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from figures.commands.language import Out, note, progress, require_parent


def weights(
    losses: Annotated[Path, tyro.conf.Positional], /, out: Out, temperature: float | None = None, tokens: bool = False
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

    from linfit.bridge import read_records, weigh, write_records

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weighed, used = weigh(read_records(losses), temperature, tokens=tokens)
    require_parent(out)
    write_records(out, weighed)
    values = np.concatenate([np.atleast_1d(record["token_weights" if tokens else "weight"]) for record in weighed])
    for warning in caught:
        note(str(warning.message))
    print(f"temperature {used:.6g}; {values.size} weights, mean {values.mean():.4g}; written to {out}")
    if values.size and np.ptp(values) == 0:
        note("all weights are equal: no sample is preferred, they only scale the learning rate")


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
    from linfit.bridge import write_losses

    require_parent(out)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "tokens": tokens}
    options |= {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with progress("losses") as bar:
        resumed = write_losses(model, data, out, progress=bar, **options)
    print(f"written to {out}" + (f"; {resumed} records were finished before" if resumed else ""))


def targets(answers: Annotated[Path, tyro.conf.Positional], /, out: Out, judge: str = "normalised") -> None:
    """S3FT training targets: own answer if judged right, else own paraphrase of gold if judged right, else gold.

    Args:
        answers: JSON lines with texts own and gold, and perhaps paraphrase; other fields are kept.
        out: JSON lines with completion (the chosen target) and source (own, paraphrase or gold).
        judge: exact, normalised (case, punctuation and articles aside), last-number (GSM8K), regex:PATTERN, or
            command:COMMAND, which reads {"answer", "gold"} as JSON and exits 0 to accept, 1 to reject.
    """
    from linfit.bridge import choose_targets, judge_named, read_records, write_records

    verdict = judge_named(judge)
    require_parent(out)
    chosen, shares = choose_targets(read_records(answers), verdict)
    write_records(out, chosen)
    print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + f" of {len(chosen)}; written to {out}")
