"""The user's mistakes: one line each, exit status 2, never a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a file or the command line.

    The message is one line that names the key or the file, what was found and what
    was expected.
    """


class SaidElsewhere(UserError):
    """A mistake that another process of the run tells about: this one ends in silence."""


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the whole list if none is near.

    prefix: shown before the nearest, so that it can be copied.
    """
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
