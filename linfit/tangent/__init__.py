"""Tangent features of real networks: what linear theory predicts about a fine-tuning before it is run (docs, §12)."""

from linfit.tangent.build import from_kernels, predict
from linfit.tangent.jacobian import features, kernel, kernel_product
from linfit.tangent.krylov import Krylov, krylov
from linfit.tangent.prediction import Domain, Prediction
from linfit.tangent.selection import leave_one_out, select
from linfit.tangent.summary import Estimate, summary

__all__ = [
    "Domain",
    "Estimate",
    "Krylov",
    "Prediction",
    "features",
    "from_kernels",
    "kernel",
    "kernel_product",
    "krylov",
    "leave_one_out",
    "predict",
    "select",
    "summary",
]
