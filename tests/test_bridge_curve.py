"""Fitting L(τ): against polyfit, against Monte Carlo, and reading what evaluations look like."""

import json

import numpy as np
import pytest

from figures.commands import checkpoints
from linfit.bridge import fit_curve, read_evaluations

TAUS = np.array([0.0, 0.3, 0.5, 0.8, 1.0])


def truth(tau):
    return 2.0 - 1.2 * tau + 0.9 * tau**2


def test_fit_equals_polyfit(generator):
    values, errors = truth(TAUS) + 0.01 * generator.standard_normal(5), generator.uniform(0.005, 0.02, 5)
    curve = fit_curve(TAUS, values, errors)
    coefficients, covariance = np.polyfit(TAUS, values, 2, w=1 / errors, cov="unscaled")
    np.testing.assert_allclose(curve.coefficients, coefficients[::-1], rtol=1e-9)
    np.testing.assert_allclose(curve.covariance, covariance[::-1, ::-1], rtol=1e-8)


def test_three_exact_points_give_the_exact_minimum():
    curve = fit_curve([0, 0.5, 1], truth(np.array([0, 0.5, 1])))
    assert abs(curve.best_tau - 2 / 3) < 1e-12
    np.testing.assert_allclose(curve.gain_over_full[0], 0.9 * (1 / 3) ** 2, rtol=1e-10)
    assert "add one more" in curve.verdict


@pytest.mark.parametrize("paired", [False, True])
def test_error_of_the_best_tau_covers(seed, paired):
    """Pulls (τ̂ − τ*)/error have unit variance; p-values are uniform; both sides of the test."""
    generator, pulls, p_values = np.random.default_rng(seed), [], []
    for _ in range(400):
        if paired:
            samples = truth(TAUS)[:, None] + generator.standard_normal(300) + 0.2 * generator.standard_normal((5, 300))
        else:
            samples = truth(TAUS) + 0.01 * generator.standard_normal(5)
        curve = fit_curve(TAUS, samples, None if paired else np.full(5, 0.01))
        pulls.append((curve.best_tau - 2 / 3) / curve.best_tau_error)
        p_values.append(curve.p_value)
    assert abs(np.std(pulls) - 1) < 5 / 800**0.5
    assert abs(np.mean(p_values) - 0.5) < 5 * 12**-0.5 / 400**0.5


def test_what_is_not_a_quadratic_is_called_so():
    curve = fit_curve(TAUS, np.abs(TAUS - 0.5), np.full(5, 0.01))
    assert curve.p_value < 1e-6
    assert "not exactly a quadratic" in curve.verdict
    assert 0.3 <= curve.next_tau() <= 0.8


def test_a_concave_curve_has_no_best_tau():
    curve = fit_curve([0, 0.5, 1], [0.0, 1.0, 0.5], [0.1] * 3)
    assert np.isnan(curve.best_tau)
    assert "no minimum" in curve.verdict
    assert fit_curve([0, 0.5, 1], [0.0, 1.0, 0.5], [0.1] * 3, maximize=True).convex


def test_next_tau_shrinks_the_error_most():
    taus, errors = np.array([0.0, 0.5, 1.0]), np.full(3, 0.05)
    curve = fit_curve(taus, truth(taus), errors)
    more = [np.append(taus, tau) for tau in (curve.next_tau(), *np.linspace(0.03, 0.97, 30))]
    chosen, *others = [fit_curve(each, truth(each), np.full(4, 0.05)).best_tau_error for each in more]
    assert chosen <= min(others) + 1e-9
    assert chosen < curve.best_tau_error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [1, 2]), "at least 3 different"),
        (([0, 1, 1], [1, 2, 2]), "at least 3 different"),
        (([0, 0.5, 1], [1, 2]), "value must be"),
        (([0, 0.5, 1], [1, np.nan, 2]), "finite"),
        (([0, 0.5, 1], [1, 2, 3], [0.1, 0, 0.1]), "positive finite"),
        (([0, 0.5, 1], [1, 2, 3], [0.1, 0.1]), "standard_error must be 3"),
        (([0, 0.5, 1], np.ones((3, 2))), "more samples than"),
        (([0, 0.5, 1], np.ones((3, 9)), [1, 1, 1]), "one or the other"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_curve(*arguments)


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_tables(tmp_path, form):
    rows = [{"tau": t, "loss": float(truth(t)), "loss_stderr": 0.1, "acc": t} for t in (0, 0.5, 1)]
    path = tmp_path / f"table.{form}"
    csv = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    texts = {"csv": "\n".join(csv), "json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}
    path.write_text(texts[form])
    found = read_evaluations([str(path)], "loss")
    np.testing.assert_allclose(found.values, truth(np.array([0, 0.5, 1])))
    np.testing.assert_allclose(found.standard_errors, 0.1)
    assert read_evaluations([str(path)], "acc").standard_errors is None
    with pytest.raises(ValueError, match="needs columns tau and f1, found tau, loss"):
        read_evaluations([str(path)], "f1")


def harness_result(tau: float) -> dict:
    """What lm-evaluation-harness 0.4 writes to MODEL/results_DATE.json, as far as it matters here."""
    arc = {"alias": "arc_easy", "sample_len": 2376, "acc,none": 0.5 + tau / 10, "acc_stderr,none": 0.02}
    math = {
        "alias": "gsm8k", "sample_len": 1319,
        "exact_match,strict-match": 0.1 + tau / 5, "exact_match_stderr,strict-match": 0.01,
        "exact_match,flexible-extract": 0.2 + tau / 5, "exact_match_stderr,flexible-extract": 0.011,
    }  # fmt: skip
    text = {
        "alias": "wikitext", "sample_len": 62, "word_perplexity,none": truth(tau), "word_perplexity_stderr,none": "N/A",
    }  # fmt: skip
    group = {"alias": "mmlu", "sample_len": 14042, "acc,none": 0.4 - tau**2 / 10, "acc_stderr,none": 0.004}
    part = {**group, "alias": " - humanities", "name": "mmlu_humanities", "sample_len": 4705}
    return {
        "results": {"arc_easy": arc, "gsm8k": math, "wikitext": text, "mmlu": group, "mmlu_humanities": part,
                    "untagged": {" ": " ", "alias": "untagged"}},
        "groups": {"mmlu": group, "mmlu_humanities": part},
        "configs": {"arc_easy": {"task": "arc_easy", "metric_list": [{"metric": "acc", "higher_is_better": True}]}},
        "higher_is_better": {"arc_easy": {"acc": True}, "gsm8k": {"exact_match": True}, "mmlu": {"acc": True},
                             "mmlu_humanities": {"acc": None}, "wikitext": {"word_perplexity": False}},
        "config": {"model": "hf", "model_args": f"pretrained=runs/tau_{tau:g}"}, "lm_eval_version": "0.4.9",
    }  # fmt: skip


@pytest.fixture
def harness(tmp_path):
    """`TAU=FOLDER` of three evaluations; the first one ran twice, the latest counts."""
    for tau in (0.0, 0.5, 1.0):
        (folder := tmp_path / f"{tau}" / f"runs__tau_{tau:g}").mkdir(parents=True)
        (folder / "results_2026-03-01T10-00-00.123456.json").write_text(json.dumps(harness_result(tau), indent=2))
    stale = tmp_path / "0.0" / "runs__tau_0" / "results_2026-02-28T23-00-00.123456.json"
    stale.write_text(json.dumps(harness_result(7.0)))
    return [f"{tau}={tmp_path}/{tau}" for tau in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("metric", "values", "error", "larger"),
    [
        ("arc_easy/acc", [0.5, 0.55, 0.6], 0.02, True),
        ("arc_easy/acc,none", [0.5, 0.55, 0.6], 0.02, True),
        ("gsm8k/exact_match,flexible-extract", [0.2, 0.3, 0.4], 0.011, True),
        ("wikitext/word_perplexity", [2.0, 1.625, 1.7], None, False),
        ("mmlu/acc", [0.4, 0.375, 0.3], 0.004, True),
        ("mmlu_humanities/acc", [0.4, 0.375, 0.3], 0.004, None),
    ],
)
def test_harness_results(harness, metric, values, error, larger):
    found = read_evaluations(harness, metric)
    np.testing.assert_allclose(found.values, values)
    assert found.larger_is_better is larger
    np.testing.assert_array_equal(found.standard_errors, None if error is None else [error] * 3)


def test_harness_groups_that_are_not_repeated_among_the_results(tmp_path):
    content = harness_result(0.5)
    del content["results"]["mmlu"]
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert read_evaluations([f"0.5={tmp_path}/r.json"], "mmlu/acc").values == 0.375


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("arc_easy/f1", r"no metric 'arc_easy/f1'; there are mmlu/acc, mmlu_humanities/acc, arc_easy/acc, gsm8k/exact"),
        ("arc_easy/alias,none", "no metric"),
        ("loss", "no metric 'loss'"),
        ("gsm8k/exact_match", r"several filters; name one of gsm8k/exact_match,strict-match, gsm8k/exact_match,flex"),
        ("arc_easy/alias", "must be a finite number, got 'arc_easy'"),
    ],
)
def test_metrics_that_harness_results_do_not_have(harness, metric, message):
    with pytest.raises(ValueError, match=message):
        read_evaluations(harness, metric)


def test_harness_files_that_cannot_be_used(harness, tmp_path):
    (other := tmp_path / "0.0" / "another").mkdir()
    (other / "results_2026.json").write_text("{}")
    (tmp_path / "torn.json").write_text('{"results": {')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "nan.json").write_text(json.dumps({"results": {"t": {"acc,none": float("nan")}}}))
    (tmp_path / "empty").mkdir()
    for sources, message in (
        (harness, r"several models \(another, runs__tau_0\)"),
        ([f"0={tmp_path}/torn.json"], "torn.json: not JSON"),
        ([f"0={tmp_path}/list.json"], "an object `results`"),
        ([f"0={tmp_path}/nan.json"], "must be a finite number, got nan"),
        ([f"0={tmp_path}/empty"], r"no results\*.json"),
        (["a.json", "b.json"], "TAU=FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            read_evaluations(sources, "t/acc")


def test_harness_samples_are_paired_by_document_and_of_one_filter(tmp_path, generator):
    """What --log_samples writes: one line per document and filter, in any order."""
    right = generator.integers(0, 2, size=(3, 40)).astype(float)
    for tau, row in zip((0.0, 0.5, 1.0), right):
        lines = [
            {"doc_id": k, "doc": {}, "target": "x", "resps": [["y"]], "filter": kind, "metrics": ["exact_match"],
             "doc_hash": "d", "prompt_hash": "p", "target_hash": "t", "exact_match": value if kind == "strict" else 1.0}
            for k, value in enumerate(row) for kind in ("strict", "flexible")
        ]  # fmt: skip
        generator.shuffle(lines)
        (tmp_path / f"{tau}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = [f"{tau}={tmp_path}/{tau}.jsonl" for tau in (0.0, 0.5, 1.0)]
    np.testing.assert_array_equal(read_evaluations(sources, "gsm8k/exact_match,strict").values, right)
    with pytest.raises(ValueError, match="name one of exact_match,flexible, exact_match,strict"):
        read_evaluations(sources, "exact_match")
    with pytest.raises(ValueError, match="needs a number `acc`"):
        read_evaluations(sources, "acc,strict")


def test_curve_takes_the_direction_from_the_results(harness, capsys):
    checkpoints.curve(tuple(harness), metric="mmlu/acc", json=True)
    printed = capsys.readouterr()
    fit = json.loads(printed.out)["metrics"][0]
    assert fit["maximize"]
    assert abs(fit["best_tau"]) < 1e-9
    assert "mmlu/acc is better when larger" in printed.err
    with pytest.raises(ValueError, match="word_perplexity is better when smaller"):
        checkpoints.curve(tuple(harness), metric="wikitext/word_perplexity", maximize=True)
    checkpoints.curve(tuple(harness), metric="wikitext/word_perplexity", json=True)
    assert abs(json.loads(capsys.readouterr().out)["metrics"][0]["best_tau"] - 2 / 3) < 1e-9


def test_losses_are_paired(tmp_path, generator):
    hard = generator.exponential(size=50)
    for tau in (0, 0.5, 1):
        lines = [json.dumps({"loss": h + float(truth(tau))}) for h in hard[:-1]] + [json.dumps({"loss": None})]
        (tmp_path / f"{tau}.jsonl").write_text("\n".join(lines))
    found = read_evaluations([f"{tau}={tmp_path}/{tau}.jsonl" for tau in (0, 0.5, 1)], "loss")
    assert found.values.shape == (3, 49)
    curve = fit_curve(found.taus, found.values)
    assert abs(curve.best_tau - 2 / 3) < 1e-9
    assert curve.best_tau_error < 1e-6
