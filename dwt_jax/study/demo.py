"""The end-to-end demo (`dwt demo`): a weak teacher, students with and without it, and a report."""

import time
from pathlib import Path
from typing import NamedTuple

from dwt_jax.config import Config
from dwt_jax.config_loader import bundled_config_path, load_config
from dwt_jax.files import write_json
from dwt_jax.finetune import config as finetuning
from dwt_jax.finetune.collate import ExampleCache
from dwt_jax.finetune.runner import finetune_tasks
from dwt_jax.study import report
from dwt_jax.text_format import format_duration
from dwt_jax.train.loop import train


class DemoRun(NamedTuple):
    """A run of the demo."""

    name: str
    label: str  # in the report
    run: str  # argument of configs/demo.py
    overrides: dict[str, str]


DEMO_RUNS = (
    DemoRun("teacher", "weak teacher", "teacher", {}),
    DemoRun("alone", "baseline (no teacher)", "student", {}),
    DemoRun("alone-seed1", "baseline (no teacher), seed 1", "student", {"seed": "1"}),
    DemoRun("normal", "weak teacher, 1 : 1", "student", {"distill.preset": "paper_normal"}),
    DemoRun("strong", "weak teacher, 1 : 4", "student", {"distill.preset": "paper_strong"}),
    DemoRun("decay", "weak teacher, 1 : 4 falling to 1 : 1", "student", {"distill.preset": "paper_decay"}),
    DemoRun(
        "grown",
        "grown from the teacher (FNA), weak teacher, 1 : 1",
        "student",
        {"distill.preset": "paper_normal", "init.method": "fna"},
    ),
)
"""The runs of the demo. Students have the same number of steps, data order, masks and, except the one
grown from the teacher, initial parameters. One student has another seed, to measure the noise."""


FINETUNED_RUNS = ("teacher", "alone", "normal")
"""Runs that are fine-tuned on a subset of the built-in task, for about a minute."""


def run_demo(workdir: Path, scale: float = 1.0) -> Path:
    """Train DEMO_RUNS below `workdir` and write the report.

    Finished runs are not repeated, so an interrupted demo resumes.

    Args:
        workdir: directory of the demo.
        scale: multiplies the number of steps, for tests.

    Returns:
        The path of the report.
    """
    start_time, is_resumed = time.perf_counter(), (workdir / DEMO_RUNS[0].name).exists()
    for demo_run in DEMO_RUNS:
        train(_demo_config(demo_run, workdir, scale), workdir / demo_run.name)
    _finetune_demo_runs(workdir, scale)
    command = f"dwt demo --workdir={workdir}" + (f" --scale={scale:g}" if scale != 1 else "")
    seconds = time.perf_counter() - start_time
    write_json(
        workdir / "study.json",
        {
            "title": "A weak teacher on the State of the Union",
            "teacher": "teacher",
            "baseline": "alone",
            "noise_pair": ["alone", "alone-seed1"],
            "runs": [
                {
                    "name": demo_run.name,
                    "label": demo_run.label,
                    "role": "teacher" if demo_run.name == "teacher" else "student",
                }
                for demo_run in DEMO_RUNS
            ],
            "command": command,
            "seconds": None if is_resumed else seconds,  # only if nothing was resumed
        },
    )
    path = report.write_report(workdir)
    print(
        f"demo: {format_duration(seconds)}{', resumed' if is_resumed else ' total'}; report in {path}",
        flush=True,
    )
    return path


def _finetune_demo_runs(workdir: Path, scale: float) -> None:
    overrides = {
        "recipe.seeds": "[0, 1]",
        "recipe.epochs": "2",
        "examples.max_train_examples": str(max(64, round(4000 * scale))),
    }
    configs, example_cache = (
        [finetuning.load_finetune_config(f"{bundled_config_path('glue.py')}:era", overrides)],
        ExampleCache(),
    )
    for name in FINETUNED_RUNS:
        finetune_tasks(
            configs, str(workdir / name), workdir / report.DOWNSTREAM_DIR / name, example_cache=example_cache
        )


def _demo_config(demo_run: DemoRun, workdir: Path, scale: float) -> Config:
    overrides = dict(demo_run.overrides)
    if "distill.preset" in overrides:
        overrides["teacher.path"] = str(workdir / "teacher")
    path = bundled_config_path("demo.py")
    steps = load_config(f"{path}:{demo_run.run}").train.steps
    overrides["train.steps"] = str(max(2, round(steps * scale)))
    return load_config(f"{path}:{demo_run.run}", overrides)
