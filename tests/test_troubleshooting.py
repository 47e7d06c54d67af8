"""docs/troubleshooting.md: the program prints every message that the page quotes."""

import ast
import errno
import fcntl
import functools
import json
import pwd
import re
import shlex
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dwt_jax.cli import main
from dwt_jax.config import Config
from dwt_jax.config_loader import config_to_dict, flatten_dict
from dwt_jax.distributed import initialize
from dwt_jax.distributed.process_info import ProcessInfo
from dwt_jax.finetune.config import FinetuneConfig, load_finetune_config
from helpers.paths import ROOT
from helpers.runs import CONFIG, write_corpus

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TABLE_LINES = [line for line in PAGE.splitlines() if line.startswith("|")]
ROW = re.compile(r"\| `([^`|]+)` \| [^|]+ \| [^|]+ \|")
MESSAGES = [match[1] for match in map(ROW.fullmatch, TABLE_LINES) if match]


# What the page says, and what the program does


def pattern(message: str) -> re.Pattern[str]:
    """A message of the page as a pattern: … stands for any text."""
    return re.compile(".*".join(map(re.escape, message.split("…"))))


def is_printed(message: str, output: str) -> bool:
    return any(pattern(message).fullmatch(line.removeprefix("dwt: ")) for line in output.splitlines())


def is_in_source(message: str) -> bool:
    """Whether the constant parts of a message are, in their order, those of one text in the source."""
    return any(pattern(message).search(text) for text in source_texts())


@functools.cache
def source_texts() -> frozenset[str]:
    """All texts in the source but docstrings, with … for what an f-string puts in."""
    texts = set()
    for path in (ROOT / "dwt_jax").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts |= {constant_text(node) for node in ast.walk(tree) if id(node) not in docstrings}
    return frozenset(texts - {"…"})


def constant_text(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(constant_text, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return constant_text(left) + constant_text(right)
    return "…"


def message_with(part: str) -> str:
    (message,) = [message for message in MESSAGES if part in message]
    return message


def misquoted(message: str) -> str:
    """The message with its longest word spelled backwards."""
    word = max(re.findall(r"[a-z]+", message), key=len)
    return message.replace(word, word[::-1])


# Messages that are provoked

TINY = "--config=tiny.py:rows --workdir=new"
TEACHER = "--config.teacher.path=run --config.distill.alpha_soft=1"
RUN = "train --config=tiny.py:rows --workdir=run --config.train.steps=2 --config.train.save_every=1"
PREPARE = "prepare --config=tiny.py --workers=1 --workdir=out"
PREPARE_LONG_ROWS = (
    "prepare --config=tiny.py --workers=1 --workdir=long --config.data.sequence_length=64 "
    "--config.data.tokenizer.path=rows/tokenizer"
)
FINETUNE = (
    "finetune --model=run --workdir=tuned --task=files --config.examples.task=own "
    "--config.examples.train=texts.tsv --config.examples.dev=texts.tsv"
)
SPECIAL_TOKENS = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
WORDS = "the old small green quiet quick cat dog bird horse child sees hears follows finds"
EXAMPLES = "sentence\tlabel\n" + "the cat\tyes\nthe dog\tno\n" * 4
NUMBERED_EXAMPLES = EXAMPLES.replace("yes", "0.5").replace("no", "1")

Setup = Callable[[pytest.MonkeyPatch], Any]


class Case(NamedTuple):
    """How a message is provoked, in a directory with a corpus, its config tiny.py, rows and a run.

    Attributes:
      commands: command lines of dwt, one a line.
      status: exit status of the last one.
      files: texts by name, written before.
      setup: called before. A file or socket that it returns is open until the end.
    """

    commands: str
    status: int = 2
    files: Mapping[str, str | bytes] = {}
    setup: Setup | None = None


def variables(**values: str | None) -> Setup:
    def set_variables(monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in values.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_variables


def processes(coordinator: str, **more: str) -> Setup:
    return variables(JAX_COORDINATOR_ADDRESS=coordinator, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0", **more)


def remove_home(monkeypatch):
    def no_entry(uid):
        raise KeyError(uid)

    variables(HOME=None, DWT_CACHE=None, XDG_CACHE_HOME=None)(monkeypatch)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


def hold_lock(_):
    file = open("run/.lock", "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def refuse_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def listen(monkeypatch):
    listener = socket.create_server(("", 0), family=socket.AF_INET6)
    processes(f"localhost:{listener.getsockname()[1]}")(monkeypatch)
    return listener


def truncate_checkpoints(*steps):
    def truncate(_):
        for step in steps:
            for path in Path(f"run/checkpoints/{step}").rglob("d/*"):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        shutil.rmtree("run/model")

    return truncate


def edit_json(path, **values):
    def edit(_):
        content = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps({**content, **values}))

    return edit


def rename_tensors(_):
    from safetensors.numpy import load_file, save_file

    path = "run/model/model.safetensors"
    save_file({f"net.{name}": tensor for name, tensor in load_file(path).items()}, path)


def move_config_behind_link(_):
    Path("run/model/config.json").rename("config.json")
    Path("run/model/config.json").symlink_to(Path("config.json").absolute())


def link_to_nowhere(_):
    Path("more.txt").symlink_to("nowhere.txt")


def record_nan_loss(_):
    Path("run/summary.json").unlink()
    path = Path("run/evaluations.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[-1]["held_out_loss"] = None
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def start_other_seeds(_):
    keys = {"task": "own", "train": "texts.tsv", "dev": "texts.tsv"}
    overrides = {f"examples.{key}": value for key, value in keys.items()}
    config = load_finetune_config("configs/glue.py:files", {**overrides, "recipe.seeds": "7,8"})
    Path("tuned/own").mkdir(parents=True)
    Path("tuned/own/config.json").write_text(json.dumps(config_to_dict(config)))


CASED_NORMALIZER = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": False,
}
CASES = {
    "no file '…', expected a Python": Case("train --config=nowhere.py --workdir=new"),
    "needs an argument": Case("train --config=configs/text.py --workdir=new"),
    "unknown key": Case(f"train {TINY} --config.train.stepz=3"),
    "' is now '": Case(f"train {TINY} --config.train.accumulate=2"),
    "to name a teacher": Case(f"train {TINY} --config.distill.token_selection=entropy"),
    "….kind … with it": Case(f"train {TINY} --config.data.sources.0.field=body"),
    "train.epochs is": Case(f"train {TINY} --config.train.epochs=3"),
    "at most 100,000,000": Case(f"train {TINY} --config.train.steps=2000000000"),
    "(model.max_position_embeddings)": Case(f"train {TINY} --config.data.sequence_length=64"),
    "platform is": Case(f"train {TINY} --config.platform=tpu", setup=variables(JAX_PLATFORMS=None)),
    "in the environment": Case(f"train {TINY}", setup=variables(JAX_ENABLE_X64="1")),
    "the home directory is unknown": Case(f"train {TINY}", setup=remove_home),
    "matches no file": Case(f"{PREPARE} --config.data.sources.0.path=rows"),
    "a broken symbolic link": Case(f"{PREPARE} --config.data.sources.0.path=*.txt", setup=link_to_nowhere),
    "archive": Case(
        f"{PREPARE} --config.data.sources.0.path=a.zip", files={"a.zip": b"PK\x03\x04" + bytes(99)}
    ),
    "is JSON lines": Case(
        f"{PREPARE} --config.data.sources.0.path=a.jsonl", files={"a.jsonl": '{"text": "A cat."}\n'}
    ),
    "is not UTF-8": Case(
        f"{PREPARE} --config.data.sources.0.path=a.txt", files={"a.txt": "café\n".encode("latin-1")}
    ),
    "CR alone": Case(f"{PREPARE} --config.data.sources.0.path=a.txt", files={"a.txt": "A cat.\rA dog.\r"}),
    "data.validation_fraction is": Case(
        f"{PREPARE} --config.data.sources.0.path=a.txt --config.data.validation_fraction=0.01",
        files={"a.txt": "A cat.\nA dog.\n"},
    ),
    "of the text's … are unknown": Case(
        f"{PREPARE} --config.data.tokenizer.path=vocab.txt",
        files={"vocab.txt": f"{SPECIAL_TOKENS}The\nOld\n"},
    ),
    "vowel signs": Case(
        f"{PREPARE} --config.data.sources.0.path=a.txt",
        files={"a.txt": "".join(f"किताब {i} मेज़ पर है।\n" for i in range(40))},
    ),
    "holds rows prepared with other": Case(
        "prepare --config=tiny.py --workdir=rows --config.data.sequence_length=16"
    ),
    "data.path is": Case("train --config=tiny.py:nowhere --workdir=new"),
    "data.… is": Case(f"train {TINY} --config.data.sequence_length=16"),
    "holds a run of another config": Case(f"{RUN} --config.optimizer.weight_decay=0.5"),
    "another process trains here": Case(RUN, setup=hold_lock),
    "cannot be locked": Case(RUN, 0, setup=refuse_locks),
    "trying the one before": Case("export --model=run --out=exported", 0, setup=truncate_checkpoints(2)),
    "none of the checkpoints": Case("export --model=run --out=exported", setup=truncate_checkpoints(1, 2)),
    "teacher.path: … has another vocabulary": Case(
        "prepare --config=tiny.py --workers=1 --workdir=other --config.data.sources.0.path=a.txt\n"
        "train --config=tiny.py:other --workdir=new --config.teacher.path=run",
        files={"a.txt": "".join(f"number {i} and {i * i}\n" for i in range(40))},
    ),
    "was written for another": Case(
        f"cache --config=tiny.py:rows {TEACHER} --out=answers\n"
        f"train {TINY} {TEACHER} --config.teacher.cache=answers --config.seed=1"
    ),
    "the Hugging Face Hub": Case(f"train {TINY} --config.teacher.path=google-bert/bert-base-uncased"),
    "weights of": Case(
        "evaluate --model=a --data=rows", files={"a/config.json": "{}", "a/tf_model.h5": "weights"}
    ),
    "a checkpoint of the run": Case("evaluate --model=run/checkpoints/2 --data=rows"),
    "Git LFS": Case(
        "evaluate --model=run --data=rows",
        files={"run/model/model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
    ),
    "a link to": Case("evaluate --model=run --data=rows", setup=move_config_behind_link),
    "model_type is": Case(
        "evaluate --model=run --data=rows", setup=edit_json("run/model/config.json", model_type="albert")
    ),
    "its names begin with": Case("evaluate --model=run --data=rows", setup=rename_tensors),
    "without a language-model head": Case(
        "export --model=run --out=encoder --encoder-only\nevaluate --model=encoder --data=rows"
    ),
    "the first line is separated by": Case(FINETUNE, files={"texts.tsv": EXAMPLES.replace("\t", ",")}),
    "a text with a comma": Case(
        FINETUNE.replace(".tsv", ".csv"),
        files={"texts.csv": EXAMPLES.replace("\t", ",") + "the cat, the dog,yes\n"},
    ),
    "a text with a tab": Case(FINETUNE, files={"texts.tsv": f"{EXAMPLES}the cat\tthe dog\tyes\n"}),
    "quoted as in a CSV": Case(FINETUNE, files={"texts.tsv": 'sentence\tlabel\n"the ""cat"""\tyes\n'}),
    "numbers with fractions": Case(FINETUNE, files={"texts.tsv": NUMBERED_EXAMPLES}),
    "recipe.seeds is": Case(FINETUNE, files={"texts.tsv": EXAMPLES}, setup=start_other_seeds),
    "has no classification head": Case("predict --model=run corpus.txt"),
    "has no mask": Case("fill-mask --model=run 'the <mask>'"),
    "expected all three or none": Case(f"train {TINY}", setup=variables(JAX_NUM_PROCESSES="2")),
    "each host's own address": Case(
        f"train {TINY}", setup=processes("localhost:1234", SLURM_STEP_NUM_NODES="2")
    ),
    "is in use on this host": Case(f"train {TINY}", setup=listen),
    "the held-out loss is": Case(RUN, 1, setup=record_nan_loss),
    "but another tokenizer": Case(
        f"{PREPARE_LONG_ROWS}\nevaluate --model=run --data=long",  # the rows are too long, which saves time
        setup=edit_json("run/model/tokenizer.json", normalizer=CASED_NORMALIZER),
    ),
    "after it as in the rows": Case(
        f"{PREPARE} --config.data.tokenizer.path=run/model",
        0,
        setup=edit_json("run/model/tokenizer.json", post_processor=None),
    ),
    "is unknown to the tokenizer": Case(
        f"{PREPARE} --config.data.tokenizer.path=vocab.txt",
        0,
        files={"vocab.txt": SPECIAL_TOKENS + WORDS.replace(" ", "\n")},
    ),
}
"""By a part of the message."""

NOT_PROVOKED = {
    "JAX cannot use a device": "needs a broken device (tests/test_runtime_env.py)",
    "JAX_PLATFORMS: ": "needs a process of its own (tests/test_runtime_env.py)",
    "worker processes cannot be started": "needs a limit of processes (tests/data/test_prepare.py)",
    "worker processes was killed": "needs a process that the kernel ends",
    "checkpoint saved": "trains (tests/train/test_loop.py)",
    "a checkpoint cannot be written": "trains (tests/train/test_loop.py)",
    "not finite for": "trains (tests/train/test_loop.py)",
    "process 0 writes": "waits for a minute",
    "train.watchdog": "ends its process (tests/distributed/test_watchdog.py)",
}
"""A part of the message, and why the source is searched for it."""

TIMEOUT_PART = "have connected to the coordinator"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with a corpus, its config, rows and a finished run with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("project")
    write_corpus(folder / "corpus.txt")
    (folder / "tiny.py").write_text(CONFIG.replace("CORPUS", "corpus.txt"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert main(shlex.split("prepare --config=tiny.py --workers=1 --workdir=rows")) == 0
        assert main(shlex.split(RUN)) == 0
    return folder


@pytest.mark.parametrize("part", CASES)
def test_the_program_prints_the_message(part, project, tmp_path, monkeypatch, capfd):
    message, case = message_with(part), CASES[part]
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name, content in case.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with (case.setup and case.setup(monkeypatch)) or nullcontext():
        statuses = [main(shlex.split(command)) for command in case.commands.splitlines()]
    captured = capfd.readouterr()
    output = captured.out + captured.err
    assert statuses == [0] * (len(statuses) - 1) + [case.status], output
    assert is_printed(message, output), output
    assert not is_printed(misquoted(message), output)


def test_processes_that_cannot_connect_print_the_message():
    info = ProcessInfo(0, 2, "localhost:1234", "JAX_COORDINATOR_ADDRESS", "deactivate")
    assert is_printed(message_with(TIMEOUT_PART), f"dwt: {initialize._timeout_message(info, 300)}")


@pytest.mark.parametrize("part", NOT_PROVOKED)
def test_the_message_is_in_the_source(part):
    message = message_with(part)
    assert is_in_source(message)
    assert not is_in_source(misquoted(message))


def test_each_message_is_tested_once():
    assert len(MESSAGES) == len(set(MESSAGES)) >= 30
    headings = [line for line in TABLE_LINES if not ROW.fullmatch(line)]
    assert set(headings) == {"| message | cause | remedy |", "|---|---|---|"}
    tested = [message_with(part) for part in (*CASES, *NOT_PROVOKED, TIMEOUT_PART)]
    assert sorted(tested) == sorted(MESSAGES)


def test_keys_and_variables_exist():
    keys = flatten_dict(config_to_dict(Config())) | flatten_dict(config_to_dict(FinetuneConfig()))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    prose = re.findall(r"`([^`]+)`", re.sub(r"^\| `[^`]+`", "", PAGE, flags=re.MULTILINE))
    named = [re.fullmatch(r"(?:--config\.)?(([a-z]+)\.[a-z_.]+)(?:=\S+)?", text) for text in prose]
    mentioned = {match[1] for match in named if match and match[2] in sections}
    assert len(mentioned) >= 10
    assert mentioned <= {*keys}
    source = "".join(source_texts())
    for variable in re.findall(r"(?:JAX|DWT)_[A-Z_0-9]+", PAGE):
        assert variable in source, variable
