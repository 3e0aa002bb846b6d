"""Merges as claims (docs, K1–K3): the form of K runs, the law of soups, and merges that act on coordinates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats

from linfit import Filter, Fit, GradientFlow, MergeForm, MinNorm, Ridge, exact_form
from sims.claims import Normal, Sides, asymptotic, identity, inequality
from sims.claims.problems import ridge_map
from sims.parameters import ALIGNMENT, DECAY, NOISE_STD, PENALTY, TIME, Parameter
from theory.merges import Run, dropped, elected, form, soup, trimmed

SIZES, RATIO, REPLICATES = (40, 160), 2, 24
"""n, p/n, and designs of each size."""

BED = {
    "decay": DECAY.within(0.0, 1.0),
    "test_decay": DECAY.within(0.0, 1.0),
    "alignment": ALIGNMENT.within(-0.5, 0.5),
    "similarity": Parameter(low=0.3, high=0.9),
    "noise_std": NOISE_STD.within(0.1, 1.0),
    "penalty": PENALTY.within(0.1, 10.0),  # in units of tr Σ/n
}
LEAVING = {"shared": Parameter(highest=1.0), "tail": Parameter(highest=1.0), "rotation": Parameter(highest=1.57)}
"""Share of samples that all runs have in common, spread of the log-length of samples, angle between bases of runs."""


def _spectra(n: int, decay: float, test_decay: float, alignment: float, similarity: float) -> tuple[np.ndarray, ...]:
    """s and M (p,), and E Δ_aΔ_b (2, 2, p) with tr Σ E ΔΔᵀ = 1 and correlation `similarity`."""
    j = np.arange(1.0, RATIO * n + 1)
    s, M, spread = j**-decay, j**-test_decay, j ** (-decay * alignment)
    return s, M / M.sum() * s.sum(), np.array([[1, similarity], [similarity, 1]])[:, :, None] * spread / (s @ spread)


def _padded(values: np.ndarray) -> np.ndarray:
    """Zeros up to one length, so that nothing is compiled twice."""
    return np.concatenate([values, np.zeros((*values.shape[:-1], RATIO * SIZES[-1] - values.shape[-1]))], axis=-1)


def _designs(
    normal: Normal, n: int, s: np.ndarray, count: int, replicates: int, shared: float, tail: float, rotation: float
) -> np.ndarray:
    """X (replicates, K, n, p); the first `shared` · n rows are the same for all runs of a replicate."""
    X = normal(replicates, count, n, s.size)
    common = round(shared * n)
    X[:, :, :common] = X[:, :1, :common]
    if tail:
        X *= np.exp(tail * normal(replicates, count, n, 1) - tail**2)
    X *= np.sqrt(s)
    if rotation:  # run k's basis by k times the angle, in the planes of coordinates j and p − 1 − j
        angle = rotation * np.arange(count)[:, None, None]
        signs = np.where(np.arange(s.size) < s.size // 2, 1, -1)
        X = np.cos(angle) * X + np.sin(angle) * signs * X[..., ::-1]
    return X


def _maps(X: np.ndarray, g: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """R (…, p, n) with θ̂ − θ₁ = R(y − Xθ₁)."""
    n = X.shape[-2]
    s, U = np.linalg.eigh(X @ np.swapaxes(X, -1, -2) / n)
    return np.swapaxes(X, -1, -2) @ (U * g(s)[..., None, :]) @ np.swapaxes(U, -1, -2) / n


def _ridge(penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda s: 1 / (s + penalty)


def _flow(time: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda s: (1 - np.exp(-s * time)) / s


def _conditional(
    X: np.ndarray, R: np.ndarray, tasks: np.ndarray, M: np.ndarray, targets: np.ndarray, noise_std: float, common: int
) -> tuple[np.ndarray, np.ndarray]:
    """β (r, K) and Γ (r, K, K) on task 0, averaged over noise and gaps; the first `common` samples are shared."""
    B, count = R @ X, X.shape[1]
    linear = np.einsum("rkjj,kj->rk", B, targets[tasks, 0] * M)
    quadratic = np.zeros((len(X), count, count))
    for k in range(count):
        for other in range(count):
            second = targets[tasks[k], tasks[other]]
            rows = slice(None) if k == other else slice(0, common)
            noise = np.einsum("rpn,rpn,p->r", R[:, k, :, rows], R[:, other, :, rows], M)
            quadratic[:, k, other] = np.einsum("rij,rij->r", B[:, k] * (M[:, None] * second), B[:, other])
            quadratic[:, k, other] += noise_std**2 * noise
    return linear, quadratic


def _runs(s: np.ndarray, n: int, noise_std: float, tasks: np.ndarray, filters: list[Filter]) -> list[Run]:
    return [Run(int(task), _padded(s), n, noise_std, filter) for task, filter in zip(tasks, filters, strict=True)]


def _flat(linear: np.ndarray, quadratic: np.ndarray) -> np.ndarray:
    """β and the upper half of Γ, side by side."""
    rows, columns = np.triu_indices(quadratic.shape[-1])
    return np.concatenate([linear, quadratic[..., rows, columns]], axis=-1)


def _numbers(found: MergeForm) -> np.ndarray:
    return _flat(np.asarray(found.linear), np.asarray(found.quadratic))


@asymptotic(
    "K1",
    "The risk of a merge is a quadratic form in its weights, whose coefficients follow from the population.",
    R"R_b(a) = c - 2a\cdot\beta + a^\top\Gamma a,\quad "
    R"\Gamma_{kl} \asymp \textstyle\sum_j M_j f_{kj}f_{lj}E[\Delta_{t(k)}\Delta_{t(l)}]_j "
    R"+ \delta_{kl}\sum_j M_j\mathrm{Var}_{kj}",
    parameters=BED | LEAVING | {"time": TIME.within(0.1, 10.0)},
    tolerance=1.5,
    sizes=SIZES,
)
def k1(normal: Normal, noise_std: float, penalty: float, time: float, **values: float) -> Sides:
    """β and Γ of min-norm and ridge on the test task and gradient flow on another, each in units of its prediction."""
    leaving, tasks = [values.pop(name) for name in LEAVING], np.array([0, 0, 1])
    predicted, measured = [], []
    for n in SIZES:
        s, M, targets = _spectra(n, **values)
        unit = s.sum() / n
        filters = [MinNorm(), Ridge(penalty * unit), GradientFlow(time / unit)]
        found = form(_runs(s, n, noise_std, tasks, filters), _padded(targets), _padded(M), 0)
        X = _designs(normal, n, s, 3, REPLICATES, *leaving)
        maps = (_maps(X[:, 0], _ridge(0.0)), _maps(X[:, 1], _ridge(penalty * unit)), _maps(X[:, 2], _flow(time / unit)))
        common = round(leaving[0] * n)
        numbers = _flat(*_conditional(X, np.stack(maps, axis=1), tasks, M, targets, noise_std, common))
        scale = _numbers(found)
        predicted.append(scale / scale)
        measured.append(numbers / scale)
    return predicted, measured


@identity(
    "K1.exact",
    "On given designs the form of a merge is exact, in blocks that couple two designs.",
    R"\Gamma_{kl} = \langle G_k(X_kC_{kl}X_l^\top)G_l, X_kMX_l^\top\rangle + \delta_{kl}\,\sigma_k^2 \ldots",
    parameters={
        "penalty": PENALTY.within(1e-2, 10.0),
        "noise_std": NOISE_STD.within(0.1, 3.0),
        "shared": Parameter(low=0, high=1, scale="whole"),
        "pretrain": Parameter(low=0, high=1, scale="whole"),
    },
    tolerance=1e-8,
)
def k1_exact(normal: Normal, penalty: float, noise_std: float, shared: int, pretrain: int) -> Sides:
    """Risks of eight merges of three fits; by traces of p × p matrices, gaps with means and correlated tasks."""
    p, tasks, sigma = 12, (0, 1, 0), (noise_std, noise_std if shared else 2 * noise_std, noise_std)
    X, mean, M = [normal(5, p), normal(5, p), normal(15, p)], normal(2, p), np.exp(normal(p))
    X[1] = X[0] if shared else X[1]
    factor, u = normal(2, 2, p), normal(p)
    spread, goal = np.einsum("acp,bcp->abp", factor, factor), -u if pretrain else mean[0]
    data = (7, 7, None) if shared else (None, 1, 2)
    fits = [Fit(tasks[k], X[k], sigma[k], Ridge(penalty), data[k]) for k in range(3)]
    found = exact_form(fits, spread + mean[:, None] * mean, M, 0, u if pretrain else None, mean=mean)
    weights, maps = normal(8, 3), [ridge_map(design, penalty) for design in X]
    measured = np.full(8, M @ goal**2 + (0 if pretrain else M @ spread[0, 0]))
    for k in range(3):
        moved = maps[k] @ X[k]
        cross = np.outer(moved @ mean[tasks[k]], goal) + (0 if pretrain else moved * spread[tasks[k], 0])
        measured -= 2 * weights[:, k] * (M @ np.diag(cross))
        for other in range(3):
            second = np.diag(spread[tasks[k], tasks[other]]) + np.outer(mean[tasks[k]], mean[tasks[other]])
            product = moved @ second @ (maps[other] @ X[other]).T
            if k == other or (shared and k + other == 1):
                product = product + sigma[k] * sigma[other] * maps[k] @ maps[other].T
            measured += weights[:, k] * weights[:, other] * (M @ np.diag(product))
    return np.asarray(found(weights)), measured


@identity(
    "K1.forgetting",
    "Forgetting is the risk on a task whose gap is minus the pretraining error.",
    R"E\lVert u + \textstyle\sum_k a_k(\hat\theta_k-\theta_1)\rVert^2_{\Sigma_1} = "
    R"u^\top\Sigma_1u - 2a\cdot\beta + a^\top\Gamma a",
    parameters={"penalty": PENALTY.within(1e-2, 10.0), "noise_std": NOISE_STD.within(0.1, 3.0)},
    tolerance=1e-8,
)
def k1_forgetting(normal: Normal, penalty: float, noise_std: float) -> Sides:
    """Eight merges of runs of two unrelated tasks; θ̂ written out as an affine function of shifts and noise."""
    p, sizes = 12, (5, 15)
    X, u, M = [normal(n, p) for n in sizes], normal(p), np.exp(normal(p))
    spread, weights = np.exp(normal(2, p)), normal(8, 2)
    targets = np.array([[spread[0] + u**2, u**2], [u**2, spread[1] + u**2]])
    fits = [Fit(k, X[k], noise_std, Ridge(penalty)) for k in range(2)]
    predicted, measured = np.asarray(exact_form(fits, targets, M, None, u)(weights)), []
    maps = [ridge_map(design, penalty) for design in X]
    for a in weights:  # θ̂ − θ₁* = u + Σ a R(X(δ − u) + ε)
        centre = u - sum(a[k] * maps[k] @ X[k] @ u for k in range(2))
        risk = M @ centre**2
        for k in range(2):
            risk += a[k] ** 2 * (
                M @ ((maps[k] @ X[k]) ** 2 @ spread[k]) + noise_std**2 * M @ np.sum(maps[k] ** 2, axis=1)
            )
        measured.append(risk)
    return predicted, np.array(measured)


@identity(
    "K1.weights",
    "The best weights of a merge, free, non-negative or of sum one, are one small solve each.",
    R"a^* = \Gamma^{-1}\beta",
    parameters={"size": Parameter(low=2, high=6, scale="whole"), "spread": Parameter(low=0.1, high=3.0, scale="log")},
    tolerance=1e-6,
)
def k1_weights(normal: Normal, size: int, spread: float) -> Sides:
    """Least risks in units of c: non-negative by least squares, the others through the eliminated constraint."""
    K, most = int(size), 6
    factor, goal = normal(most, most + 2) * np.exp(spread * normal(most, 1)), normal(most + 2)
    factor[K:] = 0
    found = MergeForm(goal @ goal, factor @ goal, factor @ factor.T)
    options: list[dict[str, bool]] = [{}, {"nonnegative": True}, {"sum_to_one": True}, {"shared_tau": True}]
    predicted = [found.optimal_risk(**option) / (goal @ goal) for option in options]
    rows = factor.T  # the merge moves by factorᵀa and should move by `goal`
    free, residual = np.linalg.lstsq(rows, goal, rcond=None)[0], goal - rows[:, 0]
    within = np.linalg.lstsq(rows[:, 1:] - rows[:, :1], residual, rcond=None)[0]
    mean = rows.mean(axis=1)
    errors = (
        goal - rows @ free,
        goal - rows @ scipy.optimize.nnls(rows, goal)[0],
        residual - (rows[:, 1:] - rows[:, :1]) @ within,
        goal - mean * (mean @ goal) / (mean @ mean),
    )
    return np.array(predicted), np.array([error @ error for error in errors]) / (goal @ goal)


@asymptotic(
    "K2",
    "A soup's risk falls like 1/K onto a lower bound; both are predicted.",
    R"R(K, \tau) \asymp \textstyle\sum_j M_jE\Delta_j^2(1-\tau f_j)^2 + \tau^2V/K",
    parameters=BED | LEAVING,
    tolerance=1.5,
    sizes=SIZES,
)
def k2(normal: Normal, noise_std: float, penalty: float, **values: float) -> Sides:
    """R(K, τ) for K = 1, 2, 4 at three τ, of ridge on its own domain, in units of the prediction."""
    leaving, tasks = [values.pop(name) for name in LEAVING], np.zeros(4, int)
    predicted, measured, counts = [], [], np.array([1, 2, 4])
    values["test_decay"] = values["decay"]
    for n in SIZES:
        s, M, targets = _spectra(n, **values)
        at = penalty * s.sum() / n
        law = soup(Run(0, _padded(s), n, noise_std, Ridge(at)), _padded(targets), _padded(M), 0)
        taus = np.array([0.5, 1.0, 1.5])[:, None]
        expected = np.asarray(law(counts, taus)).ravel()
        X = _designs(normal, n, s, 4, REPLICATES, *leaving)
        maps = _maps(X, _ridge(at))
        linear, quadratic = _conditional(X, maps, tasks, M, targets, noise_std, round(leaving[0] * n))
        slopes = np.stack([linear[:, :count].mean(axis=1) for count in counts], axis=1)
        curves = np.stack([quadratic[:, :count, :count].mean(axis=(1, 2)) for count in counts], axis=1)
        risks = M @ targets[0, 0] - 2 * taus * slopes[:, None] + taus**2 * curves[:, None]
        predicted.append(expected / expected)
        measured.append(risks.reshape(len(risks), -1) / expected)
    return predicted, measured


@inequality(
    "K2.tau",
    "The more runs in a soup, the larger its best ensemble coefficient, and the less averaging gains.",
    R"\tau^*(K+1) > \tau^*(K)",
    parameters={name: BED[name] for name in ("decay", "alignment", "noise_std", "penalty")},
)
def k2_tau(normal: Normal, decay: float, alignment: float, noise_std: float, penalty: float) -> Sides:
    """Steps of τ*(K), K = 1 … 16, relative to τ*(1), and the fall of τ*'s gain over τ = 1 where τ* < 1."""
    s, M, targets = _spectra(SIZES[0], decay, decay, alignment, 0.5)
    s, M, targets = s * np.exp(0.5 * normal(s.size)), M, targets * np.exp(0.5 * normal(s.size))
    filter = Ridge(penalty * s.sum() / SIZES[0])
    law = soup(Run(0, _padded(s), SIZES[0], noise_std, filter), _padded(targets), _padded(M), 0)
    counts = np.arange(1, 17)
    taus = np.asarray(law.optimal_tau(counts))
    gains = np.asarray(law(counts) - law.optimal_risk(counts))
    falls = np.where(taus[1:] < 1, gains[:-1] - gains[1:], 1) / gains[0]
    return 0.0, np.concatenate([np.diff(taus) / taus[0], falls])


@inequality(
    "K1.added",
    "Adding a run of another task lowers the least risk, unless its slope in the best merge without it is 0.",
    R"R - R_{+} = (\beta_n - \gamma\cdot a^*)^2/(\Gamma_{nn} - \gamma^\top\Gamma^{-1}\gamma) > 0",
    parameters=BED,
    tolerance=1e-9,
)
def k1_added(normal: Normal, noise_std: float, penalty: float, **values: float) -> Sides:
    """Both signs of 1 − gain/(the Schur complement's), and the sign of its weight is that of its slope."""
    s, M, targets = _spectra(SIZES[0], **values)
    filters: list[Filter] = [Ridge(penalty * s.sum() / SIZES[0])] * 3
    tasks = np.array([0, 0, 1])
    found = form(_runs(s, SIZES[0], noise_std, tasks, filters), _padded(targets), _padded(M), 0)
    B, b = np.asarray(found.quadratic), np.asarray(found.linear)
    before = np.linalg.solve(B[:2, :2], b[:2])
    slope = float(found.slope(np.append(before, 0.0))[2])
    schur = B[2, 2] - B[2, :2] @ np.linalg.solve(B[:2, :2], B[2, :2])
    ratio = float(found.gains()[2]) / (slope**2 / schur)
    return 0.0, np.array([ratio - 1 + 1e-6, 1 - ratio + 1e-6, np.sign(slope) * float(found.optimal_weights()[2])])


SHARES = Parameter(low=0.1, high=0.9)
LEAVING_K3 = {name: LEAVING[name] for name in ("shared", "tail")}


def _trim(moves: np.ndarray, keep: float) -> np.ndarray:
    least = -np.sort(-np.abs(moves), axis=-1)[..., round(keep * moves.shape[-1]) - 1]
    return np.where(np.abs(moves) >= least[..., None], moves, 0)


def _elect(moves: np.ndarray) -> np.ndarray:
    """(r, K, p) → (r, 1, p)."""
    agree = moves * np.sign(moves.sum(axis=1, keepdims=True)) > 0
    return np.sum(moves * agree, axis=1, keepdims=True) / np.maximum(agree.sum(axis=1, keepdims=True), 1)


def _operated(
    normal: Normal,
    predict: Callable[[list[Run], np.ndarray, np.ndarray, float], MergeForm],
    operate: Callable[[np.ndarray], np.ndarray],
    average: bool = False,
    generic: bool = False,
    **values: Any,
) -> Sides:
    """β and Γ after an operation on the movements of three ridges on two tasks, in units of the prediction.

    Paired: predicted are the sampled β and Γ before the operation, times the predicted ratio of after to before; so
    what is sampled is what the operation does. `average`: before it stands the plain mean of the runs.
    """
    shared, tail, noise_std, penalty = (values.pop(name) for name in ("shared", "tail", "noise_std", "penalty"))
    predicted, measured, tasks, replicates = [], [], np.array([0, 0, 1]), 2 * REPLICATES
    for n in SIZES:
        s, M, targets = _spectra(n, **values)
        at, p = penalty * s.sum() / n, s.size
        runs = _runs(s, n, noise_std, tasks, [Ridge(at)] * 3)
        share = p / (RATIO * SIZES[-1])  # of the padded coordinates
        before, after = form(runs, _padded(targets), _padded(M), 0), predict(runs, _padded(targets), _padded(M), share)
        root = np.linalg.cholesky(targets[:, :, 0] / targets[0, 0, 0])
        gaps = np.einsum("tu,rup->rtp", root, normal(replicates, 2, p)) * np.sqrt(targets[0, 0])
        X = _designs(normal, n, s, 3, replicates, shared, tail, 0.0)
        y = np.einsum("rknp,rkp->rkn", X, gaps[:, tasks]) + noise_std * normal(replicates, 3, n)
        moves = np.einsum("rkpn,rkn->rkp", _maps(X, _ridge(at)), y)
        O = np.linalg.qr(normal(p, p))[0] if generic else np.eye(p)  # noqa: E741
        results = operate(moves @ O.T) @ O
        moves = moves.mean(axis=1, keepdims=True) if average else moves
        mean = np.full((1, 3), 1 / 3) if average else np.eye(3)
        scale = _flat(mean @ np.asarray(before.linear), mean @ np.asarray(before.quadratic) @ mean.T)
        expected = _numbers(after)
        sampled = [
            _flat(np.einsum("rkp,rp->rk", h * M, gaps[:, 0]), np.einsum("rkp,rlp->rkl", h * M, h))
            for h in (moves, results)
        ]
        predicted.append(sampled[0] / scale)
        measured.append(sampled[1] / expected)
    return predicted, measured


@asymptotic(
    "K3.dropped",
    "Dropping a random share q of the moved coordinates (DARE) adds q/(1−q) times their second moment.",
    R"\Gamma_{kk} + \tfrac{q}{1-q}\textstyle\sum_j M_jE\,\mathrm{moved}_{kj}^2",
    parameters=BED | LEAVING_K3 | {"drop": Parameter(low=0.1, high=0.7)},
    tolerance=3.0,
    sizes=SIZES,
)
def k3_dropped(normal: Normal, drop: float, **values: Any) -> Sides:
    def operate(moves: np.ndarray) -> np.ndarray:
        return moves * (np.abs(normal(*moves.shape)) > scipy.stats.norm.ppf(0.5 + drop / 2)) / (1 - drop)

    return _operated(normal, lambda runs, targets, M, _: dropped(runs, targets, M, 0, drop), operate, **values)


@identity(
    "K3.dropped.exact",
    "So it never lowers the risk of given weights; the sum is over the coordinates of the basis where it drops.",
    R"R'(a) - R(a) = \tfrac{q}{1-q}\textstyle\sum_{k,c} a_k^2 M_{cc}E\,\mathrm{moved}_{kc}^2 \ge 0",
    parameters={
        "drop": Parameter(low=0.05, high=0.9),
        "noise_std": BED["noise_std"],
        "penalty": PENALTY.within(0.1, 10.0),
    },
    tolerance=1e-9,
)
def k3_dropped_exact(normal: Normal, drop: float, noise_std: float, penalty: float) -> Sides:
    """What dropping adds to Γ_kk, in the eigenbasis and a rotated one; measured by all 2⁴ masks on moments of K1."""
    p, n = 4, 3
    s, M, spread = (np.exp(normal(p)) for _ in range(3))
    targets, rotation = spread[None, None], np.linalg.qr(normal(p, p))[0]
    runs = [Run(0, s, n, noise_std, Ridge(penalty))]
    moved = np.array([float(form(runs, targets, one, 0).quadratic[0, 0]) for one in np.eye(p)])
    masks = (np.arange(2**p)[:, None] >> np.arange(p)) % 2
    chances = drop ** (p - masks.sum(axis=1)) * (1 - drop) ** masks.sum(axis=1)
    predicted, measured, plain = [], [], float(M @ moved)
    for basis in (np.eye(p), rotation):
        found = dropped(runs, targets, M, 0, drop, basis=basis)
        kernel, second = basis * M @ basis.T, basis * moved @ basis.T
        after = sum(
            chance * np.sum(np.outer(mask, mask) * kernel * second) / (1 - drop) ** 2
            for chance, mask in zip(chances, masks, strict=True)
        )
        predicted.append(float(found.quadratic[0, 0]) / plain - 1)
        measured.append(after / plain - 1)
    return np.array(predicted), np.array(measured)


@asymptotic(
    "K3.trimmed",
    "Trimming by magnitude acts as truncation of Gaussian coordinates, in the basis where it acts.",
    R"\alpha_j = P(|X_j|>t) + 2t\varphi_j(t),\quad E\,h_jh_j' \text{ by Price's theorem}",
    parameters=BED | LEAVING_K3 | {"keep": SHARES},
    tolerance=3.0,
    sizes=SIZES,
)
def k3_trimmed(normal: Normal, keep: float, **values: Any) -> Sides:
    return _operated(
        normal,
        lambda runs, targets, M, share: trimmed(runs, targets, M, 0, keep * share),
        lambda moves: _trim(moves, keep),
        **values,
    )


@asymptotic(
    "K3.generic",
    "In generic coordinates trimming is averaging with smaller weights, plus noise.",
    R"\beta' = \alpha\beta,\quad \Gamma' = \alpha\Gamma\alpha^\top + \mathrm{tr}\,M\;E\,\eta\eta^\top",
    parameters=BED | LEAVING_K3 | {"keep": SHARES},
    tolerance=3.0,
    sizes=SIZES,
)
def k3_generic(normal: Normal, keep: float, **values: Any) -> Sides:
    """In a random basis. Padding would count as coordinates, so the prediction is made at each size."""

    def predict(runs: list[Run], targets: np.ndarray, M: np.ndarray, share: float) -> MergeForm:
        p = round(share * M.size)
        own = [Run(run.task, run.spectrum[:p], run.n, run.noise_std, run.filter) for run in runs]
        return trimmed(own, targets[..., :p], M[:p], 0, keep, basis="generic")

    return _operated(normal, predict, lambda moves: _trim(moves, keep), generic=True, **values)


@asymptotic(
    "K3.elected",
    "Electing the sign of trimmed coordinates (TIES) has the risk of the same function of Gaussian coordinates.",
    R"h(X) = \mathrm{mean}\{X_k : \mathrm{sign}\,X_k = \mathrm{sign}\textstyle\sum_l X_l\}",
    parameters=BED | LEAVING_K3 | {"keep": SHARES},
    tolerance=3.0,
    sizes=SIZES,
)
def k3_elected(normal: Normal, keep: float, **values: Any) -> Sides:
    return _operated(
        normal,
        lambda runs, targets, M, share: elected(runs, targets, M, 0, keep * share),
        lambda moves: _elect(_trim(moves, keep)),
        average=True,
        **values,
    )


def _three(noise_std: float, penalty: float, **values: float) -> tuple[list[Run], np.ndarray, np.ndarray]:
    s, M, targets = _spectra(SIZES[-1], **values)
    return _runs(s, SIZES[-1], noise_std, np.array([0, 0, 1]), [Ridge(penalty * s.sum() / SIZES[-1])] * 3), targets, M


@inequality(
    "K3.generic.never",
    "In generic coordinates neither trimming nor electing a sign nor dropping beats averaging with the best weights.",
    R"\min_a R'(a) \ge \min_a R(a)",
    parameters=BED | {"keep": SHARES},
    tolerance=1e-3,
)
def k3_generic_never(normal: Normal, keep: float, **values: Any) -> Sides:
    """Least risks relative to that of averaging; the tolerance is that of the election's integral."""
    runs, targets, M = _three(**values)
    least = form(runs, targets, M, 0).optimal_risk()
    methods = (trimmed, elected, dropped)
    return 1.0, np.array(
        [method(runs, targets, M, 0, keep, basis="generic").optimal_risk() / least for method in methods]
    )


@inequality(
    "K3.sparse",
    "Where a task moves few coordinates of the eigenbasis, trimming to them beats averaging with the best coefficient.",
    R"\min_\tau R_{\mathrm{trim}}(\tau) < \min_\tau R(\tau)",
    parameters={
        "support": Parameter(low=0.02, high=0.1, scale="log", highest=1.0),
        "noise_std": NOISE_STD.within(0.1, 1.0, highest=10.0),
        "count": Parameter(low=1, high=4, scale="whole"),
    },
)
def k3_sparse(normal: Normal, support: float, noise_std: float, count: int) -> Sides:
    """1 − R_trim/R: soups of min-norm runs on isotropic features, p = 2n, that keep the share of the support."""
    p, n = RATIO * SIZES[-1], SIZES[-1]
    carried = np.where(np.arange(p) < round(support * p), np.exp(0.1 * normal(p)), 0)
    targets, flat = (carried / carried.sum())[None, None], np.ones(p)
    runs = [Run(0, flat, n, noise_std, MinNorm())] * int(count)
    trimmed_risk = trimmed(runs, targets, flat, 0, min(support, 1.0)).optimal_risk(shared_tau=True)
    return 0.0, 1 - float(trimmed_risk / form(runs, targets, flat, 0).optimal_risk(shared_tau=True))
