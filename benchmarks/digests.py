"""Check that a change of the code changes no number.

    python benchmarks/digests.py --workdir=/tmp/before --out=before.json   # in the checkout before
    python benchmarks/digests.py --workdir=/tmp/after --expect=before.json # in the one after

Runs, on one CPU device in fp32: a small teacher of BERT, students with and without it, fine-tunings, runs
grown in depth and in width in their middle, one with accumulation, dropout and other options of the
objective, and a ModernBERT with Muon.
Prints the SHA-256 of every model's tensors and the exact losses. The digests depend on the CPU and on the
versions: compare on one machine. Exit status 1 if anything differs. benchmarks/results/digests.json holds
the record of 3b4c13f, when the runs had other names and ran in the demo of then.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "flax", "optax", "numpy")
SMALL = ["--config.train.steps=24", "--config.train.eval_every=8", "--config.train.save_every=8"]
ACCUMULATED = [
    "--config.train.gradient_accumulation_steps=4",
    "--config.model.hidden_dropout_prob=0.1",
    "--config.model.attention_probs_dropout_prob=0.1",
    "--config.mlm.whole_word=True",
    "--config.distill.alpha_soft.kind=until_matched",
    "--config.distill.alpha_soft.value=4",
    "--config.distill.temperature.value=2",
    "--config.distill.divergence=jensen_shannon",
    "--config.distill.token_selection=entropy",
    "--config.distill.loss_chunk_rows=3",
]
FINETUNING = [
    "--config.examples.max_train_examples=400",
    "--config.recipe.seeds=[0,1]",
    "--config.recipe.epochs=2",
]
DEEPER = ["--config.model.num_hidden_layers=4", "--config.model.gated_layers=True"]
WIDER = [
    "--config.model.hidden_size=192",
    "--config.model.num_attention_heads=6",
    "--config.model.intermediate_size=640",
    "--config.model.weighted_norm=True",
]
STUDENTS = {  # name of the run: overrides
    "alone": [],
    "alone-seed1": ["--config.seed=1"],
    "normal": ["--config.distill.preset=paper_normal"],
    "strong": ["--config.distill.preset=paper_strong"],
    "decay": ["--config.distill.preset=paper_decay"],
    "grown": ["--config.distill.preset=paper_normal", "--config.init.method=fna"],
}
FINETUNED = ("teacher", "alone", "normal")
GROWTHS = {  # name of the run: sizes, method, moments
    "grown-stack": (DEEPER, "stack", "carry"),
    "grown-masked": (DEEPER, "masked", "asymmetric"),
    "grown-width": (WIDER, "lemon", "carry"),
}
GROWN = ["--config.init.gate_warmup=0.5", "--config.init.new_param_warmup=0.3"]


def dwt(*arguments: str) -> None:
    """Run one command of this checkout."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    print("dwt", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "dwt_jax", *arguments], cwd=ROOT, env=environment, check=True)


def run_all(workdir: Path) -> None:
    """Run everything below `workdir`; what is finished there is not run again."""
    config = "--config=configs/small_bert.py:2x128"
    teacher = f"--config.teacher.path={workdir / 'teacher'}"
    dwt(
        "train",
        "--config=configs/small_bert.py:2x64",
        f"--workdir={workdir / 'teacher'}",
        "--config.train.steps=180",
    )
    for name, overrides in STUDENTS.items():
        with_teacher = [teacher] if "distill" in str(overrides) else []
        dwt(
            "train",
            config,
            f"--workdir={workdir / name}",
            "--config.train.steps=90",
            *with_teacher,
            *overrides,
        )
    for name in FINETUNED:
        out = workdir / "finetuned" / name
        if not (out / "results.json").exists():
            dwt("finetune", f"--model={workdir / name}", f"--workdir={out}", "--task=era", *FINETUNING)
    dwt("train", "--config=configs/modernbert.py:2x128", f"--workdir={workdir / 'modernbert'}", *SMALL)
    dwt("train", config, f"--workdir={workdir / 'accumulated'}", teacher, *SMALL, *ACCUMULATED)
    dwt("train", config, f"--workdir={workdir / 'small'}", *SMALL)
    for name, (sizes, method, moments) in GROWTHS.items():
        out = workdir / name
        if not out.exists():
            growth = [f"--run={workdir / 'small'}", "--step=8", f"--method={method}", f"--moments={moments}"]
            dwt("remap-run", config, f"--out={out}", *growth, *SMALL, *sizes, *GROWN)
        dwt("train", config, f"--workdir={out}", *SMALL, *sizes)


def tensors_digest(path: Path) -> str:
    """SHA-256 of names, shapes and bytes of a safetensors file."""
    digest = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def collect(workdir: Path) -> dict[str, Any]:
    """{path below workdir: digest, or the numbers of a result file}."""
    record: dict[str, Any] = {}
    for path in sorted(workdir.rglob("model.safetensors")):
        record[str(path.relative_to(workdir))] = tensors_digest(path)
    for path in sorted(workdir.rglob("summary.json")):
        summary = json.loads(path.read_text())
        record[str(path.relative_to(workdir))] = {"held_out": summary["held_out"], "flops": summary["flops"]}
    for path in sorted(workdir.rglob("results.json")):
        record[str(path.relative_to(workdir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return record


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="write the record here")
    parser.add_argument("--expect", type=Path, help="compare with this record")
    options = parser.parse_args()
    run_all(options.workdir.resolve())
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record: dict[str, Any] = {"cpu": cpu_model(), "versions": versions}
    record["digests"] = collect(options.workdir.resolve())
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if options.expect is None:
        return 0
    expected = json.loads(options.expect.read_text())["digests"]
    different = [
        key for key in expected | record["digests"] if expected.get(key) != record["digests"].get(key)
    ]
    for key in different:
        print(f"{key}: {record['digests'].get(key)}, expected {expected.get(key)}")
    print(f"{len(expected) - len(different)} of {len(expected)} the same")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
