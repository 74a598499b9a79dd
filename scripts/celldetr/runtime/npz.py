"""Data classes of arrays as NPZ files."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from celldetr.runtime.errors import InputError
from celldetr.runtime.files import BROKEN_ZIP, atomic


def write_npz(path: str | os.PathLike[str], content: Any) -> None:
    """Write the fields of a data class."""
    arrays = {item.name: np.asarray(getattr(content, item.name)) for item in fields(content)}
    with atomic(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)


def read_npz(path: str | os.PathLike[str], kind: Any, rule: str) -> dict[str, Any]:
    """Read the fields of a data class that `write_npz` wrote; `rule` is the rule that writes such files.

    Raises
    ------
    InputError
        Not such a file.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            return {item.name: file[item.name] for item in fields(kind)}
    except (OSError, KeyError, ValueError, SyntaxError, *BROKEN_ZIP) as error:
        raise InputError(f"{path}: got {error}, expected a file of the {rule} rule; run that rule again") from error
