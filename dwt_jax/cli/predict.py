"""Predict the class or the number of each text with a fine-tuned model."""

import argparse

from dwt_jax.cli.arguments import int_argument, path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--model",
        required=True,
        help="directory of a task that dwt finetune wrote, or a model directory with a classification head",
    )
    parser.add_argument(
        "texts",
        nargs="?",
        type=path_argument,
        help="file with an example per line (a pair: two texts separated by a tab), or a table with a header "
        "in a .tsv, .csv or .jsonl file ('-': standard input, the default)",
    )
    parser.add_argument(
        "--format",
        choices=("lines", "tsv", "csv", "jsonl"),
        help="format of the file (default: from its suffix)",
    )
    parser.add_argument("--text-column", default="", help="column of the text (default: the task's)")
    parser.add_argument(
        "--text-pair-column", default="", help="column of a pair's second text (default: the task's)"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="add the probability of each class, in columns p(CLASS)"
    )
    parser.add_argument("--json", action="store_true", help="write JSON lines instead of TSV")
    parser.add_argument("--out", type=path_argument, help="file to write (default: standard output)")
    parser.add_argument(
        "--batch-size", type=int_argument(1), default=64, help="texts per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=int_argument(3),
        default=0,
        help="maximum tokens of a text; longer texts are truncated (default: the model's maximum)",
    )


def run(options: argparse.Namespace, _: dict[str, str]) -> None:
    """Predict and write the predictions."""
    from dwt_jax import runtime_env

    runtime_env.set_up_env()
    from dwt_jax.finetune.predict import STDIN, Texts, predict

    predict(
        options.model,
        Texts(options.texts or STDIN, options.format, options.text_column, options.text_pair_column),
        options.out,
        probabilities=options.probabilities,
        as_json=options.json,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )
