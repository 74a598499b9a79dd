"""How nuclei and the tissue around them look: the tables that the drawing follows. All lengths in um.

Stain is in units of optical density of the hematoxylin or eosin vector (natural logarithm).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from celldetr.runtime.errors import ConfigError


@dataclass(frozen=True)
class Look:
    """Shape and chromatin of one kind of nucleus.

    Attributes
    ----------
    length, length_sd
        Longest diameter: median and spread of its logarithm.
    aspect, aspect_sd
        Width over length: mean and standard deviation.
    irregular, bend, taper
        See `shapes.outline`.
    hematoxylin, hematoxylin_sd
        Stain of the chromatin: median and spread of its logarithm between nuclei.
    chromatin, coarse
        Relative contrast of the chromatin, and the share of it in coarse clumps (the rest is fine grain).
    rim, clearing
        Added stain of the nuclear membrane; share of stain that is missing from the middle (vesicular nuclei).
    nucleoli
        Mean number of nucleoli.
    eosin
        Eosin inside the nucleus.
    cytoplasm
        Eosin added in a thin coat around the nucleus (negative: a clear halo).
    globules
        Probability that the chromatin has broken up into dense globules in an eosinophilic smudge (karyorrhexis).
    """

    length: float
    length_sd: float
    aspect: float
    aspect_sd: float
    irregular: float
    hematoxylin: float
    hematoxylin_sd: float
    chromatin: float
    coarse: float
    rim: float
    bend: float = 0.0
    taper: float = 0.0
    clearing: float = 0.0
    nucleoli: float = 0.0
    eosin: float = 0.15
    cytoplasm: float = 0.0
    globules: float = 0.0


LOOKS: Mapping[str, Look] = {
    # large, irregular, vesicular with coarse clumps and nucleoli; sizes and stain vary most
    "neoplastic": Look(
        length=11.0, length_sd=0.17, aspect=0.74, aspect_sd=0.10, irregular=0.10, hematoxylin=0.80, hematoxylin_sd=0.20,
        chromatin=0.34, coarse=0.8, rim=0.34, clearing=0.38, nucleoli=1.5, eosin=0.16, cytoplasm=0.04,
    ),
    # small, round, dark, clumped
    "inflammatory": Look(
        length=6.0, length_sd=0.11, aspect=0.90, aspect_sd=0.05, irregular=0.05, hematoxylin=1.40, hematoxylin_sd=0.12,
        chromatin=0.28, coarse=0.9, rim=0.12, eosin=0.10, cytoplasm=-0.10,
    ),
    # thin spindles along the fibres
    "connective": Look(
        length=13.0, length_sd=0.20, aspect=0.23, aspect_sd=0.05, irregular=0.04, hematoxylin=0.95, hematoxylin_sd=0.20,
        chromatin=0.18, coarse=0.3, rim=0.10, bend=0.14, taper=0.35, eosin=0.15,
    ),
    # shrunken, smudged, in pink; half of them broken up
    "necrotic": Look(
        length=5.2, length_sd=0.18, aspect=0.78, aspect_sd=0.12, irregular=0.14, hematoxylin=1.35, hematoxylin_sd=0.20,
        chromatin=0.05, coarse=0.5, rim=0.0, eosin=0.55, cytoplasm=0.42, globules=0.5,
    ),
    # medium, oval, even, fine chromatin
    "epithelial": Look(
        length=8.4, length_sd=0.08, aspect=0.68, aspect_sd=0.06, irregular=0.02, hematoxylin=0.85, hematoxylin_sd=0.10,
        chromatin=0.14, coarse=0.15, rim=0.20, clearing=0.08, nucleoli=0.15, eosin=0.14,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Glands:
    """Glands of one kind of epithelium: rings of columnar cells around a lumen.

    Attributes
    ----------
    look
        Kind of the nuclei.
    radius
        Smallest and largest outer radius.
    cell_height
        From the basement membrane to the lumen.
    spacing
        Distance of neighbouring nuclei along the ring.
    rows
        Rows of nuclei (pseudo-stratified when more than one).
    disorder
        Standard deviation of a nucleus' place, um; its tilt is a twelfth of that in radians.
    """

    look: str
    radius: tuple[float, float]
    cell_height: float
    spacing: float
    rows: int
    disorder: float


@dataclass(frozen=True)
class Architecture:
    """One kind of tissue region.

    Attributes
    ----------
    density
        Scattered nuclei per 64 um x 64 um (a PanNuke image), besides those of glands.
    composition
        Look -> share of the scattered nuclei.
    separation
        Smallest distance of two nuclei as a share of their touching distance (below 1 they overlap).
    clumping
        Share of nuclei placed touching another.
    eosin, basophilia
        Stain of the ground: eosin, and hematoxylin of the cytoplasm.
    fibre, granule
        Relative contrast of fibres and of granules in the ground.
    cleft
        Share of the ground that is white gaps between the fibres.
    membranes
        Contrast of the borders between neighbouring cells.
    glands
        Glands that fill the region, if any.
    vacuole
        Radii of fat vacuoles that fill the region, if any.
    """

    density: float
    composition: Mapping[str, float]
    separation: float
    clumping: float
    eosin: float
    basophilia: float
    fibre: float
    granule: float
    cleft: float
    membranes: float = 0.0
    glands: Glands | None = None
    vacuole: tuple[float, float] | None = None


_TUMOUR_GLANDS = Glands("neoplastic", radius=(24.0, 42.0), cell_height=20.0, spacing=6.6, rows=2, disorder=1.3)
_BENIGN_GLANDS = Glands("epithelial", radius=(20.0, 34.0), cell_height=14.0, spacing=6.0, rows=1, disorder=0.5)

ARCHITECTURES: Mapping[str, Architecture] = {
    "tumour nest": Architecture(
        density=26, composition={"neoplastic": 0.90, "inflammatory": 0.05, "connective": 0.04, "necrotic": 0.01},
        separation=0.90, clumping=0.35, eosin=0.42, basophilia=0.13, fibre=0.05, granule=0.12, cleft=0.02,
        membranes=0.4,
    ),
    "tumour glands": Architecture(
        density=15, composition={"connective": 0.62, "inflammatory": 0.33, "neoplastic": 0.045, "necrotic": 0.005},
        separation=0.98, clumping=0.15, eosin=0.48, basophilia=0.04, fibre=0.30, granule=0.05, cleft=0.10,
        glands=_TUMOUR_GLANDS,
    ),
    "benign glands": Architecture(
        density=14, composition={"connective": 0.60, "inflammatory": 0.40},
        separation=1.0, clumping=0.15, eosin=0.45, basophilia=0.03, fibre=0.28, granule=0.05, cleft=0.12,
        glands=_BENIGN_GLANDS,
    ),
    "fibrous stroma": Architecture(
        density=17, composition={"connective": 0.88, "inflammatory": 0.12},
        separation=1.02, clumping=0.10, eosin=0.62, basophilia=0.03, fibre=0.38, granule=0.03, cleft=0.10,
    ),
    "inflamed stroma": Architecture(
        density=36, composition={"inflammatory": 0.80, "connective": 0.20},
        separation=0.94, clumping=0.40, eosin=0.40, basophilia=0.05, fibre=0.25, granule=0.06, cleft=0.18,
    ),
    "necrosis": Architecture(
        density=20, composition={"necrotic": 0.80, "inflammatory": 0.14, "neoplastic": 0.06},
        separation=1.0, clumping=0.15, eosin=0.62, basophilia=0.05, fibre=0.06, granule=0.34, cleft=0.05,
    ),
    "fat": Architecture(
        density=5, composition={"connective": 0.85, "inflammatory": 0.15},
        separation=1.0, clumping=0.0, eosin=0.45, basophilia=0.02, fibre=0.20, granule=0.04, cleft=0.10,
        vacuole=(14.0, 30.0),
    ),
}  # fmt: skip

MIXTURE: Mapping[str, float] = {
    "tumour nest": 0.33,
    "tumour glands": 0.17,
    "benign glands": 0.15,
    "fibrous stroma": 0.22,
    "inflamed stroma": 0.055,
    "necrosis": 0.020,
    "fat": 0.055,
}  # shares of the area that give about PanNuke's class balance
BALANCED: Mapping[str, float] = {
    "tumour nest": 0.12,
    "benign glands": 0.30,
    "fibrous stroma": 0.12,
    "inflamed stroma": 0.12,
    "necrosis": 0.34,
}  # shares that give each class about as many nuclei
MIXTURES: Mapping[str, Mapping[str, float]] = {
    "pannuke": MIXTURE,
    "balanced": BALANCED,
    "example": {name: (MIXTURE.get(name, 0.0) + BALANCED.get(name, 0.0)) / 2 for name in MIXTURE},
}  # "example": uneven as PanNuke, yet every class frequent enough to be learnt from a few hundred images


def mixture_named(mixture: str | Mapping[str, float]) -> Mapping[str, float]:
    """Look up a mixture of regions by its name, or check a given one.

    Raises
    ------
    ConfigError
        Unknown names, or shares that are not positive numbers.
    """
    if isinstance(mixture, str):
        if mixture not in MIXTURES:
            raise ConfigError(f"mixture: got {mixture!r}, expected one of {sorted(MIXTURES)} or region -> share")
        return MIXTURES[mixture]
    unknown = sorted(set(mixture) - set(ARCHITECTURES))
    if unknown or not mixture or min(mixture.values()) < 0 or sum(mixture.values()) <= 0:
        raise ConfigError(
            f"mixture: got {dict(mixture)}, expected shares >= 0, not all 0, of the regions {sorted(ARCHITECTURES)}"
        )
    return mixture
