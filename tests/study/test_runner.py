"""A small study, run: the queue, killing it anywhere, jobs by number, the report."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from dwt_jax.errors import UserError
from dwt_jax.study import manifest, runner, sweep_html, sweep_tables
from dwt_jax.study import results as study_results
from dwt_jax.study.sweep import load_study, study_jobs
from dwt_jax.train import step as steps
from helpers.runs import dwt, prepared_project, start

RECIPE = [
    "examples.max_train_examples=64",
    "recipe.epochs=1",
    "recipe.max_length=16",
    "recipe.seeds=[0,1]",
    "recipe.buckets=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(spec of a study of two arms and two seeds, folder)"""
    folder = tmp_path_factory.mktemp("study")
    config = prepared_project(folder)
    arm = {"config": config, "set": ["train.steps=4", "train.save_every=2", "train.eval_every=2"]}
    found = {
        "title": "A small study",
        "baseline": "alone",
        "arms": [
            {"name": "teacher", "role": "teacher", **arm},
            {
                "name": "alone",
                "label": "the student alone",
                **arm,
                "seeds": [0, 1],
                "finetune_at": [0.5, 1.0],
            },
            {
                "name": "taught",
                **arm,
                "set": [*arm["set"], "distill.preset=paper_normal"],
                "seeds": [0, 1],
                "teacher": "teacher",
                "finetune_at": [1.0],
            },
        ],
        "finetuning": {"config": "configs/glue.py", "tasks": ["era"], "set": RECIPE},
        "elsewhere": {"config": config.partition(":")[0], "set": ["data.validation_fraction=0.3"]},
        "claims": [
            {"text": "A teacher helps", "arm": "taught", "paper": "so it says"},
            {"text": "A teacher harms the era", "arm": "taught", "measure": "era", "expected": "worse"},
        ],
    }
    path = folder / "study.py"
    path.write_text(
        f"import json\ndef get_config():\n    return json.loads({json.dumps(json.dumps(found))})\n"
    )
    return str(path), folder


@pytest.fixture(scope="module")
def whole(place):
    """The study, run without a break in this process."""
    spec, folder = place
    steps.jit_train_step.cache_clear()  # other tests have runs of this shape
    before = steps.TRACE_COUNTS.copy()
    assert runner.run_study(load_study(spec), folder / "whole")
    return folder / "whole", {kind: steps.TRACE_COUNTS[kind] - before[kind] for kind in ("alone", "teacher")}


def test_runs_of_one_shape_share_their_steps(whole):
    """Five runs, two programs: teacher and students alone are one shape here."""
    assert whole[1] == {"alone": 1, "teacher": 1}


def test_what_is_done_is_never_done_again(place, whole, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in whole[0].rglob("summary.json")}
    assert runner.run_study(load_study(place[0]), whole[0])
    assert "study:" not in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in whole[0].rglob("summary.json")}
    listed = runner.format_plan(load_study(place[0]), whole[0], costs=False).splitlines()
    assert all(" done " in line for line in listed[1:])


def test_the_report_has_every_number_that_was_measured(whole):
    page = sweep_html.write_study_report(whole[0])
    found = study_results.collect_study_results(whole[0])
    text = page.with_suffix(".md").read_text().replace("\\", "")  # as it is read
    assert f"{found.jobs} of {found.jobs} runs are done" in text
    assert "A teacher helps (paper: so it says): " in text
    assert [judged.verdict for judged in found.hypothesis_results] != ["not comparable"] * 2
    rows = list(csv.DictReader(page.with_suffix(".csv").open()))
    losses = {(r["arm"], r["seed"]): float(r["value"]) for r in rows if r["measure"] == "held_out_loss"}
    for (arm, seed), value in losses.items():
        summary = json.loads((whole[0] / "runs" / f"{arm}-seed{seed}" / "summary.json").read_text())
        assert value == pytest.approx(summary["held_out"]["held_out_loss"], rel=1e-9)
    assert len(losses) == 5
    scores = [r for r in rows if r["measure"] == "era"]
    assert len(scores) == 6 * 2  # (2 + 2 + 2 checkpoints) of two seeds of fine-tuning
    results = json.loads((whole[0] / "finetuned" / "taught-seed1-end" / "results.json").read_text())
    mine = [float(r["value"]) for r in scores if (r["arm"], r["seed"]) == ("taught", "1")]
    assert mine == results["tasks"]["era"]["last"]["by_seed"]
    mean = sum(losses["taught", s] - losses["alone", s] for s in "01") / 2
    shown = sweep_tables.format_interval(found.hypothesis_results[0].interval, "held_out_loss")
    assert found.hypothesis_results[0].interval.mean == pytest.approx(mean, rel=1e-9)
    assert shown in text
    assert "Along the way: era" in text
    html = page.read_text()
    assert "<script" not in html
    assert html.count("<svg") >= 4
    points = {one.arm: one for one in study_results.arm_qualities(found.arms)}
    assert set(points) == {"alone", "taught"}
    last = [found.arms["taught"].runs[seed].evaluations[-1] for seed in (0, 1)]
    cost = sum(one["student_flops"] + one["teacher_flops"] for one in last) / 2
    assert points["taught"].flops == pytest.approx(cost)
    assert points["taught"].flops > points["alone"].flops > 0
    assert points["taught"].scores[1] == pytest.approx(sum(mine) / 2)
    assert len([r for r in rows if r["measure"] == "loss_elsewhere"]) == 5


def test_what_cannot_be_paired_is_said_so(whole):
    found = study_results.collect_study_results(whole[0])
    ours, theirs = found.arms["taught"], found.arms["alone"]
    assert study_results.paired_difference(ours, theirs, "held_out_loss") is not None
    runs = {
        seed: run._replace(documents=run.documents._replace(predictions=run.documents.predictions + 1))
        for seed, run in ours.runs.items()
    }
    other = dataclasses.replace(ours, runs=runs)
    assert study_results.paired_difference(other, theirs, "held_out_loss") is None
    judged = study_results.evaluate_hypothesis(
        found.grid.claims[0], found.grid, {**found.arms, "taught": other}
    )
    assert judged.verdict == "not comparable"
    assert "or not with what can be paired" in sweep_tables.hypothesis_sentence(judged, found)
    changed = dataclasses.replace(found, arms={**found.arms, "taught": other})
    assert sweep_tables.flops_to_target_table(changed).rows[-1][1:] == ["other held-out text"] * 2
    runs = {
        seed: run._replace(documents=run.documents._replace(text="another"))
        for seed, run in ours.runs.items()
    }
    assert (
        study_results.paired_difference(dataclasses.replace(ours, runs=runs), theirs, "held_out_loss") is None
    )
    elsewhere = {seed: one._replace(text="another") for seed, one in ours.elsewhere.items()}
    other = dataclasses.replace(ours, elsewhere=elsewhere)
    assert study_results.paired_difference(ours, theirs, "loss_elsewhere") is not None
    assert study_results.paired_difference(other, theirs, "loss_elsewhere") is None
    nothing = study_results.ArmResults(ours.arm, {}, {}, {}, {})
    assert study_results.paired_difference(nothing, theirs, "era") is None
    assert study_results.mean_loss_curve(nothing) == ([], [], [])


def test_a_grid_that_has_changed_is_refused_and_a_new_task_is_done(place, whole):
    """A finished run is never reported as what it is not."""
    before = (whole[0] / manifest.MANIFEST_NAME).read_text()
    grid = load_study(place[0])
    for change, says in (
        ("train.steps=5", "train.steps is 4 there, 5 in the study"),
        ("optimizer.weight_decay=0.5", "optimizer.weight_decay is 0.01 there, 0.5 in the study"),
    ):
        arms = (
            grid.arms[0],
            dataclasses.replace(grid.arms[1], set=(*grid.arms[1].set, change)),
            grid.arms[2],
        )
        with pytest.raises(UserError, match=says):
            runner.run_study(dataclasses.replace(grid, arms=arms), whole[0])
    recipe = dataclasses.replace(grid.finetuning, set=(*grid.finetuning.set, "recipe.epochs=2"))
    with pytest.raises(UserError, match=r"era: recipe\.epochs is 1 there, 2 in the study"):
        runner.run_study(dataclasses.replace(grid, finetuning=recipe), whole[0])
    assert (whole[0] / manifest.MANIFEST_NAME).read_text() == before
    both = dataclasses.replace(grid, finetuning=dataclasses.replace(grid.finetuning, tasks=("era", "party")))
    jobs = study_jobs(both, whole[0])
    assert [job.is_done() for job in jobs] == [job.kind != "finetune" for job in jobs]


def test_another_text_elsewhere_is_refused(place, whole):
    grid = load_study(place[0])
    elsewhere = dataclasses.replace(grid.elsewhere, set=("data.validation_fraction=0.2",))
    with pytest.raises(UserError, match=r"held_out is 0\.3 there, 0\.2 in the study"):
        runner.run_study(dataclasses.replace(grid, elsewhere=elsewhere), whole[0])


def test_what_was_made_of_something_else_is_refused(place, whole, tmp_path):
    """A teacher by another name, or made anew: its path may change, what is in it may not. And a run made
    anew of another config: what was fine-tuned before is not its own."""
    grid, workdir = load_study(place[0]), tmp_path / "part"
    shutil.copytree(whole[0], workdir)
    assert runner.run_study(grid, workdir)
    other = dataclasses.replace(grid.arms[0], name="other", set=(*grid.arms[0].set, "train.steps=2"))
    swapped = (other, grid.arms[1], dataclasses.replace(grid.arms[2], teacher="other"))
    with pytest.raises(UserError, match="taught-seed0: was made of another model than that of 'other-"):
        runner.run_study(dataclasses.replace(grid, arms=swapped), workdir)
    shutil.rmtree(workdir / "runs" / "teacher-seed0")
    assert runner.run_study(grid, workdir)  # the same again
    for name in ("alone-seed0", "alone-seed1"):
        shutil.rmtree(workdir / "runs" / name)
    alone = dataclasses.replace(grid.arms[1], set=(*grid.arms[1].set, "optimizer.weight_decay=0.5"))
    edited = dataclasses.replace(grid, arms=(grid.arms[0], alone, grid.arms[2]))
    with pytest.raises(UserError, match=r"alone-seed0.*: was made of another run of 'alone-seed0'"):
        runner.run_study(edited, workdir)
    for kind in ("elsewhere", "finetuned"):
        for path in (workdir / kind).glob("alone-*"):
            shutil.rmtree(path)
    assert runner.run_study(edited, workdir)


def test_a_run_without_a_finite_loss_is_in_the_report(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "part")
    for seed in "01":
        run = tmp_path / "part" / "runs" / f"taught-seed{seed}"
        records = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        lines = [json.dumps({**record, "held_out_loss": None}) + "\n" for record in records]
        (run / "evaluations.jsonl").write_text("".join(lines))
        with np.load(run / "documents.npz") as arrays:
            found = dict(arrays)
        np.savez(run / "documents.npz", **{**found, "loss": found["loss"] * np.nan})
    text = sweep_html.write_study_report(tmp_path / "part").with_suffix(".md").read_text().replace("\\", "")
    assert "A teacher helps (paper: so it says): undecided at this scale." in text
    assert "nan [nan, nan; t nan, nan]" in text
    assert "| taught | never, or not known | never, or not known |" in text


def test_flops_are_the_mean_over_seeds(whole):
    """With a weight that ends when the teacher is beaten, they differ by seed."""
    found = study_results.collect_study_results(whole[0]).arms["taught"]
    first, second = found.runs.values()
    more = [{**record, "teacher_flops": 3 * record["teacher_flops"]} for record in second.evaluations]
    runs = {0: first, 1: second._replace(evaluations=tuple(more))}
    spent = [one["student_flops"] + 2 * one["teacher_flops"] for one in first.evaluations]
    assert study_results.mean_loss_curve(dataclasses.replace(found, runs=runs))[1] == pytest.approx(spent)


def test_a_plan_needs_no_examples(place, tmp_path, capsys):
    grid = load_study(place[0])
    nothing = ("examples.kind=glue", f"examples.path={tmp_path / 'none'}")
    glue = dataclasses.replace(grid.finetuning, tasks=("rte",), set=nothing)
    told = runner.format_plan(dataclasses.replace(grid, finetuning=glue), tmp_path / "s", costs=True)
    lines = {line.split()[1]: line.split() for line in told.splitlines()[1:-2]}
    assert lines["alone-seed0-end"][-2:] == ["unknown", "unknown"]
    assert float(lines["alone-seed0"][-2]) > 0
    assert "rte: of unknown length: " in capsys.readouterr().err


def test_what_is_missing_for_the_last_job_is_said_before_the_first(place, tmp_path):
    grid = load_study(place[0])
    nothing = ("examples.kind=glue", f"examples.path={tmp_path / 'none'}")
    glue = dataclasses.replace(grid.finetuning, tasks=("rte",), set=nothing)
    files = (*grid.elsewhere.set, f"data.sources.0.path={tmp_path / 'books.txt'}")
    books = dataclasses.replace(grid.elsewhere, set=("data.sources.0.kind=text", *files))
    for other in (dataclasses.replace(grid, finetuning=glue), dataclasses.replace(grid, elsewhere=books)):
        with pytest.raises(UserError, match=str(tmp_path)):
            runner.run_study(other, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_claim_at_a_checkpoint_that_is_not_there_yet_is_not_judged(place, whole, tmp_path):
    """Not by another checkpoint that happens to be there."""
    shutil.copytree(whole[0], tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "finetuned" / "taught-seed0-end")
    shutil.rmtree(tmp_path / "part" / "finetuned" / "taught-seed1-end")
    found = study_results.collect_study_results(tmp_path / "part")
    assert [judged.interval is None for judged in found.hypothesis_results] == [False, True]
    shutil.rmtree(tmp_path / "part" / "runs" / "taught-seed1")
    found = study_results.collect_study_results(tmp_path / "part")
    assert "(1 of the seeds)" in sweep_tables.study_markdown(found)


def test_the_rate_of_a_run_that_was_stopped_on_its_way(place, whole, tmp_path):
    """By what its steps took, not by what the last process saw of it."""
    shutil.copytree(whole[0], tmp_path / "part")
    path = tmp_path / "part" / "runs" / "taught-seed0" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "seconds_of_this_process": 1e-9}))
    last = [
        runner.format_plan(load_study(place[0]), at, costs=True).splitlines()[1]
        for at in (whole[0], tmp_path / "part")
    ]
    assert last[0] == last[1]


def test_the_report_needs_no_config_file(whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "moved")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    page = sweep_html.write_study_report(tmp_path / "moved")
    assert (
        page.with_suffix(".csv").read_text()
        == sweep_html.write_study_report(whole[0]).with_suffix(".csv").read_text()
    )


def test_a_job_by_its_number(place, tmp_path, capsys):
    spec = load_study(place[0])
    jobs = study_jobs(spec, tmp_path / "s")
    at = {job.name: i for i, job in enumerate(jobs)}
    with pytest.raises(UserError, match=r"--index is 3, taught-seed0: .* finished first: teacher-seed0"):
        runner.run_study(spec, tmp_path / "s", at["taught-seed0"])
    with pytest.raises(UserError, match="--index is 99, expected from 0 to"):
        runner.run_study(spec, tmp_path / "s", 99)
    assert not runner.run_study(spec, tmp_path / "s", at["teacher-seed0"])
    assert [job.name for job in jobs if job.is_done()] == ["teacher-seed0"]


def test_the_plan_tells_what_it_costs(place, whole, tmp_path):
    found = dwt("study", f"--config={place[0]}", f"--workdir={tmp_path / 'new'}", "--dry-run")
    assert found.returncode == 0, found.stderr
    assert "40% of the peak is assumed" in found.stderr
    assert "left: about" in found.stdout
    assert not (tmp_path / "new").exists()
    told = runner.format_plan(load_study(place[0]), whole[0], costs=True).splitlines()[1:-2]
    lines = {line.split()[1]: line for line in told}
    flops = json.loads((whole[0] / "runs" / "taught-seed0" / "summary.json").read_text())["flops"]["total"]
    # Not the same: until the data is prepared, the vocabulary has the size that was asked for.
    assert float(lines["taught-seed0"].split()[4]) == pytest.approx(flops, rel=0.1)


@pytest.mark.slow
def test_killed_anywhere_the_report_is_the_same(place, whole, tmp_path):
    """kill -9 at three moments, the last amid fine-tuning; then a run to the end by the command."""
    expected = sweep_html.write_study_report(whole[0]).with_suffix(".csv").read_text()
    workdir = tmp_path / "killed"
    command = ("study", f"--config={place[0]}", f"--workdir={workdir}")
    for sign in (
        "runs/alone-seed0/checkpoints",
        "runs/taught-seed0/metrics.jsonl",
        "finetuned/*/era/config.json",
    ):
        process = start(*command)
        deadline = time.time() + 240
        while not list(workdir.glob(sign)) and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    found = dwt(*command)
    assert found.returncode == 0, found.stderr
    assert (workdir / "report.csv").read_text() == expected
    shutil.rmtree(workdir)
