"""§5 as claims: where training on one's own right answers ends, and what it leaves alone (docs, T1, T2)."""

from typing import Any, NamedTuple

import numpy as np
import scipy.integrate
import scipy.stats

from linfit import FixedShift, MinNorm, Pair, Ridge, RiskForm, TwoTaskProblem, risk_forms, s3ft_targets
from linfit.targets import Source, content_within, within
from sims.claims import Normal, Sides, existence, identity, inequality, statistical
from sims.claims.problems import matrix_of, parabola, ridge_map, skewed
from sims.parameters import ALIGNMENT, DECAY, NOISE_STD, PENALTY, Parameter
from theory import s3ft
from theory.s3ft import Procedure, VectorProblem

REPLICATES, SCALAR_REPLICATES = 1 << 12, 1 << 15
OUTPUTS, FEATURES = 5, 6
TOLERANCES = np.linspace(0, 5, 41)
"""In units of √v."""

JUDGED = {
    "rank": Parameter(low=1, high=3, scale="whole"),
    "tolerance": Parameter(low=0.7, high=2.2, lowest=0.1, highest=3.0),
    "success": Parameter(low=0.2, high=1.0),
    "false_accept": Parameter(low=0.05, high=0.3),
    "false_reject": Parameter(low=0.05, high=0.3),
    "sampling_std": Parameter(low=0.0, high=1.0),
    "noise_std": NOISE_STD.within(0.1**0.5, 3.0**0.5),
}
LIMIT = JUDGED | {
    "decay": DECAY.within(0.0, 1.5),
    "style_signal": Parameter(low=0.3, high=3.0, scale="log"),
    "anisotropy": Parameter(highest=1.5),
}
SAMPLED = LIMIT | {"heavy_tails": Parameter(highest=0.8), "entangled": Parameter(highest=2.0)}
DESIGN = JUDGED | {
    "decay": DECAY.within(0.0, 1.5),
    "pretrain_size": Parameter(low=0.0, high=1.0),
    "penalty": PENALTY.within(1e-2, 10.0),
    "noise_correlation": Parameter(highest=0.9),
}
ONE_OUTPUT = {"decay": DECAY.within(0.0, 2.0), "alignment": ALIGNMENT.within(-1.0, 1.0)}


@identity(
    "T1",
    "The coefficient ρ(c) is the share of residual variance beyond the threshold.",
    R"\rho(c) = 2[z\varphi(z) + 1 - \Phi(z)] = \mathbb{E}\,r^2 1\{|r|>c\}/v,\ z = c/\sqrt v",
    parameters={"threshold": Parameter(low=0.0, high=4.0), "residual_std": Parameter(low=0.1, high=10.0, scale="log")},
    tolerance=1e-9,
)
def t1(normal: Normal, threshold: float, residual_std: float) -> Sides:
    """`threshold` in units of √v."""
    c, density = threshold * residual_std, scipy.stats.norm(scale=residual_std).pdf
    inside, _ = scipy.integrate.quad(lambda r: r**2 * density(r), 0, c, epsabs=1e-14, epsrel=1e-13)
    return float(s3ft.fixed_point_coefficient(c, residual_std)), 1 - 2 * inside / residual_std**2


@statistical(
    "T1.sampled",
    "S3FT on scalar responses ends at θ₁ + ρ(c)δ, an ensemble, whatever Σ.",
    R"\Sigma^{-1}\,\mathbb{E}\,x\,r\,1\{|r|>c\} = \rho(c)\,\delta",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "noise_std": NOISE_STD.within(0.05**0.5, 5.0**0.5),
        "threshold": Parameter(low=0.3, high=2.0),
        "heavy_tails": Parameter(highest=0.8),
        "skewness": Parameter(highest=1.0),
    },
)
def t1_sampled(
    normal: Normal, decay: float, noise_std: float, threshold: float, heavy_tails: float, skewness: float
) -> Sides:
    """Least squares ends at the mean of Σ⁻¹x·target; θ₁ = 0.

    `threshold` in units of √v. Heavy tails: x has a random length; skewness: the noise is a shifted square.
    """
    spectrum = (1.0 + np.arange(4)) ** -decay
    delta = normal(4)
    delta = delta / np.sqrt(np.sum(spectrum * delta**2))
    length = np.exp(heavy_tails * normal(SCALAR_REPLICATES) - heavy_tails**2)
    x = length[:, None] * normal(SCALAR_REPLICATES, 4) * np.sqrt(spectrum)
    y, std = x @ delta + noise_std * skewed(normal, skewness, SCALAR_REPLICATES), (1 + noise_std**2) ** 0.5
    targets = np.asarray(s3ft_targets(np.zeros_like(y), y, np.abs(y) <= threshold * std).values)
    return float(s3ft.fixed_point_coefficient(threshold * std, std)) * delta, x / spectrum * targets[:, None]


def _judged(
    problem: VectorProblem, procedure: Procedure, gold: np.ndarray, own: np.ndarray, chances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Targets (N, m) and sources (N,) for uniform `chances` (3, N), the judge's verdict put down as a mask; θ₁ = 0."""
    rates = (procedure.false_accept, procedure.false_reject, procedure.paraphrase_success)
    fools, misses, succeeds = (chance < rate for chance, rate in zip(chances, rates, strict=True))
    P = np.asarray(problem.content)
    right = np.linalg.norm((gold - own) @ P, axis=1) <= float(procedure.tolerance)  # type: ignore[arg-type]
    accepted = np.where(right, ~misses, fools)
    paraphrase = np.where((succeeds & ~misses)[:, None], gold @ P + own - own @ P, np.nan)
    values, source = s3ft_targets(own, gold, accepted, paraphrase)
    return np.asarray(values), np.asarray(source)


def _procedure(noise_std: float, tolerance: float, success: float, **judge: float) -> Procedure:
    """`tolerance` in units of √v, v = 1 + σ²."""
    return Procedure(tolerance * (1 + noise_std**2) ** 0.5, success, **judge)


def _limit(
    normal: Normal,
    rank: int,
    noise_std: float,
    decay: float = 0.0,
    style_signal: float = 1.0,
    anisotropy: float = 0.0,
    entangled: float = 0.0,
    **judged: float,
) -> tuple[VectorProblem, Procedure]:
    """Content in a random subspace; PΔᵀΣΔP = P and no correlation with style, unless `anisotropy`, `entangled`."""
    spectrum = (1.0 + np.arange(FEATURES)) ** -decay
    basis = np.linalg.qr(normal(OUTPUTS, OUTPUTS))[0]
    P = basis[:, :rank] @ basis[:, :rank].T
    directions = np.linalg.qr(normal(FEATURES, OUTPUTS))[0]
    signal = np.full(OUTPUTS, style_signal)
    signal[:rank] = np.exp(anisotropy * np.linspace(-1, 1, rank)) if rank > 1 else 1.0
    coupling = np.eye(OUTPUTS)
    coupling[0, rank] = entangled
    shift = spectrum[:, None] ** -0.5 * (directions * signal) @ coupling @ basis.T
    return VectorProblem(spectrum, spectrum, shift, P, noise_std), _procedure(noise_std, **judged)


def _sampled(
    normal: Normal, heavy_tails: float = 0.0, **values: Any
) -> tuple[VectorProblem, Procedure, np.ndarray, np.ndarray, np.ndarray]:
    """A problem, a procedure, and x (N, p), targets (N, m) and sources (N,) from the population."""
    problem, procedure = _limit(normal, **values)
    length = np.exp(heavy_tails * normal(REPLICATES) - heavy_tails**2)
    x = length[:, None] * normal(REPLICATES, FEATURES) * np.asarray(problem.finetune_covariance.diagonal()) ** 0.5
    gold = x @ np.asarray(problem.shift) + values["noise_std"] * normal(REPLICATES, OUTPUTS)
    chances = scipy.stats.norm.cdf(normal(3, REPLICATES))
    own = values["sampling_std"] * normal(REPLICATES, OUTPUTS)
    return problem, procedure, x, *_judged(problem, procedure, gold, own, chances)


class _Judged(NamedTuple):
    """E C, E[C d₁], E[C‖d‖²], E G for a miss d ~ N(length·e₁, variance·I); C: target has gold content, G: is gold."""

    learned: float
    along: float
    squared: float
    gold: float


def _by_quadrature(procedure: Procedure, rank: int, length: float, variance: float) -> _Judged:
    """By Gauss's rule over d₁ = tol·sin φ; beside it ‖d‖² − d₁² is χ² with one degree less."""
    nodes, masses = np.polynomial.legendre.leggauss(120)
    tolerance = float(procedure.tolerance)  # type: ignore[arg-type]
    d = tolerance * np.sin(np.pi / 2 * nodes)
    density = (
        masses * np.pi / 2 * tolerance * np.cos(np.pi / 2 * nodes) * scipy.stats.norm.pdf(d, length, variance**0.5)
    )
    left = np.maximum(tolerance**2 - d**2, 0) / variance
    below = scipy.stats.chi2.cdf(left, rank - 1) if rank > 1 else np.ones(len(d))
    beside = variance * (rank - 1) * scipy.stats.chi2.cdf(left, rank + 1)  # E[χ²; χ² ≤ c], k − 1 degrees
    right = density @ below, density @ (below * d), density @ (below * d**2 + beside)
    every = 1.0, length, length**2 + rank * variance
    misses, fools = float(procedure.false_reject), float(procedure.false_accept)  # type: ignore[arg-type]
    one, along, squared = (misses * r + (1 - fools) * (e - r) for r, e in zip(right, every, strict=True))
    reworded = float(procedure.paraphrase_success) * (1 - misses)  # type: ignore[arg-type]
    return _Judged(one, along, squared, misses * right[0] + (1 - fools) * (1 - reworded) * (1 - right[0]))


def _population(procedure: Procedure, rank: int, noise_std: float) -> tuple[_Judged, float]:
    """The above with unlimited data, q = 1; the variance of d."""
    variance = 1 + noise_std**2 + float(procedure.sampling_std) ** 2  # type: ignore[arg-type]
    return _by_quadrature(procedure, rank, 0.0, variance), variance


def _shares(judged: _Judged) -> list[float]:
    return [1 - judged.learned, judged.learned - judged.gold, judged.gold]


@identity(
    "T2.exact",
    "Shares and coefficients are the integrals over the miss in content that they stand for.",
    R"\rho_\mathrm{content} = \mathbb{E}[C\|d\|^2]/k(v+s^2),\quad \rho_\mathrm{style} = \mathbb{E}\,G",
    parameters=JUDGED | {"sampling_std": Parameter(low=0.05, high=1.0)},
    tolerance=1e-8,
)
def t2_exact(normal: Normal, rank: int, noise_std: float, **values: float) -> Sides:
    """Shares, both coefficients, and that of accepted own answers alone: E[x ξ] over E[x xᵀ] where accepted."""
    procedure, std = _procedure(noise_std, **values), (1 + noise_std**2) ** 0.5
    judged, variance = _population(procedure, rank, noise_std)
    # xᵀΔ and ξ given d in one content coordinate are Gaussian, of which the accepted have these first two moments
    accepted, squared = 1 - judged.learned, variance - judged.squared / rank
    slopes, prior = np.array([1, -(values["sampling_std"] ** 2)]) / variance, np.diag([1, values["sampling_std"] ** 2])
    joint = accepted * (prior - variance * np.outer(slopes, slopes)) + squared * np.outer(slopes, slopes)
    rejection = s3ft.rejection_coefficient(procedure, rank, 1.0, noise_std)
    predicted = [*s3ft.shares(procedure, rank, std), *s3ft.coefficients(procedure, rank, std), rejection]
    measured = [*_shares(judged), judged.squared / (rank * variance), judged.gold, joint[0, 1] / joint[0, 0]]
    return np.array(predicted) / measured, np.ones(6)


@identity(
    "T2.judge",
    "Judges accept what is within their tolerance; targets are own answers, else paraphrases, else gold.",
    R"\|P(\hat y - y)\| \le \mathrm{tol}",
    source="paper 2502.08130 (the order); ours (judges)",
    parameters={"rank": JUDGED["rank"], "tolerance": Parameter(low=0.5, high=3.0)},
    tolerance=1e-12,
)
def t2_judge(normal: Normal, rank: int, tolerance: float) -> Sides:
    """Verdicts of both judges, targets and their shares, by numpy; every third paraphrase is missing."""
    own, gold, basis = normal(60, OUTPUTS), normal(60, OUTPUTS), np.linalg.qr(normal(OUTPUTS, OUTPUTS))[0]
    P = basis[:, :rank] @ basis[:, :rank].T
    paraphrase = np.where(np.arange(60)[:, None] % 3 == 0, np.nan, gold + 0.5 * normal(60, OUTPUTS))
    judge = content_within(P, tolerance)
    made = s3ft_targets(own, gold, judge, paraphrase)
    predicted = [within(tolerance)(own, gold), judge(own, gold), *np.asarray(made.values).T, *made.shares().values()]
    right = np.sqrt(np.sum(((own - gold) @ P) ** 2, axis=1)) <= tolerance
    reworded = ~right & (np.sqrt(np.sum(((paraphrase - gold) @ P) ** 2, axis=1)) <= tolerance)
    values = np.where(right[:, None], own, np.where(reworded[:, None], paraphrase, gold))
    shares = right.mean(), reworded.mean(), 1 - right.mean() - reworded.mean()
    measured = [np.sqrt(np.sum((own - gold) ** 2, axis=1)) <= tolerance, right, *values.T, *shares]
    first, second = (np.concatenate([np.ravel(np.asarray(x, float)) for x in side]) for side in (predicted, measured))
    return first, second


@statistical(
    "T2.shares",
    "Shares of own, paraphrased and gold targets follow from a χ² with as many degrees as content.",
    R"\mathrm{own} = (1-f)F_k + a(1-F_k),\ \mathrm{paraphrase} = (1-a)q(1-f)(1-F_k)",
    parameters=SAMPLED,
)
def t2_shares(normal: Normal, **values: Any) -> Sides:
    problem, procedure, _, _, source = _sampled(normal, **values)
    expected = s3ft.shares(procedure, problem.content_rank, (1 + values["noise_std"] ** 2) ** 0.5)
    return np.array(expected), source[:, None] == np.array(list(Source))


@statistical(
    "T2.drift",
    "S3FT on vector responses is an ensemble with one coefficient for content and one for style.",
    R"\hat\theta = \theta_1 + \rho_\mathrm{content}\,\Delta P + \rho_\mathrm{style}\,\Delta(I-P)",
    parameters=SAMPLED,
)
def t2_drift(normal: Normal, **values: Any) -> Sides:
    """Least squares ends at the mean of Σ⁻¹x·targetᵀ."""
    problem, procedure, x, targets, _ = _sampled(normal, **values)
    learned = s3ft.coefficients(procedure, problem.content_rank, (1 + values["noise_std"] ** 2) ** 0.5)
    content, style = problem.gaps
    solved = x / np.asarray(problem.finetune_covariance.diagonal())
    return np.asarray(learned.content * content + learned.style * style), solved[:, :, None] * targets[:, None, :]


def _risks(problem: VectorProblem, content: float, style: float) -> np.ndarray:
    """The five risks of θ₁ + content·ΔP + style·Δ(I−P), by matrices."""
    P, delta, u = (np.asarray(part) for part in (problem.content, problem.shift, problem.pretrain_error))
    gap, finetune, pretrain = delta - u, *map(matrix_of, (problem.finetune_covariance, problem.pretrain_covariance))
    moved = content * gap @ P + style * (gap - gap @ P)
    missed = moved - gap
    parts = [(part, finetune) for both in (missed, moved) for part in (both @ P, both - both @ P)]
    return np.array([np.sum(part * (covariance @ part)) for part, covariance in [*parts, (moved + u, pretrain)]])


def _with_pretraining(normal: Normal, pretrain_size: float, **values: Any) -> tuple[VectorProblem, Procedure]:
    """Σ₁ dense; what is known of content stays, own style is off."""
    limit, procedure = _limit(normal, **values)
    pretrain = normal(FEATURES, FEATURES) / FEATURES**0.5
    error = pretrain_size * normal(FEATURES, OUTPUTS)
    error = error - error @ np.asarray(limit.content)
    covariances = pretrain @ pretrain.T, limit.finetune_covariance
    return VectorProblem(*covariances, limit.shift, limit.content, limit.noise_std, pretrain_error=error), procedure


@identity(
    "T2.population",
    "Five risks with unlimited data follow from the two coefficients.",
    R"R = \|\theta_1+\rho_\mathrm{content}\Delta P+\rho_\mathrm{style}\Delta(I-P)-\theta^*\|^2_\Sigma",
    parameters=LIMIT | {"pretrain_size": Parameter(low=0.0, high=1.0)},
    tolerance=1e-8,
)
def t2_population(normal: Normal, **values: Any) -> Sides:
    """Shares, then risks by matrices, with coefficients by quadrature."""
    problem, procedure = _with_pretraining(normal, **values)
    judged, variance = _population(procedure, problem.content_rank, float(problem.noise_std))
    measured = [*_shares(judged), *_risks(problem, judged.squared / variance / problem.content_rank, judged.gold)]
    return np.array([float(part) for part in s3ft.population(problem, procedure)]) / measured, np.ones(8)


@inequality(
    "T2.style",
    "With paraphrases that always succeed and a judge that knows what is right, style stays.",
    R"q = 1,\ f = 0 \implies \rho_\mathrm{style} = 0",
    parameters=LIMIT
    | {
        "success": Parameter(low=1.0, high=1.0, lowest=0.0),
        "false_reject": Parameter(highest=0.5),
        "false_accept": Parameter(low=0.0, high=0.5, highest=1.0),
    },
)
def t2_style(normal: Normal, **values: Any) -> Sides:
    """The coefficient; and how much targets of samples differ from own answers in style, at most."""
    problem, procedure = _limit(normal, **values)
    gold, own = normal(REPLICATES, OUTPUTS), values["sampling_std"] * normal(REPLICATES, OUTPUTS)
    targets, _ = _judged(problem, procedure, gold, own, scipy.stats.norm.cdf(normal(3, REPLICATES)))
    changed = (targets - own) @ (np.eye(OUTPUTS) - np.asarray(problem.content))
    learned = s3ft.coefficients(procedure, problem.content_rank, (1 + values["noise_std"] ** 2) ** 0.5)
    return np.array([float(learned.style), np.abs(changed).max()]), 1e-12


@inequality(
    "T2.less",
    "With unlimited data S3FT forgets less than supervised fine-tuning.",
    R"u = 0 \implies R_\mathrm{pre}(\mathrm{S3FT}) < R_\mathrm{pre}(\mathrm{SFT})",
    parameters=LIMIT
    | {
        "tolerance": Parameter(low=0.01, high=5.0, scale="log"),
        "false_accept": Parameter(low=0.0, high=1.0),
        "false_reject": Parameter(low=0.0, high=0.95),
        "pretrain_size": Parameter(highest=3.0),
    },
)
def t2_less(normal: Normal, **values: Any) -> Sides:
    """Relative forgetting, by the library and by quadrature and matrices."""
    problem, procedure = _with_pretraining(normal, **values)
    ours, supervised = (float(s3ft.population(problem, one).forgetting) for one in (procedure, s3ft.SUPERVISED))
    judged, variance = _population(procedure, problem.content_rank, float(problem.noise_std))
    forgets = _risks(problem, judged.squared / variance / problem.content_rank, judged.gold)[-1]
    return np.array([ours / supervised, forgets / _risks(problem, 1.0, 1.0)[-1]]), 1.0


@statistical(
    "T2.rejection",
    "Training on accepted own answers alone moves content towards gold by the sampling noise only.",
    R"\hat\theta = \theta_1 + \frac{s^2B}{A - Bq}\,\Delta P",
    parameters=SAMPLED,
)
def t2_rejection(normal: Normal, **values: Any) -> Sides:
    """The normal equations at the predicted weights: x·(own − xᵀθ)ᵀ over the accepted own answers has mean 0."""
    problem, procedure, x, targets, source = _sampled(normal, **values)
    rho = s3ft.rejection_coefficient(procedure, problem.content_rank, 1.0, float(problem.noise_std))
    residual = targets - x @ np.asarray(rho * problem.gaps[0])
    own = (source == Source.OWN).astype(float)
    return np.zeros(problem.shift.shape), own[:, None, None] * x[:, :, None] * residual[:, None, :]


@statistical(
    "T2.design",
    "Shares and risks of S3FT on a given design are exact, whatever n, p, Σ₁, Σ₂, P and the judge.",
    R"\mathbb{E}\,t_i = A_{k+2}(\lambda_i)\,\mu_i,\quad \lambda_i = \|\mu_i\|^2/(\sigma^2+s^2)",
    parameters=DESIGN,
)
def t2_design(normal: Normal, noise_std: float, penalty: float, noise_correlation: float, **values: Any) -> Sides:
    """Shares of own and gold answers, then the five risks, of ridge on one design; all else is sampled."""
    X, problem, procedure = _design(normal, noise_std=noise_std, **values)
    expected = s3ft.conditional(X, problem, procedure, Ridge(penalty))
    count, n = REPLICATES // 2, len(X)
    P, goal, start = (np.asarray(part) for part in (problem.content, problem.shift, problem.pretrain_error))
    common, fresh = normal(count, 1, OUTPUTS), normal(count, n, OUTPUTS)
    noise = noise_correlation**0.5 * common + (1 - noise_correlation) ** 0.5 * fresh
    gold = X @ goal + noise_std * noise @ P + float(problem.style_noise_std) * (noise - noise @ P)
    own = X @ start + values["sampling_std"] * normal(count, n, OUTPUTS)
    flat, chances = (count * n, OUTPUTS), scipy.stats.norm.cdf(normal(3, count * n))
    targets, source = _judged(problem, procedure, gold.reshape(flat), own.reshape(flat), chances)
    source = source.reshape(count, n)
    moved = ridge_map(X, penalty) @ (targets.reshape(own.shape) - X @ start)
    missed = moved + start - goal

    finetune, pretrain = map(matrix_of, (problem.finetune_covariance, problem.pretrain_covariance))
    parts = [(part, finetune) for error in (missed, moved) for part in (error @ P, error - error @ P)]
    measured = [(source == kind).mean(axis=1) for kind in (Source.OWN, Source.GOLD)]
    for part, covariance in [*parts, (moved + start, pretrain)]:
        measured.append(np.sum(part * (covariance @ part), axis=(1, 2)))
    return np.array([expected.own, expected.gold, *expected[3:]]), np.stack(measured, axis=1)


def _design(
    normal: Normal, rank: int, noise_std: float, decay: float, pretrain_size: float, **judged: float
) -> tuple[np.ndarray, VectorProblem, Procedure]:
    """Five samples of eight features; Σ₁ is turned, content in a random subspace, style has less noise."""
    n, p = 5, 8
    spectrum, turn = (1.0 + np.arange(p)) ** -decay, np.linalg.qr(normal(p, p))[0]
    basis = np.linalg.qr(normal(OUTPUTS, OUTPUTS))[0]
    P = basis[:, :rank] @ basis[:, :rank].T
    X = normal(n, p) * np.sqrt(spectrum)
    goal, start = normal(p, OUTPUTS) / p**0.5, pretrain_size * normal(p, OUTPUTS) / p**0.5
    covariances = turn * spectrum @ turn.T, np.diag(spectrum)
    return X, VectorProblem(*covariances, goal, P, noise_std, 0.7 * noise_std, start), _procedure(noise_std, **judged)


@identity(
    "T2.design.exact",
    "On a given design shares and risks are the integrals over each sample's miss in content.",
    R"\mathbb{E}\|Rt+\theta\|^2 = \|R\,\mathbb{E}t+\theta\|^2 + \textstyle\sum_i \mathrm{Var}(t_i)\|R_i\|^2",
    parameters={name: DESIGN[name] for name in DESIGN if name != "noise_correlation"},
    tolerance=1e-7,
)
def t2_design_exact(normal: Normal, penalty: float, **values: Any) -> Sides:
    """Mean and variance of each sample's target by quadrature; the rest by matrices."""
    X, problem, procedure = _design(normal, **values)
    P, delta, u = (np.asarray(part) for part in (problem.content, problem.shift, problem.pretrain_error))
    gap, sampled, k = delta - u, values["sampling_std"] ** 2, problem.content_rank
    R, variance, style = ridge_map(X, penalty), values["noise_std"] ** 2 + sampled, OUTPUTS - k
    judged, content, mean, spread = [], X @ gap @ P, np.zeros((2, len(X), OUTPUTS)), np.zeros((2, len(X)))
    for i, (mu, nu) in enumerate(zip(content, X @ gap - content, strict=True)):
        length = float(np.linalg.norm(mu))
        at = _by_quadrature(procedure, k, length, variance)
        mean[:, i] = at.along * mu / length, at.gold * nu
        pull = -2 * sampled / variance * (at.squared - length * at.along)  # 2 E[C d·ξ], ξ = own answer − prediction
        spread[0, i] = k * sampled + pull + at.squared - at.along**2
        fresh = at.gold * (nu @ nu + style * float(problem.style_noise_std) ** 2)
        spread[1, i] = (1 - at.gold) * style * sampled + fresh - at.gold**2 * nu @ nu
        judged.append(_shares(at))

    def risk(both: list[int], start: np.ndarray, covariance: np.ndarray) -> float:
        moved = R @ mean[both].sum(axis=0) + start
        return np.sum(moved * (covariance @ moved)) + spread[both].sum(axis=0) @ np.diag(R.T @ covariance @ R)

    finetune, pretrain = map(matrix_of, (problem.finetune_covariance, problem.pretrain_covariance))
    starts = -gap @ P, gap @ P - gap
    risks = [risk([at], start * missed, finetune) for missed in (1, 0) for at, start in enumerate(starts)]
    measured = np.array([*np.mean(judged, axis=0), *risks, risk([0, 1], u, pretrain)])
    found = s3ft.conditional(X, problem, procedure, Ridge(penalty))
    return np.array([float(part) for part in found]) / measured, np.ones(8)


def _one_output(
    normal: Normal, decay: float, alignment: float, noise_std: float
) -> tuple[s3ft.Expectation, Pair[RiskForm]]:
    """Min-norm on a design with n < p and one output: S3FT without paraphrases at each tolerance, and SFT."""
    n, p = 20, 60
    spectrum = (1.0 + np.arange(p)) ** -decay
    delta = normal(p) * spectrum ** (alignment / 2)
    delta = delta / np.sqrt(np.sum(spectrum * delta**2))
    X = normal(n, p) * spectrum**0.5
    problem = VectorProblem(spectrum, spectrum, delta[:, None], [1.0], noise_std)
    procedure = Procedure(TOLERANCES * (1 + noise_std**2) ** 0.5, paraphrase_success=0.0)
    supervised = risk_forms(X, TwoTaskProblem(spectrum, spectrum, FixedShift(delta), noise_std))
    return s3ft.conditional(X, problem, procedure, MinNorm()), supervised


@inequality(
    "T2.averaging",
    "With noisy labels and n < p, averaging SFT at its best τ beats S3FT at its best tolerance, over several designs.",
    R"\sigma^2 \geq \tfrac{1}{5}\delta^\top\Sigma\delta \implies \min_\tau \bar R \leq \min_c \bar R",
    parameters=ONE_OUTPUT | {"noise_std": NOISE_STD.within(0.2**0.5, 10.0**0.5, lowest=1e-2)},
    tolerance=1e-9,
)
def t2_averaging(normal: Normal, **values: Any) -> Sides:
    """How much worse on the task S3FT at its best tolerance is, relative; risks are means over eight designs."""
    designs = [_one_output(normal, **values) for _ in range(8)]
    selective = sum(ours.content_risk for ours, _ in designs)
    c, b, a = parabola(lambda tau: sum(float(sft.finetune(MinNorm(), tau).total) for _, sft in designs))
    return 0.0, float(np.min(selective) / (c - b**2 / a) - 1)


@existence(
    "T2.more",
    "With few samples and little noise S3FT can forget more than SFT: mixed targets are rough.",
    R"n < p:\ \max_c R_\mathrm{pre}(c) > 1.01\,R_\mathrm{pre}(\mathrm{SFT})",
    parameters=ONE_OUTPUT | {"noise_std": NOISE_STD.within(1e-3**0.5, 0.1**0.5, highest=10.0**0.5)},
)
def t2_more(normal: Normal, **values: Any) -> Sides:
    """The largest R_pre over the tolerances, relative to that of SFT; at the strictest, S3FT is SFT."""
    selective, supervised = _one_output(normal, **values)
    return 0.01, float(selective.forgetting.max() / supervised.pretrain(MinNorm()).total - 1)
