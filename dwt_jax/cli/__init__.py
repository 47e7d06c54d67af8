"""The command line, one module per command. A command imports jax and other slow modules inside `run`."""

import argparse
import fcntl
import io
import itertools
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from dwt_jax import __version__
from dwt_jax.cli import (
    cache,
    demo,
    evaluate,
    export,
    fill_mask,
    finetune,
    generate,
    pilot,
    predict,
    prepare,
    remap,
    remap_run,
    report,
    study,
)
from dwt_jax.cli import compile as compile_step
from dwt_jax.cli import train as train_run
from dwt_jax.cli.arguments import split_overrides
from dwt_jax.cli.exit_status import EXIT_USER_ERROR, exit_status, raise_at_signals
from dwt_jax.errors import UserError, did_you_mean


class Command(Protocol):
    """The interface of a command's module. The module's docstring is the help text."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Declare the flags of the command."""

    def run(self, options: argparse.Namespace, overrides: dict[str, str], /) -> int | None:
        """Run the command with its flags and config overrides. None is exit status 0."""


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "prepare": prepare,
    "cache": cache,
    "train": train_run,
    "evaluate": evaluate,
    "export": export,
    "remap": remap,
    "remap-run": remap_run,
    "pilot": pilot,
    "compile": compile_step,
    "finetune": finetune,
    "predict": predict,
    "fill-mask": fill_mask,
    "generate": generate,
    "study": study,
    "report": report,
}

SINGLE_PROCESS = frozenset({*COMMANDS} - {"train"})
"""Commands that run in one process only."""

RENAMED_FLAGS = {
    ("remap", "--run"): ("remap-run --run", "RUN"),
    ("remap", "--moments"): ("remap-run --moments", "MOMENTS"),
    ("remap", "--carry"): ("remap-run --carry", ""),
    ("pilot", "--model"): ("pilot --teacher", "MODEL"),
}
"""(command, flag) as of an earlier version → (command and flag now, placeholder of its value)."""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        command = "".join(f"{word}: " for word in self.prog.split()[1:2])
        message = re.sub(r"^argument (--\S+): is ", r"\1 is ", message)
        raise UserError(f"{command}{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      arguments: the command line without the program's name. Default: that of this process.

    Returns:
      The exit status: 0 success; 2 user error; 75 stopped by a signal after saving a checkpoint; 128 + N
      ended by signal N; 1 any other failure that is reported in one line.
    """

    _degrade_streams()

    def run() -> int | None:
        options, overrides = parse_arguments(sys.argv[1:] if arguments is None else list(arguments))
        if options.command not in SINGLE_PROCESS:
            # While a process waits for others, in a library, no handler of Python runs: the default ends it.
            return COMMANDS[options.command].run(options, overrides)
        from dwt_jax.distributed import initialize

        initialize.require_single_process(options.command)
        with raise_at_signals():
            return COMMANDS[options.command].run(options, overrides)

    return exit_status(run)


def _degrade_streams() -> None:
    """Keep a run alive if output fails: replace unprintable characters, drop writes to a closed stream."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            # A stream that a script's caller closed has the number of the script itself, open for reading.
            if _is_read_only(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_read_only(stream: io.TextIOWrapper) -> bool:
    try:
        return fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:  # a stream in memory, which has no number
        return False


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse a command line into flags and config overrides.

    Raises:
      UserError: arguments that are no text, unknown commands and flags, wrong values, overrides of a command
        without config.
    """
    _check_encoding(arguments)
    parser = _build_parser()
    flags, overrides = split_overrides(arguments)
    if not flags:
        parser.print_help()
        raise SystemExit(EXIT_USER_ERROR)
    if not flags[0].startswith("-") and flags[0] not in COMMANDS:
        raise UserError(f"unknown command {flags[0]!r}{did_you_mean(flags[0], COMMANDS)}")
    _check_renamed_flags(flags)
    options, unknown = parser.parse_known_args(flags)
    if unknown:  # argparse would report these without the name of the command
        raise UserError(
            f"{options.command}: unrecognized arguments: {' '.join(unknown)}; "
            f"see dwt {options.command} --help"
        )
    if overrides and not hasattr(options, "config"):
        raise UserError(f"--config.{next(iter(overrides))}: 'dwt {options.command}' takes no config")
    return options, overrides


def _check_encoding(arguments: Sequence[str]) -> None:
    """Raise UserError for an argument that is not valid text: it cannot be tokenized or written to a file."""
    for argument in arguments:
        if any("\udc80" <= char <= "\udcff" for char in argument):  # bytes that Python could not decode
            encoding = sys.getfilesystemencoding()
            raise UserError(
                f"{argument}: is not {encoding}, expected text in the locale's encoding (LC_ALL=C.UTF-8)"
            )


def _check_renamed_flags(flags: Sequence[str]) -> None:
    """Raise UserError with the new name of the first flag that was renamed."""
    command = flags[0]
    for argument, following in itertools.pairwise([*flags[1:], ""]):
        flag, equals, value = argument.partition("=")
        if (command, flag) not in RENAMED_FLAGS:
            continue
        new_flag, placeholder = RENAMED_FLAGS[command, flag]
        if placeholder:
            value = value if equals else following
            new_flag += f"={placeholder if not value or value.startswith('--') else value}"
        raise UserError(f"{command} {flag} is now dwt {new_flag}")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dwt",
        description="Distillation from Weak Teacher: pre-train a language model with a smaller one.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dwt-jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in COMMANDS.items():
        text = command.__doc__ or ""
        subparser = subparsers.add_parser(
            name, help=text.partition("\n")[0], description=text, allow_abbrev=False
        )
        command.add_arguments(subparser)
    return parser
