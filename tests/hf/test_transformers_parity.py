"""Reading and writing checkpoints against transformers in torch: every class, random small sizes."""

import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.data.hf_tokenizer import load_hf_tokenizer, read_tokenizer
from dwt_jax.data.tokenizer import copy_tokenizer
from dwt_jax.errors import UserError
from dwt_jax.finetune.collate import collate_examples, encode_examples
from dwt_jax.finetune.datasets import ExampleSplit
from dwt_jax.hf import checkpoint
from dwt_jax.hf.tensor_files import open_weights
from dwt_jax.models import bert, family
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS
from helpers.torch_models import CLASSES, SMALL, L, batch, torch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sizes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "head_size": st.sampled_from([2, 4]),
        "mlp": st.sampled_from([5, 16]),
        "vocab": st.sampled_from([17, 256, 257]),
        "types": st.integers(1, 3),
        "act": st.sampled_from(["gelu", "gelu_new", "relu"]),
        "eps": st.sampled_from([1e-12, 1e-5, 0.1]),
        "tied": st.booleans(),
        "labels": st.integers(1, 4),
    }
)


def forward(loaded, tokens, segments, types):
    """The outputs of every head that the checkpoint has."""
    params, model = loaded.params, loaded.model
    module = family(model)
    hidden = module.encode(params, model, tokens, segments, types)
    outputs = {"hidden": hidden}
    if set(module.LM_HEADS) <= set(params):
        outputs["mlm"] = lm_head_logits(params, model, hidden)[..., : model.vocab_size]
    if "classifier" in params:
        outputs["classes"] = module.classifier_logits(params, model, hidden, segments)
    elif "pooler" in params:
        outputs["pooled"] = bert.pooler_output(params, model, hidden)
    if "next_sentence" in params:
        kernel, bias = (params["next_sentence"][name] for name in ("kernel", "bias"))
        outputs["next"] = outputs["pooled"] @ kernel + bias
    return {name: np.asarray(x) for name, x in outputs.items()}


def torch_outputs(model, tokens, segments, types):
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(segments).long()}
    if type(model).__name__.startswith(("Bert", "Roberta", "RoFormer", "Camembert", "XLMRoberta")):
        inputs["token_type_ids"] = torch.tensor(types).long()
    with torch.no_grad():
        out = model(**inputs)
        outputs = {"hidden": model.base_model(**inputs).last_hidden_state}
        kind = type(model).__name__
        if kind.endswith("ForMaskedLM"):
            outputs["mlm"] = out.logits
        elif kind.endswith("ForPreTraining"):
            outputs |= {"mlm": out.prediction_logits, "next": out.seq_relationship_logits}
            outputs["pooled"] = model.bert(**inputs).pooler_output
        elif kind.endswith("ForSequenceClassification"):
            outputs["classes"] = out.logits
        elif "pooler_output" in out:
            outputs["pooled"] = out.pooler_output
    return {name: x.numpy() for name, x in outputs.items()}


def check_same_tensors(a, b, names, unused=()):
    """Compare tensors bitwise by canonical names, and return the names that only one has."""
    left, right = ({names.canonical_tensor_name(name): x[name] for name in x} for x in (a, b))
    for name in left.keys() & right.keys():
        if name not in unused:
            assert left[name].dtype == right[name].dtype, name
            assert left[name].shape == right[name].shape, name
            assert left[name].tobytes() == right[name].tobytes(), name
    return left.keys() ^ right.keys()


def check_round_trip(name, size, path, dtype="float32"):
    torch_source = torch_model(name, size)
    torch_source.to(getattr(torch, dtype)).save_pretrained(path / "theirs")
    torch_source = torch_source.float()
    for module in torch_source.modules():
        if hasattr(module, "create_weight"):  # a table of sines that was rounded with the weights
            module.weight.data.copy_(module.create_weight())
    loaded = checkpoint.load_checkpoint(path / "theirs")
    assert loaded.dtype == dtype
    assert not loaded.ignored
    inputs = batch(loaded.model)
    outputs, expected = forward(loaded, *inputs), torch_outputs(torch_source, *inputs)
    assert set(outputs) == set(expected)
    is_token = inputs[1] > 0
    for key, x in expected.items():
        a, b = (outputs[key][is_token], x[is_token]) if key in ("hidden", "mlm") else (outputs[key], x)
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0, err_msg=key)
    save_again(loaded, path)
    names = family(loaded.model).HF_NAMES[loaded.model.model_type]
    unused = () if size["tied"] else {target for name, target in names.aliases.items() if "bias" in name}
    assert not check_same_tensors(open_weights(path / "theirs"), open_weights(path / "ours"), names, unused)
    architecture = json.loads((path / "ours" / "config.json").read_text())["architectures"][0]
    saved_class = getattr(transformers, architecture)
    assert saved_class is type(torch_source) or name.startswith(("Camembert", "XLMRoberta"))
    report = saved_class.from_pretrained(path / "ours", output_loading_info=True)[1]
    assert not any(report.values()), report


def save_again(loaded, path):
    (path / "empty").mkdir(exist_ok=True)
    checkpoint.save_checkpoint(
        loaded.params, loaded.model, path / "empty", path / "ours", dtype=loaded.dtype, labels=loaded.labels
    )


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_class_in_every_dtype(name, dtype, tmp_path):
    check_round_trip(name, SMALL, tmp_path, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=5)
@given(size=sizes)
def test_random_size(name, size, tmp_path_factory):
    check_round_trip(name, size, tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("ForMaskedLM")])
def test_untied_decoder(name, tmp_path):
    check_round_trip(name, {**SMALL, "tied": False, "act": "relu"}, tmp_path)


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("ForMaskedLM")])
def test_values_that_transformers_does_not_use(name, tmp_path):
    """An initializer_range of 0 and no padding token; RoBERTa then counts positions from 0."""
    initializer_range = 0.02 if name.startswith("Modern") else 0.0  # ModernBERT divides by it
    size = {**SMALL, "pad": -1, "range": initializer_range, "act": "gelu_pytorch_tanh"}
    check_round_trip(name, size, tmp_path)
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    pad_id = None if name.startswith("EuroBert") else -1
    assert (ours["pad_token_id"], ours["initializer_range"]) == (pad_id, initializer_range)


def old_style(name, tensors):
    """The tensors of a BertForMaskedLM as other versions wrote them."""
    if name == "gamma and beta":
        return {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in tensors.items()
        }
    if name == "position_ids":
        return {**tensors, "bert.embeddings.position_ids": torch.arange(L + 4)[None]}
    if name == "both of a tied pair":
        decoder = {
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
        }
        return {**tensors, **decoder}
    if name == "the decoder alone":
        tensors = dict(tensors)
        word = tensors.pop("bert.embeddings.word_embeddings.weight")
        return {**tensors, "cls.predictions.decoder.weight": word}
    if name == "data parallel and compiled":
        return {f"module._orig_mod.{k}": v for k, v in tensors.items()}
    if name == "compiled encoder":
        return {k.replace("bert.encoder.", "bert._orig_mod.encoder."): v for k, v in tensors.items()}
    assert name == "no prefix"
    return {k.removeprefix("bert."): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    "name",
    [
        "gamma and beta",
        "position_ids",
        "both of a tied pair",
        "the decoder alone",
        "no prefix",
        "data parallel and compiled",
        "compiled encoder",
    ],
)
@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_tensor_names_of_other_versions(name, binary, tmp_path):
    from safetensors.torch import load_file, save_file

    torch_model("BertForMaskedLM", SMALL).save_pretrained(tmp_path)
    expected = checkpoint.load_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = old_style(name, load_file(file))
    file.unlink()
    if binary:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, file)
    loaded = checkpoint.load_checkpoint(tmp_path)
    assert loaded.model == expected.model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)


def test_different_decoder_is_not_tied(tmp_path):
    """As in transformers, which warns."""
    from safetensors.torch import load_file, save_file

    torch_model("BertForMaskedLM", SMALL).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    word = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = word + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = checkpoint.load_checkpoint(tmp_path)
    assert not loaded.model.tie_word_embeddings
    inputs = batch(loaded.model)
    torch_source = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    outputs, expected = forward(loaded, *inputs), torch_outputs(torch_source, *inputs)
    np.testing.assert_allclose(outputs["mlm"][inputs[1] > 0], expected["mlm"][inputs[1] > 0], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder is True, expected False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "prelu"}, "hidden_act is 'prelu'"),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"pad_token_id": -2}, "pad_token_id is -2, expected at least -1"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is "),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is "),
        ({"num_attention_heads": 3}, "hidden_size is 8, expected a multiple of num_attention_heads"),
        ({"num_hidden_layers": 1}, r"unexpected bert\.encoder\.layer\.1\."),
        ({"num_hidden_layers": 3}, r"missing bert\.encoder\.layer\.2\..*\[8, 8\]"),
        ({"num_hidden_layers": 10**9}, "too few for a num_hidden_layers of 1000000000"),
        ({"num_hidden_layers": 10**5}, "too few for num_hidden_layers of 100000"),
        ({"hidden_size": 10**15}, "too few for a hidden_size"),
        ({"vocab_size": 10**20}, "too few for a vocab_size"),
        ({"vocab_size": 40}, r"word_embeddings\.weight is \[41, 8\], expected \[40, 8\]"),
    ],
    ids=str,
)
def test_unsupported_config_is_named(change, message, tmp_path):
    torch_model("BertForMaskedLM", SMALL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error_info:
        checkpoint.load_checkpoint(tmp_path)
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize(
    ("model_type", "old", "new", "parts"),
    [
        ("bert", "bert.", "model.bert.", ["'model.bert.'", "expected 'bert.' or none"]),
        ("bert", "bert.", "albert.", ["'albert.'", "expected 'bert.'", "roberta"]),
        ("roberta", "", "", ["'bert.'", "expected 'roberta.'", "those of model_type bert"]),
        (
            "distilbert",
            "bert.",
            "",
            ["'distilbert.transformer.layer.0.", "those of model_type bert or roformer or"],
        ),
    ],
)
def test_names_of_another_model(model_type, old, new, parts, tmp_path):
    """One line with a name that the file has, how names should begin, and the families."""
    from safetensors.torch import load_file, save_file

    torch_model("BertForMaskedLM", SMALL).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensors[name] for name in tensors
    }
    save_file(renamed, tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    size_keys = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}
    file.write_text(json.dumps({**json.loads(file.read_text()), **size_keys, "model_type": model_type}))
    with pytest.raises(UserError) as error_info:
        checkpoint.load_checkpoint(tmp_path)
    message = str(error_info.value)
    assert len(message) - len(str(tmp_path)) < 500
    assert any(f"('{name}')" in message for name in renamed)
    for part in [*parts, "known model types: bert, distilbert"]:
        assert part in message


def test_file_without_weights(tmp_path):
    from safetensors.torch import save_file

    torch_model("BertForMaskedLM", {**SMALL, "layers": 1}).save_pretrained(tmp_path)
    save_file({"bert.embeddings.position_ids": torch.arange(13)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensors of weights, expected those of a bert"):
        checkpoint.load_checkpoint(tmp_path)


def test_bare_model_without_model_type(tmp_path):
    """Its class name tells; without one, the names are those of three families."""
    torch_model("RobertaModel", SMALL).save_pretrained(tmp_path / "in")
    expected = checkpoint.load_checkpoint(tmp_path / "in").model
    file = tmp_path / "in" / "config.json"
    config = json.loads(file.read_text())
    del config["model_type"]
    file.write_text(json.dumps(config))
    assert checkpoint.load_checkpoint(tmp_path / "in").model == expected
    del config["architectures"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no model_type, and tensors of bert or .*, expected one of bert, "):
        checkpoint.load_checkpoint(tmp_path / "in")
    file.write_text(json.dumps({**config, "model_type": "albert"}))
    with pytest.raises(UserError, match=r"'albert', expected one of bert, .*the names of bert or"):
        checkpoint.load_checkpoint(tmp_path / "in")


def test_config_without_model_type(tmp_path):
    torch_model("BertForPreTraining", SMALL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    expected = checkpoint.load_checkpoint(tmp_path).model
    del config["model_type"], config["architectures"], config["tie_word_embeddings"]
    file.write_text(json.dumps(config))
    assert checkpoint.load_checkpoint(tmp_path).model == expected


def test_unsupported_heads_are_ignored_and_named(tmp_path):
    torch_model("BertModel", SMALL).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = {**load_file(tmp_path / "model.safetensors"), "qa_outputs.weight": torch.zeros(2, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint.load_checkpoint(tmp_path).ignored == ("qa_outputs.weight",)


def test_overflow_of_float16_raises(tmp_path):
    torch_model("BertModel", SMALL).save_pretrained(tmp_path / "theirs")
    loaded = checkpoint.load_checkpoint(tmp_path / "theirs")
    loaded.params["pooler"]["bias"] = np.full(8, 1e5, np.float32)
    with pytest.raises(UserError, match=r"pooler\.dense\.bias does not fit float16"):
        save_again(loaded._replace(dtype="float16"), tmp_path)


@pytest.mark.parametrize("task", ["TokenClassification", "QuestionAnswering"])
def test_heads_of_other_tasks_are_omitted_and_named(task, tmp_path):
    torch_model(f"ModernBertFor{task}", SMALL).save_pretrained(tmp_path)
    loaded = checkpoint.load_checkpoint(tmp_path)
    assert set(loaded.params) == set(family(loaded.model).ENCODER_PARTS)
    assert {"head.dense.weight", "head.norm.weight", "classifier.weight"} <= set(loaded.ignored)


def test_a_classifiers_dropout_rate_follows_the_config(tmp_path):
    torch_model("ModernBertForSequenceClassification", SMALL).save_pretrained(tmp_path / "m")
    loaded = checkpoint.load_checkpoint(tmp_path / "m")
    assert "classifier_dropout" not in loaded.passthrough


CLASSIFIERS = [name for name in CLASSES if name.endswith("ForSequenceClassification")]
PAIRS = [["a b c", "d e"], ["c a", "f"], ["a b c d e f g h i j k l m n o p", "d e f g h i j k l m n o"]]


def predict(loaded, tokenizer):
    """The logits of PAIRS as a fine-tuning computes them, long pairs cut to the model's length."""
    length = loaded.model.max_length
    texts, text_pairs = map(list, zip(*PAIRS, strict=True))
    split = ExampleSplit(texts, text_pairs, None, ["0", "1", "2"])
    encoded = encode_examples(split, read_tokenizer(tokenizer), length)
    rows = collate_examples(encoded, np.arange(3), (length,), loaded.model.pad_token_id)
    outputs = forward(loaded, rows.tokens, rows.segment_ids, rows.token_type_ids)
    return encoded, outputs["classes"]


@pytest.mark.parametrize("types", [1, 2])
@pytest.mark.parametrize("borrowed", [False, True], ids=["its own", "borrowed"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_saved_directory_alone_gives_the_predictions_for_pairs(name, borrowed, types, tmp_path):
    """With a tokenizer that says nothing of the model, and with one that says what is true of another."""
    (tmp_path / "tokenizer").mkdir()
    tokens = [*WORDPIECE_TOKENS, *"abcdefghijklmnopqrst"]
    tokens[:2] = tokens[1::-1]  # the padding id of the models is 1
    (tmp_path / "tokenizer" / "vocab.txt").write_text("\n".join(tokens))
    config = {"model_max_length": 512, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    config |= {f"{role}_token": token for role, token in WORDPIECE_TOKENS._asdict().items()}
    config |= {"tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tmp_path / "tokenizer"
    if borrowed:
        tokenizer = tmp_path / "copy"
        copy_tokenizer(tmp_path / "tokenizer", tokenizer)
    torch_model(name, {**SMALL, "types": types}).save_pretrained(tmp_path / "theirs")
    loaded = checkpoint.load_checkpoint(tmp_path / "theirs")
    checkpoint.save_checkpoint(
        loaded.params, loaded.model, tokenizer, tmp_path / "ours", labels=loaded.labels
    )
    encoded, expected = predict(loaded, tokenizer)
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    rows = auto_tokenizer(*zip(*PAIRS, strict=True), padding=True, truncation=True, return_tensors="pt")
    assert rows["attention_mask"].sum(1).tolist() == encoded.lengths.tolist()
    assert max(encoded.lengths) == loaded.model.max_length
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        logits = model(**rows).logits.numpy()
    np.testing.assert_allclose(expected, logits, atol=1e-4)
    if name.startswith(("DistilBert", "ModernBert", "EuroBert")) or types == 1:
        assert "token_type_ids" not in rows


@pytest.mark.parametrize("is_copied", [False, True], ids=["beside its model", "copied into a run"])
@pytest.mark.parametrize("name", ["Camembert", "XLMRoberta"])
def test_sentencepiece_tokenizer_stays_beside_a_roberta(name, is_copied, tmp_path):
    """Its class follows from the source's model_type alone, which is another than that of the copy."""
    torch_model(f"{name}ForMaskedLM", SMALL).save_pretrained(tmp_path / "theirs")
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>"]
    words = ["\u2581hello", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = [*((x, 0.0) for x in special_tokens), *((x, -1.0) for x in words), ("<mask>", 0.0)]
    source = getattr(transformers, f"{name}Tokenizer")(vocab=vocab)
    source.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["tokenizer_class"]
    file.write_text(json.dumps(settings))
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")("hello abc").input_ids
    loaded, tokenizer = checkpoint.load_checkpoint(tmp_path / "theirs"), tmp_path / "theirs"
    if is_copied:
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tmp_path / "theirs" / file, tokenizer / file)
    checkpoint.save_checkpoint(
        loaded.params, loaded.model, tokenizer, tmp_path / "ours", passthrough=loaded.passthrough
    )
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert auto_tokenizer("hello abc").input_ids == expected
    assert load_hf_tokenizer(tmp_path / "ours").encode("hello abc").ids == expected
