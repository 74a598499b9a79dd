"""Label images as given cells: the outline of each is that of its pixels, and images of another size are refused."""

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image
from skimage.draw import polygon2mask
from slide_files import drawn_slide

from celldetr.cells import label_image
from celldetr.cells.given import read_given_cells
from celldetr.cells.label_image import read_label_image
from celldetr.runtime.errors import InputError
from celldetr.slides import outline_check
from celldetr.slides.outline_check import Keys

MPP = 0.4


def planted():
    """Make labels (70, 90) of all kinds: discs that touch, with a hole, in pieces, corner to corner, of one px."""
    y, x = np.mgrid[:70, :90]
    labels = np.zeros((70, 90), np.uint16)
    for number, (cx, cy, r) in enumerate([(9, 20, 9), (27, 20, 9), (45, 20, 9), (0, 69, 12), (89, 40, 12)], start=1):
        labels[(x - cx) ** 2 + (y - cy) ** 2 <= r**2] = number
    labels[18:22, 44:47] = 0  # a hole
    labels[60:64, 50:54] = labels[40:44, 30:34] = 60_000  # in pieces
    labels[50:52, 60:62] = labels[52:54, 62:64] = 77  # they meet in a corner
    labels[50, 70] = 9
    labels[60:66, 70] = labels[66, 70:76] = labels[60:66, 75] = 8  # a U has two runs in a row
    return labels


def save(path, labels):
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".png":
        Image.fromarray(labels).save(path)
    else:
        tifffile.imwrite(path, labels, **({"tile": (16, 32), "compression": "zlib"} if path.suffix == ".tif" else {}))
    return path


def read(path, size, mpp=MPP, **more):
    return read_label_image(path, size, mpp, **{"nuclei_mpp": None, "most_um": 200.0, "keys": Keys()} | more)


@pytest.mark.parametrize("name", ["a.tif", "a.tiff", "a.npy", "a.png"])
def test_outlines_run_along_the_pixels_of_each_label(tmp_path, monkeypatch, name):
    monkeypatch.setattr(label_image, "_STRIP", 13)
    monkeypatch.setattr(label_image, "_BATCH", 3)
    labels = planted()
    path = save(tmp_path / name, labels)
    y, x = (places.ravel() + 0.5 for places in np.mgrid[:70, :90])
    cells = read(path, (90, 70))
    assert cells.ids.tolist() == [str(value) for value in np.unique(labels)[1:]]
    for name, shape in zip(cells.ids, cells.shapes, strict=True):
        inside = shapely.contains_xy(shape, x, y).reshape(labels.shape)
        np.testing.assert_array_equal(inside, labels == int(name), err_msg=name)
        assert shape.area == inside.sum()
        assert shapely.is_valid(shape)
    assert shapely.get_num_geometries(cells.shapes[-1]) == 2
    larger = read(path, (271, 211), nuclei_mpp=3 * MPP)  # sides that do not divide by 3
    np.testing.assert_allclose(shapely.bounds(larger.shapes), shapely.bounds(cells.shapes) * ([271 / 90, 211 / 70] * 2))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{path}: cannot be read"):
        read(path, (90, 70))


@pytest.mark.parametrize(
    ("slide", "more", "message"),
    [
        (
            (180, 140),
            {},
            r"expected 180 x 140 .*it would fit with --nuclei-mpp 0\.8: one .* is 2 px of the",
        ),
        ((90, 71), {}, r"it would fit with --nuclei-mpp 0\.4"),
        ((70, 90), {}, "x and y swapped"),
        ((90, 400), {}, "in another proportion"),
        ((180, 140), {"nuclei_mpp": 0.5}, r" of 0\.5 um \(nuclei_mpp\), expected 144 x 112 .*nuclei_mpp 0\.8.*\(cells"),
    ],
)
def test_an_image_of_another_size_is_refused_with_what_would_fit(tmp_path, slide, more, message):
    path = save(tmp_path / "a.npy", planted())
    with pytest.raises(InputError, match=f"{path}: got a label image of 90 x 70 px.*{message}"):
        read(path, slide, keys=Keys("cells sheet" if more else ""), **more)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (planted().astype(np.float32), "got float32 of shape"),
        (planted() > 0, "got bool of shape"),
        (np.stack([planted()] * 3, axis=-1), r"got uint16 of shape \(70, 90, 3\)"),
        (np.array({"masks": 1}), "got Python objects, as in the _seg.npy of Cellpose"),
        (planted() * 0, "without a label"),
        (planted().astype(np.int32) - 1, "got negative values"),
        ((planted() > 0).astype(np.uint8) * 255, "labels that reach over more than 20 um: label '255'; give each cell"),
        (np.arange(6300, dtype=np.uint16).reshape(70, 90), "change like those of a picture"),
    ],
)
def test_what_holds_no_labels_is_refused(tmp_path, monkeypatch, labels, message):
    monkeypatch.setattr(label_image, "_MOST_RUNS", 5000)
    with pytest.raises(InputError, match=message):
        read(save(tmp_path / "a.npy", labels), (90, 70), most_um=20.0)


def test_a_label_image_gives_the_cells_of_its_slide(tmp_path, monkeypatch):
    monkeypatch.setattr(outline_check, "_WINDOWS", 3)
    with drawn_slide(tmp_path, MPP) as (image, outlines):
        width, height = image.size
        labels = np.zeros((-(-height // 2), -(-width // 2)), np.int32)
        for number, outline in enumerate(outlines, start=1):
            x0, y0, x1, y1 = (np.array(outline.bounds) / 2).astype(int) + [0, 0, 2, 2]
            corners = shapely.get_coordinates(outline)[:, ::-1] / 2 - [y0, x0] - 0.5
            part = labels[max(y0, 0) : y1, max(x0, 0) : x1]
            part[polygon2mask((y1 - y0, x1 - x0), corners)[-part.shape[0] :, -part.shape[1] :]] = number
        path = save(tmp_path / "labels", labels)
        found = read_given_cells(path, image, name="s", nuclei_mpp=2 * MPP)
        drawn = outlines[found.ids.astype(int) - 1]
        assert len(found) > 0.95 * len(outlines)
        assert np.median(shapely.area(shapely.intersection(drawn, found.outlines)) / shapely.area(drawn)) > 0.85
        save(path, np.roll(labels, 30, axis=1))
        with pytest.raises(InputError, match=r"moved by -(59|60|61), -?[01] px"):
            read_given_cells(path, image, name="s", nuclei_mpp=2 * MPP)
        y, x = np.argwhere(labels)[0]
        mask = np.zeros_like(labels, np.uint8)
        mask[y : y + 99, x : x + 99] = 255  # of a field: smaller than what no cell can be
        save(path, mask)
        with pytest.raises(InputError, match=r"um wide \(median, 1 labels\).*give each nucleus a number of its own"):
            read_given_cells(path, image, name="s", nuclei_mpp=2 * MPP)
        with pytest.raises(InputError, match="label image and --nuclei-unit and --diameter-um; leave"):
            read_given_cells(path, image, name="s", unit="um", diameter_um=7)
        path.write_text("x0,y0,x1,y1\n1,2,3,4\n")
        with pytest.raises(InputError, match="got no label image, and --nuclei-mpp"):
            read_given_cells(path, image, name="s", nuclei_mpp=0.5)
