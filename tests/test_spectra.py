"""Named spectra: the eigenvalues themselves, their order, their trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linfit import spectra

SPECTRA = {
    "isotropic": (lambda p, **k: spectra.isotropic(p, 0.6, **k), lambda p: [0.6 for j in range(p)]),
    "power_law": (lambda p, **k: spectra.power_law(p, 1.3, **k), lambda p: [(j + 1) ** -1.3 for j in range(p)]),
    "exponential": (lambda p, **k: spectra.exponential(p, 0.2, **k), lambda p: [np.exp(-0.2 * j) for j in range(p)]),
    "spiked": (lambda p, **k: spectra.spiked(p, [2.0, 7.0], 0.5, **k), lambda p: [7.0, 2.0] + [0.5] * (p - 2)),
    "bilevel": (lambda p, **k: spectra.bilevel(p, 4, 3.0, 0.25, **k), lambda p: [3.0] * 4 + [0.25] * (p - 4)),
}


@pytest.mark.numerical
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_follow_the_formula_largest_first(name, rtol, dtype):
    spectrum, formula = SPECTRA[name]
    eigenvalues = spectrum(17)
    assert eigenvalues.shape == (17,)
    assert eigenvalues.dtype == dtype
    assert np.all(np.diff(eigenvalues) <= 0)
    np.testing.assert_allclose(eigenvalues, formula(17), rtol=rtol)


@pytest.mark.numerical
@pytest.mark.parametrize("name", SPECTRA)
def test_trace_rescales_and_changes_nothing_else(name, rtol):
    spectrum, _ = SPECTRA[name]
    plain, scaled = spectrum(17), spectrum(17, trace=2.5)
    np.testing.assert_allclose(scaled.sum(), 2.5, rtol=rtol)
    np.testing.assert_allclose(scaled / scaled[0], plain / plain[0], rtol=rtol)


def test_spikes_below_the_bulk_come_last():
    np.testing.assert_array_equal(spectra.spiked(4, [0.1, 9.0], 1.0), [9.0, 1.0, 1.0, 0.1])


def test_extremes_of_the_sizes():
    np.testing.assert_array_equal(spectra.spiked(2, [3.0, 1.0]), [3.0, 1.0])
    np.testing.assert_array_equal(spectra.bilevel(2, 0, 5.0, 2.0), [2.0, 2.0])
    np.testing.assert_array_equal(spectra.bilevel(2, 2, 5.0, 2.0), [5.0, 5.0])
    np.testing.assert_array_equal(spectra.power_law(1, 3.0, trace=4), [4.0])


def test_the_derivative_with_respect_to_the_exponent():
    gradient = jax.grad(lambda exponent: spectra.power_law(9, exponent, trace=2.0)[3])(1.2)
    step = 1e-6
    low, high = (spectra.power_law(9, 1.2 + h, trace=2.0)[3] for h in (-step, step))
    np.testing.assert_allclose(gradient, (high - low) / (2 * step), rtol=1e-8)


def test_jit_equals_eager():
    compiled = jax.jit(lambda rate, trace: spectra.exponential(9, rate, trace=trace))
    np.testing.assert_allclose(compiled(0.3, jnp.array(2.0)), spectra.exponential(9, 0.3, trace=2.0), rtol=1e-14)
