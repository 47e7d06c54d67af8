"""FLOPs to the quality of the baseline, with the teacher's forward pass and with its training.

    dwt study --config=configs/study/budget.py:cpu --workdir=studies/budget

The result is the table "FLOPs to the baseline's loss" of the report. Nothing is fine-tuned.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    variants = {  # arm: label, overrides
        "with_very_weak": ("α_s = 1", shared.NORMAL),
        "early_very_weak": ("α_s from 4 to 0 over a quarter", shared.EARLY),
        "decay_very_weak": ("α_s from 4 to 1", ["distill.preset=paper_decay"]),
        "inherit_very_weak": ("Knowledge Inheritance", ["distill.preset=knowledge_inheritance"]),
        "grown_very_weak": ("grown by interleaving, α_s = 1", [*shared.NORMAL, "init.method=interleave"]),
    }
    arms = [
        shared.teacher(scale, "very_weak"),
        shared.baseline(scale, finetune_at=[]),
        *(
            shared.student(name, scale, label=label, teacher="very_weak", set=overrides)
            for name, (label, overrides) in variants.items()
        ),
    ]
    return shared.study(scale, "Budget", arms, [])
