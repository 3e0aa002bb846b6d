"""Spectra of deltas: random-matrix facts by simulation, optimality by brute force, splits by Monte Carlo."""

from functools import partial

import numpy as np
import pytest
import scipy.optimize

from linfit.bridge import delta_singular_values, inspect, noise_level, optimal_shrinkage
from linfit.bridge.delta import split_of
from linfit.bridge.signal import marchenko_pastur_median, shrinkage, truncation
from linfit.bridge.spectrum import most_directions, spectrum_of
from tests.bridge_checkpoints import write_single


@pytest.mark.parametrize("aspect", [0.1, 0.5, 1.0])
def test_marchenko_pastur_median_is_that_of_a_large_noise_matrix(aspect, generator):
    n = 600
    noise = generator.standard_normal((n, round(aspect * n)))
    values = np.linalg.svd(noise, compute_uv=False) ** 2 / n
    assert abs(np.median(values) - marchenko_pastur_median(aspect)) < 0.02


@pytest.mark.parametrize(("aspect", "published"), [(1.0, 2.8582), (0.5, 2.1711)])
def test_median_gives_the_published_optimal_threshold(aspect, published):
    """ω(β) = λ*(β)/√μ_β of Gavish & Donoho (2014): 4/√3 at β = 1 becomes 2.858 for unknown noise."""
    threshold = (2 * (aspect + 1) + 8 * aspect / (aspect + 1 + (aspect**2 + 14 * aspect + 1) ** 0.5)) ** 0.5
    assert abs(threshold / marchenko_pastur_median(aspect) ** 0.5 - published) < 2e-3


def test_noise_edge_bounds_noise_and_finds_spikes(generator):
    shape = (500, 300)
    noise = 0.3 * generator.standard_normal(shape)
    level = noise_level(np.linalg.svd(noise, compute_uv=False), shape)
    assert abs(level.entry_std - 0.3) < 0.005
    assert np.linalg.norm(noise, 2) < 1.02 * level.edge
    a, b = (np.linalg.qr(generator.standard_normal((size, 3)))[0] for size in shape)
    s = np.linalg.svd(noise + 40 * a @ b.T, compute_uv=False)
    assert (s > 1.02 * noise_level(s, shape).edge).sum() == 3


@pytest.mark.parametrize("shape", [(160, 100), (100, 160)])
def test_optimal_shrinkage_is_the_best_of_all_gains(shape, generator):
    """One spike x in noise: η(y) is what minimises ‖η u vᵀ − x a bᵀ‖² over η, found by brute force."""
    differences, changes = [], []
    for _ in range(15):
        a, b = (v / np.linalg.norm(v) for v in (generator.standard_normal(size) for size in shape))
        signal = 25 * np.outer(a, b)
        u, s, vt = np.linalg.svd(signal + generator.standard_normal(shape), full_matrices=False)
        top = np.outer(u[:, 0], vt[0])
        best = scipy.optimize.minimize_scalar(lambda eta, top=top, signal=signal: np.sum((eta * top - signal) ** 2)).x
        shrunk = optimal_shrinkage(s, shape, 1.0)
        differences.append(shrunk[0] - best)
        changes.append(s[0] - best)
        assert (shrunk[5:] == 0).all()
    assert abs(np.mean(differences)) < 5 * np.std(differences) / 15**0.5
    assert np.mean(changes) > 5


@pytest.fixture(params=["exact", "krylov"])
def tiny_budget(request, monkeypatch):
    """The same matrices through their Gram matrix, and as if they were too large for one."""
    if request.param == "krylov":
        monkeypatch.setattr("linfit.bridge.spectrum.EXACT_SIDE", 16)
    return request.param


def spiked(generator, shape, spikes, size):
    a, b = (np.linalg.qr(generator.standard_normal((side, spikes)))[0] for side in shape)
    strengths = size * np.linspace(1, 3, spikes)
    return (generator.standard_normal(shape) + (a * strengths) @ b.T).astype(np.float32)


@pytest.mark.parametrize("spikes", [6, 30])
def test_filters_equal_those_of_a_full_decomposition(tiny_budget, spikes, generator):
    shape = (900, 700)
    delta = spiked(generator, shape, spikes, 120.0)
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    blocks = partial(np.array_split, delta, 7)
    kept = truncation(blocks, 700, spikes - 2)
    expected = (u[:, : spikes - 2] * s[: spikes - 2]) @ vt[: spikes - 2]
    error = np.linalg.norm(kept(delta) - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if tiny_budget == "exact" else 1e-4)
    filtered = shrinkage(blocks, shape)
    expected = (u * optimal_shrinkage(s, shape, noise_level(s, shape).entry_std)) @ vt
    error = np.linalg.norm(filtered(delta) - expected) / np.linalg.norm(expected)
    assert (filtered.gains.size, filtered.missed) == (spikes, 0)
    assert error < (1e-5 if tiny_budget == "exact" else 1e-2)
    assert error < 0.1 * np.linalg.norm(delta - expected) / np.linalg.norm(expected)  # doing nothing is far away


def test_large_spectra_agree_with_a_full_decomposition(tiny_budget, generator):
    """Top values to 1e-4; median (so the noise level) and moments to the error stated, 1% (in the mean of 1/√(n b))."""
    shape = (1100, 800)
    for delta in (spiked(generator, shape, 5, 100.0), generator.standard_normal(shape) * np.arange(1, 801) ** -0.5):
        s = np.linalg.svd(delta, compute_uv=False)
        found = spectrum_of(lambda delta=delta: iter(np.array_split(delta, 5)), 800, lambda values: 8)
        assert (found.resolved == 800) == (tiny_budget == "exact")
        np.testing.assert_allclose(found.singular_values[:8], s[:8], rtol=1e-4)
        np.testing.assert_allclose(np.median(found.singular_values), np.median(s), rtol=0.03)
        np.testing.assert_allclose(np.sum(found.singular_values**4), np.sum(s**4), rtol=0.02)
        assert (np.diff(found.singular_values) <= 0).all()
        np.testing.assert_allclose(found.directions.T @ found.directions, np.eye(8), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 3, 40])
def test_spectra_of_low_rank_end_early(tiny_budget, rank, generator):
    delta = (generator.standard_normal((400, rank)) @ generator.standard_normal((rank, 300))).astype(np.float32)
    found = spectrum_of(lambda: iter(np.array_split(delta, 3)), 300, lambda values: min(rank, 8))
    s = np.linalg.svd(delta, compute_uv=False)
    assert (found.singular_values[rank:] < 1e-3 * s[0] + 1e-12).all()
    np.testing.assert_allclose(found.singular_values[: min(rank, 8)], s[: min(rank, 8)], rtol=1e-4)
    assert shrinkage(lambda: iter([delta]), delta.shape) is None
    assert noise_level(s, delta.shape) == (0.0, 0.0)
    np.testing.assert_array_equal(optimal_shrinkage(s, delta.shape, 0.0), s)


def test_what_does_not_fit_into_memory_is_counted(monkeypatch, generator):
    """A basis of 64 directions for 50 that would be kept: the largest are, the others are counted."""
    monkeypatch.setattr("linfit.bridge.spectrum.EXACT_SIDE", 16)
    monkeypatch.setattr("linfit.bridge.spectrum.BASIS_BYTES", 4 * 600 * 64)
    delta = spiked(generator, (800, 600), 50, 120.0)
    filtered = shrinkage(lambda: iter([delta]), delta.shape)
    assert filtered.gains.size >= 32
    assert filtered.missed >= 0
    assert most_directions(600) == 32


def test_split_is_unbiased(seed):
    """Mean over many draws of signal (before the max) and variance, in standard errors."""
    generator = np.random.default_rng(seed)
    m, noise, runs = generator.standard_normal(30), 1.7, 3
    signals, variances = [], []
    for _ in range(3000):
        rows = m + noise * generator.standard_normal((runs, 30))
        split = split_of(rows @ rows.T)
        variances.append(split.variance)
        signals.append(split.mean_square - split.variance / runs)
    for estimates, truth in ((variances, 30 * noise**2), (signals, m @ m)):
        assert abs(np.mean(estimates) - truth) < 5 * np.std(estimates) / 3000**0.5


@pytest.mark.parametrize("averaged", [1, 4])
def test_suggested_tau_is_the_best_on_average(averaged, seed):
    generator = np.random.default_rng(seed)
    m, runs = generator.standard_normal(400), 4
    rows = m + 1.5 * generator.standard_normal((runs, 400))
    tau = split_of(rows @ rows.T).tau(averaged)
    used = rows[0] if averaged == 1 else rows.mean(axis=0)
    taus = np.linspace(0, 1, 401)
    best = taus[np.argmin([np.sum((t * used - m) ** 2) for t in taus])]
    assert abs(tau - best) < 0.08
    assert 0.2 < tau < 0.95


def test_inspection_of_known_deltas(tmp_path, generator):
    w = generator.standard_normal((60, 40)).astype(np.float32)
    u, _, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    inside = (u[:, :4] * [4, 3, 2, 1]) @ vt[:4]
    base = write_single(tmp_path / "base", {"h.0.w": w, "h.1.w": w, "norm": np.ones(5, np.float32)})
    moved = {"h.0.w": (w + inside).astype(np.float32), "h.1.w": w, "norm": np.float32([1, 1, 1, 1, 2])}
    tuned = write_single(tmp_path / "tuned", moved)
    inspection = inspect(base, tuned, subspace=4)
    reports = {report.name: report for report in inspection.tensors}
    first = reports["h.0.w"]
    assert first.kind == "h.*.w"
    np.testing.assert_allclose(first.delta_norm, 30**0.5, rtol=1e-5)
    np.testing.assert_allclose(first.relative_norm, 30**0.5 / np.linalg.norm(w), rtol=1e-5)
    np.testing.assert_allclose(first.effective_rank, 30**2 / (256 + 81 + 16 + 1), rtol=1e-4)
    np.testing.assert_allclose(first.top_singular_values, [4, 3, 2, 1], rtol=1e-4)
    assert first.overlap > 0.999
    assert (first.overlap_by_chance, first.noise_edge, first.signal_share) == (0.1, 0, 1)
    assert any(note.startswith("1 deltas of low rank") for note in inspection.notes)
    assert (reports["h.1.w"].delta_norm, reports["h.1.w"].effective_rank, reports["norm"].changed) == (0, None, 0.2)
    assert {entry["kind"] for entry in inspection.by_kind()} == {"h.*.w", "norm"}
    np.testing.assert_allclose(delta_singular_values(base, tuned, "h.0.w")[:4], [4, 3, 2, 1], rtol=1e-4)


@pytest.mark.slow
def test_inspection_of_several_real_runs(families):
    base, tuned = families["llama"]
    inspection = inspect(base, tuned)
    assert len(inspection.tensors) == 21
    for report in inspection.tensors:
        assert report.relative_norm > 0
        assert 0 <= report.suggested_tau <= report.suggested_tau_of_average <= 1
        if len(report.shape) == 2:
            assert 1 <= report.effective_rank <= min(report.shape)
            assert 0 <= report.signal_share <= 1


def test_bad_inspections(tmp_path):
    folder = write_single(tmp_path / "a", {"w": np.ones((3, 3), np.float32)})
    for tuned, options, message in (
        (folder, {"only": "x*"}, "fits no floating tensor"),
        (folder, {"subspace": 0}, "subspace must be at least 1"),
        ([], {}, "at least one fine-tuned"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect(folder, tuned, **options)
    assert "base and tuned are identical" in inspect(folder, folder).notes


def test_bad_arguments():
    for aspect in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="aspect must be in"):
            marchenko_pastur_median(aspect)
    with pytest.raises(ValueError, match="entry_std must be non-negative"):
        optimal_shrinkage(np.ones(3), (3, 3), -1.0)
    with pytest.raises(ValueError, match="at least 2 fine-tuned runs"):
        split_of(np.ones((1, 1)))
