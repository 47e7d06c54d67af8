"""The paper's second study (figure 3): the weight of the soft loss, with checkpoints.

dwt study --config=configs/study/soft_weight.py:cpu --workdir=studies/soft_weight
"""

from typing import Any

from ml_collections import ConfigDict

from dwt_jax.config import Distill
from dwt_jax.config_loader import sibling_config

# The weight falls before the student has matched the teacher.
UNTIL_MATCHED = f"falling to 0 over the last {Distill().match_margin} nats to the teacher"


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    at = {"finetune_at": shared.FINETUNE_AT[scale]}
    soft = {  # arm: label, overrides, the paper's arm
        "strong": ("strong, α_s = 4", ["distill.preset=paper_strong"], "figure3.strong"),
        "with_weak": ("normal, α_s = 1", shared.NORMAL, "figure3.normal"),
        "decay": ("α_s from 4 to 1", ["distill.preset=paper_decay"], ""),
        "early_weak": ("α_s from 4 to 0 over a quarter", shared.EARLY, ""),
        "early_1to0": (
            "α_s from 1 to 0 over a quarter",
            [*shared.EARLY, "distill.alpha_soft.value=1"],
            "",
        ),
        "until_matched": (
            f"α_s = 1, {UNTIL_MATCHED}",
            [*shared.NORMAL, "distill.alpha_soft.kind=until_matched"],
            "",
        ),
        "teacher_better": (
            "α_s = 1 for the tokens that the teacher predicts better",
            [*shared.NORMAL, "distill.token_selection=teacher_better"],
            "",
        ),
    }
    arms = [
        shared.teacher(scale),
        shared.baseline(scale, **at),
        *(
            shared.student(name, scale, label=label, teacher="weak", set=overrides, paper=paper, **at)
            for name, (label, overrides, paper) in soft.items()
        ),
    ]
    labels = {name: label for name, (label, *_) in soft.items()}
    return shared.study(scale, "Weight of the soft loss", arms, _claims(shared, scale, labels))


def _claims(shared: Any, scale: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    early = shared.early_measure(scale)
    claims = [
        {
            "text": "Strong weighting is better than normal early in training",
            "arm": "strong",
            "against": "with_weak",
            **early,
            "paper": "MNLI ≈79.5 against ≈78.0 at epoch 2, read off figure 3",
        },
        {
            "text": "Strong weighting is worse than normal at the end",
            "arm": "strong",
            "against": "with_weak",
            "measure": "average",
            "expected": "worse",
            "paper": "MNLI ≈79.0 against ≈79.3 at epoch 18, read off figure 3",
        },
        {
            "text": "α_s from 4 to 1 ends with a higher average than normal weighting",
            "arm": "decay",
            "against": "with_weak",
            "measure": "average",
            "paper": "advised, not run",
        },
    ]
    for name, expected in (
        ("strong", "worse"),
        ("decay", "better"),
        ("early_weak", "better"),
        ("early_1to0", "better"),
        ("until_matched", "better"),
        ("teacher_better", "better"),
    ):
        paper = {"strong": "not measured", "decay": "advised, not run"}.get(name, "not run")
        word = "higher" if expected == "worse" else "lower"
        claims.append(
            {
                "text": f"{labels[name]}: a {word} held-out loss than with normal weighting",
                "arm": name,
                "against": "with_weak",
                "expected": expected,
                "paper": paper,
            }
        )
    claims += [
        {
            "text": f"{labels[name]}: a lower held-out loss than without a teacher",
            "arm": name,
            "paper": "not run",
        }
        for name in ("early_weak", "early_1to0", "until_matched", "teacher_better")
    ]
    return claims
