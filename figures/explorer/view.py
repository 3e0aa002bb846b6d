"""A page on the screen: controls, plots, readings, and what the buttons do."""

import csv
import html
import io
import itertools
import json
from collections.abc import Callable
from functools import partial

import numpy as np
from bokeh.document import Document
from bokeh.models import (
    Button,
    CategoricalSlider,
    Checkbox,
    CheckboxButtonGroup,
    Column,
    ColumnDataSource,
    CustomJS,
    CustomJSTickFormatter,
    Div,
    HelpButton,
    InlineStyleSheet,
    Row,
    Select,
    TextAreaInput,
    Tooltip,
)
from bokeh.models import Slider as BokehSlider
from bokeh.models.widgets import Widget

from figures.explorer.drawing import Sources, draw
from figures.explorer.latest import Latest, Repeated
from figures.explorer.page import Choice, Page, Parameters, Slider, Tables, average
from figures.explorer.script import script

ACCENT = "#0072B2"
NARROW = 760
"""Below this width in pixels the controls go under the first plot, and plots under each other."""

PAGE_CSS = f"""
:host {{
  display: grid !important; grid-template-columns: 290px repeat(2, minmax(0, 1fr)); gap: 6px 16px; align-items: start;
}}
:host > .controls {{ grid-column: 1; grid-row: 1 / span 3; }}
@media (min-width: {NARROW + 1}px) {{ /* in two columns, also below the controls */
  :host > :nth-child(odd of .panel) {{ grid-column: 2; }}
  :host > :nth-child(even of .panel) {{ grid-column: 3; }}
}}
@media (max-width: {NARROW}px) {{
  :host {{ grid-template-columns: minmax(0, 1fr); }}
  :host > .controls {{ grid-row: 2; }}
  :host > .first {{ grid-row: 1; position: sticky !important; top: 0; z-index: 3; background: white; }}
}}
"""
"""Controls beside the plots; on a narrow screen under the first one, which stays in sight while they are moved."""
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
BUTTON_CSS = ".bk-btn { font-size: 13px; white-space: normal; text-align: left; }"

SAVE_FILE = """
const blob = new Blob([source.data.text[0]], {type: source.data.type[0]});
const link = document.createElement("a");
link.href = URL.createObjectURL(blob);
link.download = source.data.name[0];
link.click();
setTimeout(() => URL.revokeObjectURL(link.href), 1000);
"""
COPY = """
const text = source.data.text[0];
const done = () => { button.label = "copied"; setTimeout(() => { button.label = "copy as Python"; }, 1500); };
if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => {});
"""
SAVE_SVG = """
const view = Bokeh.index.find_one(plot);
view.export("svg").to_blob().then((blob) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name + ".svg";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
"""
POWER_OF_TEN = "return Number((10 ** tick).toPrecision(4)).toString()"


class PageView:
    """One page in one session. `layout` is what to show; `state()` what a link has to carry to show it again."""

    def __init__(self, document: Document, page: Page, changed: Callable[[], None]):
        self._document, self._page, self._changed = document, page, changed
        self.parameters: Parameters = page.defaults()
        self.tables: Tables | None = None
        self.simulated: dict[str, np.ndarray] | None = None
        self._frozen: Parameters | None = None
        self._logarithmic = {plot.name: (plot.x_logarithmic, plot.y_logarithmic) for plot in page.plots}
        self._axes_buttons: dict[str, CheckboxButtonGroup] = {}
        self._savers: dict[str, Button] = {}
        self._setting = False
        self._downloads = itertools.count()
        self._latest = Latest(document, page.compute, self._show, self._fail)
        self._readings = Div(text="", name=f"{page.name}/readings", stylesheets=[TEXT_CSS], sizing_mode="stretch_width")
        self._sources = Sources(document, page, self._readings)
        self._build()

    # ------------------------------------------------------------------------------------------------- state

    def start(self) -> None:
        """Ask for the first curves."""
        self._say("warming up: compiling the kernels of this page …")
        self._ask()

    def state(self) -> dict[str, str]:
        """Parameters, axes, overlay and frozen curves, as the query of a link."""
        state = {name: str(value) for name, value in self.parameters.items()}
        usual = {plot.name: (plot.x_logarithmic, plot.y_logarithmic) for plot in self._page.plots}
        for name, axes in self._logarithmic.items():
            if axes != usual[name]:
                state[f"axes.{name}"] = ",".join(axis for axis, on in zip("xy", axes) if on) or "linear"
        if self._overlay is not None and self._overlay_box.active:
            state["overlay"] = "on"
        if self._frozen is not None:
            state["frozen"] = json.dumps(self._frozen, separators=(",", ":"))
        return state

    def restore(self, state: dict[str, str]) -> list[str]:
        """Take over what `state` returned elsewhere; what makes no sense is left out and returned as messages."""
        complaints: list[str] = []
        values, messages = _parse(self._page, state)
        complaints += messages
        for plot in self._page.plots:
            text = state.get(f"axes.{plot.name}")
            if text is not None:
                self._logarithmic[plot.name] = ("x" in text.split(","), "y" in text.split(","))
                self._redraw(plot.name)
        if "frozen" in state:
            try:
                stored = json.loads(state["frozen"])
                frozen, messages = _parse(self._page, {name: str(value) for name, value in dict(stored).items()})
                complaints += messages
                self._frozen = self._page.defaults() | frozen
                self._freezer.ask(self._frozen)
                self._freeze_button.label = "unfreeze"
            except (ValueError, TypeError):
                complaints.append("frozen must be a JSON object of parameters")
        if state.get("overlay") == "on" and self._overlay is not None:
            self._overlay_box.active = True
        self._set(values)
        return complaints

    # ---------------------------------------------------------------------------------------------- building

    def _build(self) -> None:
        page = self._page
        self._status = Div(text="", name=f"{page.name}/status", stylesheets=[TEXT_CSS], sizing_mode="stretch_width")
        self._status.html_attributes = {"role": "status", "aria-live": "polite"}
        self._widgets = {control.name: self._control(control) for control in page.controls}
        rows = [self._with_help(control) for control in page.controls]
        self._freezer = Latest(self._document, page.compute, lambda _, tables: self._sources.freeze(tables), self._fail)

        self._overlay: Repeated | None = None
        self._overlay_box = Checkbox(label="", active=False, name=f"{page.name}/overlay", visible=False)
        if page.overlay is not None:
            overlay = page.overlay
            self._overlay = Repeated(
                self._document, overlay.replicate, overlay.replicates, self._show_simulated, self._fail
            )
            self._overlay_box.update(margin=(8, 5, 4, 5), label=f"finite samples: {overlay.label}", visible=True)
            self._overlay_box.on_change("active", lambda _, __, ___: self._toggle_overlay())
        self._progress = Div(
            name=f"{page.name}/progress", visible=False, stylesheets=[TEXT_CSS], sizing_mode="stretch_width"
        )

        self._boxes = {}
        panels: list[Column] = []
        for plot in page.plots:
            axes = draw(page, plot, self._sources, self._logarithmic[plot.name])
            box = Column(axes, sizing_mode="stretch_width", name=f"{page.name}/box/{plot.name}")
            self._boxes[plot.name] = box
            classes = ["panel"] if panels else ["panel", "first"]
            panels.append(Column(box, self._plot_tools(plot.name), css_classes=classes, sizing_mode="stretch_width"))
        self._sources.paint_in(list(self._boxes.values()))
        introduction = Div(
            text=f"{page.introduction}<div class='source'>{page.source}</div>",
            stylesheets=[TEXT_CSS],
            sizing_mode="stretch_width",
        )
        controls = Column(
            *rows,
            self._overlay_box,
            self._progress,
            *self._actions(),
            css_classes=["controls"],
            sizing_mode="stretch_width",
        )
        body = Column(controls, *panels, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=PAGE_CSS)])
        self.layout = Column(
            introduction, self._suggestions(), self._status, self._readings, body, sizing_mode="stretch_width"
        )

    def _control(self, control: Slider | Choice) -> Widget:
        name = f"{self._page.name}/{control.name}"
        widget: Widget
        if isinstance(control, Choice):
            value = control.label_of(control.value)
            if control.sliding:
                widget = CategoricalSlider(title=control.label, value=value, categories=control.labels, name=name)
                widget.update(bar_color=ACCENT, tooltips=False)
            else:
                widget = Select(title=control.label, value=value, options=control.labels, name=name)
        else:
            widget = BokehSlider(
                title=control.label,
                start=control.start,
                end=control.end,
                step=control.step,
                value=control.position_of(control.value),
                name=name,
                tooltips=False,
                bar_color=ACCENT,
                format=CustomJSTickFormatter(code=POWER_OF_TEN) if control.logarithmic else _digits(control.step),
            )
        widget.update(sizing_mode="stretch_width", margin=(2, 5, 2, 10))
        widget.on_change("value", lambda _, __, value: self._moved(control, value))
        return widget

    def _with_help(self, control: Slider | Choice) -> Row:
        tooltip = Tooltip(content=control.help, position="right", css_classes=["help"])
        tooltip.stylesheets = [":host { max-width: 300px; font: 13px/1.4 system-ui, sans-serif; white-space: normal; }"]
        button = HelpButton(tooltip=tooltip, margin=(4, 0, 0, 0), width=34, stylesheets=[HELP_CSS])
        return Row(self._widgets[control.name], button, sizing_mode="stretch_width")

    def _suggestions(self) -> Row:
        buttons = []
        for suggestion in self._page.suggestions:
            button = Button(label=suggestion.label, stylesheets=[BUTTON_CSS])
            button.on_click(partial(self._set, suggestion.values))
            buttons.append(button)
        reset = Button(
            label="start again", button_type="light", stylesheets=[BUTTON_CSS], name=f"{self._page.name}/reset"
        )
        reset.on_click(lambda: self._set(self._page.defaults()))
        label = Div(text="<b>Try:</b>", stylesheets=[TEXT_CSS])
        return Row(label, *buttons, reset, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=WRAP_CSS)])

    def _plot_tools(self, name: str) -> Row:
        page = self._page
        plot = next(plot for plot in page.plots if plot.name == name)
        x_on, y_on = self._logarithmic[name]
        axes = CheckboxButtonGroup(
            labels=["log x", "log y"], active=[i for i, on in enumerate((x_on, y_on)) if on],
            name=f"{page.name}/{name}/axes", stylesheets=[BUTTON_CSS],
        )  # fmt: skip
        axes.on_change("active", lambda _, __, active: self._set_axes(name, (0 in active, 1 in active)))
        axes.disabled = plot.surface is not None
        self._axes_buttons[name] = axes
        save = Button(label="SVG", width=50, stylesheets=[BUTTON_CSS], name=f"{page.name}/{name}/svg")
        self._savers[name] = save
        self._connect_saver(name)
        return Row(axes, save, stylesheets=[InlineStyleSheet(css=WRAP_CSS)])

    def _connect_saver(self, name: str) -> None:
        arguments = {"plot": self._boxes[name].children[0], "name": f"{self._page.name}_{name}"}
        self._savers[name].js_event_callbacks = {}
        self._savers[name].js_on_click(CustomJS(args=arguments, code=SAVE_SVG))

    def _actions(self) -> list:
        page = self._page
        self._freeze_button = Button(label="freeze these curves", name=f"{page.name}/freeze", stylesheets=[BUTTON_CSS])
        self._freeze_button.on_click(self._toggle_freeze)
        self._file = ColumnDataSource({"name": [""], "type": [""], "text": [""]}, name=f"{page.name}/file")
        self._file.js_on_change("data", CustomJS(args={"source": self._file}, code=SAVE_FILE))
        save = Button(label="data as CSV", name=f"{page.name}/csv", stylesheets=[BUTTON_CSS], tags=[self._file])
        save.on_click(self._save_csv)
        self._script = ColumnDataSource({"text": [""]}, name=f"{page.name}/script")
        copy = Button(label="copy as Python", name=f"{page.name}/copy", stylesheets=[BUTTON_CSS])
        self._script.js_on_change("data", CustomJS(args={"source": self._script, "button": copy}, code=COPY))
        copy.tags = [self._script]
        copy.on_click(self._copy_script)
        self._script_area = TextAreaInput(
            title="a script that recomputes these numbers exactly", rows=12, visible=False, sizing_mode="stretch_width",
            max_length=None, name=f"{page.name}/script_text",
        )  # fmt: skip
        row = Row(self._freeze_button, save, copy, stylesheets=[InlineStyleSheet(css=WRAP_CSS)])
        return [row, self._script_area]

    # ------------------------------------------------------------------------------------------------ acting

    def _moved(self, control: Slider | Choice, value: float | str) -> None:
        if isinstance(control, Choice):
            self.parameters[control.name] = control.parse(str(value))
        else:
            self.parameters[control.name] = control.value_at(float(value))
        if not self._setting:
            self._ask()

    def _set(self, values: Parameters) -> None:
        """Move several controls at once."""
        self._setting = True
        for control in self._page.controls:
            if control.name in values:
                value = values[control.name]
                widget = self._widgets[control.name]
                widget.value = (
                    control.position_of(float(value)) if isinstance(control, Slider) else control.label_of(value)
                )
        self._setting = False
        self._ask()

    def _ask(self) -> None:
        self._latest.ask(dict(self.parameters))
        self._drop_simulated()
        self._changed()

    def _show(self, parameters: Parameters, tables: Tables) -> None:
        self.tables = tables
        self._sources.show(tables, self._read())
        self._say("")
        if self._overlay is not None and self._overlay_box.active and parameters == self.parameters:
            self._start_simulated()

    def _fail(self, _: object, error: Exception) -> None:
        self._say(str(error) or type(error).__name__)

    def _say(self, message: str) -> None:
        self._status.update(text=f"<div class='warning'>{html.escape(message)}</div>", visible=bool(message))

    def _read(self) -> str:
        """Numbers in words, as HTML."""
        assert self.tables is not None
        cells = [
            (reading.label, reading.help, f"{self.tables[reading.table][reading.column][0]:.4g}")
            for reading in self._page.readings
        ]
        if self.simulated is not None and self._page.overlay is not None:
            for label, column in self._page.overlay.readings:
                mean, error = self.simulated[column][0], self.simulated[f"{column}_error"][0]
                cells.append((label, "Mean over the drawn designs ± one standard error.", f"{mean:.4g} ± {error:.1g}"))
        return "<div class='readings'>{}</div>".format(
            "".join(
                f"<div><span title='{html.escape(help, quote=True)}'>{label}</span> <b>{text}</b></div>"
                for label, help, text in cells
            )
        )

    # Finite samples ------------------------------------------------------------------------------------------

    def _drop_simulated(self) -> None:
        if self._overlay is None:
            return
        self._overlay.stop()
        if self.simulated is not None:
            self._sources.clear_simulated()
            self.simulated = None
        self._progress.visible = False

    def _start_simulated(self) -> None:
        assert self._overlay is not None
        assert self._page.overlay is not None
        self._progress.update(
            text=f"<progress max='{self._page.overlay.replicates}' value='0'></progress> drawing …", visible=True
        )
        self._overlay.start(dict(self.parameters))

    def _toggle_overlay(self) -> None:
        self._drop_simulated()
        if self._overlay is not None and self._overlay_box.active and self.tables is not None and not self._latest.busy:
            self._start_simulated()
        self._changed()

    def _show_simulated(self, _: Parameters, samples: list[dict[str, np.ndarray]]) -> None:
        overlay = self._page.overlay
        assert overlay is not None
        done, total = len(samples), overlay.replicates
        bar = f"<progress max='{total}' value='{done}'></progress> {done} of {total}"
        text = bar if done < total else f"{total} of {total}; bars: ± one standard error"
        self._progress.update(text=text, visible=True)
        if done > 1:
            self.simulated = average(samples, overlay.axes)
            self._sources.show_simulated(self.simulated)
            self._sources.show({}, self._read())

    # Buttons -------------------------------------------------------------------------------------------------

    def _toggle_freeze(self) -> None:
        if self._frozen is None and self.tables is not None:
            self._frozen = dict(self.parameters)
            self._sources.freeze(self.tables)
            self._freeze_button.label = "unfreeze"
        else:
            self._frozen = None
            self._sources.freeze(None)
            self._freeze_button.label = "freeze these curves"
        self._changed()

    def _set_axes(self, name: str, logarithmic: tuple[bool, bool]) -> None:
        self._logarithmic[name] = logarithmic
        self._redraw(name)
        self._changed()

    def _redraw(self, name: str) -> None:
        """Axes cannot change their scale, so the figure is drawn anew on the same data."""
        plot = next(plot for plot in self._page.plots if plot.name == name)
        self._boxes[name].children = [draw(self._page, plot, self._sources, self._logarithmic[name])]
        self._connect_saver(name)
        active = [index for index, on in enumerate(self._logarithmic[name]) if on]
        if list(self._axes_buttons[name].active) != active:
            self._axes_buttons[name].active = active

    def _save_csv(self) -> None:
        if self.tables is None:
            return
        tables = dict(self.tables)
        if self.simulated is not None:
            tables["simulated"] = self.simulated
        text = as_csv(tables)
        self._file.data = {"name": [f"linfit_{self._page.name}.csv"], "type": ["text/csv"], "text": [text]}

    def _copy_script(self) -> None:
        text = script(self._page, self.parameters, simulated=self.simulated is not None)
        self._script.data = {"text": [text], "count": [next(self._downloads)]}
        self._script_area.update(value=text, visible=True)


def as_csv(tables: Tables) -> str:
    """Every column of every table side by side, headed table.column; shorter ones end in empty cells.

    Numbers are written so that reading them gives the same floats.

    >>> as_csv({"a": {"x": np.array([0.1, 2.0])}, "b": {"y": np.array([3.0])}}).split()
    ['a.x,b.y', '0.1,3.0', '2.0,']
    """
    columns = {f"{table}.{name}": values for table, content in tables.items() for name, values in content.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    cells = ([repr(float(value)) for value in values] for values in columns.values())
    writer.writerows(itertools.zip_longest(*cells, fillvalue=""))
    return text.getvalue()


def _parse(page: Page, state: dict[str, str]) -> tuple[Parameters, list[str]]:
    """The parameters that a link sets, and what is wrong with the others."""
    values: Parameters = {}
    complaints = []
    for control in page.controls:
        if control.name in state:
            try:
                values[control.name] = control.parse(state[control.name])
            except ValueError as error:
                complaints.append(str(error))
    return values, complaints


def _digits(step: float) -> str:
    """Numbro format with the digits of the step."""
    decimals = len(f"{step:.10g}".partition(".")[2])
    return "0." + "0" * decimals if decimals else "0"
