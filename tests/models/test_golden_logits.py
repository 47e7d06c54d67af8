"""Logits that transformers gave once, held without torch: names, shapes and policy.

`pytest --renew-golden tests/models/test_golden_logits.py` makes the files anew, with torch.
"""

import json

import numpy as np
import pytest

from dwt_jax.hf import checkpoint
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_head_logits
from helpers.paths import GOLDEN
from helpers.torch_models import SMALL, batch, torch_model

CLASSES = [
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "DistilBertForMaskedLM",
    "BertForSequenceClassification",
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "EuroBertForMaskedLM",
    "EuroBertForSequenceClassification",
]


def renew(name, directory, file):
    import torch
    from safetensors.numpy import load_file

    theirs = torch_model(name, SMALL)
    theirs.save_pretrained(directory)
    tokens, segments, types = batch(theirs.config)
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(segments).long()}
    if name.startswith(("Bert", "Roberta", "RoFormer")):
        inputs["token_type_ids"] = torch.tensor(types).long()
    with torch.no_grad():
        logits = theirs(**inputs).logits.numpy()
    np.savez_compressed(
        file,
        config=(directory / "config.json").read_text(),
        **{"in_tokens": tokens, "in_segments": segments, "in_types": types, "out_logits": logits},
        **{f"tensor {key}": value for key, value in load_file(directory / "model.safetensors").items()},
    )


@pytest.mark.parametrize("name", CLASSES)
def test_golden_logits(name, tmp_path, request):
    from safetensors.numpy import save_file

    file = GOLDEN / f"logits_{name}.npz"
    if request.config.getoption("--renew-golden"):
        renew(name, tmp_path, file)
    with np.load(file) as stored:
        golden = dict(stored)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(str(golden["config"]))))
    tensors = {key.removeprefix("tensor "): x for key, x in golden.items() if key.startswith("tensor ")}
    save_file(tensors, tmp_path / "model.safetensors")
    found = checkpoint.load_checkpoint(tmp_path)
    tokens, segments, types = (golden[f"in_{key}"] for key in ("tokens", "segments", "types"))
    module = family(found.model)
    hidden = module.encode(found.params, found.model, tokens, segments, types)
    if "classifier" in found.params:
        logits, real = module.classifier_logits(found.params, found.model, hidden, segments), ...
    else:
        logits = lm_head_logits(found.params, found.model, hidden)[..., : found.model.vocab_size]
        real = segments > 0
    np.testing.assert_allclose(np.asarray(logits)[real], golden["out_logits"][real], atol=1e-4, rtol=0)
