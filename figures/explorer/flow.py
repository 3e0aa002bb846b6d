"""The page of the FLOW paper: trajectories in the plane of Theorem 7.2, the stalled direction, the trade-off."""

from typing import Any

import jax
import numpy as np
from jax import Array

from figures.explorer.page import Line, Mark, Overlay, Page, Plot, Reading, Simulated, Slider, Suggestion
from figures.style import COLOURS
from linfit import FixedShift, GradientDescent, TwoTaskProblem, flow_weights, gradient_descent, sample_task
from theory.flow import (
    fixed_point_coefficient,
    mean_weight,
    stall,
    stalled_direction,
    temperature_from_beta,
    trajectory,
)
from theory.frontier import pareto, population_risks

STEPS = np.arange(61)
BETAS = np.logspace(-2, 0, 49)
TAUS = np.linspace(0, 1, 101)
WEIGHTS = np.logspace(-3, 3, 61)


def problem_of(rho: Array | float, curvature: Array | float, noise_variance: Array | float) -> TwoTaskProblem:
    """Theorem 7.2: axes ē and ē⊥, Σ₂ = [[1, ρ], [ρ, 1]], Σ₁ = diag(curvature, 1), θ₂* − θ₁* = −ē; noise added."""
    return TwoTaskProblem(
        [[curvature, 0.0], [0.0, 1.0]], [[1.0, rho], [rho, 1.0]], FixedShift([-1.0, 0.0]), noise_variance**0.5
    )


@jax.jit
def predict(rho: Array, beta: Array, steps: Array, curvature: Array, noise_variance: Array) -> dict[str, Any]:
    """Population gradient descent with and without weights (docs, F3, F6), averages and frontier, in one kernel."""
    problem = problem_of(rho, curvature, noise_variance)
    temperature, temperatures = (temperature_from_beta(value, rho) for value in (beta, BETAS))
    variance, noise_std = 1 + noise_variance, noise_variance**0.5
    # The paper's step η = 1/(2μ), for the loss without ½, is 1/μ here; without weights η = ½ is 1.
    step, over_steps = (1 / mean_weight(variance, value) for value in (temperature, temperatures))
    return {
        "flow": trajectory(problem, GradientDescent(step, STEPS), temperature),
        "vanilla": trajectory(problem, GradientDescent(1.0, STEPS), np.inf),
        "over_beta": trajectory(problem, GradientDescent(over_steps, steps), temperatures),
        "temperature": temperature,
        "temperatures": temperatures,
        "mean_weight": mean_weight(variance, temperature),
        "end": fixed_point_coefficient(noise_std, temperature),
        "averaged": population_risks(problem, TAUS),
        "frontier": pareto(problem, WEIGHTS),
        "floor": pareto(problem, 1.0),
        "stalled": stalled_direction(rho, beta),
        "rate": stall([[1.0, rho], [rho, 1.0]], [-1.0, 0.0], noise_std, temperature).rate,
    }


def curves(
    *, rho: float, beta: float, steps: int, curvature: float, noise_variance: float, n: int
) -> dict[str, dict[str, np.ndarray]]:
    """What `predict` gives, as tables; θ = θ₂* + x·e + y·‖e‖ē⊥, ‖e‖ = 1."""
    theory = jax.device_get(predict(rho, beta, steps, curvature, noise_variance))
    paths: dict[str, np.ndarray] = {}
    for name in ("flow", "vanilla"):
        path = theory[name]
        paths |= {f"{name}_x": 1 + path.moved[:, 0], f"{name}_y": path.moved[:, 1], f"{name}_total": path.total}
        paths |= {f"{name}_finetune": path.finetune, f"{name}_pretrain": path.pretrain}
    averaged, frontier, over_beta, stalled = (theory[name] for name in ("averaged", "frontier", "over_beta", "stalled"))
    total = averaged.finetune + averaged.pretrain
    return {
        "steps": {"steps": STEPS.astype(float), **paths},
        "averaging": {
            "tau": TAUS,
            "x": 1 - TAUS,
            "y": 0 * TAUS,
            "finetune": averaged.finetune,
            "pretrain": averaged.pretrain,
        },
        "frontier": {"finetune": frontier.finetune, "pretrain": frontier.pretrain},
        "stalled": {"x": stalled[0] * np.array([-0.1, 1.1]), "y": stalled[1] * np.array([-0.1, 1.1])},
        "beta": {
            "beta": BETAS,
            "temperature": theory["temperatures"],
            "total": over_beta.total,
            "pretrain": over_beta.pretrain,
            "finetune": over_beta.finetune,
            "best_averaging": np.full(BETAS.size, total.min()),
            "floor": np.full(BETAS.size, theory["floor"].finetune + theory["floor"].pretrain),
        },
        "now": {
            **{name: values[[steps]] for name, values in paths.items()},
            "steps": np.array([float(steps)]),
            "beta": np.array([beta]),
            "temperature": theory["temperature"][None],
            "mean_weight": theory["mean_weight"][None],
            "slower": 1 / theory["rate"][None],
            "end_tau": theory["end"][None],
            "end_x": 1 - theory["end"][None],
            "start_x": np.array([1.0]),
            "zero": np.array([0.0]),
            "best_averaging": total.min()[None],
        },
    }


def sample(
    index: int, *, rho: float, beta: float, steps: int, curvature: float, noise_variance: float, n: int
) -> dict[str, np.ndarray]:
    """The same on n samples (seed 0): weights e^{−r²/T} of the pretrained residuals, gradient descent, both errors."""
    problem = problem_of(rho, curvature, noise_variance)
    task = sample_task(jax.random.fold_in(jax.random.key(0), index), problem, n)
    temperature = temperature_from_beta(beta, rho)
    weights = flow_weights((task.y - task.X @ task.theta_1) ** 2, temperature)
    step_size = 1 / mean_weight(1 + noise_variance, temperature)
    counts = np.array([0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
    errors = []
    for count in counts:
        theta = gradient_descent(
            task.X, task.y, task.theta_1, step_size=step_size, steps=int(count), sample_weights=weights
        )
        pairs = ((problem.finetune_covariance, theta - task.theta_2_star), (problem.pretrain_covariance, theta))
        errors.append([float(covariance.apply(error) @ error) for covariance, error in pairs])
    finetune, pretrain = np.transpose(errors)
    return {"steps": counts.astype(float), "finetune": finetune, "pretrain": pretrain, "total": finetune + pretrain}


PAPER = "Sanyal et al., ICML 2025, arXiv 2502.02797"
VANILLA, FLOW, AVERAGE, FLOOR = COLOURS["fine-tuned"], COLOURS["ridge"], COLOURS["ensemble"], COLOURS["oracle"]

PAGE = Page(
    name="flow",
    title="FLOW",
    source=f"Method and Theorem 7.2 (no noise): {PAPER}. With noise, the end point and the frontier: ours (docs, F2–F6, E2).",
    introduction=(
        "FLOW weights each fine-tuning sample by <b>e<sup>−ℓ/T</sup></b>, ℓ the pretrained model's loss on it. Learning then "
        "<b>stalls</b> in one direction and goes on in the others: the path bends away from the straight line of averaging, and "
        "for ρ &gt; 0 can end below the best average of both errors."
    ),
    controls=(
        Slider("rho", "correlation ρ", f"Fine-tuning covariance I + ρ(ēē⊥ᵀ + ē⊥ēᵀ), ē the direction from θ₂* to θ₁*. No unit. {PAPER}, Theorem 7.2.",
               0, 0.85, 0.01, 0.76),
        Slider("beta", "β (temperature)", f"Sets the temperature, T = 2β(1−ρ²)‖e‖²/(1−β²ρ²): small β trusts only easy samples, see T below. No unit. {PAPER}, Theorem 7.2.",
               -2, 0, 0.05, 0.7943, True),
        Slider("steps", "steps K", f"Steps of population gradient descent from θ₁*, at the theorem's step size η = 1/(2μ) (½ without weights). {PAPER}.",
               0, 60, 1, 1),
        Slider("curvature", "pretraining curvature s", f"ēᵀΣ₁ē: how much pretraining minds a move along ē; Σ₁ is the identity otherwise. {PAPER} (Σ ⪰ I).",
               1, 5, 0.1, 2.7),
        Slider("noise_variance", "label noise σ²", "Variance of label noise in units of ‖e‖². The theorem has none; with noise FLOW ends at the average 1/(1+2σ²/T). Ours (docs, F4).",
               0, 2, 0.05, 0.0),
        Slider("n", "samples n (overlay only)", "Samples of each finite-sample run of the overlay; the curves have unlimited data.", 200, 5000, 100, 1000),
    ),
    curves=curves,
    plots=(
        Plot("plane", "Trajectories: θ = θ₂* + x·e + y·‖e‖ē⊥", "x", "y",
             lines=(Line("steps", "flow_x", "flow_y", "FLOW", FLOW), Line("steps", "vanilla_x", "vanilla_y", "no weights", VANILLA, "dashed"),
                    Line("averaging", "x", "y", "averaging", AVERAGE, "dotdash"), Line("stalled", "x", "y", "stalled direction", "#777777", "dotted")),
             marks=(Mark("now", "start_x", "zero", "pretrained θ₁*", COLOURS["pretrained"], "square"),
                    Mark("now", "zero", "zero", "task optimum θ₂*", VANILLA, "square"),
                    Mark("now", "flow_x", "flow_y", "FLOW after K", FLOW), Mark("now", "end_x", "zero", "FLOW's end", FLOW, "star"))),
        Plot("errors", "Errors along training", "steps K", "error in units of ‖e‖²",
             lines=(Line("steps", "steps", "flow_total", "FLOW, sum", FLOW), Line("steps", "steps", "flow_pretrain", "FLOW, pretraining", FLOW, "dashed"),
                    Line("steps", "steps", "flow_finetune", "FLOW, fine-tuning", FLOW, "dotted"), Line("steps", "steps", "vanilla_total", "no weights, sum", VANILLA)),
             marks=(Mark("now", "steps", "flow_total", "K of the slider", FLOW),)),
        Plot("trade", "Trade-off: forgetting and learning", "pretraining error", "fine-tuning error",
             lines=(Line("steps", "flow_pretrain", "flow_finetune", "FLOW, along K", FLOW), Line("steps", "vanilla_pretrain", "vanilla_finetune", "no weights, along K", VANILLA, "dashed"),
                    Line("averaging", "pretrain", "finetune", "averaging, along τ", AVERAGE, "dotdash"), Line("frontier", "pretrain", "finetune", "Pareto frontier", FLOOR, "dotted")),
             marks=(Mark("now", "flow_pretrain", "flow_finetune", "FLOW after K", FLOW),)),
        Plot("beta", "Sum of both errors after K steps, along β", "β", "sum of errors",
             lines=(Line("beta", "beta", "total", "FLOW after K", FLOW), Line("beta", "beta", "best_averaging", "best averaging", AVERAGE, "dotdash"),
                    Line("beta", "beta", "floor", "floor (frontier)", FLOOR, "dotted")),
             marks=(Mark("now", "beta", "flow_total", "β of the slider", FLOW),), x_logarithmic=True),
    ),
    readings=(
        Reading("temperature T", "In units of ‖e‖².", "now", "temperature"),
        Reading("mean weight", "E w = μ without noise; by this much weights also shrink the step (docs, F2).", "now", "mean_weight"),
        Reading("stalled: slower by", "Factor along the whitened shift, relative to all other directions (docs, F3).", "now", "slower"),
        Reading("FLOW after K", "Sum of both errors.", "now", "flow_total"),
        Reading("no weights after K", "Sum of both errors.", "now", "vanilla_total"),
        Reading("best averaging", "Least sum of errors on the segment, s/(s+1); on 101 points.", "now", "best_averaging"),
        Reading("FLOW's end: τ", "With noise FLOW ends at the average with this coefficient (docs, F4).", "now", "end_tau"),
    ),
    suggestions=(
        Suggestion("No correlation: FLOW is averaging", {"rho": 0.0}),
        Suggestion("Many steps at a low temperature: it crawls along the stalled direction", {"beta": 0.1, "steps": 30}),
        Suggestion("Label noise: FLOW ends before the task optimum", {"noise_variance": 0.5, "steps": 60, "beta": 0.7943}),
    ),
    overlay=Overlay("12 runs on n samples", sample, 12, ("steps",),
                    (Simulated("errors", "steps", "total", "FLOW on samples, sum", FLOW), Simulated("errors", "steps", "pretrain", "FLOW on samples, pretraining", FLOW))),
)  # fmt: skip
