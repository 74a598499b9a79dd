"""The page about the cells of a slide."""

import base64
import io
import re

import numpy as np
import pyarrow as pa
import pytest
from cell_files import cell_table, write_cells
from named_inputs import files, job_with
from PIL import Image
from slide_files import damage_tiles, write_image

from celldetr.cells.table import STATUSES, CellFile, CellsInfo, cell_schema, embedding_column, named, writer
from celldetr.report import cell_embeddings
from celldetr.report.cell_maps import DrawnCells, choose_fields, view_of
from celldetr.report.cells import write_cells_page
from celldetr.report.style import BANNER
from celldetr.runtime.errors import InputError
from celldetr.runtime.rule import run_rule
from celldetr.slides.pyramid import open_pyramid

CLASSES = ("red one", "blue one")
TISSUE, RED, BLUE, GREEN = (200, 150, 190), (200, 20, 20), (20, 20, 200), (20, 160, 20)


def slide_with(path, size, spots, levels=1, tile=64):
    """Write a slide of (width, height) px with coloured squares: (x, y, side, colour), centres in px."""
    pixels = np.full((size[1], size[0], 3), TISSUE, np.uint8)
    for x, y, side, colour in spots:
        low = np.array([x, y]) - side / 2
        x0, y0, x1, y1 = np.rint([*low, *(low + side)]).astype(int)
        pixels[max(y0, 0) : y1, max(x0, 0) : x1] = colour
    return write_image(path, pixels, levels, tile)


def planted_file(path, centres, scores, *, mpp, size, origin=(0, 0), status=None, side=6.0, embeddings=None, ids=None):
    """Write cells with `centres` (n, 2) um, class scores (n, 2) and a side in um; below 0.4 there is no type."""
    centres, scores = np.asarray(centres, float).reshape(-1, 2), np.asarray(scores, np.float32).reshape(-1, 2)
    count, width = len(centres), 0 if embeddings is None else embeddings.shape[1]
    status = np.zeros(count, np.int8) if status is None else np.asarray(status, np.int8)
    counts = {"detections": 4, "cells with a detection": 1, "detections without a cell": 3} if ids else {}
    counts |= {f"cells {name}": int((status == code).sum()) for code, name in enumerate(STATUSES) if code and ids}
    more = {"areas": {"read_mm2": 0.5}, "counts": counts}
    info = CellsInfo("s", "s.tif", mpp, size, origin, CLASSES, width, ids is not None, **more)
    unread = status > 0
    types = np.where((scores.max(axis=1, initial=0) >= 0.4) & ~unread, scores.argmax(axis=1), -1)
    columns = {"nucleus_score": pa.array(np.full(count, 0.7, np.float32), mask=unread)}
    columns |= {f"score_{name}": pa.array(scores[:, k].copy(), mask=unread) for k, name in enumerate(CLASSES)}
    columns |= {"status": named(status, STATUSES)} | ({} if ids is None else {"cell_id": ids})
    if embeddings is not None:
        columns["embedding"] = embedding_column(embeddings, unread)
    schema = cell_schema(info)
    with writer(path, schema) as file:
        file.write_table(cell_table(schema, info, centres, np.full((count, 2), side), scores, types, **columns))
    return CellFile(path)


def written(tmp_path, cells, slide, **more):
    write_cells_page(tmp_path / "page.html", cells, slide, **{"title": "Cells of s", **more})
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def row(text, name):
    """Texts of the row of a table of the page."""
    [found] = re.findall(rf"<tr><td>(?:<span[^>]*></span>)?{re.escape(name)}</td>(.*?)</tr>", text)
    return re.findall(r"<td[^>]*>(.*?)</td>", found)


def crops(text):
    """Pictures, paths and captions of all galleries in order."""
    figures = re.findall(
        r'<figure style="width:108px">.*?base64,([^"]*)".*?class="case" d="([^"]*)".*?<figcaption>(.*?)</figcaption>',
        text,
        re.DOTALL,
    )
    return [(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), path, words) for data, path, words in figures]


def test_the_page_counts_the_cells_of_each_type(tmp_path):
    info = write_cells(
        tmp_path / "c.parquet", 700, width=0, areas={"tissue_mm2": 0.04, "read_mm2": 0.02}, counts={"tiles damaged": 3}
    )
    cells = CellFile(tmp_path / "c.parquet")
    text = written(tmp_path, cells, slide_with(tmp_path / "s.tif", info.size, []), synthetic=True)
    types = cells.frame()["type"]
    for name in info.classes:
        count = int((types == name).sum())
        assert row(text, name)[:3] == [f"{count:,}", f"{count / 700:.1%}", f"{count / 0.02:,.0f}"]
    assert row(text, "no type")[:2] == ["14", "2.0%"]
    assert row(text, "share of the tissue that was read") == ["50.0%"]
    assert row(text, "tiles damaged") == ["3"]
    assert BANNER in text
    assert "no embeddings in the file" in text
    assert len(text) < 8e6


@pytest.mark.parametrize(("mpp", "origin"), [(0.25, (0, 0)), (0.5, (100, 40))])
def test_galleries_show_the_planted_extremes_in_their_middle(tmp_path, mpp, origin):
    rng = np.random.default_rng(0)
    centres = np.stack(np.meshgrid(np.arange(8) * 15.0 + 13, np.arange(5) * 15.0 + 13), -1).reshape(-1, 2)
    scores = np.stack([rng.uniform(0.5, 0.8, 40), np.zeros(40)], axis=1)
    scores[7], scores[23], scores[31] = (0.93, 0), (0.41, 0), (0, 0.99)
    size = (round(140 / mpp), round(90 / mpp))
    colours = {7: RED, 23: BLUE, 31: GREEN}
    spots = [(*centres[k] / mpp, 6 / mpp, colours.get(k, (90, 60, 120))) for k in range(40)]
    slide = slide_with(tmp_path / "s.tif", size, spots, levels=2)
    text = written(
        tmp_path, planted_file(tmp_path / "c.parquet", centres, scores, mpp=mpp, size=size, origin=origin), slide
    )
    found = crops(text)
    first = [(found[k][2], colour) for k, colour in ((0, RED), (8, BLUE), (16, GREEN))]
    assert [words for words, _ in first] == ["0.93", "0.41", "0.99"]
    for place, colour in ((0, RED), (8, BLUE), (16, GREEN)):
        pixels, path, _ = found[place]
        at = np.array(re.findall(r"[\d.]+ [\d.]+", path), dtype=object)
        x, y = np.array([text.split() for text in at], float).T
        np.testing.assert_allclose([x.min(), y.min(), x.max(), y.max()], [72, 72, 120, 120], atol=0.6)
        inside = pixels[78:114, 78:114].reshape(-1, 3)
        assert np.abs(inside - np.array(colour)).max() < 40  # the box of 6 um holds nothing but the nucleus
        assert np.abs(pixels[60, 96] - np.array(TISSUE)).max() < 40
    assert len(found) == 17


def drawn_at(centres, groups=None):
    centres = np.asarray(centres, float).reshape(-1, 2)
    score, groups = np.ones(len(centres)), np.zeros(len(centres), int) if groups is None else groups
    return DrawnCells(
        np.arange(len(centres)), centres, 8 * score, groups, score, score, (*"ab", "no type"), ("red",) * 3
    )


def test_fields_are_where_types_mix_and_inside_the_slide():
    rng = np.random.default_rng(1)
    pure = rng.uniform(0, 2000, (4000, 2))
    pure = pure[(pure < 1600).any(axis=1)]
    mixed = rng.uniform(1610, 1790, (100, 2))
    dense = rng.uniform(5, 195, (300, 2))
    centres = np.concatenate([pure, mixed, dense])
    groups = np.concatenate([np.zeros(len(pure), int), np.arange(100) % 2, np.zeros(300, int)])
    cells = drawn_at(centres, groups)
    fields = choose_fields(cells, (2000.0, 2000.0))
    assert (np.abs(fields[0].corner + 100 - 1700) < 30).all()
    assert len(fields[0].members) >= 90
    assert fields[1].why == "cells are dense"  # types mix nowhere else
    assert len(fields[1].members) >= 300
    assert [field.letter for field in fields] == list("ABCDE")
    for field in fields:
        assert (field.corner >= 0).all()
        assert (field.corner + field.side <= 2000).all()


def test_a_region_is_shown_alone_and_at_its_place(tmp_path):
    """The map around the cells is that part of the slide; cells that take most of the slide show all of it."""
    pixels = (
        np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    )
    with open_pyramid(write_image(tmp_path / "s.tif", pixels, levels=2)) as image:
        view = view_of(image, drawn_at([(700.0, 300.0), (740.0, 330.0)]), 1.0)
        assert (view.corner < (700, 300)).all()
        assert (view.corner + view.size > (740, 330)).all()
        assert view.size.max() < 200
        low, high = np.rint(view.corner).astype(int), np.rint(view.corner + view.size).astype(int)
        part = pixels[low[1] : high[1], low[0] : high[0]]
        assert np.abs(view.pixels.astype(int) - part[: len(view.pixels), : view.pixels.shape[1]]).mean() < 12
        for centres in ([(10.0, 10.0), (600.0, 30.0)], []):
            whole = view_of(image, drawn_at(centres), 1.0)
            assert (*whole.corner, *whole.size) == (0, 0, 960, 640)


def test_cells_that_were_not_read_are_counted_apart(tmp_path):
    centres = [(20, 20), (40, 40), (-500, 30), (60, 20)]
    cells = planted_file(
        tmp_path / "c.parquet",
        centres,
        [(0.9, 0), (0.1, 0), (np.nan, np.nan), (np.nan, np.nan)],
        mpp=0.25,
        size=(400, 300),
        status=[0, 0, 1, 2],
        embeddings=np.zeros((4, 8), np.float32),
        ids=["<b>&", "b", "c", "d"],
    )
    text = written(tmp_path, cells, slide_with(tmp_path / "s.tif", (400, 300), []))
    assert row(text, "red one")[0] == row(text, "no type")[0] == "1"
    assert "2 of 4 cells of your file were read" in text
    assert row(text, "share of the cells read that have a detection") == ["50.0%"]
    assert row(text, "share of the detections without a cell") == ["75.0%"]
    assert row(text, "cells outside") == row(text, "cells damaged") == ["1"]
    assert "cell &lt;b&gt;&amp;, red one, score 0.90, nucleus score 0.70" in text
    assert [words for _, _, words in crops(text)] == ["0.90", "0.70"]
    assert "no UMAP of 2 cells" in text


@pytest.mark.parametrize("scores", [[], [(0.1, 0.1)]])
def test_a_page_of_no_cell_and_of_one_cell_without_a_type(tmp_path, scores):
    cells = planted_file(tmp_path / "c.parquet", [(30, 20)] * len(scores), scores, mpp=0.25, size=(300, 200))
    text = written(tmp_path, cells, slide_with(tmp_path / "s.tif", (300, 200), []))
    assert row(text, "no type")[0] == str(len(scores))
    assert len(crops(text)) == len(scores)
    assert ("There are no cells." in text) == (not scores)


def test_damaged_parts_are_shown_as_such(tmp_path):
    cells = planted_file(tmp_path / "c.parquet", [(20, 20), (60, 60)], [(0.9, 0), (0.8, 0)], mpp=0.25, size=(512, 512))
    slide = slide_with(tmp_path / "s.tif", (512, 512), [(80, 80, 24, RED), (240, 240, 24, BLUE)])
    with pytest.raises(InputError, match="got a slide of 512 x 512 px"):
        written(tmp_path, planted_file(tmp_path / "d.parquet", [], [], mpp=0.25, size=(300, 512)), slide)
    pixels = np.asarray(Image.open(slide))
    damage_tiles(write_image(slide, pixels, tile=64, compression="zlib"), [(0, 9)])
    found = crops(written(tmp_path, cells, slide))
    assert [words for _, _, words in found] == ["0.90 (part cannot be decoded)", "0.80"]
    assert np.abs(found[1][0][96, 96] - np.array(BLUE)).max() < 40
    assert (found[0][0][96:120, 96:120] > 240).all()


def test_a_slide_that_cannot_be_opened(tmp_path):
    (tmp_path / "s.tif").write_bytes(b"not a slide")
    cells = planted_file(tmp_path / "c.parquet", [], [], mpp=0.25, size=(512, 512))
    assert "cannot be opened, so there are no pictures" in written(tmp_path, cells, tmp_path / "s.tif")
    job = job_with(tmp_path, "file", input=files(file=tmp_path / "s.tif"))
    run_rule(lambda _: written(tmp_path, cells, tmp_path / "s.tif"), job)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "found on my/file (" in page
    assert "my/file: " in page
    assert "s.tif" not in page
    cells = planted_file(tmp_path / "d.parquet", [(20, 20)], [(0.9, 0)], mpp=0.25, size=(512, 512))
    with pytest.raises(InputError, match="cannot be read as TIFF"):
        written(tmp_path, cells, tmp_path / "s.tif")


def test_the_umap_is_of_a_sample_of_whole_embeddings(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(cell_embeddings, "SAMPLED", 100)
    monkeypatch.setattr(
        cell_embeddings, "umap_points", lambda embeddings, seed: taken.append(embeddings) or embeddings[:, :2]
    )
    centres = np.random.default_rng(0).uniform(0, 70, (400, 2))
    embeddings = np.arange(400, dtype=np.float32)[:, None].repeat(4, axis=1)
    status = (np.arange(400) % 4 == 0) * 2
    cells = planted_file(
        tmp_path / "c.parquet",
        centres,
        [(0.9, 0)] * 400,
        mpp=0.25,
        size=(300, 300),
        status=status,
        embeddings=embeddings,
    )
    slide = slide_with(tmp_path / "s.tif", (300, 300), [])
    assert "100 cells, drawn from 300" in written(tmp_path, cells, slide)
    written(tmp_path, cells, slide)
    assert taken[0].shape == (100, 4)
    assert (taken[0][:, 0] % 4 != 0).all()
    assert len(np.unique(taken[0][:, 0])) == 100
    np.testing.assert_array_equal(*taken)


@pytest.mark.slow
def test_the_umap_separates_planted_types():
    rng = np.random.default_rng(0)
    groups = np.arange(120) % 3
    points = cell_embeddings.umap_points(rng.normal(size=(120, 16)) + 12 * np.eye(3, 16)[groups], seed=0)
    middles = np.stack([points[groups == group].mean(axis=0) for group in range(3)])
    nearest = np.linalg.norm(points[:, None] - middles, axis=2).argmin(axis=1)
    assert (nearest == groups).all()
