"""Prepared data of the tests: its config, what a directory holds, and a packer that is easy to check."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data import dataset
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.sentence_splitter import split_sentences

PAD, CLS, SEP = 0, 2, 3


def data_config(tokenizer_dir: Path, *sources: Source, **changes) -> Data:
    base = Data(
        sources=sources,
        tokenizer=Tokenizer(path=str(tokenizer_dir)),
        sequence_length=32,
        validation_fraction=0.2,
    )
    return dataclasses.replace(base, **changes)


def file_hashes(directory: Path) -> dict[str, str]:
    """Hashes of all files of a prepared directory."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.md5(path.read_bytes()).hexdigest() for path in paths}


def hash_fraction(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=32).digest()[:8], "big") / 2**64


def encode_sentences(tokenizer_dir: Path, text: str) -> list[list[int]]:
    hf_tokenizer = load_hf_tokenizer(tokenizer_dir)
    return [hf_tokenizer.encode(sentence, add_special_tokens=False).ids for sentence in split_sentences(text)]


def pack_naively(
    documents: list[list[list[int]]], length: int, end_token: str = "segments"
) -> list[tuple[list[int], list[int], int]]:
    """(tokens, segments, first document) of each row."""
    rows, row, segments, first, current_document = [], [], [], None, None
    number = -1

    def close():
        nonlocal row, segments, first, current_document
        if row:
            padding = [PAD] * (length - len(row))
            rows.append((row + padding, segments + [0] * len(padding), first))
        row, segments, first, current_document = [], [], None, None

    for document in documents:
        if not any(document):
            continue
        number += 1
        pieces = [
            sentence[start : start + length - 2]
            for sentence in document
            for start in range(0, len(sentence), length - 2)
        ]
        for i, piece in enumerate(pieces):
            end = [SEP] if end_token == "segments" or i == len(pieces) - 1 else []
            kept = row
            if current_document == number and end_token == "segments":
                kept = row[:-1]  # without the end that the next piece moves
            start = [] if current_document == number else [CLS]
            if len(kept) + len(start) + len(piece) + len(end) > length:
                close()
                kept, start = [], [CLS]
            segment = segments[-1] if not start else segments[-1] + 1 if segments else 1
            first = number if first is None else first
            segments = segments[: len(kept)] + [segment] * (len(start) + len(piece) + len(end))
            row = [*kept, *start, *piece, *end]
            current_document = number
    close()
    return rows


def wrap_cuts(document: list[list[int]], continuations: set[int]) -> list[int]:
    """After how many of a document's tokens a wrapped row may end: between words, and inside long ones.

    Not after fewer than 4 tokens, nor with fewer than 4 left.
    """
    cuts, size = [], sum(map(len, document))
    words: list[list[int]] = []
    for sentence in document:
        for i, token in enumerate(sentence):
            if i and token in continuations:
                words[-1].append(token)
            else:
                words.append([token])
    end = 0
    for word in words:
        inside = range(end + 1, end + len(word)) if len(word) > 8 else ()
        end += len(word)
        cuts += [cut for cut in (*inside, end) if 4 <= cut <= size - 4 or cut == size]
    return cuts


def wrap_naively(
    documents: list[list[list[int]]], length: int, continuations: set[int]
) -> list[tuple[list[int], list[int], int]]:
    """As `pack_naively`, but each row takes as much of a document as fits into it."""
    rows, row, segments, first = [], [], [], 0
    number = -1

    def close():
        nonlocal row, segments
        padding = [PAD] * (length - len(row))
        rows.append((row + padding, segments + [0] * len(padding), first))
        row, segments = [], []

    for document in documents:
        rest = [token for sentence in document for token in sentence]
        cuts = wrap_cuts(document, continuations)
        number += bool(rest)
        while rest:
            fitting = [cut for cut in cuts if 0 < cut <= length - 2 - len(row)]
            if not fitting and row:
                close()
                continue
            size = fitting[-1] if fitting else length - 2
            first = first if row else number
            segments += [segments[-1] + 1 if segments else 1] * (size + 2)
            row += [CLS, *rest[:size], SEP]
            rest, cuts = rest[size:], [cut - size for cut in cuts]
            if rest:
                close()
    if row:
        close()
    return rows


def read_split(directory: Path, split: str) -> list[tuple[list[int], list[int], int]]:
    split_data = dataset.open_dataset(directory, split)
    rows = dataset.read_rows(split_data, np.arange(dataset.num_rows(split_data)))
    first_documents = dataset.first_document_ids(split_data)
    return [*zip(rows.tokens.tolist(), rows.segment_ids.tolist(), first_documents.tolist(), strict=True)]
