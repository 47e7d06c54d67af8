"""Decoders from a corpus to transformers: tokenizer, rows, training, a teacher of another type, export."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dwt_jax.config import Teacher
from dwt_jax.config_loader import load_config
from dwt_jax.data.data_cache import get_prepared
from dwt_jax.data.dataset import num_rows, open_dataset, read_rows
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.eval.fill_mask import fill_masks
from dwt_jax.eval.generate import continue_texts, decode_continuation
from dwt_jax.finetune.predict import load_classifier
from dwt_jax.train.loop import train
from helpers.decoders import KINDS, TEXT, save_decoder_tokenizer
from helpers.prepared_data import hash_fraction
from helpers.run_records import assert_same_run, cut_after, records, summary
from helpers.runs import dwt, make_project

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DECODER = {
    "model.model_type": "qwen3",
    "model.num_key_value_heads": "1",
    "model.intermediate_size": "48",
    "data.row_mode": "wrapped",
    "data.end_token": "documents",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(folder with a corpus, config)"""
    folder = tmp_path_factory.mktemp("project")
    return folder, str(make_project(folder))


def config_of(project, kind, **overrides):
    folder, spec = project
    tokenizer = folder / kind
    if not tokenizer.exists():
        save_decoder_tokenizer(tokenizer, kind, folder / "corpus.txt")
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(spec, {**DECODER, "data.tokenizer.path": str(tokenizer), **keys})


@pytest.fixture(scope="module")
def teacher(project):
    """A Llama on the tokenizer of the Qwen."""
    config = config_of(project, "qwen2", model__model_type="llama", model__num_hidden_layers="1")
    train(config, project[0] / "teacher")
    return project[0] / "teacher"


@pytest.fixture(scope="module")
def student(project, teacher):
    config = config_of(
        project, "qwen2", teacher__path=str(teacher), distill__preset="early_decay", train__steps="60"
    )
    train(config, project[0] / "student")
    return project[0] / "student"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_ids_of_transformers_between_the_tokens_of_the_decoder(project, kind, log_lines):
    config = config_of(project, kind)
    data = get_prepared(config.data)
    assert not any("warning" in line for line in log_lines), log_lines
    auto = transformers.AutoTokenizer.from_pretrained(project[0] / kind)
    begin = auto.eos_token_id if auto.bos_token_id is None else auto.bos_token_id
    documents = [[begin]]
    rows = open_dataset(data, "train")
    for row in range(num_rows(rows)):
        batch = read_rows(rows, np.array([row]))
        tokens, segments = np.asarray(batch.tokens)[0], np.asarray(batch.segment_ids)[0]
        for segment in range(1, segments.max() + 1):
            ids = tokens[segments == segment].tolist()
            assert ids[0] == begin
            documents[-1] += ids[1:]
            if ids[-1] == auto.eos_token_id:
                documents.append([begin])
    texts = open(config.data.sources[0].path).read().splitlines()
    encoded = (auto(text, add_special_tokens=False).input_ids for text in texts)
    expected = {(begin, *ids, auto.eos_token_id) for ids in encoded}
    assert documents.pop() == [begin]
    assert len(documents) > 80
    assert {tuple(ids) for ids in documents} <= expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_copied_tokenizer_is_that_of_the_decoder(project, kind):
    data = get_prepared(config_of(project, kind).data)
    before = transformers.AutoTokenizer.from_pretrained(project[0] / kind)
    after = transformers.AutoTokenizer.from_pretrained(data / "tokenizer")
    assert after(TEXT).input_ids == before(TEXT).input_ids
    assert after.special_tokens_map == before.special_tokens_map
    vocabulary = load_vocabulary(data / "tokenizer")
    assert (vocabulary.mask_id, vocabulary.sep_id) == (-1, before.eos_token_id)
    assert vocabulary.unk_id == (-1 if before.unk_token_id is None else before.unk_token_id)


def test_a_masked_model_with_the_tokenizer_of_a_decoder_is_refused(project, tmp_path):
    tokenizer = save_decoder_tokenizer(tmp_path / "tokenizer", "llama", project[0] / "corpus.txt")
    config = load_config(project[1], {"data.tokenizer.path": str(tokenizer)})
    with pytest.raises(UserError, match="the tokenizer has no mask_token, expected one for a masked"):
        train(config, tmp_path / "run")


def test_a_teacher_of_another_objective_is_refused(project, tmp_path):
    """A decoder on the tokenizer of a masked model has its vocabulary."""
    decoder = load_config(project[1], {"model.model_type": "llama", "train.steps": "1"})
    train(decoder, tmp_path / "decoder")
    masked = load_config(project[1], {"train.steps": "1"})
    train(masked, tmp_path / "masked")
    for student, teacher, message in (
        (masked, "decoder", "is a llama, which has the next-token loss, expected a model with the student's"),
        (decoder, "masked", "is a bert, which has the masked-LM loss, expected a model with the student's"),
    ):
        path = str(tmp_path / teacher)
        for key, value in (("path", path), ("paths", (path, path))):
            with_teacher = dataclasses.replace(student, teacher=Teacher(**{key: value}))
            with pytest.raises(UserError, match=f"^teacher.{key}: {path} {message}"):
                train(with_teacher, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_settings_of_masks_are_refused_beside_a_decoder(project):
    with pytest.raises(UserError, match=r"mlm\.whole_word is True, expected a model_type of masked models"):
        config_of(project, "llama", mlm__whole_word="true")


def test_a_decoder_learns_with_a_teacher_of_another_type(student):
    first, last = records(student)[0], records(student)[-1]
    assert last["loss"] < first["loss"] - 1
    assert summary(student)["teacher_steps"] == 30
    held_out = summary(student)["held_out"]
    assert held_out["held_out_loss"] < 3.5


def test_an_interrupted_run_of_a_decoder_is_the_same_bit_for_bit(project, teacher, tmp_path):
    config = config_of(project, "qwen2", teacher__path=str(teacher), distill__preset="paper_decay")
    train(config, tmp_path / "whole")
    cut_after(tmp_path / "whole", tmp_path / "resumed", 8)
    train(config, tmp_path / "resumed")
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_microbatches_give_the_same_losses(project, tmp_path):
    for count in ("1", "4"):
        config = config_of(project, "qwen2", train__gradient_accumulation_steps=count)
        train(config, tmp_path / count)
    one, four = records(tmp_path / "1"), records(tmp_path / "4")
    np.testing.assert_allclose([r["loss"] for r in four], [r["loss"] for r in one], rtol=1e-4)


def test_transformers_gives_the_held_out_loss_of_the_exported_model(project, student):
    """Perplexity over the held-out rows, computed in torch from the directory alone."""
    data = get_prepared(config_of(project, "qwen2").data)
    model = transformers.AutoModelForCausalLM.from_pretrained(student / "model").eval()
    rows = open_dataset(data, "held_out")
    total = count = 0
    for row in range(num_rows(rows)):
        batch = read_rows(rows, np.array([row]))
        tokens, segments = np.asarray(batch.tokens)[0], np.asarray(batch.segment_ids)[0]
        for segment in range(1, segments.max() + 1):
            ids = torch.tensor(tokens[segments == segment].astype(np.int64))[None]
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0]
            total -= log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item()
            count += ids.shape[1] - 1
    held_out = summary(student)["held_out"]
    assert held_out["predictions"] == count
    assert held_out["held_out_loss"] == pytest.approx(total / count, abs=1e-4)
    lines = (project[0] / "corpus.txt").read_text().splitlines()
    num_bytes = sum(len(line) for line in lines if hash_fraction(line) < 0.2)
    assert held_out["bits_per_byte"] == pytest.approx(total / np.log(2) / num_bytes, rel=1e-4)
    evaluations = records(student, "evaluations.jsonl")
    assert [record["bits_per_byte"] for record in evaluations][-1] == held_out["bits_per_byte"]
    card = (student / "model" / "README.md").read_text()
    assert f"| bits per byte | {held_out['bits_per_byte']:.4f} |" in card
    assert "type: bits_per_byte" in card
    assert "pipeline_tag: text-generation" in card
    assert "AutoModelForCausalLM" in card


def test_continuations_are_those_of_transformers(student):
    model = transformers.AutoModelForCausalLM.from_pretrained(student / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(student / "model")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    for text in ("The old", "The quick cat sees"):
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        new = model.generate(
            torch.tensor([ids]), max_new_tokens=26, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )[0, len(ids) :]
        before = tokenizer.decode(ids, skip_special_tokens=True)
        expected = tokenizer.decode([*ids, *new], skip_special_tokens=True)[len(before) :]
        assert continue_texts(str(student), [text], max_new_tokens=26) == [expected]


@pytest.mark.parametrize("kind", [*KINDS, "wordpiece"])
def test_a_text_and_its_continuation_make_one_text(tmp_path, kind):
    """Decoded alone, a word of Metaspace loses the space before it, and of WordPiece a part keeps '##'."""
    if kind == "wordpiece":
        vocab = {token: i for i, token in enumerate(["[UNK]", "the", "cat", "##s", "see", "."])}
        tokenizer = Tokenizer(models.WordPiece(vocab))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    else:
        (tmp_path / "corpus.txt").write_text(TEXT)
        save_decoder_tokenizer(tmp_path / kind, kind, tmp_path / "corpus.txt")
        tokenizer = load_hf_tokenizer(tmp_path / kind)
    ids = tokenizer.encode("the cats see the cat.", add_special_tokens=False).ids
    assert len(ids) > 4
    for end in range(1, len(ids)):
        text = tokenizer.decode(ids[:end])
        assert text + decode_continuation(tokenizer, ids[:end], ids[end:]) == "the cats see the cat."


def test_draws_depend_on_the_seed_and_the_text_alone(student):
    def draw(texts, seed):
        return continue_texts(str(student), texts, max_new_tokens=12, temperature=2.0, seed=seed)

    assert draw(["The old", "The old"], 0) == draw(["The old", "The old"], 0)
    assert draw(["The old", "A"], 0)[0] == draw(["The old"], 0)[0]
    assert draw(["The old"], 0) != draw(["The old"], 1)
    assert len(set(draw(["The old", "The old"], 0))) == 2


def test_the_command_prints_a_line_for_each_text(student):
    done = dwt("generate", f"--model={student}", "--max-new-tokens=3", "--json", "The old", "A child")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["The old", "A child"]
    assert lines[0]["continuation"] == continue_texts(str(student), ["The old"], max_new_tokens=3)[0]


def test_what_does_not_fit_the_model_is_one_line(student):
    with pytest.raises(UserError, match="tokens, expected fewer than the model's 32 positions"):
        continue_texts(str(student), ["cat " * 40])
    with pytest.raises(UserError, match="predicts next tokens, expected a masked model"):
        fill_masks(str(student), ["a"])
    with pytest.raises(UserError, match=r"has no classification head \(it has decoder\), expected"):
        load_classifier(str(student))
    with pytest.raises(UserError, match="no text, expected at least one"):
        continue_texts(str(student), [])
