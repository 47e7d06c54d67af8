"""FLOPs to the quality of the baseline, with the teacher's forward pass and with its training.

    dwt study --config=configs/study/budget.py:cpu --workdir=studies/budget

The result is the table "FLOPs to the baseline's loss" of the report. Nothing is fine-tuned.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

VARIANTS = {  # name: label, overrides
    "normal": ("1 : 1", ["distill.preset=paper_normal"]),
    "decay": ("1 : 4 falling to 1 : 1", ["distill.preset=paper_decay"]),
    "inherit": ("Knowledge Inheritance", ["distill.preset=knowledge_inheritance"]),
    "grown": ("grown by interleaving, 1 : 1", ["distill.preset=paper_normal", "init.method=interleave"]),
}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    arms = [
        shared.arm("teacher2", scale, "teacher2", label="2-layer teacher"),
        shared.arm("alone", scale, label="baseline (no teacher)"),
        *(
            shared.arm(name, scale, label=label, teacher="teacher2", set=overrides)
            for name, (label, overrides) in VARIANTS.items()
        ),
    ]
    return shared.study(scale, "Budget", arms, [])
