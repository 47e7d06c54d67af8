"""What a run resolves on this machine."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from dwt_jax import runtime_env
from dwt_jax.config import Config, Precision
from dwt_jax.config_loader import load_config
from dwt_jax.errors import UserError
from dwt_jax.models.common import attention_backends
from dwt_jax.train import setup
from dwt_jax.train.setup import resolve_precision, setup_run
from helpers.runs import prepared_project


@pytest.mark.parametrize(
    ("features", "expected"),
    [("flags : avx2 avx512f", False), ("flags : avx512_bf16 fma", True), ("flags : amx_bf16", True)],
)
def test_bf16_products_are_read_off_the_features_of_the_cpu(monkeypatch, features, expected):
    monkeypatch.setattr(runtime_env, "_cpu_features", lambda: features)
    assert runtime_env.cpu_has_bf16_products() == expected


@pytest.mark.parametrize(
    ("has_bf16", "matmul_precision", "expected"),
    [(True, None, "bfloat16"), (False, None, "float32"), (True, "float32", "float32")],
)
def test_auto_precision_follows_the_cpu(monkeypatch, has_bf16, matmul_precision, expected):
    monkeypatch.setattr(setup, "cpu_has_bf16_products", lambda: has_bf16)
    with jax.default_matmul_precision(matmul_precision):
        policy = resolve_precision(Config())
        explicit = resolve_precision(dataclasses.replace(Config(), precision=Precision("bfloat16")))
    assert policy.compute_dtype == jnp.dtype(expected)
    assert explicit.compute_dtype == jnp.bfloat16
    assert policy.activation_dtype == jnp.float32


def test_a_resumed_run_keeps_its_precision(monkeypatch, tmp_path):
    """On another CPU, and where its record is from before there was such a choice."""
    config = load_config(prepared_project(tmp_path), {"precision.compute_dtype": "auto"})

    def compute_dtype(workdir, has_bf16):
        (tmp_path / workdir).mkdir(exist_ok=True)
        monkeypatch.setattr(setup, "cpu_has_bf16_products", lambda: has_bf16)
        with jax.default_matmul_precision(None):
            return str(setup_run(config, tmp_path / workdir).policy.compute_dtype)

    assert compute_dtype("run", has_bf16=True) == "bfloat16"
    assert compute_dtype("run", has_bf16=False) == "bfloat16"
    assert compute_dtype("other", has_bf16=False) == "float32"
    record_path = tmp_path / "run" / "run.json"
    record = json.loads(record_path.read_text())
    assert record.pop("compute_dtype") == "bfloat16"
    record_path.write_text(json.dumps(record))
    assert compute_dtype("run", has_bf16=True) == "float32"


def test_a_resumed_run_keeps_its_attention(monkeypatch, tmp_path):
    """Also one of an earlier version, which had the reference alone."""
    overrides = {"precision.compute_dtype": "bfloat16", "model.attention_probs_dropout_prob": "0"}
    config = load_config(prepared_project(tmp_path), overrides)
    monkeypatch.setattr(attention_backends, "_has_cudnn", lambda: True)
    record_path = tmp_path / "run" / "run.json"
    record_path.parent.mkdir()

    def attention(platform):
        """`auto` where the devices have this platform."""
        choose = attention_backends.choose_backend
        monkeypatch.setattr(
            setup, "choose_backend", lambda *args: choose(*args[:3], platform or args[3], 1024, args[5])
        )
        return setup_run(config, record_path.parent).step_config.policy.attention

    assert attention("cuda") == "cudnn"
    record = json.loads(record_path.read_text())
    assert record["attention"] == "cudnn"
    with pytest.raises(UserError, match=r"run\.json: attention is .cudnn., expected the platform cuda"):
        attention("")
    del record["attention"]
    record_path.write_text(json.dumps(record))
    assert attention("cuda") == "reference"


def test_attention_of_another_platform_is_refused(tmp_path):
    config = load_config(prepared_project(tmp_path), {"precision.attention": "splash"})
    (tmp_path / "run").mkdir()
    message = r"precision\.attention is 'splash', expected the platform tpu, found \w+$"
    with pytest.raises(UserError, match=message):
        setup_run(config, tmp_path / "run")


def test_a_run_whose_directory_is_lost_keeps_its_precision(monkeypatch, tmp_path):
    """Its record is at train.checkpoint_path; there too one from before lacks the dtype."""
    spec = prepared_project(tmp_path)
    config = load_config(spec, {"train.checkpoint_path": str(tmp_path / "checkpoints")})

    def compute_dtype(workdir, has_bf16):
        (tmp_path / workdir).mkdir()
        monkeypatch.setattr(setup, "cpu_has_bf16_products", lambda: has_bf16)
        with jax.default_matmul_precision(None):
            return str(setup_run(config, tmp_path / workdir).policy.compute_dtype)

    assert compute_dtype("first", has_bf16=True) == "bfloat16"
    assert compute_dtype("second", has_bf16=False) == "bfloat16"
    record_path = tmp_path / "checkpoints" / "run.json"
    record = json.loads(record_path.read_text())
    assert record["run"].pop("compute_dtype") == "bfloat16"
    record_path.write_text(json.dumps(record))
    assert compute_dtype("third", has_bf16=True) == "float32"


def test_a_resumed_run_has_the_precision_of_products_that_it_began_with(monkeypatch, tmp_path):
    """JAX has no record of it; a run of an earlier version has none either."""
    config = load_config(prepared_project(tmp_path))
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    setup_run(config, tmp_path / "run")
    setup_run(config, tmp_path / "run")
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION")
    message = "run.precision_environment is 'JAX_DEFAULT_MATMUL_PRECISION=highest' there, '' here"
    with pytest.raises(UserError, match=message):
        setup_run(config, tmp_path / "run")
    record_path = tmp_path / "run" / "run.json"
    record = json.loads(record_path.read_text())
    del record["precision_environment"]
    record_path.write_text(json.dumps(record))
    setup_run(config, tmp_path / "run")
