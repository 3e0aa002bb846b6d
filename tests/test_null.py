"""Deliberately wrong implementations: the comparisons of the real tests must catch every one of them."""

import dataclasses

import jax
import numpy as np
import pytest

from linfit.design import sample_design
from linfit.filters import Filter, GradientDescent, MinNorm, Ridge
from linfit.problem import Pair
from linfit.reduction import risk_forms
from linfit.selection import leave_one_out
from linfit.solve import fine_tune, gradient_descent
from tests import test_risk, test_selection, test_solve
from tests.oracles import problems


def altered_call(change):
    """Forms that alter filter and τ on the way in."""
    return lambda forms: forms.map(lambda form: lambda filter, tau=1.0: form(*change(form, filter, tau)))


class Unscaled(Filter):
    """Ridge that forgets the n of its loss: λ/n in place of λ."""

    penalty: float

    def __call__(self, eigenvalues):
        return 1 / (eigenvalues + self.penalty / len(eigenvalues))


STUBS = {
    "dropped noise": lambda forms: forms.map(lambda form: form.with_noise_std(0.0)),
    "noise not squared": lambda forms: forms.map(lambda form: form.with_noise_std(form.noise_std**0.5)),
    "factor 2 in b": lambda forms: forms.map(lambda form: dataclasses.replace(form, linear=2 * form.linear)),
    "swapped domains": lambda forms: Pair(forms.pretrain, forms.finetune),
    "one domain twice": lambda forms: Pair(forms.finetune, forms.finetune),
    "tau ignored": altered_call(lambda form, filter, tau: (filter, 0 * tau + 1)),
    "tau squared": altered_call(lambda form, filter, tau: (filter, tau**2)),
    "ridge without its n": altered_call(
        lambda form, filter, tau: (Unscaled(filter.penalty) if isinstance(filter, Ridge) else filter, tau)
    ),
    "filter ignored": altered_call(lambda form, filter, tau: (MinNorm(), tau)),
}


@pytest.mark.numerical
@pytest.mark.parametrize("name", ["diagonal-fixed-u", "dense-random-u"])
@pytest.mark.parametrize("stub", STUBS)
def test_the_exact_comparison_catches(stub, name, seed, rtol):
    problem = problems(seed)[name]
    X = test_risk.design(problem, seed)
    filter, formula = test_risk.FILTERS["ridge"]
    forms = risk_forms(X, problem)
    test_risk.assert_matches_brute_force(forms, X, problem, filter, formula, rtol)
    with pytest.raises(AssertionError):
        test_risk.assert_matches_brute_force(STUBS[stub](forms), X, problem, filter, formula, rtol)


@pytest.fixture(scope="module")
def samples(pytestconfig):
    """Monte Carlo of one problem, shared by all stubs."""
    seed = pytestconfig.getoption("--seed")
    problem = test_risk.random_problem("diagonal-random", 0, seed)
    X = sample_design(jax.random.key(seed), problem.finetune_covariance, 6)
    return test_risk.monte_carlo_on_a_design(jax.random.key(seed), X, problem), X, problem


@pytest.mark.numerical
@pytest.mark.parametrize("stub", STUBS)
def test_monte_carlo_catches(stub, samples):
    measured, X, problem = samples
    assert test_risk.standard_errors(measured - test_risk.predicted(X, problem)) < 4
    assert test_risk.standard_errors(measured - test_risk.predicted(X, problem, STUBS[stub])) > 4


@pytest.mark.numerical
@pytest.mark.parametrize("penalty_scale", [1 - 1 / 8, 1 / 8], ids=["n − 1 samples keep (n−1)λ", "λ without n"])
@pytest.mark.parametrize("k", [None, 3])
def test_refitting_catches_a_leave_one_out_with_another_penalty(penalty_scale, k, generator, rtol):
    X, y, theta_1 = test_selection.data("wide", generator, k)
    wrong = leave_one_out(X, y, theta_1, penalty_scale * test_selection.PENALTIES, test_selection.TAUS)
    with pytest.raises(AssertionError):
        test_selection.assert_equals_refitting(wrong, X, y, theta_1, rtol)


@pytest.mark.numerical
def test_refitting_catches_in_sample_residuals_and_an_ignored_tau(generator, rtol):
    X, y, theta_1 = test_selection.data("tall", generator)
    filters = test_selection.TAUS * Ridge(test_selection.PENALTIES)
    in_sample = y - fine_tune(X, y, theta_1, filters) @ X.T
    full = leave_one_out(X, y, theta_1, test_selection.PENALTIES, np.ones_like(test_selection.TAUS))
    for wrong in (in_sample, full):
        with pytest.raises(AssertionError):
            test_selection.assert_equals_refitting(wrong, X, y, theta_1, rtol)


@pytest.mark.numerical
@pytest.mark.parametrize("shape", test_solve.SHAPES)
def test_the_closed_form_catches_a_wrong_step_size_or_weighting(shape, generator, rtol):
    X, y, theta_1, weights = test_solve.data(generator, shape)
    closed = fine_tune(X, y, theta_1, GradientDescent(0.05, 20), weights)
    right = {"theta_1": theta_1, "step_size": 0.05, "steps": 20, "sample_weights": weights}
    test_solve.close(gradient_descent(X, y, **right), closed, rtol)
    wrong = {
        "loss without ½": {"step_size": 0.1},
        "one step short": {"steps": 19},
        "weights ignored": {"sample_weights": None},
        "weights squared": {"sample_weights": weights**2},
        "weights normalised": {"sample_weights": weights / weights.mean()},
        "from zero": {"theta_1": 0 * theta_1},
    }
    for change in wrong.values():
        with pytest.raises(AssertionError):
            test_solve.close(gradient_descent(X, y, **{**right, **change}), closed, rtol)


def test_the_filter_contract_catches_a_quotient_that_is_zero_by_zero():
    from tests.test_filters import EIGENVALUES, FAMILIES, exactly

    with np.errstate(all="ignore"):
        naive = [(1 - np.exp(-0.8 * s)) / np.float64(s) for s in EIGENVALUES]
    expected = [exactly(FAMILIES["flow"].formula, 0.8, s) for s in EIGENVALUES]
    assert np.isnan(naive[0])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(naive[1:], expected[1:], rtol=1e-14)
