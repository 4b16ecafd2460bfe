"""The exception for a user's mistake, a bad file or a full disk, and its subclasses."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Sequence


class InputError(ValueError):
    """An error in the user's input.

    The message is one line: what (file or option), what was expected, what was found, how to fix it. A library names an
    argument in backquotes, `lr_teacher`, which the commands show as the flag: --lr_teacher.
    The commands print it as `error: …` and exit with status 2; library callers catch a `ValueError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Diverged(InputError):
    """A run whose gradients stayed non-finite until it gave up: other settings may work, these do not."""


class OutOfRange(InputError, IndexError):
    """A position that a sequence does not have."""


class NotFound(InputError):
    """A data set that is in none of the expected places: it may be downloaded later."""


def reason_of(error: OSError | ValueError) -> str:
    """Return the reason of an error of the operating system as text, without the path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def remedy_for(error: OSError | ValueError, fix: str = "check the path") -> str:
    """Return, as an imperative, how to fix a failed read or write; `fix` if the path itself is wrong.

    `error` is an `OSError`, or the `ValueError` for a path with a NUL.
    """
    return _REMEDIES.get(getattr(error, "errno", None) or 0, fix)


_REMEDIES = {
    errno.ENOTEMPTY: "choose another folder, or empty this one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "check the permissions, or choose a place that you may read and write"
    ),
    errno.EROFS: "choose a place that is not read-only",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EFBIG: "choose a file system (or a limit, ulimit -f) that takes files of this size",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, which hold too many files open",
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY), "end the program that uses it"),
    errno.ENOMEM: "free some memory",
    errno.EAGAIN: "end other programs, or raise the limit of processes (ulimit -u)",
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT), "check that the network file system is there"),
    **dict.fromkeys((errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH), "check the network"),
}
"""How to fix an `OSError` other than a wrong path, by its errno."""


def one_line(text: str) -> str:
    """Return `text` with every character escaped that would break a line or control a terminal, since file names may contain any."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def dtype_name(dtype: object) -> str:
    """Return the name of a dtype of torch without the module, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return " (did you mean …?)" for the known name closest to `name` in any case of letters, or nothing."""
    folded, wanted = {other.casefold(): other for other in known}, name.casefold()
    close = difflib.get_close_matches(wanted, folded, n=1) or [
        other for other in folded if wanted and other.startswith(wanted)
    ]
    return f" (did you mean {prefix}{folded[close[0]]}?)" if close else ""
