"""What may be added to a finished fine-tuning: seeds and test files."""

import json
import shutil

import numpy as np
import pytest

from dwt_jax.distributed.shutdown import ShutdownFlag
from dwt_jax.errors import UserError
from dwt_jax.finetune import outputs
from dwt_jax.finetune import run as runs
from dwt_jax.finetune.directory import data_digest
from helpers.finetuning import checkpoint, config_of, write_task

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "bert"
    checkpoint("BertForMaskedLM", folder)
    return runs.load_source_model(str(folder))


@pytest.fixture
def task(tmp_path):
    return write_task(tmp_path / "data" / "mine")


def finetune(config, source, workdir):
    workdir.mkdir(exist_ok=True)
    return runs.finetune_task(runs.prepare_finetuning(config, source, workdir), ShutdownFlag())


def trained_seeds(monkeypatch):
    """Return a list to which each group of seeds is added when it is trained."""
    groups, train = [], runs._train_seeds
    monkeypatch.setattr(
        runs, "_train_seeds", lambda c, seeds, *rest: (groups.append([*seeds]), train(c, seeds, *rest))
    )
    return groups


def test_seeds_are_added_as_if_they_had_been_there(model, task, tmp_path, monkeypatch):
    """Only the new ones are trained; report, model and submission are those of one run with all of them."""
    options = {"dropout": 0.1, "epochs": 1}
    expected = finetune(config_of(task, seeds=[3, 1, 2, 0], **options), model, tmp_path / "at_once")
    finetune(config_of(task, seeds=[3, 1], **options), model, tmp_path / "w")
    groups = trained_seeds(monkeypatch)
    extended = config_of(task, seeds=[2, 3, 1, 0], **options)
    assert finetune(extended, model, tmp_path / "w") == expected
    assert groups == [[2], [0]]
    for file in (
        "results.json",
        "config.json",
        "model/model.safetensors",
        "model/README.md",
        "submission/mine.tsv",
    ):
        assert (tmp_path / "w" / file).read_bytes() == (tmp_path / "at_once" / file).read_bytes(), file
    assert finetune(extended, model, tmp_path / "w") == expected
    assert groups == [[2], [0]]
    with pytest.raises(UserError, match=r"recipe.seeds is \[3, 1\], expected those .* \[3, 1, 2, 0\], and"):
        finetune(config_of(task, seeds=[3, 1], **options), model, tmp_path / "w")


def test_an_interrupted_addition_goes_on_with_the_same_groups(model, task, tmp_path, monkeypatch):
    """Parallel seeds: finished ones are in no new group, and the results from before stay until the end."""
    options = {"epochs": 1, "seeds_in_parallel": 2}
    before = finetune(config_of(task, seeds=[0], **options), model, tmp_path / "w")
    extended = config_of(task, seeds=[0, 1, 2, 3], **options)
    write_results = runs._write_results
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_write_results", None)
        with pytest.raises(TypeError):
            finetune(extended, model, tmp_path / "w")
    assert json.loads((tmp_path / "w" / "results.json").read_text()) == before
    (tmp_path / "w" / "seeds" / "3.npz").unlink()
    groups = trained_seeds(monkeypatch)
    assert runs._write_results is write_results
    assert [*finetune(extended, model, tmp_path / "w")["seeds"]] == ["0", "1", "2", "3"]
    assert groups == [[3]]


def test_a_later_test_file_is_predicted_without_training(model, task, tmp_path, monkeypatch, capsys):
    expected = finetune(config_of(task), model, tmp_path / "at_once")
    without = {**task, "test": ""}
    finetune(config_of(without), model, tmp_path / "w")
    assert not (tmp_path / "w" / "submission").exists()
    groups = trained_seeds(monkeypatch)
    assert finetune(config_of(task), model, tmp_path / "w") == expected
    assert "already finished; now test" in capsys.readouterr().err
    submission = tmp_path / "w" / "submission" / "mine.tsv"
    assert submission.read_bytes() == (tmp_path / "at_once" / "submission" / "mine.tsv").read_bytes()
    other = tmp_path / "other.tsv"
    other.write_text("index\tsentence\nx\ta good film\ny\tbad\n")
    results = finetune(config_of({**task, "test": str(other)}), model, tmp_path / "w")
    assert [line.split("\t")[0] for line in submission.read_text().splitlines()] == ["index", "x", "y"]
    assert results["examples"]["test"] == 2
    capsys.readouterr()
    for examples in ({**task, "test": str(other)}, without):
        finetune(config_of(examples), model, tmp_path / "w")
        assert "already finished" in capsys.readouterr().err
    assert groups == []
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na good film\tno\n")
    with pytest.raises(UserError, match=r"run\.data_digest is"):
        finetune(config_of({**task, "dev": str(tmp_path / "dev.tsv")}), model, tmp_path / "w")


@pytest.mark.parametrize("lost", ["model", "model/model.safetensors", "model/config.json"])
def test_a_lost_model_is_trained_again(model, task, tmp_path, monkeypatch, lost):
    """Before the results are written, and before a seed is added that may be worse."""
    options = {"dropout": 0.1, "epochs": 1}
    expected = finetune(config_of(task, seeds=[0, 1, 2], **options), model, tmp_path / "at_once")
    finetune(config_of(task, seeds=[0, 1], **options), model, tmp_path / "w")
    best = json.loads((tmp_path / "w" / "results.json").read_text())["model_of_seed"]
    (tmp_path / "w" / "results.json").unlink()
    path = tmp_path / "w" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    groups = trained_seeds(monkeypatch)
    finetune(config_of(task, seeds=[0, 1], **options), model, tmp_path / "w")
    assert groups == [[best]]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert finetune(config_of(task, seeds=[0, 1, 2], **options), model, tmp_path / "w") == expected
    assert sorted(groups) == sorted([[best], [best], [2]])
    for file in ("results.json", "model/model.safetensors", "model/README.md", "submission/mine.tsv"):
        assert (tmp_path / "w" / file).read_bytes() == (tmp_path / "at_once" / file).read_bytes(), file


def test_a_lost_model_costs_one_seed_however_often_its_training_is_stopped(model, task, tmp_path):
    config = config_of(task, seeds=[0, 1, 2], epochs=1)
    finetune(config, model, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "model")
    (tmp_path / "w" / "results.json").unlink()
    context = runs.prepare_finetuning(config, model, tmp_path / "w")
    lost = {runs._forget_seed_of_lost_model(context) for _ in range(3)}  # a process each, stopped at once
    assert len(lost) == 1
    assert len([*(tmp_path / "w" / "seeds").glob("*.npz")]) == 2
    finetune(config, model, tmp_path / "w")
    assert (tmp_path / "w" / "model" / "model.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "w" / "seeds").iterdir()) == ["0.npz", "1.npz", "2.npz"]


def test_a_directory_of_an_earlier_version_takes_seeds(model, task, tmp_path):
    """Its digest is of all splits, and its results name no test file."""
    config = config_of(task, epochs=1)
    finetune(config, model, tmp_path / "w")
    record = tmp_path / "w" / "finetune.json"
    context = runs.prepare_finetuning(config, model, tmp_path / "w")
    arrays = [np.array(context.data.labels), *(np.array(split.ids) for split in context.data.splits.values())]
    earlier = runs.params_digest([*context.encoded.values(), *arrays])
    assert earlier != data_digest(tmp_path / "w", context.data, context.encoded)
    record.write_text(json.dumps({**json.loads(record.read_text()), "data_digest": earlier}))
    results = tmp_path / "w" / "results.json"
    results.write_text(
        json.dumps({k: v for k, v in json.loads(results.read_text()).items() if k != "test_digests"})
    )
    assert [*finetune(config_of(task, epochs=1, seeds=[0, 1]), model, tmp_path / "w")["seeds"]] == ["0", "1"]
    assert outputs.read_seed_result(tmp_path / "w", 1)
