"""The tab for a user's own features: an .npz as `linfit select` takes it, explored over λ and τ by leave-one-out."""

import base64
import html
import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bokeh import models
from bokeh.document import Document

from figures.explorer.latest import Latest
from figures.explorer.page import Choice, Line, Map, Mark, Page, Plot, Reading, Slider, Values
from figures.explorer.tables import Tables, grid
from figures.explorer.view import PageView
from figures.explorer.widgets import stacked, text, warn
from figures.selection import load_arrays
from figures.style import COLOURS
from linfit import Selection, select
from sims.parameters import PENALTY, TAU

LIMIT = 32 * 2**20
"""Largest file, in bytes."""
EXPANDED_LIMIT = 8 * LIMIT
"""Largest sum of its arrays; a small archive can hold a very large array of zeros."""
SAMPLE_LIMIT = 3000
"""Rows: the kernel matrix is decomposed, and the surface is kept for every row."""
RIDGE = COLOURS["ridge"]

REFUSE_LARGE_FILES = """
addEventListener("input", (event) => { // comes before "change", on which Bokeh reads the file
  const path = event.composedPath(), input = path[0];
  if (input.files?.[0]?.size > limit && path.some((element) => element.classList?.contains("linfit-upload-" + name))) {
    input.value = "";
    source.value = ""; // forgets an earlier file, and any work on it
    message.setv({text: "<div class='warning'>The file is larger than " + limit / 2 ** 20 + " MB.</div>", visible: true});
  }
}, true);
"""
"""Before anything is sent: too large a message would end the connection instead of in an answer."""


@contextmanager
def unpacked(name: str, content: str, limit: int) -> Iterator[Path]:
    """A file with the bytes of an upload, given in base64, for as long as it is read.

    ValueError unless it is an archive of at most `limit` bytes that expands to at most EXPANDED_LIMIT; errors on reading it become ValueErrors about `name`.
    """
    shown = f"“{Path(name).name[:60]}”"
    no_arrays = ValueError(f"{shown} must be an .npz of plain numeric arrays")
    if len(content) * 3 / 4 > limit + 3:
        raise ValueError(f"{shown} must be at most {limit // 2**20} MB")
    try:
        data = base64.b64decode(content, validate=True)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError):
        raise no_arrays from None
    if size > EXPANDED_LIMIT:
        raise ValueError(f"{shown} must expand to at most {EXPANDED_LIMIT // 2**20} MB, got {size // 2**20} MB")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "upload.npz")
        file.write_bytes(data)
        try:
            yield file
        except ValueError as error:
            message = str(error).replace(str(file), shown).replace(file.name, shown)
            raise ValueError(" ".join(message.split())) from None
        except (MemoryError, zipfile.error, NotImplementedError, RuntimeError, TypeError):
            raise no_arrays from None


def read_upload(name: str, content: str) -> dict[str, np.ndarray]:
    """The arrays of an uploaded .npz, given in base64; nothing is unpickled. ValueError says what is wrong with it."""
    with unpacked(name, content, LIMIT) as file:
        arrays = load_arrays(file)
    if arrays["X"].ndim == 2 and (rows := arrays["X"].shape[0]) > SAMPLE_LIMIT:
        raise ValueError(f"X must have at most {SAMPLE_LIMIT} rows here, got {rows}; linfit select takes more")
    return arrays


def curves(data: Selection, at: Values) -> Tables:
    """Exact leave-one-out error of θ₁ + τ(θ̂_λ − θ₁) (docs, S5), over both, along τ, and along λ."""
    taus, mean, error = data.taus, data.mean_squared_error, data.standard_error
    row, column = int(np.argmin(abs(data.penalties - at["penalty"]))), int(np.argmin(abs(taus - at["tau"])))
    positive = data.penalties > 0
    penalties, losses = data.penalties[positive], mean[positive]
    best = {
        "penalty": data.best_penalty,
        "shown_penalty": max(data.best_penalty, penalties[0]),
        "tau": data.best_tau,
        "tau_error": data.best_tau_error,
        "error": data.best_mean_squared_error,
        "pretrained": data.pretrained_mean_squared_error,
        "gain": data.gain_over_full,
        "gain_error": data.gain_over_full_error,
    }
    return {
        "tau": {"tau": taus, "error": mean[row], "low": (mean - error)[row], "high": (mean + error)[row]},
        "penalty": {
            "penalty": penalties,
            "full": losses[:, int(np.argmin(abs(taus - 1)))],
            "at_tau": losses[:, column],
            "at_best_tau": losses.min(axis=1),
        },
        "surface": {**grid(penalties, taus), "error": losses.T.ravel()},
        "now": {
            "penalty": np.maximum(data.penalties[[row]], penalties[0]),
            "tau": taus[[column]],
            "error": mean[[row], column],
            "standard_error": error[[row], column],
        },
        "best": {name: np.array([value]) for name, value in best.items()},
    }


def features_page(name: str, selection: Selection) -> Page:
    """The page of one user's features."""
    closest = min(selection.penalties, key=lambda penalty: abs(penalty - selection.best_penalty))
    tau = float(selection.taus[int(np.argmin(abs(selection.taus - selection.best_tau)))])
    step = float(selection.taus[1] - selection.taus[0])
    shown = html.escape(Path(name).name[:60])
    return Page(
        name="data",
        title="Your features",
        source="Ensemble and penalty: Hao et al., ICML 2025, arXiv 2506.01901. Exact leave-one-out: ours (docs, S5).",
        introduction=(
            f"<b>{shown}</b>: the leave-one-out error of every average of your pretrained head with a ridge fine-tuned one. "
            "It includes the label noise, and its minimum over many (λ, τ) is slightly optimistic."
        ),
        choices=(
            Choice("penalty λ", f"{PENALTY.help}, in units of the eigenvalues of XXᵀ/n.".capitalize(),
                   tuple(selection.penalties.tolist()), sliding=True, name="penalty", value=float(closest)),
            Slider("ensemble coefficient τ", TAU.within(*selection.taus[[0, -1]].tolist()), step, name="tau", value=tau),
        ),
        curves=curves,
        plots=(
            Plot("tau", "Error along the ensemble", "ensemble coefficient τ", "leave-one-out error (units of y²)",
                 Line.over("tau", "tau", ("error", "error at λ", RIDGE), ("low", "± one standard error", RIDGE, "dotted"), ("high", "", RIDGE, "dotted")),
                 (Mark("now", "tau", "error", "sliders", RIDGE), Mark("best", "tau", "error", "best", RIDGE, "star"))),
            Plot("surface", "Error over λ and τ", "penalty λ", "ensemble coefficient τ", (),
                 (Mark("now", "penalty", "tau", "sliders", "#ffffff"), Mark("best", "shown_penalty", "tau", "best pair", "#ffffff", "star")),
                 Map("surface", "penalty", "tau", "error", "leave-one-out error"), x_logarithmic=True),
            Plot("penalty", "Error along the penalty", "penalty λ", "leave-one-out error (units of y²)",
                 Line.over("penalty", "penalty", ("full", "τ = 1", COLOURS["fine-tuned"]), ("at_tau", "τ of the slider", RIDGE, "dashed"),
                       ("at_best_tau", "best τ at each λ", COLOURS["ensemble"], "dotdash")), x_logarithmic=True),
        ),
        readings=(
            Reading("best λ", "Least leave-one-out error.", "best", "penalty"),
            Reading("best τ", "Exact for that λ.", "best", "tau"),
            Reading("± one standard error", "Of the best τ, over samples.", "best", "tau_error"),
            Reading("error there", "Mean squared leave-one-out error.", "best", "error"),
            Reading("pretrained (τ = 0)", "Mean squared error of the pretrained head.", "best", "pretrained"),
            Reading("gain over τ = 1", "At the best λ; positive is overadaptation.", "best", "gain"),
            Reading("± one standard error", "Of the gain, paired over samples.", "best", "gain_error"),
        ),
        suggestions={"Fine-tune fully: λ = 0, τ = 1": {"penalty": 0.0, "tau": 1.0}, "Do not fine-tune": {"tau": 0.0}},
        data=selection,
        data_source=f"import numpy as np\n\nfrom linfit import select\n\narrays = np.load({Path(name).name!r})\n"
        'data = select(arrays["X"], arrays["y"], arrays["theta_1"])',
    )  # fmt: skip


def _read_features(name: str, content: str) -> Page:
    """The page of an uploaded file; ValueError says what is wrong with it."""
    arrays = read_upload(name, content)
    return features_page(name, select(arrays["X"], arrays["y"], arrays["theta_1"]))


class Upload(NamedTuple):
    """A tab that shows what is in a file of the user's."""

    name: str
    """Of the page that `read` returns."""
    introduction: str
    limit: int
    """Of the file, in bytes."""
    read: Callable[[str, str], Page]
    """Name and content in base64 → page; ValueError for a file that will not do."""


UPLOAD = Upload(
    "data",
    "The last-layer features of your fine-tuning set, the targets and the pretrained head, as <code>linfit select</code> "
    f"takes them: an .npz with X (n, p), y (n,) and theta_1 (p,), at most {LIMIT // 2**20} MB and {SAMPLE_LIMIT} rows. "
    "It is read by the machine that serves this page, without pickle, and forgotten with the session.",
    LIMIT,
    _read_features,
)


class UploadView:
    """The tab before and after a file has been given."""

    def __init__(self, document: Document, upload: Upload, changed: Callable[[], None]):
        self._document, self._changed = document, changed
        self._message = text(name=f"upload/{upload.name}/message", visible=False)
        self._input = models.FileInput(title="an .npz file", accept=".npz", name=f"upload/{upload.name}/file")
        self._input.css_classes = [f"linfit-upload-{upload.name}"]
        self._input.on_change("value", lambda _, __, value: self._given(value))
        self._box = stacked(text(visible=False))
        places = {"message": self._message, "source": self._input, "limit": upload.limit, "name": upload.name}
        document.js_on_event("document_ready", models.CustomJS(args=places, code=REFUSE_LARGE_FILES))
        self.layout = stacked(text(upload.introduction), self._input, self._message, self._box)
        self._latest = Latest(document, lambda request: upload.read(*request), self._show, self._fail)
        self._wanted: tuple[str, str] | None = None

    def _given(self, content: str) -> None:
        """Whatever was shown or is being read is forgotten, also where the new file will not do."""
        self._wanted, self._box.children = None, [text(visible=False)]
        if content:
            warn(self._message, "reading …")
            self._document.add_next_tick_callback(lambda: self._ask(content))

    # The name of the file arrives just after its content.
    def _ask(self, content: str) -> None:
        self._wanted = (self._input.filename, content)
        self._latest.ask(self._wanted)

    def _show(self, request: object, page: Page) -> None:
        if request is not self._wanted:
            return
        self._message.visible = False
        view = PageView(self._document, page, self._changed, passing=True)
        self._box.children = [view.layout]
        view.start()

    def _fail(self, request: object, error: Exception) -> None:
        known = isinstance(error, ValueError)
        if request is self._wanted:
            warn(self._message, str(error) if known else f"The file could not be read ({type(error).__name__}).")
