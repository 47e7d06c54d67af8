"""Studies as configs: what they come to, and what cannot be."""

import json

import pytest

from dwt_jax.errors import UserError
from dwt_jax.study.grid import END, fine_tuned_at, jobs_of, load

STUDIES = ("teacher_quality", "soft_weight", "remapping", "knowledge_inheritance", "chain", "budget")


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["cpu", "h200", "paper"])
def test_every_study_comes_to_runs_that_can_be(name, scale, tmp_path):
    """All configs are built and checked, every job comes after what it needs, names are its own."""
    grid = load(f"configs/study/{name}.py:{scale}")
    jobs = jobs_of(grid, tmp_path)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert len({job.workdir for job in jobs}) == len(jobs)
    for i, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:i]), job.name
    students = [job for job in jobs if job.kind == "train" and not job.arm.startswith("teacher")]
    assert {job.config.model.num_hidden_layers for job in students} <= {6, 1, 2, 4}
    assert len([job for job in jobs if job.arm == "alone" and job.kind == "train"]) == 3
    sizes = {job.config.model.hidden_size for job in jobs}
    assert sizes == {{"cpu": 64, "h200": 512, "paper": 768}[scale]}
    assert not any(str(tmp_path) in str(job.config.data) for job in jobs)


def test_the_papers_numbers(tmp_path):
    jobs = {job.name: job for job in jobs_of(load("configs/study/teacher_quality.py:paper"), tmp_path)}
    config = jobs["with2-seed1"].config
    assert (config.train.batch_size, config.optimizer.learning_rate.value) == (128, 5e-4)
    assert config.train.steps == 30_000_000 * 20 // 128
    assert config.teacher.path == str(tmp_path / "runs" / "teacher2-seed0")
    assert (config.distill.alpha_hard.value, config.distill.alpha_soft.value, config.seed) == (1, 1, 1)


def study(**more):
    arm = {"config": "configs/demo.py:student", "set": ["train.steps=100", "train.checkpoint_every=10"]}
    return {
        "title": "t",
        "baseline": "alone",
        "arms": [
            {"name": "teacher", "role": "teacher", "config": "configs/demo.py:teacher", "seeds": [0, 1]},
            {"name": "alone", **arm, "seeds": [0, 1, 2]},
            {
                "name": "taught",
                **arm,
                "set": [*arm["set"], "train.keep_checkpoints=9", "distill.preset=paper_normal"],
                "teacher": "teacher",
                "seeds": [0, 1, 2],
                "finetune_at": [0.3, 1.0],
            },
        ],
        "finetuning": {"config": "configs/glue.py", "tasks": ["era", "party"]},
        **more,
    }


def written(tmp_path, found):
    path = tmp_path / "study.py"
    path.write_text(
        f"import json\ndef get_config():\n    return json.loads({json.dumps(json.dumps(found))})\n"
    )
    return str(path)


def test_a_seed_is_taught_by_its_own_teacher_where_there_is_one(tmp_path):
    jobs = {job.name: job for job in jobs_of(load(written(tmp_path, study())), tmp_path / "w")}
    assert [jobs[f"taught-seed{i}"].needs for i in range(3)] == [
        ("teacher-seed0",),
        ("teacher-seed1",),
        ("teacher-seed0",),
    ]
    assert jobs["taught-seed1-step30"].step == 30
    assert jobs["taught-seed1-end"].step == END
    assert jobs["taught-seed1-step30"].needs == ("taught-seed1",)
    assert "alone-seed0-end" not in jobs


def test_checkpoints_must_be_kept(tmp_path):
    grid = load(written(tmp_path, study()))
    arm = grid.arms[2]
    config = jobs_of(grid, tmp_path)[-1].config
    assert fine_tuned_at(arm, config) == (30, END)
    found = study()
    found["arms"][2]["set"][2] = "train.keep_checkpoints=7"
    with pytest.raises(UserError, match=r"arm 'taught': train\.keep_checkpoints is 7, expected at least 8"):
        jobs_of(load(written(tmp_path, found)), tmp_path)


def changed(where, value):
    found = study()
    node = found
    *parents, last = where
    for key in parents:
        node = node[key]
    node[last] = value
    return found


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (changed(["arms"], []), "arms is empty"),
        (changed(["arms", 1, "name"], "a b"), "arms.1.name is 'a b'"),
        (changed(["arms", 1, "name"], "teacher"), "expected each name once"),
        (changed(["arms", 2, "teacher"], "techer"), "did you mean 'teacher'"),
        (changed(["arms", 0, "source"], "alone"), "arms.0.source is 'alone', expected an arm before it"),
        (changed(["arms", 2, "seeds"], [1, 1]), "arms.2.seeds"),
        (changed(["arms", 2, "finetune_at"], [0.0]), "arms.2.finetune_at"),
        (changed(["finetuning"], {}), "expected finetuning.config and finetuning.tasks"),
        (changed(["baseline"], "alnoe"), "did you mean 'alone'"),
        (changed(["claims"], [{"arm": "tought"}]), "claims.0.arm is 'tought'; did you mean 'taught'"),
        (changed(["claims"], [{"arm": "taught", "measure": "eara"}]), "claims.0.measure"),
        (changed(["arms", 1, "set"], ["train.steps"]), "expected key=value"),
        (changed(["arms", 1, "set"], ["train.stpes=3"]), "arm 'alone': config: unknown key"),
    ],
    ids=str,
)
def test_what_cannot_be(found, says, tmp_path):
    with pytest.raises(UserError) as caught:
        jobs_of(load(written(tmp_path, found)), tmp_path)
    assert says in str(caught.value)
