"""The command as a user meets it: in a process of its own."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from figures.commands import report
from figures.selection import report_selection
from figures.style import Picture, canvas
from linfit import leave_one_out, select
from linfit.internal.files import whole_file

LINFIT = [str(Path(sys.executable).with_name("linfit"))]


def run(*arguments, **options):
    return subprocess.run([*LINFIT, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def test_help_is_quick_and_does_not_import_jax():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        answer = run("--help")
        seconds.append(time.perf_counter() - start)
    assert answer.returncode == 0
    assert {"figures", "select"} <= set(answer.stdout.split())
    if not os.environ.get("CI"):  # a statement about this project's imports, not about a busy machine
        assert min(seconds) < 1.0
    script = """
import sys, figures.commands
sys.argv = ["linfit", "--help"]
try:
    figures.commands.main()
except SystemExit:
    print([name for name in ("jax", "numpy", "matplotlib", "xarray") if name in sys.modules])
"""
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip().endswith("[]")


def test_version():
    assert run("--version").stdout == f"linfit {version('linfit')}\n"


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    X = generator.standard_normal((30, 60))
    y = X @ generator.standard_normal(60) / 8 + generator.standard_normal(30)
    return {"X": X, "y": y, "theta_1": np.zeros(60)}, tmp_path / "data.npz"


@pytest.mark.slow
def test_select_prints_a_table_and_draws(data):
    arrays, file = data
    np.savez(file, **arrays)
    answer = run("select", file)
    assert answer.returncode == 0, answer.stderr
    assert "ensemble coefficient τ" in answer.stdout
    assert file.with_suffix(".select.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_select_json_equals_the_library(data):
    arrays, file = data
    generator = np.random.default_rng(1)
    X_val = generator.standard_normal((20, 60))
    np.savez(file, **arrays, X_val=X_val, y_val=generator.standard_normal(20))
    answer = run("select", file, "--json", "--out", file.with_suffix(".pdf"))
    result = json.loads(answer.stdout)
    expected = select(arrays["X"], arrays["y"], arrays["theta_1"])
    found = result["leave-one-out"]
    np.testing.assert_allclose(found["tau"], expected.best_tau, rtol=1e-8)
    residual = leave_one_out(arrays["X"], arrays["y"], arrays["theta_1"], found["penalty"], found["tau"])
    np.testing.assert_allclose(found["mean_squared_error"], np.mean(residual**2), rtol=1e-8)
    assert result["validation"]["mean_squared_error"] > 0
    assert file.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


BAD_FILES = {
    "missing array": (lambda a: {k: v for k, v in a.items() if k != "y"}, "y missing"),
    "mismatched rows": (lambda a: a | {"y": a["y"][:-1]}, "y must match"),
    "mismatched columns": (lambda a: a | {"theta_1": np.zeros(59)}, "theta_1 must have shape"),
    "nan": (lambda a: a | {"X": np.full((30, 60), np.nan)}, "X must be finite"),
    "text": (lambda a: a | {"y": np.array(["a"] * 30)}, "y"),
    "objects": (lambda a: a | {"y": np.array([{}] * 30)}, "npz of plain numeric arrays"),
    "two outputs": (lambda a: a | {"y": np.zeros((30, 2)), "theta_1": np.zeros((60, 2))}, "y must be"),
    "half a validation set": (lambda a: a | {"X_val": a["X"]}, "both X_val and y_val"),
    "one row": (lambda a: a | {"X": a["X"][:1], "y": a["y"][:1]}, "at least 2 rows"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_select_refuses_bad_files(data, name):
    arrays, file = data
    change, message = BAD_FILES[name]
    np.savez(file, **change(arrays))
    with pytest.raises(ValueError, match=message):
        report_selection(file, None, False)
    assert list(file.parent.iterdir()) == [file]


def test_select_refuses_what_is_not_an_npz(tmp_path):
    file = tmp_path / "data.npz"
    with pytest.raises(ValueError, match="does not exist"):
        report_selection(file, None, False)
    file.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="npz of plain numeric arrays"):
        report_selection(file, None, False)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(ValueError, match="npz"):
        report_selection(tmp_path / "plain.npy", None, False)
    with pytest.raises(ValueError, match="--out must end in"):
        report_selection(file, tmp_path / "picture.txt", False)


def test_errors_are_one_line_with_exit_code_two(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("figures", "nothing"), "names must be among"),
        (("figures", "--out", tmp_path / "file" / "below"), "cannot write"),
        (("figures", "--seed", "-1"), "--seed"),
        (("select", tmp_path / "none.npz"), "does not exist"),
    ):
        answer = run(*arguments)
        assert answer.returncode == 2, arguments
        assert answer.stderr.startswith("linfit: error: ")
        assert message in answer.stderr
        assert answer.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_figures_are_written_with_their_numbers_and_a_report(tmp_path, monkeypatch):
    """A module of two pictures; `.ci/run` draws the real ones."""

    def draw(data):
        figure, axes = canvas(1)
        axes[0].plot(data.x, data.y)
        return figure

    def caption(data):
        return f"{data.y.size} points: bars ± one standard error & <all>; {data.size}"

    def pictures(key, quick):
        for name in ("first", "second"):
            settings = {"size": "quick" if quick else "full", "seed": 2**32 - 1}
            data = xr.Dataset({"y": ("x", [0.0, 1.0])}, {"x": [0.0, 1.0]}, settings)
            yield Picture(name, f"The {name}", data, draw, caption)

    monkeypatch.setitem(sys.modules, "toy_figures", SimpleNamespace(pictures=pictures))
    monkeypatch.setattr(report, "FIGURES", {"toy": "toy_figures"})
    report.figures(("toy",), out=tmp_path, quick=True)
    endings = ("png", "pdf", "nc")
    written = {f"{name}.{ending}" for name in ("first", "second") for ending in endings} | {"index.html"}
    assert {path.name for path in tmp_path.iterdir()} == written
    for name in ("first", "second"):
        assert (tmp_path / f"{name}.pdf").stat().st_size > 5000
        with xr.open_dataset(tmp_path / f"{name}.nc") as numbers:
            assert numbers.attrs["caption"] == caption(numbers) == "2 points: bars ± one standard error & <all>; quick"
            assert draw(numbers).axes[0].lines  # NAME.nc is enough to draw it again
            assert numbers.y.values.tolist() == [0, 1]
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert "&amp; &lt;all&gt;" in page
    assert "linfit figures toy --quick --seed 0" in page


def test_a_failing_write_leaves_nothing_behind(tmp_path):
    path = tmp_path / "numbers.nc"
    path.write_text("old")

    def fail():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
