"""Join the parts that `celldetr.cells.find` has written into the one file of a slide's cells."""

import os
from collections.abc import Sequence

from celldetr.cells.table import CellsInfo


def join_cells(folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> CellsInfo:
    """Write the file of a slide's cells from the folders of all jobs that share it; each nucleus once.

    Raises
    ------
    InputError
        A folder is missing, incomplete or of another slide, model, setting or number of jobs; or no cell was found
        (`NothingFound`).
    """
    raise NotImplementedError
