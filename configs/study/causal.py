"""Do the findings about masked models carry over to decoders? Teacher quality and weight, for next tokens:

    dwt study --config=configs/study/causal.py --workdir=studies/causal

The arms that tell most about masked models at the scale cpu (teacher_quality.py, soft_weight.py).
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

SCALE = "causal"


def get_config() -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    soft = {  # arm: label, teacher, overrides
        "early_weak": ("weak teacher, α_s from 4 to 0 over a quarter", "weak", shared.EARLY),
        "with_weak": ("weak teacher, α_s = 1", "weak", shared.NORMAL),
        "early_1to0": (
            "weak teacher, α_s from 1 to 0 over a quarter",
            "weak",
            [*shared.EARLY, "distill.alpha_soft.value=1"],
        ),
        "early_very_weak": ("very weak teacher, α_s from 4 to 0 over a quarter", "very_weak", shared.EARLY),
        "strong": ("weak teacher, α_s = 4", "weak", ["distill.preset=paper_strong"]),
    }
    arms = [
        shared.teacher(SCALE),
        shared.baseline(SCALE, finetune_at=[]),
        shared.teacher(SCALE, "very_weak"),
        *(
            shared.student(name, SCALE, label=label, teacher=teacher, set=overrides)
            for name, (label, teacher, overrides) in soft.items()
        ),
    ]
    return shared.study(SCALE, "Decoders with a weak teacher", arms, _claims(soft))


def _claims(soft: dict[str, tuple[str, str, list[str]]]) -> list[dict[str, str]]:
    """Return what is expected, written down before the first run: what the masked models showed."""
    words = {"better": "lower", "worse": "higher"}
    expected = {
        "early_weak": "better",
        "with_weak": "worse",
        "early_1to0": "better",
        "early_very_weak": "better",
        "strong": "worse",
    }
    claims = [
        {
            "text": f"{soft[arm][0]}: a {words[value]} held-out loss than without a teacher",
            "arm": arm,
            "expected": value,
            "paper": "masked models only",
        }
        for arm, value in expected.items()
    ]
    return [
        *claims,
        {
            "text": f"{soft['early_weak'][0]}: BLiMP is higher",
            "arm": "early_weak",
            "measure": "blimp",
            "paper": "masked models only",
        },
    ]
