"""The sheet of STHELAR's sections, and what files the folder of a section has."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from celldetr.config.base import Mpp, Settings
from celldetr.config.sheets import Name, XeniumRow, locate, read_sheet
from celldetr.config.xenium import XeniumSettings
from celldetr.runtime.errors import ConfigError

PLACES, CELLS, SOURCE = "places.parquet", "cells.parquet", "source.json"
"""Files of a section that was fetched, beside ``patches-*.parquet``."""

PATCH_KEYS = ("min_visible", "min_nuclei", "min_labelled", "max_patches")
"""Keys of ``xenium.patches`` that apply to sections: the places of their patches are given."""


class SthelarRow(Settings):
    """A section of STHELAR: its patches."""

    sample: Name = Field(description="slide_id of STHELAR (e.g. breast_s0), and name of its folders")
    use: bool = Field(description="yes: part of the run; no: left out")
    tissue: str = Field(min_length=1, description="organ or tissue")
    group: str = Field(
        min_length=1, description="slide or donor, as in the other sheets; patches of a group are in one part"
    )
    section: str = Field(
        "", description="data set of 10x Genomics with this section; refused if a sample in use has it too"
    )
    mpp: Mpp | None = Field(
        None, description="um per px of the patches; empty: from the areas of the nuclei, if the data set has them"
    )
    note: str = Field("", description="free text; not used")


def used_sthelar(
    settings: XeniumSettings | None, samples: Mapping[str, XeniumRow], root: Path
) -> dict[str, SthelarRow]:
    """Read the sheet of STHELAR's sections and return those in use; none without a block ``xenium.sthelar``.

    `samples` are the Xenium samples in use.

    Raises
    ------
    ConfigError
        The sheet is not valid (`read_sheet`), no section is in use, or a name or a section is that of a sample, too.
    """
    if settings is None or settings.sthelar is None:
        return {}
    sheet = locate(settings.sthelar.samples, root)
    used = {name: row for name, row in read_sheet(sheet, SthelarRow, "sample").items() if row.use}
    if not used:
        raise ConfigError(
            f"{sheet}: column use: got 'yes' in no row, expected at least one; or leave out the block xenium.sthelar"
        )
    for name, row in used.items():
        same = [other for other, sample in samples.items() if row.section and _is_of(row.section, other, sample)]
        if same:
            raise ConfigError(
                f"{sheet}: {name}: got use: yes, but its section {row.section} is the sample {same[0]} of "
                f"{settings.samples}, which is in use, too; use one of them: the same tissue would train and test"
            )
        if name.lower() in {other.lower() for other in samples}:
            raise ConfigError(f"{sheet}: sample: got {name!r}, also a name in {settings.samples}; expected others")
    return used


def _is_of(section: str, name: str, sample: XeniumRow) -> bool:
    return section == name or any(f"/{section}/" in source for source in sample.outs)
