"""A drawn section for tests of registration: its H&E and DAPI images, its nuclei, and the planted matrix."""

from collections import namedtuple

import numpy as np
import shapely
import tifffile
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from celldetr.slides.pyramid import open_pyramid
from celldetr.xenium.registration.affine import affine, apply, decompose, inverse, rotation, scaling

PIXEL = 0.2125  # um per Xenium px
EXTENT = np.array([400.0, 300.0])  # um of the section; from 384 um on the search has a coarser map
WHOLE = (shapely.box(4, 4, *(EXTENT - 4)),)
SWAP = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
Scene = namedtuple("Scene", "he dapi nuclei matrix")


def ellipses(rng, count=640, apart=6.5):
    """Nuclei of uneven density: polygons, um."""
    points = rng.random((4 * count, 2)) * (EXTENT - 30) + 15
    hills = rng.random((5, 2)) * EXTENT
    density = np.exp(-(((points[:, None] - hills) / 70) ** 2).sum(axis=2)).sum(axis=1)
    points = points[rng.random(len(points)) < np.clip(density, 0.08, 1)]
    alive = np.ones(len(points), dtype=bool)
    for i, j in sorted(cKDTree(points).query_pairs(apart)):
        alive[j] &= not alive[i]
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    shapes = []
    for centre in points[alive][:count]:
        ring = np.column_stack([np.cos(angle), np.sin(angle)]) * rng.uniform(2.5, 4.5, 2)
        shapes.append(shapely.Polygon(ring @ rotation(rng.uniform(0, 180)).T + centre))
    return np.array(shapes, dtype=object)


def planted(angle=0.0, scale=1.3, shift=(0.0, 0.0), shear=0.0, flip=False):
    """Matrix H&E px -> Xenium px with the section in the middle of the H&E, and the size of the H&E."""
    linear = scale * rotation(angle) @ np.array([[1, shear], [0, 1]]) @ np.diag([1, -1 if flip else 1])
    side = int((np.hypot(*EXTENT) + 2 * np.abs(shift).max() + 20) / (scale * PIXEL))
    middle = (EXTENT / 2 + np.array(shift)) / PIXEL
    return affine(linear, middle - linear @ (np.array([side, side]) / 2)), (side, side)


def write_image(path, image, mpp=None):
    photometric = "rgb" if image.ndim == 3 else "minisblack"
    resolution = {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"} if mpp else {}
    options = {"tile": (256, 256), "photometric": photometric}
    with tifffile.TiffWriter(path) as file:
        file.write(image, subifds=2, **resolution, **options)
        file.write(np.ascontiguousarray(image[::2, ::2]), subfiletype=1, **options)
        file.write(np.ascontiguousarray(image[::4, ::4]), subfiletype=1, **options)
    return path


def draw_he(rng, nuclei, to_px, size, visible, tissue):
    """H&E of `tissue` (polygons, um) on glass, in which a share of the nuclei is visible."""
    picture = Image.new("RGB", size, (246, 243, 246))
    pen = ImageDraw.Draw(picture)
    for part in tissue:
        pen.polygon([tuple(corner) for corner in apply(to_px, np.asarray(part.exterior.coords))], fill=(231, 188, 211))
    for shape in nuclei[rng.random(len(nuclei)) < visible]:
        paint = tuple((np.array([108, 80, 150]) + rng.integers(-25, 26, 3)).tolist())
        pen.polygon([tuple(corner) for corner in apply(to_px, np.asarray(shape.exterior.coords))], fill=paint)
    smooth = ndimage.gaussian_filter(np.asarray(picture, dtype=np.float32), (1.2, 1.2, 0))
    return np.clip(smooth + rng.normal(0, 5, smooth.shape[:2])[..., None], 0, 255).astype(np.uint8)


def draw_dapi(rng, nuclei):
    picture = Image.new("F", tuple((EXTENT / PIXEL).astype(int).tolist()), 150.0)
    pen = ImageDraw.Draw(picture)
    for shape in nuclei:
        corners = np.asarray(shape.exterior.coords) / PIXEL
        pen.polygon([tuple(corner) for corner in corners], fill=float(rng.uniform(800, 4000)))
    smooth = ndimage.gaussian_filter(np.asarray(picture), 2)
    return np.clip(smooth + rng.normal(0, 40, smooth.shape), 0, 65535).astype(np.uint16)


def wave(largest, length, seed=3):
    """Smooth displacements of points (n, 2): plane waves of a length, um, in all directions; at most `largest` um."""
    rng = np.random.default_rng(seed)
    angle, phase, amount = rng.uniform(0, 2 * np.pi, 6), rng.uniform(0, 2 * np.pi, (6, 2)), rng.normal(size=(6, 2))
    ahead = 2 * np.pi / length * np.stack([np.cos(angle), np.sin(angle)])

    def field(points):
        return (np.cos((points @ ahead)[:, :, None] + phase) * amount).sum(axis=1)

    scale = largest / np.linalg.norm(field(rng.random((4000, 2)) * 1500), axis=1).max()
    return lambda points: scale * field(points)


def make_scene(folder, seed=0, known=True, bend=None, visible=0.92, tissue=WHOLE, **plan):
    """Draw and write a scene; `bend` gives the displacements (n, 2), um, of what the H&E shows of points (n, 2)."""
    rng = np.random.default_rng(seed)
    nuclei = ellipses(rng)
    nuclei = nuclei[shapely.within(nuclei, shapely.union_all(tissue))]
    matrix, size = planted(**plan)
    mpp = decompose(matrix).scale * PIXEL
    shown = shapely.transform(nuclei, lambda points: points + bend(points)) if bend else nuclei
    he = write_image(
        folder / f"he{seed}.tif", draw_he(rng, shown, inverse(scaling(PIXEL) @ matrix), size, visible, tissue)
    )
    dapi = write_image(folder / f"dapi{seed}.tif", draw_dapi(rng, nuclei), PIXEL)
    return Scene(open_pyramid(he, mpp if known else None), open_pyramid(dapi, plane=0), nuclei, matrix)
