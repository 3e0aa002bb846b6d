"""What stands on a page: text, buttons, controls with their help, and a plot with its tools."""

from collections.abc import Callable
from functools import partial
from typing import Any

from bokeh.models import (
    Button,
    CategoricalSlider,
    CheckboxButtonGroup,
    Column,
    CustomJS,
    CustomJSTickFormatter,
    Div,
    HelpButton,
    InlineStyleSheet,
    Row,
    Select,
    Tooltip,
)
from bokeh.models import Slider as BokehSlider
from bokeh.models.widgets import Widget

from figures.explorer.drawing import Sources, draw
from figures.explorer.page import Choice, Page, Plot, Slider

ACCENT = "#0072B2"
WRAP_CSS = ":host { flex-wrap: wrap !important; gap: 6px; align-items: center; }"
TEXT_CSS = """
:host { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; }
.source { color: #555; font-size: 13px; }
.readings { display: flex; flex-wrap: wrap; gap: 4px 20px; }
.readings span { border-bottom: 1px dotted #999; cursor: help; color: #444; }
.readings b { font-variant-numeric: tabular-nums; }
.warning { color: #a33b00; font-weight: 600; }
"""
HELP_CSS = ".bk-btn { border: none; background: none; padding: 4px; opacity: 0.65; } .bk-btn:focus-visible { outline: 2px solid #0072B2; }"
TOOLTIP_CSS = ":host { max-width: 300px; font: 13px/1.4 system-ui, sans-serif; white-space: normal; }"
BUTTON_CSS = ".bk-btn { font-size: 13px; white-space: normal; text-align: left; }"

SAVE_SVG = """
const view = Bokeh.index.find_one(box.children[0]);
view.export("svg").to_blob().then((blob) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name + ".svg";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
"""
POWER_OF_TEN = "return Number((10 ** tick).toPrecision(4)).toString()"


def text(content: str = "", **properties: Any) -> Div:
    """Words as HTML, over the whole width."""
    return Div(text=content, stylesheets=[TEXT_CSS], sizing_mode="stretch_width", **properties)


def button(label: str, clicked: Callable[[], None] | None = None, **properties: Any) -> Button:
    """A button, and what it does on this side."""
    made = Button(label=label, stylesheets=[BUTTON_CSS], **properties)
    if clicked is not None:
        made.on_click(clicked)
    return made


def wrapped(*children: Any, **properties: Any) -> Row:
    """Side by side, in as many rows as the screen asks for."""
    return Row(*children, stylesheets=[InlineStyleSheet(css=WRAP_CSS)], **properties)


def widget_of(control: Slider | Choice, page: str, moved: Callable[[Any], None]) -> Widget:
    """The slider or list of a control; `moved` gets its new position."""
    common = {"title": control.label, "value": control.position_of(control.value), "name": f"{page}/{control.name}"}
    sliding = {"bar_color": ACCENT, "tooltips": False}
    widget: Widget
    if isinstance(control, Slider):
        widget = BokehSlider(
            start=control.start,
            end=control.end,
            step=control.step,
            format=CustomJSTickFormatter(code=POWER_OF_TEN) if control.logarithmic else _digits(control.step),
            **sliding,
            **common,
        )
    elif control.sliding:
        widget = CategoricalSlider(categories=control.labels, **sliding, **common)
    else:
        widget = Select(options=control.labels, **common)
    widget.update(sizing_mode="stretch_width", margin=(2, 5, 2, 10))
    widget.on_change("value", lambda _, __, position: moved(position))
    return widget


def with_help(widget: Widget, help: str) -> Row:
    """The widget and, beside it, what it means."""
    tooltip = Tooltip(content=help, position="right", css_classes=["help"], stylesheets=[TOOLTIP_CSS])
    mark = HelpButton(tooltip=tooltip, margin=(4, 0, 0, 0), width=34, stylesheets=[HELP_CSS])
    return Row(widget, mark, sizing_mode="stretch_width")


class Panel:
    """A plot and its tools. Axes cannot change their scale, so that the figure is drawn anew on the same data."""

    def __init__(self, page: Page, plot: Plot, sources: Sources, changed: Callable[[], None]):
        self._draw, self._changed = partial(draw, page, plot, sources), changed
        self._usual = (plot.x_logarithmic, plot.y_logarithmic)
        self.box = Column(sizing_mode="stretch_width", name=f"{page.name}/box/{plot.name}")
        self._axes = CheckboxButtonGroup(labels=["log x", "log y"], stylesheets=[BUTTON_CSS])
        self._axes.update(disabled=plot.surface is not None, name=f"{page.name}/{plot.name}/axes")
        self.set_axes(self._usual)
        self._axes.on_change("active", lambda _, __, active: self._clicked((0 in active, 1 in active)))
        save = button("SVG", width=50, name=f"{page.name}/{plot.name}/svg")
        save.js_on_click(CustomJS(args={"box": self.box, "name": f"{page.name}_{plot.name}"}, code=SAVE_SVG))
        first = ["first"] if plot == page.plots[0] else []
        self.layout = Column(
            self.box, wrapped(self._axes, save), css_classes=["panel", *first], sizing_mode="stretch_width"
        )

    @property
    def state(self) -> str | None:
        """Which axes are logarithmic, for a link; None if they are as usual."""
        if self.logarithmic == self._usual:
            return None
        return ",".join(axis for axis, on in zip("xy", self.logarithmic) if on) or "linear"

    def set_axes(self, logarithmic: tuple[bool, bool]) -> None:
        """Of x and y."""
        self.logarithmic = logarithmic
        self.box.children = [self._draw(logarithmic)]
        self._axes.active = [index for index, on in enumerate(logarithmic) if on]

    def _clicked(self, logarithmic: tuple[bool, bool]) -> None:
        if logarithmic != self.logarithmic:
            self.set_axes(logarithmic)
            self._changed()


def _digits(step: float) -> str:
    """Numbro format with the digits of the step."""
    decimals = len(f"{step:.10g}".partition(".")[2])
    return "0." + "0" * decimals if decimals else "0"
