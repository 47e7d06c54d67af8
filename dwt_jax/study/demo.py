"""The demo (`dwt demo`): the study configs/study/demo.py."""

import time
from pathlib import Path

from dwt_jax.config_loader import bundled_config_path
from dwt_jax.logs import logger
from dwt_jax.study.run_and_report import run_and_report
from dwt_jax.study.sweep import load_study
from dwt_jax.text_format import format_duration


def run_demo(workdir: Path, scale: float = 1.0) -> None:
    """Run the demo in `workdir`. Finished runs are not repeated, so an interrupted demo resumes.

    Args:
        workdir: directory of the study.
        scale: multiplies the number of steps and of fine-tuning examples, for trials.
    """
    start = time.perf_counter()
    run_and_report(load_study(f"{bundled_config_path('study/demo.py')}:{scale:g}"), workdir)
    logger.info(f"demo: {format_duration(time.perf_counter() - start)}")
