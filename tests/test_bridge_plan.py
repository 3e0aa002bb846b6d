"""`linfit plan`: estimates against planted truth, intervals that cover it, forms against exact ones, and its use."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize

from figures.commands import main
from linfit.bridge import fit_weights, load, merge, plan, read_weights
from linfit.bridge.delta import split_of
from linfit.bridge.mixture import lattice, least_numbers, next_weightings
from linfit.bridge.planning import group_of
from linfit.bridge.soup import Sample, moments
from tests.bridge_checkpoints import read_all, write_single

NAMES = ["model.embed_tokens.weight", "lm_head.weight"] + [
    f"model.layers.{layer}.{part}.weight" for layer in range(3) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
]


def planted_deltas(generator, shapes, kind, runs, signal_to_noise):
    """Deltas (runs, m, n) of each tensor, and the known ‖m‖² and V of each."""
    for m, n in shapes:
        varying = kind != "equal"
        scale = 0.1 * (generator.lognormal(0, 0.7) if varying else 1)
        signal = generator.standard_normal((m, 2)) @ generator.standard_normal((2, n)) / 2**0.5
        signal *= scale * (signal_to_noise * (generator.lognormal(0, 0.7) if varying else 1)) ** 0.5
        noise = generator.standard_normal((runs, m, n))
        if kind == "heavy tails":
            noise = generator.standard_t(5, (runs, m, n)) * 0.6**0.5
        elif kind == "correlated rows":
            noise = 0.5**0.5 * (noise + generator.standard_normal((runs, 1, n)))
        elif kind == "low rank":
            noise = generator.standard_normal((runs, m, 4)) @ generator.standard_normal((runs, 4, n)) / 2
        yield signal + scale * noise, np.sum(signal**2), scale**2 * m * n


KINDS = ["equal", "varying", "heavy tails", "correlated rows", "low rank"]


def write_family(folder, deltas, base=None):
    """A base and one folder for each run from deltas (runs, …) by name."""
    base = base or {name: np.zeros(values.shape[1:], np.float32) for name, values in deltas.items()}
    runs = len(next(iter(deltas.values())))
    tuned = [
        write_single(folder / f"run{k}", {n: (base[n] + values[k]).astype(np.float32) for n, values in deltas.items()})
        for k in range(runs)
    ]
    return write_single(folder / "base", base), tuned


@pytest.fixture
def family(tmp_path, generator):
    """Four runs of small tensors with a shared signal, an integer buffer beside them."""
    deltas, base = {}, {"position_ids": np.arange(5)}
    for name in NAMES:
        shape = (8,) if "norm" in name else (12, 8)
        base[name] = generator.standard_normal(shape).astype(np.float32)
        deltas[name] = 0.1 * (generator.standard_normal(shape) + generator.standard_normal((4, *shape)))
    start, tuned = write_family(tmp_path, deltas, base)
    for folder in tuned:
        write_single(folder, {**read_all(folder), "position_ids": np.arange(5)})
    return start, tuned


def test_moments_of_one_task_are_the_split_of_b2(generator):
    deltas = generator.standard_normal((5, 40)) + generator.standard_normal(40)
    gram = deltas @ deltas.T
    found, split = moments(gram, np.zeros(5, int)), split_of(gram)
    np.testing.assert_allclose(found.variance, split.variance)
    np.testing.assert_allclose(found.center, split.mean_square - split.variance / 5)
    np.testing.assert_allclose(found.tau(5), split.tau(averaged=5))
    np.testing.assert_allclose(found.tau(1), split.tau())


@pytest.mark.parametrize("tasks", [[0, 0, 0], [0, 0, 1], [0, 1, 0, 1, 2]])
def test_moments_are_unbiased_and_tell_tasks_apart(tasks, generator):
    size, repeats = 30, 4000
    means, noise_std = generator.standard_normal((max(tasks) + 1, size)), 1.5
    deltas = means[tasks] + noise_std * generator.standard_normal((repeats, len(tasks), size))
    found = moments(deltas @ np.swapaxes(deltas, 1, 2), np.array(tasks))
    own = means - means.mean(0)
    pairs = [(found.variance, noise_std**2 * size), (found.signal.mean((1, 2)), np.sum(means.mean(0) ** 2))]
    between = np.trace(found.signal, axis1=1, axis2=2) / len(means) - found.signal.mean((1, 2))
    for values, truth in [*pairs, (between, np.sum(own**2) / len(means))]:
        error = np.std(values) / repeats**0.5
        assert abs(values.mean() - truth) <= 5 * error + 1e-9


def test_predicted_distance_of_averages_is_that_of_new_runs(generator):
    """B + V/(T r) and the best τ, from runs at hand, against averages of many new ones."""
    tasks, size = np.array([0, 0, 0, 0, 1, 1, 1, 1]), 4000
    means = generator.standard_normal((2, size)) + 0.5 * generator.standard_normal(size)
    sample = Sample(np.stack([(d := means[tasks] + 1.2 * generator.standard_normal((8, size))) @ d.T]), tasks)
    for runs in (1, 3, 10):
        new = (means + 1.2 * generator.standard_normal((runs, 2, size))).mean((0, 1))
        distance = np.mean(np.sum((new - means) ** 2, axis=1))
        assert abs(sample.total.between + sample.total.noise(runs) - distance) < 0.1 * distance
        grid = np.linspace(0, 1.2, 241)
        best = grid[np.argmin([np.sum((tau * new - means.mean(0)) ** 2) for tau in grid])]
        assert abs(sample.total.tau(runs) - best) < 0.06


def test_weights_have_least_expected_distance(generator):
    """Against a search, for two tasks and unequal noise; and the closed form of one task."""
    tasks, ratios = np.array([0, 0, 1, 1, 1]), np.array([1.0, 2.0, 0.5, 1.0, 3.0])
    sample = Sample(np.stack([np.eye(5)]), tasks)
    truth = moments(np.zeros((5, 5)), tasks)._replace(signal=np.array([[4.0, 1.0], [1.0, 2.0]]), variance=np.array(3.0))

    def distance(a):
        on = np.array([a[:2].sum(), a[2:].sum()])
        to_tasks = [(on - np.eye(2)[t]) @ truth.signal @ (on - np.eye(2)[t]) for t in range(2)]
        return np.mean(to_tasks) + 3.0 * np.sum(a**2 * ratios)

    found = sample.best_weights(ratios)(truth)
    np.testing.assert_allclose(found, scipy.optimize.minimize(distance, np.zeros(5)).x, atol=1e-4)
    one = Sample(np.stack([np.eye(3)]), np.zeros(3, int))
    variances = 3.0 * ratios[:3]
    expected = (1 / variances) / (1 / 4.0 + np.sum(1 / variances))
    truth = truth._replace(signal=np.array([[4.0]]))
    np.testing.assert_allclose(one.best_weights(ratios[:3])(truth), expected)


def test_runs_of_less_noise_weigh_more_and_gain(generator):
    noise_stds, size = np.array([0.5, 1.0, 1.0, 2.0]), 20_000
    signal, new = generator.standard_normal(size), []
    deltas = signal + noise_stds[:, None] * generator.standard_normal((4, size))
    sample = Sample(np.stack([deltas @ deltas.T]), np.zeros(4, int))
    ratios = sample.noise_ratios()
    expected = noise_stds**2 / np.mean(noise_stds**2)
    np.testing.assert_allclose(ratios, np.maximum(expected, 0.25), rtol=0.15)
    for each in (ratios, np.ones(4)):
        weights = sample.best_weights(each)(sample.total)
        new.append(np.sum((weights @ deltas - signal) ** 2))
    assert new[0] < 0.7 * new[1]


def covered(generator, kind, runs, cases, tensors=10, most=40):
    """How many of three intervals (gain of 4 runs, ‖m‖², agreement of all) hold the planted truth, by case."""
    hits = []
    for case in range(cases):
        shapes = generator.integers(8, most, (tensors, 2))
        parts = list(planted_deltas(generator, shapes, kind, runs, (0.1, 1.0, 5.0)[case % 3]))
        flat = [delta.reshape(runs, -1) for delta, _, _ in parts]
        sample = Sample(np.stack([rows @ rows.T for rows in flat]), np.zeros(runs, int))
        signal, variance = (sum(part[at] for part in parts) for at in (1, 2))
        gain = sample.estimate(lambda found: found.gain(4)[..., None], positive=True)[0]
        center = sample.estimate(lambda found: found.center[..., None])[0]
        tau = sample.estimate(lambda found: found.tau(runs)[..., None])[0]
        truths = 0.75 * variance, signal, signal / (signal + variance / runs)
        hits.append([each.low <= truth <= each.high for each, truth in zip((gain, center, tau), truths)])
    return np.mean(hits, axis=0)


@pytest.mark.parametrize("runs", [2, 3, 6])
def test_intervals_cover_the_planted_truth(runs, generator):
    """At least 95 of 100, less five standard errors of the count."""
    for kind in ("varying", "correlated rows"):
        cases = 90
        assert (covered(generator, kind, runs, cases) >= 0.95 - 5 * (0.05 * 0.95 / cases) ** 0.5).all()


def test_intervals_are_not_idle(generator):
    """They shrink with the size of tensors, and for many runs are near the true spread of the estimate."""
    widths, values = {}, []
    for _ in range(60):
        for size in (400, 40_000):
            rows = generator.standard_normal((6, size)) + generator.standard_normal(size)
            sample = Sample(np.stack([part @ part.T for part in np.split(rows, 8, axis=1)]), np.zeros(6, int))
            gain = sample.estimate(lambda found: found.gain(3)[..., None], positive=True)[0]
            widths.setdefault(size, []).append(gain.standard_error / gain.value)
            if size == 400:
                values.append(gain.value)
    assert np.mean(widths[40_000]) < 0.2 * np.mean(widths[400])
    assert 0.9 < np.mean(widths[400]) / (np.std(values) / np.mean(values)) < 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_plan_of_planted_checkpoints_covers_the_gains(kind, tmp_path, generator):
    """100 families on disk: the gain of every number of runs lies in its interval in 95 or more."""
    hits = []
    for case in range(100):
        runs = (2, 3, 4, 8)[case % 4]
        shapes = generator.integers(8, 32, (6, 2))
        parts = list(planted_deltas(generator, shapes, kind, runs, (0.1, 1.0, 5.0)[case % 3]))
        deltas = {f"layers.{at}.mlp.weight": delta for at, (delta, _, _) in enumerate(parts)}
        found = plan(*write_family(tmp_path / str(case), deltas))
        variance = sum(part[2] for part in parts)
        truths = [variance * (1 - 1 / gain.runs) for gain in found.gains]
        hits.append(all(each.gain.low <= truth * (1 + 1e-6) for each, truth in zip(found.gains, truths)))
        hits[-1] &= all(truth <= each.gain.high * (1 + 1e-6) for each, truth in zip(found.gains, truths))
    assert np.sum(hits) >= 95


def planted_form(generator, runs, rank=None):
    """A convex quadratic form in the weights, with its minimum among positive weights, and inner products."""
    deltas = generator.standard_normal((runs, 200)) + generator.standard_normal(200)
    gram = deltas @ deltas.T
    root = generator.standard_normal((runs, runs))
    curvature = root @ root.T + np.eye(runs)
    best = generator.uniform(0, 1, runs) / runs
    if rank is not None:  # only what the runs share matters, beyond it length
        values, vectors = np.linalg.eigh(gram)
        scale = vectors[:, ::-1] * np.sqrt(values[::-1] / values[-1])
        inner = np.eye(runs)
        inner[:rank, :rank] += curvature[:rank, :rank]
        curvature, best = scale @ inner @ scale.T, np.linalg.inv(scale).T @ np.r_[np.ones(rank), np.zeros(runs - rank)]
    return lambda w: 2 + 0.5 * np.einsum("...k,kl,...l->...", w - best, curvature, w - best), best, gram


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_the_whole_form_is_recovered_from_the_lattice(runs, generator):
    loss, best, gram = planted_form(generator, runs)
    w = lattice(runs)
    assert len(w) == runs * (runs + 3) // 2 + 1 == least_numbers(runs, runs)
    prompts = generator.standard_normal(50)
    fit = fit_weights(w, loss(w)[:, None] + prompts, gram)
    np.testing.assert_allclose([weight.value for weight in fit.weights], best, atol=1e-7)
    new = generator.uniform(-1, 1, (4, runs))
    np.testing.assert_allclose(fit(new), loss(new) + prompts.mean(), atol=1e-7)
    assert (fit.rank, fit.convex) == (runs, True)
    assert abs(fit.loss.value - 2 - prompts.mean()) < 1e-7


@pytest.mark.parametrize("tasks", [[0, 0, 0, 0], [0, 0, 1, 1, 1, 0]])
def test_what_to_run_next_determines_the_leading_form_and_then_all(tasks, generator):
    tasks = np.array(tasks)
    runs, rank = tasks.size, tasks.max() + 1
    loss, best, gram = planted_form(generator, runs, rank)
    known, fit, prompts = np.zeros((0, runs)), None, generator.standard_normal(60)
    needed = [least_numbers(each, runs) for each in (rank, runs)]
    while fit is None or fit.rank < runs:
        ahead = next_weightings(known, gram, tasks, fit)
        known = np.vstack([known, ahead[:1]])
        fit = fit_weights(known, loss(known)[:, None] + prompts, gram, tasks=int(rank))
        if len(known) == needed[0]:
            assert fit.rank == rank  # the leading form, and it is right here
            np.testing.assert_allclose([weight.value for weight in fit.weights], best, atol=1e-6)
            np.testing.assert_allclose(next_weightings(known, gram, tasks, fit)[0], best, atol=1e-6)
        assert len(known) <= needed[1] + 1
    np.testing.assert_allclose([weight.value for weight in fit.weights], best, atol=1e-6)


def test_intervals_of_fitted_weights_cover_their_truth(generator):
    """Prompts with their own forms: the minimum of the mean form, the loss there, the gain over the plain average."""
    hits, plain, cases = [], [], 60
    w = lattice(2)
    loss, best, gram = planted_form(generator, 2)
    for _ in range(cases):
        slopes = generator.standard_normal((2, 300)) * 0.5
        losses = loss(w)[:, None] + generator.standard_normal(300) + w @ slopes
        fit = fit_weights(w, losses + 0.05 * generator.standard_normal(losses.shape), gram)
        truths = [*best, 2.0, float(loss(np.full(2, 0.5))) - 2.0]
        every = [*fit.weights, fit.loss, fit.gain_over_average]
        hits.append([each.low <= truth <= each.high for each, truth in zip(every, truths)])
        plain.append(fit.weights[0].standard_error)
    assert (np.mean(hits, axis=0) >= 0.98 - 5 * (0.02 / cases) ** 0.5).all()
    assert np.mean(plain) < 0.1


def test_a_form_that_is_not_quadratic_or_not_convex_says_so(generator):
    _, _, gram = planted_form(generator, 2)
    w = np.vstack([lattice(2), [[1 / 3, 1 / 3], [0.75, 0.0]]])
    noise = 0.01 * generator.standard_normal((len(w), 200))
    bent = fit_weights(w, (w.sum(1) ** 4 - w.sum(1))[:, None] + w[:, :1] ** 2 + noise, gram)
    straight = fit_weights(w, (w.sum(1) ** 2 - w.sum(1))[:, None] + w[:, :1] ** 2 + noise, gram)
    assert bent.p_value < 1e-3 < straight.p_value
    assert "not exactly quadratic" in bent.verdict
    assert bent.weights[0].standard_error > 3 * straight.weights[0].standard_error
    hill = fit_weights(w, -(w**2).sum(1)[:, None] + noise, gram)
    assert not hill.convex
    assert "no minimum" in hill.verdict
    assert np.isnan(hill.weights[0].standard_error)
    assert hill.loss.value < 0
    assert fit_weights(w[:2], noise[:2], gram) is None


@pytest.mark.parametrize(
    ("weights", "losses", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 9)), r"losses must be \(E, n\) for weights \(E, 2\)"),
        (np.zeros((4, 2)), np.zeros((3, 9)), "losses must be"),
        (np.zeros((4, 2)), np.zeros((4, 4)), "more prompts than weightings"),
        (np.zeros((4, 2)), np.full((4, 9), np.nan), "finite"),
    ],
)
def test_bad_fits_are_refused(weights, losses, message):
    with pytest.raises(ValueError, match=message):
        fit_weights(weights, losses, np.eye(2))


GROUPS = {
    "model.embed_tokens.weight": "embedding", "transformer.wpe.weight": "embedding", "lm_head.weight": "head",
    "model.layers.3.self_attn.k_proj.bias": "attention", "transformer.h.0.attn.c_attn.weight": "attention",
    "model.layers.11.mlp.gate_proj.weight": "mlp", "transformer.h.0.mlp.c_fc.weight": "mlp",
    "model.layers.0.input_layernorm.weight": "norm", "transformer.ln_f.bias": "norm",
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": "norm", "model.layers.0.self_attn.q_norm.weight": "norm",
    "bert.encoder.layer.0.attention.output.dense.weight": "attention", "gate.scale": "other",
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_groups_follow_from_names(name):
    assert group_of(name) == GROUPS[name]


def test_plan_agrees_with_the_tensors_in_memory(family):
    base, tuned = family
    start, runs = load(base), [load(folder) for folder in tuned]
    rows = np.stack([np.concatenate([(run[n] - start[n]).ravel() for n in NAMES]).astype(float) for run in runs])
    found = plan(base, tuned)
    np.testing.assert_allclose(found.products, rows @ rows.T, rtol=1e-5)
    variance = np.sum((rows - rows.mean(0)) ** 2) / 3
    np.testing.assert_allclose(found.variance.value, variance, rtol=1e-4)
    np.testing.assert_allclose(found.signal.value, np.sum(rows.mean(0) ** 2) - variance / 4, rtol=1e-4)
    np.testing.assert_allclose(
        [g.gain.value for g in found.gains[:3]], variance * np.array([0, 1 / 2, 2 / 3]), rtol=1e-4
    )
    assert sorted(name for group in found.groups for name in group.tensors) == sorted(NAMES)
    assert (found.redundant, found.conflicts, found.fit) == ([], [], None)
    assert abs(sum(group.share for group in found.groups) - 1) < 1e-12


def test_adapters_count_by_their_products(tmp_path, generator):
    values = {"model.q_proj.weight": generator.standard_normal((12, 8)).astype(np.float32)}
    base, moved = write_single(tmp_path / "base", values), []
    for k in range(2):
        a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 8), (12, 2)))
        names = [f"base_model.model.model.q_proj.lora_{side}.weight" for side in "AB"]
        folder = write_single(tmp_path / f"run{k}", dict(zip(names, (a, b))))
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        moved.append((b @ a).ravel().astype(float))
    found = plan(base, [tmp_path / "run0", tmp_path / "run1"])
    np.testing.assert_allclose(found.products, np.stack(moved) @ np.stack(moved).T, rtol=1e-4)


def test_redundant_and_contrary_runs_are_named(tmp_path, generator):
    signal, noise = generator.standard_normal(600), generator.standard_normal((5, 600))
    rows = np.stack(
        [signal + noise[0], signal + noise[0] + 0.1 * noise[1], signal + noise[2], signal + noise[3], -signal]
    )
    base, tuned = write_family(tmp_path, {"w": rows.reshape(5, 30, 20)})
    found = plan(base, tuned, tasks=["a", "a", "a", "a", "b"])
    assert found.redundant == [(0, 1)]
    assert found.conflicts == [(k, 4) for k in range(4)]
    assert any(note.startswith("redundant: run0 and run1") for note in found.notes)
    assert any("one run only of b" in note for note in found.notes)
    again = plan(base, [tuned[0], tuned[0], tuned[2]])
    assert again.redundant == [(0, 1)]
    assert plan(base, [tuned[0], tuned[0]]).variance.value == 0


def test_runs_of_several_tasks_are_not_taken_for_noise(tmp_path, generator):
    """Unmarked, what tells tasks apart passes for variance that more runs would remove."""
    tasks = np.array([0, 0, 0, 1, 1, 1])
    means = generator.standard_normal((2, 900))
    rows = means[tasks] + 0.5 * generator.standard_normal((6, 900))
    base, tuned = write_family(
        tmp_path, {f"w{k}": part.reshape(6, 15, 20) for k, part in enumerate(np.split(rows, 3, 1))}
    )
    marked, unmarked = plan(base, tuned, tasks=list("aaabbb")), plan(base, tuned)
    assert abs(marked.variance.value / (0.25 * 900) - 1) < 0.15
    assert marked.variance.low <= 0.25 * 900 <= marked.variance.high
    assert unmarked.variance.value > 2 * marked.variance.value
    truth = np.sum((means - means.mean(0)) ** 2) / 2
    assert abs(marked.between_tasks.value / truth - 1) < 0.15


def test_a_unit_weight_keeps_bits_and_any_weights_are_sums_of_deltas(family, tmp_path):
    base, tuned = family
    for number, weights in enumerate([[0, 1, 0, 0], [0, 0, 0, 0]]):
        out = merge(base, tuned, tmp_path / f"out{number}", weights=weights).folders[0]
        source = tuned[1] if number == 0 else base
        for name, value in read_all(source).items():
            np.testing.assert_array_equal(read_all(out)[name], value)
    weights = [0.5, -0.25, 0.4, 0.1]
    written = merge(base, tuned, tmp_path / "sum", weights=weights, tau=[1.0, 0.5])
    assert any("extrapolation" in note for note in written.notes)
    start, runs = load(base), [load(folder) for folder in tuned]
    for tau, folder in zip((1.0, 0.5), written.folders):
        for name, value in load(folder).items():
            expected = start[name] + tau * sum(w * (run[name] - start[name]) for w, run in zip(weights, runs))
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert "`run1` (-0.25)" in (written.folders[0] / "README.md").read_text()


def test_the_weights_of_a_plan_are_merged_by_tensor(family, tmp_path, monkeypatch, capsys):
    base, tuned = family
    run_main(monkeypatch, "plan", base, *tuned, "--json")
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    rows = read_weights(tmp_path / "plan.json")
    groups = {name: group for group in plan(base, tuned).groups for name in group.tensors}
    assert rows.keys() == {*NAMES, "*"}
    run_main(monkeypatch, "merge", base, *tuned, "--weights", tmp_path / "plan.json", "-o", tmp_path / "out")
    start, runs, merged = load(base), [load(folder) for folder in tuned], load(tmp_path / "out")
    for name in NAMES:
        weights = [weight.value for weight in groups[name].weights]
        np.testing.assert_allclose(rows[name], weights)
        expected = start[name] + sum(w * (run[name] - start[name]) for w, run in zip(weights, runs))
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)
    assert "sets of weights by tensor" in (tmp_path / "out" / "README.md").read_text()


def test_other_weights_do_not_resume_an_interrupted_merge(family, tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done, total):
        raise Interrupted

    base, tuned = family
    for weights in ([0.3, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.3]):
        with pytest.raises(Interrupted):
            merge(base, tuned, tmp_path / "out", weights=weights, progress=stop)
        identity = (tmp_path / ".out.partial" / ".identity").read_text()
        assert identity != (tmp_path / "seen").read_text() if (tmp_path / "seen").exists() else True
        (tmp_path / "seen").write_text(identity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.5, 0.5]}, "weights must be 4 finite numbers"),
        ({"weights": [0.5, 0.5, 0.5, np.nan]}, "weights must be 4 finite numbers"),
        ({"weights": [0.25] * 4, "run_weights": [0.25] * 4}, "cannot be combined with run_weights"),
        ({"weights": [0.25] * 4, "method": "shrink"}, "cannot be combined with method shrink"),
        ({"weights": {"nothing.*": [0.25] * 4}}, "fit no tensor"),
        ({"weights": {"lm_head": [0.25] * 4}}, "must say something of every tensor"),
    ],
)
def test_bad_weights_are_refused_before_anything_is_written(family, tmp_path, options, message):
    base, tuned = family
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        merge(base, tuned, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["linfit", *map(str, arguments)])
    main()


def write_losses_of(tmp_path, form, prompts, rows):
    """As `linfit losses` writes them, one file for each weighting."""
    options = []
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"index": 0, "loss": float(form(row) + p)}) + "\n" for p in prompts))
        options += ["--losses", f"{','.join(f'{value!r}' for value in row.tolist())}={path}"]
    return options


def test_losses_are_fitted_and_the_result_is_merged(family, tmp_path, monkeypatch, capsys, generator):
    base, tuned = family
    best = np.array([0.3, 0.2, 0.1, 0.2])

    def form(row):
        return 1 + np.sum((row - best) ** 2)

    options = write_losses_of(tmp_path, form, generator.standard_normal(40), lattice(4))
    run_main(monkeypatch, "plan", base, *tuned, *options)
    shown = capsys.readouterr()
    assert "weights of least loss: 0.3 " in shown.out
    assert "the whole form" in shown.out
    run_main(monkeypatch, "plan", base, *tuned, *options, "--json", "--picture", tmp_path / "plan.png")
    answer = capsys.readouterr().out
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    content = json.loads(answer)
    np.testing.assert_allclose([weight["value"] for weight in content["fit"]["weights"]], best, atol=1e-6)
    np.testing.assert_allclose(content["next_weightings"], [best], atol=1e-6)
    (tmp_path / "plan.json").write_text(answer)
    assert list(read_weights(tmp_path / "plan.json")) == ["*"]


def damaged(family, case):
    """Arguments of a plan that must be refused, and what the message says."""
    base, tuned = family
    first = read_all(tuned[0])
    if case == "one run":
        return [base, tuned[0]], "at least 2 fine-tuned runs"
    if case == "base as run":
        return [base, tuned[0], base], "the base .* itself"
    if case == "copy of the base":
        write_single(tuned[1], read_all(base))
        return [base, *tuned[:2]], "equals the base in every tensor"
    if case == "shape":
        write_single(tuned[0], {**first, "lm_head.weight": np.zeros((13, 8), np.float32)})
        return [base, *tuned], "shapes or dtypes differ"
    if case == "NaN":
        write_single(tuned[0], {**first, "lm_head.weight": np.full((12, 8), np.nan, np.float32)})
        return [base, *tuned], "lm_head.weight holds NaN"
    if case == "labels":
        return [base, *tuned, "--task", "a,b"], "task must label each of the 4 runs"
    if case == "no pair":
        return [base, *tuned, "--task", "a,b,c,d"], "at least one task needs 2 runs"
    if case == "pattern":
        return [base, *tuned, "--only", "nothing"], "fits no floating tensor"
    if case == "losses":
        return [base, *tuned, "--losses", "0.5,0.5=x.jsonl"], "need 4 finite weights"
    if case == "losses without file":
        return [base, *tuned, "--losses", "0.5,0.5"], "must be W1,W2"
    return [base, *tuned, "--picture", "plan.txt"], "must end in .png"


CASES = ["one run", "base as run", "copy of the base", "shape", "NaN", "labels", "no pair", "pattern", "losses"]


@pytest.mark.parametrize("case", [*CASES, "losses without file", "picture"])
def test_a_plan_of_bad_input_ends_in_one_line(family, tmp_path, monkeypatch, capsys, case):
    arguments, message = damaged(family, case)
    picture = [] if case == "picture" else ["--picture", tmp_path / "plan.png"]
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "plan", *arguments, *picture)
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert re.search(message, shown.err), shown.err
    assert not (tmp_path / "plan.png").exists()


def test_losses_of_other_prompts_are_refused(family, tmp_path, generator):
    base, tuned = family
    write_losses_of(tmp_path, lambda row: 1.0, generator.standard_normal(9), lattice(4)[:2])
    (tmp_path / "1.jsonl").write_text('{"loss": 1.0}\n')
    losses = {(0.0,) * 4: tmp_path / "0.jsonl", (1.0, 0.0, 0.0, 0.0): tmp_path / "1.jsonl"}
    with pytest.raises(ValueError, match="same prompts"):
        plan(base, tuned, losses=losses)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    for text in ("{}", "[1]", "nothing", '{"weights": [1], "groups": []}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match="linfit plan --json"):
            read_weights(tmp_path / "plan.json")


MEASURE = """
import re, sys
import linfit.bridge.planning, linfit.bridge.merging
from linfit.bridge import plan, merge
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
exec(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_tensors_or_runs(tmp_path, generator):
    """Eight runs of a tensor of 96 MB: a few blocks of each are held."""
    shape = (6000, 4000)
    values = generator.standard_normal(shape, dtype=np.float32)
    base = write_single(tmp_path / "base", {"w": values})
    tuned = [write_single(tmp_path / f"run{k}", {"w": values + np.float32(k + 1)}) for k in range(8)]
    folders = f"{str(base)!r}, {[str(folder) for folder in tuned]!r}"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    for action in (f"plan({folders})", f"merge({folders}, {str(tmp_path / 'out')!r}, weights=[0.1] * 8)"):
        command = [sys.executable, "-c", MEASURE, action]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        assert 1 < float(shown) < 200


@pytest.mark.slow
def test_soups_of_real_runs_are_predicted(seed):
    """Small: predictions from seven losses explain most of how all other merges differ; seeds on one split are told."""
    pytest.importorskip("transformers")
    from sims.laboratory.toy_soups import soups_of_runs

    sizes = {"hidden": 32, "pretrain_steps": 120, "finetune_steps": 12, "finetune_lines": 100, "finetune_rate": 1e-3}
    data = soups_of_runs(soups=2, shares=np.linspace(0, 1, 3), lines=100, seed=seed % 1000, shard_size="1MB", **sizes)
    assert data.evaluations == 7
    new = ~data["fitted"].values
    predicted, measured = (data[name].values[new].mean(1) for name in ("predicted", "measured"))
    assert np.sqrt(np.mean((predicted - measured) ** 2)) < 0.5 * np.std(measured)
    assert set(map(tuple, json.loads(data.redundant))) <= {(0, 1), (2, 3), (4, 5), (6, 7)}
    np.testing.assert_allclose(data["predicted"].values[~new], data["measured"].values[~new], atol=1e-6)
