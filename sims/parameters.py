"""Parameters, described once: sweeps make options of them, the explorer sliders, claims assumptions.

Importing this module loads neither JAX nor numpy.
"""

import math
from typing import Literal, NamedTuple

__all__ = ["Parameter"]

RISK = "squared units of y"
EIGENVALUE = "units of the eigenvalues"


class Parameter(NamedTuple):
    """What a parameter means, its unit, the value it starts from, and the range it may lie in.

    `low` = `high` holds it at a value. The type of `default` (int, float, str) is the type of its values.
    """

    help: str = ""
    default: int | float | str = 0.0
    low: float = 0.0
    high: float = 0.0
    scale: Literal["linear", "log", "whole"] = "linear"  #: "whole" gives Python ints, for counts and choices.
    unit: str = "1"
    lowest: float | None = None
    """How far a search below the range walks, to report where a claim stops holding; `highest` above it."""
    highest: float | None = None
    batched: bool = False  #: Whether a kernel gets all values at once, because one factorisation serves them.

    def within(
        self, low: float, high: float | None = None, *, lowest: float | None = None, highest: float | None = None
    ) -> "Parameter":
        """The same parameter in [low, high], or held at `low`; a search ends at `lowest` and `highest`.

        >>> PENALTY.within(1e-3, 10.0).scale, TAU.within(1.0, highest=2.0).ends
        ('log', (2.0,))
        """
        return self._replace(low=low, high=low if high is None else high, lowest=lowest, highest=highest)

    def inside(self, position: float) -> float:
        """The value at a position in [0, 1] of the range.

        >>> TAU.within(1.0, 3.0).inside(0.5), N.within(0, 2).inside(0.99)
        (2.0, 2)
        """
        if self.scale == "whole":
            return int(min(math.floor(self.low + position * (self.high - self.low + 1)), self.high))
        return self._between(self.low, self.high, position)

    def beyond(self, distance: float, end: float) -> float:
        """The value at a distance in [0, 1] from the range towards `end`, one of `lowest` and `highest`.

        >>> TAU.within(0.0, highest=2.0).beyond(0.25, 2.0)
        0.5
        """
        value = self._between(self.high if end > self.high else self.low, end, distance)
        return round(value) if self.scale == "whole" else value

    @property
    def ends(self) -> tuple[float, ...]:
        """Where walks beyond the range lead."""
        return tuple(end for end in (self.lowest, self.highest) if end is not None)

    def _between(self, start: float, stop: float, position: float) -> float:
        if self.scale == "log":
            return math.exp((1 - position) * math.log(start) + position * math.log(stop))
        return (1 - position) * start + position * stop


N = Parameter("fine-tuning samples n", 100, 10, 1000, "whole")
P = Parameter("features p", 1000, 10, 10_000, "whole")
DECAY = Parameter("decay of the spectrum, Σ = diag(j^−decay)", 1.0, 0.0, 3.0)
ALIGNMENT = Parameter("alignment of the shift, Ω ∝ Σ^alignment with tr ΩΣ = 1; −1 tail, +1 head", 0.0, -1.0, 1.0)
NOISE_STD = Parameter("standard deviation σ of the label noise", 0.5, 0.03, 3.0, "log", "units of y")
PRETRAIN_RISK = Parameter("risk R_pre(θ₁) of the pretrained weights on their own task", 0.1, 0.0, 1.0, unit=RISK)
PENALTY = Parameter("ridge penalty λ", 0.01, 1e-5, 100.0, "log", EIGENVALUE)
TIME = Parameter("time t of gradient flow", 100.0, 1.0, 1e4, "log", f"1 / {EIGENVALUE}")
TAU = Parameter("ensemble coefficient τ; 0 is the pretrained model, 1 the fine-tuned one", 1.0, 0.0, 1.5)
WEIGHT = Parameter("trade-off weight κ of R_ft + κR_pre", 1.0, 0.01, 100.0, "log")
TEMPERATURE = Parameter("temperature T of FLOW's weights e^{−loss/T}", 1.0, 0.01, 100.0, "log", RISK)
LAW = Parameter("law of the design's coordinates: gaussian, rademacher, uniform or student", "gaussian")
NOISE = NOISE_STD._replace(low=0.0, high=1.4, scale="linear")
"""From none at all, so not on a logarithmic scale."""
