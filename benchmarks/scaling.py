"""Make the tables of docs/scaling.md: three students compiled ahead of time, and attention in long rows.

    python benchmarks/scaling.py            # compile what has no record yet, then write the tables
    python benchmarks/scaling.py --table    # only write the tables from the records

Records are benchmarks/results/aot/*.json: the output of one `dwt compile --json` each, with command,
versions and date. Needs requirements-tpu-compile.txt, and for h100
requirements-gpu-compile.txt; one to six minutes each on two cores.
"""

import argparse
import datetime
import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "aot"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN = "<!-- table: python benchmarks/scaling.py -->"
BEGIN_ATTENTION = "<!-- table of attention: python benchmarks/scaling.py -->"
END = "<!-- end of table -->"

STUDENTS = {  # name: (config, teacher's config)
    "paper": ("configs/paper.py:student", "configs/paper.py:teacher4"),
    "base": ("configs/bert.py:base", "configs/bert.py:base-teacher"),
    "large": ("configs/bert.py:large", "configs/bert.py:large-teacher"),
}
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16", "h100:8")
ROWS_PER_CHIP = 32
LONG_ROWS = ("modernbert-base", "llama-1b")  # models of configs/long_rows.py
BACKENDS = (("v5e:2x4", "reference"), ("v5e:2x4", "splash"), ("h100:8", "reference"), ("h100:8", "cudnn"))


def num_chips(topology: str) -> int:
    count = 1
    for size in topology.partition(":")[2].split("x"):
        count *= int(size)
    return count


def compile_arguments(student: str, topology: str) -> list[str]:
    """Return the arguments of Python that compile a student for a topology."""
    config, teacher = STUDENTS[student]
    overrides = [
        f"teacher.path={teacher}",
        "distill.preset=paper_normal",
        f"train.batch_size={ROWS_PER_CHIP * num_chips(topology)}",
    ]
    return _dwt_compile(config, overrides, topology)


def attention_arguments(model: str, topology: str, backend: str) -> list[str]:
    """Return the arguments of Python that compile a model on long rows with a back end of attention."""
    return _dwt_compile(f"configs/long_rows.py:{model}", [f"precision.attention={backend}"], topology)


def _dwt_compile(config: str, overrides: list[str], topology: str) -> list[str]:
    flags = [f"--config.{override}" for override in overrides]
    return ["-m", "dwt_jax", "compile", f"--config={config}", *flags, f"--topology={topology}", "--json"]


def record_path(*names: str) -> Path:
    """Return the path of a record: of student and topology, or of model, topology and back end."""
    return RECORDS / f"{'-'.join(names).replace(':', '-')}.json"


def compile_record(path: Path, arguments: list[str]) -> None:
    """Run `dwt compile` and write its record; a failure is printed."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    if result.returncode not in (0, 3):
        print(f"{path.stem}: {result.stderr.strip().splitlines()[-1][:300]}", file=sys.stderr)
        return
    versions = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cudnn-cu12"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    provenance = {
        "command": shlex.join(["python", *arguments]),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**provenance, **json.loads(result.stdout)}, indent=2)
    path.write_text(text + "\n")


def table_row(student: str, topology: str) -> str:
    start = f"| {student} | {topology} ({num_chips(topology)}) |"
    if not record_path(student, topology).exists():
        return f"{start} not compiled | | | | | |"
    record = json.loads(record_path(student, topology).read_text())
    memory, seconds = record["memory"], record["roofline_seconds"]
    available = memory["available"] / 2**30
    if not record["fits"]:
        required = memory.get("total", memory.get("required"))
        size = f": {required / 2**30:.1f} of {available:.1f}" if required else ""
        return f"{start} does not fit{size} | | | | | |"
    low, high = max(seconds.values()), sum(seconds.values())
    collectives = ", ".join(f"{each['count']} {each['kind']}" for each in record["collectives"])
    gigabytes = sum(each["bytes_sent"] for each in record["collectives"]) / 1e9
    times = " / ".join(f"{1e3 * seconds[name]:.1f}" for name in ("compute", "memory", "network"))
    positions = record["batch_size"] * record["sequence_length"]
    return (
        f"{start} {memory['total'] / 2**30:.2f} of {available:.1f} | {collectives} | {gigabytes:.2f} "
        f"| {times} "
        f"| {seconds['compute'] / high:.0%} to {seconds['compute'] / low:.0%} "
        f"| {positions / high / 1e6:.2f} to {positions / low / 1e6:.2f} |"
    )


def format_table() -> str:
    header = (
        "| student | topology (chips) | GiB per chip | collectives per step | GB sent per chip "
        "| ms at peak rates: compute / memory / network | MFU at most | M positions/s at most |"
    )
    rows = [table_row(student, topology) for student in STUDENTS for topology in TOPOLOGIES]
    return "\n".join([header, "|---" * 8 + "|", *rows])


def attention_row(model: str, topology: str, backend: str) -> str:
    start = f"| {model} | {topology} | {backend} |"
    if not record_path(model, topology, backend).exists():
        return f"{start} not compiled | | |"
    record = json.loads(record_path(model, topology, backend).read_text())
    memory = record["memory"]
    temporaries = memory.get("temporaries", memory.get("required", 0))  # the compiler's message has no other
    verdict = "fits" if record["fits"] else "does not fit"
    return f"{start} {temporaries / 2**30:.1f} | {memory['available'] / 2**30:.1f} | {verdict} |"


def format_attention_table() -> str:
    header = "| model | topology | attention | GiB of temporaries per chip | GiB available | verdict |"
    rows = [attention_row(model, *backend) for model in LONG_ROWS for backend in BACKENDS]
    return "\n".join([header, "|---" * 6 + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--only", default="", help="compile only names STUDENT-TOPOLOGY that contain this")
    options = parser.parse_args()
    jobs = {record_path(s, t): compile_arguments(s, t) for s in STUDENTS for t in TOPOLOGIES}
    jobs |= {record_path(m, *b): attention_arguments(m, *b) for m in LONG_ROWS for b in BACKENDS}
    for path, arguments in jobs.items():
        if not options.table and options.only in path.stem and not path.exists():
            print(path.stem, file=sys.stderr, flush=True)
            compile_record(path, arguments)
    text = PAGE.read_text()
    for begin, table in ((BEGIN, format_table()), (BEGIN_ATTENTION, format_attention_table())):
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
