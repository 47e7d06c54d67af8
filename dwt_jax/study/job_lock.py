"""Locks of jobs, so that several processes can share a study."""

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import Timeout

from dwt_jax.distributed.process_info import detect_processes
from dwt_jax.files import acquire_lock
from dwt_jax.study.sweep import JobRecord


@contextmanager
def job_lock(job: JobRecord) -> Iterator[bool]:
    """Lock a job against other processes inside the block. Yield whether it is locked now.

    A process releases its locks when it ends for any reason. The value is always True if the file system has
    no locks, and for the processes of one distributed run, which run every job together.
    """
    if detect_processes() is not None:
        yield True
        return
    path = job.workdir.parent / f".{job.workdir.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(path)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        if lock:
            if job.is_done():  # else another process may be waiting for this very file
                path.unlink(missing_ok=True)
            lock.release()
