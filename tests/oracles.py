"""Brute-force numpy algebra, p×p matrices and all, against which the kernels are checked."""

import numpy as np

from linfit import Dense, Diagonal, Empirical, FixedShift, RandomShift, TwoTaskProblem
from linfit.covariance import Covariance


def matrix_of(covariance: Covariance) -> np.ndarray:
    if isinstance(covariance, Dense):
        return np.asarray(covariance.matrix)
    if isinstance(covariance, Empirical):
        features = np.asarray(covariance.features)
        return features.T @ features / len(features)
    return np.diag(np.asarray(covariance.diagonal()))


def random_matrix(generator: np.random.Generator, p: int, decay: float) -> np.ndarray:
    """A covariance with power-law spectrum and random eigenvectors."""
    basis, _ = np.linalg.qr(generator.standard_normal((p, p)))
    matrix = basis * np.arange(1, p + 1) ** -decay @ basis.T
    return (matrix + matrix.T) / 2


def covariance_of(kind: str, generator: np.random.Generator, p: int) -> Covariance:
    """A diagonal, dense, short or tall empirical covariance, none of them special."""
    if kind == "diagonal":
        return Diagonal(generator.uniform(0.1, 2, p))
    if kind == "dense":
        return Dense(random_matrix(generator, p, 0.7))
    m = 4 if kind == "empirical-short" else 20
    return Empirical(generator.standard_normal((m, p)) * generator.uniform(0.3, 2, p))


def problems(seed: int, p: int = 24) -> dict[str, TwoTaskProblem]:
    """Every kind of covariance and shift, non-commuting ones included; nothing is the identity by accident."""
    generator = np.random.default_rng(seed)
    diagonal = [np.sort(generator.uniform(0.2, 2, p))[::-1] for _ in range(3)]
    dense = [random_matrix(generator, p, decay) for decay in (1.0, 0.5, 0.8)]
    features = [Empirical(generator.standard_normal((m, p)) * generator.uniform(0.3, 2, p)) for m in (40, 15, 30)]
    u = generator.standard_normal(p) * 0.4
    delta = generator.standard_normal(p)
    return {
        "diagonal-random": TwoTaskProblem(diagonal[0], diagonal[1], RandomShift(diagonal[2]), 0.7),
        "diagonal-random-u": TwoTaskProblem(diagonal[0], diagonal[1], RandomShift(diagonal[2]), 0.7, u),
        "diagonal-fixed-u": TwoTaskProblem(diagonal[0], diagonal[1], FixedShift(delta), 0.7, u),
        "isotropic-shift": TwoTaskProblem(diagonal[0], diagonal[0], RandomShift(np.full(p, 0.3)), 0.5),
        "isotropic-all-u": TwoTaskProblem(np.full(p, 2.0), np.full(p, 0.7), RandomShift(np.full(p, 0.3)), 0.5, u),
        "head-aligned": TwoTaskProblem(diagonal[0], diagonal[0], RandomShift(3 * diagonal[0]), 0.5),
        "tail-aligned": TwoTaskProblem(diagonal[0], diagonal[0], RandomShift(2 / diagonal[0]), 0.5),
        "dense-random-u": TwoTaskProblem(dense[0], dense[1], RandomShift(dense[2]), 0.4, u),
        "dense-fixed": TwoTaskProblem(dense[0], dense[1], FixedShift(delta), 0.4),
        "dense-isotropic": TwoTaskProblem(dense[0], dense[1], RandomShift(np.full(p, 0.2)), 0.4, u),
        "empirical-random-u": TwoTaskProblem(*features[:2], RandomShift(features[2]), 0.6, u),
        "mixed": TwoTaskProblem(dense[0], features[0], RandomShift(diagonal[1]), 0.6, u),
        "noiseless-fixed": TwoTaskProblem(diagonal[0], dense[0], FixedShift(delta), 0.0, u),
    }


def fitted_operator(X: np.ndarray, g_of_s) -> np.ndarray:
    """The p×n matrix R with θ̂ = θ₁ + R(y − Xθ₁), through the primal p×p eigendecomposition where possible."""
    s, U = np.linalg.eigh(X @ X.T / len(X))
    return X.T @ (U * g_of_s(np.maximum(s, 0))) @ U.T / len(X)


def brute_force_risk(X, R, problem: TwoTaskProblem, tau: float = 1.0):
    """((bias, variance) fine-tuning, (bias, variance) pretraining) by p×p algebra, E over the noise and the shift."""
    p = X.shape[1]
    sigma_1, sigma_2 = matrix_of(problem.pretrain_covariance), matrix_of(problem.finetune_covariance)
    u = np.zeros(p) if problem.pretrain_error is None else np.asarray(problem.pretrain_error)
    sigma = float(problem.noise_std)
    T = tau * R
    # θ̂ = u + T(X(δ − u) + ε), with θ₁* = 0; as a function of the shift: A δ + a + Tε
    if isinstance(problem.shift, FixedShift):
        mean, spread = np.asarray(problem.shift.vector), np.zeros((p, p))
    else:
        mean, spread = np.zeros(p), matrix_of(problem.shift.covariance)

    def quadratic(A, a, sigma_test):  # E ‖Aδ + a‖²
        centre = A @ mean + a
        return np.trace(A.T @ sigma_test @ A @ spread) + centre @ sigma_test @ centre

    a = u - T @ X @ u
    finetune = quadratic(T @ X - np.eye(p), a, sigma_2)
    pretrain = quadratic(T @ X, a, sigma_1)
    variances = [sigma**2 * np.trace(T.T @ M @ T) for M in (sigma_2, sigma_1)]
    return (finetune, variances[0]), (pretrain, variances[1])


def numpy_descent(start, gradient, rates, penalty=0.0, reference=None):
    """Gradient descent of a two-layer network as a plain loop; the states before every step and after the last."""
    w1, w2 = (np.array(weights) for weights in start)
    r1, r2 = (w1, w2) if reference is None else (np.array(weights) for weights in reference)
    states = [(w1, w2)]
    for rate in rates:
        g = gradient(w1 @ w2)
        w1, w2 = w1 - rate * (g @ w2.T + penalty * (w1 - r1)), w2 - rate * (w1.T @ g + penalty * (w2 - r2))
        states.append((w1, w2))
    return states
