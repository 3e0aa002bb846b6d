"""The same estimators on real checkpoints: merging, inspecting, perturbing and weighting language models.

Safetensors folders in Hugging Face layout are read and written as streams; no framework is needed except for
`write_losses`, which runs a model (extra `llm`). Names are imported on first use.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linfit.bridge.checkpoint import Checkpoint, load
    from linfit.bridge.curve import Curve, fit_curve
    from linfit.bridge.delta import split_deltas
    from linfit.bridge.evaluations import read_evaluations
    from linfit.bridge.inspection import Inspection, delta_singular_values, inspect
    from linfit.bridge.language import write_losses
    from linfit.bridge.merging import merge, read_layer_taus
    from linfit.bridge.perturbation import perturb
    from linfit.bridge.records import choose_targets, judge_named, read_records, weigh, write_records
    from linfit.bridge.signal import noise_level, optimal_shrinkage

_PUBLIC = {
    "checkpoint": ("Checkpoint", "load"),
    "curve": ("Curve", "fit_curve"),
    "delta": ("split_deltas",),
    "evaluations": ("read_evaluations",),
    "inspection": ("Inspection", "delta_singular_values", "inspect"),
    "language": ("write_losses",),
    "merging": ("merge", "read_layer_taus"),
    "perturbation": ("perturb",),
    "records": ("choose_targets", "judge_named", "read_records", "weigh", "write_records"),
    "signal": ("noise_level", "optimal_shrinkage"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = globals()[name] = getattr(import_module(f"linfit.bridge.{_MODULE_OF[name]}"), name)
        return value
    raise AttributeError(f"module 'linfit.bridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
