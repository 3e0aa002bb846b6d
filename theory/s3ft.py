"""S3FT in the linear model: what training on one's own right answers does (docs, §5).

The method is that of paper 2502.08130, which has no theory; the linear form and all formulas here are ours.

A response y ∈ R^m has a content Py, P an orthogonal projector of rank k, and a style (I−P)y. The model answers
xᵀθ₁ (+ sampling noise); the judge accepts an answer whose content is within a tolerance of gold. The paraphrase of a
gold answer has its content and the model's own style.

>>> from theory import s3ft
>>> procedure = s3ft.Procedure(tolerance=1.0, paraphrase_success=jnp.array([0.0, 0.5, 1.0]))
>>> s3ft.coefficients(procedure, content_rank=2, residual_std=1.0).style.round(3)
Array([0.607, 0.303, 0.   ], dtype=float64)
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import Array
from jax.scipy.special import gammainc, gammaincc, gammaln, xlogy

from linfit import Filter, fine_tune
from linfit.covariance import Covariance, as_covariance
from linfit.internal.checks import ArrayLike, count, is_concrete, non_negative, real_array, same_size
from linfit.targets import as_projector, probability

# --------------------------------------------------------------------------------------- T1: scalar responses

# With r = y − xᵀθ₁ = δᵀx + ε ~ N(0, v) the trained-on residual is r·1{|r| > c}. x is Gaussian, so E[x | r] = Σδ r/v and
#     E[x r 1{|r| > c}] = Σδ · E[r² 1{|r| > c}]/v = Σδ · P(χ²₃ > c²/v):
# least squares on these labels ends at θ₁ + ρ(c)δ, for every Σ.


def fixed_point_coefficient(threshold: ArrayLike, residual_std: ArrayLike) -> Array:
    """ρ(c): in the population, S3FT on scalar responses ends at θ₁ + ρ(c)δ, an ensemble with τ = ρ(c) (docs, T1; ours).

        ρ(c) = 2[zφ(z) + 1 − Φ(z)],  z = c/√v,  v = δᵀΣδ + σ²

    `threshold` c ≥ 0 (∞ allowed): the judge accepts |r| ≤ c; `residual_std` √v ≥ 0, of the pretrained residual r, in
    the same unit. They broadcast. ρ(0) = 1 is supervised fine-tuning, ρ(∞) = 0 the pretrained model. Gaussian x and ε.

    Raises ValueError for NaN or negative values, or an infinite residual_std.

    >>> from theory.s3ft import fixed_point_coefficient
    >>> fixed_point_coefficient(jnp.array([0.0, 1.0, 3.0, jnp.inf]), residual_std=1.0).round(4)
    Array([1.    , 0.8013, 0.0293, 0.    ], dtype=float64)
    """
    threshold = non_negative("threshold", threshold, finite=False)
    residual_std = non_negative("residual_std", residual_std)
    return _tail(3, _ratio(threshold, residual_std))


def _ratio(threshold: Array, spread: Array) -> Array:
    """(threshold/spread)², 0 for a threshold of 0 and ∞ for a spread of 0 otherwise."""
    positive = spread > 0
    ratio = threshold / jnp.where(positive, spread, 1)
    return jnp.where(threshold == 0, 0, jnp.where(positive, ratio**2, jnp.inf))


def _tail(freedom: ArrayLike, squared: Array) -> Array:
    """P(χ² > squared) for a χ² variable with `freedom` degrees of freedom."""
    return gammaincc(jnp.asarray(freedom, squared.dtype) / 2, squared / 2)


# ------------------------------------------------------------------------------------- T2: content and style

# Prediction ŷ = xᵀθ₁, own answer ŷ + ξ with ξ ~ N(0, s²I), gold y = ŷ + Δᵀx + ε. The judge looks at the miss in
# content, d = P(y − own): the answer is right if ‖d‖ ≤ tol. With a false-reject rate f and a false-accept rate a,
# whose draws belong to the sample (`linfit.targets.noisy`), and paraphrases that come about with probability q,
#
#                own      paraphrase         gold
#     right      1−f      0                  f
#     wrong      a        (1−a)q(1−f)        (1−a)(1−q(1−f))
#
# (a right answer that was rejected is rejected again when reworded). Relative to ŷ the target is
#     content  t = Pξ + C·d,         C = 1 unless the source is own:  f if right, 1−a if wrong;
#     style    t' = (I−P)ξ + G·e,    G = 1 if the source is gold,     e = (I−P)(y − own).
# C depends on d through its length only. In the population d ~ N(0, (v+s²)I) on the k content coordinates and
# E[x | d] = ΣΔ d/(v+s²), so that E[x tᵀ] = ΣΔP·E[C‖d‖²]/k(v+s²), a tail of χ² with k+2 degrees of freedom; and if
# the style residual is uncorrelated with the content residual, E[x t'ᵀ] = ΣΔ(I−P)·E[G].


class Procedure(NamedTuple):
    """How targets are made; every field is a number or an array, and they broadcast."""

    tolerance: ArrayLike
    """The judge accepts ‖P(answer − gold)‖ ≤ tolerance; ≥ 0, ∞ allowed."""
    paraphrase_success: ArrayLike = 1.0
    """Probability that the model can reword gold: its content exactly, in the style of its own answer."""
    false_accept: ArrayLike = 0.0
    """Probability that the judge accepts a wrong answer."""
    false_reject: ArrayLike = 0.0
    """Probability that the judge rejects a right answer."""
    sampling_std: ArrayLike = 0.0
    """Standard deviation of own answers around the prediction, per output (temperature)."""


SUPERVISED = Procedure(tolerance=0.0, paraphrase_success=0.0)
"""Supervised fine-tuning: every target is gold."""


class Shares(NamedTuple):
    """Expected share of each source of targets; they sum to 1."""

    own: Array
    paraphrase: Array
    gold: Array


class Coefficients(NamedTuple):
    """S3FT as an ensemble with a τ for content and a τ for style."""

    content: Array
    style: Array


def shares(procedure: Procedure, content_rank: int, residual_std: ArrayLike) -> Shares:
    """Expected share of own, paraphrased and gold targets in the population (docs, T2; ours).

        own = (1−f)F_k + a(1−F_k),  paraphrase = (1−a)q(1−f)(1−F_k),  F_k = P(χ²_k ≤ tol²/(v+s²))

    `residual_std` √v ≥ 0 is that of the pretrained residual y − xᵀθ₁ in each of the k content coordinates, Gaussian and
    independent. Fields of the procedure and `residual_std` broadcast.

    >>> jnp.stack(shares(Procedure(1.0, paraphrase_success=0.5), 1, residual_std=1.0)).round(4)
    Array([0.6827, 0.1587, 0.1587], dtype=float64)
    """
    checked = _check(procedure)
    return checked.shares(_tail(count("content_rank", content_rank), _judged(checked, residual_std)))


def coefficients(procedure: Procedure, content_rank: int, residual_std: ArrayLike) -> Coefficients:
    """Where S3FT ends in the population: θ₁ + ρ_content ΔP + ρ_style Δ(I−P) (docs, T2; ours).

        ρ_content = f F_{k+2} + (1−a)(1−F_{k+2}),   ρ_style = f F_k + (1−a)(1−q(1−f))(1−F_k)

    with F_k = P(χ²_k ≤ tol²/(v+s²)); arguments as in `shares`. For Gaussian x and noise, content residuals of equal
    variance v = (ΔᵀΣΔ)_jj + σ² and uncorrelated with each other and with the style residuals. With k = 1, a perfect
    judge and no style, ρ_content is T1. (1, 1) is supervised fine-tuning.

    >>> jnp.stack(coefficients(Procedure(1.0, paraphrase_success=0.5), 1, residual_std=1.0)).round(4)
    Array([0.8013, 0.1587], dtype=float64)
    """
    checked, k = _check(procedure), count("content_rank", content_rank)
    squared = _judged(checked, residual_std)
    return Coefficients(_mixed(checked.learned, _tail(k + 2, squared)), _mixed(checked.gold, _tail(k, squared)))


# Training on the accepted own answers alone. With the accepted share A = (1−f)F_k + a(1−F_k) and
# B = (1−f−a)(F_k − F_{k+2})/(v+s²), d given, ξ has mean −s²d/(v+s²) and x mean ΣΔd/(v+s²), hence
#     E[x ξᵀ; accepted] = s²B ΣΔP,   E[x xᵀ; accepted] = AΣ − B ΣΔPΔᵀΣ,
# and with PΔᵀΣΔP = qP the solution is s²B/(A − Bq)·ΔP. Style is sampled independently of x: its coefficient is 0.
def rejection_coefficient(procedure: Procedure, content_rank: int, signal: ArrayLike, noise_std: ArrayLike) -> Array:
    """Where training on accepted own answers alone ends in the population: θ₁ + ρΔP (docs, T2; ours).

        ρ = s²B/(A − Bq),   A = (1−f)F_k + a(1−F_k),   B = (1−f−a)(F_k − F_{k+2})/(q+σ²+s²)

    `signal` q ≥ 0 is the variance of Δᵀx in each of the k content coordinates, `noise_std` σ that of the labels.
    Without sampling (s = 0) an accepted answer is what the model says anyway: ρ = 0, nothing is learned. With it the
    accepted answers lean towards gold: ρ → s²/(s²+σ²) as the judge becomes strict.

    >>> rejection_coefficient(Procedure(0.1, sampling_std=jnp.array([0.0, 0.5, 2.0])), 1, 1.0, 0.5).round(3)
    Array([0.   , 0.497, 0.94 ], dtype=float64)
    """
    checked, k = _check(procedure), count("content_rank", content_rank)
    signal, noise_std = non_negative("signal", signal), non_negative("noise_std", noise_std)
    residual_variance, sampled = signal + noise_std**2, checked.sampling_std**2
    half = _judged(checked, jnp.sqrt(residual_variance)) / 2
    finite = jnp.where(jnp.isfinite(half), half, 0)
    density = jnp.exp(xlogy(k / 2, finite) - finite - gammaln(k / 2 + 1))
    shallow = jnp.where(jnp.isfinite(half), density, 0)  # F_k − F_{k+2}, without the cancellation
    right = gammainc(k / 2, half)  # F_k
    accepted = (1 - checked.missed) * right + checked.fooled * (1 - right)
    B = (1 - checked.missed - checked.fooled) * shallow / _or_one(residual_variance + sampled)
    return sampled * B / _or_one(accepted - B * signal)


def _or_one(value: Array) -> Array:
    """The value, 1 where it is not positive and what it divides is 0 too."""
    return jnp.where(value > 0, value, 1)


class _Checked(NamedTuple):
    """A procedure with its fields as arrays, and the table above."""

    tolerance: Array
    success: Array
    fooled: Array
    missed: Array
    sampling_std: Array

    @property
    def learned(self) -> tuple[Array, Array]:
        """P(C = 1) for an own answer that is right, and for one that is wrong."""
        return self.missed, 1 - self.fooled

    @property
    def gold(self) -> tuple[Array, Array]:
        """P(G = 1), likewise."""
        return self.missed, (1 - self.fooled) * (1 - self.success * (1 - self.missed))

    def shares(self, wrong: Array) -> Shares:
        """Of the sources, for a probability `wrong` that the own answer is wrong."""
        reworded = (1 - self.fooled) * self.success * (1 - self.missed)
        table = (1 - self.missed, self.fooled), (jnp.zeros_like(reworded), reworded), self.gold
        return Shares(*jnp.broadcast_arrays(*(_mixed(source, wrong) for source in table)))


def _check(procedure: Procedure) -> _Checked:
    if not isinstance(procedure, Procedure):
        raise ValueError(f"procedure must be a theory.s3ft.Procedure, got {type(procedure).__name__}")
    return _Checked(
        non_negative("tolerance", procedure.tolerance, finite=False),
        probability("paraphrase_success", procedure.paraphrase_success),
        probability("false_accept", procedure.false_accept),
        probability("false_reject", procedure.false_reject),
        non_negative("sampling_std", procedure.sampling_std),
    )


def _judged(procedure: _Checked, residual_std: ArrayLike) -> Array:
    """tol²/(v+s²)."""
    return _ratio(procedure.tolerance, jnp.hypot(non_negative("residual_std", residual_std), procedure.sampling_std))


def _mixed(right_and_wrong: tuple[Array, Array], wrong: Array) -> Array:
    """The average of two values over right and wrong answers."""
    return right_and_wrong[0] * (1 - wrong) + right_and_wrong[1] * wrong


# ------------------------------------------------------------------------------------------- risks of the model


class VectorProblem(eqx.Module):
    """The two-task problem with m outputs, of which some directions are content and the rest style (docs, T2; ours).

    Covariances Σ₁, Σ₂ as in `linfit.TwoTaskProblem`; `shift` δ (p, m); `content` the orthogonal projector P (m, m), or
    the outputs that are content as a mask (m,); gold answers y = xᵀθ₂* + ε, Var ε = σ²P + σ_s²(I−P) with σ `noise_std`
    and σ_s `style_noise_std`, σ by default; `pretrain_error` u = θ₁ − θ₁* (p, m), zero if None. Risks are
    sums over outputs, in squared units of y. All but `content`, whose rank is a size, may be traced. Raises ValueError
    for sizes that do not fit, NaN or Inf, negative σ.

    >>> problem = VectorProblem([1.0, 1.0], [1.0, 1.0], [[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]], [1, 1, 0], noise_std=0.5)
    >>> problem.content_rank, problem.style_dimension
    (2, 1)
    """

    pretrain_covariance: Covariance
    finetune_covariance: Covariance
    shift: Array
    content: Array
    noise_std: Array
    style_noise_std: Array
    pretrain_error: Array
    content_rank: int = eqx.field(static=True)
    """k = tr P."""

    def __init__(
        self,
        pretrain_covariance: Covariance | ArrayLike,
        finetune_covariance: Covariance | ArrayLike,
        shift: ArrayLike,
        content: ArrayLike,
        noise_std: ArrayLike,
        style_noise_std: ArrayLike | None = None,
        pretrain_error: ArrayLike | None = None,
    ):
        self.pretrain_covariance = as_covariance(pretrain_covariance, "pretrain_covariance")
        self.finetune_covariance = as_covariance(finetune_covariance, "finetune_covariance")
        self.shift = real_array("shift", shift, ndim=2)
        p, m = self.shift.shape
        same_size("pretrain_covariance", self.pretrain_covariance.size, "shift", p)
        same_size("finetune_covariance", self.finetune_covariance.size, "shift", p)
        if not is_concrete(content):
            raise ValueError("content must not be traced: its rank is a size")
        with jax.ensure_compile_time_eval():
            self.content = as_projector("content", content)
            self.content_rank = round(float(jnp.trace(self.content)))
        same_size("content", self.content.shape[0], "the columns of shift", m)
        if self.content_rank < 1:
            raise ValueError("content must have rank at least 1, got 0: without content there is nothing to judge")
        self.noise_std = non_negative("noise_std", noise_std, ndim=0)
        style_noise_std = noise_std if style_noise_std is None else style_noise_std
        self.style_noise_std = non_negative("style_noise_std", style_noise_std, ndim=0)
        error = jnp.zeros_like(self.shift) if pretrain_error is None else real_array("pretrain_error", pretrain_error)
        if error.shape != self.shift.shape:
            raise ValueError(f"pretrain_error must have the shape of shift, {self.shift.shape}, got {error.shape}")
        self.pretrain_error = error

    @property
    def style_dimension(self) -> int:
        """m − k."""
        return self.content.shape[0] - self.content_rank

    @property
    def gaps(self) -> tuple[Array, Array]:
        """ΔP and Δ(I−P), Δ = δ − u: what there is to learn of content and of style, (p, m) each."""
        gap = self.shift - self.pretrain_error
        return gap @ self.content, gap - gap @ self.content


class Outcome(NamedTuple):
    """What a procedure leads to, in expectation; one shape. Squared norms are sums over outputs."""

    shares: Shares
    content_risk: Array
    """‖(θ̂−θ₂*)P‖²_{Σ₂}: the task."""
    style_risk: Array
    """‖(θ̂−θ₂*)(I−P)‖²_{Σ₂}: distance from the style of gold."""
    content_drift: Array
    """‖(θ̂−θ₁)P‖²_{Σ₂}."""
    style_drift: Array
    """‖(θ̂−θ₁)(I−P)‖²_{Σ₂}: how far the model has left its own style."""
    forgetting: Array
    """R_pre = ‖θ̂−θ₁*‖²_{Σ₁}, all outputs."""


def population(problem: VectorProblem, procedure: Procedure) -> Outcome:
    """Shares and risks with unlimited data, by the two coefficients of `coefficients` (docs, T2; ours).

        content risk (1−ρ_content)²‖ΔP‖²,  style drift ρ_style²‖Δ(I−P)‖²,  R_pre = ‖u + ρ_content ΔP + ρ_style Δ(I−P)‖²

    Exact for Gaussian x if PΔᵀΣ₂ΔP = qP and PΔᵀΣ₂Δ(I−P) = 0; otherwise with the mean q over the content
    coordinates, an approximation. Fields of the procedure broadcast to the shape of the result.

    >>> problem = VectorProblem([1.0, 1.0], [1.0, 1.0], [[1.0, 0.0], [0.0, 2.0]], [1, 0], noise_std=0.0)
    >>> outcome = population(problem, Procedure(tolerance=jnp.array([0.0, 1.0]), paraphrase_success=0.0))
    >>> outcome.content_risk.round(3), outcome.style_drift.round(3), outcome.forgetting.round(3)
    (Array([0.  , 0.04], dtype=float64), Array([4.   , 0.403], dtype=float64), Array([5.   , 1.045], dtype=float64))
    """
    k, (content, style) = problem.content_rank, problem.gaps
    finetune, pretrain = problem.finetune_covariance, problem.pretrain_covariance
    content_size, style_size = _inner(finetune, content, content), _inner(finetune, style, style)
    residual_std = jnp.sqrt(content_size / k + problem.noise_std**2)
    learned = coefficients(procedure, k, residual_std)
    parts = (problem.pretrain_error, content, style)
    table = jnp.array([[_inner(pretrain, one, other) for other in parts] for one in parts])
    weights = jnp.stack([jnp.ones_like(learned.content), *jnp.broadcast_arrays(*learned)], axis=-1)
    return _same_shape(
        Outcome(
            shares(procedure, k, residual_std),
            (1 - learned.content) ** 2 * content_size,
            (1 - learned.style) ** 2 * style_size,
            learned.content**2 * content_size,
            learned.style**2 * style_size,
            jnp.sum((weights @ table) * weights, axis=-1),
        )
    )


def _inner(covariance: Covariance, one: Array, other: Array) -> Array:
    """tr AᵀΣB."""
    return jnp.sum(covariance.apply(one.T).T * other)


def _same_shape(outcome: Outcome) -> Outcome:
    return Outcome(
        Shares(*jnp.broadcast_arrays(*outcome.shares, outcome.content_risk)[:3]),
        *jnp.broadcast_arrays(*outcome[1:], outcome.shares.own)[:5],
    )


# Conditional on the design. θ̂ = θ₁ + R t with the rows of t independent given X: d_i ~ N(μ_i, (σ²+s²)I) around
# μ_i = PΔᵀx_i, so ‖d_i‖² is noncentral χ² with λ_i = ‖μ_i‖²/(σ²+s²). For any function h of the length
#     E[h d] = μ E[h(χ'²_{k+2}(λ))],   E[h‖d‖²] = (σ²+s²)(k E[h(χ'²_{k+2}(λ))] + λ E[h(χ'²_{k+4}(λ))]).
# Write A_j for E[C] under χ'²_j(λ_i): f P(χ'²_j ≤ z²) + (1−a) P(χ'²_j > z²), z² = tol²/(σ²+s²). With
# E[ξ | d] = −b(d−μ), b = s²/(σ²+s²),
#     E t = A_{k+2} μ,   E‖t‖² = ks² + (1−2b)E[C‖d‖²] + 2b‖μ‖²A_{k+2}.
# The style noise is independent of the content noise, so with ν_i = (I−P)Δᵀx_i and E[G] under χ'²_k(λ_i)
#     E t' = ν E[G],   E‖t'‖² = (1 − E[G])(m−k)s² + E[G](‖ν‖² + (m−k)σ_s²).
# Squared norms of R t need R E t and, because the rows are independent, only the total variance of each.


class _Rows(NamedTuple):
    """Mean weights and variances of the targets on each sample, (…, n), by NumPy and SciPy: noncentral χ² is theirs."""

    content: np.ndarray
    """E t = content·μ."""
    style: np.ndarray
    """E t' = style·ν."""
    content_variance: np.ndarray
    """E‖t − E t‖²."""
    style_variance: np.ndarray
    wrong: np.ndarray
    """Probability that the own answer is wrong."""


def conditional(X: ArrayLike, problem: VectorProblem, procedure: Procedure, filter: Filter) -> Outcome:
    """Shares and risks on a given design, exact for every n and p (docs, T2; ours).

    Averaged over label noise, sampling of answers, judge and paraphrases; the design X (n, p) and the shift are fixed.
    `filter` is one spectral filter (no hyperparameter axes); fields of the procedure broadcast to the shape of the
    result. Raises ValueError for shapes that do not fit.

    >>> from linfit import MinNorm
    >>> problem = VectorProblem([1.0, 1.0], [1.0, 1.0], [[1.0, 0.0], [0.0, 2.0]], [1, 0], noise_std=0.1)
    >>> outcome = conditional([[1.0, 1.0]], problem, Procedure(jnp.array([0.0, 0.9, jnp.inf])), MinNorm())
    >>> outcome.content_risk.round(3), outcome.shares.own.round(3)
    (Array([0.505, 0.582, 1.   ], dtype=float64), Array([0.   , 0.159, 1.   ], dtype=float64))
    """
    X = real_array("X", X, ndim=2)
    n = X.shape[0]
    same_size("X", X.shape[1], "the problem's p", problem.shift.shape[0])
    checked = _check(procedure)
    maps = fine_tune(X, jnp.eye(n, dtype=X.dtype), jnp.zeros((X.shape[1], n), X.dtype), filter)
    if maps.ndim != 2:
        raise ValueError(f"filter must be a single filter, got hyperparameters of shape {maps.shape[:-2]}")
    content, style = problem.gaps
    mu, nu = np.asarray(X @ content), np.asarray(X @ style)
    rows = _rows(problem, checked, mu, nu)

    R = np.asarray(maps)

    def risk(mean: np.ndarray, variance: np.ndarray, covariance: Covariance, start: ArrayLike) -> np.ndarray:
        """E‖R t + start‖²_Σ: the squared norm of the mean, and what each row adds."""
        moved = R @ mean + np.asarray(start)
        image = np.asarray(covariance.apply(jnp.asarray(np.swapaxes(moved, -1, -2))))
        gains = np.sum(np.asarray(covariance.apply(maps.T)) * R.T, axis=1)
        return np.sum(np.swapaxes(image, -1, -2) * moved, axis=(-2, -1)) + variance @ gains

    mean, style_mean = rows.content[..., None] * mu, rows.style[..., None] * nu
    content_spread, style_spread = rows.content_variance, rows.style_variance
    finetune = problem.finetune_covariance
    risks = (
        risk(mean, content_spread, finetune, -content),
        risk(style_mean, style_spread, finetune, -style),
        risk(mean, content_spread, finetune, 0.0),
        risk(style_mean, style_spread, finetune, 0.0),
        risk(mean + style_mean, content_spread + style_spread, problem.pretrain_covariance, problem.pretrain_error),
    )
    wrong = jnp.asarray(rows.wrong.mean(axis=-1))  # shares are linear in it
    return _same_shape(Outcome(checked.shares(wrong), *(jnp.asarray(risk, X.dtype) for risk in risks)))


def _rows(problem: VectorProblem, checked: _Checked, mu: np.ndarray, nu: np.ndarray) -> _Rows:
    k, styles = problem.content_rank, problem.style_dimension
    checked = _Checked(*(np.asarray(field)[..., None] for field in checked))  # type: ignore[arg-type]
    sampled = np.asarray(checked.sampling_std) ** 2
    spread = float(problem.noise_std) ** 2 + sampled
    length, style_length = np.sum(mu**2, axis=-1), np.sum(nu**2, axis=-1)

    def beyond(freedom: int) -> np.ndarray:
        return _noncentral_tail(freedom, np.asarray(checked.tolerance), spread, length)

    def learned(freedom: int) -> np.ndarray:
        """A_j."""
        return np.asarray(_mixed(checked.learned, beyond(freedom)))  # type: ignore[arg-type]

    wrong, A2, A4 = beyond(k), learned(k + 2), learned(k + 4)
    share, squared = sampled / np.where(spread > 0, spread, 1), k * spread * A2 + length * A4
    second = k * sampled + (1 - 2 * share) * squared + 2 * share * length * A2
    gold = np.asarray(_mixed(checked.gold, wrong))  # type: ignore[arg-type]
    style_second = (1 - gold) * styles * sampled + gold * (style_length + styles * float(problem.style_noise_std) ** 2)
    return _Rows(A2, gold, second - A2**2 * length, style_second - gold**2 * style_length, wrong)


def _noncentral_tail(freedom: int, tolerance: np.ndarray, spread: np.ndarray, length: np.ndarray) -> np.ndarray:
    """P(‖d‖² > tol²) for d ~ N(μ, spread·I) in `freedom` dimensions with ‖μ‖² = length; without noise d = μ."""
    scale = np.where(spread > 0, spread, 1)
    tail = scipy.stats.ncx2.sf(tolerance**2 / scale, freedom, length / scale)
    return np.where(spread > 0, tail, length > tolerance**2)
