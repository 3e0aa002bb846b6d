"""§8 as claims: averages, curves, signal and noise of checkpoints, on synthetic deltas (docs, B1–B4)."""

import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.integrate
import scipy.stats

from linfit.bridge import fit_curve, merge, noise_level, optimal_shrinkage, perturb, split_deltas
from sims.claims import Normal, Sides, asymptotic, identity, statistical
from sims.claims.problems import parabola
from sims.parameters import TAU, Parameter


def _write(folder: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A checkpoint of float32 tensors, byte by byte."""
    header, start = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [start, start + 4 * value.size]}
        start += 4 * value.size
    text = json.dumps(header).encode()
    folder.mkdir()
    data = b"".join(value.astype("<f4").tobytes() for value in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return folder


def _read(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of such a checkpoint."""
    raw = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


METHODS: tuple[Any, ...] = ("linear", "shrink", "rank", "singular")


@identity(
    "B1.merge",
    "Merged checkpoints are the base plus a filter on the delta, tensor by tensor: averages, shrinkage, truncation.",
    R"\theta_\tau = \theta + \tau\textstyle\sum_i g(s_i)\,s_iu_iv_i^\top",
    source="paper 2506.01901 (averages); Gavish & Donoho 2017 (singular); ours (shrink)",
    parameters={
        "method": Parameter(low=0, high=3, scale="whole"),
        "tau": TAU.within(0.05, 1.5),
        "signal": Parameter(low=0.5, high=2.0, scale="log"),
        "rank": Parameter(low=1, high=5, scale="whole"),
        "drift": Parameter(highest=1.0),
    },
    tolerance=1e-5,
)
def b1_merge(normal: Normal, method: int, tau: float, signal: float, rank: int, drift: float) -> Sides:
    """A matrix (24, 16) and a vector (16,) of a merge of two runs, minus the base; `drift` moves the base's double."""
    left, right = normal(24, 2), normal(16, 2)
    common = {"w": signal * left @ right.T, "b": signal * right[:, 0]}
    base = {"w": normal(24, 16), "b": normal(16)}
    base = {name: value.astype(np.float32).astype(float) for name, value in base.items()}
    runs = [{name: base[name] + common[name] + normal(*base[name].shape) for name in base} for _ in range(2)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tuned = [_write(root / f"run{k}", run) for k, run in enumerate(runs)]
        options: dict[str, Any] = {"rank": rank} if METHODS[method] == "rank" else {}
        out, twice = root / "out", [tau, tau / 2]
        written = merge(
            _write(root / "base", base), tuned, out, tau=twice, method=METHODS[method], workers=1, **options
        )
        merged = [_read(Path(folder)) for folder in written.folders]
    predicted, measured = [], []
    for name in base:
        deltas = [run[name] - (1 + drift) * base[name] for run in runs]
        moved = _filtered(METHODS[method], deltas, rank)
        for at, found in zip(twice, merged):
            predicted.append(np.ravel(found[name] - base[name]))
            measured.append(np.ravel(at * moved))
    return np.concatenate(predicted), np.concatenate(measured)


def _filtered(method: str, deltas: list[np.ndarray], rank: int) -> np.ndarray:
    """g on the mean of two deltas, by a full decomposition."""
    mean = (deltas[0] + deltas[1]) / 2
    if method == "shrink":
        variance = np.sum((deltas[0] - deltas[1]) ** 2) / 2
        signal = max(np.sum(mean**2) - variance / 2, 0.0)
        return signal / (signal + variance / 2) * mean
    if method == "linear" or mean.ndim == 1:
        return mean
    U, s, V = np.linalg.svd(mean, full_matrices=False)
    kept = np.where(np.arange(s.size) < rank, s, 0)
    if method == "singular":
        kept = _shrunk(
            s, mean.shape, np.median(s) / (max(mean.shape) * _median(min(mean.shape) / max(mean.shape))) ** 0.5
        )
    return U * kept @ V


def _median(aspect: float) -> float:
    """Of the Marchenko–Pastur law with p/n = β ≤ 1: where its distribution function, integrated on a grid, is ½."""
    low, high = (1 - aspect**0.5) ** 2, (1 + aspect**0.5) ** 2
    angle = np.linspace(1e-12, np.pi / 2, 4001)
    x = low + (high - low) * np.sin(angle) ** 2
    density = (high - low) ** 2 * (np.sin(angle) * np.cos(angle)) ** 2 / (np.pi * aspect * x)  # in the angle
    below = scipy.integrate.cumulative_simpson(density, x=angle, initial=0)
    return float(np.interp(0.5, below, x))


def _shrunk(s: np.ndarray, shape: tuple[int, ...], noise_std: float) -> np.ndarray:
    """What noise makes of a singular value x, y² = (x + 1/x)(x + β/x), undone, times both cosines."""
    aspect, unit = min(shape) / max(shape), noise_std * max(shape) ** 0.5
    y = s / unit
    above = y > 1 + aspect**0.5
    half = np.where(above, y**2 - 1 - aspect, 3.0) / 2
    x = np.sqrt(half + np.sqrt(np.maximum(half**2 - aspect, 0)))
    left, right = (x**4 - aspect) / (x**4 + aspect * x**2), (x**4 - aspect) / (x**4 + x**2)
    return np.where(above, unit * x * np.sqrt(left * right), 0)


@identity(
    "B1",
    "The best τ of a fitted quadratic, its gain and their errors to first order.",
    R"\tau^* = -b/2c,\quad L(1)-L(\tau^*) = c(1-\tau^*)^2,\quad \mathrm{se}^2 = \nabla^\top C\,\nabla",
    parameters={
        "optimum": Parameter(low=0.2, high=0.9),
        "curvature": Parameter(low=0.5, high=5.0, scale="log"),
        "noise_std": Parameter(low=1e-3, high=3e-2, scale="log"),
        "form": Parameter(low=0, high=2, scale="whole"),
        "cubic": Parameter(highest=1.0),
    },
    tolerance=1e-4,
)
def b1(normal: Normal, optimum: float, curvature: float, noise_std: float, form: int, cubic: float) -> Sides:
    """τ*, L there and at 1.2, the gain, their errors, χ² and its p-value; from means (two ways) or samples.

    Errors are those of a fit by `numpy.polyfit` whose data are moved a little, one after another; `cubic` bends the
    measured fit.
    """
    taus, n = np.array([0.0, 0.3, 0.6, 0.9, 1.1]), 40
    exact = 1 + curvature * (taus - optimum) ** 2
    errors = noise_std * np.exp(0.5 * normal(5))
    if form == 2:
        data = exact[:, None] + noise_std * (normal(5, n) + 3 * normal(n))
        curve = fit_curve(taus, data)
    else:
        data = exact + errors * normal(5)
        curve = fit_curve(taus, data, errors if form == 1 else None)
    weights = 1 / errors if form == 1 else np.ones(5)

    def numbers(values: np.ndarray) -> np.ndarray:
        c, b, a = np.polyfit(taus, values + cubic * taus**3, 2, w=weights)
        tau = -b / (2 * c)
        return np.array([tau, a + b * tau + c * tau**2, a + 1.2 * b + 1.44 * c, c * (1 - tau) ** 2])

    mean = data.mean(axis=1) if form == 2 else data
    centre, step = numbers(mean), 1e-5
    slopes = np.stack([(numbers(mean + step * e) - numbers(mean - step * e)) / (2 * step) for e in np.eye(5)], axis=1)
    c, b, a = np.polyfit(taus, mean, 2, w=weights)
    residual = mean - (a + b * taus + c * taus**2)
    spread = {0: np.eye(5) * (residual @ residual) / 2, 1: np.diag(errors**2), 2: np.cov(data) / n if form == 2 else 0}[
        form
    ]
    error = np.sqrt(np.diag(slopes @ spread @ slopes.T))
    gain, gain_error = curve.gain_over_full
    known: list[Any] = [
        curve.best_tau,
        curve(curve.best_tau),
        curve(1.2),
        gain,
        curve.best_tau_error,
        curve.error(1.2),
        gain_error,
    ]
    found = [*centre, *error[[0, 2, 3]]]
    if form == 1:
        square = np.sum((residual / errors) ** 2)
        known, found = [*known, curve.chi_square, curve.p_value], [*found, square, scipy.stats.chi2.sf(square, 2)]
    return np.array([float(x) for x in known]) / found, np.ones(len(found))


@identity(
    "B2",
    "What K runs share and how they differ, and the τ that shrinks one run, or their average, best.",
    R"\hat V = \tfrac{1}{K-1}\textstyle\sum_k\|\delta_k-\bar\delta\|^2,\quad "
    R"\tau^* = \frac{\max(\|\bar\delta\|^2-\hat V/K,\,0)}{\max(\|\bar\delta\|^2-\hat V/K,\,0)+\hat V/a}",
    parameters={
        "runs": Parameter(low=2, high=6, scale="whole"),
        "signal": Parameter(low=0.0, high=3.0),
        "other_noise": Parameter(low=1.0, high=1.0, highest=2.0),
    },
    tolerance=1e-9,
)
def b2(normal: Normal, runs: int, signal: float, other_noise: float) -> Sides:
    """‖δ̄‖², V̂, the signal and its ratio to V̂, τ of one run and of their average: the vertex of their expected error."""
    deltas = signal * normal(12) + normal(runs, 12)
    split: Any = split_deltas([{"w": delta.reshape(3, 4)} for delta in deltas])["w"]  # type: ignore[index]
    mean = deltas.mean(axis=0)
    variance = other_noise * sum(np.sum((delta - mean) ** 2) for delta in deltas) / (runs - 1)
    shared, taus = max(mean @ mean - variance / runs, 0), []
    for averaged in (1, runs):
        _, slope, curvature = parabola(lambda tau, a=averaged: shared * (1 - tau) ** 2 + tau**2 * variance / a)
        taus.append(slope / curvature)
    known = [
        split.mean_square,
        split.variance,
        1 + split.signal,
        1 + split.signal_to_noise,
        1 + split.tau(),
        1 + split.tau(runs),
    ]
    found = [mean @ mean, variance, 1 + shared, 1 + shared / variance, 1 + taus[0], 1 + taus[1]]
    return np.array(known) / found, np.ones(6)


@statistical(
    "B2.unbiased",
    "Both are unbiased for runs that differ by independent noise.",
    R"\mathbb E\,\hat V = \mathbb E\|\delta_k - m\|^2,\quad \mathbb E(\|\bar\delta\|^2-\hat V/K) = \|m\|^2",
    parameters={
        "runs": Parameter(low=2, high=6, scale="whole"),
        "signal": Parameter(low=0.5, high=3.0),
        "noise_std": Parameter(low=0.3, high=3.0, scale="log"),
        "correlation": Parameter(highest=0.9),
    },
)
def b2_unbiased(normal: Normal, runs: int, signal: float, noise_std: float, correlation: float) -> Sides:
    """V̂ and the signal before the max, in units of the noise, for 1,000 families of 64 weights."""
    replicates, size = 1000, 64
    mean = signal * noise_std * np.resize([1.0, -1.0], size)
    noise = (1 - correlation) ** 0.5 * normal(replicates, runs, size) + correlation**0.5 * normal(replicates, 1, size)
    families = mean + noise_std * noise
    splits: Any = split_deltas([{str(r): families[r, k] for r in range(replicates)} for k in range(runs)])
    found = [[split.variance, split.mean_square - split.variance / runs] for split in splits.values()]
    return np.array([1.0, signal**2]), np.array(found) / (size * noise_std**2)


NOISE_SIZES = (32, 64)


@identity(
    "B3",
    "The noise edge and the optimal shrinkage of singular values, in the terms in which they were derived.",
    R"\hat\sigma = s_\mathrm{med}/\sqrt{M\mu_\beta},\quad \eta = x\,c\,\tilde c,\quad "
    R"y^2 = (x+\tfrac1x)(x+\tfrac\beta x)",
    source="Gavish & Donoho 2017",
    parameters={
        "long": Parameter(low=20, high=400, scale="whole"),
        "aspect": Parameter(low=0.05, high=1.0),
        "noise_std": Parameter(low=0.1, high=10.0, scale="log"),
        "other_noise": Parameter(low=1.0, high=1.0, highest=1.5),
    },
    tolerance=1e-5,
)
def b3(normal: Normal, long: int, aspect: float, noise_std: float, other_noise: float) -> Sides:
    """σ̂ and the edge of given singular values, and η of 30 of them around it."""
    short = max(1, round(aspect * long))
    shape = (short, long)
    edge = noise_std * (long**0.5 + short**0.5)
    s = edge * np.sort(np.abs(1 + 0.5 * normal(31)))[::-1]
    noise = noise_level(s, shape)
    sigma = float(np.median(s)) / (long * _median(short / long)) ** 0.5
    known = [noise.entry_std, noise.edge / (long**0.5 + short**0.5)]
    shrunk, wanted = optimal_shrinkage(s, shape, noise_std), _shrunk(s, shape, other_noise * noise_std)
    return np.array([*np.array(known) / sigma, *shrunk / edge]), np.array([1, 1, *wanted / edge])


@asymptotic(
    "B3.noise",
    "The noise level is found from the median singular value, also under a signal of low rank.",
    R"s_\mathrm{med}/\sqrt{M\mu_\beta} \to \sigma",
    source="Gavish & Donoho 2017",
    parameters={
        "aspect": Parameter(low=0, high=2, scale="whole"),
        "signal": Parameter(low=1.5, high=4.0),
        "rank_share": Parameter(highest=0.5),
    },
    tolerance=1.2,
    sizes=NOISE_SIZES,
)
def b3_noise(normal: Normal, aspect: int, signal: float, rank_share: float) -> Sides:
    """σ̂/σ without and with a signal of rank 1 (or a share of the rank), for 16 matrices of each size."""
    predicted, measured = [], []
    for long in NOISE_SIZES:
        short = (long // 4, long // 2, long)[aspect]
        noise = normal(16, short, long)
        rank = max(1, round(rank_share * short))
        factors = np.linalg.qr(normal(short, rank))[0], np.linalg.qr(normal(long, rank))[0]
        spiked = noise + 4 * signal * long**0.5 * (factors[0] @ factors[1].T)
        values = [np.linalg.svd(matrix, compute_uv=False) for matrix in (noise, spiked)]
        measured.append(np.array([[noise_level(s, (short, long)).entry_std for s in part] for part in values]).T)
        predicted.append(np.ones(2))
    return predicted, measured


@asymptotic(
    "B3.signal",
    "The shrunken singular value is what its singular vectors have in common with the signal: no other has less loss.",
    R"\eta(s_i) \asymp u_i^\top S v_i = \arg\min_\eta \|S - \eta\,u_iv_i^\top\|_F",
    source="Gavish & Donoho 2017",
    parameters={
        "aspect": Parameter(low=0, high=2, scale="whole"),
        "signal": Parameter(low=2.0, high=5.0),
        "anisotropy": Parameter(highest=1.0),
    },
    tolerance=2.0,
    sizes=NOISE_SIZES,
)
def b3_signal(normal: Normal, aspect: int, signal: float, anisotropy: float) -> Sides:
    """η(s₁) − u₁ᵀSv₁ for 16 matrices of each size, S of rank one, relative to its own; the noise known.

    With `anisotropy` the noise is larger in some rows.
    """
    predicted, measured = [], []
    for long in NOISE_SIZES:
        short = (long // 4, long // 2, long)[aspect]
        scale = np.exp(anisotropy * normal(short))[:, None]
        u, v = (np.linalg.qr(normal(size, 1))[0] for size in (short, long))
        strength = signal * long**0.5
        U, s, V = np.linalg.svd(strength * u @ v.T + scale * normal(16, short, long), full_matrices=False)
        common = (U[:, :, 0] @ u)[:, 0] * (V[:, 0] @ v)[:, 0]
        predicted.append(np.ones(1))
        eta = np.stack([optimal_shrinkage(values, (short, long), 1.0)[:1] for values in s])
        measured.append(1 + eta / strength - common[:, None])
    return predicted, measured


@statistical(
    "B4",
    "Noise on a checkpoint has the relative size it is asked for, or that of the initialisation in matrices only.",
    R"W \mapsto W + \gamma\,\tfrac{\|W\|_F}{\sqrt{mn}}\,Z,\quad \mathbb E Z = 0,\ \mathbb E Z^2 = 1",
    source="paper 2503.19206 (experiment)",
    parameters={
        "gamma": Parameter(low=0.01, high=0.5, scale="log"),
        "initial": Parameter(low=0, high=1, scale="whole"),
        "size": Parameter(low=0.1, high=10.0, scale="log"),
        "lost": Parameter(highest=0.9),
    },
)
def b4(normal: Normal, gamma: float, initial: int, size: float, lost: float) -> Sides:
    """Z and Z² of a matrix, at γ; Z of γ minus that of 2γ with the same seed; what a vector gains at `init_scale`."""
    w, vector = size * normal(256, 512), normal(256 * 512)
    seed = int(1e6 * abs(normal(1)[0]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = _write(root / "model", {"w": w, "b": vector})
        scale: dict[str, Any] = {"init_scale": 0.1 * size} if initial else {}
        written = perturb(folder, root / "out", gamma=[gamma, 2 * gamma], seed=seed, workers=1, **scale)
        noisy = [_read(Path(each)) for each in written.folders]
    unit = 0.1 * size if initial else (np.mean(w**2)) ** 0.5
    one, two = ((found["w"] - w.astype(np.float32)) / (unit * at) for found, at in zip(noisy, (gamma, 2 * gamma)))
    of_vector = (noisy[0]["b"] - vector.astype(np.float32)) / (gamma * np.mean(vector**2) ** 0.5)
    kept = np.arange(w.size).reshape(w.shape) >= lost * w.size
    parts = [kept * one, kept * one**2, one * two - one**2, of_vector**2]
    measured = np.stack([np.reshape(part, (2048, -1)).mean(axis=1) for part in parts], axis=-1)
    return np.array([0.0, 1.0, 0.0, 0.0 if initial else 1.0]), measured
