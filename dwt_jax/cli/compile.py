"""Compile the training step ahead of time for a target topology.

Reports memory, collectives and a roofline bound.
"""

import argparse

from dwt_jax.cli.arguments import add_config_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_config_argument(parser, "config of the run; teacher.path may be a config too")
    parser.add_argument(
        "--topology",
        required=True,
        help="target devices, e.g. v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, h100:8",
    )
    parser.add_argument(
        "--max-batch", action="store_true", help="search for the largest batch size that fits"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Compile the step and print the report. Exit status 3: the step does not fit in memory."""
    from dwt_jax import runtime_env
    from dwt_jax.config_loader import load_config

    config = load_config(options.config, overrides)
    runtime_env.set_up_env()
    runtime_env.use_cpu_only()
    from dwt_jax.aot.report import compile_command

    return compile_command(config, options.topology, options.json, options.max_batch)
