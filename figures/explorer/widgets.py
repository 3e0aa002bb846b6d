"""What stands on a page: text, buttons, controls with their help, and a plot with its tools."""

import html
from collections.abc import Callable
from functools import partial
from typing import Any

from bokeh import models

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

DOWNLOAD = """
const download = (blob, name) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
"""
SAVE_SVG = 'Bokeh.index.find_one(box.children[0]).export("svg").to_blob().then((blob) => download(blob, name));'
POWER_OF_TEN = "return Number((10 ** tick).toPrecision(4)).toString()"


def text(content: str = "", **properties: Any) -> models.Div:
    """Words as HTML, over the whole width."""
    return models.Div(text=content, stylesheets=[TEXT_CSS], **{"sizing_mode": "stretch_width", **properties})


def warn(place: models.Div, message: str) -> None:
    """Show a message there, or nothing if it is empty."""
    place.update(text=f"<div class='warning'>{html.escape(message)}</div>", visible=bool(message))


def button(label: str, clicked: Callable[[], None] | None = None, **properties: Any) -> models.Button:
    """A button, and what it does on this side."""
    made = models.Button(label=label, stylesheets=[BUTTON_CSS], **properties)
    if clicked is not None:
        made.on_click(clicked)
    return made


def stacked(*children: Any, **properties: Any) -> models.Column:
    """One below the other, over the whole width."""
    return models.Column(*children, sizing_mode="stretch_width", **properties)


def wrapped(*children: Any, **properties: Any) -> models.Row:
    """Side by side, in as many rows as the screen asks for."""
    return models.Row(*children, stylesheets=[models.InlineStyleSheet(css=WRAP_CSS)], **properties)


def widget_of(control: Slider | Choice, page: str, moved: Callable[[Any], None]) -> models.Widget:
    """The slider or list of a control; `moved` gets its new position."""
    common = {"title": control.label, "value": control.position_of(control.value), "name": f"{page}/{control.name}"}
    sliding = {"bar_color": ACCENT, "tooltips": False, **common}
    if isinstance(control, Slider):
        decimals = len(f"{control.step:.10g}".partition(".")[2])
        digits = "0." + "0" * decimals if decimals else "0"
        shown = models.CustomJSTickFormatter(code=POWER_OF_TEN) if control.logarithmic else digits
        range_ = {"start": control.start, "end": control.end, "step": control.step}
        widget = models.Slider(format=shown, **range_, **sliding)
    elif control.sliding:
        widget = models.CategoricalSlider(categories=control.labels, **sliding)
    else:
        widget = models.Select(options=control.labels, **common)
    widget.update(sizing_mode="stretch_width", margin=(2, 5, 2, 10))
    widget.on_change("value", lambda _, __, position: moved(position))
    return widget


def with_help(widget: models.Widget, help: str) -> models.Row:
    """The widget and, beside it, what it means."""
    tooltip = models.Tooltip(content=help, position="right", css_classes=["help"], stylesheets=[TOOLTIP_CSS])
    mark = models.HelpButton(tooltip=tooltip, margin=(4, 0, 0, 0), width=34, stylesheets=[HELP_CSS])
    return models.Row(widget, mark, sizing_mode="stretch_width")


class Panel:
    """A plot and its tools. Axes cannot change their scale, so that the figure is drawn anew on the same data."""

    def __init__(self, page: Page, plot: Plot, sources: Sources, changed: Callable[[], None]):
        self._draw, self._changed = partial(draw, page, plot, sources), changed
        self._usual = (plot.x_logarithmic, plot.y_logarithmic)
        self.box = stacked(name=f"{page.name}/box/{plot.name}")
        self._axes = models.CheckboxButtonGroup(labels=["log x", "log y"], stylesheets=[BUTTON_CSS])
        self._axes.update(disabled=plot.surface is not None, name=f"{page.name}/{plot.name}/axes")
        self.set_axes(self._usual)
        self._axes.on_change("active", lambda _, __, active: self._clicked((0 in active, 1 in active)))
        save = button("SVG", width=50, name=f"{page.name}/{plot.name}/svg")
        target = {"box": self.box, "name": f"{page.name}_{plot.name}.svg"}
        save.js_on_click(models.CustomJS(args=target, code=DOWNLOAD + SAVE_SVG))
        first = ["first"] if plot == page.plots[0] else []
        self.layout = stacked(self.box, wrapped(self._axes, save), css_classes=["panel", *first])

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
