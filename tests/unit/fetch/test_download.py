"""Downloads: mirrors, resuming, verification, and what a user is told when it does not work."""

import errno
import hashlib
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from celldetr.fetch import download
from celldetr.fetch.download import fetch
from celldetr.runtime.errors import InputError

DATA = bytes(range(256)) * 4000
SIZE = len(DATA)
SHA = hashlib.sha256(DATA).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serve DATA; the behaviour of the next answers is set by the test."""

    def __init__(self, behaviour, *arguments):
        self.behaviour = behaviour
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def do_GET(self):  # noqa: N802 - the name that http.server calls
        want = self.behaviour
        want["requests"].append(dict(self.headers))
        status = want["statuses"].pop(0) if want["statuses"] else 200
        if status != 200:
            self.send_error(status)
            return
        data, start = want["data"], 0
        span = self.headers.get("Range")
        unchanged = self.headers.get("If-Range", want["etag"]) == want["etag"]
        if span and want["ranges"] and unchanged:
            start = int(span.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        if want["etag"]:
            self.send_header("ETag", want["etag"])
        self.end_headers()
        stop = want["cuts"].pop(0) if want["cuts"] else len(data)
        self.wfile.write(data[start:stop])
        self.close_connection = True


@pytest.fixture
def server():
    """Serve files on this machine; yields (url, behaviour)."""
    behaviour = {"data": DATA, "ranges": True, "etag": '"1"', "cuts": [], "statuses": [], "requests": []}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, behaviour))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/fold_1.zip", behaviour
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def get(tmp_path):
    """Fetch into a folder of its own, without waiting between tries."""

    def call(*urls, size=SIZE, sha256=SHA, **options):
        return fetch(urls, tmp_path / "raw" / "fold_1.zip", size=size, sha256=sha256, pause=0, **options)

    return call


def only(path):
    assert path.read_bytes() == DATA
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_whole_file_and_nothing_beside_it(server, get):
    only(get(server[0]))


def test_broken_transfers_are_continued_where_they_stopped(server, get):
    url, behaviour = server
    behaviour["cuts"] = [300_000, 700_000]
    only(get(url))
    assert [headers.get("Range") for headers in behaviour["requests"]] == [None, "bytes=300000-", "bytes=700000-"]


def test_a_later_call_continues_an_earlier_one(server, get):
    url, behaviour = server
    behaviour["cuts"] = [500_000]
    with pytest.raises(InputError, match="the transfer ended after 500000 of 1024000 bytes"):
        get(url, tries=1)
    only(get(url))
    assert behaviour["requests"][-1]["Range"] == "bytes=500000-"


def test_a_server_without_ranges_sends_all_again(server, get):
    url, behaviour = server
    behaviour.update(cuts=[500_000], ranges=False)
    only(get(url))


def test_a_file_that_changed_meanwhile_is_not_spliced(server, get):
    url, behaviour = server
    behaviour.update(data=DATA[::-1], cuts=[500_000])
    with pytest.raises(InputError):
        get(url, tries=1)
    behaviour.update(data=DATA, etag='"2"')
    only(get(url))


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
@pytest.mark.parametrize("sha256", [SHA, None])
def test_a_change_that_no_validator_shows_is_not_spliced(server, get, etag, sha256):
    url, behaviour = server
    behaviour.update(data=DATA[::-1], cuts=[500_000], etag=etag)
    with pytest.raises(InputError):
        get(url, tries=1, sha256=sha256)
    behaviour["data"] = DATA
    only(get(url, sha256=sha256))


def test_without_a_checksum_the_same_version_is_continued(server, get):
    url, behaviour = server
    behaviour["cuts"] = [500_000]
    only(get(url, sha256=None))
    assert behaviour["requests"][-1]["Range"] == "bytes=500000-"
    assert behaviour["requests"][-1]["If-Range"] == '"1"'


@pytest.mark.parametrize("arrived", [DATA, DATA + b"more"])
def test_a_part_that_was_complete_or_is_too_long_is_no_dead_end(server, get, tmp_path, arrived):
    part = tmp_path / "raw" / ".fold_1.zip.part"
    part.parent.mkdir()
    part.write_bytes(arrived)
    only(get(server[0], size=None))
    assert len(server[1]["requests"]) == (1 if arrived == DATA else 2)


def test_a_part_of_an_unknown_mirror_is_not_continued_without_a_checksum(server, get, tmp_path):
    url, behaviour = server
    part = tmp_path / "raw" / ".fold_1.zip.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 1000)
    only(get(url, sha256=None))
    assert "Range" not in behaviour["requests"][0]


def test_temporary_errors_are_tried_again_and_lasting_ones_are_not(server, get):
    url, behaviour = server
    behaviour["statuses"] = [503, 429]
    only(get(url))
    behaviour["statuses"], behaviour["requests"] = [404] * 9, []
    with pytest.raises(InputError, match="HTTP 404"):
        get(url)
    assert len(behaviour["requests"]) == 1


def test_the_next_mirror_is_tried_and_all_failures_are_listed(server, get, tmp_path):
    url, behaviour = server
    behaviour["statuses"] = [404]
    only(get("http://127.0.0.1:9/nobody", url.replace("fold_1", "gone"), url, tries=1))
    with pytest.raises(InputError) as error:
        get("http://127.0.0.1:9/nobody", str(tmp_path / "missing.zip"), tries=1)
    message = str(error.value)
    assert "http://127.0.0.1:9/nobody: the connection failed" in message
    assert "missing.zip: no such file" in message
    assert "give its path as a source" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sha256": "0" * 64}, "checksum: got sha256"), ({"size": 10}, "got 1024000 bytes, expected 10")],
)
def test_wrong_content_never_gets_the_name_and_is_not_kept(server, get, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        get(server[0], **options)
    assert list((tmp_path / "raw").iterdir()) == []
    only(get(server[0]))


def test_first_digits_of_a_checksum_are_enough(server, get):
    only(get(server[0], sha256=SHA[:8]))
    with pytest.raises(InputError, match="checksum"):
        get(server[0], sha256="0" * 8)


@pytest.mark.parametrize("kind", ["path", "url"])
def test_local_files_are_verified_and_left_alone(get, tmp_path, kind):
    source = tmp_path / "my archive.zip"
    source.write_bytes(DATA)
    where = source.as_uri() if kind == "url" else str(source)
    only(get(where))
    with pytest.raises(InputError, match="checksum"):
        get(where, sha256="1" * 64)
    assert source.read_bytes() == DATA


def test_a_killed_copy_of_a_local_file_is_never_written_to(server, get, tmp_path):
    source = tmp_path / "mine.zip"
    source.write_bytes(b"mine")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / ".fold_1.zip.copy").hardlink_to(source)
    get(server[0])
    assert source.read_bytes() == b"mine"


def test_a_full_disk_is_named_before_the_transfer(server, get, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match=r"the disk is full .* free 1\.0 MiB"):
        get(server[0])


def test_a_disk_that_fills_up_keeps_what_has_arrived(server, get, tmp_path, monkeypatch):
    def pieces(response):
        yield DATA[:1000]
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(download, "_pieces", pieces)
        with pytest.raises(InputError, match="the disk is full"):
            get(server[0])
    assert (tmp_path / "raw" / ".fold_1.zip.part").stat().st_size == 1000
    only(get(server[0]))
    assert server[1]["requests"][-1]["Range"] == "bytes=1000-"


def test_progress_is_told(server, get, monkeypatch, caplog):
    monkeypatch.setattr(download, "_REPORT_SECONDS", -1)
    monkeypatch.setattr(download, "BLOCK", 100_000)
    with caplog.at_level("INFO"):
        get(server[0])
    assert "of 1.0 MiB, 100 %" in caplog.text
    assert "verified" in caplog.text
