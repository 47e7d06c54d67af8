"""The pilot: its training steps, ranking and results."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.config_loader import load_config
from dwt_jax.errors import UserError
from dwt_jax.eval import likelihood
from dwt_jax.growth import pilot as pilots
from dwt_jax.growth.pilot import InitResult, format_pilot_table, rank_results, run_pilot
from dwt_jax.models import bert
from dwt_jax.models.bert import PARAM_AXES
from dwt_jax.models.common.logical_axes import map_with_axes
from dwt_jax.remap.apply import remap_params
from dwt_jax.runs.load import load_model
from dwt_jax.train.ligo_training import LigoConfig
from dwt_jax.train.loop import train
from dwt_jax.train.setup import setup_run
from helpers.ligo import model_overrides
from helpers.runs import make_project

FEW = {"train.steps": "6", "train.eval_every": "0", "train.save_every": "6"}
WIDE = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 96}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(folder with a finished run of 6 steps of 1 x 32, its config)."""
    folder = tmp_path_factory.mktemp("pilot")
    config = str(make_project(folder))
    train(load_config(config, model_overrides({"num_hidden_layers": 1}, **FEW)), folder / "source")
    return folder, config


def prepare_run(project, name, sizes, **overrides):
    folder, config = project
    (folder / name).mkdir()
    run = setup_run(load_config(config, model_overrides(sizes, **{**FEW, **overrides})), folder / name)
    return run, load_model(str(folder / "source"))


def test_pilot_steps_equal_run_steps(project):
    """After all steps from the run's initial parameters, the model is the run's."""
    run, source = prepare_run(project, "same", {"num_hidden_layers": 1})
    initial_params = jax.jit(lambda: bert.init_params(run.config.model, jax.random.key(run.config.seed)))()
    trained = pilots._train_briefly(run, initial_params, source.model, "random", 6, None)
    tokens = run.config.model.vocab_size
    unpadded = map_with_axes(
        lambda axes, x: x[:tokens] if axes[0].name == "vocab" else x, PARAM_AXES, trained
    )
    saved = map_with_axes(
        lambda axes, x: x[:tokens] if axes[0].name == "vocab" else x, PARAM_AXES, source.params
    )
    for a, b in zip(jax.tree.leaves(unpadded), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_methods_are_ranked_and_refused(project):
    """From a trained source: exact copies lead, random initialisation is last."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    run, source = prepare_run(project, "twice", sizes)
    messages = []
    names = ("hyperclone", "net2net", "stack", "ligo")
    ligo_config = LigoConfig(steps=3, validation_batches=1)
    results = run_pilot(
        run, source.params, source.model, 3, names, ligo_config=ligo_config, log=messages.append
    )
    result_of = {result.method: result for result in results}
    assert set(result_of) == {"random", *names}
    assert [result.loss for result in results[:4]] == sorted(result.loss for result in results[:4])
    assert results[-1].method == "stack"
    assert "hidden_size 32 → 64" in result_of["stack"].refused
    assert result_of["random"].loss_vs_baseline == result_of["random"].loss_vs_baseline_error == 0
    for result in results[1:4]:
        assert result.loss < result.initial_loss
        assert result.seconds > 0
    before = likelihood.summarize_losses(
        likelihood.losses_per_document(
            jax.device_put(source.params), source.model, run.data, mesh=run.mesh, policy=run.policy
        )
    )
    assert result_of["hyperclone"].function_preserving
    assert result_of["hyperclone"].initial_loss == pytest.approx(before["held_out_loss"], abs=1e-5)
    assert result_of["hyperclone"].flops == run.student_flops[:3].sum()
    ligo = result_of["ligo"]
    assert ligo.flops == run.student_flops[:3].sum() + ligo.ligo.flops
    assert any("refused" in line for line in messages)
    text = format_pilot_table(results, 3)
    assert "refused: hidden_size 32 → 64" in text
    assert len(text.splitlines()) == 1 + 5 + 1
    json.dumps([dataclasses.asdict(result) for result in results])


def test_result_equals_separate_run(project):
    """The loss after some steps equals remapping, training and evaluating separately."""
    run, source = prepare_run(project, "wide", WIDE)
    (result,) = [
        result
        for result in run_pilot(run, source.params, source.model, 2, ["net2net"])
        if result.method == "net2net"
    ]
    grown, _ = remap_params(source.params, source.model, run.config.model, "net2net", jax.random.key(0))
    after = pilots._train_briefly(run, grown, source.model, "net2net", 2, None)
    documents = likelihood.losses_per_document(
        after, run.config.model, run.data, mesh=run.mesh, policy=run.policy
    )
    assert result.loss == likelihood.summarize_losses(documents)["held_out_loss"]


def test_identical_params_are_trained_once(project):
    run, source = prepare_run(project, "deeper", {"num_hidden_layers": 2})
    results = run_pilot(run, source.params, source.model, 1, ["stack", "interleave", "prefix"])
    result_of = {result.method: result for result in results}
    assert result_of["interleave"].same_as == "stack"
    assert not result_of["prefix"].same_as
    order = [result.method for result in results]
    assert order.index("interleave") == order.index("stack") + 1


def test_rank_results_nan_after_other_losses():
    results = [
        InitResult("a", loss=float("nan")),
        InitResult("b", loss=2.0),
        InitResult("c", refused="c: no"),
    ]
    results += [InitResult("d", same_as="b"), InitResult("e", loss=1.0)]
    assert [result.method for result in rank_results(results)] == ["e", "b", "d", "a", "c"]


@pytest.mark.parametrize(
    ("steps", "methods", "message"),
    [
        (7, (), r"--steps is 7, expected from 1 to train.steps \(6\)"),
        (0, (), "--steps is 0, expected from 1"),
        (2, ["netnet"], "did you mean 'net2net'"),
    ],
)
def test_invalid_arguments_raise(project, tmp_path, steps, methods, message):
    run = setup_run(load_config(project[1], model_overrides({"num_hidden_layers": 1}, **FEW)), tmp_path)
    with pytest.raises(UserError, match=message):
        run_pilot(run, {}, run.config.model, steps, methods)


def test_initialisations_follow_init_options(project):
    """The options of `init`, the warm-up of new entries, and LiGO."""
    overrides = {"init.method": "random", "init.from": str(project[0] / "source"), "init.noise": "0.3"}
    overrides |= {"init.split": "uneven", "init.new_param_warmup": "1", "init.learning_steps": "2"}
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    run, source = prepare_run(project, "options", sizes, **overrides)
    names, ligo_config = ("net2net", "ligo"), LigoConfig(steps=2, validation_batches=1)
    result_of = {
        result.method: result
        for result in run_pilot(run, source.params, source.model, 1, names, ligo_config=ligo_config)
    }
    assert result_of["net2net"].function_preserving is False  # noise
    grown, _ = remap_params(
        source.params,
        source.model,
        run.config.model,
        "net2net",
        jax.random.key(0),
        options=run.config.init,
    )
    documents = likelihood.losses_per_document(
        grown, run.config.model, run.data, mesh=run.mesh, policy=run.policy
    )
    assert result_of["net2net"].initial_loss == likelihood.summarize_losses(documents)["held_out_loss"]
    assert result_of["ligo"].ligo.steps == 2
    assert result_of["ligo"].loss < result_of["ligo"].initial_loss


def test_command_uses_checkpoint_and_flags(project, capsys, tmp_path):
    """`--step` and `--noise` apply to the methods; contradictions are refused."""
    folder, config = project
    keys = [
        f"--config.{key}={value}" for key, value in model_overrides({"num_hidden_layers": 1}, **FEW).items()
    ]
    command = ["pilot", f"--model={folder / 'source'}", f"--config={config}", "--steps=1", "--json", *keys]
    assert main([*command, "--step=6", "--noise=0.5", "--config.init.learning_steps=1"]) == 0
    results = {result["method"]: result for result in json.loads(capsys.readouterr().out)}
    assert results["ligo"]["ligo"]["steps"] == 1
    assert results["hyperclone"]["refused"] == "hyperclone: noise 0.5, expected 0"
    for flags, message in (
        (["--step=5"], "--step is 5, expected a checkpoint that"),
        (["--steps=0"], "--steps is 0, expected at least 1"),
        (
            ["--noise=1", "--config.init.noise=2"],
            "--config.init.noise is '2', expected '1.0'",
        ),
        (["--carry"], "pilot: unrecognized arguments: --carry"),
    ):
        assert main([*command, *flags]) == 2
        assert message in capsys.readouterr().err


def test_command_prints_json_and_removes_files(project, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder, config = project
    settings = load_config(config, model_overrides({"num_hidden_layers": 2}, **FEW))
    pilots.print_pilot_ranking(str(folder / "source"), settings, 1, ["stack"], as_json=True)
    results = json.loads(capsys.readouterr().out)
    assert {result["method"] for result in results} == {"random", "stack"}
    assert not list(tmp_path.iterdir())


def test_different_vocabulary_raises(project):
    folder, config = project
    other_config = load_config(config, model_overrides({}, **FEW, **{"data.tokenizer.lowercase": "False"}))
    with pytest.raises(UserError, match=r"--model: .* has another vocabulary, token .* expected"):
        pilots.print_pilot_ranking(str(folder / "source"), other_config, 1)
