"""The download link of a dataset of CELLxGENE Discover: links change with every revision of a collection."""

import functools
import json
import logging
import re
from typing import Any

from celldetr.fetch.http import TransferError, get, retry
from celldetr.runtime.errors import InputError

API = "https://api.cellxgene.cziscience.com/curation/v1"
FILES = "https://datasets.cellxgene.cziscience.com"
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

log = logging.getLogger(__name__)


def dataset_url(collection: str, dataset: str, *, api: str = API) -> str:
    """Find the .h5ad of a dataset of a collection (its id).

    `dataset` is a version id, which pins the file, the id of a dataset, or its exact title.

    Raises
    ------
    InputError
        The collection cannot be read, or has no such dataset; names the datasets that it has.
    """
    try:
        url = f"{api}/collections/{collection}"
        datasets: list[dict[str, Any]] = retry(functools.partial(_read_json, url), url)["datasets"]
        titles = "; ".join(str(found.get("title")) for found in datasets) or "none"
        for found in datasets:
            if dataset in (found.get("dataset_version_id"), found.get("dataset_id"), found.get("title")):
                links = [asset["url"] for asset in found.get("assets", []) if asset.get("filetype") == "H5AD"]
                if links:
                    log.info("CELLxGENE: %r is version %s", found.get("title"), found.get("dataset_version_id"))
                    return str(links[0])
    except (TransferError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"CELLxGENE collection {collection}: cannot be read ({error}); start again later, or download the .h5ad "
            "from https://cellxgene.cziscience.com and give its path in column file of the references sheet"
        ) from error
    if _UUID.fullmatch(dataset):
        log.info("CELLxGENE: %s is not current in %s; taking it for an earlier version", dataset, collection)
        return f"{FILES}/{dataset}.h5ad"
    raise InputError(f"CELLxGENE collection {collection}: got no dataset {dataset!r}, expected one of: {titles}")


def _read_json(url: str) -> Any:
    with get(url) as response:
        return json.loads(response.content)
