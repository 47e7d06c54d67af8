"""Settings that the studies share: arms, seeds, tasks, pairs, out-of-domain text. Not a config itself.

Arms of one name have one config in all studies of a scale, so that studies may share their runs: make
`runs`, `pairs`, `finetuned` and `elsewhere` of a study's directory symbolic links to those of another.
"""

from typing import Any

from ml_collections import ConfigDict

SEEDS = [0, 1, 2]
WEAK = {"weak": "weak", "very_weak": "very weak", "extremely_weak": "extremely weak"}  # the paper's words
SIZES = {  # of the teachers, for labels
    "paper": {"weak": "4 layers", "very_weak": "2 layers", "extremely_weak": "1 layer"},
    "h200": {"weak": "4 layers", "very_weak": "2 layers", "extremely_weak": "1 layer"},
    "cpu": {"weak": "2 layers", "very_weak": "1 layer", "extremely_weak": "1 layer of half the width"},
    "causal": {"weak": "2 layers", "very_weak": "1 layer"},
}
TASKS = {
    "paper": ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"],
    "h200": ["cola", "sst2", "mrpc", "stsb", "rte"],
    # Left out before any student with a teacher was fine-tuned: MRPC, STS-B, RTE and WNLI, whose train sets
    # of at most 5,749 examples are too small for models that have read so little; CoLA, where the baseline is
    # at 0 (one trial: a Matthews correlation of -0.03); and QQP and QNLI, to save time.
    "cpu": ["sst2", "mnli"],
    "causal": [],
}
FINETUNE_AT = {  # shares of the steps after which students of the second and third study are fine-tuned
    "paper": [0.1, 0.3, 0.5, 0.7, 0.9, 1.0],
    "h200": [0.1, 0.3, 0.5, 0.7, 1.0],
    "cpu": [1.0],
    "causal": [],
}
PAIRS_AT = {
    "paper": [],
    "h200": [0.1, 0.3, 0.5, 0.7, 1.0],
    "cpu": [0.25, 0.5, 1.0],
    "causal": [0.25, 0.5, 1.0],
}
PAIR_SETS = ["data/minimal_pairs/blimp.zip", "data/minimal_pairs/zorro.zip"]
# α_s from 4 to 0 over the first quarter of the steps.
EARLY = ["distill.preset=early_decay", "distill.alpha_soft.decay_end=0.25"]
NORMAL = ["distill.preset=paper_normal"]


def check_scale(scale: str) -> None:
    """Raise ValueError for an unknown scale."""
    if scale not in TASKS:
        raise ValueError(f"no scale {scale!r}, expected one of {', '.join(TASKS)}")


def teacher(scale: str, run: str = "weak", **fields: Any) -> dict[str, Any]:
    """Return a teacher's arm. But at the scale of the paper, each seed of a student has its own teacher."""
    check_scale(scale)
    if run in WEAK and run not in SIZES[scale]:
        raise ValueError(f"no {WEAK[run]} teacher at scale {scale!r}")
    seeds = SEEDS if scale != "paper" else [0]
    config = f"configs/study/pretraining.py:{scale}-{run}"
    label = {"label": f"{WEAK[run]} teacher ({SIZES[scale][run]})"} if run in WEAK else {}
    pairs = {"pairs_at": [1.0]} if PAIRS_AT[scale] else {}
    return {"name": run, "config": config, "role": "teacher", "seeds": seeds, **label, **pairs, **fields}


def student(name: str, scale: str, run: str = "student", **fields: Any) -> dict[str, Any]:
    """Return a student's arm. `fields`: further fields of `dwt_jax.study.sweep.Arm`."""
    check_scale(scale)
    config = f"configs/study/pretraining.py:{scale}-{run}"
    pairs = {"pairs_at": PAIRS_AT[scale]} if PAIRS_AT[scale] else {}
    return {"name": name, "config": config, "seeds": SEEDS, **pairs, **fields}


def baseline(scale: str, **fields: Any) -> dict[str, Any]:
    """Return the arm of the student without a teacher."""
    return student("alone", scale, label="baseline (no teacher)", **{"finetune_at": [1.0], **fields})


def early_measure(scale: str) -> dict[str, Any]:
    """Return what a claim on the early part of the training measures: tasks, or else minimal pairs."""
    if len(FINETUNE_AT[scale]) > 1:
        return {"measure": "average", "at": FINETUNE_AT[scale][0]}
    return {"measure": "blimp", "at": PAIRS_AT[scale][0]}


def study(scale: str, title: str, arms: list[Any], claims: list[Any]) -> ConfigDict:
    """Return the config of a study."""
    check_scale(scale)
    small = [
        "examples.max_train_examples=22000",
        "recipe.max_length=64",
        "recipe.epochs=4",
        "recipe.seeds=[0]",
        "recipe.batch_size=32",
        "recipe.optimizer.learning_rate.value=1e-3",
        "recipe.group_by_length=true",
    ]
    glue = [] if scale == "paper" else ["examples.kind=glue", "examples.path=data/glue"]
    other_text = {  # that no run of the scale reads
        "h200": [
            "data.sources.0.path=data/books.txt.xz",
            "data.sources.0.documents=lines",
            "data.sentence_stride=50",
            "data.validation_fraction=0.02",
        ],
        "cpu": ['data.sources=[{"kind": "builtin"}]', "data.validation_fraction=0.1"],
    }
    other_text["causal"] = other_text["cpu"]
    fields = {
        "title": f"{title} ({scale})",
        "baseline": "alone",
        "arms": arms,
        "claims": claims,
    }
    if TASKS[scale]:
        settings = [*glue, *(small if scale == "cpu" else [])]
        fields["finetuning"] = {"config": "configs/glue.py", "tasks": TASKS[scale], "set": settings}
    if scale != "paper":
        config = f"configs/study/pretraining.py:{scale}-student"
        fields["out_of_domain"] = {"config": config, "set": other_text[scale]}
        fields["pairs"] = {"sets": PAIR_SETS, "max_pairs": 40}
    return ConfigDict(fields)
