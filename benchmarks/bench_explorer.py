"""From key press to new curve: the explorer in a real browser, every slider of every page, one step at a time.

    OPENBLAS_NUM_THREADS=1 NPROC=4 python -m benchmarks.bench_explorer [--page NAME]... [--presses N]

A press is timed in the browser, from the time stamp of the key event until the frame in which the last plot with new
numbers is painted; `first` is the median time until the frame of the first one. `kernel` is the page's function
alone, called in this process; `empty` is a page whose function takes no time: sending a key, a slider and two
numbers back and forth, and painting.
"""

import argparse
import statistics
import time

import jax
import numpy as np
from playwright.sync_api import Browser

from figures.explorer.page import Page
from figures.explorer.session import pages
from tests.explorer_browser import browsing, doubling_page, opened, serving

SETTLED = 400
"""Milliseconds from one press to the next: the address has followed too."""

LISTEN = """([page, plots, tables]) => {
  const bokeh = Bokeh.documents[0];
  let pressed = null, arrived = false;
  addEventListener("keydown", (event) => {
    [pressed, arrived, window.lag, window.first] = [event.timeStamp, false, null, null];
  }, true);
  for (const table of tables)
    bokeh.get_model_by_name(page + "/table/" + table).properties.data.change.connect(() => { arrived = true; });
  for (const plot of plots) {
    const view = Bokeh.index.find_one(bokeh.get_model_by_name(page + "/box/" + plot).children[0]);
    for (const layer of ["_paint_primary", "_paint_overlays"]) { // called only if there is something new to paint
      const paint = view[layer].bind(view);
      view[layer] = (context) => {
        paint(context);
        if (arrived) setTimeout(() => { // after the frame that this belongs to
          window.lag = performance.now() - pressed;
          window.first ??= window.lag;
        }, 0);
      };
    }
  }
}"""


def milliseconds_of(browser: Browser, url: str, page: Page, presses: int) -> list[tuple[float, float]]:
    """To the first plot and to the last, for every press that changes curves; each slider goes up and down in turn."""
    tab = opened(browser, url, page.name)
    tables = list({item.table for plot in page.plots for item in plot.items})
    tab.evaluate(LISTEN, [page.name, [plot.name for plot in page.plots], tables])
    handles = tab.locator(".noUi-handle:visible")
    lags = []
    for index in range(handles.count()):
        handles.nth(index).focus()
        for press in range(presses):
            tab.keyboard.press("ArrowLeft" if press % 2 else "ArrowRight")
            tab.wait_for_timeout(SETTLED)  # asking the browser whether it is done would take its time
            first, last = tab.evaluate("[first, lag]")
            if last is not None:  # else a slider of the overlay alone
                lags.append((first, last))
    tab.close()
    return lags


def kernel_milliseconds(page: Page) -> float:
    """The function of the page at its first parameters, compiled."""
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        page.compute(page.defaults())
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """One line for each page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="append")
    parser.add_argument("--presses", type=int, default=10, help="of each slider")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    shown = [page for page in (doubling_page("empty"), *pages()) if not arguments.page or page.name in arguments.page]
    print(f"{'page':16} {'presses':>8} {'first':>9} {'median':>9} {'p90':>9} {'kernel':>9}   (milliseconds)")
    for page in shown:
        page.compute(page.defaults())  # compiles
    with serving(shown) as url, browsing() as browser:
        for page in shown:
            milliseconds_of(browser, url, page, 2)  # compiles what the first moves compile
            first, lags = np.transpose(milliseconds_of(browser, url, page, arguments.presses))
            median, tail = np.quantile(lags, [0.5, 0.9])
            kernel = kernel_milliseconds(page)
            print(
                f"{page.name:16} {lags.size:8} {np.median(first):9.1f} {median:9.1f} {tail:9.1f} {kernel:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
