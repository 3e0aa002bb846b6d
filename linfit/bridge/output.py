"""Writing checkpoints: a folder that appears whole or not at all, resumes after an interruption, and is checked first.

Everything goes to a hidden folder beside the target, with a journal of finished shards; the last act is to rename it.
A second run of the same plan on unchanged inputs goes on after the last finished shard, any other starts clean.
"""

import fcntl
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linfit.bridge.checkpoint import INDEX_NAME, Checkpoint, Files, Shard, Tensor, open_files
from linfit.bridge.numbers import ITEM_SIZE
from linfit.internal.files import sync

Write = Callable[[int, int, np.ndarray], None]
"""write(output, position, bytes): `position` counts from the start of the tensor."""
Piece = Callable[[Files, Write], int]
"""One unit of work for one worker; returns the number of bytes it has read."""


class Planned(NamedTuple):
    """One tensor to be written to every output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]
    """What its pieces read."""
    pieces: Callable[[], Iterator[Piece]]

    @property
    def byte_size(self) -> int:
        """Bytes as stored."""
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_SIZE[self.dtype]


class PlannedShard(NamedTuple):
    """One file to be written to every output."""

    file_name: str
    header: bytes
    starts: dict[str, int]
    """Where each tensor's bytes begin in the file."""
    tensors: tuple[Planned, ...]
    file_size: int


class Outcome(NamedTuple):
    """What a merge or perturbation has written."""

    folders: list[Path]
    notes: list[str]
    """What deserves attention: choices made, tensors that could not be averaged."""
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed_shards: int
    """Shards found finished from an interrupted run."""


def plan_shard(template: Shard, tensors: Sequence[Planned]) -> PlannedShard:
    """The layout of one output file; the template's own header where nothing but values changes."""
    described = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    if described == {tensor.name: (tensor.dtype, tensor.shape) for tensor in template.tensors}:
        starts = {tensor.name: tensor.start for tensor in template.tensors}
        size = max((tensor.stop for tensor in template.tensors), default=len(template.header))
        return PlannedShard(template.path.name, template.header, starts, tuple(tensors), size)
    ordered = sorted(tensors, key=lambda tensor: -ITEM_SIZE[tensor.dtype])  # keeps every tensor aligned
    entries: dict[str, Any] = {"__metadata__": template.metadata} if template.metadata else {}
    offsets, position = {}, 0
    for tensor in ordered:
        offsets[tensor.name] = position
        end = position + tensor.byte_size
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    starts = {name: len(header) + offset for name, offset in offsets.items()}
    return PlannedShard(template.path.name, header, starts, tuple(ordered), len(header) + position)


def fingerprint(arguments: dict[str, Any], checkpoints: Sequence[Checkpoint]) -> str:
    """A hash of what is asked and of the state of the input files: a resumed run must find both unchanged."""
    files = [
        (str(shard.path.resolve()), shard.path.stat().st_size, shard.path.stat().st_mtime_ns)
        for checkpoint in checkpoints
        for shard in checkpoint.shards
    ]
    return hashlib.sha256(json.dumps([arguments, files], sort_keys=True, default=str).encode()).hexdigest()


def write_checkpoints(
    out: Path,
    names: Sequence[str],
    shards: Sequence[PlannedShard],
    *,
    identity: str,
    side_files: Callable[[Path, str], None],
    index_metadata: dict[str, Any] | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    notes: Sequence[str] = (),
) -> Outcome:
    """Write the planned shards to `out` (or to `out/name` for several `names`), then rename it into place.

    `side_files(folder, name)` adds what is not weights; `progress(done, total)` counts bytes written. Raises
    ValueError if `out` exists, another run is writing it, or the disk has too little room; nothing appears at `out`
    unless everything succeeded.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already; choose another output folder, or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing {out}") from None
        if not partial.exists():
            raise ValueError(f"another run has just finished {out}")
        journal = _Journal(partial, identity)
        folders = {name: partial / name if len(names) > 1 else partial for name in names}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        started = time.perf_counter()
        todo = [shard for shard in shards if not journal.has(shard, folders.values())]
        total = sum(shard.file_size for shard in todo) * len(names)
        payload = sum(tensor.byte_size for shard in todo for tensor in shard.tensors) * len(names)
        counter = _Counter(payload, progress)
        bytes_read = 0
        try:
            _require_space(partial, out, total)
            with ThreadPoolExecutor(max(1, workers)) as pool:
                for shard in todo:
                    bytes_read += _write_shard(shard, list(folders.values()), pool, max(1, workers), counter)
                    journal.add(shard)
        except ValueError:  # will not go away by running again: leave nothing behind
            shutil.rmtree(partial)
            raise
        for name, folder in folders.items():
            _write_index(folder, shards, index_metadata)
            side_files(folder, name)
        _publish(partial, out)
    seconds = time.perf_counter() - started
    final = [out / name for name in names] if len(names) > 1 else [out]
    resumed = len(shards) - len(todo)
    return Outcome(final, list(notes), bytes_read, total, seconds, resumed)


LOCK, JOURNAL = ".lock", ".journal.json"
"""In the hidden folder until it is renamed; no file copied from an input has a name that starts with a dot."""


class _Journal:
    """Which shards are finished; whatever an earlier run with another identity left is removed."""

    def __init__(self, partial: Path, identity: str):
        self.path = partial / JOURNAL
        try:
            state = json.loads(self.path.read_text())
        except (OSError, ValueError):
            state = {}
        if state.get("identity") != identity:
            for entry in partial.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            state = {"identity": identity, "finished": []}
        self.state = state
        self._save()

    def has(self, shard: PlannedShard, folders: Iterable[Path]) -> bool:
        """Finished, and its files are there: a power cut may keep the journal and lose the rename of a file."""
        paths = [folder / shard.file_name for folder in folders]
        return shard.file_name in self.state["finished"] and all(
            path.is_file() and path.stat().st_size == shard.file_size for path in paths
        )

    def add(self, shard: PlannedShard) -> None:
        self.state["finished"].append(shard.file_name)
        self._save()

    def _save(self) -> None:
        temporary = self.path.with_suffix(".new")
        with open(temporary, "w") as file:
            json.dump(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


class _Counter:
    def __init__(self, total: int, progress: Callable[[int, int], None] | None):
        self.done, self.total, self.progress = 0, total, progress

    def add(self, amount: int) -> None:
        self.done += amount
        if self.progress is not None:
            self.progress(self.done, self.total)


def _require_space(partial: Path, out: Path, needed: int) -> None:
    occupied = sum(path.stat().st_size for path in partial.rglob("*.writing") if path.is_file())
    free = shutil.disk_usage(partial).free + occupied
    if needed > free:
        raise ValueError(f"{out} needs {needed / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB free")


def _write_shard(
    shard: PlannedShard, folders: Sequence[Path], pool: ThreadPoolExecutor, workers: int, counter: _Counter
) -> int:
    paths = [folder / f"{shard.file_name}.writing" for folder in folders]
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644) for path in paths]
    try:
        with open_files(source for tensor in shard.tensors for source in tensor.sources) as files:
            for descriptor in descriptors:
                _write_all(descriptor, shard.header, 0)
                os.ftruncate(descriptor, shard.file_size)
            bytes_read = _run_pieces(shard, descriptors, files, pool, workers, counter)
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    for path in paths:
        path.replace(path.with_suffix(""))
    return bytes_read


def _run_pieces(
    shard: PlannedShard,
    descriptors: Sequence[int],
    files: Files,
    pool: ThreadPoolExecutor,
    workers: int,
    counter: _Counter,
) -> int:
    def pieces() -> Iterator[tuple[Piece, Write]]:
        for tensor in shard.tensors:
            start = shard.starts[tensor.name]

            def write(output: int, position: int, data: np.ndarray, start: int = start) -> None:
                _write_all(descriptors[output], data.data, start + position)
                counter.add(data.nbytes)

            for piece in tensor.pieces():
                yield piece, write

    bytes_read, waiting = 0, pieces()
    running: set[Future[int]] = set()
    while True:
        running |= {pool.submit(piece, files, write) for piece, write in islice(waiting, 2 * workers - len(running))}
        if not running:
            return bytes_read
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        try:
            bytes_read += sum(future.result() for future in finished)
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


def _write_index(folder: Path, shards: Sequence[PlannedShard], metadata: dict[str, Any] | None) -> None:
    if metadata is None:
        return
    tensors = [(tensor, shard.file_name) for shard in shards for tensor in shard.tensors]
    metadata = {**metadata, "total_size": sum(tensor.byte_size for tensor, _ in tensors)}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor, _ in tensors)
    weight_map = {tensor.name: file_name for tensor, file_name in sorted(tensors, key=lambda pair: pair[0].name)}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, ensure_ascii=False)
    (folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def _publish(partial: Path, out: Path) -> None:
    """One rename makes the output appear; everything in it is on disk by then."""
    for path in partial.rglob("*"):
        sync(path)
    (partial / JOURNAL).unlink()
    (partial / LOCK).unlink()
    sync(partial)
    os.rename(partial, out)
    sync(out.parent)


# What surrounds the weights -----------------------------------------------------------------------------------------

_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".zip",
}  # fmt: skip
_NOT_COPIED = {INDEX_NAME, "pytorch_model.bin.index.json", "trainer_state.json", "adapter_config.json", "README.md"}


def copy_side_files(source: Path, target: Path) -> None:
    """Config, tokenizer, chat templates, custom code: all but weights, training state and hidden files."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if path.suffix in _WEIGHT_SUFFIXES or relative.name in _NOT_COPIED:
            continue
        if len(relative.parts) > 1 and path.suffix not in (".py", ".jinja", ".json"):
            continue
        if relative.parts[0].startswith("checkpoint-"):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)


def set_config_dtype(folder: Path, dtype: str) -> None:
    """Write the new dtype into config.json, if there is one."""
    path = folder / "config.json"
    name = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(dtype)
    if not path.is_file() or name is None:
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(source: Path, target: Path, title: str, facts: dict[str, str]) -> None:
    """The model card with a provenance note at its end; a card of its own if the source has none."""
    card = source / "README.md"
    text = card.read_text(encoding="utf-8").rstrip() + "\n\n" if card.is_file() else ""
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    (target / "README.md").write_text(f"{text}## {title}\n\n{lines}\n", encoding="utf-8")
