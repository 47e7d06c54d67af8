"""`dwt demo`: a weak teacher, a student alone and with its help, and what came of it."""

import time
from pathlib import Path
from typing import NamedTuple

from dwt_jax.config import Config
from dwt_jax.config_loader import config_path, load
from dwt_jax.finetune import config as finetuning
from dwt_jax.finetune.collate import Texts
from dwt_jax.finetune.runner import finetune
from dwt_jax.runs.metric_writer import duration
from dwt_jax.runs.run_dir import write_json
from dwt_jax.study import report
from dwt_jax.train.loop import train


class Planned(NamedTuple):
    name: str
    label: str
    run: str  # of configs/demo.py
    overrides: dict[str, str]


PLAN = (
    Planned("teacher", "weak teacher", "teacher", {}),
    Planned("alone", "student alone", "student", {}),
    Planned("alone-seed1", "student alone, another seed", "student", {"seed": "1"}),
    Planned("normal", "with the teacher, 1 : 1", "student", {"distill.preset": "paper_normal"}),
    Planned("strong", "with the teacher, 1 : 4", "student", {"distill.preset": "paper_strong"}),
    Planned(
        "decay", "with the teacher, 1 : 4 falling to 1 : 1", "student", {"distill.preset": "paper_decay"}
    ),
    Planned(
        "grown",
        "grown from the teacher (FNA), with it 1 : 1",
        "student",
        {"distill.preset": "paper_normal", "init.method": "fna"},
    ),
)
"""Students have the same number of steps, and all but the one that measures the noise the
same seed: the same initial parameters (but for the one grown from the teacher's), data order and
masks."""


DOWNSTREAM = ("teacher", "alone", "normal")
"""Which of them are fine-tuned: on the built-in task, by a part of its examples, for about a minute."""


def run(workdir: Path, scale: float = 1.0) -> Path:
    """Train what PLAN says below `workdir`, write the report and return its path.

    `scale`: share of the steps, for trials. Finished runs are kept, so a demo that was
    stopped goes on where it was.
    """
    began, resumed = time.perf_counter(), (workdir / PLAN[0].name).exists()
    for planned in PLAN:
        train(_config(planned, workdir, scale), workdir / planned.name)
    _fine_tune(workdir, scale)
    command = f"dwt demo --workdir={workdir}" + (f" --scale={scale:g}" if scale != 1 else "")
    seconds = time.perf_counter() - began
    write_json(
        workdir / "study.json",
        {
            "title": "A weak teacher on the State of the Union",
            "teacher": "teacher",
            "baseline": "alone",
            "noise_pair": ["alone", "alone-seed1"],
            "runs": [
                {"name": p.name, "label": p.label, "role": "teacher" if p.name == "teacher" else "student"}
                for p in PLAN
            ],
            "command": command,
            "seconds": None if resumed else seconds,  # of all of it, or not at all
        },
    )
    path = report.write(workdir)
    print(f"demo: {duration(seconds)}{', resumed' if resumed else ' in all'}; report in {path}", flush=True)
    return path


def _fine_tune(workdir: Path, scale: float) -> None:
    overrides = {
        "recipe.seeds": "[0, 1]",
        "recipe.epochs": "2",
        "examples.limit": str(max(64, round(4000 * scale))),
    }
    todo, texts = [finetuning.load(f"{config_path('glue.py')}:era", overrides)], Texts()
    for name in DOWNSTREAM:
        finetune(todo, str(workdir / name), workdir / report.DOWNSTREAM / name, texts=texts)


def _config(planned: Planned, workdir: Path, scale: float) -> Config:
    overrides = dict(planned.overrides)
    if "distill.preset" in overrides:
        overrides["teacher.path"] = str(workdir / "teacher")
    path = config_path("demo.py")
    steps = load(f"{path}:{planned.run}").train.steps
    overrides["train.steps"] = str(max(2, round(steps * scale)))
    return load(f"{path}:{planned.run}", overrides)
