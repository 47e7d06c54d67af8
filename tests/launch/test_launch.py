"""All launch scripts: pre-flights, dry runs, mistakes, the commands of docs/launching.md, shellcheck."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dwt_jax.config_loader import load_config
from helpers.clouds import GKE, LAUNCH, ROOT, TPU, TRAIN

GOLDEN = ROOT / "tests" / "golden" / "launch"


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sbatch"])
def test_a_preflight_that_does_not_fit_stops_before_anything_is_made(cloud, script):
    words = {"tpu_vm.sh": ["until-done", *TPU, "--preflight=v5e:4x4", "--"]}
    words |= {"gke.sh": ["apply", *GKE, "--preflight=v5e:4x4", "--"], "slurm.sbatch": []}
    answers = {"dwt_jax compile": [[3, "does not fit"]]}
    found = cloud.run(script, *words[script], *TRAIN, answers=answers, PREFLIGHT="v5e:4x4")
    assert found.returncode == 3
    (call,) = cloud.calls()
    assert call[1:] == ["-m", "dwt_jax", "compile", "--topology=v5e:4x4", *TRAIN[1:3]]


def test_a_preflight_asks_about_the_config_that_would_be_trained(cloud):
    words = [
        "train",
        "--config",
        "a.py",
        "--workdir",
        "/shared/x",
        "--config.train.steps",
        "5",
        "--workdir=y",
    ]
    found = cloud.run("gke.sh", "apply", *GKE, "--preflight=v6e:8x8", "--", *words)
    assert found.returncode == 0, found.stderr
    (call,) = cloud.calls("compile")
    assert call[4:] == ["--topology=v6e:8x8", "--config", "a.py", "--config.train.steps", "5"]


DRY = {
    "tpu_vm_create": ["tpu_vm.sh", "create", *TPU, "--spot", "--preflight=v5e:4x4", "--", *TRAIN],
    "tpu_vm_until_done": ["tpu_vm.sh", "until-done", *TPU, "--project=mine", "--", *TRAIN],
    "tpu_vm_project": ["tpu_vm.sh", "project", *TPU, "--project=mine"],
    "tpu_vm_disk": ["tpu_vm.sh", "disk", *TPU],
    "tpu_vm_wait": ["tpu_vm.sh", "wait", *TPU],
    "tpu_vm_setup": ["tpu_vm.sh", "setup", *TPU, "--share=10.0.0.2:/runs"],
    "tpu_vm_run": ["tpu_vm.sh", "run", *TPU, "--", *TRAIN],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *TPU],
    "tpu_vm_status": ["tpu_vm.sh", "status", *TPU],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *TPU],
    "tpu_vm_delete": ["tpu_vm.sh", "delete", *TPU],
    "gke_cluster": [
        "gke.sh",
        "cluster",
        *GKE,
        "--zone=us-central1-a",
        "--machine=ct5lp-hightpu-4t",
        "--spot",
    ],
    "gke_cluster_gpu": [
        "gke.sh",
        "cluster",
        *GKE,
        "--zone=z",
        "--machine=a3-highgpu-8g",
        "--gpu",
        "--hosts=2",
    ],
    "gke_image": ["gke.sh", "image", *GKE],
    "gke_apply": ["gke.sh", "apply", *GKE, "--preflight=v5e:4x4", "--", *TRAIN],
    "gke_apply_gpu": ["gke.sh", "apply", *GKE, "--gpu", "--hosts=2", "--", *TRAIN],
    "gke_status": ["gke.sh", "status", *GKE],
    "gke_logs": ["gke.sh", "logs", *GKE],
    "gke_delete": ["gke.sh", "delete", *GKE],
    "gke_delete_cluster": ["gke.sh", "delete-cluster", "--name=weak", "--zone=us-central1-a"],
    "slurm": ["slurm.sbatch", *TRAIN],
}


def dry(script, *words):
    """The same words with --dry-run among them."""
    at = words.index("--") if "--" in words else len(words)
    if script == "slurm.sbatch":
        at, words = 0, tuple(word for word in words if word != "--dry-run")
    return [script, *words[:at], "--dry-run", *words[at:]]


def printed(cloud, name):
    variables = {"CONTAINER": "images/dwt:1", "PREFLIGHT": "h100:8"} if name == "slurm" else {}
    found = cloud.run(*dry(*DRY[name]), MOUNTS="/shared", **variables)
    assert found.returncode == 0, found.stderr
    assert not found.stderr
    return found.stdout.replace(str(ROOT), "ROOT")


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_prints_what_would_be_run_and_runs_nothing(cloud, name, request):
    text = printed(cloud, name)
    assert not cloud.calls()
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--renew-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    "name", sorted(set(DRY) - {"tpu_vm_until_done", "tpu_vm_setup", "gke_image", "gke_apply_gpu"})
)
def test_what_is_printed_can_be_pasted_and_is_what_is_run(cloud, name):
    """But for YAML, which goes to kubectl, and what is made for the while (tpu_vm_setup)."""
    lines = re.split(r"^(?:# A |apiVersion)", printed(cloud, name), maxsplit=1, flags=re.MULTILINE)[0]
    script, *words = DRY[name]
    variables = {"CONTAINER": "images/dwt:1", "PREFLIGHT": "h100:8"} if name == "slurm" else {}
    found = cloud.run(script, *words, MOUNTS="/shared", answers={"describe": [[0, "ACTIVE"]]}, **variables)
    assert found.returncode == 0, found.stderr
    run = [[word.replace(str(ROOT), "ROOT") for word in call] for call in cloud.calls()]
    if name in ("gke_apply", "gke_cluster", "gke_cluster_gpu"):
        assert run.pop() == ["kubectl", "apply", "-f", "-"]
    assert [shlex.split(line.removeprefix("# ")) for line in lines.splitlines()] == run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tpu_vm.sh", "make", *TPU], "no verb 'make', expected project, disk"),
        (["tpu_vm.sh", "create", "--zone=z"], "--name and --zone are needed"),
        (["tpu_vm.sh", "create", *TPU, "--sport"], "no option --sport"),
        (["tpu_vm.sh", "run", *TPU], "no command, expected: -- train"),
        (["tpu_vm.sh", "until-done", *TPU, "--attempts=0", "--", "train"], "--attempts is 0, expected"),
        (["tpu_vm.sh", "create", *TPU, "--preflight=v5e:4x4"], "no command, expected: -- train"),
        (["tpu_vm.sh", "setup", *TPU, "--share=; rm"], "--share is ; rm, expected HOST:/PATH"),
        (["gke.sh", "apply", "--name=a", "--image=a'b", "--", "train"], "a'b, expected letters"),
        (["gke.sh", "apply", *GKE, "--", "train", "a\nb"], "an argument holds a line break"),
        (["gke.sh", "delete-cluster", "--name=a"], "--zone is needed"),
        (["gke.sh", "apply", "--name=A_b"], "--name is 'A_b', expected small letters"),
        (["gke.sh", "cluster", *GKE], "--zone, --machine and --claim are needed"),
        (["gke.sh", "apply", *GKE], "no command, expected: -- train"),
        (["gke.sh", "apply", *GKE, "--hosts=x", "--", "train"], "x, expected a number of at least 1"),
        (["gke.sh", "apply", "--name=a", "--", "train"], "--image and --claim are needed"),
        (["slurm.sbatch"], "no command, expected e.g. train"),
    ],
)
def test_mistakes_are_one_line(cloud, words, says):
    found = cloud.run(*words)
    assert found.returncode == 2
    assert says in found.stderr
    assert found.stderr.count("\n") == 1
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("script", "says"),
    [("tpu_vm.sh", "VERB --name=N"), ("gke.sh", "VERB --name=N"), ("slurm.sbatch", "train --config=")],
)
def test_help_is_the_head_of_the_script(cloud, script, says):
    found = cloud.run(script, "--help")
    assert found.returncode == 0
    assert f"launch/{script} {says}" in found.stdout
    head = re.match(r"#!.*\n((?:# (?!shellcheck).*\n)+)", (LAUNCH / script).read_text())[1]
    assert found.stdout == re.sub(r"^# ", "", head, flags=re.MULTILINE)
    assert not cloud.calls()


PAGE = (ROOT / "docs" / "launching.md").read_text().replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^    ([^#\s].*)$", PAGE, re.MULTILINE)]


def test_every_command_of_the_page_is_in_a_script(cloud):
    """`bash launch/…` and sbatch by their dry runs; sky's stand in skypilot.yaml; no others."""
    assert len(COMMANDS) > 15
    task = (LAUNCH / "skypilot.yaml").read_text()
    known = [shlex.split(line) for line in re.findall(r"^#   (sky .*)$", task, re.MULTILINE)]
    for words in COMMANDS:
        if words[0] == "sky":
            assert words in known, words
            continue
        assert words[0] in ("bash", "sbatch"), words
        script, *rest = [word for word in words[1:] if words[0] == "bash" or not word.startswith("--nodes")]
        assert script.startswith("launch/"), words
        found = cloud.run(*dry(script.removeprefix("launch/"), *rest))
        assert found.returncode == 0, (words, found.stderr)
        assert found.stdout
    assert not cloud.calls()


def test_the_configs_of_the_page_exist():
    named = re.findall(r"--config=(\S+)", PAGE + "".join(path.read_text() for path in LAUNCH.glob("s*")))
    named = {name.strip("'`") for name in named} - {"…"}
    assert len(named) >= 2
    for name in named:
        assert load_config(name).train.batch_size


def test_shellcheck():
    scripts = [path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 6
    shellcheck = Path(sys.executable).parent / "shellcheck"  # installed beside it, perhaps not on the path
    found = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout
