"""The explorer as a user meets it: in a real browser, by mouse and keyboard."""

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from urllib.parse import parse_qs, urlsplit

import jax
import numpy as np
import pytest

pytest.importorskip("bokeh")
pytest.importorskip("playwright")

from bokeh.server.server import Server

from figures.explorer import app
from figures.explorer.page import Choice
from figures.explorer.session import pages
from figures.explorer.stages import STAGE
from linfit import Ridge, predict, select
from tests.explorer_browser import WIDTHS, browsing, doubling_page, features, model, network, opened, serving, tables_in

PAGES = {page.name: page for page in pages()}
DELAY = {"seconds": 0.1}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None and "CI" not in os.environ,
        reason="needs the browser chromium (apt-get install chromium)",
    ),
    pytest.mark.skipif(not jax.config.jax_enable_x64, reason="the explorer runs in double precision"),
]


SLOW = doubling_page("slow", lambda _: time.sleep(DELAY["seconds"]))


@pytest.fixture(scope="module")
def url():
    with serving([*PAGES.values(), SLOW]) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with browsing() as chromium:
        yield chromium


@pytest.fixture
def open_page(browser, url):
    """Opens pages of the explorer; at the end no script has failed and no request has left the machine."""
    shown, hosts, failures = [], set(), []

    def watch(page):
        shown.append(page)
        for event in ("request", "websocket"):
            page.on(event, lambda sent: hosts.add(urlsplit(sent.url).hostname))
        page.on("pageerror", lambda error: failures.append(str(error)))

    yield partial(opened, browser, url, watch=watch)
    for page in shown:
        page.close()
    assert failures == []
    assert {"127.0.0.1"} <= hosts <= {"127.0.0.1", None}  # None: data: and blob:


def press(page, slider, key):
    """A key on one of the sliders, counted from above."""
    page.locator(".noUi-handle:visible").nth(slider).focus()
    page.keyboard.press(key)


def wait_for(page, name, parameters, seconds=90):
    """Until the browser plots, bit for bit, what the function of the page gives at these parameters."""
    expected = PAGES[name].compute(parameters)
    end = time.perf_counter() + seconds
    while True:
        found = tables_in(page, name, PAGES[name].tables)
        wrong = [
            (table, column)
            for table in found
            for column, values in expected[table].items()
            if not np.array_equal(found[table].get(column), values, equal_nan=True)
        ]
        if not wrong:
            return found
        assert time.perf_counter() < end, f"{name}: {wrong} do not show {parameters}"
        page.wait_for_timeout(20)


@pytest.mark.parametrize("name", PAGES)
def test_every_control_moves_the_curves_to_what_the_api_gives(open_page, name):
    """By keyboard: each slider one step, each list to another option."""
    explored, page = PAGES[name], open_page(name)
    parameters = explored.defaults()
    wait_for(page, name, parameters)
    handles, lists = page.locator(".noUi-handle:visible"), page.locator("select:visible")
    at_slider = at_list = 0
    for control in explored.controls:
        if control.name not in explored.shown(parameters):
            continue  # of a stage or a run that is not there
        if isinstance(control, Choice):
            other = next(option for option in control.options if option != parameters[control.name])
            lists.nth(at_list).select_option(control.position_of(other))
            parameters[control.name], at_list = other, at_list + 1
        else:
            position = control.position_of(parameters[control.name])
            up = position + control.step <= control.end + 1e-9
            press(page, at_slider, "ArrowRight" if up else "ArrowLeft")
            parameters[control.name] = control.value_at(position + (control.step if up else -control.step))
            at_slider += 1
        wait_for(page, name, parameters)
    assert at_slider == handles.count()
    assert at_list == lists.count()


def test_a_link_reproduces_the_view(open_page):
    first = open_page("overadaptation", tau=0.3)
    press(first, 0, "ArrowRight")
    first.get_by_role("button", name="freeze these curves").click()
    first.keyboard.press("Tab")
    press(first, 4, "ArrowLeft")
    first.get_by_role("button", name="log y").first.click()
    first.wait_for_function("window.location.search.includes('axes.risks')")
    first.wait_for_timeout(600)
    query = parse_qs(urlsplit(first.url).query)
    assert query["tau"] == ["0.32"]
    assert "frozen" in query
    assert query["axes.risks"] == ["y"]
    defaults = PAGES["overadaptation"].defaults()
    parameters = defaults | {"tau": 0.32, "decay": float(query["decay"][0])}
    assert parameters["decay"] != defaults["decay"]
    wait_for(first, "overadaptation", parameters)

    second = open_page(query.pop("tab")[0], **{name: values[0] for name, values in query.items()})
    wait_for(second, "overadaptation", parameters)
    second.wait_for_function(model("overadaptation/frozen/tau") + ".data.tau.length > 0")
    frozen = "Array.from(Bokeh.documents[0].get_model_by_name('overadaptation/frozen/tau').data.finetune)"
    assert second.evaluate(frozen) == first.evaluate(frozen)
    scale = model("overadaptation/box/risks") + ".children[0].y_scale.type"
    assert second.evaluate(scale) == first.evaluate(scale) == "LogScale"


def test_a_bad_link_says_so_and_shows_the_rest(open_page):
    page = open_page("flow", rho="<img src=x>", beta=0.5, colour="red")
    message = page.evaluate(model("message") + ".text")
    assert "rho must be a number" in message
    assert "<img" not in message
    assert "colour" in message
    beta = next(control for control in PAGES["flow"].controls if control.name == "beta")
    wait_for(page, "flow", PAGES["flow"].defaults() | {"beta": beta.parse("0.5")})


def test_copied_python_agrees_with_the_page(open_page, tmp_path):
    page = open_page("flow", rho=0.4)
    page.get_by_role("button", name="copy as Python").click()
    area = model("flow/script_text") + ".value"
    page.wait_for_function(f"{area}.length > 100")
    text = page.evaluate(area)
    numbers = '{f"{table}/{name}": values for table, columns in tables.items() for name, values in columns.items()}'
    save = f'import numpy as np\n\nnp.savez("numbers.npz", **{numbers})\n'
    (tmp_path / "copied.py").write_text(text + save, encoding="utf-8")
    subprocess.run([sys.executable, "copied.py"], cwd=tmp_path, check=True, timeout=240, stdout=subprocess.DEVNULL)
    found = tables_in(page, "flow", PAGES["flow"].tables)
    with np.load(tmp_path / "numbers.npz") as numbers:
        for table, columns in found.items():
            for column, values in columns.items():
                np.testing.assert_array_equal(numbers[f"{table}/{column}"], values)


def test_csv_and_svg_come_down(open_page):
    page = open_page("s3ft")
    with page.expect_download() as download:
        page.get_by_role("button", name="data as CSV").click()
    lines = download.value.path().read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("tolerance.tolerance,tolerance.own")
    assert float(lines[1].split(",")[1]) == PAGES["s3ft"].compute(PAGES["s3ft"].defaults())["tolerance"]["own"][0]
    with page.expect_download() as download:
        page.get_by_role("button", name="SVG").first.click()
    assert download.value.suggested_filename == "s3ft_trade.svg"
    text = download.value.path().read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert "Trade-off" in text
    with page.expect_download() as download:
        page.locator(".bk-tool-icon-save, [title='Save as PNG']").first.click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_the_overlay_is_drawn_with_progress_and_dropped_when_a_slider_moves(open_page):
    page = open_page("overtraining")
    simulated = "Array.from(Bokeh.documents[0].get_model_by_name('overtraining/table/simulated').data.perturbed)"
    page.locator("input[type=checkbox]:visible").check()
    page.wait_for_function(f"{simulated}.length > 0", timeout=60_000)
    progress = model("overtraining/progress") + ".text"
    page.wait_for_function(f"{progress}.startsWith('8 of 8')", timeout=60_000)
    before = page.evaluate(simulated)
    press(page, 1, "ArrowLeft")  # γ
    page.wait_for_function(f"(before) => {simulated}.length > 0 && {simulated}[0] != before", arg=before[0])
    page.wait_for_function(f"{progress}.startsWith('8 of 8')", timeout=60_000)
    after = page.evaluate(simulated)
    assert len(after) == len(before)
    assert after != before


def test_numbers_show_on_hover_and_the_legend_hides_curves(open_page):
    page = open_page("flow")
    place = """(() => {
      const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("flow/box/errors").children[0]);
      const {steps, flow_total} = Bokeh.documents[0].get_model_by_name("flow/table/now").data;
      const box = view.el.getBoundingClientRect();
      const {x_scale, y_scale} = view.frame;
      return [box.left + x_scale.compute(steps[0]), box.top + y_scale.compute(flow_total[0])];
    })()"""
    page.wait_for_timeout(300)
    x, y = page.evaluate(place)
    page.mouse.move(x - 20, y - 20)
    page.mouse.move(x, y)
    page.get_by_text("error in units of").first.wait_for(state="visible")
    page.get_by_text("K of the slider").nth(1).wait_for(state="visible")  # the first is the legend's

    drawn = """Bokeh.documents[0].get_model_by_name("flow/box/plane").children[0].renderers
      .filter((renderer) => renderer.data_source.name == "flow/table/stalled").map((renderer) => renderer.visible)"""
    assert page.evaluate(drawn) == [True]
    page.get_by_text("stalled direction", exact=True).click()
    page.wait_for_function(f"!({drawn})[0]")
    page.get_by_text("stalled direction", exact=True).click()
    page.wait_for_function(f"({drawn})[0]")


def test_symbols_are_explained_on_hover_and_by_keyboard(open_page):
    page = open_page("flow")
    page.locator(".bk-help-button, .bk-btn:has(.bk-icon-help), .controls button").first.hover()
    explanation = page.get_by_text("Fine-tuning covariance I + ρ")
    explanation.first.wait_for(state="visible")
    assert "arXiv 2502.02797" in explanation.first.inner_text()


SETTLE = """async (steps) => { // seconds until the page shows the slider's value, moved by some steps of 0.01
  const model = Bokeh.documents[0].get_model_by_name("slow/x");
  const source = Bokeh.documents[0].get_model_by_name("slow/table/now");
  const start = performance.now();
  if (steps) model.value = Math.round(100 * model.value + steps) / 100;
  while (Math.abs(source.data.x[0] - model.value) > 1e-9) await new Promise((done) => setTimeout(done, 2));
  return (performance.now() - start) / 1000;
}"""


def test_a_drag_over_a_slow_kernel_settles_at_once(open_page):
    """Kernel of 0.1 s: under 0.3 s after release, or on a busy machine two kernels and three empty round trips."""
    DELAY["seconds"] = 0.1
    page = open_page("slow")
    overhead = sorted(page.evaluate(SETTLE, 1) - 0.1 for _ in range(5))[2]
    handle = page.locator(".noUi-handle:visible").first.bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for index in range(80):
        page.mouse.move(x + 2 * index, y)
    page.mouse.up()
    lag = page.evaluate(SETTLE, 0)
    assert page.evaluate(model("slow/x") + ".value") > 0.3
    assert lag < max(0.3, 0.2 + 3 * overhead)


STREAM = """async (plots) => { // forty messages, one for every frame, as a fast kernel sends them in a drag
  const model = (name) => Bokeh.documents[0].get_model_by_name("flow/" + name);
  const paints = {}, message = model("message"), {numbers, ...rest} = message.data;
  for (const plot of plots) {
    const view = Bokeh.index.find_one(model("box/" + plot).children[0]), paint = view._paint_primary.bind(view);
    paints[plot] = 0;
    view._paint_primary = (context) => { paint(context); paints[plot] += 1; };
  }
  for (let index = 1; index <= 40; index++) {
    const moved = Array.from(numbers[0], (number) => number * (1 + 0.01 * index));
    message.setv({data: {...rest, numbers: [moved]}}, {sync: false});
    await new Promise((done) => requestAnimationFrame(done));
  }
  return paints;
}"""


def test_no_plot_is_left_behind_in_a_drag(open_page):
    """The first plot goes ahead of a single step; while steps follow each other, all keep together."""
    plots = [plot.name for plot in PAGES["flow"].plots]
    paints = open_page("flow").evaluate(STREAM, plots)
    assert min(paints.values()) > 10, paints


def test_a_slow_session_does_not_hold_up_another(open_page):
    DELAY["seconds"] = 3.0
    try:
        waiting = open_page("slow", x=0.1)
        other = open_page("s3ft")
        press(waiting, 0, "ArrowRight")
        start = time.perf_counter()
        press(other, 0, "ArrowRight")
        wait_for(other, "s3ft", PAGES["s3ft"].defaults() | {"tolerance": 1.1})
        seconds = time.perf_counter() - start
        assert tables_in(waiting, "slow", ["now"])["now"]["x"][0] == 0.1  # still at it
        assert seconds < 2.5
    finally:
        DELAY["seconds"] = 0.1


def test_an_upload_is_read_and_bad_ones_are_answered(open_page, tmp_path):
    np.savez(tmp_path / "mine.npz", **features())
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    (tmp_path / "large.npz").write_bytes(b"0" * (33 * 2**20))
    page = open_page("s3ft")
    page.get_by_text("Your features", exact=True).click()
    chooser = page.locator("input[type=file]:visible")
    for name, message in {"bad": "must be an .npz", "large": "larger than 32 MB"}.items():
        chooser.set_input_files(tmp_path / f"{name}.npz")
        page.wait_for_function(f"{model('upload/data/message')}.text.includes('{message}')")
    chooser.set_input_files(tmp_path / "mine.npz")
    page.wait_for_function(model("data/table/best") + "?.data.tau.length == 1", timeout=90_000)
    assert tables_in(page, "data", ["best"])["best"]["tau"][0] == select(**features()).best_tau


def test_stages_and_runs_are_added_and_removed(open_page):
    page, parameters = open_page("stages", stage2_n=150), PAGES["stages"].defaults() | {"stage2_n": 150}
    page.get_by_role("button", name="add a stage").click()
    parameters["stages"] += 1
    assert wait_for(page, "stages", parameters)["stages"]["A"].size == 5
    page.get_by_role("button", name="remove").first.click()
    for later in (2, 3, 4):
        parameters |= {f"stage{later - 1}_{key}": parameters[f"stage{later}_{key}"] for key in STAGE}
    parameters["stages"] -= 1
    wait_for(page, "stages", parameters)
    page.get_by_role("button", name="add a run").click()
    parameters["runs"] += 1
    wait_for(page, "stages", parameters)
    page.wait_for_function("window.location.search.includes('runs=3')")
    query = {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}
    assert "run4_task" not in query
    second = open_page(query.pop("tab"), **query)
    wait_for(second, "stages", parameters)
    assert second.get_by_role("button", name="remove").count() == 3 + 3


def test_a_saved_prediction_is_explored(open_page, tmp_path):
    """Its losses are those of the prediction; a bad file leaves nothing of it."""
    prediction = predict(*network("squared"))
    prediction.save(tmp_path / "bundle.npz")
    np.savez(tmp_path / "bad.npz", **features())
    (tmp_path / "large.npz").write_bytes(b"0" * (129 * 2**20))
    page = open_page("flow")
    page.get_by_text("Your network", exact=True).click()
    chooser, plotted = page.locator("input[type=file]:visible"), model("prediction/table/now")
    for name, message in {"bad": "must be a saved prediction", "large": "larger than 128 MB"}.items():
        chooser.set_input_files(tmp_path / "bundle.npz")
        page.wait_for_function(f"{plotted}?.data.task.length == 1", timeout=90_000)
        chooser.set_input_files(tmp_path / f"{name}.npz")
        page.wait_for_function(f"{model('upload/prediction/message')}.text.includes('{message}')")
        page.get_by_text("task loss there").wait_for(state="detached")
        page.evaluate("Bokeh.documents[0]._recompute_all_models()")  # else only after a minute
        assert page.evaluate(f"{plotted} == null")
    chooser.set_input_files(tmp_path / "bundle.npz")
    page.wait_for_function(f"{plotted}?.data.task.length == 1", timeout=90_000)
    assert not page.evaluate(model("upload/prediction/message") + ".visible")
    press(page, 2, "ArrowLeft")  # τ
    page.wait_for_function(f"{plotted}.data.tau[0] < 0.99")
    (task,) = tables_in(page, "prediction", ["now"])["now"]["task"]
    penalty = tables_in(page, "prediction", ["penalty_now"])["penalty_now"]["penalty"]
    np.testing.assert_allclose(task, prediction.losses(Ridge(penalty), 0.98).mean(), rtol=1e-9)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_screen(open_page, name, width):
    page = open_page(name, width)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for plot in PAGES[name].plots:
        view = f"Bokeh.index.find_one({model(f'{name}/box/{plot.name}')}.children[0])"
        assert min(page.evaluate(f"[{view}.bbox.width, {view}.bbox.height]")) > 250


def test_without_its_own_server_the_address_is_left_alone(browser):
    """As in a notebook, where the page belongs to somebody else."""

    def here(address, port, tabs):
        return Server({"/": app({"tab": "s3ft", "tolerance": 2.0})}, address=address, port=port)

    with serving([], here) as url:
        page = browser.new_page()
        page.goto(url.replace("127.0.0.1", "localhost"))
        page.wait_for_function(f"window.Bokeh && Bokeh.documents[0] && {model('s3ft/table/now')}?.data.own.length == 1")
        press(page, 0, "ArrowRight")
        wait_for(page, "s3ft", PAGES["s3ft"].defaults() | {"tolerance": 2.1})
        page.wait_for_timeout(600)
        assert urlsplit(page.url).query == ""
        page.close()
