"""Leave-one-out against refitting n times, and what `select` makes of it."""

import jax
import numpy as np
import pytest

from linfit import Ridge, fine_tune, leave_one_out, select
from linfit.selection import default_penalties

PENALTIES = np.array([0.0, 1e-3, 0.2, 5.0])
TAUS = np.array([[0.0], [0.4], [1.0], [1.3]])


def independent(generator, n, p):
    return generator.standard_normal((n, p)) * np.linspace(1.5, 0.4, p)


def duplicated(generator, n, p):
    X = independent(generator, n, p)
    X[-1], X[-2] = X[0], -2 * X[1]
    return X


def lonely_feature(generator, n, p):
    """One feature that a single row carries: without that row the others say nothing about it."""
    X = independent(generator, n, p)
    X[:, 2] = 0
    X[4, 2] = 1.7
    return X


def zero_row(generator, n, p):
    X = independent(generator, n, p)
    X[3] = 0
    return X


DESIGNS = {
    "wide": (independent, 8, 20),
    "square": (independent, 9, 9),
    "tall": (independent, 20, 6),
    "wide-duplicated": (duplicated, 8, 20),
    "tall-duplicated": (duplicated, 20, 6),
    "tall-lonely-feature": (lonely_feature, 15, 6),
    "wide-zero-row": (zero_row, 8, 20),
    "two-rows": (independent, 2, 3),
}


def data(name, generator, k=None):
    build, n, p = DESIGNS[name]
    tail = () if k is None else (k,)
    X = build(generator, n, p)
    return X, generator.standard_normal((n, *tail)) + 0.3, generator.standard_normal((p, *tail))


def refitted(X, y, theta_1, penalty, tau):
    """Residual of each sample under the model refitted without it, the penalty nλ of all samples kept."""
    n, p = X.shape
    residuals = []
    for i in range(n):
        rows, target = np.delete(X, i, 0), np.delete(y - X @ theta_1, i, 0)
        if penalty == 0:
            step = np.linalg.pinv(rows, rcond=1e-12) @ target
        else:
            step = np.linalg.solve(rows.T @ rows + n * penalty * np.eye(p), rows.T @ target)
        residuals.append(y[i] - X[i] @ (theta_1 + tau * step))
    return np.array(residuals)


def assert_equals_refitting(residuals, X, y, theta_1, rtol):
    for i, j in np.ndindex(len(TAUS), len(PENALTIES)):
        expected = refitted(X, y, theta_1, PENALTIES[j], TAUS[i, 0])
        np.testing.assert_allclose(residuals[i, j], expected, rtol=rtol, atol=10 * rtol * np.abs(expected).max())


@pytest.mark.numerical
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("name", DESIGNS)
def test_leave_one_out_equals_refitting(name, k, generator, rtol):
    X, y, theta_1 = data(name, generator, k)
    residuals = leave_one_out(X, y, theta_1, PENALTIES, TAUS)
    assert residuals.shape == (len(TAUS), len(PENALTIES), *y.shape)
    assert_equals_refitting(residuals, X, y, theta_1, rtol)


def test_jit_equals_eager_and_dtype_follows(generator):
    X, y, theta_1 = data("wide", generator)
    eager = leave_one_out(X, y, theta_1, PENALTIES, TAUS)
    np.testing.assert_allclose(jax.jit(leave_one_out)(X, y, theta_1, PENALTIES, TAUS), eager, rtol=1e-9, atol=1e-10)
    single = (array.astype(np.float32) for array in (X, y, theta_1))
    assert leave_one_out(*single, 0.1, 0.5).dtype == np.float32
    assert leave_one_out([[1, 0], [1, 1]], [1, 3], [0, 0], 0, 1).dtype == np.result_type(float)


@pytest.fixture
def noisy(generator):
    """A task that overadapts: labels mostly noise."""
    X = independent(generator, 30, 60)
    theta = 0.2 * generator.standard_normal(60)
    return X, X @ theta + 1.5 * generator.standard_normal(30), np.zeros(60)


def test_the_surface_and_its_standard_errors_equal_refitting(noisy):
    penalties, taus = [0.0, 0.1, 1.0, 10.0], [0.0, 0.5, 1.0]
    chosen = select(*noisy, penalties, taus)
    squares = np.array([[refitted(*noisy, penalty, tau) ** 2 for tau in taus] for penalty in penalties])
    np.testing.assert_array_equal(chosen.penalties, penalties)
    np.testing.assert_array_equal(chosen.taus, taus)
    np.testing.assert_allclose(chosen.mean_squared_error, squares.mean(-1), rtol=1e-9)
    np.testing.assert_allclose(chosen.standard_error, squares.std(-1, ddof=1) / 30**0.5, rtol=1e-9)
    np.testing.assert_allclose(chosen.pretrained_mean_squared_error, np.mean(noisy[1] ** 2), rtol=1e-12)


@pytest.mark.slow
def test_the_minimum_and_its_errors_equal_brute_force(noisy):
    X, y, theta_1 = noisy
    chosen = select(X, y, theta_1)
    at = chosen.best_penalty
    # τ in closed form: no τ of a fine grid does better, at this λ or at any λ of a fine grid
    fine = select(X, y, theta_1, np.geomspace(1e-3, 1e3, 800), np.linspace(-0.5, 2, 2001))
    assert chosen.best_mean_squared_error <= fine.mean_squared_error.min() * (1 + 1e-8)
    taus = chosen.best_tau + np.array([-1e-3, 0, 1e-3])
    along = np.array([np.mean(refitted(X, y, theta_1, at, tau) ** 2) for tau in taus])
    np.testing.assert_allclose(along[0], along[2], rtol=1e-9)
    assert np.argmin(along) == 1
    best, full = (refitted(X, y, theta_1, at, tau) for tau in (chosen.best_tau, 1.0))
    np.testing.assert_allclose(chosen.best_mean_squared_error, np.mean(best**2), rtol=1e-9)
    np.testing.assert_allclose(chosen.best_standard_error, np.std(best**2, ddof=1) / 30**0.5, rtol=1e-9)
    paired = full**2 - best**2
    np.testing.assert_allclose(chosen.gain_over_full, paired.mean(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(chosen.gain_over_full_error, paired.std(ddof=1) / 30**0.5, rtol=1e-7, atol=1e-9)
    # the error of τ*, a least-squares slope through the origin, robust to unequal variances
    d = y - refitted(X, y, theta_1, at, 1.0)
    np.testing.assert_allclose(chosen.best_tau, y @ d / (d @ d), rtol=1e-9)
    np.testing.assert_allclose(chosen.best_tau_error, np.sqrt(np.sum((d * best) ** 2)) / (d @ d), rtol=1e-9)
    learned = np.array([y - refitted(X, y, theta_1, penalty, 1.0) for penalty in chosen.penalties])
    paired = (y - chosen.taus[:, None] * learned[:, None]) ** 2 - best**2
    within = paired.mean(-1) <= paired.std(-1, ddof=1) / 30**0.5
    assert np.mean(chosen.indistinguishable == within) > 0.999
    assert 0 < chosen.indistinguishable.mean() < 1


def test_selection_on_validation_data(noisy, generator):
    X, y, theta_1 = noisy
    X_val = independent(generator, 40, 60)
    y_val = X_val @ (0.1 * generator.standard_normal(60)) + generator.standard_normal(40)
    theta_1 = theta_1 + 0.1
    penalties, taus = np.array([0.0, 0.1, 1.0, 10.0]), np.array([0.0, 0.5, 1.0])
    chosen = select(X, y, theta_1, penalties, taus, validation=(X_val, y_val))
    fitted = fine_tune(X, y, theta_1, taus[:, None] * Ridge(penalties))  # (T, L, p)
    squares = np.moveaxis((y_val - fitted @ X_val.T) ** 2, 0, 1)
    np.testing.assert_allclose(chosen.mean_squared_error, squares.mean(-1), rtol=1e-9)
    np.testing.assert_allclose(chosen.standard_error, squares.std(-1, ddof=1) / 40**0.5, rtol=1e-9)
    best = fine_tune(X, y, theta_1, chosen.best_tau * Ridge(chosen.best_penalty))
    np.testing.assert_allclose(chosen.best_mean_squared_error, np.mean((y_val - X_val @ best) ** 2), rtol=1e-9)
    np.testing.assert_allclose(chosen.pretrained_mean_squared_error, np.mean((y_val - X_val @ theta_1) ** 2), rtol=1e-9)
    assert chosen.best_mean_squared_error <= chosen.mean_squared_error.min()


def test_nothing_to_learn_chooses_the_pretrained_weights(generator):
    """y is what θ₁ predicts: every fit is θ₁, τ means nothing and its error is infinite."""
    X, theta_1 = independent(generator, 6, 10), generator.standard_normal(10)
    X, theta_1 = np.round(X * 8), np.round(theta_1 * 8)  # exact in floating point
    chosen = select(X, X @ theta_1, theta_1)
    assert chosen.best_mean_squared_error == chosen.pretrained_mean_squared_error == 0
    assert chosen.best_tau == 0
    assert chosen.best_tau_error == np.inf


def test_default_penalties_scale_with_the_data(generator):
    X = independent(generator, 5, 9)
    penalties = default_penalties(X)
    assert penalties[0] == 0
    np.testing.assert_allclose(default_penalties(3 * X), 9 * penalties, rtol=1e-12)
    np.testing.assert_allclose(penalties[[1, -1]], np.trace(X @ X.T / 5) / 5 * np.array([1e-6, 1e2]), rtol=1e-12)
