"""Get the needed members of the output archive of a Xenium sample; over HTTP only these are transferred.

Params: source with urls, bytes and sha256 of the archive. Output: the folder (counts, outlines, DAPI image).
"""

from celldetr.fetch.members import fetch_members
from celldetr.runtime.rule import run_rule
from celldetr.xenium.output import choose_members


def main(snakemake):
    source = snakemake.params.source
    fetch_members(
        source["urls"],
        snakemake.output[0],
        choose_members,
        marker="experiment.xenium",
        size=source["bytes"],
        sha256=source["sha256"],
    )


if "snakemake" in globals():
    run_rule(main, snakemake)
