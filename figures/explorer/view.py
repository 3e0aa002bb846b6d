"""A page on the screen: controls, plots, readings, and what the buttons do."""

import csv
import html
import io
import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from bokeh import models
from bokeh.document import Document

from figures.explorer.drawing import Sources
from figures.explorer.latest import Latest, Repeated
from figures.explorer.page import Choice, Group, Page, Slider, Values
from figures.explorer.script import script
from figures.explorer.tables import Table, Tables, average
from figures.explorer.widgets import DOWNLOAD, Panel, button, stacked, text, warn, widget_of, with_help, wrapped

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
MEMBER_CSS = """
:host { display: grid !important; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 2px; align-items: end; }
:host > .head { grid-column: 1 / span 2; }
"""
"""Controls of one member in two columns, below its name."""
CONTROLS_CSS = f"""
@media (min-width: {NARROW + 1}px) {{
  :host {{ position: sticky !important; top: 0; max-height: max(720px, 100vh); overflow-y: auto; }}
}}
"""
"""Where controls are many they scroll beside the plots; on a narrow screen under them."""

SAVE_FILE = "const {name, type, text} = source.data; download(new Blob([text[0]], {type: type[0]}), name[0]);"
COPY = """
const text = source.data.text[0];
const done = () => { button.label = "copied"; setTimeout(() => { button.label = "copy as Python"; }, 1500); };
if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => {});
"""
FREEZE = "freeze these curves"


class PageView:
    """One page in one session. `layout` is what to show; `state()` what a link has to carry to show it again.

    `passing`: it comes after the document has been loaded, and may be replaced.
    """

    def __init__(self, document: Document, page: Page, changed: Callable[[], None], *, passing: bool = False):
        self._page, self._changed = page, changed
        self.values: Values = page.defaults()
        self.tables: Tables | None = None
        self.simulated: Table | None = None
        self._frozen: Values | None = None
        self._setting = False
        self._downloads = itertools.count()
        self._readings = text(name=f"{page.name}/readings")
        self._sources = Sources(None if passing else document, page, self._readings)
        self._panels = {plot.name: Panel(page, plot, self._sources, changed) for plot in page.plots}
        self._sources.paint_in([panel.box for panel in self._panels.values()])
        self._latest = Latest(document, page.compute, self._show, self._fail)
        self._freezer = Latest(document, page.compute, lambda _, tables: self._sources.freeze(tables), self._fail)
        replicates = page.overlay.replicates
        self._overlay = Repeated(document, page.replicate, self._show_simulated, self._fail, replicates)
        self._build()

    def start(self) -> None:
        """Ask for the first curves."""
        warn(self._status, "warming up: compiling the kernels of this page …")
        self._ask()

    def state(self) -> dict[str, str]:
        """Parameters, axes, overlay and frozen curves, as the query of a link."""
        state = {name: str(value) for name, value in self._page.shown(self.values).items()}
        state |= {f"axes.{name}": panel.state for name, panel in self._panels.items() if panel.state is not None}
        if self._overlay_box.active:
            state["overlay"] = "on"
        if self._frozen is not None:
            state["frozen"] = json.dumps(self._frozen, separators=(",", ":"))
        return state

    def restore(self, state: dict[str, str]) -> list[str]:
        """Take over what `state` returned elsewhere; what makes no sense is left out and returned as messages."""
        values, complaints = self._parse(state)
        for name, panel in self._panels.items():
            axes = state.get(f"axes.{name}")
            if axes is not None:
                panel.set_axes(("x" in axes.split(","), "y" in axes.split(",")))
        if "frozen" in state:
            try:
                stored = dict(json.loads(state["frozen"]))
            except (ValueError, TypeError):
                complaints.append("frozen must be a JSON object of parameters")
            else:
                frozen, messages = self._parse({name: str(value) for name, value in stored.items()})
                complaints += messages
                self._frozen = self._page.defaults() | frozen
                self._freezer.ask(self._frozen)
                self._freeze_button.label = "unfreeze"
        if state.get("overlay") == "on" and self._overlay.replicates:
            self._overlay_box.active = True
        self._set(values)
        return complaints

    def _parse(self, state: dict[str, str]) -> tuple[Values, list[str]]:
        """The parameters that a link sets, and what is wrong with others."""
        values: Values = {}
        complaints = []
        for control in self._page.controls:
            try:
                if control.name in state:
                    values[control.name] = control.parse(state[control.name])
            except ValueError as error:
                complaints.append(str(error))
        return values, complaints

    def _build(self) -> None:
        page, name = self._page, self._page.name
        self._status = text(name=f"{name}/status", html_attributes={"role": "status", "aria-live": "polite"})
        self._widgets = {
            control.name: widget_of(control, name, partial(self._moved, control)) for control in page.controls
        }
        overlay = {"label": f"finite samples: {page.overlay.label}", "visible": bool(page.overlay.replicates)}
        self._overlay_box = models.Checkbox(name=f"{name}/overlay", margin=(8, 5, 4, 5), **overlay)
        self._overlay_box.on_change("active", lambda _, __, ___: self._toggle_overlay())
        self._progress = text(name=f"{name}/progress", visible=False)
        sliders = self._arranged()
        actions = [self._overlay_box, self._progress, *self._actions()]
        scrolling = [models.InlineStyleSheet(css=CONTROLS_CSS)] if page.groups else []
        controls = stacked(*sliders, *actions, css_classes=["controls"], stylesheets=scrolling)
        panels = [panel.layout for panel in self._panels.values()]
        body = stacked(controls, *panels, stylesheets=[models.InlineStyleSheet(css=PAGE_CSS)])
        introduction = text(f"{page.introduction}<div class='source'>{page.source}</div>")
        tries = [button(label, partial(self._set, values)) for label, values in page.suggestions.items()]
        reset = button("start again", partial(self._set, page.defaults()), button_type="light", name=f"{name}/reset")
        suggestions = wrapped(text("<b>Try:</b>", sizing_mode=None), *tries, reset, sizing_mode="stretch_width")
        self.layout = stacked(introduction, suggestions, self._status, self._readings, body)

    def _arranged(self) -> list[Any]:
        """Controls from above, members of a group in a box of their own below the slider of their number."""
        rows = {control.name: with_help(self._widgets[control.name], control.help) for control in self._page.controls}
        self._members = {group: self._boxes(group, rows) for group in self._page.groups}
        arranged = []
        for control, row in rows.items():
            arranged.append(row)
            for group, boxes in self._members.items():
                if group.number == control:
                    label, name = f"add a {group.noun}", f"{self._page.name}/add_{group.noun}"
                    arranged += [*boxes, button(label, partial(self._add, group), name=name)]
        self._show_members()
        return arranged

    def _boxes(self, group: Group, rows: dict[str, Any]) -> list[models.Column]:
        """One for each member; its rows are taken out of the others."""
        boxes = []
        for member in range(1, group.most + 1):
            own = [rows.pop(name) for name in list(rows) if name.startswith(group.prefix(member))]
            name = f"{self._page.name}/remove_{group.noun}{member}"
            removed = button("remove", partial(self._remove, group, member), name=name, button_type="light")
            title = text(f"<b>{group.noun} {member}</b>", margin=(8, 5, 0, 10))
            head = models.Row(title, removed, sizing_mode="stretch_width", css_classes=["head"])
            grid = stacked(head, *own, stylesheets=[models.InlineStyleSheet(css=MEMBER_CSS)])
            boxes.append(stacked(grid))  # its own display may be none
        return boxes

    def _show_members(self) -> None:
        """As many as there are; the last one cannot be removed."""
        for group, boxes in self._members.items():
            for member, box in enumerate(boxes, 1):
                box.visible = member <= int(self.values[group.number])
                box.children[0].children[0].children[1].visible = int(self.values[group.number]) > 1

    def _add(self, group: Group) -> None:
        self._set({group.number: min(int(self.values[group.number]) + 1, group.most)})

    def _remove(self, group: Group, member: int) -> None:
        """Those behind it move up."""
        count = int(self.values[group.number])
        moved: Values = {group.number: max(count - 1, 1)}
        for later in range(member, count):
            start, end = group.prefix(later + 1), group.prefix(later)
            moved |= {end + name[len(start) :]: v for name, v in self.values.items() if name.startswith(start)}
        self._set(moved)

    def _actions(self) -> list[Any]:
        name = self._page.name
        self._freeze_button = button(FREEZE, self._toggle_freeze, name=f"{name}/freeze")
        self._file = models.ColumnDataSource({"name": [""], "type": [""], "text": [""]}, name=f"{name}/file")
        self._file.js_on_change("data", models.CustomJS(args={"source": self._file}, code=DOWNLOAD + SAVE_FILE))
        save = button("data as CSV", self._save_csv, name=f"{name}/csv", tags=[self._file])
        self._script = models.ColumnDataSource({"text": [""]}, name=f"{name}/script")
        copy = button("copy as Python", self._copy_script, name=f"{name}/copy", tags=[self._script])
        self._script.js_on_change("data", models.CustomJS(args={"source": self._script, "button": copy}, code=COPY))
        title = "a script that recomputes these numbers exactly"
        self._script_area = models.TextAreaInput(title=title, rows=12, max_length=None, name=f"{name}/script_text")
        self._script_area.update(visible=False, sizing_mode="stretch_width")
        return [wrapped(self._freeze_button, save, copy), self._script_area]

    def _moved(self, control: Slider | Choice, position: Any) -> None:
        self.values[control.name] = control.value_at(position)
        if any(group.number == control.name for group in self._page.groups):
            self._show_members()
        if not self._setting:
            self._ask()

    def _set(self, values: Values) -> None:
        """Move several controls at once."""
        self._setting = True
        for control in self._page.controls:
            if control.name in values:
                self._widgets[control.name].value = control.position_of(values[control.name])
        self._setting = False
        self._ask()

    def _ask(self) -> None:
        self._latest.ask(dict(self.values))
        self._drop_simulated()
        self._changed()

    def _show(self, values: Values, tables: Tables) -> None:
        self.tables = tables
        self._sources.show(tables, self._read())
        warn(self._status, "")
        if self._overlay_box.active and values == self.values:
            self._start_simulated()

    def _fail(self, _: object, error: Exception) -> None:
        warn(self._status, str(error) or type(error).__name__)

    def _read(self) -> str:
        """Numbers in words, as HTML."""
        assert self.tables is not None
        readings, overlay = self._page.readings, self._page.overlay.readings
        cells = [(label, help, f"{self.tables[table][column][0]:.4g}") for label, help, table, column in readings]
        simulated = self.simulated or {}
        for label, column in overlay if simulated else ():
            mean, error = simulated[column][0], simulated[f"{column}_error"][0]
            cells.append((label, "Mean over the sampled designs ± one standard error.", f"{mean:.4g} ± {error:.1g}"))
        shown = (
            f"<div><span title='{html.escape(help, quote=True)}'>{label}</span> <b>{number}</b></div>"
            for label, help, number in cells
        )
        return f"<div class='readings'>{''.join(shown)}</div>"

    def _drop_simulated(self) -> None:
        self._overlay.stop()
        if self.simulated is not None:
            self._sources.show_simulated(None)
            self.simulated = None
        self._progress.visible = False

    def _start_simulated(self) -> None:
        self._show_progress(0, "sampling …")
        self._overlay.start(dict(self.values))

    def _toggle_overlay(self) -> None:
        self._drop_simulated()
        if self._overlay_box.active and self.tables is not None and not self._latest.busy:
            self._start_simulated()
        self._changed()

    def _show_progress(self, done: int, words: str) -> None:
        total = self._overlay.replicates
        bar = f"<progress max='{total}' value='{done}'></progress> " if done < total else ""
        self._progress.update(text=bar + words, visible=True)

    def _show_simulated(self, _: Values, samples: list[Table]) -> None:
        done, total = len(samples), self._overlay.replicates
        self._show_progress(done, f"{done} of {total}" + ("; bars: ± one standard error" if done == total else ""))
        if done > 1:
            self.simulated = average(samples, self._page.overlay.axes)
            self._sources.show_simulated(self.simulated)
            self._sources.show({}, self._read())

    def _toggle_freeze(self) -> None:
        freezes = self._frozen is None and self.tables is not None
        self._frozen = self._page.shown(self.values) if freezes else None
        self._sources.freeze(self.tables if freezes else None)
        self._freeze_button.label = "unfreeze" if freezes else FREEZE
        self._changed()

    def _save_csv(self) -> None:
        if self.tables is not None:
            tables = self.tables if self.simulated is None else {**self.tables, "simulated": self.simulated}
            names = {"name": [f"linfit_{self._page.name}.csv"], "type": ["text/csv"]}
            self._file.data = {**names, "text": [as_csv(tables)]}

    def _copy_script(self) -> None:
        program = script(self._page, self.values, simulated=self.simulated is not None)
        self._script.data = {"text": [program], "count": [next(self._downloads)]}
        self._script_area.update(value=program, visible=True)


def as_csv(tables: Tables) -> str:
    """Every column of every table side by side, headed table.column, in digits that give back the same floats.

    >>> import numpy as np
    >>> from figures.explorer.view import as_csv
    >>> as_csv({"a": {"x": np.array([0.1, 2.0])}, "b": {"y": np.array([3.0])}}).split()
    ['a.x,b.y', '0.1,3.0', '2.0,']
    """
    columns = {f"{table}.{name}": values for table, content in tables.items() for name, values in content.items()}
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(columns)
    cells = ([repr(float(value)) for value in values] for values in columns.values())
    writer.writerows(itertools.zip_longest(*cells, fillvalue=""))
    return lines.getvalue()
