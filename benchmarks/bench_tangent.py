"""The tangent kernel, and a whole prediction, as ratios to one gradient of the same fine-tuning batch.

The network is an MLP 64-256-256-10, the batch 120 samples: n·k = 1,200. The kernel is asked for in its two ways, dense
layers by their factors and generically, and as one product with a vector.
"""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.timing import median_seconds, sized
from linfit import predict
from linfit.tangent import kernel, kernel_product

WIDTHS, SAMPLES, HELD_OUT, PRODUCTS = sized(((64, 256, 256, 10), 120, 500, 50), ((6, 8, 8, 3), 8, 10, 5))


def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 9)
    params = [
        {"w": jax.random.normal(key, (a, b), jnp.float32) * (2 / a) ** 0.5, "b": jnp.zeros(b, jnp.float32)}
        for key, a, b in zip(keys, WIDTHS[:-1], WIDTHS[1:])
    ]
    sizes = (SAMPLES, HELD_OUT, HELD_OUT)
    data = [
        (jax.random.normal(x, (n, WIDTHS[0]), jnp.float32), jax.random.normal(y, (n, WIDTHS[-1]), jnp.float32))
        for x, y, n in zip(keys[3:6], keys[6:9], sizes)
    ]
    return params, data


@pytest.fixture
def baselines(case):
    """Measured anew beside every benchmark: the machine may be busier at one time than at another."""
    params, data = case
    gradient = jax.jit(jax.grad(lambda params, x, y: jnp.sum((apply(params, x) - y) ** 2)))
    return {"one gradient": median_seconds(lambda: jax.block_until_ready(gradient(params, *data[0])), 20)}


def ask(what, params, data):
    x = data[0][0]
    if what == "product":
        return kernel_product(apply, params, x)(data[0][1])
    if what.startswith("kernel"):
        return kernel(apply, params, x, structured="factors" in what)
    return predict(apply, params, *data, products=PRODUCTS if "products" in what else None).test.basis


@pytest.mark.parametrize(
    "what", ["product", "kernel by factors", "kernel, generic", "prediction, dense", "prediction, 50 products"]
)
def test_tangent(benchmark, case, baselines, what):
    params, data = case
    benchmark.extra_info["baselines"] = baselines
    benchmark.pedantic(lambda: jax.block_until_ready(ask(what, params, data)), rounds=3, warmup_rounds=1)
