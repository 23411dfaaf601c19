"""Errors that a user can correct; the text of each is one sentence for that user."""


class UserError(Exception):
    """A mistake that the user can correct.

    The text is one sentence that names the field or file, its value and what would be valid. Commands print it without
    a traceback and exit with 1.
    """


class ConfigError(UserError, ValueError):
    """A setting that cannot work."""


class DataError(UserError, ValueError):
    """Data that cannot be used; the text names the file or the count."""


class Diverged(UserError, RuntimeError):
    """Numbers from which no training can go on: a loss, gradient or parameter that is not finite, or a wrong copy."""


class Preempted(Exception):
    """The machines of this run are to be taken away; the text says what was saved."""


# Exit codes, in the form 128 + signal that shells use. Launchers start a run again after both; a user's mistake is 1.
EXIT_PREEMPTED = 143  # SIGTERM.
EXIT_HUNG = 142  # SIGALRM.
EXIT_INTERRUPTED = 130  # SIGINT, which is Ctrl-C.
