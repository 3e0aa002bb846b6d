"""Training 64 two-layer networks side by side (m = h = k = 200), as a ratio to the matrix products it contains.

A step of one network is three products of 200 × 200 matrices: W₁W₂, (W − A)W₂ᵀ, W₁ᵀ(W − A). The cost is linear in the
steps, so 20 of the 10,000 are timed (10,000 are 3·10¹³ operations: five minutes at 100 GFLOP/s).
"""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.timing import median_seconds, sized
from linfit import network
from linfit.network import TwoLayer

REPLICAS, SIZE, STEPS, RATE = *sized((64, 200, 20), (4, 10, 3)), 0.01
WORKERS = min(2, os.cpu_count() or 1)


def shared(function, parts):
    """function over parts, one worker thread each."""
    with ThreadPoolExecutor(len(parts)) as workers:
        return list(workers.map(function, parts))


def numpy_products(weights):
    """The three products of every step and nothing else."""
    out = np.empty_like(weights[0][0])
    for w1, w2 in zip(*weights):
        for _ in range(STEPS):
            np.matmul(w1, w2, out=out)
            np.matmul(w1, w2.T, out=out)
            np.matmul(w1.T, w2, out=out)


def numpy_loop(weights, target):
    """Plain numpy, one network after the other, in place."""
    ended = []
    for w1, w2 in zip(*weights):
        w1, w2 = w1.copy(), w2.copy()
        for _ in range(STEPS):
            gap = w1 @ w2 - target
            slope_1, slope_2 = gap @ w2.T, w1.T @ gap
            w1 -= RATE * slope_1
            w2 -= RATE * slope_2
        ended.append((w1, w2))
    return ended


def numpy_stacked(weights, target):
    """Plain numpy, all networks in one array."""
    w1, w2 = weights[0].copy(), weights[1].copy()
    for _ in range(STEPS):
        gap = w1 @ w2 - target
        slope_1, slope_2 = gap @ w2.swapaxes(1, 2), w1.swapaxes(1, 2) @ gap
        w1 -= RATE * slope_1
        w2 -= RATE * slope_2
    return w1, w2


@pytest.fixture(scope="module", params=["float32", "float64"])
def case(request):
    dtype = jnp.dtype(request.param)
    scale = jnp.asarray(0.02, dtype)
    start = network.sample_network(jax.random.key(0), (SIZE, SIZE, SIZE), scale, replicas=(REPLICAS,))
    target = jax.random.normal(jax.random.key(1), (SIZE, SIZE), dtype) / SIZE**0.5
    host = [np.asarray(weights) for weights in start]
    parts = [[weights[index::WORKERS] for weights in host] for index in range(WORKERS)]
    return start, target, host, parts


@pytest.fixture
def baselines(case):
    """Measured anew beside every benchmark: the machine may be busier at one time than at another."""
    parts = case[-1]
    return {"3 GEMMs a step, two workers": median_seconds(lambda: shared(numpy_products, parts))}


@pytest.mark.parametrize("threads", [1, WORKERS])
def test_linfit(benchmark, case, baselines, threads):
    start, target, host, _ = case
    rates = network.constant(jnp.asarray(RATE, target.dtype), STEPS)
    parts = [jax.tree.map(lambda weights, i=i: weights[i::threads], start) for i in range(threads)]

    def run():
        return shared(lambda part: jax.block_until_ready(network.descend(part, target, rates)), parts)

    ended = run()
    expected = numpy_loop([weights[:1] for weights in host], np.asarray(target))[0]
    np.testing.assert_allclose(ended[0].w1[0], expected[0], rtol=1e-3, atol=1e-5)
    benchmark.extra_info["baselines"] = baselines
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("how", ["loop, two workers", "stacked"])
def test_numpy(benchmark, case, baselines, how):
    _, target, host, parts = case
    host_target = np.asarray(target)
    benchmark.extra_info["baselines"] = baselines
    if how == "stacked":
        benchmark.pedantic(lambda: numpy_stacked(host, host_target), rounds=5, warmup_rounds=1)
    else:
        benchmark.pedantic(lambda: shared(lambda part: numpy_loop(part, host_target), parts), rounds=5, warmup_rounds=1)


def test_memory_of_ten_thousand_steps():
    """Saved states only: the temporaries of 10,000 steps are those of 10, but for one rate per step."""
    start = TwoLayer(*(jnp.zeros((REPLICAS, SIZE, SIZE), jnp.float32),) * 2)
    target = network.target_objective(jnp.zeros((SIZE, SIZE), jnp.float32))

    def temporary_bytes(steps):
        rates, save = network.constant(jnp.float32(RATE), steps), jnp.array([steps])
        compiled = network._descend.lower(start, target, rates, save, jnp.float32(0), None).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(10_000) - temporary_bytes(10) < 16 * 10_000
