"""Why a longer pretrained network is easier to break: two-layer linear networks (docs, §7, N1–N5).

W = W₁W₂ learns A = U diag(a) Vᵀ by gradient flow of ½‖W − A‖²_F from small weights aligned with A. Its singular values
grow one after another (N1); the damage a Gaussian perturbation does grows with them (N2); so the perturbed loss
falls while there is something to learn and rises afterwards (N3); fine-tuning to another task can do the same, with the
same singular vectors (N4, `features`) or with others (N5, `misaligned`).

The setting is that of paper 2503.19206; of the formulas, what is marked "ours" was derived for this project. Modes are
the last axis, (…, r); `shape` is (m, h, k); a start is given by singular values s₀ and the imbalance c = w₁² − w₂²,
0 for a balanced one. Times are step size × steps, losses are ½‖·‖²_F. ValueError for NaN or Inf, negative times, γ or
penalties, and a start that is not between 0 and the target.

>>> from theory import overtraining
>>> time = overtraining.inflection_time(0.01, [2.0, 1.0], gamma=0.1, shape=(10, 10, 10))
>>> round(float(time), 3)
3.39
"""

from theory.overtraining.features import (
    fine_tuned_singular_values,
    fine_tuning,
    fine_tuning_inflection_times,
    gaussian_sensitivity,
    inflection_time,
    learning_time,
    mode_inflection_times,
    perturbed_loss,
    singular_values,
)
from theory.overtraining.misaligned import (
    critical_time,
    fine_tuned_product,
    late_slope,
    learning_jumps,
    second_order_slope,
)

__all__ = [
    "critical_time", "fine_tuned_product", "fine_tuned_singular_values", "fine_tuning", "fine_tuning_inflection_times",
    "gaussian_sensitivity", "inflection_time", "late_slope", "learning_jumps", "learning_time",
    "mode_inflection_times", "perturbed_loss", "second_order_slope", "singular_values",
]  # fmt: skip
