"""The command line: help, exit statuses, renamed flags, config overrides."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dwt_jax.cli import COMMANDS, main
from dwt_jax.cli.exit_status import exit_status
from dwt_jax.config_loader import load_config
from dwt_jax.errors import SaveFailed
from helpers.paths import ROOT
from helpers.runs import dwt, environment, make_project, write_corpus


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_neither_jax_nor_other_heavy_packages(command):
    arguments = [command, "--help"] if command else ["--help"]
    code = f"import sys; from dwt_jax.cli import main\ntry: main({arguments!r})\n"
    code += "except SystemExit as e: code = e.code\n"
    code += (
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'transformers', 'tensorflow_datasets', 'numpy', 'scipy', "
    )
    code += "'matplotlib', 'jinja2'}\n"
    code += "sys.exit(code or sorted(heavy & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert found.returncode == 0, found.stderr
    assert f"usage: dwt {command}".rstrip() in found.stdout


def test_runs_on_own_data_need_no_transformers(tmp_path):
    """It takes seconds to import."""
    config, workdir = make_project(tmp_path), tmp_path / "run"
    code = "import sys; sys.modules['transformers'] = None; from dwt_jax.cli import main; "
    code += f"assert main(['prepare', '--config={config}', '--workdir={tmp_path / 'rows'}']) == 0; "
    code += f"assert main(['train', '--config={config}:{tmp_path / 'rows'}', '--workdir={workdir}']) == 0; "
    code += f"sys.exit(main(['evaluate', '--model={workdir}', '--data={tmp_path / 'rows'}']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert (workdir / "model" / "tokenizer.json").exists()


def test_help_lists_every_command_with_its_help_text(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listing = " ".join(capsys.readouterr().out.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.__doc__.splitlines()[0]}" in listing


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch, capsys):
    """A shell leaves it as it is after `--workdir=`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    make_project(tmp_path / "home")
    few = ["--config.train.steps=2", "--config.train.batch_size=4"]
    assert main(["prepare", "--config=~/tiny.py", "--workdir=~/rows"]) == 0
    assert main(["train", "--config=~/tiny.py", "--config.data.path=~/rows", *few, "--workdir=~/run"]) == 0
    assert main(["evaluate", "--model=~/run", "--data=~/rows"]) == 0
    assert main(["export", "--model=~/run", "--out=~/model"]) == 0
    assert main(["fill-mask", "--model=~/run", "the [MASK] is"]) == 0
    assert "the [MASK] is\n" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "home").iterdir()} >= {"rows", "run", "model"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    capsys.readouterr()
    monkeypatch.setattr("pathlib.Path.expanduser", raise_unknown_home)
    assert main(["report", "--workdir=~/run"]) == 2
    assert capsys.readouterr().err == (
        "dwt: ~/run: the home directory is unknown, expected a path without ~\n"
    )


def raise_unknown_home(_):
    raise RuntimeError("Could not determine home directory.")


def test_packaged_configs_have_their_name_in_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/modernbert.py:2x128").model.model_type == "modernbert"
    assert main(["study", "--config=configs/study/chain.py:cpu", "--workdir=x", "--list"]) == 0


@pytest.mark.parametrize("streams", ["2>&-", ">/dev/null 2>&-", "1>&-"])
def test_a_closed_stream_stops_nothing(tmp_path, streams):
    arguments = f"--config={make_project(tmp_path)} --config.train.steps=2 --workdir={tmp_path / 'run'}"
    command = f"{sys.executable} -m dwt_jax train {arguments} {streams}"
    done = subprocess.run(["bash", "-c", command], env=environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_stream_that_is_closed_for_a_script_stops_nothing(tmp_path):
    """Then its number is that of the script, which is open for reading."""
    (tmp_path / "script.sh").write_text(
        f"exec {sys.executable} -m dwt_jax prepare --config=no.py --workdir=x\n"
    )
    (tmp_path / "script.sh").chmod(0o755)
    for streams in ("2>&-", "1>&- 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f"bash {tmp_path / 'script.sh'} {streams}"], env=environment(PYTHONPATH=str(ROOT))
        )
        assert done.returncode == 2


def test_no_lines_from_a_closed_standard_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["fill-mask", "--model=x"]) == 2
    assert capsys.readouterr().err == "dwt: standard input is closed, expected lines\n"


def test_an_argument_that_is_no_text_is_refused(tmp_path):
    """A name that is not UTF-8, and letters beyond ASCII in the POSIX locale without UTF-8 mode."""
    posix = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, variables in ((b"\xff", {}), ("größe".encode(), posix)):
        done = subprocess.run(
            [sys.executable, "-m", "dwt_jax", "report", b"--workdir=" + name],
            env=environment(PYTHONPATH=str(ROOT), **variables),
            capture_output=True,
        )
        assert done.returncode == 2
        assert b"expected text in the locale's encoding (LC_ALL=C.UTF-8)\n" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_other_encodings_degrade_what_is_printed_alone(tmp_path, encoding):
    """± is replaced on the terminal; files are UTF-8."""
    variables = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [f"--config={make_project(tmp_path)}", "--config.train.steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "dwt_jax", "train", *arguments, f"--workdir={tmp_path / 'run'}"],
        env=environment(PYTHONPATH=str(ROOT), **variables),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert b"held-out loss" in done.stderr
    assert (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "new_name"),
    [
        (["--run", "runs/small"], "remap --run is now dwt remap-run --run=runs/small"),
        (["--run=a b", "--carry"], "remap --run is now dwt remap-run --run=a b"),
        (["--model=x", "--carry"], "remap --carry is now dwt remap-run --carry"),
        (["--moments", "asymmetric"], "remap --moments is now dwt remap-run --moments=asymmetric"),
    ],
)
def test_renamed_flag_is_one_line_with_its_new_name(arguments, new_name, capsys):
    assert main(["remap", *arguments]) == 2
    assert capsys.readouterr().err == f"dwt: {new_name}\n"


@pytest.mark.parametrize(("flag", "value"), [("--model=x", "x"), ("--model", "MODEL")])
def test_renamed_flag_of_the_pilot(flag, value, capsys):
    assert main(["pilot", flag]) == 2
    assert capsys.readouterr().err == f"dwt: pilot --model is now dwt pilot --teacher={value}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["remap_run"], "did you mean 'remap-run'?"),
        (["train", "--workdir=x"], "--config"),
        (["train", "--config=nowhere.py", "--workdir=x"], "no file 'nowhere.py'"),
        (["train", "--config=configs/small_bert.py:2x96", "--workdir=x"], "expected one of 2x64, 2x128"),
        (
            ["train", "--config=configs/small_bert.py", "--config.train.stepz=3", "--workdir=x"],
            "did you mean 'train.steps'?",
        ),
        (
            ["train", "--config=configs/small_bert.py", "--config.train.steps=1.5", "--workdir=x"],
            "a whole number",
        ),
        (["train", "--config=configs/small_bert.py", "--config.train.steps", "--workdir=x"], "train.steps"),
        (["train", "--config=configs/small_bert.py", "--workdir=x", "--turbo"], "--turbo"),
        (["evaluate", "--model=nowhere", "--data=nowhere"], "nowhere"),
        (["report", "--workdir=nowhere"], "nowhere"),
        (["evaluate", "--config.seed=3", "--model=a", "--data=b"], "takes no config"),
        (["prepare", "--config=configs/small_bert.py", "--workdir="], "--workdir is empty, expected a path"),
        (
            ["prepare", "--config=configs/small_bert.py", "--workdir=x", "--workers=-1"],
            "--workers is -1, expected at least 0",
        ),
        (
            ["remap", "--model=a", "--config=b", "--method=c", "--out=x", "--seed=4294967296"],
            "--seed is 4294967296, expected at most 4294967295",
        ),
        (["generate", "--model=a", "b", "--seed=4294967296"], "--seed is 4294967296, expected at most 429"),
        (
            ["generate", "--model=a", "b", "--temperature=inf"],
            "--temperature is inf, expected a finite number",
        ),
    ],
)
def test_user_error_is_one_line_and_status_2(arguments, says, tmp_path):
    found = dwt(*arguments, cwd=ROOT)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert says in found.stderr
    assert not (ROOT / "x").exists()


def test_prepare_needs_the_section_data_alone(tmp_path, capsys):
    write_corpus(tmp_path / "corpus.txt")
    source = {"kind": "text", "path": str(tmp_path / "corpus.txt"), "documents": "lines"}
    data = {"sources": [source], "tokenizer": {"vocab_size": 300}, "sequence_length": 1024}
    (tmp_path / "data.py").write_text(f"def get_config():\n    return {{'data': {data}}}\n")
    command = ["prepare", f"--config={tmp_path / 'data.py'}", f"--workdir={tmp_path / 'rows'}", "--workers=1"]
    assert main([*command, "--config.data.sequence_length=4"]) == 2
    assert "data.sequence_length is 4, expected at least 8" in capsys.readouterr().err
    assert main(command) == 0
    assert json.loads((tmp_path / "rows" / "index.json").read_text())["sequence_length"] == 1024


def test_prepare_and_evaluate(tmp_path):
    config = make_project(tmp_path)
    rows, run = tmp_path / "rows", tmp_path / "run"
    prepared = dwt("prepare", f"--config={config}", f"--workdir={rows}", "--workers=1")
    assert prepared.returncode == 0, prepared.stderr
    trained = dwt("train", f"--config={config}:{rows}", "--config.train.steps=4", f"--workdir={run}")
    assert trained.returncode == 0, trained.stderr
    outputs = [
        dwt("evaluate", f"--model={model}", f"--data={rows}", "--json", f"--batch-size={size}")
        for model, size in ((run, 64), (run / "model", 7))
    ]
    first, second = (json.loads(found.stdout) for found in outputs)
    assert first == pytest.approx(second, rel=1e-5)  # the masks do not depend on the batch size
    assert first["perplexity"] == pytest.approx(2.718281828459045 ** first["held_out_loss"])
    assert 0 <= first["top1_accuracy"] <= first["top5_accuracy"] <= 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out"]["held_out_loss"] == pytest.approx(first["held_out_loss"], rel=1e-5)


def test_installed_script_is_the_module():
    script = Path(sys.executable).parent / "dwt"
    if not script.exists():
        pytest.skip("the package is not installed here")
    found = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert found.stdout == dwt("--version").stdout


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError("[Errno 28] No space left on device"), 1, "dwt: no space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "x.txt"), 1, "dwt: no space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x.txt"), 1, "dwt: disk quota exceeded"),
        (OSError(errno.EFBIG, "File too large"), 1, "dwt: file too large"),
        (ValueError("Failed to write 9 bytes: Disk quota exceeded"), 1, "dwt: disk quota exceeded"),
        (OSError("100 requested and 0 written"), 1, "dwt: no space left on device"),
        (SaveFailed("run: a checkpoint cannot be written"), 1, "dwt: run: a checkpoint cannot"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "dwt: x.txt: No such file"),
        (KeyboardInterrupt(), 130, "dwt: interrupted"),
    ],
)
def test_exit_status_of_failures_reported_in_one_line(error, status, message, capsys):
    def fail():
        raise error

    assert exit_status(fail) == status
    output = capsys.readouterr().err
    assert output.startswith(message)
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_prepare_with_a_word_and_nothing_half_written(tmp_path, signum, status):
    script = (
        "import signal, sys\n"
        "from dwt_jax.cli import main\n"
        "from dwt_jax.data import prepare\n"
        f"prepare.check_sample = lambda *_: signal.raise_signal({signum:d})\n"  # the tokenizer is written
        "sys.exit(main(sys.argv[1:]))"
    )
    config, workdir = make_project(tmp_path), tmp_path / "rows"
    command = [sys.executable, "-c", script, "prepare", f"--config={config}", f"--workdir={workdir}"]
    before = {*tmp_path.iterdir()}
    found = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert found.returncode == status
    *messages, last = found.stderr.splitlines()
    assert last == f"dwt: ended by {signum.name}; completed files are kept"
    assert all(line.startswith("prepare: ") for line in messages), messages
    assert {*tmp_path.iterdir()} == before


def test_no_torch_in_the_package():
    for file in (ROOT / "dwt_jax").rglob("*.py"):
        assert "import torch" not in file.read_text(), file
