"""Many ways to fine-tune on one plane: tuned alike, measured on the same tasks, with their distance to the frontier.

- `methods`: the methods, and the grids their hyperparameters are chosen from;
- `ranking`: problems, tuning, risks with standard errors, distances to the Pareto frontier (docs, E2);
- `ensembles`: methods that end where an ensemble does, measured (docs, E1).
"""

from sims.compare.ensembles import ENSEMBLES, equivalent_coefficients, knob_at
from sims.compare.ensembles import population_paths as population_paths
from sims.compare.ensembles import spread_problem as spread_problem
from sims.compare.methods import METHODS
from sims.compare.ranking import Samples as Samples
from sims.compare.ranking import compare, compared_problem, frontier, measure, rank
from sims.compare.ranking import compared_problems as compared_problems

# what figures need besides stands above `as` itself
__all__ = [
    "ENSEMBLES", "METHODS", "compare", "compared_problem", "equivalent_coefficients", "frontier", "knob_at", "measure",
    "rank",
]  # fmt: skip
