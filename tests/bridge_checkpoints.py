"""Checkpoints for the tests of `linfit.bridge`: synthetic by the safetensors library, real by transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from sims.laboratory.toy_language import make_family


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
    size = {"total_size": sum(value.nbytes for tensors in shards for value in tensors.values())}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": size, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **(config or {})}))
    return folder


def model_of(folder: Path, **options):
    """The model of a folder, by transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


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
    root = tmp_path_factory.mktemp("families")
    sizes = {"pretrain_steps": 6, "finetune_steps": 8, "hidden": 32, "shard_size": "12KB"}
    families = {}
    for name, dtype, runs in (("llama", "bfloat16", 3), ("qwen2", "bfloat16", 1), ("gpt2", "float32", 1)):
        options = {"architecture": name, "dtype": dtype, "runs": runs, "tied": name != "llama"}
        families[name] = make_family(root / name, **options, **sizes)
    return families
