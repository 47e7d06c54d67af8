"""The tokenizer template of the rows on which a decoder classifies texts."""

from pathlib import Path

from dwt_jax.data.hf_tokenizer import LoadedTokenizer, read_tokenizer
from dwt_jax.data.tokenizer import load_vocabulary

PAD_TOKENS = ("<|pad|>", "<|padding|>")
"""Names of a padding token that is added: the first that is not the end token's."""


def read_decoder_tokenizer(path: Path) -> tuple[LoadedTokenizer, int]:
    """Load a decoder's tokenizer with a template of rows that end in its end token, and a padding token.

    A text is `begin a end`, and a pair `begin a end b end` (Radford et al. 2018, figure 1, with the end token
    as delimiter too), where begin and end are the tokens around a text in pre-training. The tokenizer's own
    template often has no end, and joins the texts of a pair without a boundary.

    Args:
        path: directory of the tokenizer.

    Returns:
        (tokenizer, id of its padding token, which is not its end token and may be new)

    Raises:
        UserError: as `load_vocabulary` does.
    """
    from tokenizers import processors

    loaded, vocab = read_tokenizer(path), load_vocabulary(path)
    tokenizer = loaded.tokenizer
    ends = {"begin": vocab.cls_id, "end": vocab.sep_id}
    # A template divides names of tokens at spaces and colons: it gets names of its own.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="begin $A end",
        pair="begin $A end $B end",
        special_tokens=[{"id": name, "ids": [i], "tokens": [vocab.tokens[i]]} for name, i in ends.items()],
    )
    # transformers reads a row at its last token that is not padding, so the end token cannot be padding. Any
    # other special token can: no row ends with it. One that is not special would be looked for in texts
    # before the vocabulary once it is the padding, and give other ids.
    added = tokenizer.get_added_tokens_decoder()
    usable = {i for i, token in added.items() if token.special} - {vocab.sep_id}
    names = [vocab.tokens[i] for i in (vocab.pad_id, vocab.unk_id, vocab.cls_id) if i in usable]
    new_token = next(token for token in PAD_TOKENS if token != vocab.tokens[vocab.sep_id])
    pad_token = (*names, new_token)[0]
    tokenizer.add_special_tokens([pad_token])
    loaded = loaded._replace(special_tokens={**loaded.special_tokens, "pad_token": pad_token})
    return loaded, tokenizer.get_vocab(with_added_tokens=True)[pad_token]
