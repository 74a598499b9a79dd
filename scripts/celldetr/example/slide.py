"""Synthetic whole slides: a pyramidal TIFF that OpenSlide reads, and outlines of its nuclei.

`write_slide(path, seed=..., size_um=(width, height), mpp=..., ...)` grows and stains a piece of tissue as the other
examples do, on empty glass with a stroke of a marker pen, and returns what was planted.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import tifffile
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from celldetr.example import textures
from celldetr.example.looks import mixture_named
from celldetr.example.render import Renderer, draw_stain
from celldetr.example.shapes import Array
from celldetr.example.tissue import grow_scene
from celldetr.example.xenium_images import draw_he
from celldetr.example.xenium_tissue import AffinePlan, Frames, on_tissue, plan_frames
from celldetr.runtime.errors import ConfigError
from celldetr.runtime.files import atomic

_STEP, _LEVELS, _TILE = 4, 3, 256  # each level is 4 times as coarse as the one before
_BLOCK = 64  # rows that are held in memory at once; a multiple of the step
_INK = np.array([2.2, 1.1, 0.35])  # optical density of the pen in red, green and blue
_PEN_UM = 28.0  # width of its stroke
_PEN_OUT = 6.0  # um by which the middle of the stroke lies outside of the tissue
_CROSSED, _EMPTY = 3, 2  # outlines that cross themselves, and that are empty


@dataclass(frozen=True)
class SlideTruth:
    """What was planted.

    Attributes
    ----------
    name
        Name of the slide.
    image, polygons
        The files; no polygons when not written.
    mpp
        True um per px of level 0.
    size
        Width and height of level 0 in px.
    tissue
        (V, 2) outline of the tissue, level-0 px.
    pen
        (K, 2) middle of the pen's stroke, level-0 px, and `pen_width` in px.
    pen_width
        Width of the stroke.
    nuclei
        N outlines (V, 2), level-0 px, as drawn.
    classes
        (N,) str: their classes of PanNuke.
    invalid
        Kind -> outlines of the file that are not valid: ``crossed`` (the first nuclei, two of their corners swapped),
        ``empty`` and ``flat`` (no nuclei at all).
    """

    name: str
    image: Path
    polygons: Path | None
    mpp: float
    size: tuple[int, int]
    tissue: Array
    pen: Array
    pen_width: float
    nuclei: list[Array]
    classes: NDArray[np.str_]
    invalid: Mapping[str, int]


def write_slide(
    path: str | os.PathLike[str],
    *,
    seed: int,
    size_um: tuple[float, float],
    mpp: float,
    name: str,
    polygons: str | os.PathLike[str] | None = None,
    rim_um: float = 80.0,
    mixture: str | Mapping[str, float] = "example",
    density: float = 1.0,
    variation: float = 1.0,
    contrast: float = 1.0,
    resolution_tags: bool = True,
) -> SlideTruth:
    """Write a slide of levels 1, 4 and 16, tiled and compressed as JPEG.

    It is drawn window by window into a scratch file beside it. The same arguments give the same bytes.

    Parameters
    ----------
    path
        TIFF to write.
    seed
        Seed of everything random.
    size_um
        Width and height of the tissue; the slide is wider by the rim on each side.
    mpp
        Um per px of level 0.
    name
        Stands in the description of the image.
    polygons
        File of the outlines to write, level-0 px: ``.parquet`` (GeoParquet) or ``.geojson``. Each has a class, which
        pretraining must not read; a few are not valid.
    rim_um
        Empty glass around the tissue.
    mixture
        Architecture -> share of the area, or the name of one of `looks.MIXTURES`.
    density
        Factor on the number of nuclei.
    variation, contrast
        Stain, see `render.draw_stain`.
    resolution_tags
        Whether the file says how large its pixels are.

    Raises
    ------
    ConfigError
        A setting is out of range, or the file of the outlines is of another kind.
    """
    outlines = None if polygons is None else Path(polygons)
    _check(size_um, mpp, rim_um, outlines)
    rng = np.random.default_rng([seed, 7])
    frames = plan_frames(rng, size_um, rim_um=rim_um, he_mpp=mpp, pixel_size=mpp, affine=AffinePlan())
    scene = on_tissue(grow_scene(rng, *size_um, density=density, mixture=mixture_named(mixture)), frames)
    if not scene.nuclei:
        raise ConfigError(f"synthetic slide: got no nucleus in size_um={size_um}, density={density}; expected more")
    renderer = Renderer(scene, draw_stain(rng, variation=variation, contrast=contrast), int(rng.integers(2**31)))
    pen = _stroke(rng, frames)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".scratch") as scratch, atomic(file) as temporary:
        image = draw_he(Path(scratch) / "0.raw", renderer, frames, axes="yxs", seed=seed)
        _draw_pen(image, pen, mpp, textures.mixed(seed, 7))
        _write_levels(temporary, image, mpp if resolution_tags else None, name, Path(scratch))
        del image
    nuclei = [frames.he_px(nucleus.outline) for nucleus in scene.nuclei]
    classes = np.array([nucleus.look for nucleus in scene.nuclei])
    shapes, invalid = _spoiled(nuclei)
    if outlines is not None:
        labels = [*classes.tolist(), *[str(classes[0])] * (len(shapes) - len(classes))]
        with atomic(outlines) as temporary:
            (_write_parquet if outlines.suffix == ".parquet" else _write_geojson)(temporary, shapes, labels)
    return SlideTruth(
        name=name,
        image=file,
        polygons=outlines,
        mpp=mpp,
        size=frames.he_size,
        tissue=frames.he_px(frames.tissue),
        pen=pen / mpp,
        pen_width=_PEN_UM / mpp,
        nuclei=nuclei,
        classes=classes,
        invalid=invalid,
    )


def _check(size_um: tuple[float, float], mpp: float, rim_um: float, polygons: Path | None) -> None:
    if min(size_um) <= 0 or mpp <= 0 or rim_um <= 0 or (min(size_um) + 2 * rim_um) / mpp < _STEP ** (_LEVELS - 1):
        raise ConfigError(
            f"synthetic slide: got size_um={size_um}, mpp={mpp}, rim_um={rim_um}; expected sizes > 0 um that are at "
            f"least {_STEP ** (_LEVELS - 1)} px"
        )
    if polygons is not None and polygons.suffix not in (".parquet", ".geojson"):
        raise ConfigError(f"synthetic slide: got polygons={str(polygons)!r}, expected a name in .parquet or .geojson")


def _stroke(rng: np.random.Generator, frames: Frames) -> Array:
    """(K, 2) middle of a stroke of the pen along a quarter of the tissue's rim, um from the corner of the slide."""
    outline = np.roll(frames.tissue, int(rng.integers(len(frames.tissue))), axis=0)[: len(frames.tissue) // 4]
    away = outline - frames.tissue.mean(axis=0)
    line = shapely.LineString(outline + _PEN_OUT * away / np.hypot(*away.T)[:, None] + frames.rim_um)
    points: Array = shapely.get_coordinates(shapely.segmentize(line, 1.0))
    return points


def _draw_pen(image: NDArray[np.uint8], pen: Array, mpp: float, seed: int) -> None:
    """Draw the stroke over the slide, block by block."""
    tree, half = cKDTree(pen), _PEN_UM / 2
    low = np.maximum(((pen.min(axis=0) - half) / mpp).astype(int), 0)
    high = np.minimum(((pen.max(axis=0) + half) / mpp).astype(int) + 1, image.shape[1::-1])
    x = (np.arange(low[0], high[0]) + 0.5) * mpp
    for top in range(low[1], high[1], _BLOCK):
        y = (np.arange(top, min(top + _BLOCK, high[1])) + 0.5) * mpp
        points = np.stack(np.meshgrid(x, y), axis=-1)
        distance = tree.query(points, distance_upper_bound=half)[0].astype(np.float32)
        streaks = 1 + 0.25 * textures.noise(seed, y, x, 9.0)
        ink = textures.step(-distance, -half, 1.5 - half) * streaks
        part = image[top : top + len(y), low[0] : high[0]]
        part[...] = part * np.exp(-ink[..., None] * _INK.astype(np.float32)) + np.float32(0.5)


def _write_levels(path: Path, image: NDArray[np.uint8], mpp: float | None, name: str, scratch: Path) -> None:
    """Write a TIFF with a page for each level, as OpenSlide expects them."""
    with tifffile.TiffWriter(path, bigtiff=image.nbytes > 2**31) as writer:
        for level in range(_LEVELS):
            per_cm = None if mpp is None else 1e4 / (mpp * _STEP**level)
            writer.write(
                image,
                photometric="rgb",
                tile=(_TILE, _TILE),
                compression="jpeg",
                subsampling=(1, 1),  # halved, the colour of the tissue would spread over the glass in coarse levels
                compressionargs={"level": 90},
                maxworkers=1,
                resolution=None if per_cm is None else (per_cm, per_cm),
                resolutionunit=None if per_cm is None else "CENTIMETER",
                subfiletype=1 if level else 0,
                description=f"Synthetic tissue: {name}" if level == 0 else None,
                metadata=None,
            )
            if level + 1 < _LEVELS:
                image = _coarser(image, scratch / f"{level + 1}.raw")


def _coarser(image: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    """Average 4 x 4 px into a file; what is left over at the right and the bottom is left out."""
    height, width = image.shape[0] // _STEP, image.shape[1] // _STEP
    coarse = np.memmap(path, np.uint8, "w+", shape=(height, width, 3))
    for top in range(0, height, _BLOCK // _STEP):
        rows = min(_BLOCK // _STEP, height - top)
        part = np.asarray(image[_STEP * top : _STEP * (top + rows), : _STEP * width], dtype=np.float32)
        means = part.reshape(rows, _STEP, width, _STEP, 3).mean(axis=(1, 3))
        coarse[top : top + rows] = (means + np.float32(0.5)).astype(np.uint8)
    return coarse


def _spoiled(nuclei: list[Array]) -> tuple[list[shapely.Polygon], dict[str, int]]:
    """Outlines as polygons: some of them not valid, and further ones that are no nuclei at the end."""
    crossed = min(_CROSSED, len(nuclei))
    rings = [ring.copy() for ring in nuclei]
    for ring in rings[:crossed]:
        ring[[0, len(ring) // 4]] = ring[[len(ring) // 4, 0]]
    x, y = nuclei[0][0]
    flat = shapely.Polygon([(x, y), (x + 5, y), (x + 9, y)])
    shapes = [shapely.Polygon(ring) for ring in rings] + [shapely.Polygon()] * _EMPTY + [flat]
    return shapes, {"crossed": crossed, "empty": _EMPTY, "flat": 1}


def _write_parquet(path: Path, shapes: list[shapely.Polygon], labels: list[str]) -> None:
    column = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    table = pa.table({"class": labels, "geometry": pa.array(shapely.to_wkb(shapes).tolist(), pa.binary())})
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)


def _write_geojson(path: Path, shapes: list[shapely.Polygon], labels: list[str]) -> None:
    features: list[dict[str, Any]] = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(shape)),
            "properties": {"objectType": "detection", "classification": {"name": label}},
        }
        for shape, label in zip(shapes, labels, strict=True)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
