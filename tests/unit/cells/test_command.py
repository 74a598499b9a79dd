"""The command for one slide: the files of the rules, continued after a break, and one clear line for each mistake."""

import json
import logging
import runpy
import sys

import pandas as pd
import pytest
from PIL import Image
from planted_cells import draw
from small_model import small_model, small_settings

from celldetr.cells import __main__ as command
from celldetr.cells.table import CellFile
from celldetr.config.cells import CellSettings
from celldetr.config.sheets import CellRow
from celldetr.model.weights import save_model
from celldetr.runtime.errors import CellDETRError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write a PNG with dark discs, boxes of the discs, and models."""
    folder = tmp_path_factory.mktemp("command")
    image, boxes, _ = draw(200, 160)
    Image.fromarray(image).save(folder / "my tile.png")
    table = pd.DataFrame(boxes, columns=["x0", "y0", "x1", "y1"])
    table.assign(cell_id=[f"cell {number}" for number in table.index]).to_csv(folder / "mine.csv", index=False)
    for mode in ("parallel", "baseline"):
        extra = {"mpp": 0.5, "patch_size": 64, "trained_on": ["fold1"]}
        save_model(folder / f"{mode}.pt", small_model(mode), small_settings(mode), extra)
    return folder


def call(files, out, *more, model="parallel.pt", mpp="0.5", slide="my tile.png"):
    given = [files / slide, "--model", files / model, "--out", out, *(("--mpp", mpp) if mpp else ()), *more]
    command.main([*map(str, [given[0], "--threads", 1, "--margin-um", 4, *given[1:]])])


def test_given_cells_get_a_type_and_an_embedding_each(files, tmp_path):
    call(files, tmp_path, "--nuclei", files / "mine.csv", "--class-threshold", "0", "--outputs", "h5ad", "geojson")
    cells = CellFile(tmp_path / "my_tile.parquet")
    assert sorted(cells.frame().index) == sorted(pd.read_csv(files / "mine.csv")["cell_id"])
    assert cells.frame()["type"].notna().all()
    assert cells.info.mpp == 0.5
    names = ("geojson.gz", "h5ad", "html", "parquet", "provenance.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"my_tile.{ending}" for ending in names]


def test_the_same_call_finds_nothing_twice_and_another_one_replaces_nothing(files, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(command, "write_cells_page", lambda path, *_, **__: path.touch())
    more = ("--name", "a", "--nucleus-threshold", "0")
    call(files, tmp_path, *more, "--outputs")
    written = (tmp_path / "a.parquet").read_bytes()
    monkeypatch.setattr(command, "find_cells_of_row", pytest.fail)
    call(files, tmp_path, *more, "--outputs", "geojson", "--batch-size", "3")
    assert "a.parquet: its cells are found already" in caplog.text
    assert (tmp_path / "a.geojson.gz").exists()
    with pytest.raises(
        CellDETRError, match=r"a\.parquet: holds cells .* another nucleus_threshold; give another --out"
    ):
        call(files, tmp_path, "--name", "a", "--nucleus-threshold", "0.4")
    assert (tmp_path / "a.parquet").read_bytes() == written


def test_a_break_before_joining_costs_no_second_search(files, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "join_cells", stop)
        with pytest.raises(KeyboardInterrupt):
            call(files, tmp_path, "--nucleus-threshold", "0")
    assert not (tmp_path / "my_tile.parquet").exists()
    monkeypatch.setattr(command, "find_cells_of_row", pytest.fail)
    monkeypatch.setattr(command, "write_cells_page", lambda path, *_, **__: path.touch())
    call(files, tmp_path, "--nucleus-threshold", "0", "--outputs")
    record = json.loads((tmp_path / "my_tile.provenance.json").read_text())
    assert record["counts"]["cells"] == len(CellFile(tmp_path / "my_tile.parquet"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"slide": "none.png"}, "none.png: no such file"),
        ({"model": "none.pt"}, "none.pt: no such file"),
        ({"model": "my tile.png"}, "my tile.png: cannot be read as a PyTorch file"),
        ({"model": "baseline.pt"}, "baseline"),
        ({"mpp": None}, "the file does not state its pixel size"),
        ({"mpp": "half"}, "command line: mpp: got 'half', expected a valid number"),
        ({"more": ("--margin-um", "-1")}, "command line: margin_um: got '-1'"),
        ({"more": ("--outputs", "pdf")}, "command line: outputs: got"),
        ({"more": ("--diameter-um", "8")}, "expected a file in column nuclei"),
        ({"more": ("--name", "../up")}, "command line: slide: got '../up'"),
        ({"more": ("--model-mpp", "0.25")}, "--model-mpp: got 0.25, but"),
        ({"more": ("--nucleus-threshold", "1")}, "no cell"),
    ],
    ids=str,
)
def test_mistakes_are_named_and_nothing_is_written(files, tmp_path, more, message):
    more = dict(more)
    with pytest.raises(CellDETRError) as caught:
        call(files, tmp_path / "out", *more.pop("more", ()), **more)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.glob("out/*") if path.name != ".my_tile.unfinished"] == []


def test_an_error_is_one_line_and_status_1(files, tmp_path, monkeypatch, capsys):
    line = ["celldetr.cells", files / "none.png", "--model", files / "parallel.pt", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [*map(str, line)])
    with pytest.raises(SystemExit) as end:  # Python prints a text that is the status, and the status is 1
        runpy.run_path(command.__file__, run_name="__main__")
    assert end.value.code == f"error: {files / 'none.png'}: no such file"
    assert "".join(capsys.readouterr()) == ""


def test_options_are_the_settings_and_columns_that_matter_to_one_slide():
    """A new setting, or a new column of the sheet, must be an option, or be named here."""
    options = {name for names in command._OPTIONS.values() for name in names}
    assert {*CellSettings.model_fields} - options == {"sheet", "model", "split", "jobs"}
    not_needed = {"slide", "use", "file", "bytes", "sha256", "nuclei_sha256", "licence", "note"}
    assert {*CellRow.model_fields} - options == not_needed


def test_files_of_cells_that_are_gone_do_not_stay_beside_new_ones(files, tmp_path):
    (tmp_path / "my_tile.h5ad").touch()
    with pytest.raises(CellDETRError, match=r"holds my_tile\.h5ad of cells whose file my_tile\.parquet is gone"):
        call(files, tmp_path, "--outputs")
