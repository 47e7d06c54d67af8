"""`dwt remap` from the command line."""

import json
import re

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS
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
def folder(tmp_path):
    (tmp_path / "wide.py").write_text(CONFIG)
    return tmp_path


def save_model(name, path):
    model = torch_model(name, SMALL)
    model.save_pretrained(path)
    tokens = [*WORDPIECE_TOKENS, *"abcdefghij"]
    (path / "vocab.txt").write_text("\n".join(tokens))
    return model


def remap(folder, *options):
    return main(["remap", f"--model={folder / 'small'}", f"--config={folder / 'wide.py'}", *options])


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification", "BertModel"]
)
def test_doubled_width_has_same_outputs_in_torch(name, folder, capsys):
    small = save_model(name, folder / "small")
    assert remap(folder, "--method=hyperclone", f"--out={folder / 'wide'}", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["function_preserving"]
    assert bool(record["logit_drift"]) == ("mlm" in parts_of_class(name))
    if record["logit_drift"]:
        assert record["logit_drift"]["max"] < 1e-4
    wide, report = type(small).from_pretrained(folder / "wide", output_loading_info=True)
    assert not any(report.values()), report
    assert wide.config.hidden_size == 16
    assert wide.config.tie_word_embeddings == small.config.tie_word_embeddings
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        for key, x in small(ids).items():
            expected = torch.cat([x, x], -1) if x.shape[-1] == 8 else x  # hidden states are tiled
            torch.testing.assert_close(wide.eval()(ids)[key], expected, atol=1e-4, rtol=0)
    assert "computes the same function" in (folder / "wide" / "README.md").read_text()
    assert load_model(str(folder / "wide"), heads="all").params.keys() == parts_of_class(name)


def parts_of_class(name):
    heads = {
        "BertForMaskedLM": {"mlm"},
        "BertForPreTraining": {"mlm", "pooler", "next_sentence"},
        "BertForSequenceClassification": {"pooler", "classifier"},
        "BertModel": {"pooler"},
    }
    return {"embeddings", "layers", *heads[name]}


@pytest.mark.parametrize("files", ["vocab.txt", "tokenizer.json"])
def test_tokenizer_is_the_sources_and_its_length_the_models(files, folder):
    """As a RoBERTa, which would take another tokenizer and has one position less than rows of its table."""
    small = save_model("BertForMaskedLM", folder / "small")
    source = transformers.AutoTokenizer.from_pretrained(folder / "small")
    if files == "tokenizer.json":
        (folder / "small" / "vocab.txt").unlink()
        source.backend_tokenizer.save(str(folder / "small" / "tokenizer.json"))
    (folder / "small" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    options = ["--config.model.model_type=roberta", "--config.model.max_position_embeddings=20"]
    assert remap(folder, "--method=fna", f"--out={folder / 'wide'}", *options) == 0
    wide = transformers.AutoTokenizer.from_pretrained(folder / "wide")
    assert wide("abc dead").input_ids == source("abc dead").input_ids
    assert wide.model_max_length == 20 - (small.config.pad_token_id + 1)
    model = transformers.AutoModel.from_pretrained(folder / "wide", add_pooling_layer=False)
    model(**wide(["a " * 30], truncation=True, return_tensors="pt"))
    with pytest.raises(IndexError):
        model(**wide(["a " * 30], truncation=True, max_length=19, return_tensors="pt"))


def test_prints_table_and_noise_and_seed_change_result(folder, capsys):
    save_model("BertForMaskedLM", folder / "small")
    options = ["--method=stack+net2net", f"--out={folder / 'deep'}", "--config.model.num_hidden_layers=4"]
    assert remap(folder, *options, "--noise=0.01", "--seed=3") == 0
    output = capsys.readouterr().out
    assert "layers/attention/query/kernel" in output
    assert "needs training" in (folder / "deep" / "README.md").read_text()
    first_params = load_model(str(folder / "deep")).params
    kernels = {}
    for name, flags in (
        ("again", ["--noise=0.01", "--seed=3"]),
        ("exact", ["--seed=3"]),
        ("other", ["--seed=4"]),
    ):
        assert remap(folder, options[0], f"--out={folder / name}", *options[2:], *flags) == 0
        kernels[name] = load_model(str(folder / name)).params["layers"]["mlp"]["input"]["kernel"]
    np.testing.assert_array_equal(first_params["layers"]["mlp"]["input"]["kernel"].shape, (4, 16, 24))
    np.testing.assert_array_equal(first_params["layers"]["mlp"]["input"]["kernel"], kernels["again"])
    assert not np.array_equal(kernels["again"], kernels["exact"])
    assert not np.array_equal(kernels["other"], kernels["exact"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method=hyperclone"], "remap: the following arguments are required: --out"),
        (["--method=hyperclon", "--out=OUT"], "did you mean 'hyperclone'"),
        (["--method=hyperclone", "--out=OUT", "--config.model.hidden_size=20"], "hidden_size"),
        (["--method=stack", "--out=OUT", "--config.model.gated_layers=true"], "model.gated_layers is True"),
        (["--method=ligo", "--out=OUT"], "learns its maps"),
        (["--method=stack", "--out=OUT", "--noise=-1"], "--noise is -1.0, expected at least 0"),
        (["--method=hyperclone", "--out=OUT", "--config.model.vocab_size=12"], "at least its tokenizer's 15"),
        (["--method=hyperclone", "--out=OUT", "--step=3"], "--step: .* is not a run with checkpoints"),
        (["--method=stack", "--out=OUT", "--seed=-1"], "--seed is -1, expected at least 0"),
        (["--method=stack", "--out=OUT", "--config.init.step=1"], "init.step is '1', expected --step"),
    ],
    ids=str,
)
def test_invalid_options_exit_2(options, message, folder, capsys):
    save_model("BertForMaskedLM", folder / "small")
    assert remap(folder, *[option.replace("OUT", str(folder / "out")) for option in options]) == 2
    stderr = capsys.readouterr().err
    assert re.search(message, stderr), stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("BertForPreTraining", "pooler, next_sentence"),
        ("BertForSequenceClassification", "pooler, classifier"),
    ],
)
def test_other_model_type_gets_masked_lm_head_only(name, dropped, folder, capsys):
    """BERT's pooler is a tanh, DistilBERT's a ReLU: a copied pooler would compute a different function."""
    small = save_model(name, folder / "small")
    sizes = ["--config.model.model_type=distilbert", "--config.model.type_vocab_size=0"]
    assert remap(folder, "--method=fna", f"--out={folder / 'wide'}", *sizes) == 0
    output = capsys.readouterr()
    assert f"omitted, distilbert computes these heads differently from bert: {dropped}" in output.err
    assert "model_type bert → distilbert" in output.out
    model_class = (
        transformers.DistilBertForMaskedLM if "PreTraining" in name else transformers.DistilBertModel
    )
    wide, report = model_class.from_pretrained(folder / "wide", output_loading_info=True)
    assert not any(report.values()), report
    word_table = small.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(wide.get_input_embeddings().weight[:, : word_table.shape[1]], word_table)
    assert load_model(str(folder / "wide"), heads="all").labels == ()


def test_licence_is_copied(folder):
    save_model("BertForMaskedLM", folder / "small")
    (folder / "small" / "README.md").write_text("---\nlicense: cc-by-4.0\ntags:\n- mine\n---\n# Small\n")
    assert remap(folder, "--method=hyperclone", f"--out={folder / 'wide'}") == 0
    card = (folder / "wide" / "README.md").read_text()
    assert "license: cc-by-4.0\n" in card
    assert "base_model: small\n" in card
    assert "mine" not in card


def test_nonempty_out_exits_2(folder, capsys):
    save_model("BertForMaskedLM", folder / "small")
    assert remap(folder, "--method=hyperclone", f"--out={folder / 'small'}") == 2
    assert "is not empty" in capsys.readouterr().err
