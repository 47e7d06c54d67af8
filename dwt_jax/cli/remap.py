"""Grow a model to a larger configuration and print a report."""

import argparse
import json

from dwt_jax.cli.arguments import (
    MODEL_HELP,
    STEP_HELP,
    add_config_argument,
    add_growth_arguments,
    int_argument,
    path_argument,
    reject_init_step,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_config_argument(
        parser, "config whose `model` gives the new sizes", override="model.num_hidden_layers=12"
    )
    parser.add_argument(
        "--method",
        required=True,
        help="growth method: hyperclone, stack, stack+net2net, …; see docs/remapping.md",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="new model directory")
    parser.add_argument("--step", type=int, help=STEP_HELP)
    add_growth_arguments(parser)
    parser.add_argument(
        "--seed", type=int_argument(0, 2**32 - 1), default=0, help="random seed (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Write the larger model and print the report."""
    from dwt_jax import config_loader, runtime_env

    reject_init_step(overrides)
    target = config_loader.load_model_config(options.config, overrides)
    runtime_env.set_up_env()
    from dwt_jax.growth.remap_model import remap_model
    from dwt_jax.remap.methods import GrowthOptions

    growth_options = GrowthOptions(
        split=options.split,
        noise=options.noise,
        new_tokens=options.new_tokens or "mean",
        new_positions=options.new_positions or "random",
        new_layers=options.new_layers,
    )
    report = remap_model(
        options.model, target, options.method, options.out, growth_options, options.seed, options.step
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.table())
