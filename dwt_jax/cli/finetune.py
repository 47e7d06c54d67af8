"""Fine-tune a model on GLUE, built-in tasks or your own files. Rerun the same command to resume."""

import argparse

from dwt_jax.cli.arguments import MODEL_HELP, STEP_HELP, add_config_argument, path_argument
from dwt_jax.cli.exit_status import training_exit_status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument(
        "--workdir",
        type=path_argument,
        required=True,
        help="output directory: one directory per task, and results.json",
    )
    parser.add_argument("--step", type=int, help=STEP_HELP)
    add_config_argument(
        parser,
        "config of the fine-tuning (default: configs/glue.py)",
        file="configs/glue.py:rte",
        override="recipe.epochs=5",
        required=False,
    )
    parser.add_argument(
        "--task", help="comma-separated tasks, the arguments of the config file: rte,cola,… (default: era)"
    )


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    """Fine-tune on every task and print the results."""
    from dwt_jax import runtime_env
    from dwt_jax.config_loader import bundled_config_path
    from dwt_jax.finetune.config import load_task_configs

    config = options.config or str(bundled_config_path("glue.py"))
    task_configs = load_task_configs(config, options.task, overrides)
    runtime_env.set_up_env()

    def finetune_and_report() -> None:
        from dwt_jax.finetune import runner

        results = runner.finetune_tasks(task_configs, options.model, options.workdir, options.step)
        print(runner.format_finetune_table(results))

    return training_exit_status(finetune_and_report)
