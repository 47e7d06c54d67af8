"""Dropout on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dwt_jax.models.common.layers import dropout_mask


def test_dropout_mask_is_that_of_one_device_and_each_device_makes_only_its_rows():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def drop(x, seed):
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), 3)
        return jnp.where(dropout_mask(key, 0.3, x.shape), x, 0)

    x, seed = np.ones((64, 40), np.float32), np.uint32(5)
    compiled = jax.jit(drop, in_shardings=(rows, None), out_shardings=rows).lower(x, seed).compile()
    assert "[64,40]" not in compiled.as_text()
    assert "[8,40]" in compiled.as_text()
    one_device = jax.jit(drop)(jax.device_put(x, jax.devices()[0]), seed)
    np.testing.assert_array_equal(compiled(jax.device_put(x, rows), seed), one_device)
