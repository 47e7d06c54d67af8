"""Small masked models of transformers with a tokenizer that splits words, saved as directories."""

from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS
from helpers.torch_models import SMALL, torch_model

LETTERS = "abcdefgh"
WORDS = ["cab", "bed", "face", "the", "##ed", "##ad", "##gab", "a", ".", "'"]


def save_masked_model(folder, name, seed=1):
    """Save a model of the class `name` and its tokenizer in `folder`; the longest sentence is 11 tokens.

    WordPiece knows the letters a to h and some words, byte-level BPE all texts.
    """
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir()
    if name.startswith("Roberta"):
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
