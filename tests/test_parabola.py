"""The risk along the ensemble and the risk of given weights, against plain matrices and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from linfit.covariance import Dense, Empirical
from linfit.design import sample_task
from linfit.filters import GradientFlow, MinNorm, Ridge
from linfit.problem import FixedShift, Pair, RandomShift, TwoTaskProblem
from linfit.reduction import risk_forms
from linfit.risk import Parabola, excess_risks
from linfit.solve import fine_tune, interpolate
from tests.oracles import matrix_of
from theory import equivalents

pytestmark = pytest.mark.numerical
P, N = 12, 5


@pytest.fixture
def problem(generator, dtype):
    """A dense Σ₁, an empirical Σ₂, a random shift, u ≠ 0: nothing is the identity by accident."""
    root = generator.standard_normal((P, P))
    features = generator.standard_normal((9, P))
    u = 0.3 * generator.standard_normal(P)
    shift = RandomShift(jnp.asarray(generator.uniform(0.5, 2, P), dtype))
    parts = (Dense(jnp.asarray(root @ root.T, dtype)), Empirical(jnp.asarray(features, dtype)))
    return TwoTaskProblem(*parts, shift, 0.6, jnp.asarray(u, dtype))


def test_excess_risks_are_quadratic_forms_of_plain_matrices(problem, generator, rtol):
    theta, first, second = (generator.standard_normal(shape) for shape in ((3, 2, P), (2, P), (P,)))
    found = excess_risks(theta, problem, first, second)
    covariances = (problem.finetune_covariance, problem.pretrain_covariance)
    for risk, star, covariance in zip(found, (second, first), covariances, strict=True):
        expected = np.einsum("abi,ij,abj->ab", theta - star, matrix_of(covariance), theta - star)
        np.testing.assert_allclose(risk, expected, rtol=100 * rtol)
    assert found.finetune.shape == found.pretrain.shape == (3, 2)


def test_pretrained_risks_are_the_ends_of_every_parabola(problem, rtol):
    forms = risk_forms(jnp.ones((1, P)), problem)
    for risk, form in zip(problem.pretrained_risks, forms, strict=True):
        np.testing.assert_allclose(risk, form(MinNorm(), 0.0).total, rtol=rtol)
    second = np.diag(problem.shift.covariance.diagonal()) + np.outer(problem.pretrain_error, problem.pretrain_error)
    expected = np.trace(second @ matrix_of(problem.finetune_covariance))
    np.testing.assert_allclose(problem.pretrained_risks.finetune, expected, rtol=100 * rtol)


def test_a_parabola_is_the_risk_of_the_form_at_every_tau(problem, generator, rtol):
    stack = generator.standard_normal((3, N, P))
    form = risk_forms(stack, problem).finetune
    filter = Ridge(jnp.array([0.1, 1.0]))
    parabola, tau = form.along(filter), jnp.array([-0.5, 0.4, 1.0, 1.7])
    assert parabola.slope.shape == parabola.constant.shape == (3, 2)
    for one in tau:
        for part, expected in zip(parabola(one), form(filter, one), strict=True):
            np.testing.assert_allclose(part, expected, rtol=100 * rtol, atol=rtol)
    averaged = form(filter, tau[:, None]).total.mean(0)
    np.testing.assert_allclose(parabola.mean()(tau[:, None]).total, averaged, rtol=100 * rtol)


def test_steps_of_fitted_weights_have_the_risks_of_their_averages(problem, seed, rtol):
    task = sample_task(jax.random.key(seed), problem, N)
    theta = fine_tune(task.X, task.y, task.theta_1, GradientFlow([0.3, 5.0]))
    zero = jnp.zeros(P)
    starts = (task.theta_1 - task.theta_2_star, task.theta_1)
    covariances = (problem.finetune_covariance, problem.pretrain_covariance)
    for tau in (0.0, 0.3, 1.2):
        average = jnp.stack([interpolate(task.theta_1, one, tau) for one in theta])
        expected = excess_risks(average, problem, zero, task.theta_2_star)
        for covariance, start, risk in zip(covariances, starts, expected, strict=True):
            parabola = Parabola.of_steps(covariance, start, theta - task.theta_1)
            np.testing.assert_allclose(parabola(tau).total, risk, rtol=1000 * rtol)


def test_the_optimum_is_the_least_risk_from_exact_forms_and_equivalents_alike(generator):
    spectrum = np.sort(generator.uniform(0.2, 2, P))[::-1]
    problem = TwoTaskProblem(spectrum, spectrum[::-1].copy(), FixedShift(generator.standard_normal(P)), 0.8)
    exact = risk_forms(generator.standard_normal((N, P)), problem).finetune.along(Ridge(0.2))
    for parabola in (exact, *equivalents.along(problem, N, Ridge(0.2))):
        found = scipy.optimize.minimize_scalar(lambda tau, parabola=parabola: float(parabola(tau).total))
        assert float(parabola.optimal_tau) == pytest.approx(found.x, abs=2e-3)
        assert float(parabola.optimal_risk) == pytest.approx(found.fun, rel=1e-4, abs=1e-5)
        gain = float(parabola(1.0).total - parabola.optimal_risk)
        assert float(parabola.gain) == pytest.approx(gain, rel=1e-3, abs=1e-5)


def test_where_nothing_moves_every_tau_is_best():
    parabola = Parabola(*(jnp.zeros(2) for _ in range(4)))
    np.testing.assert_array_equal(parabola.optimal_tau, 1)
    np.testing.assert_array_equal(parabola.gain, 0)
    still = equivalents.along(TwoTaskProblem([1.0, 1.0], [1.0, 2.0], FixedShift([1.0, 1.0]), 0.1), 1, GradientFlow(0.0))
    assert float(still.finetune.optimal_tau) == 1


def test_pairs_and_parabolas_cross_transformations(problem, generator):
    rows = jnp.asarray(generator.standard_normal((N, P)))

    def best(penalty):
        return risk_forms(rows, problem).map(lambda form: form.along(Ridge(penalty)).optimal_risk)

    eager, compiled = best(0.3), jax.jit(best)(0.3)
    assert isinstance(compiled, Pair)
    np.testing.assert_allclose(compiled, eager, rtol=1e-3)
    mapped = jax.vmap(best)(jnp.array([0.3, 2.0]))
    np.testing.assert_allclose(mapped.pretrain[0], eager.pretrain, rtol=1e-3, atol=1e-5)
    assert jnp.isfinite(jax.grad(lambda penalty: best(penalty).finetune)(0.3))
