"""One pair of axes as a Bokeh figure: curves, frozen curves, marks, surface, simulated points."""

import json
from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
from bokeh import models
from bokeh.document import Document
from bokeh.events import LegendItemClick
from bokeh.palettes import cividis
from bokeh.plotting import figure

from figures.explorer.page import Line, Map, Mark, Page, Plot
from figures.explorer.tables import Table, Tables

FRAME_HEIGHT, LEGEND_ROW = 285, 24
"""Pixels: a plot without legend, and what each row of it adds, so that all frames are equally high."""
LINE_WIDTH, WHITE = 2.4, "#ffffff"

HIDE = """
const glyph = drawn[legend.items.indexOf(cb_obj.item)];
glyph.visible = !glyph.visible;
"""
PUT_IN_PLACE = """
const content = message.data;
if (content.layout.length == 0) return;
const {sizes, surfaces, readings: text} = JSON.parse(content.layout[0]);
const numbers = Float64Array.from(content.numbers[0]);
const quietly = {sync: false};
// After a rest, the frame with the first plot is shown before the others are painted; in a drag they keep together.
const now = performance.now(), rested = now - (message.arrived ?? -Infinity) > 150;
message.arrived = now;
const later = rested ? boxes.slice(1).map((box) => box.children[0]) : [];
for (const plot of later) plot.setv({hold_render: true}, quietly);
let start = 0;
for (const [table, columns] of Object.entries(sizes)) {
  const data = {};
  for (const [column, size] of Object.entries(columns)) data[column] = numbers.slice(start, start += size);
  tables[table].setv({data}, quietly);
}
const view = Bokeh.index.find_one(readings);
if (readings.text == "" || !view) readings.setv({text}, quietly);
else { // without a new layout of the whole page
  readings.setv({text}, {...quietly, silent: true});
  view.markup_el.innerHTML = text;
}
const release = () => {
  for (const [name, {x, y, dw, dh, low, high}] of Object.entries(surfaces)) {
    mappers[name].setv({low, high}, {...quietly, silent: true}); // the image takes them up
    images[name].setv({data: {image: content["image " + name], x: [x], y: [y], dw: [dw], dh: [dh]}}, quietly);
  }
  for (const plot of later) plot.setv({hold_render: false}, quietly);
};
requestAnimationFrame(() => setTimeout(release, 0));
"""


class Sources:
    """The data that the plots of a page show; the browser redraws whenever a table is replaced.

    Bokeh sends each property that changes as a message of its own, so the tables travel together and are put in place
    by the browser; on this side they stay empty. The document is needed only where the browser does not show it yet.
    """

    def __init__(self, document: Document | None, page: Page, readings: models.Div):
        self._page = page
        self._surfaces = {plot.name: plot.surface for plot in page.plots if plot.surface is not None}
        # A legend is built anew whenever the data of its curves change, so it explains samples that never do.
        self.samples = models.ColumnDataSource({"x": [np.nan], "y": [np.nan]})
        self.simulated = self._source("table/simulated")
        self.tables = {table: self._source(f"table/{table}", self._empty(table)) for table in page.tables}
        self.frozen = {table: self._source(f"frozen/{table}", self._empty(table)) for table in page.tables}
        place: dict[str, list] = {name: [] for name in ("image", "x", "y", "dw", "dh")}
        self.images = {plot: self._source(f"image/{plot}", place) for plot in self._surfaces}
        self.mappers = {plot: models.LinearColorMapper(palette=cividis(64)) for plot in self._surfaces}
        self.show_simulated(None)
        self._message = self._source("message", {"layout": [], "numbers": []})
        places = {"tables": self.tables, "images": self.images, "mappers": self.mappers, "readings": readings}
        self._put = models.CustomJS(args={"message": self._message, "boxes": [], **places}, code=PUT_IN_PLACE)
        self._message.js_on_change("data", self._put)
        if document is not None:  # which keeps it for good
            document.js_on_event("document_ready", self._put)  # the first numbers may be there before the browser is
        readings.tags = [self._message]  # which makes it part of the document

    def _source(self, name: str, data: dict[str, list] | None = None) -> models.ColumnDataSource:
        return models.ColumnDataSource(data or {}, name=f"{self._page.name}/{name}")

    def _empty(self, table: str) -> dict[str, list]:
        """The columns of a table that plots ask for, before there are numbers."""
        items = [item for plot in self._page.plots for item in plot.items if item.table == table]
        return {column: [] for item in items for column in (item.x, item.y)}

    def paint_in(self, boxes: list[models.Column]) -> None:
        """The boxes of the plots, that of the first plot first."""
        self._put.args = {**self._put.args, "boxes": boxes}

    def show(self, tables: Tables, readings: str) -> None:
        """Replace every curve, mark and surface, and the readings, in one message."""
        shown = {name: tables[name] for name in self.tables if name in tables}
        sizes = {name: {column: values.size for column, values in table.items()} for name, table in shown.items()}
        columns = [values for table in shown.values() for values in table.values()]
        images, places = {}, {}
        for plot, surface in self._surfaces.items() if tables else ():
            images[f"image {plot}"], places[plot] = _image(tables[surface.table], surface)
        self._message.data = {
            "layout": [json.dumps({"sizes": sizes, "surfaces": places, "readings": readings})],
            "numbers": [np.concatenate(columns).astype(float) if columns else np.zeros(0)],
            **{name: [image] for name, image in images.items()},
        }

    def freeze(self, tables: Tables | None) -> None:
        """Keep these curves behind the moving ones; None takes them away."""
        for name, source in self.frozen.items():
            source.data = self._empty(name) if tables is None else dict(tables[name])

    def show_simulated(self, table: Table | None) -> None:
        """Points and the ends of their error bars, one standard error either way; None takes them away."""
        data: Table = {}
        columns = defaultdict(partial(np.zeros, 0)) if table is None else table
        for point in self._page.overlay.points:
            name, mean, error = point.measured, columns[point.measured], columns[f"{point.measured}_error"]
            data |= {point.x: columns[point.x], point.y: columns[point.y], f"{name}_error": error}
            data |= {f"{name}_low": mean - error, f"{name}_high": mean + error}
        self.simulated.data = data


def _image(table: Table, surface: Map) -> tuple[np.ndarray, dict[str, float]]:
    """The map and where it lies, with the range of its colours: steep walls do not use them up."""
    x, y = np.unique(table[surface.x]), np.unique(table[surface.y])
    image = table[surface.z].reshape(y.size, x.size)
    low = float(np.nanmin(image))
    high = min(float(np.nanmax(image)), low + 2 * float(np.nanmedian(image) - low))
    place = {"x": x[0], "y": y[0], "dw": x[-1] - x[0], "dh": y[-1] - y[0]}
    return image, {**place, "low": low, "high": high if high > low else low + 1e-12}


def draw(page: Page, plot: Plot, sources: Sources, logarithmic: tuple[bool, bool]) -> figure:
    """The figure of a plot on axes (x, y) that are logarithmic or not."""
    legend_rows = -(-len([item for item in plot.items if item.label]) // 2)
    axes = figure(
        **dict(zip(("x_axis_type", "y_axis_type"), ("log" if on else "linear" for on in logarithmic))),
        name=f"{page.name}/plot/{plot.name}", title=plot.title, x_axis_label=plot.x_label, y_axis_label=plot.y_label,
        height=FRAME_HEIGHT + LEGEND_ROW * legend_rows, min_width=280, sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset", toolbar_location="right",
        active_drag=None, active_scroll=None,  # a finger scrolls the page
    )  # fmt: skip
    axes.toolbar.logo = None
    axes.add_tools(models.SaveTool(filename=f"{page.name}_{plot.name}", description="Save as PNG"))
    axes.title.text_font_size = "14px"
    axes.axis.axis_label_text_font_style = "normal"
    axes.axis.axis_label_text_font_size = "13px"
    axes.axis.major_label_text_font_size = "12px"
    axes.grid.grid_line_alpha = 0.4
    if plot.x_whole and not logarithmic[0]:
        axes.xaxis.ticker = models.SingleIntervalTicker(interval=1, num_minor_ticks=0)
    if plot.y_names:
        axes.yaxis.ticker = list(range(1, len(plot.y_names) + 1))
        axes.yaxis.major_label_overrides = dict(enumerate(plot.y_names, 1))
        axes.height += 60
    elif logarithmic[1]:
        axes.yaxis.ticker.update(desired_num_ticks=4, num_minor_ticks=0)
    if plot.surface is not None:
        _draw_surface(axes, plot, plot.surface, sources)
    drawn = []
    for item in plot.items:
        if isinstance(item, Line):  # behind it, wide and pale, what was frozen
            frozen = {"source": sources.frozen[item.table], "color": item.colour}
            axes.line(item.x, item.y, line_width=5, line_alpha=0.28, **frozen)
        drawn.append(_draw_item(axes, item, sources.tables[item.table], item.x, item.y))
    for item, glyph in zip(plot.items, drawn):
        _hover(axes, glyph, item.label, plot, item.x, item.y)
    for point in page.overlay.points:
        if point.plot == plot.name:
            low, high = f"{point.measured}_low", f"{point.measured}_high"
            ends = (low, point.y, high, point.y) if point.sideways else (point.x, low, point.x, high)
            style = {"source": sources.simulated, "color": point.colour}
            axes.segment(*ends, line_width=2, **style)
            dots = axes.scatter(point.x, point.y, size=6, line_color=WHITE, **style)
            error = ("standard error", f"@{{{point.measured}_error}}{{0.0000}}")
            _hover(axes, dots, point.label, plot, point.x, point.y, error)
    if legend_rows:
        axes.add_layout(_legend(axes, plot, drawn, sources), "below")
    return axes


def _draw_item(
    axes: figure, item: Line | Mark, source: models.ColumnDataSource, x: str, y: str, **style: Any
) -> models.GlyphRenderer:
    """A line, or a mark in its usual style but for `style`."""
    if isinstance(item, Line):
        return axes.line(x, y, source=source, color=item.colour, line_width=LINE_WIDTH, line_dash=item.dash)
    usual = {"size": 15 if item.marker == "star" else 10, "line_color": WHITE, "line_width": 1.2, **style}
    if item.colour == WHITE:
        usual["line_color"] = "black"
    return axes.scatter(x, y, source=source, marker=item.marker, fill_color=item.colour, **usual)


def _legend(axes: figure, plot: Plot, drawn: list[models.GlyphRenderer], sources: Sources) -> models.Legend:
    """Samples with their labels; a click hides what they stand for."""
    items, hidden = [], []
    for item, glyph in zip(plot.items, drawn):
        if item.label:
            style = {"size": 10, "line_color": item.colour, "line_width": 1}
            items.append((item.label, [_draw_item(axes, item, sources.samples, "x", "y", **style)]))
            hidden.append(glyph)
    legend = models.Legend(items=items, ncols=2, orientation="horizontal", location="left", click_policy="hide")
    legend.update(label_text_font_size="12px", spacing=6, padding=2, margin=0, border_line_color=None)
    legend.update(glyph_width=26, glyph_height=18, label_height=18, label_standoff=2)
    legend.js_on_event(LegendItemClick, models.CustomJS(args={"legend": legend, "drawn": hidden}, code=HIDE))
    return legend


def _draw_surface(axes: figure, plot: Plot, surface: Map, sources: Sources) -> None:
    mapper = sources.mappers[plot.name]
    style = {"source": sources.images[plot.name], "color_mapper": mapper, "level": "image"}
    image = axes.image("image", "x", "y", "dw", "dh", **style)
    axes.grid.visible = False
    axes.x_range.range_padding = axes.y_range.range_padding = 0
    ticker = models.BasicTicker(desired_num_ticks=5)
    axes.add_layout(models.ColorBar(color_mapper=mapper, width=10, ticker=ticker), "right")
    rows = [(plot.x_label, "$x{0.0000}"), (plot.y_label, "$y{0.000}"), (surface.label, "@image{0.0000}")]
    axes.add_tools(models.HoverTool(renderers=[image], tooltips=rows, visible=False))


def _hover(
    axes: figure, glyph: models.GlyphRenderer, label: str, plot: Plot, x: str, y: str, *more: tuple[str, str]
) -> None:
    rows = [("", label), (plot.x_label, f"@{{{x}}}{{0.0000}}"), (plot.y_label, f"@{{{y}}}{{0.0000}}"), *more]
    axes.add_tools(models.HoverTool(renderers=[glyph], tooltips=rows, line_policy="nearest", visible=False))
