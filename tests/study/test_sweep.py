"""Configs of studies: their jobs, the manifest, and errors."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from dwt_jax.config_loader import load_config as load_config
from dwt_jax.errors import UserError
from dwt_jax.remap.plan import plan_growth
from dwt_jax.study import manifest
from dwt_jax.study.sweep import FINAL_STEP, checkpoint_steps, load_study, parse_overrides, study_jobs

STUDIES = ("teacher_quality", "soft_weight", "remapping", "knowledge_inheritance", "chain", "budget")


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["cpu", "h200", "paper"])
def test_every_study_has_valid_jobs(name, scale, tmp_path):
    """All configs are valid, every job comes after those that it needs, and names are unique."""
    loaded_study = load_study(f"configs/study/{name}.py:{scale}")
    jobs = study_jobs(loaded_study, tmp_path)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert len({job.workdir for job in jobs}) == len(jobs)
    for i, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:i]), job.name
    roles = {arm.name: arm.role for arm in loaded_study.arms}
    students = [job for job in jobs if job.kind == "train" and roles[job.arm] == "student"]
    shape = {"cpu": (4, 192), "h200": (6, 512), "paper": (6, 768)}[scale]
    for job in students:
        assert (job.config.model.num_hidden_layers, job.config.model.hidden_size) == shape
        # With a teacher of its own for each seed, the intervals cover the choice of the teacher too.
        seed = 0 if scale == "paper" else job.seed
        assert all(name.endswith(f"-seed{seed}") for name in job.needs)
    assert len([job for job in students if job.arm == "alone"]) == 3
    assert not any(str(tmp_path) in str(job.config.data) for job in jobs)


def test_the_study_of_decoders_differs_from_its_baseline_by_the_teacher_alone(tmp_path):
    jobs = study_jobs(load_study("configs/study/causal.py"), tmp_path)
    runs = {job.name: job for job in jobs if job.kind == "train"}
    students = [job for job in runs.values() if job.config.model.num_hidden_layers == 4]
    assert len({dataclasses.replace(job.config.train, steps=0) for job in runs.values()}) == 1
    assert len({(job.config.model, job.config.data, job.config.optimizer) for job in students}) == 1
    assert {job.config.model.objective for job in runs.values()} == {"next_token"}
    assert sum(not job.config.teacher.path for job in students) == 3
    assert runs["early_weak-seed1"].needs == ("weak-seed1",)
    assert any(job.kind == "pairs" for job in jobs)


def test_a_teacher_that_a_scale_does_not_have_is_named():
    with pytest.raises(UserError, match="no extremely weak teacher at scale 'causal'"):
        load_study("configs/study/teacher_quality.py:causal")


@pytest.mark.parametrize("scale", ["1", "0.01"])
def test_the_demo_is_a_valid_study(scale, tmp_path):
    """Every arm has two seeds, the teacher one; students differ only in teacher and growth."""
    jobs = study_jobs(load_study(f"configs/study/demo.py:{scale}"), tmp_path)
    runs = [job for job in jobs if job.kind == "train"]
    arms = [job.arm for job in runs]
    assert {arm: arms.count(arm) for arm in arms} == dict.fromkeys(arms, 2) | {"teacher": 1}
    students = [job.config for job in runs if job.arm != "teacher"]
    assert len({(c.model, c.data, c.mlm, c.train, c.optimizer) for c in students}) == 1
    assert [job.arm for job in runs[:2]] == ["teacher", "alone"]
    assert {job.needs for job in runs if job.arm == "grown-early"} == {("teacher-seed0",)}  # for both


def test_the_parts_of_the_recipe_are_a_valid_study(tmp_path):
    jobs = study_jobs(load_study("configs/study/recipe.py"), tmp_path)
    assert {job.config.optimizer.kind for job in jobs if "adamw" in job.name} == {"adamw"}
    assert {job.config.optimizer.kind for job in jobs if "muon" in job.name} == {"muon"}


@pytest.mark.parametrize("name", ["remapping", "budget", "demo"])
@pytest.mark.parametrize("scale", ["cpu", "h200", "paper"])
def test_every_grown_arm_can_be_grown(name, scale, tmp_path):
    """Growth is planned only once the source is trained; a refusal would stop the study days later."""
    argument = "1" if name == "demo" else scale
    jobs = {job.name: job for job in study_jobs(load_study(f"configs/study/{name}.py:{argument}"), tmp_path)}
    grown = [job for job in jobs.values() if job.kind == "train" and job.config.init.method]
    assert grown
    for job in grown:
        init = job.config.init
        source = jobs[Path(init.from_ or job.config.teacher.path).name].config
        models = [dataclasses.replace(config.model, vocab_size=96) for config in (source, job.config)]
        if init.method != "ligo":
            plan_growth(init.method, *models, jax.random.key(0), init)


@pytest.mark.parametrize("scale", ["cpu", "h200", "paper"])
def test_arms_of_one_name_have_one_config_in_all_studies(scale, tmp_path):
    """So that studies may share their runs. Paths of teachers are those of the study."""
    configs = {}
    for name in STUDIES:
        for job in study_jobs(load_study(f"configs/study/{name}.py:{scale}"), tmp_path):
            if job.kind == "train":
                assert configs.setdefault(job.name, job.config) == job.config, (name, job.name)


def test_the_papers_numbers(tmp_path):
    jobs = {
        job.name: job for job in study_jobs(load_study("configs/study/teacher_quality.py:paper"), tmp_path)
    }
    config = jobs["with_very_weak-seed1"].config
    assert (config.train.batch_size, config.optimizer.learning_rate.value) == (128, 5e-4)
    assert config.train.steps == 30_000_000 * 20 // 128
    assert config.teacher.path == str(tmp_path / "runs" / "very_weak-seed0")
    assert (config.distill.alpha_hard.value, config.distill.alpha_soft.value, config.seed) == (1, 1, 1)


def study(**more):
    arm = {"config": "configs/small_bert.py:2x128", "set": ["train.steps=100", "train.save_every=10"]}
    return {
        "title": "t",
        "baseline": "alone",
        "arms": [
            {"name": "teacher", "role": "teacher", "config": "configs/small_bert.py:2x64", "seeds": [0, 1]},
            {"name": "alone", **arm, "seeds": [0, 1, 2]},
            {
                "name": "distilled",
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


def write_config(tmp_path, config):
    path = tmp_path / "study.py"
    path.write_text(
        f"import json\ndef get_config():\n    return json.loads({json.dumps(json.dumps(config))})\n"
    )
    return str(path)


def test_teacher_has_the_same_seed_if_possible(tmp_path):
    jobs = {job.name: job for job in study_jobs(load_study(write_config(tmp_path, study())), tmp_path / "w")}
    assert [jobs[f"distilled-seed{i}"].needs for i in range(3)] == [
        ("teacher-seed0",),
        ("teacher-seed1",),
        ("teacher-seed0",),
    ]
    assert jobs["distilled-seed1-step30"].step == 30
    assert jobs["distilled-seed1-end"].step == FINAL_STEP
    assert jobs["distilled-seed1-step30"].needs == ("distilled-seed1",)
    assert "alone-seed0-end" not in jobs


def test_the_first_seed_of_every_arm_comes_first(tmp_path):
    """An unfinished study has something of every arm."""
    jobs = study_jobs(load_study(write_config(tmp_path, study())), tmp_path / "w")
    assert [job.name for job in jobs if job.kind == "train"] == [
        *("teacher-seed0", "alone-seed0", "distilled-seed0"),
        *("teacher-seed1", "alone-seed1", "distilled-seed1"),
        *("alone-seed2", "distilled-seed2"),
    ]


def test_too_few_checkpoints_for_fine_tuning_are_refused(tmp_path):
    loaded_study = load_study(write_config(tmp_path, study()))
    arm = loaded_study.arms[2]
    config = study_jobs(loaded_study, tmp_path)[-1].config
    assert checkpoint_steps(arm, "finetune_at", config) == {30: 0.3, FINAL_STEP: 1.0}
    raw_study = study()
    raw_study["arms"][2]["set"][2] = "train.keep_checkpoints=7"
    with pytest.raises(
        UserError, match=r"arm 'distilled': train\.keep_checkpoints is 7, expected at least 8"
    ):
        study_jobs(load_study(write_config(tmp_path, raw_study)), tmp_path)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.99], {FINAL_STEP: 0.99}),  # nearest to the last checkpoint, which is the finished model
        ([0.94, 1.0], {90: 0.94, FINAL_STEP: 1.0}),
        ([0.01], {10: 0.01}),
        ([0.96, 1.0], "finetune_at has 0.96 and 1.0, expected different checkpoints"),
        ([0.29, 0.31], "finetune_at has 0.29 and 0.31, expected different checkpoints"),
    ],
)
def test_shares_are_rounded_to_checkpoints(tmp_path, shares, expected):
    raw_study = study()
    raw_study["arms"][2] |= {"finetune_at": shares, "set": ["train.steps=100", "train.save_every=10"]}
    raw_study["arms"][2]["set"] += ["train.keep_checkpoints=10"]
    loaded_study = load_study(write_config(tmp_path, raw_study))
    config = load_config("configs/small_bert.py:2x128", parse_overrides(loaded_study.arms[2].set))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            checkpoint_steps(loaded_study.arms[2], "finetune_at", config)
    else:
        assert checkpoint_steps(loaded_study.arms[2], "finetune_at", config) == expected


def test_manifest_round_trip(tmp_path):
    loaded_study = load_study(write_config(tmp_path, study()))
    jobs = study_jobs(loaded_study, tmp_path / "w")
    (tmp_path / "w").mkdir()
    manifest.write_manifest(loaded_study, jobs, tmp_path / "w")
    (tmp_path / "w").rename(tmp_path / "moved")
    read_study, job_records = manifest.read_manifest(tmp_path / "moved")
    assert read_study == loaded_study
    for job, record in zip(jobs, job_records, strict=True):
        assert record.workdir == tmp_path / "moved" / job.workdir.relative_to(tmp_path / "w")
        keys = ("kind", "name", "arm", "seed", "step", "share", "tasks")
        assert [getattr(record, key) for key in keys] == [getattr(job, key) for key in keys]


def edited(change):
    def damage(plan):
        change(plan)
        return plan

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(lambda plan: plan.pop("jobs")), "KeyError('jobs'), expected a file that dwt study wrote"),
        (edited(lambda plan: plan["jobs"][0].pop("seed")), "expected a file that dwt study wrote"),
        (edited(lambda plan: plan["jobs"][0].update(arm="x")), "a run of arm 'x'"),
        (edited(lambda plan: plan["grid"].update(baseline="x")), "baseline is 'x'"),
        (edited(lambda plan: plan["grid"]["claims"].append({"arm": "x"})), "claims.0.arm is 'x'"),
        (lambda plan: [plan], "expected"),
    ],
)
def test_damaged_manifest_error_is_one_line(tmp_path, damage, message):
    loaded_study = load_study(write_config(tmp_path, study()))
    manifest.write_manifest(loaded_study, study_jobs(loaded_study, tmp_path), tmp_path)
    path = tmp_path / manifest.MANIFEST_NAME
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(UserError) as caught:
        manifest.read_manifest(tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def study_with(keys, value):
    raw_study = study()
    node = raw_study
    *parents, last = keys
    for key in parents:
        node = node[key]
    node[last] = value
    return raw_study


def study_with_claim(**claim):
    return study_with(["claims"], [claim])


@pytest.mark.parametrize(
    ("raw_study", "message"),
    [
        (study_with(["arms"], []), "arms is empty"),
        (study_with(["arms", 1, "name"], "a b"), "arms.1.name is 'a b'"),
        (study_with(["arms", 1, "name"], "teacher"), "expected each name once"),
        (study_with(["arms", 2, "teacher"], "techer"), "did you mean 'teacher'"),
        (study_with(["arms", 0, "source"], "alone"), "arms.0.source is 'alone', expected an arm before it"),
        (study_with(["arms", 2, "seeds"], [1, 1]), "arms.2.seeds"),
        (study_with(["arms", 2, "finetune_at"], [0.0]), "arms.2.finetune_at"),
        (study_with(["finetuning"], {}), "expected finetuning.config and finetuning.tasks"),
        (study_with(["baseline"], "alnoe"), "did you mean 'alone'"),
        (
            study_with(["claims"], [{"arm": "distiled"}]),
            "claims.0.arm is 'distiled'; did you mean 'distilled'",
        ),
        (study_with(["claims"], [{"arm": "distilled", "measure": "eara"}]), "claims.0.measure"),
        (study_with(["arms", 1, "set"], ["train.steps"]), "arms.1.set has 'train.steps', expected key=value"),
        (study_with(["finetuning", "set"], ["recipe"]), "finetuning.set has 'recipe', expected key=value"),
        (study_with(["out_of_domain"], {"set": ["x"]}), "out_of_domain.set has 'x', expected key=value"),
        (study_with_claim(arm="distilled", at=0.3), "claims.0.at is 0.3, expected 1 for a loss"),
        (study_with_claim(arm="distilled", at=2.0, measure="era"), "claims.0.at is 2.0, expected a share"),
        (
            study_with_claim(arm="distilled", measure="era"),
            "claims.0.at is 1.0, expected a share in finetune_at of 'alone': none",
        ),
        (
            study_with_claim(arm="distilled", against="distilled", measure="era", at=0.5),
            "claims.0.at is 0.5, expected a share in finetune_at of 'distilled': 0.3, 1.0",
        ),
        (study_with(["arms", 1, "pairs_at"], [1.0]), "arms.1.pairs_at is set, expected pairs.sets"),
        (study_with(["arms", 1, "pairs_at"], [0.0]), "arms.1.pairs_at is [0.0], expected shares above 0"),
        (
            study_with(["pairs"], {"sets": ["a/blimp.zip", "b/blimp"]}),
            "pairs.sets has 'a/blimp.zip', expected names that differ",
        ),
        (study_with(["pairs"], {"sets": [".."]}), "pairs.sets has '..', expected a path that ends in a name"),
        (study_with(["pairs"], {"sets": ["era"]}), "pairs.sets has 'era', expected names that differ"),
        (study_with(["pairs"], {"max_pairs": -1}), "pairs.max_pairs is -1, expected at least 0"),
        (
            {**study_with_claim(arm="distilled", measure="grammar"), "pairs": {"sets": ["grammar"]}},
            "claims.0.at is 1.0, expected a share in pairs_at of 'distilled': none",
        ),
        (study_with_claim(arm="distilled", measure="loss_elsewhere"), "expected out_of_domain.config for it"),
        (study_with(["arms", 1, "set"], ["train.stpes=3"]), "arm 'alone': config: unknown key"),
        (
            {**study_with(["arms", 1, "config"], "configs/causal.py"), "masked_words": {"arms": ["alone"]}},
            "masked_words.arms has 'alone', expected an arm of masked models (it is a llama",
        ),
    ],
    ids=str,
)
def test_invalid_study_is_refused(raw_study, message, tmp_path):
    with pytest.raises(UserError) as caught:
        study_jobs(load_study(write_config(tmp_path, raw_study)), tmp_path)
    assert message in str(caught.value)


def test_an_arm_of_decoders_is_fine_tuned(tmp_path):
    raw_study = study_with(["arms", 2, "config"], "configs/causal.py")
    jobs = study_jobs(load_study(write_config(tmp_path, raw_study)), tmp_path)
    shares = {job.share for job in jobs if job.kind == "finetune" and job.arm == "distilled"}
    assert shares == {0.3, 1.0}
