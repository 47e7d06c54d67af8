"""The paper's third study: start from the teacher's weights (its PR, our fna) or at random, fine-tuned
along the way (its figure 4); and remappings that came later.

    dwt study --config=configs/study/remapping.py:cpu --workdir=studies/remapping
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

METHODS = {  # label, the paper's arm
    "fna": ("the last layer again (PR)", "figure4.remapped"),
    "stack": ("stacked", ""),
    "interleave": ("interleaved", ""),
    "ligo": ("learned", ""),
}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    taught = {"teacher": "teacher4", "finetune_at": shared.ALONG[scale]}
    normal = ["distill.preset=paper_normal"]
    arms = [
        shared.arm("teacher4", scale, "teacher4", label="teacher of 4"),
        shared.arm("alone", scale, label="student alone", finetune_at=[1.0]),
        shared.arm(
            "random",
            scale,
            label="from random weights, 1 : 1",
            set=normal,
            paper="figure4.random",
            **taught,
        ),
        *(
            shared.arm(
                name,
                scale,
                label=f"{label}, 1 : 1",
                set=[*normal, f"init.method={name}"],
                paper=paper,
                **taught,
            )
            for name, (label, paper) in METHODS.items()
        ),
    ]
    claims = [
        {
            "text": f"Remapping (PR) is {word} than random weights {when}",
            "arm": "fna",
            "against": "random",
            "measure": "average",
            "at": at,
            "expected": word,
            "paper": paper,
        }
        for word, when, at, paper in (
            ("better", "early on", shared.ALONG[scale][0], "better at epoch 0"),
            ("worse", "at the end", 1.0, "MNLI ≈77.3 against ≈79.6 at epoch 18, read off figure 4"),
        )
    ]
    return shared.study(scale, "Parameter remapping", arms, claims)
