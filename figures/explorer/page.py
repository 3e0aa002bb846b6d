"""What a page of the explorer is made of: plain descriptions, and one pure function from parameters to numbers.

A page states its parameters once, as a NamedTuple whose fields are annotated with their controls. The function takes
them and returns tables, {table: {column: (rows,) array}}. Plots, readings, CSV and the script of "copy as Python" all
draw on these tables and on nothing else, so that they cannot disagree.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Self, get_type_hints

from figures.explorer.tables import Table, Tables
from sims.parameters import Parameter

Values = dict[str, float | int | str]
"""Parameters by name, as links and widgets carry them."""
Items = Sequence[tuple[str, ...]]


class Slider(NamedTuple):
    """A number. A logarithmic slider moves in log₁₀ of it; `start`, `end` and `step` are in units of the position."""

    label: str
    parameter: Parameter
    """For its meaning, unit, range and scale; the default of a page is that of its own parameters."""
    step: float
    source: str = ""
    """Where it comes from, and what else there is to say."""
    name: str = ""
    value: float = 0.0

    @classmethod
    def own(cls, label: str, help: str, low: float, high: float, step: float, source: str = "", **kind: Any) -> Self:
        """Of a parameter that only its page has; `kind` is its scale and its unit."""
        return cls(label, Parameter(help, low=low, high=high, **kind), step, source)

    @property
    def logarithmic(self) -> bool:
        """Whether it moves in powers of ten."""
        return self.parameter.scale == "log"

    @property
    def start(self) -> float:
        """The lowest position; on a logarithmic slider a whole number of steps from 1."""
        return self._end(self.parameter.low)

    @property
    def end(self) -> float:
        """The highest position."""
        return self._end(self.parameter.high)

    def _end(self, value: float) -> float:
        return round(round(math.log10(value) / self.step) * self.step, 10) if self.logarithmic else value

    @property
    def help(self) -> str:
        """What the symbol means, its unit, and where it comes from."""
        meaning, unit = self.parameter.help, "no unit" if self.parameter.unit == "1" else self.parameter.unit
        return f"{meaning[:1].upper()}{meaning[1:]} ({unit}). {self.source}".strip()

    def value_at(self, position: float) -> float | int:
        """The parameter at a position of the slider: four digits on a logarithmic one, whole for a count."""
        steps = round((position - self.start) / self.step)
        position = min(max(self.start + steps * self.step, self.start), self.end)
        if self.logarithmic:
            return float(f"{10**position:.4g}")
        return int(position) if self.parameter.scale == "whole" else float(f"{position:.10g}")

    def position_of(self, value: str | int | float) -> float:
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
    """One of a few values, words or numbers: a list of them or, if `sliding`, a slider over them."""

    label: str
    help: str
    options: tuple
    sliding: bool = False
    name: str = ""
    value: str | int | float = 0

    @property
    def labels(self) -> list[str]:
        """The options in words."""
        return [f"{option:.4g}" if isinstance(option, float) else str(option) for option in self.options]

    def position_of(self, value: str | int | float) -> str:
        """The option in words, which is what its widget holds."""
        return self.labels[self.options.index(value)]

    def parse(self, text: str) -> str | int | float:
        """The option that a link or a widget names; ValueError for any other."""
        for option, label in zip(self.options, self.labels):
            if text in (str(option), label):
                return option
        raise ValueError(f"{self.name} must be one of {', '.join(self.labels)}, got {text[:40]!r}")

    def value_at(self, position: str) -> str | int | float:
        """The option at a position of the widget."""
        return self.parse(position)


class Group(NamedTuple):
    """Controls that come several times, for member 1, 2, … of at most `most`; buttons add a member or take one away.

    Control x of member 2 of the stages is called stage2_x.
    """

    noun: str
    number: str
    """The slider that says how many there are."""
    most: int

    def prefix(self, member: int) -> str:
        """How the names of its controls begin."""
        return f"{self.noun}{member}_"


@cache
def _controls_of(parameters: type) -> tuple[Slider | Choice, ...]:
    """The controls that annotate the fields of a NamedTuple, under the names of the fields and at their defaults."""
    fields = get_type_hints(parameters, include_extras=True)
    defaults = parameters._field_defaults  # type: ignore[attr-defined]
    return tuple(field.__metadata__[0]._replace(name=name, value=defaults[name]) for name, field in fields.items())


class Line(NamedTuple):
    """A curve y over x, two columns of one table; without a label it is not in the legend."""

    table: str
    x: str
    y: str
    label: str
    colour: str
    dash: str = "solid"

    @classmethod
    def over(cls, table: str, x: str, *curves: tuple[str, ...]) -> "tuple[Line, ...]":
        """Curves of one table over the same x, each as (y, label, colour) or (y, label, colour, dash)."""
        return tuple(cls(table, x, *curve) for curve in curves)


class Mark(NamedTuple):
    """Single points: where the sliders stand, or an optimum."""

    table: str
    x: str
    y: str
    label: str
    colour: str
    marker: str = "circle"


class Map(NamedTuple):
    """A map of z over x and y, three columns of one table, row by row in y; evenly spaced on their axes."""

    table: str
    x: str
    y: str
    z: str
    label: str


class Points(NamedTuple):
    """Points of the finite-sample overlay in a plot, with error bars of y or, if `sideways`, of x."""

    plot: str
    x: str
    y: str
    label: str
    colour: str
    sideways: bool = False

    @property
    def measured(self) -> str:
        """The column that has an error."""
        return self.x if self.sideways else self.y


class Plot(NamedTuple):
    """One pair of axes; `y_names` are words for y = 1, 2, …, from below; `x_whole` where x counts something."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    surface: Map | None = None
    x_logarithmic: bool = False
    y_logarithmic: bool = False
    x_whole: bool = False
    y_names: tuple[str, ...] = ()

    @classmethod
    def of_risks(cls, name: str, title: str, lines: Items, marks: Items) -> "Plot":
        """In the plane of both risks; lines and marks are (table, label, colour) and perhaps a dash or a marker."""
        labels, place = ("pretraining risk (forgetting)", "fine-tuning risk"), ("pretrain", "finetune")
        drawn = tuple(Line(table, *place, *style) for table, *style in lines)
        return cls(name, title, *labels, drawn, tuple(Mark(table, *place, *style) for table, *style in marks))

    @property
    def items(self) -> tuple[Line | Mark, ...]:
        """All that is drawn from two columns of a table."""
        return (*self.lines, *self.marks)


class Reading(NamedTuple):
    """One number in words: the first entry of a column."""

    label: str
    help: str
    table: str
    column: str


class Overlay(NamedTuple):
    """A finite-sample experiment, repeated: replicate(index, parameters) → {column: array}.

    Columns are averaged over replicates; those in `axes` are the same in all of them. `readings` are (label, column) of
    averages to be read as numbers. A page without an overlay has one of no replicates.
    """

    label: str = ""
    replicate: Callable[..., Table] = dict
    replicates: int = 0
    axes: tuple[str, ...] = ()
    points: tuple[Points, ...] = ()
    readings: tuple[tuple[str, str], ...] = ()


class Page(NamedTuple):
    """A tab: its controls, the function behind it, and how its tables are shown.

    >>> from typing import Annotated, NamedTuple
    >>> import numpy as np
    >>> from figures.explorer.page import Page, Slider
    >>> from sims.parameters import TAU
    >>> class Parameters(NamedTuple):
    ...     tau: Annotated[float, Slider("ensemble coefficient τ", TAU, step=0.02)] = 0.6
    >>> page = Page("mine", "Mine", parameters=Parameters, curves=lambda at: {"now": {"x": np.array([at.tau])}}, plots=())
    >>> page.compute({"tau": 0.5})
    {'now': {'x': array([0.5])}}
    """

    name: str
    title: str
    curves: Callable[..., Tables]
    plots: tuple[Plot, ...]
    parameters: type = dict
    """A NamedTuple with a control and a default for each field: what `curves` and `overlay.replicate` take."""
    choices: tuple[Slider | Choice, ...] = ()
    """The controls of a page whose parameters are a dict."""
    groups: tuple[Group, ...] = ()
    """Of those, the ones that come several times."""
    source: str = ""
    """The paper, and what in it is ours."""
    introduction: str = ""
    readings: tuple[Reading, ...] = ()
    suggestions: Mapping[str, Values] = {}
    """Things to try: buttons that set some parameters."""
    overlay: Overlay = Overlay()
    data: Any = None
    """Handed to `curves` as its first argument, where a page shows a user's own."""
    data_source: str = ""
    """How a script gets them, as Python."""

    @property
    def controls(self) -> tuple[Slider | Choice, ...]:
        """What moves the parameters, in order."""
        return self.choices or _controls_of(self.parameters)

    def defaults(self) -> Values:
        """The parameters of the first screen."""
        return {control.name: control.value for control in self.controls}

    def shown(self, values: Values) -> Values:
        """Without those of members that are not there."""
        absent = tuple(
            group.prefix(member)
            for group in self.groups
            for member in range(int(values[group.number]) + 1, group.most + 1)
        )
        return {name: value for name, value in values.items() if not name.startswith(absent)}

    @property
    def tables(self) -> list[str]:
        """Names of the tables that are plotted as curves and marks."""
        return list(dict.fromkeys(item.table for plot in self.plots for item in plot.items))

    def compute(self, values: Values) -> Tables:
        """The tables at these parameters."""
        parameters = self.parameters(**values)
        return self.curves(parameters) if self.data is None else self.curves(self.data, parameters)

    def replicate(self, index: int, values: Values) -> Table:
        """One replicate of the overlay at these parameters."""
        return self.overlay.replicate(index, self.parameters(**values))
