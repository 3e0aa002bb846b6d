"""Real digits: the split keeps tasks apart, the features approximate their kernel, leave-one-out finds the best τ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linfit import interpolate
from sims.real_data import (
    BANDWIDTH,
    _accuracy_along_tau,
    _error_along_tau,
    _random_fourier_features,
    digits_along_tau,
    digits_split,
    load_digits,
)

SIZES = {"p": 2048, "n": 100, "n_pretrain": 300}


def test_features_approximate_the_gaussian_kernel():
    images, _ = load_digits()
    features = np.asarray(_random_fourier_features(jax.random.key(0), images[:20], 60_000))
    pixels = images[:20].reshape(20, -1)
    squared = np.sum((pixels[:, None] - pixels) ** 2, axis=-1)
    np.testing.assert_allclose(features @ features.T, np.exp(-squared / 2 / BANDWIDTH**2), atol=0.03)


def test_split_uses_every_image_once():
    split = digits_split(jax.random.key(0), **SIZES)
    sizes = [len(part[0]) for part in split]
    assert sizes[0] == 300
    assert sizes[2] == 100
    assert sum(sizes) == 1797
    counts = sum(part[1].sum(0) for part in split)
    _, classes = load_digits()
    np.testing.assert_array_equal(counts, np.bincount(classes))


def test_errors_along_tau_equal_those_of_the_interpolated_weights():
    key = jax.random.key(1)
    X = jax.random.normal(key, (12, 7))
    targets = jnp.eye(10)[jnp.arange(12) % 10]
    theta_1, theta = (jax.random.normal(jax.random.fold_in(key, i), (7, 10)) for i in range(2))
    tau = jnp.array([0.0, 0.3, 1.0, 1.2])
    for i, t in enumerate(tau):
        output = X @ interpolate(theta_1, theta, t)
        direct = jnp.mean(jnp.sum((targets - output) ** 2, axis=1))
        np.testing.assert_allclose(_error_along_tau((X, targets), theta_1, theta, tau)[i], direct, rtol=1e-12)
        accuracy = jnp.mean(output.argmax(1) == targets.argmax(1))
        np.testing.assert_allclose(_accuracy_along_tau((X, targets), theta_1, theta, tau)[i], accuracy)


@pytest.mark.slow
def test_noise_brings_overadaptation_and_leave_one_out_sees_it():
    data = digits_along_tau(jax.random.key(0), np.array([0.0, 0.4]), np.linspace(0, 1.25, 26), 3, **SIZES)
    min_norm = data.sel(filter="min-norm")
    noisy = min_norm.sel(noise_std=0.4)
    assert float(noisy.test_tau) < 0.6
    assert float(min_norm.sel(noise_std=0.0).test_tau) > 0.75
    assert abs(float(noisy.loo_tau - noisy.test_tau)) < 0.1
    assert (data.loo_regret < 0.02).all()
    # averaging helps on the task itself and forgets less
    gain = noisy.finetune.interp(tau=1.0) - noisy.finetune.min()
    assert float(gain) > 5 * float(noisy.finetune_error.interp(tau=1.0))
    assert (noisy.pretrain.diff("tau") > 0).all()


@pytest.mark.parametrize(
    ("change", "message"), [({"n": 1}, "n must be"), ({"n_pretrain": 1700}, "n_pretrain"), ({"p": 0}, "p must be")]
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        digits_split(jax.random.key(0), **(SIZES | change))


@pytest.mark.parametrize("levels", [[-0.1], [np.nan], [[0.1]]])
def test_bad_noise(levels):
    with pytest.raises(ValueError, match="noise_levels"):
        digits_along_tau(jax.random.key(0), np.array(levels), np.array([1.0]), 2)
