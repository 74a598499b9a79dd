"""PanNuke folds: from the published archive to a patch store, image by image.

A nucleus is an (image, channel, id): its pieces belong together, however far apart. Its box is half-open and its
centroid the mean of its pixel centres. Overlaps between channels, one-pixel nuclei and empty images are kept; in the
instance map, which has one nucleus per pixel, the smaller one has the overlap (with equal areas: the later one).
"""

import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.pannuke.archive import NpyMember, open_zip
from celldetr.runtime.errors import InputError
from celldetr.store import StoreWriter

log = logging.getLogger(__name__)

CHANNELS = len(PANNUKE_CLASSES) + 1  # the last one is the background
OFFICIAL: Mapping[str, tuple[int, tuple[int, ...], int, int]] = {
    "6e19ad380300e8ce9480f9ab6a14cc91": (2656, (26201, 10820, 16388, 967, 8842), 116, 276),
    "5bc540cc509f64b5f5a274d6e5a24552": (2523, (22731, 10631, 16756, 884, 8870), 113, 289),
    "c14d372981c42f611ebc80afad01702b": (2722, (28471, 10825, 17441, 1057, 8860), 114, 214),
}
"""First 32 digits of the SHA-256 of each official archive -> what its conversion must give: images, nuclei per class,
images without nuclei, most nuclei in one image. Published total: 189,744 nuclei."""
ODDITIES = {
    "empty images": "images without a nucleus (kept)",
    "one-pixel nuclei": "nuclei of a single pixel (kept)",
    "split nuclei": "ids in several pieces, 8-connected (kept as one nucleus each)",
    "covering nuclei": "ids that cover more than half of their image",
    "pale nuclei": "images whose nuclei are paler in red, on average, than the rest (kept)",
    "overlap pixels": "pixels that two or more classes claim (each box and centroid keeps all its pixels)",
    "lost pixels": "pixels that nuclei leave to smaller ones in the instance map",
    "hidden nuclei": "nuclei without a pixel in the instance map, as smaller ones cover them (box kept)",
    "void pixels": "pixels that are neither nucleus nor background (kept)",
    "background over nuclei": "pixels that are nucleus and background (nucleus kept)",
}
# Images that a verdict on masks needs, and the fraction of them that must have dark nuclei. Measured on CoNSeP: 0.99,
# but 0.48 to 0.69 if masks are in another order, transposed, mirrored or shifted by 40 px.
_JUDGED, _DARK = 20, 0.75
_EXAMPLES = 3  # images listed per oddity
_AHEAD = 8  # images that the reading threads may be ahead of the writer


@dataclass(frozen=True)
class MaskNuclei:
    """Nuclei of one image: boxes (n, 4) xyxy px, labels (n,), centroids (n, 2) px, and their map `instances` (S, S).

    `odd`: oddity -> its count.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int8]
    centroids: NDArray[np.float32]
    instances: NDArray[np.uint16]
    odd: dict[str, int]


@dataclass
class FoldSummary:
    """Counts of a converted fold."""

    images: int = 0
    nuclei: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PANNUKE_CLASSES, 0))  # by class
    tissues: dict[str, int] = field(default_factory=dict)  # images by tissue
    most: int = 0  # nuclei in one image
    odd: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ODDITIES, 0))  # pixels, nuclei or images
    odd_images: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ODDITIES, 0))  # images that have it
    examples: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in ODDITIES})  # a few of these

    def add(self, nuclei: MaskNuclei, tissue: str) -> None:
        """Count the next image."""
        for label, count in zip(*np.unique(nuclei.labels, return_counts=True), strict=True):
            self.nuclei[PANNUKE_CLASSES[label]] += int(count)
        self.tissues[tissue] = self.tissues.get(tissue, 0) + 1
        self.most = max(self.most, len(nuclei.labels))
        for name, count in nuclei.odd.items():
            if count:
                self.odd[name] += count
                self.odd_images[name] += 1
                if len(self.examples[name]) < _EXAMPLES:
                    self.examples[name].append(self.images)
        self.images += 1

    def attributes(self) -> dict[str, Any]:
        """JSON values to keep in the store."""
        return {
            "odd": self.odd,
            "odd_images": self.odd_images,
            "dropped": {},  # nothing is
            "tissues": dict(sorted(self.tissues.items())),
            "most_nuclei_in_one_patch": self.most,
        }


def convert_fold(
    archive: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fold: int,
    patch_size: int = 256,
    mpp: float = 0.25,
    sha256: str | None = None,
) -> FoldSummary:
    """Convert the archive of a fold to a patch store; memory holds a few images and one shard of the store.

    The archive is a zip in the published layout: ``Fold N/images/foldN/{images,types}.npy`` and
    ``Fold N/masks/foldN/masks.npy``; files that are no arrays (licence, read-me) are ignored. `patch_size` is the side
    of the images in px, `mpp` um per px. If `sha256` is the checksum of an official archive, the result must have the
    official counts.

    Raises
    ------
    InputError
        The archive has another layout or invalid values, or the counts are wrong; names the member.
    """
    names = _members(archive, fold)
    summary = FoldSummary()
    with NpyMember(archive, names["types"]) as types:
        tissues = _tissues(types)
    attrs = {"source": {"name": f"PanNuke fold {fold}", "file": Path(archive).name, "sha256": sha256}}
    with (
        NpyMember(archive, names["images"]) as images,
        NpyMember(archive, names["masks"]) as masks,
        StoreWriter(out, patch_size=patch_size, classes=PANNUKE_CLASSES, mpp=mpp, attrs=attrs) as writer,
    ):
        _check_shapes(images, masks, tissues, names["types"], patch_size)
        for index, (image, nuclei) in enumerate(_in_step(images, masks)):
            nuclei.odd["pale nuclei"] = int(_pale(image, nuclei.boxes))
            summary.add(nuclei, tissues[index])
            writer.append(
                image[None],
                [nuclei.boxes],
                [nuclei.labels],
                centroids=[nuclei.centroids],
                instances=[nuclei.instances],
                patches={
                    "source": [f"fold{fold}"],
                    "group": [f"fold{fold}"],  # PanNuke does not say which slide an image is from
                    "tissue": [tissues[index]],
                    "x": [index],
                    "y": [0],
                },
            )
            if (index + 1) % 500 == 0:
                log.info("%d of %d images, %d nuclei", index + 1, len(images), sum(summary.nuclei.values()))
        images.finish()
        masks.finish()
        _check_ids(summary, masks.label)
        if (sha256 or "")[:32] not in OFFICIAL:
            _check_places(summary, masks.label)
        check_official(summary, sha256)
        writer.attrs |= summary.attributes()
    return summary


def _check_ids(summary: FoldSummary, label: str) -> None:
    """Refuse masks that hold something else than ids of nuclei; real folds have almost none of these oddities.

    Raises
    ------
    InputError
        The background is not the last channel, or the masks are maps of the classes.
    """
    expected = f"expected ids of single nuclei in channels {', '.join(PANNUKE_CLASSES)}, and the background last"
    covered, images = summary.odd["covering nuclei"], summary.images - summary.odd["empty images"]
    if 2 * covered > images:
        raise InputError(
            f"{label}: in {covered} of {images} images an id covers more than half of the image: it looks like a "
            f"background that is not the last channel; {expected}"
        )
    split, nuclei = summary.odd["split nuclei"], sum(summary.nuclei.values())
    if 4 * split > nuclei:
        raise InputError(
            f"{label}: {split} of {nuclei} ids lie in several pieces: they look like maps of the classes; {expected}"
        )


def _pale(image: NDArray[np.uint8], boxes: NDArray[np.float32]) -> bool:
    """Whether the red of an image (S, S, 3), which hematoxylin and DAB absorb, is paler in the boxes (n, 4)."""
    inside = np.zeros(image.shape[:2], dtype=bool)
    for x0, y0, x1, y1 in boxes.astype(int):
        inside[y0:y1, x0:x1] = True
    red = image[..., 0]
    return bool(inside.any() and not inside.all() and red[inside].mean() > red[~inside].mean())


def _check_places(summary: FoldSummary, label: str) -> None:
    """Refuse masks that do not lie on the nuclei of their images.

    Raises
    ------
    InputError
        In many images the nuclei are paler than the rest.
    """
    pale, images = summary.odd["pale nuclei"], summary.images - summary.odd["empty images"]
    if images >= _JUDGED and images - pale < _DARK * images:
        raise InputError(
            f"{label}: in {pale} of {images} images the nuclei are paler than the rest, expected few such images: "
            "are images and masks in the same order, and no mask transposed, mirrored or shifted?"
        )


def check_official(summary: FoldSummary, sha256: str | None) -> None:
    """Compare a summary with the counts of the official archive of this checksum; other archives pass.

    Raises
    ------
    InputError
        A count differs.
    """
    if sha256 is None or sha256[:32] not in OFFICIAL:
        return
    images, classes, empty, most = OFFICIAL[sha256[:32]]
    expected = {"images": images, **dict(zip(PANNUKE_CLASSES, classes, strict=True)), "empty": empty, "most": most}
    got = {"images": summary.images, **summary.nuclei, "empty": summary.odd["empty images"], "most": summary.most}
    if got != expected:
        raise InputError(
            f"official PanNuke archive {sha256[:12]}: got {got}, expected {expected}; "
            "the conversion is wrong: please report it"
        )


def _members(archive: str | os.PathLike[str], fold: int) -> dict[str, str]:
    with open_zip(archive) as handle:
        arrays = [name for name in handle.namelist() if name.endswith(".npy") and not name.startswith("__MACOSX/")]
    wanted = {
        "images": f"Fold {fold}/images/fold{fold}/images.npy",
        "types": f"Fold {fold}/images/fold{fold}/types.npy",
        "masks": f"Fold {fold}/masks/fold{fold}/masks.npy",
    }
    missing, extra = sorted(set(wanted.values()) - set(arrays)), sorted(set(arrays) - set(wanted.values()))
    if missing or extra or len(arrays) != len(wanted):
        other = {match[1] for name in arrays if (match := re.match(r"Fold (\d+)/", name))} - {str(fold)}
        hint = f"; it looks like the archive of fold {', '.join(sorted(other))}" if other and missing else ""
        raise InputError(
            f"{archive}: members missing: {missing or 'none'}, not expected: {extra or 'none'}{hint}; expected exactly "
            f"{sorted(wanted.values())}"
        )
    return wanted


def _tissues(types: NpyMember) -> list[str]:
    if types.dtype.kind != "U" or len(types.shape) != 1:
        raise InputError(f"{types.label}: got {types.dtype} {types.shape}, expected a list of texts (n,)")
    found: list[str] = types.read(len(types)).tolist()
    types.finish()
    return found


def _check_shapes(images: NpyMember, masks: NpyMember, tissues: list[str], types: str, patch_size: int) -> None:
    for member, channels in ((images, 3), (masks, CHANNELS)):
        wanted = (patch_size, patch_size, channels)
        if len(member.shape) != 4 or member.shape[1:] != wanted:
            raise InputError(f"{member.label}: got shape {member.shape}, expected (n, {', '.join(map(str, wanted))})")
        if member.dtype.kind not in "uif":
            raise InputError(f"{member.label}: got {member.dtype}, expected integers or integer-valued floats")
    if len(images) != len(masks):
        raise InputError(f"{masks.label}: got {len(masks)} masks, expected {len(images)}, one per image of images.npy")
    if len(tissues) != len(images):
        raise InputError(f"{types}: got {len(tissues)} tissues, expected {len(images)}, one per image of images.npy")


def _in_step(images: NpyMember, masks: NpyMember) -> Iterator[tuple[NDArray[np.uint8], MaskNuclei]]:
    """Yield image after image; two threads decompress ahead, as this does not hold Python's global lock."""

    def next_image(index: int) -> NDArray[np.uint8]:
        return _to_uint8(images.read()[0], f"{images.label}, image {index}")

    def next_nuclei(index: int) -> MaskNuclei:
        return nuclei_of(masks.read()[0], f"{masks.label}, image {index}")

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        waiting: deque[tuple[Future[NDArray[np.uint8]], Future[MaskNuclei]]] = deque()
        try:
            for index in range(len(images) + _AHEAD):
                if index < len(images):
                    waiting.append((one.submit(next_image, index), other.submit(next_nuclei, index)))
                if index >= _AHEAD:
                    image, nuclei = waiting.popleft()
                    yield image.result(), nuclei.result()
        finally:
            one.shutdown(cancel_futures=True)
            other.shutdown(cancel_futures=True)


def _to_uint8(image: NDArray[Any], where: str) -> NDArray[np.uint8]:
    with np.errstate(invalid="ignore"):
        small = image.astype(np.uint8)
    if not np.array_equal(small, image):
        raise InputError(f"{where}: got values from {image.min()} to {image.max()}, expected whole numbers 0 to 255")
    return small


def nuclei_of(masks: NDArray[Any], where: str = "masks") -> MaskNuclei:
    """Find the nuclei of one image.

    `masks` (S, S, 6) hold ids per class channel, background last, of any type with whole numbers; `where` names them in
    errors.

    Raises
    ------
    InputError
        An id is negative or no whole number.
    """
    size = masks.shape[1]
    flat = masks.reshape(-1, CHANNELS)
    claimed = flat != 0  # np.nonzero of floats takes five times as long
    background = claimed[:, -1].copy()
    claimed[:, -1] = False
    pixel, channel = np.divmod(np.flatnonzero(claimed), CHANNELS)
    values = flat[pixel, channel]
    ids = values.astype(np.int64)
    if (ids != values).any() or (ids < 0).any():
        wrong = values[(ids != values) | (ids < 0)][0]
        raise InputError(f"{where}: got the id {wrong}, expected whole numbers from 0")
    claims = np.bincount(pixel, minlength=len(flat))
    odd = {
        "empty images": int(len(ids) == 0),
        "overlap pixels": int((claims > 1).sum()),
        "void pixels": int((~background & (claims == 0)).sum()),
        "background over nuclei": int((background & (claims > 0)).sum()),
    }
    if len(ids) == 0:
        empty = np.empty((0, 4), np.float32), np.empty(0, np.int8), np.empty((0, 2), np.float32)
        return MaskNuclei(*empty, np.zeros(masks.shape[:2], np.uint16), odd)
    order = np.lexsort((ids, channel))
    ids, channel, pixel = ids[order], channel[order], pixel[order]
    y, x = np.divmod(pixel, size)
    first = np.flatnonzero(np.r_[True, (np.diff(ids) != 0) | (np.diff(channel) != 0)])
    area = np.diff(np.r_[first, len(ids)])
    low = [np.minimum.reduceat(axis, first) for axis in (x, y)]
    high = [np.maximum.reduceat(axis, first) + 1 for axis in (x, y)]
    centroids = np.stack([np.add.reduceat(axis, first) / area + 0.5 for axis in (x, y)], axis=1)
    odd["one-pixel nuclei"] = int((area == 1).sum())
    odd["covering nuclei"] = int((2 * area > len(flat)).sum())
    odd["split nuclei"] = sum(
        _pieces(x[start : start + n], y[start : start + n]) > 1 for start, n in zip(first, area, strict=True) if n > 1
    )
    instances = _instances(pixel, area, claims)
    odd["lost pixels"] = len(pixel) - int(np.count_nonzero(claims))
    odd["hidden nuclei"] = len(first) - int(np.count_nonzero(np.bincount(instances)[1:]))
    boxes = np.stack([*low, *high], axis=1).astype(np.float32)
    return MaskNuclei(
        boxes, channel[first].astype(np.int8), centroids.astype(np.float32), instances.reshape(masks.shape[:2]), odd
    )


def _instances(pixel: NDArray[np.int64], area: NDArray[np.int64], claims: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Draw the instance map (S * S,) of nuclei: their pixels (p,), nucleus after nucleus, and `area` (n,) of each.

    A pixel with several `claims` (S * S,) goes to the smaller nucleus, with equal areas to the later one.
    """
    number = np.repeat(np.arange(1, len(area) + 1), area)
    instances = np.zeros(len(claims), np.uint16)
    instances[pixel] = number
    several = np.flatnonzero(claims[pixel] > 1)
    several = several[np.argsort(-area[number[several] - 1], kind="stable")]
    instances[pixel[several]] = number[several]  # of several values NumPy keeps the last
    return instances


def _pieces(x: NDArray[np.int64], y: NDArray[np.int64]) -> int:
    """Count the 8-connected pieces of a set of pixels."""
    crop = np.zeros((y.max() - y.min() + 1, x.max() - x.min() + 1), dtype=bool)
    crop[y - y.min(), x - x.min()] = True
    if crop.all():
        return 1
    return int(ndimage.label(crop, structure=np.ones((3, 3)))[1])
