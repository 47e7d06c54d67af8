"""A teacher's answers on disk: written once, in parts, resumed; and a run that learns from them."""

import json
import shutil

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.config_loader import load_config
from dwt_jax.errors import UserError
from dwt_jax.runs.teacher_cache import CachedTeacher
from dwt_jax.train import cache_teacher
from dwt_jax.train.loop import train
from helpers.run_records import assert_same_run, cut_after, records
from helpers.runs import project_with_teacher


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(config, folder with the teacher)"""
    return project_with_teacher(tmp_path_factory.mktemp("cached"), steps=40)


def overrides(project, **others: str) -> dict[str, str]:
    keys = {"teacher.path": str(project[1] / "teacher"), "distill.alpha_soft": "1", "train.log_every": "1"}
    keys |= {"model.hidden_dropout_prob": "0", "model.attention_probs_dropout_prob": "0"}
    return {**keys, **{key.replace("__", "."): value for key, value in others.items()}}


def write(project, out, *flags: str, **others: str) -> int:
    keys = [f"--config.{key}={value}" for key, value in overrides(project, **others).items()]
    return main(["cache", f"--config={project[0]}", *keys, f"--out={out}", *flags])


def run(project, cache, workdir, **others: str) -> list[dict]:
    train(load_config(project[0], overrides(project, teacher__cache=str(cache), **others)), workdir)
    return records(workdir)


@pytest.fixture(scope="module")
def cache(project):
    """Fifty draws, in files of four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_teacher, "ROWS_PER_SHARD", 32)
        assert write(project, project[1] / "cache") == 0
    return project[1] / "cache"


@pytest.fixture(scope="module")
def online(project):
    train(load_config(project[0], overrides(project)), project[1] / "online")
    return records(project[1] / "online")


@pytest.fixture(scope="module")
def cached(project, cache):
    return run(project, cache, project[1] / "student")


def test_the_first_step_has_the_teachers_loss_and_the_run_learns_as_with_the_teacher(cached, online):
    first, expected = cached[0], online[0]
    for key in ("hard_loss", "teacher_hard_loss"):
        assert first[key] == pytest.approx(expected[key], rel=1e-5)
    assert first["soft_loss"] == pytest.approx(expected["soft_loss"], rel=0.05)
    assert first["student_flops"] == expected["student_flops"]
    assert first["teacher_flops"] == expected["teacher_flops"]  # they were spent when the cache was written
    assert [step["teacher_hard_loss"] for step in cached] == pytest.approx(
        [step["teacher_hard_loss"] for step in online], rel=1e-5
    )
    assert cached[-1]["loss"] == pytest.approx(online[-1]["loss"], rel=0.03)


def probabilities(teacher: CachedTeacher, step: int) -> np.ndarray:
    """What a cache gives each token, float64 [predictions, 128]."""
    sample = teacher.sample(step, np.arange(8))
    is_prediction = sample.entropy > 0
    ids, weights = sample.ids[is_prediction], sample.weights[is_prediction]
    dense = np.zeros((len(ids), 128))
    np.add.at(dense, (np.arange(len(ids))[:, None], ids), weights)
    return dense


def test_shares_of_draws_are_the_probabilities_of_the_most_probable_tokens(project, cache, tmp_path):
    """Each to less than one draw, as systematic resampling has it, and on average to a tenth of that."""
    assert write(project, tmp_path / "top", "--top-k=90") == 0
    draws, top = CachedTeacher(str(cache)), CachedTeacher(str(tmp_path / "top"))
    assert draws.steps == top.steps == 12
    differences = np.concatenate([probabilities(draws, i) - probabilities(top, i) for i in range(12)])
    assert len(differences) > 300
    assert np.abs(differences).max() < 1 / 50 + 1e-3
    assert np.abs(differences.mean(0)).max() < 1 / 500


def test_many_of_the_most_probable_tokens_are_nearly_the_teacher(project, online, tmp_path):
    assert write(project, tmp_path / "top", "--top-k=80") == 0
    found = run(project, tmp_path / "top", tmp_path / "run")
    assert [step["soft_loss"] for step in found] == pytest.approx(
        [step["soft_loss"] for step in online], rel=2e-2
    )
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in online], rel=5e-3)


def test_a_run_resumes_bit_for_bit_and_accumulates(project, cache, cached, tmp_path):
    cut_after(project[1] / "student", tmp_path / "cut", 8)
    run(project, cache, tmp_path / "cut")
    assert_same_run(project[1] / "student", tmp_path / "cut")
    halves = run(project, cache, tmp_path / "halves", train__gradient_accumulation_steps="2")
    assert [step["loss"] for step in halves] == pytest.approx([step["loss"] for step in cached], rel=1e-3)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_parts_and_an_interrupted_writer_give_the_same_bytes(project, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_teacher, "ROWS_PER_SHARD", 32)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".cache.json.partial-1").touch()  # of a process that was killed
    for part in ("1/2", "0/2"):
        assert not (tmp_path / "parts" / "index.json").exists()
        assert write(project, tmp_path / "parts", f"--part={part}") == 0
    (tmp_path / "parts" / ".cache.json.partial-1").unlink()
    assert files(tmp_path / "parts") == files(cache)
    for name in ("index.json", "00001.json"):  # stopped before the checksum of a file was written
        (tmp_path / "parts" / name).unlink()
    assert write(project, tmp_path / "parts") == 0
    assert files(tmp_path / "parts") == files(cache)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"seed": "1"}, "was written for another seed, 0, expected 1"),
        ({"train__batch_size": "16"}, r"another batch_sizes\.0, 8, expected 16"),
        ({"mlm__probability": "0.2"}, r"another mlm\.probability\.value, 0\.15, expected 0\.2"),
        ({"train__steps": "13"}, "has the predictions of 12 steps, expected 13"),
        ({"distill__temperature": "2"}, "temperature is set, expected 1 with teacher.cache"),
        ({"distill__divergence": "reverse_kl"}, "divergence is 'reverse_kl', expected 'forward_kl'"),
        ({"init__method": "ligo"}, "init.method is 'ligo', expected another with teacher.cache"),
        ({"teacher__cache": "nowhere"}, "teacher.cache: nowhere is no directory"),
    ],
)
def test_a_cache_that_does_not_belong_to_the_run_is_refused(project, cache, tmp_path, others, message):
    keys = overrides(project, **{"teacher__cache": str(cache), **others})
    with pytest.raises(UserError, match=message) as error:
        train(load_config(project[0], keys), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_other_masks_of_another_version_are_refused(project, cache, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    index = json.loads((copy / "index.json").read_text())
    index["identity"]["first_targets"] = "of another version"
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match='another first_targets, "of another version", expected'):
        run(project, copy, tmp_path / "run")


def test_a_run_stays_with_its_cache_or_its_teacher(project, cache, cached, tmp_path):
    shutil.copytree(project[1] / "student", tmp_path / "student")
    with pytest.raises(UserError, match=r"run\.teacher_cache_digest is '\w+' there, None here"):
        train(load_config(project[0], overrides(project)), tmp_path / "student")


def test_another_teacher_and_no_path_of_one(project, cache, online, tmp_path):
    with pytest.raises(UserError, match=r"has the answers of another teacher than teacher\.path"):
        run(project, cache, tmp_path / "run", teacher__path=str(project[1] / "online"))
    found = run(project, cache, tmp_path / "run", teacher__path="")
    assert found[0]["teacher_hard_loss"] is not None
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "Distilled from a weak teacher (its answers in `cache`)" in card


def test_damaged_and_incomplete_caches_are_refused(project, cache, tmp_path, monkeypatch):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    content = bytearray((copy / "00002.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "00002.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"00002\.safetensors: damaged, expected the file"):
        run(project, copy, tmp_path / "run")
    monkeypatch.setattr(cache_teacher, "ROWS_PER_SHARD", 32)
    assert write(project, copy) == 0  # the same command writes the damaged file again
    assert files(copy) == files(cache)
    (copy / "index.json").unlink()
    with pytest.raises(UserError, match="is not complete, expected what dwt cache writes"):
        run(project, copy, tmp_path / "other")
    with pytest.raises(UserError, match="holds no cache"):
        run(project, project[1], tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "others", "message"),
    [
        ([], {"teacher__path": ""}, "teacher.path is empty, expected the teacher whose answers are cached"),
        ([], {"teacher__path": "nowhere", "data__path": ""}, "teacher.path: nowhere: no such directory"),
        (["--draws=300"], {}, "--draws is 300, expected at most 255"),
        ([], {"distill__temperature": "2"}, "distill.temperature is set, expected 1 with teacher.cache"),
        (["--top-k=200"], {}, "--top-k is 200, expected at most the vocabulary's size"),
        (["--part=2/2"], {}, "--part is '2/2', expected I/N"),
        ([], {"distill__alpha_soft": "0"}, "distill.alpha_soft is 0 at every step"),
    ],
)
def test_what_cannot_be_cached_is_one_line(project, tmp_path, capsys, flags, others, message):
    assert write(project, tmp_path / "new", *flags, **others) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_cache_is_not_overwritten(project, cache, tmp_path, capsys):
    before = files(cache)
    assert write(project, cache, "--draws=20") == 2
    assert "holds a cache with another count, expected a new --out" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert write(project, tmp_path) == 2
    assert files(cache) == before


def test_next_tokens_and_the_mean_of_two_teachers(project, tmp_path):
    keys = {"model.model_type": "llama", "train.log_every": "1"}
    paths = []
    for seed in ("0", "1"):
        paths.append(str(tmp_path / seed))
        train(
            load_config(project[0], {**keys, "model.num_hidden_layers": "1", "seed": seed}), tmp_path / seed
        )
    keys |= {"distill.alpha_soft": "1", "teacher.paths": ",".join(paths), "teacher.weights": "1,3"}
    train(load_config(project[0], keys), tmp_path / "online")
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    assert main(["cache", f"--config={project[0]}", *flags, f"--out={tmp_path / 'cache'}"]) == 0
    train(load_config(project[0], {**keys, "teacher.cache": str(tmp_path / "cache")}), tmp_path / "cached")
    online, cached = (records(tmp_path / name) for name in ("online", "cached"))
    for key in ("teacher_hard_loss", "selected_share", "teacher_flops"):
        assert [x[key] for x in cached] == pytest.approx([x[key] for x in online], rel=1e-5)
    assert cached[0]["soft_loss"] == pytest.approx(online[0]["soft_loss"], rel=0.03)
    assert cached[-1]["loss"] == pytest.approx(online[-1]["loss"], rel=0.03)
