"""Speed is reported as a ratio to the primitives that cannot be avoided, measured in the same run."""


def pytest_terminal_summary(terminalreporter, config):
    """A table of medians over the baselines: each benchmark names its baseline time in `extra_info`."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in (session.benchmarks if session else []) if "baselines" in bench.extra_info]
    if not rows:
        return
    terminalreporter.section("ratios to primitives (lower is better)")
    for bench in rows:
        median = bench.stats.median if hasattr(bench.stats, "median") else bench.stats.stats.median
        ratios = [f"{median / seconds:8.2f} ÷ {name}" for name, seconds in bench.extra_info["baselines"].items()]
        terminalreporter.write_line(f"{bench.name:55s} {median * 1e3:10.2f} ms  {'  '.join(ratios)}")
