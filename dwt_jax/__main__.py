"""The command line: one verb a job. Heavy imports happen inside the verbs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dwt_jax import __version__
from dwt_jax.config import Config
from dwt_jax.distributed.shutdown import defer_signals
from dwt_jax.errors import ReportedElsewhere, UserError, did_you_mean

EXIT_OK, EXIT_USER_ERROR, EXIT_RESUMABLE, EXIT_FAILURE = 0, 2, 75, 1

_CONFIG_HELP = "Python config file, with an argument behind a colon: configs/demo.py:student"
_OVERRIDES_HELP = "--config.KEY=VALUE sets any key of the config, e.g. --config."
_OVERRIDE_EXAMPLES = {
    **dict.fromkeys(("prepare", "train", "remap", "compile"), "train.steps=1e3"),
    "finetune": "recipe.epochs=5",
    "study": "title=Mine",
}


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        command = "".join(f"{word}: " for word in self.prog.split()[1:2])
        raise UserError(f"{command}{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 2 a mistake of the user, 75 stopped by a signal
    with everything saved, 1 any other failure that has a name."""

    def run() -> int | None:
        options, overrides = _parse_arguments(sys.argv[1:] if arguments is None else list(arguments))
        if options.verb in SINGLE_PROCESS:
            from dwt_jax.distributed import initialize

            initialize.require_single_process(options.verb)
        return options.run(options, overrides)

    return _exit_status(run)


def _exit_status(run: Callable[[], int | None]) -> int:
    """Call `run`; every way in which it may end as an exit status, said in one line."""
    try:
        return int(run() or EXIT_OK)
    except ReportedElsewhere:
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"dwt: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `dwt … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print("dwt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # each library has its own for a full disk
        if _is_disk_full(error):
            print("dwt: no space left on the disk, expected some; what was whole is kept", file=sys.stderr)
            return EXIT_FAILURE
        if not isinstance(error, OSError) or error.filename is None:
            raise
        print(f"dwt: {error.filename}: {error.strerror}, expected a path that can be used", file=sys.stderr)
        return EXIT_USER_ERROR


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error)
        if "No space left on device" in text or ("requested and" in text and text.endswith(" written")):
            return True  # the second is what numpy says
        error = error.__cause__ or error.__context__
    return False


def _path_argument(text: str) -> Path:
    """Of an option: an empty one, an unset variable of a shell, is not the directory we are in."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return Path(text)


def _parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = _build_parser()
    plain_arguments, overrides = _split_overrides(arguments)
    if plain_arguments and not plain_arguments[0].startswith("-") and plain_arguments[0] not in COMMANDS:
        raise UserError(f"no verb {plain_arguments[0]!r}{did_you_mean(plain_arguments[0], COMMANDS)}")
    if not plain_arguments:
        parser.print_help()
        raise SystemExit(EXIT_USER_ERROR)
    options = parser.parse_args(plain_arguments)
    if overrides and not hasattr(options, "config"):
        raise UserError(f"--config.{next(iter(overrides))}: 'dwt {options.verb}' takes no config")
    return options, overrides


def _split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """--config.key=value and --config.key value, apart from everything else."""
    plain_arguments, overrides = [], {}
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--config."):
            plain_arguments.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(remaining, "")
            if not value or value.startswith("--"):
                raise UserError(f"--config.{key}: no value, expected --config.{key}=VALUE")
        if not key:
            raise UserError("--config.: no key, expected --config.KEY=VALUE")
        overrides[key] = value
    return plain_arguments, overrides


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dwt",
        description="Distillation from Weak Teacher: pre-train a larger encoder with a smaller one's help.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dwt-jax {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, (add_options, run) in COMMANDS.items():
        text = add_options.__doc__ or ""
        epilog = _OVERRIDES_HELP + _OVERRIDE_EXAMPLES[name] if name in _OVERRIDE_EXAMPLES else None
        subparser = subparsers.add_parser(
            name, help=text.splitlines()[0], description=text, epilog=epilog, allow_abbrev=False
        )
        add_options(subparser)
        subparser.set_defaults(run=run)
    return parser


def _demo_options(parser: argparse.ArgumentParser) -> None:
    """the whole story on the built-in corpus, in minutes"""
    parser.add_argument("--workdir", type=_path_argument, default=Path("demo"), help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps; for trials (default 1)")


def _demo(options: argparse.Namespace, _: dict[str, str]) -> int | None:
    from dwt_jax import runtime_env

    if not 0 < options.scale <= 100:
        raise UserError(f"--scale is {options.scale}, expected more than 0 and at most 100")
    runtime_env.set_xla_env()
    from dwt_jax.study import demo

    return _training_exit_status(lambda: demo.run_demo(options.workdir, options.scale))


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    """text into a tokenizer and packed rows"""
    parser.add_argument("--config", required=True, help=_CONFIG_HELP)
    parser.add_argument(
        "--workdir", type=_path_argument, required=True, help="where the rows go; then data.path for training"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; default: one a core")


def _prepare(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from dwt_jax.config_loader import load_config
    from dwt_jax.data.prepare import prepare_data

    if options.workers < 0:
        raise UserError(f"--workers is {options.workers}, expected at least 0 (0: one a core)")
    prepare_data(
        load_config(options.config, overrides).data, options.workdir, workers=options.workers or None
    )


def _train_options(parser: argparse.ArgumentParser) -> None:
    """pre-train, alone or with a teacher; the same command resumes"""
    parser.add_argument("--config", required=True, help=_CONFIG_HELP)
    parser.add_argument(
        "--workdir", type=_path_argument, required=True, help="of the run: checkpoints, metrics, model/"
    )


@defer_signals()  # jax and the rest take seconds to be imported
def _train(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    from dwt_jax import runtime_env
    from dwt_jax.config_loader import load_config
    from dwt_jax.distributed import coordination, initialize

    def read() -> Config:
        config = load_config(options.config, overrides)
        initialize.check_platform(config.platform)
        return config

    config = (
        None if initialize.process_info_from_env() else read()
    )  # a mistake is told before jax is imported
    runtime_env.set_xla_env()

    def run() -> None:
        from dwt_jax.train.loop import train

        summary = train(config or coordination.run_on_all(read), options.workdir)
        coordination.log_on_main(
            f"{options.workdir}: held-out loss {summary['held_out']['held_out_loss']:.4f}, "
            f"model in {options.workdir / 'model'}"
        )

    return initialize.run_distributed(lambda: _exit_status(lambda: _training_exit_status(run)))


def _training_exit_status(run: Callable[[], Any]) -> int | None:
    """Call what trains, with its ways of ending early as exit statuses."""
    from dwt_jax.distributed.coordination import PeerExited, process_index
    from dwt_jax.distributed.shutdown import Preempted, TrainingFailed

    try:
        run()
    except Preempted as preemption:
        print(f"dwt: {preemption}", file=sys.stderr)
        return EXIT_RESUMABLE
    except TrainingFailed as failure:  # in all processes at once
        if process_index() == 0:
            print(f"dwt: {failure}", file=sys.stderr)
        return EXIT_FAILURE
    except PeerExited as peer_exit:
        print(f"dwt: {peer_exit}", file=sys.stderr)
        return peer_exit.status or EXIT_FAILURE
    return None


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    """held-out masked-LM loss, perplexity and accuracy of a model"""
    parser.add_argument("--model", required=True, help="a model directory or a run's work directory")
    parser.add_argument(
        "--data", type=_path_argument, required=True, help="a prepared directory (see dwt prepare)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="rows at a time (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _evaluate(options: argparse.Namespace, _: dict[str, str]) -> None:
    from dwt_jax import runtime_env

    runtime_env.set_xla_env()
    from dwt_jax.eval.evaluate_model import evaluate_model
    from dwt_jax.files import json_text
    from dwt_jax.text_format import format_float, format_with_error

    found = evaluate_model(options.model, options.data, options.batch_size)
    if options.json:
        print(json_text(found))
        return
    loss = format_with_error(found["held_out_loss"], found["standard_error"])
    print(f"held-out loss   {loss} (over documents)")
    print(f"perplexity      {format_float(found['perplexity'], 2)}")
    print(f"accuracy        top-1 {found['top1_accuracy']:.2%}, top-5 {found['top5_accuracy']:.2%}")
    print(f"from            {found['predictions']:,} predictions in {found['documents']:,} documents")


def _export_options(parser: argparse.ArgumentParser) -> None:
    """a run or model directory as a model directory for PyTorch"""
    parser.add_argument("--model", required=True, help="a run's work directory or a model directory")
    parser.add_argument("--out", type=_path_argument, required=True, help="the new model directory")
    parser.add_argument(
        "--step", type=int, help="of a run: the kept checkpoint of this step (default: the last)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of the weights; auto: as they are stored (a run: float32)",
    )
    parser.add_argument("--encoder-only", action="store_true", help="without heads, for AutoModel")


def _export(options: argparse.Namespace, _: dict[str, str]) -> None:
    from dwt_jax import runtime_env

    runtime_env.set_xla_env()
    from dwt_jax.runs.export import export_model

    name = export_model(options.model, options.step, options.out, options.dtype, options.encoder_only)
    print(f"{name} in {options.out}")


def _remap_options(parser: argparse.ArgumentParser) -> None:
    """a small model, or a run, as a larger one, with a report; or which way to begin (--pilot)"""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a run's work directory or a model directory")
    source.add_argument(
        "--run",
        dest="grown",
        metavar="RUN",
        help="a run to go on with as a larger one, at the same step of the same data",
    )
    parser.add_argument("--config", required=True, help=f"its `model` says the sizes. {_CONFIG_HELP}")
    parser.add_argument("--method", help="e.g. hyperclone, stack, stack+net2net; see docs/remapping.md")
    parser.add_argument("--out", type=_path_argument, help="the new model directory; with --run: the new run")
    parser.add_argument("--step", type=int, help="the kept checkpoint of this step (default: the last)")
    moments = parser.add_mutually_exclusive_group()
    moments.add_argument(
        "--moments",
        choices=("reset", "carry", "asymmetric"),
        help="with --run: of the optimiser (default reset; see docs/remapping.md)",
    )
    moments.add_argument(
        "--carry", dest="moments", action="store_const", const="carry", help="--moments=carry"
    )
    parser.add_argument("--split", choices=("even", "uneven"), default="", help="how copies share their work")
    parser.add_argument("--noise", type=float, default=0.0, help="of further copies, relative")
    parser.add_argument("--new-tokens", choices=("mean", "random"), help="default: mean")
    parser.add_argument("--new-positions", choices=("random", "tiled"), help="default: random")
    parser.add_argument("--seed", type=int, help="of what is drawn (default 0; with --run: the config's)")
    parser.add_argument(
        "--pilot", type=int, metavar="N", help="instead: train every method N steps of the config, and rank"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _remap(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from dwt_jax.growth import dispatch

    dispatch.run_remap(options, overrides)


def _compile_options(parser: argparse.ArgumentParser) -> None:
    """does it fit, and how fast at best, on chips that are not here"""
    parser.add_argument(
        "--config", required=True, help=f"{_CONFIG_HELP}; teacher.path may be one too, for its sizes"
    )
    parser.add_argument("--topology", required=True, help="e.g. v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8")
    parser.add_argument("--max-batch", action="store_true", help="search the largest batch that fits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _compile(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    from dwt_jax import runtime_env
    from dwt_jax.config_loader import load_config

    config = load_config(options.config, overrides)
    runtime_env.set_xla_env()
    runtime_env.use_cpu_only()
    from dwt_jax.aot.report import compile_command

    return compile_command(config, options.topology, options.json, options.max_batch)


def _finetune_options(parser: argparse.ArgumentParser) -> None:
    """a model on GLUE, the built-in tasks or files of your own; the same command resumes"""
    parser.add_argument("--model", required=True, help="a model directory or a run's work directory")
    parser.add_argument(
        "--workdir", type=_path_argument, required=True, help="a folder a task, and results.json"
    )
    parser.add_argument(
        "--step", type=int, help="of a run: the kept checkpoint of this step (default: the last)"
    )
    parser.add_argument("--config", default="", help=f"default: configs/glue.py. {_CONFIG_HELP}")
    parser.add_argument("--task", help="arguments of the config: era (the default), rte,cola, …")


def _finetune(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    from dwt_jax import runtime_env
    from dwt_jax.config_loader import bundled_config_path
    from dwt_jax.finetune.config import load_task_configs

    todo = load_task_configs(options.config or str(bundled_config_path("glue.py")), options.task, overrides)
    runtime_env.set_xla_env()

    def run() -> None:
        from dwt_jax.finetune import runner

        print(
            runner.format_finetune_table(
                runner.finetune_tasks(todo, options.model, options.workdir, options.step)
            )
        )

    return _training_exit_status(run)


def _study_options(parser: argparse.ArgumentParser) -> None:
    """a grid of runs, and the report on it; the same command goes on where it stopped"""
    parser.add_argument("--config", required=True, help="configs/study/NAME.py:SCALE; see docs/studies.md")
    parser.add_argument(
        "--workdir", type=_path_argument, required=True, help="of the study: runs/, finetuned/, report"
    )
    parser.add_argument("--index", type=int, help="do one job alone, by its number in --list (job arrays)")
    parser.add_argument("--list", action="store_true", help="print the jobs and what is done")
    parser.add_argument("--dry-run", action="store_true", help="the same with FLOPs and an estimate of time")


def _study(options: argparse.Namespace, overrides: dict[str, str]) -> int | None:
    from dwt_jax.study import runner, sweep

    study = sweep.load_study(options.config, overrides)
    if options.list or options.dry_run:
        print(runner.format_plan(study, options.workdir, costs=options.dry_run))
        return None
    from dwt_jax import runtime_env

    runtime_env.set_xla_env()

    def run() -> None:
        if runner.run_study(study, options.workdir, options.index):
            from dwt_jax.study import sweep_html

            print(f"report in {sweep_html.write_study_report(options.workdir)}")

    return _training_exit_status(run)


def _report_options(parser: argparse.ArgumentParser) -> None:
    """compare finished runs: tables and curves in one HTML file"""
    parser.add_argument(
        "--workdir", type=_path_argument, required=True, help="the folder whose subfolders are runs"
    )
    parser.add_argument(
        "--out", type=_path_argument, help="default: report.html in it; .md and .csv go beside it"
    )


def _report(options: argparse.Namespace, _: dict[str, str]) -> None:
    from dwt_jax.study import manifest, report, sweep_html

    write = (
        sweep_html.write_study_report
        if (options.workdir / manifest.MANIFEST_NAME).exists()
        else report.write_report
    )
    print(f"report in {write(options.workdir, options.out)}")


COMMANDS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "demo": (_demo_options, _demo),
    "prepare": (_prepare_options, _prepare),
    "train": (_train_options, _train),
    "evaluate": (_evaluate_options, _evaluate),
    "export": (_export_options, _export),
    "remap": (_remap_options, _remap),
    "compile": (_compile_options, _compile),
    "finetune": (_finetune_options, _finetune),
    "study": (_study_options, _study),
    "report": (_report_options, _report),
}

SINGLE_PROCESS = frozenset({*COMMANDS} - {"train"})
"""The verbs that are not for several processes."""


if __name__ == "__main__":
    raise SystemExit(main())
