"""A chain of an extremely weak, a very weak and a weak teacher, compared with the extremely weak one alone.

dwt study --config=configs/study/chain.py:cpu --workdir=studies/chain
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    arms = [
        shared.teacher(scale, "extremely_weak"),
        {
            **shared.teacher(scale, "very_weak", label="very weak teacher, taught by the extremely weak"),
            **{"name": "second", "teacher": "extremely_weak", "set": shared.EARLY},
        },
        {
            **shared.teacher(scale, "weak", label="weak teacher, taught by that one"),
            **{"name": "third", "teacher": "second", "set": shared.EARLY},
        },
        shared.baseline(scale),
        shared.student(
            "early_extremely_weak",
            scale,
            label="student of the extremely weak teacher",
            teacher="extremely_weak",
            set=shared.EARLY,
            finetune_at=[1.0],
        ),
        shared.student(
            "chain",
            scale,
            label="student of the weak teacher that others taught",
            teacher="third",
            set=shared.EARLY,
            finetune_at=[1.0],
        ),
    ]
    claims = [
        {
            "text": "A chain of generations ends with a lower held-out loss than one hop",
            "arm": "chain",
            "against": "early_extremely_weak",
            "measure": "held_out_loss",
            "paper": "Qin et al. 2022: chains of generations beat one big hop",
        }
    ]
    return shared.study(scale, "Generations", arms, claims)
