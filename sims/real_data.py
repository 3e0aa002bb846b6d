"""Overadaptation on real data: scikit-learn's handwritten digits through random Fourier features.

The 1,797 images of 8×8 pixels become p features φ(x) = √(2/p) cos(Wx + b), far more than there are fine-tuning
samples. Pretraining fits the ten one-hot class indicators on upright images; the fine-tuning task shows the classes
turned by an angle, with Gaussian noise added to the few fine-tuning labels. Everything is measured on held-out,
noise-free images.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import xarray as xr
from jax import Array

from linfit import Diagonal, MinNorm, Parabola, Ridge, fine_tune, leave_one_out
from linfit.internal.checks import count, non_negative
from linfit.selection import default_penalties
from sims.estimate import means_and_errors, progress

__all__ = ["digits_along_tau", "digits_split"]

CLASSES = 10
BANDWIDTH = 2.0
"""Length scale of the Gaussian kernel that the features approximate, for pixels scaled to [0, 1]."""


class Split(NamedTuple):
    """Features (·, p) and one-hot targets (·, 10) of both tasks, no image in two places."""

    pretrain: tuple[Array, Array]
    pretrain_test: tuple[Array, Array]
    finetune: tuple[Array, Array]
    finetune_test: tuple[Array, Array]


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) scaled to [0, 1] and their classes (1797,). Needs the extra `data`."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install 'linfit[data]'") from error
    digits = datasets.load_digits()
    return digits.images / 16.0, digits.target


def _random_fourier_features(key: Array, images: np.ndarray, p: int) -> Array:
    """φ(x) = √(2/p) cos(Wx + b), W ~ N(0, 1/bandwidth²), b uniform: (m, p) for images (m, …).

    Inner products approximate the Gaussian kernel exp(−‖x−x'‖²/(2·bandwidth²)).

    >>> features = _random_fourier_features(jax.random.key(0), np.zeros((2, 64)), 4000)
    >>> bool(abs(features[0] @ features[1] - 1) < 0.1)
    True
    """
    pixels = images.reshape(len(images), -1)
    frequency_key, phase_key = jax.random.split(key)
    frequencies = jax.random.normal(frequency_key, (pixels.shape[1], count("p", p))) / BANDWIDTH
    phases = jax.random.uniform(phase_key, (p,), maxval=2 * jnp.pi)
    return (2 / p) ** 0.5 * jnp.cos(pixels @ frequencies + phases)


def digits_split(key: Array, p: int = 2048, n: int = 150, n_pretrain: int = 700, angle: float = 45.0) -> Split:
    """A random division of the digits into the two tasks; what neither fits is for testing, half of it turned.

    Args:
        key: of the division and the features.
        p: random Fourier features.
        n: fine-tuning images.
        n_pretrain: pretraining images.
        angle: by which the images of the fine-tuning task are turned, in degrees.

    Needs the extra `data`. Raises ValueError if too few images are left for testing.
    """
    images, classes = load_digits()
    n, n_pretrain = count("n", n, minimum=2), count("n_pretrain", n_pretrain, minimum=2)
    if n + n_pretrain + 2 > len(images):
        most = len(images) - 2
        raise ValueError(f"n + n_pretrain must leave images for testing: at most {most}, got {n + n_pretrain}")
    order_key, feature_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, len(images)))
    turned = np.clip(scipy.ndimage.rotate(images, angle, axes=(1, 2), reshape=False, order=1), 0, 1)
    targets = jnp.asarray(np.eye(CLASSES)[classes])
    upright, turned = (_random_fourier_features(feature_key, pixels, p) for pixels in (images, turned))
    middle = n + n_pretrain + (len(images) - n - n_pretrain) // 2
    finetune, pretrain, pretrain_test, finetune_test = np.split(order, [n, n + n_pretrain, middle])
    parts = ((upright, pretrain), (upright, pretrain_test), (turned, finetune), (turned, finetune_test))
    return Split(*((features[chosen], targets[chosen]) for features, chosen in parts))


def over_splits(measure: Callable[..., dict[str, np.ndarray]], key: Array, splits: int) -> dict[str, np.ndarray]:
    """measure(fold_in(key, i)) for i = 0 … splits − 1, every entry stacked in front."""
    indices = progress(range(count("splits", splits, minimum=2)), "digits")
    runs = [measure(jax.random.fold_in(key, index)) for index in indices]
    return {name: np.stack([run[name] for run in runs]) for name in runs[0]}


def _leave_one_out_penalty(X: Array, targets: Array, theta_1: Array) -> float:
    """The ridge penalty of least leave-one-out error, fitted from θ₁ (p, classes)."""
    penalties = default_penalties(X)
    errors = jnp.mean(leave_one_out(X, targets, theta_1, penalties, 1.0) ** 2, axis=(-2, -1))
    return float(penalties[int(jnp.argmin(errors))])


def ridge_from_zero(X: Array, classes: Array, others: Array | None = None) -> Array:
    """Ridge from zero weights on class indicators (and other outputs), the penalty by leave-one-out on the classes."""
    targets = classes if others is None else jnp.concatenate([classes, others], axis=1)
    zero = jnp.zeros((X.shape[1], targets.shape[1]), X.dtype)
    return fine_tune(X, targets, zero, Ridge(_leave_one_out_penalty(X, classes, zero[:, : classes.shape[1]])))


def _error_along_tau(data: tuple[Array, Array], theta_1: Array, theta: Array, tau: Array) -> Array:
    """Squared error per image, summed over classes, of θ_τ for every τ: (taus,)."""
    features, targets = data
    start, step = (features @ theta_1 - targets).ravel(), (features @ (theta - theta_1)).ravel()
    return Parabola.of_steps(Diagonal(jnp.full(start.size, 1 / len(features))), start, step)(tau).total


def _accuracy_along_tau(data: tuple[Array, Array], theta_1: Array, theta: Array, tau: Array) -> Array:
    """Share of images whose largest output is the right class, for every τ: (taus,)."""
    features, targets = data
    start, moved = features @ theta_1, features @ (theta - theta_1)
    right = targets.argmax(-1)
    return jnp.stack([jnp.mean((start + t * moved).argmax(-1) == right) for t in tau])


def _measure_split(key: Array, noise_levels: np.ndarray, tau: Array, **sizes: Any) -> dict[str, np.ndarray]:
    """One split and one noise draw: test errors along τ for min-norm and ridge, and the leave-one-out choices.

    Arrays (noise level, filter, …); the label noise is the same draw scaled to each level.
    """
    split_key, noise_key = jax.random.split(key)
    split = digits_split(split_key, **sizes)
    theta_1, (X, targets) = ridge_from_zero(*split.pretrain), split.finetune
    noise = jax.random.normal(noise_key, targets.shape)
    rows: list[dict[str, Array]] = []
    for level in noise_levels:
        y = targets + level * noise
        penalty = _leave_one_out_penalty(X, y, theta_1)
        for filter, loo_penalty in ((MinNorm(), 0.0), (Ridge(penalty), penalty)):
            path = (theta_1, fine_tune(X, y, theta_1, filter), tau)
            loo = jnp.sum(leave_one_out(X, y, theta_1, loo_penalty, tau) ** 2, axis=-1).mean(-1)
            finetune = _error_along_tau(split.finetune_test, *path)
            rows.append(
                {
                    "finetune": finetune,
                    "pretrain": _error_along_tau(split.pretrain_test, *path),
                    "accuracy": _accuracy_along_tau(split.finetune_test, *path),
                    "loo": loo,
                    "loo_tau": tau[jnp.argmin(loo)],
                    "test_tau": tau[jnp.argmin(finetune)],
                }
            )
    shape = (len(noise_levels), 2)
    return {name: np.stack([row[name] for row in rows]).reshape(*shape, *np.shape(rows[0][name])) for name in rows[0]}


def digits_along_tau(key: Array, noise_levels: np.ndarray, tau: np.ndarray, splits: int, **sizes: Any) -> xr.Dataset:
    """Both test errors along τ on the digits, averaged over random splits, features and noise.

    Args:
        key: of the splits, split i `fold_in(key, i)`.
        noise_levels: standard deviations of the noise on the fine-tuning labels.
        tau: ensemble coefficients (T,).
        splits: how many, at least 2.
        sizes: arguments of `digits_split`.

    Dimensions (noise_std, filter, tau), filter "min-norm" or "ridge" (its λ by leave-one-out at τ = 1). Variables with
    standard errors over splits: `finetune` and `pretrain` (squared error summed over classes, noise-free test labels),
    `accuracy` on the fine-tuning test images, `loo` (the leave-one-out estimate, which includes the label noise),
    `loo_tau` and `test_tau` (the τ chosen by leave-one-out and the best on the test images), and `loo_regret`, the
    test error at the former less that at the latter.
    """
    levels = np.asarray(non_negative("noise_levels", noise_levels, ndim=1))
    samples = over_splits(partial(_measure_split, noise_levels=levels, tau=jnp.asarray(tau), **sizes), key, splits)
    chosen = np.argmin(samples["loo"], axis=-1)[..., None]
    at_choice = np.take_along_axis(samples["finetune"], chosen, axis=-1)[..., 0]
    samples["loo_regret"] = at_choice - samples["finetune"].min(axis=-1)
    variables = means_and_errors(samples, ("noise_std", "filter", "tau"))
    coordinates = {"noise_std": levels, "filter": ["min-norm", "ridge"], "tau": tau}
    return xr.Dataset(variables, coordinates, {"splits": splits, "data": "scikit-learn digits", **sizes})
