"""Sheets and small tables: valid rows come back; anything else is read as it stands or refused with file and place."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from strategies import damages, refused, tries

from celldetr.config.classes import ST_TYPES
from celldetr.config.sheets import ReferenceRow, SlideRow, XeniumRow, read_sheet
from celldetr.config.sthelar import SthelarRow
from celldetr.runtime.errors import ConfigError
from celldetr.xenium.celltypes.mapping import LEFT_OUT, read_mapping

ROOT = Path(__file__).parents[2]
SHEETS = {
    "xenium": (XeniumRow, "sample"),
    "slides": (SlideRow, "slide"),
    "references": (ReferenceRow, "reference"),
    "sthelar": (SthelarRow, "sample"),
}
FILES = [
    (name, (ROOT / "config" / folder / f"{name}.tsv").read_bytes()) for name in SHEETS for folder in (".", "example")
]
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)
CELLS = st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters="|#"), min_size=1, max_size=9)
ODD = st.sampled_from(
    ["", "..", "../x", "a/b", "a\\b", "\x00", "\u2028", '"', "nan", "-", "|", " | ", "x" * 200_000, "1e999"]
)


@tries(40)
@given(data=st.data(), end=st.sampled_from(["\n", "\r\n"]), mark=st.sampled_from(["", "\ufeff"]))
def test_valid_rows_come_back(tmp_path_factory, data, end, mark):
    cells = {
        "slide": NAMES,
        "use": st.sampled_from(["yes", "no"]),
        "tissue": CELLS,
        "group": CELLS,
        "file": st.lists(CELLS, min_size=1, max_size=3).map(lambda names: " | ".join(f"{name}.tif" for name in names)),
        "nuclei": st.sampled_from(["detect", "a.parquet", "https://x/y | b.json"]),
        "mpp": st.sampled_from(["", "0.25", "1"]),
        "note": st.one_of(st.just(""), CELLS),
    }
    columns = data.draw(st.permutations(list(cells)))
    rows = st.lists(st.fixed_dictionaries(cells), min_size=1, max_size=5, unique_by=lambda row: row["slide"].lower())
    rows = data.draw(rows)
    lines = ["# a comment", "\t".join(columns), "", *("\t".join(row[column] for column in columns) for row in rows)]
    path = tmp_path_factory.mktemp("s") / "slides.tsv"
    path.write_bytes((mark + end.join(lines) + end).encode())
    found = read_sheet(path, SlideRow, "slide")
    rows = [row for row in rows if not row[columns[0]].startswith("#")]
    assert list(found) == [row["slide"] for row in rows]
    for row in rows:
        got = found[row["slide"]]
        assert (got.tissue, got.group, got.note) == (row["tissue"], row["group"], row["note"])
        assert (got.use, got.file) == (row["use"] == "yes", tuple(row["file"].split(" | ")))
        assert got.mpp == (float(row["mpp"]) if row["mpp"] else None)


def check(path, name):
    """Check that a sheet is refused by name, or has names that are names of folders."""
    kind, key = SHEETS[name]
    error, found = refused(read_sheet, path, kind, key)
    if error is not None:
        assert isinstance(error, ConfigError)
        assert str(path) in str(error)
        assert "pydantic" not in str(error)
        return
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", row) for row in found)
    assert len({row.lower() for row in found}) == len(found)


@tries(100)
@given(file=st.sampled_from(FILES), damage=damages(), more=st.one_of(st.none(), damages()))
def test_a_damaged_sheet_is_read_or_refused(tmp_path_factory, file, damage, more):
    name, content = file
    path = tmp_path_factory.mktemp("s") / f"{name}.tsv"
    content = damage(content)
    path.write_bytes(more(content) if more else content)
    check(path, name)


@tries(80)
@given(data=st.data(), file=st.sampled_from(FILES))
def test_a_sheet_with_odd_cells_is_read_or_refused(tmp_path_factory, data, file):
    name, content = file
    lines = [line.split("\t") for line in content.decode().splitlines() if line and not line.startswith("#")]
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(lines))
        if not row:
            continue
        place = data.draw(st.integers(0, len(row) - 1))
        kind = data.draw(st.sampled_from(["set", "set", "remove", "add"]))
        if kind == "remove":
            del row[place]
        else:
            row[place : place + (kind == "set")] = [data.draw(st.one_of(ODD, CELLS))]
    path = tmp_path_factory.mktemp("s") / f"{name}.tsv"
    path.write_bytes("\n".join("\t".join(row) for row in lines).encode("utf-8", "surrogatepass"))
    check(path, name)


@tries(60)
@given(damage=damages(), more=st.one_of(st.none(), damages()))
def test_a_changed_mapping_is_whole_or_refused(tmp_path_factory, damage, more):
    content = damage(b"# labels\nlabel\ttype\nCD4\tT\nCD8 \xc3\xa9\tT\ntumour\tMalignant\ndoublet\t-\n" + b"x" * 8)
    path = tmp_path_factory.mktemp("m") / "mapping.tsv"
    path.write_bytes(more(content) if more else content)
    error, mapping = refused(read_mapping, path)
    assert error is None or str(path) in str(error)
    assert error is not None or (set(mapping.values()) <= {*ST_TYPES, LEFT_OUT} and all(mapping))
