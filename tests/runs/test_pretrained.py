"""Models that others have trained, beside data of the same vocabulary."""

import dataclasses
import json

import pytest

from dwt_jax.cli import main
from dwt_jax.data.tokenizer import load_hf_tokenizer, load_vocabulary, save_tokenizer, tokenizer_digest
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS, build_wordpiece_tokenizer
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
    capsys.readouterr()
    data = load_vocabulary(tmp_path / "rows" / "tokenizer")
    fewer = dataclasses.replace(data, tokens=data.tokens[:-1], pipeline={**data.pipeline, "merges": "other"})
    check_vocabulary("init.from", "path", fewer, data, allow_fewer_tokens=True)
    assert capsys.readouterr().err == ""
    check_vocabulary("init.from", "path", dataclasses.replace(fewer, tokens=data.tokens), data)
    assert "another tokenizer: merges is other, the data's is " in capsys.readouterr().err
    with pytest.raises(UserError, match=f"path has another vocabulary, of {len(data) - 1} tokens"):
        check_vocabulary("--model", "path", fewer, data)


def test_other_tokens_around_a_text_are_warned_of(tmp_path, capsys):
    """As in a base model and its chat model, which end texts with different tokens of one vocabulary."""
    tokenizer = build_wordpiece_tokenizer({token: i for i, token in enumerate(["[BOS]", *TOKENS])})
    vocabularies = []
    for name, roles in (
        ("data", {"eos_token": "[SEP]"}),
        ("begin", {"eos_token": "[SEP]", "bos_token": "[CLS]"}),
        ("end", {"eos_token": "[CLS]", "bos_token": "[SEP]"}),
        ("padding", {"eos_token": "[SEP]", "pad_token": "[PAD]"}),
    ):
        save_tokenizer(tokenizer, tmp_path / name, lowercase=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        vocabularies.append(load_vocabulary(tmp_path / name))
    data, begin, end, padding = vocabularies
    warning = "--model: warning: path has the data's vocabulary, but another tokenizer: "
    for model, expected in (
        (begin, f"{warning}begin of text is [CLS], the data's is [SEP]\n"),
        (end, f"{warning}end of text is [CLS], the data's is [SEP]\n"),
        (padding, ""),  # which nothing attends to
        (data, ""),
    ):
        check_vocabulary("--model", "path", model, data)
        assert capsys.readouterr().err == expected


TOKENS = [*WORDPIECE_TOKENS, "a", "b", "##b", "ab", "▁", "▁a", "▁ab"]


def _same_tokens_other_ids(name):
    """Two tokenizers of the same tokens, and what the warning names."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(TOKENS)}

    def unigram(score):
        model = models.Unigram([(token, score if token == "▁ab" else -2.0) for token in TOKENS], unk_id=1)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        return tokenizer

    def wordpiece(**options):
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", **options))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer

    def bpe(**options):
        return Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="[UNK]", **options))

    if name == "scores":
        pair = unigram(-9.0), unigram(-1.0)
    elif name == "added_tokens.a":
        pair = wordpiece(), wordpiece()
        pair[0].add_tokens([AddedToken("a", normalized=False)])
    elif name == "model.max_input_chars_per_word":
        pair = wordpiece(max_input_chars_per_word=1), wordpiece()
    elif name == "model.type":
        pair = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")), wordpiece()
        pair[0].pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        pair = bpe(fuse_unk=True), bpe()
    return pair


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scores", "ab"),
        ("added_tokens.a", "abb"),
        ("model.max_input_chars_per_word", "ab"),
        ("model.type", "abb"),
        ("model.fuse_unk", "xy"),
    ],
)
def test_whatever_gives_a_text_other_ids_is_warned_of_and_in_the_digest(tmp_path, capsys, name, text):
    paths = tmp_path / "teacher", tmp_path / "data"
    for path, tokenizer in zip(paths, _same_tokens_other_ids(name), strict=True):
        path.mkdir()
        tokenizer.save(str(path / "tokenizer.json"))
    teacher_ids, data_ids = (load_hf_tokenizer(path).encode(text).ids for path in paths)
    assert teacher_ids != data_ids
    teacher, data = map(load_vocabulary, paths)
    assert teacher.tokens == data.tokens
    check_vocabulary("teacher.path", "path", teacher, data)
    assert f"but another tokenizer: {name} is " in capsys.readouterr().err
    assert tokenizer_digest(paths[0]) != tokenizer_digest(paths[1])
