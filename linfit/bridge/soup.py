"""What K runs share and what averaging them gains, from the inner products of their deltas alone (docs, B2; ours).

Run k of task t(k) is δ_k = m_t(k) + e_k with independent e_k of mean 0, E‖e_k‖² = V (one run's variance). Off the
diagonal the noise cancels, so without any bias

    E⟨δ_j, δ_k⟩ = ⟨m_t(j), m_t(k)⟩ =: S_t(j)t(k)  (j ≠ k),    E‖δ_k‖² = S_t(k)t(k) + V.

Take as target the mean m̄ of the T tasks' m_t. The average of r runs of each task lies at the squared distance

    (1/T) Σ_t E‖θ − θ₁ − m_t‖² = B + V/(T r),   B = (1/T) Σ_t ‖m_t − m̄‖² ,

so more runs remove V/T (1 − 1/r) of what one run of each has, whatever the tasks; B stays. The best weights solve
Γa = β with Γ_jk = S_t(j)t(k) + V_k 1[j = k], β_k = (1/T) Σ_t S_t(k)t; for one task a_k = (1/V_k)/(1/S + Σ_j 1/V_j).

Errors. The runs are the sample, the tensors are fixed: leaving out each run of a task with two or more (a stratified
jackknife) shows how an estimate h varies. It is done twice: in all tensors at once, which lets the noise of tensors
depend on each other but has few degrees of freedom (runs − tasks), and tensor by tensor, adding up, which has many but
takes them as independent. The larger one is used, with Student's t for the former. For two runs no jackknife is
left. There d_l = (‖δ_1‖² − ‖δ_2‖²)/2 of tensor l has mean 0 and the variance 2mᵀΣm + Var‖e‖²/2, at least half of that
of V̂_l = ‖δ_1 − δ_2‖²/2 for noise whose tails are no lighter than a Gaussian's (Var‖e‖² ≥ 2 tr Σ²); so √2 d_l, taken
from the signal and given to the variance, is the deviation of tensor l, with (Σd²)²/Σd⁴ degrees of freedom.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

LEVEL = 0.98  # of every interval: with the approximations above at least 95 of 100 cover (docs, bridge)


class Estimate(NamedTuple):
    """A number, its standard error, and an interval that covers the truth in 95 of 100 cases or more."""

    value: float
    standard_error: float
    low: float
    high: float


class Moments(NamedTuple):
    """S and V, estimated; leading axes are tensors or replicates."""

    signal: np.ndarray  # (…, T, T), ⟨m_t, m_u⟩
    variance: np.ndarray  # (…), V of one run

    def moved(self, signal: np.ndarray, variance: np.ndarray) -> "Moments":
        """Replicates: these moments with something added to both."""
        return Moments(self.signal + signal, self.variance + variance)

    def sum(self) -> "Moments":
        """Over the last leading axis."""
        return Moments(self.signal.sum(-3), self.variance.sum(-1))

    @property
    def center(self) -> np.ndarray:
        """‖m̄‖² (…), at least 0."""
        return np.maximum(self.signal.mean((-2, -1)), 0)

    @property
    def between(self) -> np.ndarray:
        """B (…), at least 0: what tells the tasks apart."""
        own = np.trace(self.signal, axis1=-2, axis2=-1) / self.signal.shape[-1]
        return np.maximum(own - self.signal.mean((-2, -1)), 0)

    def noise(self, runs: float) -> np.ndarray:
        """V/(T r) (…), at least 0: variance of the average of r runs of each task."""
        return np.maximum(self.variance, 0) / (self.signal.shape[-1] * runs)

    def gain(self, runs: float) -> np.ndarray:
        """V/T (1 − 1/r) (…): by how much the squared distance of r runs of each task is below that of one."""
        return self.noise(1) - self.noise(runs)

    def tau(self, runs: float) -> np.ndarray:
        """‖m̄‖²/(‖m̄‖² + V/(T r)) (…): the best coefficient of that average; 1 if nothing moved."""
        total = self.center + self.noise(runs)
        return np.where(total > 0, self.center / np.where(total > 0, total, 1), 1.0)


def moments(grams: np.ndarray, tasks: np.ndarray) -> Moments:
    """S and V from inner products (…, K, K) of runs whose tasks are numbered 0 … T−1; unbiased.

    V is that of all tasks with two runs or more, pooled; the signal of a task with one run is ‖δ‖² − V.

    >>> moments(np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([0, 0]))
    Moments(signal=array([[1.]]), variance=array(1.))
    """
    member = np.eye(int(tasks.max()) + 1)[tasks]  # (K, T)
    counts = member.sum(0)
    squares = np.diagonal(grams, axis1=-2, axis2=-1) @ member  # Σ‖δ_k‖² of each task (…, T)
    pairs = np.maximum(np.outer(counts, counts) - np.diag(counts), 1)
    signal = (member.T @ grams @ member - squares[..., None] * np.eye(counts.size)) / pairs
    of_task = squares / counts - np.diagonal(signal, axis1=-2, axis2=-1)
    variance = of_task @ (np.maximum(counts - 1, 0) / (counts - 1).sum())
    alone = np.where(counts == 1, squares - variance[..., None], 0)
    return Moments(signal + alone[..., None] * np.eye(counts.size), np.asarray(variance))


class Sample:
    """Inner products of K runs in L tensors, and how far what follows from them can be trusted."""

    def __init__(self, grams: np.ndarray, tasks: Sequence[int] | np.ndarray):
        self.grams, self.tasks = grams, np.asarray(tasks)  # (L, K, K), (K,)
        self.of_tensors = moments(grams, self.tasks)
        self.total = self.of_tensors.sum()
        counts = np.bincount(self.tasks)
        self.strata = [np.flatnonzero(self.tasks == task) for task in np.flatnonzero(counts > 1)]
        self.is_one_pair = len(self.strata) == 1 and self.strata[0].size == 2

    def estimate(self, function: Callable[[Moments], np.ndarray], *, positive: bool = False) -> list[Estimate]:
        """`function`, Moments (…) -> (…, m), of all tensors with its errors; of `positive` ones on a log scale."""
        values = function(self.total)
        variance, freedom = (self._of_one_pair if self.is_one_pair else self._of_runs)(function)
        errors = np.sqrt(np.broadcast_to(variance, values.shape))
        reach = scipy.stats.t.ppf((1 + LEVEL) / 2, freedom) * errors
        if positive:
            factor = np.exp(np.minimum(reach / np.where(values > 0, values, np.inf), 700))
            low, high = values / factor, values * factor
        else:
            low, high = values - reach, values + reach
        return [Estimate(*map(float, row)) for row in zip(values, errors, low, high)]

    def _of_one_pair(self, function: Callable[[Moments], np.ndarray]) -> tuple[np.ndarray, float]:
        first, second = self.strata[0]
        d = 2**0.5 * (self.grams[:, first, first] - self.grams[:, second, second]) / 2
        task = np.zeros_like(self.total.signal)
        task[self.tasks[first], self.tasks[first]] = 1
        moved = self.total.moved(-d[:, None, None] * task, d)
        square = float(np.sum(d**2))
        freedom = max(square**2 / float(np.sum(d**4)), 1.0) if square > 0 else 1.0
        return np.square(function(moved) - function(self.total)).sum(0), freedom

    def _of_runs(self, function: Callable[[Moments], np.ndarray]) -> tuple[np.ndarray, float]:
        at_once: np.ndarray | float = 0.0
        one_by_one: np.ndarray | float = 0.0
        for runs in self.strata:
            without = [self._without(int(run)) for run in runs]  # each (L, …)
            share = (runs.size - 1) / runs.size
            left = np.stack([function(each.sum()) for each in without])  # (runs, m)
            at_once += share * np.square(left - left.mean(0)).sum(0)
            whole = self.of_tensors
            moved = [self.total.moved(e.signal - whole.signal, e.variance - whole.variance) for e in without]
            by_tensor = np.stack([function(each) for each in moved])  # (runs, L, m)
            one_by_one += share * np.square(by_tensor - by_tensor.mean(0)).sum((0, 1))
        return np.maximum(at_once, one_by_one), sum(runs.size - 1 for runs in self.strata)

    def _without(self, run: int) -> Moments:
        kept = np.arange(self.tasks.size) != run
        return moments(self.grams[:, kept][:, :, kept], self.tasks[kept])

    def noise_ratios(self) -> np.ndarray:
        """V_k/V (K,) of all tensors, between ¼ and 4: from three runs of a task on, else 1.

        ‖δ_j − δ_k‖² = V_j + V_k up to noise of mean 0, so V_k = (Σ_j D_jk − Σ_{i<j} D_ij/(n−1))/(n−2) in a task of n.
        """
        gram, ratios = self.grams.sum(0), np.ones(self.tasks.size)
        for runs in (each for each in self.strata if each.size > 2):
            distances = squared_distances(gram[np.ix_(runs, runs)])
            own = (distances.sum(1) - distances.sum() / (2 * (runs.size - 1))) / (runs.size - 2)
            ratios[runs] = own / own.mean() if own.mean() > 0 else 1.0
        return np.clip(ratios, 0.25, 4.0)

    def best_weights(self, ratios: np.ndarray) -> Callable[[Moments], np.ndarray]:
        """a (…, K) with Γa = β, as a function of the moments; V_k = V·`ratios`."""

        def weights(found: Moments) -> np.ndarray:
            values, vectors = np.linalg.eigh(found.signal)  # of a Gram matrix: what is negative is noise
            signal = (vectors * np.maximum(values, 0)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
            noise = np.maximum(found.variance, 0)[..., None] * ratios
            gamma = signal[..., self.tasks[:, None], self.tasks] + noise[..., None] * np.eye(ratios.size)
            beta = signal.mean(-1)[..., self.tasks]
            return (np.linalg.pinv(gamma, hermitian=True) @ beta[..., None])[..., 0]

        return weights


def squared_distances(gram: np.ndarray) -> np.ndarray:
    """‖δ_j − δ_k‖² (K, K), at least 0."""
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares - 2 * gram, 0)
