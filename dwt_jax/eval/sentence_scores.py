"""Score sentences by their probability under a language model.

A masked model scores by pseudo log-likelihood (PLL): the sum over tokens of log p(token | the rest of
the sentence), where each token is masked in its own row. `original` masks only that token (Salazar et al.
2020, arXiv 1910.14659). `word-l2r` also masks the later tokens of its word, because the pieces of a rare word
otherwise reveal each other and the word seems probable (Kauf and Ivanova 2023, arXiv 2305.10588).

The score of a causal model is the log probability of the sentence: the sum over tokens of log p(token |
earlier tokens), where the first token follows [CLS].

Rows are segments as `dwt prepare` writes them, [CLS] sentence [SEP]. The special tokens are not scored.

Letters of shapes: N sentences, T tokens of all of them, B rows, L tokens a row.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.data.tokenizer_checks import wrap_tokenizer_errors
from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding, to_global
from dwt_jax.errors import UserError
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_head_logits, map_positions
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings, policy_for_mesh
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives.distillation import cross_entropy

SPECIAL_TOKENS = 2  # of a row: [CLS] and [SEP]
_TOKENIZER_BATCH_SIZE = 10_000  # texts per call of the tokenizer
BUCKETS = (8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Lengths that rows are padded to: one compilation each. A longer row is padded to the model's maximum."""


@dataclass(frozen=True)
class Scoring:
    """How a sentence is scored."""

    pll: Literal["word-l2r", "original"] = "word-l2r"  # of masked models
    normalize_length: bool = False  # divide by the number of tokens


class EncodedSentences(NamedTuple):
    """Token ids of N sentences, concatenated. Sentence i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: np.ndarray  # int32 [T], without special tokens
    word_ends: np.ndarray  # int64 [T], index into `tokens` of the end of each token's word (exclusive)
    offsets: np.ndarray  # int64 [N + 1]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence, int64 [N]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        """Number of sentences, unlike a plain NamedTuple's number of fields."""
        return len(self.offsets) - 1

    def select(self, indices: np.ndarray) -> "EncodedSentences":
        """Return the sentences of these indices, int [M], in their order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.offsets[indices] - offsets[:-1], lengths)
        source = np.arange(offsets[-1]) + shift
        return EncodedSentences(self.tokens[source], self.word_ends[source] - shift, offsets)


def encode_sentences(texts: Sequence[str], tokenizer: Path) -> EncodedSentences:
    """Tokenize sentences, without special tokens.

    A word is what the tokenizer's pre-tokenizer splits off, so that a punctuation mark is a word of its own
    for most tokenizers. Special tokens in a text are encoded as plain text, as in `dwt prepare`.

    Args:
        texts: N sentences.
        tokenizer: directory of the tokenizer.

    Raises:
        UserError: the tokenizer cannot be loaded, or fails on a text.
    """
    hf_tokenizer = load_hf_tokenizer(tokenizer)
    hf_tokenizer.encode_special_tokens = True
    lengths: list[int] = []
    ids: list[int] = []
    words_of_ids: list[int | None] = []  # None only for special tokens, which are not added
    for start in range(0, len(texts), _TOKENIZER_BATCH_SIZE):
        with wrap_tokenizer_errors(tokenizer, "a tokenizer that encodes any text"):
            batch = list(texts[start : start + _TOKENIZER_BATCH_SIZE])
            encodings = hf_tokenizer.encode_batch(batch, add_special_tokens=False)
        for encoding in encodings:
            lengths.append(len(encoding.ids))
            ids += encoding.ids
            words_of_ids += encoding.word_ids
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens, word_ids = np.array(ids, np.int32), np.array(words_of_ids, np.int64)
    starts_word = np.diff(word_ids, prepend=-1) != 0
    starts_word[offsets[:-1][np.diff(offsets) > 0]] = True
    starts = np.flatnonzero(starts_word)
    ends = np.append(starts[1:], len(tokens))[: len(starts)]
    return EncodedSentences(tokens, np.repeat(ends, ends - starts), offsets)


def score_sentences(
    params: Params,
    model: ModelConfig,
    sentences: EncodedSentences,
    vocabulary: Vocabulary,
    scoring: Scoring = Scoring(),
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int = 64,
    buckets: Sequence[int] = BUCKETS,
    policy: Policy = Policy(),
    on_tokens: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Compute the score of each sentence: the higher, the more probable.

    Args:
        params: placed on the mesh.
        model: config of the model. Its objective determines the kind of score.
        sentences: none longer than the model's maximum less SPECIAL_TOKENS.
        vocabulary: of the tokenizer of the sentences.
        scoring: how to score.
        mesh: devices.
        batch_size: rows per batch, rounded up to a multiple of the mesh's batch shards; does not change the
            result, nor do the buckets.
        buckets: lengths that rows are padded to, increasing.
        policy: dtypes.
        on_tokens: called with the number of tokens that were scored since the last call.

    Returns:
        Nats, float64 [N]; a mean over tokens with `normalize_length`.

    Raises:
        UserError: sentences cannot be scored with models of this objective.
    """
    objective = model.objective
    if objective not in _LOG_PROBABILITIES:
        raise UserError(
            f"--pairs: the model's objective is {objective}, expected one of {', '.join(_LOG_PROBABILITIES)}"
        )
    rows_multiple = mesh.shape["data"] * mesh.shape["fsdp"]
    layout = _BatchLayout(-(-batch_size // rows_multiple) * rows_multiple, tuple(buckets), mesh, policy)
    log_probabilities = np.zeros(len(sentences.tokens))
    batches = _LOG_PROBABILITIES[objective](params, model, sentences, vocabulary, scoring, layout)
    for token_indices, values in batches:
        log_probabilities[token_indices] = values
        on_tokens(len(token_indices))
    sentence_of_token = np.repeat(np.arange(len(sentences)), sentences.lengths)
    scores = np.bincount(sentence_of_token, log_probabilities, minlength=len(sentences))
    return scores / sentences.lengths if scoring.normalize_length else scores


class _BatchLayout(NamedTuple):
    batch_size: int  # a multiple of the mesh's batch shards
    buckets: tuple[int, ...]
    mesh: jax.sharding.Mesh
    policy: Policy


def _masked_log_probabilities(
    params: Params,
    model: ModelConfig,
    sentences: EncodedSentences,
    vocabulary: Vocabulary,
    scoring: Scoring,
    layout: _BatchLayout,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices into `sentences.tokens`, their log probabilities), with a row for each token.

    One batch is computed ahead.
    """
    score = _jit_masked_score(model, layout.policy, layout.mesh)
    sharding = batch_sharding(layout.mesh)
    mask_ends = np.arange(len(sentences.tokens)) + 1 if scoring.pll == "original" else sentences.word_ends
    pending: deque[tuple[np.ndarray, jax.Array]] = deque()

    def next_result() -> tuple[np.ndarray, np.ndarray]:
        indices, values = pending.popleft()
        return indices, np.asarray(jax.device_get(values), np.float64)[: len(indices)]

    row_lengths = np.repeat(sentences.lengths, sentences.lengths) + SPECIAL_TOKENS  # a row for each token
    for length, indices in _batches_by_length(row_lengths, layout, model.max_length):
        rows = np.resize(indices, layout.batch_size)  # the last batch of a length repeats its rows
        batch = _masked_rows(sentences, rows, mask_ends[rows], length, vocabulary)
        pending.append((indices, score(params, *to_global(batch, sharding))))
        if len(pending) > 1:
            yield next_result()
    while pending:
        yield next_result()


def _next_token_log_probabilities(
    params: Params,
    model: ModelConfig,
    sentences: EncodedSentences,
    vocabulary: Vocabulary,
    scoring: Scoring,
    layout: _BatchLayout,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices into `sentences.tokens`, their log probabilities), with a row for each sentence."""
    score = _jit_next_token_score(model, layout.policy, layout.mesh)
    sharding = batch_sharding(layout.mesh)
    for length, numbers in _batches_by_length(sentences.lengths + SPECIAL_TOKENS, layout, model.max_length):
        rows = np.resize(numbers, layout.batch_size)  # the last batch of a length repeats its rows
        tokens, segment_ids, source = _plain_rows(sentences, rows, length, vocabulary)
        values = jax.device_get(score(params, *to_global((tokens, segment_ids), sharding)))
        is_token = (segment_ids > 0) & (source >= sentences.offsets[rows][:, None])
        is_token &= source < sentences.offsets[rows + 1][:, None]
        is_token[len(numbers) :] = False
        yield source[is_token], np.asarray(values, np.float64)[is_token]


_LOG_PROBABILITIES = {"mlm": _masked_log_probabilities, "next_token": _next_token_log_probabilities}
"""By the objective of a family. Each yields all tokens once."""


def _batches_by_length(
    lengths: np.ndarray, layout: _BatchLayout, max_length: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (length of the rows, numbers of up to batch_size rows), the shortest first.

    Args:
        lengths: int [N], of the rows without padding.
        layout: of the batches.
        max_length: of the model.
    """
    buckets = np.array([*(x for x in layout.buckets if x < max_length), max_length])
    bucket_of_row = np.searchsorted(buckets, lengths)
    for bucket in np.unique(bucket_of_row):
        indices = np.flatnonzero(bucket_of_row == bucket)
        for start in range(0, len(indices), layout.batch_size):
            yield int(buckets[bucket]), indices[start : start + layout.batch_size]


def _masked_rows(
    sentences: EncodedSentences,
    indices: np.ndarray,
    mask_ends: np.ndarray,
    length: int,
    vocabulary: Vocabulary,
) -> tuple[np.ndarray, ...]:
    """Return the rows in which some tokens are masked.

    Args:
        sentences: N sentences.
        indices: int [B], of a token for each row.
        mask_ends: int [B], the end of what is masked from that token on (exclusive).
        length: L.
        vocabulary: has the special tokens.

    Returns:
        tokens and segment ids, int32 [B, L], position of the token in its row and its id, int32 [B].
    """
    sentence = np.searchsorted(sentences.offsets, indices, side="right") - 1
    tokens, segment_ids, source = _plain_rows(sentences, sentence, length, vocabulary)
    is_masked = (source >= indices[:, None]) & (source < mask_ends[:, None])
    positions = indices - sentences.offsets[sentence] + 1
    return (
        np.where(is_masked, vocabulary.mask_id, tokens).astype(np.int32),
        segment_ids,
        positions.astype(np.int32),
        sentences.tokens[indices],
    )


def _plain_rows(
    sentences: EncodedSentences, rows: np.ndarray, length: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows `[CLS] sentence [SEP]`.

    Args:
        sentences: N sentences.
        rows: int [B], their numbers.
        length: L.
        vocabulary: has the special tokens.

    Returns:
        tokens and segment ids, int32 [B, L], and the index into `sentences.tokens` of each position, int64
        [B, L], outside of the sentence where it is that of no token.
    """
    starts, ends = sentences.offsets[rows][:, None], sentences.offsets[rows + 1][:, None]
    source = starts + np.arange(length) - 1
    tokens = sentences.tokens[np.clip(source, 0, len(sentences.tokens) - 1)]
    tokens = np.where(source > ends, vocabulary.pad_id, tokens)
    tokens = np.where(source == ends, vocabulary.sep_id, tokens)
    tokens[:, 0] = vocabulary.cls_id
    return tokens.astype(np.int32), (source <= ends).astype(np.int32), source


@functools.cache
def _jit_masked_score(model: ModelConfig, policy: Policy, mesh: jax.sharding.Mesh) -> Any:
    """Return the jitted (params, tokens, segment ids, positions, labels) → log p(label), fp32 [B]."""
    policy, row_sharding = policy_for_mesh(mesh, policy), batch_sharding(mesh)

    def score(
        params: Params, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, labels: jax.Array
    ) -> jax.Array:
        hidden = family(model).encode(
            params, model, tokens, segment_ids, positions=positions[:, None], policy=policy
        )
        return -cross_entropy(lm_head_logits(params, model, hidden, policy=policy)[:, 0], labels)

    layout = infer_shardings(family(model).abstract_params(model), model, mesh)
    return jax.jit(
        score, in_shardings=(layout, *(row_sharding,) * 4), out_shardings=replicated_sharding(mesh)
    )


@functools.cache
def _jit_next_token_score(model: ModelConfig, policy: Policy, mesh: jax.sharding.Mesh) -> Any:
    """Return the jitted (params, tokens and segment ids [B, L]) → log p(token | those before it) [B, L]."""
    replicated_layout, row_sharding = replicated_sharding(mesh), batch_sharding(mesh)
    policy = policy_for_mesh(mesh, policy)

    def score(params: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        hidden = family(model).encode(params, model, tokens, segment_ids, policy=policy)

        def log_probabilities(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden, labels = chunk
            return -cross_entropy(lm_head_logits(params, model, hidden, policy=policy), labels)

        inputs = hidden, jnp.roll(tokens, -1, axis=1)  # of the last position the label means nothing
        return jnp.roll(map_positions(log_probabilities, inputs, model.vocab_size, policy), 1, axis=1)

    layout = infer_shardings(family(model).abstract_params(model), model, mesh)
    return jax.jit(score, in_shardings=(layout, row_sharding, row_sharding), out_shardings=replicated_layout)
