"""Grow a run to a larger configuration; training continues at the same step of the same data."""

import argparse
import json
import shlex

from dwt_jax.cli.arguments import (
    STEP_HELP,
    add_config_argument,
    add_growth_arguments,
    init_overrides,
    path_argument,
)
from dwt_jax.logs import logger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--run", required=True, help="run directory with checkpoints")
    add_config_argument(parser, "full config of the larger run")
    parser.add_argument(
        "--method",
        required=True,
        help="growth method: hyperclone, stack, stack+net2net, …; see docs/remapping.md",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="new run directory")
    parser.add_argument("--step", type=int, help=STEP_HELP)
    moments = parser.add_mutually_exclusive_group()
    moments.add_argument(
        "--moments",
        choices=("reset", "carry", "asymmetric"),
        default="reset",
        help="optimizer moments of the larger run (default: %(default)s); see docs/remapping.md",
    )
    moments.add_argument(
        "--carry", dest="moments", action="store_const", const="carry", help="same as --moments=carry"
    )
    add_growth_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Write the larger run, and print the report and the command to continue training."""
    from dwt_jax import config_loader, runtime_env

    overrides = init_overrides(options, overrides, options.method, options.run)
    config = config_loader.load_config(options.config, overrides)
    runtime_env.set_up_env()
    from dwt_jax.growth.remap_run import grow_run

    report = grow_run(options.run, config, options.out, options.step, options.moments)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.table())
    config_flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    command = ["dwt", "train", f"--config={options.config}", *config_flags, f"--workdir={options.out}"]
    logger.warning(f"continue with: {shlex.join(command)}")
