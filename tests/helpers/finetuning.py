"""Small checkpoints of every family with tokenizers, and a task that can be learned."""

import json
import random

from dwt_jax.config_loader import build_dataclass
from dwt_jax.finetune.config import FinetuneConfig, check_finetune_config
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS, build_wordpiece_tokenizer
from helpers.masked_models import framed_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = [
    *WORDPIECE_TOKENS,
    *LETTERS,
    *(f"##{c}" for c in LETTERS),
    "good",
    "bad",
    "film",
    "the",
    ".",
]
FAMILIES = ("Bert", "DistilBert", "Roberta", "ModernBert", "EuroBert")


def checkpoint(name, path, seed=0, **options):
    """Write a transformers model with random weights, e.g. BertForMaskedLM, and its tokenizer to `path`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    family = next(family for family in FAMILIES if name.startswith(family))
    path.mkdir(parents=True)
    if family == "Roberta":
        size = _byte_level(path)
    elif family == "EuroBert":
        # torch does not train the embedding of the padding token: here it is not that of the end.
        tokenizer = framed_tokenizer(["a good film", "a bad film"] * 9, 280, pad="<|pad|>")
        tokenizer.save_pretrained(path)
        size = len(tokenizer)
    else:
        size = len(VOCAB)
        (path / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
        specials = {f"{role}_token": token for role, token in WORDPIECE_TOKENS._asdict().items()}
        tokenizer_config = {"tokenizer_class": "BertTokenizer", **specials}
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        if family == "ModernBert":  # transformers reads nothing but a tokenizer.json beside one
            build_wordpiece_tokenizer({token: i for i, token in enumerate(VOCAB)}).save(
                str(path / "tokenizer.json")
            )
    sizes = {"vocab_size": size, "max_position_embeddings": 26, "pad_token_id": int(family == "Roberta")}
    if family == "DistilBert":
        sizes |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    elif family == "ModernBert":
        sizes |= {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
        sizes |= {"global_attn_every_n_layers": 2, "local_attention": 8, "classifier_pooling": "mean"}
    elif family == "EuroBert":
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 2}
    else:
        width = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        sizes |= width | {"type_vocab_size": 1 if family == "Roberta" else 2}
    config = getattr(transformers, f"{family}Config")(**sizes, initializer_range=0.2, **options)
    model = getattr(transformers, name)(config)
    model.save_pretrained(path)
    return model


def _byte_level(path):
    from tokenizers import ByteLevelBPETokenizer

    tokenizer_ = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer_.train_from_iterator(
        ["a good film", "a bad film"] * 9, vocab_size=280, special_tokens=specials, show_progress=False
    )
    tokenizer_.save_model(str(path))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    return tokenizer_.get_vocab_size()


def write_task(folder, numbers=False, pairs=False, train=44, dev=20, seed=0):
    """Write the files of a task, whether a text contains 'good'; return its `examples` config."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("dev", dev), ("test", 5)):
        lines = ["index\tsentence\tother\tlabel"]
        for i in range(count):
            good = draw.random() < 0.5
            tokens = [draw.choice(LETTERS[:8]) for _ in range(draw.randint(1, 12))]
            tokens.insert(draw.randint(0, len(tokens)), "good" if good else "bad")
            label = f"{4 * good + draw.random():.2f}" if numbers else ("yes" if good else "no")
            lines.append(f"{i}\t{' '.join(tokens)}\tthe film {draw.choice(LETTERS)}\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    paths = {name: str(folder / f"{name}.tsv") for name in ("train", "dev", "test")}
    return {
        "kind": "files",
        "task": folder.name,
        **paths,
        "text_pair_column": "other" if pairs else "",
        "regression": numbers,
    }


def config_of(examples, **recipe) -> FinetuneConfig:
    """Return a small config without dropout, with a learning rate for small models."""
    usual = {"epochs": 2, "batch_size": 8, "max_length": 20, "buckets": 1, "dropout": 0.0, "seeds": [0]}
    rate = {"learning_rate": {"kind": "linear", "value": 1e-2, "warmup_fraction": 0.2}, "eps": 1e-6}
    return check_finetune_config(
        build_dataclass(
            FinetuneConfig, {"examples": examples, "recipe": {**usual, "optimizer": rate, **recipe}}
        )
    )
