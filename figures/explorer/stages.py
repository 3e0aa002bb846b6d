"""The page of pipelines and merges: fine-tuning in stages, one after the other, and merging runs that start side by side."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Choice, Group, Line, Mark, Overlay, Page, Plot, Points, Reading, Slider, Values
from figures.explorer.tables import Table, Tables, kernel
from linfit import Fit, MergeForm, Ridge, exact_form, sample_design, spectra
from linfit.pipelines import exact_risks
from sims.parameters import NOISE, PENALTY, TAU, N
from theory.merges import Run, Soup, form, soup
from theory.pipelines import Stage, risks

P = 400
"""Features; few enough to sample designs of every stage and run."""
TASKS = ("A", "B", "C")
MOST = 6
"""Stages, and runs; the kernel always has as many, those that are not there with τ = 0 or weight 0."""
TAUS = np.linspace(0, 2, 81)
COUNTS = np.logspace(0, 2, 41)
GOALS = ("all tasks", *TASKS)
STARTS = ("stage 1", "last stage")
STAGE = {"task": "A", "n": 100, "noise_std": 0.7, "penalty": 0.01, "tau": 1.0}
RUN = {"task": "B", "weight": 0.5}
FIRST: dict[str, dict[str, Any]] = {
    "stage1": {"n": 300, "noise_std": 0.3},
    "stage2": {"task": "B", "tau": 0.7},
    "stage3": {"task": "C", "tau": 0.7},
    "stage4": {"tau": 0.7},
    "stage5": {"task": "B", "tau": 0.7},
    "stage6": {"task": "C", "tau": 0.7},
    "run2": {"task": "C", "weight": 0.3},
    "run3": {"task": "C"},
}
"""What differs from STAGE and RUN on the first screen."""

PENALISED = "Loss (1/n)‖y−Xθ‖² + λ‖θ−θ₀‖², θ₀ the weights it starts from."


def _controls() -> tuple[Slider | Choice, ...]:
    """Of the setting, of every stage, of all runs, of every run."""
    n, noise = N.within(20, 400), "Label noise of this stage."
    kinds: dict[str, Slider | Choice] = {
        "task": Choice("task", "The task whose data it is trained on.", TASKS),
        "n": Slider("samples n", n, 10, "New ones in every stage."),
        "noise_std": Slider("noise σ", NOISE, 0.02, noise),
        "penalty": Slider("penalty λ", PENALTY.within(1e-4, 10.0), 0.125, PENALISED),
        "tau": Slider("averaging τ", TAU, 0.02, "θ_k = (1−τ)θ_(k−1) + τ·(fine-tuned from θ_(k−1))."),
        "weight": Slider.own("weight a", "how much of its movement the merge takes", -0.5, 1.5, 0.05, "θ = θ₁ + Σ a_k(θ̂_k − θ₁)."),
    }  # fmt: skip

    def every(noun: str, usual: dict[str, Any]) -> list[Slider | Choice]:
        names = [f"{noun}{member}" for member in range(1, MOST + 1)]
        values = {name: usual | FIRST.get(name, {}) for name in names}
        return [kinds[key]._replace(name=f"{name}_{key}", value=values[name][key]) for name in names for key in usual]

    def whole(noun: str, name: str, value: int) -> Slider:
        own = Slider.own(f"number of {noun}s", f"how many {noun}s there are", 1, MOST, 1, scale="whole")
        return own._replace(name=name, value=value)

    of_runs = {"n": 100, "noise_std": 0.7, "penalty": 0.01}
    return (
        Slider.own("similarity of the tasks", "correlation of their optima, coordinate by coordinate; 1 makes them one task",
            -0.4, 1.0, 0.02)._replace(name="similarity", value=0.6),
        Slider.own("spectral decay", "Σ = diag(j^−decay), of all tasks", 0.0, 2.0, 0.05)._replace(name="decay", value=1.0),
        whole("stage", "stages", 3),
        *every("stage", STAGE),
        Choice("runs start from", "The weights that all runs start from, and that the merge is added to.", STARTS, name="start", value=STARTS[0]),
        Choice("goal of the merge", "Its weights and τ are the best for this: the risk on one task, or the mean of all.", GOALS, name="goal", value=GOALS[0]),
        *(kinds[key]._replace(label=f"{kinds[key].label}, runs", name=f"runs_{key}", value=value) for key, value in of_runs.items()),
        whole("run", "runs", 2),
        *every("run", RUN),
    )  # fmt: skip


CONTROLS = _controls()


def _column(at: Values, noun: str, field: str, filling: float) -> np.ndarray:
    """(MOST,) values of all stages or runs, `filling` where there is none; of tasks their indices."""
    count = int(at[f"{noun}s"])
    values = [at[f"{noun}{member}_{field}"] for member in range(1, count + 1)]
    values = [TASKS.index(str(value)) for value in values] if field == "task" else values
    return np.array([*values, *[filling] * (MOST - count)])


def _similarity(similarity: Any) -> Array:
    """Correlations (T, T) of the optima."""
    identity = jnp.eye(len(TASKS))
    return identity + similarity * (1 - identity)


@partial(jax.jit, static_argnums=3)
def _pipeline(pipeline: dict[str, Array], spectrum: Array, optima: Array, averaging: bool) -> tuple[Array, Array]:
    """Risk (MOST, T) of every task after every stage, and E(θ_k − θ*_b)² (T, p), k the stage that runs start from.

    Each stage trains on an optimum of its own, that of its task, so that tasks are numbers and nothing is compiled anew.
    The second moments are what the risk has of each coordinate of the test covariance.
    """
    each = jnp.concatenate([pipeline["task"], jnp.arange(len(TASKS))])
    targets, filter = optima[each][:, each], Ridge(pipeline["penalty"])
    tau = pipeline["tau"] if averaging else 1.0 - pipeline["absent"]
    stages = Stage(spectrum, pipeline["n"], pipeline["noise_std"], filter, tau)

    def of_tests(tests: Array) -> Array:
        return risks(stages, targets, tests)[:, MOST:]

    risk, pull = jax.vjp(of_tests, jnp.broadcast_to(spectrum, (len(each), P)))
    start = jnp.arange(MOST)[:, None] == pipeline["start"]
    return risk, pull(jnp.broadcast_to(start, risk.shape).astype(risk.dtype))[0][MOST:]


def _gaps(errors: Array, optima: Array) -> Array:
    """E Δ_aΔ_b (T, T, p), Δ_a = θ*_a − θ₁: ab = ½[a² + b² − (a−b)²]."""
    square = jnp.einsum("aaj->aj", optima)
    apart = square[:, None] + square - 2 * optima
    return (errors[:, None] + errors - apart) / 2


def _merges(runs: dict[str, Array], spectrum: Array, gaps: Array) -> tuple[MergeForm, Soup]:
    """Of every test task, stacked: the form of all runs, and the law of copies of the first."""
    filter = Ridge(runs["penalty"])
    fitted = [Run(k, spectrum, runs["n"], runs["noise_std"], filter) for k in range(MOST)]  # tasks as in `_pipeline`

    def of_test(test: Array) -> tuple[MergeForm, Soup]:
        each = jnp.append(runs["task"], test)
        targets, pair = gaps[each][:, each], jnp.stack([runs["task"][0], test])
        return form(fitted, targets, spectrum, MOST), soup(fitted[0], gaps[pair][:, pair], spectrum, 1)

    return jax.vmap(of_test)(jnp.arange(len(TASKS)))


def _without(absent: Array, merged: MergeForm) -> MergeForm:
    """The form in which the runs that are absent do nothing; their best weight is 0."""
    here = 1.0 - absent
    quadratic = merged.quadratic * here[:, None] * here + jnp.diag(absent.astype(here.dtype))
    return MergeForm(merged.constant, merged.linear * here, quadratic)


def _named(values: Array, suffix: str = "") -> Table:
    """Columns A, B, C of an array whose last axis is the task."""
    return {f"{task}{suffix}": values[..., index] for index, task in enumerate(TASKS)}


def _setting(similarity: Any, decay: Any) -> tuple[Array, Array]:
    """Spectrum (p,), and E θ*_aθ*_b (T, T, p), which make the risk of the weights 0 be 1."""
    spectrum = spectra.power_law(P, decay)
    return spectrum, jnp.broadcast_to(_similarity(similarity)[:, :, None] / spectrum.sum(), (3, 3, P))


@kernel
def _tables(
    setting: tuple[Array, Array], pipeline: dict[str, Array], runs: dict[str, Array], weight: Array, goal: Array
) -> Tables:
    spectrum, optima = setting
    staged, errors = _pipeline(pipeline, spectrum, optima, True)
    unaveraged, _ = _pipeline(pipeline, spectrum, optima, False)
    forms, soups = _merges(runs, spectrum, _gaps(errors, optima))
    mixed, law = (jax.tree.map(partial(jnp.tensordot, goal, axes=1), each) for each in (forms, soups))
    best = _without(runs["absent"], mixed).optimal_weights()
    slope, curvature = mixed.linear @ weight, weight @ mixed.quadratic @ weight
    tau = jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), 0)

    def merged(weights: Array | np.ndarray) -> Array:
        """Risk (…, T) of every task."""
        return jax.vmap(lambda form: form(weights), out_axes=-1)(forms)

    once, tuned, chosen = merged(weight), merged(best), merged(tau * weight)
    start = staged[pipeline["start"]]
    return {
        "stages": {"stage": jnp.arange(MOST + 1.0), **_rows(staged, optima, spectrum),
                   **{f"{name}_unaveraged": values for name, values in _rows(unaveraged, optima, spectrum).items()}},
        "merge": {"tau": TAUS, **_named(merged(TAUS[:, None] * weight)), "goal": mixed(TAUS[:, None] * weight),
                  "best": mixed(TAUS[:, None] * best)},
        "once": {"tau": jnp.ones(1), **_named(once[None]), "goal": mixed(weight)[None]},
        "best_tau": {"tau": tau[None], **_named(chosen[None]), "goal": mixed(tau * weight)[None]},
        "best_weights": {"tau": jnp.ones(1), **_named(tuned[None]), "goal": mixed(best)[None]},
        "weights": {"run": jnp.arange(1.0, MOST + 1), "weight": weight, "best": best},
        "start": {"tau": jnp.zeros(1), **_named(start[None]), "goal": mixed.constant[None]},
        "soup": {"count": COUNTS, "once": law(COUNTS), "best": law.optimal_risk(COUNTS),
                 "lower_bound": jnp.full(COUNTS.size, law.lower_bound()), "best_tau": law.optimal_tau(COUNTS)},
    }  # fmt: skip


def _rows(risk: Array, optima: Array, spectrum: Array) -> Table:
    """Risks of A, B, C before and after every stage."""
    return _named(jnp.concatenate([jnp.einsum("aaj,j->a", optima, spectrum)[None], risk]))


def _stages(at: Values) -> dict[str, np.ndarray]:
    """Of all stages, those that are not there with τ = 0."""
    columns = {name: _column(at, "stage", name, 1.0) for name in ("n", "noise_std", "penalty")}
    tau, task = _column(at, "stage", "tau", 0.0), _column(at, "stage", "task", 0).astype(int)
    start = 0 if at["start"] == STARTS[0] else int(at["stages"]) - 1
    return {
        **columns,
        "tau": tau,
        "task": task,
        "start": np.array(start),
        "absent": np.arange(MOST) >= int(at["stages"]),
    }


def _runs(at: Values) -> dict[str, np.ndarray]:
    absent = np.arange(MOST) >= int(at["runs"])
    numbers = {name: np.array(float(at[f"runs_{name}"])) for name in ("n", "noise_std", "penalty")}
    return {**numbers, "task": _column(at, "run", "task", 0).astype(int), "absent": absent}


def _goal(at: Values) -> np.ndarray:
    """Weight of each task."""
    return np.array([float(at["goal"] in (GOALS[0], task)) for task in TASKS]) / (3 if at["goal"] == GOALS[0] else 1)


def curves(at: Values) -> Tables:
    """Every task's risk after every stage (docs, P1), and of merges and soups of runs (K1, K2), without sampling."""
    stages, weight = int(at["stages"]), _column(at, "run", "weight", 0.0)
    tables = _tables(_setting(at["similarity"], at["decay"]), _stages(at), _runs(at), weight, _goal(at))
    for table, rows in {"stages": stages + 1, "weights": int(at["runs"])}.items():
        tables[table] = {name: values[:rows] for name, values in tables[table].items()}
    after = {name: values[-1:] for name, values in tables["stages"].items()}
    forgetting = {f"forgetting_{task}": after[task] - tables["stages"][task][1:2] for task in TASKS}
    return {**tables, "after": {**after, **forgetting}}


def replicate(index: int, at: Values) -> Table:
    """The same on designs sampled from seed 0, averaged exactly over noise and optima, and for merges over their start."""
    (spectrum, optima), pipeline, runs = _setting(at["similarity"], at["decay"]), _stages(at), _runs(at)
    key, count = jax.random.fold_in(jax.random.key(0), index), int(at["stages"])
    keys = jax.random.split(key, 2 * MOST)
    designs = [sample_design(keys[k], spectrum, int(pipeline["n"][k])) for k in range(count)]
    tests = jnp.broadcast_to(spectrum, (len(TASKS), P))
    noise, tau = pipeline["noise_std"][:count], pipeline["tau"][:count]
    filters, tasks = [Ridge(penalty) for penalty in pipeline["penalty"][:count]], pipeline["task"][:count].tolist()
    staged = exact_risks(designs, filters, optima, tests, noise_std=noise, tau=tau, task=tasks).total
    gaps = _gaps(_pipeline(pipeline, spectrum, optima, True)[1], optima)
    X = [sample_design(keys[MOST + k], spectrum, int(runs["n"])) for k in range(int(at["runs"]))]
    fits = [Fit(int(task), rows, runs["noise_std"], Ridge(runs["penalty"])) for task, rows in zip(runs["task"], X)]
    weights = TAUS[::8, None] * _column(at, "run", "weight", 0.0)[: len(fits)]
    merged = [exact_form(fits, gaps, spectrum, test)(weights) for test in range(len(TASKS))]
    columns = {"stage": np.arange(1.0, count + 1), **_named(staged), "tau": TAUS[::8]}
    columns |= _named(jnp.stack(merged, axis=-1), " merged")
    return {name: np.asarray(values) for name, values in columns.items()}


SHADES = dict(zip(TASKS, ("#0072B2", "#D55E00", "#009E73")))
BLACK, GREY = "#000000", "#777777"
EACH = tuple(SHADES.items())

PAGE = Page(
    name="stages",
    title="Stages and runs",
    source="Formulas: ours (docs, P1, K1, K2). Each task's optimum is random; without training the risk is 1 on every task.",
    introduction=(
        "Three related tasks, <b>A</b>, <b>B</b> and <b>C</b>. Train on them <b>one after the other</b>, in stages that may average with "
        "the weights before; or let <b>runs</b> start side by side from the same weights and <b>merge</b> them. Add a stage, add a run."
    ),
    choices=CONTROLS,
    groups=(Group("stage", "stages", MOST), Group("run", "runs", MOST)),
    curves=curves,
    plots=(
        Plot("stages", "Every task after every stage", "stages done", "excess risk (units of y²)",
             Line.over("stages", "stage", *((task, f"task {task}", shade) for task, shade in EACH),
                       *((f"{task}_unaveraged", f"{task}, all τ = 1", shade, "dashed") for task, shade in EACH)),
             tuple(Mark("stages", "stage", task, "", shade) for task, shade in EACH), x_whole=True),
        Plot("merge", "The merge of all runs, along τ", "τ, of all weights", "excess risk (units of y²)",
             Line.over("merge", "tau", *((task, f"task {task}", shade) for task, shade in EACH),
                       ("goal", "goal", BLACK), ("best", "goal, best weights", BLACK, "dashed")),
             (Mark("best_tau", "tau", "goal", "best τ", BLACK, "star"), Mark("best_weights", "tau", "goal", "best weights", BLACK, "diamond"))),
        Plot("soup", "Soup of K runs like run 1", "number of runs K, each of weight τ/K", "risk of the goal",
             Line.over("soup", "count", ("once", "τ = 1", SHADES["A"]), ("best", "best τ for each K", SHADES["B"], "dashed"),
                       ("lower_bound", "lower bound at τ = 1", GREY, "dotted")), x_logarithmic=True),
        Plot("weights", "Weights of the runs", "run", "weight a", (),
             (Mark("weights", "run", "weight", "sliders", BLACK), Mark("weights", "run", "best", "best weights", SHADES["B"], "diamond")), x_whole=True),
    ),
    readings=(
        *(Reading(f"task {task} after the last stage", "Excess risk.", "after", task) for task in TASKS),
        Reading("A forgotten", "Risk on A after the last stage minus that after the first.", "after", "forgetting_A"),
        Reading("where the runs start", "Risk of the goal without any run.", "start", "goal"),
        Reading("merge of the sliders", "Risk of the goal with the weights of the sliders.", "once", "goal"),
        Reading("best τ", "By which all weights of the sliders are multiplied.", "best_tau", "tau"),
        Reading("risk there", "Of the goal.", "best_tau", "goal"),
        Reading("risk of the best weights", "Of the goal, every run with its own weight (docs, K1).", "best_weights", "goal"),
    ),
    suggestions={
        "Never average: A is forgotten": {"stage2_tau": 1.0, "stage3_tau": 1.0},
        "Six runs on one task: a soup": {
            "runs": MOST, "goal": "B", **{f"run{k}_{name}": value for k in range(1, MOST + 1) for name, value in (("task", "B"), ("weight", 0.15))}},
        "Unrelated tasks": {"similarity": 0.0},
    },
    overlay=Overlay("8 samples of all designs", replicate, 8, ("stage", "tau"), tuple(
        point for task, shade in EACH for point in (
            Points("stages", "stage", task, f"task {task}, designs", shade), Points("merge", "tau", f"{task} merged", f"task {task}, designs", shade)))),
)  # fmt: skip
