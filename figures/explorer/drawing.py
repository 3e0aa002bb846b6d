"""One pair of axes as a Bokeh figure: curves, frozen curves, marks, surface, simulated points."""

import json

import numpy as np
from bokeh.document import Document
from bokeh.events import LegendItemClick
from bokeh.models import (
    BasicTicker,
    ColorBar,
    Column,
    ColumnDataSource,
    CustomJS,
    Div,
    GlyphRenderer,
    HoverTool,
    Legend,
    LinearColorMapper,
    SaveTool,
)
from bokeh.palettes import cividis
from bokeh.plotting import figure

from figures.explorer.page import Line, Map, Mark, Page, Plot, Table

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
    by the browser; on this side they stay empty.
    """

    def __init__(self, document: Document, page: Page, readings: Div):
        self._page = page
        self.tables: dict[str, ColumnDataSource] = {}
        self.frozen: dict[str, ColumnDataSource] = {}
        self.images: dict[str, ColumnDataSource] = {}
        self.mappers: dict[str, LinearColorMapper] = {}
        # A legend is built anew whenever the data of its curves change, so it explains samples that never do.
        self.samples = ColumnDataSource({"x": [np.nan], "y": [np.nan]})
        self.simulated = ColumnDataSource(name=f"{page.name}/table/simulated")
        for plot in page.plots:
            for table in {item.table for item in plot.items} - set(self.tables):
                self.tables[table] = ColumnDataSource(_empty(page, table), name=f"{page.name}/table/{table}")
                self.frozen[table] = ColumnDataSource(_empty(page, table), name=f"{page.name}/frozen/{table}")
            if plot.surface is not None:
                self.images[plot.name] = ColumnDataSource(
                    {name: [] for name in ("image", "x", "y", "dw", "dh")}, name=f"{page.name}/image/{plot.name}"
                )
                self.mappers[plot.name] = LinearColorMapper(palette=cividis(64))
        self.clear_simulated()
        self._message = ColumnDataSource({"layout": [], "numbers": []}, name=f"{page.name}/message")
        places = {"tables": self.tables, "images": self.images, "mappers": self.mappers, "readings": readings}
        self._put = CustomJS(args={"message": self._message, "boxes": [], **places}, code=PUT_IN_PLACE)
        self._message.js_on_change("data", self._put)
        document.js_on_event("document_ready", self._put)  # the first numbers may be there before the browser is
        readings.tags = [self._message]  # which makes it part of the document

    def paint_in(self, boxes: list[Column]) -> None:
        """The boxes of the plots, that of the first plot first."""
        self._put.args = {**self._put.args, "boxes": boxes}

    def show(self, tables: dict[str, Table], readings: str) -> None:
        """Replace every curve, mark and surface, and the readings, in one message."""
        shown = {name: tables[name] for name in self.tables if name in tables}
        sizes = {name: {column: values.size for column, values in table.items()} for name, table in shown.items()}
        columns = [values for table in shown.values() for values in table.values()]
        images, surfaces = {}, {}
        for plot in self._page.plots if tables else ():
            if plot.surface is not None:
                images[f"image {plot.name}"], surfaces[plot.name] = _image(tables, plot.surface)
        self._message.data = {
            "layout": [json.dumps({"sizes": sizes, "surfaces": surfaces, "readings": readings})],
            "numbers": [np.concatenate(columns).astype(float) if columns else np.zeros(0)],
            **{name: [image] for name, image in images.items()},
        }

    def freeze(self, tables: dict[str, Table] | None) -> None:
        """Keep these curves behind the moving ones; None takes them away."""
        for name, source in self.frozen.items():
            source.data = _empty(self._page, name) if tables is None else dict(tables[name])

    def show_simulated(self, table: dict[str, np.ndarray]) -> None:
        """Points and the ends of their error bars, one standard error either way."""
        data: dict[str, np.ndarray] = {}
        for point in self._page.overlay.points if self._page.overlay else ():
            mean, error = table[point.measured], table[f"{point.measured}_error"]
            data |= {point.x: table[point.x], point.y: table[point.y], f"{point.measured}_error": error}
            data |= {f"{point.measured}_low": mean - error, f"{point.measured}_high": mean + error}
        self.simulated.data = data

    def clear_simulated(self) -> None:
        """No points."""
        names: set[str] = set()
        for point in self._page.overlay.points if self._page.overlay else ():
            names |= {point.x, point.y, *(point.measured + suffix for suffix in ("_error", "_low", "_high"))}
        self.simulated.data = {name: [] for name in names}


def _image(tables: dict[str, Table], surface: Map) -> tuple[np.ndarray, dict[str, float]]:
    """The map and where it lies, with the range of its colours: steep walls do not use them up."""
    table = tables[surface.table]
    x, y = np.unique(table[surface.x]), np.unique(table[surface.y])
    image = table[surface.z].reshape(y.size, x.size)
    low = float(np.nanmin(image))
    high = min(float(np.nanmax(image)), low + 2 * float(np.nanmedian(image) - low))
    place = {"x": x[0], "y": y[0], "dw": x[-1] - x[0], "dh": y[-1] - y[0]}
    return image, {**place, "low": low, "high": high if high > low else low + 1e-12}


def _empty(page: Page, table: str) -> dict[str, list]:
    """The columns of a table that plots ask for, before there are numbers."""
    items = [item for plot in page.plots for item in plot.items if item.table == table]
    return {column: [] for item in items for column in (item.x, item.y)}


def draw(page: Page, plot: Plot, sources: Sources, logarithmic: tuple[bool, bool]) -> figure:
    """The figure of a plot on axes (x, y) that are logarithmic or not."""
    x_axis, y_axis = ("log" if on else "linear" for on in logarithmic)
    axes = figure(
        name=f"{page.name}/plot/{plot.name}",
        title=plot.title,
        x_axis_label=plot.x_label,
        y_axis_label=plot.y_label,
        x_axis_type=x_axis,
        y_axis_type=y_axis,
        height=FRAME_HEIGHT + LEGEND_ROW * -(-(len(plot.lines) + len(plot.marks)) // 2),
        min_width=280,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset",
        active_drag=None,  # a finger scrolls the page
        active_scroll=None,
        toolbar_location="right",
    )
    axes.toolbar.logo = None
    axes.add_tools(SaveTool(filename=f"{page.name}_{plot.name}", description="Save as PNG"))
    axes.title.text_font_size = "14px"
    axes.axis.axis_label_text_font_style = "normal"
    axes.axis.axis_label_text_font_size = "13px"
    axes.axis.major_label_text_font_size = "12px"
    axes.grid.grid_line_alpha = 0.4
    if plot.y_names:
        axes.yaxis.ticker = list(range(1, len(plot.y_names) + 1))
        axes.yaxis.major_label_overrides = dict(enumerate(plot.y_names, 1))
        axes.height += 60
    elif logarithmic[1]:
        axes.yaxis.ticker.update(desired_num_ticks=4, num_minor_ticks=0)
    explained: list[tuple[str, GlyphRenderer, GlyphRenderer]] = []  # label, what is drawn, its sample in the legend
    if plot.surface is not None:
        _draw_surface(axes, plot, sources)
    for line in plot.lines:
        glyph = _draw_line(axes, plot, line, sources)
        if line.label:
            style = {"color": line.colour, "line_width": LINE_WIDTH, "line_dash": line.dash}
            explained.append((line.label, glyph, axes.line("x", "y", source=sources.samples, **style)))
    for mark in plot.marks:
        style = {"fill_color": mark.colour, "line_color": "black" if mark.colour == WHITE else mark.colour}
        glyph = _draw_mark(axes, plot, mark, sources)
        sample = axes.scatter("x", "y", source=sources.samples, marker=mark.marker, size=10, **style)
        explained.append((mark.label, glyph, sample))
    for point in page.overlay.points if page.overlay else ():
        if point.plot == plot.name:
            low, high = f"{point.measured}_low", f"{point.measured}_high"
            ends = (low, point.y, high, point.y) if point.sideways else (point.x, low, point.x, high)
            axes.segment(*ends, source=sources.simulated, color=point.colour, line_width=2)
            dots = axes.scatter(
                point.x, point.y, source=sources.simulated, size=6, color=point.colour, line_color=WHITE
            )
            error = ("standard error", f"@{{{point.measured}_error}}{{0.0000}}")
            _hover(axes, dots, point.label, plot, point.x, point.y, [error])
    if explained:
        axes.add_layout(_legend(explained), "below")
    return axes


def _legend(explained: list[tuple[str, GlyphRenderer, GlyphRenderer]]) -> Legend:
    """Samples with their labels; a click hides what they stand for."""
    legend = Legend(
        items=[(label, [sample]) for label, _, sample in explained],
        ncols=2,
        orientation="horizontal",
        location="left",
        click_policy="hide",
    )
    legend.update(label_text_font_size="12px", spacing=6, padding=2, margin=0, border_line_color=None)
    legend.update(glyph_width=26, glyph_height=18, label_height=18, label_standoff=4)
    drawn = [glyph for _, glyph, _ in explained]
    legend.js_on_event(LegendItemClick, CustomJS(args={"legend": legend, "drawn": drawn}, code=HIDE))
    return legend


def _draw_line(axes: figure, plot: Plot, line: Line, sources: Sources):  # type: ignore[no-untyped-def]
    axes.line(
        line.x, line.y, source=sources.frozen[line.table], color=line.colour, line_width=5, line_alpha=0.28
    )  # what was frozen: wide and pale behind the moving curve
    glyph = axes.line(
        line.x, line.y, source=sources.tables[line.table], color=line.colour, line_width=LINE_WIDTH, line_dash=line.dash
    )
    _hover(axes, glyph, line.label, plot, line.x, line.y)
    return glyph


def _draw_mark(axes: figure, plot: Plot, mark: Mark, sources: Sources):  # type: ignore[no-untyped-def]
    glyph = axes.scatter(
        mark.x,
        mark.y,
        source=sources.tables[mark.table],
        marker=mark.marker,
        size=15 if mark.marker == "star" else 10,
        fill_color=mark.colour,
        line_color="black" if mark.colour == WHITE else WHITE,
        line_width=1.2,
    )
    _hover(axes, glyph, mark.label, plot, mark.x, mark.y)
    return glyph


def _draw_surface(axes: figure, plot: Plot, sources: Sources) -> None:
    surface, mapper = plot.surface, sources.mappers[plot.name]
    assert surface is not None
    image = axes.image(
        "image", "x", "y", "dw", "dh", source=sources.images[plot.name], color_mapper=mapper, level="image"
    )
    axes.grid.visible = False
    axes.x_range.range_padding = axes.y_range.range_padding = 0
    axes.add_layout(ColorBar(color_mapper=mapper, width=10, ticker=BasicTicker(desired_num_ticks=5)), "right")
    axes.add_tools(
        HoverTool(
            renderers=[image],
            tooltips=[(plot.x_label, "$x{0.0000}"), (plot.y_label, "$y{0.000}"), (surface.label, "@image{0.0000}")],
            visible=False,
        )
    )


def _hover(axes, glyph, label, plot, x, y, more=()) -> None:  # type: ignore[no-untyped-def]
    rows = [("", label), (plot.x_label, f"@{{{x}}}{{0.0000}}"), (plot.y_label, f"@{{{y}}}{{0.0000}}"), *more]
    axes.add_tools(HoverTool(renderers=[glyph], tooltips=rows, line_policy="nearest", visible=False))
