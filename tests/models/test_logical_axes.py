import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dwt_jax.config import Config, Mesh, Optimizer
from dwt_jax.distributed import mesh as meshes
from dwt_jax.errors import UserError
from dwt_jax.models import bert as models_bert
from dwt_jax.models.bert import HF_NAMES, PARAM_AXES
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.hf_names import LEAF_NAMES
from dwt_jax.models.common.logical_axes import (
    Axis,
    decay_mask,
    flatten_axes,
    is_gate,
    kernel_dims,
    map_with_axes,
    path_name,
)
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.runs.state import abstract_state

SMALL = BertConfig(
    vocab_size=300, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40
)
MODELS = [
    SMALL,
    dataclasses.replace(SMALL, num_hidden_layers=1, num_attention_heads=1, type_vocab_size=1, vocab_size=7),
    dataclasses.replace(Config().model, vocab_size=30522),
    dataclasses.replace(SMALL, model_type="roberta", tie_word_embeddings=False, pad_token_id=1),
    dataclasses.replace(SMALL, model_type="distilbert", type_vocab_size=0),
    dataclasses.replace(SMALL, weighted_norm=True, gated_layers=True),
]
ORDINARY = [name for name in PARAM_AXES if not is_gate(name)]
LABELS = 5  # of the classifier, unlike any other size


def leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("model", MODELS, ids=range(len(MODELS)))
def test_the_table_says_every_axis_of_every_leaf(model):
    """Names stand for sizes: a table with two axes swapped is found out where the sizes differ."""
    sizes = {
        "layer": model.num_hidden_layers,
        "embed": model.hidden_size,
        "head": model.num_attention_heads,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "mlp": model.intermediate_size,
        "vocab": -(-model.vocab_size // 256) * 256,
        "position": model.max_position_embeddings,
        "type": model.type_vocab_size,
    }
    found = leaves(models_bert.abstract_params(model, models_bert.HEADS, LABELS))
    absent = {"mlm/decoder/embedding"} if model.tie_word_embeddings else set()
    absent |= set() if model.type_vocab_size else {"embeddings/type/embedding"}
    absent |= set() if model.gated_layers else set(PARAM_AXES) - set(ORDINARY)
    assert set(found) == set(PARAM_AXES) - absent
    for name, leaf in found.items():
        sizes["label"] = 2 if name.startswith("next_sentence/") else LABELS
        assert leaf.shape == tuple(sizes[axis.name] for axis in PARAM_AXES[name]), name
    for name, axes in PARAM_AXES.items():
        assert {axis.fan for axis in axes} <= {"in", "out", ""}, name
        assert (axes[0].name == "layer") == name.startswith("layers/"), name
        assert is_gate(name) or all(axis == Axis("layer", "") for axis in axes if axis.name == "layer"), name


def test_the_sides_of_kernels_and_biases():
    for name in ORDINARY:
        sides = [axis.fan for axis in PARAM_AXES[name] if axis.name != "layer"]
        if name.endswith("kernel"):
            assert sides == sorted(sides), f"{name}: in before out"
            assert {"in", "out"} == set(sides), name
        elif not name.endswith("embedding") and name != "mlm/bias":
            assert set(sides) == {"out"}, name


def test_a_leaf_that_nobody_declared_is_named():
    with pytest.raises(KeyError, match="layers/mlp/gate/kernel"):
        map_with_axes(
            lambda axes, leaf: leaf, PARAM_AXES, {"layers": {"mlp": {"gate": {"kernel": np.ones(2)}}}}
        )


def test_no_stale_entries_in_the_bridge():
    modules = {name.rpartition("/")[0] for name in ORDINARY}
    assert modules == set(HF_NAMES["bert"].modules)
    for family in HF_NAMES.values():
        assert set(family.modules) <= modules
        assert set(family.classifier_modules) <= set(family.modules)
    assert {name.rpartition("/")[2] for name in ORDINARY} == set(LEAF_NAMES)


def test_decay_is_hugging_faces():
    """Trainer's rule: everything but biases and the weights of LayerNorm modules."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12
        )
    )
    norms = {f"{n}.weight" for n, module in bert.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    expected = {name: not name.endswith("bias") and name not in norms for name, _ in bert.named_parameters()}
    mask = leaves(decay_mask(PARAM_AXES, models_bert.abstract_params(SMALL)))
    assert set(mask) == set(leaves(models_bert.abstract_params(SMALL)))
    found = {}
    for name, decays in mask.items():
        assert isinstance(decays, bool)
        for i in range(3):
            found[HF_NAMES["bert"].tensor_name(name).format(layer=i)] = decays
    assert found == expected


def test_kernels_are_dense_layers_without_tables_and_classifiers():
    found = {name: kernel_dims(axes) for name, axes in PARAM_AXES.items() if kernel_dims(axes)}
    assert set(found) == {name for name in PARAM_AXES if name.endswith("/kernel")} - {
        "classifier/kernel",
        "next_sentence/kernel",
    }
    assert found["layers/attention/value/kernel"] == ((1,), (2, 3))
    assert found["layers/attention/output/kernel"] == ((1, 2), (3,))
    assert found["pooler/kernel"] == ((0,), (1,))
    fused = flatten_axes({"layers": {"qkv": "in:embed qkv out:head out:head_dim"}})["layers/qkv"]
    assert kernel_dims(fused) == ((1,), (3, 4))


def mesh_of(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def specs(tree, mesh):
    return {name: sharding.spec for name, sharding in leaves(infer_shardings(tree, SMALL, mesh)).items()}


def test_sharding_of_the_parameters():
    found = specs(models_bert.abstract_params(SMALL), mesh_of(1, 2, 4))
    expected = {
        "embeddings/word/embedding": ("tensor", "fsdp"),
        "embeddings/position/embedding": (None, "fsdp"),
        "embeddings/type/embedding": (None, "fsdp"),
        "embeddings/norm/scale": ("fsdp",),
        "layers/attention/query/kernel": (None, "fsdp", "tensor", None),
        "layers/attention/query/bias": (None, "tensor", None),
        "layers/attention/output/kernel": (None, "tensor", None, "fsdp"),
        "layers/mlp/input/kernel": (None, "fsdp", "tensor"),
        "layers/mlp/input/bias": (None, "tensor"),
        "layers/mlp/output/kernel": (None, "tensor", "fsdp"),
        "mlm/transform/kernel": ("fsdp", None),  # an axis of the mesh once only
        "mlm/bias": ("tensor",),
    }
    for name, spec in expected.items():
        assert found[name] == PartitionSpec(*spec), name


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 5, 7), (2, 16, 3), (1, 24, 16)])
def test_an_axis_is_split_only_where_it_divides(sizes):
    mesh = mesh_of(*sizes)
    abstract = leaves(models_bert.abstract_params(SMALL))
    for name, spec in specs(models_bert.abstract_params(SMALL), mesh).items():
        used = [axis for axis in spec if axis is not None]
        assert len(used) == len(set(used)), name
        for size, axis in zip(abstract[name].shape, spec, strict=True):
            assert axis is None or size % mesh.shape[axis] == 0, name


@pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "muon"])
def test_moments_lie_where_their_parameters_do_and_the_rest_everywhere(kind):
    state = abstract_state(SMALL, Optimizer(kind))
    mesh = mesh_of(1, 2, 4)
    of_params = specs(state.params, mesh)
    of_state = specs(state, mesh)
    seen = dict.fromkeys(of_params, 0)
    for path, spec in of_state.items():
        owner = next((name for name in of_params if path.endswith("/" + name)), None)
        if owner:
            seen[owner] += 1
            assert spec == of_params[owner], path
        else:
            assert spec == PartitionSpec(), path
    for name, count in seen.items():  # the parameter and Adam's two moments, or Muon's one
        assert count == (2 if kind == "muon" and kernel_dims(PARAM_AXES[name]) else 3), name


def test_meshes_that_do_not_fit_the_devices():
    assert jax.device_count() == 1
    assert dict(meshes.make_mesh(Mesh(), 8).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in (Mesh(data=2), Mesh(data=-1, fsdp=3), Mesh(data=1, tensor=2)):
        with pytest.raises(UserError, match=f"fsdp={sizes.fsdp}.* 1 devices"):
            meshes.make_mesh(sizes, 8)
