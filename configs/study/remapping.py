"""The paper's third study (figure 4): initialization from the teacher's weights (its PR, our fna) or at
random, with fine-tuned checkpoints; and later remapping methods.

    dwt study --config=configs/study/remapping.py:cpu --workdir=studies/remapping
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

METHODS = {  # method: label, the paper's arm
    "fna": ("last layer repeated (PR)", "figure4.remapped"),
    "stack": ("stacked", ""),
    "interleave": ("interleaved", ""),
    "ligo": ("learned", ""),
}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    distilled = {"teacher": "teacher4", "finetune_at": shared.FINETUNE_AT[scale]}
    normal = ["distill.preset=paper_normal"]
    arms = [
        shared.arm("teacher4", scale, "teacher4", label="4-layer teacher"),
        shared.arm("alone", scale, label="baseline (no teacher)", finetune_at=[1.0]),
        shared.arm(
            "random",
            scale,
            label="random initialization, 1 : 1",
            set=normal,
            paper="figure4.random",
            **distilled,
        ),
        *(
            shared.arm(
                name,
                scale,
                label=f"{label}, 1 : 1",
                set=[*normal, f"init.method={name}"],
                paper=paper,
                **distilled,
            )
            for name, (label, paper) in METHODS.items()
        ),
    ]
    claims = [
        {
            "text": f"Remapping (PR) is {expected} than random initialization {phase}",
            "arm": "fna",
            "against": "random",
            "measure": "average",
            "at": share,
            "expected": expected,
            "paper": paper,
        }
        for expected, phase, share, paper in (
            ("better", "early in training", shared.FINETUNE_AT[scale][0], "better at epoch 0"),
            ("worse", "at the end", 1.0, "MNLI ≈77.3 against ≈79.6 at epoch 18, read off figure 4"),
        )
    ]
    return shared.study(scale, "Parameter remapping", arms, claims)
