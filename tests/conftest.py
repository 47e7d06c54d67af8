"""What every test shares: one CPU device, a tiny model, its twin in torch, golden files."""

import os
import tempfile
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")

from helpers.quick_compile import COMPILE_QUICKLY

# Before jax is imported anywhere. Tests of several devices are in tests/multidevice, see its conftest.py.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_NUM_CPU_DEVICES", None)
_flags = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join(
    [
        *(flag for flag in _flags if "host_platform_device_count" not in flag),
        *(flag for flag in COMPILE_QUICKLY if flag.partition("=")[0] not in " ".join(_flags)),
    ]
)
# The same dtype on every machine: precision.compute_dtype=auto may be bf16 on CPUs that have it.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# Small programs too are compiled once for all tests and processes.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Prepared data and compiled programs of this session: nothing of the user's, nothing left behind.
if "PYTEST_XDIST_WORKER" not in os.environ:  # else it is that of the process that started this one
    _cache = tempfile.TemporaryDirectory(prefix="dwt-tests-")
    os.environ["DWT_CACHE"] = _cache.name

from dwt_jax import runtime_env

# As the command line does: a run in this process and one in a subprocess must agree bitwise.
runtime_env.set_xla_env()

import json

import hypothesis
import jax
import numpy as np

from dwt_jax.models.bert import Config as BertConfig
from helpers.logged import logged
from helpers.paths import GOLDEN

hypothesis.settings.register_profile(
    "dwt", deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("dwt")


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true", help="rewrite the files of tests/golden/")


MAX_MEMORY_MAPS = 20_000
"""Of a process. Linux allows 65,530, and each program of XLA takes a few: beyond, the compiler crashes."""


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Forget compiled programs, of which thousands of tests in one process make tens of thousands."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MAX_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture
def golden(request):
    """golden(name.json, value) or golden(name.npz, {key: array}): must equal what is stored there,
    up to `rtol`; with --renew-golden it is stored instead."""

    def compare(name, value, rtol=0.0):
        path = GOLDEN / name
        if request.config.getoption("--renew-golden"):
            GOLDEN.mkdir(exist_ok=True)
            if path.suffix == ".npz":
                np.savez(path, **value)
            else:
                path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
            return
        assert path.exists(), f"{path} is missing: run pytest --renew-golden and look at what it wrote"
        if path.suffix == ".npz":
            with np.load(path) as stored:
                assert sorted(stored) == sorted(value)
                for key in stored:
                    np.testing.assert_allclose(value[key], stored[key], rtol=rtol, err_msg=f"{name} {key}")
        else:
            _same(value, json.loads(path.read_text()), rtol, name)

    return compare


def _same(found, stored, rtol, where):
    if isinstance(stored, dict):
        assert sorted(found) == sorted(stored), where
        for key in stored:
            _same(found[key], stored[key], rtol, f"{where} {key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for i, item in enumerate(stored):
            _same(found[i], item, rtol, f"{where} {i}")
    elif isinstance(stored, float):
        np.testing.assert_allclose(found, stored, rtol=rtol, err_msg=where)
    else:
        assert found == stored, where


@pytest.fixture
def log_lines():
    """The messages of dwt_jax that are logged while the test runs."""
    with logged() as lines:
        yield lines


@pytest.fixture
def cloud(tmp_path):
    """Programs in the place of gcloud, kubectl and the like (helpers/clouds.py)."""
    from helpers.clouds import Cloud

    return Cloud(tmp_path)


@pytest.fixture
def strict_ranks():
    """jax.numpy refuses to add axes on its own while the test runs."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def tiny():
    """The model that tests share, so that it compiles once. The vocabulary is padded to 256."""
    return BertConfig(
        vocab_size=119,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
    )


@pytest.fixture(scope="session")
def randomised():
    """randomised(model, seed) → parameters with no zero bias and no norm of one, so that a leaf in
    the wrong place shows. Padding of the vocabulary too: it must not matter."""
    from dwt_jax.models import bert as models_bert

    def make(model, seed=0):
        random = np.random.default_rng(seed)

        def leaf(path, like):
            x = random.normal(size=like.shape)
            x = 1 + 0.2 * x if path[-1].key == "scale" else 0.15 * x
            return jax.numpy.asarray(x, jax.numpy.float32)

        return jax.tree_util.tree_map_with_path(leaf, models_bert.abstract_params(model))

    return make


@pytest.fixture(scope="session")
def torch_bert():
    """torch_bert(params, model, dtype) → the BertForMaskedLM of transformers, in eval mode."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dwt_jax.hf.checkpoint import to_hf_tensors

    def make(params, model, dtype=torch.float32):
        config = transformers.BertConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=model.intermediate_size,
            max_position_embeddings=model.max_position_embeddings,
            type_vocab_size=model.type_vocab_size,
            hidden_act=model.hidden_act,
            layer_norm_eps=model.layer_norm_eps,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
        bert = transformers.BertForMaskedLM(config)
        tensors = {name: torch.tensor(array) for name, array in to_hf_tensors(params, model).items()}
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
        bert.load_state_dict(tensors, strict=True)
        bert.tie_weights()
        return bert.to(dtype).eval()

    return make
