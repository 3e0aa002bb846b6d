"""From a network and data to a `Prediction`: the kernel once, or products with it (docs, G1, G2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.filters import Filter
from linfit.internal.checks import ArrayLike, Maybe, count, non_negative, real_array, same_size
from linfit.internal.linear_algebra import eigh
from linfit.tangent.diagnostics import diagnose
from linfit.tangent.jacobian import (
    MEMORY,
    Apply,
    Linearised,
    Moving,
    Network,
    Report,
    in_batches,
    kernel_of,
    linearised,
    network,
    outputs,
    outputs_like,
    take,
)
from linfit.tangent.krylov import krylov
from linfit.tangent.prediction import LOSSES, Domain, Prediction
from linfit.tangent.selection import noise_from_leaving_out

__all__ = ["from_kernels", "predict"]

DENSE = 5000
"""n·k up to which the kernel is formed and decomposed."""
PRODUCTS = 60
"""Kernel-vector products beyond that."""

Pairs = tuple[Any, ArrayLike]


class _Data(NamedTuple):
    """Samples, what the network says of them, and what it should say."""

    x: Any
    outputs: Array
    labels: Array


def predict(
    apply: Apply,
    params: Any,
    train: Pairs,
    test: Pairs,
    other: Pairs | None = None,
    *,
    loss: Literal["squared", "entropy"] = "squared",
    moving: Moving = None,
    sample_weights: Maybe = None,
    label_draws: Maybe = None,
    noise_std: Maybe = None,
    plan: Filter | None = None,
    products: int | None = None,
    memory: int = MEMORY,
    report: Report = None,
) -> Prediction:
    """What fine-tuning a network will do to its task and to what it knew, from its tangent features at θ₁ (docs, G1).

    Args:
        apply: (params, x) ↦ outputs (n, …), each sample on its own.
        params: the pretrained weights θ₁, any pytree.
        train, test, other: (x, y): fine-tuning data, held-out data of the task, and of what should not be forgotten.
            y as the outputs, (n, …), such as S3FT's targets; or (n,) integers below k, classes.
        loss: "squared", ‖y − f‖² per sample, or "entropy", cross-entropy of softmax(f).
        moving: which parameters move, as in `linfit.tangent.kernel`: all by default; LoRA's factors, the last layer.
        sample_weights: w ≥ 0 (n,) of the training loss, such as FLOW's, not normalised.
        label_draws: (D, n, …) other labels of the samples, for `decomposition`; squared loss.
        noise_std: σ of the training labels, per output, if it is known; else from leaving one out (dense, squared).
        plan: the run that is planned, such as GradientFlow(step size × steps), at which `diagnostics` are taken; else
            the flow with the stopping time that is best on the test data.
        products: use so many products with the kernel instead of forming it: by default 60 if n·k > 5000. Squared loss.
        memory, report: bytes beside data and result; told (done, all) as the kernel is computed.

    Raises ValueError for data that do not fit, NaN or Inf in outputs, and what `kernel` refuses.

    >>> from linfit import GradientFlow, predict
    >>> x = jax.random.normal(jax.random.key(0), (30, 4))
    >>> prediction = predict(lambda w, x: x @ w, jnp.zeros((4, 1)), (x[:20], x[:20, :1]), (x[20:], x[20:, :1]))
    >>> float(prediction.along(GradientFlow(1e4)).optimal_risk) < 1e-12       # learns everything
    True
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    net, memory = network(apply, params, moving), count("memory", memory)
    data = {"train": _data(net, "train", train, loss, memory), "test": _data(net, "test", test, loss, memory)}
    if other is not None:
        data["other"] = _data(net, "other", other, loss, memory)
    root, draws = _root_weights(sample_weights, data["train"]), _draws(label_draws, data["train"], loss)
    n, k = data["train"].labels.shape
    for name, part in data.items():
        same_size(f"outputs of {name}", part.labels.shape[1], "those of train", k)
    steps = PRODUCTS if products is None else count("products", products)
    dense = products is None and n * k <= DENSE
    if not dense and loss != "squared":
        raise ValueError(f"train must have n·k ≤ {DENSE} for cross-entropy and no products, got n·k = {n * k}")
    starts = root[:, None, None] * jnp.moveaxis(draws - data["train"].outputs, 0, -1)
    build = _dense if dense else _krylov
    prediction = build(net, data, root, starts.reshape(n * k, -1), loss, steps, memory, report)
    return _with_noise_and_diagnostics(prediction, net, data, noise_std, plan, memory)


def _data(net: Network, name: str, pairs: Pairs, loss: str, memory: int) -> _Data:
    """One domain, checked."""
    if not isinstance(pairs, tuple | list) or len(pairs) != 2:
        raise ValueError(f"{name} must be a pair (x, y), got {type(pairs).__name__}")
    x, y = pairs
    try:
        like = outputs_like(net, x)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    labels = _labels(f"labels of {name}", y, like.shape, like.dtype)
    if loss == "entropy" and not (np.all(labels >= 0) and np.allclose(labels.sum(1), 1, atol=1e-3)):
        raise ValueError(f"labels of {name} must be classes, or probabilities that sum to 1 in each row")
    values = in_batches(outputs, net, x, memory)
    if not bool(jnp.isfinite(values).all()):
        raise ValueError(f"apply must return finite outputs, got NaN or Inf on {name}")
    alone = outputs(net, take(x, slice(0, 1)))
    if float(jnp.abs(alone - values[:1]).max()) > 1e-2 * float(jnp.abs(values).max()):
        raise ValueError(
            f"apply must treat each sample on its own, got another output for one of {name} without the rest"
        )
    return _Data(x, values, labels)


def _labels(name: str, y: ArrayLike, shape: tuple[int, ...], dtype: Any) -> Array:
    """y as (n, k): as it is, or one-hot where it holds n class numbers of k > 1 outputs."""
    n, k = shape
    raw = np.asarray(y)
    if raw.shape == (n,) and k > 1:
        if not np.issubdtype(raw.dtype, np.integer) or raw.min() < 0 or raw.max() >= k:
            raise ValueError(f"{name} must be integers from 0 to {k - 1}, or of shape {shape}, got {raw.dtype} (n,)")
        return jax.nn.one_hot(raw, k, dtype=dtype)
    array = real_array(name, y)
    if array.shape[:1] != (n,) or array.size != n * k:
        raise ValueError(f"{name} must have {k} value(s) for each of {n} samples, got shape {array.shape}")
    return array.reshape(n, k).astype(dtype)


def _root_weights(sample_weights: Maybe, train: _Data) -> Array:
    """√w (n,), 1 without weights."""
    n, dtype = len(train.labels), train.labels.dtype
    if sample_weights is None:
        return jnp.ones(n, dtype)
    weights = non_negative("sample_weights", sample_weights, ndim=1)
    same_size("sample_weights", weights.shape[0], "the samples of train", n)
    return jnp.sqrt(weights).astype(dtype)


def _draws(label_draws: Maybe, train: _Data, loss: str) -> Array:
    """(1 + D, n, k): the labels, and after them the draws."""
    if label_draws is None:
        return train.labels[None]
    if loss != "squared":
        raise ValueError("label_draws must be left out for cross-entropy: predict once for each instead")
    raw = np.asarray(label_draws)
    if raw.ndim < 2:
        raise ValueError(f"label_draws must have shape (D, n, …), got {raw.shape}")
    labels = [_labels("label_draws", draw, train.labels.shape, train.labels.dtype) for draw in raw]
    return jnp.stack([train.labels, *labels])


def _dense(
    net: Network, data: dict[str, _Data], root: Array, starts: Array, loss: str, _: int, memory: int, report: Report
) -> Prediction:
    """By the whole kernel, and one eigendecomposition."""

    def against_train(name: str) -> Array:
        other = None if name == "train" else data["train"].x
        return kernel_of(net, data[name].x, other, memory=memory, report=report)

    return _decomposed(data, {name: against_train(name) for name in data}, root, starts, loss)


def _decomposed(data: dict[str, _Data], kernels: dict[str, Array], root: Array, starts: Array, loss: str) -> Prediction:
    """From K(x, X) of every domain, (m, k, n, k) or (mk, nk)."""
    n, k = data["train"].labels.shape
    scale = jnp.repeat(root, k)
    scaled = {name: kernel.reshape(-1, n * k) * scale / n for name, kernel in kernels.items()}
    weighted = scale[:, None] * scaled["train"]
    eigenvalues, vectors = eigh((weighted + weighted.T) / 2)
    bases = {name: kernel @ vectors for name, kernel in scaled.items()}
    return _prediction(data, bases, jnp.maximum(eigenvalues, 0), vectors, vectors.T @ starts, root, loss, None)


def from_kernels(
    outputs: Mapping[str, ArrayLike],
    labels: Mapping[str, ArrayLike],
    kernels: Mapping[str, ArrayLike],
    *,
    loss: Literal["squared", "entropy"] = "squared",
    noise_std: Maybe = None,
) -> Prediction:
    """The prediction of a network that lives elsewhere, from its outputs and kernels; without diagnostics.

    Args:
        outputs: f₁ of "train", "test" and perhaps "other", (m, k) each.
        labels: as for `predict`, by the same names.
        kernels: K(x, X) = J(x) J(X)ᵀ against the training samples, (m, k, n, k) each.
        loss, noise_std: as for `predict`.

    Raises ValueError for names and shapes that do not fit, and NaN or Inf.

    >>> import jax
    >>> from linfit import MinNorm
    >>> from linfit.tangent import from_kernels, kernel
    >>> x, network = jax.random.normal(jax.random.key(0), (9, 3, 20)), lambda w, x: x @ w
    >>> parts = {"train": x[0], "test": x[1]}
    >>> outputs = {name: jnp.zeros((3, 1)) for name in parts}
    >>> labels = {name: part[:, 0] for name, part in parts.items()}
    >>> kernels = {name: kernel(network, jnp.zeros((20, 1)), part, x[0]) for name, part in parts.items()}
    >>> bool(from_kernels(outputs, labels, kernels).losses(MinNorm(), domain="train").max() < 1e-12)
    True
    """
    if not {"train", "test"} <= outputs.keys() <= {"train", "test", "other"}:
        raise ValueError(f"outputs must be of train, test and perhaps other, got {', '.join(outputs)}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    data, blocks = {}, {}
    size = np.shape(outputs["train"])
    for name in outputs:
        values = real_array(f"outputs of {name}", outputs[name], ndim=2)
        data[name] = _Data(None, values, _labels(f"labels of {name}", labels[name], values.shape, values.dtype))
        blocks[name] = real_array(f"kernel of {name}", kernels[name])
        if blocks[name].shape != (*values.shape, *size) or values.shape[1] != size[1]:
            raise ValueError(f"kernel of {name} must be {(*values.shape, *size)}, got {blocks[name].shape}")
    root = _root_weights(None, data["train"])
    starts = (data["train"].labels - data["train"].outputs).reshape(-1, 1)
    prediction = _decomposed(data, blocks, root, starts, loss)
    known = noise_from_leaving_out(prediction) if noise_std is None else non_negative("noise_std", noise_std, ndim=0)
    return dataclasses.replace(prediction, noise_std=jnp.asarray(known, prediction.eigenvalues.dtype))


def _krylov(
    net: Network,
    data: dict[str, _Data],
    root: Array,
    starts: Array,
    loss: str,
    products: int,
    memory: int,
    report: Report,
) -> Prediction:
    """By products with the kernel; the outputs of every domain come along in the forward pass of each."""
    left = tuple(linearised(net, part.x, memory) for part in data.values())
    result = krylov(lambda block: _products(left, root, block), starts, products, report)
    sizes = np.cumsum([part.labels.size for part in data.values()])[:-1]
    bases = dict(zip(data, jnp.split(result.images, sizes)))
    result = dataclasses.replace(result, images=result.images[:0])  # they are the bases now
    return _prediction(data, bases, result.eigenvalues, result.vectors, result.coefficients, root, loss, result)


@eqx.filter_jit
def _products(parts: tuple[Linearised, ...], root: Array, block: Array) -> Array:
    """W^{1/2}KW^{1/2}v/n, and below it K(x, X)W^{1/2}v/n for every domain, of each column v of the block."""
    n = len(root)

    def one(v: Array) -> Array:
        step = parts[0].pull(root[:, None] * v.reshape(n, -1) / n)
        moved = [part.push(step) for part in parts]
        return jnp.concatenate([(root[:, None] * moved[0]).ravel(), *(values.ravel() for values in moved)])

    return jax.vmap(one, in_axes=1, out_axes=1)(block)


def _prediction(
    data: dict[str, _Data],
    bases: dict[str, Array],
    eigenvalues: Array,
    vectors: Array,
    coefficients: Array,
    root: Array,
    loss: Any,
    krylov: Any,
) -> Prediction:
    def domain(name: str) -> Domain:
        part = data[name]
        return Domain(part.outputs, part.labels, bases[name].reshape(*part.labels.shape, -1))

    train = domain("train")
    vectors = vectors.reshape(*train.labels.shape, -1)
    if loss == "entropy":
        missing = root[:, None] * (train.labels - jax.nn.softmax(train.outputs))
        coefficients = jnp.einsum("nkq,nk->q", vectors, missing)[:, None]
    return Prediction(
        eigenvalues=eigenvalues,
        vectors=vectors,
        coefficients=coefficients[:, 0],
        draws=coefficients[:, 1:],
        root_weights=root,
        train=train,
        test=domain("test"),
        other=domain("other") if "other" in data else None,
        krylov=krylov,
        noise_std=jnp.asarray(jnp.nan, eigenvalues.dtype),
        diagnostics={},
        loss=loss,
    )


def _with_noise_and_diagnostics(
    prediction: Prediction, net: Network, data: dict[str, _Data], noise_std: Maybe, plan: Filter | None, memory: int
) -> Prediction:
    known = noise_from_leaving_out(prediction) if noise_std is None else non_negative("noise_std", noise_std, ndim=0)
    prediction = dataclasses.replace(prediction, noise_std=jnp.asarray(known, prediction.eigenvalues.dtype))
    plan = prediction.default_plan() if plan is None else plan
    numbers = diagnose(prediction, net, {name: part.x for name, part in data.items()}, plan, memory)
    return dataclasses.replace(prediction, diagnostics=numbers)
