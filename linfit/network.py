"""Two-layer linear networks W = W₁W₂ and how they learn (docs, §7).

W₁ (m, h), W₂ (h, k); the loss is L = ½‖W₁W₂ − A‖²_F, or on data (1/2n)‖XWᵀ − Y‖²_F. Leading axes of the weights are
replicas; everything else (targets, step sizes, penalties) broadcasts against them, so that seeds × perturbations ×
hyperparameters are one call. Time is step size × steps. `theory.overtraining` has the flow in closed form. ValueError
for NaN or Inf, negative sizes, scales, γ or penalties, times or step counts that do not ascend, shapes that do not fit.

>>> from linfit import network
>>> target = [[2.0, 0.0], [0.0, 1.0]]
>>> later = network.gradient_flow(network.aligned_network(target, 0.01), target, [1.0, 2.0, 5.0])
>>> later.product[:, 0, 0].round(3)  # the larger feature first
Array([0.431, 1.875, 2.   ], dtype=float64)
>>> later.product[:, 1, 1].round(3)
Array([0.069, 0.355, 0.996], dtype=float64)
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import ArrayLike, Maybe, count, is_concrete, non_negative, positive, real_array, same_size

__all__ = [
    "TwoLayer",
    "aligned_network",
    "constant",
    "cosine",
    "data_objective",
    "descend",
    "gradient",
    "gradient_flow",
    "loss",
    "perturb",
    "sample_network",
    "target_objective",
    "warmup_stable_decay",
]


class TwoLayer(NamedTuple):
    """The weights of one network, or of many along leading axes."""

    w1: Array  #: W₁ (…, m, h).
    w2: Array  #: W₂ (…, h, k).

    @property
    def product(self) -> Array:
        """W = W₁W₂ (…, m, k)."""
        return self.w1 @ self.w2


class Objective(eqx.Module):
    """L(W) = ½ tr(W C Wᵀ) − tr(W Mᵀ) + constant: least squares through its sufficient statistics."""

    cross: Array  #: M (…, m, k); the target A itself where C = I.
    covariance: Array | None  #: C (…, k, k), None for the identity.
    constant: Array  #: The loss of W = 0.

    def loss(self, product: Array) -> Array:
        """L (…,) of W (…, m, k)."""
        if self.covariance is None:
            return jnp.sum((product - self.cross) ** 2, axis=(-2, -1)) / 2
        return jnp.sum(product * (product @ self.covariance / 2 - self.cross), axis=(-2, -1)) + self.constant

    def slope(self, product: Array) -> Array:
        """∂L/∂W = WC − M (…, m, k)."""
        return (product if self.covariance is None else product @ self.covariance) - self.cross


def target_objective(target: ArrayLike) -> Objective:
    """L = ½‖W − A‖²_F for a target A (…, m, k): the population loss of white inputs.

    >>> from linfit.network import TwoLayer, loss, target_objective
    >>> loss(TwoLayer([[0.0]], [[0.0, 0.0]]), target_objective([[3.0, 4.0]]))
    Array(12.5, dtype=float64)
    """
    target = real_array("target", target)
    if target.ndim < 2:
        raise ValueError(f"target must have shape (…, m, k), got {target.shape}")
    return Objective(target, None, jnp.sum(target**2, axis=(-2, -1)) / 2)


def data_objective(X: ArrayLike, Y: ArrayLike) -> Objective:
    """L = (1/2n)‖XWᵀ − Y‖²_F for inputs X (…, n, k) and outputs Y (…, n, m); ValueError if row counts differ.

    >>> from linfit.network import TwoLayer, data_objective, loss
    >>> loss(TwoLayer([[1.0]], [[1.0, 1.0]]), data_objective([[1.0, 0.0], [0.0, 2.0]], [[1.0], [3.0]]))
    Array(0.25, dtype=float64)
    """
    X, Y = real_array("X", X), real_array("Y", Y)
    if X.ndim < 2 or Y.ndim < 2:
        raise ValueError(f"X and Y must have shapes (…, n, k) and (…, n, m), got {X.shape} and {Y.shape}")
    n = X.shape[-2]
    same_size("Y", Y.shape[-2], "the rows of X", n)
    return Objective(Y.mT @ X / n, X.mT @ X / n, jnp.sum(Y**2, axis=(-2, -1)) / (2 * n))


def loss(network: TwoLayer, objective: Objective | ArrayLike) -> Array:
    """L(W₁W₂) (…,); a bare matrix (…, m, k) as objective is the target A of ½‖W₁W₂ − A‖²_F.

    >>> from linfit.network import TwoLayer, loss
    >>> loss(TwoLayer([[1.0], [1.0]], [[1.0, 2.0]]), [[0.0, 0.0], [1.0, 2.0]])
    Array(2.5, dtype=float64)
    """
    network, objective = _checked(network, objective)
    return objective.loss(network.product)


def gradient(network: TwoLayer, objective: Objective) -> TwoLayer:
    """∂L/∂W₁ = (WC − M) W₂ᵀ and ∂L/∂W₂ = W₁ᵀ(WC − M), in the shapes of the weights."""
    slope = objective.slope(network.product)
    return TwoLayer(slope @ network.w2.mT, network.w1.mT @ slope)


def aligned_network(
    target: ArrayLike, initial: ArrayLike, imbalance: ArrayLike = 0.0, hidden_size: int | None = None
) -> TwoLayer:
    """Weights with the singular vectors of a target A = U diag(a) Vᵀ and given singular values s (docs, §7).

        W₁ = U diag(w₁) [I 0],  W₂ = [I 0]ᵀ diag(w₂) Vᵀ,  w₁w₂ = s,  w₁² − w₂² = c

    Args:
        target: A (m, k).
        initial: s ≥ 0, a number or one per singular value of A (min(m, k),) in descending order.
        imbalance: c, a number or one per singular value; gradient flow keeps it. 0 is the balanced start.
        hidden_size: h ≥ min(m, k), the default.

    >>> from linfit.network import aligned_network
    >>> aligned_network([[2.0, 0.0], [0.0, 1.0]], [0.25, 0.04]).w1
    Array([[0.5, 0. ],
           [0. , 0.2]], dtype=float64)
    """
    target = real_array("target", target, ndim=2)
    U, a, Vt = jnp.linalg.svd(target, full_matrices=False)
    rank = a.shape[0]
    hidden_size = rank if hidden_size is None else count("hidden_size", hidden_size, minimum=rank)
    initial = non_negative("initial", initial)
    if initial.shape not in ((), (rank,)):
        raise ValueError(f"initial must be a number or have shape ({rank},), got {initial.shape}")
    w1, w2 = layer_modes(initial, imbalance)
    padding = hidden_size - rank
    return TwoLayer(jnp.pad(U * w1, ((0, 0), (0, padding))), jnp.pad((Vt.T * w2).T, ((0, padding), (0, 0))))


def layer_modes(product: ArrayLike, imbalance: ArrayLike) -> tuple[Array, Array]:
    """w₁ and w₂ ≥ 0 with w₁w₂ = s and w₁² − w₂² = c: w₁² = (√(c²+4s²) + c)/2, w₂² = (√(c²+4s²) − c)/2."""
    product, imbalance = real_array("product", product), real_array("imbalance", imbalance)
    larger = jnp.sqrt((jnp.hypot(imbalance, 2 * product) + jnp.abs(imbalance)) / 2)
    smaller = jnp.where(larger > 0, product / jnp.where(larger > 0, larger, 1), 0)  # no cancellation
    return jnp.where(imbalance >= 0, larger, smaller), jnp.where(imbalance >= 0, smaller, larger)


def sample_network(
    key: Array, shape: tuple[int, int, int], scale: ArrayLike, scale_2: Maybe = None, replicas: tuple[int, ...] = ()
) -> TwoLayer:
    """Independent N(0, scale²) entries: small, the usual start of feature learning.

    Args:
        key: of the random numbers.
        shape: (m, h, k).
        scale: standard deviation ≥ 0 of the entries of W₁.
        scale_2: that of W₂; `scale` if not given. Two different scales make an unbalanced start.
        replicas: leading axes, of independent networks.

    >>> import jax
    >>> from linfit.network import sample_network
    >>> sample_network(jax.random.key(0), (2, 5, 3), 0.01, replicas=(7,)).w2.shape
    (7, 5, 3)
    """
    m, h, k = (count(f"shape[{axis}]", size) for axis, size in enumerate(shape))
    scale = non_negative("scale", scale, ndim=0)
    scale_2 = scale if scale_2 is None else non_negative("scale_2", scale_2, ndim=0)
    key_1, key_2 = jax.random.split(key)
    return TwoLayer(
        scale * jax.random.normal(key_1, (*replicas, m, h), scale.dtype),
        scale_2 * jax.random.normal(key_2, (*replicas, h, k), scale_2.dtype),
    )


def perturb(
    key: Array, network: TwoLayer, gamma: ArrayLike, gamma_2: Maybe = None, replicas: tuple[int, ...] = ()
) -> TwoLayer:
    """The network plus independent Gaussian noise of standard deviation γ per entry (docs, N2; paper 2503.19206).

    Args:
        key: of the random numbers.
        network: weights W₁ (…, m, h), W₂ (…, h, k), each entry of which gets noise of its own.
        gamma: γ ≥ 0 of W₁.
        gamma_2: that of W₂; `gamma` if not given. γ times the scales of a Gaussian start: noise of its covariance.
        replicas: leading axes, of independent perturbations.

    >>> import jax
    >>> from linfit.network import TwoLayer, perturb
    >>> perturb(jax.random.key(0), TwoLayer(jax.numpy.eye(2), jax.numpy.eye(2)), 0.1, replicas=(5,)).w1.shape
    (5, 2, 2)
    """
    gamma = non_negative("gamma", gamma, ndim=0)
    gamma_2 = gamma if gamma_2 is None else non_negative("gamma_2", gamma_2, ndim=0)
    (*leading, m, h), k = network.w1.shape, network.w2.shape[-1]
    scales = gamma.astype(network.w1.dtype), gamma_2.astype(network.w2.dtype)
    return jax.tree.map(jnp.add, network, sample_network(key, (m, h, k), *scales, (*replicas, *leading)))


def constant(step_size: ArrayLike, steps: int) -> Array:
    """The same step size throughout, shape (…, steps); axes of `step_size` in front.

    >>> from linfit.network import constant
    >>> constant(0.5, 3)
    Array([0.5, 0.5, 0.5], dtype=float64)
    """
    step_size = positive("step_size", step_size)
    step_size = step_size.astype(step_size.dtype)  # strongly typed, where it was a Python number
    return jnp.broadcast_to(step_size[..., None], (*step_size.shape, count("steps", steps)))


def cosine(step_size: ArrayLike, steps: int, final: float = 0.0) -> Array:
    """Cosine decay from the peak to `final` times the peak: η_j = η(f + (1−f)(1 + cos(πj/K))/2), j = 0…K−1.

    >>> from linfit.network import cosine
    >>> cosine(1.0, 4).round(3)
    Array([1.   , 0.854, 0.5  , 0.146], dtype=float64)
    """
    peak = constant(step_size, steps)
    final = _fraction("final", final)
    return peak * (final + (1 - final) * (1 + jnp.cos(jnp.pi * jnp.arange(steps) / steps)) / 2)


def warmup_stable_decay(step_size: ArrayLike, steps: int, warmup: float = 0.05, decay: float = 0.2) -> Array:
    """Linear warm-up over a first fraction of the steps, linear decay to zero over a last one, constant between.

    Args:
        step_size, steps: the peak (…) and the number of steps.
        warmup, decay: fractions of the steps that rise and that fall; both together at most 1.

    >>> from linfit.network import warmup_stable_decay
    >>> warmup_stable_decay(1.0, 8, warmup=0.25, decay=0.5)
    Array([0.5 , 1.  , 1.  , 1.  , 1.  , 0.75, 0.5 , 0.25], dtype=float64)
    """
    peak = constant(step_size, steps)
    warmup, decay = _fraction("warmup", warmup) * steps, _fraction("decay", decay) * steps
    if warmup + decay > steps:
        raise ValueError(f"warmup + decay must be at most 1, got {(warmup + decay) / steps}")
    step = jnp.arange(steps)
    return peak * jnp.minimum(1, jnp.minimum((step + 1) / max(warmup, 1), (steps - step) / max(decay, 1)))


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return value


_Source = Objective | Callable[[Array], Objective]


def descend(
    network: TwoLayer,
    objective: _Source | ArrayLike,
    step_sizes: ArrayLike,
    save_at: Maybe = None,
    *,
    penalty: ArrayLike = 0.0,
    reference: TwoLayer | None = None,
    throw: bool = True,
) -> TwoLayer:
    """Gradient descent on L + (μ/2)‖θ − θ_ref‖², θ = (W₁, W₂); only the states asked for are kept.

        θ_{j+1} = θ_j − η_j (∇L(θ_j) + μ(θ_j − θ_ref))

    Args:
        network: the start, its leading axes replicas.
        objective: a target (…, m, k), an `Objective`, or a function of the step, for data that stream by.
        step_sizes: η (…, steps) from a schedule, its leading axes broadcasting against the replicas.
        save_at: ascending step counts (saved,), 0 the start, the leading axis of the result; if not given, the last
            state alone is returned, without that axis.
        penalty, reference: μ ≥ 0 (…), and where it pulls to, the start if not given.
        throw: whether weights that overflow raise ValueError; otherwise they are returned as they are.

    >>> from linfit import network
    >>> start = network.aligned_network([[1.0]], 0.1)
    >>> network.descend(start, [[1.0]], network.constant(0.1, 100), [0, 20, 100]).product.round(4).ravel()
    Array([0.1   , 0.8682, 1.    ], dtype=float64)
    """
    network, first = _checked(network, objective(jnp.asarray(0)) if callable(objective) else objective)
    step_sizes = non_negative("step_sizes", step_sizes)
    if step_sizes.ndim == 0:
        raise ValueError("step_sizes must have shape (…, steps), got a number; `constant` makes a schedule of it")
    save = _save_points(save_at, step_sizes.shape[-1])
    penalty = non_negative("penalty", penalty)
    unpenalised = is_concrete(penalty) and not np.any(np.asarray(penalty))
    anchor = None if unpenalised else (network if reference is None else _network("reference", reference))
    network = _broadcast(network, first, step_sizes.shape[:-1], penalty.shape)
    saved = _descend(network, objective if callable(objective) else first, step_sizes, save, penalty, anchor)
    if throw and is_concrete(saved.w1) and not all(np.isfinite(np.asarray(weights[-1])).all() for weights in saved):
        raise ValueError("step_sizes must be smaller: the weights overflowed (throw=False returns the other replicas)")
    return saved if save_at is not None else jax.tree.map(lambda leaf: leaf[0], saved)


@eqx.filter_jit
def _descend(
    network: TwoLayer, objective: _Source, rates: Array, save_at: Array, penalty: Array, anchor: TwoLayer | None
) -> TwoLayer:
    schedule = jnp.moveaxis(rates, -1, 0).astype(network.w1.dtype)[..., None, None]
    pull = penalty.astype(network.w1.dtype)[..., None, None]

    def step(index: Array, now: TwoLayer) -> TwoLayer:
        slope = gradient(now, objective if isinstance(objective, Objective) else objective(index))
        if anchor is not None:
            slope = jax.tree.map(lambda g, w, r: g + pull * (w - r), slope, now, anchor)
        return jax.tree.map(lambda w, g: w - schedule[index] * g, now, slope)

    def segment(state: tuple[Array, TwoLayer], stop: Array) -> tuple[tuple[Array, TwoLayer], TwoLayer]:
        now = jax.lax.fori_loop(state[0], stop, step, state[1])
        return (stop, now), now

    return jax.lax.scan(segment, (jnp.zeros_like(save_at[0]), network), save_at)[1]


def gradient_flow(
    network: TwoLayer,
    objective: Objective | ArrayLike,
    times: ArrayLike,
    *,
    penalty: ArrayLike = 0.0,
    reference: TwoLayer | None = None,
    rtol: float = 1e-8,
    atol: float = 1e-10,
) -> TwoLayer:
    """The limit of small steps of `descend`, θ' = −∇L − μ(θ − θ_ref), by diffrax (Dormand–Prince 5(4)).

    Args:
        network, objective, penalty, reference: as in `descend`, but for an objective that is a function.
        times: ascending t ≥ 0 (saved,), step size × steps; they become the leading axis of the result.
        rtol, atol: bounds of the relative and the absolute error of each step.

    >>> from linfit import network
    >>> start = network.aligned_network([[1.0]], 0.1)
    >>> network.gradient_flow(start, [[1.0]], [0.0, 2.0, 9.0]).product.round(4).ravel()
    Array([0.1   , 0.8585, 1.    ], dtype=float64)
    """
    network, objective = _checked(network, objective)
    times = non_negative("times", times, ndim=1)
    if is_concrete(times) and (np.diff(np.asarray(times)) < 0).any():
        raise ValueError(f"times must be ascending, got {times}")
    penalty = non_negative("penalty", penalty)
    anchor = network if reference is None else _network("reference", reference)
    network = _broadcast(network, objective, (), penalty.shape)
    return _flow(network, objective, times, penalty, anchor, rtol, atol)


@partial(jax.jit, static_argnames=("rtol", "atol"))
def _flow(
    network: TwoLayer, objective: Objective, times: Array, penalty: Array, reference: TwoLayer, rtol: float, atol: float
) -> TwoLayer:
    pull = penalty[..., None, None]

    def velocity(time: ArrayLike, now: TwoLayer, _: None) -> TwoLayer:
        return jax.tree.map(lambda g, w, r: -g - pull * (w - r), gradient(now, objective), now, reference)

    term, solver = diffrax.ODETerm(velocity), diffrax.Dopri5()
    save, control = diffrax.SaveAt(ts=times), diffrax.PIDController(rtol=rtol, atol=atol)
    solution = diffrax.diffeqsolve(
        term, solver, 0.0, times[-1], None, network, saveat=save, stepsize_controller=control, max_steps=1_000_000
    )
    return solution.ys


# Closed form of one mode. With W₁ = U diag(w₁)…, the flow of L is, mode by mode,
#     w₁' = w₂(a − w₁w₂),   w₂' = w₁(a − w₁w₂),   and c = w₁² − w₂² does not change.
# Since w₁w₂·w₂ = w₁·½(w₁² + w₂²) − ½c w₁ (and the like for w₂), q = (w₁, w₂) obeys
#     q' = Fq − ½|q|²q,   F = [[c/2, a], [a, −c/2]],   with eigenvalues ±d/2,   d = √(c² + 4a²),
# solved by q(t) = e^{Ft}q₀ / √(1 + ∫₀ᵗ|e^{Fr}q₀|² dr). In the eigenvectors e₊ = (cos φ, sin φ) and e₋ = (−sin φ, cos φ)
# of F, cos²φ = (d + c)/2d, and multiplied through by e^{−dt/2}, only E = e^{−dt} is left:
#     q(t) = (p₊e₊ + E p₋e₋) / √(E + (1 − E)/d · (p₊² + E p₋²)),   p± = q₀·e±.
def aligned_modes(w1: ArrayLike, w2: ArrayLike, target: ArrayLike, time: ArrayLike) -> tuple[Array, Array]:
    """(w₁, w₂) at t ≥ 0 (…), its axes in front of r, from those at 0, for a target a, (…, r) (docs, N1; ours)."""
    w1, w2, a = jnp.broadcast_arrays(real_array("w1", w1), real_array("w2", w2), real_array("target", target))
    time = non_negative("time", time)[..., None]
    c = w1**2 - w2**2
    squared = c**2 + 4 * a**2
    still = squared == 0
    d = jnp.sqrt(jnp.where(still, 1, squared))
    larger = jnp.where(still, 0.5, (d + jnp.abs(c)) / (2 * d))
    smaller = jnp.where(still, 0.5, 2 * a**2 / (d * (d + jnp.abs(c))))
    cos = jnp.sqrt(jnp.where(c >= 0, larger, smaller))
    sin = jnp.where(a < 0, -1, 1) * jnp.sqrt(jnp.where(c >= 0, smaller, larger))
    growing, decaying = w1 * cos + w2 * sin, w2 * cos - w1 * sin
    E = jnp.where(still, 1, jnp.exp(-d * time))
    ramp = jnp.where(still, time, -jnp.expm1(-d * time) / d)
    root = jnp.sqrt(E + ramp * (growing**2 + E * decaying**2))
    root = jnp.where(root > 0, root, 1)
    return (growing * cos - E * decaying * sin) / root, (growing * sin + E * decaying * cos) / root


def _network(name: str, network: TwoLayer) -> TwoLayer:
    if not isinstance(network, TwoLayer):
        raise ValueError(f"{name} must be a linfit.network.TwoLayer, got {type(network).__name__}")
    w1, w2 = real_array(f"{name}.w1", network.w1), real_array(f"{name}.w2", network.w2)
    if w1.ndim < 2 or w2.ndim < 2 or w1.shape[-1] != w2.shape[-2]:
        raise ValueError(f"{name} must have w1 (…, m, h) and w2 (…, h, k), got {w1.shape} and {w2.shape}")
    return TwoLayer(w1, w2)


def _checked(network: TwoLayer, objective: Objective | ArrayLike) -> tuple[TwoLayer, Objective]:
    network = _network("network", network)
    objective = objective if isinstance(objective, Objective) else target_objective(objective)
    expected = (network.w1.shape[-2], network.w2.shape[-1])
    if objective.cross.shape[-2:] != expected:
        raise ValueError(f"objective must be of shape {expected} for this network, got {objective.cross.shape[-2:]}")
    dtype = jnp.result_type(network.w1, network.w2, objective.cross)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), (network, objective))


def _broadcast(network: TwoLayer, objective: Objective, *axes: tuple[int, ...]) -> TwoLayer:
    """The network with a replica for every combination of the leading axes."""
    leading = (network.w1.shape[:-2], network.w2.shape[:-2], objective.cross.shape[:-2], *axes)
    try:
        batch = jnp.broadcast_shapes(*leading)
    except ValueError:
        what = "leading axes of network, objective, step sizes and penalty"
        raise ValueError(f"{what} must broadcast, got {', '.join(map(str, leading))}") from None
    return jax.tree.map(lambda weights: jnp.broadcast_to(weights, batch + weights.shape[-2:]), network)


def _save_points(save_at: Maybe, steps: int) -> Array:
    if save_at is None:
        return jnp.array([steps])
    save = jnp.asarray(save_at)
    if save.ndim != 1 or save.size == 0 or not jnp.issubdtype(save.dtype, jnp.integer):
        raise ValueError(f"save_at must be a list of step counts, got shape {save.shape} of {save.dtype}")
    if is_concrete(save):
        host = np.asarray(save)
        if host[0] < 0 or host[-1] > steps or (np.diff(host) < 0).any():
            raise ValueError(f"save_at must be ascending within 0…{steps}, got {host}")
    return save
