"""User errors: one line each, exit status 2, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error in a config, a file or the command line.

    The message is one line: the key or the file, what was found, what was expected.
    """


class ReportedElsewhere(UserError):
    """A UserError that another process prints; this process exits without a message."""


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
