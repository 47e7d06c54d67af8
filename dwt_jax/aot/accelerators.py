"""Chips that need not be here: what they can do, and their names in `--topology`."""

import math
import re
from typing import NamedTuple

from dwt_jax.errors import UserError, did_you_mean

GIB = 2**30


class Chip(NamedTuple):
    """Peak numbers of one chip, as their makers' pages give them."""

    name: str
    platform: str  # of jax
    flops: float  # bf16, dense, a second
    memory: float  # bytes that a program may use
    bandwidth: float  # of that memory, bytes a second
    network: float  # bytes a second that leave the chip over its links to others of the slice or node
    max_shape: tuple[int, ...]  # slice, by axes, or number in one node
    options: tuple[tuple[str, str], ...] = ()  # of get_topology_desc


CHIPS = {
    chip.name: chip
    for chip in (
        # Cloud TPU's pages of each version (2026-11): peak, HBM, interchip bandwidth in Gbit/s / 8. Memory is
        # what the compiler says is available.
        Chip(
            "v4", "tpu", 275e12, 30.75 * GIB, 1.2e12, 300e9, (12, 16, 16), (("chip_config_name", "megacore"),)
        ),
        Chip("v5e", "tpu", 197e12, 15.75 * GIB, 0.82e12, 200e9, (16, 16)),
        Chip("v5p", "tpu", 459e12, 95.7 * GIB, 2.765e12, 600e9, (16, 16, 24)),
        Chip("v6e", "tpu", 918e12, 31.24 * GIB, 1.64e12, 448e9, (16, 16)),
        # NVIDIA's data sheets of the SXM modules; NVLink 900 GB/s is both directions together. Memory: of
        # what CUDA shows (79.1, 139.8 GiB) the share that launch/env.sh lets jax take; XLA has no limit.
        Chip("h100", "cuda", 989e12, 0.92 * 79.1 * GIB, 3.35e12, 450e9, (8,)),
        Chip("h200", "cuda", 989e12, 0.92 * 139.8 * GIB, 4.8e12, 450e9, (8,)),
    )
}

TOPOLOGY_EXAMPLES = "v4:2x2x1, v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, h100:8, h200:8"


def parse_topology(topology: str) -> tuple[Chip, int]:
    """The chip and the number of them that `v5e:4x4` or `h100:8` says. Raises UserError."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--topology: no chip {name!r}{did_you_mean(name, CHIPS)} Topologies: e.g. {TOPOLOGY_EXAMPLES}"
        )
    chip = CHIPS[name]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * len(chip.max_shape)), shape):
        raise UserError(
            f"--topology is {topology!r}, expected a shape after the colon, e.g. {TOPOLOGY_EXAMPLES}"
        )
    sizes = [int(size) for size in shape.split("x")]
    if any(size > limit for size, limit in zip(sorted(sizes), chip.max_shape, strict=True)):
        limit = "x".join(map(str, chip.max_shape))
        raise UserError(f"--topology is {topology!r}, expected no more than {name}:{limit}")
    return chip, math.prod(sizes)
