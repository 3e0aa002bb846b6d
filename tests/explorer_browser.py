"""A server of the explorer and a browser on it; `python -m tests.explorer_browser docs` takes the screenshots."""

import asyncio
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import jax
import jax.numpy as jnp
import numpy as np

from figures.explorer.page import Mark, Page, Plot, Slider
from figures.explorer.server import serve
from figures.explorer.session import pages
from linfit import predict
from sims.parameters import Parameter

WIDTHS = {1280: 800, 390: 844}
TABLES = """([page, tables]) => {
  const found = {};
  for (const table of tables) {
    const source = Bokeh.documents[0].get_model_by_name(page + "/table/" + table);
    found[table] = Object.fromEntries(Object.entries(source.data).map(([name, values]) => [name, Array.from(values)]));
  }
  return found;
}"""
READY = """(page) => {
  const bokeh = window.Bokeh && Bokeh.documents[0];
  const readings = bokeh && bokeh.get_model_by_name(page + "/status");
  return readings && !readings.visible;
}"""


def model(name):
    """JavaScript for a part of the page."""
    return f"Bokeh.documents[0].get_model_by_name('{name}')"


def doubling_page(name="slow", work=lambda x: None):
    """A page that shows its one parameter x and 2x, after some work."""

    def double(at):
        work(at["x"])
        return {"now": {"x": np.array([at["x"]]), "y": np.array([2 * at["x"]])}}

    plot = Plot("plot", "", "x", "y", marks=(Mark("now", "x", "y", "now", "#000000"),))
    return Page(name, name, double, (plot,), choices=(Slider("x", Parameter("a number", high=1.0), 0.01, name="x"),))


@contextmanager
def serving(tabs, make=serve):
    """The explorer with these tabs on a thread of its own; its address."""
    ready, found = threading.Event(), {}

    def run():
        asyncio.set_event_loop(asyncio.new_event_loop())
        server = make("127.0.0.1", 0, tabs=tabs)
        server.start()
        found["server"] = server
        ready.set()
        server.io_loop.start()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(60)
    server = found["server"]
    yield f"http://127.0.0.1:{server.port}/"
    server.io_loop.add_callback(server.stop)
    server.io_loop.add_callback(server.io_loop.stop)
    thread.join(10)


@contextmanager
def browsing():
    """Debian's chromium, without a window."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise RuntimeError("the tests of the explorer need a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def tables_in(page, name, tables):
    """What the browser plots: {table: {column: array}} of a page of the explorer."""
    found = page.evaluate(TABLES, [name, list(tables)]).items()
    return {table: {name: np.array(values, float) for name, values in columns.items()} for table, columns in found}


def features():
    """What a user uploads."""
    generator = np.random.default_rng(0)
    X = generator.standard_normal((30, 60))
    return {"X": X, "y": X @ np.full(60, 0.4) + 2 * generator.standard_normal(30), "theta_1": np.zeros(60)}


def network(loss):
    """What `linfit.predict` takes: a small network, its weights, data of a task, of its test and of another domain."""
    keys = jax.random.split(jax.random.key(0), 4)
    weights = {"in": jax.random.normal(keys[0], (4, 30)) / 2, "out": jax.random.normal(keys[1], (30, 3)) / 6}
    x = jax.random.normal(keys[2], (60, 4))
    classes = jnp.where(x[:, 0] > 0.3, 0, jnp.where(x[:, 1] > 0, 1, jax.random.randint(keys[3], (60,), 0, 3)))
    y = classes if loss == "entropy" else jax.nn.one_hot(classes, 3)
    data = [(x[start : start + 20], y[start : start + 20]) for start in (0, 20, 40)]
    return (lambda weights, x: jnp.tanh(x @ weights["in"]) @ weights["out"], weights, *data)


def opened(browser, url, name, width=1280, watch=lambda page: None, **parameters):
    """A tab of the browser that shows a page of the explorer, curves drawn; `watch` gets it before it loads."""
    page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]})
    watch(page)
    page.goto(url + "?" + urlencode({"tab": name, **parameters}))
    page.wait_for_function(READY, arg=name, timeout=120_000)
    return page


def photograph(page, file: Path) -> None:
    """The whole page as a small PNG; closes it."""
    from PIL import Image

    page.wait_for_timeout(1500)
    page.screenshot(path=str(file), full_page=True)
    picture, plain = Image.open(file).convert("RGB"), {"dither": Image.Dither.NONE}
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, **plain).save(file, optimize=True)
    page.close()
    print(file, file.stat().st_size)


def take_screenshots(folder: Path, names=()) -> None:
    """Every tab at both widths, or those of some names, and the tab of a prediction."""
    tabs = pages()
    with serving(tabs) as url, browsing() as browser:
        for name in names or [tab.name for tab in tabs]:
            for width in WIDTHS:
                photograph(opened(browser, url, name, width), folder / f"explorer_{name}_{width}.png")
        bundle = folder / "bundle.npz"
        predict(*network("squared")).save(bundle)
        page = opened(browser, url, tabs[0].name)
        page.get_by_text("Your network", exact=True).click()
        page.locator("input[type=file]:visible").set_input_files(bundle)
        page.wait_for_function(READY, arg="prediction", timeout=120_000)
        photograph(page, folder / "explorer_prediction_1280.png")
        bundle.unlink()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    take_screenshots(Path(sys.argv[1]))
