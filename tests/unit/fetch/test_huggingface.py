"""HEST-1k: the token reaches the Hub and nothing else, and what a user is told when it does not work."""

import hashlib

import pytest
from huggingface_hub import constants

from celldetr.fetch.huggingface import REPOSITORY, fetch_hest, nuclei_path, slide_path
from celldetr.runtime.errors import InputError

DATA = b"II*\0" + bytes(range(256)) * 300
SHA = hashlib.sha256(DATA).hexdigest()
TOKEN = "hf_secret123"


@pytest.fixture
def hub(web, use_hub):
    """Serve a gated repository of which two files exist; there is no token but that of the test."""
    for path in (slide_path("TENX1"), nuclei_path("TENX1")):
        web.files[f"/datasets/{REPOSITORY}/resolve/main/{path}"] = DATA
        web.gated[f"/datasets/{REPOSITORY}/resolve/main/{path}"] = "/storage"
    web.files["/storage"] = DATA
    web.token, web.stated = TOKEN, {"X-Linked-Size": str(len(DATA)), "X-Linked-ETag": f'"{SHA}"'}
    use_hub(web.url)
    return web


@pytest.mark.parametrize("place", ["environment", "file"])
def test_files_are_had_with_the_token_of_the_user(hub, tmp_path, monkeypatch, caplog, place):
    caplog.set_level("DEBUG", logger="celldetr")
    if place == "file":
        monkeypatch.delenv("HF_TOKEN")
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "token").write_text(f"{TOKEN}\n")
    hub.cuts = [30_000]
    got = fetch_hest(slide_path("TENX1"), tmp_path / "raw" / "slide")
    assert got.read_bytes() == DATA
    assert hub.sent == len(DATA)  # the broken transfer was continued
    assert TOKEN not in caplog.text
    assert [file.name for file in (tmp_path / "raw").iterdir()] == ["slide"]
    stored = [headers.get("Authorization") for _, path, headers in hub.requests if path.startswith("/storage")]
    assert stored == [None, None]  # the storage host does not get the token


def test_the_checksum_of_the_hub_is_used(hub, tmp_path):
    hub.files["/storage"] = DATA[:-1] + b"!"
    with pytest.raises(InputError, match="checksum"):
        fetch_hest(slide_path("TENX1"), tmp_path / "n")
    hub.stated = {}
    assert fetch_hest(slide_path("TENX1"), tmp_path / "n").stat().st_size == len(DATA)
    with pytest.raises(InputError, match="checksum"):
        fetch_hest(slide_path("TENX1"), tmp_path / "m", sha256="0" * 64)


def message(tmp_path, path="wsis/TENX1.tif"):
    with pytest.raises(InputError) as caught:
        fetch_hest(path, tmp_path / "n")
    text = str(caught.value)
    assert TOKEN not in text
    return text


def test_the_user_is_told_what_to_do(hub, tmp_path, monkeypatch):
    hub.accepted = False
    text = message(tmp_path)
    assert "403: the account has not accepted the terms" in text
    assert f"https://huggingface.co/datasets/{REPOSITORY}" in text
    hub.accepted = True
    assert "column hest" in message(tmp_path, slide_path("TENX2"))
    hub.statuses = [500] * 9
    assert "got HTTP 500" in message(tmp_path)
    hub.statuses = []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    text = message(tmp_path)
    assert "401: the token is not valid" in text
    assert "hf_wrong" not in text
    hub.requests.clear()
    monkeypatch.delenv("HF_TOKEN")
    text = message(tmp_path)
    assert "no Hugging Face token" in text
    assert "HF_TOKEN" in text
    assert not hub.requests  # nothing is asked without a token


def test_a_hub_that_does_not_answer_or_offline_mode_is_named(tmp_path, monkeypatch, use_hub):
    use_hub("http://127.0.0.1:9")
    assert "http://127.0.0.1:9/datasets/MahmoodLab/hest/resolve/main/wsis/TENX1.tif cannot be" in message(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in message(tmp_path)
