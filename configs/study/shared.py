"""Settings that the studies share: seeds, tasks, out-of-domain text. Not a config itself."""

from typing import Any

from ml_collections import ConfigDict

SEEDS = [0, 1, 2]
TASKS = {
    "paper": ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"],
    "h200": ["cola", "sst2", "mrpc", "stsb", "rte"],
    "cpu": ["cola", "sst2", "mrpc", "stsb", "rte"],
}
FINETUNE_AT = {  # shares of the steps after which students are fine-tuned
    "paper": [0.1, 0.3, 0.5, 0.7, 0.9, 1.0],
    "h200": [0.1, 0.3, 0.5, 0.7, 1.0],
    "cpu": [0.3, 1.0],
}


def arm(name: str, scale: str, run: str = "student", **fields: Any) -> dict[str, Any]:
    """Return an arm of a study. `fields`: further fields of `dwt_jax.study.sweep.Arm`."""
    seeds = {} if run.startswith("teacher") else {"seeds": SEEDS}
    role = "teacher" if run.startswith("teacher") else "student"
    config = f"configs/study/pretraining.py:{scale}-{run}"
    return {"name": name, "config": config, "role": role, **seeds, **fields}


def study(scale: str, title: str, arms: list[Any], claims: list[Any]) -> ConfigDict:
    """Return the config of a study."""
    if scale not in TASKS:
        raise ValueError(f"no scale {scale!r}, expected one of {', '.join(TASKS)}")
    small = [
        "examples.max_train_examples=1500",
        "recipe.max_length=64",
        "recipe.epochs=2",
        "recipe.seeds=[0,1]",
    ]
    small += ["recipe.batch_size=16", "recipe.optimizer.learning_rate.value=5e-4"]
    small += ["recipe.group_by_length=true"]
    glue = [] if scale == "paper" else ["examples.kind=glue", "examples.path=data/glue"]
    books = [
        "data.sources.0.path=data/books.txt.xz",
        "data.sources.0.documents=lines",
        "data.sentence_stride=50",
        "data.validation_fraction=0.02",
    ]
    return ConfigDict(
        {
            "title": f"{title} ({scale})",
            "baseline": "alone",
            "arms": arms,
            "finetuning": {
                "config": "configs/glue.py",
                "tasks": TASKS[scale],
                "set": [*glue, *(small if scale == "cpu" else [])],
            },
            "out_of_domain": {}
            if scale == "paper"
            else {"config": f"configs/study/pretraining.py:{scale}-student", "set": books},
            "claims": claims,
        }
    )
