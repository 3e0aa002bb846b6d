"""FLOW weights: their limits and normalisations, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linfit import flow_weights, gradient_descent
from linfit.weighting import effective_sample_size, effective_step, median_temperature, robust_weights


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


MASKS = {"samples": ([3.0, 0.5, 1.0, 2.0], None), "tokens": ([[3.0, 0.5], [1.0, 2.0]], [[True, True], [False, True]])}


@pytest.mark.numerical
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("case", MASKS)
def test_each_normalisation_has_its_effective_step(case, opposite, rtol):
    """The same direction, and the step that the table of the module says."""
    losses, mask = MASKS[case]
    counted = np.ones(np.shape(losses), bool) if mask is None else np.array(mask)
    n, sign = counted.sum(), 1 if opposite else -1
    weigh = robust_weights if opposite else flow_weights
    plain = np.where(counted, np.exp(sign * np.asarray(losses) / 1.5), 0)
    expected = {"count": plain, "mean": plain * n / plain.sum(), "none": n * plain}
    steps = {"count": plain.sum() / n, "mean": 1.0, "none": plain.sum()}
    for name, values in expected.items():
        weights = weigh(losses, 1.5, mask, normalisation=name)
        np.testing.assert_allclose(weights, values, rtol=max(rtol, 1e-12))
        np.testing.assert_allclose(effective_step(weights, mask), steps[name], rtol=max(rtol, 1e-12))
        size = plain.sum() ** 2 / (plain**2).sum()
        np.testing.assert_allclose(effective_sample_size(weights, mask), size, rtol=max(rtol, 1e-12))


def test_the_effective_step_is_that_of_gradient_descent(generator):
    """n times the weights and a step n times smaller, mean one and a step shrunk by the mean: the same fine-tuning."""
    X, y, theta_1 = generator.standard_normal((8, 5)), generator.standard_normal(8), generator.standard_normal(5)
    losses = (y - X @ theta_1) ** 2
    count = flow_weights(losses)
    reached = gradient_descent(X, y, theta_1, step_size=0.2, steps=7, sample_weights=count)
    for name in ("mean", "none"):
        weights = flow_weights(losses, normalisation=name)
        step_size = 0.2 * effective_step(count) / effective_step(weights)
        same = gradient_descent(X, y, theta_1, step_size=step_size, steps=7, sample_weights=weights)
        np.testing.assert_allclose(same, reached, rtol=1e-12)


def test_huge_losses_keep_their_relative_weights():
    """Far beyond the range of exp, to all digits; e^{−1} and e^{−2} against the first."""
    huge = 1e6 + np.arange(3)
    expected = 3 * np.exp(-np.arange(3.0)) / np.exp(-np.arange(3.0)).sum()
    np.testing.assert_allclose(flow_weights(huge, 1.0, normalisation="mean"), expected, rtol=1e-12)
    np.testing.assert_allclose(robust_weights(huge, 1.0), expected[::-1], rtol=1e-12)
    largest = flow_weights([1e305, 1.7e305], 1e305, normalisation="mean")
    np.testing.assert_allclose(largest[1] / largest[0], np.exp(-0.7), rtol=1e-12)


def test_weights_that_all_underflow_are_explained():
    with pytest.warns(UserWarning, match='all weights are 0: .* smallest loss, 1, .* 1e-300; .* normalisation="mean"'):
        weights = flow_weights([1.0, 2.0], np.float64(1e-300))
    np.testing.assert_array_equal(weights, 0)


mean_one = partial(flow_weights, normalisation="mean")


@pytest.mark.parametrize(
    ("weigh", "losses", "temperature", "expected"),
    [
        (flow_weights, [2.0, 2.0, 2.0], None, [np.exp(-1)] * 3),
        (flow_weights, [0.0, 0.0, 0.0], None, [1, 1, 1]),
        (flow_weights, [0.0, 0.0, 5.0], None, [1, 1, 0]),
        (flow_weights, [0.0, 1.0], 0.0, [1, 0]),
        (flow_weights, [1.0, np.inf, 2.0], None, [np.exp(-0.5), 0, np.exp(-1)]),
        (flow_weights, [1e308, 1e-308, 0.0], 1.0, [0, 1, 1]),
        (mean_one, [2.0, 2.0, 5.0], 0.0, [1.5, 1.5, 0]),
        (robust_weights, [2.0, 5.0, 5.0], 0.0, [0, 1.5, 1.5]),
        (mean_one, [2.0, 2.0], None, [1, 1]),
        (robust_weights, [2.0, 2.0], None, [1, 1]),
        (mean_one, [np.inf, 1.0, 1.0], None, [0, 1.5, 1.5]),
    ],
)
def test_limits(weigh, losses, temperature, expected):
    np.testing.assert_allclose(weigh(losses, temperature), expected, rtol=1e-12)


def test_a_nan_loss_counts_in_the_mean():
    """It stays in the authors' denominator, so the others make up for it."""
    with pytest.warns(UserWarning, match="1 of 3 losses are NaN"):
        weights = flow_weights([1.0, 1.0, np.nan], normalisation="mean")
    np.testing.assert_allclose(weights, [1.5, 1.5, 0])


@pytest.mark.parametrize("normalisation", ["count", "mean", "none"])
@pytest.mark.parametrize("weigh", [flow_weights, robust_weights])
def test_normalised_weights_trace_and_follow_the_dtype(weigh, normalisation, generator):
    losses = jnp.asarray(generator.exponential(size=9), jnp.float32)
    traced = jax.jit(lambda losses: weigh(losses, normalisation=normalisation))(losses)
    assert traced.dtype == np.float32
    np.testing.assert_allclose(traced, weigh(losses, normalisation=normalisation), rtol=1e-6)


def test_effective_sample_size_between_one_and_n():
    assert effective_sample_size([0.3] * 7) == pytest.approx(7)
    assert effective_sample_size([1e-300, 0.0]) == 1
    assert effective_sample_size([0.0, 0.0]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow_weights([]), "losses must not be empty"),
        (lambda: flow_weights([1.0, -0.5]), "losses must be non-negative .* minimum -0.5"),
        (lambda: flow_weights([np.nan, np.nan]), "at least one value that counts"),
        (lambda: flow_weights([1.0, 2.0], -1.0), "temperature must be non-negative"),
        (lambda: flow_weights([1.0, 2.0], np.nan), "temperature must be finite"),
        (lambda: flow_weights([1.0, np.inf, np.inf]), "half of them or more are infinite"),
        (lambda: flow_weights([1.0, 2.0], None, [True]), r"mask must have the shape of losses, \(2,\), got \(1,\)"),
        (lambda: flow_weights([1.0, 2.0], [1.0, 2.0]), "temperature must have 0 dimension"),
        (lambda: flow_weights(["a"]), "losses must be"),
        (lambda: flow_weights([1.0], normalisation="sum"), 'must be .count., .mean. or .none., got .sum.'),
        (lambda: flow_weights([np.inf, np.inf], 1.0, normalisation="mean"), "losses must hold a finite value"),
        (lambda: robust_weights([1.0, np.inf, 1.0]), "losses must be finite for robust weights"),
        (lambda: robust_weights([1.0, 1000.0], 1.0, normalisation="count"), "losses overflow .* largest is 1000 at T"),
        (lambda: robust_weights([1.0, -1.0]), "losses must be non-negative"),
        (lambda: effective_step([1.0, -1.0]), "weights must be non-negative"),
        (lambda: effective_step([1.0], [False]), "mask must be true somewhere"),
        (lambda: effective_step([1.0], [True, True]), "mask must have the shape of weights"),
        (lambda: effective_sample_size([[np.nan]]), "weights must be finite"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*NaN:UserWarning")
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
