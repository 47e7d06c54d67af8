"""Models that others have trained, beside data of the same vocabulary."""

import dataclasses
import json

import pytest

from dwt_jax.cli import main
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.runs.pretrained import check_vocabulary
from helpers.runs import prepared_project
from helpers.torch_models import SMALL, torch_model

WARNING = (
    "warning: {} has the data's vocabulary, but another tokenizer: normalizer.lowercase is False, "
    "the data's is True"
)


@pytest.mark.parametrize("is_cased", [False, True])
def test_cased_teacher_of_lowercased_rows_is_named_by_train_and_evaluate(tmp_path, capsys, is_cased):
    config, rows, teacher = prepared_project(tmp_path), tmp_path / "rows", tmp_path / "teacher"
    vocab = load_vocabulary(rows / "tokenizer")
    model = torch_model("BertForMaskedLM", {**SMALL, "vocab": len(vocab)})
    model.config.max_position_embeddings = 32
    type(model)(model.config).save_pretrained(teacher)
    (teacher / "vocab.txt").write_text("\n".join(vocab.tokens))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": not is_cased}
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    options = [f"--config.teacher.path={teacher}", "--config.train.steps=1"]
    for key, command in (
        ("teacher.path", ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *options]),
        ("--model", ["evaluate", f"--model={teacher}", f"--data={rows}"]),
    ):
        assert main(command) == 0
        expected = [f"{key}: {WARNING.format(teacher)}"] if is_cased else []
        assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == expected


def test_only_the_merges_of_a_shorter_vocabulary_may_differ(tmp_path, capsys):
    prepared_project(tmp_path)
    data = load_vocabulary(tmp_path / "rows" / "tokenizer")
    fewer = dataclasses.replace(data, tokens=data.tokens[:-1], pipeline={**data.pipeline, "merges": "other"})
    check_vocabulary("init.from", "path", fewer, data, allow_fewer_tokens=True)
    assert capsys.readouterr().err == ""
    check_vocabulary("init.from", "path", dataclasses.replace(fewer, tokens=data.tokens), data)
    assert "another tokenizer: merges is other, the data's is " in capsys.readouterr().err
    with pytest.raises(UserError, match=f"path has another vocabulary, of {len(data) - 1} tokens"):
        check_vocabulary("--model", "path", fewer, data)
