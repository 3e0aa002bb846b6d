"""Symmetric primitives, on whatever is fastest where the data lies.

On a CPU, XLA multiplies X Xᵀ as a full matrix product; BLAS knows that the result is symmetric and does
half the work. So outside a trace and on the host these two go to numpy (without a copy: JAX's host arrays
are readable in place), and in every other case to XLA.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import is_concrete


def on_host(array: Array) -> bool:
    """Whether `array` is concrete and every device it lives on is a CPU."""
    return is_concrete(array) and all(device.platform == "cpu" for device in array.devices())


def gram(rows: Array) -> Array:
    """X Xᵀ, shape (n, n)."""
    if on_host(rows):
        host = np.asarray(rows)
        with np.errstate(invalid="ignore"):  # Inf − Inf is for the caller to report, by the name of the argument
            return jnp.asarray(host @ host.T)
    return rows @ rows.T


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and orthonormal eigenvectors (columns) of a symmetric matrix."""
    if on_host(matrix):
        eigenvalues, vectors = np.linalg.eigh(np.asarray(matrix))
        return jnp.asarray(eigenvalues), jnp.asarray(vectors)
    eigenvalues, vectors = jnp.linalg.eigh(matrix)
    return eigenvalues, vectors


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """U (n, k), singular values (k,), ascending, and Vᵀ (k, p) of a matrix (n, p), k = min(n, p)."""
    left, singular, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left[:, ::-1], singular[::-1], right[::-1]


def rank_cutoff(eigenvalues: Array) -> Array:
    """Eigenvalues at or below n·ε·max are rounding noise; shape (…, 1) for eigenvalues (…, n)."""
    epsilon = jnp.finfo(eigenvalues.dtype).eps
    return eigenvalues.shape[-1] * epsilon * jnp.max(eigenvalues, axis=-1, keepdims=True)


def solve_semidefinite(matrix: Array, vector: Array) -> Array:
    """The minimum-norm solution of a positive semi-definite system, scaled to unit diagonal first."""
    fixed = jax.lax.stop_gradient(matrix)
    diagonal = jnp.diagonal(fixed)
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    eigenvalues, vectors = jnp.linalg.eigh(scale[:, None] * fixed * scale)
    kept = eigenvalues > rank_cutoff(eigenvalues)
    inverse = jnp.where(kept, 1 / jnp.where(kept, eigenvalues, 1), 0)

    def solve(_: object, right: Array) -> Array:
        return scale * (vectors @ (inverse * (vectors.T @ (scale * right))))

    # differentiated as a solution, not through eigenvectors, which have no derivative where eigenvalues coincide
    return jax.lax.custom_linear_solve(lambda x: matrix @ x, vector, solve, symmetric=True)
