"""Sheets: shipped ones, and what a user is told about a wrong one."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from celldetr.config.cells import CellSettings
from celldetr.config.sheets import (
    ReferenceRow,
    SlideRow,
    XeniumRow,
    cell_slides,
    locate,
    read_sheet,
    used_samples,
    used_slides,
)
from celldetr.config.slides import SlideSettings
from celldetr.config.sthelar import used_sthelar
from celldetr.config.workflow import schemas
from celldetr.config.xenium import SthelarSettings, XeniumSettings
from celldetr.runtime.errors import ConfigError

ROOT = Path(__file__).parents[3]
ROW = {"sample": "a", "use": "yes", "tissue": "lung", "group": "s1", "reference": "r", "outs": "o.zip", "he": "h.tif"}
SLIDE = {"slide": "a", "use": "yes", "tissue": "lung", "group": "a", "file": "a.tif", "nuclei": "a.parquet"}
CELLS = {"slide": "a", "use": "yes", "file": "a.png", "nuclei": "a.geojson"}
REFERENCE = {"reference": "other", "file": "r.h5ad", "label_column": "cell_type", "mapping": "m.tsv"}


def write(path, *rows, end="\n"):
    """Write rows whose columns are those of the first one."""
    lines = ["# a comment", "\t".join(rows[0])]
    lines += ["\t".join(str(row.get(name, "")) for name in rows[0]) for row in rows]
    path.write_bytes((end.join(lines) + end).encode())
    return path


def test_a_note_in_the_sheet_downloads_no_reference_again(tmp_path):
    rows = [REFERENCE | {"note": "", "cells": ""}, REFERENCE | {"reference": "again", "note": "x", "cells": 9}]
    first, again = read_sheet(write(tmp_path / "r.tsv", *rows), ReferenceRow, "reference").values()
    assert first.source() == again.source()
    assert first.source()["file"] == ["r.h5ad"]


@pytest.mark.parametrize("folder", [ROOT / "config", ROOT / "config" / "example"])
def test_shipped_samples_are_right_and_complete(folder):
    prefix = folder.relative_to(ROOT).as_posix()
    paths = SimpleNamespace(samples=f"{prefix}/xenium.tsv", references=f"{prefix}/references.tsv")
    samples, references = used_samples(paths, ROOT)
    assert {row.reference for row in samples.values()} == set(references)
    assert all((ROOT / row.mapping).is_file() for row in references.values())
    for row in read_sheet(ROOT / paths.samples, XeniumRow, "sample").values():
        assert all(url.startswith(("https://", "example-input/")) for url in (*row.outs, *row.he, *row.alignment))


def test_the_lung_sample_of_the_paper_is_pinned():
    row = read_sheet(ROOT / "config" / "xenium.tsv", XeniumRow, "sample")["Xenium_V1_humanLung_Cancer_FFPE"]
    assert (row.he_mpp, len(row.outs)) == (0.2738, 2)
    assert row.outs_sha256.startswith("865c3805")
    assert row.alignment_sha256.startswith("9b8e47bf")


def test_shipped_slides_are_right():
    assert [row.detect for row in used_slides("config/example/slides.tsv", ROOT).values()] == [False, True]
    rows = used_slides(SlideSettings().sheet, ROOT)
    assert all(row.hest and row.nuclei == ("hest",) and row.mpp for row in rows.values())
    for tissue in ("kidney", "lung", "prostate"):
        assert len({row.group for row in rows.values() if row.tissue == tissue}) >= 2
    assert all(name == row.hest for name, row in read_sheet(ROOT / "config/slides.tsv", SlideRow, "slide").items())


def test_schema_files_are_those_of_the_classes():
    for name, text in schemas().items():
        assert (ROOT / "workflow" / "schemas" / name).read_text(encoding="utf-8") == text, "run `make format`"
        json.loads(text)


def test_cells_are_read(tmp_path):
    row = {**ROW, "outs": "https://x/o.zip | /data/o.zip", "he_mpp": "0.27", "note": 'said "so"'}
    rows = read_sheet(
        write(tmp_path / "s.tsv", row, {**ROW, "sample": "b", "use": "no"}, end="\r\n"), XeniumRow, "sample"
    )
    assert list(rows) == ["a", "b"]
    assert rows["a"].outs == ("https://x/o.zip", "/data/o.zip")
    assert (rows["a"].he_mpp, rows["a"].alignment, rows["a"].note) == (0.27, (), 'said "so"')
    assert (rows["a"].use, rows["b"].use) == (True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": "../up"}, "row 1: sample: got '../up', expected match pattern"),
        ({"sample": ""}, "row 1: sample: empty; expected a value"),
        ({"use": "maybe"}, "row 1: use: got 'maybe', expected yes or no"),
        ({"use": "no"}, "column use: got 'yes' in no row"),
        ({"he_mpp": "half"}, "row 1: he_mpp: got 'half', expected a valid number"),
        ({"he_mpp": "250"}, "row 1: he_mpp: got '250', expected less than 20"),
        ({"outs_sha256": "xyz"}, "row 1: outs_sha256: got 'xyz'"),
        ({"outs": " | "}, "row 1: outs: got '|'"),
        ({"colour": "red"}, "columns: unknown ['colour'], missing none"),
        ({}, "a: reference: got 'r', expected one of ['other']"),
    ],
)
def test_mistakes_in_samples_are_named(tmp_path, change, message):
    write(tmp_path / "r.tsv", REFERENCE)
    path = write(tmp_path / "s.tsv", {**ROW, **change})
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        used_samples(SimpleNamespace(samples="s.tsv", references="r.tsv"), tmp_path)
    assert str(path) in str(error.value)


def test_sections_of_sthelar_are_no_sample_twice(tmp_path):
    """Two sections of the shipped sheet are samples of the paper: they are off, and refused if they are turned on."""
    settings = XeniumSettings(sthelar=SthelarSettings())
    samples, _ = used_samples(settings, ROOT)
    used = used_sthelar(settings, samples, ROOT)
    assert len(used) == 25
    alone = XeniumSettings(samples=None, sthelar=SthelarSettings(samples=str(tmp_path / "on.tsv")))
    text = (ROOT / "config" / "sthelar.tsv").read_text(encoding="utf-8")
    (tmp_path / "on.tsv").write_text(text.replace("\tno\t", "\tyes\t"), encoding="utf-8")
    rows = used_sthelar(alone, {}, ROOT)
    assert len(rows) == len({row.section for row in rows.values()}) == 27
    by_section = {row.section: row for row in rows.values()}
    shared = {name: row.group for name, row in read_sheet(ROOT / "config/xenium.tsv", XeniumRow, "sample").items()}
    assert all(by_section[name].group == group for name, group in shared.items() if name in by_section)
    with pytest.raises(ConfigError, match=r"lung_s1: .* is the sample Xenium_V1_Human_Lung_Cancer_Addon_FFPE of"):
        used_sthelar(alone, samples, ROOT)
    write(tmp_path / "on.tsv", {"sample": "A", "use": "yes", "tissue": "lung", "group": "g"})
    with pytest.raises(ConfigError, match="sample: got 'A', also a name in"):
        used_sthelar(alone, {"a": XeniumRow.model_validate(ROW)}, ROOT)
    write(tmp_path / "on.tsv", {"sample": "A", "use": "no", "tissue": "lung", "group": "g"})
    with pytest.raises(ConfigError, match="column use: got 'yes' in no row"):
        used_sthelar(alone, {}, ROOT)
    assert used_sthelar(XeniumSettings(), {}, ROOT) == {}
    assert used_samples(alone, ROOT) == ({}, {})
    with pytest.raises(ValueError, match="samples: got null, expected a sheet, or a block sthelar"):
        XeniumSettings(samples=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hest": "TENX1"}, "either file or hest"),
        ({"file": ""}, "either file or hest"),
        ({"file": "a.MRXS"}, "pyramidal TIFF"),
        ({"nuclei": "hest"}, "column hest"),
        ({"nuclei": "detect | a.parquet"}, "'detect' alone"),
        ({"nuclei": "detect", "nuclei_unit": "um"}, "nuclei_unit"),
        ({"nuclei": "detect", "nuclei_sha256": "01234567"}, "nuclei_sha256"),
        ({"nuclei": "detect", "cell_outlines": "yes"}, "cell_outlines"),
        ({"hest": "../x", "file": ""}, "hest"),
    ],
)
def test_mistakes_in_slides_are_named(tmp_path, change, message):
    path = write(tmp_path / "slides.tsv", {**SLIDE, **change})
    with pytest.raises(ConfigError, match=message) as caught:
        used_slides("slides.tsv", tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": ""}, "row 1: file: empty; expected a value"),
        ({"file": "a.mrxs"}, "pyramidal TIFF"),
        ({"nuclei": "detect"}, "expected nuclei to be a file, or empty: the model finds them; got 'detect'"),
        ({"nuclei": "", "nuclei_unit": "um"}, "a value in nuclei, as there is one in nuclei_unit"),
        ({"nuclei": "", "diameter_um": "8"}, "a value in nuclei, as there is one in diameter_um"),
        ({"diameter_um": "0"}, "diameter_um: got '0', expected greater than 0"),
        ({"use": "no"}, "column use: got 'yes' in no row"),
        ({"tissue": "lung"}, "columns: unknown ['tissue']"),
    ],
)
def test_mistakes_in_cells_are_named(tmp_path, change, message):
    path = write(tmp_path / "cells.tsv", {**CELLS, **change})
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        cell_slides(CellSettings(sheet="cells.tsv"), {}, {}, tmp_path)
    assert str(path) in str(caught.value)


def test_cells_of_one_slide_may_be_found_and_given(tmp_path):
    write(tmp_path / "cells.tsv", CELLS, {**CELLS, "slide": "b", "nuclei": ""})
    rows = cell_slides(CellSettings(sheet="cells.tsv"), {}, {}, tmp_path)
    assert {name: (row.file, row.nuclei) for name, row in rows.items()} == {
        "a": (("a.png",), ("a.geojson",)),
        "b": (("a.png",), ()),
    }
    assert cell_slides(None, {}, {}, tmp_path) == {}


def test_without_a_sheet_cells_are_found_on_the_slides_and_samples_of_the_other_sheets():
    slides, samples = {"a": SlideRow(**SLIDE, mpp=0.25)}, {"b": XeniumRow(**ROW | {"sample": "b"}, he_mpp=0.3)}
    rows = cell_slides(CellSettings(), samples, slides, ROOT)
    assert {name: (row.file, row.mpp, row.group, row.nuclei) for name, row in rows.items()} == {
        "a": (("results/raw/slides/a.tif",), 0.25, "a", ()),
        "b": (("results/raw/xenium/b/he_image.tif",), 0.3, "s1", ()),
    }
    with pytest.raises(ConfigError, match=r"cells.sheet: got null, but \['a'\] are names of Xenium samples"):
        cell_slides(CellSettings(), {"A": samples["b"]}, slides, ROOT)


@pytest.mark.parametrize("change", [{"file": ""}, {"cellxgene_collection": "c", "cellxgene_dataset": "d"}])
def test_a_reference_has_one_source(tmp_path, change):
    with pytest.raises(ConfigError, match="expected either file, or cellxgene_collection and cellxgene_dataset"):
        read_sheet(write(tmp_path / "r.tsv", {**REFERENCE, **change}), ReferenceRow, "reference")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sample,use\na,yes\n", "is the file separated by tabs"),
        (b"\n# nothing\n", "got an empty sheet"),
        (b"\xff\xfe\x00", "expected a TSV file in UTF-8"),
        ("\t".join(ROW).encode() + b"\n" + b"x\t" * 8, "row 1: got 9 cells, expected at most 7"),
    ],
)
def test_files_that_are_no_sheets(tmp_path, content, message):
    (tmp_path / "s.tsv").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_sheet(tmp_path / "s.tsv", XeniumRow, "sample")


def test_names_are_unique_on_every_disk(tmp_path):
    path = write(tmp_path / "s.tsv", ROW, {**ROW, "sample": "A"})
    with pytest.raises(ConfigError, match="row 2: sample: got 'A' twice"):
        read_sheet(path, XeniumRow, "sample")


@pytest.mark.parametrize(("kind", "row", "folder"), [(XeniumRow, ROW, "xenium"), (SlideRow, SLIDE, "slides")])
def test_names_of_files_of_the_workflow_are_refused(tmp_path, kind, row, folder):
    """A sample `split.tsv` would put its folder where the table of the split belongs."""
    rules = (ROOT / "workflow" / "rules" / f"{folder}.smk").read_text(encoding="utf-8")
    beside = set(re.findall(rf'"results/{folder}/([^/{{}}"]+)"', rules))
    inside = set(re.findall(rf'"results/{folder}/{{\w+}}/(\w+)\.zarr"', rules))
    assert "split.tsv" in beside
    key = next(iter(row))
    for name in {*beside, *inside, "SPLIT.tsv"}:
        with pytest.raises(ConfigError, match=f"row 1: {key}: got '{name}', which is a file of the workflow"):
            read_sheet(write(tmp_path / "s.tsv", {**row, key: name}), kind, key)
    assert list(read_sheet(write(tmp_path / "s.tsv", {**row, key: "split"}), kind, key)) == ["split"]


def test_many_rows_are_read_quickly(tmp_path):
    """Every call of Snakemake reads the sheets; a check of each name against all others would take 7 s here."""
    path = write(tmp_path / "s.tsv", *({**SLIDE, "slide": f"a{number}"} for number in range(10_000)))
    start = time.process_time()
    assert len(read_sheet(path, SlideRow, "slide")) == 10_000
    assert time.process_time() - start < 2


def test_one_file_under_two_names_is_refused(tmp_path):
    """The same tissue would train and test."""
    write(tmp_path / "r.tsv", {**REFERENCE, "reference": "r"})
    write(tmp_path / "s.tsv", ROW, {**ROW, "sample": "b", "group": "s2", "outs": "mirror.zip | o.zip"})
    with pytest.raises(ConfigError, match=r"b: got 'o.zip', which is also that of a; expected each once"):
        used_samples(SimpleNamespace(samples="s.tsv", references="r.tsv"), tmp_path)
    write(tmp_path / "s.tsv", ROW, {**ROW, "sample": "b", "use": "no"}, {**ROW, "sample": "c", "outs": "c.zip"})
    assert set(used_samples(SimpleNamespace(samples="s.tsv", references="r.tsv"), tmp_path)[0]) == {"a", "c"}
    both = {**ROW, "sample": "b", "outs": "b.zip"}
    write(tmp_path / "s.tsv", ROW, both)  # two samples on one H&E
    assert set(used_samples(SimpleNamespace(samples="s.tsv", references="r.tsv"), tmp_path)[0]) == {"a", "b"}
    write(tmp_path / "s.tsv", ROW, {**both, "group": "s2"})
    with pytest.raises(ConfigError, match=r"b: group: got 's2', but the H&E .* is also that of a, in group"):
        used_samples(SimpleNamespace(samples="s.tsv", references="r.tsv"), tmp_path)
    write(tmp_path / "slides.tsv", SLIDE, {**SLIDE, "slide": "b"})
    with pytest.raises(ConfigError, match=r"b: got 'a.tif', which is also that of a"):
        used_slides("slides.tsv", tmp_path)


def test_a_sheet_is_taken_from_the_working_folder_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("config/xenium.tsv", ROOT) == ROOT / "config" / "xenium.tsv"
    (tmp_path / "config").mkdir()
    write(tmp_path / "config" / "xenium.tsv", ROW)
    assert list(read_sheet(locate("config/xenium.tsv", ROOT), XeniumRow, "sample")) == ["a"]
