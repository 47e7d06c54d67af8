"""The paper's first study: does a weak, a very weak, an extremely weak teacher help?

    dwt study --config=configs/study/teacher_quality.py:cpu --workdir=studies/teacher_quality

Scales paper, h200 and cpu: see pretraining.py and docs/studies.md.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config
from dwt_jax.study.paper_results import PAPER_TABLE_1
from dwt_jax.text_format import format_float

WEAK = {4: "weak", 2: "very weak", 1: "extremely weak"}
ALONE = PAPER_TABLE_1["table1.alone"].average
PAPER = {n: format_float(PAPER_TABLE_1[f"table1.with{n}"].change, 2, signed=True) for n in WEAK}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    teachers = [
        shared.arm(
            f"teacher{n}",
            scale,
            f"teacher{n}",
            label=f"teacher of {n}",
            finetune_at=[1.0],
            paper=f"table1.teacher{n}",
        )
        for n in WEAK
    ]
    taught = [
        shared.arm(
            f"with{n}",
            scale,
            label=f"with the {WEAK[n]} teacher ({n})",
            teacher=f"teacher{n}",
            set=["distill.preset=paper_normal"],
            finetune_at=[1.0],
            paper=f"table1.with{n}",
        )
        for n in WEAK
    ]
    alone = shared.arm("alone", scale, label="student alone", finetune_at=[1.0], paper="table1.alone")
    claims = [
        {
            "text": f"A teacher of {n} layer{'s' * (n > 1)} {'helps' if n == 4 else 'harms'}",
            "arm": f"with{n}",
            "measure": "average",
            "expected": "better" if n == 4 else "worse",
            "paper": f"{PAPER[n]} on GLUE's average over {ALONE}, one run",
        }
        for n in WEAK
    ]
    claims += [  # finer than scores: it tells arms apart that fine-tuning does not
        {
            "text": f"A teacher of {n} layer{'s' * (n > 1)} lowers the held-out loss",
            "arm": f"with{n}",
            "paper": "not measured there",
        }
        for n in WEAK
    ]
    return shared.study(scale, "Teacher quality", [*teachers, alone, *taught], claims)
