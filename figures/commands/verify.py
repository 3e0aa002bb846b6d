"""`linfit verify`."""

from typing import Annotated

import tyro


def verify(
    ids: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    instances: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    json: bool = False,
    falsify: bool = False,
    quick: bool = False,
) -> None:
    """Hold the claims of the theory against measurement; exit code 1 if one fails.

    Args:
        ids: claims such as S2 or O4.bayes (O4: all of O4); every claim if none is named.
        instances: random instances of each claim (32; with --quick 4).
        seed: seed of every random draw. True claims pass for any seed.
        seeds: how many seeds to try from there, in one process; reports every claim that fails, with its values.
        json: print the result as JSON instead of tables.
        falsify: also search each claim's assumptions for its worst instance, and walk out of them one at a time.
        quick: few instances and short searches, within minutes.
    """
    if instances is not None and instances < 1:
        raise ValueError(f"--instances must be at least 1, got {instances}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be between 0 and 2^32 − 1, got {seed}")
    if not 1 <= seeds <= 2**32 - seed:
        raise ValueError(f"--seeds must be at least 1 and end below 2^32, got {seeds}")
    if falsify and seeds > 1:
        raise ValueError(f"--seeds is for --falsify only 1, got {seeds}")
    from sims.verdicts import run, run_seeds

    if seeds > 1:
        if not run_seeds(ids, instances, range(seed, seed + seeds), json=json, quick=quick):
            raise SystemExit(1)
        return
    if not run(ids, instances, seed, json=json, attack=falsify, quick=quick):
        raise SystemExit(1)
