"""FLOW weights: the optimisation problem they solve, their limits, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from linfit import flow_weights
from linfit.weighting import median_temperature


@pytest.mark.numerical
def test_normalised_weights_minimise_entropic_loss(generator, rtol):
    """Σπℓ + TΣπ log π over the simplex, by a numerical optimiser; the opposite sign of ℓ gives another minimiser."""
    losses, temperature = generator.uniform(0, 3, 6), 0.7

    def objective(z):
        pi = np.exp(z - z.max())
        pi /= pi.sum()
        return pi @ losses + temperature * pi @ np.log(pi)

    z = scipy.optimize.minimize(objective, np.zeros(6), tol=1e-14).x
    expected = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    weights = np.asarray(flow_weights(losses, temperature))
    np.testing.assert_allclose(weights / weights.sum(), expected, atol=1e-5)
    np.testing.assert_allclose(weights, np.exp(-losses / temperature), rtol=max(rtol, 1e-12))


def test_mean_weight_of_a_gaussian_residual_at_the_median_temperature(seed):
    """E w = (1 + 2v/T)^{-1/2} with T/v = median χ²₁ (docs, F2), in standard errors."""
    residuals = np.random.default_rng(seed).standard_normal(200_000) * 1.7
    weights = np.asarray(flow_weights(residuals**2))
    expected = (1 + 2 / scipy.stats.chi2.median(1)) ** -0.5
    assert abs(weights.mean() - expected) < 5 * weights.std() / weights.size**0.5


@pytest.mark.numerical
def test_median_counts_only_what_counts():
    losses = [[1.0, 100.0, 2.0], [3.0, np.nan, 100.0]]
    mask = [[True, False, True], [True, True, False]]
    assert median_temperature(losses, mask) == 2.0
    with pytest.warns(UserWarning, match="1 of 4 losses are NaN: weight 0"):
        weights = flow_weights(losses, mask=mask)
    np.testing.assert_allclose(weights, [[np.exp(-0.5), 0, np.exp(-1)], [np.exp(-1.5), 0, 0]], rtol=1e-6)


def test_nan_is_counted_in_a_warning():
    with pytest.warns(UserWarning, match="2 of 3 losses are NaN"):
        weights = flow_weights([np.nan, 1.0, np.nan])
    np.testing.assert_allclose(weights, [0, np.exp(-1), 0])


@pytest.mark.parametrize(
    ("losses", "temperature", "expected"),
    [
        ([2.0, 2.0, 2.0], None, [np.exp(-1)] * 3),
        ([0.0, 0.0, 0.0], None, [1, 1, 1]),
        ([0.0, 0.0, 5.0], None, [1, 1, 0]),
        ([0.0, 1.0], 0.0, [1, 0]),
        ([1.0, np.inf, 2.0], None, [np.exp(-0.5), 0, np.exp(-1)]),
        ([1e308, 1e-308, 0.0], 1.0, [0, 1, 1]),
        ([1.0, 2.0], np.float64(1e-300), [0, 0]),
    ],
)
def test_limits(losses, temperature, expected):
    np.testing.assert_allclose(flow_weights(losses, temperature), expected, rtol=1e-12)


def test_units_cancel(generator):
    losses = generator.exponential(size=50)
    np.testing.assert_allclose(flow_weights(losses * 1e6), flow_weights(losses), rtol=1e-10)


def test_traces_without_recompiling_and_differentiates(generator):
    losses, traces = jnp.asarray(generator.exponential(size=9)), []

    @jax.jit
    def weights(losses, temperature):
        traces.append(None)
        return flow_weights(losses, temperature)

    np.testing.assert_allclose(weights(losses, 0.5), flow_weights(losses, 0.5), rtol=1e-12)
    weights(losses, 0.7)
    assert len(traces) == 1
    gradient = jax.grad(lambda T: flow_weights(losses, T).sum())(0.5)
    np.testing.assert_allclose(gradient, (losses / 0.25 * jnp.exp(-losses / 0.5)).sum(), rtol=1e-10)


def test_dtype_follows_the_losses():
    assert flow_weights(np.float32([1, 2])).dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "losses must not be empty"),
        (([1.0, -0.5],), "losses must be non-negative .* minimum -0.5"),
        (([np.nan, np.nan],), "at least one value that counts"),
        (([1.0, 2.0], -1.0), "temperature must be non-negative"),
        (([1.0, 2.0], np.nan), "temperature must be finite"),
        (([1.0, np.inf, np.inf],), "half of them or more are infinite"),
        (([1.0, 2.0], None, [True]), r"mask must have the shape of losses, \(2,\), got \(1,\)"),
        (([1.0, 2.0], [1.0, 2.0]), "temperature must have 0 dimension"),
        ((["a"],), "losses must be"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*NaN:UserWarning")
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        flow_weights(*arguments)
