"""The pilot: extrapolation, rounds, candidates, and what it prints and advises."""

import json

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.config import Teacher
from dwt_jax.config_loader import load_config
from dwt_jax.distributed.shutdown import TrainingFailed
from dwt_jax.errors import UserError
from dwt_jax.study import pilot
from dwt_jax.study.extrapolation import Estimate, extrapolate_difference, extrapolate_loss
from dwt_jax.study.pilot import BASELINE, EARLY_USES, THROUGHOUT, Candidate, PilotReport, Result, ShortRun
from dwt_jax.study.pilot_report import advice, best, format_pilot, pilot_to_dict
from dwt_jax.train.loop import train
from dwt_jax.train.step_schedules import schedule_table
from helpers.ligo import model_overrides
from helpers.runs import make_project

STEPS = (100, 200, 400)
QUARTER = "4 → 0 over 25 %"


def test_loss_is_between_the_longest_run_and_the_power_law():
    losses = [5 * steps**-0.2 for steps in STEPS]
    expected = np.sqrt(losses[-1] * 5 * 6400**-0.2)
    assert extrapolate_loss(STEPS, losses, 6400) == pytest.approx(expected)
    assert extrapolate_loss(STEPS[:1], losses[:1], 6400) == losses[0]


def test_difference_that_halves_goes_on_to_halve_or_stays():
    """−0.8, −0.4, −0.2 at 100, 200, 400 steps: at 1600 steps between −0.2 and −0.05, with errors of 0.01."""
    estimate = extrapolate_difference(STEPS, [-0.8, -0.4, -0.2], [0, 0, 0.01], 1600, lasting=False)
    np.testing.assert_allclose(estimate, [-0.1, -0.2196, -0.0304])
    mirrored = extrapolate_difference(STEPS, [0.8, 0.4, 0.2], [0, 0, 0.01], 1600, lasting=False)
    np.testing.assert_allclose(mirrored, [0.1, 0.0304, 0.2196])


@pytest.mark.parametrize(
    ("differences", "low", "high"),
    [((-0.1, -0.3), -0.5, -0.1), ((-0.1, 0.1), -0.1, 0.3), ((0.0, 0.2), 0.0, 0.4), ((0.2, 0.2), 0.2, 0.2)],
)
def test_difference_that_does_not_shrink_stays(differences, low, high):
    estimate = extrapolate_difference(STEPS[1:], differences, [0, 0], 1600, lasting=False)
    np.testing.assert_allclose(estimate, [differences[1], low, high])


def test_difference_of_a_lasting_cause_goes_on_along_the_line():
    """−0.4 and −0.1 at 200 and 400 steps: +0.5 at 1600."""
    estimate = extrapolate_difference(STEPS[1:], [-0.4, -0.1], [0, 0], 1600, lasting=True)
    np.testing.assert_allclose(estimate, [0.5, -0.1, 0.5])


def test_errors_of_a_line_are_those_of_noisy_differences():
    """The interval's extension is 1.96 standard deviations of the line's end under normal errors."""
    rng, errors, true = np.random.default_rng(0), [0.03, 0.01], [-0.1, -0.3]
    draws = np.array(true) + np.array(errors) * rng.normal(size=(4000, 2))
    ends = [extrapolate_difference(STEPS[1:], d, errors, 1600, lasting=True).mean for d in draws]
    estimate = extrapolate_difference(STEPS[1:], true, errors, 1600, lasting=True)
    assert np.mean(ends) == pytest.approx(-0.7, abs=0.005)
    assert estimate.high - true[1] == pytest.approx(1.96 * np.std(ends), rel=0.05)


def test_single_length_says_nothing_about_the_sign():
    estimate = extrapolate_difference([100], [-0.2], [0.01], 400, lasting=False)
    assert estimate == pytest.approx((-0.2, -0.4196, 0.0196))


def test_error_is_the_larger_of_documents_and_seeds():
    """Two seeds whose differences are −0.1 and −0.3: −0.2 ± 0.1, whatever the documents say."""
    counts = np.full(50, 10.0)
    rng = np.random.default_rng(0)

    def run(loss, noise=0.0):
        sums = counts * (loss + noise * rng.normal(size=50))
        return ShortRun(sums.sum() / counts.sum(), 1e9, (sums, counts))

    baseline = Result(BASELINE, {100: [run(5.0), run(5.2)]})
    result = Result(Candidate("fna"), {100: [run(4.9), run(4.9)]})
    np.testing.assert_allclose(result.difference(baseline, 100), (-0.2, 0.1))
    noisy = Result(Candidate("fna"), {100: [run(4.9, 10.0), run(4.9, 10.0)]})
    assert noisy.difference(baseline, 100)[1] == pytest.approx(10 / np.sqrt(50 * 2), rel=0.25)


def test_round_lengths_double_and_cost_the_budget():
    counts = (10, 6, 3)
    lengths = pilot.round_lengths(34_000, 2.0, counts)
    assert lengths == (2000, 4000, 8000)
    assert sum(n * steps for n, steps in zip(counts, lengths, strict=True)) == 2 * 34_000
    assert pilot.round_lengths(800, 100, counts) == (100, 200, 400)  # at most half a run
    with pytest.raises(UserError, match=r"--budget is 0\.5: the shortest runs would have 14 of 1000 steps"):
        pilot.round_lengths(1000, 0.5, counts)


def test_second_round_has_every_kind():
    """A teacher that stays and one that leaves go on, whatever their ranks, and the best of both kinds."""
    early = Candidate(teacher=QUARTER)
    ranked = [*map(Candidate, ("fna", "lemon", "prefix")), early, Candidate(teacher="4 → 0 over 50 %")]
    stays = Candidate(teacher=THROUGHOUT)
    expected = [Candidate("fna"), Candidate("lemon"), early, stays, Candidate("fna", QUARTER)]
    assert pilot.second_round([*ranked, stays]) == expected
    assert pilot.second_round([stays, early]) == [early, stays]  # nothing can be grown


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(folder with a finished run of 1 x 32, config)."""
    folder = tmp_path_factory.mktemp("pilot")
    config = str(make_project(folder))
    overrides = model_overrides({"num_hidden_layers": 1}, **{"train.steps": "40", "train.eval_every": "0"})
    train(load_config(config, overrides), folder / "teacher")
    return folder, config


def test_candidates_have_their_weights_whatever_the_config_says(project):
    """By a config with a preset, a teacher and a growth of its own."""
    folder, config = project
    own = {
        "distill.preset": "knowledge_inheritance",
        "teacher.path": "elsewhere",
        "init.method": "fna",
        "train.steps": "80",
        "distill.alpha_soft.kind": "until_matched",
        "distill.match_margin": "0.2",
    }
    teacher = str(folder / "teacher")

    def soft_weights(use):
        loaded = pilot.load_candidate(config, own, teacher, Candidate(teacher=use))
        assert (loaded.teacher.path, loaded.init.method) == (teacher, "")
        table = schedule_table(loaded)
        np.testing.assert_array_equal(table.alpha_hard, np.ones(80))
        return np.asarray(table.alpha_soft)

    np.testing.assert_array_equal(soft_weights(THROUGHOUT), np.ones(80))
    for use, share in zip(EARLY_USES, (0.1, 0.25, 0.5), strict=True):
        ramp = np.clip(4 * (1 - np.arange(80) / (share * 80)), 0, None)
        np.testing.assert_allclose(soft_weights(use), ramp, atol=1e-6)
    plain = load_config(config, {"train.steps": "80"})
    assert pilot.load_candidate(config, own, teacher, BASELINE) == plain
    several = {**own, "teacher.path": "", "teacher.paths": "a,b", "teacher.weights": "1,2"}
    of_several = pilot.load_candidate(config, several, teacher, Candidate(teacher=THROUGHOUT))
    assert of_several.teacher == Teacher(path=teacher)
    grown = pilot.load_candidate(config, own, teacher, Candidate("stack, new layers add 0"))
    assert (grown.teacher.path, grown.distill) == ("", plain.distill)
    assert (grown.init.method, grown.init.new_layers, grown.init.from_) == ("stack", "zero", teacher)


def test_command_ranks_advises_and_resumes(project, capsys, tmp_path, monkeypatch):
    """The losses are those of runs of their lengths; a second call trains nothing and prints the same."""
    folder, config = project
    monkeypatch.setattr(
        pilot, "INITS", {name: pilot.INITS[name] for name in ("stack", "prefix", "hyperclone")}
    )
    uses = {use: pilot.TEACHER_USES[use] for use in (pilot.NO_TEACHER, QUARTER, THROUGHOUT)}
    monkeypatch.setattr(pilot, "TEACHER_USES", uses)
    monkeypatch.chdir(tmp_path)
    keys = ["--config.train.steps=128", "--config.train.eval_every=8"]
    command = ["pilot", f"--config={config}", f"--teacher={folder / 'teacher'}", "--budget=100", *keys]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "held-out loss" in first.err
    lines = first.out.splitlines()
    assert lines[0].split()[:8] == ["init", "teacher", "16", "steps", "32", "steps", "64", "steps"]
    assert any(line.startswith("refused: hyperclone: num_hidden_layers 1 → 2") for line in lines)

    assert main([*command, "--json"]) == 0
    second = capsys.readouterr()
    result = json.loads(second.out)
    assert result == json.loads((tmp_path / "pilot" / "pilot.json").read_text())
    assert "step 16/16" not in second.err
    assert result["advice"] in lines
    if result["overrides"]:
        assert lines[-1].split()[0].startswith("--config.")

    by_candidate = {(each["init"], each["teacher"]): each for each in result["results"]}
    assert set(by_candidate) == {
        *((init, "no teacher") for init in ("random", "stack", "prefix")),
        *(("random", use) for use in (QUARTER, THROUGHOUT)),
        next(key for key in by_candidate if key[0] != "random" and key[1] == QUARTER),
    }
    alone, grown = by_candidate["random", "no teacher"], by_candidate["stack", "no teacher"]
    overrides = {"train.steps": "32", "train.save_every": "4"}
    overrides |= {"init.method": "stack", "init.from": str(folder / "teacher")}
    summary = train(load_config(config, overrides), tmp_path / "separate")
    assert grown["rounds"][1]["held_out_losses"] == [summary["held_out"]["held_out_loss"]]
    difference = grown["rounds"][1]["held_out_losses"][0] - alone["rounds"][1]["held_out_losses"][0]
    assert grown["rounds"][1]["difference"] == pytest.approx(difference)
    assert 0 < grown["rounds"][1]["standard_error"] < abs(difference)
    assert by_candidate["random", THROUGHOUT]["full_run_flops"] > alone["full_run_flops"]
    assert result["flops"] == pytest.approx(sum(each["flops"] for each in result["results"]))


def make_report(*results):
    """A report of two rounds, (candidate, differences, expected) each, over a baseline that ends at 4."""

    def make_result(candidate, differences, expected, more=1.0):
        losses = {100: 5.0 + differences[0], 200: 4.5 + differences[1]}
        runs = {steps: [ShortRun(loss, more * steps * 1e10, None)] for steps, loss in losses.items()}
        return Result(candidate, runs, Estimate(*expected))

    baseline = make_result(BASELINE, (0.0, 0.0), (0.0, 0.0, 0.0))
    others = [make_result(*result, more=1.1) for result in results]
    return PilotReport(1000, (100, 200), 4.2, 4.0, (baseline, *others), {"ligo": "not short"}, 3e12)


def test_advice_names_the_winner_its_interval_and_the_flags():
    early, grown = Candidate(teacher=QUARTER), Candidate("lemon")
    report = make_report(
        (early, (-0.3, -0.2), (-0.1, -0.15, -0.05)), (grown, (-0.9, -0.3), (-0.02, -0.1, 0.06))
    )
    assert best(report) == early
    assert advice(report) == (
        "Initialise at random and use the teacher 4 → 0 over 25 %: expected −0.100 nats [−0.150, −0.050] "
        "relative to the student alone at 1.1e+13 FLOPs; lemon, no teacher: −0.020."
    )
    text = format_pilot(report, "runs/my teacher")
    assert "'--config.teacher.path=runs/my teacher'" in text.splitlines()[-1]
    assert "30 % of a full run" in text
    assert "+10.0 %" in text


def test_advice_is_the_student_alone_where_nothing_is_certain():
    report = make_report(
        (Candidate("lemon"), (-0.9, -0.3), (-0.02, -0.1, 0.06)),
        (Candidate(teacher=QUARTER), (-0.3, -0.2), (0.0, -0.15, 0.2)),
    )
    assert best(report) == BASELINE
    assert advice(report).startswith("Train the student alone: no candidate is expected to end below it")
    assert "--config" not in format_pilot(report, "runs/teacher")


def test_advice_for_a_teacher_that_stays_says_what_short_runs_do_not_see():
    report = make_report(
        (Candidate(teacher=THROUGHOUT), (-0.3, -0.4), (-0.4, -0.6, -0.2)),
        (Candidate("lemon"), (-0.9, -0.3), (-0.02, -0.1, 0.06)),
    )
    assert "ended above the teacher's loss" in advice(report)


def test_json_has_null_for_what_is_not_finite():
    inf = float("inf")
    report = make_report(
        (Candidate("lemon"), (-0.9, -0.3), (-0.02, -0.1, 0.06)),
        (Candidate("fna"), (-0.1, inf), (inf, inf, inf)),
    )
    text = json.dumps(pilot_to_dict(report, "runs/teacher"), allow_nan=False)
    assert json.loads(text)["results"][2]["expected_difference"] == [None] * 3


def test_diverged_candidate_is_last_and_a_diverged_baseline_ends_the_pilot(project, tmp_path, monkeypatch):
    def diverge(config, workdir):
        raise TrainingFailed("losses stayed non-finite")

    monkeypatch.setattr(pilot, "train", diverge)
    config, candidate = load_config(project[1]), Candidate("fna")
    runs = pilot._train_short(config, candidate, 16, 1, tmp_path)
    baseline = Result(BASELINE, {16: [ShortRun(4.0, 1e9, None)]})
    result = Result(candidate, {16: runs})
    pilot._extrapolate({BASELINE: baseline, candidate: result}, 128, 4.0)
    assert (runs[0].loss, result.expected.mean) == (np.inf, np.inf)
    with pytest.raises(TrainingFailed):
        pilot._train_short(config, BASELINE, 16, 1, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget=0"], "--budget is 0.0, expected more than 0 and at most 1000"),
        (
            ["--budget=0.01"],
            "--budget is 0.01: the shortest runs would have 0 of 12 steps, expected at least 16",
        ),
        (["--config.data.tokenizer.lowercase=False"], "--teacher: "),
        (["--steps=20"], "unrecognized arguments: --steps=20"),
    ],
)
def test_invalid_arguments_are_one_line(project, tmp_path, capsys, flags, message):
    folder, config = project
    command = [
        "pilot",
        f"--config={config}",
        f"--teacher={folder / 'teacher'}",
        f"--workdir={tmp_path / 'p'}",
    ]
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not (tmp_path / "p").exists()


def test_teacher_that_does_not_exist(project, tmp_path, capsys):
    assert main(["pilot", f"--config={project[1]}", f"--teacher={tmp_path / 'none'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"dwt: --teacher: {tmp_path / 'none'}")
