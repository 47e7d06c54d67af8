"""Write the teacher's answers for the rows of a run to disk, so that training needs no teacher."""

import argparse

from dwt_jax.cli.arguments import add_config_argument, int_argument, path_argument
from dwt_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_config_argument(parser)
    parser.add_argument(
        "--out", type=path_argument, required=True, help="output directory; pass it as teacher.cache"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--draws",
        type=int_argument(1),
        default=50,
        metavar="N",
        help="draws from the teacher's distribution for each prediction, at most 255 (default: 50)",
    )
    group.add_argument(
        "--top-k", type=int_argument(1), metavar="K", help="keep the K most probable tokens instead (biased)"
    )
    parser.add_argument(
        "--part",
        default="0/1",
        metavar="I/N",
        help="write every Nth file, from the Ith on (from 0): for N processes that share --out",
    )


def run(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Write the cache of the config's teacher."""
    from dwt_jax import runtime_env
    from dwt_jax.config_loader import load_config

    part = _parse_part(options.part)
    if (count := options.top_k or options.draws) > 255:
        raise UserError(f"cache: --{'top-k' if options.top_k else 'draws'} is {count}, expected at most 255")
    config = load_config(options.config, overrides)
    runtime_env.set_up_env()
    from dwt_jax.distributed import initialize
    from dwt_jax.train.cache_teacher import SampleSettings, write_cache

    initialize.check_platform(config.platform)
    write_cache(config, options.out, SampleSettings("top_k" if options.top_k else "draws", count), part)


def _parse_part(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"cache: --part is {text!r}, expected I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)
