"""The page of stages and runs, against the theory called plainly, samples, and what its buttons do."""

import numpy as np
import pytest

pytest.importorskip("bokeh")

import jax
import jax.numpy as jnp
from bokeh.document import Document

from figures.explorer import stages
from figures.explorer.stages import MOST, PAGE, TASKS, TAUS
from figures.explorer.tables import average
from figures.explorer.view import PageView
from linfit import Ridge, spectra
from theory.merges import Run, form, soup
from theory.movement import movement
from theory.pipelines import Stage, risks

pytestmark = pytest.mark.skipif(not jax.config.jax_enable_x64, reason="the explorer runs in double precision")


@pytest.fixture
def moved(generator):
    """Values away from the first screen, two tasks twice."""
    values = PAGE.defaults() | {"stages": 4, "runs": 3, "goal": "C"}
    values |= {"similarity": round(generator.uniform(0.1, 0.9), 2), "decay": round(generator.uniform(0.2, 1.5), 2)}
    for member, task in enumerate(("B", "A", "B", "C"), 1):
        values |= {f"stage{member}_task": task, f"stage{member}_n": int(generator.integers(40, 300))}
        values |= {f"stage{member}_tau": round(generator.uniform(0.2, 1.2), 2)}
    for member, task in enumerate(("C", "A", "C"), 1):
        values |= {f"run{member}_task": task, f"run{member}_weight": round(generator.uniform(-0.2, 0.8), 2)}
    return values


def optima_of(values):
    """Spectrum and E θ*_aθ*_b."""
    spectrum = np.asarray(spectra.power_law(stages.P, values["decay"]))
    correlation = values["similarity"] + (1 - values["similarity"]) * np.eye(3)
    return spectrum, correlation[:, :, None] * np.ones(stages.P) / spectrum.sum()


def test_stages_are_those_of_the_theory(moved):
    spectrum, optima = optima_of(moved)
    tables, tests = PAGE.compute(moved), np.tile(spectrum, (3, 1))

    def plainly(tau):
        pipeline = []
        for k in range(1, 5):
            task, n, sigma, penalty = (moved[f"stage{k}_{name}"] for name in ("task", "n", "noise_std", "penalty"))
            pipeline.append(Stage(spectrum, n, sigma, Ridge(penalty), tau(k), task=TASKS.index(task)))
        return np.asarray(risks(pipeline, optima, tests))

    expected, unaveraged = plainly(lambda k: moved[f"stage{k}_tau"]), plainly(lambda k: 1.0)
    for index, task in enumerate(TASKS):
        found = tables["stages"][task]
        np.testing.assert_allclose(found, [1, *expected[:, index]], rtol=1e-9)
        np.testing.assert_allclose(tables["stages"][f"{task}_unaveraged"][1:], unaveraged[:, index], rtol=1e-9)
        assert abs(found[1:] / unaveraged[:, index] - 1).max() > 1e-3
    forgotten = expected[-1, 0] - expected[0, 0]
    np.testing.assert_allclose(tables["after"]["forgetting_A"][0], forgotten, rtol=1e-8, atol=1e-12)


def test_merges_are_those_of_the_theory(moved):
    """Their start from the movement of the first stage, in closed form."""
    spectrum, optima = optima_of(moved)
    tau, sigma, n = (moved[f"stage1_{name}"] for name in ("tau", "noise_std", "n"))
    first = movement(Ridge(moved["stage1_penalty"]), jnp.asarray(spectrum), n)
    f, noise = tau * first.fraction, tau**2 * first.variance(optima[1, 1], sigma)
    with_start = f * optima[:, 1]  # E θ*_aθ₁; the first stage trains on B
    gaps = optima - with_start[:, None] - with_start[None] + f**2 * optima[1, 1] + noise
    filter = Ridge(moved["runs_penalty"])
    runs = [
        Run(TASKS.index(moved[f"run{k}_task"]), spectrum, moved["runs_n"], moved["runs_noise_std"], filter)
        for k in (1, 2, 3)
    ]
    tables, weights = PAGE.compute(moved), np.array([moved[f"run{k}_weight"] for k in (1, 2, 3)])
    for index, task in enumerate(TASKS):
        expected = form(runs, gaps, spectrum, index)
        np.testing.assert_allclose(tables["merge"][task], expected(TAUS[:, None] * weights), rtol=1e-8)
    goal, law = form(runs, gaps, spectrum, 2), soup(runs[0], gaps, spectrum, 2)
    np.testing.assert_allclose(tables["weights"]["best"], goal.optimal_weights(), rtol=1e-6)
    np.testing.assert_allclose(tables["best_weights"]["goal"][0], goal.optimal_risk(), rtol=1e-8)
    np.testing.assert_allclose(tables["soup"]["once"], law(stages.COUNTS), rtol=1e-8)
    np.testing.assert_allclose(tables["soup"]["best"], law.optimal_risk(stages.COUNTS), rtol=1e-8)
    np.testing.assert_array_equal(tables["best_tau"]["goal"] <= tables["merge"]["goal"] + 1e-12, True)


def test_runs_start_from_where_they_are_told(moved):
    tables = PAGE.compute(moved | {"start": "last stage", "goal": "B"})
    assert tables["start"]["goal"][0] == pytest.approx(tables["stages"]["B"][-1], rel=1e-9)
    assert tables["merge"]["B"][0] == pytest.approx(tables["stages"]["B"][-1], rel=1e-9)


def test_what_is_not_there_changes_nothing_and_is_not_in_the_link(moved):
    absent = {"stage5_n": 20, "stage5_tau": 1.3, "stage6_task": "A", "run4_task": "B", "run6_weight": 1.5}
    for table, columns in PAGE.compute(moved).items():
        np.testing.assert_equal(PAGE.compute(moved | absent)[table], columns)
    shown = PAGE.shown(moved | absent)
    assert not set(absent) & set(shown)
    assert {"stage4_n", "run3_weight", "stages"} <= set(shown)


def test_new_values_never_compile(moved, monkeypatch):
    PAGE.compute(moved)

    def compiled_again(*_):
        raise AssertionError

    monkeypatch.setattr(stages, "_merges", compiled_again)
    for other in ({"stages": 1}, {"runs": MOST, "run2_task": "B"}, {"goal": "all tasks"}, {"start": "last stage"}):
        PAGE.compute(moved | other)
    PAGE.compute(PAGE.defaults() | PAGE.suggestions["Six runs on one task: a soup"])


@pytest.mark.slow
def test_samples_agree_with_the_curves():
    values = PAGE.defaults() | {"runs": 3}
    tables = PAGE.compute(values)
    simulated = average([PAGE.replicate(index, values) for index in range(6)], PAGE.overlay.axes)
    for task in TASKS:
        curves = {task: tables["stages"][task][1:], f"{task} merged": tables["merge"][task][::8]}
        for column, expected in curves.items():
            gap, error = abs(simulated[column] - expected), simulated[f"{column}_error"]
            assert (gap < 6 * error + 0.01 * expected.max()).all(), column


@pytest.fixture
def view():
    return PageView(Document(), PAGE, lambda: None)


def visible(view):
    return {group.noun: [box.visible for box in boxes].count(True) for group, boxes in view._members.items()}


def test_buttons_add_and_remove_members(view):
    stage, run = PAGE.groups
    assert visible(view) == {"stage": 3, "run": 2}
    view._add(stage)
    view._set({"stage2_n": 50, "stage3_n": 60, "stage4_n": 70, "stage4_task": "B"})
    view._remove(stage, 2)
    assert [view.values[f"stage{k}_n"] for k in (1, 2, 3)] == [300, 60, 70]
    assert view.values["stage3_task"] == "B"
    assert visible(view) == {"stage": 3, "run": 2}
    for _ in range(MOST + 2):
        view._add(run)
    assert visible(view)["run"] == MOST
    for _ in range(MOST + 2):
        view._remove(run, 1)
    assert visible(view)["run"] == 1


def test_a_link_carries_stages_and_runs(view):
    view._set({"stages": 5, "stage5_tau": 0.4, "run2_weight": 0.9, "runs": 1})
    other = PageView(Document(), PAGE, lambda: None)
    assert other.restore(view.state()) == []
    assert other.state() == view.state()
    assert visible(other) == {"stage": 5, "run": 1}
    assert "run2_weight" not in view.state()
    assert other.restore({"stages": "9"}) == ["stages must be between 1 and 6, got 9"]
