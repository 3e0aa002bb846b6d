"""Overtraining measured: pretrain a two-layer linear network, keep checkpoints, perturb or fine-tune each one.

Weights are trained as full matrices by gradient descent, on the target itself or on tokens that stream by once;
closed forms (docs, N1–N5) are only put beside what was measured. Losses are ½‖W − A‖²_F, times are step size × steps.
"""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import xarray as xr
from jax import Array

from linfit import network
from linfit.network import Objective, TwoLayer
from sims.estimate import mean_and_error, progress, replicate
from theory import overtraining as theory

__all__ = [
    "SCHEDULES", "fine_tuned_losses", "inflection", "matched_forgetting", "perturbed_losses", "pretrain",
    "pretrain_on_tokens", "sample_rotated_task", "sample_target", "sample_unrelated_task", "sharpness",
]  # fmt: skip

SCHEDULES: dict[str, Callable[..., Array]] = {
    "constant": network.constant,
    "cosine": network.cosine,
    "warm-up, stable, decay": network.warmup_stable_decay,
}


def sample_target(key: Array, size: int, exponent: float = 1.0) -> Array:
    """A = U diag(a) Vᵀ (size, size) with a_i = i^(−exponent) and random singular vectors.

    >>> import jax, numpy
    >>> from sims.overtraining import sample_target
    >>> numpy.linalg.svd(sample_target(jax.random.key(0), 3))[1].round(3)
    array([1.   , 0.5  , 0.333])
    """

    def rotation(key: Array) -> Array:
        q, r = jnp.linalg.qr(jax.random.normal(key, (size, size)))
        return q * jnp.sign(jnp.diagonal(r))

    left, right = (rotation(part) for part in jax.random.split(key))
    return left * jnp.arange(1.0, size + 1) ** -exponent @ right.T


def sample_rotated_task(key: Array, target: Array, angle: float) -> Array:
    """B = R_L A R_Rᵀ, both sides turned by e^{angle·K}, K random antisymmetric of spectral norm 1.

    The largest principal rotation is by `angle` radians; 0 is the pretraining task itself.
    """

    def rotation(part: Array, size: int) -> np.ndarray:
        latent = np.asarray(jax.random.normal(part, (size, size)))
        generator = latent - latent.T
        return scipy.linalg.expm(angle * generator / np.linalg.norm(generator, 2))

    left, right = jax.random.split(key)
    return jnp.asarray(rotation(left, target.shape[0]) @ np.asarray(target) @ rotation(right, target.shape[1]).T)


def sample_unrelated_task(key: Array, target: Array, entry_std: float) -> Array:
    """B with independent N(0, entry_std²) entries, no feature in common with the target but by chance."""
    return entry_std * jax.random.normal(key, target.shape)


def sample_tasks(key: Array, target: Array, draws: int) -> dict[str, Array]:
    """The fine-tuning tasks of the figures, (draws, m, k): "unrelated", "same + noise", "rotated" by 0.5, "stretched".

    Independent entries have the same spectral norm at every size.
    """
    keys = jax.random.split(key, draws)
    entry_std = 0.15 * (24 / len(target)) ** 0.5
    return {
        "unrelated": jnp.stack([sample_unrelated_task(one, target, entry_std) for one in keys]),
        "same + noise": jnp.stack([target + sample_unrelated_task(one, target, entry_std * 2 / 3) for one in keys]),
        "rotated": jnp.stack([sample_rotated_task(one, target, 0.5) for one in keys]),
        "stretched": jnp.stack([1.5 * target] * draws),
    }


def pretrain(target: Array, times: np.ndarray, *, initial: float, step_size: float, imbalance: float = 0.0) -> TwoLayer:
    """Checkpoints (times, m, h), (times, h, k) of gradient descent from an aligned start.

    Args:
        target: A (m, k).
        times: ascending (times,), rounded to whole steps.
        initial: s₀ of every mode.
        step_size: η.
        imbalance: c = w₁² − w₂² of every mode at the start.

    >>> import jax, numpy
    >>> from linfit import network
    >>> from sims.overtraining import pretrain, sample_target
    >>> target = sample_target(jax.random.key(0), 3)
    >>> network.loss(pretrain(target, numpy.array([0.0, 50.0]), initial=0.01, step_size=0.05), target).round(3)
    Array([0.662, 0.   ], dtype=float64)
    """
    save_at = np.rint(np.asarray(times) / step_size).astype(int)
    start = network.aligned_network(target, initial, imbalance)
    return network.descend(start, target, network.constant(step_size, max(int(save_at[-1]), 1)), save_at)


def learning_curves(
    target: Array, times: np.ndarray, *, initial: float, step_sizes: list[float], imbalance: float = 0.0
) -> xr.Dataset:
    """Diagonal of UᵀWV as `measured` (step_size, time, mode), `exact` by N1, and the largest `error` (step_size,)."""
    U, a, Vt = jnp.linalg.svd(target)
    measured = []
    for step_size in progress(step_sizes, "learning curves", len(step_sizes)):
        checkpoints = pretrain(target, times, initial=initial, step_size=step_size, imbalance=imbalance)
        measured.append(jnp.einsum("pi,tpq,iq->ti", U, checkpoints.product, Vt))
    w1, w2 = network.aligned_modes(*network.layer_modes(initial, imbalance), a, times)
    variables = {"measured": (("step_size", "time", "mode"), np.stack(measured)), "exact": (("time", "mode"), w1 * w2)}
    coordinates = {"step_size": step_sizes, "time": times, "mode": np.arange(1, a.size + 1)}
    data = xr.Dataset(variables, coordinates, {"initial": initial, "imbalance": imbalance, "size": len(target)})
    return data.assign(error=abs(data.measured - data.exact).max(("time", "mode")))


class _TokenStream(eqx.Module):
    """Fresh Gaussian tokens at every step: x ~ N(0, I), y = Ax + noise; `keys` (replicas,), one stream each."""

    keys: Array
    target: Array
    noise_std: Array
    batch: int = eqx.field(static=True)

    def __call__(self, step: Array) -> Objective:
        def one(key: Array) -> Objective:
            inputs_key, noise_key = jax.random.split(jax.random.fold_in(key, step))
            m, k = self.target.shape
            X = jax.random.normal(inputs_key, (self.batch, k), self.target.dtype)
            noise = jax.random.normal(noise_key, (self.batch, m), self.target.dtype)
            return network.data_objective(X, X @ self.target.T + self.noise_std * noise)

        return jax.vmap(one)(self.keys)


def pretrain_on_tokens(
    key: Array,
    target: Array,
    start: TwoLayer,
    step_sizes: Array,
    save_at: np.ndarray | None = None,
    *,
    batch: int,
    noise_std: float,
) -> TwoLayer:
    """Checkpoints of one pass of stochastic gradient descent on tokens x ~ N(0, I), y = Ax + noise, each seen once.

    Args:
        key: of the streams; replica i has the same one however many others there are.
        target: A (m, k).
        start: weights with one leading axis of replicas.
        step_sizes: η (steps,) from a schedule.
        save_at: ascending step counts (saved,), the leading axis of the result; the last state alone if not given.
        batch: tokens per step, so that tokens seen = batch × steps.
        noise_std: σ of the label noise.
    """
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(len(start.w1)))
    stream = _TokenStream(keys, target, jnp.asarray(noise_std, target.dtype), batch)
    return network.descend(start, stream, step_sizes, save_at)


def losses_under_noise(key: Array, checkpoints: TwoLayer, target: Array, gammas: Array) -> Array:
    """Loss (gamma, time) of every checkpoint (time, …) under one draw of Gaussian noise, scaled by every γ."""
    noise = network.perturb(key, jax.tree.map(lambda weights: jnp.zeros_like(weights[0]), checkpoints), 1.0)

    def at(gamma: Array) -> Array:
        return network.loss(jax.tree.map(lambda w, e: w + gamma * e, checkpoints, noise), target)

    return jax.lax.map(at, gammas)


def perturbed_losses(
    key: Array,
    target: Array,
    times: np.ndarray,
    gammas: np.ndarray,
    *,
    initial: float,
    step_size: float,
    replicas: int,
    imbalance: float = 0.0,
) -> xr.Dataset:
    """Loss under Gaussian perturbation of every checkpoint, measured and in closed form, dimensions (gamma, time).

    `perturbed` ± `perturbed_error`; `perturbed_expected`, what N2 says of the very checkpoints, and `perturbed_z`, the
    gap to it in standard errors; `perturbed_flow`, N1 + N2 without any training; `loss` (time,) unperturbed;
    `inflection` and `inflection_flow` (gamma,), the time of least perturbed loss, measured and by N3. All checkpoints
    and all γ see the same noise, so that a curve has no jitter of its own.

    Args:
        key: of the perturbations.
        target, times, initial, step_size, imbalance: as in `pretrain`.
        gammas: standard deviations γ ≥ 0 of the noise on every weight.
        replicas: number of perturbations.
    """
    settings = {"initial": initial, "step_size": step_size, "imbalance": imbalance}
    checkpoints, levels = pretrain(target, times, **settings), jnp.asarray(gammas)
    measure = partial(losses_under_noise, checkpoints=checkpoints, target=target, gammas=levels)
    samples = replicate(measure, key, replicas, "perturbations")
    a, (m, k) = jnp.linalg.svd(target, compute_uv=False), target.shape
    shape, column = (m, checkpoints.w1.shape[-1], k), levels[:, None]
    loss, dims = network.loss(checkpoints, target), ("gamma", "time")
    variables = {
        **mean_and_error(samples, dims, "perturbed"),
        "perturbed_expected": (dims, np.asarray(loss + theory.gaussian_sensitivity(*checkpoints, column))),
        "perturbed_flow": (dims, theory.perturbed_loss(initial, a, times, column, shape, imbalance).total),
        "loss": ("time", loss),
        "inflection_flow": ("gamma", theory.inflection_time(initial, a, levels, shape, imbalance)),
    }
    attributes = {"replicas": replicas, **settings, "size": len(target)}
    data = xr.Dataset(variables, {"gamma": gammas, "time": times}, attributes)
    error = np.maximum(data.perturbed_error, 1e-12 * data.perturbed_expected)
    gap = (data.perturbed - data.perturbed_expected) / error
    return data.assign(perturbed_z=gap, inflection=inflection(data.perturbed, rise=0.0))


def fine_tuned_losses(
    checkpoints: TwoLayer,
    times: np.ndarray,
    target: Array,
    tasks: dict[str, Array],
    *,
    step_sizes: np.ndarray,
    penalties: np.ndarray,
    steps: int,
    schedules: tuple[str, ...] = ("constant",),
) -> xr.Dataset:
    """Both losses after fine-tuning every checkpoint, dimensions (task, schedule, penalty, step_size, time).

    `pretrain` and `finetune` are means over the draws of a task, `…_error` their standard errors; `…_before` the losses
    of the checkpoints. `spread` is the mean of m‖W₂‖² + k‖W₁‖², so that Gaussian noise on the fine-tuned weights adds
    ½(γ²·spread + γ⁴mhk) to either loss (docs, N2). A step size at which any draw overflows gives inf.

    Args:
        checkpoints: weights (time, …), pretrained on `target` to the `times`.
        times: (time,).
        target: A (m, k).
        tasks: stacks of targets (draws, m, k) by name, two draws or more, as many in each.
        step_sizes: η (step_size,), the peaks of the schedules.
        penalties: μ ≥ 0 (penalty,), towards the checkpoint.
        steps: number of steps.
        schedules: names in `SCHEDULES`.
    """
    pull = jnp.asarray(penalties)[:, None, None, None]
    samples: dict[str, list] = {"pretrain": [], "finetune": [], "spread": []}
    for stack in progress(tasks.values(), "fine-tuning", len(tasks)):
        objectives = stack[:, None]
        for schedule in schedules:
            rates = SCHEDULES[schedule](jnp.asarray(step_sizes), steps)[:, None, None]
            after = network.descend(checkpoints, objectives, rates, penalty=pull, throw=False)
            size_1, size_2 = (jnp.sum(layer**2, axis=(-2, -1)) for layer in after)
            losses = [network.target_objective(goal).loss(after.product) for goal in (target, objectives)]
            for name, values in zip(samples, (*losses, target.shape[0] * size_2 + target.shape[1] * size_1)):
                samples[name].append(np.where(np.isfinite(values), values, np.inf))
    names = {"task": list(tasks), "schedule": list(schedules)}
    coordinates = names | {"penalty": penalties, "step_size": step_sizes, "time": times}
    variables: dict[str, xr.Variable | tuple] = {}
    for name, parts in samples.items():  # each (penalty, step_size, draw, time)
        by_task = np.stack(parts).reshape(len(tasks), len(schedules), *parts[0].shape)
        with np.errstate(invalid="ignore"):  # overflowed runs: inf − inf in the error
            variables |= mean_and_error(np.moveaxis(by_task, 4, 0), tuple(coordinates), name)
    before = [network.loss(checkpoints, stack[:, None]).mean(axis=0) for stack in tasks.values()]
    variables["finetune_before"] = (("task", "time"), np.stack(before))
    variables["pretrain_before"] = ("time", network.loss(checkpoints, target))
    attributes = {"steps": steps, "draws": len(objectives), "size": len(target)}
    return xr.Dataset(variables, coordinates, attributes)


def tuned(data: xr.Dataset) -> xr.Dataset:
    """Every checkpoint at the step size of its own least fine-tuning loss; `step_size` becomes a variable."""
    return data.isel(step_size=data.finetune.argmin("step_size")).reset_coords("step_size")


def inflection(curve: xr.DataArray, rise: float = 0.01) -> xr.DataArray:
    """The time of the least value along "time"; inf unless the curve ends higher than that by a fraction `rise` of it.

    >>> import xarray
    >>> from sims.overtraining import inflection
    >>> values, times = [[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]], [0.0, 1.0, 2.0]
    >>> inflection(xarray.DataArray(values, dims=("case", "time"), coords={"time": times})).values
    array([ 1., inf])
    """
    lowest = curve.idxmin("time")
    return lowest.where(curve.isel(time=-1, drop=True) > (1 + rise) * curve.min("time"), np.inf)


def inflection_times(
    data: xr.Dataset, target: Array, gammas: np.ndarray, levels: np.ndarray, *, initial: float
) -> xr.Dataset:
    """When more pretraining starts to hurt, from `fine_tuned_losses` of one schedule.

    `inflection` (gamma,), `mode_inflection` (gamma, mode) by N3; `fine_tuning_inflection` (task, penalty, step_size);
    `combined_inflection` (gamma_after, step_size), fine-tuned to "unrelated", then perturbed by γ of `levels`.
    """
    a, (m, k) = jnp.linalg.svd(target, compute_uv=False), target.shape
    shape = (m, min(m, k), k)
    plain = data.sel(task="unrelated", penalty=0.0, drop=True)
    noise = xr.DataArray(levels, dims="gamma_after", coords={"gamma_after": levels})
    combined = plain.pretrain + (noise**2 * plain.spread + noise**4 * np.prod(shape)) / 2
    variables = {
        "inflection": ("gamma", np.asarray(theory.inflection_time(initial, a, gammas, shape))),
        "mode_inflection": (("gamma", "mode"), np.asarray(theory.mode_inflection_times(initial, a, gammas, shape))),
        "fine_tuning_inflection": inflection(data.pretrain),
        "combined_inflection": inflection(combined),
    }
    attributes = data.attrs | {"initial": initial, "last_time": float(data.time[-1])}
    return xr.Dataset(variables, {"gamma": gammas}, attributes)


def token_budgets(
    key: Array,
    target: Array,
    budgets: np.ndarray,
    gammas: np.ndarray,
    *,
    batch: int,
    step_size: float,
    noise_std: float,
    scale: float,
    replicas: int,
    schedules: tuple[str, ...] = ("constant",),
) -> xr.Dataset:
    """Pretraining from small Gaussian weights on budgets of tokens, multiples of the batch, then perturbation by γ.

    Population `loss` (schedule, budget), and `perturbed` (gamma, …) by N2, with standard errors over the replicas.
    With a decaying schedule every budget is a run of its own. `batch`, `noise_std` as in `pretrain_on_tokens`; `scale`
    is the standard deviation of the initial weights.
    """
    start_key, stream_key = jax.random.split(key)
    size, steps = len(target), np.asarray(budgets) // batch
    start = network.sample_network(start_key, (size, size, size), scale, replicas=(replicas,))
    train = partial(pretrain_on_tokens, stream_key, target, start, batch=batch, noise_std=noise_std)
    losses, rises = [], []
    for schedule in progress(schedules, "token budgets", len(schedules)):
        ends = []
        for saved in [steps] if schedule == "constant" else steps[:, None]:
            rates = SCHEDULES[schedule](step_size, int(saved[-1]))
            ends.append(train(jnp.pad(rates, (0, int(steps[-1] - saved[-1]))), saved))  # one length, one compilation
        checkpoints = TwoLayer(*(jnp.concatenate(layers) for layers in zip(*ends)))
        losses.append(network.loss(checkpoints, target))
        rises.append(theory.gaussian_sensitivity(*checkpoints, jnp.asarray(gammas)[:, None, None]))
    loss, rise = np.stack(losses), np.stack(rises, axis=1)  # (schedule, budget, replica), (gamma, …)
    variables = mean_and_error(np.moveaxis(loss, -1, 0), ("schedule", "budget"), "loss")
    variables |= mean_and_error(np.moveaxis(loss + rise, -1, 0), ("gamma", "schedule", "budget"), "perturbed")
    settings = {"batch": batch, "step_size": step_size, "noise_std": noise_std, "scale": scale}
    coordinates = {"schedule": list(schedules), "budget": budgets, "gamma": gammas}
    return xr.Dataset(variables, coordinates, settings | {"replicas": replicas, "size": size})


@partial(jax.jit, static_argnames="iterations")
def sharpness(weights: TwoLayer, target: Array, iterations: int = 40) -> Array:
    """Largest Hessian eigenvalue (…,) of ½‖W₁W₂ − A‖²_F, by Lanczos on Hessian–vector products (a jvp of the gradient).

    Full reorthogonalisation; exact once `iterations` reaches the number of distinct eigenvalues.

    Args:
        weights: (…, m, h), (…, h, k).
        target: A (m, k).
        iterations: of Lanczos.

    >>> from linfit import network
    >>> from sims.overtraining import sharpness
    >>> at_minimum = network.aligned_network([[2.0, 0.0], [0.0, 1.0]], [2.0, 1.0])
    >>> round(float(sharpness(at_minimum, at_minimum.product)), 6)  # 2s₁
    4.0
    """
    objective = network.target_objective(target)

    def one(weights: TwoLayer) -> Array:
        flat, unravel = jax.flatten_util.ravel_pytree(weights)

        def hessian_times(vector: Array) -> Array:
            slope = jax.jvp(lambda now: network.gradient(now, objective), (weights,), (unravel(vector),))[1]
            return jax.flatten_util.ravel_pytree(slope)[0]

        start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
        return _largest_eigenvalue(hessian_times, start / jnp.linalg.norm(start), min(iterations, flat.size))

    for _ in range(weights.w1.ndim - 2):
        one = jax.vmap(one)
    return one(weights)


def _largest_eigenvalue(times: Callable[[Array], Array], start: Array, iterations: int) -> Array:
    """Lanczos: the largest eigenvalue of the operator within the Krylov space of `start`."""

    def step(basis: Array, index: Array) -> tuple[Array, Array]:
        image = times(basis[index])
        diagonal = image @ basis[index]
        for _ in range(2):  # twice is enough
            image = image - (image @ basis.T) @ basis
        length = jnp.linalg.norm(image)
        alive = length > 1e-10 * jnp.abs(diagonal)
        following = jnp.where(alive, image / jnp.where(alive, length, 1), 0)
        return basis.at[index + 1].set(following), jnp.stack([diagonal, jnp.where(alive, length, 0)])

    basis = jnp.zeros((iterations + 1, start.size), start.dtype).at[0].set(start)
    _, entries = jax.lax.scan(step, basis, jnp.arange(iterations))
    diagonal, off = entries[:, 0], entries[:-1, 1]
    return jnp.linalg.eigvalsh(jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))[-1]


def matched_forgetting(
    checkpoints: TwoLayer, target: Array, task: Array, *, level: float, step_size: float, steps: int, saves: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """Rise of the pretraining loss when the fine-tuning loss first falls to `level`, and the principal angle there.

    Both (…,), the angle the largest between the leading half of the left singular vectors before and after; NaN where
    the level is not reached. The loss is interpolated linearly between saved steps.

    Args:
        checkpoints: weights (…, m, h), (…, h, k), pretrained on `target`.
        target: A (m, k).
        task: B (m, k).
        level: fine-tuning loss ½‖W − B‖²_F at which forgetting is compared.
        step_size: η of gradient descent.
        steps: at most this many.
        saves: how many of them are looked at.
    """
    save_at = np.unique(np.linspace(0, steps, saves).astype(int))
    path = network.descend(checkpoints, task, network.constant(step_size, steps), save_at)
    finetune, pretraining = np.asarray(network.loss(path, task)), np.asarray(network.loss(path, target))
    reached = finetune <= level
    first = np.maximum(reached.argmax(axis=0), 1)

    def at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, index[None], axis=0)[0]

    above, below = at(finetune, first - 1), at(finetune, first)
    share = np.clip((above - level) / np.where(above > below, above - below, 1), 0, 1)
    after = (1 - share) * at(pretraining, first - 1) + share * at(pretraining, first)
    landed = jnp.take_along_axis(path.product, jnp.asarray(first)[None, ..., None, None], axis=0)[0]
    left, right = (jnp.linalg.svd(product)[0][..., : len(target) // 2] for product in (checkpoints.product, landed))
    angle = jnp.arccos(jnp.clip(jnp.linalg.svd(left.mT @ right, compute_uv=False)[..., -1], -1, 1))
    found = reached.any(axis=0)
    return np.where(found, after - pretraining[0], np.nan), np.where(found, angle, np.nan)


def sharpness_and_forgetting(
    key: Array,
    target: Array,
    task: Array,
    *,
    step_sizes: np.ndarray,
    steps: int,
    batch: int,
    noise_std: float,
    scales: tuple[float, float],
    replicas: int,
    level: float,
    finetune_step_size: float,
    finetune_steps: int,
    schedules: tuple[str, ...] = tuple(SCHEDULES),
) -> xr.Dataset:
    """What pretraining by each schedule and peak rate leaves behind, dimensions (schedule, step_size, replica).

    `loss` and `sharpness` after pretraining on tokens, `forgetting` and `angle` of `matched_forgetting` at `level`.
    `batch`, `noise_std` as in `pretrain_on_tokens`; `scales` are those of the initial weights of the two layers.
    """
    start_key, stream_key = jax.random.split(key)
    size = len(target)
    start = network.sample_network(start_key, (size, size, size), *scales, replicas=(replicas,))
    forget = partial(matched_forgetting, level=level, step_size=finetune_step_size, steps=finetune_steps)
    rows = []
    cases = [(schedule, step_size) for schedule in schedules for step_size in step_sizes]
    for schedule, step_size in progress(cases, "schedules", len(cases)):
        rates = SCHEDULES[schedule](step_size, steps)
        end = pretrain_on_tokens(stream_key, target, start, rates, batch=batch, noise_std=noise_std)
        rows.append((network.loss(end, target), sharpness(end, target), *forget(end, target, task)))
    columns = np.array(rows).reshape(len(schedules), len(step_sizes), 4, replicas)
    dims, names = ("schedule", "step_size", "replica"), ("loss", "sharpness", "forgetting", "angle")
    settings = {"steps": steps, "batch": batch, "noise_std": noise_std, "level": level, "scales": scales, "size": size}
    variables = {name: (dims, columns[:, :, index]) for index, name in enumerate(names)}
    return xr.Dataset(variables, {"schedule": list(schedules), "step_size": step_sizes}, settings)


def key_from(normals: np.ndarray) -> Array:
    """A key made of standard normals, for claims, which have no other source of randomness."""
    words = np.frombuffer(np.ascontiguousarray(normals[:1]).tobytes(), np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words))
