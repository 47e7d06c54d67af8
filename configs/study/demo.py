"""The demo: students with and without a weak teacher on the built-in corpus, for minutes on two CPU cores.

    dwt demo
    dwt study --config=configs/study/demo.py --workdir=demo   # the same

The argument multiplies the number of steps and of fine-tuning examples: configs/study/demo.py:0.05. All
students have the same number of steps and, with the same seed, the same rows, masks and, if they are not
grown, initial parameters. All have the teacher of seed 0.
"""

from ml_collections import ConfigDict

TEACHER, STUDENT = "configs/modernbert.py:1x128", "configs/modernbert.py:2x128"
TEACHER_STEPS, STUDENT_STEPS = 900, 1700
SEEN = ("teacher", "alone", "early")  # fine-tuned, scored on minimal pairs, and asked for masked words
GROWN = ("init.method=stack", "init.new_layers=zero")
ARMS = {  # label, overrides
    "alone": ("student alone", ()),
    "early": ("student, teacher 4 → 0 over half", ("distill.preset=early_decay",)),
    "constant": ("student, teacher 1 : 1 throughout", ("distill.preset=paper_normal",)),
    "grown": ("student grown from the teacher", GROWN),
    "grown-early": ("grown, teacher 4 → 0 over half", (*GROWN, "distill.preset=early_decay")),
}


def get_config(scale: str = "1") -> ConfigDict:
    factor = float(scale)

    def steps(count: int) -> str:
        return f"train.steps={max(2, round(count * factor))}"

    arms = [
        {
            "name": "teacher",
            "label": "weak teacher (1 layer)",
            "role": "teacher",
            "config": TEACHER,
            "set": [steps(TEACHER_STEPS)],
        }
    ]
    for name, (label, overrides) in ARMS.items():
        arms.append(
            {
                "name": name,
                "label": label,
                "config": STUDENT,
                "set": [steps(STUDENT_STEPS), *overrides],
                "teacher": "teacher" if any("distill" in text for text in overrides) else "",
                "source": "teacher" if "grown" in name else "",
                "seeds": [0, 1],
            }
        )
    for arm in arms:
        arm["finetune_at"] = arm["pairs_at"] = [1.0] if arm["name"] in SEEN else []
    return ConfigDict(
        {
            "title": "A weak teacher on the State of the Union",
            "baseline": "alone",
            "arms": arms,
            "set": ["train.eval_every=425", "train.save_every=850", "train.log_every=170"],
            "masked_words": {"arms": SEEN, "rows": 6},
            "pairs": {"sets": ["grammar"], "max_pairs": 100},
            "finetuning": {
                "config": "configs/glue.py",
                "tasks": ["era"],
                "bag_of_words": True,
                "set": [
                    "recipe.seeds=[0,1]",
                    "recipe.epochs=2",
                    f"examples.max_train_examples={max(64, round(4000 * min(factor, 1)))}",
                ],
            },
        }
    )
