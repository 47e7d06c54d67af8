"""What the paper's figures show, read off the plots, to lay beside our own runs.

Lee et al. 2023 (arXiv 2305.18239). Its figures have more points; these are the ends that could be read.
"""

from typing import NamedTuple


class PaperLine(NamedTuple):
    label: str
    epochs: tuple[float, ...]
    scores: tuple[float, ...]  # dev sets of GLUE, one run each; approximate


class PaperFigure(NamedTuple):
    source: str
    task: str  # as configs/glue.py names it
    lines: tuple[PaperLine, ...]


FIGURES = (
    PaperFigure(
        "The paper's figure 3, weight of the soft loss (approximate)",
        "mnli",
        (
            PaperLine("normal, 1 : 1", (2, 18), (78.0, 79.3)),
            PaperLine("strong, 1 : 4", (2, 18), (79.5, 79.0)),
        ),
    ),
    PaperFigure(
        "The paper's figure 3, weight of the soft loss (approximate), epoch 18",
        "cola",
        (PaperLine("normal, 1 : 1", (18,), (47.0,)), PaperLine("strong, 1 : 4", (18,), (41.0,))),
    ),
    PaperFigure(
        "The paper's figure 4, parameter remapping (approximate), epoch 18",
        "mnli",
        (PaperLine("random start", (18,), (79.6,)), PaperLine("remapped", (18,), (77.3,))),
    ),
    PaperFigure(
        "The paper's figure 4, parameter remapping (approximate), epoch 18",
        "cola",
        (PaperLine("random start", (18,), (48.0,)), PaperLine("remapped", (18,), (40.0,))),
    ),
)
