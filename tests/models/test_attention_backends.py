"""Back ends of attention against the reference: every mask, grouped heads, positions, whole models."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo  # as if cuDNN were installed

from dwt_jax.errors import UserError
from dwt_jax.models import family
from dwt_jax.models.bert_config import Config as BertConfig
from dwt_jax.models.common import attention_backends
from dwt_jax.models.common.attention_backends import AttentionMask, attend, choose_backend, dense_mask
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.llama_config import Config as LlamaConfig
from helpers.small_models import random_params, small

B, L, Q, H, K = 2, 131, 5, 4, 8  # L: no multiple of a block, odd
BACKENDS = ("cudnn", "splash")
MASKS = [
    pytest.param(causal, window, id=f"{'causal' if causal else 'bidirectional'}-window{window}")
    for causal, window in itertools.product((False, True), (0, 7))
]


@pytest.fixture(autouse=True)
def without_devices(monkeypatch):
    """Interpret splash, in blocks smaller than a row; compute what cuDNN is given with XLA."""
    attention = jax.nn.dot_product_attention

    def xla_attention(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return attention(*arrays, implementation="xla", **options)

    make_kernel = functools.partial(attention_backends.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention_backends, "make_splash_mha", make_kernel)
    monkeypatch.setattr(attention_backends, "_SPLASH_BLOCKS", (128,))
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla_attention)
    monkeypatch.setattr(attention_backends, "_has_cudnn", lambda: True)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def segments(rows=B, length=L):
    """Rows of several segments; the last row ends in padding."""
    ids = np.sort(np.random.default_rng(0).integers(1, 5, (rows, length)), axis=1)
    ids[-1, -length // 4 :] = 0
    return jnp.asarray(ids, jnp.int32)


def context_and_gradients(projections, mask, policy, weights):
    def loss(projections, segment_ids, has_window):
        traced = mask._replace(segment_ids=segment_ids, has_window=has_window)
        context = attend(projections, traced, policy)
        return (context * weights).sum(), context

    return jax.jit(jax.grad(loss, has_aux=True))(projections, mask.segment_ids, mask.has_window)


def assert_equals_reference(backend, mask, kv_heads=H, num_queries=L, dtype="float32", tolerance=2e-6):
    projections = random(B, num_queries, 1, H, K), random(B, L, 2, kv_heads, K, seed=1)
    weights, dtype = random(B, num_queries, H, K, seed=2), jnp.dtype(dtype)
    policy = Policy(dtype, dtype)
    found = context_and_gradients(projections, mask, policy._replace(attention=backend), weights)
    expected = context_and_gradients(projections, mask, policy, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_reference(backend, causal, window, kv_heads):
    assert_equals_reference(backend, AttentionMask(segments(), None, causal, window), kv_heads)


@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_reference_at_positions(backend, causal, window):
    positions = jnp.asarray([[130, 0, 64, 70, 3], [1, 2, 40, 99, 129]])
    mask = AttentionMask(segments(), positions, causal, window)
    assert_equals_reference(backend, mask, kv_heads=2, num_queries=Q)


@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_reference_where_the_program_knows_the_window(backend, has_window):
    mask = AttentionMask(segments(), None, False, 7, jnp.asarray(has_window))
    assert_equals_reference(backend, mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_reference_in_bfloat16(backend):
    assert_equals_reference(backend, AttentionMask(segments()), 2, dtype="bfloat16", tolerance=2e-2)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_dense_mask_is_its_definition(data):
    length = data.draw(st.integers(1, 9))
    ids = data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
    positions = data.draw(st.none() | st.lists(st.integers(0, length - 1), min_size=1, max_size=4))
    causal, window = data.draw(st.booleans()), data.draw(st.integers(0, 4))
    has_window = data.draw(st.sampled_from([None, True, False]))
    mask = AttentionMask(
        jnp.asarray([ids]),
        None if positions is None else jnp.asarray([positions]),
        causal,
        window,
        None if has_window is None else jnp.asarray(has_window),
    )
    expected = [
        [
            ids[query] == ids[key]
            and (not causal or key <= query)
            and (not window or has_window is False or abs(query - key) < window)
            for key in range(length)
        ]
        for query in (range(length) if positions is None else positions)
    ]
    np.testing.assert_array_equal(dense_mask(mask)[0, 0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("bert", {}),
        ("modernbert", {"num_hidden_layers": 4, "local_attention": 4}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 3}),
        ("eurobert", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ],
)
def test_model_equals_reference(model_type, sizes, backend):
    """Last hidden states at some positions, for which the last layer has fewer queries, and all gradients."""
    config = small(model_type, max_position_embeddings=40, **sizes)
    params, ids = random_params(config), segments(length=19)
    tokens = np.random.default_rng(1).integers(5, config.vocab_size, ids.shape)
    positions, weights = jnp.asarray([[0, 7, 18], [3, 4, 11]]), random(B, 3, config.hidden_size)

    def apply(policy):
        def loss(params):
            encode = family(config).encode
            hidden = encode(params, config, tokens, ids, positions=positions, policy=policy)
            return (hidden * weights).sum(), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    found, expected = apply(Policy(attention=backend)), apply(Policy())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_refused(backend):
    projections, policy = (random(B, L, 3, H, K),), Policy(attention=backend)
    mask, key = AttentionMask(segments()), jax.random.key(0)
    attend(projections, mask, policy, key, dropout_rate=0.0)
    with pytest.raises(ValueError, match=rf"'{backend}' has no dropout, but the rate is 0\.1"):
        attend(projections, mask, policy, key, dropout_rate=0.1)


@pytest.mark.parametrize("num_queries", [L, Q])
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_is_lowered_for_cuda(monkeypatch, causal, num_queries):
    """A kernel forward and one backward, for grouped heads, an odd number of tokens and a window."""
    monkeypatch.undo()  # of the fixture
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    dtype = jnp.dtype("bfloat16")
    policy = Policy(dtype, dtype, attention="cudnn")
    positions = None if num_queries == L else jnp.zeros((B, Q), jnp.int32)

    def loss(query, key_value, ids):
        return attend((query, key_value), AttentionMask(ids, positions, causal, 7), policy).sum()

    shapes = (B, num_queries, 1, H, K), (B, L, 2, 2, K), (B, L)
    arguments = map(jax.ShapeDtypeStruct, shapes, (dtype, dtype, jnp.int32))
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",))
    calls = [line for line in lowered.as_text().splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2
    mask_type = "CAUSAL" if causal and num_queries == L else "NO_MASK"  # of queries that stand where they are
    assert all(f"{mask_type}\\22" in line for line in calls)


@pytest.mark.parametrize(("model_type", "sizes"), [("modernbert", {}), ("mistral", {"sliding_window": 9})])
def test_cudnn_keeps_no_mask_of_a_layer(monkeypatch, model_type, sizes):
    """The loop over five layers stacks neither mask nor bias for the backward pass, nor computes twice."""
    monkeypatch.undo()  # of the fixture
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    config, dtype, length = small(model_type, num_hidden_layers=5, **sizes), jnp.dtype("bfloat16"), 20
    policy = Policy(dtype, dtype, attention="cudnn")

    def loss(params, tokens):
        return family(config).encode(params, config, tokens, tokens, policy=policy).sum()

    arguments = family(config).abstract_params(config), jax.ShapeDtypeStruct((B, length), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert f"{B}x1x{length}x{length}xbf16" in lowered
    assert f"5x{B}x1x{length}x{length}x" not in lowered
    assert lowered.count("__cudnn$fmha") == 2


@pytest.mark.parametrize("has_window", [None, True])
def test_splash_is_lowered_for_tpu(monkeypatch, has_window):
    """Three kernels, forward and backward; with and without a window where the program knows it."""
    monkeypatch.undo()  # of the fixture
    dtype = jnp.dtype("bfloat16")
    policy = Policy(dtype, dtype, attention="splash")

    def loss(query, key_value, ids, has_window):
        mask = AttentionMask(ids, window=7, has_window=has_window)
        return attend((query, key_value), mask, policy).sum()

    arrays = [jnp.zeros(shape, dtype) for shape in ((B, L, 1, H, K), (B, L, 2, 2, K))]
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arrays, segments(), has_window)
    kernels = traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")
    assert kernels == (3 if has_window is None else 6)


PLAIN = LlamaConfig(hidden_size=64, num_attention_heads=4)
DROPOUT = BertConfig(hidden_size=64, num_attention_heads=4, attention_probs_dropout_prob=0.25)
WIDE = dataclasses.replace(PLAIN, head_dim=160, model_type="qwen3")


@pytest.mark.parametrize(
    ("student", "teacher", "dtype", "platform", "expected"),
    [
        (PLAIN, None, "bfloat16", "tpu", "splash"),
        (PLAIN, None, "float32", "tpu", "splash"),
        (PLAIN, DROPOUT, "bfloat16", "tpu", "splash"),  # a teacher has no dropout
        (DROPOUT, None, "bfloat16", "tpu", "reference"),
        (WIDE, None, "bfloat16", "tpu", "splash"),
        (PLAIN, None, "bfloat16", "cuda", "cudnn"),
        (PLAIN, None, "float32", "cuda", "reference"),
        (PLAIN, WIDE, "bfloat16", "cuda", "reference"),
        (DROPOUT, None, "bfloat16", "cuda", "reference"),
        (PLAIN, None, "bfloat16", "rocm", "reference"),
        (PLAIN, None, "bfloat16", "cpu", "reference"),
    ],
)
def test_auto_chooses_what_can_compute_all_models(student, teacher, dtype, platform, expected):
    models = [student, *([teacher] if teacher else [])]
    with jax.default_matmul_precision(None):
        assert choose_backend("auto", models, jnp.dtype(dtype), platform, 1024) == expected
        assert choose_backend("reference", models, jnp.dtype(dtype), platform, 1024) == "reference"
        assert choose_backend(expected, models, jnp.dtype(dtype), platform, 1024) == expected
        assert choose_backend("auto", models, jnp.dtype(dtype), platform, 1023) == "reference"
        assert choose_backend(expected, models, jnp.dtype(dtype), platform, 128) == expected


def test_splash_has_no_exact_products_of_bfloat16():
    """libtpu 0.0.52 cannot compile them; of fp32 it can."""
    bfloat16, float32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    with jax.default_matmul_precision("float32"):
        assert choose_backend("auto", [PLAIN], bfloat16, "tpu", 1024) == "reference"
        assert choose_backend("auto", [PLAIN], float32, "tpu", 1024) == "splash"
        message = "expected no JAX_DEFAULT_MATMUL_PRECISION for products of bfloat16, found float32"
        with pytest.raises(UserError, match=message):
            choose_backend("splash", [PLAIN], bfloat16, "tpu", 1024)


def test_cudnn_that_is_not_installed_is_not_chosen(monkeypatch):
    monkeypatch.setattr(attention_backends, "_has_cudnn", lambda: False)
    assert choose_backend("auto", [PLAIN], jnp.dtype("bfloat16"), "cuda", 1024) == "reference"
    with pytest.raises(UserError, match="expected cuDNN, which is not installed"):
        choose_backend("cudnn", [PLAIN], jnp.dtype("bfloat16"), "cuda", 1024)


@pytest.mark.parametrize(
    ("setting", "student", "dtype", "platform", "message"),
    [
        ("splash", PLAIN, "bfloat16", "cpu", "'splash', expected the platform tpu, found cpu"),
        ("cudnn", PLAIN, "bfloat16", "tpu", "'cudnn', expected the platform cuda, found tpu"),
        ("splash", DROPOUT, "bfloat16", "tpu", "a model without dropout of attention, found a rate of 0.25"),
        ("cudnn", PLAIN, "float32", "cuda", "precision.compute_dtype=bfloat16, found float32"),
        ("cudnn", WIDE, "bfloat16", "cuda", "heads of a multiple of 8 channels up to 128, found 160"),
    ],
)
def test_backend_that_cannot_compute_a_model_is_refused(setting, student, dtype, platform, message):
    with pytest.raises(UserError, match=message) as error:
        choose_backend(setting, [student], jnp.dtype(dtype), platform, 1024)
    assert str(error.value).startswith("config: precision.attention is ")
    assert "\n" not in str(error.value)
