"""Compare finished runs: tables and curves in one HTML file, and each chart as PDF and PNG."""

import argparse

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
    from dwt_jax.study import manifest, run_report, study_report

    is_study = (options.workdir / manifest.MANIFEST_NAME).exists()
    write = study_report.write_study_report if is_study else run_report.write_run_report
    print(f"report in {write(options.workdir, options.out)}")
