"""A language model in torch as a function of the weights that move, and its linearisation (extra `llm`).

At θ₁ the linearised model has the logits z = f(θ₁) + Jδ. One forward-mode pass gives Jδ, one reverse-mode pass
Jᵀ ∂ℓ/∂z. No Jacobian and no kernel is formed, and logits, (tokens × vocabulary), exist for a piece of the tokens at a
time: only hidden states are kept for all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any, NamedTuple

Values = dict[str, Any]
"""Tensors of torch by name."""

IGNORED = -100
"""Label of a token that is no target."""


class Batch(NamedTuple):
    """Records padded to one length."""

    ids: Any  # (rows, length)
    mask: Any  # (rows, length), 1 where there is a token
    targets: Any  # (rows, length): the next token, or IGNORED

    @property
    def tokens(self) -> int:
        """Target tokens."""
        return int((self.targets != IGNORED).sum())


class Outputs(NamedTuple):
    """What logits = hidden @ weightᵀ + bias are made of; without a weight, hidden are the logits."""

    hidden: Any  # (target tokens, width)
    weight: Any  # (vocabulary, width)
    bias: Any  # (vocabulary,)

    def logits(self, tokens: slice) -> Any:
        """Of some of the tokens."""
        if self.weight is None:
            return self.hidden[tokens]
        import torch

        return torch.nn.functional.linear(self.hidden[tokens], self.weight, self.bias)

    def moved_logits(self, step: "Outputs", tokens: slice) -> Any:
        """Their first-order change when hidden, weight and bias move by `step` (None: not at all)."""
        if self.weight is None:
            return step.hidden[tokens]
        change = step.hidden[tokens] @ self.weight.T
        if step.weight is not None:
            change = change + self.hidden[tokens] @ step.weight.T
        return change if step.bias is None else change + step.bias


class LanguageNetwork:
    """A causal language model as a function of the weights that move.

    Args:
        model: of transformers; it is put into evaluation mode (no dropout) and eager attention, whose forward mode
            torch knows, and its parameters are never changed.
        moving: shell patterns of parameter names, or none for all of them.
        lora: rank R; each matrix that fits `moving` (by default those of all linear layers but the last) then moves by
            scale·BA, A (R, in) random, B (out, R) zero at the start.
        lora_scale: α/R in the words of LoRA.
        seed: of A.
        memory: bytes that logits may take.
    """

    def __init__(
        self,
        model: Any,
        *,
        moving: Sequence[str] = (),
        lora: int | None = None,
        lora_scale: float = 2.0,
        seed: int = 0,
        memory: int = 2**28,
    ) -> None:
        import torch

        self.model, self.memory, self.lora_scale = model.eval().requires_grad_(False), memory, lora_scale
        use_eager_attention(model)
        self.parameters: Values = {
            name: value.detach() for name, value in model.named_parameters() if value.is_floating_point()
        }
        self._head = _simple_head(model, self.parameters)
        names = self._chosen(moving, lora)
        if lora is None:
            self.start: Values = {name: self.parameters[name] for name in names}
        else:
            self.start = self._factors(names, lora, torch.Generator().manual_seed(seed))
        self._call = torch.func.functional_call
        self._body = _body(model, whole=self._head is None)

    def _chosen(self, moving: Sequence[str], lora: int | None) -> list[str]:
        """Names of the parameters that move, or that LoRA's factors are added to."""
        known = list(self.parameters)
        if lora is not None:
            known = [name for name in _linear_weights(self.model) if name in self.parameters]
        unused = [pattern for pattern in moving if not any(fnmatchcase(name, pattern) for name in known)]
        if unused or not known:
            some = ", ".join([*known[:3], "…", *known[-2:]])
            raise ValueError(f"moving must fit the name of a parameter, such as {some}; nothing fits {unused}")
        return [name for name in known if not moving or any(fnmatchcase(name, pattern) for pattern in moving)]

    def _factors(self, names: Sequence[str], rank: int, generator: Any) -> Values:
        """LoRA's A, uniform in ±1/√in as PEFT draws it, and B = 0, for weights stored as (out, in) or (in, out)."""
        import torch

        if rank < 1:
            raise ValueError(f"lora must be a rank of at least 1, got {rank}")
        factors, transposed = {}, _linear_weights(self.model)
        for name in names:
            weight = self.parameters[name]
            out, inputs = weight.shape[::-1] if transposed[name] else weight.shape
            draw = 2 * torch.rand(rank, inputs, generator=generator, dtype=torch.float64) - 1
            factors[f"{name}/A"] = (draw / sqrt(inputs)).to(weight)
            factors[f"{name}/B"] = weight.new_zeros(out, rank)
        self._transposed = {name: transposed[name] for name in names}
        return factors

    def weights(self, values: Values) -> Values:
        """The model's parameters that differ from `parameters`, from the values of what moves; differentiable."""
        if not any(name.endswith("/A") for name in values):
            return values
        placed = {}
        for name, transposed in self._transposed.items():
            product = values[f"{name}/B"] @ values[f"{name}/A"]
            placed[name] = self.parameters[name] + self.lora_scale * (product.T if transposed else product)
        return placed

    def outputs(self, batch: Batch, values: Values) -> Outputs:
        """At the target tokens of a batch."""
        weights = self.weights(values)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        hidden = self._call(self._body, {f"model.{name}": value for name, value in weights.items()}, (), inputs)
        hidden = hidden[batch.targets != IGNORED]
        if self._head is None:
            return Outputs(hidden, None, None)
        weight, bias = (None if name is None else weights.get(name, self.parameters[name]) for name in self._head)
        return Outputs(hidden, weight, bias)

    def step(self, batch: Batch, at: Values, delta: Values) -> tuple[Outputs, Outputs]:
        """Outputs at `at`, and J·delta: one forward-mode pass. What of the head does not move has None for a step."""
        import torch

        moves = [name in self.weights(at) for name in self._head or ()]

        def function(values: Values) -> tuple[Any, ...]:
            hidden, *head = self.outputs(batch, values)
            return hidden, *(part for part, moved in zip(head, moves) if moved)

        with torch.no_grad():
            try:
                here, change = torch.func.jvp(function, (at,), (delta,))
            except RuntimeError:  # a model with operations of its own, for which torch has no forward mode
                here, change = _double_reverse(function, at, delta)
            parts = iter(change[1:])
            head = [next(parts) if moved else None for moved in moves] or [None, None]
            return self._with_head(here[0], at), Outputs(change[0], *head)

    def _with_head(self, hidden: Any, at: Values) -> Outputs:
        weights = self.weights(at)
        names = self._head or (None, None)
        return Outputs(hidden, *(None if name is None else weights.get(name, self.parameters[name]) for name in names))

    def gradient(self, batch: Batch, at: Values, delta: Values | None = None) -> tuple[float, Values]:
        """Summed loss of a batch and its gradient, of the model at `at`, or of the linear model f(at) + J(at)·delta."""
        import torch

        change = None if delta is None else self.step(batch, at, delta)[1]
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        with torch.enable_grad():
            outputs = self.outputs(batch, leaves)
        here = Outputs(*(None if part is None else part.detach() for part in outputs))
        wanted = [part is not None and part.requires_grad for part in outputs]
        total, cotangents = self._pull_logits(here, change, batch.targets[batch.targets != IGNORED], wanted)
        pairs = [(part, cotangent) for part, cotangent in zip(outputs, cotangents) if cotangent is not None]
        parts, pulled = zip(*pairs)
        found = torch.autograd.grad(parts, list(leaves.values()), pulled, allow_unused=True)
        zeros = {name: torch.zeros_like(value) for (name, value), each in zip(at.items(), found) if each is None}
        return total, {**{name: each for name, each in zip(leaves, found) if each is not None}, **zeros}

    def _pull_logits(
        self, here: Outputs, change: Outputs | None, targets: Any, wanted: Sequence[bool]
    ) -> tuple[float, list[Any]]:
        """Summed loss, and its gradient with respect to hidden, weight and bias; ∂ℓ/∂z = softmax(z) − onehot(y)."""
        import torch

        total = 0.0
        pulled = [torch.zeros_like(part) if want else None for part, want in zip(here, wanted)]
        with torch.no_grad():
            for tokens in self._pieces(here):
                logits = here.logits(tokens)
                if change is not None:
                    logits = logits + here.moved_logits(change, tokens)
                excess = torch.log_softmax(logits.float() if logits.itemsize < 4 else logits, dim=-1)
                total -= float(excess.gather(1, targets[tokens, None]).sum())
                excess = excess.exp_().to(logits)
                excess[torch.arange(len(excess)), targets[tokens]] -= 1
                if pulled[0] is not None:
                    pulled[0][tokens] = excess if here.weight is None else excess @ here.weight
                if pulled[1] is not None:
                    pulled[1] += excess.T @ here.hidden[tokens]
                if pulled[2] is not None:
                    pulled[2] += excess.sum(dim=0)
        return total, pulled

    def _pieces(self, outputs: Outputs) -> Iterator[slice]:
        """Tokens whose logits, four times, fit in the memory."""
        count, vocabulary = (
            len(outputs.hidden),
            (outputs.hidden if outputs.weight is None else outputs.weight.T).shape[1],
        )
        size = max(1, self.memory // (4 * vocabulary * outputs.hidden.itemsize))
        return (slice(start, start + size) for start in range(0, count, size))

    def losses(self, batch: Batch, values: Values) -> Any:
        """Mean loss per target token of each record (rows,), in nats."""
        import torch

        with torch.no_grad():
            outputs = self.outputs(batch, values)
            targets = batch.targets[batch.targets != IGNORED]
            pieces = [_cross_entropy(outputs.logits(part), targets[part]) for part in self._pieces(outputs)]
        return _by_record(torch.cat(pieces)[None], batch)[0]

    def losses_along(self, batch: Batch, at: Values, delta: Values, taus: Iterable[float]) -> Any:
        """The same of the linear model f(at) + τ·J(at)·delta, (τ, rows): its logits are linear in τ."""
        import torch

        here, change = self.step(batch, at, delta)
        targets, found = batch.targets[batch.targets != IGNORED], []
        with torch.no_grad():
            for part in self._pieces(here):
                logits, moved = here.logits(part), here.moved_logits(change, part)
                found.append(torch.stack([_cross_entropy(logits + tau * moved, targets[part]) for tau in taus]))
        return _by_record(torch.cat(found, dim=1), batch)

    def gap(self, batch: Batch, at: Values, delta: Values) -> tuple[float, float]:
        """‖f(at+δ) − f(at) − Jδ‖² and ‖Jδ‖² over all logits."""
        import torch

        here, change = self.step(batch, at, delta)
        with torch.no_grad():
            there = self.outputs(batch, moved(at, delta))
            missed = first = 0.0
            for part in self._pieces(here):
                linear = here.moved_logits(change, part).double()
                first += float((linear**2).sum())
                missed += float(((there.logits(part).double() - here.logits(part).double() - linear) ** 2).sum())
        return missed, first


def use_eager_attention(model: Any) -> None:
    """The one way to compute attention whose forward mode torch knows."""
    if getattr(getattr(model, "config", None), "_attn_implementation", "eager") != "eager":
        model.set_attn_implementation("eager")


def moved(at: Values, delta: Values, tau: float = 1.0) -> Values:
    """at + τ·delta."""
    return {name: value + tau * delta[name] for name, value in at.items()}


def difference(values: Values, start: Values) -> Values:
    """values − start."""
    return {name: values[name].detach() - value for name, value in start.items()}


def norm(values: Values) -> float:
    """‖·‖ over all of them."""
    return sqrt(sum(float((value.double() ** 2).sum()) for value in values.values()))


def make_batch(encoded: Sequence[tuple[Sequence[int], Sequence[int]]], device: Any = "cpu") -> Batch:
    """Records (ids, labels), padded at their ends."""
    import torch

    longest = max(len(ids) for ids, _ in encoded)
    ids, mask = (torch.zeros(len(encoded), longest, dtype=torch.long) for _ in range(2))
    targets = torch.full((len(encoded), longest), IGNORED)
    for row, (tokens, labels) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        targets[row, : len(tokens) - 1] = torch.tensor(labels[1:])
    return Batch(ids.to(device), mask.to(device), targets.to(device))


def _double_reverse(function: Callable[[Values], tuple[Any, ...]], at: Values, delta: Values) -> tuple[Any, Any]:
    """f(at) and J·delta without forward mode: Jᵀu is linear in u, and its own reverse-mode pass is J."""
    import torch

    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        here = function(leaves)
        u = [torch.zeros_like(part).requires_grad_() for part in here]
        pulled = torch.autograd.grad(here, list(leaves.values()), u, create_graph=True, allow_unused=True)
        pairs = [(part, delta[name]) for name, part in zip(leaves, pulled) if part is not None and part.requires_grad]
        parts, steps = zip(*pairs)
        change = torch.autograd.grad(parts, u, steps, allow_unused=True)
    zeros = [torch.zeros_like(part) for part in here]
    return [part.detach() for part in here], [zero if each is None else each for each, zero in zip(change, zeros)]


def _cross_entropy(logits: Any, targets: Any) -> Any:
    import torch

    logits = logits.float() if logits.itemsize < 4 else logits
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()


def _by_record(values: Any, batch: Batch) -> Any:
    """Means (…, rows) over the target tokens of each record, of values (…, target tokens)."""
    mask = batch.targets != IGNORED
    rows = mask.nonzero()[:, 0]
    sums = values.new_zeros(*values.shape[:-1], len(mask)).index_add_(-1, rows, values)
    return sums / mask.sum(dim=1)


def _linear_weights(model: Any) -> Mapping[str, bool]:
    """Weights of linear layers but the last, and whether they are stored as (in, out), as GPT-2's are."""
    import torch

    last = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if module is not last and (transposed or isinstance(module, torch.nn.Linear)):
            found[f"{name}.weight"] = transposed
    return found


def _simple_head(model: Any, parameters: Values) -> tuple[str | None, str | None] | None:
    """Names of weight and bias if the logits are hidden @ weightᵀ + bias; else None.

    It is tried out, with a weight a thousand times as large too: a cap on the logits, or a scale, would show.
    """
    import torch

    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or model.base_model is model:
        return None
    by_place = {value.data_ptr(): name for name, value in parameters.items()}
    weight, bias = (None if part is None else by_place.get(part.data_ptr(), "") for part in (head.weight, head.bias))
    if not weight or bias == "":
        return None
    inputs = {"input_ids": torch.arange(1, 4, device=head.weight.device)[None] % head.weight.shape[0]}
    for scale in (1.0, 1e3):
        scaled = {f"model.{weight}": scale * parameters[weight]}
        with torch.no_grad():
            hidden, logits = (
                torch.func.functional_call(_body(model, whole=whole), scaled, (), inputs) for whole in (False, True)
            )
            if hidden.shape[-1] != head.weight.shape[1]:
                return None
            expected = torch.nn.functional.linear(hidden, scale * parameters[weight], head.bias)
        if not torch.allclose(expected, logits, 1e-3, 1e-3 * float(logits.abs().max())):
            return None
    return weight, bias


def _body(model: Any, *, whole: bool) -> Any:
    """A module that returns hidden states, or the logits of a model with another kind of head."""
    import torch

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            if whole:
                return self.model(**inputs, use_cache=False).logits
            return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    return Body()
