"""Made-up files of cells: tables of planted cells, and files of any size, written row group by row group."""

import numpy as np
import pyarrow as pa
import shapely

from celldetr.cells.table import ROWS, STATUSES, CellsInfo, cell_schema, embedding_column, named, writer
from celldetr.config.classes import PANNUKE_CLASSES


def cell_table(schema, info, centres, sizes, scores, types, **columns):
    """Rows of cells: centres and sizes (n, 2) um, class scores (n, K), types (n,), -1: none; `columns` go before."""
    count = len(centres)
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1) / info.mpp
    values = {
        "cell_id": pa.array(np.arange(1, count + 1).astype(str).tolist(), pa.string()),
        "geometry": pa.array(shapely.to_wkb(shapely.box(*boxes.T)), pa.binary()),
        **dict(zip(("x_um", "y_um"), centres.T, strict=True)),
        **dict(zip(("width_um", "height_um"), sizes.T, strict=True)),
        "nucleus_score": np.full(count, 0.7, np.float32),
        "type": named(types, info.classes),
        **{f"score_{name}": pa.array(scores[:, index].copy()) for index, name in enumerate(info.classes)},
        "tile": np.zeros(count, np.int32),
        "edge_um": np.full(count, 9.0),
        "border": np.zeros(count, dtype=bool),
        "status": named(np.zeros(count, np.int8), STATUSES),
    }
    return pa.table(values | columns, schema)


def write_cells(path, count, *, width=256, mpp=0.25, origin=(0, 0), given=False, dtype="float32", **info):
    """Write `count` cells on a square slide, each 8 um from the next; every 50th has no type."""
    across = max(1, int(np.ceil(np.sqrt(count))))
    side = int(np.ceil(across * 8 / mpp))
    values = {"slide": "made_up", "file": "made_up.tif", "mpp": mpp, "size": (side, side), "origin": origin}
    found = CellsInfo(**values | {"classes": PANNUKE_CLASSES, "width": width, "given": given} | info)
    schema = cell_schema(found, dtype)
    rng = np.random.default_rng(0)
    with writer(path, schema) as file:
        for start in range(0, count, ROWS):
            number = np.arange(start, min(start + ROWS, count))
            centres = np.stack([number % across, number // across], axis=1) * 8 + rng.uniform(3, 5, (len(number), 2))
            sizes = rng.uniform(4, 6, (len(number), 2))
            scores = rng.uniform(0, 1, (len(number), len(found.classes))).astype(np.float32)
            types = np.where(number % 50 == 49, -1, scores.argmax(axis=1))
            columns = {
                "cell_id": pa.array((number + 1).astype(str)),
                "nucleus_score": rng.uniform(0.4, 1, len(number)).astype(np.float32),
                "tile": (number // 30).astype(np.int32),
                "edge_um": rng.uniform(8, 32, len(number)),
            }
            if width:
                centre = 3 * np.eye(len(found.classes), width)[scores.argmax(axis=1)]
                columns["embedding"] = embedding_column((rng.normal(size=(len(number), width)) + centre).astype(dtype))
            file.write_table(cell_table(schema, found, centres, sizes, scores, types, **columns))
    return found
