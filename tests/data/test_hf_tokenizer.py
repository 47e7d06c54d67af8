"""Tokenizer directories as they are found: the same ids as AutoTokenizer's, or refused in one line."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dwt_jax.data import tokenizer
from dwt_jax.data.tokenizer_files import has_tokenizer
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS, build_wordpiece_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello world",
    "a [MASK] b [E1] c [e1]x <mask> d NEW1 [unused0]",
    "Ein Äpfel déjà vu, naïve!",
    "日本 hello日本",
    "un##s [MASK] end  two  spaces",
    "new1 and x<extra>y",
]
VOCAB = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[P]", "[C]"),
    *"abcdefghijklmnopqrstuvwxyzHEWÄäé日本,!#[]<>1",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyzäé本"),
    *("hello", "world", "Hello"),
]
MODELS = ["", "bert", "distilbert", "roberta"]


def bpe(directory):
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(TEXTS * 20, vocab_size=330, special_tokens=specials, show_progress=False)
    trained.save_model(str(directory))


def auto_tokenizer_ids(directory):
    """Those of AutoTokenizer; None where it cannot tell what the directory holds."""
    try:
        auto_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert len(auto_tokenizer) > 20  # without a vocabulary it makes one of its own
    except (AssertionError, KeyError, OSError, ValueError, TypeError):
        return None
    return [auto_tokenizer(text, add_special_tokens=True).input_ids for text in TEXTS]


def hf_tokenizer_ids(directory):
    try:
        tokenizer.load_vocabulary(directory)
        return [tokenizer.load_hf_tokenizer(directory).encode(text).ids for text in TEXTS]
    except UserError:
        return None


def auto_tokenizer_roles(directory):
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return {
        role: getattr(auto_tokenizer, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask")
    }


def compare(directory, out):
    """As AutoTokenizer has it; and so it stays once installed, beside a model of any family."""
    ids, expected = hf_tokenizer_ids(directory), auto_tokenizer_ids(directory)
    if ids is None:
        return False
    if expected is not None:
        assert ids == expected
    for kind in MODELS[1:]:
        tokenizer.copy_tokenizer(directory, out / kind)
        assert hf_tokenizer_ids(out / kind) == ids
        (out / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        assert auto_tokenizer_ids(out / kind) == ids, kind
        assert tokenizer.tokenizer_digest(out / kind) == tokenizer.tokenizer_digest(directory)
    return True


def written(directory, **files):
    directory.mkdir()
    for name, content in files.items():
        if content:
            (directory / f"{name}.json").write_text(json.dumps(content))


some = st.sampled_from
flags = st.fixed_dictionaries(
    {},
    optional={
        "do_lower_case": st.booleans(),
        "strip_accents": some([True, False, None]),
        "tokenize_chinese_chars": st.booleans(),
        "tokenizer_class": some(
            ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "PreTrainedTokenizerFast"]
        ),
        "pad_token": some(["[P]", {"content": "[P]"}]),
        "cls_token": some(["[C]"]),
    },
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=flags,
    model_type=some(MODELS[:3]),
    cased=st.booleans(),
    as_json=st.booleans(),
    added_tokens=some([0, 1, 2]),
)
@example(config={}, model_type="bert", cased=True, as_json=True, added_tokens=0)
@example(config={"do_lower_case": False}, model_type="bert", cased=False, as_json=True, added_tokens=0)
@example(config={"strip_accents": False}, model_type="distilbert", cased=False, as_json=False, added_tokens=2)
@example(
    config={"pad_token": "[P]", "cls_token": "[C]"},
    model_type="bert",
    cased=True,
    as_json=False,
    added_tokens=1,
)
def test_wordpiece(tmp_path_factory, config, model_type, cased, as_json, added_tokens):
    base = tmp_path_factory.mktemp("vocab")
    extra = {"<extra>": len(VOCAB), "new1": len(VOCAB) + 1}
    decoder = {
        str(i): {"content": t, "special": t[0] == "<", "normalized": t[0] != "<"} for t, i in extra.items()
    }
    if added_tokens == 2 and not as_json:
        config = config | {"added_tokens_decoder": decoder}
    model_type = {"model_type": model_type} if model_type else {}
    written(
        base / "in",
        tokenizer_config=config,
        config=model_type,
        added_tokens=extra if added_tokens == 1 else {},
    )
    if as_json:
        built = build_wordpiece_tokenizer({w: i for i, w in enumerate(VOCAB)}, lowercase=not cased)
        built.save(str(base / "in" / "tokenizer.json"))
    else:
        (base / "in" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    loaded = compare(base / "in", base)
    plain = config.get("tokenizer_class") != "PreTrainedTokenizerFast"
    assert loaded == (as_json or plain)


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}], ids=str)
@pytest.mark.parametrize("special", [True, False])
def test_added_token_flags(tmp_path, flags, special):
    """As transformers 4 saved them: a decoder with flags, for the roles too."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special, **flags}
    added = {"[E1]": len(VOCAB), "new1": len(VOCAB) + 1, "[MASK]": VOCAB.index("[MASK]")}
    decoder = {
        str(i): {"content": t, **flags, "special": special or t == "[MASK]", "normalized": not special}
        for t, i in added.items()
    }
    config = {"tokenizer_class": "BertTokenizer", "added_tokens_decoder": decoder}
    config |= {"additional_special_tokens": ["[E1]", "[unused0]"] if special else ["[unused0]"]}
    written(tmp_path / "in", tokenizer_config=config)
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    assert compare(tmp_path / "in", tmp_path)
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    assert set(tokenizer.load_vocabulary(tmp_path / "in").special_ids) >= set(auto_tokenizer.all_special_ids)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_mask_token_with_lstrip(tmp_path, file):
    (tmp_path / "in").mkdir()
    bpe(tmp_path / "in")
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    declared = {"tokenizer_class": "RobertaTokenizer"} if file == "tokenizer_config.json" else {}
    (tmp_path / "in" / file).write_text(
        json.dumps({**declared, "mask_token": {"__type": "AddedToken", **mask}})
    )
    assert compare(tmp_path / "in", tmp_path)


def test_special_tokens_map_takes_precedence(tmp_path):
    written(tmp_path / "in", tokenizer_config={"tokenizer_class": "BertTokenizer", "mask_token": "[unused0]"})
    (tmp_path / "in" / "special_tokens_map.json").write_text('{"mask_token": "[MASK]"}')
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    assert compare(tmp_path / "in", tmp_path)
    vocab = tokenizer.load_vocabulary(tmp_path / "in")
    assert vocab.tokens[vocab.mask_id] == "[MASK]"


@pytest.mark.parametrize(
    ("text", "num_tokens"),
    [
        pytest.param("\n".join([*VOCAB, "hello", "last"]), len(VOCAB) + 2, id="a token twice"),
        pytest.param(
            "\n".join([*VOCAB, "hello\u00a0", "last"]), len(VOCAB) + 2, id="twice, once with a space"
        ),
        pytest.param("\ufeff" + "\n".join(VOCAB), len(VOCAB) + 1, id="a byte-order mark"),
        pytest.param("\ufeffa\n" + "\n".join(VOCAB), len(VOCAB) + 1, id="a byte-order mark before a letter"),
        pytest.param("\r\n".join(VOCAB) + "\r\n\r\n\n", len(VOCAB), id="empty lines at the end"),
    ],
)
def test_vocab_txt_is_read_as_transformers_reads_it(tmp_path, text, num_tokens):
    written(tmp_path / "in", tokenizer_config={"tokenizer_class": "BertTokenizer"})
    (tmp_path / "in" / "vocab.txt").write_bytes(text.encode())
    assert compare(tmp_path / "in", tmp_path)
    vocab, roles = tokenizer.load_vocabulary(tmp_path / "in"), auto_tokenizer_roles(tmp_path / "in")
    assert {role: getattr(vocab, f"{role}_id") for role in roles} == roles
    assert len(vocab) == num_tokens


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<extra>": 900}},
        {"added_tokens": {"new1": len(VOCAB) + 2, "<extra>": len(VOCAB) + 5, "x": len(VOCAB)}},
        {"added_tokens": {"new1": 6, "<extra>": 30, "<other>": 30}},
        {
            "decoder": {
                str(len(VOCAB) + 4): {"content": "<extra>"},
                "0": {"content": "[PAD]", "special": True},
            }
        },
        {"decoder": {"900": {"content": "new1"}}, "added_tokens": {"<extra>": len(VOCAB)}},
        {"added_tokens": {"[E1]": 900}, "additional_special_tokens": ["[E1]"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("as_json", [False, True])
def test_added_tokens_with_gaps_get_the_next_ids(tmp_path, capsys, files, as_json):
    config = {"tokenizer_class": "BertTokenizer"}
    config |= {"added_tokens_decoder": files["decoder"]} if "decoder" in files else {}
    config |= {key: files[key] for key in files if key.startswith("additional")}
    written(tmp_path / "in", tokenizer_config=config, added_tokens=files.get("added_tokens"))
    if as_json:
        built = build_wordpiece_tokenizer({w: i for i, w in enumerate(VOCAB)})
        built.save(str(tmp_path / "in" / "tokenizer.json"))
    else:
        (tmp_path / "in" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    assert compare(tmp_path / "in", tmp_path)
    assert "have other ids than its files declare, as in transformers: " in capsys.readouterr().err
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    tokens = tokenizer.load_vocabulary(tmp_path / "in").tokens
    assert auto_tokenizer.convert_ids_to_tokens(range(len(auto_tokenizer))) == list(tokens)


def test_added_token_with_the_id_of_a_special_token(tmp_path):
    """transformers leaves it out where tokenizer.json has an added token of that id."""
    config = {"tokenizer_class": "BertTokenizer"}
    written(tmp_path / "in", tokenizer_config=config, added_tokens={"new1": 5, "<extra>": 30})
    built = build_wordpiece_tokenizer({w: i for i, w in enumerate(VOCAB)})
    built.save(str(tmp_path / "in" / "tokenizer.json"))
    assert compare(tmp_path / "in", tmp_path)
    assert "new1" not in tokenizer.load_vocabulary(tmp_path / "in").tokens


@pytest.mark.parametrize("name", ["Camembert", "XLMRoberta"])
@pytest.mark.parametrize("declared_in", ["tokenizer_config", "config"])
def test_sentencepiece_tokenizers_of_roberta(tmp_path, name, declared_in):
    words = ["\u2581hello", "\u2581world", "\u2581a", "he", "llo", "\u2581", *"abcdefghijklmnoprstuvwxyz,!"]
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [*((token, 0.0) for token in special_tokens), *((w, -1.0 - i / 9) for i, w in enumerate(words))]
    tokenizer_class = getattr(transformers, f"{name}Tokenizer")
    tokenizer_class(vocab=[*vocab, ("<mask>", 0.0)], unk_token="<unk>").save_pretrained(tmp_path / "in")
    if declared_in == "config":
        config = {"model_type": {"Camembert": "camembert", "XLMRoberta": "xlm-roberta"}[name]}
        (tmp_path / "in" / "config.json").write_text(json.dumps(config))
        file = tmp_path / "in" / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["tokenizer_class"]
        file.write_text(json.dumps(settings))
    assert compare(tmp_path / "in", tmp_path)
    vocab, roles = tokenizer.load_vocabulary(tmp_path / "in"), auto_tokenizer_roles(tmp_path / "in")
    assert {role: getattr(vocab, f"{role}_id") for role in roles} == roles
    assert vocab.word_prefix == "\u2581"


@pytest.mark.parametrize("name", ["Electra", "MobileBert", "Bart", "Longformer"])
def test_equivalent_classes(tmp_path, name):
    if name in ("Bart", "Longformer"):
        config = {"tokenizer_class": f"{name}Tokenizer", "add_prefix_space": True}
        written(tmp_path / "in", tokenizer_config=config)
        bpe(tmp_path / "in")
        built = transformers.RobertaTokenizer.from_pretrained(tmp_path / "in", add_prefix_space=False)
        built.backend_tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    else:
        config = {"tokenizer_class": f"{name}Tokenizer", "do_lower_case": False}
        written(tmp_path / "in", tokenizer_config=config)
        built = build_wordpiece_tokenizer({w: i for i, w in enumerate(VOCAB)}, lowercase=True)
        built.save(str(tmp_path / "in" / "tokenizer.json"))
    assert auto_tokenizer_ids(tmp_path / "in")
    assert compare(tmp_path / "in", tmp_path)


def test_tokenizer_json_file_equals_its_directory(tmp_path):
    written(tmp_path / "in", tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    built = build_wordpiece_tokenizer({w: i for i, w in enumerate(VOCAB)}, lowercase=False)
    built.save(str(tmp_path / "in" / "tokenizer.json"))
    assert tokenizer.tokenizer_digest(tmp_path / "in" / "tokenizer.json") == tokenizer.tokenizer_digest(
        tmp_path / "in"
    )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix_space=some([None, True, False]),
    tokenizer_class=some(
        ["", "RobertaTokenizer", "RobertaTokenizerFast", "BertJapaneseTokenizer", "PreTrainedTokenizerFast"]
    ),
    model_type=some(["", "roberta"]),
    declared_in=some(["tokenizer_config", "config"]),
    as_json=st.booleans(),
)
@example(prefix_space=None, tokenizer_class="", model_type="", declared_in="config", as_json=False)
@example(
    prefix_space=True,
    tokenizer_class="RobertaTokenizer",
    model_type="roberta",
    declared_in="config",
    as_json=True,
)
@example(
    prefix_space=None,
    tokenizer_class="BertJapaneseTokenizer",
    model_type="",
    declared_in="config",
    as_json=False,
)
def test_byte_level(tmp_path_factory, prefix_space, tokenizer_class, model_type, declared_in, as_json):
    base = tmp_path_factory.mktemp("bytes")
    config = {} if prefix_space is None else {"add_prefix_space": prefix_space}
    declared = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    files = {"tokenizer_config": config, "config": {"model_type": model_type} if model_type else {}}
    files[declared_in] = files[declared_in] | declared
    written(base / "in", **files)
    bpe(base / "in")
    if as_json:
        transformers.RobertaTokenizer.from_pretrained(base / "in").backend_tokenizer.save(
            str(base / "in" / "tokenizer.json")
        )
    loaded = compare(base / "in", base)
    assert loaded == (tokenizer_class[:4] in ("", "Robe", "PreT"[: 4 * as_json]))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"vocab.json": '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a</w>": 5}'},
            "lacks 256 of the 256 bytes",
        ),
        (
            {"vocab.json": '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}'},
            "lacks 255 of the 256 bytes",
        ),
        ({"vocab.json": '{"<s>": 4000000000}'}, "without large gaps"),
        ({"vocab.json": "[" * 100000}, "expected"),
        (
            {"vocab.txt": "\n".join(VOCAB), "tokenizer_config.json": '{"mask_token": 7}'},
            "special token 7, expected a token",
        ),
        (
            {"vocab.txt": "\n".join(VOCAB), "tokenizer_config.json": '{"mask_token": {"content": []}}'},
            r"special token \[\], expected a token",
        ),
        (
            {"vocab.txt": "\n".join(VOCAB), "tokenizer_config.json": '{"mask_token": ["a"]}'},
            "special token \\['a'\\], expected a token",
        ),
        ({"vocab.txt": "\n".join(VOCAB), "added_tokens.json": '{"far": "x"}'}, "added tokens"),
        *(
            ({"vocab.txt": "\n".join(VOCAB), "tokenizer_config.json": content}, message)
            for content, message in [
                ('{"added_tokens_decoder": [1]}', "added tokens"),
                ('{"added_tokens_decoder": {"900": {"content": 5}}}', "added tokens"),
                ('{"added_tokens_decoder": {"900": null}}', "added tokens"),
                (
                    '{"additional_special_tokens": ["[E1]"]}',
                    r"no \[E1\] among its 82 tokens",
                ),
                (
                    '{"extra_special_tokens": {"x": "[E1]"}}',
                    r"no \[E1\] among its 82 tokens",
                ),
                ('{"bos_token": "<s>"}', "no <s> among its 82 tokens"),
                ('{"extra_special_tokens": [3]}', "special token 3, expected a token"),
                ('{"cls_token": "a b"}', "Missing SpecialToken.* `(a, b|b, a)`"),
            ]
        ),
        (
            {"vocab.txt": "\n".join([*VOCAB, "a:b"]), "special_tokens_map.json": '{"cls_token": "a:b"}'},
            'Cannot build Piece from string "a:b:0"',
        ),
        ({"vocab.txt": "\n".join(VOCAB), "added_tokens.json": '{"x": Infinity}'}, "added tokens"),
        ({"vocab.txt": "\n".join(VOCAB), "config.json": "[" * 100000}, "config.json: .*expected JSON"),
        (
            {"vocab.txt": "\n".join(VOCAB), "config.json": '{"tokenizer_class": "BertJapaneseTokenizer"}'},
            "BertJapaneseTokenizer has no fast tokenizer in transformers, expected a class that has one",
        ),
        (
            {"vocab.txt": "\n".join(VOCAB), "tokenizer_config.json": '{"do_lower_case": "no"}'},
            "'str' object is not an instance of 'bool'",
        ),
    ],
)
def test_invalid_files_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.load_vocabulary(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_byte_level_vocabulary_with_end_of_word_marks_is_refused(tmp_path):
    """As CLIP has them: all 256 bytes, and another way of putting them together."""
    bpe(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "a</w>": len(vocab)}))
    with pytest.raises(UserError, match="marks ends of words by </w>"):
        tokenizer.load_hf_tokenizer(tmp_path)


def test_ids_with_large_gaps_are_refused(tmp_path):
    built = json_of()
    built["model"]["vocab"]["far"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(built))
    with pytest.raises(UserError, match="'far' has the id 4000000000 among"):
        tokenizer.load_vocabulary(tmp_path)


FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "config.json", *FILES]
)
def test_broken_link_is_refused(tmp_path, name):
    if name in ("vocab.json", "merges.txt"):
        bpe(tmp_path)
        (tmp_path / name).unlink()
    elif name != "vocab.txt":
        (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=rf"{name}: a broken symbolic link, expected a file"):
        tokenizer.load_hf_tokenizer(tmp_path)
    if name != "config.json":
        with pytest.raises(UserError, match=rf"{name}: a broken symbolic link, expected a file"):
            has_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "config.json", *FILES]
)
def test_git_lfs_pointer_is_refused(tmp_path, name):
    if name in ("vocab.json", "merges.txt"):
        bpe(tmp_path)
    else:
        (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 466247\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer"):
        tokenizer.load_hf_tokenizer(tmp_path)


def test_the_class_of_a_tokenizer_json_needs_one(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"no tokenizer\.json, expected one with tokenizer_class 'PreTrained"):
        tokenizer.load_hf_tokenizer(tmp_path)


def flagged(content, **flags):
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **plain, **flags}


LINES = "\n".join(VOCAB) + "\n"
UNUSED = VOCAB.index("[unused0]")
BERT_CONFIG = {"tokenizer_class": "BertTokenizer"}
ROLES = dict(
    zip(
        (f"{r}_token" for r in ("pad", "unk", "cls", "sep", "mask")),
        WORDPIECE_TOKENS,
        strict=True,
    )
)
GENERIC_CONFIG = {**ROLES, "tokenizer_class": "PreTrainedTokenizerFast"}


def json_of(**changes):
    """BERT's tokenizer.json, with other settings of its model."""
    built = json.loads(build_wordpiece_tokenizer({w: i for i, w in enumerate(VOCAB)}).to_str())
    built["model"] |= changes
    return built


AS_TRANSFORMERS = {
    # tokens of the vocabulary that are found whole
    "special": {
        "vocab.txt": LINES,
        "config": BERT_CONFIG | {"added_tokens_decoder": {UNUSED: flagged("[unused0]")}},
    },
    "plain": {
        "vocab.txt": LINES,
        "config": BERT_CONFIG | {"added_tokens_decoder": {UNUSED: flagged("[unused0]", special=False)}},
    },
    "in another case": {
        "vocab.txt": LINES,
        "config": BERT_CONFIG | {"added_tokens_decoder": {6: flagged("[P]", special=False, normalized=True)}},
    },
    "in tokenizer.json": {
        "tokenizer.json": json_of(),
        "config": BERT_CONFIG | {"added_tokens_decoder": {UNUSED: flagged("[unused0]")}},
    },
    "of tokenizer.json alone": {
        "tokenizer.json": json_of(),
        "config": BERT_CONFIG | {"added_tokens_decoder": {}},
    },
    "listed": {"vocab.txt": LINES, "added": {"[unused0]": UNUSED}},
    "listed and special": {
        "vocab.txt": LINES,
        "added": {"[E1]": len(VOCAB)},
        "map": {"additional_special_tokens": ["[E1]"]},
    },
    "listed and called special": {
        "vocab.txt": LINES,
        "added": {"[E1]": len(VOCAB)},
        "config": {"additional_special_tokens": ["[E1]"]},
    },
    # which file counts
    "a map beside a decoder": {
        "vocab.txt": LINES,
        "config": {"cls_token": "[CLS]", "added_tokens_decoder": {3: flagged("[CLS]")}},
        "map": {"cls_token": "[C]"},
    },
    "a map": {"vocab.txt": LINES, "map": {"cls_token": "[C]"}},
    # special tokens beyond what the vocabulary's file says
    "a role": {"tokenizer.json": json_of(), "config": GENERIC_CONFIG | {"cls_token": "[C]"}},
    "a role not named": {"tokenizer.json": json_of() | {"added_tokens": []}, "config": {}, "kind": ""},
    "of another model": {"vocab.txt": LINES, "config": {"image_token": "[unused0]", "add_bos_token": False}},
    "not to be found": {"vocab.txt": LINES, "config": {"split_special_tokens": True}},
    # the model's own settings
    "another unknown": {"tokenizer.json": json_of(), "config": BERT_CONFIG | {"unk_token": "[P]"}},
    "another prefix": {"tokenizer.json": json_of(continuing_subword_prefix="@@"), "config": BERT_CONFIG},
    "short words": {"tokenizer.json": json_of(max_input_chars_per_word=3), "config": BERT_CONFIG},
    "short words as they are": {
        "tokenizer.json": json_of(max_input_chars_per_word=3),
        "config": GENERIC_CONFIG,
    },
    # lines
    "a space after a token": {"vocab.txt": LINES + "new \nun\n"},
    "spaces after all": {"vocab.txt": LINES.replace("\n", " \t\n")},
    "empty lines": {"vocab.txt": LINES + "\n \n\u3000\nnew\n"},
    "lines of Windows": {"vocab.txt": LINES.replace("\n", "\r\n")},
}


@pytest.mark.parametrize("files", AS_TRANSFORMERS.values(), ids=AS_TRANSFORMERS)
def test_ids_and_roles_equal_auto_tokenizer(tmp_path, files):
    directory = tmp_path / "in"
    kind = files.get("kind", "bert")
    written(
        directory,
        config={"model_type": kind} if kind else {"no": 1},
        tokenizer_config=files.get("config"),
        special_tokens_map=files.get("map"),
        added_tokens=files.get("added"),
        tokenizer=files.get("tokenizer.json"),
    )
    if "vocab.txt" in files:
        (directory / "vocab.txt").write_text(files["vocab.txt"], newline="")
    assert auto_tokenizer_ids(directory)
    assert compare(directory, tmp_path)
    vocab = tokenizer.load_vocabulary(directory)
    for where in (directory, tmp_path / "bert", tmp_path / "roberta"):
        for role, i in auto_tokenizer_roles(where).items():
            assert i in (None, getattr(vocab, f"{role}_id"))


@pytest.mark.parametrize(
    "config", [{}, {"cls_token": {"content": "<s>", "rstrip": True, "__type": "AddedToken"}}]
)
def test_byte_level_with_an_added_mask_token(tmp_path, config):
    """And with a token that has two roles: the later one tells how it is found."""
    (tmp_path / "in").mkdir()
    bpe(tmp_path / "in")
    vocab = json.loads((tmp_path / "in" / "vocab.json").read_text())
    vocab = {token: i - (i > 4) for token, i in vocab.items() if token != "<mask>"}
    (tmp_path / "in" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "in" / "added_tokens.json").write_text(json.dumps({"<mask>": len(vocab)}))
    (tmp_path / "in" / "config.json").write_text('{"model_type": "roberta"}')
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(config))
    assert auto_tokenizer_ids(tmp_path / "in")
    assert compare(tmp_path / "in", tmp_path)
    assert tokenizer.load_vocabulary(tmp_path / "in").mask_id == len(vocab)


def test_byte_level_ignores_bpe_dropout(tmp_path):
    """The class knows no dropout of merges."""
    written(tmp_path / "in", tokenizer_config={"tokenizer_class": "RobertaTokenizer"})
    bpe(tmp_path / "in")
    auto_tokenizer = transformers.RobertaTokenizer.from_pretrained(tmp_path / "in")
    built = json.loads(auto_tokenizer.backend_tokenizer.to_str())
    built["model"]["dropout"] = 0.9
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(built))
    assert compare(tmp_path / "in", tmp_path)


def processor(*names):
    """A frame of tokens that it does not know."""
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}]
    pieces += [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}
    return {"type": "Sequence", "processors": [{"type": "ByteLevel", **BYTES}, template]}


BYTES = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def charsmap(text):
    return {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": text}]}


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        (
            {"model": json_of(unk_token="[NOPE]")["model"]},
            GENERIC_CONFIG,
            r"no \[NOPE\] in the model's vocabulary",
        ),
        ({"model": json_of(vocab={})["model"]}, BERT_CONFIG, "no tokens, expected at least one|no \\[UNK\\]"),
        (
            {"model": json_of(vocab={"[UNK]": 0, "a": 1, "b": 1})["model"]},
            {},
            r"2 tokens have the id 1 \('a' and 'b'\)",
        ),
        ({"post_processor": processor("[CLS]")}, GENERIC_CONFIG, r"its post_processor puts '\[CLS\]' around"),
        *(
            ({"normalizer": charsmap(text)}, GENERIC_CONFIG, "precompiled_charsmap is damaged")
            for text in ("AAAA", "", "!!", "/////wAAAAA=", "AAAAAA==", "BAAAAAAAAAA=", None, 5)
        ),
        ({}, BERT_CONFIG | {"added_tokens_decoder": [1]}, "invalid added tokens"),
        ({}, BERT_CONFIG | {"added_tokens_decoder": {"1": "[unused0]"}}, "invalid added tokens"),
        ({}, BERT_CONFIG | {"added_tokens_decoder": "x"}, "invalid added tokens"),
        ({}, {"tokenizer_class": 5}, r"tokenizer_config\.json: tokenizer_class is 5, expected a name"),
        ({}, GENERIC_CONFIG | {"image_token": "<i>"}, "no <i> among its 82 tokens"),
    ],
)
def test_invalid_tokenizer_json_is_refused(tmp_path, changes, config, message, capfd):
    written(tmp_path / "in", tokenizer=json_of() | changes, tokenizer_config=config)
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.load_vocabulary(tmp_path / "in")
    assert len(str(caught.value).splitlines()) == 1
    assert not capfd.readouterr().err, "a panic prints before it can be caught"


@pytest.mark.parametrize("name", ["$A", "$", "$B", "$A:1"])
@pytest.mark.parametrize("role", ["cls_token", "sep_token"])
def test_special_tokens_with_template_syntax_are_refused(tmp_path, name, role):
    written(tmp_path / "in", special_tokens_map={role: name})
    (tmp_path / "in" / "vocab.txt").write_text(LINES + f"{name}\n")
    with pytest.raises(UserError, match=r"_token is .*, expected a plain name|Cannot build Piece"):
        tokenizer.load_hf_tokenizer(tmp_path / "in")


def test_two_tokens_with_one_id_are_refused(tmp_path):
    built = json_of()
    built["model"]["vocab"]["hello"] = built["model"]["vocab"]["world"]
    written(tmp_path / "in", tokenizer=built)
    for ask in (
        tokenizer.load_vocabulary,
        tokenizer.tokenizer_digest,
        lambda path: tokenizer.copy_tokenizer(path, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"2 tokens have the id \d+ \('hello' and 'world'\)"):
            ask(tmp_path / "in")


def test_directory_named_like_a_json_file(tmp_path):
    written(tmp_path / "named.json", tokenizer=json_of())
    assert tokenizer.load_hf_tokenizer(tmp_path / "named.json").encode("hello").ids
    assert tokenizer.tokenizer_digest(tmp_path / "named.json") == tokenizer.tokenizer_digest(
        tmp_path / "named.json/tokenizer.json"
    )


def test_text_that_the_tokenizer_cannot_encode_is_refused(tmp_path):
    """As a worker of prepare finds out."""
    from tokenizers import Tokenizer, models

    from dwt_jax.data.encode import EncodeConfig, encode_chunk

    vocab = {token: i for i, token in enumerate((*WORDPIECE_TOKENS, "a", "<unk>"))}
    model = models.BPE({token: i for token, i in vocab.items() if token != "<unk>"}, [], unk_token="<unk>")
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps(GENERIC_CONFIG))
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    recipe = EncodeConfig(str(tmp_path), "", 16, "packed", 1, 0.1)
    assert len(encode_chunk(["aaa"], recipe).fingerprints) == 32
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: .*<unk>.*, expected a tokenizer that"):
        encode_chunk(["b"], recipe)
