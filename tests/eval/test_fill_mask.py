"""Words for masks, beside transformers' pipeline."""

import io
import json
import types

import pytest

from dwt_jax.cli import main
from dwt_jax.eval.fill_mask import fill_masks
from helpers.masked_models import save_masked_model

transformers = pytest.importorskip("transformers")

CASES = {
    "BertForMaskedLM": ["the [MASK] faded .", "a [MASK] [MASK] , bed", "[MASK]"],
    "RobertaForMaskedLM": ["the <mask> faded.", "A<mask> bed,<mask>!", "<mask>"],
    "EuroBertForMaskedLM": ["the <|mask|> faded.", "A<|mask|> bed,<|mask|>!", "<|mask|>"],
}


@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    folder = save_masked_model(tmp_path_factory.mktemp("models") / "m", request.param)
    return str(folder), CASES[request.param]


def test_scores_are_those_of_transformers(model, monkeypatch):
    """Several masks, texts of several lengths, and more texts than a batch has."""
    path, texts = model
    monkeypatch.setattr("dwt_jax.eval.fill_mask._BATCH_MASKS", 2)
    pipeline = transformers.pipeline("fill-mask", model=path, tokenizer=path, top_k=7)
    for text, masks in zip(texts, fill_masks(path, texts, top_k=7), strict=True):
        expected = pipeline(text)
        expected = expected if isinstance(expected[0], list) else [expected]
        assert len(masks) == text.lower().count("mask")
        for guesses, others in zip(masks, expected, strict=True):
            assert [guess.token for guess in guesses] == [other["token"] for other in others]
            assert [guess.word for guess in guesses] == [other["token_str"].strip() for other in others]
            assert [guess.probability for guess in guesses] == pytest.approx(
                [other["score"] for other in others], rel=1e-4
            )


def test_command_prints_words_or_json(model, capsys, monkeypatch):
    path, texts = model
    expected = fill_masks(path, texts[:2], top_k=2)
    assert main(["fill-mask", f"--model={path}", "--top-k=2", *texts[:2]]) == 0
    printed = capsys.readouterr().out
    for text, masks in zip(texts[:2], expected, strict=True):
        assert f"{text}\n" in printed
        for guess in (guess for guesses in masks for guess in guesses):
            assert f"{guess.word} {guess.probability:.1%}" in printed
    content = "\n".join([*texts[:2], ""]).encode()
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content), isatty=bool))
    assert main(["fill-mask", f"--model={path}", "--top-k=2", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == texts[:2]
    assert [record["masks"] for record in records] == [
        [[guess._asdict() for guess in guesses] for guesses in masks] for masks in expected
    ]


def test_user_errors_are_one_line(model, capsys, monkeypatch):
    path, texts = model
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"\n"), isatty=bool))
    mask = texts[2]
    other = "<mask>" if mask == "[MASK]" else "[MASK]"
    for arguments, message in (
        ([], "no text, expected at least one with a mask"),
        (["the cab"], f"'the cab' has no mask, expected {mask}\n"),
        ([f"the {other}"], f"has no mask, expected {mask} in place of {other}, which is that of another"),
        ([f"{mask} {'cab ' * 90}"], "tokens, expected at most the model's"),
        ([mask, "--top-k=1000"], "--top-k is 1000, expected at most the "),
        ([mask, "--top-k=0"], "--top-k is 0, expected at least 1"),
    ):
        assert main(["fill-mask", f"--model={path}", *arguments]) == 2
        stderr = capsys.readouterr().err
        assert message in stderr
        assert stderr.count("\n") == 1


def test_standard_input_with_cr_alone_is_refused(model, capsys, monkeypatch):
    content = io.BytesIO(b"a [MASK]\rthe [MASK]\r")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=content, isatty=bool))
    assert main(["fill-mask", f"--model={model[0]}"]) == 2
    assert "standard input: its lines end with CR alone, expected LF or CR LF" in capsys.readouterr().err
