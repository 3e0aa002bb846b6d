"""Every public function turns bad input away with a ValueError that names the argument."""

import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import linfit
from linfit import spectra
from linfit.covariance import Dense, Diagonal, Empirical
from linfit.design import column_blocks, sample_design, sample_designs, sample_task
from linfit.filters import (
    Combination,
    GradientDescent,
    GradientFlow,
    MinNorm,
    Ridge,
    SelfDistillation,
    SharpnessAware,
    Tabulated,
)
from linfit.problem import FixedShift, RandomShift, TwoTaskProblem, aligned_problem
from linfit.reduction import risk_forms
from linfit.risk import Parabola, excess_risks
from linfit.selection import leave_one_out, select
from linfit.solve import fine_tune, gradient_descent, interpolate

KEY = jax.random.key(0)
N, P = 4, 6
X = np.arange(1.0, N * P + 1).reshape(N, P) % 7
Y, THETA, FLAT = np.arange(1.0, N + 1), np.linspace(-1, 1, P), np.ones(P)
NAN, INF = float("nan"), float("inf")
PROBLEM = TwoTaskProblem(FLAT, FLAT, RandomShift(FLAT), 0.5)
DENSE = TwoTaskProblem(FLAT, np.eye(P), RandomShift(FLAT), 0.5)
FORM = risk_forms(X, PROBLEM).finetune

NOT_REAL = {"complex": 1j, "string": "large", "none": None, "nan": NAN}
NOT_FINITE = {**NOT_REAL, "inf": INF}
NEGATIVE_OR_NAN = {**NOT_REAL, "negative": -0.5}
NEGATIVE = {**NOT_FINITE, "negative": -0.5}
VECTOR = {
    "scalar": 1.0,
    "matrix": np.ones((2, 3)),
    "empty": [],
    "nan": [1.0, NAN],
    "complex": [1j, 2],
    "strings": ["one", "two"],
    "ragged": [[1.0], [1.0, 2.0]],
}
COVARIANCE = {
    "scalar": 1.0,
    "cube": np.ones((P, P, P)),
    "not square": np.ones((P, 2)),
    "empty": [],
    "empty matrix": np.ones((0, 0)),
    "nan": [*FLAT[1:], NAN],
    "inf": [*FLAT[1:], INF],
    "complex": 1j * FLAT,
    "string": "flat",
    "negative": [*FLAT[1:], -1.0],
    "asymmetric": np.triu(np.ones((P, P))),
    "indefinite": np.diag([*FLAT[1:], -1.0]),
    "nan matrix": np.full((P, P), NAN),
}
COUNT = {"zero": 0, "negative": -3, "fraction": 2.5, "float": 4.0, "string": "4", "bool": True, "none": None}
DESIGN = {
    "vector": Y,
    "cube": np.ones((2, N, P)),
    "no rows": np.ones((0, P)),
    "no columns": np.ones((N, 0)),
    "nan": np.where(X > 5, NAN, X),
    "inf": np.where(X > 5, INF, X),
    "complex": X + 1j,
    "string": "design",
    "columns": X[:, :-1],
    "rows": X[:-1],
}
LABELS = {
    "scalar": 1.0,
    "cube": np.ones((N, 1, 1)),
    "size": Y[:-1],
    "nan": Y * NAN,
    "complex": Y + 1j,
    "strings": ["one"] * N,
    "empty": [],
}
WEIGHTS = {"size": np.ones(N + 1), "matrix": np.ones((N, 1)), "negative": -np.ones(N), "nan": Y * NAN, "string": "w"}
THETAS = {"size": THETA[:-1], "matrix": THETA[:, None], "nan": THETA * NAN, "complex": THETA * 1j, "scalar": 0.0}
DATA = {"X": X, "y": Y, "theta_1": THETA}
FITS = {
    fine_tune: {"filter": Ridge(0.1)},
    gradient_descent: {"step_size": 0.001, "steps": 3},
    leave_one_out: {"penalty": [0.0, 0.1], "tau": 1.0},
    select: {},
}
GRID = {"complex": 1j, "matrix": np.ones((2, 2)), "empty": []}


def blocks(*shapes):
    return iter([np.ones(shape) for shape in shapes])


def case(function, argument, values, mentions=None):
    """One row of the table: bad values of one argument; the message must mention the argument (or `mentions`)."""
    name = getattr(function, "__name__", str(function))
    return [
        pytest.param(function, value, mentions or rf"\b{argument}\b", id=f"{name}-{argument}-{reason}")
        for reason, value in values.items()
    ]


def call(function, argument, **good):
    """A caller of `function` with every argument good except one."""

    def caller(value):
        return function(**{**good, argument: value})

    caller.__name__ = getattr(function, "__name__", type(function).__name__)
    return caller


def each(function, good, /, **bad):
    return [row for argument, values in bad.items() for row in case(call(function, argument, **good), argument, values)]


SAMPLE = {"key": KEY, "covariance": FLAT, "n": N}
TABLE = [
    *each(spectra.isotropic, {"p": P}, p=COUNT, variance=NEGATIVE, trace={**NEGATIVE, "zero": 0.0, "none": [None]}),
    *each(spectra.power_law, {"p": P}, p=COUNT, exponent=NEGATIVE, trace={"rank": [1.0], "zero": 0}),
    *each(spectra.exponential, {"p": P}, p=COUNT, rate=NEGATIVE, trace={"negative": -1.0, "nan": NAN}),
    *each(
        spectra.spiked, {"p": P}, p=COUNT, spikes={**VECTOR, "negative": [-1.0], "many": np.ones(P + 1)}, bulk=NEGATIVE
    ),
    *each(spectra.bilevel, {"p": P}, p=COUNT, head={**NEGATIVE, "low": 0.5}, tail=NEGATIVE),
    *each(spectra.bilevel, {"p": P}, head_size={"many": P + 1, "negative": -1, "fraction": 0.5}),
    *case(lambda value: spectra.isotropic(P, 0.0, trace=value), "trace", {"of nothing": 1.0}),
    *each(
        aligned_problem,
        {"spectrum": FLAT},
        spectrum={"scalar": 1.0, "matrix": np.eye(P), "negative": -FLAT},
        alignment=NOT_FINITE,
        noise_std=NEGATIVE,
        pretrain_spectrum={"negative": -FLAT, "matrix": np.eye(P)},
        pretrain_risk=NEGATIVE,
    ),
    *case(lambda value: aligned_problem(FLAT, pretrain_spectrum=value), "pretrain_covariance", {"size": FLAT[:-1]}),
    *each(Diagonal, {}, eigenvalues={**VECTOR, "negative": [1.0, -1.0]}),
    *case(
        Dense,
        "matrix",
        {name: COVARIANCE[name] for name in ("scalar", "cube", "not square", "asymmetric", "indefinite", "string")},
    ),
    *each(Empirical, {}, features={"vector": FLAT, "empty": np.ones((0, P)), "nan": X * NAN, "complex": X * 1j}),
    *case(RandomShift, "shift covariance", COVARIANCE),
    *case(FixedShift, "shift vector", VECTOR),
    *each(
        TwoTaskProblem,
        {"pretrain_covariance": FLAT, "finetune_covariance": FLAT, "shift": RandomShift(FLAT), "noise_std": 0.5},
        pretrain_covariance={**COVARIANCE, "size": np.ones(P + 1)},
        finetune_covariance={**COVARIANCE, "size": np.ones(P + 1)},
        shift={"array": FLAT, "size": RandomShift(np.ones(P + 1)), "fixed size": FixedShift([1.0]), "none": None},
        noise_std={**NEGATIVE, "rank": [0.5]},
        pretrain_error={**VECTOR, "size": np.ones(P + 1)},
    ),
    *each(sample_design, SAMPLE, covariance=COVARIANCE, n=COUNT, law={"unknown": "cauchy", "number": 3}),
    *each(sample_designs, {**SAMPLE, "count": 2}, n=COUNT, law={"unknown": "x"}),
    *each(sample_task, {"key": KEY, "problem": PROBLEM, "n": N}, n=COUNT, law={"unknown": "cauchy"}),
    *each(column_blocks, {"key": KEY, "problem": PROBLEM, "n": N}, n=COUNT),
    *case(call(column_blocks, "problem", key=KEY, n=N), "finetune_covariance", {"dense": DENSE}),
    *each(Ridge, {}, penalty={**NOT_REAL, "negative": -1.0, "empty": [], "some nan": [1.0, NAN]}),
    *each(GradientFlow, {}, time={**NOT_REAL, "negative": [1.0, -1.0], "empty": []}),
    *each(
        GradientDescent,
        {"step_size": 0.1, "steps": 3},
        step_size={**NEGATIVE, "zero": 0.0},
        steps={**NEGATIVE, "fraction": 2.5, "some fraction": [1, 1.5]},
    ),
    *case(lambda value: GradientDescent([0.1, 0.2], value), "steps", {"not broadcasting": [1, 2, 3]}),
    *case(
        lambda value: GradientDescent(value, 3)(np.ones(2)), "step_size", {"unstable": 2.0, "one unstable": [0.1, 3.0]}
    ),
    *each(
        excess_risks,
        {"theta": THETA, "problem": PROBLEM, "theta_1_star": THETA, "theta_2_star": THETA},
        theta={"size": THETA[:-1], "nan": THETA * NAN, "scalar": 0.0},
        theta_1_star={**THETAS, "matrix": np.ones((P, 1))},
        theta_2_star={"size": THETA[:-1], "nan": THETA * NAN},
    ),
    *case(
        lambda value: excess_risks(np.ones((2, P)), PROBLEM, value, THETA), "theta_1_star", {"axes": np.ones((3, P))}
    ),
    *case(lambda value: Parabola(1.0, 0.5, 0.5, 0.5)(value), "tau", NOT_FINITE),
    *case(lambda value: value * MinNorm(), "tau", {**NOT_FINITE, "filter": MinNorm()}),
    *case(lambda value: (value * Ridge([0.1, 0.2]))(FLAT), "tau", {"not broadcasting": [0.1, 0.2, 0.3]}),
    *each(SelfDistillation, {"penalty": [0.1, 0.2], "mix": 0.5}, penalty=NEGATIVE_OR_NAN, mix=NOT_FINITE),
    *case(lambda value: SelfDistillation([0.1, 0.2], value), "mix", {"not broadcasting": [0.1, 0.2, 0.3]}),
    *each(SharpnessAware, {"time": 1.0, "radius": 0.5}, time=NEGATIVE_OR_NAN, radius=NEGATIVE),
    *each(
        Combination,
        {"filters": [MinNorm(), Ridge(0.1)], "weights": [0.5, 0.5]},
        filters={"numbers": [1.0, 2.0], "none": [], "too many": [MinNorm()] * 3},
        weights={**NOT_FINITE, "scalar": 1.0, "size": [1.0], "empty": []},
    ),
    *case(Tabulated, "values", {**NOT_FINITE, "empty": []}),
    *case(Tabulated(np.ones(3)), "values", {"of another design": np.ones(4)}),
    *[
        row
        for filter in (MinNorm(), Ridge(0.1), GradientFlow(1.0), GradientDescent(0.1, 2), 0.5 * MinNorm())
        for row in case(filter, "eigenvalues", {**GRID, "scalar": 1.0, "negative": [-1.0], "nan": [NAN]})
    ],
    *case(
        lambda value: risk_forms(value, PROBLEM),
        "X",
        {reason: value for reason, value in DESIGN.items() if reason not in ("cube", "rows")},
    ),
    *case(lambda value: risk_forms(np.stack([X, value]), PROBLEM), "X", {"nan in a stack": DESIGN["nan"]}),
    *case(lambda value: risk_forms(np.ones((0, N, P)), PROBLEM), "X", {"empty stack": None}),
    *case(
        lambda value: risk_forms(blocks(*value), PROBLEM),
        r"X blocks?\b",
        {"none": [], "too few columns": [(N, P - 1)], "too many": [(N, P), (N, 1)], "rows": [(N, P - 1), (N + 1, 1)]},
    ),
    *case(lambda value: risk_forms(blocks(value), PROBLEM), "X block", {"vector": (P,), "no columns": (N, 0)}),
    *case(lambda value: risk_forms(iter([value]), PROBLEM), "X", {"nan block": DESIGN["nan"]}),
    *case(lambda value: risk_forms(blocks((N, P)), value), "diagonal", {"dense": DENSE}),
    *case(lambda value: FORM(MinNorm(), value), "tau", {**NOT_FINITE, "empty": []}),
    *case(FORM, "filter", {"string": "ridge", "none": None, "size": np.ones(N + 1), "complex": 1j * Y, "nan": Y * NAN}),
    *case(lambda value: value * FORM, "weight", {**NOT_FINITE, "rank": [0.1, 0.2]}),
    *case(FORM.with_noise_std, "noise_std", NOT_FINITE),
    *[
        row
        for function, good in FITS.items()
        # too few rows or columns: the message may name either of the two that do not fit
        for row in case(call(function, "X", **DATA, **good), "X", DESIGN, r"\bX\b|theta_1")
        + each(function, {**DATA, **good}, y=LABELS, theta_1=THETAS)
    ],
    *each(fine_tune, DATA, filter={"string": "ridge", "number": 0.1, "none": None}),
    *each(fine_tune, {**DATA, "filter": Ridge(0.1)}, sample_weights=WEIGHTS),
    *each(
        gradient_descent,
        {**DATA, "step_size": 0.001, "steps": 3},
        sample_weights=WEIGHTS,
        step_size={**NEGATIVE, "zero": 0.0, "rank": [0.1], "unstable": 1.0},
        steps={reason: value for reason, value in COUNT.items() if reason != "zero"},
    ),
    *each(
        leave_one_out,
        {**DATA, "penalty": [0.0, 0.1], "tau": 1.0},
        penalty={**NEGATIVE, "some negative": [0.1, -0.1]},
        tau={**NOT_FINITE, "not broadcasting": [0.1, 0.2, 0.3]},
    ),
    *each(
        select,
        DATA,
        penalties={**GRID, "nan": NAN, "inf": INF, "negative": [-1.0, 2.0], "not increasing": [0.1, 0.0]},
        taus={**GRID, "nan": [0.5, NAN], "string": "all"},
        validation={
            "one array": (X,),
            "number": 3,
            "rows": (X, Y[:-1]),
            "columns": (X[:, :-1], Y),
            "one sample": (X[:1], Y[:1]),
            "nan": (X * NAN, Y),
        },
    ),
    *case(lambda value: select(X, value, np.ones((P, 2))), "y", {"several outputs": np.ones((N, 2))}),
    *case(lambda value: leave_one_out(X[:1], Y[:1], THETA, 0.1, 1.0), "X", {"one row": None}),
    *case(lambda value: interpolate(THETA, THETA, value), "tau", {**NOT_FINITE, "rank": [0.5]}),
    *case(
        lambda value: interpolate({"a": THETA, "b": 1.0}, value, 0.5),
        "theta_2",
        {
            "structure": {"a": THETA, "c": 1.0},
            "missing": {"a": THETA},
            "shape": {"a": THETA[:-1], "b": 1.0},
            "rank": {"a": THETA[:, None], "b": 1.0},
            "nan": {"a": THETA * NAN, "b": 1.0},
            "string": {"a": THETA, "b": "one"},
        },
    ),
    *case(lambda value: interpolate(value, 1.0, 0.5), "theta_1", {"string": "one", "nan": NAN}),
]


@pytest.mark.parametrize(("function", "value", "mentions"), TABLE)
def test_bad_input_names_the_argument(function, value, mentions):
    with pytest.raises(ValueError, match=mentions):
        function(value)


def test_every_public_name_of_the_core_is_in_the_table():
    source = inspect.getsource(sys.modules[__name__]).split("TABLE = [")[1].split("def test_")[0]
    core = {f"linfit.{name}" for name in ("covariance", "design", "filters", "problem", "risk", "selection", "solve")}
    names = {name for name in linfit.__all__ if getattr(getattr(linfit, name), "__module__", None) in core}
    assert len(names) > 20
    results = {"Filter", "Risk", "RiskForm", "Pair", "Selection"}  # nobody builds these
    assert not {name for name in names - results if name not in source}
    assert not {name for name in spectra.__all__ if f"spectra.{name}" not in source}


INTEGER_CALLS = {
    "isotropic": lambda number: spectra.isotropic(3, number(2), trace=number(6)),
    "power_law": lambda number: spectra.power_law(3, number(2)),
    "exponential": lambda number: spectra.exponential(3, number(2)),
    "spiked": lambda number: spectra.spiked(3, number([2, 3]), number(1)),
    "bilevel": lambda number: spectra.bilevel(3, 1, number(4), number(2)),
    "ridge": lambda number: Ridge(number([1, 2]))(number([0, 3])),
    "flow": lambda number: GradientFlow(number([1, 2]))(number([0, 3])),
    "descent": lambda number: GradientDescent(number(1), number([1, 2]))(number([0, 1])),
    "ensemble": lambda number: (number([1, 2]) * MinNorm())(number([0, 3])),
    "risk": lambda number: risk_forms(number(X), PROBLEM).finetune(Ridge(number(2)), number([1, 2])).total,
    "problem": lambda number: risk_forms(
        number(X), TwoTaskProblem(number(FLAT), number(np.eye(P)), FixedShift(number(FLAT)), number(1), number(FLAT))
    ).pretrain.oracle_risk(),
    "fine_tune": lambda number: fine_tune(number(X), number(Y), number(2 * FLAT), MinNorm(), number(Y)),
    "gradient_descent": lambda number: gradient_descent(
        number(X), number(Y), number(FLAT), step_size=0.01, steps=2, sample_weights=number([1, 1, 0, 1])
    ),
    "leave_one_out": lambda number: leave_one_out(number(X), number(Y), number(FLAT), number([0, 1]), number(1)),
    "interpolate": lambda number: interpolate(number([1, 2]), number([3, 5]), number(2)),
    "select": lambda number: (
        select(number(X), number(Y), number(FLAT), number([0, 1]), number([0, 1])).mean_squared_error
    ),
}


@pytest.mark.parametrize("name", INTEGER_CALLS)
def test_integers_are_accepted_and_promoted(name):
    expected = INTEGER_CALLS[name](lambda values: np.asarray(values, float))
    for integer in (
        lambda values: np.asarray(values, int),
        lambda values: np.asarray(values, np.int8),
        lambda values: jnp.asarray(values, int),
    ):
        result = INTEGER_CALLS[name](integer)
        assert result.dtype == jnp.result_type(float)
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)


def test_under_jit_the_static_checks_remain():
    with pytest.raises(ValueError, match="theta_1"):
        jax.jit(lambda X: fine_tune(X, Y, THETA[:-1], MinNorm()))(X)
    with pytest.raises(ValueError, match="X"):
        jax.jit(lambda X: risk_forms(X, PROBLEM))(X[:, :-1])
    with pytest.raises(ValueError, match="eigenvalues"):
        jax.jit(lambda s: Ridge(0.1)(s))(np.ones((2, 2)))
    with pytest.raises(ValueError, match="penalty must not be empty"):
        jax.jit(lambda penalty: Ridge(penalty)(FLAT))(np.ones(0))
