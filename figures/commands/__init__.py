"""The `linfit` command. No module of this package imports anything heavy, so `linfit --help` answers without JAX."""

import os
import sys
from importlib.metadata import version

import tyro

from figures.commands.checkpoints import curve, inspect, merge, perturb, plan
from figures.commands.explore import explore
from figures.commands.predict import predict
from figures.commands.records import losses, targets, weights
from figures.commands.report import figures
from figures.commands.select import select
from figures.commands.sweep import sweep
from figures.commands.validate import validate
from figures.commands.verify import verify

__all__ = ["main"]

COMMANDS = (
    curve, explore, figures, inspect, losses, merge, perturb, plan, predict, select, sweep, targets, validate, verify,
    weights,
)  # fmt: skip
"""Every subcommand, by its name."""


def main() -> None:
    """Run one subcommand; bad input ends with one line on stderr and exit code 2, never a traceback."""
    if sys.argv[1:] == ["--version"]:
        print(f"linfit {version('linfit')}")
        return
    # A command owns its process, so it may choose double precision and the thread pools; an import may not.
    # One BLAS thread per worker, and NPROC for XLA's own pool, keep two thread pools from fighting.
    for name, value in {"JAX_ENABLE_X64": "1", "OPENBLAS_NUM_THREADS": "1", "NPROC": "4"}.items():
        os.environ.setdefault(name, value)
    try:
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in COMMANDS},
            prog="linfit",
            description="Theory and simulation of fine-tuning in linear models. (linfit --version: the version)",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, OSError) as error:
        print(f"linfit: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("linfit: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
