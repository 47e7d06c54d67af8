"""The encoder against BertForMaskedLM of transformers in torch."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.hf.checkpoint import to_hf_tensors
from dwt_jax.models import bert as models_bert
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.attention import dot_product_attention, segment_mask
from dwt_jax.models.common.dropout import dropout, dropout_mask, keep_threshold
from dwt_jax.models.common.layers import (
    ACTIVATIONS,
    gather_positions,
    padded_vocab_size,
    positions_in_segments,
)
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.protocol import Activation

torch = pytest.importorskip("torch")
ACT2FN = pytest.importorskip("transformers.activations").ACT2FN

L = 16
encode = jax.jit(models_bert.encode, static_argnums=1, static_argnames="policy")
mlm_logits = jax.jit(lm_head_logits, static_argnums=1, static_argnames="policy")


def batch(model, rows=3, length=L, seed=0):
    """(tokens, segments, types): rows that are full, short and shorter; no token 0 outside padding."""
    random = np.random.default_rng(seed)
    segments = (np.arange(length) < np.linspace(length, 3, rows).astype(int)[:, None]).astype(np.int32)
    tokens = random.integers(1, model.vocab_size, (rows, length)).astype(np.int32) * segments
    types = random.integers(0, model.type_vocab_size, (rows, length)).astype(np.int32) * segments
    return tokens, segments, types


def as_torch(tokens, segments, types):
    return {
        "input_ids": torch.tensor(tokens).long(),
        "attention_mask": torch.tensor(segments > 0).long(),
        "token_type_ids": torch.tensor(types).long(),
    }


def both(params, model, inputs, bert):
    """(hidden states, logits) here and there."""

    hidden = encode(params, model, *inputs)
    logits = mlm_logits(params, model, hidden)
    with torch.no_grad():
        hidden_there = bert.bert(**as_torch(*inputs)).last_hidden_state
        logits_there = bert(**as_torch(*inputs)).logits
    return (hidden, logits), (hidden_there.numpy(), logits_there.numpy())


@pytest.fixture(scope="module")
def params(tiny, randomised):
    return randomised(tiny)


models = st.builds(
    lambda heads, size, **rest: BertConfig(
        hidden_size=heads * size, num_attention_heads=heads, max_position_embeddings=L + 3, **rest
    ),
    heads=st.integers(1, 4),
    size=st.sampled_from([3, 4, 8]),
    num_hidden_layers=st.integers(1, 4),
    intermediate_size=st.sampled_from([5, 24, 64]),
    vocab_size=st.sampled_from([7, 101, 255, 256, 257, 300]),
    type_vocab_size=st.integers(1, 4),
    hidden_act=st.sampled_from(["gelu", "gelu_new", "relu"]),
    layer_norm_eps=st.sampled_from([1e-12, 1e-5, 0.1]),
)


@pytest.mark.slow
@given(models, st.integers(0, 1000))
@settings(max_examples=7)
def test_hidden_states_and_logits_are_transformers(randomised, torch_bert, model, seed):
    params, inputs = randomised(model, seed), batch(model, seed=seed)
    (hidden, logits), (hidden_there, logits_there) = both(params, model, inputs, torch_bert(params, model))
    real = inputs[1] > 0  # transformers lets padding look at the text; nobody reads it
    np.testing.assert_allclose(hidden[real], hidden_there[real], atol=2e-5)
    np.testing.assert_allclose(logits[..., : model.vocab_size][real], logits_there[real], atol=5e-5)
    assert logits.shape[-1] % 256 == 0
    assert logits.shape[-1] - model.vocab_size < 256


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activation_and_its_derivative_equal_transformers(activation):
    x = np.linspace(-12, 12, 481, dtype=np.float32) + 0.01  # not where a derivative jumps
    function = ACTIVATIONS[activation]
    x_torch = torch.tensor(x, requires_grad=True)
    expected = ACT2FN[activation](x_torch)
    expected.sum().backward()
    np.testing.assert_allclose(function(x), expected.detach(), atol=2e-6, rtol=1e-6)
    derivative = jax.grad(lambda x: function(x).sum())(x)
    np.testing.assert_allclose(derivative, x_torch.grad, atol=1e-5)


def test_activations_are_those_of_transformers_without_parameters():
    stateless = {name for name in ACT2FN if not list(ACT2FN[name].parameters())}
    assert stateless == set(ACTIVATIONS) == set(get_args(Activation))


def test_types_default_to_zero(tiny, params):
    tokens, segments, _ = batch(tiny)
    none = encode(params, tiny, tokens, segments, None)
    zero = encode(params, tiny, tokens, segments, np.zeros_like(tokens))
    np.testing.assert_array_equal(none, zero)


def test_new_parameters_of_a_model_with_initializer_range_0(tiny):
    """Its config.json says so, but a new head of zeros would not train."""
    model = dataclasses.replace(tiny, initializer_range=0.0)
    heads = models_bert.init_params(model, jax.random.key(3), ("pooler", "classifier"))
    assert np.std(heads["pooler"]["kernel"]) == pytest.approx(0.02, rel=0.2)


def test_initialisation_is_berts(tiny):
    model = dataclasses.replace(tiny, initializer_range=0.05)
    init = jax.jit(models_bert.init_params, static_argnums=0)
    params = init(model, jax.random.key(3))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, leaf = path[-1].key, np.asarray(leaf)
        assert leaf.dtype == np.float32
        if name == "scale":
            assert (leaf == 1).all()
        elif name == "bias":
            assert (leaf == 0).all()
        else:
            sigma = 0.05 / np.sqrt(leaf.size)
            assert abs(leaf.mean()) < 5 * sigma
            assert leaf.std() == pytest.approx(0.05, abs=5 * sigma)
    layers = params["layers"]["mlp"]["input"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])
    again = init(model, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other = init(model, jax.random.key(4))
    assert not np.array_equal(
        params["embeddings"]["word"]["embedding"], other["embeddings"]["word"]["embedding"]
    )


def test_the_number_of_parameters_is_transformers(tiny, torch_bert, params):
    here = sum(array.size for array in to_hf_tensors(params, tiny).values())
    assert here == sum(p.numel() for p in torch_bert(params, tiny).parameters())
    padding = (padded_vocab_size(tiny.vocab_size) - tiny.vocab_size) * (tiny.hidden_size + 1)
    assert sum(x.size for x in jax.tree.leaves(models_bert.abstract_params(tiny))) == here + padding


def test_an_open_vocabulary_is_refused(tiny):
    unresolved = dataclasses.replace(tiny, vocab_size=0)
    with pytest.raises(ValueError, match="vocab_size"):
        models_bert.init_params(unresolved, jax.random.key(0))


@pytest.mark.parametrize(("size", "padded"), [(1, 256), (256, 256), (257, 512), (30522, 30720)])
def test_padded_vocabulary(size, padded):
    assert padded_vocab_size(size) == padded


def test_positions_start_anew_in_each_segment():
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 0]])
    found = positions_in_segments(jnp.asarray(segments))
    np.testing.assert_array_equal(found[0, :6], [0, 1, 2, 0, 1, 0])
    np.testing.assert_array_equal(found[1], range(8))
    assert ((found >= 0) & (found < 8)).all()


def test_documents_packed_in_a_row_do_not_see_each_other(tiny, params):
    tokens, segments, types = np.zeros((3, 3, L), np.int32)
    random = np.random.default_rng(0)
    segments[0] = [1] * 7 + [2] * 5 + [0] * 4
    tokens[0, :12], types[0, :12] = random.integers(1, tiny.vocab_size, 12), random.integers(0, 2, 12)
    for row, part in ((1, slice(0, 7)), (2, slice(7, 12))):
        size = part.stop - part.start
        tokens[row, :size], types[row, :size], segments[row, :size] = tokens[0, part], types[0, part], 1
    hidden = encode(params, tiny, tokens, segments, types)
    np.testing.assert_allclose(hidden[0, :7], hidden[1, :7], atol=2e-6)
    np.testing.assert_allclose(hidden[0, 7:12], hidden[2, :5], atol=2e-6)
    # and what the other document or the padding says matters not at all
    tokens[0, 7:] = 5
    np.testing.assert_array_equal(encode(params, tiny, tokens, segments, types)[0, :7], hidden[0, :7])


def test_the_head_at_gathered_positions(tiny, params):
    hidden = encode(params, tiny, *batch(tiny))
    positions = np.random.default_rng(1).integers(0, L, (3, 4))
    full = mlm_logits(params, tiny, hidden)
    at = mlm_logits(params, tiny, gather_positions(hidden, jnp.asarray(positions)))
    for row in range(3):
        for i, position in enumerate(positions[row]):
            np.testing.assert_allclose(at[row, i], full[row, position], atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1}, {"gated_layers": True}], ids=str)
def test_the_last_layer_at_the_wanted_positions_alone(tiny, randomised, changes):
    """Values and gradients are those of all positions, gathered afterwards: in packed rows, at positions
    that are repeated or padding, through one layer (which then is the last) and gates."""
    model = dataclasses.replace(tiny, **changes)
    params = randomised(model)
    if "gated_layers" in changes:
        params["layers"]["gate"] = jnp.linspace(0.2, 0.9, model.num_hidden_layers)
    random = np.random.default_rng(0)
    tokens, segments, types = batch(model)
    segments[0, L // 2 :] += 1
    positions = jnp.array([[0, 5, 5, L - 1], [9, 3, 0, L - 1], [2, 0, 0, 0]])
    weights = jnp.asarray(random.normal(size=(3, 4, model.hidden_size)), jnp.float32)

    def of(encoded):
        return jax.jit(jax.value_and_grad(lambda p: (encoded(p) * weights).sum()))(params)

    def seeds_in_parallel(p):
        return models_bert.encode(p, model, tokens, segments, types, positions=positions)

    def afterwards(p):
        return gather_positions(models_bert.encode(p, model, tokens, segments, types), positions)

    np.testing.assert_allclose(seeds_in_parallel(params), afterwards(params), atol=2e-6)
    (value, found), (expected_value, expected) = of(seeds_in_parallel), of(afterwards)
    assert float(value) == pytest.approx(float(expected_value), abs=1e-4)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()), err_msg=str(path))


def test_dropout_of_the_wanted_positions(tiny, params):
    """There too: another draw for each key and layer, and in the mean what all positions have."""
    model = dataclasses.replace(tiny, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    inputs, positions = batch(model), jnp.tile(jnp.arange(L)[None], (3, 1))
    keys = jax.random.split(jax.random.key(0), 400)

    def mean(at):
        run = jax.vmap(lambda key: models_bert.encode(params, model, *inputs, positions=at, key=key))
        draws = jax.jit(run)(keys)
        assert np.asarray(draws.std(0))[np.asarray(inputs[1]) > 0].min() > 1e-3
        return draws.mean(0), draws.std(0) / np.sqrt(len(keys))

    (found, error), (expected, _) = mean(positions), mean(None)
    z = np.asarray((found - expected) / (error * np.sqrt(2)))[np.asarray(inputs[1]) > 0]
    assert np.sqrt(np.mean(z**2)) < 1.5  # 1 in expectation, were all of them independent
    assert np.abs(z).max() < 7


def test_padding_of_the_vocabulary_has_no_probability(tiny, params):
    for compute in (jnp.float32, jnp.bfloat16):
        policy = Policy(compute, compute)
        hidden = encode(params, tiny, *batch(tiny), policy=policy)
        logits = mlm_logits(params, tiny, hidden, policy=policy)
        assert logits.dtype == jnp.float32
        assert np.isfinite(logits).all()
        assert not np.any(jax.nn.softmax(logits)[..., tiny.vocab_size :])


def test_padding_of_the_vocabulary_gets_no_gradient(tiny, params):
    """Nor does a row that is nothing but padding make anything infinite."""
    tokens, segments, types = batch(tiny)
    segments[2] = 0

    def loss(params):
        hidden = encode(params, tiny, tokens, segments, types)
        return jax.nn.logsumexp(mlm_logits(params, tiny, hidden), axis=-1).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert not np.any(gradient["embeddings"]["word"]["embedding"][tiny.vocab_size :])
    assert not np.any(gradient["mlm"]["bias"][tiny.vocab_size :])


def test_gradient_of_the_mlm_loss_is_torchs(tiny, params, torch_bert):
    inputs = batch(tiny)
    tokens, segments, _ = inputs
    random = np.random.default_rng(5)
    chosen = (random.random(tokens.shape) < 0.4) & (segments > 0)
    labels = np.where(chosen, random.integers(0, tiny.vocab_size, tokens.shape), -100)

    bert = torch_bert(params, tiny, torch.float64)
    there = bert(**as_torch(*inputs), labels=torch.tensor(labels).long()).loss
    there.backward()

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = mlm_logits(params, tiny, encode(params, tiny, *inputs))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[
            ..., 0
        ]
        return -(picked * chosen).sum() / chosen.sum()

    value, gradient = loss(params)
    np.testing.assert_allclose(value, there.item(), rtol=1e-6)
    found = to_hf_tensors(gradient, tiny)
    expected = {name: p.grad.numpy() for name, p in bert.named_parameters()}
    assert set(found) == set(expected)
    for name, array in found.items():
        scale = max(np.abs(expected[name]).max(), 1e-3)
        np.testing.assert_allclose(array / scale, expected[name] / scale, atol=2e-5, err_msg=name)


def test_attention_of_some_queries_and_its_gradient():
    """Queries by themselves: what all of them get, at their places; and the same gradient."""
    random = np.random.default_rng(0)
    qkv = jnp.asarray(random.normal(size=(2, 7, 3, 2, 4)), jnp.float32)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
    keep = jnp.asarray(random.random((2, 2, 7, 7)) < 0.7)
    places = np.array([1, 4, 4])
    weights = jnp.asarray(random.normal(size=(2, 3, 2, 4)), jnp.float32)

    def some(x):
        parts = x[:, places, :1], x[:, :, 1:]
        return dot_product_attention(
            parts, segment_mask(segments[:, places], segments), Policy(), keep[:, :, places], 1 / 0.7
        )

    def all_of_them(x):
        return dot_product_attention((x,), segment_mask(segments, segments), Policy(), keep, 1 / 0.7)[
            :, places
        ]

    np.testing.assert_allclose(some(qkv), all_of_them(qkv), atol=1e-6)
    slope, expected = (jax.grad(lambda x: (f(x) * weights).sum())(qkv) for f in (some, all_of_them))  # noqa: B023
    np.testing.assert_allclose(slope, expected, atol=3e-6)


def test_attention_and_its_gradient_with_dropout():
    """Its own backward pass against autodiff of the textbook formula, in two documents and padding."""
    random = np.random.default_rng(0)
    qkv = jnp.asarray(random.normal(size=(2, 7, 3, 2, 4)), jnp.float32)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
    keep = jnp.asarray(random.random((2, 2, 7, 7)) < 0.7)
    weights = jnp.asarray(random.normal(size=(2, 7, 2, 4)), jnp.float32)

    def textbook(qkv, keep, scale):
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhk,bmhk->bhqm", query, key) / 2.0
        same = segments[:, None, :, None] == segments[:, None, None, :]
        p = jax.nn.softmax(jnp.where(same, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhqm,bmhk->bqhk", p if keep is None else p * keep * scale, value)

    for kept, scale in ((None, 1.0), (keep, 1 / 0.7)):
        mask = segment_mask(segments, segments)
        ours = jax.jit(lambda x: dot_product_attention((x,), mask, Policy(), kept, scale))  # noqa: B023
        naive = jax.jit(lambda x: textbook(x, kept, scale))  # noqa: B023
        np.testing.assert_allclose(ours(qkv), naive(qkv), atol=1e-6)
        slope, expected = (jax.grad(lambda x: (f(x) * weights).sum())(qkv) for f in (ours, naive))  # noqa: B023
        np.testing.assert_allclose(slope, expected, atol=3e-6)
        assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean(rate):
    n = 400_000
    out = np.asarray(dropout(jnp.ones(n), rate, jax.random.key(0)))
    dropped = (out == 0).mean()
    assert dropped == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / n) + 1e-5)
    scale = np.unique(out[out != 0])
    assert scale.size == 1
    assert scale[0] == pytest.approx(1 / (1 - rate), rel=2e-5)
    assert out.mean() == pytest.approx(1.0, abs=5 * np.sqrt(rate / (1 - rate) / n))


def test_dropout_leaves_what_it_keeps():
    x = jax.random.normal(jax.random.key(1), (64, 64), jnp.bfloat16)
    out = dropout(x, 0.25, jax.random.key(2))
    assert out.dtype == x.dtype
    kept = np.asarray(out != 0)
    np.testing.assert_allclose(np.float32(out)[kept], np.float32(x)[kept] / 0.75, rtol=0.01)
    # Neighbours are dropped independently of each other.
    both = (~kept[:, 1:] & ~kept[:, :-1]).mean()
    assert both == pytest.approx(1 / 16, abs=0.02)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("place", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_of_the_encoder(tiny, params, place):
    model, inputs = dataclasses.replace(tiny, **{place: 0.1}), batch(tiny)
    plain = encode(params, tiny, *inputs)
    np.testing.assert_array_equal(encode(params, model, *inputs), plain)  # off without a key
    run = jax.jit(lambda key: encode(params, model, *inputs, key=key))
    one, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01
    assert np.abs(one - plain).max() > 0.01


def test_each_layer_and_each_row_has_its_own_dropout(tiny, params, randomised):
    """Equal rows and equal layers: whatever differs then is dropout."""
    model = dataclasses.replace(tiny, hidden_dropout_prob=0.5)
    tokens, segments, types = (np.repeat(x[:1], 2, 0) for x in batch(tiny))
    out = encode(params, model, tokens, segments, types, key=jax.random.key(0))
    assert np.abs(out[0] - out[1]).max() > 0.1
    # Zero everything that a layer adds but its output bias: x ← norm(x + dropout(bias)), twice a layer.
    quiet = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ones_like(x) if path[-1].key == "bias" and path[-2].key == "output" else 0 * x,
        params["layers"],
    )
    quiet["attention"]["norm"]["scale"] += 1
    quiet["mlp"]["norm"]["scale"] += 1
    same = {**params, "layers": quiet}
    one_layer = {**same, "layers": jax.tree.map(lambda x: x[:1], quiet)}
    deep = encode(same, model, tokens, segments, types, key=jax.random.key(0))
    flat = encode(
        one_layer,
        dataclasses.replace(model, num_hidden_layers=1),
        tokens,
        segments,
        types,
        key=jax.random.key(0),
    )
    assert np.abs(deep - flat).max() > 0.1


def test_bf16_stays_near_fp32(tiny, params):
    """bf16 keeps 8 bits: a relative 2⁻⁸ per rounding, a few tens of roundings on the way."""
    inputs = batch(tiny)
    full = encode(params, tiny, *inputs)
    real = inputs[1] > 0
    for stream, bound in ((jnp.float32, 0.02), (jnp.bfloat16, 0.03)):
        half = encode(params, tiny, *inputs, policy=Policy(jnp.bfloat16, stream))
        assert half.dtype == stream
        error = np.linalg.norm((half - full)[real]) / np.linalg.norm(full[real])
        assert 1e-4 < error < bound  # 0 would mean that it is not bf16 at all


def test_the_program_does_not_grow_with_depth(tiny):
    def size(layers):
        model = dataclasses.replace(tiny, num_hidden_layers=layers)
        program = jax.make_jaxpr(jax.grad(lambda p: models_bert.encode(p, model, *batch(model)).sum()))(
            models_bert.abstract_params(model)
        )
        return str(program).count("=")

    assert size(2) == size(7)


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_dropout_drops_its_share_and_nothing_of_it_is_alike(impl):
    """By the normal limit of each number, of independent choices: shares, rows against each other and
    against themselves shifted, the next key, sums of blocks."""
    key, shape = jax.random.fold_in(jax.random.key(1, impl=impl), 3), (16, 12, 64, 64)
    keep = np.asarray(dropout_mask(key, 0.1, shape))
    share = keep_threshold(0.1) / 65536
    spread = np.sqrt(share * (1 - share))
    found = (keep - share) / spread
    limit = 5 / np.sqrt(keep.size)
    assert abs(found.mean()) < limit
    for shift in (1, 2, 3, 7, 64, 128, 4096, keep[0].size):
        flat = found.reshape(-1)
        assert abs((flat[shift:] * flat[:-shift]).mean()) < limit, shift
    rows = found.reshape(shape[0], -1)
    between = rows @ rows.T / rows.shape[1]
    assert np.abs(between - np.diag(np.diag(between))).max() < 5 / np.sqrt(rows.shape[1])
    other = np.asarray(dropout_mask(jax.random.fold_in(key, 1), 0.1, shape))
    assert abs(((other - share) / spread * found).mean()) < limit
    for block in (64, 4096):
        sums = found.reshape(-1, block).sum(1)
        assert sums.var() / block == pytest.approx(1, abs=5 * np.sqrt(2 / len(sums)))
    assert dropout_mask(None, 0.1, shape) is None
    assert dropout_mask(key, 0.0, shape) is None
