"""`linfit figures`: which figures there are, and what each needs."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

FIGURES = {
    "overadaptation": "figures.overadaptation",
    "overtraining": "figures.overtraining",
    "flow": "figures.flow",
    "s3ft": "figures.s3ft",
    "equivalents": "figures.equivalents",
    "pipelines": "figures.pipelines",
    "merges": "figures.merges",
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
"""Figures that need an optional package, and the extra that brings it."""


def figures(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    out: Path = Path("output"),
    quick: bool = False,
    seed: int = 0,
) -> None:
    """Regenerate the paper figures and one report page.

    Args:
        names: which figures to draw (overadaptation, overtraining, flow, s3ft, equivalents, pipelines, merges, compare,
            claims, bridge); all of them if none is named, without those whose optional packages are not installed.
        out: folder for NAME.png, NAME.pdf, NAME.nc (the plotted numbers) and index.html.
        quick: small sizes, for a first look.
        seed: seed of every random draw.
    """
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ValueError(f"names must be among {', '.join(FIGURES)}; got {', '.join(unknown)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be between 0 and 2^32 − 1, got {seed}")
    missing = {name: extra for name, (package, extra) in NEEDS.items() if find_spec(package) is None}
    for name in names or FIGURES:
        if name in missing:
            help = f"{name} needs the extra {missing[name]}: pip install 'linfit[{missing[name]}]'"
            if names:
                raise ValueError(help)
            print(f"skipped: {help}", file=sys.stderr)
    from figures.report import draw_figures, prepare_folder, write_report

    prepare_folder(out)
    modules = [FIGURES[name] for name in names or FIGURES if name not in missing]
    entries = draw_figures(modules, seed, quick, out)
    options = [*names, *(["--quick"] if quick else []), f"--seed {seed}"]
    report = write_report(entries, out, " ".join(["linfit figures", *options]))
    print(f"report: {report}")
