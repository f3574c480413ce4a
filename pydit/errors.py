"""The two exceptions that mean "the input is wrong", as opposed to "the program is wrong"."""


class UserError(ValueError):
    """Bad input. The message names the argument, what was expected and what came.

    The command line prints it as one line and exits with code 2.
    """


class FormatError(UserError):
    """A file that is missing, truncated, of another format or version, or refused (pickles)."""
