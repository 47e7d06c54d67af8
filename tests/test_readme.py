"""The commands of the README, run as they stand there (with a few steps of a small model)."""

import re
import shlex
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from helpers.runs import dwt, write_corpus

README = (ROOT / "README.md").read_text()

SMALL = [
    "--config.train.epochs=0",
    "--config.train.steps=2",
    "--config.train.save_every=1",
    "--config.train.batch_size=8",
    "--config.model.hidden_size=32",
    "--config.model.num_attention_heads=2",
    "--config.model.intermediate_size=64",
]


def commands(block: str) -> list[list[str]]:
    """Lines of a code block as argument lists, continued lines joined."""
    return [shlex.split(line) for line in block.replace("\\\n", " ").strip().splitlines()]


@pytest.mark.slow
def test_commands_for_an_own_model_run(tmp_path):
    blocks = "".join(re.findall(r"```\n(dwt .*?)```", README, re.DOTALL))
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus" / "a.txt", documents=300)
    text = (tmp_path / "corpus" / "a.txt").read_text()
    (tmp_path / "corpus" / "a.txt").write_text(text.replace("\n", "\n\n"))  # empty lines separate documents
    (tmp_path / "texts.txt").write_text("".join(f"{line}\n" for line in text.splitlines()[:3]))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert {line[1] for line in commands(blocks)} >= {
        "prepare",
        "train",
        "evaluate",
        "remap",
        "export",
        "predict",
    }
    for name, command, *arguments in commands(blocks):
        assert name == "dwt"
        extra = SMALL if command in ("train", "remap", "remap-run") else []
        if command == "finetune":
            extra = [
                "--config.examples.max_train_examples=64",
                "--config.recipe.epochs=1",
                "--config.recipe.seeds=[0]",
            ]
        if command == "prepare":
            extra = ["--config.data.tokenizer.vocab_size=300", "--config.data.validation_fraction=0.2"]
        if command == "train" or "--carry" in arguments:
            extra = [
                *extra,
                "--config.data.tokenizer.vocab_size=300",
                "--config.data.validation_fraction=0.2",
            ]
        arguments = ["--step=1" if word == "--step=1000" else word for word in arguments]
        found = dwt(command, *arguments, *extra, cwd=tmp_path)
        assert found.returncode == 0, f"{command}: {found.stderr}"
    assert (tmp_path / "larger" / "model.safetensors").exists()
    assert (tmp_path / "grown" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "larger" / "model" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "downstream" / "era" / "model" / "model.safetensors").exists()
    python = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert python
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-c", python.group(1)], check=True, cwd=tmp_path)


def test_the_two_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_files_that_are_linked_exist():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
