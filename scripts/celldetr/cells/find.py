"""Find and embed the cells of a slide: a folder of parts, from which `celldetr.cells.join` makes one file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from celldetr.cells.given import GivenCells
from celldetr.cells.model import CellModel


@dataclass(frozen=True)
class Slide:
    """A slide to be read."""

    name: str
    file: Path
    mpp: float | None = None
    """um per px of level 0; None: as the file says."""
    group: str = ""
    """Group of its patches, to tell whether the model was trained on it; empty: none."""


@dataclass(frozen=True)
class FindSettings:
    """How cells are found; see `celldetr.config.cells.CellSettings`."""

    margin_um: float
    nucleus_threshold: float
    class_threshold: float
    batch_size: int
    on_damage: Literal["stop", "skip"] = "stop"
    dtype: Literal["float32", "float16"] = "float32"
    embeddings: bool = True
    """False: boxes and nucleus scores alone, by any model."""


def find_cells(
    slide: Slide,
    model: CellModel,
    out: str | os.PathLike[str],
    settings: FindSettings,
    *,
    given: GivenCells | None = None,
    region: NDArray[Any] | None = None,
    job: tuple[int, int] = (1, 1),
    workers: int = 1,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Write the cells of a slide, or of one job's share of it, as a folder of parts.

    Parameters
    ----------
    slide, model, settings
        What is read, by which model, and how.
    out
        Folder that is made; it is complete when it has its name. What a killed job has written lies beside it, and the
        next call goes on from there if the slide, the model, the settings and `identity` are the same.
    given
        Cells of the user, which are embedded in place of those that the model finds.
    region
        Polygons (n,), px of level 0: only cells whose centre lies in one of them. None: the whole slide.
    job
        Number of this job, from 1, and how many share the slide.
    workers
        Threads that read.
    identity
        JSON values that the result depends on besides the other arguments, e.g. the hash of the code.

    Raises
    ------
    InputError
        The model has no classes or embeddings; the slide cannot be read, see `celldetr.slides.damage.open_slide`; the
        region lies outside of the slide; there is no tissue (`NothingFound`); a tile cannot be decoded.
    """
    raise NotImplementedError
