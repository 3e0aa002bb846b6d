"""Where bad input is turned away: one line that names the argument, what it got and what would be right.

Values can only be looked at outside a trace; under `jit` and `vmap` the static checks (rank, size) remain.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np
from jax import Array

ArrayLike = jax.typing.ArrayLike | Sequence[Any]
"""What may stand for an array: an array, a number, or nested sequences of numbers."""
Maybe = ArrayLike | None
"""An array that need not be given."""


def is_concrete(*values: object) -> bool:
    """Whether every value can be looked at, i.e. none is being traced by a JAX transformation."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def real_array(name: str, value: ArrayLike, *, ndim: int | None = None, finite: bool = True) -> Array:
    """`value` as a real floating-point array; integers are promoted to the default float, floats keep theirs.

    A plain number, `1` as well as `1.0`, stays weakly typed: it follows the dtype of what it meets.
    """
    try:
        array = jnp.asarray(float(value) if isinstance(value, int | float) else value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a numeric array, got {type(value).__name__}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool):
            raise ValueError(f"{name} must be real, got dtype {array.dtype}")
        array = array.astype(jnp.result_type(float))
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    if finite and is_concrete(array):
        require_finite(name, array)
    return array


def require_finite(name: str, array: ArrayLike) -> None:
    """Raise ValueError if a concrete array holds NaN or Inf."""
    if is_concrete(array) and not np.isfinite(np.asarray(array)).all():
        bad = np.size(array) - int(np.isfinite(np.asarray(array)).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or Inf among {np.size(array)} values")


def non_negative(name: str, value: ArrayLike, *, ndim: int | None = None, finite: bool = True) -> Array:
    """`value` as a floating array without negative or NaN entries."""
    array = real_array(name, value, ndim=ndim, finite=finite)
    if is_concrete(array) and not (np.asarray(array) >= 0).all():
        raise ValueError(f"{name} must be non-negative, got minimum {np.asarray(array).min()}")
    return array


def positive(name: str, value: ArrayLike, *, ndim: int | None = None) -> Array:
    """`value` as a floating array of finite positive entries."""
    array = real_array(name, value, ndim=ndim)
    if is_concrete(array) and not (np.asarray(array) > 0).all():
        raise ValueError(f"{name} must be positive, got minimum {np.asarray(array).min()}")
    return array


def count(name: str, value: int, *, minimum: int = 1) -> int:
    """`value` as a Python int, at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def broadcastable(name: str, shape: tuple[int, ...], reference: str, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless two shapes of hyperparameters broadcast against each other."""
    try:
        np.broadcast_shapes(shape, expected)
    except ValueError:
        raise ValueError(f"{name} must broadcast against {reference} of shape {expected}, got shape {shape}") from None


def same_size(name: str, got: int, reference: str, expected: int) -> None:
    """Raise ValueError unless two sizes that belong together agree."""
    if got != expected:
        raise ValueError(f"{name} must match {reference}: expected size {expected}, got {got}")


def probability(name: str, value: ArrayLike) -> Array:
    """`value` as a floating array with entries in [0, 1]."""
    array = non_negative(name, value)
    if is_concrete(array) and not (np.asarray(array) <= 1).all():
        raise ValueError(f"{name} must be at most 1, got maximum {np.asarray(array).max()}")
    return array


def as_projector(name: str, value: ArrayLike) -> Array:
    """An orthogonal projector (m, m), from itself or from the mask (m,) of the coordinates it keeps."""
    array = real_array(name, value)
    matrix = jnp.diag(array) if array.ndim == 1 else array
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be a mask (m,) or a projector (m, m), got shape {array.shape}")
    if is_concrete(matrix):
        host = np.asarray(matrix)
        tolerance = 1e2 * float(jnp.finfo(matrix.dtype).eps)
        if max(abs(host @ host - host).max(), abs(host - host.T).max()) > tolerance:
            raise ValueError(f"{name} must be an orthogonal projector, P = PP = Pᵀ; got a matrix that is not")
    return matrix
