"""Depth maps: the source layers of each target layer."""

import pytest

from dwt_jax.remap import depth_maps


@pytest.mark.parametrize(
    ("name", "grown", "shrunk"),
    [
        ("repeat_last", [0, 1, 2, 3, 3, 3], [0, 1]),
        ("stack", [0, 1, 2, 3, 0, 1], [0, 1]),
        ("stack_top", [0, 1, 2, 3, 2, 3], [2, 3]),
        ("interleave", [0, 0, 1, 2, 2, 3], [0, 2]),
        ("nearest", [0, 1, 1, 2, 3, 3], [0, 2]),
        ("middle", [0, 1, 2, 1, 2, 3], [0, 3]),
        ("prefix", [0, 1, 2, 3, -1, -1], [0, 1]),
    ],
)
def test_depth_maps(name, grown, shrunk):
    assert depth_maps.DEPTH_MAPS[name](4, 6) == grown
    assert depth_maps.DEPTH_MAPS[name](4, 2) == shrunk
    for old in range(1, 8):
        assert depth_maps.DEPTH_MAPS[name](old, old) == list(range(old))
        for new in range(1, 30):
            layers = depth_maps.DEPTH_MAPS[name](old, new)
            assert len(layers) == new
            assert all(-1 <= layer < old for layer in layers)
            firsts = [layer for i, layer in enumerate(layers) if layer not in layers[:i] and layer >= 0]
            assert firsts == sorted(firsts)  # else gates could not restore the order
            if new >= old:
                assert len(firsts) == old


def test_layers_of_a_period_come_from_layers_of_their_kind():
    """By ModernBERT-large's own map, 12 of its 28 layers have weights of the other kind of attention."""

    def num_of_another_kind(layers):
        return sum((i % 3 == 0) != (layer % 3 == 0) for i, layer in enumerate(layers))

    assert num_of_another_kind(depth_maps.nearest(22, 28)) == 12
    assert num_of_another_kind(depth_maps.source_layers("nearest", 22, 28, period=3)) == 0
