"""Models of the Hugging Face Hub: names, and folders in the layout of its cache."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from linfit.bridge import Checkpoint, load, merge
from tests.bridge_checkpoints import write_sharded, write_single


def cached(cache: Path, name: str, value: float) -> Path:
    """The snapshot of a model in a Hub cache: links into a folder of blobs, named by their hashes."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shards = [{"a": np.full((3, 2), value, np.float32)}, {"b": np.full(4, value, np.float32)}]
    written = write_sharded(cache / "written", shards)
    (written / "tokenizer.json").write_text("{}")
    (snapshot := repository / "snapshots" / "0123abcd").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    for number, path in enumerate(sorted(written.iterdir())):
        path.rename(repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    written.rmdir()
    return snapshot


def test_snapshots_of_the_cache_are_folders_like_any_other(tmp_path):
    base, tuned = cached(tmp_path / "hub", "owner/base", 1.0), cached(tmp_path / "hub", "owner/some-tuned.v2", 2.0)
    out = merge(base, tuned, tmp_path / "out", tau=0.25).folders[0]
    assert {name: float(value.max()) for name, value in load(out).items()} == {"a": 1.25, "b": 1.25}
    assert {path.name for path in out.iterdir()} == {path.name for path in tuned.iterdir()} | {"README.md"}
    assert not any(path.is_symlink() for path in out.iterdir())
    card = (out / "README.md").read_text()
    assert "`owner/base@0123abcd`" in card
    assert "`owner/some-tuned.v2@0123abcd`" in card
    with pytest.raises(ValueError, match=r"repository of the Hub cache; give one of its 1 snapshot: 0123abcd"):
        Checkpoint(base.parents[1])


def test_a_dangling_link_is_a_missing_shard(tmp_path):
    base = cached(tmp_path / "hub", "owner/base", 1.0)
    next(path for path in base.iterdir() if path.suffix == ".safetensors").resolve().unlink()
    with pytest.raises(ValueError, match="missing 1 shard"):
        Checkpoint(base)


OFFLINE = """
from figures.commands.language import local_folder
print(local_folder("owner/base"))
try:
    local_folder("owner/absent")
except ValueError as error:
    print(error)
"""


def test_names_are_found_in_the_cache_or_the_error_says_what_to_do(tmp_path):
    pytest.importorskip("huggingface_hub")
    base = cached(tmp_path / "hub", "owner/base", 1.0)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, check=True, env=environment)
    found, error = done.stdout.splitlines()
    assert Path(found) == base
    assert error.startswith("owner/absent is no folder here and could not be fetched from the Hub (")
    assert "`hf download owner/absent --local-dir FOLDER`, and give that folder" in error


def test_hub_names_are_fetched_and_folders_are_not(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from figures.commands.language import local_folder

    folder = write_single(tmp_path / "owner" / "name", {"w": np.ones((2, 2), np.float32)})
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert local_folder("owner/name") == Path("owner/name")  # a folder here
    assert asked == []
    assert local_folder("owner/other") == folder
    assert asked[0][0] == "owner/other"
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked[0][1])
    assert local_folder("./owner/other") == Path("./owner/other")  # meant as a path
