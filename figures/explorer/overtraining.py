"""The page of the overtraining paper: features one after another, the perturbed loss, fine-tuning checkpoints."""

from operator import itemgetter
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from figures.explorer.page import Line, Mark, Overlay, Page, Plot, Points, Reading, Slider
from figures.explorer.tables import Table, Tables, kernel, least
from figures.style import COLOURS
from theory.overtraining import fine_tuning, inflection_time, mode_inflection_times, perturbed_loss, singular_values

MODES = 6
TIMES = np.logspace(-0.5, 3, 106)
GAMMAS = np.logspace(-2.5, -0.3, 45)
STEPS = 100
PAPER = "Springer et al., ICML 2025, arXiv 2503.19206"


class Parameters(NamedTuple):
    """Of the page."""

    time: Annotated[float, Slider.own("pretraining time t", "gradient flow of ½‖W₁W₂ − A‖²; learning rate × steps", 0.3162, 1000.0,
        0.05, PAPER, scale="log", unit="1 / singular value of A")] = 31.62  # fmt: skip
    gamma: Annotated[float, Slider.own("perturbation γ", "standard deviation of Gaussian noise added to every weight", 0.003162, 0.5012,
        0.05, PAPER, scale="log", unit="units of a weight")] = 0.1  # fmt: skip
    rate: Annotated[float, Slider.own("fine-tuning learning rate", "step size of 100 steps of gradient descent on ½‖W₁W₂ − B‖²", 1e-4, 0.2512,
        0.05, PAPER, scale="log", unit="1 / singular value of A")] = 0.01  # fmt: skip
    penalty: Annotated[float, Slider.own("penalty μ", "(μ/2)‖θ − θ_pre‖² during fine-tuning", 0.0, 2.0,
        0.05, f"{PAPER} (regularized fine-tuning)", unit="units of the singular values")] = 0.5  # fmt: skip
    decay: Annotated[float, Slider.own("spectrum of the target", "A has singular values i^−decay, i = 1 … 6: how unequal the features are",
        0.0, 2.0, 0.05, "Ours.")] = 1.0  # fmt: skip
    stretch: Annotated[float, Slider.own("fine-tuning target B / A", "B has the features of A, this many times as strong", 0.2, 2.0,
        0.05, "Above 1 fine-tuning overshoots. Ours.")] = 1.5  # fmt: skip
    initial: Annotated[float, Slider.own("initial singular value", "balanced, aligned start W₁ = W₂ᵀ with these singular values s₀", 1e-6, 0.01,
        0.25, "Ours (docs, §7).", scale="log", unit="units of the singular values")] = 0.001  # fmt: skip
    size: Annotated[int, Slider.own("width m = h = k", "sides of both layers: more weights, more sensitivity to noise on each", 6, 64,
        2, "Ours.", scale="whole")] = 16  # fmt: skip


def _target(at: Parameters) -> Array:
    """Singular values of A, a_i = i^−decay, i = 1 … 6."""
    return jnp.arange(1.0, MODES + 1) ** -at.decay


def _modes(values: Array) -> Table:
    """Columns of (…, mode)."""
    return {f"mode_{i + 1}": values[:, i] for i in range(MODES)}


@kernel
def curves(at: Parameters) -> Tables:
    """Singular values, perturbed loss and losses after fine-tuning along pretraining, in closed form (docs, N1–N4).

    The slider comes first among times and among γ.
    """
    a, shape = _target(at), (at.size, at.size, at.size)
    times, gammas = jnp.append(at.time, TIMES), jnp.append(at.gamma, GAMMAS)
    turn = inflection_time(at.initial, a, gammas, shape)
    alone = mode_inflection_times(at.initial, a, gammas, shape)
    turns = {name: jnp.where(time > 0, time, np.nan) for name, time in {"all": turn, **_modes(alone)}.items()}
    turning = jnp.clip(turn[:1], TIMES[0], TIMES[-1])
    perturbed = perturbed_loss(at.initial, a, jnp.append(turning, times), at.gamma, shape)
    penalties = jnp.stack([at.penalty, 0.0])[:, None]
    losses = fine_tuning(at.initial, a, at.stretch * a, times, STEPS * at.rate, penalties, steps=STEPS)
    tuned, unpenalised = (losses.after.map(itemgetter(row)) for row in (0, 1))
    over_time = {
        "time": times,
        **_modes(singular_values(at.initial, a, times)),
        "loss": perturbed.loss[1:],
        "sensitivity": perturbed.sensitivity[1:],
        "perturbed": perturbed.total[1:],
        "pretrain_before": jnp.broadcast_to(losses.before.pretrain, losses.after.pretrain.shape)[0],
        "pretrain_after": tuned.pretrain,
        "finetune_after": tuned.finetune,
        "pretrain_after_unpenalised": unpenalised.pretrain,
        "finetune_after_unpenalised": unpenalised.finetune,
        "degradation": losses.degradation[0],
    }
    along_path = {name: values[1:] for name, values in over_time.items()}
    return {
        "time": along_path,
        "gamma": {"gamma": GAMMAS, **{name: values[1:] for name, values in turns.items()}},
        "now": {name: values[:1] for name, values in over_time.items()},
        "turn": {
            "time": turn[:1],
            "perturbed_time": turning,
            "perturbed": perturbed.total[:1],
            "gamma": gammas[:1],
            "shown": turns["all"][:1],
        },
        "least_after": least(along_path, "pretrain_after"),
    }


def replicate(index: int, at: Parameters) -> Table:
    """Perturbed loss of full matrices: 32 Gaussian samples on both layers, averaged, at every tenth time (seed 0)."""
    a, times = _target(at), TIMES[::10]
    target, layers = np.zeros((at.size, at.size)), np.zeros((times.size, at.size, at.size))
    diagonal = np.arange(MODES)
    target[diagonal, diagonal] = a
    layers[:, diagonal, diagonal] = np.sqrt(np.asarray(singular_values(at.initial, a, times)))
    key = jax.random.fold_in(jax.random.key(0), index)
    noise = at.gamma * np.asarray(jax.random.normal(key, (32, 2, at.size, at.size)))
    losses = [((layers + one) @ (layers + two) - target) ** 2 for one, two in noise]
    return {"time": times, "perturbed": np.sum(losses, axis=(2, 3)).mean(axis=0) / 2}


SHADES = ("#D55E00", "#E69F00", "#009E73", "#56B4E9", "#0072B2", "#CC79A7")
TOTAL, PRETRAINED, TUNED, VARIANCE = (COLOURS[name] for name in ("total", "pretrained", "fine-tuned", "variance"))

PAGE = Page(
    name="overtraining",
    title="Overtraining",
    source=f"Setting, incremental learning and progressive sensitivity: {PAPER}. Closed forms N2–N4 and inflection times: ours (docs, §7).",
    introduction=(
        "A two-layer linear network W₁W₂ learns the features of its target <b>one after another</b>. The more it has learned, "
        "the more a perturbation of its weights hurts: the perturbed loss falls, then <b>rises again</b> (triangle). Fine-tuning "
        "can do the same: more pretraining, then worse."
    ),
    parameters=Parameters,
    curves=curves,
    plots=(
        Plot("modes", "Features are learned one after another", "pretraining time t", "singular value of W₁W₂",
             Line.over("time", "time", *((f"mode_{i + 1}", f"feature {i + 1}", SHADES[i], ("solid", "dashed")[i % 2]) for i in range(MODES))),
             (Mark("now", "time", "mode_1", "t of the slider", SHADES[0]),), x_logarithmic=True),
        Plot("perturbed", "The loss under perturbation turns", "pretraining time t", "pretraining loss ½‖W − A‖²",
             Line.over("time", "time", ("perturbed", "perturbed by γ", TOTAL), ("loss", "not perturbed", PRETRAINED, "dotted"),
                   ("sensitivity", "sensitivity (difference)", VARIANCE, "dashed")),
             (Mark("now", "time", "perturbed", "t of the slider", TOTAL),
              Mark("turn", "perturbed_time", "perturbed", "inflection", TOTAL, "inverted_triangle")), x_logarithmic=True),
        Plot("finetuned", "After fine-tuning each checkpoint", "pretraining time t", "loss after fine-tuning",
             Line.over("time", "time", ("pretrain_after", "pretraining loss", TUNED), ("finetune_after", "fine-tuning loss", COLOURS["ridge"], "dashed"),
                   ("pretrain_after_unpenalised", "pretraining loss, μ = 0", VARIANCE, "dotdash"),
                   ("finetune_after_unpenalised", "fine-tuning loss, μ = 0", COLOURS["ridge + ensemble"], "dotted"),
                   ("pretrain_before", "pretraining loss before", "#777777", "dotted")),
             (Mark("now", "time", "pretrain_after", "t of the slider", TUNED),
              Mark("least_after", "time", "pretrain_after", "least", TUNED, "inverted_triangle")), x_logarithmic=True),
        Plot("inflection", "When more pretraining starts to hurt", "perturbation γ", "inflection time",
             Line.over("gamma", "gamma", ("all", "all features", PRETRAINED),
                   *((f"mode_{i + 1}", f"feature {i + 1} alone", SHADES[i], "dashed") for i in range(0, MODES, 2))),
             (Mark("turn", "gamma", "shown", "γ of the slider", PRETRAINED),), x_logarithmic=True, y_logarithmic=True),
    ),
    readings=(
        Reading("inflection time", "Pretraining time of least perturbed loss (docs, N3); finite as soon as γ > 0.", "turn", "time"),
        Reading("perturbed loss there", "Expected loss of the perturbed network.", "turn", "perturbed"),
        Reading("now", "Perturbed loss at the time of the slider.", "now", "perturbed"),
        Reading("fine-tuning costs", "Pretraining loss after fine-tuning minus before, at the time of the slider (docs, N4).", "now", "degradation"),
        Reading("best time to fine-tune from", "Of least pretraining loss after fine-tuning, on a grid of 106 times.", "least_after", "time"),
    ),
    suggestions={
        "Halve the noise: the turn comes later": {"gamma": 0.05},
        "A larger learning rate: fine-tuning overshoots": {"rate": 0.05, "penalty": 0.0},
        "A task that shrinks the features: no turn": {"stretch": 0.5},
    },
    overlay=Overlay("8 × 32 random perturbations", replicate, 8, ("time",),
                    (Points("perturbed", "time", "perturbed", "perturbed, measured", TOTAL),)),
)  # fmt: skip
