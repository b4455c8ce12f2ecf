"""The one exception that stands for a user's mistake."""


class LaidError(Exception):
    """A wrong input. Its message is one clear line: what is wrong, where, both numbers, what to do.

    The command line prints it without a traceback and exits with status 2.
    """
