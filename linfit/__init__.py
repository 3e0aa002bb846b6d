"""What an estimator is: problems, spectral filters, exact risk, solvers, selection.

Names are imported on first use, so that the command line can ask for help without loading JAX.
"""

# isort: skip_file
from typing import TYPE_CHECKING

from linfit.internal.lazy import attach

if TYPE_CHECKING:  # for type checkers, and the table that `attach` reads: a public name stands here and nowhere else
    from linfit import bridge as bridge, covariance as covariance, design as design, filters as filters
    from linfit import merges as merges
    from linfit import network as network, problem as problem, reduction as reduction, risk as risk
    from linfit import robust as robust, selection as selection, solve as solve, spectra as spectra
    from linfit import tangent as tangent, targets as targets
    from linfit import weighting as weighting
    from linfit.covariance import Dense as Dense, Diagonal as Diagonal, Empirical as Empirical
    from linfit.design import column_blocks as column_blocks, sample_design as sample_design
    from linfit.design import sample_designs as sample_designs, sample_task as sample_task
    from linfit.filters import Combination as Combination, Filter as Filter, GradientDescent as GradientDescent
    from linfit.filters import GradientFlow as GradientFlow, MinNorm as MinNorm, Ridge as Ridge
    from linfit.filters import SelfDistillation as SelfDistillation, SharpnessAware as SharpnessAware
    from linfit.merges import Fit as Fit, MergeForm as MergeForm, exact_form as exact_form
    from linfit.problem import FixedShift as FixedShift, Pair as Pair, RandomShift as RandomShift
    from linfit.problem import TwoTaskProblem as TwoTaskProblem, aligned_problem as aligned_problem
    from linfit.reduction import risk_forms as risk_forms
    from linfit.risk import Parabola as Parabola, Risk as Risk, RiskForm as RiskForm, excess_risks as excess_risks
    from linfit.selection import Selection as Selection, leave_one_out as leave_one_out, select as select
    from linfit.solve import fine_tune as fine_tune, gradient_descent as gradient_descent, interpolate as interpolate
    from linfit.tangent import Prediction as Prediction, predict as predict
    from linfit.targets import Targets as Targets, s3ft_targets as s3ft_targets
    from linfit.weighting import flow_weights as flow_weights

__getattr__, __dir__, __all__ = attach(__name__, __file__)
