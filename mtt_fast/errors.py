"""The exception that a user's mistake, a bad file or a full disk raises, and the kinds of it that are told apart."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what (file or option), what was expected, what was found, how to mend it.
    The commands print it as `error: …` and exit with status 2; library callers catch a `ValueError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Diverged(InputError):
    """A run whose gradients stayed non-finite until it gave up: other settings may do, these do not."""


class NotFound(InputError):
    """A data set that is in none of the places where it was looked for: it may come there later."""


def one_line(text: str) -> str:
    """Return `text` with all that would break a line, or drive a terminal, escaped: file names may hold anything."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return " (did you mean …?)" for the known name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1) or [other for other in known if name and other.startswith(name)]
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
