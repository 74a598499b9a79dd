"""Members of archives: only their bytes travel, all are verified, and nothing that has arrived travels twice."""

import hashlib
import io
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from celldetr.fetch.members import fetch_members
from celldetr.runtime.errors import InputError

MARKER = "experiment.xenium"
BIG = np.random.default_rng(0).bytes(30_000_000)
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


class Server(BaseHTTPRequestHandler):
    def __init__(self, state, *arguments):
        self.state = state
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def do_GET(self):  # noqa: N802 - the name that http.server calls
        state = self.state
        if state["statuses"]:
            self.send_error(state["statuses"].pop(0))
            return
        data, span = state["data"], self.headers.get("Range")
        if span and state["ranges"]:
            first, last = (int(text) for text in span.removeprefix("bytes=").split("-"))
            piece = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(piece) - 1}/{len(data)}")
        else:
            piece = data
            self.send_response(200)
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("ETag", state["etags"].pop(0) if len(state["etags"]) > 1 else state["etags"][0])
        self.end_headers()
        state["sent"] += len(piece)
        if state["sent"] > state["limit"]:
            state["limit"] = 1 << 40
            piece = piece[: len(piece) // 2]
        self.wfile.write(piece)
        self.close_connection = True


@pytest.fixture
def server():
    state = {"data": archive(), "ranges": True, "etags": ['"1"'], "statuses": [], "sent": 0, "limit": 1 << 40}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, state))
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/outs.zip", state
    httpd.shutdown()
    httpd.server_close()


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def get(urls, target, **options):
    return fetch_members(urls, target, choose, marker=MARKER, pause=0.01, **options)


@pytest.mark.parametrize("prefix", ["", "sample_outs/"])
def test_only_the_members_travel(server, tmp_path, monkeypatch, prefix):
    monkeypatch.setattr("celldetr.fetch.members._BLOCK", 1 << 16)
    url, state = server
    state["data"] = archive(prefix)
    get([url], tmp_path / "outs", size=len(state["data"]))
    assert content(tmp_path / "outs") == FILES
    assert state["sent"] < len(BIG) / 20
    assert [path.name for path in tmp_path.iterdir()] == ["outs"]


def test_broken_answers_are_asked_for_again(server, tmp_path):
    url, state = server
    state["statuses"], state["limit"] = [503], 10
    get([url], tmp_path / "outs")
    assert content(tmp_path / "outs") == FILES


def test_members_that_have_arrived_do_not_travel_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr("celldetr.fetch.members._BLOCK", 1 << 16)
    url, state = server
    whole = state["data"]
    damaged = bytearray(whole)
    place = (
        whole.rindex(FILES["morphology_focus/dapi.tif"][:50])
        if FILES["morphology_focus/dapi.tif"][:50] in whole
        else -1
    )
    assert place > 0
    damaged[place + 200] ^= 1
    state["data"] = bytes(damaged)
    with pytest.raises(InputError, match=r"(?s)no source delivered.*CRC"):
        get([url], tmp_path / "outs")
    assert not (tmp_path / "outs").exists()
    state["data"], state["sent"] = whole, 0
    times = (tmp_path / ".outs.part" / "cells.parquet").stat().st_mtime_ns
    get([url], tmp_path / "outs")
    assert content(tmp_path / "outs") == FILES
    assert (tmp_path / "outs" / "cells.parquet").stat().st_mtime_ns == times


def test_a_server_without_ranges_sends_the_archive(server, tmp_path):
    url, state = server
    state["ranges"] = False
    get([url], tmp_path / "outs", sha256=hashlib.sha256(state["data"]).hexdigest())
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


def test_wrong_archives_are_refused_by_size_and_checksum_and_the_next_source_is_tried(server, tmp_path):
    url, state = server
    other = tmp_path / "other.zip"
    other.write_bytes(archive(extra={"more": b"more"}))
    sha = hashlib.sha256(state["data"]).hexdigest()
    with pytest.raises(InputError, match=r"(?s)other\.zip: .*checksum"):
        get([str(other)], tmp_path / "outs", sha256=sha)
    with pytest.raises(InputError, match=r"got an archive of \d+ bytes, expected 7"):
        get([url], tmp_path / "outs", size=7)
    get([str(other), url], tmp_path / "outs", size=len(state["data"]), sha256=sha)
    assert content(tmp_path / "outs") == FILES


def test_a_file_that_changes_while_it_is_read_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr("celldetr.fetch.members._BLOCK", 1 << 16)
    url, state = server
    state["etags"] = ['"1"', '"1"', '"2"']
    with pytest.raises(InputError, match="changed while it was read"):
        get([url], tmp_path / "outs")


def test_what_is_missing_is_named_for_each_source(server, tmp_path):
    url, state = server
    state["statuses"] = [404]
    empty = tmp_path / "empty.zip"
    with zipfile.ZipFile(empty, "w") as handle:
        handle.writestr("readme.txt", "nothing")
    no = tmp_path / "text.zip"
    no.write_text("no archive")
    with pytest.raises(InputError) as error:
        get([url, str(empty), str(no), str(tmp_path / "nowhere")], tmp_path / "outs")
    text = str(error.value)
    for words in ("HTTP 404", f"no {MARKER}", "not a zip file", "no such file or folder", "Start again later"):
        assert words in text


def test_members_cannot_leave_their_folder(tmp_path):
    path = tmp_path / "evil.zip"
    path.write_bytes(archive(extra={"../../evil.txt": b"evil"}))
    with pytest.raises(InputError, match="would leave its folder"):
        fetch_members([str(path)], tmp_path / "a" / "outs", lambda names: ["../../evil.txt"], marker=MARKER)
    assert not list(tmp_path.rglob("evil.txt"))
