"""The DWT step of dwt_jax beside the same step in PyTorch, interleaved in one run:

    python benchmarks/train_step.py [--sizes 4x256 …] [--precisions float32 …] [--seconds 60]
        [--checkout DIR [--no-torch]]

Same sizes (shapes.py), batch, number of masked positions and optimiser (AdamW, decay on matrices); no
dropout; a frozen teacher of fewer layers. A llama predicts the next token at all positions. dwt_jax
draws its masks and checks for non-finite updates in every step, the peer is spared both. Each variant
is a process of its own; they run one after the other, a few steps at a time, and the medians are
compared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from shapes import LENGTH, SHAPES

HERE = Path(__file__).parent


def variants(size: str, precision: str, options: argparse.Namespace) -> dict[str, list[str]]:
    common = [f"--size={size}", f"--precision={precision}"]
    torch = [options.torch_python, str(HERE / "torch_worker.py"), *common]
    found = {
        f"dwt_jax ({python})": [python, str(HERE / "jax_worker.py"), *common] for python in options.jax_python
    }
    if options.checkout:  # its worker imports its own dwt_jax, see `measure`
        worker = str(options.checkout / "benchmarks" / "jax_worker.py")
        found["dwt_jax, other checkout"] = [options.jax_python[0], worker, *common]
    if options.no_torch:
        return found
    found |= {
        "torch compiled, masked": [*torch, "--compile"],
        "torch eager, masked": torch,
    }
    if options.all_positions and SHAPES[size].predictions < LENGTH:
        found["torch compiled, all"] = [*torch, "--compile", "--head=all"]
        found["torch eager, all"] = [*torch, "--head=all"]
    return found


def measure(commands: dict[str, list[str]], seconds: float) -> dict[str, tuple[str, list[float]]]:
    """What each worker says it is, and its seconds a step, in turns."""
    workers = {}
    for name, command in commands.items():
        environment = {**os.environ, "PYTHONPATH": str(Path(command[1]).resolve().parent.parent)}
        workers[name] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
    try:
        said = {name: worker.stdout.readline().strip() for name, worker in workers.items()}
        for name, line in said.items():
            if not line.startswith("ready"):
                raise SystemExit(f"{name}: did not start; run it by hand: {' '.join(commands[name])}")
        times: dict[str, list[float]] = {name: [] for name in workers}
        start = time.monotonic()
        while time.monotonic() - start < seconds or min(map(len, times.values())) < 3:
            # Backward every second time: who follows a slow neighbour finds colder caches.
            turns = list(workers.items())[:: 1 if len(times[next(iter(times))]) % 2 else -1]
            for name, worker in turns:
                # One step unmeasured: the pages of a process that waited its turn may have been taken.
                for steps in (1, 2):
                    worker.stdin.write(f"run {steps}\n")
                    worker.stdin.flush()
                    seconds_taken = float(worker.stdout.readline())
                times[name].append(seconds_taken / steps)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return {name: (said[name].removeprefix("ready "), times[name]) for name in workers}


PEAK = """
import time, {module} as m
a = {make}
f = {product}
f(a); best = 1e9
for _ in range(8):
    t = time.perf_counter(); r = f(a); {wait}; best = min(best, time.perf_counter() - t)
print(2 * 2048**3 / best / 1e9)
"""


def peak(python: str) -> float:
    """Measured GFLOP/s of a 2048² fp32 product in jax."""
    code = PEAK.format(
        module="jax",
        make="m.numpy.ones((2048, 2048))",
        product="m.jit(lambda a: a @ a)",
        wait="r.block_until_ready()",
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return float(found.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each size and precision")
    parser.add_argument("--jax-python", nargs="+", default=[sys.executable], help="one or more to compare")
    parser.add_argument("--checkout", type=Path, help="another checkout of dwt_jax, timed beside this one")
    parser.add_argument("--no-torch", action="store_true", help="compare with the other checkout alone")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--all-positions", action="store_true", help="also with the head at all positions")
    options = parser.parse_args()
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    print(f"command: benchmarks/train_step.py {' '.join(sys.argv[1:])}; {date}")
    print(f"fp32 product of 2048²: {peak(options.jax_python[0]):.0f} GFLOP/s; {os.cpu_count()} cores\n")
    if options.no_torch and not options.checkout:
        parser.error("--no-torch needs --checkout: nothing is left to compare with")
    reference, label = ("dwt_jax, other", "other checkout") if options.no_torch else ("torch", "best torch")
    print(f"| size | precision | variant | tokens/s | GFLOP/s | ms a step (min to max) | against {label} |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in options.sizes:
        for precision in options.precisions:
            found = measure(variants(size, precision, options), options.seconds)
            medians = {name: statistics.median(times) for name, (_, times) in found.items()}
            best = min(value for name, value in medians.items() if name.startswith(reference))
            for name, (version, times) in found.items():
                label = version if name.startswith("dwt_jax") else f"{version} {name.removeprefix('torch ')}"
                label = f"**dwt_jax** on {label}" if name.startswith("dwt_jax") else label
                label += ", other checkout" if name.endswith("other checkout") else ""
                spread = f"{medians[name] * 1e3:.0f} ({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})"
                speed = SHAPES[size].rows * LENGTH / medians[name]
                work = SHAPES[size].step_flops() / medians[name] / 1e9
                print(
                    f"| {size} | {precision} | {label} | {speed:,.0f} | {work:.0f} "
                    f"| {spread} | {best / medians[name]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
