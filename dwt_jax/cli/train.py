"""Pre-train a model, optionally with a teacher. Rerun the same command to resume."""

import argparse

from dwt_jax.cli.arguments import add_config_argument, path_argument
from dwt_jax.cli.exit_status import exit_status, training_exit_status
from dwt_jax.config import Config
from dwt_jax.distributed.shutdown import defer_signals
from dwt_jax.logs import logger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_config_argument(parser)
    parser.add_argument(
        "--workdir",
        type=path_argument,
        required=True,
        help="run directory: checkpoints, metrics and the trained model",
    )


@defer_signals()  # importing jax and the like takes seconds
def run(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    """Train in --workdir, or resume the run there."""
    from dwt_jax import runtime_env
    from dwt_jax.config_loader import load_config
    from dwt_jax.distributed import coordination, initialize, process_info

    def read_config() -> Config:
        runtime_env.check_numeric_settings()
        config = load_config(options.config, overrides)
        initialize.check_platform(config.platform)
        return config

    # A single process reports a user error before it imports jax.
    config = None if process_info.process_info_from_env() else read_config()
    runtime_env.set_xla_env()

    def train_and_report() -> None:
        from dwt_jax.train.loop import train

        summary = train(config or coordination.run_on_all(read_config), options.workdir)
        logger.info(
            f"{options.workdir}: held-out loss {summary['held_out']['held_out_loss']:.4f}, "
            f"model in {options.workdir / 'model'}"
        )

    return initialize.run_distributed(lambda: exit_status(lambda: training_exit_status(train_and_report)))
