"""Losses of a language model on a dataset (extra `llm`): batched, resumable, never from pickles."""

import json
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from linfit.bridge.records import Record, read_records
from linfit.internal.files import whole_file

_IGNORED = -100  # label of a token that is no target


def write_losses(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    batch_size: int = 8,
    max_length: int = 2048,
    tokens: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Mean loss per target token of every record of `data`, in nats; returns how many a run before this one had done.

    Args:
        model: folder or Hub name.
        data: JSON lines with `text`; or `prompt` and `completion` (the targets); or `messages` (the last one is the
            target); or `input_ids` and optionally `labels`, as a Trainer would see them.
        out: JSON lines with the record's `index`, `loss` (null without a target) and number of target `tokens`.
        batch_size: records at once; what is finished survives an interruption.
        max_length: tokens kept of each record.
        tokens: also write the list `token_losses`, null where a token is no target.
        device, dtype: of torch; the stored dtype by default.
        trust_remote_code: run custom code that comes with the model.
        progress: told how many records are done, and of how many.

    Raises ValueError for records of another form.
    """
    if batch_size < 1 or max_length < 2:
        raise ValueError(f"batch_size must be at least 1 and max_length at least 2, got {batch_size} and {max_length}")
    records, out = read_records(data), Path(out)
    partial = out.with_name(f".{out.name}.partial")
    done = _finished_lines(partial, _identity(model, data, max_length, tokens, dtype))
    if done < len(records):
        import torch
        import transformers

        options = {"trust_remote_code": trust_remote_code}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True, **options)
        loaded, tokenizer = loaded.to(device).eval(), None
        if not all("input_ids" in record for record in records):
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
        with open(partial, "a", encoding="utf-8") as file, torch.inference_mode():
            for start in range(done, len(records), batch_size):
                batch = enumerate(records[start : start + batch_size], start)
                encoded = [encode_record(record, tokenizer, max_length, index) for index, record in batch]
                for index, values in enumerate(_token_losses(loaded, encoded, device), start):
                    counted = [value for value in values if value is not None]
                    loss = sum(counted) / len(counted) if counted else None
                    line = {"index": index, "loss": loss, "tokens": len(counted)}
                    file.write(json.dumps({**line, "token_losses": values} if tokens else line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                if progress is not None:
                    progress(start + len(encoded), len(records))
    with whole_file(out) as whole:
        whole.write_bytes(partial.read_bytes().partition(b"\n")[2])
    partial.unlink()
    return done


def _identity(model: str | Path, data: str | Path, max_length: int, tokens: bool, dtype: str) -> str:
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = sha256(Path(data).read_bytes()).hexdigest()
    return sha256(json.dumps([str(model), state, content, max_length, tokens, dtype]).encode()).hexdigest()


def _finished_lines(partial: Path, identity: str) -> int:
    """Records finished by an interrupted run of the same job; a torn last line and another job's file are dropped."""
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    if lines and lines[0].strip() == identity.encode():
        whole = [line for line in lines if line.endswith(b"\n")]
        partial.write_bytes(b"".join(whole))
        return len(whole) - 1
    partial.write_text(identity + "\n")
    return 0


def encode_record(record: Record, tokenizer: Any, max_length: int, index: int) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one record, cut to `max_length`; ValueError if it has none of the known forms."""
    if "input_ids" in record:
        ids = list(record["input_ids"])
        labels = list(record.get("labels", ids))
        if len(labels) != len(ids) or not ids:
            raise ValueError(f"record {index}: labels must be as long as input_ids, and not empty")
    elif isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        start = tokenizer(record["prompt"]).input_ids
        end = tokenizer(record["completion"], add_special_tokens=False).input_ids
        ids, labels = start + end, [_IGNORED] * len(start) + end
    elif isinstance(record.get("text"), str):
        ids = labels = tokenizer(record["text"]).input_ids
    elif isinstance(record.get("messages"), list) and record["messages"]:
        ids, labels = _encode_messages(record["messages"], tokenizer)
    else:
        needed = "text, prompt and completion, messages, or input_ids"
        raise ValueError(f"record {index}: needs {needed}; found {', '.join(record)}")
    return ids[:max_length], list(labels[:max_length])


def _encode_messages(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    def ids_of(part: list[dict[str, str]], prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)
        return tokenizer(text, add_special_tokens=False).input_ids

    start, ids = ids_of(messages[:-1], True) if messages[:-1] else [], ids_of(messages, False)
    shared = next((k for k, pair in enumerate(zip(start, ids)) if pair[0] != pair[1]), min(len(start), len(ids)))
    return ids, [_IGNORED] * shared + ids[shared:]


def _token_losses(model: Any, encoded: Sequence[tuple[list[int], list[int]]], device: str) -> list[list[float | None]]:
    """For each record one loss per position, None where the token is no target; the first token never is."""
    import torch

    longest = max(max(len(ids) for ids, _ in encoded), 1)
    inputs = torch.zeros(len(encoded), longest, dtype=torch.long)
    for row, (ids, _) in enumerate(encoded):
        inputs[row, : len(ids)] = torch.tensor(ids)
    lengths = torch.tensor([[len(ids)] for ids, _ in encoded])
    attention = (torch.arange(longest) < lengths).long()
    logits = model(input_ids=inputs.to(device), attention_mask=attention.to(device)).logits
    results = []
    for row, (ids, labels) in enumerate(encoded):
        target = torch.tensor(labels[1:], device=device, dtype=torch.long)
        predicted = logits[row, : max(len(ids) - 1, 0)].float()
        values = torch.nn.functional.cross_entropy(predicted, target, reduction="none", ignore_index=_IGNORED).tolist()
        counted = [None, *(None if label == _IGNORED else value for value, label in zip(values, labels[1:]))]
        results.append(counted[: len(ids)])
    return results
