"""A chain of generations: 1 layer teaches 2, which teaches 4, which teaches 6; against one hop.

dwt study --config=configs/study/chain.py:cpu --workdir=studies/chain
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    taught = ["distill.preset=paper_decay"]
    arms = [
        shared.arm("first", scale, "teacher1", label="1 layer"),
        shared.arm("second", scale, "teacher2", label="2 layers, taught by 1", teacher="first", set=taught),
        shared.arm("third", scale, "teacher4", label="4 layers, taught by 2", teacher="second", set=taught),
        shared.arm("alone", scale, label="student alone", finetune_at=[1.0]),
        shared.arm("hop", scale, label="taught by 1", teacher="first", set=taught, finetune_at=[1.0]),
        shared.arm(
            "chain", scale, label="taught by 1 → 2 → 4", teacher="third", set=taught, finetune_at=[1.0]
        ),
    ]
    claims = [
        {
            "text": "A chain of generations ends better than one big hop",
            "arm": "chain",
            "against": "hop",
            "measure": "held_out_loss",
            "paper": "Qin et al. 2022: chains of generations beat one big hop",
        }
    ]
    return shared.study(scale, "Generations", arms, claims)
