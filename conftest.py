"""Tests run in float64; `--float32` runs the numerical suite in single precision, with its own tolerances."""

import jax
import pytest


def pytest_addoption(parser):
    parser.addoption("--float32", action="store_true", help="run the numerical suite in float32")


def pytest_configure(config):
    jax.config.update("jax_enable_x64", not config.getoption("--float32"))
    jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    import jax.numpy as jnp

    doctest_namespace["jax"], doctest_namespace["jnp"] = jax, jnp


@pytest.fixture
def rtol(pytestconfig):
    """Relative tolerance for what is exact in exact arithmetic."""
    return 2e-3 if pytestconfig.getoption("--float32") else 1e-10
