"""Flags that several commands share, types of flags, and the overrides of config keys."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from dwt_jax.errors import UserError
from dwt_jax.files import user_path

MODEL_HELP = "run directory or model directory"
STEP_HELP = "step of the run's checkpoint to read (default: the latest)"


def add_config_argument(
    parser: argparse.ArgumentParser,
    text: str = "config",
    *,
    file: str = "configs/paper.py:student",
    override: str = "train.steps=1e3",
    required: bool = True,
) -> None:
    """Add --config, and describe the overrides of its keys.

    Args:
      parser: the parser of a command.
      text: what the config is, for the help text of --config.
      file: example of a config file with its argument.
      override: example of an override, KEY=VALUE.
      required: whether the command needs --config.
    """
    parser.add_argument(
        "--config", required=required, help=f"{text}: Python file with an optional argument, e.g. {file}"
    )
    parser.epilog = f"--config.KEY=VALUE overrides any key of the config, e.g. --config.{override}"


def add_growth_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a growth method (remap.methods.GrowthOptions)."""
    parser.add_argument(
        "--split", choices=("even", "uneven"), default="", help="how duplicates split their fan-out weight"
    )
    parser.add_argument(
        "--noise",
        type=noise_argument,
        default=0.0,
        help="relative noise added to duplicated entries (default: 0)",
    )
    parser.add_argument(
        "--new-tokens", choices=("mean", "random"), help="embeddings of new tokens (default: mean)"
    )
    parser.add_argument(
        "--new-positions", choices=("random", "tiled"), help="embeddings of new positions (default: random)"
    )
    parser.add_argument(
        "--new-layers",
        choices=("copy", "zero"),
        default="",
        help="added layers: copy, or copy and set the residual output to 0 (default: set by the method)",
    )


def init_overrides(
    options: argparse.Namespace, overrides: Mapping[str, str], method: str, source: str
) -> dict[str, str]:
    """Add the growth flags to the config overrides, as keys of `init`.

    Args:
      options: flags of `add_growth_arguments`.
      overrides: config overrides of the command line.
      method: value of `init.method`.
      source: value of `init.from`.

    Returns:
      The overrides, {'init.method': method, …}.

    Raises:
      UserError: an override that contradicts a flag.
    """
    reject_init_step(overrides)
    flags = {
        "method": method,
        "from": source,
        "split": options.split,
        "noise": str(options.noise or ""),
        "new_tokens": options.new_tokens,
        "new_positions": options.new_positions,
        "new_layers": options.new_layers,
    }
    requested = {f"init.{key}": value for key, value in flags.items() if value}
    for key, value in requested.items():
        if overrides.get(key, value) != value:
            raise UserError(f"--config.{key} is {overrides[key]!r}, expected {value!r} from another flag")
    return {**overrides, **requested}


def reject_init_step(overrides: Mapping[str, str]) -> None:
    """Raise UserError if `init.step` is overridden: it records the checkpoint that --step selects."""
    if "init.step" in overrides:
        raise UserError(
            f"--config.init.step is {overrides['init.step']!r}, expected --step: dwt remap-run sets it"
        )


def path_argument(text: str) -> Path:
    """Parse a path flag. An empty path, e.g. from an unset shell variable, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return user_path(text)


def int_argument(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return the type of a flag: an integer from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"is {value}, expected at least {minimum}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"is {value}, expected at most {maximum}")
        return value

    parse.__name__ = "int"  # argparse names the type in its own messages
    return parse


def noise_argument(text: str) -> float:
    """Parse a flag with a finite number that is not negative."""
    value = float(text)
    if not 0 <= value < float("inf"):
        expected = "a finite number" if value == float("inf") else "at least 0"
        raise argparse.ArgumentTypeError(f"is {value}, expected {expected}")
    return value


noise_argument.__name__ = "float"


def split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separate --config.KEY=VALUE and --config.KEY VALUE from the other arguments.

    Returns:
      The other arguments, and {KEY: VALUE}.

    Raises:
      UserError: an override without key or value.
    """
    flags, overrides = [], {}
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--config."):
            flags.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(remaining, "")
            if not value or value.startswith("--"):
                raise UserError(f"--config.{key}: no value, expected --config.{key}=VALUE")
        if not key:
            raise UserError("--config.: no key, expected --config.KEY=VALUE")
        overrides[key] = value
    return flags, overrides
