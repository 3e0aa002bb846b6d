"""Sampling designs X, tasks and labels from a problem (explicit key in, nothing hidden).

A design has rows x = Σ₂^{1/2}z with independent, standardised coordinates z. The law of z is not part of the
theory, so several are offered: predictions that rest on the covariance alone must agree for all of them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.covariance import Covariance, Diagonal, as_covariance
from linfit.internal.checks import ArrayLike, count
from linfit.problem import TwoTaskProblem

__all__ = ["LAWS", "Task", "column_blocks", "sample_design", "sample_designs", "sample_task"]

_STUDENT_FREEDOM = 8


LAWS: dict[str, Callable[[Array, tuple[int, ...], jnp.dtype], Array]] = {
    "gaussian": jax.random.normal,
    "rademacher": jax.random.rademacher,
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(3**0.5), 3**0.5),
    "student": lambda key, shape, dtype: (
        jax.random.t(key, _STUDENT_FREEDOM, shape, dtype) * (1 - 2 / _STUDENT_FREEDOM) ** 0.5
    ),
}
"""Laws of a coordinate with mean 0 and variance 1; "student" has 8 degrees of freedom."""


def sample_design(key: Array, covariance: Covariance | ArrayLike, n: int, law: str = "gaussian") -> Array:
    """n independent rows x = Σ^{1/2}z, shape (n, p), E xxᵀ = Σ.

    Args:
        key: of the sample.
        covariance: eigenvalues (p,), a matrix (p, p), or a covariance such as `linfit.Empirical(features)`.
        n: rows.
        law: of the coordinates z, a key of `linfit.design.LAWS`; ValueError for another.

    >>> from linfit import Diagonal, sample_design
    >>> sample_design(jax.random.key(0), Diagonal([4.0, 1.0]), 3, law="rademacher").shape
    (3, 2)
    """
    covariance = as_covariance(covariance, "covariance")
    shape = (count("n", n), covariance.latent_size)
    if law not in LAWS:
        raise ValueError(f"law must be one of {', '.join(LAWS)}, got {law!r}")
    return covariance.colour(LAWS[law](key, shape, covariance.dtype))


def sample_designs(key: Array, covariance: Covariance | ArrayLike, n: int, count: int, law: str = "gaussian") -> Array:
    """A stack of `count` independent designs (count, n, p); design i is `sample_design(fold_in(key, i), …)`.

    >>> from linfit import Diagonal, sample_designs
    >>> sample_designs(jax.random.key(0), Diagonal([4.0, 1.0]), 3, count=5).shape
    (5, 3, 2)
    """
    return jnp.stack([sample_design(jax.random.fold_in(key, i), covariance, n, law) for i in range(count)])


class Task(NamedTuple):
    """What fine-tuning meets, with θ₁* = 0."""

    X: Array  #: Design (n, p).
    y: Array  #: Labels Xθ₂* + ε (n,).
    theta_1: Array  #: Pretrained weights θ₁ = u (p,).
    theta_2_star: Array  #: Fine-tuning optimum δ (p,).


def sample_task(key: Array, problem: TwoTaskProblem, n: int, law: str = "gaussian") -> Task:
    """Sample X, the shift (if random) and the labels; arguments as for `sample_design`. θ₁* = 0, so θ₂* = δ, θ₁ = u.

    >>> from linfit import FixedShift, TwoTaskProblem, sample_task
    >>> problem = TwoTaskProblem([1.0, 1.0], [1.0, 1.0], FixedShift([3.0, 0.0]), noise_std=0.0)
    >>> task = sample_task(jax.random.key(0), problem, 1)
    >>> bool(task.y[0] == 3 * task.X[0, 0])
    True
    """
    design_key, shift_key, noise_key = jax.random.split(key, 3)
    X = sample_design(design_key, problem.finetune_covariance, n, law)
    return _label_design(X, shift_key, noise_key, problem)


def _label_design(X: Array, shift_key: Array, noise_key: Array, problem: TwoTaskProblem) -> Task:
    """A task on a given design: the shift (if random) and the noise are sampled."""
    if problem.gap_covariance is None:
        theta_2_star = problem.shift.vector  # type: ignore[union-attr]
    else:
        latent = jax.random.normal(shift_key, (problem.gap_covariance.latent_size,), X.dtype)
        theta_2_star = problem.gap_covariance.colour(latent)
    noise = problem.noise_std * jax.random.normal(noise_key, X.shape[:1], X.dtype)
    theta_1 = jnp.zeros_like(theta_2_star) if problem.pretrain_error is None else problem.pretrain_error
    return Task(X, X @ theta_2_star + noise, theta_1, theta_2_star)


_BLOCK_COLUMNS = 4096


def column_blocks(key: Array, problem: TwoTaskProblem, n: int) -> Iterator[np.ndarray]:
    """A Gaussian design of n rows in blocks of 4,096 columns (the last one shorter), never held whole.

    For `risk_forms(column_blocks(key, problem, n), problem)` at p = 10⁶ and beyond. Sampled by numpy's SFC64 on the
    host, a stream per block: the same key gives the same design on every backend (but not the one of
    `sample_design`). The fine-tuning covariance must be diagonal.

    >>> from linfit import RandomShift, TwoTaskProblem, column_blocks, spectra
    >>> flat = spectra.isotropic(10_000)
    >>> problem = TwoTaskProblem(flat, flat, RandomShift(flat), noise_std=0.1)
    >>> [block.shape for block in column_blocks(jax.random.key(0), problem, 5)]
    [(5, 4096), (5, 4096), (5, 1808)]
    """
    covariance = problem.finetune_covariance
    if not isinstance(covariance, Diagonal):
        raise ValueError(f"column_blocks needs a diagonal finetune_covariance (p,), got {type(covariance).__name__}")
    root = np.sqrt(np.asarray(covariance.eigenvalues))
    seed = [int(word) for word in np.ravel(jax.random.key_data(key))]
    return _blocks(seed, root, count("n", n))


def _blocks(seed: list[int], root: np.ndarray, n: int) -> Iterator[np.ndarray]:
    for index, start in enumerate(range(0, root.size, _BLOCK_COLUMNS)):
        scale = root[start : start + _BLOCK_COLUMNS]
        generator = np.random.Generator(np.random.SFC64([*seed, index]))
        block = generator.standard_normal((n, scale.size), dtype=root.dtype.type)
        block *= scale
        yield block
