"""Designs, tasks and column blocks: their moments in standard errors, and what the same key must reproduce."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linfit import Dense, Diagonal, FixedShift, RandomShift, TwoTaskProblem, column_blocks, sample_design, sample_task
from linfit.design import _BLOCK_COLUMNS, _STUDENT_FREEDOM, LAWS, _label_design
from tests.oracles import covariance_of, matrix_of, random_matrix

P = 6
FOURTH_MOMENT = {"gaussian": 3, "rademacher": 1, "uniform": 9 / 5, "student": 3 + 6 / (_STUDENT_FREEDOM - 4)}


def within_standard_errors(samples, expected, bound=4.5):
    """Mean over axis 0 against `expected`, entry by entry; exact where a sample never varies."""
    mean, error = samples.mean(0), samples.std(0, ddof=1) / len(samples) ** 0.5
    np.testing.assert_array_less(np.abs(mean - expected), bound * error + 1e-6 * np.abs(expected).max() + 1e-12)


@pytest.mark.numerical
@pytest.mark.parametrize("law", LAWS)
def test_coordinates_are_standardised_and_have_the_law(law, seed):
    z = np.asarray(sample_design(jax.random.key(seed), Diagonal(np.ones(40)), 2_000, law), np.float64)
    within_standard_errors(z.reshape(-1, 1), 0)
    within_standard_errors(z.reshape(-1, 1) ** 2, 1)
    if law == "student":  # its fourth moment has no finite standard error
        assert abs((z**4).mean() - FOURTH_MOMENT[law]) < 0.6
    else:
        within_standard_errors(z.reshape(-1, 1) ** 4, FOURTH_MOMENT[law])


@pytest.mark.numerical
@pytest.mark.parametrize("kind_law", ["diagonal uniform", "dense rademacher", "empirical-short gaussian"])
def test_rows_have_the_covariance_whatever_the_law(kind_law, seed, generator):
    kind, law = kind_law.split()
    sigma = covariance_of(kind, generator, P)
    X = np.asarray(sample_design(jax.random.key(seed), sigma, 4_000, law), np.float64)
    within_standard_errors(X, np.zeros(P))
    within_standard_errors(X[:, :, None] * X[:, None], np.asarray(matrix_of(sigma), np.float64))


def test_covariances_may_be_arrays_and_the_key_decides():
    spectrum = jnp.array([2.0, 1.0])
    key, other = jax.random.split(jax.random.key(0))
    X = sample_design(key, spectrum, 3)
    np.testing.assert_array_equal(X, sample_design(key, Diagonal(spectrum), 3))
    np.testing.assert_allclose(X, sample_design(key, jnp.diag(spectrum), 3), rtol=1e-12)
    assert not np.any(sample_design(other, spectrum, 3) == X)


@pytest.mark.parametrize("u", [None, np.array([0.5, -1.0, 0.0, 2.0, 0.0, 1.0])])
@pytest.mark.parametrize("shift", [FixedShift(np.arange(6.0)), RandomShift(np.full(6, 0.5))])
def test_a_task_without_noise_is_the_linear_model(shift, u):
    problem = TwoTaskProblem(np.ones(P), np.arange(1.0, 7), shift, 0.0, u)
    task = sample_task(jax.random.key(3), problem, 4)
    np.testing.assert_allclose(task.y, task.X @ task.theta_2_star, rtol=1e-13)
    np.testing.assert_array_equal(task.theta_1, np.zeros(P) if u is None else u)
    if isinstance(shift, FixedShift):
        np.testing.assert_array_equal(task.theta_2_star, shift.vector)


@pytest.mark.numerical
def test_shift_and_noise_have_their_covariances_and_are_independent(seed, generator):
    omega = Dense(random_matrix(generator, P, 0.5))
    problem = TwoTaskProblem(np.ones(P), np.ones(P), RandomShift(omega), 0.7)
    X = jnp.asarray(generator.standard_normal((3, P)))
    keys = jax.random.split(jax.random.key(seed), (8_000, 2))
    tasks = jax.vmap(lambda pair: _label_design(X, pair[0], pair[1], problem))(keys)
    shift = np.asarray(tasks.theta_2_star, np.float64)
    noise = np.asarray(tasks.y - shift @ X.T, np.float64)
    within_standard_errors(shift, np.zeros(P))
    within_standard_errors(noise, np.zeros(3))
    within_standard_errors(shift[:, :, None] * shift[:, None], np.asarray(omega.matrix, np.float64))
    within_standard_errors(noise[:, :, None] * noise[:, None], 0.49 * np.eye(3))
    within_standard_errors(shift[:, :, None] * noise[:, None], np.zeros((P, 3)))


def test_sample_task_under_jit_and_vmap_equals_eager():
    problem = TwoTaskProblem(np.ones(P), np.arange(1.0, 7), RandomShift(np.ones(P)), 0.3, np.ones(P))
    keys = jax.random.split(jax.random.key(0), 3)
    batched = jax.jit(jax.vmap(lambda key: sample_task(key, problem, 4, "uniform")))(keys)
    for index, key in enumerate(keys):
        for field, single in zip(batched, sample_task(key, problem, 4, "uniform")):
            np.testing.assert_allclose(field[index], single, rtol=1e-12, atol=1e-14)


def test_dtype_follows_the_problem():
    single = jnp.ones(P, jnp.float32)
    problem = TwoTaskProblem(single, single, RandomShift(single), 0.5, single)
    assert {field.dtype for field in sample_task(jax.random.key(0), problem, 4)} == {jnp.dtype(jnp.float32)}
    assert {block.dtype for block in column_blocks(jax.random.key(0), problem, 4)} == {np.dtype(np.float32)}
    for law in LAWS:
        assert sample_design(jax.random.key(0), Diagonal(single), 2, law).dtype == jnp.float32


@pytest.mark.numerical
def test_column_blocks_have_the_covariance_and_repeat_with_the_key(seed):
    p = _BLOCK_COLUMNS + 100
    spectrum = np.linspace(2, 0.5, p)
    problem = TwoTaskProblem(spectrum, spectrum, RandomShift(spectrum), 0.1)
    key = jax.random.key(seed)
    blocks = list(column_blocks(key, problem, 300))
    assert [block.shape for block in blocks] == [(300, _BLOCK_COLUMNS), (300, 100)]
    for block, again in zip(blocks, column_blocks(key, problem, 300)):
        np.testing.assert_array_equal(block, again)
    [other, _] = column_blocks(jax.random.key(seed + 1), problem, 300)
    assert not np.any(blocks[0] == other)
    z = np.concatenate(blocks, axis=1).astype(np.float64) / np.sqrt(spectrum)
    within_standard_errors(z.reshape(-1, 1), 0)
    within_standard_errors(z.reshape(-1, 1) ** 2, 1)
    # Neither block repeats the other: their first columns are uncorrelated.
    within_standard_errors((z[:, :100] * z[:, _BLOCK_COLUMNS:]).reshape(-1, 1), 0)
