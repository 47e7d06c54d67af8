"""Print a masked model's most probable words for each mask of a text."""

import argparse

from dwt_jax.cli.arguments import MODEL_HELP, int_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument(
        "texts",
        nargs="*",
        help="texts with the mask token of the model's tokenizer, such as [MASK] (default: the lines of "
        "standard input)",
    )
    parser.add_argument(
        "--top-k", type=int_argument(1), default=5, help="words for each mask (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each text")


def run(options: argparse.Namespace, _: dict[str, str]) -> None:
    """Fill the masks and print the words."""
    from dwt_jax import runtime_env

    runtime_env.set_up_env()
    from dwt_jax.data.sources import read_stdin_lines
    from dwt_jax.eval.fill_mask import fill_masks
    from dwt_jax.files import json_text
    from dwt_jax.text_format import format_table

    texts = options.texts or [line for line in read_stdin_lines() if line.strip()]
    for text, masks in zip(texts, fill_masks(options.model, texts, options.top_k), strict=True):
        if options.json:
            records = [[guess._asdict() for guess in guesses] for guesses in masks]
            print(json_text({"text": text, "masks": records}))
            continue
        print(text)
        rows = [[f"  {guess.word} {guess.probability:.1%}" for guess in guesses] for guesses in masks]
        print("\n".join(format_table(list(zip(*rows, strict=True)))))
