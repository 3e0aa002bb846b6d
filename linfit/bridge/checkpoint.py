"""Reading safetensors folders: headers and indexes first, every claim in them checked, tensors lazily by range.

A safetensors file is an eight-byte length, a JSON header of that length, and the tensors' bytes. Nothing is trusted:
offsets must tile the data exactly, sizes must follow from dtype and shape, an index may only name files of its own
folder. Whatever does not hold is a `ValueError` that names the file, before a single tensor is read.
"""

import json
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linfit.bridge.numbers import FLOATS, ITEM_SIZE, decode

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000


class Tensor(NamedTuple):
    """Where one stored tensor lies. Its bytes are `path[start:stop]`, row-major, little-endian."""

    name: str
    dtype: str  # as safetensors writes it: F32, BF16, …
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def item(self) -> int:
        """Bytes of one element."""
        return ITEM_SIZE[self.dtype]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(first axis, everything else); ones for a scalar."""
        return self.shape[0] if self.shape else 1, prod(self.shape[1:])

    def describe(self) -> str:
        """`BF16 [32, 64]`."""
        return f"{self.dtype} {list(self.shape)}"


class Shard(NamedTuple):
    """One safetensors file."""

    path: Path
    header: bytes  # length, JSON and padding: everything before the data
    metadata: dict[str, str]
    tensors: tuple[Tensor, ...]  # in the order of their bytes


def _parse_json(text: bytes, path: Path, what: str) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError(f"name {next(n for n in names if names.count(n) > 1)!r} appears twice")
        return dict(pairs)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} must be a JSON object, got {type(value).__name__}")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(name: str, entry: object, path: Path, data_start: int) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: header entry {name!r} must have dtype, shape and data_offsets, got {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise ValueError(f"{path}: tensor {name!r} has dtype {dtype!r:.40}; known are {', '.join(ITEM_SIZE)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"{path}: tensor {name!r} has shape {shape!r:.60}, which must be a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{path}: tensor {name!r} has data_offsets {offsets!r:.60}, which must be [begin, end]")
    begin, end = offsets
    expected = prod(shape) * ITEM_SIZE[dtype]
    if end - begin != expected:
        raise ValueError(f"{path}: tensor {name!r} is {dtype} {shape}, {expected} bytes, but spans {end - begin}")
    return Tensor(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def read_shard(path: Path) -> Shard:
    """The header of one safetensors file, checked against the file's own size; ValueError naming the file if bad."""
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: truncated, {file_size} bytes are too few for a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES or 8 + length > file_size:
            raise ValueError(f"{path}: the header claims {length} of {file_size} bytes: truncated or foreign")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError(f"{path}: the header must start with '{{'")
    header = _parse_json(text, path, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    data_start = 8 + length
    tensors = [_tensor(name, entry, path, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            problem = "overlaps the one before" if tensor.start < position else "leaves a gap before it"
            raise ValueError(f"{path}: tensor {tensor.name!r} {problem} (starts at {tensor.start}, not {position})")
        position = tensor.stop
    if position != file_size:
        problem = "truncated" if position > file_size else "unused bytes at the end"
        raise ValueError(f"{path}: the header describes {position} bytes, the file has {file_size}: {problem}")
    return Shard(path, prefix + text, metadata, tuple(tensors))


class Checkpoint:
    """A folder in Hugging Face layout (one file, or shards and an index), or a single .safetensors file.

    `tensors` maps names to where they lie; nothing is loaded. Raises ValueError, naming the file, for a folder with
    pickles only, a missing shard, an index that points outside the folder or disagrees with its shards, a bad header.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index: dict[str, Any] | None = None
        if self.folder.is_file():
            paths = [self.folder]
            self.folder = self.folder.parent
        elif not self.folder.is_dir():
            raise ValueError(f"no such checkpoint folder: {folder}")
        elif (path := self.folder / INDEX_NAME).exists():
            self.index = _parse_json(path.read_bytes(), path, "the index")
            paths = _indexed_paths(self.index.get("weight_map"), path)
        elif (path := self.folder / "model.safetensors").exists():
            paths = [path]
        else:
            paths = [_only_safetensors(self.folder)]
        self.shards = [read_shard(path) for path in paths]
        self.tensors: dict[str, Tensor] = {}
        for tensor in (tensor for shard in self.shards for tensor in shard.tensors):
            if tensor.name in self.tensors:
                other = self.tensors[tensor.name].path.name
                raise ValueError(f"{self.folder}: tensor {tensor.name!r} is in {other} and in {tensor.path.name}")
            self.tensors[tensor.name] = tensor
        if self.index is not None:
            listed, held = self.index["weight_map"], {name: each.path.name for name, each in self.tensors.items()}
            if wrong := sorted(name for name in listed.keys() | held.keys() if listed.get(name) != held.get(name)):
                raise ValueError(
                    f"{self.folder / INDEX_NAME}: disagrees with its shards about {some(wrong, 'tensor')}; "
                    f"{wrong[0]!r} is listed in {listed.get(wrong[0])} and found in {held.get(wrong[0])}"
                )
        config = self.folder / "config.json"
        self.config = _parse_json(config.read_bytes(), config, "the config") if config.is_file() else {}

    def version(self, name: str) -> Tensor | None:
        """What this model has of a tensor, if anything."""
        return self.tensors.get(name)


def _indexed_paths(weight_map: object, index: Path) -> list[Path]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object of tensor name → file name")
    for name in weight_map.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
        if not plain or "\\" in name or "\0" in name:
            raise ValueError(f"{index}: points outside its folder: {name!r:.80}; it needs a plain *.safetensors name")
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"{index}: missing {some(missing, 'shard')}")
    return paths


def _only_safetensors(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise ValueError(f"{folder}: {len(found)} safetensors files but no {INDEX_NAME} to say which belong together")
    pickled = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in pickled):
        raise ValueError(
            f"{folder}: only pickled weights ({some(pickles, 'file')}), which may run code when loaded and are never "
            "opened here; convert once, where you trust them: transformers' "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    if snapshots := sorted(path.name for path in folder.glob("snapshots/*")):
        raise ValueError(f"{folder}: a repository of the Hub cache; give one of its {some(snapshots, 'snapshot')}")
    raise ValueError(f"{folder}: no safetensors file")


def some(names: Iterable[str], noun: str, limit: int = 6) -> str:
    """`3 tensors: a, b, c`, shortened."""
    listed = list(names)
    shown = ", ".join(listed[:limit]) + (", …" if len(listed) > limit else "")
    return f"{len(listed)} {noun}{'s' if len(listed) != 1 else ''}: {shown}"


class Files(ExitStack):
    """Open descriptors for all files that hold some tensors, and exact positioned reads; shared between threads."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.bytes_read, self._count = 0, threading.Lock()
        self._descriptors: dict[Path, int] = {}
        try:
            for path in {tensor.path for tensor in tensors}:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
                self.callback(os.close, self._descriptors[path])
        except OSError:
            self.close()
            raise

    def read(
        self, tensor: Tensor, start: int = 0, stop: int | None = None, into: np.ndarray | None = None
    ) -> np.ndarray:
        """Elements [start, stop) of a tensor as stored bytes (uint8), into `into` if given; ValueError if it ends."""
        stop = tensor.size if stop is None else stop
        buffer = np.empty((stop - start) * tensor.item, np.uint8) if into is None else into
        view, position, descriptor = buffer.data, tensor.start + start * tensor.item, self._descriptors[tensor.path]
        while len(view):
            got = os.preadv(descriptor, [view], position)
            if got == 0:
                raise ValueError(f"{tensor.path}: truncated while it was being read, at byte {position}")
            view, position = view[got:], position + got
        with self._count:
            self.bytes_read += buffer.size
        return buffer

    def values(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of a floating tensor in float32, float64 for F64."""
        return decode(self.read(tensor, start, stop), tensor.dtype)


def load(folder: str | Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Floating tensors of a checkpoint as float32 arrays (float64 for F64): a pytree, for models that fit in memory.

    Args:
        folder: as for `Checkpoint`.
        names: tensors to load; all by default. Integer and boolean ones are left out.
    """
    tensors = Checkpoint(folder).tensors
    chosen = [tensors[name] for name in (tensors if names is None else names)]
    with Files(chosen) as files:
        return {each.name: files.values(each).reshape(each.shape) for each in chosen if each.dtype in FLOATS}
