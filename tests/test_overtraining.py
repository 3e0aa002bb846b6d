"""Overtraining: closed forms against integrators and search; simulations against closed forms and plain loops.

What the claims N1–N5 verify by themselves is not repeated here.
"""

from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import xarray as xr

from linfit import network
from sims import overtraining as sims
from sims.overtraining import training
from tests.oracles import numpy_descent
from theory import overtraining as theory

A3 = np.array([2.0, 1.0, 0.4])


def integrated(velocity, start, time):
    return scipy.integrate.solve_ivp(velocity, (0, time), [start], rtol=1e-11, atol=1e-13).y[0, -1]


@pytest.mark.numerical
def test_singular_values(rtol):
    for a in (1.3, 0.0, -0.7):
        exact = integrated(lambda _, s, a=a: 2 * s * (a - s), 0.05, 1.7)
        np.testing.assert_allclose(theory.singular_values(0.05, [a], 1.7)[0], exact, rtol=max(rtol, 1e-9))


def test_singular_values_at_the_limits():
    np.testing.assert_allclose(theory.singular_values(0.1, [2.0, -1.0, 0.0], 1e8), [2.0, 0.0, 0.1 / (1 + 2e7)])
    np.testing.assert_allclose(theory.singular_values([0.0, 3.0], [2.0, 2.0], [0.0, 50.0]), [[0, 3], [0, 2]])


def test_features_are_learned_one_after_another():
    half, ninety = (theory.learning_time(1e-4, A3, share * A3) for share in (0.5, 0.9))
    assert (ninety[:-1] < half[1:]).all()


@pytest.mark.parametrize("imbalance", [0.0, 0.3, -1.0])
def test_learning_time_inverts_the_flow(imbalance):
    levels = 0.01 + np.array([0.1, 0.5, 0.99])[:, None] * (A3 - 0.01)
    times = theory.learning_time(0.01, A3, levels, imbalance)
    w1, w2 = network.aligned_modes(*network.layer_modes(0.01, imbalance), A3[:, None], times)  # (level, mode, 1)
    np.testing.assert_allclose((w1 * w2)[..., 0], levels, rtol=1e-10)
    np.testing.assert_array_equal(theory.learning_time(0.1, 1.0, [0.05, 0.1, 1.0, 1.5]), [0, 0, np.inf, np.inf])


def test_sensitivity_by_unit_perturbations():
    """E‖W − A‖² over independent entries is a sum over entries: move each alone, then each pair."""
    generator = np.random.default_rng(0)
    (m, h, k), (g1, g2) = (2, 3, 4), (0.3, 0.7)
    w1, w2 = generator.standard_normal((m, h)), generator.standard_normal((h, k))
    units_1, units_2 = np.eye(m * h).reshape(-1, m, h), np.eye(h * k).reshape(-1, h, k)
    total = g1**2 * sum(np.sum((e @ w2) ** 2) for e in units_1) + g2**2 * sum(np.sum((w1 @ e) ** 2) for e in units_2)
    total += g1**2 * g2**2 * sum(np.sum((e @ f) ** 2) for e in units_1 for f in units_2)
    np.testing.assert_allclose(theory.gaussian_sensitivity(w1, w2, g1, g2), total / 2, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("imbalance", [0.0, 0.5, -0.5])
def test_perturbed_loss_is_that_of_the_matrices(imbalance):
    target = jax.random.normal(jax.random.key(0), (3, 2))
    a = jnp.linalg.svd(target, compute_uv=False)
    start = network.aligned_network(target, 0.02, imbalance, hidden_size=4)
    weights = network.gradient_flow(start, target, [0.0, 0.8, 3.0])
    ours = theory.perturbed_loss(0.02, a, [0.0, 0.8, 3.0], 0.2, (3, 4, 2), imbalance)
    np.testing.assert_allclose(ours.loss, network.loss(weights, target), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.sensitivity, theory.gaussian_sensitivity(*weights, 0.2), rtol=1e-6)
    assert (np.diff(ours.sensitivity) > 0).all()
    np.testing.assert_allclose(ours.total, ours.loss + ours.sensitivity)


def test_the_sizes_may_be_traced():
    def total(m, h, k):
        return theory.perturbed_loss(0.02, [2.0, 1.0], [0.0, 0.8, 3.0], 0.2, (m, h, k)).total

    np.testing.assert_allclose(jax.jit(total)(4, 5, 3), total(4, 5, 3), rtol=1e-5)


@pytest.mark.parametrize("imbalance", [0.0, 0.4, -1.0])
def test_inflection_is_the_minimum_found_by_search(imbalance, seed):
    generator = np.random.default_rng(seed + 10)
    shape, a, s0 = (7, 4, 5), generator.uniform(0.1, 3, 3), generator.uniform(1e-4, 0.05, 3)
    gamma = 10 ** generator.uniform(-1.8, -0.3)
    times = np.linspace(0, float(np.max(theory.learning_time(s0, a, 0.9999 * a, imbalance))), 4_001)
    w1, w2 = network.aligned_modes(*network.layer_modes(s0, imbalance), a, times)
    heights = ((a - w1 * w2) ** 2 + gamma**2 * (7 * w2**2 + 5 * w1**2)) / 2  # of each mode, but for a constant
    inflections = (theory.mode_inflection_times, theory.inflection_time)
    ours = np.hstack([inflection(s0, a, gamma, shape, imbalance) for inflection in inflections])
    searched = times[np.argmin(np.column_stack([heights, heights.sum(axis=1)]), axis=0)]
    assert (np.abs(ours - searched) <= 1.01 * times[1]).all()


def test_inflection_on_both_sides_of_its_conditions():
    a, s0, shape = np.array([1.0, 0.3, 0.2]), 0.01, (5, 3, 3)
    for mode, gap in enumerate(a - s0):
        edge = (2 * gap / 8) ** 0.5  # γ²(m+k)/2 = a − s₀
        below, above = (theory.mode_inflection_times(s0, a, edge * (1 + side), shape)[mode] for side in (-1e-3, 1e-3))
        assert below > 0
        assert above == 0
    assert theory.inflection_time(s0, a, 1.01 * (2 * 0.99 / 8) ** 0.5, shape) == 0
    assert theory.inflection_time(s0, a, 0.0, shape) == np.inf
    assert np.isfinite(theory.inflection_time(s0, a, 1e-6, shape))
    # Unbalanced, sensitivity hardly grows at first: a mode that only ever hurts when balanced now pays off for a while.
    assert theory.mode_inflection_times(s0, a, 0.4, shape)[1] == 0
    assert theory.mode_inflection_times(s0, a, 0.4, shape, imbalance=2.0)[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("imbalance", [0.0, 0.3])
def test_inflection_is_differentiable(imbalance):
    def time(gamma, a):
        return theory.inflection_time(0.01, a, gamma, (10, 10, 10), imbalance)

    a, step = jnp.array([2.0, 1.0, 0.9]), 1e-5
    slopes = jax.grad(time, argnums=(0, 1))(0.1, a)
    np.testing.assert_allclose(slopes[0], (time(0.1 + step, a) - time(0.1 - step, a)) / (2 * step), rtol=1e-5)
    for mode in range(3):
        moved = [time(0.1, a.at[mode].add(side * step)) for side in (1, -1)]
        np.testing.assert_allclose(slopes[1][mode], (moved[0] - moved[1]) / (2 * step), rtol=1e-4)


def test_fine_tuned_singular_values_against_integration():
    before, b = np.array([1.2, 0.3]), np.array([0.5, 2.0])
    for penalty in (0.0, 0.7, 20.0):
        ours = theory.fine_tuned_singular_values(before, b, 0.9, penalty)
        for s, target, value in zip(before, b, ours):
            w0 = s**0.5
            exact = integrated(lambda _, w, t=target, w0=w0, p=penalty: w * (t - w**2) - p * (w - w0), w0, 0.9) ** 2
            np.testing.assert_allclose(value, exact, rtol=1e-7)


@pytest.mark.slow
def test_fine_tuning_in_steps_is_that_of_the_matrices():
    target = jax.random.normal(jax.random.key(0), (3, 2))
    U, a, Vt = jnp.linalg.svd(target, full_matrices=False)
    b = a * jnp.array([1.5, 0.5])
    task, time = U * b @ Vt, jnp.array([0.5, 1.5, 4.0])
    start = network.gradient_flow(network.aligned_network(target, 0.01, hidden_size=4), target, time)
    after = network.descend(start, task, network.constant(0.6 / 7, 7), penalty=0.4)
    ours = theory.fine_tuning(0.01, a, b, time, 0.6, penalty=0.4, steps=7)
    for weights, losses in ((start, ours.before), (after, ours.after)):
        np.testing.assert_allclose(losses.pretrain, network.loss(weights, target), atol=1e-5)
        np.testing.assert_allclose(losses.finetune, network.loss(weights, task), atol=1e-5)
    np.testing.assert_allclose(ours.degradation, ours.after.pretrain - ours.before.pretrain)
    flow = theory.fine_tuning(0.01, a, b, time, 0.6, penalty=0.4)
    steps = theory.fine_tuning(0.01, a, b, time, 0.6, penalty=0.4, steps=20_000)
    np.testing.assert_allclose(flow.after.finetune, steps.after.finetune, rtol=1e-3)
    assert float(jnp.abs(flow.after.finetune - ours.after.finetune).max()) > 1e-3


def test_fine_tuning_inflection_on_both_sides():
    a, b = np.ones(3), np.array([1.5, 1.0, 0.5])
    times = np.linspace(0, 15, 15_001)
    losses = np.asarray([theory.fine_tuning(0.01, [1.0], [target], times, 0.7).after.pretrain for target in b])
    ours = np.asarray(theory.fine_tuning_inflection_times(0.01, a, b, 0.7))
    assert np.isfinite(ours).tolist() == [True, False, False]
    assert abs(times[losses[0].argmin()] - ours[0]) < 2e-3
    assert losses[0, -1] > losses[0].min() + 0.01
    assert (np.diff(losses[1:]) <= 1e-15).all()
    # Larger learning rate, that is longer fine-tuning time: earlier; long enough to overshoot from the start: at once.
    stretched = np.asarray(theory.fine_tuning_inflection_times(0.01, [1.0], [1.5], [0.0, 0.2, 0.7, 1.5, 3.0]))[:, 0]
    assert stretched[0] == np.inf
    assert (np.diff(stretched[1:4]) < 0).all()
    assert stretched[4] == 0


def test_degradation_grows_with_pretraining_and_with_the_rate_but_not_without_exception():
    times, rates = np.linspace(0, 12, 241), np.array([0.1, 0.4, 1.0])[:, None]
    degradation = np.asarray(theory.fine_tuning(1e-3, [1.0], [0.5], times, rates).degradation)
    assert (degradation[:, -1] > degradation[:, 0] + 1e-3).all()
    assert (np.diff(degradation[:, -1]) > 0).all()
    # A feature that is shrunk is a little less degraded once it is learned to the end: with b < a the slope in s at
    # s = a is −(a − φ(a))φ'(a) < 0. One that is stretched has no such peak.
    assert (degradation.max(axis=1) > degradation[:, -1] + 1e-4).all()
    stretched = np.asarray(theory.fine_tuning(1e-3, [1.0], [1.5], times, 1.0).degradation)
    assert stretched.argmax() > 200


B3 = np.array([[0.5, 0.3, -0.2], [0.1, 0.6, 0.4], [-0.3, 0.2, 0.1]])


@pytest.mark.slow
@pytest.mark.numerical
def test_late_slope_is_the_difference_of_losses(rtol):
    """Between features a little larger and a little smaller, fine-tuned in closed form; the claims integrate."""
    step, A = 0.02, np.diag(A3)
    for penalty in (0.0, 0.8):
        losses = [
            [
                np.sum((theory.fine_tuned_product(A3 + side * unit, A3, B3, 0.7, penalty) - A) ** 2) / 2
                for unit in step * np.eye(3)
            ]
            for side in (2, 1, -1, -2)
        ]
        slopes = (8 * (np.array(losses[1]) - losses[2]) - losses[0] + losses[3]) / (12 * step)
        np.testing.assert_allclose(
            theory.late_slope(A3, B3, 0.7, penalty), slopes, rtol=1e-4, atol=max(1e-6, 30 * rtol)
        )


@pytest.mark.slow
def test_late_slope_does_not_depend_on_the_basis():
    """Matrices of any shape, rows and columns of B outside the singular vectors of A included."""
    generator = np.random.default_rng(0)
    U, V = (np.linalg.qr(generator.standard_normal((n, n)))[0] for n in (5, 4))
    A, B = np.zeros((5, 4)), 0.4 * generator.standard_normal((5, 4))
    A[range(4), range(4)] = [2.0, 1.0, 0.5, 0.2]
    for function in (theory.late_slope, theory.second_order_slope, theory.learning_jumps):
        np.testing.assert_allclose(function(U @ A @ V.T, U @ B @ V.T, 0.3), function(A, B, 0.3), rtol=1e-9)
    square = np.zeros((5, 5))  # with a column more, the fifth feature is absent
    square[:, :4], a = B, np.array([2.0, 1.0, 0.5, 0.2, 0.0])
    for function in (theory.late_slope, theory.second_order_slope):
        np.testing.assert_allclose(function(a, square, 0.3)[:4], function(A, B, 0.3), rtol=1e-9)
    np.testing.assert_allclose(theory.critical_time(a, square)[:4], theory.critical_time(A, B), rtol=1e-9)


@pytest.mark.slow
def test_equal_and_absent_features():
    R = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    a = np.array([1.0, 1.0, 0.3])
    for function in (theory.late_slope, theory.learning_jumps):
        in_their_basis, of_matrices = function(a, B3, 0.5), function(R * a @ R.T, R @ B3 @ R.T, 0.5)
        np.testing.assert_allclose(of_matrices, [*[in_their_basis[:2].mean()] * 2, in_their_basis[2]], rtol=1e-9)
    rank_one = np.diag([1.0, 0.0, 0.0])
    assert np.isnan(theory.late_slope(rank_one, B3, 0.5)).tolist() == [False, True, True]
    assert np.isnan(theory.critical_time(rank_one, B3)).tolist() == [False, True, True]
    small = theory.late_slope([1.0, 1e-9], B3[:2, :2], 0.5), theory.late_slope([1.0, 0.0], B3[:2, :2], 0.5)
    np.testing.assert_allclose(*small, rtol=1e-6)
    held = [theory.late_slope([1.0, 0.0], B3[:2, :2], 0.5, penalty) for penalty in (0.0, 1e-9)]
    np.testing.assert_allclose(*held, rtol=1e-6)


def test_critical_time_on_both_sides_of_its_conditions():
    """Stretched: at once; kept, with another mixed in: at once, without: never; shrunk with nothing else: never."""
    A, turned = np.diag(A3), np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))[0]
    mixed = A + 0.1 * (np.ones((3, 3)) - np.eye(3))
    for B, expected in ((1.5 * A, 0.0), (mixed, 0.0), (A, np.inf), (0.5 * A, np.inf), (0 * A, np.inf)):
        np.testing.assert_array_equal(theory.critical_time(A3, B), expected)
        np.testing.assert_array_equal(theory.critical_time(turned @ A, turned @ B), expected)
    free, held = theory.critical_time(A3, 0.95 * mixed), theory.critical_time(A3, 0.95 * mixed, [0.0, 1.0, 100.0])
    np.testing.assert_allclose(held[0], free)
    np.testing.assert_allclose((1 - np.exp(-held[1])), free)
    assert (held[1] > free).all()
    assert np.isinf(held[2]).all()
    # the exact slope changes its sign nearby, and not for a task that only shrinks
    signs = [
        np.sign(theory.late_slope(A3, 0.99 * mixed, factor * theory.critical_time(A3, 0.99 * mixed)[2])[2])
        for factor in (0.5, 2)
    ]
    assert signs == [-1, 1]
    assert (theory.late_slope(A3, 0.5 * A, [0.1, 1.0, 10.0]) <= 0).all()


def test_long_fine_tuning_keeps_its_relative_precision():
    """Thousands of times: the slopes decay with the slowest feature of B, as the flow linearised at its end says."""
    a, b = np.array([1.0, 0.5]), np.array([[0.8, 0.1], [0.1, 0.4]])
    early, late = theory.late_slope(a, b, [60.0, 70.0])
    rate = 2 * np.linalg.svd(b)[1].min()
    np.testing.assert_allclose(late / early, np.exp(-10 * rate), rtol=1e-6)
    assert np.isfinite(theory.late_slope(a, b, 5000.0)).all()
    with pytest.raises(ValueError, match="time must be at most"):
        theory.late_slope(a, b, 1e9)


def late(function, penalty, B, time=0.7, a=A3):
    return function(jnp.asarray(a), B, time, penalty)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_misaligned_quantities_transform(penalty):
    step, way = 1e-6, np.array([[0.3, -0.1, 0.5], [0.2, 0.4, -0.6], [0.1, 0.2, 0.3]])
    stack = jnp.stack([B3, 2 * B3])
    for function in (theory.late_slope, theory.second_order_slope, theory.learning_jumps):
        one = partial(late, function, penalty)
        np.testing.assert_allclose(jax.jit(one)(B3), one(B3), rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(one)(stack), one(stack), rtol=1e-6)
        slope = jax.grad(lambda *args, one=one: jnp.sum(one(*args)))(jnp.asarray(B3))
        moved = [jnp.sum(one(B3 + side * step * way)) for side in (1, -1)]
        np.testing.assert_allclose(jnp.sum(slope * way), (moved[0] - moved[1]) / (2 * step), rtol=1e-5)
        assert np.isfinite(jax.grad(lambda a, one=one: jnp.sum(one(B3, 0.7, a)))(jnp.asarray(A3))).all()
        assert one(jnp.asarray(B3, jnp.float32), jnp.float32(0.7), jnp.asarray(A3, jnp.float32)).dtype == jnp.float32
    assert np.isfinite(jax.grad(lambda B: theory.late_slope(A3, B, 1.0)[2])(jnp.zeros((3, 3)))).all()


def test_the_rotated_task_overtrains():
    """A = diag(1, .1), turned by .5 on both sides, T = 1: the loss climbs from t = 20 to t = 120."""
    angle = 0.5
    R = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    a, s = np.array([1.0, 0.1]), theory.singular_values(1e-3, [1.0, 0.1], [20.0, 120.0])
    for B, ends in ((R * a @ R.T, (0.0727, 0.0788)), (R * a @ R, (0.1095, 0.1127))):
        losses = np.sum((theory.fine_tuned_product(s, a, B, 1.0) - np.diag(a)) ** 2, axis=(1, 2)) / 2
        np.testing.assert_allclose(losses, ends, atol=1e-4)
        assert theory.late_slope(a, B, 1.0)[1] > 0


@pytest.mark.slow
def test_jumps_tell_visible_overtraining():
    """Among random tasks and short times the sign of the jump is that of the loss with and without the feature."""
    generator, a = np.random.default_rng(3), np.array([1.0, 0.5, 0.05])
    B = 0.7 * generator.standard_normal((200, 3, 3))
    jumps = np.asarray(theory.learning_jumps(a, B, 0.15))
    losses = [
        np.sum((theory.fine_tuned_product(a * there, a, B, 0.15) - np.diag(a)) ** 2, axis=(1, 2)) / 2
        for there in np.tri(4, 3, -1)
    ]
    agree = np.sign(jumps) == np.sign(np.diff(np.array(losses), axis=0).T)
    assert agree.mean() > 0.93
    assert 0.1 < (jumps[:, 2] > 0).mean() < 0.9


@pytest.fixture(scope="module")
def kinds():
    target = sims.sample_target(jax.random.key(0), 4)
    times = np.concatenate([[0.0], np.geomspace(0.5, 80, 14)])
    checkpoints = sims.pretrain(target, times, initial=1e-3, step_size=0.05)
    tasks = sims.sample_kinds(jax.random.key(1), target, 12)
    return (
        target,
        tasks,
        sims.late_rises(checkpoints, target, tasks, finetune_times=np.array([0.1, 1.0]), step_size=0.02),
    )


@pytest.mark.slow
def test_kinds_of_task_are_what_they_say(kinds):
    target, tasks, _ = kinds
    U, a, Vt = np.linalg.svd(target)
    inside = {name: U.T @ np.asarray(stack) @ Vt.T for name, stack in tasks.items()}
    off = {name: abs(matrices - matrices * np.eye(4)).max() for name, matrices in inside.items()}
    assert all(
        (off[name] < 1e-12) == (name in ("shared", "stretched", "shrunk", "removed", "permuted")) for name in off
    )
    diagonals = {name: np.diagonal(matrices, axis1=1, axis2=2) for name, matrices in inside.items()}
    for name, factor in (("stretched", 1.5), ("shrunk", 0.5), ("A + other", 1.0), ("orthogonal", 0.0)):
        np.testing.assert_allclose(diagonals[name], np.tile(factor * a, (12, 1)), atol=1e-12)
    for name in ("permuted", "R A Rᵀ", "sides"):
        values = np.linalg.svd(np.asarray(tasks[name]))[1]
        np.testing.assert_allclose(values, np.tile(a, (12, 1)), rtol=1e-9)
    np.testing.assert_allclose(inside["R A Rᵀ"], inside["R A Rᵀ"].swapaxes(1, 2), atol=1e-12)
    assert abs(inside["sides"] - inside["sides"].swapaxes(1, 2)).max() > 0.01


@pytest.mark.slow
def test_which_kinds_overtrain(kinds):
    late = kinds[2].isel(finetune_time=1)
    for never in ("shrunk", "removed"):
        assert float(late.share.sel(task=never)) == float(late.predicted.sel(task=never)) == 0
    for often in ("random", "A + other", "stretched"):
        assert float(late.share.sel(task=often)) >= 0.5
        assert float(late.predicted.sel(task=often)) > 0.7
    assert float(late.rise.sel(task="random")) > 10 * float(late.rise.sel(task="sides"))
    assert float(late.predicted.sel(task="sides")) > 0.5  # it rises, hardly visibly


def test_tuned_rates_and_the_mechanism():
    times = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    rates = 0.3 / times  # the best of a made-up table; sensitivity grows like t
    grid = np.geomspace(0.01, 0.5, 300)
    finetune = (np.log(grid)[:, None] - np.log(rates)) ** 2
    dims = ("task", "step_size", "time")
    data = xr.Dataset(
        {"finetune": (dims, finetune[None]), "pretrain": (dims, (1 + grid[:, None] ** 2 * times)[None])}
        | {"spread": (dims, np.tile(times, (1, 300, 1))), "pretrain_before": ("time", np.ones(5))},
        {"task": ["made up"], "step_size": grid, "time": times},
    )
    best = sims.optimal_rates(data).sel(task="made up")
    np.testing.assert_allclose(best.trend, -1, atol=0.02)
    np.testing.assert_allclose(best.growth, -np.log(2), atol=0.05)  # 2Δlog η + Δlog S = −2 log 2 + log 2
    np.testing.assert_allclose(best.degrades, best.growth, atol=1e-9)
    assert (best.rises < 0).all()


@pytest.mark.parametrize("imbalance", [0.0, 0.5])
def test_trained_singular_values_follow_the_closed_form(imbalance):
    target, times = sims.sample_target(jax.random.key(0), 3), np.linspace(0, 6, 13)
    data = sims.learning_curves(target, times, initial=0.02, step_sizes=[4e-3, 2e-3], imbalance=imbalance)
    assert 1e-4 < data.error[1] < 3e-3
    np.testing.assert_allclose(data.error[0] / data.error[1], 2, rtol=0.02)
    assert float(data.measured.sel(mode=1).isel(time=-1, step_size=0)) > 0.99
    balanced = theory.singular_values(0.02, jnp.linalg.svd(target, compute_uv=False), times)
    assert float(abs(data.exact - np.asarray(balanced)).max()) > 0.05 or imbalance == 0


@pytest.mark.slow
def test_simulated_perturbed_loss_and_its_inflection(seed):
    target, times = sims.sample_target(jax.random.key(1), 4), np.linspace(0, 12, 61)
    gammas, key = np.array([0.1, 0.2, 0.3]), jax.random.key(seed)
    data = sims.perturbed_losses(key, target, times, gammas, initial=1e-3, step_size=0.01, replicas=128)
    assert 0.05 < float(abs(data.perturbed_z).max()) < 4.5
    # N3 within the resolution of the checkpoints, as far as 128 perturbations let one see the bottom of a flat valley
    for gamma in (0.2, 0.3):
        at = data.sel(gamma=gamma)
        near = at.perturbed.interp(time=float(at.inflection_flow))
        assert float(near - at.perturbed.min()) < 4 * float(at.perturbed_error.sel(time=float(at.inflection)))
        assert abs(float(at.perturbed_expected.idxmin("time") - at.inflection_flow)) <= 0.2


@pytest.fixture(scope="module")
def sweep():
    target = sims.sample_target(jax.random.key(3), 6)
    times = np.rint(np.concatenate([[0.0], np.geomspace(0.5, 40, 14)]) / 0.05) * 0.05
    checkpoints = sims.pretrain(target, times, initial=1e-3, step_size=0.05)
    tasks = sims.sample_tasks(jax.random.key(4), target, 4)
    settings = {"step_sizes": np.array([0.004, 0.008, 0.016, 3.0]), "penalties": np.array([0.0, 1.0]), "steps": 100}
    return target, times, sims.fine_tuned_losses(checkpoints, times, target, tasks, **settings).isel(schedule=0)


def test_fine_tuned_modes_follow_the_closed_recursion(sweep):
    target, times, data = sweep
    a = jnp.linalg.svd(target, compute_uv=False)
    exact = theory.fine_tuning(1e-3, a, 1.5 * a, times, 1.6, steps=100)
    measured = data.sel(task="stretched", penalty=0.0, step_size=0.016)
    # what is left is the finite step of pretraining
    np.testing.assert_allclose(measured.pretrain, exact.after.pretrain, atol=0.02)
    np.testing.assert_allclose(measured.finetune, exact.after.finetune, atol=0.05)
    assert float(measured.pretrain_error.max()) < 1e-12


def test_fine_tuning_under_every_schedule_equals_a_numpy_loop():
    target = sims.sample_target(jax.random.key(3), 4)
    times = np.array([2.0, 10.0])
    checkpoints = sims.pretrain(target, times, initial=1e-2, step_size=0.05)
    tasks = {"unrelated": jnp.stack([sims.sample_unrelated_task(jax.random.key(i), target, 0.3) for i in range(2)])}
    settings = {"step_sizes": np.array([0.03]), "penalties": np.array([0.5]), "steps": 20}
    schedules = tuple(sims.SCHEDULES)
    data = sims.fine_tuned_losses(checkpoints, times, target, tasks, schedules=schedules, **settings)
    for schedule in schedules:
        rates = np.asarray(sims.SCHEDULES[schedule](0.03, 20))
        for index, time in enumerate(times):
            losses = []
            for task in np.asarray(tasks["unrelated"]):
                start = [layer[index] for layer in checkpoints]
                w1, w2 = numpy_descent(start, lambda W, task=task: W - task, rates, penalty=0.5)[-1]
                losses.append([np.sum((w1 @ w2 - goal) ** 2) / 2 for goal in (target, task)])
            at = data.sel(task="unrelated", schedule=schedule, penalty=0.5, step_size=0.03, time=time)
            np.testing.assert_allclose([at.pretrain, at.finetune], np.mean(losses, axis=0), rtol=1e-10)
    assert len(np.unique(data.finetune.values.round(6))) == len(schedules) * len(times)


def test_catastrophic_overtraining_where_it_is_and_where_it_is_not(sweep):
    data = sweep[2].sel(step_size=[0.004, 0.008, 0.016])
    plain, held = data.sel(penalty=0.0), data.sel(penalty=1.0)
    turns = sims.inflection(plain.pretrain)
    unrelated = turns.sel(task="unrelated").values
    assert np.isfinite(unrelated[1:]).all()
    assert unrelated[0] > unrelated[1] > unrelated[2]
    assert np.isinf(turns.sel(task="rotated")).all()
    # the penalty delays it, and costs fine-tuning loss
    assert sims.inflection(held.pretrain).sel(task="unrelated")[2] > unrelated[2]
    assert (held.finetune >= plain.finetune - 1e-12).all()


def test_the_final_loss_climbs_beyond_its_standard_error():
    target = sims.sample_target(jax.random.key(3), 6)
    checkpoints = sims.pretrain(target, np.array([4.0, 40.0]), initial=1e-3, step_size=0.05)
    tasks = jnp.stack([sims.sample_unrelated_task(jax.random.key(seed), target, 0.3) for seed in range(40)])[:, None]
    after = network.loss(network.descend(checkpoints, tasks, network.constant(0.016, 100)), target)  # (draws, 2)
    climb, before = np.asarray(after[:, 1] - after[:, 0]), network.loss(checkpoints, target)
    assert climb.mean() > 4 * climb.std(ddof=1) / 40**0.5
    assert before[1] < 0.01 * before[0]


def test_rates_that_overflow_are_infinite_and_never_chosen(sweep):
    data = sweep[2]
    assert np.isinf(data.pretrain.sel(step_size=3.0, task="unrelated", penalty=0.0)).any()
    assert not np.isnan(data.pretrain).any()
    chosen = sims.tuned(data)
    assert float(chosen.step_size.max()) <= 0.016
    np.testing.assert_allclose(chosen.finetune, data.finetune.min("step_size"))


def test_inflection_needs_a_real_rise():
    curve = xr.DataArray([3.0, 1.0, 1.005], dims="time", coords={"time": [0.0, 1.0, 2.0]})
    assert float(sims.inflection(curve)) == np.inf
    assert float(sims.inflection(curve, rise=0.001)) == 1.0


def test_tasks():
    target = sims.sample_target(jax.random.key(0), 5, exponent=2.0)
    np.testing.assert_allclose(jnp.linalg.svd(target)[1], np.arange(1.0, 6) ** -2, rtol=1e-10)
    turned = sims.sample_rotated_task(jax.random.key(1), target, 0.6)
    np.testing.assert_allclose(jnp.linalg.svd(turned)[1], np.arange(1.0, 6) ** -2, rtol=1e-10)
    np.testing.assert_allclose(sims.sample_rotated_task(jax.random.key(1), target, 0.0), target, atol=1e-14)
    leading = [np.linalg.svd(matrix)[0][:, :2] for matrix in (target, turned)]
    assert 0.05 < scipy.linalg.subspace_angles(*leading)[0] <= 0.6 + 1e-9


@pytest.mark.slow
def test_token_stream_is_fresh_and_does_not_depend_on_the_batch_of_seeds():
    target = sims.sample_target(jax.random.key(0), 3)
    start = network.sample_network(jax.random.key(1), (3, 3, 3), 0.1, replicas=(3,))
    settings = {"batch": 4, "noise_std": 0.2}
    rates, save = network.constant(0.05, 30), np.array([10, 30])
    three = sims.pretrain_on_tokens(jax.random.key(2), target, start, rates, save, **settings)
    two = sims.pretrain_on_tokens(jax.random.key(2), target, jax.tree.map(lambda w: w[:2], start), rates, **settings)
    np.testing.assert_allclose(three.w1[1, :2], two.w1, rtol=1e-12)
    stream = training._TokenStream(jax.random.split(jax.random.key(0), 1), target, jnp.asarray(0.0), 4)
    first, second = stream(jnp.asarray(0)), stream(jnp.asarray(1))
    assert float(jnp.abs(first.covariance - second.covariance).max()) > 0.1
    np.testing.assert_allclose(first.cross, target @ first.covariance, atol=1e-12)


@pytest.mark.slow
def test_sensitivity_grows_with_the_token_budget():
    target = sims.sample_target(jax.random.key(0), 6)
    budgets = np.array([200, 1600, 4000, 16000])
    settings = {"batch": 8, "step_size": 0.05, "noise_std": 0.3, "scale": 0.01, "replicas": 6}
    gammas, schedules = np.array([0.0, 0.2]), ("constant", "cosine")
    data = sims.token_budgets(jax.random.key(1), target, budgets, gammas, schedules=schedules, **settings)
    np.testing.assert_allclose(data.perturbed.sel(gamma=0.0), data.loss)
    rise = data.perturbed.sel(gamma=0.2) - data.loss
    assert bool((rise.diff("budget") > 0).all())
    last = data.loss.isel(budget=-1)
    assert float(last.sel(schedule="cosine")) < float(last.sel(schedule="constant"))
    assert float(data.loss_error.max()) > 0


@pytest.mark.slow
def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian():
    weights = network.sample_network(jax.random.key(0), (3, 4, 2), 0.7, replicas=(2,))
    target = jax.random.normal(jax.random.key(1), (3, 2))
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda w: w[1], weights))
    hessian = jax.hessian(lambda x: network.loss(unravel(x), target))(flat)
    np.testing.assert_allclose(sims.sharpness(weights, target)[1], np.linalg.eigvalsh(hessian)[-1], rtol=1e-8)
    # at a minimum w₁² + w₂² of the first mode
    imbalances, s = np.array([0.0, 1.5]), jnp.linalg.svd(target, compute_uv=False)
    minima = [network.aligned_network(target, s, imbalance, hidden_size=4) for imbalance in imbalances]
    minima = jax.tree.map(lambda *layers: jnp.stack(layers), *minima)
    np.testing.assert_allclose(sims.sharpness(minima, target), np.hypot(imbalances, 2 * s[0]), rtol=1e-6)


@pytest.mark.slow
def test_matched_forgetting_reads_the_path():
    target = jnp.diag(jnp.array([1.0, 0.5]))
    task = 1.5 * target
    ready = jax.tree.map(lambda w: w[None], network.aligned_network(target, jnp.array([1.0, 0.5])))
    forgetting, angle = sims.matched_forgetting(ready, target, task, level=0.01, step_size=0.01, steps=400, saves=401)
    times = np.linspace(0, 4, 40_001)
    curve = theory.fine_tuned_singular_values([1.0, 0.5], [1.5, 0.75], times)
    at = int(np.argmax(np.sum((curve - np.array([1.5, 0.75])) ** 2, axis=1) / 2 <= 0.01))
    np.testing.assert_allclose(forgetting, np.sum((curve[at] - np.array([1.0, 0.5])) ** 2) / 2, rtol=0.02)
    np.testing.assert_allclose(angle, 0, atol=1e-6)
    other = jnp.diag(jnp.array([0.5, 1.5]))  # the second feature ends as the leading one
    _, angle = sims.matched_forgetting(ready, target, other, level=0.01, step_size=0.01, steps=400)
    np.testing.assert_allclose(angle, np.pi / 2, rtol=1e-6)
    missed, _ = sims.matched_forgetting(ready, target, task, level=1e-9, step_size=0.01, steps=20)
    assert np.isnan(missed).all()


@pytest.mark.slow
def test_decaying_rates_leave_sharper_checkpoints_that_forget_more():
    target = sims.sample_target(jax.random.key(0), 8)
    task = target + sims.sample_unrelated_task(jax.random.key(1), target, 0.06)
    data = sims.sharpness_and_forgetting(
        jax.random.key(2), target, task, step_sizes=np.array([0.05, 0.2]), steps=3000, batch=8, noise_std=0.3,
        scales=(0.4, 0.01), replicas=8, level=0.05, finetune_step_size=0.02, finetune_steps=2000,
        schedules=("constant", "cosine"),
    )  # fmt: skip
    gap = data.sel(schedule="cosine") - data.sel(schedule="constant")
    for name in ("sharpness", "forgetting"):
        paired = gap[name].sel(step_size=0.05)
        assert float(paired.mean()) > 3 * float(paired.std(ddof=1)) / 8**0.5
    # at a large rate gradient noise has balanced the layers in time, decay or not
    assert float(data.sharpness.sel(step_size=0.2, schedule="cosine").mean()) < 2.1


SHAPE, NAN = (3, 3, 3), float("nan")
BAD = {
    "initial negative": (theory.singular_values, (-0.1, [1.0], 1.0), "initial"),
    "target nan": (theory.singular_values, (0.1, [NAN], 1.0), "target"),
    "time negative": (theory.singular_values, (0.1, [1.0], -1.0), "time"),
    "target zero": (theory.learning_time, (0.1, 0.0, 0.5), "target"),
    "level nan": (theory.learning_time, (0.1, 1.0, NAN), "level"),
    "w1 vector": (theory.gaussian_sensitivity, (np.ones(2), np.ones((2, 2)), 0.1), "w1 and w2"),
    "chain": (theory.gaussian_sensitivity, (np.ones((2, 3)), np.ones((2, 3)), 0.1), "w2"),
    "gamma": (theory.gaussian_sensitivity, (np.ones((2, 2)), np.ones((2, 2)), -0.1), "gamma"),
    "gamma_2": (theory.gaussian_sensitivity, (np.ones((2, 2)), np.ones((2, 2)), 0.1, -1.0), "gamma_2"),
    "shape": (theory.perturbed_loss, (0.1, [1.0], 1.0, 0.1, 3), "shape"),
    "shape zero": (theory.perturbed_loss, (0.1, [1.0], 1.0, 0.1, (3, 0, 3)), "shape"),
    "imbalance": (theory.perturbed_loss, (0.1, [1.0], 1.0, 0.1, SHAPE, [1.0, 2.0]), "imbalance"),
    "start above": (theory.inflection_time, (2.0, [1.0], 0.1, SHAPE), "initial"),
    "start zero": (theory.inflection_time, (0.0, [1.0], 0.1, SHAPE), "initial"),
    "modes": (theory.mode_inflection_times, ([0.1, 0.2, 0.3], [1.0, 2.0], 0.1, SHAPE), "initial"),
    "steps": (theory.fine_tuned_singular_values, ([1.0], [2.0], 1.0, 0.0, 0), "steps"),
    "penalty": (theory.fine_tuned_singular_values, ([1.0], [2.0], 1.0, -1.0), "penalty"),
    "pretrain target": (theory.fine_tuning, (0.1, [NAN], [1.0], 1.0, 1.0), "pretrain_target"),
    "late target": (theory.late_slope, (1.0, 1.0, 1.0), "target"),
    "late negative": (theory.late_slope, ([-1.0], [[1.0]], 1.0), "target"),
    "late shape": (theory.late_slope, ([1.0, 0.5], np.eye(3), 1.0), "finetune_target"),
    "late matrices": (theory.critical_time, (np.ones((2, 3)), np.eye(2)), "finetune_target"),
    "late time": (theory.late_slope, ([1.0], [[1.0]], -1.0), "time"),
    "late penalty": (theory.second_order_slope, ([1.0], [[1.0]], 1.0, -1.0), "penalty"),
    "product modes": (theory.fine_tuned_product, ([1.0, 1.0], [1.0], [[1.0]], 1.0), "singular_values"),
    "finetune target": (theory.fine_tuning_inflection_times, (0.1, [1.0, 2.0], [1.0], 1.0), "finetune_target"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    function, arguments, expected = BAD[name]
    with pytest.raises(ValueError, match=expected):
        function(*arguments)
