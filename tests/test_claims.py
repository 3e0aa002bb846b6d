"""The registry of claims: well formed, deterministic in its normals, and free of random numbers of its own."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest

import sims.claims
from sims.claims import SECTIONS, Claim, Parameter, all_claims
from sims.claims.problems import exact_instance, moments, risk_by_algebra
from sims.verify import claim_key, examine, normals, points

CLAIMS = all_claims()
CHEAP, SLOW = ("S2", "S2.sampled", "O1", "O3", "D5.ranks"), pytest.mark.slow
every_claim = pytest.mark.parametrize("claim", CLAIMS, ids=[claim.id for claim in CLAIMS])


def test_ids_are_unique_and_cover_the_sections():
    ids = [claim.id for claim in CLAIMS]
    assert len(set(ids)) == len(ids)
    families = {name.split(".")[0] for name in ids}
    assert families >= {"S1", "S2", "S3", "S4", "S5", "O1", "O2", "O3", "O4", "O5", "D1", "D2", "D3", "D4", "D5"}


@every_claim
def test_claim_is_well_formed(claim):
    assert claim.statement.endswith(".")
    assert len(claim.statement) > 20
    assert claim.formula
    assert claim.source
    assert claim.kind in sims.claims.Kind.__args__
    assert claim.tolerance >= 0
    assert (claim.kind == "asymptotic") == bool(claim.sizes)
    assert list(claim.sizes) == sorted(claim.sizes)
    accepted = inspect.signature(claim.sides).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        assert set(claim.parameters) == set(list(accepted)[1:])


@every_claim
def test_parameter_ranges_are_ordered(claim):
    for name, parameter in claim.parameters.items():
        assert parameter.low <= parameter.high, name
        assert all(not parameter.low < end < parameter.high for end in parameter.ends), name
        assert parameter.scale != "log" or min(parameter.low, *parameter.ends, parameter.high) > 0, name


@pytest.mark.parametrize(
    "claim", [pytest.param(c, marks=[] if c.id in CHEAP else SLOW, id=c.id) for c in CLAIMS if not c.sizes]
)
def test_instances_depend_on_parameters_and_normals_only(claim):
    """The same values and normals give the same numbers, and there is something to measure."""
    values, key = points(claim, 1, claim_key(3, claim))[0], jax.random.key(5)
    first, second = (examine(claim, values, key) for _ in range(2))
    assert first == second
    assert first.error is None


@pytest.mark.parametrize("section", SECTIONS)
def test_no_random_numbers_are_drawn_in_theory(section):
    for node in ast.walk(ast.parse(Path(import_module(section).__file__).read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("random", "default_rng", "rvs", "key", "PRNGKey", "fold_in"), ast.unparse(node)


@pytest.mark.parametrize(
    ("parameter", "position", "value"),
    [
        (Parameter(1.0, 3.0), 0.25, 1.5),
        (Parameter(1e-4, 1.0, "log"), 0.75, 0.1),
        (Parameter(2.0, 2.0), 0.9, 2.0),
        (Parameter(0.0, 0.0), 0.9, 0.0),
        (Parameter(1, 3, "whole"), 0.0, 1),
        (Parameter(1, 3, "whole"), 0.34, 2),
        (Parameter(1, 3, "whole"), 1.0, 3),
    ],
)
def test_positions_become_values(parameter, position, value):
    got = parameter.inside(position)
    assert got == pytest.approx(value, abs=1e-15)
    assert isinstance(got, int) == (parameter.scale == "whole")


@pytest.mark.parametrize(
    ("parameter", "end", "distance", "value"),
    [
        (Parameter(0.0, 1.0, lowest=-1.0, highest=5.0), 5.0, 0.5, 3.0),
        (Parameter(0.0, 1.0, lowest=-1.0, highest=5.0), -1.0, 0.5, -0.5),
        (Parameter(1.0, 10.0, "log", highest=1000.0), 1000.0, 0.5, 100.0),
        (Parameter(1, 2, "whole", highest=4), 4, 1e-6, 2),
        (Parameter(1, 2, "whole", highest=4), 4, 1.0, 4),
    ],
)
def test_walks_start_at_the_edge(parameter, end, distance, value):
    assert parameter.beyond(distance, end) == pytest.approx(value)
    assert parameter.beyond(1.0, end) == pytest.approx(end)
    assert end in parameter.ends


VALUES = {"size": 0, "decay": 0.7, "noise_variance": 0.4, "pretrain_size": 0.5, "tau": 0.6, "penalty": 0.3}
VALUES |= {"time": 3.0, "speed": 1.2, "steps": 5}


@pytest.mark.parametrize("fixed", [0, 1])
def test_the_algebra_of_the_claims_is_right(fixed):
    """The yardstick itself, against an average over raw draws of shift and noise, in standard errors."""
    exact = exact_instance(normals(jax.random.key(1)), fixed=fixed, **VALUES)
    generator, count = np.random.default_rng(2), 40_000
    m, R = moments(exact.problem), exact.maps[1]
    (n, p), spread = exact.X.shape, m.second - np.outer(m.mean, m.mean)
    factor = np.linalg.cholesky(spread + 1e-12 * np.eye(p))
    delta = (m.mean + m.u)[:, None] + factor @ generator.standard_normal((p, count)) * (1 - fixed)
    noise = m.noise_variance**0.5 * generator.standard_normal((n, count))
    theta = m.u[:, None] + R @ (exact.X @ (delta - m.u[:, None]) + noise)
    expected = risk_by_algebra(exact.problem, exact.X, R).sum(axis=1)
    for error, covariance, risk in ((theta - delta, m.finetune, expected[0]), (theta, m.pretrain, expected[1])):
        samples = np.sum(error * (covariance @ error), axis=0)
        assert abs(samples.mean() - risk) < 4.5 * samples.std() / count**0.5


def test_a_claim_is_what_the_docs_say():
    """The example of docs/claims.md."""
    claim = Claim(
        id="X1",
        statement="The sum of two independent normals has variance 2.",
        formula=R"\mathrm{Var}(x + y) = 2",
        source="ours",
        kind="statistical",
        parameters={"shift": Parameter(-1.0, 1.0), "correlation": Parameter(0.0, 0.0, highest=0.9)},
        instance=lambda normal, shift, correlation: (shift, normal(4096), normal(4096), correlation),
        predict=lambda instance: 2.0,
        measure=lambda instance: (instance[1] + instance[2] + instance[3] * instance[1]) ** 2,
    )
    values = points(claim, 1, jax.random.key(0))[0]
    assert examine(claim, values, jax.random.key(1)).p_value > 1e-5
    assert examine(claim, values | {"correlation": 0.9}, jax.random.key(1)).p_value < 1e-5
