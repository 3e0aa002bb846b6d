"""What the claims share: problems from parameters and normals, and the p × p algebra they are measured by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from linfit import FixedShift, GradientDescent, GradientFlow, MinNorm, RandomShift, Ridge, TwoTaskProblem, risk_forms
from linfit.covariance import Covariance, Dense, Diagonal, Empirical
from linfit.problem import Pair
from sims.claims import Normal
from sims.parameters import DECAY, NOISE_STD, PENALTY, TAU, TIME, Parameter

SIZES = ((10, 25), (16, 20), (24, 12))
"""(n, p) of the exact claims, the last with more samples than features; few, because every new shape is compiled."""

EXACT = {
    "size": Parameter(low=0, high=len(SIZES) - 1, scale="whole"),
    "decay": DECAY.within(0.0, 1.5),
    "fixed": Parameter(low=0, high=1, scale="whole"),
    "noise_std": NOISE_STD.within(1e-3**0.5, 10**0.5),
    "pretrain_size": Parameter(low=0.1, high=1.0, scale="log"),
    "tau": TAU.within(-0.5, 1.5),
    "penalty": PENALTY.within(1e-3, 10.0),
    "time": TIME.within(0.1, 100.0),
    "speed": Parameter(low=0.1, high=1.9),  # η·s_max
    "steps": Parameter(low=1, high=30, scale="whole"),
}
"""Assumptions of the claims that are exact for any problem and any design."""

EXTREMES = {
    "noise_std": NOISE_STD.within(1e-3**0.5, 10**0.5, lowest=1e-3, highest=1e3**0.5),
    "decay": DECAY.within(0.0, 1.5, highest=3.0),
}
"""Ranges of two of them with ends to walk to."""


def without(*names: str) -> dict[str, Parameter]:
    """`EXACT` but for some."""
    return {name: value for name, value in EXACT.items() if name not in names}


class Moments(NamedTuple):
    """A problem as matrices and vectors: Σ₁, Σ₂, S = E ΔΔᵀ, E Δ, u, σ; and the risks of θ̂ = θ₁ + R(y − Xθ₁)."""

    pretrain: np.ndarray
    finetune: np.ndarray
    second: np.ndarray
    mean: np.ndarray
    u: np.ndarray
    noise_std: float

    def risks(self, X: np.ndarray, R: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """[[bias², variance] fine-tuning, [bias², variance] pretraining] by traces; `noise` (n, n): its correlation."""
        learned = R @ X
        missed = learned - np.eye(len(learned))
        spread = R @ (np.eye(len(X)) if noise is None else noise) @ R.T * self.noise_std**2
        finetune = np.trace(self.finetune @ missed @ self.second @ missed.T)
        moved = self.u @ self.pretrain @ self.u + 2 * self.u @ self.pretrain @ learned @ self.mean
        pretrain = moved + np.trace(self.pretrain @ learned @ self.second @ learned.T)
        return np.array([[finetune, np.trace(self.finetune @ spread)], [pretrain, np.trace(self.pretrain @ spread)]])

    def totals(self, X: np.ndarray, R: np.ndarray) -> np.ndarray:
        """[R_ft, R_pre]."""
        return self.risks(X, R).sum(axis=1)

    def best_map(self, X: np.ndarray) -> np.ndarray:
        """R (p, n) = SXᵀ(XSXᵀ + σ²I)⁻¹, the best linear estimator of all, spectral or not."""
        return self.second @ X.T @ np.linalg.inv(X @ self.second @ X.T + self.noise_std**2 * np.eye(len(X)))


def matrix_of(covariance: Covariance) -> np.ndarray:
    """Σ (p, p) from what is stored, without the operator's own methods."""
    if isinstance(covariance, Diagonal):
        return np.diag(np.asarray(covariance.eigenvalues))
    if isinstance(covariance, Dense):
        return np.asarray(covariance.matrix)
    assert isinstance(covariance, Empirical)
    features = np.asarray(covariance.features)
    return features.T @ features / len(features)


def moments(problem: TwoTaskProblem) -> Moments:
    """The problem as matrices and vectors, from what it was made of."""
    u = np.zeros(problem.p) if problem.pretrain_error is None else np.asarray(problem.pretrain_error)
    mean, spread = -u, np.zeros((problem.p, problem.p))
    if isinstance(problem.shift, FixedShift):
        mean = np.asarray(problem.shift.vector) - u
    else:
        spread = matrix_of(problem.shift.covariance)
    pretrain, finetune = matrix_of(problem.pretrain_covariance), matrix_of(problem.finetune_covariance)
    return Moments(pretrain, finetune, spread + np.outer(mean, mean), mean, u, float(problem.noise_std))


def agree(value: Any, other: Any, tolerance: float = 1e-9) -> np.ndarray:
    """What an inequality needs of two ways to one number, in units of the tolerance: positive if they agree."""
    return 1 - np.abs(np.asarray(value) / np.asarray(other) - 1) / tolerance


class Primal(NamedTuple):
    """Filters by what they learn of each principal direction of X, h = s·g(s) (p,): R = hᵀCh + q·(h²/s), s = 0 aside.

    Measured among the eigenvectors of XᵀX/n, so without the kernel XXᵀ and its quadratic form.
    """

    eigenvalues: np.ndarray
    """s (p,) of XᵀX/n, 0 where X does not reach."""
    cross: np.ndarray
    """C (p, p): bias² = (1−h)ᵀC(1−h)."""
    noise: np.ndarray
    """σ²(VᵀΣ₂V)_jj/n (p,)."""

    def along(self, g: np.ndarray) -> tuple[float, float, float]:
        """(c, b, a) of R_ft(τ) = c − 2bτ + aτ² for filter values g (p,), term by term: no cancellation at small g."""
        learned = self.eigenvalues * g
        curvature = learned @ self.cross @ learned + g**2 @ (self.eigenvalues * self.noise)
        return float(self.cross.sum()), float(self.cross.sum(axis=1) @ learned), float(curvature)

    def risk(self, g: np.ndarray) -> float:
        """R_ft of filter values g (p,)."""
        start, slope, curvature = self.along(g)
        return start - 2 * slope + curvature

    def least_risk(self) -> float:
        """That of the best values, by normal equations over the directions that X reaches."""
        reached = self.eigenvalues > 0
        matrix = self.cross[np.ix_(reached, reached)] + np.diag(self.noise[reached] / self.eigenvalues[reached])
        g = np.zeros(reached.size)
        g[reached] = np.linalg.solve(matrix, self.cross.sum(axis=1)[reached]) / self.eigenvalues[reached]
        return self.risk(g)


def primal(X: np.ndarray, m: Moments) -> Primal:
    """A design and a problem seen from the features."""
    n = len(X)
    s, V = np.linalg.eigh(X.T @ X / n)
    s = np.where(s > 1e-12 * s[-1], s, 0.0)
    test = V.T @ m.finetune @ V
    return Primal(s, (V.T @ m.second @ V) * test, m.noise_std**2 * np.diag(test) / n)


class Exact(NamedTuple):
    """A design, a problem with nothing special about it, four filters, and the same fine-tuners as plain matrices."""

    X: np.ndarray
    problem: TwoTaskProblem
    moments: Moments
    forms: Pair
    filters: list[Any]
    maps: np.ndarray
    """R (4, p, n) with θ̂ = θ₁ + R(y − Xθ₁), without an eigendecomposition of the kernel."""
    tau: float

    def totals(self, R: np.ndarray) -> np.ndarray:
        """[R_ft, R_pre] of θ̂ = θ₁ + R(y − Xθ₁)."""
        return self.moments.totals(self.X, R)


def exact_instance(
    normal: Normal,
    *,
    size: int,
    decay: float,
    fixed: int,
    noise_std: float,
    pretrain_size: float,
    tau: float,
    penalty: float,
    time: float,
    speed: float,
    steps: int,
) -> Exact:
    """Σ₁, Σ₂, Ω dense with power-law spectra and unrelated eigenvectors; δ random, or fixed if `fixed`; u ≠ 0."""
    n, p = SIZES[size]
    pretrain, finetune, spread = (dense_covariance(normal(p, p), decay) for _ in range(3))
    shift = FixedShift(normal(p)) if fixed else RandomShift(spread)
    problem = TwoTaskProblem(pretrain, finetune, shift, noise_std, pretrain_size * normal(p))
    X = normal(n, p) @ scipy.linalg.cholesky(finetune)
    step_size = float(speed * n / np.linalg.norm(X, 2) ** 2)
    filters = [MinNorm(), Ridge(penalty), GradientFlow(time), GradientDescent(step_size, steps)]
    maps = np.stack([np.linalg.pinv(X), ridge_map(X, penalty), flow_map(X, time), descent_map(X, step_size, steps)])
    return Exact(X, problem, moments(problem), risk_forms(X, problem), filters, maps, tau)


def dense_covariance(latent: np.ndarray, decay: float) -> np.ndarray:
    """Eigenvalues j^(−decay) in the basis that QR makes of `latent` (p, p)."""
    basis, _ = np.linalg.qr(latent)
    matrix = basis * (1.0 + np.arange(len(latent))) ** -decay @ basis.T
    return (matrix + matrix.T) / 2


def ridge_map(X: np.ndarray, penalty: float) -> np.ndarray:
    """R (p, n) of ridge, through the p × p system."""
    n, p = X.shape
    return np.linalg.solve(X.T @ X / n + penalty * np.eye(p), X.T / n)


def flow_map(X: np.ndarray, time: float) -> np.ndarray:
    """∫₀ᵗ e^{−sΣ̂} ds Xᵀ/n, the integral as a block of one matrix exponential."""
    n, p = X.shape
    generator = np.zeros((2 * p, 2 * p))
    generator[:p, :p], generator[:p, p:] = -time * X.T @ X / n, time * np.eye(p)
    return scipy.linalg.expm(generator)[:p, p:] @ X.T / n


def descent_map(X: np.ndarray, step_size: float, steps: int) -> np.ndarray:
    """The iteration itself, on all unit residuals at once."""
    n, p = X.shape
    R = np.zeros((p, n))
    for _ in range(steps):
        R = R + step_size / n * X.T @ (np.eye(n) - X @ R)
    return R


def shifts(normal: Normal, problem: TwoTaskProblem, count: int) -> np.ndarray:
    """Samples of δ (p, count), the pretraining optimum at 0; all equal for a fixed shift."""
    if isinstance(problem.shift, FixedShift):
        return np.repeat(np.asarray(problem.shift.vector)[:, None], count, 1)
    return np.linalg.cholesky(matrix_of(problem.shift.covariance)) @ normal(problem.p, count)


def parabola(risk: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """(c, b, a) of R(τ) = c − 2bτ + aτ² from its values at τ = 0, ½ and 1; the vertex is at b/a."""
    start, half, end = (risk(tau) for tau in (0.0, 0.5, 1.0))
    return start, (3 * start - 4 * half + end) / 2, 2 * (end - 2 * half + start)


def skewed(normal: Normal, skewness: float, count: int) -> np.ndarray:
    """Standardised mixtures (count,) of z and z² − 1, `skewness` the share of the latter."""
    z = normal(count)
    return ((1 - skewness) * z + skewness * (z**2 - 1)) / ((1 - skewness) ** 2 + 2 * skewness**2) ** 0.5


def autocorrelation(n: int, correlation: float) -> np.ndarray:
    """(n, n) of rows in sequence: correlation^|i−j|."""
    return scipy.linalg.toeplitz(correlation ** np.arange(n))
