"""Real fine-tunings beside their predictions: the table can be trusted, resumed, and catches a wrong prediction."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from figures.commands.validate import validate
from figures.predict import _caption, _draw, pictures, tables
from linfit.tangent.prediction import TRUSTED_CURVATURE
from sims.laboratory import predictions
from sims.laboratory.failures import CANDIDATES, FAILURES, Rule, calibrate, language_rows, table
from sims.laboratory.predictions import FULL, QUICK, Plan, Setting, finetune, run_table, settings
from sims.laboratory.small_networks import ARCHITECTURES, network, pretrain, task

TINY = Plan(("perceptron",), ("weak",), ((1.0, 60),), 300, 20, 40, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def rows(folder):
    return run_table(folder, settings(TINY, (3, 4)), TINY)


@pytest.fixture(scope="module")
def known():
    """A pretrained network and what is predicted for it."""
    return predictions._pretrained(("perceptron", "weak", "squared", 3), TINY)


def _missed(found):
    """Error of the predicted task loss at τ = 1, relative to how much the run moves it."""
    real, ours = found["measured"], found["predicted"]
    return abs(ours["loss_at_1"] - real["loss_at_1"]) / abs(real["loss_at_1"] - real["loss_at_0"])


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_the_lazier_a_run_the_more_exact_its_prediction(known, noise):
    errors = []
    for rate in (1e-1, 1e-3):
        found = finetune(*known, Setting("perceptron", "weak", "squared", 3, noise, rate, 60), TINY)
        errors.append(_missed(found))
    assert errors[1] < 3e-3
    assert errors[1] < errors[0] or errors[0] < 3e-3


def test_a_shuffled_kernel_is_caught(known):
    params, prediction = known
    setting = Setting("perceptron", "weak", "squared", 3, 0.2, 0.5, 60)
    order = np.random.default_rng(0).permutation(len(prediction.test.labels))
    shuffled = dataclasses.replace(prediction.test, basis=prediction.test.basis[order])
    wrong = dataclasses.replace(prediction, test=shuffled)

    assert _missed(finetune(params, prediction, setting, TINY)) < 0.05
    assert _missed(finetune(params, wrong, setting, TINY)) > 0.3


def test_the_table_goes_on_where_it_stopped(rows, folder, monkeypatch):
    wanted = settings(TINY, (3, 4))

    def refuse(*_, **__):
        raise AssertionError("made again")

    told = []
    monkeypatch.setattr(predictions, "_pretrained", refuse)
    assert run_table(folder, wanted, TINY, lambda *done: told.append(done)) == rows
    assert told[-1] == (len(wanted), len(wanted))
    with pytest.raises(AssertionError, match="made again"):  # rows of other sizes are not those asked for
        run_table(folder, wanted, TINY._replace(train=21))
    files = sorted(folder.glob("*.json"))
    assert len(files) == len(wanted)
    broken = files[0].read_text()
    files[0].write_text(broken[: len(broken) // 2])
    with pytest.raises(AssertionError, match="made again"):
        run_table(folder, wanted, TINY)
    files[0].write_text(broken)


def test_a_row_made_again_is_the_same(rows, tmp_path):
    again = run_table(tmp_path, settings(TINY, (3, 4))[:1], TINY)
    assert json.dumps(again[0]) == json.dumps(rows[0])


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_the_plan_meets_every_noise_and_rate(plan):
    found = settings(plan, (0, 1))
    assert len(set(found)) == len(found)
    if plan is FULL:
        assert {(s.noise, s.rate, s.loss) for s in found} >= {
            (noise, rate, loss) for noise in (0, 0.2, 0.4) for rate, _ in plan.runs for loss in ("squared", "entropy")
        }


def test_no_digit_is_in_two_places():
    data = task("perceptron", "strong", 0.3, 5, pretrain=400, train=50, test=100)
    upright = [data.pretrain[0], data.other[0]]
    turned = [np.transpose(part[0], (0, 2, 1)) for part in (data.train, data.test)]
    images = np.concatenate([np.asarray(part).reshape(len(part), -1) for part in [*upright, *turned]])
    assert len(np.unique(images, axis=0)) == len(images)


@pytest.mark.parametrize("shift", ["weak", "medium", "strong"])
def test_few_windows_of_text_are_in_two_places(shift):
    data = task("transformer", shift, 0.0, 1, pretrain=2000, train=100, test=200)
    train, test = ({tuple(row) for row in np.asarray(part[0])} for part in (data.train, data.test))
    assert len(train & test) <= 0.03 * len(test)


@pytest.mark.parametrize("architecture", ["perceptron", "transformer"])
def test_only_training_labels_are_wrong_and_so_many(architecture):
    sizes = {"pretrain": 300, "train": 200, "test": 50}
    right, noisy = (task(architecture, "weak", noise, 2, **sizes) for noise in (0.0, 0.4))
    for name in ("pretrain", "other", "test"):
        assert all((a == b).all() for a, b in zip(getattr(right, name), getattr(noisy, name)))
    assert (right.train[0] == noisy.train[0]).all()
    share = float((right.train[1].argmax(1) != noisy.train[1].argmax(1)).mean())
    assert abs(share - 0.4) < 5 * (0.24 / 200) ** 0.5


def test_pretraining_is_deterministic_and_learns():
    net = network("perceptron")
    data = task("perceptron", "weak", 0.0, 1, pretrain=300, train=20, test=100)
    a, b = (pretrain(net, data.pretrain, "squared", 60, 1) for _ in range(2))
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    assert (net.apply(a, data.other[0]).argmax(1) == data.other[1].argmax(1)).mean() > 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_networks_treat_each_sample_on_its_own(architecture):
    net = network(architecture)
    data = task(architecture, "weak", 0.0, 1, pretrain=30, train=5, test=5)
    params = net.initial(jax.random.key(0))
    together = jax.jit(net.apply)(params, data.train[0])
    alone = jax.jit(jax.vmap(lambda x: net.apply(params, x[None])[0]))(data.train[0])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_bad_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="architecture must be one of perceptron"):
        network("lstm")
    with pytest.raises(ValueError, match="shift must be one of weak"):
        task("perceptron", "huge", 0.0, 0, pretrain=10, train=5, test=5)
    with pytest.raises(ValueError, match="at most 1797 digits, got 2010"):
        task("perceptron", "weak", 0.0, 0, pretrain=2000, train=0, test=5)
    with pytest.raises(ValueError, match="at least one fine-tuning"):
        table([])


def test_the_rule_parts_right_from_wrong(rows):
    data = table([*rows, *rows]).assign(gap_test=("run", np.arange(1.0, 9.0)))
    right = data.assign(tau_error=("run", np.zeros(8)))
    planted = data.assign(tau_error=("run", [0, 0.1, -0.1, 0, 0, -0.3, 0.1, 0.5]))
    shuffled = planted.isel(run=np.random.default_rng(0).permutation(8))
    for given in (planted, shuffled):
        rule = calibrate(given, "gap_test")
        assert rule.trusted(planted).values.tolist() == [True] * 5 + [False] * 3
    assert calibrate(planted, "gap_test", FAILURES["best_tau"]._replace(allowed=0.2)).limit == pytest.approx(56**0.5)
    assert calibrate(right, "gap_test") == Rule("gap_test", 8.0)
    diverged = data.assign(tau_error=("run", [np.nan, *[0.0] * 7]))  # a run without a number is a failure
    assert not calibrate(diverged, "gap_test").trusted(planted).any()
    unknown = right.assign(gap_test=("run", [np.nan] * 8))
    assert calibrate(unknown, "gap_test") == Rule("gap_test", 0.0)
    assert not Rule("gap_test", 1.0).trusted(unknown).any()


def test_a_prediction_says_whether_it_is_to_be_trusted(known):
    _, prediction = known
    small, large, unknown = TRUSTED_CURVATURE, 1.01 * TRUSTED_CURVATURE, np.nan
    for test, other, answer in (
        (small, small, True),
        (small, large, False),
        (large, small, False),
        (small, unknown, False),
    ):
        diagnostics = prediction.diagnostics | {"curvature_test": test, "curvature_other": other}
        assert dataclasses.replace(prediction, diagnostics=diagnostics).trusted is answer
    assert dataclasses.replace(prediction, diagnostics={"curvature_test": small}).trusted  # no other task was given
    assert not dataclasses.replace(prediction, diagnostics={}).trusted


def test_rows_of_language_models_are_read_if_they_are_there(rows, tmp_path):
    assert language_rows(tmp_path / "missing") == []
    row = {
        "setting": {"architecture": "language model", "rate": 1e-4, "epochs": 2},
        "measured": {"best_tau": 0.5, "forgetting": 0.2},
        "predicted": {"best_tau": 0.6, "forgetting": 0.1},
    }
    (tmp_path / "a.json").write_text(json.dumps(row))
    (tmp_path / "b.json").write_text("[1, 2")
    (tmp_path / "c.json").write_text("{}")
    data = table([*rows, *language_rows(tmp_path)])
    assert data.sizes["run"] == len(rows) + 1
    assert float(data.tau_error[-1]) == pytest.approx(0.1)
    assert float(data.forgetting_error[-1]) == pytest.approx(-0.5)
    assert np.isnan(data.gap_test[-1])


def test_the_figure_is_drawn_from_kept_rows(rows, folder, monkeypatch):
    monkeypatch.setattr("figures.predict.QUICK", TINY)
    (folder / "language").mkdir()
    row = {"setting": {"architecture": "language model"}, "measured": {"best_tau": 0.5}, "predicted": {"best_tau": 0.6}}
    (folder / "language" / "a.json").write_text(json.dumps(row))
    (picture,) = pictures(jax.random.key(3), True, folder)
    figure = _draw(picture.data)
    assert len(figure.axes) == 6
    assert "5 real fine-tunings (perceptron 4, language model 1)" in _caption(picture.data)
    text = tables(picture.data)
    assert all(f"`{name}`" in text for name in CANDIDATES)
    assert text.count("\n| perceptron |") == 4 + 1  # every run, and one line of the errors by group


def test_the_command_writes_everything_and_uses_kept_rows(rows, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("figures.predict.QUICK", TINY)
    monkeypatch.setattr(predictions, "_pretrained", int)  # nothing is to be made again
    shutil.copytree(folder, tmp_path / "predict")
    validate(tmp_path, quick=True, seed=3)
    assert {path.name for path in tmp_path.iterdir()} >= {"predict.png", "predict.pdf", "predict.nc", "predict.md"}
    assert "real fine-tunings (perceptron 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--seed must be between 0"):
        validate(tmp_path, quick=True, seed=-1)
