"""How every benchmark takes its time."""

import statistics
import time
from collections.abc import Callable


def median_seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """Median wall time after one warm-up."""
    function()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
