"""How every benchmark takes its time, and its size."""

import os
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

Size = TypeVar("Size")


def sized(full: Size, quick: Size) -> Size:
    """The size to measure at, or that of `make bench-quick`, which only sees whether a benchmark still runs."""
    return quick if os.environ.get("BENCH_QUICK") else full


def median_seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """Median wall time after one warm-up."""
    function()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
