"""The page of a saved prediction: its numbers are those of `linfit.predict`, bad files are answered."""

import base64
import io
import re
import runpy

import numpy as np
import pytest

pytest.importorskip("bokeh")

import equinox as eqx
import jax
from bokeh.document import Document

from figures.explorer import prediction as page_of
from figures.explorer.prediction import TAUS, Tabulated, doubts, prediction_page, read_prediction, tabulated
from figures.explorer.script import script
from figures.explorer.upload import UploadView
from linfit import predict
from tests.explorer_browser import network

pytestmark = pytest.mark.skipif(not jax.config.jax_enable_x64, reason="the explorer runs in double precision")


@pytest.fixture(scope="module")
def predictions():
    return {loss: predict(*network(loss), loss=loss) for loss in ("squared", "entropy")}


def content(file):
    return base64.b64encode(file.read_bytes()).decode()


@pytest.fixture
def bundle(predictions, tmp_path):
    """Name and content of a file with the prediction of a loss."""

    def saved(loss):
        predictions[loss].save(tmp_path / f"{loss}.npz")
        return f"{loss}.npz", content(tmp_path / f"{loss}.npz")

    return saved


@pytest.mark.parametrize(
    ("loss", "family"), [("squared", "ridge"), ("squared", "early stopping"), ("entropy", "early stopping")]
)
def test_every_number_is_that_of_the_prediction(loss, family, predictions, bundle):
    page, prediction = read_prediction(*bundle(loss)), predictions[loss]
    name, kind = page_of.FAMILIES[family].name, page_of.FAMILIES[family].filter
    value = page.data.families[family].values[17]
    at = page.defaults() | {name: value, "tau": 0.64} | ({"family": family} if loss == "squared" else {})
    tables, filter = page.compute(at), kind(value)
    for domain, column in (("test", "task"), ("other", "other")):
        expected = [prediction.losses(filter, tau, domain).mean() for tau in TAUS[::20]]
        np.testing.assert_allclose(tables["tau"][column][::20], expected, rtol=1e-6)
        np.testing.assert_allclose(tables["now"][column][0], prediction.losses(filter, 0.64, domain).mean(), rtol=1e-6)
    best = np.clip(float(prediction.best_tau(filter)), 0, 2)
    np.testing.assert_allclose(tables["best"]["tau"][0], best, atol=1e-9 if loss == "squared" else 2e-3)
    least = float(prediction.losses(filter, best).mean())
    np.testing.assert_allclose(tables["best"]["task"][0], least, rtol=1e-5)
    start, once = (float(prediction.losses(filter, tau, "other").mean()) for tau in (0.0, 1.0))
    np.testing.assert_allclose(tables["once"]["forgetting"][0], once - start, rtol=1e-5, atol=1e-9)
    for plot in page.plots:
        for item in plot.items:
            assert tables[item.table][item.x].shape == tables[item.table][item.y].shape
    for reading in page.readings:
        assert np.isfinite(tables[reading.table][reading.column][0])


def test_without_other_data_nothing_is_said_about_it(predictions):
    prediction = predictions["squared"]
    alone = eqx.tree_at(lambda it: (it.other, it.diagnostics), prediction, (None, {}))
    data = tabulated(alone)
    page = prediction_page("x.npz", data)
    assert not any("forgetting" in reading.label for reading in page.readings)
    assert [plot.name for plot in page.plots] == ["tau", "penalty", "time"]
    assert not any("other" in item.y for plot in page.plots for item in plot.items)
    assert "Not checked against the network" in page.introduction
    np.testing.assert_allclose(data.families["ridge"].task, tabulated(prediction).families["ridge"].task, rtol=1e-8)


def test_the_page_warns_where_the_network_is_not_linear():
    assert doubts({"curvature_test": 0.1, "curvature_other": 0.14}) == ""
    assert "curvature other 0.9" in doubts({"curvature_test": 0.1, "curvature_other": 0.9})
    assert "curvature test nan" in doubts({"curvature_test": float("nan")})
    page = prediction_page("<b>.npz", Tabulated("squared", tabulated_families(), {"curvature_test": 4.0}, False))
    assert "class='warning'" in page.introduction
    assert "<b><b>" not in page.introduction


def tabulated_families():
    values, losses = np.array([1.0, 2.0]), (TAUS - 0.5) ** 2 + np.ones((2, 1))
    return {"early stopping": page_of.Grid(values, losses, losses * np.nan)}


def test_the_best_tau_of_parabolas_is_exact_and_stays_in_range():
    centres = np.array([-1.0, 0.0, 0.003, 0.777, 1.995, 2.0, 5.0])
    task = (TAUS - centres[:, None]) ** 2 + 1
    found = page_of.Grid(centres, task, 3 * TAUS**2 * np.ones((7, 1))).at_best_tau()
    inside = np.clip(centres, 0, 2)
    np.testing.assert_allclose(found["tau"], inside, atol=1e-12)
    np.testing.assert_allclose(found["task"], (inside - centres) ** 2 + 1, atol=1e-12)
    np.testing.assert_allclose(found["other"], 3 * inside**2, atol=1e-12)
    flat = page_of.Grid(centres[:1], np.ones((1, TAUS.size)), np.ones((1, TAUS.size))).at_best_tau()
    assert np.isfinite(flat["tau"]).all()


@pytest.mark.parametrize("loss", ["squared", "entropy"])
def test_the_script_gives_the_same_numbers(loss, bundle, tmp_path, monkeypatch):
    page = read_prediction(*bundle(loss))
    parameters = page.defaults() | {"tau": 0.5}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copied.py").write_text(script(page, parameters), encoding="utf-8")
    found, tables = runpy.run_path("copied.py")["tables"], page.compute(parameters)
    for table, columns in tables.items():
        np.testing.assert_equal(found[table], columns)


def archive(**arrays):
    data = io.BytesIO()
    np.savez(data, **arrays)
    return base64.b64encode(data.getvalue()).decode()


def changed(text, **arrays):
    """A bundle with some arrays replaced, or without those that are None."""
    with np.load(io.BytesIO(base64.b64decode(text))) as file:
        kept = {name: file[name] for name in file.files} | {k.replace("__", "/"): v for k, v in arrays.items()}
    return archive(**{name: array for name, array in kept.items() if array is not None})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: "!!!", "must be an .npz"),
        (lambda _: base64.b64encode(b"not a zip").decode(), "must be an .npz"),
        (lambda _: archive(X=np.ones((3, 2)), y=np.ones(3), theta_1=np.ones(2)), "must be a saved prediction"),
        (lambda _: archive(format=np.array([{}])), "saved prediction"),
        (lambda text: changed(text, format=np.array("linfit prediction 9")), "must be a saved prediction"),
        (lambda text: changed(text, loss=np.array("hinge")), "loss must be one of squared, entropy"),
        (lambda text: changed(text, test__basis=np.ones((2, 3))), "test/basis must have shape"),
        (lambda text: changed(text, coefficients=None), "coefficients"),
        (lambda text: changed(text, eigenvalues=np.full(3, np.nan)), "eigenvalues"),
        (lambda text: text[: len(text) // 8 * 4], "must be an .npz"),
    ],
)
def test_bad_files_are_answered_with_one_line(damage, message, bundle):
    name, text = bundle("squared")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_prediction("dir/<b>mine.npz", damage(text))
    assert "\n" not in str(error.value)
    assert "/tmp" not in str(error.value)
    assert name.endswith(".npz")


def test_nothing_to_learn_is_an_error(bundle):
    _, text = bundle("squared")
    with np.load(io.BytesIO(base64.b64decode(text))) as file:
        zeros = np.zeros_like(file["eigenvalues"])
    with pytest.raises(ValueError, match="eigenvalues must be positive somewhere"):
        read_prediction("x.npz", changed(text, eigenvalues=zeros))


def test_too_large_a_file_is_refused(monkeypatch, bundle):
    monkeypatch.setattr(page_of, "LIMIT", 2**10)
    with pytest.raises(ValueError, match="must be at most 0 MB"):
        read_prediction(*bundle("squared"))


def test_a_rejected_file_keeps_neither_message_nor_curves(predictions):
    view = UploadView(Document(), page_of.UPLOAD, lambda: None)
    page = prediction_page("mine.npz", tabulated(predictions["squared"]))
    view._wanted = first = ("mine.npz", "content")
    view._show(first, page)
    assert not view._message.visible
    shown = view._box.children[0]
    view._given("something else")
    assert view._box.children[0] is not shown
    assert "reading" in view._message.text
    view._show(first, page)  # comes too late
    assert view._box.children[0] is not shown
    assert "reading" in view._message.text
    view._wanted = second = ("bad.npz", "something else")
    view._fail(second, ValueError("no <b>"))
    assert "no &lt;b&gt;" in view._message.text
    view._fail(first, ValueError("too late"))
    assert "too late" not in view._message.text
    view._show(("mine.npz", "content"), page)
    assert view._message.visible
