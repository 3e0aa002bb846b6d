"""FLOW in the population: moments, stalling, trajectories and Theorem 7.2 against simulation and plain matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats

from linfit import (
    Dense,
    Diagonal,
    Empirical,
    FixedShift,
    GradientDescent,
    GradientFlow,
    MinNorm,
    RandomShift,
    Ridge,
    TwoTaskProblem,
)
from sims.verify import claims_named, verify
from tests.oracles import matrix_of, random_matrix
from theory import flow
from theory.frontier import pareto

P = 5
KINDS = {
    "diagonal": lambda generator: Diagonal(generator.uniform(0.2, 2, P)),
    "dense": lambda generator: Dense(random_matrix(generator, P, 1.0)),
    "tall": lambda generator: Empirical(generator.standard_normal((9, P))),
    "wide": lambda generator: Empirical(generator.standard_normal((3, P))),
}


def moments_by_matrices(Sigma, shift, noise_std, temperature):
    """F2 as written in the docs."""
    v = shift @ Sigma @ shift + noise_std**2
    Z = (1 + 2 * v / temperature) ** -0.5
    a, k = Sigma @ shift, 2 / (temperature + 2 * v)
    return Z * (Sigma - k * np.outer(a, a)), Z * a / (1 + 2 * v / temperature)


@pytest.mark.numerical
@pytest.mark.parametrize("noise_std", [0.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weighted_covariance_is_an_operator_like_any_other(kind, noise_std, generator, rtol):
    covariance, shift = KINDS[kind](generator), generator.standard_normal(P)
    rows = generator.standard_normal((4, P))
    weighted = flow.weighted_covariance(covariance, shift, noise_std, 0.7)
    expected, first = moments_by_matrices(matrix_of(covariance), shift, noise_std, 0.7)
    root = np.asarray(weighted.colour(jnp.eye(weighted.latent_size)))
    for got, right in (
        (np.asarray(weighted), expected),
        (weighted.diagonal(), np.diag(expected)),
        (weighted.apply(jnp.asarray(rows)), rows @ expected),
        (weighted.moment, first),
        (root.T @ root, expected),
    ):
        np.testing.assert_allclose(got, right, rtol=rtol, atol=rtol * np.abs(expected).max() * 10)
    np.testing.assert_allclose(weighted.gram(jnp.asarray(rows)), rows @ expected @ rows.T, rtol=rtol, atol=rtol)
    assert weighted.size == P


def test_the_median_temperature_is_the_median_of_chi_square():
    assert pytest.approx(scipy.stats.chi2.median(1), rel=1e-14) == flow.MEDIAN
    assert 1 / flow.damping(1.0, flow.MEDIAN) == pytest.approx(5.396, abs=5e-4)


@pytest.mark.parametrize(
    ("temperature", "mean", "rate", "coefficient"),
    [(np.inf, 1.0, 1.0, 1.0), (1e12, 1.0, 1.0, 1.0), (1e-9, 0.0, 0.2, 0.0), (0.0, 0.0, 0.2, 0.0)],
)
def test_limits_of_the_temperature(temperature, mean, rate, coefficient):
    """Hot is no weighting; cold learns nothing, and slows Δ to the share σ²/v of the rest."""
    stalled = flow.stall([1.0, 2.0], [2.0, 0.0], noise_std=1.0, temperature=temperature)
    np.testing.assert_allclose(stalled.mean_weight, mean, atol=1e-4)
    np.testing.assert_allclose(stalled.rate, rate, atol=1e-8)
    np.testing.assert_allclose(flow.fixed_point_coefficient(1.0, temperature), coefficient, atol=1e-8)
    np.testing.assert_allclose(stalled.drive, mean**2, atol=1e-8)


def test_a_million_diagonal_features_need_no_matrix():
    eigenvalues = 1 / jnp.arange(1.0, 1e6 + 1)
    shift = jnp.ones_like(eigenvalues)
    weighted = flow.weighted_covariance(eigenvalues, shift, 0.3)
    q = float(eigenvalues.sum())
    expected = weighted.scale * (1 - weighted.deflation * q) * eigenvalues
    np.testing.assert_allclose(weighted.apply(shift), expected, rtol=1e-9)
    path = flow.trajectory(TwoTaskProblem(eigenvalues, eigenvalues, FixedShift(shift), 0.3), GradientDescent(0.5, 3))
    assert path.moved.shape == (1_000_000,)
    assert 0 < path.finetune < q


def test_stall_is_the_generalised_eigenproblem(generator):
    """Eigenvalues of Σ_w against Σ: Z, and Z·rate along Δ; for Σ of any spectrum."""
    for noise_std in (0.0, 0.8):
        Sigma, shift = random_matrix(generator, P, 1.2), generator.standard_normal(P)
        stalled, weighted = (f(Sigma, shift, noise_std, 0.6) for f in (flow.stall, flow.weighted_covariance))
        values, vectors = scipy.linalg.eigh(np.asarray(weighted), Sigma)
        Z, v = float(stalled.mean_weight), shift @ Sigma @ shift + noise_std**2
        np.testing.assert_allclose(values, [Z * float(stalled.rate)] + [Z] * (P - 1), rtol=1e-9)
        np.testing.assert_allclose(abs(vectors[:, 0]), abs(np.asarray(stalled.direction)), rtol=1e-7)
        np.testing.assert_allclose(weighted.moment / (Sigma @ shift), Z * float(stalled.drive), rtol=1e-10)
        np.testing.assert_allclose(stalled.drive, 1 / (1 + 2 * v / 0.6), rtol=1e-12)
        assert (noise_std == 0) == bool(jnp.isclose(stalled.rate, stalled.drive, rtol=1e-9))


def test_sizes_that_do_not_vary_stall_as_gaussian_ones():
    gaussian = flow.stall([1.0, 1.0], [1.0, 0.0], 0.5, 0.4)
    same = flow.heavy_tailed_stall(1.0, 0.5, 0.4, [3.0, 3.0], [0.2, 0.7])
    np.testing.assert_allclose([same.speed, same.rate], [gaussian.mean_weight, gaussian.rate], rtol=1e-12)


@pytest.mark.parametrize("law", ["rademacher", "skewed"])
def test_the_fixed_point_does_not_depend_on_the_law_of_the_features(law, generator):
    """Laws that no claim has: E w x (r − τ xᵀΔ) = 0 in standard errors, and not for τ = 1."""
    Sigma, shift = random_matrix(generator, P, 1.0), generator.standard_normal(P)
    size = (50_000, P)
    latent = generator.choice([-1.0, 1.0], size) if law == "rademacher" else generator.exponential(size=size) - 1
    x = latent @ scipy.linalg.cholesky(Sigma)
    r = x @ shift + 0.6 * generator.standard_normal(len(x))
    wx = np.exp(-(r**2) / 0.8)[:, None] * x

    def z(tau):
        samples = wx * (r - tau * x @ shift)[:, None]
        return np.abs(samples.mean(axis=0)) / samples.std(axis=0) * len(samples) ** 0.5

    assert z(float(flow.fixed_point_coefficient(0.6, 0.8))).max() < 4.5
    assert z(1.0).max() > 8


def task(kind, generator, noise_std=0.5, u_size=0.3):
    covariance = KINDS[kind](generator)
    pretrain = random_matrix(generator, P, 0.4) + 0.1 * np.eye(P)
    u = u_size * generator.standard_normal(P)
    return TwoTaskProblem(pretrain, covariance, FixedShift(generator.standard_normal(P)), noise_std, u)


def plain_risks(problem, moved):
    left, away = moved - np.asarray(problem.gap_mean), moved + np.asarray(problem.pretrain_error)
    finetune, pretrain = matrix_of(problem.finetune_covariance), matrix_of(problem.pretrain_covariance)
    return left @ finetune @ left, away @ pretrain @ away


def by_matrices(problem, temperature):
    """θ − θ₁ of each fine-tuner, with Σ_w and E w x r as plain arrays."""
    matrix, first = moments_by_matrices(
        matrix_of(problem.finetune_covariance), np.asarray(problem.gap_mean), float(problem.noise_std), temperature
    )

    def descent(step_size, steps):
        moved = np.zeros(P)
        for _ in range(steps):
            moved = moved + step_size * (first - matrix @ moved)
        return moved

    def gradient_flow(time):
        generator = np.zeros((P + 1, P + 1))
        generator[:P, :P], generator[:P, P] = -matrix, first
        return scipy.linalg.expm(time * generator)[:P, P]

    return {
        "descent": descent,
        "flow": gradient_flow,
        "ridge": lambda penalty: np.linalg.solve(matrix + penalty * np.eye(P), first),
        "min-norm": lambda: np.linalg.pinv(matrix, rcond=1e-5) @ first,
    }


@pytest.mark.numerical
@pytest.mark.parametrize("temperature", [0.3, 4.0, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_trajectories_equal_plain_matrices(kind, temperature, generator, rtol):
    problem = task(kind, generator)
    reference = by_matrices(problem, temperature)
    cases = [
        (GradientDescent(0.3, [0, 1, 40]), [reference["descent"](0.3, k) for k in (0, 1, 40)], rtol),
        (GradientFlow([0.0, 0.7, 30.0]), [reference["flow"](t) for t in (0.0, 0.7, 30.0)], max(rtol, 1e-8)),
        (Ridge([0.02, 1.0]), [reference["ridge"](penalty) for penalty in (0.02, 1.0)], rtol),
        (GradientFlow([jnp.inf, jnp.inf]), [reference["min-norm"]()] * 2, max(rtol, 1e-8)),
        (0.4 * MinNorm(), 0.4 * reference["min-norm"](), max(rtol, 1e-8)),
    ]
    for filter, expected, tolerance in cases:
        path, expected = flow.trajectory(problem, filter, temperature), np.asarray(expected)
        risks = np.array([plain_risks(problem, moved) for moved in expected.reshape(-1, P)])
        np.testing.assert_allclose(path.moved, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
        for got, right in zip(path.risks, risks.T.reshape(2, *expected.shape[:-1])):
            np.testing.assert_allclose(got, right, rtol=tolerance, atol=tolerance * np.abs(risks).max())
        np.testing.assert_allclose(path.total, path.finetune + path.pretrain)


@pytest.mark.slow
def test_temperatures_broadcast_against_hyperparameters(generator):
    problem = task("diagonal", generator)
    T = jnp.array([0.5, 2.0, jnp.inf])
    for filter in (GradientDescent(0.4, jnp.arange(5)), GradientFlow(jnp.linspace(0, 3, 5)), Ridge(jnp.ones(5))):
        together = flow.trajectory(problem, filter, T[:, None])
        assert together.moved.shape == (3, 5, P)
        alone = flow.trajectory(problem, filter, 2.0)
        np.testing.assert_allclose(together.moved[1], alone.moved, rtol=1e-12)
    averaged = flow.trajectory(problem, jnp.array([0.2, 1.0, 0.5]) * MinNorm(), T)
    np.testing.assert_allclose(averaged.moved[2], 0.5 * problem.gap_mean, rtol=1e-12)
    default = flow.trajectory(problem, Ridge(1.0))
    v = flow.residual_variance(problem.finetune_covariance, problem.gap_mean, problem.noise_std)
    np.testing.assert_allclose(default.moved, flow.trajectory(problem, Ridge(1.0), flow.MEDIAN * v).moved, rtol=1e-12)


def test_new_values_do_not_recompile(generator):
    problem, traces = task("diagonal", generator), []

    @jax.jit
    def end(time, temperature):
        traces.append(None)
        return flow.trajectory(problem, GradientFlow(time), temperature).total

    for time, temperature in ((0.5, 0.7), (3.0, 0.2), (0.0, 5.0)):
        expected = flow.trajectory(problem, GradientFlow(time), temperature).total
        np.testing.assert_allclose(end(time, temperature), expected, rtol=1e-10)
    assert len(traces) == 1


@pytest.mark.parametrize("excess", [0.999, 1.001])
@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_the_step_size_is_refused_exactly_where_descent_diverges(kind, excess, generator):
    """2/s_max of Σ_w, not of ZΣ: the deflated direction allows larger steps; several degenerate spectra."""
    for eigenvalues in (generator.uniform(0.5, 1, P), np.array([2.0, 1, 1, 0.5, 0.1]), np.ones(P)):
        covariance = eigenvalues if kind == "diagonal" else random_matrix(generator, P, 0.5)
        shift = 3 * np.eye(P)[0] + 0.3 * generator.standard_normal(P)
        problem = TwoTaskProblem(np.ones(P), covariance, FixedShift(shift), 0.2)
        largest = np.linalg.eigvalsh(np.asarray(flow.weighted_covariance(covariance, shift, 0.2, 0.5)))[-1]
        filter = GradientDescent(2 * excess / largest, 10)
        if excess < 1:
            assert np.isfinite(flow.trajectory(problem, filter, 0.5).finetune)
        else:
            with pytest.raises(ValueError, match="step_size must be below 2/s_max of the weighted covariance"):
                flow.trajectory(problem, filter, 0.5)


@pytest.mark.slow
def test_float32_stays_float32(generator):
    problem = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), task("dense", generator))
    for filter in (GradientDescent(0.3, 5), GradientFlow(2.0), Ridge(0.1), MinNorm()):
        assert flow.trajectory(problem, filter).moved.dtype == jnp.float32


@pytest.mark.slow
def test_optima_agree_with_scipy_and_respect_the_lower_bound(generator):
    problem, weight = task("diagonal", generator, u_size=0.0), 0.7
    best = flow.population_optima(problem, weight)

    def total(filter, temperature=np.inf):
        path = flow.trajectory(problem, filter, temperature)
        return float(path.finetune + weight * path.pretrain)

    searches = {
        "early stopping": (lambda z: total(GradientFlow(np.exp(z[0]))), 1),
        "ridge + averaging": (lambda z: total(np.exp(z[1]) * Ridge(np.exp(z[0]))), 2),
        "flow": (lambda z: total(GradientFlow(np.exp(z[0])), np.exp(z[1])), 2),
        "flow + ridge": (lambda z: total(Ridge(np.exp(z[0])), np.exp(z[1])), 2),
        "averaging": (lambda z: total(np.exp(z[0]) * MinNorm()), 1),
    }
    for name, (objective, size) in searches.items():
        found = scipy.optimize.minimize(objective, np.zeros(size), method="Nelder-Mead", options={"xatol": 1e-6})
        assert best[name].total <= found.fun * (1 + 1e-5), name
    bound = best.pop("lower bound")
    for name, optimum in best.items():
        assert optimum.total >= bound.total * (1 - 1e-9), name
        np.testing.assert_allclose(optimum.total, optimum.risks.finetune + weight * optimum.risks.pretrain, rtol=1e-9)
        family = GradientFlow if "stopping" in name or name in ("flow", "flow + averaging") else Ridge
        fitted = MinNorm() if name == "averaging" else family(optimum.regularization)
        temperature = np.inf if name == "averaging" else optimum.temperature
        np.testing.assert_allclose(total(optimum.tau * fitted, temperature), optimum.total, rtol=1e-6)
    # what contains what
    assert best["flow + averaging"].total <= best["early stopping + averaging"].total * (1 + 1e-9)
    assert best["flow"].total <= min(best["averaging"].total, best["early stopping"].total) * (1 + 1e-6)
    assert best["ridge + averaging"].total <= best["flow + ridge"].total * (1 + 1e-6)


@pytest.mark.slow
def test_theorem_is_a_special_case_of_the_trajectory(generator):
    """Also the errors; the step of linfit is twice the paper's."""
    rho, beta, K = 0.6, 0.4, np.arange(12)
    block = np.array([[2.0, -0.5], [-0.5, 1.6]])
    problem = flow.two_task_problem(rho, block, p=4, distance=1.7)
    T = flow.temperature_from_beta(beta, rho, 1.7)
    mu = flow.mean_weight(1.7**2, T)
    for position, filter, temperature in (
        (flow.flow_iterates(rho, beta, K), GradientDescent(1 / mu, K), T),
        (flow.unweighted_iterates(rho, K), GradientDescent(1.0, K), np.inf),
    ):
        path, predicted = flow.trajectory(problem, filter, temperature), flow.errors(position, rho, block)
        np.testing.assert_allclose(path.moved[:, :2], 1.7 * (np.asarray(position) - [1, 0]), atol=1e-12)
        np.testing.assert_allclose(path.risks, 1.7**2 * np.asarray(predicted), atol=1e-12)


def test_iterates_are_powers_of_the_iteration_matrix():
    """Columns of powers, also for a step size that no claim has; what is left is stalled; ρ = 0 is averaging."""
    rho, beta = np.array([0.2, 0.5, 0.9]), np.array([0.3, 1.0, 0.05])
    for r, b in zip(rho, beta):
        T, covariance = flow.temperature_from_beta(b, r), flow.two_task_problem(r).finetune_covariance
        weighted = flow.weighted_covariance(covariance, [1.0, 0.0], 0.0, T)
        Q = np.eye(2) - np.asarray(weighted) / float(weighted.scale)
        np.testing.assert_allclose(np.linalg.matrix_power(Q, 9)[:, 0], flow.flow_iterates(r, b, 9), rtol=1e-11)
    late = np.asarray(flow.flow_iterates(rho, beta, 400.0))
    np.testing.assert_allclose(late[:, 1] / late[:, 0], flow.stalled_direction(rho, beta)[:, 1], rtol=1e-9)
    unweighted = np.linalg.matrix_power(np.eye(2) - 0.6 * np.array([[1, 0.5], [0.5, 1]]), 7)[:, 0]
    np.testing.assert_allclose(flow.unweighted_iterates(0.5, 7, 0.3), unweighted, rtol=1e-11)
    temperatures = flow.temperature_from_beta(beta, rho, 1.7)
    np.testing.assert_allclose(flow.beta_from_temperature(temperatures, rho, 1.7), beta, rtol=1e-10)
    straight = np.stack([1.3 ** -np.arange(5.0), np.zeros(5)], axis=1)
    np.testing.assert_allclose(flow.flow_iterates(0.0, 0.3, np.arange(5)), straight, atol=1e-15)
    block = np.array([[3.0, 0.4], [0.4, 1.5]])
    np.testing.assert_allclose(flow.best_flow(0.0, block).total, flow.best_averaging(block), rtol=1e-9)


@pytest.mark.parametrize(("share", "better"), [(-2.0, True), (0.9, True), (1.1, False)])
def test_remark_on_both_sides_of_its_condition(share, better, generator):
    """ēᵀΣ₁ē⊥ < ρ ēᵀΣ₁ē: FLOW beats averaging; beyond, it only comes arbitrarily close; never below the lower bound."""
    rho, s = generator.uniform(0.2, 0.9), generator.uniform(1.5, 6)
    c = share * rho * s
    block = np.array([[s, c], [c, 1 + 1.5 * c**2 / (s - 1)]])
    best, averaging = flow.best_flow(rho, block), float(flow.best_averaging(block))
    assert np.isfinite(best.steps) == better
    assert (best.total < averaging * (1 - 1e-5)) == better
    assert float(sum(pareto(flow.two_task_problem(rho, block), 1.0))) <= best.total * (1 + 1e-9)
    if not better:
        many = sum(flow.errors(flow.flow_iterates(rho, np.logspace(-6, 0, 400), 1e4), rho, block))
        assert averaging <= float(many.min()) < averaging * 1.001


def test_best_flow_is_the_least_of_a_grid():
    block, betas, steps = np.array([[2.7, -0.3], [-0.3, 1.4]]), np.linspace(1e-3, 1, 501), np.arange(1.0, 65)

    def total(beta, steps):
        return np.asarray(sum(flow.errors(flow.flow_iterates(0.76, beta, steps), 0.76, block)))

    best, grid = flow.best_flow(0.76, block), total(betas, steps[:, None])
    np.testing.assert_allclose(best.total, grid.min(), rtol=1e-4)
    assert best.total <= grid.min()
    np.testing.assert_allclose(total(best.beta, best.steps), best.total, rtol=1e-9)
    assert best.total < flow.best_averaging(block)


def couple(generator, share):
    """ρ, Σ₁ ⪰ I with ēᵀΣ₁ē⊥ = share·ρs, and the least err_tot of the plane and of averaging."""
    rho, s = generator.uniform(0.2, 0.9), generator.uniform(1.5, 6)
    c = share * rho * s
    d = 1 + generator.uniform(1, 4) * c**2 / (s - 1)
    plane = s - np.array([s, c]) @ np.linalg.solve([[1 + s, rho + c], [rho + c, 1 + d]], [s, c])
    return rho, np.array([[s, c], [c, d]]), plane, s / (1 + s)


def test_best_flow_finds_what_needs_many_steps(generator):
    """c/(ρs) in [0.9, 1): every K up to 2000 by matrix powers' eigenvalues, β by a grid that closes in."""
    steps = np.arange(1.0, 2001)[:, None]
    for share in (0.9, 0.93, 0.96, 0.98, 0.99):
        rho, block, plane, averaging = couple(generator, share)
        low, high = np.full(len(steps), np.log(1e-6)), np.zeros(len(steps))
        for _ in range(5):
            grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 41)
            beta = np.exp(grid)
            top, rest = (
                ((1 + beta * rho**2) / (1 + beta)) ** steps,
                (rho**2 * (1 - beta) / (1 - beta * rho**2)) ** steps,
            )
            x, y = top + rest * (beta * rho) ** 2, -beta * rho * (top - rest)
            x, y = x / (1 + (beta * rho) ** 2), y / (1 + (beta * rho) ** 2)
            total = x**2 + 2 * rho * x * y + y**2
            total = total + block[0, 0] * (x - 1) ** 2 + 2 * block[0, 1] * (x - 1) * y + block[1, 1] * y**2
            at, spacing = total.argmin(axis=1), (high - low) / 40
            middle = grid[np.arange(len(steps)), at]
            low, high = np.maximum(middle - spacing, np.log(1e-6)), np.minimum(middle + spacing, 0)
        best = flow.best_flow(rho, block)
        assert abs(best.total - total.min()) < 1e-6 * (averaging - plane) + 1e-13
        assert abs(best.steps / (total.min(axis=1).argmin() + 1) - 1) < 0.05
        assert plane < best.total < averaging


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_best_flow_however_close_to_its_condition(distance, generator):
    """There it comes ever closer to the least err_tot of the plane, with β and 1/K in proportion to the distance."""
    rho, block, plane, averaging = couple(generator, 1 - distance)
    best = flow.best_flow(rho, block)
    assert (averaging - best.total) / (averaging - plane) > 1 - 1e-3
    assert 0.001 < best.beta / distance < 10
    assert 0.1 < best.steps * distance < 100
    for share in (1 + distance, 1.0):
        rho, block, _, averaging = couple(generator, share)
        block[0, 1] = max(block[0, 1], rho * block[0, 0])
        limit = flow.best_flow(rho, block)
        assert (limit.steps, limit.beta) == (np.inf, 0)
        np.testing.assert_allclose(limit.total, averaging, rtol=1e-15)


def all_the_way(predicted, values):
    """As if noise did not matter."""
    variance = values["noise_std"] ** 2
    return predicted / flow.fixed_point_coefficient(variance**0.5, values["warmth"] * flow.MEDIAN * (1 + variance))


WRONG = {
    "F1: hard samples first": ("F1", lambda predicted, _: predicted[::-1]),
    "F2: moment not damped": ("F2", lambda predicted, _: predicted * np.repeat([1, predicted[0] ** -2], [17, 4])),
    "F2: no mean weight": ("F2", lambda predicted, _: predicted / predicted[0]),
    "F2.median: the mean": ("F2.median", lambda *_: 0.6827),
    "F3: rate = drive": ("F3", lambda predicted, _: predicted[[3, 1, 2, 3]]),
    "F3.tails: by 10%": ("F3.tails", lambda predicted, _: predicted * 1.1),
    "F3.path: by 0.01%": ("F3.path", lambda predicted, _: predicted * 1.0001),
    "F4: all the way": ("F4", all_the_way),
    "F4.ridge: by 0.01%": ("F4.ridge", lambda predicted, _: predicted * 1.0001),
    "F5: all negative": ("F5", lambda predicted, _: -np.abs(predicted)),
    "F6: one step more": ("F6", lambda predicted, _: np.roll(predicted, 1, axis=0)),
    "F6.vanilla: same sign": ("F6.vanilla", lambda predicted, _: np.abs(predicted)),
    "F6.stalled: no denominator": ("F6.stalled", lambda predicted, values: predicted * (1 + values["beta"])),
    "F6.averaging: half way": ("F6.averaging", lambda *_: 0.5),
    "F6.remark: by 20%": ("F6.remark", lambda *_: 0.2),
    "F6.better: by 20%": ("F6.better", lambda *_: 0.2),
    "F6.equal: to the lower bound": ("F6.equal", lambda predicted, _: 0.9 * predicted),
}


def claim_of(id):
    return next(claim for claim in claims_named([id]) if claim.id == id)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_stubs_are_rejected(name):
    id, spoil = WRONG[name]

    def sides(normal, **values):
        predicted, measured = claim_of(id).sides(normal, **values)
        return spoil(np.asarray(predicted), values), measured

    (verdict,) = verify([claim_of(id)._replace(sides=sides)], instances=2, seed=1)
    assert verdict.worst.error is None
    assert not verdict.holds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "values"),
    [
        ("F2", {"tail": 1.5}),
        ("F2.median", {"noise_tail": 1.5}),
        ("F3", {"tail": 1.5}),
        ("F4", {"noise_tail": 2.0, "noise_std": 1.0, "warmth": 1.0}),
        ("F5", {"surplus": 1}),
        ("F6", {"noise_std": 0.1}),
        ("F6.better", {"rho": 0.0}),
        ("F6.equal", {"rho": 0.3, "coupling": 0.0}),
    ],
)
def test_claims_fail_outside_their_assumptions(id, values):
    claim = claim_of(id)
    held = {name: claim.parameters[name]._replace(low=value, high=value) for name, value in values.items()}
    (verdict,) = verify([claim._replace(parameters=claim.parameters | held)], instances=4, seed=0)
    assert not verdict.holds


PROBLEM = TwoTaskProblem([1.0, 1.0], [1.0, 2.0], FixedShift([1.0, 1.0]), 0.1)
RANDOM = TwoTaskProblem([1.0, 1.0], [1.0, 2.0], RandomShift([1.0, 1.0]), 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.damping(-1.0, 1.0), "variance must be non-negative"),
        (lambda: flow.damping(1.0, np.nan), "temperature must be non-negative"),
        (lambda: flow.residual_variance([1.0, 1.0], [1.0], 0.0), "shift must match covariance: expected size 2, got 1"),
        (lambda: flow.residual_variance([1.0], [1.0], -1.0), "noise_std must be non-negative"),
        (lambda: flow.median_temperature(-1.0), "residual_variance must be non-negative"),
        (lambda: flow.mean_weight(np.inf), "residual_variance must be finite"),
        (lambda: flow.weighted_covariance([-1.0], [1.0], 0.0), "covariance: eigenvalues must be non-negative"),
        (lambda: flow.weighted_covariance([1.0], [np.nan], 0.0), "shift must be finite"),
        (lambda: flow.weighted_covariance([1.0], [1.0], [0.0]), "noise_std must have 0 dimension"),
        (lambda: flow.weighted_covariance([1.0], [1.0], 0.0, [1.0]), "temperature must have 0 dimension"),
        (lambda: flow.weighted_covariance([1.0], [1.0], 0.0, -1.0), "temperature must be non-negative"),
        (lambda: flow.weighted_covariance(np.ones((2, 3)), [1.0, 1.0], 0.0), "covariance: .* must be square"),
        (lambda: flow.stall([1.0, 0.0], [0.0, 1.0], 0.1), "shift must have ΔᵀΣΔ > 0"),
        (lambda: flow.heavy_tailed_stall(1.0, 0.0, 1.0, [1.0], [1.0, 2.0]), "probabilities must match scales"),
        (lambda: flow.heavy_tailed_stall(1.0, 0.0, 1.0, [-1.0], [1.0]), "scales must be non-negative"),
        (lambda: flow.lognormal_sizes(-1.0), "spread must be non-negative"),
        (lambda: flow.lognormal_sizes(1.0, 0), "nodes must be at least 1"),
        (lambda: flow.fixed_point_coefficient(-1.0, 1.0), "noise_std must be non-negative"),
        (lambda: flow.fixed_point_coefficient(1.0, -1.0), "temperature must be non-negative"),
        (lambda: flow.trajectory(RANDOM, MinNorm()), "shift must be a linfit.FixedShift"),
        (lambda: flow.trajectory(PROBLEM, MinNorm(), 0.0), "temperature must be positive"),
        (lambda: flow.trajectory(PROBLEM, "ridge"), "filter must be MinNorm, Ridge"),
        (lambda: flow.trajectory(PROBLEM, Ridge([1.0, 2.0]), [1.0, 2.0, 3.0]), "temperature must broadcast"),
        (lambda: flow.trajectory(PROBLEM, [1.0, 2.0] * Ridge(1.0), [1.0, 2.0, 3.0]), "tau must broadcast"),
        (lambda: flow.trajectory(PROBLEM, GradientDescent(9.0, 1)), r"step_size must be below 2/s_max .* got 9"),
        (lambda: flow.population_optima(RANDOM), "shift must be a linfit.FixedShift"),
        (lambda: flow.population_optima(PROBLEM, -1.0), "weight must be non-negative"),
        (lambda: flow.temperature_from_beta(0.0, 0.5), "beta must be positive"),
        (lambda: flow.temperature_from_beta(1.5, 0.5), r"beta must be in \(0, 1\]"),
        (lambda: flow.temperature_from_beta(0.5, 0.5, 0.0), "distance must be positive"),
        (lambda: flow.beta_from_temperature(2.1, 0.5), "temperature must be at most"),
        (lambda: flow.beta_from_temperature(0.0, 0.5), "temperature must be positive"),
        (lambda: flow.two_task_problem(1.0), r"rho must be in \[0, 1\)"),
        (lambda: flow.two_task_problem(0.5, p=1), "p must be at least 2"),
        (lambda: flow.two_task_problem(0.5, np.eye(3)), r"pretrain must be the block \(2, 2\)"),
        (lambda: flow.two_task_problem(0.5, 0.9 * np.eye(2)), "pretrain must be Σ₁ ⪰ I, got eigenvalue 0.9"),
        (lambda: flow.errors([1.0, 0.0], 0.5, [[2.0, 1.0], [0.0, 2.0]]), "pretrain must be symmetric"),
        (lambda: flow.errors([1.0, 0.0, 0.0], 0.5), "position .* must match the plane"),
        (lambda: flow.unweighted_iterates(-0.1, 1), "rho must be non-negative"),
        (lambda: flow.unweighted_iterates(0.5, 1.5), "steps must be whole numbers"),
        (lambda: flow.unweighted_iterates(0.5, 1, 0.67), "step_size must be below"),
        (lambda: flow.flow_iterates(0.5, 0.5, -1), "steps must be non-negative"),
        (lambda: flow.stalled_direction(1.0, 0.5), r"rho must be in \[0, 1\)"),
        (lambda: flow.best_averaging(np.zeros((2, 2))), "pretrain must be Σ₁ ⪰ I"),
        (lambda: flow.best_flow(1.0), r"rho must be in \[0, 1\)"),
        (lambda: flow.stalled_direction(0.5, 2.0), r"beta must be in \(0, 1\]"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_weighted_covariance_may_be_wrapped_like_any_other():
    """As the covariance of a problem: Σ₁ weighted by FLOW, say."""
    weighted = flow.weighted_covariance(Diagonal([1.0, 2.0]), [1.0, 1.0], 0.3)
    problem = TwoTaskProblem(weighted, [1.0, 1.0], FixedShift([1.0, 0.0]), 0.0)
    moved = flow.trajectory(problem, 0.5 * MinNorm(), np.inf)
    np.testing.assert_allclose(moved.pretrain, 0.25 * np.asarray(weighted)[0, 0], rtol=1e-12)
