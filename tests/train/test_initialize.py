"""Runs whose student is grown from another model before its first step."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dwt_jax.config_loader import load_config
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.hf import checkpoint
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.remap.apply import grow_params
from dwt_jax.remap.gates import gate_schedule
from dwt_jax.remap.methods import METHODS
from dwt_jax.remap.plan import plan_growth
from dwt_jax.runs.load import load_model
from dwt_jax.train import initialize as starts
from dwt_jax.train import step as steps
from dwt_jax.train.loop import train
from dwt_jax.train.step_schedules import schedule_table
from helpers.growth import DEEPER, STILL, WIDER, growth_overrides
from helpers.run_records import assert_same_run, cut_after, records, summary
from helpers.runs import dwt, prepared_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(config:rows, folder): a tiny corpus, prepared, and a trained small model."""
    folder = tmp_path_factory.mktemp("init")
    spec = prepared_project(folder)
    train(load_config(spec), folder / "small")
    return spec, folder


@pytest.fixture(scope="module")
def gated(project):
    """A run that grows in width and depth behind gates, with the small model as teacher too."""
    workdir = project[1] / "gated"
    overrides = growth_overrides(
        project, "masked", WIDER, DEEPER, {"init.from": "", "init.gate_warmup": "0.75"}
    )
    overrides |= {"teacher.path": str(project[1] / "small"), "distill.preset": "paper_normal"}
    train(load_config(project[0], overrides), workdir)
    return workdir, overrides


def test_a_cloned_student_begins_where_its_source_ended(project, tmp_path):
    """Its held-out loss, without a step that changes anything, by the command as a user has it."""
    overrides = growth_overrides(project, "hyperclone", WIDER, STILL, train__steps="1")
    train(load_config(project[0], overrides), tmp_path / "run")
    losses = []
    for model in (project[1] / "small", tmp_path / "run"):
        found = dwt("evaluate", f"--model={model}", f"--data={project[1] / 'rows'}", "--json")
        assert found.returncode == 0, found.stderr
        losses.append(json.loads(found.stdout)["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    told = json.loads((tmp_path / "run" / "init.json").read_text())
    assert told["function_preserving"]
    assert told["from"] == str(project[1] / "small")
    assert 0 < told["logit_drift"]["max"] < 1e-4 < told["logit_drift"]["spread"]
    assert summary(tmp_path / "run")["init"] == {
        "method": "hyperclone",
        "function_preserving": True,
        "num_hidden_layers": 2,
        "hidden_size": 32,
    }


def test_a_resumed_run_is_the_same_and_the_source_is_looked_at(project, tmp_path, capsys):
    overrides = growth_overrides(project, "net2net", WIDER, init__noise="0.01", init__split="uneven")
    train(load_config(project[0], overrides), tmp_path / "whole")
    said = capsys.readouterr().err
    assert f"student grown from {project[1] / 'small'} (2 x 32) by net2net: " in said
    assert "another function (noise 0.01, expected 0)" in said
    cut_after(tmp_path / "whole", tmp_path / "cut", 4)
    shutil.copytree(project[1] / "small" / "model", tmp_path / "moved")
    moved = {**overrides, "init.from": str(tmp_path / "moved")}
    train(load_config(project[0], moved), tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    other = tmp_path / "other"
    train(load_config(project[0], {"seed": "1", "train.steps": "2"}), other)
    with pytest.raises(UserError, match=r"run\.init_digest is '.*' there, '.*' here"):
        train(load_config(project[0], {**overrides, "init.from": str(other)}), tmp_path / "cut")


def test_gates_open_and_the_end_is_an_ordinary_model(project, gated):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dwt_jax.models import bert

    workdir, _ = gated
    shares = [record["gate"] for record in records(workdir)]
    assert shares == pytest.approx([1 / 9, 3 / 9, 5 / 9, 7 / 9, 1, 1])  # of the steps 1, 3, …, 11
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(
        workdir / "model", output_loading_info=True
    )
    assert not any(info.values()), info
    loaded = load_model(str(workdir))
    assert not loaded.model.gated_layers
    assert not loaded.model.weighted_norm
    tokens = np.random.default_rng(0).integers(5, loaded.model.vocab_size, (2, 12))
    with torch.no_grad():
        expected = model.eval()(torch.tensor(tokens)).logits.numpy()
    hidden = bert.encode(loaded.params, loaded.model, tokens, np.ones_like(tokens))
    found = lm_head_logits(loaded.params, loaded.model, hidden)[..., : loaded.model.vocab_size]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    found = dwt("evaluate", f"--model={workdir}", f"--data={project[1] / 'rows'}", "--json")
    last = records(workdir, "evaluations.jsonl")[-1]
    assert json.loads(found.stdout)["held_out_loss"] == pytest.approx(last["held_out_loss"], rel=1e-5)


def test_amid_annealing_a_checkpoint_is_what_that_step_computes_with(project, gated, tmp_path):
    workdir, overrides = gated
    cut_after(workdir, tmp_path / "cut", 4)
    amid = load_model(str(tmp_path / "cut"))
    assert amid.step == 4
    assert amid.model.gated_layers
    gates = amid.params["layers"]["gate"]
    np.testing.assert_allclose(gates, [1, 1, 4 / 9], rtol=1e-6)
    found = dwt("evaluate", f"--model={tmp_path / 'cut'}", f"--data={project[1] / 'rows'}", "--json")
    assert found.returncode == 0, found.stderr
    record = next(r for r in records(workdir, "evaluations.jsonl") if r["step"] == 4)
    assert json.loads(found.stdout)["held_out_loss"] == pytest.approx(record["held_out_loss"], rel=1e-5)
    found = dwt("export", f"--model={tmp_path / 'cut'}", f"--out={tmp_path / 'out'}")
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "must be open (1) before an export" in found.stderr
    assert not (tmp_path / "out").exists()
    train(load_config(project[0], overrides), tmp_path / "cut")
    assert_same_run(workdir, tmp_path / "cut")
    opened = load_model(str(workdir), step=12)  # annealed: an ordinary model, as the one at the end
    assert not opened.model.gated_layers
    assert not opened.model.weighted_norm
    saved = load_model(str(workdir)).params
    assert jax.tree.structure(opened.params) == jax.tree.structure(saved)
    np.testing.assert_array_equal(
        opened.params["layers"]["mlp"]["output"]["kernel"], saved["layers"]["mlp"]["output"]["kernel"]
    )


def test_what_the_source_cost_is_charged_once(project, gated, tmp_path):
    small = summary(project[1] / "small")["flops"]["total"]
    both = summary(gated[0])["flops"]
    assert both["teacher_training"] == small
    assert both["source_training"] == 0  # it is the teacher
    train(
        load_config(
            project[0], growth_overrides(project, "stack", model__num_hidden_layers="3", train__steps="2")
        ),
        tmp_path,
    )
    alone = summary(tmp_path)["flops"]
    assert (alone["teacher_training"], alone["source_training"]) == (0, small)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Grown by `stack` (parameter remapping) from `small`, 2 layers of hidden size 32." in card
    assert f"pre-training of the model it was grown from: {small:.3g} FLOPs" in card
    assert str(project[1]) not in card
    overrides = {"teacher.path": str(tmp_path), "distill.preset": "paper_normal", "train.steps": "1"}
    train(load_config(project[0], overrides), tmp_path / "next")
    assert summary(tmp_path / "next")["flops"]["teacher_training"] == alone["total"] + small


def test_learned_maps_begin_a_run(project, tmp_path, capsys):
    """As in learn_maps by itself, once: a resumed run goes on from its checkpoint, charged the same."""
    overrides = growth_overrides(project, "ligo", model__num_hidden_layers="3", init__learning_steps="3")
    train(load_config(project[0], overrides), tmp_path / "whole")
    said = capsys.readouterr().err
    assert "by ligo: " in said
    assert "another function (ligo: the maps are learned)" in said
    told = json.loads((tmp_path / "whole" / "init.json").read_text())
    assert not told["function_preserving"]
    assert told["ligo"]["steps"] == 3
    assert told["ligo"]["loss_after"] != told["ligo"]["loss_before"]
    small = summary(project[1] / "small")["flops"]["total"]
    cost = summary(tmp_path / "whole")["flops"]["source_training"]
    assert cost == small + told["ligo"]["flops"] > small
    cut_after(tmp_path / "whole", tmp_path / "cut", 4)
    train(load_config(project[0], overrides), tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert summary(tmp_path / "cut")["flops"] == summary(tmp_path / "whole")["flops"]


def test_learned_maps_and_a_second_warm_up(project, tmp_path):
    """Of what the first maps call new; by the plan that the config's options give."""
    overrides = growth_overrides(
        project, "ligo", WIDER, init__learning_steps="2", init__new_param_warmup="0.5", train__steps="4"
    )
    train(load_config(project[0], overrides), tmp_path)
    assert [r["new_param_scale"] for r in records(tmp_path)] == [0.5, 1]  # of the steps 2 and 4
    record = json.loads((tmp_path / "init.json").read_text())["ligo"]
    assert record["training_bytes"] > 0
    record["flops"] = "many"
    (tmp_path / "init.json").write_text(json.dumps({"ligo": record}))
    assert starts.ligo_training_flops(tmp_path) is None
    (tmp_path / "init.json").unlink()
    assert starts.ligo_training_flops(tmp_path) is None


def test_a_new_model_is_what_it_was(project, tmp_path):
    """Without `init` nothing is added: not to the step, not to run.json; and a directory from before
    `init` existed is the same run."""
    before = steps.TRACE_COUNTS["no_teacher"]
    config = load_config(project[0])
    train(config, tmp_path / "run")
    assert steps.TRACE_COUNTS["no_teacher"] <= before + 1
    table = schedule_table(config)
    assert table.gate is table.new_param_scale is None
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sorted(run) == [
        *(
            "attention",
            "compute_dtype",
            "data_digest",
            "precision_environment",
            "run_id",
            "state_format",
            "teacher_digest",
        )
    ]
    assert not (tmp_path / "run" / "init.json").exists()
    assert_same_run(project[1] / "small", tmp_path / "run")
    cut_after(tmp_path / "run", tmp_path / "cut", 8)
    recorded = json.loads((tmp_path / "cut" / "config.json").read_text())
    del recorded["init"]
    (tmp_path / "cut" / "config.json").write_text(json.dumps(recorded))
    train(config, tmp_path / "cut")
    assert_same_run(tmp_path / "run", tmp_path / "cut")
    with pytest.raises(UserError, match=r"init\.method is '' there, 'stack' here"):
        train(load_config(project[0], growth_overrides(project, "stack")), tmp_path / "cut")


def test_a_vocabulary_may_grow_at_its_end(project, tmp_path):
    """A source with the first tokens of the data's, its tables padded as hubs have them."""
    source = load_model(str(project[1] / "small"))
    ours = load_vocabulary(project[1] / "rows" / "tokenizer")
    short, few = tmp_path / "short", len(ours.tokens) - 7
    short.mkdir()
    (short / "vocab.txt").write_text("\n".join(ours.tokens[:few]) + "\n")
    checkpoint.save_checkpoint(source.params, source.model, short, tmp_path / "source")
    config = load_config(project[0], growth_overrides(project, "fna", init__from=str(tmp_path / "source")))
    model = dataclasses.replace(config.model, vocab_size=len(ours.tokens))
    begun = starts.load_growth_source(dataclasses.replace(config, model=model), ours, tmp_path)
    assert begun.source.model.vocab_size == few
    table = grow_params(begun.plan, begun.source.params)["embeddings"]["word"]["embedding"]
    old = source.params["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(table[:few], old[:few])
    np.testing.assert_allclose(table[len(ours.tokens) - 1], old[:few].mean(0), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_is_refused_before_anything_is_written(project, tmp_path):
    strange = tmp_path / "strange"
    source = load_model(str(project[1] / "small"))
    (tmp_path / "words").mkdir()
    tokens = list(load_vocabulary(source.tokenizer).tokens)
    tokens[-1], tokens[-2] = tokens[-2], tokens[-1]
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(tokens) + "\n")
    checkpoint.save_checkpoint(source.params, source.model, tmp_path / "words", strange)
    for overrides, says in (
        (
            growth_overrides(project, "hyperclone", {"model.hidden_size": "48"}),
            "init.method: hyperclone: hidden_size",
        ),
        (growth_overrides(project, "net2net", init__from=str(tmp_path / "none")), "no such directory"),
        (growth_overrides(project, "net2net", init__from=str(strange)), "init.from: "),
        (growth_overrides(project, "masked", WIDER), "expected model.weighted_norm"),
        (growth_overrides(project, "hyperclon"), "init.method is 'hyperclon'; did you mean 'hyperclone'?"),
        ({"init.method": "stack"}, "expected init.from or teacher.path"),
        ({"init.from": "x"}, "init.from is set, expected init.method"),
    ):
        keys = [f"--config.{key}={value}" for key, value in overrides.items()]
        found = dwt("train", f"--config={project[0]}", *keys, f"--workdir={tmp_path / 'run'}")
        assert found.returncode == 2, (overrides, found.stdout)
        assert says in found.stderr, (says, found.stderr)
        assert found.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gate_warmup", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_annealing_in_closed_form(gate_warmup):
    for begin in (0, 40):
        found = gate_schedule(np.arange(101), 100, gate_warmup, begin)
        expected = [
            min(max((s - begin) / (gate_warmup * (100 - begin)), 0.0), 1.0) if gate_warmup else 1.0
            for s in range(101)
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.dtype == np.float32
        assert found[-1] == 1


@pytest.mark.slow
def test_a_gated_model_is_grown_onto_eight_devices(project, tmp_path):
    """The same parameters, each part where it belongs, as on one device."""
    overrides = growth_overrides(
        project, "masked", WIDER, DEEPER, STILL, train__steps="1", init__new_param_warmup="0.5"
    )
    keys = [f"--config.{key}={value}" for key, value in overrides.items()]
    many = dwt(
        "train",
        f"--config={project[0]}",
        *keys,
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        f"--workdir={tmp_path / 'many'}",
        variables={"JAX_NUM_CPU_DEVICES": "8"},
    )
    assert many.returncode == 0, many.stderr
    train(load_config(project[0], overrides), tmp_path / "one")
    a, b = (load_model(str(tmp_path / name), step=1).params for name in ("one", "many"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), a, b)
    told = [json.loads((tmp_path / name / "init.json").read_text()) for name in ("one", "many")]
    assert told[0]["leaves"] == told[1]["leaves"]
    assert told[1]["logit_drift"]["max"] < 1e-4


@pytest.mark.parametrize("run", [*METHODS, "paper", "paper_pr"])
def test_the_configs_of_every_method(run):
    """Each can be made of the model that its docstring names."""
    name = "paper.py:teacher4" if run.startswith("paper") else "small_bert.py:2x64"
    source = load_config(f"configs/{name}").model
    config = load_config(
        f"configs/remapping.py:{run}", {"teacher.path" if "paper" in run else "init.from": "x"}
    )
    if run == "paper":
        assert config.init.method == ""
        return
    source, target = (dataclasses.replace(m, vocab_size=2048) for m in (source, config.model))
    assert source != target
    plan_growth(config.init.method, source, target, jax.random.key(0), config.init)
