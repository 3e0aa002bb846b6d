"""Pipelines of stages: recursion against simulation and exact limits, gradients, averaging with any stage (P1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linfit import GradientDescent, GradientFlow, MinNorm, RandomShift, Ridge, TwoTaskProblem, spectra
from linfit.filters import Combination, SelfDistillation
from linfit.pipelines import exact_risks
from sims.pipelines import similar_targets, simulated_risks
from theory import equivalents
from theory.movement import movement, nodes
from theory.pipelines import Stage, best_source_size, bias_and_variance, optimal, risks, transfer

P = 60
FALLING, FLAT = spectra.power_law(P, 1.0), spectra.isotropic(P)
HALF = jnp.where(jnp.arange(P) % 2 == 0, 1.0, 0.0)
OPPOSED = similar_targets(jnp.array([[1.0, -0.6], [-0.6, 2.0]]), jnp.full(P, 1 / P))
ALONE = jnp.ones((1, 1, P)) / P
STAGES = [Stage(FALLING, 40, 0.5, Ridge(0.05)), Stage(HALF, 20, 0.3, MinNorm(), 0.6)]


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_one_stage_is_the_deterministic_equivalent():
    problem = TwoTaskProblem(FLAT, FALLING, RandomShift(jnp.ones(P) / P), noise_std=0.5)
    mixed = 0.4 * GradientFlow(7.0) + 0.5 * MinNorm()
    for filter in (mixed, SelfDistillation(0.1, -0.5)):
        found = bias_and_variance(Stage(FALLING, 40, 0.5, filter, 1.2), ALONE)
        expected = equivalents.risk(problem, 40, filter, 1.2).finetune
        close(found.bias[0, 0], expected.bias, 1e-7)
        close(found.variance[0, 0], expected.variance, 1e-7)


def test_isotropic_stages_are_exact_up_to_the_noise():
    stages = [Stage(FLAT, 24, 0.0, MinNorm()), Stage(FLAT, 15, 0.0, MinNorm())]
    shift = 0.4  # targets β + δ, then β
    targets = similar_targets(jnp.array([[1.0 + shift, 1.0], [1.0, 1.0]]), jnp.full(P, 1 / P))
    close(bias_and_variance(stages, targets).bias[1, 1], transfer(P, 24, 15, shift=shift).bias)
    one = risks(Stage(FLAT, 1, 0.0, MinNorm()), ALONE)  # a single sample
    close(one, 1 - 1 / P)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [
    STAGES,
    [Stage(HALF, 90, 0.5, MinNorm()), Stage(FALLING, 30, 0.5, GradientFlow(9.0), 1.3, average_with=-1)],
])  # fmt: skip
def test_simulation_from_raw_data(seed, stages):
    data = simulated_risks(jax.random.key(seed), stages, OPPOSED, replicates=600)
    gap = abs(data.risk - data.predicted)
    assert (gap < 5 * data.risk_error + 0.03 * data.predicted).all(), (data.risk.values, data.predicted.values)
    assert (data.risk_error < 0.04 * data.predicted).all()


@pytest.mark.slow
def test_exact_risks_average_to_the_prediction(generator):
    sources, taus, noise = [-1, -1, 0, 2], [1.0, 0.6, 1.3, 0.5], [0.5, 0.3, 0.7, 0.2]
    filters, sizes, rows = [Ridge(0.05), MinNorm(), GradientFlow(5.0), Ridge(0.1)], [40, 15, 80, 25], [0, 1, 0, 2]
    tests = jnp.stack([FALLING, HALF, FLAT])
    root = generator.standard_normal((3, 3))
    targets, tasks = similar_targets(root @ root.T, generator.uniform(0.2, 1, P) / P), [0, 1, 0, 2]
    stages = [
        Stage(tests[row], *rest, task=task, average_with=source)
        for row, *rest, task, source in zip(rows, sizes, noise, filters, taus, tasks, sources)
    ]
    predicted, samples = risks(stages, targets), []
    for _ in range(60):
        designs = [generator.standard_normal((n, P)) * np.sqrt(tests[row]) for n, row in zip(sizes, rows)]
        exact = exact_risks(
            designs, filters, targets, tests, noise_std=noise, tau=taus, task=tasks, average_with=sources
        )
        samples.append(np.asarray(exact.total))
    gap = np.abs(np.mean(samples, axis=0) - predicted)
    assert (gap < 5 * np.std(samples, axis=0) / 60**0.5 + 0.03 * predicted).all(), gap / predicted


def test_exact_risks_of_labels_that_are_fitted(generator):
    X = [generator.standard_normal((4, 6)), generator.standard_normal((7, 6))]
    tests, targets = jnp.ones((2, 6)), jnp.broadcast_to(jnp.eye(2)[:, :, None], (2, 2, 6))
    exact = exact_risks(X, [MinNorm(), MinNorm()], targets, tests, noise_std=[0.0, 2.0])
    close(exact.bias[1], [12.0, 0.0])  # seven rows determine six weights
    close(exact.variance[1], np.full(2, 4 * np.trace(np.linalg.inv(X[1].T @ X[1]))))
    close(exact.variance[0], np.zeros(2))


def test_a_stage_may_stand_for_many():
    penalties, order = jnp.array([0.1, 0.02, 0.3]), [0, 1, 0]
    noise, taus = [0.1, 0.2, 0.3], [1.0, 0.7, 1.1]
    together = Stage(FALLING, 30, noise, Ridge(penalties), taus, task=order, average_with=[-1, -1, 1])
    apart = [
        Stage(FALLING, 30, 0.1, Ridge(0.1), task=0),
        Stage(np.asarray(FALLING), 30.0, 0.2, Ridge(0.02), 0.7, task=1, average_with=-1),
        Stage(FALLING, 30, 0.3, Ridge(0.3), 1.1, task=0, average_with=1),
    ]
    tests = jnp.stack([FALLING, FLAT])
    assert len(together) == 3
    close(risks(together, OPPOSED, tests), risks(apart, OPPOSED, tests))
    mixed = [*apart[:2], Stage(jnp.stack([FALLING]), 30, 0.3, 1.0 * Ridge([0.3]), 1.1, task=0, average_with=1)]
    close(risks(mixed, OPPOSED, tests), risks(apart, OPPOSED, tests))


def test_averaging_with_an_earlier_stage():
    first, second = STAGES
    back = Stage(FALLING, 25, 0.5, Ridge(0.1), 0.0, task=0, average_with=0)  # τ = 0: as after the first stage
    found = risks([first, second, back], OPPOSED)
    close(found[2], found[0])
    start = Stage(FALLING, 25, 0.5, Ridge(0.1), 0.0, task=0, average_with=-1)
    close(risks([first, second, start], OPPOSED)[2], jnp.stack([FALLING @ OPPOSED[0, 0], HALF @ OPPOSED[1, 1]]))
    before = Stage(FALLING, 25, 0.5, Ridge(0.1), 0.4, task=0)
    same = Stage(FALLING, 25, 0.5, Ridge(0.1), 0.4, task=0, average_with=1)
    close(risks([first, second, before], OPPOSED), risks([first, second, same], OPPOSED))
    other = risks([first, second, Stage(FALLING, 25, 0.5, Ridge(0.1), 0.4, task=0, average_with=0)], OPPOSED)
    assert (abs(other[2] / found[1] - 1) > 1e-3).all()


def test_limits():
    nothing = Stage(FALLING, 40, 0.5, Ridge(jnp.inf))
    close(risks([nothing, STAGES[1]], OPPOSED)[0], jnp.stack([FALLING @ OPPOSED[0, 0], HALF @ OPPOSED[1, 1]]))
    for filter in (GradientFlow(jnp.inf), Ridge(0.0), GradientFlow([jnp.inf])):
        close(risks([Stage(HALF, 50, 0.5, filter)], ALONE), risks([Stage(HALF, 50, 0.5, MinNorm())], ALONE))
    peak = Stage(HALF, 30, 0.5, MinNorm(), task=[0, 0])  # as many samples as directions
    assert np.isinf(risks(peak, ALONE)).all()
    assert np.isfinite(bias_and_variance(peak, ALONE).bias).all()
    close(risks(Stage(HALF, 30, 0.0, MinNorm()), ALONE), 0.0 + np.zeros((1, 1)))
    assert not np.asarray(movement(Ridge(0.1), HALF, 7).variance(1.0, 1.0))[1::2].any()


def objective(values):
    penalty, time, tau, n = values
    stages = [
        Stage(FALLING, n[0], 0.3, Ridge(penalty), tau[0]),
        Stage(FLAT, n[1], 0.4, GradientFlow(time), tau[1], average_with=-1),
    ]
    return risks(stages, OPPOSED)[-1] @ jnp.array([1.0, 2.0])


def test_gradients_are_those_of_finite_differences():
    values = (jnp.array(0.05), jnp.array(5.0), jnp.array([0.9, 1.2]), jnp.array([30.0, 80.0]))
    flat, unravel = jax.flatten_util.ravel_pytree(values)
    value = jax.jit(jax.value_and_grad(lambda x: objective(unravel(x))))
    gradient = value(flat)[1]
    for index in range(flat.size):
        step = jnp.zeros_like(flat).at[index].set(1e-4 * flat[index])
        difference = (value(flat + step)[0] - value(flat - step)[0]) / (2 * step[index])
        assert abs(gradient[index] / difference - 1) < 1e-5, index
    assert float(value(flat)[0]) == pytest.approx(float(objective(values)), rel=1e-9)


def test_vmap_and_dtype():
    penalties = jnp.array([0.01, 0.1, 1.0])

    def one(penalty):
        return risks([Stage(FALLING, 40, 0.5, Ridge(penalty)), STAGES[1]], OPPOSED)

    close(jax.vmap(one)(penalties), jnp.stack([one(penalty) for penalty in penalties]))
    single = [Stage(jnp.asarray(s, jnp.float32), 40, 0.5, Ridge(0.05)) for s in (FALLING, FLAT)]
    found = risks(single, np.asarray(OPPOSED, np.float32))
    assert found.dtype == jnp.float32
    double = [Stage(s, 40, 0.5, Ridge(0.05)) for s in (FALLING, FLAT)]
    np.testing.assert_allclose(found, risks(double, OPPOSED), rtol=1e-4)


@pytest.mark.slow
def test_the_best_of_one_isotropic_task_is_bayes():
    stages = Stage(FLAT, 20, 0.5, Ridge([0.3, 0.3, 0.3]), task=[0, 0, 0])
    best = optimal(stages, ALONE, [1.0])
    error, expected = 1.0, []
    for _ in range(3):
        expected.append(0.5**2 / (20 * error / P))
        padded = Stage(FLAT, 20, 0.5, Ridge([jnp.inf] * (3 - len(expected)) + expected), task=[0, 0, 0])
        error = float(risks(padded, ALONE)[-1, 0])
    assert best.converged
    assert float(best.value) == pytest.approx(error, rel=1e-6)
    np.testing.assert_allclose(best.stages[0].filter.penalty, expected, rtol=2e-2)
    np.testing.assert_allclose(best.stages[0].tau, 1.0, atol=2e-2)


@pytest.mark.slow
def test_the_best_of_two_tasks_is_a_minimum():
    weights = jnp.array([1.0, 0.5])
    best = optimal(STAGES, OPPOSED, weights, hold_tau=True)
    assert best.converged
    assert best.value < risks(STAGES, OPPOSED)[-1] @ weights
    ridge, minimum = best.stages
    assert minimum.tau == STAGES[1].tau
    for factor in (0.7, 0.95, 1.05, 1.4):
        near = [Stage(FALLING, 40, 0.5, Ridge(factor * ridge.filter.penalty)), minimum]
        assert risks(near, OPPOSED)[-1] @ weights > best.value
    free = optimal(STAGES, OPPOSED, weights, max_steps=20)
    assert free.value < best.value
    every = optimal(STAGES, OPPOSED, jnp.ones((2, 2)), hold_tau=True)
    assert float(every.value) == pytest.approx(float(every.risks.sum()))


@pytest.mark.slow
def test_the_best_fixed_penalty_grows_like_stages_over_their_logarithm():
    """2T/ln(4TE/v), E = 1 the error at the start, v = σ²p/n the noise of a stage at λ = 1, up to 1/ln T."""
    gaps = []
    for count in (16, 64, 256):
        expected, order = 2 * count / np.log(4 * count / (P / 40)), [0] * count
        grid = expected * np.geomspace(0.5, 2, 41)
        found = [float(risks(Stage(FLAT, 40, 1.0, Ridge([x] * count), task=order), ALONE)[-1, 0]) for x in grid]
        gaps.append(abs(np.log(grid[np.argmin(found)] / expected)))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.05


def test_a_short_detour_costs_less_with_more_features():
    """Two tasks on random coordinates, samples and effective dimension fixed: forgetting falls with p."""
    forgotten = []
    for p in (40, 100, 400):
        first = jnp.where(jnp.arange(p) < 20, 1.0, 0.0)
        second = jnp.roll(first, 20 - 20 * 20 // p)  # as many common coordinates as random ones have on average
        stages = [Stage(first, 10, 0.1, MinNorm()), Stage(second, 10, 0.1, MinNorm())]
        found = risks(stages, similar_targets(jnp.eye(2), jnp.ones(p)))
        forgotten.append(float(found[1, 0] - found[0, 0]))
    assert forgotten[0] > forgotten[1] > forgotten[2] > 0


def test_transfer_helps_on_one_side_of_the_threshold():
    p, threshold = 50, 50 / 48  # p/(p−2): a single sample
    for snr, helps in ((1.001 * threshold, True), (0.999 * threshold, False)):
        assert (float(best_source_size(p, snr, 0.0)) > 0.5) == helps
        variances = transfer(p, jnp.arange(0, 40), 5, source_noise_std=snr**-0.5).total
        assert bool(variances[1:].min() < variances[0]) == helps


def test_nodes_follow_the_filter():
    s = jnp.array([0.0, 0.3, 2.0])
    sums = Combination((MinNorm(), Ridge([0.2, 0.5])), [0.3, -1.2]) + 0.5 * GradientFlow([1.0, 4.0])
    for filter in (Ridge([0.1, jnp.inf]), GradientFlow([0.0, 3.0]), GradientDescent(0.3, [0, 4, 60]), sums):
        penalties, weights = nodes(filter, jnp.float64)
        learned = jnp.sum(weights[..., None] * s / (s + penalties[..., None] + (s == 0)), axis=-2).real
        close(learned, s * filter(s), 1e-7)


def test_gradient_descent_is_checked_stage_by_stage():
    edge = float(2 / equivalents.spectral_edge(FALLING, 10))
    n, sizes = [10, 1000], [0.9 * edge, 1.1 * edge]  # the larger step where there are more samples
    assert len(risks(Stage(FALLING, n, 0.1, GradientDescent(sizes, 3), task=[0, 0]), ALONE)) == 2
    with pytest.raises(ValueError, match="step_size must be below"):
        risks(Stage(FALLING, n, 0.1, GradientDescent(sizes[::-1], 3), task=[0, 0]), ALONE)


def test_blocks_of_coordinates_change_nothing():
    p = 2**20 // 24 + 1001  # more than one block of a contour's nodes
    s, few = jnp.ones(p), movement(GradientFlow(2.0), jnp.ones(50), 20)
    many = movement(GradientFlow(2.0), s, 20 * p / 50)
    close(many.fraction[jnp.array([0, -1])], few.fraction[:2], 1e-8)
    close(many.variance(1.0, 0.0)[jnp.array([0, -1])], few.variance(1.0, 0.0)[:2], 1e-8)


BAD = {
    "spectrum": lambda: Stage(-FALLING, 10, 0.1, MinNorm()),
    "n must be positive": lambda: Stage(FALLING, 0, 0.1, MinNorm()),
    "noise_std": lambda: Stage(FALLING, 10, -0.1, MinNorm()),
    "filter must be a linfit filter": lambda: Stage(FALLING, 10, 0.1, 3.0),
    "one length": lambda: Stage(FALLING, [1, 2], 0.1, Ridge([0.1, 0.2, 0.3])),
    "task": lambda: Stage(FALLING, 10, 0.1, MinNorm(), task=0.5),
    "stages must be": lambda: risks([], OPPOSED),
    "that of the first stage|the spectrum of the first stage": lambda: risks(
        [STAGES[0], Stage(FALLING[:9], 5, 0.1, MinNorm())], OPPOSED
    ),
    "targets must be for 2 tasks": lambda: risks(STAGES, ALONE),
    "targets must have shape": lambda: risks(STAGES, jnp.ones((2, 2, 3))),
    "symmetric": lambda: risks(STAGES, OPPOSED.at[0, 1].set(0.0)),
    "second moments": lambda: risks(STAGES, jnp.array([[1.0, 2.0], [2.0, 1.0]])[:, :, None]),
    "tests must be given": lambda: risks(STAGES[:1], OPPOSED),
    "tests must have shape": lambda: risks(STAGES, OPPOSED, FALLING[None]),
    "average_with must be an earlier": lambda: risks([Stage(FALLING, 9, 0.1, MinNorm(), average_with=0)], ALONE),
    "step_size must be below": lambda: risks(Stage(FALLING, 9, 0.1, GradientDescent(1.9, 3)), ALONE),
    "weights must have shape": lambda: optimal(STAGES, OPPOSED, [1.0]),
    "positive and finite": lambda: optimal([Stage(FALLING, 9, 0.1, Ridge(0.0))], ALONE, [1.0]),
    "below p − 1": lambda: transfer(10, 9, 2),
    "number of designs": lambda: exact_risks([np.ones((2, 3))], [], jnp.ones((1, 1, 3)), jnp.ones((1, 3))),
    "an earlier stage": lambda: exact_risks(
        [np.ones((2, 3))], [MinNorm()], jnp.ones((1, 1, 3)), jnp.ones((1, 3)), average_with=[0]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
