"""A chain of teachers of 1, 2 and 4 layers for a student of 6, compared with a 1-layer teacher.

dwt study --config=configs/study/chain.py:cpu --workdir=studies/chain
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    decay = ["distill.preset=paper_decay"]
    arms = [
        shared.arm("first", scale, "teacher1", label="1 layer"),
        shared.arm(
            "second", scale, "teacher2", label="2 layers, 1-layer teacher", teacher="first", set=decay
        ),
        shared.arm(
            "third", scale, "teacher4", label="4 layers, 2-layer teacher", teacher="second", set=decay
        ),
        shared.arm("alone", scale, label="baseline (no teacher)", finetune_at=[1.0]),
        shared.arm(
            "hop",
            scale,
            label="6 layers, 1-layer teacher",
            teacher="first",
            set=decay,
            finetune_at=[1.0],
        ),
        shared.arm(
            "chain",
            scale,
            label="6 layers, teachers of 1 → 2 → 4 layers",
            teacher="third",
            set=decay,
            finetune_at=[1.0],
        ),
    ]
    claims = [
        {
            "text": "A chain of generations ends with a lower held-out loss than one hop",
            "arm": "chain",
            "against": "hop",
            "measure": "held_out_loss",
            "paper": "Qin et al. 2022: chains of generations beat one big hop",
        }
    ]
    return shared.study(scale, "Generations", arms, claims)
