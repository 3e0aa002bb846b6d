"""S3FT: training targets that stay near the model's own answers (paper 2502.08130).

For each sample: the model's own answer where a judge accepts it; else its paraphrase of the gold answer, if that is
accepted; else the gold answer.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit._checks import same_size


class Source(IntEnum):
    """Where a target comes from."""

    OWN = 0
    PARAPHRASE = 1
    GOLD = 2


class Targets(NamedTuple):
    """What to train on."""

    values: Any
    """Targets: an array like `gold`, or a list if the answers are not arrays."""
    source: Any
    """`Source` of each (n,), as integers."""

    def shares(self) -> dict[str, float]:
        """Share of each source; they sum to 1.

        >>> Targets([1.0, 2.0], np.array([0, 2])).shares()
        {'own': 0.5, 'paraphrase': 0.0, 'gold': 0.5}
        """
        source = np.asarray(self.source)
        return {kind.name.lower(): float(np.mean(source == kind)) for kind in Source}


Judge = Callable[[Any, Any], Any]


def s3ft_targets(own: Any, gold: Any, judge: Judge, paraphrase: Any = None) -> Targets:
    """Own answer if the judge accepts it, else the paraphrase if accepted, else gold (paper 2502.08130).

    Arrays, own and gold (n, …): `judge(answers, gold)` sees them whole and returns (n,) booleans; usable under `jit`.
    Other sequences (texts): it sees one pair at a time and returns a bool. `paraphrase` is like `own`, or a function
    (own, gold) → paraphrase called in the same way, for texts only where the own answer was rejected; a paraphrase
    of None does not exist. `Targets.source` (n,) holds `linfit.targets.Source` as integers.

    Raises ValueError if the lengths differ, nothing is given, or the judge's verdict is not (n,) booleans.

    >>> from linfit import s3ft_targets
    >>> close = lambda answers, gold: abs(answers - gold) <= 0.5
    >>> s3ft_targets(np.array([1.2, 3.0]), np.array([1.0, 5.0]), close)
    Targets(values=Array([1.2, 5. ], dtype=float64), source=Array([0, 2], dtype=int32))
    >>> s3ft_targets(["It is 4.", "5"], ["4", "6"], lambda answer, gold: gold in answer, ["", "It is 6."])
    Targets(values=['It is 4.', 'It is 6.'], source=array([0, 1]))
    """
    if hasattr(gold, "shape"):
        return _from_arrays(own, gold, judge, paraphrase)
    return _from_sequences(own, gold, judge, paraphrase)


def _from_arrays(own: Any, gold: Any, judge: Judge, paraphrase: Any) -> Targets:
    own, gold = jnp.asarray(own), jnp.asarray(gold)
    _same_shape("own", own, gold)
    source = jnp.where(_verdict(judge, own, gold), Source.OWN, Source.GOLD).astype(jnp.int32)
    values = _choose(source == Source.OWN, own, gold)
    if paraphrase is not None:
        reworded = jnp.asarray(paraphrase(own, gold) if callable(paraphrase) else paraphrase)
        _same_shape("paraphrase", reworded, gold)
        used = (source == Source.GOLD) & _verdict(judge, reworded, gold)
        source = jnp.where(used, Source.PARAPHRASE, source).astype(jnp.int32)
        values = _choose(used, reworded, values)
    return Targets(values, source)


def _choose(rows: Array, chosen: Array, other: Array) -> Array:
    return jnp.where(rows[(..., *[None] * (chosen.ndim - 1))], chosen, other)


def _same_shape(name: str, value: Array, gold: Array) -> None:
    if value.shape != gold.shape or gold.ndim == 0 or gold.shape[0] == 0:
        raise ValueError(f"{name} must have the shape (n, …) of gold, n ≥ 1: {gold.shape}, got {value.shape}")


def _verdict(judge: Judge, answers: Array, gold: Array) -> Array:
    verdict = jnp.asarray(judge(answers, gold))
    if verdict.shape != gold.shape[:1] or verdict.dtype != bool:
        raise ValueError(f"judge must return booleans of shape {gold.shape[:1]}, got {verdict.dtype} {verdict.shape}")
    return verdict


def _from_sequences(own: Sequence[Any], gold: Sequence[Any], judge: Judge, paraphrase: Any) -> Targets:
    if len(gold) == 0:
        raise ValueError("gold must not be empty")
    same_size("own", len(own), "gold", len(gold))
    if paraphrase is not None and not callable(paraphrase):
        same_size("paraphrase", len(paraphrase), "gold", len(gold))

    def target(index: int) -> tuple[Any, Source]:
        if _accepts(judge, own[index], gold[index]):
            return own[index], Source.OWN
        if paraphrase is None:
            return gold[index], Source.GOLD
        reworded = paraphrase(own[index], gold[index]) if callable(paraphrase) else paraphrase[index]
        if reworded is not None and _accepts(judge, reworded, gold[index]):
            return reworded, Source.PARAPHRASE
        return gold[index], Source.GOLD

    chosen = [target(index) for index in range(len(gold))]
    return Targets([value for value, _ in chosen], np.array([int(source) for _, source in chosen]))


def _accepts(judge: Judge, answer: Any, gold: Any) -> bool:
    verdict = judge(answer, gold)
    if not isinstance(verdict, bool | np.bool_):
        raise ValueError(f"judge must return a bool for each pair, got {verdict!r:.60}")
    return bool(verdict)
