"""What can stop a training run."""

from celldetr.runtime.errors import CellDETRError


class NonFinite(CellDETRError):
    """A loss, or what it is computed from, is NaN or infinite."""


class Interrupted(CellDETRError):
    """The run was told to stop by a signal; it goes on from its checkpoint when it is started again."""


class ProcessFailed(CellDETRError):
    """One of the processes that share a run ended with an error."""


class Occupied(CellDETRError):
    """Another job trains in the folder of the run."""
