"""Time and memory of one streamed design against n and p, each size in a process of its own.

    OPENBLAS_NUM_THREADS=1 NPROC=4 python benchmarks/bench_scale.py [--size N P]...

A design is drawn in column blocks and reduced to both risk forms, then 60 penalties × 101 τ are evaluated. The problem
has Σ₁ = Σ₂ diagonal, an isotropic shift and a pretraining error, so two Gram matrices and three projections are needed.
The model fitted to the processor time is  seconds = a + b·np + c·n²p + d·n³ : compiling, drawing, Gram matrices,
eigendecomposition; no term is negative.
"""

import argparse
import re
import subprocess
import sys
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

    from linfit import Ridge, column_blocks, power_law_problem, risk_forms

    jax.config.update("jax_enable_x64", True)
    before = peak_bytes()
    start, used = time.perf_counter(), time.process_time()
    problem = power_law_problem(p, pretrain_risk=0.1)
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


def main() -> None:
    """Print one line for each size, then the fitted model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, nargs=2, action="append", metavar=("N", "P"))
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
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
