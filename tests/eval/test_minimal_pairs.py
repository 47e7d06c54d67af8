"""Reading minimal pairs in both formats, from folders and archives, and what is refused."""

import json
import zipfile

import pytest

from dwt_jax.errors import UserError
from dwt_jax.eval.minimal_pairs import MinimalPair, pair_locations, pairs_digest, read_minimal_pairs

RECORD = {
    "sentence_good": "The law is just.",
    "sentence_bad": "The law are just.",
    "field": "syntax",
    "linguistics_term": "agreement",
    "UID": "simple",
    "pairID": "0",
}


def json_line(**changes):
    return json.dumps({**RECORD, **changes})


def write_files(path, files):
    """files: {name: text or bytes}; into a zip archive if that is the suffix of `path`."""
    contents = {name: x if isinstance(x, bytes) else x.encode() for name, x in files.items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return path
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.fixture(params=["folder", "archive.zip"])
def container(request, tmp_path):
    return tmp_path / request.param


def test_json_lines(container):
    """One UID in two files is one paradigm; hidden files and those of macOS are none."""
    files = {
        "data/b.jsonl": json_line(UID="other", linguistics_term="order") + "\r\n\r\n",
        "data/a.jsonl": "\ufeff" + json_line() + "\n" + json_line(sentence_good="A law is just.") + "\n",
        "data/c.jsonl": json_line(sentence_bad="The law be just."),
        "data/.DS_Store.jsonl": b"\xb0",
        "__MACOSX/data/._a.jsonl": b"\xb0",
        "README": b"\xb0",
    }
    other, simple = read_minimal_pairs(write_files(container, files))
    assert (other.name, other.term, other.field, len(other.pairs)) == ("other", "order", "syntax", 1)
    assert (simple.name, simple.term) == ("simple", "agreement")
    assert [pair[:2] for pair in simple.pairs] == [
        ("The law is just.", "The law are just."),
        ("A law is just.", "The law are just."),
        ("The law is just.", "The law be just."),
    ]
    assert simple.pairs[1].good_location == f"{container}/data/a.jsonl, line 2"


def test_text_files(container):
    files = {"agreement-simple-1.txt": "law are .\nlaw is .\nx are\nx is\n", "order.txt": "b a\na b"}
    agreement, order = read_minimal_pairs(write_files(container, files))
    assert (agreement.name, agreement.term) == ("agreement-simple-1", "agreement")
    assert (order.name, order.term) == ("order", "order")
    file = f"{container}/agreement-simple-1.txt"
    assert agreement.pairs[1] == MinimalPair("x is", "x are", f"{file}, line 4", f"{file}, line 3")
    locations = pair_locations([agreement, order])
    assert [*locations] == ["law is .", "law are .", "x is", "x are", "a b", "b a"]
    assert locations["a b"] == f"{container}/order.txt, line 2"


def test_names_of_members_as_other_programs_write_them(tmp_path):
    """A dot before the name, a name twice (the last one counts, as for unzip), capitals."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("./data//a.JSONL", json_line())
        archive.writestr("b.jsonl", json_line(UID="b") * 2)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("b.jsonl", json_line(UID="b"))
    paradigms = read_minimal_pairs(tmp_path / "x.zip")
    assert {paradigm.name: len(paradigm.pairs) for paradigm in paradigms} == {"simple": 1, "b": 1}


def test_digest_depends_on_the_sentences_alone(tmp_path):
    files = {"a-b.txt": "law are\nlaw is\n"}
    paths = [write_files(tmp_path / name, files) for name in ("x", "y.zip")]
    first, second = (pairs_digest(read_minimal_pairs(path)) for path in paths)
    assert first == second
    write_files(tmp_path / "x", {"a-b.txt": "laws is\nlaw is\n"})
    assert pairs_digest(read_minimal_pairs(tmp_path / "x")) != first


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no such file, expected *.jsonl as of BLiMP or *.txt as of Zorro"),
        ({"a.csv": "x"}, "no such file, expected"),
        ({"a.jsonl": "\n"}, "no pair in its files"),
        ({"a.jsonl": json_line() + "\n{"}, "a.jsonl, line 2: Expecting property name"),
        ({"a.jsonl": "[]"}, "a.jsonl, line 1: a JSON list, expected an object"),
        ({"a.jsonl": json_line(sentence_bad=3)}, "a.jsonl, line 1: sentence_bad is 3, expected text"),
        ({"a.jsonl": json_line(UID=" ")}, "line 1: UID is ' ', expected text"),
        (
            {"a.jsonl": '{"sentence_good": "a"}'},
            "line 1: no sentence_bad, expected text (keys: sentence_good",
        ),
        (
            {"a.jsonl": json_line(), "b.jsonl": json_line(linguistics_term="order")},
            "b.jsonl, line 1: linguistics_term and field of simple are order, syntax, expected agreement",
        ),
        (
            {"a.txt": "x\ny\nz\n"},
            "a.txt, line 3: the last of an odd number of lines, expected pairs of lines",
        ),
        ({"a.txt": "x\ry\r"}, "a.txt: its lines end with CR alone, expected LF or CR LF"),
        ({"a.txt": ""}, "a.txt, line 1: empty, expected a sentence"),
        ({"a.txt": "x\n \ny\nz"}, "a.txt, line 2: empty, expected a sentence"),
        ({"a.txt": b"x\ny\n\xb0z\nw"}, "a.txt, line 3: byte 0xb0 is not UTF-8, expected UTF-8 text"),
        ({"a.txt": "x\ny", "b/a.txt": "x\ny"}, "a second file a.txt, expected one for each paradigm"),
        (
            {"a.txt": "x\ny", "b.jsonl": json_line()},
            "has both *.jsonl and *.txt, expected files of one format",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(files, says, container):
    container = write_files(container, files)
    if not files and container.suffix != ".zip":
        container.mkdir()
    with pytest.raises(UserError) as error:
        read_minimal_pairs(container)
    assert says in str(error.value)
    assert str(container) in str(error.value)
    assert "\n" not in str(error.value)


def test_neither_a_folder_nor_an_archive(tmp_path):
    with pytest.raises(UserError, match=r"no .*absent, expected a folder or a zip archive"):
        read_minimal_pairs(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("x\ny\n")
    with pytest.raises(UserError, match=r"a\.txt: File is not a zip file, expected a folder or"):
        read_minimal_pairs(tmp_path / "a.txt")
    archive = write_files(tmp_path / "a.zip", {"a.txt": "x\ny\n" * 100})
    content = bytearray(archive.read_bytes())
    content[40] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match="Bad CRC-32"):
        read_minimal_pairs(archive)
