"""Covariance operators Σ ∈ R^{p×p}: diagonal, dense, or empirical (a factor; the p×p matrix is never formed).

A covariance also says whether it is a multiple of another, so that a Gram matrix at hand is not computed again.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import ArrayLike, is_concrete, non_negative, real_array
from linfit.internal.linear_algebra import gram

__all__ = ["Covariance", "Dense", "Diagonal", "Empirical"]


class Covariance(eqx.Module):
    """A positive semi-definite operator on R^p, stored as one array whose last axis has size p."""

    @property
    def _array(self) -> Array:
        return jax.tree.leaves(self)[0]

    @property
    def size(self) -> int:
        """p."""
        return self._array.shape[-1]

    @property
    def latent_size(self) -> int:
        """Number of independent coordinates z behind one sample x = Σ^{1/2}z."""
        return self.size

    @property
    def dtype(self) -> jnp.dtype:
        """Floating dtype of the stored values."""
        return self._array.dtype

    @abstractmethod
    def diagonal(self) -> Array:
        """diag Σ, shape (p,)."""

    @abstractmethod
    def apply(self, vectors: Array) -> Array:
        """vectors·Σ, for rows (…, p)."""

    @abstractmethod
    def gram(self, rows: Array) -> Array:
        """rows·Σ·rowsᵀ, shape (n, n), for rows (n, p)."""

    @abstractmethod
    def colour(self, latent: Array) -> Array:
        """latent·Σ^{1/2}, shape (…, p), for rows (…, latent_size) with identity covariance."""

    def ratio_to(self, other: "Covariance | Product") -> float | None:
        """c if Σ = c·other, to the last few bits, can be seen from concrete values of one kind, else None."""
        if not isinstance(other, type(self)) or not is_concrete(self, other) or self._array.shape != other._array.shape:
            return None
        numerator, denominator = np.asarray(self._array), np.asarray(other._array)
        at = np.unravel_index(np.argmax(np.abs(denominator)), denominator.shape)
        if denominator[at] == 0:
            return None
        ratio, tolerance = numerator[at] / denominator[at], 4 * np.finfo(numerator.dtype).eps
        return float(ratio) if np.allclose(numerator, ratio * denominator, rtol=tolerance, atol=0) else None

    def dot(self, a: Array, b: Array) -> Array:
        """⟨a, b⟩_Σ = aᵀΣb over the last axis (p) of two arrays that broadcast."""
        return jnp.sum(self.apply(a) * b, axis=-1)

    def squared_norm(self, vectors: Array) -> Array:
        """‖v‖²_Σ = vᵀΣv over the last axis (p): the excess risk of missing an optimum by v.

        >>> from linfit import Diagonal
        >>> Diagonal([2.0, 1.0]).squared_norm(jnp.array([[1.0, 0.0], [1.0, 3.0]]))
        Array([ 2., 11.], dtype=float64)
        """
        return self.dot(vectors, vectors)


class Diagonal(Covariance):
    """Σ = diag(eigenvalues), eigenvalues (p,) ≥ 0.

    >>> from linfit import Diagonal
    >>> Diagonal([2.0, 1.0]).apply(jnp.ones((1, 2)))
    Array([[2., 1.]], dtype=float64)
    """

    eigenvalues: Array

    def __init__(self, eigenvalues: ArrayLike):
        self.eigenvalues = non_negative("eigenvalues", eigenvalues, ndim=1)

    def diagonal(self) -> Array:
        return self.eigenvalues

    def apply(self, vectors: Array) -> Array:
        return vectors * self.eigenvalues

    def gram(self, rows: Array) -> Array:
        return gram(rows * jnp.sqrt(self.eigenvalues))

    def colour(self, latent: Array) -> Array:
        return latent * jnp.sqrt(self.eigenvalues)


class Dense(Covariance):
    """Σ given as a symmetric positive semi-definite (p, p) matrix.

    Raises ValueError if it is not symmetric, or has an eigenvalue below −√ε·λ_max.

    >>> from linfit import Dense
    >>> Dense([[2.0, 1.0], [1.0, 2.0]]).apply(jnp.array([[1.0, 0.0]]))
    Array([[2., 1.]], dtype=float64)
    """

    matrix: Array

    def __init__(self, matrix: ArrayLike):
        self.matrix = real_array("covariance matrix", matrix, ndim=2)
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"covariance matrix must be square, got shape {self.matrix.shape}")
        if not is_concrete(self.matrix):
            return
        host = np.asarray(self.matrix)
        tolerance = np.sqrt(np.finfo(host.dtype).eps) * np.abs(host).max()
        if np.abs(host - host.T).max() > tolerance:
            raise ValueError("covariance matrix must be symmetric; pass (Σ + Σᵀ)/2 if the asymmetry is rounding")
        smallest = np.linalg.eigvalsh(host)[0]
        if smallest < -tolerance:
            raise ValueError(f"covariance matrix must be positive semi-definite, got eigenvalue {smallest:.3g}")

    def diagonal(self) -> Array:
        return jnp.diagonal(self.matrix)

    def apply(self, vectors: Array) -> Array:
        return vectors @ self.matrix

    def gram(self, rows: Array) -> Array:
        return self.apply(rows) @ rows.T

    def colour(self, latent: Array) -> Array:
        eigenvalues, vectors = jnp.linalg.eigh(self.matrix)
        return (latent @ vectors) * jnp.sqrt(jnp.maximum(eigenvalues, 0)) @ vectors.T


class Empirical(Covariance):
    """Σ = FᵀF/m, the uncentred covariance of a feature matrix F (m, p); stored as F.

    >>> from linfit import Empirical
    >>> Empirical([[1.0, 1.0], [1.0, -3.0]]).apply(jnp.array([[1.0, 0.0]]))
    Array([[ 1., -1.]], dtype=float64)
    """

    features: Array

    def __init__(self, features: ArrayLike):
        self.features = real_array("features", features, ndim=2)

    @property
    def latent_size(self) -> int:
        return self.features.shape[-2]

    def diagonal(self) -> Array:
        return jnp.mean(self.features**2, axis=-2)

    def apply(self, vectors: Array) -> Array:
        return (vectors @ self.features.T) @ self.features / self.latent_size

    def gram(self, rows: Array) -> Array:
        return gram(rows @ self.features.T) / self.latent_size

    def colour(self, latent: Array) -> Array:
        return latent @ self.features / self.latent_size**0.5

    def ratio_to(self, other: "Covariance | Product") -> float | None:
        root = super().ratio_to(other)
        return None if root is None else root**2


def as_covariance(value: "Covariance | ArrayLike", name: str) -> Covariance:
    """A covariance from eigenvalues (p,), a matrix (p, p), or a covariance itself."""
    if isinstance(value, Covariance):
        return value
    array = real_array(name, value)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must be eigenvalues (p,), a matrix (p, p) or Empirical, got shape {array.shape}")
    try:
        return Diagonal(array) if array.ndim == 1 else Dense(array)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def trace_of_product(a: Covariance, b: Covariance) -> Array:
    """tr(AB), without forming either."""
    if isinstance(a, Diagonal) or isinstance(b, Diagonal):
        return jnp.vdot(a.diagonal(), b.diagonal())
    for one, other in ((a, b), (b, a)):
        if isinstance(other, Empirical):
            return jnp.vdot(other.features, one.apply(other.features)) / other.latent_size
    if isinstance(a, Dense) and isinstance(b, Dense):
        return jnp.vdot(a.matrix, b.matrix)
    raise TypeError(f"no trace of a product for {type(a).__name__} and {type(b).__name__}")


class Product(eqx.Module):
    """AB of two covariances; not symmetric unless they commute."""

    left: Covariance
    right: Covariance

    def gram(self, rows: Array) -> Array:
        """rows·A·B·rowsᵀ, shape (n, n)."""
        return self.left.apply(rows) @ self.right.apply(rows).T

    def ratio_to(self, other: object) -> None:
        """Not tracked."""


def product(a: Covariance, b: Covariance) -> "Covariance | Product":
    """AB, a covariance again if both are diagonal."""
    if isinstance(a, Diagonal) and isinstance(b, Diagonal):
        return Diagonal(a.eigenvalues * b.eigenvalues)
    return Product(a, b)
