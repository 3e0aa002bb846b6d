"""Overtraining measured: pretrain a two-layer linear network, keep checkpoints, perturb or fine-tune each one.

Weights are trained as full matrices by gradient descent, on the target itself or on tokens that stream by once;
closed forms (docs, N1–N4) are only put beside what was measured. Losses are ½‖W − A‖²_F, times are step size × steps.
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
from sims.estimate import mean_and_error, progress
from theory import overtraining as theory

SCHEDULES: dict[str, Callable[..., Array]] = {
    "constant": network.constant,
    "cosine": network.cosine,
    "warm-up, stable, decay": network.warmup_stable_decay,
}

# --------------------------------------------------------------------------------------------------------- tasks


def power_law_target(key: Array, size: int, exponent: float = 1.0) -> Array:
    """A = U diag(a) Vᵀ (size, size) with a_i = i^(−exponent) and random singular vectors.

    >>> np.linalg.svd(power_law_target(jax.random.key(0), 3))[1].round(3)
    array([1.   , 0.5  , 0.333])
    """
    left, right = (random_rotation(part, size) for part in jax.random.split(key))
    return left * jnp.arange(1.0, size + 1) ** -exponent @ right.T


def random_rotation(key: Array, size: int) -> Array:
    """A uniformly distributed orthogonal matrix (size, size)."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (size, size)))
    return q * jnp.sign(jnp.diagonal(r))


def stretched_task(target: Array, factor: float) -> Array:
    """The same features, each `factor` times as strong: B = U diag(factor·a) Vᵀ."""
    return factor * target


def rotated_task(key: Array, target: Array, angle: float) -> Array:
    """B = R_L A R_Rᵀ, both sides turned by e^{angle·K}, K random antisymmetric of spectral norm 1.

    The largest principal rotation is by `angle` radians; 0 is the pretraining task itself.
    """

    def turn(part: Array, size: int) -> np.ndarray:
        draw = np.asarray(jax.random.normal(part, (size, size)))
        generator = draw - draw.T
        return scipy.linalg.expm(angle * generator / np.linalg.norm(generator, 2))

    left, right = jax.random.split(key)
    return jnp.asarray(turn(left, target.shape[0]) @ np.asarray(target) @ turn(right, target.shape[1]).T)


def unrelated_task(key: Array, target: Array, entry_std: float) -> Array:
    """B with independent N(0, entry_std²) entries, no feature in common with the target but by chance."""
    return entry_std * jax.random.normal(key, target.shape)


# --------------------------------------------------------------------------------------------------- pretraining


def pretrain(target: Array, times: np.ndarray, *, initial: float, step_size: float, imbalance: float = 0.0) -> TwoLayer:
    """Checkpoints (times, m, h), (times, h, k) of gradient descent from an aligned start; times are rounded to steps.

    >>> target = power_law_target(jax.random.key(0), 3)
    >>> checkpoints = pretrain(target, np.array([0.0, 50.0]), initial=0.01, step_size=0.05)
    >>> network.loss(checkpoints, target).round(3)
    Array([0.662, 0.   ], dtype=float64)
    """
    save_at = np.rint(np.asarray(times) / step_size).astype(int)
    start = network.aligned_network(target, initial, imbalance)
    return network.descend(start, target, network.constant(step_size, max(int(save_at[-1]), 1)), save_at)


def learning_curves(
    target: Array, times: np.ndarray, *, initial: float, step_sizes: list[float], imbalance: float = 0.0
) -> xr.Dataset:
    """Singular values of the trained network beside gradient flow in closed form, dimensions (step_size, time, mode).

    `measured` are the diagonal entries of UᵀWV, `exact` the closed form (docs, N1).
    """
    U, a, Vt = jnp.linalg.svd(target)
    measured = []
    for step_size in progress(step_sizes, "learning curves", len(step_sizes)):
        checkpoints = pretrain(target, times, initial=initial, step_size=step_size, imbalance=imbalance)
        measured.append(jnp.einsum("pi,tpq,iq->ti", U, checkpoints.product, Vt))
    w1, w2 = network.aligned_modes(*network.layer_modes(jnp.asarray(initial), jnp.asarray(imbalance)), a, times)
    return xr.Dataset(
        {"measured": (("step_size", "time", "mode"), np.stack(measured)), "exact": (("time", "mode"), w1 * w2)},
        {"step_size": step_sizes, "time": times, "mode": np.arange(1, a.size + 1)},
        {"initial": initial, "imbalance": imbalance},
    )


class TokenStream(eqx.Module):
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
    step_sizes: Array,
    save_at: np.ndarray,
    *,
    batch: int,
    noise_std: float,
    replicas: int,
    start: TwoLayer,
) -> TwoLayer:
    """Checkpoints (saved, replicas, …) of one pass of stochastic gradient descent; tokens seen = batch × steps."""
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(replicas))
    stream = TokenStream(keys, target, jnp.asarray(noise_std, target.dtype), batch)
    return network.descend(start, stream, step_sizes, save_at)


# --------------------------------------------------------------------------------------- perturbation, fine-tuning


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
    """
    checkpoints = pretrain(target, times, initial=initial, step_size=step_size, imbalance=imbalance)

    @jax.jit
    def draw(index: Array) -> Array:  # (gamma, time)
        noise_key = jax.random.fold_in(key, index)
        common = jax.tree.map(lambda weights: jnp.zeros_like(weights[0]), checkpoints)
        noise = network.perturb(noise_key, common, 1.0)

        def at(gamma: Array) -> Array:
            return network.loss(jax.tree.map(lambda w, e: w + gamma * e, checkpoints, noise), target)

        return jax.lax.map(at, jnp.asarray(gammas))

    samples = np.stack([np.asarray(draw(jnp.asarray(i))) for i in progress(range(replicas), "perturbations", replicas)])
    a = jnp.linalg.svd(target, compute_uv=False)
    (m, h), k = checkpoints.w1.shape[-2:], target.shape[1]
    flow = theory.perturbed_loss(initial, a, times, jnp.asarray(gammas)[:, None], (m, h, k), imbalance)
    loss = network.loss(checkpoints, target)
    expected = np.asarray(loss + theory.gaussian_sensitivity(*checkpoints, jnp.asarray(gammas)[:, None]))
    error = samples.std(axis=0, ddof=1) / replicas**0.5
    data = xr.Dataset(
        {
            **mean_and_error(samples, ("gamma", "time"), "perturbed"),
            "perturbed_expected": (("gamma", "time"), expected),
            "perturbed_z": (("gamma", "time"), (samples.mean(axis=0) - expected) / np.maximum(error, 1e-12 * expected)),
            "perturbed_flow": (("gamma", "time"), flow.total),
            "loss": ("time", loss),
            "inflection_flow": (
                "gamma",
                theory.inflection_time(initial, a, jnp.asarray(gammas), (m, h, k), imbalance),
            ),
        },
        {"gamma": gammas, "time": times},
        {"replicas": replicas, "initial": initial, "step_size": step_size, "imbalance": imbalance},
    )
    return data.assign(inflection=inflection(data.perturbed, rise=0.0))


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

    `tasks` are stacks of targets (draws, m, k) by name, two draws or more, as many in each. `pretrain` and `finetune`
    are means over the draws, `…_error` their standard errors; `…_before` the losses of the checkpoints. `spread` is the
    mean of m‖W₂‖² + k‖W₁‖², so that Gaussian noise on the fine-tuned weights adds ½(γ²·spread + γ⁴mhk) to either loss
    (docs, N2). A step size at which any draw overflows gives inf.
    """
    pull = jnp.asarray(penalties)[:, None, None, None]
    samples: dict[str, list] = {"pretrain": [], "finetune": [], "spread": []}
    for stack in progress(tasks.values(), "fine-tuning", len(tasks)):
        objectives = stack[:, None]
        for schedule in schedules:
            rates = SCHEDULES[schedule](jnp.asarray(step_sizes), steps)[:, None, None]
            after = network.descend(checkpoints, objectives, rates, penalty=pull, throw=False)
            samples["pretrain"].append(finite_or_inf(objective_loss(after, target)))
            samples["finetune"].append(finite_or_inf(objective_loss(after, objectives)))
            samples["spread"].append(finite_or_inf(spread(after)))
    dims = ("task", "schedule", "penalty", "step_size", "time")
    variables: dict[str, xr.Variable | tuple] = {}
    for name, parts in samples.items():  # each (penalty, step_size, draw, time)
        by_task = np.stack(parts).reshape(len(tasks), len(schedules), *parts[0].shape)
        with np.errstate(invalid="ignore"):  # overflowed runs: inf − inf in the error
            variables |= mean_and_error(np.moveaxis(by_task, 4, 0), dims, name)
    before = [network.loss(checkpoints, stack[:, None]).mean(axis=0) for stack in tasks.values()]
    variables["finetune_before"] = (("task", "time"), np.stack(before))
    variables["pretrain_before"] = ("time", network.loss(checkpoints, target))
    coordinates = {
        "task": list(tasks),
        "schedule": list(schedules),
        "penalty": penalties,
        "step_size": step_sizes,
        "time": times,
    }
    return xr.Dataset(variables, coordinates, {"steps": steps})


def spread(weights: TwoLayer) -> Array:
    """m‖W₂‖² + k‖W₁‖² (…,)."""
    size_1, size_2 = (jnp.sum(layer**2, axis=(-2, -1)) for layer in weights)
    return weights.w1.shape[-2] * size_2 + weights.w2.shape[-1] * size_1


def objective_loss(weights: TwoLayer, objective: Array) -> Array:
    """½‖W₁W₂ − A‖²_F without the finiteness checks, for runs that may have overflowed."""
    return network.target_objective(objective).loss(weights.product)


def finite_or_inf(values: Array) -> np.ndarray:
    """NaN, what an overflowed run leaves, as inf."""
    host = np.array(values)
    host[~np.isfinite(host)] = np.inf
    return host


def tuned(data: xr.Dataset) -> xr.Dataset:
    """Every checkpoint at the step size of its own least fine-tuning loss; `step_size` becomes a variable."""
    best = data.finetune.argmin("step_size")
    return data.isel(step_size=best).reset_coords("step_size")


def inflection(curve: xr.DataArray, rise: float = 0.01) -> xr.DataArray:
    """The time of the least value along "time"; inf unless the curve ends higher than that by a fraction `rise` of it.

    >>> values, times = [[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]], [0.0, 1.0, 2.0]
    >>> inflection(xr.DataArray(values, dims=("case", "time"), coords={"time": times})).values
    array([ 1., inf])
    """
    lowest = curve.idxmin("time")
    return lowest.where(curve.isel(time=-1, drop=True) > (1 + rise) * curve.min("time"), np.inf)


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
    """Pretraining from small Gaussian weights on a budget of tokens, each seen once, then Gaussian perturbation.

    Dimensions (schedule, budget), and gamma in front for `perturbed`. `loss` is the population loss ½‖W − A‖²_F,
    `perturbed` the same expected under noise γ (docs, N2, exact for whatever weights were reached), both ± standard
    errors over `replicas` seeds of start and stream. With a decaying schedule every budget is a run of its own.
    """
    start_key, stream_key = jax.random.split(key)
    size = target.shape[0]
    start = network.sample_network(start_key, (size, size, size), scale, replicas=(replicas,))
    settings = {"batch": batch, "noise_std": noise_std, "replicas": replicas, "start": start}
    steps = np.asarray(budgets) // batch
    losses, rises = [], []
    for schedule in progress(schedules, "token budgets", len(schedules)):
        if schedule == "constant":
            rates = network.constant(step_size, int(steps[-1]))
            checkpoints = pretrain_on_tokens(stream_key, target, rates, steps, **settings)  # type: ignore[arg-type]
        else:
            ends = []
            for last in steps:
                decayed = SCHEDULES[schedule](step_size, int(last))
                rates = jnp.pad(decayed, (0, int(steps[-1] - last)))  # one length, one compilation
                ends.append(pretrain_on_tokens(stream_key, target, rates, last[None], **settings))  # type: ignore[arg-type]
            checkpoints = jax.tree.map(lambda *parts: jnp.concatenate(parts), *ends)
        losses.append(network.loss(checkpoints, target))
        rises.append(theory.gaussian_sensitivity(*checkpoints, jnp.asarray(gammas)[:, None, None]))
    loss, rise = np.stack(losses), np.stack(rises, axis=1)  # (schedule, budget, replica), (gamma, …)
    return xr.Dataset(
        {
            **mean_and_error(np.moveaxis(loss, -1, 0), ("schedule", "budget"), "loss"),
            **mean_and_error(np.moveaxis(loss + rise, -1, 0), ("gamma", "schedule", "budget"), "perturbed"),
        },
        {"schedule": list(schedules), "budget": budgets, "gamma": gammas},
        {"replicas": replicas, "batch": batch, "step_size": step_size, "noise_std": noise_std},
    )


# ------------------------------------------------------------------------------------------------------ sharpness


def sharpness(weights: TwoLayer, objective: Array, iterations: int = 40) -> Array:
    """Largest Hessian eigenvalue of the loss (…,), by Lanczos on Hessian–vector products (a jvp of the gradient).

    Full reorthogonalisation; exact once `iterations` reaches the number of distinct eigenvalues.

    >>> at_minimum = network.aligned_network(jnp.diag(jnp.array([2.0, 1.0])), [2.0, 1.0])
    >>> round(float(sharpness(at_minimum, at_minimum.product)), 6)  # 2s₁
    4.0
    """
    return _sharpness(weights, jnp.asarray(objective), iterations)


@partial(jax.jit, static_argnames="iterations")
def _sharpness(weights: TwoLayer, objective: Array, iterations: int) -> Array:
    target = network.target_objective(objective)

    def one(weights: TwoLayer) -> Array:
        flat, unravel = jax.flatten_util.ravel_pytree(weights)

        def hessian_times(vector: Array) -> Array:
            slope = jax.jvp(lambda now: network.gradient(now, target), (weights,), (unravel(vector),))[1]
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


def principal_angles(first: Array, second: Array, rank: int) -> Array:
    """Angles (…, rank) in radians, descending, between the spans of the leading left singular vectors of two products.

    >>> principal_angles(jnp.diag(jnp.array([2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0])), 1).round(3)
    Array([1.571], dtype=float64)
    """
    left, right = (jnp.linalg.svd(product)[0][..., :rank] for product in (first, second))
    cosines = jnp.linalg.svd(jnp.swapaxes(left, -1, -2) @ right, compute_uv=False)
    return jnp.arccos(jnp.clip(cosines, -1, 1))[..., ::-1]


def matched_forgetting(
    checkpoints: TwoLayer, target: Array, task: Array, *, level: float, step_size: float, steps: int, saves: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """Rise of the pretraining loss when the fine-tuning loss first falls to `level`, and the principal angle there.

    Both (…,), the angle the largest between the leading half of the left singular vectors before and after; NaN where
    the level is not reached within the steps. The loss is interpolated linearly between saved steps.
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
    products = path.product
    landed = jnp.take_along_axis(products, jnp.asarray(first)[None, ..., None, None], axis=0)[0]
    angle = principal_angles(checkpoints.product, landed, target.shape[0] // 2)[..., 0]
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
    """What the pretraining schedule leaves behind: loss, sharpness, and forgetting at matched fine-tuning loss.

    Dimensions (schedule, step_size, replica): `loss`, `sharpness` after pretraining on streaming tokens from Gaussian
    weights of the two `scales`; `forgetting` and `angle` when fine-tuning to `task` has come down to `level`.
    """
    start_key, stream_key = jax.random.split(key)
    size = target.shape[0]
    start = network.sample_network(start_key, (size, size, size), *scales, replicas=(replicas,))
    rows: dict[str, list] = {"loss": [], "sharpness": [], "forgetting": [], "angle": []}
    cases = [(schedule, step_size) for schedule in schedules for step_size in step_sizes]
    for schedule, step_size in progress(cases, "schedules", len(cases)):
        end = pretrain_on_tokens(
            stream_key,
            target,
            SCHEDULES[schedule](step_size, steps),
            np.array([steps]),
            batch=batch,
            noise_std=noise_std,
            replicas=replicas,
            start=start,
        )
        end = jax.tree.map(lambda weights: weights[0], end)
        forgetting, angle = matched_forgetting(
            end, target, task, level=level, step_size=finetune_step_size, steps=finetune_steps
        )
        for name, value in (
            ("loss", network.loss(end, target)),
            ("sharpness", sharpness(end, target)),
            ("forgetting", forgetting),
            ("angle", angle),
        ):
            rows[name].append(np.asarray(value))
    shape = (len(schedules), len(step_sizes), replicas)
    dims = ("schedule", "step_size", "replica")
    return xr.Dataset(
        {name: (dims, np.stack(values).reshape(shape)) for name, values in rows.items()},
        {"schedule": list(schedules), "step_size": step_sizes},
        {"steps": steps, "batch": batch, "noise_std": noise_std, "level": level},
    )
