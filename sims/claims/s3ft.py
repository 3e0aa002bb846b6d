"""§5 as claims: where training on one's own right answers ends, and what it leaves alone (docs, T1, T2)."""

from typing import Any, NamedTuple

import numpy as np
import scipy.integrate
import scipy.stats

from linfit import FixedShift, MinNorm, Ridge, TwoTaskProblem, risk_forms, s3ft_targets
from linfit.targets import Source
from sims.claims import Normal, claim
from sims.claims.problems import matrix_of, zero
from sims.parameters import ALIGNMENT, DECAY, PENALTY, Parameter
from theory.s3ft import (
    SUPERVISED,
    Procedure,
    VectorProblem,
    coefficients,
    conditional,
    fixed_point_coefficient,
    population,
    rejection_coefficient,
    shares,
)

REPLICATES, SCALAR_REPLICATES = 1 << 12, 1 << 15

# T1 ------------------------------------------------------------------------------------------------------------------


class Scalar(NamedTuple):
    """Scalar responses in the population: samples x (N, p), residuals r (N,), Σ, δ and the threshold."""

    x: np.ndarray
    residual: np.ndarray
    covariance: np.ndarray
    delta: np.ndarray
    noise_variance: float
    threshold: float


def _scalar(
    normal: Normal, decay: float, noise_variance: float, threshold: float, heavy_tails: float, skewness: float
) -> Scalar:
    """`threshold` in units of √v. Heavy tails: x has a random length; skewness: the noise is a shifted square."""
    p = 4
    covariance = np.diag((1.0 + np.arange(p)) ** -decay)
    delta = normal(p)
    delta = delta / np.sqrt(delta @ covariance @ delta)
    length = np.exp(heavy_tails * normal(SCALAR_REPLICATES) - heavy_tails**2)
    x = length[:, None] * normal(SCALAR_REPLICATES, p) * np.sqrt(np.diag(covariance))
    draw = normal(SCALAR_REPLICATES)
    noise = (1 - skewness) * draw + skewness * (draw**2 - 1)
    noise = noise_variance**0.5 * noise / np.sqrt((1 - skewness) ** 2 + 2 * skewness**2)
    return Scalar(x, x @ delta + noise, covariance, delta, noise_variance, threshold * (1 + noise_variance) ** 0.5)


def _fixed_point(scalar: Scalar) -> np.ndarray:
    return float(fixed_point_coefficient(scalar.threshold, (1 + scalar.noise_variance) ** 0.5)) * scalar.delta


def _normal_equations(scalar: Scalar) -> np.ndarray:
    """Σ⁻¹x·(target − xᵀθ₁), sample by sample: its mean is where least squares ends."""
    own = np.zeros_like(scalar.residual)
    targets = s3ft_targets(own, scalar.residual, np.abs(scalar.residual) <= scalar.threshold)
    return (scalar.x @ np.linalg.inv(scalar.covariance)) * np.asarray(targets.values)[:, None]


def _coefficient(scalar: tuple[float, float]) -> float:
    return float(fixed_point_coefficient(*scalar))


def _by_quadrature(scalar: tuple[float, float]) -> float:
    """∫ r² 1{|r| > c} dN(0, v) / v."""
    threshold, std = scalar
    density = scipy.stats.norm(scale=std).pdf
    inside, _ = scipy.integrate.quad(lambda r: r**2 * density(r), 0, threshold, epsabs=1e-14, epsrel=1e-13)
    return 1 - 2 * inside / std**2


# T2, in the population -----------------------------------------------------------------------------------------------

JUDGED = {
    "rank": Parameter(low=1, high=3, scale="whole"),
    "tolerance": Parameter(low=0.7, high=2.2, lowest=0.1, highest=3.0),
    "success": Parameter(low=0.2, high=1.0),
    "false_accept": Parameter(low=0.05, high=0.3),
    "false_reject": Parameter(low=0.05, high=0.3),
    "sampling_std": Parameter(low=0.0, high=1.0),
    "noise_variance": Parameter(low=0.1, high=3.0, scale="log"),
}
OUTPUTS = 5


class Population(NamedTuple):
    """Vector responses in the population: what was drawn, how it is judged, and what there is to learn."""

    x: np.ndarray
    gold: np.ndarray
    own: np.ndarray
    fools: np.ndarray
    misses: np.ndarray
    succeeds: np.ndarray
    problem: VectorProblem
    procedure: Procedure
    residual_std: float


def _population(
    normal: Normal,
    rank: int,
    tolerance: float,
    success: float,
    false_accept: float,
    false_reject: float,
    sampling_std: float,
    noise_variance: float,
    decay: float = 0.0,
    style_signal: float = 1.0,
    anisotropy: float = 0.0,
    entangled: float = 0.0,
    heavy_tails: float = 0.0,
) -> Population:
    """Content in a random subspace; PΔᵀΣΔP = P and no correlation with style, unless `anisotropy`, `entangled`."""
    p, count = OUTPUTS + 1, REPLICATES
    spectrum = (1.0 + np.arange(p)) ** -decay
    basis = np.linalg.qr(normal(OUTPUTS, OUTPUTS))[0]
    P = basis[:, :rank] @ basis[:, :rank].T
    directions = np.linalg.qr(normal(p, OUTPUTS))[0]
    signal = np.full(OUTPUTS, style_signal)
    signal[:rank] = np.exp(anisotropy * np.linspace(-1, 1, rank)) if rank > 1 else 1.0
    coupling = np.eye(OUTPUTS)
    coupling[0, rank] = entangled
    shift = spectrum[:, None] ** -0.5 * (directions * signal) @ coupling @ basis.T
    problem = VectorProblem(spectrum, spectrum, shift, P, noise_variance**0.5)
    length = np.exp(heavy_tails * normal(count) - heavy_tails**2)
    x = length[:, None] * normal(count, p) * spectrum**0.5
    gold = x @ shift + noise_variance**0.5 * normal(count, OUTPUTS)
    residual_std = (1 + noise_variance) ** 0.5
    procedure = Procedure(tolerance * residual_std, success, false_accept, false_reject, sampling_std)
    fools, misses, succeeds = (scipy.stats.norm.cdf(normal(count)) for _ in range(3))
    own = sampling_std * normal(count, OUTPUTS)
    return Population(
        x, gold, own, fools < false_accept, misses < false_reject, succeeds < success, problem, procedure, residual_std
    )


def _targets(data: Population) -> tuple[np.ndarray, np.ndarray]:
    """Values (N, m) and sources (N,), the judge's verdict put down as a mask; θ₁ = 0."""
    P = np.asarray(data.problem.content)
    right = np.linalg.norm((data.gold - data.own) @ P, axis=1) <= float(data.procedure.tolerance)  # type: ignore[arg-type]
    accepted = np.where(right, ~data.misses, data.fools)
    exists = data.succeeds & ~data.misses
    paraphrase = np.where(exists[:, None], data.gold @ P + data.own - data.own @ P, np.nan)
    values, source = s3ft_targets(data.own, data.gold, accepted, paraphrase)
    return np.asarray(values), np.asarray(source)


def _expected_shares(data: Population) -> np.ndarray:
    return np.array(shares(data.procedure, data.problem.content_rank, data.residual_std))


def _counted(data: Population) -> np.ndarray:
    return _targets(data)[1][:, None] == np.array(list(Source))


def _expected_drift(data: Population) -> np.ndarray:
    """ρ_content ΔP + ρ_style Δ(I−P), (p, m)."""
    learned = coefficients(data.procedure, data.problem.content_rank, data.residual_std)
    content, style = data.problem.gaps
    return np.asarray(learned.content * content + learned.style * style)


def _drift(data: Population) -> np.ndarray:
    """Σ⁻¹x·(target)ᵀ, sample by sample."""
    precision = 1 / np.asarray(data.problem.finetune_covariance.diagonal())
    return (data.x * precision)[:, :, None] * _targets(data)[0][:, None, :]


class Limits(NamedTuple):
    """A problem with unlimited data, and how targets are made."""

    problem: VectorProblem
    procedure: Procedure


def _limits(normal: Normal, pretrain_size: float = 0.0, **judged: Any) -> Limits:
    data = _population(normal, **judged)
    problem, p = data.problem, OUTPUTS + 1
    pretrain = normal(p, p) / p**0.5
    error = pretrain_size * normal(p, OUTPUTS)
    error = error - error @ np.asarray(problem.content)  # what is known of content stays; own style is off
    std = float(problem.noise_std)
    return Limits(
        VectorProblem(
            pretrain @ pretrain.T, problem.finetune_covariance, problem.shift, problem.content, std, std, error
        ),
        data.procedure,
    )


def _style_drift(limits: Limits) -> float:
    """Style drift relative to that of supervised fine-tuning."""
    ours, supervised = (population(limits.problem, one).style_drift for one in (limits.procedure, SUPERVISED))
    return float(ours / supervised)


def _forgetting(limits: Limits) -> float:
    """R_pre relative to that of supervised fine-tuning."""
    ours, supervised = (population(limits.problem, one).forgetting for one in (limits.procedure, SUPERVISED))
    return float(ours / supervised)


def _hardly(_: Any) -> float:
    return 1e-12


def _one(_: Any) -> float:
    return 1.0


# Own answers alone ---------------------------------------------------------------------------------------------------


def _rejection(data: Population) -> np.ndarray:
    """Σ-weighted normal equations of the accepted own answers at the predicted weights: 0."""
    return np.zeros_like(np.asarray(data.problem.shift))


def _rejection_gradient(data: Population) -> np.ndarray:
    """x·(own − xᵀθ)ᵀ over the accepted own answers, at the predicted θ = ρΔP."""
    content, _ = data.problem.gaps
    noise = float(data.problem.noise_std)
    rho = rejection_coefficient(data.procedure, data.problem.content_rank, 1.0, noise)
    values, source = _targets(data)
    residual = values - data.x @ np.asarray(rho * content)
    return np.where(source == Source.OWN, 1.0, 0.0)[:, None, None] * data.x[:, :, None] * residual[:, None, :]


# T2, on a design -----------------------------------------------------------------------------------------------------


class OnDesign(NamedTuple):
    """A design, a problem with nothing special about it, and draws of everything else in front."""

    X: np.ndarray
    problem: VectorProblem
    procedure: Procedure
    penalty: float
    draws: Population


def _on_design(
    normal: Normal, decay: float, pretrain_size: float, penalty: float, noise_correlation: float, **judged: Any
) -> OnDesign:
    n, p, count = 5, 8, REPLICATES // 2
    rank, sampling_std, noise_variance = judged["rank"], judged["sampling_std"], judged["noise_variance"]
    finetune, pretrain = (np.diag((1.0 + np.arange(p)) ** -decay) for _ in range(2))
    turn = np.linalg.qr(normal(p, p))[0]
    pretrain = turn @ pretrain @ turn.T
    basis = np.linalg.qr(normal(OUTPUTS, OUTPUTS))[0]
    P = basis[:, :rank] @ basis[:, :rank].T
    X = normal(n, p) * np.sqrt(np.diag(finetune))
    shift, error = normal(p, OUTPUTS), pretrain_size * normal(p, OUTPUTS)
    std, style_std = noise_variance**0.5, 0.7 * noise_variance**0.5
    problem = VectorProblem(pretrain, finetune, shift / p**0.5, P, std, style_std, error / p**0.5)
    common, fresh = normal(count, 1, OUTPUTS), normal(count, n, OUTPUTS)
    noise = noise_correlation**0.5 * common + (1 - noise_correlation) ** 0.5 * fresh
    gold = X @ np.asarray(problem.shift) + std * noise @ P + style_std * (noise - noise @ P)
    own = X @ np.asarray(problem.pretrain_error) + sampling_std * normal(count, n, OUTPUTS)
    procedure = Procedure(
        judged["tolerance"] * (1 + noise_variance) ** 0.5,
        judged["success"],
        judged["false_accept"],
        judged["false_reject"],
        sampling_std,
    )
    chances = (scipy.stats.norm.cdf(normal(count * n)) for _ in range(3))
    rates = (judged["false_accept"], judged["false_reject"], judged["success"])
    fools, misses, succeeds = (chance < rate for chance, rate in zip(chances, rates, strict=True))
    flat = (count * n, OUTPUTS)
    draws = Population(
        X, gold.reshape(flat), own.reshape(flat), fools, misses, succeeds, problem, procedure, float(std)
    )
    return OnDesign(X, problem, procedure, penalty, draws)


def _expected_outcome(data: OnDesign) -> np.ndarray:
    """Shares of own and gold, then the five risks."""
    outcome = conditional(data.X, data.problem, data.procedure, Ridge(data.penalty))
    return np.array([outcome.shares.own, outcome.shares.gold, *outcome[1:]])


def _outcome(data: OnDesign) -> np.ndarray:
    values, source = _targets(data.draws)
    X, problem = data.X, data.problem
    n, p = X.shape
    values, source = values.reshape(-1, n, OUTPUTS), source.reshape(-1, n)
    R = np.linalg.solve(X.T @ X / n + data.penalty * np.eye(p), X.T / n)
    P, start, goal = (np.asarray(part) for part in (problem.content, problem.pretrain_error, problem.shift))
    finetune, pretrain = (
        matrix_of(covariance) for covariance in (problem.finetune_covariance, problem.pretrain_covariance)
    )
    moved = R @ (values - X @ start)

    def squared(error: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        return np.sum(error * (covariance @ error), axis=(1, 2))

    missed = moved + start - goal
    columns = [(source == Source.OWN).mean(1), (source == Source.GOLD).mean(1)]
    columns += [squared(missed @ P, finetune), squared(missed - missed @ P, finetune)]
    columns += [squared(moved @ P, finetune), squared(moved - moved @ P, finetune), squared(moved + start, pretrain)]
    return np.stack(columns, axis=1)


# Where selecting hurts -----------------------------------------------------------------------------------------------


class Contest(NamedTuple):
    """One scalar response on a design with n < p, fitted by min-norm."""

    selective: np.ndarray
    """[R_ft, R_pre] of S3FT without paraphrases for each tolerance, (2, tolerances)."""
    supervised: np.ndarray
    """[R_ft, R_pre] of SFT."""
    averaged: float
    """R_ft of SFT averaged with the pretrained weights at the best τ."""


TOLERANCES = np.linspace(0, 5, 41)
"""In units of √v."""


def _contest(normal: Normal, decay: float, alignment: float, noise_variance: float) -> Contest:
    n, p = 20, 60
    spectrum = (1.0 + np.arange(p)) ** -decay
    delta = normal(p) * spectrum ** (alignment / 2)
    delta = delta / np.sqrt(np.sum(spectrum * delta**2))
    X, std = normal(n, p) * spectrum**0.5, noise_variance**0.5
    problem = VectorProblem(spectrum, spectrum, delta[:, None], [1.0], std)
    procedure = Procedure(TOLERANCES * (1 + noise_variance) ** 0.5, paraphrase_success=0.0)
    outcome = conditional(X, problem, procedure, MinNorm())
    forms = risk_forms(X, TwoTaskProblem(spectrum, spectrum, FixedShift(delta), std))
    best = forms.finetune(MinNorm(), forms.finetune.optimal_tau(MinNorm())).total
    return Contest(
        np.stack([outcome.content_risk, outcome.forgetting]),
        np.array([form(MinNorm()).total for form in forms]),
        float(best),
    )


def _selecting_against_averaging(contest: Contest) -> float:
    """How much worse on the task S3FT at its best tolerance is than SFT at its best τ, relative."""
    return float(contest.selective[0].min() / contest.averaged - 1)


def _more_forgotten(contest: Contest) -> float:
    """The largest R_pre of S3FT over the tolerances, relative to that of SFT, less 1."""
    return float(contest.selective[1].max() / contest.supervised[1] - 1)


def _noticeably(_: Any) -> float:
    """At the strictest tolerance S3FT is SFT: more than rounding is needed."""
    return 0.01


SCALAR = {"threshold": Parameter(low=0.0, high=4.0), "residual_std": Parameter(low=0.1, high=10.0, scale="log")}
LIMIT = JUDGED | {
    "decay": DECAY.within(0.0, 1.5),
    "style_signal": Parameter(low=0.3, high=3.0, scale="log"),
    "anisotropy": Parameter(low=0.0, high=0.0, highest=1.5),
}
DRAWN = LIMIT | {
    "heavy_tails": Parameter(low=0.0, high=0.0, highest=0.8),
    "entangled": Parameter(low=0.0, high=0.0, highest=2.0),
}
CONTEST = {"decay": DECAY.within(0.0, 2.0), "alignment": ALIGNMENT.within(-1.0, 1.0)}


@claim(
    "T1",
    "The coefficient ρ(c) is the share of residual variance beyond the threshold.",
    R"\rho(c) = 2[z\varphi(z) + 1 - \Phi(z)] = \mathbb{E}\,r^2 1\{|r|>c\}/v,\ z = c/\sqrt v",
    source="ours",
    kind="identity",
    parameters=SCALAR,
    tolerance=1e-9,
)
def t1(normal: Normal, threshold: float, residual_std: float) -> tuple[Any, Any]:
    instance = threshold * residual_std, residual_std
    return _coefficient(instance), _by_quadrature(instance)


@claim(
    "T1.sampled",
    "S3FT on scalar responses ends at θ₁ + ρ(c)δ, an ensemble, whatever Σ.",
    R"\Sigma^{-1}\,\mathbb{E}\,x\,r\,1\{|r|>c\} = \rho(c)\,\delta",
    source="ours",
    kind="statistical",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "noise_variance": Parameter(low=0.05, high=5.0, scale="log"),
        "threshold": Parameter(low=0.3, high=2.0),
        "heavy_tails": Parameter(low=0.0, high=0.0, highest=0.8),
        "skewness": Parameter(low=0.0, high=0.0, highest=1.0),
    },
)
def t1_sampled(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _scalar(normal, **values)
    return _fixed_point(instance), _normal_equations(instance)


@claim(
    "T2.shares",
    "Shares of own, paraphrased and gold targets follow from a χ² with as many degrees as content.",
    R"\mathrm{own} = (1-f)F_k + a(1-F_k),\ \mathrm{paraphrase} = (1-a)q(1-f)(1-F_k)",
    source="ours",
    kind="statistical",
    parameters=DRAWN,
)
def t2_shares(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _population(normal, **values)
    return _expected_shares(instance), _counted(instance)


@claim(
    "T2.drift",
    "S3FT on vector responses is an ensemble with one coefficient for content and one for style.",
    R"\hat\theta = \theta_1 + \rho_\mathrm{content}\,\Delta P + \rho_\mathrm{style}\,\Delta(I-P)",
    source="ours",
    kind="statistical",
    parameters=DRAWN,
)
def t2_drift(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _population(normal, **values)
    return _expected_drift(instance), _drift(instance)


@claim(
    "T2.style",
    "With paraphrases that always succeed and a judge that knows what is right, style stays.",
    R"q = 1,\ f = 0 \implies \rho_\mathrm{style} = 0",
    source="ours",
    kind="inequality",
    parameters=LIMIT
    | {
        "success": Parameter(low=1.0, high=1.0, lowest=0.0),
        "false_reject": Parameter(low=0.0, high=0.0, highest=0.5),
        "false_accept": Parameter(low=0.0, high=0.5, highest=1.0),
    },
)
def t2_style(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _limits(normal, **values)
    return _style_drift(instance), _hardly(instance)


@claim(
    "T2.less",
    "With unlimited data S3FT forgets less than supervised fine-tuning.",
    R"u = 0 \implies R_\mathrm{pre}(\mathrm{S3FT}) < R_\mathrm{pre}(\mathrm{SFT})",
    source="ours",
    kind="inequality",
    parameters=LIMIT
    | {
        "tolerance": Parameter(low=0.01, high=5.0, scale="log"),
        "false_accept": Parameter(low=0.0, high=1.0),
        "false_reject": Parameter(low=0.0, high=0.95),
        "pretrain_size": Parameter(low=0.0, high=0.0, highest=3.0),
    },
)
def t2_less(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _limits(normal, **values)
    return _forgetting(instance), _one(instance)


@claim(
    "T2.rejection",
    "Training on accepted own answers alone moves content towards gold by the sampling noise only.",
    R"\hat\theta = \theta_1 + \frac{s^2B}{A - Bq}\,\Delta P",
    source="ours",
    kind="statistical",
    parameters=DRAWN,
)
def t2_rejection(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _population(normal, **values)
    return _rejection(instance), _rejection_gradient(instance)


@claim(
    "T2.design",
    "Shares and risks of S3FT on a given design are exact, whatever n, p, Σ₁, Σ₂, P and the judge.",
    R"\mathbb{E}\,t_i = A_{k+2}(\lambda_i)\,\mu_i,\quad \lambda_i = \|\mu_i\|^2/(\sigma^2+s^2)",
    source="ours",
    kind="statistical",
    parameters=JUDGED
    | {
        "decay": DECAY.within(0.0, 1.5),
        "pretrain_size": Parameter(low=0.0, high=1.0),
        "penalty": PENALTY.within(1e-2, 10.0),
        "noise_correlation": Parameter(low=0.0, high=0.0, highest=0.9),
    },
)
def t2_design(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _on_design(normal, **values)
    return _expected_outcome(instance), _outcome(instance)


@claim(
    "T2.averaging",
    "With noisy labels and n < p, averaging SFT at its best τ beats S3FT at its best tolerance.",
    R"\sigma^2 \geq \tfrac{1}{10}\delta^\top\Sigma\delta \implies \min_\tau R \leq \min_c R",
    source="ours",
    kind="inequality",
    parameters=CONTEST | {"noise_variance": Parameter(low=0.1, high=10.0, scale="log", lowest=1e-4)},
    tolerance=1e-9,
)
def t2_averaging(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _contest(normal, **values)
    return zero(instance), _selecting_against_averaging(instance)


@claim(
    "T2.more",
    "With few samples and little noise S3FT can forget more than SFT: mixed targets are rough.",
    R"n < p:\ \max_c R_\mathrm{pre}(c) > 1.01\,R_\mathrm{pre}(\mathrm{SFT})",
    source="ours",
    kind="existence",
    parameters=CONTEST | {"noise_variance": Parameter(low=1e-3, high=0.1, scale="log", highest=10.0)},
)
def t2_more(normal: Normal, **values: Any) -> tuple[Any, Any]:
    instance = _contest(normal, **values)
    return _noticeably(instance), _more_forgotten(instance)
