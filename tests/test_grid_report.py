"""The report of a grid, on outcomes made up here: its Markdown."""

import dataclasses
import re
from pathlib import Path

import numpy as np
from test_report import Page

from dwt_jax.study import grid_page, grid_tables, outcome
from dwt_jax.study.grid import END, load
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
    tables = [len(table.header) + 1 for _, table in grid_tables.tables(found) for _ in (*table.rows, 0, 1)]
    assert widths == tables
    assert any(f"{evil} with4" in cell for row in Page(grid_page.html(found)).tables[0] for cell in row)
