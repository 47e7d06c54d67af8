import bz2
import errno
import glob
import gzip
import hashlib
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from dwt_jax.config import Source
from dwt_jax.data import sources
from dwt_jax.data.file_patterns import matching_files
from dwt_jax.data.sources import iter_documents
from dwt_jax.errors import UserError

TEXT = "First article\nline two — ünï\n\nsecond paragraph\n\n\nSecond article\n\n\n\nThird\n"


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(path: Path | str, kind: str = "text", **options) -> list[str]:
    return list(iter_documents(Source(kind=kind, path=str(path), **options)))


def test_builtin_has_every_address():
    texts = list(iter_documents(Source()))
    assert len(texts) == 233
    assert sum(len(text.split()) for text in texts) == 1_794_884  # what the package's description says
    with lzma.open(sources.BUILTIN_CORPUS) as lines:
        records = [json.loads(line) for line in lines]
    assert [record["text"] for record in records] == texts
    assert [record["year"] for record in records] == sorted(record["year"] for record in records)


@pytest.mark.parametrize("ending", PACK)
def test_text_in_every_compression(tmp_path, ending):
    path = write(tmp_path / f"a.txt{ending}", PACK[ending](TEXT.encode()))
    assert read(path, blank_lines=2) == [
        "First article\nline two — ünï\n\nsecond paragraph\n\n",
        "Second article\n\n\n",
        "Third",
    ]
    assert [text.strip() for text in read(path)] == [
        "First article\nline two — ünï",
        "second paragraph",
        "Second article",
        "Third",
    ]
    assert read(path, documents="lines") == [line for line in TEXT.split("\n") if line]
    assert read(path, documents="file") == [TEXT.removesuffix("\n")]


def test_several_frames_in_one_zst(tmp_path):
    path = write(tmp_path / "a.zst", zstd(b"one\n") + zstd(b"") + zstd(b"two\n"))
    assert read(path, documents="lines") == ["one", "two"]


def test_carriage_returns_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\n\r\ntwo\r\n")
    assert [text.strip("\n") for text in read(path)] == ["one", "two"]


def test_glob_is_recursive_and_sorted(tmp_path):
    for name in ("b.txt", "x/a.txt", "x/y/c.txt", "x/y/skipped.md"):
        write(tmp_path / name, name)
    assert read(tmp_path / "**" / "*.txt") == ["b.txt", "x/a.txt", "x/y/c.txt"]


@pytest.mark.parametrize("ending", PACK)
def test_json_lines(tmp_path, ending):
    lines = '{"body": "a\\nb", "n": 1}\n\n{"body": "\\ud83d\\ude00 half \\ud800"}\n{"body": " "}\n'
    path = write(tmp_path / f"a.jsonl{ending}", PACK[ending](lines.encode()))
    assert read(path, "jsonl", field="body") == ["a\nb", "😀 half \ufffd"]


def test_bytes_read_add_up_to_stored_bytes(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.txt.xz", lzma.compress(b"some line of text\n" * 5000))
    source = Source(kind="text", path=str(tmp_path / "*"), documents="lines")
    bytes_read: list[int] = []
    assert len(list(iter_documents(source, bytes_read.append))) == 15000
    assert sum(bytes_read) == sources.stored_bytes(source) > 0


def test_digest_depends_on_the_documents_only(tmp_path):
    one = Source(kind="text", path=str(write(tmp_path / "a.txt", "x\n\ny")))
    other = Source(
        kind="jsonl", path=str(write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"text": "y"}')))
    )
    swapped = Source(kind="text", path=str(write(tmp_path / "c.txt", "y\nx")), documents="lines")
    texts = [list(iter_documents(source)) for source in (one, other, swapped)]
    assert [[t.strip() for t in each] for each in texts] == [["x", "y"], ["x", "y"], ["y", "x"]]
    expected = hashlib.sha256(b"".join(hashlib.blake2b(t, digest_size=32).digest() for t in (b"x", b"y")))
    assert sources.source_digest(other) == expected.hexdigest()
    assert sources.source_digest(swapped) != sources.source_digest(other)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"fine\nnot \xff fine", {}, "a.txt, line 2: byte 0xff"),
        ("a.txt", b"one\rtwo\rthree\r", {}, "a.txt: its lines end with CR alone, expected LF or CR LF"),
        ("a.GZ", gzip.compress(TEXT.encode() * 99)[:-20], {}, r"a\.GZ: .*expected a complete \.GZ file"),
        ("a.gz", gzip.compress(TEXT.encode() * 99)[:-20], {}, r"a\.gz: .*expected a complete \.gz file"),
        ("a.gz", b"no gzip at all", {}, r"a\.gz: .*expected a complete \.gz file"),
        ("a.xz", lzma.compress(TEXT.encode() * 99)[:-20], {}, r"a\.xz: .*expected a complete \.xz file"),
        ("a.xz", b"no xz at all", {}, r"a\.xz: .*expected a complete \.xz file"),
        ("a.bz2", b"no bz2 at all", {}, r"a\.bz2: "),
        ("a.zst", zstd(TEXT.encode() * 99)[:-20], {}, r"a\.zst: .*expected a complete \.zst file"),
        ("a.zst", b"no zstd at all", {}, r"a\.zst: .*expected a complete \.zst file"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "x"}',
            {},
            "a.jsonl, line 2: no field 'text'; did you mean 'txt'",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', {}, "a.jsonl, line 2: .*expected one JSON object a line"),
        ("a.jsonl", b"[1, 2]", {}, "a.jsonl, line 1: found a JSON list, expected an object"),
        ("a.jsonl", b'{"text": 3}', {}, "a.jsonl, line 1: field 'text' is a int, expected a string"),
    ],
)
def test_user_errors(tmp_path, name, content, options, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        read(path, "jsonl" if name.endswith("jsonl") else "text", **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    path = write(tmp_path / "a[1]" / "b.txt", "text\n")
    assert sources.source_files(Source(kind="text", path=str(path))) == [path]


def test_links_do_not_repeat_a_file(tmp_path):
    files = [write(tmp_path / "c" / name, name) for name in ("a.txt", "b.txt")]
    (tmp_path / "c" / "up").symlink_to("..")
    (tmp_path / "c" / "same.txt").symlink_to("a.txt")
    assert sources.source_files(Source(kind="text", path=f"{tmp_path}/c/**/*.txt")) == files


@pytest.mark.parametrize("suffix", PACK)
def test_archives_are_refused_by_name(tmp_path, suffix):
    """Their headers, with names of files and users, are no text."""
    member = write(tmp_path / "member.txt", TEXT)
    with tarfile.open(tmp_path / "corpus.tar", "w") as archive:
        archive.add(member)
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w") as archive:
        archive.write(member)
    for name in ("tar", "zip"):
        path = write(tmp_path / f"x{suffix}", PACK[suffix]((tmp_path / f"corpus.{name}").read_bytes()))
        with pytest.raises(UserError, match=rf"x{suffix}: is a {name} archive, expected the files in it"):
            list(iter_documents(Source(kind="text", path=str(path))))


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize(
    ("line", "joint"),
    [
        ("Ein Satz. " * 100, " "),  # cut between sentences
        ("wort " * 200, " "),  # between words
        ("日本語。" * 100, ""),
        ("日本語ünï😀" * 100, ""),  # anywhere, but in no character
    ],
)
def test_a_long_line_comes_in_pieces(tmp_path, monkeypatch, line, joint, compression):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    line = line.strip()
    path = write(tmp_path / f"a.txt{compression}", PACK[compression](f"\ufeff{line}\nshort\n".encode()))
    *pieces, last = read(path, documents="lines")
    assert last == "short"
    assert "".join(pieces) == line
    assert 10 < len(pieces) < 60
    assert all(len(piece.encode()) <= 100 for piece in pieces)
    if joint:
        assert all(piece.endswith(joint) for piece in pieces[:-1])
    document = read(path, documents="file")
    assert "".join("".join(document).split()) == f"{line}short".replace(" ", "")
    assert max(map(len, document)) <= 100


def test_a_long_json_document_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    text = "Ein Satz. " * 50
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}))
    pieces = read(path, "jsonl")
    assert "".join(pieces) == text
    assert {len(piece) for piece in pieces} == {90, 50}


def test_invalid_utf8_in_a_long_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    path = write(tmp_path / "a.txt", b"fine\n" + b"x" * 250 + b"\xff" + b"y" * 100)
    with pytest.raises(UserError, match=r"a\.txt, line 2: byte 0xff is not UTF-8"):
        read(path)


def test_glob_without_a_match_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\*\.txt: matches no file"):
        read(tmp_path / "*.txt")
    with pytest.raises(UserError, match="it is a directory: add /"):
        read(tmp_path)


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory) -> Path:
    """A dataset built on the spot, without TensorFlow."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "meta": {"title": tfds.features.Text()}, "n": np.int64}
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(20):
                yield i, {"text": f"Café number {i}.", "meta": {"title": f"title {i}"}, "n": i}

    directory = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return directory


def test_tfds_by_name_and_by_directory(tiny_tfds):
    expected = {f"Café number {i}." for i in range(20)}
    by_name = read("tiny", "tfds", data_dir=str(tiny_tfds))
    by_directory = read(tiny_tfds / "tiny" / "1.0.0", "tfds")
    assert set(by_name) == expected
    assert by_name == by_directory
    assert len(read("tiny:1.0.0", "tfds", data_dir=str(tiny_tfds), split="train[:50%]")) == 10
    assert "title 3" in read("tiny", "tfds", data_dir=str(tiny_tfds), field="meta/title")


def test_tfds_bytes_read_add_up_to_stored_bytes(tiny_tfds):
    source = Source(kind="tfds", path="tiny", data_dir=str(tiny_tfds))
    bytes_read: list[int] = []
    list(iter_documents(source, bytes_read.append))
    assert sum(bytes_read) == sources.stored_bytes(source) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nonesuch"}, "tfds 'nonesuch'.*expected a dataset that was prepared"),
        (
            {"path": "glue/rte"},
            "tfds 'glue/rte', split 'train': nothing in .*, expected a dataset there",
        ),
        ({"path": "tiny", "field": "texts"}, "no field 'texts'; did you mean 'text'"),
        ({"path": "tiny", "field": "n"}, "field 'n' is a .*, expected text"),
        ({"path": "tiny", "split": "test"}, "split 'test': Unknown split"),
    ],
)
def test_tfds_user_errors(tiny_tfds, options, message):
    with pytest.raises(UserError, match=message) as error:
        list(iter_documents(Source(kind="tfds", data_dir=str(tiny_tfds), **options)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("division", ["file", "blank_lines"])
def test_long_document_is_cut_at_lines(tmp_path, monkeypatch, division):
    """So that memory stays flat whatever one document's size."""
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    lines = [f"line {i} of a long book" for i in range(50)]
    documents = read(write(tmp_path / "book.txt", "\n".join(lines)), documents=division)
    assert "\n".join(documents).split("\n") == lines
    assert len(documents) > 5
    assert max(map(len, documents)) <= 100


def test_patterns_match_as_glob_does(tmp_path, monkeypatch):
    """Without links and brackets in names: the same files as glob finds."""
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/d/.hidden.txt", ".f/g.txt", "h/[i].txt", "j.TXT"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    patterns = (
        "*.txt",
        "**/*.txt",
        "*/*.txt",
        "**",
        "b/**",
        "b/**/e.txt",
        "**/d/*",
        "[ab]*",
        ".f/*",
        "**/.h*",
    )
    for pattern in (*patterns, "b/?.txt", "none/*", "a.txt", "a.txt/*", "**/**/*.txt"):
        for prefix in ("", f"{tmp_path}/"):
            found = {str(path) for path in matching_files(prefix + pattern)}
            expected = {name for name in glob.glob(prefix + pattern, recursive=True) if os.path.isfile(name)}
            assert found == expected, prefix + pattern
    assert matching_files("h/[i].txt") == [Path("h/[i].txt")]


def test_folders_are_entered_once_through_links(tmp_path):
    """Two links to folders above: glob would try each of 2^40 paths."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("x")
    (tmp_path / "a" / "b" / "loop").symlink_to("..")
    (tmp_path / "a" / "b" / "again").symlink_to(tmp_path)
    assert matching_files(f"{tmp_path}/**/*.txt") == [tmp_path / "a" / "b" / "x.txt"]


@pytest.mark.parametrize("pattern", ["*.txt", "b.txt", "**/*.txt", "**", "*"])
def test_a_broken_link_is_no_missing_document(tmp_path, pattern):
    """Of a corpus that was moved, or whose disk is not mounted, a part would be missing without a word."""
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("nowhere/b.txt")
    with pytest.raises(UserError, match=r"b\.txt: a broken symbolic link, expected its target to exist"):
        matching_files(f"{tmp_path}/{pattern}")
    assert matching_files(f"{tmp_path}/a*") == [tmp_path / "a.txt"]  # another name is not its concern


def test_a_broken_link_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "part1").mkdir()
    (tmp_path / "part1" / "a.txt").write_text("x")
    (tmp_path / "part2").symlink_to("nowhere")
    with pytest.raises(UserError, match="part2: a broken symbolic link"):
        matching_files(f"{tmp_path}/part*/*.txt")


@pytest.mark.parametrize("pattern", ["*/*.txt", "**/*.txt", "locked/*"])
def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch, pattern):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("x")
    list_names = os.listdir

    def listdir(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return list_names(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(UserError, match="locked: Permission denied, expected a folder that can be read"):
        matching_files(f"{tmp_path}/{pattern}")


def test_a_file_that_cannot_be_looked_up_is_an_error(tmp_path):
    (tmp_path / "a.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match=r"a\.txt: Too many levels of symbolic links, expected a file"):
        matching_files(f"{tmp_path}/a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_git_lfs_pointer_is_no_text(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 466247\n"
    kind = "jsonl" if name.endswith("jsonl") else "text"
    with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer, expected the file itself"):
        read(write(tmp_path / name, pointer), kind)


def test_folder_with_brackets_beside_a_pattern(tmp_path):
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "x.txt").write_text("x")
    assert matching_files(f"{tmp_path}/run[1]/*.txt") == [tmp_path / "run[1]" / "x.txt"]
    assert matching_files(f"{tmp_path}/**/run[1]/x*") == [tmp_path / "run[1]" / "x.txt"]


@pytest.mark.parametrize("documents", ["file", "blank_lines", "lines"])
def test_json_lines_are_no_text(tmp_path, documents):
    """Else braces and names of fields would be trained on."""
    path = tmp_path / "corpus.jsonl"
    source = Source(kind="text", path=str(path), documents=documents)
    path.write_text('\ufeff{"text": "a cat"}\n{"text": "a dog"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl: is JSON lines, expected text \(kind 'jsonl' of the"):
        list(iter_documents(source))
    for text in ("{a} set}", '{"text": "a cat"', "[1]", "{}x"):  # text, and code
        path.write_text(text)
        assert list(iter_documents(source)) == [text]


@pytest.mark.parametrize("pattern", ["*", "**", "*.txt", "*/*", "**/*"])
@pytest.mark.parametrize(
    "name", ["desktop.ini", "Thumbs.db", "System Volume Information/a.txt", "__MACOSX/a.txt"]
)
def test_files_of_file_managers_match_no_wildcard(tmp_path, pattern, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for path in (tmp_path / name, tmp_path / "sub" / name, tmp_path / "a.txt", tmp_path / "sub" / "b.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    expected = {"*": "a", "*.txt": "a", "*/*": "b"}.get(pattern, "ab")
    assert [path.stem for path in matching_files(f"{tmp_path}/{pattern}")] == [*expected]
    assert matching_files(f"{tmp_path}/{name}") == [tmp_path / name]  # named, it is read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"!<arch>\nlib.o/ 0", "is an ar archive, expected the files in it"),
        (b"%PDF-1.7\ntext", "is a PDF document, expected text"),
        (b"PAR1 text", "is a Parquet file, expected text"),
        ("kein BOM".encode("utf-16-le"), "line 1: byte 0x00, expected UTF-8 text"),
        (b"name" + bytes(96) + b"0000644", "line 1: byte 0x00, expected UTF-8 text"),  # tar of Unix V7
    ],
)
def test_other_formats_are_refused(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(iter_documents(Source(kind="text", path=str(tmp_path / "x.txt"))))
