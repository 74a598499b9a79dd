"""Files of a slide's cells, against plain calls of the libraries that write and read them.

Usage: python tests/benchmarks/bench_cells_export.py [--cells N] [--width N] [--repeats N] [--no-plain]
Cells are made up. Every way runs in a process of its own, in turn; medians of seconds and CPU seconds, the peak of
memory, the size of the file, and the ratios of our seconds and CPU seconds to these. The Parquet is copied as the join
of the parts does.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HELPERS = Path(__file__).parents[1] / "helpers"
START = """
import gzip, sys, time
from pathlib import Path
import anndata, geopandas, ijson, numpy as np, orjson, pandas as pd, pyarrow as pa, pyarrow.parquet as pq
import pyogrio, shapely, spatialdata
from spatialdata.models import ShapesModel, TableModel
from celldetr.cells.h5ad import write_h5ad
from celldetr.cells.qupath import write_geojson
from celldetr.cells.spatialdata_zarr import write_spatialdata
from celldetr.cells.table import CellFile, writer
from celldetr.slides.geojson import read_geojson
SOURCE, OUT = sys.argv[1:]
cells = CellFile(SOURCE)
def table():
    x = np.concatenate(list(cells.embeddings()))
    frame = cells.frame()
    spatial = frame[["x_um", "y_um"]].to_numpy()
    return anndata.AnnData(x, obs=frame.rename_axis(None), obsm={"spatial": spatial})
start, used = time.perf_counter(), time.process_time()
"""
END = """
seconds, used = time.perf_counter() - start, time.process_time() - used
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, used, int(peak) / 1024)
"""
FEATURES = """
frame, shapes = cells.frame(), np.concatenate(list(cells.outlines()))
rows = zip(frame.index, frame["type"], frame.filter(regex="score").to_dict("records"), shapely.get_coordinates(shapes)
           .reshape(len(shapes), -1, 2).tolist(), strict=True)
features = [{"type": "Feature", "id": i, "geometry": {"type": "Polygon", "coordinates": [xy]}, "properties":
            {"objectType": "detection", "classification": {"name": str(t)}, "measurements": m}} for i, t, m, xy in rows]
Path(OUT).write_bytes(gzip.compress(orjson.dumps({"type": "FeatureCollection", "features": features}), 1))
"""
SHAPES = """
data = table()
data.obs["region"], data.obs["cell_id"] = pd.Categorical(["cells"] * len(data)), data.obs_names
shapes = geopandas.GeoDataFrame(geometry=np.concatenate(list(cells.outlines())), index=data.obs_names)
elements = {"table": TableModel.parse(data, region="cells", region_key="region", instance_key="cell_id"),
            "cells": ShapesModel.parse(shapes)}
spatialdata.SpatialData.init_from_elements(elements).write(OUT)
"""
WRITING = {
    "parquet": (
        "with writer(OUT, cells.schema) as file:\n  for batch in cells.batches():\n    file.write_batch(batch)",
        "pq.write_table(pq.read_table(SOURCE), OUT)",
    ),
    "h5ad": ("write_h5ad(cells, OUT)", "table().write_h5ad(OUT)"),
    "geojson.gz": ("write_geojson(cells, OUT)", FEATURES),
    "zarr": ("write_spatialdata(cells, OUT)", SHAPES),
}
"""File -> our way, plain calls."""
READING = {
    "ours": "sum(len(batch[0]) for batch in read_geojson(Path(OUT)))",
    "ijson.items": 'sum(1 for _ in ijson.items(gzip.open(OUT), "features.item", use_float=True))',
    "pyogrio": 'pyogrio.read_dataframe("/vsigzip/" + OUT)',
}


def run(code: str, source: Path, out: Path) -> tuple[float, float, float]:
    """Run code in a process; its seconds, CPU seconds and peak memory in MB."""
    command = [sys.executable, "-W", "ignore", "-c", START + code + END, str(source), str(out)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(found[-3]), float(found[-2]), float(found[-1])


def size(path: Path) -> float:
    """MB of a file or folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=592_349)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "cells.parquet"
        code = (
            f"from cell_files import write_cells; write_cells({str(source)!r}, {options.cells}, width={options.width})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=HELPERS)
        print(f"{options.cells:,} cells, width {options.width}, {size(source):.0f} MB; medians of {options.repeats}")
        results: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for _ in range(options.repeats):
            for name, ways in WRITING.items():
                for kind, code in zip(("ours", "plain"), ways[: 1 + options.plain], strict=False):
                    out = Path(folder) / f"{kind}.{name}"
                    results.setdefault((name, kind), []).append(run(code, source, out))
            for kind, code in READING.items() if options.plain else [("ours", READING["ours"])]:
                out = Path(folder) / "ours.geojson.gz"
                results.setdefault(("read geojson.gz", kind), []).append(run(code, source, out))
        medians = {
            way: [statistics.median(values) for values in zip(*runs, strict=True)] for way, runs in results.items()
        }
        for (name, kind), (seconds, used, peak) in medians.items():
            out = Path(folder) / f"{kind}.{name}"
            megabytes = f"{size(out):7.0f} MB" if out.exists() else ""
            ratio = medians[name, "ours"][0] / seconds
            print(
                f"{name:15} {kind:11} {seconds:6.1f} s {used:6.1f} CPU s {peak:6.0f} MB peak {megabytes} {ratio:5.2f}"
            )
        ours = [values for (name, kind), values in medians.items() if kind == "ours" and name in WRITING]
        seconds, used = (sum(values[index] for values in ours) for index in (0, 1))
        print(f"all four files: {seconds:.1f} s, {used:.1f} CPU s, peak {max(values[2] for values in ours):.0f} MB")


if __name__ == "__main__":
    main()
