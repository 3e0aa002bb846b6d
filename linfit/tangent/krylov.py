"""Every filter of a kernel from a few products with it: block Lanczos, and a bound on its error (docs, G2).

With Q (N, q) an orthonormal basis of the Krylov space of K started at r, and T = QᵀKQ = Y diag(θ) Yᵀ,

    g(K) r ≈ Q g(T) Qᵀr = Σ_j u_j g(θ_j) c_j,      u_j = Q y_j,   c_j = u_jᵀ r,

for every g at once. *Error.* K Q = T's part + F, and only the last block of F, q₊C, is not 0. For a resolvent,
(K−z)⁻¹r − Q(T−z)⁻¹Qᵀr = −(K−z)⁻¹F(T−z)⁻¹Qᵀr; Cauchy's integral of it over g gives, without approximation,

    g(K) r − Q g(T) Qᵀr = Σ_i h_i(K) q₊ᵢ,      h_i(z) = Σ_j D_ij c_j (g(z) − g(θ_j)) / (z − θ_j),   D = C Y_last.

The spectrum lies in [0, s_max], so the norm of K times the error is at most Σ_i max_z |z h_i(z)|: known afterwards, for
every filter, with nothing assumed. (The residual form of Lanczos' error is classical; Saad 1992.)

Own code, because matfree's Lanczos has no blocks, divides by 0 where the space is exhausted (a kernel of low rank), and
returns neither q₊ nor what else the products gave; it is an oracle in the tests.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from linfit.filters import Filter
from linfit.internal.checks import count, real_array

__all__ = ["Krylov", "krylov"]


class Krylov(eqx.Module):
    """Ritz values and vectors of a kernel K (N, N), and what is needed for g(K) r of any filter."""

    eigenvalues: Array  #: θ (q,), ascending.
    vectors: Array  #: u (N, q); zero columns where the Krylov space was exhausted.
    images: Array  #: What the products gave beside K u: (M, q).
    coefficients: Array  #: c = uᵀr (q, b), of each of the b starting vectors.
    coupling: Array  #: D (b, q).
    amplification: Array  #: ‖image‖ / ‖K q‖ of the last basis vectors, each image (M,) squared, at their largest.

    def apply(self, filter: Filter) -> Array:
        """g(K) r (…, N, b)."""
        weighted = filter(self.eigenvalues)[..., None] * self.coefficients
        return jnp.einsum("nq,...qb->...nb", self.vectors, weighted)

    def error(self, filter: Filter) -> Array:
        """A bound on ‖K·(g(K)r − its approximation)‖ (…, b), in units of r, a term for rounding included.

        >>> import jax
        >>> from linfit import Ridge
        >>> from linfit.tangent import krylov
        >>> K = jnp.diag(jnp.arange(1.0, 40.0))
        >>> few, more = (krylov(lambda v: K @ v, jnp.ones((39, 1)), steps).error(Ridge(5.0))[0] for steps in (5, 10))
        >>> bool(more < 0.1 * few)
        True
        """
        return _bound(self, filter)


@eqx.filter_jit
def _bound(space: Krylov, filter: Filter) -> Array:
    nodes = space.eigenvalues
    points = _points(nodes)
    # One call for all values, because a filter may judge rank by the largest eigenvalue it sees.
    g = filter(jnp.concatenate([points, nodes]))
    g_points, g_nodes = g[..., : len(points)], g[..., len(points) :]
    gap = points[:, None] - nodes
    close = jnp.abs(gap) <= 1e-6 * nodes.max()  # there the quotient below would be rounding; its neighbours serve
    quotient = (g_points[..., :, None] - g_nodes[..., None, :]) / jnp.where(close, 1, gap)
    h = jnp.einsum("iq,qb,...zq->...zib", space.coupling, space.coefficients, quotient)
    seen = jnp.where(close.any(axis=1), 0, points)
    truncation = jnp.max(jnp.abs(seen[:, None, None] * h), axis=-3).sum(-2)
    size = jnp.linalg.norm(g_nodes[..., None] * space.coefficients, axis=-2)
    return _SLACK * truncation + 4 * len(space.vectors) ** 0.5 * jnp.finfo(nodes.dtype).eps * nodes.max() * size


_SLACK = 1.1
"""For maxima between two of the points, and an s_max that the largest Ritz value has not quite reached."""


def _points(nodes: Array) -> Array:
    """Where max |z h(z)| is looked for: 600 values up to s_max, evenly spaced in log z."""
    return nodes.max() * jnp.logspace(-12, 0, 600, dtype=nodes.dtype)


def krylov(
    product: Callable[[Array], Array], start: Array, products: int, report: Callable[[int, int], None] | None = None
) -> Krylov:
    """g(K) r of every filter from a few products with a kernel: block Lanczos, fully reorthogonalised (docs, G2).

    Args:
        product: V (N, b) ↦ (N + M, b): K V, and below it whatever else is linear in V, such as K(x, X) V.
        start: r (N, b), b vectors that share one Krylov space; r (N,) is b = 1.
        products: calls of `product`, each with b vectors.
        report: told (done, all).

    >>> from linfit import MinNorm
    >>> from linfit.tangent import krylov
    >>> krylov(lambda v: 2 * v, jnp.array([1.0, 3.0]), products=5).apply(MinNorm())[:, 0]
    Array([0.5, 1.5], dtype=float64)
    """
    start = real_array("start", start)
    start = start[:, None] if start.ndim == 1 else start
    size, width = start.shape
    products = min(count("products", products), max(1, -(-size // width)))
    basis = jnp.zeros((size, products * width), start.dtype)
    images, scale = None, jnp.max(jnp.linalg.norm(start, axis=0))
    block, rest = start, start
    for done in range(products):
        block, _ = _orthonormal(rest, basis, scale)
        basis = jax.lax.dynamic_update_slice(basis, block, (0, done * width))
        image = product(block)
        if images is None:
            if image.shape[0] < size or image.shape[1:] != (width,):
                raise ValueError(f"product must map {block.shape} to at least as many rows, got {image.shape}")
            images = jnp.zeros((len(image), products * width), start.dtype)
        images = jax.lax.dynamic_update_slice(images, image.astype(start.dtype), (0, done * width))
        rest = image[:size]
        scale = jnp.linalg.norm(images[:size], axis=0).max()
        if report is not None:
            report(done + 1, products)
    assert images is not None
    return _ritz(start, basis, images, rest, scale)


@jax.jit
def _orthonormal(block: Array, basis: Array, scale: Array) -> tuple[Array, Array]:
    """What `block` adds to `basis`, orthonormal, and the block's coordinates in it; 0 where it adds nothing."""
    tolerance = len(block) * jnp.finfo(block.dtype).eps * scale
    block = block - basis @ (basis.T @ block)
    block = block - basis @ (basis.T @ block)
    left, values, right = jnp.linalg.svd(block, full_matrices=False)
    kept = values > tolerance
    left = jnp.where(kept, left, 0)  # what was small before it was normalised is orthogonal only after another round
    left = left - basis @ (basis.T @ left)
    left, values_again, right_again = jnp.linalg.svd(left, full_matrices=False)
    left = jnp.where(values_again > 0.5, left, 0) @ right_again
    return left, jnp.where(kept, values, 0)[:, None] * right


@jax.jit
def _ritz(start: Array, basis: Array, images: Array, rest: Array, scale: Array) -> Krylov:
    size, width = start.shape
    small = basis.T @ images[:size]
    values, rotation = jnp.linalg.eigh((small + small.T) / 2)
    _, coordinates = _orthonormal(rest, basis, scale)
    last = images[:, -max(width, images.shape[1] // 4) :] ** 2
    inside = jnp.sum(last[:size], axis=0)
    amplified = jnp.where(inside > 0, last[size:] / jnp.where(inside > 0, inside, 1), 0)
    return Krylov(
        eigenvalues=jnp.maximum(values, 0),
        vectors=basis @ rotation,
        images=images[size:] @ rotation,
        coefficients=rotation.T @ (basis.T @ start),
        coupling=coordinates @ rotation[-width:],
        amplification=amplified,
    )
