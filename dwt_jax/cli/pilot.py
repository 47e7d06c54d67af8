"""Compare ways to begin a run and to use its teacher by short runs, and advise one."""

import argparse
from pathlib import Path

from dwt_jax.cli.arguments import MODEL_HELP, add_config_argument, int_argument, path_argument
from dwt_jax.cli.exit_status import training_exit_status
from dwt_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_config_argument(parser, "config of the full run")
    parser.add_argument("--teacher", required=True, help=f"smaller model, teacher and source: {MODEL_HELP}")
    parser.add_argument(
        "--budget",
        type=float,
        default=2.0,
        help="steps of all runs of the pilot, at most, in full runs (default: 2)",
    )
    parser.add_argument(
        "--seeds",
        type=int_argument(1),
        default=1,
        metavar="N",
        help="runs of each candidate and length, which share the budget (default: 1)",
    )
    parser.add_argument(
        "--workdir",
        type=path_argument,
        default=Path("pilot"),
        help="directory of the short runs and of pilot.json (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    """Run the pilot, or go on with it, and print its table and its advice."""
    import json

    from dwt_jax import runtime_env
    from dwt_jax.files import user_path, write_json

    if not 0 < options.budget <= 1000:
        raise UserError(f"--budget is {options.budget}, expected more than 0 and at most 1000")
    runtime_env.set_up_env()

    def run_and_print() -> None:
        from dwt_jax.distributed.shutdown import BETWEEN_RUNS, handle_signals
        from dwt_jax.study.pilot import run_pilot
        from dwt_jax.study.pilot_report import format_pilot, pilot_to_dict

        teacher = str(user_path(options.teacher))
        with handle_signals(BETWEEN_RUNS):
            report = run_pilot(
                options.config,
                overrides,
                teacher,
                options.workdir,
                options.budget,
                options.seeds,
            )
        results = pilot_to_dict(report, teacher)
        write_json(options.workdir / "pilot.json", results)
        print(json.dumps(results, indent=2) if options.json else format_pilot(report, teacher))

    return training_exit_status(run_and_print)
