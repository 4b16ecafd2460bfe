"""The one exception that a user's mistake, a bad file or a full disk raises."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what (file or option), what was expected, what was found, how to mend it.
    The commands print it as `error: …` and exit with status 2; library callers catch a `ValueError`.
    """
