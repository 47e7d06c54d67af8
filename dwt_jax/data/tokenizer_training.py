"""Train a WordPiece tokenizer on the first documents of a corpus."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dwt_jax.config import Source
from dwt_jax.data.sentence_splitter import cut_pieces, last_cut
from dwt_jax.data.sources import iter_documents
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS, build_wordpiece_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_COVERAGE = 0.9995  # share of the text whose characters are tokens if the vocabulary has room for them
MIN_COVERAGE_IN_VOCAB = 0.8  # with less, a vocabulary is too small


def train_tokenizer(
    texts: Callable[[], Iterable[str]],
    vocab_size: int,
    lowercase: bool,
    sample_megabytes: float = 100.0,
    alphabet_size: int = 0,
) -> "Tokenizer":
    """Train a WordPiece tokenizer. The same texts give the same token ids, in any process.

    Args:
        texts: must return the same texts at each call.
        vocab_size: the largest number of tokens.
        lowercase: whether the tokenizer lowercases text.
        sample_megabytes: maximum amount of text to read (10^6 bytes of UTF-8).
        alphabet_size: number of most frequent characters that become tokens. 0: all characters, if they take
            at most half of the vocabulary. Otherwise as many as fit in that half or as cover 99.95 % of the
            text, whichever is more, and as many more as the words leave room for.

    Raises:
        UserError: if `vocab_size` is too small for the characters alone.
    """
    special_tokens = {token: i for i, token in enumerate(WORDPIECE_TOKENS)}
    base = build_wordpiece_tokenizer(special_tokens, lowercase=lowercase)

    def pieces() -> Iterator[str]:  # short, because the library takes 100 bytes and more for each character
        for text in take_megabytes(texts(), sample_megabytes):
            yield from cut_pieces(text, 1 << 16)

    counts = _count_characters(pieces(), base)
    characters = sorted(counts, key=lambda char: (-counts[char], char))
    # The most frequent n characters take costs[n] tokens.
    costs = np.cumsum([len(WORDPIECE_TOKENS), *(1 + _may_continue(char, base) for char in characters)])
    if alphabet_size:
        size = min(alphabet_size, len(characters))
        required = size
    else:
        covered = np.cumsum([0, *(counts[char] for char in characters)]) / max(1, counts.total())
        required = min(int(np.searchsorted(covered, MIN_COVERAGE)), len(characters))
        in_half, in_vocab = (
            int(np.searchsorted(costs, n, "right")) - 1 for n in (vocab_size / 2, vocab_size)
        )
        size = max(in_half, min(required, in_vocab))
        required = required if covered[size] < MIN_COVERAGE_IN_VOCAB else size
    if costs[required] > vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size is {vocab_size}, expected at least {costs[required]} for the text's "
            "characters"
        )

    def train(size: int) -> "Tokenizer":
        return _train_wordpiece(pieces(), base, sorted(characters[:size]), vocab_size)

    tokenizer = train(size)
    spare = vocab_size - tokenizer.get_vocab_size()
    if not alphabet_size and spare and size < len(characters):  # the text has no more words
        tokenizer = train(int(np.searchsorted(costs, costs[size] + spare, "right")) - 1)
    return build_wordpiece_tokenizer(tokenizer.get_vocab(), lowercase=lowercase)


def _train_wordpiece(
    texts: Iterable[str], base: "Tokenizer", alphabet: list[str], vocab_size: int
) -> "Tokenizer":
    """Train with the pipeline of `base` and the characters of `alphabet`."""
    from tokenizers import Tokenizer, trainers

    continuations = [f"##{char}" for char in alphabet if _may_continue(char, base)]
    # By default the trainer numbers the continuation characters in the order of a hash table, which differs
    # from process to process, and breaks ties between merges by those numbers. Passing them as special
    # tokens fixes their numbers; `train_tokenizer` marks only the real special tokens as special.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*WORDPIECE_TOKENS, *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer = Tokenizer.from_str(base.to_str())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _may_continue(char: str, tokenizer: "Tokenizer") -> bool:
    """Whether a character may be in a word of several: punctuation and Chinese characters may not."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{char}a"))) == 1


def sample_documents(
    sources: Iterable[Source], training_text: Callable[[str], str], megabytes: float
) -> Iterator[str]:
    """Yield documents for `train_tokenizer`: the first ones of each source.

    Args:
        sources: each contributes an equal share of `megabytes`.
        training_text: returns the part of a document that is not held out.
        megabytes: 10^6 bytes of UTF-8, over all sources.
    """
    sources = tuple(sources)
    for source in sources:
        yield from take_megabytes(
            filter(None, map(training_text, iter_documents(source))), megabytes / len(sources)
        )


def take_megabytes(texts: Iterable[str], megabytes: float) -> Iterator[str]:
    """Yield the first texts up to this many megabytes (10^6 bytes of UTF-8); the last text is cut."""
    remaining = int(megabytes * 1e6)
    for text in texts:
        if remaining <= 0:
            return
        size = len(text.encode())
        if size > remaining:
            text = text.encode()[:remaining].decode(errors="ignore")
            text = text[: last_cut(text, len(text))]
        remaining -= size
        yield text


def _count_characters(texts: Iterable[str], tokenizer: "Tokenizer") -> Counter[str]:
    """How often each character occurs after normalization, without white space."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    return Counter({char: count for char, count in counts.items() if not char.isspace()})
