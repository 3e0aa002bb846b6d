"""Exact risk against brute-force p×p algebra, and against Monte Carlo from raw data."""

import jax
import numpy as np
import pytest

from linfit import (
    GradientDescent,
    GradientFlow,
    MinNorm,
    Ridge,
    risk_forms,
    sample_design,
)
from tests.oracles import brute_force_risk, fitted_operator, problems

N = 11
PROBLEMS = problems(seed=1)
FILTERS = {
    "min-norm": (MinNorm(), lambda s: 1 / s),
    "ridge": (Ridge(0.3), lambda s: 1 / (s + 0.3)),
    "flow": (GradientFlow(4.0), lambda s: (1 - np.exp(-4 * s)) / s),
    "descent": (GradientDescent(0.3, 7), lambda s: (1 - (1 - 0.3 * s) ** 7) / s),
}


def design(name: str, seed: int = 0):
    return sample_design(jax.random.key(seed), PROBLEMS[name].finetune_covariance, N) * 0.7


@pytest.mark.numerical
@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_risk_equals_brute_force(name, filter_name, rtol):
    problem, (filter, formula) = PROBLEMS[name], FILTERS[filter_name]
    X = design(name)
    forms = risk_forms(X, problem)
    host = np.asarray(X, np.float64)
    R = fitted_operator(host, formula)
    for tau in (1.0, 0.4, -0.2, 1.3):
        for form, (bias, variance) in zip(forms, brute_force_risk(host, R, problem, tau)):
            scale = bias + variance
            np.testing.assert_allclose(form(filter, tau).bias, bias, rtol=rtol, atol=rtol * scale)
            np.testing.assert_allclose(form(filter, tau).variance, variance, rtol=rtol, atol=rtol * scale)
