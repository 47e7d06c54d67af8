"""Knowledge Inheritance (Qin et al. 2022): (1 − α) · hard + α · t² · soft, α from 1 to 0 at varying steps.

dwt study --config=configs/study/knowledge_inheritance.py:cpu --workdir=studies/inheritance
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

DECAY_ENDS = (0.1, 0.25, 0.5, 0.75)  # shares of the steps


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    arms = [
        shared.teacher(scale),
        shared.baseline(scale),
    ]
    for share in DECAY_ENDS:
        decay_ends = [f"distill.{key}.decay_end={share}" for key in ("alpha_hard", "alpha_soft")]
        arms.append(
            shared.student(
                f"until{round(100 * share)}",
                scale,
                label=f"α to 0 at {share:.0%}",
                teacher="weak",
                set=["distill.preset=knowledge_inheritance", *decay_ends],
                finetune_at=[1.0],
            )
        )
    claims = [
        {
            "text": "Inheritance over a quarter of the steps helps",
            "arm": "until25",
            "measure": "held_out_loss",
            "paper": "Qin et al. 2022: 27 % of the compute saved by perplexity",
        }
    ]
    return shared.study(scale, "Knowledge Inheritance", arms, claims)
