"""Checkpoints for the tests of `linfit.bridge`: synthetic by the safetensors library, real by transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy


def write_single(folder: Path, tensors: dict, config: dict | None = None, metadata: dict | None = None) -> Path:
    """One model.safetensors written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt", **(metadata or {})})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **(config or {})}))
    return folder


def write_sharded(folder: Path, shards: list[dict], config: dict | None = None) -> Path:
    """Several shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(value.nbytes for tensors in shards for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **(config or {})}))
    return folder


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, by the safetensors library, as it is stored."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        result |= safetensors.numpy.load_file(path)
    return result


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Bases and fine-tuned runs (three of llama), really trained, in bfloat16 (GPT-2 in float32)."""
    pytest.importorskip("transformers")
    from sims.laboratory.toy_language import make_family

    root = tmp_path_factory.mktemp("families")
    sizes = {"pretrain_steps": 6, "finetune_steps": 8, "hidden": 32, "shard_size": "12KB"}
    return {
        "llama": make_family(root / "llama", architecture="llama", dtype="bfloat16", runs=3, **sizes),
        "qwen2": make_family(root / "qwen2", architecture="qwen2", dtype="bfloat16", runs=1, tied=True, **sizes),
        "gpt2": make_family(root / "gpt2", architecture="gpt2", dtype="float32", runs=1, tied=True, **sizes),
    }
