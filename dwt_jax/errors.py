"""The user's mistakes: one line each, exit status 2, never a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a file or the command line.

    The message is one line that names the key or the file, what was found and what
    was expected.
    """


class ReportedElsewhere(UserError):
    """A mistake that another process of the run tells about: this one ends in silence."""


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the whole list if none is near.

    prefix: shown before the nearest, so that it can be copied.
    """
    candidates = sorted(candidates)
    matches = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if matches:
        return f"; did you mean '{prefix}{matches[0]}'?"
    return f"; known: {', '.join(candidates)}" if candidates else ""
