"""Which changes of a config a run may be resumed with."""

import pytest

from dwt_jax.config_loader import build_config
from dwt_jax.errors import UserError
from dwt_jax.runs.run_dir import init_run_dir

RAW = {
    "train": {"steps": 2},
    "data": {"sources": [{"kind": "text", "path": "corpus.txt"}], "tokenizer": {"path": "bert"}},
}


@pytest.fixture
def initialise(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    (tmp_path / "run").mkdir()

    def call(overrides, digest="rows"):
        config = build_config(RAW, overrides)
        init_run_dir(tmp_path / "run", config, tmp_path / "tokenizer", {"data_digest": digest})

    call({})
    return call


@pytest.mark.parametrize(
    "key",
    ["data.path", "data.sources.0.path", "data.sources.0.data_dir", "data.tokenizer.path", "teacher.path"],
)
def test_inputs_may_lie_elsewhere(initialise, key):
    """A relative path from another directory, or another mount: digests say whether they are the same."""
    initialise({key: "/elsewhere"})
    with pytest.raises(UserError, match=r"data_digest is 'rows' there, 'other' here$"):
        initialise({key: "/elsewhere"}, "other")


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.sources.0.weight", "2"), ("data.row_mode", "packed"), ("seed", "1"), ("train.batch_size", "8")],
)
def test_what_is_computed_may_not_change(initialise, key, value):
    with pytest.raises(UserError, match=rf"{key} is .* there, '?{value}[.0]*'? here$"):
        initialise({key: value})


@pytest.mark.parametrize("lost", ["tokenizer", "tokenizer/tokenizer.json"])
def test_a_lost_tokenizer_is_written_again(initialise, tmp_path, lost, capsys):
    """Else the model of a run that is resumed has none, without a word."""
    path = tmp_path / "run" / lost
    before = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / "tokenizer" / name).unlink()
    if lost == "tokenizer":
        path.rmdir()
    initialise({})
    assert "run: tokenizer/ is damaged; it is rewritten" in capsys.readouterr().err
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes() == before
    initialise({})
    assert not capsys.readouterr().err
