"""Cells of a slide: every planted nucleus once, whatever the tiles and jobs; and what a killed job leaves."""

import errno
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_cells import CLASSES, Planted, boxes_of, cells_of, draw, find
from slide_files import write_image

from celldetr.cells import parts
from celldetr.cells.join import join_cells
from celldetr.cells.table import CellFile
from celldetr.runtime.errors import InputError
from celldetr.slides.tissue import Raster


@settings(max_examples=10, deadline=None)
@given(st.integers(40, 200), st.integers(12, 19), st.integers(1, 5), st.integers(1, 2), st.integers(1, 4))
def test_each_nucleus_is_found_once_whatever_the_tiles(slide, tmp_path_factory, size, margin, batch, workers, jobs):
    path, truth, labels = slide
    folder = tmp_path_factory.mktemp("cells")
    cells = cells_of(path, folder, size=size, margin_um=margin, batch_size=batch, workers=workers, jobs=jobs)
    bounds = shapely.bounds(np.concatenate(list(cells.outlines()))).round(4)
    order, expected = np.lexsort(bounds.T[:2]), np.lexsort(truth.T[:2])
    np.testing.assert_array_equal(bounds[order], truth[expected])
    np.testing.assert_allclose(boxes_of(cells), truth[expected], atol=1e-9)
    frame = cells.frame()
    assert frame["type"].iloc[order].tolist() == [CLASSES[label] for label in labels[expected]]
    embeddings = np.concatenate(list(cells.embeddings()))[order]
    np.testing.assert_allclose(embeddings[:, 0] * 255, 20 + 40 * labels[expected], atol=1e-4)
    assert frame.index.tolist() == [str(number + 1) for number in range(len(truth))]
    assert not (frame["border"] & (frame["edge_um"] > 10)).any()


def rows(cells):
    """All rows, with what they hold."""
    return [row for batch in cells.batches() for row in batch.to_pylist()]


def test_jobs_share_a_slide_and_give_the_same_file(slide, tmp_path, monkeypatch):
    monkeypatch.setattr("celldetr.cells.find._UNIT", 16)
    whole = cells_of(slide[0], tmp_path / "one")
    for jobs in (3, 9):  # more than there are batches: some jobs have nothing to do
        shared = cells_of(slide[0], tmp_path / str(jobs), jobs=jobs)
        assert rows(shared) == rows(whole)
        assert shared.info.counts == whole.info.counts
        assert shared.info.areas == pytest.approx(whole.info.areas)


def test_another_class_threshold_needs_no_search(slide, tmp_path):
    """Types come when parts are joined: a class whose scores reach the threshold, or none."""
    find(slide[0], tmp_path / "1")
    for threshold in (0.0, 0.9, 1.0):
        join_cells([tmp_path / "1"], tmp_path / "cells.parquet", class_threshold=threshold)
        cells = CellFile(tmp_path / "cells.parquet")
        frame, scores = cells.frame(), cells.frame([f"score_{name}" for name in CLASSES])
        assert cells.info.settings["class_threshold"] == threshold
        assert (frame["type"].isna() == (scores.max(axis=1) < np.float32(threshold)).to_numpy()).all()
        assert frame["type"].notna().all() == (threshold < 1)


class Unsteady(Planted):
    """Embeddings, and with them class scores, depend on the rest of the tile, too."""

    def represent(self, features, boxes, valid):
        return super().represent(features, boxes, valid) * features.memory.mean(dim=(1, 2, 3))[:, None, None]


def test_tiles_that_have_found_a_nucleus_share_its_scores_but_not_its_embedding(slide, tmp_path, monkeypatch):
    monkeypatch.setattr("celldetr.cells.join.ROWS", 7)
    find(slide[0], tmp_path / "1", net=Unsteady())
    join_cells([tmp_path / "1"], tmp_path / "cells.parquet")
    parts = pd.concat([pd.read_parquet(path) for path in sorted((tmp_path / "1").glob("*.parquet"))])
    parts = parts.sort_values("edge_um", kind="stable").reset_index(drop=True)
    names, weight = [f"score_{name}" for name in CLASSES], parts["edge_um"]
    nucleus = parts.groupby("geometry")
    means = parts[names].mul(weight, axis=0).groupby(parts["geometry"]).sum().div(nucleus["edge_um"].sum(), axis=0)
    cells = pd.read_parquet(tmp_path / "cells.parquet").set_index("geometry")
    np.testing.assert_allclose(cells[names], means.loc[cells.index], rtol=1e-6)
    deepest = nucleus["embedding"].last()[cells.index]
    np.testing.assert_allclose(np.stack(cells["embedding"]), np.stack(deepest), rtol=1e-6)
    spread = nucleus["score_a"].max() / nucleus["score_a"].min()
    assert (spread > 1.001).sum() > 20
    assert (nucleus.size() > 2).any()


class Killed(BaseException):
    pass


class Dying(Planted):
    """Fails at its `last` batch."""

    def __init__(self, last):
        super().__init__()
        self.left = last

    def encode(self, pixels):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().encode(pixels)


def test_a_killed_job_goes_on_from_what_it_has_written(slide, tmp_path, monkeypatch):
    monkeypatch.setattr("celldetr.cells.parts.TILES", 8)  # two batches
    whole = cells_of(slide[0], tmp_path / "whole")
    tiles, out = whole.info.counts["tiles"], tmp_path / "1"
    for _ in range(2):
        with pytest.raises(Killed):
            find(slide[0], out, net=Dying(5))  # two parts of two batches, and one batch that is lost
    assert not out.exists()
    assert sorted(path.name for path in (tmp_path / ".1.unfinished").glob("*.parquet")) == [
        f"{start:09d}.parquet" for start in range(0, 32, 8)
    ]
    net = Planted()
    find(slide[0], out, net=net, batch_size=8)  # as after a lack of memory
    assert len(net.seen) == tiles - 32
    join_cells([out], tmp_path / "cells.parquet")
    cells = CellFile(tmp_path / "cells.parquet")
    assert rows(cells) == rows(whole)
    assert cells.info.counts == whole.info.counts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "cells.parquet", "whole"]

    net = Planted()
    find(slide[0], out, net=net, batch_size=3)  # complete: nothing is read again
    assert net.seen == []


@pytest.mark.parametrize("change", [{"nucleus_threshold": 0.5}, {"identity": {"code": "b"}}, {"margin_um": 15.0}])
def test_parts_of_other_settings_are_not_used(slide, tmp_path, monkeypatch, change):
    monkeypatch.setattr("celldetr.cells.parts.TILES", 8)
    with pytest.raises(Killed):
        find(slide[0], tmp_path / "1", net=Dying(5), identity={"code": "a"})
    net = Planted()
    find(slide[0], tmp_path / "1", net=net, **{"identity": {"code": "a"}, **change})
    cells = cells_of(slide[0], tmp_path / "other", **change)
    assert len(net.seen) == cells.info.counts["tiles"]


def test_a_part_that_is_damaged_is_made_again(slide, tmp_path, monkeypatch):
    monkeypatch.setattr("celldetr.cells.parts.TILES", 8)
    with pytest.raises(Killed):
        find(slide[0], tmp_path / "1", net=Dying(7))
    part = tmp_path / ".1.unfinished" / f"{8:09d}.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    net = Planted()
    find(slide[0], tmp_path / "1", net=net)
    join_cells([tmp_path / "1"], tmp_path / "cells.parquet")
    assert rows(CellFile(tmp_path / "cells.parquet")) == rows(cells_of(slide[0], tmp_path / "whole"))


def test_only_all_jobs_of_one_slide_are_joined(slide, tmp_path):
    for number in (1, 2):
        find(slide[0], tmp_path / f"two{number}", job=(number, 2))
        find(slide[0], tmp_path / f"other{number}", job=(number, 2), nucleus_threshold=0.6)
    find(slide[0], tmp_path / "three1", job=(1, 3))

    def join(*names):
        join_cells([tmp_path / name for name in names], tmp_path / "cells.parquet")

    for names in (("two1",), ("two1", "two1"), ("two1", "three1"), ()):
        with pytest.raises(InputError, match="expected each job of one slide once"):
            join(*names)
    with pytest.raises(InputError, match="other2: differs from .*two1 in settings"):
        join("two1", "other2")
    with pytest.raises(InputError, match=r"nowhere: got no summary\.json"):
        join("two1", "nowhere")
    next((tmp_path / "two2").glob("*.parquet")).unlink()
    with pytest.raises(InputError, match="two2: got parts up to tile .*, expected"):
        join("two1", "two2")
    assert not (tmp_path / "cells.parquet").exists()


def test_a_full_disk_leaves_no_gap_in_the_parts(slide, tmp_path, monkeypatch):
    monkeypatch.setattr("celldetr.cells.parts.TILES", 8)
    calls, write = [], parts.writer

    def full(path, schema):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, schema)

    monkeypatch.setattr("celldetr.cells.parts.writer", full)
    with pytest.raises(OSError, match="No space left"):
        find(slide[0], tmp_path / "1")
    assert len(calls) == 2
    find(slide[0], tmp_path / "1")
    join_cells([tmp_path / "1"], tmp_path / "cells.parquet")
    assert rows(CellFile(tmp_path / "cells.parquet")) == rows(cells_of(slide[0], tmp_path / "whole"))


def test_few_rows_are_held_at_a_time(slide, tmp_path, monkeypatch):
    """Parts end when they have many rows; a join holds no more than two groups of them."""
    whole = cells_of(slide[0], tmp_path / "whole")
    for name in ("parts.ROWS", "join.ROWS"):
        monkeypatch.setattr(f"celldetr.cells.{name}", 8)
    monkeypatch.setattr("celldetr.cells.parts.MOST_ROWS", 20)
    held, concat = [], pa.concat_tables

    def counted(tables):
        table = concat(tables)
        held.append(len(table))
        return table

    monkeypatch.setattr(pa, "concat_tables", counted)
    find(slide[0], tmp_path / "1")
    assert max(held) < 20 + 4 * 25  # and the last batch
    held.clear()
    join_cells([tmp_path / "1"], tmp_path / "cells.parquet")
    assert max(held) <= 16
    assert rows(CellFile(tmp_path / "cells.parquet")) == rows(whole)


def test_a_slide_with_coarser_pixels_than_the_model_knows_is_said_to_be_so(slide, tmp_path, caplog):
    for place, slide_mpp in (("same", 1.0), ("coarse", 2.0)):
        caplog.clear()
        cells_of(slide[0], tmp_path / place, size=128, slide_mpp=slide_mpp)
        assert ("pixels of 2 um are enlarged to the 1 um" in caplog.text) == (place == "coarse")


@pytest.mark.parametrize("other", ["another slide", "another job", "another place"])
def test_a_part_that_is_not_of_its_job_is_refused(slide, tmp_path, monkeypatch, other):
    monkeypatch.setattr("celldetr.cells.parts.TILES", 8)
    monkeypatch.setattr("celldetr.cells.find._UNIT", 8)
    image = draw(331, 287, seed=1)[0]
    for number in (1, 2):
        find(slide[0], tmp_path / f"{number}", job=(number, 2))
    find(write_image(tmp_path / "other.tif", image), tmp_path / "other", job=(1, 2))
    last = max((tmp_path / "2").glob("0*.parquet"))
    source = {"another slide": tmp_path / "other" / f"{8:09d}.parquet", "another job": last}
    shutil.copy(source.get(other, tmp_path / "1" / f"{0:09d}.parquet"), tmp_path / "1" / f"{8:09d}.parquet")
    with pytest.raises(InputError, match="of another slide|got parts up to tile 8"):
        join_cells([tmp_path / "1", tmp_path / "2"], tmp_path / "cells.parquet")


def test_jobs_that_have_planned_other_tiles_are_not_joined(slide, tmp_path):
    find(slide[0], tmp_path / "1", job=(1, 2))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("celldetr.cells.plan.tissue_mask", lambda *_: Raster(np.eye(42, dtype=bool)[:36], 8, 8))
        find(slide[0], tmp_path / "2", job=(2, 2))
    with pytest.raises(InputError, match="differs from .* in tiles"):
        join_cells([tmp_path / "1", tmp_path / "2"], tmp_path / "cells.parquet")


def test_areas_are_those_on_the_slide_and_in_the_region(slide, tmp_path):
    areas = cells_of(slide[0], tmp_path / "whole").info.areas  # a map of its tissue ends in whole cells
    assert [areas["tissue_mm2"], areas["read_mm2"]] == pytest.approx([areas["slide_mm2"]] * 2)
    region = np.array([shapely.Point(150, 140).buffer(60), shapely.box(150, 140, 260, 200)], object)
    cells = cells_of(slide[0], tmp_path / "region", region=region)
    assert cells.info.areas["read_mm2"] == pytest.approx(shapely.union_all(region).area / 1e6)


def test_embeddings_that_float16_cannot_hold_are_refused(slide, tmp_path, monkeypatch):
    represent = Planted.represent
    monkeypatch.setattr(Planted, "represent", lambda *given: represent(*given) * 1e6)
    with pytest.raises(InputError, match=r"values up to 7.55e\+05, which float16 cannot hold; set"):
        find(slide[0], tmp_path / "1", embeddings="float16")
