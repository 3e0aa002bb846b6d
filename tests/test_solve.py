"""Fine-tuned weights: the closed form against iteration, numpy, scikit-learn; and their interpolation."""

from fractions import Fraction
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.linear_model import Ridge as SklearnRidge

from linfit import GradientDescent, GradientFlow, MinNorm, Ridge, fine_tune, gradient_descent, interpolate
from linfit.filters import Tabulated

SHAPES = {"wide": (7, 20), "square": (9, 9), "tall": (20, 7)}
shapes = pytest.mark.parametrize("shape", SHAPES)
outputs = pytest.mark.parametrize("k", [None, 3])
all_data = pytest.mark.parametrize(("shape", "k", "weighted"), list(product(SHAPES, [None, 3], [False, True])))


def data(generator, shape, k=None):
    """X, y, theta_1 and weights, none of them special."""
    n, p = SHAPES[shape]
    tail = () if k is None else (k,)
    X = generator.standard_normal((n, p)) * np.linspace(1.5, 0.3, p)
    y = generator.standard_normal((n, *tail)) + 0.5
    return X, y, generator.standard_normal((p, *tail)), generator.uniform(0.2, 3, n)


def close(actual, expected, rtol):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.numerical
@all_data
@pytest.mark.parametrize(("speed", "steps"), [(0.4, 40), (1.8, 7)])
def test_closed_form_equals_iterated_descent(shape, k, weighted, speed, steps, generator, rtol):
    X, y, theta_1, weights = data(generator, shape, k)
    root = np.sqrt(weights)[:, None] if weighted else 1
    weights, step_size = weights if weighted else None, float(speed * len(X) / np.linalg.norm(root * X, 2) ** 2)
    closed = fine_tune(X, y, theta_1, GradientDescent(step_size, steps), weights)
    iterated = gradient_descent(X, y, theta_1, step_size=step_size, steps=steps, sample_weights=weights)
    close(iterated, closed, rtol)
    assert closed.shape == theta_1.shape


def test_iteration_is_the_documented_update(generator):
    """A third path, written out: θ ← θ + (η/n) Xᵀ W (y − Xθ)."""
    X, y, theta, weights = data(generator, "wide")
    result = gradient_descent(X, y, theta, step_size=0.1, steps=5, sample_weights=weights)
    for _ in range(5):
        theta = theta + 0.1 / len(X) * X.T @ (weights * (y - X @ theta))
    close(result, theta, 1e-12)


@pytest.mark.numerical
@shapes
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_flow_solves_its_equation(shape, weighted, generator, rtol):
    """e^{−tA} by scipy's matrix exponential, on p×p."""
    X, y, theta_1, weights = data(generator, shape)
    w = weights if weighted else np.ones(len(X))
    A, b = X.T @ (w[:, None] * X) / len(X), X.T @ (w * y) / len(X)
    p = len(b)
    generator_matrix = np.block([[-A, b[:, None]], [np.zeros((1, p + 1))]])  # d(θ, 1)/dt
    expected = (scipy.linalg.expm(3.0 * generator_matrix) @ np.append(theta_1, 1))[:p]
    close(fine_tune(X, y, theta_1, GradientFlow(3.0), weights if weighted else None), expected, rtol)


@pytest.mark.numerical
@all_data
def test_ridge_equals_scikit_learn(shape, k, weighted, generator, rtol):
    """scikit-learn minimises Σ w_i r_i² + α‖θ‖²: α = nλ, on the residual of θ₁."""
    X, y, theta_1, weights = data(generator, shape, k)
    weights, penalty = weights if weighted else None, 0.3
    oracle = SklearnRidge(alpha=len(X) * penalty, fit_intercept=False, solver="svd")
    oracle.fit(X, y - X @ theta_1, sample_weight=weights)
    close(fine_tune(X, y, theta_1, Ridge(penalty), weights), theta_1 + oracle.coef_.T, rtol)


@pytest.mark.numerical
@all_data
def test_min_norm_equals_lstsq(shape, k, weighted, generator, rtol):
    X, y, theta_1, weights = data(generator, "wide" if shape == "square" else shape, k)
    root = np.sqrt(weights) if weighted else np.ones(len(X))
    step = np.linalg.lstsq(root[:, None] * X, (root * (y - X @ theta_1).T).T, rcond=None)[0]
    for filter in (MinNorm(), Ridge(0.0), GradientFlow(jnp.inf)):
        close(fine_tune(X, y, theta_1, filter, weights if weighted else None), theta_1 + step, rtol)


@pytest.mark.numerical
@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_min_norm_of_dependent_rows_equals_the_pseudo_inverse(shape, generator, rtol):
    X, y, theta_1, _ = data(generator, shape)
    X = np.concatenate([X, X[:2], np.zeros((1, X.shape[1]))])  # duplicated with contradicting labels, and a zero row
    y = np.concatenate([y, y[:2] + 1, [5.0]])
    close(fine_tune(X, y, theta_1, MinNorm()), theta_1 + np.linalg.pinv(X) @ (y - X @ theta_1), rtol)


@pytest.mark.numerical
def test_weights_do_not_move_the_interpolating_limit_when_n_is_below_p(generator, rtol):
    """F5; early-stopped, penalised or with n > p they do."""
    X, y, theta_1, weights = data(generator, "wide")
    close(fine_tune(X, y, theta_1, MinNorm(), weights), fine_tune(X, y, theta_1, MinNorm()), rtol)
    for filter in (Ridge(0.1), GradientFlow(2.0)):
        assert np.abs(fine_tune(X, y, theta_1, filter, weights) - fine_tune(X, y, theta_1, filter)).max() > 1e-3
    X, y, theta_1, weights = data(generator, "tall")
    assert np.abs(fine_tune(X, y, theta_1, MinNorm(), weights) - fine_tune(X, y, theta_1, MinNorm())).max() > 1e-3


@pytest.mark.numerical
@shapes
def test_weights_are_repetitions_and_zero_drops_a_sample(shape, generator, rtol):
    X, y, theta_1, _ = data(generator, shape)
    counts = np.arange(len(X)) % 3  # 0, 1, 2, 0, …
    repeated = np.repeat(np.arange(len(X)), counts)
    share = len(X) / len(repeated)  # the loss is divided by the number of rows, not by the sum of the weights
    weighted = fine_tune(X, y, theta_1, Ridge(0.3), counts)
    close(weighted, fine_tune(X[repeated], y[repeated], theta_1, Ridge(0.3 * share)), rtol)


@pytest.mark.numerical
@shapes
@outputs
def test_hyperparameter_axes_come_in_front(shape, k, generator, rtol):
    X, y, theta_1, _ = data(generator, shape, k)
    penalties, taus = np.array([0.1, 0.5, 2.0]), np.array([[0.3], [1.2]])
    stacked = fine_tune(X, y, theta_1, taus * Ridge(penalties))
    assert stacked.shape == (2, 3, *theta_1.shape)
    single = fine_tune(X, y, theta_1, 1.2 * Ridge(0.5))
    close(stacked[1, 1], single, rtol)
    close(single, interpolate(theta_1, fine_tune(X, y, theta_1, Ridge(0.5)), 1.2), rtol)


@pytest.mark.numerical
@shapes
def test_jit_and_vmap_equal_eager(shape, generator, rtol):
    X, y, theta_1, weights = data(generator, shape)
    filter, several = Ridge(0.4), np.stack([y, -y, y + 1])
    eager = fine_tune(X, y, theta_1, filter, weights)
    close(jax.jit(fine_tune)(X, y, theta_1, filter, weights), eager, rtol)
    mapped = jax.vmap(lambda y: fine_tune(X, y, theta_1, filter, weights))(several)
    for index, labels in enumerate(several):
        close(mapped[index], fine_tune(X, labels, theta_1, filter, weights), rtol)
    descend = jax.jit(lambda X, eta: gradient_descent(X, y, theta_1, step_size=eta, steps=9))
    close(descend(X, 0.1), gradient_descent(X, y, theta_1, step_size=0.1, steps=9), rtol)


def test_dtypes(generator):
    X, y, theta_1, _ = (jnp.asarray(array, jnp.float32) for array in data(generator, "wide"))
    for filter in (MinNorm(), Ridge(1), GradientFlow(2.0), GradientDescent(0.1, 3), 0.5 * Ridge(0.1)):
        assert fine_tune(X, y, theta_1, filter).dtype == jnp.float32
    assert gradient_descent(X, y, theta_1, step_size=0.1, steps=2).dtype == jnp.float32
    exact = fine_tune([[2, 0]], [3], [1, 5], MinNorm())
    assert exact.dtype == jnp.result_type(float)
    np.testing.assert_array_equal(exact, [1.5, 5])


def test_a_tabulated_filter_belongs_to_its_design(generator):
    X, y, theta_1, _ = data(generator, "wide")
    eigenvalues = np.linalg.eigvalsh(X @ X.T / len(X))
    close(fine_tune(X, y, theta_1, Tabulated(1 / (eigenvalues + 0.2))), fine_tune(X, y, theta_1, Ridge(0.2)), 1e-10)


@pytest.mark.numerical
def test_both_sides_of_the_stability_threshold(generator):
    """Below 2/s_max both paths converge to min-norm, above it both refuse; a weighted threshold is its own."""
    X, y, theta_1, weights = data(generator, "wide")
    for w in (None, weights):
        rows = X if w is None else np.sqrt(w)[:, None] * X
        limit = 2 / np.linalg.eigvalsh(rows @ rows.T / len(X))[-1]
        fine_tune(X, y, theta_1, GradientDescent(0.99 * limit, 5), w)
        gradient_descent(X, y, theta_1, step_size=0.99 * limit, steps=5, sample_weights=w)
        with pytest.raises(ValueError, match="step_size"):
            fine_tune(X, y, theta_1, GradientDescent(1.01 * limit, 5), w)
        with pytest.raises(ValueError, match="step_size"):
            gradient_descent(X, y, theta_1, step_size=1.01 * limit, steps=5, sample_weights=w)
    converged = gradient_descent(X, y, theta_1, step_size=0.9 * limit, steps=20_000, sample_weights=weights)
    close(converged, fine_tune(X, y, theta_1, MinNorm()), 1e-3)


def test_no_steps_leave_the_pretrained_weights(generator):
    X, y, theta_1, _ = data(generator, "wide")
    np.testing.assert_array_equal(gradient_descent(X, y, theta_1, step_size=0.1, steps=0), theta_1)


def test_new_steps_and_step_sizes_do_not_recompile(generator):
    from linfit.solve import _descend

    X, y, theta_1, _ = data(generator, "wide")
    gradient_descent(X, y, theta_1, step_size=0.1, steps=3)
    compiled = _descend._cache_size()
    for steps in (4, 5):
        gradient_descent(X, y, theta_1, step_size=0.01 * steps, steps=steps)
    assert _descend._cache_size() == compiled


TREE = {"head": np.array([0.1, 2.0, -3.3]), "body": (np.array(1e8), [np.array([[1.0], [1e-8]])])}
OTHER = jax.tree.map(lambda leaf: -leaf / 3 + 0.7, TREE)


def test_interpolation_is_exact_at_both_ends():
    for end, tree in ((0, TREE), (1, OTHER), (0.0, TREE), (np.array(1), OTHER)):
        for leaf, expected in zip(jax.tree.leaves(interpolate(TREE, OTHER, end)), jax.tree.leaves(tree)):
            np.testing.assert_array_equal(leaf, expected)
    assert jax.tree.structure(interpolate(TREE, OTHER, 0.3)) == jax.tree.structure(TREE)


@pytest.mark.parametrize("tau", [0.3, -0.5, 1.7])
def test_interpolation_between_and_beyond(tau):
    for leaf, a, b in zip(*map(jax.tree.leaves, (interpolate(TREE, OTHER, tau), TREE, OTHER)), strict=True):
        np.testing.assert_allclose(leaf, (1 - tau) * a + tau * b, rtol=1e-14)


def test_interpolation_keeps_the_dtype_and_rounds_once():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        a, b = jnp.linspace(0.5, 3, 50).astype(dtype), jnp.linspace(-2, 1, 50).astype(dtype)
        middle = interpolate(a, b, 0.3)
        assert middle.dtype == dtype
        exact = 0.7 * np.asarray(a, np.float64) + 0.3 * np.asarray(b, np.float64)
        once = float(jnp.finfo(dtype).eps) / 2 * np.abs(exact)
        single = 3 * float(jnp.finfo(jnp.float32).eps)
        np.testing.assert_array_less(np.abs(np.asarray(middle, np.float64) - exact), 1.001 * once + single)
    assert interpolate([1, 2], [3, 4], 0.5)[0].dtype == jnp.result_type(float)


def weighted_least_squares(X, y, weights):
    """The solution of least norm among those of least Σ w r², in exact rational arithmetic; X of integers."""
    rows = [(row, label, weight) for row, label, weight in zip(X, y, weights) if weight > 0]
    basis = []  # independent rows, which span all steps
    for row, _, _ in rows:
        if np.linalg.matrix_rank(np.array([*basis, row])) > len(basis):
            basis.append(row)
    inner = [[Fraction(int(row @ b)) for b in basis] for row, _, _ in rows]
    size, exact = range(len(basis)), [Fraction(float(weight)) for *_, weight in rows]
    system = [
        [sum(w * r[i] * r[j] for w, r in zip(exact, inner)) for j in size]
        + [sum(w * r[i] * Fraction(float(label)) for w, r, (_, label, _) in zip(exact, inner, rows))]
        for i in size
    ]
    for i in size:
        pivot = next(j for j in size[i:] if system[j][i] != 0)
        system[i], system[pivot] = system[pivot], system[i]
        system[i] = [value / system[i][i] for value in system[i]]
        for j in set(size) - {i}:
            system[j] = [a - system[j][i] * b for a, b in zip(system[j], system[i])]
    return sum(float(system[i][-1]) * basis[i] for i in size)


@pytest.mark.parametrize("weight", [1e-300, 1e-30, 1e-16, 1e12, 0.0])
def test_min_norm_with_extreme_weights(weight, generator):
    """Independent rows: the weights do not matter, unless they are 0."""
    X, y, weights = generator.standard_normal((3, 6)), generator.standard_normal(3), np.array([1, 1, weight])
    counted = weights > 0
    expected = np.linalg.pinv(X[counted]) @ y[counted]
    for k in (1, 3):
        labels = np.stack([y] * k, axis=1)
        close(fine_tune(X, labels, np.zeros((6, k)), MinNorm(), weights), np.stack([expected] * k, axis=1), 1e-13)
    taus = np.array([[0.5], [2.0]])
    close(fine_tune(X, y, np.zeros(6), taus * (0.5 * MinNorm()), weights), taus[..., None] * 0.5 * expected, 1e-13)
    close(jax.jit(fine_tune)(X, y, np.zeros(6), MinNorm(), weights), expected, 1e-13)


@pytest.mark.parametrize(("n", "p"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("spread", [0, 4, 8, 12])
@pytest.mark.parametrize("dependent", [False, True])
def test_weighted_min_norm_is_exact_weighted_least_squares(n, p, spread, dependent, generator):
    """Duplicated and dependent rows with contradicting labels, weights of 0, more rows than columns."""
    for _ in range(5):
        X, y = generator.integers(-9, 10, (n, p)).astype(float), generator.standard_normal(n)
        if dependent:
            X[1], X[3], X[5] = X[0], 2 * X[2], X[0] + X[4]
        weights = 10.0 ** -generator.uniform(0, spread, n) * (np.arange(n) != n - 2)
        positive = weights[weights > 0]
        expected = weighted_least_squares(X, y, weights)
        bound = 1e-13 + 100 * np.finfo(float).eps * positive.max() / positive.min()
        close(fine_tune(X, y, np.zeros(p), MinNorm(), weights), expected, bound if n > p or dependent else 1e-12)


@pytest.mark.parametrize("weight", [1e-8, 1e-13])
def test_flow_and_ridge_see_small_weights(weight, generator):
    """Orthogonal rows: each is learned alone, with s = w x²/n; late enough that the small one is half learned."""
    X, y, weights = np.eye(3, 5) * [[3.0], [2.0], [1.0]], generator.standard_normal(3), np.array([1, 1, weight])
    s = weights * np.array([9, 4, 1]) / 3
    for filter, learned in ((Ridge(s[2]), s / (s + s[2])), (GradientFlow(1 / s[2]), -np.expm1(-s / s[2]))):
        expected = np.append(learned * y / [3, 2, 1], [0, 0])
        rotation = np.linalg.qr(generator.standard_normal((5, 5)))[0]
        close(fine_tune(X @ rotation, y, np.zeros(5), filter, weights), rotation.T @ expected, 1e-9)


def test_weighted_min_norm_has_gradients(generator):
    """By finite differences: in the labels, and in the weights where they matter (n > p); 0 where they do not."""
    X, y, theta_1, weights = data(generator, "tall")

    def first(y, weights):
        return fine_tune(X, y, theta_1, MinNorm(), weights)[0]

    slopes = jax.grad(first, argnums=(0, 1))(jnp.asarray(y), jnp.asarray(weights))
    for at, step in ((0, np.eye(len(y))[2]), (1, np.eye(len(y))[3])):
        moved = [y + sign * 1e-5 * step * (at == 0) for sign in (1, -1)]
        weighed = [weights + sign * 1e-5 * step * (at == 1) for sign in (1, -1)]
        difference = (first(moved[0], weighed[0]) - first(moved[1], weighed[1])) / 2e-5
        assert slopes[at] @ step == pytest.approx(float(difference), rel=1e-6)
    X, y, theta_1, weights = data(generator, "wide")
    assert np.abs(jax.grad(first, argnums=1)(jnp.asarray(y), jnp.asarray(weights))).max() == 0
