import numpy as np
import pytest

from celldetr.store import StoreWriter, open_store

CLASSES = ("neoplastic", "inflammatory", "connective")
COUNTS = (3, 0, 2, 5, 1, 4, 2)
SIZE = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store of seven patches, one without nuclei, that carry their index in the first pixel."""
    path, count = tmp_path_factory.mktemp("store") / "fold1.zarr", len(COUNTS)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (count, SIZE, SIZE, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    low = [np.stack([np.arange(n) * 12.0 + 1, rng.uniform(0, 40, n)], axis=1) for n in COUNTS]
    boxes = [np.concatenate([x, x + rng.uniform(6, 10, x.shape)], axis=1).astype(np.float32) for x in low]
    labels = [rng.integers(0, len(CLASSES), n).astype(np.int8) for n in COUNTS]
    columns = {name: np.arange(count) for name in ("x", "y")} | {
        name: list(map(str, range(count))) for name in ("source", "group", "tissue")
    }
    with StoreWriter(path, patch_size=SIZE, classes=CLASSES, mpp=0.25) as writer:
        writer.append(images, boxes, labels, patches=columns)
    return open_store(path)
