"""The paper's first study: does a weak, a very weak, an extremely weak teacher help?

    dwt study --config=configs/study/teacher_quality.py:cpu --workdir=studies/teacher_quality

Scales paper, h200 and cpu: see pretraining.py and docs/studies.md.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config
from dwt_jax.study.paper_results import PAPER_TABLE_1
from dwt_jax.text_format import format_float

WEAK = {4: "weak", 2: "very weak", 1: "extremely weak"}
BASELINE_SCORE = PAPER_TABLE_1["table1.alone"].average
PAPER = {n: format_float(PAPER_TABLE_1[f"table1.with{n}"].change, 2, signed=True) for n in WEAK}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    teachers = [
        shared.arm(
            f"teacher{n}",
            scale,
            f"teacher{n}",
            label=f"{n}-layer teacher",
            finetune_at=[1.0],
            paper=f"table1.teacher{n}",
        )
        for n in WEAK
    ]
    distilled = [
        shared.arm(
            f"with{n}",
            scale,
            label=f"with the {WEAK[n]} teacher ({n} layer{'s' * (n > 1)})",
            teacher=f"teacher{n}",
            set=["distill.preset=paper_normal"],
            finetune_at=[1.0],
            paper=f"table1.with{n}",
        )
        for n in WEAK
    ]
    baseline = shared.arm(
        "alone", scale, label="baseline (no teacher)", finetune_at=[1.0], paper="table1.alone"
    )
    claims = [
        {
            "text": f"A teacher of {n} layer{'s' * (n > 1)} {'helps' if n == 4 else 'harms'}",
            "arm": f"with{n}",
            "measure": "average",
            "expected": "better" if n == 4 else "worse",
            "paper": f"{PAPER[n]} on GLUE's average over {BASELINE_SCORE}, one run",
        }
        for n in WEAK
    ]
    claims += [  # the loss separates arms that the scores do not
        {
            "text": f"A teacher of {n} layer{'s' * (n > 1)} lowers the held-out loss",
            "arm": f"with{n}",
            "paper": "not measured",
        }
        for n in WEAK
    ]
    return shared.study(scale, "Teacher quality", [*teachers, baseline, *distilled], claims)
