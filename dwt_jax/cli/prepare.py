"""Tokenize a corpus and pack it into training rows."""

import argparse

from dwt_jax.cli.arguments import add_config_argument, int_argument, path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_config_argument(parser)
    parser.add_argument(
        "--workdir",
        type=path_argument,
        required=True,
        help="output directory; pass it as data.path for training",
    )
    parser.add_argument(
        "--workers", type=int_argument(0), default=0, help="worker processes (default: number of CPUs)"
    )


def run(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Prepare the data of the config."""
    from dwt_jax.config_loader import load_data_config
    from dwt_jax.data.prepare import prepare_data

    data = load_data_config(options.config, overrides)
    prepare_data(data, options.workdir, workers=options.workers or None)
