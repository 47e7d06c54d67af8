"""Results of the paper, for comparison with the arms of a study.

Lee et al. 2023 (arXiv 2305.18239). The table is as printed. The values of the figures, which have more
points, are end points read off the plots. An arm of a study names the paper's arm that it reproduces
(`arms.N.paper`, one of PAPER_ARMS); a report shows the results of those arms.
"""

from typing import NamedTuple


class PaperScore(NamedTuple):
    """A row of the paper's table 1."""

    label: str
    average: float  # over nine GLUE tasks, dev sets, one run
    change: float | None = None  # vs. the baseline, as printed


class PaperLine(NamedTuple):
    """A curve of a figure."""

    arm: str  # one of PAPER_ARMS
    label: str
    epochs: tuple[float, ...]
    scores: tuple[float, ...]  # dev sets of GLUE, one run each; approximate


class PaperFigure(NamedTuple):
    """Curves of a figure that belong to one task."""

    source: str
    task: str  # its name in configs/glue.py
    lines: tuple[PaperLine, ...]


PAPER_TABLE_1 = {  # by arm: averages of the teachers and of the students
    "table1.alone": PaperScore("baseline (no teacher)", 79.89),
    "table1.teacher4": PaperScore("weak teacher, 4 layers", 77.66),
    "table1.teacher2": PaperScore("very weak teacher, 2 layers", 66.45),
    "table1.teacher1": PaperScore("extremely weak teacher, 1 layer", 53.87),
    "table1.with4": PaperScore("with the weak teacher", 81.33, 1.44),
    "table1.with2": PaperScore("with the very weak teacher", 78.52, -1.37),
    "table1.with1": PaperScore("with the extremely weak teacher", 77.13, -2.76),
}

PAPER_FIGURES = (
    PaperFigure(
        "The paper's figure 3, weight of the soft loss (approximate)",
        "mnli",
        (
            PaperLine("figure3.normal", "normal, 1 : 1", (2, 18), (78.0, 79.3)),
            PaperLine("figure3.strong", "strong, 1 : 4", (2, 18), (79.5, 79.0)),
        ),
    ),
    PaperFigure(
        "The paper's figure 3, weight of the soft loss (approximate), epoch 18",
        "cola",
        (
            PaperLine("figure3.normal", "normal, 1 : 1", (18,), (47.0,)),
            PaperLine("figure3.strong", "strong, 1 : 4", (18,), (41.0,)),
        ),
    ),
    PaperFigure(
        "The paper's figure 4, parameter remapping (approximate), epoch 18",
        "mnli",
        (
            PaperLine("figure4.random", "random initialization", (18,), (79.6,)),
            PaperLine("figure4.remapped", "remapped", (18,), (77.3,)),
        ),
    ),
    PaperFigure(
        "The paper's figure 4, parameter remapping (approximate), epoch 18",
        "cola",
        (
            PaperLine("figure4.random", "random initialization", (18,), (48.0,)),
            PaperLine("figure4.remapped", "remapped", (18,), (40.0,)),
        ),
    ),
)

PAPER_ARMS = tuple(
    dict.fromkeys([*PAPER_TABLE_1, *(line.arm for figure in PAPER_FIGURES for line in figure.lines)])
)
