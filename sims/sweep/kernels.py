"""Kernels of sweeps: pure functions (key, parameters) → named arrays, each described in `experiments`.

Parameters that one factorisation serves (τ, λ, t, σ) are *batched*: a kernel gets all their values at once, as float
arrays, and its outputs vary along them. Every other parameter is a plain number or word, and a value of its own means
another call.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit import Fit, exact_form, fine_tune, network, risk_forms, sample_design, spectra
from linfit.covariance import Diagonal
from linfit.filters import Filter, GradientFlow, Ridge
from linfit.internal.checks import count
from linfit.pipelines import exact_risks
from linfit.problem import Pair, TwoTaskProblem, aligned_problem
from linfit.risk import Parabola, RiskForm
from sims import flow as weighted
from sims import merges as merging
from sims import s3ft as self_supervised
from sims.overtraining import losses_under_noise, pretrain, sample_rotated_task, sample_target
from sims.pipelines import similar_targets
from theory.equivalents import along as predicted_along
from theory.merges import Run
from theory.merges import form as predicted_form
from theory.pipelines import Stage, risks
from theory.s3ft import Procedure

Parameters = Mapping[str, Any]


def _problem(parameters: Parameters, noise_std: float = 0.0) -> TwoTaskProblem:
    """The test bed of the figures (`linfit.aligned_problem`)."""
    given = {name: parameters[name] for name in ("alignment", "pretrain_risk")}
    return aligned_problem(spectra.power_law(parameters["p"], parameters["decay"]), noise_std=noise_std, **given)


def _sampled_forms(key: Array, parameters: Parameters) -> Pair[RiskForm]:
    """Exact risks of the test bed on one random design."""
    problem = _problem(parameters)
    return risk_forms(sample_design(key, problem.finetune_covariance, parameters["n"], parameters["law"]), problem)


def overadaptation(key: Array, parameters: Parameters) -> dict[str, Array]:
    """Exact risks of ridge and of gradient flow on one random design, along τ, λ or t, and σ (docs, S2–S3)."""
    forms, filters = _sampled_forms(key, parameters), (Ridge(parameters["penalty"]), GradientFlow(parameters["time"]))
    ridge, flow = (_risks_along(forms, filter, parameters["tau"], parameters["noise_std"]) for filter in filters)
    return ridge | {f"{name}_stopped": values for name, values in flow.items()}


@jax.jit
@partial(jax.vmap, in_axes=(None, None, None, 0))
def _risks_along(forms: Pair[RiskForm], filter: Filter, tau: Array, noise_std: Array) -> dict[str, Array]:
    """Risks of a family of filters along σ, the filter's hyperparameter, and τ."""
    parabolas = forms.map(lambda form: form.with_noise_std(noise_std).along(filter))
    finetune, pretrain = parabolas.map(lambda parabola: parabola(tau[:, None]))
    risks = {"finetune": finetune.total.T, "finetune_bias": finetune.bias.T, "pretrain": pretrain.total.T}
    return risks | {"best_tau": parabolas.finetune.optimal_tau}


def equivalents(key: Array, parameters: Parameters) -> dict[str, Array]:
    """Exact ridge risks of one random design and the deterministic equivalents of the same (docs, D1–D3)."""
    filter, forms, rows = Ridge(parameters["penalty"]), _sampled_forms(key, parameters), []
    for noise_std in parameters["noise_std"]:
        measured = [form.with_noise_std(noise_std).along(filter) for form in forms]
        predicted = predicted_along(_problem(parameters, noise_std), parameters["n"], filter)
        rows.append([parabola(parameters["tau"][:, None]).total.mT for parabola in (*measured, *predicted)])
    names = ("finetune", "pretrain", "finetune_predicted", "pretrain_predicted")
    found = dict(zip(names, map(jnp.stack, zip(*rows, strict=True)), strict=True))
    return found | {f"{name}_gap": found[name] / found[f"{name}_predicted"] - 1 for name in names[:2]}


def overtraining(key: Array, parameters: Parameters) -> dict[str, Array]:
    """Checkpoints of one pretraining run, perturbed by noise of every size, and fine-tuned to another task."""
    target_key, noise_key, task_key = jax.random.split(key, 3)
    target = sample_target(target_key, parameters["size"], parameters["exponent"])
    times, gammas = np.asarray(parameters["time"]), jnp.asarray(parameters["gamma"])
    order = np.argsort(times)
    checkpoints = pretrain(target, times[order], initial=parameters["initial"], step_size=parameters["step_size"])
    checkpoints = jax.tree.map(lambda weights: weights[np.argsort(order)], checkpoints)
    task, loss = sample_rotated_task(task_key, target, parameters["angle"]), network.loss(checkpoints, target)
    rates = network.constant(parameters["step_size"], parameters["finetune_steps"])
    after = network.descend(checkpoints, task, rates, penalty=parameters["penalty"])
    perturbed = losses_under_noise(noise_key, checkpoints, target, gammas)
    finetuned, degradation = network.loss(after, task), network.loss(after, target) - loss
    return {"loss": loss, "perturbed": perturbed, "finetuned": finetuned, "degradation": degradation}


def flow(key: Array, parameters: Parameters) -> dict[str, Array]:
    """Weighted fine-tuning of one draw of design, shift and noise: exact risks along the tilt, t and τ (docs, §4)."""
    problem, filter = _problem(parameters, parameters["noise_std"]), GradientFlow(parameters["time"])
    fixed = {name: parameters[name] for name in ("n", "law", "deviation")}
    found = _weighted(key, problem, filter, tilts=tuple(map(float, parameters["tilt"])), **fixed)
    constant, slope, curvature = (found[name][0][..., None] for name in ("constant", "slope", "curvature"))
    along = Parabola(constant[..., None], slope, curvature, jnp.zeros(()))
    finetune, pretrain, hardest = jnp.moveaxis(along(parameters["tau"]).total, 1, 0)
    shares = {name: found[name][0] for name in ("share", "step")}
    return {"finetune": finetune, "pretrain": pretrain, "hardest": hardest} | shares


@partial(jax.jit, static_argnames=("tilts", "n", "law", "deviation"))
def _weighted(
    key: Array, problem: TwoTaskProblem, filter: Filter, *, tilts: tuple[float, ...], n: int, law: str, deviation: str
) -> dict[str, Array]:
    """One draw, fine-tuned with the weights of every tilt."""
    weightings = {str(tilt): weighted.tilted(tilt) for tilt in tilts}
    return weighted.measure_once(key, problem, n, weightings, filter, law, (deviation,))


def s3ft(key: Array, parameters: Parameters) -> dict[str, Array]:
    """S3FT by ridge on one draw of the shift, the design, the noise and all answers (docs, §5)."""
    problem_key, design_key, sample_key = jax.random.split(key, 3)
    names = (
        "p",
        "content_rank",
        "style_dimension",
        "decay",
        "alignment",
        "content_signal",
        "style_signal",
        "noise_std",
    )
    problem = self_supervised.content_and_style_problem(problem_key, **{name: parameters[name] for name in names})
    axes = [parameters[name] for name in Procedure._fields]
    procedure = Procedure(*map(jnp.ravel, jnp.meshgrid(*axes, indexing="ij")))
    fixed = {name: parameters[name] for name in ("n", "law")}
    found = _self_supervised(design_key, sample_key, problem, procedure, jnp.asarray(parameters["penalty"]), **fixed)
    shape = [len(values) for values in axes]
    shares = {name: found[name][0].reshape(shape) for name in ("own", "paraphrase", "gold")}
    return shares | {name: values.reshape(-1, *shape) for name, values in found.items() if name not in shares}


@partial(jax.jit, static_argnames=("n", "law"))
def _self_supervised(
    design_key: Array, sample_key: Array, problem: Any, procedure: Procedure, penalty: Array, *, n: int, law: str
) -> dict[str, Array]:
    """Every setting of the procedure and every penalty on the same draw."""
    X = sample_design(design_key, problem.finetune_covariance, n, law)
    return jax.lax.map(lambda one: self_supervised.measure_once(sample_key, X, problem, procedure, Ridge(one)), penalty)


def pipeline(key: Array, parameters: Parameters) -> dict[str, Array]:
    """Stages of ridge on one random design each, at every λ and τ: exact risks after the last (docs, P1)."""
    stages, p = count("stages", parameters["stages"]), parameters["p"]
    if parameters["anchor"] not in ("before", "first"):
        raise ValueError(f"anchor must be before or first, got {parameters['anchor']!r}")
    spectrum = spectra.power_law(p, parameters["decay"])
    similarity = jnp.where(jnp.eye(stages, dtype=bool), 1.0, parameters["similarity"])
    targets = similar_targets(similarity, jnp.full(p, 1 / spectrum.sum()))  # of risk 1 before any stage
    covariance, keys = Diagonal(spectrum), jax.random.split(key, stages)
    designs = [sample_design(one, covariance, parameters["n"], parameters["law"]) for one in keys]
    sources = None if parameters["anchor"] == "before" else (-1, *[0] * (stages - 1))
    axes = jnp.asarray(parameters["penalty"]), jnp.asarray(parameters["tau"])
    fixed = designs, spectrum, targets, parameters["n"], parameters["noise_std"]
    exact, predicted = _last_risks(*axes, *fixed, sources=sources)
    mean, expected = exact.mean(axis=-1), predicted.mean(axis=-1)
    found = {"first": exact[..., 0], "last": exact[..., -1], "mean": mean}
    return found | {"mean_predicted": expected, "mean_gap": mean / expected - 1}


@partial(jax.jit, static_argnames="sources")
def _last_risks(
    penalties: Array,
    taus: Array,
    designs: list[Array],
    spectrum: Array,
    targets: Array,
    n: int,
    noise_std: float,
    *,
    sources: tuple[int, ...] | None,
) -> tuple[Array, Array]:
    """Risks (λ, τ, task) after the last stage, given the designs and predicted."""
    stages, tests = len(designs), jnp.broadcast_to(spectrum, (len(designs), spectrum.size))

    def at(penalty: Array, tau: Array) -> tuple[Array, Array]:
        along, filter = jnp.full(stages, tau).at[0].set(1.0), Ridge(penalty)
        options: dict[str, Any] = {"noise_std": noise_std, "tau": along, "average_with": sources}
        exact = exact_risks(designs, [filter] * stages, targets, tests, **options)
        predicted = risks(Stage(spectrum, n, noise_std, filter, along, average_with=sources), targets)
        return exact.total[-1], predicted[-1]

    return jax.lax.map(lambda penalty: jax.vmap(at, (None, 0))(penalty, taus), penalties)


def merge(key: Array, parameters: Parameters) -> dict[str, Array]:
    """Runs of two tasks merged on one draw: exact risk of averages, one sample of other merges (docs, K1–K3)."""
    design_key, noise_key, gap_key = jax.random.split(key, 3)
    n, tau, keep = parameters["n"], parameters["tau"], parameters["keep"]
    noise_std, filter = parameters["noise_std"], Ridge(parameters["penalty"])
    s = spectra.power_law(parameters["p"], parameters["decay"])
    targets = merging.similar_tasks(s, parameters["similarity"], parameters["alignment"])
    tasks = [0] * parameters["runs"] + [1] * parameters["other_runs"]
    X = [sample_design(jax.random.fold_in(design_key, k), s, n, parameters["law"]) for k in range(len(tasks))]
    exact = exact_form([Fit(t, x, noise_std, filter) for t, x in zip(tasks, X, strict=True)], targets, s, 0)
    predicted = predicted_form([Run(t, s, n, noise_std, filter) for t in tasks], targets, s, 0)
    gaps = jnp.linalg.cholesky(targets[:, :, 0]) @ jax.random.normal(gap_key, (2, s.size), s.dtype)
    gaps = gaps * jnp.sqrt(targets[0, 0] / targets[0, 0, 0])
    noise = noise_std * jax.random.normal(noise_key, (len(tasks), n), s.dtype)
    fitted = [fine_tune(x, x @ gaps[t] + e, 0 * s, filter) for t, x, e in zip(tasks, X, noise, strict=True)]
    kept = jnp.stack([merging.trim(jnp.stack(fitted), share) for share in keep])

    def sampled(merged: Array) -> Array:
        return jnp.sum(s * (tau[:, None] * merged[:, None] - gaps[0]) ** 2, axis=-1)

    equal = tau[:, None] * jnp.full(len(tasks), 1 / len(tasks))
    found = {
        "averaged": exact(equal),
        "best": exact.optimal_risk(),
        "tau_best": jnp.sum(exact.optimal_weights(shared_tau=True)),
    }
    expected = {"averaged_predicted": predicted(equal), "best_predicted": predicted.optimal_risk()}
    return found | expected | {"trimmed": sampled(kept.mean(axis=1)), "elected": sampled(merging.elect(kept))}
