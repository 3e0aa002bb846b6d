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

import jax
import jax.numpy as jnp
from jax import Array

from linfit.covariance import Covariance, Diagonal, Product, product
from linfit.internal.checks import ArrayLike, real_array, require_finite, same_size
from linfit.internal.linear_algebra import eigh, gram, on_host
from linfit.problem import Pair, TwoTaskProblem
from linfit.risk import RiskForm

__all__ = ["risk_forms"]

_Kernel = Covariance | Product
_Role = tuple[int, float] | None
"""Where a Gram matrix X M Xᵀ comes from: (index, ratio) is ratio × that of kernel `index`, None is 0."""


def risk_forms(X: ArrayLike | Iterator[ArrayLike], problem: TwoTaskProblem) -> Pair[RiskForm]:
    """Exact risk on both domains of every spectral filter fitted on the design X (docs, S2; ours).

    X is a design (n, p), or a stack (…, n, p) whose axes lead every result; or, for p too large to hold, an iterator of
    column blocks (n, p_k) in order, such as `linfit.column_blocks(key, problem, n)`, which needs diagonal covariances
    and O(n² + n·p_k) memory. Raises ValueError if the columns do not add up to p, for NaN or Inf in X, or if streaming
    meets a covariance that is not diagonal.

    >>> import jax
    >>> from linfit import MinNorm, aligned_problem, risk_forms, sample_design, spectra
    >>> problem = aligned_problem(spectra.isotropic(60), noise_std=1.0)
    >>> X = sample_design(jax.random.key(0), problem.finetune_covariance, 20)
    >>> bool(risk_forms(X, problem).finetune.optimal_tau(MinNorm()) < 1)   # overadaptation
    True
    """
    kernels, roles = _plan(problem)
    vectors = _vectors(problem)
    if isinstance(X, Iterator):
        return _reduce(*_streamed_products(X, problem.p, kernels, vectors), problem, roles)
    rows = real_array("X", X, finite=False)
    if rows.ndim < 2:
        raise ValueError(f"X must be a design (n, p) or a stack of designs (…, n, p), got shape {rows.shape}")
    same_size("X", rows.shape[-1], "the problem's p", problem.p)

    def one(rows: Array) -> Pair[RiskForm]:
        grams = [gram(rows), *(kernel.gram(rows) for kernel in kernels[1:])]
        return _reduce(grams, None if vectors is None else rows @ vectors, problem, roles)

    if rows.ndim == 2:
        return one(rows)
    stack = rows.reshape(-1, *rows.shape[-2:])
    if on_host(stack):
        # Designs side by side are worth it only where BLAS keeps to one thread each; else the two pools fight.
        alone = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
        with ThreadPoolExecutor(os.cpu_count() if alone else 1) as pool:
            forms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pool.map(one, stack))
    else:
        forms = jax.vmap(one)(stack)
    return jax.tree.map(lambda leaf: leaf.reshape(*rows.shape[:-2], *leaf.shape[1:]), forms)


def _plan(problem: TwoTaskProblem) -> tuple[list[_Kernel], list[_Role]]:
    """The M whose Gram matrices X M Xᵀ a problem needs, each different one once, I first; the roles Σ₂, Σ₁, Ω, ΩΣ₂.

    Only quadratic forms of ΩΣ₂ are used, so it need not be symmetric.
    """
    kernels: list[_Kernel] = [Diagonal(jnp.ones(problem.p, problem.finetune_covariance.dtype))]

    def role(covariance: _Kernel) -> tuple[int, float]:
        for index, known in enumerate(kernels):
            ratio = covariance.ratio_to(known)
            if ratio is not None:
                return index, ratio
        kernels.append(covariance)
        return len(kernels) - 1, 1.0

    finetune, pretrain = role(problem.finetune_covariance), role(problem.pretrain_covariance)
    if problem.gap_covariance is None:
        return kernels, [finetune, pretrain, None, None]
    spread = role(problem.gap_covariance)
    if spread[0] == 0 or finetune[0] == 0:  # a multiple of the identity
        cross = (max(spread[0], finetune[0]), spread[1] * finetune[1])
    else:
        cross = role(product(problem.gap_covariance, problem.finetune_covariance))
    return kernels, [finetune, pretrain, spread, cross]


def _vectors(problem: TwoTaskProblem) -> Array | None:
    """Columns m, Σ₂m, Σ₁u (p, 3); None if the gap has mean zero."""
    mean, u = problem.gap_mean, problem.pretrain_error
    if mean is None:
        return None
    u = jnp.zeros_like(mean) if u is None else u
    return jnp.stack([mean, problem.finetune_covariance.apply(mean), problem.pretrain_covariance.apply(u)], axis=1)


def _streamed_products(
    blocks: Iterator[ArrayLike], p: int, kernels: list[_Kernel], vectors: Array | None
) -> tuple[list[Array], Array | None]:
    """X M Xᵀ for each kernel M, and X times the vectors."""
    weights = []
    for kernel in kernels:
        if not isinstance(kernel, Diagonal):
            kind = type(kernel).__name__
            raise ValueError(f"X in column blocks needs diagonal covariances (p,), got {kind}: pass X whole")
        weights.append(jnp.sqrt(kernel.eigenvalues))
    grams: list[Array] = []
    projections, start = None, 0
    for block in blocks:
        rows = real_array("X block", block, ndim=2, finite=False)
        stop = start + rows.shape[1]
        if stop > p or (grams and rows.shape[0] != grams[0].shape[0]):
            wanted = f"have equal row counts and p = {p} columns in all"
            raise ValueError(f"X blocks must {wanted}, got a block of shape {rows.shape} after {start} columns")
        update = [gram(rows), *(gram(rows * weight[start:stop]) for weight in weights[1:])]
        grams = [total + part for total, part in zip(grams, update, strict=True)] if grams else update
        if vectors is not None:
            part = rows @ vectors[start:stop]
            projections = part if projections is None else projections + part
        start = stop
    same_size("X blocks", start, "the problem's p", p)
    return grams, projections


def _reduce(
    grams: list[Array], projections: Array | None, problem: TwoTaskProblem, roles: list[_Role]
) -> Pair[RiskForm]:
    require_finite("X", jnp.diagonal(grams[0]))
    eigenvalues, vectors = eigh(grams[0] / grams[0].shape[0])
    rotation = jnp.maximum(eigenvalues, 0), vectors
    indices, ratios = zip(*[(None, 0.0) if role is None else role for role in roles], strict=True)
    return _assemble(rotation, grams, projections, ratios, problem.pretrained_risks, problem.noise_std, indices=indices)


@partial(jax.jit, static_argnames="indices")
def _assemble(
    rotation: tuple[Array, Array],
    grams: list[Array],
    projections: Array | None,
    ratios: tuple[float, ...],
    constants: Pair[Array],
    noise_std: Array,
    *,
    indices: tuple[int | None, ...],
) -> Pair[RiskForm]:
    eigenvalues, vectors = rotation
    n = eigenvalues.shape[0]
    # Where S is a multiple of the identity, P = UᵀXSXᵀU is diagonal and so is P∘Q: diagonals will do.
    diagonal_only = indices[2] == 0 and projections is None

    def rotated_diagonal(index: int | None, ratio: float) -> Array:
        """ratio · diag Uᵀ(XMXᵀ)U (n,)."""
        if index is None:
            return jnp.zeros(n, eigenvalues.dtype)
        if index == 0:
            return ratio * n * eigenvalues
        # (UᵀM)∘Uᵀ, not U∘(MU): eigh returns U transposed in memory.
        return ratio * jnp.sum((vectors.T @ grams[index]) * vectors.T, axis=1)

    def rotated(index: int | None, ratio: float) -> Array:
        """ratio · Uᵀ(XMXᵀ)U (n, n), or its diagonal (n,) where that suffices."""
        if diagonal_only:
            return rotated_diagonal(index, ratio)
        if index is None or index == 0:
            return jnp.diag(rotated_diagonal(index, ratio))
        return ratio * (vectors.T @ grams[index] @ vectors)

    Q, Q1, P = (rotated(index, ratio) for index, ratio in zip(indices[:3], ratios[:3], strict=True))
    linear = rotated_diagonal(indices[3], ratios[3]) / n
    pretrain_linear = jnp.zeros_like(linear)
    if projections is not None:
        mean, finetune_mean, pretrain_error = (vectors.T @ projections).T
        P = P + jnp.outer(mean, mean)
        linear = linear + mean * finetune_mean / n
        pretrain_linear = -mean * pretrain_error / n

    def form(constant: Array, linear: Array, Q: Array) -> RiskForm:
        bias, gain = (jnp.diag(P * Q), Q) if diagonal_only else (P * Q, jnp.diagonal(Q))
        return RiskForm(eigenvalues, constant, linear, bias / n**2, gain / n**2, noise_std)

    return Pair(form(constants.finetune, linear, Q), form(constants.pretrain, pretrain_linear, Q1))
