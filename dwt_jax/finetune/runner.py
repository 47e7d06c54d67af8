"""`dwt finetune`: one model on some tasks, and the table of what came of it."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dwt_jax.distributed.shutdown import signals
from dwt_jax.errors import UserError
from dwt_jax.finetune import run as runs
from dwt_jax.finetune.collate import Texts
from dwt_jax.finetune.config import FineTune
from dwt_jax.finetune.outputs import spread
from dwt_jax.finetune.tasks import AVERAGE, SCORE, hundredths
from dwt_jax.runs.run_dir import locked, read_json, write_json


def finetune(
    todo: Sequence[FineTune], model: str, workdir: Path, step: int | None = None, texts: Texts | None = None
) -> dict[str, Any]:
    """Fine-tune the model in `model` (of a run, at the checkpoint of `step`, if given) on every task, each
    in a folder of `workdir`; texts: what was read before, for other models. → results.json

    Tasks that were done there before with the same model are in the results too. What is wrong with any task
    is found before the first one begins. Raises UserError for that, Stopped after a signal, Failed for a
    loss that is not finite.
    """
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir}: is a run itself, expected a directory for the folders of the tasks")
    source = runs.load_source(model, step)
    with signals() as stopping, ExitStack() as stack:
        if not workdir.exists():
            stack.callback(_remove_empty, workdir)
        prepared, texts = [], texts or Texts()
        for config in todo:  # before the first claim: nothing is left of a command that was refused
            texts.read(config.examples)
        for config in todo:
            folder = workdir / config.examples.task
            stack.enter_context(locked(folder))
            prepared.append(runs.prepare(config, source, folder, texts))
        stopping.poll()
        found = {run.config.examples.task: runs.fine_tune(run, stopping) for run in prepared}
        found |= _done_before(workdir, source.digest, found)
        summary = summarise(found)
        _submission(workdir, list(found))
        write_json(workdir / "results.json", summary)
    return summary


def _remove_empty(folder: Path) -> None:
    """Nothing is left of a command that was refused."""
    with suppress(OSError):
        folder.rmdir()


def _done_before(workdir: Path, model: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Results of other commands' tasks in the same folder, of the same model."""
    done = {}
    for path in sorted(workdir.glob("*/results.json")):
        record = path.parent / "finetune.json"
        if path.parent.name not in found and record.exists() and read_json(record)["model_digest"] == model:
            done[path.parent.name] = read_json(path)
    return done


def summarise(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tasks' results without their histories, and the average over tasks.

    Its spread is that of the seeds' own averages, where all tasks have the same seeds.
    """
    tasks = {
        name: {key: one[key] for key in ("metrics", "best", "last", "model_of_seed", "examples")}
        for name, one in found.items()
    }
    seeds = {tuple(one["seeds"]) for one in found.values()}
    average: dict[str, Any] = {"definition": AVERAGE, "of": list(found)}
    for which in ("best", "last"):
        scores = [one[which]["by_seed"] for one in found.values()]
        if len(seeds) == 1:
            average[which] = spread([float(x) for x in np.mean(scores, axis=0)])
        else:
            mean = float(np.mean([np.mean(one) for one in scores]))
            average[which] = {"mean": mean, "standard_deviation": None, "by_seed": None}
    return {"score": SCORE, "tasks": tasks, "average": average}


def _submission(workdir: Path, tasks: Sequence[str]) -> None:
    """All tasks' files for GLUE's server in one folder."""
    for task in tasks:
        for file in sorted((workdir / task / "submission").glob("*.tsv")):
            (workdir / "submission").mkdir(exist_ok=True)
            shutil.copyfile(file, workdir / "submission" / file.name)


def table(summary: Mapping[str, Any]) -> str:
    """For a person, in hundredths: a row a task, one a metric where it has several, and the average."""
    rows = [("task", "", "best epoch", "last epoch", "seeds")]
    for name, one in summary["tasks"].items():
        rows.append(
            (
                name,
                "score",
                hundredths(one["best"]),
                hundredths(one["last"]),
                str(len(one["best"]["by_seed"])),
            )
        )
        for split, values in one["best"]["dev"].items():
            for metric in one["metrics"]:
                at_last = one["last"]["dev"][split][metric]
                rows.append(
                    ("", f"{split} {metric}", f"{100 * values[metric]:.2f}", f"{100 * at_last:.2f}", "")
                )
    average = summary["average"]
    if len(summary["tasks"]) > 1:
        rows.append(("average", "", hundredths(average["best"]), hundredths(average["last"]), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += ["", f"score of a task: {summary['score']}; ± standard deviation over seeds"]
    if len(summary["tasks"]) > 1:
        lines.append(f"average over {', '.join(average['of'])}: {average['definition']}")
    return "\n".join(lines)
