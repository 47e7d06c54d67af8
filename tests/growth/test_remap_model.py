"""`dwt remap` as a user meets it."""

import json
import re

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.models.tokenizer_pipelines import WORDPIECE
from dwt_jax.runs.load import load_model
from helpers.torch_models import SMALL, torch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = """
def get_config():
    return {"model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "intermediate_size": 24, "max_position_embeddings": 13}, "train": {"steps": 2},
            "data": {"sequence_length": 8}}
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "wide.py").write_text(CONFIG)
    return tmp_path


def saved(name, path):
    model = torch_model(name, SMALL)
    model.save_pretrained(path)
    words = [*WORDPIECE.special_tokens, *"abcdefghij"]
    (path / "vocab.txt").write_text("\n".join(words))
    return model


def remap(place, *options):
    return main(["remap", f"--model={place / 'small'}", f"--config={place / 'wide.py'}", *options])


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification", "BertModel"]
)
def test_twice_the_width_is_the_same_in_torch(name, place, capsys):
    small = saved(name, place / "small")
    assert remap(place, "--method=hyperclone", f"--out={place / 'wide'}", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exact"]
    assert bool(told["drift"]) == ("mlm" in told_heads(name))
    if told["drift"]:
        assert told["drift"]["max"] < 1e-4
    wide, report = type(small).from_pretrained(place / "wide", output_loading_info=True)
    assert not any(report.values()), report
    assert wide.config.hidden_size == 16
    assert wide.config.tie_word_embeddings == small.config.tie_word_embeddings
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        for key, x in small(ids).items():
            expected = torch.cat([x, x], -1) if x.shape[-1] == 8 else x  # hidden states are there twice
            torch.testing.assert_close(wide.eval()(ids)[key], expected, atol=1e-4, rtol=0)
    assert "computes what that did" in (place / "wide" / "README.md").read_text()
    assert load_model(str(place / "wide"), heads=None).params.keys() == told_heads(name)


def told_heads(name):
    heads = {
        "BertForMaskedLM": {"mlm"},
        "BertForPreTraining": {"mlm", "pooler", "next_sentence"},
        "BertForSequenceClassification": {"pooler", "classifier"},
        "BertModel": {"pooler"},
    }
    return {"embeddings", "layers", *heads[name]}


def test_a_table_and_a_method_that_is_not_exact(place, capsys):
    saved("BertForMaskedLM", place / "small")
    options = ["--method=stack+net2net", f"--out={place / 'deep'}", "--config.model.num_hidden_layers=4"]
    assert remap(place, *options, "--noise=0.01", "--seed=3") == 0
    said = capsys.readouterr().out
    assert "layers/attention/query/kernel" in said
    assert "wants training" in (place / "deep" / "README.md").read_text()
    first = load_model(str(place / "deep")).params
    kernels = {}
    for name, how in (
        ("again", ["--noise=0.01", "--seed=3"]),
        ("exact", ["--seed=3"]),
        ("other", ["--seed=4"]),
    ):
        assert remap(place, options[0], f"--out={place / name}", *options[2:], *how) == 0
        kernels[name] = load_model(str(place / name)).params["layers"]["mlp"]["input"]["kernel"]
    np.testing.assert_array_equal(first["layers"]["mlp"]["input"]["kernel"].shape, (4, 16, 24))
    np.testing.assert_array_equal(first["layers"]["mlp"]["input"]["kernel"], kernels["again"])
    assert not np.array_equal(kernels["again"], kernels["exact"])
    assert not np.array_equal(kernels["other"], kernels["exact"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method=hyperclone"], "remap: the following arguments are required: --out"),
        (["--method=hyperclon", "--out=OUT"], "did you mean 'hyperclone'"),
        (["--method=hyperclone", "--out=OUT", "--config.model.hidden_size=20"], "hidden_size"),
        (["--method=stack", "--out=OUT", "--config.model.gated_layers=true"], "model.gated_layers is True"),
        (["--method=ligo", "--out=OUT"], "learns its maps"),
        (["--method=stack", "--out=OUT", "--noise=-1"], "--noise is -1.0, expected at least 0"),
        (["--method=hyperclone", "--out=OUT", "--config.model.vocab_size=12"], "at least its tokenizer's 15"),
        (["--method=hyperclone", "--out=OUT", "--step=3"], "--step: .* is no run with checkpoints"),
        (["--method=stack", "--out=OUT", "--seed=-1"], "--seed is -1, expected at least 0"),
        (["--method=stack", "--out=OUT", "--config.init.step=1"], "init.step is '1', expected --step"),
    ],
    ids=str,
)
def test_what_cannot_be(options, says, place, capsys):
    saved("BertForMaskedLM", place / "small")
    assert remap(place, *[option.replace("OUT", str(place / "out")) for option in options]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("BertForPreTraining", "pooler, next_sentence"),
        ("BertForSequenceClassification", "pooler, classifier"),
    ],
)
def test_another_family_gets_the_masked_lm_head_alone(name, left, place, capsys):
    """BERT's pooler is a tanh, DistilBERT's a ReLU: copied, it would be another function in silence."""
    small = saved(name, place / "small")
    sizes = ["--config.model.model_type=distilbert", "--config.model.type_vocab_size=0"]
    assert remap(place, "--method=fna", f"--out={place / 'wide'}", *sizes) == 0
    said = capsys.readouterr()
    assert f"omitted, distilbert computes these heads differently from bert: {left}" in said.err
    assert "model_type bert → distilbert" in said.out
    kind = transformers.DistilBertForMaskedLM if "PreTraining" in name else transformers.DistilBertModel
    wide, report = kind.from_pretrained(place / "wide", output_loading_info=True)
    assert not any(report.values()), report
    words = small.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(wide.get_input_embeddings().weight[:, : words.shape[1]], words)
    assert load_model(str(place / "wide"), heads=None).labels == ()


def test_the_licence_is_handed_on(place):
    saved("BertForMaskedLM", place / "small")
    (place / "small" / "README.md").write_text("---\nlicense: cc-by-4.0\ntags:\n- mine\n---\n# Small\n")
    assert remap(place, "--method=hyperclone", f"--out={place / 'wide'}") == 0
    card = (place / "wide" / "README.md").read_text()
    assert "license: cc-by-4.0\n" in card
    assert "mine" not in card


def test_a_place_that_is_taken(place, capsys):
    saved("BertForMaskedLM", place / "small")
    assert remap(place, "--method=hyperclone", f"--out={place / 'small'}") == 2
    assert "is not empty" in capsys.readouterr().err
