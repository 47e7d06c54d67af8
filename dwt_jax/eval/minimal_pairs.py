"""Read minimal pairs: two similar sentences, of which only one is acceptable.

Two formats are read, from a folder or a zip archive. BLiMP (Warstadt et al. 2020, arXiv 1912.00582) has JSON
lines. Zorro (Huebner et al. 2021) has text files with one sentence per line, alternating between the
unacceptable and the acceptable one. This module does not import jax.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dwt_jax.data.text_format import check_line_ends
from dwt_jax.errors import UserError
from dwt_jax.files import is_file_or_raise, reject_lfs_pointer, user_path

JSON_KEYS = ("sentence_good", "sentence_bad", "UID", "linguistics_term", "field")
_SUFFIXES = (".jsonl", ".txt")
_EXPECTED = "*.jsonl as of BLiMP or *.txt as of Zorro"


class MinimalPair(NamedTuple):
    """An acceptable and an unacceptable sentence, and where they come from, for messages."""

    good: str
    bad: str
    good_location: str
    bad_location: str


class Paradigm(NamedTuple):
    """The pairs of one contrast."""

    name: str
    term: str  # the phenomenon that the contrast belongs to
    field: str  # of linguistics: syntax, morphology, …; '' if the files do not say
    pairs: tuple[MinimalPair, ...]


def pair_locations(paradigms: Sequence[Paradigm]) -> dict[str, str]:
    """Return the distinct sentences in their order, each with its first location."""
    locations: dict[str, str] = {}
    for paradigm in paradigms:
        for pair in paradigm.pairs:
            locations.setdefault(pair.good, pair.good_location)
            locations.setdefault(pair.bad, pair.bad_location)
    return locations


def first_pairs(paradigm: Paradigm, max_pairs: int) -> Paradigm:
    """Return the first `max_pairs` pairs of a paradigm; 0: all of them."""
    return paradigm._replace(pairs=paradigm.pairs[:max_pairs]) if max_pairs else paradigm


def pairs_digest(paradigms: Sequence[Paradigm]) -> str:
    """Return a digest of names and sentences, 16 hexadecimal digits; it does not depend on file names."""
    content = [[x.name, x.term, [[pair.good, pair.bad] for pair in x.pairs]] for x in paradigms]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_minimal_pairs(path: Path) -> list[Paradigm]:
    """Read all paradigms of a folder or a zip archive, subfolders included, sorted by name.

    In JSON lines the paradigm is `UID` and its term `linguistics_term`. A text file is a paradigm of the
    name of the file without its suffix, whose term ends before the first '-'. Hidden files and what macOS
    adds to archives are skipped.

    Args:
        path: holds files of one of the two formats; others are ignored.

    Raises:
        UserError: there are no pairs, or a file holds something else; the message has file and line.
    """
    path = user_path(path)
    paradigms: dict[str, Paradigm] = {}
    suffix = ""
    for file, name, data in _read_files(path):
        if suffix and name.suffix.lower() != suffix:
            raise UserError(f"{path}: has both *.jsonl and *.txt, expected files of one format")
        suffix = name.suffix.lower()
        lines = _split_lines(data, file)
        if suffix == ".jsonl":
            _add_json_pairs(lines, file, paradigms)
        elif name.stem in paradigms:
            raise UserError(f"{file}: a second file {name.name}, expected one for each paradigm")
        else:
            pairs = tuple(_alternating_pairs(lines, file))
            paradigms[name.stem] = Paradigm(name.stem, name.stem.partition("-")[0], "", pairs)
    if not paradigms:
        files = "no pair in its files" if suffix else "no such file"
        raise UserError(f"{path}: {files}, expected {_EXPECTED}")
    return [paradigms[name] for name in sorted(paradigms)]


def _read_files(path: Path) -> Iterator[tuple[str, PurePosixPath, bytes]]:
    """Yield (location, path within `path`, content) of each file of pairs, sorted."""
    if path.is_dir():
        paths = {PurePosixPath(x.relative_to(path).as_posix()): x for x in path.rglob("*")}
        for name in sorted(filter(_is_pair_file, paths)):
            if is_file_or_raise(paths[name]):
                data = paths[name].read_bytes()
                reject_lfs_pointer(paths[name], data)
                yield str(paths[name]), name, data
        return
    if not is_file_or_raise(path):
        raise UserError(f"--pairs: no {path}, expected a folder or a zip archive with {_EXPECTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            # By path: an archive may have './a.txt', and a file twice, of which the last one counts.
            members = {PurePosixPath(x.filename): x for x in archive.infolist() if not x.is_dir()}
            for name in sorted(filter(_is_pair_file, members)):
                yield f"{path}/{name}", name, archive.read(members[name])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{path}: {error}, expected a folder or a complete zip archive with {_EXPECTED}"
        ) from None


def _is_pair_file(name: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
    return name.suffix.lower() in _SUFFIXES and not hidden


def _split_lines(data: bytes, file: str) -> list[str]:
    """Decode UTF-8 and split at line ends, without byte-order mark and empty lines at the end."""
    check_line_ends(data.partition(b"\n")[0] + b"\n" * (b"\n" in data), file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad_byte, before = error.object[error.start], error.object[: error.start]
        line = before.count(b"\n") + 1
        raise UserError(
            f"{file}, line {line}: byte 0x{bad_byte:02x} is not UTF-8, expected UTF-8 text"
        ) from None
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]


def _add_json_pairs(lines: Sequence[str], file: str, paradigms: dict[str, Paradigm]) -> None:
    pairs: dict[str, list[MinimalPair]] = {}
    labels: dict[str, tuple[str, str]] = {name: (x.term, x.field) for name, x in paradigms.items()}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        location = f"{file}, line {number}"
        good, bad, name, *label = _parse_json_pair(line, location)
        if labels.setdefault(name, (label[0], label[1])) != (label[0], label[1]):
            raise UserError(
                f"{location}: linguistics_term and field of {name} are {', '.join(label)}, expected "
                f"{', '.join(labels[name])} as in the lines before"
            )
        pairs.setdefault(name, []).append(MinimalPair(good, bad, location, location))
    for name, new_pairs in pairs.items():
        previous = paradigms[name].pairs if name in paradigms else ()
        paradigms[name] = Paradigm(name, *labels[name], (*previous, *new_pairs))


def _parse_json_pair(line: str, location: str) -> list[str]:
    """Return the values of JSON_KEYS."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: {error}, expected a JSON object") from None
    if not isinstance(record, dict):
        raise UserError(f"{location}: a JSON {type(record).__name__}, expected an object")
    for key in JSON_KEYS:
        value = record.get(key)
        if not isinstance(value, str) or not value.strip():
            shown = f"{key} is {value!r}" if key in record else f"no {key}"
            raise UserError(f"{location}: {shown}, expected text (keys: {', '.join(JSON_KEYS)})")
    return [record[key] for key in JSON_KEYS]


def _alternating_pairs(lines: Sequence[str], file: str) -> Iterator[MinimalPair]:
    """Yield the pairs of lines that are in turn the unacceptable and the acceptable sentence."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{file}, line {number}: empty, expected a sentence")
    if len(lines) % 2:
        raise UserError(
            f"{file}, line {len(lines)}: the last of an odd number of lines, expected pairs of lines, "
            "unacceptable and acceptable"
        )
    for i in range(0, len(lines), 2):
        yield MinimalPair(lines[i + 1], lines[i], f"{file}, line {i + 2}", f"{file}, line {i + 1}")
