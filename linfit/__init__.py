"""What an estimator is: problems, spectral filters, exact risk, solvers, selection.

Names are imported on first use, so that the command line can ask for help without loading JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linfit import network as network
    from linfit import spectra as spectra
    from linfit.covariance import Dense as Dense
    from linfit.covariance import Diagonal as Diagonal
    from linfit.covariance import Empirical as Empirical
    from linfit.design import column_blocks as column_blocks
    from linfit.design import sample_design as sample_design
    from linfit.design import sample_designs as sample_designs
    from linfit.design import sample_task as sample_task
    from linfit.filters import Filter as Filter
    from linfit.filters import GradientDescent as GradientDescent
    from linfit.filters import GradientFlow as GradientFlow
    from linfit.filters import MinNorm as MinNorm
    from linfit.filters import Ridge as Ridge
    from linfit.problem import FixedShift as FixedShift
    from linfit.problem import Pair as Pair
    from linfit.problem import RandomShift as RandomShift
    from linfit.problem import TwoTaskProblem as TwoTaskProblem
    from linfit.problem import aligned_problem as aligned_problem
    from linfit.reduction import risk_forms as risk_forms
    from linfit.risk import Parabola as Parabola
    from linfit.risk import Risk as Risk
    from linfit.risk import RiskForm as RiskForm
    from linfit.risk import excess_risks as excess_risks
    from linfit.selection import Selection as Selection
    from linfit.selection import leave_one_out as leave_one_out
    from linfit.selection import select as select
    from linfit.solve import fine_tune as fine_tune
    from linfit.solve import gradient_descent as gradient_descent
    from linfit.solve import interpolate as interpolate
    from linfit.targets import Targets as Targets
    from linfit.targets import s3ft_targets as s3ft_targets
    from linfit.weighting import flow_weights as flow_weights

_PUBLIC = {
    "covariance": ("Dense", "Diagonal", "Empirical"),
    "design": ("column_blocks", "sample_design", "sample_designs", "sample_task"),
    "filters": ("Filter", "GradientDescent", "GradientFlow", "MinNorm", "Ridge"),
    "problem": ("FixedShift", "Pair", "RandomShift", "TwoTaskProblem", "aligned_problem"),
    "reduction": ("risk_forms",),
    "risk": ("Parabola", "Risk", "RiskForm", "excess_risks"),
    "selection": ("Selection", "leave_one_out", "select"),
    "solve": ("fine_tune", "gradient_descent", "interpolate"),
    "targets": ("Targets", "s3ft_targets"),
    "weighting": ("flow_weights",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

_MODULES = ("bridge", "network", "spectra", *_PUBLIC)

__all__ = [*sorted(_MODULE_OF), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"linfit.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(f"linfit.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'linfit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
