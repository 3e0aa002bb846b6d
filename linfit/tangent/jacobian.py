"""The Jacobian J = ∂f/∂θ of a network at its pretrained weights: features, kernel, products (docs, G1).

`apply(params, x)` maps a batch to outputs (n, …), each sample on its own; x is an array or a pytree of arrays with the
samples in front. Outputs are flattened to (n, k), a scalar output is k = 1. Which parameters move, `moving`, is a
pytree of booleans shaped as `params` (or a prefix of it), or a function of a leaf's path such as "layers/0/weight";
everything by default. J covers the floating-point leaves among them, in the order of the pytree.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import count, same_size
from linfit.tangent.layers import dense_kernel

__all__ = ["features", "kernel", "kernel_product"]

Apply = Callable[[Any, Any], Any]
Moving = Any
Report = Callable[[int, int], None] | None
"""Told how much is done, and of how much."""

MEMORY = 2**30
"""Bytes that a computation may take beside its arguments and its result, unless told otherwise."""


class Network(eqx.Module):
    """f(θ, x) (n, k): `apply` with the parameters θ that move apart from those that do not."""

    apply: Apply
    theta: Any
    frozen: Any

    def __call__(self, theta: Any, x: Any) -> Array:
        return jnp.reshape(self.apply(eqx.combine(theta, self.frozen), x), (samples(x), -1))

    @property
    def size(self) -> int:
        """p, the number of parameters that move."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.theta))


def samples(x: Any) -> int:
    """n, the length of the leading axis of every leaf of x."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(f"x must hold arrays with the n ≥ 1 samples in front, got leading axes {sorted(sizes)}")
    return int(sizes.pop()[0])


def network(apply: Apply, params: Any, moving: Moving = None) -> Network:
    """`apply` split at the parameters that move; ValueError if none does."""
    if not callable(apply):
        raise ValueError(f"apply must be a function (params, x) -> outputs (n, …), got {type(apply).__name__}")
    if callable(moving):
        mask = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(moving(jax.tree_util.keystr(path, simple=True, separator="/"))), params
        )
    else:
        mask = True if moving is None else moving
        if not all(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(mask)):
            raise ValueError("moving must be a pytree of booleans shaped as params, or a function of a path")
    try:
        chosen, rest = eqx.partition(params, mask)
    except ValueError as error:
        raise ValueError(f"moving must be shaped as params or a prefix of it: {error}") from None
    theta, constant = eqx.partition(chosen, eqx.is_inexact_array_like)
    theta = jax.tree.map(jnp.asarray, theta)
    if not jax.tree.leaves(theta):
        raise ValueError("moving must choose at least one array of floating-point parameters, got none")
    return Network(apply, theta, eqx.combine(rest, constant))


def outputs_like(net: Network, x: Any) -> jax.ShapeDtypeStruct:
    """Shape (n, k) and dtype of f(θ, x); ValueError if `apply` does not take a batch to floating-point outputs."""
    n = samples(x)
    raw: Any = eqx.filter_eval_shape(net.apply, eqx.combine(net.theta, net.frozen), x)
    shape, dtype = getattr(raw, "shape", ()), getattr(raw, "dtype", np.dtype(object))
    if shape[:1] != (n,):
        wanted = f"outputs (n, …) for the n = {n} samples of x"
        raise ValueError(f"apply must return {wanted}, got {shape or type(raw).__name__}; jax.vmap makes a batch")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"apply must return real floating-point outputs, got {dtype}")
    return jax.ShapeDtypeStruct((n, int(np.prod(shape[1:]))), dtype)


def take(x: Any, rows: Any) -> Any:
    """Some samples of x."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], x)


def features(apply: Apply, params: Any, x: Any, *, moving: Moving = None) -> Array:
    """The tangent features J (n, k, p) themselves, for what is small enough to hold them (docs, G1).

    Arguments as `kernel`; the p parameters that move are flattened in the order of the pytree.

    >>> from linfit.tangent import features
    >>> features(lambda w, x: x @ w, jnp.ones(2), jnp.array([[3.0, 4.0]]))
    Array([[[3., 4.]]], dtype=float64)
    """
    net = network(apply, params, moving)
    outputs_like(net, x)
    return _features(net, x)


@eqx.filter_jit
def _features(net: Network, x: Any) -> Array:
    def one(sample: Any) -> Array:
        rows = jax.jacrev(lambda theta: net(theta, take(sample, None))[0])(net.theta)
        return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(rows)], axis=1)

    return jax.vmap(one)(x)


def kernel(
    apply: Apply,
    params: Any,
    x: Any,
    x2: Any = None,
    *,
    moving: Moving = None,
    memory: int = MEMORY,
    structured: bool = True,
    report: Report = None,
) -> Array:
    """The tangent kernel J(x) J(x2)ᵀ, (n, k, n2, k), not normalised (docs, G1).

    Args:
        apply, params: a network, and its pretrained weights, any pytree.
        x, x2: samples (n, …) and (n2, …); x2 = x by default.
        moving: which parameters move: a pytree of booleans, or a function of a path such as "layers/0/weight".
        memory: bytes that may be taken beside arguments and result; blocks are as large as fit.
        structured: take dense layers by their factors, (a_i·a_j)(δ_i·δ_j), where `apply` has them (docs, G1).
        report: told (done, all) columns after each block.

    The generic way costs n2·k gradients of one sample and as many forward-mode passes over x. Raises ValueError for
    an `apply` that does not map batches to floating-point outputs, a mask that fits nothing, and too little memory.

    >>> from linfit.tangent import kernel
    >>> kernel(lambda w, x: jnp.tanh(x @ w), jnp.zeros((2, 3)), jnp.eye(2)).shape
    (2, 3, 2, 3)
    """
    net = network(apply, params, moving)
    outputs_like(net, x)
    return kernel_of(net, x, x2, memory=count("memory", memory), structured=structured, report=report)


def kernel_of(
    net: Network, x: Any, x2: Any, *, memory: int = MEMORY, structured: bool = True, report: Report = None
) -> Array:
    """`kernel` of a network that is already split."""
    n, k = outputs_like(net, x).shape
    other = x if x2 is None else x2
    n2, k2 = outputs_like(net, other).shape
    same_size("outputs at x2", k2, "outputs at x", k)
    if structured:
        fast = dense_kernel(net, x, other, memory)
        if fast is not None:
            return fast
    rows, columns = _block(net, x, memory)
    parts = []
    for start in range(0, n2 * k, columns):
        index = np.minimum(np.arange(start, start + columns), n2 * k - 1)
        strips = [
            _columns(net, take(x, slice(low, low + rows)), other, index // k, index % k) for low in range(0, n, rows)
        ]
        parts.append(jnp.concatenate(strips)[..., : n2 * k - start])
        if report is not None:
            report(min(start + columns, n2 * k), n2 * k)
    return jnp.concatenate(parts, axis=-1).reshape(n, k, n2, k)


@eqx.filter_jit
def _columns(net: Network, x: Any, x2: Any, sample: Array, output: Array) -> Array:
    """J(x) times some rows of J(x2), each a pair (sample, output): (n, k, columns)."""

    def row(j: Array, c: Array) -> Any:
        one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[j][None], x2)
        return jax.grad(lambda theta: net(theta, one)[0, c])(net.theta)

    directions = jax.vmap(row)(sample, output)
    _, push = jax.linearize(lambda theta: net(theta, x), net.theta)
    return jnp.moveaxis(jax.vmap(push)(directions), 0, -1)


def _activations(net: Network, x: Any) -> int:
    """Bytes of everything `apply` computes on its way, for one sample of x: what a derivative has to remember."""
    one = take(x, slice(0, 1))
    arrays, static = eqx.partition((net, one), eqx.is_array)

    def call(arrays: Any) -> Array:
        net, one = eqx.combine(arrays, static)
        return net(net.theta, one)

    return _bytes(jax.make_jaxpr(call)(arrays).jaxpr)


def _bytes(jaxpr: Any) -> int:
    """Bytes of all intermediate values, those of inner functions included."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values() if hasattr(value, "eqns")]
        inner += [value.jaxpr for value in equation.params.values() if hasattr(value, "jaxpr")]
        total += sum(_bytes(part) for part in inner) * equation.params.get("length", 1)
        total += sum(int(np.prod(out.aval.shape)) * out.aval.dtype.itemsize for out in equation.outvars if not inner)
    return total


def _block(net: Network, x: Any, memory: int) -> tuple[int, int]:
    """(samples, columns) of a block: each column holds a gradient and the tangents of all samples of the block."""
    gradient = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(net.theta))
    sample = 2 * _activations(net, x)
    if gradient + 2 * sample > memory:
        raise ValueError(f"memory must be at least {gradient + 2 * sample} bytes for this network, got {memory}")
    n = samples(x)
    rows = min(n, (memory - gradient) // (2 * sample))
    columns = max(1, (memory - rows * sample) // (gradient + rows * sample))
    return rows, int(min(columns, 1024))


class Linearised(eqx.Module):
    """δ ↦ Jδ (n, k) and v (n, k) ↦ Jᵀv at some samples; a pytree, so that it can be handed to a jitted function.

    Whole: one forward pass, remembered. In batches: `apply` is computed anew each time, in less memory.
    """

    net: Network
    whole: Callable[[Any], Array] | None
    batches: Any  #: The samples as (batches, size, …), the last one repeated to fill up.
    n: int = eqx.field(static=True)

    def push(self, delta: Any) -> Array:
        """Jδ (n, k): one forward-mode pass."""
        if self.whole is not None:
            return self.whole(delta)
        net = self.net
        strips = jax.lax.map(
            lambda part: jax.jvp(lambda theta: net(theta, part), (net.theta,), (delta,))[1], self.batches
        )
        return strips.reshape(-1, strips.shape[-1])[: self.n]

    def pull(self, v: Array) -> Any:
        """Jᵀv: one reverse-mode pass."""
        net = self.net
        if self.whole is not None:
            return jax.linear_transpose(self.whole, net.theta)(v)[0]
        count, size = jax.tree.leaves(self.batches)[0].shape[:2]
        padded = jnp.zeros((count * size, v.shape[1]), v.dtype).at[: self.n].set(v).reshape(count, size, -1)

        def add(total: Any, piece: tuple[Any, Array]) -> tuple[Any, None]:
            part, weights = piece
            _, pull = jax.vjp(lambda theta: net(theta, part), net.theta)
            return jax.tree.map(jnp.add, total, pull(weights)[0]), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, net.theta), (self.batches, padded))[0]


def linearised(net: Network, x: Any, memory: int) -> Linearised:
    """The linearisation at x, whole if it fits into the memory; ValueError if no sample does."""
    n, sample = samples(x), 3 * _activations(net, x)
    if sample > memory:
        raise ValueError(f"memory must be at least {sample} bytes for one sample of x, got {memory}")
    size = min(n, memory // sample)
    if size == n:
        return Linearised(net, _linearise(net, x), None, n)
    rows = np.minimum(np.arange(-(-n // size) * size), n - 1).reshape(-1, size)
    return Linearised(net, None, take(x, rows), n)


@eqx.filter_jit
def _linearise(net: Network, x: Any) -> Callable[[Any], Array]:
    _, push = jax.linearize(lambda theta: net(theta, x), net.theta)
    return push


def kernel_product(
    apply: Apply, params: Any, x: Any, x2: Any = None, *, moving: Moving = None, memory: int = MEMORY
) -> Callable[[Array], Array]:
    """The function v (n2, k) ↦ J(x) J(x2)ᵀ v (n, k), the kernel never formed (docs, G2).

    One reverse-mode and one forward-mode pass. Arguments as `kernel`; x may be sharded over devices along its samples,
    and then the product is. Raises ValueError as `kernel`, and for a v of another shape.

    >>> from linfit.tangent import kernel_product
    >>> kernel_product(lambda w, x: x @ w, jnp.ones(2), jnp.array([[3.0, 4.0]]))(jnp.array([[2.0]]))
    Array([[50.]], dtype=float64)
    """
    net = network(apply, params, moving)
    shape = outputs_like(net, x if x2 is None else x2)
    outputs_like(net, x)
    left = linearised(net, x, memory)
    right = left if x2 is None else linearised(net, x2, memory)

    def product(v: Array) -> Array:
        if np.shape(v) != shape.shape:
            raise ValueError(f"v must have shape {shape.shape}, got {np.shape(v)}")
        return _product(left, right, jnp.asarray(v, shape.dtype))

    return product


@eqx.filter_jit
def _product(left: Linearised, right: Linearised, v: Array) -> Array:
    return left.push(right.pull(v))


@eqx.filter_jit
def outputs(net: Network, x: Any) -> Array:
    """f(θ₁, x) (n, k)."""
    return net(net.theta, x)


def in_batches(function: Callable[[Network, Any], Array], net: Network, x: Any, memory: int) -> Array:
    """function(net, x) (n, k), so many samples at a time as fit into the memory."""
    size = int(max(1, min(samples(x), memory // (3 * _activations(net, x)))))
    parts = [function(net, take(x, slice(low, low + size))) for low in range(0, samples(x), size)]
    return jnp.concatenate(parts)
