"""Writing figures and the report: every file whole or not at all."""

import base64
import html
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from figures.style import Picture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
figure { margin: 2.5rem 0 } img { max-width: 100%; height: auto }
figcaption { font-size: .9rem; color: #333 } h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-bottom: .3rem }
nav a { margin-right: 1rem } code { background: #f3f3f3; padding: 0 .2em }
"""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block has succeeded, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def prepare_folder(out: Path) -> Path:
    """Create the folder if needed; ValueError if it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out}: {error.strerror}; choose another folder") from None
    return out


def write_picture(picture: Picture, out: Path) -> None:
    """NAME.png, NAME.pdf and NAME.nc (the plotted numbers, caption included) in the folder `out`."""
    for ending in ("png", "pdf"):
        with whole_file(out / f"{picture.name}.{ending}") as path:
            metadata = {"CreationDate": None} if ending == "pdf" else None
            picture.figure.savefig(path, format=ending, dpi=200, metadata=metadata)
    with whole_file(out / f"{picture.name}.nc") as path:
        picture.data.assign_attrs(title=picture.title, caption=picture.caption).to_netcdf(path, engine="scipy")


def write_report(pictures: Iterable[Picture], out: Path, command: str) -> Path:
    """index.html: all figures with their captions in one self-contained page."""
    sections, links = [], []
    for picture in pictures:
        image = base64.b64encode((out / f"{picture.name}.png").read_bytes()).decode()
        title, caption = html.escape(picture.title), html.escape(picture.caption)
        links.append(f'<a href="#{picture.name}">{title}</a>')
        sections.append(
            f'<section id="{picture.name}"><h2>{title}</h2><figure>'
            f'<img src="data:image/png;base64,{image}" alt="{title}">'
            f"<figcaption>{caption} Files: <code>{picture.name}.png</code>, <code>.pdf</code>, "
            f"<code>.nc</code> (numbers).</figcaption></figure></section>"
        )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>linfit report</title><style>{STYLE}</style></head><body>'
        f"<h1>linfit: fine-tuning in linear models</h1><p>Made by <code>{html.escape(command)}</code>.</p>"
        f"<nav>{''.join(links)}</nav>{''.join(sections)}</body></html>\n"
    )
    path = out / "index.html"
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
