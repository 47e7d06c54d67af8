"""Masked words of held-out rows and what a model guesses."""

import jax
import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer

from dwt_jax.config import Source
from dwt_jax.config_loader import load_config
from dwt_jax.data.dataset import num_rows, open_dataset, read_rows
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.eval.masked_words import BLANK, choose_masked_words, guess_masked_words
from dwt_jax.models import bert
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.lm_head import lm_head_logits
from helpers.prepared_data import data_config
from helpers.runs import make_project


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    prepare_data(load_config(str(make_project(folder))).data, folder / "rows", workers=1)
    return folder / "rows"


def test_each_word_is_one_token_of_its_row(rows):
    """With the word put back, the row is a held-out row, and the text around it is the row's."""
    vocabulary, dataset = load_vocabulary(rows / "tokenizer"), open_dataset(rows, "held_out")
    held_out = np.asarray(read_rows(dataset, np.arange(num_rows(dataset))).tokens)
    masked_words = choose_masked_words(rows, 5)
    assert 3 <= len(masked_words) <= 5
    for masked_word in masked_words:
        assert masked_word.tokens[masked_word.position] == vocabulary.mask_id
        restored = masked_word.tokens.copy()
        restored[masked_word.position] = vocabulary.tokens.index(masked_word.word)
        assert (held_out == restored).all(1).any()
        assert masked_word.text.split().count(BLANK) == 1
        assert masked_word.word.isalpha()
        assert not vocabulary.tokens[masked_word.tokens[masked_word.position + 1]].startswith("##")
        before, after = masked_word.text.split(f"{BLANK}")
        kept = "".join(vocabulary.tokens[i].removeprefix("##") for i in masked_word.tokens)
        assert before.replace(" ", "") in kept
        assert after.replace(" ", "") in kept


def test_the_choice_is_the_same_every_time(rows):
    first, second = choose_masked_words(rows, 4), choose_masked_words(rows, 4)
    assert [word.text for word in first] == [word.text for word in second]
    assert len({word.text for word in first}) == len(first)


def test_more_rows_than_there_are(rows):
    count = num_rows(open_dataset(rows, "held_out"))
    assert len(choose_masked_words(rows, 10 * count)) <= count


def test_guesses_are_the_most_probable_tokens(rows, randomised):
    vocabulary = load_vocabulary(rows / "tokenizer")
    model = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    params, masked_words = randomised(model), choose_masked_words(rows, 3)
    guesses = guess_masked_words(params, model, masked_words, rows / "tokenizer", top_k=4)
    for masked_word, row in zip(masked_words, guesses, strict=True):
        hidden = bert.encode(params, model, masked_word.tokens[None], masked_word.segment_ids[None])
        logits = lm_head_logits(params, model, hidden)[0, masked_word.position, : len(vocabulary)]
        probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
        best = np.argsort(-probabilities)[:4]
        assert [guess.word for guess in row] == [vocabulary.tokens[i].removeprefix("##") for i in best]
        np.testing.assert_allclose([guess.probability for guess in row], probabilities[best], rtol=1e-5)


def test_a_model_that_diverged_has_no_guesses(rows, randomised):
    model = BertConfig(
        vocab_size=len(load_vocabulary(rows / "tokenizer")),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), bert.abstract_params(model))
    masked_words = choose_masked_words(rows, 2)
    assert guess_masked_words(params, model, masked_words, rows / "tokenizer") == [[] for _ in masked_words]


def test_words_of_a_byte_level_tokenizer(tmp_path):
    """Words are letters of the text, not symbols for its bytes: 'é' is two of them."""
    text = "Café élève déjà naïve “quoted” — café élève déjà naïve. "
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} {text * 40}" for i in range(30)))
    trained = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train([str(tmp_path / "a.txt")], vocab_size=400, special_tokens=special_tokens)
    (tmp_path / "bpe").mkdir()
    trained.save_model(str(tmp_path / "bpe"))
    source = Source(kind="text", path=str(tmp_path / "a.txt"), documents="blank_lines")
    data = data_config(tmp_path / "bpe", source)
    prepare_data(data, tmp_path / "rows", workers=1)
    masked_words = choose_masked_words(tmp_path / "rows", 4)
    assert masked_words
    for masked_word in masked_words:
        assert masked_word.word.lower() in {"café", "élève", "déjà", "naïve", "quoted"}
        assert "Ġ" not in masked_word.text
        assert "Ã" not in masked_word.text
