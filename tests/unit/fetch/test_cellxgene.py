"""Links of CELLxGENE datasets, against a server that answers like its API."""

import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from celldetr.fetch.cellxgene import FILES, dataset_url
from celldetr.runtime.errors import InputError

VERSION = "11111111-2222-3333-4444-555555555555"
DATASETS = [
    {
        "title": "core atlas",
        "dataset_id": "id-1",
        "dataset_version_id": VERSION,
        "assets": [{"filetype": "RDS", "url": "https://x/1.rds"}, {"filetype": "H5AD", "url": "https://x/1.h5ad"}],
    },
    {"title": "extended atlas", "dataset_id": "id-2", "dataset_version_id": "v2", "assets": []},
]


class Server(BaseHTTPRequestHandler):
    def __init__(self, answer, *arguments):
        self.answer = answer
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def do_GET(self):  # noqa: N802 - the name that http.server calls
        known = self.path == "/collections/collection"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(self.answer if known else b"{}")


@pytest.fixture(scope="module")
def api():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, json.dumps({"datasets": DATASETS}).encode()))
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("name", ["core atlas", "id-1", VERSION])
def test_a_dataset_is_found_by_title_id_or_version(api, name):
    assert dataset_url("collection", name, api=api) == "https://x/1.h5ad"


def test_an_earlier_version_has_a_lasting_address(api):
    earlier = "99999999-2222-3333-4444-555555555555"
    assert dataset_url("collection", earlier, api=api) == f"{FILES}/{earlier}.h5ad"


def test_what_is_not_there_is_named(api):
    with pytest.raises(InputError, match="got no dataset 'lung', expected one of: core atlas; extended atlas"):
        dataset_url("collection", "lung", api=api)
    with pytest.raises(InputError, match=r"collection other: cannot be read .*404"):
        dataset_url("other", "core atlas", api=api)
    with pytest.raises(InputError, match="cannot be read"):
        dataset_url("collection", "core atlas", api="http://127.0.0.1:9")
