"""`python -m sims.mutants`: the tables of deliberate mistakes, and which claim notices each."""

import os
import sys
import time
from collections import Counter

import tyro
from tyro.conf import Positional

from sims.mutants import Outcome, run, tables
from sims.verdicts import FULL, QUICK

ENOUGH = 0.9
"""Share of the mutants that `--quick` has to notice; in full it is all of them."""


def main(
    names: Positional[tuple[str, ...]] = (), quick: bool = False, jobs: int = os.cpu_count() or 1, seed: int = 0
) -> int:
    """Put every deliberate mistake into a copy of the code and report which claim notices it.

    The exit code is 1 if one survives (with --quick: more than a tenth) and 2 if a table no longer applies.

    Args:
        names: subjects (tables in sims/mutants) or files; all of them by default.
        quick: 4 instances of each claim in place of 32.
        jobs: how many at a time.
        seed: of the instances.
    """
    start = time.perf_counter()
    try:
        mutants = tables(names)
        print(f"{len(mutants)} mutants; first their claims on the code as it is …", flush=True)
        outcomes = run(mutants, QUICK if quick else FULL, seed, jobs, _report)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    caught = Counter(outcome.mutant.subject for outcome in outcomes if outcome.caught_by is not None)
    for subject, total in Counter(mutant.subject for mutant in mutants).items():
        print(f"{subject}: {caught[subject]} of {total} noticed")
    share = caught.total() / len(mutants)
    print(f"{caught.total()} of {len(mutants)} noticed ({share:.1%}), seed {seed}, {time.perf_counter() - start:.0f} s")
    return int(share < (ENOUGH if quick else 1))


def _report(outcome: Outcome) -> None:
    mutant = outcome.mutant
    print(f"{outcome.caught_by or 'SURVIVED':24} {outcome.seconds:5.1f} s  {mutant.file}: {mutant.why}", flush=True)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
