"""HEST-1k: the token goes where it must and nowhere else, and what a user is told when it does not work."""

import hashlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from celldetr.fetch import download
from celldetr.fetch.huggingface import REPOSITORY, fetch_hest, nuclei_path, slide_path
from celldetr.runtime.errors import InputError

DATA = bytes(range(256)) * 300
SHA = hashlib.sha256(DATA).hexdigest()
TOKEN = "hf_secret123"


class Hub(BaseHTTPRequestHandler):
    """Answer as the Hub does: gated, a redirection to a storage host, resumable."""

    def __init__(self, state, *arguments):
        self.state = state
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):  # noqa: N802 - the name that http.server calls
        self.answer()

    def do_GET(self):  # noqa: N802 - likewise
        self.answer()

    def answer(self):
        state, path = self.state, self.path
        given = self.headers.get("Authorization")
        state["seen"].append((self.command, self.headers["Host"], path, given))
        if path.startswith("/storage"):
            self.send_storage()
        elif given != f"Bearer {TOKEN}":
            self.send_error(401)
        elif not state["accepted"]:
            self.send_error(403)
        elif path not in state["files"]:
            self.send_error(404)
        else:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/storage?signed=1")
            if state["states"]:
                self.send_header("X-Linked-Size", str(len(DATA)))
                self.send_header("X-Linked-ETag", f'"{SHA}"')
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send_storage(self):
        state, start = self.state, 0
        if span := self.headers.get("Range"):
            start = int(span.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(DATA) - start))
        self.send_header("ETag", '"storage"')
        self.end_headers()
        stop = state["cuts"].pop(0) if state["cuts"] else len(DATA)
        state["sent"].append(stop - start)
        self.wfile.write(state["data"][start:stop])
        self.close_connection = True


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serve a gated repository; yields its state. There is no token but that of the test."""
    files = {f"/datasets/{REPOSITORY}/resolve/main/{path('TENX1')}" for path in (slide_path, nuclei_path)}
    state = {"files": files, "accepted": True, "states": True, "cuts": [], "seen": [], "sent": [], "data": DATA}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, state))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("place", ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME"])
def test_files_are_had_with_the_token_of_the_user(hub, tmp_path, monkeypatch, caplog, place):
    caplog.set_level("DEBUG", logger="celldetr")
    if place == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    else:
        file = tmp_path / "home" / "token"
        file.parent.mkdir()
        file.write_text(f"{TOKEN}\n")
        if place == "HF_TOKEN_PATH":
            monkeypatch.setenv("HF_TOKEN_PATH", str(file))
            monkeypatch.setenv("HF_HOME", "/nowhere")
    got = fetch_hest(slide_path("TENX1"), tmp_path / "raw" / "slide")
    assert got.read_bytes() == DATA
    assert TOKEN not in caplog.text
    kept = [file.read_bytes() for file in (tmp_path / "raw").iterdir()]
    assert not any(TOKEN.encode() in data for data in kept)
    stored = [given for _, _, path, given in hub["seen"] if path.startswith("/storage")]
    assert stored == [None]  # the storage host does not get the token
    assert len(hub["seen"]) == 3  # asked, redirected, sent


def test_a_broken_transfer_goes_on_where_it_ended(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub["cuts"] = [30_000, 50_000]
    assert fetch_hest(nuclei_path("TENX1"), tmp_path / "n").read_bytes() == DATA
    assert sum(hub["sent"]) == len(DATA)


def test_the_checksum_of_the_hub_is_used(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub["data"] = DATA[:-1] + b"!"
    with pytest.raises(InputError, match="checksum"):
        fetch_hest(slide_path("TENX1"), tmp_path / "n")
    hub["states"] = False
    assert fetch_hest(slide_path("TENX1"), tmp_path / "n").stat().st_size == len(DATA)
    with pytest.raises(InputError, match="checksum"):
        fetch_hest(slide_path("TENX1"), tmp_path / "m", sha256="0" * 64)


def tell(tmp_path, path=None):
    with pytest.raises(InputError) as caught:
        fetch_hest(path or slide_path("TENX1"), tmp_path / "n")
    text = str(caught.value)
    assert TOKEN not in text
    return text


def test_the_user_is_told_what_to_do(hub, tmp_path, monkeypatch):
    text = tell(tmp_path)
    assert "no Hugging Face token" in text
    assert "HF_TOKEN" in text
    assert not hub["seen"]  # nothing is asked without a token
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    text = tell(tmp_path)
    assert "401" in text
    assert "hf_wrong" not in text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub["accepted"] = False
    text = tell(tmp_path)
    assert "403" in text
    assert f"https://huggingface.co/datasets/{REPOSITORY}" in text
    hub["accepted"] = True
    assert "column hest" in tell(tmp_path, slide_path("TENX2"))
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN} x")
    assert "blanks" in tell(tmp_path)


def test_a_hub_that_does_not_answer_is_told_without_the_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    assert "connection failed" in tell(tmp_path)
    assert all(TOKEN not in json.dumps(file.name) for file in tmp_path.iterdir())
