"""Given cells, regions, damage and slides without cells: nothing is added or lost, and what is wrong is said."""

import numpy as np
import pytest
import shapely
import torch
from planted_cells import CLASSES, WHITE, Planted, boxes_of, cells_of, draw, find, in_order
from slide_files import damage_tiles, write_image
from small_model import read_batch, small_model, small_settings

from celldetr.cells.find import FindSettings, Slide
from celldetr.cells.given import GivenCells
from celldetr.cells.given_tiles import GivenTiles
from celldetr.cells.model import CellModel
from celldetr.cells.nuclei import find_nuclei
from celldetr.cells.table import CellFile, NothingFound
from celldetr.cells.tiling import Tiles, Tiling
from celldetr.model.celldetr import CellDETR, Detections
from celldetr.model.weights import save_model
from celldetr.runtime.errors import InputError
from celldetr.slides.cutting import read_patch
from celldetr.slides.outlines import read_nucleus_file
from celldetr.slides.pyramid import open_pyramid


def cells_at(boxes):
    boxes = np.asarray(boxes, float)
    return GivenCells(np.array([f"cell {k}" for k in range(len(boxes))], object), shapely.box(*boxes.T))


def columns(cells):
    """Table of the cells by id, with their embeddings and outlines."""
    frame = cells.frame()
    frame["embedding"] = list(np.concatenate(list(cells.embeddings())))
    frame["outline"] = np.concatenate(list(cells.outlines()))
    return frame


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_given_cell_has_one_row_with_its_type(slide, tmp_path, jobs):
    path, truth, labels = slide
    order = np.random.default_rng(0).permutation(len(truth))
    strange = [
        [-40, 5, -30, 15],  # outside of the slide
        [400, 400, 410, 410],
        [-8, 20, 2, 30],  # the centre is outside
        [325, 280, 345, 300],
        [28, 28, 36, 36],  # its centre, 32, 32, is on the corner of cores
        [100, 100, 300, 280],  # larger than a tile
        [0, 0, 331, 287],
        [60, 60, 60.5, 60.5],  # smaller than a pixel
        truth[3],  # twice
    ]
    given = cells_at(np.concatenate([truth[order], strange]))
    cells = cells_of(path, tmp_path, given=given, jobs=jobs, margin_um=16)
    frame = columns(cells)
    assert sorted(frame.index) == sorted(given.ids)
    frame = frame.loc[given.ids]
    assert shapely.equals_exact(frame["outline"].to_numpy(), given.outlines).all()
    mine = frame.iloc[: len(truth)]
    assert mine["type"].tolist() == [CLASSES[label] for label in labels[order]]
    assert mine["nucleus_score"].between(0.5, 1).all()
    assert (mine["status"] == "read").all()
    outside = frame["status"] == "outside"
    assert np.flatnonzero(outside).tolist() == [len(truth), len(truth) + 1]
    assert frame.loc[outside, ["nucleus_score", "score_a", "edge_um", "type"]].isna().all(axis=None)
    assert np.isnan(np.stack(frame.loc[outside, "embedding"].to_list())).all()
    assert (frame.loc[outside, "tile"] == -1).all()
    assert np.isfinite(np.stack(frame.loc[~outside, "embedding"].to_list())).all()
    assert frame["border"].iloc[len(truth) + 5]
    counts = cells.info.counts
    assert (counts["cells"], counts["cells outside"], counts["cells damaged"]) == (len(given), 2, 0)
    assert counts["detections"] == len(truth)
    assert counts["cells with a detection"] == frame["nucleus_score"].notna().sum() >= len(truth)
    assert counts["detections without a cell"] == 0


class Twice(Planted):
    """Finds each nucleus twice, the second time nearer, with a higher score."""

    def detect(self, features):
        logits, boxes = super().detect(features)
        beside = boxes + torch.tensor([0.5, 0.5, 0, 0]) / features.memory.shape[-1]
        return Detections(torch.cat([logits.clamp(max=5) - 0.1, logits], 2), torch.cat([beside, boxes], 2))


def test_a_nucleus_that_a_tile_finds_twice_is_one_cell_and_one_detection(slide, tmp_path):
    path, truth, _ = slide
    found = cells_of(path, tmp_path / "found", net=Twice(), margin_um=16)
    np.testing.assert_allclose(boxes_of(found), in_order(truth), atol=1e-9)
    counts = cells_of(path, tmp_path / "given", net=Twice(), given=cells_at(truth), margin_um=16).info.counts
    assert counts["detections"] == counts["cells with a detection"] == len(truth)
    assert counts["detections without a cell"] == 0


def test_agreement_tells_cells_without_a_detection_and_detections_without_a_cell(slide, tmp_path):
    path, truth, _ = slide
    between = truth[:10] + 11.0
    cells = cells_of(path, tmp_path, given=cells_at(np.concatenate([truth[30:], between])), margin_um=16)
    frame = cells.frame()
    assert frame["nucleus_score"].isna().sum() == 10
    counts = cells.info.counts
    assert counts["cells with a detection"] == len(truth) - 30
    assert counts["detections without a cell"] <= 30
    assert counts["detections"] - counts["detections without a cell"] == len(truth) - 30


def test_an_embedding_is_that_of_the_box_in_its_tile_among_its_neighbours(tmp_path):
    """By a real model: a cell at a tile's edge is embedded in the tile where its centre lies in the core."""
    image, truth, _ = draw(120, 130)
    path = write_image(tmp_path / "slide.tif", image)
    model, given = small_model("parallel", classes=CLASSES, tokens=2), cells_at(truth)
    cells = cells_of(path, tmp_path, net=model, given=given, margin_um=16, nucleus_threshold=0.0)
    frame = columns(cells).loc[given.ids]
    tiles = Tiles.over(Tiling(64, 1.0, 16), (120, 130), 1.0)
    placed = GivenTiles(given, tiles, np.ones(len(given), bool))
    done = 0
    with open_pyramid(path, 1.0) as image:
        for number, corner in enumerate(placed.tiles.corners):
            shown = placed.shown([number])[0]
            pixels = read_patch(image, placed.tiles.grid(number, number + 1), *corner.tolist())
            expected = read_batch(model, pixels[None], given=[shown.boxes])[1].embeddings[shown.own]
            own = frame.iloc[shown.cells[shown.own]]
            np.testing.assert_allclose(np.stack(own["embedding"].to_list()), expected, atol=1e-4)
            assert (own["tile"] == number).all()
            done += len(own)
    assert done == len(given)


def test_damaged_tiles_stop_or_are_left_out_and_counted(tmp_path, caplog):
    image, truth, _ = draw(512, 256)
    path = write_image(tmp_path / "slide.tif", image, levels=4, compression="deflate")
    damage_tiles(path, [(0, 0)])
    with pytest.raises(InputError, match=r"slide\.tif.*row 0, column 0"):
        find(path, tmp_path / "1", margin_um=14.0)
    assert not (tmp_path / "1").exists()
    options = {"margin_um": 14.0, "batch_size": 3, "workers": 2, "on_damage": "skip"}
    cells = cells_of(path, tmp_path / "found", **options)
    assert (cells.info.counts["tiles"], cells.info.counts["tiles damaged"]) == (15 * 8 - 9, 9)
    assert caplog.text.count("left out") == 9
    found, far = boxes_of(cells), truth[(truth[:, :2] > 108).any(axis=1)]  # outside of the cores of those tiles
    assert {tuple(box) for box in far.round(6)} <= {tuple(box) for box in found.round(6)}
    given = cells_at(truth)
    frame = cells_of(path, tmp_path / "given", given=given, **options).frame().loc[given.ids]
    lost = (((truth[:, :2] + truth[:, 2:]) / 2) < 108).all(axis=1)
    assert (frame["status"] == np.where(lost, "damaged", "read")).all()
    assert frame.loc[lost, ["nucleus_score", "score_a", "type"]].isna().all(axis=None)
    assert frame.loc[~lost, "type"].notna().all()


def test_only_cells_in_the_region_count(slide, tmp_path, caplog):
    path, truth, _ = slide
    region = np.array([shapely.box(100, 90, 180, 150), shapely.Point(250, 200).buffer(30)])
    centres = (truth[:, :2] + truth[:, 2:]) / 2
    inside = shapely.intersects_xy(shapely.union_all(region), *centres.T)
    net = Planted()
    cells = cells_of(path, tmp_path / "found", net=net, region=region)
    np.testing.assert_allclose(boxes_of(cells), in_order(truth[inside]), atol=1e-9)
    assert len(net.seen) == cells.info.counts["tiles"] < 40
    given = cells_at(truth)
    cells = cells_of(path, tmp_path / "given", given=given, region=region)
    assert set(cells.frame().index) == set(given.ids[inside])
    assert f"{(~inside).sum()} of {len(given)} given cells lie outside of the region" in caplog.text
    with pytest.raises(InputError, match=r"got 1 cells .*expected some on the region"):
        find(path, tmp_path / "away", region=region, given=cells_at(truth[~inside][:1]))
    assert not any(tmp_path.glob(".*unfinished"))


def test_glass_is_not_looked_at(tmp_path):
    image, truth, _ = draw(800, 400)
    image[:, 400:] = WHITE
    path = write_image(tmp_path / "slide.tif", image)
    net = Planted()
    cells = cells_of(path, tmp_path, net=net, mpp=2.0, slide_mpp=2.0, margin_um=28.0)
    left = truth[truth[:, 2] <= 395]
    found = boxes_of(cells)
    np.testing.assert_allclose(found[found[:, 2] < 395], in_order(left[left[:, 2] < 395]), atol=1e-9)
    assert not any((tile == WHITE).all() for tile in net.seen)
    areas = cells.info.areas
    assert areas["read_mm2"] == pytest.approx(areas["tissue_mm2"], rel=0.01)
    assert areas["tissue_mm2"] == pytest.approx(areas["slide_mm2"] / 2, rel=0.05)
    with pytest.raises(NothingFound, match="no tissue was found in the region"):
        find(path, tmp_path / "glass", mpp=2.0, slide_mpp=2.0, region=np.array([shapely.box(600, 0, 700, 100)]))


def test_places_are_px_of_level_0(tmp_path):
    image, truth, _ = draw(200, 200)
    path = write_image(tmp_path / "slide.tif", image.repeat(2, axis=0).repeat(2, axis=1))
    cells = cells_of(path, tmp_path, slide_mpp=0.5)
    assert np.abs(boxes_of(cells) - in_order(truth * 2)).max() <= 2  # a px of the tiles
    given = cells_at(truth * 2)
    frame = cells_of(path, tmp_path / "given", slide_mpp=0.5, given=given).frame().loc[given.ids]
    np.testing.assert_allclose(frame["x_um"], (truth[:, 0] + truth[:, 2]) / 2)
    assert frame["nucleus_score"].notna().all()


def test_models_that_cannot_do_it_are_refused_before_anything_is_read(tmp_path):
    for mode, classes, said in (("baseline", CLASSES, "mode baseline"), ("parallel", (), "without classes")):
        with pytest.raises(InputError, match=rf"planted\.pt: got a model .*{said}|planted\.pt: got a model {said}"):
            find(tmp_path / "none.tif", tmp_path / "1", net=small_model(mode, classes=classes))
    assert list(tmp_path.iterdir()) == []
    settings = small_settings("parallel")
    save_model(tmp_path / "m.pt", CellDETR(settings), settings, {"mpp": 0.25, "patch_size": 64, "trained_on": ["a"]})
    model = CellModel.load(tmp_path / "m.pt", trained_on=["b"])
    assert (model.mpp, model.size, model.source["trained_on"]) == (0.25, 64, ["a", "b"])
    assert CellModel.load(tmp_path / "m.pt", mpp=0.5, size=256).size == 64  # its file goes before the configuration
    save_model(tmp_path / "m.pt", CellDETR(settings), settings)
    with pytest.raises(InputError, match=r"m\.pt: does not say the size of its patches"):
        CellModel.load(tmp_path / "m.pt", mpp=0.25)
    assert CellModel.load(tmp_path / "m.pt", mpp=0.25, size=64).source["trained_on"] is None
    for first, second in (("a/b", "a_b"), ("T", "t"), ("x", "x")):
        content = torch.load(tmp_path / "m.pt")
        content["settings"]["classes"] = [first, "b", second]
        torch.save(content, tmp_path / "same.pt")
        with pytest.raises(InputError, match=rf"same\.pt: .*classes: got \['{first}', '{second}'\], which"):
            CellModel.load(tmp_path / "same.pt", mpp=0.25, size=64)


def test_no_cell_at_all_is_said_and_leaves_no_file(tmp_path):
    path = write_image(tmp_path / "slide.tif", np.full((300, 300, 3), (225, 170, 205)))
    with pytest.raises(NothingFound, match=r"s: no cell was found in \d+ tiles: .*Lower nucleus_threshold"):
        cells_of(path, tmp_path)
    assert not (tmp_path / "cells.parquet").exists()
    blank = write_image(tmp_path / "blank.tif", np.full((300, 300, 3), 245))
    with pytest.raises(NothingFound, match="no tissue was found on it"):
        find(blank, tmp_path / "blank")


def test_a_model_has_seen_a_slide_if_it_has_seen_its_group(slide, tmp_path):
    for group, seen in (("seen", True), ("part", True), ("par", False), ("", None)):
        assert cells_of(slide[0], tmp_path / f"g{group}", group=group).info.model["seen"] is seen


def test_nuclei_for_pretraining_are_found_by_any_model(slide, tmp_path, caplog):
    def nuclei(path, net, on_damage="skip", threshold=0.4):
        settings = FindSettings(16.0, threshold, 4, on_damage, embeddings=None)
        return find_nuclei(Slide("s", path, 1.0), CellModel(net, 1.0, 64), tmp_path / "n.parquet", settings)

    assert nuclei(slide[0], Planted()) == len(slide[1])
    found = read_nucleus_file(tmp_path / "n.parquet", image_mpp=1.0, mpp=1.0)
    np.testing.assert_allclose(in_order(found.nuclei.boxes), in_order(slide[1]))
    info = CellFile(tmp_path / "n.parquet").info
    assert (info.width, info.classes) == (0, ())
    for mode in ("baseline", "parallel"):
        assert nuclei(slide[0], small_model(mode, classes=CLASSES if mode == "baseline" else ()), threshold=0.0) > 0
    blank = write_image(tmp_path / "blank.tif", np.full((300, 300, 3), 245))
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0")
    for path in (blank, broken):
        assert nuclei(path, Planted()) == 0
        assert len(read_nucleus_file(tmp_path / "n.parquet", image_mpp=1.0, mpp=1.0).nuclei) == 0
        assert "no nuclei" in caplog.text
    with pytest.raises(InputError, match=r"broken\.tif"):
        nuclei(broken, Planted(), "stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank.tif", "broken.tif", "n.parquet"]


def test_a_diverged_model_is_an_error(slide, tmp_path):
    net = small_model("parallel", classes=CLASSES)
    net.level_embed.data.fill_(float("nan"))
    for options in ({}, {"given": cells_at(slide[1])}):
        with pytest.raises(InputError, match="not finite"):
            find(slide[0], tmp_path / "1", net=net, **options)
