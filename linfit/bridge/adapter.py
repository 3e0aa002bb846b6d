"""LoRA adapters (PEFT layout) as weight deltas, always by product: ΔW = scaling · B A, never A and B separately.

Averaging A's and B's of two adapters is not averaging their deltas: (A₁+A₂)(B₁+B₂)/4 ≠ (A₁B₁+A₂B₂)/2.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linfit.bridge.checkpoint import Checkpoint, Files, Tensor, some
from linfit.bridge.numbers import FLOATS

CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.[^.]+)*?(\.weight)?$")


class LowRank(NamedTuple):
    """ΔW = scaling · B A (m, n), or its transpose; the factors are read when they are needed."""

    a: Tensor  # (r, n)
    b: Tensor  # (m, r)
    scaling: float
    transposed: bool  # whether the base stores Wᵀ, as an embedding and GPT-2's Conv1D do

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW as the base stores it."""
        shape = self.b.shape[0], self.a.shape[1]
        return shape[::-1] if self.transposed else shape

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(left, right) in float32 with ΔW = left · right, the scaling in one of them."""
        with Files([self.a, self.b]) as files:
            a, b = (files.values(each).astype(np.float32, copy=False).reshape(each.shape) for each in (self.a, self.b))
        b = np.float32(self.scaling) * b
        return (a.T, b.T) if self.transposed else (b, a)


class Adapter:
    """A LoRA adapter folder; `changes` by the name of the base tensor: B A, or a whole tensor for modules saved whole.

    Raises ValueError for DoRA and other adapters whose delta is not B A, for unpaired factors, and for pickles.
    """

    def __init__(self, folder: str | Path, base: Checkpoint):
        self.folder = Path(folder)
        path = self.folder / CONFIG_NAME
        settings = json.loads(path.read_text(encoding="utf-8"))
        _require_lora(settings, path)
        if not (file := self.folder / "adapter_model.safetensors").is_file():
            raise ValueError(
                f"{self.folder}: no adapter_model.safetensors; a pickled adapter_model.bin is never opened here; save "
                "the adapter again with save_pretrained(…, safe_serialization=True)"
            )
        stored = Checkpoint(file)
        self.shards, self._base = stored.shards, base
        factors: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self.changes: dict[str, Tensor | LowRank] = {}
        for name, tensor in stored.tensors.items():
            if "lora_magnitude_vector" in name:
                raise ValueError(f"{path}: {_DORA}")
            if match := _FACTOR.match(name):
                key = (match["module"].removeprefix(_PREFIX), bool(match["embedding"]))
                factors.setdefault(key, {})[match["side"]] = tensor
            else:
                self.changes[_replaced_name(name, settings)] = tensor
        for (module, embedding), pair in factors.items():
            self.changes[f"{module}.weight"] = _low_rank(module, pair, embedding, settings)
        if unknown := sorted(self.changes.keys() - base.tensors.keys()):
            raise ValueError(f"{self.folder}: the base {base.folder} lacks {some(unknown, 'adapted tensor')}")
        for name, change in self.changes.items():
            if change.shape != (shape := base.tensors[name].shape):
                raise ValueError(f"{self.folder}: {name} is {list(change.shape)}, in the base {list(shape)}")

    def version(self, name: str) -> Tensor | LowRank | None:
        """What the adapted model has of a tensor: a delta, a tensor of its own, or else the base's."""
        return self.changes.get(name) or self._base.tensors.get(name)


_DORA = (
    "DoRA rescales each column of the adapted weight, so its update is not a delta B·A that can be scaled by τ; merge "
    "it into the base with PEFT's merge_and_unload() and use the resulting folder"
)


def _require_lora(settings: dict[str, Any], path: Path) -> None:
    if str(settings.get("peft_type", "")).upper() != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {settings.get('peft_type')!r}")
    if settings.get("use_dora"):
        raise ValueError(f"{path}: {_DORA}")
    for key, reason in {
        "use_qalora": "a quantisation-aware adapter acts on pooled inputs",
        "alora_invocation_tokens": "an activated adapter applies to some tokens only",
        "use_bdlora": "block-diagonal factors are stored packed",
        "arrow_config": "a routed adapter depends on the input",
        "target_parameters": "adapted parameters (rather than modules) use another layout",
        "trainable_token_indices": "single token rows are stored in another layout",
        "layer_replication": "the adapted model has more layers than the base",
    }.items():
        if settings.get(key):
            raise ValueError(f"{path}: {key} is not supported: {reason}; merge with PEFT's merge_and_unload() first")


def _replaced_name(name: str, settings: dict[str, Any]) -> str:
    name = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    for module in settings.get("modules_to_save") or ():
        name = re.sub(rf"({re.escape(module)}\.)modules_to_save\.(default\.)?", r"\1", name)
    if ".lora_" in name:
        raise ValueError(f"adapter tensor {name!r} is no LoRA factor known here; merge with PEFT's merge_and_unload()")
    return name


def _pattern_value(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: regular expressions for the end of a module name."""
    fitting = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(fitting, default)


def _low_rank(module: str, pair: dict[str, Tensor], embedding: bool, settings: dict[str, Any]) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise ValueError(f"adapter of {module} has only factor {next(iter(pair))}")
    a, b = pair["A"], pair["B"]
    for tensor in (a, b):
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            raise ValueError(f"{tensor.path}: factor {tensor.name} must be a floating matrix, got {tensor.describe()}")
    rank = a.shape[0]
    if rank != b.shape[1]:
        raise ValueError(f"adapter of {module}: factors {list(b.shape)} and {list(a.shape)} do not multiply")
    declared = _pattern_value(settings.get("rank_pattern"), module, settings.get("r", rank))
    if declared != rank:
        raise ValueError(f"adapter of {module}: factors have rank {rank}, the configuration says {declared}")
    alpha = _pattern_value(settings.get("alpha_pattern"), module, float(settings.get("lora_alpha", rank)))
    scaling = alpha / (rank**0.5 if settings.get("use_rslora") else rank)  # the former if rank-stabilised
    return LowRank(a, b, scaling, embedding or bool(settings.get("fan_in_fan_out")))
