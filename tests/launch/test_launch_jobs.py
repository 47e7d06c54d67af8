"""What is handed to Slurm, Kubernetes and SkyPilot: scripts run with stand-ins for them, YAML as data."""

import io
import os
import re
import subprocess
import tarfile
import time

import pytest
import yaml

from helpers.clouds import GKE, LAUNCH, ROOT, TRAIN


def pod(text):
    jobset = yaml.safe_load(text)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return jobset, job, job["template"]["spec"]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_jobset_that_is_applied(cloud, gpu):
    awkward = [*TRAIN, '--config.train.wandb_project=a "b" \\ ${HOSTS} $HOME & #']
    more = ["--gpu"] if gpu else []
    found = cloud.run("gke.sh", "apply", *GKE, *more, "--hosts=2", "--", *awkward)
    assert found.returncode == 0, found.stderr
    assert cloud.calls() == [["kubectl", "apply", "-f", "-"]]
    jobset, job, spec = pod((cloud.folder / "stdin").read_text())
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet"
    assert jobset["metadata"]["name"] == spec["subdomain"] == "weak"
    assert (job["parallelism"], job["completions"]) == (2, 2)
    (container,) = spec["containers"]
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
        assert env["LD_LIBRARY_PATH"]["value"] == "/usr/local/nvidia/lib64"  # the image knows nothing of it
        assert "job-completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    else:
        assert spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_jobset_gpu.yaml"])
def test_which_ends_of_a_pod_begin_the_jobset_anew(name):
    """After 2 and 3 the job fails for the reason PodFailurePolicy, and so does the set. Any other bad end is
    one more than the job may have (0), fails it for another reason, and the set begins anew."""
    jobset, job, spec = pod((LAUNCH / name).read_text())
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    (mistake,) = job["podFailurePolicy"]["rules"]
    assert mistake["action"] == "FailJob"
    assert mistake["onExitCodes"]["operator"] == "In"
    assert mistake["onExitCodes"]["values"] == [2, 3]
    assert mistake["onExitCodes"]["containerName"] == spec["containers"][0]["name"]
    assert job["backoffLimit"] == 0
    assert spec["restartPolicy"] == "Never"  # podFailurePolicy wants it
    assert spec["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_jobset_gpu.yaml"])
def test_the_container_is_the_python_process_itself(name, tmp_path):
    """Not a shell with a child: the signal before the end reaches process 1 alone."""
    (container,) = pod((LAUNCH / name).read_text())[2]["containers"]
    (tmp_path / "python").write_text('#!/bin/sh\necho "$$" "$DWT_START_TIMEOUT" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [*container["command"], "train", "--workdir=/shared/my run"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True
    )
    said, _ = process.communicate(timeout=30)
    assert said == f"{process.pid} 900 -m dwt_jax train --workdir=/shared/my run\n"


def test_the_claim_that_is_applied_is_the_one_that_pods_take(cloud):
    cluster = ["--zone=z", "--machine=ct5lp-hightpu-4t"]
    found = cloud.run("gke.sh", "cluster", *GKE, *cluster)
    assert found.returncode == 0, found.stderr
    claim = yaml.safe_load((cloud.folder / "stdin").read_text())
    assert claim["metadata"]["name"] == "runs"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    order = [" ".join(call[:4]) for call in cloud.calls()]
    assert order[:4] == [
        "gcloud services enable container.googleapis.com",
        "gcloud container clusters create",
        "gcloud container node-pools create",
        "gcloud container clusters get-credentials",
    ]
    failed = cloud.run("gke.sh", "cluster", *GKE, *cluster, answers={"node-pools": [[1, "no quota"]]})
    assert failed.returncode == 1
    assert len(cloud.calls("get-credentials")) == 1  # of the first


def test_an_image_holds_the_commit_and_nothing_else_of_the_folder(cloud):
    found = cloud.run("gke.sh", "image", *GKE)
    assert found.returncode == 0, found.stderr
    with tarfile.open(fileobj=io.BytesIO((cloud.folder / "stdin").read_bytes())) as context:
        names = set(context.getnames())
    assert {"launch/Dockerfile", "requirements.txt", "constraints.txt", "dwt_jax/__main__.py"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv"))]
    assert cloud.calls()[-1] == ["docker", "push", "images/dwt:1"]
    failed = cloud.run("gke.sh", "image", *GKE, answers={"build": [[1, "no space"]]})
    assert failed.returncode == 1
    assert len(cloud.calls("push")) == 1  # of the first


@pytest.mark.parametrize(
    ("status", "queued_again"), [(75, True), (0, False), (2, False), (1, False), (137, False)]
)
def test_a_slurm_job_queues_itself_again_when_it_was_stopped(cloud, status, queued_again):
    answers = {"srun": [[status, ""]], "squeue": [[0, "RUNNING"]]}
    found = cloud.run("slurm.sbatch", *TRAIN, answers=answers, SLURM_CPUS_PER_TASK="8")
    assert found.returncode == status
    (call,) = cloud.calls("srun")
    assert call[-len(TRAIN) :] == TRAIN
    assert {"--kill-on-bad-exit=0", "--cpus-per-task=8"} <= set(call)
    assert [call[1:] for call in cloud.calls("scontrol")] == [["requeue", "17"]] * queued_again


@pytest.mark.parametrize(("state", "queued_again"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_signal_reaches_the_processes_of_a_slurm_job(cloud, state, queued_again):
    """By scancel with a signal: srun itself would kill them (its stand-in ends with 137 then). A job that was
    cancelled (COMPLETING) stays so."""
    cloud.script({"srun": [[75, "until TERM"]], "squeue": [[0, state]]})
    command = ["bash", LAUNCH / "slurm.sbatch", *TRAIN]
    job = subprocess.Popen(command, cwd=ROOT, env=cloud.env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (cloud.folder / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.terminate()
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 75, said
    assert cloud.calls("scancel") == [["scancel", "--signal=TERM", "17"]]
    assert bool(cloud.calls("scontrol")) == queued_again


def test_a_job_that_was_queued_again_does_not_ask_again_whether_it_fits(cloud):
    found = cloud.run("slurm.sbatch", *TRAIN, PREFLIGHT="h100:8", SLURM_RESTART_COUNT="1")
    assert found.returncode == 0, found.stderr
    assert not cloud.calls("compile")


def test_what_sbatch_reads_of_the_slurm_script():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text.partition("set -e")[0], re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # one process a GPU, all of them visible
    assert re.fullmatch(r"B:TERM@\d+", options["signal"])
    assert {"requeue", "time", "open-mode"} <= set(options)
    assert "gpus-per-task" not in options


TASK = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_the_skypilot_task():
    assert TASK["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert TASK["envs"]["VERB"].split()[0] == "train"
    volume = yaml.safe_load((LAUNCH / "skypilot_volume.yaml").read_text())
    assert TASK["volumes"] == {"/shared": volume["name"]}
    assert volume["config"]["access_mode"] == "ReadWriteMany"
    assert subprocess.run(["bash", "-n", "-c", TASK["setup"]], check=False).returncode == 0


@pytest.mark.parametrize("preflight", ["", "h100:8"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_what_skypilot_runs_on_a_node(cloud, nodes, preflight):
    program = cloud.folder / "programs" / "python-of-preflight"
    program.write_text(
        '#!/bin/sh\necho "$JAX_COORDINATOR_ADDRESS,$JAX_NUM_PROCESSES,$JAX_PROCESS_ID" "$@"\nexit 75\n'
    )
    sky = {
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
        "SKYPILOT_NODE_RANK": "1",
    }
    env = {**cloud.env, **sky, **TASK["envs"], "PREFLIGHT": preflight}
    done = subprocess.run(
        ["bash", "-c", TASK["run"]], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    if preflight:  # alone, and what it ends with ends the job
        assert done.stdout == f",, -m dwt_jax compile --topology=h100:8 {TASK['envs']['VERB'].split()[1]}\n"
    else:
        who = "10.0.0.4:8476,2,1" if nodes == 2 else ",,"
        assert done.stdout == f"{who} -m dwt_jax {TASK['envs']['VERB']}\n"
