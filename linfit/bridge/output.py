"""Writing checkpoints: a folder that appears whole or not at all, resumes after an interruption, and is checked first.

Everything goes to a hidden folder beside the target, where a shard gets its name once it is finished and on the disk;
the last act is to rename the folder. A second run of the same plan on unchanged inputs goes on after the last
finished shard, any other starts clean.
"""

import fcntl
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linfit.bridge.adapter import Adapter
from linfit.bridge.checkpoint import INDEX_NAME, Checkpoint, Files, Shard, Tensor
from linfit.bridge.numbers import ITEM_SIZE
from linfit.internal.files import sync

Write = Callable[[int, int, np.ndarray], None]  # (output, position from the start of the tensor, bytes)
Piece = Callable[[Files, Write], None]  # one unit of work for one worker
Progress = Callable[[int, int], None]  # (done, total)
_Count = Callable[[int], None]  # (bytes written)


class Planned(NamedTuple):
    """One tensor to be written to every output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]  # what its pieces read
    pieces: Callable[[], Iterator[Piece]]

    @property
    def byte_size(self) -> int:
        """Bytes as stored."""
        return prod(self.shape) * ITEM_SIZE[self.dtype]


class Written(NamedTuple):
    """What a merge or perturbation has written."""

    folders: list[Path]
    notes: list[str]  #: What deserves attention: choices made, tensors that could not be averaged.
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed_shards: int  #: Found finished from an interrupted run.


def write_checkpoints(
    out: str | Path,
    cards: Mapping[str, Mapping[str, str]],
    template: Checkpoint,
    plan: Callable[[Tensor], Planned | None],
    *,
    title: str,
    inputs: Sequence[Checkpoint | Adapter],
    arguments: Mapping[str, Any],
    side_folders: Iterable[Path],
    dtype: str | None = None,
    notes: list[str],
    workers: int,
    progress: Progress | None,
) -> Written:
    """Write `out` (or `out/label` for several outputs) tensor by tensor, then rename it into place, or leave nothing.

    `cards` maps labels to the facts of a model card, `plan` says what becomes of each tensor of `template` (None leaves
    one out); a resumed run must find `inputs` and `arguments` unchanged; config, tokenizer and the like come from
    `side_folders`, a later one on top; `notes` may grow until the last piece has run.
    """
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already; choose another output folder, or remove it first")
    for folder in (each.folder for each in inputs):
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"the output {out} must lie outside the input {folder}")
    shards = [_plan_shard(shard, filter(None, map(plan, shard.tensors))) for shard in template.shards]
    paths = [shard.path for each in inputs for shard in each.shards]
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    asked = json.dumps([arguments, state], sort_keys=True, default=str)
    with _hidden_folder(out, hashlib.sha256(asked.encode()).hexdigest()) as partial:
        folders = [partial / label for label in cards] if len(cards) > 1 else [partial]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        started = time.perf_counter()
        todo = [shard for shard in shards if not all(shard.finished(folder) for folder in folders)]
        try:
            bytes_read, bytes_written = _write_shards(todo, folders, out, max(1, workers), progress)
        except ValueError:  # will not go away by running again: leave nothing behind
            shutil.rmtree(partial)
            raise
        own = template.folder / "README.md"
        card = own.read_text(encoding="utf-8").rstrip() + "\n\n" if own.is_file() else ""
        for folder, facts in zip(folders, cards.values()):
            _write_index(folder, shards, template)
            for source in side_folders:
                _copy_side_files(source, folder)
            _set_config_dtype(folder, dtype)
            lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
            (folder / "README.md").write_text(f"{card}## {title}\n\n{lines}\n", encoding="utf-8")
        _publish(partial, out)
    final = [out / folder.relative_to(partial) for folder in folders]
    seconds = time.perf_counter() - started
    return Written(final, list(notes), bytes_read, bytes_written, seconds, len(shards) - len(todo))


class _PlannedShard(NamedTuple):
    """One file to be written to every output."""

    file_name: str
    header: bytes
    starts: dict[str, int]  # where each tensor's bytes begin in the file
    tensors: tuple[Planned, ...]
    file_size: int

    def finished(self, folder: Path) -> bool:
        """Whether an earlier run has written it: only then does it have its name."""
        path = folder / self.file_name
        return path.is_file() and path.stat().st_size == self.file_size


def _plan_shard(template: Shard, planned: Iterable[Planned]) -> _PlannedShard:
    """The layout of one output file; the template's own header where nothing but values changes."""
    tensors = tuple(planned)
    described = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    if described == {tensor.name: (tensor.dtype, tensor.shape) for tensor in template.tensors}:
        starts = {tensor.name: tensor.start for tensor in template.tensors}
        size = max((tensor.stop for tensor in template.tensors), default=len(template.header))
        return _PlannedShard(template.path.name, template.header, starts, tensors, size)
    tensors = tuple(sorted(tensors, key=lambda tensor: -ITEM_SIZE[tensor.dtype]))  # keeps every tensor aligned
    entries: dict[str, Any] = {"__metadata__": template.metadata} if template.metadata else {}
    offsets, position = {}, 0
    for name, dtype, shape, *_ in tensors:
        offsets[name], end = position, position + prod(shape) * ITEM_SIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    starts = {name: len(header) + offset for name, offset in offsets.items()}
    return _PlannedShard(template.path.name, header, starts, tensors, len(header) + position)


# In the hidden folder until it is renamed; no file copied from an input has a name that starts with a dot.
_LOCK, _IDENTITY = ".lock", ".identity"


@contextmanager
def _hidden_folder(out: Path, identity: str) -> Iterator[Path]:
    """Where `out` is prepared, by one process at a time; what a run with another identity has left is removed."""
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing {out}") from None
        if not partial.exists():
            raise ValueError(f"another run has just finished {out}")
        mark = partial / _IDENTITY
        if not mark.is_file() or mark.read_text() != identity:
            for entry in partial.iterdir():
                if entry.name != _LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            sync(partial)  # a power cut must not bring back the old shards under the new identity
            mark.write_text(identity)
        yield partial


def _write_shards(
    shards: Sequence[_PlannedShard], folders: Sequence[Path], out: Path, workers: int, progress: Progress | None
) -> tuple[int, int]:
    """Write all shards, one after the other; bytes read and written."""
    needed = sum(shard.file_size for shard in shards) * len(folders)
    occupied = sum(path.stat().st_size for folder in folders for path in folder.glob("*.writing"))
    if needed > (free := shutil.disk_usage(folders[0]).free + occupied):
        raise ValueError(f"{out} needs {needed / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free")
    total = sum(tensor.byte_size for shard in shards for tensor in shard.tensors) * len(folders)
    bytes_read = done = 0

    def count(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(done, total)

    with ThreadPoolExecutor(workers) as pool:
        for shard in shards:
            with Files(source for tensor in shard.tensors for source in tensor.sources) as files:
                _write_shard(shard, folders, files, pool, workers, count)
            bytes_read += files.bytes_read
    return bytes_read, needed


def _write_shard(
    shard: _PlannedShard, folders: Sequence[Path], files: Files, pool: Executor, workers: int, count: _Count
) -> None:
    paths = [folder / f"{shard.file_name}.writing" for folder in folders]
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644) for path in paths]

    def work(tensor: Planned, piece: Piece) -> None:
        def write(output: int, position: int, data: np.ndarray) -> None:
            _write_all(descriptors[output], data.data, shard.starts[tensor.name] + position)
            count(data.nbytes)

        try:
            piece(files, write)
        except ValueError as error:
            raise ValueError(f"{tensor.name}: {error}") from None

    try:
        for descriptor in descriptors:
            _write_all(descriptor, shard.header, 0)
            os.ftruncate(descriptor, shard.file_size)
        _run(((work, tensor, piece) for tensor in shard.tensors for piece in tensor.pieces()), pool, 2 * workers)
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    for path in paths:
        path.replace(path.with_suffix(""))


def _run(jobs: Iterator[tuple], pool: Executor, at_once: int) -> None:
    """All jobs (function, arguments …), a few of them submitted at a time; the first error stops the rest."""
    running: set[Future[None]] = set()
    while running := running | {pool.submit(*job) for job in islice(jobs, at_once - len(running))}:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        try:
            for future in finished:
                future.result()
        except BaseException:
            for future in running:
                future.cancel()
            wait(running)
            raise


def _write_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _write_index(folder: Path, shards: Sequence[_PlannedShard], template: Checkpoint) -> None:
    if template.index is None:
        return
    tensors = {tensor.name: (tensor, shard.file_name) for shard in shards for tensor in shard.tensors}
    metadata = {**(template.index.get("metadata") or {})}
    metadata["total_size"] = sum(tensor.byte_size for tensor, _ in tensors.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(prod(tensor.shape) for tensor, _ in tensors.values())
    weight_map = {name: tensors[name][1] for name in sorted(tensors)}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, ensure_ascii=False)
    (folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def _publish(partial: Path, out: Path) -> None:
    """One rename makes the output appear; everything in it is on disk by then."""
    for path in partial.rglob("*"):
        sync(path)
    for name in (_IDENTITY, _LOCK):
        (partial / name).unlink()
    sync(partial)
    os.rename(partial, out)
    sync(out.parent)


_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".zip",
)  # fmt: skip
_NOT_COPIED = {INDEX_NAME, "pytorch_model.bin.index.json", "trainer_state.json", "adapter_config.json", "README.md"}


def _copy_side_files(source: Path, target: Path) -> None:
    """Config, tokenizer, chat templates, custom code: all but weights, training state and hidden files."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        weights_or_state = path.suffix in _WEIGHT_SUFFIXES or relative.name in _NOT_COPIED
        foreign = len(relative.parts) > 1 and path.suffix not in (".py", ".jinja", ".json")
        if path.is_file() and not (hidden or weights_or_state or foreign or str(relative).startswith("checkpoint-")):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def _set_config_dtype(folder: Path, dtype: str | None) -> None:
    """Write the new dtype into config.json, if there is one."""
    path = folder / "config.json"
    name = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(dtype or "")
    if not path.is_file() or name is None:
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
