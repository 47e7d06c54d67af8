"""The paper's third study (figure 4): initialization from the teacher's weights (its PR, our fna) or at
random, with checkpoints; later remapping methods; and each without a teacher too. At cpu and h200 also exact
growth with half the steps, for what growth saves.

    dwt study --config=configs/study/remapping.py:cpu --workdir=studies/remapping
"""

from typing import Any

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

METHODS = {  # arm: label, overrides, the paper's arm
    "fna": ("last layer repeated (PR)", ["init.method=fna"], "figure4.remapped"),
    "stack": ("stacked", ["init.method=stack"], ""),
    "interleave": ("interleaved", ["init.method=interleave"], ""),
    "exact": ("grown exactly", ["init.method=stack", "init.new_layers=zero"], ""),
}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    at = {"finetune_at": shared.FINETUNE_AT[scale]}
    methods = {**METHODS}
    if scale == "paper":
        del methods["exact"]  # no layer of a post-norm BERT is the identity
    arms = [
        shared.teacher(scale),
        shared.baseline(scale),
        shared.student(
            "with_weak",
            scale,
            label="random initialization, α_s = 1",
            teacher="weak",
            set=shared.NORMAL,
            paper="figure4.random",
            **at,
        ),
    ]
    for name, (label, overrides, paper) in methods.items():
        grown = {"source": "weak"}
        arms += [
            shared.student(name, scale, label=f"{label}, no teacher", set=overrides, **grown),
            shared.student(
                f"{name}_taught",
                scale,
                label=f"{label}, α_s = 1",
                teacher="weak",
                set=[*overrides, *shared.NORMAL],
                paper=paper,
                **at,
                **grown,
            ),
        ]
    if "exact" in methods:
        config = sibling_config(__file__, "pretraining").get_config(f"{scale}-student")
        half = f"train.steps={config.train.steps // 2}"
        once = {"finetune_at": [1.0], "pairs_at": [1.0]}
        set_ = [*methods["exact"][1], half]
        label = "grown exactly, half the steps, no teacher"
        arms.append(shared.student("exact_half", scale, label=label, source="weak", set=set_, **once))
    labels = {name: label for name, (label, *_) in methods.items()}
    return shared.study(scale, "Parameter remapping", arms, _claims(shared, scale, labels))


def _claims(shared: Any, scale: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    against = {"arm": "fna_taught", "against": "with_weak"}
    claims = [
        {
            "text": "With a teacher, remapping (PR) is better than random initialization early in training",
            **against,
            **shared.early_measure(scale),
            "paper": "better at epoch 0",
        },
        {
            "text": "With a teacher, remapping (PR) is worse than random initialization at the end",
            **against,
            "measure": "average",
            "expected": "worse",
            "paper": "MNLI ≈77.3 against ≈79.6 at epoch 18, read off figure 4",
        },
    ]
    for name, label in labels.items():
        claims += [
            {
                "text": f"Without a teacher, {label}: a lower held-out loss than from random initialization",
                "arm": name,
                "paper": "not run",
            },
            {
                "text": f"{label.capitalize()}: a teacher throughout raises the held-out loss",
                "arm": f"{name}_taught",
                "against": name,
                "expected": "worse",
                "paper": "not run",
            },
        ]
    if "exact" in labels:
        claims += [
            {
                "text": f"Grown exactly, with half the steps: {text} than without growth, with all",
                "arm": "exact_half",
                "measure": measure,
                "paper": "not run",
            }
            for measure, text in (
                ("held_out_loss", "a lower held-out loss"),
                ("average", "a higher average"),
                ("blimp", "a higher accuracy on BLiMP"),
            )
        ]
    return claims
