"""Programs of the clouds' names, without a cloud: they record what they are asked for and answer as a
script of the test says."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.paths import ROOT

LAUNCH = ROOT / "launch"
TRAIN = [
    "train",
    "--config=configs/paper.py:teacher4",
    "--config.train.steps=100",
    "--workdir=/shared/my run",
]
TPU = ["--name=weak", "--zone=us-central1-a"]
GKE = ["--name=weak", "--image=images/dwt:1", "--claim=runs"]
PROGRAMS = ("gcloud", "kubectl", "docker", "srun", "scontrol", "scancel", "squeue", "python-of-preflight")

# A key of the script is a part of the command, its value the answers [status, text] in turn, the last one for
# ever. What fails says its text on stderr. "until TERM" waits for `scancel --signal=TERM` or a SIGTERM.
FAKE = """#!{python}
import json, os, pathlib, signal, sys, time
folder, words = pathlib.Path(os.environ["FAKE"]), [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[:2] in (["kubectl", "apply"], ["docker", "build"]) and words[-1] == "-":
    (folder / "stdin").write_bytes(sys.stdin.buffer.read())
if words[:2] == ["scancel", "--signal=TERM"]:
    (folder / "terminated").touch()
script = json.loads((folder / "script.json").read_text())
for number, (key, answers) in enumerate(script.items()):
    if key in " ".join(words):
        seen = folder / f"seen-{{number}}"
        count = int(seen.read_text()) if seen.exists() else 0
        seen.write_text(str(count + 1))
        status, text = answers[min(count, len(answers) - 1)]
        if text == "until TERM":  # as srun: to a signal of its own it answers by killing the processes
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(137))
            (folder / "waiting").touch()
            deadline = time.monotonic() + 30
            while not (folder / "terminated").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            text = ""
        print(text, end="\\n" * bool(text), file=sys.stderr if status else sys.stdout)
        sys.exit(status)
"""


class Cloud:
    """Fake programs in a folder, and what they were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, programs = folder, folder / "programs"
        programs.mkdir()
        for name in PROGRAMS:
            (programs / name).write_text(FAKE.format(python=sys.executable))
            (programs / name).chmod(0o755)
        self.env = {**os.environ, "FAKE": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}
        self.env |= {"POLL": "0.01", "SETTLE": "0.01", "PYTHON": "python-of-preflight", "SLURM_JOB_ID": "17"}

    def script(self, answers: dict | None) -> None:
        """What is answered from now on, from the first answer of each."""
        for seen in self.folder.glob("seen-*"):
            seen.unlink()
        (self.folder / "script.json").write_text(json.dumps(answers or {}))

    def run(
        self, script: str, *words: str, answers: dict | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        self.script(answers)
        command = ["bash", LAUNCH / script, *words]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**self.env, **variables}, timeout=60
        )

    def calls(self, *words: str) -> list[list[str]]:
        """Those that hold all of the words."""
        path = self.folder / "calls.jsonl"
        every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in every if all(word in " ".join(call) for word in words)]
