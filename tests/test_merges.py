"""Merges of runs: forms on given designs by brute force, predicted ones by sampling, and what acts on coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from linfit import (
    Fit,
    GradientDescent,
    GradientFlow,
    MergeForm,
    MinNorm,
    RandomShift,
    Ridge,
    TwoTaskProblem,
    aligned_problem,
    exact_form,
    risk_forms,
    spectra,
)
from sims.merges import sample_moves
from tests.oracles import fitted_operator
from theory.equivalents import along
from theory.merges import Run, _Coordinates, _elect, _inside, _inside_both, _trim, dropped, elected, form, soup, trimmed

P = 60
MIXING = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.5, 0.8]])
"""Gaps of three tasks from independent ones."""


def tasks_of(generator, p=P):
    """Second moments (3, 3, p), means (3, p) and a test spectrum of three correlated tasks, uneven over coordinates."""
    scale = generator.uniform(0.1, 1, p) * np.where(np.arange(p) % 4 == 0, 3, 0.3) / np.sqrt(p)
    mean = 0.7 * scale * np.array([[1.0], [-0.5], [0.2]])
    covariance = (MIXING @ MIXING.T)[:, :, None] * scale**2
    return covariance + mean[:, None] * mean, mean, generator.uniform(0.2, 2, p)


def spectra_of(p=P):
    """One with zeros, one without."""
    first = np.arange(1.0, p + 1) ** -0.7
    first[-p // 10 :] = 0
    return first, np.exp(-3 * np.arange(p) / p)


def runs_of(p=P):
    """Four runs on three tasks: every family of filters, n below and above p."""
    first, second = spectra_of(p)
    return [
        Run(0, first, p // 3, 0.3, MinNorm()),
        Run(0, second, p // 2, 0.2, Ridge(0.05)),
        Run(1, first, p // 3, 0.4, 0.8 * GradientFlow(20.0)),
        Run(2, second, 3 * p // 2, 0.3, GradientDescent(0.1, 30)),
    ]


WEIGHTS = np.array([[1.0, 0, 0, 0], [0.5, 0.3, -0.2, 0.4], [0.25] * 4, [-1.0, 0.5, 2.0, 0.1]])


@pytest.mark.numerical
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("test", [1, None])
def test_exact_form_by_brute_force(generator, rtol, test, shared):
    p = 12
    targets, mean, M = tasks_of(generator, p)
    u = 0.3 * generator.standard_normal(p) if test is None else None
    X = [generator.standard_normal((n, p)) for n in (5, 5, 15)]
    filters = (MinNorm(), Ridge(0.3), GradientFlow(2.0))
    data = (0, 0, 1) if shared else (None, None, None)
    X[1] = X[0] if shared else X[1]
    sigma = (0.5, 0.5, 0.2)
    fits = [Fit(t, *rest) for t, *rest in zip((0, 2, 1), X, sigma, filters, data)]
    found = exact_form(fits, targets, M, test, u, mean=mean)
    goal = np.zeros(p) if u is None else -u  # the gap of the pretraining domain
    maps = [fitted_operator(X[k], lambda s, k=k: np.asarray(filters[k](s))) for k in range(3)]

    def second(a, b):  # E Δ_aΔ_bᵀ (p, p); None: the pretraining domain
        left, right = (goal if t is None else mean[t] for t in (a, b))
        spread = 0 if None in (a, b) else np.diag(targets[a, b] - mean[a] * mean[b])
        return spread + np.outer(left, right)

    for a in ([1.0, 0, 0], [0.4, -0.7, 0.9]):
        risk = np.trace(np.diag(M) @ second(test, test))
        for k, l in np.ndindex(3, 3):  # noqa: E741
            product = maps[k] @ X[k] @ second((0, 2, 1)[k], (0, 2, 1)[l]) @ X[l].T @ maps[l].T
            if k == l or (shared and {k, l} == {0, 1}):
                product = product + sigma[k] ** 2 * maps[k] @ maps[l].T
            risk += a[k] * a[l] * np.trace(product * M)
        for k in range(3):
            risk -= 2 * a[k] * np.trace(maps[k] @ X[k] @ second((0, 2, 1)[k], test) * M)
        np.testing.assert_allclose(found(a), risk, rtol=10 * rtol, atol=rtol)


@pytest.mark.numerical
def test_one_run_is_the_risk_of_one_design(generator, rtol):
    problem = aligned_problem(spectra.power_law(20), noise_std=0.4, pretrain_risk=0.3)
    X, filter = generator.standard_normal((7, 20)), Ridge(0.1)
    forms, u = risk_forms(X, problem), np.asarray(problem.pretrain_error)
    targets = (np.asarray(problem.gap_covariance.diagonal()) + u**2)[None, None]
    fit = Fit(0, X, 0.4, filter)
    cases = (
        (problem.finetune_covariance, 0, None, forms.finetune),
        (problem.pretrain_covariance, None, u, forms.pretrain),
    )
    for covariance, test, error, expected in cases:
        found = exact_form([fit], targets, covariance, test, error, mean=-u[None])
        for tau in (0.3, 1.0, -0.5):
            np.testing.assert_allclose(found([tau]), expected(filter, tau).total, rtol=10 * rtol)


@pytest.mark.numerical
@pytest.mark.parametrize(
    "filter", [MinNorm(), Ridge(0.05), GradientFlow(30.0), GradientDescent(0.2, 40), 0.6 * Ridge(0.1)]
)
def test_one_run_is_the_equivalent(filter, rtol):
    """K = 1 is the parabola of `theory.equivalents`, on both domains."""
    generator = np.random.default_rng(3)
    s, pretrain, u = np.arange(1.0, 201) ** -0.8, generator.uniform(0.3, 2, 200), 0.1 * generator.standard_normal(200)
    spread = generator.uniform(0.1, 1.5, 200) / 200
    problem = TwoTaskProblem(pretrain, s, RandomShift(spread), 0.5, u)
    run, targets = Run(0, s, 80, 0.5, filter), (spread + u**2)[None, None]
    expected = along(problem, 80, filter)
    for M, error, parabola in ((s, None, expected.finetune), (pretrain, u, expected.pretrain)):
        found = form([run], targets, M, 0, error)
        np.testing.assert_allclose(
            found([[0.4], [1.3]]), parabola(np.array([0.4, 1.3])).total, rtol=max(1e-6, 2 * rtol)
        )
        np.testing.assert_allclose(found.optimal_weights()[0], parabola.optimal_tau, rtol=max(1e-6, 2 * rtol))
    assert form([run], targets, pretrain, None, u).linear == form([run], targets, pretrain, 0, u).linear


def standard_errors(samples, expected, least=1e-12):
    return np.abs(samples.mean(axis=0) - expected) / (samples.std(axis=0) / len(samples) ** 0.5 + least)


@pytest.mark.slow
def test_predictions_by_sampling(seed):
    """Every entry of every form, from raw data; relative error 3/n of the scale beyond 4.5 standard errors."""
    p, generator = 240, np.random.default_rng(seed)
    targets, mean, M = tasks_of(generator, p)
    runs, keep, rotation = runs_of(p), 0.3, np.linalg.qr(generator.standard_normal((p, p)))[0]
    forms = {
        "plain": form(runs, targets, M, 0, mean=mean),
        "trimmed": trimmed(runs, targets, M, 0, keep, mean=mean),
        "elected": elected(runs, targets, M, 0, keep, mean=mean),
        "trimmed elsewhere": trimmed(runs, targets, M, 0, keep, mean=mean, basis=rotation),
        "elected elsewhere": elected(runs, targets, M, 0, keep, mean=mean, basis=rotation),
    }
    moves, gaps = sample_moves(jax.random.key(seed), runs, targets, 200, mean=mean)
    moves, gaps = np.asarray(moves), np.asarray(gaps)
    rotated = moves @ rotation.T
    outputs = {
        "plain": moves,
        "trimmed": plain_trim(moves, keep),
        "elected": plain_elect(plain_trim(moves, keep)),
        "trimmed elsewhere": plain_trim(rotated, keep) @ rotation,
        "elected elsewhere": plain_elect(plain_trim(rotated, keep)) @ rotation,
    }
    for name, h in outputs.items():
        linear, quadratic = np.einsum("rkp,rp->rk", h * M, gaps[:, 0]), np.einsum("rkp,rlp->rkl", h * M, h)
        for samples, expected in ((linear, forms[name].linear), (quadratic, forms[name].quadratic)):
            slack = 3 / p * np.abs(forms[name].quadratic).max() / samples.std(axis=0) * len(samples) ** 0.5
            assert (standard_errors(samples, np.asarray(expected)) < 4.5 + slack).all(), name


def plain_trim(moves, keep):
    """The loop over runs that a user would write."""
    result = np.zeros_like(moves)
    for index in np.ndindex(moves.shape[:2]):
        kept = np.argsort(-np.abs(moves[index]))[: round(keep * moves.shape[-1])]
        result[index][kept] = moves[index][kept]
    return result


def plain_elect(moves):
    """(R, K, p) → (R, 1, p)."""
    sign = np.sign(moves.sum(axis=1, keepdims=True))
    agree = np.sign(moves) == sign
    agree &= sign != 0
    return np.sum(moves * agree, axis=1, keepdims=True) / np.maximum(agree.sum(axis=1, keepdims=True), 1)


@pytest.mark.parametrize("correlation", [0.5, -0.6, 0.99, 0.9999])
def test_truncated_products_by_quadrature(correlation):
    mean, other, std, other_std, t, u = 0.3, -0.7, 1.0, 2.0, 1.2, 0.8

    def conditional(x):
        centre, width = other + correlation * other_std / std * (x - mean), other_std * (1 - correlation**2) ** 0.5
        low, high = (-u - centre) / width, (u - centre) / width
        part = centre * np.diff(scipy.stats.norm.cdf([low, high])) - width * np.diff(scipy.stats.norm.pdf([low, high]))
        return x * scipy.stats.norm.pdf(x, mean, std) * part[0]

    expected = scipy.integrate.quad(conditional, -t, t, limit=200, points=np.linspace(-t, t, 20))[0]
    arrays = [jnp.array([value]) for value in (mean, other, std, other_std, t, u, correlation * std * other_std)]
    single = [_inside(*(part[0] for part in arrays[i : i + 6 : 2]))[0] for i in (0, 1)]
    tolerance = 1e-9 if jax.config.jax_enable_x64 else 1e-4
    assert abs(float(_inside_both(*arrays, single[0] * single[1])[0]) - expected) < tolerance


def test_moments_of_an_election(seed):
    """Three correlated runs with means, of which half of each is kept, against a million draws."""
    generator, q = np.random.default_rng(seed), 50
    covariance = (MIXING @ MIXING.T)[:, :, None] * np.linspace(0.5, 2, q)
    mean = 0.5 * np.linspace(-1, 1, q) * np.array([[1.0], [0.4], [-0.7]])
    at = _Coordinates(jnp.asarray(mean), jnp.asarray(covariance))
    threshold, after = _trim(at, jnp.asarray(0.5))
    outputs = _elect(at, threshold, after)
    roots = np.linalg.cholesky(np.moveaxis(covariance, -1, 0))
    draws = []
    for _ in range(20):
        X = mean + np.einsum("qkl,rlq->rkq", roots, generator.standard_normal((1000, 3, q)))
        h = plain_elect(np.where(np.abs(X) > np.asarray(threshold)[:, None], X, 0))[:, 0]
        share = np.mean(np.abs(X) > np.asarray(threshold)[:, None])
        draws.append([share, (h**2).mean(), (h * mean[0]).mean(), (h * (X[:, 1] - mean[1])).mean()])
    found = [0.5, outputs.second[0, 0].mean(), (outputs.mean[0] * mean[0]).mean()]
    found.append(jnp.einsum("kq,kq->q", outputs.slope[0], covariance[:, 1]).mean())
    assert (standard_errors(np.array(draws), np.array(found), least=2e-3 * np.abs(found)) < 4.5).all()


@pytest.mark.numerical
def test_limits(generator, rtol):
    targets, mean, M = tasks_of(generator)
    runs = runs_of()
    plain = form(runs, targets, M, 0, mean=mean)

    def close(one, other, tolerance=1.0):
        for name in ("constant", "linear", "quadratic"):
            scale = np.abs(getattr(other, name)).max()
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=tolerance * 100 * rtol * scale)

    for basis in ("eigen", "generic", np.linalg.qr(generator.standard_normal((P, P)))[0]):
        close(trimmed(runs, targets, M, 0, 1.0, mean=mean, basis=basis), plain)
        close(dropped(runs, targets, M, 0, 0.0, mean=mean, basis=basis), plain)
    alone = runs[:1]
    close(elected(alone, targets, M, 0, 0.4, mean=mean), trimmed(alone, targets, M, 0, 0.4, mean=mean), 10)
    identity = np.eye(P)
    close(trimmed(runs, targets, M, 0, 0.4, mean=mean, basis=identity), trimmed(runs, targets, M, 0, 0.4, mean=mean))
    assert (np.linalg.eigvalsh(dropped(runs, targets, M, 0, 0.5, mean=mean).quadratic - plain.quadratic) > 0).all()


@pytest.mark.numerical
def test_in_generic_coordinates_nothing_beats_the_best_weights(generator):
    targets, mean, M = tasks_of(generator)
    runs = runs_of()
    least = form(runs, targets, M, 0, mean=mean).optimal_risk()
    for keep in (0.05, 0.5):
        for method in (trimmed, elected):
            assert method(runs, targets, M, 0, keep, mean=mean, basis="generic").optimal_risk() > least


@pytest.mark.numerical
def test_soups(generator, rtol):
    targets, _, M = tasks_of(generator)
    run = runs_of()[1]
    law = soup(run, targets, M, 1)
    for count in (1, 2, 7):
        plain = form([run] * count, targets, M, 1)
        np.testing.assert_allclose(law(count, 1.2), plain(np.full(count, 1.2 / count)), rtol=10 * rtol)
        np.testing.assert_allclose(plain.optimal_weights(), law.optimal_tau(count) / count, rtol=1e3 * rtol)
        np.testing.assert_allclose(
            plain.optimal_weights(shared_tau=True), law.optimal_tau(count) / count, rtol=1e2 * rtol
        )
        np.testing.assert_allclose(plain.optimal_risk(), law.optimal_risk(count), rtol=1e2 * rtol)
    taus = law.optimal_tau(np.arange(1, 20))
    assert (jnp.diff(taus) > 0).all()
    own = soup(run, targets, run.spectrum, 0)
    np.testing.assert_allclose(own(1e12), own.lower_bound(), rtol=10 * rtol)


def random_form(generator, size):
    factor = generator.standard_normal((size, size + 2))
    goal = generator.standard_normal(size + 2)
    return MergeForm(goal @ goal, factor @ goal, factor @ factor.T)


@pytest.mark.parametrize(
    "options", [{}, {"nonnegative": True}, {"sum_to_one": True}, {"nonnegative": True, "sum_to_one": True}]
)
def test_best_weights_by_search(seed, options):
    generator = np.random.default_rng(seed)
    for size in (1, 2, 5, 5, 5):
        found = random_form(generator, size)
        weights = np.asarray(found.optimal_weights(**options))
        bounds = [(0, None)] * size if "nonnegative" in options else None
        constraints = {"type": "eq", "fun": lambda a: a.sum() - 1} if "sum_to_one" in options else ()
        c, b, B = (np.asarray(part) for part in (found.constant, found.linear, found.quadratic))

        def objective(a, c=c, b=b, B=B):
            return float(c - 2 * a @ b + a @ B @ a)

        limits = {"bounds": bounds, "constraints": constraints, "tol": 1e-12}
        search = scipy.optimize.minimize(objective, np.full(size, 1 / size), **limits)
        assert objective(weights) < search.fun + 1e-6 * abs(search.fun)
        assert "nonnegative" not in options or (weights >= 0).all()
        assert "sum_to_one" not in options or weights.sum() == pytest.approx(1)
        np.testing.assert_allclose(found.optimal_risk(**options), objective(weights), rtol=1e-6)


def test_weights_of_copies_and_of_runs_that_do_not_move():
    copies = MergeForm(1.0, [0.5] * 3, np.ones((3, 3)))
    np.testing.assert_allclose(copies.optimal_weights(), 0.5 / 3)
    np.testing.assert_allclose(copies.gains(), 0, atol=1e-6)
    still = MergeForm(1.0, [0.5, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    for options in ({}, {"nonnegative": True}):
        np.testing.assert_allclose(still.optimal_weights(**options), [0.5, 0])
    # 0.5 of the first, the rest for the one that does not move
    np.testing.assert_allclose(still.optimal_weights(nonnegative=True, sum_to_one=True), [0.5, 0.5], atol=1e-6)
    nothing = MergeForm(1.0, [0.0, 0.0], np.zeros((2, 2)))
    np.testing.assert_allclose(nothing.optimal_weights(sum_to_one=True), 0.5)
    np.testing.assert_allclose(nothing.optimal_weights(shared_tau=True), 0)


@pytest.mark.numerical
def test_gains_and_slopes(generator, rtol):
    found = random_form(generator, 4)
    best, inverse = np.asarray(found.optimal_weights()), np.linalg.inv(found.quadratic)
    np.testing.assert_allclose(found.gains(), best**2 / np.diag(inverse), rtol=1e4 * rtol)
    np.testing.assert_allclose(found.slope(best), 0, atol=1e3 * rtol)
    a, step = np.array([0.3, -0.2, 0.5, 0.1]), 1e-2
    rates = [(found(a - step * e) - found(a + step * e)) / (4 * step) for e in np.eye(4)]
    np.testing.assert_allclose(found.slope(a), rates, rtol=1e5 * rtol, atol=1e5 * rtol)
    mixed = found + 0.5 * random_form(generator, 4)
    assert mixed(mixed.optimal_weights()) == pytest.approx(float(mixed.optimal_risk()))


@pytest.mark.numerical
def test_zero_eigenvalues_and_no_noise(dtype):
    """Nothing moves where there is no data; with n > rank and no noise everything else is learned at once."""
    s = jnp.array([2.0, 1.0, 0.5, 0.0], dtype)
    targets = jnp.ones((1, 1, 4), dtype)
    run = Run(0, s, 10.0, 0.0, MinNorm())
    for found in (form([run, run], targets, s, 0), trimmed([run, run], targets, s, 0, 1.0)):
        tolerance = float(jnp.finfo(dtype).eps) ** 0.5
        np.testing.assert_allclose(found.linear, 3.5, rtol=tolerance)
        np.testing.assert_allclose(found.quadratic, 3.5, rtol=tolerance)
        assert float(found([1.0, 0.0])) == pytest.approx(0, abs=tolerance)
    for method in (trimmed, elected):
        assert np.isfinite(method([run, run], targets, s, 0, 0.5).quadratic).all()


def perturbed(penalty, keep, method):
    """A risk as a function of a penalty and a share, everything traced."""
    generator = np.random.default_rng(0)
    targets, _, M = tasks_of(generator)
    first, second = spectra_of()
    runs = [Run(0, first, 20, 0.3, Ridge(penalty)), Run(0, second, 40, 0.3, MinNorm())]
    options = {} if method is form else {"keep": keep} if method is not dropped else {"drop": keep}
    found = method(runs, targets, M, 0, **options)
    return found.optimal_risk(nonnegative=True) + found.optimal_risk()


@pytest.mark.slow
@pytest.mark.parametrize("method", [form, dropped, trimmed, elected])
def test_transformations(method):
    jitted = jax.jit(lambda penalty, keep: perturbed(penalty, keep, method))
    value, step = jitted(0.1, 0.4), 1e-4
    np.testing.assert_allclose(value, perturbed(0.1, 0.4, method), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda penalty, keep: perturbed(penalty, keep, method), argnums=(0, 1)))
    if method is elected:
        with pytest.raises(ValueError, match="elected has no derivative"):
            gradient(0.1, 0.4)
    else:
        differences = [(jitted(0.1 + step, 0.4) - jitted(0.1 - step, 0.4)) / 2 / step]
        differences.append((jitted(0.1, 0.4 + step) - jitted(0.1, 0.4 - step)) / 2 / step)
        np.testing.assert_allclose(gradient(0.1, 0.4), differences, rtol=1e-4, atol=1e-7)
    many = jax.vmap(lambda penalty: perturbed(penalty, 0.4, method))(jnp.array([0.1, 0.3]))
    np.testing.assert_allclose(many[0], value, rtol=1e-6)
    assert many[1] != many[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, T, M: form([], T, M, 0), "runs must hold at least one"),
        (lambda run, T, M: form([run], T, M, 3), "task must be among 0 … 2, the tasks of the targets, got 3"),
        (lambda run, T, M: form([run], T, M, -1), "task must be among"),
        (lambda run, T, M: form([run], T[0], M, 0), "targets must have 3"),
        (lambda run, T, M: form([run], T[:2], M, 0), "targets must match its other axis"),
        (lambda run, T, M: form([run], -T, M, 0), "targets of each task with itself must be non-negative"),
        (lambda run, T, M: form([run], T, M[1:], 0), "spectrum must match the targets: expected size 60, got 59"),
        (lambda run, T, M: form([run], T, M, 0, M[1:]), "pretrain_error must match"),
        (lambda run, T, M: form([run], T, M, 0, mean=M), "mean must have 2"),
        (lambda run, T, M: Run(0.5, M, 5, 0.1, MinNorm()), "task must be an integer"),
        (lambda run, T, M: Run(0, M, 0, 0.1, MinNorm()), "n must be positive"),
        (lambda run, T, M: Run(0, M, 5, -0.1, MinNorm()), "noise_std must be non-negative"),
        (lambda run, T, M: trimmed([run], T, M, 0, 0.0), "keep must be positive"),
        (lambda run, T, M: trimmed([run], T, M, 0, 1.5), "keep must be at most 1"),
        (lambda run, T, M: dropped([run], T, M, 0, 1.0), "drop must be below 1"),
        (lambda run, T, M: trimmed([run], T, M, 0, 0.5, basis="other"), "basis must be 'eigen', 'generic'"),
        (lambda run, T, M: trimmed([run], T, M, 0, 0.5, basis=np.ones((60, 60))), "basis must be orthogonal"),
        (lambda run, T, M: form([run], T, M, 0)([1.0, 2.0]), "weights must have shape"),
        (lambda run, T, M: form([run], T, M, 0).optimal_weights(shared_tau=True, sum_to_one=True), "shared_tau"),
        (lambda run, T, M: exact_form([], T, M, 0), "fits must hold"),
        (lambda run, T, M: exact_form([Fit(0, np.ones((2, 5)), 0.1, MinNorm())], T, M, 0), "X must match"),
        (lambda run, T, M: form([Run(0, M, 5, 0.1, GradientDescent(1e3, 4))], T, M, 0), "step_size must be below"),
    ],
)
def test_bad_input(generator, call, message):
    targets, _, M = tasks_of(generator)
    with pytest.raises(ValueError, match=message):
        call(runs_of()[0], targets, M)
