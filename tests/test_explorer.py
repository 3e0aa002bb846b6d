"""The explorer without a browser: pages, links, scripts, uploads, the latest-value-wins loop, who may connect."""

import asyncio
import base64
import io
import re
import runpy
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

pytest.importorskip("bokeh")

import jax
from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.models import Slider as BokehSlider
from bokeh.server.contexts import ApplicationContext
from tornado.ioloop import IOLoop

from figures.explorer import app
from figures.explorer.page import Slider
from figures.explorer.script import script
from figures.explorer.server import is_loopback, serve
from figures.explorer.session import pages
from figures.explorer.store import store_page
from figures.explorer.tables import average
from figures.explorer.upload import LIMIT, curves, features_page, read_upload
from figures.explorer.view import PageView, as_csv
from linfit import GradientFlow, MinNorm, Ridge, aligned_problem, leave_one_out, select, spectra
from tests.explorer_browser import doubling_page, features
from theory.equivalents import risk
from theory.flow import best_averaging, errors, flow_iterates, unweighted_iterates
from theory.frontier import distance
from theory.overtraining import inflection_time

PAGES = {page.name: page for page in pages()}

pytestmark = pytest.mark.skipif(not jax.config.jax_enable_x64, reason="the explorer runs in double precision")


@pytest.fixture(scope="module")
def tables():
    """The first screen of every page."""
    return {name: page.compute(page.defaults()) for name, page in PAGES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_everything_a_page_shows_is_in_its_tables(name, tables):
    page = PAGES[name]
    for plot in page.plots:
        for item in plot.items:
            x, y = tables[name][item.table][item.x], tables[name][item.table][item.y]
            assert x.shape == y.shape
            assert x.ndim == 1
        if plot.surface is not None:
            table, x, y, z, _ = plot.surface
            columns = tables[name][table]
            assert np.unique(columns[x]).size * np.unique(columns[y]).size == columns[z].size
    assert {point.plot for point in page.overlay.points} <= {plot.name for plot in page.plots}
    for reading in page.readings:
        assert np.isfinite(tables[name][reading.table][reading.column][0])
    for control in page.controls:
        assert len(control.help) > 15


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_three_things_to_try_and_they_are_valid(name):
    page = PAGES[name]
    assert len(page.suggestions) == 3
    controls = {control.name: control for control in page.controls}
    for key, value in [pair for suggestion in page.suggestions.values() for pair in suggestion.items()]:
        parsed = controls[key].parse(str(value))
        assert parsed == value or np.isclose(parsed, value, rtol=0.05)


@pytest.mark.slow
def test_the_first_screen_shows_that_averaging_beats_both_ends(tables):
    best, pretrained, tuned = (tables["overadaptation"][name] for name in ("best", "pretrained", "tuned"))
    assert 0.2 < best["tau"][0] < 0.8
    assert best["finetune"][0] < 0.95 * min(pretrained["finetune"][0], tuned["finetune"][0])


@pytest.mark.slow
def test_overadaptation_shows_the_deterministic_equivalents():
    page = PAGES["overadaptation"]
    moved = {"n": 150, "alignment": 0.3, "noise_std": 0.84, "pretrain_risk": 0.05, "penalty": 0.05623, "time": 31.62}
    parameters = page.defaults() | moved
    problem = aligned_problem(spectra.power_law(2000), alignment=0.3, noise_std=0.84, pretrain_risk=0.05)
    filters = {"min-norm": MinNorm(), "ridge": Ridge(0.05623), "early stopping": GradientFlow(31.62)}
    for fine_tuner, filter in filters.items():
        tables = page.compute(parameters | {"fine_tuner": fine_tuner})
        finetune, pretrain = risk(problem, 150, filter, tables["tau"]["tau"])
        expected = {"bias": finetune.bias, "variance": finetune.variance, "pretrain": pretrain.total}
        for name, values in expected.items():
            np.testing.assert_allclose(tables["tau"][name], values, rtol=1e-6)
        now = risk(problem, 150, filter, parameters["tau"]).finetune.total
        np.testing.assert_allclose(tables["now"]["finetune"], now, rtol=1e-6)


def test_flow_without_noise_is_theorem_7_2():
    tables = PAGES["flow"].compute(PAGES["flow"].defaults() | {"rho": 0.6, "beta": 0.3162, "curvature": 2.0})
    positions = np.asarray(flow_iterates(0.6, 0.3162, np.arange(61)))
    total = sum(errors(positions, 0.6, [[2.0, 0.0], [0.0, 1.0]]))
    unweighted = np.asarray(unweighted_iterates(0.6, np.arange(61)))[:, 1]
    expected = {"flow_x": positions[:, 0], "flow_y": positions[:, 1], "flow_total": total, "unweighted_y": unweighted}
    for name, values in expected.items():
        np.testing.assert_allclose(tables["steps"][name], values, atol=1e-12)
    np.testing.assert_allclose(tables["now"]["best_averaging"], best_averaging([[2.0, 0.0], [0.0, 1.0]]), rtol=1e-3)


@pytest.mark.slow
def test_overtraining_turns_where_theory_says(tables):
    time = tables["overtraining"]["turn"]["time"][0]
    np.testing.assert_allclose(time, inflection_time(0.001, 1 / np.arange(1.0, 7.0), 0.1, (16, 16, 16)), rtol=1e-12)
    row = tables["overtraining"]["time"]
    assert abs(np.log(row["time"][np.argmin(row["perturbed"])] / time)) < 0.1


@pytest.mark.slow
def test_nothing_on_the_compare_page_is_below_the_frontier(tables):
    finetune = spectra.power_law(120)
    pretrain = spectra.power_law(120, 0.5, trace=finetune.sum())
    problem = aligned_problem(finetune, noise_std=0.7, pretrain_spectrum=pretrain, pretrain_risk=0.1)
    for table in ("averaging", "ridge", "ridge_averaging", "time", "segment"):
        points = tables["compare"][table]
        inside = points["finetune"] > 0
        assert (np.asarray(distance(problem, points["finetune"][inside], points["pretrain"][inside])) > -1e-9).all()
    cost = {name: table["cost"][0] for name, table in tables["compare"].items() if "cost" in table}
    assert cost["lower_bound"] < cost["best"] <= min(cost["best_ridge"], cost["best_average"]) < cost["min_norm"]


@pytest.mark.slow
def test_s3ft_shares_add_up_and_forget_less(tables):
    row = tables["s3ft"]["tolerance"]
    np.testing.assert_allclose(row["own"] + row["paraphrase"] + row["gold"], 1, rtol=1e-12)
    assert (row["forgetting"][:20] < tables["s3ft"]["supervised"]["forgetting"][0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "x", "measured", "predicted"),
    [
        ("overadaptation", "tau", "finetune", "finetune"),
        ("overtraining", "time", "perturbed", "perturbed"),
        ("flow", "steps", "total", "flow_total"),
        ("s3ft", "tolerance", "forgetting", "forgetting"),
    ],
)
def test_the_overlay_agrees_with_the_curves(name, x, measured, predicted, tables):
    """Within 4 standard errors, or 3% for what is only asymptotic."""
    page = PAGES[name]
    parameters = page.defaults() | ({"n": 2000} if name in ("flow", "s3ft") else {})
    overlay = page.overlay
    simulated = average([page.replicate(i, parameters) for i in range(overlay.replicates)], overlay.axes)
    curve = tables[name][x]  # the table has the name of its axis
    expected = np.interp(simulated[x], curve[x], curve[predicted])
    gap = abs(simulated[measured] - expected)
    assert (gap < 4 * simulated[f"{measured}_error"] + 0.03 * abs(expected).max()).all()
    assert simulated[f"{measured}_error"].max() > 0


def run_script(page, parameters, folder, **options):
    """The tables of a copied script."""
    (folder / "copied.py").write_text(script(page, parameters, **options), encoding="utf-8")
    return runpy.run_path(str(folder / "copied.py"))["tables"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_script_reproduces_every_number_exactly(name, tmp_path):
    """One of them is run as a program of its own in test_explorer_browser."""
    page = PAGES[name]
    control = next(control for control in page.controls if isinstance(control, Slider))
    moved = control.value_at(control.position_of(control.value) - control.step)
    parameters, simulated = page.defaults() | {control.name: moved}, name not in ("compare", "stages")
    assert f"from {page.curves.__module__} import curves" in script(page, parameters)
    found = run_script(page, parameters, tmp_path, simulated=simulated)
    tables = page.compute(parameters)
    if simulated:
        samples = [page.replicate(index, parameters) for index in range(page.overlay.replicates)]
        tables["simulated"] = average(samples, page.overlay.axes)
    for table, columns in (tables | found).items():
        np.testing.assert_equal(found[table], {name: np.asarray(tables[table][name]) for name in columns})


@pytest.mark.slow
def test_csv_gives_back_the_same_floats(tables):
    text = as_csv(tables["overadaptation"])
    columns = np.genfromtxt(io.StringIO(text), delimiter=",", names=True, deletechars="")
    for table, content in tables["overadaptation"].items():
        for name, values in content.items():
            np.testing.assert_array_equal(columns[f"{table}.{name}"][: values.size], values)


def test_a_slider_and_its_value_go_back_and_forth():
    for page in PAGES.values():
        for control in page.controls:
            if isinstance(control, Slider):
                for position in np.linspace(control.start, control.end, 23):
                    value = control.value_at(position)
                    assert control.value_at(control.position_of(value)) == value
                    assert control.parse(str(value)) == value
                assert control.value_at(control.position_of(control.value)) == control.value, (page.name, control.name)
            else:
                assert [control.parse(label) for label in control.labels] == list(control.options)


@pytest.mark.parametrize(
    ("control", "text", "message"),
    [
        ("tau", "2", "tau must be between 0 and 1.5, got 2"),
        ("tau", "nan", "finite"),
        ("tau", "<b>", "number"),
        ("penalty", "-1", "between 1e-05 and 100"),
        ("penalty", "0", "between"),
        ("p", "30", "one of 1000, 2000, 4000"),
    ],
)
def test_values_that_make_no_sense_are_named(control, text, message):
    named = {control.name: control for control in PAGES["overadaptation"].controls}
    with pytest.raises(ValueError, match=re.escape(message)):
        named[control].parse(text)


def test_app_starts_where_it_is_told():
    document = Document()
    app({"tab": "flow", "rho": 0.5})(document)
    assert document.get_model_by_name("flow/rho").value == 0.5
    assert document.get_model_by_name("tabs").active == 2
    refused = {
        r"rho must be between 0 and 0\.85": {"tab": "flow", "rho": 3},
        "no parameter 'noise_variance'": {"tab": "flow", "noise_variance": 1},
        "tab must be one of": {"tab": "nothing"},
    }
    for message, start in refused.items():
        with pytest.raises(ValueError, match=message):
            app(start)


def test_state_of_a_page_reproduces_it():
    page = PAGES["overadaptation"]
    first = PageView(Document(), page, lambda: None)
    first.tables = {name: {} for name in page.tables}
    first._set({"tau": 0.9, "penalty": 0.5623, "fine_tuner": "ridge", "p": 1000, "alignment": -0.85})
    first._panels["risks"].set_axes((False, True))
    first._panels["time"].set_axes((False, False))
    first._toggle_freeze()
    first._overlay_box.active = True
    first._set({"noise_std": 1.12})
    second = PageView(Document(), page, lambda: None)
    assert second.restore(first.state()) == []
    assert second.values == first.values
    assert second.values["penalty"] == 0.5623
    assert second.state() == first.state()
    complaints = second.restore({"tau": "x", "frozen": "[1", "penalty": "1"})
    assert len(complaints) == 2
    assert second.values["penalty"] == 1.0


def test_logarithmic_axes_are_drawn_on_the_same_data():
    panel = PageView(Document(), PAGES["overadaptation"], lambda: None)._panels["risks"]
    (before,) = panel.box.children
    panel.set_axes((False, True))
    (after,) = panel.box.children
    assert type(before.y_scale).__name__ == "LinearScale"
    assert type(after.y_scale).__name__ == "LogScale"
    assert {r.data_source.id for r in before.renderers} == {r.data_source.id for r in after.renderers}


def settle(page, *, moves, pause, seconds):
    """A session on a loop of its own: move its first slider `moves` times; seconds until the last value showed."""

    async def main():
        context = ApplicationContext(Application(FunctionHandler(app(tabs=[page]))), io_loop=IOLoop.current())
        session = await context.create_session_if_needed("a" * 44, request=None)
        document = session.document
        slider = next(iter(document.select({"type": BokehSlider})))
        await asyncio.sleep(seconds / 4)
        for index in range(moves):
            await session.with_document_locked(setattr, slider, "value", slider.start + slider.step * (index + 1))
            await asyncio.sleep(pause)
        released = time.perf_counter()
        wanted = page.controls[0].value_at(slider.value)
        message = document.get_model_by_name(f"{page.name}/message")
        while message.data["numbers"][0][0] != wanted and time.perf_counter() - released < seconds:
            await asyncio.sleep(0.005)
        return time.perf_counter() - released

    return asyncio.run(main())


@pytest.mark.slow
def test_a_slow_kernel_never_gets_a_backlog():
    computed, delay = [], 0.1

    def work(x):
        time.sleep(delay)
        computed.append(x)

    lag = settle(doubling_page(work=work), moves=60, pause=0.01, seconds=8)
    assert computed[-1] == 0.6
    assert computed == sorted(computed)
    assert len(computed) < 20  # of 60 moves
    assert lag < 2 * delay + 0.3  # one that runs, one for the last value


def test_an_error_is_shown_and_the_page_lives_on():
    view = PageView(Document(), doubling_page(), lambda: None)
    view._fail({}, ValueError("no <b>1</b>"))
    assert view._status.visible
    assert "&lt;b&gt;" in view._status.text


def encoded(**arrays):
    data = io.BytesIO()
    np.savez(data, **arrays)
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.slow
def test_an_upload_is_explored_as_select_does():
    arrays, selection = features(), select(**features())
    np.testing.assert_equal(read_upload("mine.npz", encoded(**arrays)), arrays)
    page = features_page("mine.npz", selection)
    tables = page.compute(page.defaults())
    assert tables["best"]["tau"][0] == selection.best_tau
    row = int(np.argmin(abs(selection.penalties - page.defaults()["penalty"])))
    np.testing.assert_array_equal(tables["tau"]["error"], selection.mean_squared_error[row])
    full = curves(selection, {"penalty": 0.0, "tau": 1.0})["now"]["error"][0]
    np.testing.assert_allclose(full, np.mean(leave_one_out(**arrays, penalty=0.0, tau=1.0) ** 2), rtol=1e-9)


@pytest.mark.slow
def test_the_script_of_an_upload_runs(tmp_path, monkeypatch):
    page = features_page("/elsewhere/mine.npz", select(**features()))
    np.savez(tmp_path / "mine.npz", **features())
    parameters = page.defaults() | {"tau": 0.5}
    monkeypatch.chdir(tmp_path)
    found = run_script(page, parameters, tmp_path)
    np.testing.assert_array_equal(found["surface"]["error"], page.compute(parameters)["surface"]["error"])


def bomb():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("X.npy", b"\0" * (9 * LIMIT))
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: "!!!", "must be an .npz"),
        (lambda: base64.b64encode(b"not a zip").decode(), "must be an .npz"),
        (lambda: encoded(y=np.ones(3), theta_1=np.ones(2)), "X missing"),
        (lambda: "A" * (2 * LIMIT), "at most 32 MB"),
        (bomb, "expand to at most 256 MB, got 288 MB"),
        (lambda: encoded(X=np.array([{"a": 1}]), y=np.ones(1), theta_1=np.ones(1)), "plain numeric arrays"),
        (lambda: encoded(X=np.ones((3001, 2)), y=np.ones(3001), theta_1=np.ones(2)), "at most 3000 rows"),
    ],
)
def test_bad_uploads_are_answered_with_one_line(content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_upload("dir/<b>mine.npz", content())
    assert "\n" not in str(error.value)
    assert "/tmp" not in str(error.value)


def test_loopback_is_told_from_the_rest():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "192.168.1.4", "::", "example.org"]))


def test_other_addresses_print_a_warning_and_admit_only_named_origins(capsys):
    page = doubling_page()
    server = serve("127.0.0.1", 0, tabs=[page])
    assert "warning" not in capsys.readouterr().err
    here = {f"127.0.0.1:{server.port}", f"localhost:{server.port}"}
    assert server._tornado.websocket_origins == here
    server.stop()
    server = serve("0.0.0.0", 0, origins=["lab.example:80"], tabs=[page])
    assert "warning: 0.0.0.0 can be reached from other machines" in capsys.readouterr().err
    assert "lab.example:80" in server._tornado.websocket_origins
    assert not any("*" in origin for origin in server._tornado.websocket_origins)
    server.stop()


@pytest.mark.slow
def test_a_port_in_use_is_an_error_of_one_line():
    server = serve("127.0.0.1", 0, tabs=[doubling_page()])
    command = [sys.executable, "-c", "from figures.commands import main; main()", "explore", "--port", str(server.port)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    server.stop()
    assert answer.returncode == 2
    assert answer.stderr.strip().splitlines()[-1].startswith("linfit: error:")


@pytest.mark.slow
def test_a_sweep_store_is_explored(tmp_path):
    with pytest.raises(ValueError, match="not a store"):
        store_page(tmp_path)
    pytest.importorskip("zarr")
    from sims.sweep import read, run, sweep_over

    sweep = sweep_over("overadaptation", {"n": [10, 20], "p": 40, "tau": "0:1:3", "penalty": [0.1, 1.0]}, seeds=2)
    path = tmp_path / "some.zarr"
    run(sweep, path)
    page = store_page(path)
    parameters = page.defaults() | {"along": "tau", "n": 20, "penalty": 1.0}
    tables = page.compute(parameters)
    output = page.plots[0].name
    data = read(path)[output]
    expected = data.sel({axis: parameters[axis] for axis in ("n", "penalty") if axis in data.dims})
    np.testing.assert_array_equal(tables["x"][output], expected.values)
    np.testing.assert_array_equal(tables["x"]["x"], [0.0, 0.5, 1.0])
