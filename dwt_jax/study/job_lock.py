"""Locks by which processes divide the jobs of a study."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from dwt_jax.distributed.process_info import detect_processes
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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                yield False
                return
        try:
            yield True
        finally:
            if job.is_done():  # else another process may be waiting for this very file
                path.unlink(missing_ok=True)
