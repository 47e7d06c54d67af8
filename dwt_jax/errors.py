"""User errors: one line each, exit status 2, no traceback."""

import difflib
import errno
import os
from collections.abc import Iterable

_OUT_OF_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, quota, limit of a file's size


class UserError(Exception):
    """An error in a config, a file or the command line.

    The message is one line: the key or the file, what was found, what was expected.
    """


class ReportedElsewhere(UserError):
    """A UserError that another process prints; this process exits without a message."""


class SaveFailed(Exception):
    """A write failed for a reason outside of the program. Files that were complete before are intact."""


def out_of_space_reason(error: BaseException | None) -> str:
    """Return the reason if a write failed for a full disk, a quota or a file size limit, else ''.

    Chained exceptions are searched too. Libraries raise their own types, so messages are compared as well.
    """
    while error is not None:
        for number in _OUT_OF_SPACE_ERRNOS:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return os.strerror(number)
        if "requested and" in str(error) and str(error).endswith(" written"):  # NumPy's message
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return ""


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Return a hint for a misspelled word, to append to an error message.

    Args:
        word: what the user wrote.
        candidates: the valid words.
        prefix: shown before the closest candidate, so that it can be copied.

    Returns:
        "; did you mean 'x'?" for the closest candidate, or all candidates if none is close.
    """
    candidates = sorted(candidates)
    matches = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if matches:
        return f"; did you mean '{prefix}{matches[0]}'?"
    return f"; known: {', '.join(candidates)}" if candidates else ""
