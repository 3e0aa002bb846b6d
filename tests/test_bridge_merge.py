"""Merging: real checkpoints against in-memory merges by torch and PEFT; care about everything around the weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from linfit import interpolate
from linfit.bridge import Checkpoint, load, merge, read_layer_taus
from tests.bridge_checkpoints import model_of, read_all, write_sharded, write_single

TAUS = [0.0, 0.25, 0.6, 1.0, 1.2]


@pytest.fixture
def pair(tmp_path, generator):
    """A base and two tuned toys, with an integer and a boolean tensor beside the weights."""

    def toy(name, shift):
        weight = generator.standard_normal((8, 6)).astype(np.float32)
        tensors = {"layers.0.weight": weight, "layers.1.weight": (weight.T + shift).astype(np.float16)}
        tensors |= {"norm.weight": np.float64([1.0 + shift, 2.0]), "position_ids": np.arange(5)}
        return write_single(tmp_path / name, {**tensors, "mask": np.array([True, False])})

    return toy("base", 0.0), toy("tuned", 0.5), toy("other", -0.25)


def in_memory(base, tuned, tau):
    if tau in (0, 1):
        return (base, tuned)[int(tau)]
    return ((1 - tau) * base.float() + tau * tuned.float()).to(base.dtype)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_transformers_loads_the_merge_with_the_logits_of_an_in_memory_merge(families, architecture, tmp_path):
    torch = pytest.importorskip("torch")
    base, (tuned, *_) = families[architecture]
    folders = merge(base, tuned, tmp_path / "out", tau=TAUS).folders
    assert [folder.name for folder in folders] == [f"tau_{tau:g}" for tau in TAUS]
    ids = torch.arange(1, 25).reshape(2, 12)
    start, end, reference, *all_merged = (model_of(each, dtype="auto") for each in (base, tuned, base, *folders))
    for tau, merged in zip(TAUS, all_merged):
        state = {name: in_memory(a, end.state_dict()[name], tau) for name, a in start.state_dict().items()}
        reference.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(merged(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert not torch.equal(all_merged[1](input_ids=ids).logits, start(input_ids=ids).logits)


def test_ends_are_bit_identical_and_layout_is_kept(families, tmp_path):
    base, (tuned, *_) = families["qwen2"]
    zero, one = merge(base, tuned, tmp_path / "out", tau=[0, 1]).folders
    assert len(Checkpoint(base).shards) > 2
    for source, folder in ((base, zero), (tuned, one)):
        for path in source.glob("*.safetensors"):
            assert (folder / path.name).read_bytes() == path.read_bytes()
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (tuned, one))
    assert before == after
    for name in ("config.json", "generation_config.json", "vocab.json"):
        assert (one / name).read_bytes() == (tuned / name).read_bytes()
    card = (zero / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n# A small model\n")
    assert "Merged with linfit" in card
    assert "τ: 0" in card


def test_folder_merge_is_interpolate_on_the_pytree(pair, tmp_path):
    base, tuned, _ = pair
    merged = load(merge(base, tuned, tmp_path / "out", tau=0.3).folders[0])
    for name, value in interpolate(load(base), load(tuned), 0.3).items():
        tolerance = 1e-3 if "layers.1" in name else 1e-6
        np.testing.assert_allclose(merged[name], value, rtol=tolerance, atol=tolerance)


def linear_as_mergekit(stacked, weights):
    """Its definition of the method `linear`: Σ w x / Σ w in the dtype of the merge."""
    torch = pytest.importorskip("torch")
    weight = torch.tensor(weights, dtype=stacked.dtype).reshape(-1, *[1] * (stacked.ndim - 1))
    return (weight * stacked).sum(dim=0) / weight.sum(dim=0)


@pytest.mark.parametrize("shares", [(1, 1, 1), (0.2, 0.5, 0.3), (3, -1, 0.7)])
def test_soups_agree_with_those_of_mergekit(tmp_path, generator, shares):
    """All but a few bits, where float32 sums round differently; sums in bfloat16, possible there, differ more often."""
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    values = [torch.from_numpy(generator.standard_normal((300, 200))).to(torch.bfloat16) for _ in shares]
    folders = [write_single(tmp_path / name, {}) for name in "abc"]
    for folder, value in zip(folders, values):
        safetensors.save_file({"w": value}, folder / "model.safetensors")
    total = sum(shares)
    tau, runs = 1 - shares[0] / total, [share / sum(shares[1:]) for share in shares[1:]]
    out = merge(folders[0], folders[1:], tmp_path / "out", tau=tau, run_weights=runs).folders[0]
    merged = safetensors.load_file(out / "model.safetensors")["w"]
    exact = sum(share * value.double() for share, value in zip(shares, values)) / total
    wide = linear_as_mergekit(torch.stack(values).float(), shares).to(torch.bfloat16)
    narrow = linear_as_mergekit(torch.stack(values), shares)
    assert (merged == wide).float().mean() > 0.99
    assert (merged == exact.to(torch.bfloat16)).float().mean() > 0.99
    assert (narrow == wide).float().mean() < 0.98


def test_shrinkage_takes_its_tau_from_how_runs_differ(pair, tmp_path):
    base, tuned, other = pair
    a, b, c = (load(folder)["layers.0.weight"].astype(np.float64) for folder in pair)
    mean, variance = (b + c) / 2 - a, ((b - c) ** 2).sum() / 2
    signal = max((mean**2).sum() - variance / 2, 0)
    tau = signal / (signal + variance / 2)
    assert 0 < tau < 1
    shrunk = load(merge(base, [tuned, other], tmp_path / "out", method="shrink").folders[0])["layers.0.weight"]
    np.testing.assert_allclose(shrunk, a + tau * mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (6, 4, 5)])
def test_rank_truncation_equals_svd(tmp_path, generator, shape):
    a, b = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
    base, tuned = write_single(tmp_path / "a", {"w": a}), write_single(tmp_path / "b", {"w": b})
    merged = load(merge(base, tuned, tmp_path / "out", method="rank", rank=3, tau=0.7).folders[0])["w"]
    u, s, vt = np.linalg.svd((b - a).astype(np.float64).reshape(shape[0], -1), full_matrices=False)
    expected = a + 0.7 * ((u[:, :3] * s[:3]) @ vt[:3]).reshape(shape)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)


def test_singular_shrinkage_recovers_a_spike_from_noise(tmp_path, generator):
    """Closer to the signal than the raw delta and than any uniform τ."""
    a = generator.standard_normal((120, 80)).astype(np.float32)
    signal = np.outer(generator.standard_normal(120), generator.standard_normal(80)) * 0.6
    raw = signal + generator.standard_normal((120, 80))
    base, tuned = (write_single(tmp_path / n, {"w": w}) for n, w in (("a", a), ("b", (a + raw).astype(np.float32))))
    delta = load(merge(base, tuned, tmp_path / "out", method="singular").folders[0])["w"] - a
    best = np.vdot(raw, signal) / np.vdot(raw, raw)
    assert np.sum((delta - signal) ** 2) < 0.4 * np.sum((best * raw - signal) ** 2)


def adapter(base: Path, folder: Path, seed: int, **options) -> Path:
    peft, transformers, torch = (pytest.importorskip(name) for name in ("peft", "transformers", "torch"))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.copy_(torch.randn_like(value) * 0.1)
    adapted.save_pretrained(folder)
    adapted.merge_and_unload().save_pretrained(folder.with_name(folder.name + "_merged"))
    return folder


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 9}}),
        ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["v_proj"]}),
        ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_adapters_merge_as_peft_does(families, tmp_path, architecture, options):
    base = families[architecture][0]
    folder = adapter(base, tmp_path / "adapter", seed=1, **options)
    expected, start = load(tmp_path / "adapter_merged"), load(base)
    out = merge(base, folder, tmp_path / "out", tau=[0.0, 0.5, 1.0], dtype="float32").folders
    moved = 0
    for tau, target in zip([0.0, 0.5, 1.0], out):
        for name, value in load(target).items():
            wanted = start[name] + tau * (expected[name] - start[name])
            np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
            moved += not np.array_equal(value, start[name])
    assert moved >= 4


def test_soup_of_adapters_averages_products_not_factors(families, tmp_path):
    base = families["llama"][0]
    folders = [adapter(base, tmp_path / f"adapter{seed}", seed=seed) for seed in (1, 2)]
    merged = load(merge(base, folders, tmp_path / "out", dtype="float32").folders[0])
    first, second = (load(tmp_path / f"adapter{seed}_merged") for seed in (1, 2))
    for name, value in merged.items():
        np.testing.assert_allclose(value, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-6)


def test_dora_is_refused_with_the_reason(families, tmp_path):
    folder = adapter(families["llama"][0], tmp_path / "dora", seed=1, use_dora=True)
    with pytest.raises(ValueError, match=r"DoRA rescales .*merge_and_unload"):
        merge(families["llama"][0], folder, tmp_path / "out")


def test_layer_tau_by_pattern_and_by_file(pair, tmp_path):
    base, tuned, _ = pair
    (tmp_path / "taus.json").write_text(json.dumps({"layers.0*": 0.25, "norm": 0}))
    patterns = read_layer_taus(tmp_path / "taus.json")
    merged = load(merge(base, tuned, tmp_path / "out", tau=1.0, layer_tau=patterns).folders[0])
    a, b = load(base), load(tuned)
    expected = 0.75 * a["layers.0.weight"] + 0.25 * b["layers.0.weight"]
    np.testing.assert_allclose(merged["layers.0.weight"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["norm.weight"], a["norm.weight"])
    np.testing.assert_array_equal(merged["layers.1.weight"], b["layers.1.weight"])


def test_dtype_changes_values_index_and_config(tmp_path, generator):
    first = {"a.weight": generator.standard_normal((3, 3)).astype(np.float32)}
    shards = [first, {"b": np.float32([1]), "ids": np.arange(3)}]
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32"}}
    base, tuned = (write_sharded(tmp_path / name, shards, config) for name in ("base", "tuned"))
    out = merge(base, tuned, tmp_path / "out", tau=0.5, dtype="bfloat16").folders[0]
    checkpoint = Checkpoint(out)
    assert [checkpoint.tensors[name].dtype for name in ("a.weight", "b", "ids")] == ["BF16", "BF16", "I64"]
    assert checkpoint.index["metadata"]["total_size"] == 2 * 10 + 24
    assert checkpoint.config["dtype"] == checkpoint.config["text_config"]["torch_dtype"] == "bfloat16"


def test_integers_must_agree_or_are_taken_from_the_tuned_model_with_a_note(pair, tmp_path):
    base, tuned, _ = pair
    assert merge(base, tuned, tmp_path / "same", tau=0.5).notes == []
    change(tuned, position_ids=np.arange(5) + 7)
    outcome = merge(base, tuned, tmp_path / "out", tau=0.5)
    assert any("position_ids" in note and "tuned one is taken" in note for note in outcome.notes)
    np.testing.assert_array_equal(read_all(outcome.folders[0])["position_ids"], np.arange(5) + 7)


def change(folder: Path, config: dict | None = None, **changes) -> None:
    tensors = {**read_all(folder), **changes}
    write_single(folder, {name: value for name, value in tensors.items() if value is not None}, config)


MISMATCHES = {
    "missing": ({"mask": None}, "only in .*base: 1 tensor: mask"),
    "extra": ({"more": np.float32([1])}, "only in .*tuned: 1 tensor: more"),
    "shape": ({"layers.0.weight": np.zeros((8, 7), np.float32)}, r"F32 \[8, 6\] in the base, F32 \[8, 7\]"),
    "rows": ({"layers.0.weight": np.zeros((9, 6), np.float32)}, "--shared"),
    "dtype": ({"norm.weight": np.float32([1, 2])}, "F64 .* in the base, F32"),
    "architecture": ({"config": {"model_type": "another"}}, "'toy', .* is 'another'"),
    "quantised": ({"config": {"quantization_config": {"quant_method": "fp8"}}}, "quantised weights"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_models_that_do_not_fit_are_refused(pair, tmp_path, case):
    base, tuned, _ = pair
    changes, message = MISMATCHES[case]
    change(tuned, **changes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        merge(base, tuned, tmp_path / "out", tau=0.5)
    assert sorted(tmp_path.iterdir()) == before


def test_shared_averages_what_is_shared(pair, tmp_path):
    base, tuned, _ = pair
    longer = np.arange(60, dtype=np.float32).reshape(10, 6)
    change(tuned, **{"layers.0.weight": longer, "more": np.float32([5]), "mask": None})
    outcome = merge(base, tuned, tmp_path / "out", tau=0.5, shared=True)
    merged, a = read_all(outcome.folders[0]), read_all(base)["layers.0.weight"]
    np.testing.assert_allclose(merged["layers.0.weight"][:8], (a + longer[:8]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(merged["layers.0.weight"][8:], longer[8:])
    assert (merged["more"], "mask" in merged, len(outcome.notes)) == (5, False, 2)


def test_duplicated_tied_head_is_written_once(tmp_path, generator):
    embedding = generator.standard_normal((5, 4)).astype(np.float32)

    def toy(name, value, duplicate):
        tensors = {"model.embed_tokens.weight": value} | ({"lm_head.weight": value} if duplicate else {})
        return write_single(tmp_path / name, tensors, {"tie_word_embeddings": True})

    base = toy("base", embedding, True)
    for target in (toy("tuned", embedding + 1, False), toy("both", embedding + 1, True)):
        merged = read_all(merge(base, target, tmp_path / f"out_{target.name}", tau=0.5).folders[0])
        assert set(merged) == {"model.embed_tokens.weight"}
        np.testing.assert_allclose(merged["model.embed_tokens.weight"], embedding + 0.5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": float("nan")}, "tau must be finite"),
        ({"tau": []}, "at least one value"),
        ({"tau": [0.5, 0.5]}, "must not repeat"),
        ({"method": "ties"}, "method must be one of linear"),
        ({"method": "rank"}, "needs rank"),
        ({"rank": 3}, "rank belongs to method rank"),
        ({"method": "shrink"}, "at least 2 fine-tuned runs"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"layer_tau": {"nothing.*": 0.3}}, "fits no tensor"),
        ({"layer_tau": {"norm*": float("inf")}}, "tau must be finite"),
        ({"run_weights": [0.5]}, "sum to 1"),
        ({"dtype": "float16", "tau": 1e6}, "beyond the range of F16"),
    ],
)
def test_bad_arguments(pair, tmp_path, options, message):
    base, tuned, _ = pair
    with pytest.raises(ValueError, match=message):
        merge(base, tuned, tmp_path / "out", **{"tau": 0.5, **options})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_output_never_replaces_and_never_lies_inside_an_input(pair, tmp_path):
    base, tuned, _ = pair
    with pytest.raises(ValueError, match="outside the input"):
        merge(base, tuned, tuned / "merged")
    merge(base, tuned, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        merge(base, tuned, tmp_path / "out")


def test_extrapolation_is_noted(pair, tmp_path):
    assert merge(pair[0], pair[1], tmp_path / "out", tau=1.5).notes == ["τ = 1.5 is outside [0, 1]: extrapolation"]


def test_disk_space_is_checked_first(pair, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="the disk has 1e-07 GB free"):
        merge(pair[0], pair[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Interrupted(Exception):
    pass


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change_input", [False, True])
def test_an_interrupted_merge_resumes_or_starts_clean(tmp_path, generator, change_input):
    def toy(name):
        shards = [{f"w{i}": generator.standard_normal(50).astype(np.float32)} for i in range(4)]
        return write_sharded(tmp_path / name, shards)

    base, tuned = toy("base"), toy("tuned")

    def stop_late(done, total):
        if done > 0.6 * total:
            raise Interrupted

    with pytest.raises(Interrupted):
        merge(base, tuned, tmp_path / "out", tau=[0.2, 0.7], progress=stop_late)
    assert not (tmp_path / "out").exists()
    if change_input:
        tuned = toy("tuned")
    outcome = merge(base, tuned, tmp_path / "out", tau=[0.2, 0.7])
    assert outcome.resumed_shards == (0 if change_input else 2)
    merge(base, tuned, tmp_path / "fresh", tau=[0.2, 0.7])
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("taus", [[0.4], [0.2, 0.7]])
def test_stopped_before_the_last_rename_or_by_a_power_cut(tmp_path, generator, monkeypatch, taus):
    """Without its identity the work starts clean; a shard that the disk has lost is written again."""
    shards = [{f"w{i}": generator.standard_normal(50).astype(np.float32)} for i in range(3)]
    base = write_sharded(tmp_path / "base", shards)
    tuned = write_sharded(tmp_path / "tuned", [{name: -value for name, value in shard.items()} for shard in shards])
    whole = merge(base, tuned, tmp_path / "whole", tau=taus).folders

    def stop(*_):
        raise Interrupted

    for when, resumed in (("linfit.bridge.output._write_index", 2), ("os.rename", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(when, stop)
            with pytest.raises(Interrupted):
                merge(base, tuned, tmp_path / "out", tau=taus)
        assert not (tmp_path / "out").exists()
        next((tmp_path / ".out.partial").rglob("model-00002*.safetensors")).unlink()
        outcome = merge(base, tuned, tmp_path / "out", tau=taus)
        assert outcome.resumed_shards == resumed
        for one, two in zip(whole, outcome.folders):
            assert contents(one) == contents(two)
        assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "whole", "out"}
        shutil.rmtree(tmp_path / "out")


KILLED = """
import sys
from linfit.bridge import merge
print("ready", flush=True)
outcome = merge(sys.argv[1], sys.argv[2], sys.argv[3], tau=[float(tau) for tau in sys.argv[4].split(",")])
print(outcome.resumed_shards)
assert "jax" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("taus", ["0.3,0.8", "0.6"])
def test_a_merge_killed_at_any_moment_leaves_nothing_half_done(tmp_path, seed, taus):
    """SIGKILL after random shares of the output are written: `out` is absent or whole, and running again works."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1_000, 80_000, size=(12, 15))

    def toy(name):
        shards = [
            {f"layers.{i}.{j}": generator.standard_normal(size, dtype=np.float32) for j, size in enumerate(row)}
            for i, row in enumerate(sizes)
        ]
        return write_sharded(tmp_path / name, shards)

    base, tuned, out = toy("base"), toy("tuned"), tmp_path / "out"

    def start(target):
        command = [sys.executable, "-c", KILLED, str(base), str(tuned), str(target), taus]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    def written():
        total = 0
        for path in (tmp_path / ".out.partial").rglob("*"):
            with suppress(FileNotFoundError):  # renamed meanwhile
                total += path.stat().st_size
        return total

    printed, errors = start(tmp_path / "undisturbed").communicate()
    assert printed, errors
    expected = contents(tmp_path / "undisturbed")
    total = sum(map(len, expected.values()))
    killed, resumed = 0, []
    for share in [*np.sort(generator.uniform(0, 0.95, 8)), None]:
        process = start(out)
        if share is not None:
            while process.poll() is None and written() < share * total:
                time.sleep(0.0005)
            process.kill()
        printed, errors = process.communicate()
        if out.exists():  # whole, even where the process was killed just after
            assert contents(out) == expected
            assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "undisturbed", "out"}
            resumed += [int(printed)] if process.returncode == 0 else []
            shutil.rmtree(out)
        else:
            assert process.returncode == -signal.SIGKILL, errors
            assert {path.name for path in tmp_path.iterdir()} <= {"base", "tuned", "undisturbed", ".out.partial"}
            killed += 1
    assert process.returncode == 0, errors  # the last run was left alone
    assert killed >= 3
    assert max(resumed) > 0


def test_side_files_are_copied_but_never_weights_or_training_state(pair, tmp_path):
    base, tuned, _ = pair
    wanted = ("tokenizer.json", "chat_template.jinja", "modeling_toy.py", "additional_chat_templates/tool.jinja")
    unwanted = ("optimizer.pt", "pytorch_model.bin", "trainer_state.json", ".cache/x.json", "checkpoint-5/config.json")
    for name in wanted + unwanted:
        (tuned / name).parent.mkdir(exist_ok=True)
        (tuned / name).write_text(name)
    out = merge(base, tuned, tmp_path / "out").folders[0]
    for name in wanted:
        assert (out / name).read_text() == name
    for name in unwanted:
        assert not (out / name).exists()


MEASURE = """
import re, sys
import ml_dtypes
import linfit.bridge.inspection, linfit.bridge.merging
from linfit.bridge import inspect, merge
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
exec(sys.argv[1])
print(peak() - before)
"""


def megabytes_of(action: str) -> float:
    """Memory that an action needs in a fresh process, beyond the runtime."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, action]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """One tensor of 320 MB; under the 300 MB allowed, numba included."""
    size = 320_000_000
    header = json.dumps({"w": {"dtype": "BF16", "shape": [80_000, 2000], "data_offsets": [0, size]}}).encode()
    for name, bits in (("base", 0x3F80), ("tuned", 0x4000)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "model.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + np.full(1000, bits, np.uint16).tobytes())
            file.truncate(8 + len(header) + size)
    base, tuned, out = (str(tmp_path / name) for name in ("base", "tuned", "out"))
    assert 1 < megabytes_of(f"merge({base!r}, {tuned!r}, {out!r}, tau=0.3)") < 200
    bits = np.fromfile(tmp_path / "out" / "model.safetensors", np.uint16, count=1001, offset=8 + len(header))
    np.testing.assert_array_equal(bits, [0x3FA6] * 1000 + [0])  # 0.7 · 1 + 0.3 · 2


@pytest.mark.slow
def test_memory_of_spectra_does_not_grow_with_the_tensor(tmp_path):
    """A shorter side beyond the exact one; its Gram matrix alone would take 105 MB, the delta 126 MB."""
    generator = np.random.default_rng(0)
    shape = (6144, 5120)
    spikes = generator.standard_normal((shape[0], 3)) @ generator.standard_normal((3, shape[1])) * 0.5
    values = generator.standard_normal(shape, dtype=np.float32)
    base = write_single(tmp_path / "base", {"w": np.zeros(shape, np.float16)})
    tuned = write_single(tmp_path / "tuned", {"w": (values + spikes).astype(np.float16)})
    folders = f"{str(base)!r}, {str(tuned)!r}"
    assert 1 < megabytes_of(f"assert inspect({folders}).tensors[0].above_edge == 3") < 200
    assert 1 < megabytes_of(f"merge({folders}, {str(tmp_path / 'out')!r}, method='singular')") < 200
