"""Drawn slides: OpenSlide reads what was planted, and the readers of the pipeline find tissue and nuclei in it."""

import hashlib
from types import SimpleNamespace

import geopandas
import numpy as np
import openslide
import pytest
import shapely

import make_example_slide
from celldetr.example.slide import write_slide
from celldetr.slides.outlines import read_nucleus_file
from celldetr.slides.pyramid import open_pyramid
from celldetr.slides.tissue import tissue_mask

SMALL = {"size_um": (90.0, 70.0), "mpp": 0.5, "rim_um": 30.0}


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slide")
    return write_slide(folder / "slide.tif", folder / "slide.parquet", seed=1, size_um=(300.0, 240.0), mpp=0.5)


@pytest.fixture(scope="module")
def pixels(slide):
    with open_pyramid(slide.image) as image:
        return image.read(0, 0, 0, *slide.size)


@pytest.fixture(scope="module")
def stroke(slide):
    return shapely.LineString(slide.pen).buffer(slide.pen_width / 2)


def colours(image, points):
    columns, rows = points.astype(int).T
    return image[rows, columns].astype(float)


def test_openslide_reads_the_levels_and_the_pixel_size(slide, pixels):
    with openslide.OpenSlide(str(slide.image)) as opened:
        width, height = slide.size
        assert opened.level_dimensions == tuple((width // step, height // step) for step in (1, 4))
        assert float(opened.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(0.5)
        assert float(opened.properties[openslide.PROPERTY_NAME_MPP_Y]) == pytest.approx(0.5)
        assert np.array_equal(np.asarray(opened.read_region((0, 0), 0, opened.dimensions))[..., :3], pixels)
    with open_pyramid(slide.image) as image:
        assert image.mpp == pytest.approx(0.5)


def test_levels_show_the_same_picture(slide, pixels):
    with open_pyramid(slide.image) as image:
        fine = pixels.astype(float)
        for index, level in list(enumerate(image.levels))[1:]:
            step = round(level.downsample)
            cut = fine[: level.height * step, : level.width * step]
            means = cut.reshape(level.height, step, level.width, step, 3).mean(axis=(1, 3))
            coarse = image.read(index, 0, 0, level.width, level.height)
            error = np.abs(coarse - means).mean()
            assert error < 2.5  # of JPEG
            assert np.abs(coarse[:, 1:] - means[:, :-1]).mean() > 2 * error


def test_nuclei_are_dark_and_lie_on_the_tissue_away_from_the_glass(slide, pixels, stroke):
    centres, tissue = slide.nuclei.mean(axis=1), shapely.Polygon(slide.tissue)
    assert len(centres) > 100
    assert shapely.contains_xy(tissue, *centres.T).all()
    marked = shapely.contains_xy(stroke, *centres.T)
    places = np.random.default_rng(0).uniform(0, slide.size, (4000, 2))
    ground = places[shapely.contains_xy(tissue, *places.T)]
    assert colours(pixels, centres[~marked])[:, 0].mean() < colours(pixels, ground)[:, 0].mean() - 30
    rim = np.concatenate([pixels[:20].reshape(-1, 3), pixels[-20:].reshape(-1, 3), pixels[:, :20].reshape(-1, 3)])
    assert rim.min() > 200
    assert np.ptp(rim.mean(axis=0)) < 12


def test_the_pen_is_blue_and_partly_on_the_tissue(slide, pixels, stroke):
    red, _, blue = colours(pixels, slide.pen[5:-5]).T
    assert (blue > red + 40).mean() > 0.95
    on_tissue = stroke.intersection(shapely.Polygon(slide.tissue)).area / stroke.area
    assert 0.1 < on_tissue < 0.6


def test_tissue_is_found_without_glass_and_pen(slide):
    with open_pyramid(slide.image) as image:
        found = tissue_mask(image, slide.mpp)
    rows, columns = np.indices(found.inside.shape).reshape(2, -1)
    middles = (np.stack([columns, rows], axis=1) + 0.5) * found.cell
    got = found.inside.ravel()
    tissue, pen, um = shapely.Polygon(slide.tissue), shapely.LineString(slide.pen), 1 / slide.mpp
    surely = tissue.buffer(-12 * um).difference(pen.buffer(slide.pen_width / 2 + 36 * um))
    maybe = tissue.buffer(12 * um).difference(pen.buffer(slide.pen_width / 2 - 4 * um))
    assert got[shapely.contains_xy(surely, *middles.T)].mean() > 0.9  # the rest is fat and a wide lumen
    assert not got[~shapely.contains_xy(maybe, *middles.T)].any()


def test_outlines_come_back_without_their_classes(slide):
    found = read_nucleus_file(slide.polygons, image_mpp=slide.mpp, mpp=slide.mpp)
    boxes = np.concatenate([slide.nuclei.min(axis=1), slide.nuclei.max(axis=1)], axis=1)
    np.testing.assert_allclose(found.nuclei.boxes, boxes, atol=1e-6)
    assert (found.nuclei.labels == -1).all()
    assert found.dropped["outlines without area"] == slide.invalid["flat"] == 1
    assert found.dropped.total() == slide.invalid["flat"] + slide.invalid["empty"] == 3
    assert found.repaired == slide.invalid["crossed"]
    frame = geopandas.read_parquet(slide.polygons)
    assert frame["class"].tolist()[: len(slide.nuclei)] == slide.classes.tolist()
    assert len(frame) == len(slide.nuclei) + slide.invalid["empty"] + slide.invalid["flat"]
    assert (~frame.geometry.is_valid).sum() == slide.invalid["crossed"] + slide.invalid["flat"]


def test_the_same_arguments_give_the_same_files(tmp_path):
    digests = []
    for name, seed in (("a", 2), ("b", 2), ("c", 3)):
        write_slide(tmp_path / name, tmp_path / f"{name}.parquet", seed=seed, **SMALL)
        files = (tmp_path / name, tmp_path / f"{name}.parquet")
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])
    assert len(list(tmp_path.iterdir())) == 6


def test_the_script_writes_another_slide_for_each_number(tmp_path):
    sizes = []
    for number in (0, 1):
        files = {"slide": f"{number}.tif", "nuclei": f"{number}.parquet", "cells": f"{number}_cells.parquet"}
        output = SimpleNamespace(**{name: str(tmp_path / file) for name, file in files.items()})
        params = SimpleNamespace(size_um=[90.0, 70.0], mpp=0.5, number=number, seed=1)
        make_example_slide.main(SimpleNamespace(params=params, output=output))
        with open_pyramid(output.slide) as image:
            sizes.append((image.size, len(read_nucleus_file(output.nuclei, image_mpp=0.5, mpp=0.5).nuclei)))
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] != sizes[1][1]
