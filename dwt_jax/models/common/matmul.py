"""Matrix products with a custom backward pass.

Operands are in the compute dtype and results in fp32, as an MXU computes them. Autodiff would save
the fp32 activations for the backward pass and multiply with fp32 cotangents. Here the residuals and
every operand of the backward pass are in the compute dtype too. `matmul_reference` is the plain form.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

AttentionBackend = Literal["reference", "cudnn", "splash"]
"""See attention_backends.py."""


class Policy(NamedTuple):
    """Dtypes for compute and activations, the back end of attention, and the layout of arrays.

    Norms, softmax and losses are always fp32, or float64 if all inputs are (for checks under
    jax.enable_x64).
    """

    compute_dtype: jnp.dtype = jnp.dtype("float32")  # operands of matrix products
    activation_dtype: jnp.dtype = jnp.dtype("float32")  # activations between them
    single_cpu_layout: bool = False  # one CPU device: lay operands out for its kernels
    batch_sharding: jax.sharding.NamedSharding | None = None  # of the rows of activations; None: one device
    attention: AttentionBackend = "reference"


def at_least_fp32(x: jax.Array) -> jnp.dtype:
    """Return fp32, or float64 for a float64 array."""
    return jnp.promote_types(x.dtype, jnp.float32)


def constrain_batch(x: jax.Array, policy: Policy) -> jax.Array:
    """Constrain the leading axis of activations to the batch's sharding.

    Without this constraint XLA shards activations over channels under FSDP and all-reduces them, instead
    of all-gathering the weights (held by tests/multidevice/test_collectives.py).
    """
    return x if policy.batch_sharding is None else jax.lax.with_sharding_constraint(x, policy.batch_sharding)


def replicate(x: jax.Array, policy: Policy) -> jax.Array:
    """Constrain a weight to be replicated on every device."""
    if policy.batch_sharding is None:
        return x
    sharding = jax.sharding.NamedSharding(policy.batch_sharding.mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(x, sharding)


def row_major(x: jax.Array, policy: Policy) -> jax.Array:
    """Write x to memory in this order of axes, on one CPU device.

    XLA turns a transpose into a change of layout alone. A bf16 product that contracts over anything but
    the last axis of its left operand in memory is then converted to fp32, at half the speed. (On several
    devices the constraint costs an all-gather on jax 0.10.)
    """
    if not policy.single_cpu_layout:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def swap_last_axes(x: jax.Array, policy: Policy) -> jax.Array:
    """Swap the last two axes of a left operand. fp32 kernels take any layout."""
    result = jnp.swapaxes(x, -1, -2)
    return row_major(result, policy) if policy.compute_dtype != jnp.float32 else result


def batched_dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Contract one axis of each operand. All axes but the last two are batch axes. Returns fp32."""
    batch_axes = tuple(range(x.ndim - 2))
    dimensions = (((axes[0],), (axes[1],)), (batch_axes, batch_axes))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=at_least_fp32(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, policy: Policy) -> jax.Array:
    """Multiply x [M, I] by a kernel [I, O]. Returns fp32 [M, O]."""
    return batched_dot(x.astype(policy.compute_dtype), kernel.astype(policy.compute_dtype), (1, 0))


def matmul_reference(x: jax.Array, kernel: jax.Array, policy: Policy) -> jax.Array:
    """Compute what `matmul` computes, with JAX's own backward pass. The two agree exactly in fp32."""
    return jnp.matmul(
        x.astype(policy.compute_dtype),
        kernel.astype(policy.compute_dtype),
        preferred_element_type=at_least_fp32(x),
    )


def _matmul_forward(x: jax.Array, kernel: jax.Array, policy: Policy) -> tuple[jax.Array, Any]:
    x_, kernel_ = x.astype(policy.compute_dtype), kernel.astype(policy.compute_dtype)
    return batched_dot(x_, kernel_, (1, 0)), (
        x_,
        kernel_,
        jnp.zeros((), x.dtype),
        jnp.zeros((), kernel.dtype),
    )


def _matmul_backward(policy: Policy, residuals: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like_x, like_kernel = residuals
    gradient = gradient.astype(policy.compute_dtype)
    grad_x = batched_dot(gradient, kernel, (1, 1)).astype(like_x.dtype)
    grad_kernel = batched_dot(swap_last_axes(x, policy), gradient, (1, 0)).astype(like_kernel.dtype)
    return grad_x, grad_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


def linear(x: jax.Array, kernel: jax.Array, policy: Policy, num_input_axes: int = 1) -> jax.Array:
    """Multiply x [..., I…] by a kernel [I…, O…], over the last `num_input_axes` axes of x.

    Returns:
        fp32 [..., O…].
    """
    batch_shape, output_shape = x.shape[: x.ndim - num_input_axes], kernel.shape[num_input_axes:]
    input_shape = x.shape[x.ndim - num_input_axes :]
    size = functools.reduce(lambda a, b: a * b, input_shape)
    product = matmul(x.reshape(-1, size), kernel.reshape(size, -1), policy)
    return product.reshape(*batch_shape, *output_shape)
