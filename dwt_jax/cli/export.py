"""Export a run or a model as a Hugging Face model directory."""

import argparse

from dwt_jax.cli.arguments import MODEL_HELP, STEP_HELP, path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--out", type=path_argument, required=True, help="new model directory")
    parser.add_argument("--step", type=int, help=STEP_HELP)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="dtype of the saved weights; auto: as stored, float32 for a run (default: %(default)s)",
    )
    parser.add_argument("--encoder-only", action="store_true", help="omit the heads, for AutoModel")


def run(options: argparse.Namespace, _: dict[str, str]) -> None:
    """Write the model directory."""
    from dwt_jax import runtime_env

    runtime_env.set_up_env()
    from dwt_jax.runs.export import export_model

    name = export_model(options.model, options.step, options.out, options.dtype, options.encoder_only)
    print(f"{name} in {options.out}")
