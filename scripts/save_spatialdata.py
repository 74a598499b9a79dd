"""Write a registered sample as one SpatialData Zarr.

Input: ``outs`` (Xenium output folder), ``he``, ``registration``, ``cells`` (cell types). Output: the Zarr; images,
labels, outlines and the table with types and fractions are aligned in the coordinate system "global" (Xenium pixels).
"""

from celldetr.config.classes import ST_TYPES
from celldetr.runtime.rule import run_rule
from celldetr.xenium.celltypes.labels import read_cells
from celldetr.xenium.registration.result import read_registration
from celldetr.xenium.spatial import write_spatialdata


def main(snakemake):
    given = snakemake.input
    cells = read_cells(given.cells).set_index("cell_id")
    names = dict(enumerate(ST_TYPES))
    cells.insert(0, "type", cells["label"].map(names).fillna("unlabelled"))
    registration = read_registration(given.registration, snakemake.wildcards.sample)
    write_spatialdata(snakemake.output[0], given.outs, given.he, registration.matrix, cells, registration.field)


if "snakemake" in globals():
    run_rule(main, snakemake)
