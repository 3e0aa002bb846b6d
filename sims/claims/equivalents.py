"""§3 as claims: predictions without sampling, and how fast they become exact (docs, D1–D5).

Populations have four different eigenvalues, whose multiplicities grow with n: the prediction is then the same at every
size, and what is sampled tends to it like c/n. Extrapolation over sizes removes c: a design of 64 samples contains four
of 32 and sixteen of 16, from the same normals, so most of the noise of 2·R(2n) − R(n) cancels too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.stats

from linfit import (
    Combination,
    Filter,
    FixedShift,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Pair,
    RandomShift,
    Ridge,
    SelfDistillation,
    TwoTaskProblem,
)
from linfit.risk import Parabola
from sims.claims import Normal, Sides, asymptotic, identity, inequality
from sims.claims.problems import autocorrelation
from sims.parameters import ALIGNMENT, DECAY, NOISE_STD, PENALTY, PRETRAIN_RISK, TAU, TIME, Parameter
from theory import rational
from theory.equivalents import (
    Spectrum,
    along,
    degrees_of_freedom,
    effective_ranks,
    effective_regularization,
    risk,
    signal_to_noise,
    spectral_edge,
)

SIZES, REPLICATES = (32, 64), 24

LAWS = (lambda latent: latent, np.sign, lambda latent: 12**0.5 * (scipy.stats.norm.cdf(latent) - 0.5))
"""Gaussian, Rademacher and uniform coordinates from standard normals."""

ASPECTS = (0.5, 2.0, 4.0, 1.0)
"""p/n; the last one, where the risk of min-norm is infinite, lies outside the assumptions."""

POPULATION = {"aspect": Parameter(low=0, high=2, scale="whole"), "decay": DECAY.within(0.0, 1.5, highest=3.0)}
DESIGN = POPULATION | {"law": Parameter(low=0, high=2, scale="whole"), "row_correlation": Parameter(highest=0.9)}


class Population(NamedTuple):
    """Eigenvalues s (4,) and how often each occurs per sample (4,)."""

    s: np.ndarray
    share: np.ndarray

    def multiplicities(self, n: int) -> np.ndarray:
        """Multiplicities (4,)."""
        return n * self.share

    def kappa(self, penalties: Any) -> np.ndarray:
        """κ at each λ (K,), a root of (κ−λ)Π(s_j+κ) = κ Σ share_j s_j Π_{i≠j}(s_i+κ): on λ's side, real ones ≥ 0."""
        penalties, product = np.asarray(penalties, complex), np.poly(-self.s)
        lost = sum(w * s * np.poly(-np.delete(self.s, j)) for j, (s, w) in enumerate(zip(self.s, self.share)))
        known = np.append(product, 0) - np.concatenate([[0], lost, [0]])
        coefficients = known - penalties[:, None] * np.append(0, product)  # of κ⁵, …, 1
        companion = np.zeros((penalties.size, 5, 5), complex)
        companion[:, 0], companion[:, range(1, 5), range(4)] = -coefficients[:, 1:], 1
        roots = np.linalg.eigvals(companion)
        rank = np.where(penalties.imag[:, None] == 0, roots.real, roots.imag * np.sign(penalties.imag)[:, None])
        root = roots[np.arange(penalties.size), np.argmax(rank, axis=1)]
        for _ in range(3):  # polished
            powers = root[:, None] ** np.arange(5, -1, -1)
            slope = np.sum(coefficients[:, :5] * np.arange(5, 0, -1) * powers[:, 1:], axis=1)
            root = root - np.sum(coefficients * powers, axis=1) / slope
        # p < n at λ = 0: the root is 0
        return np.where(penalties.imag == 0, np.where(root.real > 1e-12 * self.s.max(), root.real, 0), root)


def _population(aspect: int, decay: float) -> Population:
    """Eigenvalues 1, 2^−decay, 4^−decay, 8^−decay; as many of the first as of the second, twice and four times that."""
    return Population(np.array([1.0, 2.0, 4.0, 8.0]) ** -decay, ASPECTS[aspect] * np.array([1, 1, 2, 4]) / 8)


class Level(NamedTuple):
    """Designs of one size: eigenvalues (…, n) of K = XXᵀ/n, and UᵀX_jX_jᵀU/n for each atom j, (…, 4, n, n)."""

    n: int
    eigenvalues: np.ndarray
    parts: np.ndarray

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """UᵀX diag(w) XᵀU/n for weights w (4,) of the atoms."""
        return np.einsum("j,...jkl->...kl", weights, self.parts)

    def diagonal(self, weights: np.ndarray) -> np.ndarray:
        """Its diagonal (…, n)."""
        return np.einsum("j,...jkk->...k", weights, self.parts)


def _level(latents: list[np.ndarray], s: np.ndarray, blocks: int) -> Level:
    """A stack of designs cut into blocks × blocks smaller ones each: (replicates, blocks², …)."""
    replicates, largest = latents[0].shape[:2]
    n, parts = largest // blocks, []
    for latent, eigenvalue in zip(latents, s, strict=True):
        cut = latent.reshape(replicates, blocks, n, blocks, -1).swapaxes(2, 3).reshape(replicates, blocks**2, n, -1)
        parts.append(eigenvalue / n * cut @ cut.swapaxes(-1, -2))
    eigenvalues, U = np.linalg.eigh(sum(parts))
    eigenvalues = np.where(eigenvalues > 1e-12 * eigenvalues[..., -1:], eigenvalues, 0)
    return Level(n, eigenvalues, np.stack([U.swapaxes(-1, -2) @ part @ U for part in parts], axis=-3))


def _extrapolated(
    normal: Normal, population: Population, statistic: Callable[[Level], np.ndarray], law: int, row_correlation: float
) -> list[np.ndarray]:
    """2·T(n) − T(n/2) of a statistic of designs, at both sizes (replicates, …).

    What the mean squares of the latent coordinates explain, whose own mean is known to be 1, is taken out.
    """
    n = SIZES[-1]
    latents = [LAWS[law](normal(REPLICATES, n, int(count))) for count in population.multiplicities(n)]
    control = np.stack([np.mean(latent**2, axis=(1, 2)) - 1 for latent in latents], axis=-1)
    if row_correlation:
        latents = [np.linalg.cholesky(autocorrelation(n, row_correlation)) @ latent for latent in latents]
    coarse, middle, fine = (statistic(_level(latents, population.s, blocks)).mean(axis=1) for blocks in (4, 2, 1))
    samples = np.stack([2 * middle - coarse, 2 * fine - middle]).reshape(2, REPLICATES, -1)
    centred = samples - samples.mean(axis=1, keepdims=True)
    slopes = np.linalg.pinv(control - control.mean(axis=0), rcond=1e-10) @ centred
    return list((samples - control @ slopes).reshape(2, *fine.shape))


RESOLVENTS = DESIGN | {
    "penalty": PENALTY.within(0.1, 10.0, lowest=1e-6),  # in units of tr Σ/n
    "other_penalty": Parameter(low=0.1, high=10.0, scale="log"),
    "phase": Parameter(low=0.0, high=2.0, highest=3.14),
    "other_phase": Parameter(low=-2.0, high=2.0),
    "weight": Parameter(low=-1.0, high=1.0),
}


def _penalties(
    population: Population, penalty: float, other_penalty: float, phase: float, other_phase: float
) -> np.ndarray:
    """Two complex penalties λ."""
    relative = np.array([penalty * np.exp(1j * phase), other_penalty * np.exp(1j * other_phase)])
    return relative * (population.share @ population.s)


def _parts(value: Any) -> np.ndarray:
    return np.stack([np.real(value), np.imag(value)], axis=-1)


@identity(
    "D1.root",
    "The effective penalty is the one root of its equation on the penalty's side, for p below or above n.",
    R"(\kappa-\lambda)\textstyle\prod_j(s_j+\kappa) = \tfrac{\kappa}{n}\sum_j m_js_j\prod_{i\neq j}(s_i+\kappa)",
    parameters=POPULATION
    | {name: RESOLVENTS[name] for name in ("penalty", "other_penalty")}
    | {"phase": Parameter(low=0.0, high=3.1), "other_phase": Parameter(low=-3.1, high=0.0)}
    | {"n": Parameter(low=8, high=1024, scale="whole"), "n_ratio": Parameter(low=1.0, high=1.0, highest=2.0)},
    tolerance=1e-9,
)
def d1_root(normal: Normal, aspect: int, decay: float, n: int, n_ratio: float, **penalties: float) -> Sides:
    """κ at two complex penalties, two real ones and 0, and df₁ and df₂ at the real ones, relative to the roots."""
    population = _population(aspect, decay)
    spectrum = Spectrum(population.s, population.multiplicities(n))
    complex_ones = _penalties(population, **penalties)
    real_ones = np.append(np.abs(complex_ones), 0.0)
    by_root = population._replace(share=population.share / n_ratio).kappa([*complex_ones, *real_ones])
    f = population.s / (population.s + np.real(by_root[2:])[:, None])
    freedom = degrees_of_freedom(real_ones, spectrum, n)
    predicted = np.concatenate(
        [
            effective_regularization(complex_ones, spectrum, n),
            effective_regularization(real_ones, spectrum, n),
            freedom.first / n,
            freedom.second / n,
        ]
    )
    measured = np.array([*by_root, *f @ population.share, *f**2 @ population.share])
    zero = measured == 0  # κ at λ = 0 for p < n
    return _parts(np.where(zero, predicted, predicted / np.where(zero, 1, measured))), _parts(np.where(zero, 0.0, 1.0))


@asymptotic(
    "D1",
    "A sampled resolvent acts like the population's at a larger, effective penalty κ.",
    R"\lambda(\hat\Sigma+\lambda)^{-1} \asymp \kappa(\Sigma+\kappa)^{-1},\quad "
    R"\kappa - \tfrac{\kappa}{n}\mathrm{tr}\,\Sigma(\Sigma+\kappa)^{-1} = \lambda",
    source="random matrices",
    parameters=RESOLVENTS,
    tolerance=10.0,
    rate=2.0,
    sizes=SIZES,
)
def d1(
    normal: Normal, aspect: int, decay: float, law: int, row_correlation: float, weight: float, **penalties: float
) -> Sides:
    """κ tr S(Σ+κ)⁻¹ and λ tr S(Σ̂+λ)⁻¹, S ∝ Σ^weight of trace 1, the latter through the kernel."""
    population = _population(aspect, decay)
    s, share = population
    at, S = _penalties(population, **penalties)[0], s**weight / (share @ s**weight)
    kappa = complex(effective_regularization(at, Spectrum(s, share), 1.0))
    predicted = _parts(kappa * np.sum(share * S / (s + kappa)))

    def statistic(level: Level) -> np.ndarray:
        return _parts(1 - np.sum(level.diagonal(S) / (level.eigenvalues + at), axis=-1) / level.n)

    return [predicted] * 2, _extrapolated(normal, population, statistic, law, row_correlation)


@asymptotic(
    "D2",
    "Two resolvents with a matrix between them, at any two complex penalties.",
    R"\lambda_1\lambda_2(\hat\Sigma+\lambda_1)^{-1}M(\hat\Sigma+\lambda_2)^{-1} \asymp "
    R"\kappa_1\kappa_2(\Sigma+\kappa_1)^{-1}[M + a\Sigma](\Sigma+\kappa_2)^{-1}",
    source="random matrices",
    parameters=RESOLVENTS,
    tolerance=10.0,
    rate=2.0,
    sizes=SIZES,
)
def d2(
    normal: Normal, aspect: int, decay: float, law: int, row_correlation: float, weight: float, **penalties: float
) -> Sides:
    """κ₁κ₂ tr S(Σ+κ₁)⁻¹[M + aΣ](Σ+κ₂)⁻¹ and λ₁λ₂ tr S(Σ̂+λ₁)⁻¹M(Σ̂+λ₂)⁻¹ (tr SM = 1, M ∝ Σ), through the kernel."""
    population = _population(aspect, decay)
    s, share = population
    one, two = _penalties(population, **penalties)
    M, S = s, s**weight / (share @ s ** (1 + weight))
    first, second = np.asarray(effective_regularization(np.array([one, two]), Spectrum(s, share), 1.0))
    both = 1 / ((s + first) * (s + second))
    a = np.sum(share * M * s * both) / (1 - np.sum(share * s**2 * both))
    predicted = _parts(first * second * np.sum(share * S * both * (M + a * s)))

    def statistic(level: Level) -> np.ndarray:
        left, right = 1 / (level.eigenvalues + one), 1 / (level.eigenvalues + two)
        single = np.sum(level.diagonal(S * M) * (left + right), axis=-1)
        double = np.einsum("...k,...kl,...kl,...l->...", left, level.weighted(S), level.weighted(M), right)
        return _parts(1 - (single - double) / level.n)

    return [predicted] * 2, _extrapolated(normal, population, statistic, law, row_correlation)


BED = {
    "alignment": ALIGNMENT.within(-1.0, 1.0),
    "pretrain_decay": DECAY.within(0.0, 1.5),
    "noise_std": NOISE_STD.within(0.1, 1.0, highest=10.0),
    "pretrain_risk": PRETRAIN_RISK.within(0.1, 1.0),
    "fixed": Parameter(low=0, high=1, scale="whole"),
}


class Atoms(NamedTuple):
    """A problem on the atoms: Σ₁, Σ₂, Ω, E Δ and u (4,), per coordinate, scaled so that n samples see R_ft(θ₁) ≈ 1."""

    population: Population
    pretrain: np.ndarray
    spread: np.ndarray
    shift: np.ndarray
    u: np.ndarray
    noise_std: float

    @property
    def mean(self) -> np.ndarray:
        """m = E Δ."""
        return self.shift - self.u

    @property
    def second(self) -> np.ndarray:
        """diag S."""
        return self.spread + self.mean**2

    def problem(self, n: int) -> TwoTaskProblem:
        """The same as the library describes it."""
        shift = FixedShift(self.shift / n**0.5) if self.shift.any() else RandomShift(self.spread / n)
        return TwoTaskProblem(self.pretrain, self.population.s, shift, self.noise_std, self.u / n**0.5)

    def parabolas(self, linear: Callable[[np.ndarray], Any], double: Callable[..., Any]) -> np.ndarray:
        """(…, 2, 4): constant, slope, bias, variance of both domains.

        From `linear(w)`, Σ w_j f_j, and `double(S, M)`, which gives Σ M S f² + E_M and a_M.
        """
        s, share = self.population
        starts = (share @ (s * self.second), share @ (self.pretrain * self.u**2))
        slopes = (linear(s * self.second), linear(-self.pretrain * self.u * self.mean))
        domains = []
        for start, slope, M in zip(starts, slopes, (s, self.pretrain)):
            bias, variance = double(self.second, M)
            domains.append(
                np.stack([np.broadcast_to(start, np.shape(slope)), slope, bias, self.noise_std**2 * variance], -1)
            )
        return np.stack(domains, axis=-2)


def _atoms(
    aspect: int,
    decay: float,
    alignment: float,
    pretrain_decay: float,
    noise_std: float,
    pretrain_risk: float,
    fixed: int,
) -> Atoms:
    """Ω ∝ Σ^alignment, or a fixed shift with those squares; u of equal size in all coordinates, of both signs."""
    population = _population(aspect, decay)
    s, share = population
    pretrain = np.array([1.0, 2.0, 4.0, 8.0]) ** -pretrain_decay
    spread = s**alignment / (share @ s ** (1 + alignment))
    u = np.array([1.0, -1.0, 1.0, -1.0]) * (pretrain_risk / (share @ pretrain)) ** 0.5
    nothing = np.zeros(4)
    spread, shift = (nothing, spread**0.5) if fixed else (spread, nothing)
    return Atoms(population, pretrain, spread, shift, u, noise_std)


def _fields(pair: Pair[Parabola]) -> np.ndarray:
    """(hyperparameters, 2, 4) of a prediction."""
    parts = [[np.ravel(field) for field in (p.constant, p.slope, p.bias, p.variance)] for p in pair]
    return np.moveaxis(np.array(parts), -1, 0)


def _unit(fields: np.ndarray) -> np.ndarray:
    """The scale of each: slopes, which may vanish, are measured by the constant."""
    return np.abs(fields[..., [0, 0, 2, 3]])


def _by_resolvents(atoms: Atoms, penalties: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(2, 4) for the filter Re Σ_k w_k/(s+λ_k): D1 and D2 as they are written, in single and double sums."""
    s, share = atoms.population
    kappa = atoms.population.kappa(penalties)
    r = 1 / (s + kappa[:, None])  # (K, 4)
    f = (weights @ (s * r)).real

    def double(S: np.ndarray, M: np.ndarray) -> tuple[float, float]:
        pairs = r[:, None] * r  # (K, K, 4)
        a = pairs @ (share * M * s) / (1 - pairs @ (share * s**2))
        moved = kappa[:, None] * kappa * a * (pairs @ (share * S * s))
        fluctuation, variance = (np.real(weights @ table @ weights) for table in (moved, a))
        return share @ (M * S * f**2) + fluctuation, variance

    return atoms.parabolas(lambda w: share @ (w * f), double)


def _talbot(time: float, nodes: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """λ and w of (1−e^{−ts})/s on Talbot's contour, both halves."""
    phi = np.pi * np.arange(1, nodes, 2) / nodes
    z = nodes * (0.5017 * phi / np.tan(0.6407 * phi) - 0.6122 + 0.2645j * phi)
    slope = 0.5017 / np.tan(0.6407 * phi) - 0.5017 * 0.6407 * phi / np.sin(0.6407 * phi) ** 2 + 0.2645j
    w = -2j / nodes * np.exp(z) * nodes * slope / z
    return np.concatenate([z, z.conj()]) / time, np.concatenate([w, w.conj()]) / 2


def _circle(step_size: float, steps: int, nodes: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """λ and w of (1−(1−ηs)^k)/s on a circle of radius 1.2."""
    v = 1.2 * np.exp(2j * np.pi * (np.arange(nodes) + 0.5) / nodes)
    return (v - 1) / step_size, v ** (steps + 1) / (v - 1) / nodes


def _edge(population: Population) -> float:
    """Largest x at which κ(−x) is not real: where the density of Σ̂'s eigenvalues ends."""
    s, share = population
    low, high = s.max() * 1e-3, s.max() * 4 * (1 + share.sum() ** 0.5) ** 2
    for _ in range(6):
        x = np.linspace(low, high, 65)
        last = np.flatnonzero(np.abs(population.kappa(-x + 1e-30j).imag) > 1e-6 * x)[-1]
        low, high = x[last], x[last + 1]
    return float(high)


TRAINING = {
    "penalty": PENALTY.within(1e-3, 0.1, lowest=1e-9),
    "time": TIME.within(1.0, 1e3, highest=1e6),
    "speed": Parameter(low=0.1, high=0.9),  # η·s_max
    "steps": Parameter(low=1, high=16, scale="whole"),
    "more_steps": Parameter(low=17, high=40, scale="whole"),
}


@identity(
    "D3.sums",
    "The risk of every filter is the double sum over its resolvents, whatever contour they lie on.",
    R"R_\mathrm{ft}(\tau) = \textstyle\sum_j M_jS_{jj}(1-\tau f_j)^2 + \tau^2(E_M+V_M),\quad "
    R"f_j = \sum_k w_k\tfrac{s_j}{s_j+\kappa_k}",
    parameters=POPULATION
    | BED
    | {name: value._replace(lowest=None, highest=None) for name, value in TRAINING.items()}
    | {"n": Parameter(low=8, high=1024, scale="whole"), "tau": TAU.within(-0.5, 1.5)}
    | {"noise_ratio": Parameter(low=1.0, high=1.0, scale="log", lowest=0.5, highest=2.0)},
    tolerance=1e-6,
)
def d3_sums(
    normal: Normal,
    n: int,
    tau: float,
    noise_ratio: float,
    penalty: float,
    time: float,
    speed: float,
    steps: int,
    more_steps: int,
    **values: Any,
) -> Sides:
    """Constant, slope, bias and variance of min-norm, ridge, flow and descent on both domains, and a risk at τ.

    Against Talbot's contour for the flow, a circle for descent, and κ as a root of a polynomial: (9, 2, 4).
    """
    atoms = _atoms(**values)
    population = atoms.population
    step_size = speed / _edge(population)
    filters = (
        MinNorm(),
        Ridge([penalty, 10 * penalty]),
        GradientFlow([time, 10 * time]),
        GradientDescent([2 * step_size, step_size], [steps, more_steps]),
        tau * Ridge(penalty),
    )
    ridges = [([at], [1.0]) for at in (0.0, penalty, 10 * penalty)]
    flows = [_talbot(time), _talbot(10 * time), _circle(2 * step_size, steps), _circle(step_size, more_steps)]
    ensemble = ([penalty], [tau])
    problem, count = atoms.problem(n), population.multiplicities(n)
    predicted = np.concatenate([_fields(along(problem, n, filter, multiplicities=count)) for filter in filters])
    noisy = atoms._replace(noise_std=noise_ratio * atoms.noise_std)
    measured = np.stack([_by_resolvents(noisy, *map(np.asarray, nodes)) for nodes in (*ridges, *flows, ensemble)])
    at_tau = risk(problem, n, Ridge(penalty), tau, multiplicities=count)
    start, slope, bias, variance = measured[1].T
    parts = [start - 2 * tau * slope + tau**2 * bias, tau**2 * variance, start, start]
    predicted = np.concatenate([predicted, [[[*map(float, each), *[c] * 2] for each, c in zip(at_tau, start)]]])
    measured = np.concatenate([measured, np.stack(parts, axis=-1)[None]])
    unit = np.concatenate([_unit(measured[:-1]), np.abs(measured[-1:])])
    return predicted / unit, measured / unit


@identity(
    "D3.isotropic",
    "For equal eigenvalues the risk of every filter is an integral over the Marchenko–Pastur law.",
    R"\mathrm{bias}^2 = s\,\|\Delta\|^2\!\int(1-\tau x g)^2 d\mu,\quad "
    R"\mathrm{variance} = \tau^2\sigma^2\tfrac{p}{n}\,s\!\int x g^2 d\mu",
    source="random matrices",
    parameters={"aspect": POPULATION["aspect"]}
    | {name: BED[name] for name in ("alignment", "noise_std", "pretrain_risk", "fixed")}
    | {name: value._replace(lowest=None, highest=None) for name, value in TRAINING.items()}
    | {"level": Parameter(low=0.2, high=5.0, scale="log"), "decay": DECAY.within(0.0, highest=1.0)},
    tolerance=1e-6,
)
def d3_isotropic(
    normal: Normal,
    level: float,
    decay: float,
    penalty: float,
    time: float,
    speed: float,
    steps: int,
    more_steps: int,
    **values: Any,
) -> Sides:
    """Constant, slope, bias and variance of min-norm, ridge, flow and descent on both domains: (7, 2, 4).

    Σ₁ = Σ₂ = s·I, but for `decay` in the prediction.
    """
    atoms, n = _atoms(decay=decay, pretrain_decay=decay, **values), 64
    s, share = level * atoms.population.s, atoms.population.share
    aspect = share.sum()
    atoms = atoms._replace(population=Population(s, share), pretrain=level * atoms.pretrain)
    step_size = speed / (level * (1 + aspect**0.5) ** 2)
    filters = (
        MinNorm(),
        Ridge([penalty, 10 * penalty]),
        GradientFlow([time, 10 * time]),
        GradientDescent([2 * step_size, step_size], [steps, more_steps]),
    )
    problem, count = atoms.problem(n), atoms.population.multiplicities(n)
    predicted = np.concatenate([_fields(along(problem, n, filter, multiplicities=count)) for filter in filters])
    # x = s(1 + β + 2√β cos φ) makes the density smooth and periodic; mass beside it lies at x = 0 if p > n.
    phi = np.pi * (np.arange(4000) + 0.5) / 4000
    shape = 1 + aspect + 2 * aspect**0.5 * np.cos(phi)
    x, mass = level * shape, 2 * np.sin(phi) ** 2 / shape / 4000
    values_of_g = [
        1 / x,
        *(1 / (x + at) for at in (penalty, 10 * penalty)),
        *(-np.expm1(-at * x) / x for at in (time, 10 * time)),
        *((1 - (1 - eta * x) ** k) / x for eta, k in ((2 * step_size, steps), (step_size, more_steps))),
    ]
    measured = []
    for g in values_of_g:
        once, twice, noise = mass @ (x * g), mass @ (x * g) ** 2, aspect * level * mass @ (x * g**2)

        def double(S: np.ndarray, M: np.ndarray, twice: float = twice, noise: float = noise) -> tuple[float, float]:
            return level * share @ S * twice, noise

        def linear(w: np.ndarray, once: float = once) -> float:
            return share @ w * once

        isotropic = atoms._replace(population=Population(np.full(4, level), share), pretrain=np.full(4, level))
        measured.append(isotropic.parabolas(linear, double))
    unit = _unit(np.array(measured))
    return predicted / unit, np.array(measured) / unit


RISKS = DESIGN | BED


def _risks(normal: Normal, filters: list[tuple[Filter, Any]], law: int, row_correlation: float, **values: Any) -> Sides:
    """Slope, bias and variance on both domains for filters, each with its g(s) once more, of one shape (…, n)."""
    atoms, n = _atoms(**values), SIZES[-1]
    population = atoms.population
    problem, count = atoms.problem(n), population.multiplicities(n)
    predicted = np.concatenate([_fields(along(problem, n, filter, multiplicities=count)) for filter, _ in filters])

    def statistic(level: Level) -> np.ndarray:
        found = []
        for _, function in filters:
            g = function(level.eigenvalues)  # (…, n), hyperparameters in front

            def double(S: np.ndarray, M: np.ndarray, g: np.ndarray = g) -> tuple[np.ndarray, np.ndarray]:
                table = level.weighted(S) * level.weighted(M)
                bias = np.einsum("h...k,...kl,h...l->h...", g, table, g, optimize=True)
                return bias / level.n, np.sum(g**2 * level.diagonal(M), axis=-1) / level.n

            def linear(w: np.ndarray, g: np.ndarray = g) -> np.ndarray:
                return np.sum(g * level.diagonal(w), axis=-1) / level.n

            found.append(atoms.parabolas(linear, double))
        return np.moveaxis(np.concatenate(found), 0, 2)

    unit = _unit(predicted)[..., 1:]
    samples = _extrapolated(normal, population, lambda level: statistic(level)[..., 1:] / unit, law, row_correlation)
    return [predicted[..., 1:] / unit] * 2, samples


@asymptotic(
    "D3",
    "The risk of ensembles of min-norm and ridge, on both domains, follows from the population.",
    R"R(\tau) \asymp (1-\tau)^2\mathrm{tr}\,SM "
    R"+ 2\tau(1-\tau)\,\kappa\,\mathrm{tr}\,S(\Sigma+\kappa)^{-1}M + \tau^2(B + \sigma^2 a)",
    parameters=RISKS | {"penalty": TRAINING["penalty"]},
    tolerance=20.0,
    rate=2.0,
    sizes=SIZES,
)
def d3(normal: Normal, penalty: float, **values: Any) -> Sides:
    filters: list[tuple[Filter, Any]] = [
        (MinNorm(), lambda s: np.where(s > 0, 1 / np.where(s > 0, s, 1), 0)[None]),
        (Ridge([penalty, 10 * penalty]), lambda s: np.stack([1 / (s + penalty), 1 / (s + 10 * penalty)])),
    ]
    return _risks(normal, filters, **values)


@asymptotic(
    "D4",
    "So does that of gradient flow at any time, and of gradient descent, as a sum of resolvents on a contour.",
    R"e^{-t\hat\Sigma} = \tfrac{1}{2\pi i}\oint e^{\lambda t}(\hat\Sigma+\lambda)^{-1}d\lambda",
    parameters=RISKS | {name: value for name, value in TRAINING.items() if name != "penalty"},
    tolerance=20.0,
    rate=2.0,
    sizes=SIZES,
)
def d4(
    normal: Normal, time: float, speed: float, steps: int, more_steps: int, aspect: int, decay: float, **values: Any
) -> Sides:
    step_size = speed / _edge(_population(aspect, decay))

    def flowed(s: np.ndarray) -> np.ndarray:
        return np.stack([np.where(s > 0, -np.expm1(-t * s) / np.where(s > 0, s, 1), t) for t in (time, 10 * time)])

    def descended(s: np.ndarray) -> np.ndarray:
        both = ((2 * step_size, steps), (step_size, more_steps))
        return np.stack([sum(eta * (1 - eta * s) ** k for k in range(count)) for eta, count in both])

    descent = GradientDescent([2 * step_size, step_size], [steps, more_steps])
    filters: list[tuple[Filter, Any]] = [(GradientFlow([time, 10 * time]), flowed), (descent, descended)]
    return _risks(normal, filters, aspect=aspect, decay=decay, **values)


@asymptotic(
    "D4.combined",
    "And that of sums of filters, and of self-distillation: all their resolvents side by side.",
    R"g = \mathrm{Re}\textstyle\sum_k a_k\sum_l w_{kl}/(s+\lambda_{kl})",
    parameters=RISKS
    | {"penalty": PENALTY.within(1e-2, 0.1), "time": TIME.within(1.0, 1e2), "mix": Parameter(low=-1.0, high=1.0)},
    tolerance=20.0,
    rate=2.0,
    sizes=SIZES,
)
def d4_combined(normal: Normal, penalty: float, time: float, mix: float, **values: Any) -> Sides:
    weights = np.array([[0.8, 0.5, -0.2], [-0.3, 0.9, 0.3]])

    def combined(s: np.ndarray) -> np.ndarray:
        safe = np.where(s > 0, s, 1)
        flow, inverse = np.where(s > 0, -np.expm1(-time * s) / safe, time), np.where(s > 0, 1 / safe, 0)
        return np.tensordot(weights, np.stack([1 / (s + penalty), flow, inverse]), 1)

    def distilled(s: np.ndarray) -> np.ndarray:
        return np.stack([((1 - mix) + mix * s / (s + at)) / (s + at) for at in (penalty, 10 * penalty)])

    total = Combination((Ridge(penalty), GradientFlow(time), MinNorm()), weights)
    student = SelfDistillation([penalty, 10 * penalty], mix)
    return _risks(normal, [(total, combined), (student, distilled)], **values)


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
    return np.exp(-times[:, None] * s), _left(ridges, s)


def _left(ridges: rational.Ridges, s: np.ndarray) -> np.ndarray:
    """1 − s·g(s) of each filter (T, s)."""
    poles = np.asarray(ridges.penalties)[np.asarray(ridges.group)]
    return np.einsum("tk,tks->ts", np.asarray(ridges.weights) * poles, 1 / (s + poles[..., None])).real


@identity(
    "D4.plan",
    "Times are grouped by decade and step size so that each group's contour serves all of it.",
    R"t_{\max}/t < 10,\ \eta' = \eta",
    parameters={
        "time": TIME.within(1.0, 1e6, highest=1e9),
        "decades": Parameter(low=1.2, high=1.8),
        "step_size": Parameter(low=1e-3, high=10.0, scale="log"),
        "late": Parameter(low=1.0, high=1.0, highest=2.0),
    },
    tolerance=1e-8,
)
def d4_plan(normal: Normal, time: float, decades: float, step_size: float, late: float) -> Sides:
    """1 − s·g(s) at 24 times in any order, of flow, and of descent with two step sizes: (2, 24, 100)."""
    times = np.round(np.exp(np.log(20 * time) + decades * np.log(10) * np.argsort(normal(24)) / 23))
    rates = step_size * np.resize([1.0, 0.5], 24)
    flow = rational.plan(jnp.asarray(times), jnp.ones(24), concrete=True)
    descent = rational.plan(jnp.asarray(times), jnp.asarray(rates), concrete=True)
    x = np.logspace(-3, 0, 100) / times.min()  # s for flow, ηs for descent
    predicted = np.exp(-late * times[:, None] * x), np.exp(late * times[:, None] * np.log1p(-x))
    flowed = _left(rational.flow_ridges(jnp.asarray(times), flow), x)
    ridges = rational.descent_ridges(jnp.asarray(times), descent)
    descended = [
        _left(ridges._replace(weights=w[None], group=g[None]), x / rate)
        for w, g, rate in zip(ridges.weights, ridges.group, rates)
    ]
    return np.stack(predicted), np.stack([flowed, np.concatenate(descended)])


@identity(
    "D4.descent",
    "Complex ridges reproduce gradient descent: few steps at any stable rate, many at rates below 1/s.",
    R"(1-\eta s)^k \approx \mathrm{Re}\textstyle\sum_k w_k\lambda_k/(s+\lambda_k)",
    parameters={
        "step_size": Parameter(low=1e-3, high=10.0, scale="log"),
        "steps": TRAINING["steps"],
        "more_steps": Parameter(low=17, high=10_000, scale="whole"),
        "reach": Parameter(low=1.0, high=1.0, highest=2.0),  # η·s_max of the many steps
    },
    tolerance=1e-8,
)
def d4_descent(normal: Normal, step_size: float, steps: int, more_steps: int, reach: float) -> Sides:
    """1 − s·g(s) of both (2, 100)."""
    few, many = np.array([float(steps)]), np.array([float(more_steps)])
    eta, group = jnp.array([step_size]), jnp.zeros(1, int)
    circle = rational.few_steps_ridges(jnp.asarray(few), eta, group)
    contour = rational.descent_ridges(jnp.asarray(many), rational.Plan(jnp.asarray(many), eta, group))
    near, far = np.linspace(0, reach, 100) / step_size, np.linspace(0, 1.99, 100) / step_size
    powers = (1 - step_size * far) ** few, (1 - step_size * near) ** many
    return np.stack(powers), np.concatenate([_left(circle, far), _left(contour, near)])


@asymptotic(
    "D5",
    "Ridge uses up df₁ = n(1 − λ/κ) degrees of freedom.",
    R"\mathrm{tr}\,\hat\Sigma(\hat\Sigma+\lambda)^{-1} \asymp "
    R"\mathrm{tr}\,\Sigma(\Sigma+\kappa)^{-1} = n(1-\lambda/\kappa)",
    source="random matrices",
    parameters=DESIGN | {"penalty": PENALTY.within(0.1, 10.0, lowest=1e-6)},
    tolerance=10.0,
    rate=2.0,
    sizes=SIZES,
)
def d5(normal: Normal, penalty: float, aspect: int, decay: float, law: int, row_correlation: float) -> Sides:
    """df₁/n, 1 − λ/κ and tr Σ̂(Σ̂+λ)⁻¹/n, λ in units of tr Σ/n."""
    population = _population(aspect, decay)
    at, n = penalty * population.share @ population.s, SIZES[-1]
    spectrum = Spectrum(population.s, population.multiplicities(n))
    kappa = float(effective_regularization(at, spectrum, n))
    predicted = np.array([float(degrees_of_freedom(at, spectrum, n).first) / n, 1 - at / kappa])

    def statistic(level: Level) -> np.ndarray:
        used = np.mean(level.eigenvalues / (level.eigenvalues + at), axis=-1)
        return np.stack([used, used], axis=-1)

    return [predicted] * 2, _extrapolated(normal, population, statistic, law, row_correlation)


@identity(
    "D5.signal",
    "The signal-to-noise ratio is the risk of the pretrained weights over the noise variance.",
    R"\mathrm{SNR} = \mathrm{tr}\,S\Sigma_2/\sigma^2,\quad S = \Omega + mm^\top",
    parameters=POPULATION | BED | {"u_ratio": Parameter(low=1.0, high=1.0, highest=2.0)},
    tolerance=1e-12,
)
def d5_signal(normal: Normal, u_ratio: float, **values: Any) -> Sides:
    atoms = _atoms(**values)
    s, other = atoms.population.s, atoms._replace(u=u_ratio * atoms.u)
    return float(signal_to_noise(atoms.problem(1))), float(s @ other.second / atoms.noise_std**2)


@inequality(
    "D5.edge",
    "The eigenvalues of a sampled covariance end where the effective penalty ceases to be real, up to 1%.",
    R"s_\mathrm{max} = \min_{x > s_1} x\,\bigl(1 + \tfrac1n\textstyle\sum_j \tfrac{s_j}{x - s_j}\bigr)",
    parameters=POPULATION
    | {"n": Parameter(low=8, high=1024, scale="whole"), "scale": Parameter(low=1.0, high=1.0, highest=2.0)},
    tolerance=1e-4,
)
def d5_edge(normal: Normal, aspect: int, decay: float, n: int, scale: float) -> Sides:
    """The edge by the grid over the one by bisection, minus 1, and 1% minus that."""
    population = _population(aspect, decay)
    above = (
        float(spectral_edge(Spectrum(scale * population.s, population.multiplicities(n)), n)) / _edge(population) - 1
    )
    return 0.0, np.array([above, 0.01 - above])


RANKS = {
    "decay": DECAY.within(0.0, 3.0),
    "roughness": Parameter(low=0.0, high=2.0, highest=10.0),
    "k": Parameter(low=0, high=39, scale="whole"),
}


def _rough(normal: Normal, decay: float, roughness: float) -> np.ndarray:
    return np.arange(1.0, 41.0) ** -decay * np.exp(roughness * normal(40))


@identity(
    "D5.tail",
    "The effective ranks of benign overfitting count the tail beyond the k-th eigenvalue.",
    R"r_k = \textstyle\sum_{i>k}\lambda_i/\lambda_{k+1},\quad R_k = (\sum_{i>k}\lambda_i)^2/\sum_{i>k}\lambda_i^2",
    source="Bartlett et al. 2020",
    parameters=RANKS | {"k_off": Parameter(low=0, high=0, scale="whole", highest=3)},
    tolerance=1e-9,
)
def d5_tail(normal: Normal, decay: float, roughness: float, k: int, k_off: int) -> Sides:
    """r_k and R_k, of 40 eigenvalues, and of each of them three times, in any order."""
    s = _rough(normal, decay, roughness)
    predicted, measured = [], []
    for times in (1, 3):
        predicted += list(effective_ranks(Spectrum(s, np.full(40, float(times))), times * k))
        tail = np.sort(np.repeat(s, times))[::-1][min(times * k + k_off, 40 * times - 1) :]
        measured += [tail.sum() / tail[0], tail.sum() ** 2 / np.sum(tail**2)]
    return np.array([float(x) for x in predicted]) / measured, np.ones(4)


@inequality(
    "D5.ranks",
    "The effective ranks of benign overfitting are ordered.",
    R"r_k \le R_k \le r_k^2",
    source="Bartlett et al. 2020",
    parameters=RANKS,
    tolerance=1e-12,
)
def d5_ranks(normal: Normal, decay: float, roughness: float, k: int) -> Sides:
    """1 − r_k/R_k and 1 − R_k/r_k²."""
    r, R = (float(rank) for rank in effective_ranks(_rough(normal, decay, roughness), k))
    return 0.0, np.array([1 - r / R, 1 - R / r**2])
