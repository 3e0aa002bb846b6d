"""Fitting L(τ): against polyfit, against Monte Carlo, and reading what evaluations look like."""

import json

import numpy as np
import pytest

from linfit.bridge import fit_curve
from linfit.bridge.curve import read_evaluations

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
            curve = fit_curve(TAUS, samples)
        else:
            curve = fit_curve(TAUS, truth(TAUS) + 0.01 * generator.standard_normal(5), np.full(5, 0.01))
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
    chosen = curve.next_tau()

    def error_after(tau):
        more = np.append(taus, tau)
        return fit_curve(more, truth(more), np.full(4, 0.05)).best_tau_error

    assert error_after(chosen) <= min(error_after(tau) for tau in np.linspace(0.03, 0.97, 30)) + 1e-9
    assert error_after(chosen) < curve.best_tau_error


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
    if form == "csv":
        path.write_text(
            "tau,loss,loss_stderr,acc\n" + "\n".join(",".join(str(v) for v in row.values()) for row in rows)
        )
    else:
        path.write_text(json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows)))
    found = read_evaluations([str(path)], "loss")
    np.testing.assert_allclose(found.values, truth(np.array([0, 0.5, 1])))
    np.testing.assert_allclose(found.standard_errors, 0.1)
    assert read_evaluations([str(path)], "acc").standard_errors is None
    with pytest.raises(ValueError, match="needs columns tau and f1, found tau, loss"):
        read_evaluations([str(path)], "f1")


def test_harness_results(tmp_path):
    for tau in (0.0, 0.5, 1.0):
        folder = tmp_path / f"run{tau}" / "model"
        folder.mkdir(parents=True)
        results = {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5 + tau / 10, "acc_stderr,none": 0.02}}
        (folder / "results_2025.json").write_text(json.dumps({"results": results}))
    found = read_evaluations([f"{tau}={tmp_path}/run{tau}" for tau in (0.0, 0.5, 1.0)], "arc_easy/acc")
    np.testing.assert_allclose(found.values, [0.5, 0.55, 0.6])
    np.testing.assert_allclose(found.standard_errors, 0.02)
    with pytest.raises(ValueError, match=r"no metric 'arc_easy/f1'; there are .*arc_easy/acc"):
        read_evaluations([f"0={tmp_path}/run0.0"], "arc_easy/f1")
    with pytest.raises(ValueError, match="TAU=FILE"):
        read_evaluations(["a.json", "b.json"], "x")


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
