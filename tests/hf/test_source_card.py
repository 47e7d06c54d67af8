"""Cards of other models, which are not trusted."""

from dwt_jax.hf.source_card import INHERITED_KEYS, MAX_FRONT_MATTER, inherited_metadata, source_name


def metadata(header):
    return inherited_metadata(f"---\n{header}\n---\nText.\n", INHERITED_KEYS)


def test_metadata_is_text_as_written():
    """The language `no` is Norwegian, and 1e3 is a name."""
    header = "license: mit\nlanguage: [no, en]\ndatasets:\n- 1e3\ntags: [mine]\nbase_model: a/b"
    expected = {"license": "mit", "language": ["no", "en"], "datasets": ["1e3"], "base_model": "a/b"}
    assert metadata(header) == expected


def test_header_that_expands_is_not_expanded():
    """Two copies of the last line in each line: 2**60 keys or values."""
    merges = ["license: mit", "a0: &a0 {k: 1}"]
    merges += [f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]" for i in range(1, 61)]
    assert metadata("\n".join(merges)) == {"license": "mit"}
    lists = ["license: mit", "a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 61))]
    assert metadata("\n".join([*lists, "language: *a60"])) == {"license": "mit"}


def test_damaged_header_has_no_metadata():
    long = "license: mit\nx: " + "y" * MAX_FRONT_MATTER
    for header in ("license: [mit", "license: &a [*a]", "[" * 20_000, "- mit", "license: {a: b}", long):
        assert metadata(header) == {}


def test_name_of_a_source(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert source_name(tmp_path / "run" / "model") == "model"
    (tmp_path / "run" / "run.json").write_text("{}")
    assert source_name(tmp_path / "run" / "model") == "run"
    assert source_name(tmp_path / "run") == "run"
    assert source_name(tmp_path / "models--a--b-c" / "snapshots" / "1") == "a/b-c"
