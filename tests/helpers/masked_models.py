"""Small masked models of transformers with a tokenizer that splits words, saved as directories."""

from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS
from helpers.torch_models import SMALL, torch_model

LETTERS = "abcdefgh"
WORDS = ["cab", "bed", "face", "the", "##ed", "##ad", "##gab", "a", ".", "'"]


FRAME = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|end_of_text|>", "mask": "<|mask|>"}


def framed_tokenizer(texts, vocab_size=290, **names):
    """A byte-level BPE tokenizer with a mask, whose texts begin with `bos_token` and end with `eos_token`.

    Its special tokens are those of FRAME, or `names`.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer, names = Tokenizer(models.BPE()), {**FRAME, **names}
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*dict.fromkeys(names.values())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin, end = names["bos"], names["eos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )
    names = {f"{role}_token": token for role, token in names.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_masked_model(folder, name, seed=1):
    """Save a model of the class `name` and its tokenizer in `folder`; the longest sentence is 11 tokens.

    WordPiece knows the letters a to h and some words, byte-level BPE all texts. A EuroBERT's has its frame.
    """
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir()
    if name.startswith("EuroBert"):
        tokenizer = framed_tokenizer(["the cab faded . a bed , a cab !"] * 9)
    elif name.startswith("Roberta"):
        trained = ByteLevelBPETokenizer()
        special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trained.train_from_iterator(
            ["the cab faded . a bed , a cab !"] * 9, 290, special_tokens=special_tokens
        )
        trained.save_model(str(folder))
        tokenizer = transformers.RobertaTokenizer.from_pretrained(folder)
    else:
        pieces = [*LETTERS, *(f"##{x}" for x in LETTERS)]
        tokens = [*WORDPIECE_TOKENS, *dict.fromkeys([*pieces, *WORDS])]
        (folder / "vocab.txt").write_text("\n".join(tokens))
        tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    model = torch_model(name, {**SMALL, "vocab": len(tokenizer)}, seed)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that predictions depend on the other tokens by more than rounding
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
