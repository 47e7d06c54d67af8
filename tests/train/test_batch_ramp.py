"""Runs with a batch ramp: rows, compilations, FLOPs, resuming, what is reported."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dwt_jax.config_loader import load_config
from dwt_jax.data.dataset import get_batch, open_dataset, rows_per_epoch
from dwt_jax.errors import UserError
from dwt_jax.models import flops
from dwt_jax.runs.run_dir import read_run_config
from dwt_jax.train import loop
from dwt_jax.train import step as steps
from dwt_jax.train.loop import train
from dwt_jax.train.setup import setup_run
from dwt_jax.train.summary import log_run_summary
from helpers.run_records import assert_same_run, cut_after, records
from helpers.runs import project_with_teacher

SIZES = [2] * 3 + [4] * 3 + [8] * 6
RAMP = {"train.batch_ramp": "[2,4]", "train.batch_ramp_fraction": "0.5"}
TEACHER_STEPS = 5
PREDICTIONS = round(0.15 * 32)  # of a row


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(config:rows, folder): a tiny corpus, prepared, and a teacher."""
    return project_with_teacher(tmp_path_factory.mktemp("ramp"), steps=2)


@pytest.fixture(scope="module")
def overrides(project):
    """A ramp, and a teacher that is left in its second stage."""
    return {
        **RAMP,
        "model.num_hidden_layers": "1",
        "teacher.path": str(project[1] / "teacher"),
        "distill.alpha_soft.kind": "piecewise",
        "distill.alpha_soft.decay_start": str(TEACHER_STEPS / 12),
        "train.log_every": "1",
        "train.save_every": "1",
        "train.keep_checkpoints": "20",
    }


@pytest.fixture(scope="module")
def whole(project, overrides):
    """An uninterrupted run: (directory, batches as read, traces of the step)."""
    workdir, batches, make_global_batch = project[1] / "whole", [], loop.make_global_batch

    def record_batch(batch, *args):
        batches.append(batch)
        return make_global_batch(batch, *args)

    steps.TRACE_COUNTS.clear()
    steps.jit_train_step.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "make_global_batch", record_batch)
        train(load_config(project[0], overrides), workdir)
    return workdir, batches, dict(steps.TRACE_COUNTS)


def test_every_step_has_the_next_rows(project, whole):
    rows, position = open_dataset(project[1] / "rows", "train"), 0
    assert [len(batch.tokens) for batch in whole[1]] == SIZES
    for batch in whole[1]:
        for tokens, segment_ids in zip(batch.tokens, batch.segment_ids, strict=True):
            expected = get_batch(rows, 0, position, 1)
            np.testing.assert_array_equal(tokens, expected.tokens[0])
            np.testing.assert_array_equal(segment_ids, expected.segment_ids[0])
            position += 1


def test_each_stage_is_compiled_once(whole):
    """2 and 4 rows with the teacher, 4 and 8 without."""
    assert whole[2] == {"teacher": 2, "no_teacher": 2}


def test_flops_are_the_sum_over_steps(whole):
    config = read_run_config(whole[0])
    teacher_model = read_run_config(whole[0].parent / "teacher").model
    student = teacher = 0.0
    for step, (size, record) in enumerate(zip(SIZES, records(whole[0]), strict=True)):
        student += flops.training_step_flops(config.model, size, 32, PREDICTIONS)
        if step < TEACHER_STEPS:
            teacher += flops.forward_flops(teacher_model, size, 32, PREDICTIONS)
        assert (record["student_flops"], record["teacher_flops"]) == (student, teacher)
        assert record["batch_size"] == size
    summary = json.loads((whole[0] / "summary.json").read_text())
    assert summary["flops"]["student"] == student
    assert summary["flops"]["teacher_forward"] == teacher
    assert summary["flops"]["total"] == student + teacher
    assert summary["teacher_steps"] == TEACHER_STEPS
    last_evaluation = records(whole[0], "evaluations.jsonl")[-1]
    assert (last_evaluation["student_flops"], last_evaluation["teacher_flops"]) == (student, teacher)


def test_card_counts_the_rows_of_each_step(whole):
    card = (whole[0] / "model" / "README.md").read_text()
    assert "12 of 12 steps of 2 rows to step 3, 4 rows to step 6, then 8 rows of 32 positions" in card
    assert f"({sum(SIZES) * 32 / 1e3:.0f}k positions" in card


def test_resumed_run_equals_uninterrupted(project, overrides, whole, tmp_path, capsys):
    """From the end of a stage and from the middle of the next, on either side of the teacher's end."""
    steps.TRACE_COUNTS.clear()
    for step in (3, 4, 6):
        cut_after(whole[0], tmp_path / f"cut{step}", step)
        train(load_config(project[0], overrides), tmp_path / f"cut{step}")
        assert f"resumed at step {step}" in capsys.readouterr().err
        assert_same_run(whole[0], tmp_path / f"cut{step}")
    assert not steps.TRACE_COUNTS


def test_accumulated_gradients_give_the_same_losses(project, overrides, tmp_path):
    """Two microbatches a step, of half the rows of its stage. Dropout would differ."""
    no_dropout = {"model.attention_probs_dropout_prob": "0", "model.hidden_dropout_prob": "0"}
    losses = []
    for count in ("1", "2"):
        changed = {**overrides, **no_dropout, "train.gradient_accumulation_steps": count}
        train(load_config(project[0], changed), tmp_path / count)
        losses.append([record["loss"] for record in records(tmp_path / count)])
    assert len(losses[0]) == len(SIZES)
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train.batch_ramp": "[2,6]"}, r"train\.batch_ramp\.1 is 4 there, 6 here"),
        ({"train.batch_ramp": "[2]"}, r"train\.batch_ramp\.1 is 4 there, None here"),
        ({"train.batch_ramp_fraction": "0.4"}, r"train\.batch_ramp_fraction is 0\.5 there, 0\.4 here"),
        (
            {"train.batch_ramp": "[]", "train.batch_ramp_fraction": "0"},
            r"train\.batch_ramp\.0 is 2 there, None",
        ),
    ],
)
def test_other_ramp_is_another_run(project, overrides, whole, changed, message):
    with pytest.raises(UserError, match=message) as error:
        train(load_config(project[0], {**overrides, **changed}), whole[0])
    assert "\n" not in str(error.value)


def test_epochs_are_the_fewest_steps_with_their_rows(project, tmp_path):
    ramp = {"train.batch_ramp": "[2,4]", "train.batch_ramp_fraction": "0.4"}
    run = setup_run(load_config(project[0], {**ramp, "train.steps": "0", "train.epochs": "1"}), tmp_path)
    num_steps, num_rows = 0, 0
    while num_rows < rows_per_epoch(run.rows):
        num_steps += 1
        ends = round(0.2 * num_steps), round(0.4 * num_steps)
        num_rows = sum((2, 4, 8)[(k >= ends[0]) + (k >= ends[1])] for k in range(num_steps))
    assert run.config.train.steps == num_steps
    assert run.batch_sizes.sum() == num_rows


def test_flops_of_muon_do_not_depend_on_the_batch(project, tmp_path):
    run = setup_run(load_config(project[0], {**RAMP, "optimizer.kind": "muon"}), tmp_path)
    shape_flops = [[32, 32]] * 4 + [[32, 64]] * 2  # of a layer, the smaller side first; the head has one
    update = 5 * (2 * sum(4 * m**2 * n + 2 * m**3 for m, n in shape_flops) + 6 * 32**3)
    model = run.config.model
    expected = [flops.training_step_flops(model, size, 32, PREDICTIONS) + update for size in SIZES]
    assert run.student_flops.tolist() == expected
    assert not run.teacher_flops.any()
    messages = []
    log_run_summary(run, None, 0, SimpleNamespace(log_message=messages.append, num_dropped=0))
    assert "12 steps of 2 rows to step 3, 4 rows to step 6, then 8 rows of 32 positions" in messages[0]
    num_rows = json.loads((project[1] / "rows" / "index.json").read_text())["splits"]["train"]["rows"]
    assert messages[0].endswith(f": {sum(SIZES) / num_rows:.3g} epochs of {num_rows} rows")
    share = 12 * update / sum(expected)
    assert messages[1] == f"muon: {share:.0%} of the student's FLOPs per step are Newton-Schulz iterations"
