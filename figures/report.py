"""Writing figures and the report: every file whole or not at all."""

import base64
import html
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

import jax
import matplotlib as mpl

from figures.style import SETTINGS, Picture
from linfit.internal.files import whole_file

__all__ = ["draw_figures", "prepare_folder", "write_pictures", "write_report"]

Entry = tuple[str, str, str]
"""What the report says of a written picture: name, title, caption."""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
figure { margin: 2.5rem 0 } img { max-width: 100%; height: auto }
figcaption { font-size: .9rem; color: #333 } h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-bottom: .3rem }
nav a { margin-right: 1rem } code { background: #f3f3f3; padding: 0 .2em }
"""


def prepare_folder(out: Path) -> Path:
    """Create the folder if needed; ValueError if it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out}: {error.strerror}; choose another folder") from None
    return out


def _write_picture(picture: Picture, out: Path) -> str:
    """NAME.png, NAME.pdf and NAME.nc (the plotted numbers, caption included) in the folder `out`; the caption."""
    figure, caption = picture.draw(picture.data), picture.caption(picture.data)
    for ending in ("png", "pdf"):
        metadata = {"CreationDate": None} if ending == "pdf" else None
        with whole_file(out / f"{picture.name}.{ending}") as path:
            figure.savefig(path, format=ending, dpi=200, metadata=metadata)
    # NetCDF 3 has integers of 32 bits; a seed may need 33.
    large = {name: float(n) for name, n in picture.data.attrs.items() if isinstance(n, int) and abs(n) >= 2**31}
    with whole_file(out / f"{picture.name}.nc") as path:
        picture.data.assign_attrs(large, title=picture.title, caption=caption).to_netcdf(path, engine="scipy")
    return caption


def _draw_module(module: str, seed: int, quick: bool, out: Path) -> list[Entry]:
    """Draw and write every picture of one module, saying so as they are done."""
    return write_pictures(module, import_module(module).pictures(jax.random.key(seed), quick), out)


def write_pictures(module: str, pictures: Iterable[Picture], out: Path) -> list[Entry]:
    """Write the pictures of one module into an existing folder, saying so as they are done."""
    start, entries = time.perf_counter(), []
    with mpl.rc_context(SETTINGS):
        for picture in pictures:
            entries.append((picture.name, picture.title, _write_picture(picture, out)))
            print(f"{module}: {picture.name} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    return entries


def draw_figures(modules: Sequence[str], seed: int, quick: bool, out: Path) -> list[Entry]:
    """Write the `pictures(key, quick)` of several modules, each in a process of its own, into an existing folder."""
    if len(modules) == 1:
        return _draw_module(modules[0], seed, quick, out)
    workers = min(len(modules), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_quit_on_interrupt) as pool:
        drawn = [pool.submit(_draw_module, module, seed, quick, out) for module in modules]
        return [entry for module in drawn for entry in module.result()]


def _quit_on_interrupt() -> None:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))


def write_report(entries: Iterable[Entry], out: Path, command: str) -> Path:
    """index.html: all figures with their captions in one self-contained page."""
    sections, links = [], []
    for name, *words in entries:
        image = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        title, caption = map(html.escape, words)
        links.append(f'<a href="#{name}">{title}</a>')
        sections.append(
            f'<section id="{name}"><h2>{title}</h2><figure><img src="data:image/png;base64,{image}" alt="{title}">'
            f"<figcaption>{caption} Files: <code>{name}.png</code>, <code>.pdf</code>, <code>.nc</code> (numbers)."
            "</figcaption></figure></section>"
        )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>linfit report</title><style>{_STYLE}</style></head><body>'
        f"<h1>linfit: fine-tuning in linear models</h1><p>Made by <code>{html.escape(command)}</code>.</p>"
        f"<nav>{''.join(links)}</nav>{''.join(sections)}</body></html>\n"
    )
    path = out / "index.html"
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
