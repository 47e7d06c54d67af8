"""`dwt evaluate --pairs`: the command, what it refuses, and how it resumes."""

import json
import re
import shutil

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.eval import evaluate_pairs as evaluation
from dwt_jax.eval.evaluate_pairs import evaluate_pairs
from dwt_jax.eval.sentence_scores import Scoring, encode_sentences
from helpers.masked_models import save_masked_model

pytest.importorskip("torch")
pytest.importorskip("transformers")

PAIRS = {
    "order-a.txt": "bed a cab\na bed cab\ncab the faded .\nthe cab faded .\n",
    "order-b.txt": "a bed cab\na cab bed\nfacade a\na facade\n",  # shares a sentence with order-a
    "other-c.txt": "defaced bed\nbed defaced\n",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_masked_model(tmp_path_factory.mktemp("models") / "model", "BertForMaskedLM")


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, text in PAIRS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def scored(monkeypatch):
    """The sentences of each call of score_sentences, as tuples of token ids."""
    calls = []

    def count(params, config, sentences, *arguments, **options):
        pieces = np.split(sentences.tokens, sentences.offsets[1:-1]) if len(sentences) else []
        calls.append([tuple(x) for x in pieces])
        return score(params, config, sentences, *arguments, **options)

    score = evaluation.score_sentences
    monkeypatch.setattr(evaluation, "score_sentences", count)
    return calls


def test_command_with_json(model, pairs, tmp_path, capsys):
    out = tmp_path / "scores.json"
    arguments = ["evaluate", f"--model={model}", f"--pairs={pairs}", f"--out={out}"]
    assert main([*arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [*results["by_paradigm"]] == ["order-a", "order-b", "other-c"]
    assert [*results["by_term"]] == ["order", "other"]
    assert results["scoring"] == {"pll": "word-l2r", "normalize_length": False}
    assert results["unknown_share"] == 0
    assert results["interval"][0] <= results["accuracy"] <= results["interval"][1]
    stored = json.loads(out.read_text())
    assert stored["results"] == results
    for name, row in stored["scores"].items():
        good, bad = np.array(row["good"]), np.array(row["bad"])
        assert (good < 0).all()
        expected = 100 * np.mean((good > bad) + 0.5 * (good == bad))
        assert results["by_paradigm"][name]["accuracy"] == expected
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"all (mean of paradigms)  {results['accuracy']:.1f}")
    assert lines[-1] == "unknown tokens: 0.00%"
    assert main([*arguments, "--pll=original"]) == 2
    assert "has scores with pll 'word-l2r', expected 'original' or a new file" in capsys.readouterr().err
    assert json.loads(out.read_text()) == stored


def test_each_distinct_sentence_is_scored_once(model, pairs, scored):
    evaluate_pairs(str(model), str(pairs))
    sentences = [sentence for call in scored for sentence in call]
    assert len(scored) == 3
    assert len(set(sentences)) == len(sentences) == 9


def test_a_paradigm_of_sentences_that_are_scored_already(model, pairs, scored):
    (pairs / "again-a.txt").write_text(PAIRS["order-a.txt"])
    results = evaluate_pairs(str(model), str(pairs), Scoring(normalize_length=True))["by_paradigm"]
    assert results["again-a"]["accuracy"] == results["order-a"]["accuracy"]
    assert sum(map(len, scored)) == 9


def test_an_interrupted_evaluation_goes_on_where_it_stopped(model, pairs, scored, tmp_path, monkeypatch):
    complete = evaluate_pairs(str(model), str(pairs), out=tmp_path / "complete.json")
    first = [*scored]
    scored.clear()
    count = evaluation.score_sentences

    def stop_after_one(*arguments, **options):
        if scored:
            raise KeyboardInterrupt
        return count(*arguments, **options)

    monkeypatch.setattr(evaluation, "score_sentences", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        evaluate_pairs(str(model), str(pairs), out=tmp_path / "resumed.json")
    monkeypatch.setattr(evaluation, "score_sentences", count)
    assert json.loads((tmp_path / "resumed.json").read_text())["results"] is None
    assert evaluate_pairs(str(model), str(pairs), out=tmp_path / "resumed.json") == complete
    assert scored == first
    assert (tmp_path / "resumed.json").read_text() == (tmp_path / "complete.json").read_text()
    evaluate_pairs(str(model), str(pairs), out=tmp_path / "resumed.json")
    assert scored == first


def test_another_model_is_refused(model, pairs, tmp_path):
    evaluate_pairs(str(model), str(pairs), out=tmp_path / "scores.json")
    other = save_masked_model(tmp_path / "other", "BertForMaskedLM", seed=2)
    with pytest.raises(UserError, match="has scores with model '"):
        evaluate_pairs(str(other), str(pairs), out=tmp_path / "scores.json")
    (pairs / "order-b.txt").unlink()
    with pytest.raises(UserError, match="has scores with pairs '"):
        evaluate_pairs(str(model), str(pairs), out=tmp_path / "scores.json")


def test_rows_that_no_token_has_do_not_count(model, pairs, tmp_path):
    """Many checkpoints pad their tables; training leaves these rows out of the softmax too."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    padded = transformers.BertForMaskedLM.from_pretrained(model)
    vocab_size = padded.config.vocab_size
    padded.resize_token_embeddings(vocab_size + 40)
    with torch.no_grad():
        padded.cls.predictions.bias[vocab_size:] = 3.0
    shutil.copytree(model, tmp_path / "padded")
    padded.save_pretrained(tmp_path / "padded")
    scores = []
    for path in (model, tmp_path / "padded"):
        evaluate_pairs(str(path), str(pairs), out=tmp_path / "scores.json")
        scores.append(json.loads((tmp_path / "scores.json").read_text())["scores"])
        (tmp_path / "scores.json").unlink()
    for name, row in scores[0].items():
        for key, values in row.items():
            np.testing.assert_allclose(scores[1][name][key], values, atol=1e-4)


def test_only_the_first_pairs_of_each_paradigm_are_scored(model, pairs, tmp_path):
    whole, first = tmp_path / "whole.json", tmp_path / "first.json"
    evaluate_pairs(str(model), str(pairs), out=whole)
    results = evaluate_pairs(str(model), str(pairs), out=first, max_pairs=1)
    assert {name: row["pairs"] for name, row in results["by_paradigm"].items()} == {
        "order-a": 1,
        "order-b": 1,
        "other-c": 1,
    }
    for name, row in json.loads(whole.read_text())["scores"].items():
        expected = {key: [pytest.approx(row[key][0], abs=1e-5)] for key in row}
        assert json.loads(first.read_text())["scores"][name] == expected
    with pytest.raises(UserError, match="has scores with pairs '"):
        evaluate_pairs(str(model), str(pairs), out=whole, max_pairs=1)


def test_equal_sentences_are_ties(model, tmp_path):
    (tmp_path / "x-y.txt").write_text("a bed\na bed\nA  BED\na bed\n")
    results = evaluate_pairs(str(model), str(tmp_path), Scoring("original", normalize_length=True))
    assert results["accuracy"] == 50
    assert results["interval"] is None


def test_the_length_of_the_longest_sentence_is_that_of_the_model(model, tmp_path):
    (tmp_path / "x-y.txt").write_text(f"{'bed ' * 11}\n{'cab ' * 11}\n")
    assert evaluate_pairs(str(model), str(tmp_path))["pairs"] == 1
    (tmp_path / "x-y.txt").write_text(f"a bed\na\na\n{'bed ' * 12}\n")
    says = r"x-y\.txt, line 4: a sentence of 12 tokens, expected 1 to 11 \(the model's 13 positions less 2"
    with pytest.raises(UserError, match=says):
        evaluate_pairs(str(model), str(tmp_path))
    (tmp_path / "x-y.txt").write_text("a bed\n\u200b\n")
    with pytest.raises(UserError, match="line 2: a sentence of 0 tokens, expected 1 to 11"):
        evaluate_pairs(str(model), str(tmp_path))


def test_mostly_unknown_tokens_are_refused(model, tmp_path):
    (tmp_path / "x-y.txt").write_text("bed zzz\nzzz bed\n")
    assert evaluate_pairs(str(model), str(tmp_path))["unknown_share"] == 0.5
    (tmp_path / "x-y.txt").write_text("bed zzz zzz\nzzz bed zzz\n")
    with pytest.raises(UserError, match=r"66\.7% of the tokens are unknown to the tokenizer .*model"):
        evaluate_pairs(str(model), str(tmp_path))


def test_a_score_that_is_not_finite_is_an_error(model, pairs, monkeypatch, tmp_path):
    def score(params, config, sentences, *_, **__):
        return np.where(np.arange(len(sentences)) == 1, np.nan, 0.0)

    monkeypatch.setattr(evaluation, "score_sentences", score)
    with pytest.raises(UserError, match=r"the score of '.*' \(order-a\) is nan, expected a finite number"):
        evaluate_pairs(str(model), str(pairs), out=tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == {}


def test_the_name_grammar_is_reserved(model, tmp_path, monkeypatch, capsys):
    """The model does not know these words; the folder of that name has words that it knows."""
    (tmp_path / "grammar").mkdir()
    (tmp_path / "grammar" / "x-y.txt").write_text("bed a\na bed\n")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", f"--model={model}", "--pairs=./grammar", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 1
    assert main(["evaluate", f"--model={model}", "--pairs=grammar"]) == 2
    assert "of the tokens are unknown to the tokenizer" in capsys.readouterr().err


def test_progress_lines_have_speed_and_time_left(model, pairs, capsys, monkeypatch):
    monkeypatch.setattr("dwt_jax.progress.LINE_SECONDS", 0)
    assert main(["evaluate", f"--model={model}", f"--pairs={pairs}", "--batch-size=8"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("evaluate: tokens ")
    assert all(re.search(r" tokens/s  ETA \d+:\d\d", line) for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "evaluate: one of the arguments --data --pairs is required"),
        (["--pairs=x", "--data=y"], "--data: not allowed with argument --pairs"),
        (["--pairs="], "--pairs is empty, expected a path"),
        (["--pairs=absent"], "--pairs: no absent, expected a folder or a zip archive"),
        (
            ["--data=y", "--pll=original"],
            "evaluate: --pll is given with --data, expected it with --pairs only",
        ),
        (["--data=y", "--out=z"], "evaluate: --out is given with --data"),
        (["--pairs=x", "--pll=l2r"], "--pll: invalid choice: 'l2r'"),
        (["--pairs=grammar", "--batch-size=0"], "--batch-size is 0, expected at least 1"),
        (["--pairs=grammar", "--model=absent"], "absent: no such directory"),
    ],
)
def test_user_errors_are_one_line_with_status_2(model, arguments, says, capsys):
    assert main(["evaluate", f"--model={model}", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_helper_model_splits_words(model):
    assert (np.diff(encode_sentences(["a facade"], model).word_ends) == 0).any()
    assert load_vocabulary(model).unk_id not in encode_sentences(["a facade"], model).tokens
