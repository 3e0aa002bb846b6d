"""Two-layer networks against plain numpy loops, scipy's integrator, automatic differentiation and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from linfit import network
from linfit.network import TwoLayer
from tests.oracles import numpy_descent

SHAPES = {"wide hidden": (3, 4, 2), "bottleneck": (5, 2, 4)}


def random_network(seed: int, shape: tuple[int, int, int], scale: float = 0.5) -> TwoLayer:
    return network.sample_network(jax.random.key(seed), shape, scale, 1.3 * scale)


def random_target(seed: int, shape: tuple[int, int, int]) -> jax.Array:
    return jax.random.normal(jax.random.key(100 + seed), (shape[0], shape[2]))


def random_data(seed: int, shape: tuple[int, int, int], n: int = 9):
    X_key, Y_key = jax.random.split(jax.random.key(200 + seed))
    return jax.random.normal(X_key, (n, shape[2])), jax.random.normal(Y_key, (n, shape[0]))


def objectives(shape):
    """(objective, the same loss as a plain function of W)."""
    A, (X, Y) = random_target(0, shape), random_data(0, shape)
    return {
        "target": (network.target_objective(A), lambda W: jnp.sum((W - A) ** 2) / 2),
        "data": (network.data_objective(X, Y), lambda W: jnp.sum((X @ W.T - Y) ** 2) / (2 * len(X))),
    }


@pytest.mark.numerical
@pytest.mark.parametrize("kind", ["target", "data"])
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradient(name, kind, rtol):
    shape = SHAPES[name]
    weights = random_network(1, shape)
    objective, plain = objectives(shape)[kind]
    np.testing.assert_allclose(network.loss(weights, objective), plain(weights.w1 @ weights.w2), rtol=rtol)
    automatic = jax.grad(lambda now: plain(now.w1 @ now.w2))(weights)
    for ours, theirs in zip(network.gradient(weights, objective), automatic):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)


@pytest.mark.numerical
@pytest.mark.parametrize("penalty", [0.0, 0.7])
@pytest.mark.parametrize("name", SHAPES)
def test_descent_is_the_plain_loop(name, penalty, rtol):
    shape = SHAPES[name]
    start, reference = random_network(2, shape), random_network(3, shape)
    X, Y = random_data(1, shape)
    C, M = np.asarray(X.T @ X) / len(X), np.asarray(Y.T @ X) / len(X)
    rates = network.warmup_stable_decay(0.05, 12, 0.3, 0.4)
    objective, steps = network.data_objective(X, Y), [0, 5, 5, 12]
    saved = network.descend(start, objective, rates, steps, penalty=penalty, reference=reference)
    plain = numpy_descent(start, lambda W: W @ C - M, np.asarray(rates), penalty, reference)
    for index, step in enumerate(steps):
        for ours, theirs in zip(saved, plain[step]):
            np.testing.assert_allclose(ours[index], theirs, rtol=rtol, atol=rtol)


def test_replicas_and_hyperparameters_broadcast():
    shape = (3, 4, 2)
    starts = network.sample_network(jax.random.key(0), shape, 0.4, replicas=(5,))
    targets = jax.random.normal(jax.random.key(1), (5, 3, 2))
    rates = network.constant(jnp.array([0.02, 0.1]), 7)[:, None]  # (2, 1, 7)
    penalty = jnp.array([0.0, 1.0, 3.0])[:, None, None]
    together = network.descend(starts, targets, rates, penalty=penalty)
    assert together.w1.shape == (3, 2, 5, 3, 4)
    for p, r, i in ((0, 1, 4), (2, 0, 1)):
        start = jax.tree.map(lambda weights, i=i: weights[i], starts)
        alone = network.descend(start, targets[i], rates[r, 0], penalty=penalty[p, 0, 0])
        np.testing.assert_allclose(together.w2[p, r, i], alone.w2, rtol=1e-12)


def test_streaming_objective_is_asked_at_every_step():
    start, targets = random_network(4, (2, 3, 2)), jax.random.normal(jax.random.key(3), (6, 2, 2))
    rates = network.constant(0.1, 6)
    streamed = network.descend(start, lambda step: network.target_objective(targets[step]), rates)
    by_hand = start
    for target in targets:
        by_hand = network.descend(by_hand, target, rates[:1])
    np.testing.assert_allclose(streamed.product, by_hand.product, rtol=1e-12)


def test_memory_does_not_grow_with_steps_and_new_values_do_not_recompile():
    start, target = random_network(5, (30, 30, 30), 0.05), random_target(5, (30, 30, 30)) / 10

    def temporary_bytes(steps):
        arguments = start, network.target_objective(target), network.constant(0.1, steps), jnp.array([steps])
        compiled = network._descend.lower(*arguments, jnp.asarray(0.0), None).compile().compiled
        # the schedule itself is one number per step
        return compiled.memory_analysis().temp_size_in_bytes - 2 * 8 * steps

    assert temporary_bytes(20_000) <= temporary_bytes(20) + 4096
    traces = []

    def counted(step):
        traces.append(step)
        return network.target_objective(target)

    for rate, stops in ((0.1, [3, 9]), (0.2, [1, 7])):
        network.descend(start, counted, network.constant(rate, 9), stops)
    assert sum(isinstance(step, jax.core.Tracer) for step in traces) == 1


@pytest.mark.parametrize(("kind", "penalty"), [pytest.param("target", 0.0, marks=pytest.mark.slow), ("data", 0.6)])
def test_flow_against_scipy(kind, penalty):
    shape = (3, 4, 2)
    start, reference = random_network(6, shape), random_network(7, shape)
    objective, plain = objectives(shape)[kind]
    gradient = jax.jit(jax.grad(lambda now: plain(now.w1 @ now.w2)))

    def velocity(_, flat):
        now = TwoLayer(jnp.asarray(flat[:12].reshape(3, 4)), jnp.asarray(flat[12:].reshape(4, 2)))
        slope = jax.tree.map(lambda g, w, r: -g - penalty * (w - r), gradient(now), now, reference)
        return np.concatenate([np.ravel(part) for part in slope])

    flat = np.concatenate([np.ravel(part) for part in start])
    times = [0.0, 0.5, 3.0]
    exact = scipy.integrate.solve_ivp(velocity, (0, 3), flat, rtol=1e-10, atol=1e-12, t_eval=times).y.T
    ours = network.gradient_flow(start, objective, times, penalty=penalty, reference=reference)
    ours = np.concatenate([part.reshape(3, -1) for part in ours], axis=1)
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-7)


MODES = [(2.0, 1.0, 0.1), (2.0, 0.1, 0.1), (-1.5, 0.5, 0.9), (0.0, 0.5, 0.5), (0.0, 0.7, 0.2), (1e-9, 0.7, 0.7)]


@pytest.mark.parametrize(("a", "w1", "w2"), [*MODES, (2, -0.5, 0.3)])
def test_aligned_modes_against_scipy(a, w1, w2):
    def velocity(_, q):
        return [q[1] * (a - q[0] * q[1]), q[0] * (a - q[0] * q[1])]

    times = [0.0, 0.7, 3.0]
    exact = scipy.integrate.solve_ivp(velocity, (0, 3), [w1, w2], rtol=1e-12, atol=1e-14, t_eval=times).y
    ours = np.stack(network.aligned_modes([w1], [w2], [a], times))[..., 0]
    np.testing.assert_allclose(ours, exact, atol=1e-10)
    np.testing.assert_allclose(ours[0] ** 2 - ours[1] ** 2, w1**2 - w2**2, atol=1e-13)  # the conserved imbalance


@pytest.mark.slow
@pytest.mark.parametrize(("m", "h", "k", "imbalance"), [(3, 4, 2, 0.4), (2, 2, 3, -0.3)])
def test_aligned_network_follows_its_modes(m, h, k, imbalance):
    target = jax.random.normal(jax.random.key(0), (m, k))
    U, a, Vt = jnp.linalg.svd(target, full_matrices=False)
    initial = jnp.linspace(0.05, 0.01, a.size)
    start = network.aligned_network(target, initial, imbalance, hidden_size=h)
    np.testing.assert_allclose(start.product, U * initial @ Vt, atol=1e-14)
    assert start.w1.shape == (m, h)
    w1, w2 = network.aligned_modes(*network.layer_modes(initial, imbalance), a, [0.0, 1.0, 4.0])
    flow = network.gradient_flow(start, target, [0.0, 1.0, 4.0])
    np.testing.assert_allclose(flow.product, jnp.einsum("pi,ti,iq->tpq", U, w1 * w2, Vt), atol=1e-7)
    assert float(jnp.abs(flow.product[2] - target).max()) < 0.5 * float(jnp.abs(flow.product[0] - target).max())


def test_aligned_modes_reach_their_target_without_overflow():
    w1, w2 = network.aligned_modes(0.1, 0.1, [2.0, 1.0, -1.0], [1e6])
    np.testing.assert_allclose((w1 * w2)[0], [2.0, 1.0, 0.0], atol=1e-14)
    slope = jax.grad(lambda a: network.aligned_modes(jnp.array(0.5), jnp.array(0.5), a, 1.0)[0][0])(jnp.zeros(1))
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("imbalance", [0.0, 1e-3, 2.0, -2.0])
def test_layer_modes(imbalance):
    product = jnp.array([1e-12, 0.3, 5.0])
    w1, w2 = network.layer_modes(product, imbalance)
    np.testing.assert_allclose(w1 * w2, product, rtol=1e-12)
    np.testing.assert_allclose(w1**2 - w2**2, imbalance, atol=1e-12)


@pytest.mark.slow
def test_random_weights_have_the_stated_moments():
    start = network.sample_network(jax.random.key(0), (20, 30, 10), 0.2, 3.0)
    for weights, scale in zip(map(np.asarray, start), (0.2, 3.0)):
        assert abs(np.mean(weights**2) / scale**2 - 1) < 4 * (2 / weights.size) ** 0.5
        assert abs(weights.mean()) < 4 * scale / weights.size**0.5
    assert abs(np.corrcoef(np.ravel(start.w1)[:300], np.ravel(start.w2))[0, 1]) < 4 / 300**0.5
    base = TwoLayer(np.ones((20, 30)), np.full((30, 10), 2.0))
    noisy = network.perturb(jax.random.key(1), base, 0.1, 0.3)
    for weights, centre, scale in zip(noisy, base, (0.1, 0.3)):
        noise = np.asarray(weights) - np.asarray(centre)
        assert abs(np.mean(noise**2) / scale**2 - 1) < 4 * (2 / noise.size) ** 0.5
    unmoved = network.perturb(jax.random.key(1), base, 0.0)
    np.testing.assert_array_equal(unmoved.w1, base.w1)


def test_schedules():
    rates = np.asarray(network.cosine(0.4, 10, final=0.1))
    np.testing.assert_allclose(rates[[0, 5]], [0.4, 0.4 * (0.1 + 0.9 / 2)])
    assert (np.diff(rates) < 0).all()
    assert rates[-1] > 0.04
    rates = network.warmup_stable_decay(jnp.array([1.0, 2.0]), 20, 0.25, 0.5)
    assert rates.shape == (2, 20)
    np.testing.assert_allclose(rates[1, [0, 4, 9, 10, 19]], [0.4, 2.0, 2.0, 2.0, 0.2])
    np.testing.assert_allclose(network.warmup_stable_decay(1.0, 5, 0.0, 0.0), 1.0)


def test_overflow_is_reported_not_silent():
    start, target = random_network(9, (3, 3, 3), 1.0), random_target(9, (3, 3, 3))
    rates = network.constant(jnp.array([0.01, 50.0]), 60)
    with pytest.raises(ValueError, match="step_sizes must be smaller"):
        network.descend(start, target, rates)
    kept = network.descend(start, target, rates, throw=False)
    assert np.isfinite(kept.w1[0]).all()
    assert not np.isfinite(kept.w1[1]).all()


@pytest.mark.slow
def test_dtype_follows_the_weights():
    start = jax.tree.map(lambda weights: weights.astype(jnp.float32), random_network(0, (2, 2, 2)))
    target = jnp.eye(2, dtype=jnp.float32)
    assert network.descend(start, target, network.constant(0.1, 3)).w1.dtype == jnp.float32
    assert network.gradient_flow(start, target, jnp.array([1.0], jnp.float32), rtol=1e-4).w2.dtype == jnp.float32
    assert network.perturb(jax.random.key(0), start, 0.1).w1.dtype == jnp.float32


NET, TARGET, RATES = TwoLayer(np.ones((2, 3)), np.ones((3, 2))), np.eye(2), np.full(4, 0.1)
NAN = float("nan")
BAD = {
    "target vector": (network.target_objective, ([1.0],), "target"),
    "target nan": (network.target_objective, ([[NAN]],), "target"),
    "data rows": (network.data_objective, (np.ones((3, 2)), np.ones((4, 1))), "Y"),
    "data vector": (network.data_objective, (np.ones(3), np.ones((3, 1))), "X and Y"),
    "loss shape": (network.loss, (NET, np.eye(3)), "objective"),
    "loss not a network": (network.loss, (np.eye(2), np.eye(2)), "network"),
    "chain": (network.loss, (TwoLayer(np.ones((2, 3)), np.ones((2, 3))), TARGET), "network"),
    "initial shape": (network.aligned_network, (TARGET, [1.0, 2.0, 3.0]), "initial"),
    "initial negative": (network.aligned_network, (TARGET, -1.0), "initial"),
    "hidden": (network.aligned_network, (TARGET, 0.1, 0.0, 1), "hidden_size"),
    "sizes": (network.sample_network, (jax.random.key(0), (2, 0, 2), 0.1), "shape"),
    "scale": (network.sample_network, (jax.random.key(0), (2, 2, 2), -0.1), "scale"),
    "gamma": (network.perturb, (jax.random.key(0), NET, -0.1), "gamma"),
    "rate": (network.constant, (0.0, 5), "step_size"),
    "steps": (network.cosine, (0.1, 0), "steps"),
    "final": (network.cosine, (0.1, 5, 1.5), "final"),
    "fractions": (network.warmup_stable_decay, (0.1, 5, 0.7, 0.7), "warmup"),
    "rates number": (network.descend, (NET, TARGET, 0.1), "step_sizes"),
    "rates negative": (network.descend, (NET, TARGET, -RATES), "step_sizes"),
    "save late": (network.descend, (NET, TARGET, RATES, [5]), "save_at"),
    "save unsorted": (network.descend, (NET, TARGET, RATES, [3, 1]), "save_at"),
    "save float": (network.descend, (NET, TARGET, RATES, [0.5]), "save_at"),
    "times": (network.gradient_flow, (NET, TARGET, [2.0, 1.0]), "times"),
    "times negative": (network.gradient_flow, (NET, TARGET, [-1.0]), "times"),
    "modes": (network.aligned_modes, ([NAN], [1.0], [1.0], 1.0), "w1"),
    "modes time": (network.aligned_modes, ([1.0], [1.0], [1.0], -1.0), "time"),
    "penalty": (partial(network.descend, penalty=-1.0), (NET, TARGET, RATES), "penalty"),
    "axes": (network.descend, (NET, np.ones((3, 2, 2)), np.full((2, 4), 0.1)), "broadcast"),
    "reference": (partial(network.descend, penalty=1.0, reference=np.eye(2)), (NET, TARGET, RATES), "reference"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    function, arguments, expected = BAD[name]
    with pytest.raises(ValueError, match=expected):
        function(*arguments)
