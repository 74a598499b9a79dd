"""Downloads: mirrors, resuming, verification, and what a user is told when it does not work."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from celldetr.fetch import download, http
from celldetr.fetch.download import fetch
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import held

DATA = (b"PK\x03\x04" + bytes(range(256)) * 4000)[:1024000]
SIZE = len(DATA)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def url(web):
    web.files["/fold_1.zip"] = DATA
    return f"{web.url}/fold_1.zip"


@pytest.fixture
def get(tmp_path, monkeypatch):
    """Fetch into a folder of its own."""

    def call(*urls, size=SIZE, sha256=SHA, tries=5, **options):
        monkeypatch.setattr(http, "TRIES", tries)
        return fetch(urls, tmp_path / "raw" / "fold_1.zip", size=size, sha256=sha256, **options)

    return call


def only(path):
    assert path.read_bytes() == DATA
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def ranges(web):
    return [headers.get("Range") for _, _, headers in web.requests]


def test_broken_transfers_are_continued_where_they_stopped(web, url, get):
    web.cuts = [300_000, 400_000]
    only(get(url))
    assert ranges(web) == [None, "bytes=300000-", "bytes=700000-"]


def test_a_later_call_continues_an_earlier_one(web, url, get):
    web.cuts = [500_000]
    with pytest.raises(InputError, match="the transfer ended after 500000 of 1024000 bytes"):
        get(url, tries=1)
    only(get(url))
    assert ranges(web)[-1] == "bytes=500000-"


def test_another_job_with_the_same_output_is_named(get, url, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / ".fold_1.zip.part").touch()
    with (
        held(tmp_path / "raw" / ".fold_1.zip.part"),
        pytest.raises(InputError, match=r"\.fold_1\.zip\.part: another job writes it"),
    ):
        get(url)
    only(get(url))


def test_what_is_kept_to_continue_does_not_hold_the_credentials_of_the_url(web, url, get, tmp_path):
    secret, web.cuts = f"{url.replace('://', '://me:S3cret@')}?sig=S3cret", [500_000]
    with pytest.raises(InputError):
        get(secret, tries=1, sha256=None)
    assert b"S3cret" not in (tmp_path / "raw" / ".fold_1.zip.part.json").read_bytes()
    only(get(secret, sha256=None))
    assert ranges(web)[-1] == "bytes=500000-"


def test_a_server_without_ranges_sends_all_again(web, url, get):
    web.cuts, web.ranges = [500_000], False
    only(get(url))


@pytest.mark.parametrize("etag", [None, 'W/"1"', '"2"'])
@pytest.mark.parametrize("sha256", [SHA, None])
def test_a_file_that_changed_meanwhile_is_not_spliced(web, url, get, etag, sha256):
    web.files["/fold_1.zip"], web.cuts = DATA[::-1], [500_000]
    web.etags = ['"1"' if etag == '"2"' else etag]
    with pytest.raises(InputError):
        get(url, tries=1, sha256=sha256)
    web.files["/fold_1.zip"], web.etags = DATA, [etag]
    only(get(url, sha256=sha256))


def test_without_a_checksum_the_same_version_is_continued(web, url, get):
    web.cuts = [500_000]
    only(get(url, sha256=None))
    assert ranges(web)[-1] == "bytes=500000-"
    assert web.requests[-1][2]["If-Range"] == '"1"'


@pytest.mark.parametrize("arrived", [DATA, DATA + b"more"])
def test_a_part_that_was_complete_or_is_too_long_is_no_dead_end(web, url, get, tmp_path, arrived):
    part = tmp_path / "raw" / ".fold_1.zip.part"
    part.parent.mkdir()
    part.write_bytes(arrived)
    only(get(url, size=None))
    assert len(web.requests) == (1 if arrived == DATA else 2)


def test_a_part_of_an_unknown_mirror_is_not_continued_without_a_checksum(web, url, get, tmp_path):
    part = tmp_path / "raw" / ".fold_1.zip.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 1000)
    only(get(url, sha256=None))
    assert ranges(web) == [None]


def test_temporary_errors_are_tried_again_and_lasting_ones_are_not(web, url, get):
    web.statuses = [503, 429]
    only(get(url))
    web.statuses, web.requests = [404] * 9, []
    with pytest.raises(InputError, match="HTTP 404"):
        get(url)
    assert len(web.requests) == 1


def test_the_next_mirror_is_tried_and_all_failures_are_listed(web, url, get, tmp_path):
    only(get("http://127.0.0.1:9/nobody", f"{web.url}/gone", url, tries=1))
    with pytest.raises(InputError) as error:
        get("http://127.0.0.1:9/nobody", str(tmp_path / "missing.zip"), tries=1)
    message = str(error.value)
    assert "http://127.0.0.1:9/nobody: the connection failed" in message
    assert "missing.zip: no such file" in message
    assert "give its path as a source" in message


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "abc"},
        {"Content-Range": "bytes */1024000"},
        {"Content-Range": "bytes 500000-1023999/many"},
        {"Content-Range": None},
        {"Content-Range": "x"},
    ],
    ids=str,
)
def test_an_answer_that_makes_no_sense_leads_to_the_next_mirror(web, url, get, tmp_path, headers):
    web.headers, web.cuts = headers, [500_000]
    copy = tmp_path / "copy.zip"
    copy.write_bytes(DATA)
    only(get(url, str(copy), tries=2))


def test_a_file_that_does_not_end_is_not_received(web, url, get, monkeypatch):
    monkeypatch.setattr(download, "BLOCK", 1000)
    web.headers = {"Content-Length": None}
    with pytest.raises(InputError, match="got more than the expected 5000 bytes"):
        get(url, size=5000)


@pytest.mark.parametrize("address", ["http://[::1/x.zip", "http://:99999/x.zip", "https://", "http://\x00/"])
def test_an_address_that_is_none_leads_to_the_next_mirror(url, get, address):
    only(get(address, url))
    with pytest.raises(InputError, match="the address is not valid"):
        get(address)
    with pytest.raises(InputError, match=r"got s3://, expected http\(s\)://, file:// or a path"):
        get("s3://bucket/fold_1.zip")


HTML = b"\n<!-- x -->\n<!DOCTYPE html><html><body>Log in</body></html>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.svs", HTML, r"a web page \(HTML\)"),
        ("outlines.geojson", HTML, r"a web page \(HTML\)"),
        ("a.tif", b'{"error": "forbidden"}', "expected TIFF"),
        ("a.h5ad", b"PK\x03\x04", "expected HDF5"),
        ("a.parquet", b"PK", "expected Parquet"),
        ("a.tif", b"", r"an empty file \(0 bytes\)"),
    ],
)
def test_what_is_not_what_its_name_says_is_not_kept(web, get, tmp_path, name, content, message):
    web.files[f"/{name}"] = content
    with pytest.raises(InputError, match=message):
        get(f"{web.url}/{name}?download=1", size=None, sha256=None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{message}(?s:.*)local files: correct their paths in the sheet") as error:
        get(str(tmp_path / name), size=None, sha256=None)
    assert "Start again" not in str(error.value)
    assert list((tmp_path / "raw").iterdir()) == []


def test_formats_without_a_signature_are_taken_as_they_are(web, tmp_path):
    for name, content in {"a.csv": b"1,0,0", "b.geojson": b"{}", "slide": b"x", "c.svs": b"MM\0*"}.items():
        web.files[f"/{name}"] = content
        assert fetch([f"{web.url}/{name}"], tmp_path / "slide.tif").read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sha256": "0" * 64}, "checksum: got sha256"), ({"size": 10}, "got 1024000 bytes, expected 10")],
)
def test_wrong_content_never_gets_the_name_and_is_not_kept(url, get, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        get(url, **options)
    assert list((tmp_path / "raw").iterdir()) == []
    only(get(url, sha256=SHA[:8]))


def test_local_files_are_verified_and_left_alone(get, tmp_path):
    source = tmp_path / "my archive.zip"
    source.write_bytes(DATA)
    for where in (source.as_uri(), str(source)):
        only(get(where))
        with pytest.raises(InputError, match="checksum"):
            get(where, sha256="1" * 64)
    assert source.read_bytes() == DATA


def test_a_new_time_of_a_result_is_not_that_of_the_users_file(get, tmp_path):
    """Snakemake gives its outputs a new time; of a file in two rows, all results of the other row would be old."""
    source = tmp_path / "own.zip"
    source.write_bytes(DATA)
    before = source.stat().st_mtime_ns
    final = get(str(source))
    os.utime(final, (1, 1), follow_symlinks=False)
    assert source.stat().st_mtime_ns == before
    only(get(str(final)))  # a result that is named as its own source stays what it is


def test_links_to_files_of_the_working_folder_move_with_it(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    Path("own.zip").write_bytes(DATA)
    fetch(["own.zip"], "results/raw/fold_1.zip")
    (tmp_path / "old").rename(tmp_path / "new")
    only(tmp_path / "new" / "results" / "raw" / "fold_1.zip")


def test_a_full_disk_is_named_before_the_transfer(url, get, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match=r"the disk is full \(1\.0 MiB needed"):
        get(url)


def test_a_disk_that_fills_up_keeps_what_has_arrived(web, url, get, tmp_path, monkeypatch):
    def receive(response, part, start, total):
        part.write_bytes(DATA[:1000])
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(download, "_receive", receive)
        with pytest.raises(InputError, match="the disk is full"):
            get(url)
    only(get(url))
    assert ranges(web)[-1] == "bytes=1000-"


def test_progress_is_logged(url, get, monkeypatch, caplog):
    monkeypatch.setattr(download, "_REPORT_SECONDS", -1)
    monkeypatch.setattr(download, "BLOCK", 100_000)
    with caplog.at_level("INFO"):
        get(url)
    assert "of 1.0 MiB, 100 %" in caplog.text
    assert "verified" in caplog.text
