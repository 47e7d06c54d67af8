"""A small study: running, resuming after a kill, jobs by index, the report."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dwt_jax.cli.report import write_directory_report
from dwt_jax.config import Config, Data, Optimizer, Train
from dwt_jax.distributed import shutdown
from dwt_jax.distributed.shutdown import TrainingFailed
from dwt_jax.errors import UserError
from dwt_jax.models import flops
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.runs.metrics_file import total_flops
from dwt_jax.runs.optimizer import optimizer_flops
from dwt_jax.study import extra_results, manifest, runner, study_report, study_tables
from dwt_jax.study import plan as study_plan
from dwt_jax.study import results as study_results
from dwt_jax.study.report import report_markdown
from dwt_jax.study.run_and_report import run_and_report
from dwt_jax.study.sweep import (
    MaskedWords,
    OutOfDomain,
    StudyFinetuning,
    StudyPairs,
    load_study,
    study_jobs,
)
from dwt_jax.train import step as steps
from helpers.runs import dwt, prepared_project, start

RECIPE = [
    "examples.max_train_examples=64",
    "recipe.epochs=1",
    "recipe.max_length=16",
    "recipe.seeds=[0,1]",
    "recipe.buckets=1",
]

PAIRS = {  # Zorro's format: unacceptable, acceptable; the third pair of each is not scored
    "order-subject.txt": "Cat the sees.\nThe cat sees.\nDog the hears.\nThe dog hears.\nA\nB\n",
    "order-object.txt": "It finds cat the.\nIt finds the cat.\nThe cat the.\nThe dog sees.\nA\nB\n",
}


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """Return (spec of a study of three arms, its directory)."""
    folder = tmp_path_factory.mktemp("study")
    config = prepared_project(folder)
    arm = {"config": config, "set": ["train.steps=4", "train.save_every=2", "train.eval_every=2"]}
    (folder / "order").mkdir()
    for name, text in PAIRS.items():
        (folder / "order" / name).write_text(text)
    study = {
        "title": "A small study",
        "baseline": "alone",
        "arms": [
            {"name": "teacher", "role": "teacher", **arm},
            {
                "name": "alone",
                "label": "baseline (no teacher)",
                **arm,
                "seeds": [0, 1],
                "finetune_at": [0.5, 1.0],
                "pairs_at": [0.5, 1.0],
            },
            {
                "name": "distilled",
                **arm,
                "set": [*arm["set"], "distill.preset=paper_normal"],
                "seeds": [0, 1],
                "teacher": "teacher",
                "finetune_at": [1.0],
                "pairs_at": [1.0],
            },
        ],
        "pairs": {"sets": [str(folder / "order")], "max_pairs": 2},
        "finetuning": {"config": "configs/glue.py", "tasks": ["era"], "set": RECIPE, "bag_of_words": True},
        "masked_words": {"arms": ["alone", "distilled"], "rows": 3},
        "out_of_domain": {"config": config.partition(":")[0], "set": ["data.validation_fraction=0.3"]},
        "claims": [
            {"text": "A teacher helps", "arm": "distilled", "paper": "so it says"},
            {"text": "A teacher harms the era", "arm": "distilled", "measure": "era", "expected": "worse"},
            {"text": "A teacher helps on the order of words", "arm": "distilled", "measure": "order"},
        ],
    }
    path = folder / "study.py"
    path.write_text(
        f"import json\ndef get_config():\n    return json.loads({json.dumps(json.dumps(study))})\n"
    )
    return str(path), folder


@pytest.fixture(scope="module")
def finished_study(small_study):
    """The study, run in this process without interruption."""
    spec, folder = small_study
    steps.jit_train_step.cache_clear()  # other tests have runs of this shape
    before = steps.TRACE_COUNTS.copy()
    assert runner.run_study(load_study(spec), folder / "whole")
    return folder / "whole", {
        kind: steps.TRACE_COUNTS[kind] - before[kind] for kind in ("no_teacher", "teacher")
    }


def test_runs_of_one_shape_share_their_steps(finished_study):
    """Five runs, two programs: teacher and students without a teacher have one shape."""
    assert finished_study[1] == {"no_teacher": 1, "teacher": 1}


def test_finished_jobs_are_not_repeated(small_study, finished_study, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in finished_study[0].rglob("summary.json")}
    assert runner.run_study(load_study(small_study[0]), finished_study[0])
    assert "study:" not in capsys.readouterr().err
    assert stamps == {path: path.stat().st_mtime_ns for path in finished_study[0].rglob("summary.json")}
    plan = study_plan.format_plan(load_study(small_study[0]), finished_study[0], costs=False).splitlines()
    assert all(" done " in line for line in plan[1:])


def test_report_has_every_measured_value(finished_study, with_charts):
    page = write_directory_report(finished_study[0])
    collected = study_results.collect_study_results(finished_study[0])
    text = page.with_suffix(".md").read_text().replace("\\", "")  # without escapes
    assert f"{collected.num_jobs} of {collected.num_jobs} runs are finished" in text
    assert "A teacher helps (paper: so it says): " in text
    assert [result.verdict for result in collected.hypothesis_results] != ["not comparable"] * 3
    rows = list(csv.DictReader(page.with_suffix(".csv").open()))
    losses = {
        (r["arm"], r["seed"]): float(r["value"])
        for r in rows
        if r["measure"] == "held_out_loss" and r["step"] == "end"
    }
    for (arm, seed), value in losses.items():
        summary = json.loads((finished_study[0] / "runs" / f"{arm}-seed{seed}" / "summary.json").read_text())
        assert value == pytest.approx(summary["held_out"]["held_out_loss"], rel=1e-9)
    assert len(losses) == 5
    scores = [r for r in rows if r["measure"] == "era"]
    assert len(scores) == 6 * 2  # (2 + 2 + 2 checkpoints) of two seeds of fine-tuning
    results = json.loads(
        (finished_study[0] / "finetuned" / "distilled-seed1-end" / "results.json").read_text()
    )
    scores_of_run = [float(r["value"]) for r in scores if (r["arm"], r["seed"]) == ("distilled", "1")]
    assert scores_of_run == results["tasks"]["era"]["last"]["by_seed"]
    mean = sum(losses["distilled", s] - losses["alone", s] for s in "01") / 2
    interval = study_tables.format_interval(collected.hypothesis_results[0].interval, "held_out_loss")
    assert collected.hypothesis_results[0].interval.mean == pytest.approx(mean, rel=1e-9)
    assert interval in text
    assert "Scores by checkpoint: era" in text
    html = page.read_text()
    assert "<script" not in html
    assert html.count("<svg") >= 4
    points = {point.arm: point for point in study_results.arm_qualities(collected.arms)}
    assert set(points) == {"alone", "distilled"}
    last = [collected.arms["distilled"].runs[seed].evaluations[-1] for seed in (0, 1)]
    cost = sum(point["student_flops"] + point["teacher_flops"] for point in last) / 2
    assert points["distilled"].flops == pytest.approx(cost)
    assert points["distilled"].flops > points["alone"].flops > 0
    assert points["distilled"].scores[1] == pytest.approx(sum(scores_of_run) / 2)
    assert len([r for r in rows if r["measure"] == "loss_elsewhere"]) == 5


def test_report_has_the_accuracies_on_minimal_pairs(finished_study):
    page = write_directory_report(finished_study[0])
    collected = study_results.collect_study_results(finished_study[0])
    by_paradigm = {  # of the file of each job: accuracy of the paradigms by name
        path.parent.parent.name: [
            np.mean(np.sign(np.subtract(row["good"], row["bad"])) / 2 + 0.5)
            for _, row in sorted(json.loads(path.read_text())["scores"].items())
        ]
        for path in finished_study[0].glob("pairs/*/order/scores.json")
    }
    assert sorted(by_paradigm) == [
        *("alone-seed0-end", "alone-seed0-step2", "alone-seed1-end", "alone-seed1-step2"),
        *("distilled-seed0-end", "distilled-seed1-end"),
    ]
    assert {len(accuracies) for accuracies in by_paradigm.values()} == {2}
    rows = [row for row in csv.DictReader(page.with_suffix(".csv").open()) if row["measure"] == "order"]
    for row in rows:
        step = "end" if row["step"] == "end" else f"step{row['step']}"
        name = f"{row['arm']}-seed{row['seed']}-{step}"
        assert float(row["value"]) == pytest.approx(np.mean(by_paradigm.pop(name)))
    assert not by_paradigm
    result = collected.hypothesis_results[2]
    mean = np.mean([float(row["value"]) for row in rows if row["arm"] == "distilled"])
    mean -= np.mean([float(r["value"]) for r in rows if (r["arm"], r["step"]) == ("alone", "end")])
    assert result.interval.mean == pytest.approx(mean)
    assert result.interval.seeds == 2
    flops, accuracies = study_results.mean_score_curve(collected.arms["alone"], "order")
    runs = collected.arms["alone"].runs.values()
    assert flops == [
        pytest.approx(np.mean([total_flops(run.evaluations[i]) for run in runs])) for i in (0, 1)
    ]
    assert flops[0] == pytest.approx(flops[1] / 2)
    assert len(accuracies) == 2
    table = study_tables.arm_results_table(collected)
    column = table.header.index("order (%)")
    cells = [row[column] for row in table.rows]
    assert cells[0] == cells[-1] == "–"  # the teacher was not asked to, and bags of words cannot
    assert cells[1].startswith(f"{100 * accuracies[-1]:.2f} ± ")
    html = page.read_text()
    assert "Minimal pairs (order) against FLOPs" in html
    assert "Scores by checkpoint: order" in html


def test_changed_pairs_are_refused(small_study, finished_study, tmp_path):
    study = load_study(small_study[0])
    more = dataclasses.replace(study, pairs=dataclasses.replace(study.pairs, max_pairs=3))
    with pytest.raises(UserError, match=r"alone-seed0-step2/order: has results of other pairs than .*order "):
        runner.run_study(more, finished_study[0])
    missing = StudyPairs((str(tmp_path / "order"),), max_pairs=2)
    without_file = dataclasses.replace(study, pairs=missing)
    with pytest.raises(UserError, match=r"pairs\.sets: no .*order, expected a folder or a zip archive"):
        runner.run_study(without_file, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert runner.run_study(without_file, finished_study[0])  # nothing is left that would need the file


def test_report_has_the_floor_and_the_guesses_of_masked_words(finished_study):
    workdir = finished_study[0]
    collected = study_results.collect_study_results(workdir)
    floor = json.loads((workdir / "bag_of_words.json").read_text())["era"]
    assert 0.2 < floor["score"] < 0.8  # 64 examples of four classes
    row = study_tables.arm_results_table(collected).rows[-1]
    assert row[0].startswith("no model")
    assert f"{100 * floor['score']:.2f}" in row
    records = json.loads((workdir / "masked_words.json").read_text())["rows"]
    assert len(records) == 3
    page, lines = write_directory_report(workdir), study_report.study_lines(collected)
    for text in (page.read_text(), page.with_suffix(".md").read_text(), "\n".join(lines)):
        for record in records:
            assert record["word"] in text
            for guesses in record["guesses"].values():
                assert len(guesses) == 3
                assert 0 < guesses[0][1] <= 1
                assert study_tables.format_guesses(guesses) in text.replace("\\", "")
    assert set(records[0]["guesses"]) == {"alone", "distilled"}


def test_extra_results_are_those_of_the_study_now(finished_study, tmp_path):
    """An arm that was not asked has no guesses; without the sections their files are not read."""
    workdir = tmp_path / "study"
    shutil.copytree(finished_study[0], workdir)

    def collect(**changes):
        path = workdir / manifest.MANIFEST_NAME
        grid = json.loads(path.read_text())
        grid["grid"] |= changes
        path.write_text(json.dumps(grid))
        return study_results.collect_study_results(workdir)

    other = collect(masked_words={"arms": ["teacher", "alone"], "rows": 3})
    assert [set(row["guesses"]) for row in other.masked_words] == [{"teacher", "alone"}] * 3
    assert "–" in "\n".join(study_report.study_lines(other))
    assert collect(masked_words={"arms": []}).masked_words == []
    assert collect(finetuning={"config": "configs/glue.py", "tasks": ["era"]}).bag_of_words == {}


def test_masked_words_follow_the_settings(small_study, finished_study, tmp_path):
    """They are written again for other arms or another number of rows, and not for the same."""
    workdir, study = tmp_path / "study", load_study(small_study[0])
    shutil.copytree(finished_study[0], workdir)
    path = workdir / "masked_words.json"

    def write(**changes):
        changed = dataclasses.replace(study, masked_words=dataclasses.replace(study.masked_words, **changes))
        before = path.read_bytes()
        extra_results.write_masked_words(changed, study_jobs(changed, workdir), workdir)
        return path.read_bytes() != before, json.loads(path.read_text())["rows"]

    assert not write()[0]
    is_new, rows = write(rows=2)
    assert is_new
    assert len(rows) == 2
    is_new, rows = write(rows=2, arms=("teacher",))
    assert is_new
    assert set(rows[0]["guesses"]) == {"teacher"}


def test_the_report_follows_the_runs(small_study, tmp_path, capsys, monkeypatch):
    """A report is on disk before the next run begins; its path is printed once two runs are finished."""
    run_job, num_started = runner._run_job, 0

    def checked_run_job(*arguments):
        nonlocal num_started
        assert (tmp_path / "study" / "report.html").exists() == bool(num_started)
        num_started += 1
        run_job(*arguments)

    study = load_study(small_study[0])
    study = dataclasses.replace(
        study,
        arms=tuple(
            dataclasses.replace(
                arm, finetune_at=(), pairs_at=(), set=("train.steps=2", "train.tensorboard=False")
            )
            for arm in study.arms[:2]
        ),
        claims=(),
        out_of_domain=OutOfDomain(),
        masked_words=MaskedWords(),
        finetuning=StudyFinetuning(),
    )
    monkeypatch.setattr(runner, "_run_job", checked_run_job)
    run_and_report(study, tmp_path / "study")
    captured = capsys.readouterr()
    messages, lines = captured.err.splitlines(), captured.out.splitlines()
    first = next(i for i, line in enumerate(messages) if "study: report so far in" in line)
    assert any("3 of 3, alone-seed1" in line for line in messages[first:])
    assert lines[-1] == f"report in {tmp_path / 'study' / 'report.html'}"
    assert any(line.startswith("baseline (no teacher)  2") for line in lines)


@pytest.mark.parametrize("when", ["while a run saves its results", "between runs"])
def test_signal_that_comes_late_stops_the_study(small_study, tmp_path, monkeypatch, when):
    """Too late to stop the run: it ends, and no other begins."""
    started = []

    def signalled_job(study, job, *others):
        started.append(job.name)
        if when == "between runs":
            signal.raise_signal(signal.SIGTERM)
        with shutdown.handle_signals() as flag:
            flag.arm()
            signal.raise_signal(signal.SIGTERM)
        started.append("not reached")

    monkeypatch.setattr(runner, "_run_job", signalled_job)
    with pytest.raises(shutdown.Preempted, match=r"stopped between two runs\. Rerun"):
        run_and_report(load_study(small_study[0]), tmp_path / "study")
    assert started == ["teacher-seed0"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_diverging_run_does_not_stop_the_others(small_study, tmp_path, capsys, monkeypatch):
    """Its students are left out too, the report says so, and the same command does not try them again."""
    run_job, started = runner._run_job, []

    def run_or_diverge(study, job, *others):
        started.append(job.name)
        if job.arm == "teacher":
            job.workdir.mkdir(parents=True)
            raise TrainingFailed(f"{job.workdir}: at step 2 the training loss is nan")
        run_job(study, job, *others)

    study = load_study(small_study[0])
    study = dataclasses.replace(
        study,
        arms=tuple(
            dataclasses.replace(arm, finetune_at=(), pairs_at=(), seeds=(0,), set=(*arm.set, "train.steps=2"))
            for arm in study.arms
        ),
        claims=study.claims[:1],
        finetuning=StudyFinetuning(),
    )
    monkeypatch.setattr(runner, "_run_job", run_or_diverge)
    for attempt in range(2):
        started.clear()
        run_and_report(study, tmp_path / "study")
        if attempt == 0:
            assert started == ["teacher-seed0", "alone-seed0", "alone-seed0-elsewhere"]
        else:
            assert started == []
        captured = capsys.readouterr()
        assert "study: teacher-seed0 " in captured.err
        assert "the training loss is nan" in captured.err
        assert "distilled-seed0 is left out: needs teacher-seed0, which failed" in captured.out
    text = (tmp_path / "study" / "report.md").read_text().replace("\\", "")
    assert "2 of 6 runs are finished" in text
    assert "* teacher-seed0 is left out: " in text
    assert "* distilled-seed0-elsewhere is left out: needs distilled-seed0, which failed" in text
    assert study_results.collect_study_results(tmp_path / "study").hypothesis_results[0].interval is None
    plan = study_plan.format_plan(study, tmp_path / "study", costs=False).splitlines()
    assert [" failed " in line for line in plan[1:]] == [True, False, True, True, False, True]
    shutil.rmtree(tmp_path / "study" / "runs" / "teacher-seed0")

    def refuse(study, job, *others):
        raise UserError(f"started {job.name}")

    monkeypatch.setattr(runner, "_run_job", refuse)
    with pytest.raises(UserError, match="started teacher-seed0"):
        runner.run_study(study, tmp_path / "study")


def test_damaged_files_of_a_run_are_left_out_or_written_again(small_study, finished_study, tmp_path, capsys):
    """As a power cut leaves them. The report names what it leaves out; the study runs it again."""
    shutil.copytree(finished_study[0], tmp_path / "part")
    runs = tmp_path / "part" / "runs"
    (runs / "alone-seed0" / "summary.json").write_text("")
    (runs / "alone-seed1" / "run.json").write_text('{"data_')
    text = write_directory_report(tmp_path / "part").with_suffix(".md").read_text().replace("\\", "")
    for name, file in (("alone-seed0", "summary.json"), ("alone-seed1", "run.json")):
        assert f"* {name} is left out: {runs / name / file}: damaged" in text
    collected = study_results.collect_study_results(tmp_path / "part")
    assert collected.num_done == collected.num_jobs - 2
    assert runner.run_study(load_study(small_study[0]), tmp_path / "part")
    summaries = [
        root / "runs" / "alone-seed0" / "summary.json" for root in (finished_study[0], tmp_path / "part")
    ]
    first, second = (json.loads(path.read_text()) for path in summaries)
    assert first["params_digest"] == second["params_digest"]
    assert not study_results.collect_study_results(tmp_path / "part").left_out


def test_unpaired_results_are_not_comparable(finished_study):
    collected = study_results.collect_study_results(finished_study[0])
    treatment, baseline = collected.arms["distilled"], collected.arms["alone"]
    assert study_results.paired_difference(treatment, baseline, "held_out_loss") is not None

    def change(arm, measure, **changes):
        """Return an arm whose documents of a measure are others."""
        measurements = [
            row._replace(documents=row.documents._replace(**changes)) if row.measure == measure else row
            for row in arm.measurements
        ]
        return dataclasses.replace(arm, measurements=measurements)

    other_counts = treatment.at("held_out_loss")[0].documents.predictions + 1
    other = change(treatment, "held_out_loss", predictions=other_counts)
    assert study_results.paired_difference(other, baseline, "held_out_loss") is None
    result = study_results.evaluate_hypothesis(
        collected.study.claims[0], collected.study, {**collected.arms, "distilled": other}
    )
    assert result.verdict == "not comparable"
    assert "or without comparable runs" in study_report.hypothesis_sentence(result, collected)
    changed = dataclasses.replace(collected, arms={**collected.arms, "distilled": other})
    assert study_tables.flops_to_target_table(changed).rows[-1][1:] == ["different held-out text"] * 2
    for measure in ("held_out_loss", "loss_elsewhere"):
        assert study_results.paired_difference(treatment, baseline, measure) is not None
        other = change(treatment, measure, text="another")
        assert study_results.paired_difference(other, baseline, measure) is None
    empty = study_results.ArmResults(treatment.arm, {}, [], {})
    assert study_results.paired_difference(empty, baseline, "era") is None
    assert study_results.mean_evaluations(empty) == []


def test_changed_study_is_refused_and_a_new_task_is_run(small_study, finished_study):
    """A finished run is never reported with another config."""
    before = (finished_study[0] / manifest.MANIFEST_NAME).read_text()
    study = load_study(small_study[0])
    for change, message in (
        ("train.steps=5", "train.steps is 4, expected 5 as in the study"),
        ("optimizer.weight_decay=0.5", "optimizer.weight_decay is 0.01, expected 0.5 as in the study"),
    ):
        arms = (
            study.arms[0],
            dataclasses.replace(study.arms[1], set=(*study.arms[1].set, change)),
            study.arms[2],
        )
        with pytest.raises(UserError, match=message):
            runner.run_study(dataclasses.replace(study, arms=arms), finished_study[0])
    recipe = dataclasses.replace(study.finetuning, set=(*study.finetuning.set, "recipe.epochs=2"))
    with pytest.raises(UserError, match=r"era: recipe\.epochs is 1, expected 2 as in the study"):
        runner.run_study(dataclasses.replace(study, finetuning=recipe), finished_study[0])
    assert (finished_study[0] / manifest.MANIFEST_NAME).read_text() == before
    two_tasks = dataclasses.replace(
        study, finetuning=dataclasses.replace(study.finetuning, tasks=("era", "party"))
    )
    jobs = study_jobs(two_tasks, finished_study[0])
    assert [job.is_done() for job in jobs] == [job.kind != "finetune" for job in jobs]


def test_changed_out_of_domain_text_is_refused(small_study, finished_study):
    study = load_study(small_study[0])
    out_of_domain = dataclasses.replace(study.out_of_domain, set=("data.validation_fraction=0.2",))
    with pytest.raises(UserError, match=r"validation_fraction is 0\.3, expected 0\.2 as in the study"):
        runner.run_study(dataclasses.replace(study, out_of_domain=out_of_domain), finished_study[0])


def test_job_made_from_another_source_is_refused(small_study, finished_study, tmp_path):
    """A teacher by another name or trained again: its path may change, its content may not. The same for
    the run of a fine-tuning."""
    study, workdir = load_study(small_study[0]), tmp_path / "part"
    shutil.copytree(finished_study[0], workdir)
    assert runner.run_study(study, workdir)
    other = dataclasses.replace(study.arms[0], name="other", set=(*study.arms[0].set, "train.steps=2"))
    swapped = (other, study.arms[1], dataclasses.replace(study.arms[2], teacher="other"))
    with pytest.raises(UserError, match="distilled-seed0: was made from another model than that of 'other-"):
        runner.run_study(dataclasses.replace(study, arms=swapped), workdir)
    shutil.rmtree(workdir / "runs" / "teacher-seed0")
    assert runner.run_study(study, workdir)  # the same again
    for name in ("alone-seed0", "alone-seed1"):
        shutil.rmtree(workdir / "runs" / name)
    baseline_arm = dataclasses.replace(study.arms[1], set=(*study.arms[1].set, "optimizer.weight_decay=0.5"))
    edited = dataclasses.replace(study, arms=(study.arms[0], baseline_arm, study.arms[2]))
    with pytest.raises(UserError, match=r"alone-seed0.*: was made from another run of 'alone-seed0'"):
        runner.run_study(edited, workdir)
    for kind in ("elsewhere", "finetuned", "pairs"):
        for path in (workdir / kind).glob("alone-*"):
            shutil.rmtree(path)
    assert runner.run_study(edited, workdir)


def test_a_finished_study_needs_no_weights(small_study, finished_study, tmp_path):
    """Of a published study the weights are gone; the record of the teacher's model still tells it apart."""
    study, workdir = load_study(small_study[0]), tmp_path / "published"
    shutil.copytree(finished_study[0], workdir)
    for name in ("model", "checkpoints"):
        for path in workdir.glob(f"runs/*/{name}"):
            shutil.rmtree(path)
    assert runner.run_study(study, workdir)
    path = workdir / "runs" / "teacher-seed0" / "summary.json"
    recorded = json.loads((workdir / "runs" / "distilled-seed0" / "run.json").read_text())["teacher_digest"]
    assert json.loads(path.read_text())["params_digest"] == recorded
    path.write_text(path.read_text().replace(recorded, "0" * 16))
    with pytest.raises(
        UserError, match="distilled-seed0: was made from another model than that of 'teacher-"
    ):
        runner.run_study(study, workdir)


def test_a_run_without_a_finite_loss_is_in_the_report(finished_study, tmp_path):
    shutil.copytree(finished_study[0], tmp_path / "part")
    for seed in "01":
        run = tmp_path / "part" / "runs" / f"distilled-seed{seed}"
        records = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        lines = [json.dumps({**record, "held_out_loss": None}) + "\n" for record in records]
        (run / "evaluations.jsonl").write_text("".join(lines))
        with np.load(run / "documents.npz") as arrays:
            losses = dict(arrays)
        np.savez(run / "documents.npz", **{**losses, "loss": losses["loss"] * np.nan})
    text = write_directory_report(tmp_path / "part").with_suffix(".md").read_text().replace("\\", "")
    assert "A teacher helps (paper: so it says): undecided at this scale." in text
    assert "nan [nan, nan; t nan, nan]" in text
    assert "| distilled | never, or unknown | never, or unknown |" in text


def test_flops_are_the_mean_over_seeds(finished_study):
    """With alpha_soft.kind=until_matched, FLOPs differ by seed."""
    arm_results = study_results.collect_study_results(finished_study[0]).arms["distilled"]
    first, second = arm_results.runs.values()
    evaluations = [{**record, "teacher_flops": 3 * record["teacher_flops"]} for record in second.evaluations]
    runs = {0: first, 1: dataclasses.replace(second, evaluations=evaluations)}
    flops = [record["student_flops"] + 2 * record["teacher_flops"] for record in first.evaluations]
    means = study_results.mean_evaluations(dataclasses.replace(arm_results, runs=runs))
    assert [total_flops(record) for record in means] == pytest.approx(flops)


def test_a_plan_needs_no_examples(small_study, tmp_path, capsys):
    study = load_study(small_study[0])
    overrides = ("examples.kind=glue", f"examples.path={tmp_path / 'none'}")
    glue = dataclasses.replace(study.finetuning, tasks=("rte",), set=overrides)
    plan = study_plan.format_plan(dataclasses.replace(study, finetuning=glue), tmp_path / "s", costs=True)
    lines = {line.split()[1]: line.split() for line in plan.splitlines()[1:-2]}
    assert lines["alone-seed0-end"][-2:] == ["unknown", "unknown"]
    assert float(lines["alone-seed0"][-2]) > 0
    assert "rte: unknown number of examples: " in capsys.readouterr().err


def test_missing_inputs_are_reported_before_the_first_job(small_study, tmp_path):
    study = load_study(small_study[0])
    overrides = ("examples.kind=glue", f"examples.path={tmp_path / 'none'}")
    glue = dataclasses.replace(study.finetuning, tasks=("rte",), set=overrides)
    files = (*study.out_of_domain.set, f"data.sources.0.path={tmp_path / 'books.txt'}")
    books = dataclasses.replace(study.out_of_domain, set=("data.sources.0.kind=text", *files))
    for other in (
        dataclasses.replace(study, finetuning=glue),
        dataclasses.replace(study, out_of_domain=books),
    ):
        with pytest.raises(UserError, match=str(tmp_path)):
            runner.run_study(other, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_hypothesis_on_a_missing_checkpoint_is_not_comparable(small_study, finished_study, tmp_path):
    """Another checkpoint does not replace it."""
    shutil.copytree(finished_study[0], tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "finetuned" / "distilled-seed0-end")
    shutil.rmtree(tmp_path / "part" / "finetuned" / "distilled-seed1-end")
    collected = study_results.collect_study_results(tmp_path / "part")
    assert [result.interval is None for result in collected.hypothesis_results] == [False, True, False]
    shutil.rmtree(tmp_path / "part" / "runs" / "distilled-seed1")
    collected = study_results.collect_study_results(tmp_path / "part")
    assert "(1 of the seeds)" in report_markdown(study_report.study_report(collected))


def test_rate_ignores_interruptions(small_study, finished_study, tmp_path):
    """It is the median rate of the steps, not that of the last process."""
    shutil.copytree(finished_study[0], tmp_path / "part")
    path = tmp_path / "part" / "runs" / "distilled-seed0" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "seconds_of_this_process": 1e-9}))
    lines = [
        study_plan.format_plan(load_study(small_study[0]), workdir, costs=True).splitlines()[1]
        for workdir in (finished_study[0], tmp_path / "part")
    ]
    assert lines[0] == lines[1]


def test_the_report_needs_no_config_file(finished_study, tmp_path, monkeypatch):
    shutil.copytree(finished_study[0], tmp_path / "moved")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    page = write_directory_report(tmp_path / "moved")
    assert (
        page.with_suffix(".csv").read_text()
        == write_directory_report(finished_study[0]).with_suffix(".csv").read_text()
    )


def test_single_job_by_index(small_study, tmp_path, capsys):
    study = load_study(small_study[0])
    jobs = study_jobs(study, tmp_path / "s")
    index_of = {job.name: i for i, job in enumerate(jobs)}
    with pytest.raises(
        UserError, match=r"--index is 2, distilled-seed0: expected teacher-seed0 to be finished first"
    ):
        runner.run_study(study, tmp_path / "s", index_of["distilled-seed0"])
    with pytest.raises(UserError, match="--index is 99, expected from 0 to"):
        runner.run_study(study, tmp_path / "s", 99)
    assert not runner.run_study(study, tmp_path / "s", index_of["teacher-seed0"])
    assert [job.name for job in jobs if job.is_done()] == ["teacher-seed0"]


def test_dry_run_estimates_costs(small_study, finished_study, tmp_path):
    completed = dwt("study", f"--config={small_study[0]}", f"--workdir={tmp_path / 'new'}", "--dry-run")
    assert completed.returncode == 0, completed.stderr
    assert "assuming 40% of peak FLOP/s" in completed.stderr
    assert "remaining: estimate" in completed.stdout
    assert not (tmp_path / "new").exists()
    plan = study_plan.format_plan(load_study(small_study[0]), finished_study[0], costs=True)
    plan = plan.splitlines()[1:-2]
    lines = {line.split()[1]: line for line in plan}
    flops = json.loads((finished_study[0] / "runs" / "distilled-seed0" / "summary.json").read_text())[
        "flops"
    ]["total"]
    # Not equal: until the data is prepared, the requested vocabulary size is used.
    assert float(lines["distilled-seed0"].split()[4]) == pytest.approx(flops, rel=0.1)


@pytest.mark.slow
def test_killed_anywhere_the_report_is_the_same(small_study, finished_study, tmp_path):
    """kill -9 four times, also during fine-tuning and scoring of pairs; then the command runs to the end."""
    expected = write_directory_report(finished_study[0]).with_suffix(".csv").read_text()
    workdir = tmp_path / "killed"
    command = ("study", f"--config={small_study[0]}", f"--workdir={workdir}")
    for pattern in (
        "runs/alone-seed0/checkpoints",
        "runs/distilled-seed0/metrics.jsonl",
        "finetuned/*/era/config.json",
        "pairs/*/order/config.json",
    ):
        process = start(*command)
        deadline = time.time() + 240
        while not list(workdir.glob(pattern)) and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    completed = dwt(*command)
    assert completed.returncode == 0, completed.stderr
    assert (workdir / "report.csv").read_text() == expected
    shutil.rmtree(workdir)


def test_flops_per_second_counts_tokens_as_the_log_does(tmp_path):
    """10 steps of 4 rows with 50 tokens and padding, at 100 tokens/s: 20 s."""
    config = Config(train=Train(batch_size=4), data=Data(sequence_length=64))
    job = SimpleNamespace(kind="train", is_done=lambda: True, workdir=tmp_path, config=config)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "tokens_per_second": 100}) + "\n")
    summary = {"steps": 10, "flops": {"total": 1e9}, "data": {"tokens_per_row": 50}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert study_plan._flops_per_second([job]) == pytest.approx(1e9 / 20)


def test_flops_per_second_counts_the_rows_of_a_batch_ramp(tmp_path):
    """5 steps of 2 rows and 5 of 4, with 50 tokens, at 100 tokens/s: 15 s."""
    train = Train(
        epochs=1, batch_size=4, batch_ramp=(2,), batch_ramp_fraction=0.5
    )  # the summary has the steps
    job = SimpleNamespace(kind="train", is_done=lambda: True, workdir=tmp_path, config=Config(train=train))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "tokens_per_second": 100}) + "\n")
    summary = {"steps": 10, "flops": {"total": 1e9}, "data": {"tokens_per_row": 50}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert study_plan._flops_per_second([job]) == pytest.approx(1e9 / 15)


def test_estimated_flops_are_the_sum_over_steps_of_a_batch_ramp():
    model = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    train = Train(steps=10, batch_size=8, batch_ramp=(2, 4), batch_ramp_fraction=0.6)
    config = Config(model=model, train=train, optimizer=Optimizer(kind="muon"))
    expected = sum(
        flops.training_step_flops(model, rows, 128, 19) + optimizer_flops(config.optimizer, model)
        for rows in [2] * 3 + [4] * 3 + [8] * 4
    )
    assert study_plan._training_flops(SimpleNamespace(config=config, needs=()), {}) == expected
