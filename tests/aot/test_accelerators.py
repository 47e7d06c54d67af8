"""Specifications of accelerators, and parsing of topologies."""

import re

import pytest

from dwt_jax.aot.accelerators import CHIPS, parse_topology
from dwt_jax.aot.gpu_targets import gpu_target_config
from dwt_jax.errors import UserError
from dwt_jax.runs.peak_flops import PEAK_FLOPS
from helpers.paths import ROOT


@pytest.mark.parametrize(
    ("topology", "name", "count"),
    [
        ("v5e:4x4", "v5e", 16),
        ("v4:2x2x1", "v4", 4),
        ("v6e:16x16", "v6e", 256),
        ("h100:8", "h100", 8),
        ("v5p:24x16x16", "v5p", 6144),
        ("tpu7x:2x2x1", "tpu7x", 8),  # two devices a chip
    ],
)
def test_parse_topology_returns_chip_and_count(topology, name, count):
    chip, num_chips = parse_topology(topology)
    assert (chip.name, num_chips) == (name, count)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h10:8", "no chip 'h10'; did you mean 'h100'"),
        ("v5e", "expected a shape after the colon"),
        ("v5e:0x4", "expected a shape after the colon"),
        ("h100:2x4", "expected a shape after the colon"),
        ("v5e:4x4x4", "expected a shape after the colon"),  # libtpu would abort the process
        ("v5p:4x4", "expected a shape after the colon"),
        ("v6e:32x32", "expected no more than v6e:16x16"),
        ("v5e:8x32", "expected no more than v5e:16x16"),
        ("h100:16", "expected no more than h100:8"),  # NVLink ends with the node
        ("", "no chip ''"),
    ],
)
def test_parse_topology_refuses_unknown_chips_and_shapes(topology, message):
    with pytest.raises(UserError, match=message):
        parse_topology(topology)


def test_peak_flops_equal_those_that_mfu_of_runs_uses():
    device_kinds = {
        "v4": "TPU v4",
        "v5e": "TPU v5 lite",
        "v5p": "TPU v5p",
        "v6e": "TPU v6 lite",
        "tpu7x": "TPU7x",
        "h100": "NVIDIA H100",
        "h200": "NVIDIA H200",
    }
    expected = {name: PEAK_FLOPS[device_kind] for name, device_kind in device_kinds.items()}
    assert {name: chip.peak_flops for name, chip in CHIPS.items()} == expected


def test_memory_of_gpus_is_what_the_launch_scripts_let_jax_allocate():
    """With more, a step could be reported to fit and then fail: XLA compiles for a GPU without a limit."""
    text = (ROOT / "launch" / "env.sh").read_text()
    share = float(re.search(r"MEM_FRACTION:-([.\d]+)", text)[1])
    for name, gib in (("h100", 79.1), ("h200", 139.8)):
        assert CHIPS[name].memory_bytes == pytest.approx(share * gib * 2**30)


def test_gpu_target_config_has_the_numbers_of_the_chip():
    text = gpu_target_config(CHIPS["h200"])
    assert "memory_bandwidth: 4800000000000" in text
    assert text.count("{") == text.count("}")
