"""Matrix products with a backward pass of their own.

Operands are in the compute type, results in fp32: what an MXU does anyhow. Autodiff would
keep the fp32 activations for the backward pass and multiply with fp32 cotangents; here what
is kept, and every operand of the backward pass, is in the compute type too.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


class Numerics(NamedTuple):
    """In which type what is computed. Norms, softmax and losses are fp32 always, or float64 where
    everything is: that is for checks, under jax.enable_x64."""

    compute: jnp.dtype = jnp.dtype("float32")  # the operands of matrix products
    stream: jnp.dtype = jnp.dtype("float32")  # the activations between them
    one_cpu: bool = False  # a single CPU device: lay operands out for its kernels
    rows: jax.sharding.NamedSharding | None = None  # where the rows of activations live; None: one device


def at_least_fp32(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def by_rows(x: jax.Array, numerics: Numerics) -> jax.Array:
    """x, its leading axis where the rows of the batch are.

    XLA does not see by itself that this is meant where weights are spread over the same devices (fsdp):
    it multiplies slices of channels and adds up activations of all rows, instead of gathering the
    weights (held by tests/test_collectives.py).
    """
    return x if numerics.rows is None else jax.lax.with_sharding_constraint(x, numerics.rows)


def whole(x: jax.Array, numerics: Numerics) -> jax.Array:
    """x, a weight, on every device."""
    if numerics.rows is None:
        return x
    everywhere = jax.sharding.NamedSharding(numerics.rows.mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(x, everywhere)


def row_major(x: jax.Array, numerics: Numerics) -> jax.Array:
    """x, on one CPU device really written in this order of axes.

    XLA turns a transpose into a mere change of layout, and a bf16 product that contracts over
    anything but its left operand's last axis in memory is then converted to fp32, at half the
    speed. (Several devices: the constraint costs an all-gather on jax 0.10.)
    """
    if not numerics.one_cpu:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def transposed(x: jax.Array, numerics: Numerics) -> jax.Array:
    """x with its last two axes swapped, as a left operand. fp32 kernels take any layout."""
    swapped = jnp.swapaxes(x, -1, -2)
    return row_major(swapped, numerics) if numerics.compute != jnp.float32 else swapped


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Contraction over one axis each, leading axes but the last two are batch axes → fp32."""
    batch = tuple(range(x.ndim - 2))
    dimensions = (((over[0],), (over[1],)), (batch, batch))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=at_least_fp32(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, numerics: Numerics) -> jax.Array:
    """[M, I] · [I, O] → fp32 [M, O]."""
    return dot(x.astype(numerics.compute), kernel.astype(numerics.compute), (1, 0))


def _matmul_forward(x, kernel, numerics: Numerics):
    x_, kernel_ = x.astype(numerics.compute), kernel.astype(numerics.compute)
    return dot(x_, kernel_, (1, 0)), (x_, kernel_, jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype))


def _matmul_backward(numerics: Numerics, kept, gradient):
    x, kernel, like_x, like_kernel = kept
    gradient = gradient.astype(numerics.compute)
    to_x = dot(gradient, kernel, (1, 1)).astype(like_x.dtype)
    to_kernel = dot(transposed(x, numerics), gradient, (1, 0)).astype(like_kernel.dtype)
    return to_x, to_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


def project(x: jax.Array, kernel: jax.Array, numerics: Numerics, contract: int = 1) -> jax.Array:
    """x [..., I…] · kernel [I…, O…] → fp32 [..., O…], over the last `contract` axes of x."""
    outside, outputs = x.shape[: x.ndim - contract], kernel.shape[contract:]
    inputs = x.shape[x.ndim - contract :]
    size = functools.reduce(lambda a, b: a * b, inputs)
    product = matmul(x.reshape(-1, size), kernel.reshape(size, -1), numerics)
    return product.reshape(*outside, *outputs)
