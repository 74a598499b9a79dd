"""Errors for the person who runs the pipeline: each message says what was got, expected, where, and what to do."""


class CellDETRError(Exception):
    """An error whose message is complete in itself; rule scripts print it without a traceback and exit with 1."""


class InputError(CellDETRError):
    """Data that was read (an archive, a store, a table, a checkpoint) is not what it must be."""


class ConfigError(CellDETRError):
    """A setting is unknown, missing, of the wrong type, out of range, or contradicts another."""
