"""Remapping: what each method promises, on the logits of whole models, and what it refuses."""

import dataclasses
import inspect
import json
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
from dwt_jax.remap.report import probe_batch
from helpers.reference import batch, logits, parameters
from helpers.remapping import KEY, SMALL, model_logits, small_with


def moved(source, target, params, grown, inputs=None):
    """Largest difference of the logits over what the source knows, in float64 NumPy."""
    inputs = batch(source) if inputs is None else inputs
    before, after = logits(params, source, *inputs), logits(grown, target, *inputs)
    size = min(source.vocab_size, target.vocab_size)
    return np.abs(after[..., :size] - before[..., :size])[inputs[1] > 0].max()


@st.composite
def pairs(draw, shrink=True):
    """(source, target): any sizes that a model can have, but enough positions, tokens and types."""

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


def holds_what_it_says(pair, name, options, seed):
    """Refused in one line, or exact to 1e-9, or moved and reported as such."""
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
    drift = moved(source, target, params, grown)
    assert (drift < 1e-9) if report.exact else (drift > 1e-3), (name, drift, report.lost)


@given(pairs(), names, options, st.integers(0, 99))
@settings(max_examples=25)
def test_a_method_keeps_the_function_just_where_it_says_so(pair, name, options, seed):
    holds_what_it_says(pair, name, options, seed)


@pytest.mark.slow
@given(pairs(), names, options, st.integers(100, 10000))
@settings(max_examples=60)
def test_that_over_many_more_pairs(pair, name, options, seed):
    holds_what_it_says(pair, name, options, seed)


@given(
    pairs(shrink=False),
    st.sampled_from(["net2net", "lemon", "masked", "fna", "stack+net2net", "ligo"]),
    options,
)
@settings(max_examples=12)
def test_with_weighted_norms_and_gates_any_growth_is_exact(pair, name, options):
    source, target = pair
    target = dataclasses.replace(
        target,
        weighted_norm=True,
        gated_layers=True,
        intermediate_size=max(source.intermediate_size, target.intermediate_size),
    )
    params = parameters(source)
    grown, report = remap_params(params, source, target, name, KEY, options=options)
    assert report.exact
    assert moved(source, target, params, grown) < 1e-9


EXACT = {
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
MOVED = {
    "random": ("random", SMALL),
    "zeros under an ordinary norm": ("fna", small_with(hidden_size=12, num_attention_heads=3)),
    "uneven copies under an ordinary norm": ("net2net", small_with(hidden_size=12, num_attention_heads=3)),
    "the layer above": ("aki", small_with(intermediate_size=16)),
    **{name: (name, small_with(num_hidden_layers=4)) for name in depth_maps.DEPTH_MAPS},
    "fewer layers": ("interleave", small_with(num_hidden_layers=1)),
    "ligo's beginning": ("ligo", small_with(num_hidden_layers=3)),
}


FEW = ["two times", "all at once", "fewer layers"]


@pytest.mark.parametrize(
    "cases", [FEW, pytest.param([*EXACT, *MOVED], marks=pytest.mark.slow)], ids=["few", "all"]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_the_model_itself_agrees(dtype, cases):
    """The same through dwt_jax's own forward pass and MLM head."""
    params, inputs = parameters(SMALL, dtype=dtype), batch(SMALL)
    real = inputs[1] > 0
    before = model_logits(params, SMALL, inputs, dtype)[real][:, : SMALL.vocab_size]
    for what in cases:
        method, target = {**EXACT, **MOVED}[what]
        grown, report = remap_params(params, SMALL, target, method, KEY)
        after = model_logits(grown, target, inputs, dtype)[real]
        if dtype == np.float64:
            np.testing.assert_allclose(
                after[:, : target.vocab_size], logits(grown, target, *inputs)[real], atol=1e-9
            )
        drift = np.abs(after[:, : SMALL.vocab_size] - before).max()
        assert report.exact == (what in EXACT)
        assert drift < (1e-9 if dtype == np.float64 else 1e-4) if what in EXACT else drift > 0.1, (
            what,
            drift,
        )


@pytest.mark.parametrize("what", ["MLP", "two times", "head size", "three times at random", "unequal shares"])
def test_transformers_agrees(tmp_path, what):
    """Exported and run in torch, the grown model gives the logits that the small one gives there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dwt_jax.hf.checkpoint import save_checkpoint

    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("[PAD]\n")
    method, target = EXACT[what]
    tokens, segments, types = batch(SMALL)
    params = parameters(SMALL, dtype=np.float32)
    grown, _ = remap_params(params, SMALL, target, method, KEY)
    found = []
    for name, tree, model in (("small", params, SMALL), ("large", grown, target)):
        save_checkpoint(tree, model, tmp_path / "tokenizer", tmp_path / name)
        bert = transformers.BertForMaskedLM.from_pretrained(tmp_path / name).eval()
        assert bert.config.hidden_size == model.hidden_size
        with torch.no_grad():
            found.append(
                bert(
                    input_ids=torch.tensor(tokens).long(),
                    attention_mask=torch.tensor(segments > 0).long(),
                    token_type_ids=torch.tensor(types).long(),
                ).logits.numpy()[segments > 0]
            )
    assert found[0].std() > 0.1
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_no_leaf_is_named_in_the_room():
    leaves = {part for name in PARAM_AXES for part in name.split("/")} - set(SIZE_KEYS)
    for module in (apply, plan, width_maps, depth_maps, ligo, optimizer_state):
        words = set(re.findall(r"""["']([\w/]+)["']""", inspect.getsource(module)))
        assert not {word for word in words for part in word.split("/") if part in leaves}, module


@pytest.mark.parametrize(
    ("name", "grown", "shrunk"),
    [
        ("repeat_last", [0, 1, 2, 3, 3, 3], [0, 1]),
        ("stack", [0, 1, 2, 3, 0, 1], [0, 1]),
        ("stack_top", [0, 1, 2, 3, 2, 3], [2, 3]),
        ("interleave", [0, 0, 1, 2, 2, 3], [0, 2]),
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


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 3), st.booleans())
@settings(max_examples=12)
def test_drawn_maps_are_balanced_and_their_shares_add_up(old, more, layers, uneven):
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


def test_layers_draw_their_own_maps():
    m = width_maps.random_copies(KEY, 20, 40, layers=3)
    assert not np.array_equal(m.index[0], m.index[1])


def test_aki_takes_new_units_from_the_layer_above():
    target = small_with(num_hidden_layers=2, intermediate_size=20)
    params = parameters(SMALL)
    grown, _ = remap_params(params, SMALL, target, "aki", KEY)
    index = plan.plan_growth("aki", SMALL, target, KEY).maps["mlp"].index
    old, new = params["layers"]["mlp"]["input"], grown["layers"]["mlp"]["input"]
    np.testing.assert_array_equal(new["kernel"][0, :, :12], old["kernel"][0])
    np.testing.assert_array_equal(new["kernel"][0, :, 12:], old["kernel"][1][:, index[0, 12:]])
    np.testing.assert_array_equal(new["kernel"][1, :, 12:], old["kernel"][1][:, index[1, 12:]])
    np.testing.assert_array_equal(new["bias"][0, 12:], old["bias"][1][index[0, 12:]])


def test_the_papers_remapping():
    """FNA: the last layer again, the source as the top-left block, the rest 0."""
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


def test_random_is_a_new_model(tiny):
    grown, report = remap_params(parameters(SMALL), SMALL, tiny, "random", KEY)
    like = jax.jit(models_bert.init_params, static_argnums=0)(tiny, KEY)
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, like)
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(grown), jax.tree.leaves(like), strict=True
    ):
        assert float(np.std(found)) == pytest.approx(float(np.std(expected)), rel=0.3), path
        assert float(np.mean(found)) == pytest.approx(float(np.mean(expected)), abs=0.01), path
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
    np.testing.assert_array_equal(table[:60], old[:60])  # what lay in the padding is not a token
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


def test_rows_before_the_first_position_stay_in_place():
    roberta = small_with(model_type="roberta", pad_token_id=1)
    source, target = (dataclasses.replace(roberta, max_position_embeddings=n) for n in (6, 13))
    m = plan._position_map(source, target, "tiled")
    assert list(m.index) == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4]
    assert list(m.kind) == [width_maps.COPIED] * 6 + [width_maps.DUPLICATE] * 7


FAMILIES = {
    "roberta": small_with(
        model_type="roberta", pad_token_id=1, tie_word_embeddings=False, max_position_embeddings=14
    ),
    "distilbert": small_with(model_type="distilbert", type_vocab_size=0),
    "bert": SMALL,
}


@pytest.mark.parametrize("source", FAMILIES.values(), ids=FAMILIES)
def test_every_family_and_head_is_kept(source):
    """The table's axes are enough for parts that the engine never heard of."""
    params = parameters(source, heads=models_bert.HEADS)
    target = dataclasses.replace(
        source, hidden_size=16, num_attention_heads=4, max_position_embeddings=33, vocab_size=300
    )
    grown, report = remap_params(
        params, source, target, "net2net", KEY, options=GrowthOptions(split="uneven")
    )
    assert report.exact
    assert jax.tree.map(np.shape, grown) == jax.tree.map(
        np.shape, models_bert.abstract_params(target, models_bert.HEADS, num_labels=3)
    )
    inputs = batch(source)
    assert moved(source, target, params, grown, inputs) < 1e-9
    found = []
    for tree, model in ((params, source), (grown, target)):
        hidden = models_bert.encode(tree, model, *inputs)
        found.append(models_bert.classifier_logits(tree, model, hidden))
    np.testing.assert_allclose(*found, atol=1e-4)


def test_a_decoder_of_its_own_begins_as_the_word_table():
    target = small_with(hidden_size=12, num_attention_heads=3, weighted_norm=True, tie_word_embeddings=False)
    params = parameters(SMALL)
    grown, report = remap_params(params, SMALL, target, "net2net", KEY)
    assert report.exact
    assert moved(SMALL, target, params, grown) < 1e-9
    with pytest.raises(UserError, match="tie_word_embeddings false → true"):
        remap_params(grown, target, dataclasses.replace(target, tie_word_embeddings=True), "net2net", KEY)


def test_token_types_come_and_go():
    distilbert = FAMILIES["distilbert"]
    params = parameters(distilbert)
    target = dataclasses.replace(distilbert, model_type="bert", type_vocab_size=2, intermediate_size=19)
    grown, report = remap_params(params, distilbert, target, "net2net", KEY)
    assert moved(distilbert, target, params, grown) < 1e-9
    assert {leaf.path: leaf for leaf in report.leaves}["embeddings/type/embedding"].new == 16
    back, report = remap_params(grown, target, distilbert, "stack+net2net", KEY)
    assert "type" not in back["embeddings"]
    assert any("type_vocab_size 2 → 0" in reason for reason in report.lost)


def test_noise_parts_copies_and_is_told():
    target = small_with(intermediate_size=24)
    params = parameters(SMALL)
    exact, _ = remap_params(params, SMALL, target, "hyperclone", KEY)
    with pytest.raises(UserError, match=r"hyperclone: noise 0\.1, expected 0"):
        remap_params(params, SMALL, target, "hyperclone", KEY, options=GrowthOptions(noise=0.1))
    noisy, report = remap_params(params, SMALL, target, "net2net", KEY, options=GrowthOptions(noise=0.1))
    assert not report.exact
    kernel, own = noisy["layers"]["mlp"]["input"]["kernel"], exact["layers"]["mlp"]["input"]["kernel"]
    np.testing.assert_array_equal(kernel[..., :12], own[..., :12])
    index = plan.plan_growth("net2net", SMALL, target, KEY).maps["mlp"].index
    ratio = kernel[0][:, 12:] / own[0][:, index[0, 12:]]
    assert ratio.std() == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("hyperclone", {"hidden_size": 12}, "hyperclone: hidden_size 8 → 12, expected a multiple of 8"),
        ("hyperclone", {"intermediate_size": 20}, "intermediate_size 12 → 20, expected a multiple of 12"),
        ("hyperclone", {"num_hidden_layers": 3}, "num_hidden_layers 2 → 3, expected 2 .*stack.hyperclone"),
        ("stack", {"intermediate_size": 20}, "stack: intermediate_size 12 → 20, expected 12 .*stack.net2net"),
        ("lemon", {"hidden_size": 12}, "hidden_size 8 → 12, expected a multiple of 8 or model.weighted_norm"),
        ("lemon", {"intermediate_size": 4}, "intermediate_size 12 → 4, expected at least 12"),
        ("masked", {"hidden_size": 16}, "masked: hidden_size 8 → 16, expected model.weighted_norm"),
        ("masked", {"num_hidden_layers": 3}, "num_hidden_layers 2 → 3, expected model.gated_layers"),
        ("net2net", {"num_attention_heads": 3}, "hidden_size is 8, expected a multiple of num_attention_he"),
        ("net2net", {"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
        ("netnet", {}, "method is 'netnet'; did you mean 'net2net'"),
        ("stak+net2net", {}, "did you mean 'stack'"),
        ("stack+middle", {}, "method is 'stack.middle'"),
    ],
)  # fmt: skip
def test_impossible_pairs_are_refused(method, change, message):
    with pytest.raises(UserError, match=message) as caught:
        remap_params(parameters(SMALL), SMALL, small_with(**change), method, KEY)
    assert "\n" not in str(caught.value)


def test_gates_and_weights_are_not_lost_on_the_way():
    source = small_with(weighted_norm=True, gated_layers=True)
    with pytest.raises(UserError, match="weighted_norm true → false"):
        remap_params(parameters(source), source, SMALL, "net2net", KEY)


def test_every_method_says_whether_it_preserves_the_function():
    for name, method in METHODS.items():
        text = method.__doc__ if name not in depth_maps.DEPTH_MAPS else depth_maps.__doc__
        assert re.search(r"[Pp]reserves?\s+the\s+function", text), name
        assert re.search(r"20\d\d", method.__doc__) or name == "prefix", name


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("aki", "lemon", "masked", "random", "fna")]


@pytest.mark.parametrize("method", ["net2net", *SLOW])
def test_inside_jit_it_is_what_it_is_on_the_host(method):
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
    told = []

    @jax.jit
    def inside(params, key):
        grown, inside_report = remap_params(params, SMALL, target, method, key)
        told.append(inside_report)
        return grown

    for path, leaf in jax.tree_util.tree_leaves_with_path(inside(params, KEY)):
        same = host
        for part in path:
            same = same[part.key]
        np.testing.assert_allclose(leaf, same, rtol=1e-5, atol=1e-7, err_msg=str(path))
    assert told[0].exact == report.exact
    assert told[0].shares()["new"] == report.shares()["new"]


def test_the_source_is_left_alone():
    params = parameters(SMALL)
    before = jax.tree.map(np.copy, params)
    grown, _ = remap_params(
        params, SMALL, small_with(hidden_size=16, num_attention_heads=4), "hyperclone", KEY
    )
    for leaf in jax.tree.leaves(grown):
        leaf[...] = 0
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_the_report():
    target = small_with(hidden_size=16, num_attention_heads=4, intermediate_size=24, vocab_size=300)
    params = parameters(SMALL, dtype=np.float32)
    probe = probe_batch(SMALL, KEY)
    _, report = remap_params(params, SMALL, target, "hyperclone", KEY, probe=probe)
    assert report.exact
    assert report.drift["max"] < 1e-4 < report.drift["spread"]
    leaves = {leaf.path: leaf for leaf in report.leaves}
    word = leaves["embeddings/word/embedding"]
    assert (word.copied, word.derived, word.new) == (60 * 8, 60 * 8, 240 * 16)
    kernel = leaves["layers/mlp/input/kernel"]
    assert (kernel.copied, kernel.derived, kernel.new) == (0, 2 * 16 * 24, 0)
    assert (leaves["layers/mlp/input/bias"].copied, leaves["layers/mlp/input/bias"].derived) == (24, 24)
    assert sum(report.shares().values()) == pytest.approx(1)
    real = sum(x.size for x in jax.tree.leaves(models_bert.abstract_params(target))) - (512 - 300) * 17
    assert report.parameters[1] == real
    assert report.flops[1] > 3 * report.flops[0]
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    text = report.table()
    for part in (
        "layers/mlp/input/kernel",
        "in:embed 8→16 copies × share",
        "kept exactly",
        "vocab 60→300 new ones mean",
        "drift",
    ):
        assert part in text
    _, report = remap_params(params, SMALL, small_with(num_hidden_layers=5), "stack", KEY, probe=probe)
    assert report.layers == (0, 1, 0, 1, 0)
    assert report.drift["max"] > 0.1
    assert "not kept: num_hidden_layers 2 → 5" in report.table()
    assert {leaf.path: leaf for leaf in report.leaves}["layers/mlp/input/bias"].copied == 24
