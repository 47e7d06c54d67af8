"""The heads of model directories, passed-through config keys, and what an export omits."""

import json
import re
import shutil

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.config import Config
from dwt_jax.data import tokenizer
from dwt_jax.errors import UserError
from dwt_jax.hf import checkpoint
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS, build_wordpiece_tokenizer
from dwt_jax.runs.run_dir import init_run_dir
from helpers.torch_models import SMALL, torch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = [*WORDPIECE_TOKENS, *"abcdefghijklmnopqrstuvwxyz"]


def save_model(name, path, **config):
    labels = 2 if "Question" in name else SMALL["labels"]
    model = torch_model(name, {**SMALL, "labels": labels})
    model.save_pretrained(path)
    update_config(path, **config)
    return model


def update_config(path, **config):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def read_config(path):
    return json.loads((path / "config.json").read_text())


def add_tensors(path, **shapes):
    """Add tensors to a directory. Two underscores in a name stand for a dot."""
    from safetensors.torch import load_file, save_file

    extra = {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}
    save_file(
        {**load_file(path / "model.safetensors"), **extra}, path / "model.safetensors", {"format": "pt"}
    )


def export(path, *options):
    assert main(["export", f"--model={path}", f"--out={path}-out", *options]) == 0
    return path.with_name(path.name + "-out")


def load_with_report(path, **options):
    model_class = getattr(transformers, read_config(path)["architectures"][0])
    return model_class.from_pretrained(path, output_loading_info=True, **options)


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
def test_other_classifiers_load_as_encoder(name, heads, tmp_path, capsys):
    save_model(name, tmp_path / "in")
    loaded = checkpoint.load_checkpoint(tmp_path / "in")
    assert set(loaded.params) == {"embeddings", "layers", *heads}
    assert loaded.ignored
    assert loaded.labels == ()
    out = export(tmp_path / "in")
    stderr = capsys.readouterr().err
    assert all(tensor in stderr for tensor in loaded.ignored)
    assert not any(
        load_with_report(out, **({} if heads or "Distil" in name else {"add_pooling_layer": False}))[
            1
        ].values()
    )


@pytest.mark.parametrize("name", ["BertForTokenClassification", "DistilBertForTokenClassification"])
def test_classifier_needs_sequence_class_or_no_class_name(name, tmp_path):
    save_model(name, tmp_path, architectures=None)
    assert "classifier" not in checkpoint.load_checkpoint(tmp_path).params
    for architectures in ([], ["BertForMaskedLM"], ["OurOwnClassifier"]):
        save_model("BertForSequenceClassification", tmp_path / "other", architectures=architectures)
        assert "classifier" in checkpoint.load_checkpoint(tmp_path / "other").params


def test_roberta_classifier_ignores_pooler_of_encoder(tmp_path):
    torch_source = save_model("RobertaForSequenceClassification", tmp_path / "in")
    add_tensors(tmp_path / "in", roberta__pooler__dense__weight=(8, 8), roberta__pooler__dense__bias=(8,))
    loaded = checkpoint.load_checkpoint(tmp_path / "in")
    assert loaded.ignored == ("roberta.pooler.dense.bias", "roberta.pooler.dense.weight")
    exported, loading = load_with_report(export(tmp_path / "in"))
    assert not any(loading.values())
    for name, x in torch_source.state_dict().items():
        assert torch.equal(exported.state_dict()[name], x)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta"])
def test_encoder_only_export_of_classifier(kind, tmp_path):
    save_model(f"{kind}ForSequenceClassification", tmp_path / "in", problem_type="regression")
    out = export(tmp_path / "in", "--encoder-only")
    options = {"add_pooling_layer": False} if kind == "Roberta" else {}
    assert not any(load_with_report(out, **options)[1].values())
    assert "problem_type" not in read_config(out)


def test_passthrough_keys_are_exported(tmp_path):
    config_values = {
        "problem_type": "multi_label_classification",
        "classifier_dropout": 0.25,
        "bos_token_id": 3,
    }
    config_values |= {"tokenizer_class": "BertTokenizer"}
    save_model("BertForSequenceClassification", tmp_path / "in", **config_values)
    assert config_values.items() <= read_config(export(tmp_path / "in")).items()
    save_model("BertForSequenceClassification", tmp_path / "silent")
    assert "problem_type" not in read_config(export(tmp_path / "silent"))


@pytest.mark.parametrize(
    ("config", "message"),
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
def test_invalid_config_raises(config, message, tmp_path):
    save_model("BertForSequenceClassification", tmp_path, **config)
    with pytest.raises(UserError, match=message) as error_info:
        checkpoint.load_checkpoint(tmp_path)
    assert len(str(error_info.value).splitlines()) == 1


def test_deeply_nested_config_raises(tmp_path):
    save_model("BertModel", tmp_path)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="expected a Hugging Face model config"):
        checkpoint.load_checkpoint(tmp_path)


def test_weights_not_finite_raise(tmp_path):
    model = torch_model("BertModel", SMALL)
    with torch.no_grad():
        model.pooler.dense.bias[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pooler\.dense\.bias holds numbers that are not finite"):
        checkpoint.load_checkpoint(tmp_path)


def test_decoder_of_other_dtype_is_tied_if_values_equal(tmp_path):
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


def test_export_without_tokenizer(tmp_path, capsys):
    save_model("BertForMaskedLM", tmp_path / "in")
    out = export(tmp_path / "in")
    assert "no tokenizer; none is written" in capsys.readouterr().err
    assert "AutoTokenizer" not in (out / "README.md").read_text()


def test_unsupported_tokenizer_is_copied(tmp_path, capsys):
    save_model("BertForMaskedLM", tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(WORDS))
    config = {"tokenizer_class": "BertJapaneseTokenizer", "model_max_length": 512, "jumanpp_kwargs": None}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(config))
    out = export(tmp_path / "in")
    assert "copied unchanged: " in capsys.readouterr().err
    assert (out / "vocab.txt").read_text() == "\n".join(WORDS)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    expected = {**config, "model_max_length": 13, "model_input_names": inputs}
    assert json.loads((out / "tokenizer_config.json").read_text()) == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:300], r"tokenizer\.json: .*expected a tokenizer"),
        (
            lambda text: text.replace("[MASK]", "[M]"),
            r"mask_token '\[MASK\]' is not in the vocabulary|no \[MASK\]",
        ),
    ],
    ids=["truncated", "without its mask"],
)
def test_damaged_tokenizer_is_not_copied(damage, message, tmp_path, capsys):
    """Neither into an export nor into a new run."""
    save_model("BertForMaskedLM", tmp_path / "in")
    built = build_wordpiece_tokenizer({token: i for i, token in enumerate(WORDS)})
    tokenizer.save_tokenizer(built, tmp_path / "tokenizer", True)
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copyfile(file, tmp_path / "in" / file.name)
    file = tmp_path / "in" / "tokenizer.json"
    file.write_text(damage(file.read_text()))
    capsys.readouterr()
    assert main(["export", f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=message):
        init_run_dir(tmp_path / "run", Config(), tmp_path / "in", {})
    assert not {"tokenizer", "config.json"} & {file.name for file in (tmp_path / "run").iterdir()}


def test_tokenizer_larger_than_model_exits_2(tmp_path, capsys):
    save_model("BertForMaskedLM", tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(10, 30))]))
    assert main(["export", f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "vocab_size is 41, expected at least its tokenizer's 51" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_to_link_and_home_directory(tmp_path, monkeypatch):
    save_model("BertModel", tmp_path / "in")
    (tmp_path / "linked").mkdir()
    (tmp_path / "in-out").symlink_to(tmp_path / "linked")
    export(tmp_path / "in")
    assert (tmp_path / "linked" / "config.json").exists()
    assert (tmp_path / "in-out").is_symlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", "--model=~/in", "--out=~/home-out"]) == 0
    assert (tmp_path / "home-out" / "config.json").exists()


CARD = "---\nlicense: mit\nlanguage: [en]\ntags: [sentence-similarity]\n---\n# All of it\n\nWith modules.\n"


@pytest.mark.parametrize("summary", ['{"validation_fraction": 3}', '{"flops": {"student": 1}}'])
def test_damaged_summary_exits_2(summary, tmp_path, capsys):
    from dwt_jax.config import Config, Train
    from dwt_jax.config_loader import config_to_dict

    save_model("BertForMaskedLM", tmp_path / "run" / "model")
    config = Config(train=Train(steps=2))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config_to_dict(config)))
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "summary.json").write_text(summary)
    assert main(["export", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "is damaged" in capsys.readouterr().err
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main(["export", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'loop'}"]) == 2
    assert "is a link to itself" in capsys.readouterr().err


@pytest.mark.parametrize("omission", [[], ["--encoder-only"], ["modules.json"]], ids=str)
def test_card_of_partially_exported_model(omission, tmp_path, capsys):
    import yaml

    save_model("BertForMaskedLM" if "--encoder-only" in omission else "BertModel", tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text(CARD)
    options = [option for option in omission if option[0] == "-"]
    if omission and not options:
        (tmp_path / "in" / omission[0]).write_text("[]")
    card = (export(tmp_path / "in", *options) / "README.md").read_text()
    if not omission:
        assert card == CARD
        return
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["language"]) == ("mit", ["en"])
    assert header["tags"] == ["dwt-jax", "bert"]
    assert "with parts omitted" in card
    assert "With modules." in card
    if omission == ["modules.json"]:
        assert "omitted the modules of sentence-transformers" in capsys.readouterr().err


def test_card_names_repository_of_hub_cache(tmp_path):
    snapshot = tmp_path / "models--someone--small-bert" / "snapshots" / ("0" * 40)
    save_model("BertModel", snapshot)
    assert main(["export", f"--model={snapshot}", f"--out={tmp_path / 'out'}"]) == 0
    assert "`someone/small-bert`" in (tmp_path / "out" / "README.md").read_text()


def test_pooler_beside_masked_lm_head_is_exported(tmp_path):
    """As in roberta-base; transformers reports it as unexpected in both directories."""
    save_model("RobertaForMaskedLM", tmp_path / "in")
    add_tensors(tmp_path / "in", roberta__pooler__dense__weight=(8, 8), roberta__pooler__dense__bias=(8,))
    out = export(tmp_path / "in")
    for path in (tmp_path / "in", out):
        model, loading = transformers.AutoModel.from_pretrained(path, output_loading_info=True)
        assert not loading["missing_keys"]
    kernel = checkpoint.load_checkpoint(out).params["pooler"]["kernel"]
    np.testing.assert_array_equal(kernel.T, model.pooler.dense.weight.detach())


def test_read_jsonl_of_damaged_file(tmp_path, capsys):
    """An evaluations.jsonl with other content."""
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


@pytest.mark.parametrize("tokenizer_class", [None, "BertTokenizer", "BertTokenizerFast"])
def test_config_without_model_type_keeps_tokenizer(tokenizer_class, tmp_path):
    """transformers uses its tokenizer.json as it is; with a model_type it would build another tokenizer."""
    save_model("BertForMaskedLM", tmp_path / "in")
    cased = build_wordpiece_tokenizer(
        {token: i for i, token in enumerate([*WORDS, *"ABCDEFG"])}, lowercase=False
    )
    cased.save(str(tmp_path / "in" / "tokenizer.json"))
    config = {
        **read_config(tmp_path / "in"),
        **({"tokenizer_class": tokenizer_class} if tokenizer_class else {}),
    }
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
    assert not any(load_with_report(out)[1].values())


FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


@pytest.mark.parametrize("name", FILES)
def test_broken_link_to_tokenizer_file_exits_2(name, tmp_path, capsys):
    save_model("BertForMaskedLM", tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "in" / name).unlink(missing_ok=True)
    (tmp_path / "in" / name).symlink_to(tmp_path / "gone")
    capsys.readouterr()
    assert main(["export", f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]) == 2
    stderr = capsys.readouterr().err
    assert f"{name}: a broken symbolic link, expected a file" in stderr
    assert stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
