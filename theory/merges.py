"""Merges and soups of K runs, predicted without sampling a design (docs, K1–K3; ours).

K1. A run on task t moves coordinate j of the eigenbasis by f_jΔ_tj on average and by a fluctuation of variance Var_j
around it (`theory.movement`); fluctuations of runs on their own data are independent. So the form of `linfit.merges` is

    β_k = Σ_j M_j f_kj E[Δ_t(k)Δ_b]_j,      Γ_kl = Σ_j M_j f_kj f_lj E[Δ_t(k)Δ_t(l)]_j + δ_kl Σ_j M_j Var_kj.

K2. K runs of one kind on one task, a = τ/K each: with A = ΣM f²E Δ² and V = ΣM Var, R = c − 2τβ + τ²(A + V/K).

K3. Other merges apply a function h to the K movements X_j ∈ R^K of each coordinate: dropping at random, trimming what
is small, electing a sign. Fluctuations are sums over many samples, so X_j is Gaussian, jointly with the gap Δ_b if that
is Gaussian or fixed: mean f_k E Δ_t(k), covariance f_k f_l Cov(Δ_t(k), Δ_t(l)) + δ_kl Var_k, and Cov(X_k, Δ_b) =
f_k Cov(Δ_t(k), Δ_b). By Stein's lemma

    E hΔ_b = E h · E Δ_b + Σ_k α_k Cov(X_k, Δ_b),      α_k = E ∂h/∂X_k,

so each such merge has a form too, made of E h, α and E hhᵀ. In which basis h acts matters. In the eigenbasis M is
diagonal and the sums are over coordinates. In others, h = E h + α(X − E X) + η in each coordinate, η uncorrelated with
everything Gaussian, and with the η of the others up to the third power of a correlation: the risk is that of the linear
part plus ΣM_cc E ηηᵀ. In *generic* coordinates, in which all eigenvectors are spread alike, the coordinates of X have
one common law, whose covariance is the average over the eigenbasis; then h is averaging with weights αᵀa plus noise,

    β' = αβ,      Γ' = αΓαᵀ + tr M · E ηηᵀ,

and can never be better than averaging with the best weights. In the eigenbasis it can: it acts as a filter.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import ndtri
from jax.scipy.stats import norm

from linfit.filters import Filter
from linfit.internal.checks import ArrayLike, Maybe, is_concrete, non_negative, positive, probability, same_size
from linfit.merges import Gaps, MergeForm
from theory.movement import movement, require_stable

__all__ = ["Run", "dropped", "elected", "form", "soup", "trimmed"]


class Run(eqx.Module):
    """One fine-tuning of the common model on data of its own.

    Args:
        task: index t of its task in `targets`.
        spectrum: eigenvalues (p,) ≥ 0 of its design's covariance, in the common eigenbasis.
        n: samples, any real number > 0.
        noise_std: σ ≥ 0 of its labels, in units of y.
        filter: how it is fitted, one filter with scalar hyperparameters that `theory.movement` knows.

    >>> from linfit import Ridge
    >>> Run(0, jnp.ones(10), 5, 0.1, Ridge(0.2)).task
    0
    """

    spectrum: Array
    n: Array
    noise_std: Array
    filter: Filter
    task: int = eqx.field(static=True)

    def __init__(self, task: int, spectrum: ArrayLike, n: ArrayLike, noise_std: ArrayLike, filter: Filter):
        if isinstance(task, bool) or not isinstance(task, int | np.integer):
            raise ValueError(f"task must be an integer, the index of a task, got {task!r}")
        self.task, self.filter = int(task), filter
        self.spectrum = non_negative("spectrum", spectrum, ndim=1)
        self.n = positive("n", n, ndim=0)
        self.noise_std = non_negative("noise_std", noise_std, ndim=0)


class _Moved(NamedTuple):
    """Fractions f and variances Var (K, p) of K runs, and where they are judged."""

    tasks: list[int]
    fraction: Array
    variance: Array
    gaps: Gaps
    test: int
    M: Array

    def plain(self) -> MergeForm:
        """K1, a row of Γ at a time."""
        second = self.gaps.covariance + self.gaps.mean[:, None] * self.gaps.mean
        tasks, test = jnp.array(self.tasks), second[self.test]

        def row(run: tuple[Array, Array]) -> Array:
            task, fraction = run
            return (self.fraction * second[task][tasks]) @ (self.M * fraction)

        linear = (self.fraction * test[tasks]) @ self.M
        quadratic = jax.lax.map(row, (tasks, self.fraction)) + jnp.diag(self.variance @ self.M)
        return MergeForm(self.M @ test[self.test], linear, quadratic)


def _moved(
    runs: Sequence[Run], targets: ArrayLike, spectrum: ArrayLike, task: int | None, pretrain_error: Maybe, mean: Maybe
) -> _Moved:
    """Checked arguments, and the movement of every run; a run that stands several times is worked out once."""
    if not runs:
        raise ValueError("runs must hold at least one Run, got none")
    gaps, M = Gaps.checked(targets, pretrain_error, mean), non_negative("spectrum", spectrum, ndim=1)
    same_size("spectrum", M.size, "the targets", gaps.size)
    tasks, known = [gaps.index(run.task) for run in runs], {}
    for run, own in zip(runs, tasks, strict=True):
        same_size("spectrum of a run", run.spectrum.size, "the targets", gaps.size)
        if id(run) not in known:
            require_stable(run.filter, run.spectrum, run.n)
            second = gaps.second_moment(own, own)
            known[id(run)] = _move(run.filter, run.spectrum, run.n, second, run.noise_std)
    fraction, variance = (jnp.stack([known[id(run)][part] for run in runs]) for part in (0, 1))
    return _Moved(tasks, fraction, variance, gaps, gaps.index(task, pretrain_error), M)


@eqx.filter_jit
def _move(filter: Filter, spectrum: Array, n: Array, second: Array, noise_std: Array) -> tuple[Array, Array]:
    moves = movement(filter, spectrum, n)
    return moves.fraction, moves.variance(second, noise_std)


def form(
    runs: Sequence[Run],
    targets: ArrayLike,
    spectrum: ArrayLike,
    task: int | None,
    pretrain_error: Maybe = None,
    *,
    mean: Maybe = None,
) -> MergeForm:
    """The risk of θ₁ + Σ a_k(θ̂_k − θ₁) as a function of the weights a (docs, K1; ours).

    Args:
        runs: K runs, each on independent data.
        targets: E Δ_aΔ_b per coordinate (T, T, p), of the tasks' gaps Δ_a = θ_a* − θ₁: relative to the weights that all
            runs start from, their own error included. For fixed tasks products of their gaps.
        spectrum: eigenvalues (p,) of the test domain.
        task: b, the test task; None: the pretraining domain.
        pretrain_error: u = θ₁ − θ₁* (p,): the test domain is that of pretraining, whatever `task`, and the risk is
            forgetting. `targets` must then contain u².
        mean: E Δ_a (T, p). Matters for forgetting, where E uΔ_a = u·mean, and for the merges of K3. If not given 0, or
            −u with `pretrain_error`: shifts of mean 0 that know nothing of u.

    Everything may be traced. Relative error O(1/n) against the average over designs; `linfit.exact_form` is exact for
    given ones, and runs on shared data need it. K + T² vectors of length p in memory. Raises ValueError for sizes that
    do not fit together, tasks that do not exist, NaN or Inf.

    >>> from linfit import MinNorm
    >>> flat, tasks = jnp.ones(1000), jnp.array([[1.0, 0.5], [0.5, 1.0]])      # two tasks, correlation ½
    >>> runs = [Run(0, flat, 500, 1.0, MinNorm()), Run(1, flat, 500, 1.0, MinNorm())]
    >>> found = form(runs, tasks[:, :, None] * flat / 1000, flat, task=0)
    >>> found.optimal_weights().round(3), found.optimal_risk().round(3)
    (Array([0.322, 0.14 ], dtype=float64), Array(0.804, dtype=float64))
    """
    return _moved(runs, targets, spectrum, task, pretrain_error, mean).plain()


class Soup(eqx.Module):
    """R(K, τ) = c − 2τβ + τ²(A + V/K), the risk of τ times the average of K runs of one kind (docs, K2; ours)."""

    constant: Array  #: c, the risk of the model that all runs start from.
    slope: Array  #: β.
    common: Array  #: A, of what all runs have in common.
    fluctuation: Array  #: V, of what differs from run to run: design and label noise.

    def __call__(self, count: ArrayLike, tau: ArrayLike = 1.0) -> Array:
        """The risk of K = `count` ≥ 1 runs; both broadcast."""
        count, tau = positive("count", count), jnp.asarray(tau)
        return self.lower_bound(tau) + self.amplitude(tau) / count

    def lower_bound(self, tau: ArrayLike = 1.0) -> Array:
        """c − 2τβ + τ²A, which infinitely many runs reach; ΣM E Δ²(1−τf)² on the task itself."""
        tau = jnp.asarray(tau)
        return self.constant - 2 * tau * self.slope + tau**2 * self.common

    def amplitude(self, tau: ArrayLike = 1.0) -> Array:
        """τ²V, of the 1/K law."""
        return jnp.asarray(tau) ** 2 * self.fluctuation

    def optimal_tau(self, count: ArrayLike) -> Array:
        """β/(A + V/K), which grows with K; 0 where nothing moves."""
        curvature = self.common + self.fluctuation / positive("count", count)
        return jnp.where(curvature > 0, self.slope / jnp.where(curvature > 0, curvature, 1), 0)

    def optimal_risk(self, count: ArrayLike) -> Array:
        """R(K, τ*(K)) = c − τ*β."""
        return self.constant - self.optimal_tau(count) * self.slope


def soup(
    run: Run,
    targets: ArrayLike,
    spectrum: ArrayLike,
    task: int | None,
    pretrain_error: Maybe = None,
    *,
    mean: Maybe = None,
) -> Soup:
    """The 1/K law of averaging K runs like one, with its lower bound and amplitude (docs, K2; ours).

    Arguments and errors as for `form`.

    >>> from linfit import MinNorm
    >>> flat = jnp.ones(1000)
    >>> law = soup(Run(0, flat, 500, 1.0, MinNorm()), flat[None, None] / 1000, flat, task=0)
    >>> law([1, 2, 4]), law.lower_bound()
    (Array([1.5   , 0.875 , 0.5625], dtype=float64), Array(0.25, dtype=float64))
    >>> law.optimal_tau([1, 2, 4, 1e9]).round(3)
    Array([0.333, 0.571, 0.889, 2.   ], dtype=float64)
    """
    moved = _moved([run], targets, spectrum, task, pretrain_error, mean)
    plain, fluctuation = moved.plain(), moved.variance[0] @ moved.M
    return Soup(plain.constant, plain.linear[0], plain.quadratic[0, 0] - fluctuation, fluctuation)


class _Coordinates(NamedTuple):
    """Moments of the movements X (K,) in each of q coordinates of some basis, jointly Gaussian with the gap."""

    mean: Array
    """(K, q)."""
    covariance: Array
    """(K, K, q)."""

    @property
    def std(self) -> Array:
        """(K, q), of coordinates that do not move a little above 0."""
        variance, epsilon = jnp.diagonal(self.covariance).T, jnp.finfo(self.mean.dtype).eps
        least = jax.lax.stop_gradient(epsilon * jnp.max(variance + self.mean**2))
        return jnp.sqrt(jnp.maximum(variance, least + 1e-30))

    @property
    def second(self) -> Array:
        """E XXᵀ (K, K, q)."""
        return self.covariance + self.mean[:, None] * self.mean


class _Outputs(NamedTuple):
    """Moments of m functions h of X in each coordinate."""

    mean: Array
    """E h (m, q)."""
    slope: Array
    """α = E ∂h/∂X (m, K, q)."""
    second: Array
    """E hhᵀ (m, m, q)."""


Basis = str | ArrayLike
"""Where an operation acts: "eigen", "generic", or the rows of an orthogonal matrix (p, p)."""


def _merged(moved: _Moved, basis: Basis, operate: Callable[[_Coordinates], _Outputs]) -> MergeForm:
    """The form of a merge that operates on the coordinates of a basis."""
    tasks, f = jnp.array(moved.tasks), moved.fraction
    spread, M = moved.gaps.covariance, moved.M
    mean, gap_mean = f * moved.gaps.mean[tasks], moved.gaps.mean[moved.test]
    own = jnp.eye(len(moved.tasks), dtype=f.dtype)[:, :, None] * moved.variance
    covariance, cross = f[:, None] * f * spread[tasks[:, None], tasks] + own, f * spread[tasks, moved.test]
    constant = M @ (spread[moved.test, moved.test] + gap_mean**2)
    if isinstance(basis, str):
        if basis not in ("eigen", "generic"):
            raise ValueError(f"basis must be 'eigen', 'generic' or an orthogonal matrix (p, p), got {basis!r}")
        if basis == "eigen":
            at = operate(_Coordinates(mean, covariance))
            linear = (at.mean * gap_mean + jnp.einsum("mkp,kp->mp", at.slope, cross)) @ M
            return MergeForm(constant, linear, at.second @ M)
        plain, common = moved.plain(), jnp.mean(covariance + mean[:, None] * mean, axis=-1)
        at = operate(_Coordinates(jnp.zeros_like(mean[:, :1]), common[..., None]))
        slope = at.slope[..., 0]
        noise = at.second[..., 0] - slope @ common @ slope.T
        return MergeForm(constant, slope @ plain.linear, slope @ plain.quadratic @ slope.T + jnp.sum(M) * noise)
    O = _orthogonal(basis, M.size)  # noqa: E741
    squares = O**2
    at = operate(_Coordinates(mean @ O.T, covariance @ squares.T))
    back = at.mean @ O  # E h in the eigenbasis
    linear = back @ (M * gap_mean) + jnp.einsum("mkc,kc->m", at.slope, (M * cross) @ squares.T)
    kernel, apart = (O * M) @ O.T, at.second - at.mean[:, None] * at.mean
    off = kernel - jnp.diag(jnp.diagonal(kernel))
    pairs = jax.lax.map(
        lambda C: jnp.einsum("mc,cd,nd->mn", at.slope[:, C[0]], off * ((O * C[2]) @ O.T), at.slope[:, C[1]]),
        tuple(part.reshape(-1, *part.shape[2:]) for part in (*jnp.indices(covariance.shape[:2]), covariance)),
    )
    quadratic = (back * M) @ back.T + apart @ jnp.diagonal(kernel) + jnp.sum(pairs, axis=0)
    return MergeForm(constant, linear, quadratic)


def _orthogonal(basis: Any, p: int) -> Array:
    matrix = jnp.asarray(basis)
    if matrix.shape != (p, p):
        raise ValueError(f"basis must be 'eigen', 'generic' or an orthogonal matrix {(p, p)}, got {matrix.shape}")
    if is_concrete(matrix):
        host = np.asarray(matrix)
        if not abs(host @ host.T - np.eye(p)).max() < 1e3 * np.finfo(host.dtype).eps ** 0.75:
            raise ValueError("basis must be orthogonal, OOᵀ = I; got a matrix that is not")
    return matrix


def dropped(
    runs: Sequence[Run],
    targets: ArrayLike,
    spectrum: ArrayLike,
    task: int | None,
    drop: ArrayLike,
    pretrain_error: Maybe = None,
    *,
    mean: Maybe = None,
    basis: Basis = "eigen",
) -> MergeForm:
    """DARE: each run forgets a random share q of its coordinates, and the rest is scaled by 1/(1−q) (docs, K3; ours).

        Γ_kk + q_k/(1−q_k) ΣM E X_k²,      c and β as without

    so the risk is never below that of the same weights without dropping. Arguments and errors as for `form`, and

    Args:
        drop: q in [0, 1), one for all runs or (K,); ValueError outside.
        basis: in which coordinates are dropped: "eigen"; "generic" (ΣM E X² becomes tr M · ΣE X²/p); or the rows of an
            orthogonal matrix (p, p).

    >>> from linfit import MinNorm
    >>> flat = jnp.ones(1000)
    >>> run = Run(0, flat, 500, 0.0, MinNorm())
    >>> dropped([run], flat[None, None] / 1000, flat, 0, drop=0.9)([1.0])     # 0.5 + 9 · 0.5
    Array(5., dtype=float64)
    """
    q = probability("drop", drop)
    if is_concrete(q) and (np.asarray(q) >= 1).any():
        raise ValueError(f"drop must be below 1, got maximum {np.asarray(q).max()}")
    moved = _moved(runs, targets, spectrum, task, pretrain_error, mean)
    extra = jnp.broadcast_to(q / (1 - q), len(runs))

    def operate(at: _Coordinates) -> _Outputs:
        identity = jnp.eye(len(runs), dtype=at.mean.dtype)[:, :, None]
        slope = jnp.broadcast_to(identity, at.covariance.shape)
        return _Outputs(at.mean, slope, at.second * (1 + identity * extra[:, None, None]))

    return _merged(moved, basis, operate)


def trimmed(
    runs: Sequence[Run],
    targets: ArrayLike,
    spectrum: ArrayLike,
    task: int | None,
    keep: ArrayLike,
    pretrain_error: Maybe = None,
    *,
    mean: Maybe = None,
    basis: Basis = "eigen",
) -> MergeForm:
    """Each run keeps the share of its coordinates that moved most, the others are reset to θ₁ (docs, K3; ours).

    h(X) = X·1[|X| > t], one threshold t per run such that the share `keep` of all coordinates is beyond it.

    Arguments and errors as for `form`, with `mean` = Δ for fixed tasks, and

    Args:
        keep: share in (0, 1], one for all runs or (K,); ValueError outside.
        basis: in which coordinates are compared; see `dropped`. A matrix costs K² products of p × p matrices.

    >>> from linfit import MinNorm
    >>> flat = jnp.ones(1000)
    >>> sparse = jnp.where(jnp.arange(1000) < 50, 0.02, 0.0)[None, None]      # 50 coordinates carry the whole task
    >>> run = Run(0, flat, 500, 0.3, MinNorm())
    >>> plain, kept = form([run], sparse, flat, 0), trimmed([run], sparse, flat, 0, keep=0.05)
    >>> plain.optimal_risk().round(2), kept.optimal_risk().round(2)
    (Array(0.58, dtype=float64), Array(0.26, dtype=float64))
    """
    kept = _share("keep", keep)
    moved = _moved(runs, targets, spectrum, task, pretrain_error, mean)
    return _merged(moved, basis, lambda at: _trim(at, kept)[1])


def elected(
    runs: Sequence[Run],
    targets: ArrayLike,
    spectrum: ArrayLike,
    task: int | None,
    keep: ArrayLike = 1.0,
    pretrain_error: Maybe = None,
    *,
    mean: Maybe = None,
    basis: Basis = "eigen",
) -> MergeForm:
    """TIES: trim, elect the sign of each coordinate's sum, average the runs that have this sign (docs, K3; ours).

    The form of one number, the factor by which the result is scaled: `linear` (1,), `quadratic` (1, 1).

    Arguments and errors as for `trimmed`. What the election changes is integrated over K dimensions on 2¹⁸ quasi-random
    points for all coordinates together, the same at every call, with an error of about a thousandth. Under jit and vmap
    as well; a derivative is refused (ValueError), as the integral of a jump is no sum of derivatives: take differences.

    >>> from linfit import MinNorm
    >>> flat = jnp.ones(1000)
    >>> runs = [Run(0, flat, 500, 0.5, MinNorm())] * 3
    >>> found = elected(runs, flat[None, None] / 1000, flat, 0, keep=0.5)
    >>> found.linear.shape
    (1,)
    """
    kept = _share("keep", keep)
    moved = _moved(runs, targets, spectrum, task, pretrain_error, mean)
    return _merged(moved, basis, lambda at: _elect(_without_derivative(at), *_trim(at, kept)))


@jax.custom_jvp
def _without_derivative(value: _Coordinates) -> _Coordinates:
    return value


@_without_derivative.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError("elected has no derivative: signs jump where sums cancel; take differences instead")


def _share(name: str, value: ArrayLike) -> Array:
    share = probability(name, value)
    positive(name, share)
    return share


@jax.jit
def _trim(at: _Coordinates, keep: Array) -> tuple[Array, _Outputs]:
    """Thresholds (K,), and the moments of h(X) = X − B(X), B(x) = x·1[|x| ≤ t]."""
    count = at.mean.shape[0]
    keep = jnp.broadcast_to(keep.astype(at.mean.dtype), count)
    threshold = jax.vmap(_threshold)(at.mean, at.std, keep)
    mean, slope, square = jax.vmap(_inside)(at.mean, at.std, threshold)
    outside = at.mean - mean
    # E hh' = E XY − E X B(Y) − E B(X) Y + E B(X)B(Y), E X B(Y) = E X · E B(Y) + Cov(X, Y) · E B'(Y)
    mixed = at.mean[:, None] * mean + at.covariance * slope
    first, second = np.triu_indices(count, 1)
    parts = [part[index] for part in (at.mean, at.std, threshold) for index in (first, second)]
    both = jax.vmap(_inside_both)(*[*parts, at.covariance[first, second], mean[first] * mean[second]])
    inner = jnp.zeros_like(at.covariance).at[first, second].set(both)
    inner = inner + jnp.swapaxes(inner, 0, 1)
    pairs = at.second - mixed - jnp.swapaxes(mixed, 0, 1) + inner
    own = jnp.arange(count)
    pairs = pairs.at[own, own].set(at.mean**2 + jnp.diagonal(at.covariance).T - square)
    return threshold, _Outputs(outside, jnp.eye(count, dtype=mean.dtype)[:, :, None] * (1 - slope), pairs)


def _threshold(mean: Array, std: Array, keep: Array) -> Array:
    """t at which the share `keep` of the coordinates has |X| > t; 0 if fewer move at all."""

    def beyond(t: Array) -> Array:
        return jnp.mean(norm.cdf((mean - t) / std) + norm.cdf((-t - mean) / std))

    def halve(ends: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        middle = (ends[0] + ends[1]) / 2
        above = beyond(middle) > keep
        return (jnp.where(above, middle, ends[0]), jnp.where(above, ends[1], middle)), None

    top = jnp.max(jnp.abs(mean) + 40 * std)
    ends, _ = jax.lax.scan(halve, (jnp.zeros_like(top), top), length=60)
    found = jax.lax.stop_gradient((ends[0] + ends[1]) / 2)
    # one Newton step, for the derivative
    density = jnp.mean((norm.pdf((mean - found) / std) + norm.pdf((found + mean) / std)) / std)
    density = jax.lax.stop_gradient(jnp.where(density > 0, density, jnp.inf))
    gap = beyond(found) - keep
    refined = found + (gap - jax.lax.stop_gradient(gap)) / density
    everything = (keep >= 1) | (ends[0] == 0)
    return jnp.where(everything, 0, refined)


def _inside(mean: Array, std: Array, t: Array) -> tuple[Array, Array, Array]:
    """E B, E B' and E B² of B = X·1[|X| ≤ t], X normal; B' has a jump of −t at either end."""
    low, high = (-t - mean) / std, (t - mean) / std
    share = norm.cdf(high) - norm.cdf(low)
    left, right = norm.pdf(low), norm.pdf(high)
    first = mean * share - std * (right - left)
    square = (mean**2 + std**2) * share - std**2 * (high * right - low * left) - 2 * mean * std * (right - left)
    return first, share - t * (left + right) / std, square


_ANGLES, _ANGLE_WEIGHTS = np.polynomial.legendre.leggauss(48)


def _inside_both(
    mean: Array, other: Array, std: Array, other_std: Array, t: Array, u: Array, covariance: Array, apart: Array
) -> Array:
    """E B(X)B(Y) of two normals (q,), thresholds t and u.

    By Price's theorem dE/ds = E_s B'(X)B'(Y) in the covariance s; E B(X)·E B(Y) = `apart` at s = 0. With P_s the
    probability of the box |X| ≤ t, |Y| ≤ u and φ_s the density at its corners (x, y),

        E_s B'B' = P_s − Σ_{x=±t} t φ(x) P_s(|Y| ≤ u | x) − Σ_{y=±u} u φ(y) P_s(|X| ≤ t | y) + tu Σ φ_s(x, y),

    and dP_s/ds = Σ sign(xy) φ_s(x, y). So all is one integral over s, smooth in θ, s = std·other_std·sin θ.
    """
    epsilon = jnp.finfo(mean.dtype).eps
    end = jnp.arcsin(jnp.clip(covariance / (std * other_std), -1 + 4 * epsilon, 1 - 4 * epsilon))
    angle = end * (jnp.asarray(_ANGLES, mean.dtype)[:, None] + 1) / 2
    r, root = jnp.sin(angle), jnp.cos(angle)
    corners = {
        (i, j): jnp.exp(-(a**2 - 2 * r * a * b + b**2) / (2 * root**2)) / (2 * np.pi)  # φ_s ds/dθ
        for i, a in ((-1, (-t - mean) / std), (1, (t - mean) / std))
        for j, b in ((-1, (-u - other) / other_std), (1, (u - other) / other_std))
    }
    scale = std * other_std
    turning = sum(i * j * corner for (i, j), corner in corners.items())

    def edge(at: Array, half: Array, std: Array, centre: Array, width: Array, other_std: Array) -> Array:
        """Σ_{x=±t} t φ(x) P_s(|Y| ≤ u | x); ds/dθ = std·other_std·cos θ."""
        total = jnp.zeros_like(r)
        for sign in (-1, 1):
            z = (sign * half - at) / std
            high, low = ((side * width - centre) / other_std - r * z for side in (1, -1))
            total += half / std * norm.pdf(z) * (norm.cdf(high / root) - norm.cdf(low / root))
        return total

    edges = edge(mean, t, std, other, u, other_std) + edge(other, u, other_std, mean, t, std)
    integrand = (covariance - scale * r) * turning + t * u * sum(corners.values()) - scale * root * edges
    integral = end / 2 * jnp.sum(jnp.asarray(_ANGLE_WEIGHTS, mean.dtype)[:, None] * integrand, axis=0)
    box = jnp.ones_like(mean)
    for centre, width, spread in ((mean, t, std), (other, u, other_std)):
        box *= norm.cdf((width - centre) / spread) - norm.cdf((-width - centre) / spread)
    return apart + covariance * box + integral


_LEAST_POINTS, _MOST_POINTS, _ALL_POINTS = 32, 2**16, 2**18
"""Of the integration over K dimensions: for one coordinate, and for all together where that leaves enough for each."""


@cache
def _sequence(dimension: int, coordinates: int) -> tuple[np.ndarray, np.ndarray]:
    """Roberts' sequence i·g^(−d) mod 1 in stretches of N, one a coordinate: the first (N, K), and shifts (q, K)."""
    g = 2.0
    for _ in range(60):
        g = (1 + g) ** (1 / (dimension + 1))
    steps = g ** -np.arange(1.0, dimension + 1)
    size = min(max(_LEAST_POINTS, _ALL_POINTS // coordinates), _MOST_POINTS)
    return (0.5 + np.arange(size)[:, None] * steps) % 1, size * np.arange(coordinates)[:, None] * steps % 1


@jax.jit
def _elect(at: _Coordinates, threshold: Array, trimmed: _Outputs) -> _Outputs:
    """Moments of the elected mean of h(X); d, its difference from the plain mean of h, is integrated numerically."""
    count = at.mean.shape[0]
    points, shifts = (jnp.asarray(part, at.mean.dtype) for part in _sequence(*at.mean.shape))
    correlation = at.covariance / (at.std[:, None] * at.std)
    epsilon = jnp.finfo(at.mean.dtype).eps
    jitter = 0.1 * math.sqrt(epsilon)

    def coordinate(parts: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        mean, std, correlation, shift = parts
        half = ndtri(jnp.clip((points + shift) % 1, epsilon, 1 - epsilon))
        normals = jnp.concatenate([half, -half])
        root = jnp.linalg.cholesky((correlation + jitter * jnp.eye(count)) / (1 + jitter))
        X = mean + std * (normals @ root.T)
        h = jnp.where(jnp.abs(X) > threshold, X, 0)
        sign = jnp.sign(jnp.sum(h, axis=-1, keepdims=True))
        agree = h * sign > 0
        plain = jnp.mean(h, axis=-1)
        d = jnp.sum(jnp.where(agree, h, 0), axis=-1) / jnp.maximum(jnp.sum(agree, axis=-1), 1) - plain
        slope = solve_triangular(root, normals.T @ d / len(normals), lower=True, trans=1) / std
        return jnp.mean(d), slope, jnp.mean(d * plain), jnp.mean(d * d)

    batch = max(1, 2**19 // points.size)
    each = (at.mean.T, at.std.T, jnp.moveaxis(correlation, -1, 0), shifts)
    mean, slope, mixed, square = jax.lax.map(coordinate, each, batch_size=batch)
    second = jnp.mean(trimmed.second, axis=(0, 1)) + 2 * mixed + square
    return _Outputs(
        (jnp.mean(trimmed.mean, axis=0) + mean)[None],
        (jnp.mean(trimmed.slope, axis=0) + slope.T)[None],
        second[None, None],
    )
