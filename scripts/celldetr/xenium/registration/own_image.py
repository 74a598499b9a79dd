"""Whether the outlines of nuclei lie on the DAPI image of their own output folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from celldetr.config.xenium import RegistrationSettings
from celldetr.runtime.errors import InputError
from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.affine import Floats, decompose, fit_affine, scaling
from celldetr.xenium.registration.maps import Grid, band, intensity, match_blocks, sample, window
from celldetr.xenium.registration.nuclei import DapiNuclei, Region, draw_labels

_STEPS = ((1.0, 15.0), (2.0, 60.0))  # spacing of samples and reach of the search, um
_FINE, _WIDE = 1.0, 8.0  # um; structures between these sizes are compared
_RIM = 10.0  # um around a window; half of a large nucleus
# Score of a window that is found. Of 24 drawn and real sections, right outlines have 0.25 to 0.67 (0.05 to 0.24 if 2 um
# too wide, or if one of 15 nuclei is segmented), those of another place 0.06 at most
_CLEAR = 0.06
_MOST = 2.0  # um between outlines and image; right ones are up to 0.65 um off
_SHARE, _FOUND = 0.75, 0.5  # of the windows, that must be no farther off, and that must be found
_FEWEST = 4  # windows that tell a size and an angle, or a swap: one or two fit by chance
_SIZE, _ANGLE = 0.002, 0.2  # of the outlines against the image, relative and degrees, from which on they are told


@dataclass(frozen=True)
class _Offsets:
    """What lies where the outlines of windows are, in the DAPI image."""

    centres: Floats  # (n, 2) um
    shifts: Floats  # (n, 2) um from the outlines to the nuclei of the image
    score: Floats  # (n,) of `match_blocks`

    @property
    def found(self) -> NDArray[np.bool_]:
        """Windows (n,) that are found in the image."""
        return self.score >= _CLEAR

    @property
    def enough(self) -> bool:
        """Whether enough windows are found to say how the outlines lie."""
        return bool(self.found.mean() >= _FOUND)

    @property
    def fits(self) -> bool:
        """Whether the outlines lie on the image: most windows that are found, or most of all, as chance hits few."""
        near = np.linalg.norm(self.shifts, axis=1) <= _MOST
        return bool(near.mean() >= _SHARE or (self.enough and near[self.found].mean() >= _SHARE))

    @property
    def certain(self) -> bool:
        """Whether the outlines lie on the image beyond doubt: windows that are found say so, and not a few."""
        return self.fits and self.enough and int(self.found.sum()) >= _FEWEST


def check_outlines(
    dapi: Pyramid, nuclei: DapiNuclei, regions: list[Region], pixel_size: float, settings: RegistrationSettings
) -> list[str]:
    """Compare the outlines of nuclei with their DAPI image; returns warnings.

    `pixel_size` is um per px of the image. Raises InputError if the outlines lie on it only with x and y swapped, or
    mirrored; in sections of less than four windows that is a warning.
    """
    side = settings.window
    near = _offsets(dapi, nuclei, [region.centre for region in regions], pixel_size, side, 0)
    if near.fits:
        return []
    if not near.enough:
        for what, undo in _mistakes(np.array(dapi.size) * pixel_size).items():
            other = DapiNuclei(shapely.transform(nuclei.outlines, undo))
            centres = [undo(region.centre[None])[0] for region in regions]
            if _offsets(dapi, other, centres, pixel_size, side, 0).certain:
                raise InputError(
                    f"got outlines of nuclei that lie on the DAPI image {dapi.path} only if {what}; expected both from "
                    "one output folder: get nucleus_boundaries.parquet and the image again"
                )
        near = _offsets(dapi, nuclei, near.centres, pixel_size, side, 1)
    return [_text(dapi, near)]


def _offsets(
    dapi: Pyramid, nuclei: DapiNuclei, centres: Sequence[Floats] | Floats, pixel_size: float, side: float, step: int
) -> _Offsets:
    """Find the outlines in windows around centres (2,), um, in the DAPI image."""
    spacing, reach = _STEPS[step]
    around = 2 * round(reach / spacing) * spacing
    drawn, seen = [], []
    for centre in centres:
        grid = window(centre, side, spacing)
        near = nuclei.tree.query_ball_point(centre, side / 2 + _RIM, p=np.inf)
        # corners are cut off to whole samples
        rounded = Grid(grid.x - spacing / 2, grid.y - spacing / 2, spacing, grid.width, grid.height)
        mask = draw_labels(nuclei.outlines[near], rounded) > 0
        wide = window(centre, grid.width * spacing + around, spacing)
        image = sample(dapi, wide, scaling(1 / pixel_size), intensity)
        drawn.append(band(mask.astype(np.float32), _FINE / spacing, _WIDE / spacing))
        seen.append(band(image, _FINE / spacing, _WIDE / spacing))
    shifts, score = match_blocks(np.stack(drawn), np.stack(seen))
    return _Offsets(np.array(centres), shifts * spacing, score)


def _mistakes(size: Floats) -> dict[str, Callable[[Floats], Floats]]:
    """List what undoes the mistakes of programs with outlines on an image of a size (2,), um."""
    width, height = size.tolist()
    return {
        "x and y are swapped": lambda points: points[:, ::-1],
        "they are mirrored from left to right": lambda points: (width, 0) + points * (-1, 1),
        "they are mirrored from top to bottom": lambda points: (0, height) + points * (1, -1),
    }


def _text(dapi: Pyramid, near: _Offsets) -> str:
    """Say how the outlines lie to the image."""
    found = near.found
    distance = np.linalg.norm(near.shifts[found], axis=1)
    start = f"DAPI image {dapi.path.name}: the outlines of nuclei"
    remedy = (
        "; the patches follow the outlines, but in SpatialData the cells lie beside this image: take "
        "nucleus_boundaries.parquet and the image from one output folder"
    )
    if not near.enough:
        where = f"{found.sum()} of {len(found)} windows"
        return f"{start} are found in it in {where}, unless they are far wider than nuclei or it shows none{remedy}"
    x, y = -np.median(near.shifts[found], axis=0)
    text = f"{start} lie {np.median(distance):.1f} um beside it ({x:+.1f} um in x, {y:+.1f} um in y"
    text += f", at most {distance.max():.1f} um)"
    if found.sum() >= _FEWEST:
        there = near.centres[found]
        parts = decompose(fit_affine(there + near.shifts[found], there))
        text += f", {parts.scale:.3f} times its size" if abs(parts.scale - 1) > _SIZE else ""
        text += f", turned by {parts.rotation_degrees:.1f} degrees" if abs(parts.rotation_degrees) > _ANGLE else ""
    return text + remedy
