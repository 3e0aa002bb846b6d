"""§3 as claims: predictions without sampling, and how fast they become exact (docs, D1–D5)."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import Array

from linfit import (
    Combination,
    Filter,
    GradientFlow,
    MinNorm,
    Pair,
    Ridge,
    SelfDistillation,
    aligned_problem,
    risk_forms,
    spectra,
)
from sims.claims import Normal, Sides, asymptotic, identity, inequality
from sims.claims.problems import autocorrelation
from sims.parameters import ALIGNMENT, DECAY, NOISE_STD, PENALTY, PRETRAIN_RISK, TIME, Parameter
from theory import rational
from theory.equivalents import degrees_of_freedom, effective_ranks, effective_regularization, risk

SIZES, REPLICATES = (40, 160), 24

LAWS = (lambda latent: latent, np.sign, lambda latent: 12**0.5 * (scipy.stats.norm.cdf(latent) - 0.5))
"""Gaussian, Rademacher and uniform coordinates from standard normals."""

DESIGN_PARAMETERS = {
    "doublings": Parameter(low=1, high=2, scale="whole", lowest=0, highest=3),
    "decay": DECAY.within(0.0, 1.5, highest=3.0),
    "law": Parameter(low=0, high=2, scale="whole"),
    "row_correlation": Parameter(highest=0.9),
}


def _designs(
    normal: Normal, doublings: int, decay: float, law: int, row_correlation: float
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each size n: n, designs X (replicates, n, p) with p = 2^doublings · n, and the eigenvalues s (p,) of Σ.

    Rows are independent unless `row_correlation`, that of consecutive ones, is not 0.
    """
    for n in SIZES:
        p = n * 2**doublings
        s = np.asarray(spectra.power_law(p, decay))
        latent = LAWS[law](normal(REPLICATES, n, p))
        if row_correlation:
            latent = np.linalg.cholesky(autocorrelation(n, row_correlation)) @ latent
        yield n, latent * np.sqrt(s), s


def _padded(values: Any) -> np.ndarray:
    """Zeros up to one length for all population arrays, so that nothing is compiled twice."""
    values = np.asarray(values)
    return np.concatenate([values, np.zeros(8 * SIZES[-1] - values.size)])


def _gram(X: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """X diag(weight) Xᵀ/n (replicates, n, n)."""
    return (X * weight) @ np.swapaxes(X, 1, 2) / X.shape[1]


RESOLVENT_PARAMETERS = DESIGN_PARAMETERS | {
    "penalty": PENALTY.within(0.1, 10.0, lowest=1e-6),  # in units of tr Σ/n
    "other_penalty": Parameter(low=0.1, high=10.0, scale="log"),
    "phase": Parameter(low=0.0, high=2.0, highest=3.14),
    "other_phase": Parameter(low=-2.0, high=2.0),
    "weight": Parameter(low=-1.0, high=1.0),
}


def _resolvents(
    normal: Normal, penalty: float, other_penalty: float, phase: float, other_phase: float, weight: float, **values: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]]:
    """For each size: X, s, two complex effective penalties κ, (XXᵀ/n + λ)⁻¹ at each λ, and S ∝ Σ^weight of trace 1."""
    relative = np.array([penalty * np.exp(1j * phase), other_penalty * np.exp(1j * other_phase)])
    for n, X, s in _designs(normal, **values):
        penalties, S = relative * s.sum() / n, s**weight
        kappa = np.asarray(effective_regularization(penalties, _padded(s), n))
        yield X, s, kappa, [np.linalg.inv(_gram(X) + at * np.eye(n)) for at in penalties], S / S.sum()


def _real(value: np.ndarray) -> np.ndarray:
    return np.stack([np.real(value), np.imag(value)], axis=-1)


@asymptotic(
    "D1",
    "A sampled resolvent acts like the population's at a larger, effective penalty κ.",
    R"\lambda(\hat\Sigma+\lambda)^{-1} \asymp \kappa(\Sigma+\kappa)^{-1},\quad "
    R"\kappa - \tfrac{\kappa}{n}\mathrm{tr}\,\Sigma(\Sigma+\kappa)^{-1} = \lambda",
    source="random matrices",
    parameters=RESOLVENT_PARAMETERS,
    tolerance=1.0,
    sizes=SIZES,
)
def d1(normal: Normal, **values: Any) -> Sides:
    """κ tr S(Σ+κ)⁻¹ and λ tr S(Σ̂+λ)⁻¹, the latter through the kernel."""
    predicted, measured = [], []
    for X, s, kappa, (inverse, _), S in _resolvents(normal, **values):
        predicted.append(_real(kappa[0] * np.sum(S / (s + kappa[0]))))
        measured.append(_real(S.sum() - np.einsum("rij,rji->r", inverse, _gram(X, S))))
    return predicted, measured


@asymptotic(
    "D2",
    "Two resolvents with a matrix between them, at any two complex penalties.",
    R"\lambda_1\lambda_2(\hat\Sigma+\lambda_1)^{-1}M(\hat\Sigma+\lambda_2)^{-1} \asymp "
    R"\kappa_1\kappa_2(\Sigma+\kappa_1)^{-1}[M + a\Sigma](\Sigma+\kappa_2)^{-1}",
    source="random matrices",
    parameters=RESOLVENT_PARAMETERS,
    tolerance=10.0,
    sizes=SIZES,
)
def d2(normal: Normal, **values: Any) -> Sides:
    """κ₁κ₂ tr S(Σ+κ₁)⁻¹[M + aΣ](Σ+κ₂)⁻¹ and λ₁λ₂ tr S(Σ̂+λ₁)⁻¹M(Σ̂+λ₂)⁻¹ (M = Σ/tr Σ), the latter through the kernel."""
    predicted, measured = [], []
    for X, s, kappa, (first, second), S in _resolvents(normal, **values):
        n, M = X.shape[1], s / s.sum()
        both = 1 / ((s + kappa[0]) * (s + kappa[1]))
        a = np.sum(M * s * both) / n / (1 - np.sum(s**2 * both) / n)
        predicted.append(_real(kappa[0] * kappa[1] * np.sum(S * both * (M + a * s))))
        single = np.einsum("rij,rji->r", first + second, _gram(X, S * M))
        double = np.einsum("rij,rji->r", _gram(X, S) @ first, _gram(X, M) @ second)
        measured.append(_real(np.sum(S * M) - single + double))
    return predicted, measured


RISK_PARAMETERS = DESIGN_PARAMETERS | {
    "alignment": ALIGNMENT.within(-1.0, 1.0),
    "pretrain_decay": DECAY.within(0.0, 1.5),
    "noise_std": NOISE_STD.within(0.1, 1.0, highest=10.0),
    "pretrain_risk": PRETRAIN_RISK.within(0.0, 1.0),
}


def _risks(normal: Normal, filters: tuple[Filter, ...], pretrain_decay: float, **values: Any) -> Sides:
    """Total risk on both domains, relative to R_ft(θ₁) = 1: (filters, 2, taus, hyperparameters) flattened."""
    tau, bed = jnp.array([0.3, 0.7, 1.0, 1.3])[:, None], ("alignment", "noise_std", "pretrain_risk")
    predicted, measured = [], []
    for n, X, s in _designs(normal, **{name: value for name, value in values.items() if name not in bed}):
        pretrain = spectra.power_law(s.size, pretrain_decay)
        problem = aligned_problem(s, pretrain_spectrum=pretrain, **{name: values[name] for name in bed})
        padded = jax.tree.map(lambda leaf: jnp.asarray(_padded(leaf)) if leaf.ndim else leaf, problem)
        pairs = [risk(padded, n, filter, tau) for filter in filters]
        predicted.append(np.concatenate([np.ravel(part.total) for pair in pairs for part in pair]))
        measured.append(np.asarray(_totals(risk_forms(X, problem), filters, tau)))
    return predicted, measured


@eqx.filter_jit
def _totals(forms: Pair, filters: tuple[Filter, ...], tau: Array) -> Array:
    totals = [form(filter, tau).total for filter in filters for form in forms]
    return jnp.concatenate([total.reshape(len(total), -1) for total in totals], axis=1)


@asymptotic(
    "D3",
    "The risk of ensembles of min-norm and ridge, on both domains, follows from the population.",
    R"R(\tau) \asymp (1-\tau)^2\mathrm{tr}\,SM "
    R"+ 2\tau(1-\tau)\,\kappa\,\mathrm{tr}\,S(\Sigma+\kappa)^{-1}M + \tau^2(B + \sigma^2 a)",
    parameters=RISK_PARAMETERS | {"penalty": PENALTY.within(1e-3, 0.1, lowest=1e-9)},
    tolerance=5.0,
    sizes=SIZES,
)
def d3(normal: Normal, penalty: float, **values: Any) -> Sides:
    return _risks(normal, (MinNorm(), Ridge([penalty, 10 * penalty])), **values)


@asymptotic(
    "D4",
    "So does that of gradient flow at any time, as a sum of resolvents on a contour.",
    R"e^{-t\hat\Sigma} = \tfrac{1}{2\pi i}\oint e^{\lambda t}(\hat\Sigma+\lambda)^{-1}d\lambda",
    parameters=RISK_PARAMETERS | {"time": TIME.within(1.0, 1e3, highest=1e6)},
    tolerance=5.0,
    sizes=SIZES,
)
def d4(normal: Normal, time: float, **values: Any) -> Sides:
    return _risks(normal, (GradientFlow([time, 10 * time]),), **values)


@asymptotic(
    "D4.combined",
    "And that of sums of filters, and of self-distillation: all their resolvents side by side.",
    R"g = \mathrm{Re}\textstyle\sum_k a_k\sum_l w_{kl}/(s+\lambda_{kl})",
    parameters=RISK_PARAMETERS
    | {"penalty": PENALTY.within(1e-2, 0.1), "time": TIME.within(1.0, 1e2), "mix": Parameter(low=-1.0, high=1.0)},
    tolerance=10.0,
    sizes=SIZES,
)
def d4_combined(normal: Normal, penalty: float, time: float, mix: float, **values: Any) -> Sides:
    combined = Combination((Ridge(penalty), GradientFlow(time), MinNorm()), [[0.8, 0.5, -0.2], [-0.3, 0.9, 0.3]])
    return _risks(normal, (combined, SelfDistillation([penalty, 10 * penalty], mix)), **values)


@identity(
    "D4.contour",
    "Twenty-five complex ridges reproduce gradient flow at all times of a decade.",
    R"e^{-ts} \approx \mathrm{Re}\textstyle\sum_k w_k\lambda_k/(s+\lambda_k),\quad s \ge 0",
    parameters={
        "time": TIME.within(1e-3, 1e6, lowest=1e-9, highest=1e12),
        "span": Parameter(low=1.0, high=10.0, scale="log", highest=1e4),
    },
    tolerance=1e-8,
)
def d4_contour(normal: Normal, time: float, span: float) -> Sides:
    """1 − s·g(s) = Re Σ w λ/(s+λ) (8, 201), as the equivalents use it, for eigenvalues from 0 to far beyond 1/t.

    The times share a contour, as those within a decade do.
    """
    times = time * span ** np.linspace(0, 1, 8)
    s = np.concatenate([[0.0], np.logspace(-6, 6, 200) / time])
    plan = rational.Plan(jnp.asarray(times[-1:]), jnp.ones(1), jnp.zeros(times.size, int))
    ridges = rational.flow_ridges(jnp.asarray(times), plan)
    poles = np.asarray(ridges.penalties)[np.asarray(ridges.group)]
    by_contour = np.einsum("tk,tks->ts", np.asarray(ridges.weights) * poles, 1 / (s + poles[..., None])).real
    return np.exp(-times[:, None] * s), by_contour


@asymptotic(
    "D5",
    "Ridge uses up df₁ = n(1 − λ/κ) degrees of freedom.",
    R"\mathrm{tr}\,\hat\Sigma(\hat\Sigma+\lambda)^{-1} \asymp "
    R"\mathrm{tr}\,\Sigma(\Sigma+\kappa)^{-1} = n(1-\lambda/\kappa)",
    source="random matrices",
    parameters=DESIGN_PARAMETERS | {"penalty": PENALTY.within(0.1, 10.0, lowest=1e-6)},
    tolerance=1.0,
    sizes=SIZES,
)
def d5(normal: Normal, penalty: float, **values: Any) -> Sides:
    """df₁/n and tr Σ̂(Σ̂+λ)⁻¹/n, λ in units of tr Σ/n."""
    expected, sampled = [], []
    for n, X, s in _designs(normal, **values):
        at = penalty * s.sum() / n
        eigenvalues = np.linalg.eigvalsh(_gram(X))
        expected.append(np.asarray(degrees_of_freedom(at, _padded(s), n).first / n))
        sampled.append(np.mean(eigenvalues / (eigenvalues + at), axis=1))
    return expected, sampled


@inequality(
    "D5.ranks",
    "The effective ranks of benign overfitting are ordered.",
    R"r_k \le R_k \le r_k^2",
    source="Bartlett et al. 2020",
    parameters={
        "decay": DECAY.within(0.0, 3.0),
        "roughness": Parameter(low=0.0, high=2.0, highest=10.0),
        "k": Parameter(low=0, high=39, scale="whole"),
    },
    tolerance=1e-12,
)
def d5_ranks(normal: Normal, decay: float, roughness: float, k: int) -> Sides:
    """1 − r_k/R_k and 1 − R_k/r_k²."""
    r, R = (float(rank) for rank in effective_ranks(np.arange(1.0, 41.0) ** -decay * np.exp(roughness * normal(40)), k))
    return 0.0, np.array([1 - r / R, 1 - R / r**2])
