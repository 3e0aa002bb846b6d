"""Losses by transformers, weights and targets, noise on real models, the command line end to end, the figure."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from linfit.bridge import choose_targets, judge_named, load, merge, perturb, read_records, weigh, write_records
from linfit.bridge.language import encode_record, write_losses
from sims.laboratory.toy_language import build, counting_text, encode, story_text
from tests.bridge_checkpoints import model_of, write_single


@pytest.fixture
def sums(tmp_path):
    generator = np.random.default_rng(5)
    records = [{"input_ids": encode(counting_text(generator, k % 3 + 1)).tolist()} for k in range(11)]
    records[3]["labels"] = [-100] * 4 + records[3]["input_ids"][4:]
    records[7]["labels"] = [-100] * len(records[7]["input_ids"])
    write_records(tmp_path / "data.jsonl", records)
    return tmp_path / "data.jsonl", records


@pytest.mark.parametrize("batch_size", [1, 4])
def test_losses_are_those_of_the_model_itself(families, sums, tmp_path, batch_size):
    torch = pytest.importorskip("torch")
    path, records = sums
    base = families["llama"][0]
    write_losses(base, path, tmp_path / "out.jsonl", batch_size=batch_size, tokens=True, dtype="float32")
    model, found = model_of(base, dtype=torch.float32), read_records(tmp_path / "out.jsonl")
    for number, (line, record) in enumerate(zip(found, records, strict=True)):
        ids, labels = (torch.tensor([record.get(key, record["input_ids"])]) for key in ("input_ids", "labels"))
        targets = int((labels[:, 1:] != -100).sum())
        assert (line["index"], line["tokens"]) == (number, targets)
        assert len(line["token_losses"]) == ids.shape[1]
        if targets == 0:
            assert line["loss"] is None
            continue
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=labels).loss)
        np.testing.assert_allclose(line["loss"], expected, rtol=1e-5)
        counted = [value for value in line["token_losses"] if value is not None]
        np.testing.assert_allclose(np.mean(counted), line["loss"], rtol=1e-6)


def test_losses_resume_after_an_interruption(families, sums, tmp_path):
    path, base, out = sums[0], families["llama"][0], tmp_path / "out.jsonl"

    def stop(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_losses(base, path, out, batch_size=2, progress=stop)
    assert not out.exists()
    partial = tmp_path / ".out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-5])  # torn in the middle of a line
    assert write_losses(base, path, out, batch_size=2) == 5
    write_losses(base, path, tmp_path / "whole.jsonl", batch_size=2)
    resumed, whole = read_records(out), read_records(tmp_path / "whole.jsonl")
    assert [line["index"] for line in resumed] == list(range(11))
    for one, two in zip(resumed, whole):
        assert one["tokens"] == two["tokens"]
        np.testing.assert_allclose(one["loss"] or 0, two["loss"] or 0, rtol=2e-2)


def test_records_are_cut_and_bad_ones_named():
    assert encode_record({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, None, 2, 0) == ([5, 6], [-100, 6])
    with pytest.raises(ValueError, match=r"record 4: needs text, prompt and completion.* found question"):
        encode_record({"question": "a"}, None, 100, 4)
    with pytest.raises(ValueError, match="labels must be as long"):
        encode_record({"input_ids": [1, 2], "labels": [1]}, None, 100, 4)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    """A base and a tuned model with trained byte-pair encodings; only the tuned one has a chat template."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    generator = np.random.default_rng(0)
    text = story_text(generator, 300) + counting_text(generator, 300)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>", "<|user|>", "<|assistant|>"], tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "special_tokens": special, "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(text.splitlines(keepends=True), tokenizers.trainers.BpeTrainer(**options))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    folders = []
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(saved), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            bos_token_id=0, eos_token_id=1, max_position_embeddings=128, initializer_range=0.1,
        )  # fmt: skip
        folders.append(tmp_path_factory.mktemp("talkers") / name)
        transformers.LlamaForCausalLM(config).save_pretrained(folders[-1])
        saved.chat_template = CHAT_TEMPLATE if name == "tuned" else None
        saved.save_pretrained(folders[-1])
    return folders


def test_tokenizer_and_chat_template_come_with_the_merge(talkers, tmp_path):
    transformers = pytest.importorskip("transformers")
    base, tuned = talkers
    messages = [{"role": "user", "content": "17+25="}, {"role": "assistant", "content": "42."}]
    for folder in merge(base, tuned, tmp_path / "out", tau=[0.0, 0.5]).folders:
        own, merged = (transformers.AutoTokenizer.from_pretrained(each) for each in (tuned, folder))
        assert merged.apply_chat_template(messages, tokenize=False) == own.apply_chat_template(messages, tokenize=False)
        assert merged("the cat sees 7+8=15.").input_ids == own("the cat sees 7+8=15.").input_ids
        assert merged.decode(merged("the cat sees").input_ids, skip_special_tokens=True) == "the cat sees"
        names = {path.name for path in tuned.iterdir()}
        assert {"tokenizer.json", "tokenizer_config.json"} < names
        for name in names - {"model.safetensors"}:
            assert (folder / name).read_bytes() == (tuned / name).read_bytes()
    assert "<|user|>\n17+25=</s>" in own.apply_chat_template(messages, tokenize=False)
    assert transformers.AutoTokenizer.from_pretrained(base).chat_template is None


def test_losses_of_text_prompts_and_conversations(talkers, command, tmp_path):
    """Through the real tokenizer, against losses whose targets are found by the position of their characters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = merge(*talkers, tmp_path / "out", tau=0.5).folders[0]
    question, answer = "17+25=", "42."
    records = [
        {"text": "the old king finds an open door."},
        {"prompt": "my friend sees", "completion": " the sea."},
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
    ]
    write_records(tmp_path / "data.jsonl", records)
    command("losses", folder, tmp_path / "data.jsonl", "--out", tmp_path / "losses.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, conversation = model_of(folder), f"<s><|user|>\n{question}</s>\n<|assistant|>\n"
    expected = [("", "<s>the old king finds an open door."), ("<s>my friend sees", " the sea.")]
    expected.append((conversation, f"{answer}</s>\n"))
    for line, (given, target) in zip(read_records(tmp_path / "losses.jsonl"), expected, strict=True):
        encoded = tokenizer(given + target, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = torch.tensor([encoded.input_ids]), torch.tensor(encoded.offset_mapping)[:, 1]
        labels = torch.where(ends > len(given), ids, -100)
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        np.testing.assert_allclose(line["loss"], loss, rtol=1e-5)
        assert line["tokens"] == int((labels[:, 1:] != -100).sum())


def test_weights_keep_records_and_mask_tokens():
    weighed, temperature = weigh([{"loss": 1.0, "id": "a"}, {"loss": 3.0, "id": "b"}, {"loss": 2.0}])
    assert temperature == 2
    assert weighed[1]["id"] == "b"
    np.testing.assert_allclose([r["weight"] for r in weighed], np.exp([-0.5, -1.5, -1]))
    records = [{"token_losses": [None, 1.0]}, {"token_losses": [None, 3.0, 2.0]}]
    weighed, temperature = weigh(records, tokens=True)
    assert temperature == 2
    np.testing.assert_allclose(weighed[1]["token_weights"], [0, np.exp(-1.5), np.exp(-1)])
    assert len(weighed[0]["token_weights"]) == 2


@pytest.mark.parametrize(
    ("name", "answer", "gold", "verdict"),
    [
        ("exact", " yes ", "yes", True),
        ("exact", "Yes", "yes", False),
        ("normalised", "The answer: YES!", "answer yes", True),
        ("normalised", "no", "yes", False),
        ("normalised", "An   apple, the PEAR", "apple pear", True),
        ("last-number", "3 + 4 = 7, so $1,007.0", "#### 1007", True),
        ("last-number", "seven", "7", False),
        ("last-number", "-3", "3", False),
        ("last-number", "none", "none", False),
        (r"regex:\((\w)\)", "first (A), then (B)", "(B)", True),
        (r"regex:\((\w)\)", "B", "(B)", False),
        ('command:grep -q \'"answer": "ok\'', "ok then", "x", True),
        ('command:grep -q \'"answer": "ok\'', "no", "x", False),
    ],
)
def test_judges(name, answer, gold, verdict):
    assert judge_named(name)(answer, gold) is verdict


def test_judges_that_cannot_judge():
    for name in ("similar", "regex:", "regex:(", "command:"):
        with pytest.raises(ValueError, match=r"judge must be|regex is not valid"):
            judge_named(name)
    with pytest.raises(ValueError, match="ended with 3"):
        judge_named("command:exit 3")("a", "b")


def test_targets_from_records():
    records = [
        {"prompt": "p", "own": "so 4", "gold": "4"},
        {"prompt": "q", "own": "5", "gold": "6", "paraphrase": "I get 6"},
        {"prompt": "r", "own": "1", "gold": "2", "paraphrase": "3"},
    ]
    chosen, shares = choose_targets(records, judge_named("last-number"))
    assert chosen == [
        {"prompt": "p", "completion": "so 4", "source": "own"},
        {"prompt": "q", "completion": "I get 6", "source": "paraphrase"},
        {"prompt": "r", "completion": "2", "source": "gold"},
    ]
    assert shares == {"own": 1 / 3, "paraphrase": 1 / 3, "gold": 1 / 3}
    with pytest.raises(ValueError, match="record 1: needs texts"):
        choose_targets([{"own": "a"}], judge_named("exact"))


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no records"), ('{"a": 1}\n{', "line 2: not JSON"), ("[1]", "line 1: must be")]
)
def test_bad_jsonl(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "x.jsonl")


def test_noise_has_the_size_asked_for(families, tmp_path):
    base, start = families["gpt2"][0], load(families["gpt2"][0])
    outcome = perturb(base, tmp_path / "out", gamma=[0.0, 0.01, 0.1], seed=[0, 1])
    moved = {folder.name: load(folder) for folder in outcome.folders}
    name = "transformer.h.0.mlp.c_fc.weight"
    size = start[name].size
    for gamma in (0.01, 0.1):
        noise = [moved[f"gamma_{gamma:g}_seed_{seed}"][name] - start[name] for seed in (0, 1)]
        for each in noise:
            assert abs(np.linalg.norm(each) / np.linalg.norm(start[name]) / gamma - 1) < 5 / (2 * size) ** 0.5
        correlation = np.vdot(*noise) / np.linalg.norm(noise[0]) / np.linalg.norm(noise[1])
        assert abs(correlation) < 5 / size**0.5
    small, large = (moved[f"gamma_{gamma}_seed_0"][name] - start[name] for gamma in ("0.01", "0.1"))
    np.testing.assert_allclose(large, 10 * small, atol=1e-6)
    for name, value in moved["gamma_0_seed_1"].items():
        np.testing.assert_array_equal(value, start[name])
    again = perturb(base, tmp_path / "again", gamma=0.1, seed=1, workers=1).folders[0]
    for path in again.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / "gamma_0.1_seed_1" / path.name).read_bytes()


def test_noise_by_initial_scale_leaves_vectors_alone(tmp_path, generator):
    tensors = {"w": np.zeros((200, 100), np.float32), "norm": np.ones(50, np.float32), "ids": np.arange(4)}
    base = write_single(tmp_path / "base", tensors)
    out = load(perturb(base, tmp_path / "out", gamma=2.0, init_scale=0.02).folders[0])
    assert abs(out["w"].std() / 0.04 - 1) < 5 / 40_000**0.5
    np.testing.assert_array_equal(out["norm"], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, "gamma must be finite and non-negative"),
        ({"gamma": float("nan")}, "gamma must be finite"),
        ({"gamma": []}, "at least one gamma"),
        ({"gamma": 0.1, "seed": -1}, "seeds non-negative"),
        ({"gamma": 0.1, "seed": [0, 0]}, "must not repeat"),
        ({"gamma": 0.1, "init_scale": 0.0}, "init_scale must be finite and positive"),
        ({"gamma": 0.1, "only": "x.*"}, "fits no floating tensor"),
    ],
)
def test_bad_noise(tmp_path, options, message):
    base = write_single(tmp_path / "base", {"w": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=message):
        perturb(base, tmp_path / "out", **options)


def test_commands_are_light():
    heavy = ("jax", "numpy", "torch", "rich", "scipy")
    code = f"import sys, figures.commands; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_from_checkpoints_to_the_best_tau(families, sums, command, tmp_path):
    """merge → losses at each τ → curve; losses → weights; all through the command line."""
    base, (tuned, other, _) = families["llama"]
    data, _ = sums
    merged = json.loads(command("merge", base, tuned, "--tau", "0,0.5", "--tau", "1", "-o", tmp_path / "m", "--json"))
    assert [folder.rsplit("/", 1)[1] for folder in merged["folders"]] == ["tau_0", "tau_0.5", "tau_1"]
    for folder in merged["folders"]:
        command("losses", folder, data, "--out", f"{folder}.jsonl", "--dtype", "float32")
    pairs = [f"{tau}={folder}.jsonl" for tau, folder in zip((0, 0.5, 1), merged["folders"])]
    picture = tmp_path / "curve.png"
    fit = json.loads(command("curve", *pairs, "--json", "--plot", picture))["metrics"][0]
    assert (fit["metric"], len(fit["values"])) == ("loss", 3)
    assert picture.stat().st_size > 5000
    assert "temperature" in command("weights", f"{merged['folders'][0]}.jsonl", "-o", tmp_path / "weights.jsonl")
    weights = [record["weight"] for record in read_records(tmp_path / "weights.jsonl")]
    assert weights[7] == 0
    assert 0.2 < np.median(weights) < 0.5
    picture = tmp_path / "inspection.svg"
    inspection = json.loads(command("inspect", base, tuned, other, "--json", "--plot", picture))
    assert len(inspection["tensors"]) == 21
    assert picture.read_text().startswith("<?xml")
    (tmp_path / "inspection.json").write_text(json.dumps(inspection))
    arguments = ["--layer-tau", "*norm*=0", "--layer-tau-file", tmp_path / "inspection.json"]
    command("merge", base, tuned, "-o", tmp_path / "by_layer", *arguments)
    np.testing.assert_array_equal(load(tmp_path / "by_layer")["model.norm.weight"], load(base)["model.norm.weight"])
    assert "τ of average" in command("inspect", base, tuned, other)
    write_records(tmp_path / "a.jsonl", [{"own": "It is 4", "gold": "4"}, {"own": "5", "gold": "6"}])
    assert "own 50.0%" in command("targets", tmp_path / "a.jsonl", "-o", tmp_path / "t.jsonl", "--judge", "last-number")


def test_bad_calls_end_with_one_line(command, tmp_path):
    folder = write_single(tmp_path / "a", {"w": np.ones((2, 2), np.float32)})
    calls = [
        (["merge", folder, tmp_path / "none", "-o", tmp_path / "o"], "no such checkpoint folder"),
        (["merge", folder, folder, "-o", tmp_path / "o", "--tau", "half"], "--tau must be numbers"),
        (["merge", folder, folder, "-o", tmp_path / "o", "--layer-tau", "w"], "--layer-tau must be PATTERN=NUMBER"),
        (["inspect", folder, folder, "--plot", "x.txt"], "--plot must end in"),
        (["perturb", folder, "--gamma", "0.1", "--seed", "0.5", "-o", tmp_path / "o"], "--seed must be whole"),
        (["weights", tmp_path / "none.jsonl", "-o", tmp_path / "w"], "No such file"),
    ]
    for arguments, message in calls:
        error = command(*arguments, code=2)
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_figure_is_drawn_with_its_numbers():
    pytest.importorskip("transformers")
    from figures.bridge import pictures

    picture = next(iter(pictures(jax.random.key(3), quick=True)))
    assert picture.data["sums_loss"].dims == ("who", "tau", "sum")
    one, average = picture.data["sums_loss"].mean("sum").values
    assert one[0] == average[0]  # τ = 0 is the base in both
    assert np.isfinite(picture.data["singular_value"]).all()
    assert "seed 3" in picture.caption(picture.data)
    assert len(picture.draw(picture.data).axes) == 3


def test_the_weighted_loss_of_the_documentation():
    """With weights 1 it is the model's own loss; in general Σ w_i Σ_t nll / tokens."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = (Path(__file__).parents[1] / "docs" / "bridge.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(class WeightedTrainer.*?)```", text, re.DOTALL)[1]
    names = {"Trainer": object, "torch": torch}
    exec(code, names)
    trainer, model = names["WeightedTrainer"](), build("llama", hidden=16, layers=1).eval()
    ids = torch.arange(1, 25).reshape(3, 8)
    inputs, weight = {"input_ids": ids, "labels": ids.clone()}, torch.tensor([0.2, 1.0, 0.5])
    inputs["labels"][0, :4] = -100
    with torch.no_grad():
        own = model(**inputs).loss
        rows = (torch.ones(3), weight, *torch.eye(3))
        plain, weighted, *parts = [trainer.compute_loss(model, {**inputs, "weight": row}) for row in rows]
    assert torch.allclose(own, plain)
    assert torch.allclose(weighted, sum(w * part for w, part in zip(weight, parts)))
