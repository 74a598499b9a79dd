"""Files of HEST-1k (Jaume et al. 2024), a gated data set on Hugging Face, with the token of the person who runs this.

The token is read from the environment or from where `huggingface_hub` keeps it, sent in the header of requests to the
Hub alone, and written nowhere.
"""

import logging
import os
import re
from pathlib import Path

import requests

from celldetr.fetch.download import TIMEOUT, fetch
from celldetr.runtime.errors import InputError

REPOSITORY = "MahmoodLab/hest"
HUB = "https://huggingface.co"

log = logging.getLogger(__name__)


def slide_path(sample: str) -> str:
    """Path of a sample's slide in the repository."""
    return f"wsis/{sample}.tif"


def nuclei_path(sample: str) -> str:
    """Path of a sample's outlines of nuclei (by CellViT) in the repository."""
    return f"cellvit_seg/{sample}_cellvit_seg.parquet"


def fetch_hest(
    path: str, destination: str | os.PathLike[str], *, size: int | None = None, sha256: str | None = None
) -> Path:
    """Get one file of HEST-1k, resumed and verified; by the Hub's own checksum when none is given.

    Parameters
    ----------
    path
        In the repository, see `slide_path` and `nuclei_path`.
    destination
        File to write.
    size, sha256
        As in `celldetr.fetch.download.fetch`.

    Raises
    ------
    InputError
        No token, a token that may not read the data set, no such file, or the transfer failed.
    """
    headers = {"Authorization": f"Bearer {_token(path)}"}
    url = f"{os.environ.get('HF_ENDPOINT', '').rstrip('/') or HUB}/datasets/{REPOSITORY}/resolve/main/{path}"
    said_size, said_sha256 = _ask(url, path, headers)
    return fetch([url], destination, size=size or said_size, sha256=sha256 or said_sha256, headers=headers)


def _token(path: str) -> str:
    """Token from HF_TOKEN, or from the file that `hf auth login` writes."""
    found = os.environ.get("HF_TOKEN", "").strip()
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    if not found and file.is_file():
        found = file.read_text(encoding="utf-8", errors="replace").strip()
    if not found:
        raise InputError(f"HEST-1k: {path}: got no Hugging Face token, and the data set is gated. {_how()}")
    if not re.fullmatch(r"[!-~]+", found):  # requests would quote it in its error
        raise InputError(f"HEST-1k: {path}: the Hugging Face token holds blanks or line breaks. {_how()}")
    return found


def _how() -> str:
    return (
        f"Accept the terms at {HUB}/datasets/{REPOSITORY} with your account, make a token with read access at "
        f"{HUB}/settings/tokens, and set the environment variable HF_TOKEN to it (or run `hf auth login`); then start "
        "again. Or get the file by other means and give its path in column file of the slides sheet."
    )


def _ask(url: str, path: str, headers: dict[str, str]) -> tuple[int | None, str | None]:
    """Size and SHA-256 that the Hub states for a file; None where it does not answer as it should."""
    try:
        answer = requests.head(url, headers=headers, timeout=TIMEOUT, allow_redirects=False)
    except requests.RequestException as error:
        log.warning("%s: the Hub does not answer (%s)", path, error.__class__.__name__)
        return None, None
    if answer.status_code in (401, 403):
        why = "the token is not valid" if answer.status_code == 401 else "the account has not accepted the terms"
        raise InputError(f"HEST-1k: {path}: got HTTP {answer.status_code}: {why}, or may not read it. {_how()}")
    if answer.status_code == 404:
        raise InputError(
            f"HEST-1k: {path}: the repository has no such file; expected an id of its metadata table "
            f"({HUB}/datasets/{REPOSITORY}) in column hest of the slides sheet"
        )
    size = answer.headers.get("X-Linked-Size", "")
    checksum = answer.headers.get("X-Linked-ETag", "").strip('"')
    return int(size) if size.isdigit() else None, checksum if re.fullmatch(r"[0-9a-f]{64}", checksum) else None
