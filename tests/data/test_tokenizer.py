import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwt_jax.config import Source
from dwt_jax.data import cached_wordpiece, tokenizer
from dwt_jax.data.sources import iter_documents
from dwt_jax.data.tokenizer_training import take_megabytes, train_tokenizer
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS

TEXTS = [*iter_documents(Source())][::40]
SAMPLE = [
    "The Congress shall have Power.",
    "naïve Café — 日本語, 1,234.5!",
    "unbelievableness [MASK] zzzqqq ☃",
    "  \t mixed\u00a0SPACES  ",
]


@pytest.fixture(scope="module", params=[True, False], ids=["lower", "cased"])
def trained(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "tokenizer"
    tokenizer.save_tokenizer(train_tokenizer(lambda: TEXTS, 1000, request.param), path, request.param)
    return path


def auto(path: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def test_special_tokens_have_the_first_ids(trained):
    vocab = tokenizer.load_vocabulary(trained)
    assert vocab.tokens[:5] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert (vocab.pad_id, vocab.unk_id, vocab.cls_id, vocab.sep_id, vocab.mask_id) == (0, 1, 2, 3, 4)
    assert vocab.special_ids == (0, 1, 2, 3, 4)
    assert len(vocab.tokens) == len(set(vocab.tokens)) == len(vocab) == 1000
    assert (trained / "vocab.txt").read_text(encoding="utf-8").splitlines() == list(vocab.tokens)


def test_auto_tokenizer_gives_the_same_ids(trained):
    auto_tokenizer, hf_tokenizer = auto(trained), tokenizer.load_hf_tokenizer(trained)
    for text in [*SAMPLE, *(text[:3000] for text in TEXTS)]:
        assert auto_tokenizer(text)["input_ids"] == hf_tokenizer.encode(text).ids
    assert auto_tokenizer.mask_token_id == 4
    assert sorted(auto_tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    assert len(auto_tokenizer) == 1000


def test_bert_tokenizer_of_the_vocab_txt_gives_the_same_ids(trained, tmp_path):
    """The pipeline, not only the vocabulary: BERT's as transformers builds it from a vocab.txt."""
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_bytes((trained / "vocab.txt").read_bytes())
    lower = json.loads((trained / "tokenizer_config.json").read_text())["do_lower_case"]
    auto_tokenizer = BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=lower)
    hf_tokenizer = tokenizer.load_hf_tokenizer(trained)
    for text in [*SAMPLE, *(text[:3000] for text in TEXTS)]:
        assert auto_tokenizer(text)["input_ids"] == hf_tokenizer.encode(text).ids


def test_lowercase_vocabulary(trained):
    tokens = tokenizer.load_vocabulary(trained).tokens
    lower = json.loads((trained / "tokenizer_config.json").read_text())["do_lower_case"]
    assert any(c.isupper() for token in tokens[5:] for c in token) == (not lower)


def test_same_text_same_vocabulary_in_any_process(tmp_path):
    """tokenizers' own trainer fails this: its hash tables differ from process to process."""
    program = (
        "import sys, hashlib; from dwt_jax.config import Source;"
        "from dwt_jax.data.tokenizer_training import train_tokenizer;"
        "from dwt_jax.data.sources import iter_documents;"
        "w = train_tokenizer(lambda: list(iter_documents(Source()))[::40], 1000, True);"
        "print(hashlib.md5(w.to_str().encode()).hexdigest())"
    )
    command = [sys.executable, "-c", program]
    digests = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(digests) == 1


def test_training_reads_only_the_sample():
    read = []

    def texts():
        for text in ["abc def " * 1000] * 100:
            read.append(text)
            yield text

    train_tokenizer(texts, 100, True, sample_megabytes=0.02)
    assert len(read) == 2 * 4  # twice 3 of 8 kB, and one more to see that it is enough


def test_vocab_size_smaller_than_the_alphabet_is_refused():
    with pytest.raises(UserError, match=r"data.tokenizer.vocab_size is 20, expected at least \d+"):
        train_tokenizer(lambda: TEXTS, 20, True)


def train_characters(vocab_size: int, **options) -> set[str]:
    """Train on 3,000 Chinese characters, the n-th of which occurs 6000 // n times, and on an English word."""
    text = "".join(chr(0x4E00 + n) * (6000 // (n + 1)) for n in range(3000))
    trained = train_tokenizer(lambda: [text, "cat " * 100], vocab_size, True, **options)
    return {token for token in trained.get_vocab() if token not in WORDPIECE_TOKENS}


def test_no_character_is_left_out_while_there_is_room():
    chinese = {chr(0x4E00 + n) for n in range(3000)}
    tokens = train_characters(30522)
    assert chinese < tokens
    assert not any(token.startswith("##") and token[2:] in chinese for token in tokens)  # never inside a word
    tokens = train_characters(3000)  # more than half of the vocabulary, as there are no more words
    assert len(tokens) == 3000 - 5
    assert {chr(0x4E00 + n) for n in range(2900)} < tokens
    tokens = train_characters(30522, alphabet_size=100)
    assert len(tokens & chinese) == 100 - len(tokens & set("cat"))


def test_rare_characters_leave_half_of_the_vocabulary_to_words():
    """Characters beyond it, which are less than 0.05 % of the text, are left out."""
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    text = " ".join(TEXTS)
    trained = train_tokenizer(lambda: [text, rare], 600, True)
    tokens = trained.get_vocab()
    assert len(tokens) == 600
    assert sum(len(token.removeprefix("##")) > 1 for token in tokens) >= 295
    assert set("abcdefghijklmnopqrstuvwxyz0123456789.,;") < set(tokens)
    assert 0 < len(set(rare) & set(tokens)) < 300


def test_the_sample_ends_within_a_document():
    counted = take_megabytes(["Ein Satz. " * 1000] * 3, 0.025003)
    sizes = [len(text) for text in counted]
    assert sizes == [10_000, 10_000, 5_000]  # before a sentence
    assert [*take_megabytes(["日本" * 9], 29e-6)] == ["日本" * 4 + "日"]


def test_continuation_of_wordpiece(trained):
    vocab = tokenizer.load_vocabulary(trained)
    assert vocab.continuation.dtype == bool
    assert vocab.continuation.tolist() == [token.startswith("##") for token in vocab.tokens]
    assert vocab.continuation.any()


def bert_words() -> list[str]:
    return [
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "##s",
        "hello",
        "Hello",
    ]


def test_vocab_txt_file_and_directory(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(bert_words()) + "\n")
    for path in (tmp_path / "vocab.txt", tmp_path):
        vocab = tokenizer.load_vocabulary(path)
        assert (vocab.pad_id, vocab.unk_id, vocab.cls_id, vocab.sep_id, vocab.mask_id) == (0, 2, 3, 4, 5)
        assert tokenizer.load_hf_tokenizer(path).encode("Hello").tokens == ["[CLS]", "hello", "[SEP]"]
        assert tokenizer.load_hf_tokenizer(path, lowercase=False).encode("Hello").tokens == [
            "[CLS]",
            "Hello",
            "[SEP]",
        ]
        assert tokenizer.tokenizer_digest(path) != tokenizer.tokenizer_digest(path, lowercase=False)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert tokenizer.load_hf_tokenizer(tmp_path, lowercase=True).encode("Hello").tokens[1] == "Hello"


def test_copy_of_a_vocab_txt_is_complete(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(bert_words()) + "\n")
    tokenizer.copy_tokenizer(tmp_path / "vocab.txt", tmp_path / "out", lowercase=False)
    assert tokenizer.tokenizer_digest(tmp_path / "out") == tokenizer.tokenizer_digest(
        tmp_path / "vocab.txt", lowercase=False
    )
    assert (
        auto(tmp_path / "out")("Hello hello")["input_ids"]
        == tokenizer.load_hf_tokenizer(tmp_path / "out").encode("Hello hello").ids
    )


def test_copy_has_only_tokenizer_files(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").write_bytes(b"weights")
    tokenizer.copy_tokenizer(tmp_path / "in", tmp_path / "out")
    expected_files = ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected_files
    for name in ("tokenizer.json", "vocab.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()
    for text in SAMPLE:
        assert auto(tmp_path / "out")(text).input_ids == auto(trained)(text).input_ids
    assert tokenizer.tokenizer_digest(tmp_path / "out") == tokenizer.tokenizer_digest(trained)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """A byte-level BPE directory with RoBERTa's special tokens, truncation left on."""
    from tokenizers import ByteLevelBPETokenizer

    path = tmp_path_factory.mktemp("roberta")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TEXTS[:2],
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    bpe.enable_truncation(8)
    bpe.save(str(path / "tokenizer.json"))
    return path


def test_byte_level(roberta):
    vocab = tokenizer.load_vocabulary(roberta)
    assert (vocab.cls_id, vocab.pad_id, vocab.sep_id, vocab.unk_id, vocab.mask_id) == (0, 1, 2, 3, 4)
    assert vocab.word_prefix == "Ġ"
    assert vocab.special_ids == (0, 1, 2, 3, 4)
    ids = (
        tokenizer.load_hf_tokenizer(roberta)
        .encode("the extraordinary Government of the people", add_special_tokens=False)
        .ids
    )
    assert len(ids) > 8, "truncation has to be off"
    words_begun = (~vocab.continuation[ids]).sum()
    assert words_begun == 5  # each word but the first, which has no space before it
    assert not vocab.continuation[list(vocab.special_ids)].any()


def test_roles_from_the_config_files(roberta, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((roberta / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"cls_token": {"content": "a"}, "sep_token": "b"}')
    (tmp_path / "tokenizer_config.json").write_text('{"sep_token": "c"}')
    vocab = tokenizer.load_vocabulary(tmp_path)
    assert (vocab.tokens[vocab.cls_id], vocab.tokens[vocab.sep_id], vocab.mask_id) == ("a", "b", 4)
    assert {vocab.cls_id, vocab.sep_id} < set(vocab.special_ids)
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "<nothing>"}')
    with pytest.raises(UserError, match="no <nothing> among its 600 tokens"):
        tokenizer.load_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "gone", "gone: no such file, expected a tokenizer directory"),
        (
            {"merges.txt": ""},
            "",
            "no tokenizer in it, expected a tokenizer.json, a vocab.txt, or a vocab.json",
        ),
        ({"tokenizer.json": "{"}, "", "tokenizer.json: .*expected a tokenizer"),
        ({"vocab.txt": "[PAD]\n[UNK]\na"}, "", r"vocab.txt: no \[SEP\] \[CLS\] \[MASK\] among its 3 tokens"),
        ({"vocab.txt": b"[PAD]\xff"}, "vocab.txt", "vocab.txt: .*valid UTF-8"),
        (
            {"vocab.txt": "\n".join(WORDPIECE_TOKENS), "tokenizer_config.json": "{"},
            "",
            "tokenizer_config.json: ",
        ),
    ],
)
def test_user_errors(tmp_path, files, path, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        tokenizer.load_vocabulary(tmp_path / path)
    assert "\n" not in str(error.value)


def test_vocabularies_compare_and_are_read_only(trained):
    vocab = tokenizer.load_vocabulary(trained)
    assert vocab == tokenizer.load_vocabulary(trained)
    with pytest.raises(ValueError, match="read-only"):
        vocab.continuation[0] = True
    assert isinstance(vocab.continuation, np.ndarray)


ODD = st.sampled_from(
    [
        *"aZé9 .!?-_$^`~\n\t\x02\x1c\x7f\x85\u2028\u00a0\u0301\u200b\ufffd日≠ΣİßǅÅ。",
        "the ",
        "[SEP]",
        "[UNK]",
        "##s",
    ]
)


@given(st.lists(st.one_of(st.text(), st.lists(ODD).map("".join)), max_size=5))
def test_cached_encoder_gives_the_same_ids(trained, texts):
    hf_tokenizer = tokenizer.load_hf_tokenizer(trained)
    hf_tokenizer.encode_special_tokens = True
    expected = [hf_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    encode = cached_wordpiece.make_text_encoder(hf_tokenizer)
    assert encode(texts) == expected
    assert encode(texts) == expected, "from memory"


def test_cached_encoder_on_real_text(trained):
    hf_tokenizer = tokenizer.load_hf_tokenizer(trained)
    hf_tokenizer.encode_special_tokens = True
    encode = cached_wordpiece.make_text_encoder(hf_tokenizer)
    assert cached_wordpiece.can_encode_parts(hf_tokenizer)
    for text in [*iter_documents(Source())][::20]:
        assert encode([text]) == [hf_tokenizer.encode(text, add_special_tokens=False).ids]


def test_encoder_of_other_pipelines_does_not_cache(roberta):
    hf_tokenizer = tokenizer.load_hf_tokenizer(roberta)
    texts = ["the extraordinary  Government, of the people!"]
    assert cached_wordpiece.make_text_encoder(hf_tokenizer)(texts) == [
        hf_tokenizer.encode(texts[0], add_special_tokens=False).ids
    ]


ODD_TEXTS = [
    "Hello world! it's 3.5 €",
    "  two  spaces",
    "日本語",
    "a <mask> in <s> the",
    "tab\tnew\nline",
    "café",
    "",
]


@pytest.mark.parametrize("space", [False, True])
def test_byte_level_bpe_of_two_files_equals_transformers(tmp_path, space):
    """RoBERTa's vocab.json and merges.txt, without a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(ODD_TEXTS * 20, vocab_size=330, special_tokens=specials)
    trained.save_model(str(tmp_path))
    config = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": space}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    hf_tokenizer = tokenizer.load_hf_tokenizer(tmp_path)
    auto_tokenizer = transformers.RobertaTokenizer.from_pretrained(tmp_path, add_prefix_space=space)
    for text in ODD_TEXTS:
        assert hf_tokenizer.encode(text).ids == auto_tokenizer(text).input_ids, text
    vocab = tokenizer.load_vocabulary(tmp_path)
    assert (vocab.cls_id, vocab.pad_id, vocab.sep_id, vocab.unk_id, vocab.mask_id) == (0, 1, 2, 3, 4)
    assert vocab.word_prefix == "Ġ"


@pytest.mark.parametrize("lost", ["merges.txt", "</s>"])
def test_incomplete_bpe_is_refused(tmp_path, lost):
    (tmp_path / "vocab.json").write_text(
        json.dumps({"<s>": 0, "a": 1, "</s>": 2} if lost != "</s>" else {"<s>": 0})
    )
    if lost != "merges.txt":
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError) as caught:
        tokenizer.load_hf_tokenizer(tmp_path)
    assert lost in str(caught.value)
    assert "\n" not in str(caught.value)
