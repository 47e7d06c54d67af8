"""FLOPs to the quality of the student alone: the teacher's forward charged, and its own training too.

    dwt study --config=configs/study/budget.py:cpu --workdir=studies/budget

The table "FLOPs to the student alone's loss" of the report is what it is about; nothing is fine-tuned.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

WAYS = {
    "normal": ("1 : 1", ["distill.preset=paper_normal"]),
    "decay": ("1 : 4 falling to 1 : 1", ["distill.preset=paper_decay"]),
    "inherit": ("Knowledge Inheritance", ["distill.preset=knowledge_inheritance"]),
    "grown": ("grown by interleaving, 1 : 1", ["distill.preset=paper_normal", "init.method=interleave"]),
}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    arms = [
        shared.arm("teacher2", scale, "teacher2", label="teacher of 2"),
        shared.arm("alone", scale, label="student alone"),
        *(
            shared.arm(name, scale, label=label, teacher="teacher2", set=how)
            for name, (label, how) in WAYS.items()
        ),
    ]
    return shared.study(scale, "Budget", arms, [])
