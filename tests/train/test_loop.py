"""Whole runs: what is left behind, and that no interruption changes it."""

import errno
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dwt_jax.config_loader import load_config
from dwt_jax.distributed.shutdown import Preempted, TrainingFailed
from dwt_jax.errors import UserError
from dwt_jax.eval import likelihood
from dwt_jax.models import flops
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.runs import metric_writer
from dwt_jax.runs.load import load_model
from dwt_jax.runs.pretrained import params_digest
from dwt_jax.runs.run_dir import read_run_config, run_lock
from dwt_jax.train import loop, setup
from dwt_jax.train import step as steps
from dwt_jax.train.loop import train
from helpers.run_records import assert_same_run, cut_after, records, summary
from helpers.runs import dwt, environment, project_with_teacher, start


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(config:rows, folder): a tiny corpus, prepared, and a trained teacher."""
    return project_with_teacher(tmp_path_factory.mktemp("project"), steps=30)


def taught(project, **overrides: str) -> dict[str, str]:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return {"teacher.path": str(project[1] / "teacher"), "distill.preset": "paper_decay", **keys}


def options(spec: str, overrides: dict[str, str], workdir: Path) -> list[str]:
    extra = [f"--config.{key}={value}" for key, value in overrides.items()]
    return ["train", f"--config={spec}", *extra, f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def whole(project):
    """An uninterrupted run with a teacher."""
    workdir = project[1] / "whole"
    train(load_config(project[0], taught(project)), workdir)
    return workdir


def test_a_run_leaves_what_the_design_says(whole):
    names = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json", "run.json", "tokenizer", "metrics.jsonl", "evaluations.jsonl", "checkpoints", "model",
        "documents.npz", "summary.json",
    }  # fmt: skip
    last = records(whole)[-1]
    assert last["step"] == 12
    keys = "loss hard_loss soft_loss soft_loss_at_1 teacher_hard_loss alpha_hard alpha_soft temperature"
    keys += " learning_rate grad_norm tokens_per_second mfu data_wait"
    assert set(keys.split()) <= last.keys()
    assert last["teacher_hard_loss"] > 0
    assert last["soft_loss"] > 0
    assert [record["step"] for record in records(whole, "evaluations.jsonl")] == [4, 8, 12]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["flops"]["total"] == summary["flops"]["student"] + summary["flops"]["teacher_forward"]
    assert summary["flops"]["teacher_training"] > 0  # known: the teacher is a run of ours
    assert summary["teacher_steps"] == 12


def test_the_student_learns_and_loss_is_the_weighted_sum(project, whole):
    found = records(whole)
    assert found[-1]["hard_loss"] < found[0]["hard_loss"]
    for record in found:
        expected = record["alpha_hard"] * record["hard_loss"] + record["alpha_soft"] * record["soft_loss"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
        assert record["soft_loss"] == pytest.approx(record["soft_loss_at_1"], rel=1e-5)  # t = 1 here


def test_the_model_gives_the_same_logits_in_transformers(whole):
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from dwt_jax.models import bert
    from dwt_jax.runs.load import load_model

    model, info = AutoModelForMaskedLM.from_pretrained(whole / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    batch = tokenizer("The old [MASK] sees the green cat.", return_tensors="pt")
    assert tokenizer.mask_token_id in batch["input_ids"]
    with torch.no_grad():
        expected = model.eval()(**batch).logits.numpy()
    loaded = load_model(str(whole))
    tokens = jnp.asarray(batch["input_ids"].numpy())
    hidden = bert.encode(loaded.params, loaded.model, tokens, jnp.ones_like(tokens))
    found = lm_head_logits(loaded.params, loaded.model, hidden)[..., : loaded.model.vocab_size]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_student_of_another_family_than_its_teacher(project, tmp_path):
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp
    from transformers import AutoModelForMaskedLM

    from dwt_jax.models import family
    from dwt_jax.runs.load import load_model

    sizes = {"model__model_type": "modernbert", "model__global_attn_every_n_layers": "2"}
    recipe = {"mlm__probability": "0.4", "optimizer__kind": "muon", "optimizer__learning_rate__value": "1e-2"}
    train(load_config(project[0], taught(project, **sizes, **recipe)), tmp_path / "run")
    found = records(tmp_path / "run")
    assert found[-1]["teacher_hard_loss"] > 0
    assert found[-1]["hard_loss"] < found[0]["hard_loss"]
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(info.values())
    loaded = load_model(str(tmp_path / "run"))
    tokens = np.random.default_rng(0).integers(5, loaded.model.vocab_size, (2, 20)).astype(np.int32)
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor(tokens)).logits.numpy()
    hidden = family(loaded.model).encode(loaded.params, loaded.model, tokens, jnp.ones_like(tokens))
    logits = lm_head_logits(loaded.params, loaded.model, hidden)[..., : loaded.model.vocab_size]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def kill_at_random(arguments: list[str], rng: random.Random) -> bool:
    """Start the run, kill -9 it at a moment that may lie anywhere; whether steps had been taken."""
    process = start(*arguments)
    wanted = rng.choice([0, *rng.sample(range(1, 25), 4)])  # logged lines to wait for; 0: any moment
    seen = 0
    if wanted == 0:
        time.sleep(rng.uniform(1, 6))
    else:
        for line in process.stdout:
            seen += "tokens/s" in line
            if seen == wanted:
                time.sleep(rng.uniform(0, 0.2))
                break
    process.kill()
    process.wait()
    return seen > 0


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_equals_uninterrupted(project, tmp_path, kills):
    overrides = taught(project, train__steps="120", train__save_every="3", train__eval_every="40")
    train(load_config(project[0], overrides), tmp_path / "whole")
    arguments = options(project[0], overrides, tmp_path / "killed")
    rng = random.Random(kills)
    amid_steps = [kill_at_random(arguments, rng) for _ in range(kills)]
    assert any(amid_steps)
    last = dwt(*arguments)
    assert last.returncode == 0, last.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_killed_between_any_two_checkpoints_equals_uninterrupted(project, whole, tmp_path):
    """The same without chance: a run cut off right after each of its checkpoints."""
    for step in (4, 8):
        cut = tmp_path / f"cut{step}"
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "model")
        (cut / "summary.json").unlink()
        for later in (cut / "checkpoints").iterdir():
            if later.name.isdigit() and int(later.name) > step:
                shutil.rmtree(later)
        with open(cut / "metrics.jsonl", "a") as file:
            file.write('{"step": 12, "los')  # a line torn by the kill
        train(load_config(project[0], taught(project)), cut)
        assert_same_run(whole, cut)


def test_a_run_with_muon_resumes_bit_for_bit_and_counts_newton_schulz(project, whole, tmp_path, capsys):
    overrides = taught(project, optimizer__kind="muon", optimizer__ns_steps="3")
    summary = train(load_config(project[0], overrides), tmp_path / "muon")
    shape_flops = [[32, 32]] * 4 + [[32, 64]] * 2  # of a layer, the smaller side first; the head has one
    matrices = 2 * sum(4 * m**2 * n + 2 * m**3 for m, n in shape_flops) + 6 * 32**3
    adamw = json.loads((whole / "summary.json").read_text())["flops"]
    assert summary["flops"]["student"] == adamw["student"] + 12 * 3 * matrices
    assert summary["flops"]["teacher_forward"] == adamw["teacher_forward"]
    share = 12 * 3 * matrices / summary["flops"]["student"]
    line = f"muon: {share:.0%} of the student's FLOPs per step are Newton-Schulz iterations"
    assert capsys.readouterr().err.count(line) == 1
    cut_after(tmp_path / "muon", tmp_path / "cut", 4)
    for key, value in (("kind", "adamw"), ("ns_steps", "5"), ("momentum", "0.9"), ("adam_lr_ratio", "0.5")):
        changed = {**overrides, f"optimizer.{key}": value}
        if key == "kind":
            del changed["optimizer.ns_steps"]  # it has no effect with AdamW
        with pytest.raises(UserError, match=rf"optimizer\.{key} is .* there, '?{value}'? here"):
            train(load_config(project[0], changed), tmp_path / "cut")
    train(load_config(project[0], overrides), tmp_path / "cut")
    assert_same_run(tmp_path / "muon", tmp_path / "cut")
    assert "* Muon with AdamW, learning rate 0.003" in (tmp_path / "cut" / "model" / "README.md").read_text()


def test_an_evaluation_that_is_stopped_twice_is_made_up_for(project, whole, tmp_path, monkeypatch):
    """Stopped after step 4 and before its evaluation, resumed, stopped in that evaluation."""
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    (cut / "summary.json").unlink()
    (cut / "evaluations.jsonl").write_text("")
    for later in (cut / "checkpoints").iterdir():
        if later.name.isdigit() and int(later.name) > 4:
            shutil.rmtree(later)
    config = load_config(project[0], taught(project))
    with monkeypatch.context() as patched:
        patched.setattr(likelihood, "losses_per_document", lambda *_, **__: None)
        with pytest.raises(Preempted, match="stopped at step 4"):
            train(config, cut)
    train(config, cut)
    assert_same_run(whole, cut)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(project, tmp_path, number):
    overrides = taught(project, train__steps="400", train__eval_every="0", train__save_every="100")
    arguments = options(project[0], overrides, tmp_path / "stopped")
    process = start(*arguments)
    for line in process.stdout:
        if "step 10/" in line:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == 75, rest
    assert "Rerun the same command to resume." in rest
    saved = max(int(p.name) for p in (tmp_path / "stopped" / "checkpoints").iterdir() if p.name.isdigit())
    assert saved < 400
    again = dwt(*arguments)
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {saved}" in again.stderr


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(project, whole, tmp_path, capsys):
    cut = tmp_path / "damaged"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    (cut / "summary.json").unlink()
    data = max((cut / "checkpoints" / "12").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0x10
    data.write_bytes(content)
    train(load_config(project[0], taught(project)), cut)
    printed = capsys.readouterr().err
    assert "checkpoint 12 is damaged" in printed
    assert "resumed at step 8" in printed
    assert_same_run(whole, cut)


def test_another_config_in_the_same_directory_is_refused_with_the_keys(project, whole):
    with pytest.raises(UserError, match=r"optimizer\.weight_decay is 0\.01 there, 0\.1 here") as error:
        train(load_config(project[0], taught(project, optimizer__weight_decay="0.1")), whole)
    assert "\n" not in str(error.value)
    assert "train.steps" not in str(error.value)


def test_a_resumed_run_may_log_save_and_evaluate_at_other_steps(project, whole, tmp_path):
    """They do not change what is computed."""
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    (cut / "summary.json").unlink()
    for later in (cut / "checkpoints").iterdir():
        if later.name.isdigit() and int(later.name) > 4:
            shutil.rmtree(later)
    overrides = taught(
        project,
        train__log_every="3",
        train__save_every="2",
        train__keep_checkpoints="9",
        train__eval_every="0",
    )
    train(load_config(project[0], overrides), cut)
    saved = sorted(int(path.name) for path in (cut / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == [4, 6, 8, 10, 12]
    models = [load_model(str(path)).params for path in (whole, cut)]
    assert params_digest(models[0]) == params_digest(models[1])


WSD = {"kind": "warmup_stable_decay", "decay_start": "0.75"}


@pytest.mark.parametrize(
    ("schedule", "checkpoint", "is_allowed"),
    [
        ({"kind": "constant"}, 12, True),  # of a run that is complete
        (WSD, 8, True),  # before its decay
        (WSD, 12, False),
        ({"kind": "linear"}, 8, False),
        ({"kind": "constant", "warmup_fraction": "0.5"}, 8, False),  # in the warmup of 24 steps
        ({"kind": "constant", "warmup_fraction": "0.25"}, 8, True),
    ],
)
def test_a_run_may_be_given_more_steps_while_its_rate_is_constant(
    project, tmp_path, capsys, schedule, checkpoint, is_allowed
):
    """As if it had had them from the start, if there is no warmup."""
    keys = {f"optimizer.learning_rate.{key}": value for key, value in schedule.items()}
    keys = {"optimizer.learning_rate.warmup_fraction": "0", "train.eval_every": "0", **keys}
    train(load_config(project[0], keys), tmp_path / "run")
    if checkpoint < 12:
        cut_after(tmp_path / "run", tmp_path / "cut", checkpoint)
    else:
        (tmp_path / "run").rename(tmp_path / "cut")
    longer = load_config(project[0], {**keys, "train.steps": "24"})
    if not is_allowed:
        with pytest.raises(UserError, match=r"train\.steps is 12 there, 24 here"):
            train(longer, tmp_path / "cut")
        return
    train(longer, tmp_path / "cut")
    assert (
        f"train.steps is 24 now, it was 12; the run continues from step {checkpoint},"
        in capsys.readouterr().err
    )
    assert summary(tmp_path / "cut")["steps"] == read_run_config(tmp_path / "cut").train.steps == 24
    if "warmup_fraction" not in schedule:
        train(longer, tmp_path / "whole")
        models = [load_model(str(tmp_path / name)).params for name in ("whole", "cut")]
        assert params_digest(models[0]) == params_digest(models[1])


def test_more_steps_are_refused_where_the_teacher_would_have_left_later(project, tmp_path):
    """It is gone at step 8 with both numbers; FLOPs and teacher steps are counted from the schedule."""
    keys = {"distill.alpha_soft": "1", "distill.alpha_soft.kind": "piecewise"}
    keys |= {"distill.alpha_soft.decay_start": "0.25", "optimizer.learning_rate": "3e-3"}
    keys |= {"teacher.path": str(project[1] / "teacher"), "train.save_every": "8"}
    train(load_config(project[0], keys), tmp_path / "run")
    cut_after(tmp_path / "run", tmp_path / "cut", 8)
    with pytest.raises(UserError, match=r"train\.steps is 12 there, 24 here"):
        train(load_config(project[0], {**keys, "train.steps": "24"}), tmp_path / "cut")


def test_a_run_is_trained_where_files_cannot_be_locked(project, whole, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    train(load_config(project[0], taught(project)), tmp_path / "unlocked")
    assert "cannot be locked against other processes (no locks on its file system)" in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "unlocked")


def test_a_finished_run_is_not_repeated(project, whole, capsys):
    before = (whole / "summary.json").read_text()
    train(load_config(project[0], taught(project)), whole)
    assert "already finished" in capsys.readouterr().err
    assert (whole / "summary.json").read_text() == before


def test_a_finished_run_writes_its_lost_model_again(project, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    train(load_config(project[0], taught(project)), tmp_path / "run")
    assert "model/ is missing; it is rewritten" in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "run")


def test_a_finished_run_without_model_and_checkpoints_keeps_its_metrics(project, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("model", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name)
    with pytest.raises(UserError, match="a finished run without model/ and without checkpoints"):
        train(load_config(project[0], taught(project)), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_that_has_lost_its_checkpoints_begins_again_and_says_so(project, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "summary.json").unlink()
    train(load_config(project[0], taught(project)), tmp_path / "run")
    assert "no checkpoint of the steps before: the run begins again" in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "run")
    train(load_config(project[0], taught(project)), tmp_path / "new")
    assert "begins again" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"seed": 0, "pla'])
def test_a_run_with_damaged_files_goes_on_from_its_checkpoints(project, whole, tmp_path, capsys, content):
    """A power cut may leave files empty, or only their beginning."""
    shutil.copytree(whole, tmp_path / "run")
    names = ("config.json", "run.json", "summary.json")
    for name in names:
        (tmp_path / "run" / name).write_text(content)
    train(load_config(project[0], taught(project)), tmp_path / "run")
    captured = capsys.readouterr()
    assert "resumed at step 12" in captured.err
    for name in names:
        assert f"{name} is damaged; it is rewritten" in captured.err
    for name in names[:2]:
        before, after = (json.loads((run / name).read_text()) for run in (whole, tmp_path / "run"))
        assert {**after, "run_id": ""} == {**before, "run_id": ""}
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("damaged", "overrides", "message"),
    [
        (
            "run.json",
            {"optimizer__weight_decay": "0.1"},
            r"optimizer\.weight_decay is 0\.01 there, 0\.1 here",
        ),
        ("config.json", {"teacher__path": ""}, r"run\.teacher_digest is '[0-9a-f]+' there, '' here"),
    ],
)
def test_what_is_intact_of_a_damaged_run_is_still_compared(
    project, whole, tmp_path, damaged, overrides, message
):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / damaged).write_text("")
    config = {"distill.preset": "custom"} if damaged == "config.json" else {}
    with pytest.raises(UserError, match=message):
        train(load_config(project[0], {**taught(project, **overrides), **config}), tmp_path / "run")
    assert (tmp_path / "run" / damaged).read_text() == ""


def test_a_claim_that_was_cut_short_is_taken_up(project, tmp_path):
    """Killed after the tokenizer was there, before config.json was."""
    shutil.copytree(project[1] / "rows" / "tokenizer", tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "run.json").write_text("{}")
    train(load_config(project[0], {"train.steps": "1"}), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()


def test_two_processes_do_not_train_in_one_directory(project, tmp_path):
    with (
        run_lock(tmp_path / "run"),
        pytest.raises(UserError, match="another process trains here"),
    ):
        train(load_config(project[0]), tmp_path / "run")


def test_a_moved_teacher_is_the_same_teacher(project, whole, tmp_path, capsys):
    shutil.copytree(project[1] / "teacher" / "model", tmp_path / "elsewhere")
    train(load_config(project[0], {**taught(project), "teacher.path": str(tmp_path / "elsewhere")}), whole)
    assert "already finished" in capsys.readouterr().err


def test_tensorboard_files_are_written(project, tmp_path):
    train(load_config(project[0], {"train.steps": "2", "train.tensorboard": "true"}), tmp_path / "run")
    assert [*(tmp_path / "run" / "tensorboard").glob("events.*")]


def test_a_new_volume_is_empty(project, tmp_path):
    (tmp_path / "run" / "lost+found").mkdir(parents=True)
    train(load_config(project[0], {"train.steps": "1"}), tmp_path / "run")
    assert {"lost+found", "summary.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


WANDB = """
import json, pathlib
def init(**options): write("init", options)
def log(record, step): write("log", step)
def finish(): write("finish", None)
def write(kind, value):
    with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as file:
        file.write(json.dumps([kind, value]) + chr(10))
"""


@pytest.fixture
def wandb_calls(tmp_path, monkeypatch):
    """A package in the place of wandb, without a key; the calls that it received."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield lambda: records(tmp_path / "packages", "calls.jsonl")
    sys.modules.pop("wandb", None)


def test_wandb_has_the_config_and_an_id_of_the_run(project, tmp_path, monkeypatch, wandb_calls):
    """A resumed run keeps its id; another run in the same directory has another."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    config = load_config(project[0], {"train.steps": "2", "train.wandb_project": "p"})

    def started():
        train(config, tmp_path / "run")
        return [value for kind, value in wandb_calls() if kind == "init"][-1]

    first = started()
    assert first["config"]["optimizer"]["learning_rate"]["value"] == 3e-3
    assert (first["project"], first["name"], first["resume"]) == ("p", "run", "allow")
    assert first["id"] == json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
    (tmp_path / "run" / "summary.json").unlink()
    assert started()["id"] == first["id"]
    shutil.rmtree(tmp_path / "run")
    assert started()["id"] != first["id"]


def test_a_missing_wandb_key_is_told_before_the_data_are_prepared(
    project, tmp_path, monkeypatch, wandb_calls
):
    config = load_config(project[0], {"train.wandb_project": "p", "data.path": ""})
    monkeypatch.setattr(setup, "get_prepared", lambda *_, **__: pytest.fail("told too late"))
    message = "train.wandb_project is 'p', expected a key for api.wandb.ai in WANDB_API_KEY"
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0000")
    assert metric_writer.wandb_problem() == ""
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "wandb.example.org" in metric_writer.wandb_problem()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert metric_writer.wandb_problem() == ""


def test_a_folder_with_other_files_is_refused(project, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds files but no run"):
        train(load_config(project[0]), tmp_path)


def test_a_teacher_of_another_vocabulary_is_refused_with_the_first_difference(project, tmp_path):
    shutil.copytree(project[1] / "teacher" / "model", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    old = next(token for token, i in vocabulary.items() if i == 17)
    vocabulary["zebra"] = vocabulary.pop(old)
    path.write_text(json.dumps(content))
    (tmp_path / "other" / "vocab.txt").unlink(missing_ok=True)
    with pytest.raises(UserError, match=rf"token 17 is 'zebra', expected '{old}'"):
        train(load_config(project[0], {"teacher.path": str(tmp_path / "other")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_teacher_is_switched_off_once_its_weight_is_zero_for_good(project, tmp_path, capsys):
    overrides = taught(project, distill__preset="knowledge_inheritance", train__steps="16")
    summary = train(load_config(project[0], overrides), tmp_path / "ki")
    assert "step 4: alpha_soft is 0 from here on; continuing without the teacher" in capsys.readouterr().err
    assert summary["teacher_steps"] == 4
    found = records(tmp_path / "ki")
    assert [bool(r["teacher_hard_loss"]) for r in found] == [True, True, *[False] * 6]
    assert found[-1]["teacher_flops"] == found[1]["teacher_flops"] > 0


def test_until_beaten_ends_with_the_teacher_beaten_and_resumes_alike(project, tmp_path, capsys):
    """A teacher of two steps is beaten soon."""
    spec, folder = project
    bad = folder / "bad"
    if not bad.exists():
        train(load_config(spec, {"train.steps": "2", "model.num_hidden_layers": "1"}), bad)
    overrides = {
        "teacher.path": str(bad),
        "distill.alpha_soft.kind": "until_matched",
        "distill.gap_ema_decay": "0.5",
        "train.steps": "24",
    }
    capsys.readouterr()
    summary = train(load_config(spec, overrides), tmp_path / "whole")
    assert "continuing without the teacher" in capsys.readouterr().err
    switch = summary["teacher_steps"]
    assert 0 < switch < 24
    assert switch % 2 == 0
    for step in (switch - switch % 4, 20):
        cut = tmp_path / f"cut{step}"
        shutil.copytree(tmp_path / "whole", cut)
        shutil.rmtree(cut / "model")
        (cut / "summary.json").unlink()
        for later in (cut / "checkpoints").iterdir():
            if later.name.isdigit() and int(later.name) > step:
                shutil.rmtree(later)
        train(load_config(spec, overrides), cut)
        assert_same_run(tmp_path / "whole", cut)


def test_runs_that_differ_in_weights_and_seed_share_one_compilation(project, tmp_path):
    steps.TRACE_COUNTS.clear()
    steps.jit_train_step.cache_clear()
    for i, preset in enumerate(("paper_normal", "paper_strong", "paper_decay")):
        overrides = taught(project, distill__preset=preset, seed=str(i), train__steps="4")
        train(load_config(project[0], overrides), tmp_path / preset)
    assert steps.TRACE_COUNTS == {"teacher": 1}


def test_a_masking_rate_that_changes_is_traced_once_and_resumes_bit_for_bit(project, whole, tmp_path):
    overrides = {
        "mlm.probability": "0.4",
        "mlm.probability.kind": "linear",
        "mlm.probability.end": "0.1",
        "train.log_every": "1",
    }
    steps.TRACE_COUNTS.clear()
    steps.jit_train_step.cache_clear()
    summary = train(load_config(project[0], overrides), tmp_path / "whole")
    assert steps.TRACE_COUNTS == {"no_teacher": 1}
    predictions = [record["predictions_per_row"] for record in records(tmp_path / "whole")]
    assert predictions == [round((0.4 - 0.3 * step / 12) * 32) for step in range(12)]
    for step in (4, 8):
        cut_after(tmp_path / "whole", tmp_path / f"cut{step}", step)
        train(load_config(project[0], overrides), tmp_path / f"cut{step}")
        assert_same_run(tmp_path / "whole", tmp_path / f"cut{step}")
    # P is that of the highest rate: so many predictions are computed, and counted, at every step.
    config = read_run_config(tmp_path / "whole")
    assert summary["flops"]["student"] == 12 * flops.training_step_flops(config.model, 8, 32, round(0.4 * 32))
    # Evaluation has 15 % of the tokens, as that of any run.
    held_out = [records(run, "evaluations.jsonl")[-1]["predictions"] for run in (tmp_path / "whole", whole)]
    assert held_out[0] == held_out[1]


def test_an_older_run_with_a_number_for_the_masking_rate_resumes(project, whole, tmp_path):
    cut_after(whole, tmp_path / "cut", 8)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    config["mlm"]["probability"] = config["mlm"]["probability"]["value"]
    for key in ("decay_type", "boundaries", "boundary_values"):
        del config["optimizer"]["learning_rate"][key], config["distill"]["alpha_soft"][key]
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config))
    train(load_config(project[0], taught(project)), tmp_path / "cut")
    assert_same_run(whole, tmp_path / "cut")


def test_a_silent_transfer_in_the_loop_is_an_error(project, tmp_path, monkeypatch):
    real = loop.jit_train_step

    def careless(spec, mesh):
        step = real(spec, mesh)
        return lambda state, teacher, batch, schedules, *more: step(
            state, teacher, batch, jax.tree.map(lambda _: np.float32(1), schedules), *more
        )

    monkeypatch.setattr(loop, "jit_train_step", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(load_config(project[0], {"train.steps": "2"}), tmp_path / "run")


def test_too_many_non_finite_steps_end_the_run_and_leave_the_checkpoint(project, tmp_path, monkeypatch):
    real, spoil = (
        loop.jit_train_step,
        jax.jit(lambda schedules: jax.tree.map(lambda x: x * np.nan, schedules)),
    )

    def from_the_seventh_on(spec, mesh):
        step, count = real(spec, mesh), itertools.count(1)
        return lambda state, teacher, batch, schedules, *more: step(
            state, teacher, batch, spoil(schedules) if next(count) > 6 else schedules, *more
        )

    monkeypatch.setattr(loop, "jit_train_step", from_the_seventh_on)
    with pytest.raises(TrainingFailed, match="not finite for"):
        train(load_config(project[0], {"train.max_consecutive_nonfinite": "3"}), tmp_path / "run")
    newest = load_model(str(tmp_path / "run"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(newest.params))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("loss", "predictions", "problem"),
    [
        (np.nan, 5, "the held-out loss is nan"),
        (np.inf, 5, "the held-out loss is inf"),
        (0.0, 5, "the held-out loss is 0"),
        (np.nan, 0, "no token of the held-out rows can be predicted"),
    ],
)
@pytest.mark.parametrize("eval_every", ["4", "0"])
def test_a_held_out_loss_that_cannot_be_right_ends_the_run(
    project, tmp_path, monkeypatch, loss, predictions, problem, eval_every
):
    """At the first evaluation, and again when the run is resumed: it is never complete."""
    documents = np.array([loss, loss])[: 2 * bool(predictions)], *(np.full(2 * bool(predictions), 5.0),) * 3
    losses = likelihood.DocumentLosses(*documents)
    monkeypatch.setattr(likelihood, "losses_per_document", lambda *_, **__: losses)
    config = load_config(project[0], {"train.steps": "6", "train.eval_every": eval_every})
    for _ in range(2):
        with pytest.raises(
            TrainingFailed, match=f"at step {eval_every if eval_every == '4' else 6} {problem}"
        ):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_whose_last_losses_are_not_finite_is_not_complete(project, tmp_path, monkeypatch):
    """Fewer such steps than train.max_consecutive_nonfinite."""
    real, spoil = (
        loop.jit_train_step,
        jax.jit(lambda schedules: jax.tree.map(lambda x: x * np.nan, schedules)),
    )

    def last_steps(spec, mesh):
        step, count = real(spec, mesh), itertools.count(1)
        return lambda state, teacher, batch, schedules, *more: step(
            state, teacher, batch, spoil(schedules) if next(count) > 8 else schedules, *more
        )

    monkeypatch.setattr(loop, "jit_train_step", last_steps)
    with pytest.raises(TrainingFailed, match="at step 12 the training loss is nan, expected a loss above 0"):
        train(load_config(project[0]), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("kilobytes", [8, 80])  # the first file of a checkpoint, one in its middle
def test_no_room_for_a_checkpoint_is_one_line_and_status_1(project, tmp_path, kilobytes):
    arguments = options(project[0], {"train.steps": "100000", "train.eval_every": "0"}, tmp_path / "run")
    command = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "-", sys.executable, "-m", "dwt_jax"]
    env = environment(JAX_ENABLE_COMPILATION_CACHE="false")
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    *messages, last = done.stderr.splitlines()
    assert last.startswith(f"dwt: {tmp_path / 'run' / 'checkpoints'}: a checkpoint cannot be written: ")
    assert last.endswith("File too large; those before it are intact. Rerun the same command to resume.")
    assert all(line.startswith("run: ") for line in messages), messages
    assert max(record["step"] for record in records(tmp_path / "run")) < 100


def test_a_run_killed_after_its_last_evaluation_ends_though_a_number_there_is_null(project, whole, tmp_path):
    """One held-out document has no standard error, a diverged run no perplexity: null in the file."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    path = run / "evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1] |= {"standard_error": None, "perplexity": None}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert dwt(*options(project[0], taught(project), run)).returncode == 0
    held_out = json.loads((run / "summary.json").read_text())["held_out"]
    assert held_out["standard_error"] is held_out["perplexity"] is None
    assert f"| loss (nats) | {held_out['held_out_loss']:.4f} |" in (run / "model" / "README.md").read_text()


def test_a_teacher_that_is_not_there_is_told_before_the_data_are_prepared(project, tmp_path):
    overrides = {"teacher.path": str(tmp_path / "techer"), "data.path": ""}
    with pytest.raises(UserError, match=r"teacher\.path: .*techer: no such directory"):
        train(load_config(project[0], overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_no_lock_in_a_folder_of_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with run_lock(tmp_path):
        pass
    assert [child.name for child in tmp_path.iterdir()] == ["notes.txt"]


def test_epochs_become_steps(project, tmp_path):
    index = json.loads((project[1] / "rows" / "index.json").read_text())
    summary = train(load_config(project[0], {"train.steps": "0", "train.epochs": "1"}), tmp_path / "run")
    assert summary["steps"] == -(-index["splits"]["train"]["rows"] // 8)
