"""The methods: ways to fine-tune in a few lines each, and the grids their hyperparameters are chosen from.

A method sees one `Given` and returns weights for every value of its hyperparameters. The last axis of its grid comes
whole, because filters take arrays; one before it comes a value at a time, and `vmap` runs through it, so that whatever
does not depend on it is computed once. Penalties are in units of the mean eigenvalue of the kernel, times in its
inverse. What is called after a paper is its idea in this linear model, not its code.

To add a method, write its function and its line in `METHODS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import (
    Filter,
    GradientFlow,
    MinNorm,
    Ridge,
    SelfDistillation,
    SharpnessAware,
    TwoTaskProblem,
    fine_tune,
    flow_weights,
    s3ft_targets,
    sample_design,
    sample_task,
)
from linfit.robust import adversarial_fine_tune, largest_radius
from linfit.weighting import smooth_weights

__all__ = ["METHODS", "Given", "Method", "over_grid", "sample_given"]

# The default grids of the methods' hyperparameters; a few that are one method's own are in `METHODS`.
PENALTIES, TIMES = np.logspace(-4, 2, 25), np.logspace(-2.5, 3.5, 25)
FLOW_TIMES = np.logspace(-2, 7, 28)
"""Hard samples have weights of 10⁻⁶ and less, and FLOW takes that much longer to fit them."""
TAUS = np.linspace(0.0, 1.2, 25)
RANKS = np.array([1, 2, 4])
SUBNET_STEPS = np.unique(np.round(np.logspace(0, np.log10(256), 17)))

ADVERSARIAL_STEPS = 50
ANCHORS = 8
L1_STEPS = 200
LOW_RANK_ALTERNATIONS = 8


class Given(NamedTuple):
    """All that a method may look at: one fine-tuning task, and what is left of pretraining."""

    X: Array
    """Fine-tuning design (n, p)."""
    y: Array
    theta_1: Array
    replay_X: Array
    """Pretraining samples (n, p), for replay only."""
    replay_y: Array
    fisher: Array
    """diag Σ₁ (p,), for EWC only."""
    anchors: Array
    """Pretrained models (ANCHORS, p) with errors like that of θ₁, the first of them; for several anchors only."""
    key: Array

    @property
    def residual(self) -> Array:
        """y − Xθ₁ (n,)."""
        return self.y - self.X @ self.theta_1


class Method(NamedTuple):
    """Weights (…, p) from a `Given` and hyperparameters, and the grid they are chosen from."""

    fit: Callable[..., Array]
    grid: dict[str, np.ndarray]
    """At most two axes."""
    refactors: bool = False
    """Whether every value on the first of two axes needs an eigendecomposition of its own."""


def _unit(rows: Array) -> Array:
    """Mean eigenvalue of XXᵀ/n."""
    return jnp.vdot(rows, rows) / rows.shape[0] ** 2


def _filtered(given: Given, filter: Filter) -> Array:
    """Unweighted fine-tuning by a spectral filter; τ·filter is its ensemble (1−τ)θ₁ + τθ̂."""
    return fine_tune(given.X, given.y, given.theta_1, filter)


def _early_stopping(given: Given, time: Array) -> Array:
    """Gradient flow, stopped at a time."""
    return _filtered(given, GradientFlow(time / _unit(given.X)))


def _ridge(given: Given, penalty: Array, tau: Array | float = 1.0) -> Array:
    """Penalty λ‖θ−θ₁‖², and its ensemble."""
    return _filtered(given, tau * Ridge(penalty * _unit(given.X)))


def _flow(given: Given, time: Array, tau: Array | float = 1.0) -> Array:
    """Weights e^{−ℓ/T} at the median temperature, stopped early: run to interpolation weights would not matter."""
    weights = flow_weights(given.residual**2)
    filter = GradientFlow(time / _unit(given.X))
    return fine_tune(given.X, given.y, given.theta_1, tau * filter, weights)


def _self_distillation(given: Given, mix: Array, penalty: Array) -> Array:
    """Ridge on labels mixed with the answers of ridge itself."""
    return _filtered(given, SelfDistillation(penalty * _unit(given.X), mix))


def _sharpness_aware(given: Given, radius: Array, time: Array) -> Array:
    """Gradient flow along the gradient at θ + ρ∇L, stopped at a time; ρ in units of the inverse mean eigenvalue."""
    unit = _unit(given.X)
    return _filtered(given, SharpnessAware(time / unit, radius / unit))


def _layer_dropping(given: Given, keep: Array, time: Array) -> Array:
    """θ − θ₁ is dropped as a whole, a layer, in a random share of the steps: an ensemble, later (docs, C5)."""
    return _filtered(given, keep * GradientFlow(time / keep / _unit(given.X)))


def _dropout(given: Given, rate: Array) -> Array:
    """Inputs of θ − θ₁ are dropped at a rate q and scaled by 1/(1−q): ridge, penalty q/(1−q) Σ_j (XᵀX/n)_jj d_j²."""
    return _ridge_in(given, jnp.mean(given.X**2, axis=0), rate / (1 - rate))


def _adversarial(given: Given, radius: Array) -> Array:
    """Least squares at the worst inputs within a distance, in units of the least that keeps θ₁."""
    X, y, theta_1 = given.X, given.y, given.theta_1
    return adversarial_fine_tune(X, y, theta_1, radius * largest_radius(X, y, theta_1), steps=ADVERSARIAL_STEPS)


def _smooth(given: Given, time: Array) -> Array:
    """Weights 1/(1 + ℓ/T) at the median temperature, stopped early."""
    weights = smooth_weights(given.residual**2)
    return fine_tune(given.X, given.y, given.theta_1, GradientFlow(time / _unit(given.X)), weights)


def _s3ft(given: Given, threshold: Array, time: Array) -> Array:
    """Own answers where they miss by at most `threshold` times the median miss, gold elsewhere; stopped early."""
    tolerance = threshold * jnp.median(abs(given.residual))
    targets = s3ft_targets(given.X @ given.theta_1, given.y, abs(given.residual) <= tolerance)
    return fine_tune(given.X, targets.values, given.theta_1, GradientFlow(time / _unit(given.X)))


def _replay(given: Given, fraction: Array, penalty: Array) -> Array:
    """Ridge on the fine-tuning data and a number of pretraining samples, `fraction` of n."""
    n = given.X.shape[0]
    weights = jnp.concatenate([jnp.ones(n), jnp.arange(n) < fraction * n])
    X, y = jnp.concatenate([given.X, given.replay_X]), jnp.concatenate([given.y, given.replay_y])
    return fine_tune(X, y, given.theta_1, Ridge(penalty * _unit(given.X)), weights)


def _ewc(given: Given, penalty: Array) -> Array:
    """Penalty λ Σ F_j(θ_j−θ₁_j)², F the diagonal of the Fisher information Σ₁: ridge in coordinates F^{1/2}θ."""
    return _ridge_in(given, given.fisher, penalty * _unit(given.X * jax.lax.rsqrt(given.fisher)))


def _ridge_in(given: Given, metric: Array, penalty: Array) -> Array:
    """Ridge with the penalty λ Σ_j metric_j (θ_j−θ₁_j)²: plain ridge in coordinates metric^{1/2}θ."""
    root = jax.lax.rsqrt(metric)
    return given.theta_1 + root * fine_tune(given.X * root, given.residual, jnp.zeros_like(root), Ridge(penalty))


def _l1(given: Given, penalty: Array) -> Array:
    """Penalty λ‖θ−θ₁‖₁ by accelerated proximal gradient; λ in units of the least that keeps θ₁.

    The steps are enough for all but the smallest penalties of the grid, where they end 1% before the solution.
    """
    X, n = given.X, given.X.shape[0]
    rate = 1 / (jnp.linalg.eigvalsh(X @ X.T / n)[-1])
    threshold = rate * penalty[:, None] * jnp.max(abs(given.residual @ X)) / n

    def step(state: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        moved, ahead = state
        proposal = ahead + rate / n * (given.residual - ahead @ X.T) @ X
        proposal = jnp.sign(proposal) * jnp.maximum(abs(proposal) - threshold, 0)
        return (proposal, proposal + k / (k + 3) * (proposal - moved)), None

    start = jnp.zeros((penalty.size, X.shape[1]), X.dtype)
    (moved, _), _ = jax.lax.scan(step, (start, start), jnp.arange(L1_STEPS))
    return given.theta_1 + moved


def _low_rank(given: Given, rank: Array, penalty: Array) -> Array:
    """θ = θ₁ + vec(BA) with BA the change of a weight matrix as square as can be, after LoRA; by alternating ridge.

    The loss is ‖y−Xθ‖²/2n + λ(‖A‖²+‖B‖²)/2, B with `rank` columns; λ in units of the least that keeps θ₁.
    Starts along the top singular vectors of the first gradient; with small penalties that may end in a local minimum.
    """
    n, p = given.X.shape
    rows = round(p**0.5)
    columns, widest = -(-p // rows), int(RANKS[-1])
    matrices = jnp.pad(given.X, ((0, 0), (0, rows * columns - p))).reshape(n, rows, columns)
    left, scales, _ = jnp.linalg.svd(jnp.tensordot(given.residual, matrices, 1) / n)

    def ridge_step(features: Array, penalty: Array) -> Array:
        flat = features.reshape(n, -1)
        system = flat.T @ flat / n + penalty * scales[0] * jnp.eye(flat.shape[1])
        return jax.scipy.linalg.solve(system, flat.T @ given.residual / n, assume_a="pos").reshape(features.shape[1:])

    def at(penalty: Array) -> Array:
        def alternate(B: Array, _: None) -> tuple[Array, None]:
            A = ridge_step(jnp.einsum("nij,ik->nkj", matrices, B), penalty)
            return ridge_step(jnp.einsum("nij,kj->nik", matrices, A), penalty), None

        B, _ = jax.lax.scan(alternate, left[:, :widest] * (jnp.arange(widest) < rank), None, LOW_RANK_ALTERNATIONS)
        A = ridge_step(jnp.einsum("nij,ik->nkj", matrices, B), penalty)
        return (B @ A).ravel()[:p]

    return given.theta_1 + jax.lax.map(at, penalty)


def _subnet(given: Given, keep: Array, steps: Array) -> Array:
    """Gradient descent in which every step moves a fresh random share `keep` of the weights (after Bi-Drop)."""
    X, n = given.X, given.X.shape[0]
    rate = 1 / (n * jnp.linalg.eigvalsh(X @ X.T / n)[-1])

    def step(moved: Array, key: Array) -> tuple[Array, Array]:
        chosen = jax.random.bernoulli(key, keep, moved.shape)
        moved = moved + rate * chosen * ((given.residual - X @ moved) @ X)
        return moved, moved

    keys = jax.random.split(given.key, int(SUBNET_STEPS[-1]))
    _, path = jax.lax.scan(step, jnp.zeros_like(given.theta_1), keys)
    return given.theta_1 + path[steps.astype(int) - 1]


def _emulated(given: Given, size: Array, tau: Array) -> Array:
    """The change of a small model, with a random share `size` of the features, τ times, added to the large one."""
    p = given.X.shape[1]
    features = given.X * (jax.random.permutation(given.key, p) < size * p)
    return fine_tune(features, given.y, given.theta_1, tau * MinNorm())


def _several_anchors(given: Given, number: Array, penalty: Array) -> Array:
    """Penalty λ Σ_k ‖θ−θ⁽ᵏ⁾‖² towards several pretrained models: ridge to their mean."""
    chosen = (jnp.arange(ANCHORS) < number) / number
    return fine_tune(given.X, given.y, chosen @ given.anchors, Ridge(penalty * _unit(given.X)))


METHODS: dict[str, Method] = {
    "pretrained": Method(lambda given: given.theta_1, {}),
    "min-norm": Method(lambda given: _filtered(given, MinNorm()), {}),
    "early stopping": Method(_early_stopping, {"time": TIMES}),
    "ridge": Method(_ridge, {"penalty": PENALTIES}),
    "min-norm + ensemble": Method(lambda given, tau: _filtered(given, tau * MinNorm()), {"tau": TAUS}),
    "ridge + ensemble": Method(_ridge, {"penalty": PENALTIES, "tau": TAUS}),
    "FLOW": Method(_flow, {"time": FLOW_TIMES}),
    "FLOW + ensemble": Method(_flow, {"time": FLOW_TIMES[::2], "tau": TAUS}),
    "smooth weights": Method(_smooth, {"time": TIMES}),
    "self-distillation": Method(_self_distillation, {"mix": np.linspace(-2, 2, 9), "penalty": PENALTIES}),
    "sharpness-aware": Method(_sharpness_aware, {"radius": np.array([0.1, 1.0, 10.0]), "time": TIMES}),
    "layer dropping": Method(_layer_dropping, {"keep": np.array([0.25, 0.5, 0.75]), "time": TIMES}),
    "dropout": Method(_dropout, {"rate": 1 / (1 + np.logspace(3, -2, 21))}),
    "adversarial": Method(_adversarial, {"radius": np.logspace(-1.5, -0.02, 10)}),
    "S3FT": Method(_s3ft, {"threshold": np.array([0.25, 0.5, 1.0, 1.5, 2.0]), "time": TIMES}),
    "replay": Method(_replay, {"fraction": np.array([0.25, 0.5, 1.0]), "penalty": PENALTIES}, refactors=True),
    "EWC": Method(_ewc, {"penalty": PENALTIES}),
    "L1 to init": Method(_l1, {"penalty": np.logspace(-2.5, 0, 11)}),
    "low rank": Method(_low_rank, {"rank": RANKS, "penalty": np.logspace(-2.5, 0, 6)}, refactors=True),
    "random sub-nets": Method(_subnet, {"keep": np.array([0.1, 0.5]), "steps": SUBNET_STEPS}),
    "emulated": Method(_emulated, {"size": np.array([0.125, 0.25, 0.5, 0.75]), "tau": TAUS}, refactors=True),
    "several anchors": Method(_several_anchors, {"number": np.array([2, 4, 8]), "penalty": PENALTIES}),
}
"""Every method by name; an ensemble averages with θ₁."""


def over_grid(method: Method, given: Given) -> Array:
    """Weights (…, p) at every point of the grid, one axis per hyperparameter."""
    if not method.grid:
        return method.fit(given)
    *first, last = [jnp.asarray(values) for values in method.grid.values()]
    if not first:
        return method.fit(given, last)
    # Eigendecompositions of a batch, which vmap would make, fight over the threads of a busy machine: one by one then.
    along = jax.lax.map if method.refactors else lambda function, values: jax.vmap(function)(values)
    return along(lambda value: method.fit(given, value, last), first[0])


def sample_given(key: Array, problem: TwoTaskProblem, n: int, law: str = "gaussian") -> tuple[Given, Array]:
    """One task of a problem with all that methods may look at, and its shift δ (p,); θ₁* = 0.

    The other anchors have the pretraining error u with random signs.
    """
    task_key, replay_key, noise_key, sign_key, method_key = jax.random.split(key, 5)
    task = sample_task(task_key, problem, n, law)
    replay_X = sample_design(replay_key, problem.pretrain_covariance, n, law)
    replay_y = problem.noise_std * jax.random.normal(noise_key, (n,), task.X.dtype)
    signs = jax.random.rademacher(sign_key, (ANCHORS, problem.p), task.X.dtype).at[0].set(1)
    fisher = problem.pretrain_covariance.diagonal()
    given = Given(task.X, task.y, task.theta_1, replay_X, replay_y, fisher, signs * task.theta_1, method_key)
    return given, task.theta_2_star
