"""Fine-tune one model on several tasks (`dwt finetune`) and tabulate the results."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dwt_jax.distributed.shutdown import handle_signals
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, write_json
from dwt_jax.finetune import run as runs
from dwt_jax.finetune.collate import ExampleCache
from dwt_jax.finetune.config import FinetuneConfig
from dwt_jax.finetune.outputs import mean_std
from dwt_jax.finetune.tasks import AVERAGE_DEFINITION, SCORE_DEFINITION, format_percent
from dwt_jax.runs.run_dir import run_lock
from dwt_jax.text_format import format_table


def finetune_tasks(
    configs: Sequence[FinetuneConfig],
    model: str,
    workdir: Path,
    step: int | None = None,
    example_cache: ExampleCache | None = None,
) -> dict[str, Any]:
    """Fine-tune a model on every task, each in a folder of `workdir`.

    All tasks are checked before the first one starts. The results include tasks that an earlier
    command ran in the same directory with the same model.

    Args:
        configs: one per task.
        model: a run's directory or a model in Hugging Face's layout.
        workdir: the directory of all tasks.
        step: of a run, the step of the checkpoint; None for the finished model.
        example_cache: examples that were read for other models.

    Returns:
        The content of results.json.

    Raises:
        UserError: for a config, model or data that cannot be used.
        Preempted: after a signal.
        TrainingFailed: for a loss that is not finite.
    """
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir}: is a run, expected a directory for the task folders")
    source = runs.load_source_model(model, step)
    with handle_signals() as shutdown_flag, ExitStack() as stack:
        if not workdir.exists():
            stack.callback(_remove_empty, workdir)
        contexts, example_cache = [], example_cache or ExampleCache()
        for config in configs:  # before any directory is initialized, so that a refused command leaves none
            example_cache.read(config.examples)
        for config in configs:
            folder = workdir / config.examples.task
            stack.enter_context(run_lock(folder))
            contexts.append(runs.prepare_finetuning(config, source, folder, example_cache))
        shutdown_flag.arm()
        results_by_task = {
            context.config.examples.task: runs.finetune_task(context, shutdown_flag) for context in contexts
        }
        results_by_task |= _previous_results(workdir, source.digest, results_by_task)
        summary = summarize_tasks(results_by_task)
        _copy_submission_files(workdir, list(results_by_task))
        write_json(workdir / "results.json", summary)
    return summary


def _remove_empty(folder: Path) -> None:
    """Remove the directory if a rejected command left it empty."""
    with suppress(OSError):
        folder.rmdir()


def _previous_results(workdir: Path, model_digest: str, current_results: Mapping[str, Any]) -> dict[str, Any]:
    """Read the results of tasks that earlier commands ran in this directory with the same model."""
    previous = {}
    for path in sorted(workdir.glob("*/results.json")):
        record = path.parent / "finetune.json"
        if (
            path.parent.name not in current_results
            and record.exists()
            and read_json(record)["model_digest"] == model_digest
        ):
            previous[path.parent.name] = read_json(path)
    return previous


def summarize_tasks(results_by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the tasks' results, without their histories, and average over tasks.

    The standard deviation of the average is over the averages of each seed. It is None if the tasks
    have different seeds.

    Args:
        results_by_task: {task: content of its results.json}.
    """
    tasks = {
        name: {key: result[key] for key in ("metrics", "best", "last", "model_of_seed", "examples")}
        for name, result in results_by_task.items()
    }
    seeds = {tuple(result["seeds"]) for result in results_by_task.values()}
    average: dict[str, Any] = {"definition": AVERAGE_DEFINITION, "of": list(results_by_task)}
    for selection in ("best", "last"):
        scores = [result[selection]["by_seed"] for result in results_by_task.values()]
        if len(seeds) == 1:
            average[selection] = mean_std([float(x) for x in np.mean(scores, axis=0)])
        else:
            mean = float(np.mean([np.mean(result) for result in scores]))
            average[selection] = {"mean": mean, "standard_deviation": None, "by_seed": None}
    return {"score": SCORE_DEFINITION, "tasks": tasks, "average": average}


def _copy_submission_files(workdir: Path, tasks: Sequence[str]) -> None:
    """Collect the tasks' files for GLUE's server in one folder."""
    for task in tasks:
        for file in sorted((workdir / task / "submission").glob("*.tsv")):
            (workdir / "submission").mkdir(exist_ok=True)
            shutil.copyfile(file, workdir / "submission" / file.name)


def format_finetune_table(summary: Mapping[str, Any]) -> str:
    """Format the results as a text table in percent.

    One row per task, one per metric of each dev split, and one for the average over tasks.
    """
    rows = [("task", "", "best epoch", "last epoch", "seeds")]
    for name, result in summary["tasks"].items():
        rows.append(
            (
                name,
                "score",
                format_percent(result["best"]),
                format_percent(result["last"]),
                str(len(result["best"]["by_seed"])),
            )
        )
        for split, values in result["best"]["dev"].items():
            for metric in result["metrics"]:
                last_value = result["last"]["dev"][split][metric]
                rows.append(
                    ("", f"{split} {metric}", f"{100 * values[metric]:.2f}", f"{100 * last_value:.2f}", "")
                )
    average = summary["average"]
    if len(summary["tasks"]) > 1:
        rows.append(("average", "", format_percent(average["best"]), format_percent(average["last"]), ""))
    lines = format_table(rows)
    lines += ["", f"in %; score of a task: {summary['score']}; ± standard deviation over seeds"]
    if len(summary["tasks"]) > 1:
        lines.append(f"average over {', '.join(average['of'])}: {average['definition']}")
    return "\n".join(lines)
