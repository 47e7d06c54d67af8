"""Remapping the parameters of complete models: logits before and after, for every method."""

import dataclasses
import inspect
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.errors import UserError
from dwt_jax.models import bert as models_bert
from dwt_jax.models.bert import PARAM_AXES, SIZE_KEYS
from dwt_jax.models.common.layers import padded_vocab_size
from dwt_jax.remap import apply, depth_maps, ligo, optimizer_state, plan, width_maps
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.methods import METHODS, GrowthOptions
from helpers.reference import batch, logits, parameters
from helpers.remapping import KEY, SMALL, model_logits, small_with


def logit_difference(source, target, params, grown, inputs=None):
    """The largest difference of the logits over the source's tokens, in float64 NumPy."""
    inputs = batch(source) if inputs is None else inputs
    before, after = logits(params, source, *inputs), logits(grown, target, *inputs)
    size = min(source.vocab_size, target.vocab_size)
    return np.abs(after[..., :size] - before[..., :size])[inputs[1] > 0].max()


@st.composite
def model_pairs(draw, shrink=True):
    """(source, target) of any size, the target with at least the source's positions, tokens and types."""

    def sized(heads, size, **rest):
        return small_with(num_attention_heads=heads, hidden_size=heads * size, **rest)

    source = sized(
        draw(st.integers(1, 2)),
        draw(st.sampled_from([4, 5])),
        num_hidden_layers=draw(st.integers(1, 3)),
        intermediate_size=draw(st.sampled_from([6, 9])),
        vocab_size=draw(st.sampled_from([40, 250])),
        gated_layers=draw(st.booleans()) and draw(st.booleans()),
        weighted_norm=draw(st.booleans()) and draw(st.booleans()),
    )
    low = 1 if shrink else source.num_attention_heads
    heads = draw(st.sampled_from([source.num_attention_heads, draw(st.integers(low, 2 * low + 2))]))
    size = source.hidden_size // source.num_attention_heads
    target = sized(
        heads,
        draw(st.sampled_from([size, size, 2 * size, size + 1] + [size - 1] * shrink)),
        num_hidden_layers=draw(st.integers(1 if shrink else source.num_hidden_layers, 7)),
        intermediate_size=draw(st.sampled_from([9, 12, 18, 19] + [4] * shrink)),
        vocab_size=source.vocab_size + draw(st.sampled_from([0, 7, 250])),
        max_position_embeddings=12 + draw(st.sampled_from([0, 21])),
        type_vocab_size=draw(st.sampled_from([2, 3])),
        gated_layers=source.gated_layers or draw(st.booleans()),
        weighted_norm=source.weighted_norm or draw(st.booleans()),
    )
    return source, target


options = st.builds(
    GrowthOptions,
    split=st.sampled_from(["", "even", "uneven"]),
    new_tokens=st.sampled_from(["mean", "random"]),
    new_positions=st.sampled_from(["random", "tiled"]),
)
names = st.sampled_from([*METHODS, "stack+hyperclone", "middle+net2net", "prefix+masked", "interleave+aki"])


def check_method_contract(pair, name, options, seed):
    """Check that a pair is refused in one line, preserved to 1e-9, or changed and reported as such."""
    source, target = pair
    params, refused = parameters(source, seed), ""
    try:
        key = jax.random.fold_in(KEY, seed)
        grown, report = remap_params(params, source, target, name, key, options=options)
    except UserError as error:
        refused = str(error)
    if refused:
        assert re.fullmatch(r".*(→|is \d).*, expected.*", refused)
        return
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, models_bert.abstract_params(target))
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 for leaf in jax.tree.leaves(grown))
    drift = logit_difference(source, target, params, grown)
    assert (drift < 1e-9) if report.function_preserving else (drift > 1e-3), (
        name,
        drift,
        report.reasons_not_preserving,
    )


@given(model_pairs(), names, options, st.integers(0, 99))
@settings(max_examples=25)
def test_method_preserves_function_iff_report_says_so(pair, name, options, seed):
    check_method_contract(pair, name, options, seed)


@pytest.mark.slow
@given(model_pairs(), names, options, st.integers(100, 10000))
@settings(max_examples=60)
def test_method_preserves_function_iff_report_says_so_many_pairs(pair, name, options, seed):
    check_method_contract(pair, name, options, seed)


@given(
    model_pairs(shrink=False),
    st.sampled_from(["net2net", "lemon", "masked", "fna", "stack+net2net", "ligo"]),
    options,
)
@settings(max_examples=12)
def test_any_growth_with_gates_preserves_function(pair, name, options):
    source, target = pair
    target = dataclasses.replace(
        target,
        weighted_norm=True,
        gated_layers=True,
        intermediate_size=max(source.intermediate_size, target.intermediate_size),
    )
    params = parameters(source)
    grown, report = remap_params(params, source, target, name, KEY, options=options)
    assert report.function_preserving
    assert logit_difference(source, target, params, grown) < 1e-9


PRESERVING = {
    "MLP": ("net2net", small_with(intermediate_size=17)),
    "two times": ("hyperclone", small_with(hidden_size=16, num_attention_heads=4, intermediate_size=24)),
    "head size": ("hyperclone", small_with(hidden_size=16, intermediate_size=36)),
    "three times at random": (
        "net2net",
        small_with(hidden_size=24, num_attention_heads=6, intermediate_size=31),
    ),
    "unequal shares": ("lemon", small_with(hidden_size=16, num_attention_heads=4, intermediate_size=31)),
    "half as wide again": (
        "lemon",
        small_with(hidden_size=12, num_attention_heads=3, intermediate_size=17, weighted_norm=True),
    ),
    "hidden behind gates": (
        "masked",
        small_with(
            hidden_size=12, num_attention_heads=3, num_hidden_layers=5, weighted_norm=True, gated_layers=True
        ),
    ),
    "all at once": (
        "middle+net2net",
        small_with(
            hidden_size=15,
            num_attention_heads=3,
            num_hidden_layers=3,
            vocab_size=300,
            max_position_embeddings=40,
            weighted_norm=True,
            gated_layers=True,
        ),
    ),
}
CHANGING = {
    "random": ("random", SMALL),
    "zeros under an ordinary norm": ("fna", small_with(hidden_size=12, num_attention_heads=3)),
    "uneven copies under an ordinary norm": ("net2net", small_with(hidden_size=12, num_attention_heads=3)),
    "the layer above": ("aki", small_with(intermediate_size=16)),
    **{name: (name, small_with(num_hidden_layers=4)) for name in depth_maps.DEPTH_MAPS},
    "fewer layers": ("interleave", small_with(num_hidden_layers=1)),
    "ligo's initial maps": ("ligo", small_with(num_hidden_layers=3)),
}


FEW_CASES = ["two times", "all at once", "fewer layers"]


@pytest.mark.parametrize(
    "cases", [FEW_CASES, pytest.param([*PRESERVING, *CHANGING], marks=pytest.mark.slow)], ids=["few", "all"]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_forward_pass_agrees_with_reference(dtype, cases):
    """Through dwt_jax's forward pass and MLM head."""
    params, inputs = parameters(SMALL, dtype=dtype), batch(SMALL)
    unpadded = inputs[1] > 0
    before = model_logits(params, SMALL, inputs, dtype)[unpadded][:, : SMALL.vocab_size]
    for case in cases:
        method, target = {**PRESERVING, **CHANGING}[case]
        grown, report = remap_params(params, SMALL, target, method, KEY)
        after = model_logits(grown, target, inputs, dtype)[unpadded]
        if dtype == np.float64:
            np.testing.assert_allclose(
                after[:, : target.vocab_size], logits(grown, target, *inputs)[unpadded], atol=1e-9
            )
        drift = np.abs(after[:, : SMALL.vocab_size] - before).max()
        assert report.function_preserving == (case in PRESERVING)
        assert drift < (1e-9 if dtype == np.float64 else 1e-4) if case in PRESERVING else drift > 0.1, (
            case,
            drift,
        )


@pytest.mark.parametrize("case", ["MLP", "two times", "head size", "three times at random", "unequal shares"])
def test_grown_model_has_same_logits_in_transformers(tmp_path, case):
    """Exported and run in torch, the grown model has the logits of the small one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dwt_jax.hf.checkpoint import save_checkpoint

    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    method, target = PRESERVING[case]
    tokens, segments, types = batch(SMALL)
    params = parameters(SMALL, dtype=np.float32)
    grown, _ = remap_params(params, SMALL, target, method, KEY)
    outputs = []
    for name, tree, model in (("small", params, SMALL), ("large", grown, target)):
        save_checkpoint(tree, model, tmp_path / "tokenizer", tmp_path / name)
        bert = transformers.BertForMaskedLM.from_pretrained(tmp_path / name).eval()
        assert bert.config.hidden_size == model.hidden_size
        with torch.no_grad():
            outputs.append(
                bert(
                    input_ids=torch.tensor(tokens).long(),
                    attention_mask=torch.tensor(segments > 0).long(),
                    token_type_ids=torch.tensor(types).long(),
                ).logits.numpy()[segments > 0]
            )
    assert outputs[0].std() > 0.1
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4)


def test_remap_modules_name_no_leaf():
    leaves = {part for name in PARAM_AXES for part in name.split("/")} - set(SIZE_KEYS)
    for module in (apply, plan, width_maps, depth_maps, ligo, optimizer_state):
        strings = set(re.findall(r"""["']([\w/]+)["']""", inspect.getsource(module)))
        assert not {string for string in strings for part in string.split("/") if part in leaves}, module


def test_aki_copies_new_units_from_layer_above():
    target = small_with(num_hidden_layers=2, intermediate_size=20)
    params = parameters(SMALL)
    grown, _ = remap_params(params, SMALL, target, "aki", KEY)
    index = plan.plan_growth("aki", SMALL, target, KEY).maps["mlp"].index
    old, new = params["layers"]["mlp"]["input"], grown["layers"]["mlp"]["input"]
    np.testing.assert_array_equal(new["kernel"][0, :, :12], old["kernel"][0])
    np.testing.assert_array_equal(new["kernel"][0, :, 12:], old["kernel"][1][:, index[0, 12:]])
    np.testing.assert_array_equal(new["kernel"][1, :, 12:], old["kernel"][1][:, index[1, 12:]])
    np.testing.assert_array_equal(new["bias"][0, 12:], old["bias"][1][index[0, 12:]])


def test_fna_puts_source_in_block_of_zeros():
    """The last layer repeated, the source as the top-left block, zeros elsewhere."""
    target = small_with(num_hidden_layers=4, hidden_size=12, num_attention_heads=3, intermediate_size=20)
    params = parameters(SMALL)
    grown, report = remap_params(params, SMALL, target, "fna", KEY)
    assert report.layers == (0, 1, 1, 1)
    kernel = grown["layers"]["mlp"]["input"]["kernel"]
    for layer, origin in enumerate(report.layers):
        np.testing.assert_array_equal(
            kernel[layer, :8, :12], params["layers"]["mlp"]["input"]["kernel"][origin]
        )
    assert not kernel[:, 8:].any()
    assert not kernel[:, :, 12:].any()
    assert not grown["embeddings"]["word"]["embedding"][:, 8:].any()


def test_random_equals_new_model(tiny):
    grown, report = remap_params(parameters(SMALL), SMALL, tiny, "random", KEY)
    fresh = jax.jit(models_bert.init_params, static_argnums=0)(tiny, KEY)
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, fresh)
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(grown), jax.tree.leaves(fresh), strict=True
    ):
        assert float(np.std(leaf)) == pytest.approx(float(np.std(expected)), rel=0.3), path
        assert float(np.mean(leaf)) == pytest.approx(float(np.mean(expected)), abs=0.01), path
    assert report.shares() == {"copied": 0, "derived": 0, "new": 1}
    kernels = [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(grown)) if leaf.std() > 0]
    assert len(set(kernels)) == len(kernels)


def test_new_tokens_and_positions():
    target = small_with(vocab_size=300, max_position_embeddings=30, type_vocab_size=3)
    params = parameters(SMALL)
    old, bias = params["embeddings"]["word"]["embedding"], params["mlm"]["bias"]
    positions = params["embeddings"]["position"]["embedding"]
    grown, _ = remap_params(params, SMALL, target, "stack", KEY, options=GrowthOptions(new_positions="tiled"))
    table = grown["embeddings"]["word"]["embedding"]
    assert table.shape[0] == padded_vocab_size(300)
    np.testing.assert_array_equal(table[:60], old[:60])  # the padding has no tokens
    np.testing.assert_allclose(table[60:300], np.tile(old[:60].mean(0), (240, 1)))
    np.testing.assert_allclose(grown["mlm"]["bias"][60:300], bias[:60].mean())
    assert not table[300:].any()
    np.testing.assert_array_equal(
        grown["embeddings"]["position"]["embedding"], np.tile(positions, (3, 1))[:30]
    )
    grown, _ = remap_params(params, SMALL, target, "stack", KEY, options=GrowthOptions(new_tokens="random"))
    table = grown["embeddings"]["word"]["embedding"]
    assert table[60:300].std() == pytest.approx(target.initializer_range, rel=0.1)
    assert not grown["mlm"]["bias"][60:].any()
    added = grown["embeddings"]["position"]["embedding"][12:]
    assert added.std() == pytest.approx(target.initializer_range, rel=0.2)


MODEL_TYPES = {
    "roberta": small_with(
        model_type="roberta", pad_token_id=1, tie_word_embeddings=False, max_position_embeddings=14
    ),
    "distilbert": small_with(model_type="distilbert", type_vocab_size=0),
    "bert": SMALL,
}


@pytest.mark.parametrize("source", MODEL_TYPES.values(), ids=MODEL_TYPES)
def test_every_model_type_and_head_is_grown(source):
    """Logical axes are sufficient for parts that remap/ does not name."""
    params = parameters(source, heads=models_bert.HEADS)
    target = dataclasses.replace(
        source, hidden_size=16, num_attention_heads=4, max_position_embeddings=33, vocab_size=300
    )
    grown, report = remap_params(
        params, source, target, "net2net", KEY, options=GrowthOptions(split="uneven")
    )
    assert report.function_preserving
    assert jax.tree.map(np.shape, grown) == jax.tree.map(
        np.shape, models_bert.abstract_params(target, models_bert.HEADS, num_labels=3)
    )
    inputs = batch(source)
    assert logit_difference(source, target, params, grown, inputs) < 1e-9
    outputs = []
    for tree, model in ((params, source), (grown, target)):
        hidden = models_bert.encode(tree, model, *inputs)
        outputs.append(models_bert.classifier_logits(tree, model, hidden, inputs[1]))
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_untied_decoder_starts_as_input_embedding():
    target = small_with(hidden_size=12, num_attention_heads=3, weighted_norm=True, tie_word_embeddings=False)
    params = parameters(SMALL)
    grown, report = remap_params(params, SMALL, target, "net2net", KEY)
    assert report.function_preserving
    assert logit_difference(SMALL, target, params, grown) < 1e-9
    with pytest.raises(UserError, match="tie_word_embeddings false → true"):
        remap_params(grown, target, dataclasses.replace(target, tie_word_embeddings=True), "net2net", KEY)


def test_token_types_are_added_and_removed():
    distilbert = MODEL_TYPES["distilbert"]
    params = parameters(distilbert)
    target = dataclasses.replace(distilbert, model_type="bert", type_vocab_size=2, intermediate_size=19)
    grown, report = remap_params(params, distilbert, target, "net2net", KEY)
    assert logit_difference(distilbert, target, params, grown) < 1e-9
    assert {leaf.path: leaf for leaf in report.leaves}["embeddings/type/embedding"].new == 16
    back, report = remap_params(grown, target, distilbert, "stack+net2net", KEY)
    assert "type" not in back["embeddings"]
    assert any(
        "type_vocab_size 2: a distilbert has no such table" in reason
        for reason in report.reasons_not_preserving
    )


def test_noise_changes_copies_and_is_reported():
    target = small_with(intermediate_size=24)
    params = parameters(SMALL)
    exact_params, _ = remap_params(params, SMALL, target, "hyperclone", KEY)
    with pytest.raises(UserError, match=r"hyperclone: noise 0\.1, expected 0"):
        remap_params(params, SMALL, target, "hyperclone", KEY, options=GrowthOptions(noise=0.1))
    noisy, report = remap_params(params, SMALL, target, "net2net", KEY, options=GrowthOptions(noise=0.1))
    assert not report.function_preserving
    kernel, exact_kernel = (
        noisy["layers"]["mlp"]["input"]["kernel"],
        exact_params["layers"]["mlp"]["input"]["kernel"],
    )
    np.testing.assert_array_equal(kernel[..., :12], exact_kernel[..., :12])
    index = plan.plan_growth("net2net", SMALL, target, KEY).maps["mlp"].index
    ratio = kernel[0][:, 12:] / exact_kernel[0][:, index[0, 12:]]
    assert ratio.std() == pytest.approx(0.1, rel=0.3)


SLOW_METHODS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("aki", "lemon", "masked", "random", "fna")
]


@pytest.mark.parametrize("method", ["net2net", *SLOW_METHODS])
def test_remap_inside_jit_equals_host(method):
    target = small_with(
        hidden_size=12,
        num_attention_heads=3,
        num_hidden_layers=3,
        intermediate_size=17,
        vocab_size=300,
        weighted_norm=True,
        gated_layers=True,
    )
    params = parameters(SMALL, dtype=np.float32)
    host, report = remap_params(params, SMALL, target, method, KEY)
    traced_reports = []

    @jax.jit
    def grow_in_jit(params, key):
        grown, traced_report = remap_params(params, SMALL, target, method, key)
        traced_reports.append(traced_report)
        return grown

    for path, leaf in jax.tree_util.tree_leaves_with_path(grow_in_jit(params, KEY)):
        expected = host
        for part in path:
            expected = expected[part.key]
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-7, err_msg=str(path))
    assert traced_reports[0].function_preserving == report.function_preserving
    assert traced_reports[0].shares()["new"] == report.shares()["new"]


def test_source_params_are_not_modified():
    params = parameters(SMALL)
    before = jax.tree.map(np.copy, params)
    grown, _ = remap_params(
        params, SMALL, small_with(hidden_size=16, num_attention_heads=4), "hyperclone", KEY
    )
    for leaf in jax.tree.leaves(grown):
        leaf[...] = 0
    jax.tree.map(np.testing.assert_array_equal, params, before)
