"""The paper's second study: how much of the soft loss, fine-tuned along the way (its figure 3).

dwt study --config=configs/study/soft_weight.py:cpu --workdir=studies/soft_weight
"""

from ml_collections import ConfigDict

from dwt_jax.config import Distill
from dwt_jax.config_loader import sibling_config

# The student begins to lose its teacher before it has beaten it.
UNTIL = f"falling to 0 over the last {Distill().match_margin} nats to the teacher"
SOFT = {  # label, what is set, the paper's arm
    "strong": ("1 : 4", ["distill.preset=paper_strong"], "figure3.strong"),
    "normal": ("1 : 1", ["distill.preset=paper_normal"], "figure3.normal"),
    "decay": ("1 : 4 falling to 1 : 1", ["distill.preset=paper_decay"], ""),
    "until_matched": (
        f"1 : 1 {UNTIL}",
        ["distill.alpha_soft.kind=until_matched", "distill.alpha_soft.value=1"],
        "",
    ),
}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    along = {"finetune_at": shared.ALONG[scale]}
    arms = [
        shared.arm("teacher4", scale, "teacher4", label="teacher of 4"),
        shared.arm("alone", scale, label="student alone", **along),
        *(
            shared.arm(name, scale, label=label, teacher="teacher4", set=how, paper=paper, **along)
            for name, (label, how, paper) in SOFT.items()
        ),
    ]
    first, last = shared.ALONG[scale][0], shared.ALONG[scale][-1]
    claims = [
        {
            "text": f"Strong weighting is {word} than normal {when}",
            "arm": "strong",
            "against": "normal",
            "measure": "average",
            "at": at,
            "expected": word,
            "paper": f"MNLI {numbers}, read off figure 3",
        }
        for word, when, at, numbers in (
            ("better", "early on", first, "≈79.5 against ≈78.0 at epoch 2"),
            ("worse", "at the end", last, "≈79.0 against ≈79.3 at epoch 18"),
        )
    ]
    claims += [
        {
            "text": f"{SOFT[name][0]} ends with a lower held-out loss than 1 : 1",
            "arm": name,
            "against": "normal",
            "paper": "not measured there",
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
            ("until_matched", UNTIL.capitalize()),
        )
    ]
    return shared.study(scale, "Weight of the soft loss", arms, claims)
