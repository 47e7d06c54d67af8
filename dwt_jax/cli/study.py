"""Run a study (a grid of runs) and write its report. Rerun the same command to resume."""

import argparse

from dwt_jax.cli.arguments import add_config_argument, path_argument
from dwt_jax.cli.exit_status import training_exit_status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_config_argument(
        parser,
        "config of the study, see docs/studies.md",
        file="configs/study/NAME.py:SCALE",
        override="title=Mine",
    )
    parser.add_argument(
        "--workdir",
        type=path_argument,
        required=True,
        help="study directory: runs, fine-tunings and the report",
    )
    parser.add_argument(
        "--index", type=int, help="run only the job with this number in --list (for job arrays)"
    )
    parser.add_argument("--list", action="store_true", help="print the jobs and their status")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the jobs with their FLOPs and a time estimate"
    )


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    """Run the jobs that are not done, or print them (--list, --dry-run)."""
    from dwt_jax.study import plan, sweep

    study = sweep.load_study(options.config, overrides)
    if options.list or options.dry_run:
        print(plan.format_plan(study, options.workdir, costs=options.dry_run))
        return None
    from dwt_jax import runtime_env

    runtime_env.set_up_env()

    from dwt_jax.study.run_and_report import run_and_report

    return training_exit_status(lambda: run_and_report(study, options.workdir, options.index))
