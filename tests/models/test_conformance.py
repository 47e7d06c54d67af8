"""What every registered family must do: a new family is tested by being registered.

Nothing here names a family. What is special about one is tested in a file of its own.
"""

import dataclasses
import inspect
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dwt_jax import models
from dwt_jax.errors import UserError
from dwt_jax.hf.checkpoint import from_hf_tensors, to_hf_tensors
from dwt_jax.hf.config import load_hf_config, to_hf_config
from dwt_jax.models import FAMILIES, family, flops
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.logical_axes import init_value, is_gate, is_matrix
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.models.protocol import Family, ModelConfig
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.methods import GrowthOptions
from helpers.jaxprs import count_flops
from helpers.paths import ROOT
from helpers.small_models import (
    LENGTH,
    PREDICTIONS,
    ROWS,
    Tensors,
    batch,
    leaves,
    logits,
    random_params,
    small,
)


@pytest.fixture(params=sorted(FAMILIES))
def config(request) -> ModelConfig:
    return small(request.param)


def test_the_module_defines_what_the_protocol_asks(config):
    module = family(config)
    for name in Family.__annotations__:
        assert hasattr(module, name), name
    for name, function in inspect.getmembers(Family, inspect.isfunction):
        if name.startswith("_"):
            continue
        expected = list(inspect.signature(function).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(module, name)).parameters) == expected, name


def test_the_config_is_checked(config):
    assert list(config.problems()) == []
    assert list(dataclasses.replace(config, hidden_size=15).problems())
    assert not config.uses_dropout
    assert models.family(config.model_type) is family(config)


def test_axes_cover_every_leaf_with_its_shape(config):
    axes, sizes = family(config).param_axes(config), family(config).axis_sizes(config)
    found = leaves(family(config).abstract_params(config))
    for name, leaf in found.items():
        assert len(axes[name]) == len(leaf.shape), name
        assert leaf.shape == tuple(sizes[axis.name] for axis in axes[name]), name
    gates = {name for name in axes if is_gate(name)}
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    everything = leaves(family(config).abstract_params(untied, family(config).HEADS))
    optional = set(axes) - gates - set(everything)
    # What is in no model of this config has an axis of size 0 in it, such as token types.
    assert all(0 in [sizes.get(axis.name, 1) for axis in axes[name]] for name in optional)
    assert set(everything) <= set(axes)


def test_the_parts_of_the_parameters_are_named(config):
    module = family(config)
    everything = (*module.ENCODER_PARTS, *module.HEADS)
    assert set(module.abstract_params(config, module.HEADS)) == set(everything)
    assert set(module.abstract_params(config)) == {*module.ENCODER_PARTS, *module.LM_HEADS}
    assert {path.split("/")[0] for path in module.param_axes(config)} == set(everything)
    assert {*module.LM_HEADS, *module.CLASSIFIER_HEADS} <= set(module.HEADS)


def test_sizes_have_a_config_key(config):
    sizes, keys = family(config).axis_sizes(config), family(config).SIZE_KEYS
    assert set(keys) <= set(sizes)
    # What has no key is the same in all models of the family.
    larger = small(config.model_type, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
    fixed = set(sizes) - set(keys)
    assert {axis: sizes[axis] for axis in fixed} == {
        axis: family(config).axis_sizes(larger)[axis] for axis in fixed
    }
    assert set(family(config).fixed_axes(config)) <= set(keys)
    assert all(hasattr(config, field) for field in family(config).FUNCTION_FIELDS)


def test_shardings_on_eight_devices(config):
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    params = family(config).abstract_params(config)
    sharded = 0
    for name, sharding in leaves(infer_shardings(params, config, mesh)).items():
        used = [axis for axis in sharding.spec if axis is not None]
        assert len(used) == len(set(used)), name
        assert "data" not in used
        for size, axis in zip(leaves(params)[name].shape, sharding.spec, strict=False):
            assert axis is None or size % mesh.shape[axis] == 0, name
        sharded += bool(used)
    assert sharded > len(leaves(params)) / 2


def test_initialisation(config):
    params = leaves(family(config).init_params(config, jax.random.key(0)))
    axes = family(config).param_axes(config)
    for name, leaf in params.items():
        assert leaf.dtype == np.float32, name
        if is_matrix(axes[name]):
            assert np.std(leaf) == pytest.approx(config.initializer_range, rel=0.25), name
        else:
            np.testing.assert_array_equal(leaf, init_value(name), err_msg=name)


def test_fresh_parameters_stay_what_they_were(golden):
    """The same seed gives the same model in every version: the first and last entry, and the sum of |x|."""
    found = {}
    for model_type in sorted(FAMILIES):
        config = small(model_type, tie_word_embeddings=False)
        params = family(config).init_params(config, jax.random.key(5), family(config).HEADS, 3)
        found[model_type] = {
            name: [float(x) for x in (leaf.flat[0], leaf.flat[-1], np.abs(leaf).sum())]
            for name, leaf in leaves(jax.tree.map(np.asarray, params)).items()
        }
    golden("init_params.json", found, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_to_hugging_face_is_bit_for_bit(config, tied, tmp_path):
    model = dataclasses.replace(config, tie_word_embeddings=tied)
    params, axes = random_params(model), family(model).param_axes(model)
    checkpoint = from_hf_tensors(Tensors(to_hf_tensors(params, model)), model, "memory")
    assert checkpoint.model == model
    assert leaves(checkpoint.params).keys() == leaves(params).keys()
    names = family(model).HF_NAMES[model.model_type]
    for name, expected in leaves(params).items():
        expected = expected.copy()
        if axes[name][0].name == "vocab":  # its padding is not stored
            expected[model.vocab_size :] = 0
        elif axes[name][0].name == "layer":  # nor what a layer does not have
            for i in range(model.num_hidden_layers):
                if names.tensor_name(name).format(layer=i) in names.absent_tensors:
                    expected[i] = init_value(name)
        np.testing.assert_array_equal(leaves(checkpoint.params)[name], expected, err_msg=name)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(model)))
    assert load_hf_config(tmp_path).model == model


def test_logits_equal_transformers(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = to_hf_config(config)
    hf_config = transformers.AutoConfig.for_model(
        **{key: value for key, value in values.items() if key not in ("architectures", "dtype")}
    )
    twin = getattr(transformers, values["architectures"][0])(hf_config).eval()
    params = random_params(config)
    tensors = {name: torch.tensor(array) for name, array in to_hf_tensors(params, config).items()}
    missing, unexpected = twin.load_state_dict(tensors, strict=False)
    tied = set(dict(twin.named_parameters()))  # parameters of their own: nothing else may be missing
    assert not unexpected
    assert not set(missing) & tied
    tokens = batch(config)[0]
    with torch.no_grad():
        expected = twin(input_ids=torch.tensor(tokens), attention_mask=torch.ones(tokens.shape)).logits
    found = logits(params, config, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_packed_rows_equal_single_documents(config):
    params, (tokens, segments) = random_params(config), batch(config)
    packed = logits(params, config, tokens, segments)
    for row, start, end in ((0, 0, LENGTH), (1, 0, 5), (1, 5, 9)):
        alone = logits(params, config, tokens[row : row + 1, start:end], np.ones((1, end - start), np.int32))
        np.testing.assert_allclose(packed[row, start:end], alone[0], atol=2e-5)


def test_output_positions_equal_all_positions(config):
    params, (tokens, segments) = random_params(config), batch(config)
    positions = np.array([[0, 3, 7], [1, 5, 8]], np.int32)
    hidden = np.asarray(family(config).encode(params, config, tokens, segments))
    some = family(config).encode(params, config, tokens, segments, positions=positions)
    np.testing.assert_allclose(some, np.take_along_axis(hidden, positions[..., None], axis=1), atol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_flops_equal_a_count_of_the_program(config, num_layers):
    model = dataclasses.replace(config, num_hidden_layers=num_layers)
    tokens = np.ones((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, PREDICTIONS), np.int32)

    def read(params):
        hidden = family(model).encode(params, model, tokens, tokens, positions=positions)
        return lm_head_logits(params, model, hidden)

    program = jax.make_jaxpr(read)(family(model).abstract_params(model))
    assert flops.forward_flops(model, ROWS, LENGTH, PREDICTIONS) == count_flops(program.jaxpr)


def test_growth_by_whole_factors_keeps_the_function(config):
    params = jax.tree.map(lambda x: x.astype(np.float64), random_params(config))
    target = dataclasses.replace(
        config, hidden_size=32, num_attention_heads=4, intermediate_size=48, max_position_embeddings=24
    )
    tokens, segments = batch(config)
    grown, report = remap_params(params, config, target, "hyperclone", jax.random.key(0))
    assert report.function_preserving
    assert {name: leaf.shape for name, leaf in leaves(grown).items()} == {
        name: leaf.shape for name, leaf in leaves(family(target).abstract_params(target)).items()
    }
    before = logits(params, config, tokens, segments, np.float64)
    after = logits(grown, target, tokens, segments, np.float64)
    np.testing.assert_allclose(after, before, atol=1e-9)


def test_classifier_logits_equal_transformers(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module, labels = family(config), ("a", "b", "c")
    params = random_params(config, module.CLASSIFIER_HEADS, labels=len(labels))
    values = to_hf_config(config, module.CLASSIFIER_HEADS, labels)
    hf_config = transformers.AutoConfig.for_model(
        **{key: value for key, value in values.items() if key not in ("architectures", "dtype")}
    )
    twin = getattr(transformers, values["architectures"][0])(hf_config).eval()
    tensors = {name: torch.tensor(array) for name, array in to_hf_tensors(params, config).items()}
    missing, unexpected = twin.load_state_dict(tensors, strict=False)
    assert not unexpected
    # A classifier of transformers may hold a pooler that it does not use.
    assert all("pooler" in name for name in set(missing) & set(dict(twin.named_parameters())))
    mask = np.arange(LENGTH) < np.array([[LENGTH], [7]])
    tokens = np.where(mask, batch(config)[0], config.pad_token_id)  # a decoder finds its last token by it
    with torch.no_grad():
        expected = twin(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits
    first = np.zeros((ROWS, 1), np.int32) if module.pools_first_token(config) else None
    segments = mask.astype(np.int32)
    hidden = module.encode(params, config, tokens, segments, positions=first)
    found = module.classifier_logits(params, config, hidden, segments)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_growth_keeps_the_logits_of_a_classifier(config):
    module = family(config)
    params = random_params(config, module.CLASSIFIER_HEADS, labels=3)
    params = jax.tree.map(lambda x: x.astype(np.float64), params)
    target = dataclasses.replace(config, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    grown, report = remap_params(params, config, target, "hyperclone", jax.random.key(0))
    assert report.function_preserving
    tokens, segments = batch(config)
    segments[0, 8:] = 0
    policy, outputs = Policy(np.dtype(np.float64), np.dtype(np.float64)), []
    with jax.enable_x64(True):
        for tree, model in ((params, config), (grown, target)):
            hidden = module.encode(tree, model, tokens, segments, policy=policy)
            found = module.classifier_logits(tree, model, hidden, segments, policy=policy)
            outputs.append(np.asarray(found))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)


def test_a_deeper_model_keeps_the_function_where_layers_can_be_the_identity(config):
    module = family(config)
    period = module.layer_period(config)
    source = dataclasses.replace(config, num_hidden_layers=period)
    target = dataclasses.replace(config, num_hidden_layers=3 * period)
    params = jax.tree.map(lambda x: x.astype(np.float64), random_params(source))
    tokens, segments = batch(config)
    options = GrowthOptions(new_layers="zero")
    if not any(a.contracted_with == "residual" for axes in module.param_axes(config).values() for a in axes):
        with pytest.raises(UserError, match="new_layers is 'zero', expected 'copy'"):
            remap_params(params, source, target, "stack", jax.random.key(0), options=options)
        return
    for method in ("stack", "interleave", "middle", "prefix"):
        grown, report = remap_params(params, source, target, method, jax.random.key(0), options=options)
        assert report.function_preserving, report.reasons_not_preserving
        before = logits(params, source, tokens, segments, np.float64)
        after = logits(grown, target, tokens, segments, np.float64)
        np.testing.assert_allclose(after, before, atol=1e-9, err_msg=method)
        copied, report = remap_params(params, source, target, method, jax.random.key(0))
        assert not report.function_preserving
        after = logits(copied, target, tokens, segments, np.float64)
        assert np.abs(after - before).max() > 1e-3


def test_no_family_is_named_outside_models():
    names = "|".join(FAMILIES)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "dwt_jax").rglob("*.py"))
        if "models" not in path.relative_to(ROOT).parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(names, line, re.IGNORECASE)
    ]
    assert found == []
