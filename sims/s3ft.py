"""S3FT measured from raw data: sample answers, let a judge choose the targets, fine-tune, measure.

Nothing here uses the formulas of `theory.s3ft` to produce an estimate; on the same designs they are put beside it, so
that measured and expected can be compared in standard errors. θ₁* = 0, so θ₁ = u and θ₂* = δ.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array

from linfit import Filter, MinNorm, fine_tune, interpolate, s3ft_targets, sample_design, spectra
from linfit.covariance import Covariance
from linfit.internal.checks import count, non_negative, positive
from linfit.targets import Source, Targets, content_within, noisy
from sims.estimate import means_and_errors, replicate, standard_error, standardised_gap
from sims.real_data import CLASSES, Split, digits_split, over_splits, ridge_from_zero
from theory.s3ft import SUPERVISED, Expectation, Procedure, VectorProblem, conditional, distances

__all__ = [
    "VARIANTS", "content_and_style_problem", "expected_on", "monte_carlo", "own_probabilities", "sample_targets",
    "variant",
]  # fmt: skip


def content_and_style_problem(
    key: Array,
    p: int,
    content_rank: int,
    style_dimension: int,
    *,
    decay: float = 1.0,
    alignment: float = 0.0,
    content_signal: float = 1.0,
    style_signal: float = 1.0,
    noise_std: float = 0.7,
    style_noise_std: float = 0.0,
) -> VectorProblem:
    """Content in the first k outputs, style in the others, Σ₁ = Σ₂ = diag(j^−decay), a random shift, u = 0.

    Args:
        key: of the shift. Its covariance is ∝ Σ^alignment, made Σ-orthogonal between outputs and scaled to the given
            variance of δᵀx in each, as the population limit assumes: δᵀΣδ = diag(signal).
        p: features, at least as many as outputs.
        content_rank: k ≥ 1 outputs of content.
        style_dimension: outputs of style.
        decay: of the spectrum.
        alignment: −1 puts the shift in the tail of the spectrum, 0 is isotropic, +1 puts it along the head.
        content_signal, style_signal: variance of δᵀx in each output of a kind.
        noise_std, style_noise_std: σ of the gold answers in each output of a kind, in units of y.

    >>> import jax
    >>> from sims.s3ft import content_and_style_problem
    >>> problem = content_and_style_problem(jax.random.key(0), 20, 2, 1, style_signal=4.0)
    >>> abs(problem.shift.T @ problem.finetune_covariance.apply(problem.shift.T).T).round(6)
    Array([[1., 0., 0.],
           [0., 1., 0.],
           [0., 0., 4.]], dtype=float64)
    """
    k, styles = count("content_rank", content_rank), count("style_dimension", style_dimension, minimum=0)
    if count("p", p) < k + styles:
        raise ValueError(f"p must be at least content_rank + style_dimension = {k + styles}, got {p}")
    spectrum = spectra.power_law(p, decay)
    latent = jax.random.normal(key, (k + styles, p), spectrum.dtype)  # a row per output: more outputs, the same first
    whitened, _ = jnp.linalg.qr((spectrum ** ((1 + alignment) / 2) * latent).T)
    is_content = jnp.arange(k + styles) < k
    signal = jnp.where(is_content, content_signal, style_signal).astype(spectrum.dtype)
    shift = whitened / jnp.sqrt(spectrum)[:, None] * jnp.sqrt(signal)
    return VectorProblem(spectrum, spectrum, shift, is_content, noise_std, style_noise_std)


def sample_targets(key: Array, X: Array, problem: VectorProblem, procedure: Procedure) -> Targets:
    """Targets (n, m) and their sources (n,) for one draw of label noise, own answers, judge and paraphrases.

    A paraphrase has the content of gold and the style of the own answer.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sims.s3ft import content_and_style_problem, sample_targets
    >>> from theory.s3ft import Procedure
    >>> problem = content_and_style_problem(jax.random.key(0), 20, 2, 1)
    >>> sample_targets(jax.random.key(1), jnp.eye(20)[:5], problem, Procedure(1.0)).source
    Array([0, 1, 1, 1, 1], dtype=int32)
    """
    answers_key, judge_key = jax.random.split(key)
    own, gold, paraphrase = _sample_answers(answers_key, X, problem, procedure)
    judge = content_within(problem.content, procedure.tolerance)
    return s3ft_targets(own, gold, noisy(judge_key, judge, procedure.false_accept, procedure.false_reject), paraphrase)


def _sample_answers(key: Array, X: Array, problem: VectorProblem, procedure: Procedure) -> tuple[Array, Array, Array]:
    """Own answers, gold and paraphrases (n, m); NaN where a paraphrase did not succeed."""
    noise_key, sampling_key, paraphrase_key = jax.random.split(key, 3)
    shape, P = (len(X), len(problem.content)), problem.content
    noise = jax.random.normal(noise_key, shape, X.dtype)
    gold = X @ problem.shift + problem.noise_std * noise @ P + problem.style_noise_std * (noise - noise @ P)
    sampled = jnp.asarray(procedure.sampling_std) * jax.random.normal(sampling_key, shape, X.dtype)
    own = X @ problem.pretrain_error + sampled
    succeeds = jax.random.uniform(paraphrase_key, shape[:1]) < jnp.asarray(procedure.paraphrase_success)
    return own, gold, jnp.where(succeeds[:, None], gold @ P + (own - own @ P), jnp.nan)


def own_probabilities(key: Array, problem: VectorProblem, n: int, procedure: Procedure) -> xr.Dataset:
    """The model's own log-probability of n gold, paraphrased and own answers, and of the targets S3FT chooses.

    As in Fig 2 of paper 2502.08130, in nats: −d²/2s² − (m/2)·log 2πs² at a distance d from the prediction. Variables
    `gold`, `paraphrase` (of every sample, by a paraphrase that always succeeds), `own` and `target` (sample,), `source`
    of the target; attributes: the `…_expected` means of the first three. `procedure` has numbers as fields, and needs
    sampling_std > 0.
    """
    s = positive("procedure.sampling_std", procedure.sampling_std, ndim=0)
    design_key, target_key = jax.random.split(key)
    X = sample_design(design_key, problem.finetune_covariance, count("n", n))
    predicted, certain = X @ problem.pretrain_error, procedure._replace(paraphrase_success=1.0)
    own, gold, paraphrase = _sample_answers(jax.random.split(target_key)[0], X, problem, certain)
    targets = sample_targets(target_key, X, problem, procedure)
    outputs = problem.content.shape[0]

    def log_probability(squared: Array) -> Array:
        return -squared / (2 * s**2) - outputs / 2 * jnp.log(2 * jnp.pi * s**2)

    answers = {"gold": gold, "paraphrase": paraphrase, "own": own, "target": targets.values}
    variables = {
        name: ("sample", np.asarray(log_probability(jnp.sum((answer - predicted) ** 2, axis=1))))
        for name, answer in answers.items()
    }
    expected = distances(problem, s)._asdict()
    attributes = {f"{name}_expected": float(log_probability(distance)) for name, distance in expected.items()}
    variables["source"] = ("sample", np.asarray(targets.source))
    return xr.Dataset(variables, attrs=attributes | {"n": n, "outputs": outputs, "sampling_std": float(s)})


VARIANTS = ("SFT", "S3FT", "S3FT without paraphrase")


def variant(name: str, procedure: Procedure) -> Procedure:
    """The procedure itself, without paraphrases, or supervised fine-tuning on gold.

    >>> from sims.s3ft import variant
    >>> from theory.s3ft import Procedure
    >>> variant("S3FT without paraphrase", Procedure(tolerance=1.0)).paraphrase_success
    0.0
    """
    if name not in VARIANTS:
        raise ValueError(f"name must be one of {', '.join(VARIANTS)}, got {name!r}")
    if name == "SFT":
        return SUPERVISED
    return procedure if name == "S3FT" else procedure._replace(paraphrase_success=0.0)


def settings_of(*procedures: Procedure) -> Procedure:
    """Every field as an array (settings,), the settings of one procedure after those of the other."""
    fields = [[jnp.atleast_1d(jnp.asarray(field, float)) for field in procedure] for procedure in procedures]
    flat = [Procedure(*jnp.broadcast_arrays(*procedure)) for procedure in fields]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *flat)


def _every_variant(procedure: Procedure) -> Procedure:
    """Fields (methods, settings) for `VARIANTS`."""
    procedures = [settings_of(variant(name, procedure)) for name in VARIANTS]
    return jax.tree.map(lambda *fields: jnp.stack(jnp.broadcast_arrays(*fields)), *procedures)


def measure_once(
    key: Array, X: Array, problem: VectorProblem, procedure: Procedure, filter: Filter
) -> dict[str, Array]:
    """Shares and risks (settings,) of one draw on a given design, the same for every setting of a procedure."""
    targets = jax.vmap(partial(sample_targets, key, X, problem))(procedure)
    settings, n, m = targets.values.shape
    columns = jnp.moveaxis(targets.values, 0, 1).reshape(n, settings * m)
    weights = fine_tune(X, columns, jnp.tile(problem.pretrain_error, (1, settings)), filter)
    theta = jnp.moveaxis(weights.reshape(-1, settings, m), 1, 0)

    def squared(error: Array, covariance: Covariance = problem.finetune_covariance) -> Array:
        return covariance.squared_norm(jnp.swapaxes(error, -1, -2)).sum(axis=-1)

    P, missed, moved = problem.content, theta - problem.shift, theta - problem.pretrain_error
    shares = {kind.name.lower(): jnp.mean(targets.source == kind, axis=1) for kind in Source}
    return shares | {
        "content_risk": squared(missed @ P),
        "style_risk": squared(missed - missed @ P),
        "content_drift": squared(moved @ P),
        "style_drift": squared(moved - moved @ P),
        "forgetting": squared(theta, problem.pretrain_covariance),
    }


def expected_on(stack: Array, problem: VectorProblem, procedure: Procedure, filter: Filter) -> xr.Dataset:
    """The exact expectation averaged over a stack of designs (designs, n, p), dimensions (procedure, setting).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from linfit import MinNorm, sample_designs
    >>> from sims.s3ft import content_and_style_problem, expected_on
    >>> from theory.s3ft import Procedure
    >>> problem = content_and_style_problem(jax.random.key(0), 20, 2, 1)
    >>> stack = sample_designs(jax.random.key(1), problem.finetune_covariance, 10, 2)
    >>> data = expected_on(stack, problem, Procedure(jnp.array([1.0, jnp.inf])), MinNorm())
    >>> data.own.sel(procedure="S3FT").values.round(2)
    array([0.19, 1.  ])
    """
    expected = _on_designs(stack, problem, _every_variant(procedure), filter)
    variables = {name: (("procedure", "setting"), values.mean(axis=0)) for name, values in expected.items()}
    return xr.Dataset(variables, {"procedure": list(VARIANTS), **_fields(procedure)})


def _on_designs(stack: Array, problem: VectorProblem, settings: Procedure, filter: Filter) -> dict[str, np.ndarray]:
    """Every quantity on every design, (designs, methods, settings)."""
    rows = [np.stack(conditional(X, problem, settings, filter)) for X in stack]
    return dict(zip(Expectation._fields, np.stack(rows, axis=1), strict=True))


def _fields(procedure: Procedure) -> dict[str, tuple[str, np.ndarray]]:
    return {name: ("setting", np.asarray(field)) for name, field in settings_of(procedure)._asdict().items()}


def monte_carlo(
    key: Array, stack: Array, problem: VectorProblem, procedure: Procedure, filter: Filter, *, replicates: int
) -> xr.Dataset:
    """SFT, S3FT and S3FT without paraphrase, measured on given designs beside the exact expectation on the same ones.

    Args:
        key: of the draws of noise, answers, judge and paraphrases.
        stack: designs (designs, n, p).
        problem: what to learn.
        procedure: how targets are made; its broadcast fields are the settings.
        filter: what fine-tunes.
        replicates: draws on each design.

    Dimensions (procedure, setting). For each field of `theory.s3ft.Expectation`: its mean over designs and draws;
    `…_error` the standard error given the designs; `…_exact` the expectation; `…_z` the gap in standard errors.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from linfit import MinNorm, sample_designs
    >>> from sims.s3ft import content_and_style_problem, monte_carlo
    >>> from theory.s3ft import Procedure
    >>> problem = content_and_style_problem(jax.random.key(0), 20, 2, 1)
    >>> stack = sample_designs(jax.random.key(1), problem.finetune_covariance, 10, 2)
    >>> procedure = Procedure(tolerance=jnp.array([0.5, 2.0]))
    >>> data = monte_carlo(jax.random.key(2), stack, problem, procedure, MinNorm(), replicates=50)
    >>> bool(abs(data.forgetting_z).max() < 4)
    True
    """
    settings = _every_variant(procedure)
    flat = jax.tree.map(jnp.ravel, settings)

    def every_design(replicate_key: Array) -> dict:
        def on_design(index: Array) -> dict[str, Array]:
            return measure_once(jax.random.fold_in(replicate_key, index), stack[index], problem, flat, filter)

        return jax.lax.map(on_design, jnp.arange(len(stack)))

    measured = replicate(every_design, key, replicates, "S3FT")
    exact = _on_designs(stack, problem, settings, filter)
    variables: dict[str, tuple] = {}
    for name, lines in exact.items():
        samples, paired = measured[name].reshape(-1, *lines.shape[1:]), np.tile(lines, (replicates, 1, 1))
        values = {
            name: samples.mean(axis=0),
            f"{name}_error": standard_error(samples - paired),
            f"{name}_exact": lines.mean(axis=0),
            f"{name}_z": standardised_gap(samples, paired),
        }
        variables |= {entry: (("procedure", "setting"), value) for entry, value in values.items()}
    attributes = {"n": stack.shape[1], "p": stack.shape[2], "designs": len(stack), "replicates": replicates}
    return xr.Dataset(variables, {"procedure": list(VARIANTS), **_fields(procedure)}, attributes)


def measured_coefficients(
    key: Array, problem: VectorProblem, n: int, procedure: Procedure, *, replicates: int
) -> xr.Dataset:
    """Least squares on n ≫ p samples as coefficients tr Δ̂ᵀΣ₂Δ / tr ΔᵀΣ₂Δ (setting,), with `…_error` over replicates.

    `content` and `style` (NaN if there is none) of S3FT; `rejection`, of content, on the accepted own answers alone.
    """
    content, style = problem.gaps
    settings = settings_of(procedure)

    def along(step: Array, gap: Array) -> Array:
        image = problem.finetune_covariance.apply(gap.T).T
        return jnp.sum(step * image) / jnp.sum(gap * image)

    def one(replicate_key: Array) -> dict:
        design_key, target_key = jax.random.split(replicate_key)
        X = sample_design(design_key, problem.finetune_covariance, n)

        def at(setting: Procedure) -> dict[str, Array]:
            targets = sample_targets(target_key, X, problem, setting)
            accepted = (targets.source == Source.OWN).astype(X.dtype)
            residual, start = targets.values - X @ problem.pretrain_error, jnp.zeros_like(problem.shift)
            step = fine_tune(X, residual, start, MinNorm())
            own = fine_tune(X, residual, start, MinNorm(), accepted)
            return {"content": along(step, content), "style": along(step, style), "rejection": along(own, content)}

        return jax.lax.map(at, settings)

    samples = replicate(one, key, replicates, "S3FT")
    attributes = {"n": n, "p": len(problem.shift), "replicates": replicates}
    return xr.Dataset(means_and_errors(samples, ("setting",)), _fields(procedure), attributes)


_STYLE_SCALE = 0.3
"""Standard deviation of a style output of the digits, that of a class indicator."""


def _digits_once(
    key: Array, noise_std: float, style_dimensions: tuple[int, ...], rates: tuple[float, float], **sizes: Any
) -> dict[str, np.ndarray]:
    """One split of the digits, every method: arrays (style dimensions, methods).

    The ten class indicators are content: an own answer is right if its largest output is the class; `rates` are those
    of false accepts and false rejects. The style outputs are linear functions of the features, others in fine-tuning
    than in pretraining: nuisance. Gaussian noise is added to all gold answers of fine-tuning. Min-norm; the ensemble
    averages SFT with the pretrained weights at τ = ½. Fewer style outputs are the first of the same ones.
    """
    split_key, style_key, noise_key, judge_key = jax.random.split(key, 4)
    split = digits_split(split_key, **sizes)
    (X_pre, classes_pre), (X, classes) = split.pretrain, split.finetune
    shape = (2, X.shape[1], max(style_dimensions))
    own_style, gold_style = _STYLE_SCALE * jax.random.normal(style_key, shape, X.dtype)
    gold = jnp.concatenate([classes, X @ gold_style], axis=1)
    gold = gold + noise_std * jax.random.normal(noise_key, gold.shape, X.dtype)
    theta_1 = ridge_from_zero(X_pre, classes_pre, X_pre @ own_style)

    def same_class(answers: Array, _: Array) -> Array:
        return answers[:, :CLASSES].argmax(1) == classes.argmax(1)

    own = X @ theta_1
    reworded = jnp.concatenate([gold[:, :CLASSES], own[:, CLASSES:]], axis=1)
    judge = noisy(judge_key, same_class, *rates)
    supervised = s3ft_targets(own, gold, jnp.zeros(len(X), bool))
    targets = [supervised, s3ft_targets(own, gold, judge, reworded), s3ft_targets(own, gold, judge)]
    tuned = [fine_tune(X, chosen.values, theta_1, MinNorm()) for chosen in targets]
    weights = [theta_1, *tuned, interpolate(theta_1, tuned[0], 0.5)]
    shares = [chosen.shares() for chosen in targets]
    unknown = dict.fromkeys(shares[0], np.nan)
    rows = [
        _on_test_images(split, theta, theta_1, own_style, np.array(style_dimensions)) | share
        for theta, share in zip(weights, [unknown, *shares, shares[0]])
    ]
    return {name: np.stack([np.broadcast_to(row[name], len(style_dimensions)) for row in rows], 1) for name in rows[0]}


def _on_test_images(split: Split, theta: Array, theta_1: Array, own_style: Array, styles: np.ndarray) -> dict:
    """Measurements with the first `styles` of the style outputs, (style dimensions,) or one for all."""
    (X, classes), (X_pre, classes_pre) = split.finetune_test, split.pretrain_test
    answers, general = np.asarray(X @ theta), np.asarray(X_pre @ theta)
    learned = np.concatenate([classes_pre, X_pre @ own_style], axis=1)

    def squared(error: np.ndarray) -> np.ndarray:
        """Of the first 0, 1, … outputs together, mean over images."""
        return np.concatenate([[0.0], np.cumsum(np.mean(error**2, axis=0))])

    def accuracy(outputs: np.ndarray, targets: Array) -> float:
        return (outputs[:, :CLASSES].argmax(1) == np.asarray(targets).argmax(1)).mean()

    return {
        "accuracy": accuracy(answers, classes),
        "content_risk": squared(answers[:, :CLASSES] - classes)[-1],
        "style_drift": squared((answers - np.asarray(X @ theta_1))[:, CLASSES:])[styles],
        "forgetting": squared(general - learned)[CLASSES + styles],
        "pretrain_accuracy": accuracy(general, classes_pre),
    }


def digits(
    key: Array,
    noise_std: float,
    style_dimensions: tuple[int, ...],
    splits: int,
    *,
    false_accept: float = 0.0,
    false_reject: float = 0.0,
    **sizes: Any,
) -> xr.Dataset:
    """S3FT on the digits with nuisance outputs, (style_dimension, procedure), with standard errors over splits.

    On held-out images with clean labels: `accuracy` and `content_risk` (squared error of the class indicators) on the
    turned digits, `style_drift` from the pretrained answers there, `forgetting` (squared error of all outputs) and
    `pretrain_accuracy` on the upright ones; the shares `own`, `paraphrase`, `gold` of the training targets.
    """
    level, rates = float(non_negative("noise_std", noise_std, ndim=0)), (false_accept, false_reject)
    measure = partial(_digits_once, noise_std=level, style_dimensions=style_dimensions, rates=rates, **sizes)
    variables = means_and_errors(over_splits(measure, key, splits), ("style_dimension", "procedure"))
    methods = ["pretrained", *VARIANTS, "SFT + ensemble"]
    attributes = {"splits": splits, "noise_std": level, "false_accept": false_accept, "false_reject": false_reject}
    coordinates = {"style_dimension": list(style_dimensions), "procedure": methods}
    return xr.Dataset(variables, coordinates, attributes | sizes)
