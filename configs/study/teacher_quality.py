"""The paper's first study: does a weak, a very weak, an extremely weak teacher help?

    dwt study --config=configs/study/teacher_quality.py:cpu --workdir=studies/teacher_quality

Scales paper, h200 and cpu: see pretraining.py and docs/studies.md.
"""

from ml_collections import ConfigDict

from dwt_jax.config_file import beside

WEAK = {4: "weak", 2: "very weak", 1: "extremely weak"}
PAPER = {4: "+1.44", 2: "−1.37", 1: "−2.76"}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = beside(__file__, "shared")
    teachers = [
        shared.arm(f"teacher{n}", scale, f"teacher{n}", label=f"teacher of {n}", finetune_at=[1.0])
        for n in WEAK
    ]
    taught = [
        shared.arm(
            f"with{n}",
            scale,
            label=f"with the {WEAK[n]} teacher ({n})",
            teacher=f"teacher{n}",
            set=["distill.preset=paper_normal"],
            finetune_at=[1.0],
        )
        for n in WEAK
    ]
    alone = shared.arm("alone", scale, label="student alone", finetune_at=[1.0])
    claims = [
        {
            "text": f"A teacher of {n} layer{'s' * (n > 1)} {'helps' if n == 4 else 'harms'}",
            "arm": f"with{n}",
            "measure": "average",
            "expected": "better" if n == 4 else "worse",
            "paper": f"{PAPER[n]} on GLUE's average over 79.89, one run",
        }
        for n in WEAK
    ]
    claims += [  # finer than scores: it tells arms apart that fine-tuning does not
        {
            "text": f"A teacher of {n} layer{'s' * (n > 1)} lowers the held-out loss",
            "arm": f"with{n}",
            "paper": "not measured there",
        }
        for n in WEAK
    ]
    return shared.study(scale, "Teacher quality", [*teachers, alone, *taught], claims)
