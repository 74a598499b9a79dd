"""Sheets: shipped ones, and what a user is told about a wrong one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from celldetr.config.sheets import ReferenceRow, XeniumRow, locate, read_sheet, used_samples
from celldetr.config.workflow import schemas
from celldetr.runtime.errors import ConfigError

ROOT = Path(__file__).parents[3]
ROW = {"sample": "a", "use": "yes", "tissue": "lung", "group": "s1", "reference": "r", "outs": "o.zip", "he": "h.tif"}


def write(path, *rows, columns=None, end="\n"):
    columns = columns or list(ROW)
    lines = ["# a comment", "\t".join(columns)]
    lines += ["\t".join(str(row.get(name, "")) for name in columns) for row in rows]
    path.write_bytes((end.join(lines) + end).encode())
    return path


@pytest.mark.parametrize("folder", [ROOT / "config", ROOT / "config" / "example"])
def test_shipped_sheets_are_right_and_complete(folder):
    prefix = folder.relative_to(ROOT).as_posix()
    paths = SimpleNamespace(samples=f"{prefix}/xenium.tsv", references=f"{prefix}/references.tsv")
    samples, references = used_samples(paths, ROOT)
    assert samples
    assert references
    for row in references.values():
        assert (ROOT / row.mapping).is_file()
    for row in read_sheet(ROOT / paths.samples, XeniumRow, "sample").values():
        assert row.tissue
        assert all(url.startswith(("https://", "example-input/")) for url in (*row.outs, *row.he, *row.alignment))


def test_the_lung_sample_of_the_paper_is_pinned():
    row = read_sheet(ROOT / "config" / "xenium.tsv", XeniumRow, "sample")["Xenium_V1_humanLung_Cancer_FFPE"]
    assert row.he_mpp == 0.2738
    assert row.outs_sha256.startswith("865c3805")
    assert row.alignment_sha256.startswith("9b8e47bf")
    assert len(row.outs) == 2


def test_schema_files_are_those_of_the_classes():
    for name, text in schemas().items():
        assert (ROOT / "workflow" / "schemas" / name).read_text(encoding="utf-8") == text, "run `make format`"
        json.loads(text)


def test_cells_are_read(tmp_path):
    row = {**ROW, "outs": "https://x/o.zip | /data/o.zip", "he_mpp": "0.27", "note": 'said "so"'}
    path = write(tmp_path / "s.tsv", row, {**ROW, "sample": "b", "use": "no"}, columns=[*row], end="\r\n")
    rows = read_sheet(path, XeniumRow, "sample")
    assert list(rows) == ["a", "b"]
    assert rows["a"].outs == ("https://x/o.zip", "/data/o.zip")
    assert (rows["a"].he_mpp, rows["a"].alignment, rows["a"].note) == (0.27, (), 'said "so"')
    assert (rows["a"].use, rows["b"].use) == (True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": "../up"}, "row 1: sample: got '../up', expected match pattern"),
        ({"sample": ""}, "row 1: sample: empty; expected a value"),
        ({"use": "maybe"}, "row 1: use: got 'maybe', expected a valid boolean"),
        ({"he_mpp": "half"}, "row 1: he_mpp: got 'half', expected a valid number"),
        ({"he_mpp": "250"}, "row 1: he_mpp: got '250', expected less than 20"),
        ({"outs_sha256": "xyz"}, "row 1: outs_sha256: got 'xyz'"),
        ({"outs": " | "}, "row 1: outs: got '|'"),
        ({"colour": "red"}, "columns: unknown ['colour'], missing none"),
    ],
)
def test_mistakes_are_named_with_row_and_column(tmp_path, change, message):
    row = {**ROW, **change}
    path = write(tmp_path / "s.tsv", row, columns=list(row))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_sheet(path, XeniumRow, "sample")
    assert str(path) in str(error.value)


def test_names_are_unique_on_every_disk(tmp_path):
    path = write(tmp_path / "s.tsv", ROW, {**ROW, "sample": "A"})
    with pytest.raises(ConfigError, match="row 2: sample: got 'A' twice"):
        read_sheet(path, XeniumRow, "sample")


def test_sheets_without_tabs_rows_or_content(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text("sample,use\na,yes\n")
    with pytest.raises(ConfigError, match="is the file separated by tabs"):
        read_sheet(path, XeniumRow, "sample")
    path.write_text("\n# nothing\n")
    with pytest.raises(ConfigError, match="got an empty sheet"):
        read_sheet(path, XeniumRow, "sample")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="expected a TSV file in UTF-8"):
        read_sheet(path, XeniumRow, "sample")
    write(path, ROW).write_text(path.read_text() + "\t".join(["x"] * 9) + "\n")
    with pytest.raises(ConfigError, match="row 2: got 9 cells, expected at most 7"):
        read_sheet(path, XeniumRow, "sample")


def test_samples_in_use_need_a_reference(tmp_path):
    reference = {"reference": "other", "file": "r.h5ad", "label_column": "cell_type", "mapping": "m.tsv"}
    write(tmp_path / "r.tsv", reference, columns=list(reference))
    paths = SimpleNamespace(samples="s.tsv", references="r.tsv")
    write(tmp_path / "s.tsv", ROW)
    with pytest.raises(ConfigError, match=r"a: reference: got 'r', expected one of \['other'\]"):
        used_samples(paths, tmp_path)
    write(tmp_path / "s.tsv", {**ROW, "use": "no"})
    with pytest.raises(ConfigError, match="column use: got 'yes' in no row"):
        used_samples(paths, tmp_path)
    assert used_samples(None, tmp_path) == ({}, {})


def test_a_sheet_is_taken_from_the_working_folder_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("config/xenium.tsv", ROOT) == ROOT / "config" / "xenium.tsv"
    (tmp_path / "config").mkdir()
    write(tmp_path / "config" / "xenium.tsv", ROW)
    assert list(read_sheet(locate("config/xenium.tsv", ROOT), XeniumRow, "sample")) == ["a"]


@pytest.mark.parametrize("change", [{"file": ""}, {"cellxgene_collection": "c", "cellxgene_dataset": "d"}])
def test_a_reference_has_one_source(tmp_path, change):
    row = {"reference": "r", "file": "r.h5ad", "label_column": "t", "mapping": "m.tsv", **change}
    with pytest.raises(ConfigError, match="expected either file, or cellxgene_collection and cellxgene_dataset"):
        read_sheet(write(tmp_path / "r.tsv", row, columns=list(row)), ReferenceRow, "reference")
