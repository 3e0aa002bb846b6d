"""Three small real networks and the data they are pretrained and fine-tuned on (extra `lab`).

A multilayer perceptron and a convolutional network read scikit-learn's handwritten digits; a transformer reads English
prose, character by character, and tells what comes next. The prose, the docstrings and the program text are those of
Python's own library, so nothing is downloaded; they differ a little from one version of Python to another.
"""

import inspect
import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jax import Array

from sims.real_data import load_digits

__all__ = ["ARCHITECTURES", "LOSSES", "SHIFTS", "Network", "Task", "descend", "network", "pretrain", "task"]

ARCHITECTURES = ("perceptron", "convolutional", "transformer")
SHIFTS = ("weak", "medium", "strong")
"""How far the fine-tuning task is from pretraining: digits turned by 15° or 30°, or transposed; prose, then docstrings,
program text, or prose read backwards."""

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz."
PREDICTED = " etaoinsr"
"""Characters that the transformer tells apart in what comes next; all others are one more class."""
CONTEXT, WIDTH, HEADS = 12, 32, 4
"""Of the transformer: characters it sees, width, attention heads."""
SMOOTHING = 0.1
"""Pretraining spreads so much of each label over all classes, which keeps cross-entropy from inflating the outputs."""

Params = dict[str, Any]
Pairs = tuple[Array, Array]


class Network(NamedTuple):
    """An architecture: `initial(key)` draws weights, `apply(weights, x)` gives outputs (n, k)."""

    initial: Callable[[Array], Params]
    apply: Callable[[Params, Array], Array]


class Task(NamedTuple):
    """Inputs and one-hot targets (·, k); no sample is in two places. `train` alone may have wrong labels."""

    pretrain: Pairs
    other: Pairs
    """Held-out data of pretraining: what should not be forgotten."""
    train: Pairs
    test: Pairs


def _matrix(key: Array, rows: int, columns: int) -> Array:
    return jax.random.normal(key, (rows, columns), jnp.float32) / rows**0.5


def _dense(key: Array, rows: int, columns: int) -> Params:
    return {"weight": _matrix(key, rows, columns), "bias": jnp.zeros(columns, jnp.float32)}


def _affine(layer: Params, x: Array) -> Array:
    return x @ layer["weight"] + layer["bias"]


def _perceptron() -> Network:
    """64-256-256-10 with tanh."""

    def initial(key: Array) -> Params:
        sizes = (64, 256, 256, 10)
        keys = jax.random.split(key, 3)
        return {f"layer{i}": _dense(keys[i], *sizes[i : i + 2]) for i in range(3)}

    def apply(params: Params, x: Array) -> Array:
        h = x.reshape(len(x), -1)
        for i in range(2):
            h = jnp.tanh(_affine(params[f"layer{i}"], h))
        return _affine(params["layer2"], h)

    return Network(initial, apply)


def _convolutional() -> Network:
    """Two 3×3 convolutions (12 and 24 channels), 2×2 averages after each, one hidden layer of 48, all with gelu.

    A convolution is a matrix product with patches, so that derivatives in many directions at once are products too.
    """

    def initial(key: Array) -> Params:
        keys = jax.random.split(key, 4)
        return {
            "first": _matrix(keys[0], 9, 12),
            "second": _matrix(keys[1], 9 * 12, 24),
            "hidden": _dense(keys[2], 24 * 4, 48),
            "out": _dense(keys[3], 48, 10),
        }

    def convolve(h: Array, kernel: Array) -> Array:
        n, rows, columns, _ = h.shape
        padded = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        h = jax.nn.gelu(jnp.concatenate(patches, axis=-1) @ kernel)
        return h.reshape(n, rows // 2, 2, columns // 2, 2, -1).mean((2, 4))

    def apply(params: Params, x: Array) -> Array:
        h = convolve(convolve(x[..., None], params["first"]), params["second"])
        return _affine(params["out"], jax.nn.gelu(_affine(params["hidden"], h.reshape(len(h), -1))))

    return Network(initial, apply)


def _transformer() -> Network:
    """Two pre-norm blocks of attention and gelu layers; the class of the next character from the last position."""
    k = len(ALPHABET)

    def initial(key: Array) -> Params:
        keys = iter(jax.random.split(key, 12))
        params: Params = {
            "tokens": _matrix(next(keys), k, WIDTH) * k**0.5 / 2,
            "positions": _matrix(next(keys), CONTEXT, WIDTH) * CONTEXT**0.5 / 2,
            "out": _dense(next(keys), WIDTH, len(PREDICTED) + 1),
        }
        for i in range(2):
            params[f"block{i}"] = {
                "attend": _matrix(next(keys), WIDTH, 3 * WIDTH),
                "mix": _matrix(next(keys), WIDTH, WIDTH),
                "up": _dense(next(keys), WIDTH, 2 * WIDTH),
                "down": _dense(next(keys), 2 * WIDTH, WIDTH),
            }
        return params

    def apply(params: Params, x: Array) -> Array:
        h = params["tokens"][x] + params["positions"]
        for i in range(2):
            block = params[f"block{i}"]
            h = h + _attention(block, _normalised(h))
            h = h + _affine(block["down"], jax.nn.gelu(_affine(block["up"], _normalised(h))))
        return _affine(params["out"], _normalised(h)[:, -1])

    return Network(initial, apply)


def _normalised(h: Array) -> Array:
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def _attention(block: Params, h: Array) -> Array:
    """Causal self-attention."""
    n, length, _ = h.shape
    query, key, value = jnp.moveaxis((h @ block["attend"]).reshape(n, length, 3, HEADS, -1), 2, 0)
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / query.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value).reshape(n, length, -1) @ block["mix"]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@cache
def network(architecture: str) -> Network:
    """The network of one of `ARCHITECTURES`.

    >>> net = network("convolutional")
    >>> net.apply(net.initial(jax.random.key(0)), jnp.zeros((3, 8, 8))).shape
    (3, 10)
    """
    _one_of("architecture", architecture, ARCHITECTURES)
    makers = {"perceptron": _perceptron, "convolutional": _convolutional, "transformer": _transformer}
    return makers[architecture]()


def task(architecture: str, shift: str, noise: float, seed: int, *, pretrain: int, train: int, test: int) -> Task:
    """Data of the sizes `pretrain`, `train`, and `test` of each held-out set; a share `noise` of train is mislabelled.

    A wrong label is any other class, each as likely. Windows of text are of different passages, but may be the same.
    """
    _one_of("architecture", architecture, ARCHITECTURES)
    _one_of("shift", shift, SHIFTS)
    generator = np.random.default_rng([seed, 1])
    make = _text if architecture == "transformer" else _digits
    sizes = np.cumsum([pretrain, test, train, test])
    x, classes, k = make(shift, sizes, generator)
    wrong = np.zeros(sizes[-1], bool)
    wrong[sizes[1] : sizes[2]] = generator.random(train) < noise
    classes = np.where(wrong, (classes + generator.integers(1, k, sizes[-1])) % k, classes)
    parts = zip(np.split(x, sizes[:-1]), np.split(np.eye(k, dtype=np.float32)[classes], sizes[:-1]))
    return Task(*((jnp.asarray(a), jnp.asarray(b)) for a, b in parts))


def _digits(shift: str, sizes: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    images, classes = load_digits()
    if sizes[-1] > len(images):
        raise ValueError(f"pretrain + train + 2 test must be at most {len(images)} digits, got {sizes[-1]}")
    order = generator.permutation(len(images))[: sizes[-1]]
    images, classes = images[order].astype(np.float32), classes[order]
    moved = images[sizes[1] :]
    if shift == "strong":
        moved = moved.transpose(0, 2, 1)
    else:
        moved = scipy.ndimage.rotate(moved, {"weak": 15, "medium": 30}[shift], axes=(1, 2), reshape=False, order=1)
    return np.concatenate([images[: sizes[1]], moved]), classes, 10


def _text(shift: str, sizes: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    prose = _prose()
    half = prose.size * 4 // 5
    early, late = prose[:half], prose[half:]
    makers: dict[str, Callable[[], np.ndarray]] = {
        "weak": _docstrings,
        "medium": _program,
        "strong": lambda: late[::-1],
    }
    new = makers[shift]()
    middle = new.size // 2
    streams = (early, late, new[:middle], new[middle:])
    windows = [_windows(*pair, generator) for pair in zip(streams, np.diff(sizes, prepend=0))]
    everything = np.concatenate(windows)
    classes = np.array([(PREDICTED.index(c) if c in PREDICTED else len(PREDICTED)) for c in ALPHABET])
    return everything[:, :-1], classes[everything[:, -1]], len(PREDICTED) + 1


def _windows(stream: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    starts = generator.integers(0, stream.size - CONTEXT - 1, count)
    return stream[starts[:, None] + np.arange(CONTEXT + 1)]


def _encode(text: str) -> np.ndarray:
    """Small letters, full stops, spaces and line ends; every other character becomes a space, runs of spaces one."""
    plain = re.sub(r"[^a-z.\n]+", " ", text.lower())
    codes = np.zeros(128, np.int32)
    codes[[ord(character) for character in ALPHABET]] = range(len(ALPHABET))
    return codes[np.frombuffer(plain.encode("ascii"), np.uint8)]


@cache
def _prose() -> np.ndarray:
    """Python's language reference, as `help()` prints it."""
    topics = import_module("pydoc_data.topics").topics
    return _encode(" ".join(topics[name] for name in sorted(topics)))


LIBRARY = ("argparse", "decimal", "difflib", "logging", "statistics", "textwrap", "typing", "unittest.case")


@cache
def _docstrings() -> np.ndarray:
    found: list[str] = []
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of names that typing still carries
        for name in LIBRARY:
            for member in vars(import_module(name)).values():
                parts = vars(type(member)).values()
                found += [inspect.getdoc(member) or "", *(inspect.getdoc(part) or "" for part in parts)]
    return _encode(" ".join(dict.fromkeys(found)))


@cache
def _program() -> np.ndarray:
    return _encode(" ".join(inspect.getsource(import_module(name)) for name in LIBRARY))


LOSSES = {
    "squared": lambda outputs, y: jnp.sum((outputs - y) ** 2, axis=-1),
    "entropy": lambda outputs, y: -jnp.sum(y * jax.nn.log_softmax(outputs), axis=-1),
}
"""Of each sample: ‖y − f‖², without ½, and cross-entropy."""


def pretrain(
    net: Network, data: Pairs, loss: str, steps: int, seed: int, *, batch: int = 128, rate: float = 2e-3
) -> Params:
    """Weights after `steps` of Adam on the mean loss of random batches, labels smoothed, the rate annealed to 0."""
    import optax

    x, y = data
    y = (1 - SMOOTHING) * y + SMOOTHING / y.shape[1]
    start, sampling = jax.random.split(jax.random.key(seed))
    params = net.initial(start)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def objective(params: Params, rows: Array) -> Array:
        return LOSSES[loss](net.apply(params, x[rows]), y[rows]).mean()

    def step(state: tuple[Params, Any], key: Array) -> tuple[tuple[Params, Any], None]:
        params, memory = state
        gradient = jax.grad(objective)(params, jax.random.randint(key, (batch,), 0, len(x)))
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), None

    train = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0])
    return train((params, optimizer.init(params)), jax.random.split(sampling, steps))[0]


@partial(jax.jit, static_argnames=("net", "loss"))
def descend(net: Network, params: Params, data: Pairs, loss: str, step_size: float, steps: Array) -> Params:
    """Weights after each of the ascending counts `steps` of full-batch gradient descent, stacked in front.

    On (1/2n) Σ ‖y − f‖², or on the mean cross-entropy, as `linfit.predict` counts time.
    """
    x, y = data
    half = 0.5 if loss == "squared" else 1.0

    def objective(params: Params) -> Array:
        return half * LOSSES[loss](net.apply(params, x), y).mean()

    def once(_: Array, params: Params) -> Params:
        return jax.tree.map(lambda p, g: (p - step_size * g).astype(p.dtype), params, jax.grad(objective)(params))

    def advance(params: Params, ends: tuple[Array, Array]) -> tuple[Params, Params]:
        params = jax.lax.fori_loop(*ends, once, params)
        return params, params

    ends = jnp.concatenate([jnp.zeros(1, steps.dtype), steps[:-1]]), steps
    return jax.lax.scan(advance, params, ends)[1]
