"""Runs grown in the middle of training, and the warm-up of new entries."""

import json
import re
import shlex
import shutil

import jax
import numpy as np
import optax
import pytest

from dwt_jax.config_loader import load_config
from dwt_jax.data import dataset as data_rows
from dwt_jax.errors import UserError
from dwt_jax.growth import remap_run
from dwt_jax.models.bert import PARAM_AXES
from dwt_jax.models.common.logical_axes import path_name
from dwt_jax.remap.optimizer_state import moment_states, new_entry_mask
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.load import load_model
from dwt_jax.train.loop import train
from dwt_jax.train.run_state import init_or_restore_state
from dwt_jax.train.setup import setup_run
from helpers.growth import DEEPER, WIDER, growth_overrides
from helpers.run_records import assert_same_run, cut_after, records, summary
from helpers.runs import dwt, prepared_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(config:rows, folder): a tiny prepared corpus, and a run with checkpoints 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("growth")
    spec = prepared_project(folder)
    train(load_config(spec), folder / "small")
    return spec, folder


def grow(project, out, method, *overrides, step=8, moments="carry", run=None):
    keys = {"init.method": method, "init.from": "x"}
    for extra in overrides:
        keys |= extra
    run = run or project[1] / "small"
    return remap_run.grow_run(str(run), load_config(project[0], keys), out, step, moments)


def state_of(workdir, spec, overrides=None):
    """The state with which a run resumes, on the host, and its step."""
    run = setup_run(load_config(spec, overrides or {}), workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", 3)
    state, step = init_or_restore_state(run, checkpoints)
    checkpoints.close()
    return jax.device_get(state), step


def adam(state):
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    return next(filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam)))


def test_growth_to_same_size_equals_uninterrupted_run(project, tmp_path):
    """Step, moments, batches, masks, dropout and learning rate continue: bitwise the same end."""
    report = grow(project, tmp_path / "same", "stack")
    assert report.function_preserving
    assert report.logit_drift["max"] == 0
    train(load_config(project[0]), tmp_path / "same")
    assert_same_run(project[1] / "small", tmp_path / "same", begin=8)
    assert summary(tmp_path / "same")["flops"]["total"] == summary(project[1] / "small")["flops"]["total"]
    grow(project, tmp_path / "reset", "stack", moments="reset")
    train(load_config(project[0]), tmp_path / "reset")
    with pytest.raises(AssertionError):
        assert_same_run(project[1] / "small", tmp_path / "reset", begin=8)


def test_growth_of_a_run_with_muon(project, tmp_path):
    """To the same size it ends bitwise as the uninterrupted run; AdamW's moments are not Muon's."""
    muon = {"optimizer.kind": "muon"}
    train(load_config(project[0], muon), tmp_path / "small")
    grow(project, tmp_path / "same", "stack", muon, run=tmp_path / "small")
    train(load_config(project[0], muon), tmp_path / "same")
    assert_same_run(tmp_path / "small", tmp_path / "same", begin=8)
    message = "optimizer.kind is 'muon', expected 'adamw' as in .*small"
    with pytest.raises(UserError, match=message) as error:
        grow(project, tmp_path / "other", "hyperclone", {**muon, **WIDER})
    assert "\n" not in str(error.value)
    grow(project, tmp_path / "other", "hyperclone", {**muon, **WIDER}, moments="reset")
    state, step = state_of(tmp_path / "other", project[0], {**muon, **WIDER})
    assert step == 8
    assert not any(np.any(x) for x in jax.tree.leaves([node.mu for node in moment_states(state.opt_state)]))


def test_growth_of_a_run_with_batch_ramp(project, tmp_path):
    """It goes on with the next rows, and is refused where these would be others."""
    ramp = {"train.batch_ramp": "[4]", "train.batch_ramp_fraction": "0.5"}
    train(load_config(project[0], ramp), tmp_path / "small")
    grow(project, tmp_path / "same", "stack", ramp, run=tmp_path / "small")
    train(load_config(project[0], ramp), tmp_path / "same")
    assert_same_run(tmp_path / "small", tmp_path / "same", begin=8)
    longer = {**ramp, "train.steps": "24", "train.batch_ramp_fraction": "0.25"}  # the same stages
    grow(project, tmp_path / "longer", "stack", longer, run=tmp_path / "small")
    for keys, message in (
        ({}, r"train\.batch_ramp is \[\] over 0\.0 of 12 steps, expected the 40 rows .* found 64"),
        ({**ramp, "train.batch_ramp": "[2,4]"}, r"train\.batch_ramp is \[2, 4\] over .* found 34"),
        ({**ramp, "train.steps": "16"}, r"train\.batch_ramp is \[4\] over 0\.5 of 16 steps, .* found 32"),
    ):
        with pytest.raises(UserError, match=message) as error:
            grow(project, tmp_path / "other", "stack", keys, run=tmp_path / "small")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "other").exists()


def test_wider_student_continues_from_source_run(project, tmp_path):
    """From the command line, and resumed as any run."""
    keys = [f"--config.{key}={value}" for key, value in {**WIDER, "init.new_param_warmup": "0.5"}.items()]
    config, out = f"--config={project[0]}", tmp_path / "big"
    small = project[1] / "small"
    result = dwt(
        "remap-run",
        f"--run={small}",
        "--step=8",
        "--carry",
        "--method=net2net",
        f"--out={out}",
        config,
        *keys,
    )
    assert result.returncode == 0, result.stderr
    assert "preserved exactly" in result.stdout
    command = result.stderr.split("continue with: dwt ")[1].split()
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name.isdigit()] == ["8"]
    source_result, new = (
        dwt("evaluate", f"--model={m}", f"--data={project[1] / 'rows'}", "--json") for m in (small, out)
    )
    before = next(r for r in records(small, "evaluations.jsonl") if r["step"] == 8)
    assert json.loads(new.stdout)["held_out_loss"] == pytest.approx(before["held_out_loss"], abs=1e-5)
    result = dwt(*command)  # with `init.*`, which is optional
    assert result.returncode == 0, result.stderr
    assert "resumed at step 8" in result.stderr
    assert f"grown from {small} (2 x 32, step 8) by net2net" in result.stderr
    assert [r["step"] for r in records(out)] == [10, 12]
    cost, per_step = summary(small)["flops"]["student"] * 8 / 12, records(out)
    big = (per_step[1]["student_flops"] - per_step[0]["student_flops"]) / 2
    assert summary(out)["flops"]["student"] == pytest.approx(cost + 4 * big)
    assert summary(out)["init"] == {
        "method": "net2net", "function_preserving": True, "step": 8,
        "num_hidden_layers": 2, "hidden_size": 32,
    }  # fmt: skip
    assert (
        "after 8 of its steps; before the next step it computed the same function"
        in (out / "model" / "README.md").read_text()
    )
    assert json.loads(source_result.stdout)["held_out_loss"] > summary(out)["held_out"]["held_out_loss"] - 1
    # Resumed from the grown state, without the source run: the same end.
    shutil.copytree(small, tmp_path / "old")
    record = json.loads((out / "init.json").read_text())
    assert record["from"] == str(small)
    cut_after(out, tmp_path / "cut", 8)
    overrides = growth_overrides(project, "net2net", WIDER, init__new_param_warmup="0.5")
    train(load_config(project[0], overrides), tmp_path / "cut")
    assert_same_run(out, tmp_path / "cut", begin=8)


@pytest.mark.parametrize(("moments", "count"), [("reset", 0), ("carry", 8), ("asymmetric", 8)])
def test_moments_option(project, tmp_path, moments, count):
    grow(project, tmp_path / "run", "hyperclone", WIDER, moments=moments)
    state, step = state_of(tmp_path / "run", project[0], WIDER)
    grown_adam = adam(state)
    assert step == state.step == 8
    assert grown_adam.count == count
    table = grown_adam.mu["embeddings"]["word"]["embedding"]
    old, _ = state_of(cut_small_run(project, tmp_path / "small", 8), project[0])
    source_moments = adam(old).mu["embeddings"]["word"]["embedding"]
    if moments == "reset":
        assert not table.any()
        return
    assert source_moments.any()
    half = source_moments.shape[1]
    # The word table is an output (embedding) and, tied, the decoder: the chain rule halves its moments.
    np.testing.assert_allclose(table[:, :half], source_moments / 2, rtol=1e-6)
    expected = source_moments / 2 if moments == "carry" else np.zeros_like(source_moments)
    np.testing.assert_allclose(table[:, half:], expected, rtol=1e-6)


def cut_small_run(project, folder, step):
    cut_after(project[1] / "small", folder, step)
    return folder


def test_gates_open_after_growth_and_grown_run_grows_again(project, tmp_path):
    gated = {**WIDER, **DEEPER, "init.gate_warmup": "0.5"}
    report = grow(project, tmp_path / "gated", "masked", gated, step=4)
    assert report.function_preserving
    again = {**gated, "init.method": "masked", "init.from": "elsewhere"}
    train(load_config(project[0], again), tmp_path / "gated")
    shares = {r["step"]: r["gate"] for r in records(tmp_path / "gated")}
    assert shares == pytest.approx({6: 1 / 4, 8: 3 / 4, 10: 1, 12: 1})
    before = next(r for r in records(project[1] / "small", "evaluations.jsonl") if r["step"] == 4)
    first = next(r for r in records(tmp_path / "gated", "evaluations.jsonl") if r["step"] == 4)
    assert first["held_out_loss"] == pytest.approx(before["held_out_loss"], abs=1e-5)
    assert not load_model(str(tmp_path / "gated")).model.gated_layers
    deeper = {**WIDER, "model.num_hidden_layers": "4"}  # the gates are open: grows as an ordinary model
    grow(project, tmp_path / "next", "stack_top", deeper, run=tmp_path / "gated")
    train(load_config(project[0], deeper), tmp_path / "next")
    assert summary(tmp_path / "next")["init"]["num_hidden_layers"] == 3
    cut_after(tmp_path / "gated", tmp_path / "cut", 4)
    with pytest.raises(UserError, match="weighted_norm true → false, expected true until its gates are open"):
        grow(project, tmp_path / "shut", "stack_top", deeper, run=tmp_path / "cut", step=4)
    assert not (tmp_path / "shut").exists()


def test_different_data_stream_exits_2_and_writes_nothing(project, tmp_path):
    small = f"--run={project[1] / 'small'}"
    for extra, message in (
        (["--config.seed=1"], "config: seed is 1, expected 0 as in"),
        (["--config.train.batch_size=16"], "config: train.batch_size is 16, expected 8 as in"),
        (["--config.mlm.probability=0.3"], "config: mlm.probability.value is 0.3, expected 0.15 as in"),
        (["--config.train.steps=8"], "config: init.step is 8, expected less than train.steps (8)"),
        (["--step=5"], "--step is 5, expected a checkpoint that"),
        (["--config.model.hidden_size=48"], "config: init.method: hyperclone: hidden_size 32 → 48"),
        (["--seed=1"], "remap-run: unrecognized arguments: --seed=1"),
        (["--model=x"], "remap-run: unrecognized arguments: --model=x"),
    ):
        run = [small, *([] if any(m.startswith("--step") for m in extra) else ["--step=8"])]
        result = dwt(
            "remap-run",
            *run,
            "--method=hyperclone",
            f"--config={project[0]}",
            f"--out={tmp_path / 'out'}",
            *extra,
        )
        assert result.returncode == 2, (extra, result.stdout)
        assert message in result.stderr, (message, result.stderr)
        assert result.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_remap_reads_saved_checkpoint_of_run(project, tmp_path):
    keys = [f"--config.{key}={value}" for key, value in WIDER.items()]
    small, out = f"--model={project[1] / 'small'}", f"--out={tmp_path / 'out'}"
    result = dwt("remap", small, "--step=4", "--method=hyperclone", out, f"--config={project[0]}", *keys)
    assert result.returncode == 0, result.stderr
    source = load_model(str(project[1] / "small"), step=4)
    source_table, vocab_size = source.params["embeddings"]["word"]["embedding"], source.model.vocab_size
    grown_table = load_model(str(tmp_path / "out")).params["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(
        grown_table[:vocab_size, : source_table.shape[1]], source_table[:vocab_size]
    )


def test_not_a_run_or_not_grown_raises(project, tmp_path):
    with pytest.raises(UserError, match="is not a run with checkpoints"):
        grow(project, tmp_path / "out", "stack", run=project[1] / "small" / "model")
    with pytest.raises(UserError, match=r"init\.step is 4, expected 0: only dwt remap-run sets it"):
        train(load_config(project[0], growth_overrides(project, "stack", init__step="4")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    grow(project, tmp_path / "gone", "stack")
    shutil.rmtree(tmp_path / "gone" / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint, expected that of step 8 that dwt remap-run wrote"):
        train(load_config(project[0]), tmp_path / "gone")
    grow(project, tmp_path / "mine", "stack")
    with pytest.raises(UserError, match=r"init\.method is 'stack' there, 'middle' here"):
        train(load_config(project[0], growth_overrides(project, "middle")), tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 7}, "source is 7, expected an object as dwt remap-run wrote it"),
        ({"digest": None}, "digest is None, expected a string"),
        ({"training_flops": "many"}, "training_flops is 'many', expected a number or null"),
        ({"student_flops": True}, "student_flops is True, expected a number"),
        ({"from": ...}, "from is missing, expected a string"),
        ({"source": {"hidden_sise": 1}}, "hidden_sise"),
        (None, "init.json: missing, expected the record that dwt remap-run wrote"),
    ],
)
def test_damaged_record_raises_before_training(project, grown_run, tmp_path, change, message):
    shutil.copytree(grown_run, tmp_path / "run")
    record = tmp_path / "run" / "init.json"
    if change is None:
        record.unlink()
    else:
        content = {**json.loads(record.read_text()), **change}
        record.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(UserError, match=re.escape(message)):
        train(load_config(project[0]), tmp_path / "run")


@pytest.fixture(scope="module")
def grown_run(project, tmp_path_factory):
    """The small run, grown to its own size after 8 steps, with new_param_warmup."""
    out = tmp_path_factory.mktemp("once") / "run"
    grow(project, out, "stack", {"init.new_param_warmup": "0.25"})
    return out


def test_init_keys_left_out_are_read_from_run(project, grown_run, tmp_path):
    """Keys in the config are compared, the others are read from the run."""
    shutil.copytree(grown_run, tmp_path / "run")
    train(load_config(project[0], {"init.method": "stack", "init.from": "x"}), tmp_path / "run")
    shutil.copytree(grown_run, tmp_path / "other")
    other = {"init.method": "stack", "init.from": "x", "init.new_param_warmup": "0.5"}
    with pytest.raises(UserError, match=r"init\.new_param_warmup is 0\.25 there, 0\.5 here$"):
        train(load_config(project[0], other), tmp_path / "other")


def test_contradicting_flags_and_out_inside_run_exit_2(project, tmp_path):
    small, spec = project[1] / "small", project[0]
    command = [f"--run={small}", "--method=stack", f"--config={spec}"]
    for extra, message in (
        (["--carry", "--moments=reset"], "not allowed with argument"),
        (["--config.init.step=8"], "--config.init.step is '8', expected --step"),
        (["--config.init.method=fna"], "--config.init.method is 'fna', expected 'stack'"),
        (["--out", str(small / "checkpoints" / "grown")], f"is inside the run {small}, expected a path"),
    ):
        out = [] if "--out" in extra else [f"--out={tmp_path / 'out'}"]
        result = dwt("remap-run", *command, *out, *extra)
        assert result.returncode == 2, result.stdout
        assert message in result.stderr
        assert not list(tmp_path.iterdir())
    out = tmp_path / "with a blank"
    result = dwt("remap-run", *command, "--step=8", f"--out={out}")
    assert result.returncode == 0, result.stderr
    command_line = result.stderr.splitlines()[-1].partition("continue with: ")[2]
    again = dwt(*shlex.split(command_line)[1:])
    assert again.returncode == 0, again.stderr


def test_flops_of_source_that_becomes_teacher_count_once(project, tmp_path):
    """The same for a source that stays the teacher, or was it before."""
    small = project[1] / "small"
    cost = summary(small)["flops"]["total"]
    with_teacher = {"teacher.path": str(small), "distill.preset": "paper_normal"}
    train(
        load_config(project[0], growth_overrides(project, "stack", model__num_hidden_layers="3")),
        tmp_path / "old",
    )
    deeper = {"model.num_hidden_layers": "4"}
    for name, extra, expected in (("alone", {}, cost), ("taught", with_teacher, 0.0)):
        grow(project, tmp_path / name, "stack", deeper, extra, run=tmp_path / "old")
        assert json.loads((tmp_path / name / "init.json").read_text())["training_flops"] == expected


def test_incomplete_checkpoint_is_skipped(project, tmp_path):
    shutil.copytree(project[1] / "small", tmp_path / "small")
    for file in (tmp_path / "small" / "checkpoints" / "12" / "default" / "d").iterdir():
        file.unlink()
    out = f"--out={tmp_path / 'out'}"
    result = dwt("remap-run", f"--run={tmp_path / 'small'}", "--method=stack", out, f"--config={project[0]}")
    assert result.returncode == 0, result.stderr
    assert "checkpoint 12 is damaged, trying the one before" in result.stderr
    assert result.stderr.count("\n") == 2  # and the command to continue


def test_new_param_warmup_scales_new_entries_only(project, tmp_path):
    """After one update at share 0 old entries have changed, new and duplicated ones have not."""
    flat = {"optimizer.learning_rate.warmup_fraction": "0", "train.steps": "2", "init.new_param_warmup": "1"}
    overrides = growth_overrides(project, "hyperclone", WIDER, flat, {"train.save_every": "1"})
    train(load_config(project[0], overrides), tmp_path / "run")
    assert [r["new_param_scale"] for r in records(tmp_path / "run")] == [0.5]  # of the second step
    run = setup_run(load_config(project[0], overrides), tmp_path / "run")
    before, after = run.growth, load_model(str(tmp_path / "run"), step=1).params
    from dwt_jax.remap.apply import grow_params
    from dwt_jax.remap.optimizer_state import copied_entry_mask

    initial_params = grow_params(before.plan, before.source.params)
    new = new_entry_mask(copied_entry_mask(before.plan), initial_params, PARAM_AXES)
    num_new = 0
    for (path, old), trained, mask in zip(
        jax.tree_util.tree_leaves_with_path(initial_params),
        jax.tree.leaves(after),
        jax.tree.leaves(new),
        strict=True,
    ):
        mask = np.broadcast_to(mask, old.shape)
        assert (trained[mask] == old[mask]).all(), path_name(path)
        num_new += mask.sum()
        if PARAM_AXES[path_name(path)][-1].fan == "out" and path_name(path).startswith("layers"):
            assert (trained[~mask] != old[~mask]).any(), path_name(path)
    assert num_new > 10_000
    later = load_model(str(tmp_path / "run"), step=2).params["mlm"]["transform"]["kernel"]
    assert (later[-1] != initial_params["mlm"]["transform"]["kernel"][-1]).any()


def test_next_batch_continues_data_stream(project, tmp_path):
    """The rows themselves, not only the end of training."""
    grow(project, tmp_path / "run", "stack")
    run = setup_run(load_config(project[0]), tmp_path / "run")
    old = setup_run(load_config(project[0]), project[1] / "small")
    next_batch = next(data_rows.batch_iterator(run.rows, run.config.seed, 8, run.config.init.step, 12))
    expected_batch = data_rows.get_batch(old.rows, old.config.seed, 8, 8)
    np.testing.assert_array_equal(next_batch.tokens, expected_batch.tokens)
