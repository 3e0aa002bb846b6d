"""Tests run in float64; `--float32` runs the numerical suite in single precision, with its own tolerances."""

import os
from pathlib import Path

# Several processes share the cores (-n auto): two BLAS threads each fight for them. Read when numpy and scipy load.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# What one process has compiled, the others load: workers of pytest and of sweeps, commands, the next run. Read by JAX.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import psutil
import pytest


def pytest_addoption(parser):
    parser.addoption("--float32", action="store_true", help="run the numerical suite in float32")
    parser.addoption("--seed", type=int, default=0, help="seed of the random tests; every seed should pass")


def pytest_configure(config):
    jax.config.update("jax_enable_x64", not config.getoption("--float32"))
    jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs():
    """Dropped after a file that leaves more than 3 GB: all of them together would take five."""
    yield
    if psutil.Process().memory_info().rss > 3e9:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    import jax.numpy as jnp

    doctest_namespace["jax"], doctest_namespace["jnp"] = jax, jnp


@pytest.fixture
def rtol(pytestconfig):
    """Relative tolerance for what is exact in exact arithmetic."""
    return 2e-3 if pytestconfig.getoption("--float32") else 1e-10


@pytest.fixture
def seed(pytestconfig):
    """0 unless `--seed` says otherwise."""
    return pytestconfig.getoption("--seed")


@pytest.fixture
def generator(seed):
    """A numpy generator for the data of one test."""
    return np.random.default_rng(seed)


@pytest.fixture
def dtype():
    """The default floating type of this run."""
    return jax.numpy.result_type(float)
