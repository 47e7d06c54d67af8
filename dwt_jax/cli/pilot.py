"""Compare initialisations: train every growth method for a few steps and rank by held-out loss."""

import argparse

from dwt_jax.cli.arguments import (
    MODEL_HELP,
    STEP_HELP,
    add_config_argument,
    add_growth_arguments,
    init_overrides,
    int_argument,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", required=True, help=f"model to grow: {MODEL_HELP}")
    add_config_argument(parser, "config of the larger run")
    parser.add_argument(
        "--steps", type=int_argument(1), required=True, metavar="N", help="training steps of each method"
    )
    parser.add_argument("--step", type=int, help=STEP_HELP)
    add_growth_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Print the ranking of the methods."""
    from dwt_jax import config_loader, runtime_env

    # Every method starts from --model, so those of the config do not apply.
    overrides = {key: value for key, value in overrides.items() if key not in ("init.method", "init.from")}
    overrides = init_overrides(options, overrides, "random", options.model)
    config = config_loader.load_config(options.config, overrides)
    runtime_env.set_xla_env()
    from dwt_jax.growth.pilot import print_pilot_ranking

    print_pilot_ranking(options.model, config, options.steps, as_json=options.json, step=options.step)
