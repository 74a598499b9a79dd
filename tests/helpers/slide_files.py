"""Slides for tests: TIFF pyramids, damage to their tiles, nuclei on them, and grids of patches over them."""

import contextlib

import numpy as np
import shapely
import tifffile

from celldetr.config.slides import PatchSettings
from celldetr.example.slide import write_slide
from celldetr.slides.boxes import SlideNuclei
from celldetr.slides.grid import patch_grid
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import Raster

ALL_PATCHES = PatchSettings(min_tissue=0, min_nuclei=0, min_labelled=0)


@contextlib.contextmanager
def drawn_slide(folder, mpp):
    """Yield a drawn slide with a stroke of blue pen: its image, and the outlines of its 589 nuclei, px of level 0."""
    truth = write_slide(folder / "slide.tif", folder / "n.parquet", seed=5, size_um=(420.0, 330.0), mpp=mpp)
    with open_pyramid(truth.image) as image:
        yield image, shapely.polygons(truth.nuclei)


def write_image(path, image, levels=1, tile=64, **options):
    """Write an image as a TIFF pyramid; each level averages 2 x 2 px of the one before and drops an odd last row."""
    photometric = "rgb" if image.ndim == 3 else "minisblack"
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            kind = {"subifds": levels - 1} if level == 0 else {"subfiletype": 1}
            pixels = np.rint(image).astype(np.uint8)
            writer.write(pixels, tile=(tile, tile), photometric=photometric, **kind, **options)
            height, width = (side // 2 * 2 for side in image.shape[:2])
            image = image[:height, :width].astype(float)
            image = image.reshape(height // 2, 2, width // 2, 2, -1).mean(axis=(1, 3)).squeeze()
    return path


def damage_tiles(path, tiles):
    """Overwrite tiles (page, number) of a TIFF with zeros."""
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for page, tile in tiles:
            start, count = file.pages[page].dataoffsets[tile], file.pages[page].databytecounts[tile]
            data[start : start + count] = bytes(count)
    path.write_bytes(data)
    return path


def whole_tissue(width, height, cell=16):
    """Map of a slide that is all tissue."""
    return Raster(np.ones((-(-height // cell), -(-width // cell)), bool), cell, cell / 4)


def boxes_on_slide(boxes, labels=None):
    """Rectangular nuclei with these boxes (n, 4) and labels (n,), 0 if not given."""
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    labels = np.zeros(len(boxes)) if labels is None else labels
    return SlideNuclei(shapely.box(*boxes.T), np.asarray(labels, np.int8))


def grid_over(image_size, nuclei, *, ratio=1.0, size=32, settings=ALL_PATCHES, seed=0, **more):
    """Lay a grid of patches of 1 um per px on an image of 1 / ratio um per px."""
    more = {"tissue": whole_tissue(*image_size), **more}
    return patch_grid(image_size, 1 / ratio, nuclei, size=size, mpp=1.0, settings=settings, seed=seed, **more)
