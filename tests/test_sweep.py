"""Sweeps: what is asked for, what the kernels are called with, and that nothing but the seed decides the numbers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from figures.commands import main
from linfit import (
    aligned_problem,
    excess_risks,
    fine_tune,
    flow_weights,
    interpolate,
    risk_forms,
    sample_design,
    spectra,
)
from linfit.filters import GradientFlow, Ridge
from linfit.weighting import median_temperature
from sims.flow import sample_deviating_task
from sims.parameters import Parameter
from sims.sweep import read, run, sweep_over
from sims.sweep.axes import read_axis
from sims.sweep.experiments import EXPERIMENTS, find_experiment
from sims.sweep.plan import Task, sweep_from_configuration, sweep_from_toml
from sims.sweep.task import measure, replicate_key
from tests.sweep_toys import NOISE, numbers
from theory.overtraining import singular_values
from theory.s3ft import Procedure, shares

ROOT = Path(__file__).parents[1]
AXES = {"level": [1.0, 2.0, 3.5], "tau": "0:1:5"}
NUMBER, WHOLE, WORD = Parameter("a number", 1.0), Parameter("a count", 3), Parameter("a word", "plain")


def test_axes():
    np.testing.assert_array_equal(read_axis("a", "0:1:101", NUMBER), np.linspace(0, 1, 101))
    np.testing.assert_allclose(read_axis("a", "1e-4:1e2:60:log", NUMBER), np.logspace(-4, 2, 60), rtol=1e-14)
    np.testing.assert_array_equal(read_axis("a", "0.1,0.5,1", NUMBER), [0.1, 0.5, 1])
    np.testing.assert_array_equal(read_axis("a", "10:1000:4:log", WHOLE), [10, 46, 215, 1000])
    np.testing.assert_array_equal(read_axis("a", "1:3:9", WHOLE), [1, 2, 3])  # coinciding ones are dropped
    assert read_axis("a", "1:3:9", WHOLE).dtype == np.int64
    assert (read_axis("a", 2, NUMBER).shape, read_axis("a", 2, NUMBER).dtype) == ((), np.float64)
    assert list(read_axis("a", "x, y", WORD)) == ["x", "y"]
    assert read_axis("a", "tcp://host:1", WORD).item() == "tcp://host:1"
    assert read_axis("a", "1e-4:1e2:sobol:log", NUMBER).logarithmic


@pytest.mark.parametrize(
    ("parameter", "message", "values"),
    [
        (NUMBER, "low:high:count", ("1:2", "1:2:3:4", "1:x:3", "1:2:2.5", "", "1,,2", True)),
        (NUMBER, "lower to its higher", ("2:1:5",)),
        (NUMBER, "positive", ("0:1:5:log",)),
        (NUMBER, "finite ends", ("0:inf:5",)),
        (NUMBER, "at least 2", ("0:1:1",)),
        (NUMBER, "finite", ("nan",)),
        (NUMBER, "one value or a list of values.* shape", ([], [[1.0, 2.0]])),
        (NUMBER, "twice", ("1,1",)),
        (WHOLE, "whole", ("1.5",)),
        (WORD, "twice", ("a,a",)),
        (WORD, "a word", (3, "")),
    ],
)
def test_bad_axes_are_refused(parameter, message, values):
    for value in values:
        with pytest.raises(ValueError, match=f"a must.*{message}"):
            read_axis("a", value, parameter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": {"lambda": 1}}, "no parameter lambda; its parameters are level"),
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": True}, "seeds must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be below"),
        ({"points": 8}, "points is the size of a Sobol design"),
        ({"axes": {"level": "0:1:sobol"}}, "power of two, got None"),
        ({"axes": {"level": "0:1:sobol"}, "points": 6}, "power of two, got 6"),
    ],
)
def test_bad_sweeps_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sweep_over(NOISE, **options)


def test_unknown_experiments_are_refused():
    for name, message in {
        "nothing": "one of overadaptation",
        "no.module:X": "cannot be imported: No module named 'no'",
        "no/file.py:X": "cannot be imported: .*No such file",
        "figures:X": "cannot be imported: .*has no attribute 'X'",
        "tests.sweep_toys:measure_noise": "is of type function",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_experiment(name)


OWN = """
import figures, linfit, theory  # packages have a path, files do not
from sims.parameters import Parameter
from sims.sweep import Experiment, Output

def measure(key, parameters):
    return {"packages": sum(len(package.__path__) for package in (figures, linfit, theory))}

OWN = Experiment("", "One of a user's own", measure, {"n": Parameter("n", 1)}, {"packages": Output((), "how many")})
"""


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """The folder of a user, with modules of the names of ours."""
    for name, content in (("own", OWN), ("theory", "raise ImportError"), ("figures", "raise ImportError")):
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_experiments_of_ones_own_are_found_by_path(at_home):
    before = sys.path[:]
    for name, kept in (("own:OWN", "own:OWN"), ("own.py:OWN", f"{at_home}/own.py:OWN")):
        sweep = sweep_over(name, seeds=1)
        assert sweep.configuration["experiment"] == kept
        assert sweep_from_configuration(sweep.configuration).experiment is not None
        assert measure(sweep, Task((), 0, 1)).samples["packages"] == 3
    assert find_experiment("own:OWN").measure is find_experiment("./own.py:OWN").measure
    (at_home / "lacking.py").write_text("import no_such_package")
    with pytest.raises(ValueError, match="'lacking:X' cannot be imported: No module named 'no_such_package'"):
        find_experiment("lacking:X")
    assert sys.path == before


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_command_loads_experiments_of_ones_own_by_path(at_home, workers):
    """Beside files that would shadow our packages if the current directory were searched, in this process or others."""
    (at_home / "own.toml").write_text('experiment = "own:OWN"\nstore = "own.zarr"\nseeds = 2')
    for arguments, tasks in ((("file", "own.toml", "--workers", workers), 1), (("resume", "own.zarr"), 0)):
        command = [Path(sys.executable).with_name("linfit"), "sweep", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert answer.stdout.startswith(f"{tasks} tasks"), answer.stderr
    np.testing.assert_array_equal(xr.open_zarr("own.zarr").packages, 3)


def test_tasks_cover_every_replicate_of_every_cell_once():
    sweep = sweep_over(NOISE, AXES | {"kind": ["a", "b"]}, seeds=7, chunk=3)
    assert sweep.task_dims == {"level": 3, "kind": 2}
    assert sweep.batched_dims == {"tau": 5}
    covered = [(task.cell, replicate) for task in sweep.tasks for replicate in range(task.first, task.last)]
    assert sorted(covered) == sorted((cell, r) for cell in np.ndindex(3, 2) for r in range(7))
    arguments = sweep.arguments((2, 1))
    assert (arguments["level"], arguments["kind"], arguments["count"]) == (3.5, "b", 3)
    assert type(arguments["count"]) is int
    np.testing.assert_array_equal(arguments["tau"], np.linspace(0, 1, 5))
    assert arguments["depth"].shape == (1,)


def test_sobol_design():
    design = {"level": "1e-2:1e2:sobol:log", "tau": "0:2:sobol"}
    sweep = sweep_over(NOISE, design | {"count": [1, 2], "depth": [0.0, 1.0]}, points=16)
    assert sweep.task_dims == {"point": 16, "count": 2}
    assert sweep.batched_dims == {"depth": 2}
    level, tau = sweep.parameters["level"], sweep.parameters["tau"]
    for position in ((np.log10(level) + 2) / 4, tau / 2):  # one point in every sixteenth, along either axis
        assert sorted(np.floor(16 * position).astype(int)) == list(range(16))
    arguments = sweep.arguments((5, 1))
    assert (arguments["level"], arguments["count"]) == (level[5], 2)
    np.testing.assert_array_equal(arguments["tau"], tau[5:6])
    assert sweep.output_dims("risk") == {}
    assert not np.array_equal(sweep_over(NOISE, design, points=16, seed=1).parameters["tau"], tau)


def test_toml(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        'experiment = "overadaptation"\nstore = "runs/oa.zarr"\nseeds = 20\nseed = 3\n'
        '[axes]\nn = 50\npenalty = "1e-2:1:3:log"\nnoise_std = [0.1, 0.5]\n'
    )
    sweep, store = sweep_from_toml(file)
    assert store == Path("runs/oa.zarr")
    axes = {"n": 50, "penalty": [0.01, 0.1, 1], "noise_std": [0.1, 0.5]}
    assert sweep.configuration == sweep_over("overadaptation", axes, seeds=20, seed=3).configuration
    for content, message in (
        ('experiment = "overadaptation"\nseed = 1\nworkers = 2', "nothing beyond experiment"),
        ("seeds = 3", "must have an experiment"),
        ("seeds = ", "not valid TOML"),
        ('experiment = "overadaptation"\nseeds = "3"', "seeds must be"),
        ('experiment = "overadaptation"\n[axes]\nnoise = 1', "no parameter noise; its parameters are .* noise_std"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            sweep_from_toml(file)
    with pytest.raises(ValueError, match="no file"):
        sweep_from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("axes", [AXES | {"kind": ["a", "b"]}, {"level": "1:2:sobol", "tau": "0:1:sobol"}])
def test_a_configuration_gives_the_sweep_back(axes):
    sweep = sweep_over(NOISE, axes, seeds=5, seed=2, points=4 if "sobol" in str(axes) else None)
    again = sweep_from_configuration(json.loads(json.dumps(sweep.configuration)))
    assert again.configuration == sweep.configuration
    assert again.tasks == sweep.tasks
    for name, values in sweep.parameters.items():
        assert again.parameters[name].dtype.kind == values.dtype.kind
        assert again.parameters[name].tobytes() == values.tobytes()


def test_samples_are_the_kernels_and_means_their_means(tmp_path, like_a_worker):
    sweep = sweep_over(NOISE, AXES, seeds=7, seed=5, chunk=3)
    outcome = run(sweep, tmp_path / "a.zarr")
    assert (outcome.tasks, outcome.left, outcome.failed, outcome.failures) == (9, 0, 0, [])
    data = read(tmp_path / "a.zarr")
    for cell, replicate in np.ndindex(3, 7):
        expected = NOISE.measure(np.random.SeedSequence([5, replicate]), sweep.arguments((cell,)))
        np.testing.assert_array_equal(data.risk_samples[cell, replicate], expected["risk"])
        np.testing.assert_array_equal(data.size_samples[cell, replicate], expected["size"])
    np.testing.assert_array_equal(data.replicates, 7)
    np.testing.assert_allclose(data.risk, data.risk_samples.mean("replicate"), rtol=1e-14)
    np.testing.assert_allclose(data.risk_error, data.risk_samples.std("replicate", ddof=1) / 7**0.5, rtol=1e-12)
    assert len(np.unique(data.size_samples)) == data.size_samples.size  # no two replicates alike


def test_neither_chunks_nor_order_nor_more_replicates_or_values_matter_but_the_seed(tmp_path, like_a_worker):
    def shuffled(sweep, tasks):
        for index in np.random.default_rng(0).permutation(len(tasks)):
            yield tasks[index], measure(sweep, tasks[index])

    run(sweep_over(NOISE, AXES, seeds=7, chunk=3), tmp_path / "a.zarr")
    for name, chunk, executor in (("one", 1, None), ("all", 100, None), ("shuffled", 3, shuffled)):
        run(sweep_over(NOISE, AXES, seeds=7, chunk=chunk), tmp_path / name, executor=executor)
        assert numbers(tmp_path / name) == numbers(tmp_path / "a.zarr"), name
    run(sweep_over(NOISE, AXES | {"level": [0.5, 2.0]}, seeds=12), tmp_path / "larger")
    run(sweep_over(NOISE, AXES, seeds=2, seed=1), tmp_path / "seed")
    data, larger, other = (read(tmp_path / name) for name in ("a.zarr", "larger", "seed"))
    both = [part.risk_samples.sel(level=2.0).isel(replicate=slice(7)).values for part in (data, larger)]
    np.testing.assert_array_equal(*both)
    assert not np.isin(data.size_samples, other.size_samples).any()


def test_a_failing_cell_is_recorded_and_the_rest_completes(tmp_path, like_a_worker):
    sweep = sweep_over(NOISE, AXES | {"broken": 2.0}, seeds=3, chunk=2)
    outcome = run(sweep, tmp_path / "a.zarr")
    assert (outcome.tasks, outcome.left, outcome.failed) == (6, 0, 3)
    assert {failure.message for failure in outcome.failures} == {"ValueError: level 2.0 is broken"}
    assert [failure.where for failure in outcome.failures] == [{"level": 2.0, "replicate": r} for r in range(3)]
    data = read(tmp_path / "a.zarr")
    np.testing.assert_array_equal(data.status, [[1] * 3, [2] * 3, [1] * 3])
    assert (data.message.sel(level=2.0) == "ValueError: level 2.0 is broken").all()
    assert (data.message.sel(level=[1.0, 3.5]) == "").all()
    np.testing.assert_array_equal(np.isnan(data.risk).all("tau"), [False, True, False])
    np.testing.assert_array_equal(data.replicates, [3, 0, 3])
    for retry, tasks in ((False, 0), (True, 2)):
        again = run(sweep, tmp_path / "a.zarr", resume=True, retry=retry)
        assert (again.tasks, again.failed) == (tasks, 3)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda key, p: {"risk": p["tau"]}, "gave no size, only risk"),
        (lambda key, p: {"risk": p["tau"][:2], "size": 1.0}, r"risk must have shape \(5,\), got \(2,\)"),
        (lambda key, p: {"risk": p["tau"] * np.nan, "size": 1.0}, "risk has 5 NaN among 5 values"),
        (lambda key, p: {"risk": p["tau"], "size": "many"}, "could not convert"),
    ],
)
def test_what_is_no_result_is_a_failure(kernel, message):
    result = measure(sweep_over(NOISE._replace(measure=kernel), {"tau": "0:1:5"}, seeds=2), Task((), 0, 2))
    for text in result.messages:
        assert re.search(message, text)
    assert np.isnan(result.samples["risk"]).all()


CASES = {
    "overadaptation": {"n": 12, "p": 40, "alignment": -0.5, "decay": 1.3, "noise_std": [0.2, 0.9],
                       "penalty": [0.01, 0.1, 1.0], "tau": [0.3, 1.0]},
    "equivalents": {"n": 60, "p": 240, "noise_std": [0.2, 0.7], "penalty": [0.01, 0.1], "tau": [0.5, 1.0]},
    "overtraining": {"size": 3, "step_size": 0.005, "finetune_steps": 10, "time": [10, 2, 5], "gamma": [0.1, 0.0]},
    "flow": {"n": 12, "p": 40, "noise_std": 0.9, "deviation": "outliers",
             "tilt": [0.0, 2.0], "time": [5.0, 50.0], "tau": [0.3, 1.0, 1.5]},
    "s3ft": {"n": 20, "p": 60, "penalty": [0.01, 0.1], "tolerance": [0.0, 1.0, 100.0],
             "paraphrase_success": [0.0, 0.5]},
    "pipeline": {"n": 12, "p": 40, "stages": 2, "anchor": "first", "penalty": [0.01, 0.1], "tau": [0.5, 1.0, 1.2]},
    "merge": {"n": 20, "p": 60, "runs": 2, "other_runs": 1, "tau": [0.5, 1.0, 1.5], "keep": [0.3, 1.0]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_and_repeats_itself(name):
    sweep = sweep_over(name, CASES[name], seeds=2)
    result, alone = measure(sweep, Task((), 0, 2)), measure(sweep, Task((), 1, 2))
    assert result.messages == ["", ""]
    for output in sweep.experiment.outputs:
        assert np.isfinite(result.samples[output]).all()
        np.testing.assert_array_equal(result.samples[output][1], alone.samples[output][0])
        alike = output.endswith("_predicted") or output in ("own", "paraphrase", "gold")
        assert alike or not np.array_equal(*result.samples[output])


def test_overadaptation_is_the_exact_risk_of_the_design():
    sweep = sweep_over("overadaptation", CASES["overadaptation"], seeds=2, seed=4)
    samples = measure(sweep, Task((), 1, 2)).samples
    key = jax.random.fold_in(jax.random.key(4), 1)
    assert (jax.random.key_data(replicate_key(sweep, 1)) == jax.random.key_data(key)).all()
    filter, tau = Ridge([0.01, 0.1, 1.0]), jnp.array([[0.3], [1.0]])
    for row, noise_std in enumerate((0.2, 0.9)):
        problem = aligned_problem(spectra.power_law(40, 1.3), alignment=-0.5, noise_std=noise_std, pretrain_risk=0.1)
        forms = risk_forms(sample_design(key, problem.finetune_covariance, 12), problem)
        risk, best = forms.finetune(filter, tau), forms.finetune.optimal_tau(filter)
        pretrain = forms.pretrain(filter, tau).total.T
        expected = {"finetune": risk.total.T, "finetune_bias": risk.bias.T, "best_tau": best, "pretrain": pretrain}
        for name, values in expected.items():
            np.testing.assert_allclose(samples[name][0, row], values, rtol=1e-12)


@pytest.mark.slow
def test_pipelines_predict_the_average():
    setting = CASES["pipeline"] | {"n": 40, "p": 120}
    samples = measure(sweep_over("pipeline", setting, seeds=8), Task((), 0, 8)).samples
    gap, error = samples["mean_gap"].mean(axis=0), samples["mean_gap"].std(axis=0, ddof=1) / 8**0.5
    assert (np.abs(gap) < 4 * error + 1 / 40).all()
    assert samples["first"] + samples["last"] == pytest.approx(2 * samples["mean"])
    assert len(np.unique(samples["mean_predicted"][0])) == 6


@pytest.mark.slow
def test_equivalents_predict_the_average():
    samples = measure(sweep_over("equivalents", CASES["equivalents"], seeds=8), Task((), 0, 8)).samples
    gap, error = samples["finetune_gap"].mean(axis=0), samples["finetune_gap"].std(axis=0, ddof=1) / 8**0.5
    assert (np.abs(gap) < 4 * error + 1 / 60).all()
    assert len(np.unique(samples["finetune_predicted"][0])) == 8  # a prediction for each point


@pytest.mark.slow
def test_overtraining_follows_the_closed_forms():
    samples = measure(sweep_over("overtraining", CASES["overtraining"], seeds=30), Task((), 0, 30)).samples
    a = jnp.arange(1.0, 4.0) ** -1
    s = singular_values(0.01, a, jnp.array([10.0, 2.0, 5.0]))
    np.testing.assert_allclose(samples["loss"][0], 0.5 * jnp.sum((s - a) ** 2, axis=-1), rtol=0.02, atol=1e-5)
    np.testing.assert_allclose(samples["perturbed"][:, 1], samples["loss"], rtol=1e-12)
    expected = 0.5 * (0.1**2 * 2 * 3 * s.sum(axis=-1) + 0.1**4 * 3**3)  # docs, N2
    rise = samples["perturbed"][:, 0] - samples["loss"]
    error = rise.std(axis=0, ddof=1) / 30**0.5
    assert (np.abs(rise.mean(axis=0) - expected) < 4 * error + 0.02 * expected).all()


@pytest.mark.slow
def test_merges_of_whole_runs_are_their_average_and_near_the_prediction():
    samples = measure(sweep_over("merge", CASES["merge"] | {"other_runs": 0}, seeds=60), Task((), 0, 60)).samples
    gap = samples["trimmed"][:, 1] - samples["averaged"]  # nothing trimmed: a sample of the exact risk
    assert (np.abs(gap.mean(axis=0)) < 4 * gap.std(axis=0, ddof=1) / 60**0.5).all()
    assert (samples["best"] <= samples["averaged"].min(axis=-1) + 1e-12).all()
    error = samples["averaged"].std(axis=0, ddof=1) / 60**0.5
    allowed = 4 * error + 0.05 * samples["averaged_predicted"][0]
    assert (np.abs(samples["averaged"].mean(axis=0) - samples["averaged_predicted"][0]) < allowed).all()


@pytest.mark.slow
def test_flow_is_weighted_fine_tuning_of_the_draw():
    samples = measure(sweep_over("flow", CASES["flow"], seeds=1, seed=3), Task((), 0, 1)).samples
    problem = aligned_problem(spectra.power_law(40), noise_std=0.9, pretrain_risk=0.1)
    task = sample_deviating_task(jax.random.fold_in(jax.random.key(3), 0), problem, 12, deviation="outliers")
    losses = (task.y - task.X @ task.theta_1) ** 2
    for row, weights in enumerate((jnp.ones(12), flow_weights(losses, median_temperature(losses) / 2))):
        thetas = fine_tune(task.X, task.y, task.theta_1, GradientFlow([5.0, 50.0]), weights)
        for column, theta in enumerate(thetas):
            for last, tau in enumerate((0.3, 1.0, 1.5)):
                average = interpolate(task.theta_1, theta, tau)
                expected = excess_risks(average, problem, jnp.zeros(40), task.theta_2_star)
                for name, risk in expected._asdict().items():
                    np.testing.assert_allclose(samples[name][0, row, column, last], risk, rtol=1e-9)


@pytest.mark.slow
def test_s3ft_has_the_shares_of_theory_and_ends_at_supervised_fine_tuning():
    samples = measure(sweep_over("s3ft", CASES["s3ft"], seeds=60), Task((), 0, 60)).samples
    assert samples["content_risk"].shape == (60, 2, 3, 2)
    expected = shares(Procedure(jnp.array([0, 1.0, 100.0])[:, None], jnp.array([0, 0.5])), 2, 1.25**0.5)
    for name, share in expected._asdict().items():
        error = np.maximum(samples[name].std(axis=0, ddof=1) / 60**0.5, 1e-12)
        assert (np.abs(samples[name].mean(axis=0) - share) < 4 * error).all(), name
    np.testing.assert_allclose(samples["content_drift"][:, :, 2], 0, atol=1e-20)
    assert (samples["style_drift"][:, :, 0, 0] > samples["style_drift"][:, :, 0, 1]).mean() > 0.8  # half in own style
    supervised = samples["content_risk"][:, :, 0, 0]
    assert (supervised.mean(axis=0) < 2).all()  # better than the pretrained model, which misses two outputs entirely


@pytest.fixture
def called(monkeypatch, capsys, like_a_worker):
    """`linfit sweep` in this process: exit code, output, errors."""
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["linfit", "sweep", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as ending:
            return ending.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_command_runs_shows_plots_exports(tmp_path, called):
    store = tmp_path / "runs" / "oa.zarr"
    options = ("--n", "12", "--p", "40", "--penalty", "1e-2:1:3:log", "--tau", "0:1:4", "--alignment=-1,1")
    command = ("overadaptation", *options, "--store", store, "--seeds", "5")
    code, told, _ = called(*command, "--plan")
    assert (code, store.exists()) == (0, False)
    assert "2 tasks (2 cells × 5 replicates" in told
    code, _, told = called(*command)
    assert code == 0
    for text in ("2 tasks (2 cells × 5 replicates", "the first task took"):
        assert text in told
    data = xr.open_zarr(store)
    assert data.finetune.dims == ("alignment", "penalty", "tau")
    assert np.isfinite(data.finetune).all()
    shown = json.loads(called("show", store, "--json")[1])
    assert shown["share_done"] == 1
    best = shown["best"]["finetune"]
    assert best["value"] == data.finetune.min()
    at = {name: best["at"][name] for name in data.finetune.dims}
    assert best["standard_error"] == data.finetune_error.sel(at)
    assert "best points" in called("show", store)[1]
    assert called("plot", store, "--x", "tau", "--lines", "penalty")[1].strip() == str(store.with_suffix(".png"))
    assert store.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert called("export", store, "--out", tmp_path / "oa.csv")[:2] == (0, f"written to {tmp_path}/oa.csv\n")
    code, told, _ = called("resume", store)
    assert (code, told[:8]) == (0, "0 tasks ")
    code, _, errors = called("overadaptation", "--noise", "0.5", "--store", tmp_path / "b.zarr")
    assert code == 2
    assert "--noise-std" in errors  # the name it has now


def test_command_tells_of_failures_by_exit_code(tmp_path, called):
    file, store = tmp_path / "toy.toml", tmp_path / "toy.zarr"
    axes = "[axes]\nlevel = [1, 2, 3]\nbroken = 2\n"
    file.write_text(f'experiment = "tests.sweep_toys:NOISE"\nseeds = 2\nstore = "{store}"\n{axes}')
    code, told, errors = called("file", file)
    assert code == 1
    assert "2 replicates failed" in told
    assert "failed: level = 2.0, replicate = 0: ValueError: level 2.0 is broken" in errors
    assert called("resume", store)[0] == 1
    code, told, _ = called("show", store)
    assert code == 0
    assert "failed: level = 2.0, replicate = 1: ValueError: level 2.0 is broken" in told
    for arguments, message in (
        (("file", file), "exists; --resume"),
        (("file", tmp_path / "none.toml"), "no file"),
        (("file", file, "--retry"), "--retry"),
        (("file", file, "--workers", "-1"), "--workers"),
        (("file", file, "--slurm"), "--slurm needs --workers"),
        (("overadaptation", "--store", store, "--tau", "1:0:3"), "--tau must run from"),
        (("overadaptation", "--store", store, "--resume"), 'experiment: the store has "tests.sweep_toys:NOISE"'),
        (("show", tmp_path), "is not a store"),
        (("plot", store, "--x", "tau"), "--x must be an axis of the sweep, one of level"),
        (("export", store, "--out", tmp_path / "a.txt"), "--out must end in"),
    ):
        code, _, errors = called(*arguments)
        assert (code, errors.count("\n"), errors[:15]) == (2, 1, "linfit: error: "), arguments
        assert message in errors


def test_commands_are_light():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for module, absent in (("figures.commands.sweep", "jax numpy zarr dask"), ("sims.sweep.driver", "jax xarray")):
        script = f"import sys, {module}; print([name for name in {absent.split()} if name in sys.modules])"
        assert subprocess.check_output([sys.executable, "-c", script], text=True, env=environment).strip() == "[]"
