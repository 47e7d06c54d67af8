"""Tokenizer directories as they are found: the same ids as AutoTokenizer's, or refused in one line."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dwt_jax.data import tokenizer
from dwt_jax.errors import UserError

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello world",
    "a [MASK] b [E1] c [e1]x <mask> d NEW1 [unused0]",
    "Ein Äpfel déjà vu, naïve!",
    "日本 hello日本",
    "un##s [MASK] end  two  spaces",
    "new1 and x<extra>y",
]
WORDS = [
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


def ids_there(directory):
    """Those of AutoTokenizer; None where it cannot tell what the directory holds."""
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        assert len(theirs) > 20  # without a vocabulary it makes one of its own
    except (AssertionError, KeyError, OSError, ValueError, TypeError):
        return None
    return [theirs(text, add_special_tokens=True).input_ids for text in TEXTS]


def ids_here(directory):
    try:
        tokenizer.vocabulary(directory)
        return [tokenizer.load(directory).encode(text).ids for text in TEXTS]
    except UserError:
        return None


def compare(directory, out):
    """As AutoTokenizer has it; and so it stays once installed, beside a model of any family."""
    ours, theirs = ids_here(directory), ids_there(directory)
    if ours is None:
        return False
    if theirs is not None:
        assert ours == theirs
    for kind in MODELS[1:]:
        tokenizer.install(directory, out / kind)
        assert ids_here(out / kind) == ours
        (out / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        assert ids_there(out / kind) == ours, kind
        assert tokenizer.digest(out / kind) == tokenizer.digest(directory)
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
@given(config=flags, kind=some(MODELS[:3]), cased=st.booleans(), whole=st.booleans(), added=some([0, 1, 2]))
@example(config={}, kind="bert", cased=True, whole=True, added=0)
@example(config={"do_lower_case": False}, kind="bert", cased=False, whole=True, added=0)
@example(config={"strip_accents": False}, kind="distilbert", cased=False, whole=False, added=2)
@example(config={"pad_token": "[P]", "cls_token": "[C]"}, kind="bert", cased=True, whole=False, added=1)
def test_wordpiece(tmp_path_factory, config, kind, cased, whole, added):
    base = tmp_path_factory.mktemp("words")
    extra = {"<extra>": len(WORDS), "new1": len(WORDS) + 1}
    decoder = {
        str(i): {"content": t, "special": t[0] == "<", "normalized": t[0] != "<"} for t, i in extra.items()
    }
    if added == 2 and not whole:
        config = config | {"added_tokens_decoder": decoder}
    kind = {"model_type": kind} if kind else {}
    written(base / "in", tokenizer_config=config, config=kind, added_tokens=extra if added == 1 else {})
    if whole:
        made = tokenizer.wordpiece({w: i for i, w in enumerate(WORDS)}, lowercase=not cased)
        made.save(str(base / "in" / "tokenizer.json"))
    else:
        (base / "in" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    taken = compare(base / "in", base)
    plain = config.get("tokenizer_class") != "PreTrainedTokenizerFast"
    assert taken == (whole or plain)


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}], ids=str)
@pytest.mark.parametrize("special", [True, False])
def test_how_added_tokens_are_found(tmp_path, flags, special):
    """As transformers 4 saved them: a decoder with flags, for the roles too."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special, **flags}
    added = {"[E1]": len(WORDS), "new1": len(WORDS) + 1, "[MASK]": WORDS.index("[MASK]")}
    decoder = {
        str(i): {"content": t, **flags, "special": special or t == "[MASK]", "normalized": not special}
        for t, i in added.items()
    }
    config = {"tokenizer_class": "BertTokenizer", "added_tokens_decoder": decoder}
    config |= {"additional_special_tokens": ["[E1]", "[unused0]"] if special else ["[unused0]"]}
    written(tmp_path / "in", tokenizer_config=config)
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    assert compare(tmp_path / "in", tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    assert set(tokenizer.vocabulary(tmp_path / "in").special_ids) >= set(theirs.all_special_ids)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_mask_that_takes_the_space_before_it(tmp_path, file):
    (tmp_path / "in").mkdir()
    bpe(tmp_path / "in")
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    said = {"tokenizer_class": "RobertaTokenizer"} if file == "tokenizer_config.json" else {}
    (tmp_path / "in" / file).write_text(json.dumps({**said, "mask_token": {"__type": "AddedToken", **mask}}))
    assert compare(tmp_path / "in", tmp_path)


def test_the_map_of_special_tokens_comes_first(tmp_path):
    written(tmp_path / "in", tokenizer_config={"tokenizer_class": "BertTokenizer", "mask_token": "[unused0]"})
    (tmp_path / "in" / "special_tokens_map.json").write_text('{"mask_token": "[MASK]"}')
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    assert compare(tmp_path / "in", tmp_path)
    words = tokenizer.vocabulary(tmp_path / "in")
    assert words.tokens[words.mask_id] == "[MASK]"


@pytest.mark.parametrize("name", ["Electra", "MobileBert", "Bart", "Longformer"])
def test_classes_that_are_another(tmp_path, name):
    if name in ("Bart", "Longformer"):
        config = {"tokenizer_class": f"{name}Tokenizer", "add_prefix_space": True}
        written(tmp_path / "in", tokenizer_config=config)
        bpe(tmp_path / "in")
        whole = transformers.RobertaTokenizer.from_pretrained(tmp_path / "in", add_prefix_space=False)
        whole.backend_tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    else:
        config = {"tokenizer_class": f"{name}Tokenizer", "do_lower_case": False}
        written(tmp_path / "in", tokenizer_config=config)
        made = tokenizer.wordpiece({w: i for i, w in enumerate(WORDS)}, lowercase=True)
        made.save(str(tmp_path / "in" / "tokenizer.json"))
    assert ids_there(tmp_path / "in")
    assert compare(tmp_path / "in", tmp_path)


def test_a_file_is_read_as_its_directory_is(tmp_path):
    written(tmp_path / "in", tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    made = tokenizer.wordpiece({w: i for i, w in enumerate(WORDS)}, lowercase=False)
    made.save(str(tmp_path / "in" / "tokenizer.json"))
    assert tokenizer.digest(tmp_path / "in" / "tokenizer.json") == tokenizer.digest(tmp_path / "in")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    space=some([None, True, False]),
    named=some(
        ["", "RobertaTokenizer", "RobertaTokenizerFast", "BertJapaneseTokenizer", "PreTrainedTokenizerFast"]
    ),
    kind=some(["", "roberta"]),
    where=some(["tokenizer_config", "config"]),
    whole=st.booleans(),
)
@example(space=None, named="", kind="", where="config", whole=False)
@example(space=True, named="RobertaTokenizer", kind="roberta", where="config", whole=True)
@example(space=None, named="BertJapaneseTokenizer", kind="", where="config", whole=False)
def test_byte_level(tmp_path_factory, space, named, kind, where, whole):
    base = tmp_path_factory.mktemp("bytes")
    config = {} if space is None else {"add_prefix_space": space}
    said = {"tokenizer_class": named} if named else {}
    here = {"tokenizer_config": config, "config": {"model_type": kind} if kind else {}}
    here[where] = here[where] | said
    written(base / "in", **here)
    bpe(base / "in")
    if whole:
        transformers.RobertaTokenizer.from_pretrained(base / "in").backend_tokenizer.save(
            str(base / "in" / "tokenizer.json")
        )
    taken = compare(base / "in", base)
    assert taken == (whole or named[:4] in ("", "Robe"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"vocab.json": '{"<s>": 0, "a</w>": 1}'}, "no <pad> <unk> </s> <mask>"),
        (
            {"vocab.json": '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a</w>": 5}'},
            "lacks 256 of the 256 bytes",
        ),
        (
            {"vocab.json": '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}'},
            "lacks 255 of the 256 bytes",
        ),
        ({"vocab.json": '{"<s>": 4000000000}'}, "no <pad>"),
        ({"vocab.json": "[" * 100000}, "expected"),
        ({"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": '{"mask_token": 7}'}, "mask_token is 7"),
        (
            {"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": '{"mask_token": {"content": []}}'},
            r"mask_token is \{'content': \[\]\}",
        ),
        (
            {"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": '{"mask_token": ["a"]}'},
            "mask_token is \\['a'\\], expected a token",
        ),
        ({"vocab.txt": "\n".join(WORDS), "added_tokens.json": '{"far": 900}'}, "added token 'far'"),
        ({"vocab.txt": "\n".join(WORDS), "added_tokens.json": '{"far": "x"}'}, "added tokens"),
        *(
            ({"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": content}, says)
            for content, says in [
                ('{"added_tokens_decoder": [1]}', "added tokens"),
                ('{"added_tokens_decoder": {"900": {"content": 5}}}', "added tokens"),
                ('{"added_tokens_decoder": {"900": null}}', "added tokens"),
                (
                    '{"additional_special_tokens": ["[E1]"]}',
                    "special token '\\[E1\\]' is not in the vocabulary",
                ),
                (
                    '{"extra_special_tokens": {"x": "[E1]"}}',
                    "special token '\\[E1\\]' is not in the vocabulary",
                ),
                ('{"bos_token": "<s>"}', "special token '<s>' is not in the vocabulary"),
                ('{"extra_special_tokens": [3]}', "special token 3, expected a token"),
                ('{"cls_token": "a b"}', "no a b"),
            ]
        ),
        (
            {"vocab.txt": "\n".join([*WORDS, "a:b"]), "special_tokens_map.json": '{"cls_token": "a:b"}'},
            "plain",
        ),
        ({"vocab.txt": "\n".join(WORDS), "added_tokens.json": '{"x": Infinity}'}, "added tokens"),
        ({"vocab.txt": "\n".join(WORDS), "config.json": "[" * 100000}, "config.json: .*expected JSON"),
        (
            {"vocab.txt": "\n".join(WORDS), "config.json": '{"tokenizer_class": "BertJapaneseTokenizer"}'},
            "tokenizer_class is 'BertJapaneseTokenizer', expected BertTokenizer",
        ),
        (
            {"vocab.txt": "\n".join(WORDS), "tokenizer_config.json": '{"do_lower_case": "no"}'},
            "do_lower_case is 'no', expected true or false",
        ),
    ],
)
def test_refused(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=says) as caught:
        tokenizer.vocabulary(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_bytes_with_marked_ends_of_words(tmp_path):
    """As CLIP has them: all 256 bytes, and another way of putting them together."""
    bpe(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "a</w>": len(vocab)}))
    with pytest.raises(UserError, match="marks ends of words by </w>"):
        tokenizer.load(tmp_path)


def test_ids_far_apart(tmp_path):
    vocab = {w: i for i, w in enumerate(WORDS)} | {"far": 4_000_000_000}
    tokenizer.wordpiece(vocab).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="'far' has the id 4000000000 among"):
        tokenizer.vocabulary(tmp_path)


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"tokenizer\.json: a link to nothing"):
        tokenizer.load(tmp_path)


def test_a_large_file_that_was_not_fetched(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 466247\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(UserError, match=r"tokenizer\.json: a Git LFS pointer"):
        tokenizer.load(tmp_path)
