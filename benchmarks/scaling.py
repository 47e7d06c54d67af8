"""docs/scaling.md's table: three students on hardware that is not here, compiled, not run.

    python benchmarks/scaling.py            # compile what has no record yet, then the table
    python benchmarks/scaling.py --table    # the table alone, from the records

Records are benchmarks/results/aot/*.json, one `dwt compile --json` each, with command, versions and
date. Needs requirements-tpu-compile.txt; one to six minutes each on two cores.
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
BEGIN, END = "<!-- table: python benchmarks/scaling.py -->", "<!-- end of table -->"

STUDENTS = {  # name: (config, teacher's config)
    "paper": ("configs/paper.py:student", "configs/paper.py:teacher4"),
    "base": ("configs/bert.py:base", "configs/bert.py:base-teacher"),
    "large": ("configs/bert.py:large", "configs/bert.py:large-teacher"),
}
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16", "h100:8")
ROWS = 32  # a chip


def chips(topology: str) -> int:
    count = 1
    for size in topology.partition(":")[2].split("x"):
        count *= int(size)
    return count


def command(student: str, topology: str) -> list[str]:
    config, teacher = STUDENTS[student]
    sets = [
        f"teacher.path={teacher}",
        "distill.preset=paper_normal",
        f"train.batch_size={ROWS * chips(topology)}",
    ]
    words = [f"--config={config}", *(f"--config.{each}" for each in sets), f"--topology={topology}", "--json"]
    return ["-m", "dwt_jax", "compile", *words]


def record(student: str, topology: str) -> Path:
    return RECORDS / f"{student}-{topology.replace(':', '-')}.json"


def measure(student: str, topology: str) -> None:
    words = command(student, topology)
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
    if found.returncode not in (0, 3):
        print(f"{student} on {topology}: {found.stderr.strip().splitlines()[-1][:300]}", file=sys.stderr)
        return
    versions = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    about = {
        "command": shlex.join(["python", *words]),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, **json.loads(found.stdout)}, indent=2)
    record(student, topology).write_text(text + "\n")


def row(student: str, topology: str) -> str:
    name = f"| {student} | {topology} ({chips(topology)}) |"
    if not record(student, topology).exists():
        return f"{name} not compiled | | | | | |"
    found = json.loads(record(student, topology).read_text())
    memory, seconds = found["memory"], found["seconds"]
    room = memory["available"] / 2**30
    if not found["fits"]:
        wanted = memory.get("together", memory.get("wanted"))
        return (
            f"{name} does not fit: {wanted / 2**30:.1f} of {room:.1f} | | | | | |"
            if wanted
            else f"{name} does not fit | | | | | |"
        )
    low, high = max(seconds.values()), sum(seconds.values())
    sent = ", ".join(f"{each['count']} {each['kind']}" for each in found["collectives"])
    gigabytes = sum(each["sent"] for each in found["collectives"]) / 1e9
    times = " / ".join(f"{1e3 * seconds[each]:.1f}" for each in ("compute", "memory", "network"))
    tokens = found["rows"] * found["length"]
    return (
        f"{name} {memory['together'] / 2**30:.2f} of {room:.1f} | {sent} | {gigabytes:.2f} | {times} "
        f"| {seconds['compute'] / high:.0%} to {seconds['compute'] / low:.0%} "
        f"| {tokens / high / 1e6:.2f} to {tokens / low / 1e6:.2f} |"
    )


def table() -> str:
    head = (
        "| student | topology (chips) | GiB a chip | collectives a step | GB sent a chip | ms at peak rates: "
        "compute / memory / network | MFU at most | M tokens/s at most |"
    )
    rows = [row(student, topology) for student in STUDENTS for topology in TOPOLOGIES]
    return "\n".join([head, "|---" * 8 + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument(
        "--only", default="", help="of the names STUDENT-TOPOLOGY (paper-v5e:16x16) those that hold this"
    )
    options = parser.parse_args()
    for student in STUDENTS:
        for topology in TOPOLOGIES:
            if (
                not options.table
                and options.only in f"{student}-{topology}"
                and not record(student, topology).exists()
            ):
                print(f"{student} on {topology}", file=sys.stderr, flush=True)
                measure(student, topology)
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
