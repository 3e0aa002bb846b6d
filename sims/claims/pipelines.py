"""§9 as claims: the risk of every task along a pipeline of stages (docs, P1)."""

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize

from linfit import GradientDescent, GradientFlow, MinNorm, RandomShift, Ridge, TwoTaskProblem, spectra
from linfit.pipelines import exact_risks
from sims.claims import Normal, Sides, asymptotic, existence, identity, inequality, statistical
from sims.parameters import DECAY, NOISE_STD, PENALTY, TAU, TIME, Parameter
from theory.equivalents import risk
from theory.movement import movement
from theory.pipelines import Stage, best_source_size, bias_and_variance, risks, transfer

SIZES, REPLICATES, STAGES = (32, 96), 16, 3

RECIPE = {
    "decay": DECAY.within(0.0, 1.2),
    "similarity": Parameter(low=-0.45, high=0.95),  # of every pair; three tasks allow no less than −½
    "noise_std": NOISE_STD.within(0.2, 1.0),
    "penalty": PENALTY.within(1e-2, 1.0),  # in units of tr Σ/n
    "time": TIME.within(0.5, 20.0),  # in units of n/tr Σ
    "tau": TAU.within(0.3, 1.4),
    "anchor": Parameter(low=-1, high=1, scale="whole"),
}
"""Three stages on three tasks: ridge, flow with τ, and min-norm with 1.2 − τ/2 that averages with stage `anchor`."""


class Recipe(NamedTuple):
    """A pipeline of three stages as plain numbers."""

    spectra: np.ndarray
    """(3, p): falling, the same backwards, flat with zeros at its end."""
    correlation: np.ndarray
    profile: np.ndarray
    """Second moments of the optima: correlation (3, 3) times profile (p,)."""
    n: list[int]
    noise_std: list[float]
    filters: list[Any]
    tau: list[float]
    sources: list[int]

    @property
    def targets(self) -> np.ndarray:
        """(3, 3, p)."""
        return self.correlation[:, :, None] * self.profile

    def stages(self) -> list[Stage]:
        """The same for the theory."""
        rows = zip(self.spectra, self.n, self.noise_std, self.filters, self.tau, strict=True)
        return [Stage(*row, average_with=source) for row, source in zip(rows, self.sources, strict=True)]


def _recipe(
    n: int, decay: float, similarity: float, noise_std: float, penalty: float, time: float, tau: float, anchor: int
) -> Recipe:
    p = 2 * n
    falling = np.asarray(spectra.power_law(p, decay, trace=float(p)))
    rows = np.stack([falling, falling[::-1], np.where(np.arange(p) < p - p // 8, 1.0, 0.0)])
    correlation = np.where(np.eye(STAGES, dtype=bool), 1.0, similarity)
    profile = np.linspace(0.2, 1.8, p) / p
    samples = [n, n // 2, n]
    unit = rows.sum(axis=1) / samples
    filters = [Ridge(penalty * unit[0]), GradientFlow(time / unit[1]), MinNorm()]
    noise, taus = [noise_std, 0.5 * noise_std, noise_std], [1.0, tau, 1.2 - tau / 2]
    return Recipe(rows, correlation, profile, samples, noise, filters, taus, [-1, 0, anchor])


def _solved(X: np.ndarray, filter: Any) -> np.ndarray:
    """R (p, n) with θ̂ = θ + R(y − Xθ)."""
    n, p = X.shape
    if isinstance(filter, Ridge):
        return np.linalg.solve(X.T @ X / n + float(filter.penalty) * np.eye(p), X.T) / n
    kernel = X @ X.T / n
    if isinstance(filter, MinNorm):
        return np.linalg.solve(kernel, X).T / n
    return scipy.linalg.solve(kernel, (np.eye(n) - scipy.linalg.expm(-float(filter.time) * kernel)) @ X).T / n


def _conditional(recipe: Recipe, designs: list[np.ndarray]) -> np.ndarray:
    """[bias², variance] (2, K, T) given the designs, from the maps W (p, N) of all labels to the weights."""
    ends, p = np.cumsum([len(X) for X in designs]), recipe.spectra.shape[1]
    blocks = [slice(end - len(X), end) for end, X in zip(ends, designs, strict=True)]
    variances = np.concatenate([np.full(len(X), s**2) for X, s in zip(designs, recipe.noise_std, strict=True)])
    maps, results = [np.zeros((p, ends[-1]))], []
    for X, block, filter, tau, source in zip(designs, blocks, recipe.filters, recipe.tau, recipe.sources, strict=True):
        missed = -X @ maps[-1]
        missed[:, block] += np.eye(len(X))
        maps.append((1 - tau) * maps[source + 1] + tau * (maps[-1] + _solved(X, filter) @ missed))
        learned = [maps[-1][:, block] @ design for block, design in zip(blocks, designs, strict=True)]
        results.append([_bias_and_variance(recipe, learned, maps[-1], variances, task) for task in range(STAGES)])
    return np.moveaxis(np.array(results), -1, 0)


def _bias_and_variance(
    recipe: Recipe, learned: list[np.ndarray], W: np.ndarray, variances: np.ndarray, task: int
) -> tuple[float, float]:
    """With optima as combinations (root of the correlation) of independent ones."""
    M, bias = recipe.spectra[task], 0.0
    for column in np.linalg.cholesky(recipe.correlation).T:
        missed = sum(weight * A for weight, A in zip(column, learned, strict=True)) - column[task] * np.eye(len(M))
        bias += M @ (missed**2 @ recipe.profile)
    return bias, M @ (W**2 @ variances)


def _designs(normal: Normal, recipe: Recipe, shared: float, rotation: float, tail: float) -> list[np.ndarray]:
    """Gaussian designs; `shared` rows are those of the first stage, `rotation` turns the second eigenbasis, `tail`
    multiplies rows by a log-normal of mean square 1.
    """
    first, designs = None, []
    for k, (n, s) in enumerate(zip(recipe.n, recipe.spectra, strict=True)):
        latent = normal(n, len(s))
        if first is not None and shared:
            count = round(shared * min(n, len(first)))
            latent[:count] = first[:count]
        first = latent if first is None else first
        X = latent * np.sqrt(s)
        if rotation and k == 1:
            half, angle = len(s) // 2, rotation * np.pi / 2
            left, right = X[:, :half].copy(), X[:, half:].copy()
            X = np.hstack([np.cos(angle) * left - np.sin(angle) * right, np.sin(angle) * left + np.cos(angle) * right])
        if tail:
            X = X * np.exp(tail * normal(n, 1) - tail**2)
        designs.append(X)
    return designs


@asymptotic(
    "P1",
    "Every task's bias and variance after every stage follows from p-vectors.",
    R"q \leftarrow (1-\varphi)^2q + 2\varphi(1-\varphi)c_k + \varphi^2T_{kk} + \mathrm{Var},\quad "
    R"c_b \leftarrow (1-\varphi)c_b + \varphi T_{kb}",
    parameters=RECIPE
    | {"shared": Parameter(highest=1.0), "rotation": Parameter(highest=1.0), "tail": Parameter(highest=1.0)},
    tolerance=3.0,
    sizes=SIZES,
)
def p1(normal: Normal, shared: float, rotation: float, tail: float, **values: Any) -> Sides:
    """Ratios to the prediction (18,), sampled designs against it."""
    predicted, measured = [], []
    for n in SIZES:
        recipe = _recipe(n, **values)
        expected = np.stack(bias_and_variance(recipe.stages(), recipe.targets, recipe.spectra))
        samples = [
            _conditional(recipe, _designs(normal, recipe, shared, rotation, tail)) / expected for _ in range(REPLICATES)
        ]
        predicted.append(np.ones(expected.size))
        measured.append(np.stack(samples).reshape(REPLICATES, -1))
    return predicted, measured


@identity(
    "P1.exact",
    "Given the designs the risks of a pipeline are traces of matrices as large as all samples together.",
    R"L_k = (1-\tau)L_a + \tau[L_{k-1} + E^\top G(E - XZ^\top L_{k-1})]",
    parameters=RECIPE,
    tolerance=1e-7,
)
def p1_exact(normal: Normal, **values: Any) -> Sides:
    """[bias², variance] (2, 3, 3) through kernels of all designs, and through p × p covariances."""
    recipe = _recipe(10, **values)
    designs = _designs(normal, recipe, 0.0, 0.0, 0.0)
    options: dict[str, Any] = {"noise_std": recipe.noise_std, "tau": recipe.tau, "average_with": recipe.sources}
    exact = exact_risks(designs, recipe.filters, recipe.targets, recipe.spectra, **options)
    return np.stack(exact), _conditional(recipe, designs)


FILTERS = 4


@identity(
    "P1.movement",
    "The movements of single coordinates add up to the equivalent of the risk.",
    R"R(\tau) = \textstyle\sum_j M_j[(1-\tau f_j)^2 S_{jj} + \tau^2 \mathrm{Var}_j]",
    parameters={
        "decay": DECAY.within(0.0, 2.0),
        "noise_std": NOISE_STD.within(0.1, 1.0),
        "samples": Parameter(low=5, high=80, scale="log"),  # of 40 coordinates, 35 of them with data
        "penalty": PENALTY.within(1e-3, 10.0),
        "time": TIME.within(0.1, 1e3),
        "steps": Parameter(low=1, high=60, scale="whole"),
        "tau": TAU.within(-0.5, 1.5),
    },
    tolerance=1e-7,
)
def p1_movement(
    normal: Normal, decay: float, noise_std: float, samples: float, penalty: float, time: float, steps: int, tau: float
) -> Sides:
    """[R_ft, R_pre] (4, 2) of four filters, relative to the second side."""
    p = 40
    s = np.asarray(spectra.power_law(p, decay)) * (np.arange(p) < 35)
    M, S = np.exp(normal(p)), np.exp(normal(p))
    problem = TwoTaskProblem(M, s, RandomShift(S), noise_std=noise_std)
    step_size = 0.5 / (s.max() ** 0.5 + (s.sum() / samples) ** 0.5) ** 2
    predicted, measured = [], []
    for filter in (MinNorm(), Ridge(penalty), GradientFlow(time), GradientDescent(step_size, steps)):
        moved = movement(filter, s, samples)
        f, spread = np.asarray(moved.fraction), np.asarray(moved.variance(S, noise_std))
        finetune = s @ ((1 - tau * f) ** 2 * S + tau**2 * spread)
        pretrain = tau**2 * M @ (f**2 * S + spread)
        reference = np.array([float(part.total) for part in risk(problem, samples, filter, tau)])
        measured.append(reference / reference)
        predicted.append(np.array([finetune, pretrain]) / reference)
    return np.array(predicted), np.array(measured)


def _expanded(recipe: Recipe) -> np.ndarray:
    """[bias², variance] (2, K, T) of ridges and min-norm: the weights as sums over optima and fluctuations.

    Coordinate j is Σ_t α_t θ*_t + Σ_i β_i ξ_i with independent ξ_i of variance 1, one for each stage and source.
    """
    K, p = len(recipe.n), recipe.spectra.shape[1]
    weights, results = [np.zeros((K + 2 * K, p))], []
    covariance = np.zeros((3 * K, 3 * K, p))
    covariance[:K, :K] = recipe.targets
    covariance[range(K, 3 * K), range(K, 3 * K)] = 1.0

    def product(first: np.ndarray, second: np.ndarray, parts: np.ndarray) -> np.ndarray:
        return np.einsum("aj,abj,bj->j", first * parts[:, None], covariance, second * parts[:, None])

    optima = np.concatenate([np.eye(K), np.zeros((2 * K, K))])[:, :, None] * np.ones(p)
    signal = np.r_[np.ones(K), np.tile([1.0, 0.0], K)]  # fluctuations come in pairs: of signal, of noise
    noise = np.r_[np.zeros(K), np.tile([0.0, 1.0], K)]
    rows = zip(recipe.spectra, recipe.n, recipe.noise_std, recipe.filters, recipe.tau, recipe.sources, strict=True)
    for k, (s, n, noise_std, filter, tau, source) in enumerate(rows):
        kappa = _root(float(getattr(filter, "penalty", 0.0)), s, n)
        f, gap = s / (s + kappa), optima[:, k] - weights[-1]
        new = (1 - tau) * weights[source + 1] + tau * (weights[-1] + f * gap)
        gain = s / (s + kappa) ** 2 / (n - np.sum(f**2))
        for index, parts in enumerate((signal, noise)):
            excess = kappa**2 * np.sum(product(gap, gap, parts) * s / (s + kappa) ** 2) + index * noise_std**2
            new[K + 2 * k + index] = tau * np.sqrt(gain * excess)
        weights.append(new)
        missed = [new - optima[:, task] for task in range(K)]
        test = [
            [M @ product(e, e, parts) for M, e in zip(recipe.spectra, missed, strict=True)] for parts in (signal, noise)
        ]
        results.append(test)
    return np.moveaxis(np.array(results), 1, 0)


def _root(penalty: float, s: np.ndarray, n: float) -> float:
    """κ of D1, by bisection."""
    if penalty == 0 and np.sum(s > 0) <= n:
        return 0.0
    upper = penalty + s.sum() / n
    return float(scipy.optimize.brentq(lambda x: x - x / n * np.sum(s / (s + x)) - penalty, 1e-9, upper, xtol=1e-15))


@identity(
    "P1.recursion",
    "The recursion over second moments is the expansion in all optima and all fluctuations.",
    R"\theta_k = \textstyle\sum_t \alpha_{kt}\theta^*_t + \sum_{i\le k}\beta_{ki}\xi_i",
    parameters={name: value for name, value in RECIPE.items() if name != "time"},
    tolerance=1e-8,
)
def p1_recursion(normal: Normal, **values: Any) -> Sides:
    """[bias², variance] (2, 3, 3) of ridge, ridge and min-norm, relative to the second side."""
    recipe = _recipe(20, time=1.0, **values)
    second = Ridge(2 * values["penalty"] * recipe.spectra[1].sum() / recipe.n[1])
    profile = recipe.profile * np.exp(0.5 * normal(recipe.profile.size))
    recipe = recipe._replace(filters=[recipe.filters[0], second, MinNorm()], profile=profile)
    expanded = _expanded(recipe)
    return np.stack(bias_and_variance(recipe.stages(), recipe.targets)) / expanded, np.ones_like(expanded)


@statistical(
    "P1.transfer",
    "A source, then a target, both isotropic min-norm: the risk on the target, exactly.",
    R"\tfrac{p-n}{p}\Big[\tfrac{p-n_q}{p}\|\beta\|^2 + \tfrac{n_q}{p}\|\delta\|^2 + \tfrac{\sigma_q^2n_q}{p-n_q-1}\Big]"
    R" + \tfrac{\sigma^2n}{p-n-1}",
    source="paper 2510.15337",
    parameters={
        "source_n": Parameter(low=1, high=20, scale="whole"),
        "n": Parameter(low=1, high=20, scale="whole"),
        "shift": Parameter(low=0.0, high=2.0),
        "source_noise_std": NOISE_STD.within(0.1, 1.0),
        "noise_std": NOISE_STD.within(0.1, 1.0),
        "tail": Parameter(highest=1.5),
    },
)
def p1_transfer(
    normal: Normal, source_n: int, n: int, shift: float, source_noise_std: float, noise_std: float, tail: float
) -> Sides:
    """[bias², variance] (2,) given the designs, β and δ random directions; rows of either are scaled if `tail`."""
    p, replicates = 30, 3000

    def designs(rows: int) -> tuple[np.ndarray, np.ndarray]:
        X = normal(replicates, rows, p)
        X = X * np.exp(tail * normal(replicates, rows, 1)) if tail else X
        inverse = np.linalg.pinv(X)
        return inverse @ X, inverse

    (source, source_map), (target, target_map) = designs(source_n), designs(n)
    beta, delta = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (normal(replicates, p), normal(replicates, p)))
    first = np.einsum("rij,rj->ri", source, beta + shift**0.5 * delta) - beta
    missed = first - np.einsum("rij,rj->ri", target, first)
    kept = source_map - target @ source_map
    spread = source_noise_std**2 * np.sum(kept**2, axis=(1, 2)) + noise_std**2 * np.sum(target_map**2, axis=(1, 2))
    predicted = transfer(p, source_n, n, shift=shift, source_noise_std=source_noise_std, noise_std=noise_std)
    return np.array([float(part) for part in predicted]), np.stack([np.sum(missed**2, axis=1), spread], axis=1)


@inequality(
    "P1.transfer.best",
    "No other number of source samples is better; beyond the best one pretraining overtrains.",
    R"n_q^* = p-1-\sqrt{p(p-1)/(\mathrm{SNR}(1-\mathrm{SSR}))}",
    source="paper 2510.15337",
    parameters={
        "p": Parameter(low=20, high=1000, scale="whole"),
        "signal_to_noise": Parameter(low=0.1, high=100.0, scale="log"),
        "shift_to_signal": Parameter(low=0.0, high=1.5),
        "n": Parameter(low=0, high=10, scale="whole"),
    },
    tolerance=1e-12,
)
def p1_transfer_best(normal: Normal, p: int, signal_to_noise: float, shift_to_signal: float, n: int) -> Sides:
    """Relative excess of the risk at 200 other sizes, and, to second order, twice what a size 1% off costs."""

    def bias_and_noise(size: np.ndarray) -> np.ndarray:
        kept = (p - n) / p
        return kept * ((p - size) / p + size / p * shift_to_signal + size / (p - size - 1) / signal_to_noise)

    best = float(best_source_size(p, signal_to_noise, shift_to_signal))
    grid = np.linspace(0, p - 2, 200)
    return 0.0, bias_and_noise(grid) / bias_and_noise(np.array(best)) - 1


@inequality(
    "P1.growing",
    "One task in isotropic stages: the best ridge penalty of every stage is Bayes', and it grows.",
    R"\lambda_k = \sigma^2 / (n\,E\Delta_{k-1}^2)",
    parameters={
        "noise_std": NOISE_STD.within(0.2, 2.0),
        "samples": Parameter(low=5, high=80, scale="log"),
        "roughness": Parameter(low=0.05, high=1.0, scale="log"),
    },
    tolerance=1e-9,
)
def p1_growing(normal: Normal, noise_std: float, samples: float, roughness: float) -> Sides:
    """Relative rise of the last risk with penalties times random factors, and of each penalty on the one before."""
    p, count = 40, 6
    flat, targets, penalties, error = np.ones(p), np.full((1, 1, p), 1 / p), [], 1.0

    def last(sizes: np.ndarray) -> float:
        return float(risks(Stage(flat, samples, noise_std, Ridge(sizes), task=[0] * len(sizes)), targets)[-1, 0])

    for _ in range(count):
        penalties.append(noise_std**2 / (samples * error / p))
        padded = np.r_[np.full(count - len(penalties), np.inf), penalties]
        error = last(padded)
    others = [last(np.array(penalties) * np.exp(roughness * normal(count))) for _ in range(8)]
    return 0.0, np.r_[np.array(others) / error - 1, np.diff(penalties) / penalties[:-1]]


@existence(
    "P1.replay",
    "Replay of new noiseless samples of the first task can increase its risk.",
    R"R_1(\theta_3) > R_1(\theta_2)",
    parameters={
        "samples": Parameter(low=2, high=40, scale="whole"),
        "head": Parameter(low=5, high=25, scale="whole"),
        "tail_size": Parameter(low=0.001, high=0.3, scale="log"),
    },
    tolerance=0.0,
)
def p1_replay(normal: Normal, samples: int, head: int, tail_size: float) -> Sides:
    """Relative rise of the first task's risk by a third stage on it: predicted, and simulated less 4 standard errors.

    The second task moves only the tail of the first one's spectrum; to a few samples, that looks like label noise.
    """
    p, between = 80, 30
    s, other = np.where(np.arange(p) < head, 1.0, tail_size), np.where(np.arange(p) < head, 0.0, 1.0)
    stages = [Stage(s, 2 * p, 0.0, MinNorm()), Stage(other, between, 0.0, MinNorm())]
    stages.append(Stage(s, samples, 0.0, MinNorm(), task=0))
    predicted, rises = np.asarray(risks(stages, np.eye(2)[:, :, None] * np.ones(p))[:, 0]), []
    for _ in range(16):
        first, second = normal(2, p)
        forget, replay = normal(between, p) * np.sqrt(other), normal(samples, p) * np.sqrt(s)
        before = first + np.linalg.lstsq(forget, forget @ (second - first))[0]
        after = before + np.linalg.lstsq(replay, replay @ (first - before))[0]
        rises.append([s @ (after - first) ** 2, s @ (before - first) ** 2])
    after, before = np.transpose(rises)
    rise = (after - before) / before.mean()
    return 0.0, np.array([predicted[2] / predicted[1] - 1, rise.mean() - 4 * rise.std(ddof=1) / 16**0.5])
