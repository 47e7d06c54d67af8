"""Decoders that classify: the rows of their texts, the padding, and the predictions of transformers."""

import json
import random

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.data.hf_tokenizer import read_tokenizer
from dwt_jax.data.text_template import PAD_TOKENS, read_decoder_tokenizer
from dwt_jax.data.tokenizer import copy_tokenizer, save_tokenizer
from dwt_jax.distributed.shutdown import ShutdownFlag
from dwt_jax.errors import UserError
from dwt_jax.finetune import predict as predictions
from dwt_jax.finetune import run as runs
from dwt_jax.finetune.collate import encode_texts
from dwt_jax.finetune.datasets import ExampleSplit
from dwt_jax.models.tokenizer_defaults import build_wordpiece_tokenizer
from helpers.decoders import KINDS, save_decoder_tokenizer
from helpers.finetuning import VOCAB, config_of
from helpers.glue import GLUE_FILES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["the", "old", "cat", "sees", "a", "quick", "dog", "and", "hears", "green", "bird"]
TEXTS = [
    "the cat sees the dog",
    "",
    "a dog",
    "the quick old dog hears a green bird",
    "dog " * 20,
    " cat %%\n",
]
PAIRS = ["", "the dog sees the cat", "cat " * 20, "a", "a bird and the cat", "the % bird %"]
CLASSES = {"llama": "Llama", "gpt2": "Mistral", "qwen2": "Qwen3"}
PADDING = {"llama": "<unk>", "gpt2": PAD_TOKENS[0], "qwen2": "<|endoftext|>"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A decoder with random weights of each kind of tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=9)) for _ in range(200)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    for kind in KINDS:
        save_decoder_tokenizer(folder / kind, kind, folder / "corpus.txt")
        size = len(transformers.AutoTokenizer.from_pretrained(folder / kind))
        save_decoder(folder / kind, CLASSES[kind], size)
    return folder


def save_decoder(path, class_prefix, vocab_size, head="CausalLM", **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 40}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **options}
    config = getattr(transformers, f"{class_prefix}Config")(
        vocab_size=vocab_size, initializer_range=0.2, **sizes, **ids
    )
    getattr(transformers, f"{class_prefix}For{head}")(config).save_pretrained(path)


def write_order_task(folder, kind="classes"):
    """Write a task on the order of 'cat' and 'dog' in a text, or of the texts of a pair, one in each."""
    draw = random.Random(1)
    folder.mkdir(parents=True)
    lines = ["sentence\tother\tlabel"]
    for _ in range(96):
        is_first = draw.random() < 0.5
        animals = ["cat", "dog"] if is_first else ["dog", "cat"]
        texts = [" ".join([*draw.choices(WORDS[:2], k=draw.randint(0, 3)), animal]) for animal in animals]
        label = f"{2.0 * is_first - 1}" if kind == "numbers" else ("cat" if is_first else "dog")
        lines.append("\t".join([*(texts if kind == "pairs" else [" ".join(texts), ""]), label]))
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    paths = {name: str(folder / f"{name}.tsv") for name in ("train", "dev")}
    pair = {"text_pair_column": "other"} if kind == "pairs" else {}
    return {"kind": "files", "task": folder.name, **paths, **pair, "regression": kind == "numbers"}


def finetune(model, workdir, examples, **recipe):
    workdir.mkdir(parents=True, exist_ok=True)
    config = config_of(examples, **{"epochs": 8, "max_length": 32, **recipe})
    context = runs.prepare_finetuning(config, runs.load_source_model(str(model)), workdir)
    return runs.finetune_task(context, ShutdownFlag())


@pytest.fixture(scope="module")
def finetuned(models, tmp_path_factory):
    """{kind of tokenizer: (directory of a fine-tuning, its results)}: of classes, numbers and pairs"""
    folder = tmp_path_factory.mktemp("finetuned")
    return {
        kind: (
            folder / kind,
            finetune(models / kind, folder / kind, write_order_task(folder / "data" / task, task)),
        )
        for kind, task in zip(KINDS, ("classes", "numbers", "pairs"), strict=True)
    }


def columns_of(pairs):
    return (TEXTS, PAIRS) if pairs else (TEXTS,)


def split_of(pairs):
    return ExampleSplit(TEXTS, PAIRS if pairs else None, None, [*map(str, range(len(TEXTS)))])


def rows_of(encoded):
    return [part.tolist() for part in np.split(encoded.tokens, encoded.offsets[1:-1])]


def torch_logits(path, pairs, side="right", batched=True):
    """Logits of the directory alone: of a padded batch, or of one example at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side=side)
    examples = [*zip(*columns_of(pairs), strict=True)]
    logits = []
    for batch in [examples] if batched else [[example] for example in examples]:
        rows = tokenizer(*map(list, zip(*batch, strict=True)), padding=True, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**rows).logits.numpy())
    return np.concatenate(logits)


def dwt_logits(path, pairs):
    classifier = predictions.load_classifier(str(path))
    return np.concatenate(list(predictions.predict_texts(classifier, split_of(pairs), batch_size=4)))


# Rows


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_token_is_behind_each_text(models, tmp_path, kind, pairs):
    before = transformers.AutoTokenizer.from_pretrained(models / kind)
    begin = before.eos_token_id if before.bos_token_id is None else before.bos_token_id
    loaded, pad_id = read_decoder_tokenizer(models / kind)
    copy_tokenizer(loaded, tmp_path / "copy")
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    expected = []
    for example in zip(*columns_of(pairs), strict=True):
        expected.append([begin])
        for text in example:
            expected[-1] += [*before(text, add_special_tokens=False).input_ids, before.eos_token_id]
    for tokenizer in (loaded, read_tokenizer(tmp_path / "copy")):
        encoded, num_truncated = encode_texts(split_of(pairs), tokenizer, 100)
        assert (rows_of(encoded), num_truncated) == (expected, 0)
    assert after(*columns_of(pairs)).input_ids == expected
    assert (after.pad_token, after.pad_token_id) == (PADDING[kind], pad_id)
    assert pad_id != after.eos_token_id


@pytest.mark.parametrize("pairs", [False, True])
def test_the_rows_of_wordpiece_stay_what_they_are(tmp_path, pairs):
    """A decoder that was pre-trained on a masked model's tokenizer."""
    tokenizer = build_wordpiece_tokenizer({token: i for i, token in enumerate(VOCAB)})
    save_tokenizer(tokenizer, tmp_path / "in", lowercase=True)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    loaded, pad_id = read_decoder_tokenizer(tmp_path / "in")
    encoded, _ = encode_texts(split_of(pairs), loaded, 200)
    assert rows_of(encoded) == auto(*columns_of(pairs)).input_ids
    assert pad_id == auto.pad_token_id


def test_the_padding_token_is_not_the_end_token_whatever_that_is_called(tmp_path):
    tokenizer = build_wordpiece_tokenizer({token: i for i, token in enumerate([*VOCAB, *PAD_TOKENS[:1]])})
    tokenizer.add_special_tokens([*PAD_TOKENS[:1]])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=PAD_TOKENS[0])
    fast.save_pretrained(tmp_path)
    loaded, pad_id = read_decoder_tokenizer(tmp_path)
    encoded, _ = encode_texts(split_of(False), loaded, 100)
    assert {row[-1] for row in rows_of(encoded)} == {fast.eos_token_id} != {pad_id}
    assert loaded.tokenizer.id_to_token(pad_id) == PAD_TOKENS[1]


def test_an_added_word_that_is_named_as_padding_stays_a_word(tmp_path):
    tokenizer = build_wordpiece_tokenizer({token: i for i, token in enumerate(VOCAB)})
    tokenizer.add_tokens(["good"])
    save_tokenizer(tokenizer, tmp_path / "in", lowercase=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[SEP]", "pad_token": "good"}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded, pad_id = read_decoder_tokenizer(tmp_path / "in")
    assert loaded.tokenizer.id_to_token(pad_id) == PAD_TOKENS[0]
    copy_tokenizer(loaded, tmp_path / "copy")
    assert read_tokenizer(tmp_path / "copy").special_tokens["pad_token"] == PAD_TOKENS[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pairs", [False, True])
def test_truncated_rows_have_their_ends(models, tmp_path, side, pairs):
    loaded, _ = read_decoder_tokenizer(models / "llama")
    loaded.source.config.update(truncation_side=side, add_bos_token=True, add_eos_token=False)
    copy_tokenizer(loaded, tmp_path / "copy")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    encoded, num_truncated = encode_texts(split_of(pairs), loaded, 9)
    rows = rows_of(encoded)
    assert rows == auto(*columns_of(pairs), truncation=True, max_length=9).input_ids
    assert num_truncated == sum(len(ids) > 9 for ids in auto(*columns_of(pairs)).input_ids) > 0
    ends = [(ids[0], ids.count(auto.eos_token_id), ids[-1]) for ids in rows]
    assert ends == [(auto.bos_token_id, 1 + pairs, auto.eos_token_id)] * len(TEXTS)


def test_fewer_tokens_than_the_template_has_are_refused(models):
    """tokenizers would not cut at all then."""
    loaded, _ = read_decoder_tokenizer(models / "llama")
    rows = rows_of(encode_texts(split_of(True), loaded, 3)[0])
    assert {tuple(row) for row in rows} == {(1, 2, 2)}
    with pytest.raises(UserError, match=r"cannot cut an example of \d+ tokens to 2, expected room for the"):
        encode_texts(split_of(True), loaded, 2)


# Fine-tuning


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_learns_the_order_of_words(finetuned, kind):
    workdir, results = finetuned[kind]
    assert results["best"]["mean"] > 0.9
    card = (workdir / "model" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert f"{CLASSES[kind]}ForSequenceClassification" in card


@pytest.mark.parametrize("kind", KINDS)
def test_the_directory_alone_gives_the_predictions(finetuned, tmp_path, kind):
    """In padded batches, padded on either side, and of single texts; after an export too."""
    workdir, _ = finetuned[kind]
    assert main(["export", f"--model={workdir}", f"--out={tmp_path / 'exported'}"]) == 0
    for pairs in (False, True):
        expected = dwt_logits(workdir, pairs)
        for path in (workdir / "model", tmp_path / "exported"):
            np.testing.assert_allclose(torch_logits(path, pairs), expected, atol=1e-4)
        for options in ({"side": "left"}, {"batched": False}):
            np.testing.assert_allclose(torch_logits(workdir / "model", pairs, **options), expected, atol=1e-4)


def test_more_seeds_and_a_second_fine_tuning(models, finetuned, tmp_path):
    """A seed that is added, with dropout, is that of a run of both. A padding token is added once."""
    examples = write_order_task(tmp_path / "task")
    recipe = {"epochs": 1, "dropout": 0.2}
    finetune(models / "llama", tmp_path / "more", examples, seeds=[0], **recipe)
    more = finetune(models / "llama", tmp_path / "more", examples, seeds=[0, 1], **recipe)
    both = finetune(models / "llama", tmp_path / "both", examples, seeds=[0, 1], **recipe)
    assert more["seeds"] == both["seeds"]
    losses = [seed["history"][0]["train_loss"] for seed in both["seeds"].values()]
    without = finetune(models / "llama", tmp_path / "without", examples, seeds=[0], epochs=1)
    assert len({*losses, without["seeds"]["0"]["history"][0]["train_loss"]}) == 3
    workdir, _ = finetuned["gpt2"]
    finetune(workdir, tmp_path / "again", examples, epochs=1)
    size = len(transformers.AutoTokenizer.from_pretrained(models / "gpt2"))
    for path in (workdir, tmp_path / "again"):
        config = json.loads((path / "model" / "config.json").read_text())
        assert (config["vocab_size"], config["pad_token_id"]) == (size + 1, size)


def test_a_padding_token_beyond_a_full_table(tmp_path):
    """256 tokens, to which rows are padded, and the end is the only special one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*WORDS, *(f"w{i}" for i in range(256 - len(WORDS) - 1)), "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "<end>", "pad_token": "<end>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(tmp_path / "in")
    save_decoder(tmp_path / "in", "Llama", 256)
    finetune(tmp_path / "in", tmp_path / "w", write_order_task(tmp_path / "task"), epochs=1)
    config = json.loads((tmp_path / "w" / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"], config["eos_token_id"]) == (257, 256, 255)
    for pairs in (False, True):
        logits = dwt_logits(tmp_path / "w", pairs)
        np.testing.assert_allclose(torch_logits(tmp_path / "w" / "model", pairs), logits, atol=1e-4)


def test_the_recipes_of_glue_take_a_decoder(models, tmp_path, capsys):
    for name, files in GLUE_FILES.items():
        (tmp_path / "glue" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "glue" / name / file).write_bytes(text.encode())
    arguments = ["finetune", "--task=mnli,stsb", f"--model={models / 'gpt2'}", f"--workdir={tmp_path / 'w'}"]
    arguments += ["--config.examples.kind=glue", f"--config.examples.path={tmp_path / 'glue'}"]
    assert main([*arguments, "--config.recipe.epochs=1", "--config.recipe.seeds=[0]"]) == 0
    assert "average over mnli, stsb" in capsys.readouterr().out
    assert (tmp_path / "w" / "submission" / "MNLI-mm.tsv").exists()


# Classifiers of others


@pytest.mark.parametrize("pad", ["</s>", "<unk>"])
def test_a_directory_of_others_is_read_as_transformers_does(models, tmp_path, pad):
    """Its own template, and at its last token that is not padding, at times not the last one."""
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    if pad == "<unk>":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    options = {"pad_token_id": tokenizer.pad_token_id, "num_labels": 3}
    save_decoder(tmp_path, "Llama", len(tokenizer), "SequenceClassification", **options)
    for pairs in (False, True):
        np.testing.assert_allclose(dwt_logits(tmp_path, pairs), torch_logits(tmp_path, pairs), atol=1e-4)


def test_a_text_without_a_token_is_refused(models, tmp_path):
    copy_tokenizer(models / "qwen2", tmp_path)
    save_decoder(tmp_path, "Qwen2", 320, "SequenceClassification", num_labels=2)
    with pytest.raises(UserError, match="gives no token to an empty text, expected a tokenizer that adds"):
        dwt_logits(tmp_path, False)
