"""Make the patches of a section of STHELAR into a patch store like that of a Xenium sample.

A first pass reads the maps of ids and chooses patches, a second one decodes the images of these.
"""

import contextlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celldetr.config.classes import ST_TYPES
from celldetr.config.slides import PatchSettings
from celldetr.config.sthelar import PATCH_KEYS, PLACES
from celldetr.runtime.errors import InputError
from celldetr.store import NO_LABEL, StoreWriter, class_counts, encode_image
from celldetr.xenium.sthelar.checks import Probe, check_ids, check_maps, pixel_size
from celldetr.xenium.sthelar.nuclei import SIDE, MapNuclei, Window, cut, nuclei_of, read_ids, read_image, window
from celldetr.xenium.sthelar.section import Section, SectionCells, read_cells, read_section
from celldetr.xenium.sthelar.types import TypeTable

log = logging.getLogger(__name__)

_PROBES = 120  # patches that are checked first
_PICTURE, _THUMBNAIL = 1400, (4, 128)  # px; longest side of a picture of the section, and side of a patch in it
_TOGETHER = 64  # images that are decoded at a time
_MOST_NUCLEI = 2000  # in a patch, as in `celldetr.slides.grid`


@dataclass(frozen=True)
class Patch:
    """A patch that may be taken: its number among the rows, corner (px of STHELAR), and nuclei."""

    number: int
    corner: tuple[int, int]
    boxes: NDArray[np.float32]  # (n, 4)
    centroids: NDArray[np.float32]  # (n, 2)
    labels: NDArray[np.int8]  # (n,)


@dataclass(frozen=True)
class SectionMap:
    """Where the patches of a section lie, for a picture of it; px of STHELAR."""

    size: tuple[int, int]  # width and height
    passed_over: NDArray[np.int64]  # (m, 2) corners, of `SIDE` px
    taken: NDArray[np.float64]  # (n, 2) corners of what was taken
    side: float  # of what was taken
    thumbnails: NDArray[np.uint8]  # (n, t, t, 3) of those that were taken


@dataclass(frozen=True)
class SectionExtraction:
    """What was made of a section."""

    rows: list[tuple[str, str, int]]  # kind, name, count: the summary
    map: SectionMap
    mpp: float  # um per px of STHELAR


def extract_section(
    folder: Path,
    out: str | os.PathLike[str],
    *,
    name: str,
    group: str,
    tissue: str,
    types: TypeTable,
    limits: Mapping[str, float],
    size: int,
    mpp: float,
    source_mpp: float | None,
    settings: PatchSettings,
    seed: int,
    workers: int,
) -> SectionExtraction:
    """Write patches of `size` px of `mpp` um; the classes are the ten cell types.

    Parameters
    ----------
    folder
        The section, as `celldetr.fetch.sthelar` writes it.
    limits
        Smallest value of each column of quality (Dice, Jaccard, bPQ).
    source_mpp
        um per px of STHELAR; None: measured.
    settings
        `PATCH_KEYS` of them apply.

    Raises
    ------
    InputError
        A file is damaged or has another layout, maps, images and cells do not fit, the pixel size is not known or too
        small for our patches, the table of types lacks a label, or no patch is left.
    """
    section, cells = read_section(folder, name), read_cells(folder, types)
    source_mpp = _checked(section, cells, source_mpp, mpp)
    try:
        place = window(size, mpp, source_mpp)
    except InputError as error:
        raise InputError(f"STHELAR: {name}: {error}") from error
    chooser = _Chooser(section, cells, place, limits, settings)
    patches = chooser.choose(seed)
    attrs = {
        "image": {"file": section.name, "size": list(section.size), "mpp": source_mpp},
        "dropped": dict(chooser.dropped),
        "patches_passed_over": dict(chooser.passed_over),
        # a stride of one pixel: the places of the patches are known to a pixel, not as steps of a grid
        "settings": {
            **{key: getattr(settings, key) for key in PATCH_KEYS},
            "limits": dict(limits),
            "stride": 1 / size,
            "seed": seed,
        },
        "sthelar": {**section.source, "types": Path(types.path).name},
    }
    with StoreWriter(out, patch_size=size, classes=ST_TYPES, mpp=mpp, attrs=attrs) as writer:
        thumbnails = _write(writer, section, patches, place, (group, tissue), workers)
    taken = np.array([patch.corner for patch in patches]) + place.low
    passed = sorted(set(section.places.values()) - {patch.corner for patch in patches})
    picture = SectionMap(section.size, np.array(passed, np.int64).reshape(-1, 2), taken, place.side, thumbnails)
    return SectionExtraction(_summary(patches, cells, chooser), picture, source_mpp)


def _checked(section: Section, cells: SectionCells, given: float | None, mpp: float) -> float:
    """Check some patches from all over the section, and return um per px of STHELAR."""
    probes = [_probe(section, row) for row in section.sample(("file_name", "image", "cell_id_map"), _PROBES)]
    check_ids(probes, cells, section.name)
    check_maps(probes, section.name)
    return pixel_size(probes, cells, given, section.name, mpp)


def _probe(section: Section, row: Mapping[str, Any]) -> Probe:
    with _named(section, row):
        return Probe(np.asarray(read_image(_bytes(row["image"]))), read_ids(_bytes(row["cell_id_map"])))


def _bytes(value: Any) -> bytes:
    """Content of an image, which Hugging Face keeps as {bytes, path}, or of binary data."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise InputError(f"got {type(content).__name__}, expected the bytes of a file")
    return content


@contextlib.contextmanager
def _named(section: Section, row: Mapping[str, Any]) -> Iterator[None]:
    """Put the name of a patch before an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"STHELAR: {section.name}: {row['file_name']}: {error}") from error


class _Chooser:
    """The first pass: which patches are taken, and what is counted on the way."""

    def __init__(
        self,
        section: Section,
        cells: SectionCells,
        place: Window,
        limits: Mapping[str, float],
        settings: PatchSettings,
    ) -> None:
        self.section, self.cells, self.place, self.limits, self.settings = section, cells, place, limits, settings
        self.passed_over = Counter[str]()
        self.dropped = Counter[str]()
        self.without_row = 0  # nuclei
        self._seen = np.zeros(len(cells.ids), bool)

    def choose(self, seed: int) -> list[Patch]:
        """Patches to take, in the order of their rows."""
        names, found = set[str](), list[Patch]()
        for number, row in self.section.rows(("file_name", "slide_id", "cell_id_map", *self.limits)):
            with _named(self.section, row):
                if row["slide_id"] != self.section.name:
                    raise InputError(
                        f"got a row of section {row['slide_id']!r}, expected rows of {self.section.name} alone"
                    )
                if row["file_name"] in names:
                    raise InputError("got this patch twice, expected each once")
                names.add(row["file_name"])
                if patch := self._look(number, row):
                    found.append(patch)
        self.passed_over["without an image"] = len(self.section.places) - len(names)
        self.dropped["cells without a nucleus in any patch"] = int((~self._seen).sum())
        most = self.settings.max_patches
        if most is not None and len(found) > most:
            self.passed_over["not drawn"] = len(found) - most
            drawn = np.sort(np.random.default_rng(seed).permutation(len(found))[:most])
            found = [found[index] for index in drawn]
        if not found:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.passed_over.items() if count)
            raise InputError(
                f"STHELAR: {self.section.name}: got no patch; of {len(self.section.places)}: {reasons}; lower "
                "min_nuclei or min_labelled of xenium.patches or the limits of xenium.sthelar (min_dice, min_jaccard, "
                "min_bpq), or give more labels a type in the table xenium.sthelar.types"
            )
        return found

    def _look(self, number: int, row: Mapping[str, Any]) -> Patch | None:
        """Return a patch if it is taken, and count why it is not."""
        if row["file_name"] not in self.section.places:
            raise InputError(
                f"got no place of this patch in {PLACES}, expected one for each: the files are not of one revision"
            )
        nuclei = nuclei_of(read_ids(_bytes(row["cell_id_map"])), self.place, self.settings.min_visible)
        index = self.cells.find(nuclei.ids)
        labels = self.cells.label(index)
        self._seen[index[index >= 0]] = True
        self.without_row += int((index < 0).sum())
        if reason := self._reason(row, nuclei, labels):
            self.passed_over[reason] += 1
            return None
        self.dropped["parts of nuclei at the edge of a patch that show too little"] += nuclei.hidden
        boxes, centroids = nuclei.boxes.astype(np.float32), nuclei.centroids.astype(np.float32)
        return Patch(number, self.section.places[row["file_name"]], boxes, centroids, labels)

    def _reason(self, row: Mapping[str, Any], nuclei: MapNuclei, labels: NDArray[np.int8]) -> str:
        for column, limit in self.limits.items():
            value = row[column]
            if value is None or not float(value) >= limit:  # NaN, too; -1 stands for a map without nuclei
                return f"whose {column} is below {limit:g} or unknown"
        if len(labels) > _MOST_NUCLEI:
            raise InputError(f"got {len(labels)} nuclei, expected at most {_MOST_NUCLEI} in a patch")
        if len(labels) < self.settings.min_nuclei:
            return "with too few nuclei"
        few = int((labels != NO_LABEL).sum()) < self.settings.min_labelled
        return "with too few labelled nuclei" if few else ""


def _write(
    writer: StoreWriter, section: Section, patches: list[Patch], place: Window, names: tuple[str, str], workers: int
) -> NDArray[np.uint8]:
    """Decode and write the images of the patches, the second pass; returns a thumbnail of each."""
    wanted = {patch.number: patch for patch in patches}
    rows = ((wanted[number], row) for number, row in section.rows(("file_name", "image")) if number in wanted)
    group, tissue = names
    thumbnails: list[NDArray[np.uint8]] = []
    side = int(np.clip(SIDE * _PICTURE / max(section.size), *_THUMBNAIL))

    def decode(item: tuple[Patch, Mapping[str, Any]]) -> tuple[Any, NDArray[np.uint8]]:
        with _named(section, item[1]):
            pixels = cut(read_image(_bytes(item[1]["image"])), place)
        small = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
        return encode_image(pixels), np.asarray(small)

    with ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(rows, _TOGETHER)):
            found = [patch for patch, _ in batch]
            images, small = zip(*pool.map(decode, batch), strict=True)
            thumbnails += small
            corners = np.rint(np.array([patch.corner for patch in found]) + place.low).astype(np.int64)
            writer.append(
                images,
                [patch.boxes for patch in found],
                [patch.labels for patch in found],
                centroids=[patch.centroids for patch in found],
                patches={
                    "source": [section.name] * len(found),
                    "group": [group] * len(found),
                    "tissue": [tissue] * len(found),
                    "x": corners[:, 0],
                    "y": corners[:, 1],
                },
            )
            log.info("%s: %d of %d patches", section.name, writer.n_patches, len(patches))
    return np.array(thumbnails, np.uint8)


def _summary(patches: list[Patch], cells: SectionCells, chooser: _Chooser) -> list[tuple[str, str, int]]:
    """Rows (kind, name, count)."""
    labels = np.concatenate([patch.labels for patch in patches])
    return [
        ("total", "patches", len(patches)),
        ("total", "nuclei in patches", len(labels)),
        ("total", "labelled nuclei in patches", int((labels != NO_LABEL).sum())),
        ("total", "cells of the section", len(cells.ids)),
        *(("class", name, count) for name, count in class_counts(labels, ST_TYPES).items()),
        *(("without a type", f"cells: {name}", count) for name, count in sorted(cells.untyped.items())),
        ("without a type", "nuclei whose id has no row in the table of cells", chooser.without_row),
        *(("dropped", name, count) for name, count in chooser.dropped.items()),
        *(("not taken", f"patches {name}", count) for name, count in chooser.passed_over.items()),
    ]
