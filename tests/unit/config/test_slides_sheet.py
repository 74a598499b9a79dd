"""The sheet of slides: the shipped ones, and what a user is told about a wrong one."""

from pathlib import Path

import pytest

from celldetr.config.sheets import SlideRow, read_sheet, used_slides
from celldetr.config.slides import SlideSettings
from celldetr.runtime.errors import ConfigError

ROW = {"slide": "a", "use": "yes", "tissue": "lung", "group": "a", "file": "a.tif", "nuclei": "a.parquet"}


def write_sheet(path, **changes):
    row = {key: value for key, value in {**ROW, **changes}.items() if value}
    path.write_text("\t".join(SlideRow.model_fields) + "\n" + "\t".join(row.get(k, "") for k in SlideRow.model_fields))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hest": "TENX1"}, "either file or hest"),
        ({"file": ""}, "either file or hest"),
        ({"file": "a.MRXS"}, "pyramidal TIFF"),
        ({"nuclei": ""}, "nuclei"),
        ({"nuclei": "hest"}, "column hest"),
        ({"nuclei": "detect | a.parquet"}, "'detect' alone"),
        ({"nuclei": "detect", "nuclei_unit": "um"}, "nuclei_unit"),
        ({"nuclei": "detect", "nuclei_sha256": "01234567"}, "nuclei_sha256"),
        ({"hest": "../x", "file": ""}, "hest"),
        ({"mpp": "250"}, "mpp"),
        ({"use": "no"}, "column use"),
    ],
)
def test_wrong_rows_are_refused(tmp_path, changes, message):
    path = write_sheet(tmp_path / "slides.tsv", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        used_slides("slides.tsv", tmp_path)
    assert str(path) in str(caught.value)


def test_shipped_sheets_are_right():
    root = Path(__file__).parents[3]
    assert used_slides(None, root) == {}
    example = used_slides("config/example/slides.tsv", root)
    assert [row.detect for row in example.values()] == [False, True]
    rows = used_slides(SlideSettings().sheet, root)
    assert {row.tissue for row in rows.values()} == {"kidney", "lung", "prostate"}
    assert all(row.hest and row.nuclei == ("hest",) and row.mpp for row in rows.values())
    for row in read_sheet(root / "config/slides.tsv", SlideRow, "slide").values():
        assert row.slide == row.hest
    for tissue in ("kidney", "lung", "prostate"):
        assert len({row.group for row in rows.values() if row.tissue == tissue}) >= 2
