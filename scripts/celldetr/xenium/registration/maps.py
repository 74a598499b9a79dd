"""Maps of both images from the whole section down to a few um a sample, and the affine between them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from celldetr.slides.pyramid import Pyramid
from celldetr.xenium.registration.images import Grid, Values, hematoxylin, intensity, sample
from celldetr.xenium.registration.matching import band, match_blocks
from celldetr.xenium.registration.transform import affine, apply, fit_robust, inverse, scaling

_FINEST = 2.0  # um of a sample
_LARGEST = 2048  # samples along the finest map of the smaller image; the larger one may have twice as many
_SMALLEST = 96  # samples along the coarsest map of the smaller image, at least
_BLOCK = 48  # samples along the side of a block
_BLOCKS = 120  # blocks that are compared on a map
_PEAKS = 2  # places that are kept of each linear part


@dataclass(frozen=True)
class MapPair:
    """Banded maps with square samples of the same size.

    Attributes
    ----------
    spacing
        Side of a sample, um (of the H&E: by its nominal pixel size).
    he, dapi
        (h, w) each; both begin at the corner of their image.
    he_mpp
        Nominal um per H&E px.
    """

    spacing: float
    he: Values
    dapi: Values
    he_mpp: float


@dataclass(frozen=True)
class Candidate:
    """A matrix (3, 3) from H&E level-0 px to um of the Xenium frame, and what speaks for it."""

    to_um: NDArray[np.float64]
    score: float


def make_maps(he: Pyramid, dapi: Pyramid, he_mpp: float, pixel_size: float) -> list[MapPair]:
    """Make maps from the coarsest to the finest.

    Parameters
    ----------
    he, dapi
        The images.
    he_mpp
        um per H&E px, known or assumed.
    pixel_size
        um per Xenium px.
    """
    extents = [max(he.size) * he_mpp, max(dapi.size) * pixel_size]
    spacing = max(_FINEST, min(extents) / _LARGEST, max(extents) / (2 * _LARGEST))
    whole = []
    for image, mpp, convert in ((he, he_mpp, hematoxylin), (dapi, pixel_size, intensity)):
        size = [max(int(np.ceil(side * mpp / spacing)), 1) for side in image.size]
        whole.append(sample(image, Grid(0.0, 0.0, spacing, *size), scaling(1 / mpp), convert))
    pairs = []
    while True:
        pairs.append(MapPair(spacing, band(whole[0]), band(whole[1]), he_mpp))
        if min(max(values.shape) for values in whole) < 2 * _SMALLEST:
            return pairs[::-1]
        whole = [_halve(values) for values in whole]
        spacing *= 2


def _halve(values: Values) -> Values:
    """Average 2 x 2 samples; the last row or column of an odd number is doubled."""
    even = np.pad(values, [(0, side % 2) for side in values.shape], mode="edge")
    halved: Values = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2).mean(axis=(1, 3))
    return halved


def search(maps: MapPair, linears: Iterable[NDArray[np.float64]]) -> list[Candidate]:
    """Find the best shifts for each linear part by correlation of whole maps.

    Parameters
    ----------
    maps
        A coarse pair.
    linears
        Linear parts (2, 2): nominal um of the H&E -> um of the Xenium frame.

    Returns
    -------
    list of Candidate
        Best first.
    """
    linears = list(linears)
    height, width = maps.he.shape
    stretch = max(np.linalg.norm(linear, 2) for linear in linears)
    canvas = int(np.ceil(np.hypot(height, width) * stretch)) + 2
    shape = tuple(fft.next_fast_len(canvas + side, real=True) for side in maps.dapi.shape)
    target = fft.rfft2(maps.dapi, shape)
    norm = float(np.linalg.norm(maps.dapi)) or 1.0
    middle_in, middle_out = np.array([height - 1, width - 1]) / 2, np.full(2, (canvas - 1) / 2)
    found = []
    for linear in linears:
        back = np.linalg.inv(linear)[::-1, ::-1]  # rows before columns
        turned = ndimage.affine_transform(
            maps.he, back, middle_in - back @ middle_out, output_shape=(canvas, canvas), order=1
        )
        product = fft.irfft2(target * np.conj(fft.rfft2(turned, shape)), shape)
        most = norm * (float(np.linalg.norm(turned)) or 1.0)
        for _ in range(_PEAKS):
            place = np.array(np.unravel_index(product.argmax(), product.shape))
            score = float(product[tuple(place)]) / most
            offset = np.where(place > np.array(maps.dapi.shape), place - shape, place)
            centre = (offset + middle_out)[::-1] * maps.spacing + maps.spacing / 2
            origin = np.array([width, height]) / 2 * maps.spacing
            to_um = affine(linear, centre - linear @ origin) @ scaling(maps.he_mpp)
            found.append(Candidate(to_um, score))
            rows, columns = ((place[axis] + np.arange(-4, 5)) % shape[axis] for axis in (0, 1))
            product[np.ix_(rows, columns)] = -most
    return sorted(found, key=lambda candidate: -candidate.score)


def align(maps: MapPair, to_um: NDArray[np.float64], reach: int, seed: int) -> Candidate:
    """Improve a matrix by finding blocks of the DAPI map in the H&E map.

    Parameters
    ----------
    maps
        Pair of maps.
    to_um
        (3, 3), H&E level-0 px -> um of the Xenium frame.
    reach
        How far away a block may be, samples.
    seed
        Of the choice of blocks that a fit begins with.

    Returns
    -------
    Candidate
        Improved matrix; the score is the trust in the blocks that agree, per block.
    """
    block = min(_BLOCK, min(maps.dapi.shape))
    corners = _block_corners(maps, to_um, block)
    if not len(corners):
        return Candidate(to_um, 0.0)
    fixed = np.stack([maps.dapi[y : y + block, x : x + block] for x, y in corners])
    moving = np.stack([_through(maps, to_um, corner - reach, block + 2 * reach) for corner in corners])
    shifts, score = match_blocks(fixed, moving)
    if not score.any():
        return Candidate(to_um, 0.0)
    centres = (corners + block / 2) * maps.spacing
    update, agree = fit_robust(
        centres + shifts * maps.spacing, centres, score + 1e-6, tolerance=max(2.0, reach / 6) * maps.spacing, seed=seed
    )
    return Candidate(update @ to_um, float(score[agree].sum() / len(score)))


def _through(maps: MapPair, to_um: NDArray[np.float64], corner: NDArray[np.int64], side: int) -> Values:
    """Square of the H&E map as it lies on the DAPI map."""
    to_map = scaling(maps.he_mpp / maps.spacing) @ inverse(to_um) @ scaling(maps.spacing)
    x = (corner[0] + np.arange(side) + 0.5)[None, :]
    y = (corner[1] + np.arange(side) + 0.5)[:, None]
    places = [to_map[axis, 0] * x + to_map[axis, 1] * y + to_map[axis, 2] - 0.5 for axis in (1, 0)]
    found: Values = ndimage.map_coordinates(maps.he, places, order=1, mode="constant")
    return found


def _block_corners(maps: MapPair, to_um: NDArray[np.float64], block: int) -> NDArray[np.int64]:
    """Corners (n, 2) x and y of blocks that have most signal and whose centre is inside the H&E."""
    step = max(block // 2, 1)
    height, width = maps.dapi.shape
    x, y = np.meshgrid(np.arange(0, width - block + 1, step), np.arange(0, height - block + 1, step))
    corners = np.column_stack([x.ravel(), y.ravel()]).astype(np.int64)
    he = apply(inverse(to_um), (corners + block / 2) * maps.spacing) * maps.he_mpp / maps.spacing
    within = ((he > 0) & (he < np.array(maps.he.shape)[::-1])).all(axis=1)
    corners = corners[within]
    signal = np.array([np.abs(maps.dapi[y : y + block, x : x + block]).mean() for x, y in corners])
    if not len(corners):
        return corners
    strong = np.flatnonzero(signal > 0.3 * np.percentile(signal, 90))
    if len(strong) > _BLOCKS:
        strong = strong[np.linspace(0, len(strong) - 1, _BLOCKS).round().astype(int)]
    return corners[strong]
