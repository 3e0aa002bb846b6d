"""`linfit explore`."""

from importlib.util import find_spec
from pathlib import Path


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
