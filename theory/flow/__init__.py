"""FLOW in the population: what weighting samples by the pretrained losses does to gradient descent (docs, F1–F6).

Weights w = e^{−r²/T}, r = y − xᵀθ₁ = xᵀΔ + ε the residual of the pretrained weights, change the moments that
fine-tuning sees. For Gaussian data everything follows from one number, the damping of a variance,

    d(v) = 1/(1 + 2v/T):    E w = √d(v) = Z,    Σ_w = E w xxᵀ = Z(Σ − k ΣΔΔᵀΣ),    E w x r = Z d(v) ΣΔ,

with v = ΔᵀΣΔ + σ² the variance of r and k = (1 − d(v))/v. Weighting deflates one direction, Δ: there learning stalls.

The setting, and Theorem 7.2, are those of paper 2502.02797; what is marked "ours" was derived for this project. The
temperature T is in units of y², ∞ for no weighting; by default it is the median of the losses r². Weights enter as
they are, as in the authors' code: they also shrink the step by their mean Z.

`moments` has Σ_w and where learning stalls, `training` any fine-tuner and every method at its best, `theorem` §7 of
the paper.

>>> from theory import flow
>>> weighted = flow.weighted_covariance([1.0, 1.0], shift=[1.0, 0.0], noise_std=0.0)     # T = median r²
>>> (weighted.matrix / weighted.scale).round(4)                                         # learning along Δ: 5.4 × slower
Array([[0.1853, 0.    ],
       [0.    , 1.    ]], dtype=float64)
"""

from theory.flow.moments import MEDIAN as MEDIAN
from theory.flow.moments import (
    damping,
    fixed_point_coefficient,
    heavy_tailed_stall,
    lognormal_sizes,
    mean_weight,
    median_temperature,
    stall,
    weighted_covariance,
)
from theory.flow.moments import residual_variance as residual_variance
from theory.flow.theorem import (
    best_averaging,
    best_flow,
    beta_from_temperature,
    errors,
    flow_iterates,
    stalled_direction,
    temperature_from_beta,
    two_task_problem,
    unweighted_iterates,
)
from theory.flow.training import population_optima, trajectory

__all__ = [
    "best_averaging", "best_flow", "beta_from_temperature", "damping", "errors", "fixed_point_coefficient",
    "flow_iterates", "heavy_tailed_stall", "lognormal_sizes", "mean_weight", "median_temperature", "population_optima",
    "stall", "stalled_direction", "temperature_from_beta", "trajectory", "two_task_problem", "unweighted_iterates",
    "weighted_covariance",
]  # fmt: skip
