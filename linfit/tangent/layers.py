"""The kernel of dense layers from their factors (docs, G1; the structure is known from neural-tangents' "structured
derivatives", arXiv 2206.08720).

Where a parameter W enters once, as a matrix product z = W a with one input a per sample, ∂f_c/∂W is the outer product
δ_c aᵀ with δ_c = ∂f_c/∂z, and so its part of the kernel is (a_i·a_j)(δ_ic·δ_jd): d + e numbers for each pair of outputs
instead of d·e. Such products are found in the program that `apply` traces to. A zero added to z, the probe, makes δ the
derivative by the probe. What remains, such as biases, is small and its features are formed.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal

__all__ = ["dense_kernel"]

_RESHAPING = ("transpose", "reshape", "squeeze", "expand_dims", "copy")
"""What leaves a parameter the same numbers in another order: inner products do not see it."""
_INLINED = ("jit", "pjit", "closed_call")


class _Walk:
    """Runs a traced program, adds probes to products with parameters, and notes what enters them and how often."""

    def __init__(self, probes: dict[int, Array]):
        self.probes = probes
        self.inputs: dict[int, Array] = {}
        self.shapes: dict[int, jax.ShapeDtypeStruct] = {}
        self.uses: dict[int, int] = {}

    def run(self, jaxpr: Any, constants: Any, values: list[Any], leaves: list[int | None]) -> tuple[list, list]:
        """Values of the outputs, and which parameter each of them is."""
        known = dict(zip(jaxpr.constvars, zip(constants, [None] * len(constants))))
        known.update(zip(jaxpr.invars, zip(values, leaves)))

        def read(variable: Any) -> tuple[Any, int | None]:
            return (variable.val, None) if isinstance(variable, Literal) else known[variable]

        for equation in jaxpr.eqns:
            operands = [read(variable) for variable in equation.invars]
            results = self._step(equation, [value for value, _ in operands], [leaf for _, leaf in operands])
            known.update(zip(equation.outvars, zip(*results)))
        ends = [read(variable) for variable in jaxpr.outvars]
        return [value for value, _ in ends], [leaf for _, leaf in ends]

    def _step(self, equation: Any, values: list[Any], leaves: list[int | None]) -> tuple[list[Any], list[int | None]]:
        name, parameters = equation.primitive.name, equation.params
        if name in _INLINED:
            inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
            return self.run(inner.jaxpr, inner.consts, values, leaves)
        results = equation.primitive.bind(*values, **equation.primitive.get_bind_params(parameters))
        results = list(results) if equation.primitive.multiple_results else [results]
        if name in _RESHAPING:
            return results, leaves[:1]
        for leaf in leaves:
            if leaf is not None:
                self.uses[leaf] = self.uses.get(leaf, 0) + 1
        if name == "dot_general":
            results = [self._product(values, leaves, results[0], parameters["dimension_numbers"])]
        return results, [None] * len(results)

    def _product(self, values: list[Any], leaves: list[int | None], result: Any, dimensions: Any) -> Any:
        """The result, with its probe if one operand is a parameter and the other holds one input."""
        contracted, batched = dimensions
        for side, leaf in enumerate(leaves):
            other = values[1 - side]
            size = int(np.prod([other.shape[axis] for axis in contracted[1 - side]]))
            if leaf is not None and leaves[1 - side] is None and not batched[0] and other.size == size:
                self.inputs[leaf] = other.ravel()
                self.shapes[leaf] = jax.ShapeDtypeStruct(result.shape, result.dtype)
                return result + self.probes[leaf] if leaf in self.probes else result
        return result


def _call(net: Any, leaves: list[Array], one: Any, probes: dict[int, Array]) -> tuple[Array, _Walk]:
    """f (k,) of one sample, through the walk."""
    structure = jax.tree.structure(net.theta)
    program = jax.make_jaxpr(lambda leaves, one: net(jax.tree.unflatten(structure, leaves), one))(leaves, one)
    arguments = [*leaves, *jax.tree.leaves(one)]
    sources = [*range(len(leaves)), *[None] * (len(arguments) - len(leaves))]
    walk = _Walk(probes)
    (result,), (leaf,) = walk.run(program.jaxpr, program.consts, arguments, sources)
    if leaf is not None:
        walk.uses[leaf] = 2
    return result[0], walk


def _products(net: Any, x: Any) -> dict[int, jax.ShapeDtypeStruct]:
    """Which leaves of θ enter once, in a product with one input per sample, and the shape of that product."""
    found: dict[int, jax.ShapeDtypeStruct] = {}

    def look(leaves: list[Array], one: Any) -> Array:
        result, walk = _call(net, leaves, one, {})
        found.update({leaf: shape for leaf, shape in walk.shapes.items() if walk.uses[leaf] == 1})
        return result

    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:1], x)
    jax.eval_shape(look, jax.tree.leaves(net.theta), one)
    return found


def dense_kernel(net: Any, x: Any, x2: Any, memory: int) -> Array | None:
    """J(x) J(x2)ᵀ (n, k, n2, k) by factors; None where that does not fit into the memory, or would not pay."""
    shapes = _products(net, x)
    leaves = jax.tree.leaves(net.theta)
    rest = sum(leaf.size for index, leaf in enumerate(leaves) if index not in shapes)
    n, n2 = (jax.tree.leaves(part)[0].shape[0] for part in (x, x2))
    k = jax.eval_shape(lambda: net(net.theta, x)).shape[1]
    # Features of the rest cost 2k·rest a pair of samples and output, the generic way about 4p.
    if not shapes or k * rest > 2 * net.size:
        return None
    factors = sum(leaves[index].size // max(shape.size, 1) + k * shape.size for index, shape in shapes.items())
    needed = 3 * (n + n2) * (factors + k * rest) + 2 * n * k * n2 * k
    if needed * leaves[0].dtype.itemsize > memory:
        return None
    left = _factors(net, x)
    return _combine(left, left if x2 is x else _factors(net, x2))


@eqx.filter_jit
def _factors(net: Any, x: Any) -> tuple[dict[int, Array], dict[int, Array], Array]:
    """Inputs a (n, d) and slopes δ (n, k, e) of every product, and the features of the rest (n, k, p_rest)."""
    leaves = jax.tree.leaves(net.theta)
    shapes = _products(net, x)
    zeros = {index: jnp.zeros(shape.shape, shape.dtype) for index, shape in shapes.items()}
    rest = {index: leaf for index, leaf in enumerate(leaves) if index not in shapes}

    def one(sample: Any) -> tuple[dict[int, Array], dict[int, Array], Array]:
        batch = jax.tree.map(lambda leaf: leaf[None], sample)

        def outputs(probes: dict[int, Array], rest: dict[int, Array]) -> tuple[Array, dict[int, Array]]:
            result, walk = _call(net, [rest.get(index, leaf) for index, leaf in enumerate(leaves)], batch, probes)
            return result, {index: walk.inputs[index] for index in shapes}

        (slopes, features), inputs = jax.jacrev(outputs, argnums=(0, 1), has_aux=True)(zeros, rest)
        k = jax.tree.leaves(slopes)[0].shape[0]
        flat = [part.reshape(k, -1) for part in features.values()]
        remaining = jnp.concatenate(flat, axis=1) if flat else jnp.zeros((k, 0), leaves[0].dtype)
        return inputs, {index: slope.reshape(k, -1) for index, slope in slopes.items()}, remaining

    return jax.vmap(one)(x)


@jax.jit
def _combine(left: Any, right: Any) -> Array:
    """Σ over products (a_i·a_j)(δ_ic·δ_jd), and the features of the rest."""
    total = jnp.einsum("ikp,jlp->ikjl", left[2], right[2])
    for index in left[0]:
        inputs = left[0][index] @ right[0][index].T
        total = total + inputs[:, None, :, None] * jnp.einsum("ike,jle->ikjl", left[1][index], right[1][index])
    return total
