"""The numbers a prediction comes down to, each with its standard errors (docs, G1; ours)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.filters import Filter, GradientFlow, Ridge
from linfit.tangent.prediction import Prediction, Which, losses
from linfit.tangent.selection import default_penalties

__all__ = ["Estimate", "summary"]


class Estimate(NamedTuple):
    """A predicted number with its standard errors from label noise in training, and from the finite held-out sample."""

    value: float
    label_error: float  #: NaN where the noise is unknown, for cross-entropy, and for a kernel known by products only.
    sample_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """value ± 1.96 standard errors, both sources together; label noise counts where it is known.

        >>> from linfit.tangent import Estimate
        >>> Estimate(1.0, 0.3, 0.4).interval
        (0.02, 1.98)
        """
        width = 1.96 * float(np.hypot(np.nan_to_num(self.label_error), self.sample_error))
        return round(self.value - width, 12), round(self.value + width, 12)


def summary(prediction: Prediction, filter: Filter) -> dict[str, Estimate]:
    """What one run will do: `best_tau`, `task_loss` at τ = 0, 1 and the best, `forgetting` at τ = 1 and the best.

    Forgetting is the rise of the mean loss on `other`, and left out without it. `best_time`, and with squared loss
    `best_penalty`, are those of least task loss at τ = 1 on a grid; their sample error is a quarter of the width of the
    grid values that the held-out sample cannot tell from the best (one standard error of the paired difference).

    First order in the label noise σ: a quantity q(c) has standard error σ‖W^{1/2}U ∂q/∂c‖. The best τ solves
    Σ_i ℓ_i'(τ) = 0, so its standard error over samples is (Σ_i ℓ_i'²)^{1/2} / Σ_i ℓ_i''. Raises ValueError for an array
    of filters.

    >>> import jax
    >>> from linfit import MinNorm, predict
    >>> from linfit.tangent import summary
    >>> x = jax.random.normal(jax.random.key(0), (30, 8))
    >>> data = x[:15], x[:15, 0] + jax.random.normal(jax.random.key(1), (15,))
    >>> prediction = predict(lambda w, x: x @ w, jnp.zeros(8), data, (x[15:], x[15:, 0]), noise_std=1.0)
    >>> summary(prediction, MinNorm())["best_tau"].value < 1
    True
    """
    alpha = prediction.coordinates(filter)
    if alpha.ndim != 1:
        raise ValueError(f"filter must be one filter, got hyperparameters of shape {alpha.shape[:-1]}")
    tau = prediction.best_tau(filter)
    by_labels = _label_error(prediction, filter, lambda alpha: _vertex(prediction, alpha))
    numbers = {"best_tau": Estimate(float(tau), by_labels, _tau_error(prediction, alpha, tau))}
    for name, at in (("at_0", 0.0), ("at_1", 1.0), ("at_best", None)):
        numbers[f"task_loss_{name}"] = _loss(prediction, filter, alpha, at, "test")
        if prediction.other is not None and name != "at_0":
            numbers[f"forgetting_{name}"] = _loss(prediction, filter, alpha, at, "other")
    numbers["best_time"] = _best_on(prediction, prediction.default_times(), GradientFlow)
    if prediction.loss == "squared":
        numbers["best_penalty"] = _best_on(prediction, jnp.asarray(default_penalties(prediction)), Ridge)
    return numbers


def _loss(prediction: Prediction, filter: Filter, alpha: Array, tau: float | None, which: Which) -> Estimate:
    """Mean loss at τ, or at the best τ; on `other`, its rise."""
    domain = prediction.domain(which)

    def each(alpha: Array, tau: Array | float) -> Array:
        now = losses(prediction.loss, domain.outputs + tau * domain.moved(alpha), domain.labels)
        return now if which == "test" else now - losses(prediction.loss, domain.outputs, domain.labels)

    values = each(alpha, prediction.best_tau(filter) if tau is None else tau)
    by_labels = _label_error(
        prediction, filter, lambda alpha: each(alpha, _vertex(prediction, alpha) if tau is None else tau).mean()
    )
    return Estimate(float(values.mean()), by_labels, _deviation(values))


def _deviation(values: Array) -> float:
    """Standard error of a mean; ∞ for a single value."""
    return float(jnp.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("inf")


def _vertex(prediction: Prediction, alpha: Array) -> Array:
    """τ* of the parabola of squared loss on the test data."""
    domain = prediction.test
    moved = domain.moved(alpha)
    return jnp.sum(moved * (domain.labels - domain.outputs)) / jnp.sum(moved**2)


def _label_error(prediction: Prediction, filter: Filter, quantity: Callable[[Array], Array]) -> float:
    """σ‖W^{1/2}U ∂q/∂c‖, for squared loss with α = g(s)·c."""
    if prediction.loss != "squared" or prediction.krylov is not None:
        return float("nan")
    g = filter(prediction.eigenvalues)
    slope = jax.grad(lambda c: quantity(g * c))(prediction.coefficients)
    by_label = prediction.root_weights[:, None] * (prediction.vectors @ slope)
    return float(prediction.noise_std * jnp.linalg.norm(by_label))


def _tau_error(prediction: Prediction, alpha: Array, tau: Array) -> float:
    domain = prediction.test
    moved = domain.moved(alpha)

    def each(tau: Array) -> Array:
        return losses(prediction.loss, domain.outputs + tau * moved, domain.labels)

    def slopes(tau: Array) -> Array:
        return jax.jvp(each, (tau,), (jnp.ones_like(tau),))[1]

    slope, curvature = jax.jvp(slopes, (tau,), (jnp.ones_like(tau),))
    total = float(curvature.sum())
    return float(jnp.linalg.norm(slope)) / total if total > 0 else float("inf")


def _best_on(prediction: Prediction, grid: Array, kind: type[GradientFlow] | type[Ridge]) -> Estimate:
    each = prediction.losses(kind(grid))
    best = int(jnp.argmin(each.mean(-1)))
    paired = each - each[best]
    error = jnp.std(paired, axis=-1, ddof=1) / each.shape[-1] ** 0.5 if each.shape[-1] > 1 else jnp.inf
    same = np.asarray(grid)[np.asarray(paired.mean(-1) <= error)]
    return Estimate(float(grid[best]), float("nan"), float(same.max() - same.min()) / 4)
