"""Labelled texts: GLUE's files and their format, TFDS, files with named columns, built-in tasks; configs."""

import gzip
import json
import re

import numpy as np
import pytest

from dwt_jax.config_loader import build_dataclass, bundled_config_path, config_to_dict
from dwt_jax.errors import UserError
from dwt_jax.finetune import config, datasets
from dwt_jax.finetune.config import Examples, FinetuneConfig, Recipe
from dwt_jax.finetune.datasets import read_examples
from dwt_jax.finetune.tasks import BUILTIN_TASKS, GLUE_TASKS
from helpers.glue import GLUE_FILES

LABELS = {
    "cola": [1, 0],
    "sst2": [0, 1],
    "mrpc": [1, 0],
    "stsb": [5.0, 3.8],
    "qqp": [1, 0],
    "mnli": [1, 0, 2],
    "qnli": [0, 1],
    "rte": [1, 0],
    "wnli": [0, 1],
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for name, files in GLUE_FILES.items():
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_bytes(text.encode())
    return folder


def read_glue(glue, task, **options):
    return read_examples(Examples(kind="glue", task=task, path=str(glue), **options))


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_read_examples_of_glue_files(glue, task, capsys):
    data = read_glue(glue, task)
    train = data.splits["train"]
    np.testing.assert_allclose(train.labels, LABELS[task], rtol=1e-6)
    assert train.labels.dtype == (np.float32 if task == "stsb" else np.int32)
    assert (train.text_pairs is None) == (task in ("cola", "sst2"))
    assert len(train.texts) == len(train.ids) == len(LABELS[task])
    assert data.metrics == GLUE_TASKS[task].metrics
    assert len(data.class_names) in (0, len(data.labels))
    stderr = capsys.readouterr().err
    assert stderr.count("too few columns") == (2 if task == "qqp" else 0)


def test_glue_file_format_details(glue):
    assert read_glue(glue, "cola").splits["train"].texts[0] == "Our \"friends won't buy it."
    assert read_glue(glue, "mrpc").splits["train"].text_pairs == ['He said: "No".', "B."]
    qqp = read_glue(glue, "qqp").splits
    assert qqp["train"].texts == ["How?", "Why?"]
    assert qqp["test"].ids == ["0", "1", "2"]  # every line needs a prediction
    assert qqp["test"].text_pairs == ["Two?", "", "Y?"]
    mnli = read_glue(glue, "mnli")
    assert mnli.splits["dev"].texts[0] != mnli.splits["dev_mismatched"].texts[0]
    assert mnli.submissions == {
        "test": "MNLI-m.tsv",
        "test_mismatched": "MNLI-mm.tsv",
        "test_diagnostic": "AX.tsv",
    }
    cola = read_glue(glue, "cola").splits["test"]
    assert (cola.labels, cola.ids, cola.texts[1]) == (None, ["0", "1"], "The car honked.")
    assert "test" not in read_glue(glue, "rte").splits


def test_a_glue_folder_is_used_for_the_files_that_it_has(tmp_path, capsys):
    (tmp_path / "MNLI").mkdir()
    for name in ("train.tsv", "dev_matched.tsv"):
        (tmp_path / "MNLI" / name).write_text(GLUE_FILES["MNLI"][name])
    assert [*read_glue(tmp_path, "mnli").splits] == ["train", "dev"]
    stderr = capsys.readouterr().err
    assert "without dev_mismatched.tsv, test_matched.tsv, test_mismatched.tsv, diagnostic.tsv" in stderr
    (tmp_path / "MNLI" / "dev_matched.tsv").rename(tmp_path / "MNLI" / "dev_mismatched.tsv")
    assert [*read_glue(tmp_path, "mnli").splits] == ["train", "dev_mismatched"]
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(UserError, match=r"dev_matched\.tsv: no such file, expected GLUE's file of mnli"):
        read_glue(tmp_path, "mnli")


def test_max_train_examples_is_the_same_subset(glue):
    limited = read_glue(glue, "mnli", max_train_examples=2).splits
    assert len(limited["train"]) == len(limited["train"].text_pairs) == 2
    assert len(limited["dev"]) == 3
    again = read_glue(glue, "mnli", max_train_examples=2).splits["train"]
    assert again.texts == limited["train"].texts


def test_official_example_counts():
    """Counts of the real files, if available."""
    import os
    from pathlib import Path

    folder = os.environ.get("DWT_GLUE", "")
    if not folder:
        pytest.skip("DWT_GLUE is not set")
    counts = {"CoLA": (8551, 1043), "SST-2": (67349, 872), "MRPC": (3668, 408), "STS-B": (5749, 1500)}
    counts |= {"RTE": (2490, 277), "WNLI": (635, 71)}
    for task, glue_task in GLUE_TASKS.items():
        if (Path(folder) / glue_task.folder / "train.tsv").exists():
            splits = read_glue(folder, task).splits
            assert (len(splits["train"]), len(splits["dev"])) == counts[glue_task.folder]


@pytest.mark.parametrize(
    ("task", "file", "text", "message"),
    [
        (
            "RTE",
            "dev.tsv",
            "index\tsentence1\tlabel\n0\tA\tentailment\n",
            "no column 'sentence2'; did you mean",
        ),
        (
            "RTE",
            "dev.tsv",
            "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentails\n",
            "line 2: label 'entails'; did",
        ),
        ("RTE", "dev.tsv", "index\tsentence1\tsentence2\tlabel\n", "rte: no example in dev, expected"),
        ("RTE", "train.tsv", None, "train.tsv: no such file, expected GLUE's file of rte"),
        ("STS-B", "dev.tsv", "sentence1\tsentence2\tscore\nA\tB\tnan\n", "label 'nan', expected a number"),
        ("STS-B", "dev.tsv", "sentence1\tsentence2\tscore\nA\tB\t1e39\n", "a number that float32 holds"),
    ],
)
def test_file_errors_name_file_and_line(tmp_path, task, file, text, message):
    (tmp_path / task).mkdir()
    for name, content in GLUE_FILES[task].items():
        (tmp_path / task / name).write_text(content)
    if text is None:
        (tmp_path / task / file).unlink()
    else:
        (tmp_path / task / file).write_text(text)
    with pytest.raises(UserError) as caught:
        read_glue(tmp_path, {"RTE": "rte", "STS-B": "stsb"}[task])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_repeated_header_column_is_refused(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tsentence\tlabel\nA\tB\tyes\nC\tD\tno\n")
    options = {"kind": "files", "task": "mine", "train": str(path), "dev": str(path)}
    with pytest.raises(UserError, match="column 'sentence' twice in its first line"):
        read_examples(Examples(**options))
    path.write_text(
        "sentence\t\tlabel\t\nA\t\tyes\t\nC\t\tno\t\n"
    )  # there may be many columns without a name
    assert read_examples(Examples(**options)).splits["dev"].texts == ["A", "C"]


def test_empty_line_of_a_single_column_test_file_is_an_example(tmp_path):
    """Predictions are matched by line if there are no ids."""
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nA\tyes\n\nC\tno\n")
    (tmp_path / "test.tsv").write_text("sentence\nA\n\nC\n")
    train = str(tmp_path / "train.tsv")
    splits = read_examples(
        Examples(kind="files", task="mine", train=train, dev=train, test=str(tmp_path / "test.tsv"))
    ).splits
    assert splits["test"].texts == ["A", "", "C"]
    assert splits["test"].ids == ["0", "1", "2"]
    assert splits["train"].texts == ["A", "C"]


@pytest.fixture(scope="module")
def tfds_glue(tmp_path_factory):
    """glue/rte and glue/stsb in TFDS's format, built with the original features."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")

    class Glue(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("rte", "stsb")]  # noqa: RUF012

        def _info(self):
            class_label = tfds.features.ClassLabel(names=["entailment", "not_entailment"])
            label = np.float32 if self.builder_config.name == "stsb" else class_label
            text = tfds.features.Text()
            features = {"sentence1": text, "sentence2": text, "label": label, "idx": np.int32}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {name: self._generate_examples(name) for name in ("train", "validation", "test")}

        def _generate_examples(self, name):
            stsb = self.builder_config.name == "stsb"
            for i in range(6):
                label = i / 2 if stsb else -1 if name == "test" else i % 2
                yield i, {"sentence1": f"Café {name} {i}", "sentence2": "B.", "label": label, "idx": i}

    for name in ("rte", "stsb"):
        Glue(config=name, data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_read_examples_of_tfds(tfds_glue):
    data = read_examples(Examples(kind="tfds", task="rte", path=str(tfds_glue)))
    assert set(data.splits) == {"train", "dev", "test"}
    for split in ("train", "dev"):
        examples = data.splits[split]
        assert [int(i) % 2 for i in examples.ids] == examples.labels.tolist()
        assert sorted(examples.ids) == list("012345")
    assert data.splits["dev"].texts[0].startswith("Café validation ")
    assert data.splits["test"].labels is None
    assert data.submissions == {"test": "RTE.tsv"}
    numbers = read_examples(Examples(kind="tfds", task="stsb", path=str(tfds_glue))).splits["train"]
    assert numbers.labels.dtype == np.float32
    assert sorted(numbers.labels) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    with pytest.raises(UserError, match="tfds 'glue/wnli', split 'train'"):
        read_examples(Examples(kind="tfds", task="wnli", path=str(tfds_glue)))


def test_read_examples_of_files(tmp_path):
    rows = [
        {"id": f"r{i}", "q": f"half a pair \ud83d{i}", "a": "b", "class": ["no", "yes"][i % 2]}
        for i in range(4)
    ]
    train = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(train.encode()))
    (tmp_path / "dev.tsv").write_text("a\tclass\tq\n1\tyes\t2\n")
    (tmp_path / "test.tsv").write_text("index\ta\tq\n9\t1\t2\n")
    options = {
        "kind": "files",
        "task": "mine",
        "train": str(tmp_path / "train.jsonl.gz"),
        "dev": str(tmp_path / "dev.tsv"),
        "text_column": "q",
        "text_pair_column": "a",
        "label": "class",
    }
    data = read_examples(Examples(**options, test=str(tmp_path / "test.tsv")))
    assert data.labels == ("no", "yes")
    assert data.splits["train"].labels.tolist() == [0, 1, 0, 1]
    assert data.splits["train"].texts[1] == "half a pair \ufffd1"
    assert data.splits["train"].ids == ["r0", "r1", "r2", "r3"]
    assert (data.splits["dev"].texts, data.splits["dev"].text_pairs) == (["2"], ["1"])
    assert data.splits["test"].ids == ["9"]
    assert data.metrics == ("accuracy",)
    assert read_examples(Examples(**options, labels=("yes", "no"))).splits["train"].labels.tolist() == [
        1,
        0,
        1,
        0,
    ]
    with pytest.raises(UserError, match="line 1: label 'no', expected a number"):
        read_examples(Examples(**options, regression=True))
    with pytest.raises(UserError, match="no column 'clas'; did you mean 'class'"):
        read_examples(Examples(**{**options, "label": "clas"}))
    with pytest.raises(UserError, match="1 labels in column 'a', expected from 2"):
        read_examples(Examples(**{**options, "label": "a"}))


@pytest.mark.parametrize(
    ("suffix", "lines", "label"),
    [
        ("tsv", ["sentence\tlabel", "a\tyes", "b\tno", "c\t"], "''"),
        ("tsv", ["sentence\tlabel", "a\tyes", "b\tno", "c\tyes "], "'yes '"),
        ("jsonl", [f'{{"sentence": "a", "label": {label}}}' for label in ("1.0", "0.0", "NaN")], "'nan'"),
        ("jsonl", [f'{{"sentence": "a", "label": "{label}"}}' for label in ("x", "y", " ")], "' '"),
    ],
)
def test_what_is_no_name_of_a_class_is_refused(tmp_path, suffix, lines, label):
    """Otherwise an empty cell, NaN and 'yes ' beside 'yes' would be classes of their own."""
    path = tmp_path / f"train.{suffix}"
    path.write_text("\n".join(lines) + "\n")
    examples = Examples(task="mine", kind="files", train=str(path), dev=str(path), text_column="sentence")
    with pytest.raises(UserError, match=rf"train\.{suffix}, line \d: label {label} in column 'label'"):
        read_examples(examples)


def test_f1_of_three_classes_is_refused(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\na\tx\nb\ty\nc\tz\n")
    examples = Examples(
        task="mine", kind="files", train=str(path), dev=str(path), text_column="sentence", metrics=("f1",)
    )
    with pytest.raises(UserError, match=r"metrics has 'f1', .* there are 3 classes"):
        read_examples(examples)


@pytest.mark.parametrize("task", BUILTIN_TASKS)
def test_builtin_tasks_do_not_leak(task):
    data = read_examples(Examples(task=task))
    train, dev = data.splits["train"], data.splits["dev"]
    speeches = [{name.rpartition("-")[0] for name in split.ids} for split in (train, dev)]
    assert not speeches[0] & speeches[1]
    normalized = [
        {re.sub(r"\W+", " ", text.lower()).strip() for text in split.texts} for split in (train, dev)
    ]
    assert not normalized[0] & normalized[1]
    assert len(train) > 6000
    assert len(dev) > 1500
    for split in (train, dev):
        assert set(split.labels) == set(range(len(BUILTIN_TASKS[task])))
        share = np.bincount(split.labels) / len(split)
        assert share.min() > 0.5 / len(BUILTIN_TASKS[task])
        for name, label in zip(split.ids[::50], split.labels[::50], strict=True):
            if task == "era":
                low, high = map(int, BUILTIN_TASKS[task][label].split("-"))
                assert low <= int(name[:4]) <= high
    if task == "party":
        label_by_address = dict(
            zip([name.rpartition("-")[0] for name in train.ids], train.labels, strict=True)
        )
        assert label_by_address["1862-Abraham-Lincoln"] == 1 or "1862-Abraham-Lincoln" not in label_by_address
        assert {label for name, label in label_by_address.items() if "Roosevelt" in name} == {0, 1}


def test_sentences_are_evenly_spaced_in_an_address():
    sentences = [f"This is sentence number {i} of an address that has many." for i in range(119)]
    address = {"text": "\n".join(sentences), "year": 1900, "name": "A B"}
    sample = [sentence for sentence, _ in datasets._sample_sentences(address)]
    assert len(sample) == datasets.MAX_SENTENCES
    assert (sample[0], sample[-1]) == (sentences[0], sentences[-1])
    gaps = np.diff([int(re.findall(r"\d+", sentence)[0]) for sentence in sample])
    assert set(gaps) <= {1, 2, 3}


# The config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"examples.task": "rta"}, "examples.task is 'rta'; did you mean"),
        ({"examples.kind": "glu"}, "examples.kind is 'glu'; did you mean 'glue'"),
        ({"examples.task": "../x", "examples.kind": "files"}, "expected a valid folder name"),
        ({"examples.task": "results.json", "examples.kind": "files"}, "expected another name"),
        ({"examples.kind": "files", "examples.task": "x"}, "examples.train is empty"),
        ({"examples.kind": "glue", "examples.task": "rte"}, "examples.path is empty"),
        ({"examples.metrics": '["pearson"]'}, "names 'pearson', expected metrics of classes"),
        ({"examples.metrics": '["acuracy"]'}, "names 'acuracy'; did you mean 'accuracy'"),
        ({"examples.max_train_examples": "-1"}, "examples.max_train_examples is -1"),
        ({"recipe.epochs": "0"}, "recipe.epochs is 0, expected at least 1"),
        ({"recipe.seeds": "[1, 1]"}, "recipe.seeds is [1, 1], expected different"),
        ({"recipe.seeds": "[]"}, "recipe.seeds is []"),
        ({"recipe.dropout": "1"}, "recipe.dropout is 1.0"),
        (
            {"precision.attention": "splash"},
            "precision.attention is 'splash', expected 'auto' or 'reference'",
        ),
        ({"recipe.optimizer.eps": "0"}, "recipe.optimizer.eps is 0.0"),
        ({"recipe.optimizer.learning_rate.kind": "until_matched"}, "expected another kind"),
        ({"recipe.batchsize": "3"}, "unknown key 'recipe.batchsize'; did you mean 'recipe.batch_size'"),
    ],
)
def test_invalid_config_is_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        config.load_finetune_config(str(bundled_config_path("glue.py")), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_glue_config_has_a_recipe_for_every_task():
    path = str(bundled_config_path("glue.py"))
    assert [
        task_config.examples.task for task_config in config.load_task_configs(path, ",".join(GLUE_TASKS), {})
    ] == list(GLUE_TASKS)
    assert config.load_finetune_config(path) == config.load_finetune_config(f"{path}:era")
    for task in (*GLUE_TASKS, *BUILTIN_TASKS):
        task_config = config.load_finetune_config(f"{path}:{task}")
        assert (
            config.check_finetune_config(build_dataclass(FinetuneConfig, config_to_dict(task_config)))
            == task_config
        )
    text = bundled_config_path("glue.py").read_text()
    assert len(text.splitlines()) <= 60
    assert text.startswith('"""')
    for tasks, message in (("rte,rte", "expected each task once"), ("rta", "no task 'rta'")):
        with pytest.raises(UserError, match=message):
            config.load_task_configs(path, tasks, {})
    with pytest.raises(UserError, match="already has an argument"):
        config.load_task_configs(f"{path}:era", "rte", {})


def test_recipe_lengths():
    assert Recipe(max_length=128, buckets=4).lengths() == (32, 64, 96, 128)
    assert Recipe(max_length=50, buckets=3).lengths() == (17, 34, 50)
    assert Recipe(max_length=8, buckets=20).lengths() == tuple(range(1, 9))
    assert config.check_finetune_config(FinetuneConfig()) == FinetuneConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["yes", "nan"], "label 'nan' in column 'label', expected the name of a class"),
        (["NA", "no"], "label 'NA'"),
        ([1, "1"], "label '1' in column 'label', expected a label of type int as in the lines before"),
        ([1, True], "label 'True'"),
        ([1, 1.5], "expected the name of a class, a whole number, or true or false"),
        ([["a"], "b"], "expected the name of a class, a whole number"),
        (["no", "\u200bno"], "invisible characters"),
    ],
)
def test_values_that_are_no_classes(tmp_path, values, message):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"sentence": "a b", "label": value}) + "\n" for value in values))
    with pytest.raises(UserError, match=re.escape(message)):
        read_examples(Examples(kind="files", task="t", train=str(path), dev=str(path)))


def test_classes_may_be_truth_values_and_whole_numbers(tmp_path):
    for values, labels in (([True, False], ("False", "True")), ([0, 1, 2.0], ("0", "1", "2"))):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps({"sentence": "a b", "label": value}) + "\n" for value in values))
        data = read_examples(Examples(kind="files", task="t", train=str(path), dev=str(path)))
        assert data.labels == labels
        assert [labels[i] for i in data.splits["dev"].labels] == [
            str(int(v) if v == 2 else v) for v in values
        ]


def test_metrics_of_every_kind_are_those_asked_for(tmp_path):
    assert read_examples(Examples(kind="builtin", task="party", metrics=("f1",))).metrics == ("f1",)
    with pytest.raises(UserError, match="there are 4 classes"):
        read_examples(Examples(kind="builtin", task="era", metrics=("f1",)))
    (tmp_path / "MNLI").mkdir()
    rows = "".join(
        f"{i}\tg\ta b\tc d\t{c}\n" for i, c in enumerate(("entailment", "neutral", "contradiction"))
    )
    for name in ("train", "dev_matched"):
        (tmp_path / "MNLI" / f"{name}.tsv").write_text(
            "index\tgenre\tsentence1\tsentence2\tgold_label\n" + rows
        )
    with pytest.raises(UserError, match="there are 3 classes"):
        read_examples(Examples(kind="glue", task="mnli", path=str(tmp_path), metrics=("f1",)))


# Examples in two splits


def task_of(tmp_path, train, dev, **columns):
    header = "sentence\tother\tlabel"
    for name, rows in (("train", train), ("dev", dev)):
        lines = [f"text {row}\tother {row % 2}\t{'ab'[row % 2]}" for row in rows]
        (tmp_path / f"{name}.tsv").write_text("\n".join([header, *lines]) + "\n")
    paths = {name: str(tmp_path / f"{name}.tsv") for name in ("train", "dev")}
    return read_examples(Examples(kind="files", task="own", **paths, **columns))


@pytest.mark.parametrize(
    ("dev", "share"), [(range(40), "100%"), (range(38, 48), "20%"), (range(39, 49), ""), (range(50, 60), "")]
)
@pytest.mark.parametrize("columns", [{}, {"text_pair_column": "other"}], ids=str)
def test_dev_examples_in_train_are_warned_of(tmp_path, dev, share, columns):
    lines = [*datasets.describe_shared_examples(task_of(tmp_path, range(40), dev, **columns))]
    assert len(lines) == bool(share)
    assert all(line.startswith(f"warning: {share} of the examples in dev are in train too") for line in lines)


def test_pairs_that_share_one_text_are_different_examples(tmp_path):
    data = task_of(tmp_path, range(40), range(1, 41), text_column="other", text_pair_column="sentence")
    assert len([*datasets.describe_shared_examples(data)]) == 1
    data.splits["dev"].text_pairs[:] = ["new"] * 40
    assert not [*datasets.describe_shared_examples(data)]


@pytest.mark.parametrize(
    ("labels", "refused"),
    [
        (("1e-50", "2e-50", "3e-50"), "line 4: label 3e-50 is 0 in float32"),
        (
            ("1700000000.25", "1700000001.5", "1700000002.5"),
            "line 4: label 1700000002.5 is 1700000000 in float32",
        ),
        (("1e-30", "2e-30", "-3e-30"), ""),
        (("1700000000", "1600000000", "1500000000"), ""),
        (("16777217", "16777217", "16777217"), ""),  # nothing to tell apart
        (("1e38", "-1e38", "0"), ""),
    ],
)
def test_numbers_that_float32_does_not_tell_apart_are_refused(tmp_path, labels, refused):
    path = tmp_path / "numbers.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"a text\t{label}\n" for label in labels))
    files = {"train": str(path), "dev": str(path)}
    examples = Examples(kind="files", task="numbers", regression=True, **files)
    if refused:
        with pytest.raises(UserError, match=re.escape(refused)):
            read_examples(examples)
    else:
        split = read_examples(examples).splits["train"]
        np.testing.assert_allclose(split.labels, np.array(labels, float), rtol=1e-7)


def test_a_number_beyond_float64_is_refused_with_its_line(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 1' + "0" * 400 + "}\n")
    examples = Examples(kind="files", task="numbers", regression=True, train=str(path), dev=str(path))
    with pytest.raises(UserError, match=r"line 2: label 1000.*expected a number that float32 holds"):
        read_examples(examples)
