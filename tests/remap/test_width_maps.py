"""Width maps: balanced copies whose shares sum to one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.remap import width_maps
from helpers.remapping import KEY


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 3), st.booleans())
@settings(max_examples=12)
def test_random_copies_are_balanced_and_shares_sum_to_one(old, more, layers, uneven):
    weights = (
        width_maps.uneven_weights(KEY, (layers, old + more) if layers else (old + more,)) if uneven else None
    )
    m = width_maps.random_copies(KEY, old, old + more, layers, weights)
    for index, split in zip(np.atleast_2d(m.index), np.atleast_2d(m.split), strict=True):
        assert list(index[:old]) == list(range(old))
        counts = np.bincount(index, minlength=old)
        assert counts.max() - counts.min() <= 1
        np.testing.assert_allclose(np.bincount(index, split, old), 1, rtol=1e-12)
        assert (split > 0).all()


def test_random_copies_differ_between_layers():
    m = width_maps.random_copies(KEY, 20, 40, layers=3)
    assert not np.array_equal(m.index[0], m.index[1])


def test_the_undivided_tile_wraps_around_on_both_sides():
    m = width_maps.undivided_tile(4, 9)
    assert m.index.tolist() == [2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert m.kind.tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert (m.split == 1).all()
