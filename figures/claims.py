"""The wall of claims, and the maps of where O1 and O4 hold."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from figures.style import PAGE, Picture, canvas, panel_letters
from sims.claims import Claim, all_claims
from sims.claims.overadaptation import LARGE, SMALL
from sims.overadaptation import phase_diagram
from sims.parameters import ALIGNMENT, DECAY, Parameter
from sims.verdicts import verdict_text, worst_text
from sims.verify import LEVEL, Verdict, select, verify


class Setting(NamedTuple):
    """Sizes of a run; the quick one is for CI and first looks."""

    instances: int
    grid: int
    decays: tuple[float, ...]
    designs: int
    points: int


FULL = Setting(instances=16, grid=25, decays=(0.5, 1.0, 1.5, 2.0), designs=4, points=64)
QUICK = Setting(instances=1, grid=7, decays=(0.5, 1.0), designs=1, points=8)

PAPER, OURS, KNOWN, BROKEN = "#CFE3F1", "#F6E3C3", "#E4E4E4", "#F0B7A1"
"""Tiles: claim or setting of one of the papers, derived here, known before; failed."""


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """The wall and the maps."""
    setting = QUICK if quick else FULL
    seed = int(jax.random.key_data(key).ravel()[-1])
    yield wall(verify(all_claims(), setting.instances, seed), seed)
    yield boundaries(key, setting, seed)


def colour_of(verdict: Verdict) -> str:
    """By source; red if the claim failed."""
    if not verdict.holds:
        return BROKEN
    if verdict.claim.source.startswith("paper"):
        return PAPER
    return OURS if verdict.claim.source.startswith("ours") else KNOWN


COLUMNS, TILE_HEIGHT = 4, 0.72


def wall(verdicts: Sequence[Verdict], seed: int) -> Picture:
    """Every claim a tile: what it says, who says it, the worst instance, the verdict."""
    rows = -(-len(verdicts) // COLUMNS)
    figure, (axis,) = canvas(1, width=PAGE, height=TILE_HEIGHT * rows + 0.3)
    axis.set(xlim=(0, COLUMNS), ylim=(rows, -0.3))
    axis.axis("off")
    for index, verdict in enumerate(verdicts):
        draw_tile(axis, index % COLUMNS, index // COLUMNS, verdict)
    legend = [("from a paper", PAPER), ("ours", OURS), ("known before", KNOWN), ("fails", BROKEN)]
    patches = [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="#777777", linewidth=0.4) for _, colour in legend]
    axis.legend(patches, [name for name, _ in legend], ncols=4, loc="upper left", bbox_to_anchor=(0, 1.0), fontsize=6.5)
    partly = [v for v in verdicts if v.claim.kind == "existence"]
    caption = (
        f"{sum(v.holds for v in verdicts)} of {len(verdicts)} claims hold, each on {len(verdicts[0].outcomes)} random instances of its "
        "assumptions (claims of existence on more). Bottom of a tile: the worst of them (relative residual of an identity, margin of an inequality, largest z-score of what was "
        "sampled, largest gap of an asymptotic claim in units of the bound it must respect) and who states it. "
        + " ".join(f"{v.claim.id} is a claim of existence: it holds in {v.share:.0%} of its space." for v in partly)
        + f" True claims fail for one seed in {1 / LEVEL:,.0f} (Holm's correction). Seed {seed}."
    )
    return Picture("claims", "The wall of claims", caption, figure, as_dataset(verdicts))


def draw_tile(axis: Axes, column: int, row: int, verdict: Verdict) -> None:
    """Id and verdict, statement, worst and source."""
    claim = verdict.claim
    axis.add_patch(
        Rectangle(
            (column + 0.015, row + 0.03), 0.97, 0.94, facecolor=colour_of(verdict), edgecolor="#777777", linewidth=0.4
        )
    )
    left, right = column + 0.05, column + 0.95
    source = claim.source.split(" (")[0]
    axis.text(left, row + 0.09, claim.id, va="top", fontsize=7, fontweight="bold")
    axis.text(right, row + 0.10, verdict_text(verdict), va="top", ha="right", fontsize=5.8, fontweight="bold")
    statement = "\n".join(textwrap.wrap(claim.statement, 39))
    axis.text(left, row + 0.31, statement, va="top", fontsize=5.2, linespacing=1.15)
    axis.text(left, row + 0.92, worst_text(claim, verdict.worst), va="bottom", fontsize=5.0, color="#444444")
    axis.text(right, row + 0.92, source, va="bottom", ha="right", fontsize=5.0, color="#444444")


def as_dataset(verdicts: Sequence[Verdict]) -> xr.Dataset:
    """One row for each claim."""
    columns = {
        "holds": [int(v.holds) for v in verdicts],
        "instances": [len(v.outcomes) for v in verdicts],
        "share": [v.share for v in verdicts],
        "severity": [v.worst.severity for v in verdicts],
        "p_value": [v.worst.p_value for v in verdicts],
    }
    text = {name: [getattr(v.claim, name) for v in verdicts] for name in ("statement", "source", "kind")}
    return xr.Dataset(
        {name: ("claim", np.asarray(values)) for name, values in (columns | text).items()},
        {"claim": [v.claim.id for v in verdicts]},
    )


STYLES = {0.5: ":", 1.0: "-", 1.5: "--", 2.0: "-."}


def boundaries(key: Array, setting: Setting, seed: int) -> Picture:
    """Where τ* = 1 (O1), and where the best ensemble of min-norm is as good as the best ridge (O4)."""
    alignment, noise = np.linspace(-1, 1, setting.grid), np.logspace(-3, 1, setting.grid)
    n, p = LARGE
    maps = xr.concat(
        [phase_diagram(key, n, p, decay, alignment, noise, setting.designs) for decay in setting.decays],
        xr.DataArray(list(setting.decays), dims="decay", name="decay"),
    )
    averaged = maps.sel(estimator="min-norm + ensemble")
    advantage = 100 * (maps.risk.sel(estimator="ridge") / averaged.risk - 1)
    figure, axes = canvas(2, height=3.4, sharey=True)
    panels = (
        (axes[0], averaged.tau, 1.0, "O1.isotropic", R"$\tau^*$ of min-norm"),
        (axes[1], advantage, 0.0, "O4.informal", "best ridge over ensembled min-norm [%]"),
    )
    data = xr.Dataset({"tau": averaged.tau, "advantage": advantage})
    for axis, values, level, id, label in panels:
        draw_map(figure, axis, values, level, label)
        data = data.merge(scatter_instances(axis, id, setting, seed))
    axes[0].set_ylabel(R"label noise $\sigma^2$ (signal $\mathrm{tr}\,\Omega\Sigma = 1$)")
    lines = [Line2D([], [], color="black", linestyle=STYLES[d], label=f"decay {d:g}") for d in setting.decays]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), handlelength=2.6)
    panel_letters(axes)
    caption = (
        "Where two claims hold; each map for spectral decay 1, each line the boundary for another decay of Σ = diag(j^−decay), "
        "Ω ∝ Σ^α. (a) O1: below its line (little noise, shift along the head) min-norm misses more signal than it fits noise, "
        "τ* > 1, and averaging with θ₁ harms; at α = 0 it helps at any noise. "
        "(b) O4, the informal claim that ensembling beats the best ridge: true below the lines, never at α = 0, where ridge is the "
        "Bayes estimator; on the head side by extrapolating, τ* > 1. "
        "Dots: single random instances at decay 1, drawn by the verifier and measured on a design of their own; filled where the "
        f"claim held, open where it failed. Maps: n = {n}, p = {p}, {setting.designs} designs, exact risk; dots in (a): "
        f"n = {SMALL[0]}, p = {SMALL[1]}. Seed {seed}."
    )
    return Picture("claim_boundaries", "Where O1 and O4 hold", caption, figure, data)


def draw_map(figure: Figure, axis: Axes, values: xr.DataArray, level: float, label: str) -> None:
    """Colours for decay 1, and the line `level` for every decay."""
    shown = values.sel(decay=1.0)
    reach = max(float(np.quantile(np.abs(shown.values - level), 0.9)), 0.05)
    norm = TwoSlopeNorm(level, level - reach, level + reach)
    mesh = axis.pcolormesh(
        values.alignment, values.noise_variance, shown.T, norm=norm, cmap="PuOr", shading="nearest", rasterized=True
    )
    figure.colorbar(mesh, ax=axis, location="bottom", extend="both").set_label(label)
    for decay in values.decay.values:
        axis.contour(
            values.alignment,
            values.noise_variance,
            values.sel(decay=decay).T,
            levels=[level],
            colors="black",
            linestyles=STYLES[float(decay)],
            linewidths=1.1,
        )
    axis.set(yscale="log", xticks=[-1, 0, 1], xticklabels=["tail −1", "isotropic 0", "head 1"])
    axis.set_xlabel(R"shift alignment $\alpha$:  $\Omega \propto \Sigma^\alpha$")


def scatter_instances(axis: Axes, id: str, setting: Setting, seed: int) -> xr.Dataset:
    """Instances of a claim at decay 1, all alignments and noise levels, filled where it held."""
    claim = widened(next(claim for claim in select([id]) if claim.id == id))
    outcomes = verify([claim], setting.points, seed)[0].outcomes
    columns = {
        name: np.array([outcome.values[name] for outcome in outcomes]) for name in ("alignment", "noise_variance")
    }
    held = np.array([outcome.p_value > LEVEL for outcome in outcomes])
    colours = np.where(held, "black", "white")
    axis.scatter(columns["alignment"], columns["noise_variance"], s=9, c=colours, edgecolors="black", linewidths=0.6)
    name = id.replace(".", "_")
    return xr.Dataset(
        {
            f"{name}_{field}": (f"{name}_instance", values)
            for field, values in (columns | {"holds": held.astype(int)}).items()
        }
    )


def widened(claim: Claim) -> Claim:
    """The claim over the whole map, at decay 1."""
    ranges = {
        "decay": DECAY.within(1.0),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_variance": Parameter(low=1e-3, high=10.0, scale="log"),
    }
    return claim._replace(parameters=claim.parameters | ranges)
