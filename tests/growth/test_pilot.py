"""The pilot: its steps are the run's, its ranking and what it says of each method."""

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
    """(folder with a finished run of 6 steps of 1 x 32, its config)"""
    folder = tmp_path_factory.mktemp("pilot")
    config = str(make_project(folder))
    train(load_config(config, model_overrides({"num_hidden_layers": 1}, **FEW)), folder / "source")
    return folder, config


def prepared(project, name, sizes, **more):
    folder, config = project
    (folder / name).mkdir()
    run = setup_run(load_config(config, model_overrides(sizes, **{**FEW, **more})), folder / name)
    return run, load_model(str(folder / "source"))


def test_its_steps_are_those_of_the_run(project):
    """All of them, from the run's own beginning: the model is the run's."""
    run, source = prepared(project, "same", {"num_hidden_layers": 1})
    begun = jax.jit(lambda: bert.init_params(run.config.model, jax.random.key(run.config.seed)))()
    found = pilots._train_briefly(run, begun, 6, None, ())
    tokens = run.config.model.vocab_size
    cut = map_with_axes(lambda axes, x: x[:tokens] if axes[0].name == "vocab" else x, PARAM_AXES, found)
    saved = map_with_axes(
        lambda axes, x: x[:tokens] if axes[0].name == "vocab" else x, PARAM_AXES, source.params
    )
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_methods_are_ranked_and_refused(project):
    """Twice the steps from what the source has learned: the copy that is exact leads, random is last."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    run, source = prepared(project, "twice", sizes)
    said = []
    names = ("hyperclone", "net2net", "stack", "ligo")
    learning = LigoConfig(steps=3, validation_batches=1)
    trials = run_pilot(run, source.params, source.model, 3, names, ligo_config=learning, log=said.append)
    found = {trial.method: trial for trial in trials}
    assert set(found) == {"random", *names}
    assert [trial.loss for trial in trials[:4]] == sorted(trial.loss for trial in trials[:4])
    assert trials[-1].method == "stack"
    assert "hidden_size 32 → 64" in found["stack"].refused
    assert found["random"].against_random == found["random"].against_error == 0
    for trial in trials[1:4]:
        assert trial.loss < trial.initial_loss
        assert trial.seconds > 0
    before = likelihood.summarize_losses(
        likelihood.losses_per_document(
            jax.device_put(source.params), source.model, run.data, mesh=run.mesh, policy=run.policy
        )
    )
    assert found["hyperclone"].exact
    assert found["hyperclone"].initial_loss == pytest.approx(before["held_out_loss"], abs=1e-5)
    assert found["hyperclone"].flops == 3 * run.student_flops
    ligo = found["ligo"]
    assert ligo.flops == 3 * run.student_flops + ligo.learned.flops
    assert any("refused" in line for line in said)
    text = format_pilot_table(trials, 3)
    assert "refused: hidden_size 32 → 64" in text
    assert len(text.splitlines()) == 1 + 5 + 1
    json.dumps([dataclasses.asdict(trial) for trial in trials])


def test_a_trial_is_what_a_run_of_its_own_gives(project):
    """The loss after some steps, from the outside: remap, take the steps, evaluate."""
    run, source = prepared(project, "wide", WIDE)
    (trial,) = [
        t for t in run_pilot(run, source.params, source.model, 2, ["net2net"]) if t.method == "net2net"
    ]
    grown, _ = remap_params(source.params, source.model, run.config.model, "net2net", jax.random.key(0))
    after = pilots._train_briefly(run, grown, 2, None, ())
    documents = likelihood.losses_per_document(
        after, run.config.model, run.data, mesh=run.mesh, policy=run.policy
    )
    assert trial.loss == likelihood.summarize_losses(documents)["held_out_loss"]


def test_what_is_the_same_is_trained_once(project):
    run, source = prepared(project, "deeper", {"num_hidden_layers": 2})
    trials = run_pilot(run, source.params, source.model, 1, ["stack", "interleave", "prefix"])
    found = {trial.method: trial for trial in trials}
    assert found["interleave"].same_as == "stack"
    assert not found["prefix"].same_as
    place = [trial.method for trial in trials]
    assert place.index("interleave") == place.index("stack") + 1


def test_a_loss_that_is_no_number_comes_after_those_that_are():
    trials = [InitResult("a", loss=float("nan")), InitResult("b", loss=2.0), InitResult("c", refused="c: no")]
    trials += [InitResult("d", same_as="b"), InitResult("e", loss=1.0)]
    assert [trial.method for trial in rank_results(trials)] == ["e", "b", "d", "a", "c"]


@pytest.mark.parametrize(
    ("steps", "methods", "message"),
    [
        (7, (), r"--steps is 7, expected from 1 to train.steps \(6\)"),
        (0, (), "--steps is 0, expected from 1"),
        (2, ["netnet"], "did you mean 'net2net'"),
    ],
)
def test_mistakes(project, tmp_path, steps, methods, message):
    run = setup_run(load_config(project[1], model_overrides({"num_hidden_layers": 1}, **FEW)), tmp_path)
    with pytest.raises(UserError, match=message):
        run_pilot(run, {}, run.config.model, steps, methods)


def test_its_beginnings_are_those_of_the_config(project):
    """The options of `init`, the second warm-up of what is new, learned maps too."""
    more = {"init.method": "random", "init.from": str(project[0] / "source"), "init.noise": "0.3"}
    more |= {"init.split": "uneven", "init.new_param_warmup": "1", "init.learning_steps": "2"}
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    run, source = prepared(project, "options", sizes, **more)
    names, learning = ("net2net", "ligo"), LigoConfig(steps=2, validation_batches=1)
    found = {
        trial.method: trial
        for trial in run_pilot(run, source.params, source.model, 1, names, ligo_config=learning)
    }
    assert found["net2net"].exact is False  # noise
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
    assert found["net2net"].initial_loss == likelihood.summarize_losses(documents)["held_out_loss"]
    assert found["ligo"].learned.steps == 2
    assert found["ligo"].loss < found["ligo"].initial_loss


def test_the_command_takes_a_checkpoint_and_the_flags(project, capsys, tmp_path):
    """`--step`, `--noise`, `--split` reach the trials; what contradicts is refused."""
    folder, config = project
    keys = [
        f"--config.{key}={value}" for key, value in model_overrides({"num_hidden_layers": 1}, **FEW).items()
    ]
    command = ["pilot", f"--model={folder / 'source'}", f"--config={config}", "--steps=1", "--json", *keys]
    assert main([*command, "--step=6", "--noise=0.5", "--config.init.learning_steps=1"]) == 0
    trials = {trial["method"]: trial for trial in json.loads(capsys.readouterr().out)}
    assert trials["ligo"]["learned"]["steps"] == 1
    assert trials["hyperclone"]["refused"] == "hyperclone: noise 0.5, expected 0"
    for more, says in (
        (["--step=5"], "--step is 5, expected a checkpoint that"),
        (["--steps=0"], "--steps is 0, expected at least 1"),
        (
            ["--noise=1", "--config.init.noise=2"],
            "--config.init.noise is '2', expected '1.0'",
        ),
        (["--carry"], "pilot: unrecognized arguments: --carry"),
    ):
        assert main([*command, *more]) == 2
        assert says in capsys.readouterr().err


def test_the_command_prints_json_and_leaves_nothing(project, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder, config = project
    settings = load_config(config, model_overrides({"num_hidden_layers": 2}, **FEW))
    pilots.print_pilot_ranking(str(folder / "source"), settings, 1, ["stack"], as_json=True)
    trials = json.loads(capsys.readouterr().out)
    assert {trial["method"] for trial in trials} == {"random", "stack"}
    assert not list(tmp_path.iterdir())


def test_another_vocabulary_is_refused(project):
    folder, config = project
    other = load_config(config, model_overrides({}, **FEW, **{"data.tokenizer.lowercase": "False"}))
    with pytest.raises(UserError, match=r"--model: .* has another vocabulary, token .* expected"):
        pilots.print_pilot_ranking(str(folder / "source"), other, 1)
