"""Subcommands of this floor. Nothing heavy is imported until one of them runs."""

from pathlib import Path
from typing import Annotated

import tyro

ROOMS = {"overadaptation": "figures.overadaptation", "equivalents": "figures.equivalents"}
"""What `linfit figures NAME` can draw: each module has `pictures(key, quick)`."""


def figures(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    out: Path = Path("output"),
    quick: bool = False,
    seed: int = 0,
) -> None:
    """Regenerate the paper figures and one report page.

    Args:
        names: which figures to draw (overadaptation); all of them if none is named.
        out: folder for NAME.png, NAME.pdf, NAME.nc (the plotted numbers) and index.html.
        quick: small sizes, within a minute.
        seed: seed of every random draw.
    """
    unknown = [name for name in names if name not in ROOMS]
    if unknown:
        raise ValueError(f"names must be among {', '.join(ROOMS)}; got {', '.join(unknown)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be between 0 and 2^32 − 1, got {seed}")
    from figures.report import prepare_folder, write_picture, write_report

    prepare_folder(out)
    import time
    from importlib import import_module

    import jax
    import matplotlib as mpl
    from rich.console import Console

    from figures.style import SETTINGS

    console = Console(stderr=True)
    pictures = []
    rooms = names or tuple(ROOMS)
    start = time.perf_counter()
    with mpl.rc_context(SETTINGS):
        for room in rooms:
            for picture in import_module(ROOMS[room]).pictures(jax.random.key(seed), quick):
                write_picture(picture, out)
                pictures.append(picture)
                console.print(f"{room}: {picture.name} ({time.perf_counter() - start:.0f} s)", highlight=False)
    options = [*names, *(["--quick"] if quick else []), f"--seed {seed}"]
    report = write_report(pictures, out, " ".join(["linfit figures", *options]))
    console.print(f"report: {report}", highlight=False)


def select(
    file: Annotated[Path, tyro.conf.Positional],
    /,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Choose the ensemble coefficient τ and the ridge penalty λ for your own features, by exact leave-one-out.

    Args:
        file: an .npz with X (n, p), y (n,), theta_1 (p,), and optionally X_val, y_val.
        out: picture of the error surface (.png, .pdf or .svg); FILE with the ending .select.png if not given.
        json: print the result as JSON instead of a table.
    """
    from figures.selection import report_selection

    report_selection(file, out, json)
