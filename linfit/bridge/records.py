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
        for number, line in ((number, line) for number, line in enumerate(file, start=1) if line.strip()):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(records[-1], dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object, got {type(records[-1]).__name__}")
    if not records:
        raise ValueError(f"{path}: holds no records")
    return records


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write JSON lines; the file appears whole or not at all."""
    with whole_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def losses_of(records: Sequence[Record], path: str | Path = "records", field: str = "loss") -> np.ndarray:
    """The field `loss` (or another one) of every record (n,); null is NaN."""
    losses = []
    for number, record in enumerate(records, start=1):
        value = record.get(field, record)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{path}, record {number}: needs a number `{field}`, found {', '.join(record)}")
        losses.append(np.nan if value is None else value)
    return np.array(losses, float)


def _token_losses_of(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """The field `token_losses` of every record, padded (n, t), and the mask of target tokens; null is not a target."""
    lists: list[list[float | None]] = []
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("token_losses"), list):
            raise ValueError(f"record {number}: needs a list `token_losses` (`linfit losses --tokens` writes it)")
        lists.append(record["token_losses"])
    shape = len(lists), max(map(len, lists))
    losses, mask = np.zeros(shape), np.zeros(shape, bool)
    for row, values in enumerate(lists):
        mask[row, : len(values)] = [value is not None for value in values]
        losses[row, mask[row]] = [value for value in values if value is not None]
    return losses, mask


def weigh(
    records: Sequence[Record], temperature: float | None = None, *, tokens: bool = False
) -> tuple[list[Record], float]:
    """Every record with its FLOW `weight` exp(−loss/T), and T (paper 2502.02797).

    Args:
        records: with a number `loss` each, or lists `token_losses`, null where a token is no target.
        temperature: T; the median loss by default.
        tokens: weights per token, `token_weights`, 0 where a token is no target.

    >>> from linfit.bridge import weigh
    >>> weigh([{"loss": 0.0}, {"loss": 2.0}], temperature=1e9)[0][0]
    {'loss': 0.0, 'weight': 1.0}
    """
    from linfit.weighting import flow_weights, median_temperature

    losses, mask = _token_losses_of(records) if tokens else (losses_of(records), None)
    used = float(median_temperature(losses, mask)) if temperature is None else temperature
    weights = np.asarray(flow_weights(losses, used, mask))
    if tokens:
        lengths = [len(record["token_losses"]) for record in records]
        return [{**r, "token_weights": w[:t].tolist()} for r, w, t in zip(records, weights, lengths)], used
    return [{**record, "weight": float(weight)} for record, weight in zip(records, weights)], used


Judge = Callable[[str, str], bool]  # (answer, gold) → whether the answer is right
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def _normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _last_number(text: str) -> float | None:
    """The last number in a text, as answers to GSM8K are compared."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _last_match(pattern: str) -> Callable[[str], str | None]:
    """What a pattern captures (its first group, or all of it) at its last match in a text."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex is not valid: {pattern!r}: {error}") from None

    def captured(text: str) -> str | None:
        found = list(compiled.finditer(text))
        return found[-1][1 if compiled.groups else 0] if found else None

    return captured


def _command_judge(command: str) -> Judge:
    """Runs a shell command with {"answer", "gold"} as JSON on its standard input; exit 0 accepts, 1 rejects."""

    def judge(answer: str, gold: str) -> bool:
        given = json.dumps({"answer": answer, "gold": gold})
        done = subprocess.run(command, shell=True, input=given, text=True, capture_output=True, check=False)
        if done.returncode not in (0, 1):
            raise ValueError(f"judge command ended with {done.returncode}, not 0 or 1: {done.stderr.strip()[:200]}")
        return done.returncode == 0

    return judge


# What a judge compares of two texts.
_READINGS: dict[str, Callable[[str], object]] = {
    "exact": str.strip,
    "normalised": _normalise,
    "last-number": _last_number,
}


def judge_named(name: str) -> Judge:
    """A judge: `exact`, `normalised`, `last-number`, `regex:PATTERN` or `command:COMMAND`; ValueError for others.

    >>> from linfit.bridge import judge_named
    >>> judge_named("last-number")("3 + 4 = 7", "7")
    True
    """
    kind, _, argument = name.partition(":")
    if kind == "command" and argument:
        return _command_judge(argument)
    if not (kind == "regex" and argument) and name not in _READINGS:
        raise ValueError(f"judge must be {', '.join(_READINGS)}, regex:PATTERN or command:COMMAND, got {name!r}")
    seen = _READINGS[name] if name in _READINGS else _last_match(argument)
    return lambda answer, gold: seen(answer) is not None and seen(answer) == seen(gold)


def choose_targets(records: Sequence[Record], judge: Judge) -> tuple[list[Record], dict[str, float]]:
    """S3FT targets (paper 2502.08130): records with `completion` and `source`, and the share of each source.

    Each record has texts `own` and `gold`, and perhaps a `paraphrase`; other fields are kept. ValueError otherwise.
    """
    from linfit.targets import Source, s3ft_targets

    for number, record in enumerate(records, start=1):
        wrong = [key for key in ("own", "gold") if not isinstance(record.get(key), str)]
        if wrong or not isinstance(record.get("paraphrase"), str | None):
            needed = "texts `own` and `gold` (and perhaps `paraphrase`)"
            raise ValueError(f"record {number}: needs {needed}, got {list(record)}")
    own, gold = [record["own"] for record in records], [record["gold"] for record in records]
    targets = s3ft_targets(own, gold, judge, [record.get("paraphrase") for record in records])
    chosen = []
    for record, value, source in zip(records, targets.values, targets.source):
        kept = {name: entry for name, entry in record.items() if name not in ("own", "gold", "paraphrase")}
        chosen.append({**kept, "completion": value, "source": Source(source).name.lower()})
    return chosen, targets.shares()
