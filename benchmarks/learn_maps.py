"""LiGO's maps learned at several rates and noises, from a run to sizes of configs/small_bert.py:2x128:

    python benchmarks/learn_maps.py --source=RUN [--targets 2x128 4x64 …] [--rates 1e-4 …] [--seeds 0 …]

Prints the objective on held-back batches before and after the learning; and what it cost, beside
a training step. RUN: e.g. configs/small_bert.py:2x64.
"""

import argparse
import tempfile
import time
from pathlib import Path

from dwt_jax import runtime_env

runtime_env.set_xla_env()

import jax  # noqa: E402

from dwt_jax.config import Config  # noqa: E402
from dwt_jax.config_loader import bundled_config_path, load_config  # noqa: E402
from dwt_jax.runs.load import load_model  # noqa: E402
from dwt_jax.train.ligo_training import LigoConfig, train_ligo_maps  # noqa: E402
from dwt_jax.train.run_context import RunContext  # noqa: E402
from dwt_jax.train.setup import setup_run  # noqa: E402


def student(size: str, seed: int) -> Config:
    """configs/small_bert.py:2x128 with another size, layers × hidden size."""
    layers, width = map(int, size.split("x"))
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 32,
        "intermediate_size": 4 * width,
    }
    overrides = {f"model.{key}": str(value) for key, value in sizes.items()}
    return load_config(f"{bundled_config_path('small_bert.py')}:2x128", {**overrides, "seed": str(seed)})


def prepared(config: Config) -> RunContext:
    with tempfile.TemporaryDirectory() as folder:
        return setup_run(config, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="a model or run directory")
    parser.add_argument("--targets", nargs="+", default=["2x128", "4x64", "4x128"])
    parser.add_argument("--rates", nargs="+", type=float, default=[LigoConfig.learning_rate])
    parser.add_argument("--noises", nargs="+", type=float, default=[LigoConfig.noise])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=LigoConfig.steps)
    parser.add_argument("--held-back", type=int, default=LigoConfig.validation_batches, help="batches")
    options = parser.parse_args()
    source = load_model(options.source)
    print(f"jax {jax.__version__}; {time.strftime('%Y-%m-%d', time.gmtime())}\n")
    print("| target | seed | noise | rate | before | after | s | MB | MB of a training step | FLOPs |")
    print("|---" * 10 + "|", flush=True)
    for size in options.targets:
        for seed in options.seeds:
            run = prepared(student(size, seed))
            for noise in options.noises:
                for rate in options.rates:
                    _, record = train_ligo_maps(
                        run,
                        source.params,
                        source.model,
                        seed=seed,
                        settings=LigoConfig(options.steps, rate, noise, options.validation_batches),
                    )
                    print(
                        f"| {size} | {seed} | {noise:g} | {rate:g} | {record.loss_before:.4f} "
                        f"| {record.loss_after:.4f} | {record.seconds:.1f} | {record.peak_bytes / 1e6:.1f} "
                        f"| {record.training_bytes / 1e6:.1f} | {record.flops:.3g} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
