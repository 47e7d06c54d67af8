"""Select the held-out text: documents by a hash of their text; of a few documents one, or parts of each."""

import math

from dwt_jax.config import Data
from dwt_jax.data.sentence_splitter import last_cut
from dwt_jax.data.sources import document_fingerprint, iter_documents
from dwt_jax.errors import UserError
from dwt_jax.logs import logger

MAX_EXCESS = 10
"""A split may be so many times as large as asked for, if a corpus has too few documents for less."""


def is_held_out(text_fingerprint: bytes, fraction: float) -> bool:
    """Return whether a document belongs to the held-out split.

    This depends on the document's text alone, not on the order or on other documents. Exact duplicates are
    in the same split.

    Args:
        text_fingerprint: `document_fingerprint` of the text.
        fraction: expected fraction of held-out documents.
    """
    return _hash_value(text_fingerprint) < fraction


def _hash_value(text_fingerprint: bytes) -> float:
    return int.from_bytes(text_fingerprint[:8], "big") / 2**64


def split_document(text: str, fingerprint: bytes, fraction: float, by_parts: bool) -> tuple[str, str]:
    """Return the parts of a document that are training text and held out; one of them may be empty.

    Args:
        text: the document.
        fingerprint: `document_fingerprint` of the text.
        fraction: expected fraction of held-out text.
        by_parts: whether to hold out the last part of every document instead of whole documents.
    """
    if not by_parts:
        return ("", text) if is_held_out(fingerprint, fraction) else (text, "")
    cut = last_cut(text, int((1 - fraction) * len(text)))
    return text[:cut], text[cut:]


def choose_split(data: Data) -> tuple[float, bool]:
    """Return the arguments `fraction` and `by_parts` of `split_document` that give text to both splits.

    They are `data.validation_fraction` and False, unless that would leave all documents in one split. Then
    either one document moves to the empty split (the lowest hash into held-out text, the highest out of it),
    or the last part of each document is held out (`by_parts`), whichever is closer to the requested fraction
    of the text. Reads documents until both splits have one.

    Raises:
        UserError: there is no document, or one split would be empty or MAX_EXCESS times too large.
    """
    fraction = data.validation_fraction
    sizes: dict[float, int] = {}  # of the documents with the lowest and the highest hash
    num_documents, total, in_parts = 0, 0, 0
    for source in data.sources:
        for text in iter_documents(source):
            fingerprint = document_fingerprint(text)
            sizes[_hash_value(fingerprint)] = len(text)
            if min(sizes) < fraction <= max(sizes):
                return fraction, False
            sizes = {value: sizes[value] for value in (min(sizes), max(sizes))}
            num_documents += 1
            total += len(text)
            in_parts += len(split_document(text, fingerprint, fraction, by_parts=True)[1])
    if not num_documents:
        raise UserError("data.sources: no document in any of the files read, expected text")
    is_train_empty = max(sizes) < fraction
    threshold = max(sizes) if is_train_empty else math.nextafter(min(sizes), 1)
    in_one = total - sizes[max(sizes)] if is_train_empty else sizes[min(sizes)]
    candidates = [
        (abs(held_out / total - fraction), held_out / total, by_parts)
        for held_out, by_parts in ((in_one, False), (in_parts, True))
        if 0 < held_out < total
    ]
    _, share, by_parts = min(candidates, default=(0.0, 0.0, False))
    if not 0 < share <= MAX_EXCESS * fraction or 1 - share > MAX_EXCESS * (1 - fraction):
        split, bound = ("train", "most") if is_train_empty else ("held_out", "least")
        raise UserError(
            f"data.validation_fraction is {fraction:g}: none of the documents read ({num_documents:,}) is in "
            f"the split '{split}', expected "
            f"a share of at {bound} {share or 0.5:.2g}"
        )
    logger.info(
        f"prepare: none of the documents read ({num_documents:,}) has a hash for the split "
        f"'{'train' if is_train_empty else 'held_out'}': "
        f"{'the last part of each' if by_parts else 'one of them' if not is_train_empty else 'all but one'} "
        f"is held out, {share:.1%} of the text"
    )
    return (fraction if by_parts else threshold), by_parts
