"""The `linfit` command.

Each floor registers its subcommands as entry points of the group `linfit.commands`; the modules they
name import nothing heavy, so that `linfit --help` answers without loading JAX.
"""

import os
import sys
from importlib.metadata import entry_points, version


def main() -> None:
    """Run one subcommand; bad input ends with one line on stderr and exit code 2, never a traceback."""
    if sys.argv[1:] == ["--version"]:
        print(f"linfit {version('linfit')}")
        return
    import tyro

    # A command owns its process, so it may choose double precision and the thread pools; an import may not.
    # One BLAS thread per worker, and NPROC for XLA's own pool, keep two thread pools from fighting.
    for name, value in {"JAX_ENABLE_X64": "1", "OPENBLAS_NUM_THREADS": "1", "NPROC": "4"}.items():
        os.environ.setdefault(name, value)
    commands = {command.name: command.load() for command in sorted(entry_points(group="linfit.commands"))}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
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


if __name__ == "__main__":
    main()
