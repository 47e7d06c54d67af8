"""The paper's second study (figure 3): the weight of the soft loss, with fine-tuned checkpoints.

dwt study --config=configs/study/soft_weight.py:cpu --workdir=studies/soft_weight
"""

from ml_collections import ConfigDict

from dwt_jax.config import Distill
from dwt_jax.config_loader import sibling_config

# The weight falls before the student has matched the teacher.
UNTIL_MATCHED = f"falling to 0 over the last {Distill().match_margin} nats to the teacher"
SOFT = {  # arm: label, overrides, the paper's arm
    "strong": ("1 : 4", ["distill.preset=paper_strong"], "figure3.strong"),
    "normal": ("1 : 1", ["distill.preset=paper_normal"], "figure3.normal"),
    "decay": ("1 : 4 falling to 1 : 1", ["distill.preset=paper_decay"], ""),
    "until_matched": (
        f"1 : 1 {UNTIL_MATCHED}",
        ["distill.alpha_soft.kind=until_matched", "distill.alpha_soft.value=1"],
        "",
    ),
}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    fields = {"finetune_at": shared.FINETUNE_AT[scale]}
    arms = [
        shared.arm("teacher4", scale, "teacher4", label="4-layer teacher"),
        shared.arm("alone", scale, label="baseline (no teacher)", **fields),
        *(
            shared.arm(name, scale, label=label, teacher="teacher4", set=overrides, paper=paper, **fields)
            for name, (label, overrides, paper) in SOFT.items()
        ),
    ]
    first, last = shared.FINETUNE_AT[scale][0], shared.FINETUNE_AT[scale][-1]
    claims = [
        {
            "text": f"Strong weighting is {expected} than normal {phase}",
            "arm": "strong",
            "against": "normal",
            "measure": "average",
            "at": share,
            "expected": expected,
            "paper": f"MNLI {numbers}, read off figure 3",
        }
        for expected, phase, share, numbers in (
            ("better", "early in training", first, "≈79.5 against ≈78.0 at epoch 2"),
            ("worse", "at the end", last, "≈79.0 against ≈79.3 at epoch 18"),
        )
    ]
    claims += [
        {
            "text": f"{SOFT[name][0]} ends with a lower held-out loss than 1 : 1",
            "arm": name,
            "against": "normal",
            "paper": "not measured",
        }
        for name in SOFT
        if name != "normal"
    ]
    claims += [
        {
            "text": f"{text} ends better than 1 : 1",
            "arm": name,
            "against": "normal",
            "measure": "average",
            "paper": "advised, not run" if name == "decay" else "",
        }
        for name, text in (
            ("decay", "Falling from 4 to 1"),
            ("until_matched", UNTIL_MATCHED.capitalize()),
        )
    ]
    return shared.study(scale, "Weight of the soft loss", arms, claims)
