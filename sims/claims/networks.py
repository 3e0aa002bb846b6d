"""Two-layer networks by plain numpy and scipy, for the claims N1–N5: full matrices, Runge–Kutta, no library code."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.optimize

from sims.claims import Normal

MODES = 3
_PRECISE = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-13}

Layers = tuple[np.ndarray, np.ndarray]


def targets(decay: float, strength: float, initial: float) -> tuple[np.ndarray, np.ndarray]:
    """Starting values s₀, `initial` times the smallest target, and targets a_i = strength·i^(−decay)."""
    a = strength * (1.0 + np.arange(MODES)) ** -decay
    return np.full(MODES, initial * a.min()), a


def singular_vectors(normal: Normal) -> tuple[np.ndarray, np.ndarray]:
    """Random orthonormal columns U (5, r), V (4, r)."""
    return np.linalg.qr(normal(5, MODES))[0], np.linalg.qr(normal(4, MODES))[0]


def turned(normal: Normal, size: int, angle: float) -> np.ndarray:
    """A rotation e^{angle·K} (size, size), K random antisymmetric of spectral norm 1."""
    latent = normal(size, size)
    return scipy.linalg.expm(angle * (latent - latent.T) / np.linalg.norm(latent - latent.T, 2))


def aligned(U: np.ndarray, V: np.ndarray, s: np.ndarray, imbalance: float = 0.0) -> Layers:
    """W₁, W₂ of the product U diag(s) Vᵀ with w₁² − w₂² = c."""
    w1 = np.sqrt((np.sqrt(imbalance**2 + 4 * s**2) + imbalance) / 2)
    return U * w1, (V * np.divide(s, w1, out=np.zeros_like(s), where=w1 > 0)).T


def flow(start: Layers, target: np.ndarray, times: np.ndarray | float, penalty: float = 0.0) -> list[Layers]:
    """Gradient flow of ½‖W₁W₂ − A‖² + (μ/2)‖θ − θ_start‖² on the full matrices, at each of the ascending times."""
    times, size = np.atleast_1d(times), start[0].size

    def layers(flat: np.ndarray) -> Layers:
        return flat[:size].reshape(start[0].shape), flat[size:].reshape(start[1].shape)

    def velocity(_: float, flat: np.ndarray) -> np.ndarray:
        w1, w2 = layers(flat)
        gap = target - w1 @ w2
        return np.concatenate([(gap @ w2.T).ravel(), (w1.T @ gap).ravel()]) - penalty * (flat - flat_start)

    flat_start = np.concatenate([start[0].ravel(), start[1].ravel()])
    path = scipy.integrate.solve_ivp(velocity, (0, times[-1]), flat_start, t_eval=times, **_PRECISE).y
    return [layers(flat) for flat in path.T]


def loss(layers: Layers, target: np.ndarray) -> float:
    """½‖W₁W₂ − A‖²."""
    return float(np.sum((layers[0] @ layers[1] - target) ** 2) / 2)


def expected_rise(normal: Normal, layers: Layers, gamma: float, gamma_2: float) -> float:
    """Mean rise of the loss under independent noise on every weight, exactly.

    The loss is a quadratic polynomial in each layer, so any perturbations with the right mean and covariance will do:
    plus and minus the vectors of a randomly rotated basis of each layer, long enough, in all combinations.
    """
    w1, w2 = layers
    first, second = (np.linalg.qr(normal(w.size, w.size))[0] for w in layers)
    first = gamma * w1.size**0.5 * np.concatenate([first, -first]).reshape(-1, 1, *w1.shape)
    second = gamma_2 * w2.size**0.5 * np.concatenate([second, -second]).reshape(1, -1, *w2.shape)
    target = normal(w1.shape[0], w2.shape[1])
    moved = np.sum(((w1 + first) @ (w2 + second) - target) ** 2, axis=(-2, -1)) / 2
    return float(moved.mean()) - loss(layers, target)


class Modes(NamedTuple):
    """The pretraining of aligned modes as a dense solution, and their perturbed loss (but for a constant)."""

    path: Callable[[float], np.ndarray]
    a: np.ndarray
    noise: tuple[float, float]  #: γ²m and γ²k.

    def weights(self, time: float) -> Layers:
        """w₁ and w₂ (r,)."""
        w1, w2 = self.path(time).reshape(2, -1)
        return w1, w2

    def heights(self, time: float) -> np.ndarray:
        """½(a − w₁w₂)² + ½γ²(m w₂² + k w₁²) of every mode."""
        w1, w2 = self.weights(time)
        return ((self.a - w1 * w2) ** 2 + self.noise[0] * w2**2 + self.noise[1] * w1**2) / 2

    def slopes(self, time: float) -> np.ndarray:
        """The heights' rates of change in time."""
        w1, w2 = self.weights(time)
        return (self.a - w1 * w2) * self.excess(time)

    def excess(self, time: float) -> np.ndarray:
        """The slopes over what is left to learn: from below 0 to above it."""
        w1, w2 = self.weights(time)
        return sum(self.noise) * w1 * w2 - (self.a - w1 * w2) * (w1**2 + w2**2)

    def turns(self, last: float) -> list[float]:
        """When the height of each mode is least; 0 if it only rises."""

        def turn(mode: int) -> float:
            rising = self.excess(0.0)[mode] >= 0
            return 0.0 if rising else scipy.optimize.brentq(lambda t: self.excess(t)[mode], 0, last, xtol=1e-12)

        return [turn(mode) for mode in range(self.a.size)]


def modes(
    initial: np.ndarray, a: np.ndarray, last: float, gamma: float, m: int, k: int, imbalance: float = 0.0
) -> Modes:
    """The modes w₁, w₂ up to a time, by Runge–Kutta."""

    def velocity(_: float, q: np.ndarray) -> np.ndarray:
        w1, w2 = q.reshape(2, -1)
        return np.concatenate([w2 * (a - w1 * w2), w1 * (a - w1 * w2)])

    start = np.concatenate(
        [np.diagonal(layer) for layer in aligned(np.eye(a.size), np.eye(a.size), initial, imbalance)]
    )
    path = scipy.integrate.solve_ivp(velocity, (0, last), start, dense_output=True, **_PRECISE).sol
    return Modes(path, a, (gamma**2 * m, gamma**2 * k))


def fine_tuned_mode(s: float, b: float, time: float, penalty: float = 0.0) -> float:
    """s after w' = w(b − w²) − μ(w − w_pre) for a time, by Runge–Kutta."""
    w = s**0.5
    velocity = lambda _, now: now * (b - now**2) - penalty * (now - w)  # noqa: E731
    return float(scipy.integrate.solve_ivp(velocity, (0, time), [w], **_PRECISE).y[0, -1] ** 2)


def late_slopes(
    U: np.ndarray, V: np.ndarray, a: np.ndarray, task: np.ndarray, times: np.ndarray | float, penalty: float = 0.0
) -> np.ndarray:
    """D (times, r): the derivative of ½‖W(T) − A‖² in each singular value, by the variational equation of the flow."""
    times, w, hidden = np.atleast_1d(times), np.sqrt(a), np.eye(a.size)
    start = [U * w, (V * w).T]
    first = [U * hidden[:, None] / (2 * w)[:, None, None], hidden[:, :, None] * V.T / (2 * w)[:, None, None]]
    parts = [*start, *first]
    ends = np.cumsum([part.size for part in parts])

    def split(flat: np.ndarray) -> list[np.ndarray]:
        return [piece.reshape(part.shape) for piece, part in zip(np.split(flat, ends[:-1]), parts)]

    def velocity(_: float, flat: np.ndarray) -> np.ndarray:
        w1, w2, d1, d2 = split(flat)
        gap, moved = task - w1 @ w2, -(d1 @ w2 + w1 @ d2)
        pulls = [penalty * (now - then) for now, then in zip((w1, w2, d1, d2), parts)]
        ways = [gap @ w2.T, w1.T @ gap, moved @ w2.T + gap @ d2.swapaxes(1, 2), d1.swapaxes(1, 2) @ gap + w1.T @ moved]
        return np.concatenate([(way - pull).ravel() for way, pull in zip(ways, pulls)])

    flat = np.concatenate([part.ravel() for part in parts])
    path = scipy.integrate.solve_ivp(velocity, (0, times[-1]), flat, t_eval=times, **_PRECISE).y
    slopes = []
    for w1, w2, d1, d2 in map(split, path.T):
        slopes.append(np.einsum("pq,ipq->i", w1 @ w2 - U * a @ V.T, d1 @ w2 + w1 @ d2))
    return np.array(slopes)


def coefficients(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Those of 1, T, T², … of the polynomial through the values (times, …) of a smooth function."""
    flat = np.linalg.solve(np.vander(times / times[-1], increasing=True), values.reshape(len(times), -1))
    return (flat / times[-1] ** np.arange(len(times))[:, None]).reshape(values.shape)
