"""Datasets as JSON lines: reading, writing whole files, judges, weights and targets."""

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from linfit.internal.files import whole_file

Record = dict[str, Any]


def read_records(path: str | Path) -> list[Record]:
    """One JSON object per line; ValueError naming the first line that is not one."""
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object, got {type(record).__name__}")
            records.append(record)
    if not records:
        raise ValueError(f"{path}: holds no records")
    return records


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write JSON lines; the file appears whole or not at all."""
    with whole_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# Weights ------------------------------------------------------------------------------------------------------------


def losses_of(records: Sequence[Record], path: str | Path = "records", field: str = "loss") -> np.ndarray:
    """The field `loss` (or another one) of every record (n,); null is NaN."""
    losses = []
    for number, record in enumerate(records, start=1):
        value = record.get(field, record)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{path}, record {number}: needs a number `{field}`, found {', '.join(record)}")
        losses.append(np.nan if value is None else value)
    return np.array(losses, float)


def _token_losses_of(records: Sequence[Record], path: str | Path = "records") -> tuple[np.ndarray, np.ndarray]:
    """The field `token_losses` of every record, padded (n, t), and the mask of target tokens; null is not a target."""
    lists = [record.get("token_losses") for record in records]
    for number, values in enumerate(lists, start=1):
        if not isinstance(values, list):
            raise ValueError(
                f"{path}, record {number}: needs a list `token_losses` (`linfit losses --tokens` writes it)"
            )
    longest = max(map(len, lists))  # type: ignore[arg-type]
    losses, mask = np.zeros((len(lists), longest)), np.zeros((len(lists), longest), bool)
    for row, values in enumerate(lists):
        for column, value in enumerate(values):  # type: ignore[arg-type]
            if value is not None:
                losses[row, column], mask[row, column] = value, True
    return losses, mask


def weigh(
    records: Sequence[Record], temperature: float | None = None, *, tokens: bool = False
) -> tuple[list[Record], float]:
    """Every record with its FLOW `weight` (or `token_weights`, 0 where a token is no target), and the temperature."""
    from linfit.weighting import flow_weights, median_temperature

    if tokens:
        losses, mask = _token_losses_of(records)
        used = float(median_temperature(losses, mask)) if temperature is None else temperature
        weights = np.asarray(flow_weights(losses, used, mask))
        lengths = [len(record["token_losses"]) for record in records]
        weighed = [{**r, "token_weights": w[:t].tolist()} for r, w, t in zip(records, weights, lengths)]
        return weighed, used
    losses = losses_of(records)
    used = float(median_temperature(losses)) if temperature is None else temperature
    weights = np.asarray(flow_weights(losses, used))
    return [{**record, "weight": float(weight)} for record, weight in zip(records, weights)], used


# Judges: (answer, gold) → bool --------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def _normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    >>> _normalise("The answer:  Forty-two!")
    'answer forty two'
    """
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _last_number(text: str) -> float | None:
    """The last number in a text, as answers to GSM8K are compared.

    >>> _last_number("so it costs $1,234.50 in all.")
    1234.5
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(answer: str, gold: str) -> bool:
    """Whether both end in the same number."""
    number = _last_number(answer)
    return number is not None and number == _last_number(gold)


def _regex_judge(pattern: str) -> Callable[[str, str], bool]:
    """Compares what the pattern captures (its first group, or all of it) at its last match in each text.

    >>> _regex_judge(r"Answer: (\\w+)")("Answer: B", "I think so. Answer: B")
    True
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex is not valid: {pattern!r}: {error}") from None

    def captured(text: str) -> str | None:
        last = None
        for match in compiled.finditer(text):
            last = match
        return None if last is None else last[1 if compiled.groups else 0]

    return lambda answer, gold: captured(answer) is not None and captured(answer) == captured(gold)


def _command_judge(command: str) -> Callable[[str, str], bool]:
    """Runs a shell command with {"answer", "gold"} as JSON on its standard input; exit 0 accepts, 1 rejects."""

    def judge(answer: str, gold: str) -> bool:
        given = json.dumps({"answer": answer, "gold": gold})
        done = subprocess.run(command, shell=True, input=given, text=True, capture_output=True, check=False)
        if done.returncode not in (0, 1):
            raise ValueError(f"judge command ended with {done.returncode}, not 0 or 1: {done.stderr.strip()[:200]}")
        return done.returncode == 0

    return judge


_JUDGES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, gold: answer.strip() == gold.strip(),
    "normalised": lambda answer, gold: _normalise(answer) == _normalise(gold),
    "last-number": _same_number,
}


def judge_named(name: str) -> Callable[[str, str], bool]:
    """A judge of `_JUDGES`, `regex:PATTERN` or `command:COMMAND`; ValueError for anything else."""
    kind, _, argument = name.partition(":")
    if kind == "regex" and argument:
        return _regex_judge(argument)
    if kind == "command" and argument:
        return _command_judge(argument)
    if name not in _JUDGES:
        raise ValueError(f"judge must be {', '.join(_JUDGES)}, regex:PATTERN or command:COMMAND, got {name!r}")
    return _JUDGES[name]


def choose_targets(
    records: Sequence[Record], judge: Callable[[str, str], bool]
) -> tuple[list[Record], dict[str, float]]:
    """S3FT targets from the fields own, gold and (optional) paraphrase: records with `completion` and `source`."""
    from linfit.targets import Source, s3ft_targets

    for number, record in enumerate(records, start=1):
        wrong = [key for key in ("own", "gold") if not isinstance(record.get(key), str)]
        if wrong or not isinstance(record.get("paraphrase"), str | None):
            raise ValueError(
                f"record {number}: needs texts `own` and `gold` (and perhaps `paraphrase`), got {list(record)}"
            )
    own, gold = [record["own"] for record in records], [record["gold"] for record in records]
    targets = s3ft_targets(own, gold, judge, [record.get("paraphrase") for record in records])
    chosen = [
        {**{k: v for k, v in record.items() if k not in ("own", "gold", "paraphrase")}, "completion": value,
         "source": Source(source).name.lower()}
        for record, value, source in zip(records, targets.values, targets.source)
    ]  # fmt: skip
    return chosen, targets.shares()
