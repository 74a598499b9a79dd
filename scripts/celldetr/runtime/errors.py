"""Errors for the person who runs the pipeline: each message says what was got, expected, where, and what to do."""


class CellDETRError(Exception):
    """An error whose message is all that the user needs; rules print it without a traceback and exit with 1."""


class InputError(CellDETRError):
    """Data that was read (an archive, a store, a table, weights) is not as expected."""


class ConfigError(CellDETRError):
    """A setting is unknown, missing, of the wrong type, out of range, or contradicts another setting."""
