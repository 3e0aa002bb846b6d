"""Claims held against measurement: random instances inside the assumptions, searches for the worst one, walks outside.

A claim's parameters are sampled quasi-randomly; a key gives its normals. Every instance has a p-value: that of a test
for what is sampled, 0 or 1 for what is exact. Holm's correction over all instances of all claims is at `LEVEL`. That
the tests keep it, and that tolerances leave room for rounding, is for `linfit verify --seeds N` to measure.
"""

import os
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import scipy.optimize
import scipy.stats
from jax import Array

from sims.claims import Claim, Normal, all_claims
from sims.estimate import progress

__all__ = ["LEVEL", "Attack", "Effort", "Instance", "Verdict", "claims_named", "falsify", "verify"]

LEVEL = 1e-5
"""Of all tests together: the probability that one rejects what is true, as far as their p-values are right."""

WITNESSES = 32
"""Instances, at least, among which a claim of existence may find one."""

Values = dict[str, float]
Result = TypeVar("Result")


def _normals(key: Array) -> Normal:
    """Standard normals from a key, call after call; by numpy, so that new shapes need no compilation."""
    words = [int(word) for word in np.ravel(jax.random.key_data(key))]
    generator = np.random.Generator(np.random.SFC64(words))
    return lambda *shape: np.asarray(generator.standard_normal(shape))


def _claim_key(seed: int, claim: Claim) -> Array:
    """The key of one claim: the same whichever other claims are verified."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(claim.id.encode()))


class Instance(NamedTuple):
    """One instance of a claim, measured."""

    values: Values
    severity: float
    """Larger is worse: relative residual, minus the margin, largest |z|, or largest gap in units of its bound."""
    p_value: float
    """That of the test that this instance obeys the claim; 0 or 1 where nothing is random."""
    gaps: tuple[float, ...] = ()
    """Asymptotic claims: mean squared relative gap at each size, less what sampling adds."""
    error: str | None = None
    """Why there was nothing to measure."""

    @property
    def obeys(self) -> bool:
        """Whether it obeys the claim, on its own."""
        return self.p_value > LEVEL


def _examine(claim: Claim, values: Values, key: Array) -> Instance:
    """Predict and measure one instance. An instance that raises ValueError is a failure, with its message."""
    try:
        predicted, measured = claim.sides(_normals(key), **values)
    except ValueError as error:
        return Instance(values, np.inf, 0.0, error=str(error))
    with np.errstate(invalid="ignore"):  # an infinite risk, say, is reported below
        severity, p_value, gaps = _compare(claim, predicted, measured)
    if not np.isfinite(severity):
        return Instance(values, np.inf, 0.0, error="not finite")
    return Instance(values, severity, p_value, gaps)


def _compare(claim: Claim, predicted: Any, measured: Any) -> tuple[float, float, tuple[float, ...]]:
    """Severity, p-value, and the gaps of an asymptotic claim."""
    if claim.kind == "asymptotic":
        return _compare_sizes(claim, predicted, measured)
    predicted, measured = np.asarray(predicted), np.asarray(measured)
    if claim.kind == "statistical":
        z = _studentised(measured - predicted)
        return float(np.abs(z).max()), _bonferroni(2 * scipy.stats.t.sf(np.abs(z), len(measured) - 1)), ()
    if claim.kind == "identity":
        if predicted.shape != measured.shape:
            raise TypeError(f"{claim.id}: predicted has shape {predicted.shape}, measured {measured.shape}")
        residual = float(np.abs(measured - predicted).max() / np.abs(predicted).max())
        return residual, float(residual <= claim.tolerance), ()
    margin = float(np.min(measured - predicted))
    return -margin, float(margin > -claim.tolerance), ()


def _compare_sizes(claim: Claim, predicted: Any, measured: Any) -> tuple[float, float, tuple[float, ...]]:
    ratios, p_values, gaps = [], [], []
    for size, expected, samples in zip(claim.sizes, predicted, measured, strict=True):
        difference = np.asarray(samples) - np.asarray(expected)
        count = len(difference)
        scale = np.abs(expected).max()
        gap, error = difference.mean(axis=0) / scale, difference.std(axis=0, ddof=1) / scale / count**0.5
        error = np.maximum(error, np.finfo(float).eps)
        bound = claim.tolerance * size**-claim.rate
        ratios.append(np.abs(gap).max() / bound)
        p_values.append(np.ravel(scipy.stats.t.sf((np.abs(gap) - bound) / error, count - 1)))
        gaps.append(float(np.mean(gap**2 - error**2)))
    return float(np.max(ratios)), _bonferroni(np.concatenate(p_values)), tuple(gaps)


def _studentised(samples: np.ndarray) -> np.ndarray:
    """z of the hypothesis that the mean over the leading axis is 0, corrected for skewness (Hall 1992).

    Squared errors are skewed, and far out in the tails, where corrected tests decide, Student's t would not be enough.
    """
    count = len(samples)
    mean, spread = samples.mean(axis=0), samples.std(axis=0, ddof=1)
    spread = np.maximum(spread, np.finfo(float).eps * (np.abs(samples).max(axis=0) + np.finfo(float).tiny ** 0.25))
    t = mean / spread * count**0.5
    skewness = np.mean((samples - mean) ** 3, axis=0) / spread**3 / count**0.5
    return t + skewness * (2 * t**2 + 1) / 6 + skewness**2 * t**3 / 27


def _bonferroni(p_values: np.ndarray) -> float:
    return float(min(1.0, np.size(p_values) * np.min(p_values)))


def _points(claim: Claim, count: int, key: Array) -> list[Values]:
    """`count` quasi-random points of the assumed parameter space."""
    return [_values(claim, position) for position in _cube(claim, count, key)]


def _cube(claim: Claim, count: int, key: Array) -> np.ndarray:
    """Sobol' points (count, free parameters) of the unit cube, shifted at random."""
    dimension = len(_free(claim))
    if dimension == 0:
        return np.zeros((count, 0))
    sobol = scipy.stats.qmc.Sobol(dimension, scramble=False)
    shift = scipy.stats.norm.cdf(_normals(key)(dimension))
    return (sobol.random_base2(int(np.ceil(np.log2(max(count, 1)))))[:count] + shift) % 1


def _free(claim: Claim) -> list[str]:
    return [name for name, parameter in claim.parameters.items() if parameter.low < parameter.high]


def _values(claim: Claim, position: np.ndarray) -> Values:
    where = dict(zip(_free(claim), np.clip(position, 0, 1), strict=True))
    return {name: parameter.inside(where.get(name, 0.0)) for name, parameter in claim.parameters.items()}


class Verdict(NamedTuple):
    """What the instances of a claim say."""

    claim: Claim
    instances: list[Instance]
    holds: bool
    seconds: float

    @property
    def worst(self) -> Instance:
        """The instance with the smallest p-value, of these the most severe."""
        return max(self.instances, key=lambda instance: (-instance.p_value, instance.severity))

    @property
    def share(self) -> float:
        """Share of the instances that obey the claim, each on its own."""
        return float(np.mean([instance.obeys for instance in self.instances]))

    @property
    def in_part(self) -> bool:
        """Whether it is a claim of existence that some instances obey and some do not."""
        return self.claim.kind == "existence" and 0 < self.share < 1

    @property
    def slope(self) -> float | None:
        """Exponent of the relative gap in N, over all instances of an asymptotic claim; None where noise hides it."""
        measured = np.array([instance.gaps for instance in self.instances if instance.gaps])
        if self.claim.kind != "asymptotic" or len(measured) < 2:
            return None
        gaps, error = measured.mean(axis=0), measured.std(axis=0, ddof=1) / len(measured) ** 0.5
        if (gaps <= 3 * error).any():
            return None
        return float(np.polyfit(np.log(self.claim.sizes), np.log(gaps) / 2, 1)[0])


def verify(claims: Sequence[Claim], instances: int, seed: int) -> list[Verdict]:
    """Every claim on `instances` points of its parameter space; Holm's correction over everything that was tested.

    >>> [(verdict.claim.id, verdict.holds) for verdict in verify(claims_named(["O3"]), instances=2, seed=0)]
    [('O3', True), ('O3.less', True)]
    """
    measured = side_by_side(lambda claim: _measure(claim, instances, seed), claims, "verify")
    universal = [found for claim, (found, _) in zip(claims, measured, strict=True) if claim.kind != "existence"]
    tested = [instance.p_value for found in universal for instance in found]
    limit, verdicts = _holm(tested, LEVEL), []
    for claim, (found, seconds) in zip(claims, measured, strict=True):
        obeyed = [instance.p_value > limit for instance in found]
        verdicts.append(Verdict(claim, found, any(obeyed) if claim.kind == "existence" else all(obeyed), seconds))
    return verdicts


def side_by_side(work: Callable[[Claim], Result], claims: Sequence[Claim], description: str) -> list[Result]:
    """work(claim) for every claim, a claim to each core.

    Neighbours share kernels, which two threads would both compile; so the cores start far apart.
    """
    cores = os.cpu_count() or 1
    stride = -(-len(claims) // cores)
    order = [index for start in range(stride) for index in range(start, len(claims), stride)]
    with ThreadPoolExecutor(cores) as pool:
        results = progress(pool.map(lambda index: work(claims[index]), order), description, len(claims))
        by_index = dict(zip(order, results, strict=True))
    return [by_index[index] for index in range(len(claims))]


def _measure(claim: Claim, instances: int, seed: int) -> tuple[list[Instance], float]:
    start = time.perf_counter()
    key = _claim_key(seed, claim)
    where = _points(claim, max(instances, WITNESSES) if claim.kind == "existence" else instances, key)
    found = [_examine(claim, values, jax.random.fold_in(key, index)) for index, values in enumerate(where)]
    return found, time.perf_counter() - start


def _holm(p_values: Sequence[float], level: float) -> float:
    """The largest p-value that Holm's step-down procedure rejects at `level`; 0 if none is (0 is always rejected)."""
    limit = 0.0
    for index, p_value in enumerate(sorted(p_values)):
        if p_value > level / (len(p_values) - index):
            break
        limit = p_value
    return limit


def claims_named(ids: Sequence[str]) -> list[Claim]:
    """Claims by id, or by the part of it before a dot ("S5" is S5 and S5.unbiased); all of them if none is named.

    Raises ValueError for an id that does not exist.
    """
    claims = all_claims()
    named = {name: [claim for claim in claims if f"{claim.id}.".startswith(f"{name}.")] for name in ids}
    for name, found in named.items():
        if not found:
            raise ValueError(f"ID must be among {', '.join(claim.id for claim in claims)}; got {name}")
    return [claim for claim in claims if not ids or any(claim in found for found in named.values())]


class Effort(NamedTuple):
    """How long to search."""

    points: int
    """Quasi-random points inside the assumptions."""
    refinements: int
    """Further evaluations around the worst of them (Nelder–Mead)."""
    walks: int
    """Points from which each assumption is left."""


DISTANCES = (1e-6, 1e-4, 1e-2, 0.1, 0.25, 0.5, 1.0)
BISECTIONS = 6


class Boundary(NamedTuple):
    """What happens when one assumption is left towards one end, everything else held."""

    parameter: str
    end: float
    holds_to: float
    """Last value at which the claim was seen to hold, on the walk that failed first; `end` if no walk failed."""
    fails_at: float | None
    """First value at which it failed there."""
    share: float
    """Share of the walks that failed."""
    refused: str | None
    """The message, where the library itself turned the instance away."""
    at_once: bool
    """Whether it fails within the first step, a millionth of the walk: the assumption is needed exactly."""


class Attack(NamedTuple):
    """The worst that was found inside the assumptions, and where the claim stops holding outside."""

    claim: Claim
    worst: Instance
    """Sampled claims: measured again with fresh normals."""
    holds: bool
    boundaries: list[Boundary]
    """Existence claims: how the region where it holds is left, from points inside it."""
    seconds: float


def falsify(claim: Claim, effort: Effort, seed: int) -> Attack:
    """Search the assumptions of a claim for its worst instance; then leave them, one at a time."""
    start, key = time.perf_counter(), _claim_key(seed, claim)
    worst = _worst(claim, effort, key)
    starts = _points(claim, effort.walks, jax.random.fold_in(key, effort.points + 1))
    holds = worst.obeys
    if claim.kind == "existence":
        opposite = claim._replace(sides=lambda normal, **values: claim.sides(normal, **values)[::-1])
        best = _worst(opposite, effort, key).values
        holds = _examine(claim, best, key).obeys
        inside = [values for values in _points(claim, effort.points, key) if _examine(claim, values, key).obeys]
        starts = [best, *inside]
    # Walks lead out of an assumption; for a claim of existence, across its space.
    boundaries = [
        _walk(claim, starts[: effort.walks], name, end, key)
        for name, parameter in claim.parameters.items()
        for end in ((parameter.low, parameter.high) if claim.kind == "existence" else parameter.ends)
    ]
    return Attack(claim, worst, holds, boundaries, time.perf_counter() - start)


def _worst(claim: Claim, effort: Effort, key: Array) -> Instance:
    """The worst of many points, after a local search with the same normals; what is sampled is then sampled afresh."""
    cube = _cube(claim, effort.points, key)
    keys = [jax.random.fold_in(key, index) for index in range(effort.points)]
    severities = [_examine(claim, _values(claim, position), k).severity for position, k in zip(cube, keys, strict=True)]
    at = int(np.argmax(severities))
    position = cube[at]
    if np.isfinite(severities[at]) and position.size:
        steps = np.diag(np.where(position < 0.5, 0.2, -0.2))  # inwards along each axis
        search = scipy.optimize.minimize(
            lambda x: -_examine(claim, _values(claim, x), keys[at]).severity,
            position,
            method="Nelder-Mead",
            bounds=[(0, 1)] * position.size,
            options={"maxfev": effort.refinements, "initial_simplex": np.vstack([position, position + steps])},
        )
        position = search.x if -search.fun > severities[at] else position
    sampled = claim.kind in ("statistical", "asymptotic")
    return _examine(claim, _values(claim, position), jax.random.fold_in(key, effort.points) if sampled else keys[at])


def _walk(claim: Claim, starts: list[Values], name: str, end: float, key: Array) -> Boundary:
    keys = [jax.random.fold_in(key, index) for index in range(len(starts))]
    exits = [_leave(claim, values, name, end, k) for values, k in zip(starts, keys, strict=True)]
    failures = [exit for exit in exits if exit is not None]
    if not failures:
        return Boundary(name, end, holds_to=end, fails_at=None, share=0.0, refused=None, at_once=False)
    distance, first = min(failures, key=lambda exit: exit[0])
    return first._replace(share=len(failures) / len(starts), at_once=distance <= DISTANCES[0])


def _leave(claim: Claim, values: Values, name: str, end: float, key: Array) -> tuple[float, Boundary] | None:
    """Leave one assumption in growing steps, the same normals at each; bisect to the first failure, at a distance."""
    parameter = claim.parameters[name]
    if claim.kind == "existence":
        parameter = parameter._replace(low=values[name], high=values[name])

    def at(distance: float) -> Instance:
        return _examine(claim, values | {name: parameter.beyond(distance, end)}, key)

    held = 0.0
    for failed in DISTANCES:
        if at(failed).obeys:
            held = failed
            continue
        for _ in range(BISECTIONS):
            middle = (held + failed) / 2
            held, failed = (middle, failed) if at(middle).obeys else (held, middle)
        holds_to, fails_at = parameter.beyond(held, end), parameter.beyond(failed, end)
        return failed, Boundary(name, end, holds_to, fails_at, share=1.0, refused=at(failed).error, at_once=False)
    return None
