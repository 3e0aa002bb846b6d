"""One contract that every filter keeps: shapes, exact limits, no recompilation, gradients, dtype, `tau * filter`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from linfit import Filter, GradientDescent, GradientFlow, MinNorm, Ridge
from linfit.filters import Tabulated

mpmath.mp.dps = 400  # 1 − (1−1e-300)^k needs them


class Family(NamedTuple):
    """A filter, its values of the hyperparameter, and its formula in exact arithmetic."""

    build: Callable[..., Filter]
    values: list[float]
    formula: Callable[[mpmath.mpf, mpmath.mpf], mpmath.mpf]


def geometric(s, step, steps):
    """η Σ_{j<k} (1−ηs)^j, which at s = 0 is ηk."""
    return step * steps if s == 0 else (1 - (1 - step * s) ** int(steps)) / s


FAMILIES = {
    "ridge": Family(Ridge, [1e-8, 0.03, 0.7, 40.0], lambda s, penalty: 1 / (s + penalty)),
    "flow": Family(GradientFlow, [0.0, 1e-9, 0.8, 25.0, 1e6], lambda s, t: t if s == 0 else -mpmath.expm1(-t * s) / s),
    "descent-steps": Family(
        lambda steps: GradientDescent(0.25, steps),
        [0, 1, 2, 7, 100, 10_001],
        lambda s, k: geometric(s, mpmath.mpf(0.25), k),
    ),
    "descent-step-size": Family(
        lambda step_size: GradientDescent(step_size, 6),
        [1e-9, 0.125, 0.5, 1.0, 1.75],
        lambda s, step: geometric(s, step, 6),
    ),
}
EIGENVALUES = [0.0, 1e-300, 1e-30, 1e-12, 1e-7, 1e-3, 0.3, 0.9999999, 1.0, 1.125]
families = pytest.mark.parametrize("name", FAMILIES)


def exactly(formula, value, s):
    return float(formula(mpmath.mpf(float(s)), mpmath.mpf(float(value))))


@pytest.mark.numerical
@families
def test_every_digit_down_to_the_limit_s_to_zero(name, dtype):
    family = FAMILIES[name]
    s = jnp.asarray([s for s in EIGENVALUES if s == 0 or s > 1.1 * jnp.finfo(dtype).tiny], dtype)
    for value in family.values:
        value = np.asarray(value, dtype)
        expected = [exactly(family.formula, value, eigenvalue) for eigenvalue in s]
        np.testing.assert_allclose(family.build(value)(s), expected, rtol=40 * jnp.finfo(dtype).eps)


@pytest.mark.numerical
def test_gradient_descent_close_to_the_edge_of_stability(dtype):
    """ηs → 2: an even power returns almost to where it began, an odd one goes almost twice as far."""
    epsilon = 2.0**-20
    s = jnp.asarray([2 - epsilon, 1 + epsilon, 1 - epsilon], dtype)
    for steps in (1, 2, 5, 50, 51):
        expected = [exactly(lambda s, k: geometric(s, mpmath.mpf(1), k), steps, eigenvalue) for eigenvalue in s]
        np.testing.assert_allclose(GradientDescent(1.0, steps)(s), expected, rtol=40 * jnp.finfo(dtype).eps)


@pytest.mark.numerical
def test_min_norm_is_the_pseudo_inverse():
    s = np.array([0.0, 1e-20, 0.5, 4.0])
    np.testing.assert_allclose(MinNorm()(s), [0, 0, 2, 0.25], rtol=1e-6)
    np.testing.assert_allclose(MinNorm()(s), np.diag(np.linalg.pinv(np.diag(s))), rtol=1e-6)


@pytest.mark.numerical
def test_limits_of_the_hyperparameters(rtol):
    s = jnp.array([0.0, 0.5, 2.0])
    limit = MinNorm()(s)
    np.testing.assert_array_equal(Ridge(0.0)(s), limit)
    np.testing.assert_array_equal(GradientFlow(jnp.inf)(s), limit)
    np.testing.assert_array_equal(Ridge(jnp.inf)(s), 0)
    np.testing.assert_array_equal(GradientDescent(0.3, 0)(s), 0)
    np.testing.assert_allclose(Ridge(1e-12)(s)[1:], limit[1:], rtol=1e-6)
    np.testing.assert_allclose(GradientFlow(1e4)(s)[1:], limit[1:], rtol=rtol)
    np.testing.assert_allclose(GradientDescent(0.9, 2_000)(s)[1:], limit[1:], rtol=rtol)
    # small steps are the flow: error O(η)
    np.testing.assert_allclose(GradientDescent(1e-6, 3_000_000)(s), GradientFlow(3.0)(s), rtol=1e-3)


@pytest.mark.numerical
@families
def test_arrays_of_hyperparameters_come_in_front(name, rtol):
    family, s = FAMILIES[name], jnp.array([0.0, 0.4, 1.1])
    values = np.array(family.values[:4]).reshape(2, 2)
    stacked = family.build(values)(s)
    assert stacked.shape == (2, 2, 3)
    for index in np.ndindex(2, 2):
        np.testing.assert_allclose(stacked[index], family.build(values[index])(s), rtol=rtol)


def test_step_sizes_and_steps_broadcast():
    s = jnp.array([0.0, 0.4, 1.1])
    both = GradientDescent(np.array([[0.1], [0.2]]), np.array([1, 2, 3]))(s)
    assert both.shape == (2, 3, 3)
    np.testing.assert_allclose(both[1, 2], GradientDescent(0.2, 3)(s), rtol=1e-15)


@pytest.mark.numerical
@families
def test_jit_equals_eager(name, rtol):
    family, s = FAMILIES[name], jnp.array([0.0, 1e-9, 0.4, 1.1])
    compiled = jax.jit(lambda filter, s: filter(s))
    for value in family.values:
        for filter in (family.build(value), 0.3 * family.build(value)):
            np.testing.assert_allclose(compiled(filter, s), filter(s), rtol=rtol)
    inside = jax.jit(lambda value: family.build(value)(s))  # built under the trace
    np.testing.assert_allclose(inside(family.values[1]), family.build(family.values[1])(s), rtol=rtol)


@families
def test_new_values_never_recompile(name):
    family, traces = FAMILIES[name], 0

    @jax.jit
    def evaluate(filter, s):
        nonlocal traces
        traces += 1
        return filter(s)

    for value in family.values:
        evaluate(family.build(value), jnp.array([0.0, value % 1, 1.1]))
    assert traces == 1
    for value in family.values:
        evaluate(value * family.build(np.full(3, value)), jnp.array([0.0, 0.4, 1.1]))
    assert traces == 2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "descent-steps"])
def test_gradients_equal_finite_differences(name):
    """With respect to the hyperparameter, τ and the eigenvalues; the limit s = 0 and ηs > 1 included."""
    family, weights = FAMILIES[name], jnp.array([0.7, -1.3, 0.4, 2.0])

    @jax.jit
    def value(at):
        hyperparameter, tau, *s = at
        return weights @ (tau * family.build(hyperparameter))(jnp.stack([0.0, *s]))

    for hyperparameter in (0.3, 0.9, 1.6):
        at, step = np.array([hyperparameter, 0.6, 0.02, 0.5, 1.2]), 1e-6
        differences = [(value(at + h) - value(at - h)) / (2 * step) for h in step * np.eye(5)]
        for gradient in (jax.grad(value)(at), jax.jacfwd(value)(at)):
            np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)


def test_the_gradient_at_no_penalty_is_that_of_the_limit():
    s = jnp.array([0.0, 0.5, 2.0])
    np.testing.assert_allclose(jax.jacobian(lambda penalty: Ridge(penalty)(s))(0.0), [0, -4, -0.25], rtol=1e-15)


@pytest.mark.numerical
@pytest.mark.parametrize(
    "tau", [0.3, 2, -1.5, np.float64(0.3), np.array([0.0, 0.5]), jnp.array([[0.1], [1.4]])], ids=str
)
@pytest.mark.parametrize("filter", [MinNorm(), Ridge([0.1, 0.9]), GradientFlow([2.0, 1.0]), GradientDescent(0.1, 3)])
def test_an_ensemble_is_tau_times_the_filter_in_either_order(filter, tau, rtol):
    s = jnp.array([0.0, 0.4, 1.1])
    expected = np.asarray(tau)[..., None] * np.asarray(filter(s))
    for ensemble in (tau * filter, filter * tau):
        assert isinstance(ensemble, Filter)
        np.testing.assert_allclose(ensemble(s), expected, rtol=rtol)
    np.testing.assert_allclose((0.5 * (tau * filter))(s), 0.5 * expected, rtol=rtol)


FILTERS = [
    lambda number: MinNorm(),
    lambda number: Ridge(number(1)),
    lambda number: GradientFlow(number(2)),
    lambda number: GradientDescent(number(1), number(3)),
    lambda number: number(1) * Ridge(number(2)),
]


@pytest.mark.parametrize("build", FILTERS)
@pytest.mark.parametrize("number", [int, float, np.float64, np.float32, lambda value: jnp.asarray(value, jnp.float32)])
def test_float32_eigenvalues_give_a_float32_filter(build, number):
    assert build(number)(jnp.array([0.0, 1.0], jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("build", FILTERS)
def test_integers_are_promoted(build):
    g = build(int)([0, 1])
    assert g.dtype == jnp.result_type(float)
    np.testing.assert_allclose(g, build(float)(np.array([0.0, 1.0])), rtol=1e-15)
    assert Ridge([1, 2])(np.array([0, 1])).dtype == jnp.result_type(float)


def test_a_tabulated_filter_is_its_values():
    table = Tabulated([1.0, 0.25])
    np.testing.assert_array_equal(table(np.ones(2)), [1.0, 0.25])
    np.testing.assert_array_equal(np.asarray(table), [1.0, 0.25])
    np.testing.assert_array_equal((2 * table)(np.ones(2)), [2.0, 0.5])
    assert table.shape == (2,)
