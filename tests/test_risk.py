"""Exact risk against brute-force p×p algebra, and against Monte Carlo from raw data."""

import dataclasses
import itertools
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from linfit.design import _label_design, column_blocks, sample_design, sample_task
from linfit.filters import GradientDescent, GradientFlow, MinNorm, Ridge
from linfit.problem import FixedShift, RandomShift, TwoTaskProblem
from linfit.reduction import risk_forms
from linfit.risk import excess_risks
from linfit.solve import fine_tune, interpolate
from tests.oracles import brute_force_risk, fitted_operator, problems, random_matrix

N, P = 11, 24
FILTERS = {
    "min-norm": (MinNorm(), lambda s: 1 / s),
    "ridge": (Ridge(0.3), lambda s: 1 / (s + 0.3)),
    "flow": (GradientFlow(4.0), lambda s: (1 - np.exp(-4 * s)) / s),
    "descent": (GradientDescent(0.3, 7), lambda s: (1 - (1 - 0.3 * s) ** 7) / s),
}
cached_problems = cache(problems)
every_problem = pytest.mark.parametrize("name", cached_problems(0))
every_filter = pytest.mark.parametrize("filter_name", FILTERS)
some_problems = pytest.mark.parametrize("name", ["diagonal-fixed-u", "isotropic-shift", "mixed"])


def design(problem: TwoTaskProblem, seed: int, n: int = N):
    """Scaled so that the fixed step size is stable and nothing equals the identity."""
    return sample_design(jax.random.key(seed), problem.finetune_covariance, n) * 0.5


def assert_matches_brute_force(forms, X, problem, filter, formula, rtol):
    """Bias² and variance on both domains, at several τ: the comparison of the exact tests (and of test_null)."""
    R = fitted_operator(np.asarray(X, np.float64), formula)
    for tau in (1.0, 0.4, -0.2, 1.3):
        for form, (bias, variance) in zip(forms, brute_force_risk(X, R, problem, tau)):
            close = partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * (bias + variance))
            close(form(filter, tau).bias, bias)
            close(form(filter, tau).variance, variance)
            close(form(filter, tau).total, bias + variance)


@pytest.mark.numerical
@every_filter
@every_problem
def test_risk_equals_brute_force(name, filter_name, seed, rtol):
    problem, (filter, formula) = cached_problems(seed)[name], FILTERS[filter_name]
    X = design(problem, seed)
    assert_matches_brute_force(risk_forms(X, problem), X, problem, filter, formula, rtol)


def quadratic_by_brute_force(X, problem):
    """(c, b, H) of both domains by polarisation: p×p risks of the unit filters and of their pairwise sums."""
    U = np.linalg.eigh(X @ X.T / len(X))[1]

    def total(g):
        return np.array([sum(parts) for parts in brute_force_risk(X, X.T @ (U * g) @ U.T / len(X), problem)])

    n, unit = len(X), np.eye(len(X))
    c = total(np.zeros(n))
    single = np.array([total(e) - c for e in unit])
    H = np.empty((2, n, n))
    for i, j in itertools.product(range(n), range(n)):
        H[:, i, j] = (total(unit[i] + unit[j]) - c - single[i] - single[j]) / 2
    b = (np.einsum("dii->id", H) - single) / 2
    return c, b.T, H


@pytest.mark.numerical
@every_problem
def test_optimal_tau_gain_and_oracle_equal_brute_force_minimisation(name, seed, rtol):
    problem = cached_problems(seed)[name]
    X = design(problem, seed)
    for form, c, b, H in zip(risk_forms(X, problem), *quadratic_by_brute_force(np.asarray(X, np.float64), problem)):
        scale = max(c, np.trace(H))
        for filter, formula in FILTERS.values():
            g = formula(np.asarray(form.eigenvalues, np.float64))
            at = scipy.optimize.minimize_scalar(np.polynomial.Polynomial([c, -2 * b @ g, g @ H @ g]))
            np.testing.assert_allclose(form.optimal_tau(filter), at.x, rtol=max(rtol, 1e-7), atol=max(rtol, 1e-8))
            gain = c - 2 * b @ g + g @ H @ g - at.fun
            np.testing.assert_allclose(form.along(filter).gain, gain, rtol=rtol, atol=rtol * scale)
        lowest = c - b @ np.linalg.lstsq(H, b, rcond=1e-14)[0]
        np.testing.assert_allclose(form.oracle_risk(), lowest, rtol=rtol, atol=100 * rtol * scale)
        np.testing.assert_allclose(form(form.oracle_filter()).total, lowest, rtol=rtol, atol=100 * rtol * scale)


@pytest.mark.numerical
def test_without_noise_an_isotropic_shift_leaves_nothing_to_average(seed, rtol):
    problem = TwoTaskProblem(np.linspace(2, 0.1, P), np.linspace(1, 0.2, P), RandomShift(np.full(P, 0.3)), 0.5)
    form = risk_forms(design(problem, seed), problem).finetune
    assert form.optimal_tau(MinNorm()) < 1
    np.testing.assert_allclose(form.with_noise_std(0.0).optimal_tau(MinNorm()), 1, rtol=rtol)


@pytest.mark.numerical
@some_problems
def test_another_noise_level_is_another_problem(name, seed, rtol):
    problem = cached_problems(seed)[name]
    X = design(problem, seed)
    louder = dataclasses.replace(problem, noise_std=1.7)
    for form, expected in zip(risk_forms(X, problem), risk_forms(X, louder)):
        for changed, reference in zip(form.with_noise_std(1.7)(Ridge(0.2)), expected(Ridge(0.2))):
            np.testing.assert_allclose(changed, reference, rtol=rtol)


@pytest.mark.numerical
@some_problems
def test_combined_objective(name, seed, rtol):
    """R_ft + κR_pre has H + κH' and b + κb', hence its own best τ and its own oracle."""
    problem, kappa = cached_problems(seed)[name], 0.7
    finetune, pretrain = forms = risk_forms(design(problem, seed), problem)
    combined = finetune + kappa * pretrain
    for filter, tau in itertools.product((MinNorm(), Ridge([0.1, 2.0])), (1.0, 0.3)):
        for part, a, b in zip(combined(filter, tau), *(form(filter, tau) for form in forms)):
            np.testing.assert_allclose(part, a + kappa * b, rtol=rtol)
    best = combined.optimal_tau(MinNorm())
    around = combined(MinNorm(), best + np.array([-0.01, 0, 0.01])).total
    assert np.argmin(around) == 1
    np.testing.assert_allclose(around[0], around[2], rtol=rtol)
    assert combined.oracle_risk() >= finetune.oracle_risk() + kappa * pretrain.oracle_risk() - rtol * combined.constant


def tree_close(actual, expected, rtol):
    for fast, plain in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(fast, plain, rtol=rtol, atol=rtol * np.abs(plain).max())


def evaluate(forms):
    """Everything a form computes that does not depend on the signs of its eigenvectors."""
    for form in forms:
        filter = 0.6 * Ridge([0.0, 1.0])
        yield form(filter, 0.8), form.optimal_tau(filter), form.along(filter).gain
        yield form.oracle_risk(), form.eigenvalues, form.linear, form.bias_quadratic


@pytest.mark.numerical
@some_problems
def test_a_stack_of_designs_equals_one_by_one(name, seed, rtol):
    problem = cached_problems(seed)[name]
    stack = jnp.stack([design(problem, seed + k) for k in range(4)]).reshape(2, 2, N, P)
    stacked = list(evaluate(risk_forms(stack, problem)))
    for index in np.ndindex(2, 2):
        single = list(evaluate(risk_forms(stack[index], problem)))
        tree_close(jax.tree.map(lambda leaf, at=index: leaf[at], stacked), single, 10 * rtol)


@pytest.mark.numerical
@some_problems
def test_jit_and_vmap_equal_eager(name, seed, rtol):
    problem = cached_problems(seed)[name]
    stack = jnp.stack([design(problem, seed + k) for k in range(3)])
    compiled = jax.jit(lambda X, problem: list(evaluate(risk_forms(X, problem))))
    tree_close(compiled(stack[0], problem), list(evaluate(risk_forms(stack[0], problem))), 10 * rtol)
    mapped = jax.jit(jax.vmap(lambda X: list(evaluate(risk_forms(X, problem)))))(stack)
    for index, X in enumerate(stack):
        single = list(evaluate(risk_forms(X, problem)))
        tree_close(jax.tree.map(lambda leaf, at=index: leaf[at], mapped), single, 10 * rtol)


def test_new_hyperparameters_do_not_recompile(seed):
    problem = cached_problems(seed)["diagonal-random-u"]
    form, traces = risk_forms(design(problem, seed), problem).finetune, 0

    @jax.jit
    def total(form, filter, tau):
        nonlocal traces
        traces += 1
        return form(filter, tau).total

    for value in (0.1, 0.2, 0.3):
        total(form.with_noise_std(value), Ridge(value), value)
    assert traces == 1


def test_the_derivative_with_respect_to_the_penalty(seed):
    problem = cached_problems(seed)["dense-random-u"]
    form = risk_forms(design(problem, seed), problem).finetune
    for penalty in (0.0, 0.3):
        step = 1e-6
        gradient = jax.grad(lambda penalty: form(Ridge(penalty), 0.7).total)(penalty + step)
        difference = (form(Ridge(penalty + 2 * step), 0.7).total - form(Ridge(penalty), 0.7).total) / (2 * step)
        np.testing.assert_allclose(gradient, difference, rtol=1e-4)


DIAGONAL = ["diagonal-random", "diagonal-random-u", "diagonal-fixed-u", "isotropic-all-u", "tail-aligned"]


@pytest.mark.numerical
@pytest.mark.parametrize("name", DIAGONAL)
def test_column_blocks_equal_the_whole_design(name, seed, rtol):
    problem = cached_problems(seed)[name]
    X = design(problem, seed)
    blocks = (X[:, start : start + 7] for start in range(0, P, 7))  # the last one is shorter
    tree_close(list(evaluate(risk_forms(blocks, problem))), list(evaluate(risk_forms(X, problem))), 10 * rtol)


@pytest.mark.numerical
def test_generated_blocks_at_large_p_equal_the_whole_design(seed, rtol):
    p, n = 9_000, 20
    decay = np.arange(1, p + 1) ** -0.4
    problem = TwoTaskProblem(np.ones(p), decay, RandomShift(decay[::-1]), 0.3, 0.01 * np.cos(np.arange(p)))
    key = jax.random.key(seed)
    whole = risk_forms(np.concatenate(list(column_blocks(key, problem, n)), axis=1), problem)
    streamed = risk_forms(column_blocks(key, problem, n), problem)
    tree_close(list(evaluate(streamed)), list(evaluate(whole)), 10 * rtol)


STREAMED = """
import jax, numpy
jax.config.update("jax_enable_x64", True)
from linfit import MinNorm, RandomShift, TwoTaskProblem, column_blocks, risk_forms, spectra
p, n = 1_000_000, 500
spectrum = spectra.power_law(p, 0.3)
problem = TwoTaskProblem(spectrum, spectrum, RandomShift(spectra.isotropic(p, trace=1.0)), 0.5)
risk = risk_forms(column_blocks(jax.random.key(0), problem, n), problem).finetune(MinNorm()).total
assert numpy.isfinite(risk)
status = open("/proc/self/status").read()  # its own peak; getrusage would begin with the parent's
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_a_million_features_fit_in_two_gigabytes():
    run = subprocess.run([sys.executable, "-c", STREAMED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 2e9


# Monte Carlo from raw data: draw, fit, measure. 20 problems of four structures, so that each compiles once.

DRAWS = 2_000
MONTE_CARLO_FILTERS = [MinNorm(), Ridge(0.2), GradientFlow(3.0), GradientDescent(0.05, 9)]
TAUS = jnp.array([1.0, 0.5, 1.3])
STRUCTURES = ["diagonal-random", "diagonal-fixed", "dense-random", "dense-fixed"]


def random_problem(structure: str, index: int, seed: int, p: int = 16) -> TwoTaskProblem:
    """Both domains, the shift, the pretraining error and the noise differ in every one."""
    generator = np.random.default_rng([seed, index, STRUCTURES.index(structure)])
    if structure.startswith("diagonal"):
        sigma_1, sigma_2, omega = generator.lognormal(0, 0.6, (3, p))
    else:
        sigma_1, sigma_2, omega = (random_matrix(generator, p, decay) for decay in generator.uniform(0.2, 1, 3))
    shift = RandomShift(0.3 * omega) if structure.endswith("random") else FixedShift(generator.standard_normal(p))
    return TwoTaskProblem(sigma_1, sigma_2, shift, generator.uniform(0.5, 1.5), 0.4 * generator.standard_normal(p))


def measured(task, problem):
    """Excess risks (2, filters, taus) of one task's fitted weights, on both domains; θ₁* = 0."""

    theta = jnp.stack([fine_tune(task.X, task.y, task.theta_1, filter) for filter in MONTE_CARLO_FILTERS])
    theta = jax.vmap(lambda tau: interpolate(jnp.broadcast_to(task.theta_1, theta.shape), theta, tau), out_axes=1)(TAUS)
    return jnp.stack(excess_risks(theta, problem, jnp.zeros(problem.p), task.theta_2_star))


def predicted(X, problem, transform=lambda forms: forms):
    forms = transform(risk_forms(X, problem))
    return jnp.stack([jnp.stack([form(filter, TAUS).total for filter in MONTE_CARLO_FILTERS]) for form in forms])


@jax.jit
def monte_carlo_on_a_design(key, X, problem):
    """Measured risks (draws, 2, filters, taus), X fixed: shift and noise are sampled."""
    keys = jax.random.split(key, (DRAWS, 2))
    return jax.vmap(lambda pair: measured(_label_design(X, pair[0], pair[1], problem), problem))(keys)


@partial(jax.jit, static_argnames=("law", "n"))
def monte_carlo_over_designs(key, problem, n, law):
    """Measured risks, and the prediction for the very design each was measured on."""

    def one(key):
        task = sample_task(key, problem, n, law)
        return measured(task, problem), predicted(task.X, problem)

    return jax.vmap(one)(jax.random.split(key, DRAWS))


def standard_errors(differences):
    """Largest |mean| in standard errors of the mean, along axis 0."""
    differences = np.asarray(differences, np.float64)
    return float(np.max(np.abs(differences.mean(0)) / (differences.std(0, ddof=1) / len(differences) ** 0.5)))


@pytest.mark.numerical
@pytest.mark.parametrize("index", range(2))
@pytest.mark.parametrize("structure", STRUCTURES)
def test_monte_carlo_on_one_design(structure, index, seed):
    problem = random_problem(structure, index, seed)
    X = sample_design(jax.random.key(seed), problem.finetune_covariance, 6)
    samples = monte_carlo_on_a_design(jax.random.key(1000 * seed + index), X, problem)
    assert standard_errors(samples - predicted(X, problem)) < 4


@pytest.mark.slow
@pytest.mark.numerical
@pytest.mark.parametrize(("structure", "law"), list(zip(STRUCTURES, ["gaussian", "rademacher", "uniform", "gaussian"])))
def test_monte_carlo_over_designs_of_any_law(structure, law, seed):
    problem = random_problem(structure, 7, seed)
    samples, prediction = monte_carlo_over_designs(jax.random.key(seed), problem, 6, law)
    assert standard_errors(samples - prediction) < 4
