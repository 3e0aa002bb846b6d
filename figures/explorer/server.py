"""`linfit explore`: a Bokeh server of one application, on this machine unless told otherwise."""

import ipaddress
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.server.server import Server

from figures.explorer.latest import CURVES
from figures.explorer.page import Page
from figures.explorer.session import app, pages
from figures.explorer.store import store_page

MESSAGE_LIMIT = 192 * 2**20
"""Largest message from a browser, in bytes: an upload of `prediction.LIMIT` bytes in base64, and room to spare."""

SWITCH_INTERVAL = 2e-4
"""Seconds that a thread keeps Python while others wait; with the usual 5 ms a key waits that long for its kernel."""


def serve(
    address: str = "127.0.0.1", port: int = 5006, origins: Sequence[str] = (), tabs: Sequence[Page] | None = None
) -> Server:
    """A server that listens (`start()` and its `io_loop` set it going), its kernels compiling in the background.

    Port 0 is any free one. Browsers may connect from pages of `address` itself, of localhost if that is a loopback
    address, and of `origins` (host or host:port), nowhere else. Raises OSError where the port is taken.
    """
    shown = pages() if tabs is None else tuple(tabs)
    hosts = [address, "localhost", "127.0.0.1"] if is_loopback(address) else [address, socket.gethostname()]
    if not is_loopback(address):
        print(
            f"linfit: warning: {address} can be reached from other machines. Everyone who reaches it can use this "
            "machine's processor and send files to it; there is no password.",
            file=sys.stderr,
        )
    if port == 0:
        with socket.create_server((address, 0)) as listener:
            port = int(listener.getsockname()[1])
    allowed = [host if ":" in host else f"{host}:{port}" for host in [*hosts, *origins]]
    limits = {"allow_websocket_origin": allowed, "websocket_max_message_size": MESSAGE_LIMIT}
    application = Application(FunctionHandler(app(tabs=shown, keep_address=True)))
    server = Server({"/": application}, address=address, port=port, **limits)
    sys.setswitchinterval(SWITCH_INTERVAL)
    threading.Thread(target=_compile, args=[shown], name="warming up", daemon=True).start()
    return server


def run(store: Path | None, address: str, port: int, origins: Sequence[str], show: bool) -> None:
    """`linfit explore`: serve until interrupted."""
    shown = pages() if store is None else (*pages(), store_page(store))
    server = serve(address, port, origins, shown)
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{server.port}/"
    print(f"linfit explore: {url} (warming up; Ctrl-C ends it)", flush=True)
    server.start()
    if show:
        server.io_loop.add_callback(webbrowser.open, url)
    server.io_loop.start()


def is_loopback(address: str) -> bool:
    """Whether only this machine can connect to the address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _compile(shown: Sequence[Page]) -> None:
    """The kernels of every page at its first parameters."""
    start = time.perf_counter()
    list(CURVES.map(lambda page: page.compute(page.defaults()), shown))
    print(f"linfit explore: ready after {time.perf_counter() - start:.0f} s of compiling", flush=True)
