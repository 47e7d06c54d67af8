"""Locks by which processes divide the jobs of a study."""

from collections.abc import Iterator
from contextlib import contextmanager

from dwt_jax.distributed.process_info import detect_processes
from dwt_jax.files import try_lock
from dwt_jax.study.sweep import JobRecord


@contextmanager
def job_lock(job: JobRecord) -> Iterator[bool]:
    """Lock a job against other processes inside the block. Yield whether it is locked now.

    A process that ends, however it does, releases its locks. Always True where the file system has no locks,
    and for the processes of one distributed run, which run every job together.
    """
    if detect_processes() is not None:
        yield True
        return
    path = job.workdir.parent / f".{job.workdir.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        try:
            is_locked = try_lock(file)
        except OSError:
            is_locked = True
        if not is_locked:
            yield False
            return
        try:
            yield True
        finally:
            if job.is_done():  # else another process may be waiting for this very file
                path.unlink(missing_ok=True)
