"""The same estimators on real checkpoints: merging, inspecting, perturbing and weighting language models.

Safetensors folders in Hugging Face layout are read and written as streams; no framework is needed except for
`losses`, which runs a model (extra `llm`). Names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linfit.bridge.adapter import Adapter as Adapter
    from linfit.bridge.checkpoint import Checkpoint as Checkpoint
    from linfit.bridge.curve import Curve as Curve
    from linfit.bridge.curve import fit_curve as fit_curve
    from linfit.bridge.deltas import Noise as Noise
    from linfit.bridge.deltas import Split as Split
    from linfit.bridge.deltas import noise_level as noise_level
    from linfit.bridge.deltas import optimal_shrinkage as optimal_shrinkage
    from linfit.bridge.deltas import split_deltas as split_deltas
    from linfit.bridge.inspection import inspect as inspect
    from linfit.bridge.merging import load as load
    from linfit.bridge.merging import merge as merge
    from linfit.bridge.output import Outcome as Outcome
    from linfit.bridge.perturbation import perturb as perturb

_PUBLIC = {
    "adapter": ("Adapter",),
    "checkpoint": ("Checkpoint",),
    "curve": ("Curve", "fit_curve"),
    "deltas": ("Noise", "Split", "noise_level", "optimal_shrinkage", "split_deltas"),
    "inspection": ("inspect",),
    "merging": ("load", "merge"),
    "output": ("Outcome",),
    "perturbation": ("perturb",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"linfit.bridge.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # also where a module of the same name would shadow it
        return value
    raise AttributeError(f"module 'linfit.bridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
