"""Images of a synthetic Xenium sample: H&E and DAPI, drawn window by window, and OME-TIFF pyramids of them."""

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from celldetr.example import textures
from celldetr.example.looks import LOOKS
from celldetr.example.render import Renderer
from celldetr.example.shapes import Array, rasterise
from celldetr.example.textures import Floats
from celldetr.example.xenium_tissue import Cells, Frames

HE_AXES = ("yxs", "syx", "zyxs")
"""Orders of the axes of an H&E: (y, x, 3); (3, y, x), a page for each colour; (1, y, x, 3), stored as the first, since
OME has further axes of length 1 anyway."""
_WINDOW = 512  # px that are drawn at once
_DAPI_BLUR = 0.3  # um
_DAPI_LEVEL = 2600.0  # grey values of a nucleus of 1 unit of hematoxylin
_DAPI_GLASS, _DAPI_TISSUE = 110.0, 90.0  # grey values of the empty frame, and added by tissue


def draw_he(path: Path, renderer: Renderer, frames: Frames, *, axes: str, seed: int) -> NDArray[np.uint8]:
    """Draw the H&E into a file that backs the array it returns.

    Parameters
    ----------
    path
        Scratch file.
    renderer
        Of the drawn scene.
    frames
        Where the tissue lies.
    axes
        One of `HE_AXES`.
    seed
        Seed of the noise of empty glass.

    Returns
    -------
    NDArray
        (H, W, 3) uint8; for the axes "syx" a view of an array (3, H, W).
    """
    width, height = frames.he_size
    if axes == "syx":
        image = np.moveaxis(np.memmap(path, np.uint8, "w+", shape=(3, height, width)), 0, -1)
    else:
        image = np.memmap(path, np.uint8, "w+", shape=(height, width, 3))
    for rows, columns in _windows(height, width):
        shape = rows.stop - rows.start, columns.stop - columns.start
        origin = rows.start - frames.rim_px, columns.start - frames.rim_px
        corner = origin[1] * frames.he_mpp, origin[0] * frames.he_mpp
        on = _share(frames.tissue, frames.he_mpp, corner, shape) if frames.rim_px else np.ones(shape, np.float32)
        glass = _glass(renderer, seed, origin, shape)
        if on.any():
            drawn = renderer.window(frames.he_mpp, origin, shape).image
            glass = np.where(on[..., None] >= 1, drawn, on[..., None] * drawn + (1 - on[..., None]) * glass)
        image[rows, columns] = np.clip(glass + 0.5 * (on[..., None] < 1), 0, 255)
    return image


def _glass(renderer: Renderer, seed: int, origin: tuple[int, int], shape: tuple[int, int]) -> Floats:
    rows, columns = origin[0] + np.arange(shape[0]), origin[1] + np.arange(shape[1])
    noise = [0.4 * renderer.stain.noise * textures.white(seed + k, rows, columns) for k in range(3)]
    light: Floats = 255 * renderer.stain.light.astype(np.float32) + np.stack(noise, axis=-1)
    return light


def draw_dapi(path: Path, cells: Cells, frames: Frames, seed: int) -> NDArray[np.uint16]:
    """Draw the DAPI image of the nuclei into a file that backs the (H, W) uint16 array it returns."""
    width, height = frames.xenium_size
    image = np.memmap(path, np.uint16, "w+", shape=(height, width))
    painter = _Dapi(cells, frames, seed)
    for rows, columns in _windows(height, width):
        image[rows, columns] = painter.window(rows, columns)
    return image


class _Dapi:
    """Draws windows of the DAPI image."""

    def __init__(self, cells: Cells, frames: Frames, seed: int) -> None:
        rng = np.random.default_rng([seed, 5])
        self._frames = frames
        self._outlines = [frames.xenium_um(nucleus.outline) for nucleus in cells.scene.nuclei]
        self._bounds = bounds(self._outlines)
        self._looks = [LOOKS[nucleus.look] for nucleus in cells.scene.nuclei]
        spread = np.exp(0.22 * rng.standard_normal(len(self._looks)))
        self._level = [look.hematoxylin * s for look, s in zip(self._looks, spread.tolist(), strict=True)]
        self._tissue = frames.xenium_um(frames.tissue)
        self._seeds = [textures.mixed(seed, k) for k in range(6)]

    def window(self, rows: slice, columns: slice) -> NDArray[np.uint16]:
        """Draw a window."""
        size = self._frames.pixel_size
        sigma = _DAPI_BLUR / size
        margin = int(np.ceil(3 * sigma))
        shape = rows.stop - rows.start + 2 * margin, columns.stop - columns.start + 2 * margin
        corner = (columns.start - margin) * size, (rows.start - margin) * size
        x = corner[0] + (np.arange(shape[1]) + 0.5) * size
        y = corner[1] + (np.arange(shape[0]) + 0.5) * size
        signal = np.zeros(shape, dtype=np.float32)
        tissue = rasterise(self._tissue, size, corner, shape)
        if tissue is not None:
            clouds = 1 + 0.4 * textures.noise(self._seeds[0], y, x, 25.0)
            signal[tissue.index] += _DAPI_TISSUE * clouds[tissue.index] * tissue.mask
        hit = touching(self._bounds, (x[0], y[0], x[-1], y[-1]))
        if hit.size:
            clumps = textures.noise(self._seeds[1], y, x, 1.9)
            grain = textures.noise(self._seeds[2], y, x, 0.7)
        for index in hit:
            inside = rasterise(self._outlines[index], size, corner, shape)
            if inside is not None:
                look, at = self._looks[index], inside.index
                texture = look.coarse * clumps[at] + (1 - look.coarse) * grain[at]
                chromatin = self._level[index] * _DAPI_LEVEL * (1 + 1.6 * look.chromatin * texture)
                signal[at] = np.where(inside.mask, np.maximum(signal[at], chromatin), signal[at])
        signal = ndimage.gaussian_filter(signal, sigma)[margin:-margin, margin:-margin] + _DAPI_GLASS
        white = textures.white(self._seeds[3], np.arange(rows.start, rows.stop), np.arange(columns.start, columns.stop))
        noisy = signal + (4.0 + 1.2 * np.sqrt(signal)) * white
        return np.clip(noisy + 0.5, 0, 65535).astype(np.uint16)


def write_pyramid(
    path: Path,
    image: NDArray[Any],
    *,
    mpp: float | None,
    axes: str = "YX",
    channel: str | None = None,
    tile: int = 512,
    scratch: Path,
) -> None:
    """Write an OME-TIFF pyramid of tiles; each level is half as wide as the one before.

    Parameters
    ----------
    path
        File to write; its name decides the identifier in the metadata, so that the same image gives the same bytes.
    image
        (H, W, 3) uint8, compressed as JPEG (for the axes "SYX" a page for each colour: deflate); or (H, W) uint16,
        deflate.
    mpp
        Pixel size in um; None leaves it out of the metadata.
    axes
        Axes of OME: "YXS", "SYX", "ZYXS" or "YX".
    channel
        Name of the only channel.
    tile
        Rows and columns of a tile.
    scratch
        Folder for the coarser levels.
    """
    planes = axes == "SYX"
    metadata: dict[str, Any] = {
        "axes": "CYX" if planes else axes,
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, path.name.lstrip("."))),
    }
    if mpp is not None:
        metadata |= {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    if channel is not None or planes:
        metadata["Channel"] = {"Name": ["red", "green", "blue"] if planes else [channel]}
    count = 0
    while max(image.shape[:2]) >> count > tile:
        count += 1
    jpeg = image.ndim == 3 and not planes
    with tifffile.TiffWriter(path, ome=True, bigtiff=image.nbytes > 2**31) as writer:
        for level in range(count + 1):
            writer.write(
                _ordered(image, axes),
                photometric="rgb" if jpeg else "minisblack",
                tile=(tile, tile),
                compression="jpeg" if jpeg else "zlib",
                compressionargs={"level": 90 if jpeg else 6},
                predictor=None if jpeg else True,
                maxworkers=1,
                resolution=None if mpp is None else (1e4 / mpp / 2**level, 1e4 / mpp / 2**level),
                resolutionunit=None if mpp is None else "CENTIMETER",
                subifds=count if level == 0 else None,
                subfiletype=1 if level else None,
                metadata=None if level else metadata,
            )
            if level < count:
                image = _halved(image, scratch / f"level-{level % 2}.raw", planes=planes)
    for level in range(2):
        (scratch / f"level-{level}.raw").unlink(missing_ok=True)


def _ordered(image: NDArray[Any], axes: str) -> NDArray[Any]:
    if axes == "SYX":
        return np.moveaxis(image, -1, 0)
    return image[None] if axes == "ZYXS" else image


def _halved(image: NDArray[Any], path: Path, *, planes: bool) -> NDArray[Any]:
    """Average 2 x 2 px; the last row or column of an odd size is left out."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    path.unlink(missing_ok=True)  # an array of an earlier level may still be mapped to it
    if planes:
        half: NDArray[Any] = np.moveaxis(np.memmap(path, image.dtype, "w+", shape=(3, height, width)), 0, -1)
    else:
        half = np.memmap(path, image.dtype, "w+", shape=(height, width, *image.shape[2:]))
    for top in range(0, height, _WINDOW):
        part = np.asarray(image[2 * top : 2 * min(top + _WINDOW, height), : 2 * width], dtype=np.uint32)
        total = part[::2, ::2] + part[1::2, ::2] + part[::2, 1::2] + part[1::2, 1::2]
        half[top : top + _WINDOW] = (total + 2) // 4
    return half


def label_image(polygons: list[Array], frames: Frames, rows: slice, columns: slice, box: Array) -> NDArray[np.uint32]:
    """Draw a window of the label image of polygons (Xenium um): 1 + index, 0 where there is none.

    `box` are the `bounds` of the polygons.
    """
    size = frames.pixel_size
    corner, shape = (columns.start * size, rows.start * size), (rows.stop - rows.start, columns.stop - columns.start)
    labels = np.zeros(shape, dtype=np.uint32)
    reach = *corner, columns.stop * size, rows.stop * size
    for index in touching(box, reach):
        inside = rasterise(polygons[index], size, corner, shape)
        if inside is not None:
            labels[inside.index][inside.mask] = index + 1
    return labels


def bounds(outlines: list[Array]) -> Array:
    """(N, 4) lowest x, y and highest x, y of outlines."""
    return np.array([[*o.min(axis=0), *o.max(axis=0)] for o in outlines], dtype=float).reshape(-1, 4)


def touching(box: Array, reach: tuple[float, float, float, float]) -> NDArray[np.intp]:
    """Find the bounds that reach into a window (x0, y0, x1, y1)."""
    columns = (box[:, 2] >= reach[0]) & (box[:, 0] <= reach[2])
    return np.flatnonzero(columns & (box[:, 3] >= reach[1]) & (box[:, 1] <= reach[3]))


def _windows(height: int, width: int, side: int = _WINDOW) -> list[tuple[slice, slice]]:
    tops, lefts = range(0, height, side), range(0, width, side)
    return [(slice(t, min(t + side, height)), slice(c, min(c + side, width))) for t in tops for c in lefts]


def _share(polygon: Array, mpp: float, corner: tuple[float, float], shape: tuple[int, int]) -> Floats:
    """(R, C) share of each pixel that a polygon covers, with a soft edge of about 1 um."""
    margin = int(np.ceil(3.0 / mpp))
    grown = shape[0] + 2 * margin, shape[1] + 2 * margin
    window = rasterise(polygon, mpp, (corner[0] - margin * mpp, corner[1] - margin * mpp), grown)
    mask = np.zeros(grown, dtype=np.float32)
    if window is not None:
        mask[window.index] = window.mask
    soft: Floats = ndimage.uniform_filter(mask, max(1, round(2.0 / mpp)))[margin:-margin, margin:-margin]
    return soft
