"""A design reduced to the exact risk of every filter fitted on it: one eigendecomposition per design (docs, S2; ours).

Derivation. With R = (1/n)XᵀU diag(g) Uᵀ, fine-tuning moves the weights by θ̂ − θ₁ = R(XΔ + ε), where the gap
Δ = θ₂* − θ₁ has mean m and covariance Ω, second moment S = Ω + mmᵀ. Fine-tuning: θ̂ − θ₂* = (RX − I)Δ + Rε, so

    c = tr SΣ₂,   b_i = [Uᵀ X S Σ₂ Xᵀ U]_ii / n,   B = (P∘Q)/n²,   q_i = Q_ii/n²,
    P = Uᵀ X S Xᵀ U,   Q = Uᵀ X Σ₂ Xᵀ U,

because tr(diag(g) P diag(g) Q) = gᵀ(P∘Q)g. Pretraining: θ̂ − θ₁* = u + R(XΔ + ε), so c' = uᵀΣ₁u, B' and q' have
Q₁ = Uᵀ X Σ₁ Xᵀ U in place of Q, and b'_i = −(UᵀXm)_i (UᵀXΣ₁u)_i / n.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from linfit.covariance import Covariance, Diagonal, Product, product
from linfit.internal.checks import ArrayLike, real_array, require_finite, same_size
from linfit.internal.linear_algebra import eigh, gram, on_host
from linfit.problem import Pair, TwoTaskProblem
from linfit.risk import RiskForm

__all__ = ["risk_forms"]


def risk_forms(X: ArrayLike | Iterator[ArrayLike], problem: TwoTaskProblem) -> Pair[RiskForm]:
    """Exact risk on both domains of every spectral filter fitted on the design X (docs, S2; ours).

    X is a design (n, p), or a stack (…, n, p) whose axes lead every result; or, for p too large to hold, an
    iterator of column blocks (n, p_k) in order, such as `linfit.column_blocks(key, problem, n)`, which needs
    diagonal covariances and O(n² + n·p_k) memory. Cost: the Gram matrices that differ, one eigendecomposition.

    Raises ValueError if the columns do not add up to p, X has a NaN or Inf, or streaming meets a covariance
    that is not diagonal.

    >>> import jax
    >>> from linfit import MinNorm, RandomShift, TwoTaskProblem, sample_design, spectra
    >>> problem = TwoTaskProblem(
    ...     spectra.power_law(60), spectra.isotropic(60), RandomShift(spectra.isotropic(60)), noise_std=1.0)
    >>> X = sample_design(jax.random.key(0), problem.finetune_covariance, 20)
    >>> forms = risk_forms(X, problem)
    >>> bool(forms.finetune.optimal_tau(MinNorm()) < 1)   # overadaptation
    True
    """
    plan = _plan(problem)
    if isinstance(X, Iterator):
        return _reduce(_streamed_products(X, problem, plan), problem, plan)
    rows = real_array("X", X, finite=False)
    if rows.ndim < 2:
        raise ValueError(f"X must be a design (n, p) or a stack of designs (…, n, p), got shape {rows.shape}")
    same_size("X", rows.shape[-1], "the problem's p", problem.p)
    if rows.ndim == 2:
        return _reduce(_products(rows, problem, plan), problem, plan)
    stack = rows.reshape(-1, *rows.shape[-2:])
    forms = _forms_of_stack(stack, problem, plan)
    return jax.tree.map(lambda leaf: leaf.reshape(*rows.shape[:-2], *leaf.shape[1:]), forms)


def _forms_of_stack(stack: Array, problem: TwoTaskProblem, plan: "_Plan") -> Pair[RiskForm]:
    def one(rows: Array) -> Pair[RiskForm]:
        return _reduce(_products(rows, problem, plan), problem, plan)

    if not on_host(stack):
        return jax.vmap(one)(stack)
    # Designs side by side are worth it only where BLAS keeps to one thread each; else the two pools fight.
    alone = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
    with ThreadPoolExecutor(os.cpu_count() if alone else 1) as pool:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *pool.map(one, stack))


class _Plan(NamedTuple):
    """The Gram matrices X M Xᵀ that a problem needs, each different one once.

    A role is (index, ratio): its Gram matrix is ratio × that of `covariances[index]`. The first is M = I.
    """

    covariances: list[Covariance | Product]
    finetune: tuple[int, float]
    pretrain: tuple[int, float]
    spread: tuple[int, float] | None
    """M = Ω; None for a fixed shift, as is the next."""
    cross: tuple[int, float] | None
    """M = ΩΣ₂; only quadratic forms of it are used, so it need not be symmetric."""


def _plan(problem: TwoTaskProblem) -> _Plan:
    dtype = problem.finetune_covariance.dtype
    covariances: list[Covariance | Product] = [Diagonal(jnp.ones(problem.p, dtype))]

    def role(covariance: Covariance | Product) -> tuple[int, float]:
        for index, known in enumerate(covariances):
            ratio = covariance.ratio_to(known)
            if ratio is not None:
                return index, ratio
        covariances.append(covariance)
        return len(covariances) - 1, 1.0

    finetune, pretrain = role(problem.finetune_covariance), role(problem.pretrain_covariance)
    if problem.gap_covariance is None:
        return _Plan(covariances, finetune, pretrain, None, None)
    spread = role(problem.gap_covariance)
    if spread[0] == 0:
        cross = (finetune[0], spread[1] * finetune[1])
    elif finetune[0] == 0:
        cross = (spread[0], spread[1] * finetune[1])
    else:
        cross = role(product(problem.gap_covariance, problem.finetune_covariance))
    return _Plan(covariances, finetune, pretrain, spread, cross)


class _Products(NamedTuple):
    """All that the risk needs of X."""

    grams: tuple[Array, ...]
    """X M Xᵀ (n, n) for each M of the plan."""
    projections: Array | None
    """Columns X m, X Σ₂ m, X Σ₁ u (n, 3); None if the gap has mean zero."""


def _products(rows: Array, problem: TwoTaskProblem, plan: _Plan) -> _Products:
    vectors = _vectors(problem)
    return _Products(
        (gram(rows), *(covariance.gram(rows) for covariance in plan.covariances[1:])),
        None if vectors is None else rows @ vectors,
    )


def _vectors(problem: TwoTaskProblem) -> Array | None:
    """Columns m, Σ₂m, Σ₁u (p, 3)."""
    mean, u = problem.gap_mean, problem.pretrain_error
    if mean is None:
        return None
    u = jnp.zeros_like(mean) if u is None else u
    return jnp.stack([mean, problem.finetune_covariance.apply(mean), problem.pretrain_covariance.apply(u)], axis=1)


def _streamed_products(blocks: Iterator[ArrayLike], problem: TwoTaskProblem, plan: _Plan) -> _Products:
    weights = []
    for covariance in plan.covariances:
        if not isinstance(covariance, Diagonal):
            raise ValueError(
                "streaming X in column blocks needs diagonal covariances (p,), "
                f"got {type(covariance).__name__}; pass X whole for this problem"
            )
        weights.append(jnp.sqrt(covariance.eigenvalues))
    vectors = _vectors(problem)
    grams: list[Array] = []
    projections = None
    start = 0
    for block in blocks:
        rows = real_array("X block", block, ndim=2, finite=False)
        stop = start + rows.shape[1]
        if stop > problem.p or (grams and rows.shape[0] != grams[0].shape[0]):
            raise ValueError(
                f"X blocks must have equal row counts and p = {problem.p} columns in all, "
                f"got a block of shape {rows.shape} after {start} columns"
            )
        update = [gram(rows), *(gram(rows * weight[start:stop]) for weight in weights[1:])]
        grams = [total + part for total, part in zip(grams, update, strict=True)] if grams else update
        if vectors is not None:
            part = rows @ vectors[start:stop]
            projections = part if projections is None else projections + part
        start = stop
    same_size("X blocks", start, "the problem's p", problem.p)
    return _Products(tuple(grams), projections)


def _reduce(products: _Products, problem: TwoTaskProblem, plan: _Plan) -> Pair[RiskForm]:
    kernel = products.grams[0]
    require_finite("X", jnp.diagonal(kernel))
    n = kernel.shape[0]
    eigenvalues, vectors = eigh(kernel / n)
    roles = (plan.finetune, plan.pretrain, plan.spread, plan.cross)
    return _assemble(
        jnp.maximum(eigenvalues, 0),
        vectors,
        products,
        [0.0 if role is None else role[1] for role in roles],
        problem.pretrained_risks,
        problem.noise_std,
        indices=tuple(None if role is None else role[0] for role in roles),
    )


@partial(jax.jit, static_argnames="indices")
def _assemble(
    eigenvalues: Array,
    vectors: Array,
    products: _Products,
    ratios: list[float],
    constants: Pair[Array],
    noise_std: Array,
    *,
    indices: tuple[int | None, ...],
) -> Pair[RiskForm]:
    n = eigenvalues.shape[0]
    # Where S is a multiple of the identity, P = UᵀXSXᵀU is diagonal and so is P∘Q: diagonals will do.
    diagonal_only = indices[2] == 0 and products.projections is None

    def rotated_diagonal(index: int | None, ratio: float) -> Array:
        """ratio · diag Uᵀ(XMXᵀ)U (n,)."""
        if index is None:
            return jnp.zeros(n, eigenvalues.dtype)
        if index == 0:
            return ratio * n * eigenvalues
        # (UᵀM)∘Uᵀ, not U∘(MU): eigh returns U transposed in memory.
        return ratio * jnp.sum((vectors.T @ products.grams[index]) * vectors.T, axis=1)

    def rotated(index: int | None, ratio: float) -> Array:
        """ratio · Uᵀ(XMXᵀ)U (n, n), or its diagonal (n,) where that suffices."""
        if diagonal_only:
            return rotated_diagonal(index, ratio)
        if index is None or index == 0:
            return jnp.diag(rotated_diagonal(index, ratio))
        return ratio * (vectors.T @ products.grams[index] @ vectors)

    Q, Q1, P = (rotated(index, ratio) for index, ratio in zip(indices[:3], ratios[:3], strict=True))

    def as_matrix(values: Array) -> Array:
        return jnp.diag(values) if diagonal_only else values

    def diagonal(values: Array) -> Array:
        return values if diagonal_only else jnp.diagonal(values)

    linear = rotated_diagonal(indices[3], ratios[3]) / n
    pretrain_linear = jnp.zeros_like(linear)
    if products.projections is not None:
        mean, finetune_mean, pretrain_error = (vectors.T @ products.projections).T
        P = P + jnp.outer(mean, mean)
        linear = linear + mean * finetune_mean / n
        pretrain_linear = -mean * pretrain_error / n
    finetune, pretrain = constants
    return Pair(
        RiskForm(eigenvalues, finetune, linear, as_matrix(P * Q) / n**2, diagonal(Q) / n**2, noise_std),
        RiskForm(eigenvalues, pretrain, pretrain_linear, as_matrix(P * Q1) / n**2, diagonal(Q1) / n**2, noise_std),
    )
