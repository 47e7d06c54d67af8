"""The paper's first study: does a weak, a very weak, an extremely weak teacher help?

    dwt study --config=configs/study/teacher_quality.py:cpu --workdir=studies/teacher_quality

Scales paper, h200 and cpu: see pretraining.py and docs/studies.md. At cpu, a student and a teacher in BERT's
shape with BERT's recipe stand beside the others, with two seeds.
"""

from typing import Any

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config
from dwt_jax.study.paper_results import PAPER_TABLE_1
from dwt_jax.text_format import format_float

LAYERS = {"weak": 4, "very_weak": 2, "extremely_weak": 1}  # of the paper's teachers
BASELINE_SCORE = PAPER_TABLE_1["table1.alone"].average
PAPER = {
    run: format_float(PAPER_TABLE_1[f"table1.with{n}"].change, 2, signed=True) for run, n in LAYERS.items()
}


def get_config(scale: str = "cpu") -> ConfigDict:
    shared = sibling_config(__file__, "shared")
    teachers = [
        shared.teacher(scale, run, finetune_at=[1.0], paper=f"table1.teacher{n}") for run, n in LAYERS.items()
    ]
    distilled = [
        shared.student(
            f"with_{run}",
            scale,
            label=f"with the {shared.WEAK[run]} teacher, α_s = 1",
            teacher=run,
            set=shared.NORMAL,
            finetune_at=[1.0],
            paper=f"table1.with{n}",
        )
        for run, n in LAYERS.items()
    ]
    early = [
        shared.student(
            f"early_{run}",
            scale,
            label=f"with the {shared.WEAK[run]} teacher, α_s from 4 to 0 over a quarter",
            teacher=run,
            set=shared.EARLY,
        )
        for run in LAYERS
    ]
    arms = [*teachers, shared.baseline(scale, paper="table1.alone"), *distilled, *early]
    return shared.study(
        scale, "Teacher quality", [*arms, *(_bert(shared) if scale == "cpu" else [])], _claims(shared, scale)
    )


def _bert(shared: Any) -> list[dict[str, Any]]:
    seeds = {"seeds": [0, 1]}
    return [
        shared.teacher("cpu", "bert_weak", label="BERT: weak teacher", **seeds),
        shared.student("bert", "cpu", "bert", label="BERT: no teacher", **seeds),
        shared.student(
            "bert_with_weak",
            "cpu",
            "bert",
            label="BERT: with the weak teacher, α_s = 1",
            teacher="bert_weak",
            set=shared.NORMAL,
            **seeds,
        ),
    ]


def _claims(shared: Any, scale: str) -> list[dict[str, Any]]:
    claims = [
        {
            "text": f"The {shared.WEAK[run]} teacher {'raises' if run == 'weak' else 'lowers'} the average",
            "arm": f"with_{run}",
            "measure": "average",
            "expected": "better" if run == "weak" else "worse",
            "paper": f"{PAPER[run]} on GLUE's average over {BASELINE_SCORE}, one run",
        }
        for run in LAYERS
    ]
    for run in LAYERS:
        words = shared.WEAK[run]
        claims += [
            {
                "text": f"With the {words} teacher throughout, the held-out loss is higher",
                "arm": f"with_{run}",
                "expected": "worse",
                "paper": "not measured",
            },
            {
                "text": f"With the {words} teacher over the first quarter, the held-out loss is lower",
                "arm": f"early_{run}",
                "paper": "not run",
            },
        ]
        if shared.PAIRS_AT[scale]:
            claims.append(
                {
                    "text": f"With the {words} teacher over the first quarter, BLiMP is higher",
                    "arm": f"early_{run}",
                    "measure": "blimp",
                    "paper": "not run",
                }
            )
    if scale == "cpu":
        claims.append(
            {
                "text": "With BERT's recipe, the weak teacher lowers the held-out loss",
                "arm": "bert_with_weak",
                "against": "bert",
                "paper": "not measured",
            }
        )
    return claims
