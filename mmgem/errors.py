"""The one kind of error that is the user's to mend: one line, exit code 2, no traceback."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do, in one line."""


def one_line(error: object) -> str:
    """Another library's message, its lines and runs of spaces folded."""
    return " ".join(str(error).split())
