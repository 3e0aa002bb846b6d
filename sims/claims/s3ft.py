"""§5 as claims: where training on one's own right answers ends, and what it leaves alone (docs, T1, T2)."""

from typing import Any

import numpy as np
import scipy.integrate
import scipy.stats

from linfit import FixedShift, MinNorm, Pair, Ridge, RiskForm, TwoTaskProblem, risk_forms, s3ft_targets
from linfit.targets import Source
from sims.claims import Normal, Sides, existence, identity, inequality, statistical
from sims.claims.problems import skewed
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


def _sampled(
    normal: Normal,
    rank: int,
    noise_std: float,
    decay: float = 0.0,
    style_signal: float = 1.0,
    anisotropy: float = 0.0,
    entangled: float = 0.0,
    heavy_tails: float = 0.0,
    **judged: float,
) -> tuple[VectorProblem, Procedure, np.ndarray, np.ndarray, np.ndarray]:
    """A problem, a procedure, and x (N, p), targets (N, m) and sources (N,) from the population.

    Content is in a random subspace; PΔᵀΣΔP = P and no correlation with style, unless `anisotropy`, `entangled`.
    """
    spectrum = (1.0 + np.arange(FEATURES)) ** -decay
    basis = np.linalg.qr(normal(OUTPUTS, OUTPUTS))[0]
    P = basis[:, :rank] @ basis[:, :rank].T
    directions = np.linalg.qr(normal(FEATURES, OUTPUTS))[0]
    signal = np.full(OUTPUTS, style_signal)
    signal[:rank] = np.exp(anisotropy * np.linspace(-1, 1, rank)) if rank > 1 else 1.0
    coupling = np.eye(OUTPUTS)
    coupling[0, rank] = entangled
    shift = spectrum[:, None] ** -0.5 * (directions * signal) @ coupling @ basis.T
    problem = VectorProblem(spectrum, spectrum, shift, P, noise_std)
    length = np.exp(heavy_tails * normal(REPLICATES) - heavy_tails**2)
    x = length[:, None] * normal(REPLICATES, FEATURES) * spectrum**0.5
    gold = x @ shift + noise_std * normal(REPLICATES, OUTPUTS)
    chances = scipy.stats.norm.cdf(normal(3, REPLICATES))
    procedure = _procedure(noise_std, **judged)
    own = judged["sampling_std"] * normal(REPLICATES, OUTPUTS)
    return problem, procedure, x, *_judged(problem, procedure, gold, own, chances)


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


def _relative(quantity: str, normal: Normal, pretrain_size: float = 0.0, **values: Any) -> float:
    """A quantity of S3FT with unlimited data relative to that of supervised fine-tuning; Σ₁ dense."""
    limit, procedure, *_ = _sampled(normal, **values)
    pretrain = normal(FEATURES, FEATURES) / FEATURES**0.5
    error = pretrain_size * normal(FEATURES, OUTPUTS)
    error = error - error @ np.asarray(limit.content)  # what is known of content stays; own style is off
    covariances = pretrain @ pretrain.T, limit.finetune_covariance
    problem = VectorProblem(*covariances, limit.shift, limit.content, limit.noise_std, pretrain_error=error)
    ours, supervised = (getattr(s3ft.population(problem, one), quantity) for one in (procedure, s3ft.SUPERVISED))
    return float(ours / supervised)


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
    return _relative("style_drift", normal, **values), 1e-12


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
    return _relative("forgetting", normal, **values), 1.0


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
    parameters=JUDGED
    | {
        "decay": DECAY.within(0.0, 1.5),
        "pretrain_size": Parameter(low=0.0, high=1.0),
        "penalty": PENALTY.within(1e-2, 10.0),
        "noise_correlation": Parameter(highest=0.9),
    },
)
def t2_design(
    normal: Normal,
    rank: int,
    noise_std: float,
    decay: float,
    pretrain_size: float,
    penalty: float,
    noise_correlation: float,
    **judged: float,
) -> Sides:
    """Shares of own and gold answers, then the five risks, of ridge on one design; all else is sampled."""
    n, p, count = 5, 8, REPLICATES // 2
    spectrum, turn = (1.0 + np.arange(p)) ** -decay, np.linalg.qr(normal(p, p))[0]
    basis = np.linalg.qr(normal(OUTPUTS, OUTPUTS))[0]
    P = basis[:, :rank] @ basis[:, :rank].T
    X = normal(n, p) * np.sqrt(spectrum)
    goal, start = normal(p, OUTPUTS) / p**0.5, pretrain_size * normal(p, OUTPUTS) / p**0.5
    pretrain, style_std = turn * spectrum @ turn.T, 0.7 * noise_std
    problem = VectorProblem(pretrain, np.diag(spectrum), goal, P, noise_std, style_std, start)
    procedure = _procedure(noise_std, **judged)
    expected = s3ft.conditional(X, problem, procedure, Ridge(penalty))
    common, fresh = normal(count, 1, OUTPUTS), normal(count, n, OUTPUTS)
    noise = noise_correlation**0.5 * common + (1 - noise_correlation) ** 0.5 * fresh
    gold = X @ goal + noise_std * noise @ P + style_std * (noise - noise @ P)
    own = X @ start + judged["sampling_std"] * normal(count, n, OUTPUTS)
    flat, chances = (count * n, OUTPUTS), scipy.stats.norm.cdf(normal(3, count * n))
    targets, source = _judged(problem, procedure, gold.reshape(flat), own.reshape(flat), chances)
    source = source.reshape(count, n)
    moved = np.linalg.solve(X.T @ X / n + penalty * np.eye(p), X.T / n) @ (targets.reshape(own.shape) - X @ start)
    missed = moved + start - goal

    parts = [(part, np.diag(spectrum)) for error in (missed, moved) for part in (error @ P, error - error @ P)]
    measured = [(source == kind).mean(axis=1) for kind in (Source.OWN, Source.GOLD)]
    for part, covariance in [*parts, (moved + start, pretrain)]:
        measured.append(np.sum(part * (covariance @ part), axis=(1, 2)))
    return np.array([expected.own, expected.gold, *expected[3:]]), np.stack(measured, axis=1)


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
    "With noisy labels and n < p, averaging SFT at its best τ beats S3FT at its best tolerance.",
    R"\sigma^2 \geq \tfrac{1}{10}\delta^\top\Sigma\delta \implies \min_\tau R \leq \min_c R",
    parameters=ONE_OUTPUT | {"noise_std": NOISE_STD.within(0.1**0.5, 10.0**0.5, lowest=1e-2)},
    tolerance=1e-9,
)
def t2_averaging(normal: Normal, **values: Any) -> Sides:
    """How much worse on the task S3FT at its best tolerance is, relative."""
    selective, supervised = _one_output(normal, **values)
    averaged = supervised.finetune.along(MinNorm()).optimal_risk
    return 0.0, float(selective.content_risk.min() / averaged - 1)


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
