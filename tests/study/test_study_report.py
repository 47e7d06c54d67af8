"""The report of a study, with synthetic results: the paper's numbers, scores against FLOPs, Markdown."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwt_jax.cli.report import write_directory_report
from dwt_jax.config_loader import build_dataclass
from dwt_jax.errors import UserError
from dwt_jax.study import manifest, paper_results, results, study_report, study_tables
from dwt_jax.study.charts import Chart
from dwt_jax.study.report import report_html, report_markdown
from dwt_jax.study.results import Measurement
from dwt_jax.study.run_records import RunRecord
from dwt_jax.study.statistics import PairedDocuments
from dwt_jax.study.sweep import FINAL_STEP, Study, load_study, study_jobs, study_problems
from helpers.html_page import Page

TEXT = PairedDocuments(np.array([12.0, 6.0]), np.array([2.0, 1.0]))
COLUMNS = re.compile(r"(?<!\\)\|")


def make_run(flops=1e13, steps=2400, evaluations=()):
    """Return a finished run, of which a report on a study reads steps, FLOPs and evaluations only."""
    summary = {"steps": steps, "flops": {"total": flops}}
    return RunRecord("", "", "student", "", Path(), {}, {}, summary, (), evaluations, None)


def make_results(spec, scores=None, flops=None, steps=(720,)):
    """Return results of a study from {arm: final average by seed, in %} and {arm: FLOPs}."""
    study = load_study(spec) if isinstance(spec, str) else spec
    arms = {}
    for arm in study.arms:
        arm_scores = (scores or {}).get(arm.name, ())
        steps_of_arm = [*(steps if len(arm.finetune_at) > 1 else ()), FINAL_STEP]
        losses = [
            Measurement(seed, FINAL_STEP, results.LOSS_MEASURE, documents=TEXT)
            for seed in range(len(arm_scores))
        ]
        measurements = [
            Measurement(seed, step, measure, (value / 100,))
            for seed, value in enumerate(arm_scores)
            for step in steps_of_arm
            for measure in (*study.finetuning.tasks, results.AVERAGE_MEASURE)
        ]
        runs = {seed: make_run((flops or {}).get(arm.name, 1e13)) for seed in range(len(arm_scores))}
        arms[arm.name] = results.ArmResults(arm, runs, [*losses, *measurements], {})
    return results.StudyResults(study, arms, 0, 0, ())


def charts_of(study_results):
    """Return the charts of a report by their names."""
    sections = study_report.study_report(study_results).sections
    parts = [part for section in sections for part in section.parts]
    return {part.name: part for part in parts if isinstance(part, Chart)}


def html_of(study_results):
    return report_html(study_report.study_report(study_results))


def markdown_of(study_results):
    return report_markdown(study_report.study_report(study_results))


def make_full_results(spec, value=50.0):
    return make_results(spec, {arm.name: (value,) for arm in load_study(spec).arms if arm.finetune_at})


def paper_figures_of(study_results):
    """Return (source, labels of the lines) of the paper's figures in a report."""
    charts = charts_of(study_results).values()
    return [
        (chart.caption, [line.label for line in chart.lines])
        for chart in charts
        if chart.caption.startswith("The paper's")
    ]


def test_paper_table_is_as_printed():
    """The printed changes are the differences of the printed averages."""
    baseline = paper_results.PAPER_TABLE_1["table1.alone"].average
    assert baseline == 79.89
    printed = {"with4": (81.33, 1.44), "with2": (78.52, -1.37), "with1": (77.13, -2.76)}
    for arm, (average, change) in printed.items():
        assert paper_results.PAPER_TABLE_1[f"table1.{arm}"][1:] == (average, change)
        assert average - baseline == pytest.approx(change, abs=1e-9)
    assert [paper_results.PAPER_TABLE_1[f"table1.teacher{n}"].average for n in (4, 2, 1)] == [
        77.66,
        66.45,
        53.87,
    ]


def test_paper_table_has_our_averages_and_the_papers():
    scores = {
        **{"extremely_weak": (40.0,), "alone": (50.0, 52.0)},
        **{"with_weak": (52.0, 54.0), "with_extremely_weak": (49.0, 51.0)},
    }
    study_results = make_results("configs/study/teacher_quality.py:cpu", scores)
    rows = {row[0]: row[2:] for row in study_tables.paper_table(study_results).rows}
    assert rows["baseline (no teacher)"] == ["51.00 ± 1.41", "–", "79.89", "–"]
    assert rows["extremely weak teacher (1 layer of half the width)"] == ["40.00", "–", "53.87", "–"]
    weak = rows["with the weak teacher, α_s = 1"]
    assert weak[1].startswith("+2.00 [")
    assert [weak[0], *weak[2:]] == ["53.00 ± 1.41", "81.33", "+1.44"]
    assert rows["with the extremely weak teacher, α_s = 1"][2:] == ["77.13", "−2.76"]
    assert len(rows) == len(scores)
    html, markdown = html_of(study_results), markdown_of(study_results)
    for text in (html.replace("&#39;", "'"), markdown):
        assert "Comparison with the paper's table 1" in text
        assert "one run per arm, average over nine GLUE tasks, hidden size 768" in text
        assert "ours: average over 2 tasks" in text
    assert ["with the weak teacher, α_s = 1", "with the weak teacher", *weak] in Page(html).tables[1]
    assert "| with the weak teacher |" in markdown


@pytest.mark.parametrize(
    ("name", "figures", "table"),
    [
        ("soft_weight", {"3": ["normal, 1 : 1", "strong, 1 : 4"]}, False),
        ("remapping", {"4": ["random initialization", "remapped"]}, False),
        ("teacher_quality", {}, True),
        ("knowledge_inheritance", {}, False),
        ("chain", {}, False),
    ],
)
@pytest.mark.parametrize("scale", ["cpu", "h200", "paper"])
def test_each_study_shows_what_of_the_paper_its_arms_name(name, scale, figures, table):
    study_results = make_full_results(f"configs/study/{name}.py:{scale}")
    html = html_of(study_results)
    paper_figures = paper_figures_of(study_results)
    tasks = {"cola", "mnli"} & set(study_results.study.finetuning.tasks)
    if scale == "cpu":  # nothing is fine-tuned before the end: no curves to put beside the paper's
        tasks = set()
    assert len(paper_figures) == len(tasks) * len(figures)
    for source, labels in paper_figures:
        assert figures[re.search(r"figure (\d)", source).group(1)] == labels
    assert ("table 1" in html) == ("table 1" in markdown_of(study_results)) == table


def test_a_curve_of_scores_is_of_the_seeds_that_have_all_of_it():
    """FLOPs between two evaluations are interpolated; a seed without a checkpoint is left out."""
    study = build_dataclass(Study, {"arms": [{"name": "a", "config": "c"}], "pairs": {"sets": ["order"]}})
    records = tuple(
        {"step": step, "student_flops": 2.0 * step, "teacher_flops": min(step, 20), "held_out_loss": 1.0}
        for step in (20, 40)
    )
    run = make_run(100.0, 40, records)
    scores = {(0, 10): (0.5, 0.7), (0, FINAL_STEP): (0.9, 0.9), (1, FINAL_STEP): (0.1, 0.1)}
    measurements = [Measurement(*key, "order", values, is_by_paradigm=True) for key, values in scores.items()]
    arm = results.ArmResults(study.arms[0], {0: run, 1: run}, measurements, {})
    flops, accuracies = results.mean_score_curve(arm, "order")
    assert flops == [30.0, 100.0]
    assert accuracies == pytest.approx([0.6, 0.9])
    assert results.mean_score_curve(arm, "era") == ([], [])


def test_paper_line_has_the_colour_of_its_arm():
    charts = charts_of(make_full_results("configs/study/soft_weight.py:h200"))
    colours = {line.label: line.colour for chart in charts.values() for line in chart.lines}
    normal, strong = colours["normal, α_s = 1"], colours["strong, α_s = 4"]
    assert colours["normal, 1 : 1"] == normal != strong == colours["strong, 1 : 4"]


def test_unknown_arm_of_the_paper_is_refused():
    arm = {"name": "a", "config": "c", "paper": "table1.with5"}
    problem = next(study_problems(build_dataclass(Study, {"arms": [arm]})))
    assert problem.startswith("arms.0.paper is 'table1.with5'; did you mean 'table1.with")


def test_manifest_without_paper_arms_has_no_paper_results(tmp_path):
    """The report has nothing of the paper."""
    study = load_study("configs/study/soft_weight.py:h200")
    manifest.write_manifest(study, study_jobs(study, tmp_path), tmp_path)
    path = tmp_path / manifest.MANIFEST_NAME
    plan = json.loads(path.read_text())
    assert [arm.pop("paper") for arm in plan["grid"]["arms"]].count("figure3.strong") == 1
    path.write_text(json.dumps(plan))
    old_study, _ = manifest.read_manifest(tmp_path)
    assert {arm.paper for arm in old_study.arms} == {""}
    old_results = make_results(old_study, {arm.name: (50.0,) for arm in old_study.arms if arm.finetune_at})
    assert "Scores by checkpoint" in html_of(old_results)
    assert paper_figures_of(old_results) == []
    assert f"0 of {len(plan['jobs'])} runs are finished" in write_directory_report(tmp_path).read_text()
    plan["grid"]["arms"][1]["paper"] = "figure3.storng"
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"arms\.1\.paper is 'figure3\.storng'"):
        manifest.read_manifest(tmp_path)


def test_a_run_with_other_files_is_left_out(tmp_path):
    """Of an earlier version, or of another program."""
    study = build_dataclass(Study, {"arms": [{"name": "a", "config": "configs/small_bert.py:2x64"}]})
    (job,) = study_jobs(study, tmp_path)
    manifest.write_manifest(study, (job,), tmp_path)
    job.workdir.mkdir(parents=True)
    for name in ("summary", "config", "run"):
        (job.workdir / f"{name}.json").write_text("{}")
    text = write_directory_report(tmp_path).with_suffix(".md").read_text().replace("\\", "")
    assert f"* a-seed0 is left out: {job.workdir}: KeyError('held_out'), expected files" in text


def test_names_are_text_in_markdown_too():
    """Titles, labels and hypotheses are escaped: no end of a cell, no markup."""
    evil = "a|b *c* <i> [d](e)"
    study = load_study("configs/study/teacher_quality.py:cpu")
    arms = tuple(dataclasses.replace(arm, label=f"{evil} {arm.name}") for arm in study.arms)
    claims = (dataclasses.replace(study.claims[0], text=evil, paper=evil),)
    study = dataclasses.replace(study, title=evil, arms=arms, claims=claims)
    study_results = make_results(study, {arm.name: (50.0, 51.0) for arm in arms})
    study_results = dataclasses.replace(
        study_results, hypothesis_results=(results.evaluate_hypothesis(claims[0], study, study_results.arms),)
    )
    text = markdown_of(study_results)
    lines = text.splitlines()
    assert lines[0] == r"# a\|b \*c\* &lt;i&gt; \[d\](e)"
    assert not COLUMNS.search(" ".join(line for line in lines if line[:1] in ("#", "*")))
    assert "<i>" not in text
    assert not re.search(r"(?<!\\)\*c", text)
    widths = [len(COLUMNS.findall(line)) for line in lines if line.startswith("|")]
    tables = [
        len(table.header) + 1
        for _, table, _ in study_tables.study_tables(study_results)
        for _ in (*table.rows, 0, 1)
    ]
    assert widths == tables
    assert any(f"{evil} with_weak" in cell for row in Page(html_of(study_results)).tables[0] for cell in row)


@pytest.mark.parametrize("scale", ["cpu", "h200", "paper"])
def test_until_matched_label_has_the_margin(scale, tmp_path):
    study = load_study(f"configs/study/soft_weight.py:{scale}")
    config = next(job.config for job in study_jobs(study, tmp_path) if job.arm == "until_matched")
    assert (config.distill.alpha_soft.kind, config.distill.alpha_soft.value) == ("until_matched", 1)
    expected = f"alling to 0 over the last {config.distill.match_margin:g} nats to the teacher"
    label = next(arm.label for arm in study.arms if arm.name == "until_matched")
    texts = [claim.text for claim in study.claims if claim.arm == "until_matched"]
    assert len(texts) == 2
    assert all(expected in text for text in (label, *texts))


FLOPS = {
    "weak": 8e12,
    "alone": 1.2e13,
    "with_weak": 1.6e13,
    "with_very_weak": 1.4e13,
    "with_extremely_weak": 1.3e13,
}
SCORES = {
    "weak": (45.0,),
    "alone": (50.0, 54.0),  # 52
    "with_weak": (55.0, 57.0),  # 56
    "with_very_weak": (51.0, 51.0),  # more expensive than the baseline and worse
    "with_extremely_weak": (52.0, 54.0),  # 53
}


def test_score_against_flops(with_charts):
    study_results = make_results("configs/study/teacher_quality.py:cpu", SCORES, FLOPS)
    points = {point.arm: point for point in results.arm_qualities(study_results.arms)}
    assert set(points) == set(SCORES)
    for name, point in points.items():
        assert point.flops == FLOPS[name]
        assert point.score == pytest.approx(sum(SCORES[name]) / len(SCORES[name]) / 100)
    assert points["alone"].spread == pytest.approx(0.02 * math.sqrt(2))  # two seeds, ±2 about the mean
    assert points["weak"].spread == 0
    assert [point.arm for point in results.pareto_front(list(points.values()))] == [
        "weak",
        "alone",
        "with_extremely_weak",
        "with_weak",
    ]
    rows = {row[0]: row[1:] for row in study_tables.quality_table(study_results).rows}
    assert rows["baseline (no teacher)"] == ["1.2e+13", "52.00 ± 2.83", "yes"]
    assert rows["with the very weak teacher, α_s = 1"] == ["1.4e+13", "51.00 ± 0.00", "–"]
    assert "Average score against FLOPs" in markdown_of(study_results)
    (chart,) = [
        chart for chart in charts_of(study_results).values() if chart.title == "Average score against FLOPs"
    ]
    points = {line.label: (line.x, line.y) for line in chart.lines}
    assert points["baseline (no teacher)"] == ((12.0,), (52.0,))  # TFLOPs
    assert len(points) == len(SCORES)
    assert {line.label: line.spread for line in chart.lines}["baseline (no teacher)"] == pytest.approx(
        (2 * math.sqrt(2),)
    )
    np.testing.assert_allclose(chart.step_line, [(8, 45), (12, 52), (13, 53), (16, 56)])  # the front
    assert "baseline (no teacher): 52.00 at 12 TFLOPs" in html_of(study_results)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_the_running_record_by_cost(pairs):
    points = [results.ArmQuality(str(i), float(cost), (score / 8,)) for i, (cost, score) in enumerate(pairs)]
    expected, record = [], -1
    for cost in sorted({cost for cost, _ in pairs}):
        best = max(score for c, score in pairs if c == cost)
        if best > record:
            expected += [(cost, best)] * pairs.count((cost, best))
            record = best
    assert [(point.flops, 8 * point.score) for point in results.pareto_front(points)] == expected


def test_flops_are_those_of_the_seeds_that_have_a_score():
    study_results = make_results("configs/study/teacher_quality.py:cpu", {"alone": (50.0, 52.0, 54.0)})
    arm = study_results.arms["alone"]
    runs = {seed: make_run((seed + 1) * 1e12) for seed in arm.runs}
    averages = [
        Measurement(seed, FINAL_STEP, results.AVERAGE_MEASURE, (score,))
        for seed, score in enumerate((0.5, 0.52, math.nan))
    ]
    qualities = results.arm_qualities({"alone": dataclasses.replace(arm, runs=runs, measurements=averages)})
    assert [(quality.flops, quality.scores) for quality in qualities] == [(1.5e12, (0.5, 0.52))]
    earlier = [row._replace(step=720) for row in averages]
    assert results.arm_qualities({"alone": dataclasses.replace(arm, measurements=earlier)}) == []


def test_no_quality_figure_without_scores():
    study_results = make_results("configs/study/budget.py:cpu")
    assert not study_tables.quality_table(study_results).rows
    assert "Average score" not in html_of(study_results) + markdown_of(study_results)
