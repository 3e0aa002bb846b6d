"""Every command that the README shows runs, at tiny size, and has the options that it shows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sims.laboratory.toy_language import make_family

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHOWN = [line.split("#")[0].split() for line in re.findall(r"^linfit .*$", README, flags=re.MULTILINE)]
LINFIT = str(Path(sys.executable).with_name("linfit"))
pytestmark = pytest.mark.slow


def run(*arguments, cwd):
    return subprocess.run([LINFIT, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy base model with two fine-tuned ones, held-out text, and features with targets."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("readme")
    make_family(path / "models", runs=2, pretrain_steps=4, finetune_steps=2)
    rows = [{"input_ids": list(range(2, 2 + n)), "labels": list(range(2, 2 + n))} for n in (6, 5, 7, 4, 8)]
    (path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = np.random.default_rng(0)
    X = generator.standard_normal((12, 20))
    np.savez(path / "FILE.npz", X=X, y=X[:, 0] + generator.standard_normal(12), theta_1=np.zeros(20))
    return path


TINY = [  # in the order in which the README does it
    (
        "sweep",
        "overadaptation",
        "--n",
        "8",
        "--p",
        "12",
        "--penalty",
        "1e-2:1:3:log",
        "--tau",
        "0:1:3",
        "--noise-std",
        "0.1,0.5",
        "--seeds",
        "2",
        "--store",
        "oa.zarr",
    ),
    ("verify", "S2", "O3", "--quick", "--falsify", "--json"),
    ("select", "FILE.npz", "--json", "--out", "select.png"),
    ("inspect", "models/base", "models/tuned_0", "models/tuned_1"),
    ("merge", "models/base", "models/tuned_0", "--tau", "0,0.25,0.5,0.75,1", "-o", "OUT"),
    ("losses", "OUT/tau_0.5", "heldout.jsonl", "-o", "0.5.jsonl"),
    ("losses", "OUT/tau_0", "heldout.jsonl", "-o", "0.jsonl"),
    ("losses", "OUT/tau_1", "heldout.jsonl", "-o", "1.jsonl"),
    ("curve", "0=0.jsonl", "0.5=0.5.jsonl", "1=1.jsonl"),
    ("plan", "models/base", "models/tuned_0", "models/tuned_1", "--json"),
    ("predict", "models/base", "heldout.jsonl", "heldout.jsonl", "--rate", "1e-3"),
]
ELSEWHERE = {"explore", "figures"}  # tests/test_explorer.py; `linfit figures --quick` in .ci/run


def test_the_commands_of_the_readme_run_one_after_the_other(folder):
    for arguments in TINY:
        answer = run(*arguments, cwd=folder)
        assert answer.returncode == 0, (arguments, answer.stderr)
        assert answer.stdout, arguments
    assert {words[1] for words in SHOWN} == {arguments[0] for arguments in TINY} | ELSEWHERE  # none is left out


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_the_options_of_the_readme_exist(words, tmp_path):
    command = words[1:3] if words[1] == "sweep" else words[1:2]
    help = run(*command, "--help", cwd=tmp_path).stdout
    for option in re.findall(r"--[a-z-]+", " ".join(words)):
        assert option in help, f"linfit {' '.join(command)} has no {option}"
