"""S3FT: training targets that stay near the model's own answers (paper 2502.08130).

For each sample: the model's own answer where a judge accepts it; else its paraphrase of the gold answer, if that is
accepted; else the gold answer.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.internal.checks import ArrayLike, as_projector, non_negative, probability, same_size

__all__ = ["Source", "Targets", "content_within", "noisy", "s3ft_targets", "within"]


class Source(IntEnum):
    """Where a target comes from."""

    OWN = 0
    PARAPHRASE = 1
    GOLD = 2


class Targets(NamedTuple):
    """What to train on."""

    values: Any  #: Targets: an array like `gold`, or a list if the answers are not arrays.
    source: Any  #: `Source` of each (n,), as integers.

    def shares(self) -> dict[str, float]:
        """Share of each source; they sum to 1.

        >>> from linfit import Targets
        >>> Targets([1.0, 2.0], [0, 2]).shares()
        {'own': 0.5, 'paraphrase': 0.0, 'gold': 0.5}
        """
        source = np.asarray(self.source)
        return {kind.name.lower(): float(np.mean(source == kind)) for kind in Source}


Judge = Callable[[Any, Any], Any]


def within(tolerance: ArrayLike) -> Judge:
    """A judge for arrays: accepts ‖answer − gold‖ ≤ tolerance, Euclidean over all but the first axis (docs, T1; ours).

    `tolerance` ≥ 0, a number or one per sample (n,), ∞ allowed, in the unit of the answers. For scalar answers the
    norm is the absolute value. Raises ValueError for NaN or negative tolerances.

    >>> import jax.numpy as jnp
    >>> from linfit.targets import within
    >>> within(0.5)(jnp.array([1.2, 3.0]), jnp.array([1.0, 5.0]))
    Array([ True, False], dtype=bool)
    """
    tolerance = non_negative("tolerance", tolerance, finite=False)

    def judge(answers: ArrayLike, gold: ArrayLike) -> Array:
        miss = jnp.asarray(answers) - jnp.asarray(gold)
        return jnp.linalg.norm(miss.reshape(len(miss), -1), axis=1) <= tolerance

    return judge


def content_within(content: ArrayLike, tolerance: ArrayLike) -> Judge:
    """A judge for vectors (n, m): accepts ‖P(answer − gold)‖ ≤ tolerance and overlooks style (docs, T2; ours).

    `content` is the orthogonal projector P (m, m) on what must be right, or the outputs it keeps as a mask (m,).
    Raises ValueError if it is not such a projector, for NaN or negative tolerances, and for answers of another size.

    >>> import jax.numpy as jnp
    >>> from linfit.targets import content_within
    >>> content_within([True, False], 0.5)(jnp.array([[1.2, 9.0], [3.0, 0.0]]), jnp.array([[1.0, 0.0], [5.0, 0.0]]))
    Array([ True, False], dtype=bool)
    """
    projector, close = as_projector("content", content), within(tolerance)

    def judge(answers: ArrayLike, gold: ArrayLike) -> Array:
        answers, gold = jnp.asarray(answers), jnp.asarray(gold)
        same_size("answers (last axis)", answers.shape[-1], "content", projector.shape[0])
        return close(answers @ projector, gold @ projector)

    return judge


def noisy(key: Array, judge: Judge, false_accept: ArrayLike = 0.0, false_reject: ArrayLike = 0.0) -> Judge:
    """A judge for arrays that errs: accepts a wrong answer, and rejects a right one, with the given probabilities.

    Its mistakes are a function of the key and the sample, independent for right and wrong answers and between samples;
    asked about a second right answer to the same question it errs again.

    Args:
        key: of its mistakes.
        judge: says what is right and what is wrong.
        false_accept: probability that a wrong answer passes; ValueError outside [0, 1].
        false_reject: probability that a right one does not.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from linfit.targets import noisy, within
    >>> gullible = noisy(jax.random.key(0), within(0.5), false_accept=1.0)
    >>> gullible(jnp.array([1.2, 3.0]), jnp.array([1.0, 5.0]))
    Array([ True,  True], dtype=bool)
    """
    false_accept, false_reject = probability("false_accept", false_accept), probability("false_reject", false_reject)

    def erring(answers: ArrayLike, gold: ArrayLike) -> Array:
        right = jnp.asarray(judge(answers, gold))
        fall_key, miss_key = jax.random.split(key)
        falls = jax.random.uniform(fall_key, right.shape) < false_accept
        misses = jax.random.uniform(miss_key, right.shape) < false_reject
        return jnp.where(right, ~misses, falls)

    return erring


def s3ft_targets(own: Any, gold: Any, judge: Judge | ArrayLike, paraphrase: Any = None) -> Targets:
    """Own answer if the judge accepts it, else the paraphrase if accepted, else gold (paper 2502.08130).

    Args:
        own: the model's answers: an array (n, …), or another sequence, of texts for example.
        gold: right answers, likewise.
        judge: a function (answers, gold) that sees arrays whole and returns (n,) booleans, usable under `jit`; of other
            sequences it sees one pair at a time and returns a bool. Or (n,) booleans that accept own answers: then
            every paraphrase that exists is accepted.
        paraphrase: gold answers in the model's words, like `own`; or a function (own, gold) → paraphrase called like
            the judge, for texts only where the own answer was rejected. One that is None, or has a NaN, does not exist.

    Returns targets with their `linfit.targets.Source` as integers. Raises ValueError if the lengths differ, nothing is
    given, or the verdict is not (n,) booleans.

    >>> import numpy as np
    >>> from linfit import s3ft_targets
    >>> from linfit.targets import within
    >>> s3ft_targets(np.array([1.2, 3.0]), np.array([1.0, 5.0]), within(0.5))
    Targets(values=Array([1.2, 5. ], dtype=float64), source=Array([0, 2], dtype=int32))
    >>> s3ft_targets(["It is 4.", "5"], ["4", "6"], lambda answer, gold: gold in answer, ["", "It is 6."])
    Targets(values=['It is 4.', 'It is 6.'], source=array([0, 1]))
    """
    if hasattr(gold, "shape"):
        return _from_arrays(own, gold, judge, paraphrase)
    return _from_sequences(own, gold, judge, paraphrase)


def _from_arrays(own: Any, gold: Any, judge: Judge | ArrayLike, paraphrase: Any) -> Targets:
    own, gold = jnp.asarray(own), jnp.asarray(gold)
    _same_shape("own", own, gold)
    source = jnp.where(_verdict(judge, own, gold), Source.OWN, Source.GOLD).astype(jnp.int32)
    values = _choose(source == Source.OWN, own, gold)
    if paraphrase is not None:
        reworded = jnp.asarray(paraphrase(own, gold) if callable(paraphrase) else paraphrase)
        _same_shape("paraphrase", reworded, gold)
        exists = ~jnp.isnan(reworded.reshape(len(gold), -1)).any(axis=1)
        accepted = _verdict(judge, reworded, gold) if callable(judge) else exists
        used = (source == Source.GOLD) & exists & accepted
        source = jnp.where(used, Source.PARAPHRASE, source).astype(jnp.int32)
        values = _choose(used, reworded, values)
    return Targets(values, source)


def _choose(rows: Array, chosen: Array, other: Array) -> Array:
    return jnp.where(rows[(..., *[None] * (chosen.ndim - 1))], chosen, other)


def _same_shape(name: str, value: Array, gold: Array) -> None:
    if value.shape != gold.shape or gold.ndim == 0 or gold.shape[0] == 0:
        raise ValueError(f"{name} must have the shape (n, …) of gold, n ≥ 1: {gold.shape}, got {value.shape}")


def _verdict(judge: Judge | ArrayLike, answers: Array, gold: Array) -> Array:
    verdict = jnp.asarray(judge(answers, gold) if callable(judge) else judge)
    if verdict.shape != gold.shape[:1] or verdict.dtype != bool:
        verb = "return" if callable(judge) else "be"
        raise ValueError(f"judge must {verb} booleans of shape {gold.shape[:1]}, got {verdict.dtype} {verdict.shape}")
    return verdict


def _from_sequences(own: Sequence[Any], gold: Sequence[Any], judge: Judge | ArrayLike, paraphrase: Any) -> Targets:
    if len(gold) == 0:
        raise ValueError("gold must not be empty")
    same_size("own", len(own), "gold", len(gold))
    paraphrase = [None] * len(gold) if paraphrase is None else paraphrase
    if not callable(paraphrase):
        same_size("paraphrase", len(paraphrase), "gold", len(gold))
    mask = None if callable(judge) else np.asarray(judge)
    if mask is not None and (mask.shape != (len(gold),) or mask.dtype != bool):
        raise ValueError(f"judge must be a function or {len(gold)} booleans, got {mask.dtype} {mask.shape}")

    def accepts(answer: Any, index: int) -> bool:
        verdict = judge(answer, gold[index])  # type: ignore[operator]
        if not isinstance(verdict, bool | np.bool_):
            raise ValueError(f"judge must return a bool for each pair, got {verdict!r:.60}")
        return bool(verdict)

    def target(index: int) -> tuple[Any, Source]:
        if accepts(own[index], index) if mask is None else mask[index]:
            return own[index], Source.OWN
        reworded = paraphrase(own[index], gold[index]) if callable(paraphrase) else paraphrase[index]
        if reworded is not None and (mask is not None or accepts(reworded, index)):
            return reworded, Source.PARAPHRASE
        return gold[index], Source.GOLD

    chosen = [target(index) for index in range(len(gold))]
    return Targets([value for value, _ in chosen], np.array([int(source) for _, source in chosen]))
