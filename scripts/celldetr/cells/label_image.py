"""Label images of a slide: each pixel holds the number of its cell, or 0.

Cellpose, StarDist, InstanSeg and Mesmer write them. They are read in strips, from TIFF (the first image, at its largest
size), PNG or NPY; memory holds the runs of equal pixels, one for each row of a cell, and never a whole TIFF or NPY.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import pandas as pd
import shapely
import tifffile
import zarr
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from celldetr.cells.given_files import CellObjects
from celldetr.runtime.errors import InputError
from celldetr.slides.outline_check import Keys

_STRIP = 512  # rows that are read at once
_MOST_RUNS = 50_000_000  # 1 GB; the nuclei of a slide have 20 million
_BATCH = 5000  # cells whose outlines are drawn at once
_SAME = 1.5  # px by which the sides of a scaled image may differ, as they were rounded or cut
_GRAY = {"L": np.uint8, "I": np.uint16, "I;16": np.uint16}  # modes of PNG
_PLAIN_BITS = 8  # of a pixel of a PNG
_EXPECTED = "whole numbers in one plane, 0 where no cell is"


class _Labels(NamedTuple):
    """An open label image."""

    size: tuple[int, int]
    """Width and height, px."""
    dtype: np.dtype[Any]
    step: int
    """Rows that are stored together."""
    rows: Callable[[int, int], NDArray[Any]]
    """Decodes some rows: from, to."""


def read_label_image(
    path: Path, size: tuple[int, int], mpp: float, *, nuclei_mpp: float | None, most_um: float, keys: Keys
) -> CellObjects:
    """Read the cells of a label image in px of level 0 of a slide of `size` px of `mpp` um; their ids are the labels.

    The outline of a cell runs along the edges of its pixels; a label in several places is one cell in pieces.

    Parameters
    ----------
    nuclei_mpp
        um per px of the label image; None: it has the pixels of level 0.
    most_um
        Longest side of a cell, um.
    keys
        What errors call the settings.

    Raises
    ------
    InputError
        It is damaged, holds other than labels, does not fit the slide, or a label reaches farther than a cell.
    """
    with ExitStack() as stack:
        try:
            labels = _open(path, stack)
            _require_fit(path, labels.size, size, mpp, nuclei_mpp, keys)
            runs = _runs(path, labels)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # each codec raises its own kinds of exception
            raise InputError(f"{path}: cannot be read as a label image ({error}); is the file complete?") from error
    runs = runs.sort_values(["label", "row", "start"], kind="stable")
    ends = runs.groupby("label").agg({"row": ["min", "max"], "start": "min", "end": "max"}).to_numpy(np.float64)
    factors = np.array(size) / labels.size
    ids = runs["label"].unique().astype(str).astype(object)
    cells = CellObjects(path, np.full(len(ids), None, object), ids, np.full(len(ids), ""), "label")
    if not len(cells):
        raise InputError(f"{path}: got a label image without a label, expected at least one cell")
    sides = np.stack([ends[:, 3] - ends[:, 2], ends[:, 1] + 1 - ends[:, 0]], axis=1) * factors * mpp
    cells.refuse(
        sides.max(axis=1) > most_um,
        f"labels that reach over more than {most_um:g} um",
        "give each cell a number of its own (label a mask, or the classes of pixels, first)",
    )
    outlines = np.concatenate([*_outlines(runs)])
    cells.shapes[:] = shapely.transform(outlines, lambda corners: corners * factors)
    return cells


def _open(path: Path, stack: ExitStack) -> _Labels:
    """Open a label image; what it holds is checked, and not yet decoded."""
    with path.open("rb") as file:
        start = file.read(25)
    array: Any
    if start.startswith(b"\x89PNG"):
        with path.open("rb") as file:
            image = PngImageFile(file)
        if image.mode not in _GRAY or start[-1] < _PLAIN_BITS:  # decoders stretch fewer bits over the range of 8
            raise InputError(f"{path}: got a PNG of mode {image.mode}, {start[-1]} bit, expected {_EXPECTED}")
        pixels = cache(lambda: imagecodecs.png_decode(path.read_bytes()))
        return _Labels(image.size, np.dtype(_GRAY[image.mode]), 1, lambda top, bottom: pixels()[top:bottom])
    if start.startswith(b"\x93NUMPY"):
        array = _load(path)
    else:
        series = stack.enter_context(tifffile.TiffFile(path)).series[0]
        array = zarr.open_array(stack.enter_context(series.levels[0].aszarr()), mode="r")
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise InputError(f"{path}: got {array.dtype} of shape {array.shape}, expected {_EXPECTED}")
    step = array.chunks[0] if isinstance(array, zarr.Array) else 1
    height, width = array.shape
    return _Labels((width, height), array.dtype, step, lambda top, bottom: np.asarray(array[top:bottom]))


def _load(path: Path) -> NDArray[Any]:
    """Map an NPY file; that of Cellpose (``_seg.npy``) is none of an array."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        if "object" not in str(error):
            raise
        raise InputError(
            f"{path}: got Python objects, as in the _seg.npy of Cellpose, expected {_EXPECTED}; save its masks alone"
        ) from error
    return array


def _require_fit(
    path: Path,
    labels: tuple[int, int],
    slide: tuple[int, int],
    mpp: float,
    nuclei_mpp: float | None,
    keys: Keys,
) -> None:
    """Refuse a label image of another size than that of the slide; `labels` and `slide` are width and height, px."""
    wanted = np.array(slide) * (1.0 if nuclei_mpp is None else mpp / nuclei_mpp)
    if (np.abs(wanted - labels) <= (0 if nuclei_mpp is None else _SAME)).all():
        return
    factor = slide[0] / labels[0]
    if (np.abs(np.array(slide) / factor - labels) <= _SAME).all():
        fits = f"{keys('nuclei_mpp')} {mpp * factor:.6g}"
        remedy = f"it would fit with {fits}: one of its px is {factor:.4g} px of the slide wide"
    elif (np.abs(wanted - labels[::-1]) <= _SAME).all():
        remedy = "it would fit with x and y swapped: write it as rows of the slide"
    else:
        remedy = "its sides are in another proportion: is it of another slide, or of a part of it?"
    about = "" if nuclei_mpp is None else f" of {nuclei_mpp:g} um ({keys('nuclei_mpp')})"
    raise InputError(
        f"{path}: got a label image of {labels[0]} x {labels[1]} px{about}, expected {wanted[0]:.0f} x {wanted[1]:.0f} "
        f"for a slide of {slide[0]} x {slide[1]} px of {mpp:.4g} um; {remedy}{keys.where}"
    )


def _runs(path: Path, labels: _Labels) -> pd.DataFrame:
    """Find the runs of equal pixels: label, row, and columns start and end."""
    found: list[pd.DataFrame] = []
    count, height = 0, labels.size[1]
    step = -(-_STRIP // labels.step) * labels.step
    for top in range(0, height, step):
        strip = np.pad(labels.rows(top, min(top + step, height)), ((0, 0), (1, 1)))
        row, place = np.nonzero(strip[:, 1:] != strip[:, :-1])
        after = strip[row, place + 1]
        starts, ends = after != 0, strip[row, place] != 0
        count += int(starts.sum())
        if labels.dtype.kind == "i" and (after < 0).any():
            raise InputError(f"{path}: got negative values, expected {_EXPECTED}")
        if count > _MOST_RUNS:
            raise InputError(f"{path}: got values that change like those of a picture, expected {_EXPECTED}")
        columns = {"row": row[starts] + top, "start": place[starts], "end": place[ends]}
        found.append(pd.DataFrame({"label": after[starts], **columns}).astype(dict.fromkeys(columns, np.int32)))
    return pd.concat(found, ignore_index=True)


def _outlines(runs: pd.DataFrame) -> Iterator[NDArray[Any]]:
    """Yield outlines (n,), Polygons or MultiPolygons in px of the label image, of runs that are sorted by label."""
    label = runs["label"].to_numpy()
    new = np.append(True, label[1:] != label[:-1])
    owner, first = np.cumsum(new) - 1, np.append(np.flatnonzero(new), len(new))
    row, start, end = (runs[name].to_numpy(np.int64) for name in ("row", "start", "end"))
    for low in range(0, len(first) - 1, _BATCH):
        bounds = first[low : low + _BATCH + 1]
        some = slice(bounds[0], bounds[-1])
        yield _drawn(owner[some] - low, row[some], start[some], end[some])


def _drawn(
    owner: NDArray[np.int64], row: NDArray[np.int64], start: NDArray[np.int64], end: NDArray[np.int64]
) -> NDArray[Any]:
    """Draw outlines (n,) of cells with these runs (m,); most have one in each row, below the one before."""
    same = owner[1:] == owner[:-1]
    below = (row[1:] == row[:-1] + 1) & (start[1:] < end[:-1]) & (start[:-1] < end[1:])
    in_pieces = np.unique(owner[1:][same & ~below])
    plain = ~np.isin(owner, in_pieces)
    shapes = np.empty(owner[-1] + 1, dtype=object)
    # Down the left ends of the runs, and up the right ones.
    left = np.stack([start, row, start, row + 1], axis=1)[plain].reshape(-1, 2)
    right = np.stack([end, row, end, row + 1], axis=1)[plain].reshape(-1, 2)
    corners = np.concatenate([left, right[::-1]])
    of_left = owner[plain].repeat(2)
    order = np.concatenate([of_left, of_left[::-1]])
    by_cell = np.argsort(order, kind="stable")
    cells, ring = np.unique(order[by_cell], return_inverse=True)
    shapes[cells] = shapely.polygons(shapely.linearrings(corners[by_cell], indices=ring))
    boxes = shapely.box(start[~plain], row[~plain], end[~plain], row[~plain] + 1)
    parts = shapely.multipolygons(boxes, indices=np.searchsorted(in_pieces, owner[~plain]))
    shapes[in_pieces] = shapely.union_all(parts[:, None], axis=1)
    simple: NDArray[Any] = shapely.simplify(shapes, 0, preserve_topology=False)  # without corners on straight edges
    return simple
