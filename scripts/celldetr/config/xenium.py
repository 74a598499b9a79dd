"""Settings of Xenium samples: registration, cell types, patches and their split."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from celldetr.config.base import MOST, Count, NotNegative, NotNegativeInt, Positive, Settings, Share
from celldetr.config.slides import PatchSettings


class RegistrationSettings(Settings):
    """Registration of the H&E image to the Xenium output, and the gate that it must pass."""

    refine: Literal["auto", "always", "never"] = Field(
        "auto",
        description="refinement of a matrix that passes; auto: kept if it brings "
        "nuclei clearly closer; always: kept if it passes too; never: not tried",
    )
    local: Literal["auto", "never"] = Field(
        "auto",
        description="smooth field of local displacements on top of the matrix; auto: kept where it brings nuclei that "
        "the fit did not see closer; never: not tried",
    )
    scale_tolerance: float = Field(
        0.05, gt=0, lt=0.5, description="largest relative difference between the scale and the ratio of pixel sizes"
    )
    scale_range: tuple[float, float] = Field(
        (1.0, 1.8), description="Xenium px per H&E px, searched if the size of an H&E pixel is unknown"
    )
    angle_step: float = Field(5.0, ge=0.5, le=15, description="step of the search over the full circle, degrees")
    max_distance: float = Field(
        3.0,
        gt=0,
        description="gate: largest median distance between H&E and DAPI nuclei that are each other's nearest, um",
    )
    max_chance: float = Field(0.7, gt=0, le=1, description="gate: largest ratio of that median to that after a shift")
    min_contrast: float = Field(
        0.15, ge=0, description="gate: hematoxylin inside nuclei minus that after a shift, in standard deviations"
    )
    min_inside: float = Field(
        0.5,
        ge=0,
        le=1,
        description="gate: share of the nuclei inside the H&E image, and of the regions there where both images show "
        "nuclei",
    )
    min_regions: float = Field(0.6, ge=0, le=1, description="gate: share of the regions that pass on their own")
    control_shift: float = Field(20.0, gt=0, description="length of the shift that gives the control positions, um")
    regions: int = Field(5, ge=1, le=20, description="regions along the longer side of the sample")
    window: float = Field(200.0, ge=50, le=1000, description="side of the window that is examined in a region, um")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.scale_range
        if not 0.01 <= low <= high <= 100:
            raise ValueError(f"scale_range: got {low}, {high}; expected 0.01 to 100, the smaller one first")
        return self


class CellTypeSettings(Settings):
    """Cell types from gene expression; a cell below one of the limits stays without a type."""

    min_shared_genes: int = Field(
        50, ge=2, le=MOST, description="fewest genes that the panel and the reference must share"
    )
    prior: Literal["sample", "reference"] = Field(
        "sample",
        description="cell type composition that optimal transport starts from: of the sample (by correlation), or of "
        "the reference",
    )
    lamb: Positive = Field(0.1, description="strength of that prior (lamb of TACCO)")
    min_fraction: Share = Field(0.5, description="smallest fraction of the type of a labelled cell")
    min_margin: Share = Field(0.2, description="smallest distance between the largest and the second fraction")
    min_transcripts: NotNegativeInt = Field(10, description="fewest transcripts of the shared genes in a labelled cell")
    require_agreement: bool = Field(True, description="true: label a cell only if both annotators agree on its type")
    unlike_share: float = Field(
        3.0,
        ge=0,
        le=50,
        description="percent of a type's held-out cells of the reference that resemble it less than any labelled cell "
        "as deep; 0: no such limit",
    )
    unknown_types: NotNegativeInt = Field(
        4, description="most types that are searched for which the sample has and the reference lacks; 0: none"
    )
    unknown_distance: Positive = Field(
        0.3,
        description="distance of such a type from the most similar type of the reference, as a share of that between "
        "this one and its neighbour, from which on it counts; what is nearer is this type, as the sample has it",
    )
    min_precision: Share = Field(
        0.7, description="smallest estimated precision of a type whose labels are used for training"
    )


class XeniumSplitSettings(Settings):
    """Which patches train, validate and test."""

    by: Literal["auto", "slide", "block", "random"] = Field(
        "auto",
        description="slide: whole groups of the sheet; block: squares of tissue; auto: slide if there are enough "
        "groups, else block; random: single patches (paper)",
    )
    train: Share = Field(0.8, description="share of the patches that trains")
    val: Share = Field(0.1, description="share of the patches that validates")
    test: Share = Field(0.1, description="share of the patches that tests")
    block_um: Positive = Field(1000.0, description="side of a block, um")
    margin_um: NotNegative = Field(
        0.0, description="width of the strip between blocks of different parts whose patches are left out, um"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.train + self.val + self.test - 1) > 1e-6 or min(self.train, self.test) <= 0:
            raise ValueError(
                f"train, val, test: got {self.train}, {self.val}, {self.test}, expected shares that sum to 1, "
                "train and test above 0"
            )
        return self


class SthelarSettings(Settings):
    """STHELAR (Giraud-Sauveur et al. 2026): Xenium sections as labelled patches, from Hugging Face."""

    samples: str = Field("config/sthelar.tsv", description="sheet of the sections")
    types: str = Field("config/sthelar_types.tsv", description="table of the cell type of each of its categories")
    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] = Field(
        "FelicieGS/STHELAR_40x", description="data set on Hugging Face"
    )
    revision: Annotated[str, Field(pattern=r"^[\w.-]+$")] = Field(
        "e32a8cdd50eff2d38e237f3729e9ac85bbb5203b",
        description="its commit, tag or branch; what a branch stood for is kept beside the files",
    )
    folder: str | None = Field(None, description="a copy of the data set on this machine, instead of the repository")
    min_dice: Share = Field(
        0.0, description="smallest Dice of a patch: its nuclei against those that the authors' CellViT found"
    )
    min_jaccard: Share = Field(0.0, description="smallest Jaccard index of a patch, likewise")
    min_bpq: Share = Field(0.0, description="smallest binary panoptic quality of a patch, likewise")


class XeniumSettings(Settings):
    """Xenium samples with their H&E images."""

    samples: str | None = Field(
        "config/xenium.tsv", description="sheet of the samples; null: none, the sections of STHELAR alone"
    )
    references: str = Field("config/references.tsv", description="sheet of the scRNA-seq references")
    cells_per_type: Count = Field(2000, description="cells of each type that are taken from a reference")
    registration: RegistrationSettings = Field(RegistrationSettings(), description="registration of the H&E image")
    cell_types: CellTypeSettings = Field(CellTypeSettings(), description="cell types from expression")
    patches: PatchSettings = Field(PatchSettings(), description="which patches are taken")
    split: XeniumSplitSettings = Field(XeniumSplitSettings(), description="which patches train, validate and test")
    sthelar: SthelarSettings | None = Field(None, description="sections of STHELAR as further samples; null: none")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.samples is None and self.sthelar is None:
            raise ValueError("samples: got null, expected a sheet, or a block sthelar")
        return self
