"""Fine-tuning to a task with other singular vectors (docs, §7, N5; ours): when more pretraining starts to hurt.

Weights pretrained on A = U diag(a) Vᵀ from a balanced aligned start, W = U diag(s) Vᵀ, are fine-tuned for a time T to
any B. Late in pretraining the loss after it, L = ½‖W(T) − A‖², changes like Σ D_i s_i', D_i = ∂L/∂s_i at s = a, and
what is learned last decides: if D_r > 0 for the weakest feature r, L rises beyond a finite pretraining time. Hidden
units beyond the rank of A, any number of them, start at zero and stay there.

A target is given as singular values a (d,), with B (…, d, d) in their basis, or as matrices A (m, k), B (…, m, k); then
modes are the singular values of A, descending. Equal singular values of a matrix have no singular vectors of their own
but grow together: each gets the mean over its equals. A singular value 0 of a matrix is no feature: NaN. Leading axes
of B and of the time broadcast. Differentiable; in A as a matrix where its singular values differ.
"""

from functools import partial
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import ArrayLike, is_concrete, non_negative, real_array
from linfit.network import TwoLayer, gradient, target_objective

__all__ = ["critical_time", "fine_tuned_product", "late_slope", "learning_jumps", "second_order_slope"]

_SUBSTEPS, _MOST_SUBSTEPS = 32, 2**15
"""Of the closed form; more where T‖B‖ is known and large, so that each has a growth of at most e^8."""


class _Task(NamedTuple):
    a: Array  #: (d,), singular values of A.
    U: Array  #: (m, d).
    V: Array  #: (k, d).
    B: Array  #: (…, m, k).
    equals: Array  #: (d, d), rows that average over equal singular values; NaN at zeros of a matrix.


def _task(target: ArrayLike, finetune_target: ArrayLike) -> _Task:
    target, B = real_array("target", target), real_array("finetune_target", finetune_target)
    if target.ndim not in (1, 2):
        raise ValueError(f"target must be singular values (d,) or a matrix (m, k), got shape {target.shape}")
    expected = (*target.shape, *target.shape)[:2]
    if B.shape[-2:] != expected:
        raise ValueError(f"finetune_target must have shape (…, {expected[0]}, {expected[1]}), got {B.shape}")
    dtype = jnp.result_type(target, B)
    target, B = target.astype(dtype), B.astype(dtype)
    if target.ndim == 1:
        a, same = non_negative("target", target), jnp.eye(target.size, dtype=dtype)
        return _Task(a, same, same, B, same)
    U, a, Vt = jnp.linalg.svd(target, full_matrices=False)
    tolerance = 100 * max(target.shape) * jnp.finfo(dtype).eps * a[0]
    equals = (jnp.abs(a[:, None] - a) <= tolerance).astype(dtype)
    equals = jnp.where(a[:, None] > tolerance, equals / equals.sum(axis=1, keepdims=True), jnp.nan)
    return _Task(a, U, Vt.T, B, jax.lax.stop_gradient(equals))


def _per_feature(values: Array, task: _Task) -> Array:
    """The mean of values (…, d) over equal singular values."""
    return jnp.einsum("ij,...j->...i", task.equals, values)


# Balanced weights, W₁ᵀW₁ = W₂W₂ᵀ, stay so, and Q = [W₁; W₂ᵀ] obeys Q' = (F − ½QQᵀ)Q, F = [[0, B], [Bᵀ, 0]]. So
# P = QQᵀ = [[W₁W₁ᵀ, W], [Wᵀ, W₂ᵀW₂]] obeys the Riccati equation P' = FP + PF − P² (Fukumizu 1998), and a small change
# δP = yyᵀ of P moves on by y' = (F − P)y. Both are linear fractional: over a time h, with Z = ∫₀ʰ e^{F(2r−h)}dr,
#     Y = ZP + e^{−Fh},   P(h) = e^{Fh}P Y⁻¹,   y(h) = Y⁻ᵀy;
# in substeps, so that no exponential gets large. At the start P = Σ s_i q_i q_iᵀ, q_i = [u_i; v_i], linear in s, at
# s_i = 0 too: each y_i starts at q_i, and ∂W(T)/∂s_i is the upper right block of y_i y_iᵀ.
def _free(s: Array, U: Array, V: Array, B: Array, time: Array, *, substeps: int) -> tuple[Array, Array]:
    """W(T) (m, k) and ∂W(T)/∂s (d, m, k) without a penalty."""
    m, size, width = len(U), len(U) + len(V), s.size
    F = jnp.zeros((size, size), B.dtype).at[:m, m:].set(B).at[m:, :m].set(B.T)
    step = time.astype(B.dtype) / substeps
    zeros, one = jnp.zeros_like(F), jnp.eye(size, dtype=B.dtype)
    E = jax.scipy.linalg.expm(jnp.block([[F, zeros], [one, -F]]) * step)
    growth, Z, decay = E[:size, :size], E[size:, :size], E[size:, size:]

    def substep(now: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        P, y = now
        solved = jnp.linalg.solve((Z @ P + decay).T, jnp.hstack([(growth @ P).T, y]))
        return (solved[:, :-width], solved[:, -width:]), None

    q = jnp.concatenate([U, V])
    (P, y), _ = jax.lax.scan(substep, (q * s @ q.T, q), None, length=substeps)
    return P[:m, m:], jnp.einsum("pi,qi->ipq", y[:m], y[m:])


# With a penalty towards the start there is no closed form: the flow and its derivative along each w_i = √s_i together,
# of which the start and what the penalty pulls to both depend on s. W(T) is even in w_i (the sign of a hidden unit is
# free), so ∂/∂s = (1/2w)∂/∂w has a limit at 0, read off next to it.
def _penalised(s: Array, U: Array, V: Array, B: Array, time: Array, penalty: Array) -> tuple[Array, Array]:
    """W(T) (m, k) and ∂W(T)/∂s (d, m, k) with a penalty."""
    eps, time, penalty = float(jnp.finfo(B.dtype).eps), time.astype(B.dtype), penalty.astype(B.dtype)
    w = jnp.sqrt(jnp.maximum(s, eps * (jnp.max(s) + jnp.max(jnp.abs(B)))))
    units, objective = jnp.eye(s.size, dtype=B.dtype), target_objective(B)
    start, turned = TwoLayer(U * w, (V * w).T), TwoLayer(U * units[:, None], units[:, :, None] * V.T)

    def pull(now: TwoLayer, reference: TwoLayer) -> TwoLayer:
        slope = gradient(now, objective)
        return jax.tree.map(lambda g, x, r: time * (-g - penalty * (x - r)), slope, now, reference)

    def velocity(_: ArrayLike, both: tuple[TwoLayer, TwoLayer], args: None) -> tuple[TwoLayer, TwoLayer]:
        now, moved = both
        along = jax.vmap(lambda way, first: jax.jvp(pull, (now, start), (way, first))[1])
        return pull(now, start), along(moved, turned)

    solver, control = diffrax.Dopri8(), diffrax.PIDController(rtol=eps**0.6, atol=eps**0.7)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        solver,
        0.0,
        1.0,
        None,
        (start, turned),
        stepsize_controller=control,
        max_steps=10_000,
    )
    now, moved = jax.tree.map(lambda leaf: leaf[0].astype(B.dtype), solution.ys)
    return now.product, (moved.w1 @ now.w2 + now.w1 @ moved.w2) / (2 * w)[:, None, None]


def _fine_tuned(s: Array, task: _Task, time: ArrayLike, penalty: ArrayLike) -> tuple[Array, Array]:
    """W(T) (…, m, k) and ∂W(T)/∂s (…, d, m, k)."""
    time, penalty = non_negative("time", time), non_negative("penalty", penalty)
    if is_concrete(penalty) and not np.any(np.asarray(penalty)):
        return _solved(s, task, time, None, _substeps(task.B, time))
    return _solved(s, task, time, penalty, 0)


def _substeps(B: Array, time: Array) -> int:
    if not is_concrete(B, time):
        return _SUBSTEPS
    longest = float(np.max(time)) * float(np.max(np.linalg.norm(np.asarray(B), 2, axis=(-2, -1))))
    needed = max(_SUBSTEPS, 2 ** int(np.ceil(np.log2(max(longest, 1) / 8))))
    if needed > _MOST_SUBSTEPS:
        raise ValueError(f"time must be at most {8 * _MOST_SUBSTEPS:.0f} / ‖finetune_target‖, got {longest:.3g} of it")
    return needed


@partial(jax.jit, static_argnames="substeps")
def _solved(s: Array, task: _Task, time: Array, penalty: Array | None, substeps: int) -> tuple[Array, Array]:
    arguments, core = (s, task.U, task.V, task.B, time), "(d),(m,d),(k,d),(m,k),()"
    if penalty is None:
        return jnp.vectorize(partial(_free, substeps=substeps), signature=f"{core}->(m,k),(d,m,k)")(*arguments)
    return jnp.vectorize(_penalised, signature=f"{core},()->(m,k),(d,m,k)")(*arguments, penalty)


def fine_tuned_product(
    singular_values: ArrayLike, target: ArrayLike, finetune_target: ArrayLike, time: ArrayLike, penalty: ArrayLike = 0.0
) -> Array:
    """W(T) (…, m, k) after fine-tuning balanced weights W = U diag(s) Vᵀ to any B (docs, N5; flow: Fukumizu 1998).

        W' = GW₂ᵀW₂ + W₁W₁ᵀG,  G = B − W:  closed form without penalty; with (μ/2)‖θ − θ_pre‖² integrated

    Args:
        singular_values: s ≥ 0 (…, d), those of the pretrained weights, in the order of `target`.
        target, finetune_target: A and B, as in `late_slope`; U and V are the singular vectors of A.
        time, penalty: T ≥ 0 (…) and μ ≥ 0 (…).

    >>> from theory.overtraining import fine_tuned_product
    >>> fine_tuned_product([1.0, 0.0], [1.0, 0.5], [[1.0, 0.3], [0.0, 0.2]], time=2.0).round(3)
    Array([[1.006, 0.266],
           [0.035, 0.009]], dtype=float64)
    """
    task, s = _task(target, finetune_target), non_negative("singular_values", singular_values)
    if s.shape[-1:] != task.a.shape:
        raise ValueError(f"singular_values must have shape (…, {task.a.size}), one per mode of target, got {s.shape}")
    return _fine_tuned(s, task, time, penalty)[0]


def late_slope(target: ArrayLike, finetune_target: ArrayLike, time: ArrayLike, penalty: ArrayLike = 0.0) -> Array:
    """D (…, d): how each feature, late in pretraining, moves the pretraining loss after fine-tuning (docs, N5; ours).

        D_i = ∂L/∂s_i at s = a,  L = ½‖W(T) − A‖²;  D_i = y_iᵀ(W(T) − A)y_i' without penalty, y_i and y_i' from q_i

    Exact for every T. L rises beyond a finite pretraining time if D_r > 0, r the weakest feature, and falls at the end
    if D_r < 0. With the singular vectors shared, D_i = (φ(a_i) − a_i)φ'(a_i), φ the flow of N4: positive only if
    b_i > a_i. Under jit, where T is not known beforehand, for T‖B‖ up to 300.

    Args:
        target: A, as its singular values a ≥ 0 (d,) or as a matrix (m, k); d = min(m, k).
        finetune_target: B, (…, d, d) in the singular basis of A or (…, m, k).
        time: T ≥ 0 (…), learning rate × steps.
        penalty: μ ≥ 0 (…) of (μ/2)‖θ − θ_pre‖².

    >>> from theory.overtraining import late_slope
    >>> late_slope([1.0, 0.1], [[0.0, 0.5], [0.5, 0.0]], time=[0.02, 0.5]).round(4)  # a task orthogonal to A
    Array([[-3.530e-02, -1.000e-04],
           [-1.052e-01,  4.050e-02]], dtype=float64)
    """
    task = _task(target, finetune_target)
    product, slopes = _fine_tuned(task.a, task, time, penalty)
    gap = product - task.U * task.a @ task.V.T
    return _per_feature(jnp.einsum("...pq,...ipq->...i", gap, slopes), task)


class _Coupling(NamedTuple):
    """B in the singular basis of A, as far as the second order needs it."""

    g: Array  #: a_i − B_ii (…, d).
    sizes: Array  #: B_ij² + B_ji² (…, d, d), 0 on the diagonal.
    products: Array  #: B_ij B_ji (…, d, d), 0 on the diagonal.
    outside: Array  #: Σ B_ij² + B_ji² over what is outside A's singular vectors (…, d).


def _coupling(task: _Task) -> _Coupling:
    inside = task.U.T @ task.B @ task.V
    off = inside * (1 - jnp.eye(task.a.size, dtype=inside.dtype))
    diagonal = jnp.diagonal(inside, axis1=-2, axis2=-1)
    sizes = off**2 + off.mT**2
    rows, columns = task.U.T @ task.B - inside @ task.V.T, task.B @ task.V - task.U @ inside
    outside = jnp.sum(rows**2, axis=-1) + jnp.sum(columns**2, axis=-2)
    return _Coupling(task.a - diagonal, sizes, off * off.mT, outside)


# Second order in T. Ẇ = GS + SG and Ẅ = [GGᵀ − (GS+SG)]S + 2GSG + S[GᵀG − (GS+SG)] at the start S = diag(s), G = B − S,
# so W(T) − A at s = a is TẆ + T²Ẅ/2, and D_i = (W(T) − A)_ii + T²⟨GS+SG, ∂(GS+SG)/∂s_i⟩ gives
#     D_i = −2Ta_ig_i + T²[6a_ig_i(g_i + a_i) + S_i],   S_i = Σ_{j≠i} (3a_i/2 + a_j)(B_ij² + B_ji²) + a_jB_ijB_ji ≥ 0;
# rows and columns of B outside A's singular vectors count with a_j = 0. A penalty slows the displacement at first
# order, to (1 − e^{−μT})/μ = T − μT²/2 + …; what it does to the second order is of third order.
def _expansion(task: _Task) -> tuple[Array, Array, Array]:
    """The coefficients of T and T² in D (…, d), and S (…, d)."""
    a, (g, sizes, products, outside) = task.a, _coupling(task)
    weights = 1.5 * a[:, None] + a
    crossing = jnp.sum(weights * sizes + a * products, axis=-1) + 1.5 * a * outside
    terms = -2 * a * g, 6 * a * g * (g + a) + crossing, crossing
    first, second, crossing = (_per_feature(term, task) for term in terms)
    return first, second, crossing


def _slowed(time: Array, penalty: Array) -> Array:
    """(1 − e^{−μT})/μ, T at μ = 0."""
    still = penalty == 0
    return jnp.where(still, time, -jnp.expm1(-penalty * time) / jnp.where(still, 1, penalty))


def second_order_slope(
    target: ArrayLike, finetune_target: ArrayLike, time: ArrayLike, penalty: ArrayLike = 0.0
) -> Array:
    """`late_slope` to second order in T (docs, N5; ours).

        D_i = −2Ta_ig_i + T²{6a_ig_i(g_i + a_i) + Σ_{j≠i} [(3a_i/2 + a_j)(B_ij² + B_ji²) + a_jB_ijB_ji]}

    with g_i = a_i − B_ii, B in the singular basis of A, a_j = 0 outside it, and T → (1 − e^{−μT})/μ with a penalty. The
    error is O(T³): not for T(a₁ + ‖B‖ + μ) ~ 1. Arguments as in `late_slope`.

    >>> from theory.overtraining import second_order_slope
    >>> second_order_slope([1.0, 0.1], [[0.0, 0.5], [0.5, 0.0]], time=[0.02]).round(4)
    Array([[-0.0349, -0.0001]], dtype=float64)
    """
    task, time = _task(target, finetune_target), non_negative("time", time)
    first, second, _ = _expansion(task)
    time = _slowed(time, non_negative("penalty", penalty))[..., None]
    return time * first + time**2 * second


def critical_time(target: ArrayLike, finetune_target: ArrayLike, penalty: ArrayLike = 0.0) -> Array:
    """T* (…, d), the fine-tuning time beyond which D_i > 0, to second order (docs, N5; ours).

        T*_i = 2a_ig_i / [6a_ig_i(g_i + a_i) + S_i],  S_i = Σ_{j≠i} [(3a_i/2 + a_j)(B_ij² + B_ji²) + a_jB_ijB_ji]

    0 where g_i = a_i − B_ii < 0, a feature that is stretched, and at g_i = 0 if another is mixed in. ∞ where g_i ≥ 0
    and none is: a feature that is only removed or shrunk never turns. With a penalty −log(1 − μT*)/μ, and ∞ from
    μT* = 1. The relative error is O(T*(a₁ + ‖B‖ + μ)): a guide where that is below 0.2, and beyond 0.3 the feature may
    not turn at all. Arguments as in `late_slope`.

    >>> from theory.overtraining import critical_time
    >>> critical_time([1.0, 0.1], [[0.0, 0.5], [0.5, 0.0]]).round(4)
    Array([0.1559, 0.0239], dtype=float64)
    """
    task, penalty = _task(target, finetune_target), non_negative("penalty", penalty)[..., None]
    first, second, crossing = _expansion(task)
    rounding = (100 * jnp.finfo(crossing.dtype).eps * jnp.linalg.norm(task.B, axis=(-2, -1))[..., None]) ** 2
    mixed = crossing > rounding * jnp.max(task.a)
    scale = task.a * (task.a + jnp.linalg.norm(task.B, axis=(-2, -1))[..., None])
    first = jnp.where(jnp.abs(first) <= 100 * jnp.finfo(first.dtype).eps * scale, 0 * first, first)
    time = jnp.where(first < 0, -first / jnp.where(first < 0, second, 1), 0)
    turns = (first > 0) | mixed
    still, reached = penalty == 0, turns & (penalty * time < 1)
    delayed = -jnp.log1p(-jnp.where(reached, penalty * time, 0)) / jnp.where(still, 1, penalty)
    critical = jnp.where(reached, jnp.where(still, time, delayed), jnp.inf)
    return jnp.where(jnp.isnan(first), jnp.nan, critical)


# The loss to second order when the features S = diag(s) are there, each complete or absent:
#     L = ½‖S − A‖² + T²[½‖GS+SG‖² − Σ_{k absent} a_k Σ_j s_jB_kjB_jk];
# the first order vanishes, as an absent feature does not move. The difference with and without feature i is the jump.
def learning_jumps(target: ArrayLike, finetune_target: ArrayLike, time: ArrayLike, penalty: ArrayLike = 0.0) -> Array:
    """What learning each feature adds to the pretraining loss after fine-tuning, (…, d), to second order (N5; ours).

        ΔL_i = −a_i²/2 + a_iT²{2a_ig_i² + Σ_{j≠i} [(a_i/2 + s_j)(B_ij² + B_ji²) + (s_j − ā_j)B_ijB_ji]}

    when the features are learned in descending order: s_j = a_j and ā_j = 0 for those before i, s_j = 0 and ā_j = a_j
    for those after it. **Overtraining is visible where ΔL_i > 0**: a weak feature gains a_i²/2 once and pays in
    proportion to a_i for the strong ones that it is coupled to. T → (1 − e^{−μT})/μ with a penalty. Arguments as in
    `late_slope`.

    >>> from theory.overtraining import learning_jumps
    >>> learning_jumps([1.0, 0.1], [[0.0, 0.5], [0.5, 0.0]], time=[0.1, 0.5]).round(4)
    Array([[-0.4778, -0.0042],
           [ 0.0563,  0.0144]], dtype=float64)
    """
    task, time = _task(target, finetune_target), non_negative("time", time)
    a, (g, sizes, products, outside) = task.a, _coupling(task)
    index = jnp.arange(a.size)
    before = (a > a[:, None]) | ((a == a[:, None]) & (index < index[:, None]))  # of j for i
    there, absent = jnp.where(before, a, 0), jnp.where(before, 0, a)
    pairs = jnp.sum((a[:, None] / 2 + there) * sizes + (there - absent) * products, axis=-1)
    paid = a * (2 * a * g**2 + pairs + a * outside / 2)
    time = _slowed(time, non_negative("penalty", penalty))[..., None]
    return _per_feature(time**2 * paid - a**2 / 2, task)
