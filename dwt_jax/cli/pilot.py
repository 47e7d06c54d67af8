"""Compare initialisations and uses of the teacher in short runs, and recommend one."""

import argparse
from pathlib import Path

from dwt_jax.cli.arguments import MODEL_HELP, add_config_argument, int_argument, path_argument
from dwt_jax.cli.exit_status import training_exit_status
from dwt_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_config_argument(parser, "config of the full run")
    parser.add_argument(
        "--teacher", required=True, help=f"smaller model, teacher and growth source: {MODEL_HELP}"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=2.0,
        help="maximum steps of all short runs together, in full runs (default: 2)",
    )
    parser.add_argument(
        "--seeds",
        type=int_argument(1),
        default=1,
        metavar="N",
        help="seeds per candidate and length; their runs share the budget (default: 1)",
    )
    parser.add_argument(
        "--workdir",
        type=path_argument,
        default=Path("pilot"),
        help="directory of the short runs and of pilot.json (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    """Run or resume the pilot, and print its table and recommendation."""
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
