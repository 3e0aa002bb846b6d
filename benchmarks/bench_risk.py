"""The exact risk surface, 101 τ × (60 λ + 60 times), beside plain numpy, scikit-learn, and the primitives it needs.

`make bench` sets one BLAS thread and NPROC, as the command line does, so that designs run side by side.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.timing import median_seconds, sized
from linfit import GradientFlow, RandomShift, Ridge, TwoTaskProblem, column_blocks, risk_forms, sample_design, spectra

N, P, DESIGNS = sized((500, 5000, 32), (20, 60, 2))
PENALTIES, TIMES, TAU = np.logspace(-5, 2, 60), np.logspace(-2, 5, 60), np.linspace(0, 1, 101)
SPECTRUM = spectra.power_law(P)
PROBLEMS = {
    "isotropic shift": TwoTaskProblem(SPECTRUM, SPECTRUM, RandomShift(spectra.isotropic(P)), 0.3),
    "diagonal shift, both domains": TwoTaskProblem(SPECTRUM**0.5, SPECTRUM, RandomShift(SPECTRUM**1.3), 0.3),
}


@pytest.fixture(scope="module")
def stack():
    """32 designs as one JAX array."""
    keys = jax.random.split(jax.random.key(0), DESIGNS)
    return jnp.stack([sample_design(key, PROBLEMS["isotropic shift"].finetune_covariance, N) for key in keys])


@pytest.fixture(scope="module")
def baselines(stack):
    """One GEMM X Xᵀ (not symmetric: a copy of X), and GEMM + eigh; for 32 designs two workers share them."""
    X = np.asarray(stack[0])
    copy = X.copy()
    kernel = X @ X.T / N

    def floor(_):
        np.linalg.eigh(X @ copy.T / N)

    def all_designs(work):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(DESIGNS)))

    return {
        "one": {
            "GEMM": median_seconds(lambda: X @ copy.T),
            "(GEMM + eigh)": median_seconds(lambda: X @ copy.T) + median_seconds(lambda: np.linalg.eigh(kernel)),
        },
        "stack": {
            "(32 GEMM)": median_seconds(lambda: all_designs(lambda _: X @ copy.T), 3),
            "32 (GEMM + eigh), two workers": median_seconds(lambda: all_designs(floor), 3),
        },
    }


def surface(X, problem):
    """Bias² and variance on the whole grid."""
    form = risk_forms(X, problem).finetune
    return jax.block_until_ready([form(filter, TAU[:, None]) for filter in (Ridge(PENALTIES), GradientFlow(TIMES))])


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_design(benchmark, stack, baselines, name):
    benchmark.extra_info["baselines"] = baselines["one"]
    benchmark(surface, stack[0], PROBLEMS[name])


@pytest.mark.parametrize("name", PROBLEMS)
def test_thirty_two_designs(benchmark, stack, baselines, name):
    benchmark.extra_info["baselines"] = baselines["stack"]
    benchmark.pedantic(surface, (stack, PROBLEMS[name]), rounds=3, warmup_rounds=1)


def test_new_hyperparameters(benchmark, stack, baselines):
    """A new set of 60 penalties, after the reduction: no recompilation, under a millisecond."""
    form = risk_forms(stack[0], PROBLEMS["isotropic shift"]).finetune
    benchmark.extra_info["baselines"] = baselines["one"]
    benchmark(lambda: form(Ridge(PENALTIES * 1.1), 0.7).total.block_until_ready())


def test_numpy_eigh_once(benchmark, stack, baselines):
    """What one would write by hand in numpy for an isotropic shift: eigh of the Gram, then vectorised."""
    X, spectrum = np.asarray(stack[0]), np.asarray(SPECTRUM)

    def by_hand():
        s, U = np.linalg.eigh(X @ X.T / N)
        scaled = X * np.sqrt(spectrum)
        Q = np.einsum("ij,ij->j", U, (scaled @ scaled.T) @ U)
        g = np.concatenate([1 / (s + PENALTIES[:, None]), -np.expm1(-TIMES[:, None] * s) / s])
        slope, bias, noise = g @ Q / N, g**2 @ (s * Q) / N, 0.09 * g**2 @ Q / N**2
        tau = TAU[:, None]
        return spectrum.sum() - 2 * tau * slope + tau**2 * bias, tau**2 * noise

    expected = np.concatenate([part.bias for part in surface(stack[0], PROBLEMS["isotropic shift"])], axis=1)
    np.testing.assert_allclose(by_hand()[0], expected, rtol=1e-8)
    benchmark.extra_info["baselines"] = baselines["one"]
    benchmark(by_hand)


def test_scikit_learn_refit(benchmark, stack, baselines):
    """scikit-learn refitted for three penalties and one noise draw; times 20 for the 60 of the surface."""
    from sklearn.linear_model import Ridge as SklearnRidge

    X = np.asarray(stack[0])
    y = X @ np.random.default_rng(0).standard_normal(P)
    benchmark.extra_info["baselines"] = {f"{name}, for 3 of 60 λ": t for name, t in baselines["one"].items()}
    benchmark.pedantic(
        lambda: [SklearnRidge(alpha=N * penalty, fit_intercept=False).fit(X, y) for penalty in PENALTIES[::20]],
        rounds=3,
        warmup_rounds=1,
    )


def test_streamed_million_features(benchmark):
    """From a key at p = 10⁶, n = 500, against numpy generating and multiplying the same blocks."""
    p = sized(1_000_000, 10_000)
    flat = spectra.isotropic(p)
    problem = TwoTaskProblem(flat, flat, RandomShift(flat), 0.3)

    def by_hand():
        kernel = np.zeros((N, N))
        generator = np.random.Generator(np.random.SFC64(0))
        for start in range(0, p, 4096):
            block = generator.standard_normal((N, min(4096, p - start)))
            kernel += block @ block.T

    benchmark.extra_info["baselines"] = {"(numpy generate + syrk)": median_seconds(by_hand, 1)}
    benchmark.pedantic(
        lambda: jax.block_until_ready(risk_forms(column_blocks(jax.random.key(0), problem, N), problem)), rounds=2
    )
