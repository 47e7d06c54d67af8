"""Evaluate a model on minimal pairs, zero-shot (`dwt evaluate --pairs`)."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dwt_jax.data.tokenizer import MAX_UNKNOWN_SHARE, Vocabulary, load_vocabulary, tokenizer_digest
from dwt_jax.errors import UserError
from dwt_jax.eval.evaluate_model import fit_to_vocabulary, put_on_mesh
from dwt_jax.eval.grammar_pairs import grammar_paradigms
from dwt_jax.eval.minimal_pairs import (
    Paradigm,
    first_pairs,
    pair_locations,
    pairs_digest,
    read_minimal_pairs,
)
from dwt_jax.eval.pair_results import PairScores, ScoreFile, summarize_pairs
from dwt_jax.eval.sentence_scores import (
    SPECIAL_TOKENS,
    EncodedSentences,
    Scoring,
    encode_sentences,
    score_sentences,
)
from dwt_jax.files import user_path
from dwt_jax.progress import Progress
from dwt_jax.runs.load import LoadedModel, load_model
from dwt_jax.runs.pretrained import params_digest

GRAMMAR = "grammar"
"""The pairs of `grammar_pairs`. A folder of that name is reached as ./grammar."""


def read_paradigms(source: str, max_pairs: int = 0) -> list[Paradigm]:
    """Read pairs.

    Args:
        source: a folder or zip archive (see `read_minimal_pairs`), or GRAMMAR.
        max_pairs: maximum pairs of each paradigm, the first ones. 0: all.

    Raises:
        UserError: as `read_minimal_pairs` does.
    """
    paradigms = grammar_paradigms() if source == GRAMMAR else read_minimal_pairs(Path(source))
    return [first_pairs(paradigm, max_pairs) for paradigm in paradigms]


def evaluate_pairs(
    path: str,
    pairs: str,
    scoring: Scoring = Scoring(),
    batch_size: int = 64,
    out: Path | None = None,
    max_pairs: int = 0,
    step: int | None = None,
) -> dict[str, Any]:
    """Compute the accuracy on minimal pairs.

    Args:
        path: a run's directory or a model in Hugging Face's layout.
        pairs: a folder, a zip archive or GRAMMAR, see `read_paradigms`.
        scoring: how sentences are scored.
        batch_size: rows per batch; does not change the result.
        out: file for the scores, from which an interrupted evaluation resumes.
        max_pairs: see `read_paradigms`.
        step: checkpoint of a run. None: the latest.

    Returns:
        As `summarize_pairs`, with `scoring`, and `unknown_share` of the tokens.

    Raises:
        UserError: pairs, model, checkpoint or `out` cannot be used, most tokens are unknown, or a score is
            not finite.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}, expected at least 1")
    paradigms = read_paradigms(pairs, max_pairs)
    locations = pair_locations(paradigms)
    loaded_model = load_model(path, step=step)
    vocabulary = load_vocabulary(loaded_model.tokenizer)
    loaded_model = fit_to_vocabulary(loaded_model, path, len(vocabulary))
    sentences = encode_sentences([*locations], loaded_model.tokenizer)
    _check_lengths(sentences, [*locations.values()], loaded_model.model.max_length)
    unknown_share = _unknown_share(sentences, vocabulary, loaded_model.tokenizer)
    score_file = ScoreFile(
        user_path(out) if out else None, _identity(loaded_model, paradigms, scoring), paradigms
    )
    params, mesh = put_on_mesh(loaded_model)

    def score(selected: EncodedSentences, on_tokens: Callable[[int], None]) -> np.ndarray:
        return score_sentences(
            params,
            loaded_model.model,
            selected,
            vocabulary,
            scoring,
            mesh=mesh,
            batch_size=batch_size,
            on_tokens=on_tokens,
        )

    _score_paradigms(paradigms, {text: i for i, text in enumerate(locations)}, sentences, score, score_file)
    results = {
        **summarize_pairs(paradigms, score_file.scores),
        "scoring": dataclasses.asdict(scoring),
        "unknown_share": unknown_share,
    }
    score_file.finish(results)
    return results


def _score_paradigms(
    paradigms: Sequence[Paradigm],
    index_of_text: Mapping[str, int],
    sentences: EncodedSentences,
    score: Callable[[EncodedSentences, Callable[[int], None]], np.ndarray],
    score_file: ScoreFile,
) -> None:
    """Score the paradigms that are missing in the file, each distinct sentence once."""
    scores = np.full(len(sentences), np.nan)
    indices = {
        x.name: [np.array([index_of_text[getattr(p, key)] for p in x.pairs]) for key in PairScores._fields]
        for x in paradigms
    }
    for name, stored in score_file.scores.items():
        for index, values in zip(indices[name], stored, strict=True):
            scores[index] = values
    remaining = [x for x in paradigms if x.name not in score_file.scores]
    tokens = int(sentences.lengths[np.isnan(scores)].sum())
    texts = [*index_of_text]
    with Progress("evaluate", tokens, "tokens") as progress:
        for paradigm in remaining:
            good, bad = indices[paradigm.name]
            new = np.unique(np.concatenate([good, bad]))
            new = new[np.isnan(scores[new])]
            scores[new] = score(sentences.select(new), progress.advance)
            if not np.isfinite(scores[new]).all():
                text = texts[int(new[~np.isfinite(scores[new])][0])]
                value = scores[index_of_text[text]]
                raise UserError(
                    f"--model: the score of {text!r} ({paradigm.name}) is {value}, expected a finite number"
                )
            score_file.add(paradigm.name, PairScores(scores[good], scores[bad]))


def _check_lengths(sentences: EncodedSentences, locations: Sequence[str], max_length: int) -> None:
    """Raise UserError for a sentence without a token, and for one that does not fit into the model."""
    lengths, longest = sentences.lengths, max_length - SPECIAL_TOKENS
    for i in np.flatnonzero((lengths == 0) | (lengths > longest))[:1]:
        raise UserError(
            f"{locations[i]}: a sentence of {lengths[i]} tokens, expected 1 to {longest} (the model's "
            f"{max_length} positions less {SPECIAL_TOKENS} special tokens)"
        )


def _unknown_share(sentences: EncodedSentences, vocabulary: Vocabulary, tokenizer: Path) -> float:
    """Return the share of unknown tokens. Raises UserError if it is above MAX_UNKNOWN_SHARE."""
    share = float(np.mean(sentences.tokens == vocabulary.unk_id))
    if share > MAX_UNKNOWN_SHARE:
        raise UserError(
            f"--pairs: {share:.1%} of the tokens are unknown to the tokenizer {tokenizer}, expected at most "
            f"{MAX_UNKNOWN_SHARE:.0%}"
        )
    return share


def _identity(
    loaded_model: LoadedModel, paradigms: Sequence[Paradigm], scoring: Scoring
) -> dict[str, str | bool]:
    """Return what scores depend on: digests of model, tokenizer and pairs, and the scoring."""
    config = json.dumps(dataclasses.asdict(loaded_model.model), sort_keys=True)
    model = params_digest(loaded_model.params) + config
    return {
        "model": hashlib.sha256(model.encode()).hexdigest()[:16],
        "tokenizer": tokenizer_digest(loaded_model.tokenizer)[:16],
        "pairs": pairs_digest(paradigms),
        **dataclasses.asdict(scoring),
    }
