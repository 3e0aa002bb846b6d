"""One contract that every filter keeps: shapes, exact limits, no recompilation, gradients, dtype, `tau * filter`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from linfit import Combination, Filter, GradientDescent, GradientFlow, MinNorm, Ridge, SelfDistillation, SharpnessAware
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
    "distillation-penalty": Family(
        lambda penalty: SelfDistillation(penalty, -0.75),
        [1e-8, 0.03, 0.7, 40.0],
        lambda s, penalty: (1 + mpmath.mpf(0.75) * penalty / (s + penalty)) / (s + penalty),
    ),
    "distillation-mix": Family(
        lambda mix: SelfDistillation(0.25, mix),
        [-3.0, 0.0, 0.5, 0.75],
        lambda s, mix: (1 - mix * mpmath.mpf(0.25) / (s + 0.25)) / (s + 0.25),
    ),
    "sharpness-radius": Family(
        lambda radius: SharpnessAware(0.75, radius),
        [0.0, 1e-9, 0.5, 20.0],
        lambda s, rho: mpmath.mpf(0.75) if s == 0 else -mpmath.expm1(-mpmath.mpf(0.75) * s * (1 + rho * s)) / s,
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
    lambda number: SelfDistillation(number(1), number(2)),
    lambda number: SharpnessAware(number(1), number(2)),
    lambda number: Combination((MinNorm(), Ridge(number(1))), [number(1), number(3)]),
    lambda number: MinNorm() + GradientFlow(number(1)),
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


S = (0.0, 0.4, 1.1)


@pytest.mark.numerical
def test_sums_are_sums_of_values(rtol):
    parts = (MinNorm(), Ridge([0.1, 0.9]), 0.3 * GradientFlow(2.0))
    by_hand = sum(np.asarray(part(S)) for part in parts)
    for total in (sum(parts), parts[0] + (parts[1] + parts[2]), Combination(parts, np.ones(3))):
        assert isinstance(total, Filter)
        np.testing.assert_allclose(total(S), by_hand, rtol=rtol)
    np.testing.assert_allclose((2 * (parts[0] + parts[1]))(S), 2 * (parts[0](S) + parts[1](S)), rtol=rtol)


def test_weights_and_hyperparameters_of_combinations_broadcast():
    weights = np.arange(6.0).reshape(3, 1, 2)
    g = Combination((Ridge([0.1, 0.9]), MinNorm()), weights)(S)
    assert g.shape == (3, 2, 3)
    np.testing.assert_allclose(g[2, 1], 4 * Ridge(0.9)(S) + 5 * MinNorm()(S), rtol=1e-14)
    assert Combination((Ridge(1.0),), [2.0])(S).shape == (3,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Combination((MinNorm(), Ridge(1.0)), [1.0]), "weights .* must match the number of filters"),
        (lambda: Combination((MinNorm(),), 1.0), "weights .* must match the number of filters"),
        (lambda: Combination((MinNorm(), 2.0), [1.0, 1.0]), "filters must be linfit filters"),
        (lambda: Combination((MinNorm(),), [np.nan]), "weights must be finite"),
        (lambda: Combination((Ridge([1.0, 2.0]), Ridge([1.0, 2.0, 3.0])), [1.0, 1.0])(S), "must broadcast"),
        (lambda: SelfDistillation(-1.0, 0.0), "penalty must be non-negative"),
        (lambda: SelfDistillation(1.0, np.inf), "mix must be finite"),
        (lambda: SelfDistillation([1.0, 2.0], [1.0, 2.0, 3.0]), "mix must broadcast"),
        (lambda: SharpnessAware(1.0, -1.0), "radius must be non-negative"),
        (lambda: SharpnessAware(np.nan, 1.0), "time must be non-negative"),
    ],
)
def test_bad_combinations(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_only_filters_can_be_added():
    for other in (1.0, None, np.ones(3)):
        with pytest.raises(TypeError):
            MinNorm() + other
        with pytest.raises(TypeError):
            other + MinNorm()


@pytest.mark.numerical
def test_limits_of_distillation_and_sharpness(rtol):
    np.testing.assert_allclose(SelfDistillation(0.3, 0.0)(S), Ridge(0.3)(S), rtol=rtol)
    np.testing.assert_array_equal(SelfDistillation([0.0, np.inf], 5.0)(S), Ridge([0.0, np.inf])(S))
    np.testing.assert_array_equal(SharpnessAware(2.0, 0.0)(S), GradientFlow(2.0)(S))
    np.testing.assert_array_equal(SharpnessAware(np.inf, 3.0)(S), MinNorm()(S))
