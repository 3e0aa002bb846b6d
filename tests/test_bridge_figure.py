"""The figure of a small real model, at tiny size; the weighted loss of the documentation."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.mark.slow
def test_figure_is_drawn_with_its_numbers():
    pytest.importorskip("transformers")
    from figures.bridge import pictures

    (picture,) = pictures(jax.random.key(3), quick=True)
    assert picture.data["sums_loss"].dims == ("who", "tau", "sum")
    one, average = picture.data["sums_loss"].mean("sum").values
    assert one[0] == average[0]  # τ = 0 is the base in both
    assert np.isfinite(picture.data["singular_value"]).all()
    assert "seed 3" in picture.caption(picture.data)
    assert len(picture.draw(picture.data).axes) == 3


def test_the_weighted_loss_of_the_documentation():
    """With weights 1 it is the model's own loss; in general Σ w_i Σ_t nll / tokens."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from sims.laboratory.toy_language import build

    text = (Path(__file__).parents[1] / "docs" / "bridge.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(class WeightedTrainer.*?)```", text, re.DOTALL)[1]
    names = {"Trainer": object, "torch": torch}
    exec(code, names)
    trainer, model = names["WeightedTrainer"](), build("llama", hidden=16, layers=1).eval()
    ids = torch.arange(1, 25).reshape(3, 8)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        own = model(input_ids=ids, labels=labels).loss
        plain = trainer.compute_loss(model, {"input_ids": ids, "labels": labels, "weight": torch.ones(3)})
        assert torch.allclose(own, plain)
        weight = torch.tensor([0.2, 1.0, 0.5])
        weighted = trainer.compute_loss(model, {"input_ids": ids, "labels": labels, "weight": weight})
        parts = [
            trainer.compute_loss(model, {"input_ids": ids, "labels": labels, "weight": torch.eye(3)[row]})
            for row in range(3)
        ]
    assert torch.allclose(weighted, sum(w * part for w, part in zip(weight, parts)))
    assert transformers.__version__
