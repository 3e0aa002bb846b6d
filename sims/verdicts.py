"""What `linfit verify` prints: tables for people, JSON for machines."""

import json as json_format
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sims.claims import Claim
from sims.verify import LEVEL, Attack, Boundary, Effort, Instance, Verdict, claims_named, falsify, side_by_side, verify

__all__ = ["run", "run_seeds", "verdict_text", "worst_text"]

FULL, QUICK = 32, 4
"""Instances of each claim."""
FULL_EFFORT, QUICK_EFFORT = Effort(points=32, refinements=32, walks=4), Effort(points=4, refinements=4, walks=1)
TRIED = "no failure in 20 seeds with 4 instances of each claim of FLOW, S3FT and the frontier"
"""What `linfit verify --quick --seeds N` gave last."""


def run(ids: Sequence[str], instances: int | None, seed: int, *, json: bool, attack: bool, quick: bool) -> bool:
    """What `linfit verify` does, with its options; whether every claim held."""
    claims = claims_named(ids)
    start = time.perf_counter()
    verdicts = verify(claims, instances or (QUICK if quick else FULL), seed)
    effort = QUICK_EFFORT if quick else FULL_EFFORT
    attacks = side_by_side(lambda claim: falsify(claim, effort, seed), claims, "falsify") if attack else []
    seconds = time.perf_counter() - start
    holds = all(verdict.holds for verdict in verdicts) and all(attack.holds for attack in attacks)
    if json:
        summary = {"holds": holds, "seed": seed, "level": LEVEL, "seconds": round(seconds, 1)}
        parts = {"claims": [_verdict_record(verdict) for verdict in verdicts]}
        parts |= {"attacks": [_attack_record(attack) for attack in attacks]} if attacks else {}
        print(json_format.dumps(summary | parts, indent=2, allow_nan=False))
    else:
        console = Console()
        _print_verdicts(console, verdicts)
        if attacks:
            _print_attacks(console, attacks)
        console.print(
            f"{_counts(verdicts)}; seed {seed}, {seconds:.0f} s. What is sampled is tested at {LEVEL:.0e} for all "
            f"instances together (Holm's correction). Measured: {TRIED}.",
            highlight=False,
        )
    return holds


def run_seeds(ids: Sequence[str], instances: int | None, seeds: range, *, json: bool, quick: bool) -> bool:
    """Verify at many seeds, one after the other in one process; every claim that fails, with its values."""
    claims, count = claims_named(ids), instances or (QUICK if quick else FULL)
    console, failures, start = Console(stderr=json), [], time.perf_counter()
    for seed in seeds:
        failed = [verdict for verdict in verify(claims, count, seed) if not verdict.holds]
        failures += [{"seed": seed, "id": verdict.claim.id} | _instance_record(verdict.worst) for verdict in failed]
        for verdict in failed:
            console.print(f"seed {seed}: {_failure_text(verdict)}", style="red", highlight=False)
    summary = {"seeds": [seeds.start, seeds.stop], "instances": count, "claims": len(claims), "failures": failures}
    if json:
        print(json_format.dumps({"holds": not failures} | summary, indent=2, allow_nan=False))
    else:
        worst = Counter(failure["id"] for failure in failures).most_common()
        text = ", ".join(f"{id} at {number}" for id, number in worst) or "no failure"
        where = f"{len(seeds)} seeds from {seeds.start}, {count} instances of each of {len(claims)} claims"
        console.print(f"{where}: {text}; {time.perf_counter() - start:.0f} s.", highlight=False)
    return not failures


def _counts(verdicts: Sequence[Verdict]) -> str:
    """How many hold, are true in part, fail."""
    partly = sum(verdict.in_part for verdict in verdicts)
    text = f"{sum(verdict.holds for verdict in verdicts) - partly} of {len(verdicts)} claims hold"
    return text + (f", {partly} are true in part" if partly else "")


def _failure_text(verdict: Verdict) -> str:
    values = ", ".join(f"{name} = {value:.6g}" for name, value in verdict.worst.values.items())
    worst = worst_text(verdict.claim, verdict.worst)
    return f"{verdict.claim.id}: {verdict.claim.statement}\n  fails at {values}: {worst}"


def worst_text(claim: Claim, worst: Instance) -> str:
    """The worst instance in the unit of its kind."""
    if worst.error is not None:
        return worst.error
    return {
        "identity": f"residual {worst.severity:.1e}",
        "inequality": f"margin {-worst.severity:+.2g}",
        "existence": f"margin {-worst.severity:+.2g}",
        "statistical": f"|z| {worst.severity:.1f}",
        "asymptotic": f"{worst.severity:.2f} of bound",
    }[claim.kind]


def verdict_text(verdict: Verdict) -> str:
    """In one word; how often, for a claim of existence; how fast, for an asymptotic one."""
    if not verdict.holds:
        return "FAILS"
    if verdict.in_part:
        return f"true in part: {verdict.share:.0%}"
    return "holds" if verdict.slope is None else f"holds, N^{verdict.slope:.1f}"


def _print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """One line for each claim, then what went wrong where something did."""
    table = _table("claims", ("claim", "source", "instances", "worst", "verdict", "s"))
    for verdict in verdicts:
        claim, count = verdict.claim, str(len(verdict.instances))
        cells = (claim.id, claim.source, count, worst_text(claim, verdict.worst), verdict_text(verdict))
        style = "bold red" if not verdict.holds else "yellow" if verdict.in_part else None
        table.add_row(*cells, f"{verdict.seconds:.1f}", style=style)
    console.print(table)
    for verdict in verdicts:
        if not verdict.holds:
            console.print(_failure_text(verdict), style="red", highlight=False)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, no_wrap=name == "claim", justify="right" if name in ("instances", "s") else "left")
    return table


def _print_attacks(console: Console, attacks: Sequence[Attack]) -> None:
    """The worst instance inside the assumptions, and what happens outside."""
    title = "attacks: the worst instance inside the assumptions; outside, one assumption at a time"
    table = _table(title, ("claim", "worst inside", "verdict", "outside", "s"))
    for attack in attacks:
        words = ("NO WITNESS", "has a witness") if attack.claim.kind == "existence" else ("BROKEN", "survives")
        cells = (worst_text(attack.claim, attack.worst), words[attack.holds], _boundaries_text(attack))
        style = None if attack.holds else "bold red"
        table.add_row(attack.claim.id, *cells, f"{attack.seconds:.1f}", style=style)
    console.print(table)


def _boundaries_text(attack: Attack) -> str:
    """Where the claim stops holding."""
    if not attack.boundaries:
        return "no assumption to leave"
    broken = dict.fromkeys(_boundary_text(attack.claim, b) for b in attack.boundaries if b.fails_at is not None)
    walked = ", ".join(f"{b.parameter} to {b.end:g}" for b in attack.boundaries if b.fails_at is None)
    if not broken:
        return f"no boundary found ({walked})"
    return "\n".join([*broken, *([f"no boundary: {walked}"] if walked else [])])


def _boundary_text(claim: Claim, boundary: Boundary) -> str:
    parameter = claim.parameters[boundary.parameter]
    share = "" if boundary.share == 1 else f" ({boundary.share:.0%} of walks)"
    why = "" if boundary.refused is None else f": {boundary.refused}"
    if boundary.at_once and parameter.low == parameter.high:
        return f"needs {boundary.parameter} = {parameter.low:g}{share}{why}"
    held, failed = f"{boundary.holds_to:.3g}", f"{boundary.fails_at:.3g}"
    where = f"holds to {held}, not beyond" if held == failed else f"holds to {held}, fails at {failed}"
    return f"{boundary.parameter} {where}{share}{why}"


def _verdict_record(verdict: Verdict) -> dict[str, Any]:
    fields = ("id", "statement", "formula", "source", "kind", "tolerance")
    return {name: getattr(verdict.claim, name) for name in fields} | {
        "instances": len(verdict.instances),
        "worst": _instance_record(verdict.worst),
        "share": verdict.share,
        "slope": verdict.slope,
        "verdict": "true in part" if verdict.in_part else "holds" if verdict.holds else "fails",
        "seconds": round(verdict.seconds, 2),
    }


def _instance_record(instance: Instance) -> dict[str, Any]:
    """Severity null if nothing could be measured."""
    severity = instance.severity if np.isfinite(instance.severity) else None
    return {"values": instance.values, "severity": severity, "p_value": instance.p_value, "error": instance.error}


def _attack_record(attack: Attack) -> dict[str, Any]:
    return {
        "id": attack.claim.id,
        "worst": _instance_record(attack.worst),
        "verdict": "survives" if attack.holds else "broken",
        "boundaries": [boundary._asdict() for boundary in attack.boundaries],
        "boundary_found": any(boundary.fails_at is not None for boundary in attack.boundaries),
        "seconds": round(attack.seconds, 2),
    }
