"""Combinations of filters, self-distillation, and the fine-tuners beside them, against plain loops (docs, C1–C5)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from linfit import (
    Combination,
    FixedShift,
    GradientFlow,
    MinNorm,
    Ridge,
    SelfDistillation,
    TwoTaskProblem,
    aligned_problem,
    risk_forms,
    sample_designs,
    spectra,
)
from linfit.filters import Tabulated
from linfit.network import TwoLayer
from linfit.robust import adversarial_fine_tune, adversarial_loss, largest_radius
from linfit.weighting import entropy_weights, flow_weights, smooth_weights
from sims.claims import Claim, combinations
from sims.parameters import Parameter
from sims.verify import verify
from theory import dropout, equivalents, frontier, robust, s3ft
from theory.distillation import optimal_mix
from theory.optimum import minimise_over_logarithm

N, P = 12, 30
PROBLEM = aligned_problem(spectra.power_law(P), alignment=0.4, noise_std=0.6, pretrain_risk=0.2)
FILTERS = (MinNorm(), Ridge(0.3), GradientFlow(2.0))


@pytest.fixture(scope="module")
def forms(pytestconfig):
    key = jax.random.key(pytestconfig.getoption("--seed"))
    return risk_forms(sample_designs(key, PROBLEM.finetune_covariance, N, 3), PROBLEM)


@pytest.fixture(scope="module")
def form(forms):
    return jax.tree.map(lambda leaf: leaf[0], forms.finetune)


def test_the_best_combination_beats_a_search(form, generator):
    best = form.optimal_combination(FILTERS)
    np.testing.assert_allclose(form(Combination(FILTERS, best.weights)).total, best.risk, rtol=1e-12)
    size = np.geomspace(1e-3, 1, 400)[:, None] * np.abs(best.weights)
    others = form(Combination(FILTERS, best.weights + size * generator.standard_normal((400, 3)))).total
    assert float(best.risk) < float(others.min())
    assert float(best.risk) < min(float(form.along(filter).optimal_risk) for filter in FILTERS)
    alone = form.optimal_combination([FILTERS[1]])
    np.testing.assert_allclose(alone.weights[0], form.optimal_tau(FILTERS[1]), rtol=1e-10)


def test_filters_that_are_alike_share_their_weight(form):
    """Twins, near twins, and a filter that is 0: no blow-up, and the risk of those that differ."""
    best = form.optimal_combination(FILTERS)
    twins = form.optimal_combination([*FILTERS, FILTERS[0], FILTERS[0]])
    np.testing.assert_allclose(twins.risk, best.risk, rtol=1e-12)
    np.testing.assert_allclose(twins.weights[jnp.array([0, 3, 4])], best.weights[0] / 3, rtol=1e-6)
    near = form.optimal_combination([*FILTERS, Ridge(0.3 * (1 + 1e-15)), GradientFlow(0.0)])
    np.testing.assert_allclose(near.risk, best.risk, rtol=1e-9)
    assert float(jnp.abs(near.weights).max()) < 10 * float(jnp.abs(best.weights).max())


def test_combinations_on_stacks_as_values_and_compiled(forms, form):
    stacked = forms.finetune.optimal_combination(FILTERS)
    assert stacked.weights.shape == (3, 3)
    best = form.optimal_combination(FILTERS)
    np.testing.assert_allclose(stacked.weights[0], best.weights, rtol=1e-8)
    table = jnp.stack([filter(form.eigenvalues) for filter in FILTERS])
    for same in (form.optimal_combination(table), jax.jit(lambda f: f.optimal_combination(FILTERS))(form)):
        np.testing.assert_allclose(same.risk, best.risk, rtol=1e-10)
    every = form.optimal_combination(Ridge(np.geomspace(1e-4, 10, N)))
    np.testing.assert_allclose(every.risk, form.oracle_risk(), rtol=1e-2)
    assert float(every.risk) >= float(form.oracle_risk()) * (1 - 1e-12)


def test_a_singular_form_has_a_best_combination():
    """Without noise and with one direction of shift: H has rank 1."""
    one = TwoTaskProblem(np.ones(4), np.ones(4), FixedShift([1.0, 0.0, 0.0, 0.0]), 0.0)
    form = risk_forms(np.eye(4)[:2] * 2, one).finetune
    best = form.optimal_combination(FILTERS)
    assert np.isfinite(best.weights).all()
    np.testing.assert_allclose(best.risk, 0, atol=1e-12)


@pytest.mark.parametrize(
    ("filters", "message"), [([], "at least one filter"), (MinNorm(), "K filters"), (np.ones((2, 5)), "filter values")]
)
def test_bad_lists_of_filters(form, filters, message):
    with pytest.raises(ValueError, match=message):
        form.optimal_combination(filters)


PENALTIES = np.array([1e-3, 0.05, 0.4, 3.0])


def test_distillation_is_the_derivative_in_the_equivalents():
    step, mix = 1e-3, np.array([-0.5, 0.3, 1.0, 2.0])
    both = (Ridge(PENALTIES), Ridge(PENALTIES * (1 + step)), Ridge(PENALTIES * (1 - step)))
    weights = np.stack([np.ones(4), mix / (2 * step), -mix / (2 * step)], axis=-1)
    exact, differences = (
        equivalents.risk(PROBLEM, 20, filter)
        for filter in (SelfDistillation(PENALTIES, mix), Combination(both, weights))
    )
    for one, other in zip(exact, differences, strict=True):
        np.testing.assert_allclose(one.total, other.total, rtol=2e-6)


@pytest.mark.slow
def test_equivalents_of_sums_are_quadratic_and_know_their_limits():
    """The parallelogram law; the parts that stand for t = 0, ∞ and λ = ∞; one filter as a sum of halves."""
    a, b = GradientFlow([1.0, 10.0, np.inf, 0.0]), Ridge(0.2)

    def total(filter):
        return np.asarray(equivalents.risk(PROBLEM, 20, filter).finetune.total)

    start = total(Ridge(np.inf))
    sides = total(a + b) + total(a + (-1.0) * b)
    np.testing.assert_allclose(sides, 2 * total(a) + total(b) + total((-1.0) * b) - 2 * start + 0 * sides, rtol=1e-9)
    np.testing.assert_allclose(total(0.5 * a + 0.5 * a), total(a), rtol=1e-12)
    np.testing.assert_allclose(total(0.5 * (b + b)), total(b), rtol=1e-12)
    shared = Combination((GradientFlow(3.0), b), np.random.default_rng(0).normal(size=(40, 2)))
    one = Combination((GradientFlow(3.0), b), shared.weights[7])
    np.testing.assert_allclose(total(shared)[7], total(one), rtol=1e-9)


@pytest.mark.slow
def test_equivalents_of_sums_under_jit_and_grad():
    def value(penalty, time, weights):
        filter = Combination((Ridge(penalty), GradientFlow(time), SelfDistillation(penalty, 0.4)), weights)
        return equivalents.risk(PROBLEM, 20, filter).finetune.total

    at = (0.1, 3.0, jnp.array([0.3, 0.7, -0.2]))
    np.testing.assert_allclose(jax.jit(value)(*at), value(*at), rtol=1e-6)
    slopes, step = jax.grad(value, (0, 1))(*at), 1e-5
    np.testing.assert_allclose(
        slopes[0], (value(0.1 + step, *at[1:]) - value(0.1 - step, *at[1:])) / 2 / step, rtol=1e-4
    )
    np.testing.assert_allclose(
        slopes[1], (value(0.1, 3 + step, at[2]) - value(0.1, 3 - step, at[2])) / 2 / step, rtol=1e-4
    )


@pytest.mark.parametrize(
    "filter", [Combination((MinNorm(), Tabulated([1.0])), [1.0, 1.0]), 0.5 * (MinNorm() + Tabulated([1.0]))]
)
def test_no_equivalent_of_a_table(filter):
    with pytest.raises(ValueError, match="no equivalent for Tabulated"):
        equivalents.risk(PROBLEM, 20, filter)


def test_the_best_mix_by_search(forms):
    for form in forms:
        best = optimal_mix(form, PENALTIES)
        around = np.linspace(-1, 1, 21)[:, None] + np.asarray(best.mix)
        risks = np.asarray(form(SelfDistillation(PENALTIES, around)).total.mean(axis=0))
        np.testing.assert_array_equal(risks.argmin(axis=0), 10)
        np.testing.assert_allclose(risks[10], best.risk, rtol=1e-10)
        np.testing.assert_allclose(form(Ridge(PENALTIES)).total.mean(axis=0) - best.gain, best.risk, rtol=1e-10)


def test_no_mix_helps_where_the_penalty_is_best(form):
    best = minimise_over_logarithm(lambda penalty: form(Ridge(penalty)).total, 1e-4, 1e3).argument
    gains = optimal_mix(form, best * jnp.array([0.2, 1.0, 5.0]))
    assert float(gains.gain[1]) < 1e-9 < 1e-5 < float(min(gains.gain[0], gains.gain[2]))
    assert float(gains.mix[0]) > 0 > float(gains.mix[2])


def test_ends_of_the_penalty_gain_nothing(form):
    ends = optimal_mix(form, [0.0, jnp.inf])
    np.testing.assert_array_equal(ends.mix, 0)
    np.testing.assert_array_equal(ends.gain, 0)
    np.testing.assert_allclose(ends.risk, [form(MinNorm()).total, form.constant])
    assert optimal_mix(form, 0.3).mix.shape == ()
    with pytest.raises(ValueError, match="penalty"):
        optimal_mix(form, -1.0)


def attacked(generator, n, p):
    X, theta_1 = generator.standard_normal((n, p)) / np.arange(1, p + 1) ** 0.5, generator.standard_normal(p)
    y = X @ (theta_1 + generator.standard_normal(p)) + 0.4 * generator.standard_normal(n)
    return X, y, theta_1


def test_adversarial_weights_have_a_dual_certificate(generator):
    """d = Xᵀα with |nλα_i| ≤ |r_i| + ε‖d‖, equality and the sign of r_i wherever there is a residual: the optimum."""
    X, y, theta_1 = attacked(generator, 10, 25)
    radii = float(largest_radius(X, y, theta_1)) * np.array([0.02, 0.2, 0.5, 0.9])
    for radius, theta in zip(radii, np.asarray(adversarial_fine_tune(X, y, theta_1, radii, steps=3000)), strict=True):
        d, r = theta - theta_1, y - X @ theta
        dual, reach = np.linalg.lstsq(X.T, d, rcond=None)[0], radius * np.linalg.norm(d)
        penalty = radius**2 + radius * abs(r).mean() / np.linalg.norm(d)
        push = len(y) * penalty * dual / (abs(r) + reach)
        assert abs(push).max() < 1 + 1e-6
        missed = abs(r) > 1e-4
        np.testing.assert_allclose(push[missed], np.sign(r[missed]), atol=1e-6)


def test_adversarial_ends(generator):
    X, y, theta_1 = attacked(generator, 10, 25)
    largest = float(largest_radius(X, y, theta_1))
    dual = np.linalg.solve(X @ X.T, y - X @ theta_1)
    step = X.T @ dual
    interpolates = np.linalg.norm(step) / (len(y) * abs(dual).max())
    radii = np.array([0.0, 0.9 * interpolates, 1.2 * interpolates, largest, 3 * largest])
    theta = np.asarray(adversarial_fine_tune(X, y, theta_1, radii, steps=400))
    np.testing.assert_allclose(theta[:2], np.stack([theta_1 + step] * 2), rtol=1e-4, atol=1e-5)
    assert abs(theta[2] - theta_1 - step).max() > 1e-4 * abs(step).max()
    np.testing.assert_array_equal(theta[3:], np.stack([theta_1] * 2))
    down = theta_1 + 1e-5 * X.T @ (y - X @ theta_1)
    losses = [float(adversarial_loss(X, y, w, theta_1, 0.98 * largest)) for w in (theta_1, down)]
    assert losses[1] < losses[0]


def test_adversarial_shapes_and_errors(generator):
    X, y, theta_1 = attacked(generator, 4, 6)
    radii = np.full((2, 3), 0.1)
    theta = adversarial_fine_tune(X, y, theta_1, radii)
    assert theta.shape == (2, 3, 6)
    assert adversarial_loss(X, y, theta, theta_1, radii).shape == (2, 3)
    compiled = jax.jit(lambda X, y, radius: adversarial_fine_tune(X, y, theta_1, radius))(X, y, 0.1)
    np.testing.assert_allclose(compiled, theta[0, 0], rtol=1e-6)
    assert adversarial_fine_tune(*(jnp.asarray(a, jnp.float32) for a in (X, y, theta_1)), 0.1).dtype == jnp.float32
    for call, message in (
        (lambda: adversarial_fine_tune(X, y, theta_1, -1.0), "radius must be non-negative"),
        (lambda: adversarial_fine_tune(X, y[:2], theta_1, 1.0), "y must match"),
        (lambda: adversarial_fine_tune(X, np.stack([y, y], 1), np.stack([theta_1] * 2, 1), 1.0), r"y must be \(n,\)"),
        (lambda: adversarial_loss(X, y, np.ones(3), theta_1, 1.0), r"theta must have shape"),
        (lambda: robust.equivalent_radius(1.0, 0.0, 1.0), "distance must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_equivalent_radius_is_the_root_of_its_equation():
    penalty, ratio = np.logspace(-6, 6, 13), np.array([[0.03], [1.0], [50.0]])  # ‖d‖/√v
    c = (2 / np.pi) ** 0.5
    radius = np.asarray(robust.equivalent_radius(penalty, 2 * ratio, 2.0))
    by_hand = radius * (radius + c / ratio) / (1 + c * radius * ratio)
    np.testing.assert_allclose(by_hand, penalty + 0 * ratio, rtol=1e-8)
    assert (np.diff(radius, axis=1) > 0).all()


def test_hidden_dropout_by_a_grid():
    """The threshold for two features by a grid over their singular values; no dropout; all dropped but one limit."""
    a, rate, h = np.array([2.0, 0.7]), 0.6, 3
    s = np.linspace(0, 2, 401)
    loss = ((s[:, None] - a[0]) ** 2 + (s - a[1]) ** 2) / 2 + 1.5 / (2 * h) * (s[:, None] + s) ** 2
    at = np.unravel_index(loss.argmin(), loss.shape)
    np.testing.assert_allclose(dropout.hidden_optimum(a[::-1], rate, h)[::-1], s[np.array(at)], atol=0.005)
    np.testing.assert_array_equal(dropout.hidden_optimum(a, 0.0, 2), a)
    network = TwoLayer(jnp.ones((2, 4, 3)), jnp.ones((2, 3, 5)))
    np.testing.assert_allclose(dropout.hidden_penalty(network, [0.5, 0.75]), [0.5 * 3 * 20, 1.5 * 3 * 20])
    for call, message in (
        (lambda: dropout.hidden_optimum(a, 1.0, 3), "rate must be below 1"),
        (lambda: dropout.hidden_optimum(a, -0.1, 3), "rate must be non-negative"),
        (lambda: dropout.hidden_optimum(a, 0.5, 1), "hidden_size must be at least 2"),
        (lambda: dropout.hidden_optimum(a, [0.5, 0.1], 2), "rate must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_smooth_and_entropy_weights():
    losses = np.array([0.0, 0.5, 2.0, np.inf, np.nan])
    with pytest.warns(UserWarning, match="NaN"):
        weights = smooth_weights(losses, 0.5)
    np.testing.assert_allclose(weights, [1, 0.5, 0.2, 0, 0])
    small = np.array([0.0, 1e-3, 2e-3])
    np.testing.assert_allclose(smooth_weights(small, 1.0), flow_weights(small, 1.0), atol=3e-6)
    np.testing.assert_array_equal(smooth_weights([0.0, 1.0], 0.0), [1, 0])
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    p = scipy.special.softmax(logits, axis=-1)
    np.testing.assert_allclose(entropy_weights(logits), scipy.stats.entropy(p, axis=-1) / np.log(5), rtol=1e-12)
    np.testing.assert_allclose(entropy_weights(logits + 700), entropy_weights(logits), rtol=1e-9)
    with pytest.raises(ValueError, match="at least two classes"):
        entropy_weights([[1.0]])


@pytest.mark.parametrize("temperature", [1e-4, 0.3, 4.0, 120.0, 134.0, 1e6])
def test_smooth_ratio_by_quadrature(temperature):
    knots = [0, min(temperature**0.5, 5), 9]
    sums = [
        sum(
            scipy.integrate.quad(
                lambda r, k=k: r**k / (1 + r**2 / temperature) * np.exp(-(r**2) / 2), a, b, epsrel=1e-12
            )[0]
            for a, b in itertools.pairwise(knots)
        )
        for k in (0, 2)
    ]
    np.testing.assert_allclose(frontier.smooth_ratio(9 * temperature, 3.0), sums[1] / sums[0], rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 4])
def test_calibration_inverts_the_shares(rank, generator):
    for _ in range(20):
        a, f, s = generator.uniform(0, 0.2, 3)
        made = s3ft.Procedure(generator.uniform(0.1, 3), generator.uniform(0, 1), a, f, s)
        own, paraphrase, _ = s3ft.shares(made, rank, 1.3)
        rates = {"false_accept": a, "false_reject": f, "sampling_std": s}
        found = s3ft.calibrated(float(own), float(paraphrase), rank, 1.3, **rates)
        if float(own) < 1 - f - 1e-3:  # beyond, a χ² quantile has lost its digits
            np.testing.assert_allclose(np.array(found, float), np.array(made, float), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": 1.2}, "own must be at most 1"),
        ({"own": 0.7, "paraphrase": 0.5}, "own and paraphrase must add up to at most 1"),
        ({"own": 0.02, "false_accept": 0.1}, r"own must lie in \[0.1, 1\]"),
        ({"own": 0.95, "paraphrase": 0.0, "false_reject": 0.1}, r"own must lie in \[0, 0.9\]"),
        ({"own": 0.5, "paraphrase": 0.5, "false_reject": 0.1}, "paraphrase must be at most 0.4"),
        ({"false_accept": 0.6, "false_reject": 0.5}, "must add up to less than 1"),
        ({"residual_std": 0.0}, "residual_std must be positive"),
        ({"content_rank": 0}, "content_rank must be at least 1"),
    ],
)
def test_shares_that_no_procedure_has(change, message):
    arguments = {"own": 0.5, "paraphrase": 0.2, "content_rank": 2}
    with pytest.raises(ValueError, match=message):
        s3ft.calibrated(**(arguments | change))


def test_all_own_or_all_gold():
    assert s3ft.calibrated(1.0, 0.0, 2).tolerance == np.inf
    assert s3ft.calibrated(0.0, 0.0, 2)[:2] == (0.0, 0.0)
    assert s3ft.calibrated(0.0, 1.0, 2)[:2] == (0.0, 1.0)


CLAIMS = {claim.id: claim for claim in vars(combinations).values() if isinstance(claim, Claim)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "values"),
    [
        ("C1.oracle", {"missing": 6}),
        ("C2", {"reteach": 2.0}),
        ("C2.sign", {"anisotropy": 2.0}),
        ("C3", {"normalised": 1.0, "radius": 1.0}),
        ("C4", {"norm": 6.0}),
        ("C4.population", {"skewness": 0.9}),
        ("C5", {"together": 1.0}),
        ("C5.layer", {"late": 0.8}),
        ("E1.smooth", {"skewed_noise": 0.9}),
        ("T2.calibrated", {"heavy_tails": 0.8}),
    ],
)
def test_claims_fail_outside_their_assumptions(id, values):
    held = {name: Parameter(low=value, high=value) for name, value in values.items()}
    if id == "C1.oracle":
        held = {"missing": Parameter(low=6, high=6, scale="whole")}
    claim = CLAIMS[id]._replace(parameters=CLAIMS[id].parameters | held)
    (verdict,) = verify([claim], instances=6, seed=0)
    assert not verdict.holds
