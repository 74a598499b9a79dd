"""How nuclei and the tissue around them look. All lengths in um.

Stain is in units of optical density (natural logarithm) of the hematoxylin or eosin vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from celldetr.config.classes import PANNUKE_CLASSES

Array = NDArray[np.floating]


@dataclass(frozen=True)
class NucleusStyle:
    """Shape and chromatin of the nuclei of one class."""

    length: float  # longest diameter: median
    length_sd: float  # standard deviation of its logarithm
    aspect: float  # width / length: mean
    aspect_sd: float
    irregular: float  # as bend and taper: see `celldetr.example.tissue.draw_outlines`
    hematoxylin: float  # stain of the chromatin: median
    hematoxylin_sd: float  # standard deviation of its logarithm between nuclei
    chromatin: float  # relative contrast of the chromatin
    coarse: float  # share of the chromatin in coarse clumps (the rest is fine grain)
    rim: float  # additional stain of the nuclear membrane
    bend: float = 0.0
    taper: float = 0.0
    clearing: float = 0.0  # share of the stain missing in the middle (vesicular nuclei)
    nucleoli: float = 0.0  # mean number
    eosin: float = 0.15  # inside the nucleus
    cytoplasm: float = 0.0  # eosin added in a thin coat around the nucleus (negative: a clear halo)
    globules: float = 0.0  # probability that the chromatin has broken up into dense globules (karyorrhexis)


STYLES: Mapping[str, NucleusStyle] = {
    # large, irregular, vesicular with coarse clumps and nucleoli; sizes and stain vary most
    "neoplastic": NucleusStyle(
        length=11.0, length_sd=0.17, aspect=0.74, aspect_sd=0.10, irregular=0.10, hematoxylin=0.80, hematoxylin_sd=0.20,
        chromatin=0.34, coarse=0.8, rim=0.34, clearing=0.38, nucleoli=1.5, eosin=0.16, cytoplasm=0.04,
    ),
    # small, round, dark, clumped
    "inflammatory": NucleusStyle(
        length=6.0, length_sd=0.11, aspect=0.90, aspect_sd=0.05, irregular=0.05, hematoxylin=1.40, hematoxylin_sd=0.12,
        chromatin=0.28, coarse=0.9, rim=0.12, eosin=0.10, cytoplasm=-0.10,
    ),
    # thin spindles along the fibres
    "connective": NucleusStyle(
        length=13.0, length_sd=0.20, aspect=0.23, aspect_sd=0.05, irregular=0.04, hematoxylin=0.95, hematoxylin_sd=0.20,
        chromatin=0.18, coarse=0.3, rim=0.10, bend=0.14, taper=0.35, eosin=0.15,
    ),
    # shrunken, smudged, in pink; half of them broken up
    "necrotic": NucleusStyle(
        length=5.2, length_sd=0.18, aspect=0.78, aspect_sd=0.12, irregular=0.14, hematoxylin=1.35, hematoxylin_sd=0.20,
        chromatin=0.05, coarse=0.5, rim=0.0, eosin=0.55, cytoplasm=0.42, globules=0.5,
    ),
    # medium, oval, even, fine chromatin
    "epithelial": NucleusStyle(
        length=8.4, length_sd=0.08, aspect=0.68, aspect_sd=0.06, irregular=0.02, hematoxylin=0.85, hematoxylin_sd=0.10,
        chromatin=0.14, coarse=0.15, rim=0.20, clearing=0.08, nucleoli=0.15, eosin=0.14,
    ),
}  # fmt: skip


def style_values(name: str, classes: NDArray[np.integer]) -> Array:
    """Look up an attribute of `NucleusStyle` for each of (N,) indices into `PANNUKE_CLASSES`."""
    return np.array([getattr(STYLES[nucleus], name) for nucleus in PANNUKE_CLASSES], dtype=float)[classes]


@dataclass(frozen=True)
class GlandStyle:
    """Rings of columnar cells around a lumen."""

    nucleus: str  # class of the nuclei
    radius: tuple[float, float]  # smallest and largest outer radius
    cell_height: float  # from the basement membrane to the lumen
    spacing: float  # distance of neighbouring nuclei along the ring
    rows: int  # of nuclei
    disorder: float  # standard deviation of a nucleus' place
    eosin: float  # stain of the cytoplasm
    basophilia: float  # hematoxylin of the cytoplasm


@dataclass(frozen=True)
class Region:
    """One kind of tissue."""

    density: float  # scattered nuclei per 64 um x 64 um (a PanNuke image); those of glands come on top
    composition: Mapping[str, float]  # class -> share of the scattered nuclei
    separation: float  # smallest distance of two nuclei relative to that at which they touch (below 1 they overlap)
    clumping: float  # share of nuclei placed touching another one
    eosin: float  # stain of the ground
    basophilia: float  # hematoxylin of the ground
    fibre: float  # relative contrast of fibres in the ground
    granule: float  # relative contrast of granules in the ground
    cleft: float  # share of the ground that is white gaps between the fibres
    membranes: float = 0.0  # contrast of the borders between neighbouring cells
    glands: GlandStyle | None = None  # glands that fill the region


_TUMOUR_GLANDS = GlandStyle(
    "neoplastic", radius=(24, 42), cell_height=20, spacing=6.6, rows=2, disorder=1.3, eosin=0.42, basophilia=0.20
)
_BENIGN_GLANDS = GlandStyle(
    "epithelial", radius=(20, 34), cell_height=14, spacing=6.0, rows=1, disorder=0.5, eosin=0.34, basophilia=0.10
)

REGIONS: Mapping[str, Region] = {
    "tumour nest": Region(
        density=26, composition={"neoplastic": 0.90, "inflammatory": 0.05, "connective": 0.04, "necrotic": 0.01},
        separation=0.90, clumping=0.35, eosin=0.42, basophilia=0.13, fibre=0.05, granule=0.12, cleft=0.02,
        membranes=0.4,
    ),
    "tumour glands": Region(
        density=15, composition={"connective": 0.62, "inflammatory": 0.33, "neoplastic": 0.045, "necrotic": 0.005},
        separation=0.98, clumping=0.15, eosin=0.48, basophilia=0.04, fibre=0.30, granule=0.05, cleft=0.10,
        glands=_TUMOUR_GLANDS,
    ),
    "benign glands": Region(
        density=14, composition={"connective": 0.60, "inflammatory": 0.40},
        separation=1.0, clumping=0.15, eosin=0.45, basophilia=0.03, fibre=0.28, granule=0.05, cleft=0.12,
        glands=_BENIGN_GLANDS,
    ),
    "fibrous stroma": Region(
        density=17, composition={"connective": 0.88, "inflammatory": 0.12},
        separation=1.02, clumping=0.10, eosin=0.62, basophilia=0.03, fibre=0.38, granule=0.03, cleft=0.10,
    ),
    "inflamed stroma": Region(
        density=36, composition={"inflammatory": 0.80, "connective": 0.20},
        separation=0.94, clumping=0.40, eosin=0.40, basophilia=0.05, fibre=0.25, granule=0.06, cleft=0.18,
    ),
    "necrosis": Region(
        density=20, composition={"necrotic": 0.80, "inflammatory": 0.14, "neoplastic": 0.06},
        separation=1.0, clumping=0.15, eosin=0.62, basophilia=0.05, fibre=0.06, granule=0.34, cleft=0.05,
    ),
}  # fmt: skip

_PANNUKE: Mapping[str, float] = {
    "tumour nest": 0.33,
    "tumour glands": 0.17,
    "benign glands": 0.15,
    "fibrous stroma": 0.27,
    "inflamed stroma": 0.055,
    "necrosis": 0.020,
}
_BALANCED: Mapping[str, float] = {
    "tumour nest": 0.12,
    "benign glands": 0.30,
    "fibrous stroma": 0.12,
    "inflamed stroma": 0.12,
    "necrosis": 0.34,
}
MIXTURES: Mapping[str, Mapping[str, float]] = {
    "pannuke": _PANNUKE,
    "balanced": _BALANCED,
    "example": {name: (share + _BALANCED.get(name, 0.0)) / 2 for name, share in _PANNUKE.items()},
}
"""Shares of the area: "pannuke" gives about PanNuke's class balance, "balanced" about as many nuclei of each class;
"example" lies between: uneven, yet every class can be learnt from a few hundred images."""
