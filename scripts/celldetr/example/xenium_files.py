"""Output folders in the layouts of Xenium Onboard Analysis 1.0 to 4, written from planted cells."""

import json
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import shapely
import zarr
from numpy.typing import NDArray

from celldetr.example.shapes import Array
from celldetr.example.xenium_images import bounds, draw_dapi, label_image, write_pyramid
from celldetr.example.xenium_layout import Contents
from celldetr.example.xenium_panel import PANEL

_CHUNK = 1024  # px of a chunk of the label images
_DATE = (1980, 1, 1, 0, 0, 0)  # of members of archives, so that the same arguments give the same bytes
_UNASSIGNED = "UNASSIGNED"
_IN_NUCLEUS = 0.6  # share of a cell's transcripts that are drawn inside its nucleus


def write_outs(folder: Path, contents: Contents, rng: np.random.Generator, scratch: Path) -> None:
    """Write all files of an output folder."""
    folder.mkdir(parents=True)
    _write_specs(folder / "experiment.xenium", contents)
    _write_matrix(folder / "cell_feature_matrix.h5", contents)
    cells = _cell_table(contents)
    cells.to_parquet(folder / "cells.parquet", index=False)
    outlines = [shapely.get_coordinates(polygon)[:-1] for polygon in contents.cells.outlines]
    for name, polygons, owner in (
        ("nucleus", contents.nuclei, contents.nucleus_cell),
        ("cell", outlines, np.arange(len(outlines))),
    ):
        _boundaries(contents, polygons, owner).to_parquet(folder / f"{name}_boundaries.parquet", index=False)
    _transcripts(contents, rng).to_parquet(folder / "transcripts.parquet", index=False)
    _write_cells_zarr(folder / "cells.zarr.zip", contents, cells, outlines, scratch)
    _write_images(folder, contents, int(rng.integers(2**31)), scratch)


def write_archive(path: Path, folder: Path) -> None:
    """Pack the files of an output folder, as they lie in it, into an archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                info = zipfile.ZipInfo(file.relative_to(folder).as_posix(), _DATE)
                info.compress_type = zipfile.ZIP_STORED if file.suffix == ".zip" else zipfile.ZIP_DEFLATED
                with file.open("rb") as source, archive.open(info, "w", force_zip64=True) as member:
                    shutil.copyfileobj(source, member, 1 << 20)


def _write_specs(path: Path, contents: Contents) -> None:
    frames, layout = contents.frames, contents.layout
    genes = contents.counts[:, : len(PANEL)]
    specs = {
        "major_version": layout.major,
        "minor_version": 0,
        "run_name": "synthetic",
        "region_name": "region 1",
        "preservation_method": "ffpe",
        "panel_name": "Synthetic panel",
        "panel_num_targets_predesigned": len(PANEL),
        "panel_organism": "Human",
        "num_cells": len(contents.names),
        "num_transcripts": int(genes.sum()),
        "pixel_size": frames.pixel_size,
        "z_step_size": 3.0,
        "analysis_sw_version": f"xenium-{layout.version}",
    }
    path.write_text(json.dumps(specs, indent=2) + "\n", encoding="utf-8")


def _write_matrix(path: Path, contents: Contents) -> None:
    columns = contents.counts.T.tocsc()
    columns.sort_indices()
    features = contents.features
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "matrix", "version": 2})
        matrix = file.create_group("matrix")
        matrix["barcodes"] = contents.names.astype("S")
        matrix.create_dataset("data", data=columns.data.astype(np.int32), compression="gzip", compression_opts=1)
        matrix.create_dataset("indices", data=columns.indices.astype(np.int64), compression="gzip", compression_opts=1)
        matrix["indptr"] = columns.indptr.astype(np.int64)
        matrix["shape"] = np.array(columns.shape, dtype=np.int32)
        group = matrix.create_group("features")
        group["id"] = np.array(features.ids, dtype="S")
        group["name"] = np.array(features.names, dtype="S")
        group["feature_type"] = np.array(features.kinds, dtype="S")
        group["genome"] = np.array(["Unknown"] * len(features.ids), dtype="S")
        group["_all_tag_keys"] = np.array(["genome"], dtype="S")


def _cell_table(contents: Contents) -> pd.DataFrame:
    count, layout = len(contents.names), contents.layout
    kinds = np.array(contents.features.kinds)
    area = np.zeros(count)
    np.add.at(area, contents.nucleus_cell, shapely.area([shapely.Polygon(nucleus) for nucleus in contents.nuclei]))
    number = np.bincount(contents.nucleus_cell, minlength=count)
    table = pd.DataFrame({"cell_id": contents.ids})
    table["x_centroid"], table["y_centroid"] = contents.cells.centres.T
    columns = {
        "transcript_counts": "Gene Expression",
        "control_probe_counts": "Negative Control Probe",
        "control_codeword_counts": "Negative Control Codeword",
        "unassigned_codeword_counts": "Unassigned Codeword",
        "deprecated_codeword_counts": "Deprecated Codeword",
    }
    for name, kind in columns.items():
        if (kinds == kind).any():
            table[name] = np.asarray(contents.counts[:, kinds == kind].sum(axis=1)).ravel().astype(np.int64)
    table["total_counts"] = np.asarray(contents.counts.sum(axis=1)).ravel().astype(np.int64)
    table["cell_area"] = shapely.area(contents.cells.outlines)
    table["nucleus_area"] = np.where(number > 0, area, np.nan)
    if layout.major >= 2:
        table["nucleus_count"] = number
        table["segmentation_method"] = np.where(
            number > 0, "Segmented by nucleus expansion of 5.0µm", "Segmented by boundary stain"
        )
    return table


def _boundaries(contents: Contents, polygons: list[Array], owner: NDArray[np.integer]) -> pd.DataFrame:
    """One row per corner; the last corner of a polygon is its first again."""
    closed = [np.vstack([polygon, polygon[:1]]).astype(np.float32) for polygon in polygons]
    number = np.array([len(polygon) for polygon in closed], dtype=int)
    corners = np.vstack([np.zeros((0, 2), np.float32), *closed])
    table = pd.DataFrame({"cell_id": contents.ids[np.repeat(owner, number)]})
    table["vertex_x"], table["vertex_y"] = corners.T
    if contents.layout.label_ids:
        table["label_id"] = np.repeat(np.arange(1, len(polygons) + 1, dtype=np.uint32), number)
    return table


def _transcripts(contents: Contents, rng: np.random.Generator) -> pd.DataFrame:
    """Those of the matrix inside their cells; others of low quality inside cells, and some outside of all."""
    counts = contents.counts.tocoo()
    owner, feature = np.repeat(counts.row, counts.data), np.repeat(counts.col, counts.data)
    poor = np.flatnonzero(rng.random(owner.size) < 0.05)
    stray = max(5, round(0.06 * owner.size))
    quality = np.concatenate([rng.uniform(20, 40, owner.size), rng.uniform(3, 19.9, poor.size), np.full(stray, 32.0)])
    owner = np.concatenate([owner, owner[poor]]).astype(int)
    places = _places(contents, owner, rng)
    nuclei = _nuclei_of_cells(contents)
    inside = shapely.contains_xy(nuclei[owner], *places.T)
    distance = np.where(inside, 0, np.nan_to_num(shapely.distance(nuclei[owner], shapely.points(places))))
    strays = _strays(contents, stray, rng)
    feature = np.concatenate([feature, feature[poor], rng.integers(0, len(contents.features.names), stray)])
    order = rng.permutation(owner.size + stray)
    names = np.array(contents.features.names, dtype=object)[feature]
    nobody = _UNASSIGNED if contents.layout.text_ids else -1
    ids = np.concatenate([contents.ids[owner], np.array([nobody] * stray, dtype=contents.ids.dtype)])
    location = np.concatenate([places, strays]).astype(np.float32)
    table = pd.DataFrame(
        {
            "transcript_id": np.arange(order.size, dtype=np.uint64) + np.uint64(281_474_976_710_656),
            "cell_id": ids[order],
            "overlaps_nucleus": np.concatenate([inside, np.zeros(stray, bool)])[order].astype(np.uint8),
            "feature_name": names[order],
            "x_location": location[order, 0],
            "y_location": location[order, 1],
            "z_location": rng.uniform(8, 24, order.size).astype(np.float32),
            "qv": quality[order].astype(np.float32),
        }
    )
    if contents.layout.text_ids:
        table["fov_name"] = "A1"
        table["nucleus_distance"] = np.concatenate([distance, np.full(stray, 15.0)])[order].astype(np.float32)
    if contents.layout.major >= 2:
        table["codeword_index"] = feature[order].astype(np.int32)
    if contents.layout.major >= 3:
        table["is_gene"] = feature[order] < len(PANEL)
    if not contents.layout.text_ids:
        table["feature_name"] = table["feature_name"].str.encode("utf-8")
    return table


def _nuclei_of_cells(contents: Contents) -> NDArray[np.object_]:
    """(N,) polygons; None for cells without a nucleus."""
    nuclei = np.full(len(contents.names), None, dtype=object)
    for cell, nucleus in zip(contents.nucleus_cell.tolist(), contents.nuclei, strict=True):
        polygon = shapely.Polygon(nucleus)
        nuclei[cell] = polygon if nuclei[cell] is None else shapely.union(nuclei[cell], polygon)
    shapely.prepare(nuclei)
    return nuclei


def _places(contents: Contents, owner: NDArray[np.integer], rng: np.random.Generator) -> Array:
    """(K, 2) places in cells, most of them in nuclei: between a polygon's middle and its rim."""
    rims = [shapely.get_coordinates(polygon)[:-1] for polygon in contents.cells.outlines]
    count = len(rims)
    nucleus = np.full(count, -1)
    nucleus[contents.nucleus_cell] = count + np.arange(len(contents.nuclei))
    polygons = [*rims, *contents.nuclei]
    in_nucleus = (rng.random(owner.size) < _IN_NUCLEUS) & (nucleus[owner] >= 0)
    which = np.where(in_nucleus, nucleus[owner], owner)
    size = np.array([len(polygon) for polygon in polygons])
    first = np.concatenate([[0], np.cumsum(size)[:-1]])
    corners = np.vstack([np.zeros((0, 2)), *polygons])
    corner = rng.integers(0, size[which])
    along = rng.random((owner.size, 1))
    start, end = corners[first[which] + corner], corners[first[which] + (corner + 1) % size[which]]
    middle = np.array([polygon.mean(axis=0) for polygon in polygons]).reshape(-1, 2)[which]
    rim = start + along * (end - start)
    places: Array = middle + 0.98 * np.sqrt(rng.random((owner.size, 1))) * (rim - middle)
    return places


def _strays(contents: Contents, count: int, rng: np.random.Generator) -> Array:
    """(count, 2) places outside of all cells."""
    size = np.array(contents.frames.xenium_size) * contents.frames.pixel_size
    tree = shapely.STRtree(contents.cells.outlines)
    found = np.zeros((0, 2))
    for _ in range(50):
        places = rng.uniform(0, size, (2 * count, 2))
        hit = tree.query(shapely.points(places), predicate="intersects")[0]
        found = np.vstack([found, np.delete(places, np.unique(hit), axis=0)])[:count]
        if len(found) == count:
            break
    else:
        found = np.vstack([found, np.tile([[0.5, 0.5]], (count - len(found), 1))])
    return found


def _write_cells_zarr(
    path: Path, contents: Contents, cells: pd.DataFrame, outlines: list[Array], scratch: Path
) -> None:
    count, layout = len(contents.names), contents.layout
    centre = contents.cells.centres
    columns = {
        "cell_centroid_x": centre[:, 0],
        "cell_centroid_y": centre[:, 1],
        "cell_area": cells["cell_area"].to_numpy(),
        "nucleus_centroid_x": centre[:, 0],
        "nucleus_centroid_y": centre[:, 1],
        "nucleus_area": cells["nucleus_area"].fillna(0).to_numpy(),
        "z_level": np.zeros(count),
    }
    if layout.major >= 2:
        columns["nucleus_count"] = cells["nucleus_count"].to_numpy()
    loose = scratch / "cells.zarr.zip"
    store = zarr.storage.ZipStore(loose, mode="w")
    group = zarr.open_group(store, mode="w", zarr_format=2)
    named = np.stack([contents.prefix, np.ones(count, dtype=np.uint32)], axis=1)
    group.create_array("cell_id", data=named if layout.text_ids else contents.prefix)
    summary = np.stack(list(columns.values()), axis=1).astype(np.float64)
    group.create_array("cell_summary", data=summary, attributes={"column_names": list(columns)})
    masks = group.create_group("masks")
    for name, polygons in (("0", contents.nuclei), ("1", outlines)):
        _write_labels(masks, name, polygons, contents, by_cell=name == "0" and not layout.polygon_sets)
    if layout.polygon_sets:
        sets = group.create_group("polygon_sets")
        for name, owner in (("0", contents.nucleus_cell), ("1", np.arange(count))):
            sets.create_group(name).create_array("cell_index", data=owner.astype(np.uint32))
    if layout.seg_mask_value:
        group.create_array("seg_mask_value", data=np.arange(1, count + 1, dtype=np.uint32))
    store.close()
    with zipfile.ZipFile(loose) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member in source.namelist():
            archive.writestr(zipfile.ZipInfo(member, _DATE), source.read(member))
    loose.unlink()


def _write_labels(masks: zarr.Group, name: str, polygons: list[Array], contents: Contents, *, by_cell: bool) -> None:
    """Write a label image chunk by chunk; the value of a polygon is its number, or that of its cell."""
    width, height = contents.frames.xenium_size
    array = masks.create_array(name, shape=(height, width), chunks=(_CHUNK, _CHUNK), dtype="uint32", fill_value=0)
    number = np.concatenate([[0], contents.nucleus_cell + 1]).astype(np.uint32) if by_cell else None
    box = bounds(polygons)
    for top in range(0, height, _CHUNK):
        for left in range(0, width, _CHUNK):
            rows, columns = slice(top, min(top + _CHUNK, height)), slice(left, min(left + _CHUNK, width))
            labels = label_image(polygons, contents.frames, rows, columns, box)
            if labels.any():
                array[rows, columns] = labels if number is None else number[labels]


def _write_images(folder: Path, contents: Contents, seed: int, scratch: Path) -> None:
    image = draw_dapi(scratch / "dapi.raw", contents.cells, contents.frames, seed)
    first, *copies = [folder / name for name in contents.layout.images]
    first.parent.mkdir(exist_ok=True)
    write_pyramid(first, image, mpp=contents.frames.pixel_size, channel="DAPI", scratch=scratch)
    for copy in copies:
        shutil.copyfile(first, copy)
