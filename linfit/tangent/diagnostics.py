"""Is linearisation to be trusted? Numbers known before training (ours)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from linfit.filters import Filter
from linfit.tangent.jacobian import Network, in_batches, linearised, outputs
from linfit.tangent.prediction import Prediction, losses

__all__ = ["diagnose"]


def diagnose(
    prediction: Prediction, net: Network, inputs: dict[str, Any], plan: Filter, memory: int
) -> dict[str, Array]:
    """Numbers that compare the network, moved by the predicted step δ of the plan, with its linearisation.

    - `distance`: ‖δ‖; `relative_distance`: ‖δ‖/‖θ₁‖ over what moves; `largest_relative_distance`: of one leaf.
    - `alignment`: cᵀ diag(s) c / (s_max‖c‖²), how far the residual lies in what the kernel learns first.
    - `curvature_test`, `…_other`: ‖½ d²f[δ, δ]‖/‖Jδ‖, second order over first.
    - `gap_test`, `gap_other`: ‖f(θ₁+δ) − f₁ − Jδ‖/‖Jδ‖, all orders beyond the first.
    - `loss_gap_test`, `…_other`: the loss of the network at θ₁+δ over that of the linear model, minus 1.
    - `kernel_change`: ‖K(θ₁+δ)r − K(θ₁)r‖/‖K(θ₁)r‖ of the residual r.
    """
    alpha = prediction.coordinates(plan)
    if alpha.ndim != 1:
        raise ValueError(f"plan must be one filter, got hyperparameters of shape {alpha.shape[:-1]}")
    n, c = len(prediction.root_weights), prediction.coefficients
    root = prediction.root_weights[:, None]
    here = linearised(net, inputs["train"], memory)
    dual = root * (prediction.vectors @ alpha) / n
    step = _pull(here, dual)
    moved = eqx.tree_at(lambda tree: tree.theta, net, jax.tree.map(jnp.add, net.theta, step))
    residual = root * (prediction.vectors @ c)
    before, after = _pull_push(here, residual), _pull_push(linearised(moved, inputs["train"], memory), residual)
    parts = [(_norm(d), _norm(t)) for d, t in zip(jax.tree.leaves(step), jax.tree.leaves(net.theta))]
    s_max = prediction.eigenvalues.max()
    numbers = {
        "distance": _norm(step),
        "relative_distance": _norm(step) / _norm(net.theta),
        "largest_relative_distance": jnp.max(jnp.stack([_ratio(d, t) for d, t in parts])),
        "alignment": _ratio(c**2 @ prediction.eigenvalues, s_max * (c @ c)),
        "kernel_change": _ratio(_norm(after - before), _norm(before)),
    }
    for name in set(inputs) - {"train"}:
        domain = prediction.domain(name)  # type: ignore[arg-type]
        first = domain.moved(alpha)
        second = in_batches(lambda net, x: _second(net, step, x), net, inputs[name], memory // 4)
        real, linear = in_batches(outputs, moved, inputs[name], memory), domain.outputs + first
        by_network, by_linear = (losses(prediction.loss, f, domain.labels).mean() for f in (real, linear))
        numbers[f"curvature_{name}"] = _ratio(_norm(second) / 2, _norm(first))
        numbers[f"gap_{name}"] = _ratio(_norm(real - linear), _norm(first))
        numbers[f"loss_gap_{name}"] = _ratio(by_network, by_linear) - 1
    return {name: numbers[name] for name in sorted(numbers)}


def _norm(tree: Any) -> Array:
    """‖·‖ over all leaves."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def _ratio(over: Array, under: Array) -> Array:
    """over/under, 0 for 0/0."""
    return jnp.where(over == 0, 0, over / jnp.where(over == 0, 1, under))


@eqx.filter_jit
def _pull(here: Any, v: Array) -> Any:
    return here.pull(v)


@eqx.filter_jit
def _pull_push(here: Any, v: Array) -> Array:
    return here.push(here.pull(v))


@eqx.filter_jit
def _second(net: Network, step: Any, x: Any) -> Array:
    """d²f[δ, δ] (n, k): a forward-mode pass of a forward-mode pass."""

    def first(theta: Any) -> Array:
        return jax.jvp(lambda theta: net(theta, x), (theta,), (step,))[1]

    return jax.jvp(first, (net.theta,), (step,))[1]
