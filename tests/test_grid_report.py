"""The report of a grid, on outcomes made up here: what it takes from the paper, and its Markdown."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_report import Page

from dwt_jax.config_file import construct
from dwt_jax.errors import UserError
from dwt_jax.study import grid_file, grid_page, grid_tables, outcome, paper
from dwt_jax.study.grid import END, Grid, jobs_of, load, problems
from dwt_jax.study.statistics import Documents

TEXT = Documents(np.array([12.0, 6.0]), np.array([2.0, 1.0]))
COLUMNS = re.compile(r"(?<!\\)\|")


def made(spec, scores=None, flops=None, steps=(720,)):
    """An outcome of a committed study: {arm: average by seed} at the end, in hundredths; {arm: FLOPs}."""
    grid = load(spec) if isinstance(spec, str) else spec
    arms = {}
    for arm in grid.arms:
        mine = (scores or {}).get(arm.name, ())
        at = [*(steps if len(arm.finetune_at) > 1 else ()), END]
        arms[arm.name] = outcome.Measured(
            arm,
            runs={
                seed: outcome.Trained(
                    {"steps": 2400, "flops": {"total": (flops or {}).get(arm.name, 1e13)}}, (), TEXT
                )
                for seed in range(len(mine))
            },
            elsewhere={},
            scores={
                (seed, step): dict.fromkeys((*grid.finetuning.tasks, outcome.AVERAGE), (value / 100,))
                for seed, value in enumerate(mine)
                for step in at
            },
            planned={},
        )
    return outcome.Outcome(grid, Path(), arms, 0, 0, ())


def everyone(spec, value=50.0):
    return made(spec, {arm.name: (value,) for arm in load(spec).arms if arm.finetune_at})


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
    alone = paper.TABLE_1["table1.alone"].average
    assert alone == 79.89
    printed = {"with4": (81.33, 1.44), "with2": (78.52, -1.37), "with1": (77.13, -2.76)}
    for arm, (average, change) in printed.items():
        assert paper.TABLE_1[f"table1.{arm}"][1:] == (average, change)
        assert average - alone == pytest.approx(change, abs=1e-9)
    assert [paper.TABLE_1[f"table1.teacher{n}"].average for n in (4, 2, 1)] == [77.66, 66.45, 53.87]


def test_the_papers_table_stands_beside_our_averages():
    ours = {"teacher1": (40.0,), "alone": (50.0, 52.0), "with4": (52.0, 54.0), "with1": (49.0, 51.0)}
    found = made("configs/study/teacher_quality.py:cpu", ours)
    rows = {row[0]: row[2:] for row in grid_tables.paper_table(found).rows}
    assert rows["student alone"] == ["51.00 ± 1.41", "–", "79.89", "–"]
    assert rows["teacher of 1"] == ["40.00", "–", "53.87", "–"]
    weak = rows["with the weak teacher (4)"]
    assert weak[1].startswith("+2.00 [")
    assert [weak[0], *weak[2:]] == ["53.00 ± 1.41", "81.33", "+1.44"]
    assert rows["with the extremely weak teacher (1)"][2:] == ["77.13", "−2.76"]
    assert len(rows) == len(ours)
    html, markdown = grid_page.html(found), grid_tables.markdown(found)
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
    html = grid_page.html(found)
    shown = sources(html)
    tasks = {"cola", "mnli"} & set(found.grid.finetuning.tasks)
    assert len(shown) == len(tasks) * len(figures)
    for source, labels in shown:
        assert figures[re.search(r"figure (\d)", source).group(1)] == labels
    assert ("table 1" in html) == ("table 1" in grid_tables.markdown(found)) == table


def test_the_papers_line_has_the_colour_of_the_arm_that_names_it():
    html = grid_page.html(everyone("configs/study/soft_weight.py:cpu"))
    colours = {
        label: colour
        for colour, label in re.findall(r'class="line (c\d) d0" d="M1 5H25"/></svg>(.*?)</li>', html)
    }
    assert colours["normal, 1 : 1"] == colours["1 : 1"] != colours["1 : 4"] == colours["strong, 1 : 4"]


def test_an_arm_of_the_paper_that_there_is_not():
    arm = {"name": "a", "config": "c", "paper": "table1.with5"}
    said = next(problems(construct(Grid, {"arms": [arm]})))
    assert said.startswith("arms.0.paper is 'table1.with5'; did you mean 'table1.with")


def test_a_directory_that_is_older_than_the_key(tmp_path):
    """Its report is made, without anything of the paper's."""
    grid = load("configs/study/soft_weight.py:cpu")
    grid_file.write(grid, jobs_of(grid, tmp_path), tmp_path)
    path = tmp_path / grid_file.NAME
    plan = json.loads(path.read_text())
    assert [arm.pop("paper") for arm in plan["grid"]["arms"]].count("figure3.strong") == 1
    path.write_text(json.dumps(plan))
    found, _ = grid_file.read(tmp_path)
    assert {arm.paper for arm in found.arms} == {""}
    old = made(found, {arm.name: (50.0,) for arm in found.arms if arm.finetune_at})
    assert "Fine-tuned along the way" in grid_page.html(old)
    assert sources(grid_page.html(old)) == []
    assert "0 of 62 runs are done" in grid_page.write(tmp_path).read_text()
    plan["grid"]["arms"][1]["paper"] = "figure3.storng"
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"arms\.1\.paper is 'figure3\.storng'"):
        grid_file.read(tmp_path)


def test_names_are_text_in_markdown_too():
    """A bar ends no cell, and nothing is markup, in titles, labels and findings."""
    evil = "a|b *c* <i> [d](e)"
    grid = load("configs/study/teacher_quality.py:cpu")
    arms = tuple(dataclasses.replace(arm, label=f"{evil} {arm.name}") for arm in grid.arms)
    claims = (dataclasses.replace(grid.claims[0], text=evil, paper=evil),)
    grid = dataclasses.replace(grid, title=evil, arms=arms, claims=claims)
    found = made(grid, {arm.name: (50.0, 51.0) for arm in arms})
    found = dataclasses.replace(found, judged=(outcome.judge(claims[0], grid, found.arms),))
    text = grid_tables.markdown(found)
    lines = text.splitlines()
    assert lines[0] == r"# a\|b \*c\* &lt;i&gt; \[d\](e)"
    assert not COLUMNS.search(" ".join(line for line in lines if line[:1] in ("#", "*")))
    assert "<i>" not in text
    assert not re.search(r"(?<!\\)\*c", text)
    widths = [len(COLUMNS.findall(line)) for line in lines if line.startswith("|")]
    tables = [len(table.header) + 1 for _, table, _ in grid_tables.tables(found) for _ in (*table.rows, 0, 1)]
    assert widths == tables
    assert any(f"{evil} with4" in cell for row in Page(grid_page.html(found)).tables[0] for cell in row)


@pytest.mark.parametrize("scale", ["cpu", "h200", "paper"])
def test_until_beaten_says_at_what_distance_its_weight_falls(scale, tmp_path):
    grid = load(f"configs/study/soft_weight.py:{scale}")
    config = next(job.config for job in jobs_of(grid, tmp_path) if job.arm == "until_beaten")
    assert (config.distill.alpha_soft.kind, config.distill.alpha_soft.value) == ("until_beaten", 1)
    said = f"alling to 0 over the last {config.distill.beaten_margin:g} nats to the teacher"
    label = next(arm.label for arm in grid.arms if arm.name == "until_beaten")
    texts = [claim.text for claim in grid.claims if claim.arm == "until_beaten"]
    assert len(texts) == 2
    assert all(said in text for text in (label, *texts))
