"""The same estimators on real checkpoints: merging, inspecting, perturbing and weighting language models.

Safetensors folders in Hugging Face layout are read and written as streams; no framework is needed except for
`write_losses`, which runs a model (extra `llm`). Names are imported on first use.
"""

# isort: skip_file
from typing import TYPE_CHECKING

from linfit.internal.lazy import attach

if TYPE_CHECKING:  # for type checkers, and the table that `attach` reads
    from linfit.bridge.checkpoint import Checkpoint as Checkpoint, load as load
    from linfit.bridge.curve import Curve as Curve, fit_curve as fit_curve
    from linfit.bridge.delta import split_deltas as split_deltas
    from linfit.bridge.evaluations import read_evaluations as read_evaluations
    from linfit.bridge.inspection import Inspection as Inspection, inspect as inspect
    from linfit.bridge.inspection import delta_singular_values as delta_singular_values
    from linfit.bridge.language import write_losses as write_losses
    from linfit.bridge.merging import merge as merge, read_layer_taus as read_layer_taus
    from linfit.bridge.merging import read_weights as read_weights
    from linfit.bridge.mixture import WeightFit as WeightFit, fit_weights as fit_weights
    from linfit.bridge.perturbation import perturb as perturb
    from linfit.bridge.planning import Plan as Plan, plan as plan
    from linfit.bridge.prediction import LanguagePrediction as LanguagePrediction
    from linfit.bridge.prediction import finetune_language_model as finetune_language_model
    from linfit.bridge.prediction import predict_language_model as predict_language_model
    from linfit.bridge.records import choose_targets as choose_targets, judge_named as judge_named
    from linfit.bridge.records import read_records as read_records, weigh as weigh, write_records as write_records
    from linfit.bridge.tangent import predict_torch as predict_torch
    from linfit.bridge.training import TrainingPlan as TrainingPlan
    from linfit.bridge.signal import noise_level as noise_level, optimal_shrinkage as optimal_shrinkage

__getattr__, __dir__, __all__ = attach(__name__, __file__)
