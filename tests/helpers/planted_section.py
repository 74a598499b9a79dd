"""A section with planted truth: an H&E image, drawn or real, and the DAPI image and nuclei that Xenium sees of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from PIL import Image
from skimage.measure import find_contours, regionprops
from xenium_scene import PIXEL, write_image

from celldetr.example.drawing import draw_dapi, draw_he
from celldetr.example.images import label_image
from celldetr.example.tissue import SceneNuclei, grow_scene
from celldetr.slides.pyramid import open_pyramid
from celldetr.xenium.registration.affine import affine, apply, rotation, scaling

DAPI = "morphology_focus/morphology_focus_0000.ome.tif"
WHITE = 243
RIM = 20.0  # um of the Xenium frame around the section
NOISE = 0.2  # um; standard deviation of the places of segmented nuclei
FOUND = 0.9  # share of the nuclei that Xenium segments


@dataclass(frozen=True)
class Section:
    """H&E (h, w, 3) of `mpp` um per px, and the nuclei in it."""

    image: np.ndarray
    mpp: float
    outlines: np.ndarray  # (n,) polygons, px of the H&E as it was before a fold: where Xenium has the nuclei
    classes: np.ndarray  # (n,) index into PANNUKE_CLASSES
    shown: np.ndarray  # (n,) polygons, px of this H&E
    visible: np.ndarray  # (n,) the H&E shows at least half of the nucleus
    in_place: np.ndarray  # (n,) it shows all of it, and not beyond a fold

    @property
    def centres(self):
        """Centres (n, 2), um of the H&E before a fold."""
        return shapely.get_coordinates(shapely.centroid(self.outlines)) * self.mpp

    @property
    def extent(self):
        """Width and height, um."""
        return np.array(self.image.shape[1::-1]) * self.mpp

    def only(self, kept):
        """Keep the nuclei of a mask (n,); the H&E stays."""
        parts = ("outlines", "classes", "shown", "visible", "in_place")
        return replace(self, **{name: getattr(self, name)[kept] for name in parts})


@dataclass(frozen=True)
class Planted:
    """What a registration gets, and the truth."""

    he_path: Path
    mpp: float
    outs: Path  # folder with the DAPI image and the boundaries of the segmented nuclei
    nuclei: np.ndarray  # (m,) segmented outlines, um of the Xenium frame
    matrix: np.ndarray  # (3, 3) H&E px -> Xenium px, without the displacements
    true: np.ndarray  # (k,) outlines of all nuclei without noise, um of the Xenium frame
    shown: np.ndarray  # (k,) the same nuclei, px of the H&E
    visible: np.ndarray  # (k,) the H&E shows at least half of them
    in_place: np.ndarray  # (k,) it shows all, and not beyond a fold

    @property
    def centres(self):
        """Centres (k, 2) of all nuclei, um of the Xenium frame."""
        return shapely.get_coordinates(shapely.centroid(self.true))

    def open(self, mpp=None):
        """Open both images; `mpp` replaces the H&E's."""
        return open_pyramid(self.he_path, mpp or self.mpp), open_pyramid(self.outs / DAPI, plane=0)

    def boxes(self, registration):
        """Distance of centres (k,), um, and intersection over union of boxes (k,), by a registration and in truth."""
        placed = shapely.transform(self.true, registration.on_affine)
        placed = shapely.transform(placed, lambda points: apply(registration.um_to_he(), points))
        centres = [shapely.get_coordinates(shapely.centroid(shapes)) for shapes in (placed, self.shown)]
        one, other = shapely.bounds(placed), shapely.bounds(self.shown)
        low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
        common = np.maximum(high - low, 0).prod(axis=1)
        both = sum((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (one, other)) - common
        return np.linalg.norm(centres[0] - centres[1], axis=1) * self.mpp, common / both


def drawn_section(seed, size_um, mpp=0.2738):
    """Draw the tissue of the example, without a rim."""
    rng = np.random.default_rng([seed, 19])
    scene = grow_scene(rng, size_um)
    image, _ = draw_he(rng, scene, mpp)
    outlines = shapely.polygons(scene.nuclei.outlines / mpp)
    return _section(image, mpp, outlines, scene.nuclei.classes)


def real_section(folder, size_um, mpp=0.25, *, part=0):
    """Lay real tiles side by side; `part` 1 has other tiles than `part` 0.

    `folder` has images/, and labels/ with an image of instances for each (NAME.png or NAME_label.png), or labels.npz
    with their `names` and `instances` (n, h, w). Raises SystemExit if there are too few tiles.
    """
    files = sorted(file for file in (folder / "images").iterdir() if file.suffix in (".png", ".jpg", ".tif"))
    side = Image.open(files[0]).size[0]
    columns, rows = (int(np.ceil(length / (side * mpp))) for length in size_um)
    count = columns * rows
    taken = files[part * count : (part + 1) * count]
    if len(taken) < count:
        raise SystemExit(f"{folder}: got {len(files)} images, expected {2 * count}; take a smaller --size")
    instances = _instances(folder)
    image = np.full((rows * side, columns * side, 3), WHITE, np.uint8)
    shapes = []
    for number, file in enumerate(taken):
        y, x = (side * index for index in divmod(number, columns))
        image[y : y + side, x : x + side] = np.asarray(Image.open(file).convert("RGB"))
        for region in regionprops(instances(file)):
            if region.area * mpp**2 > 4:
                row, column = region.bbox[:2]
                contour = max(find_contours(np.pad(region.image, 1).astype(float), 0.5), key=len)[:, ::-1]
                shapes.append(shapely.Polygon(contour + (x + column - 0.5, y + row - 0.5)))
    return _section(image, mpp, np.array(shapes, dtype=object), np.zeros(len(shapes), np.intp))


def _instances(folder):
    if (folder / "labels.npz").exists():
        content = np.load(folder / "labels.npz")
        number = {Path(str(name)).stem: index for index, name in enumerate(content["names"])}
        stack = content["instances"]
        return lambda file: stack[number[file.stem]].astype(np.int32)

    def read(file):
        names = [folder / "labels" / f"{file.stem}{ending}.png" for ending in ("_label", "")]
        return np.asarray(Image.open(next(name for name in names if name.exists()))).astype(np.int32)

    return read


def _section(image, mpp, outlines, classes):
    every = np.ones(len(outlines), dtype=bool)
    return Section(image, mpp, outlines, classes, outlines, every, every)


def blanked(section, visible):
    """Make the H&E white where `visible`, a function of x and y, um, says no."""
    y, x = ((np.arange(count) + 0.5) * section.mpp for count in section.image.shape[:2])
    image = np.where(visible(x[None, :], y[:, None])[..., None], section.image, np.uint8(WHITE))
    corners, owner = shapely.get_coordinates(section.outlines, return_index=True)
    seen = visible(*(corners * section.mpp).T)
    share = np.bincount(owner, seen) / np.bincount(owner)
    return replace(section, image=image, visible=share >= 0.5, in_place=share == 1)


def folded(section, at, width):
    """Fold the H&E: `width` um from x = `at` on are hidden, what lies beyond is so much nearer, the seam is dark."""
    first, last = (round(value / section.mpp) for value in (at, at + width))
    image = np.concatenate([section.image[:, :first], section.image[:, last:]], axis=1)
    seam = slice(first - (last - first) // 2, first)
    image[:, seam] = image[:, seam] * 0.6
    low, high = shapely.bounds(section.outlines)[:, [0, 2]].T
    shown = shapely.transform(section.outlines, lambda p: p - np.where(p[:, :1] > last, (last - first, 0), 0))
    before = high < seam.start
    return replace(section, image=image, shown=shown, visible=before | (low > last), in_place=before)


def in_margin(section, width):
    """Lay `width` um of glass around the H&E."""
    pad = round(width / section.mpp)
    image = np.pad(section.image, [(pad, pad), (pad, pad), (0, 0)], constant_values=WHITE)
    outlines, shown = (shapely.transform(shapes, lambda p: p + pad) for shapes in (section.outlines, section.shown))
    return replace(section, image=image, outlines=outlines, shown=shown)


def fields(rng, section, sides=(60, 120), apart=60):
    """Centres (n, 2) and radii (n,) of round fields, um, of a diameter from `sides`, with glass between them."""
    step = sides[1] + apart
    edges = [np.arange(step / 2, length - step / 2 + 1, step) for length in section.extent]
    centres = np.stack(np.meshgrid(*edges), axis=-1).reshape(-1, 2)
    return centres + rng.uniform(-apart / 3, apart / 3, centres.shape), rng.uniform(*sides, len(centres)) / 2


def cell_ids(nuclei):
    """Ids (n,) of the cells of segmented nuclei."""
    return np.array([f"cell-{number}" for number in range(len(nuclei))], dtype=object)


def plant(folder, section, *, seed, angle=12.0, shear=0.005, flip=False, bend=None, segmented=None):
    """Write the H&E, the DAPI image of its nuclei, and place these in a turned Xenium frame.

    `bend` gives displacements (n, 2), um, of places (n, 2), um of the Xenium frame; `segmented`, a function of the
    centres (n, 2), um of the H&E, says which nuclei Xenium outlines (the DAPI image shows all); `flip` mirrors the
    section in the Xenium frame.
    """
    rng = np.random.default_rng(seed)
    linear = rotation(angle) @ np.array([[1, shear], [0, 1]]) @ np.diag([1, -1 if flip else 1])
    moved = shapely.transform(section.outlines, lambda points: points * section.mpp @ linear.T)
    bounds = shapely.total_bounds(moved)
    to_um = affine(linear, RIM - bounds[:2]) @ scaling(section.mpp)
    true = shapely.transform(section.outlines, lambda points: apply(to_um, points))
    if bend is not None:
        true = shapely.transform(true, lambda points: points + bend(points))
    frame = bounds[2:] - bounds[:2] + 2 * RIM
    rings = [np.asarray(shape.exterior.coords)[:-1] / PIXEL for shape in true]
    labels = label_image(rings, tuple(np.ceil(frame[::-1] / PIXEL).astype(int)))
    count = len(rings)
    styles = SceneNuclei(section.classes, *(np.zeros((count, 2)),) * 2, np.zeros(count), np.zeros((count, 1, 2)))
    hull = np.asarray(shapely.convex_hull(shapely.multipoints(np.concatenate(rings))).exterior.coords)
    dapi = draw_dapi(rng, styles, labels, hull, PIXEL)
    found = rng.random(count) < FOUND
    if segmented is not None:
        found &= segmented(section.centres)
    jitter = rng.normal(0, NOISE, (count, 2))
    noisy = np.array(
        [shapely.transform(shape, lambda p, by=by: p + by) for shape, by in zip(true, jitter, strict=True)]
    )
    nuclei = shapely.simplify(noisy[found], 0.1)
    outs = folder / "outs"
    (outs / DAPI).parent.mkdir(parents=True)
    write_image(outs / DAPI, dapi, PIXEL)
    (outs / "experiment.xenium").write_text(json.dumps({"pixel_size": PIXEL}))
    corners, owner = shapely.get_coordinates(nuclei, return_index=True)
    table = {"cell_id": cell_ids(nuclei)[owner], "vertex_x": corners[:, 0], "vertex_y": corners[:, 1]}
    pd.DataFrame({**table, "label_id": owner + 1}).to_parquet(outs / "nucleus_boundaries.parquet", index=False)
    return Planted(
        he_path=write_image(folder / "he.tif", section.image, section.mpp),
        mpp=section.mpp,
        outs=outs,
        nuclei=nuclei,
        matrix=scaling(1 / PIXEL) @ to_um,
        true=true,
        shown=section.shown,
        visible=section.visible,
        in_place=section.in_place,
    )
