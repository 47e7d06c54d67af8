"""Bits per byte of next tokens against torch on the raw text, and the loss per byte of masked tokens."""

import json
import random

import jax
import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.config import Mesh, Source, Tokenizer
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.eval import likelihood
from dwt_jax.eval.evaluate_model import evaluate_model
from dwt_jax.models import bert, llama
from helpers.decoders import save_decoder_tokenizer
from helpers.prepared_data import data_config, hash_fraction

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["café", "naïve", "Größe", "три", "кота", "天气", "公园", "a", "cup", "of", "tea", "🙂", "€"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(source, its held-out lines): each line is a document of one sentence."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) + "." for _ in range(80)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    held_out = [line for line in lines if hash_fraction(line) < 0.2]
    return Source(kind="text", path=str(path), documents="lines"), held_out


def prepare_rows(corpus, folder, tokenizer):
    data = data_config(folder, corpus[0], tokenizer=tokenizer, sequence_length=64, row_mode="packed")
    prepare_data(data, folder / "rows", workers=1)
    return folder / "rows"


@pytest.fixture(scope="module", params=["gpt2", "qwen2", "llama"])
def decoder(request, corpus, tmp_path_factory):
    """A folder with `model` as transformers writes it, and `rows`."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = save_decoder_tokenizer(folder / "model", request.param, corpus[0].path)
    torch.manual_seed(0)
    size = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    config = transformers.LlamaConfig(vocab_size=size, initializer_range=0.5, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(tokenizer)
    prepare_rows(corpus, folder, Tokenizer(path=str(tokenizer)))
    return folder


def test_bits_per_byte_are_those_of_torch_on_the_raw_text(decoder, corpus):
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder / "model")
    bits = num_tokens = 0
    for line in corpus[1]:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        text_ids = tokenizer(line, add_special_tokens=False).input_ids
        ids = torch.tensor([[start, *text_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        bits -= log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item() / np.log(2)
        num_tokens += len(text_ids)
    num_bytes = sum(len(line.encode()) for line in corpus[1])
    metrics = evaluate_model(str(decoder / "model"), decoder / "rows", 64)
    assert metrics["predictions"] == num_tokens + len(corpus[1])
    assert metrics["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)
    assert "loss_per_byte" not in metrics


def test_all_tokens_equally_probable(decoder, corpus):
    """log₂ V bits for each token and each end."""
    rows, size = decoder / "rows", len(load_vocabulary(decoder / "rows" / "tokenizer"))
    model = llama.Config(model_type="llama", vocab_size=size, num_key_value_heads=2, **SIZES)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), llama.abstract_params(model))
    metrics = likelihood.summarize_losses(
        likelihood.losses_per_document(params, model, rows, mesh=make_mesh(Mesh(), 1))
    )
    encode = load_hf_tokenizer(rows / "tokenizer").encode
    num_predictions = sum(len(encode(line, add_special_tokens=False).ids) + 1 for line in corpus[1])
    expected = np.log2(size) * num_predictions / sum(len(line.encode()) for line in corpus[1])
    found = likelihood.losses_per_byte(metrics, model.objective, rows)
    assert found == {"bits_per_byte": pytest.approx(expected, rel=1e-6)}


def test_masked_tokens_have_no_bits_per_byte(corpus, tmp_path):
    """Where all tokens are equally probable: the loss of as many tokens as the text has, in nats a byte."""
    rows = prepare_rows(corpus, tmp_path, Tokenizer(vocab_size=200, lowercase=False))
    size = len(load_vocabulary(rows / "tokenizer"))
    model = bert.Config(vocab_size=size, **SIZES)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), bert.abstract_params(model))
    metrics = likelihood.summarize_losses(
        likelihood.losses_per_document(params, model, rows, mesh=make_mesh(Mesh(), 1))
    )
    encode = load_hf_tokenizer(rows / "tokenizer").encode
    num_tokens = sum(len(encode(line, add_special_tokens=False).ids) for line in corpus[1])
    expected = np.log(size) * num_tokens / sum(len(line.encode()) for line in corpus[1])
    found = likelihood.losses_per_byte(metrics, model.objective, rows)
    assert found == {"loss_per_byte": pytest.approx(expected, rel=1e-6)}


def test_rows_of_an_earlier_version_have_no_count(decoder, capsys):
    """They are evaluated all the same."""
    command = ["evaluate", f"--model={decoder / 'model'}", f"--data={decoder / 'rows'}"]
    assert main(command) == 0
    new = capsys.readouterr().out
    path = decoder / "rows" / "index.json"
    text = path.read_text()
    index = json.loads(text)
    for totals in index["splits"].values():
        del totals["text_bytes"]
    try:
        path.write_text(json.dumps(index))
        assert main(command) == 0
    finally:
        path.write_text(text)
    old = capsys.readouterr().out
    unknown = "loss per byte   unknown: an earlier version of dwt prepare wrote the rows and counted no bytes"
    assert unknown in old
    assert "bits per byte   " in new
    differing = [pair for pair in zip(old.splitlines(), new.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [line for line, _ in differing] == [unknown]
