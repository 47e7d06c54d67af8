"""The report of a grid, on outcomes made up here: the paper beside ours, scores against FLOPs, Markdown."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwt_jax.config_loader import build_dataclass
from dwt_jax.errors import UserError
from dwt_jax.study import charts, manifest, paper_results, results, sweep_html, sweep_tables
from dwt_jax.study.statistics import PairedDocuments
from dwt_jax.study.sweep import FINAL_STEP, Study, load_study, study_jobs, study_problems
from helpers.html_page import Page

TEXT = PairedDocuments(np.array([12.0, 6.0]), np.array([2.0, 1.0]))
COLUMNS = re.compile(r"(?<!\\)\|")


def made(spec, scores=None, flops=None, steps=(720,)):
    """An outcome of a committed study: {arm: average by seed} at the end, in hundredths; {arm: FLOPs}."""
    grid = load_study(spec) if isinstance(spec, str) else spec
    arms = {}
    for arm in grid.arms:
        mine = (scores or {}).get(arm.name, ())
        at = [*(steps if len(arm.finetune_at) > 1 else ()), FINAL_STEP]
        arms[arm.name] = results.ArmResults(
            arm,
            runs={
                seed: results.TrainingResult(
                    {"steps": 2400, "flops": {"total": (flops or {}).get(arm.name, 1e13)}}, (), TEXT
                )
                for seed in range(len(mine))
            },
            elsewhere={},
            scores={
                (seed, step): dict.fromkeys((*grid.finetuning.tasks, results.AVERAGE_MEASURE), (value / 100,))
                for seed, value in enumerate(mine)
                for step in at
            },
            planned_steps={},
        )
    return results.StudyResults(grid, Path(), arms, 0, 0, ())


def everyone(spec, value=50.0):
    return made(spec, {arm.name: (value,) for arm in load_study(spec).arms if arm.finetune_at})


def sources(html):
    """The figures of the paper that a page shows: (source, labels of its lines)."""
    found = []
    for part in html.split('<figure class="both">')[1:]:
        caption = re.search("<figcaption>(.*?)</figcaption>", part).group(1)
        if caption.startswith("The paper&#x27;s"):
            found.append((caption, re.findall("</svg>([^<]+)</li>", part)))
    return found


def test_the_papers_table_is_the_papers():
    """Its changes as printed are the differences of its averages as printed."""
    alone = paper_results.PAPER_TABLE_1["table1.alone"].average
    assert alone == 79.89
    printed = {"with4": (81.33, 1.44), "with2": (78.52, -1.37), "with1": (77.13, -2.76)}
    for arm, (average, change) in printed.items():
        assert paper_results.PAPER_TABLE_1[f"table1.{arm}"][1:] == (average, change)
        assert average - alone == pytest.approx(change, abs=1e-9)
    assert [paper_results.PAPER_TABLE_1[f"table1.teacher{n}"].average for n in (4, 2, 1)] == [
        77.66,
        66.45,
        53.87,
    ]


def test_the_papers_table_stands_beside_our_averages():
    ours = {"teacher1": (40.0,), "alone": (50.0, 52.0), "with4": (52.0, 54.0), "with1": (49.0, 51.0)}
    found = made("configs/study/teacher_quality.py:cpu", ours)
    rows = {row[0]: row[2:] for row in sweep_tables.paper_table(found).rows}
    assert rows["student alone"] == ["51.00 ± 1.41", "–", "79.89", "–"]
    assert rows["teacher of 1"] == ["40.00", "–", "53.87", "–"]
    weak = rows["with the weak teacher (4)"]
    assert weak[1].startswith("+2.00 [")
    assert [weak[0], *weak[2:]] == ["53.00 ± 1.41", "81.33", "+1.44"]
    assert rows["with the extremely weak teacher (1)"][2:] == ["77.13", "−2.76"]
    assert len(rows) == len(ours)
    html, markdown = sweep_html.render_study_html(found), sweep_tables.study_markdown(found)
    for text in (html.replace("&#x27;", "'"), markdown):
        assert "Beside the paper's table 1" in text
        assert "one run an arm, average over nine GLUE tasks, hidden size 768" in text
        assert "ours: average over 5 tasks" in text
    assert ["with the weak teacher (4)", "with the weak teacher", *weak] in Page(html).tables[1]
    assert "| with the weak teacher |" in markdown


@pytest.mark.parametrize(
    ("name", "figures", "table"),
    [
        ("soft_weight", {"3": ["normal, 1 : 1", "strong, 1 : 4"]}, False),
        ("remapping", {"4": ["random start", "remapped"]}, False),
        ("teacher_quality", {}, True),
        ("knowledge_inheritance", {}, False),
        ("chain", {}, False),
    ],
)
@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_each_study_shows_what_of_the_paper_its_arms_name(name, scale, figures, table):
    found = everyone(f"configs/study/{name}.py:{scale}")
    html = sweep_html.render_study_html(found)
    shown = sources(html)
    tasks = {"cola", "mnli"} & set(found.grid.finetuning.tasks)
    assert len(shown) == len(tasks) * len(figures)
    for source, labels in shown:
        assert figures[re.search(r"figure (\d)", source).group(1)] == labels
    assert ("table 1" in html) == ("table 1" in sweep_tables.study_markdown(found)) == table


def test_the_papers_line_has_the_colour_of_the_arm_that_names_it():
    html = sweep_html.render_study_html(everyone("configs/study/soft_weight.py:cpu"))
    colours = {
        label: colour
        for colour, label in re.findall(r'class="line (c\d) d0" d="M1 5H25"/></svg>(.*?)</li>', html)
    }
    assert colours["normal, 1 : 1"] == colours["1 : 1"] != colours["1 : 4"] == colours["strong, 1 : 4"]


def test_an_arm_of_the_paper_that_there_is_not():
    arm = {"name": "a", "config": "c", "paper": "table1.with5"}
    said = next(study_problems(build_dataclass(Study, {"arms": [arm]})))
    assert said.startswith("arms.0.paper is 'table1.with5'; did you mean 'table1.with")


def test_a_directory_that_is_older_than_the_key(tmp_path):
    """Its report is made, without anything of the paper's."""
    grid = load_study("configs/study/soft_weight.py:cpu")
    manifest.write_manifest(grid, study_jobs(grid, tmp_path), tmp_path)
    path = tmp_path / manifest.MANIFEST_NAME
    plan = json.loads(path.read_text())
    assert [arm.pop("paper") for arm in plan["grid"]["arms"]].count("figure3.strong") == 1
    path.write_text(json.dumps(plan))
    found, _ = manifest.read_manifest(tmp_path)
    assert {arm.paper for arm in found.arms} == {""}
    old = made(found, {arm.name: (50.0,) for arm in found.arms if arm.finetune_at})
    assert "Fine-tuned along the way" in sweep_html.render_study_html(old)
    assert sources(sweep_html.render_study_html(old)) == []
    assert "0 of 62 runs are done" in sweep_html.write_study_report(tmp_path).read_text()
    plan["grid"]["arms"][1]["paper"] = "figure3.storng"
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"arms\.1\.paper is 'figure3\.storng'"):
        manifest.read_manifest(tmp_path)


def test_names_are_text_in_markdown_too():
    """A bar ends no cell, and nothing is markup, in titles, labels and findings."""
    evil = "a|b *c* <i> [d](e)"
    grid = load_study("configs/study/teacher_quality.py:cpu")
    arms = tuple(dataclasses.replace(arm, label=f"{evil} {arm.name}") for arm in grid.arms)
    claims = (dataclasses.replace(grid.claims[0], text=evil, paper=evil),)
    grid = dataclasses.replace(grid, title=evil, arms=arms, claims=claims)
    found = made(grid, {arm.name: (50.0, 51.0) for arm in arms})
    found = dataclasses.replace(found, judged=(results.evaluate_hypothesis(claims[0], grid, found.arms),))
    text = sweep_tables.study_markdown(found)
    lines = text.splitlines()
    assert lines[0] == r"# a\|b \*c\* &lt;i&gt; \[d\](e)"
    assert not COLUMNS.search(" ".join(line for line in lines if line[:1] in ("#", "*")))
    assert "<i>" not in text
    assert not re.search(r"(?<!\\)\*c", text)
    widths = [len(COLUMNS.findall(line)) for line in lines if line.startswith("|")]
    tables = [
        len(table.header) + 1 for _, table, _ in sweep_tables.study_tables(found) for _ in (*table.rows, 0, 1)
    ]
    assert widths == tables
    assert any(
        f"{evil} with4" in cell for row in Page(sweep_html.render_study_html(found)).tables[0] for cell in row
    )


@pytest.mark.parametrize("scale", ["cpu", "h200", "paper"])
def test_until_beaten_says_at_what_distance_its_weight_falls(scale, tmp_path):
    grid = load_study(f"configs/study/soft_weight.py:{scale}")
    config = next(job.config for job in study_jobs(grid, tmp_path) if job.arm == "until_matched")
    assert (config.distill.alpha_soft.kind, config.distill.alpha_soft.value) == ("until_matched", 1)
    said = f"alling to 0 over the last {config.distill.match_margin:g} nats to the teacher"
    label = next(arm.label for arm in grid.arms if arm.name == "until_matched")
    texts = [claim.text for claim in grid.claims if claim.arm == "until_matched"]
    assert len(texts) == 2
    assert all(said in text for text in (label, *texts))


PRICED = {"teacher4": 8e12, "alone": 1.2e13, "with4": 1.6e13, "with2": 1.4e13, "with1": 1.3e13}
SCORED = {
    "teacher4": (45.0,),
    "alone": (50.0, 54.0),  # 52
    "with4": (55.0, 57.0),  # 56
    "with2": (51.0, 51.0),  # dearer than alone and worse
    "with1": (52.0, 54.0),  # 53
}


def test_score_against_flops():
    found = made("configs/study/teacher_quality.py:cpu", SCORED, PRICED)
    points = {one.arm: one for one in results.arm_qualities(found.arms)}
    assert set(points) == set(SCORED)
    for name, one in points.items():
        assert one.flops == PRICED[name]
        assert one.score == pytest.approx(sum(SCORED[name]) / len(SCORED[name]) / 100)
    assert points["alone"].spread == pytest.approx(0.02 * math.sqrt(2))  # two seeds, ±2 about the mean
    assert points["teacher4"].spread == 0
    assert [one.arm for one in results.pareto_front(list(points.values()))] == [
        "teacher4",
        "alone",
        "with1",
        "with4",
    ]
    rows = {row[0]: row[1:] for row in sweep_tables.quality_table(found).rows}
    assert rows["student alone"] == ["1.2e+13", "52.00 ± 2.83", "yes"]
    assert rows["with the very weak teacher (2)"] == ["1.4e+13", "51.00 ± 0.00", "–"]
    assert "Average score against FLOPs" in sweep_tables.study_markdown(found)
    html = sweep_html.render_study_html(found)
    drawn = re.search(r"<h2>Average score</h2>(.*?)</figure>", html, re.DOTALL).group(1)
    assert len(re.findall("<circle", drawn)) == 2 * len(SCORED)  # the wide and the small picture
    assert drawn.count('class="level"') == 2
    assert "student alone: 52.00 at 12 TFLOPs" in drawn


def test_a_point_is_where_its_numbers_are():
    """Pixels are linear in FLOPs and in the score: the bar ends a standard deviation from the dot, and the
    stairs go through the dots that are on the front."""
    found = made("configs/study/teacher_quality.py:cpu", SCORED, PRICED)
    drawn = "".join(sweep_html._quality_figure(found)).split('class="chart small"')[0]
    dots = {
        label: (float(x), float(y))
        for x, y, label in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4"><title>(.*?):', drawn)
    }
    names = ("student alone", "with the weak teacher (4)", "teacher of 4")
    alone, weak, teacher = (dots[name] for name in names)
    assert weak[0] / alone[0] == pytest.approx(1.6 / 1.2, rel=1e-2)
    per_point = (alone[1] - weak[1]) / (56 - 52)
    assert (teacher[1] - alone[1]) / (52 - 45) == pytest.approx(per_point, rel=1e-2)
    bars = re.findall(r'd="M([\d.]+) ([\d.]+)V([\d.]+)"', drawn)
    top, bottom = next((float(a), float(b)) for x, a, b in bars if float(x) == alone[0])
    assert (bottom - top) / 2 / per_point == pytest.approx(2 * math.sqrt(2), rel=1e-2)
    assert len(bars) == 3  # with2's seeds agree, the teacher has one
    start, steps = re.search(r'class="level" d="M([\d. ]+)H(.*?)H[\d.]+"', drawn).groups()
    corners = [tuple(map(float, start.split()))]
    corners += [tuple(map(float, one.split("V"))) for one in steps.split("H")]
    assert corners == [teacher, alone, dots["with the extremely weak teacher (1)"], weak]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_the_running_record_by_cost(pairs):
    points = [results.ArmQuality(str(i), float(cost), (score / 8,)) for i, (cost, score) in enumerate(pairs)]
    expected, record = [], -1
    for cost in sorted({cost for cost, _ in pairs}):
        best = max(score for c, score in pairs if c == cost)
        if best > record:
            expected += [(cost, best)] * pairs.count((cost, best))
            record = best
    assert [(one.flops, 8 * one.score) for one in results.pareto_front(points)] == expected


def test_flops_are_those_of_the_seeds_that_have_a_score():
    found = made("configs/study/teacher_quality.py:cpu", {"alone": (50.0, 52.0, 54.0)})
    arm = found.arms["alone"]
    runs = {
        seed: run._replace(summary={"steps": 1, "flops": {"total": (seed + 1) * 1e12}})
        for seed, run in arm.runs.items()
    }
    scores = {**arm.scores, (2, FINAL_STEP): {results.AVERAGE_MEASURE: (math.nan,)}}
    only = results.arm_qualities({"alone": dataclasses.replace(arm, runs=runs, scores=scores)})
    assert [(one.flops, one.scores) for one in only] == [(1.5e12, (0.5, 0.52))]
    nothing = {"alone": dataclasses.replace(arm, scores={(0, 720): arm.scores[0, FINAL_STEP]})}
    assert results.arm_qualities(nothing) == []


def test_without_scores_there_is_no_such_picture():
    found = made("configs/study/budget.py:cpu")
    assert sweep_tables.quality_table(found) is None
    assert "Average score" not in sweep_html.render_study_html(found) + sweep_tables.study_markdown(found)


def test_a_bar_is_inside_the_picture():
    line = charts.ChartLine("a", [1.0, 2.0, math.nan], [5.0, 6.0, 7.0], spread=[3.0, 0.0, 100.0])
    svg = charts.svg_chart([line], charts.ChartAxes("", "", ""), 400, 300, direct=False)
    top, bottom = map(float, re.search(r'd="M[\d.]+ ([\d.]+)V([\d.]+)"', svg).groups())
    height = float(re.search(r'<svg x="[^"]*" y="[^"]*" width="[^"]*" height="([\d.]+)"', svg).group(1))
    assert 0 < top < bottom < height
    assert bottom - top > 0.6 * height  # nothing is left blank for the point that is not there
