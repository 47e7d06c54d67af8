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


class Policy(NamedTuple):
    """In which type what is computed. Norms, softmax and losses are fp32 always, or float64 where
    everything is: that is for checks, under jax.enable_x64."""

    compute_dtype: jnp.dtype = jnp.dtype("float32")  # the operands of matrix products
    activation_dtype: jnp.dtype = jnp.dtype("float32")  # the activations between them
    single_cpu_layout: bool = False  # a single CPU device: lay operands out for its kernels
    batch_sharding: jax.sharding.NamedSharding | None = (
        None  # where the rows of activations live; None: one device
    )


def at_least_fp32(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def constrain_batch(x: jax.Array, policy: Policy) -> jax.Array:
    """x, its leading axis where the rows of the batch are.

    XLA does not see by itself that this is meant where weights are spread over the same devices (fsdp):
    it multiplies slices of channels and adds up activations of all rows, instead of gathering the
    weights (held by tests/aot/test_collectives.py).
    """
    return x if policy.batch_sharding is None else jax.lax.with_sharding_constraint(x, policy.batch_sharding)


def replicate(x: jax.Array, policy: Policy) -> jax.Array:
    """x, a weight, on every device."""
    if policy.batch_sharding is None:
        return x
    sharding = jax.sharding.NamedSharding(policy.batch_sharding.mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(x, sharding)


def row_major(x: jax.Array, policy: Policy) -> jax.Array:
    """x, on one CPU device really written in this order of axes.

    XLA turns a transpose into a mere change of layout, and a bf16 product that contracts over
    anything but its left operand's last axis in memory is then converted to fp32, at half the
    speed. (Several devices: the constraint costs an all-gather on jax 0.10.)
    """
    if not policy.single_cpu_layout:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def swap_last_axes(x: jax.Array, policy: Policy) -> jax.Array:
    """x with its last two axes swapped, as a left operand. fp32 kernels take any layout."""
    result = jnp.swapaxes(x, -1, -2)
    return row_major(result, policy) if policy.compute_dtype != jnp.float32 else result


def batched_dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Contraction over one axis each, leading axes but the last two are batch axes → fp32."""
    batch_axes = tuple(range(x.ndim - 2))
    dimensions = (((axes[0],), (axes[1],)), (batch_axes, batch_axes))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=at_least_fp32(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, policy: Policy) -> jax.Array:
    """[M, I] · [I, O] → fp32 [M, O]."""
    return batched_dot(x.astype(policy.compute_dtype), kernel.astype(policy.compute_dtype), (1, 0))


def _matmul_forward(x, kernel, policy: Policy):
    x_, kernel_ = x.astype(policy.compute_dtype), kernel.astype(policy.compute_dtype)
    return batched_dot(x_, kernel_, (1, 0)), (
        x_,
        kernel_,
        jnp.zeros((), x.dtype),
        jnp.zeros((), kernel.dtype),
    )


def _matmul_backward(policy: Policy, residuals, gradient):
    x, kernel, like_x, like_kernel = residuals
    gradient = gradient.astype(policy.compute_dtype)
    grad_x = batched_dot(gradient, kernel, (1, 1)).astype(like_x.dtype)
    grad_kernel = batched_dot(swap_last_axes(x, policy), gradient, (1, 0)).astype(like_kernel.dtype)
    return grad_x, grad_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(x: jax.Array, kernel: jax.Array, policy: Policy, num_input_axes: int = 1) -> jax.Array:
    """x [..., I…] · kernel [I…, O…] → fp32 [..., O…], over the last `contract` axes of x."""
    batch_shape, output_shape = x.shape[: x.ndim - num_input_axes], kernel.shape[num_input_axes:]
    input_shape = x.shape[x.ndim - num_input_axes :]
    size = functools.reduce(lambda a, b: a * b, input_shape)
    product = matmul(x.reshape(-1, size), kernel.reshape(size, -1), policy)
    return product.reshape(*batch_shape, *output_shape)
