"""An encoder on a byte-level tokenizer with `bos_token` and `eos_token` around a text: rows to export."""

import json

import numpy as np
import pytest

from dwt_jax.config_loader import load_config
from dwt_jax.data.data_cache import get_prepared
from dwt_jax.data.dataset import num_rows, open_dataset, read_rows
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.eval.evaluate_model import evaluate_model
from dwt_jax.eval.evaluate_pairs import evaluate_pairs
from dwt_jax.objectives import objective_module
from dwt_jax.objectives.targets import EVALUATION_SEED, row_keys
from dwt_jax.train.loop import train
from helpers.masked_models import FRAME, framed_tokenizer
from helpers.run_records import records, summary
from helpers.runs import make_project

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ENCODER = {
    "model.model_type": "eurobert",
    "model.num_attention_heads": "4",
    "model.num_key_value_heads": "2",
    "model.intermediate_size": "48",
    "model.tie_word_embeddings": "false",
    "train.steps": "60",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(folder with a corpus and a tokenizer, overrides, config)"""
    folder = tmp_path_factory.mktemp("project")
    spec = str(make_project(folder))
    framed_tokenizer((folder / "corpus.txt").read_text().splitlines(), 320).save_pretrained(folder / "framed")
    overrides = {**ENCODER, "data.tokenizer.path": str(folder / "framed")}
    return folder, overrides, spec


@pytest.fixture(scope="module")
def student(project):
    """A run with a teacher of one layer."""
    folder, overrides, spec = project
    train(load_config(spec, {**overrides, "model.num_hidden_layers": "1"}), folder / "teacher")
    taught = {"teacher.path": str(folder / "teacher"), "distill.preset": "early_decay"}
    train(load_config(spec, {**overrides, **taught}), folder / "student")
    return folder / "student"


def test_each_segment_of_a_row_stands_in_the_frame(project, log_lines):
    folder, overrides, spec = project
    data = get_prepared(load_config(spec, overrides).data)
    assert not any("warning" in line for line in log_lines), log_lines
    auto = transformers.AutoTokenizer.from_pretrained(folder / "framed")
    corpus = (folder / "corpus.txt").read_text().splitlines()
    rows, count = open_dataset(data, "train"), 0
    for row in range(num_rows(rows)):
        batch = read_rows(rows, np.array([row]))
        tokens, segments = np.asarray(batch.tokens)[0], np.asarray(batch.segment_ids)[0]
        for segment in range(1, segments.max() + 1):
            ids = tokens[segments == segment].tolist()
            assert (ids[0], ids[-1]) == (auto.bos_token_id, auto.eos_token_id)
            text = auto.decode(ids[1:-1]).strip()
            assert any(text in line for line in corpus)
            count += auto(text).input_ids == ids
    assert count > 50  # the others begin with the space before a sentence


def test_it_learns_with_a_teacher_and_is_loaded_by_transformers(student):
    first, last = records(student)[0], records(student)[-1]
    assert last["loss"] < first["loss"] - 1
    assert summary(student)["teacher_steps"] == 30
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(
        student / "model", output_loading_info=True
    )
    assert isinstance(model, transformers.EuroBertForMaskedLM)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(student / "model")
    assert {role: getattr(tokenizer, f"{role}_token") for role in FRAME} == FRAME
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id
    card = (student / "model" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM" in card


def test_transformers_gives_the_held_out_loss_of_the_exported_model(project, student):
    """Over the fixed masks of the held-out rows, a segment at a time."""
    _, overrides, spec = project
    data = get_prepared(load_config(spec, overrides).data)
    model = transformers.AutoModelForMaskedLM.from_pretrained(student / "model").eval()
    module = objective_module("mlm")
    objective = module.make_evaluation_objective(load_vocabulary(data / "tokenizer"))
    rows = open_dataset(data, "held_out")
    numbers = np.arange(num_rows(rows), dtype=np.int32)
    batch = read_rows(rows, numbers.astype(np.int64))
    targets = module.make_targets(batch, row_keys(EVALUATION_SEED, 0, numbers), objective)
    total = count = 0
    for row in numbers:
        segments, inputs = np.asarray(batch.segment_ids)[row], np.asarray(targets.inputs)[row]
        log_p = np.zeros((len(inputs), model.config.vocab_size))
        for segment in range(1, segments.max() + 1):
            is_segment = segments == segment
            with torch.no_grad():
                ids = torch.tensor(inputs[is_segment].astype(np.int64))[None]
                log_p[is_segment] = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0].numpy()
        positions, labels, weights = (
            np.asarray(x)[row] for x in (targets.positions, targets.labels, targets.weights)
        )
        total -= (weights * log_p[positions, labels]).sum()
        count += weights.sum()
    held_out = summary(student)["held_out"]
    assert held_out["predictions"] == count
    assert held_out["held_out_loss"] == pytest.approx(total / count, abs=1e-4)
    assert evaluate_model(str(student), data, 8)["held_out_loss"] == pytest.approx(total / count, abs=1e-4)


def test_minimal_pairs_are_told_apart(student, tmp_path):
    """By the pseudo log-likelihood: words of the corpus, and those that it does not have."""
    words = ["cat", "dog", "bird", "horse", "child"]
    pairs = [
        f"The old {a} sxxs the gruun {b}.\nThe old {a} sees the green {b}.\n" for a in words for b in words
    ]
    (tmp_path / "words-new.txt").write_text("".join(pairs))
    assert evaluate_pairs(str(student), str(tmp_path))["accuracy"] > 90


def test_the_tokenizer_of_a_decoder_is_refused(project, tmp_path):
    folder, overrides, spec = project
    settings = json.loads((folder / "framed" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text((folder / "framed" / "tokenizer.json").read_text())
    del settings["mask_token"]
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    changes = {"data.tokenizer.path": str(tmp_path / "tokenizer"), "data.sequence_length": "24"}
    config = load_config(spec, {**overrides, **changes})
    with pytest.raises(UserError, match="the tokenizer has no mask_token, expected one for a masked"):
        train(config, tmp_path / "run")


def test_keys_without_a_meaning_for_an_encoder_are_refused(project):
    _, overrides, spec = project
    with pytest.raises(UserError, match=r"model\.sliding_window is 4, expected 0 for model_type eurobert"):
        load_config(spec, {**overrides, "model.sliding_window": "4"})
    with pytest.raises(UserError, match=r"model\.classifier_pooling is 'mean', expected none for model_type"):
        load_config(spec, {"model.model_type": "llama", "model.classifier_pooling": "mean"})
