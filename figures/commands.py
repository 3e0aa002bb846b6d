"""Subcommands of this floor. Nothing heavy is imported until one of them runs."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

ROOMS = {
    "overadaptation": "figures.overadaptation",
    "overtraining": "figures.overtraining",
    "flow": "figures.flow",
    "s3ft": "figures.s3ft",
    "equivalents": "figures.equivalents",
    "compare": "figures.compare",
    "claims": "figures.claims",
    "bridge": "figures.bridge",
}
"""What `linfit figures NAME` can draw: each module has `pictures(key, quick)`."""

NEEDS = {
    "overadaptation": ("sklearn", "data"),
    "flow": ("sklearn", "data"),
    "s3ft": ("sklearn", "data"),
    "bridge": ("transformers", "llm"),
}
"""Rooms that need an optional package, and the extra that brings it."""


def figures(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    out: Path = Path("output"),
    quick: bool = False,
    seed: int = 0,
) -> None:
    """Regenerate the paper figures and one report page.

    Args:
        names: which figures to draw (overadaptation, overtraining, flow, s3ft, equivalents, compare, claims, bridge); all of them if none is
            named, without those whose optional packages are not installed.
        out: folder for NAME.png, NAME.pdf, NAME.nc (the plotted numbers) and index.html.
        quick: small sizes, for a first look.
        seed: seed of every random draw.
    """
    unknown = [name for name in names if name not in ROOMS]
    if unknown:
        raise ValueError(f"names must be among {', '.join(ROOMS)}; got {', '.join(unknown)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be between 0 and 2^32 − 1, got {seed}")
    missing = {room: extra for room, (package, extra) in NEEDS.items() if find_spec(package) is None}
    for room in names or ROOMS:
        if room in missing:
            help = f"{room} needs the extra {missing[room]}: pip install 'linfit[{missing[room]}]'"
            if names:
                raise ValueError(help)
            print(f"skipped: {help}", file=sys.stderr)
    from figures.report import draw_rooms, prepare_folder, write_report

    prepare_folder(out)
    rooms = [room for room in names or ROOMS if room not in missing]
    entries = draw_rooms([ROOMS[room] for room in rooms], seed, quick, out)
    options = [*names, *(["--quick"] if quick else []), f"--seed {seed}"]
    report = write_report(entries, out, " ".join(["linfit figures", *options]))
    print(f"report: {report}")


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


def explore(
    store: Path | None = None,
    address: str = "127.0.0.1",
    port: int = 5006,
    origin: tuple[str, ...] = (),
    show: bool = False,
) -> None:
    """Open a page in which the curves of every paper follow sliders; it stays open until Ctrl-C.

    Args:
        store: the store of a `linfit sweep`, to explore it on a tab of its own.
        address: where to listen; anything but this machine's own loopback address lets others in.
        port: any free one if 0.
        origin: names under which browsers reach another address, as host or host:port.
        show: open the page in a browser.
    """
    if find_spec("bokeh") is None:
        raise ValueError("explore needs the extra explore: pip install 'linfit[explore]'")
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be between 0 and 65535, got {port}")
    from figures.explorer.server import run

    run(store, address, port, origin, show)
