"""GLUE and the built-in tasks, with a recipe for each.

    dwt finetune --model=runs/student --workdir=runs/era
    dwt finetune --model=runs/student --workdir=runs/glue --task=cola,rte \\
        --config.examples.kind=glue --config.examples.path=GLUE_FOLDER

Arguments are era, party (built-in), files (your own, see docs/finetuning.md) and cola, sst2, mrpc, stsb,
qqp, mnli, qnli, rte, wnli, which are read from TFDS unless examples.kind is glue.

large: BERT's recipe (Devlin et al. 2019, arXiv 1810.04805, appendix A.3: batch 32, 3 epochs, 2e-5 of
    the four rates tried; warm-up 10 %, decay 0.01, clipping 1 and ε 1e-6 as in its run_classifier.py).
small: Mosbach et al. 2021 (arXiv 2006.04884, section 6): batch 16, 2e-5, 20 epochs, warm-up 10 %, decay
    0.01, with bias correction; tuned on RTE, MRPC and CoLA, used for STS-B and WNLI too.
builtin: for small models trained with dwt-jax; see docs/finetuning.md.
"""

from ml_collections import ConfigDict

RECIPES = {  # batch size, epochs, learning rate
    "large": (32, 3, 2e-5),
    "small": (16, 20, 2e-5),
    "builtin": (32, 5, 5e-4),
}
TASKS = {
    **dict.fromkeys(("sst2", "qqp", "mnli", "qnli", "files"), "large"),
    **dict.fromkeys(("cola", "mrpc", "stsb", "rte", "wnli"), "small"),
    **dict.fromkeys(("era", "party"), "builtin"),
}


def get_config(task: str = "era") -> ConfigDict:
    if task not in TASKS:
        raise ValueError(f"no task {task!r}, expected one of {', '.join(TASKS)}")
    batch_size, epochs, learning_rate = RECIPES[TASKS[task]]
    kind = {"era": "builtin", "party": "builtin", "files": "files"}.get(task, "tfds")
    return ConfigDict(
        {
            "examples": {"kind": kind, "task": task},
            "recipe": {
                "batch_size": batch_size,
                "epochs": epochs,
                "max_length": 128,
                "seeds": [0, 1, 2],
                "dropout": 0.1,
                "optimizer": {
                    "learning_rate": {"kind": "linear", "value": learning_rate, "warmup_fraction": 0.1},
                    "weight_decay": 0.01,
                    "clip_norm": 1.0,
                    "eps": 1e-6,
                },
            },
        }
    )
