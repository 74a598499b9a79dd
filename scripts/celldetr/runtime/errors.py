"""Errors for the person who runs the pipeline: each message says what was got, expected, where, and what to do."""

import re

_SECRETS = re.compile(r"""(?<=://)[^\s/?#]*(?=@)|(?<=\?)[^\s'"<>()\[\]{}]*=[^\s'"<>()\[\]{}]*(?<![:;,.])""")


def masked(text: str) -> str:
    """Hide the credentials of the URLs in a text: ``user:password@``, and all that follows ``?``."""
    return _SECRETS.sub("***", text)


class CellDETRError(Exception):
    """An error whose message is all that the user needs; rules print it without a traceback and exit with 1."""


class InputError(CellDETRError):
    """Data that was read (an archive, a store, a table, weights) is not as expected."""


class ConfigError(CellDETRError):
    """A setting is unknown, missing, of the wrong type, out of range, or contradicts another setting."""


class NonFinite(CellDETRError):
    """A loss or matching cost of a training run is NaN or infinite."""


class Interrupted(CellDETRError):
    """A training run was stopped by a signal; it continues from its checkpoint when it is started again."""


class ProcessFailed(CellDETRError):
    """A process of a training run, or one that loads its patches, was killed."""


class Occupied(CellDETRError):
    """Another job trains the same model."""
