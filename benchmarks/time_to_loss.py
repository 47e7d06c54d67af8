"""How long do trainers take to a held-out loss?

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/time_to_loss.py --out benchmarks/results/time_to_loss
    python benchmarks/time_to_loss.py --size medium --text data/wikipedia-2015.txt.xz --out …

Every variant trains a model of about the same number of parameters (demo 0.7M, wiki 3.4M, medium 5.3M) on
the same rows of the built-in corpus (wiki, medium: of --text) and is evaluated with the same masks on the
same held-out rows. Each is a process of its own; they take turns, a few steps at a time, and only a variant's
own steps count: no evaluation, checkpoint or log of any of them. The time of the first steps, in which
programs are compiled, stands in a column of its own. FLOPs are not compared: torch's variants compute others.

run_mlm         transformers' Trainer as its run_mlm sets it up: BERT, fp32, AdamW, head at all positions
torch BERT      the same BERT: torch.compile, head at the masked positions, fused AdamW
torch recipe    transformers' ModernBERT with Muon, 40 % masks, torch.compile, head at the masked positions
BERT, recipe    configs/small_bert.py and configs/modernbert.py
recipe + weak   the latter with a weak teacher, α_s from 4 to 0 over half the run

--precision is that of products; auto is bf16 on CPUs that have it (amx_bf16, avx512_bf16), else fp32.
Trainer stays at fp32, its default. All have linear learning rates with 5 % warm-up. BERT's is 3e-3, far
better at this size than run_mlm's 5e-5.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SIZES = {  # layers, width, heads, MLP of BERT and of ModernBERT, tokens a row, vocabulary, steps, teacher
    "demo": {"student": "2x128", "teacher": "1x128", "length": 64, "vocab_size": 2048, "steps": 900},
    "wiki": {"student": "4x192", "teacher": "2x192", "length": 128, "vocab_size": 8192, "steps": 2000},
    "medium": {"student": "4x256", "teacher": "2x256", "length": 128, "vocab_size": 8192, "steps": 1000},
}
TORCH, JAX = "time_to_loss_torch.py", "time_to_loss_jax.py"
VARIANTS = {  # label: worker, variant
    "run_mlm": (TORCH, "run_mlm"),
    "torch BERT": (TORCH, "bert"),
    "torch recipe": (TORCH, "modernbert"),
    "dwt_jax BERT": (JAX, "bert"),
    "dwt_jax recipe": (JAX, "recipe"),
    "dwt_jax recipe + weak teacher": (JAX, "taught"),
}
ROUNDS = 30
FIRST_STEPS = 5


class Worker:
    """A process that trains one variant, some steps at a time."""

    def __init__(self, script: str, variant: str, settings: Path, log: Path):
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), variant, str(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        )
        self.log = log
        self.ready = json.loads(self._ask(None))

    def _ask(self, request: str | None) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if request is not None:
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a worker has ended, see {self.log}")
        return answer

    def run(self, steps: int) -> float:
        """Train; return seconds."""
        return float(self._ask(f"run {steps}"))

    def loss(self) -> float:
        """Evaluate; return nats."""
        return float(self._ask("loss"))

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def write_settings(options: argparse.Namespace, workdir: Path) -> dict[str, Any]:
    """Prepare rows and held-out masks, which all workers read."""
    from dwt_jax.config_loader import load_config
    from dwt_jax.data.data_cache import get_prepared
    from dwt_jax.data.dataset import num_rows, open_dataset, read_rows
    from dwt_jax.data.tokenizer import load_vocabulary
    from dwt_jax.objectives import mlm
    from dwt_jax.objectives.targets import EVALUATION_SEED, row_keys
    from dwt_jax.train.setup import resolve_precision

    size = SIZES[options.size]
    overrides = {"precision.compute_dtype": options.precision}
    if options.text:
        overrides["data.sources"] = json.dumps(
            [{"kind": "text", "path": options.text, "blank_lines": options.blank_lines}]
        )
        overrides["data.validation_fraction"] = "0.005"
    config = load_config(f"{HERE.parent}/configs/modernbert.py:{size['student']}", overrides)
    data = get_prepared(config.data)
    vocabulary, held_out = load_vocabulary(data / "tokenizer"), open_dataset(data, "held_out")
    rows = np.arange(min(num_rows(held_out), options.held_out_rows))
    batch = read_rows(held_out, rows)
    objective = mlm.make_evaluation_objective(vocabulary)
    targets = mlm.make_targets(batch, row_keys(EVALUATION_SEED, 0, rows.astype(np.int32)), objective)
    arrays = {
        name: np.asarray(getattr(targets, name)) for name in ("inputs", "positions", "labels", "weights")
    }
    train = open_dataset(data, "train")
    np.savez(
        workdir / "rows.npz",
        train=read_rows(train, np.arange(num_rows(train))).tokens,
        held_out_segments=np.asarray(batch.segment_ids),
        **arrays,
    )
    settings = {
        **size,
        "overrides": overrides,
        "data": str(data),
        "rows": str(workdir / "rows.npz"),
        "workdir": str(workdir),
        "vocab_size": len(vocabulary.tokens),
        "mask_id": vocabulary.mask_id,
        "special_ids": list(vocabulary.special_ids),
        "batch_size": 16,
        "steps": options.steps or size["steps"],
        "seed": options.seed,
        "precision": str(resolve_precision(config).compute_dtype),
    }
    (workdir / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    return settings


def train_teacher(settings: dict[str, Any], workdir: Path) -> float:
    """Train the weak teacher with its own worker; return its seconds, without the compilation."""
    worker = Worker(JAX, "teacher", workdir / "settings.json", workdir / "teacher.log")
    first = worker.run(FIRST_STEPS)
    rest = worker.run(settings["steps"] - FIRST_STEPS)
    print(f"teacher: {first + rest:.0f} s, {worker.loss():.3f} nats", flush=True)
    worker.end()
    return rest * settings["steps"] / (settings["steps"] - FIRST_STEPS)


def take_turns(labels: list[str], settings: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Train all variants in turns; return their curves: seconds without compilation, nats."""
    path, steps = workdir / "settings.json", settings["steps"]
    workers = {
        label: Worker(*VARIANTS[label], path, workdir / f"{VARIANTS[label][1]}.log") for label in labels
    }
    curves: dict[str, Any] = {}
    for label, worker in workers.items():
        compile_seconds = worker.run(FIRST_STEPS)
        curves[label] = {
            **worker.ready,
            "compile": compile_seconds,
            "steps": [FIRST_STEPS],
            "seconds": [0.0],
            "loss": [],
        }
        curves[label]["loss"].append(worker.loss())
    marks = sorted({round(FIRST_STEPS + (steps - FIRST_STEPS) * i / ROUNDS) for i in range(1, ROUNDS + 1)})
    marks = [mark for mark in marks if mark > FIRST_STEPS]
    for i, mark in enumerate(marks):
        for label in labels if i % 2 else reversed(labels):
            curve, worker = curves[label], workers[label]
            seconds = worker.run(mark - curve["steps"][-1])
            curve["seconds"].append(curve["seconds"][-1] + seconds)
            curve["steps"].append(mark)
            curve["loss"].append(worker.loss())
            print(f"{label}: step {mark}, {curve['seconds'][-1]:.1f} s, {curve['loss'][-1]:.3f}", flush=True)
    for label, worker in workers.items():
        worker.end()
        curve = curves[label]  # the first steps at the speed of the others
        first = FIRST_STEPS * curve["seconds"][-1] / (steps - FIRST_STEPS)
        curve["seconds"] = [first + seconds for seconds in curve["seconds"]]
        curve["compile"] -= first
    return curves


def time_to(curve: dict[str, Any], target: float) -> float | None:
    """Seconds to a loss, interpolated between two evaluations; None if it is not reached."""
    losses, seconds = curve["loss"], curve["seconds"]
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return seconds[0]
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])
    return None


def markdown(curves: dict[str, Any], teacher_seconds: float, settings: dict[str, Any]) -> str:
    """The table: seconds, and the seconds to the final losses of the torch variants and of the recipe."""
    targets = {label: curves[label]["loss"][-1] for label in curves if label.startswith(("run", "torch"))}
    targets |= {label: curves[label]["loss"][-1] for label in curves if label == "dwt_jax recipe"}
    header = ["variant", "parameters", "compile, s", "ms a step", "s in all", "final loss"]
    header += [f"s to {label}'s {loss:.3f}" for label, loss in targets.items()]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for label, curve in curves.items():
        cells = [label, f"{curve['parameters'] / 1e6:.3f}M", f"{curve['compile']:.0f}"]
        cells += [f"{1000 * curve['seconds'][-1] / settings['steps']:.1f}", f"{curve['seconds'][-1]:.1f}"]
        cells += [f"{curve['loss'][-1]:.3f}"]
        for target_label, target in targets.items():
            seconds, own = time_to(curve, target), time_to(curves[target_label], target)
            if seconds is None or own is None:
                cells.append("never")
                continue
            cells.append(f"{seconds:.1f} ({seconds / own:.3f})")
            if "teacher" in label:
                cells[-1] += f"; charged {seconds + teacher_seconds:.1f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, Any], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for label, curve in curves.items():
        axes.plot(curve["seconds"], curve["loss"], marker=".", label=label)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="held-out loss (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--text", help="text file in place of the built-in corpus")
    parser.add_argument("--blank-lines", type=int, default=2, help="blank lines between documents of --text")
    parser.add_argument("--steps", type=int, help="steps of every variant; default: the size's")
    parser.add_argument("--seed", type=int, default=0, help="of every variant but the teacher")
    parser.add_argument("--held-out-rows", type=int, default=512)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="LABEL")
    parser.add_argument("--workdir", type=Path, help="default: a new temporary directory")
    parser.add_argument("--out", type=Path, help="write NAME.json, NAME.md and NAME.png")
    options = parser.parse_args()
    from digests import cpu_model

    if options.size != "demo" and not options.text:
        parser.error(f"--size {options.size} needs --text: the built-in corpus is too small for it")
    if options.steps is not None and options.steps <= FIRST_STEPS:
        parser.error(
            f"--steps is {options.steps}, expected more than {FIRST_STEPS}, in which programs are compiled"
        )
    workdir = options.workdir or Path(tempfile.mkdtemp(prefix="time_to_loss-"))
    workdir.mkdir(parents=True, exist_ok=options.workdir is None)
    settings = write_settings(options, workdir)
    with_teacher = any(VARIANTS[label][1] == "taught" for label in options.variants)
    teacher_seconds = train_teacher(settings, workdir) if with_teacher else 0.0
    curves = take_turns(options.variants, settings, workdir)
    table = markdown(curves, teacher_seconds, settings)
    print(table)
    if options.out:
        packages = ("jax", "flax", "optax", "torch", "transformers")
        record = {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            **{key: settings[key] for key in ("student", "teacher", "length", "vocab_size", "steps", "seed")},
            "precision": settings["precision"],
            "teacher_seconds": teacher_seconds,
            "curves": curves,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table)
        draw(curves, options.out.with_suffix(".png"), f"{settings['student']}, {cpu_model()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
