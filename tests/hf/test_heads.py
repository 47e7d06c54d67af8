"""Which heads a directory has, what is handed on, and what an export says of what it leaves out."""

import json
import shutil

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.data import tokenizer
from dwt_jax.errors import UserError
from dwt_jax.hf import checkpoint
from dwt_jax.models.tokenizer_pipelines import WORDPIECE
from helpers.torch_models import SMALL, torch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = [*WORDPIECE.special_tokens, *"abcdefghijklmnopqrstuvwxyz"]


def saved(name, path, **config):
    labels = 2 if "Question" in name else SMALL["labels"]
    model = torch_model(name, {**SMALL, "labels": labels})
    model.save_pretrained(path)
    change(path, **config)
    return model


def change(path, **config):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def said(path):
    return json.loads((path / "config.json").read_text())


def add(path, **shapes):
    """More tensors, by names with dots for underlines twice."""
    from safetensors.torch import load_file, save_file

    more = {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}
    save_file({**load_file(path / "model.safetensors"), **more}, path / "model.safetensors", {"format": "pt"})


def export(path, *options):
    assert main(["export", f"--model={path}", f"--out={path}-out", *options]) == 0
    return path.with_name(path.name + "-out")


def report(path, **options):
    found = getattr(transformers, said(path)["architectures"][0])
    return found.from_pretrained(path, output_loading_info=True, **options)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("BertForTokenClassification", set()),
        ("DistilBertForTokenClassification", set()),
        ("RobertaForTokenClassification", set()),
        ("BertForMultipleChoice", {"pooler"}),
        ("DistilBertForMultipleChoice", set()),
        ("RobertaForMultipleChoice", {"pooler"}),
        ("BertForQuestionAnswering", set()),
        ("DistilBertForQuestionAnswering", set()),
    ],
)
def test_classifiers_of_something_else(name, heads, tmp_path, capsys):
    saved(name, tmp_path / "in")
    found = checkpoint.load_checkpoint(tmp_path / "in")
    assert set(found.params) == {"embeddings", "layers", *heads}
    assert found.ignored
    assert found.labels == ()
    out = export(tmp_path / "in")
    told = capsys.readouterr().err
    assert all(tensor in told for tensor in found.ignored)
    assert not any(
        report(out, **({} if heads or "Distil" in name else {"add_pooling_layer": False}))[1].values()
    )


@pytest.mark.parametrize("name", ["BertForTokenClassification", "DistilBertForTokenClassification"])
def test_a_config_that_names_no_class(name, tmp_path):
    saved(name, tmp_path, architectures=None)
    assert "classifier" not in checkpoint.load_checkpoint(tmp_path).params
    for said_so in ([], ["BertForMaskedLM"], ["OurOwnClassifier"]):
        saved("BertForSequenceClassification", tmp_path / "other", architectures=said_so)
        assert "classifier" in checkpoint.load_checkpoint(tmp_path / "other").params


def test_a_roberta_that_classifies_beside_its_encoders_pooler(tmp_path):
    theirs = saved("RobertaForSequenceClassification", tmp_path / "in")
    add(tmp_path / "in", roberta__pooler__dense__weight=(8, 8), roberta__pooler__dense__bias=(8,))
    found = checkpoint.load_checkpoint(tmp_path / "in")
    assert found.ignored == ("roberta.pooler.dense.bias", "roberta.pooler.dense.weight")
    ours, loading = report(export(tmp_path / "in"))
    assert not any(loading.values())
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta"])
def test_the_encoder_of_a_classifier(kind, tmp_path):
    saved(f"{kind}ForSequenceClassification", tmp_path / "in", problem_type="regression")
    out = export(tmp_path / "in", "--encoder-only")
    options = {"add_pooling_layer": False} if kind == "Roberta" else {}
    assert not any(report(out, **options)[1].values())
    assert "problem_type" not in said(out)


def test_what_is_said_to_transformers_alone_is_handed_on(tmp_path):
    told = {"problem_type": "multi_label_classification", "classifier_dropout": 0.25, "bos_token_id": 3}
    told |= {"tokenizer_class": "BertTokenizer"}
    saved("BertForSequenceClassification", tmp_path / "in", **told)
    assert told.items() <= said(export(tmp_path / "in")).items()
    saved("BertForSequenceClassification", tmp_path / "silent")
    assert "problem_type" not in said(export(tmp_path / "silent"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "id2label is .*expected an object of names by 0, 1"),
        ({"id2label": {"0": "a", "00": "b", "2": "c"}}, "id2label is "),
        ({"id2label": ["a", "b", "c"]}, "id2label is "),
        ({"id2label": {"0": "a", "1": "b"}}, "has 3 outputs, expected 2"),
        ({"architectures": "BertModel"}, "architectures is 'BertModel', expected a list"),
        ({"model_type": ["bert"]}, r"model_type is \['bert'\]"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"tokenizer_class": 5}, r"config\.json: tokenizer_class is 5, expected a name"),
        ({"problem_type": ["regression"]}, r"problem_type is \['regression'\], expected a name"),
        ({"pad_token_id": 41}, r"pad_token_id is 41, expected less than vocab_size \(41\)"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be(config, says, tmp_path):
    saved("BertForSequenceClassification", tmp_path, **config)
    with pytest.raises(UserError, match=says) as caught:
        checkpoint.load_checkpoint(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_config_nested_without_end(tmp_path):
    saved("BertModel", tmp_path)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="expected a Hugging Face model config"):
        checkpoint.load_checkpoint(tmp_path)


def test_weights_that_are_not_finite(tmp_path):
    model = torch_model("BertModel", SMALL)
    with torch.no_grad():
        model.pooler.dense.bias[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pooler\.dense\.bias holds numbers that are not finite"):
        checkpoint.load_checkpoint(tmp_path)


def test_a_decoder_in_another_type_is_tied_by_its_values(tmp_path):
    from safetensors.torch import load_file, save_file

    model = torch_model("BertForMaskedLM", SMALL).half()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    word = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = word.float()
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint.load_checkpoint(tmp_path).model.tie_word_embeddings
    tensors["cls.predictions.decoder.weight"] = word.float() + 1e-6
    save_file(tensors, tmp_path / "model.safetensors")
    assert not checkpoint.load_checkpoint(tmp_path).model.tie_word_embeddings


def test_without_a_tokenizer(tmp_path, capsys):
    saved("BertForMaskedLM", tmp_path / "in")
    out = export(tmp_path / "in")
    assert "no tokenizer, so none is written" in capsys.readouterr().err
    assert "AutoTokenizer" not in (out / "README.md").read_text()


def test_a_tokenizer_that_is_not_read_is_copied(tmp_path, capsys):
    saved("BertForMaskedLM", tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(WORDS))
    config = '{"tokenizer_class": "BertJapaneseTokenizer"}'
    (tmp_path / "in" / "tokenizer_config.json").write_text(config)
    out = export(tmp_path / "in")
    assert "copied unread: " in capsys.readouterr().err
    assert (out / "tokenizer_config.json").read_text() == config


def test_more_tokens_than_the_model_has(tmp_path, capsys):
    saved("BertForMaskedLM", tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(10, 30))]))
    assert main(["export", f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "vocab_size is 41, expected at least its tokenizer's 51" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_links_lead_somewhere(tmp_path, monkeypatch):
    saved("BertModel", tmp_path / "in")
    (tmp_path / "there").mkdir()
    (tmp_path / "in-out").symlink_to(tmp_path / "there")
    export(tmp_path / "in")
    assert (tmp_path / "there" / "config.json").exists()
    assert (tmp_path / "in-out").is_symlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", "--model=~/in", "--out=~/home-out"]) == 0
    assert (tmp_path / "home-out" / "config.json").exists()


CARD = "---\nlicense: mit\nlanguage: [en]\ntags: [sentence-similarity]\n---\n# All of it\n\nWith modules.\n"


@pytest.mark.parametrize("summary", ['{"validation_fraction": 3}', '{"flops": {"student": 1}}'])
def test_a_run_whose_summary_is_damaged(summary, tmp_path, capsys):
    from dwt_jax.config import Config, Train
    from dwt_jax.config_loader import config_to_dict

    saved("BertForMaskedLM", tmp_path / "run" / "model")
    config = Config(train=Train(steps=2))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config_to_dict(config)))
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "summary.json").write_text(summary)
    assert main(["export", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "is damaged" in capsys.readouterr().err
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main(["export", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'loop'}"]) == 2
    assert "is a link to itself" in capsys.readouterr().err


@pytest.mark.parametrize("left_out", [[], ["--encoder-only"], ["modules.json"]], ids=str)
def test_a_card_that_tells_of_more_than_is_written(left_out, tmp_path):
    import yaml

    saved("BertForMaskedLM" if "--encoder-only" in left_out else "BertModel", tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text(CARD)
    options = [option for option in left_out if option[0] == "-"]
    if left_out and not options:
        (tmp_path / "in" / left_out[0]).write_text("[]")
    card = (export(tmp_path / "in", *options) / "README.md").read_text()
    if not left_out:
        assert card == CARD
        return
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["language"]) == ("mit", ["en"])
    assert header["tags"] == ["dwt-jax", "bert"]
    assert "parts are left out" in card
    assert "With modules." in card


def test_the_hub_s_cache_names_the_repository(tmp_path):
    snapshot = tmp_path / "models--someone--small-bert" / "snapshots" / ("0" * 40)
    saved("BertModel", snapshot)
    assert main(["export", f"--model={snapshot}", f"--out={tmp_path / 'out'}"]) == 0
    assert "`someone/small-bert`" in (tmp_path / "out" / "README.md").read_text()


def test_a_pooler_beside_a_masked_lm_head_is_kept(tmp_path):
    """As roberta-base has it; transformers calls it unexpected there and here."""
    saved("RobertaForMaskedLM", tmp_path / "in")
    add(tmp_path / "in", roberta__pooler__dense__weight=(8, 8), roberta__pooler__dense__bias=(8,))
    out = export(tmp_path / "in")
    for path in (tmp_path / "in", out):
        model, loading = transformers.AutoModel.from_pretrained(path, output_loading_info=True)
        assert not loading["missing_keys"]
    found = checkpoint.load_checkpoint(out).params["pooler"]["kernel"]
    np.testing.assert_array_equal(found.T, model.pooler.dense.weight.detach())


def test_records_that_are_none(tmp_path, capsys):
    """A run's evaluations.jsonl that something else wrote over."""
    from dwt_jax.runs.metrics_file import read_jsonl

    file = tmp_path / "evaluations.jsonl"
    for content in ("[1]\n", '{"loss": 1}\n', "3\n"):
        file.write_text(content)
        with pytest.raises(UserError, match=r"evaluations\.jsonl: holds "):
            read_jsonl(file)
    file.write_bytes(b'{"step": 1}\n\xff\xfe')
    assert read_jsonl(file) == [{"step": 1}]
    shutil.rmtree(tmp_path)
    assert read_jsonl(file) == []


@pytest.mark.parametrize("named", [None, "BertTokenizer", "BertTokenizerFast"])
def test_a_config_without_a_model_type_keeps_its_tokenizer(named, tmp_path):
    """transformers takes its tokenizer.json as it is; with a model_type it would build another."""
    saved("BertForMaskedLM", tmp_path / "in")
    cased = tokenizer.build_wordpiece_tokenizer(
        {token: i for i, token in enumerate([*WORDS, *"ABCDEFG"])}, lowercase=False
    )
    cased.save(str(tmp_path / "in" / "tokenizer.json"))
    config = {**said(tmp_path / "in"), **({"tokenizer_class": named} if named else {})}
    del config["model_type"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    out = export(tmp_path / "in")
    ids = [
        *(
            transformers.AutoTokenizer.from_pretrained(path)("A a").input_ids
            for path in (tmp_path / "in", out)
        ),
        *(tokenizer.load_hf_tokenizer(path).encode("A a").ids for path in (tmp_path / "in", out)),
    ]
    assert ids == [ids[0]] * 4
    assert not any(report(out)[1].values())


FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


@pytest.mark.parametrize("name", FILES)
def test_a_tokenizer_that_was_not_fetched_whole(name, tmp_path, capsys):
    saved("BertForMaskedLM", tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "in" / name).unlink(missing_ok=True)
    (tmp_path / "in" / name).symlink_to(tmp_path / "gone")
    capsys.readouterr()
    assert main(["export", f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert f"{name}: a broken symbolic link, expected a file" in told
    assert told.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
