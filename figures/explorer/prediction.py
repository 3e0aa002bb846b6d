"""The page of a saved prediction (`linfit.predict`): λ, t and τ turned by hand on one's own network."""

import html
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Choice, Line, Mark, Page, Plot, Reading, Slider, Values
from figures.explorer.tables import Table, Tables
from figures.explorer.upload import Upload, unpacked
from figures.style import COLOURS
from linfit import Filter, GradientFlow, Ridge
from linfit.tangent import Domain, Prediction
from linfit.tangent.prediction import TRUSTED_CURVATURE
from sims.parameters import TAU

LIMIT = 128 * 2**20
"""Largest file, in bytes."""
TAUS = np.linspace(0, 2, 101)


class Family(NamedTuple):
    """Filters of one hyperparameter."""

    name: str
    """Of the hyperparameter."""
    symbol: str
    filter: type[Ridge] | type[GradientFlow]
    label: str
    help: str
    title: str
    """Of the plot along it."""


FAMILIES = {
    "ridge": Family("penalty", "λ", Ridge, "penalty λ", "Ridge minimises (1/n) Σ‖y−f‖² + λ‖θ−θ₁‖²; in units of the eigenvalues of K/n.",
        "Along the penalty"),
    "early stopping": Family("time", "t", GradientFlow, "training time t",
        "Step size × steps of full-batch descent on the mean loss, for squared loss with a factor ½.", "Training longer"),
}  # fmt: skip
LOSSES = {"squared": "squared error", "entropy": "cross-entropy"}
DIAGNOSTICS = {
    "distance": "Length of the predicted step of the weights.",
    "relative_distance": "The same relative to the pretrained weights.",
    "largest_relative_distance": "The same, the largest of any one array of weights.",
    "alignment": "How much of the residual the kernel learns first; 1 at most.",
    "curvature_test": "Second order over first, of the outputs on the task.",
    "curvature_other": "Second order over first, of the outputs on the other data.",
    "gap_test": "What the linearised outputs miss of the network's at the predicted step, relative to their change, on the task.",
    "gap_other": "The same on the other data.",
    "loss_gap_test": "Loss of the network at the predicted step over that of the linear model, minus 1, on the task.",
    "loss_gap_other": "The same on the other data.",
    "kernel_change": "How much the kernel changes along the predicted step, on the residual.",
}


class Grid(NamedTuple):
    """Mean losses of one family of filters at F values of its hyperparameter and T values of τ."""

    values: np.ndarray
    task: np.ndarray
    """(F, T)."""
    other: np.ndarray
    """(F, T), NaN without other data."""

    def at_best_tau(self) -> Table:
        """At each value the τ in [0, 2] of least task loss, and both losses there, columns (F,)."""
        return _vertices(self.task, self.other)


class Tabulated(NamedTuple):
    """All that the page shows of a prediction."""

    loss: str
    families: dict[str, Grid]
    diagnostics: dict[str, float]
    has_other: bool


def tabulated(prediction: Prediction) -> Tabulated:
    """Losses over λ × τ and t × τ; with cross-entropy over t × τ, by one pass of the flow."""
    s_max = float(prediction.eigenvalues.max())
    if not s_max > 0:
        raise ValueError(f"eigenvalues must be positive somewhere, got at most {s_max:g}: nothing can be learned")
    grids = {"time": np.asarray(prediction.default_times())}
    if prediction.loss == "squared":
        grids["penalty"] = s_max * np.logspace(-6, 1, 43)
    families = {
        name: _grid(prediction, family.filter(grids[family.name]), grids[family.name])
        for name, family in FAMILIES.items()
        if family.name in grids
    }
    numbers = {name: float(value) for name, value in prediction.diagnostics.items() if np.size(value) == 1}
    return Tabulated(prediction.loss, families, numbers, prediction.other is not None)


def _grid(prediction: Prediction, filter: Filter, values: np.ndarray) -> Grid:
    alpha = prediction.coordinates(filter)

    def table(domain: Domain | None) -> np.ndarray:
        if domain is None:
            return np.full((values.size, TAUS.size), np.nan)
        loss = _squared if prediction.loss == "squared" else _entropy
        return np.asarray(loss(domain, alpha, jnp.asarray(TAUS, alpha.dtype)), float)

    return Grid(values, table(prediction.test), table(prediction.other))


@jax.jit
def _squared(domain: Domain, alpha: Array, taus: Array) -> Array:
    """‖r‖² − 2τ r·Bα + τ²‖Bα‖², means over samples (F, T); r = y − f₁."""
    residual = domain.labels - domain.outputs
    count = len(residual)

    def parabola(alpha: Array) -> Array:
        moved = domain.moved(alpha)
        return (jnp.sum(residual**2) - 2 * taus * jnp.sum(residual * moved) + taus**2 * jnp.sum(moved**2)) / count

    return jax.lax.map(parabola, alpha)


@jax.jit
def _entropy(domain: Domain, alpha: Array, taus: Array) -> Array:
    """Mean cross-entropy of f₁ + τBα (F, T), one τ at a time in memory."""

    def along(alpha: Array) -> Array:
        moved = domain.moved(alpha)

        def mean(tau: Array) -> Array:
            return -jnp.sum(domain.labels * jax.nn.log_softmax(domain.outputs + tau * moved)) / len(domain.labels)

        return jax.lax.map(mean, taus)

    return jax.lax.map(along, alpha)


def _vertices(task: np.ndarray, other: np.ndarray) -> Table:
    """The least of each row of convex losses by the parabola through its lowest three points, and `other` there.

    Exact for squared loss, whose rows are parabolas; held to [0, 2].
    """
    rows, middle, step = np.arange(len(task)), np.clip(task.argmin(axis=1), 1, TAUS.size - 2), TAUS[1]

    def coefficients(values: np.ndarray) -> tuple[np.ndarray, ...]:
        low, at, high = (values[rows, middle + shift] for shift in (-1, 0, 1))
        return at, (high - low) / (2 * step), (high - 2 * at + low) / step**2

    _, slope, curvature = coefficients(task)
    move = np.where(curvature > 0, -slope / np.where(curvature > 0, curvature, 1), 0.0)
    tau = np.clip(TAUS[middle] + move, 0, 2)
    offset = tau - TAUS[middle]

    def there(values: np.ndarray) -> np.ndarray:
        at, slope, curvature = coefficients(values)
        return at + slope * offset + curvature * offset**2 / 2

    return {"tau": tau, "task": there(task), "other": there(other)}


def curves(data: Tabulated, at: Values) -> Tables:
    """Mean losses on task and other data (docs, G1) along τ, λ and t, at positions of the grids of `tabulated`."""
    chosen = str(at["family"]) if "family" in at else next(iter(data.families))
    grid, column, one = data.families[chosen], _nearest(TAUS, at["tau"]), _nearest(TAUS, 1.0)
    row = _nearest(grid.values, at[FAMILIES[chosen].name])
    best = {name: values[[row]] for name, values in grid.at_best_tau().items()}
    start, once = grid.other[row, [0]], grid.other[row, [one]]
    tables: Tables = {
        "tau": {"tau": TAUS, "task": grid.task[row], "other": grid.other[row]},
        "now": {"tau": TAUS[[column]], "task": grid.task[row, [column]], "other": grid.other[row, [column]]},
        "best": {**best, "forgetting": best["other"] - start},
        "once": {"tau": TAUS[[one]], "task": grid.task[row, [one]], "other": once, "forgetting": once - start},
        "pretrained": {"tau": TAUS[[0]], "task": grid.task[row, [0]], "other": start},
        "along": {"task": grid.task[:, one], "other": grid.other[:, one]},
    }
    for family, each in data.families.items():
        name, least = FAMILIES[family].name, each.task[:, one].argmin()
        here = _nearest(each.values, at[name])
        tables[name] = {name: each.values, "once": each.task[:, one], "at_tau": each.task[:, column],
                        "at_best_tau": each.at_best_tau()["task"], "other": each.other[:, one]}  # fmt: skip
        tables[f"{name}_best"] = {name: each.values[[least]], "task": each.task[[least], one]}
        tables[f"{name}_now"] = {name: each.values[[here]], "task": each.task[here, [column]]}
    return {**tables, "trust": {name: np.array([value]) for name, value in data.diagnostics.items()}}


def _nearest(values: np.ndarray, value: float | str) -> int:
    """Where the value stands on its grid."""
    return int(np.argmin(abs(values - float(value))))


TASK, OTHER, AVERAGE, RIDGE = (COLOURS[name] for name in ("total", "pretrained", "ensemble", "ridge"))


def _controls(data: Tabulated) -> tuple[Slider | Choice, ...]:
    """Family, λ and t at their best for τ = 1, and τ at its best there."""
    controls: list[Slider | Choice] = []
    if len(data.families) > 1:
        options, help = tuple(data.families), "Ridge towards the pretrained weights, or training stopped at a time."
        controls.append(Choice("fine-tuned by", help, options, name="family", value=options[0]))
    for name, grid in data.families.items():
        family, best = FAMILIES[name], float(grid.values[grid.task[:, _nearest(TAUS, 1.0)].argmin()])
        controls.append(Choice(family.label, family.help, tuple(grid.values.tolist()), True, family.name, best))
    tau = Slider("ensemble coefficient τ", TAU.within(0.0, 2.0), 0.02, "f₁ + τ·(what fine-tuning changes).")
    return (*controls, tau._replace(name="tau", value=1.0))


def _plots(data: Tabulated) -> tuple[Plot, ...]:
    unit, other = f"mean {LOSSES[data.loss]}", data.has_other
    on_other = (("other", "other data", OTHER, "dashed"),)
    along = Plot("tau", "Predicted loss along the ensemble", "ensemble coefficient τ", unit,
                 Line.over("tau", "tau", ("task", "task", TASK), *(on_other if other else ())),
                 (Mark("now", "tau", "task", "τ of the slider", TASK), Mark("best", "tau", "task", "best τ in [0, 2]", TASK, "star")))  # fmt: skip
    plane = Plot("plane", "Trade-off: forgetting and learning", f"other data: {unit}", f"task: {unit}",
                 (Line("tau", "other", "task", "along τ", AVERAGE), Line("along", "other", "task", "τ = 1, along λ or t", RIDGE, "dashed")),
                 (Mark("pretrained", "other", "task", "pretrained", OTHER, "square"), Mark("now", "other", "task", "sliders", TASK),
                  Mark("best", "other", "task", "best τ", TASK, "star")))  # fmt: skip
    plots = [along, plane] if other else [along]
    for family in (FAMILIES[name] for name in data.families):
        shown = Line.over(family.name, family.name, ("once", "task, τ = 1", TASK), ("at_tau", "task, τ of the slider", RIDGE, "dotted"),
                          ("at_best_tau", "task, best τ", AVERAGE, "dotdash"),
                          *((("other", "other data, τ = 1", OTHER, "dashed"),) if other else ()))  # fmt: skip
        mark = Mark(f"{family.name}_now", family.name, "task", "sliders", TASK)
        plots.append(Plot(family.name, family.title, family.label, unit, shown, (mark,), x_logarithmic=True))
    return tuple(plots)


def _readings(data: Tabulated) -> tuple[Reading, ...]:
    forgetting = (
        Reading("forgetting at τ = 1", "Rise of the loss on the other data.", "once", "forgetting"),
        Reading("at the best τ", "The same.", "best", "forgetting"),
    )
    families = [FAMILIES[name] for name in data.families]
    return (
        Reading("best τ", "Of least task loss, in [0, 2].", "best", "tau"),
        Reading("task loss there", "Mean over the test samples.", "best", "task"),
        Reading("at τ = 1", "Task loss.", "once", "task"),
        Reading("pretrained", "Task loss at τ = 0.", "pretrained", "task"),
        *(forgetting if data.has_other else ()),
        *(Reading(f"best {family.symbol}", "Of least task loss at τ = 1, on a grid.", f"{family.name}_best", family.name) for family in families),
        *(Reading(name.replace("_", " "), DIAGNOSTICS.get(name, "A diagnostic."), "trust", name) for name in data.diagnostics),
    )  # fmt: skip


def doubts(diagnostics: dict[str, float]) -> str:
    """Why not to trust the prediction, in words; nothing if there is no reason known."""
    known = {name: value for name, value in diagnostics.items() if name.startswith("curvature_")}
    large = {name: value for name, value in known.items() if not value <= TRUSTED_CURVATURE}
    if not known:
        return "Not checked against the network: the file has no diagnostics."
    if not large:
        return ""
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in large.items())
    return f"Do not trust these curves: along the predicted step the network bends ({numbers}; trusted up to {TRUSTED_CURVATURE:g})."


def prediction_page(name: str, data: Tabulated) -> Page:
    """The page of one saved prediction."""
    file, doubt = Path(name).name, doubts(data.diagnostics)
    warning = f"<div class='warning'>{html.escape(doubt)}</div>" if doubt else ""
    longest: Values = {"time": float(data.families["early stopping"].values[-1])}
    stopped: Values = {"family": "early stopping"} if len(data.families) > 1 else {}
    return Page(
        name="prediction",
        title="Your network",
        source="Linearised network, tangent features: ours (docs, G1); the kernel view of fine-tuning: arXiv 2210.05643. "
        "Losses are those of the held-out samples at hand, so their minimum is slightly optimistic.",
        introduction=f"<b>{html.escape(file[:60])}</b>: what fine-tuning this network is predicted to do, by {LOSSES[data.loss]}.{warning}",
        choices=_controls(data),
        curves=curves,
        plots=_plots(data),
        readings=_readings(data),
        suggestions={"Take the whole step: τ = 1": {"tau": 1.0}, "Half of it": {"tau": 0.5},
                     "Train to the end": {**stopped, **longest}},
        data=data,
        data_source="from figures.explorer.prediction import tabulated\nfrom linfit.tangent import Prediction\n\n"
        f"data = tabulated(Prediction.load({file!r}))",
    )  # fmt: skip


def read_prediction(name: str, content: str) -> Page:
    """The page of an uploaded .npz, given in base64; nothing is unpickled. ValueError says what is wrong with it."""
    with unpacked(name, content, LIMIT) as file:
        return prediction_page(name, tabulated(Prediction.load(file)))


UPLOAD = Upload(
    "prediction",
    "A prediction of your own network, as <code>prediction.save(\"bundle.npz\")</code> writes it after <code>linfit.predict</code>, "
    f"at most {LIMIT // 2**20} MB. It is read by the machine that serves this page, without pickle, and forgotten with the session.",
    LIMIT,
    read_prediction,
)  # fmt: skip
