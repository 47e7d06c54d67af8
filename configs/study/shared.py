"""What the studies share: seeds, tasks, text of another domain, claims. Not a config itself."""

from ml_collections import ConfigDict

SEEDS = [0, 1, 2]
TASKS = {
    "paper": ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"],
    "h200": ["cola", "sst2", "mrpc", "stsb", "rte"],
    "cpu": ["cola", "sst2", "mrpc", "stsb", "rte"],
}
ALONG = [0.1, 0.3, 0.5, 0.7, 1.0]  # of the steps: fine-tuned there


def arm(name: str, scale: str, run: str = "student", **more) -> dict:
    students = {} if run.startswith("teacher") else {"seeds": SEEDS}
    role = "teacher" if run.startswith("teacher") else "student"
    config = f"configs/study/pretraining.py:{scale}-{run}"
    return {"name": name, "config": config, "role": role, **students, **more}


def study(scale: str, title: str, arms: list, claims: list) -> ConfigDict:
    if scale not in TASKS:
        raise ValueError(f"no scale {scale!r}, expected one of {', '.join(TASKS)}")
    limit = {"cpu": ["examples.limit=4000", "recipe.max_length=64"], "h200": [], "paper": []}[scale]
    rate = {"cpu": ["recipe.optimizer.learning_rate.value=3e-4", "recipe.epochs=3"], "h200": [], "paper": []}[
        scale
    ]
    glue = [] if scale == "paper" else ["examples.kind=glue", "examples.path=data/glue"]
    books = [
        "data.sources.0.path=data/books.txt.xz",
        "data.sources.0.documents=lines",
        "data.keep_every=50",
        "data.held_out=0.1",
    ]
    return ConfigDict(
        {
            "title": f"{title} ({scale})",
            "baseline": "alone",
            "arms": arms,
            "finetuning": {
                "config": "configs/glue.py",
                "tasks": TASKS[scale],
                "set": [*glue, *limit, *rate],
            },
            "elsewhere": {}
            if scale == "paper"
            else {"config": f"configs/study/pretraining.py:{scale}-student", "set": books},
            "claims": claims,
        }
    )
