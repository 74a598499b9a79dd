"""Links of CELLxGENE datasets, from a server that answers like its API."""

import json

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


@pytest.fixture
def api(web):
    web.files["/collections/collection"] = json.dumps({"datasets": DATASETS}).encode()
    return web.url


def test_a_dataset_is_found_by_title_id_or_version(web, api):
    web.statuses = [503]  # asked again
    for name in ("core atlas", "id-1", VERSION):
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


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b'{"datasets": ["x"]}', b'{"datasets": [{"title": "t", "assets": 1}]}']
)
def test_an_answer_of_another_form_is_named(web, answer):
    web.files["/collections/other"] = answer
    with pytest.raises(InputError, match="collection other: cannot be read"):
        dataset_url("other", "t", api=web.url)
