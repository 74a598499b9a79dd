"""Estimate the matrix from the images: rotations over the full circle on coarse maps, then finer and finer maps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from celldetr.config.xenium import RegistrationSettings
from celldetr.slides.pyramid import Pyramid
from celldetr.slides.stains import hematoxylin
from celldetr.xenium.registration.affine import Floats, affine, apply, fit_robust, inverse, rotation, scaling
from celldetr.xenium.registration.maps import Grid, Values, band, intensity, match_blocks, sample

_FINEST = 2.0  # um of a sample
_LARGEST = 2048  # samples along the finest map of the smaller image; the larger one may have twice as many
_SMALLEST = 96  # fewest samples along the coarsest map of the smaller image
_BLOCK = 48  # samples along the side of a block
_BLOCKS = 120  # blocks that are compared on a map
_PEAKS = 2  # shifts kept for each linear part
_CANDIDATES = 12  # kept from the coarsest maps
_NEARBY = (-4.0, -2.0, 0.0, 2.0, 4.0)  # degrees around a given matrix


@dataclass(frozen=True)
class MapPair:
    """Band-passed maps of both images with square samples of the same size; both begin at the corner of their image."""

    spacing: float  # side of a sample, um (for the H&E by its nominal pixel size)
    he: Values  # (h, w)
    dapi: Values  # (h, w)
    he_mpp: float  # nominal um per H&E px


@dataclass(frozen=True)
class Candidate:
    """A matrix (3, 3), H&E level-0 px -> um of the Xenium frame, and its score."""

    to_um: Floats
    score: float


def make_maps(he: Pyramid, dapi: Pyramid, he_mpp: float, pixel_size: float) -> list[MapPair]:
    """Make maps from the coarsest to the finest; `he_mpp` (known or assumed) and `pixel_size` are um per px."""
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
        even = [np.pad(values, [(0, side % 2) for side in values.shape], mode="edge") for values in whole]
        whole = [values.reshape(len(values) // 2, 2, -1, 2).mean(axis=(1, 3)) for values in even]
        spacing *= 2


def estimate(
    maps: Sequence[MapPair], scales: Iterable[float], settings: RegistrationSettings, seed: int
) -> list[Floats]:
    """Estimate the matrix without a file.

    `maps` are ordered from coarse to fine; `scales` are factors on the nominal size of an H&E pixel to try. Returns at
    most 3 matrices (3, 3), H&E level-0 px -> um of the Xenium frame, best first.
    """
    angles = np.arange(0, 360, settings.angle_step)
    linears = [scale * rotation(angle) @ np.diag([1, flip]) for scale in scales for flip in (1, -1) for angle in angles]
    return _polish(maps, _distinct(_search(maps[0], linears), maps[0], _CANDIDATES), keep=3, seed=seed)


def estimate_nearby(maps: Sequence[MapPair], to_um: Floats, seed: int) -> list[Floats]:
    """Estimate as `estimate`, from a matrix that is off by a few degrees and by any shift; returns at most 2."""
    linears = [rotation(angle) @ to_um[:2, :2] / maps[0].he_mpp for angle in _NEARBY]
    found = _distinct(_search(maps[0], linears), maps[0], 4)
    return _polish(maps, [Candidate(to_um, 0.0), *found], keep=2, seed=seed)


def _search(maps: MapPair, linears: Sequence[Floats]) -> list[Candidate]:
    """Find the best shifts of each linear part (2, 2), H&E um -> Xenium um, by correlation of whole maps; best first.

    The H&E map is warped into a square canvas that holds it at any rotation; the shifts of the canvas come from FFTs.
    """
    height, width = maps.he.shape
    stretch = max(np.linalg.norm(linear, 2) for linear in linears)
    canvas = int(np.ceil(np.hypot(height, width) * stretch)) + 2
    shape = tuple(fft.next_fast_len(canvas + side, real=True) for side in maps.dapi.shape)
    target = fft.rfft2(maps.dapi, shape)
    norm = float(np.linalg.norm(maps.dapi)) or 1.0
    middle_in, middle_out = np.array([height - 1, width - 1]) / 2, np.full(2, (canvas - 1) / 2)
    origin = np.array([width, height]) / 2 * maps.spacing
    found = []
    for linear in linears:
        back = np.linalg.inv(linear)[::-1, ::-1]  # rows before columns
        turned = ndimage.affine_transform(
            maps.he, back, middle_in - back @ middle_out, output_shape=(canvas, canvas), order=1
        )
        product = fft.irfft2(target * np.conj(fft.rfft2(turned, shape)), shape)
        most = norm * (float(np.linalg.norm(turned)) or 1.0)
        for _ in range(_PEAKS):
            peak = np.array(np.unravel_index(product.argmax(), product.shape))
            offset = np.where(peak > np.array(maps.dapi.shape), peak - shape, peak)
            centre = (offset + middle_out)[::-1] * maps.spacing + maps.spacing / 2
            to_um = affine(linear, centre - linear @ origin) @ scaling(maps.he_mpp)
            found.append(Candidate(to_um, float(product[tuple(peak)]) / most))
            rows, columns = ((peak[axis] + np.arange(-4, 5)) % shape[axis] for axis in (0, 1))
            product[np.ix_(rows, columns)] = -most
    return sorted(found, key=lambda candidate: -candidate.score)


def _distinct(found: Sequence[Candidate], maps: MapPair, count: int) -> list[Candidate]:
    """Keep the best candidates that map the corners of the H&E to different places."""
    height, width = maps.he.shape
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)]) * maps.spacing / maps.he_mpp
    kept: list[tuple[Candidate, Floats]] = []
    for candidate in found:
        places = apply(candidate.to_um, corners)
        if all(np.linalg.norm(places - other, axis=1).mean() > 4 * maps.spacing for _, other in kept):
            kept.append((candidate, places))
        if len(kept) == count:
            break
    return [candidate for candidate, _ in kept]


def _polish(maps: Sequence[MapPair], found: Sequence[Candidate], keep: int, seed: int) -> list[Floats]:
    """Align candidates on finer and finer maps; fewer are kept each time."""
    current = list(found)
    for depth, pair in enumerate(maps):
        reaches = (16, 8, 4) if depth == 0 else (8, 4)
        improved = []
        for candidate in current:
            for reach in reaches:
                candidate = _align(pair, candidate.to_um, reach, seed)
            improved.append(candidate)
        improved.sort(key=lambda candidate: -candidate.score)
        current = improved[: max(keep, len(found) // 2 ** (depth + 1))]
    return [candidate.to_um for candidate in _distinct(current, maps[-1], keep)]


def _align(maps: MapPair, to_um: Floats, reach: int, seed: int) -> Candidate:
    """Improve a matrix by finding blocks of the DAPI map in the H&E map, up to `reach` samples away.

    The score is the sum of the trust in the inlier blocks, per block.
    """
    block = min(_BLOCK, min(maps.dapi.shape))
    corners = _block_corners(maps, to_um, block)
    if not len(corners):
        return Candidate(to_um, 0.0)
    fixed = np.stack([maps.dapi[y : y + block, x : x + block] for x, y in corners])
    moving = np.stack([_warp(maps, to_um, corner - reach, block + 2 * reach) for corner in corners])
    shifts, score = match_blocks(fixed, moving)
    if not score.any():
        return Candidate(to_um, 0.0)
    centres = (corners + block / 2) * maps.spacing
    moved, tolerance = centres + shifts * maps.spacing, max(2.0, reach / 6) * maps.spacing
    update, inliers = fit_robust(moved, centres, score + 1e-6, tolerance=tolerance, seed=seed)
    return Candidate(update @ to_um, float(score[inliers].sum() / len(score)))


def _warp(maps: MapPair, to_um: Floats, corner: NDArray[np.int64], side: int) -> Values:
    """Square of the H&E map, warped onto the DAPI map."""
    to_map = scaling(maps.he_mpp / maps.spacing) @ inverse(to_um) @ scaling(maps.spacing)
    x = (corner[0] + np.arange(side) + 0.5)[None, :]
    y = (corner[1] + np.arange(side) + 0.5)[:, None]
    positions = [to_map[axis, 0] * x + to_map[axis, 1] * y + to_map[axis, 2] - 0.5 for axis in (1, 0)]
    return np.asarray(ndimage.map_coordinates(maps.he, positions, order=1, mode="constant"))


def _block_corners(maps: MapPair, to_um: Floats, block: int) -> NDArray[np.int64]:
    """Corners (n, 2), x and y, of the blocks with most signal whose centre is inside the H&E."""
    step = max(block // 2, 1)
    height, width = maps.dapi.shape
    x, y = np.meshgrid(np.arange(0, width - block + 1, step), np.arange(0, height - block + 1, step))
    corners = np.column_stack([x.ravel(), y.ravel()]).astype(np.int64)
    he = apply(inverse(to_um), (corners + block / 2) * maps.spacing) * maps.he_mpp / maps.spacing
    corners = corners[((he > 0) & (he < np.array(maps.he.shape)[::-1])).all(axis=1)]
    if not len(corners):
        return corners
    signal = np.array([np.abs(maps.dapi[y : y + block, x : x + block]).mean() for x, y in corners])
    strong = np.flatnonzero(signal > 0.3 * np.percentile(signal, 90))
    if len(strong) > _BLOCKS:
        strong = strong[np.linspace(0, len(strong) - 1, _BLOCKS).round().astype(int)]
    return corners[strong]
