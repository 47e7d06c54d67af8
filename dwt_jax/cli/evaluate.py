"""Compute the held-out loss of a model, or its accuracy on minimal pairs."""

import argparse

from dwt_jax.cli.arguments import MODEL_HELP, path_argument
from dwt_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        type=path_argument,
        help="prepared data directory (see dwt prepare); prints loss and accuracies",
    )
    source.add_argument(
        "--pairs",
        type=_pairs_argument,
        help="folder or zip archive of minimal pairs (*.jsonl of BLiMP, *.txt of Zorro), or 'grammar' for "
        "generated pairs in words of the built-in corpus; prints the zero-shot accuracy",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="rows per batch (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--max-pairs", type=int, default=0, help="maximum pairs per paradigm, the first ones (default: all)"
    )
    parser.add_argument(
        "--pll",
        choices=("word-l2r", "original"),
        help="masking of the pseudo log-likelihood: word-l2r masks a token and the later tokens of its word, "
        "original masks the token only (default: word-l2r)",
    )
    parser.add_argument(
        "--normalize-length", action="store_true", help="divide a sentence's score by its number of tokens"
    )
    parser.add_argument(
        "--out", type=path_argument, help="JSON file of the scores; rerun the same command to resume from it"
    )


def _pairs_argument(text: str) -> str:
    path_argument(text)
    return text  # as it is: Path('./grammar') is Path('grammar')


def run(options: argparse.Namespace, _: dict[str, str]) -> None:
    """Evaluate the model and print its metrics."""
    from dwt_jax import runtime_env

    if options.data is not None:
        flags = {
            "--max-pairs": options.max_pairs,
            "--pll": options.pll,
            "--normalize-length": options.normalize_length,
            "--out": options.out,
        }
        for flag in (name for name, value in flags.items() if value):
            raise UserError(f"evaluate: {flag} is given with --data, expected it with --pairs only")
    runtime_env.set_up_env()
    if options.data is not None:
        _evaluate_data(options)
    else:
        _evaluate_pairs(options)


def _evaluate_data(options: argparse.Namespace) -> None:
    from dwt_jax.eval.evaluate_model import evaluate_model
    from dwt_jax.files import json_text
    from dwt_jax.text_format import format_float, format_with_error

    metrics = evaluate_model(options.model, options.data, options.batch_size)
    if options.json:
        print(json_text(metrics))
        return
    loss = format_with_error(metrics["held_out_loss"], metrics["standard_error"])
    print(f"held-out loss   {loss} (standard error over documents)")
    print(f"perplexity      {format_float(metrics['perplexity'], 2)}")
    if "bits_per_byte" in metrics:
        print(f"bits per byte   {format_float(metrics['bits_per_byte'], 4)}")
    elif "loss_per_byte" in metrics:
        value = format_float(metrics["loss_per_byte"], 4)
        print(f"loss per byte   {value} nats (of masked tokens, no code length)")
    else:
        print(
            "loss per byte   unknown: an earlier version of dwt prepare wrote the rows and counted no bytes"
        )
    print(f"accuracy        top-1 {metrics['top1_accuracy']:.2%}, top-5 {metrics['top5_accuracy']:.2%}")
    print(f"computed from   {metrics['predictions']:,} predictions in {metrics['documents']:,} documents")


def _evaluate_pairs(options: argparse.Namespace) -> None:
    from dwt_jax.eval.evaluate_pairs import evaluate_pairs
    from dwt_jax.eval.pair_results import format_pair_results
    from dwt_jax.eval.sentence_scores import Scoring
    from dwt_jax.files import json_text

    if options.max_pairs < 0:
        raise UserError(f"--max-pairs is {options.max_pairs}, expected at least 1, or 0 for all")
    scoring = Scoring(options.pll or "word-l2r", options.normalize_length)
    results = evaluate_pairs(
        options.model, options.pairs, scoring, options.batch_size, options.out, options.max_pairs
    )
    if options.json:
        print(json_text(results))
        return
    print(format_pair_results(results))
    print(f"unknown tokens: {results['unknown_share']:.2%}")
