"""Deliberate mistakes, and whether the registry of claims notices them (`make mutants`).

A mutant is a row of a table, `sims/mutants/SUBJECT.toml`: which text of which file is replaced by what, why that is
wrong, and the claims that should notice. Each is put into a scratch copy of the code, in a process of its own, and its
claims are verified there, one after the other, until one is rejected at the level of the whole registry. A text that
does not occur exactly once fails the run, so the tables cannot go stale; so does a claim that rejects unchanged code.
"""

import os
import shutil
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Mutant", "Outcome", "run", "tables"]

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent
PACKAGES = ("linfit", "theory", "sims")
PRELOADED = ("jax", "jax.numpy", "equinox", "diffrax", "optimistix", "scipy.stats", "scipy.optimize", "xarray", "rich")


class Mutant(NamedTuple):
    """A deliberate mistake."""

    subject: str
    """The table it stands in."""
    file: str
    """From the root of the repository."""
    pattern: str
    """Occurs exactly once."""
    replacement: str
    why: str
    claims: tuple[str, ...]
    """Ids, or the part before a dot, as for `linfit verify`; the likeliest to notice first."""


class Outcome(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    caught_by: str | None
    """The claim that was rejected, or raised; None if it survived."""
    seconds: float


def tables(names: Sequence[str] = ()) -> list[Mutant]:
    """All mutants, or those whose subject or file is among `names`.

    Raises ValueError for a name that selects none, an entry that is not complete, or a pattern that does not occur
    exactly once in its file.

    >>> from sims.mutants import tables
    >>> {mutant.file for mutant in tables(["linfit/solve.py"])}
    {'linfit/solve.py'}
    """
    mutants = [mutant for path in sorted(TABLES.glob("*.toml")) for mutant in _table(path)]
    for mutant in mutants:
        occurrences = (ROOT / mutant.file).read_text().count(mutant.pattern)
        if occurrences != 1:
            raise ValueError(
                f"{mutant.subject}: pattern must occur once in {mutant.file}, got {occurrences} times: {mutant.pattern}"
            )
    selected = {name: [mutant for mutant in mutants if name in (mutant.subject, mutant.file)] for name in names}
    for name, found in selected.items():
        if not found:
            subjects = ", ".join(dict.fromkeys(mutant.subject for mutant in mutants))
            raise ValueError(f"NAME must be a file or among {subjects}; got {name}")
    return [mutant for mutant in mutants if not names or any(mutant in found for found in selected.values())]


def _table(path: Path) -> Iterator[Mutant]:
    for row in tomllib.loads(path.read_text())["mutant"]:
        missing = {"file", "pattern", "replacement", "why", "claims"} ^ set(row)
        if missing:
            raise ValueError(
                f"{path.name}: a mutant has file, pattern, replacement, why, claims; check {', '.join(missing)}"
            )
        yield Mutant(path.stem, **row | {"claims": tuple(row["claims"])})


def run(
    mutants: Sequence[Mutant], instances: int, seed: int, jobs: int, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Every mutant, `jobs` at a time, reported as they end; unchanged code first.

    Raises ValueError if a claim rejects unchanged code, or does not exist.
    """
    ids = dict.fromkeys(id for mutant in mutants for id in mutant.claims)
    unchanged = [Mutant("unchanged", "", "", "", "the code as it is", (id,)) for id in ids]
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)  # unchanged kernels are compiled once for all
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        try:
            for outcome in _outcomes(pool, unchanged, instances, seed):
                if outcome.caught_by is not None:
                    raise ValueError(f"{outcome.caught_by} rejects the code as it is, at seed {seed}")
            outcomes = []
            for outcome in _outcomes(pool, mutants, instances, seed):
                report(outcome)
                outcomes.append(outcome)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes


def _outcomes(pool: ProcessPoolExecutor, mutants: Sequence[Mutant], instances: int, seed: int) -> Iterator[Outcome]:
    futures = {pool.submit(_caught_by, tuple(mutant), instances, seed): mutant for mutant in mutants}
    for future in as_completed(futures):
        yield Outcome(futures[future], *future.result())


def _caught_by(fields: tuple[Any, ...], instances: int, seed: int) -> tuple[str | None, float]:
    """The first claim that notices, and the seconds that took; in a process that has imported none of the code yet."""
    mutant, start = Mutant(*fields), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, Path(scratch, package))
        if mutant.file:
            path = Path(scratch, mutant.file)
            path.write_text(path.read_text().replace(mutant.pattern, mutant.replacement))
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.path.insert(0, scratch)
        return _first_rejection(mutant.claims, instances, seed, scratch), time.perf_counter() - start


def _first_rejection(ids: Sequence[str], instances: int, seed: int, scratch: str) -> str | None:
    """The code is that in `scratch`."""
    import_module("jax").config.update("jax_enable_x64", True)
    verifier, claims = import_module("sims.verify"), import_module("sims.claims")
    assert str(verifier.__file__).startswith(scratch)
    limit = verifier.LEVEL / instances / len(claims.all_claims())
    for claim in [claim for id in ids for claim in verifier.claims_named([id])]:
        for count in (1, instances):  # most mistakes show at once
            try:
                with warnings.catch_warnings(action="ignore"):
                    (verdict,) = verifier.verify([claim], count, seed)
            except Exception as error:
                return f"{claim.id} (raises {type(error).__name__})"
            if verdict.worst.p_value <= limit if claim.kind != "existence" else not verdict.holds:
                return str(claim.id)
    return None
