"""Tests of which tokens begin words."""

import pytest

from dwt_jax.data import tokenizer
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS


@pytest.mark.parametrize(
    ("model", "marks_words"),
    [
        ({"type": "BPE", "end_of_word_suffix": "</w>"}, False),
        ({"type": "BPE"}, False),
        ({"type": "BPE", "continuing_subword_prefix": "##"}, True),
        ({"type": "WordLevel"}, True),
    ],
)
def test_whether_words_are_marked(tmp_path, model, marks_words):
    from tokenizers import Tokenizer, models

    vocab = {token: i for i, token in enumerate([*WORDPIECE_TOKENS, "a", "a</w>", "##b"])}
    kind = getattr(models, model["type"])
    options = {key: value for key, value in model.items() if key != "type"}
    options |= {"merges": []} if model["type"] == "BPE" else {}
    Tokenizer(kind(vocab=vocab, unk_token="[UNK]", **options)).save(str(tmp_path / "tokenizer.json"))
    vocabulary = tokenizer.load_vocabulary(tmp_path)
    assert vocabulary.marks_words == marks_words
    assert vocabulary.continuation.any() == ("continuing_subword_prefix" in model)


def _trained_bpe(pre_tokenizer, normalizer):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(unk_token="[UNK]"))
    # As SentencePiece and byte-level BPE are trained, whatever the tokenizer does later.
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never")
    alphabet = [*pre_tokenizers.ByteLevel.alphabet()]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*WORDPIECE_TOKENS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(["the dog sees the other dog"] * 3, trainer)
    trained.pre_tokenizer, trained.normalizer = pre_tokenizer, normalizer
    return trained


@pytest.mark.parametrize(
    ("name", "word_prefix"),
    [
        ("normalizer", "▁"),
        ("normalizer, undivided", "▁"),
        ("Metaspace of another character", "Ġ"),
        ("spaces dropped before ByteLevel", ""),
        ("spaces at the ends of words", ""),
    ],
)
def test_word_prefix_is_that_of_the_tokenizer(tmp_path, name, word_prefix):
    from tokenizers import normalizers, pre_tokenizers

    replace = normalizers.Replace(" ", "▁")
    parts = {
        "normalizer": (pre_tokenizers.Split(" ", "merged_with_previous"), replace),  # Gemma's, mmBERT's
        "normalizer, undivided": (None, normalizers.Sequence([normalizers.Prepend("▁"), replace])),  # Llama's
        "Metaspace of another character": (pre_tokenizers.Metaspace("Ġ", "never"), None),
        "spaces dropped before ByteLevel": (
            pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            None,
        ),
        "spaces at the ends of words": (pre_tokenizers.Split("▁", "merged_with_previous"), replace),
    }
    _trained_bpe(*parts[name]).save(str(tmp_path / "tokenizer.json"))
    vocabulary = tokenizer.load_vocabulary(tmp_path)
    assert (vocabulary.word_prefix, vocabulary.marks_words) == (word_prefix, bool(word_prefix))
    if word_prefix:
        ids = tokenizer.load_hf_tokenizer(tmp_path).encode("see the dog", add_special_tokens=False).ids
        begun = [vocabulary.tokens[i][0] for i in ids if not vocabulary.continuation[i]]
        assert begun[-2:] == [word_prefix] * 2


def test_an_undivided_vocabulary_that_ends_words_marks_none(tmp_path):
    from tokenizers import Tokenizer, models, normalizers

    tokens = [*WORDPIECE_TOKENS, "a", "b", "▁", "a▁", "b▁", "▁a"]
    trained = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="[UNK]"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.save(str(tmp_path / "tokenizer.json"))
    assert not tokenizer.load_vocabulary(tmp_path).marks_words


def test_characters_of_word_level_are_no_words(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate([*WORDPIECE_TOKENS, "日", "本"])}
    characters = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.save(str(tmp_path / "tokenizer.json"))
    assert not tokenizer.load_vocabulary(tmp_path).marks_words
