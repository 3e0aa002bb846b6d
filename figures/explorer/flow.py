"""The page of the FLOW paper: trajectories in the plane of Theorem 7.2, the stalled direction, the trade-off."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from figures.explorer.page import Line, Mark, Overlay, Page, Plot, Points, Reading, Slider
from figures.explorer.tables import Table, Tables, kernel
from figures.style import COLOURS
from linfit import FixedShift, GradientDescent, TwoTaskProblem, excess_risks, gradient_descent, sample_task
from linfit.weighting import flow_weights
from sims.parameters import NOISE, N
from theory import flow
from theory.frontier import pareto, population_risks

STEPS = np.arange(61)
BETAS = np.logspace(-2, 0, 49)
TAUS = np.linspace(0, 1, 101)
WEIGHTS = np.logspace(-3, 3, 61)
PAPER = "Sanyal et al., ICML 2025, arXiv 2502.02797"


class Parameters(NamedTuple):
    """Of the page."""

    rho: Annotated[float, Slider.own("correlation ρ", "fine-tuning covariance I + ρ(ēē⊥ᵀ + ē⊥ēᵀ), ē the direction from θ₂* to θ₁*",
        0.0, 0.85, 0.01, f"{PAPER}, Theorem 7.2")] = 0.76  # fmt: skip
    beta: Annotated[float, Slider.own("β (temperature)", "sets the temperature, T = 2β(1−ρ²)‖e‖²/(1−β²ρ²)", 0.01, 1.0, 0.05,
        f"Small β trusts only easy samples, see T below. {PAPER}, Theorem 7.2", scale="log")] = 0.7943  # fmt: skip
    steps: Annotated[int, Slider.own("steps K", "steps of population gradient descent from θ₁*", 0, 60, 1,
        f"At the theorem's step size η = 1/(2μ) (½ without weights). {PAPER}", scale="whole")] = 1  # fmt: skip
    curvature: Annotated[float, Slider.own("pretraining curvature s", "how much pretraining minds a move along ē, ēᵀΣ₁ē", 1.0, 5.0, 0.1,
        f"Σ₁ is the identity otherwise. {PAPER} (Σ ⪰ I)")] = 2.7  # fmt: skip
    noise_std: Annotated[float, Slider("label noise σ", NOISE, 0.02, "‖e‖ = 1 here. The theorem has none; with noise FLOW ends at the average 1/(1+2σ²/T). Ours (docs, F4).")] = 0.0  # fmt: skip
    n: Annotated[int, Slider("samples n (overlay only)", N.within(200, 5000), 100,
        "Of each finite-sample run of the overlay; the curves have unlimited data.")] = 1000  # fmt: skip


def _problem(at: Parameters) -> TwoTaskProblem:
    """Theorem 7.2: axes ē and ē⊥, Σ₂ = [[1, ρ], [ρ, 1]], Σ₁ = diag(curvature, 1), θ₂* − θ₁* = −ē; noise added."""
    pretrain, finetune = [[at.curvature, 0.0], [0.0, 1.0]], [[1.0, at.rho], [at.rho, 1.0]]
    return TwoTaskProblem(pretrain, finetune, FixedShift([-1.0, 0.0]), at.noise_std)


@kernel
def curves(at: Parameters) -> Tables:
    """Population gradient descent with and without weights (docs, F3, F6), averages and the frontier (E2).

    θ = θ₂* + x·e + y·‖e‖ē⊥, ‖e‖ = 1.
    """
    problem = _problem(at)
    temperature, temperatures = (flow.temperature_from_beta(value, at.rho) for value in (at.beta, BETAS))
    variance = 1 + at.noise_std**2
    # The paper's step η = 1/(2μ), for the loss without ½, is 1/μ here; without weights η = ½ is 1.
    step, over_steps = (1 / flow.mean_weight(variance, value) for value in (temperature, temperatures))
    over_beta = flow.trajectory(problem, GradientDescent(over_steps, at.steps), temperatures)
    paths = {
        "flow": flow.trajectory(problem, GradientDescent(step, STEPS), temperature),
        "unweighted": flow.trajectory(problem, GradientDescent(1.0, STEPS), np.inf),
    }
    along_path: Table = {"steps": STEPS.astype(float)}
    for name, path in paths.items():
        along_path |= {f"{name}_x": 1 + path.moved[:, 0], f"{name}_y": path.moved[:, 1], f"{name}_total": path.total}
        along_path |= {f"{name}_finetune": path.finetune, f"{name}_pretrain": path.pretrain}
    averaged, frontier = population_risks(problem, TAUS), pareto(problem, WEIGHTS)
    best_averaging = jnp.min(averaged.finetune + averaged.pretrain)
    stalled = flow.stalled_direction(at.rho, at.beta)[:, None] * np.array([-0.1, 1.1])
    end = flow.fixed_point_coefficient(at.noise_std, temperature)
    rate = flow.stall(problem.finetune_covariance, [-1.0, 0.0], at.noise_std, temperature).rate
    now: Table = {name: jnp.take(values, at.steps) for name, values in along_path.items()} | {
        "beta": at.beta,
        "temperature": temperature,
        "mean_weight": flow.mean_weight(variance, temperature),
        "slower": 1 / rate,
        "end_tau": end,
        "end_x": 1 - end,
        "start_x": 1.0,
        "zero": 0.0,
        "best_averaging": best_averaging,
    }
    return {
        "steps": along_path,
        "averaging": {"tau": TAUS, "x": 1 - TAUS, "y": 0 * TAUS, **averaged._asdict()},
        "frontier": frontier._asdict(),
        "stalled": {"x": stalled[0], "y": stalled[1]},
        "beta": {
            "beta": BETAS,
            "temperature": temperatures,
            "total": over_beta.total,
            "pretrain": over_beta.pretrain,
            "finetune": over_beta.finetune,
            "best_averaging": jnp.full(BETAS.size, best_averaging),
            "lower_bound": jnp.full(BETAS.size, sum(pareto(problem, 1.0))),
        },
        "now": {name: jnp.reshape(value, 1) for name, value in now.items()},
    }


def replicate(index: int, at: Parameters) -> Table:
    """The same on n samples (seed 0): weights e^{−r²/T} of the pretrained residuals, gradient descent, both errors."""
    problem = _problem(at)
    task = sample_task(jax.random.fold_in(jax.random.key(0), index), problem, at.n)
    temperature = flow.temperature_from_beta(at.beta, at.rho)
    weights = flow_weights((task.y - task.X @ task.theta_1) ** 2, temperature)
    step_size = 1 / flow.mean_weight(1 + at.noise_std**2, temperature)
    counts = np.array([0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
    options = {"step_size": step_size, "sample_weights": weights}
    thetas = [gradient_descent(task.X, task.y, task.theta_1, steps=int(count), **options) for count in counts]
    finetune, pretrain = excess_risks(jnp.stack(thetas), problem, jnp.zeros(2), task.theta_2_star).map(np.asarray)
    return {"steps": counts.astype(float), "finetune": finetune, "pretrain": pretrain, "total": finetune + pretrain}


UNWEIGHTED, FLOW, AVERAGE, FRONTIER = COLOURS["fine-tuned"], COLOURS["ridge"], COLOURS["ensemble"], COLOURS["oracle"]

PAGE = Page(
    name="flow",
    title="FLOW",
    source=f"Method and Theorem 7.2 (no noise): {PAPER}. With noise, the end point and the frontier: ours (docs, F2–F6, E2).",
    introduction=(
        "FLOW weights each fine-tuning sample by <b>e<sup>−ℓ/T</sup></b>, ℓ the pretrained model's loss on it. Learning then "
        "<b>stalls</b> in one direction and goes on in the others: the path bends away from the straight line of averaging, and "
        "for ρ &gt; 0 can end below the best average of both errors."
    ),
    parameters=Parameters,
    curves=curves,
    plots=(
        Plot("plane", "Trajectories: θ = θ₂* + x·e + y·‖e‖ē⊥", "x", "y",
             (Line("steps", "flow_x", "flow_y", "FLOW", FLOW), Line("steps", "unweighted_x", "unweighted_y", "unweighted", UNWEIGHTED, "dashed"),
              Line("averaging", "x", "y", "averaging", AVERAGE, "dotdash"), Line("stalled", "x", "y", "stalled direction", "#777777", "dotted")),
             (Mark("now", "start_x", "zero", "pretrained θ₁*", COLOURS["pretrained"], "square"), Mark("now", "zero", "zero", "task optimum θ₂*", UNWEIGHTED, "square"),
              Mark("now", "flow_x", "flow_y", "FLOW after K", FLOW), Mark("now", "end_x", "zero", "FLOW's end", FLOW, "star"))),
        Plot("errors", "Errors along training", "steps K", "error in units of ‖e‖²",
             Line.over("steps", "steps", ("flow_total", "FLOW, sum", FLOW), ("flow_pretrain", "FLOW, pretraining", FLOW, "dashed"),
                       ("flow_finetune", "FLOW, fine-tuning", FLOW, "dotted"), ("unweighted_total", "unweighted, sum", UNWEIGHTED)),
             (Mark("now", "steps", "flow_total", "K of the slider", FLOW),)),
        Plot("trade", "Trade-off: forgetting and learning", "pretraining error", "fine-tuning error",
             (Line("steps", "flow_pretrain", "flow_finetune", "FLOW, along K", FLOW), Line("steps", "unweighted_pretrain", "unweighted_finetune", "unweighted, along K", UNWEIGHTED, "dashed"),
              Line("averaging", "pretrain", "finetune", "averaging, along τ", AVERAGE, "dotdash"), Line("frontier", "pretrain", "finetune", "Pareto frontier", FRONTIER, "dotted")),
             (Mark("now", "flow_pretrain", "flow_finetune", "FLOW after K", FLOW),)),
        Plot("beta", "Sum of both errors after K steps, along β", "β", "sum of errors",
             Line.over("beta", "beta", ("total", "FLOW after K", FLOW), ("best_averaging", "best averaging", AVERAGE, "dotdash"),
                       ("lower_bound", "lower bound (frontier)", FRONTIER, "dotted")),
             (Mark("now", "beta", "flow_total", "β of the slider", FLOW),), x_logarithmic=True),
    ),
    readings=(
        Reading("temperature T", "In units of ‖e‖².", "now", "temperature"),
        Reading("mean weight", "E w = μ without noise; by this much weights also shrink the step (docs, F2).", "now", "mean_weight"),
        Reading("stalled: slower by", "Factor along the whitened shift, relative to all other directions (docs, F3).", "now", "slower"),
        Reading("FLOW after K", "Sum of both errors.", "now", "flow_total"),
        Reading("unweighted after K", "Sum of both errors.", "now", "unweighted_total"),
        Reading("best averaging", "Least sum of errors on the segment, s/(s+1); on 101 points.", "now", "best_averaging"),
        Reading("FLOW's end: τ", "With noise FLOW ends at the average with this coefficient (docs, F4).", "now", "end_tau"),
    ),
    suggestions={
        "No correlation: FLOW is averaging": {"rho": 0.0},
        "Many steps at a low temperature: it crawls along the stalled direction": {"beta": 0.1, "steps": 30},
        "Label noise: FLOW ends before the task optimum": {"noise_std": 0.7, "steps": 60, "beta": 0.7943},
    },
    overlay=Overlay("12 runs on n samples", replicate, 12, ("steps",),
                    (Points("errors", "steps", "total", "FLOW on samples, sum", FLOW), Points("errors", "steps", "pretrain", "FLOW on samples, pretraining", FLOW))),
)  # fmt: skip
