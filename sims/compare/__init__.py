"""Sixteen ways to fine-tune on one plane: tuned alike, measured on the same tasks, with their distance to the frontier.

- `methods`: the methods, and the grids their hyperparameters are chosen from;
- `ranking`: tuning, risks with standard errors, distances to the Pareto frontier (docs, E2);
- `problems`: the six problems they are compared on;
- `ensembles`: methods that end where an ensemble does, measured (docs, E1).
"""

from sims.compare.ensembles import ENSEMBLES, equivalent_coefficients, knob_at, population_paths, spread_problem
from sims.compare.methods import METHODS, Method
from sims.compare.problems import compared_problem, compared_problems
from sims.compare.ranking import Samples, compare, frontier, measure, rank

__all__ = [
    "ENSEMBLES",
    "METHODS",
    "Method",
    "Samples",
    "compare",
    "compared_problem",
    "compared_problems",
    "equivalent_coefficients",
    "frontier",
    "knob_at",
    "measure",
    "population_paths",
    "rank",
    "spread_problem",
]
