"""Members of archives: only their bytes travel, all are verified, and nothing that has arrived travels twice."""

import errno
import hashlib
import io
import shutil
import zipfile

import numpy as np
import pytest

from celldetr.fetch.members import fetch_members
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import held

MARKER = "experiment.xenium"
BIG = np.random.default_rng(0).bytes(3_000_000)
FILES = {
    MARKER: b"{}",
    "cells.parquet": b"cells" * 5000,
    "morphology_focus/dapi.tif": np.random.default_rng(1).bytes(900),
}


def archive(prefix="", extra=None):
    """Bytes of an archive whose wanted members lie around a large one."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as handle:
        handle.writestr(f"{prefix}{MARKER}", FILES[MARKER])
        handle.writestr(f"{prefix}transcripts.parquet", BIG)
        for name, data in list(FILES.items())[1:]:
            handle.writestr(f"{prefix}{name}", data, zipfile.ZIP_DEFLATED)
        for name, data in (extra or {}).items():
            handle.writestr(name, data)
    return out.getvalue()


def choose(names):
    missing = [name for name in FILES if name not in names]
    if missing:
        raise InputError(f"got no {missing}")
    return list(FILES)


@pytest.fixture
def url(web, monkeypatch):
    monkeypatch.setattr("celldetr.fetch.members._BLOCK", 1 << 16)
    web.files["/outs.zip"] = archive()
    return f"{web.url}/outs.zip"


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def get(urls, target, **options):
    return fetch_members(urls, target, choose, marker=MARKER, **options)


@pytest.mark.parametrize("prefix", ["", "sample_outs/"])
def test_only_the_members_travel(web, url, tmp_path, prefix):
    web.files["/outs.zip"] = archive(prefix)
    get([url], tmp_path / "outs", size=len(web.files["/outs.zip"]))
    assert content(tmp_path / "outs") == FILES
    assert web.sent < len(BIG) / 5
    assert [path.name for path in tmp_path.iterdir()] == ["outs"]


def test_broken_answers_are_asked_for_again(web, url, tmp_path):
    web.statuses, web.cuts = [503], [1, 10]
    get([url], tmp_path / "outs")
    assert content(tmp_path / "outs") == FILES


def test_members_that_have_arrived_do_not_travel_again(web, url, tmp_path):
    whole = web.files["/outs.zip"]
    damaged = bytearray(whole)
    damaged[whole.rindex(FILES["morphology_focus/dapi.tif"][:50]) + 200] ^= 1
    web.files["/outs.zip"] = bytes(damaged)
    with pytest.raises(InputError, match=r"(?s)no source delivered.*CRC"):
        get([url], tmp_path / "outs")
    assert not (tmp_path / "outs").exists()
    web.files["/outs.zip"] = whole
    times = (tmp_path / ".outs.part" / "cells.parquet").stat().st_mtime_ns
    get([url], tmp_path / "outs")
    assert content(tmp_path / "outs") == FILES
    assert (tmp_path / "outs" / "cells.parquet").stat().st_mtime_ns == times


def test_another_job_with_the_same_output_is_named(web, url, tmp_path):
    """Both would continue one folder, and the slower one publish what the other left."""
    (tmp_path / ".outs.part").mkdir()
    with held(tmp_path / ".outs.part"), pytest.raises(InputError, match=r"\.outs\.part: another job writes it"):
        get([url], tmp_path / "outs")
    assert web.requests == []
    get([url], tmp_path / "outs")


@pytest.mark.parametrize("lack", ["ranges", "states_size"])
def test_a_server_that_cannot_send_parts_sends_the_archive(web, url, tmp_path, lack):
    setattr(web, lack, False)
    get([url], tmp_path / "outs", sha256=hashlib.sha256(web.files["/outs.zip"]).hexdigest())
    assert content(tmp_path / "outs") == FILES


@pytest.mark.parametrize("kind", ["zip", "folder", "file url"])
def test_local_sources(tmp_path, kind):
    path = tmp_path / "raw.zip"
    path.write_bytes(archive())
    if kind == "folder":
        with zipfile.ZipFile(path) as handle:
            handle.extractall(tmp_path / "raw")
        path = tmp_path / "raw"
    get([path.as_uri() if kind == "file url" else str(path)], tmp_path / "outs")
    assert content(tmp_path / "outs") == FILES
    assert path.exists()


def test_wrong_archives_are_refused_by_size_and_checksum_and_the_next_source_is_tried(web, url, tmp_path):
    data = web.files["/outs.zip"]
    other = tmp_path / "other.zip"
    other.write_bytes(archive(extra={"more": b"more"}))
    sha = hashlib.sha256(data).hexdigest()
    with pytest.raises(InputError, match=r"(?s)other\.zip: .*checksum"):
        get([str(other)], tmp_path / "outs", sha256=sha)
    with pytest.raises(InputError, match=r"got an archive of \d+ bytes, expected 7"):
        get([url], tmp_path / "outs", size=7)
    get([str(other), url], tmp_path / "outs", size=len(data), sha256=sha)
    assert content(tmp_path / "outs") == FILES


def test_a_file_that_changes_while_it_is_read_is_refused(web, url, tmp_path):
    web.etags = ['"1"', '"1"', '"2"']
    with pytest.raises(InputError, match="changed while it was read"):
        get([url], tmp_path / "outs")


def test_what_is_missing_is_named_for_each_source(web, url, tmp_path):
    empty = tmp_path / "empty.zip"
    with zipfile.ZipFile(empty, "w") as handle:
        handle.writestr("readme.txt", "nothing")
    no = tmp_path / "text.zip"
    no.write_text("no archive")
    with pytest.raises(InputError) as error:
        get([f"{web.url}/gone", str(empty), str(no), str(tmp_path / "nowhere")], tmp_path / "outs")
    text = str(error.value)
    for words in ("HTTP 404", f"no {MARKER}", "expected zip", "no such file", "Start again"):
        assert words in text


def test_broken_members_lead_to_the_next_source(tmp_path):
    """Damaged LZMA data, and a member that is encrypted."""
    good = tmp_path / "good.zip"
    good.write_bytes(archive())
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as handle:
        for name, data in FILES.items():
            handle.writestr(name, data)
    damaged = bytearray((tmp_path / "lzma.zip").read_bytes())
    damaged[damaged.index(b"cells.parquet") + 13 : damaged.index(b"cells.parquet") + 40] = bytes(27)
    (tmp_path / "lzma.zip").write_bytes(damaged)
    encrypted = bytearray(archive())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := encrypted.find(signature, at + 1)) >= 0:
            encrypted[at + flags] |= 1
    (tmp_path / "encrypted.zip").write_bytes(encrypted)
    sources = [str(tmp_path / name) for name in ("lzma.zip", "encrypted.zip")]
    with pytest.raises(InputError, match=r"(?s)lzma\.zip: .*LZMAError.*encrypted\.zip: .*is encrypted"):
        get([*sources, "http://[::1/x"], tmp_path / "outs")
    get([*sources, "http://[::1/x", str(good)], tmp_path / "outs")
    assert content(tmp_path / "outs") == FILES


@pytest.mark.parametrize("ranges", [True, False])
def test_a_full_disk_is_named_before_anything_is_unpacked(web, url, tmp_path, monkeypatch, ranges):
    """And no other source is tried."""
    web.ranges = ranges
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 25_000))
    with pytest.raises(InputError, match=r"outs: the disk is full \(.* MiB needed in .* free some space") as error:
        get([url, str(tmp_path / "other.zip")], tmp_path / "outs")
    assert "other.zip" not in str(error.value)
    assert list((tmp_path / ".outs.part").iterdir()) == []
    monkeypatch.undo()
    get([url], tmp_path / "outs")


def test_a_disk_that_fills_up_while_unpacking_is_named(tmp_path, monkeypatch):
    def copy(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.zip").write_bytes(archive())
    monkeypatch.setattr(shutil, "copyfileobj", copy)
    with pytest.raises(InputError, match="the disk is full") as error:
        get([str(tmp_path / "a.zip"), str(tmp_path / "b.zip")], tmp_path / "outs")
    assert "no such file" not in str(error.value)


def test_members_cannot_leave_their_folder(tmp_path):
    path = tmp_path / "evil.zip"
    path.write_bytes(archive(extra={"../../evil.txt": b"evil"}))
    with pytest.raises(InputError, match="would leave its folder"):
        fetch_members([str(path)], tmp_path / "a" / "outs", lambda names: ["../../evil.txt"], marker=MARKER)
    assert not list(tmp_path.rglob("evil.txt"))
