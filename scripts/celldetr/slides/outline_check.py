"""Check that outlines lie on the nuclei of their slide, and name what would make them fit if they do not.

Hematoxylin inside the outlines of a few windows is compared with that inside the same outlines at shifted places.
Nuclei are dark, so that outlines that fit have a sharp peak without a shift. Outlines of another pixel size, of another
place or with x and y swapped have none, or have it at the shift that they lack.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.signal import fftconvolve

from celldetr.runtime.errors import InputError
from celldetr.slides.boxes import SlideNuclei, centres_of
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.stains import hematoxylin

log = logging.getLogger(__name__)

_ON_SLIDE = 0.9  # smallest fraction of the outlines that must lie on the slide
_BESIDE = 1.0  # um; warn if outlines that fit lie farther beside the nuclei
_SPACING = 0.5  # um of a pixel of a window
_SIDE, _REACH = 128.0, 40.0  # um; side of a window, and largest shift
_WINDOWS, _IN_WINDOW = 12, 300  # windows; nuclei that are drawn in each
_PARTS, _IN_PART = 3, 4  # parts of a slide across and down, and of a file; windows in each
_NEAR, _FAR = 3.0, 10.0  # um; shifts that do not matter, and shifts that count as another place
# Standard deviations of the peak above other places. Measured on CoNSeP and TNBC: 5.3 to 11 with 20 nuclei that fit,
# 50 to 71 with thousands; by chance up to 7.2 with 20 nuclei, 5.1 with thousands, hardly ever without a shift.
_GOOD, _CLEAR = 5.0, 8.0
_ENOUGH = 50  # nuclei for a verdict
_BACKGROUND = 32.0  # um; hematoxylin that changes more slowly is not of nuclei
_DARKEST, _FAINT = 1.5, 0.3  # optical density at which folds and ink are cut, in windows and on the overview
_COARSE, _STRIP = 4.0, 512  # um of a cell of the overview; rows that are read at once for it
_MOST_CELLS = 1500  # longest side of the overview on which a shift is searched
_SAMPLED, _LARGEST = 4000, 5.0  # outlines with which factors are tried; the largest factor


@dataclass(frozen=True)
class Keys:
    """What errors call the settings of a file of nuclei: columns of a sheet, or options of a command."""

    sheet: str = ""
    """Name of the sheet; empty: options."""

    def __call__(self, column: str) -> str:
        """Name of a setting."""
        return column if self.sheet else f"--{column.replace('_', '-')}"

    @property
    def where(self) -> str:
        """The sheet, for the end of a sentence."""
        return f" ({self.sheet})" if self.sheet else ""


SLIDES = Keys("slides sheet")


@dataclass(frozen=True)
class OutlineFit:
    """How well outlines fit their slide."""

    nuclei: int
    """Outlines that were compared."""
    peak: float
    """Height of the peak in standard deviations of other places."""
    shift: tuple[float, float]
    """x, y in um by which the outlines must be moved to lie on the peak."""

    @property
    def good(self) -> bool:
        """Whether the outlines lie on nuclei."""
        return self.peak >= _GOOD and float(np.hypot(*self.shift)) <= _NEAR

    @property
    def judged(self) -> bool:
        """Whether the outlines suffice to tell."""
        return self.good or self.nuclei >= _ENOUGH


class OutlineCheck:
    """Outlines (M,), px of `mpp` um from the corner of a slide, that are compared with the slide.

    If they are `circles` that stand for points, only their places depend on the units of a file, not their size.
    """

    def __init__(self, image: Pyramid, outlines: NDArray[np.object_], mpp: float, *, circles: bool = False) -> None:
        self._image, self._outlines, self._mpp, self._circles = image, outlines, mpp, circles
        self._image_mpp = float(image.mpp or 0)
        self._tree = shapely.STRtree(outlines)

    def remedies(self, unit: float) -> list[str]:
        """Name what would make the outlines fit; `unit` is um per unit of their file."""
        guesses = {
            "": np.eye(3),
            "with x and y swapped": np.eye(3)[[1, 0, 2]],
            "with y negated": np.diag([1.0, -1.0, 1.0]),
            "with y counted from the bottom": np.array(
                [[1, 0, 0], [0, -1, self._image.size[1] * self._image_mpp], [0, 0, 1]]
            ),
        }
        x, y = self._image.origin
        if x or y:
            name = f"moved by {x}, {y} px of level 0 (openslide.bounds-x and -y, which QuPath leaves out: unit qupath)"
            guesses[name] = _moved(np.array([x, y]) * self._image_mpp)
        found = [*self._fitting(guesses)]
        if not found:
            stain, cell = self._overview()
            factor = self._find_factor(stain, cell)
            name = f"multiplied by about {factor:.4g}, as if in px of {factor * unit:.3g} um"
            found = [*self._fitting({name: np.diag([factor, factor, 1.0]), "": _moved(self._find_shift(stain, cell))})]
        return found

    def _fitting(self, guesses: Mapping[str, NDArray[np.float64]]) -> Iterator[str]:
        """Name the affines (3, 3), um to um, that make the outlines fit, perhaps with a shift in addition."""
        for name, to_slide in guesses.items():
            fit = self.measure(to_slide)
            if fit.peak >= _CLEAR:
                missing = fit.shift if name else to_slide[:2, 2] + fit.shift
                x, y = np.rint(np.array(missing) / self._image_mpp).astype(int)
                yield name if name and fit.good else f"{name}{' and ' * bool(name)}moved by {x}, {y} px of level 0"

    def _find_factor(self, stain: NDArray[np.float32], cell: float) -> float:
        """Factor by which the outlines lie in most hematoxylin; `stain` and `cell` are those of `_overview`."""
        centres = np.random.default_rng(0).permutation(self._centres())[:_SAMPLED] / cell
        step = 1 / max(stain.shape)  # moves the far end of the slide by a cell of the map
        factors = np.exp(np.arange(-np.log(_LARGEST), np.log(_LARGEST), step))
        values = []
        for factor in factors:
            x, y = (centres * factor).astype(int).T
            there = (x >= 0) & (y >= 0) & (x < stain.shape[1]) & (y < stain.shape[0])
            values.append(stain[y[there], x[there]].sum() / np.sqrt(max(there.sum(), 1)))
        return float(factors[np.argmax(values)])

    def _find_shift(self, stain: NDArray[np.float32], cell: float) -> NDArray[np.float64]:
        """Shift (2,) in um by which the outlines lie in most hematoxylin."""
        times = -(-max(stain.shape) // _MOST_CELLS)
        height, width = (side // times for side in stain.shape)
        stain = stain[: height * times, : width * times].reshape(height, times, width, times).mean(axis=(1, 3))
        cell *= times
        x, y = self._centres().T / cell
        counts = np.histogram2d(y, x, bins=(height, width), range=((0, height), (0, width)))[0]
        inside = fftconvolve(stain, counts[::-1, ::-1])
        row, column = np.unravel_index(inside.argmax(), inside.shape)
        return np.array([column - width + 1, row - height + 1]) * cell

    def _overview(self) -> tuple[NDArray[np.float32], float]:
        """Hematoxylin (h, w) of the whole slide in cells of about `_COARSE` um, and their side in um."""
        number = self._image.level_for(_COARSE / self._image_mpp)
        level = self._image.levels[number]
        um = self._image_mpp * level.downsample
        side = max(1, round(_COARSE / um))
        across, down = level.width // side, level.height // side
        stain = np.empty((down, across), np.float32)
        step = max(1, _STRIP // side)
        for row in range(0, down, step):
            rows = min(step, down - row)
            pixels = self._image.read(number, 0, row * side, across * side, rows * side)
            stain[row : row + rows] = hematoxylin(pixels).reshape(rows, side, across, side).mean(axis=(1, 3))
        stain = _sharp(stain, side * um)
        return np.clip(stain, -_FAINT, _FAINT), side * um

    def _centres(self) -> NDArray[np.float64]:
        """Centres of the outlines (M, 2), um."""
        return centres_of(shapely.bounds(self._outlines)) * self._mpp

    def measure(self, to_slide: NDArray[np.floating] | None = None, windows: int = _WINDOWS) -> OutlineFit:
        """Compare the outlines with the slide; `to_slide` (3, 3) moves them first, um to um from the slide's corner."""
        to_slide = np.eye(3) if to_slide is None else to_slide
        centres = self._centres() @ to_slide[:2, :2].T + to_slide[:2, 2]
        to_um = to_slide @ np.diag([self._mpp, self._mpp, 1])
        on_slide = ((centres > 0) & (centres < np.array(self._image.size) * self._image_mpp)).all(axis=1)
        places = np.random.default_rng(0).permutation(np.flatnonzero(on_slide))[:windows]
        reach = round(_REACH / _SPACING)
        stain_inside = np.zeros((2 * reach + 1, 2 * reach + 1))
        compared: set[int] = set()
        area = 0.0
        for low in centres[places] - _SIDE / 2:
            corners = np.array([low, low + _SIDE]) - to_um[:2, 2]
            window = shapely.box(*(np.linalg.inv(to_um[:2, :2]) @ corners.T).T.ravel())
            chosen = self._tree.query(window)[:_IN_WINDOW]
            if self._circles:
                mask = _draw(self._moved_circles(chosen, to_um), np.eye(3), low)
            else:
                mask = _draw(self._outlines[chosen], to_um, low)
            stain_inside += fftconvolve(self._stain(low - _REACH), mask[::-1, ::-1], mode="valid")
            area += mask.sum()
            compared.update(chosen.tolist())
        return _peak(stain_inside / max(area, 1.0), len(compared))

    def _moved_circles(self, chosen: NDArray[np.integer], to_um: NDArray[np.floating]) -> NDArray[np.object_]:
        """Move the centres of some circles (n,) to um, and keep their size."""
        bounds = shapely.bounds(self._outlines[chosen])
        centres = centres_of(bounds) @ to_um[:2, :2].T + to_um[:2, 2]
        return np.asarray(shapely.buffer(shapely.points(centres), (bounds[:, 2] - bounds[:, 0]) / 2 * self._mpp))

    def _stain(self, low: NDArray[np.float64]) -> NDArray[np.float32]:
        """Hematoxylin of a window and of what is in reach; `low` is its corner, um."""
        level = self._image.level_for(_SPACING / self._image_mpp)
        um = self._image_mpp * self._image.levels[level].downsample
        side = _SIDE + 2 * _REACH
        x, y = np.rint(low / um).astype(int).tolist()
        pixels = self._image.read(level, x, y, round(side / um), round(side / um))
        size = round(side / _SPACING)
        resized = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
        return _sharp(np.minimum(hematoxylin(resized), _DARKEST), _SPACING)


def require_fit(
    image: Pyramid,
    nuclei: SlideNuclei,
    mpp: float,
    *,
    name: str,
    file: Path,
    unit: str,
    insist: bool = True,
    circles: bool = False,
    keys: Keys = SLIDES,
) -> tuple[SlideNuclei, OutlineFit]:
    """Return the nuclei, px of `mpp` um, that lie on the slide `name`, and how well they fit it.

    `file` and `unit` (see `celldetr.slides.outlines.file_to_level0`) are what they were read from; for `circles` see
    `OutlineCheck`. Without `insist`, those that lie on the slide are taken even if they do not fit.

    Raises
    ------
    InputError
        Many lie outside the slide, or not on what hematoxylin stains.
    """
    image_mpp = float(image.mpp or 0)
    width, height = image.size
    inside = nuclei.on_slide((width * image_mpp / mpp, height * image_mpp / mpp))
    check = OutlineCheck(image, nuclei.outlines, mpp, circles=circles)
    fit = check.measure()
    outside = len(inside) < _ON_SLIDE * len(nuclei)
    if outside or (insist and fit.judged and not fit.good):
        remedies = " or ".join(check.remedies(1.0 if unit == "um" else image_mpp))
        override = "" if outside else f", or set {keys('check_outlines')} to no if they fit"
        raise InputError(
            f"{name}: {file}: got {len(nuclei)} nuclei in {unit}, of which {len(inside)} lie on the slide ({width} x "
            f"{height} px of {image_mpp:.4g} um); of {fit.nuclei} compared, hematoxylin is highest {fit.shift[0]:g}, "
            f"{fit.shift[1]:g} um away ({fit.peak:.1f} sd above other places); expected outlines on stained nuclei. "
            f"{f'They would fit {remedies}' if remedies else 'Nothing tried makes them fit'}; correct the file, "
            f"{keys('nuclei_unit')} or {keys('mpp')}{override}{keys.where}"
        )
    if not fit.judged:
        log.warning("%s: %d nuclei are too few to check that they fit the slide", name, fit.nuclei)
    elif not fit.good:
        log.warning("%s: the outlines do not fit the slide, and are taken as %s is no", name, keys("check_outlines"))
    elif math.hypot(*fit.shift) > _BESIDE:
        log.warning("%s: outlines lie beside the nuclei: they fit best if moved by %g, %g um", name, *fit.shift)
    if fit.good:
        _warn_of_parts(image, nuclei, mpp, name, circles=circles)
    return inside, fit


def _warn_of_parts(image: Pyramid, nuclei: SlideNuclei, mpp: float, name: str, *, circles: bool) -> None:
    """Name parts of a file that fits which do not fit: parts of the slide, and successive nuclei of the file."""
    x, y = centres_of(nuclei.boxes).T * mpp / float(image.mpp or 0)
    places = [np.floor(np.clip(at / side, 0, 1 - 1e-9) * _PARTS) for at, side in zip((x, y), image.size, strict=True)]
    order = np.arange(len(nuclei))
    for part in (places[1] * _PARTS + places[0], order * _PARTS // max(1, len(nuclei))):
        for members in np.split(np.argsort(part, kind="stable"), np.flatnonzero(np.diff(np.sort(part))) + 1):
            if len(members) < _ENOUGH:
                continue
            fit = OutlineCheck(image, nuclei.outlines[members], mpp, circles=circles).measure(windows=_IN_PART)
            if fit.nuclei >= _ENOUGH and math.hypot(*fit.shift) > _NEAR:  # a low peak that is near is no other place
                low, high = (np.rint([limit(x[members]), limit(y[members])]).astype(int) for limit in (np.min, np.max))
                log.warning(
                    "%s: %d nuclei, %d to %d of those that are given, at %d, %d to %d, %d px of level 0, do not fit: "
                    "of %d compared, hematoxylin is highest %g, %g um away (%.1f sd above other places)",
                    name,
                    len(members),
                    members.min() + 1,
                    members.max() + 1,
                    *low,
                    *high,
                    fit.nuclei,
                    *fit.shift,
                    fit.peak,
                )


def _sharp(stain: NDArray[np.float32], spacing: float) -> NDArray[np.float32]:
    """Take the slow changes out of a map with px of `spacing` um."""
    return np.asarray(stain - ndimage.uniform_filter(stain, round(_BACKGROUND / spacing)))


def _moved(shift: NDArray[np.floating]) -> NDArray[np.float64]:
    """Affine (3, 3) of a shift (2,)."""
    affine = np.eye(3)
    affine[:2, 2] = shift
    return affine


def _draw(outlines: NDArray[np.object_], to_um: NDArray[np.floating], low: NDArray[np.float64]) -> NDArray[np.float32]:
    """Mask of the outlines in the window whose corner is `low`, um."""
    size = round(_SIDE / _SPACING)
    picture = Image.new("L", (size, size))
    pen = ImageDraw.Draw(picture)
    for part in shapely.get_parts(outlines):
        corners = shapely.get_coordinates(shapely.get_exterior_ring(part)) @ to_um[:2, :2].T + to_um[:2, 2]
        if len(corners):
            pen.polygon(((corners - low) / _SPACING - 0.5).ravel().tolist(), fill=1)
    return np.asarray(picture, dtype=np.float32)


def _peak(values: NDArray[np.float64], nuclei: int) -> OutlineFit:
    """Find the peak of a map of values at all shifts."""
    reach = len(values) // 2
    y, x = (np.mgrid[-reach : reach + 1, -reach : reach + 1]) * _SPACING
    far = np.hypot(x, y) >= _FAR
    spread = float(values[far].std())
    if spread == 0:
        return OutlineFit(nuclei, 0.0, (0.0, 0.0))
    place = np.unravel_index(values.argmax(), values.shape)
    height = float(values[place] - values[far].mean()) / spread
    return OutlineFit(nuclei, height, (float(x[place]), float(y[place])))
