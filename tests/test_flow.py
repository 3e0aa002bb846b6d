"""FLOW on finite samples: forms of one task against iteration and solves, sampled limits against theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from linfit import (
    FixedShift,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Pair,
    Parabola,
    Ridge,
    TwoTaskProblem,
    aligned_problem,
    excess_risks,
    fine_tune,
    flow_weights,
    gradient_descent,
    sample_design,
    spectra,
)
from linfit.design import Task
from linfit.filters import Several
from sims import flow as sims
from tests.oracles import problems
from theory import flow as theory

PROBLEMS = problems(seed=4)
TIMES = np.logspace(-1, 4, 26)

sample = jax.jit(sims.sample_deviating_task, static_argnames=("n", "law", "deviation"))
task_forms = jax.jit(sims.task_forms)


def losses_of(task):
    return (task.y - task.X @ task.theta_1) ** 2


def some_task(problem, n, seed):
    """By numpy: where the law of the data does not matter, jax.random need not be compiled for the shape."""
    generator = np.random.default_rng(seed)
    X, theta_2_star = generator.standard_normal((n, problem.p)), generator.standard_normal(problem.p)
    y = X @ theta_2_star + 0.7 * generator.standard_normal(n)
    return Task(jnp.asarray(X), jnp.asarray(y), problem.pretrain_error, jnp.asarray(theta_2_star))


@pytest.mark.numerical
@pytest.mark.parametrize(("name", "n"), [("dense-random-u", 9), ("diagonal-fixed-u", 60)])
def test_task_forms_equal_the_iteration_and_a_linear_solve(name, n, rtol):
    """n < p and n > p: both risks of weighted gradient descent, iterated, and of weighted ridge, solved p × p."""
    problem = PROBLEMS[name]
    task = some_task(problem, n, 1)
    weights = flow_weights(losses_of(task))
    forms = task_forms(task, problem, weights)
    step_size = 0.5 * n / float(np.linalg.norm(task.X, 2)) ** 2
    X, W = np.asarray(task.X), np.diag(weights)
    residual = np.asarray(task.y - task.X @ task.theta_1)
    ridge = np.linalg.solve(X.T @ W @ X / n + 0.2 * np.eye(problem.p), X.T @ W @ residual / n)
    descended = gradient_descent(*task[:3], step_size=step_size, steps=7, sample_weights=weights)
    pairs = [(GradientDescent(step_size, 7), descended), (Ridge(0.2), task.theta_1 + ridge)]
    for (filter, theta), tau in itertools.product(pairs, (1.0, 0.4)):
        moved = task.theta_1 + tau * (theta - task.theta_1)
        risks = excess_risks(moved, problem, np.zeros(problem.p), task.theta_2_star)
        for form, risk in zip(forms, risks):
            np.testing.assert_allclose(form(filter, tau).total, risk, rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(0.9, 1.0), (0.0, 0.1), (0.3, 0.6)])
def test_risk_given_the_pretrained_loss_equals_that_of_sampled_test_points(low, high, seed):
    """A million noisy test points ranked by pretrained loss, in standard errors; a wrong moment is far off."""
    problem = TwoTaskProblem([1.0, 0.5, 0.2], [1.0, 0.7, 0.3], FixedShift([1.0, -1.0, 0.5]), 0.6, [0.1, 0.2, -0.3])
    task = sample(jax.random.key(seed), problem, 12)
    form = task_forms(task, problem, jnp.linspace(0.2, 1, 12)).finetune
    theta = fine_tune(task.X, task.y, task.theta_1, Ridge(0.5), jnp.linspace(0.2, 1, 12))
    test = np.asarray(sample_design(jax.random.key(seed + 100), problem.finetune_covariance, 1_000_000))
    noise = 0.6 * np.random.default_rng(seed).standard_normal(len(test))
    ranks = (test @ np.asarray(task.theta_2_star - task.theta_1) + noise) ** 2
    chosen = (ranks >= np.quantile(ranks, low)) & (ranks <= np.quantile(ranks, high))
    errors = (test[chosen] @ np.asarray(theta - task.theta_2_star)) ** 2
    exact = float(sims.form_given_loss(form, problem.noise_std, low, high)(Ridge(0.5)).total)
    error = errors.std() / errors.size**0.5
    assert abs(errors.mean() - exact) < 5 * error
    if low == 0.9:
        assert abs(errors.mean() - float(form(Ridge(0.5)).total)) > 20 * error


def test_conditional_squares_average_to_one():
    edges = np.linspace(0, 1, 11)
    parts = [sims.conditional_square(low, high) for low, high in itertools.pairwise(edges)]
    np.testing.assert_allclose(np.mean(parts), 1)
    c = scipy.stats.norm.ppf(0.95)  # E[z² | |z| > c] = 1 + cφ(c)/P(z > c)
    np.testing.assert_allclose(parts[-1], 1 + c * scipy.stats.norm.pdf(c) / 0.05)


@pytest.mark.parametrize("deviation", list(sims.DEVIATIONS))
def test_deviations_have_mean_zero_and_the_stated_variance(deviation, seed):
    problem = aligned_problem(spectra.power_law(5), noise_std=2.0**0.5, pretrain_risk=0.3)
    task = sims.sample_deviating_task(jax.random.key(seed), problem, 100_000, deviation=deviation)
    noise = np.asarray(task.y - task.X @ task.theta_2_star)
    for values, expected in ((noise, 0.0), (noise**2, 2.0), *((noise * x, 0.0) for x in np.asarray(task.X).T)):
        assert abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5
    assert (noise**4).mean() / 4 > (2.5 if deviation == "gaussian" else 6)  # kurtosis 3; 8.1; 15


@pytest.mark.slow
def test_monte_carlo_equals_one_task_at_a_time():
    problem, key = aligned_problem(spectra.power_law(12), noise_std=0.4**0.5, pretrain_risk=0.1), jax.random.key(5)
    filter = Several((GradientFlow(TIMES[:2]), Ridge(0.1)))
    weightings = {"hard": sims.tilted(-1.0), "unweighted": sims.tilted(0.0), "FLOW": sims.tilted(1.0)}
    data = sims.monte_carlo(key, problem, 30, weightings, filter, np.arange(3), 2).sel(deviation="gaussian")
    tau, squares = 0.7, 0.0
    along = sims.along_tau(data, tau)
    for index in range(2):
        task = sample(jax.random.fold_in(key, index), problem, 30)
        squares += task.theta_2_star**2 / 2
        for name, weighting in weightings.items():
            weights = weighting(losses_of(task))
            theta = fine_tune(task.X, task.y, task.theta_1, filter, weights)
            theta = task.theta_1 + tau * (theta - task.theta_1)
            chosen = along.sel(weighting=name).isel(replicate=index)
            risks = excess_risks(theta, problem, np.zeros(12), task.theta_2_star)
            for domain, direct in risks._asdict().items():
                np.testing.assert_allclose(chosen.sel(risk=domain), direct, rtol=1e-9)
            mean = data.step.sel(weighting=name).isel(replicate=index)
            np.testing.assert_allclose(mean, weights.mean(), rtol=1e-12)
    nothing_learned = sims.sampled_frontier(key, problem, 2, np.array([np.inf])).finetune[0]
    np.testing.assert_allclose(nothing_learned, problem.finetune_covariance.diagonal() @ squares, rtol=1e-12)


def test_best_averages_are_the_least_of_a_grid(generator):
    """R_ft + κR_pre over members and τ in [0, 1]."""
    fields = generator.uniform(0.5, 2, (2, 2, 5))
    parabolas = Pair(*(Parabola(jnp.full(5, 1.0), *jnp.asarray(field), jnp.zeros(5)) for field in fields))
    weights = np.array([0.0, 0.3, 2.0])
    best, tau = sims._best_averages(parabolas, weights), np.linspace(0, 1, 1001)[:, None]
    finetune, pretrain = (parabola(tau).total for parabola in parabolas)
    for index, kappa in enumerate(weights):
        least = float((finetune + kappa * pretrain).min())
        assert least - 1e-5 < best.finetune[index] + kappa * best.pretrain[index] <= least + 1e-12


@pytest.mark.slow
def test_flow_helps_on_the_task_itself_with_outliers_and_costs_without_them(seed):
    """n > p: the least mean R_ft along training, a paired comparison in standard errors, on both sides."""
    problem = aligned_problem(spectra.power_law(40), alignment=0.5, noise_std=2.0**0.5)
    weightings, deviations = {"unweighted": sims.tilted(0.0), "FLOW": sims.tilted(0.25)}, ("gaussian", "outliers")
    flow, key = GradientFlow(TIMES), jax.random.key(seed)
    data = sims.monte_carlo(key, problem, 160, weightings, flow, TIMES, 64, deviations=deviations)
    finetune = sims.along_tau(data.sel(risk="finetune"))
    best = finetune.isel(filter=finetune.mean("replicate").argmin("filter"))
    mean, error = sims.estimate(best.sel(weighting="FLOW") - best.sel(weighting="unweighted"))
    gaussian, outliers = (mean / error).values
    assert gaussian > 4
    assert outliers < -4


def z_scores(samples, expected):
    """Gaps in standard errors, as if there were many replicates instead of a few (t to normal quantiles)."""
    count = len(samples)
    t = (samples.mean(axis=0) - expected) / (samples.std(axis=0, ddof=1) / count**0.5)
    return scipy.stats.norm.isf(scipy.stats.t.sf(np.abs(t), count - 1))


@pytest.mark.slow
def test_fixed_point_bends_where_the_noise_is_not_gaussian(seed):
    """F4 rests on Gaussian noise, not on the features: with outliers or misfit the coefficient is another."""
    problem = TwoTaskProblem([1.0, 0.5], [1.0, 0.5], FixedShift([1.0, 1.0]), 0.0)
    coefficient, rest = sims.sample_fixed_points(
        jax.random.key(seed), problem, 10_000, np.ones(1), np.ones(1), 12, "uniform", tuple(sims.DEVIATIONS)
    )
    assert rest[:, 0].max() < 1e-2
    z = z_scores(coefficient[..., 0], theory.fixed_point_coefficient(1.0, 1.0))
    assert z[0] < 4.5
    assert (z[1:] > 5).all()


@pytest.mark.slow
def test_sampled_moments_equal_theory(seed):
    noise_std = 0.8
    covariance, temperatures = np.array([[1.0, 0.4], [0.4, 0.6]]), np.array([0.3, 2.0])
    problem = TwoTaskProblem(covariance, covariance, FixedShift([1.0, -0.5]), noise_std)
    second, cross = sims.sample_moments(jax.random.key(seed), problem, 20_000, temperatures, 20)
    for index, temperature in enumerate(temperatures):
        weighted = theory.weighted_covariance(covariance, [1.0, -0.5], noise_std, temperature)
        for sampled, exact in ((second[:, index], weighted), (cross[:, index], weighted.moment)):
            assert (z_scores(sampled, np.asarray(exact)) < 5).all()
            assert (z_scores(sampled, 0.9 * np.asarray(exact)) > 5).any()


@pytest.mark.slow
def test_sampled_rates_bend_with_the_tails_as_computed(seed):
    """F3.tails: elliptical features, with noise; the Gaussian rate is told apart."""
    temperatures = np.array([0.1, 5.0])
    sampled = sims.sample_rates(jax.random.key(seed), np.array([0.0, 1.0]), 0.4, temperatures, 20_000, 20)
    exact = [theory.heavy_tailed_stall(1.0, 0.4, temperatures, *theory.lognormal_sizes(a)).rate for a in (0.0, 1.0)]
    for index in range(2):
        assert (z_scores(sampled[:, index], np.asarray(exact[index])) < 4.5).all()
        assert (z_scores(sampled[:, index], np.asarray(exact[1 - index])) > 6).all()


@pytest.mark.slow
def test_sampled_iterates_follow_the_theorem(seed):
    """Theorem 7.2: η = ½ without weights and η = 1/(2μ) with them are the step sizes 1 and 1/μ on the loss with ½."""
    rho, beta, steps, replicates = 0.6, 0.4, 6, 12
    problem = theory.two_task_problem(rho, p=3)
    temperatures = np.array([np.inf, float(theory.temperature_from_beta(beta, rho))])
    runs = list(zip(temperatures, 1 / np.asarray(theory.mean_weight(1.0, temperatures))))
    paths = sims._sample_iterates(jax.random.key(seed), problem, 10_000, runs, steps, replicates)
    around = paths[..., :2] + np.array([1.0, 0.0])  # θ₂* = −ē
    grid = np.arange(steps + 1)
    exact = np.stack([theory.unweighted_iterates(rho, grid), theory.flow_iterates(rho, beta, grid)])
    np.testing.assert_allclose(around[:, :, 0], np.broadcast_to([1, 0], (replicates, 2, 2)), atol=1e-12)
    assert (z_scores(around[:, :, 1:], exact[:, 1:]) < 5).all()
    assert (z_scores(around[:, :, 2], exact[::-1, 2]) > 5).any()  # the other's iterates are told apart


def test_wrong_labels_are_as_many_as_asked_and_all_wrong():
    targets = jnp.eye(10)[jnp.arange(50) % 10]
    for share in (0.0, 0.3, 1.0):
        y = sims._wrong_labels(jax.random.key(0), targets, share)
        np.testing.assert_array_equal(y.sum(axis=1), 1)
        assert int((y.argmax(1) != targets.argmax(1)).sum()) == round(share * 50)


@pytest.mark.slow
def test_digits_flow_forgives_wrong_labels_and_neglects_the_hardest():
    """At the sizes of the quick figure, so that both share what is compiled."""
    times = np.logspace(0, 5, 21)
    data = sims.digits_along_training(jax.random.key(0), times, np.array([0.0, 0.3]), 2, p=512, angle=20.0)
    right, wrong = (data.isel(share=index) for index in (0, 1))
    least = wrong.finetune.min("time")
    gain = least.sel(weighting="unweighted") - least.sel(weighting="FLOW")
    assert gain > 2 * wrong.finetune_error.isel(time=slice(0, 14)).max()
    early = right.sel(time=100.0, method="nearest")
    flow, unweighted = (early.sel(weighting=name) for name in ("FLOW", "unweighted"))
    assert flow.hardest_accuracy < unweighted.hardest_accuracy - 0.1
    assert flow.pretrain < unweighted.pretrain


KEY, BED = jax.random.key(0), aligned_problem(spectra.power_law(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sims.sample_deviating_task(KEY, BED, 4, deviation="cauchy"), "deviation must be one of"),
        (lambda: sims.sample_deviating_task(KEY, BED, 0), "n must be at least 1"),
        (lambda: sims.sample_deviating_task(KEY, BED, 4, law="none"), "law must be one of"),
        (lambda: sims.sample_rates(KEY, np.ones(1), 0.0, np.ones(1), 0, 2), "n must be at least 1"),
        (lambda: sims.conditional_square(0.5, 0.5), "low and high"),
        (lambda: sims.conditional_square(-0.1, 0.5), "low and high"),
        (lambda: sims.tilted(np.nan), "tilt must be finite"),
        (lambda: sims.monte_carlo(KEY, BED, 4, {}, MinNorm(), np.zeros(1), 1), "replicates must be at least 2"),
        (lambda: sims.digits_along_training(KEY, TIMES, np.array([1.5]), 2), "shares must be at most 1"),
        (lambda: sims.digits_along_training(KEY, TIMES, np.array([-0.1]), 2), "shares"),
        (lambda: sims.digits_along_training(KEY, TIMES, np.array([0.1]), 1), "splits"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
