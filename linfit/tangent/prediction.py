"""A fine-tuning of a real network, predicted before it is run: outputs and losses along λ × t × τ (docs, G1, G2).

With r = y − f₁ on the training set, W the weights of its samples, W^{1/2}KW^{1/2}/n = U diag(s) Uᵀ and c = UᵀW^{1/2}r,
a fine-tuned ensemble of the linearised model has, anywhere,

    f(x) = f₁(x) + τ · B(x) α,      B(x) = K(x, X)W^{1/2}U/n,

with α = g(s)·c for squared loss and every spectral filter g, and α from the flow of `linfit.tangent.entropy` for
cross-entropy. Everything a user turns, λ, t, τ, needs B, s and c alone: the network is used once.

Losses are means over samples: ‖y − f‖² (squared, no ½) or cross-entropy. Penalty and time refer to K/n, n samples:
ridge minimises (1/n) Σ_i w_i‖y_i − f_i‖² + λ‖θ−θ₁‖², and t is step size × steps on (1/2n) Σ_i w_i‖y_i − f_i‖², or on
(1/n) Σ_i w_i times the cross-entropy.
"""

from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.filters import Ensemble, Filter, GradientDescent, GradientFlow
from linfit.internal.checks import ArrayLike, broadcastable, real_array
from linfit.internal.files import open_arrays, whole_file
from linfit.risk import Parabola, Risk
from linfit.tangent.entropy import Start, cross_entropy, descend, flow
from linfit.tangent.krylov import Krylov

__all__ = ["Domain", "Prediction"]

Which = Literal["train", "test", "other"]
LOSSES = ("squared", "entropy")
TRUSTED_CURVATURE = 0.15
"""Curvature up to which a prediction is trusted: chosen and tried on the real fine-tunings of docs/predictions.md,
which `linfit validate` makes again."""


class Domain(eqx.Module):
    """Samples on which something is predicted."""

    outputs: Array  #: f₁ (m, k).
    labels: Array  #: y (m, k).
    basis: Array  #: B (m, k, q): outputs move by B α.

    def moved(self, alpha: Array) -> Array:
        """Bα, (…, m, k)."""
        flat = alpha @ self.basis.reshape(-1, self.basis.shape[-1]).T
        return flat.reshape(*alpha.shape[:-1], *self.labels.shape)


class Prediction(eqx.Module):
    """What the tangent features say about a fine-tuning; from `linfit.predict`, or `load` of what was saved.

    Filters are linfit's: with squared loss every one; with cross-entropy `GradientFlow(time)` and
    `GradientDescent(step_size, steps)`, one step size. `tau` broadcasts against a filter's axes. `domain` is "train",
    "test" or "other".

    >>> import jax
    >>> from linfit import GradientFlow, Ridge, predict
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> network = lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"]
    >>> weights = {"in": jax.random.normal(keys[0], (4, 50)), "out": jax.random.normal(keys[1], (50, 1)) / 7}
    >>> x = jax.random.normal(keys[2], (40, 4))
    >>> prediction = predict(network, weights, (x[:20], x[:20, :1]), (x[20:], x[20:, :1]))
    >>> prediction.losses(Ridge(jnp.logspace(-3, 1, 5))).shape, prediction.best_tau(GradientFlow([1.0, 9.0])).shape
    ((5, 20), (2,))
    """

    eigenvalues: Array  #: s (q,), ascending.
    vectors: Array  #: U (n, k, q).
    coefficients: Array  #: c (q,).
    draws: Array  #: c of other labels (q, D), from `label_draws`.
    root_weights: Array  #: √w (n,).
    train: Domain
    test: Domain
    other: Domain | None
    krylov: Krylov | None  #: Where the kernel was too large: q products of it, and their error.
    noise_std: Array  #: σ of the labels, per output: as given, or from leaving one out; NaN where unknown.
    diagnostics: dict[str, Array]  #: Numbers known before training that tell how far linearisation may be trusted.
    loss: Literal["squared", "entropy"] = eqx.field(static=True)

    @property
    def trusted(self) -> bool:
        """Whether `curvature_test`, and `curvature_other` if known, are at most 0.15 (docs, predictions; ours)."""
        known = [value for name, value in self.diagnostics.items() if name.startswith("curvature_")]
        return bool(known) and all(bool(value <= TRUSTED_CURVATURE) for value in known)

    def domain(self, which: Which) -> Domain:
        """Its samples; ValueError for another word, or "other" where none was given."""
        found = {"train": self.train, "test": self.test, "other": self.other}.get(which)
        if found is None:
            known = "train, test, other" if self.other is not None else "train, test (predict was given no other)"
            raise ValueError(f"domain must be one of {known}, got {which!r}")
        return found

    def coordinates(self, filter: Filter) -> Array:
        """α (…, q): the step of the weights is JᵀW^{1/2}Uα/n."""
        if not isinstance(filter, Filter):
            raise ValueError(f"filter must be a linfit filter such as Ridge(0.1), got {type(filter).__name__}")
        if self.loss == "squared":
            return filter(self.eigenvalues) * self.coefficients
        projection = self.root_weights[:, None, None] * self.vectors
        start = Start(self.train.outputs, self.train.labels, self.train.basis, projection)
        if isinstance(filter, Ensemble):
            return filter.tau[..., None] * self.coordinates(filter.filter)
        if isinstance(filter, GradientFlow):
            precise = self.eigenvalues.dtype == jnp.float64
            return flow(start, jnp.asarray(filter.time, self.eigenvalues.dtype), 1e-7 if precise else 1e-5)
        if isinstance(filter, GradientDescent):
            return descend(start, filter.step_size, filter.steps)
        raise ValueError(f"filter must be GradientFlow or GradientDescent for cross-entropy, got {filter}")

    def outputs(self, filter: Filter, tau: ArrayLike = 1.0, domain: Which = "test") -> Array:
        """f₁ + τ·Bα, (…, m, k)."""
        tau, alpha, where = real_array("tau", tau), self.coordinates(filter), self.domain(domain)
        broadcastable("tau", tau.shape, "the hyperparameters of the filter", alpha.shape[:-1])
        return where.outputs + where.moved(tau[..., None] * alpha)

    def losses(self, filter: Filter, tau: ArrayLike = 1.0, domain: Which = "test") -> Array:
        """The loss of every sample, (…, m)."""
        return losses(self.loss, self.outputs(filter, tau, domain), self.domain(domain).labels)

    def along(self, filter: Filter, domain: Which = "test") -> Parabola:
        """The mean squared error as a function of τ: a parabola, fields of the filter's shape (docs, S3, G1).

        Its variance is what label noise of `noise_std` adds in expectation (0 where that is unknown), its bias the
        rest: their sum is the error for the labels at hand. ValueError for cross-entropy, which is no parabola.
        """
        self.require_squared("along")
        where, alpha = self.domain(domain), self.coordinates(filter)
        residual, moved = where.labels - where.outputs, where.moved(alpha)
        m = len(residual)
        curvature = jnp.sum(moved**2, (-2, -1)) / m
        variance = self._variance(where, filter(self.eigenvalues))
        constant = jnp.broadcast_to(jnp.sum(residual**2) / m, curvature.shape)
        return Parabola(constant, jnp.sum(residual * moved, (-2, -1)) / m, curvature - variance, variance)

    # Labels y + ε move c by UᵀW^{1/2}ε, whose covariance is σ² UᵀWU: tr(B diag(g) UᵀWU diag(g) Bᵀ) = gᵀ(BᵀB ∘ UᵀWU)g.
    def _variance(self, where: Domain, g: Array) -> Array:
        if self.krylov is not None or not bool(jnp.isfinite(self.noise_std)):
            return jnp.zeros(g.shape[:-1], g.dtype)
        scale = self.noise_std**2 / len(where.labels)
        if bool(jnp.all(self.root_weights == 1)):
            return scale * (g**2 @ jnp.sum(where.basis**2, (0, 1)))
        U, B = (array.reshape(-1, array.shape[-1]) for array in (self.vectors, where.basis))
        weights = jnp.repeat(self.root_weights**2, self.vectors.shape[1])
        return scale * jnp.sum((g @ ((B.T @ B) * ((U.T * weights) @ U))) * g, axis=-1)

    def decomposition(self, filter: Filter, tau: ArrayLike = 1.0, domain: Which = "test") -> Risk:
        """Squared bias and variance over the `label_draws` that predict was given; unbiased for D ≥ 2 of them.

        Bias is the error of the mean prediction against the labels of the domain, what is noise in those included.
        """
        self.require_squared("decomposition")
        count = self.draws.shape[1]
        if count < 2:
            raise ValueError(f"label_draws must have held at least 2 draws for a decomposition, got {count}")
        where, tau = self.domain(domain), real_array("tau", tau)
        alpha = filter(self.eigenvalues)[..., None, :] * self.draws.T * tau[..., None, None]
        outputs = where.outputs + where.moved(alpha)
        variance = jnp.var(outputs, axis=-3, ddof=1).sum(-1).mean(-1)
        total = jnp.sum((where.labels - outputs) ** 2, axis=-1).mean((-1, -2))
        return Risk(total - variance, variance)

    def best_tau(self, filter: Filter, domain: Which = "test") -> Array:
        """τ* of least loss: exact for squared loss; for cross-entropy in [0, 2], where the loss is convex in τ."""
        if self.loss == "squared":
            return self.along(filter, domain).optimal_tau
        where = self.domain(domain)
        return _least_entropy(where.outputs, where.labels, where.moved(self.coordinates(filter)))

    def error(self, filter: Filter, domain: Which = "test") -> Array:
        """Error (…) of outputs that too few kernel products leave, root mean square per sample; 0 if dense.

        A bound on the training set. Elsewhere an estimate: that bound times twice the largest ratio of outputs there to
        training outputs among the last quarter of the Krylov basis.
        """
        self.domain(domain)
        if self.krylov is None:
            return jnp.zeros(filter(self.eigenvalues).shape[:-1])
        # The kernel acts on W^{1/2}-weighted outputs, whose mean square the amplification refers to.
        return self.krylov.error(filter)[..., 0] * jnp.sqrt(self.amplification(domain))

    def amplification(self, domain: Which) -> Array:
        """Mean square of a domain's outputs per unit of the training outputs' square, late in the Krylov basis."""
        assert self.krylov is not None
        sizes = [d.labels.size for d in (self.train, self.test, self.other) if d is not None]
        position = ("train", "test", "other").index(domain)
        first = sum(sizes[:position])
        part = self.krylov.amplification[first : first + sizes[position]]
        # Twice the largest ratio seen: the error's direction is none of those, only like them.
        return (1.0 if domain == "train" else 4.0) * jnp.max(part.sum(axis=0)) / len(self.domain(domain).labels)

    def distance(self, filter: Filter) -> Array:
        """‖θ̂ − θ₁‖ (…) of the linearised model: ‖JᵀW^{1/2}Uα/n‖² = αᵀ diag(s) α / n."""
        return jnp.sqrt(self.coordinates(filter) ** 2 @ self.eigenvalues / len(self.train.labels))

    def default_times(self) -> Array:
        """40 times, evenly spaced in log t, from 0.1/s_max to 10⁴/s_max."""
        return jnp.logspace(-1, 4, 40, dtype=self.eigenvalues.dtype) / self.eigenvalues.max()

    def default_plan(self) -> GradientFlow:
        """The flow with that of the default times whose loss on the test data is least."""
        times = self.default_times()
        return GradientFlow(times[int(jnp.argmin(self.losses(GradientFlow(times)).mean(-1)))])

    def save(self, path: str | Path) -> None:
        """Everything that is needed to turn λ, t and τ without the network, as one .npz without pickles."""
        save(self, path)

    @staticmethod
    def load(path: str | Path) -> "Prediction":
        """What `save` wrote, checked; ValueError that names what is missing or does not fit."""
        return load(path)

    def require_squared(self, what: str) -> None:
        """ValueError unless the loss is squared."""
        if self.loss != "squared":
            raise ValueError(f"loss must be squared for {what}, got {self.loss}")


def losses(loss: str, outputs: Array, labels: Array) -> Array:
    """The loss of each sample, (…, m)."""
    return jnp.sum((labels - outputs) ** 2, axis=-1) if loss == "squared" else cross_entropy(outputs, labels)


@jax.jit
def _least_entropy(outputs: Array, labels: Array, moved: Array) -> Array:
    """τ in [0, 2] at which the slope of the convex mean cross-entropy of outputs + τ·moved is 0, by bisection."""

    def slope(tau: Array) -> Array:
        excess = jax.nn.softmax(outputs + tau[..., None, None] * moved) - labels
        return jnp.sum(excess * moved, axis=(-2, -1))

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        rising = slope(middle) > 0
        return jnp.where(rising, ends[0], middle), jnp.where(rising, middle, ends[1])

    zero = jnp.zeros(moved.shape[:-2], moved.dtype)
    low, high = jax.lax.fori_loop(0, 40, halve, (zero, zero + 2))
    return (low + high) / 2


FORMAT = "linfit prediction 1"


def save(prediction: Prediction, path: str | Path) -> None:
    """The arrays of a prediction by name, "test/basis" and so on; the file appears whole or not at all."""
    leaves = jax.tree_util.tree_leaves_with_path(prediction)
    arrays = {jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf) for key, leaf in leaves}
    target = Path(path)
    if target.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {target.name}")
    with whole_file(target) as temporary:
        np.savez(temporary, format=np.array(FORMAT), loss=np.array(prediction.loss), **arrays)  # type: ignore[arg-type]


def load(path: str | Path) -> Prediction:
    """The prediction that `save` wrote; ValueError for any other file, and for arrays that do not fit together."""
    try:
        with open_arrays(path) as file:
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:
        raise ValueError(f"path must be a saved prediction, got {Path(path).name}: {error}") from None
    if str(arrays.pop("format", "")) != FORMAT:
        raise ValueError(f"path must be a saved prediction ({FORMAT}), got {Path(path).name}")
    loss = str(arrays.pop("loss", ""))
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r} in {Path(path).name}")
    trees: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        group, _, key = name.rpartition("/")
        finite = name not in ("noise_std",) and not name.startswith("diagnostics/")
        trees.setdefault(group, {})[key] = real_array(name, array, finite=finite) if array.size else jnp.asarray(array)
    try:
        groups = {
            name: kind(**trees[name]) if name in trees else None
            for name, kind in {"train": Domain, "test": Domain, "other": Domain, "krylov": Krylov}.items()
        }
        prediction = Prediction(**trees[""], **groups, diagnostics=trees.get("diagnostics", {}), loss=loss)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{Path(path).name} lacks something, or has too much: {error}") from None
    _check(prediction)
    return prediction


def _check(prediction: Prediction) -> None:
    """ValueError unless the arrays of a loaded prediction fit together."""
    q, labels = prediction.eigenvalues.shape[-1], prediction.train.labels
    wanted: dict[str, tuple[Array, tuple[int, ...]]] = {
        "eigenvalues": (prediction.eigenvalues, (q,)),
        "coefficients": (prediction.coefficients, (q,)),
        "vectors": (prediction.vectors, (*labels.shape, q)),
        "draws": (prediction.draws, (q, prediction.draws.shape[-1])),
        "root_weights": (prediction.root_weights, labels.shape[:1]),
    }
    for name in ("train", "test", "other"):
        domain = getattr(prediction, name)
        if domain is not None:
            size = (len(domain.outputs), labels.shape[-1])
            wanted |= {
                f"{name}/outputs": (domain.outputs, size),
                f"{name}/labels": (domain.labels, size),
                f"{name}/basis": (domain.basis, (*size, q)),
            }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
