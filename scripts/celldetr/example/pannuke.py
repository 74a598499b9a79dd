"""Archives in the layout of a PanNuke fold, cut from drawn scenes, with the defects of the real masks."""

import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.example.drawing import draw_he
from celldetr.example.tissue import Scene, grow_scene
from celldetr.runtime.files import atomic

Masks = NDArray[np.uint16]
TISSUES: Mapping[str, int] = {
    "Breast": 2351, "Colon": 1440, "Bile-duct": 420, "Esophagus": 424, "Uterus": 186, "Lung": 184, "Cervix": 293,
    "HeadNeck": 384, "Skin": 187, "Adrenal_gland": 437, "Kidney": 134, "Stomach": 146, "Prostate": 182, "Testis": 196,
    "Liver": 224, "Thyroid": 226, "Pancreatic": 195, "Ovarian": 146, "Bladder": 146,
}  # fmt: skip
"""The 19 tissues of PanNuke and about how many images each has."""
_SIDE = 2  # images are cut from a scene in a square of 2 x 2
_MARGIN = 8.0  # um of tissue around them, so that their borders cut nuclei as in real images
_EMPTY = 0.043  # share of the images without a nucleus
_AROUND = np.ones((3, 3), dtype=bool)  # pieces of a nucleus hang together over corners, too


def write_fold(
    path: str | Path,
    fold: int,
    n_images: int,
    patch_size: int = 256,
    seed: int = 0,
    *,
    mpp: float = 0.25,
    mixture: str = "pannuke",
) -> None:
    """Write ``Fold N/images/foldN/{images,types}.npy`` and ``Fold N/masks/foldN/masks.npy`` into a zip.

    The same arguments give the same bytes; folds (1, 2 or 3 in PanNuke) of one seed show different tissue. An image has
    `patch_size` rows and columns of `mpp` um; `mixture` is a key of `celldetr.example.styles.MIXTURES`.
    """
    rng = np.random.default_rng([seed, fold])
    empty = set(rng.permutation(n_images)[: _number(_EMPTY, n_images - 1)].tolist())
    with atomic(path) as temporary, tempfile.TemporaryDirectory(dir=temporary.parent, prefix=".scratch") as scratch:
        tissues = _draw_tissues(rng, n_images)
        shape = n_images, patch_size, patch_size
        images = np.memmap(Path(scratch) / "images", np.uint8, "w+", shape=(*shape, 3))
        masks = np.memmap(Path(scratch) / "masks", np.uint16, "w+", shape=(*shape, 6))
        extent = _SIDE * patch_size * mpp + 2 * _MARGIN
        for first in range(0, n_images, _SIDE**2):
            scene = grow_scene(rng, (extent, extent), mixture)
            patches = slice(first, first + _SIDE**2)
            _cut_scene(rng, scene, mpp, images[patches], masks[patches])
            bare = replace(scene, nuclei=scene.nuclei.take(np.zeros(0, int)), glands=())
            for index in sorted(empty & set(range(n_images)[patches])):
                _cut_scene(rng, bare, mpp, images[index : index + 1], masks[index : index + 1])
        _plant_defects(rng, masks)
        _write_zip(temporary, fold, images, masks, np.array(tissues, dtype="<U13"))


def _cut_scene(rng: np.random.Generator, scene: Scene, mpp: float, images: NDArray[np.uint8], masks: Masks) -> None:
    """Draw a scene and cut it into images (N, S, S, 3) and masks (N, S, S, 6); ids ascend with gaps, as real ones."""
    drawn, nuclei = draw_he(rng, scene, mpp)
    channels = np.append(-1, scene.nuclei.classes)
    start, size = round(_MARGIN / mpp), images.shape[1]
    for place in range(len(images)):
        top, left = start + place // _SIDE * size, start + place % _SIDE * size
        window = slice(top, top + size), slice(left, left + size)
        present, local = np.unique(nuclei[window], return_inverse=True)
        ids = np.cumsum(rng.integers(1, 4, present.size))
        ids[present == 0] = 0
        channel, number = channels[nuclei[window]], ids[local.reshape(size, size)]
        images[place] = drawn[window]
        masks[place] = np.where(channel[..., None] == np.arange(6), number[..., None], 0)
        masks[place, ..., 5] = number == 0


def _draw_tissues(rng: np.random.Generator, n_images: int) -> list[str]:
    """Tissue of each image; the images of a scene have the same."""
    shares = np.array(list(TISSUES.values()), dtype=float)
    drawn = rng.choice(list(TISSUES), size=-(-n_images // _SIDE**2), p=shares / shares.sum())
    return [str(tissue) for tissue in np.repeat(drawn, _SIDE**2)[:n_images]]


def _number(share: float, n_images: int) -> int:
    return min(n_images, max(1, round(share * n_images)))


def _plant_defects(rng: np.random.Generator, masks: Masks) -> None:
    """Plant defects into clean masks (N, S, S, 6); an image without room for one leaves it to another image."""
    for plant, share in _DEFECTS.items():
        missing = _number(share, len(masks))
        for index in rng.permutation(len(masks)):
            if not missing:
                break
            mask = np.array(masks[index])
            if mask[..., :5].any() and plant(rng, mask):
                masks[index] = mask
                missing -= 1


def _nuclei(rng: np.random.Generator, mask: Masks) -> list[tuple[int, int]]:
    """Channel and id of each nucleus, in random order."""
    found = [(c, int(i)) for c in range(5) for i in np.unique(mask[..., c]) if i]
    return [found[k] for k in rng.permutation(len(found))]


def _plant_one_pixel(rng: np.random.Generator, mask: Masks) -> bool:
    """Let a pixel of the background be a nucleus."""
    free = np.argwhere(mask[..., 5])
    if len(free):
        row, column = free[rng.integers(len(free))]
        mask[row, column, rng.integers(5)] = mask[..., :5].max() + 1
        mask[row, column, 5] = 0
    return bool(len(free))


def _plant_split(rng: np.random.Generator, mask: Masks) -> bool:
    """Cut a nucleus across its longest extent."""
    for channel, number in _nuclei(rng, mask):
        nucleus = mask[..., channel] == number
        places = np.argwhere(nucleus)
        if len(places) < 20:
            continue
        away = places - places.mean(axis=0)
        long_axis = np.linalg.eigh(away.T @ away)[1][:, 1]
        rows, columns = places[np.abs(away @ long_axis) < 0.9].T
        nucleus[rows, columns] = False
        if ndimage.label(nucleus, structure=_AROUND)[1] == 2:
            mask[rows, columns, channel] = 0
            mask[rows, columns, 5] = ~mask[rows, columns, :5].any(axis=1)
            return True
    return False


def _plant_overlap(rng: np.random.Generator, mask: Masks) -> bool:
    """Let a nucleus spill by a pixel into a touching one of another class."""
    for channel, number in _nuclei(rng, mask):
        own = mask[..., channel]
        others = np.delete(mask[..., :5], channel, axis=2).any(axis=2)
        spill = ndimage.binary_dilation(own == number, _AROUND) & others & (own == 0)
        if spill.any():
            own[spill] = number
            return True
    return False


def _plant_shared(rng: np.random.Generator, mask: Masks) -> bool:
    """Renumber the nuclei of each channel from 1; needs two channels with nuclei."""
    if np.count_nonzero(mask[..., :5].any(axis=(0, 1))) < 2:
        return False
    for channel in range(5):
        ids, place = np.unique(mask[..., channel], return_inverse=True)
        mask[..., channel] = (np.arange(ids.size) + (ids[0] != 0))[place].reshape(mask.shape[:2])
    return True


def _plant_void(rng: np.random.Generator, mask: Masks) -> bool:
    """Take the pixels around a nucleus out of the background."""
    for channel, number in _nuclei(rng, mask):
        ring = ndimage.binary_dilation(mask[..., channel] == number, _AROUND) & (mask[..., 5] > 0)
        if ring.any():
            mask[ring, 5] = 0
            return True
    return False


_DEFECTS: Mapping[Callable[[np.random.Generator, Masks], bool], float] = {
    _plant_one_pixel: 0.05,
    _plant_split: 0.027,
    _plant_overlap: 0.073,
    _plant_shared: 0.1,
    _plant_void: 0.021,
}
"""Share of the images with each defect, about that of the real data; at least one image."""


def _write_zip(path: Path, fold: int, images: NDArray[np.uint8], masks: Masks, types: NDArray[np.str_]) -> None:
    """Write the arrays of a fold, images and masks as float64, image by image."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        # a member opened by its name bears the date 1980-01-01, so that the same arrays give the same bytes
        for kind, name, array in (("images", "images", images), ("images", "types", types), ("masks", "masks", masks)):
            dtype = array.dtype if name == "types" else np.dtype(np.float64)
            with archive.open(f"Fold {fold}/{kind}/fold{fold}/{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype.str, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in array:
                    member.write(np.asarray(part, dtype=dtype).tobytes())
