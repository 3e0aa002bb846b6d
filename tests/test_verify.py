"""`verify` must accept what is true for any seed, reject what is false, and find where claims stop holding: on toys."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.stats

import sims.verify
from figures.commands.verify import verify as command
from sims.claims import Claim
from sims.parameters import Parameter
from sims.verdicts import _boundaries_text
from sims.verify import LEVEL, Effort, _examine, _holm, _normals, _points, _studentised, falsify, verify

KEY = jax.random.key(0)
EFFORT = Effort(points=16, refinements=16, walks=2)


def toy(kind="identity", sides=lambda normal, x: (x, x), parameters=None, **fields) -> Claim:
    parameters = parameters or {"x": Parameter(low=1.0, high=2.0, lowest=-1.0, highest=3.0)}
    return Claim("toy", "A toy.", "x = x", "ours", kind, parameters, sides, **fields)


def single(claim: Claim, instances: int = 4, seed: int = 0):
    (verdict,) = verify([claim], instances, seed)
    return verdict


@pytest.mark.parametrize("excess", [0.99, 1.01])
def test_both_sides_of_each_tolerance(excess):
    """Identity, inequality: accepted just within the tolerance, rejected just beyond it."""
    identity = toy(sides=lambda normal, x: ([x, x], [x, x * (1 + 1e-3 * excess)]), tolerance=1e-3)
    assert _examine(identity, {"x": 1.5}, KEY).p_value == float(excess < 1)
    inequality = toy("inequality", lambda normal, x: (x, x - 0.1 * excess), tolerance=0.1)
    instance = _examine(inequality, {"x": 1.5}, KEY)
    assert instance.p_value == float(excess < 1)
    assert instance.severity == pytest.approx(0.1 * excess)


def test_statistical_p_values_are_those_of_a_t_test():
    """Against scipy, for symmetric samples; and Bonferroni over entries."""
    samples = np.random.default_rng(4).normal([0.0, 0.2, 0.0], 1.0, (200, 3))
    instance = _examine(toy("statistical", lambda normal, x: (np.zeros(3), samples)), {"x": 1.0}, KEY)
    expected = scipy.stats.ttest_1samp(samples, 0).pvalue.min() * 3
    assert math.log(instance.p_value) == pytest.approx(math.log(expected), abs=0.5)


def test_what_is_true_passes_for_many_seeds():
    """Squared normals, one instance a seed; p-values at most uniform, so that it is no accident."""
    claim = toy("statistical", lambda normal, x: (x**2, (x * normal(512, 3)) ** 2))
    verdicts = [single(claim, 1, seed) for seed in range(400)]
    assert all(verdict.holds for verdict in verdicts)
    below = np.mean([verdict.worst.p_value < 0.05 for verdict in verdicts])
    assert below < 0.05 + 4 * (0.05 * 0.95 / len(verdicts)) ** 0.5


def test_skewness_is_corrected_for():
    """Far in the tail of squared errors: the corrected statistic is calibrated, Student's t is not."""
    generator = np.random.default_rng(0)
    samples = generator.standard_normal((100, 60_000)) ** 2 - 1
    t = samples.mean(axis=0) / samples.std(axis=0, ddof=1) * 10
    critical = scipy.stats.t.isf(1e-3, 99)
    plain, corrected = (np.mean(np.abs(z) > critical) / 2e-3 for z in (t, _studentised(samples)))
    assert plain > 4
    assert corrected < 2


@pytest.mark.parametrize(("rate", "holds"), [(1.0, True), (0.5, False)])
def test_asymptotic_claims_are_bounded_at_their_rate(rate, holds):
    """A gap of 1/N passes a bound of 2/N; one of 1/√N does not; noise excuses nothing that is significant."""
    sizes = (100, 10_000)

    def sides(normal, x):
        noise = normal(50, 2)
        return [np.ones(2)] * 2, [1 + n**-rate + 1e-5 * noise for n in sizes]

    verdict = single(toy("asymptotic", sides, sizes=sizes, tolerance=2.0))
    assert verdict.holds is holds
    assert verdict.slope == pytest.approx(-rate, abs=0.02)


def test_existence_needs_one_witness():
    verdict = single(toy("existence", lambda normal, x: (1.9, x)), 1)
    assert verdict.holds
    assert 0 < verdict.share < 0.5
    assert not single(toy("existence", lambda normal, x: (2.1, x)), 1).holds


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_fails(value):
    instance = _examine(toy(sides=lambda normal, x: (x, value)), {"x": 1.0}, KEY)
    assert (instance.p_value, instance.error) == (0.0, "not finite")


def refuse(normal, x):
    if x > 2.5:
        raise ValueError("x must be nice")
    return 0.0, x


def test_an_error_is_a_failure_with_its_message():
    instance = _examine(toy("inequality", refuse), {"x": 2.7}, KEY)
    assert (instance.p_value, instance.error) == (0.0, "x must be nice")


def test_shapes_must_agree():
    with pytest.raises(TypeError, match="shape"):
        _examine(toy(sides=lambda normal, x: (x, np.ones(2))), {"x": 1.0}, KEY)


def test_holm_is_the_step_down_procedure():
    """Against its definition by adjusted p-values, max over j ≤ i of (m − j + 1) p_(j), on random families."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        p = generator.uniform(size=8) ** 3
        order = np.argsort(p)
        adjusted = np.maximum.accumulate(p[order] * np.arange(8, 0, -1))
        rejected = np.zeros(8, bool)
        rejected[order] = adjusted <= 0.05
        assert ((p <= _holm(p, 0.05)) == rejected).all()
    assert _holm([0.0, 1.0], LEVEL) == 0.0
    assert _holm([], LEVEL) == 0.0


def test_points_fill_the_space():
    ranges = {
        "x": Parameter(low=0.0, high=1.0),
        "y": Parameter(low=1e-4, high=1.0, scale="log"),
        "k": Parameter(low=0, high=3, scale="whole"),
        "held": Parameter(low=2.0, high=2.0),
    }
    claim = toy(parameters=ranges)
    sampled = _points(claim, 64, KEY)
    for name, edges in (("x", np.linspace(0, 1, 9)), ("y", np.logspace(-4, 0, 9))):
        counts = np.histogram([point[name] for point in sampled], edges)[0]
        assert (counts == 8).all(), name  # stratified, where independent samples would not be
    assert sorted({point["k"] for point in sampled}) == [0, 1, 2, 3]
    assert all(type(point["k"]) is int and point["held"] == 2.0 for point in sampled)
    assert _points(claim, 64, KEY) == sampled
    assert _points(claim, 64, jax.random.key(1)) != sampled


@pytest.mark.parametrize(
    ("parameter", "end", "distance", "value"),
    [
        (Parameter(low=0.0, high=1.0, lowest=-1.0, highest=5.0), 5.0, 0.5, 3.0),
        (Parameter(low=0.0, high=1.0, lowest=-1.0, highest=5.0), -1.0, 0.5, -0.5),
        (Parameter(low=1.0, high=10.0, scale="log", highest=1000.0), 1000.0, 0.5, 100.0),
        (Parameter(low=1, high=2, scale="whole", highest=4), 4, 1e-6, 2),
        (Parameter(low=1, high=2, scale="whole", highest=4), 4, 1.0, 4),
    ],
)
def test_walks_start_at_the_edge(parameter, end, distance, value):
    assert parameter.beyond(distance, end) == pytest.approx(value)
    assert parameter.beyond(1.0, end) == pytest.approx(end)
    assert end in parameter.ends


def test_normals_are_standard_and_new_at_each_call():
    normal = _normals(KEY)
    first, second = normal(20_000), normal(20_000)
    assert scipy.stats.kstest(first, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 20_000**0.5
    np.testing.assert_array_equal(_normals(KEY)(20_000), first)


def test_the_search_finds_the_worst_instance():
    """A violation that a few points miss: found by refining around the worst of them."""
    unit = {"x": Parameter(low=0.0, high=1.0), "y": Parameter(low=0.0, high=1.0)}
    claim = toy("inequality", lambda normal, x, y: (0.0, (x - 0.7) ** 2 + (y - 0.3) ** 2 - 1e-3), unit)
    assert single(claim, 8).holds
    found = falsify(claim, Effort(points=8, refinements=60, walks=1), 0)
    assert not found.holds
    assert (found.worst.values["x"], found.worst.values["y"]) == pytest.approx((0.7, 0.3), abs=0.05)
    assert _boundaries_text(found) == "no assumption to leave"


def test_the_walk_finds_the_boundary():
    """True on [0, 2.5], assumed on [1, 2]."""
    found = falsify(toy("inequality", lambda normal, x: (0.0, (x + 1e-9) * (2.5 - x))), EFFORT, 0)
    assert found.holds
    below, above = found.boundaries
    assert below.holds_to == pytest.approx(0.0, abs=0.02) == below.fails_at
    assert above.holds_to < 2.5 <= above.fails_at
    assert above.holds_to == pytest.approx(2.5, abs=0.01) == above.fails_at
    assert above.share == below.share == 1


def test_an_assumption_that_is_needed_exactly():
    held = {"x": Parameter(low=0.0, high=0.0, highest=1.0)}
    found = falsify(toy(sides=lambda normal, x: (1.0, 1.0 + x), parameters=held, tolerance=1e-9), EFFORT, 0)
    assert found.holds
    (boundary,) = found.boundaries
    assert (boundary.parameter, boundary.at_once, boundary.share) == ("x", True, 1)
    assert _boundaries_text(found) == "needs x = 0"


def test_a_claim_without_boundary_says_so():
    found = falsify(toy("inequality", lambda normal, x: (0.0, 1.0)), EFFORT, 0)
    assert found.holds
    assert all(boundary.fails_at is None for boundary in found.boundaries)
    assert _boundaries_text(found) == "no boundary found (x to -1, x to 3)"


def test_what_the_library_refuses_is_told():
    above = falsify(toy("inequality", refuse), EFFORT, 0).boundaries[1]
    assert above.fails_at == pytest.approx(2.5, abs=0.02)
    assert above.refused == "x must be nice"


def test_where_a_claim_of_existence_holds_is_mapped():
    found = falsify(toy("existence", lambda normal, x: (1.7, x)), EFFORT, 0)
    assert found.holds
    assert found.worst.severity == pytest.approx(0.7, abs=0.05)
    below, above = found.boundaries
    assert below.fails_at == pytest.approx(1.7, abs=0.05)
    assert above.fails_at is None


def test_json_is_complete(capsys):
    command(("O3",), instances=2, seed=4, json=True, falsify=True, quick=True)
    result = json.loads(capsys.readouterr().out)
    assert (result["holds"], result["seed"], result["level"]) == (True, 4, LEVEL)
    first = result["claims"][0]
    assert (first["id"], first["kind"], first["instances"], first["verdict"]) == ("O3", "identity", 2, "holds")
    assert 0 <= first["worst"]["severity"] < 1e-8
    assert "pretrain_size" in first["worst"]["values"]
    assert [entry["id"] for entry in result["attacks"]] == ["O3", "O3.less"]
    assert result["attacks"][0]["boundary_found"]


def test_table_names_claim_source_worst_and_verdict(capsys):
    command(("O3",), instances=1)
    text = capsys.readouterr().out
    for word in ("O3.less", "paper 2506.01901", "residual", "margin", "holds", "2 of 2 claims hold"):
        assert word in text


def test_exit_code_and_message_when_a_claim_fails(monkeypatch, capsys):
    monkeypatch.setattr(sims.verify, "all_claims", lambda: (toy(sides=lambda normal, x: (2 * x, x)),))
    with pytest.raises(SystemExit) as stopped:
        command(instances=1)
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    assert "FAILS" in text
    assert "toy: A toy." in text
    assert "fails at x = 1." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": ("X7",)}, "ID must be among S0.spectra, "),
        ({"instances": 0}, "--instances must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be between 0 and"),
        ({"seed": 2**32}, "--seed must be between 0 and"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        command(arguments.pop("ids", ()), **arguments)


def test_the_command_is_light_until_it_runs():
    heavy = ("jax", "numpy", "scipy", "rich")
    code = f"import sys, figures.commands.verify; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
