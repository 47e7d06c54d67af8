"""Attention back ends. Each one converts the same mask description to the inputs of its kernel.

- reference: dense scores and probabilities, see attention.py. Any device and dtype, with dropout.
- cudnn: cuDNN's fused attention on NVIDIA GPUs, by jax.nn.dot_product_attention. Segments and windows go
  into a dense bias [B, 1, Q, L]: JAX's public function has no arguments for segments.
- splash: the block-sparse kernel for TPUs in jax.experimental.pallas. Its masks take no memory of size
  [L, L], and blocks that a window or causality masks are skipped.

The last two keep no probabilities for the backward pass. A back end rejects what it does not support: see
`choose_backend` for configs; the functions raise ValueError. Letters of shapes: see models/bert.py, R heads
of keys and values.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import PartitionSpec

from dwt_jax.errors import UserError
from dwt_jax.models.common.attention import causal_mask, dot_product_attention, segment_mask, window_mask
from dwt_jax.models.common.dropout import dropout_mask, keep_threshold
from dwt_jax.models.common.matmul import AttentionBackend, Policy
from dwt_jax.models.protocol import ModelConfig

MIN_KERNEL_LENGTH = 1024
"""Tokens of a row from which `auto` takes a kernel: in shorter ones, dense scores take little memory."""

_SPLASH_BLOCKS = (512, 256, 128)  # tokens; the largest that pads rows no further than the smallest


class AttentionMask(NamedTuple):
    """The keys that a query attends to: itself, and those that meet all of these conditions.

    Attributes:
        segment_ids: int [B, L]. The key is in the query's segment.
        query_positions: int [B, Q], positions of the queries in their rows; None: Q = L, all positions.
            Queries at the same position count as equal.
        is_causal: the key is the query or before it.
        window: the key is fewer than this many tokens away; 0: at any distance.
        has_window: bool scalar, whether `window` applies, if it is known only at run time; None: it applies.
    """

    segment_ids: jax.Array
    query_positions: jax.Array | None = None
    is_causal: bool = False
    window: int = 0
    has_window: jax.Array | None = None


def dense_mask(mask: AttentionMask) -> jax.Array:
    """Return the mask as bool [B, 1, Q, L]."""
    segment_ids, positions = mask.segment_ids, mask.query_positions
    columns = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    query_columns, query_segments = columns, segment_ids
    if positions is not None:
        query_columns, query_segments = positions, jnp.take_along_axis(segment_ids, positions, axis=1)
    allowed = segment_mask(query_segments, segment_ids)
    if mask.window:
        window = window_mask(query_columns, columns, mask.window - 1)
        allowed &= window if mask.has_window is None else ~mask.has_window | window
    return allowed & causal_mask(query_columns, columns) if mask.is_causal else allowed


def attend(
    projections: tuple[jax.Array, ...],
    mask: AttentionMask,
    policy: Policy,
    key: jax.Array | None = None,
    dropout_rate: float = 0.0,
) -> jax.Array:
    """Compute softmax attention with the back end of the policy.

    Args:
        projections: queries [B, Q, 1, H, K], keys and values [B, L, 1, R, K], in this order, of which those
            with equal shapes may be stacked on the third axis. H / R query heads share a head of keys.
        mask: which keys a query attends to.
        policy: dtype of the products, back end and sharding.
        key: PRNG key of dropout; None: no dropout.
        dropout_rate: share of the probabilities that is dropped.

    Returns:
        fp32 [B, Q, H, K].

    Raises:
        ValueError: dropout with a back end that has none.
    """
    if policy.attention == "reference":
        return _reference(projections, mask, policy, key, dropout_rate)
    if key is not None and dropout_rate > 0:
        raise ValueError(
            f"attention back end {policy.attention!r} has no dropout, but the rate is {dropout_rate}"
        )
    query, keys, values = (
        projection[:, :, i].astype(policy.compute_dtype)
        for projection in projections
        for i in range(projection.shape[2])
    )
    backend = {"cudnn": _cudnn, "splash": _splash}[policy.attention]
    if policy.batch_sharding is None:
        return backend(query, keys, values, mask)

    def attend_on_device(query, keys, values, *arrays):  # type: ignore[no-untyped-def]
        fields = dict(zip(("segment_ids", "query_positions", "has_window"), arrays, strict=True))
        return backend(query, keys, values, mask._replace(**fields))

    # Kernels are not partitioned by XLA: every device runs one for its own rows and heads.
    mesh, (rows,) = policy.batch_sharding.mesh, policy.batch_sharding.spec
    heads = None if keys.shape[2] % mesh.shape["tensor"] else "tensor"
    by_head, by_row = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    return jax.shard_map(
        attend_on_device,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, by_row, by_row, PartitionSpec()),
        out_specs=by_head,
        check_vma=False,  # pallas calls have no rule for it
    )(query, keys, values, mask.segment_ids, mask.query_positions, mask.has_window)


def _reference(
    projections: tuple[jax.Array, ...],
    mask: AttentionMask,
    policy: Policy,
    key: jax.Array | None,
    dropout_rate: float,
) -> jax.Array:
    """Compute grouped heads as additional queries of the head of keys and values that they share.

    Queries become [B, G·Q, R, K], so nothing is repeated.
    """
    (batch, length, _, heads, size), kv_heads = projections[0].shape, projections[-1].shape[3]
    groups, allowed = heads // kv_heads, dense_mask(mask)
    if groups > 1:
        query = projections[0].reshape(batch, length, kv_heads, groups, size).transpose(0, 3, 1, 2, 4)
        query = query.reshape(batch, groups * length, 1, kv_heads, size)
        projections, allowed = (query, *projections[1:]), jnp.tile(allowed, (1, 1, groups, 1))
    mask_shape = (batch, kv_heads, groups * length, mask.segment_ids.shape[1])
    keep = dropout_mask(key, dropout_rate, mask_shape)
    scale = 65536 / keep_threshold(dropout_rate)
    context = dot_product_attention(projections, allowed, policy, keep, scale)
    if groups > 1:
        context = context.reshape(batch, groups, length, kv_heads, size).transpose(0, 2, 3, 1, 4)
        context = context.reshape(batch, length, heads, size)
    return context


def _cudnn(query: jax.Array, keys: jax.Array, values: jax.Array, mask: AttentionMask) -> jax.Array:
    """Attend with cuDNN: queries [B, Q, H, K], keys and values [B, L, R, K].

    The dense mask holds all conditions. `is_causal` repeats one so that cuDNN skips masked blocks. The window
    is not passed, since cuDNN has no two-sided one.
    """
    num_queries = query.shape[1]
    query, keys, values, mask = _pad_rows(
        query, keys, values, mask, 2, 2
    )  # its backward pass wants even sizes
    is_causal = mask.is_causal and mask.query_positions is None

    def attend_with_mask(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            query, keys, values, mask=dense_mask(mask), is_causal=is_causal, implementation="cudnn"
        )

    context = jax.checkpoint(attend_with_mask, policy=_is_cudnn_output)(query, keys, values)
    return context[:, :num_queries].astype(jnp.float32)


def _is_cudnn_output(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep what the kernel returns for the backward pass, but not the bias of every layer.

    Were its primitive renamed, the kernel would run once more.
    """
    return str(primitive).startswith("dot_product_attention_fwd")


def _splash(query: jax.Array, keys: jax.Array, values: jax.Array, mask: AttentionMask) -> jax.Array:
    """Attend with splash: queries [B, Q, H, K], keys and values [B, L, R, K]."""
    if mask.window and mask.has_window is not None:  # its masks are static
        return jax.lax.cond(
            mask.has_window,
            lambda: _splash(query, keys, values, mask._replace(has_window=None)),
            lambda: _splash(query, keys, values, mask._replace(has_window=None, window=0)),
        )
    if mask.query_positions is not None and (mask.is_causal or mask.window):
        return _splash_at_positions(query, keys, values, mask)
    num_queries, heads, size = query.shape[1:]
    blocks = _splash_block(num_queries), _splash_block(keys.shape[1])
    query, keys, values, mask = _pad_rows(query, keys, values, mask, *blocks)
    query_segments = mask.segment_ids
    if mask.query_positions is not None:
        query_segments = jnp.take_along_axis(mask.segment_ids, mask.query_positions, axis=1)
    kernel = make_splash_mha(
        MultiHeadMask([_splash_mask(mask, (query.shape[1], keys.shape[1]))] * heads),
        block_sizes=_block_sizes(*blocks),
        head_shards=1,
        q_seq_shards=1,
    )
    query = (query * size**-0.5).astype(keys.dtype)
    context = jax.vmap(kernel)(
        *(x.transpose(0, 2, 1, 3) for x in (query, keys, values)),
        segment_ids=SegmentIds(query_segments, mask.segment_ids),
    )
    return context.transpose(0, 2, 1, 3)[:, :num_queries].astype(jnp.float32)


def _splash_at_positions(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: AttentionMask
) -> jax.Array:
    """Spread the queries over their rows, since splash knows a query's position by its index alone."""
    positions = mask.query_positions
    assert positions is not None
    rows, queries = jnp.arange(positions.shape[0])[:, None], jnp.arange(positions.shape[1])
    index = jnp.zeros(mask.segment_ids.shape, jnp.int32).at[rows, positions].set(queries)
    spread = jnp.take_along_axis(query, index[:, :, None, None], axis=1)
    context = _splash(spread, keys, values, mask._replace(query_positions=None))
    return jnp.take_along_axis(context, positions[:, :, None, None], axis=1)


def _splash_mask(mask: AttentionMask, shape: tuple[int, int]) -> CausalMask | LocalMask | FullMask:
    if mask.window:
        return LocalMask(shape, (mask.window - 1, 0 if mask.is_causal else mask.window - 1), 0)
    return CausalMask(shape) if mask.is_causal else FullMask(shape)


def _splash_block(size: int) -> int:
    padded = -(-size // _SPLASH_BLOCKS[-1]) * _SPLASH_BLOCKS[-1]
    return next(block for block in _SPLASH_BLOCKS if padded % block == 0)


def _block_sizes(block_q: int, block_kv: int) -> BlockSizes:
    return BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )


def _pad_rows(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: AttentionMask,
    query_multiple: int,
    multiple: int,
) -> tuple[jax.Array, jax.Array, jax.Array, AttentionMask]:
    """Pad Q and L to multiples. Keys are padded by a segment of their own, positions by their last one."""

    def pad(x: jax.Array, multiple: int, **options: object) -> jax.Array:
        widths = [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, **options)  # type: ignore[arg-type]

    mask = mask._replace(segment_ids=pad(mask.segment_ids, multiple, constant_values=-1))
    if mask.query_positions is not None:
        mask = mask._replace(query_positions=pad(mask.query_positions, query_multiple, mode="edge"))
    return pad(query, query_multiple), pad(keys, multiple), pad(values, multiple), mask


def choose_backend(
    setting: str,
    models: Sequence[ModelConfig],
    compute_dtype: jnp.dtype,
    platform: str,
    length: int,
    key: str = "config: precision.attention",
) -> AttentionBackend:
    """Return the back end of a program.

    Args:
        setting: of the config, `precision.attention`. auto: splash on TPU and cudnn on NVIDIA GPUs where
            they can compute all models and rows are long enough, else reference.
        models: the student (the only one with dropout) and the teachers.
        compute_dtype: of matrix products.
        platform: jax's name of it: cpu, tpu, cuda, rocm.
        length: L, tokens of a row.
        key: config key of the setting, for the error.

    Raises:
        UserError: the requested back end does not support the models.
    """
    choices: tuple[AttentionBackend, ...] = ("splash", "cudnn", "reference")
    for name in choices:
        reason = _refusal(name, models, compute_dtype, platform)
        if name == setting and reason:
            raise UserError(f"{key} is {setting!r}, {reason}")
        is_useful = name == "reference" or length >= MIN_KERNEL_LENGTH
        if name == setting or (setting == "auto" and is_useful and not reason):
            return name
    raise UserError(f"{key} is {setting!r}, expected 'auto', 'reference', 'cudnn' or 'splash'")


def _refusal(name: str, models: Sequence[ModelConfig], compute_dtype: jnp.dtype, platform: str) -> str:
    """The unmet requirement of a back end, or an empty text."""
    if name == "reference":
        return ""
    expected_platform = {"splash": "tpu", "cudnn": "cuda"}[name]
    if platform != expected_platform:
        return f"expected the platform {expected_platform}, found {platform}"
    if rate := models[0].attention_dropout_rate:
        return f"expected a model without dropout of attention, found a rate of {rate}"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if name == "splash" and compute_dtype != jnp.float32 and precision not in (None, "default", "bfloat16"):
        # The compiler of its kernels has no such products.
        return f"expected no JAX_DEFAULT_MATMUL_PRECISION for products of {compute_dtype}, found {precision}"
    if name == "cudnn":
        if not _has_cudnn():
            return "expected cuDNN, which is not installed"
        if compute_dtype not in (jnp.bfloat16, jnp.float16):
            return f"expected precision.compute_dtype=bfloat16, found {compute_dtype}"
        for model in models:
            if model.head_size % 8 or model.head_size > 128:
                return f"expected heads of a multiple of 8 channels up to 128, found {model.head_size}"
    return ""


def _has_cudnn() -> bool:
    """Whether jax finds cuDNN, which tracing needs too: it depends on the version."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
    except RuntimeError:
        return False
    return True
