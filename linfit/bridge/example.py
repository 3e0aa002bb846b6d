"""Small real language models, made here: a base, and what fine-tuning on another text makes of it (extra `llm`).

Used by the tests, the figure and the documentation, so that everything about checkpoints is shown on checkpoints that
transformers wrote and really trained. Characters are tokens; two small languages are the two tasks.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789+=.,?!"
ARCHITECTURES = ("llama", "qwen2", "gpt2")
CONTEXT = 32


def counting_text(generator: np.random.Generator, lines: int) -> str:
    """The fine-tuning task: lines such as `17+25=42.`"""
    pairs = generator.integers(0, 50, size=(lines, 2))
    return "".join(f"{a}+{b}={a + b}.\n" for a, b in pairs)


def story_text(generator: np.random.Generator, lines: int) -> str:
    """The pretraining task: short sentences over a small vocabulary."""
    who = ("the cat", "a dog", "my friend", "the old king", "a small bird", "the river")
    what = ("sees", "follows", "likes", "finds", "leaves", "remembers")
    where = ("a green hill", "the quiet house", "an open door", "the long road", "a warm stone", "the sea")

    def pick(words: tuple[str, ...]) -> str:
        return words[generator.integers(len(words))]

    return "".join(f"{pick(who)} {pick(what)} {pick(where)}.\n" for _ in range(lines))


def encode(text: str) -> np.ndarray:
    """Token ids (n,) of a text over `ALPHABET`."""
    return np.array([ALPHABET.index(character) for character in text])


def build(architecture: str = "llama", *, hidden: int = 64, layers: int = 2, seed: int = 0, tied: bool = False) -> Any:
    """An untrained transformers model; ValueError for an architecture not in `ARCHITECTURES`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": len(ALPHABET), "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    blocks = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * CONTEXT,
    }
    if architecture == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 2 * CONTEXT}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**common, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        )
    if architecture == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **blocks))
    if architecture == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common, **blocks))
    raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(model: Any, tokens: np.ndarray, *, steps: int, rate: float = 3e-3, seed: int = 0, batch: int = 16) -> Any:
    """`steps` of AdamW on random windows of a token stream; the model itself, changed in place."""
    import torch

    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    with _one_thread():
        for _ in range(steps):
            starts = generator.integers(0, tokens.size - CONTEXT - 1, size=batch)
            windows = torch.from_numpy(np.stack([tokens[start : start + CONTEXT] for start in starts]))
            loss = model(input_ids=windows, labels=windows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def held_out_losses(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Mean next-token loss of each of the consecutive windows of a token stream (windows,), in nats."""
    import torch

    count = tokens.size // CONTEXT
    windows = torch.from_numpy(tokens[: count * CONTEXT].reshape(count, CONTEXT))
    with torch.no_grad(), _one_thread():
        logits = model(input_ids=windows).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    return losses.mean(dim=1).double().numpy()


def make_family(
    folder: str | Path,
    *,
    architecture: str = "llama",
    runs: int = 3,
    hidden: int = 64,
    layers: int = 2,
    pretrain_steps: int = 400,
    finetune_steps: int = 100,
    finetune_lines: int = 60,
    finetune_rate: float = 1e-3,
    dtype: str = "float32",
    shard_size: str = "50KB",
    tied: bool = False,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Path, list[Path]]:
    """Pretrain a base on stories and a few sums, fine-tune it `runs` times on few sums (other data each), save all.

    Returns the base folder and the fine-tuned folders, sharded safetensors as transformers writes them.
    """
    import torch

    folder = Path(folder)
    generator = np.random.default_rng([seed, 0])
    text = encode(story_text(generator, 1600) + counting_text(generator, 1600))
    base = train(
        build(architecture, hidden=hidden, layers=layers, seed=seed, tied=tied), text, steps=pretrain_steps, seed=seed
    )
    log(f"pretrained {sum(parameter.numel() for parameter in base.parameters()):,} parameters")
    start = {name: value.clone() for name, value in base.state_dict().items()}
    stored = getattr(torch, dtype)
    _save(base.to(stored), folder / "base", shard_size)
    tuned = []
    for run in range(runs):
        model = base.to(torch.float32)
        model.load_state_dict(start)
        text = encode(counting_text(np.random.default_rng([seed, 1 + run]), finetune_lines))
        train(model, text, steps=finetune_steps, seed=run, rate=finetune_rate)
        tuned.append(folder / f"tuned_{run}")
        _save(model.to(stored), tuned[-1], shard_size)
        log(f"fine-tuned run {run}")
    return folder / "base", tuned


def _save(model: Any, folder: Path, shard_size: str) -> None:
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A small model\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(ALPHABET)}), encoding="utf-8")
