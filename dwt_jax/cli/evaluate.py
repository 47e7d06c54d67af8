"""Compute the held-out masked-LM loss, perplexity and accuracy of a model."""

import argparse

from dwt_jax.cli.arguments import MODEL_HELP, path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument(
        "--data", type=path_argument, required=True, help="prepared data directory (see dwt prepare)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="rows per batch (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace, _: dict[str, str]) -> None:
    """Evaluate the model and print its metrics."""
    from dwt_jax import runtime_env

    runtime_env.set_xla_env()
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
    print(f"accuracy        top-1 {metrics['top1_accuracy']:.2%}, top-5 {metrics['top5_accuracy']:.2%}")
    print(f"computed from   {metrics['predictions']:,} predictions in {metrics['documents']:,} documents")
