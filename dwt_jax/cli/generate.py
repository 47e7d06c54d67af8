"""Continue texts with a causal language model."""

import argparse

from dwt_jax.cli.arguments import MODEL_HELP, int_argument, noise_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("texts", nargs="*", help="texts to continue (default: the lines of standard input)")
    parser.add_argument(
        "--max-new-tokens", type=int_argument(1), default=40, help="maximum new tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=noise_argument,
        default=0.0,
        help="sampling temperature; 0: always take the most probable token (default)",
    )
    parser.add_argument(
        "--seed", type=int_argument(0, 2**32 - 1), default=0, help="random seed (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each text")


def run(options: argparse.Namespace, _: dict[str, str]) -> None:
    """Continue the texts and print them."""
    from dwt_jax import runtime_env

    runtime_env.set_up_env()
    from dwt_jax.data.sources import read_stdin_lines
    from dwt_jax.eval.generate import continue_texts
    from dwt_jax.files import json_text

    texts = options.texts or [line for line in read_stdin_lines() if line.strip()]
    continuations = continue_texts(
        options.model,
        texts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    for text, continuation in zip(texts, continuations, strict=True):
        if options.json:
            print(json_text({"text": text, "continuation": continuation}))
        else:
            print(f"{text} …{continuation.rstrip()}")
