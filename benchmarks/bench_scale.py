"""Time and memory of one streamed design against n and p, each size in a process of its own; and of sweeps.

    OPENBLAS_NUM_THREADS=1 NPROC=4 python benchmarks/bench_scale.py [--size N P]...
    python benchmarks/bench_scale.py --sweep [--quick]

A design is drawn in column blocks and reduced to both risk forms, then 60 penalties × 101 τ are evaluated. The problem
has Σ₁ = Σ₂ diagonal, an isotropic shift and a pretraining error, so two Gram matrices and three projections are needed.
The model fitted to the processor time is  seconds = a + b·np + c·n²p + d·n³ : compiling, drawing, Gram matrices,
eigendecomposition; no term is negative.

--sweep prints the share of the workers' time that is spent in kernels, and the processor time of the driver per task.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from json import dumps, loads
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

SIZES = [(n, p) for n in (250, 500, 1000) for p in (50_000, 200_000)]


def peak_bytes() -> int:
    """Peak resident memory of this process by its own account."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def measure(n: int, p: int) -> dict[str, float]:
    """One design, from a key to its risk surface."""
    import jax
    import jax.numpy as jnp

    from linfit import Ridge, aligned_problem, column_blocks, risk_forms, spectra

    jax.config.update("jax_enable_x64", True)
    before = peak_bytes()
    start, used = time.perf_counter(), time.process_time()
    problem = aligned_problem(spectra.power_law(p), pretrain_risk=0.1)
    forms = risk_forms(column_blocks(jax.random.key(0), problem, n), problem)
    jax.block_until_ready(forms)
    reduced, used = time.perf_counter() - start, time.process_time() - used
    filter, tau = Ridge(jnp.logspace(-5, 2, 60)), jnp.linspace(0, 1, 101)[:, None]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        surface = jax.block_until_ready([form(filter, tau).total for form in forms])
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(surface).all()
    return {
        "n": n, "p": p, "seconds": reduced, "processor": used, "surface": min(seconds),
        "runtime": before, "peak": peak_bytes(), "least_risk": float(surface[0].min()),
    }  # fmt: skip


def measure_sweeps(quick: bool) -> None:
    """Sweeps of a surface in this process and on local workers, between their fourth task and their last."""
    from sims.sweep.environment import SETTINGS

    os.environ.update(SETTINGS)
    from sims.sweep import Watcher, executors, run, sweep_over

    class Clock(Watcher):
        """Of every task: when it was stored, the processor time of this process until then, time in the kernel."""

        def __init__(self) -> None:
            self.rows: list[tuple[float, float, float]] = []

        def finished(self, seconds: np.ndarray, failures: list) -> None:
            self.rows.append((time.perf_counter(), time.process_time(), seconds.sum()))

    n, chunks, tasks, most = (30, (2,), 6, 1) if quick else (300, (4, 16), 20, 2)
    axes = {"n": n, "p": 10 * n, "penalty": "1e-4:1e2:60:log", "tau": "0:1:101", "noise_std": [0.1, 0.5, 1.0]}
    for chunk in chunks:
        sweep = sweep_over("overadaptation", axes, seeds=tasks * chunk, chunk=chunk)
        for workers in range(most + 1):
            clock = Clock()
            with tempfile.TemporaryDirectory() as folder:
                executor = executors.local(workers) if workers else None
                run(sweep, f"{folder}/a.zarr", executor=executor, watcher=clock)
            stored, used, kernels = np.array(clock.rows[3:]).T
            share = kernels[1:].sum() / (stored[-1] - stored[0]) / max(workers, 1)
            driver = f", driver {1e3 * np.diff(used).mean():.0f} ms a task" if workers else ""
            print(
                f"{chunk:3} replicates a task, {workers} workers: {1e3 * kernels.mean() / chunk:.0f} ms a kernel, "
                f"share {share:.2f}{driver}; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )


def main() -> None:
    """Print one line for each size, then the fitted model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, nargs=2, action="append", metavar=("N", "P"))
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sweep", action="store_true", help="measure sweeps instead")
    parser.add_argument("--quick", action="store_true", help="sweeps of a size that takes seconds")
    arguments = parser.parse_args()
    if arguments.sweep:
        measure_sweeps(arguments.quick)
        return
    if arguments.one:
        print(dumps(measure(*arguments.one)))
        return
    print(f"{'n':>6} {'p':>9} {'seconds':>9} {'processor':>10} {'surface':>9} {'peak':>9} {'before':>9}")
    rows = []
    for n, p in arguments.size or SIZES:
        command = [sys.executable, __file__, "--one", str(int(n)), str(int(p))]
        row = loads(subprocess.check_output(command, text=True))
        rows.append(row)
        print(
            f"{row['n']:6} {row['p']:9} {row['seconds']:9.2f} {row['processor']:10.2f} {1e3 * row['surface']:6.1f} ms "
            f"{row['peak'] / 1e6:6.0f} MB {row['runtime'] / 1e6:6.0f} MB  least risk {row['least_risk']:.6g}",
            flush=True,
        )
    n, p, seconds = (np.array([row[name] for row in rows], float) for name in ("n", "p", "processor"))
    if len(rows) > 3:
        relative = np.stack([n**0, n * p, n**2 * p, n**3], axis=1) / seconds[:, None]
        scale = relative.max(axis=0)
        model = nnls(relative / scale, np.ones(len(rows)))[0] / scale
        names = ("", " np", " n²p", " n³")
        print("seconds = " + " + ".join(f"{c:.2g}{name}" for c, name in zip(model, names, strict=True)))
        print("largest relative residual", f"{np.abs(relative @ model - 1).max():.1%}")


if __name__ == "__main__":
    main()
