"""Tangent features of small networks against explicit Jacobians, refits and real training; Krylov against dense."""

import subprocess
import sys
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import matfree.decomp
import matfree.funm
import numpy as np
import pytest

import linfit
from linfit import GradientDescent, GradientFlow, MinNorm, Prediction, Ridge, predict
from linfit.tangent import Estimate, features, kernel, kernel_product, krylov, leave_one_out, select, summary
from linfit.tangent.jacobian import _block, _columns, network

D, HIDDEN, K, N = 4, 7, 3, 6


def mlp(params, x):
    return jnp.tanh(x @ params["in"]["w"] + params["in"]["b"]) @ params["out"]


def weights(generator):
    return {
        "in": {"w": generator.standard_normal((D, HIDDEN)), "b": generator.standard_normal(HIDDEN)},
        "out": generator.standard_normal((HIDDEN, K)) / HIDDEN**0.5,
        "version": 3,
    }


def lora(params, x):
    return jax.nn.relu(x @ (params["in"]["w"] + params["a"] @ params["b"])) @ params["out"]


def tokens(params, x):
    """A sequence of D inputs per sample; the first weights are used once, but for D tokens."""
    hidden = jnp.tanh(x[..., None] * params["in"]["w"][0] + params["in"]["b"])
    return jax.nn.softmax(hidden @ params["out"], axis=-1).mean(1)


NETWORKS = {
    "mlp": mlp,
    "jitted": jax.jit(lambda params, x: jax.nn.gelu(x @ params["in"]["w"]) @ params["out"]),
    "one sample at a time": lambda params, x: jax.vmap(lambda v: mlp(params, v))(x),
    "transposed weights": lambda params, x: jax.vmap(lambda v: params["out"].T @ jnp.sin(params["in"]["w"].T @ v))(x),
    "tied weights": lambda params, x: jnp.tanh(x @ params["in"]["w"]) @ params["in"]["w"].T,
    "weights used twice": lambda params, x: (x @ params["in"]["w"] * params["in"]["w"].sum()) @ params["out"],
    "tokens": tokens,
    "rematerialised": lambda params, x: jax.checkpoint(mlp)(params, x),
    "scan": lambda params, x: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params["in"]["w"][:, :D]), x),
    "scalar": lambda params, x: mlp(params, x)[:, 0],
    "many axes": lambda params, x: mlp(params, x)[:, :, None] * jnp.arange(1.0, 3.0),
    "inputs in a pytree": lambda params, x: mlp(params, x["left"] + x["right"][:, :, 0]),
}


def inputs(name, generator, n):
    x = generator.standard_normal((n, D))
    return {"left": x, "right": generator.standard_normal((n, D, 2))} if "pytree" in name else x


def numeric_jacobian(apply, params, x, step=1e-5):
    """(n, k, p) by central differences, over all floating-point leaves."""
    leaves, structure = jax.tree.flatten(params)
    columns = []
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, np.ndarray):
            continue
        for position in np.ndindex(leaf.shape):

            def shifted(sign, index=index, position=position):
                moved = leaves[index].copy()
                moved[position] += sign * step
                values = apply(jax.tree.unflatten(structure, [*leaves[:index], moved, *leaves[index + 1 :]]), x)
                return np.asarray(values).reshape(len(values), -1)

            columns.append((shifted(1) - shifted(-1)) / (2 * step))
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_is_the_product_of_jacobians(name, generator):
    apply, params = NETWORKS[name], weights(generator)
    x, x2 = inputs(name, generator, N), inputs(name, generator, 4)
    J, J2 = np.asarray(features(apply, params, x)), np.asarray(features(apply, params, x2))
    expected = np.einsum("ikp,jlp->ikjl", J, J2)
    for structured in (True, False):
        got = kernel(apply, params, x, x2, structured=structured)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12 * abs(expected).max())
    v = generator.standard_normal(J2.shape[:2])
    product = kernel_product(apply, params, x, x2)(v)
    np.testing.assert_allclose(product, np.einsum("ikjl,jl->ik", expected, v), rtol=1e-11, atol=1e-11)
    if name in ("mlp", "tokens", "weights used twice", "many axes"):
        np.testing.assert_allclose(J, numeric_jacobian(apply, params, x), atol=1e-7 * abs(J).max())


MOVING = {
    "last layer": (mlp, lambda path: path == "out", ["out"]),
    "a prefix": (mlp, {"in": True, "out": False, "version": False}, ["w", "b"]),
    "a tree": (mlp, {"in": {"w": False, "b": True}, "out": True, "version": True}, ["b", "out"]),
    "factors": (lora, lambda path: path in ("a", "b"), ["a", "b"]),
}


@pytest.mark.parametrize("name", MOVING)
def test_only_what_moves_counts(name, generator):
    apply, moving, names = MOVING[name]
    params = weights(generator)
    if apply is lora:
        params |= {"a": generator.standard_normal((D, 2)), "b": generator.standard_normal((2, HIDDEN))}
    x = generator.standard_normal((N, D))
    J = np.asarray(features(apply, params, x, moving=moving))
    sizes = {"w": D * HIDDEN, "b": 2 * HIDDEN if apply is lora else HIDDEN, "out": HIDDEN * K, "a": 2 * D}
    assert J.shape == (N, K, sum(sizes[each] for each in names))
    np.testing.assert_allclose(kernel(apply, params, x, moving=moving), np.einsum("ikp,jlp->ikjl", J, J), rtol=1e-11)


def test_blocks_keep_within_the_memory_and_change_nothing(generator):
    params, x = weights(generator), generator.standard_normal((40, D))
    whole, told = kernel(mlp, params, x, structured=False), []
    net = network(mlp, params)
    for memory in (12_000, 60_000, 400_000):
        got = kernel(mlp, params, x, memory=memory, structured=False, report=lambda *done: told.append(done))
        np.testing.assert_allclose(got, whole, rtol=1e-12, atol=1e-12)
        rows, columns = _block(net, x, memory)
        index = jnp.zeros(columns, int)
        analysis = _columns.lower(net, x[:rows], x, index, index).compile().compiled.memory_analysis()
        assert analysis.temp_size_in_bytes <= memory
        v = generator.standard_normal((40, K))
        product = kernel_product(mlp, params, x, memory=memory)(v)
        np.testing.assert_allclose(product, np.einsum("ikjl,jl->ik", whole, v), rtol=1e-11, atol=1e-11)
    assert told[-1] == (40 * K, 40 * K)


SPECTRA = {
    "power": lambda n, _: np.arange(1.0, n + 1) ** -1.5,
    "clustered": lambda n, rng: np.repeat([10.0, 1.0, 0.1, 1e-3], n // 4) * (1 + 1e-3 * rng.standard_normal(n)),
    "low rank": lambda n, rng: np.append(rng.uniform(1, 5, 12), np.zeros(n - 12)),
    "wide": lambda n, _: np.logspace(4, -8, n),
    "flat": lambda n, rng: rng.uniform(0.9, 1.1, n),
    "one value": lambda n, _: np.full(n, 2.0),
}


def spectral_kernel(name, generator, n=80):
    s = SPECTRA[name](n, generator)
    U, _ = np.linalg.qr(generator.standard_normal((n, n)))
    return s, U, (U * s) @ U.T


def filters_for(s):
    top = float(s.max())
    times, penalties = np.array([3.0, 100.0, 1e4]) / top, np.array([0.1, 1e-3, 1e-5]) * top
    return [GradientFlow(times), Ridge(penalties), 0.5 * Ridge(penalties), GradientDescent(1 / top, [5, 200, 3])]


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("width", [1, 3])
def test_krylov_errs_by_less_than_it_says_and_not_by_much_less(name, width, generator):
    s, U, matrix = spectral_kernel(name, generator)
    r = generator.standard_normal((len(s), width))
    for products in (4, 12, 24):
        result = krylov(lambda v: jnp.asarray(matrix) @ v, r, products)
        for filter in filters_for(s):
            exact = np.einsum("ab,...b,cb,cd->...ad", U, np.asarray(filter(s)), U, r)
            missed = np.linalg.norm(matrix @ (exact - np.asarray(result.apply(filter))), axis=-2)
            stated, size = np.asarray(result.error(filter)), np.linalg.norm(matrix @ exact, axis=-2)
            assert (missed <= stated).all(), (name, products, filter)
            assert (stated <= 40 * missed + 1e-9 * size).all() or width > 1, (name, products, filter)


def test_krylov_stops_where_the_space_is_exhausted(generator):
    s, _, matrix = spectral_kernel("low rank", generator)
    r = generator.standard_normal(len(s))
    result = krylov(lambda v: jnp.asarray(matrix) @ v, r, 40)
    np.testing.assert_allclose(result.apply(MinNorm())[:, 0], np.linalg.pinv(matrix, rcond=1e-10) @ r, atol=1e-9)
    assert np.isfinite(result.error(MinNorm())).all()


def test_krylov_against_matfree(generator):
    s, _, matrix = spectral_kernel("power", generator)
    r, filter = generator.standard_normal(len(s)), GradientFlow(50.0)
    dense = matfree.funm.dense_funm_sym_eigh(lambda s: filter(s[None])[0])
    estimate = matfree.funm.funm_lanczos_sym(dense, matfree.decomp.tridiag_sym(8))
    expected = estimate(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(r))
    np.testing.assert_allclose(krylov(lambda v: matrix @ v, r, 8).apply(filter)[:, 0], expected, rtol=1e-9, atol=1e-9)


class Case:
    """Data for a network, its Jacobians, and the linear model that it is to first order."""

    def __init__(self, generator, weighted=False, noise=0.3, n=8):
        self.params = weights(generator)
        self.n, self.x = n, generator.standard_normal((3 * n, D))
        self.y = generator.standard_normal((3 * n, K)) * noise + np.tanh(self.x[:, :K])
        self.train, self.test, self.other = ((self.x[i : i + n], self.y[i : i + n]) for i in (0, n, 2 * n))
        self.weights = generator.uniform(0.2, 2.0, n) if weighted else None
        self.J = np.asarray(features(mlp, self.params, self.x)).reshape(3, n * K, -1)
        self.f = np.asarray(mlp(self.params, self.x)).reshape(3, n * K)

    def predict(self, **options):
        return predict(mlp, self.params, self.train, self.test, self.other, sample_weights=self.weights, **options)

    def rows(self, kept=slice(None)):
        """J, r and w of some training samples, row by row."""
        w = np.ones(self.n) if self.weights is None else self.weights
        rows = np.arange(self.n * K).reshape(self.n, K)[kept].ravel()
        return self.J[0][rows], (self.y[: self.n].ravel() - self.f[0])[rows], np.repeat(w, K)[rows]

    def ridge(self, penalty, kept=slice(None)):
        """δ by the normal equations in the weights."""
        J, r, w = self.rows(kept)
        return np.linalg.solve(J.T @ (w[:, None] * J) + self.n * penalty * np.eye(J.shape[1]), J.T @ (w * r))

    def outputs(self, step, domain):
        return (self.f[domain] + self.J[domain] @ step).reshape(self.n, K)


@pytest.mark.parametrize("weighted", [False, True])
def test_predictions_are_those_of_the_linear_model(weighted, generator):
    case = Case(generator, weighted)
    J, r, w = case.rows()
    step, flowed = case.ridge(0.7), np.zeros(J.shape[1])
    for _ in range(30):
        flowed = flowed + 0.02 * J.T @ (w * (r - J @ flowed)) / case.n
    for prediction in (case.predict(), case.predict(products=case.n * K)):
        for domain, name in enumerate(("train", "test", "other")):
            for filter, delta in ((Ridge(0.7), step), (GradientDescent(0.02, 30), flowed)):
                got = prediction.outputs(filter, 0.6, name)
                np.testing.assert_allclose(got, case.outputs(0.6 * delta, domain), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(prediction.distance(Ridge(0.7)), np.linalg.norm(step), rtol=1e-9)
    parabola, taus = prediction.along(Ridge(0.7)), np.array([0.0, 0.5, 1.2])
    squared = [((case.y[case.n : 2 * case.n] - case.outputs(t * step, 1)) ** 2).sum(1).mean() for t in taus]
    np.testing.assert_allclose(parabola(taus).total, squared, rtol=1e-9)
    np.testing.assert_allclose(prediction.losses(Ridge(0.7), taus).mean(-1), squared, rtol=1e-9)
    best = float(prediction.best_tau(Ridge(0.7)))
    assert parabola(best).total <= min(parabola(best + 0.01).total, parabola(best - 0.01).total)


def test_few_products_err_by_less_than_they_say(seed):
    for case_seed in range(3):
        case = Case(np.random.default_rng([seed, case_seed]), n=16)
        exact, few = case.predict(), case.predict(products=10)
        filter = GradientFlow(jnp.array([0.1, 1.0, 10.0, 1e3]))
        for name in ("train", "test", "other"):
            missed = jnp.sqrt(
                ((exact.outputs(filter, 1.0, name) - few.outputs(filter, 1.0, name)) ** 2).sum(-1).mean(-1)
            )
            assert (np.asarray(missed) <= np.asarray(few.error(filter, name))).all(), name
            np.testing.assert_array_equal(exact.error(filter, name), 0)


@pytest.mark.parametrize("weighted", [False, True])
def test_leave_one_out_of_several_outputs_equals_refitting(weighted, generator):
    case = Case(generator, weighted)
    if weighted:
        case.weights[2] = 0.0
    prediction, taus, penalties = case.predict(), np.array([[0.0], [0.6], [1.0]]), np.array([0.03, 0.7])
    got = leave_one_out(prediction, penalties, taus)
    for a, b, i in np.ndindex(3, 2, case.n):
        step = taus[a, 0] * case.ridge(penalties[b], np.arange(case.n) != i)
        expected = case.y[i] - case.outputs(step, 0)[i]
        np.testing.assert_allclose(got[a, b, i], expected, rtol=1e-8, atol=1e-9)
    chosen = select(prediction)
    errors = [
        (np.asarray(leave_one_out(prediction, chosen.best_penalty, chosen.best_tau * s)) ** 2).sum()
        for s in (0.9, 1, 1.1)
    ]
    assert errors[1] == min(errors)
    np.testing.assert_allclose(errors[1] / case.n, chosen.best_mean_squared_error, rtol=1e-9)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_that_of_the_linear_model(weighted, generator):
    case = Case(generator, weighted)
    classes = generator.integers(0, K, 3 * case.n)
    pairs = [(case.x[i : i + case.n], classes[i : i + case.n]) for i in (0, case.n, 2 * case.n)]
    prediction = predict(mlp, case.params, *pairs, loss="entropy", sample_weights=case.weights)
    J, _, w = case.rows()
    hot, step, rate, saved = np.eye(K)[classes[: case.n]].ravel(), np.zeros(J.shape[1]), 0.02, {0: None}
    for count in range(1, 101):
        probabilities = softmax(case.outputs(step, 0)).ravel()
        step = step + rate * J.T @ (w * (hot - probabilities)) / case.n
        saved[count] = step
    filter = GradientDescent(rate, [100, 40])
    for index, count in enumerate((100, 40)):
        for domain, name in enumerate(("train", "test", "other")):
            expected = case.outputs(0.8 * saved[count], domain)
            np.testing.assert_allclose(prediction.outputs(filter, 0.8, name)[index], expected, rtol=1e-9, atol=1e-9)
    fine = prediction.outputs(GradientDescent(0.0005, [4000, 1600]))  # the flow is the limit of small steps
    flowed = prediction.outputs(GradientFlow([2.0, 0.8]))
    np.testing.assert_allclose(flowed, fine, atol=2e-3)
    assert abs(flowed - prediction.outputs(filter)).max() > 2 * abs(flowed - fine).max()
    tau = prediction.best_tau(GradientFlow([2.0, 0.8]))
    around = prediction.losses(GradientFlow([2.0, 0.8]), tau + jnp.array([[-0.01], [0.0], [0.01]])).mean(-1)
    inside = (tau > 0.01) & (tau < 1.99)
    assert (around.argmin(0) == 1)[inside].all()


def test_a_linear_network_behaves_as_predicted(generator):
    """Real training of a network that is linear in its parameters, both losses."""
    x, params = generator.standard_normal((30, D)), generator.standard_normal((D, K))
    classes = generator.integers(0, K, 30)
    data = [(x[i : i + 10], classes[i : i + 10]) for i in (0, 10, 20)]

    def trained(loss):
        slope = jax.jit(jax.grad(lambda w: loss(x[:10] @ w)))
        w = params
        for _ in range(25):
            w = w - 0.1 * slope(w)
        return w

    hot = np.eye(K)[classes[:10]]
    real = {
        "squared": trained(lambda z: ((z - hot) ** 2).sum() / 20),
        "entropy": trained(lambda z: -(hot * jax.nn.log_softmax(z)).sum() / 10),
    }
    for loss, w in real.items():
        prediction = predict(lambda w, x: x @ w, params, *data, loss=loss, plan=GradientDescent(0.1, 25))
        for part, name in zip(data, ("train", "test", "other")):
            np.testing.assert_allclose(prediction.outputs(GradientDescent(0.1, 25), 1.0, name), part[0] @ w, atol=1e-9)
        for name, number in prediction.diagnostics.items():
            if name.startswith(("gap", "curvature", "loss_gap", "kernel_change")):
                assert abs(number) < 1e-9, name


def test_variance_is_what_resampled_labels_give(generator):
    for weighted in (False, True):
        case = Case(generator, weighted)
        draws = case.y[: case.n] + 0.5 * generator.standard_normal((400, case.n, K))
        prediction = case.predict(label_draws=draws, noise_std=0.5)
        for filter in (Ridge(0.3), GradientFlow(2.0)):
            stated, sampled = prediction.along(filter)(0.8), prediction.decomposition(filter, 0.8)
            # The relative standard error of a variance from 400 draws is at most √(2/399).
            assert abs(float(sampled.variance / stated.variance) - 1) < 5 * (2 / 399) ** 0.5
            outputs = np.stack([predict_with(case, draw, filter) for draw in draws[:3]])
            got = prediction.test.outputs + prediction.test.moved(
                0.8 * filter(prediction.eigenvalues) * prediction.draws.T[:3]
            )
            np.testing.assert_allclose(got, outputs, atol=1e-9)
    products = case.predict(label_draws=draws[:3], products=8, noise_std=0.5).decomposition(Ridge(0.3), 0.8)
    exact = case.predict(label_draws=draws[:3]).decomposition(Ridge(0.3), 0.8)
    np.testing.assert_allclose(products, exact, rtol=1e-8)  # 4 · 8 vectors span everything


def predict_with(case, labels, filter):
    """Outputs at τ = 0.8 of a prediction made from other labels."""
    pairs = (case.train[0], labels), case.test
    return np.asarray(predict(mlp, case.params, *pairs, sample_weights=case.weights).outputs(filter, 0.8))


def test_summary_errors_are_those_of_new_labels_and_new_samples(generator):
    case = Case(generator, n=20)
    sigma = 0.01  # first order in the noise
    draws = case.y[:20] + sigma * generator.standard_normal((300, 20, K))
    prediction, filter = case.predict(label_draws=draws, noise_std=sigma), GradientFlow(5.0)
    numbers = summary(prediction, filter)
    alphas = filter(prediction.eigenvalues) * prediction.draws.T
    test, other = prediction.test, prediction.other
    moved, elsewhere = test.moved(alphas), other.moved(alphas)
    tau = (moved * (test.labels - test.outputs)).sum((-1, -2)) / (moved**2).sum((-1, -2))
    loss = ((test.labels - test.outputs - moved) ** 2).sum(-1).mean(-1)
    forgetting = ((other.labels - other.outputs - tau[:, None, None] * elsewhere) ** 2).sum(-1).mean(-1)
    spread = {"best_tau": tau, "task_loss_at_1": loss, "forgetting_at_best": forgetting}
    for name, values in spread.items():
        assert abs(float(values.std(ddof=1)) / numbers[name].label_error - 1) < 5 / 600**0.5, name
    each = np.asarray(prediction.losses(filter))
    np.testing.assert_allclose(numbers["task_loss_at_1"].sample_error, each.std(ddof=1) / 20**0.5, rtol=1e-9)
    rows, step = np.asarray(test.labels - test.outputs), np.asarray(test.moved(prediction.coordinates(filter)))
    left_out = [
        np.delete(step, i, 0).ravel() @ np.delete(rows, i, 0).ravel() / (np.delete(step, i, 0) ** 2).sum()
        for i in range(20)
    ]
    jackknife = (19 / 20 * ((left_out - np.mean(left_out)) ** 2).sum()) ** 0.5
    assert abs(numbers["best_tau"].sample_error / jackknife - 1) < 0.5
    low, high = numbers["task_loss_at_1"].interval
    assert low < numbers["task_loss_at_1"].value < high
    assert Estimate(1.0, float("nan"), 0.0).interval == (1.0, 1.0)


def test_diagnostics_see_curvature(generator):
    case = Case(generator)
    small, large = (case.predict(plan=GradientFlow(t)) for t in (0.02, 2.0))
    step = (
        case.J[0].T @ (np.asarray(small.vectors) @ np.asarray(small.coordinates(GradientFlow(0.02)))).ravel() / case.n
    )
    np.testing.assert_allclose(small.diagnostics["distance"], np.linalg.norm(step), rtol=1e-9)
    leaves = [case.params["in"]["b"], case.params["in"]["w"], case.params["out"]]
    theta = np.concatenate([leaf.ravel() for leaf in leaves])
    np.testing.assert_allclose(
        small.diagnostics["relative_distance"], np.linalg.norm(step) / np.linalg.norm(theta), rtol=1e-9
    )

    def outputs(scale):
        parts = np.split(theta + scale * step, np.cumsum([leaf.size for leaf in leaves])[:-1])
        b, w, out = (part.reshape(leaf.shape) for part, leaf in zip(parts, leaves))
        return np.asarray(mlp({"in": {"w": w, "b": b}, "out": out}, case.test[0])).ravel()

    first = case.J[1] @ step
    gap = np.linalg.norm(outputs(1.0) - outputs(0.0) - first) / np.linalg.norm(first)
    second = np.linalg.norm(outputs(1e-2) + outputs(-1e-2) - 2 * outputs(0.0)) / 2e-4 / np.linalg.norm(first)
    np.testing.assert_allclose(small.diagnostics["gap_test"], gap, rtol=1e-6)
    np.testing.assert_allclose(small.diagnostics["curvature_test"], second, rtol=1e-3)
    for name in ("gap_test", "gap_other", "kernel_change", "relative_distance"):
        assert 0 < small.diagnostics[name] < large.diagnostics[name], name
    assert 0 < small.diagnostics["alignment"] <= 1


def test_saved_predictions_come_back_and_others_are_refused(tmp_path, generator):
    case = Case(generator)
    for options in ({}, {"products": 5}):
        prediction, path = case.predict(**options), tmp_path / "bundle.npz"
        prediction.save(path)
        loaded = Prediction.load(path)
        np.testing.assert_array_equal(
            loaded.outputs(Ridge(0.1), 0.4, "other"), prediction.outputs(Ridge(0.1), 0.4, "other")
        )
        np.testing.assert_array_equal(loaded.error(Ridge(0.1)), prediction.error(Ridge(0.1)))
        assert loaded.diagnostics == prediction.diagnostics
        assert jax.tree.structure(loaded) == jax.tree.structure(prediction)
    arrays = dict(np.load(path))
    for change, message in [
        ({"format": "other"}, "saved prediction"),
        ({"loss": "hinge"}, "loss must be"),
        ({"test/basis": arrays["test/basis"][:-1]}, "test/basis must have shape"),
        ({"eigenvalues": arrays["eigenvalues"] * np.nan}, "eigenvalues must be finite"),
        ({"surprise": np.ones(2)}, "surprise"),
    ]:
        np.savez(tmp_path / "bad.npz", **(arrays | change))
        with pytest.raises(ValueError, match=message):
            Prediction.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "pickled.npz", format=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("nothing")
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:  # a header that numpy's parser cannot end
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,"
        archive.writestr("taus.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for name in ("pickled.npz", "text.npz", "header.npz"):
        with pytest.raises(ValueError, match="saved prediction"):
            Prediction.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        prediction.save(tmp_path / "bundle.pkl")


def test_bad_input_is_named(generator):
    case = Case(generator)
    x, y = case.train

    def call(apply=mlp, params=case.params, train=case.train, test=case.test, **options):
        return predict(apply, params, train, test, **options)

    for options, message in [
        ({"apply": 3}, "apply must be a function"),
        ({"apply": lambda params, x: mlp(params, x).sum()}, "apply must return outputs"),
        ({"apply": lambda params, x: mlp(params, x).argmax(-1)}, "floating-point outputs"),
        ({"apply": lambda params, x: mlp(params, x) * jnp.nan}, "finite outputs"),
        ({"apply": lambda params, x: mlp(params, x) - 3 * mlp(params, x).mean(0)}, "each sample on its own"),
        ({"moving": lambda path: False}, "moving must choose"),
        ({"moving": {"in": True}}, "moving must be shaped"),
        ({"moving": "out"}, "pytree of booleans"),
        ({"train": x}, r"train must be a pair"),
        ({"train": (x, y[:-1])}, "labels of train must have 3 value"),
        ({"train": (x, np.full(case.n, K))}, "integers from 0 to 2"),
        ({"train": (x, y * np.nan)}, "labels of train must be finite"),
        ({"train": (x[:0], y[:0])}, "n ≥ 1 samples"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"loss": "entropy"}, "probabilities that sum to 1"),
        ({"sample_weights": -np.ones(case.n)}, "sample_weights must be non-negative"),
        ({"sample_weights": np.ones(3)}, "sample_weights must match"),
        ({"noise_std": -1.0}, "noise_std must be non-negative"),
        ({"memory": 100}, "memory must be at least"),
        ({"products": 0}, "products must be at least 1"),
        ({"plan": Ridge([1.0, 2.0])}, "plan must be one filter"),
        ({"label_draws": y}, "label_draws must have"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**options)
    prediction = call()
    for refused, message in [
        (lambda: prediction.outputs(Ridge(1.0), domain="other"), "no other"),
        (lambda: prediction.outputs(0.3), "linfit filter"),
        (lambda: prediction.outputs(Ridge([1.0, 2.0]), [1.0, 2.0, 3.0]), "tau must broadcast"),
        (lambda: prediction.decomposition(Ridge(1.0)), "label_draws must"),
        (lambda: leave_one_out(prediction, 0.0), "penalty must be positive"),
        (lambda: leave_one_out(call(products=4), 1.0), "dense kernel"),
        (lambda: summary(prediction, Ridge([1.0, 2.0])), "one filter"),
        (lambda: kernel_product(mlp, case.params, x)(np.ones(3)), "v must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            refused()
    entropy = call(train=(x, np.zeros(case.n, int)), test=(x, np.zeros(case.n, int)), loss="entropy")
    for refused, message in [
        (lambda: entropy.along(GradientFlow(1.0)), "loss must be squared"),
        (lambda: entropy.outputs(Ridge(1.0)), "GradientFlow or GradientDescent"),
        (lambda: entropy.outputs(GradientDescent([0.1, 0.2], 3)), "step_size must be one number"),
    ]:
        with pytest.raises(ValueError, match=message):
            refused()


def test_one_sample_one_output_single_precision_and_eqx_modules(generator):
    x = jnp.asarray(generator.standard_normal((5, D)), jnp.float32)
    model = eqx.nn.MLP(D, "scalar", HIDDEN, 2, key=jax.random.key(0), dtype=jnp.float32)
    got = kernel(lambda model, x: jax.vmap(model)(x), model, x)
    assert got.dtype == jnp.float32
    assert got.shape == (5, 1, 5, 1)
    J = features(lambda model, x: jax.vmap(model)(x), model, x)[:, 0]
    np.testing.assert_allclose(got[:, 0, :, 0], J @ J.T, rtol=1e-5)
    one = predict(lambda model, x: jax.vmap(model)(x), model, (x[:1], [1.0]), (x[1:2], [0.5]), (x[2:], [1.0, 2.0, 0.0]))
    assert one.outputs(MinNorm(), domain="train").dtype == jnp.float32
    np.testing.assert_allclose(one.outputs(MinNorm(), domain="train"), [[1.0]], rtol=1e-4)
    assert np.isnan(one.noise_std)
    assert linfit.predict is predict


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from linfit import GradientFlow, predict
from linfit.tangent import kernel, kernel_product
assert len(jax.devices()) == 4
spread = NamedSharding(Mesh(np.array(jax.devices()), ("samples",)), PartitionSpec("samples"))
apply = lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"]
keys = jax.random.split(jax.random.key(0), 4)
w = {"in": jax.random.normal(keys[0], (5, 9)), "out": jax.random.normal(keys[1], (9, 2))}
x, y = jax.random.normal(keys[2], (16, 5)), jax.random.normal(keys[3], (16, 2))
there = jax.device_put(x, spread)
product = jax.block_until_ready(kernel_product(apply, w, there)(jax.device_put(y, spread)))
assert len(product.sharding.device_set) == 4, product.sharding
assert product.sharding.shard_shape(product.shape) == (4, 2)
np.testing.assert_allclose(product, kernel_product(apply, w, x)(y), rtol=1e-10)
for structured in (True, False):
    got = kernel(apply, w, there, structured=structured)
    np.testing.assert_allclose(got, kernel(apply, w, x), rtol=1e-9, atol=1e-9)
for products in (None, 12):
    one = predict(apply, w, (x, y), (x, y), products=products).outputs(GradientFlow(3.0))
    four = predict(apply, w, (there, y), (there, y), products=products).outputs(GradientFlow(3.0))
    np.testing.assert_allclose(four, one, rtol=1e-8, atol=1e-8)
print("same")
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
