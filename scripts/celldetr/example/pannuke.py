"""Archives in the layout of a PanNuke fold, cut from synthetic scenes, with the defects of the real data.

`write_fold(path, fold, n_images, patch_size, seed, ...)` writes ``Fold N/images/foldN/{images,types}.npy`` and
``Fold N/masks/foldN/masks.npy`` into a zip and returns what a conversion must find in it.
"""

import math
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.example.defects import Defects, Spoiler, pieces
from celldetr.example.looks import MIXTURE
from celldetr.example.render import Renderer, Stain, draw_stain
from celldetr.example.tissue import Scene, grow_scene
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import atomic

TISSUES: Mapping[str, int] = {
    "Breast": 2351,
    "Colon": 1440,
    "Bile-duct": 420,
    "Esophagus": 424,
    "Uterus": 186,
    "Lung": 184,
    "Cervix": 293,
    "HeadNeck": 384,
    "Skin": 187,
    "Adrenal_gland": 437,
    "Kidney": 134,
    "Stomach": 146,
    "Prostate": 182,
    "Testis": 196,
    "Liver": 224,
    "Thyroid": 226,
    "Pancreatic": 195,
    "Ovarian": 146,
    "Bladder": 146,
}  # the 19 tissues and about how many images each has
_MARGIN = 8.0  # um of tissue around the patches, so that nuclei are cut by their borders as in real images
_COUNTED = (
    "empty_images",
    "one_pixel_nuclei",
    "split_nuclei",
    "split_pieces",
    "overlap_pixels",
    "overlap_images",
    "void_pixels",
    "void_images",
    "shared_ids",
)


@dataclass(frozen=True)
class ImageTruth:
    """What one image of an archive holds.

    Attributes
    ----------
    tissue
        Its entry in types.npy.
    boxes
        (M, 4) int64 xyxy px, half-open, in the order of `labels`, then `ids`.
    labels
        (M,) int8 class of each nucleus: its channel.
    ids
        (M,) int64 its id in that channel.
    area
        (M,) int64 number of its pixels.
    """

    tissue: str
    boxes: NDArray[np.int64]
    labels: NDArray[np.int8]
    ids: NDArray[np.int64]
    area: NDArray[np.int64]


@dataclass
class FoldTruth:
    """What a conversion of an archive must find.

    Attributes
    ----------
    fold
        Number of the fold.
    images
        One entry per image.
    defects
        Counts, taken from the masks as written: ``empty_images``; ``one_pixel_nuclei``; ``split_nuclei`` (ids in
        several pieces, 8-connected) and their ``split_pieces``; ``overlap_pixels`` (claimed by two classes) in
        ``overlap_images``; ``void_pixels`` (neither nucleus nor background) in ``void_images``; ``shared_ids``
        (used in two channels of an image).
    """

    fold: int
    images: list[ImageTruth] = field(default_factory=list)
    defects: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))

    def add(self, tissue: str, masks: NDArray[np.int32], background: NDArray[np.bool_]) -> None:
        """Append an image with masks (S, S, 5) and background (S, S) as they are written, and count its defects."""
        found: list[tuple[list[int], int, int, int]] = []
        for channel in range(masks.shape[2]):
            for number, where in enumerate(ndimage.find_objects(masks[..., channel]), start=1):
                if where is not None:
                    rows, columns = where
                    mask = masks[..., channel][where] == number
                    box = [columns.start, rows.start, columns.stop, rows.stop]
                    found.append((box, channel, number, int(mask.sum())))
                    parts = pieces(mask)
                    self._count(split_nuclei=parts > 1, split_pieces=parts if parts > 1 else 0)
        boxes, labels, ids, area = zip(*found, strict=True) if found else ((), (), (), ())
        image = ImageTruth(
            tissue,
            np.array(boxes, dtype=np.int64).reshape(-1, 4),
            np.array(labels, dtype=np.int8),
            np.array(ids, dtype=np.int64),
            np.array(area, dtype=np.int64),
        )
        self.images.append(image)
        claims = (masks > 0).sum(axis=2)
        overlap, void = int((claims > 1).sum()), int(((claims == 0) & ~background).sum())
        self._count(
            empty_images=not found,
            one_pixel_nuclei=int((image.area == 1).sum()),
            overlap_pixels=overlap,
            overlap_images=overlap > 0,
            void_pixels=void,
            void_images=void > 0,
            shared_ids=len(ids) - len(set(ids)),
        )

    def _count(self, **counts: int) -> None:
        for name, count in counts.items():
            self.defects[name] = self.defects.get(name, 0) + int(count)

    @property
    def counts(self) -> dict[str, int]:
        """Nuclei per class."""
        labels = np.concatenate([np.zeros(0, dtype=np.int8), *(image.labels for image in self.images)])
        return {name: int((labels == index).sum()) for index, name in enumerate(PANNUKE_CLASSES)}


def write_fold(
    path: str | Path,
    fold: int,
    n_images: int,
    patch_size: int = 256,
    seed: int = 0,
    *,
    mpp: float = 0.25,
    density: float = 1.0,
    mixture: Mapping[str, float] = MIXTURE,
    variation: float = 1.0,
    contrast: float = 1.0,
    defects: Defects = Defects(),  # noqa: B008 - frozen
    dtype: str = "float64",
    patches_per_scene: int = 4,
) -> FoldTruth:
    """Write an archive in the layout of a PanNuke fold; the same arguments give the same bytes.

    Parameters
    ----------
    path
        Zip file to write, replaced when it exists.
    fold
        Number of the fold: 1, 2 or 3 in PanNuke. Folds of one seed show different tissue.
    n_images
        Number of images; 0 is legal.
    patch_size
        Rows and columns of an image.
    seed
        Seed of everything random.
    mpp
        Pixel size in um: 0.25 in PanNuke; 0.5 shows four times the tissue in as many pixels.
    density
        Factor on the number of nuclei.
    mixture
        Architecture -> share of the area, see `looks.MIXTURES`: PanNuke's class balance is the default.
    variation, contrast
        Differences between the stains of scenes; strength of the hematoxylin. See `render.draw_stain`.
    defects
        How much of the images is spoilt.
    dtype
        Type of images and masks, at least two bytes wide to hold the ids: PanNuke uses float64.
    patches_per_scene
        A square number: images cut out of each scene.

    Raises
    ------
    ConfigError
        A number is out of range.
    """
    if np.dtype(dtype).kind not in "fiu" or np.dtype(dtype).itemsize < 2:
        raise ConfigError(f"synthetic fold: got dtype {dtype}, expected a number type of at least two bytes")
    side = _check(n_images, patch_size, mpp, patches_per_scene)
    extent = side * patch_size * mpp + 2 * _MARGIN
    spoiler = Spoiler(np.random.default_rng([seed, fold, 0]), n_images, defects)
    tissues = _tissues(np.random.default_rng([seed, fold, 1]), n_images, patches_per_scene)
    truth = FoldTruth(fold)
    with atomic(path) as temporary, tempfile.TemporaryDirectory(dir=temporary.parent, prefix=".spool") as folder:
        spool = _Spool(Path(folder), patch_size)
        for first in range(0, n_images, patches_per_scene):
            rng = np.random.default_rng([seed, fold, 2, first])
            scene = grow_scene(rng, extent, extent, density=density, mixture=mixture)
            stain = draw_stain(rng, variation=variation, contrast=contrast)
            cutter = _Cutter(scene, stain, int(rng.integers(2**31)), mpp, patch_size, side)
            for index in range(first, min(first + patches_per_scene, n_images)):
                image, masks = cutter.cut(index - first, rng, empty=index in spoiler.empty)
                background = spoiler.spoil(index, masks)
                truth.add(tissues[index], masks, background)
                spool.add(image, masks, background)
        _write_zip(temporary, fold, spool, np.array(tissues, dtype="<U13"), np.dtype(dtype))
    return truth


class _Cutter:
    """Cuts a scene into patches."""

    def __init__(self, scene: Scene, stain: Stain, seed: int, mpp: float, patch_size: int, side: int) -> None:
        self._scene, self._mpp, self._size, self._side = scene, mpp, patch_size, side
        self._filled = Renderer(scene, stain, seed)
        self._bare = Renderer(replace(scene, nuclei=(), glands=()), stain, seed)
        self._channel = np.array([-1] + [PANNUKE_CLASSES.index(n.look) for n in scene.nuclei])

    def cut(self, place: int, rng: np.random.Generator, *, empty: bool) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Image (S, S, 3) and masks (S, S, 5) of a patch; ids ascend with gaps, like those of the real data."""
        start = round(_MARGIN / self._mpp)
        origin = start + place // self._side * self._size, start + place % self._side * self._size
        renderer = self._bare if empty else self._filled
        drawn = renderer.window(self._mpp, origin, (self._size, self._size))
        present, local = np.unique(drawn.nucleus, return_inverse=True)
        local = local.reshape(drawn.nucleus.shape)
        ids = np.cumsum(rng.integers(1, 4, present.size)).astype(np.int32)
        ids[present == 0] = 0
        channel = self._channel[present]
        masks = np.where(channel[:, None] == np.arange(len(PANNUKE_CLASSES)), ids[:, None], 0).astype(np.int32)
        return drawn.image, masks[local]


class _Spool:
    """Images and masks on their way into an archive, on disk: a zip takes one member after the other."""

    def __init__(self, folder: Path, patch_size: int) -> None:
        self._paths = folder / "images", folder / "masks"
        self.size, self.count = patch_size, 0

    def add(self, image: NDArray[np.uint8], masks: NDArray[np.int32], background: NDArray[np.bool_]) -> None:
        """Append one image with its masks."""
        six = np.concatenate([masks, background[..., None]], axis=2).astype(np.uint16)
        for path, content in zip(self._paths, (image.tobytes(), six.tobytes()), strict=True):
            with path.open("ab") as handle:
                handle.write(content)
        self.count += 1

    def images(self) -> Iterator[NDArray[np.uint8]]:
        """Yield each image, (S, S, 3)."""
        return self._read(0, np.dtype(np.uint8), 3)

    def masks(self) -> Iterator[NDArray[np.uint16]]:
        """Yield the masks of each image, (S, S, 6)."""
        return self._read(1, np.dtype(np.uint16), 6)

    def _read(self, which: int, dtype: np.dtype[Any], channels: int) -> Iterator[NDArray[Any]]:
        shape = self.size, self.size, channels
        if not self.count:
            return
        with self._paths[which].open("rb") as handle:
            for _ in range(self.count):
                block = handle.read(int(np.prod(shape)) * dtype.itemsize)
                yield np.frombuffer(block, dtype=dtype).reshape(shape)


def _write_zip(path: Path, fold: int, spool: _Spool, types: NDArray[np.str_], dtype: np.dtype[Any]) -> None:
    images, masks = (f"Fold {fold}/{kind}/fold{fold}" for kind in ("images", "masks"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        # a member opened by its name bears the date 1980-01-01, so that the same arrays give the same bytes
        with archive.open(f"{images}/images.npy", "w", force_zip64=True) as member:
            _write_array(member, spool.images(), (spool.count, spool.size, spool.size, 3), dtype)
        with archive.open(f"{images}/types.npy", "w") as member:
            np.lib.format.write_array(member, types, allow_pickle=False)
        with archive.open(f"{masks}/masks.npy", "w", force_zip64=True) as member:
            _write_array(member, spool.masks(), (spool.count, spool.size, spool.size, 6), dtype)


def _write_array(
    member: IO[bytes], blocks: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    for block in blocks:
        member.write(block.astype(dtype).tobytes())


def _tissues(rng: np.random.Generator, n_images: int, repeats: int) -> list[str]:
    """Tissue of each image; the images of a scene have one."""
    shares = np.array(list(TISSUES.values()), dtype=float)
    drawn = rng.choice(list(TISSUES), size=-(-n_images // repeats), p=shares / shares.sum())
    return [str(t) for t in np.repeat(drawn, repeats)[:n_images]]


def _check(n_images: int, patch_size: int, mpp: float, patches_per_scene: int) -> int:
    """Refuse impossible settings; returns the number of patches along a side of a scene."""
    side = math.isqrt(max(patches_per_scene, 0))
    if n_images < 0 or patch_size < 8 or mpp <= 0 or side < 1 or side**2 != patches_per_scene:
        raise ConfigError(
            f"synthetic fold: got n_images={n_images}, patch_size={patch_size}, mpp={mpp}, "
            f"patches_per_scene={patches_per_scene}; expected n_images >= 0, patch_size >= 8 px, mpp > 0 um and a "
            "square number of patches per scene (1, 4, 9, ...)"
        )
    return side
