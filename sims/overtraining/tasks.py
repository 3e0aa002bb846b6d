"""Which kinds of fine-tuning task overtrain, how much, and at which learning rate (docs, N5)."""

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from linfit import network
from linfit.network import TwoLayer
from sims.estimate import progress
from sims.overtraining.training import tuned
from theory import overtraining as theory

__all__ = ["late_rises", "optimal_rates", "sample_kinds"]


def sample_kinds(
    key: Array, target: Array, draws: int, *, entry_std: float = 0.3, angle: float = 0.5
) -> dict[str, Array]:
    """Fine-tuning targets (draws, m, k) by their relation to A = U diag(a) Vᵀ.

    With U and V: "shared" has new singular values a_i e^{z_i/2}; "stretched" 1.5 a, "shrunk" a/2, "removed" drops every
    other feature, "permuted" has a in random order. With other singular vectors: "R A Rᵀ" turns both sides of diag(a)
    by the same rotation, "sides" by independent ones; "A + other" adds entries off the diagonal, "orthogonal" has
    nothing else; "random" has independent entries everywhere.

    Args:
        key: of the random numbers.
        target: A (m, k).
        draws: of each kind.
        entry_std: standard deviation of random entries.
        angle: of the largest principal rotation, in radians.

    >>> import jax
    >>> from sims.overtraining import sample_kinds, sample_target
    >>> kinds = sample_kinds(jax.random.key(0), sample_target(jax.random.key(1), 3), draws=2)
    >>> len(kinds), kinds["orthogonal"].shape
    (10, (2, 3, 3))
    """
    U, a, Vt = jnp.linalg.svd(target, full_matrices=False)
    d = a.size

    def one(key: Array) -> dict[str, Array]:
        entries, sizes, left, right, order = jax.random.split(key, 5)
        other = entry_std * jax.random.normal(entries, (d, d))
        off, b = other - jnp.diag(jnp.diagonal(other)), a * jnp.exp(jax.random.normal(sizes, (d,)) / 2)
        R, Q = (_rotation(part, d, angle) for part in (left, right))
        inside = {
            "shared": jnp.diag(b), "stretched": jnp.diag(1.5 * a), "shrunk": jnp.diag(a / 2),
            "removed": jnp.diag(a * (jnp.arange(d) % 2)), "permuted": jnp.diag(jax.random.permutation(order, a)),
            "R A Rᵀ": R * a @ R.T, "sides": R * a @ Q.T, "A + other": jnp.diag(a) + off, "orthogonal": off,
            "random": other,
        }  # fmt: skip
        return {name: U @ matrix @ Vt for name, matrix in inside.items()}

    samples = [one(part) for part in jax.random.split(key, draws)]
    return {name: jnp.stack([sample[name] for sample in samples]) for name in samples[0]}


def _rotation(key: Array, size: int, angle: float) -> Array:
    """e^{angle·K}, K random antisymmetric of spectral norm 1."""
    latent = jax.random.normal(key, (size, size))
    generator = latent - latent.T
    return jax.scipy.linalg.expm(angle * generator / jnp.linalg.norm(generator, 2))


def late_rises(
    checkpoints: TwoLayer, target: Array, tasks: dict[str, Array], *, finetune_times: np.ndarray, step_size: float
) -> xr.Dataset:
    """How often and how far the pretraining loss after fine-tuning rises late in pretraining, (task, finetune_time).

    Every checkpoint is fine-tuned by gradient descent. `rise` is last/least − 1 over the checkpoints, a median over the
    draws between `rise_low` and `rise_high`, its quartiles; `share` ± `share_error` of the draws rise by more than 1%.
    By theory (docs, N5): `predicted`, the share with D_r > 0 for the weakest feature, and `visible`, the share for
    which learning some feature raises the loss, to second order in the fine-tuning time.

    Args:
        checkpoints: weights (time, m, h), (time, h, k), pretrained on `target`, the last long enough to be complete.
        target: A (m, k).
        tasks: stacks of targets (draws, m, k) by name, as many in each.
        finetune_times: ascending T (finetune_time,), rounded to whole steps.
        step_size: η of fine-tuning.
    """
    save_at = np.rint(np.asarray(finetune_times) / step_size).astype(int)
    rates, times, rows = network.constant(step_size, int(save_at[-1])), save_at * step_size, []
    for stack in progress(tasks.values(), "kinds of task", len(tasks)):
        path = network.descend(checkpoints, stack[:, None], rates, save_at)
        losses = np.asarray(network.loss(path, target))  # (finetune_time, draw, time)
        slopes, jumps = (
            np.asarray(of(target, stack[:, None], times)) for of in (theory.late_slope, theory.learning_jumps)
        )
        rise = (losses[..., -1] / losses.min(axis=-1) - 1).T
        rows.append((rise, rise > 0.01, slopes[..., -1] > 1e-9, (jumps > 0).any(axis=-1)))
    rise, large, positive, visible = (
        np.stack(part).astype(float) for part in zip(*rows)
    )  # (task, draw, finetune_time)
    share, dims = large.mean(axis=1), ("task", "finetune_time")
    low, middle, high = np.quantile(rise, [0.25, 0.5, 0.75], axis=1)
    error = np.sqrt(np.maximum(share * (1 - share), 0.25 / rise.shape[1]) / rise.shape[1])
    values = {"rise": middle, "rise_low": low, "rise_high": high, "share": share, "share_error": error}
    values |= {"predicted": positive.mean(axis=1), "visible": visible.mean(axis=1)}
    variables = {name: (dims, value) for name, value in values.items()}
    attributes = {"finetune_step_size": step_size, "draws": rise.shape[1], "size": len(target)}
    return xr.Dataset(variables, {"task": list(tasks), "finetune_time": times}, attributes)


def optimal_rates(data: xr.Dataset) -> xr.Dataset:
    """Every checkpoint at its own best learning rate, and what the authors' mechanism says of it.

    From `fine_tuned_losses` of one schedule and penalty: `step_size` of least fine-tuning loss, `pretrain`, `finetune`
    and the `degradation` there. `trend` is the exponent of the tuned rate in the pretraining time over the later half
    of the checkpoints. From one checkpoint to the next (interval), `growth` is 2Δlog(tuned rate) + Δlog(sensitivity),
    the sensitivity to Gaussian noise (docs, N2): positive where the rate shrinks more slowly than that grows.
    `degrades` is the change of log(degradation), `rises` that of log(pretraining loss after fine-tuning).
    """
    best = tuned(data)
    late = best.isel(time=slice(best.sizes["time"] // 2, None))
    trend = np.log(late.step_size).assign_coords(time=np.log(late.time)).polyfit("time", 1).polyfit_coefficients
    sensitivity = data.spread.isel(step_size=0, drop=True)  # at the smallest rate: that of the checkpoints
    degradation = best.pretrain - best.pretrain_before
    changes = {
        "growth": 2 * np.log(best.step_size).diff("time") + np.log(sensitivity).diff("time"),
        "degrades": np.log(degradation.where(degradation > 0)).diff("time"),
        "rises": np.log(best.pretrain).diff("time"),
    }
    intervals = {name: change.rename(time="interval") for name, change in changes.items()}
    return best.assign(intervals).assign(trend=trend.sel(degree=1, drop=True), degradation=degradation)
