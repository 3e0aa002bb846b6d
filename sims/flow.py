"""FLOW measured on finite samples: weights from the pretrained losses, weighted fine-tuning, both risks (docs, §4).

The weights e^{−r²/T} depend on the labels, so the label noise is not averaged by a formula here, as it is where the
weights are fixed (docs, S2). Every replicate draws design, shift and noise; given that draw its risks are exact, as
quadratic forms in the filter from one eigendecomposition of W^{1/2}KW^{1/2} (docs, F5); means over replicates carry
standard errors. A sample's loss is r², r = y − Xθ₁, without ½.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import xarray as xr
from jax import Array

from linfit import (
    Filter,
    GradientFlow,
    MinNorm,
    Pair,
    Ridge,
    RiskForm,
    TwoTaskProblem,
    fine_tune,
    flow_weights,
    sample_task,
)
from linfit import gradient_descent as descend
from linfit.covariance import Covariance
from linfit.design import Task
from linfit.internal.checks import count, non_negative
from linfit.internal.linear_algebra import eigh, gram
from linfit.weighting import effective_sample_size, effective_step, median_temperature, robust_weights
from sims.estimate import mean_and_error, progress, replicate
from sims.real_data import CLASSES, digits_split, leave_one_out_penalty

Weighting = Callable[[Array], Array]
"""Sample weights (n,) from the pretrained losses (n,)."""

WEIGHTINGS: dict[str, Weighting] = {"vanilla": jnp.ones_like, "FLOW": flow_weights}
"""Unweighted fine-tuning, and FLOW at the median temperature."""

RISKS = ("finetune", "pretrain", "hardest")

HARDEST = 0.1
"""Share of the test points that counts as hardest, as in Table 5 of paper 2502.02797."""


def tilted(tilt: float) -> Weighting:
    """Weights e^{−tilt·ℓ/median}: 1 is FLOW, 0 unweighted, larger a lower temperature; negative favours hard samples.

    Negative tilts, the distributionally robust baseline, have mean one; the others are as they are, at most 1.

    >>> losses = jnp.array([1.0, 2.0, 3.0])
    >>> tilted(2.0)(losses).round(3), tilted(-1.0)(losses).round(3)
    (Array([0.368, 0.135, 0.05 ], dtype=float64), Array([0.559, 0.922, 1.519], dtype=float64))
    """
    if not np.isfinite(tilt):
        raise ValueError(f"tilt must be finite, got {tilt}")
    if tilt < 0:
        return lambda losses: robust_weights(losses, median_temperature(losses) / -tilt)
    if tilt == 0:
        return jnp.ones_like
    return lambda losses: flow_weights(losses, median_temperature(losses) / tilt)


# ------------------------------------------------------------------------------------------------- one draw of labels


def gaussian_noise(key: Array, noise: Array, z: Array) -> Array:
    """ε ~ N(0, σ²), independent."""
    return noise


def outliers(key: Array, noise: Array, z: Array) -> Array:
    """A tenth of the labels has nine tenths of the variance: ε scaled by 3 there and by 1/3 elsewhere."""
    return noise * jnp.where(jax.random.bernoulli(key, 0.1, noise.shape), 3.0, 1 / 3)


def misfit(key: Array, noise: Array, z: Array) -> Array:
    """No noise but what a linear model cannot fit: ∝ z² − 1, z = Δᵀx standardised; uncorrelated with Gaussian x."""
    return (z**2 - 1) / 2**0.5


DEVIATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "gaussian": gaussian_noise,
    "outliers": outliers,
    "misfit": misfit,
}
"""What keeps y from being xᵀθ₂*: always of mean 0 and variance σ²; from a key, standard normals ε/σ (n,) and z (n,)."""


def draw(key: Array, problem: TwoTaskProblem, n: int, law: str = "gaussian", deviation: str = "gaussian") -> Task:
    """A task whose labels deviate from Xθ₂* in one of the ways of `DEVIATIONS`.

    >>> from linfit import aligned_problem, spectra
    >>> problem = aligned_problem(spectra.power_law(5), noise_std=4.0**0.5)
    >>> tasks = [draw(jax.random.key(0), problem, 100_000, deviation=name) for name in DEVIATIONS]
    >>> [round(float(jnp.std(task.y - task.X @ task.theta_2_star)), 1) for task in tasks]
    [2.0, 2.0, 2.0]
    """
    if deviation not in DEVIATIONS:
        raise ValueError(f"deviation must be one of {', '.join(DEVIATIONS)}, got {deviation!r}")
    task_key, deviation_key = jax.random.split(key)
    task = sample_task(task_key, problem, n, law)
    clean, gap = task.X @ task.theta_2_star, task.theta_2_star - task.theta_1
    std = jnp.where(problem.noise_std > 0, problem.noise_std, 1)
    z = task.X @ gap / jnp.sqrt(gap @ problem.finetune_covariance.apply(gap))
    return task._replace(y=clean + problem.noise_std * DEVIATIONS[deviation](deviation_key, (task.y - clean) / std, z))


# With rows W^{1/2}X and residual W^{1/2}r, weighted least squares is ordinary least squares, and the decomposition
# W^{1/2}KW^{1/2} = U diag(s) Uᵀ (n > p: XᵀWX/n = V diag(s) Vᵀ) makes the fine-tuned weights linear in the filter,
#     θ̂ = θ₁ + D g,   D = (1/n) XᵀW^{1/2}U diag(UᵀW^{1/2}r)   or   V diag(VᵀXᵀWr)/n,
# and so ‖θ̂ − θ*‖²_Σ = ‖a + Dg‖²_Σ with a = θ₁ − θ*: c = aᵀΣa, b = −DᵀΣa, H = DᵀΣD.
def drawn_forms(task: Task, problem: TwoTaskProblem, sample_weights: Array) -> Pair:
    """Both risks of every filter fitted to this one draw of labels, as quadratic forms (ours).

    The label noise is part of the draw: it is in the "bias" of the forms, and their variance is 0.

    >>> from linfit import aligned_problem, spectra
    >>> problem = aligned_problem(spectra.power_law(40), noise_std=0.5**0.5)
    >>> task = draw(jax.random.key(0), problem, 15)
    >>> form = drawn_forms(task, problem, jnp.linspace(0.1, 1, 15)).finetune
    >>> theta = fine_tune(task.X, task.y, task.theta_1, Ridge(0.3), jnp.linspace(0.1, 1, 15))
    >>> error = theta - task.theta_2_star
    >>> bool(jnp.isclose(form(Ridge(0.3)).total, error @ problem.finetune_covariance.apply(error), rtol=1e-12))
    True
    """
    n, p = task.X.shape
    root = jnp.sqrt(sample_weights)
    rows, residual = root[:, None] * task.X, root * (task.y - task.X @ task.theta_1)
    if n <= p:
        eigenvalues, vectors = eigh(gram(rows) / n)
        directions = rows.T @ vectors * (vectors.T @ residual / n)
    else:
        eigenvalues, vectors = eigh(gram(rows.T) / n)
        directions = vectors * (vectors.T @ (rows.T @ residual) / n)
    eigenvalues = jnp.maximum(eigenvalues, 0)

    def form(covariance: Covariance, start: Array) -> RiskForm:
        weighed = covariance.apply(start)
        noiseless = jnp.zeros_like(eigenvalues)
        curvature = covariance.gram(directions.T)
        return RiskForm(eigenvalues, start @ weighed, -weighed @ directions, curvature, noiseless, jnp.zeros(()))

    return Pair(
        form(problem.finetune_covariance, task.theta_1 - task.theta_2_star),
        form(problem.pretrain_covariance, task.theta_1),
    )


# On a Gaussian test point the pretrained residual r = xᵀΔ + ε and the error xᵀh, h = θ₂* − θ̂, are jointly Gaussian,
# with E r² = v = c + σ² and E r xᵀh = ΔᵀΣh = c − b·g. Given r, xᵀh has mean r(c − b·g)/v and the same variance as
# ever, so
#     E[(xᵀh)² | r² in a range] = R(g) + (m − 1)(c − b·g)²/v,   m = E[r²/v | r²/v in that range].
def form_given_loss(form: RiskForm, noise_std: Array, low: float, high: float) -> RiskForm:
    """R_ft on Gaussian test points whose pretrained loss lies between two quantiles, as a form of one draw (ours).

    `low` and `high` in [0, 1]; 0.9 and 1 are the hardest tenth. Labels of the test points carry the same noise when
    they are ranked, the error is measured without it.

    >>> from linfit import aligned_problem, spectra
    >>> problem = aligned_problem(spectra.power_law(40), noise_std=0.5**0.5)
    >>> form = drawn_forms(draw(jax.random.key(0), problem, 15), problem, jnp.ones(15)).finetune
    >>> parts = [form_given_loss(form, problem.noise_std, *edges)(Ridge(0.3)).total for edges in ((0, 0.7), (0.7, 1))]
    >>> bool(jnp.isclose(0.7 * parts[0] + 0.3 * parts[1], form(Ridge(0.3)).total))
    True
    """
    excess = (conditional_square(low, high) - 1) / (form.constant + noise_std**2)
    return RiskForm(
        form.eigenvalues,
        form.constant + excess * form.constant**2,
        form.linear + excess * form.constant * form.linear,
        form.bias_quadratic + excess * jnp.outer(form.linear, form.linear),
        form.noise_gain,
        form.noise_std,
    )


def conditional_square(low: float, high: float) -> float:
    """E[z² | z² between its quantiles low and high], z standard normal.

    >>> round(conditional_square(0.9, 1.0), 3), round(conditional_square(0.0, 1.0), 3)
    (4.393, 1.0)
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low and high must be quantiles with 0 ≤ low < high ≤ 1, got {low} and {high}")
    # E z²1{z² ≤ q} = P(χ²₃ ≤ q)
    edges = scipy.stats.chi2.ppf([low, high], 1)
    return float(np.diff(scipy.stats.chi2.cdf(edges, 3))[0] / (high - low))


# -------------------------------------------------------------------------------------------------------- Monte Carlo


def measure_once(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    weightings: dict[str, Weighting],
    filter: Filter,
    law: str,
    deviations: tuple[str, ...],
) -> dict[str, Array]:
    """One draw with each deviation, fine-tuned with every weighting: (deviation, weighting, risk, filter)."""
    tasks = [draw(key, problem, n, law, deviation) for deviation in deviations]

    def with_labels(y: Array) -> dict[str, Array]:
        task = tasks[0]._replace(y=y)
        losses = (y - task.X @ task.theta_1) ** 2

        def with_weights(weights: Array) -> dict[str, Array]:
            finetune, pretrain = drawn_forms(task, problem, weights)
            hardest = form_given_loss(finetune, problem.noise_std, 1 - HARDEST, 1.0)
            forms = (finetune, pretrain, hardest)
            along = [form.along(filter) for form in forms]
            return {
                "constant": jnp.stack([form.constant for form in forms]),
                "slope": jnp.stack([parabola.slope for parabola in along]),
                "curvature": jnp.stack([parabola.curvature for parabola in along]),
                "step": effective_step(weights),
                "share": effective_sample_size(weights) / n,
            }

        return jax.lax.map(with_weights, jnp.stack([weighting(losses) for weighting in weightings.values()]))

    return jax.lax.map(with_labels, jnp.stack([task.y for task in tasks]))


def monte_carlo(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    weightings: dict[str, Weighting],
    filter: Filter,
    names: np.ndarray,
    replicates: int,
    law: str = "gaussian",
    deviations: tuple[str, ...] = ("gaussian",),
) -> xr.Dataset:
    """Risks of weighted fine-tuning over random designs, shifts and noise, for every weighting and filter.

    Along the ensemble every risk of a replicate is the parabola constant − 2τ·slope + τ²·curvature; these are stored
    one by one, dimensions (replicate, deviation, weighting, risk, filter), for `along_tau`. `filter` holds one
    hyperparameter axis, with coordinate values `names`. Risks are "finetune", "pretrain" and "hardest", R_ft on the
    tenth of the test points with the largest pretrained loss (for Gaussian test points and noise). All weightings see
    the same draws, all deviations the same designs and shifts. `step`, the factor on the step size, and `share`, the
    effective share (Σw)²/nΣw² of the samples, are (replicate, deviation, weighting).

    >>> from linfit import aligned_problem, spectra
    >>> times = np.array([1.0, 10.0])
    >>> problem = aligned_problem(spectra.power_law(30))
    >>> data = monte_carlo(jax.random.key(0), problem, 10, WEIGHTINGS, GradientFlow(times), times, 20)
    >>> mean, error = estimate(along_tau(data.sel(deviation="gaussian", risk="pretrain"), 0.5))
    >>> mean.dims, bool((error > 0).all())
    (('weighting', 'filter'), True)
    """
    count("replicates", replicates, minimum=2)
    samples = replicate(
        lambda key: measure_once(key, problem, n, weightings, filter, law, deviations), key, replicates, "FLOW"
    )
    dims = ("replicate", "deviation", "weighting", "risk", "filter")
    variables = {name: (dims[: values.ndim], values) for name, values in samples.items()}
    coordinates = {
        "deviation": list(deviations),
        "weighting": list(weightings),
        "risk": list(RISKS),
        "filter": np.asarray(names),
    }
    attributes = {"n": n, "p": problem.p, "noise_std": float(problem.noise_std), "law": law, "replicates": replicates}
    return xr.Dataset(variables, coordinates, attributes)


def drawn_shifts(key: Array, problem: TwoTaskProblem, replicates: int) -> np.ndarray:
    """The shifts θ₂* − θ₁* (replicates, p) that `monte_carlo` draws from the same key, whatever its n."""
    return np.asarray(replicate(lambda key: draw(key, problem, 1).theta_2_star, key, replicates, "shifts"))


def along_tau(data: xr.Dataset, tau: xr.DataArray | float = 1.0) -> xr.DataArray:
    """Risk of θ_τ in every replicate."""
    return data.constant - 2 * tau * data.slope + tau**2 * data.curvature


def best_tau(data: xr.Dataset) -> xr.DataArray:
    """The τ of least mean risk: one for all replicates."""
    return data.slope.mean("replicate") / data.curvature.mean("replicate")


def estimate(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Mean over replicates and its standard error; give it a difference to get that of a paired comparison."""
    return values.mean("replicate"), values.std("replicate", ddof=1) / values.sizes["replicate"] ** 0.5


# ------------------------------------------------------------------------- large samples, beside population formulas


def sampled_iterates(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    temperatures: np.ndarray,
    step_sizes: np.ndarray,
    steps: int,
    replicates: int,
    law: str = "gaussian",
) -> np.ndarray:
    """θ_k along weighted gradient descent on n samples, iterated: (replicates, runs, steps + 1, p).

    `temperatures` and `step_sizes` (runs,), T = ∞ for no weights. Weights e^{−r²/T} as they are; step size on
    (1/2n) Σ w r², twice the η of paper 2502.02797, whose loss has no ½. All runs of a replicate see the same samples.
    """

    def paths(key: Array) -> Array:
        task = sample_task(key, problem, n, law)
        losses = (task.y - task.X @ task.theta_1) ** 2

        def run(setting: tuple[Array, Array]) -> Array:
            temperature, step_size = setting
            weights = flow_weights(losses, temperature)

            def step(theta: Array, _: None) -> tuple[Array, Array]:
                theta = descend(task.X, task.y, theta, step_size=step_size, steps=1, sample_weights=weights)
                return theta, theta

            _, path = jax.lax.scan(step, task.theta_1, None, length=steps)
            return jnp.concatenate([task.theta_1[None], path])

        return jax.lax.map(run, (jnp.asarray(temperatures), jnp.asarray(step_sizes)))

    return np.asarray(replicate(paths, key, replicates, "iterates"))


def sampled_moments(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    temperatures: np.ndarray,
    replicates: int,
    law: str = "gaussian",
) -> tuple[np.ndarray, np.ndarray]:
    """Σ_w = E w xxᵀ and E w x r by sampling: (replicates, temperatures, p, p) and (replicates, temperatures, p)."""

    def moments(key: Array) -> tuple[Array, Array]:
        task = sample_task(key, problem, n, law)
        residual = task.y - task.X @ task.theta_1

        def at(temperature: Array) -> tuple[Array, Array]:
            weighted = flow_weights(residual**2, temperature)[:, None] * task.X
            return weighted.T @ task.X / n, weighted.T @ residual / n

        return jax.lax.map(at, jnp.asarray(temperatures))

    covariance, moment = replicate(moments, key, replicates, "moments")
    return np.asarray(covariance), np.asarray(moment)


def sampled_rates(
    key: Array, spreads: np.ndarray, noise_std: float, temperatures: np.ndarray, n: int, replicates: int
) -> np.ndarray:
    """How much slower the gap is learned than other directions if features have heavier tails (docs, F3).

    (replicates, spreads, temperatures). Features √S z, z Gaussian and log S ~ N(−spread²/2, spread²) as in
    `theory.flow.lognormal_sizes`; in whitened coordinates, the gap along the first, of length 1.
    """
    n = count("n", n)

    def rates(key: Array) -> Array:
        size_key, feature_key, noise_key = jax.random.split(key, 3)
        size, z = jax.random.normal(size_key, (n,)), jax.random.normal(feature_key, (2, n))
        noise = noise_std * jax.random.normal(noise_key, (n,))

        def of(setting: tuple[Array, Array]) -> Array:
            spread, temperature = setting
            along, across = z * jnp.exp((spread * size - spread**2 / 2) / 2)
            weights = flow_weights((along + noise) ** 2, temperature)
            return weights @ along**2 / (weights @ across**2)

        grid = jnp.meshgrid(jnp.asarray(spreads), jnp.asarray(temperatures), indexing="ij")
        return jax.lax.map(of, tuple(axis.ravel() for axis in grid)).reshape(grid[0].shape)

    return np.asarray(replicate(rates, key, replicates, "rates"))


def fixed_points(
    key: Array,
    problem: TwoTaskProblem,
    n: int,
    noise_stds: np.ndarray,
    temperatures: np.ndarray,
    replicates: int,
    law: str = "gaussian",
    deviations: tuple[str, ...] = ("gaussian",),
) -> tuple[np.ndarray, np.ndarray]:
    """Where FLOW converges with n ≫ p: the coefficient along the gap Δ and the rest, (replicates, deviations, runs).

    `noise_stds` (in place of the problem's) and `temperatures` are (runs,). With the Σ₂ inner product, θ̂ − θ₁ =
    coefficient·Δ + rest; the rest is given as ‖rest‖²/‖Δ‖². Under Gaussian noise the coefficient is 1/(1 + 2σ²/T) and
    the rest 0, up to sampling (docs, F4).
    """
    covariance = problem.finetune_covariance

    def landed(key: Array) -> tuple[Array, Array]:
        def run(setting: tuple[Array, Array]) -> tuple[Array, Array]:
            noise_std, temperature = setting
            noisy = eqx.tree_at(lambda problem: problem.noise_std, problem, noise_std)
            coefficients, rests = [], []
            for deviation in deviations:
                task = draw(key, noisy, n, law, deviation)
                weights = flow_weights((task.y - task.X @ task.theta_1) ** 2, temperature)
                step = fine_tune(task.X, task.y, task.theta_1, MinNorm(), weights) - task.theta_1
                gap = task.theta_2_star - task.theta_1
                weighed = covariance.apply(gap)
                coefficient = step @ weighed / (gap @ weighed)
                rest = step - coefficient * gap
                coefficients.append(coefficient)
                rests.append(rest @ covariance.apply(rest) / (gap @ weighed))
            return jnp.stack(coefficients), jnp.stack(rests)

        return jax.lax.map(run, (jnp.asarray(noise_stds), jnp.asarray(temperatures)))

    coefficient, rest = replicate(landed, key, replicates, "fixed points")
    return np.swapaxes(coefficient, 1, 2), np.swapaxes(rest, 1, 2)


# ---------------------------------------------------------------------------------------------------------- real data


def wrong_labels(key: Array, targets: Array, share: float) -> Array:
    """One-hot targets (n, 10) of which round(share·n), at random, name one of the nine other classes."""
    chosen_key, class_key = jax.random.split(key)
    n, classes = targets.shape
    turned = jax.random.randint(class_key, (n,), 1, classes)
    wrong = jnp.eye(classes, dtype=targets.dtype)[(targets.argmax(axis=1) + turned) % classes]
    chosen = jax.random.permutation(chosen_key, n) < round(share * n)
    return jnp.where(chosen[:, None], wrong, targets)


def measure_digits(key: Array, times: np.ndarray, shares: np.ndarray, **sizes: Any) -> dict[str, np.ndarray]:
    """One split: test errors along training of each weighting, arrays (share, weighting, time)."""
    split_key, label_key = jax.random.split(key)
    split = digits_split(split_key, **sizes)
    X_pre, y_pre = split.pretrain
    penalty = leave_one_out_penalty(X_pre, y_pre)
    theta_1 = fine_tune(X_pre, y_pre, jnp.zeros((X_pre.shape[1], CLASSES)), Ridge(penalty))
    X, targets = split.finetune
    test, classes = split.finetune_test, np.asarray(split.finetune_test[1]).argmax(axis=-1)
    ranks = squared_errors(test, theta_1)
    hardest = ranks >= np.quantile(ranks, 1 - HARDEST)
    rows = []
    for share in shares:
        y = wrong_labels(label_key, targets, float(share))
        losses = squared_errors((X, y), theta_1)
        for weighting in WEIGHTINGS.values():
            theta = fine_tune(X, y, theta_1, GradientFlow(times), weighting(jnp.asarray(losses)))
            right = outputs(test, theta).argmax(axis=-1) == classes
            rows.append(
                {
                    "finetune": squared_errors(test, theta).mean(axis=-1),
                    "pretrain": squared_errors(split.pretrain_test, theta).mean(axis=-1),
                    "accuracy": right.mean(axis=-1),
                    "hardest_accuracy": right[:, hardest].mean(axis=-1),
                }
            )
    shape = (len(shares), len(WEIGHTINGS), len(times))
    return {name: np.stack([row[name] for row in rows]).reshape(shape) for name in rows[0]}


def outputs(data: tuple[Array, Array], theta: Array) -> np.ndarray:
    """φ(x)ᵀθ (…, images, 10) for θ (…, p, 10)."""
    return np.asarray(data[0]) @ np.asarray(theta)


def squared_errors(data: tuple[Array, Array], theta: Array) -> np.ndarray:
    """Squared error of each image, summed over classes: (…, images)."""
    return np.sum((outputs(data, theta) - np.asarray(data[1])) ** 2, axis=-1)


def digits_along_training(key: Array, times: np.ndarray, shares: np.ndarray, splits: int, **sizes: Any) -> xr.Dataset:
    """FLOW against unweighted fine-tuning along training on the digits, over random splits, features and wrong labels.

    Dimensions (share, weighting, time): `share` of the fine-tuning labels that name a wrong class, gradient flow to
    time t. With standard errors over splits: `finetune` and `pretrain`, squared test errors summed over classes,
    `accuracy` on the fine-tuning test images, and `hardest_accuracy` on the tenth of them with the largest pretrained
    loss. Test labels are right. Further arguments are those of `digits_split`.
    """
    shares = np.asarray(non_negative("shares", shares, ndim=1))
    if shares.max() > 1:
        raise ValueError(f"shares must be at most 1, got {shares.max()}")
    runs = [
        measure_digits(jax.random.fold_in(key, i), times, shares, **sizes)
        for i in progress(range(count("splits", splits, minimum=2)), "digits")
    ]
    variables: dict[str, xr.Variable] = {}
    for name in runs[0]:
        variables |= mean_and_error(np.stack([run[name] for run in runs]), ("share", "weighting", "time"), name)
    coordinates = {"share": shares, "weighting": list(WEIGHTINGS), "time": times}
    return xr.Dataset(variables, coordinates, {"splits": splits, "data": "scikit-learn digits", **sizes})
