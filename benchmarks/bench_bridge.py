"""Merging two 1.5 GB bfloat16 checkpoints on a RAM disk, against the same bytes copied by two workers.

    python benchmarks/bench_bridge.py [--bytes 1.5e9] [--folder /dev/shm] [--repeats 5]
    python benchmarks/bench_bridge.py --folder . --cold       # on a disk, the inputs dropped from the page cache first

The copy reads every byte that the merge reads and writes every byte that it writes (two inputs, one output), with
two threads and the same pread/pwrite, and computes nothing. Copies and merges alternate; ratios are of medians. The
last column is the processor time of the merge per byte, which another process on the machine disturbs least.
"""

import argparse
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from json import dumps
from pathlib import Path

import numpy as np

from linfit.bridge import merge

CHUNK = 1 << 20


def synthetic(folder: Path, size: float, shift: float, shards: int = 3) -> Path:
    """A checkpoint like that of a language model: matrices of 4096 columns, a few vectors, sharded."""
    folder.mkdir()
    rows = int(size / shards / 2 / 4096)
    block = np.random.default_rng(0).standard_normal((256, 4096), dtype=np.float32) * 0.02 + np.float32(shift)
    stored = (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    weight_map = {}
    for shard in range(shards):
        heights = [rows // 8] * 7 + [rows - 7 * (rows // 8)]
        entries, position = {}, 0
        for layer, height in enumerate(heights):
            name, length = f"layers.{8 * shard + layer}.weight", height * 4096 * 2
            entries[name] = {"dtype": "BF16", "shape": [height, 4096], "data_offsets": [position, position + length]}
            position += length
        text = dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(entries, file_name)
        with open(folder / file_name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, position, len(stored)):
                file.write(stored[: position - start])
    (folder / "model.safetensors.index.json").write_text(dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def copy(base: Path, tuned: Path, out: Path) -> None:
    """Read both inputs, write the second one."""
    out.mkdir()

    def half(job: tuple[int, int, int, int, int]) -> None:
        first, second, target, start, stop = job
        one, two = bytearray(CHUNK), bytearray(CHUNK)
        for position in range(start, stop, CHUNK):
            count = min(CHUNK, stop - position)
            os.preadv(first, [memoryview(one)[:count]], position)
            os.preadv(second, [memoryview(two)[:count]], position)
            os.pwrite(target, memoryview(two)[:count], position)

    with ThreadPoolExecutor(2) as pool:
        for path in sorted(base.glob("*.safetensors")):
            size = path.stat().st_size
            descriptors = [
                os.open(path, os.O_RDONLY),
                os.open(tuned / path.name, os.O_RDONLY),
                os.open(out / path.name, os.O_RDWR | os.O_CREAT),
            ]
            os.ftruncate(descriptors[2], size)
            middle = size // 2 // CHUNK * CHUNK
            list(pool.map(half, [(*descriptors, 0, middle), (*descriptors, middle, size)]))  # type: ignore[list-item]
            os.fsync(descriptors[2])
            for descriptor in descriptors:
                os.close(descriptor)


def forget(folders: tuple[Path, ...]) -> None:
    """Drop the files of these folders from the page cache, so that they are read from the disk."""
    for path in (path for folder in folders for path in folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # only clean pages can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(action: Callable[[], object], out: Path) -> tuple[float, float]:
    """(wall seconds, processor seconds); what it wrote is removed."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    action()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    shutil.rmtree(out)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


MEMORY = """
import re, sys
import linfit.bridge.merging
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
linfit.bridge.merge(sys.argv[1], sys.argv[2], sys.argv[3], tau=0.6)
print((peak() - before) * 1024 / 1e6)
"""


def main() -> None:
    """Print a table of medians, ratios to the copy, and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1.5e9)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each action")
    arguments = parser.parse_args()
    root = arguments.folder / f"linfit-bench-{os.getpid()}"
    root.mkdir()
    try:
        base, tuned = (synthetic(root / name, arguments.bytes, shift) for name, shift in (("a", 0.0), ("b", 0.01)))
        out = root / "out"
        actions: dict[str, Callable[[], object]] = {
            "copy, two workers": lambda: copy(base, tuned, out),
            "merge, one τ": lambda: merge(base, tuned, out, tau=0.6),
            "merge, three τ": lambda: merge(base, tuned, out, tau=[0.2, 0.6, 0.8]),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
        for _ in range(arguments.repeats + 1):  # the first round warms up
            for name, action in actions.items():
                if arguments.cold:
                    forget((base, tuned))
                times[name].append(timed(action, out))
        copied, work = (statistics.median(column) for column in zip(*times["copy, two workers"][1:]))
        print(f"{'':20} {'seconds':>8} {'÷ copy':>7} {'processor ÷ copy':>17}")
        for name, pairs in times.items():
            wall, used = (statistics.median(column) for column in zip(*pairs[1:]))
            print(f"{name:20} {wall:8.3f} {wall / copied:7.2f} {used / work:17.2f}")
        command = [sys.executable, "-c", MEMORY, str(base), str(tuned), str(out)]
        print(f"peak memory beyond the runtime: {float(subprocess.check_output(command)):.0f} MB")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
