"""Files of HEST-1k (Jaume et al. 2024), a gated data set on Hugging Face, read with the token of the user.

`huggingface_hub` finds the token and the Hub (or the mirror in HF_ENDPOINT) and checks the access. The transfer is that
of `celldetr.fetch.download`, because `huggingface_hub` starts a file of several GB afresh after an interruption.
"""

import os
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from celldetr.fetch.download import fetch
from celldetr.runtime.errors import InputError

REPOSITORY = "MahmoodLab/hest"
_PAGE = f"https://huggingface.co/datasets/{REPOSITORY}"
_ADVICE = (
    f"Accept the terms at {_PAGE} with your account, make a token with read access at "
    "https://huggingface.co/settings/tokens, and set the environment variable HF_TOKEN to it (or run `hf auth login`); "
    "then start again. Or get the file by other means and give its path in column file of the slides sheet."
)


def slide_path(sample: str) -> str:
    """Path of a sample's slide in the repository."""
    return f"wsis/{sample}.tif"


def nuclei_path(sample: str) -> str:
    """Path of a sample's outlines of nuclei (by CellViT) in the repository."""
    return f"cellvit_seg/{sample}_cellvit_seg.parquet"


def fetch_hest(
    path: str, destination: str | os.PathLike[str], *, size: int | None = None, sha256: str | None = None
) -> Path:
    """Get one file of HEST-1k, resumed and verified, by the Hub's own size and checksum where none is given.

    `path` lies in the repository, see `slide_path` and `nuclei_path`; `size` and `sha256` as in `fetch`.

    Raises
    ------
    InputError
        No token, a token that may not read the data set, no such file, no connection, or the transfer failed.
    """
    token = get_token()
    if not token:
        raise InputError(f"HEST-1k: {path}: got no Hugging Face token, and the data set is gated. {_ADVICE}")
    url = hf_hub_url(REPOSITORY, path, repo_type="dataset")
    try:
        stated = get_hf_file_metadata(url, token=token, retry_on_errors=True)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 404:
            text = f"the repository has no such file; expected an id of its metadata table ({_PAGE}) in column hest of "
            raise InputError(f"HEST-1k: {path}: {text}the slides sheet") from error
        if status not in (401, 403):
            raise InputError(f"HEST-1k: {path}: got HTTP {status} from {url}; start again later") from error
        why = "the token is not valid" if status == 401 else "the account has not accepted the terms"
        raise InputError(f"HEST-1k: {path}: got HTTP {status}: {why}. {_ADVICE}") from error
    except Exception as error:  # of the HTTP library below, which differs between versions of huggingface_hub
        reason = str(error).replace(token, "(token)")
        raise InputError(
            f"HEST-1k: {path}: {url} cannot be reached ({type(error).__name__}: {reason}); check the connection, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, and start again"
        ) from None  # its traceback could show the token
    is_sha256 = stated.etag is not None and len(stated.etag) == 64
    return fetch(
        [url],
        destination,
        size=size or stated.size,
        sha256=sha256 or (stated.etag if is_sha256 else None),
        headers={"Authorization": f"Bearer {token}"},
    )
