"""Find the cells of a slide with a trained model, or embed given ones: the share of one job.

Inputs: slide (file), model, and if there are any: region (polygons), nuclei (file of given cells).
Output: a folder of parts without types, see `celldetr.cells.find`; a killed job continues from what lies beside it.
Params: settings of cells that change the result, jobs (that share the slide), patch_size (px) and mpp (um per px) of
the model, precision, compile, row (columns of the sheet), code. Resource tiles: tiles per batch. Wildcards: slide, job.
"""

import torch

from celldetr.cells.model import CellModel
from celldetr.cells.sheet_row import RowFiles, find_cells_of_row
from celldetr.config.cells import CellSettings
from celldetr.config.sheets import CellRow
from celldetr.model.device import best_device
from celldetr.runtime.rule import run_rule
from celldetr.slides.outline_check import Keys


def main(snakemake):
    given, params = snakemake.input, snakemake.params
    torch.set_num_threads(snakemake.threads)
    settings = CellSettings(
        margin_um=params.margin_um,
        nucleus_threshold=params.nucleus_threshold,
        batch_size=snakemake.resources.tiles,
        on_damage=params.on_damage,
        embeddings=params.embeddings,
    )
    model = CellModel.load(
        given.model,
        mpp=params.mpp,
        size=params.patch_size,
        device=best_device(),
        precision=params.precision,
        compiling=params.compile,
    )
    files = {"nuclei": tuple(filter(None, [given.get("nuclei")])), "region": given.get("region") or ""}
    find_cells_of_row(
        CellRow(slide=snakemake.wildcards.slide, use=True, file=(given.slide,), **files, **params.row),
        settings,
        model,
        snakemake.output[0],
        files=RowFiles(given.slide, given.get("nuclei"), given.get("region")),
        keys=Keys("cells sheet"),
        job=(int(snakemake.wildcards.job), params.jobs),
        workers=snakemake.threads,
        identity={"code": params.code},
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
