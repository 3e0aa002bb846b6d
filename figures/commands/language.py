"""What subcommands for language models share."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
Numbers = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]  # `--tau 0.2,0.4` is `--tau 0.2 --tau 0.4`


def numbers(name: str, texts: tuple[str, ...]) -> list[float]:
    """The numbers given to an option."""
    parts = [part for text in texts for part in text.split(",") if part.strip()]
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"--{name.replace('_', '-')} must be numbers, got {', '.join(texts)}") from None


def local_folder(name: str) -> Path:
    """A folder as it is; OWNER/NAME of the Hugging Face Hub as its local copy (extra `llm`)."""
    path = Path(name)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        advice = "to fetch it from the Hub: pip install 'linfit[llm]', or give a local folder"
        raise ValueError(f"{name} is no folder here; {advice}") from None
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{name} is no folder here and could not be fetched from the Hub ({str(error).splitlines()[0]})"
        advice = f"fetch it where there is a network, `hf download {name} --local-dir FOLDER`, and give that folder"
        raise ValueError(f"{reason}; {advice}") from None


def require_parent(out: Path) -> None:
    """Complain about a missing folder before any work is done."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.absolute().parent}")


@contextmanager
def progress(what: str, *, of_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, with bytes per second; silent where that is no terminal."""
    from rich import progress as bars
    from rich.console import Console

    amounts = [bars.DownloadColumn(), bars.TransferSpeedColumn()] if of_bytes else [bars.MofNCompleteColumn()]
    columns = [bars.TextColumn(what), bars.BarColumn(), *amounts, bars.TimeRemainingColumn()]
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def note(text: str) -> None:
    """Something worth knowing, on standard error."""
    print(f"note: {text}", file=sys.stderr)


def print_json(value: object) -> None:
    """As JSON on standard output, NaN and Inf as null: JSON has neither."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if hasattr(value, "tolist"):  # of NumPy, which is not imported for this
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
