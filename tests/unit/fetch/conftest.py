"""A web server whose misbehaviour a test sets."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from celldetr.fetch import http


class Site(BaseHTTPRequestHandler):
    """Serve `files` of the server, by ranges if asked."""

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):  # noqa: N802 - the name that http.server calls
        self.do_GET()

    def do_GET(self):  # noqa: N802 - likewise
        web = self.server
        web.requests.append((self.command, self.path, self.headers))
        status = web.statuses.pop(0) if web.statuses else 200
        path = self.path.partition("?")[0]
        if status != 200 or path not in web.files:
            self.send_error(status if status != 200 else 404)
        elif path in web.gated:
            self.send_gated(path)
        else:
            self.send_file(web.files[path])

    def send_gated(self, path):
        """Answer as the Hub does: a redirection to another host for those who may read."""
        web = self.server
        if self.headers.get("Authorization") != f"Bearer {web.token}":
            self.send_error(401)
            return
        self.send_response(302 if web.accepted else 403)
        if web.accepted:
            self.send_header("Location", f"http://localhost:{web.server_port}{web.gated[path]}?signed=1")
            for name, value in web.stated.items():
                self.send_header(name, value)
        else:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, data):
        web = self.server
        etag = web.etags.pop(0) if len(web.etags) > 1 else web.etags[0]
        start, stop = 0, len(data)
        status, headers = 200, {"ETag": etag}
        span = self.headers.get("Range")
        if span and web.ranges and self.headers.get("If-Range", etag) == etag:
            first, last = span.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or stop) + 1, stop)
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(data) if web.states_size else '*'}"
            if start >= len(data):
                status, headers["Content-Range"] = 416, f"bytes */{len(data)}"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(max(0, stop - start))} | web.headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        sent = data[start:stop][: web.cuts.pop(0) if web.cuts else None]
        web.sent += len(sent)
        if self.command == "GET":
            self.wfile.write(sent)
        self.close_connection = True


@pytest.fixture
def web(monkeypatch):
    """Serve files on this machine, and let downloads repeat requests without waiting."""
    monkeypatch.setattr(http, "PAUSE", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.gated, server.stated, server.token, server.accepted = {}, {}, {}, "", True
    server.ranges, server.states_size, server.etags, server.sent = True, True, ['"1"'], 0
    server.headers = {}  # in place of the right ones
    server.statuses, server.cuts, server.requests = [], [], []  # of the next answers; what was asked
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def use_hub(monkeypatch, tmp_path):
    """Let `huggingface_hub` ask another address, which it reads from HF_ENDPOINT when it is imported."""

    def use(url):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", "hf_secret123")

    return use
