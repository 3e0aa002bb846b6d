"""Merges of K runs: the risk is a quadratic form in the weights, exact on given designs (docs, K1; ours).

The merge θ = θ₁ + Σ_k a_k (θ̂_k − θ₁) of K fine-tunings of one model misses task b by Σ_k a_k v_k − Δ_b, v_k = θ̂_k − θ₁
the movements and Δ_b = θ_b* − θ₁ the gap. So, whatever the runs are, on a test covariance M

    R(a) = c − 2 a·β + aᵀΓa,      c = E‖Δ_b‖²_M,   β_k = E v_kᵀMΔ_b,   Γ_kl = E v_kᵀMv_l.

Forgetting is the risk on a task whose gap is −u, u = θ₁ − θ₁*. `exact_form` has the three for given designs,
`theory.merges.form` predicts them without.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from linfit.covariance import Covariance, as_covariance
from linfit.filters import Filter
from linfit.internal.checks import ArrayLike, Maybe, is_concrete, non_negative, real_array, require_finite, same_size
from linfit.internal.linear_algebra import eigh, gram, solve_semidefinite

__all__ = ["Fit", "MergeForm", "exact_form"]


class MergeForm(eqx.Module):
    """R(a) = c − 2a·β + aᵀΓa, the risk of a merge of K runs as a function of their weights (docs, K1; ours).

    Call it with weights a (…, K) → (…). Forms of the same runs add up and scale: `form_a + 0.5 * form_b` is the form of
    that mix of tasks. `jax.vmap` serves stacks of forms.

    >>> from linfit import MergeForm
    >>> form = MergeForm(constant=1.0, linear=[0.5, 0.5], quadratic=[[1.0, 0.5], [0.5, 1.0]])
    >>> form([[1.0, 0.0], [0.5, 0.5]])
    Array([1.  , 0.75], dtype=float64)
    >>> form.optimal_weights()
    Array([0.33333333, 0.33333333], dtype=float64)
    """

    constant: Array  #: c, the risk of the model that all runs start from.
    linear: Array  #: β (K,).
    quadratic: Array  #: Γ (K, K), symmetric.

    def __init__(self, constant: ArrayLike, linear: ArrayLike, quadratic: ArrayLike):
        self.constant = real_array("constant", constant, ndim=0, finite=False)
        self.linear = real_array("linear", linear, ndim=1, finite=False)
        self.quadratic = real_array("quadratic", quadratic, ndim=2, finite=False)
        for size in self.quadratic.shape:
            same_size("quadratic", size, "linear", self.linear.size)

    def __call__(self, weights: ArrayLike) -> Array:
        weights = self._checked(weights)
        return self.constant + jnp.sum(weights * (weights @ self.quadratic - 2 * self.linear), axis=-1)

    def slope(self, weights: ArrayLike) -> Array:
        """β − Γa (…, K), half the rate at which the risk falls as the weight of each run grows.

        A run whose weight in the merge is 0 helps, with a weight of this sign, where this is not 0.
        """
        return self.linear - self._checked(weights) @ self.quadratic

    def optimal_weights(
        self, *, nonnegative: bool = False, sum_to_one: bool = False, shared_tau: bool = False
    ) -> Array:
        """The weights (K,) of least risk.

        Args:
            nonnegative: only weights a ≥ 0.
            sum_to_one: only weights with Σ a = 1.
            shared_tau: only a = τ/K for all runs, one τ for their average; alone or with `nonnegative`.

        Where several are best, as for runs that are copies of each other, the smallest in the norm that gives each run
        its own Γ_kk (but any of them where weights are non-negative). Differentiable. Γ must be positive semi-definite,
        as sums of forms with positive factors are. Raises ValueError for `shared_tau` with `sum_to_one`.
        """
        if shared_tau:
            if sum_to_one:
                raise ValueError("shared_tau must not come with sum_to_one, which leaves a = 1/K and nothing to choose")
            curvature, slope = jnp.sum(self.quadratic), jnp.sum(self.linear)
            moves = curvature > 0
            tau = jnp.where(moves, slope / jnp.where(moves, curvature, 1), 0)
            return jnp.broadcast_to(jnp.maximum(tau, 0) if nonnegative else tau, self.linear.shape)
        solve = _solve_non_negative if nonnegative else solve_semidefinite
        if not sum_to_one:
            return solve(self.quadratic, self.linear)
        # On Σa = 1 the risk is aᵀQa + const, Q = Γ − β1ᵀ − 1βᵀ + h11ᵀ, for any h. The least of aᵀQa lies on the ray of
        # the least of xᵀQx − 2·1ᵀx, constraint or not; h is large enough to make Q positive semi-definite, with 1
        # in its range.
        free = solve_semidefinite(self.quadratic, self.linear)
        height = jax.lax.stop_gradient(jnp.abs(self.linear @ free) + jnp.max(jnp.diagonal(self.quadratic)))
        height = jnp.where(height > 0, height, 1)
        ray = solve(self.quadratic - self.linear[:, None] - self.linear + height, jnp.ones_like(self.linear))
        return ray / jnp.sum(ray)

    def optimal_risk(self, *, nonnegative: bool = False, sum_to_one: bool = False, shared_tau: bool = False) -> Array:
        """The risk of `optimal_weights` with the same arguments."""
        return self(self.optimal_weights(nonnegative=nonnegative, sum_to_one=sum_to_one, shared_tau=shared_tau))

    def gains(self) -> Array:
        """By how much the least risk would rise without each run (K,): a_k²/(Γ⁻¹)_kk at the best weights a, Γ regular.

        >>> from linfit import MergeForm
        >>> MergeForm(1.0, [0.5, 0.0], [[1.0, 0.5], [0.5, 1.0]]).gains().round(4)   # the second alone would be useless
        Array([0.3333, 0.0833], dtype=float64)
        """

        def without(kept: Array) -> Array:
            return self(solve_semidefinite(jnp.where(kept[:, None] & kept, self.quadratic, 0), kept * self.linear))

        return jax.vmap(without)(~jnp.eye(self.linear.size, dtype=bool)) - self.optimal_risk()

    def __add__(self, other: "MergeForm") -> "MergeForm":
        if not isinstance(other, MergeForm):
            return NotImplemented
        same_size("linear", other.linear.size, "the runs of the other form", self.linear.size)
        return jax.tree.map(jnp.add, self, other)

    def __mul__(self, weight: ArrayLike) -> "MergeForm":
        weight = real_array("weight", weight, ndim=0)
        return jax.tree.map(lambda part: weight * part, self)

    __rmul__ = __mul__
    __array_ufunc__ = None  # so that `numpy_scalar * form` comes here

    def _checked(self, weights: ArrayLike) -> Array:
        weights = real_array("weights", weights)
        if weights.shape[-1:] != self.linear.shape:
            raise ValueError(f"weights must have shape (…, {self.linear.size}), one a run, got {weights.shape}")
        return weights


def _solve_non_negative(matrix: Array, vector: Array) -> Array:
    """argmin xᵀAx − 2b·x over x ≥ 0 by Lawson and Hanson's active sets; derivatives are those on the set found."""
    diagonal = jnp.diagonal(matrix)
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    A, b = scale[:, None] * matrix * scale, scale * vector

    def solve(A: Array, b: Array, active: Array) -> Array:
        return solve_semidefinite(jnp.where(active[:, None] & active, A, 0), jnp.where(active, b, 0))

    size, fixed = vector.size, jax.lax.stop_gradient((A, b))
    tolerance = 10 * size * jnp.finfo(b.dtype).eps * jnp.max(jnp.abs(fixed[1]))

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        active, x, _, count = state
        goal = solve(*fixed, active)
        blocked = active & (goal <= 0)
        share = jnp.where(blocked, x / jnp.where(blocked, x - goal + (x == goal), 1), jnp.inf)
        first = jnp.minimum(jnp.min(share), 1)
        moved = jnp.where(active, x + first * (goal - x), 0)
        slope = jnp.where(active, -jnp.inf, fixed[1] - fixed[0] @ goal)
        arrived = ~jnp.any(blocked)
        entering = arrived & (jnp.arange(size) == jnp.argmax(slope)) & (slope > tolerance)
        return (active & ~(share <= first)) | entering, moved, arrived & ~jnp.any(entering), count + 1

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        return ~state[2] & (state[3] < 10 * size + 10)

    start = (jnp.zeros(size, bool), jnp.zeros_like(b), jnp.zeros((), bool), jnp.zeros((), int))
    active = jax.lax.while_loop(unfinished, step, start)[0]
    return scale * jnp.maximum(solve(A, b, active), 0)


class Fit(eqx.Module):
    """One run on a given design.

    Args:
        task: index t of its task.
        X: design (n, p).
        noise_std: σ ≥ 0 of its labels.
        filter: how it is fitted, one `linfit.Filter` with scalar hyperparameters.
        data: fits with equal `data` share their design and labels, noise included; None: its labels are its own.
    """

    X: Array
    noise_std: Array
    filter: Filter
    task: int = eqx.field(static=True)
    data: int | None = eqx.field(static=True)

    def __init__(self, task: int, X: ArrayLike, noise_std: ArrayLike, filter: Filter, data: int | None = None):
        self.task, self.data, self.filter = task, data, filter
        self.X = real_array("X", X, ndim=2)
        self.noise_std = non_negative("noise_std", noise_std, ndim=0)

    def kernel(self) -> Array:
        """G = U diag(g(s)) Uᵀ/n (n, n), so that θ̂ − θ₁ = Xᵀ G (y − Xθ₁)."""
        n = self.X.shape[0]
        eigenvalues, U = eigh(gram(self.X) / n)
        g = self.filter(jnp.maximum(eigenvalues, 0))
        if g.ndim != 1:
            raise ValueError(f"filter must have scalar hyperparameters, got shape {g.shape[:-1]}; one Fit each")
        return (U * (g / n)) @ U.T


def exact_form(
    fits: Sequence[Fit],
    targets: ArrayLike,
    covariance: Covariance | ArrayLike,
    task: int | None,
    pretrain_error: Maybe = None,
    *,
    mean: Maybe = None,
) -> MergeForm:
    """The form of a merge of fits on given designs, averaged over noise and gaps (docs, K1; ours).

    With v_k = X_kᵀG_k(X_kΔ_t(k) + ε_k) and C_ab = E Δ_aΔ_bᵀ, in blocks that couple two designs,

        β_k = ⟨G_k, X_k C_t(k)b M X_kᵀ⟩,
        Γ_kl = ⟨G_k (X_k C_t(k)t(l) X_lᵀ) G_l + [same labels] σ_k² G_kG_l, X_k M X_lᵀ⟩.

    Args:
        fits: K of them; equal `task` means the same optimum.
        targets: E Δ_a Δ_b per coordinate (T, T, p), gaps relative to θ₁; beyond `mean` coordinates are uncorrelated.
        covariance: M of the test domain.
        task: b, the test task; None: the pretraining domain.
        pretrain_error: u (p,): the test domain is that of pretraining, whatever `task`.
        mean: E Δ_a (T, p). If not given 0, or −u with `pretrain_error`: shifts of mean 0 that know nothing of u.

    Raises ValueError for sizes that do not fit together, tasks that do not exist, NaN or Inf.

    >>> from linfit import Fit, MinNorm, exact_form
    >>> form = exact_form([Fit(0, [[1.0, 0.0]], 0.5, MinNorm())], [[[1.0, 1.0]]], [2.0, 1.0], task=0)
    >>> form.constant, form.linear, form.quadratic       # learns the first coordinate, with noise
    (Array(3., dtype=float64), Array([2.], dtype=float64), Array([[2.5]], dtype=float64))
    """
    if not fits:
        raise ValueError("fits must hold at least one Fit, got none")
    M, gaps = as_covariance(covariance, "covariance"), Gaps.checked(targets, pretrain_error, mean)
    test = gaps.index(task, pretrain_error)
    same_size("covariance", M.size, "the targets", gaps.size)
    tasks, kernels = [gaps.index(fit.task) for fit in fits], [fit.kernel() for fit in fits]
    for fit in fits:
        same_size("X", fit.X.shape[1], "the targets", gaps.size)

    def entry(i: int, j: int) -> Array:
        first, second = fits[i], fits[j]
        inner = kernels[i] @ gaps.product(first.X, second.X, tasks[i], tasks[j]) @ kernels[j]
        if i == j or (first.data is not None and first.data == second.data):
            inner = inner + first.noise_std * second.noise_std * (kernels[i] @ kernels[j])
        return jnp.sum(inner * (first.X @ M.apply(second.X).T))

    count = len(fits)
    upper = {(i, j): entry(i, j) for i in range(count) for j in range(i, count)}
    rows = [[upper[min(i, j), max(i, j)] for j in range(count)] for i in range(count)]
    linear = [
        jnp.sum(kernel * gaps.product(fit.X, M.apply(fit.X), own, test))
        for fit, kernel, own in zip(fits, kernels, tasks, strict=True)
    ]
    return MergeForm(gaps.norm(M, test), jnp.stack(linear), jnp.array(rows))


class Gaps(eqx.Module):
    """E Δ_aΔ_bᵀ = diag(covariance_ab) + mean_a mean_bᵀ of T tasks and, last, of the pretraining domain with gap −u."""

    covariance: Array
    """(T+1, T+1, p)."""
    mean: Array
    """(T+1, p)."""

    @classmethod
    def checked(cls, targets: ArrayLike, pretrain_error: Maybe, mean: Maybe) -> "Gaps":
        """From second moments (T, T, p), u (p,) and means (T, p), as `exact_form` takes them."""
        second = real_array("targets", targets, ndim=3)
        tasks, other, p = second.shape
        same_size("targets", other, "its other axis of tasks", tasks)
        diagonal = jnp.diagonal(second)
        non_negative("targets of each task with itself", diagonal)
        if is_concrete(second):
            require_finite("targets", second)
        u = jnp.zeros(p, second.dtype)
        if pretrain_error is not None:
            u = real_array("pretrain_error", pretrain_error, ndim=1)
            same_size("pretrain_error", u.size, "the targets", p)
        means = jnp.broadcast_to(-u, (tasks, p)) if mean is None else real_array("mean", mean, ndim=2)
        if means.shape != (tasks, p):
            raise ValueError(f"mean must have shape {(tasks, p)}, as the targets, got {means.shape}")
        covariance = jnp.pad(second - means[:, None] * means, [(0, 1), (0, 1), (0, 0)])
        return cls(covariance, jnp.concatenate([means, -u[None]]))

    @property
    def size(self) -> int:
        """p."""
        return self.mean.shape[-1]

    def index(self, task: int | None, pretrain_error: Maybe = None) -> int:
        """Where a task stands; the pretraining domain comes last."""
        last = self.mean.shape[0] - 1
        if task is None or pretrain_error is not None:
            return last
        if isinstance(task, bool) or not 0 <= task < last:
            raise ValueError(f"task must be among 0 … {last - 1}, the tasks of the targets, got {task}")
        return int(task)

    def second_moment(self, a: int, b: int) -> Array:
        """E Δ_aΔ_b per coordinate (p,)."""
        return self.covariance[a, b] + self.mean[a] * self.mean[b]

    def product(self, rows: Array, others: Array, a: int, b: int) -> Array:
        """rows · E Δ_aΔ_bᵀ · othersᵀ."""
        return (rows * self.covariance[a, b]) @ others.T + jnp.outer(rows @ self.mean[a], others @ self.mean[b])

    def norm(self, M: Covariance, a: int) -> Array:
        """E‖Δ_a‖²_M."""
        return M.diagonal() @ self.covariance[a, a] + M.squared_norm(self.mean[a])
