"""Deterministic equivalents against high precision, Talbot's contour by the book, and averaged exact risk."""

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from linfit import (
    FixedShift,
    GradientDescent,
    GradientFlow,
    MinNorm,
    RandomShift,
    Ridge,
    TwoTaskProblem,
    risk_forms,
    sample_design,
    spectra,
)
from linfit.filters import Tabulated
from theory import rational
from theory.equivalents import (
    Spectrum,
    _evaluate,
    along,
    degrees_of_freedom,
    effective_ranks,
    effective_regularization,
    risk,
    signal_to_noise,
    spectral_edge,
)

SPECTRA = {
    "power law": spectra.power_law(1000),
    "exponential": spectra.exponential(1000, 0.02),
    "spiked": spectra.spiked(1000, (30.0, 10.0, 3.0), 0.2),
    "isotropic": spectra.isotropic(1000),
}


def two_tasks(p: int, kind: str = "random", seed: int = 0, noise_std: float = 0.6) -> TwoTaskProblem:
    """Two different diagonal domains, p features, and a pretraining error."""
    generator = np.random.default_rng(seed)
    s = np.arange(1, p + 1) ** -0.8
    pretrain = generator.uniform(0.3, 2, p)
    u = 0.3 * generator.standard_normal(p)
    random = kind == "random"
    shift = RandomShift(generator.uniform(0.1, 1.5, p)) if random else FixedShift(generator.standard_normal(p))
    return TwoTaskProblem(pretrain, s, shift, noise_std, None if kind == "no error" else u)


# D1 and its relatives


def kappa_in_high_precision(penalty: complex, spectrum: Spectrum, n: int) -> complex:
    """D1 by mpmath with 40 digits, on the branch continued from 10⁴ times the penalty."""
    with mpmath.workdps(40):
        pairs = zip(np.asarray(spectrum.eigenvalues), np.asarray(spectrum.multiplicities))
        atoms = [(mpmath.mpf(float(s)), mpmath.mpf(float(m))) for s, m in pairs]
        kappa = mpmath.mpc(penalty) * 10**4
        for scale in 10 ** np.linspace(4, 0, 17):
            target = mpmath.mpc(penalty) * mpmath.mpf(scale)

            def equation(x, target=target):
                return x - x / n * mpmath.fsum(m * s / (s + x) for s, m in atoms) - target

            kappa = mpmath.findroot(equation, kappa)
        return complex(kappa)


@pytest.mark.parametrize("penalty", [3.0, 1e-3, 0.5j, -0.3 + 0.2j, -0.05 - 0.08j, 2 - 1j])
def test_effective_regularization_in_high_precision(penalty):
    spectrum = Spectrum([5.0, 1.0, 0.3, 0.01], [2, 30, 50, 100])
    expected = kappa_in_high_precision(penalty, spectrum, 60)
    got = complex(effective_regularization(penalty, spectrum, 60))
    assert abs(got - expected) < 1e-12 * abs(expected)


def test_effective_regularization_in_closed_form():
    """Isotropic: κ² + κ(1 − p/n − λ) − λ = 0."""
    for p, n in [(30, 10), (10, 30), (10, 10)]:
        for penalty in [1e-6, 0.1, 10.0, 0.2 + 0.4j, -1 + 1e-3j, -4 - 1e-6j]:
            half = (1 - p / n - penalty) / 2
            roots = -half + np.array([1, -1]) * np.sqrt(half**2 + penalty + 0j)
            right = roots[np.argmax(roots.real)] if np.isreal(penalty) else roots[roots.imag * penalty.imag > 0][0]
            got = complex(effective_regularization(penalty, Spectrum([1.0], [p]), n))
            assert abs(got - right) < 1e-11 * abs(right), (p, n, penalty)


def test_effective_regularization_near_the_cut():
    generator = np.random.default_rng(0)
    penalty = 10 ** generator.uniform(-6, 2, 300) * np.exp(1j * (np.pi - 10 ** generator.uniform(-4, 0.4, 300)))
    for s in (*SPECTRA.values(), spectra.exponential(1000, 0.3)):
        kappa = np.asarray(effective_regularization(penalty, s, 250))
        assert (kappa.imag * penalty.imag > 0).all()
        residual = kappa - kappa / 250 * (np.asarray(s) / (np.asarray(s) + kappa[:, None])).sum(1) - penalty
        np.testing.assert_array_less(np.abs(residual), 1e-11 * np.abs(kappa))


def test_effective_regularization_at_zero_penalty():
    """The limit λ → 0, with fewer and more features than samples; zero eigenvalues do not count."""
    spectrum = np.concatenate([spectra.power_law(80), np.zeros(40)])
    assert float(effective_regularization(0.0, spectrum, 80)) == 0
    assert float(effective_regularization(0.0, spectrum, 90)) == 0
    limit, near = (float(effective_regularization(x, spectrum, 50)) for x in (0.0, 1e-14))
    assert 0 < limit == pytest.approx(near, rel=1e-9)
    slope = jax.grad(lambda x: effective_regularization(x, spectrum, 160.0))(0.0)
    assert float(slope) == pytest.approx(160 / (160 - 80))


@pytest.mark.slow
def test_atoms_equal_repeated_eigenvalues_and_cost_nothing():
    values, counts = np.array([3.0, 1.0, 0.1]), np.array([2, 40, 300])
    atoms, repeated = Spectrum(values, counts), np.repeat(values, counts)
    for penalty in (0.0, 0.3, 0.1 + 0.2j):
        a, b = (effective_regularization(penalty, x, 77) for x in (atoms, repeated))
        assert abs(complex(a - b)) < 1e-13
    np.testing.assert_allclose(*(degrees_of_freedom(0.2, x, 77) for x in (atoms, repeated)), rtol=1e-12)
    k = [0, 1, 2, 40, 41, 42, 300]
    np.testing.assert_allclose(effective_ranks(atoms, k), effective_ranks(repeated, k), rtol=1e-12)
    huge = Spectrum(spectra.power_law(1000), np.full(1000, 1e6))
    kappa = effective_regularization(0.0, huge, 1e6)
    assert float(degrees_of_freedom(0.0, huge, 1e6).first) == pytest.approx(1e6)
    assert kappa > 0


def test_a_million_eigenvalues():
    s = spectra.power_law(1_000_000)
    kappa = effective_regularization(jnp.array([0.0, 1e-3]), s, 1000)
    first = np.array([(np.asarray(s) / (np.asarray(s) + k)).sum() for k in np.asarray(kappa)])
    np.testing.assert_allclose(kappa * (1 - first / 1000), [0, 1e-3], atol=1e-12)


@pytest.mark.slow
def test_degrees_of_freedom_and_the_derivative_of_kappa():
    """df₁ = n(1 − λ/κ) and dκ/dλ = 1/(1 − df₂/n); the derivative with respect to n is that of D1."""
    s, n, penalty = spectra.power_law(150), 60.0, 0.01
    kappa = float(effective_regularization(penalty, s, n))
    first, second = map(float, degrees_of_freedom(penalty, s, n))
    assert first == pytest.approx(n * (1 - penalty / kappa), rel=1e-12)
    slope = jax.grad(lambda x: effective_regularization(x, s, n))(penalty)
    assert float(slope) == pytest.approx(1 / (1 - second / n), rel=1e-10)
    in_n = jax.grad(lambda x: effective_regularization(penalty, s, x))(n)
    more, fewer = (float(effective_regularization(penalty, s, n + step)) for step in (1e-4, -1e-4))
    assert float(in_n) == pytest.approx((more - fewer) / 2e-4, rel=1e-6)
    in_s = jax.grad(lambda x: effective_regularization(penalty, x, n))(s)
    up, down = (float(effective_regularization(penalty, s.at[3].add(step), n)) for step in (1e-5, -1e-5))
    assert float(in_s[3]) == pytest.approx((up - down) / 2e-5, rel=1e-6)


def test_effective_ranks_by_definition():
    s = np.sort(np.random.default_rng(1).uniform(size=50))
    for k in (0, 7, 49):
        (r, R), tail = effective_ranks(s, k), s[::-1][k:]
        assert float(r) == pytest.approx(tail.sum() / tail[0])
        assert float(R) == pytest.approx(tail.sum() ** 2 / (tail**2).sum())


@pytest.mark.parametrize("name", SPECTRA)
def test_spectral_edge_bounds_a_sample(name):
    X = sample_design(jax.random.key(0), SPECTRA[name], 250)
    largest = np.linalg.eigvalsh(np.asarray(X @ X.T) / 250)[-1]
    edge = float(spectral_edge(SPECTRA[name], 250))
    assert 0.75 * edge < largest < 1.05 * edge


# Filters as sums of ridges


@pytest.mark.parametrize("count", [1, 40])
def test_contour_against_exponentials(count):
    times = jnp.logspace(-2, 5, count) if count > 1 else jnp.array([37.0])
    s = jnp.concatenate([jnp.zeros(1), jnp.logspace(-8, 4, 60)])
    ridges = rational.flow_ridges(times, rational.plan(times, jnp.ones_like(times), concrete=True))
    poles = ridges.penalties[ridges.group]
    g = jnp.sum(ridges.weights[:, None] / (s[:, None] + poles[:, None]), axis=-1).real
    np.testing.assert_allclose(g / times[:, None], GradientFlow(times)(s) / times[:, None], atol=3e-8)
    np.testing.assert_allclose(s * g, -np.expm1(-times[:, None] * s), atol=1e-9)


def talbot(points: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Nodes z and weights c with e^{−x} ≈ −Re Σ c/(z + x), as in D4."""
    phi = np.pi * np.arange(1, points, 2) / points
    z = points * (0.5017 * phi / np.tan(0.6407 * phi) - 0.6122 + 0.2645j * phi)
    slope = points * (0.5017 / np.tan(0.6407 * phi) - 0.5017 * 0.6407 * phi / np.sin(0.6407 * phi) ** 2 + 0.2645j)
    return z, 2j / points * np.exp(z) * slope


def test_talbot_against_exponentials():
    z, c = talbot()
    x = np.concatenate([[0], np.logspace(-8, 8, 200)])
    np.testing.assert_allclose(-(c / (z + x[:, None])).sum(1).real, np.exp(-x), atol=2e-10)


def test_descent_contours_against_powers():
    s = jnp.linspace(0, 1.2, 50)
    cases = [(0.8, 100, 1e-9), (0.8, 16, 1e-8), (0.8, 1, 1e-8), (1.6, 5, 1e-8), (1.6, 16, 1e-8), (0.01, 5000, 1e-9)]
    for step_size, steps, tolerance in cases:
        k, eta = jnp.array([float(steps)]), jnp.array([step_size])
        if steps <= rational.FEW_STEPS:
            ridges = rational.few_steps_ridges(k, eta, jnp.zeros(1, int))
        else:
            ridges = rational.descent_ridges(k, rational.plan(k, eta, concrete=True))
        g = jnp.sum(ridges.weights / (s[:, None] + ridges.penalties), axis=-1).real
        np.testing.assert_allclose(s * g, s * GradientDescent(step_size, steps)(s), atol=tolerance)


# Risk: an oracle by the book


def by_the_book(problem: TwoTaskProblem, n: int, filter, tau: float):
    """(bias, variance) of both domains by D1–D4: Talbot nodes, naive double sums, variance from D1 at t and 2t."""
    s = np.asarray(problem.finetune_covariance.diagonal())
    u = np.zeros_like(s) if problem.pretrain_error is None else np.asarray(problem.pretrain_error)
    m = np.zeros_like(s) if problem.gap_mean is None else np.asarray(problem.gap_mean)
    omega = np.zeros_like(s) if problem.gap_covariance is None else np.asarray(problem.gap_covariance.diagonal())
    S = omega + m**2

    def kappas(penalties):
        return np.asarray(effective_regularization(jnp.asarray(penalties), s, n))

    def two_point(M, ka, kb):
        Ra, Rb = 1 / (s + ka), 1 / (s + kb)
        a = (M * s * Ra * Rb).sum() / n / (1 - (s**2 * Ra * Rb).sum() / n)
        return ka * kb * (S * Ra * (M + a * s) * Rb).sum(), a

    if isinstance(filter, GradientFlow):
        t = float(filter.time)
        z, c = talbot()
        z2, c2 = np.concatenate([z, z.conj()]), -np.concatenate([c, c.conj()]) / 2
        once, twice = kappas(z2 / t), kappas(z2 / (2 * t))
        alpha = np.real(sum(ck / zk * k / (s + k) for ck, zk, k in zip(c2, z2, once)))

        def parts(M):
            nodes = list(zip(c2 / z2, once))
            quadratic = sum(ca * cb * two_point(M, ka, kb)[0] for ca, ka in nodes for cb, kb in nodes)

            def trace_psi(time, kappa):
                return np.real(sum(ck / zk * (M * k / (s + k)).sum() / (zk / time) for ck, zk, k in zip(c2, z2, kappa)))

            return np.real(quadratic), (2 * trace_psi(t, once) - trace_psi(2 * t, twice)) / n

    else:
        kappa = float(kappas(float(filter.penalty) if isinstance(filter, Ridge) else 0.0))
        alpha = kappa / (s + kappa)

        def parts(M):
            return two_point(M, kappa, kappa)

    pre, variance = np.asarray(problem.pretrain_covariance.diagonal()), tau**2 * float(problem.noise_std) ** 2
    quadratic, gain = parts(s)
    finetune = (1 - tau) ** 2 * S @ s + 2 * tau * (1 - tau) * (S * s) @ alpha + tau**2 * quadratic
    results = [(finetune, variance * gain)]
    quadratic, gain = parts(pre)
    pretrain = (u**2) @ pre + 2 * tau * (u * m * pre) @ (1 - alpha)
    pretrain += tau**2 * (S @ pre - 2 * (S * pre) @ alpha + quadratic)
    return [*results, (pretrain, variance * gain)]


@pytest.mark.parametrize("kind", ["random", "fixed", "no error"])
@pytest.mark.parametrize(
    "filter",
    [MinNorm(), Ridge(0.0), Ridge(0.2), GradientFlow(0.5), GradientFlow(30.0), GradientFlow(1e4)],
    ids=["min-norm", "ridge 0", "ridge", "early", "late", "very late"],
)
def test_risk_by_the_book(filter, kind):
    problem = two_tasks(150, kind)
    for tau in (1.0, 0.4, 1.3):
        for got, (bias, variance) in zip(risk(problem, 60, filter, tau), by_the_book(problem, 60, filter, tau)):
            assert float(got.bias) == pytest.approx(bias, rel=2e-8)
            assert float(got.variance) == pytest.approx(variance, rel=2e-7)


@pytest.mark.slow
def test_ensembles_and_broadcasting():
    problem = two_tasks(150)
    taus, times = jnp.array([[0.3], [1.2]]), jnp.array([0.0, 1.0, 20.0, 400.0, jnp.inf])
    a, b = risk(problem, 40, GradientFlow(times), taus), risk(problem, 40, taus * GradientFlow(times))
    assert {leaf.shape for leaf in jax.tree.leaves((a, b))} == {(2, 5)}
    np.testing.assert_allclose(a, b, rtol=1e-12)
    limit = risk(problem, 40, MinNorm(), taus[:, 0])
    np.testing.assert_allclose(a.finetune.total[:, -1], limit.finetune.total, rtol=1e-12)
    untouched = risk(problem, 40, MinNorm(), 0.0)
    np.testing.assert_allclose(a.pretrain.total[:, 0], untouched.pretrain.total, rtol=1e-12)
    assert float(untouched.finetune.variance) == 0


@pytest.mark.parametrize("p", [30, 60, 90])
def test_min_norm_on_both_sides_of_the_peak(p):
    """Isotropic: known in closed form; infinite variance at p = n."""
    n, ratio = 60, p / 60
    problem = TwoTaskProblem([1.0], [1.0], RandomShift([1 / p]), 1.0)  # one atom of multiplicity p
    result = risk(problem, n, MinNorm(), multiplicities=[p]).finetune
    if p == n:
        assert np.isinf(float(result.variance))
        assert float(result.bias) == 0
        return
    variance = ratio / (1 - ratio) if ratio < 1 else 1 / (ratio - 1)
    assert float(result.variance) == pytest.approx(variance, rel=1e-11)
    assert float(result.bias) == pytest.approx(max(0, 1 - 1 / ratio), rel=1e-11)
    late = risk(problem, n, GradientFlow(1e7), multiplicities=[p]).finetune
    assert float(late.total) == pytest.approx(float(result.total), rel=1e-6)


@pytest.mark.slow
def test_multiplicities_stand_for_equal_coordinates():
    small = two_tasks(15, "fixed")
    counts = np.arange(3, 18)  # 150 in all
    vectors = small.pretrain_covariance.diagonal(), small.finetune_covariance.diagonal(), small.shift.vector
    pretrain, finetune, shift = (np.repeat(np.asarray(x), counts) for x in vectors)
    u = np.repeat(np.asarray(small.pretrain_error), counts)
    large = TwoTaskProblem(pretrain, finetune, FixedShift(shift), small.noise_std, u)
    for filter in (MinNorm(), Ridge(0.1), GradientFlow(7.0)):
        got = risk(small, 90, filter, 0.7, multiplicities=counts)
        np.testing.assert_allclose(got, risk(large, 90, filter, 0.7), rtol=1e-9)


@pytest.mark.slow
def test_only_the_diagonal_of_the_shift_covariance_enters():
    """A dense Ω: exact risk averaged over designs follows its diagonal."""
    p, n = 120, 40
    generator = np.random.default_rng(3)
    root = generator.standard_normal((p, p)) / p**0.5
    omega, s = root @ root.T, np.arange(1, p + 1) ** -0.5
    dense = TwoTaskProblem(s, s, RandomShift((omega + omega.T) / 2), 0.3)
    diagonal = TwoTaskProblem(s, s, RandomShift(np.diag(omega)), 0.3)
    predicted, same = (float(risk(problem, n, Ridge(0.1)).finetune.total) for problem in (dense, diagonal))
    assert predicted == pytest.approx(same)
    totals = averaged(dense, n, [Ridge(0.1)], draws=24)[:, 0, 0]
    assert abs(totals.mean() - predicted) < 4 * totals.std(ddof=1) / 24**0.5 + 0.01 * totals.mean()


@pytest.mark.slow
def test_descent_tends_to_flow_and_is_exact_for_one_step():
    problem = two_tasks(150, "fixed")
    gaps = []
    for steps in (50, 500, 5000):
        a = risk(problem, 40, GradientDescent(20.0 / steps, steps)).finetune.total
        gaps.append(float(jnp.abs(a / risk(problem, 40, GradientFlow(20.0)).finetune.total - 1)))
    assert gaps[0] < 0.05
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.3)
    assert gaps[2] == pytest.approx(gaps[1] / 10, rel=0.1)
    # One step: Σ̂ itself, whose second moment is known: E Σ̂MΣ̂ = ΣMΣ + Σ tr(MΣ)/n (+ ΣMΣ/n, below leading order)
    s, eta, n = np.asarray(problem.finetune_covariance.diagonal()), 0.3, 40
    S = np.asarray(problem.gap_mean) ** 2
    expected = (S * s) @ (1 - eta * s) ** 2 + eta**2 * (S @ s) * (s @ s) / n
    one = risk(problem, n, GradientDescent(eta, 1)).finetune
    assert float(one.bias) == pytest.approx(expected, rel=1e-7)
    assert float(one.variance) == pytest.approx(0.36 * eta**2 * (s @ s) / n, rel=1e-7)


# Transformations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "points"),
    [(Ridge, [0.01, 0.5]), (GradientFlow, [0.3, 40.0]), (lambda x: GradientDescent(x, 30), [0.01, 0.2])],
    ids=["ridge", "flow", "descent"],
)
def test_jit_vmap_and_gradients(make, points):
    """Under jit(vmap(grad)) over hyperparameter, τ and noise: values as outside, gradients as differences."""
    problem = two_tasks(150, "fixed")

    def total(x, tau, noise_std):
        moved = eqx.tree_at(lambda it: it.noise_std, problem, jnp.asarray(noise_std))
        result = risk(moved, 60, make(x), tau)
        return result.finetune.total + 0.5 * result.pretrain.total

    arguments = np.array([points, [0.4, 1.1], [0.2, 0.9]])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(total, argnums=(0, 1, 2))))(*jnp.asarray(arguments))
    for index in range(2):
        at = arguments[:, index]
        assert float(values[index]) == pytest.approx(float(total(*at)), rel=1e-7)
        for slope, step in zip(slopes, 1e-4 * np.diag(at)):
            difference = float(total(*(at + step)) - total(*(at - step))) / (2 * step.sum())
            assert float(slope[index]) == pytest.approx(difference, rel=1e-4, abs=1e-8)


@pytest.mark.slow
def test_best_penalty_by_descent_on_the_prediction():
    """S = ωI: ridge at λ = σ²/(nω) is Bayes, and its τ* is 1 (O4)."""
    p, n, noise, omega = 150, 60, 0.5, 0.4
    problem = TwoTaskProblem(spectra.power_law(p), spectra.power_law(p), RandomShift(np.full(p, omega)), noise)
    slope = jax.grad(lambda x: risk(problem, n, Ridge(jnp.exp(x))).finetune.total)
    best = noise**2 / (n * omega)
    assert abs(float(slope(jnp.log(best)))) < 1e-9
    assert float(slope(jnp.log(best * 1.01))) > 1e-6 > -1e-6 > float(slope(jnp.log(best / 1.01)))
    assert float(along(problem, n, Ridge(best)).finetune.optimal_tau) == pytest.approx(1, abs=1e-10)


def test_new_values_do_not_recompile():
    problem, compiled = two_tasks(150), []
    for value in (1.0, 2.0):
        for filter in (Ridge([value, 0.1]), GradientFlow([value, 0.1])):
            risk(problem, 30 + value, filter, value)
        compiled.append(_evaluate._cache_size())
    assert compiled[0] == compiled[1]


@pytest.mark.slow
def test_single_precision():
    problem = two_tasks(150, "fixed")
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), problem)
    for filter in (MinNorm(), Ridge(np.float32(0.1)), GradientFlow(np.array([0.5, 30.0], np.float32))):
        got = risk(low, 60, filter, np.float32(0.7))
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
        np.testing.assert_allclose(got, risk(problem, 60, filter, 0.7), rtol=3e-3)


# Against averaged exact risk


def averaged(problem: TwoTaskProblem, n: int, filters, draws: int, tau=1.0, seed: int = 0) -> np.ndarray:
    """Exact total risks (draws, domains, filters…)."""
    rows = []
    for key in jax.random.split(jax.random.key(seed), draws):
        forms = risk_forms(sample_design(key, problem.finetune_covariance, n), problem)
        rows.append([[np.asarray(form(filter, tau).total) for filter in filters] for form in forms])
    return np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exponential", "spiked"])
def test_within_one_percent_at_250_by_1000(name):
    """Times from 1 to 1e5, τ in {0.3, 0.7, 1, 1.3}, ridge and descent; both domains. (Power laws: claims D3, D4.)"""
    s, n = SPECTRA[name], 250
    problem = TwoTaskProblem(s, s, RandomShift(spectra.isotropic(1000, 1 / float(s.sum()))), 0.5)
    taus = jnp.array([0.3, 0.7, 1.0, 1.3])[:, None]
    filters = [
        GradientFlow(jnp.logspace(0, 5, 6)),
        Ridge(jnp.logspace(-4, 1, 6)),
        GradientDescent(0.2 / float(s[0]), jnp.array([1.0, 4, 16, 64, 256, 1024])),
    ]
    totals = averaged(problem, n, filters, 8, taus)
    mean, error = totals.mean(0), totals.std(0, ddof=1) / 8**0.5
    for index, filter in enumerate(filters):
        for domain, result in enumerate(risk(problem, n, filter, taus)):
            gap = np.abs(np.asarray(result.total) / mean[domain, index] - 1)
            assert (gap < 0.01 + 3 * error[domain, index] / mean[domain, index]).all(), (index, domain, gap.max())


@pytest.mark.slow
def test_a_fixed_shift_and_error():
    problem = two_tasks(800, "fixed")
    filters = [MinNorm(), Ridge(0.05), GradientFlow(20.0), GradientDescent(0.3, 20)]
    totals = averaged(problem, 250, filters, 16, 0.8)
    mean, error = totals.mean(0), totals.std(0, ddof=1) / 16**0.5
    predicted = np.array([[float(result.total) for result in risk(problem, 250, filter, 0.8)] for filter in filters]).T
    assert (np.abs(predicted - mean) < 4 * error + 0.01 * mean).all()


# Bad input

ONES = np.ones(5)
GOOD, NEW_DENSE, OLD_DENSE = (
    TwoTaskProblem(*pair, RandomShift(ONES), 0.1) for pair in ((ONES, ONES), (ONES, np.eye(5)), (np.eye(5), ONES))
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_regularization(-1.0, ONES, 3), "penalty must be non-negative"),
        (lambda: effective_regularization(-1.0 + 0j, ONES, 3), "penalty must lie off the negative real axis"),
        (lambda: effective_regularization(complex("nan"), ONES, 3), "penalty must be finite"),
        (lambda: effective_regularization(np.nan, ONES, 3), "penalty must be finite"),
        (lambda: effective_regularization(1.0, ONES, 0), "n must be positive"),
        (lambda: effective_regularization(1.0, np.zeros(3), 2), "spectrum must have a positive eigenvalue"),
        (lambda: effective_regularization(1.0, [1.0, -1.0], 2), "spectrum must be non-negative"),
        (lambda: effective_regularization(1.0, np.eye(3), 2), "spectrum must have 1 dimension"),
        (lambda: Spectrum([1.0, 2.0], [1.0]), "multiplicities must match eigenvalues"),
        (lambda: Spectrum([1.0], [-1.0]), "multiplicities must be non-negative"),
        (lambda: degrees_of_freedom(-1.0, ONES, 3), "penalty must be non-negative"),
        (lambda: effective_ranks(ONES, 5), "k must be below the number of positive eigenvalues"),
        (lambda: effective_ranks(ONES, -1), "k must be non-negative"),
        (lambda: spectral_edge(ONES, -1), "n must be positive"),
        (lambda: risk(GOOD, 0, MinNorm()), "n must be positive"),
        (lambda: risk(GOOD, 3, MinNorm(), np.nan), "tau must be finite"),
        (lambda: risk(GOOD, 3, Tabulated([1.0])), "filter must be MinNorm, Ridge, GradientFlow, GradientDescent"),
        (lambda: risk(GOOD, 3, MinNorm(), multiplicities=[1.0]), "multiplicities must match"),
        (lambda: risk(GOOD, 3, GradientDescent(1.0, 3)), "step_size must be below 2/s_max"),
        (lambda: risk(1.0, 3, MinNorm()), "problem must be a linfit.TwoTaskProblem"),
        (lambda: risk(NEW_DENSE, 3, MinNorm()), "finetune_covariance must be diagonal, given as eigenvalues"),
        (lambda: along(OLD_DENSE, 3, MinNorm()), "pretrain_covariance must be diagonal"),
        (lambda: signal_to_noise(NEW_DENSE), "finetune_covariance must be diagonal"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
