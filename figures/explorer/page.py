"""What a page of the explorer is made of: plain descriptions, and one pure function from parameters to numbers.

The function returns tables, {table: {column: (rows,) array}}. Plots, readings, CSV and the script of "copy as Python" all
draw on these tables and on nothing else, so that they cannot disagree.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Parameters = dict[str, float | int | str]
Tables = dict[str, dict[str, np.ndarray]]


class Slider(NamedTuple):
    """A number. A logarithmic slider moves in log₁₀ of it; `start`, `end` and `step` are in units of the position."""

    name: str
    label: str
    help: str
    """What the symbol means, its unit, and where it comes from."""
    start: float
    end: float
    step: float
    value: float
    logarithmic: bool = False

    def value_at(self, position: float) -> float | int:
        """The parameter at a position of the slider: four digits on a logarithmic one, whole where the step is."""
        steps = round((position - self.start) / self.step)
        position = min(max(self.start + steps * self.step, self.start), self.end)
        if self.logarithmic:
            return float(f"{10**position:.4g}")
        return int(position) if float(self.step).is_integer() else float(f"{position:.10g}")

    def position_of(self, value: float) -> float:
        """Where the slider stands for a value; ValueError if that is not a number within its range."""
        number = float(value)
        position = math.log10(number) if self.logarithmic and number > 0 else number
        slack = self.step / 2
        if not self.start - slack <= position <= self.end + slack or (self.logarithmic and number <= 0):
            low, high = self.value_at(self.start), self.value_at(self.end)
            raise ValueError(f"{self.name} must be between {low:g} and {high:g}, got {number:g}")
        return float(f"{self.start + round((position - self.start) / self.step) * self.step:.10g}")

    def parse(self, text: str) -> float | int:
        """The value a link gives; ValueError where it makes no sense."""
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{self.name} must be a number, got {text[:40]!r}") from None
        if not math.isfinite(number):
            raise ValueError(f"{self.name} must be finite, got {text[:40]!r}")
        return self.value_at(self.position_of(number))


class Choice(NamedTuple):
    """One of a few values, words or numbers."""

    name: str
    label: str
    help: str
    options: tuple
    value: str | int | float
    sliding: bool = False
    """Whether it is a slider over the options rather than a list of them."""

    @property
    def labels(self) -> list[str]:
        """The options in words."""
        return [f"{option:.4g}" if isinstance(option, float) else str(option) for option in self.options]

    def label_of(self, value: str | int | float) -> str:
        """The option in words."""
        return self.labels[self.options.index(value)]

    def parse(self, text: str) -> str | int | float:
        """The option that a link or a widget names; ValueError for any other."""
        for option, label in zip(self.options, self.labels):
            if text in (str(option), label):
                return option
        raise ValueError(f"{self.name} must be one of {', '.join(self.labels)}, got {text[:40]!r}")


class Line(NamedTuple):
    """A curve y over x, two columns of one table."""

    table: str
    x: str
    y: str
    label: str
    colour: str
    dash: str = "solid"


class Mark(NamedTuple):
    """Single points: where the sliders stand, or an optimum."""

    table: str
    x: str
    y: str
    label: str
    colour: str
    marker: str = "circle"


class Surface(NamedTuple):
    """A map of z over x and y, three columns of one table, row by row in y; evenly spaced on their axes."""

    table: str
    x: str
    y: str
    z: str
    label: str


class Simulated(NamedTuple):
    """Points with error bars from the finite-sample overlay, drawn in a plot: x and y ± y_error, or x ± x_error and y."""

    plot: str
    x: str
    y: str
    label: str
    colour: str
    sideways: bool = False
    """Whether it is x that was measured."""

    @property
    def measured(self) -> str:
        """The column that has an error."""
        return self.x if self.sideways else self.y


class Plot(NamedTuple):
    """One pair of axes."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    surface: Surface | None = None
    x_logarithmic: bool = False
    y_logarithmic: bool = False
    y_names: tuple[str, ...] = ()
    """Words for y = 1, 2, …, from below."""

    @property
    def items(self) -> tuple[Line | Mark, ...]:
        """Curves and marks: all that is drawn from two columns of a table."""
        return (*self.lines, *self.marks)


class Reading(NamedTuple):
    """One number in words: the first entry of a column."""

    label: str
    help: str
    table: str
    column: str


class Suggestion(NamedTuple):
    """Something to try: a button that sets some parameters."""

    label: str
    values: Parameters


class Overlay(NamedTuple):
    """A finite-sample experiment, repeated: replicate(index, **parameters) → {column: array}.

    Columns are averaged over replicates; those in `axes` are the same in all of them.
    """

    label: str
    replicate: Callable[..., dict[str, np.ndarray]]
    replicates: int
    axes: tuple[str, ...]
    points: tuple[Simulated, ...]
    readings: tuple[tuple[str, str], ...] = ()
    """(label, column) of averages to be read as numbers."""


class Page(NamedTuple):
    """A tab: its controls, the function behind it, and how its tables are shown."""

    name: str
    title: str
    source: str
    """The paper, and what in it is ours."""
    introduction: str
    controls: tuple[Slider | Choice, ...]
    curves: Callable[..., Tables]
    plots: tuple[Plot, ...]
    readings: tuple[Reading, ...]
    suggestions: tuple[Suggestion, ...]
    overlay: Overlay | None = None
    data: Any = None
    """Handed to `curves` as its first argument, where a page shows a user's own."""
    data_source: str = ""
    """How a script gets them, as Python."""

    def defaults(self) -> Parameters:
        """The parameters of the first screen."""
        return {control.name: control.value for control in self.controls}

    def compute(self, parameters: Parameters) -> Tables:
        """The tables at these parameters."""
        return self.curves(**parameters) if self.data is None else self.curves(self.data, **parameters)


def average(samples: list[dict[str, np.ndarray]], axes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Mean and standard error (column, column_error) over replicates; columns in `axes` as they are.

    >>> average([{"x": np.array([1.0]), "y": np.array([1.0])}, {"x": np.array([1.0]), "y": np.array([3.0])}], ("x",))
    {'x': array([1.]), 'y': array([2.]), 'y_error': array([1.])}
    """
    table = {name: samples[0][name] for name in axes}
    for name in samples[0].keys() - set(axes):
        values = np.stack([sample[name] for sample in samples])
        table[name] = values.mean(axis=0)
        table[f"{name}_error"] = values.std(axis=0, ddof=1) / len(samples) ** 0.5
    return table
