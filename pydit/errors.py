"""The two exceptions that mean "the input is wrong", as opposed to "the program is wrong", and errors on one line."""

import errno

#: What to do about a full disk.
MAKE_ROOM = "what was there before is as it was: make room and run it again"


class UserError(ValueError):
    """Bad input. The message names the argument, what was expected and what came.

    The command line prints it as one line and exits with code 2.
    """


class FormatError(UserError):
    """A file that is missing, truncated, of another format or version, or refused (pickles)."""


def one_line(error: Exception) -> str:
    """What an error says, on one line; of a full disk also what to do."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and "make room" not in text:
            text += f"; {MAKE_ROOM}"
    else:
        text = str(error) or type(error).__name__
    # What a file says may be written for a terminal to obey.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
