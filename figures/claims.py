"""Every claim with its verdict, and the maps of where O1 and O4 hold."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jax import Array
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from figures.style import PAGE, Picture, canvas, panel_letters, seed_of
from sims.claims import all_claims
from sims.claims.overadaptation import LARGE, SMALL
from sims.overadaptation import phase_diagram
from sims.parameters import ALIGNMENT, DECAY, NOISE_STD
from sims.verdicts import verdict_text, worst_text
from sims.verify import LEVEL, Verdict, claims_named, verify

__all__ = ["pictures"]


class _Setting(NamedTuple):
    instances: int
    grid: int
    decays: tuple[float, ...]
    designs: int
    points: int


FULL = _Setting(instances=16, grid=25, decays=(0.5, 1.0, 1.5, 2.0), designs=4, points=64)
QUICK = _Setting(instances=1, grid=7, decays=(0.5, 1.0), designs=1, points=8)


def pictures(key: Array, quick: bool) -> Iterator[Picture]:
    """The tiles and the maps."""
    setting, seed = QUICK if quick else FULL, seed_of(key)
    data = _verdicts(verify(all_claims(), setting.instances, seed))
    data = data.assign_attrs(instances=setting.instances, level=LEVEL, seed=seed)
    yield Picture("claims", "Every claim and its verdict", data, _draw_tiles, _caption_tiles)
    data = _maps(key, setting).assign_attrs(seed=seed)
    yield Picture("claim_boundaries", "Where O1 and O4 hold", data, _draw_maps, _caption_maps)


def _verdicts(verdicts: Sequence[Verdict]) -> xr.Dataset:
    """One row for each claim."""
    columns = {
        "holds": [int(v.holds) for v in verdicts],
        "in_part": [int(v.in_part) for v in verdicts],
        "instances": [len(v.instances) for v in verdicts],
        "share": [v.share for v in verdicts],
        "severity": [v.worst.severity for v in verdicts],
        "p_value": [v.worst.p_value for v in verdicts],
        "verdict": [verdict_text(v) for v in verdicts],
        "worst": [worst_text(v.claim, v.worst) for v in verdicts],
    }
    columns |= {name: [getattr(v.claim, name) for v in verdicts] for name in ("statement", "source", "kind")}
    variables = {name: ("claim", np.asarray(values)) for name, values in columns.items()}
    return xr.Dataset(variables, {"claim": [v.claim.id for v in verdicts]})


COLUMNS, TILE_HEIGHT = 4, 0.72
TILES = {"paper": "#CFE3F1", "ours": "#F6E3C3", "known": "#E4E4E4", "in part": "#F7F3A6", "fails": "#F0B7A1"}
"""Colours by source of the claim or its setting; of a claim that is true in part, or failed."""


def _draw_tiles(data: xr.Dataset) -> Figure:
    """Every claim a tile: what it says, who says it, the worst instance, the verdict."""
    rows = -(-data.claim.size // COLUMNS)
    figure, (axis,) = canvas(1, width=PAGE, height=TILE_HEIGHT * rows + 0.3)
    axis.set(xlim=(0, COLUMNS), ylim=(rows, -0.3))
    axis.axis("off")
    for index in range(data.claim.size):
        claim = {name: values.values.item() for name, values in data.isel(claim=index).variables.items()}
        _draw_tile(axis, index % COLUMNS, index // COLUMNS, claim)
    edge: dict[str, Any] = {"edgecolor": "#777777", "linewidth": 0.4}
    patches = [Rectangle((0, 0), 1, 1, facecolor=colour, **edge) for colour in TILES.values()]
    names = ["from a paper", "ours", "known before", "true in part", "fails"]
    axis.legend(patches, names, ncols=5, loc="upper left", bbox_to_anchor=(0, 1.0), fontsize=6.5)
    return figure


def _draw_tile(axis: Axes, column: int, row: int, claim: dict) -> None:
    """Id and verdict, statement, worst and source."""
    by = next((by for by in ("paper", "ours") if claim["source"].startswith(by)), "known")
    colour = TILES["fails" if not claim["holds"] else "in part" if claim["in_part"] else by]
    left, right = column + 0.05, column + 0.95
    corner, size = (column + 0.015, row + 0.03), (0.97, 0.94)
    axis.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="#777777", linewidth=0.4))
    axis.text(left, row + 0.09, claim["claim"], va="top", fontsize=7, fontweight="bold")
    axis.text(right, row + 0.10, claim["verdict"], va="top", ha="right", fontsize=5.8, fontweight="bold")
    statement = "\n".join(textwrap.wrap(claim["statement"], 39))
    axis.text(left, row + 0.31, statement, va="top", fontsize=5.2, linespacing=1.15)
    axis.text(left, row + 0.92, claim["worst"], va="bottom", fontsize=5.0, color="#444444")
    source = claim["source"].split(" (")[0]
    axis.text(right, row + 0.92, source, va="bottom", ha="right", fontsize=5.0, color="#444444")


def _caption_tiles(data: xr.Dataset) -> str:
    partly = data.sel(claim=data.in_part == 1)
    shares = zip(partly.claim.values, partly.share.values)
    return (
        f"{int(data.holds.sum() - data.in_part.sum())} of {data.claim.size} claims hold, {partly.claim.size} are true in part, each on {data.attrs['instances']} random instances of its "
        "assumptions (claims of existence on more). Bottom of a tile: the worst of them (relative residual of an identity, margin of an inequality, largest z-score of what was "
        "sampled, largest gap of an asymptotic claim in units of the bound it must respect) and who states it. "
        + " ".join(f"{id} is a claim of existence: it holds in {share:.0%} of its space." for id, share in shares)
        + f" What is sampled is tested at {data.level:.0e} for all instances together (Holm's correction). Seed {data.seed}."
    )


def _maps(key: Array, setting: _Setting) -> xr.Dataset:
    """τ* of min-norm and its advantage over the best ridge, over alignment × noise; single instances at decay 1."""
    alignments, stds = np.linspace(-1, 1, setting.grid), np.logspace(-3, 1, setting.grid) ** 0.5
    n, p = LARGE
    maps = xr.concat(
        [phase_diagram(key, n, p, decay, alignments, stds, setting.designs) for decay in setting.decays],
        xr.DataArray(list(setting.decays), dims="decay", name="decay"),
    )
    averaged = maps.sel(estimator="min-norm + ensemble", drop=True)
    advantage = 100 * (maps.risk.sel(estimator="ridge", drop=True) / averaged.risk - 1)
    data = xr.Dataset({"tau": averaged.tau, "advantage": advantage}, attrs={"n": n, "p": p, "designs": setting.designs})
    ranges = {
        "decay": DECAY.within(1.0),
        "alignment": ALIGNMENT.within(-1.0, 1.0),
        "noise_std": NOISE_STD.within(1e-3**0.5, 10**0.5),
    }
    for id in ("O1.isotropic", "O4.informal"):
        (claim,) = claims_named([id])
        widened = claim._replace(parameters=claim.parameters | ranges)
        instances = verify([widened], setting.points, seed_of(key))[0].instances
        columns: dict[str, list] = {name: [at.values[name] for at in instances] for name in ("alignment", "noise_std")}
        columns["holds"] = [int(at.obeys) for at in instances]
        name = id.replace(".", "_")
        data = data.assign({f"{name}_{field}": (f"{name}_instance", values) for field, values in columns.items()})
    return data


STYLES = {0.5: ":", 1.0: "-", 1.5: "--", 2.0: "-."}


def _draw_maps(data: xr.Dataset) -> Figure:
    """Where τ* = 1 (O1), and where the best ensemble of min-norm is as good as the best ridge (O4)."""
    figure, axes = canvas(2, height=3.4, sharey=True)
    _draw_map(figure, axes[0], data, "tau", 1.0, "O1_isotropic", R"$\tau^*$ of min-norm")
    _draw_map(figure, axes[1], data, "advantage", 0.0, "O4_informal", "best ridge over ensembled min-norm [%]")
    axes[0].set_ylabel(R"label noise $\sigma^2$ (signal $\mathrm{tr}\,\Omega\Sigma = 1$)")
    lines = [Line2D([], [], color="black", linestyle=STYLES[d], label=f"decay {d:g}") for d in data.decay.values]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), handlelength=2.6)
    panel_letters(axes)
    return figure


def _draw_map(figure: Figure, axis: Axes, data: xr.Dataset, name: str, level: float, claim: str, label: str) -> None:
    """Colours for decay 1, the line `level` for every decay, and the instances of a claim, filled where it held."""
    values, variance = data[name], data.noise_std**2
    shown = values.sel(decay=1.0)
    reach = max(float(np.quantile(np.abs(shown.values - level), 0.9)), 0.05)
    norm = TwoSlopeNorm(level, level - reach, level + reach)
    style: dict[str, Any] = {"cmap": "PuOr", "shading": "nearest", "rasterized": True}
    mesh = axis.pcolormesh(values.alignment, variance, shown.T, norm=norm, **style)
    figure.colorbar(mesh, ax=axis, location="bottom", extend="both").set_label(label)
    for decay in values.decay.values:
        lines = values.sel(decay=decay).T
        style = {"colors": "black", "linestyles": STYLES[float(decay)], "linewidths": 1.1}
        axis.contour(values.alignment, variance, lines, levels=[level], **style)
    axis.set(yscale="log", xticks=[-1, 0, 1], xticklabels=["tail −1", "isotropic 0", "head 1"])
    axis.set_xlabel(R"shift alignment $\alpha$:  $\Omega \propto \Sigma^\alpha$")
    filled = np.where(data[f"{claim}_holds"], "black", "white")
    where = data[f"{claim}_alignment"], data[f"{claim}_noise_std"] ** 2
    axis.scatter(*where, s=9, c=filled, edgecolors="black", linewidths=0.6)


def _caption_maps(data: xr.Dataset) -> str:
    return (
        "Where two claims hold; each map for spectral decay 1, each line the boundary for another decay of Σ = diag(j^−decay), "
        "Ω ∝ Σ^α. (a) O1: below its line (little noise, shift along the head) min-norm misses more signal than it fits noise, "
        "τ* > 1, and averaging with θ₁ harms; at α = 0 it helps at any noise. "
        "(b) O4, the informal claim that ensembling beats the best ridge: true below the lines, never at α = 0, where ridge is the "
        "Bayes estimator; on the head side by extrapolating, τ* > 1. "
        "Dots: single random instances at decay 1, sampled by the verifier and measured on a design of their own; filled where the "
        f"claim held, open where it failed. Maps: n = {data.n}, p = {data.p}, {data.designs} designs, exact risk; dots in (a): "
        f"n = {SMALL[0]}, p = {SMALL[1]}. Seed {data.seed}."
    )
