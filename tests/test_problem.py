"""The two-task problem: what it stores, and the gap that fine-tuning has to learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linfit import Dense, Diagonal, Empirical, FixedShift, RandomShift, TwoTaskProblem, aligned_problem, spectra

FLAT, STEEP = np.ones(3), np.array([3.0, 2.0, 1.0])
U, DELTA = np.array([0.1, 0.2, -0.3]), np.array([1.0, -2.0, 0.5])


@pytest.mark.parametrize(
    ("shift", "u", "mean", "covariance"),
    [
        (RandomShift(STEEP), None, None, STEEP),
        (RandomShift(STEEP), U, -U, STEEP),
        (FixedShift(DELTA), None, DELTA, None),
        (FixedShift(DELTA), U, DELTA - U, None),
    ],
)
def test_the_gap(shift, u, mean, covariance):
    problem = TwoTaskProblem(FLAT, STEEP, shift, 0.3, u)
    found = problem.gap_covariance and problem.gap_covariance.diagonal()
    for value, expected in ((problem.gap_mean, mean), (found, covariance)):
        assert (value is None) == (expected is None)
        if expected is not None:
            np.testing.assert_array_equal(value, expected)


def test_each_domain_keeps_its_own_covariance():
    problem = TwoTaskProblem(STEEP, np.diag(FLAT), RandomShift(Empirical(np.ones((2, 3)))), 0.0)
    assert isinstance(problem.pretrain_covariance, Diagonal)
    assert isinstance(problem.finetune_covariance, Dense)
    assert isinstance(problem.gap_covariance, Empirical)
    np.testing.assert_array_equal(problem.pretrain_covariance.diagonal(), STEEP)
    assert problem.p == problem.shift.size == 3


def test_integers_are_promoted_and_float32_stays():
    problem = TwoTaskProblem([1, 2], [[2, 1], [1, 2]], FixedShift([1, 0]), 1, [0, 1])
    assert {leaf.dtype for leaf in jax.tree.leaves(problem)} == {jnp.result_type(float)}
    single = [jnp.ones(2, jnp.float32), jnp.eye(2, dtype=jnp.float32)]
    problem = TwoTaskProblem(*single, RandomShift(single[0]), jnp.float32(0.5), single[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(problem)} == {jnp.dtype(jnp.float32)}


def test_a_problem_passes_through_jit_and_vmap():
    problem = TwoTaskProblem(FLAT, STEEP, FixedShift(DELTA), 0.3, U)
    np.testing.assert_allclose(jax.jit(lambda problem: problem.gap_mean)(problem), DELTA - U, rtol=1e-15)

    def build(noise_std, shift):
        return TwoTaskProblem(FLAT, STEEP, FixedShift(shift), noise_std)

    stack = jax.vmap(build)(jnp.array([0.1, 0.2]), jnp.stack([DELTA, 2 * DELTA]))
    np.testing.assert_array_equal(stack.noise_std, [0.1, 0.2])
    np.testing.assert_array_equal(stack.shift.vector[1], 2 * DELTA)


@pytest.mark.numerical
@pytest.mark.parametrize("alignment", [-1.0, 0.0, 0.4, 1.0])
def test_power_law_problem(alignment, rtol):
    first, second = spectra.power_law(20, 0.8), spectra.power_law(20, 1.5)
    problem = aligned_problem(
        second, alignment=alignment, noise_std=0.3**0.5, pretrain_spectrum=first, pretrain_risk=0.25
    )
    rank = np.arange(1, 21)
    omega = np.asarray(problem.gap_covariance.diagonal(), np.float64)
    np.testing.assert_allclose(problem.finetune_covariance.diagonal(), rank**-1.5, rtol=rtol)
    np.testing.assert_allclose(problem.pretrain_covariance.diagonal(), rank**-0.8, rtol=rtol)
    np.testing.assert_allclose(omega / omega[0], rank ** (-1.5 * alignment), rtol=rtol)
    np.testing.assert_allclose(omega @ rank**-1.5, 1, rtol=rtol)
    np.testing.assert_allclose(np.asarray(problem.pretrain_error) ** 2 @ rank**-0.8, 0.25, rtol=rtol)
    np.testing.assert_allclose(problem.noise_std**2, 0.3, rtol=rtol)
    assert aligned_problem(spectra.power_law(20)).pretrain_error is None
