"""The frontier and the equivalent coefficients against linear algebra, quadrature and limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from linfit import Dense, FixedShift, RandomShift, TwoTaskProblem, aligned_problem, spectra
from tests.oracles import matrix_of, problems
from theory.flow import fixed_point_coefficient as flow_coefficient
from theory.frontier import (
    clipping_coefficient,
    distance,
    pareto,
    pareto_weights,
    population_risks,
    smoothing_coefficient,
    trimming_ratio,
    weight_at,
    weighting_coefficient,
)
from theory.s3ft import fixed_point_coefficient as s3ft_coefficient

PROBLEMS = problems(seed=5)
KAPPA = np.array([0.05, 0.7, 1.0, 20.0])
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def matrices(problem):
    """Σ₁, Σ₂ and E δδᵀ."""
    fixed, shift = isinstance(problem.shift, FixedShift), problem.shift
    second = np.outer(shift.vector, shift.vector) if fixed else matrix_of(shift.covariance)
    return matrix_of(problem.pretrain_covariance), matrix_of(problem.finetune_covariance), second


@every_problem
def test_risks_equal_those_of_the_solved_weights(name):
    problem, (one, two, second) = PROBLEMS[name], matrices(PROBLEMS[name])
    finetune, pretrain = pareto(problem, KAPPA)
    for index, kappa in enumerate(KAPPA):
        learned = np.linalg.pinv(kappa * one + two) @ two
        missed = learned - np.eye(problem.p)
        np.testing.assert_allclose(finetune[index], np.trace(missed.T @ two @ missed @ second), rtol=1e-8)
        np.testing.assert_allclose(pretrain[index], np.trace(learned.T @ one @ learned @ second), rtol=1e-8)


@every_problem
def test_ends_and_monotonicity(name):
    finetune, pretrain = pareto(PROBLEMS[name], np.concatenate([[0.0], np.logspace(-4, 4, 30), [np.inf]]))
    _, two, second = matrices(PROBLEMS[name])
    start = np.trace(two @ second)
    np.testing.assert_allclose(finetune[0], 0, atol=1e-9 * start)
    np.testing.assert_allclose(pretrain[-1], 0, atol=1e-12)
    assert finetune[-1] <= start * (1 + 1e-9)
    assert (np.diff(finetune) > 0).all()
    assert (np.diff(pretrain) < 0).all()


@pytest.mark.numerical
def test_weights_minimise_the_weighted_sum(generator, rtol):
    """The gradient vanishes there, for every κ at once, and the risks are those of the weights."""
    matrices = [factor @ factor.T for factor in generator.standard_normal((2, 7, 7))]
    delta = generator.standard_normal(7)
    problem = TwoTaskProblem(Dense(matrices[0]), Dense(matrices[1]), FixedShift(delta), 0.3)
    theta = np.asarray(pareto_weights(problem, KAPPA))
    gradient = KAPPA[:, None] * theta @ matrices[0] + (theta - delta) @ matrices[1]
    np.testing.assert_allclose(gradient, 0, atol=max(1e-8, 20 * rtol) * np.abs(matrices[1] @ delta).max())
    risks = pareto(problem, KAPPA)
    expected = np.einsum("ki,ij,kj->k", theta, matrices[0], theta)
    np.testing.assert_allclose(risks.pretrain, expected, rtol=max(1e-8, 10 * rtol))


def test_directions_that_only_one_task_sees():
    """There both tasks can be had at once: the new one's is learned whole, the old one's kept whole, at any κ."""
    problem = TwoTaskProblem([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], FixedShift([2.0, 3.0, 4.0]), 0.3)
    weights = [0.0, 1.0, np.inf]
    for risks in pareto(problem, weights):
        np.testing.assert_array_equal(risks, 0)
    np.testing.assert_array_equal(pareto_weights(problem, weights), [[0, 3, 0]] * 3)
    dense = TwoTaskProblem(np.diag([1.0, 0, 0]), np.diag([0, 1.0, 0]), FixedShift([2.0, 3.0, 4.0]), 0.3)
    np.testing.assert_allclose(pareto_weights(dense, weights), [[0, 3, 0]] * 3, atol=1e-12)


@every_problem
def test_weight_at_inverts_the_frontier(name):
    problem = PROBLEMS[name]
    finetune, pretrain = pareto(problem, KAPPA)
    np.testing.assert_allclose(weight_at(problem, finetune), KAPPA, rtol=1e-7)
    np.testing.assert_allclose(distance(problem, finetune, pretrain + 0.25), 0.25, rtol=1e-7)


def test_beyond_the_ends_of_the_frontier():
    problem = PROBLEMS["diagonal-random"]
    start, (kept, learned) = float(pareto(problem, np.inf).finetune), pareto(problem, [np.inf, 0.0]).pretrain
    risks = np.array([start, 2 * start, 0.0, 0.0])
    assert weight_at(problem, risks).tolist() == [np.inf, np.inf, 0, 0]
    np.testing.assert_allclose(distance(problem, risks, 7.0), [7 - kept, 7 - kept, 7 - learned, 7 - learned], rtol=1e-9)


def test_slope_of_the_frontier_is_minus_one_over_kappa():
    problem = PROBLEMS["dense-fixed"]
    finetune = pareto(problem, 0.7).finetune
    slope = jax.grad(lambda risk: pareto(problem, weight_at(problem, risk)).pretrain)(finetune)
    np.testing.assert_allclose(slope, -1 / 0.7, rtol=1e-6)


@every_problem
def test_population_risks_equal_matrix_algebra(name):
    problem, (one, two, second) = PROBLEMS[name], matrices(PROBLEMS[name])
    u = np.zeros(problem.p) if problem.pretrain_error is None else np.asarray(problem.pretrain_error)
    mean = np.asarray(problem.shift.vector) if isinstance(problem.shift, FixedShift) else np.zeros(problem.p)
    tau = 0.3  # θ − θ₂* = −(1−τ)(δ − u), θ − θ₁* = (1−τ)u + τδ
    missed = second - np.outer(mean, u) - np.outer(u, mean) + np.outer(u, u)
    moved = 0.49 * np.outer(u, u) + 0.21 * (np.outer(u, mean) + np.outer(mean, u)) + 0.09 * second
    point = population_risks(problem, tau)
    np.testing.assert_allclose(point.finetune, 0.49 * np.trace(two @ missed), rtol=1e-10)
    np.testing.assert_allclose(point.pretrain, np.trace(one @ moved), rtol=1e-10)


def integral(function, std, kinks=()):
    edges = [-12 * std, *sorted(kinks), 12 * std]
    density = scipy.stats.norm(scale=std).pdf
    parts = [scipy.integrate.quad(lambda r: function(r) * density(r), *ends) for ends in itertools.pairwise(edges)]
    return sum(part[0] for part in parts)


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("noise_std", [0.4, 1.5])
def test_coefficients_equal_their_integrals(threshold, noise_std):
    """E rψ(r)/v for targets, E w r²/(v E w) for weights, q = 1."""
    v = 1 + noise_std**2
    std, kinks = v**0.5, (-threshold, threshold)
    clipped = integral(lambda r: r * np.clip(r, -threshold, threshold), std, kinks) / v
    np.testing.assert_allclose(clipping_coefficient(threshold, std), clipped, rtol=1e-8)
    kept = integral(lambda r: r**2 * (abs(r) > threshold), std, kinks) / v
    np.testing.assert_allclose(s3ft_coefficient(threshold, std), kept, rtol=1e-6)
    inside = [integral(lambda r, k=k: r**k * (abs(r) <= threshold), std, kinks) for k in (0, 2)]
    ratio = inside[1] / inside[0] / v
    np.testing.assert_allclose(trimming_ratio(threshold, std), ratio, rtol=1e-6)
    soft = [integral(lambda r, k=k: r**k * np.exp(-(r**2) / threshold), std) for k in (0, 2)]
    tau = weighting_coefficient(soft[1] / soft[0] / v, 1.0, noise_std)
    np.testing.assert_allclose(tau, flow_coefficient(noise_std, threshold), rtol=1e-6)


def test_weighting_formula_solves_the_normal_equations():
    """τ E w s² = E w r s over (s, ε), by a two-dimensional rule, for trimming-like smooth weights of either kind."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(80)
    s, noise = np.sqrt(1.7) * nodes[:, None], 0.8 * nodes
    mass, r = np.outer(masses, masses), s + noise
    for weights in (np.exp(-(r**2) / 3), 1 / (1 + r**2 / 9), 1 + r**2):
        m = np.sum(mass * weights * r**2) / np.sum(mass * weights) / (1.7 + 0.64)
        tau = np.sum(mass * weights * r * s) / np.sum(mass * weights * s**2)
        np.testing.assert_allclose(weighting_coefficient(m, 1.7, 0.8), tau, rtol=1e-6)
        assert (tau < 1) == (m < 1)


def test_limits_of_the_coefficients():
    assert float(weighting_coefficient(0.2, 1.3, 0.0)) == 1
    assert float(weighting_coefficient(1.0, 1.3, 0.7)) == pytest.approx(1)
    small = np.array([1e-4, 0.99e-3, 1.01e-3])
    np.testing.assert_allclose(trimming_ratio([*small, 40.0], 1.0), [*small**2 / 3, 1], rtol=1e-6)
    assert float(clipping_coefficient(1e9, 1.0)) == 1
    np.testing.assert_array_equal(smoothing_coefficient([0.0, 1.0, 0.25]), [1, 0, 0.75])


def test_one_compilation_serves_new_values():
    run = jax.jit(lambda problem, weight: pareto(problem, weight))
    for weight, noise in ((0.5, 0.1), (2.0, 0.7)):
        run(aligned_problem(spectra.power_law(10), noise_std=noise**0.5), jnp.asarray(weight))
    assert run._cache_size() == 1


FIXED, RANDOM = (TwoTaskProblem([1.0, 2.0], [1.0, 1.0], shift([1.0, 1.0]), 0.5) for shift in (FixedShift, RandomShift))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: pareto(FIXED, -1.0), "weight"),
        (lambda: pareto(FIXED, [1.0, float("nan")]), "weight"),
        (lambda: pareto_weights(FIXED, -1.0), "weight"),
        (lambda: pareto_weights(RANDOM, 1.0), "shift"),
        (lambda: weight_at(FIXED, -0.1), "finetune"),
        (lambda: weight_at(FIXED, float("inf")), "finetune"),
        (lambda: distance(FIXED, -1.0, 1.0), "finetune"),
        (lambda: distance(FIXED, 1.0, float("nan")), "pretrain"),
        (lambda: distance(FIXED, [1.0, 2.0], [1.0, 2.0, 3.0]), "pretrain"),
        (lambda: population_risks(FIXED, float("inf")), "tau"),
        (lambda: weighting_coefficient(0.0, 1.0, 1.0), "variance_ratio"),
        (lambda: weighting_coefficient(1.0, 0.0, 1.0), "signal"),
        (lambda: weighting_coefficient(1.0, 1.0, -1.0), "noise_std"),
        (lambda: trimming_ratio(0.0, 1.0), "threshold"),
        (lambda: trimming_ratio(1.0, 0.0), "residual_std"),
        (lambda: clipping_coefficient(-1.0, 1.0), "threshold"),
        (lambda: smoothing_coefficient(float("nan")), "smoothing"),
    ],
)
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=name):
        call()
