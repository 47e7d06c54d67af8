"""The command line as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dwt_jax.__main__ import COMMANDS
from helpers.paths import ROOT
from helpers.runs import dwt, environment, make_project


@pytest.mark.parametrize("verb", ["", *COMMANDS])
def test_help_answers_at_once(verb):
    """Under a second, because nothing heavy is imported."""
    arguments = [verb, "--help"] if verb else ["--help"]
    code = f"import sys; from dwt_jax.__main__ import main\ntry: main({arguments!r})\n"
    code += "except SystemExit as e: code = e.code\n"
    code += "heavy = {'jax', 'flax', 'optax', 'orbax', 'transformers', 'tensorflow_datasets', 'numpy'}\n"
    code += "sys.exit(code or sorted(heavy & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert found.returncode == 0, found.stderr
    assert "usage: dwt" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--workdir=x"], "--config"),
        (["train", "--config=nowhere.py", "--workdir=x"], "no file 'nowhere.py'"),
        (["train", "--config=configs/demo.py:tutor", "--workdir=x"], "expected one of teacher, student"),
        (
            ["train", "--config=configs/demo.py", "--config.train.stepz=3", "--workdir=x"],
            "did you mean 'train.steps'?",
        ),
        (["train", "--config=configs/demo.py", "--config.train.steps=1.5", "--workdir=x"], "a whole number"),
        (["train", "--config=configs/demo.py", "--config.train.steps", "--workdir=x"], "train.steps"),
        (["train", "--config=configs/demo.py", "--workdir=x", "--turbo"], "--turbo"),
        (["evaluate", "--model=nowhere", "--data=nowhere"], "nowhere"),
        (["report", "--workdir=nowhere"], "nowhere"),
        (["evaluate", "--config.seed=3", "--model=a", "--data=b"], "takes no config"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, says, tmp_path):
    found = dwt(*arguments, cwd=ROOT)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert says in found.stderr
    assert not (ROOT / "x").exists()


def test_prepare_and_evaluate(tmp_path):
    config = make_project(tmp_path)
    rows, run = tmp_path / "rows", tmp_path / "run"
    prepared = dwt("prepare", f"--config={config}", f"--workdir={rows}", "--workers=1")
    assert prepared.returncode == 0, prepared.stderr
    trained = dwt("train", f"--config={config}:{rows}", "--config.train.steps=4", f"--workdir={run}")
    assert trained.returncode == 0, trained.stderr
    outputs = [
        dwt("evaluate", f"--model={model}", f"--data={rows}", "--json", f"--batch-size={size}")
        for model, size in ((run, 64), (run / "model", 7))
    ]
    first, second = (json.loads(found.stdout) for found in outputs)
    assert first == pytest.approx(second, rel=1e-5)  # the masks do not depend on the batch size
    assert first["perplexity"] == pytest.approx(2.718281828459045 ** first["held_out_loss"])
    assert 0 <= first["top1_accuracy"] <= first["top5_accuracy"] <= 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out"]["held_out_loss"] == pytest.approx(first["held_out_loss"], rel=1e-5)


def test_verbs_and_the_installed_script_are_the_same(tmp_path):
    script = Path(sys.executable).parent / "dwt"
    if not script.exists():
        pytest.skip("the package is not installed here")
    found = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert found.stdout == dwt("--version").stdout


def test_no_torch_in_the_package():
    for file in (ROOT / "dwt_jax").rglob("*.py"):
        assert "import torch" not in file.read_text(), file
