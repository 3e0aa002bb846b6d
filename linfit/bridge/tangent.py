"""Tangent kernels of a torch network with few outputs, such as a classification head (extra `llm`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from linfit.bridge.linearised import Values, moved, norm, use_eager_attention
from linfit.filters import Filter
from linfit.internal.checks import Maybe, count
from linfit.tangent import Prediction, from_kernels
from linfit.tangent.prediction import losses

Pairs = tuple[Any, Any]
Report = Callable[[int, int], None] | None


def predict_torch(
    model: Any,
    train: Pairs,
    test: Pairs,
    other: Pairs | None = None,
    *,
    loss: Literal["squared", "entropy"] = "squared",
    moving: Sequence[str] = (),
    noise_std: Maybe = None,
    plan: Filter | None = None,
    memory: int = 2**30,
    report: Report = None,
) -> Prediction:
    """`linfit.predict` for a torch module with k outputs a sample (docs, G1): its tangent kernel by `torch.func`.

    Filters, times and losses are those of `linfit.predict`: gradient descent, full batches. n·k reverse-mode passes of
    one sample give the Jacobian, rows of it at a time. `diagnostics` hold `distance`, `relative_distance`, `gap_…` and
    `loss_gap_…` of those that `linfit.predict` states.

    Args:
        model: a module; called with x, or with **x where x is a dictionary (`input_ids`, `attention_mask`), it returns
            outputs (n, k), or an object that has them as `logits`. It is put into evaluation mode: no dropout.
        train, test, other: (x, y): inputs, tensors or dictionaries of tensors with samples first; labels as for
            `linfit.predict`.
        loss, noise_std, plan: as for `linfit.predict`.
        moving: shell patterns of the names of the parameters that move, by default all that require a gradient, such as
            the factors of a LoRA adapter.
        memory: bytes that rows of the Jacobian may take.
        report: told (done, all) samples.

    Raises ValueError for names that fit no parameter, outputs of another form, and what `linfit.predict` refuses.
    """
    import torch

    model, memory = model.eval(), count("memory", memory)
    use_eager_attention(model)
    values = _moving(model, moving)
    data = {"train": train, "test": test} | ({} if other is None else {"other": other})
    for name, pairs in data.items():
        if not isinstance(pairs, tuple | list) or len(pairs) != 2:
            raise ValueError(f"{name} must be a pair (x, y), got {type(pairs).__name__}")
    with torch.no_grad():
        outputs = {name: _outputs(model, values, x).cpu().numpy() for name, (x, _) in data.items()}
    kernels = _kernels(
        model, values, {name: x for name, (x, _) in data.items()}, outputs["train"].shape[1], memory, report
    )
    labels = {name: np.asarray(y) for name, (_, y) in data.items()}
    prediction = from_kernels(outputs, labels, kernels, loss=loss, noise_std=noise_std)
    step = _step(model, values, train[0], prediction, plan or prediction.default_plan())
    return replace(prediction, diagnostics=_diagnose(model, values, data, prediction, *step))


def _step(model: Any, values: Values, x: Any, prediction: Prediction, plan: Filter) -> tuple[Array, Values]:
    """Coordinates α of a planned run, and its step δ = JᵀUα/n of the weights."""
    import torch

    alpha = prediction.coordinates(plan)
    if alpha.ndim != 1:
        raise ValueError(f"plan must be one filter, got hyperparameters of shape {alpha.shape[:-1]}")
    dual = np.array(prediction.vectors @ alpha / len(prediction.root_weights))
    out, pull = torch.func.vjp(lambda values: _outputs(model, values, x), values)
    return alpha, {name: value.detach() for name, value in pull(torch.as_tensor(dual).to(out))[0].items()}


def _diagnose(
    model: Any, values: Values, data: dict[str, Pairs], prediction: Prediction, alpha: Array, step: Values
) -> dict[str, Array]:
    """The network at θ₁+δ beside its linearisation."""
    import torch

    there = moved(values, step)
    numbers = {"distance": norm(step), "relative_distance": norm(step) / norm(values)}
    for name in data.keys() - {"train"}:
        domain = prediction.domain(name)  # type: ignore[arg-type]
        with torch.no_grad():
            real = jnp.asarray(_outputs(model, there, data[name][0]).cpu().numpy())
        first = domain.moved(alpha)
        size = float(jnp.linalg.norm(first))
        numbers[f"gap_{name}"] = float(jnp.linalg.norm(real - domain.outputs - first)) / size if size > 0 else 0.0
        by_network, by_linear = (
            losses(prediction.loss, f, domain.labels).mean() for f in (real, domain.outputs + first)
        )
        numbers[f"loss_gap_{name}"] = float(by_network / by_linear) - 1 if by_linear > 0 else 0.0
    return {name: jnp.asarray(numbers[name], alpha.dtype) for name in sorted(numbers)}


def _moving(model: Any, patterns: Sequence[str]) -> Values:
    known = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    unused = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]
    if unused:
        raise ValueError(f"moving must fit the name of a parameter, such as {next(iter(known))}; nothing fits {unused}")
    chosen = {
        name: value.detach()
        for name, value in known.items()
        if (any(fnmatchcase(name, each) for each in patterns) if patterns else value.requires_grad)
    }
    if not chosen:
        raise ValueError("moving must name parameters where none requires a gradient")
    return chosen


def _outputs(model: Any, values: Values, x: Any) -> Any:
    """(n, k) at other values of what moves."""
    import torch

    arguments: tuple[Any, Any] = ((), dict(x)) if hasattr(x, "keys") else ((x,), {})
    found = torch.func.functional_call(model, values, *arguments)
    found = getattr(found, "logits", found)
    if not isinstance(found, torch.Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"model must return outputs (n, k), or an object with such logits, got {shape}")
    return found


def _samples(x: Any) -> int:
    return len(next(iter(x.values()))) if hasattr(x, "keys") else len(x)


def _jacobian(model: Any, values: Values, x: Any, start: int, stop: int) -> Any:
    """J of samples start…stop, (stop − start, k, p): one reverse-mode pass for every output of a sample."""
    import torch

    def of_sample(row: int) -> Any:
        piece = {key: each[row : row + 1] for key, each in x.items()} if hasattr(x, "keys") else x[row : row + 1]
        out, pull = torch.func.vjp(lambda values: _outputs(model, values, piece)[0], values)
        rows = [pull(unit)[0] for unit in torch.eye(len(out), dtype=out.dtype, device=out.device)]
        return torch.stack([torch.cat([each[name].ravel() for name in values]) for each in rows])

    return torch.stack([of_sample(row).detach() for row in range(start, stop)])


def _kernels(model: Any, values: Values, inputs: dict[str, Any], k: int, memory: int, report: Report) -> dict[str, Any]:
    """K(x, X) = J(x) J(X)ᵀ of every domain, (m, k, n, k): some training samples at a time against all others.

    While the rows of all training samples fit into memory, every row is computed once.
    """
    rows = sum(value.numel() * value.element_size() for value in values.values()) * k
    n, size = _samples(inputs["train"]), max(1, memory // (2 * rows))
    kernels = {name: np.zeros((_samples(x), k, n, k)) for name, x in inputs.items()}
    blocks = -(-n // size)
    done, total = 0, blocks * sum(_samples(x) for x in inputs.values())
    for start in range(0, n, size):
        stop = min(start + size, n)
        right = _jacobian(model, values, inputs["train"], start, stop)
        for name, x in inputs.items():
            for row in range(_samples(x)):
                held = name == "train" and start <= row < stop
                left = right[row - start : row - start + 1] if held else _jacobian(model, values, x, row, row + 1)
                block = left.flatten(0, 1) @ right.flatten(0, 1).T
                kernels[name][row, :, start:stop] = block.reshape(k, stop - start, k).cpu().numpy()
                done += 1
                if report is not None:
                    report(done, total)
    return kernels
