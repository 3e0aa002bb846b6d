"""Fine-tuning a language model, and training its linearisation: the same batches, the same optimiser, one loop.

The two differ in one line: the gradient is taken of the model at θ, or of the linear model f(θ₁) + J(θ₁)(θ − θ₁).
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from linfit.bridge.linearised import LanguageNetwork, Values, difference, make_batch
from linfit.internal.checks import count, non_negative, positive
from linfit.internal.files import whole_file

Encoded = Sequence[tuple[list[int], list[int]]]
"""(ids, labels) of every record."""
Progress = Callable[[int, int], None] | None

OPTIMIZERS, SCHEDULES = ("adamw", "sgd"), ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is fine-tuned: everything that a run depends on beside the model and the data.

    >>> from linfit.bridge.training import TrainingPlan
    >>> TrainingPlan(rate=1e-4, epochs=4, batch=4).steps(40)
    40
    """

    rate: float = 1e-4  #: Largest learning rate.
    epochs: int = 1  #: Passes over the data, each in another order.
    batch: int = 4  #: Records a step; the loss of a step is the mean over its target tokens.
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = "constant"  #: The last two fall to zero at the end.
    warmup: int = 0  #: Steps over which the rate rises to its full value.
    weight_decay: float = 0.0
    momentum: float = 0.0  #: Of SGD.
    max_grad_norm: float | None = None  #: Gradients are scaled down to this norm.
    seed: int = 0  #: Of the order of the records, and of LoRA's A.
    moving: tuple[str, ...] = ()  #: Shell patterns of the parameters that move; all by default.
    lora: int | None = None  #: Rank of LoRA factors, which then are all that moves.
    lora_scale: float = 2.0  #: α/R of LoRA.

    def __post_init__(self) -> None:
        positive("rate", self.rate, ndim=0)
        for name in ("epochs", "batch"):
            count(name, getattr(self, name))
        for name in ("warmup", "seed"):
            count(name, getattr(self, name), minimum=0)
        for name in ("weight_decay", "momentum"):
            non_negative(name, getattr(self, name), ndim=0)
        positive("lora_scale", self.lora_scale, ndim=0)
        if self.max_grad_norm is not None:
            positive("max_grad_norm", self.max_grad_norm, ndim=0)
        if self.lora is not None:
            count("lora", self.lora)
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def steps(self, records: int) -> int:
        """Steps of a run on so many records."""
        return self.epochs * math.ceil(records / self.batch)

    def rows(self, step: int, records: int) -> np.ndarray:
        """Records of one step: every epoch takes all of them in an order of its own."""
        epoch, position = divmod(step, math.ceil(records / self.batch))
        order = np.random.default_rng([self.seed, epoch]).permutation(records)
        return order[position * self.batch : (position + 1) * self.batch]

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of one step of so many."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        left = 1 - (step - self.warmup) / max(steps - self.warmup, 1)
        shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return self.rate * shapes[self.schedule]

    def network(self, model: Any, memory: int = 2**28) -> LanguageNetwork:
        """A model as a function of the weights that this plan moves."""
        lora: dict[str, Any] = {"lora": self.lora, "lora_scale": self.lora_scale, "seed": self.seed}
        return LanguageNetwork(model, moving=self.moving, memory=memory, **lora)


class Trained(NamedTuple):
    """Where a run ended."""

    values: Values  # of what moves
    losses: list[float]  # of every step, before it
    resumed: int  # steps that a run before this one had done


def train(
    network: LanguageNetwork,
    data: Encoded,
    plan: TrainingPlan,
    *,
    linear: bool,
    state: Path | None = None,
    seconds: float = 120.0,
    progress: Progress = None,
) -> Trained:
    """Run a plan, on the model or on its linearisation at θ₁.

    Args:
        network: the model.
        data: (ids, labels) of every record.
        plan: the run.
        linear: train f(θ₁) + J(θ₁)(θ − θ₁) in place of f(θ).
        state: file that keeps weights and optimiser; a run of the same model, data and plan goes on from it, with the
            same bits. It is left behind, at the last step.
        seconds: between two writings of it.
        progress: told (step, steps).
    """
    import torch

    values = {name: torch.nn.Parameter(value.clone()) for name, value in network.start.items()}
    optimizer, steps = _optimizer(values, plan), plan.steps(len(data))
    identity = _fingerprint(network, data, plan, linear) if state is not None else ""
    losses = _restore(state, identity, values, optimizer)
    resumed, saved = len(losses), time.monotonic()
    device = next(iter(values.values())).device
    for step in range(resumed, steps):
        batch = make_batch([data[row] for row in plan.rows(step, len(data))], device)
        if linear:
            total, gradient = network.gradient(batch, network.start, difference(values, network.start))
        else:
            total, gradient = network.gradient(batch, values)
        losses.append(total / batch.tokens)
        if not math.isfinite(losses[-1]):
            raise ValueError(f"rate must be small enough: the training loss was {losses[-1]} at step {step + 1}")
        for name, value in values.items():
            value.grad = gradient[name] / batch.tokens
        if plan.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(values.values()), plan.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step, steps)
        optimizer.step()
        if state is not None and (step + 1 == steps or time.monotonic() - saved >= seconds):
            _save(state, identity, values, optimizer, losses)
            saved = time.monotonic()
        if progress is not None:
            progress(step + 1, steps)
    return Trained({name: value.detach() for name, value in values.items()}, losses, resumed)


def _optimizer(values: Values, plan: TrainingPlan) -> Any:
    import torch

    if plan.optimizer == "sgd":
        options = {"momentum": plan.momentum, "weight_decay": plan.weight_decay}
        return torch.optim.SGD(values.values(), lr=plan.rate, **options)
    return torch.optim.AdamW(values.values(), lr=plan.rate, weight_decay=plan.weight_decay)


def _fingerprint(network: LanguageNetwork, data: Encoded, *settings: Any) -> str:
    """Of everything that determines a run: all weights, all tokens, what moves, and further settings."""
    digest = blake2b(digest_size=16)
    for name, value in {**network.parameters, **network.start}.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {value.device.type}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(dtype=_bytes()).numpy())
    plain = [asdict(each) if isinstance(each, TrainingPlan) else each for each in settings]
    digest.update(json.dumps([list(map(list, data)), plain], default=str).encode())
    return digest.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8


def _save(state: Path, identity: str, values: Values, optimizer: Any, losses: Sequence[float]) -> None:
    """Weights and the optimiser's tensors, as safetensors: whole or absent."""
    from safetensors.torch import save_file

    tensors = {f"value {name}": value.detach() for name, value in values.items()}
    for name, value in values.items():
        kept = {key: each for key, each in optimizer.state[value].items() if each is not None}
        tensors |= {f"{key} {name}": each for key, each in kept.items()}
    metadata = {"identity": identity, "losses": json.dumps(list(losses))}
    with whole_file(state) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def _restore(state: Path | None, identity: str, values: Values, optimizer: Any) -> list[float]:
    """Take up weights and optimiser of the same run; returns its losses so far, none if there was no such run."""
    import torch
    from safetensors import SafetensorError, safe_open

    if state is None or not state.is_file():
        return []
    try:
        with safe_open(state, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                return []
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return []
    with torch.no_grad():
        for label, tensor in tensors.items():
            key, _, name = label.partition(" ")
            if key == "value":
                values[name].copy_(tensor)
            else:
                place = "cpu" if tensor.ndim == 0 else values[name].device
                optimizer.state[values[name]][key] = tensor.to(place)
    return json.loads(metadata["losses"])
