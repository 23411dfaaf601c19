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
