"""Run a study and keep its report up to date (`dwt study`, `dwt demo`)."""

from pathlib import Path

from dwt_jax.distributed.shutdown import BETWEEN_RUNS, handle_signals
from dwt_jax.logs import logger
from dwt_jax.study.extra_results import MASKED_WORDS_NAME
from dwt_jax.study.report import report_path, write_report
from dwt_jax.study.results import collect_study_results
from dwt_jax.study.runner import run_study
from dwt_jax.study.study_report import masked_words_lines, study_lines, study_report
from dwt_jax.study.sweep import Job, Study


def run_and_report(study: Study, workdir: Path, index: int | None = None) -> None:
    """Run the jobs of a study that are not done, write the report after each, and print it at the end.

    The path of the report is printed at the end, and once there are two runs to compare. The guesses of
    masked words are printed as soon as there are any. Charts are written as files only at the end.

    Args:
        study: the config.
        workdir: directory of the study.
        index: run only the job with this index; then the report is written once all jobs are done.

    Raises:
        UserError: as `run_study` does.
        Preempted: after a signal.
    """
    path = report_path(workdir, None)
    announced, masked_words_printed = False, (workdir / MASKED_WORDS_NAME).exists()

    def update_report(job: Job) -> None:
        nonlocal announced, masked_words_printed
        results = collect_study_results(workdir)
        write_report(study_report(results), path, chart_files=False)
        if job.kind == "train" and not announced and sum(len(arm.runs) for arm in results.arms.values()) > 1:
            announced = True
            logger.info(f"study: report so far in {path}")
        if not masked_words_printed and results.masked_words:
            masked_words_printed = True
            lines = masked_words_lines(results)
            print("\n".join(lines), flush=True)
            logger.info(f"study: report so far in {path}")

    with handle_signals(BETWEEN_RUNS):
        is_complete = run_study(study, workdir, index, update_report if index is None else lambda _: None)
    if not is_complete:
        return
    results = collect_study_results(workdir)
    write_report(study_report(results), path)
    print("\n".join(["", *study_lines(results), ""]))
    print(f"report in {path}", flush=True)
