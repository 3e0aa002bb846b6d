"""Every numbered statement of the docs is a claim, or says here why not; every table of deliberate mistakes applies."""

import re
from pathlib import Path

import pytest

import sims.mutants
from sims.claims import all_claims
from sims.mutants import Mutant, run, tables

DOCS = Path(__file__).parents[1] / "docs"
REASONS = {"G4": "measured on one language model; tests/test_bridge_predict.py holds the linear model"}
"""Statements without a claim, by number."""


def statements() -> set[str]:
    """S1, S2, …: ranges and numbers in the contents of docs/theory.md, and what begins in bold or is a heading."""
    found = set()
    for line in (DOCS / "theory.md").read_text().splitlines():
        if line.startswith("- §"):
            for letter, first, last in re.findall(r"\b([A-Z])(\d+)(?:[–-](?:\1)?(\d+))?", line):
                found |= {f"{letter}{number}" for number in range(int(first), int(last or first) + 1)}
    for path in DOCS.glob("*.md"):
        found |= set(re.findall(r"^(?:[-*] |#+ )?(?:\*\*)?([A-Z]\d+)(?:\*\*|[ .,:(])", path.read_text(), re.MULTILINE))
    return found


def test_every_statement_has_a_claim_or_a_reason():
    found = statements()
    assert found >= {"S1", "O5", "D1", "F1", "F6", "T1", "T2", "E1", "E2", "N1", "N4", "B1"}
    families = {claim.id.partition(".")[0] for claim in all_claims()}
    assert sorted(found - families - set(REASONS)) == []


def test_every_mutant_applies_and_names_claims():
    """A pattern that does not occur once raises; so does an entry that is not complete."""
    mutants = tables()
    ids = {claim.id for claim in all_claims()}
    names = ids | {id.rpartition(".")[0] for id in ids} | {id.partition(".")[0] for id in ids}
    for mutant in mutants:
        assert mutant.why
        assert mutant.replacement != mutant.pattern
        assert mutant.claims
        assert set(mutant.claims) <= names, mutant
        assert mutant.file.partition("/")[0] in ("linfit", "theory")
        assert not mutant.file.startswith("linfit/bridge")
    assert len({(mutant.file, mutant.pattern, mutant.replacement) for mutant in mutants}) == len(mutants)


def test_tables_by_subject_and_by_file():
    assert {mutant.subject for mutant in tables(["frontier", "linfit/solve.py"])} == {"frontier", "linfit"}
    with pytest.raises(ValueError, match=r"NAME must be a file or among combinations, .*frontier, .*; got nothing"):
        tables(["nothing"])


ROW = '[[mutant]]\nfile = "theory/frontier.py"\npattern = "{}"\nreplacement = ""\nwhy = "w"\nclaims = ["E1"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROW.format("no such text"), "pattern must occur once in theory/frontier.py, got 0 times"),
        (ROW.format("import"), "pattern must occur once in theory/frontier.py, got [0-9]+ times"),
        (ROW.format("x").replace('why = "w"\n', ""), "toy.toml: a mutant has file, .*; check why"),
        (ROW.format("x") + 'reason = "r"\n', "toy.toml: a mutant has file, .*; check reason"),
    ],
)
def test_a_table_that_does_not_apply_is_refused(text, message, tmp_path, monkeypatch):
    (tmp_path / "toy.toml").write_text(text)
    monkeypatch.setattr(sims.mutants, "TABLES", tmp_path)
    with pytest.raises(ValueError, match=message):
        tables()


@pytest.mark.slow
def test_mistakes_are_noticed_and_rounding_is_not():
    """In processes of their own: 2% too much, a line that raises, and what changes nothing."""
    pattern = 'return 1 - real_array("smoothing", smoothing)'
    replacements = (pattern.replace("1 -", "1.02 -"), "return missing", pattern + "  # as it was")
    mutants = [Mutant("toy", "theory/frontier.py", pattern, new, "toy", ("E1.smoothing",)) for new in replacements]
    reported = []
    outcomes = run(mutants, 1, 0, 1, reported.append)
    found = {outcome.mutant.replacement: outcome.caught_by for outcome in outcomes}
    assert [found[new] for new in replacements] == ["E1.smoothing", "E1.smoothing (raises NameError)", None]
    assert sorted(reported) == sorted(outcomes)


@pytest.mark.slow
def test_a_claim_that_rejects_the_code_as_it_is_stops_the_run():
    with pytest.raises(ValueError, match="ID must be among"):
        run([Mutant("toy", "theory/frontier.py", "import jax\n", "", "toy", ("X9",))], 1, 0, 1, print)
