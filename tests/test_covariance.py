"""Every covariance operator against its p×p matrix."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linfit import Dense, Diagonal, Empirical
from linfit.covariance import as_covariance, product, trace_of_product
from tests.oracles import covariance_of, matrix_of

P = 9
KINDS = ["diagonal", "dense", "empirical-short", "empirical-tall"]


@pytest.mark.numerical
@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_equals_the_matrix(kind, generator, rtol, dtype):
    sigma = covariance_of(kind, generator, P)
    matrix = np.asarray(matrix_of(sigma), np.float64)
    rows = jnp.asarray(generator.standard_normal((5, P)))
    host = np.asarray(rows, np.float64)
    scale = rtol * np.abs(matrix).max()
    assert sigma.size == P
    assert sigma.dtype == dtype
    np.testing.assert_allclose(sigma.diagonal(), np.diag(matrix), rtol=rtol)
    np.testing.assert_allclose(sigma.apply(rows), host @ matrix, rtol=rtol, atol=10 * scale)
    np.testing.assert_allclose(sigma.apply(rows[0]), host[0] @ matrix, rtol=rtol, atol=10 * scale)
    np.testing.assert_allclose(sigma.gram(rows), host @ matrix @ host.T, rtol=rtol, atol=30 * scale)
    root = np.asarray(sigma.colour(jnp.eye(sigma.latent_size)), np.float64)
    assert root.shape == (sigma.latent_size, P)
    np.testing.assert_allclose(root.T @ root, matrix, rtol=rtol, atol=scale)


@pytest.mark.numerical
@pytest.mark.parametrize(("left", "right"), list(itertools.product(KINDS, KINDS)))
def test_products_equal_the_matrices(left, right, generator, rtol):
    a, b = (covariance_of(kind, generator, P) for kind in (left, right))
    dense = np.asarray(matrix_of(a), np.float64) @ np.asarray(matrix_of(b), np.float64)
    np.testing.assert_allclose(trace_of_product(a, b), np.trace(dense), rtol=rtol)
    rows = generator.standard_normal((5, P))
    gram, expected = product(a, b).gram(jnp.asarray(rows)), rows @ dense @ rows.T
    np.testing.assert_allclose(gram, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.numerical
@pytest.mark.parametrize("kind", KINDS)
def test_ratio_is_found_exactly_when_there_is_one(kind, generator):
    sigma = covariance_of(kind, generator, P)
    [leaf] = jax.tree.leaves(sigma)
    scaled = type(sigma)(3.7 * leaf)
    expected = 3.7**2 if isinstance(sigma, Empirical) else 3.7
    assert scaled.ratio_to(sigma) == pytest.approx(expected, rel=1e-5)
    assert sigma.ratio_to(sigma) == 1
    assert covariance_of(kind, generator, P).ratio_to(sigma) is None
    assert Diagonal(np.ones(P)).ratio_to(Dense(np.eye(P))) is None  # kinds are not compared
    nearly = leaf.at[0].multiply(1.01) if leaf.ndim == 1 else leaf + 0.01 * jnp.eye(*leaf.shape)
    assert type(sigma)(nearly).ratio_to(sigma) is None
    assert jax.jit(lambda s: jnp.zeros(()) if s.ratio_to(s) is None else jnp.ones(()))(sigma) == 0  # values unknown


def test_ratio_of_zero_and_of_opposite_features():
    zero, one = Diagonal(np.zeros(3)), Diagonal(np.ones(3))
    assert one.ratio_to(zero) is None
    assert zero.ratio_to(one) == 0
    features = np.array([[1.0, 2.0], [0.5, -1.0]])
    assert Empirical(-features).ratio_to(Empirical(features)) == 1
    assert Diagonal([1.0, 0.0]).ratio_to(Diagonal([1.0, 1e-30])) is None  # relative, never absolute


def test_an_empirical_covariance_never_forms_the_matrix(generator):
    """p = 200,000: the matrix would be 320 GB."""
    p = 200_000
    a, b = (Empirical(generator.standard_normal((3, p))) for _ in range(2))
    rows = jnp.asarray(generator.standard_normal((4, p)))
    a.gram(rows), a.apply(rows), a.diagonal(), a.colour(jnp.ones((2, 3))), product(a, b).gram(rows)
    np.testing.assert_allclose(trace_of_product(a, b), np.sum((a.features @ b.features.T) ** 2) / 9, rtol=1e-12)


def test_arrays_become_the_right_kind():
    assert isinstance(as_covariance([1, 2], "sigma"), Diagonal)
    assert isinstance(as_covariance(np.eye(2), "sigma"), Dense)
    empirical = Empirical(np.ones((3, 2)))
    assert as_covariance(empirical, "sigma") is empirical


@pytest.mark.numerical
@pytest.mark.parametrize("kind", KINDS)
def test_jit_equals_eager_and_float32_stays(kind, generator, rtol):
    sigma = covariance_of(kind, generator, P)
    rows = jnp.asarray(generator.standard_normal((5, P)))
    compiled = jax.jit(lambda sigma, rows: (sigma.apply(rows), sigma.gram(rows), sigma.diagonal()))
    for fast, plain in zip(compiled(sigma, rows), (sigma.apply(rows), sigma.gram(rows), sigma.diagonal())):
        np.testing.assert_allclose(fast, plain, rtol=rtol, atol=rtol * np.abs(plain).max())
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), sigma)
    assert single.gram(rows.astype(jnp.float32)).dtype == jnp.float32
    assert single.colour(jnp.ones((2, single.latent_size), jnp.float32)).dtype == jnp.float32
    assert trace_of_product(single, single).dtype == jnp.float32
