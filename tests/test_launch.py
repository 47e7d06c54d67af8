"""The launch scripts without a cloud: programs of the same names record what they are asked for and
answer as a script of the test says."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
GOLDEN = ROOT / "tests" / "golden" / "launch"
TRAIN = [
    "train",
    "--config=configs/paper.py:teacher4",
    "--config.train.steps=100",
    "--workdir=/shared/my run",
]
TPU = ["--name=weak", "--zone=us-central1-a"]
GKE = ["--name=weak", "--image=images/dwt:1", "--claim=runs"]

FAKE = """#!{python}
import json, os, pathlib, signal, sys, time
folder, words = pathlib.Path(os.environ["FAKE"]), [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[1:2] == ["apply"]:
    (folder / "stdin").write_text(sys.stdin.read())
script = json.loads((folder / "script.json").read_text())
for number, (key, answers) in enumerate(script.items()):
    if key in " ".join(words):
        seen = folder / f"seen-{{number}}"
        count = int(seen.read_text()) if seen.exists() else 0
        seen.write_text(str(count + 1))
        status, text = answers[min(count, len(answers) - 1)]
        if text == "until TERM":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
            (folder / "waiting").touch()
            time.sleep(60)
        print(text, end="\\n" * bool(text))
        sys.exit(status)
"""


class Cloud:
    """Fake programs in a folder, and what they were asked for."""

    def __init__(self, folder):
        self.folder, programs = folder, folder / "programs"
        programs.mkdir()
        for name in ("gcloud", "kubectl", "docker", "srun", "scontrol", "python-of-preflight"):
            (programs / name).write_text(FAKE.format(python=sys.executable))
            (programs / name).chmod(0o755)
        self.env = {**os.environ, "FAKE": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}
        self.env |= {"POLL": "0.01", "PYTHON": "python-of-preflight", "SLURM_JOB_ID": "17"}

    def run(self, script, *words, answers=None, **variables):
        (self.folder / "script.json").write_text(json.dumps(answers or {}))
        command = ["bash", LAUNCH / script, *words]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**self.env, **variables}, timeout=60
        )

    def calls(self, *words):
        """Those that hold all of the words."""
        path = self.folder / "calls.jsonl"
        every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in every if all(word in " ".join(call) for word in words)]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def states(*names):
    """Answers of gcloud about the queued resource; NONE: there is none."""
    return [[1, ""] if name == "NONE" else [0, name] for name in names]


def done(*statuses):
    """What the run leaves on worker 0; None: it still runs."""
    return [[0, "" if status is None else str(status)] for status in statuses]


def test_a_slice_is_made_again_until_the_run_is_done(cloud):
    """Queued, lost while it trains, stopped by a signal on a slice that stays, done, given back."""
    answers = {
        "queued-resources describe": states(
            *("NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"),  # made, waited for
            *("ACTIVE", "SUSPENDED"),  # trains, is lost
            *("SUSPENDED", "ACTIVE", "ACTIVE"),  # made again, stopped
            *("ACTIVE", "ACTIVE", "ACTIVE"),  # as it is, done
        ),
        "run.status 2>": done(None, 75, 0),
    }
    found = cloud.run("tpu_vm.sh", "until-done", *TPU, "--spot", "--", *TRAIN, answers=answers)
    assert found.returncode == 0, found.stderr
    assert len(cloud.calls("queued-resources create", "--spot")) == 2
    assert len(cloud.calls("queued-resources delete weak", "--force")) == 2
    assert len(cloud.calls("tpu-vm scp", "--worker=all")) == 3
    starts = cloud.calls("tpu-vm ssh", "setsid", "--worker=all")
    assert len(starts) == 3
    assert "'/shared/my run'" in starts[0][-1] or "/shared/my\\ run" in starts[0][-1]
    assert cloud.calls()[-1][1:5] == ["compute", "tpus", "queued-resources", "delete"]
    assert "weak is WAITING_FOR_RESOURCES" in found.stderr


@pytest.mark.parametrize("status", [2, 1])
def test_a_failure_is_not_tried_again_and_the_slice_stays_for_its_logs(cloud, status):
    answers = {"queued-resources describe": states("ACTIVE"), "run.status 2>": done(None, status)}
    found = cloud.run("tpu_vm.sh", "until-done", *TPU, "--", *TRAIN, answers=answers)
    assert found.returncode == status
    assert len(cloud.calls("setsid")) == 1
    assert not cloud.calls("delete")
    assert "launch/tpu_vm.sh logs --name=weak" in found.stderr


def test_attempts_and_waiting_have_a_limit(cloud):
    answers = {"queued-resources describe": states("ACTIVE"), "run.status 2>": done(75)}
    found = cloud.run("tpu_vm.sh", "until-done", *TPU, "--attempts=3", "--", *TRAIN, answers=answers)
    assert found.returncode == 1
    assert len(cloud.calls("setsid")) == 3
    assert "not done after 3 attempts" in found.stderr
    answers = {"queued-resources describe": states("WAITING_FOR_RESOURCES")}
    found = cloud.run("tpu_vm.sh", "wait", *TPU, answers=answers, WAIT_LIMIT="0", POLL="1.1")
    assert found.returncode == 1
    assert "still WAITING_FOR_RESOURCES after 0 s (WAIT_LIMIT), expected ACTIVE" in found.stderr


def test_a_request_that_failed_is_made_anew(cloud):
    answers = {
        "queued-resources describe": states("FAILED", "FAILED", "FAILED", "ACTIVE"),
        "run.status 2>": done(0),
    }
    found = cloud.run("tpu_vm.sh", "until-done", *TPU, "--", *TRAIN, answers=answers)
    assert found.returncode == 0, found.stderr
    assert len(cloud.calls("queued-resources create")) == 2


def test_workers_that_cannot_be_reached_are_tried_again(cloud):
    answers = {
        "queued-resources describe": states("ACTIVE"),
        "tpu-vm scp": [[1, ""], [0, ""]],
        "run.status 2>": [[255, ""], *done(None, 0)],
    }
    found = cloud.run("tpu_vm.sh", "until-done", *TPU, "--", *TRAIN, answers=answers)
    assert found.returncode == 0, found.stderr
    assert len(cloud.calls("setsid")) == 1
    assert "no worker could be reached" in found.stderr


def test_what_is_started_on_a_worker_runs_detached_once_and_leaves_its_status(cloud, tmp_path):
    """The command that ssh would run, run here, with a program in place of python."""
    cloud.run("tpu_vm.sh", "run", *TPU, "--", *TRAIN)
    (call,) = cloud.calls("tpu-vm ssh")
    command = call[-1].removeprefix("--command=")
    home = tmp_path / "home"
    (home / "dwt-jax" / "launch").mkdir(parents=True)
    (home / "dwt-jax" / "launch" / "env.sh").write_text("export SOURCED=1\n")
    python = home / "dwt-jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nsleep 1\nprintf "%s|" "$SOURCED" "$@"\nexit 75\n')
    python.chmod(0o755)
    for _ in range(2):
        found = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, timeout=30)
        assert found.returncode == 0, found.stderr
    assert "runs already" in found.stdout
    status = home / "dwt-jax" / "run.status"
    deadline = time.monotonic() + 30
    while not (status.exists() and status.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert status.read_text() == "75\n"
    assert (home / "dwt-jax" / "run.log").read_text() == "|".join(["1", "-m", "dwt_jax", *TRAIN, ""])


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sbatch"])
def test_a_preflight_that_does_not_fit_stops_before_anything_is_made(cloud, script):
    words = {"tpu_vm.sh": ["until-done", *TPU, "--preflight=v5e:4x4", "--"]}
    words |= {"gke.sh": ["apply", *GKE, "--preflight=v5e:4x4", "--"], "slurm.sbatch": []}
    answers = {"dwt_jax compile": [[3, "does not fit"]]}
    found = cloud.run(script, *words[script], *TRAIN, answers=answers, PREFLIGHT="v5e:4x4")
    assert found.returncode == 3
    (call,) = cloud.calls()
    assert call[1:] == ["-m", "dwt_jax", "compile", *TRAIN[1:3], "--topology=v5e:4x4"]


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
    "slurm": ["slurm.sbatch", "--dry-run", *TRAIN],
}


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_prints_what_would_be_run_and_runs_nothing(cloud, name, request):
    script, *words = DRY[name]
    if script != "slurm.sbatch":
        at = words.index("--") if "--" in words else len(words)
        words = [*words[:at], "--dry-run", *words[at:]]
    more = {"CONTAINER": "images/dwt:1", "PREFLIGHT": "h100:8"} if script == "slurm.sbatch" else {}
    found = cloud.run(script, *words, MOUNTS="/shared", PYTHON="python3", DWT_CACHE="/shared/cache", **more)
    assert found.returncode == 0, found.stderr
    assert not cloud.calls()
    text = found.stdout.replace(str(ROOT), "ROOT")
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--renew-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    if script != "gke.sh":  # can be pasted
        assert all(shlex.split(line) for line in text.splitlines())


def pod(text):
    jobset = yaml.safe_load(text)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return jobset, job, job["template"]["spec"]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_jobset_that_is_applied(cloud, gpu):
    awkward = [*TRAIN, '--config.train.wandb=a "b" \\ ${HOSTS} $HOME']
    more = ["--gpu"] if gpu else []
    found = cloud.run("gke.sh", "apply", *GKE, *more, "--hosts=2", "--", *awkward)
    assert found.returncode == 0, found.stderr
    assert cloud.calls() == [["kubectl", "apply", "-f", "-"]]
    jobset, job, spec = pod((cloud.folder / "stdin").read_text())
    assert jobset["kind"] == "JobSet"
    assert jobset["metadata"]["name"] == "weak"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    (mistake,) = job["podFailurePolicy"]["rules"]
    assert mistake["action"] == "FailJob"
    assert 2 in mistake["onExitCodes"]["values"]
    assert 75 not in mistake["onExitCodes"]["values"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 2, 0)
    assert spec["restartPolicy"] == "Never"  # podFailurePolicy wants it
    assert spec["terminationGracePeriodSeconds"] >= 120
    (container,) = spec["containers"]
    assert mistake["onExitCodes"]["containerName"] == container["name"]
    assert container["image"] == "images/dwt:1"
    assert container["args"] == awkward
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == "runs"
    named = {each["name"] for each in spec["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} <= named
    chips = "nvidia.com/gpu" if gpu else "google.com/tpu"
    assert container["resources"]["limits"] == {chips: 8 if gpu else 4}
    if gpu:
        env = {each["name"]: each for each in container["env"]}
        address = f"weak-{jobset['spec']['replicatedJobs'][0]['name']}-0-0.{spec['subdomain']}:8476"
        assert env["JAX_COORDINATOR_ADDRESS"]["value"] == address
        assert env["JAX_NUM_PROCESSES"]["value"] == "2"
        assert "job-completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    else:
        assert spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (2, False), (1, False)])
def test_a_slurm_job_queues_itself_again_when_it_was_stopped(cloud, status, requeued):
    found = cloud.run("slurm.sbatch", *TRAIN, answers={"srun": [[status, ""]]})
    assert found.returncode == status
    (call,) = cloud.calls("srun")
    assert call[-len(TRAIN) :] == TRAIN
    assert [call[1:] for call in cloud.calls("scontrol")] == [["requeue", "17"]] * requeued


def test_a_signal_reaches_the_processes_of_a_slurm_job(cloud):
    (cloud.folder / "script.json").write_text(json.dumps({"srun": [[75, "until TERM"]]}))
    command = ["bash", LAUNCH / "slurm.sbatch", *TRAIN]
    job = subprocess.Popen(command, cwd=ROOT, env=cloud.env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (cloud.folder / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.terminate()
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 75, said
    assert cloud.calls("scontrol")


def test_what_sbatch_reads_of_the_slurm_script():
    lines = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    options = dict(lines)
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # one process a GPU, all of them visible
    assert options["signal"].startswith("B:TERM@")
    assert "requeue" in options
    assert "gpus-per-task" not in options


def test_the_skypilot_task():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n", "-c", task[part]], check=False).returncode == 0
    assert task["run"].rstrip().splitlines()[-1].startswith("exec ")  # its signals and its status
    assert task["envs"]["VERB"].split()[0] == "train"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tpu_vm.sh", "make", *TPU], "no verb 'make', expected project, disk"),
        (["tpu_vm.sh", "create", "--zone=z"], "--name and --zone are needed"),
        (["tpu_vm.sh", "create", *TPU, "--sport"], "no option --sport"),
        (["tpu_vm.sh", "run", *TPU], "no command, expected: -- train"),
        (["tpu_vm.sh", "until-done", *TPU, "--attempts=0", "--", "train"], "--attempts is 0, expected"),
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


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh"])
def test_help(cloud, script):
    found = cloud.run(script, "--help")
    assert found.returncode == 0
    assert f"launch/{script} VERB --name=N" in found.stdout
    assert "set -euo" not in found.stdout


def test_the_claim_that_is_applied_is_the_one_that_pods_take(cloud):
    cluster = ["--zone=z", "--machine=ct5lp-hightpu-4t"]
    found = cloud.run("gke.sh", "cluster", *GKE, *cluster)
    assert found.returncode == 0, found.stderr
    claim = yaml.safe_load((cloud.folder / "stdin").read_text())
    assert claim["metadata"]["name"] == "runs"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    order = [" ".join(call[:4]) for call in cloud.calls()]
    assert order[:3] == [
        "gcloud container clusters create",
        "gcloud container node-pools create",
        "gcloud container clusters get-credentials",
    ]
    failed = cloud.run("gke.sh", "cluster", *GKE, *cluster, answers={"node-pools": [[1, "no quota"]]})
    assert failed.returncode == 1
    assert len(cloud.calls("get-credentials")) == 1  # of the first


def test_every_command_of_the_page_is_in_a_script(cloud):
    """`bash launch/…` and sbatch by their dry runs; sky's stand in skypilot.yaml; no others."""
    text = (ROOT / "docs" / "launching.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    ([^#\s].*)$", text, re.MULTILINE)
    assert len(commands) > 15
    task = " ".join((LAUNCH / "skypilot.yaml").read_text().split())
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[0] == "sky":
            assert " ".join(line.split("  #")[0].split()) in task, line
            continue
        while "=" in words[0]:
            cloud.env[words[0].partition("=")[0]] = words.pop(0).partition("=")[2]
        if words[0] == "sbatch":
            assert words[1] == "launch/slurm.sbatch"
        assert words[0] in ("bash", "sbatch"), line
        script, arguments = words[1].removeprefix("launch/"), words[2:]
        if script == "slurm.sbatch":
            arguments = ["--dry-run", *[word for word in arguments if word != "--dry-run"]]
        else:
            at = arguments.index("--") if "--" in arguments else len(arguments)
            arguments = [*arguments[:at], "--dry-run", *arguments[at:]]
        found = cloud.run(script, *arguments)
        assert found.returncode == 0, (line, found.stderr)
        assert found.stdout
    assert not cloud.calls()


def test_shellcheck():
    scripts = [path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 4
    found = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout
