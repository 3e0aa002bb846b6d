"""Which checkpoints belong together: common names, shapes and dtypes of a base and what was fine-tuned from it."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from linfit.bridge.adapter import CONFIG_NAME, Adapter, LowRank
from linfit.bridge.checkpoint import Checkpoint, Files, Tensor, some
from linfit.bridge.numbers import FLOATS
from linfit.bridge.pieces import PIECE_BYTES, spans

_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


Paths = str | Path | Sequence[str | Path]


class Family(NamedTuple):
    """A base and what was fine-tuned from it, checked to fit together."""

    base: Checkpoint
    tuned: tuple[Checkpoint | Adapter, ...]
    template: Checkpoint  # whose files the output copies: the first tuned folder, or the base of an adapter
    names: tuple[str, ...]  # tensors of the output
    shared_rows: dict[str, int]  # rows that all have, for tensors whose first axis differs
    notes: tuple[str, ...]

    def versions(self, name: str) -> list[Tensor | LowRank | None]:
        """What each fine-tuned model says about a tensor; an adapter that leaves it alone says the base."""
        return [member.version(name) for member in self.tuned]

    def comparable(self, only: str | None = None) -> list[str]:
        """Floating tensors that all have in one shape, whose names fit the shell pattern; ValueError without any."""

        def fits(name: str) -> bool:
            tensor = self.template.tensors[name]
            everywhere = None not in (self.base.version(name), *self.versions(name))
            return everywhere and tensor.dtype in FLOATS and tensor.size > 0 and name not in self.shared_rows

        names = [name for name in self.names if fits(name) and matches("*" if only is None else only, name)]
        if not names:
            raise ValueError(f"only={only!r} fits no floating tensor that base and tuned share")
        return names


def open_family(base: str | Path, tuned: Paths, *, shared: bool = False, mixed_dtypes: bool = False) -> Family:
    """Open a base and its fine-tuned versions (or adapters) and check that they fit together.

    `shared` lets tensor names and first axes (vocabularies) differ, `mixed_dtypes` floating dtypes. ValueError listing
    both sides where others, or architectures, differ.
    """
    paths = [tuned] if isinstance(tuned, str | Path) else list(tuned)
    if not paths:
        raise ValueError("tuned must name at least one fine-tuned checkpoint")
    start = Checkpoint(base)
    adapted = [path for path in paths if (Path(path) / CONFIG_NAME).is_file()]
    members = tuple(Adapter(path, start) if path in adapted else Checkpoint(path) for path in paths)
    full = [start, *(member for member in members if isinstance(member, Checkpoint))]
    for checkpoint in full:
        refuse_quantised(checkpoint, "averaged")
        kinds = start.config.get("model_type"), checkpoint.config.get("model_type")
        if None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(f"different models: {base} is {kinds[0]!r}, {checkpoint.folder} is {kinds[1]!r}")
    template = members[0] if isinstance(members[0], Checkpoint) else start
    notes: list[str] = []
    dropped = _tied_duplicates(full)
    names = _common_names(full, template, dropped, shared, notes)
    if dropped & template.tensors.keys():
        notes.append(f"tied to the input embedding and written once: {', '.join(sorted(dropped))}")
    shared_rows = _check_shapes(full, names, shared, mixed_dtypes, notes)
    return Family(start, members, template, tuple(names), shared_rows, tuple(notes))


def refuse_quantised(checkpoint: Checkpoint, action: str) -> None:
    """ValueError for stored values that mean nothing by themselves."""
    if checkpoint.config.get("quantization_config"):
        raise ValueError(
            f"{checkpoint.folder}: quantised weights mean something only together with their scales and cannot be "
            f"{action}; dequantise first"
        )


def matches(pattern: str, name: str) -> bool:
    """Whether a tensor name fits a shell pattern, wholly or up to `.weight`/`.bias`.

    >>> matches("model.layers.0.*", "model.layers.0.mlp.up_proj.weight")
    True
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name.rsplit(".", 1)[0], pattern)


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two stored tensors have the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with Files([first, second]) as files:
        ranges = spans(first.size, PIECE_BYTES // first.item)
        return all(np.array_equal(files.read(first, *span), files.read(second, *span)) for span in ranges)


def _tied_duplicates(full: Sequence[Checkpoint]) -> set[str]:
    """Output embeddings that the configuration ties to the input embedding and that repeat its bytes everywhere."""

    def tied(config: dict) -> bool:
        nested = config.get("text_config")
        return bool(config.get("tie_word_embeddings", isinstance(nested, dict) and nested.get("tie_word_embeddings")))

    def repeated(head: str, tensors: dict[str, Tensor]) -> bool:
        return head not in tensors or any(
            name.endswith(_INPUT_EMBEDDINGS) and same_bytes(tensor, tensors[head]) for name, tensor in tensors.items()
        )

    if not all(tied(each.config) for each in full):
        return set()
    heads = {name for each in full for name in each.tensors if name.endswith(_OUTPUT_EMBEDDINGS)}
    return {head for head in heads if all(repeated(head, each.tensors) for each in full)}


def _common_names(
    full: Sequence[Checkpoint], template: Checkpoint, dropped: set[str], shared: bool, notes: list[str]
) -> list[str]:
    base = full[0]
    wanted = base.tensors.keys() - dropped
    for checkpoint in full[1:]:
        found = checkpoint.tensors.keys() - dropped
        sides = [(base, sorted(wanted - found)), (checkpoint, sorted(found - wanted))]
        listed = "; ".join(f"only in {side.folder}: {some(names, 'tensor')}" for side, names in sides if names)
        if listed and not shared:
            raise ValueError(f"tensor names differ: {listed}; --shared averages the shared ones only")
        if listed:
            notes.append(f"tensor names differ: {listed}")
    names = [tensor.name for shard in template.shards for tensor in shard.tensors if tensor.name not in dropped]
    if shared and not any(name in base.tensors for name in names):
        raise ValueError(f"{base.folder} and {template.folder} share no tensor")
    return names


def _check_shapes(
    full: Sequence[Checkpoint], names: list[str], shared: bool, mixed_dtypes: bool, notes: list[str]
) -> dict[str, int]:
    shared_rows: dict[str, int] = {}
    complaints = []
    for name in names:
        first, *others = [each.tensors[name] for each in full if name in each.tensors]
        for other in others:
            longer, kinds = first.shape != other.shape, {first.dtype, other.dtype}
            if longer and shared and first.shape and other.shape and other.shape[1:] == first.shape[1:]:
                shared_rows[name] = min(side.shape[0] for side in (first, *others))
            elif longer or (len(kinds) > 1 and not (mixed_dtypes and kinds <= set(FLOATS))):
                complaints.append(f"{name} {first.describe()} in the base, {other.describe()} in {other.path.parent}")
    if complaints:
        raise ValueError(
            f"shapes or dtypes differ: {some(complaints, 'tensor', 4)}; --shared averages the rows that all share, "
            "--dtype allows and ends a mixture of dtypes"
        )
    for name, rows in shared_rows.items():
        notes.append(f"{name}: the first {rows} rows are averaged, any further ones are the tuned model's")
    return shared_rows
