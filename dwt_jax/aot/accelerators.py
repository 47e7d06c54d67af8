"""Accelerators to compile for: their peak rates, and the topologies that `--topology` accepts."""

import math
import re
from typing import NamedTuple

from dwt_jax.errors import UserError, did_you_mean

GIB = 2**30


class Chip(NamedTuple):
    """Vendor specifications of one chip, or of one device where jax sees several devices in a chip.

    Attributes:
        name: as in `--topology`.
        platform: jax's name of the platform.
        peak_flops: FLOPs per second, bf16, dense.
        memory_bytes: memory that a program may use.
        memory_bandwidth: bytes per second.
        network_bandwidth: bytes per second from the chip over its links to others of the slice or node.
        max_shape: the largest slice (TPU) or the number of chips in a node (GPU).
        topology_options: further arguments of get_topology_desc.
        devices_per_chip: devices of jax in a chip of `max_shape`.
    """

    name: str
    platform: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    network_bandwidth: float
    max_shape: tuple[int, ...]
    topology_options: tuple[tuple[str, str], ...] = ()
    devices_per_chip: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        # Cloud TPU's page of each version (2026-11): peak, HBM, interchip bandwidth in Gbit/s / 8. Memory is
        # what the compiler reports as available.
        Chip(
            "v4", "tpu", 275e12, 30.75 * GIB, 1.2e12, 300e9, (12, 16, 16), (("chip_config_name", "megacore"),)
        ),
        Chip("v5e", "tpu", 197e12, 15.75 * GIB, 0.82e12, 200e9, (16, 16)),
        Chip("v5p", "tpu", 459e12, 95.7 * GIB, 2.765e12, 600e9, (16, 16, 24)),
        Chip("v6e", "tpu", 918e12, 31.24 * GIB, 1.64e12, 448e9, (16, 16)),
        # Ironwood: a chip is two devices, which have half of 2307 TFLOPs, 7380 GB/s and 600 GB/s each way.
        Chip("tpu7x", "tpu", 1153.5e12, 94.74 * GIB, 3.69e12, 300e9, (16, 24, 24), devices_per_chip=2),
        # NVIDIA's data sheets of the SXM modules; NVLink's 900 GB/s is the sum of both directions. Memory:
        # the share that launch/env.sh lets jax allocate of what CUDA reports (79.1, 139.8 GiB); XLA has no
        # limit of its own.
        Chip("h100", "cuda", 989e12, 0.92 * 79.1 * GIB, 3.35e12, 450e9, (8,)),
        Chip("h200", "cuda", 989e12, 0.92 * 139.8 * GIB, 4.8e12, 450e9, (8,)),
    )
}

TOPOLOGY_EXAMPLES = "v4:2x2x1, v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, h100:8, h200:8"


def parse_topology(topology: str) -> tuple[Chip, int]:
    """Parse a topology such as `v5e:4x4` or `h100:8`.

    Returns:
        The chip and the number of devices.

    Raises:
        UserError: the chip is unknown, or the shape is invalid or too large.
    """
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
    return chip, math.prod(sizes) * chip.devices_per_chip
