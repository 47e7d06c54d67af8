"""Run the end-to-end demo on the built-in corpus."""

import argparse
from pathlib import Path

from dwt_jax.cli.arguments import path_argument
from dwt_jax.cli.exit_status import training_exit_status
from dwt_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--workdir", type=path_argument, default=Path("demo"), help="output directory (default: %(default)s)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor for the number of steps and of fine-tuning examples (default: 1)",
    )


def run(options: argparse.Namespace, _: dict[str, str]) -> int | None:
    """Run the demo in --workdir."""
    from dwt_jax import runtime_env

    if not 0 < options.scale <= 100:
        raise UserError(f"--scale is {options.scale}, expected more than 0 and at most 100")
    runtime_env.set_up_env()
    from dwt_jax.study import demo

    return training_exit_status(lambda: demo.run_demo(options.workdir, options.scale))
