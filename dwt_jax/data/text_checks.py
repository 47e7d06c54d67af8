"""Measure and print how `dwt prepare` encodes a corpus, and reject implausible results."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dwt_jax.config import Data
from dwt_jax.config import Tokenizer as TokenizerConfig
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.sentence_splitter import split_sentences
from dwt_jax.data.shards import SPLITS
from dwt_jax.data.sources import iter_documents
from dwt_jax.data.tokenizer import MAX_UNKNOWN_SHARE, load_vocabulary
from dwt_jax.data.tokenizer_checks import wrap_tokenizer_errors
from dwt_jax.data.tokenizer_training import take_megabytes
from dwt_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE_MEGABYTES = 0.2  # of each source, of which every character is looked at
WARN_UNKNOWN_SHARE = 0.02
MAX_UNKNOWN_CHARACTERS = 0.8  # of a word with one unknown character all are unknown
ROW_CHARS = 160  # of a row that is printed


class TextCounts(NamedTuple):
    """Counts over documents, in characters of sentences if no unit is given."""

    characters: int = 0
    skipped: int = 0  # by sentence_stride
    without_tokens: int = 0  # visible ones of sentences of which the tokenizer makes nothing
    num_long: int = 0  # documents with a sentence that is too long for the tokenizer, and cut
    cut_tokens: int = 0  # tokens of sentences that are longer than a row
    longest: int = 0  # the longest document

    def plus(self, other: "TextCounts") -> "TextCounts":
        """Return the counts over the documents of both."""
        sums = TextCounts(*(a + b for a, b in zip(self, other, strict=True)))
        return sums._replace(longest=max(self.longest, other.longest))


def count_visible(text: str) -> int:
    """Return the number of characters of a text that are neither white space nor control characters."""
    return sum(char.isprintable() and not char.isspace() for char in text)


_WIDE_SPACES = tuple(char for char in map(chr, range(0x80, 0x3001)) if char.isspace())  # not of ASCII


def count_text_bytes(texts: Sequence[str]) -> int:
    """Return the UTF-8 bytes of texts. A run of white space counts as one byte, and none at their ends.

    That is `sum(len(" ".join(text.split()).encode()) for text in texts)`, but many times faster. Rows have
    line breaks as a space or nothing, as the tokenizer wants it; this count is the same for all tokenizers.

    Args:
        texts: none of them empty or of white space only.
    """
    if not texts:
        return 0
    data = np.frombuffer("\n".join(map(_narrow_spaces, texts)).encode(), np.uint8)
    # \t to \r, and \x1c to the space: a smaller byte wraps around.
    is_space = (data - np.uint8(0x09) < 5) | (data - np.uint8(0x1C) < 5)
    num_repeated = np.count_nonzero(is_space[1:] & is_space[:-1])
    return len(data) - int(num_repeated) - int(is_space[0]) - int(is_space[-1]) - (len(texts) - 1)


def _narrow_spaces(text: str) -> str:
    if not text.isascii():
        for char in _WIDE_SPACES:
            text = text.replace(char, " ")
    return text


# Before the rows: the tokenizer, and a sample


def describe_missing_frame(tokenizer_dir: Path) -> Iterator[str]:
    """Yield a warning if a masked model's tokenizer frames texts with other special tokens than the rows.

    Fine-tuning, `dwt fill-mask` and transformers would then give the model other inputs than training.

    Args:
        tokenizer_dir: directory of the tokenizer.
    """
    vocab = load_vocabulary(tokenizer_dir)
    if vocab.mask_id < 0:  # tokenizers of decoders often add nothing, or no end
        return
    encoding = load_hf_tokenizer(tokenizer_dir).encode("a")
    if (encoding.ids[:1], encoding.ids[-1:]) != ([vocab.cls_id], [vocab.sep_id]):
        special = [
            token
            for token, is_added in zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
            if is_added
        ]
        cls, sep = vocab.tokens[vocab.cls_id], vocab.tokens[vocab.sep_id]
        yield (
            f"prepare: warning: data.tokenizer adds {' and '.join(special) or 'no special token'} to a text, "
            f"expected {cls} before it and {sep} after it as in the rows: fine-tuning, fill-mask and "
            "transformers use the tokenizer's (the post_processor of its tokenizer.json)"
        )


def check_sample(number: int, data: Data, tokenizer_dir: Path) -> dict[str, float]:
    """Encode the first text of a source, and measure how its characters are encoded.

    Args:
        number: of the source.
        data: the config section.
        tokenizer_dir: directory of the tokenizer.

    Returns:
        Shares of the visible characters: `unknown` (in unknown tokens), `unknown_long` (of these, in words
        that are too long for the tokenizer), `lost` (in no token), `lost_marks` (vowel signs and the like
        that the tokenizer's normalizer drops).

    Raises:
        UserError: most tokens or characters are unknown, or more than `data.max_lost_share` is lost.
    """
    tokenizer = load_hf_tokenizer(tokenizer_dir)
    tokenizer.encode_special_tokens = True
    vocab = load_vocabulary(tokenizer_dir)
    max_word = _max_word_chars(tokenizer)
    characters: Counter[str] = Counter()
    tokens = unknown_tokens = unknown = unknown_long = lost_marks = 0
    for text in take_megabytes(iter_documents(data.sources[number]), SAMPLE_MEGABYTES):
        for sentence in split_sentences(text):
            with wrap_tokenizer_errors("data.tokenizer.path", "a tokenizer that encodes any text"):
                encoding = tokenizer.encode(sentence, add_special_tokens=False)
            characters.update(sentence)
            tokens += len(encoding.ids)
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token_id == vocab.unk_id:
                    unknown_tokens += 1
                    visible = count_visible(sentence[start:end])
                    unknown += visible
                    unknown_long += visible if end - start > max_word else 0
            lost_marks += _count_lost_marks(sentence, tokenizer)
    lost_characters = [char for char in characters if _is_lost(char, tokenizer, vocab.word_prefix)]
    total = max(1, sum(count for char, count in characters.items() if count_visible(char)))
    counts = {
        "unknown": unknown,
        "unknown_long": unknown_long,
        "lost": sum(characters[char] for char in lost_characters),
        "lost_marks": lost_marks,
    }
    shares = {name: count / total for name, count in counts.items()}
    remedy = unknown_remedy(data.tokenizer, shares)
    check_unknown(unknown_tokens / max(1, tokens), "tokens", remedy)
    check_unknown(shares["unknown"], "characters", remedy, MAX_UNKNOWN_CHARACTERS)
    location, max_lost = f"data.sources.{number}", data.max_lost_share
    if shares["lost_marks"] > max_lost:
        raise UserError(
            f"{location}: {shares['lost_marks']:.1%} of the text are vowel signs and other marks, which "
            f"data.tokenizer drops like accents, expected at most {max_lost:.1%} "
            "(data.tokenizer.lowercase=False keeps them; a larger data.max_lost_share drops them)"
        )
    check_lost(location, shares["lost"], max_lost, "".join(lost_characters[:10]))
    return shares


def _max_word_chars(tokenizer: "Tokenizer") -> float:
    """The length of a word beyond which a tokenizer takes it for unknown as a whole; WordPiece has one."""
    return json.loads(tokenizer.to_str())["model"].get("max_input_chars_per_word", float("inf"))


def unknown_remedy(config: TokenizerConfig, shares: Mapping[str, float]) -> str:
    """Return a remedy for unknown text.

    Args:
        config: `data.tokenizer`.
        shares: `unknown`, and how much of it is `unknown_long`.
    """
    if 2 * shares.get("unknown_long", 0) > shares.get("unknown", 0):
        return (
            "its words are too long for the tokenizer, as in scripts without spaces: divide them by spaces, "
            "or set data.tokenizer.path to one of byte-level BPE or SentencePiece"
        )
    if config.path:
        return "another data.tokenizer.path; does it lower-case text while its vocabulary has capitals?"
    return "a larger " + (
        "data.tokenizer.alphabet_size" if config.alphabet_size else "data.tokenizer.vocab_size"
    )


def _is_lost(char: str, tokenizer: "Tokenizer", word_prefix: str) -> bool:
    """Whether a visible character, marks aside, has no token of its own."""
    if not count_visible(char) or unicodedata.category(char)[0] == "M":
        return False
    return set(tokenizer.encode(char, add_special_tokens=False).tokens) <= {word_prefix} - {char}


def _count_lost_marks(sentence: str, tokenizer: "Tokenizer") -> int:
    if sentence.isascii() or tokenizer.normalizer is None:
        return 0
    return max(0, _count_marks(sentence) - _count_marks(tokenizer.normalizer.normalize_str(sentence)))


def _count_marks(text: str) -> int:
    """Count marks on letters of scripts without case, where they are no mere accents: कु, が, กุ."""
    count = 0
    after_letter = False
    for category in map(unicodedata.category, unicodedata.normalize("NFKD", text)):
        after_letter = category == "Lo" or (after_letter and category[0] == "M")
        count += after_letter and category[0] == "M"
    return count


def check_unknown(share: float, unit: str, remedy: str, maximum: float = MAX_UNKNOWN_SHARE) -> None:
    """Raise UserError if most of the tokens or characters of a text are unknown."""
    if share > maximum:
        raise UserError(
            f"data.tokenizer: {share:.1%} of the text's {unit} are unknown, expected at most "
            f"{maximum:.0%} ({remedy})"
        )


def check_lost(location: str, share: float, max_lost: float, examples: str = "") -> None:
    """Raise UserError if more than `max_lost` of a text is in no token."""
    if share > max_lost:
        named = f" (such as {examples!r})" if examples else ""
        raise UserError(
            f"{location}: {share:.1%} of the text{named} is in no token of data.tokenizer, expected at most "
            f"{max_lost:.1%} (another tokenizer, or a larger data.max_lost_share if this is wanted)"
        )


# After the rows: totals


def text_shares(
    number: int, entry: dict[str, Any], sample: dict[str, float], max_lost: float
) -> dict[str, float]:
    """Return what index.json says about the text of a source.

    Args:
        number: of the source, for messages.
        entry: the source's `counts`, and its entries of the splits.
        sample: the result of `check_sample`.
        max_lost: `data.max_lost_share`.

    Raises:
        UserError: more than `max_lost` of the text is in sentences without a token.
    """
    counts: TextCounts = entry["counts"]
    retained = max(1, counts.characters - counts.skipped)
    tokens, unknown = (sum(entry[split][key] for split in SPLITS) for key in ("text_tokens", "unknown"))
    check_lost(f"data.sources.{number}", counts.without_tokens / retained, max_lost)
    return {
        "characters": counts.characters,
        "longest_document": counts.longest,
        "characters_per_token": retained / max(1, tokens),
        "unknown_tokens": unknown / max(1, tokens),
        "unknown_characters": sample["unknown"],
        "unknown_in_long_words": sample["unknown_long"],
        "lost": max(sample["lost"] + sample["lost_marks"], counts.without_tokens / retained),
        "skipped": counts.skipped / max(1, counts.characters),
        "cut": counts.cut_tokens / max(1, tokens),
    }


def describe_text(
    name: str, entry: dict[str, Any], config: TokenizerConfig, tokenizer_dir: Path, train_dir: Path
) -> Iterator[str]:
    """Yield lines of statistics about a source, and three of its training rows as text.

    Args:
        name: how each line begins.
        entry: the source's `documents` and `text`, and its entries of the splits.
        config: `data.tokenizer`.
        tokenizer_dir: directory of the tokenizer.
        train_dir: directory of the training rows.
    """
    text = entry["text"]
    yield (
        f"{name}: {entry['documents']:,} documents, the longest of {text['longest_document']:,} characters; "
        f"{text['characters_per_token']:.2f} characters a token; {text['unknown_tokens']:.2%} of the tokens "
        f"and {text['unknown_characters']:.2%} of the characters unknown; "
        f"of the text {text['lost']:.2%} lost, {text['skipped']:.2%} skipped by sentence_stride, "
        f"{text['cut']:.2%} in sentences longer than a row"
    )
    if (unknown := max(text["unknown_tokens"], text["unknown_characters"])) > WARN_UNKNOWN_SHARE:
        shares = {"unknown": text["unknown_characters"], "unknown_long": text["unknown_in_long_words"]}
        yield (
            f"{name}: warning: {unknown:.1%} of the text is unknown to the tokenizer, expected at most "
            f"{WARN_UNKNOWN_SHARE:.0%} ({unknown_remedy(config, shares)})"
        )
    tokenizer = load_hf_tokenizer(tokenizer_dir)
    for row, tokens in _example_rows(train_dir, entry["train"]["shards"]):
        row_text = " ".join(tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split())
        ellipsis = " …" if len(row_text) > ROW_CHARS else ""
        yield f"{name}, row {row:,}: {row_text[:ROW_CHARS]}{ellipsis}"


def _example_rows(train_dir: Path, shards: list[dict[str, Any]]) -> Iterator[tuple[int, np.ndarray]]:
    """(number of a row, its tokens) of the first row, the middle one and the last one"""
    starts = np.cumsum([0, *(shard["rows"] for shard in shards)])
    total = int(starts[-1])
    for row in sorted({0, total // 2, total - 1}) if total else []:
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        tokens, segments = (
            np.load(train_dir / f"{shards[shard]['name']}.{name}.npy", mmap_mode="r")[row - starts[shard]]
            for name in ("tokens", "segments")
        )
        yield row, tokens[segments > 0]
