"""Several teachers: the student learns from the weighted mean of their probabilities."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dwt_jax.config_loader import load_config
from dwt_jax.data.dataset import get_batch
from dwt_jax.errors import UserError
from dwt_jax.models import family
from dwt_jax.objectives.mlm import make_targets
from dwt_jax.objectives.targets import row_keys
from dwt_jax.runs.load import load_model
from dwt_jax.train.loop import train
from dwt_jax.train.setup import setup_run
from helpers.run_records import assert_same_run, cut_after, records, summary
from helpers.runs import dwt, project_with_teacher

HALVES = {"distill.alpha_soft.value": "1", "distill.alpha_hard.value": "0.5"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(config with prepared rows, folder with `teacher` and another, `wide`)"""
    spec, folder = project_with_teacher(tmp_path_factory.mktemp("project"), steps=20)
    wide = {"model.hidden_size": "48", "train.steps": "8", "seed": "3"}
    train(load_config(spec, wide), folder / "wide")
    return spec, folder


def config_of(project, **keys):
    return load_config(project[0], {**HALVES, **{k.replace("__", "."): v for k, v in keys.items()}})


def of_two(project, weights="[1, 3]"):
    paths = json.dumps([str(project[1] / name) for name in ("teacher", "wide")])
    return {"teacher__paths": paths, "teacher__weights": weights}


@pytest.fixture(scope="module")
def student(project):
    train(config_of(project, **of_two(project)), project[1] / "student")
    return project[1] / "student"


def test_the_logged_loss_of_the_teacher_is_that_of_the_mean_of_probabilities(project, student, tmp_path):
    """Of the first step, computed from both models' logits with scipy."""
    every_step = config_of(project, **of_two(project), train__log_every="1", train__steps="1")
    train(every_step, tmp_path / "run")
    [record] = records(tmp_path / "run")
    run = setup_run(every_step, tmp_path / "run")

    batch = get_batch(run.rows, 0, 0, 8)
    keys = row_keys(jnp.uint32(0), jnp.int32(0), jnp.arange(8))
    targets = make_targets(batch, keys, run.step_config.objective, None)
    probabilities = 0.0
    for share, name in ((0.25, "teacher"), (0.75, "wide")):
        loaded = load_model(str(project[1] / name))
        module = family(loaded.model)
        hidden = module.encode(
            loaded.params, loaded.model, targets.inputs, batch.segment_ids, positions=targets.positions
        )
        features = module.lm_features(loaded.params, loaded.model, hidden)
        embedding, bias = module.output_embedding(loaded.params)
        logits = np.asarray(features) @ np.asarray(embedding).T + (0 if bias is None else np.asarray(bias))
        probabilities += share * scipy.special.softmax(logits[..., : loaded.model.vocab_size], axis=-1)
    picked = np.take_along_axis(probabilities, np.asarray(targets.labels)[..., None], -1)[..., 0]
    expected = -(np.log(picked) * targets.weights).sum() / targets.weights.sum()
    assert record["teacher_hard_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_same_teacher_twice_is_that_teacher(project, tmp_path):
    path = str(project[1] / "teacher")
    train(config_of(project, teacher__path=path), tmp_path / "one")
    train(config_of(project, teacher__paths=json.dumps([path, path])), tmp_path / "two")
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    for key in ("loss", "soft_loss", "teacher_hard_loss"):
        np.testing.assert_allclose([r[key] for r in one], [r[key] for r in two], rtol=1e-3)


def test_what_the_run_leaves_names_both(project, student):
    result = summary(student)
    assert result["teachers"] == [
        {"num_hidden_layers": 1, "hidden_size": 32},
        {"num_hidden_layers": 2, "hidden_size": 48},
    ]
    spent = [summary(project[1] / name)["flops"]["total"] for name in ("teacher", "wide")]
    assert result["flops"]["teacher_training"] == sum(spent)
    card = (student / "model" / "README.md").read_text()
    assert "`teacher`, weight 1, 1 layers of hidden size 32; `wide`, weight 3, 2 layers" in card
    digest = json.loads((student / "run.json").read_text())["teacher_digest"]
    first, second = (load_digest(project[1] / name) for name in ("teacher", "wide"))
    assert digest == f"0.25 * {first} + 0.75 * {second}"


def load_digest(run):
    return summary(run)["params_digest"]


def test_flops_are_those_of_both(project, student, tmp_path):
    alone = [
        train_flops(project, tmp_path / name, teacher__path=str(project[1] / name))
        for name in ("teacher", "wide")
    ]
    assert summary(student)["flops"]["teacher_forward"] == pytest.approx(sum(alone))


def train_flops(project, workdir, **keys):
    train(config_of(project, **keys), workdir)
    return summary(workdir)["flops"]["teacher_forward"]


def test_a_resumed_run_is_the_same_bit_for_bit(project, student, tmp_path):
    cut = tmp_path / "cut"
    cut_after(student, cut, 4)
    train(config_of(project, **of_two(project)), cut)
    assert_same_run(cut, student)


def test_other_weights_are_another_run(project, student):
    with pytest.raises(UserError, match=r"teacher\.weights"):
        train(config_of(project, **of_two(project, "[1, 1]")), student)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher__path": "x"}, "teacher.paths is"),
        ({"teacher__weights": "[1]"}, "teacher.weights has 1 entries, expected as many"),
        ({"teacher__weights": "[1, 0]"}, "expected numbers from 1e-30 to 1e.30"),
        ({"teacher__weights": "[1e308, 1e308]"}, "expected numbers from 1e-30"),  # whose sum overflows
        ({"teacher__weights": "[1e-320, 1]"}, "expected numbers from 1e-30"),
        ({"teacher__paths": '["a", ""]'}, "expected model or run directories"),
    ],
)
def test_what_cannot_be_meant_is_refused(project, keys, message):
    with pytest.raises(UserError, match=message):
        config_of(project, **{**of_two(project), **keys})


def test_the_command_names_the_path_that_does_not_exist(project, tmp_path):
    paths = json.dumps([str(project[1] / "teacher"), str(project[1] / "wdie")])
    ended = dwt(
        "train", f"--config={project[0]}", f"--workdir={tmp_path / 'x'}", f"--config.teacher.paths={paths}"
    )
    assert ended.returncode == 2
    assert "teacher.paths" in ended.stderr
    assert "wdie" in ended.stderr
