"""The page of the overtraining paper: features one after another, the perturbed loss, fine-tuning checkpoints."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Line, Mark, Overlay, Page, Plot, Reading, Simulated, Slider, Suggestion
from figures.style import COLOURS
from theory.overtraining import (
    FineTuning,
    PerturbedLoss,
    fine_tuning,
    inflection_time,
    mode_inflection_times,
    perturbed_loss,
    singular_values,
)

MODES = 6
TIMES = np.logspace(-0.5, 3, 106)
GAMMAS = np.logspace(-2.5, -0.3, 45)
STEPS = 100


def targets_of(decay: float, stretch: float) -> tuple[np.ndarray, np.ndarray]:
    """A has singular values a_i = i^−decay, i = 1 … 6; the fine-tuning target has `stretch` times these."""
    a = np.arange(1.0, MODES + 1) ** -decay
    return a, stretch * a


class Predicted(NamedTuple):
    """What theory says along pretraining."""

    turn: Array
    """When more pretraining starts to hurt, at each γ."""
    own: Array
    """The same of each mode alone, (γ, mode)."""
    perturbed: PerturbedLoss
    """At the turn, then at each time."""
    modes: Array
    """Singular values (time, mode)."""
    tuned: FineTuning
    """With the penalty and without, (2, time)."""


@jax.jit
def predict(
    initial: Array, a: Array, b: Array, times: Array, gammas: Array, rate: Array, penalty: Array, size: int
) -> Predicted:
    """Inflections, perturbed loss at the first γ, singular values and fine-tuning (docs, N1–N4), in one kernel."""
    shape = (size, size, size)
    turn = inflection_time(initial, a, gammas, shape)
    turning = jnp.clip(turn[:1], TIMES[0], TIMES[-1])
    penalties = jnp.stack([penalty, 0.0])[:, None]
    return Predicted(
        turn,
        mode_inflection_times(initial, a, gammas, shape),
        perturbed_loss(initial, a, jnp.concatenate([turning, times]), gammas[0], shape),
        singular_values(initial, a, times),
        fine_tuning(initial, a, b, times, STEPS * rate, penalties, steps=STEPS),
    )


def curves(
    *, time: float, gamma: float, rate: float, penalty: float, decay: float, stretch: float, initial: float, size: int
) -> dict[str, dict[str, np.ndarray]]:
    """Singular values, perturbed loss and losses after fine-tuning along pretraining, in closed form (docs, N1–N4)."""
    a, b = targets_of(decay, stretch)
    times = np.concatenate([[time], TIMES])
    gammas = np.concatenate([[gamma], GAMMAS])
    turn, own, both, modes, (before, after) = jax.device_get(predict(initial, a, b, times, gammas, rate, penalty, size))
    turning = np.clip(turn[:1], TIMES[0], TIMES[-1])
    loss, perturbed, at_turn = both.loss[1:], both.total[1:], both.total[:1]
    tuned, plain = (jax.tree.map(lambda losses, i=i: losses[i], after) for i in (0, 1))
    worst = int(np.argmin(tuned.pretrain[1:]))
    return {
        "time": {
            "time": TIMES,
            **{f"mode_{i + 1}": modes[1:, i] for i in range(MODES)},
            "loss": loss[1:],
            "sensitivity": both.sensitivity[2:],
            "perturbed": perturbed[1:],
            "pretrain_before": before.pretrain[0, 1:],
            "pretrain_after": tuned.pretrain[1:],
            "finetune_after": tuned.finetune[1:],
            "pretrain_after_unpenalised": plain.pretrain[1:],
            "finetune_after_unpenalised": plain.finetune[1:],
        },
        "gamma": {
            "gamma": GAMMAS,
            "all": np.where(turn[1:] > 0, turn[1:], np.nan),
            **{f"mode_{i + 1}": np.where(own[1:, i] > 0, own[1:, i], np.nan) for i in range(MODES)},
        },
        "now": {
            "time": times[:1],
            **{f"mode_{i + 1}": modes[:1, i] for i in range(MODES)},
            "loss": loss[:1],
            "perturbed": perturbed[:1],
            "pretrain_after": tuned.pretrain[:1],
            "finetune_after": tuned.finetune[:1],
            "gamma": gammas[:1],
        },
        "turn": {
            "time": turn[:1],
            "perturbed_time": turning,
            "perturbed": at_turn,
            "gamma": gammas[:1],
            "shown": np.where(turn[:1] > 0, turn[:1], np.nan),
            "least_after_time": TIMES[[worst]],
            "least_after": tuned.pretrain[1:][[worst]],
            "degradation": tuned.pretrain[:1] - before.pretrain[0, :1],
        },
    }


def draws(
    index: int,
    *,
    time: float,
    gamma: float,
    rate: float,
    penalty: float,
    decay: float,
    stretch: float,
    initial: float,
    size: int,
) -> dict[str, np.ndarray]:
    """Perturbed loss of full matrices: 32 Gaussian draws on both layers, averaged, at every tenth time (seed 0)."""
    a, _ = targets_of(decay, stretch)
    times = TIMES[::10]
    target, layers = np.zeros((size, size)), np.zeros((times.size, size, size))
    diagonal = np.arange(MODES)
    target[diagonal, diagonal] = a
    layers[:, diagonal, diagonal] = np.sqrt(np.asarray(singular_values(initial, a, times)))
    key = jax.random.fold_in(jax.random.key(0), index)
    noise = gamma * np.asarray(jax.random.normal(key, (32, 2, size, size)))
    losses = [((layers + one) @ (layers + two) - target) ** 2 for one, two in noise]
    return {"time": times, "perturbed": np.sum(losses, axis=(2, 3)).mean(axis=0) / 2}


PAPER = "Springer et al., ICML 2025, arXiv 2503.19206"
SHADES = ("#D55E00", "#E69F00", "#009E73", "#56B4E9", "#0072B2", "#CC79A7")

PAGE = Page(
    name="overtraining",
    title="Overtraining",
    source=f"Setting, incremental learning and progressive sensitivity: {PAPER}. Closed forms N2–N4 and inflection times: ours (docs, §7).",
    introduction=(
        "A two-layer linear network W₁W₂ learns the features of its target <b>one after another</b>. The more it has learned, "
        "the more a perturbation of its weights hurts: the perturbed loss falls, then <b>rises again</b> (triangle). Fine-tuning "
        "can do the same: more pretraining, then worse."
    ),
    controls=(
        Slider("time", "pretraining time t", f"Gradient flow of ½‖W₁W₂ − A‖²; learning rate × steps. In units of 1/(singular value of A). {PAPER}.",
               -0.5, 3, 0.05, 31.62, True),
        Slider("gamma", "perturbation γ", f"Standard deviation of Gaussian noise added to every weight, in units of a weight. {PAPER}.",
               -2.5, -0.3, 0.05, 0.1, True),
        Slider("rate", "fine-tuning learning rate", f"Step size of 100 steps of gradient descent on ½‖W₁W₂ − B‖². {PAPER}.",
               -4, -0.6, 0.05, 0.01, True),
        Slider("penalty", "penalty μ", f"(μ/2)‖θ − θ_pre‖² during fine-tuning, in units of the singular values. {PAPER} (regularized fine-tuning).",
               0, 2, 0.05, 0.5),
        Slider("decay", "spectrum of the target", "A has singular values i^−decay, i = 1 … 6: how unequal the features are. No unit. Ours.",
               0, 2, 0.05, 1.0),
        Slider("stretch", "fine-tuning target B / A", "B has the features of A, this many times as strong. Above 1 fine-tuning overshoots. No unit. Ours.",
               0.2, 2, 0.05, 1.5),
        Slider("initial", "initial singular value", "Balanced, aligned start W₁ = W₂ᵀ with these singular values s₀. Ours (docs, §7).",
               -6, -2, 0.25, 0.001, True),
        Slider("size", "width m = h = k", "Sides of both layers: more weights, more sensitivity to noise on each. Ours.", 6, 64, 2, 16),
    ),
    curves=curves,
    plots=(
        Plot("modes", "Features are learned one after another", "pretraining time t", "singular value of W₁W₂",
             lines=tuple(Line("time", "time", f"mode_{i + 1}", f"feature {i + 1}", SHADES[i], ("solid", "dashed")[i % 2]) for i in range(MODES)),
             marks=(Mark("now", "time", "mode_1", "t of the slider", SHADES[0]),), x_logarithmic=True),
        Plot("perturbed", "The loss under perturbation turns", "pretraining time t", "pretraining loss ½‖W − A‖²",
             lines=(Line("time", "time", "perturbed", "perturbed by γ", COLOURS["total"]),
                    Line("time", "time", "loss", "not perturbed", COLOURS["pretrained"], "dotted"),
                    Line("time", "time", "sensitivity", "sensitivity (difference)", COLOURS["variance"], "dashed")),
             marks=(Mark("now", "time", "perturbed", "t of the slider", COLOURS["total"]),
                    Mark("turn", "perturbed_time", "perturbed", "inflection", COLOURS["total"], "inverted_triangle")), x_logarithmic=True),
        Plot("finetuned", "After fine-tuning each checkpoint", "pretraining time t", "loss after fine-tuning",
             lines=(Line("time", "time", "pretrain_after", "pretraining loss", COLOURS["fine-tuned"]),
                    Line("time", "time", "finetune_after", "fine-tuning loss", COLOURS["ridge"], "dashed"),
                    Line("time", "time", "pretrain_after_unpenalised", "pretraining loss, μ = 0", COLOURS["variance"], "dotdash"),
                    Line("time", "time", "finetune_after_unpenalised", "fine-tuning loss, μ = 0", COLOURS["ridge + ensemble"], "dotted"),
                    Line("time", "time", "pretrain_before", "pretraining loss before", "#777777", "dotted")),
             marks=(Mark("now", "time", "pretrain_after", "t of the slider", COLOURS["fine-tuned"]),
                    Mark("turn", "least_after_time", "least_after", "least", COLOURS["fine-tuned"], "inverted_triangle")), x_logarithmic=True),
        Plot("inflection", "When more pretraining starts to hurt", "perturbation γ", "inflection time",
             lines=(Line("gamma", "gamma", "all", "all features", COLOURS["pretrained"]),
                    *(Line("gamma", "gamma", f"mode_{i + 1}", f"feature {i + 1} alone", SHADES[i], "dashed") for i in range(0, MODES, 2))),
             marks=(Mark("turn", "gamma", "shown", "γ of the slider", COLOURS["pretrained"]),), x_logarithmic=True, y_logarithmic=True),
    ),
    readings=(
        Reading("inflection time", "Pretraining time of least perturbed loss (docs, N3); finite as soon as γ > 0.", "turn", "time"),
        Reading("perturbed loss there", "Expected loss of the perturbed network.", "turn", "perturbed"),
        Reading("now", "Perturbed loss at the time of the slider.", "now", "perturbed"),
        Reading("fine-tuning costs", "Pretraining loss after fine-tuning minus before, at the time of the slider (docs, N4).", "turn", "degradation"),
        Reading("best time to fine-tune from", "Of least pretraining loss after fine-tuning, on a grid of 106 times.", "turn", "least_after_time"),
    ),
    suggestions=(
        Suggestion("Halve the noise: the turn comes later", {"gamma": 0.05}),
        Suggestion("A larger learning rate: fine-tuning overshoots", {"rate": 0.05, "penalty": 0.0}),
        Suggestion("A task that shrinks the features: no turn", {"stretch": 0.5}),
    ),
    overlay=Overlay("8 × 32 random perturbations", draws, 8, ("time",),
                    (Simulated("perturbed", "time", "perturbed", "perturbed, measured", COLOURS["total"]),)),
)  # fmt: skip
