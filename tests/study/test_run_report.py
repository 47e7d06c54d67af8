"""The report on runs, with synthetic run directories."""

import csv
import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from dwt_jax.cli.report import write_directory_report
from dwt_jax.config import Config, Distill, Mlm, Schedule, Teacher, Train
from dwt_jax.config_loader import config_to_dict
from dwt_jax.errors import UserError
from dwt_jax.eval.paired import paired_error
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.llama import Config as LlamaConfig
from dwt_jax.study import curves, descriptions, run_comparison
from helpers.html_page import Page

STEPS, EVERY = 1000, 100
STUDENT, TEACHER_FORWARD = 2.4e10, 1.9e9  # FLOPs a step
DECAY = Schedule("linear", 4.0, 1.0)


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path, monkeypatch):
    """Teachers' paths are relative; they must not lead to a demo in the project's directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def config_of(
    seed: int = 0, teacher: str = "", alpha_soft: Schedule = Schedule(), layers: int = 4, **more
) -> Config:
    return Config(
        seed=seed,
        model=BertConfig(vocab_size=4096, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4),
        teacher=Teacher(teacher),
        distill=Distill(alpha_soft=alpha_soft) if teacher else Distill(),
        train=Train(steps=more.pop("steps", STEPS), eval_every=EVERY),
        **more,
    )


def write_run(path: Path, config: Config, losses: list[float], documents=None, digest: str = "d1") -> Path:
    """Write a finished run with held-out `losses` at equal intervals."""
    path.mkdir(parents=True)
    steps, is_distilled = config.train.steps, bool(config.teacher.path)
    student, teacher = STUDENT * config.model.num_hidden_layers / 4, TEACHER_FORWARD * is_distilled

    def ledger(step: int) -> dict:
        return {"student_flops": step * student, "teacher_flops": step * teacher}

    eval_steps = [round(steps * (i + 1) / len(losses)) for i in range(len(losses))]
    evaluations = [
        {
            "step": step,
            "held_out_loss": loss,
            "standard_error": 0.0213,
            "perplexity": math.exp(loss),
            "top1_accuracy": 0.1234,
            "top5_accuracy": 0.2345,
            "predictions": 5000,
            "documents": 40,
            **ledger(step),
        }
        for step, loss in zip(eval_steps, losses, strict=True)
    ]
    noise = np.random.default_rng(len(path.name))
    metrics = []
    for step in range(50, steps + 1, 50):
        share = step / steps
        soft = config.distill.alpha_soft
        weight = soft.value + (soft.end - soft.value) * share if soft.kind == "linear" else soft.value
        hard = float(np.interp(step, [0, *eval_steps], [8.3, *losses]) + noise.normal(0, 0.05))
        metrics.append(
            {
                "step": step,
                "hard_loss": hard,
                "soft_loss_at_1": 1.2 - 0.5 * share if is_distilled else 0.0,
                "teacher_hard_loss": 6.0 if is_distilled else 0.0,
                "alpha_soft": weight if is_distilled else 0.0,
                "tokens_per_second": 40000.0 + step,
                **ledger(step),
            }
        )
    (path / "config.json").write_text(json.dumps(config_to_dict(config)))
    (path / "run.json").write_text(
        json.dumps({"data_digest": digest, "teacher_digest": "t" if is_distilled else ""})
    )
    for name, records in (("metrics", metrics), ("evaluations", evaluations)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if documents is not None:
        np.savez(path / "documents.npz", loss=documents[0], count=documents[1])
    summary = {
        "steps": steps,
        "held_out": evaluations[-1],
        "skipped_updates": 3,
        "seconds_of_this_process": 61.5,
        "flops": {
            "student": steps * student,
            "teacher_forward": steps * teacher,
            "total": steps * (student + teacher),
            "teacher_training": 6e12 if is_distilled else 0.0,
        },
        "teacher_steps": steps * is_distilled,
        "versions": {"dwt_jax": "0.1.0", "jax": "0.10.2"},
        "device": "1 x cpu",
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def curve(last: float, speed: float = 3.0, points: int = 10) -> list[float]:
    """Return a falling loss that ends at `last`."""
    x = np.arange(1, points + 1) / points
    return [float(v) for v in last + 2.3 * (np.exp(-speed * x) - math.exp(-speed))]


def documents(loss: float, seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Per-document sums whose mean is about `loss`; hard documents are hard for every model."""
    shared, noise_rng = np.random.default_rng(0), np.random.default_rng(seed)
    n = shared.integers(20, 300, count).astype(float)
    hardness = shared.normal(0, 0.5, count)
    return (loss + hardness + noise_rng.normal(0, 0.03, count)) * n, n


RUNS = {
    "alone": (config_of(), curve(5.60)),
    "alone-seed1": (config_of(seed=1), curve(5.612)),
    "normal": (config_of(teacher="demo/teacher"), curve(5.55, 3.4)),
    "strong": (config_of(teacher="demo/teacher", alpha_soft=Schedule(value=4.0)), curve(5.64, 4.4)),
    "decay": (config_of(teacher="demo/teacher", alpha_soft=DECAY), curve(5.594, 4.2)),
}
LABELS = {
    "teacher": "weak teacher",
    "alone": "baseline (no teacher)",
    "alone-seed1": "baseline (no teacher), seed 1",
    "normal": "weak teacher, 1 : 1",
    "strong": "weak teacher, 1 : 4",
    "decay": "weak teacher, 1 : 4 falling to 1 : 1",
}


def make_study(workdir: Path, plan: bool = True) -> Path:
    teacher = config_of(layers=1)
    write_run(workdir / "teacher", teacher, curve(6.05), documents(6.05, 9))
    for seed, (name, (config, losses)) in enumerate(RUNS.items()):
        write_run(workdir / name, config, losses, documents(losses[-1], seed + 1))
    if plan:
        write_plan(workdir)
    return workdir


def write_plan(workdir: Path, **changes) -> None:
    plan = {
        "title": "A weak teacher on the State of the Union",
        "teacher": "teacher",
        "baseline": "alone",
        "noise_pair": ["alone", "alone-seed1"],
        "runs": [
            {"name": name, "label": label, "role": "teacher" if name == "teacher" else "student"}
            for name, label in LABELS.items()
        ],
        "command": "dwt demo --workdir=demo",
        "seconds": 372.0,
    }
    (workdir / "study.json").write_text(json.dumps({**plan, **changes}))


def rows_of(path: Path) -> dict[str, dict[str, float]]:
    """Return the measures at the end by run."""
    rows: dict[str, dict[str, float]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["step"] == "end":
                rows.setdefault(row["arm"], {})[row["measure"]] = float(row["value"])
    return rows


def comparisons_of(workdir: Path) -> dict[str, run_comparison.BaselineComparison]:
    return {
        comparison.run.name: comparison for comparison in run_comparison.collect_runs(workdir).comparisons
    }


def test_numbers_equal_the_files(tmp_path):
    path = write_directory_report(make_study(tmp_path))
    assert path == tmp_path / "report.html"
    results = {row[0]: row for row in Page(path.read_text()).tables[0][1:]}
    rows = rows_of(tmp_path / "report.csv")
    assert set(rows) == set(LABELS)
    for name, label in LABELS.items():
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        loss = summary["held_out"]["held_out_loss"]
        assert results[label][5] == f"{loss:.4f} ± 0.0213"
        assert results[label][8] == f"{math.exp(loss):,.2f}"
        assert results[label][9:11] == ["12.34 %", "23.45 %"]
        assert rows[name]["held_out_loss"] == loss
        assert rows[name]["total_flops"] == summary["flops"]["total"]
        assert rows[name]["seconds"] == 61.5
        assert rows[name]["skipped_updates"] == 3
    assert results[LABELS["decay"]][3] == "hard 1; soft 4 → 1 linear"
    assert rows["normal"]["relative_cost"] == pytest.approx((STUDENT + TEACHER_FORWARD) / STUDENT)
    assert rows["normal"]["tokens_per_second"] == 40525
    costs = {row[0]: row for row in Page(path.read_text()).tables[1][1:]}
    assert costs[LABELS["normal"]][1:8] == ["24.00", "1.90", "25.90", "108 %", "6.00", "31.90", "133 %"]


def test_the_tidy_table_has_the_curves(tmp_path):
    write_directory_report(make_study(tmp_path))
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["arm", "seed", "step", "measure", "finetuning_seed", "value"]
    losses = {(row[0], row[2]): float(row[5]) for row in rows if row[3] == "held_out_loss"}
    assert [losses["normal", str(step)] for step in range(100, 1000, 100)] == RUNS["normal"][1][:-1]
    assert losses["normal", "end"] == RUNS["normal"][1][-1]
    assert ["normal", "0", "500", "total_flops", "", repr(500 * (STUDENT + TEACHER_FORWARD))] in rows
    assert {row[1] for row in rows if row[0] == "alone-seed1"} == {"1"}


def test_markdown_csv_and_html_agree(tmp_path):
    write_directory_report(make_study(tmp_path))
    markdown = (tmp_path / "report.md").read_text()
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    results = Page((tmp_path / "report.html").read_text().replace("\xa0", " ")).tables[0]
    assert cells[0] == results[0]
    assert cells[2 : 2 + len(RUNS) + 1] == results[1:]
    for name, row in rows_of(tmp_path / "report.csv").items():
        difference = next(line for line in results if line[0] == LABELS[name])[6]
        expected = f"{row['difference']:+.4f} ± " if "difference" in row else "–"
        assert difference.startswith(expected.replace("-", "−"))


@pytest.mark.parametrize("key", ["bits_per_byte", "loss_per_byte"])
def test_losses_per_byte_are_a_column_where_a_run_has_them(tmp_path, key):
    """A run that was evaluated by an earlier version has none."""
    make_study(tmp_path)
    name = key.replace("_", " ")
    assert name not in Page(write_directory_report(tmp_path).read_text()).tables[0][0]
    for run, value in (("alone", 1.23456), ("decay", None)):  # not finite
        path = tmp_path / run / "summary.json"
        summary = json.loads(path.read_text())
        summary["held_out"][key] = value
        path.write_text(json.dumps(summary))
    header, *rows = Page(write_directory_report(tmp_path).read_text()).tables[0]
    column = {row[0]: row[header.index(name)] for row in rows}
    assert column == dict.fromkeys(LABELS.values(), "–") | {LABELS["alone"]: "1.2346"}
    in_csv = {name: row[key] for name, row in rows_of(tmp_path / "report.csv").items() if key in row}
    assert in_csv == {"alone": 1.23456}


def test_helped_harmed_undecided(tmp_path):
    comparisons = comparisons_of(make_study(tmp_path))
    assert {name: c.verdict for name, c in comparisons.items()} == {
        "normal": "helped",
        "strong": "harmed",
        "decay": "undecided",
    }
    assert comparisons["normal"].difference == pytest.approx(-0.05)
    assert run_comparison.collect_runs(tmp_path).noise.value == pytest.approx(0.012)
    page = write_directory_report(tmp_path).read_text()
    assert "Of 3 students with a teacher: 1 helped, 1 harmed, 1 undecided." in page
    assert "This is from two seeds, a rough estimate" in page


def test_largest_seed_noise_counts(tmp_path):
    make_study(tmp_path, plan=False)
    write_run(tmp_path / "normal-seed1", config_of(seed=1, teacher="demo/teacher"), curve(5.581))
    noise = run_comparison.collect_runs(tmp_path).noise
    assert noise.value == pytest.approx(0.031)
    assert {run.name for run in noise.runs} == {"normal", "normal-seed1"}


@pytest.mark.parametrize("scatter", [0, 1])
def test_undecided_within_two_standard_errors_though_beyond_the_noise(tmp_path, scatter):
    write_run(tmp_path / "alone", config_of(), curve(5.6), documents(5.6, 1))
    write_run(tmp_path / "alone-again", config_of(seed=1), curve(5.601))
    loss, count = documents(5.59, 2)
    scattered = loss + count * np.random.default_rng(3).normal(0, scatter, len(count))
    write_run(tmp_path / "distilled", config_of(teacher="other/teacher"), curve(5.59), (scattered, count))
    comparison = comparisons_of(tmp_path)["distilled"]
    assert abs(comparison.difference) < 2 * comparison.error
    assert (abs(comparison.difference) > comparison.error) == (scatter == 0)  # both sides of one error
    assert comparison.verdict == "undecided"
    (tmp_path / "distilled" / "documents.npz").unlink()
    assert comparisons_of(tmp_path)["distilled"].verdict == "helped"


def test_without_seeds_nothing_is_decided(tmp_path):
    write_run(tmp_path / "alone", config_of(), curve(5.6))
    write_run(tmp_path / "distilled", config_of(teacher="other/teacher"), curve(5.0))
    assert comparisons_of(tmp_path)["distilled"].verdict == "undecided"
    assert run_comparison.collect_runs(tmp_path).noise is None


def test_a_planned_pair_that_differs_in_more_than_the_seed_is_no_noise(tmp_path):
    make_study(tmp_path)
    write_plan(tmp_path, noise_pair=["alone", "normal"])
    assert run_comparison.collect_runs(tmp_path).noise is None


@pytest.mark.parametrize(
    "other",
    [
        {"config": config_of(teacher="t", steps=500)},
        {"config": config_of(teacher="t", layers=2)},
        {"config": config_of(teacher="t"), "digest": "d2"},
    ],
    ids=["steps", "model", "data"],
)
def test_runs_of_different_models_or_data_are_not_comparable(tmp_path, other):
    write_run(tmp_path / "alone", config_of(), curve(5.6))
    write_run(tmp_path / "alone-again", config_of(seed=1), curve(5.601))
    write_run(tmp_path / "distilled", losses=curve(5.0), **other)
    comparison = comparisons_of(tmp_path)["distilled"]
    assert comparison.verdict == "not comparable"
    assert "cannot be compared" in write_directory_report(tmp_path).read_text()


def test_other_differences_are_stated(tmp_path):
    write_run(tmp_path / "alone", config_of(), curve(5.6))
    config = config_of(teacher="t")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sentence_stride=4))
    write_run(tmp_path / "distilled", config, curve(5.5))
    assert comparisons_of(tmp_path)["distilled"].differing_keys == ("data.sentence_stride",)
    assert "Settings that differ: data.sentence_stride." in write_directory_report(tmp_path).read_text()


def test_paired_error_equals_the_bootstrap():
    rng = np.random.default_rng(5)
    a, b = documents(5.5, 11, 400), documents(5.6, 12, 400)
    draws = rng.integers(0, 400, (4000, 400))
    means = [loss[draws].sum(1) / count[draws].sum(1) for loss, count in (a, b)]
    error = paired_error(a, b)
    assert error == pytest.approx(np.std(means[0] - means[1]), rel=0.05)
    unpaired = math.hypot(np.std(means[0]), np.std(means[1]))
    assert error < unpaired / 5  # hard documents are hard for both


def test_paired_error_by_hand():
    """Three documents of equal length: the ordinary paired standard error of the means."""
    count = np.full(3, 10.0)
    a, b = np.array([50.0, 60.0, 70.0]), np.array([51.0, 63.0, 69.0])  # differences -.1, -.3, +.1 a token
    assert paired_error((a, count), (b, count)) == pytest.approx(0.2 / math.sqrt(3))
    assert paired_error((a, count), (b, np.array([10.0, 10.0, 11.0]))) is None
    assert paired_error((a[:1], count[:1]), (b[:1], count[:1])) is None
    assert paired_error(None, (b, count)) is None


def records(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [
        {"step": s, "held_out_loss": y, "student_flops": 10 * s, "teacher_flops": 2 * s} for s, y in points
    ]


def test_steps_to_reach():
    falling = records((100, 7.0), (200, 6.0), (300, 5.5))
    assert curves.steps_to_target(falling, 6.25) == (175, 175 * 12, False)
    assert curves.steps_to_target(falling, 5.5) == (300, 3600, False)
    assert curves.steps_to_target(falling, 7.5) == (100, 1200, True)
    assert curves.steps_to_target(falling, 5.4) is None
    assert curves.steps_to_target([], 5.4) is None
    rising = records((100, 6.0), (200, 5.0), (300, 5.6), (400, 4.9))  # the first time counts
    assert curves.steps_to_target(rising, 5.5).steps == 150


def test_reach_is_charged_with_the_teacher(tmp_path):
    write_directory_report(make_study(tmp_path))
    row = rows_of(tmp_path / "report.csv")["normal"]
    x, y = np.arange(1, 11) * 100.0, np.array(RUNS["normal"][1])
    steps = np.interp(-5.6, -y, x)
    assert row["steps_to_reach_alone"] == pytest.approx(steps)
    assert row["flops_to_reach_alone"] == pytest.approx(steps * (STUDENT + TEACHER_FORWARD))
    assert row["with_teacher_training"] == pytest.approx(steps * (STUDENT + TEACHER_FORWARD) + 6e12)
    assert "steps_to_reach_alone" not in rows_of(tmp_path / "report.csv")["strong"]
    assert "It never reached the final loss of the baseline." in (tmp_path / "report.html").read_text()


def test_unknown_training_cost_of_the_teacher(tmp_path):
    make_study(tmp_path)
    summary = json.loads((tmp_path / "normal" / "summary.json").read_text())
    summary["flops"]["teacher_training"] = None
    (tmp_path / "normal" / "summary.json").write_text(json.dumps(summary))
    assert "the cost of training the teacher is unknown" in write_directory_report(tmp_path).read_text()
    assert "with_teacher_training" not in rows_of(tmp_path / "report.csv")["normal"]


def test_report_has_the_fine_tunings_of_its_runs(tmp_path):
    """In the order of the runs, without those of unknown runs; no section without fine-tunings."""
    study = make_study(tmp_path)
    assert "Fine-tuning" not in write_directory_report(study).read_text()
    scores = {"normal": [0.5, 0.6], "teacher": [0.25], "stranger": [0.9]}
    for name, by_seed in scores.items():
        deviation = statistics.stdev(by_seed) if len(by_seed) > 1 else None
        last = {"mean": statistics.mean(by_seed), "standard_deviation": deviation, "by_seed": by_seed}
        best = {**last, "mean": last["mean"] + 0.1}
        folder = tmp_path / run_comparison.DOWNSTREAM_DIR / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"tasks": {"era": {"last": last, "best": best}}}))
    page = write_directory_report(study).read_text()
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.split("## Fine-tuning")[1].splitlines() if "| era |" in line]
    assert rows == [
        f"| {LABELS['teacher']} | era | 25.00 | 35.00 | 1 |",
        f"| {LABELS['normal']} | era | 55.00 ± 7.07 | 65.00 ± 7.07 | 2 |",
    ]
    assert "55.00 ± 7.07" in page
    assert "90.00" not in page


def test_resolved_compute_dtype_is_compared(tmp_path):
    make_study(tmp_path)
    path = tmp_path / "normal" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "compute": "bfloat16"}))
    [comparison] = [
        comparison
        for comparison in run_comparison.collect_runs(tmp_path).comparisons
        if comparison.run.name == "normal"
    ]
    assert comparison.differing_keys == ("computed in",)
    text = write_directory_report(tmp_path).with_suffix(".md").read_text()
    assert "| compute type | differs | computed in = " in text
    assert f"bfloat16 ({LABELS['normal']})" in text


@pytest.mark.parametrize(("attention", "keys"), [("reference", ()), ("cudnn", ("run.attention",))])
def test_resolved_attention_is_compared(tmp_path, attention, keys):
    """With runs of an earlier version, which had the reference alone and no record of it."""
    make_study(tmp_path)
    path = tmp_path / "normal" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": attention}))
    path = tmp_path / "normal" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "precision": {**config["precision"], "attention": attention}}))
    comparisons = run_comparison.collect_runs(tmp_path).comparisons
    [comparison] = [comparison for comparison in comparisons if comparison.run.name == "normal"]
    assert comparison.differing_keys == keys


def test_roles_without_a_plan(tmp_path):
    study = run_comparison.collect_runs(make_study(tmp_path / "demo", plan=False))
    assert {run.name: run.role for run in study.runs if run.role == "teacher"} == {"teacher": "teacher"}
    assert study.baseline.name == "alone"
    assert {run.name for run in study.noise.runs} == {"alone", "alone-seed1"}
    assert {run.teacher for run in study.runs if run.is_distilled} == {"teacher"}
    assert {c.run.name: c.verdict for c in study.comparisons}["normal"] == "helped"
    assert study.title == "Runs in demo"


def test_runs_one_level_further_down(tmp_path):
    write_run(tmp_path / "grid" / "a", config_of(), curve(5.6))
    write_run(tmp_path / "grid" / "b", config_of(teacher="runs/grid/a"), curve(5.5))
    (tmp_path / "grid" / "a" / "model").mkdir()
    (tmp_path / "grid" / "a" / "model" / "config.json").write_text("{}")
    study = run_comparison.collect_runs(tmp_path)
    assert [run.name for run in study.runs] == ["grid/a", "grid/b"]
    assert study.runs[0].role == "teacher"


def test_runs_of_a_version_with_a_number_for_the_masking_rate_are_comparable(tmp_path):
    make_study(tmp_path)
    for name in ("alone", "teacher"):
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["mlm"]["probability"] = config["mlm"]["probability"]["value"]
        del config["optimizer"]["learning_rate"]["decay_type"]
        path.write_text(json.dumps(config))
    (comparison,) = (c for c in run_comparison.collect_runs(tmp_path).comparisons if c.run.name == "normal")
    assert comparison.verdict == "helped"
    assert not comparison.differing_keys
    assert "15 % of the tokens" in write_directory_report(tmp_path).read_text()


def test_masking_schedules_are_described(tmp_path):
    falling = Mlm(Schedule("linear", 0.4, 0.15))
    write_run(tmp_path / "a", config_of(mlm=falling), curve(5.6))
    write_run(tmp_path / "b", config_of(teacher="runs/t", mlm=falling), curve(5.5))
    assert "0.4 → 0.15 linear, as a share of the tokens" in write_directory_report(tmp_path).read_text()


def test_no_masks_are_claimed_of_models_of_next_tokens(tmp_path):
    config = dataclasses.replace(config_of(), model=LlamaConfig(vocab_size=4096))
    write_run(tmp_path / "a", config, curve(5.6))
    page = write_directory_report(tmp_path)
    assert "| masks | equal | none, each next token is predicted |" in page.with_suffix(".md").read_text()
    assert "masked" not in page.read_text()


def test_batch_ramps_are_described(tmp_path):
    """A version without ramps has none, and the other names of its keys do not matter."""
    config = config_of()
    train = dataclasses.replace(config.train, batch_size=16, batch_ramp=(4, 8), batch_ramp_fraction=0.3)
    run = write_run(tmp_path / "a", dataclasses.replace(config, train=train), curve(5.6))
    path = write_directory_report(tmp_path).with_suffix(".md")
    assert "| equal | 4 rows to step 150, 8 rows to step 300, then 16 rows |" in path.read_text()
    older = json.loads((run / "config.json").read_text())
    older["train"] = {"steps": STEPS, "batch_size": 16, "accumulate": 1}
    (run / "config.json").write_text(json.dumps(older))
    write_directory_report(tmp_path)
    assert "| rows a step | equal | 16 rows |" in path.read_text()


def test_unfinished_runs_are_listed(tmp_path):
    make_study(tmp_path)
    (tmp_path / "decay" / "summary.json").unlink()
    plan = json.loads((tmp_path / "study.json").read_text())
    write_plan(tmp_path, runs=[*plan["runs"], {"name": "planned", "label": "planned", "role": "student"}])
    study = run_comparison.collect_runs(tmp_path)
    assert study.unfinished == (("decay", 1000), ("planned", 0))
    page = write_directory_report(tmp_path).read_text()
    assert "decay (step 1,000); planned (no step logged)" in page
    assert "decay" not in rows_of(tmp_path / "report.csv")


@pytest.mark.parametrize(
    "name", ["config.json", "run.json", "summary.json", "documents.npz", "evaluations.jsonl"]
)
@pytest.mark.parametrize("content", ["", '{"steps": 10', "\0\0\0\0", "PK\3\4"])
def test_a_damaged_run_is_left_out_and_named(tmp_path, capsys, name, content):
    """An empty evaluations.jsonl or one cut short has fewer records, which is no damage."""
    make_study(tmp_path)
    (tmp_path / "decay" / name).write_text(content)
    page = write_directory_report(tmp_path).read_text()
    is_left_out = name != "evaluations.jsonl"
    assert ("decay" not in rows_of(tmp_path / "report.csv")) == is_left_out
    if is_left_out:
        assert f"decay is left out of the report: {tmp_path}/decay/{name}: " in capsys.readouterr().err
        assert f"decay ({tmp_path}/decay/{name}: " in page


def test_no_finished_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        write_directory_report(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        write_directory_report(tmp_path / "nowhere")
    run = write_run(tmp_path / "runs" / "a", config_of(), curve(5.6))
    with pytest.raises(UserError, match="is itself a run"):
        write_directory_report(run)
    with pytest.raises(UserError, match=r"ends in \.html"):
        write_directory_report(tmp_path / "runs", tmp_path / "report.md")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="no finished run"):
        write_directory_report(tmp_path / "runs")


def test_missing_files(tmp_path):
    """A run that is only its config and its summary can be reported."""
    make_study(tmp_path)
    for name in LABELS:
        for file in ("metrics.jsonl", "evaluations.jsonl", "documents.npz", "run.json"):
            (tmp_path / name / file).unlink()
    page = Page(write_directory_report(tmp_path).read_text())
    assert len(page.tables[0]) == len(LABELS) + 1
    study = run_comparison.collect_runs(tmp_path)
    assert all(len(run.evaluations) == 1 for run in study.runs)
    assert comparisons_of(tmp_path)["normal"].reach.is_upper_bound


def test_out_may_be_a_file_or_a_directory(tmp_path, with_charts):
    make_study(tmp_path / "runs")
    path = write_directory_report(tmp_path / "runs", tmp_path / "paper" / "first.html")
    names = ["first-charts", "first.csv", "first.html", "first.md"]
    assert sorted(p.name for p in path.parent.iterdir()) == names
    (tmp_path / "out").mkdir()
    assert write_directory_report(tmp_path / "runs", tmp_path / "out") == tmp_path / "out" / "report.html"


def test_names_are_text_and_nothing_else(tmp_path, with_charts):
    evil = "<script>alert(1)</script>\"'&|`x`"
    make_study(tmp_path)
    plan = json.loads((tmp_path / "study.json").read_text())
    runs = [{**run, "label": run["name"] + evil} for run in plan["runs"]]
    write_plan(tmp_path, runs=runs, title=evil, command=evil)
    path = write_directory_report(tmp_path)
    page = Page(path.read_text())
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert any(evil in text for text in page.texts)
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[: len(LABELS) + 2]}) == 1


def test_html_has_no_external_resources(tmp_path, with_charts):
    text = write_directory_report(make_study(tmp_path)).read_text()
    page = Page(text)
    assert "://" not in text
    assert not {name for name, _ in page.attributes} & {"src", "srcset"}
    # Of a chart: markers and the clipped rectangle.
    references = [value for name, value in page.attributes if name == "href"] + re.findall(
        r"url\((.*?)\)", text
    )
    ids = {f"#{value}" for name, value in page.attributes if name == "id"}
    assert references
    assert set(references) <= ids
    assert "@import" not in text
    assert "nan" not in re.sub(r"<[^>]*style.*?</style>", "", text.lower(), flags=re.S).split("<details>")[0]
    assert page.tags.count("figure") == 6
    for name in RUNS:
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert any(
            text_node.strip().startswith("{") and json.loads(text_node) == config for text_node in page.texts
        )


def test_run_with_non_finite_loss_is_not_comparable(tmp_path):
    make_study(tmp_path)

    def spoil(name):  # not finite is null in the files
        path = tmp_path / name / "summary.json"
        summary = json.loads(path.read_text())
        summary["held_out"] |= dict.fromkeys(("held_out_loss", "standard_error", "perplexity"))
        path.write_text(json.dumps(summary))
        comparisons = run_comparison.collect_runs(tmp_path)
        assert "nan" not in write_directory_report(tmp_path).with_suffix(".md").read_text()
        return {comparison.run.name: comparison for comparison in comparisons.comparisons}, comparisons.noise

    comparisons, noise = spoil("normal")
    assert noise is not None
    assert (comparisons["normal"].verdict, comparisons["strong"].verdict) == ("not comparable", "harmed")
    assert comparisons["normal"].reason == "a loss is not finite"
    comparisons, noise = spoil("alone-seed1")
    assert noise is None
    assert comparisons["strong"].verdict == "undecided"


def test_non_finite_losses_are_not_drawn(tmp_path, with_charts):
    make_study(tmp_path)
    path = tmp_path / "normal" / "evaluations.jsonl"
    path.write_text(re.sub(r'"held_out_loss": [\d.]+', '"held_out_loss": null', path.read_text(), count=1))
    page = Page(write_directory_report(tmp_path).read_text())
    assert "nan" not in " ".join(value or "" for _, value in page.attributes)


@pytest.mark.parametrize(
    ("model_type", "description"),
    [
        ("llama", "none, each next token is predicted"),
        ("eurobert", "40 % of the tokens"),
        ("bert", "40 % of the tokens"),
    ],
)
def test_masks_are_those_of_the_model_type(model_type, description):
    probability = dataclasses.asdict(Schedule(value=0.4))
    config = {"model": {"model_type": model_type}, "mlm": {"probability": probability}}
    assert descriptions.describe_masks(config) == description


@pytest.mark.parametrize(
    ("schedule", "description"),
    [
        (Schedule(value=4.0), "4"),
        (DECAY, "4 → 1 linear"),
        (Schedule("linear", 1.0, 0.0, decay_end=0.25), "1 → 0 linear to 25 %"),
        (Schedule("cosine", 2.0, 0.5, decay_start=0.1, decay_end=0.8), "2 → 0.5 cosine from 10 % to 80 %"),
        (Schedule("linear", 5e-4, warmup_fraction=0.05), "0.0005 → 0 linear, warm-up 5 %"),
        (Schedule("piecewise", 4.0, 1.0, decay_start=0.5), "4, from 50 % on 1"),
        (Schedule("until_matched", 1.0), "1 until the teacher is matched"),
        (Schedule("warmup_stable_decay", 1.0, decay_start=0.9), "1 → 0 warmup-stable-decay from 90 %"),
        (
            Schedule("warmup_stable_decay", 1.0, decay_start=0.9, decay_type="1-sqrt"),
            "1 → 0 warmup-stable-decay (1-sqrt) from 90 %",
        ),
        (
            Schedule("piecewise", 0.4, boundaries=(0.5, 0.8), boundary_values=(0.3, 0.15)),
            "0.4, from 50 % on 0.3, from 80 % on 0.15",
        ),
    ],
)
def test_describe_schedule(schedule, description):
    assert descriptions.describe_schedule(dataclasses.asdict(schedule)) == description
