"""The command for one slide: the files of the rules, continued after a break, and one clear line for each mistake."""

import json
import logging
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image
from planted_cells import draw
from small_model import small_model, small_settings

from celldetr.cells import __main__ as command
from celldetr.cells import find, one_slide
from celldetr.cells.table import CellFile
from celldetr.config.cells import CellSettings
from celldetr.config.sheets import CELLS_DEPEND_ON, CellRow
from celldetr.model.weights import save_model
from celldetr.runtime.errors import CellDETRError

ROOT = Path(__file__).parents[3]


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
    monkeypatch.setattr(command, "_write", lambda *_: None)
    more = ("--name", "a", "--nucleus-threshold", "0")
    call(files, tmp_path, *more)
    written = (tmp_path / "a.parquet").read_bytes()
    monkeypatch.setattr(one_slide, "find_cells_of_row", pytest.fail)
    call(files, tmp_path, *more, "--batch-size", "3")
    assert "a.parquet: its cells are found already" in caplog.text
    for other, change in {
        "nucleus_threshold": ("--nucleus-threshold", "0.4"),
        "class_threshold": ("--class-threshold", "0.3"),
        "mpp": ("--mpp", "0.4"),
        "group": ("--group", "a"),
        "given, settings": ("--nuclei", files / "mine.csv", "--margin-um", "3"),
    }.items():
        named = other.replace("settings", "margin_um")
        with pytest.raises(CellDETRError, match=rf"a\.parquet: holds cells .* another {named}; give another --out"):
            call(files, tmp_path, *more, *change)
    (tmp_path / "a.provenance.json").unlink()
    with pytest.raises(CellDETRError, match=r"a\.parquet: nothing beside it says how its cells were found"):
        call(files, tmp_path, *more)
    assert (tmp_path / "a.parquet").read_bytes() == written


def test_a_break_before_joining_costs_no_second_search(files, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    for name in ("join_cells", "write_json"):  # before the file of cells is there, and before its record is
        with monkeypatch.context() as patched:
            patched.setattr(one_slide, name, stop)
            with pytest.raises(KeyboardInterrupt):
                call(files, tmp_path, "--nucleus-threshold", "0")
        assert (tmp_path / "my_tile.parquet").exists() == (name == "write_json")
        monkeypatch.setattr(find, "_Reading", pytest.fail)
    monkeypatch.setattr(command, "_write", lambda *_: None)
    call(files, tmp_path, "--nucleus-threshold", "0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_tile.parquet", "my_tile.provenance.json"]
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
        ({"more": ("--outputs", "h5ad", "h5ad")}, "line: outputs: got ['h5ad', 'h5ad'], expected each of them once"),
        ({"more": ("--diameter-um", "8")}, "expected a value in nuclei"),
        ({"more": ("--name", "../up")}, "command line: name: got '../up'"),
        ({"more": ("--model-mpp", "0.25")}, "--model-mpp: got 0.25, but"),
        ({"more": ("--nucleus-threshold", "1")}, "no cell"),
        ({"more": ("--threads", "0")}, "command line: threads: got '0', expected greater than or equal to 1"),
        ({"more": ("--batch-size", "-4")}, "command line: batch_size: got '-4', expected greater than"),
        ({"more": ("--model-size", "-64")}, "command line: model_size: got '-64'"),
        ({"more": ("--image", "write")}, "image: got 'write', expected spatialdata among --outputs"),
        ({"slide": "."}, "got a folder, expected a file"),
    ],
    ids=str,
)
def test_mistakes_are_named_and_nothing_is_written(files, tmp_path, more, message):
    more = dict(more)
    with pytest.raises(CellDETRError) as caught:
        call(files, tmp_path / "out", *more.pop("more", ()), **more)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_early_leaves_what_was_there(files, tmp_path, monkeypatch):
    """Neither an empty folder nor less than there was; parts that were written stay."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()

    def fail(*_, **__):
        raise OSError("no model here")

    monkeypatch.setattr(find, "Predictor", fail)
    for out in ("mine", "new/folder"):
        with pytest.raises(OSError, match="no model here"):
            call(files, tmp_path / out)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["mine", "mine/notes.txt"]


@pytest.mark.parametrize("more", [("--out", ""), ("--region", " "), ("--thread", "2"), ("b.tif",), ("--mpp",)])
def test_words_that_would_be_taken_for_others_are_refused(files, tmp_path, more, capsys):
    with pytest.raises(SystemExit) as end:
        call(files, tmp_path / "out", *more)
    assert end.value.code == 2
    assert more[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_heavy_library():
    """PyTorch, scanpy and SpatialData take seconds to import."""
    heavy = "torch", "scanpy", "anndata", "spatialdata", "pandas", "matplotlib"
    code = f"import sys, celldetr.cells.__main__; print(*(name for name in {heavy} if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


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


class Named(dict):
    """Inputs of a job, by name."""

    __getattr__ = dict.__getitem__


def test_the_rule_knows_all_columns_of_a_row(files, tmp_path, monkeypatch):
    main = runpy.run_path(str(ROOT / "scripts" / "find_cells.py"))["main"]
    values = {
        "mpp": 0.5,
        "group": "a",
        "region_unit": "um",
        "nuclei_unit": "um",
        "nuclei_mpp": 0.25,
        "diameter_um": 7.0,
    }
    row = CellRow(slide="s", use=True, file=("f",), nuclei=("n",), region="r", cell_outlines=True, **values)
    job = SimpleNamespace(
        input=Named(slide="f", nuclei="n", region="r", model=files / "parallel.pt"),
        output=[tmp_path],
        params=SimpleNamespace(
            **CellSettings().model_dump(), mpp=None, patch_size=None, precision="fp32", compile=False, code="",
            row={key: getattr(row, key) for key in CELLS_DEPEND_ON},
        ),
        resources=SimpleNamespace(tiles=2),
        threads=1,
        wildcards=SimpleNamespace(slide="s", job="1"),
    )  # fmt: skip
    found = []
    monkeypatch.setitem(main.__globals__, "find_cells_of_row", lambda row, *_, **__: found.append(row))
    main(job)
    assert found == [row]
