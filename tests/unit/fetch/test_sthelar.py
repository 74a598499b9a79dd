"""STHELAR: a section's rows and no more are transferred, whole, of one commit; a damaged data set is named."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from celldetr.config.sthelar import CELLS, PLACES, SOURCE
from celldetr.example.sthelar import cell_table, draw_section, patch_table, write_sthelar
from celldetr.fetch.sthelar import fetch_section
from celldetr.runtime.errors import InputError

REPOSITORY = "a/sthelar"
HUB = {"repository": REPOSITORY, "revision": "main"}


@pytest.fixture(scope="module")
def drawn():
    return [draw_section(name, (2, 2), (1, number)) for number, name in enumerate(("s0", "s1", "s2"))]


@pytest.fixture(scope="module")
def made(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "copy"
    write_sthelar(folder, drawn, shards=2)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def fetched(folder):
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("patches-*.parquet"))])


def check(folder, section):
    assert fetched(folder).equals(patch_table(section).drop_columns("tissue"))
    assert pq.read_table(folder / PLACES)["file_name"].to_pylist() == section.names
    assert pq.read_table(folder / CELLS).equals(cell_table(section))


def test_each_section_is_had_from_a_copy(made, drawn, tmp_path):
    for section in drawn:  # that of s1 lies in both files
        out = fetch_section(section.name, tmp_path / section.name, **HUB, folder=str(made))
        check(out, section)
        assert json.loads((out / SOURCE).read_text()) == {"folder": "copy"}


@pytest.fixture
def hub(web, use_hub, made):
    use_hub(web.url)
    names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*.parquet"))
    listing = {"id": REPOSITORY, "sha": "c0ffee", "siblings": [{"rfilename": name} for name in names]}
    web.files[f"/api/datasets/{REPOSITORY}/revision/main"] = json.dumps(listing).encode()
    web.headers = {"Content-Type": "application/json"}
    for name in names:
        web.files[f"/datasets/{REPOSITORY}/resolve/c0ffee/{name}"] = (made / name).read_bytes()
    return web


def shard(number):
    return f"/datasets/{REPOSITORY}/resolve/c0ffee/data/train-{number:05}-of-00002.parquet"


def asked(hub, number):
    return [path for _, path, _ in hub.requests].count(shard(number))


def test_rows_come_from_the_hub_of_one_commit(hub, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("celldetr.fetch.members._BLOCK", 1 << 15)
    out = fetch_section("s0", tmp_path / "s0", **HUB)
    check(out, drawn[0])
    assert json.loads((out / SOURCE).read_text()) == {"repository": REPOSITORY, "revision": "c0ffee"}
    assert asked(hub, 1) == 0  # all patches are in the first file
    assert hub.sent < 0.9 * sum(map(len, hub.files.values()))


def test_an_interruption_is_continued_and_another_commit_starts_afresh(hub, drawn, tmp_path):
    second = hub.files.pop(shard(1))
    with pytest.raises(InputError, match=r"train-00001-of-00002.parquet: HTTP 404"):
        fetch_section("s1", tmp_path / "s1", **HUB)
    assert not (tmp_path / "s1").exists()
    hub.files[shard(1)] = second
    hub.requests.clear()
    check(fetch_section("s1", tmp_path / "s1", **HUB), drawn[1])
    assert (asked(hub, 0), asked(hub, 1) > 0) == (0, True)
    stale = tmp_path / ".s0.part"
    stale.mkdir()
    (stale / SOURCE).write_text('{"repository": "a/sthelar", "revision": "older"}')
    (stale / "patches-00000.parquet").write_bytes(b"of another revision")
    check(fetch_section("s0", tmp_path / "s0", **HUB), drawn[0])


def test_a_hub_that_fails_is_named_without_the_token(hub, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="a/sthelar at revision none cannot be listed") as error:
        fetch_section("s0", tmp_path / "s0", repository=REPOSITORY, revision="none")
    assert "hf_secret123" not in str(error.value)
    monkeypatch.setattr("celldetr.fetch.http.TRIES", 2)
    hub.cuts = [4000] * 9
    with pytest.raises(InputError, match=r"parquet: .*start again later"):
        fetch_section("s0", tmp_path / "s0", **HUB)
    hub.cuts, hub.ranges = [], False
    with pytest.raises(InputError, match="does not send parts of files"):
        fetch_section("s0", tmp_path / "s0", **HUB)


def rewrite(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def first(table):
    return table.slice(1)


BROKEN = {
    "missing column": (lambda f: rewrite(f / "data/train-00000-of-00002.parquet", lambda t: t.drop_columns("Dice")),
                       r"train-00000-of-00002.parquet: got no columns \['Dice'\]"),
    "truncated": (lambda f: (f / "data/train-00000-of-00002.parquet").write_bytes(
        (f / "data/train-00000-of-00002.parquet").read_bytes()[:-100]), "got no whole Parquet file"),
    "missing file": (lambda f: (f / "data/train-00001-of-00002.parquet").unlink(), "1 files data.*expected .* 2 files"),
    "no places": (lambda f: (f / "patches_overview_sthelar40x.parquet").unlink(), "tables of places none"),
    "no cells": (lambda f: (f / "cell_metadata/s0_cell_metadata.parquet").unlink(), "got no cell_metadata/s0_cell"),
    "fewer places": (lambda f: rewrite(f / "patches_overview_sthelar40x.parquet", first), "got 4 patches .* 3 places"),
    "empty": (lambda f: shutil.rmtree(f) or f.mkdir(), "got no Parquet file, expected a copy of the data set"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_copy_is_named(copy, tmp_path, how):
    change, message = BROKEN[how]
    change(copy)
    with pytest.raises(InputError, match=message):
        fetch_section("s0", tmp_path / "s0", **HUB, folder=str(copy))
    assert not (tmp_path / "s0").exists()


def test_a_section_that_is_not_there_is_named_with_those_that_are(made, tmp_path):
    with pytest.raises(InputError, match=r"brain_s0: .* has no row of it; expected .* one of s0, s1, s2"):
        fetch_section("brain_s0", tmp_path / "b", **HUB, folder=str(made))


def test_places_without_a_patch_are_no_error(copy, drawn, tmp_path):
    path = copy / "data/train-00000-of-00002.parquet"
    rewrite(path, lambda table: table.filter(pa.compute.not_equal(table["file_name"], "s0_1.png")))
    assert len(fetched(fetch_section("s0", tmp_path / "s0", **HUB, folder=str(copy)))) == len(drawn[0].names) - 1


def test_memory_holds_a_few_rows_of_a_large_file(made, drawn, tmp_path, monkeypatch):
    """PyArrow would hold all row groups that it is asked for at once."""
    folder = shutil.copytree(made, tmp_path / "copy")
    rows = patch_table(drawn[0])
    many = pa.concat_tables([rows] * 20)
    names = pa.array([f"s0_{number}.png" for number in range(len(many))])
    for path in (folder / "data").iterdir():
        pq.write_table(many.set_column(0, "file_name", names), path, row_group_size=len(rows))
    places = pa.concat_tables([pq.read_table(folder / "patches_overview_sthelar40x.parquet")] * 60)
    pq.write_table(places, folder / "patches_overview_sthelar40x.parquet")
    held, write = [], pq.ParquetWriter.write_table
    monkeypatch.setattr(
        pq.ParquetWriter, "write_table", lambda *given: held.append(pa.total_allocated_bytes()) or write(*given)
    )
    before = pa.total_allocated_bytes()
    fetch_section("s0", tmp_path / "s0", **HUB, folder=str(folder))
    assert len(held) > 40
    assert max(held) - before < many.nbytes / 4
