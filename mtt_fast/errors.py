"""The exception that a user's mistake, a bad file or a full disk raises, and the kinds of it that are told apart."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what (file or option), what was expected, what was found, how to mend it.
    The commands print it as `error: …` and exit with status 2; library callers catch a `ValueError`.
    """


class Diverged(InputError):
    """A run whose gradients stayed non-finite until it gave up: other settings may do, these do not."""


class NotFound(InputError):
    """A data set that is in none of the places where it was looked for: it may come there later."""
