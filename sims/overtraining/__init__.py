"""Overtraining measured: pretrain a two-layer linear network, keep checkpoints, perturb or fine-tune each one.

`training` has what is measured on one network and its checkpoints, `tasks` which kinds of fine-tuning task overtrain.
Weights are trained as full matrices by gradient descent, on the target itself or on tokens that stream by once;
closed forms (docs, N1–N5) are only put beside what was measured. Losses are ½‖W − A‖²_F, times are step size × steps.
"""

from sims.overtraining.tasks import late_rises, optimal_rates, sample_kinds
from sims.overtraining.training import (
    SCHEDULES,
    fine_tuned_losses,
    inflection,
    matched_forgetting,
    perturbed_losses,
    pretrain,
    pretrain_on_tokens,
    sample_rotated_task,
    sample_target,
    sample_unrelated_task,
    sharpness,
)
from sims.overtraining.training import inflection_times as inflection_times
from sims.overtraining.training import key_from as key_from
from sims.overtraining.training import learning_curves as learning_curves
from sims.overtraining.training import losses_under_noise as losses_under_noise
from sims.overtraining.training import sample_tasks as sample_tasks
from sims.overtraining.training import sharpness_and_forgetting as sharpness_and_forgetting
from sims.overtraining.training import token_budgets as token_budgets
from sims.overtraining.training import tuned as tuned

__all__ = [
    "SCHEDULES", "fine_tuned_losses", "inflection", "late_rises", "matched_forgetting", "optimal_rates",
    "perturbed_losses", "pretrain", "pretrain_on_tokens", "sample_kinds", "sample_rotated_task", "sample_target",
    "sample_unrelated_task", "sharpness",
]  # fmt: skip
