"""The commands of docs/model_families.md, run as they stand there."""

import json
import re
import shlex

import numpy as np
import pytest

from helpers.decoders import save_decoder_tokenizer
from helpers.paths import ROOT
from helpers.runs import dwt, write_corpus

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PAGE = (ROOT / "docs" / "model_families.md").read_text()


@pytest.mark.slow
def test_commands_from_a_small_decoder_to_a_larger_one(tmp_path):
    from dwt_jax.data.dataset import num_rows, open_dataset, read_rows

    write_corpus(tmp_path / "corpus.txt")
    tokenizer = save_decoder_tokenizer(tmp_path / "small", "qwen2", tmp_path / "corpus.txt")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(transformers.AutoTokenizer.from_pretrained(tokenizer)),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    small = transformers.Qwen3ForCausalLM(config).eval()
    small.save_pretrained(tmp_path / "small")
    source = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert source
    (tmp_path / "large.py").write_text(source.group(1))
    prepare = re.search(r"`dwt (prepare[^`]*)`", PAGE)
    assert prepare
    block = re.search(r"```\n(dwt remap.*?)```", PAGE, re.DOTALL)
    assert block
    lines = [f"dwt {prepare.group(1)}", *block.group(1).replace("\\\n", " ").strip().splitlines()]
    output = {}
    for name, command, *arguments in map(shlex.split, lines):
        assert name == "dwt"
        done = dwt(command, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        output[command] = done.stdout
    ids = torch.tensor([[5, 9, 20, 31, 7]])
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown").eval()
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, small(ids).logits, atol=1e-4, rtol=0)
    large = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "large").eval()
    rows, total, count = open_dataset(tmp_path / "rows", "held_out"), 0.0, 0
    for row in range(num_rows(rows)):
        batch = read_rows(rows, np.array([row]))
        tokens, segments = np.asarray(batch.tokens)[0], np.asarray(batch.segment_ids)[0]
        for segment in range(1, segments.max() + 1):
            ids = torch.tensor(tokens[segments == segment].astype(np.int64))[None]
            with torch.no_grad():
                total += large(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    summary = json.loads((tmp_path / "runs" / "large" / "summary.json").read_text())
    assert summary["held_out"]["held_out_loss"] == pytest.approx(total / count, abs=1e-4)
    assert summary["held_out"]["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    assert f"{summary['held_out']['held_out_loss']:.4f}" in output["evaluate"]
    assert output["generate"].startswith("The old …")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_old_teacher_for_a_new_student(tmp_path, kind):
    """configs/generations.py with a small BERT of transformers, and a small Llama."""
    write_corpus(tmp_path / "corpus.txt")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
    }
    if kind == "decoder":
        save_decoder_tokenizer(tmp_path / "old", "qwen2", tmp_path / "corpus.txt")
        size = len(transformers.AutoTokenizer.from_pretrained(tmp_path / "old"))
        old = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=size, **sizes))
    else:
        (tmp_path / "old").mkdir()
        words = sorted(set(re.findall(r"\w+|\.", (tmp_path / "corpus.txt").read_text().lower())))
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        (tmp_path / "old" / "vocab.txt").write_text("\n".join(vocab))
        old = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(vocab), **sizes))
    old.save_pretrained(tmp_path / "old")
    source = json.dumps([{"kind": "text", "path": str(tmp_path / "corpus.txt"), "documents": "lines"}])
    changes = {
        "teacher.path": tmp_path / "old",
        "data.tokenizer.path": tmp_path / "old",
        "data.sources": source,
        "data.validation_fraction": 0.2,
        "model.num_hidden_layers": 2,
        "model.hidden_size": 48,
        "model.num_attention_heads": 6,
        "train.steps": 8,
        "train.log_every": 1,
        **({"model.head_dim": 8} if kind == "decoder" else {}),
    }
    extra = [f"--config.{key}={value}" for key, value in changes.items()]
    config = f"--config={ROOT / 'configs' / 'generations.py'}:{kind}"
    done = dwt("train", config, *extra, f"--workdir={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["soft_loss"] > 0
    assert records[-1]["alpha_soft"] == 0
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["teacher_steps"] == 2
    auto = transformers.AutoModelForMaskedLM if kind == "encoder" else transformers.AutoModelForCausalLM
    _, info = auto.from_pretrained(tmp_path / "new" / "model", output_loading_info=True)
    assert not any(info.values()), info
