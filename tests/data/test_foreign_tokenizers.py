"""Tokenizers of other models: AutoTokenizer's ids, before and after they are copied beside a model."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as library_trainers

from dwt_jax.data import tokenizer
from dwt_jax.data.text_checks import describe_missing_frame
from dwt_jax.errors import UserError
from dwt_jax.models.bert_config import Config as BertConfig
from dwt_jax.models.tokenizer_defaults import TOKEN_ROLES, WORDPIECE_TOKENS

TEXTS = [
    "Hello world",
    " it's 3.5 €,  two  spaces",
    "日本語 <mask> naïve Äpfel",
    "a<s>b </s> <|im_end|>x\n\n y",
    "",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROLES = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
NAMED = {f"{role}_token": token for role, token in ROLES.items()}
PIECES = ["▁Hello", "▁world", "▁", "▁a", "▁it", "lo", "el", *"abcdefghiloprstwxyzHÄ日本語,.'35"]


def trained(model, trainer, texts=TEXTS, **parts):
    built = Tokenizer(model)
    for name, part in parts.items():
        setattr(built, name, part)
    built.train_from_iterator(texts * 20, trainer)
    return built


def byte_bpe(special=SPECIAL, **parts):
    trainer = library_trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    parts = {
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "decoder": decoders.ByteLevel(),
        **parts,
    }
    return trained(models.BPE(), trainer, **parts)


def write(path, built, settings, model_type="", as_json=True):
    path.mkdir()
    if as_json:
        built.save(str(path / "tokenizer.json"))
    else:
        built.model.save(str(path))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))


def gpt2(path):
    """vocab.json and merges.txt."""
    settings = {"tokenizer_class": "GPT2Tokenizer", **NAMED}
    write(path, byte_bpe([*SPECIAL, "<|endoftext|>"]), settings, "gpt2", as_json=False)


def gpt2_json(path):
    """A tokenizer.json that its class rebuilds, without the processor."""
    frame = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    built = byte_bpe([*SPECIAL, "<|endoftext|>"], post_processor=frame)
    write(path, built, {"tokenizer_class": "GPT2TokenizerFast", **NAMED, "add_prefix_space": True}, "gpt2")


def qwen2(path):
    split = pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{L}\p{N}]+|\s?\p{L}+|\s+"), "isolated")
    parts = {
        "normalizer": normalizers.NFC(),
        "pre_tokenizer": pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
    }
    built = byte_bpe(**parts)
    built.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    settings = {"tokenizer_class": "Qwen2Tokenizer", **NAMED, "eos_token": "<|im_end|>", "errors": "replace"}
    write(path, built, settings, "qwen2")


def llama(path, special=SPECIAL, texts=TEXTS, named=NAMED):
    trainer = library_trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    built = trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, texts, pre_tokenizer=metaspace)
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)]
    )
    write(path, built, {"tokenizer_class": "LlamaTokenizer", **named, "legacy": False}, "llama")


def modernbert(path):
    """A mask that takes the space before it, as its decoder of added tokens says."""
    built = byte_bpe(
        special=[*WORDPIECE_TOKENS],
        post_processor=processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        ),
    )
    built.add_special_tokens(["<mask>", "<|im_end|>"])
    added = {
        i: {"content": token.content, "lstrip": token.content == "<mask>", "special": True}
        for i, token in built.get_added_tokens_decoder().items()
    }
    named = {f"{role}_token": token for role, token in WORDPIECE_TOKENS._asdict().items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, **named}
    write(path, built, settings | {"mask_token": "<mask>"}, "modernbert")


def unigram(path, name, model_type, more=()):
    pieces = [*more, *PIECES]
    vocab = [*((token, 0.0) for token in SPECIAL[:4]), *((w, -1.0 - i / 9) for i, w in enumerate(pieces))]
    built = Tokenizer(models.Unigram([*vocab, ("<mask>", 0.0)], unk_id=3))
    built.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    built.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    write(path, built, {"tokenizer_class": name, **NAMED}, model_type)


def xlm_roberta(path):
    unigram(path, "XLMRobertaTokenizer", "xlm-roberta")


def camembert(path):
    """Its class has special tokens that occur nowhere."""
    unused = ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"]
    unigram(path, "CamembertTokenizerFast", "camembert", unused)


def mpnet(path):
    """A vocab.txt of another model than BERT."""
    path.mkdir()
    words = [*SPECIAL, "[UNK]", "hello", "world", *"abcdefghijklmnopqrstuvwxyz", "##s"]
    (path / "vocab.txt").write_text("\n".join(words))
    (path / "config.json").write_text('{"model_type": "mpnet"}')


FOREIGN = [gpt2, gpt2_json, qwen2, llama, modernbert, xlm_roberta, camembert, mpnet]


def auto_ids(path):
    auto = transformers.AutoTokenizer.from_pretrained(path)
    pairs = [auto(text, TEXTS[0]).input_ids for text in TEXTS]
    return [auto(text).input_ids for text in TEXTS], pairs


def own_ids(path):
    own = tokenizer.load_hf_tokenizer(path)
    pairs = [own.encode(text, TEXTS[0]).ids for text in TEXTS]
    return [encoding.ids for encoding in own.encode_batch(TEXTS)], pairs


@pytest.mark.parametrize("build", FOREIGN, ids=lambda build: build.__name__)
def test_ids_equal_auto_tokenizer_before_and_after_copies(build, tmp_path, monkeypatch):
    build(tmp_path / "in")
    expected = auto_ids(tmp_path / "in")
    assert len({tuple(ids) for ids in expected[0]}) == len(TEXTS)
    assert own_ids(tmp_path / "in") == expected
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    vocab = tokenizer.load_vocabulary(tmp_path / "in")
    roles = {role: getattr(auto, f"{role}_token_id") for role in TOKEN_ROLES}
    assert {role: getattr(vocab, f"{role}_id") for role in TOKEN_ROLES} == roles

    model = BertConfig(model_type="bert", max_position_embeddings=32, vocab_size=len(vocab))
    tokenizer.copy_tokenizer(tmp_path / "in", tmp_path / "copy")
    (tmp_path / "beside").mkdir()
    tokenizer.copy_model_tokenizer(tmp_path / "copy", tmp_path / "beside", model)
    (tmp_path / "beside" / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    assert own_ids(tmp_path / "copy") == own_ids(tmp_path / "beside") == expected, "without transformers"
    monkeypatch.undo()
    for path in (tmp_path / "copy", tmp_path / "beside"):
        assert auto_ids(path) == expected
        copied = transformers.AutoTokenizer.from_pretrained(path)
        assert {role: getattr(copied, f"{role}_token_id") for role in TOKEN_ROLES} == roles
    assert copied.model_max_length == 32
    assert copied.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]


def test_a_decoder_has_no_mask(tmp_path):
    named = {key: value for key, value in NAMED.items() if key != "mask_token"}
    llama(tmp_path / "in", SPECIAL[:4], TEXTS[:2], named)
    tokenizer.copy_tokenizer(tmp_path / "in", tmp_path / "out")
    for directory in ("in", "out"):
        vocabulary = tokenizer.load_vocabulary(tmp_path / directory)
        assert vocabulary.mask_id == -1
        assert vocabulary.tokens[vocabulary.sep_id] == "</s>"


@pytest.mark.parametrize("begin", ["<|begin|>", ""])
@pytest.mark.parametrize("pad", ["<|pad|>", ""])
def test_a_masked_tokenizer_may_have_the_frame_of_a_decoder(begin, pad, tmp_path):
    """It names a mask, and no tokens like [CLS] and [SEP]."""
    frame = processors.TemplateProcessing(
        single=f"{begin or '<|end|>'} $A <|end|>",
        special_tokens=[("<|end|>", 0), *([(begin, 1)] if begin else [])],
    )
    built = byte_bpe([x for x in ("<|end|>", begin, "<|mask|>", pad) if x], post_processor=frame)
    named = {"bos_token": begin, "eos_token": "<|end|>", "mask_token": "<|mask|>", "pad_token": pad}
    named = {key: token for key, token in named.items() if token}
    write(tmp_path / "in", built, {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    tokenizer.copy_tokenizer(tmp_path / "in", tmp_path / "out")
    for directory in ("in", "out"):
        vocabulary = tokenizer.load_vocabulary(tmp_path / directory)
        roles = {role: getattr(vocabulary, f"{role}_id") for role in TOKEN_ROLES}
        ids = {token: built.token_to_id(token) for token in named.values()}
        assert roles == {
            "pad": ids[pad or "<|end|>"],
            "unk": -1,
            "cls": ids[begin or "<|end|>"],
            "sep": ids["<|end|>"],
            "mask": ids["<|mask|>"],
        }
        assert not [*describe_missing_frame(tmp_path / directory)]
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / directory)
        assert auto.special_tokens_map == before.special_tokens_map
        assert auto(TEXTS[0]).input_ids == before(TEXTS[0]).input_ids == own_ids(tmp_path / directory)[0][0]


def test_tokens_like_cls_and_sep_go_before_the_frame_of_a_decoder(tmp_path):
    """An `eos_token` beside them is that of another task."""
    built = byte_bpe([*WORDPIECE_TOKENS, "<|end|>"])
    named = {"mask_token": "[MASK]", "eos_token": "<|end|>"}
    write(tmp_path / "in", built, {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    vocabulary = tokenizer.load_vocabulary(tmp_path / "in")
    assert [getattr(vocabulary, f"{role}_id") for role in TOKEN_ROLES] == [0, 1, 2, 3, 4]


def test_a_tokenizer_that_names_no_token_may_lack_that_of_a_decoder(tmp_path):
    Tokenizer(models.BPE({"a": 0, "<|end|>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"or an eos_token in tokenizer_config\.json, for a decoder"):
        tokenizer.load_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    assert tokenizer.load_vocabulary(tmp_path).sep_id == 1


# What AutoTokenizer cannot read, or must not


def test_missing_package_is_named(tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"model")
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    with pytest.raises(UserError, match=r"(?i)sentencepiece|tiktoken") as caught:
        tokenizer.load_hf_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(
    "key",
    ["vocab", "vocab_file", "tokenizer_file", "merges", "init_inputs", "fast_tokenizer_files", "gguf_file"],
)
def test_settings_lead_to_no_other_file(tmp_path, key):
    """Opening a FIFO would block."""
    mpnet(tmp_path / "in")
    expected = own_ids(tmp_path / "in")
    os.mkfifo(tmp_path / "fifo")
    value = str(tmp_path / "fifo")
    value = [value] if key in ("init_inputs", "fast_tokenizer_files") else value
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps({key: value}))
    assert own_ids(tmp_path / "in") == expected


def test_files_that_are_no_tokenizers_are_not_opened(tmp_path):
    """AutoTokenizer opens chat templates and files of other formats too."""
    mpnet(tmp_path / "in")
    expected = own_ids(tmp_path / "in")
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/a.jinja", "tekken.json", "tiktoken.model"):
        os.mkfifo(tmp_path / "in" / name)
    assert own_ids(tmp_path / "in") == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "spiece.model", "config.json"])
def test_fifo_and_link_that_leads_out_are_refused(tmp_path, name):
    mpnet(tmp_path / "in")
    (tmp_path / "in" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "in" / name)
    with pytest.raises(UserError, match=rf"{name}: not a regular file, expected one"):
        tokenizer.load_hf_tokenizer(tmp_path / "in")
    (tmp_path / "in" / name).unlink()
    (tmp_path / "private").write_text("{}")
    (tmp_path / "in" / name).symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=rf"{name}: a link to .*, expected a file inside"):
        tokenizer.load_hf_tokenizer(tmp_path / "in")


def test_custom_code_is_refused(tmp_path):
    llama(tmp_path / "in")
    code = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps({**NAMED, **code}))
    (tmp_path / "in" / "own.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="OwnTokenizer is Python code beside the files"):
        tokenizer.load_hf_tokenizer(tmp_path / "in")


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )


LOAD = (
    "import sys; from dwt_jax.data.tokenizer import load_vocabulary; [*map(load_vocabulary, sys.argv[1:])];"
)


def test_nothing_is_printed_without_torch(tmp_path):
    mpnet(tmp_path / "in")
    code = "import sys; sys.modules['torch'] = None;" + LOAD + "assert 'transformers' in sys.modules"
    done = run_python(code, tmp_path / "in")
    assert (done.stdout, done.stderr) == ("", "")


def test_own_tokenizers_need_no_transformers(tmp_path):
    """What dwt writes: trained, copied from another directory, and beside a model."""
    from dwt_jax.data.tokenizer_training import train_tokenizer

    tokenizer.save_tokenizer(train_tokenizer(lambda: TEXTS, 100, True), tmp_path / "trained", True)
    gpt2(tmp_path / "in")
    tokenizer.copy_tokenizer(tmp_path / "in", tmp_path / "copied")
    (tmp_path / "model").mkdir()
    model = BertConfig(model_type="bert", max_position_embeddings=32, vocab_size=340)
    tokenizer.copy_model_tokenizer(tmp_path / "in", tmp_path / "model", model)
    shutil.rmtree(tmp_path / "in")
    run_python(LOAD + "assert 'transformers' not in sys.modules", *tmp_path.iterdir())


# Settings that AutoTokenizer adds to a tokenizer.json of the generic class


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": ["ab"]}),
        ("tokenizer_config.json", {"image_token": "ab"}),
        ("tokenizer_config.json", {"mask_token": "ab"}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "ab", "special": True}}}),
        ("special_tokens_map.json", {"mask_token": "ab"}),
        ("added_tokens.json", {"ab": 5}),
    ],
    ids=str,
)
def test_generic_class_with_settings_of_its_own(tmp_path, name, settings):
    vocab = {token: i for i, token in enumerate([*SPECIAL, "ab", "a", "b", "c"])}
    built = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>"))
    built.add_special_tokens(SPECIAL)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
    write(tmp_path / "in", built, config | (settings if name == "tokenizer_config.json" else {}))
    if name != "tokenizer_config.json":
        (tmp_path / "in" / name).write_text(json.dumps(settings))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    for text in ("cabc ab", "a<mask>b"):
        assert tokenizer.load_hf_tokenizer(tmp_path / "in").encode(text).ids == auto(text).input_ids
    assert tokenizer.load_vocabulary(tmp_path / "in").mask_id == auto.mask_token_id


# What a text becomes in rows, in fine-tuning and in transformers


@pytest.mark.parametrize("scheme", ["always", "first", "never", "byte-level", "byte-level with a space"])
@pytest.mark.parametrize("row_mode", ["wrapped", "packed"])
def test_rows_have_the_ids_of_the_whole_text(tmp_path, scheme, row_mode):
    """A sentence begins with a word that the tokenizer recognises by the space before it, if at all."""
    from dwt_jax.data.encode import EncodeConfig, encode_chunk

    text = "Hello world. Hello it! A world. It 3.5"
    if scheme.startswith("byte-level"):
        pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="space" in scheme)
        write(
            tmp_path / "in",
            byte_bpe(pre_tokenizer=pre_tokenizer),
            {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED},
        )
    else:
        unigram(tmp_path / "in", "PreTrainedTokenizerFast", "")
        built = Tokenizer.from_file(str(tmp_path / "in" / "tokenizer.json"))
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        built.save(str(tmp_path / "in" / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    chunk = encode_chunk([text], EncodeConfig(str(tmp_path / "in"), scheme, 512, row_mode, 1, 0.0))
    assert chunk.train.tokens.tolist() == auto(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pairs", [False, True])
def test_texts_are_cut_on_the_side_of_the_tokenizer(tmp_path, side, pairs):
    from dwt_jax.data.hf_tokenizer import read_tokenizer
    from dwt_jax.finetune.collate import encode_texts
    from dwt_jax.finetune.datasets import ExampleSplit

    modernbert(tmp_path / "in")
    file = tmp_path / "in" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation_side": side}))
    tokenizer.copy_tokenizer(tmp_path / "in", tmp_path / "copy")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    split = ExampleSplit(TEXTS, [*reversed(TEXTS)] if pairs else None, None, [])
    encoded, num_cut = encode_texts(split, read_tokenizer(tmp_path / "copy"), 9)
    columns = (split.texts, split.text_pairs) if pairs else (split.texts,)
    expected = auto(*columns, truncation=True, max_length=9).input_ids
    rows = [part.tolist() for part in np.split(encoded.tokens, encoded.offsets[1:-1])]
    assert rows == expected
    assert num_cut == sum(len(ids) > 9 for ids in auto(*columns).input_ids) > 0


def test_an_unknown_truncation_side_is_refused(tmp_path):
    mpnet(tmp_path / "in")
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"truncation_side": "up"}')
    with pytest.raises(UserError, match="truncation_side is 'up', expected left or right"):
        tokenizer.load_hf_tokenizer(tmp_path / "in")


def test_texts_are_padded_on_the_right(tmp_path):
    """As in training: a model with absolute positions gives other predictions with padding on the left."""
    gpt2(tmp_path / "in")
    file = tmp_path / "in" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    (tmp_path / "out").mkdir()
    model = BertConfig(model_type="bert", max_position_embeddings=32, vocab_size=340)
    tokenizer.copy_model_tokenizer(tmp_path / "in", tmp_path / "out", model)
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written(["a", "Hello world"], padding=True).attention_mask[0][0] == 1


@pytest.mark.parametrize(("build", "added"), [(gpt2, "no special token"), (llama, "<s>"), (mpnet, "")])
def test_a_tokenizer_that_puts_other_tokens_around_a_text_than_rows_have(tmp_path, build, added):
    from dwt_jax.data.text_checks import describe_missing_frame

    build(tmp_path / "in")
    lines = [*describe_missing_frame(tmp_path / "in")]
    assert len(lines) == bool(added)
    assert all(f"adds {added} to a text, expected <s> before it and </s> after it" in line for line in lines)


GEMMA = {"normalizer": normalizers.Replace(" ", "▁")}


@pytest.mark.parametrize(
    ("parts", "stays"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)}, True),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, True),
        ({"pre_tokenizer": pre_tokenizers.Metaspace()}, True),
        ({"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never")}, False),
        ({"pre_tokenizer": pre_tokenizers.Metaspace("#")}, False),
        ({"pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_next"), **GEMMA}, False),
    ],
    ids=["byte-level", "byte-level with a space", "metaspace", "never", "other character", "gemma"],
)
def test_rows_of_an_earlier_rule_of_words_are_not_taken(tmp_path, monkeypatch, parts, stays):
    """Earlier versions went by names: words of a ByteLevel follow spaces, a Metaspace adds its own space."""
    from dwt_jax.config import Data
    from dwt_jax.config import Tokenizer as TokenizerSection
    from dwt_jax.data import cache_key
    from dwt_jax.data.encode import EncodeConfig

    vocab = {token: i for i, token in enumerate([*SPECIAL, *"ab▁Ġ#", "▁a", "Ġa", "#a"])}
    built = Tokenizer(models.BPE(vocab, [("▁", "a"), ("Ġ", "a"), ("#", "a")], unk_token="<unk>"))
    built.add_special_tokens(SPECIAL)
    for name, part in parts.items():
        setattr(built, name, part)
    write(tmp_path / "in", built, {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED})
    data = Data(tokenizer=TokenizerSection(path=str(tmp_path / "in")))
    config = EncodeConfig(str(tmp_path / "in"), "digest", 64, "wrapped", 1, 0.0)

    def hashes():
        return [cache_key.data_cache_key(data), cache_key.rows_digest(config, data, [])]

    now = hashes()
    monkeypatch.setattr(cache_key, "_word_rule", lambda *_: {})
    assert [a == b for a, b in zip(now, hashes(), strict=True)] == [stays, stays]


OTHER_ROLES = [("cls", "<|a|>"), ("sep", "<|a|>"), ("mask", "<|a|>"), ("pad", "<|a|>")]


@pytest.mark.parametrize(("role", "token"), OTHER_ROLES)
def test_rows_of_a_tokenizer_with_other_roles_are_not_taken(tmp_path, role, token):
    from dwt_jax.config import Data
    from dwt_jax.config import Tokenizer as TokenizerSection
    from dwt_jax.data.cache_key import data_cache_key

    built = byte_bpe([*SPECIAL, "<|a|>"])
    keys = set()
    for name, named in (("a", NAMED), ("b", {**NAMED, f"{role}_token": token})):
        write(tmp_path / name, built, {"tokenizer_class": "PreTrainedTokenizerFast", **named})
        keys.add(data_cache_key(Data(tokenizer=TokenizerSection(path=str(tmp_path / name)))))
    assert len(keys) == 2


def test_digest_of_rows_depends_on_what_begins_and_ends_a_text(tmp_path):
    from dwt_jax.config import Data
    from dwt_jax.data.cache_key import rows_digest
    from dwt_jax.data.encode import EncodeConfig

    built, digests = byte_bpe([*SPECIAL, "<|a|>"]), {}
    for name, more in (("usual", {}), *((role, {f"{role}_token": token}) for role, token in OTHER_ROLES)):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **more}
        write(tmp_path / name, built, settings)
        digests[name] = rows_digest(
            EncodeConfig(str(tmp_path / name), "digest", 64, "wrapped", 1, 0.0), Data(), []
        )
    assert len({digests[name] for name in ("usual", "cls", "sep")}) == 3
    assert digests["mask"] == digests["pad"] == digests["usual"]


def test_prepared_rows_of_a_tokenizer_with_another_role_are_refused(tmp_path):
    from dwt_jax.config import Data, Source
    from dwt_jax.config import Tokenizer as TokenizerSection
    from dwt_jax.data.data_cache import get_prepared
    from dwt_jax.data.prepare import prepare_data

    built = byte_bpe([*SPECIAL, "<|a|>"])
    for name, named in (("a", NAMED), ("b", {**NAMED, "sep_token": "<|a|>"})):
        write(tmp_path / name, built, {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    (tmp_path / "x.txt").write_text("hello world\n" * 50)
    source = Source(kind="text", path=str(tmp_path / "x.txt"), documents="lines")
    data = Data(
        sources=(source,),
        tokenizer=TokenizerSection(path=str(tmp_path / "a")),
        sequence_length=32,
        validation_fraction=0.2,
    )
    prepare_data(data, tmp_path / "rows", workers=1)
    data = dataclasses.replace(data, path=str(tmp_path / "rows"))
    assert get_prepared(data) == tmp_path / "rows"
    other = dataclasses.replace(data, tokenizer=TokenizerSection(path=str(tmp_path / "b")))
    with pytest.raises(UserError, match=r"where sep_token is '<\|a\|>', expected '</s>' as in"):
        get_prepared(other)
