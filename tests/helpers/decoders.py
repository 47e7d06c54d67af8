"""Tokenizers as decoders have them, trained on the spot."""

from pathlib import Path

TEXT = "The old cat sees the quick dog. A child hears the green bird!"
KINDS = ("gpt2", "llama", "qwen2")


def save_decoder_tokenizer(folder: Path, kind: str, corpus: Path) -> Path:
    """Save a tokenizer of `kind` in `folder`.

    gpt2: byte-level, one token begins and ends a text. llama: metaspace BPE with <s>, </s> and <unk>, no
    padding. qwen2: byte-level, no token at the beginning, another one for the padding.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "llama":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
        special, names = ["<unk>", "<s>", "</s>"], {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
        alphabet = []
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        end = "<|endoftext|>"
        special, names = [end], {"bos": end, "eos": end}
        if kind == "qwen2":
            special, names = [end, "<|im_end|>"], {"eos": "<|im_end|>", "pad": end}
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train([str(corpus)], trainer)
    names = {f"{role}_token": token for role, token in names.items()}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
