"""Predictions of texts: equality with transformers, the formats of input and output, user errors."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.distributed.shutdown import ShutdownFlag
from dwt_jax.finetune import predict as predictions
from dwt_jax.finetune import run as runs
from dwt_jax.finetune.datasets import ExampleSplit
from helpers.finetuning import checkpoint, config_of, write_task
from helpers.paths import ROOT
from helpers.runs import environment

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NAMES = {0: "no", 1: "yes", 2: "may be"}
TEXTS = ["a good film", "the bad film .", "", "good " * 40, "a", "the film " * 9, "bad bad good"]
PAIRS = ["the", "", "a bad film", "film", "good " * 30, "the film " * 9, "c d"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    options = {"num_labels": 3, "id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    checkpoint("BertForSequenceClassification", folder / "classes", **options)
    checkpoint("DistilBertForSequenceClassification", folder / "number", num_labels=1)
    checkpoint("BertForMaskedLM", folder / "bare")
    return folder


@pytest.fixture(scope="module")
def finetuned(models, tmp_path_factory):
    """A task's directory of dwt finetune with a test file, on pairs."""
    folder = tmp_path_factory.mktemp("finetuned")
    examples = write_task(folder / "data" / "mine", pairs=True)
    workdir = folder / "w" / "mine"
    workdir.mkdir(parents=True)
    config = config_of(examples, epochs=1, buckets=2)
    source = runs.load_source_model(str(models / "bare"))
    runs.finetune_task(runs.prepare_finetuning(config, source, workdir), ShutdownFlag())
    return workdir, examples


def torch_logits(path, texts, pairs=None):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    keys = ["input_ids", "attention_mask", *["token_type_ids"] * (model.config.model_type == "bert")]
    columns = [texts] if pairs is None else [texts, pairs]
    rows = tokenizer(
        *columns,
        padding=True,
        truncation=True,
        max_length=26,
        return_tensors="pt",
        return_token_type_ids=True,
    )
    with torch.no_grad():
        return model(**{key: rows[key] for key in keys}).logits.numpy()


def run(capsys, *arguments):
    assert main(["predict", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize("pairs", [None, PAIRS])
@pytest.mark.parametrize("name", ["classes", "number"])
def test_logits_are_those_of_transformers(models, monkeypatch, name, pairs):
    """In the texts' order, over several parts, batches and padded lengths, with texts that are cut."""
    monkeypatch.setattr(predictions, "_WINDOW_TEXTS", 4)
    classifier = predictions.load_classifier(str(models / name))
    split = ExampleSplit(TEXTS, pairs, None, [*map(str, range(len(TEXTS)))])
    logits = np.concatenate(list(predictions.predict_texts(classifier, split, batch_size=3)))
    np.testing.assert_allclose(logits, torch_logits(models / name, TEXTS, pairs), atol=1e-5)


def test_classes_and_probabilities_of_pairs(models, tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text("".join(f"{a}\t{b}\n" for a, b in zip(TEXTS, PAIRS, strict=True)))
    out, err = run(capsys, f"--model={models / 'classes'}", "--probabilities", tmp_path / "pairs.txt")
    rows = list(csv.DictReader(io.StringIO(out), delimiter="\t"))
    expected = torch.softmax(torch.tensor(torch_logits(models / "classes", TEXTS, PAIRS)), -1).numpy()
    assert [row["index"] for row in rows] == [*map(str, range(len(TEXTS)))]
    assert [row["prediction"] for row in rows] == [NAMES[i] for i in expected.argmax(-1)]
    written = [[float(row[f"p({name})"]) for name in NAMES.values()] for row in rows]
    np.testing.assert_allclose(written, expected, atol=1e-5)
    assert "3 of 7 texts were cut to 26 tokens" in err
    assert "2 of 7 texts are empty" in err


def test_numbers_as_json(models, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"id": f"t{i}", "sentence": text}) + "\n" for i, text in enumerate(TEXTS))
    )
    out, _ = run(capsys, f"--model={models / 'number'}", "--json", tmp_path / "texts.jsonl")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["index"] for record in records] == [f"t{i}" for i in range(len(TEXTS))]
    expected = torch_logits(models / "number", TEXTS)[:, 0]
    np.testing.assert_allclose([record["prediction"] for record in records], expected, atol=1e-5)


def test_all_inputs_give_the_same_predictions(finetuned, tmp_path, capsys, monkeypatch):
    """The submission of the fine-tuning, from its test file, lines, CSV, JSON lines and standard input."""
    workdir, examples = finetuned
    submission = (workdir / "submission" / "mine.tsv").read_text()
    rows = [line.split("\t")[1:3] for line in open(examples["test"])][1:]
    (tmp_path / "lines").write_text("".join(f"{text}\t{other}\n" for text, other in rows))
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["other", "sentence"], *([other, text] for text, other in rows)])
    with open(tmp_path / "rows.jsonl", "w") as file:
        file.writelines(json.dumps({"sentence": text, "other": other}) + "\n" for text, other in rows)
    for model in (workdir, workdir / "model"):
        assert run(capsys, f"--model={model}", "--max-length=20", examples["test"])[0] == submission
    arguments = [f"--model={workdir}", "--max-length=20"]
    for name in ("lines", "rows.csv", "rows.jsonl"):
        assert run(capsys, *arguments, tmp_path / name)[0] == submission
    for options in ([], ["-"], ["--format=csv"]):
        content = (tmp_path / ("rows.csv" if "--format=csv" in options else "lines")).read_bytes()
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content), isatty=bool))
        assert run(capsys, *arguments, *options)[0] == submission
    run(capsys, *arguments, f"--out={tmp_path / 'p.tsv'}", examples["test"])
    assert (tmp_path / "p.tsv").read_text() == submission
    assert main(["predict", f"--model={workdir.parent}", str(tmp_path / "lines")]) == 2
    assert "has the fine-tunings mine, expected one" in capsys.readouterr().err


def test_predictions_are_utf8_in_every_locale(models, tmp_path):
    """Names of classes are data: `dwt predict … > predictions.tsv` has them as --out does."""
    shutil.copytree(models / "classes", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    names = {key: f"größe 日本 {key}" for key in config["id2label"]}
    config |= {"id2label": names, "label2id": {name: int(key) for key, name in names.items()}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "t.txt").write_text("ab\n")
    for encoding in ("ascii", "latin-1"):
        done = subprocess.run(
            [sys.executable, "-m", "dwt_jax", "predict", f"--model={tmp_path / 'model'}", tmp_path / "t.txt"],
            env=environment(PYTHONPATH=str(ROOT), PYTHONIOENCODING=encoding),
            capture_output=True,
        )
        assert done.stdout.decode("utf-8").splitlines()[1].split("\t")[1] in names.values()


def test_progress_of_long_inputs_is_on_stderr(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dwt_jax.progress.LINE_SECONDS", 0)
    (tmp_path / "t").write_text("a film\n" * 9)
    out, err = run(capsys, f"--model={models / 'number'}", "--batch-size=4", tmp_path / "t")
    assert len(out.splitlines()) == 10
    assert "predict: texts 4/9" in err
    assert "ETA" in err


@pytest.mark.parametrize(
    ("model", "content", "options", "message"),
    [
        (
            "bare",
            "a\n",
            [],
            "has no classification head (it has mlm), expected a directory that dwt finetune",
        ),
        ("nowhere", "a\n", [], "nowhere: no such directory"),
        ("number", "a\n", ["--probabilities"], "predicts a number, expected a model of classes"),
        ("classes", "", [], "no text, expected at least one"),
        ("classes", "a\tb\nc\n", [], "line 2: 1 texts separated by tabs, expected 2"),
        ("classes", "a\nb\tc\n", [], "line 2: 2 texts separated by tabs, expected 1"),
        ("classes", "雨\n雪\n", [], "100.0% of the texts' tokens are unknown"),
        ("classes", "a\n", ["--max-length=27"], "--max-length is 27, expected from 3 to the model's 26"),
        ("classes", "a\n", ["--out=nowhere/x"], "--out: nowhere/x is in nowhere, which is no directory"),
        ("classes", "a\n", ["--text-column=text"], "--text-column is 'text', expected a table with it: "),
        ("classes", "text\na\n", ["--format=tsv"], "no column 'sentence'; known: text"),
    ],
)
def test_user_errors_are_one_line(models, tmp_path, capsys, model, content, options, message):
    (tmp_path / "texts").write_text(content)
    assert main(["predict", f"--model={models / model}", *options, str(tmp_path / "texts")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_nothing_is_written_over_the_texts_or_for_a_refused_input(models, tmp_path, capsys):
    (tmp_path / "texts").write_text("a\nb\tc\n")
    arguments = ["predict", f"--model={models / 'classes'}", str(tmp_path / "texts")]
    assert main([*arguments, f"--out={tmp_path / 'texts'}"]) == 2
    assert "is the input file, expected another file" in capsys.readouterr().err
    assert main([*arguments, f"--out={tmp_path / 'p.tsv'}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_models_with_other_outputs_are_refused(tmp_path, capsys):
    (tmp_path / "texts").write_text("a\n")
    for problem_type in ("multi_label_classification", "regression"):
        path = tmp_path / problem_type
        checkpoint("BertForSequenceClassification", path, num_labels=3, problem_type=problem_type)
        assert main(["predict", f"--model={path}", str(tmp_path / "texts")]) == 2
        assert f"is a {problem_type} with 3 outputs, expected one class or" in capsys.readouterr().err


def test_a_pipe_is_not_replaced_by_the_predictions(models, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "texts").write_text("a\n")
    out = f"--out={tmp_path / 'pipe'}"
    assert main(["predict", f"--model={models / 'classes'}", out, str(tmp_path / "texts")]) == 2
    assert "pipe is no regular file, expected a file in a directory" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()
