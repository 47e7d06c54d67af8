"""Compare finished runs: tables and curves in one HTML file, and each chart as PDF and PNG."""

import argparse
from pathlib import Path

from dwt_jax.cli.arguments import path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--workdir", type=path_argument, required=True, help="directory whose subdirectories are runs"
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        help="output file (default: report.html in --workdir); .md, .csv and charts are written next to it",
    )


def run(options: argparse.Namespace, _: dict[str, str]) -> None:
    """Write the report of the runs, or of the study, in --workdir."""
    print(f"report in {write_directory_report(options.workdir, options.out)}")


def write_directory_report(workdir: Path, out: Path | None = None) -> Path:
    """Write the report on a directory.

    Args:
        workdir: directory of a study, or a directory with runs up to two levels below it, where an optional
            `study.json` sets the roles of the runs (docs/architecture.md).
        out: another path ending in .html, or a directory.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: no run is finished, or as `collect_study_results` does.
    """
    from dwt_jax.study import manifest
    from dwt_jax.study.report import report_path, write_report
    from dwt_jax.study.results import collect_study_results
    from dwt_jax.study.run_comparison import collect_runs
    from dwt_jax.study.run_report import run_report
    from dwt_jax.study.study_report import study_report

    target = report_path(workdir, out)
    if (workdir / manifest.MANIFEST_NAME).exists():
        return write_report(study_report(collect_study_results(workdir)), target)
    return write_report(run_report(collect_runs(workdir)), target)
