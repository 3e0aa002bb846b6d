"""S3FT in the linear model: what training on one's own right answers does (docs, §5).

The method is that of paper 2502.08130, which has no theory; the linear form and all formulas here are ours.

A response y ∈ R^m has a content Py, P an orthogonal projector of rank k, and a style (I−P)y. The model answers
xᵀθ₁ (+ sampling noise); the judge accepts an answer whose content is within a tolerance of gold. The paraphrase of a
gold answer has its content and the model's own style.

>>> from theory import s3ft
>>> procedure = s3ft.Procedure(tolerance=1.0, paraphrase_success=[0.0, 0.5, 1.0])
>>> s3ft.coefficients(procedure, content_rank=2, residual_std=1.0).style.round(3)
Array([0.607, 0.303, 0.   ], dtype=float64)
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import Array
from jax.scipy.special import gammainc, gammaincc, gammaln, xlogy

from linfit import Filter, fine_tune
from linfit.covariance import Covariance, as_covariance
from linfit.internal import checks
from linfit.internal.checks import ArrayLike, count, non_negative, real_array, same_size

__all__ = [
    "SUPERVISED", "Expectation", "Procedure", "VectorProblem", "calibrated", "coefficients", "conditional", "distances",
    "fixed_point_coefficient", "population", "rejection_coefficient", "shares",
]  # fmt: skip

# T1, scalar responses. With r = y − xᵀθ₁ = δᵀx + ε ~ N(0, v) the trained-on residual is r·1{|r| > c}. x is Gaussian,
# so E[x | r] = Σδ r/v and
#     E[x r 1{|r| > c}] = Σδ · E[r² 1{|r| > c}]/v = Σδ · P(χ²₃ > c²/v):
# least squares on these labels ends at θ₁ + ρ(c)δ, for every Σ.


def fixed_point_coefficient(threshold: ArrayLike, residual_std: ArrayLike) -> Array:
    """ρ(c): in the population, S3FT on scalar responses ends at θ₁ + ρ(c)δ, an ensemble with τ = ρ(c) (docs, T1; ours).

        ρ(c) = 2[zφ(z) + 1 − Φ(z)],  z = c/√v,  v = δᵀΣδ + σ²

    The judge accepts |r| ≤ c, `threshold` c in [0, ∞]: ρ(0) = 1 is supervised fine-tuning, ρ(∞) = 0 the pretrained
    model. `residual_std` √v ≥ 0 is that of the pretrained residual r, in the same unit; they broadcast. For Gaussian x
    and ε. Raises ValueError for NaN or negative values, or an infinite residual_std.

    >>> from theory.s3ft import fixed_point_coefficient
    >>> fixed_point_coefficient([0.0, 1.0, 3.0, float("inf")], residual_std=1.0).round(4)
    Array([1.    , 0.8013, 0.0293, 0.    ], dtype=float64)
    """
    threshold = non_negative("threshold", threshold, finite=False)
    return _tail(3, _ratio(threshold, non_negative("residual_std", residual_std)))


def _ratio(threshold: Array, spread: Array) -> Array:
    """(threshold/spread)², 0 for a threshold of 0 and ∞ for a spread of 0 otherwise."""
    ratio = threshold / jnp.where(spread > 0, spread, 1)
    return jnp.where(threshold == 0, 0, jnp.where(spread > 0, ratio**2, jnp.inf))


def _tail(freedom: ArrayLike, squared: Array) -> Array:
    """P(χ² > squared) for a χ² variable with `freedom` degrees of freedom."""
    return gammaincc(jnp.asarray(freedom, squared.dtype) / 2, squared / 2)


# T2, content and style. Prediction ŷ = xᵀθ₁, own answer ŷ + ξ with ξ ~ N(0, s²I), gold y = ŷ + Δᵀx + ε. The judge
# looks at the miss in content, d = P(y − own): the answer is right if ‖d‖ ≤ tol. With a false-reject rate f and a
# false-accept rate a, whose draws belong to the sample (`linfit.targets.noisy`), and paraphrases that come about with
# probability q,
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

    Args:
        procedure: how targets are made; its fields broadcast with `residual_std`.
        content_rank: k ≥ 1.
        residual_std: √v ≥ 0, of the pretrained residual y − xᵀθ₁ in each content coordinate, Gaussian and independent.

    >>> from theory.s3ft import Procedure, shares
    >>> [round(float(share), 4) for share in shares(Procedure(1.0, paraphrase_success=0.5), 1, residual_std=1.0)]
    [0.6827, 0.1587, 0.1587]
    """
    checked = _check(procedure)
    return _shares(checked, _tail(count("content_rank", content_rank), _judged(checked, residual_std)))


def coefficients(procedure: Procedure, content_rank: int, residual_std: ArrayLike) -> Coefficients:
    """Where S3FT ends in the population: θ₁ + ρ_content ΔP + ρ_style Δ(I−P) (docs, T2; ours).

        ρ_content = f F_{k+2} + (1−a)(1−F_{k+2}),   ρ_style = f F_k + (1−a)(1−q(1−f))(1−F_k)

    with F_k = P(χ²_k ≤ tol²/(v+s²)); arguments as in `shares`. For Gaussian x and noise, content residuals of equal
    variance v = (ΔᵀΣΔ)_jj + σ² and uncorrelated with each other and with the style residuals. With k = 1, a perfect
    judge and no style, ρ_content is T1. (1, 1) is supervised fine-tuning.

    >>> from theory.s3ft import Procedure, coefficients
    >>> [round(float(tau), 4) for tau in coefficients(Procedure(1.0, paraphrase_success=0.5), 1, residual_std=1.0)]
    [0.8013, 0.1587]
    """
    checked, k = _check(procedure), count("content_rank", content_rank)
    squared = _judged(checked, residual_std)
    return Coefficients(_learned(checked, _tail(k + 2, squared)), _gold(checked, _tail(k, squared)))


# The shares have two degrees of freedom, and the procedure two that set them: own fixes F_k, and so the tolerance,
# paraphrase then the success q.
def calibrated(
    own: float,
    paraphrase: float,
    content_rank: int,
    residual_std: float = 1.0,
    *,
    false_accept: float = 0.0,
    false_reject: float = 0.0,
    sampling_std: float = 0.0,
) -> Procedure:
    """The procedure of the given shares: tolerance of the judge and success of paraphrases (docs, T2; ours).

        F_k = (own − a)/(1−f−a),  tol² = (v+s²)·χ²_k-quantile of F_k,  q = paraphrase/[(1−a)(1−f)(1−F_k)]

    Args:
        own, paraphrase: shares in [0, 1]; gold is the rest.
        content_rank: k ≥ 1.
        residual_std: √v > 0, the unit of the tolerance.
        false_accept, false_reject: a and f of the judge, a + f < 1.
        sampling_std: s ≥ 0.

    Numbers only, on the host. Raises ValueError for shares that no such procedure has.

    >>> from theory.s3ft import calibrated, shares
    >>> procedure = calibrated(0.495, 0.421, content_rank=1)       # GSM8K in paper 2502.08130
    >>> round(float(procedure.tolerance), 3), round(float(procedure.paraphrase_success), 3)
    (0.667, 0.834)
    >>> [round(float(share), 3) for share in shares(procedure, 1, residual_std=1.0)]
    [0.495, 0.421, 0.084]
    """
    k, std = count("content_rank", content_rank), float(checks.positive("residual_std", residual_std, ndim=0))
    given = {"own": own, "paraphrase": paraphrase, "false_accept": false_accept, "false_reject": false_reject}
    own, paraphrase, a, f = (float(checks.probability(name, value)) for name, value in given.items())
    if own + paraphrase > 1 + 1e-12:
        raise ValueError(f"own and paraphrase must add up to at most 1, got {own + paraphrase:.6g}")
    if a + f >= 1:
        raise ValueError(f"false_accept and false_reject must add up to less than 1, got {a + f:.6g}")
    right = (own - a) / (1 - f - a)
    if not 0 <= right <= 1:
        raise ValueError(f"own must lie in [{a:.6g}, {1 - f:.6g}] for this judge, got {own:.6g}")
    available = (1 - a) * (1 - f) * (1 - right)
    if paraphrase > available + 1e-12:
        raise ValueError(
            f"paraphrase must be at most {available:.6g} for this judge and own answers, got {paraphrase:.6g}"
        )
    success = min(paraphrase / available, 1.0) if available > 0 else 0.0
    sampled = float(non_negative("sampling_std", sampling_std, ndim=0))
    tolerance = float(np.hypot(std, sampled) * scipy.stats.chi2.ppf(right, k) ** 0.5)
    return Procedure(tolerance, success, a, f, sampled)


class Distances(NamedTuple):
    """Mean squared distance of answers from what the pretrained model predicts, summed over outputs."""

    own: Array
    paraphrase: Array
    gold: Array


def distances(problem: "VectorProblem", sampling_std: ArrayLike) -> Distances:
    """E‖answer − xᵀθ₁‖² of own answers, paraphrases and gold, before any judging (docs, T2; ours).

        own ms²,   paraphrase ‖ΔP‖² + kσ² + (m−k)s²,   gold ‖ΔP‖² + kσ² + ‖Δ(I−P)‖² + (m−k)σ_s²

    The model's own distribution is N(xᵀθ₁, s²I), so that an answer at distance d has the log-probability
    −d²/2s² − (m/2)·log 2πs²: paper 2502.08130 shows histograms of it (Fig 2). `sampling_std` s ≥ 0 has any shape. Own
    answers are nearest exactly where content is missed by more than own answers scatter, ‖ΔP‖² + kσ² > ks².

    >>> from theory.s3ft import VectorProblem, distances
    >>> problem = VectorProblem([1.0, 1.0], [1.0, 1.0], [[1.0, 0.0], [0.0, 2.0]], [1, 0], noise_std=0.5)
    >>> [float(distance) for distance in distances(problem, 0.5)]
    [0.5, 1.5, 5.5]
    """
    s2 = non_negative("sampling_std", sampling_std) ** 2
    k, styles, (content, style) = problem.content_rank, problem.style_dimension, problem.gaps
    sizes = [_inner(problem.finetune_covariance, gap, gap) for gap in (content, style)]
    missed = sizes[0] + k * problem.noise_std**2
    elsewhere = sizes[1] + styles * problem.style_noise_std**2
    return Distances(*jnp.broadcast_arrays((k + styles) * s2, missed + styles * s2, missed + elsewhere))


# Training on the accepted own answers alone. With the accepted share A = (1−f)F_k + a(1−F_k) and
# B = (1−f−a)(F_k − F_{k+2})/(v+s²), d given, ξ has mean −s²d/(v+s²) and x mean ΣΔd/(v+s²), hence
#     E[x ξᵀ; accepted] = s²B ΣΔP,   E[x xᵀ; accepted] = AΣ − B ΣΔPΔᵀΣ,
# and with PΔᵀΣΔP = qP the solution is s²B/(A − Bq)·ΔP. Style is sampled independently of x: its coefficient is 0.
def rejection_coefficient(procedure: Procedure, content_rank: int, signal: ArrayLike, noise_std: ArrayLike) -> Array:
    """Where training on accepted own answers alone ends in the population: θ₁ + ρΔP (docs, T2; ours).

        ρ = s²B/(A − Bq),   A = (1−f)F_k + a(1−F_k),   B = (1−f−a)(F_k − F_{k+2})/(q+σ²+s²)

    Args:
        procedure: how answers are sampled and judged; paraphrases play no part.
        content_rank: k ≥ 1.
        signal: q ≥ 0, the variance of Δᵀx in each of the k content coordinates.
        noise_std: σ ≥ 0 of the labels, in units of y.

    Without sampling (s = 0) an accepted answer is what the model says anyway: ρ = 0, nothing is learned. With it the
    accepted answers lean towards gold: ρ → s²/(s²+σ²) as the judge becomes strict.

    >>> from theory.s3ft import Procedure, rejection_coefficient
    >>> rejection_coefficient(Procedure(0.1, sampling_std=[0.0, 0.5, 2.0]), 1, 1.0, 0.5).round(3)
    Array([0.   , 0.497, 0.94 ], dtype=float64)
    """
    checked, k, signal = _check(procedure), count("content_rank", content_rank), non_negative("signal", signal)
    residual_variance, sampled = signal + non_negative("noise_std", noise_std) ** 2, checked.sampling_std**2
    half = _judged(checked, jnp.sqrt(residual_variance)) / 2
    finite = jnp.where(jnp.isfinite(half), half, 0)
    density = jnp.exp(xlogy(k / 2, finite) - finite - gammaln(k / 2 + 1))
    shallow = jnp.where(jnp.isfinite(half), density, 0)  # F_k − F_{k+2}, without the cancellation
    right = gammainc(k / 2, half)  # F_k
    fooled, missed = checked.false_accept, checked.false_reject
    accepted = (1 - missed) * right + fooled * (1 - right)
    B = (1 - missed - fooled) * shallow / _or_one(residual_variance + sampled)
    return sampled * B / _or_one(accepted - B * signal)


def _or_one(value: Array) -> Array:
    """The value, 1 where it is not positive and what it divides is 0 too."""
    return jnp.where(value > 0, value, 1)


def _check(procedure: Procedure) -> Any:
    """The procedure with arrays as fields."""
    if not isinstance(procedure, Procedure):
        raise ValueError(f"procedure must be a theory.s3ft.Procedure, got {type(procedure).__name__}")
    tolerance = non_negative("tolerance", procedure.tolerance, finite=False)
    sampling_std = non_negative("sampling_std", procedure.sampling_std)
    chances = {name: checks.probability(name, getattr(procedure, name)) for name in Procedure._fields[1:4]}
    return Procedure(tolerance=tolerance, sampling_std=sampling_std, **chances)


def _judged(checked: Any, residual_std: ArrayLike) -> Array:
    """tol²/(v+s²)."""
    return _ratio(checked.tolerance, jnp.hypot(non_negative("residual_std", residual_std), checked.sampling_std))


# The table above, averaged over answers that are wrong with a given probability.


def _learned(checked: Any, wrong: Array) -> Array:
    """P(C = 1)."""
    return checked.false_reject * (1 - wrong) + (1 - checked.false_accept) * wrong


def _gold(checked: Any, wrong: Array) -> Array:
    """P(G = 1)."""
    reworded = checked.paraphrase_success * (1 - checked.false_reject)
    return checked.false_reject * (1 - wrong) + (1 - checked.false_accept) * (1 - reworded) * wrong


def _shares(checked: Any, wrong: Array) -> Shares:
    fooled, missed = checked.false_accept, checked.false_reject
    paraphrase = (1 - fooled) * checked.paraphrase_success * (1 - missed) * wrong
    own = (1 - missed) * (1 - wrong) + fooled * wrong
    return Shares(*jnp.broadcast_arrays(own, paraphrase, _gold(checked, wrong)))


class VectorProblem(eqx.Module):
    """The two-task problem with m outputs, of which some directions are content and the rest style (docs, T2; ours).

    Gold answers are y = xᵀθ₂* + ε with Var ε = σ²P + σ_s²(I−P).

    Args:
        pretrain_covariance, finetune_covariance: Σ₁, Σ₂ as in `linfit.TwoTaskProblem`.
        shift: δ (p, m).
        content: the orthogonal projector P (m, m), or the outputs that are content as a mask (m,).
        noise_std: σ, in units of y.
        style_noise_std: σ_s, the same as σ if None.
        pretrain_error: u = θ₁ − θ₁* (p, m), zero if None.

    Risks are sums over outputs, in squared units of y. All but `content` may be traced. Raises ValueError for sizes
    that do not fit, NaN or Inf, negative σ.

    >>> from theory.s3ft import VectorProblem
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
        if not checks.is_concrete(content):
            raise ValueError("content must not be traced: its rank is a size")
        with jax.ensure_compile_time_eval():
            self.content = checks.as_projector("content", content)
            self.content_rank = round(float(jnp.trace(self.content)))
        same_size("content", self.content.shape[0], "the columns of shift", m)
        if self.content_rank < 1:
            raise ValueError("content must have rank at least 1, got 0: without content there is nothing to judge")
        self.noise_std = self.style_noise_std = non_negative("noise_std", noise_std, ndim=0)
        if style_noise_std is not None:
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


class Expectation(NamedTuple):
    """What a procedure leads to, in expectation; one shape. Squared norms are sums over outputs."""

    own: Array
    """Share of own answers among the targets."""
    paraphrase: Array
    gold: Array
    content_risk: Array
    """‖(θ̂−θ₂*)P‖²_{Σ₂}: the task."""
    style_risk: Array
    """‖(θ̂−θ₂*)(I−P)‖²_{Σ₂}: distance from the style of gold."""
    content_drift: Array
    """‖(θ̂−θ₁)P‖²_{Σ₂}."""
    style_drift: Array
    """‖(θ̂−θ₁)(I−P)‖²_{Σ₂}."""
    forgetting: Array
    """R_pre = ‖θ̂−θ₁*‖²_{Σ₁}, all outputs."""

    @property
    def shares(self) -> Shares:
        """The first three."""
        return Shares(*self[:3])


def population(problem: VectorProblem, procedure: Procedure) -> Expectation:
    """Shares and risks with unlimited data, by the two coefficients of `coefficients` (docs, T2; ours).

        content risk (1−ρ_content)²‖ΔP‖²,  style drift ρ_style²‖Δ(I−P)‖²,  R_pre = ‖u + ρ_content ΔP + ρ_style Δ(I−P)‖²

    Exact for Gaussian x if PΔᵀΣ₂ΔP = qP and PΔᵀΣ₂Δ(I−P) = 0; otherwise with the mean q over the content
    coordinates, an approximation. Fields of the procedure broadcast to the shape of the result.

    >>> from theory.s3ft import Procedure, VectorProblem, population
    >>> problem = VectorProblem([1.0, 1.0], [1.0, 1.0], [[1.0, 0.0], [0.0, 2.0]], [1, 0], noise_std=0.0)
    >>> limit = population(problem, Procedure(tolerance=[0.0, 1.0], paraphrase_success=0.0))
    >>> limit.content_risk.round(3), limit.style_drift.round(3), limit.forgetting.round(3)
    (Array([0.  , 0.04], dtype=float64), Array([4.   , 0.403], dtype=float64), Array([5.   , 1.045], dtype=float64))
    """
    k, (content, style) = problem.content_rank, problem.gaps
    content_size, style_size = (_inner(problem.finetune_covariance, gap, gap) for gap in (content, style))
    residual_std = jnp.sqrt(content_size / k + problem.noise_std**2)
    learned = coefficients(procedure, k, residual_std)
    parts = (problem.pretrain_error, content, style)
    table = jnp.array([[_inner(problem.pretrain_covariance, one, other) for other in parts] for one in parts])
    weights = jnp.stack([jnp.ones_like(learned.content), *jnp.broadcast_arrays(*learned)], axis=-1)
    return Expectation(
        *jnp.broadcast_arrays(
            *shares(procedure, k, residual_std),
            (1 - learned.content) ** 2 * content_size,
            (1 - learned.style) ** 2 * style_size,
            learned.content**2 * content_size,
            learned.style**2 * style_size,
            jnp.sum((weights @ table) * weights, axis=-1),
        )
    )


def _inner(covariance: Covariance, one: Array, other: Array) -> Array:
    """tr AᵀΣB."""
    return covariance.dot(one.T, other.T).sum()


# Conditional on the design. θ̂ = θ₁ + R t with the rows of t independent given X: d_i ~ N(μ_i, (σ²+s²)I) around
# μ_i = PΔᵀx_i, so ‖d_i‖² is noncentral χ² with λ_i = ‖μ_i‖²/(σ²+s²). For any function h of the length
#     E[h d] = μ E[h(χ'²_{k+2}(λ))],   E[h‖d‖²] = (σ²+s²)(k E[h(χ'²_{k+2}(λ))] + λ E[h(χ'²_{k+4}(λ))]).
# Write A_j for E[C] under χ'²_j(λ_i): f P(χ'²_j ≤ z²) + (1−a) P(χ'²_j > z²), z² = tol²/(σ²+s²). With
# E[ξ | d] = −b(d−μ), b = s²/(σ²+s²),
#     E t = A_{k+2} μ,   E‖t‖² = ks² + (1−2b)E[C‖d‖²] + 2b‖μ‖²A_{k+2}.
# The style noise is independent of the content noise, so with ν_i = (I−P)Δᵀx_i and E[G] under χ'²_k(λ_i)
#     E t' = ν E[G],   E‖t'‖² = (1 − E[G])(m−k)s² + E[G](‖ν‖² + (m−k)σ_s²).
# Squared norms of R t need R E t and, because the rows are independent, only the total variance of each.


def conditional(X: ArrayLike, problem: VectorProblem, procedure: Procedure, filter: Filter) -> Expectation:
    """Shares and risks on a given design, exact for every n and p (docs, T2; ours).

    Averaged over label noise, sampling of answers, judge and paraphrases.

    Args:
        X: the design (n, p), fixed.
        problem: its shift is fixed too.
        procedure: how targets are made; its fields broadcast to the shape of the result.
        filter: one spectral filter, no hyperparameter axes; ValueError otherwise.

    >>> from linfit import MinNorm
    >>> from theory.s3ft import Procedure, VectorProblem, conditional
    >>> problem = VectorProblem([1.0, 1.0], [1.0, 1.0], [[1.0, 0.0], [0.0, 2.0]], [1, 0], noise_std=0.1)
    >>> expected = conditional([[1.0, 1.0]], problem, Procedure([0.0, 0.9, float("inf")]), MinNorm())
    >>> expected.content_risk.round(3), expected.own.round(3)
    (Array([0.505, 0.582, 1.   ], dtype=float64), Array([0.   , 0.159, 1.   ], dtype=float64))
    """
    X = real_array("X", X, ndim=2)
    n = X.shape[0]
    same_size("X", X.shape[1], "the problem's p", problem.shift.shape[0])
    maps = fine_tune(X, jnp.eye(n, dtype=X.dtype), jnp.zeros((X.shape[1], n), X.dtype), filter)
    if maps.ndim != 2:
        raise ValueError(f"filter must be a single filter, got hyperparameters of shape {maps.shape[:-2]}")
    content, style = problem.gaps
    mu, nu = np.asarray(X @ content), np.asarray(X @ style)
    checked = _check(procedure)
    learned, gold, content_spread, style_spread, wrong = _rows(problem, checked, mu, nu)
    mean, style_mean = learned[..., None] * mu, gold[..., None] * nu

    def risk(mean: np.ndarray, variance: np.ndarray, covariance: Covariance, start: ArrayLike) -> Array:
        """E‖R t + start‖²_Σ: the squared norm of the mean, and what each row adds."""
        moved = np.swapaxes(np.asarray(maps) @ mean + np.asarray(start), -1, -2)
        squared = covariance.squared_norm(jnp.asarray(moved)).sum(axis=-1)
        return jnp.asarray(squared + variance @ np.asarray(covariance.squared_norm(maps.T)), X.dtype)

    finetune, pretrain = problem.finetune_covariance, problem.pretrain_covariance
    return Expectation(
        *jnp.broadcast_arrays(
            *_shares(checked, jnp.asarray(wrong.mean(axis=-1))),  # linear in it
            risk(mean, content_spread, finetune, -content),
            risk(style_mean, style_spread, finetune, -style),
            risk(mean, content_spread, finetune, 0.0),
            risk(style_mean, style_spread, finetune, 0.0),
            risk(mean + style_mean, content_spread + style_spread, pretrain, problem.pretrain_error),
        )
    )


def _rows(problem: VectorProblem, checked: Any, mu: np.ndarray, nu: np.ndarray) -> tuple[np.ndarray, ...]:
    """A_{k+2}, E[G], E‖t−Et‖², E‖t'−Et'‖² and the probability of a wrong own answer, per sample (…, n), by SciPy."""
    k, styles = problem.content_rank, problem.style_dimension
    checked = Procedure(*(np.asarray(field)[..., None] for field in checked))
    sampled = checked.sampling_std**2
    spread = float(problem.noise_std) ** 2 + sampled
    length, style_length = np.sum(mu**2, axis=-1), np.sum(nu**2, axis=-1)

    def beyond(freedom: int) -> Any:
        """P(‖d‖² > tol²) in `freedom` dimensions; without noise d = μ."""
        squared = checked.tolerance**2
        scale = np.where(spread > 0, spread, 1)
        tail = scipy.stats.ncx2.sf(squared / scale, freedom, length / scale)
        return np.where(spread > 0, tail, length > squared)

    wrong, A2, A4 = beyond(k), *(np.asarray(_learned(checked, beyond(k + more))) for more in (2, 4))
    share, squared = sampled / np.where(spread > 0, spread, 1), k * spread * A2 + length * A4
    second = k * sampled + (1 - 2 * share) * squared + 2 * share * length * A2
    gold = np.asarray(_gold(checked, wrong))
    style_second = (1 - gold) * styles * sampled + gold * (style_length + styles * float(problem.style_noise_std) ** 2)
    return A2, gold, second - A2**2 * length, style_second - gold**2 * style_length, wrong
