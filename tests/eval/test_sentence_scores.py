"""Pseudo log-likelihoods against a plain loop over transformers' models in torch."""

import dataclasses

import jax
import numpy as np
import pytest

from dwt_jax.config import Mesh
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.errors import UserError
from dwt_jax.eval import sentence_scores
from dwt_jax.eval.sentence_scores import SPECIAL_TOKENS, Scoring, encode_sentences, score_sentences
from dwt_jax.models import bert
from dwt_jax.models.common import lm_head
from dwt_jax.runs.load import load_model
from helpers.masked_models import save_masked_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "The cab faded.",
    "A bed",
    "a 'bed', cabbed",
    "Gabbed facades!",
    "cab cab cab a bed a bed a bed.",
    "f",
    "deface [SEP] a",
]
CLASSES = ["BertForMaskedLM", "ModernBertForMaskedLM", "RobertaForMaskedLM", "EuroBertForMaskedLM"]


@pytest.fixture(scope="module", params=CLASSES)
def folder(request, tmp_path_factory):
    return save_masked_model(tmp_path_factory.mktemp("models") / "model", request.param)


@pytest.fixture(scope="module")
def texts(folder):
    """Those that fit into the model: a RoBERTa has two positions less."""
    lengths = encode_sentences(TEXTS, folder).lengths + SPECIAL_TOKENS
    max_length = load_model(str(folder)).model.max_length
    return [text for text, length in zip(TEXTS, lengths, strict=True) if length <= max_length]


def scores_of(folder, texts, scoring=Scoring(), **options):
    loaded = load_model(str(folder))
    sentences = encode_sentences(texts, folder)
    options = {"mesh": make_mesh(Mesh(), 1), "buckets": (), **options}  # one length, so one compilation
    return score_sentences(
        loaded.params, loaded.model, sentences, load_vocabulary(folder), scoring, **options
    )


def torch_score(model, tokenizer, text, pll):
    """Mask one token after the other, and with word-l2r what follows it in its word."""
    encoding = tokenizer(text.replace("[SEP]", "[ SEP ]"), return_tensors="pt")
    ids, word_ids, total = encoding.input_ids[0], encoding.word_ids(), 0.0
    for i, word in enumerate(word_ids):
        if word is None:
            continue
        masked = ids.clone()
        masked[i] = tokenizer.mask_token_id
        for j in range(i + 1, len(ids)):
            if pll == "word-l2r" and word_ids[j] == word:
                masked[j] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=masked[None]).logits[0, i]
        total += torch.log_softmax(logits.double(), -1)[ids[i]].item()
    return total, len(ids) - 2


@pytest.mark.parametrize("pll", ["word-l2r", "original"])
def test_scores_equal_a_loop_over_transformers(folder, texts, pll):
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected, counts = np.transpose([torch_score(model, tokenizer, text, pll) for text in texts])
    np.testing.assert_allclose(scores_of(folder, texts, Scoring(pll)), expected, atol=1e-4)
    means = scores_of(folder, texts, Scoring(pll, normalize_length=True))
    np.testing.assert_allclose(means, expected / counts, atol=1e-4)


def test_the_two_scorings_differ_in_words_of_several_tokens_alone(folder, texts):
    sentences = encode_sentences(texts, folder)
    is_last = np.arange(len(sentences.tokens)) + 1 == sentences.word_ends
    of_one_piece = [
        is_last[start:end].all() for start, end in zip(sentences.offsets, sentences.offsets[1:], strict=False)
    ]
    assert 0 < sum(of_one_piece) < len(texts)
    difference = scores_of(folder, texts) - scores_of(folder, texts, Scoring("original"))
    assert (np.abs(difference) < 2e-4).tolist() == of_one_piece


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"buckets": sentence_scores.BUCKETS}])
def test_scores_depend_on_neither_batches_nor_buckets(folder, texts, options):
    counts = []
    scores = scores_of(folder, texts, on_tokens=counts.append, **options)
    np.testing.assert_allclose(scores, scores_of(folder, texts), atol=2e-5)
    assert sum(counts) == len(encode_sentences(texts, folder).tokens)


def test_selected_sentences_are_encoded_as_on_their_own(folder):
    some = [4, 1, 5]
    selected = encode_sentences(TEXTS, folder).select(np.array(some))
    for array, expected in zip(selected, encode_sentences([TEXTS[i] for i in some], folder), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert len(selected) == 3


def test_a_text_without_tokens_has_no_row(folder):
    sentences = encode_sentences(["a", "", "a bed", ""], folder)
    assert (sentences.lengths == 0).tolist() == [False, True, False, True]
    assert (sentences.word_ends <= np.repeat(sentences.offsets[1:], sentences.lengths)).all()


def test_one_compilation_for_each_length_and_scoring(tmp_path):
    """Scorings share programs: what is masked is an input."""
    folder = save_masked_model(tmp_path / "model", "BertForMaskedLM", seed=2)
    config = dataclasses.replace(load_model(str(folder)).model, hidden_act="relu")  # not compiled elsewhere
    sentences, vocabulary = encode_sentences(TEXTS, folder), load_vocabulary(folder)
    params, mesh = load_model(str(folder)).params, make_mesh(Mesh(), 1)
    for scoring in (Scoring(), Scoring("original")):
        score_sentences(params, config, sentences, vocabulary, scoring, mesh=mesh, batch_size=4)
    program = sentence_scores._jit_masked_score(config, sentence_scores.Policy(), mesh)
    assert program._cache_size() == 2  # lengths 8 and 12


def test_an_objective_without_a_score_is_refused(folder, monkeypatch):
    monkeypatch.setattr(sentence_scores, "_LOG_PROBABILITIES", {"next_token": None})
    with pytest.raises(UserError, match="objective is mlm, expected one of next_token"):
        scores_of(folder, TEXTS)


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    """A model of next tokens, beside the tokenizer of a masked one."""
    folder = save_masked_model(tmp_path_factory.mktemp("models") / "model", "BertForMaskedLM")
    config = transformers.Qwen3Config(
        vocab_size=load_model(str(folder)).model.vocab_size,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=24,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    torch.manual_seed(3)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_scores_of_a_decoder_equal_transformers(decoder_folder, monkeypatch):
    """The sum of log p(token | those before it), the end token left out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder_folder)
    expected, counts = [], []
    for text in TEXTS:
        ids = tokenizer(text.replace("[SEP]", "[ SEP ]"), return_tensors="pt").input_ids
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0]
        labels = ids[0, 1:-1]
        expected.append(log_p[torch.arange(len(labels)), labels].sum().item())
        counts.append(len(labels))
    np.testing.assert_allclose(scores_of(decoder_folder, TEXTS), expected, atol=1e-4)
    options = {"batch_size": 3, "buckets": sentence_scores.BUCKETS}
    np.testing.assert_allclose(scores_of(decoder_folder, TEXTS, **options), expected, atol=1e-4)
    means = scores_of(decoder_folder, TEXTS, Scoring(normalize_length=True))
    np.testing.assert_allclose(means, np.array(expected) / counts, atol=1e-4)
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 4 * 256)  # a few positions at a time
    sentence_scores._jit_next_token_score.cache_clear()
    np.testing.assert_allclose(scores_of(decoder_folder, TEXTS, batch_size=2), expected, atol=1e-4)


def test_a_model_that_ignores_its_input_scores_the_bag_of_tokens(tmp_path):
    """All parameters are 0 but the output bias b: log p(token) is b[token] − log Σ exp(b), in any order."""
    folder = save_masked_model(tmp_path / "model", "BertForMaskedLM")
    model, vocabulary = load_model(str(folder)).model, load_vocabulary(folder)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), bert.abstract_params(model))
    bias = np.random.default_rng(0).normal(size=model.vocab_size)
    params["mlm"]["bias"][: model.vocab_size] = bias
    texts = ["the cab faded", "cab faded the", "faded the cab"]
    sentences = encode_sentences(texts, folder)
    scores = score_sentences(params, model, sentences, vocabulary, mesh=make_mesh(Mesh(), 1))
    tokens = sentences.tokens[: sentences.offsets[1]]
    assert len(tokens) > 3
    np.testing.assert_allclose(
        scores, bias[tokens].sum() - len(tokens) * np.log(np.exp(bias).sum()), rtol=1e-5
    )
    assert scores[0] == scores[1] == scores[2]
