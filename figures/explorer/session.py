"""One visitor: tabs built when they are first opened, and a link that always says where they are."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from urllib.parse import urlencode

from bokeh import models
from bokeh.document import Document
from jinja2 import Template

from figures.explorer import prediction, upload
from figures.explorer.page import Page
from figures.explorer.upload import UploadView
from figures.explorer.view import PageView
from figures.explorer.widgets import stacked, text, warn

MODULES = ("overadaptation", "overtraining", "flow", "s3ft", "stages", "compare")
UPLOADS = {"Your features": upload.UPLOAD, "Your network": prediction.UPLOAD}

REPLACE_ADDRESS = 'window.history.replaceState(null, "", "?" + source.data.query[0])'

TEMPLATE = Template("""{% extends base %}
{% block title %}linfit explore{% endblock %}
{% block preamble %}<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body { max-width: 1500px; margin: 0 auto !important; padding: 6px 12px; height: auto !important; }</style>{% endblock %}
""")

HEADER = (
    "<b style='font-size:19px'>linfit explore</b> &nbsp;theory of fine-tuning in linear models: move a slider, "
    "the curves follow."
)

DEBOUNCE = 250
"""Milliseconds between the last movement and the change of the address."""


def pages() -> tuple[Page, ...]:
    """The tabs, in order."""
    return tuple(import_module(f"figures.explorer.{name}").PAGE for name in MODULES)


def app(
    start: Mapping[str, object] | None = None, *, tabs: Sequence[Page] | None = None, keep_address: bool = False
) -> Callable[[Document], None]:
    """What `bokeh.io.show` or a Bokeh server runs for every visitor; in a notebook `show(app())` is live.

    `start` are parameters of the first screen, and "tab" which page it is on: `app({"tab": "overadaptation", "tau": 0.3})`.
    With `keep_address`, for a server of its own, they are read from the address and the address follows the sliders.
    Raises ValueError for parameters that do not exist or make no sense.

    >>> from bokeh.document import Document
    >>> from figures.explorer import app
    >>> document = Document()
    >>> app({"tau": 0.3})(document)
    >>> document.get_model_by_name("overadaptation/tau").value
    0.3
    """
    shown = pages() if tabs is None else tuple(tabs)
    given = {name: str(value) for name, value in (start or {}).items()}

    def visit(document: Document) -> None:
        Session(document, shown, given, keep_address)

    if given and (complaints := Session(Document(), shown, given, False).complaints):
        raise ValueError("; ".join(complaints))
    return visit


class Session:
    """The document of one visitor."""

    def __init__(self, document: Document, shown: tuple[Page, ...], given: dict[str, str], keep_address: bool):
        self._document, self._shown, self._keep_address = document, shown, keep_address
        self._views: dict[str, PageView] = {}
        self._pending: object = None
        self.complaints: list[str] = []
        state = dict(given)
        if keep_address and document.session_context is not None:
            arguments = document.session_context.request.arguments
            state |= {name: values[-1].decode("utf-8", "replace") for name, values in arguments.items()}

        self._address = models.ColumnDataSource({"query": [""]}, name="address")
        message = text(name="message", visible=False)
        self._boxes = [stacked(text("&nbsp;")) for _ in shown]
        panels = [models.TabPanel(child=box, title=page.title) for box, page in zip(self._boxes, shown)]
        for title, file in UPLOADS.items():
            panels.append(models.TabPanel(child=UploadView(document, file, self._changed).layout, title=title))
        self._tabs = models.Tabs(tabs=panels, sizing_mode="stretch_width", name="tabs", tags=[self._address])
        self._tabs.stylesheets = [".bk-headers-wrapper { flex-wrap: wrap; }"]  # on a narrow screen, two rows
        if keep_address:
            self._address.js_on_change("data", models.CustomJS(args={"source": self._address}, code=REPLACE_ADDRESS))
        self._names = names = [*(page.name for page in shown), *(file.name for file in UPLOADS.values())]
        wanted = state.pop("tab", names[0])
        if wanted not in names:
            self.complaints.append(f"tab must be one of {', '.join(names)}, got {wanted[:40]!r}")
            wanted = names[0]
        self._tabs.active = names.index(wanted)
        self._open(self._tabs.active, state)
        self._tabs.on_change("active", lambda _, __, index: self._open(index, {}))
        warn(message, "; ".join(self.complaints))
        document.title, document.template = "linfit explore", TEMPLATE
        document.add_root(stacked(text(HEADER), message, self._tabs, name="explorer"))

    def _open(self, index: int, state: dict[str, str]) -> None:
        page = self._shown[index] if index < len(self._shown) else None
        if page is not None and page.name not in self._views:
            view = PageView(self._document, page, self._changed)
            self._views[page.name] = view
            self._boxes[index].children = [view.layout]
            self.complaints += view.restore(state)
            known = {control.name for control in page.controls} | {"overlay", "frozen"}
            strange = [name for name in state if name not in known and not name.startswith(("axes.", "bokeh-"))]
            self.complaints += [f"there is no parameter {name[:40]!r} on the page {page.name}" for name in strange]
            view.start()
        self._changed()

    def _changed(self) -> None:
        """The address follows, a moment after the last movement."""
        if not self._keep_address:
            return
        if self._pending is not None:
            self._document.remove_timeout_callback(self._pending)
        self._pending = self._document.add_timeout_callback(self._write_address, DEBOUNCE)

    def _write_address(self) -> None:
        self._pending = None
        name = self._names[self._tabs.active]
        state = {"tab": name} | (self._views[name].state() if name in self._views else {})
        self._address.data = {"query": [urlencode(state)]}
